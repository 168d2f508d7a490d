"""Compare hypergradient estimators with the exact hypergradient: error against cost, and what each says of itself.

Ridge regression on scikit-learn's diabetes data, one strength per feature. Its hypergradient has a closed form, so for
once nobody needs to guess how wrong an approximation is. Look at two columns: `error` is the truth, `claimed` is what
the certificate estimates without knowing it.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import Tensor

import bilevel
from bilevel.solvers import Estimator

Batch = tuple[Tensor, Tensor]

# --- Data: 10 features and their products make 65, correlated enough for a condition number of 350.
table, target = load_diabetes(return_X_y=True)
features = StandardScaler().fit_transform(PolynomialFeatures(2, include_bias=False).fit_transform(table))
x, y = torch.tensor(features), torch.tensor((target - target.mean()) / target.std())
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, valid = (x[order[:300]], y[order[:300]]), (x[order[300:]], y[order[300:]])


def error(w: Tensor, batch: Batch) -> Tensor:
    return (batch[0] @ w - batch[1]).square().mean() / 2


problem = bilevel.BilevelProblem(
    inner_loss=lambda w, strength, batch: error(w, batch) + (strength * w.square()).sum() / 2,
    outer_loss=lambda w, strength, batch: error(w, batch),
    params=torch.zeros(x.shape[1], dtype=torch.float64),
    hparams=bilevel.positive(3e-2, shape=x.shape[1]),
    # Heavy ball, long enough to reach the minimum to ten digits: what is left is each estimator's own error. Only the
    # truncated ones need its steps; the others would take any solver.
    inner_solver=bilevel.inner.SGD(lr=0.15, momentum=0.9, steps=800),
    inner_data=train,
    outer_data=valid,
)


def exact(strength: Tensor) -> Tensor:
    """Return dF/dλ = -w * H^-1 grad f, with w = H^-1 X^T y / n and H = X^T X / n + diag(λ)."""
    hessian = train[0].T @ train[0] / len(train[0]) + torch.diag(strength)
    w: Tensor = torch.linalg.solve(hessian, train[0].T @ train[1] / len(train[0]))
    gradient = valid[0].T @ (valid[0] @ w - valid[1]) / len(valid[0])
    adjoint: Tensor = torch.linalg.solve(hessian, gradient)
    return -w * adjoint


@dataclass
class Row:
    """A line of the table."""

    method: str
    setting: str
    error: float
    cosine: float
    certificate: bilevel.Certificate
    cost: bilevel.Cost
    pulled: int  # vectors pulled back through a derivative of the inner problem: what an estimator spends


def measure(method: str, setting: str, estimator: Estimator, truth: Tensor, steps: int = 0) -> Row:
    # "ignore": half of the settings are too short on purpose, and the table shows the verdict anyway.
    found = bilevel.hypergradient(problem, estimator, on_untrusted="ignore")
    off = ((found.gradient - truth).norm() / truth.norm()).item()
    cosine = torch.cosine_similarity(found.gradient, truth, dim=0).item()
    return Row(method, setting, off, cosine, found.certificate, found.cost, found.cost.products + steps)


def draw(rows: list[Row]) -> None:
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for method, marker in (("truncated", "o"), ("neumann", "s"), ("cg", "^")):
        mine = [row for row in rows if row.method == method]
        axes.loglog([row.pulled for row in mine], [row.error for row in mine], marker=marker, label=method)
    axes.set(
        xlabel="vectors pulled back through the inner problem (Hessian-vector products, unrolled steps)",
        ylabel="relative error of the hypergradient",
        title="Ridge regression, 65 strengths: error against cost",
    )
    axes.axhline(1e-3, color="gray", linestyle=":", label='"exact" means below this')
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig("compare_estimators.png", dpi=150)


def main() -> None:
    torch.set_num_threads(1)  # tensors this small are faster without threads that wait for each other
    truth = exact(torch.full((x.shape[1],), 3e-2, dtype=torch.float64))
    lengths, tolerances = (5, 10, 20, 50, 100, 200, 400, 800), (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-10)
    rows = [measure("truncated", f"{k} steps", bilevel.Truncated(steps=k), truth, k) for k in lengths]
    rows += [measure("neumann", f"{k} terms", bilevel.Implicit(bilevel.Neumann(max_steps=k)), truth) for k in lengths]
    rows += [measure("cg", f"rtol {r:.0e}", bilevel.Implicit(bilevel.CG(rtol=r)), truth) for r in tolerances]

    print(f"{'method':<11}{'setting':<12}{'error':>9}{'cosine':>9}{'claimed':>9}  {'verdict':<12}gradients  products")
    for row in rows:
        claimed = "-" if row.certificate.error is None else f"{row.certificate.error:.1e}"
        print(
            f"{row.method:<11}{row.setting:<12}{row.error:>9.1e}{row.cosine:>9.5f}{claimed:>9}  "
            f"{row.certificate.verdict:<12}{row.cost.gradients:>9}{row.cost.products:>10}"
        )
    draw(rows)

    best = {row.method: row.error for row in rows}  # the last row of each method is its dearest
    assert best["cg"] < 1e-7 and best["truncated"] < 1e-7 and best["neumann"] < 1e-1
    # What a certificate calls exact is exact.
    assert all(row.error < 1e-3 for row in rows if row.certificate.verdict == "exact")


if __name__ == "__main__":
    main()
