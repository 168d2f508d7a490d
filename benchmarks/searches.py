"""`python -m benchmarks searches`: GradientSearchCV against the other searches for a strength, on held-out rows.

Every search gets the same rows, folds and pipeline; each split of the rows is another one. Compared are the loss of
rows that no search saw, and processor time. The grid has 20 strengths, the random search draws 20, Optuna (its TPE)
takes 20 trials; scikit-learn's own are LogisticRegressionCV, LassoCV and RidgeCV.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.linear_model import Lasso, LassoCV, LogisticRegression, LogisticRegressionCV, Ridge, RidgeCV
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    RandomizedSearchCV,
    StratifiedKFold,
    cross_val_score,
    train_test_split,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks.report import Settings, duration, table
from bilevel.sklearn import GradientSearchCV

SPLITS, TRIALS = 10, 20
Rows = tuple[Any, Any]


def problems(data: Path) -> dict[str, tuple[Any, Any, Any]]:
    """Return name -> features, targets and the estimator."""
    logistic = LogisticRegression(max_iter=2000)
    found = {
        "breast cancer": (*load_breast_cancer(return_X_y=True), logistic),
        "wine": (*load_wine(return_X_y=True), logistic),
        "diabetes, squares": (*load_diabetes(return_X_y=True), Lasso(max_iter=20_000)),
    }
    if (data / "australian.npz").exists():
        held = np.load(data / "australian.npz")
        found["australian"] = (held["X"].astype(float), held["y"].astype(int), logistic)
    if (data / "uci_energy.npz").exists():
        held = np.load(data / "uci_energy.npz")
        y = held["y"].astype(float)
        found["energy, squares"] = (held["X"].astype(float), y if y.ndim == 1 else y[:, 0], Ridge())
    return found


def contenders(estimator: Any, folds: Any, seed: int) -> dict[str, Any]:
    """Return name -> a search over the pipeline, or a function that makes a fitted pipeline."""
    classes = isinstance(estimator, LogisticRegression)
    steps = [StandardScaler()] if classes else [StandardScaler(), PolynomialFeatures(2), StandardScaler()]
    pipeline, scoring = make_pipeline(*steps, estimator), "neg_log_loss" if classes else "neg_mean_squared_error"
    name = f"{type(estimator).__name__.lower()}__{'C' if classes else 'alpha'}"
    low, high = (1e-4, 1e4) if classes else (3e-2, 1e2) if isinstance(estimator, Lasso) else (1e-3, 1e3)
    grid, given = np.geomspace(low, high, TRIALS), {"cv": folds, "scoring": scoring}
    own = {
        "LogisticRegression": lambda: LogisticRegressionCV(
            Cs=grid, cv=folds, scoring=scoring, max_iter=2000, l1_ratios=(0.0,), use_legacy_attributes=False
        ),
        "Lasso": lambda: LassoCV(cv=folds, max_iter=20_000),
        "Ridge": lambda: RidgeCV(grid, cv=folds, scoring=scoring),
    }[type(estimator).__name__]()
    return {
        "`GradientSearchCV`, shared": GradientSearchCV(pipeline, **given),
        "`GradientSearchCV`, per-feature": GradientSearchCV(pipeline, "per-feature", **given),
        "GridSearchCV": GridSearchCV(pipeline, {name: grid}, **given),
        "RandomizedSearchCV": RandomizedSearchCV(
            pipeline, {name: stats.loguniform(low, high)}, n_iter=TRIALS, random_state=seed, **given
        ),
        "Optuna": _Optuna(pipeline, name, low, high, seed, given),
        type(own).__name__: make_pipeline(*steps, own),
    }


class _Optuna:
    """Optuna's TPE over one strength."""

    def __init__(self, pipeline: Any, name: str, low: float, high: float, seed: int, given: dict[str, Any]) -> None:
        self.pipeline, self.name, self.ends, self.seed, self.given = pipeline, name, (low, high), seed, given

    def fit(self, x: Any, y: Any) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)

        def objective(trial: Any) -> float:
            value = trial.suggest_float("strength", *self.ends, log=True)
            model = self.pipeline.set_params(**{self.name: value})
            return float(cross_val_score(model, x, y, **self.given).mean())

        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=self.seed))
        study.optimize(objective, n_trials=TRIALS)
        return self.pipeline.set_params(**{self.name: study.best_params["strength"]}).fit(x, y)


def one_split(x: Any, y: Any, estimator: Any, seed: int) -> dict[str, tuple[float, float]]:
    """Return the held-out loss and the seconds of each contender."""
    classes = isinstance(estimator, LogisticRegression)
    kept, held, wanted, truth = train_test_split(
        x, y, test_size=0.3, stratify=y if classes else None, random_state=seed
    )
    folds = (StratifiedKFold if classes else KFold)(5, shuffle=True, random_state=seed)
    found = {}
    for name, search in contenders(estimator, folds, seed).items():
        begin = time.process_time()
        fitted = search.fit(kept, wanted)
        seconds = time.process_time() - begin
        loss = (
            log_loss(truth, fitted.predict_proba(held)) if classes else mean_squared_error(truth, fitted.predict(held))
        )
        found[name] = (float(loss), seconds)
    return found


def interval(values: Any) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval by Student's t."""
    values = np.asarray(values)
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def run(settings: Settings) -> str:
    """Return a table for each data set."""
    splits = 3 if settings.quick or settings.small else SPLITS
    texts = []
    chosen = {n: p for n, p in problems(Path(settings.data)).items() if not settings.only or n in settings.only}
    with warnings.catch_warnings(), threadpool_limits(settings.threads):
        warnings.simplefilter("ignore")
        for name, (x, y, estimator) in chosen.items():
            one_split(x, y, estimator, 999)  # imports, first calls
            found = [one_split(x, y, estimator, seed) for seed in range(splits)]
            texts.append(_table(name, x, estimator, found))
            print(texts[-1], "\n", flush=True)
    return "\n\n".join(texts)


def _table(name: str, x: Any, estimator: Any, found: list[dict[str, tuple[float, float]]]) -> str:
    reference = np.array([split["GridSearchCV"][0] for split in found])
    rows = []
    for contender in found[0]:
        losses = np.array([split[contender][0] for split in found])
        (mean, width), (apart, within) = interval(losses), interval(losses - reference)
        verdict = (
            "" if contender == "GridSearchCV" else "tie" if abs(apart) <= within else "lower" if apart < 0 else "higher"
        )
        seconds = duration(float(np.mean([split[contender][1] for split in found])))
        difference = "" if contender == "GridSearchCV" else f"{apart:+.2g} ± {within:.1g}"
        rows.append([contender, f"{mean:.4g} ± {width:.2g}", difference, verdict, seconds])
    loss = "log loss" if isinstance(estimator, LogisticRegression) else "mean squared error"
    title = f"{name} ({x.shape[0]} rows, {x.shape[1]} columns), {type(estimator).__name__}, {len(found)} splits"
    return table(title, ["search", f"held-out {loss}", "less that of GridSearchCV", "is", "seconds"], rows)
