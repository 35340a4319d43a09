"""Values with a syntax of their own: HOOK=FILE*COEF, HOOK:K, DICT:INDEX=VALUE, positions. Each refusal is bad usage
(status 2)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from glasshouse.client import Intervention, Positions, Readout


def steering(text: str, positions: Positions | None) -> Intervention:
    """`HOOK=FILE.npy*COEF`: adds the file's vector times COEF (default 1)."""
    from glasshouse.client import add_vector

    hook_point, _, rest = text.partition("=")
    path, star, number = rest.rpartition("*")
    if not star:
        path, number = rest, "1"
    try:
        coefficient = float(number)
    except ValueError:
        raise typer.BadParameter(f"{number!r} is not a number in {text!r}", param_hint="--steer") from None
    vector = _vector(hook_point, path, text, "--steer", "HOOK=FILE*COEF")
    return add_vector(hook_point, vector, coefficient, positions=positions)


def ablation(text: str, positions: Positions | None) -> Intervention:
    """`HOOK=FILE.npy`: removes what is along the file's vector."""
    from glasshouse.client import ablate_direction

    hook_point, _, path = text.partition("=")
    vector = _vector(hook_point, path, text, "--ablate", "HOOK=FILE")
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
