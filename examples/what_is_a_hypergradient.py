"""What is a hypergradient?
========================

The slope of the validation loss, retraining included.

Ridge regression with one strength λ, so that everything can be drawn. Left: the validation loss of the trained weights
as λ changes, and the hypergradient at five points as a tangent. Nothing was retrained for the tangents: the implicit
function theorem says how the weights would move. Right: the same slope when training is cut short after T steps of
gradient descent. Unrolling differentiates the loop itself, so it is right about what T steps compute, however few. The
implicit formula speaks of the end of training, so it is wrong before that, and its certificate says so.
"""

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

import bilevel

x, y = (torch.tensor(part) for part in load_diabetes(return_X_y=True, scaled=True))
x = x / x.std(0)
y = (y - y.mean()) / y.std()
x = torch.cat([x, x[:, :1] * x, x[:, 2:3] * x], dim=1)  # products of features: enough of them to overfit
train_x, train_y, valid_x, valid_y = x[:60], y[:60], x[60:200], y[60:200]
LAMBDAS = torch.logspace(-4, 1, 61, dtype=torch.float64)
STEPS = (10, 30, 100, 300, 1000, 3000)


def training(w: Tensor, strength: Tensor) -> Tensor:
    return ((train_x @ w - train_y) ** 2).mean() + strength * (w**2).sum()


def validation(w: Tensor, strength: Tensor) -> Tensor:
    return ((valid_x @ w - valid_y) ** 2).mean()


def problem(strength: float, steps: int | None = None) -> bilevel.BilevelProblem:
    """Return the problem at one strength, trained to the end or by some steps of gradient descent."""
    solver = None if steps is None else bilevel.inner.SGD(lr=0.05, steps=steps)
    start = torch.zeros(x.shape[1], dtype=torch.float64)
    return bilevel.BilevelProblem(training, validation, start, bilevel.positive(strength), inner_solver=solver)


def closed_form(strength: float) -> float:
    """Return the validation loss of the ridge solution, by a dense solve."""
    n = len(train_y)
    w = torch.linalg.solve(
        train_x.T @ train_x / n + strength * torch.eye(x.shape[1], dtype=torch.float64), train_x.T @ train_y / n
    )
    return validation(w, w).item()


def main() -> None:
    curve = [closed_form(strength) for strength in LAMBDAS.tolist()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")

    left.semilogx(LAMBDAS, curve, color="0.3", label="F(λ), retrained at 61 strengths")
    for strength in (3e-4, 3e-3, 3e-2, 0.3, 3.0):
        h = bilevel.hypergradient(problem(strength))
        slope = h.gradient.item() * strength  # on the log axis: dF/d(log λ)
        shift = torch.tensor([-0.8, 0.8])
        left.plot(strength * shift.exp(), h.outer_loss + slope * shift, lw=3, color="C1")
        left.plot(strength, h.outer_loss, "o", color="C1")
        near = math.exp(1e-4)
        difference = (closed_form(strength * near) - closed_form(strength / near)) / 2e-4
        assert abs(slope - difference) < 1e-6 and h.certificate.verdict == "exact"
    tuned = bilevel.solve(problem(3e-4))
    left.axvline(tuned.hparams.item(), ls=":", color="C2", label=f"bilevel.solve: λ = {tuned.hparams.item():.2g}")
    left.set(xlabel="strength λ", ylabel="validation loss F(λ)", title="Hypergradients are its tangents")
    left.legend()

    truth = bilevel.hypergradient(problem(0.03)).gradient.item()
    found: dict[str, list[float]] = {"unroll": [], "implicit": []}
    for steps in STEPS:
        for method, values in found.items():
            h = bilevel.hypergradient(problem(0.03, steps), method, on_untrusted="ignore")
            values.append(h.gradient.item())
            print(f"{steps:6d} steps, {method:<8}  dF/dλ = {values[-1]:9.4f}  {h.certificate.verdict}")
            mark = "o" if h.certificate.trusted else "x"
            right.plot(steps, values[-1], mark, color="C0" if method == "unroll" else "C1", ms=8)
    right.semilogx(STEPS, found["unroll"], color="C0", label="unroll: the slope of what T steps compute")
    right.semilogx(STEPS, found["implicit"], color="C1", label="implicit: the slope at the end (x: untrusted)")
    right.axhline(truth, ls=":", color="0.3", label="the truth at the end of training")
    right.set(xlabel="steps T of training", ylabel="dF/dλ at λ = 0.03", title="When training is cut short")
    right.legend(loc="lower left")
    figure.savefig("what_is_a_hypergradient.png", dpi=110)

    assert abs(tuned.outer_loss - min(curve)) < 1e-3 * min(curve)
    assert abs(found["unroll"][-1] / truth - 1) < 1e-3 and abs(found["implicit"][-1] / truth - 1) < 1e-3


if __name__ == "__main__":
    main()
