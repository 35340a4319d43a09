"""Edge attribution patching: the effect of every edge from one backward pass, or from a few along a path.

EAP, https://arxiv.org/abs/2310.10348: score(u -> v) = (a_u^corrupt - a_u^clean) . dm/d(input of v) at clean, with a_u
what u adds to the stream and the input of v its own copy of the stream, before its norm. It is the derivative of
the metric by a mask that mixes the corrupt a_u into v's input, at mask zero.

EAP-IG, https://arxiv.org/abs/2403.17806 (inputs): the same with the gradient averaged over passes whose embeddings
are corrupt + (k / steps)(clean - corrupt), k = 0 .. steps - 1.

1. One pass with probes at q, k, v, the MLPs' contributions and the last stream; one backward pass.
2. Each destination's gradient is pulled back through its own norm and projection, all heads as rows of a batch.
3. One product of (S, B T D) differences and (N, B T D) gradients.

Shapes: S sources, N destinations, B batch, T positions, D d_model, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.editing import setting
from glasshouse.server.attribution.gradient_model import GradientModel, Pass
from glasshouse.server.attribution.metrics import Metric
from glasshouse.server.attribution.progress import Progress, silent
from glasshouse.server.attribution.wiring import QKV, Destination, Source, Wiring
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeScores:
    """scores: (S, N) float32, zero where there is no edge. valid: (S, N) bool."""

    sources: tuple[Source, ...]
    destinations: tuple[Destination, ...]
    scores: Tensor
    valid: Tensor

    def top(self, n: int) -> list[tuple[Source, Destination, float]]:
        """The n edges of largest magnitude, largest first."""
        magnitudes = self.scores.abs().masked_fill(~self.valid, -1.0).flatten()
        best = magnitudes.topk(min(n, int(self.valid.sum()))).indices.tolist()
        width = len(self.destinations)
        return [
            (self.sources[i // width], self.destinations[i % width], float(self.scores.flatten()[i]))
            for i in best
        ]


def attribute_edges(
    model: GradientModel,
    clean_T: Tensor,
    corrupt_T: Tensor,
    metric: Metric,
    *,
    steps: int = 0,
    wiring: Wiring | None = None,
    progress: Progress = silent,
) -> EdgeScores:
    """EAP where `steps` is 0, EAP-IG with that many steps otherwise."""
    clean, corrupt = model.tokens(clean_T), model.tokens(corrupt_T)
    check_lengths(clean, corrupt)
    wiring = wiring or Wiring(model)
    with torch.no_grad():
        contributions = [
            wiring.contributions(model.forward(t, read=wiring.written).readings) for t in (clean, corrupt)
        ]
    difference_SBTD = contributions[1] - contributions[0]
    if steps:
        start, end = contributions[1][0], contributions[0][0]
        gradient_NBTD = torch.zeros(len(wiring.destinations), *end.shape, device=end.device)
        for k in range(steps):
            gradient_NBTD += _gradients(wiring, clean, metric, start + (k / steps) * (end - start)) / steps
            progress(k + 1, steps)
    else:
        gradient_NBTD = _gradients(wiring, clean, metric, None)
    scores = difference_SBTD.flatten(1) @ gradient_NBTD.flatten(1).T
    return EdgeScores(
        sources=wiring.sources,
        destinations=wiring.destinations,
        scores=scores.masked_fill(~wiring.valid, 0.0),
        valid=wiring.valid,
    )


def check_lengths(clean: Tensor, corrupt: Tensor) -> None:
    """Refuse inputs whose positions do not correspond."""
    if clean.shape != corrupt.shape:
        raise InvalidArgument(
            f"The inputs have {clean.shape[1]} and {corrupt.shape[1]} tokens; edges are position by position.",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="corrupt",
            value=corrupt.shape[1],
            remedy="Use inputs of equal length.",
        )


def _gradients(wiring: Wiring, clean: Tensor, metric: Metric, embeddings: Tensor | None) -> Tensor:
    """(N, B, T, D): the metric's gradient at every destination's own copy of the stream."""
    model = wiring.model
    layers = range(model.n_layers)
    streams = {wiring.at(layer, "hook_resid_pre") for layer in layers} | {
        wiring.mlp_reads(layer) for layer in layers
    }
    last = wiring.at(model.n_layers - 1, "hook_resid_post")
    probes = [wiring.at(layer, f"attn.hook_{part}") for layer in layers for part in QKV]
    probes += [wiring.at(layer, "hook_mlp_out") for layer in layers]
    run = model.forward(
        clean,
        read=[*sorted(streams), *metric.reads],
        differentiate=[*probes, last],
        edits=None if embeddings is None else {"blocks.0.hook_resid_pre": [setting(embeddings)]},
    )
    found = run.gradients(metric(run).sum())
    rows = []
    for layer in layers:
        stream = run.readings[wiring.at(layer, "hook_resid_pre")].detach()
        rows += [_pull_back_heads(wiring, layer, part, stream, found) for part in QKV]
        rows.append(_pull_back_mlp(wiring, layer, run, found))
    return torch.cat([*rows, found[last][None]])


def _pull_back_heads(
    wiring: Wiring, layer: int, part: str, stream: Tensor, found: dict[str, Tensor]
) -> Tensor:
    """(H, B, T, D): through each head's own copy of the stream."""
    name = wiring.at(layer, f"attn.hook_{part}")
    n_heads = wiring.model.table.resolve(name).n_heads
    copies = stream.expand(n_heads, *stream.shape)
    return _pull_back(lambda x: wiring.read_heads(layer, part, x), copies, found[name])


def _pull_back_mlp(wiring: Wiring, layer: int, run: Pass, found: dict[str, Tensor]) -> Tensor:
    """(1, B, T, D)."""
    stream = run.readings[wiring.mlp_reads(layer)].detach()
    return _pull_back(lambda x: wiring.mlp(layer, x), stream, found[wiring.at(layer, "hook_mlp_out")])[None]


def _pull_back(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(leaf), leaf, gradient)
    return found
