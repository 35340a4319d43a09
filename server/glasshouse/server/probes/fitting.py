"""The weights of each kind of probe, from rows and labels: logistic, mass-mean, and a two-layer MLP as the stronger
baseline (scikit-learn's MLPClassifier: ReLU, L-BFGS on up to `LBFGS_ROWS` examples, Adam beyond).

Every fit standardises inside and folds that back into its first affine map.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from glasshouse.server.probes.examples import FloatRows, IntRows, Task
from glasshouse.server.probes.logistic import fit_logistic
from glasshouse.server.probes.mass_mean import MassMean
from glasshouse.server.probes.served import Affine, ProbeFacts, ServedProbe, affine

LBFGS_ROWS = 2000


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """`inverse_l2`: scikit-learn's C of the logistic probe. `hidden_width` and `weight_decay` are the MLP's."""

    inverse_l2: float = 1.0
    hidden_width: int = 64
    weight_decay: float = 1e-2
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """An uncalibrated probe, and whether the optimiser said it was done."""

    probe: ServedProbe
    converged: bool


def fit_probe(facts: ProbeFacts, rows: FloatRows, labels: IntRows, options: FitOptions) -> Fitted:
    """Fits a probe of `facts` to rows (N, D) with labels (N,), or (N, K) for several labels."""
    layers: tuple[Affine, ...]
    converged = True
    match facts.kind:
        case "logistic":
            found = fit_logistic(
                rows, labels, task=facts.task, inverse_l2=options.inverse_l2, seed=options.seed
            )
            layers, converged = (affine(found.weights, found.biases),), found.converged
        case "mass_mean" | "mass_mean_corrected":
            layers = (_mass_mean(facts, rows, labels),)
        case "mlp":
            layers, converged = _mlp(facts, rows, labels, options)
    return Fitted(probe=ServedProbe(facts=facts, layers=layers), converged=converged)


def _mass_mean(facts: ProbeFacts, rows: FloatRows, labels: IntRows) -> Affine:
    corrected = facts.kind == "mass_mean_corrected"
    targets = [labels] if facts.task is not Task.MULTI_LABEL else list(labels.T)
    n_classes = len(facts.label_names) if facts.task is Task.MULTI_CLASS else 2
    parts = []
    for target in targets:
        moments = MassMean(rows.shape[1], n_classes=n_classes, corrected=corrected)
        moments.add(rows, target)
        parts.append(moments.affine())
    return affine(
        np.concatenate([weights for weights, _ in parts], axis=1), np.concatenate([b for _, b in parts])
    )


def _mlp(
    facts: ProbeFacts, rows: FloatRows, labels: IntRows, options: FitOptions
) -> tuple[tuple[Affine, ...], bool]:
    scaler = StandardScaler().fit(np.asarray(rows, dtype=np.float64))
    many = rows.shape[0] > LBFGS_ROWS
    model = MLPClassifier(
        hidden_layer_sizes=(options.hidden_width,),
        alpha=options.weight_decay,
        solver="adam" if many else "lbfgs",
        early_stopping=many,
        max_iter=500,
        random_state=options.seed,
    )
    target = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(scaler.transform(np.asarray(rows, dtype=np.float64)), target)
    first = model.coefs_[0] / scaler.scale_[:, None]
    layers = (
        affine(first, model.intercepts_[0] - scaler.mean_ @ first),
        affine(model.coefs_[1], model.intercepts_[1]),
    )
    return layers, not any(issubclass(found.category, ConvergenceWarning) for found in caught)
