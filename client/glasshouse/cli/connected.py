"""Commands that speak to a model: the options they share are written once, and the model arrives as a handle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from glasshouse.client import Client, Model

_SHARED = {
    "model": (ModelName, None),
    "target": (Target, DEFAULT_TARGET),
    "api_key": (ApiKey, None),
    "tls": (Tls, False),
    "tls_ca": (TlsCa, None),
    "timeout": (Timeout, DEFAULT_TIMEOUT_S),
    "json": (Json, False),
}


class Chosen:
    """The client and the model that the options name; called, it asks the server for the model's handle."""

    def __init__(self, client: Client, name: str | None) -> None:
        self.client = client
        self._name = name

    def __call__(self) -> Model:
        return self.client.model(self._name)


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """`command(handle, json, ...)` as a command with its own options and those of every command.

    It is called with the handle of the model that the options name, and `json`, before its own parameters.
    """
    return _shared(command, lambda chosen: chosen())


def connecting(command: Callable[..., None]) -> Callable[..., None]:
    """The same for a command that takes `Chosen` first, and asks for the handle once its own options are checked."""
    return _shared(command, lambda chosen: chosen)


def _shared(command: Callable[..., None], given: Callable[[Chosen], Any]) -> Callable[..., None]:
    parameters = resolved(list(inspect.signature(command).parameters.values())[2:], command)
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in _SHARED.items()
    ]

    def run(**values: Any) -> None:
        shared = {name: values.pop(name) for name in _SHARED}
        way = (shared[name] for name in ("target", "api_key", "tls", "tls_ca", "timeout"))
        with connect(*way) as client:
            command(given(Chosen(client, shared["model"])), shared["json"], **values)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {}
    return run


def resolved(own: Sequence[inspect.Parameter], command: Callable[..., None]) -> list[inspect.Parameter]:
    """The parameters with their annotations as objects, each given by its name."""
    space = getattr(command, "__globals__", {})
    return [
        each.replace(
            annotation=eval(each.annotation, space) if isinstance(each.annotation, str) else each.annotation,
            kind=inspect.Parameter.KEYWORD_ONLY,
        )
        for each in own
    ]
