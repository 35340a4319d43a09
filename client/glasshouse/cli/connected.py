"""Commands that speak to a model: the options they share are written once, and the model arrives as a handle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
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

Options = Mapping[str, tuple[Any, Any]]
"""Options that commands share: of each its annotation and its default."""

_SHARED: Options = {
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
    _, _, *own = parameters_of(command)

    def run(**values: Any) -> None:
        shared = {name: values.pop(name) for name in _SHARED}
        way = (shared[name] for name in ("target", "api_key", "tls", "tls_ca", "timeout"))
        with connect(*way) as client:
            command(given(Chosen(client, shared["model"])), shared["json"], **values)

    return presented(run, command, [*own, *as_parameters(_SHARED)])


def parameters_of(command: Callable[..., None]) -> list[inspect.Parameter]:
    """A command's parameters, each given by its name, with their annotations as objects. The handle's class is not loaded
    for that: nothing of the client is, before a command runs.
    """
    signature = inspect.signature(command, eval_str=True, locals={"Model": object})
    return [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in signature.parameters.values()]


def as_parameters(options: Options) -> list[inspect.Parameter]:
    """Shared options as parameters."""
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in options.items()
    ]


def presented(
    run: Callable[..., None], command: Callable[..., None], parameters: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """`run` under the name and with the help of `command`, and with these parameters."""
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {}
    return run
