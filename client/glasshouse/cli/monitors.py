"""`glasshouse monitors`: publish them, see what they notice, look after those there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.arguments import labels_option, lines_of
from glasshouse.cli.connected import connected
from glasshouse.cli.output import write_json, write_table
from glasshouse.cli.publishing import plain

if TYPE_CHECKING:
    from glasshouse.client import Model, Monitor, MonitorEvent

app = typer.Typer(
    help="Monitors: create, list, get, update, watch, events, enable, disable, delete.",
    no_args_is_help=True,
)
OneName = Annotated[str, typer.Argument(metavar="NAME", help="The monitor.")]
Above = Annotated[float, typer.Option("--above", metavar="SCORE", help="On where the aggregate goes above.")]
Below = Annotated[
    float | None,
    typer.Option("--clear-below", metavar="SCORE", help="Off where it falls below; default the same."),
]
MinTokens = Annotated[
    int | None, typer.Option("--min-tokens", metavar="N", help="Scores needed before it can be on.")
]
Kinds = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="raised, cleared, drift or drift_cleared; may be repeated; default all.",
    ),
]


@app.command("create")
@connected
def create(
    model: Model,
    json: bool,
    name: OneName,
    above: Above,
    probe: Annotated[str | None, typer.Option("--probe", metavar="NAME", help="The probe to score.")] = None,
    label: Annotated[str, typer.Option("--label", metavar="LABEL", help="Which of its labels.")] = "",
    feature: Annotated[
        str | None,
        typer.Option("--feature", metavar="DICTIONARY/INDEX", help="A feature to score instead."),
    ] = None,
    clear_below: Below = None,
    min_tokens: MinTokens = None,
    aggregation: Annotated[
        str,
        typer.Option("--aggregation", metavar="HOW", help="max, mean, exponential or fraction_above."),
    ] = "max",
    weight: Annotated[
        float | None, typer.Option("--weight", metavar="W", help="Of exponential, in (0, 1].")
    ] = None,
    level: Annotated[
        float | None, typer.Option("--level", metavar="SCORE", help="Of fraction_above.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--positions", metavar="WHERE", help="all, prompt or generated; default all but special."
        ),
    ] = None,
    action: Annotated[
        str, typer.Option("--action", metavar="WHAT", help="observe, flag or abort.")
    ] = "observe",
    labels: Annotated[
        list[str] | None,
        typer.Option("--request-label", metavar="NAME=VALUE", help="Only requests with it; may be repeated."),
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option("--key", metavar="NAME", help="Only callers with this key; may be repeated."),
    ] = None,
    sampling_rate: Annotated[
        float | None, typer.Option("--sampling-rate", metavar="SHARE", help="Share of the requests.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="LINES.txt", help="Typical texts, to notice drift from."),
    ] = None,
    webhook: Annotated[
        str | None, typer.Option("--webhook", metavar="URL", help="Where events are posted too.")
    ] = None,
    secret: Annotated[
        str, typer.Option("--webhook-secret", metavar="NAME", help="Name of the secret that signs them.")
    ] = "",
    include_text: Annotated[
        bool, typer.Option("--include-text", help="Put text into events, of requests that allow it.")
    ] = False,
    description: Annotated[str, typer.Option("--description", metavar="TEXT", help="What it is for.")] = "",
) -> None:
    """Publish a monitor and put it into force. One that steers is made from Python."""
    from glasshouse.client import Webhook

    made = model.create_monitor(
        name,
        probe=probe,
        label=label,
        feature=None if feature is None else _feature(feature),
        above=above,
        clear_below=clear_below,
        min_tokens=min_tokens,
        aggregation=aggregation,  # type: ignore[arg-type]
        weight=weight,
        level=level,
        positions=None if where is None else _positions(where),
        action=action,  # type: ignore[arg-type]
        keys=keys or (),
        labels=labels_option(labels or (), "--request-label"),
        sampling_rate=sampling_rate,
        calibration=None if calibration is None else lines_of(calibration),
        webhook=None if webhook is None else Webhook(url=webhook, secret=secret),
        include_text=include_text,
        description=description,
    )
    _show(made, json)


@app.command("update")
@connected
def update(
    model: Model,
    json: bool,
    name: OneName,
    above: Annotated[
        float | None, typer.Option("--above", metavar="SCORE", help="On where the aggregate goes above.")
    ] = None,
    clear_below: Below = None,
    min_tokens: MinTokens = None,
    action: Annotated[
        str | None, typer.Option("--action", metavar="WHAT", help="observe, flag or abort.")
    ] = None,
    sampling_rate: Annotated[
        float | None, typer.Option("--sampling-rate", metavar="SHARE", help="Share of the requests.")
    ] = None,
    description: Annotated[
        str | None, typer.Option("--description", metavar="TEXT", help="What it is for.")
    ] = None,
) -> None:
    """Change a monitor: publish its next version and put it into force."""
    given: dict[str, Any] = {
        "above": above,
        "clear_below": clear_below,
        "min_tokens": min_tokens,
        "action": action,
        "sampling_rate": sampling_rate,
        "description": description,
    }
    changes = {option: value for option, value in given.items() if value is not None}
    if not changes:
        raise typer.BadParameter("say what to change", param_hint="--above ...")
    _show(model.monitor(name).update(**changes), json)


@app.command("list")
@connected
def list_(model: Model, json: bool) -> None:
    """List the monitors in force, as they run on the server that is asked."""
    found = model.monitors()
    if json:
        write_json([plain(monitor.info) for monitor in found])
        return
    rows = [
        (
            f"{monitor.name}@{monitor.version}",
            monitor.state,
            monitor.info.action,
            monitor.info.scored.rpartition("/probes/")[2],
            f"{monitor.info.aggregation} > {monitor.info.above:g}",
            monitor.counts.requests,
            monitor.counts.raised,
            _drift(monitor),
            monitor.info.state_reason,
        )
        for monitor in found
    ]
    columns = ["name", "state", "action", "scores", "on where", "requests", "raised", "drift (PSI)", ""]
    write_table(columns, rows)


@app.command("get")
@connected
def get(model: Model, json: bool, name: OneName) -> None:
    """Show a monitor: NAME as it is in force, or any NAME@VERSION."""
    _show(model.monitor(name), json)


@app.command("enable")
@connected
def enable(model: Model, json: bool, name: OneName) -> None:
    """Let a monitor watch again."""
    _show(model.monitor(name).enable(), json)


@app.command("disable")
@connected
def disable(model: Model, json: bool, name: OneName) -> None:
    """Let a monitor rest."""
    _show(model.monitor(name).disable(), json)


@app.command("delete")
@connected
def delete(model: Model, json: bool, name: OneName) -> None:
    """Delete a monitor with all its versions."""
    found = model.monitor(name)
    found.delete()
    gone = found.resource_name.partition("@")[0]
    if json:
        write_json({"deleted": [gone]})
    else:
        typer.echo(f"deleted {gone}")


@app.command("watch")
@connected
def watch(
    model: Model,
    json: bool,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The monitor; default every monitor.")
    ] = None,
    since: Annotated[
        float | None, typer.Option("--since", metavar="MINUTES", help="Begin with stored events this old.")
    ] = None,
    kinds: Kinds = None,
    count: Annotated[
        int,
        typer.Option("--count", metavar="N", help="End after so many events; 0 goes on until interrupted."),
    ] = 0,
) -> None:
    """Print events as they happen."""
    start = None if since is None else datetime.now().astimezone() - timedelta(minutes=since)
    asked: Any = {"since": start, "kinds": tuple(kinds or ())}
    following = model.watch_monitors(**asked) if name is None else model.monitor(name).watch(**asked)
    dropped = 0
    with following as events, suppress(KeyboardInterrupt):
        for n, event in enumerate(events, start=1):
            if events.n_dropped > dropped:
                dropped = events.n_dropped
                typer.secho(f"{dropped} events were dropped: this reader is behind", fg="yellow", err=True)
            _write_event(event, json)
            if n == count:
                break


@app.command("events")
@connected
def events(
    model: Model,
    json: bool,
    name: OneName,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="The newest so many.")] = 20,
) -> None:
    """Print the newest events that the registry keeps, newest first."""
    found = model.monitor(name).events(limit=limit)
    if json:
        write_json([_event(event) for event in found])
    else:
        write_table(_COLUMNS, [_row(event) for event in found])


_COLUMNS = ["time", "monitor", "event", "action", "request", "position", "aggregate", "text"]


def _write_event(event: MonitorEvent, json: bool) -> None:
    if json:
        write_json(_event(event))
    else:
        typer.echo("\t".join(map(str, _row(event))))


def _event(event: MonitorEvent) -> dict[str, Any]:
    return dataclasses.asdict(event) | {"time": event.time.isoformat()}


def _row(event: MonitorEvent) -> tuple[object, ...]:
    if event.drift is not None:
        drift = event.drift
        figure = f"PSI {drift.population_stability_index:.3f}, KS {drift.ks_statistic:.3f}"
    else:
        figure = "" if event.aggregate is None else f"{event.aggregate:.3f}"
    return (
        event.time.astimezone().strftime("%H:%M:%S.%f")[:-3],
        event.monitor.rpartition("/")[2],
        event.kind,
        event.action,
        event.request_id,
        "" if event.position is None else event.position,
        figure,
        repr(event.text[-60:]) if event.text else "",
    )


def _show(monitor: Monitor, json: bool) -> None:
    info = monitor.info
    if json:
        write_json(plain(info))
        return
    rows: list[tuple[str, object]] = [
        ("monitor", f"{info.name}@{info.version}"),
        ("state", f"{info.state}{': ' + info.state_reason if info.state_reason else ''}"),
        ("scores", info.scored + (f" ({info.label})" if info.label else "")),
        ("at", f"{' + '.join(info.hook_points)}, {info.positions} positions"),
        ("on where", f"{info.aggregation} > {info.above:g}, off below {info.clear_below:g}"),
        ("then", info.action),
        ("requests", " ".join(_filters(monitor)) or "all"),
        ("webhook", info.webhook.url if info.webhook else ""),
        ("drift", _drift(monitor)),
        (
            "done",
            ", ".join(f"{value} {key}" for key, value in dataclasses.asdict(info.counts).items() if value),
        ),
        ("for", info.description),
    ]
    write_table(["", ""], [row for row in rows if row[1]])


def _filters(monitor: Monitor) -> Iterable[str]:
    info = monitor.info
    yield from (f"{name}={value}" for name, value in info.labels.items())
    if info.keys:
        yield f"keys {', '.join(info.keys)}"
    if info.sampling_rate not in (0.0, 1.0):
        yield f"{info.sampling_rate:.0%} of them"


def _drift(monitor: Monitor) -> str:
    drift = monitor.info.drift
    if drift is None:
        return ""
    return f"{drift.population_stability_index:.3f}{', moved' if drift.drifted else ''}"


def _feature(given: str) -> tuple[str, int]:
    dictionary, _, index = given.rpartition("/")
    if not dictionary or not index.isdecimal():
        raise typer.BadParameter(f"{given!r} is not DICTIONARY/INDEX", param_hint="--feature")
    return dictionary, int(index)


def _positions(given: str) -> Any:
    from glasshouse.client import positions

    choices = {"all": positions.all, "prompt": positions.prompt, "generated": positions.generated}
    if given not in choices:
        raise typer.BadParameter(f"{given!r} is none of all, prompt, generated", param_hint="--positions")
    return choices[given]()
