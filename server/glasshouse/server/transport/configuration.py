"""The configuration file: TOML, one table a section of `types.configuration`, nothing unknown in it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from glasshouse.server.types.configuration import Settings, VllmSettings

from .logs import FORMATS, LEVELS

Section = TypeVar("Section")

TEXT_POLICIES = ("caller", "never")

# Numbers that may be 0.
_MAY_BE_ZERO = frozenset(
    {
        "threads",
        "drain_timeout_s",
        "gather_ms_per_stream",
        "max_gather_ms",
        "max_queued",
        "max_model_len",
        "kv_cache_bytes",
        "block_size",
        "num_blocks",
        "niceness",
        "max_num_batched_tokens",
    }
)


class ConfigurationError(Exception):
    """A setting that cannot be used; the message names it and says what to do."""


def load(path: Path) -> Settings:
    """The settings of a file; defaults for what it does not say.

    Raises:
        ConfigurationError: no such file, not TOML, an unknown or unusable setting.
    """
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from error
    try:
        return from_tables(tables)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def from_tables(tables: Mapping[str, Any]) -> Settings:
    """Settings from nested tables."""
    kinds = typing.get_type_hints(Settings)
    _check_names(tables, kinds, "section")
    sections: dict[str, Any] = {}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ConfigurationError(f"{name} is a section; write it as [{name}]")
        match name:
            case "dictionaries":
                sections[name] = _names_and_paths(name, table)
            case "secrets":
                sections[name] = _references(name, table)
            case _:
                sections[name] = _section(name, table, kinds[name])
    settings = Settings(**sections)
    check(settings)
    return settings


def vllm_settings(given: Iterable[str], settings: VllmSettings) -> VllmSettings:
    """`settings` with NAME=VALUE texts put over them; VALUE as TOML has it, or a bare word for a string.

    Raises:
        ConfigurationError: a text that is none, an unknown or unusable setting.
    """
    table: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigurationError(f"--vllm {text!r} is not NAME=VALUE")
        try:
            table[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            table[name] = value
    kinds = typing.get_type_hints(VllmSettings)
    _check_names(table, kinds, "setting of [vllm]")
    return dataclasses.replace(
        settings, **{name: _value(f"vllm.{name}", value, kinds[name]) for name, value in table.items()}
    )


def check(settings: Settings) -> None:
    """Refuses settings that contradict each other or have no meaning.

    Raises:
        ConfigurationError: naming the setting.
    """
    _choice("log.format", settings.log.format, FORMATS)
    _choice("log.level", settings.log.level, LEVELS)
    _choice("vllm.distributed_executor", settings.vllm.distributed_executor, ("", "mp", "ray"))
    if settings.vllm.gpu_memory_utilization > 1:
        raise ConfigurationError(
            f"vllm.gpu_memory_utilization is {settings.vllm.gpu_memory_utilization:g}, it must be at most 1"
        )
    _choice("monitors.text", settings.monitors.text, TEXT_POLICIES)
    for name, section in _sections(settings):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                _number(f"{name}.{field.name}", value, zero=field.name in _MAY_BE_ZERO)
    limits = settings.limits
    if limits.default_deadline_s > limits.max_deadline_s:
        raise ConfigurationError(
            f"limits.default_deadline_s, {limits.default_deadline_s:g}, is above limits.max_deadline_s, "
            f"{limits.max_deadline_s:g}; lower the one or raise the other"
        )


def _sections(settings: Settings) -> Iterable[tuple[str, Any]]:
    for field in dataclasses.fields(settings):
        section = getattr(settings, field.name)
        if dataclasses.is_dataclass(section):
            yield field.name, section


def _section(name: str, table: Mapping[str, Any], kind: type[Section]) -> Section:
    kinds = typing.get_type_hints(kind)
    _check_names(table, kinds, f"setting of [{name}]")
    return kind(**{key: _value(f"{name}.{key}", value, kinds[key]) for key, value in table.items()})


def _value(name: str, value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigurationError(f"{name} is {value!r}, it must be a list of strings")
        return tuple(value)
    if typing.get_origin(kind) is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{name} is {value!r}, it must be a table")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string in quotes"}
        raise ConfigurationError(f"{name} is {value!r}, it must be {words[kind]}")
    return value


def _names_and_paths(section: str, table: Mapping[str, Any]) -> dict[str, str]:
    for name, path in table.items():
        if not isinstance(path, str) or not path:
            raise ConfigurationError(f"{section}.{name} is {path!r}, it must be a path in quotes")
    return dict(table)


def _references(section: str, table: Mapping[str, Any]) -> dict[str, str]:
    for name, place in table.items():
        # What stands there may be the secret itself: it is not repeated.
        kind, colon, where = place.partition(":") if isinstance(place, str) else ("", "", "")
        if kind not in ("env", "file") or not (colon and where):
            raise ConfigurationError(
                f'{section}.{name} must say where the secret is found: "env:VARIABLE" or "file:PATH"'
            )
    return dict(table)


def _check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            closest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(closest)}?" if closest else f"there are {', '.join(names)}"
            raise ConfigurationError(f"{name!r} is no {what}; {hint}")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} is {value!r}, it must be one of {', '.join(choices)}")


def _number(name: str, value: float, *, zero: bool) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ConfigurationError(f"{name} is {value:g}, it must be {'0 or more' if zero else 'above 0'}")
