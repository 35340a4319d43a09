"""`glasshouse attribute tokens`, `direct` and `features`: what one prompt's answer rests on."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, TypeAlias

import typer

from glasshouse.cli.attribution.delivery import (
    Delivery,
    Top,
    feature_names,
    number,
    shows_pictures,
)
from glasshouse.cli.attribution.metrics import Answer, Explained, Position, Versus, measured
from glasshouse.cli.connected import Chosen
from glasshouse.cli.pictures import Output, check_output
from glasshouse.cli.progress import counting_bar

Text: TypeAlias = Annotated[str, typer.Argument(metavar="TEXT", help="What the model reads.")]


class Method(StrEnum):
    """How gradients are taken."""

    INTEGRATED = "integrated-gradients"
    GRADIENT = "gradient-x-input"

    @property
    def wire(self) -> Literal["integrated_gradients", "gradient_x_input"]:
        """Its name in the client."""
        return "gradient_x_input" if self is Method.GRADIENT else "integrated_gradients"


@measured
def tokens(
    model: Chosen,
    json: bool,
    explained: Explained,
    text: Text,
    hook_point: Annotated[
        str, typer.Option("--hook-point", metavar="HOOK", help="Where; default the embeddings.")
    ] = "hook_embed",
    method: Annotated[Method, typer.Option("--method", help="How.")] = Method.INTEGRATED,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=1, help="Gradients of integrated gradients.")
    ] = 64,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="TEXT",
            help="What to compare with: a text of as many tokens, mean_embedding (as many average tokens) or zeros. "
            "Default: mean_embedding; for gradient-x-input zeros.",
        ),
    ] = None,
    top: Top = 0,
    output: Output = None,
) -> None:
    """Colour a text by what each token adds to the answer.

    The residual is what integration misses: the scores and it sum to the change from the baseline.
    """
    check_output(output)
    handle = model()
    with counting_bar("gradients") as advance:
        result = handle.attribute_tokens(
            text,
            explained.metric,
            hook_point=hook_point,
            method=method.wire,
            steps=steps,
            baseline=baseline,
            progress=None if advance is None else lambda progress: advance(progress.done, progress.total),
        )
    entries = list(enumerate(zip(result.input.strings, result.scores.tolist())))
    if top:
        entries = sorted(entries, key=lambda entry: -abs(entry[1][1]))[:top]
    Delivery(
        result=result,
        title=text,
        about=f"{explained.words}, {method.value} at {result.hook_point}",
        facts={
            "value": number(result.value),
            "baseline": number(result.baseline_value),
            "residual": number(result.residual),
        },
        rows=[(position, repr(token), number(score)) for position, (token, score) in entries],
        unit=explained.unit,
    ).give(json=json, output=output)


def direct(
    model: Chosen,
    json: bool,
    text: Text,
    answer: Answer = None,
    versus: Versus = None,
    position: Position = None,
    dictionary: Annotated[
        list[str] | None,
        typer.Option("--dictionary", metavar="NAME", help="Split its part into features; repeatable."),
    ] = None,
    top: Top = 20,
    output: Output = None,
) -> None:
    """Show what each part of the model writes straight into the answer's logit; the parts sum to it."""
    from glasshouse.client.attribution.metrics import likeliest

    check_output(output)
    handle = model()
    result = handle.direct_attribution(
        text, answer or likeliest(1), versus or (), position=position, dictionaries=dictionary or ()
    )
    names = {}
    if shows_pictures(json, output):
        names = feature_names(handle, {each.dictionary: each.features.tolist() for each in result.features})
    heads = [(f"L{layer}.H{head}", part) for layer, head, part in result.top_heads(top or result.heads.size)]
    features = [
        (f"{each.dictionary}:{feature}", part)
        for each in result.features
        for feature, part in list(zip(each.features.tolist(), each.parts.tolist()))[: top or None]
    ]
    parts = [*result.contributions.items(), ("constant", result.constant), *heads, *features]
    about = f"logit of {' '.join(map(repr, result.targets.strings))}"
    if result.foils.strings:
        about += f" less {' '.join(map(repr, result.foils.strings))}"
    Delivery(
        result=result,
        title=text,
        about=f"{about} at {result.position}, written directly",
        facts={"logit": number(result.logit), "remainder": number(result.remainder)},
        rows=[(name, number(part)) for name, part in parts],
        unit="logits",
        names=names,
    ).give(json=json, output=output)


@measured
def features(
    model: Chosen,
    json: bool,
    explained: Explained,
    text: Text,
    dictionary: Annotated[
        list[str], typer.Option("--dictionary", metavar="NAME", help="Whose features; repeatable.")
    ],
    method: Annotated[Method, typer.Option("--method", help="How.")] = Method.INTEGRATED,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=1, help="Gradients of integrated gradients.")
    ] = 10,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="TEXT", help="A text of as many tokens; default no feature active."
        ),
    ] = None,
    top: Top = 20,
    output: Output = None,
) -> None:
    """Show which features of dictionaries the answer rests on, and what the dictionaries miss (errors)."""
    check_output(output)
    handle = model()
    with counting_bar("gradients") as advance:
        result = handle.attribute_features(
            text,
            explained.metric,
            dictionaries=dictionary,
            method=method.wire,
            steps=steps,
            baseline=baseline,
            progress=None if advance is None else lambda progress: advance(progress.done, progress.total),
        )
    names = {}
    if shows_pictures(json, output):
        names = feature_names(
            handle, {each.dictionary: list(each.by_feature()) for each in result.dictionaries}
        )
    rows: list[tuple[object, ...]] = []
    facts = {}
    for each in result.dictionaries:
        strongest = each.top(top or len(each.features))
        rows += [
            (each.dictionary, position, repr(result.input.strings[position]), feature, number(score))
            for position, feature, score in strongest
        ]
        facts[f"{each.dictionary} residual"] = number(each.residual)
    Delivery(
        result=result,
        title=text,
        about=f"{explained.words}, {method.value} on features",
        facts=facts,
        rows=rows,
        unit=explained.unit,
        names=names,
    ).give(json=json, output=output)
