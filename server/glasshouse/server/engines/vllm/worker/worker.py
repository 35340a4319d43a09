"""The class vLLM is told to make its workers of (`worker_cls`): its own worker, with hooks.

Hooks are attached before anything is traced, so the compiled graph has them; the runner's class is swapped as soon as
it exists. A model without an adapter is served unhooked, and says so in its `BootReport`.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch
import vllm
from torch import Tensor
from vllm.distributed import get_pp_group, get_tp_group
from vllm.platforms import current_platform

from glasshouse.server.dictionaries.open import open_dictionaries
from glasshouse.server.engines.vllm.contract.settings import (
    EXTRA_ARG,
    HOOKED,
    PLUGIN_VERSION,
    SERVER_PROCESS,
    BootReport,
    WorkerSettings,
    dictionary_key,
)
from glasshouse.server.probes import storage

from . import families, lifetime, runners, self_test
from .answering import AnsweringContext, Lens
from .families import FamilyAdapter
from .hooks import Hooks
from .reporter import Reporter

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Base
else:
    from vllm.v1.worker.gpu_worker import Worker as _Base


class GlasshouseWorker(_Base):
    """A vLLM worker whose model can be read and edited, request by request."""

    def init_device(self) -> None:
        """Checks this vLLM, and adapts the runner. From here on this process ends with the server's."""
        if server := os.environ.get(SERVER_PROCESS):
            lifetime.end_with(int(server))
        runners.check_version(vllm.__version__)
        told = (self.vllm_config.additional_config or {}).get(EXTRA_ARG)
        if not told or told.get("plugin_version") != PLUGIN_VERSION or tuple(told.get("sites", ())) != HOOKED:
            # They are what keeps compiled artefacts of other versions apart.
            raise RuntimeError("vLLM was not started with glasshouse's `engine_arguments`")
        self._glasshouse_settings = WorkerSettings(**told["settings"])
        self._glasshouse_hooks: Hooks | None = None
        self._glasshouse_reporter: Reporter | None = None
        self._glasshouse_refusal = ""
        self._glasshouse_adapter: FamilyAdapter | None = None
        super().init_device()
        runners.adapt(self.model_runner, v2=self.use_v2_model_runner)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model and attaches the hooks."""
        super().load_model(*args, **kwargs)
        model, config = self.model_runner.get_model(), self.model_config.hf_config
        adapter = families.adapter_for(model, config)
        refusal = adapter if isinstance(adapter, str) else runners.refusal(self.model_runner)
        if isinstance(adapter, str) or refusal:
            self._glasshouse_refusal = refusal
            return
        self._glasshouse_adapter = adapter
        found = families.attach(model, adapter, config)
        self._glasshouse_reporter = Reporter(self.rank, self._glasshouse_settings)
        self._glasshouse_hooks = self.model_runner.glasshouse = Hooks(
            found,
            width=self.model_config.get_hidden_size(),
            device=self.device,
            settings=self._glasshouse_settings,
            reporter=self._glasshouse_reporter,
            reports_rows=get_tp_group().rank_in_group == 0,
            context=AnsweringContext(lens=self._lens(model, adapter)),
        )

    def compile_or_warm_up_model(self) -> Any:
        """Compiles, then runs the self-test: hooks that do not fire end the start, not an answer."""
        times = super().compile_or_warm_up_model()
        if self._glasshouse_hooks is not None:
            self._glasshouse_hooks.forget_step()
            with torch.inference_mode():
                self_test.run(self._glasshouse_hooks, self.model_runner.glasshouse_dummy_pass)
        return times

    def execute_dummy_batch(self) -> None:
        """A pass that serves nobody (data parallelism): junctions must be idle."""
        if self._glasshouse_hooks is not None:
            self._glasshouse_hooks.forget_step()
        super().execute_dummy_batch()

    def shutdown(self) -> None:
        """Closes the side channel."""
        reporter: Reporter | None = getattr(self, "_glasshouse_reporter", None)
        if reporter is not None:
            reporter.close()
        super().shutdown()
        lifetime.leave_at_once()

    def _lens(self, model: Any, adapter: FamilyAdapter) -> Lens | None:
        if not get_pp_group().is_last_rank:
            return None
        norm = model.get_submodule(adapter.final_norm)

        def lens(s_NW: Tensor) -> Tensor:
            logits = model.compute_logits(norm(s_NW))
            # Gathered to one rank only: the others take part and have nothing to say.
            return s_NW.new_zeros((s_NW.shape[0], 1)) if logits is None else logits

        return lens

    # -- called by the gateway through collective_rpc; see `contract.settings` --------------------------------------

    def glasshouse_boot(self) -> dict[str, Any]:
        """What this worker is."""
        hooks, adapter = self._glasshouse_hooks, self._glasshouse_adapter
        return BootReport(
            rank=self.rank,
            pipeline_rank=get_pp_group().rank_in_group,
            reports=get_tp_group().rank_in_group == 0,
            hooks=hooks is not None,
            refusal=self._glasshouse_refusal,
            sites=() if hooks is None else hooks.sites.names,
            lens=hooks is not None and get_pp_group().is_last_rank,
            family="" if adapter is None else adapter.name,
            d_model=self.model_config.get_hidden_size(),
            dtype=str(self.model_config.dtype).removeprefix("torch."),
            runner="v2" if self.use_v2_model_runner else "v1",
            vllm_version=vllm.__version__,
            compiled=not self.model_config.enforce_eager,
            settings=self._glasshouse_settings,
        ).to_plain()

    def glasshouse_connect(self, endpoint: str) -> dict[str, Any]:
        """Reports to `endpoint` from now on."""
        if self._glasshouse_reporter is not None:
            self._glasshouse_reporter.connect(endpoint)
        return self.glasshouse_boot()

    def glasshouse_load_dictionary(self, name: str, path: str, generation: int) -> list[list[str]]:
        """Opens what lies at `path`; the keys under which plans name what was found."""
        hooks = self._needed()
        loaded = []
        for dictionary in open_dictionaries(name, path):
            key = dictionary_key(dictionary.facts.name, generation)
            on_device = dictionary if self.device.type == "cpu" else dictionary.to(self.device)
            hooks.dictionaries[key] = on_device
            loaded.append([dictionary.facts.name, key])
        return loaded

    def glasshouse_unload_dictionary(self, keys: list[str]) -> None:
        """Forgets dictionaries; requests that hold one keep it."""
        for key in keys:
            self._needed().dictionaries.pop(key, None)

    def glasshouse_load_probe(self, key: str, body: str, tensors: dict[str, list[Any]]) -> None:
        """Takes in a probe, on the model's device in float32."""
        arrays = {
            name: np.frombuffer(data, dtype="<f8").reshape(shape) for name, (shape, data) in tensors.items()
        }
        probe = storage.from_parts(json.loads(body), arrays, path=key)
        self._needed().probes[key] = probe.to(self.device)

    def glasshouse_unload_probes(self, keys: list[str]) -> None:
        """Forgets probes; requests that use one keep it."""
        for key in keys:
            self._needed().probes.pop(key, None)

    def glasshouse_load_vectors(self, vectors: dict[str, bytes]) -> None:
        """Makes named directions resident."""
        for name, data in vectors.items():
            self._needed().vectors.load(name, data)

    def glasshouse_unload_vectors(self, keys: list[str]) -> None:
        """Forgets named directions; requests that use one keep it."""
        for key in keys:
            self._needed().vectors.unload(key)

    def glasshouse_stats(self) -> dict[str, int]:
        """Counters and gauges."""
        return {} if self._glasshouse_hooks is None else self._glasshouse_hooks.statistics()

    def _needed(self) -> Hooks:
        if self._glasshouse_hooks is None:
            raise RuntimeError(self._glasshouse_refusal or "the model is not loaded")
        return self._glasshouse_hooks
