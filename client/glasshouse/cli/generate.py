"""`glasshouse generate`: text as it comes, steered and read."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.arguments import (
    ablation,
    condition,
    feature_reading,
    feature_scaling,
    feature_setting,
    labels_option,
    lens,
    positions_option,
    probe_reading,
    steering,
)
from glasshouse.cli.connected import Chosen, connecting
from glasshouse.cli.output import write_json

if TYPE_CHECKING:
    from glasshouse.client import GeneratedToken, GenerationStream


@connecting
def generate(
    model: Chosen,
    json: bool,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to continue.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Most tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="P", help="Keep the likeliest tokens of this probability.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="K", help="Keep this many tokens; 0 keeps all.")
    ] = 0,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Same seed, same tokens.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's end of sequence.")
    ] = False,
    steer: Annotated[
        list[str] | None,
        typer.Option(
            "--steer",
            metavar="HOOK=FILE*COEF",
            help="Add the vector of a .npy or .safetensors; a direction: NAME*COEF; repeatable.",
        ),
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            "--ablate",
            metavar="HOOK=FILE",
            help="Remove a direction, after steering; by its name: NAME; repeatable.",
        ),
    ] = None,
    set_feature: Annotated[
        list[str] | None,
        typer.Option("--set-feature", metavar="DICT:INDEX=VALUE", help="Set a feature; repeatable."),
    ] = None,
    scale_feature: Annotated[
        list[str] | None,
        typer.Option(
            "--scale-feature", metavar="DICT:INDEX=FACTOR", help="Multiply a feature; 0 ablates; repeatable."
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            "--positions",
            metavar="WHERE",
            help="Where the edits apply: all, prompt, generated, last, 0,2,5 or 4:10; default all.",
        ),
    ] = None,
    when: Annotated[
        str | None,
        typer.Option(
            "--when",
            metavar="PROBE>T",
            help="Make the edits only where this holds. Also PROBE:LABEL<T, DICT#FEATURE>T, '... over prompt|latched'.",
        ),
    ] = None,
    abort_when: Annotated[
        list[str] | None,
        typer.Option("--abort-when", metavar="PROBE>T", help="End where this holds, as --when; repeatable."),
    ] = None,
    read: Annotated[
        list[str] | None, typer.Option("--read", metavar="HOOK", help="Read activations; repeatable.")
    ] = None,
    logit_lens: Annotated[
        list[str] | None,
        typer.Option("--lens", metavar="HOOK[:K]", help="Read the logit lens, K tokens; repeatable."),
    ] = None,
    read_features: Annotated[
        list[str] | None,
        typer.Option(
            "--read-features", metavar="DICT[:K]", help="Read the K strongest features; repeatable."
        ),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option("--probe", metavar="PROBE[:margin]", help="Read a probe's scores; repeatable."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="NAME=VALUE", help="What it is about, for monitors; repeatable."),
    ] = None,
    logprobs: Annotated[
        int, typer.Option("--logprobs", metavar="K", help="Alternatives to show with each token.")
    ] = 0,
) -> None:
    """Generate text, streamed as it comes.

    With --read, --lens, --read-features, --probe or --logprobs: one line a token. With --json: one line an event, "prompt",
    "token" and "finished".
    """
    where = positions_option(positions)
    edits = [
        *(steering(each, where) for each in steer or ()),
        *(ablation(each, where) for each in ablate or ()),
        *(feature_setting(each, where) for each in set_feature or ()),
        *(feature_scaling(each, where) for each in scale_feature or ()),
    ]
    if when is not None:
        if not edits:
            raise typer.BadParameter("there is no edit to put under a condition", param_hint="--when")
        edits = [edit.when(condition(when, "--when")) for edit in edits]
    ends = [condition(each, "--abort-when") for each in abort_when or ()]
    readings = [
        *(lens(each) for each in logit_lens or ()),
        *(feature_reading(each) for each in read_features or ()),
        *(probe_reading(each) for each in probe or ()),
    ]

    from glasshouse.client import read_activations

    with model().generate(
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        interventions=edits,
        readouts=[*(read_activations(each) for each in read or ()), *readings],
        abort_when=ends,
        labels=labels_option(label or (), "--label"),
    ) as stream:
        if json:
            _write_events(stream)
        elif read or readings or logprobs:
            _write_lines(stream)
        else:
            _write_text(stream)


def _write_text(stream: GenerationStream) -> None:
    written = 0
    for token in stream:
        sys.stdout.write(token.text)
        sys.stdout.flush()
        written += len(token.text)
    sys.stdout.write(stream.text[written:] + "\n")
    sys.stdout.flush()
    _say_abort(stream)
    if sys.stderr.isatty() and stream.usage is not None:
        n_tokens, seconds = stream.usage.generated_tokens, stream.usage.total_seconds
        summary = f"{n_tokens} tokens in {seconds:.2f} s, {stream.finish_reason}, seed {stream.seed}"
        typer.secho(summary, dim=True, err=True)


def _write_lines(stream: GenerationStream) -> None:
    for token in stream:
        parts = [str(token.position), repr(token.text), f"{token.logprob:.4f}"]
        if token.top_logprobs is not None:
            parts.append(_alternatives(token.top_logprobs))
        parts += [f"{name}: {_alternatives(top)}" for name, top in token.logit_lens.items()]
        parts += [f"{name}: {_strongest(found)}" for name, found in token.features.items()]
        parts += [f"{name}: {_scores(found)}" for name, found in token.probes.items()]
        parts += [f"|{name}| {_norm(array):.4g}" for name, array in token.activations.items()]
        typer.echo("\t".join(parts))
        sys.stdout.flush()
    _say_abort(stream)


def _say_abort(stream: GenerationStream) -> None:
    """What monitors flagged, and why the text is cut short, on standard error."""
    for flag in stream.flags:
        if flag.action != "abort":
            what = "flagged" if flag.action == "flag" else "steered"
            typer.secho(
                f"{what} by {flag.monitor}: {flag.score:.4g} at position {flag.position}",
                fg="yellow",
                err=True,
            )
    abort = stream.abort
    if abort is not None:
        cause = abort.monitor or f"--abort-when {abort.condition}"
        typer.secho(
            f"aborted by {cause}: {abort.score:.4g} at position {abort.position}, threshold {abort.threshold:.4g}",
            fg="yellow",
            err=True,
        )


def _write_events(stream: GenerationStream) -> None:
    readouts = stream.prompt_readouts
    write_json(
        {
            "event": "prompt",
            "token_ids": stream.prompt,
            "activations": {
                name: {"positions": readouts.positions[name], "values": array.astype("float32")}
                for name, array in readouts.items()
            },
            "logit_lens": {name: dataclasses.asdict(seen) for name, seen in readouts.logit_lens.items()},
            "features": {
                name: {"positions": rows.positions, "values": [_features(row) for _, row in rows]}
                for name, rows in readouts.features.items()
            },
            "probes": {
                name: {
                    "probe": rows.probe,
                    "labels": list(rows.labels),
                    "positions": rows.positions,
                    "scores": rows.scores,
                }
                for name, rows in readouts.probes.items()
            },
        }
    )
    for token in stream:
        write_json({"event": "token"} | _token_fields(token))
    usage = stream.usage
    write_json(
        {
            "event": "finished",
            "text": stream.text,
            "finish_reason": stream.finish_reason,
            "stop_string": stream.stop_string,
            "abort": None if stream.abort is None else dataclasses.asdict(stream.abort),
            "flags": [dataclasses.asdict(flag) for flag in stream.flags],
            "usage": None if usage is None else dataclasses.asdict(usage),
            "receipt": [dataclasses.asdict(entry) for entry in stream.receipt],
            "seed": stream.seed,
        }
    )


def _token_fields(token: GeneratedToken) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "position": token.position,
        "token_id": token.token_id,
        "text": token.text,
        "logprob": token.logprob,
    }
    if token.top_logprobs is not None:
        fields["top_logprobs"] = dataclasses.asdict(token.top_logprobs)
    if token.activations:
        fields["activations"] = {name: array.astype("float32") for name, array in token.activations.items()}
    if token.logit_lens:
        fields["logit_lens"] = {name: dataclasses.asdict(top) for name, top in token.logit_lens.items()}
    if token.features:
        fields["features"] = {name: _features(found) for name, found in token.features.items()}
    if token.probes:
        fields["probes"] = {name: dict(found) for name, found in token.probes.items()}
    return fields


def _features(found: Any) -> list[dict[str, Any]]:
    return [{"feature": index, "activation": value} for index, value in found]


def _strongest(found: Any) -> str:
    return " ".join(f"{index} {value:.3g}" for index, value in found)


def _scores(found: Any) -> str:
    return " ".join(f"{label} {score:.3g}" for label, score in found)


def _alternatives(top: Any) -> str:
    return " ".join(f"{token!r} {logprob:.3f}" for token, logprob in zip(top.tokens, top.logprobs))


def _norm(array: Any) -> float:
    import numpy as np

    return float(np.linalg.norm(array.astype(np.float32)))
