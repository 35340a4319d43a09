"""Many at once: everyone gets what they would get alone, and who vanishes leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from glasshouse.client import (
    Client,
    GenerationResult,
    Intervention,
    ablate_direction,
    add_vector,
    cap_projection,
    generated,
    last,
    replace,
    rotate,
)
from glasshouse.tour.server_process import ServerProcess

from .conftest import HOOK_POINT, PROMPT, until

N_CLIENTS = 32
N_PROCESSES, STREAMS_EACH = 8, 25


def treatment(index: int, vectors: np.ndarray) -> list[Intervention]:
    """What one client asks for; no two ask for the same."""
    v, w = vectors[index], vectors[index + N_CLIENTS]
    point = f"blocks.{index % 6}.hook_resid_post"
    kinds: list[list[Intervention]] = [
        [],
        [add_vector(point, v, coefficient=0.5)],
        [add_vector(point, v, coefficient=0.3, scale="norm")],
        [ablate_direction(point, v)],
        [cap_projection(point, v, max=1.0, min=-1.0)],
        [rotate(point, v, w, angle_radians=0.5)],
        [replace(point, v, positions=last())],
        [add_vector(point, v, positions=generated()), ablate_direction(HOOK_POINT, w)],
    ]
    return kinds[index % len(kinds)]


def test_32_clients_each_as_if_alone(server: ServerProcess, vectors: np.ndarray) -> None:
    def ask(index: int) -> GenerationResult:
        with Client(server.target) as client:
            return (
                client.model()
                .generate(
                    PROMPT[: 12 + index],
                    max_tokens=12 + index % 9,
                    temperature=0.0 if index % 3 else 0.9,
                    seed=index,
                    ignore_eos=True,
                    interventions=treatment(index, vectors),
                )
                .result()
            )

    alone = [ask(index) for index in range(N_CLIENTS)]
    with ThreadPoolExecutor(N_CLIENTS) as pool:
        together = list(pool.map(ask, range(N_CLIENTS)))
    for index, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert other.token_ids == one.token_ids, f"client {index}"
        assert other.text == one.text
        assert other.receipt == one.receipt
        np.testing.assert_allclose(
            [token.logprob for token in other.tokens], [token.logprob for token in one.tokens], atol=1e-4
        )


VANISHING = """
import sys, threading
from glasshouse.client import Client, read_activations
client = Client(sys.argv[1])
model = client.model()
streams = [
    model.generate({prompt!r}, max_tokens=400, ignore_eos=True, readouts=[read_activations({point!r})])
    for _ in range(int(sys.argv[2]))
]
for stream in streams:
    next(stream)
print("reading", flush=True)
threading.Event().wait()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the server's memory from /proc")
def test_200_clients_killed_in_mid_stream(server: ServerProcess, metric: Callable[[str], float]) -> None:
    script = VANISHING.format(prompt=PROMPT, point=HOOK_POINT)
    with Client(server.target) as client:
        model = client.model()
        expected = model.generate(PROMPT, max_tokens=60, seed=1, ignore_eos=True).result().token_ids
        resident = []
        for _ in range(N_PROCESSES // 2):
            readers = [
                subprocess.Popen(
                    [sys.executable, "-c", script, server.target, str(STREAMS_EACH)],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for _ in range(2)
            ]
            for reader in readers:
                assert reader.stdout is not None
                assert reader.stdout.readline() == "reading\n"
            assert metric("glasshouse_active_requests") > 0
            # A neighbour that stays is not disturbed.
            with model.generate(PROMPT, max_tokens=60, seed=1, ignore_eos=True) as stream:
                next(stream)
                for reader in readers:
                    os.kill(reader.pid, signal.SIGKILL)
                    reader.wait()
                    assert reader.stdout is not None
                    reader.stdout.close()
                list(stream)
            assert stream.token_ids == expected
            until(lambda: metric("glasshouse_active_requests") == 0, within_s=5)
            assert metric("glasshouse_queue_depth") == 0
            resident.append(resident_bytes(server.pid))
    assert resident[-1] - resident[0] < 24 << 20, resident


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
