"""What attribution may take: estimates that refuse, queues that end, cancellation within a batch, results that expire, and
generation that goes on beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glasshouse.client import (
    CancelledError,
    Client,
    DeadlineExceededError,
    FailedPreconditionError,
    Model,
    NotFoundError,
    ResourceExhaustedError,
    feature_grid,
    kl_divergence,
    logit_difference,
    span,
)
from glasshouse.tour.server_process import ServerProcess

from .conftest import until

CLEAN = "Once upon a time there was a girl named Lily. Lily was happy because"
CORRUPT = "Once upon a time there was a boy named Tom. Tom was happy because"
GENDER = logit_difference(" she", " he")
MakeServer = Callable[..., ServerProcess]


def long_prompt(model: Model, n: int) -> list[int]:
    return model.tokenize("The dog and the cat went to the big park. They saw a red ball. " * 40).ids[:n]


def test_what_is_over_the_memory_budget_is_refused_with_the_numbers(make_server: MakeServer) -> None:
    server = make_server("[attribution]\nmax_memory_bytes = 20_000_000\n")
    with Client(server.target) as client:
        model = client.model()
        estimate = model.estimate_attribution_graph(CLEAN)
        assert estimate.memory_bytes > estimate.memory_budget_bytes == 20_000_000
        assert "20,000,000 are allowed" in estimate.refusal
        with pytest.raises(ResourceExhaustedError) as caught:
            model.attribution_graph(CLEAN)
        assert caught.value.reason == "MEMORY_BUDGET"
        assert f"{estimate.memory_bytes:,} bytes" in str(caught.value)
        assert "attribution.max_memory_bytes" in str(caught.value.remedy)
        assert client.attribution_graphs() == []


def test_what_would_take_too_long_is_refused_with_the_numbers(make_server: MakeServer) -> None:
    server = make_server("[attribution]\nmax_seconds = 0.001\nmax_call_seconds = 0.001\n")
    with Client(server.target) as client:
        model = client.model()
        assert "s, 0 are allowed" in model.estimate_circuit(CLEAN, CORRUPT, threshold=0.1).refusal
        for call in (
            lambda: model.discover_circuit(CLEAN, CORRUPT, threshold=0.1),
            lambda: model.attribution_graph(CLEAN),
            lambda: model.attribute_tokens(CLEAN, GENDER, steps=64),
            lambda: model.patch_sweep(CLEAN, CORRUPT, metric=GENDER).result(),
            lambda: model.attribution_patch(CLEAN, CORRUPT, metric=GENDER, verify_top=9),
        ):
            with pytest.raises(ResourceExhaustedError) as caught:
                call()
            assert caught.value.reason == "LIMIT_EXCEEDED"


def test_results_expire_and_fill_up(make_server: MakeServer, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    configuration = f'[attribution]\nfolder = "{folder}"\nkeep_s = 3.0\nmax_stored_bytes = 600_000\n'
    server = make_server(configuration)
    with Client(server.target) as client:
        model = client.model()
        graph = model.attribution_graph(CLEAN, max_feature_nodes=64).result(60)
        assert list((folder / "attributionGraphs").glob("*.safetensors"))
        with pytest.raises(ResourceExhaustedError) as caught:
            model.attribution_graph(CLEAN, max_feature_nodes=1024).result(60)
        assert "delete stored graphs" in str(caught.value.remedy)
        until(lambda: not client.attribution_graphs(), within_s=20)
        with pytest.raises(NotFoundError):
            client.read_attribution_graph(graph.name)
        until(lambda: not list((folder / "attributionGraphs").iterdir()))


def test_results_outlive_the_server_where_they_have_a_folder(make_server: MakeServer, tmp_path: Path) -> None:
    configuration = f'[attribution]\nfolder = "{tmp_path / "results"}"\n'
    first = make_server(configuration)
    with Client(first.target) as client:
        graph = client.model().attribution_graph(CLEAN, max_feature_nodes=16).result(60)
    first.stop()
    with Client(make_server(configuration).target) as client:
        again = client.read_attribution_graph(graph.name)
        assert again.info == graph.info
        assert np.array_equal(again.edges.weights, graph.edges.weights)


def test_an_operation_is_cancelled_within_a_batch(client: Client, model: Model) -> None:
    tokens = long_prompt(model, 256)
    operation = model.attribution_graph(tokens)
    until(lambda: operation.done() or operation.progress.counts["done"] > 0, within_s=60)
    assert not operation.done()
    operation.cancel()
    with pytest.raises(CancelledError):
        operation.result(timeout=30)
    # The lane is free again: what comes next is done long before the first would have been.
    assert len(model.attribution_graph(CLEAN, max_feature_nodes=16).result(60).features) == 16


def test_leaving_a_sweep_ends_it_at_the_server(model: Model) -> None:
    grids = feature_grid("resid-post-3")
    with model.patch_sweep(CLEAN, CORRUPT, metric=GENDER, grids=grids) as sweep:
        next(iter(sweep))
        total = sweep.progress.total
    assert total > 2000
    begun = time.monotonic()
    model.attribute_tokens(CLEAN, GENDER, steps=8)
    assert time.monotonic() - begun < 30, "the lane is not busy with what nobody reads"


def test_a_deadline_ends_a_call(model: Model) -> None:
    with pytest.raises(DeadlineExceededError):
        model.patch_sweep(
            CLEAN, CORRUPT, metric=GENDER, grids=feature_grid("resid-post-3"), timeout=0.3
        ).result()
    assert model.attribute_tokens(CLEAN, GENDER, steps=8).value > 0


def test_the_queue_is_bounded(make_server: MakeServer) -> None:
    server = make_server("[attribution]\nmax_queued = 1\n")
    with Client(server.target) as client:
        model = client.model()
        grids = feature_grid("resid-post-3", positions=span(10, 16))
        sweeps = [model.patch_sweep(CLEAN, CORRUPT, metric=GENDER, grids=grids) for _ in range(4)]
        refusals = []

        def drain(sweep: object) -> None:
            try:
                sweep.result()  # type: ignore[attr-defined]
            except ResourceExhaustedError as error:
                refusals.append(error)

        threads = [threading.Thread(target=drain, args=(sweep,)) for sweep in sweeps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert 1 <= len(refusals) <= 3
        assert {error.reason for error in refusals} == {"QUEUE_FULL"}
        assert model.attribute_tokens(CLEAN, GENDER, steps=8).value > 0


def test_generation_goes_on_and_says_the_same_while_graphs_are_traced(model: Model) -> None:
    prompts = ["Once upon a time", "The dog", "One day a boy", "In a big house"]

    def generate() -> list[str]:
        streams = [
            model.generate(prompt, max_tokens=48, temperature=0.8, seed=n, ignore_eos=True)
            for n, prompt in enumerate(prompts)
        ]
        return [stream.result().text for stream in streams]

    alone = generate()
    operation = model.attribution_graph(long_prompt(model, 256))
    until(lambda: operation.done() or operation.progress.counts["done"] > 0, within_s=60)
    beside = generate()
    assert not operation.done(), "it was being traced all the while"
    operation.cancel()
    assert beside == alone


def test_attribution_leaves_no_hook_behind(model: Model) -> None:
    before = model.generate(CLEAN, max_tokens=24, temperature=0.0).result().token_ids
    model.patch_sweep(CLEAN, CORRUPT, metric=GENDER, grids="attn.hook_z").result()
    model.attribution_patch(CLEAN, CORRUPT, metric=GENDER, method="atp*")
    model.attribute_tokens(CLEAN, kl_divergence(CORRUPT), steps=8)
    assert model.generate(CLEAN, max_tokens=24, temperature=0.0).result().token_ids == before


def test_a_model_without_transcoders_says_what_to_load(make_server: MakeServer) -> None:
    from glasshouse import fable

    server = ServerProcess(
        "--listen",
        "127.0.0.1:0",
        "--registry",
        "memory",
        "--model",
        str(fable.model_path()),
        "--name",
        "bare",
    )
    with server, Client(server.target) as client:
        model = client.model()
        with pytest.raises(FailedPreconditionError) as caught:
            model.attribution_graph(CLEAN)
        assert caught.value.reason == "CAPABILITY_MISSING"
        assert "LoadDictionary" in str(caught.value.remedy)
        assert model.attribute_tokens(CLEAN, GENDER, steps=8).value > 0
