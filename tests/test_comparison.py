"""`compare`: errors against the closed form, costs, refusals, and that nothing of the user's moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import BilevelProblem, InvalidTypeError, InvalidValueError, compare, inner, positive
from bilevel.cli import main
from bilevel.testing import known_problems, relative_error

KNOWN = {known.name: known for known in known_problems()}
RIDGE = next(iter(KNOWN.values()))


def rows(comparison: bilevel.Comparison) -> dict[str, bilevel.ComparedMethod]:
    return {row.method: row for row in comparison.rows}


@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN)
def test_the_default_reference_is_the_truth(known: Any) -> None:
    found = rows(compare(known.problem(), ["cg"]))["cg"]
    assert found.error is not None and found.error < 1e-7
    assert relative_error(found.gradient, known.truth.gradient) < 1e-7
    assert "verdict exact" in compare(known.problem(), ["direct"]).reference


def test_errors_are_those_against_the_truth() -> None:
    """A short series: the error in the table is the one against the closed form."""
    method = bilevel.Implicit(bilevel.Neumann(max_steps=3))
    comparison = compare(RIDGE.problem(), {"short": method, "long": "direct"})
    found = rows(comparison)
    expected = relative_error(found["short"].gradient, RIDGE.truth.gradient)
    assert found["short"].error == pytest.approx(expected, rel=1e-6) and expected > 1e-3
    assert relative_error(found["long"].gradient, RIDGE.truth.gradient) < 1e-8  # the inner solution has rtol 1e-9
    a, b = (torch.cat([t.reshape(-1) for t in _tensors(g)]) for g in (found["short"].gradient, RIDGE.truth.gradient))
    assert found["short"].cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), rel=1e-6)


def _tensors(structure: Any) -> list[Tensor]:
    return list(structure.values()) if isinstance(structure, dict) else [structure]


def test_an_unconverged_inner_solution_is_held_against_the_trained_one() -> None:
    """20 steps of SGD: the implicit method errs by what training left, and the reference does not."""
    found = compare(RIDGE.problem(inner.SGD(lr=0.05, steps=20)), ["direct", "unroll"])
    truth = rows(compare(RIDGE.problem(), ["direct"]))["direct"].gradient
    by_name = rows(found)
    for name in ("direct", "unroll"):
        expected = relative_error(by_name[name].gradient, truth)
        assert by_name[name].error == pytest.approx(expected, rel=1e-4) and expected > 1e-4
    assert "trained on" in found.reference


def test_a_learning_rate_has_the_loop_as_its_reference() -> None:
    problem = BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(2, dtype=torch.float64),
        {"lr": positive(0.1)},
        inner_solver=inner.SGD(lr=lambda h: h["lr"], steps=5),
    )
    found = compare(problem, ["unroll", "implicit"])
    # w_5 = 1 - (1 - 2 lr)^5 in both entries; dF/dlr = 2 * 2 w_5 * 10 (1 - 2 lr)^4.
    expected = 40.0 * (1.0 - 0.8**5) * 0.8**4
    assert float(rows(found)["unroll"].gradient["lr"]) == pytest.approx(expected, rel=1e-12)
    assert rows(found)["unroll"].error == 0.0
    refused = rows(found)["implicit"]
    assert refused.verdict == "refused" and refused.error is None and 'method="unroll"' in refused.refusal
    assert refused.refusal in found.table() and "because only the inner loop uses" in found.reference


def test_reference_by_name_and_by_gradient() -> None:
    problem = RIDGE.problem()
    by_name = compare(problem, ["direct"], reference="cg")
    assert by_name.reference == "cg, verdict exact"
    doubled = 2.0 * RIDGE.truth.gradient
    given = rows(compare(problem, ["direct"], reference=doubled))["direct"]
    assert given.error == pytest.approx(0.5, rel=1e-8) and given.cosine == pytest.approx(1.0)


def test_costs_are_those_of_the_method_alone() -> None:
    steps = 30
    found = rows(compare(RIDGE.problem(inner.SGD(lr=0.05, steps=steps)), ["direct", "unroll", "truncated"]))
    n = sum(t.numel() for t in _tensors(RIDGE.truth.params))
    assert n + 1 <= found["direct"].products <= n + 6  # the dense Hessian, the pull-back, the certificate
    assert found["unroll"].products == steps
    assert found["unroll"].gradients >= steps > found["direct"].gradients
    assert (found["unroll"].megabytes or 0.0) > (found["truncated"].megabytes or 0.0) > 0.0


def test_nothing_of_the_users_moves() -> None:
    x, y = torch.randn(32, 3), torch.randn(32, 1)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 1))
    data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    problem = BilevelProblem(
        lambda m, h, b: ((m(b[0]) - b[1]) ** 2).mean() + h * sum((p**2).sum() for p in m.parameters()),
        lambda m, h, b: ((m(b[0]) - b[1]) ** 2).mean(),
        model,
        positive(0.1),
        inner_solver=inner.SGD(lr=0.05, steps=10),
        inner_data=data,
        outer_data=(x, y),
    )
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random, position = torch.get_rng_state(), problem.position()
    first = compare(problem, ["cg", "unroll"], reference="direct")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and str(problem.position()) == str(position)
    again = compare(problem, ["cg", "unroll"], reference="direct")
    assert [r.error for r in first.rows] == [r.error for r in again.rows]  # the same batches and masks


def minibatch_ridge(solver: Any = None) -> tuple[BilevelProblem, float]:
    """Return ridge regression on 3 + 2 minibatches, the last ones smaller, and dF/dh over all rows."""
    dice = torch.Generator().manual_seed(0)
    x, xv = (torch.randn(n, 3, generator=dice, dtype=torch.float64) for n in (20, 12))
    y, yv, strength = x.sum(1).sin(), xv.sum(1).sin(), 0.3
    loaders = [DataLoader(TensorDataset(*tensors), batch_size=8, shuffle=True) for tensors in ((x, y), (xv, yv))]
    problem = BilevelProblem(
        lambda w, h, b: ((b[0] @ w - b[1]) ** 2).mean() + h * w.square().sum(),
        lambda w, h, b: ((b[0] @ w - b[1]) ** 2).mean(),
        torch.zeros(3, dtype=torch.float64),
        positive(strength),
        inner_solver=solver,
        inner_data=loaders[0],
        outer_data=loaders[1],
    )
    hessian = 2.0 * (x.T @ x / 20 + strength * torch.eye(3, dtype=torch.float64))
    w = torch.linalg.solve(hessian, 2.0 * x.T @ y / 20)
    adjoint = torch.linalg.solve(hessian, 2.0 * xv.T @ (xv @ w - yv) / 12)
    return problem, float(-2.0 * adjoint @ w)


def test_minibatches_are_held_against_all_data() -> None:
    problem, truth = minibatch_ridge(inner.SGD(lr=0.1, steps=5))
    found = compare(problem, {"direct": "direct", "unroll": "unroll", "soba": bilevel.SOBA(warmup=50)}, memory=False)
    assert "of all 3 + 2 minibatches" in found.reference and "verdict exact" in found.reference
    for row in found.rows:
        assert row.error == pytest.approx(abs(float(row.gradient) / truth - 1.0), rel=1e-6, abs=1e-6)


def test_what_refuses_is_a_line_and_one_reason_stands_once() -> None:
    """The default inner solver, L-BFGS, cannot train on minibatches; single-loop methods need none."""
    problem, truth = minibatch_ridge()
    methods: Any = {"soba": bilevel.SOBA(warmup=50), "direct": "direct", "minres": "minres", "unroll": "unroll"}
    found = compare(problem, methods, repeats=1)
    soba, *refused = found.rows
    assert [row.verdict for row in refused] == ["refused"] * 3 and found.inner == ""
    assert soba.error == pytest.approx(abs(float(soba.gradient) / truth - 1.0), rel=1e-6)
    assert "direct, minres: L-BFGS needs one fixed inner loss" in found.table()
    assert found.table().count("L-BFGS needs one fixed inner loss") == 1


def test_without_a_reference_that_can_be_trusted_there_are_no_errors() -> None:
    """The inner loss knows two weights by their sum only: there is no one minimum to differentiate."""

    def with_solver(solver: Any) -> BilevelProblem:
        return BilevelProblem(
            lambda w, h: h * (w[0] - 1.0) ** 2 + (w[1] + w[2] - 1.0) ** 2,
            lambda w, h: w.square().sum(),
            torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64),
            positive(0.3),
            solver,
        )

    own = with_solver(lambda w, h: w + 1.0)
    found = compare(own, ["direct"], memory=False)
    assert found.rows[0].error is None and found.rows[0].cosine is None and found.rows[0].megabytes is None
    assert found.reference.startswith("none, so there are no errors: ") and "is untrusted" in found.reference
    assert found.table().splitlines()[2].split("|")[2].strip() == "-"
    with pytest.raises(InvalidValueError, match="nothing to draw"):
        found.plot()
    loop = with_solver(inner.SGD(lr=0.1, steps=3))
    unrolled = compare(loop, ["direct", "unroll"], memory=False)
    assert unrolled.reference.startswith("unroll, good to ") and unrolled.rows[1].error == 0.0


def test_a_loop_that_cannot_be_differentiated_is_held_against_differences() -> None:
    problem = BilevelProblem(
        lambda w, h: (w**2).sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(2, dtype=torch.float64),
        positive(2.0),
        inner_solver=lambda w, h: w + 1.0 / h.item(),  # F = 2 / h^2
    )
    (row,) = compare(problem, ["zero-order"], memory=False).rows
    assert float(row.gradient) == pytest.approx(-0.5, rel=1e-6) and row.error == 0.0


def test_a_hypergradient_is_a_reference_too() -> None:
    problem = RIDGE.problem()
    given = bilevel.hypergradient(problem, "direct")
    found = compare(problem, ["direct"], reference=given, seed=3)
    assert found.rows[0].error is not None and found.rows[0].error < 1e-8
    assert found.reference == "the hypergradient given, verdict exact" and found.conditions.startswith("seed 3; ")


def test_the_table_is_markdown() -> None:
    lines = compare(RIDGE.problem(), ["direct", "cg"]).table().splitlines()
    head, rule, *body = lines[:4]
    assert {len(line) for line in lines[:4]} == {len(head)}
    assert set(rule) <= set("|-:") and len(body) == 2
    assert all(line.count("|") == head.count("|") == rule.count("|") for line in body)


def test_the_plot_has_a_labelled_mark_for_each_method() -> None:
    comparison = compare(RIDGE.problem(), ["direct", "cg", "neumann"])
    (axes,) = comparison.plot("products").axes
    assert {text.get_text() for text in axes.texts} == {"direct", "cg", "neumann"}
    assert axes.get_xscale() == axes.get_yscale() == "log"
    with pytest.raises(InvalidValueError, match="`cost` is 'euros', expected one of seconds"):
        comparison.plot("euros")


def test_bad_methods_are_refused() -> None:
    with pytest.raises(InvalidTypeError, match=r"write compare\(problem, \['cg'\]\)"):
        compare(RIDGE.problem(), "cg")
    with pytest.raises(InvalidValueError, match="`methods` is empty"):
        compare(RIDGE.problem(), [])
    with pytest.raises(InvalidValueError, match=r'expected one of implicit.*; did you mean "unroll"'):
        compare(RIDGE.problem(), ["unrol"])
    with pytest.raises(InvalidValueError, match=r"write bilevel.BOME\(\)"):
        compare(RIDGE.problem(), ["bome"])
    with pytest.raises(InvalidValueError, match="`reference` is 'exact'"):
        compare(RIDGE.problem(), ["cg"], reference="exact")
    with pytest.raises(InvalidValueError, match="`repeats` is 0"):
        compare(RIDGE.problem(), ["cg"], repeats=0)


FILE = """
import torch, bilevel
problem = bilevel.BilevelProblem(
    lambda w, h: ((w - 1) ** 2 + h * w**2).sum(), lambda w, h: (w**2).sum(),
    params=torch.zeros(2, dtype=torch.float64), hparams=bilevel.positive(1.0))
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "train.py", tmp_path / "methods.png"
    file.write_text(FILE)
    assert main(["compare", f"{file}:problem", "--methods", "direct", "cg", "--no-memory", "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "| direct" in said and "| cg" in said and "reference: implicit" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["compare", f"{file}:problem", "--plot", str(tmp_path / "no" / "such.png")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["compare", f"{file}:problem", "--plot", str(tmp_path / "x.foo")]) == 2
    out, err = capsys.readouterr()
    assert "no pictures of kind .foo, only " in err and "png" in err and out == ""
    assert main(["compare", f"{file}:problem", "--methods", "unrol"]) == 2
    assert 'did you mean "unroll"?' in capsys.readouterr().err
    assert main(["check", f"{file}:problem", "--method", "implict"]) == 2
    assert 'did you mean "implicit"?' in capsys.readouterr().err
