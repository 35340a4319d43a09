"""Workers that break what the engine promises, so that the tests can see it noticed."""

from __future__ import annotations

from typing import Any

from glasshouse.server.engines.vllm.worker.worker import GlasshouseWorker

# Of fable's third layer: its end, where hook_mlp_out, hook_resid_post and the next hook_resid_pre are.
_LAYER = 2


class SilentWorker(GlasshouseWorker):
    """One layer's hook is missing from the graph."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.model_runner.get_model().model.layers[_LAYER]._forward_hooks.clear()


class FallingSilentWorker(GlasshouseWorker):
    """One layer's hook is gone after the self-test."""

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.model_runner.get_model().model.layers[_LAYER]._forward_hooks.clear()
        return times
