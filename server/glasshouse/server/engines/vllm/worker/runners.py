"""Adapters to vLLM's two model runners: all that this engine knows of vLLM's insides, and the check that it is still so.

A runner's class is swapped for a subclass made of a mixin here and the runner's own class. The mixins see the scheduler's
output before the step and the batch's rows once they are laid out; they change neither.

CUDA graphs: a junction's Python body does not run when a graph is replayed. Graphs are captured while every junction
is idle, so batches without hooks replay them untouched; a batch with a hooked request is dispatched without a graph,
still compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from glasshouse.server.engines.vllm.contract.settings import EXTRA_ARG

from .cleansing import cleanse_v1
from .hooks import Hooks, StepBatch

# Minor versions whose runners were read and, on a CPU, run.
VERIFIED_VERSIONS = ("0.32", "0.33")

# Method -> parameters that are relied upon, by runner.
_V1_CONTRACT = {
    "execute_model": ("scheduler_output", "intermediate_tensors"),
    "_prepare_inputs": ("scheduler_output", "num_scheduled_tokens"),
    "_determine_batch_execution_and_padding": ("num_tokens", "force_eager"),
    "_dummy_run": ("num_tokens", "cudagraph_runtime_mode"),
    "get_model": (),
}
_V2_CONTRACT = {
    "execute_model": ("scheduler_output", "intermediate_tensors", "dummy_run"),
    "prepare_inputs": ("scheduler_output", "batch_req_state", "batch_desc"),
    "_dummy_run": ("num_tokens", "skip_attn", "is_profile"),
    "get_model": (),
}


class UnsupportedVLLM(RuntimeError):
    """This vLLM is not one the adapters were written for."""


def check_version(version: str) -> None:
    """Raises `UnsupportedVLLM` for a version nobody has verified."""
    if ".".join(version.split(".")[:2]) not in VERIFIED_VERSIONS:
        raise UnsupportedVLLM(
            f"vLLM {version} is not supported: Glasshouse hooks into the model runner, and only "
            f"{', '.join(f'{v}.x' for v in VERIFIED_VERSIONS)} were verified. Install one of those."
        )


def check_signatures(runner: Any, *, v2: bool) -> None:
    """Raises `UnsupportedVLLM` where a method or parameter that the adapter uses is missing."""
    for name, parameters in (_V2_CONTRACT if v2 else _V1_CONTRACT).items():
        method = getattr(runner, name, None)
        if not callable(method):
            raise UnsupportedVLLM(f"{type(runner).__name__} has no method {name}: this vLLM is not supported")
        known = inspect.signature(method).parameters
        missing = [parameter for parameter in parameters if parameter not in known]
        if missing:
            raise UnsupportedVLLM(
                f"{type(runner).__name__}.{name} has no parameter {missing[0]}: this vLLM is not supported"
            )


def adapt(runner: Any, *, v2: bool) -> None:
    """Swaps the runner's class. Its hooks are set later, once the model is loaded."""
    check_signatures(runner, v2=v2)
    mixin = HookedV2 if v2 else HookedV1
    runner.__class__ = type(f"Hooked{type(runner).__name__}", (mixin, type(runner)), {})


def refusal(runner: Any) -> str:
    """Why hooks cannot work on this runner as it is configured, or ""."""
    if getattr(runner, "use_async_spec_decode", False):
        return (
            "speculation with asynchronous scheduling knows a step's positions only on the device: "
            "set async_scheduling = false"
        )
    if getattr(runner, "adaptive_verification", None) is not None:
        return "adaptive verification of drafts reallocates rows on the device: turn it off"
    if getattr(runner, "pcp_manager", None) is not None:
        return "prefill context parallelism splits a sequence over workers: turn it off"
    return ""


def _begun(scheduler_output: Any) -> Iterator[tuple[str, bytes | None]]:
    for new in scheduler_output.scheduled_new_reqs:
        parameters = new.sampling_params
        extra = None if parameters is None else parameters.extra_args
        yield new.req_id, None if extra is None else extra.get(EXTRA_ARG)


class _Hooked:
    """What both mixins share. `glasshouse`: None until the model is loaded, or where it cannot be hooked."""

    glasshouse: Hooks | None = None
    # Whether the step that runs has a hooked request.
    _glasshouse_step = False

    def _glasshouse_begin(self, hooks: Hooks, scheduler_output: Any) -> None:
        new: Iterable[tuple[str, bytes | None]] = ()
        if scheduler_output.scheduled_new_reqs:
            new = _begun(scheduler_output)
        hooks.update(new, scheduler_output.finished_req_ids)
        self._glasshouse_step = hooks.works_for(scheduler_output.num_scheduled_tokens)


class HookedV1(_Hooked):
    """Over `vllm.v1.worker.gpu_model_runner.GPUModelRunner` and its CPU subclass."""

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """Runs a step, with hooks."""
        hooks = self.glasshouse
        if hooks is None:
            return super().execute_model(scheduler_output, intermediate_tensors)  # type: ignore[misc]
        self._glasshouse_begin(hooks, scheduler_output)
        try:
            output = super().execute_model(scheduler_output, intermediate_tensors)  # type: ignore[misc]
            if self._glasshouse_step and hooks.edits:
                cleanse_v1(self, scheduler_output, hooks.is_edited)
            return output
        finally:
            hooks.finish()

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        hooks = self.glasshouse
        if hooks is not None and not hooks.idle:
            batch: Any = self.input_batch  # type: ignore[attr-defined]
            n_tokens = scheduler_output.total_num_scheduled_tokens
            hooks.prepare(
                StepBatch(
                    req_ids=batch.req_ids,
                    starts=batch.num_computed_tokens_cpu[: batch.num_reqs],
                    counts=num_scheduled_tokens,
                    n_tokens=n_tokens,
                    token_ids=lambda: self.input_ids.gpu[:n_tokens].cpu().numpy(),  # type: ignore[attr-defined]
                )
            )
        return prepared

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        if self._glasshouse_step:
            kwargs["force_eager"] = True
        return super()._determine_batch_execution_and_padding(*args, **kwargs)  # type: ignore[misc]

    def glasshouse_dummy_pass(self, n_tokens: int) -> None:
        """A forward pass over `n_tokens` made-up tokens, without graphs."""
        from vllm.config import CUDAGraphMode

        self._dummy_run(n_tokens, cudagraph_runtime_mode=CUDAGraphMode.NONE)  # type: ignore[attr-defined]


class HookedV2(_Hooked):
    """Over `vllm.v1.worker.gpu.model_runner.GPUModelRunner` and its CPU subclass."""

    def execute_model(
        self, scheduler_output: Any, intermediate_tensors: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a step, with hooks; a dummy step (warm-up, capture, data parallelism) without."""
        hooks = self.glasshouse
        if hooks is None:
            return super().execute_model(scheduler_output, intermediate_tensors, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("dummy_run") or (args and args[0]):
            if not getattr(self, "_glasshouse_testing", False):
                hooks.forget_step()
            return super().execute_model(scheduler_output, intermediate_tensors, *args, **kwargs)  # type: ignore[misc]
        self._glasshouse_begin(hooks, scheduler_output)
        self._glasshouse_wrap_dispatch()
        try:
            return super().execute_model(scheduler_output, intermediate_tensors, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._glasshouse_step = False
            hooks.finish()

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Lays out the batch, and tells the hooks."""
        batch = super().prepare_inputs(*args, **kwargs)  # type: ignore[misc]
        hooks = self.glasshouse
        if hooks is not None and not hooks.idle:
            hooks.prepare(
                StepBatch(
                    req_ids=batch.req_ids,
                    starts=self._glasshouse_starts(batch),
                    counts=np.asarray(batch.num_scheduled_tokens),
                    n_tokens=batch.num_tokens,
                    token_ids=lambda: batch.input_ids[: batch.num_tokens].cpu().numpy(),
                )
            )
        return batch

    def _glasshouse_starts(self, batch: Any) -> Any:
        if getattr(self, "speculative_config", None) is None:
            return np.asarray(batch.num_computed_tokens_np).astype(np.int64)
        # The host's counts are upper bounds while drafts are verified: ask the device, at the price of a wait.
        first_rows = batch.query_start_loc[: batch.num_reqs].long()
        return batch.positions[first_rows].cpu().numpy().astype(np.int64)

    def _glasshouse_wrap_dispatch(self) -> None:
        manager: Any = getattr(self, "cudagraph_manager", None)
        if manager is None or getattr(manager, "glasshouse_wrapped", False):
            return
        inner = manager.dispatch

        def dispatch(num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
            found = inner(num_reqs, num_tokens, *args, **kwargs)
            if not self._glasshouse_step:
                return found
            from vllm.config import CUDAGraphMode
            from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

            return BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.NONE,
                num_tokens=num_tokens,
                num_reqs=num_reqs,
                num_active_loras=kwargs.get("num_active_loras", 0),
            )

        manager.dispatch = dispatch
        manager.glasshouse_wrapped = True

    def glasshouse_dummy_pass(self, n_tokens: int) -> None:
        """A forward pass over `n_tokens` made-up tokens, without graphs."""
        self._glasshouse_testing = True
        try:
            self._dummy_run(n_tokens, skip_attn=True, is_profile=True)  # type: ignore[attr-defined]
        finally:
            self._glasshouse_testing = False
