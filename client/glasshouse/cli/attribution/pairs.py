"""`glasshouse attribute patch`, `heads`, `mediate`, `nodes` and `edges`: a clean text, and one where the answer differs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from glasshouse.cli.arguments import lines_of, positions_option
from glasshouse.cli.attribution.delivery import Delivery, Top, number
from glasshouse.cli.attribution.metrics import Explained, measured
from glasshouse.cli.connected import Chosen
from glasshouse.cli.pictures import Output, check_output
from glasshouse.cli.progress import counting_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from glasshouse.client.attribution.patches import PatchGrid

Clean: TypeAlias = Annotated[str, typer.Argument(metavar="CLEAN", help="The text whose answer is explained.")]
Corrupt: TypeAlias = Annotated[
    str, typer.Argument(metavar="CORRUPT", help="One of as many tokens, with another answer.")
]
MaybeCorrupt: TypeAlias = Annotated[
    str | None,
    typer.Argument(metavar="CORRUPT", help="One of as many tokens, with another answer; not with --ablate."),
]
Components: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--component", metavar="NAME", help="A hook point without blocks.{L}.; repeatable."),
]
Layers: TypeAlias = Annotated[
    list[int] | None, typer.Option("--layer", metavar="L", help="Only this; repeatable.")
]
Where: TypeAlias = Annotated[
    str | None, typer.Option("--positions", metavar="WHERE", help="Which positions; default each.")
]
Denoise: TypeAlias = Annotated[
    bool, typer.Option("--denoise", help="Patch clean values into the corrupt run; default the other way.")
]


class Ablation(StrEnum):
    """What a node is set to where nothing is patched in."""

    ZERO = "zero"
    MEAN = "mean"
    RESAMPLE = "resample"


Ablate: TypeAlias = Annotated[
    Ablation | None, typer.Option("--ablate", help="Set nodes to this instead of the corrupt text's values.")
]
Others: TypeAlias = Annotated[
    Path | None,
    typer.Option("--others", metavar="LINES.txt", help="Texts to take means or samples from, one a line."),
]


@measured
def patch(
    model: Chosen,
    json: bool,
    explained: Explained,
    clean: Clean,
    corrupt: MaybeCorrupt = None,
    component: Components = None,
    layer: Layers = None,
    by_head: Annotated[bool, typer.Option("--by-head", help="Split by head.")] = False,
    positions: Where = None,
    denoise: Denoise = False,
    ablate: Ablate = None,
    others: Others = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of resampling.")] = 0,
    top: Top = 20,
    output: Output = None,
) -> None:
    """Patch layer by layer and position by position, and map how the answer moves.

    A value is the metric with that node patched, less the metric without. The default component is hook_resid_pre.
    """
    from glasshouse.client.attribution.patches import patch_grid

    where = positions_option(positions)
    grids = [
        patch_grid(name, layers=layer or (), by_head=by_head, positions=where)
        for name in component or ["hook_resid_pre"]
    ]
    _sweep(model, json, explained, clean, corrupt, grids, denoise, ablate, others, seed, top, output)


@measured
def heads(
    model: Chosen,
    json: bool,
    explained: Explained,
    clean: Clean,
    corrupt: MaybeCorrupt = None,
    component: Annotated[
        str, typer.Option("--component", metavar="NAME", help="What of the head: attn.hook_z, _q, _k, _v.")
    ] = "attn.hook_z",
    layer: Layers = None,
    denoise: Denoise = False,
    ablate: Ablate = None,
    others: Others = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of resampling.")] = 0,
    top: Top = 20,
    output: Output = None,
) -> None:
    """Patch head by head, all positions of one at once, and map how the answer moves: layers down, heads across."""
    from glasshouse.client.attribution.patches import patch_grid

    grids = [patch_grid(component, layers=layer or (), by_head=True, all_positions_at_once=True)]
    _sweep(model, json, explained, clean, corrupt, grids, denoise, ablate, others, seed, top, output)


@measured
def mediate(
    model: Chosen,
    json: bool,
    explained: Explained,
    clean: Clean,
    corrupt: Corrupt,
    component: Components = None,
    layer: Layers = None,
    by_head: Annotated[bool, typer.Option("--by-head", help="Split by head.")] = False,
    positions: Where = None,
    top: Top = 20,
    output: Output = None,
) -> None:
    """Split the change from clean to corrupt: through each node (indirect), and around it (direct)."""
    from glasshouse.client.attribution.patches import patch_grid

    check_output(output)
    where = positions_option(positions)
    grids = [
        patch_grid(name, layers=layer or (), by_head=by_head, positions=where)
        for name in component or ["hook_resid_pre"]
    ]
    result = model().mediate_effect(clean, corrupt, metric=explained.metric, grids=grids)
    found = [
        (place, indirect, direct)
        for grid in result.grids
        for place, indirect, direct in zip(
            _places(grid.axes, result.clean.strings),
            grid.indirect.ravel().tolist(),
            grid.direct.ravel().tolist(),
        )
    ]
    found.sort(key=lambda entry: -abs(entry[1]))
    Delivery(
        result=result,
        title=clean,
        about=f"{explained.words}; corrupt: {corrupt}",
        facts={"total effect": number(result.total)},
        rows=[(*place, number(through), number(around)) for place, through, around in found[: top or None]],
        unit=explained.unit,
    ).give(json=json, output=output)


@measured
def nodes(
    model: Chosen,
    json: bool,
    explained: Explained,
    clean: Clean,
    corrupt: Corrupt,
    component: Components = None,
    star: Annotated[
        bool, typer.Option("--star", help="AtP*: softmax recomputed, and gradients dropped layer by layer.")
    ] = False,
    verify: Annotated[
        int, typer.Option("--verify", metavar="N", min=0, help="Patch the N strongest exactly too.")
    ] = 0,
    top: Top = 20,
    output: Output = None,
) -> None:
    """Approximate the patch effect of every node by gradients (attribution patching)."""
    method = "atp*" if star else "atp"
    _approximate(model, json, explained, clean, corrupt, method, component, None, verify, top, output)


@measured
def edges(
    model: Chosen,
    json: bool,
    explained: Explained,
    clean: Clean,
    corrupt: Corrupt,
    steps: Annotated[
        int,
        typer.Option(
            "--steps", metavar="N", min=0, help="EAP-IG with so many gradients; 0: EAP, the one at clean."
        ),
    ] = 5,
    verify: Annotated[
        int, typer.Option("--verify", metavar="N", min=0, help="Patch the N strongest exactly too.")
    ] = 0,
    top: Top = 20,
    output: Output = None,
) -> None:
    """Approximate the patch effect of every edge between heads and MLPs (edge attribution patching)."""
    method = "eap-ig" if steps else "eap"
    _approximate(model, json, explained, clean, corrupt, method, None, steps or None, verify, top, output)


def _sweep(
    model: Chosen,
    json: bool,
    explained: Explained,
    clean: str,
    corrupt: str | None,
    grids: Sequence[PatchGrid],
    denoise: bool,
    ablate: Ablation | None,
    others: Path | None,
    seed: int,
    top: int,
    output: Path | None,
) -> None:
    check_output(output)
    if (corrupt is None) == (ablate is None):
        raise typer.BadParameter("give a corrupt text, or --ablate, and not both", param_hint="CORRUPT")
    if denoise and ablate is not None:
        raise typer.BadParameter("an ablation has no direction: leave it out", param_hint="--denoise")
    texts = lines_of(others) if others is not None else []
    call: dict[str, Any] = {"replacement": "interchange" if ablate is None else ablate.value}
    call["direction"] = "denoise" if denoise else "noise"
    stream = model().patch_sweep(
        clean, corrupt, metric=explained.metric, grids=grids, others=texts, seed=seed, **call
    )
    with counting_bar("patches") as advance, stream as sweep:
        for _ in sweep:
            if advance is not None:
                advance(sweep.progress.done, sweep.progress.total)
        result = sweep.result()
    found = [each for grid in result.grids for each in grid.top(top or grid.effects.size)]
    found.sort(key=lambda each: -abs(each.effect))
    rows = [
        (
            each.component,
            each.layer,
            "" if each.column is None else each.column,
            "all" if each.position is None else each.position,
            "" if each.position is None else repr(result.clean.strings[each.position]),
            number(each.value),
            number(each.effect),
        )
        for each in found[: top or None]
    ]
    what = (
        f"{ablate.value} ablation"
        if ablate is not None
        else "clean into corrupt"
        if denoise
        else "corrupt into clean"
    )
    Delivery(
        result=result,
        title=clean,
        about=f"{explained.words}, {what}" + (f"; corrupt: {corrupt}" if corrupt is not None else ""),
        facts={
            name: number(value)
            for name, value in (
                ("clean", result.clean_value),
                ("corrupt", result.corrupt_value),
                ("patches", float(sum(grid.effects.size for grid in result.grids))),
                ("seconds", result.seconds),
            )
            if value is not None
        },
        rows=rows,
        unit=explained.unit,
    ).give(json=json, output=output)


def _approximate(
    model: Chosen,
    json: bool,
    explained: Explained,
    clean: str,
    corrupt: str,
    method: Any,
    components: list[str] | None,
    steps: int | None,
    verify: int,
    top: int,
    output: Path | None,
) -> None:
    check_output(output)
    with counting_bar(method) as advance:
        result = model().attribution_patch(
            clean,
            corrupt,
            metric=explained.metric,
            method=method,
            components=components or (),
            steps=steps,
            verify_top=verify,
            progress=None if advance is None else lambda progress: advance(progress.done, progress.total),
        )
    facts = {"clean": number(result.clean_value), "corrupt": number(result.corrupt_value)}
    exact: dict[str, float] = {}
    if result.verification is not None:
        again = result.verification
        labels = list(map(str, again.nodes)) or [f"{source}->{target}" for source, target in again.edges]
        exact = dict(zip(labels, again.exact.tolist()))
        facts["rank correlation with exact patching"] = number(again.rank_correlation)
    size = (
        sum(scores.size for scores in result.scores.values())
        if result.edge_scores is None
        else result.edge_scores.size
    )
    Delivery(
        result=result,
        title=clean,
        about=f"{explained.words}, {result.method}; corrupt: {corrupt}",
        facts=facts,
        rows=[
            (name, number(score), *([number(exact.get(name))] if exact else []))
            for name, score in result.top(top or size)
        ],
        unit=explained.unit,
    ).give(json=json, output=output)


def _places(axes: Any, tokens: Sequence[str]) -> list[tuple[object, ...]]:
    return [
        (
            axes.component,
            layer,
            "" if column is None else column,
            "all" if position is None else position,
            "" if position is None else repr(tokens[position]),
        )
        for layer in axes.layers
        for column in axes.columns
        for position in axes.positions
    ]
