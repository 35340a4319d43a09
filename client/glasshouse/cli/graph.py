"""`glasshouse graph` and `graphs`: an attribution graph as a page to explore."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.attribution.circuits import Estimate, Transcoders, show_estimate
from glasshouse.cli.attribution.delivery import number
from glasshouse.cli.connected import Chosen
from glasshouse.cli.options import (
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    ApiKey,
    Json,
    Target,
    Timeout,
    Tls,
    TlsCa,
    connect,
)
from glasshouse.cli.output import write_json, write_table
from glasshouse.cli.pictures import check_output, write_text
from glasshouse.cli.progress import counting_bar, watched

if TYPE_CHECKING:
    from glasshouse.client import Model
    from glasshouse.client.attribution.graph import AttributionGraph
    from glasshouse.client.pictures import FeatureNote

_SUFFIXES = (".html", ".json", ".npz")
_PREFIX = "attributionGraphs/"
_N_SHOWN = 15


def graph(
    model: Chosen,
    json: bool,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Whose next token is explained; or give --from.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="A page (.html), the viewers' .json, or .npz."),
    ] = None,
    answer: Annotated[
        list[str] | None,
        typer.Option(
            "--answer", metavar="TOKEN", help="What it ends in; repeatable. Default: the likeliest."
        ),
    ] = None,
    transcoder: Transcoders = None,
    node_threshold: Annotated[
        float, typer.Option("--node-threshold", metavar="SHARE", help="Of the influence, kept in nodes.")
    ] = 0.8,
    edge_threshold: Annotated[
        float, typer.Option("--edge-threshold", metavar="SHARE", help="Of the scores, kept in edges.")
    ] = 0.98,
    max_features: Annotated[
        int,
        typer.Option("--max-features", metavar="N", min=0, help="Feature nodes; 0 is the server's default."),
    ] = 0,
    max_logits: Annotated[
        int,
        typer.Option("--max-logits", metavar="N", min=0, help="Likeliest tokens; 0 is the server's default."),
    ] = 0,
    max_notes: Annotated[
        int, typer.Option("--notes", metavar="N", min=0, help="Features whose tokens the page tells.")
    ] = 1_000,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="NAME|FILE", help="A stored graph, or a file that was saved, instead."
        ),
    ] = None,
    estimate: Estimate = False,
) -> None:
    """Trace why the model would say its next token: features, and how they lead to one another.

    The page holds the graph as it was traced; the thresholds are where its sliders start. A .json holds the pruned graph,
    an .npz all of it. Interrupting cancels the work at the server; --timeout bounds each call, not the tracing.
    """
    check_output(output, _SUFFIXES)
    for option, share in (("--node-threshold", node_threshold), ("--edge-threshold", edge_threshold)):
        if not 0.0 < share <= 1.0:
            raise typer.BadParameter(f"{share} is not a share above 0 and at most 1", param_hint=option)
    if (prompt is None) == (source is None):
        raise typer.BadParameter("give a prompt, or --from, and not both", param_hint="PROMPT")
    if source is not None and Path(source).suffix == ".json":
        _page_of_json(Path(source), output, node_threshold, edge_threshold)
        return
    handle = None
    if source is not None and Path(source).suffix == ".npz":
        traced = _load(Path(source))
    else:
        handle = model()
        if estimate and prompt is not None:
            found = handle.estimate_attribution_graph(
                prompt, transcoders=transcoder or (), max_feature_nodes=max_features
            )
            show_estimate(found, json)
            return
        options: dict[str, Any] = {
            "transcoders": transcoder or (),
            "targets": answer or (),
            "max_logits": max_logits,
            "max_feature_nodes": max_features,
        }
        if prompt is not None:
            traced = watched(handle.attribution_graph(prompt, **options), "graph")
        else:
            traced = model.client.read_attribution_graph(_full_name(str(source)))
    pruned = traced.prune(node_threshold, edge_threshold)
    page = output is not None and output.suffix == ".html"
    notes: dict[tuple[int, int], FeatureNote] = {}
    if page or (sys.stdout.isatty() and not json):
        handle = handle or model()
        notes = _notes(handle, traced if page else pruned, max_notes if page else min(_N_SHOWN, max_notes))
    if output is not None:
        _write(output, traced, pruned, notes, node_threshold, edge_threshold)
    _report(traced, pruned, notes, json)


def graphs(
    delete: Annotated[
        list[str] | None, typer.Option("--delete", metavar="NAME", help="Delete this one; repeatable.")
    ] = None,
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    json: Json = False,
) -> None:
    """List the attribution graphs that the server keeps, the newest first."""
    import dataclasses

    with connect(target, api_key, tls, tls_ca, timeout) as client:
        for name in delete or ():
            client.delete_attribution_graph(_full_name(name))
        found = [] if delete else client.attribution_graphs()
    if json:
        rows = [dataclasses.asdict(info) for info in found]
        for row in rows:
            row |= {key: row[key] and row[key].isoformat() for key in ("created", "expires")}
        write_json(rows)
    elif not delete:
        columns = ["name", "model", "title", "nodes", "edges", "replacement", "expires"]
        write_table(
            columns,
            [
                (
                    info.name.removeprefix(_PREFIX),
                    info.model,
                    info.title,
                    info.n_features,
                    info.n_edges,
                    number(info.scores.replacement),
                    "" if info.expires is None else info.expires.isoformat(timespec="minutes"),
                )
                for info in found
            ],
        )


def _full_name(name: str) -> str:
    return name if name.startswith(_PREFIX) else _PREFIX + name


def _load(path: Path) -> AttributionGraph:
    from glasshouse.client.attribution.graph import AttributionGraph

    try:
        return AttributionGraph.load(path)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}", param_hint="--from") from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--from") from None


def _page_of_json(path: Path, output: Path | None, node_threshold: float, edge_threshold: float) -> None:
    from glasshouse.client.pictures import graph_page

    if output is None or output.suffix != ".html":
        raise typer.BadParameter("a saved .json becomes a page: -o FILE.html", param_hint="--output")
    try:
        saved = json_module.loads(path.read_text(encoding="utf-8"))
        page = graph_page(saved, node_threshold=node_threshold, edge_threshold=edge_threshold)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}", param_hint="--from") from None
    except ValueError as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--from") from None
    write_text(output, lambda: page)


def _notes(handle: Model, traced: AttributionGraph, most: int) -> dict[tuple[int, int], FeatureNote]:
    from glasshouse.client.pictures import feature_notes

    with counting_bar("features") as advance:
        return feature_notes(handle, traced, most=most, on_progress=advance)


def _write(
    output: Path,
    traced: AttributionGraph,
    pruned: AttributionGraph,
    notes: dict[tuple[int, int], FeatureNote],
    node_threshold: float,
    edge_threshold: float,
) -> None:
    from glasshouse.client.pictures import graph_page

    if output.suffix == ".html":
        write_text(
            output,
            lambda: graph_page(
                traced, notes=notes, node_threshold=node_threshold, edge_threshold=edge_threshold
            ),
        )
        return
    try:
        (pruned if output.suffix == ".json" else traced).save(output)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {output}: {error.strerror}", param_hint="--output") from None


def _report(
    traced: AttributionGraph,
    pruned: AttributionGraph,
    notes: dict[tuple[int, int], FeatureNote],
    json: bool,
) -> None:
    top = pruned.top_features(_N_SHOWN)
    if json:
        write_json(
            {
                "name": traced.name,
                "tokens": traced.tokens,
                "logits": [vars(each) for each in traced.logits],
                "nodes": {"whole": traced.n_nodes, "kept": pruned.n_nodes},
                "edges": {"whole": len(traced.edges), "kept": len(pruned.edges)},
                "scores": {"whole": vars(traced.info.scores), "kept": vars(pruned.scores)},
                "top_features": [vars(node) for node in top],
            }
        )
        return
    logits = "  ".join(f"{each.label!r} {each.weight:.3f}" for each in traced.logits)
    whole, kept = traced.info.scores, pruned.scores
    facts = [
        ("name", traced.name.removeprefix(_PREFIX)),
        ("logits", logits),
        ("nodes", f"{pruned.n_nodes:,} of {traced.n_nodes:,}"),
        ("edges", f"{len(pruned.edges):,} of {len(traced.edges):,}"),
        ("replacement", f"{kept.replacement:.3f}, whole {whole.replacement:.3f}"),
        ("completeness", f"{kept.completeness:.3f}, whole {whole.completeness:.3f}"),
    ]
    write_table(["", ""], facts)
    rows = []
    for node in top:
        note = notes.get((node.layer, node.feature or 0))
        figures = (number(node.activation), number(node.influence))
        rows.append((f"L{node.layer}", node.feature, node.position, repr(node.token), *figures, _said(note)))
    write_table(["layer", "feature", "position", "token", "activation", "influence", "promotes"], rows)


def _said(note: FeatureNote | None) -> str:
    """What a feature is in a few words: its label, or the tokens it promotes."""
    if note is None:
        return ""
    return note.label or " ".join(token.strip() or repr(token) for token, _ in note.promoted[:5])
