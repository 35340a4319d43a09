"""What the tour looks like: in colour and live on a terminal, plain lines of one width in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 100
MAX_WIDTH = 120
INDENT = 3


class Screen:
    """Prints stages, sentences and tables."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        width = min(self.console.width, MAX_WIDTH) if self.console.is_terminal else PIPED_WIDTH
        self.console.width = width
        self._stage = 0
        self._after_gap = False

    @property
    def live(self) -> bool:
        """Whether lines can be redrawn."""
        return self.console.is_terminal

    def stage(self, title: str) -> None:
        """A heading, numbered."""
        self._stage += 1
        if not self._after_gap:
            self.console.print()
        self.console.print(Text(f"{self._stage}. {title}", style="bold cyan"))

    def say(self, text: str, style: str = "") -> None:
        """A sentence, or several."""
        self.put(Padding(Text(text, style=style), (0, INDENT, 0, INDENT)))

    def code(self, *lines: str) -> None:
        """The client's call that a stage is about."""
        for line in lines:
            self.console.print(Text(" " * INDENT + line, style="green"), soft_wrap=True)

    def note(self, text: str) -> None:
        """What was measured or checked."""
        self.say(text, style="dim" if self.live else "")

    def table(
        self,
        headings: Sequence[str],
        rows: Iterable[Sequence[str | Text]],
        *,
        right: Sequence[int] = (),
        lines: bool = False,
        shares: Sequence[int] = (),
    ) -> None:
        """A table. `right`: columns aligned so. `lines`: a rule between rows. `shares`: widths in proportion."""
        self.put(self.made_table(headings, rows, right=right, lines=lines, shares=shares))
        self.gap()

    def gap(self) -> None:
        """An empty line."""
        self.console.print()
        self._after_gap = True

    def put(self, renderable: RenderableType) -> None:
        """Prints, without the spaces that fill lines up."""
        self._after_gap = False
        with self.console.capture() as captured:
            self.console.print(renderable)
        for line in captured.get().rstrip().splitlines():
            self.console.file.write(line.rstrip() + "\n")
        self.console.file.flush()

    def made_table(
        self,
        headings: Sequence[str],
        rows: Iterable[Sequence[str | Text]],
        *,
        right: Sequence[int] = (),
        lines: bool = False,
        shares: Sequence[int] = (),
    ) -> Padding:
        """A table, not yet printed."""
        table = Table(box=box.SIMPLE, show_lines=lines, pad_edge=False, expand=bool(shares))
        for index, heading in enumerate(headings):
            table.add_column(
                heading,
                justify="right" if index in right else "left",
                ratio=shares[index] if shares else None,
                header_style="bold",
            )
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
        return Padding(table, (0, INDENT, 0, INDENT - 1))

    def stream(self, pieces: Iterable[str], style: str = "") -> None:
        """Text as it comes, broken between words at the screen's width."""
        room = self.console.width - 2 * INDENT
        column = 0
        word = ""

        def put(word: str) -> None:
            nonlocal column
            if column and column + len(word.rstrip("\n")) > room:
                self.console.print()
                column, word = 0, word.lstrip()
            if not column:
                self.console.print(" " * INDENT, end="")
            self.console.print(Text(word, style=style), end="", soft_wrap=True)
            column += len(word)

        for piece in pieces:
            for character in piece:
                if character == "\n":
                    put(word)
                    self.console.print()
                    word, column = "", 0
                elif character == " " and word:
                    put(word)
                    word = character
                else:
                    word += character
        put(word)
        self.console.print()
