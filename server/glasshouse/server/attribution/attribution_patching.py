"""Attribution patching: every node's patch effect from one backward pass, with AtP*'s two repairs.

https://arxiv.org/abs/2403.00745

AtP: I(n) ~ (n_corrupt - n_clean) . dm/dn at clean, from one pass over each input and one backward pass.

QK fix (queries and keys, whose effect runs through a softmax):
1. One pass over L copies of the clean input, copy l with all queries of layer l replaced by the corrupt ones: the
   patterns p' of row l. A pattern's row depends on its own query alone, so each holds for its position patched
   alone. I(q at i) ~ sum_j (p'_ij - p_ij) dm/dp_ij. Rotary, caps, windows and scaling are the model's own.
2. The same with keys gives scores s'. For key t alone, d = s'_it - s_it and p'_t = p_t e^d / (1 - p_t + p_t e^d);
   I(k at t) ~ sum_i (p'_t - p_t)(g_t - sum_{j != t} p_j g_j / (1 - p_t)) with g = dm/dp_i. Where p_t is 1 the
   others have no weight to give: they get none. A key-value head sums over the query heads that share it.

GradDrop (effects that cancel): for each layer the backward pass is repeated with the gradient through that
layer's attention and MLP contributions set to zero; the score is the sum of |I| over these L passes / (L - 1).
Scores are then magnitudes.

Shapes: L layers, T positions, H heads, K key-value heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.editing import setting_where, split_heads
from glasshouse.server.attribution.freezing import NOTHING_FROZEN, Freeze
from glasshouse.server.attribution.gradient_model import Edit, GradientModel, Pass
from glasshouse.server.attribution.metrics import Metric
from glasshouse.server.attribution.nodes import Node, check_writable
from glasshouse.server.attribution.ranking import rank_correlation
from glasshouse.server.attribution.sweeps import patch_sweep
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.wire import reasons

ATP_COMPONENTS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_mlp_out")
_CONTRIBUTIONS = ("hook_attn_out", "hook_mlp_out")
_CERTAIN = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeScores:
    """component -> (L, T), or (L, H, T) where it has heads: approximate effects, or magnitudes after GradDrop."""

    scores: dict[str, Tensor]
    magnitudes: bool

    def nodes(self) -> Iterator[tuple[Node, float]]:
        """Every node with its score."""
        for component, values in self.scores.items():
            for index, value in zip(_indices(values), values.flatten().tolist()):
                layer, head, position = index if values.ndim == 3 else (index[0], None, index[1])
                name = f"blocks.{layer}.{component}"
                yield Node(hook_point=name, position=position, head=head), value

    def top(self, n: int) -> list[tuple[Node, float]]:
        """The n largest magnitudes, largest first."""
        return sorted(self.nodes(), key=lambda pair: abs(pair[1]), reverse=True)[:n]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The top nodes by exact patching. `rank_correlation` is of magnitudes, Spearman's."""

    nodes: tuple[Node, ...]
    approximate: tuple[float, ...]
    exact: tuple[float, ...]
    rank_correlation: float


def attribution_patch(
    model: GradientModel,
    clean_T: Tensor,
    corrupt_T: Tensor,
    metric: Metric,
    *,
    components: Sequence[str] = ATP_COMPONENTS,
    qk_fix: bool = False,
    grad_drop: bool = False,
    freeze: Freeze = NOTHING_FROZEN,
) -> NodeScores:
    """Approximate effect of patching each node of the clean input from the corrupt one. AtP* is both repairs."""
    clean, corrupt = model.tokens(clean_T), model.tokens(corrupt_T)
    _check(model, clean, corrupt, components, grad_drop)
    names = [f"blocks.{layer}.{component}" for layer in range(model.n_layers) for component in components]
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.n_layers)] if qk_fix else []
    with torch.no_grad():
        other = model.forward(corrupt, read=names)  # what it is, never held at the clean input's values
    gate = _LayerGate(model)
    run = model.forward(
        clean,
        read=[*names, *metric.reads],
        differentiate=[*names, *patterns],
        after=gate.edits() if grad_drop else None,
        freeze=freeze,
    )
    fix = _QKFix(model, clean, other, freeze) if qk_fix else None
    objective = metric(run).sum()
    if not grad_drop:
        return NodeScores(scores=_effects(model, run, other, objective, components, fix), magnitudes=False)
    total: dict[str, Tensor] = {}
    for layer in range(model.n_layers):
        gate.closed = layer
        for component, effect in _effects(model, run, other, objective, components, fix).items():
            total[component] = total.get(component, torch.zeros_like(effect)) + effect.abs()
    scores = {component: effect / (model.n_layers - 1) for component, effect in total.items()}
    return NodeScores(scores=scores, magnitudes=True)


def verify(
    model: GradientModel,
    clean_T: Tensor,
    corrupt_T: Tensor,
    metric: Metric,
    scores: NodeScores,
    *,
    top: int,
    batch_size: int = 32,
) -> Verification:
    """Patch the `top` best nodes exactly."""
    best = scores.top(top)
    nodes = [node for node, _ in best]
    exact = [
        result.effect
        for batch in patch_sweep(model, clean_T, nodes, metric, others=corrupt_T, batch_size=batch_size)
        for result in batch
    ]
    approximate = [score for _, score in best]
    rho = rank_correlation([abs(a) for a in approximate], [abs(e) for e in exact])
    return Verification(
        nodes=tuple(nodes), approximate=tuple(approximate), exact=tuple(exact), rank_correlation=rho
    )


def _effects(
    model: GradientModel,
    run: Pass,
    other: Pass,
    objective: Tensor,
    components: Sequence[str],
    fix: _QKFix | None,
) -> dict[str, Tensor]:
    gradients = run.gradients(objective, retain=True)
    effects: dict[str, Tensor] = {}
    for component in components:
        rows = []
        for layer in range(model.n_layers):
            name = f"blocks.{layer}.{component}"
            if fix is not None and component in ("attn.hook_q", "attn.hook_k"):
                rows.append(fix.effect(component, layer, gradients[f"blocks.{layer}.attn.hook_pattern"][0]))
                continue
            moved = ((other.readings[name] - run.readings[name].detach()) * gradients[name])[0]
            n_heads = model.table.resolve(name).n_heads
            rows.append(split_heads(moved, n_heads).sum(-1).T if n_heads else moved.sum(-1))
        effects[component] = torch.stack(rows)
    return effects


class _LayerGate:
    """Sets the gradient through one layer's contributions to zero on the way back."""

    def __init__(self, model: GradientModel) -> None:
        self.closed = -1
        self._n_layers = model.n_layers

    def edits(self) -> dict[str, list[Edit]]:
        return {
            f"blocks.{layer}.{contribution}": [self._at(layer)]
            for layer in range(self._n_layers)
            for contribution in _CONTRIBUTIONS
        }

    def _at(self, layer: int) -> Edit:
        def edit(live: Tensor) -> None:
            if live.requires_grad:
                live.register_hook(lambda gradient: gradient * float(self.closed != layer))  # type: ignore[no-untyped-call]

        return edit


class _QKFix:
    """Patterns and scores under corrupt queries and keys, one layer a row."""

    @torch.no_grad()
    def __init__(self, model: GradientModel, clean: Tensor, other: Pass, freeze: Freeze) -> None:
        self._n_layers = n_layers = model.n_layers
        self._n_kv_heads = model.loaded.n_kv_heads
        maps = [
            f"blocks.{layer}.attn.hook_{kind}"
            for layer in range(n_layers)
            for kind in ("pattern", "attn_scores")
        ]
        rows = clean.expand(n_layers, -1)

        def under(component: str) -> dict[str, Tensor]:
            edits = {}
            for layer in range(n_layers):
                name = f"blocks.{layer}.{component}"
                if name in other.readings:
                    row = torch.arange(n_layers, device=clean.device)[:, None, None] == layer
                    edits[name] = [setting_where(row, other.readings[name])]
            return model.forward(rows, read=maps, edits=edits, freeze=freeze).readings

        self._clean = model.forward(clean, read=maps, freeze=freeze).readings
        self._queries, self._keys = under("attn.hook_q"), under("attn.hook_k")

    def effect(self, component: str, layer: int, g_HTT: Tensor) -> Tensor:
        """(H, T) for queries, (K, T) for keys; `g_HTT` is the gradient at the layer's pattern."""
        pattern, scores = (f"blocks.{layer}.attn.hook_{kind}" for kind in ("pattern", "attn_scores"))
        p_HTT = self._clean[pattern][0]
        if component == "attn.hook_q":
            return ((self._queries[pattern][layer] - p_HTT) * g_HTT).sum(-1)
        d_HTT = (self._keys[scores][layer] - self._clean[scores][0]).nan_to_num(0.0)
        grown = p_HTT * d_HTT.exp()
        new = grown / (1.0 - p_HTT + grown).clamp_min(1e-30)
        rest = (p_HTT * g_HTT).sum(-1, keepdim=True) - p_HTT * g_HTT
        left = 1.0 - p_HTT
        others = torch.where(left > _CERTAIN, rest / left.clamp_min(_CERTAIN), 0.0)
        by_key_HT = ((new - p_HTT) * (g_HTT - others)).sum(-2)
        return by_key_HT.view(self._n_kv_heads, -1, by_key_HT.shape[-1]).sum(1)


def _check(
    model: GradientModel, clean: Tensor, corrupt: Tensor, components: Sequence[str], grad_drop: bool
) -> None:
    if clean.shape != corrupt.shape:
        raise InvalidArgument(
            f"The inputs have {clean.shape[1]} and {corrupt.shape[1]} tokens; patches are position by position.",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="corrupt",
            value=corrupt.shape[1],
            remedy="Use inputs of equal length.",
        )
    for component in components:
        check_writable(model.table.resolve(f"blocks.0.{component}", field="components"))
    if grad_drop and model.n_layers < 2:
        raise FailedPrecondition(
            "GradDrop leaves out one layer at a time, and this model has one.",
            reason=reasons.CAPABILITY_MISSING,
            field="grad_drop",
            remedy="Use AtP without GradDrop.",
        )


def _indices(values: Tensor) -> Iterator[tuple[int, ...]]:
    yield from (tuple(index) for index in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist())
