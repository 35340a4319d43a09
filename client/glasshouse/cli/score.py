"""`glasshouse score`: how likely the model finds a text."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from glasshouse.cli.arguments import ablation, positions_option, steering
from glasshouse.cli.connected import Chosen, connecting
from glasshouse.cli.output import write_json, write_table


@connecting
def score(
    model: Chosen,
    json: bool,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to score.")],
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Alternatives a position.")] = 0,
    steer: Annotated[
        list[str] | None, typer.Option("--steer", metavar="HOOK=FILE*COEF", help="Add a vector.")
    ] = None,
    ablate: Annotated[
        list[str] | None, typer.Option("--ablate", metavar="HOOK=FILE", help="Remove a direction.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option("--positions", metavar="WHERE", help="Where the edits apply; default all.")
    ] = None,
) -> None:
    """Score a text: the log-probability of each token given those before it."""
    where = positions_option(positions)
    edits = [steering(each, where) for each in steer or ()] + [ablation(each, where) for each in ablate or ()]
    found = model().score(text, interventions=edits, top_k=top_k)
    if json:
        write_json(
            {
                "token_ids": found.token_ids,
                "tokens": found.tokens,
                "logprobs": found.logprobs,
                "top": [dataclasses.asdict(top) for top in found.top],
                "receipt": [dataclasses.asdict(entry) for entry in found.receipt],
            }
        )
        return
    rows = []
    for position, (token, logprob) in enumerate(zip(found.tokens, found.logprobs)):
        alternatives = zip(found.top[position].tokens, found.top[position].logprobs) if found.top else ()
        shown = "  ".join(f"{other!r} {value:.3f}" for other, value in alternatives)
        rows.append((position, repr(token), "" if position == 0 else f"{logprob:.4f}", shown))
    write_table(["position", "token", "logprob", "likeliest"], rows)
