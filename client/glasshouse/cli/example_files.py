"""Labelled examples and pairs from files: CSV with a header, or JSON lines. Each refusal is bad usage (status 2).

- `text` (JSON lines also `token_ids` or `messages`) and `label`, or `labels` (a list; in CSV separated by `|`);
- or `positive` and `negative`: pairs;
- `split`: "test" or "held_out" holds the example out, anything else does not.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from glasshouse.client import Example, Pair

_HELD_OUT = frozenset({"test", "held_out", "heldout", "validation"})
_INPUTS = ("text", "token_ids", "messages")


def read_examples(path: Path, option: str = "FILE") -> tuple[list[Example], list[Pair]]:
    """The examples or the pairs of a file; one of the lists is empty."""
    from glasshouse.client import Example, Pair

    examples: list[Example] = []
    pairs: list[Pair] = []
    for where, row in _rows(path, option):
        held_out = str(row.get("split", "")).strip().lower() in _HELD_OUT
        if "positive" in row and "negative" in row:
            pairs.append(Pair(row["positive"], row["negative"], held_out=held_out))
            continue
        chosen = [name for name in _INPUTS if row.get(name) not in (None, "")]
        if len(chosen) != 1 or ("label" not in row and "labels" not in row):
            raise typer.BadParameter(
                f"{where} has {', '.join(map(repr, row)) or 'nothing'}: it needs text and label, or positive and "
                "negative",
                param_hint=option,
            )
        label: Any = row["labels"] if "labels" in row else row["label"]
        if "labels" in row and isinstance(label, str):
            label = [part for part in label.split("|") if part]
        examples.append(Example(row[chosen[0]], label, held_out=held_out))
    if examples and pairs:
        raise typer.BadParameter(f"{path} mixes labelled examples and pairs", param_hint=option)
    if not examples and not pairs:
        raise typer.BadParameter(f"{path} holds no example", param_hint=option)
    return examples, pairs


def _rows(path: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with the words that say where it stands."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}", param_hint=option) from None
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is not UTF-8 at byte {error.start}", param_hint=option) from None
    if path.suffix.lower() in (".csv", ".tsv"):
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        for number, row in enumerate(csv.DictReader(text.splitlines(True), delimiter=delimiter), 1):
            if None in row or None in row.values():
                raise typer.BadParameter(
                    f"{path}, row {number} has another number of columns than the header", param_hint=option
                )
            yield f"{path}, row {number}", dict(row)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise typer.BadParameter(
                f"{path}, line {number} is not JSON ({error.msg}); examples are CSV or JSON lines",
                param_hint=option,
            ) from None
        if not isinstance(row, dict):
            raise typer.BadParameter(f"{path}, line {number} is no JSON object", param_hint=option)
        yield f"{path}, line {number}", row
