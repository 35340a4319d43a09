"""A rehearsal of ACDC makes the passes that ACDC makes, exactly where it knows what is kept and nearly where it guesses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse import fable
from glasshouse.server.attribution import circuits
from glasshouse.server.attribution.circuit_rehearsal import (
    Effects,
    Passes,
    Rehearsal,
    guess_effects,
    rehearse,
    rehearse_decisions,
)
from glasshouse.server.attribution.circuits import EdgeExperiment, discover_circuit, discover_circuit_of_size
from glasshouse.server.attribution.edge_patching import forward_with_edges
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import (
    DirectionValue,
    LogitDifference,
    LogProbability,
    Metric,
    Probability,
)
from glasshouse.server.attribution.progress import Progress, silent
from glasshouse.server.attribution.wiring import Wiring
from glasshouse.server.models.loading import load_model
from glasshouse.server.operations.attribution import budget, circuit_search
from glasshouse.server.operations.attribution.circuit_search import CircuitRequest, estimate_circuit, search


@pytest.fixture(scope="module")
def trained() -> GradientModel:
    torch.set_num_threads(1)
    return GradientModel(load_model(fable.model_path(), dtype="float32", device="cpu", name="fable"))


@contextmanager
def watched(passed: Callable[[int, int], None]) -> Iterator[None]:
    """Tells every pass through the edge graph: its rows and the layer that it really starts at."""

    def run(wiring: Wiring, tokens: Tensor, corrupt: Tensor, mask: Tensor, **options: Any) -> Any:
        started: list[int] = []

        def began(layer: int) -> Callable[[Tensor], None]:
            return lambda _: started.append(layer)

        edits = {f"blocks.{layer}.hook_resid_pre": [began(layer)] for layer in range(wiring.model.n_layers)}
        forward = wiring.model.forward
        wiring.model.forward = lambda *a, after=None, **o: forward(*a, after=edits, **o)  # type: ignore[method-assign]
        try:
            found = forward_with_edges(wiring, tokens, corrupt, mask, **options)
        finally:
            wiring.model.forward = forward  # type: ignore[method-assign]
        passed(tokens.shape[0], min(started))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circuits, "forward_with_edges", run)
        yield


@pytest.mark.parametrize("threshold", [1e-3, 0.02, 0.3])
def test_the_passes_of_what_a_search_decided_are_those_it_made(
    model: GradientModel, clean: Tensor, corrupt: Tensor, threshold: float
) -> None:
    made: Passes = Counter()
    experiment = EdgeExperiment(Wiring(model), clean, corrupt)
    with watched(lambda rows, layer: made.update([(rows, layer)])):
        kept = circuits._search(experiment, threshold, silent)
    made[1, 0] -= 1  # the value of the whole
    rehearsed = rehearse_decisions(experiment, lambda row, column: bool(kept[row, column]))
    assert rehearsed.passes == made
    assert torch.equal(rehearsed.kept, kept)
    assert threshold > 0.1 or 0 < rehearsed.n_kept < int(experiment.wiring.valid.sum())


def test_a_metric_that_is_what_was_guessed_is_rehearsed_exactly(clean: Tensor, corrupt: Tensor) -> None:
    """Effects by hand: every edge moves the metric by its own share."""
    from .conftest import load

    experiment = EdgeExperiment(Wiring(GradientModel(load("llama"))), clean, corrupt)
    valid = experiment.wiring.valid
    shares = torch.rand(valid.shape, generator=torch.Generator().manual_seed(1)) * valid
    rehearsed = rehearse(experiment, Effects(shares=shares, value=float), 0.9)
    logits = shares[:, -1] >= 0.9
    assert torch.equal(rehearsed.kept[:, -1], logits & valid[:, -1]), "every edge into the logits is tried"
    assert bool((shares[rehearsed.kept] >= 0.9).all())
    nothing = rehearse(experiment, Effects(shares=shares, value=float), 2.0)
    assert nothing.n_kept == 0
    assert sum(rows * n for (rows, _), n in nothing.passes.items()) == int(valid[:, -1].sum()), (
        "all else is dead"
    )


PAIRS = [
    ("Tom was tired after the walk, so", "Anna was tired after the walk, so", " he", " she"),
    ("The capital of France is called", "The capital of Italy is called", " Paris", " Rome"),
    ("The capital of Norway is called", "The capital of Egypt is called", " Oslo", " Cairo"),
]


def asked_of(
    trained: GradientModel, pair: tuple[str, str, str, str], metric: str, **size: Any
) -> CircuitRequest:
    codec = trained.loaded.tokenizer
    clean, corrupt, right, wrong = pair
    (right_id,), (wrong_id,) = codec.encode(right, False), codec.encode(wrong, False)
    metrics: dict[str, Metric | None] = {
        "kl": None,
        "logits": LogitDifference(targets=(wrong_id,), foils=(right_id,)),
        "probability": Probability(targets=(wrong_id,)),
        "log_probability": LogProbability(targets=(wrong_id,)),
    }
    made = metrics[metric]
    return CircuitRequest(
        clean=tuple(codec.encode(clean)),
        corrupt=tuple(codec.encode(corrupt)),
        metric=None if made is None else lambda _: made,
        **size,
    )


@pytest.mark.parametrize("pair", PAIRS, ids=["gender", "France", "Norway"])
@pytest.mark.parametrize("metric", ["kl", "logits", "probability", "log_probability"])
def test_the_passes_guessed_are_near_those_made(
    trained: GradientModel, pair: tuple[str, str, str, str], metric: str
) -> None:
    asked = asked_of(trained, pair, metric, threshold=1.0)
    clean, corrupt = torch.tensor(asked.clean), torch.tensor(asked.corrupt)
    made = None if asked.metric is None else asked.metric(trained)
    experiment = EdgeExperiment(Wiring(trained), clean, corrupt, made)
    effects = guess_effects(experiment, clean, corrupt)
    for threshold in (0.005, 0.05):
        found = discover_circuit(trained, clean, corrupt, threshold=threshold, metric=made)
        guessed = rehearse(experiment, effects, threshold)
        n_passes = guessed.passes.total() + 5
        print(metric, threshold, "kept", len(found.edges), guessed.n_kept, "passes", found.n_passes, n_passes)
        assert 0.6 < n_passes / found.n_passes < 1.6


def test_a_metric_of_activations(trained: GradientModel) -> None:
    asked = asked_of(trained, PAIRS[0], "kl", threshold=1.0)
    clean, corrupt = torch.tensor(asked.clean), torch.tensor(asked.corrupt)
    place = f"blocks.{trained.n_layers - 1}.hook_resid_post"
    ends = [trained.forward(trained.tokens(t), read=[place]).readings[place][0, -1] for t in (corrupt, clean)]
    direction = (ends[0] - ends[1]) / (ends[0] - ends[1]).norm()
    metric = DirectionValue(hook_point=place, direction=direction)
    experiment = EdgeExperiment(Wiring(trained), clean, corrupt, metric)
    effects = guess_effects(experiment, clean, corrupt)
    for threshold in (0.01, 0.1):
        found = discover_circuit(trained, clean, corrupt, threshold=threshold, metric=metric)
        guessed = rehearse(experiment, effects, threshold)
        n_passes = guessed.passes.total() + 5
        print(threshold, "kept", len(found.edges), guessed.n_kept, "passes", found.n_passes, n_passes)
        assert found.edges and 0.6 < n_passes / found.n_passes < 1.6


def test_the_same_input_twice_takes_a_handful_of_passes(trained: GradientModel) -> None:
    asked = asked_of(trained, PAIRS[0], "kl", threshold=0.01)
    clean = torch.tensor(asked.clean)
    experiment = EdgeExperiment(Wiring(trained), clean, clean)
    rehearsed = rehearse(experiment, guess_effects(experiment, clean, clean), 0.01)
    found = discover_circuit(trained, clean, clean, threshold=0.01)
    assert rehearsed.n_kept == len(found.edges) == 0
    assert rehearsed.passes.total() + 5 == found.n_passes


class Clock:
    """Time that passes only in passes: a unit for each, and one a row and layer run."""

    def __init__(self, n_layers: int) -> None:
        self.now, self._n_layers = 0.0, n_layers

    def __call__(self) -> float:
        return self.now

    def tick(self, rows: int, first_layer: int) -> None:
        self.now += 1.0 + rows * (self._n_layers - first_layer)


SIZES = [{"threshold": 0.005}, {"threshold": 0.05}, {"target_edges": 30}]


@pytest.mark.parametrize("size", SIZES, ids=["small", "large", "edges"])
@pytest.mark.parametrize("metric", ["kl", "logits"])
def test_seconds_estimated_are_near_those_taken(
    trained: GradientModel, metric: str, size: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of ours, so that what is tested is the estimate and not the machine."""
    clock = Clock(trained.n_layers)
    monkeypatch.setattr(budget, "perf_counter", clock)
    monkeypatch.setattr(circuit_search, "perf_counter", clock)
    asked = asked_of(trained, PAIRS[1], metric, **size)
    with watched(clock.tick):
        estimate = estimate_circuit(trained, asked)
        circuit, seconds = search(trained, asked, silent)
    print(estimate, len(circuit.edges), circuit.n_passes, seconds)
    assert 0.5 < estimate.seconds / seconds < 2
    assert 0.5 < estimate.passes / circuit.n_passes < 2
    assert circuit.n_passes < estimate.passes_upper_bound
    assert max(seconds, estimate.seconds) < estimate.seconds_upper_bound
    assert estimate.size == int(circuit.wiring.valid.sum())


def test_the_upper_bound_holds_where_everything_is_kept(
    trained: GradientModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(trained.n_layers)
    monkeypatch.setattr(budget, "perf_counter", clock)
    monkeypatch.setattr(circuit_search, "perf_counter", clock)
    asked = asked_of(trained, PAIRS[1], "log_probability", threshold=1e-9)
    with watched(clock.tick):
        estimate = estimate_circuit(trained, asked)
        circuit, seconds = search(trained, asked, silent)
    assert len(circuit.edges) > 400
    assert seconds < estimate.seconds_upper_bound < 10 * seconds
    assert circuit.n_passes < estimate.passes_upper_bound < 3 * circuit.n_passes


def test_a_size_is_searched_at_the_thresholds_that_are_rehearsed(
    trained: GradientModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: dict[str, list[float]] = {"searched": [], "rehearsed": []}
    real, guessed = circuits._search, rehearse

    def searching(experiment: EdgeExperiment, threshold: float, progress: Progress) -> Tensor:
        tried["searched"].append(threshold)
        return real(experiment, threshold, progress)

    def rehearsing(experiment: EdgeExperiment, effects: Effects, threshold: float) -> Rehearsal:
        tried["rehearsed"].append(threshold)
        return guessed(experiment, effects, threshold)

    monkeypatch.setattr(circuits, "_search", searching)
    monkeypatch.setattr(circuit_search, "rehearse", rehearsing)
    asked = asked_of(trained, PAIRS[1], "logits", target_edges=30)
    estimate_circuit(trained, asked)
    discover_circuit_of_size(
        trained,
        torch.tensor(asked.clean),
        torch.tensor(asked.corrupt),
        n_edges=30,
        metric=None if asked.metric is None else asked.metric(trained),
    )
    first = [thresholds[:3] for thresholds in tried.values()]
    assert first[0] == pytest.approx(first[1], rel=1e-6), "the same effect is bisected, the same way at first"
    assert all(3 <= len(thresholds) <= 10 for thresholds in tried.values())
