"""The attention function every served model runs, registered with transformers as ``glasshouse``.

transformers builds no mask for an implementation that its mask interface does not know, so the mask and the
key-value cache are ours:

1. Query and key arrive rotated, (B, n_heads, T, d_head) and (B, n_kv_heads, T, d_head). Taps on
   ``hook_rot_q`` / ``hook_rot_k`` see them first, so that an edited key is the key that is cached.
2. `AttentionMemory.append` stores this step's keys and values and returns all that the step attends to.
   Without a memory the keys are the step's own and the mask is causal: correct for right-padded batches.
3. Where the model caps its scores (Gemma 2; sdpa would drop the cap) or a tap asks for scores or patterns,
   they are computed explicitly: scaled, capped, then masked with -inf; the pattern is their softmax in
   float32, cast back. Otherwise `scaled_dot_product_attention`, with no repeated copy of grouped keys: a
   decode step folds the query heads of one group into query rows (measured 1.2 to 2 times faster than
   ``enable_gqa``).

Shape legend: B batch, T query positions, S key positions, H query heads, K key-value heads, D d_head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.wire import reasons

IMPLEMENTATION = "glasshouse"
_SITE = "glasshouse_attention"
# Arguments that layers pass along and that change nothing here.
_IGNORED_ARGUMENTS = frozenset(
    {
        "position_ids",
        "use_cache",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    }
)

AttentionTap = Callable[[Tensor], None]
"""Sees (B, H, T, D) queries or keys, editing in place, or reads (B, H, T, S) maps."""


class AttentionMemory(Protocol):
    """The keys and values of earlier steps, owned by an engine."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value (B, K, T, D) of this step; return the (B, K, S, D) to attend to."""
        ...

    def mask(self, sliding_window: int | None) -> Tensor | None:
        """Bool (B, 1, T, S), True = attend. None: plain causal, with S == T.

        With `sliding_window` w a query at p attends to keys p-w+1..p only. Every row that matters attends
        to at least one key.
        """
        ...


class AttentionSwitch:
    """One per model: the memory in use, None between engine steps."""

    __slots__ = ("_window_masks", "memory")

    def __init__(self) -> None:
        self.memory: AttentionMemory | None = None
        self._window_masks: dict[tuple[int, int, torch.device], Tensor] = {}

    def window_mask(self, n_positions: int, window: int, device: torch.device) -> Tensor:
        """Causal and sliding: bool (1, 1, T, T) for T == n_positions. The last few are kept."""
        key = (n_positions, window, device)
        mask = self._window_masks.get(key)
        if mask is None:
            if len(self._window_masks) >= 8:
                self._window_masks.clear()
            with torch.inference_mode(False):  # a kept mask may next serve a pass with gradients
                index = torch.arange(n_positions, device=device)
                distance = index[:, None] - index[None, :]
                mask = ((distance >= 0) & (distance < window))[None, None]
            self._window_masks[key] = mask
        return mask


class AttentionSite:
    """One per attention module: its layer and the taps that are attached to it."""

    __slots__ = ("layer", "pattern", "rot_k", "rot_q", "scores", "switch", "tapped", "upcast")

    def __init__(self, switch: AttentionSwitch, layer: int, *, upcast: bool = False) -> None:
        self.switch = switch
        self.layer = layer
        self.upcast = upcast  # GPT-2's reorder_and_upcast_attn: scores in float32
        self.tapped = False
        self.rot_q: list[AttentionTap] = []
        self.rot_k: list[AttentionTap] = []
        self.scores: list[AttentionTap] = []
        self.pattern: list[AttentionTap] = []

    def refresh(self) -> None:
        """Recompute `tapped` after a list of taps has changed."""
        self.tapped = bool(self.rot_q or self.rot_k or self.scores or self.pattern)


def install(module: nn.Module, switch: AttentionSwitch, layer: int) -> AttentionSite:
    """Give an attention module its site. Raises `FailedPrecondition` where the module is not causal."""
    if getattr(module, "is_causal", True) is False:
        raise _unsupported(f"layer {layer} attends in both directions")
    if getattr(module, "is_cross_attention", False):
        raise _unsupported(f"layer {layer} has cross-attention")
    site = AttentionSite(switch, layer, upcast=bool(getattr(module, "reorder_and_upcast_attn", False)))
    # Through __dict__, so that reading it never goes through nn.Module.__getattr__.
    module.__dict__[_SITE] = site
    return site


def site_of(module: nn.Module) -> AttentionSite:
    """The site that `install` gave this attention module."""
    site = module.__dict__[_SITE]
    assert isinstance(site, AttentionSite)
    return site


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend: query (B, H, T, D), key and value (B, K, T, D) -> ((B, T, H, D), None)."""
    if others or attention_mask is not None or dropout:
        _refuse_unknown(module, attention_mask, dropout, others)
    site: AttentionSite = module.glasshouse_attention  # type: ignore[assignment]
    if site.tapped:
        for tap in site.rot_q:
            tap(query)
        for tap in site.rot_k:
            tap(key)
    n_positions = query.shape[2]
    memory = site.switch.memory
    if memory is not None:
        key, value = memory.append(site.layer, key, value)
        mask = memory.mask(sliding_window)
    elif sliding_window is not None and sliding_window < n_positions:
        mask = site.switch.window_mask(n_positions, sliding_window, query.device)
    else:
        mask = None

    if softcap is not None or site.upcast or (site.tapped and (site.scores or site.pattern)):
        return _explicit(site, query, key, value, mask, scaling, softcap), None

    n_heads, n_kv_heads = query.shape[1], key.shape[1]
    if n_heads == n_kv_heads:
        z = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, is_causal=mask is None and n_positions > 1
        )
    elif n_positions == 1:
        batch, _, _, d_head = query.shape
        grouped = query.reshape(batch, n_kv_heads, n_heads // n_kv_heads, d_head)
        z = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
        return z.reshape(batch, 1, n_heads, d_head), None
    elif mask is not None and query.is_cuda:
        # No fused CUDA kernel takes a mask together with enable_gqa; the repeated keys are the cheaper way.
        repeats = n_heads // n_kv_heads
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        z = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        z = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, is_causal=mask is None, enable_gqa=True
        )
    return z.transpose(1, 2), None


def _explicit(
    site: AttentionSite,
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention with its scores in hand: scaled, capped, masked, softmax in float32. Returns (B, T, H, D)."""
    B, H, T, D = query_BHTD.shape
    K, S = key_BKSD.shape[1], key_BKSD.shape[2]
    query = query_BHTD.reshape(B, K, H // K * T, D)  # the heads of a group become rows: no repeated keys
    key = key_BKSD
    if site.upcast:
        query, key = query.float(), key.float()
    scores = torch.matmul(query, key.transpose(2, 3)).view(B, H, T, S)
    scores = scores * (D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T)
    scores = scores.masked_fill(~mask, float("-inf"))
    for tap in site.scores:
        tap(scores)
    # A row that attends to nothing (a pad) has no softmax; its pattern is zero, as sdpa has it.
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32).masked_fill(~mask, 0.0).to(value_BKSD.dtype)
    for tap in site.pattern:
        tap(pattern)
    z = torch.matmul(pattern.view(B, K, H // K * T, S), value_BKSD).view(B, H, T, D)
    return z.transpose(1, 2)


def _refuse_unknown(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, others: dict[str, object]
) -> None:
    """Refuse what this function would otherwise silently leave out: sinks, biases, masks, dropout."""
    layer = getattr(module, "layer_idx", "?")
    if attention_mask is not None:
        raise _unsupported(f"layer {layer} passes an attention mask of its own")
    if dropout:
        raise _unsupported(f"layer {layer} applies attention dropout (is the model in training mode?)")
    for name, argument in others.items():
        if name in _IGNORED_ARGUMENTS or argument is None or argument is False:
            continue
        if name == "is_causal" and argument is True:
            continue
        raise _unsupported(f"layer {layer} passes the attention argument {name!r}")


def _unsupported(what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"This model's attention is not supported: {what}.",
        reason=reasons.MODEL_NOT_SUPPORTED,
        remedy="Serve a model of a supported family.",
    )


def register() -> None:
    """Make ``attn_implementation="glasshouse"`` known to transformers (idempotent)."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
