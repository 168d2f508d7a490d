"""Swap GridSearchCV for GradientSearchCV
======================================

In an existing pipeline; then give every group of columns its own strength.

Sixty columns, of which three say something: one strength has to shrink all of them alike, and a grid over two strengths
has 400 points. Two strengths by gradient take about as long as one, and twenty do too.
"""

from __future__ import annotations

import time

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_squared_error
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.sklearn import GradientSearchCV


def data(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 60))
    return x, x[:, :3] @ [2.0, -1.0, 1.5] + rng.normal(size=rows)


def main() -> None:
    x, y = data(100, seed=0)
    x_test, y_test = data(5000, seed=1)  # the noise alone has a mean squared error of 1
    pipeline = make_pipeline(StandardScaler(), Ridge())
    scoring = "neg_mean_squared_error"
    searches = {
        "GridSearchCV, 20 strengths": GridSearchCV(
            pipeline, {"ridge__alpha": np.geomspace(1e-3, 1e3, 20)}, scoring=scoring
        ),
        "GradientSearchCV, one strength": GradientSearchCV(pipeline, scoring=scoring),
        # Which columns belong together is what you know of them: here, measured and made up. They may differ as
        # much as the rows say, hence the wide prior.
        "GradientSearchCV, two groups": GradientSearchCV(
            pipeline,
            "per-group",
            feature_groups={"measured": range(3), "made up": range(3, 60)},
            spread=3.0,
            scoring=scoring,
        ),
    }
    errors = {}
    for name, search in searches.items():
        begin = time.process_time()
        search.fit(x, y)
        seconds = time.process_time() - begin
        errors[name] = float(mean_squared_error(y_test, search.predict(x_test)))
        print(f"{name:<31}  test error {errors[name]:.3f}  {seconds:.2f} s")
    grid, one, two = errors.values()
    print(searches["GradientSearchCV, two groups"].summary())
    assert one < 1.02 * grid, "one strength by gradient is the grid's, or better"
    assert two - 1.0 < 0.5 * (grid - 1.0), "two strengths lose half of the error above the noise"


if __name__ == "__main__":
    main()
