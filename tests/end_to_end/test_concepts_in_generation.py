"""Probes read, edits under conditions and aborting, by the names that fable comes with, through the real client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glasshouse.client import (
    AsyncClient,
    InvalidArgumentError,
    Model,
    NotFoundError,
    ablate_direction,
    add_vector,
    generated,
    read_probe,
    when,
)
from glasshouse.tour.server_process import ServerProcess

SAD = "One day, a girl named Sue lost her best toy. She was very sad and cried."
HAPPY = "One day, a girl named Sue got a new toy. She was very happy and laughed."
LATE = "blocks.5.hook_resid_post"


def test_scores_are_those_of_the_probe(model: Model) -> None:
    """Read in a generation, a pooled probe says of the whole prompt what it says of the text."""
    probe = model.probe("mood")
    for text in (SAD, HAPPY):
        with model.generate(text, max_tokens=4, seed=0, readouts=[read_probe(probe)]) as stream:
            read = stream.prompt_readouts.probes["mood"]
            tokens = list(stream)
        assert read.probe == probe.resource_name and read.labels == ("sad",)
        assert float(read.scores[-1, 0]) == pytest.approx(float(probe.score(text)), abs=1e-4)
        assert (read.scores[-1, 0] > 0.5) == (text is SAD)
        assert all(0.0 <= float(token.probes["mood"]) <= 1.0 for token in tokens)


def test_an_edit_only_where_the_prompt_asks_for_it(model: Model) -> None:
    brighten = ablate_direction("mood").when("mood", above=0.5, over="prompt")
    receipts = {}
    for text in (SAD, HAPPY):
        plain = model.generate(text, max_tokens=12, temperature=0.0, ignore_eos=True).result()
        edited = model.generate(
            text, max_tokens=12, temperature=0.0, ignore_eos=True, interventions=[brighten]
        ).result()
        (receipts[text],) = edited.receipt
        assert receipts[text].positions_applied == 12
        if text is HAPPY:
            assert edited.token_ids == plain.token_ids
    assert receipts[SAD].positions_steered == 12 and receipts[HAPPY].positions_steered == 0
    assert receipts[SAD].resources == ["models/fable/directions/mood@1", "models/fable/probes/mood@1"]
    assert receipts[SAD].hook_points == ["blocks.2.hook_resid_post"]


def test_a_sad_prompt_is_refused_and_its_neighbours_go_on(
    server: ServerProcess, metric: Callable[[str], float]
) -> None:
    async def main() -> None:
        async with AsyncClient(server.target) as client:
            model = await client.model()
            ends = when("mood", above=0.5, over="prompt")
            results = await asyncio.gather(
                *(
                    model.generate(text, max_tokens=8, seed=1, ignore_eos=True, abort_when=ends).result()
                    for text in (SAD, HAPPY) * 4
                )
            )
        for sad, happy in zip(results[::2], results[1::2], strict=True):
            assert sad.finish_reason == "aborted" and sad.token_ids == [] and sad.abort is not None
            assert sad.abort.condition == 0 and sad.abort.position == len(sad.prompt) - 1
            assert happy.finish_reason == "length" and happy.abort is None and len(happy.token_ids) == 8

    asyncio.run(main())
    assert metric("glasshouse_active_requests") == 0


def test_an_abort_sends_nothing_after_the_position(model: Model) -> None:
    free = model.generate(
        HAPPY, max_tokens=24, seed=3, ignore_eos=True, readouts=[read_probe("mood")]
    ).result()
    scores = [float(token.probes["mood"]) for token in free.tokens[1:]]
    at = int(np.argmax(scores))
    bar = float(np.nextafter(np.float32(scores[at]), np.float32(0)))
    cut = model.generate(
        HAPPY,
        max_tokens=24,
        seed=3,
        ignore_eos=True,
        abort_when=when("mood", above=bar, positions=generated()),
    ).result()
    assert cut.finish_reason == "aborted" and cut.token_ids == free.token_ids[: at + 1]
    assert cut.abort is not None and cut.abort.position == len(free.prompt) + at


@pytest.mark.parametrize(
    ("parameters", "kind", "field", "says"),
    [
        ({"readouts": [read_probe("modo")]}, NotFoundError, "readouts[0].probe.probe", "mood"),
        ({"readouts": [read_probe("mood@7")]}, NotFoundError, "readouts[0].probe.probe", ""),
        ({"readouts": [read_probe("models/ecco/probes/mood")]}, Exception, "readouts[0].probe.probe", ""),
        (
            {"abort_when": when("moods", above=0.5)},
            InvalidArgumentError,
            "abort_when[0].probe.label",
            "afraid",
        ),
        (
            {"interventions": [add_vector("modo")]},
            NotFoundError,
            "interventions[0].add_vector.direction",
            "mood",
        ),
        (
            {"interventions": [add_vector("blocks.0.hook_resid_post", "mood").when("mood", above=0.5)]},
            InvalidArgumentError,
            "interventions[0].condition",
            "blocks.2.hook_resid_post",
        ),
    ],
    ids=["no probe", "no version", "another model", "no label", "no direction", "too late"],
)
def test_refused_at_once(
    model: Model, parameters: dict[str, Any], kind: type[Exception], field: str, says: str
) -> None:
    with pytest.raises(kind) as caught:
        model.generate(HAPPY, max_tokens=4, **parameters).result()
    error: Any = caught.value
    assert error.field == field and error.remedy and error.code != "INTERNAL"
    assert says in str(error)


def test_the_command(server: ServerProcess) -> None:
    arguments = ["generate", SAD, "--max-tokens", "6", "--seed", "1", "--json", "--probe", "mood"]
    arguments += [
        "--steer",
        "mood*-6",
        "--when",
        "mood>0.5 over latched",
        "--abort-when",
        "moods:afraid>0.999",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "glasshouse.cli.main", *arguments, "--target", server.target],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["probes"]["mood"]["labels"] == ["sad"]
    (receipt,) = events[-1]["receipt"]
    assert receipt["positions_steered"] > 0 and "models/fable/probes/mood@1" in receipt["resources"]
