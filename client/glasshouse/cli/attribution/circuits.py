"""`glasshouse attribute circuit`, `connections` and `intervene`: what a behaviour needs, and whether the claim holds."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from glasshouse.cli.attribution.delivery import Delivery, number
from glasshouse.cli.attribution.metrics import Explained, measured
from glasshouse.cli.attribution.pairs import Clean, Corrupt
from glasshouse.cli.connected import Chosen
from glasshouse.cli.output import write_json, write_table
from glasshouse.cli.pictures import Output, check_output
from glasshouse.cli.progress import progress_bar

if TYPE_CHECKING:
    from glasshouse.client.attribution.builders import FeatureSetting
    from glasshouse.client.attribution.values import AttributionEstimate

Estimate: TypeAlias = Annotated[
    bool, typer.Option("--estimate", help="Say what it would take, and do not start it.")
]
Transcoders: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--transcoder", metavar="NAME", help="Repeatable; default the model's own."),
]
_SETTING = re.compile(r"(\d+):(\d+)@(\d+)=(.+)")


class Mode(StrEnum):
    """How an intervention holds the rest."""

    CONSTRAINED = "constrained"
    FROZEN_ATTENTION = "frozen-attention"
    OPEN = "open"

    @property
    def wire(self) -> Literal["constrained", "frozen_attention", "open"]:
        """Its name in the client."""
        if self is Mode.FROZEN_ATTENTION:
            return "frozen_attention"
        return "open" if self is Mode.OPEN else "constrained"


@measured
def circuit(
    model: Chosen,
    json: bool,
    explained: Explained,
    clean: Clean,
    corrupt: Corrupt,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", metavar="X", help="How much the metric may grow by dropping an edge."),
    ] = None,
    edges: Annotated[
        int | None, typer.Option("--edges", metavar="N", min=1, help="Or how many edges to keep.")
    ] = None,
    estimate: Estimate = False,
    output: Output = None,
) -> None:
    """Find the edges between heads and MLPs that the clean behaviour needs (ACDC).

    Use --metric kl: the metric must grow as the model departs from its clean behaviour. Interrupting cancels the work
    at the server; --timeout bounds each call, not the search.
    """
    check_output(output)
    if (threshold is None) == (edges is None):
        raise typer.BadParameter("give --threshold or --edges, and not both", param_hint="--threshold")
    handle = model()
    if estimate:
        found = handle.estimate_circuit(
            clean, corrupt, threshold=threshold, target_edges=edges, metric=explained.metric
        )
        show_estimate(found, json)
        return
    operation = handle.discover_circuit(
        clean, corrupt, threshold=threshold, target_edges=edges, metric=explained.metric
    )
    try:
        with progress_bar("circuit") as advance:
            result = operation.result(on_progress=advance)
    except KeyboardInterrupt:
        operation.cancel()
        raise
    Delivery(
        result=result,
        title=clean,
        about=f"{explained.words}, at threshold {result.threshold:.3g}; corrupt: {corrupt}",
        facts={
            "edges": f"{len(result.edges)} of {result.n_edges_total:,}",
            "faithfulness": number(result.faithfulness),
            "completeness": number(result.completeness),
            "seconds": number(result.seconds),
        },
        rows=result.edges,
    ).give(json=json, output=output)


def connections(
    model: Chosen,
    json: bool,
    layer: Annotated[int, typer.Argument(metavar="LAYER", help="The layer that the feature reads.")],
    feature: Annotated[int, typer.Argument(metavar="FEATURE", help="Its index within the layer.")],
    transcoder: Transcoders = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Each way.")] = 10,
    output: Output = None,
) -> None:
    """Show which features a transcoder feature hears from and speaks to, whatever the prompt: decoder . encoder."""
    check_output(output)
    result = model().feature_connections(layer, feature, top=top, transcoders=transcoder or ())
    both = [("in", each) for each in result.incoming] + [("out", each) for each in result.outgoing]
    Delivery(
        result=result,
        title=f"Feature {feature} of layer {layer}",
        about="weights between features, decoder . encoder",
        facts={},
        rows=[(way, each.layer, each.feature, number(each.weight)) for way, each in both],
    ).give(json=json, output=output)


def intervene(
    model: Chosen,
    json: bool,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the model reads.")],
    setting: Annotated[
        list[str],
        typer.Option("--set", metavar="LAYER:FEATURE@POS=VALUE", help="A feature's activation; repeatable."),
    ],
    mode: Annotated[Mode, typer.Option("--mode", help="What is held at its own values.")] = Mode.CONSTRAINED,
    transcoder: Transcoders = None,
    token: Annotated[
        list[str] | None, typer.Option("--token", metavar="TOKEN", help="A next token to report; repeatable.")
    ] = None,
    generate: Annotated[
        int,
        typer.Option("--generate", metavar="N", min=0, help="Also write so many tokens, with and without."),
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the generation.")] = 0,
    output: Output = None,
) -> None:
    """Set transcoder features, and compare what happens with what direct effects predict."""
    check_output(output)
    settings = [_setting(each) for each in setting]
    result = model().intervene_on_features(
        text,
        settings,
        mode=mode.wire,
        transcoders=transcoder or (),
        tokens=token or (),
        max_tokens=generate,
        seed=seed,
    )
    facts = {
        "correlation of logits": number(result.logit_correlation),
        "of features": number(result.feature_correlation),
    }
    if generate:
        facts |= {"without": repr(result.text_before), "with": repr(result.text_after)}
    Delivery(
        result=result,
        title=text,
        about=f"{', '.join(setting)}, {mode.value}",
        facts=facts,
        rows=[
            (
                repr(each.token),
                *map(
                    number, (each.probability_before, each.probability_after, each.measured, each.predicted)
                ),
            )
            for each in result.logits
        ],
    ).give(json=json, output=output)


def show_estimate(estimate: AttributionEstimate, json: bool) -> None:
    """What an operation would take, beside what is allowed; and why it would be refused."""
    import dataclasses

    if json:
        write_json(dataclasses.asdict(estimate))
        return
    mib = [f"{n / 2**20:,.1f} MiB" for n in (estimate.memory_bytes, estimate.memory_budget_bytes)]
    seconds = [
        f"{n:,.1f} s" for n in (estimate.seconds, estimate.seconds_upper_bound, estimate.seconds_budget)
    ]
    rows = [
        ("memory", "", *mib),
        ("time", *seconds),
        ("passes", f"{estimate.passes:,}", f"{estimate.passes_upper_bound:,}", ""),
        ("active features", f"{estimate.active_features:,}", "", ""),
        ("size", "", f"{estimate.size:,}", ""),
        ("refused", estimate.refusal or "no", "", ""),
    ]
    write_table(["", "expected", "at most", "allowed"], rows)


def _setting(text: str) -> FeatureSetting:
    from glasshouse.client.attribution.builders import feature_setting

    found = _SETTING.fullmatch(text)
    try:
        if found is None:
            raise ValueError(text)
        return feature_setting(int(found[1]), int(found[2]), int(found[3]), float(found[4]))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not LAYER:FEATURE@POS=VALUE", param_hint="--set") from None
