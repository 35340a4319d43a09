"""What a worker is told when it starts, and what it answers once it is up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from glasshouse.server.probes import storage
from glasshouse.server.probes.served import ServedProbe

# In the compile hash: raise it whenever what is traced into the model's graph changes, or an old artefact would run
# unhooked.
PLUGIN_VERSION = 2

# Key of a request's packed plan in `SamplingParams.extra_args`, and of the settings in vLLM's `additional_config`.
EXTRA_ARG = "glasshouse"
# Of the environment: the number of the server's process, with which workers on its machine end.
SERVER_PROCESS = "GLASSHOUSE_SERVER_PROCESS"

WORKER_CLASS = "glasshouse.server.engines.vllm.worker.worker.GlasshouseWorker"

# Hook points of each block that this engine knows, without their `blocks.{L}.` prefix, in the order of the forward pass.
SITES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")

# What the MLP reads, where that is a norm's output: transcoders read it. Not every adapter has it.
MLP_INPUT = "ln2.hook_out"
HOOKED = (*SITES, MLP_INPUT)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Sizes of the worker's tables. A request's edits need `RequestPlan.n_edits` slots and `n_vectors` rows: the gateway
    reserves both before it submits, for a worker that runs out fails the request.

    max_edits:        edits of all running requests together
    max_vectors:      vectors of all running requests together, d_model float32 each; resident ones apart
    max_resident_vectors: named directions loaded at a time
    max_message_bytes: rows pushed in one message; more are split
    max_queued_messages: messages that wait for the gateway; over it the captures of that step fail, by name
    """

    max_edits: int = 4096
    max_vectors: int = 4096
    max_message_bytes: int = 4 << 20
    max_resident_vectors: int = 1024
    max_queued_messages: int = 256


@dataclass(frozen=True, kw_only=True)
class BootReport:
    """A worker's answer to `glasshouse_connect(endpoint)` and `glasshouse_boot()`.

    reports:   whether it pushes messages: tensor-parallel rank 0 of each pipeline stage. A request is armed once all
               reporters have said so; errors may come from any.
    hooks:     whether the model has hook points; `refusal` says why not (its family has no adapter): plain generation only.
    sites:     full names of the hook points of its pipeline stage, in the order of the forward pass.
    lens:      whether this stage can compute the logit lens (it holds the final norm and the unembedding).
    """

    rank: int
    pipeline_rank: int
    reports: bool
    hooks: bool
    refusal: str = ""
    sites: tuple[str, ...] = ()
    lens: bool = False
    family: str = ""
    d_model: int = 0
    dtype: str = ""
    runner: str = ""
    vllm_version: str = ""
    compiled: bool = False
    settings: WorkerSettings = field(default_factory=WorkerSettings)

    def to_plain(self) -> dict[str, Any]:
        """As plain values, for vLLM's RPC."""
        return asdict(self)

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> BootReport:
        """The reverse of `to_plain`."""
        values = dict(plain)
        values["sites"] = tuple(values["sites"])
        values["settings"] = WorkerSettings(**values["settings"])
        return BootReport(**values)


def engine_arguments(settings: WorkerSettings) -> dict[str, Any]:
    """Keyword arguments for vLLM's `AsyncEngineArgs` that make its workers ours.

    The settings go through `additional_config`, which vLLM hashes into its compile cache; `worker_cls` it does not.
    """
    return {
        "worker_cls": WORKER_CLASS,
        "additional_config": {
            EXTRA_ARG: {"plugin_version": PLUGIN_VERSION, "sites": list(HOOKED), "settings": asdict(settings)}
        },
    }


# Methods of every worker, for `AsyncLLM.collective_rpc(name, args=...)`: plain values in and out, one answer a worker.
#
# glasshouse_boot() -> BootReport.to_plain()
# glasshouse_connect(endpoint: str) -> BootReport.to_plain(); pushes to this ZMQ PULL endpoint from now on
# glasshouse_load_dictionary(name, path, generation: int) -> [[facts.name, key], ...]
#     The keys are what plans use (`dictionary_key`).
# glasshouse_unload_dictionary(keys: list[str]) -> None; requests that hold one keep it
# glasshouse_load_vectors(vectors: dict[str, bytes]) -> None
#     Named directions, (d_model,) float32 little-endian each, held until unloaded; `EditPlan.vector_keys` names them.
# glasshouse_unload_vectors(keys: list[str]) -> None; requests that hold one keep it
# glasshouse_load_probe(key, body: str, tensors: dict[str, [list[int], bytes]]) -> None
#     A probe as `probes.storage.to_parts` gives it: its JSON, and float64 little-endian tensors with their shapes.
# glasshouse_unload_probes(keys: list[str]) -> None; requests that use one keep it
# glasshouse_stats() -> dict[str, int]: counters and gauges, see `worker.statistics`
CONNECT = "glasshouse_connect"
BOOT = "glasshouse_boot"
LOAD_DICTIONARY = "glasshouse_load_dictionary"
UNLOAD_DICTIONARY = "glasshouse_unload_dictionary"
LOAD_VECTORS = "glasshouse_load_vectors"
UNLOAD_VECTORS = "glasshouse_unload_vectors"
LOAD_PROBE = "glasshouse_load_probe"
UNLOAD_PROBES = "glasshouse_unload_probes"
STATS = "glasshouse_stats"


def probe_parts(probe: ServedProbe) -> tuple[str, dict[str, list[Any]]]:
    """A probe as `glasshouse_load_probe` takes it."""
    body, tensors = storage.to_parts(probe)
    plain = {name: [list(array.shape), array.astype("<f8").tobytes()] for name, array in tensors.items()}
    return json.dumps(body), plain


def dictionary_key(name: str, generation: int) -> str:
    """What plans call a dictionary: a name loaded anew must not be taken for what it was, nor share its cached prefixes."""
    return f"{name}#{generation}"
