"""Directions of a binary concept at many hook points: computed on training examples, judged on held-out ones.

1. The examples are checked and split once; every hook point sees the same split.
2. At each hook point the method makes a direction and a threshold (the middle between the classes) from the training
   rows; the held-out rows are projected on the direction and judged.
3. The best hook point is the one with the highest held-out AUROC; among equals the largest effect size, then the
   earliest. With many hook points the best one's figure is optimistic by the choice; its interval is not corrected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from glasshouse.server.probes.centroids import fit_centroids
from glasshouse.server.probes.difference_in_means import DifferenceInMeans
from glasshouse.server.probes.discrimination import Discrimination, discriminate
from glasshouse.server.probes.examples import FloatRows, IntRows, LabelledActivations, PairedActivations, Task
from glasshouse.server.probes.logistic import fit_logistic
from glasshouse.server.probes.mass_mean import MassMean
from glasshouse.server.probes.paired import ContrastiveActivations, PairedDifferencePCA
from glasshouse.server.probes.splitting import Split, split
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


class DirectionMethod(Enum):
    """How a direction is computed; the value is the name in provenance."""

    DIFFERENCE_IN_MEANS = "difference_in_means"
    CAA = "caa"
    PCA = "pca_of_differences"
    PCA_CENTRED = "pca_of_differences_centred"
    MASS_MEAN = "mass_mean"
    MASS_MEAN_CORRECTED = "mass_mean_corrected"
    LOGISTIC = "logistic"
    K_MEANS = "k_means"

    @property
    def needs_pairs(self) -> bool:
        """Whether it reads pairs rather than labelled examples."""
        return self in (DirectionMethod.CAA, DirectionMethod.PCA, DirectionMethod.PCA_CENTRED)


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """`vector` float64 (W,) at `hook_point`, as the method gives it, not normalised; x . vector > `threshold` reads as
    positive. Add it with a coefficient, or its `unit`.
    """

    hook_point: str
    method: DirectionMethod
    vector: FloatRows
    threshold: float

    @property
    def norm(self) -> float:
        """Its length, in units of the activation (of the logit for LOGISTIC)."""
        return float(np.linalg.norm(self.vector))

    @property
    def unit(self) -> FloatRows:
        """(W,) of length 1."""
        return self.vector / self.norm

    def project(self, rows: FloatRows) -> FloatRows:
        """(N,) float64: x . vector of rows (N, W)."""
        scores: FloatRows = np.asarray(rows, dtype=np.float64) @ self.vector
        return scores


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectionReport:
    """Every hook point's direction with its held-out figures, and the best hook point's name."""

    directions: Mapping[str, Direction]
    held_out: Mapping[str, Discrimination]
    best: str
    split: Split


def compute_directions(
    examples: LabelledActivations | PairedActivations,
    method: DirectionMethod,
    *,
    held_out_share: float = 0.25,
    sides: Split | None = None,
    inverse_l2: float = 1.0,
    n_clusters: int = 2,
    seed: int = 0,
) -> DirectionReport:
    """Computes `method` at every hook point of `examples`. `sides`: a split of the caller's (`split_as_given`), of the rows
    of `PairedActivations.labelled` where the examples are pairs; else one is made.

    Raises:
        InvalidArgument: examples that do not make a binary task, pairs where a method needs them and there are none, or
            classes that coincide, so that there is no direction.
    """
    if method.needs_pairs and not isinstance(examples, PairedActivations):
        raise InvalidArgument(
            f"{method.value} compares pairs, the examples are single",
            reason=reasons.FIELD_CONFLICT,
            field="method",
            value=method.value,
            remedy="give pairs, or use difference_in_means",
        )
    # Rows i and i + M of checked pairs are the two sides of pair i.
    labelled = (examples.check().labelled() if isinstance(examples, PairedActivations) else examples).check()
    if labelled.task is not Task.BINARY:
        raise InvalidArgument(
            f"a direction separates two classes, the task is {labelled.task.value}",
            reason=reasons.FIELD_CONFLICT,
            field="examples.labels",
            value=labelled.task.value,
            remedy="compute one direction a class against the rest, or train a probe",
        )
    sides = sides or split(labelled, held_out_share=held_out_share, seed=seed)
    directions: dict[str, Direction] = {}
    held_out: dict[str, Discrimination] = {}
    for name in labelled.activations:
        rows = labelled.rows(name)
        if method.needs_pairs:
            vector, threshold = _from_pairs(method, rows, sides.train)
        else:
            vector, threshold = _from_labels(
                method, rows[sides.train], labelled.labels[sides.train], inverse_l2, n_clusters, seed
            )
        if not np.linalg.norm(vector) > 0:
            raise InvalidArgument(
                f"the classes coincide at {name}: there is no direction",
                reason=reasons.VALUE_OUT_OF_RANGE,
                field=f"examples.activations[{name}]",
                value="norm 0",
                remedy="check that the activations differ between the classes, or leave the hook point out",
            )
        found = Direction(hook_point=name, method=method, vector=vector, threshold=threshold)
        directions[name] = found
        held_out[name] = discriminate(
            found.project(rows[sides.held_out]), labelled.labels[sides.held_out], threshold=threshold
        )
    return DirectionReport(directions=directions, held_out=held_out, best=best_of(held_out), split=sides)


def best_of(held_out: Mapping[str, Discrimination]) -> str:
    """The hook point with the highest AUROC, then the largest effect size, then the earliest in the mapping."""
    return max(held_out, key=lambda name: (held_out[name].auroc.value, held_out[name].effect_size))


def _from_pairs(method: DirectionMethod, rows: FloatRows, train: IntRows) -> tuple[FloatRows, float]:
    n_pairs = rows.shape[0] // 2
    negative = train[train < n_pairs]
    fit: ContrastiveActivations | PairedDifferencePCA
    if method is DirectionMethod.CAA:
        fit = ContrastiveActivations(rows.shape[1])
    else:
        fit = PairedDifferencePCA(rows.shape[1], centred=method is DirectionMethod.PCA_CENTRED)
    fit.add(rows[negative + n_pairs], rows[negative])
    return fit.direction, fit.threshold


def _from_labels(
    method: DirectionMethod, rows: FloatRows, labels: IntRows, inverse_l2: float, n_clusters: int, seed: int
) -> tuple[FloatRows, float]:
    match method:
        case DirectionMethod.LOGISTIC:
            affine = fit_logistic(rows, labels, inverse_l2=inverse_l2, seed=seed)
            return affine.weights[:, 0], -float(affine.biases[0])
        case DirectionMethod.K_MEANS:
            return fit_centroids(rows, n_clusters=n_clusters, seed=seed).contrast(labels)
        case DirectionMethod.MASS_MEAN | DirectionMethod.MASS_MEAN_CORRECTED:
            mean = MassMean(rows.shape[1], corrected=method is DirectionMethod.MASS_MEAN_CORRECTED)
            mean.add(rows, labels)
            return mean.direction, mean.threshold
        case _:
            difference = DifferenceInMeans(rows.shape[1])
            difference.add(rows, labels)
            return difference.direction, difference.threshold
