"""`glasshouse activations`: activations of texts into a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.arguments import lines_of, positions_option
from glasshouse.cli.connected import Chosen, connecting
from glasshouse.cli.output import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from glasshouse.client import Progress

INPUTS_PER_CALL = 64


class DType(StrEnum):
    """Element types of the file and the wire."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@connecting
def activations(
    model: Chosen,
    json: bool,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="What the model reads.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="LINES.txt", help="More texts, one a line.")
    ] = None,
    hook_point: Annotated[
        list[str] | None, typer.Option("--hook-point", metavar="NAME", help="What to read; repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="A .npz or .safetensors file.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option("--positions", metavar="WHERE", help="Which positions; default all.")
    ] = None,
    dtype: Annotated[DType, typer.Option("--dtype", help="Element type.")] = DType.float32,
) -> None:
    """Write the activations of texts to a file.

    One text: arrays are named by their hook point, beside `token_ids` and `positions`. Several: `0/NAME`,
    `1/NAME` and so on, by the order of the texts.
    """
    inputs = [*(texts or ()), *(lines_of(file) if file is not None else ())]
    if not inputs:
        raise typer.BadParameter("give at least one text, or --file", param_hint="TEXT")
    if not hook_point:
        raise typer.BadParameter("give at least one", param_hint="--hook-point")
    if output is None:
        raise typer.BadParameter("give the file to write", param_hint="--output")
    where = positions_option(positions)

    import numpy as np

    from glasshouse.cli.tensor_files import ArrayWriter, TensorFileError

    try:
        writer = ArrayWriter(output, dtype.value)
        served = model()
        with writer, _progress_bar(len(inputs)) as advance:
            for start in range(0, len(inputs), INPUTS_PER_CALL):
                batch = inputs[start : start + INPUTS_PER_CALL]
                found = served.iter_activations(
                    batch, hook_points=hook_point, positions=where, dtype=dtype.value, progress=advance
                )
                for index, arrays in found:
                    prefix = f"{start + index}/" if len(inputs) > 1 else ""
                    for name, array in arrays.items():
                        writer.add(prefix + name, array)
                    writer.add(f"{prefix}token_ids", np.array(arrays.token_ids, dtype=np.int32))
                    writer.add(f"{prefix}positions", np.array(arrays.positions, dtype=np.int64))
    except TensorFileError as error:
        raise typer.BadParameter(str(error), param_hint="--output") from None
    except OSError as error:
        raise typer.BadParameter(f"cannot write {output}: {error.strerror}", param_hint="--output") from None
    if json:
        shapes = {name: list(shape) for name, shape in sorted(writer.shapes.items())}
        write_json({"output": str(output), "dtype": dtype.value, "inputs": len(inputs), "arrays": shapes})
    else:
        typer.echo(f"{output}: {len(writer.shapes)} arrays of {len(inputs)} inputs")


@contextmanager
def _progress_bar(n_inputs: int) -> Iterator[Callable[[Progress], Any] | None]:
    """A bar on standard error where that is a terminal; what is yielded takes the progress of each call."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("reading"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[mib]:.1f} MiB"),
        TimeElapsedColumn(),
    )
    done_inputs = done_bytes = 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=n_inputs, mib=0.0)

        def advance(progress: Any) -> None:
            nonlocal done_inputs, done_bytes
            n_done = done_inputs + progress.inputs_done
            n_bytes = done_bytes + progress.bytes_received
            bar.update(task, completed=n_done, mib=n_bytes / (1 << 20))
            if progress.inputs_done == progress.inputs_total:  # The next call counts from 0.
                done_inputs, done_bytes = n_done, n_bytes

        yield advance
