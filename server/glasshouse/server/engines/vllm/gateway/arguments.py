"""Our settings as vLLM's engine arguments."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.types.configuration import EngineSettings, VllmSettings
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

from ..contract import WorkerSettings
from ..contract import engine_arguments as worker_arguments
from . import environment

# What the hooks rely on, or what has a setting of its own.
_OURS = {
    "model": "model.model",
    "tokenizer": "model.model",
    "served_model_name": "model.name",
    "dtype": "model.dtype",
    "trust_remote_code": "model.allow_remote_code",
    "max_num_seqs": "limits.max_running",
    "tensor_parallel_size": "vllm.tensor_parallel_size",
    "pipeline_parallel_size": "vllm.pipeline_parallel_size",
    "distributed_executor_backend": "vllm.distributed_executor",
    "quantization": "vllm.quantization",
    "max_model_len": "vllm.max_model_len",
    "gpu_memory_utilization": "vllm.gpu_memory_utilization",
    "kv_cache_memory_bytes": "vllm.kv_cache_bytes",
    "block_size": "vllm.block_size",
    "num_gpu_blocks_override": "vllm.num_blocks",
    "max_num_batched_tokens": "vllm.max_num_batched_tokens",
    "enable_prefix_caching": "vllm.enable_prefix_caching",
    "enforce_eager": "vllm.enforce_eager",
    "speculative_config": "vllm.speculative",
}
_NOT_SERVED = (
    "worker_cls",
    "worker_extension_cls",
    "additional_config",
    "skip_tokenizer_init",
    "runner",
    "convert",
    "data_parallel_size",
    "logprobs_mode",
    "max_logprobs",
    "disable_log_stats",
    "scheduler_cls",
    "enable_lora",
)

# What the key-value cache of a CPU takes at least: vLLM refuses less than one sequence.
_LEAST_KV_BYTES = 64 << 20


def worker_settings(settings: EngineSettings) -> WorkerSettings:
    """The sizes of the workers' tables."""
    return WorkerSettings(max_edits=settings.vllm.max_edits, max_vectors=settings.vllm.max_vectors)


def engine_arguments(settings: EngineSettings, outlined: LoadedModel, known: set[str]) -> dict[str, Any]:
    """Keyword arguments for `AsyncEngineArgs`; `known` are the names it takes.

    Raises:
        InvalidArgument: an argument that there is not, or that is not the operator's to give.
    """
    vllm = settings.vllm
    _check(vllm, known)
    arguments: dict[str, Any] = {
        "model": outlined.source,
        # Text is made here, from token ids.
        "skip_tokenizer_init": True,
        "dtype": str(outlined.dtype).removeprefix("torch."),
        "trust_remote_code": settings.allow_remote_code,
        "max_num_seqs": settings.limits.max_running,
        "max_model_len": max_model_len(settings, outlined),
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "pipeline_parallel_size": vllm.pipeline_parallel_size,
        "gpu_memory_utilization": vllm.gpu_memory_utilization,
        "enable_prefix_caching": vllm.enable_prefix_caching,
        "enforce_eager": vllm.enforce_eager,
        "max_logprobs": -1,
        "disable_log_stats": True,
        "generation_config": "vllm",
    }
    optional = {
        "distributed_executor_backend": vllm.distributed_executor or _executor(vllm, outlined),
        "quantization": vllm.quantization,
        "kv_cache_memory_bytes": vllm.kv_cache_bytes or _kv_bytes(settings, outlined),
        "block_size": vllm.block_size,
        "num_gpu_blocks_override": vllm.num_blocks,
        "max_num_batched_tokens": vllm.max_num_batched_tokens,
        "speculative_config": dict(vllm.speculative),
    }
    arguments |= {name: value for name, value in optional.items() if value}
    return arguments | dict(vllm.arguments) | worker_arguments(worker_settings(settings))


def _executor(vllm: VllmSettings, outlined: LoadedModel) -> Any:
    """What runs the workers, where vLLM is not to choose: on a CPU a single worker runs in the engine's own process.

    vLLM puts it in one of its own there, so as to set its threads, and the two hand every step over through memory that
    both poll: two processors are busy where one computes. Threads that are set for both (`environment.prepare`) need no
    process to set them in.
    """
    alone = vllm.tensor_parallel_size * vllm.pipeline_parallel_size == 1
    if outlined.device.type != "cpu" or not alone or not environment.threads_are_set():
        return None
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    return UniProcExecutor


def max_model_len(settings: EngineSettings, outlined: LoadedModel) -> int:
    """vLLM's bound on a sequence, its last token included. That one is never fed: where nothing looks ahead the bound is
    one beyond the context, so that an input may fill it.
    """
    length = settings.vllm.max_model_len or outlined.context_length
    return length if settings.vllm.speculative else length + 1


def context_length(settings: EngineSettings, outlined: LoadedModel) -> int:
    """Positions that a request may feed."""
    return max_model_len(settings, outlined) - 1


def _kv_bytes(settings: EngineSettings, outlined: LoadedModel) -> int:
    """On a CPU: what as many sequences as may run need, up to the limit. vLLM would take nearly all memory."""
    if outlined.device.type != "cpu":
        return 0
    position_bytes = 2 * outlined.n_layers * outlined.n_kv_heads * outlined.d_head * outlined.dtype.itemsize
    most = settings.limits.max_running * max_model_len(settings, outlined) * position_bytes
    # Blocks are filled to the last position of a sequence only.
    return min(settings.limits.max_cache_bytes, max(most + most // 4, _LEAST_KV_BYTES))


def _check(vllm: VllmSettings, known: set[str]) -> None:
    for name in vllm.arguments:
        if name in _OURS:
            raise _refused(name, f"set {_OURS[name]} instead")
        if name in _NOT_SERVED:
            raise _refused(name, "leave it out: the engine sets it")
        if name not in known:
            closest = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
            raise _refused(
                name, f"did you mean {' or '.join(closest)}?" if closest else "see vLLM's engine arguments"
            )


def _refused(name: str, remedy: str) -> InvalidArgument:
    return InvalidArgument(
        f"vllm.arguments.{name} cannot be given",
        reason=reasons.VALUE_OUT_OF_RANGE,
        field=f"vllm.arguments.{name}",
        value=name,
        remedy=remedy,
    )


def argument_names(engine_args: Any) -> set[str]:
    """The names that a class of engine arguments takes."""
    return {field.name for field in dataclasses.fields(engine_args)}
