"""Attribution on fable, in float32.

- `graph_vs_circuit_tracer`, `graph_memory`: the graph of 64 tokens with every active feature, against circuit-tracer
  on the same weights and transcoders (`graph_difference`: the largest difference of an edge, relative to the largest
  of its target). Each in a process of its own; memory is the peak above what the process held before.
- `patch_sweep`: the residual stream of 6 layers x 64 positions, against Hugging Face's forward once a patch, the
  patch in a hook.
- `atp`: attribution patching of every head (q, k, v, z) and MLP at every position, against one forward and backward
  of the same model: forward of both inputs, backward of one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from glasshouse import fable
from glasshouse.server.attribution.attribution_patching import attribution_patch
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import LogitDifference
from glasshouse.server.attribution.nodes import node_grid
from glasshouse.server.attribution.sweeps import patch_sweep
from glasshouse.server.dictionaries.open import open_dictionary
from glasshouse.server.models.loading import load_model

from ...oracles.circuit_tracer import PYTHON, CircuitTracer, Worker
from ..dictionaries_bench import seconds
from ..harness import Report, in_turns
from ..workbench import Workbench

N_TOKENS = 64
METRIC = LogitDifference(targets=(50,), foils=(60,))
BAR_GRAPH, BAR_SWEEP, BAR_ATP = 2.0, 5.0, 4.0


def run(bench: Workbench, report: Report) -> None:
    """graph_vs_circuit_tracer, graph_memory, graph_difference, patch_sweep, atp"""
    torch.set_num_threads(bench.threads)
    if PYTHON.exists():
        graph(bench, report)
    else:
        print(
            "graph_vs_circuit_tracer: not measured, there is no peers' environment (make peers)",
            file=sys.stderr,
        )
    model = GradientModel(load_model(fable.model_path(), dtype="float32", device="cpu", name="fable"))
    sweep(bench, report, model)
    atp(bench, report, model)


def prompt(bench: Workbench) -> list[int]:
    """64 tokens of fable's own stories."""
    stories = [record["text"] for record in fable.labelled("mood") if record["kind"] == "story"]
    tokens: list[int] = bench.loaded.tokenizer.encode(" ".join(stories[:8]))[:N_TOKENS]
    assert len(tokens) == N_TOKENS
    return tokens


def graph(bench: Workbench, report: Report) -> None:
    """graph_vs_circuit_tracer, graph_memory, graph_difference"""
    names = [f"transcoder-{layer}" for layer in range(bench.loaded.n_layers)]
    dictionaries = [open_dictionary(name, fable.dictionary_path(name)) for name in names]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").symlink_to(fable.model_path())
        peer = CircuitTracer(folder, dictionaries, prompt(bench), threads=bench.threads)
        command = [sys.executable, "-m", "tests.bench.graph_worker", str(folder), str(bench.threads)]
        ours = Worker(command, folder / "ours.txt", bench.threads)
        with peer, ours:
            # Memory is of each process' first graph: later ones reuse what it has left. It warms up too.
            _, theirs_bytes = peer.trace(save=True)
            _, ours_bytes = ours.trace(save=True)
            difference, n_features, n_edges = compare(peer.graph(), load_file(folder / "ours.safetensors"))
            found = in_turns(lambda: ours.trace()[0], lambda: peer.trace()[0], 1, warm_up=False)
    speed = 1 / found.ratio
    report(
        "graph_vs_circuit_tracer",
        speed,
        "x",
        f"circuit-tracer {found.baseline:.1f} s, ours {found.ours:.2f} s; {N_TOKENS} tokens, {n_features} features, "
        f"{n_edges} edges",
        f">= {BAR_GRAPH:g}",
        speed >= BAR_GRAPH,
    )
    ratio = ours_bytes / theirs_bytes
    megabytes = f"circuit-tracer {theirs_bytes / 2**20:.0f} MiB, ours {ours_bytes / 2**20:.0f} MiB"
    report("graph_memory", ratio, "x", megabytes, "<= 1", ratio <= 1)
    report("graph_difference", difference, "relative", "circuit-tracer", "<= 1e-4", difference <= 1e-4)


def compare(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> tuple[float, int, int]:
    """The largest difference of an edge relative to the largest of its target (at least 1); features; edges."""
    place = {tuple(key): i for i, key in enumerate(ours["features"].tolist())}
    order = torch.tensor([place[tuple(key)] for key in theirs["features"].tolist()])
    assert len(order) == len(place), "the same features"
    adjacency = theirs["adjacency"]
    n_nodes, n_features = len(adjacency), len(order)
    back = torch.arange(n_nodes)
    back[order] = torch.arange(n_features)  # our number -> theirs
    scale = adjacency.abs().amax(1).clamp_min(1.0)
    targets, sources = back[ours["targets"].long()], back[ours["sources"].long()]
    adjacency[targets, sources] -= ours["weights"]
    return float((adjacency.abs().amax(1) / scale).max()), n_features, len(ours["weights"])


def sweep(bench: Workbench, report: Report, model: GradientModel) -> None:
    """patch_sweep"""
    clean, corrupt = drawn()
    nodes = node_grid(model, "hook_resid_pre", n_positions=N_TOKENS)
    plain = AutoModelForCausalLM.from_pretrained(fable.model_path(), dtype=torch.float32).eval()
    found: dict[str, list[float]] = {}

    def ours() -> None:
        batches = patch_sweep(model, clean, nodes, METRIC, others=corrupt)
        found["ours"] = [result.value for batch in batches for result in batch]

    @torch.inference_mode()
    def one_by_one() -> None:
        streams = plain(corrupt, output_hidden_states=True, use_cache=False).hidden_states
        values = []
        for layer, block in enumerate(plain.model.layers):
            for position in range(N_TOKENS):

                def patch(module, args, position=position, stream=streams[layer]):  # type: ignore[no-untyped-def]
                    live = args[0].clone()
                    live[:, position] = stream[:, position]
                    return (live, *args[1:])

                hook = block.register_forward_pre_hook(patch)
                logits = plain(clean, use_cache=False).logits[0, -1]
                hook.remove()
                values.append(float(logits[METRIC.targets[0]] - logits[METRIC.foils[0]]))
        found["plain"] = values

    measured = in_turns(lambda: seconds(ours), lambda: seconds(one_by_one), bench.repeats)
    error = max(abs(a - b) for a, b in zip(found["ours"], found["plain"], strict=True))
    assert error < 1e-3, f"a patch differs from Hugging Face's by {error}"
    speed = 1 / measured.ratio
    report(
        "patch_sweep",
        speed,
        "x",
        f"a forward each {measured.baseline:.2f} s, ours {measured.ours:.2f} s; {len(nodes)} patches",
        f">= {BAR_SWEEP:g}",
        speed >= BAR_SWEEP,
    )


def atp(bench: Workbench, report: Report, model: GradientModel) -> None:
    """atp"""
    clean, corrupt = drawn()
    probe = "blocks.0.hook_resid_pre"

    def forward_backward() -> None:
        run = model.forward(clean, differentiate=[probe])
        run.gradients(METRIC(run).sum())

    found = in_turns(
        lambda: seconds(lambda: attribution_patch(model, clean, corrupt, METRIC)),
        lambda: seconds(forward_backward),
        4 * bench.repeats,
    )
    scores = attribution_patch(model, clean, corrupt, METRIC)
    n_nodes = sum(values.numel() for values in scores.scores.values())
    report(
        "atp",
        found.ratio,
        "x",
        f"forward and backward {1e3 * found.baseline:.1f} ms, {n_nodes} nodes {1e3 * found.ours:.1f} ms",
        f"< {BAR_ATP:g}",
        found.ratio < BAR_ATP,
    )


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Two inputs of 64 tokens."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randint(3, 4096, (1, N_TOKENS), generator=generator) for _ in range(2))
    return clean, corrupt
