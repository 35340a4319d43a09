"""The `glasshouse` command: its table of commands, and what each kind of failure exits with.

Exit status: 0 done, 1 the server refused or could not be reached, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from glasshouse.cli import (
    activations,
    attribution,
    dictionaries,
    directions,
    features,
    generate,
    graph,
    models,
    monitors,
    probes,
    score,
    serve,
    version,
)
from glasshouse.cli.connected import connecting


class Commands(TyperGroup):
    """Reports refusals without a traceback, and turns an interrupt into status 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except ModuleNotFoundError:
            raise
        except Exception as error:
            # Imported late: what fails after the client is loaded has already paid for it.
            from glasshouse.cli.refusals import exit_status

            status = exit_status(error)
            if status is None:
                raise
            raise typer.Exit(status) from None


app = typer.Typer(
    name="glasshouse",
    cls=Commands,
    help="Language models behind glass: read activations, steer generation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("models")(models.models)
app.command("hook-points")(models.hook_points)
app.command("tokenize")(models.tokenize)
app.command("generate")(generate.generate)
app.command("activations")(activations.activations)
app.command("score")(score.score)
app.command("dictionaries")(dictionaries.dictionaries)
app.command("features")(features.features)
app.command("feature")(dictionaries.feature)
app.command("evaluate-dictionary")(dictionaries.evaluate_dictionary)
app.add_typer(directions.app, name="directions")
app.add_typer(probes.app, name="probes")
app.add_typer(monitors.app, name="monitors")
app.command("graph")(connecting(graph.graph))
app.command("graphs")(graph.graphs)
app.add_typer(attribution.app, name="attribute")
app.command("version")(version.version)
app.command("serve", context_settings=serve.UNTOUCHED)(serve.serve)


def run() -> None:
    """The console script."""
    try:
        app(prog_name="glasshouse")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
