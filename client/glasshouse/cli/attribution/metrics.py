"""What is explained, as options: --answer, --versus, --metric and the rest, made into one metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from glasshouse.cli.connected import as_parameters, parameters_of, presented

if TYPE_CHECKING:
    from glasshouse.client.attribution.metrics import Metric, TokensLike


class MetricName(StrEnum):
    """Metrics of next tokens."""

    LOGIT = "logit"
    LOG_PROBABILITY = "log-probability"
    PROBABILITY = "probability"
    KL = "kl"


Answer: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--answer", metavar="TOKEN", help='A next token, such as " she"; repeatable. Default: the likeliest.'
    ),
]
Versus: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--versus", metavar="TOKEN", help="A token to compare it with (logits); repeatable."),
]
Position: TypeAlias = Annotated[
    int | None, typer.Option("--position", metavar="N", help="Where it is read; default the last token.")
]
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "answer": (Answer, None),
    "versus": (Versus, None),
    "metric": (
        Annotated[
            MetricName,
            typer.Option("--metric", help="What of the answer: its logit, less that of --versus; or other."),
        ],
        MetricName.LOGIT,
    ),
    "feature": (
        Annotated[
            str | None, typer.Option("--of-feature", metavar="DICT:INDEX", help="Explain a feature instead.")
        ],
        None,
    ),
    "probe": (
        Annotated[
            str | None, typer.Option("--of-probe", metavar="NAME", help="Explain a probe's score instead.")
        ],
        None,
    ),
    "direction": (
        Annotated[
            str | None,
            typer.Option("--of-direction", metavar="HOOK=FILE.npy", help="Explain a projection instead."),
        ],
        None,
    ),
    "position": (Position, None),
}


@dataclass(frozen=True)
class Explained:
    """A metric, in words, and its unit."""

    metric: Metric
    words: str
    unit: str


def measured(command: Callable[..., None]) -> Callable[..., None]:
    """`command(model, json, explained, ...)` as one that takes the options of a metric too."""
    model, json, _, *own = parameters_of(command)

    def run(model: Any, json: bool, **values: Any) -> None:
        explained = explain(**{name: values.pop(name) for name in _OPTIONS})
        command(model, json, explained, **values)

    return presented(run, command, [model, json, *own, *as_parameters(_OPTIONS)])


def explain(
    *,
    answer: list[str] | None,
    versus: list[str] | None,
    metric: MetricName,
    feature: str | None,
    probe: str | None,
    direction: str | None,
    position: int | None,
) -> Explained:
    """The metric that the options describe. Raises typer.BadParameter (status 2) where they contradict."""
    from glasshouse.client.attribution import metrics

    named = {"--of-feature": feature, "--of-probe": probe, "--of-direction": direction}
    others = [name for name, given in named.items() if given is not None]
    if others and (len(others) > 1 or answer or versus or metric is not MetricName.LOGIT):
        raise typer.BadParameter("is explained alone: leave out the other metrics", param_hint=others[0])
    if versus and metric is not MetricName.LOGIT:
        raise typer.BadParameter(f"--metric {metric} compares no tokens: leave it out", param_hint="--versus")
    if metric is MetricName.KL and answer:
        raise typer.BadParameter(
            "--metric kl is of the whole distribution: leave it out", param_hint="--answer"
        )
    where = "" if position is None else f" at {position}"
    if feature is not None:
        dictionary, index = _feature(feature)
        return Explained(
            metrics.feature_value(dictionary, index, position=position), f"feature {feature}{where}", ""
        )
    if probe is not None:
        return Explained(metrics.probe_value(probe, position=position), f"probe {probe}{where}", "")
    if direction is not None:
        hook_point, vector = _direction(direction)
        return Explained(
            metrics.direction_value(hook_point, vector, position=position), f"{direction}{where}", ""
        )
    if metric is MetricName.KL:
        return Explained(metrics.kl_divergence(position=position), f"KL divergence from clean{where}", "nats")
    targets: TokensLike = answer or metrics.likeliest(1)
    words = " ".join(map(repr, answer)) if answer else "the likeliest token"
    if metric is MetricName.LOG_PROBABILITY:
        return Explained(
            metrics.log_probability(targets, position=position), f"log-probability of {words}{where}", "nats"
        )
    if metric is MetricName.PROBABILITY:
        return Explained(
            metrics.probability(targets, position=position), f"probability of {words}{where}", ""
        )
    less = f" less {' '.join(map(repr, versus))}" if versus else ""
    found = metrics.logit_difference(targets, versus or (), position=position)
    return Explained(found, f"logit of {words}{less}{where}", "logits")


def _feature(text: str) -> tuple[str, int]:
    dictionary, colon, index = text.rpartition(":")
    if not colon or not index.isdecimal():
        raise typer.BadParameter(f"{text!r} is not DICT:INDEX", param_hint="--of-feature")
    return dictionary, int(index)


def _direction(text: str) -> tuple[str, Any]:
    from glasshouse.cli.tensor_files import TensorFileError, read_one

    hook_point, equals, path = text.partition("=")
    if not equals or not path:
        raise typer.BadParameter(f"{text!r} is not HOOK=FILE.npy", param_hint="--of-direction")
    try:
        return hook_point, read_one(Path(path))
    except OSError as error:
        raise typer.BadParameter(
            f"cannot read {path}: {error.strerror}", param_hint="--of-direction"
        ) from None
    except TensorFileError as error:
        raise typer.BadParameter(str(error), param_hint="--of-direction") from None
