"""Runs vLLM with our workers in a process of its own, behind a gateway of thirty lines: requests in, tokens and rows out.

The process is apart because vLLM warns, and here a warning is an error; the gateway is this file's own because these
tests are about the workers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.server.engines.vllm.contract import RequestPlan, pack_plan

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request. Those of a wave run together; a wave begins when the one before has ended."""

    prompt: tuple[int, ...]
    plan: RequestPlan | None = None
    max_tokens: int = 8
    salt: str | None = None
    skip_cache: bool = False
    wave: int = 0


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What came back: `rows[readout][position]` is a tuple of arrays; `ran` (start, count, applied), in order, by rank."""

    token_ids: list[int]
    logprobs: list[float]
    rows: dict[int, dict[int, tuple[np.ndarray, ...]]]
    ran: dict[int, list[tuple[int, int, int]]]
    armed: list[int]
    error: str
    cached: int


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run of vLLM: its answers, the workers' boot reports and counters, and what it said where it did not start."""

    answers: list[Answered] = field(default_factory=list)
    boots: list[dict[str, Any]] = field(default_factory=list)
    stats: list[dict[str, int]] = field(default_factory=list)
    preemptions: int = 0
    failure: str = ""


def run_vllm(
    folder: Path,
    asks: Sequence[Ask],
    *,
    engine: Mapping[str, Any],
    dictionaries: Sequence[tuple[str, str]] = (),
    vectors: Mapping[str, np.ndarray] | None = None,
    settings: Mapping[str, int] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 280,
) -> Session:
    """Starts vLLM with `engine`'s arguments over ours, asks, and stops it. Files go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "engine": dict(engine),
        "dictionaries": [[name, path, 1] for name, path in dictionaries],
        "vectors": {name: vector.astype("<f4").tobytes().hex() for name, vector in (vectors or {}).items()},
        "settings": dict(settings or {}),
        "asks": [
            {
                "prompt": list(ask.prompt),
                "plan": None if ask.plan is None else pack_plan(ask.plan).hex(),
                "tag": None if ask.plan is None else ask.plan.tag,
                "max_tokens": ask.max_tokens,
                "salt": ask.salt,
                "skip": ask.skip_cache,
                "wave": ask.wave,
            }
            for ask in asks
        ],
    }
    (folder / "job.json").write_text(json.dumps(job))
    told = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    child = [sys.executable, "-W", "ignore", "-m", "tests.vllm_worker.child", str(folder)]
    done = subprocess.run(child, env=told, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    answer = folder / "answer.json"
    if not answer.exists():
        return Session(failure=done.stdout + done.stderr)
    return _session(json.loads(answer.read_text()), np.load(folder / "rows.npz"))


def _session(found: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Session:
    answers = []
    for index, answer in enumerate(found["answers"]):
        rows: dict[int, dict[int, tuple[np.ndarray, ...]]] = {}
        for readout, n_values in answer["readouts"].items():
            positions = arrays[f"{index}/{readout}/positions"].tolist()
            values = [arrays[f"{index}/{readout}/{value}"] for value in range(n_values)]
            rows[int(readout)] = {
                position: tuple(value[row] for value in values) for row, position in enumerate(positions)
            }
        answers.append(
            Answered(
                token_ids=answer["token_ids"],
                logprobs=answer["logprobs"],
                rows=rows,
                ran={int(rank): [tuple(run) for run in runs] for rank, runs in answer["ran"].items()},
                armed=answer["armed"],
                error=answer["error"],
                cached=answer["cached"],
            )
        )
    return Session(
        answers=answers, boots=found["boots"], stats=found["stats"], preemptions=found["preemptions"]
    )
