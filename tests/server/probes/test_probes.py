"""Probes against scikit-learn on the same activations, their reports, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tests.server.probes import planted

from glasshouse.server.probes import storage
from glasshouse.server.probes.calibration import CalibrationMethod
from glasshouse.server.probes.control import shuffled
from glasshouse.server.probes.examples import LabelledActivations, Task
from glasshouse.server.probes.fitting import FitOptions, fit_probe
from glasshouse.server.probes.pooling import Pooling, RunningPool, pool
from glasshouse.server.probes.served import ProbeBank, ProbeFacts, ProbeKind, ServedProbe
from glasshouse.server.probes.training import ProbeSpec, train_probe
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument

TASKS = {
    Task.BINARY: planted.examples(400, strengths=(2.0, 2.0, 2.0)),
    Task.MULTI_CLASS: planted.classes(),
    Task.MULTI_LABEL: planted.many_labels(),
}
KINDS: tuple[ProbeKind, ...] = ("logistic", "mass_mean", "mass_mean_corrected", "mlp")


def facts(examples: LabelledActivations, kind: ProbeKind) -> ProbeFacts:
    return ProbeFacts(
        kind=kind,
        task=examples.task,
        label_names=examples.label_names,
        hook_points=(planted.POINTS[0],),
        widths=(planted.WIDTH,),
        pooling=Pooling.LAST,
    )


def served(examples: LabelledActivations, kind: ProbeKind = "logistic") -> ServedProbe:
    rows = examples.rows(planted.POINTS[0])
    return fit_probe(facts(examples, kind), rows, examples.labels, FitOptions(hidden_width=8)).probe


@pytest.mark.parametrize("task", Task)
def test_logistic_equals_scikit_learn(task: Task) -> None:
    examples = TASKS[task]
    rows, probe = examples.rows(planted.POINTS[0]), served(examples)
    found = probe.score(torch.from_numpy(rows)).numpy()
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
    if task is Task.MULTI_LABEL:
        expected = np.stack([peer.fit(rows, y).predict_proba(rows)[:, 1] for y in examples.labels.T], axis=1)
    else:
        expected = peer.fit(rows, examples.labels).predict_proba(rows)
        expected = expected[:, 1:] if task is Task.BINARY else expected
    np.testing.assert_allclose(found, expected, atol=1e-9)
    # As it is served: float32, whose activations near 500 leave rounding of their own.
    single = probe.to("cpu", torch.float32).score(torch.from_numpy(rows.astype(np.float32)))
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, atol=2e-5)


def test_float32_serving_is_within_a_millionth_on_centred_activations() -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(400) % 2).astype(np.int64)
    rows = (rng.normal(size=(400, 24)) + labels[:, None]).astype(np.float32)
    peer = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(
        rows.astype(np.float64), labels
    )
    examples = LabelledActivations(
        activations={planted.POINTS[0]: rows}, labels=labels, label_names=("no", "yes")
    )
    found = served(examples).to("cpu").score(torch.from_numpy(rows))[:, 0]
    np.testing.assert_allclose(found.numpy(), peer.predict_proba(rows.astype(np.float64))[:, 1], atol=1e-6)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("task", Task)
def test_mlp_equals_scikit_learn(task: Task) -> None:
    examples = TASKS[task]
    rows = examples.rows(planted.POINTS[0])
    found = served(examples, "mlp").score(torch.from_numpy(rows)).numpy()
    standard = StandardScaler().fit_transform(rows)
    peer = MLPClassifier((8,), alpha=1e-2, solver="lbfgs", max_iter=500, random_state=0)
    expected = peer.fit(standard, examples.labels).predict_proba(standard)
    expected = expected[:, 1:] if task is Task.BINARY else expected
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", Task)
def test_every_kind_reads_a_planted_concept(kind: ProbeKind, task: Task) -> None:
    spec = ProbeSpec(kind=kind, options=FitOptions(hidden_width=8))
    trained = train_probe(TASKS[task], (planted.POINTS[0],), spec)
    report = trained.report
    assert [column.name for column in report.columns] == list(trained.probe.facts.columns)
    for column in report.columns:
        assert column.discrimination.auroc.value > 0.8
        # The planted class means differ in the noisy coordinate too, which plain mass-mean does not discount.
        assert column.control_auroc.low <= 0.5 <= column.control_auroc.high
        assert column.operating_points[0].wanted_false_positive_rate == 0.01
    assert report.n_folds == 5
    assert report.n_train + report.n_held_out == TASKS[task].n_examples
    assert report.selectivity > 0.1
    assert report.metrics[f"{report.columns[0].name}.auroc"] == report.columns[0].discrimination.auroc.value
    scores = trained.probe.score(torch.from_numpy(TASKS[task].rows(planted.POINTS[0])))
    assert bool(((scores >= 0) & (scores <= 1)).all())
    if task is Task.MULTI_CLASS:
        torch.testing.assert_close(scores.sum(1), torch.ones(len(scores), dtype=torch.float64))


def test_meaningless_labels_are_at_chance_and_the_report_shows_it() -> None:
    examples = planted.examples(1200, strengths=(0.0, 0.0, 0.0))
    report = train_probe(examples, (planted.POINTS[0],), ProbeSpec(held_out_share=0.5)).report
    area = report.columns[0].discrimination.auroc
    assert area.low <= 0.5 <= area.high
    assert abs(report.selectivity) < 0.1


def test_several_hook_points_side_by_side() -> None:
    examples = planted.examples(600, strengths=(1.5, 1.5, 1.5))
    probe = train_probe(examples, planted.POINTS[1:]).probe
    assert (probe.facts.hook_points, probe.facts.width) == (planted.POINTS[1:], 48)
    parts = {name: torch.from_numpy(rows) for name, rows in examples.activations.items()}
    x = probe.join(parts)
    assert x.shape == (600, 48)
    torch.testing.assert_close(x[:, 24:], parts[planted.POINTS[2]])
    alone = train_probe(examples, planted.POINTS[1:2]).report.columns[0].discrimination.effect_size
    both = train_probe(examples, planted.POINTS[1:]).report.columns[0].discrimination.effect_size
    assert both > alone


def test_twenty_sentences_are_enough() -> None:
    trained = train_probe(planted.examples(20, strengths=(9.0, 9.0, 9.0)), planted.POINTS[:1])
    assert trained.report.columns[0].discrimination.auroc.value == 1.0
    assert trained.report.columns[0].discrimination.auroc.low < 0.5
    few = train_probe(planted.examples(8, strengths=(9.0, 9.0, 9.0)), planted.POINTS[:1])
    assert few.report.n_folds in (0, 2, 3)


def test_refusals() -> None:
    examples = TASKS[Task.BINARY]
    with pytest.raises(InvalidArgument, match=r"blocks\.9 was not read"):
        train_probe(examples, ("blocks.9",))
    with pytest.raises(InvalidArgument, match="name each of the probe's hook points once"):
        train_probe(examples)
    with pytest.raises(InvalidArgument, match=r"inverse_l2 0\.0 is not a positive"):
        train_probe(examples, planted.POINTS[:1], ProbeSpec(options=FitOptions(inverse_l2=0.0)))
    with pytest.raises(InvalidArgument) as caught:
        served(examples).score(torch.zeros(3, 5))
    assert caught.value.reason == "WRONG_WIDTH"
    with pytest.raises(InvalidArgument, match="has no label 'angry'"):
        served(examples).column("angry")
    with pytest.raises(InvalidArgument, match="several labels"):
        served(TASKS[Task.MULTI_CLASS]).column()


@pytest.mark.parametrize("calibration", CalibrationMethod)
@pytest.mark.parametrize("task", Task)
def test_saves_and_loads(tmp_path: Path, task: Task, calibration: CalibrationMethod) -> None:
    trained = train_probe(TASKS[task], (planted.POINTS[0],), ProbeSpec(calibration=calibration)).probe
    storage.save(trained, tmp_path / "probe")
    loaded = storage.load(tmp_path / "probe")
    assert loaded.facts == trained.facts
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)) * 20
    assert torch.equal(loaded.score(x), trained.score(x))
    assert sorted(p.name for p in (tmp_path / "probe").iterdir()) == ["probe.json", "probe.safetensors"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    probe = served(TASKS[Task.BINARY])
    body, arrays = storage.to_parts(probe)
    cases = [
        ({**body, "format": 2}, arrays, "format 2 is not 1"),
        ({**body, "kind": "oracle"}, arrays, "'oracle' is not one of"),
        ({**body, "widths": [23]}, arrays, "layers.0 has shapes"),
        ({**body, "task": "guess"}, arrays, "'guess' is not a valid Task"),
        (body, {}, "'layers.0.weights' is missing"),
        (body, {**arrays, "layers.0.biases": np.array([np.nan])}, "not finite"),
        ({**body, "calibration": "platt"}, arrays, "'calibration.slopes' is missing"),
    ]
    for wrong_body, wrong_arrays, message in cases:
        with pytest.raises(FailedPrecondition, match=message) as caught:
            storage.from_parts(wrong_body, wrong_arrays)
        assert caught.value.reason == "PROBE_MALFORMED"
    with pytest.raises(FailedPrecondition, match=r"probe\.json is missing"):
        storage.load(tmp_path)
    storage.save(probe, tmp_path)
    (tmp_path / "probe.safetensors").write_bytes(b"\x00" * 7)
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        storage.load(tmp_path)
    (tmp_path / "probe.json").write_text(json.dumps([1]))
    with pytest.raises(FailedPrecondition):
        storage.load(tmp_path)


def test_a_bank_scores_as_each_probe_alone() -> None:
    probes = [
        train_probe(
            TASKS[task], (planted.POINTS[0],), ProbeSpec(kind=kind, calibration=calibration)
        ).probe.to("cpu")
        for task in Task
        for kind in KINDS[:2]
        for calibration in CalibrationMethod
    ]
    folded = [ProbeBank.of([probe]).folded[0] for probe in probes]
    assert any(folded) and not all(folded)
    x = torch.randn(33, 24, generator=torch.Generator().manual_seed(1))
    for members in (probes, [probe for probe, one in zip(probes, folded) if one]):
        for probe, scores in zip(members, ProbeBank.of(members).score(x), strict=True):
            torch.testing.assert_close(scores, probe.score(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("cuts", [(7,), (1, 2, 4), (3, 4)])
def test_running_pool_equals_pooling_every_prefix(pooling: Pooling, cuts: tuple[int, ...]) -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    running = RunningPool(pooling)
    found = torch.cat([running.add(part) for part in x.split(list(cuts))])
    expected = torch.cat([pool(x[: t + 1], pooling)[-1:] for t in range(7)])
    torch.testing.assert_close(found, expected)
    with pytest.raises(InvalidArgument, match="no position"):
        pool(x[:0], pooling)


def test_control_labels_keep_groups_whole() -> None:
    examples = planted.examples(300)
    types = np.repeat(np.arange(100), 3)
    grouped = replace(examples, labels=(np.repeat(np.arange(100), 3) % 2).astype(np.int64), groups=types)
    labels = shuffled(grouped, seed=1)
    assert labels.sum() == grouped.labels.sum()
    assert all(len(set(labels[types == t].tolist())) == 1 for t in range(100))
    assert labels.tolist() != grouped.labels.tolist()
    assert shuffled(grouped, seed=1).tolist() == labels.tolist()
