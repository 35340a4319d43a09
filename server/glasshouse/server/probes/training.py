"""From labelled activations to a calibrated probe with a report one can believe.

1. Check and split the examples (`splitting`): training and held-out, groups kept whole.
2. Fit the probe on the training examples (`fitting`).
3. Out-of-fold margins: the training examples once more in folds, each scored by a probe fitted on the others. They
   stand in for unseen examples, so none has to be set aside. The calibration and the thresholds are made from them.
4. Judge on the held-out examples: accuracy, AUROC, effect size, calibration error before and after, rates at each
   threshold with intervals.
5. The control task (`control`): the same on shuffled labels.

With too few examples for folds the probe stays uncalibrated and without thresholds, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
import torch

from glasshouse.server.probes.calibration import (
    CalibrationMethod,
    brier_score,
    expected_calibration_error,
    fit_calibration,
)
from glasshouse.server.probes.control import shuffled
from glasshouse.server.probes.discrimination import Discrimination, Interval, auroc, discriminate, proportion
from glasshouse.server.probes.examples import FloatRows, IntRows, LabelledActivations, Task
from glasshouse.server.probes.fitting import FitOptions, fit_probe
from glasshouse.server.probes.operating_points import OperatingPoint, operating_points, threshold_at
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.probes.served import ProbeFacts, ProbeKind, ServedProbe
from glasshouse.server.probes.splitting import Split, split
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

MAX_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class ProbeSpec:
    """What to train. `pooling` says how the rows were made; training itself sees rows only."""

    kind: ProbeKind = "logistic"
    pooling: Pooling = Pooling.LAST
    calibration: CalibrationMethod = CalibrationMethod.PLATT
    false_positive_rates: tuple[float, ...] = (0.01, 0.05)
    held_out_share: float = 0.25
    options: FitOptions = field(default_factory=FitOptions)
    model_name: str = ""


@dataclass(frozen=True, kw_only=True)
class ColumnReport:
    """Of one score column, on held-out examples; the error of calibration before and after it."""

    name: str
    discrimination: Discrimination
    ece_before: float
    ece: float
    brier: float
    operating_points: tuple[OperatingPoint, ...]
    control_auroc: Interval


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeReport:
    """`accuracy` is of the most likely class, or of all labels' yes or no together. `notes` are whole sentences."""

    columns: tuple[ColumnReport, ...]
    accuracy: Interval
    control_accuracy: Interval
    n_train: int
    n_held_out: int
    n_folds: int
    converged: bool
    split: Split
    notes: tuple[str, ...] = ()

    @property
    def selectivity(self) -> float:
        """Held-out accuracy less the control task's."""
        return self.accuracy.value - self.control_accuracy.value

    @property
    def metrics(self) -> Mapping[str, float]:
        """The figures by name, those that are finite, for provenance: `accuracy`, `{column}.auroc`, ..."""
        found = {
            "accuracy": self.accuracy.value,
            "accuracy_low": self.accuracy.low,
            "accuracy_high": self.accuracy.high,
            "control_accuracy": self.control_accuracy.value,
            "selectivity": self.selectivity,
        }
        for column in self.columns:
            found |= {f"{column.name}.{name}": value for name, value in column.discrimination.metrics.items()}
            found |= {
                f"{column.name}.ece": column.ece,
                f"{column.name}.brier": column.brier,
                f"{column.name}.control_auroc": column.control_auroc.value,
            }
        return {name: value for name, value in found.items() if isfinite(value)}


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedProbe:
    """A probe, its report, and out-of-fold scores (n, C) of the training examples (none without folds): what a
    monitor's drift is measured against.
    """

    probe: ServedProbe
    report: ProbeReport
    calibration_scores: FloatRows


def train_probe(
    examples: LabelledActivations,
    hook_points: tuple[str, ...] = (),
    spec: ProbeSpec | None = None,
    *,
    sides: Split | None = None,
) -> TrainedProbe:
    """Trains on the activations of `hook_points` side by side; the examples' only one where none is named. `sides`: a
    split of the caller's (`split_as_given`); else one is made.

    Raises:
        InvalidArgument: examples that `LabelledActivations.check` or `split` refuses, a hook point that was not read, a
            rate or a regularisation out of range.
    """
    spec = spec or ProbeSpec()
    examples.check()
    hook_points = _hook_points(examples, hook_points)
    for rate in spec.false_positive_rates:
        threshold_at(np.zeros(1), rate)
    sides = sides or split(examples, held_out_share=spec.held_out_share, seed=spec.options.seed)
    rows = examples.rows(*hook_points)
    facts = ProbeFacts(
        kind=spec.kind,
        task=examples.task,
        label_names=examples.label_names,
        hook_points=hook_points,
        widths=tuple(int(examples.activations[name].shape[1]) for name in hook_points),
        pooling=spec.pooling,
        model_name=spec.model_name,
    )
    fitted = fit_probe(facts, rows[sides.train], examples.labels[sides.train], spec.options)
    folds = _folds(examples, sides.train, spec.options.seed)
    notes = []
    probe, held = fitted.probe, sides.held_out
    oof_columns = examples.columns[sides.train]
    oof_scores = np.zeros((0, oof_columns.shape[1]))
    if folds is None:
        notes.append("There were too few training examples for folds: no calibration and no thresholds.")
    else:
        margins = _out_of_fold(facts, rows[sides.train], examples.labels[sides.train], folds, spec.options)
        probe = probe.calibrated(fit_calibration(margins, oof_columns, spec.calibration))
        oof_scores = probe.score_margins(torch.from_numpy(margins)).numpy()
    if not fitted.converged:
        notes.append("The optimiser stopped before it converged.")
    if sides.n_left_out:
        notes.append(f"{sides.n_left_out} held-out examples were left out: copies of them are learnt from.")
    before, scores = _scores(fitted.probe, rows[held]), _scores(probe, rows[held])
    control_labels = shuffled(examples, seed=spec.options.seed)
    control, control_columns = _control_scores(facts, examples, rows, control_labels, sides, spec.options)
    columns = []
    for c, name in enumerate(facts.columns):
        truth = examples.columns[held, c]
        points: tuple[OperatingPoint, ...] = ()
        if folds is not None:
            points = operating_points(
                spec.false_positive_rates,
                choosing=(oof_scores[:, c], oof_columns[:, c]),
                judging=(scores[:, c], truth),
            )
        columns.append(
            ColumnReport(
                name=name,
                discrimination=discriminate(scores[:, c], truth, threshold=0.5),
                ece_before=expected_calibration_error(before[:, c], truth),
                ece=expected_calibration_error(scores[:, c], truth),
                brier=brier_score(scores[:, c], truth),
                operating_points=points,
                control_auroc=_area(control[:, c], control_columns[:, c]),
            )
        )
    report = ProbeReport(
        columns=tuple(columns),
        accuracy=_accuracy(scores, examples.columns[held], examples.task),
        control_accuracy=_accuracy(control, control_columns, examples.task),
        n_train=len(sides.train),
        n_held_out=len(held),
        n_folds=0 if folds is None else int(folds.max()) + 1,
        converged=fitted.converged,
        split=sides,
        notes=tuple(notes),
    )
    return TrainedProbe(probe=probe, report=report, calibration_scores=oof_scores)


def _hook_points(examples: LabelledActivations, wanted: tuple[str, ...]) -> tuple[str, ...]:
    known = tuple(examples.activations)
    if not wanted and len(known) == 1:
        return known
    missing = [name for name in wanted if name not in examples.activations]
    if not wanted or missing or len(set(wanted)) != len(wanted):
        raise InvalidArgument(
            f"{missing[0]} was not read" if missing else "name each of the probe's hook points once",
            reason=reasons.FIELD_REQUIRED if not wanted else reasons.VALUE_OUT_OF_RANGE,
            field="hook_points",
            value=missing[0] if missing else ", ".join(wanted),
            remedy=f"the examples have {', '.join(known[:8])}",
        )
    return wanted


def _folds(examples: LabelledActivations, train: IntRows, seed: int) -> IntRows | None:
    """The fold (n,) of each training row: groups whole, classes spread. None where a fold would miss a class."""
    part = examples.take(train)
    groups = np.arange(len(train)) if part.groups is None else part.groups
    labels = part.labels if part.labels.ndim == 2 else part.labels[:, None]
    kinds: dict[bytes, list[int]] = {}
    numbers, firsts = np.unique(groups, return_index=True)
    for group, first in zip(numbers.tolist(), firsts.tolist()):
        kinds.setdefault(labels[first].tobytes(), []).append(group)
    n_folds = min(MAX_FOLDS, len(numbers), int(part.columns.sum(0).min()))
    if n_folds < 2:
        return None
    rng = np.random.default_rng(seed)
    fold_of: dict[int, int] = {}
    for kind in sorted(kinds):
        for group in rng.permutation(kinds[kind]).tolist():
            fold_of[group] = len(fold_of) % n_folds
    folds = np.array([fold_of[group] for group in groups.tolist()], dtype=np.int64)
    for fold in range(n_folds):
        rest = part.columns[folds != fold]
        if not ((rest.sum(0) > 0) & (rest.sum(0) < len(rest))).all():
            return None
    return folds


def _out_of_fold(
    facts: ProbeFacts, rows: FloatRows, labels: IntRows, folds: IntRows, options: FitOptions
) -> FloatRows:
    margins = np.zeros((len(rows), len(facts.columns)))
    for fold in range(int(folds.max()) + 1):
        out = folds == fold
        probe = fit_probe(facts, rows[~out], labels[~out], options).probe
        margins[out] = probe.margins(torch.from_numpy(rows[out])).numpy()
    return margins


def _scores(probe: ServedProbe, rows: FloatRows) -> FloatRows:
    scores: FloatRows = probe.score(torch.from_numpy(rows)).numpy()
    return scores


def _control_scores(
    facts: ProbeFacts,
    examples: LabelledActivations,
    rows: FloatRows,
    labels: IntRows,
    sides: Split,
    options: FitOptions,
) -> tuple[FloatRows, IntRows]:
    """Held-out scores of a probe of shuffled labels, and those labels as columns."""
    shuffled_examples = LabelledActivations(
        activations={}, labels=labels, label_names=examples.label_names, task=examples.task
    )
    columns = shuffled_examples.columns
    learnt = columns[sides.train].sum(0)
    if not ((learnt > 0) & (learnt < len(sides.train))).all():
        return np.full((len(sides.held_out), columns.shape[1]), 0.5), columns[sides.held_out]
    fitted = fit_probe(facts, rows[sides.train], labels[sides.train], options)
    return _scores(fitted.probe, rows[sides.held_out]), columns[sides.held_out]


def _area(scores: FloatRows, truth: IntRows) -> Interval:
    """AUROC; where the shuffle left one class, nothing is known of it."""
    if 0 < truth.sum() < len(truth):
        return auroc(scores, truth)
    return Interval(value=0.5, low=0.0, high=1.0)


def _accuracy(scores: FloatRows, truth: IntRows, task: Task) -> Interval:
    if task is Task.MULTI_CLASS:
        right = scores.argmax(1) == truth.argmax(1)
    else:
        right = ((scores > 0.5) == (truth == 1)).ravel()
    return proportion(int(right.sum()), right.size)
