"""Engines by name, imported only when asked for."""

from __future__ import annotations

from glasshouse.server.types.configuration import EngineSettings
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

from .engine import Engine

ENGINES = ("transformers", "vllm")


def create_engine(name: str, settings: EngineSettings) -> Engine:
    """Loads the model and makes its engine, not yet started. Blocks while the weights load.

    Raises:
        InvalidArgument: no such engine.
        FailedPrecondition: the model cannot be served by this engine. Dictionaries are loaded by `start`.
    """
    if name not in ENGINES:
        raise InvalidArgument(
            f"there is no engine {name!r}",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="engine",
            value=name,
            remedy=f"use one of {', '.join(ENGINES)}",
        )
    if name == "vllm":
        from .vllm.engine import create

        return create(settings)
    from glasshouse.server.models.loading import load_model

    from .transformers.engine import TransformersEngine

    loaded = load_model(
        settings.model,
        name=settings.name,
        dtype=settings.dtype,
        device=settings.device,
        allow_remote_code=settings.allow_remote_code,
    )
    return TransformersEngine(
        loaded, limits=settings.limits, threads=settings.threads, preload=settings.dictionaries
    )
