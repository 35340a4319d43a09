"""The linear map along a prompt's frozen paths, walked backwards by hand: no graph is recorded.

With attention patterns and norm scales held, and MLPs cut, the stream is linear from any contribution to any later
one. Its transpose, from a vector at a hook point (the gradient there) to the gradient at every earlier contribution:

1. The read: a norm's gain, scale and (LayerNorm) centring, then the stream.
2. Down the layers. At an MLP's contribution the gradient is the stream's: that is what is wanted. A transcoder's skip
   adds W_skip^T of it at what the transcoder reads.
3. Attention: g + LN^T W_V^T P^T W_O^T LN_post^T g. Gains and centrings are folded into the weights once, scales into
   the patterns, so that a layer is three matrix products.
4. Causality: a row that starts at position t has no gradient after t. A batch is as long as its latest start, starts
   at its own layer, and its first attention is done on the starting positions alone.

Rows are kept position-major, so that what one position's sources contract with is one block.

Shapes: n rows, T positions, S latest start + 1, D d_model, H heads, K key-value heads, G = H / K, E d_head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from glasshouse.server.attribution.freezing import Held
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.wiring import linear_of, part_columns
from glasshouse.server.models.families.norms import NormKind

Place = Literal["pre", "mid", "post"]
EMBEDDING = -1
"""The layer under which a walk yields the gradient at the embeddings."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Read:
    """Where a hook point reads the stream, and through what. scale: (T, 1); gain: (D,)."""

    layer: int
    place: Place
    gain: Tensor | None = None
    scale: Tensor | None = None
    centres: bool = False

    def back(self, g: Tensor, positions: Tensor | slice) -> Tensor:
        """The gradient at the stream for `g` (..., D) at the hook point; positions: of g's first dimension."""
        if self.gain is not None:
            g = g * self.gain
        if self.scale is not None:
            scale = self.scale[positions]
            g = g * scale.view(-1, *[1] * (g.ndim - 1))
        return g - g.mean(-1, keepdim=True) if self.centres else g


@dataclass(frozen=True, kw_only=True, eq=False)
class _Attention:
    """W_out: (D, K * G * E), from the stream to z; W_in: (K * E, D), from values to the stream. paths: (K, T, G, T),
    key position before query position, scales included.
    """

    W_out: Tensor
    W_in: Tensor
    paths: Tensor

    def first(self, positions_n: Tensor, g_nD: Tensor, n_positions: int) -> Tensor:
        """(S, n, D), for rows whose gradient is at one position each."""
        n_groups, _, n_heads, _ = self.paths.shape
        z = (g_nD @ self.W_out).view(len(g_nD), n_groups, n_heads, -1)
        paths = self.paths[:, :n_positions, :, positions_n]
        v = torch.einsum("ktgn,nkge->tnke", paths, z)
        return v.reshape(n_positions, len(g_nD), -1) @ self.W_in

    def dense(self, g_SnD: Tensor) -> Tensor:
        """(S, n, D)."""
        n_positions, n_rows, _ = g_SnD.shape
        n_groups, _, n_heads, _ = self.paths.shape
        z = (g_SnD @ self.W_out).view(n_positions, n_rows, n_groups, n_heads, -1)
        d_head = z.shape[-1]
        z = z.permute(2, 3, 0, 1, 4).reshape(n_groups, n_heads * n_positions, n_rows * d_head)
        paths = self.paths[:, :n_positions, :, :n_positions].reshape(n_groups, n_positions, -1)
        v = torch.bmm(paths, z).view(n_groups, n_positions, n_rows, d_head)
        return v.permute(1, 2, 0, 3).reshape(n_positions, n_rows, -1) @ self.W_in


class FrozenPaths:
    """The paths of one prompt. `held` are its patterns and norm scales; skips: (hook point read, layer written, W)."""

    def __init__(self, model: GradientModel, held: Held, skips: Sequence[tuple[str, int, Tensor]]) -> None:
        self._model, self._held = model, held
        self.parallel = not model.has("blocks.0.hook_resid_mid")
        self._attention = [self._layer(layer) for layer in range(model.n_layers)]
        self._skips: dict[int, list[tuple[Read, Tensor]]] = {}
        for name, layer, W_skip in skips:
            self._skips.setdefault(layer, []).append((self.read(name), W_skip))
        self.final = self._through("ln_final", model.n_layers - 1, "post", gained=True)

    @staticmethod
    def readable(model: GradientModel, name: str) -> bool:
        """Whether the stream is read at this hook point directly or through one norm."""
        return name.partition(".")[2].partition(".")[2] in _PLACES and model.has(name)

    def read(self, name: str) -> Read:
        """How a `readable` hook point reads the stream."""
        layer, point = int(name.split(".")[1]), name.split(".", 2)[2]
        place = "pre" if self.parallel and _PLACES[point] == "mid" else _PLACES[point]
        norm, _, which = point.partition(".")
        if not which:
            return Read(layer=layer, place=place)
        return self._through(f"blocks.{layer}.{norm}", layer, place, gained=which == "hook_out")

    def walk(self, read: Read, positions_n: Tensor, vectors_nD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(layer, gradient (S, n, D) at its MLP's contribution), latest first, then `EMBEDDING`. For vectors injected
        at `read`, one a row at its position. What is yielded changes with the next step.
        """
        n_positions = int(positions_n.max()) + 1
        vectors = read.back(vectors_nD, positions_n)
        start = vectors.new_zeros(n_positions, *vectors.shape)
        start[positions_n, torch.arange(len(vectors), device=vectors.device)] = vectors
        pending: list[tuple[Read, Tensor]] = []
        layer, place, g = read.layer, read.place, start
        if place == "mid":
            g = g + self._attention[layer].first(positions_n, vectors, n_positions)
            layer, place = layer - 1, "post"
        elif place == "pre":
            layer, place = layer - 1, "post"
        while layer >= 0:
            yield layer, g
            for skip, W_skip in self._skips.get(layer, ()):
                pending.append((skip, g @ W_skip.T))
            if self.parallel:
                g = g + self._attention[layer].dense(g)
            else:
                g = self._join(g, pending, layer, "mid")
                g = g + self._attention[layer].dense(g)
            g = self._join(g, pending, layer, "pre")
            layer -= 1
            g = self._join(g, pending, layer, "post")
        yield EMBEDDING, g

    @staticmethod
    def _join(g: Tensor, pending: list[tuple[Read, Tensor]], layer: int, place: Place) -> Tensor:
        """Add what skips brought to this place of the stream."""
        here = [entry for entry in pending if (entry[0].layer, entry[0].place) == (layer, place)]
        for entry in here:
            g = g + entry[0].back(entry[1], slice(0, len(g)))
            pending.remove(entry)
        return g

    def _through(self, norm: str, layer: int, place: Place, *, gained: bool) -> Read:
        name = f"{norm}.hook_normalized"
        kind, gain = self._norm(name)
        return Read(
            layer=layer,
            place=place,
            gain=gain if gained else None,
            scale=self._held.scales[name][0],
            centres=kind is NormKind.LAYER,
        )

    def _norm(self, name: str) -> tuple[NormKind, Tensor]:
        tap = self._model.table.tap(name)
        module: nn.Module = self._model.loaded.model.get_submodule(tap.path)
        weight = cast(Tensor, module.weight).float()
        assert tap.norm is not None
        return tap.norm, 1.0 + weight if tap.norm is NormKind.RMS_PLUS_ONE else weight

    def _layer(self, layer: int) -> _Attention:
        model, block = self._model, f"blocks.{layer}."
        loaded, n_groups = model.loaded, model.loaded.n_kv_heads
        z, v = (model.table.tap(f"{block}attn.hook_{part}") for part in "zv")
        W_O = linear_of(loaded.model.get_submodule(z.path))[0].T.float()
        W_V = part_columns(linear_of(loaded.model.get_submodule(v.path))[0], v).T.float()
        pattern = self._held.patterns[f"{block}attn.hook_pattern"][0]
        paths = pattern.view(n_groups, -1, *pattern.shape[1:]).permute(0, 3, 1, 2)
        before, after = f"{block}ln1.hook_normalized", f"{block}ln1_post.hook_normalized"
        if model.has(before):
            kind, gain = self._norm(before)
            W_V = W_V * gain
            W_V = W_V - W_V.mean(-1, keepdim=True) if kind is NormKind.LAYER else W_V
            paths = paths * self._held.scales[before][0].view(1, -1, 1, 1)
        if model.has(after):
            kind, gain = self._norm(after)
            W_O = W_O - W_O.mean(0) if kind is NormKind.LAYER else W_O
            W_O = gain[:, None] * W_O
            paths = paths * self._held.scales[after][0].view(1, 1, 1, -1)
        return _Attention(W_out=W_O.contiguous(), W_in=W_V.contiguous(), paths=paths.contiguous())


_PLACES: Mapping[str, Place] = {
    "hook_resid_pre": "pre",
    "ln1.hook_normalized": "pre",
    "ln1.hook_out": "pre",
    "hook_resid_mid": "mid",
    "ln2.hook_normalized": "mid",
    "ln2.hook_out": "mid",
    "hook_resid_post": "post",
}
