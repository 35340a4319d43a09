"""L2-regularised logistic regression by scikit-learn, standardised inside and folded back into one affine map.

1. z = (x - mean) / scale, per coordinate (StandardScaler; a constant coordinate has scale 1).
2. scikit-learn's LogisticRegression on z: minimises C * (sum of log losses) + |w|^2 / 2, in float64 with L-BFGS.
3. Folding: w_x = w_z / scale, b_x = b_z - mean . w_x. Serving sees no scaler.

Logits are columns: one for a binary task (positive over negative), K softmax logits for K classes, one a label in a
multi-label task (independent fits).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from glasshouse.server.probes.examples import FloatRows, IntRows, Task
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

MAX_ITERATIONS = 2000


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineFit:
    """Logits x @ weights + biases: `weights` float64 (W, C), `biases` float64 (C,)."""

    weights: FloatRows
    biases: FloatRows
    converged: bool = True


def fit_logistic(
    rows: FloatRows, labels: IntRows, *, task: Task = Task.BINARY, inverse_l2: float = 1.0, seed: int = 0
) -> AffineFit:
    """Fits rows (N, W) to labels (N,) or, for `Task.MULTI_LABEL`, (N, K). `inverse_l2` is scikit-learn's C, above 0.

    Raises:
        InvalidArgument: `inverse_l2` that is not a positive number.
    """
    if not (np.isfinite(inverse_l2) and inverse_l2 > 0):
        raise InvalidArgument(
            f"inverse_l2 {inverse_l2} is not a positive number",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="inverse_l2",
            value=inverse_l2,
            remedy="1.0 is usual; smaller regularises more",
        )
    scaler = StandardScaler().fit(np.asarray(rows, dtype=np.float64))
    standard = scaler.transform(np.asarray(rows, dtype=np.float64))
    targets = labels.T if task is Task.MULTI_LABEL else labels[None]
    fits = [_fit(standard, target, inverse_l2, seed) for target in targets]
    weights = np.concatenate([np.atleast_2d(model.coef_) for model, _ in fits]).T / scaler.scale_[:, None]
    intercepts = np.concatenate([np.atleast_1d(model.intercept_) for model, _ in fits])
    return AffineFit(
        weights=weights,
        biases=intercepts - scaler.mean_ @ weights,
        converged=all(converged for _, converged in fits),
    )


def _fit(
    standard: FloatRows, target: IntRows, inverse_l2: float, seed: int
) -> tuple[LogisticRegression, bool]:
    model = LogisticRegression(C=inverse_l2, max_iter=MAX_ITERATIONS, random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(standard, target)
    return model, not any(issubclass(found.category, ConvergenceWarning) for found in caught)
