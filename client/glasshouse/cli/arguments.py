"""Values with a syntax of their own: HOOK=FILE*COEF, HOOK:K, DICT:INDEX=VALUE, PROBE>T, positions. Each refusal is bad
usage (status 2)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from glasshouse.client import Condition, Intervention, Positions, Readout


# What would be a vector's file where a direction's name may stand.
_FILES = (".npy", ".npz", ".safetensors")


def steering(text: str, positions: Positions | None) -> Intervention:
    """`HOOK=FILE.npy*COEF`: adds the file's vector times COEF (default 1); `DIRECTION*COEF` a named direction."""
    from glasshouse.client import add_vector

    hook_point, equals, rest = text.partition("=")
    if not equals:
        hook_point, rest = "", text
    path, star, number = rest.rpartition("*")
    if not star:
        path, number = rest, "1"
    try:
        coefficient = float(number)
    except ValueError:
        raise typer.BadParameter(f"{number!r} is not a number in {text!r}", param_hint="--steer") from None
    if not equals and path and not path.endswith(_FILES):
        return add_vector(path, coefficient=coefficient, positions=positions)
    vector = _vector(hook_point, path, text, "--steer", "HOOK=FILE*COEF or DIRECTION*COEF")
    return add_vector(hook_point, vector, coefficient, positions=positions)


def ablation(text: str, positions: Positions | None) -> Intervention:
    """`HOOK=FILE.npy`: removes what is along the file's vector; `DIRECTION` a named direction."""
    from glasshouse.client import ablate_direction

    hook_point, equals, path = text.partition("=")
    if text and not equals and not text.endswith(_FILES):
        return ablate_direction(text, positions=positions)
    vector = _vector(hook_point, path, text, "--ablate", "HOOK=FILE or DIRECTION")
    return ablate_direction(hook_point, vector, positions=positions)


def lens(text: str) -> Readout:
    """`HOOK` or `HOOK:K`: the K likeliest tokens (default 5) at a residual-stream hook point."""
    from glasshouse.client import read_logit_lens

    hook_point, colon, number = text.rpartition(":")
    if not colon:
        return read_logit_lens(text)
    if not number.isdecimal():
        raise typer.BadParameter(f"{number!r} is not a count in {text!r}", param_hint="--lens")
    return read_logit_lens(hook_point, top_k=int(number))


def feature_setting(text: str, positions: Positions | None) -> Intervention:
    """`DICT:INDEX=VALUE`: sets a feature, or `DICT:1,2,3=VALUE` several."""
    from glasshouse.client import set_feature

    dictionary, features, value = _feature_number(text, "--set-feature", "DICT:INDEX=VALUE")
    return set_feature(dictionary, features, value, positions=positions)


def feature_scaling(text: str, positions: Positions | None) -> Intervention:
    """`DICT:INDEX=FACTOR`: multiplies a feature, or `DICT:1,2,3=FACTOR` several."""
    from glasshouse.client import scale_feature

    dictionary, features, factor = _feature_number(text, "--scale-feature", "DICT:INDEX=FACTOR")
    return scale_feature(dictionary, features, factor, positions=positions)


def feature_reading(text: str) -> Readout:
    """`DICT` or `DICT:K`: the K strongest features (default 8)."""
    from glasshouse.client import read_features

    dictionary, colon, number = text.rpartition(":")
    if not colon:
        return read_features(text)
    if not number.isdecimal():
        raise typer.BadParameter(f"{number!r} is not a count in {text!r}", param_hint="--read-features")
    return read_features(dictionary, top_k=int(number))


def probe_reading(text: str) -> Readout:
    """`PROBE` or `PROBE:margin`: its probability, or its log-odds before calibration."""
    from glasshouse.client import read_probe

    probe, colon, output = text.partition(":")
    if colon and output != "margin":
        raise typer.BadParameter(f"{text!r} is not PROBE or PROBE:margin", param_hint="--probe")
    return read_probe(probe, output="margin" if colon else "score")


_CONDITION = re.compile(
    r"(?P<name>[^<>#:\s]+)(?:#(?P<feature>\d+)|:(?P<label>[^<>]*?))?\s*(?P<side>[<>])\s*(?P<number>[^\s<>]+)"
    r"(?:\s+over\s+(?P<over>position|prompt|latched))?\s*"
)


def condition(text: str, option: str) -> Condition:
    """`PROBE[:LABEL]>T` or `DICT#FEATURE>T`, `<` for below, and at the end where it is asked: ` over prompt`."""
    from glasshouse.client import when

    found = _CONDITION.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError(text)
        threshold = float(found["number"])
    except ValueError:
        form = "PROBE[:LABEL]>T or DICT#FEATURE>T, with < for below, then: over prompt, or over latched"
        raise typer.BadParameter(f"{text!r} is not {form}", param_hint=option) from None
    name, feature = found["name"], found["feature"]
    side: dict[str, Any] = {"above" if found["side"] == ">" else "below": threshold}
    over: Any = found["over"] or "position"
    if feature is not None:
        return when((name, int(feature)), over=over, **side)
    return when(name, label=found["label"] or "", over=over, **side)


def positions_option(text: str | None) -> Positions | None:
    """`all`, `prompt`, `generated`, `last`, `3`, `0,2,5`, `4:10`, `4:` or `:10`."""
    if text is None:
        return None
    from glasshouse.client import positions

    named = {
        "all": positions.all,
        "prompt": positions.prompt,
        "generated": positions.generated,
        "last": positions.last,
    }
    if text in named:
        return named[text]()
    try:
        if ":" in text:
            start, stop = text.split(":")
            return positions.span(int(start or 0), int(stop) if stop else None)
        return positions.at(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not all, prompt, generated, last, a list such as 0,2,5, or a range such as 4:10",
            param_hint="--positions",
        ) from None


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}", param_hint="--file") from None
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is not UTF-8 at byte {error.start}", param_hint="--file") from None


def _feature_number(text: str, option: str, form: str) -> tuple[str, list[int], float]:
    place, _, number = text.partition("=")
    dictionary, _, listed = place.rpartition(":")
    try:
        if not dictionary:
            raise ValueError(form)
        return dictionary, [int(part) for part in listed.split(",")], float(number)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not {form}", param_hint=option) from None


def _vector(hook_point: str, path: str, text: str, option: str, form: str) -> Any:
    from glasshouse.cli.tensor_files import TensorFileError, read_one

    if not hook_point or not path:
        raise typer.BadParameter(f"{text!r} is not {form}", param_hint=option)
    try:
        return read_one(Path(path))
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}", param_hint=option) from None
    except TensorFileError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def labels_option(given: Iterable[str], option: str) -> dict[str, str]:
    """A request's labels, as NAME=VALUE each."""
    pairs = [text.partition("=") for text in given]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise typer.BadParameter(f"{name!r} is not NAME=VALUE", param_hint=option)
    return {name: value for name, _, value in pairs}
