"""What is known of directions and probes: frozen values, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.exceptions import GlasshouseError

DirectionMethod: TypeAlias = Literal[
    "difference_in_means",
    "caa",
    "pca",
    "pca_centred",
    "mass_mean",
    "mass_mean_corrected",
    "logistic",
    "k_means",
    "dictionary_feature",
    "raw",
]
Pooling: TypeAlias = Literal["token", "last", "mean", "max"]
"""What an example's positions are made into: each a row of its own, the last, the mean, or the largest values."""
ProbeKind: TypeAlias = Literal["logistic", "mass_mean", "mass_mean_corrected", "mlp"]
ProbeTask: TypeAlias = Literal["binary", "multi_class", "multi_label"]
Calibration: TypeAlias = Literal["platt", "isotonic", "none"]


@dataclass(frozen=True)
class Interval:
    """A figure, and the interval that covers the truth with probability `level`."""

    value: float
    low: float
    high: float
    level: float = 0.95

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Discrimination:
    """How well scores tell two classes apart, on held-out examples. `effect_size` is Cohen's d."""

    auroc: Interval
    accuracy: Interval
    effect_size: float
    n_positive: int
    n_negative: int


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """How examples were divided. `n_duplicates`: copies beyond the first; `n_left_out`: rows that were to be held out while
    copies of them are learnt from; `n_conflicting`: equal examples with different labels."""

    n_train: int
    n_held_out: int
    n_duplicates: int = 0
    n_left_out: int = 0
    n_conflicting: int = 0


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where something came from. `model_revision`: which weights; `data_hash`: SHA-256 of the examples; `metrics`: held-out
    figures by name."""

    model_revision: str = ""
    hook_points: list[str] = field(default_factory=list)
    method: str = ""
    data_hash: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    author: str = ""


@dataclass(frozen=True, kw_only=True)
class DirectionAt:
    """A direction at one hook point. vector: (width,) float32, as the method gives it, None in lists; an activation x with
    x @ vector above `threshold` reads as positive; `held_out` is None where no examples judged it."""

    hook_point: str
    width: int
    norm: float
    threshold: float | None = None
    held_out: Discrimination | None = None
    vector: NDArray[np.float32] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Published:
    """What everything in the registry has. `name` is the short name, empty where it was not published, `version` then 0;
    `built_in` says that it comes with the model."""

    name: str
    model: str
    version: int
    description: str = ""
    provenance: Provenance = field(default_factory=Provenance)
    created: datetime | None = None
    built_in: bool = False


@dataclass(frozen=True, kw_only=True)
class DirectionInfo(Published):
    """A direction, at one or more hook points. `split` and `notes` come with a computation."""

    method: str
    at: Mapping[str, DirectionAt]
    best_hook_point: str
    positive_label: str = "positive"
    negative_label: str = "negative"
    pooling: Pooling = "last"
    split: SplitSummary | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def resource_name(self) -> str:
        """`models/{model}/directions/{name}@{version}`; empty where it was not published."""
        return f"models/{self.model}/directions/{self.name}@{self.version}" if self.name else ""

    @property
    def best(self) -> DirectionAt:
        """At the hook point that tells the classes apart best."""
        return self.at[self.best_hook_point]


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A threshold for a false-positive rate: chosen on training examples, out of fold, judged on held-out ones. `resolved`
    is False where there were too few negatives to choose for that rate."""

    wanted_false_positive_rate: float
    threshold: float
    resolved: bool
    false_positive_rate: Interval
    true_positive_rate: Interval


@dataclass(frozen=True, kw_only=True)
class ProbeColumnReport:
    """Held-out figures of one score column. `ece`: expected calibration error; `control_auroc`: of a probe of the same make
    on shuffled labels, near 0.5 where the probe reads the concept rather than remembers."""

    label: str
    held_out: Discrimination
    ece_before: float
    ece: float
    brier: float
    operating_points: list[OperatingPoint]
    control_auroc: Interval


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What is known of a probe's quality. `selectivity`: accuracy less the control task's. `notes`: whole sentences."""

    columns: list[ProbeColumnReport]
    accuracy: Interval
    control_accuracy: Interval
    selectivity: float
    split: SplitSummary
    n_folds: int
    converged: bool
    notes: list[str] = field(default_factory=list)

    def threshold(self, false_positive_rate: float, label: str = "") -> float:
        """The threshold of one of the rates that were asked for; `label` where there are several columns.

        Raises KeyError with those there are.
        """
        columns = [column for column in self.columns if label in ("", column.label)]
        if len(columns) != 1:
            raise KeyError(f"one of the labels {', '.join(column.label for column in self.columns)}")
        for point in columns[0].operating_points:
            if abs(point.wanted_false_positive_rate - false_positive_rate) < 1e-9:
                return point.threshold
        rates = ", ".join(f"{point.wanted_false_positive_rate:g}" for point in columns[0].operating_points)
        raise KeyError(f"no threshold for {false_positive_rate:g}; there are {rates or 'none'}")


@dataclass(frozen=True, kw_only=True)
class ProbeWeights:
    """A probe's numbers: `layers` of weights (n_in, n_out) and biases (n_out,), a ReLU between two. With Platt's
    calibration a score is sigmoid(slope * margin + offset)."""

    layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
    platt: tuple[list[float], list[float]] | None = None
    isotonic: list[tuple[list[float], list[float]]] | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeCandidate:
    """A hook point that was tried: the mean AUROC it was chosen by, and that on held-out examples."""

    hook_point: str
    out_of_fold_auroc: float
    held_out_auroc: float


@dataclass(frozen=True, kw_only=True)
class ProbeInfo(Published):
    """A probe. `labels`: of two the negative one first; `columns`: what its scores stand for. `report` is None where it was
    trained elsewhere; `candidates` come with a training, `weights` where they were asked for."""

    kind: str
    task: ProbeTask
    labels: list[str]
    columns: list[str]
    hook_points: list[str]
    widths: list[int]
    pooling: Pooling
    calibration: Calibration
    report: ProbeReport | None = None
    weights: ProbeWeights | None = field(default=None, repr=False)
    candidates: list[ProbeCandidate] = field(default_factory=list)

    @property
    def resource_name(self) -> str:
        """`models/{model}/probes/{name}@{version}`; empty where it was not published."""
        return f"models/{self.model}/probes/{self.name}@{self.version}" if self.name else ""


@dataclass(frozen=True)
class ProbeScores:
    """A probe's scores of one input: scores (n_rows, n_columns) float32 in [0, 1]; row i belongs to `positions[i]`, of a
    pooled input the last position that went into it."""

    scores: NDArray[np.float32]
    columns: list[str]
    positions: list[int]
    token_ids: list[int] = field(repr=False)
    tokens: list[str] = field(repr=False)

    def __float__(self) -> float:
        """The score, where there is one number. Raises TypeError where there are more."""
        if self.scores.size != 1:
            raise TypeError(f"{self.scores.shape[0]} rows of {len(self.columns)} columns are not one score")
        return float(self.scores[0, 0])

    @property
    def label(self) -> str:
        """The likeliest of several labels, of the last row."""
        return self.columns[int(self.scores[-1].argmax())]


@dataclass(frozen=True, kw_only=True)
class FeatureLabel:
    """What a feature stands for; `score` as the set's method defines it."""

    feature: int
    label: str
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureLabelsInfo(Published):
    """A set of feature labels, without them."""

    dictionary: str
    count: int

    @property
    def resource_name(self) -> str:
        """`models/{model}/featureLabels/{name}@{version}`."""
        return f"models/{self.model}/featureLabels/{self.name}@{self.version}"


def not_published(what: str) -> GlasshouseError:
    """The error of something that has no name at the server."""
    return GlasshouseError(
        f"this {what} was not published: the server does not keep it",
        code="FAILED_PRECONDITION",
        remedy="Make it with name=...",
    )
