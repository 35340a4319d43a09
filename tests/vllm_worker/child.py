"""The process that runs vLLM for `harness`: reads job.json, writes answer.json and rows.npz."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.server.engines.vllm.contract import (
    EXTRA_ARG,
    WorkerSettings,
    engine_arguments,
    unpack_report,
)
from glasshouse.server.engines.vllm.contract.settings import (
    CONNECT,
    LOAD_DICTIONARY,
    LOAD_VECTORS,
    SERVER_PROCESS,
    STATS,
)


class Gateway:
    """Keeps all that the workers report, by tag."""

    def __init__(self) -> None:
        import zmq

        self.endpoint = f"ipc://{tempfile.mkdtemp()}/reports"
        self._socket = zmq.Context.instance().socket(zmq.PULL)
        self._socket.bind(self.endpoint)
        self.rows: dict[int, dict[int, dict[int, tuple[Any, ...]]]] = defaultdict(lambda: defaultdict(dict))
        self.ran: dict[int, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
        self.armed: dict[int, list[int]] = defaultdict(list)
        self.errors: dict[int, str] = {}
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            report = unpack_report([frame.buffer for frame in self._socket.recv_multipart(copy=False)])
            for tag in report.armed:
                self.armed[tag].append(report.rank)
            for error in report.errors:
                self.errors.setdefault(error.tag, f"{error.reason}: {error.message}")
            for ran in report.ran:
                for tag, start, count, applied in zip(
                    *(column.tolist() for column in (ran.tags, ran.starts, ran.counts, ran.applied))
                ):
                    self.ran[tag][report.rank].append((start, count * ran.steps, applied * ran.steps))
            for block in report.blocks:
                for row, (tag, readout, position) in enumerate(
                    zip(block.tags.tolist(), block.readouts.tolist(), block.positions.tolist())
                ):
                    self.rows[tag][readout][position] = tuple(
                        np.array(values[row]) for values in block.values
                    )


async def serve(job: dict[str, Any], folder: Path) -> None:
    """Asks everything, wave after wave."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "disable_log_stats": False,
        **engine_arguments(WorkerSettings(**job["settings"])),
        **job["engine"],
    }
    os.environ[SERVER_PROCESS] = str(os.getpid())
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**given))
    try:
        gateway = Gateway()
        boots = await llm.collective_rpc(CONNECT, args=(gateway.endpoint,))
        for dictionary in job["dictionaries"]:
            await llm.collective_rpc(LOAD_DICTIONARY, args=tuple(dictionary))
        if job["vectors"]:
            vectors = {name: bytes.fromhex(data) for name, data in job["vectors"].items()}
            await llm.collective_rpc(LOAD_VECTORS, args=(vectors,))

        async def ask(index: int, asked: dict[str, Any]) -> Any:
            extra = None if asked["plan"] is None else {EXTRA_ARG: bytes.fromhex(asked["plan"])}
            params = SamplingParams(
                temperature=0.0,
                max_tokens=asked["max_tokens"],
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
                extra_args=extra,
                skip_reading_prefix_cache=asked["skip"],
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt: dict[str, Any] = {"prompt_token_ids": asked["prompt"]}
            if asked["salt"]:
                prompt["cache_salt"] = asked["salt"]
            stream = llm.generate(prompt, params, request_id=f"request-{index}")
            return [output async for output in stream][-1]

        outputs: list[Any] = [None] * len(job["asks"])
        for wave in sorted({asked["wave"] for asked in job["asks"]}):
            chosen = [(i, asked) for i, asked in enumerate(job["asks"]) if asked["wave"] == wave]
            done = await asyncio.gather(*(ask(i, asked) for i, asked in chosen))
            for (i, _), output in zip(chosen, done, strict=True):
                outputs[i] = output
        # Reports leave before tokens do, on another socket.
        await asyncio.sleep(0.3)
        stats = await llm.collective_rpc(STATS)
    finally:
        llm.shutdown()
    arrays: dict[str, np.ndarray] = {}
    answers = []
    for index, (asked, output) in enumerate(zip(job["asks"], outputs, strict=True)):
        found = output.outputs[0]
        rows = gateway.rows.get(asked["tag"], {})
        for readout, by_position in rows.items():
            positions = sorted(by_position)
            arrays[f"{index}/{readout}/positions"] = np.array(positions)
            for place in range(len(by_position[positions[0]])):
                arrays[f"{index}/{readout}/{place}"] = np.stack([by_position[p][place] for p in positions])
        answers.append(
            {
                "token_ids": list(found.token_ids),
                "logprobs": [
                    entry[token].logprob for token, entry in zip(found.token_ids, found.logprobs, strict=True)
                ],
                "readouts": {readout: len(next(iter(by.values()))) for readout, by in rows.items()},
                "ran": gateway.ran.get(asked["tag"], {}),
                "armed": gateway.armed.get(asked["tag"], []),
                "error": gateway.errors.get(asked["tag"], ""),
                "cached": output.num_cached_tokens or 0,
            }
        )
    np.savez(folder / "rows.npz", **arrays)
    (folder / "answer.json").write_text(
        json.dumps({"answers": answers, "boots": boots, "stats": stats, "preemptions": _preemptions()})
    )


def _preemptions() -> int:
    from prometheus_client import REGISTRY

    total = 0.0
    for metric in REGISTRY.collect():
        if metric.name == "vllm:num_preemptions":
            total += sum(sample.value for sample in metric.samples if sample.name.endswith("_total"))
    return int(total)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    asyncio.run(serve(json.loads((where / "job.json").read_text()), where))
