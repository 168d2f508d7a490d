"""Optuna for what is discrete, hypergradients for what is continuous; search spaces as typed hyperparameters."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import bilevel
import bilevel.optuna
from problems_solve import nan_below, shrinkage

optuna = pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402

optuna.logging.set_verbosity(optuna.logging.ERROR)
X = torch.linspace(-1.0, 1.0, 24, dtype=torch.float64)
Y = torch.sin(3.0 * X)


def polynomial(trial: Any, **third: Any) -> bilevel.BilevelProblem:
    """Ridge on powers of x: Optuna chooses the degree, the gradient a strength."""
    features = torch.stack([X**k for k in range(trial.suggest_int("degree", 1, 6))], 1)
    train, held = slice(None, None, 2), slice(1, None, 2)

    def loss(w: torch.Tensor, rows: slice) -> torch.Tensor:
        return ((features[rows] @ w - Y[rows]) ** 2).mean()

    return bilevel.BilevelProblem(
        lambda w, h: loss(w, train) + h["l2"] * (w**2).sum(),
        lambda w, h: loss(w, held),
        torch.zeros(features.shape[1], dtype=torch.float64),
        {"l2": bilevel.positive(0.1, low=1e-6)},
        **third,
    )


def study(sampler: Any, pruner: Any = None) -> Any:
    return optuna.create_study(sampler=sampler, pruner=pruner or optuna.pruners.NopPruner())


def test_optuna_chooses_and_the_gradient_tunes() -> None:
    done = study(optuna.samplers.GridSampler({"degree": [1, 2, 4]}))
    done.optimize(bilevel.optuna.objective(polynomial, steps=15), n_trials=3)
    assert done.best_params == {"degree": 4}
    again = bilevel.solve(polynomial(done.best_trial), steps=15)  # how to get the model of the best trial
    told = done.best_trial.user_attrs
    assert done.best_value == again.outer_loss
    assert told["hparams"] == {"l2": [float(again.hparams["l2"])]} and told["verdict"] == "exact"
    assert told["outer_steps"] == len(again.history) and told["status"] == again.status
    values = done.best_trial.intermediate_values
    assert values == {record.step: record.outer_loss for record in again.history}


def test_trials_are_pruned_at_an_outer_step() -> None:
    done = study(optuna.samplers.GridSampler({"degree": [4, 1]}, seed=0), optuna.pruners.ThresholdPruner(upper=0.3))
    done.optimize(bilevel.optuna.objective(polynomial, steps=5), n_trials=2)
    ended = {trial.params["degree"]: trial for trial in done.trials}
    assert ended[1].state.name == "PRUNED" and list(ended[1].intermediate_values) == [1]
    assert ended[4].state.name == "COMPLETE"
    free = study(optuna.samplers.GridSampler({"degree": [1]}), optuna.pruners.ThresholdPruner(upper=0.3))
    free.optimize(bilevel.optuna.objective(polynomial, steps=2, prune=False), n_trials=1)
    assert free.trials[0].state.name == "COMPLETE" and not free.trials[0].intermediate_values


def test_a_third_split_can_be_what_is_minimized() -> None:
    done = study(optuna.samplers.GridSampler({"degree": [3]}))

    def build(trial: Any) -> bilevel.BilevelProblem:
        return polynomial(trial, test_loss=lambda w, h: (w**2).sum())

    done.optimize(bilevel.optuna.objective(build, value="test_loss", steps=3, patience=1), n_trials=1)
    solution = bilevel.solve(build(done.best_trial), steps=3, patience=1)
    assert done.best_value == solution.test_loss
    with pytest.raises(bilevel.InvalidValueError, match="has no third split"):
        bilevel.optuna.objective(polynomial, value="test_loss")(done.best_trial)


def test_a_run_that_becomes_nan_is_pruned() -> None:
    done = study(optuna.samplers.RandomSampler())
    done.optimize(bilevel.optuna.objective(lambda trial: shrinkage(outer_factor=nan_below(0.5))), n_trials=1)
    assert done.trials[0].state.name == "PRUNED"


def test_a_space_becomes_typed_hyperparameters() -> None:
    space = {
        "l2": FloatDistribution(1e-4, 1.0, log=True),
        "momentum": FloatDistribution(0.0, 0.9),
        "one": FloatDistribution(3.0, 3.0),
        "kind": CategoricalDistribution(["ridge"]),
    }
    found = bilevel.optuna.typed(space)
    assert found.fixed == {"one": 3.0, "kind": "ridge"} and sorted(found.hparams) == ["l2", "momentum"]
    l2, momentum = found.hparams["l2"], found.hparams["momentum"]
    assert repr(l2) == "positive(0.01)" and float(momentum.value) == pytest.approx(0.45)
    low, high = l2.bounds()
    assert low.exp().item() == pytest.approx(1e-4) and high.exp().item() == pytest.approx(1.0)
    assert momentum.contains(torch.tensor([0.0, 0.9])) and not momentum.contains(torch.tensor(0.91))
    begun = bilevel.optuna.typed({name: space[name] for name in ("l2", "momentum")}, {"l2": 1.0, "momentum": 0.0})
    assert float(begun.hparams["l2"].value) == 1.0
    assert 0.0 < float(begun.hparams["momentum"].value) < 0.001  # an end of an interval is moved inside


def test_a_trial_is_a_space_that_begins_at_its_values() -> None:
    def suggested(trial: Any) -> float:
        return float(trial.suggest_float("l2", 1e-3, 1e3, log=True))

    done = study(optuna.samplers.RandomSampler(seed=0))
    done.optimize(suggested, n_trials=3)
    found = bilevel.optuna.typed(done.best_trial)
    assert float(found.hparams["l2"].value) == pytest.approx(done.best_params["l2"])
    solution = bilevel.solve(polynomial_of(found.hparams), steps=10)
    assert 1e-3 * (1 - 1e-9) <= float(solution.hparams["l2"]) <= 1e3


def polynomial_of(hparams: Any) -> bilevel.BilevelProblem:
    return bilevel.BilevelProblem(
        lambda w, h: ((w - X) ** 2).mean() + h["l2"] * (w**2).mean(),
        lambda w, h: ((w - X) ** 2).mean(),
        torch.zeros(24, dtype=torch.float64),
        hparams,
    )


def test_misuse_is_named() -> None:
    space = {
        "layers": IntDistribution(1, 3),
        "kind": CategoricalDistribution(["a", "b"]),
        "rate": FloatDistribution(0, 1, step=0.1),
        "own": 0.3,
    }
    with pytest.raises(bilevel.InvalidValueError, match="leave what is discrete to Optuna") as caught:
        bilevel.optuna.typed(space)
    reasons = ("IntDistribution", "CategoricalDistribution", "FloatDistribution in steps of 0.1", "a float, no Optuna")
    for said in (f"{name!r} ({reason}" for name, reason in zip(space, reasons, strict=True)):
        assert said in str(caught.value)
    one = {"l2": FloatDistribution(1e-4, 1.0, log=True)}
    with pytest.raises(bilevel.InvalidValueError, match=r"`start` of 'l2' is 2, expected a value from 0.0001 to 1"):
        bilevel.optuna.typed(one, {"l2": 2.0})
    with pytest.raises(bilevel.InvalidValueError, match="`start` has 'L2', which is not in `space`; did you mean"):
        bilevel.optuna.typed(one, {"L2": 0.5})
    wrong: list[Any] = [{}, [one], 3]
    for space in wrong:
        with pytest.raises(bilevel.InvalidTypeError, match="`space` is a"):
            bilevel.optuna.typed(space)
    with pytest.raises(bilevel.InvalidValueError, match="`value` is 'test', expected one of"):
        bilevel.optuna.objective(polynomial, value="test")
    with pytest.raises(bilevel.InvalidTypeError, match="`build` is a BilevelProblem, expected a function of a trial"):
        bilevel.optuna.objective(shrinkage())  # type: ignore[arg-type]
    with pytest.raises(bilevel.InvalidTypeError, match="`build` returned a float"):
        bilevel.optuna.objective(lambda trial: 3.0)(optuna.create_study().ask())  # type: ignore[arg-type,return-value]
    with pytest.raises(bilevel.InvalidValueError, match="`checkpoint` would be one file for all trials"):
        bilevel.optuna.objective(polynomial, checkpoint="run.pt")
    with pytest.raises(bilevel.InvalidValueError, match="losses are minimized"):
        bilevel.optuna.Pruning(optuna.create_study(direction="maximize").ask())
    with pytest.raises(bilevel.InvalidTypeError, match="`trial` is a int"):
        bilevel.optuna.Pruning(3)


def test_a_missing_optuna_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(bilevel.BilevelError, match=r'pip install "bilevel\[optuna\]"'):
        bilevel.optuna.objective(polynomial)


def test_a_study_that_maximizes_is_refused_without_pruning_too() -> None:
    study = optuna.create_study(direction="maximize")
    with pytest.raises(bilevel.BilevelError, match="minimize"):
        study.optimize(bilevel.optuna.objective(polynomial, steps=1, prune=False), n_trials=1)


def test_a_start_of_some_leaves_the_others_at_the_values_of_the_trial() -> None:
    space = {name: FloatDistribution(1e-3, 1.0, log=True) for name in ("a", "b")}
    trial = optuna.trial.create_trial(params={"a": 0.1, "b": 0.2}, distributions=space, value=1.0)
    begun = bilevel.optuna.typed(trial, start={"a": 0.5}).hparams
    assert [float(begun[name].value) for name in ("a", "b")] == pytest.approx([0.5, 0.2])
