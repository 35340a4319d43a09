"""The commands and their options are pinned: scripts rely on them."""

from __future__ import annotations

from typing import Any

from typer.main import get_command

from glasshouse.cli.main import app

CONNECTION = {"--target", "--api-key", "--tls", "--tls-ca", "--timeout", "--json"}
EDITS = {"--steer", "--ablate", "--positions"}
EXPLAINED = (
    CONNECTION
    | {"--model", "--output", "-o", "--answer", "--versus", "--metric", "--position"}
    | {"--of-feature", "--of-probe", "--of-direction"}
)
SWEPT = {"CLEAN", "CORRUPT", "--denoise", "--ablate", "--others", "--seed"}
SURFACE = {
    "models": CONNECTION,
    "hook-points": CONNECTION | {"--model", "--layer", "--grep"},
    "tokenize": CONNECTION | {"TEXT", "--model", "--special", "--no-special"},
    "generate": CONNECTION
    | EDITS
    | {"PROMPT", "--model", "--max-tokens", "--temperature", "--top-p", "--top-k", "--seed", "--stop"}
    | {"--ignore-eos", "--read", "--lens", "--logprobs"}
    | {"--set-feature", "--scale-feature", "--read-features", "--probe", "--when", "--abort-when", "--label"},
    "dictionaries": CONNECTION | {"--model"},
    "features": CONNECTION
    | {"TEXT", "--model", "--dictionary", "--top-k", "--feature", "--html", "--positions"},
    "feature": CONNECTION | {"NAME", "INDEX", "--model", "--tokens", "--nearest"},
    "evaluate-dictionary": CONNECTION | {"NAME", "--model", "--file", "--max-tokens"},
    "activations": CONNECTION
    | {"[TEXT]...", "--model", "--file", "--hook-point", "--output", "-o", "--positions", "--dtype"},
    "score": CONNECTION | EDITS | {"TEXT", "--model", "--top-k"},
    "directions compute": CONNECTION
    | {"FILE", "--model", "--method", "--hook-point", "--positive", "--pooling", "--positions", "--held-out"}
    | {"--seed", "--name", "--next-version", "--best-only", "--description", "--plot", "--output", "-o"},
    "directions list": CONNECTION | {"--model", "--prefix", "--every-version"},
    "directions get": CONNECTION | {"NAME", "--model", "--plot", "--output", "-o"},
    "directions delete": CONNECTION | {"NAME", "--model"},
    "probes train": CONNECTION
    | {"FILE", "--model", "--hook-point", "--best", "--kind", "--positive", "--pooling", "--positions"}
    | {"--calibration", "--fpr", "--held-out", "--seed", "--name", "--next-version", "--description"},
    "probes list": CONNECTION | {"--model", "--prefix", "--every-version"},
    "probes get": CONNECTION | {"NAME", "--model"},
    "probes score": CONNECTION | {"NAME", "TEXT...", "--model", "--file", "--every-position"},
    "probes delete": CONNECTION | {"NAME", "--model"},
    "monitors create": CONNECTION
    | {"NAME", "--model", "--above", "--probe", "--label", "--feature", "--clear-below", "--min-tokens"}
    | {"--aggregation", "--weight", "--level", "--positions", "--action", "--request-label", "--key"}
    | {
        "--sampling-rate",
        "--calibration",
        "--webhook",
        "--webhook-secret",
        "--include-text",
        "--description",
    },
    "monitors update": CONNECTION
    | {"NAME", "--model", "--above", "--clear-below", "--min-tokens", "--action", "--sampling-rate"}
    | {"--description"},
    "monitors list": CONNECTION | {"--model"},
    "monitors get": CONNECTION | {"NAME", "--model"},
    "monitors enable": CONNECTION | {"NAME", "--model"},
    "monitors disable": CONNECTION | {"NAME", "--model"},
    "monitors delete": CONNECTION | {"NAME", "--model"},
    "monitors watch": CONNECTION | {"NAME", "--model", "--since", "--kind", "--count"},
    "monitors events": CONNECTION | {"NAME", "--model", "--limit"},
    "graph": CONNECTION
    | {
        "PROMPT",
        "--model",
        "--output",
        "-o",
        "--answer",
        "--transcoder",
        "--node-threshold",
        "--edge-threshold",
    }
    | {"--max-features", "--max-logits", "--notes", "--from", "--estimate"},
    "graphs": CONNECTION | {"--delete"},
    "attribute tokens": EXPLAINED | {"TEXT", "--hook-point", "--method", "--steps", "--baseline", "--top"},
    "attribute direct": CONNECTION
    | {"TEXT", "--model", "--output", "-o", "--answer", "--versus", "--position", "--dictionary", "--top"},
    "attribute features": EXPLAINED | {"TEXT", "--dictionary", "--method", "--steps", "--baseline", "--top"},
    "attribute patch": EXPLAINED | SWEPT | {"--component", "--layer", "--by-head", "--positions", "--top"},
    "attribute heads": EXPLAINED | SWEPT | {"--component", "--layer", "--top"},
    "attribute mediate": EXPLAINED
    | {"CLEAN", "CORRUPT", "--component", "--layer", "--by-head", "--positions", "--top"},
    "attribute nodes": EXPLAINED | {"CLEAN", "CORRUPT", "--component", "--star", "--verify", "--top"},
    "attribute edges": EXPLAINED | {"CLEAN", "CORRUPT", "--steps", "--verify", "--top"},
    "attribute paths": EXPLAINED | {"CLEAN", "CORRUPT", "--sender", "--receiver", "--denoise", "--hold-mlps"},
    "attribute circuit": EXPLAINED | {"CLEAN", "CORRUPT", "--threshold", "--edges", "--estimate"},
    "attribute connections": CONNECTION
    | {"LAYER", "FEATURE", "--model", "--transcoder", "--top", "--output", "-o"},
    "attribute intervene": CONNECTION
    | {
        "TEXT",
        "--model",
        "--set",
        "--mode",
        "--transcoder",
        "--token",
        "--generate",
        "--seed",
        "--output",
        "-o",
    },
    "version": {"--json"},
    "serve": {"[OPTIONS]"},
}


def every_command() -> dict[str, Any]:
    """Commands by name; those of a group after its name."""
    found: dict[str, Any] = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        if inner is None:
            found[name] = command
        else:
            found |= {f"{name} {each}": value for each, value in inner.items()}
    return found


def test_commands_and_options() -> None:
    commands = every_command()
    found = {}
    for name, command in commands.items():
        found[name] = set()
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                found[name].add(parameter.metavar)
            else:
                found[name] |= {*parameter.opts, *parameter.secondary_opts}
    assert found == SURFACE


def test_environment() -> None:
    commands = every_command()
    for name in SURFACE.keys() - {"version", "serve"}:
        variables = {parameter.name: parameter.envvar for parameter in commands[name].params}
        assert variables["target"] == "GLASSHOUSE_TARGET" and variables["api_key"] == "GLASSHOUSE_API_KEY"
