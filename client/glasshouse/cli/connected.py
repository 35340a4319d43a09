"""Commands that speak to a model: the options they share are written once, and the model arrives as a handle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from glasshouse.cli.options import (
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    ApiKey,
    Json,
    ModelName,
    Target,
    Timeout,
    Tls,
    TlsCa,
    connect,
)

_SHARED = {
    "model": (ModelName, None),
    "target": (Target, DEFAULT_TARGET),
    "api_key": (ApiKey, None),
    "tls": (Tls, False),
    "tls_ca": (TlsCa, None),
    "timeout": (Timeout, DEFAULT_TIMEOUT_S),
    "json": (Json, False),
}


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """`command(handle, json, ...)` as a command with its own options and those of every command.

    It is called with the handle of the model that the options name, and `json`, before its own parameters.
    """
    own = list(inspect.signature(command).parameters.values())[2:]
    space = command.__globals__
    parameters = [
        each.replace(annotation=eval(each.annotation, space), kind=inspect.Parameter.KEYWORD_ONLY)
        if isinstance(each.annotation, str)
        else each
        for each in own
    ]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in _SHARED.items()
    ]

    def run(**values: Any) -> None:
        shared = {name: values.pop(name) for name in _SHARED}
        way = (shared[name] for name in ("target", "api_key", "tls", "tls_ca", "timeout"))
        with connect(*way) as client:
            command(client.model(shared["model"]), shared["json"], **values)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {}
    return run
