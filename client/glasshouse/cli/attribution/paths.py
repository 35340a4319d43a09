"""`glasshouse attribute paths`: what senders say to receivers, along direct paths alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from glasshouse.cli.attribution.delivery import Delivery, number
from glasshouse.cli.attribution.metrics import Explained, measured
from glasshouse.cli.attribution.pairs import Clean, Corrupt, Denoise
from glasshouse.cli.connected import Chosen
from glasshouse.cli.pictures import Output, check_output

if TYPE_CHECKING:
    from glasshouse.client.arrays import Array
    from glasshouse.client.attribution.patches import PatchNode

_NODE = re.compile(r"(?P<hook_point>[^:@]+)(:(?P<head>\d+))?(@(?P<position>\d+))?")


@dataclass(frozen=True, kw_only=True)
class PathEffects:
    """effects: (n_senders,)."""

    senders: list[str]
    receivers: list[str]
    effects: Array


@measured
def paths(
    model: Chosen,
    json: bool,
    explained: Explained,
    clean: Clean,
    corrupt: Corrupt,
    sender: Annotated[
        list[str], typer.Option("--sender", metavar="HOOK[:HEAD][@POS]", help="What is patched; repeatable.")
    ],
    receiver: Annotated[
        list[str],
        typer.Option("--receiver", metavar="HOOK[:HEAD][@POS]", help="Where it arrives; repeatable."),
    ],
    denoise: Denoise = False,
    hold_mlps: Annotated[
        bool, typer.Option("--hold-mlps", help="Keep MLPs between at their values too.")
    ] = False,
    output: Output = None,
) -> None:
    """Measure what each sender's change does to the answer as the receivers alone see it (path patching)."""
    from glasshouse.client.pictures import Bars

    check_output(output)
    senders = [_node(text, "--sender") for text in sender]
    receivers = [_node(text, "--receiver") for text in receiver]
    effects = model().path_patch(
        clean,
        corrupt,
        metric=explained.metric,
        senders=senders,
        receivers=receivers,
        direction="denoise" if denoise else "noise",
        hold_mlps=hold_mlps,
    )
    result = PathEffects(
        senders=list(map(str, senders)), receivers=list(map(str, receivers)), effects=effects
    )
    part = Bars(title="Effect of each sender", labels=result.senders, values=effects, unit=explained.unit)
    Delivery(
        result=result,
        title=clean,
        about=f"{explained.words}; corrupt: {corrupt}",
        facts={"through": ", ".join(result.receivers)},
        rows=[(name, number(effect)) for name, effect in zip(result.senders, effects.tolist())],
        drawn=[part],
    ).give(json=json, output=output)


def _node(text: str, option: str) -> PatchNode:
    from glasshouse.client.attribution.patches import patch_node

    found = _NODE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not HOOK[:HEAD][@POSITION]", param_hint=option)
    head, position = (None if found[name] is None else int(found[name]) for name in ("head", "position"))
    return patch_node(found["hook_point"], head=head, position=position)
