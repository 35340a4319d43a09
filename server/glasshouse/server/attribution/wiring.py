"""The edge graph of a model: what each component adds to the stream, and what each one reads from it.

Sources write: the embedding (with learned positions), every head, every MLP: 1 + L(H + 1) of them. Destinations
read: queries per head, keys and values per key-value head, every MLP, the logits: L(H + 2K + 1) + 1. An edge goes
from a source to a destination that runs after it; in a parallel block the MLP reads what attention reads.

A head's contribution is z_h W_O. Where a post-norm stands between W_O and the stream (sandwich norms), it is
scaled by that norm's scale in its own run, so that heads still sum to what attention adds. Biases are no sources.

The functions here compute from weights, never through a module's hooks: they may be called inside one.

Shapes: S sources, N destinations, B batch, T positions, D d_model, H heads, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from glasshouse.server.attribution.editing import split_heads
from glasshouse.server.attribution.freezing import norm_scale
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.models.families.norms import normalize, regain
from glasshouse.server.models.families.spec import TapSite

QKV = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A writer. `layer` is -1 for the embedding."""

    kind: Literal["embed", "head", "mlp"]
    layer: int = -1
    head: int = 0

    @property
    def stage(self) -> int:
        return 2 * self.layer + (self.kind == "mlp") if self.layer >= 0 else -1

    def __str__(self) -> str:
        return {"embed": "embed", "head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}"}[self.kind]


@dataclass(frozen=True, kw_only=True)
class Destination:
    """A reader. `head` counts key-value heads for k and v; `stage` is that of the first source it cannot read."""

    kind: Literal["q", "k", "v", "mlp", "logits"]
    layer: int
    head: int = 0
    stage: int

    def __str__(self) -> str:
        if self.kind == "logits":
            return "logits"
        return f"m{self.layer}" if self.kind == "mlp" else f"a{self.layer}.h{self.head}.{self.kind}"


class Wiring:
    """Sources, destinations and the edges between them, for one model."""

    def __init__(self, model: GradientModel) -> None:
        self.model = model
        loaded = model.loaded
        self.parallel = not model.has("blocks.0.hook_resid_mid")
        heads = {"q": loaded.n_heads, "k": loaded.n_kv_heads, "v": loaded.n_kv_heads}
        sources, destinations = [Source(kind="embed")], []
        for layer in range(model.n_layers):
            sources += [Source(kind="head", layer=layer, head=head) for head in range(loaded.n_heads)]
            sources.append(Source(kind="mlp", layer=layer))
            destinations += [
                Destination(kind=kind, layer=layer, head=head, stage=2 * layer)
                for kind in ("q", "k", "v")
                for head in range(heads[kind])
            ]
            stage = 2 * layer if self.parallel else 2 * layer + 1
            destinations.append(Destination(kind="mlp", layer=layer, stage=stage))
        destinations.append(Destination(kind="logits", layer=model.n_layers, stage=2 * model.n_layers))
        self.sources, self.destinations = tuple(sources), tuple(destinations)
        self.valid = torch.tensor(
            [[s.stage < d.stage for d in destinations] for s in sources], device=loaded.device
        )
        """(S, N) bool: where there is an edge."""
        self.columns = {d: column for column, d in enumerate(destinations)}
        self._written = {d: self._find_written(d) for d in destinations}

    def at(self, layer: int, point: str) -> str:
        return f"blocks.{layer}.{point}"

    def written_by(self, destination: Destination) -> list[int] | None:
        """The rows of the sources that depend on what a destination reads: its component's own. None for the logits."""
        return self._written[destination]

    def _find_written(self, destination: Destination) -> list[int] | None:
        if destination.kind == "logits":
            return None
        first = next(row for row, source in enumerate(self.sources) if source.layer == destination.layer)
        if destination.kind == "mlp":
            return [first + self.model.loaded.n_heads]
        group = self.model.loaded.n_heads // self.model.loaded.n_kv_heads if destination.kind != "q" else 1
        return [first + destination.head * group + head for head in range(group)]

    @property
    def written(self) -> list[str]:
        """Hook points to read for `contributions`."""
        layers = range(self.model.n_layers)
        return ["blocks.0.hook_resid_pre"] + [
            self.at(layer, point) for layer in layers for point in ("attn.hook_z", "hook_mlp_out")
        ]

    def contributions(self, readings: Mapping[str, Tensor]) -> Tensor:
        """(S, B, T, D): what every source adds to the stream."""
        rows = [readings["blocks.0.hook_resid_pre"][None]]
        for layer in range(self.model.n_layers):
            rows.append(self.head_contributions(layer, readings[self.at(layer, "attn.hook_z")]))
            rows.append(readings[self.at(layer, "hook_mlp_out")][None])
        return torch.cat(rows)

    def head_contributions(self, layer: int, z_BTX: Tensor) -> Tensor:
        """(H, B, T, D): what each head's z, out of (B, T, H * d_head), adds to the stream."""
        out_proj = self._module(self.at(layer, "attn.hook_z"))
        W_XD, bias = linear_of(out_proj)
        W_HED = W_XD.view(self.model.loaded.n_heads, -1, W_XD.shape[-1])
        z_BTHE = split_heads(z_BTX, self.model.loaded.n_heads)
        heads = torch.einsum("bthe,hed->hbtd", z_BTHE, W_HED)
        post = self.at(layer, "ln1_post.hook_normalized")
        if not self.model.has(post):
            return heads
        tap = self.model.table.tap(post)
        norm = self._module(post)
        assert tap.norm is not None
        added = z_BTX @ W_XD
        scale = norm_scale(tap.norm, norm, added if bias is None else added + bias)
        return regain(tap.norm, norm, heads * scale)

    def read_heads(self, layer: int, part: str, x_NBTD: Tensor) -> Tensor:
        """(B, T, n_heads * d_head): queries, keys or values where head i reads the i-th of the streams `x`."""
        tap = self.model.table.tap(self.at(layer, f"attn.hook_{part}"))
        W, bias = linear_of(self._module(tap.point.name))
        y = self.normed(layer, "ln1", x_NBTD) @ W
        y = y if bias is None else y + bias
        by_head = split_heads(part_columns(y, tap), tap.point.n_heads)
        own = torch.arange(tap.point.n_heads, device=y.device)
        return by_head[own, :, :, own].permute(1, 2, 0, 3).flatten(-2)

    def mlp(self, layer: int, x_BTD: Tensor) -> Tensor:
        """(B, T, D): what the MLP of a layer adds for a stream. Only where none of its modules is hooked."""
        path = self.model.table.tap(self.at(layer, "mlp.hook_pre")).path.rpartition(".")[0]
        module = self.model.loaded.model.get_submodule(path)
        y = cast(Tensor, module(self.normed(layer, "ln2", x_BTD)))
        return self.normed(layer, "ln2_post", y)

    def normed(self, layer: int, ln: str, x: Tensor) -> Tensor:
        """`x` through a norm with its gain; `x` itself where the architecture has no such norm."""
        name = self.at(layer, f"{ln}.hook_normalized")
        if not self.model.has(name):
            return x
        kind, norm = self.model.table.tap(name).norm, self._module(name)
        assert kind is not None
        return regain(kind, norm, normalize(kind, norm, x))

    def mlp_reads(self, layer: int) -> str:
        """The stream that the MLP of a layer reads."""
        return self.at(layer, "hook_resid_pre" if self.parallel else "hook_resid_mid")

    def _module(self, name: str) -> nn.Module:
        return self.model.loaded.model.get_submodule(self.model.table.tap(name).path)


def part_columns(y: Tensor, tap: TapSite) -> Tensor:
    """The columns (last dimension) of a fused projection's output, or weight, that belong to one part of it."""
    if tap.columns is not None:
        return y[..., tap.columns[0] : tap.columns[1]]
    if tap.interleave is None:
        return y
    index, n_parts = tap.interleave
    return y.view(*y.shape[:-1], tap.point.n_heads, n_parts, tap.point.d_head)[..., index, :].flatten(-2)


def linear_of(module: Any) -> tuple[Tensor, Tensor | None]:
    """(in, out) weight and bias of a projection, whichever way round the module keeps it."""
    weight = cast(Tensor, module.weight)
    return weight if hasattr(module, "nf") else weight.T, cast("Tensor | None", module.bias)
