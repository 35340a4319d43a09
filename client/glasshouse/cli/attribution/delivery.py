"""How every command of attribution gives its result: a file, JSON, colour on a terminal, lines in a pipe."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from glasshouse.cli.dictionaries import promotes
from glasshouse.cli.output import write_json, write_table
from glasshouse.cli.pictures import print_parts, write_output

if TYPE_CHECKING:
    from glasshouse.client import Model
    from glasshouse.client.pictures import Part
    from glasshouse.client.pictures.attributions import Names

Top: TypeAlias = Annotated[
    int, typer.Option("--top", metavar="N", min=0, help="Lines in a pipe, the strongest; 0 for all.")
]
N_NAMED = 20
"""Features of each dictionary whose tokens are asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delivery:
    """A result with what is said around it. `facts`: names and values under the title. `rows`: the lines of a pipe.
    `drawn`: its picture, where the result has none of its own."""

    result: Any
    title: str
    about: str
    facts: Mapping[str, str]
    rows: Sequence[Sequence[object]]
    unit: str = ""
    names: Names = dataclasses.field(default_factory=dict)
    drawn: Sequence[Part] | None = None

    def give(self, *, json: bool, output: Path | None) -> None:
        """Writes the file, where there is to be one, then what the terminal or the pipe gets."""
        fields = {"about": self.about, **dataclasses.asdict(self.result)}
        parts = self._parts() if shows_pictures(json, output) else []
        if output is not None:
            write_output(output, self.title, parts, fields, about=self.about, facts=self.facts)
        if json:
            write_json(fields)
        elif sys.stdout.isatty():
            self._print()
            print_parts(parts)
        else:
            write_table([], self.rows)

    def _parts(self) -> Sequence[Part]:
        if self.drawn is not None:
            return self.drawn
        from glasshouse.client.pictures.attributions import picture

        return picture(self.result, unit=self.unit, names=self.names)

    def _print(self) -> None:
        from rich.console import Console
        from rich.text import Text

        facts = "   ".join(f"{name} {value}" for name, value in self.facts.items())
        Console().print(Text(self.about, "italic"), Text(facts, "dim"), "", sep="\n")


def number(value: float | None) -> str:
    """A figure of a fact or a line."""
    return "" if value is None else f"{value:.5g}"


def shows_pictures(json: bool, output: Path | None) -> bool:
    """Whether anything will be drawn, so that names of features are worth asking for."""
    return (output is not None and output.suffix.lower() != ".json") or (sys.stdout.isatty() and not json)


def feature_names(model: Model, wanted: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], str]:
    """What the first features of each dictionary are in a few words: labels, or the tokens they promote."""
    found = {}
    for name, features in wanted.items():
        dictionary = model.dictionary(name)
        for feature in [each for each in features if each >= 0][:N_NAMED]:
            found[name, feature] = promotes(dictionary.feature(feature, n_tokens=5, n_nearest=0))
    return found
