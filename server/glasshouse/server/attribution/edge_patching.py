"""A forward pass in which every component reads its own copy of the stream, edges patched one by one.

The input of destination v is  stream + sum_u mask[u, v] (a_u^corrupt - a_u), with a_u what source u adds in THIS
pass: mask 0 is the plain pass, 1 on every edge the corrupt one, and 1 on one edge path patching along it.

1. As the pass goes, every source's difference to its corrupt contribution is noted.
2. Where any edge into a head's q, k or v is masked, that head's vector is made anew from its own stream and
   written over the live one; the MLP's input (or where there is no norm to write behind, its output) likewise.
3. The stream itself is never touched, except at the very end, for the logits.

A mask that takes gradients gets them: that is the oracle of EAP. Rows may each have a mask of their own. A pass may
start at a later layer where no edge into an earlier one is masked: until then it is the plain one.

Shapes: S sources, N destinations, B batch, T positions, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.gradient_model import Edit, Pass
from glasshouse.server.attribution.resuming import BaseRun, Resume
from glasshouse.server.attribution.wiring import QKV, Destination, Wiring


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainRun:
    """The unmasked pass over the inputs: what a later start needs. contributions: (S, B, T, D), B 1 for one input in
    every row.
    """

    base: BaseRun
    contributions: Tensor


def forward_with_edges(
    wiring: Wiring,
    tokens_BT: Tensor,
    corrupt_SBTD: Tensor,
    mask: Tensor,
    *,
    read: tuple[str, ...] = (),
    plain: PlainRun | None = None,
    first_layer: int = 0,
) -> Pass:
    """Run the tokens with the corrupt contributions mixed in along the edges of `mask`, 0 to 1.

    mask: (S, N), or (B, S, N) for a mask a row. With `plain`, the pass over these tokens, it starts at `first_layer`:
    no edge into an earlier layer may be masked, and nothing be read there.
    """
    start = first_layer if plain is not None and wiring.model.loaded.family.direct else 0
    patched = _EdgePatch(wiring, corrupt_SBTD, mask * wiring.valid, start)
    if plain is None or start == 0:
        resume = None
    else:
        patched.begin(plain.contributions)
        resume = Resume(base=plain.base, layer=start, position=0)
    return wiring.model.forward(
        tokens_BT, read=read, edits=patched.edits(), gradients=bool(mask.requires_grad), resume=resume
    )


class _EdgePatch:
    """The edits of one pass. `_differences` grows in the order of the sources."""

    def __init__(self, wiring: Wiring, corrupt_SBTD: Tensor, mask: Tensor, start: int) -> None:
        self._wiring, self._corrupt, self._mask, self._start = wiring, corrupt_SBTD, mask, start
        self._differences: list[Tensor] = []
        self._streams: dict[str, Tensor] = {}
        self._live = mask.detach().ne(0).flatten(0, -2).any(0).tolist()  # destinations with a masked edge

    def begin(self, contributions_SBTD: Tensor) -> None:
        """Take the differences of the layers before the first from the plain pass."""
        n_rows = self._mask.shape[0] if self._mask.ndim == 3 else contributions_SBTD.shape[1]
        early = [source.layer < self._start for source in self._wiring.sources]
        for row in range(sum(early)):
            difference = self._corrupt[row] - contributions_SBTD[row]
            self._differences.append(difference.expand(n_rows, -1, -1))

    def edits(self) -> dict[str, list[Edit]]:
        wiring, edits = self._wiring, {}
        for layer in range(self._start, wiring.model.n_layers):

            def at(point: str, layer: int = layer) -> str:
                return wiring.at(layer, point)

            edits[at("hook_resid_pre")] = [self._note_stream(at("hook_resid_pre"))]
            if not wiring.parallel:
                edits[at("hook_resid_mid")] = [self._note_stream(at("hook_resid_mid"))]
            for part in QKV:
                edits[at(f"attn.hook_{part}")] = [self._rewrite_heads(layer, part)]
            edits[at("attn.hook_z")] = [self._note_heads(layer)]
            edits[at("hook_mlp_out")] = [self._note_mlp]
            if wiring.model.has(at("ln2.hook_out")):
                edits[at("ln2.hook_out")] = [self._rewrite_mlp_input(layer)]
            else:
                edits[at("hook_mlp_out")].insert(0, self._rewrite_mlp_output(layer))
        if self._start == 0:  # the embedding writes like an MLP: one vector
            edits["blocks.0.hook_resid_pre"].append(self._note_mlp)
        last = wiring.at(wiring.model.n_layers - 1, "hook_resid_post")
        edits[last] = [self._patch_logits]
        return edits

    def _delta(self, destinations: list[Destination]) -> Tensor | None:
        """(len, B, T, D) to add to each one's stream; None where no edge into them is masked."""
        columns = [self._wiring.columns[d] for d in destinations]
        if not self._mask.requires_grad and not any(self._live[column] for column in columns):
            return None
        n = len(self._differences)
        mask = self._mask[..., :n, :][..., columns]
        spec = "un,ubtd->nbtd" if mask.ndim == 2 else "bun,ubtd->nbtd"
        return torch.einsum(spec, mask, torch.stack(self._differences))

    def _destinations(self, layer: int, kind: str) -> list[Destination]:
        return [d for d in self._wiring.destinations if d.kind == kind and d.layer == layer]

    def _note_stream(self, name: str) -> Edit:
        def edit(live: Tensor) -> None:
            self._streams[name] = live.clone()

        return edit

    def _note_mlp(self, live: Tensor) -> None:
        self._differences.append(self._corrupt[len(self._differences)] - live)

    def _note_heads(self, layer: int) -> Edit:
        def edit(live: Tensor) -> None:
            for own in self._wiring.head_contributions(layer, live.clone()):
                self._differences.append(self._corrupt[len(self._differences)] - own)

        return edit

    def _rewrite_heads(self, layer: int, part: str) -> Edit:
        def edit(live: Tensor) -> None:
            delta = self._delta(self._destinations(layer, part))
            if delta is not None:
                stream = self._streams[self._wiring.at(layer, "hook_resid_pre")]
                live.copy_(self._wiring.read_heads(layer, part, stream + delta))

        return edit

    def _mlp_stream(self, layer: int) -> Tensor | None:
        delta = self._delta(self._destinations(layer, "mlp"))
        return None if delta is None else self._streams[self._wiring.mlp_reads(layer)] + delta[0]

    def _rewrite_mlp_input(self, layer: int) -> Edit:
        def edit(live: Tensor) -> None:
            stream = self._mlp_stream(layer)
            if stream is not None:
                live.copy_(self._wiring.normed(layer, "ln2", stream))

        return edit

    def _rewrite_mlp_output(self, layer: int) -> Edit:
        def edit(live: Tensor) -> None:
            stream = self._mlp_stream(layer)
            if stream is not None:
                live.copy_(self._wiring.mlp(layer, stream))

        return edit

    def _patch_logits(self, live: Tensor) -> None:
        delta = self._delta([self._wiring.destinations[-1]])
        if delta is not None:
            live.add_(delta[0])
