"""The local replacement model: the model on one prompt with its MLPs taken apart into features and an error.

https://transformer-circuits.pub/2025/attribution-graphs/methods.html

1. One pass reads every transcoder's input, every MLP contribution and the embeddings, and records the attention
   patterns and norm scales. error = contribution - reconstruction; features and error are zero at position 0.
2. With patterns and scales held and gradients flowing along attention, norms and skips alone, the model is linear
   from any contribution to any later transcoder input and to the logits: `frozen_paths`.
3. A row: a vector injected as the gradient at a target's input (a feature's encoder row, or an unembedding column
   less its mean over the vocabulary, after the final norm), contracted with what every source writes, is the
   source's direct effect on the target.
4. What sources write is gathered from the dictionaries' files a layer at a time, each distinct feature once, and kept
   only while all of it fits in `KEPT_BYTES`; encoder rows are gathered for the rows at hand.

Reconstructions hold the decoder's bias, learned positions have no node: incoming edges do not sum to a
pre-activation.

Shapes: n rows, T positions, S latest position of a batch + 1, D d_model, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.frozen_paths import EMBEDDING, FrozenPaths, Read
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.transcoders import ActiveFeatures, Transcoders

EMBED = "hook_embed"

KEPT_BYTES = 256 << 20
"""The most that is kept of gathered decoder rows between batches."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """What the features of one layer write at one contribution. rows: (U, D) of the distinct features; of the
    features at position p, `starts[p]` to `starts[p + 1]` in order, `which` says whose row each is (m,).
    """

    rows: Tensor
    which: Tensor
    starts: list[int]


class LocalModel:
    """One prompt through the replacement model. tokens: (1, T)."""

    def __init__(
        self, model: GradientModel, transcoders: Transcoders, tokens_T: Tensor, *, skip_first: bool = True
    ) -> None:
        self.model, self.transcoders = model, transcoders
        self.tokens = model.tokens(tokens_T)
        self.skip_first = skip_first
        reads = sorted(set(transcoders.reads.values()))
        with torch.no_grad():
            run = model.forward(self.tokens, read=[EMBED, *reads, *transcoders.written], record=True)
            self.logits = run.logits()[0]
            fired = transcoders.encode(run.readings)
            self.features: ActiveFeatures = transcoders.active(fired, skip_first=skip_first)
            self.mlp_out = torch.stack([run.readings[name][0] for name in transcoders.written])
            self.errors = self.mlp_out - transcoders.reconstruction(fired, run.readings)
            if skip_first:
                self.errors[:, 0] = 0
            self.embeddings = run.readings[EMBED][0]
            self.paths = FrozenPaths(model, run.held, transcoders.skips())
        self.held, self.inputs = run.held, {name: run.readings[name] for name in reads}
        bounds = torch.searchsorted(
            self.features.layers, torch.arange(model.n_layers + 1, device=self.tokens.device)
        )
        self.first_of_layer: list[int] = bounds.tolist()
        self._kept: dict[tuple[int, int], Written] = {}
        self._kept_bytes = 0

    @property
    def n_positions(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def n_sources(self) -> int:
        """Features, errors (layer-major) and tokens: the columns of a row."""
        return len(self.features) + (self.model.n_layers + 1) * self.n_positions

    @torch.no_grad()
    def feature_rows(self, features: Tensor) -> Tensor:
        """(n, n_sources) direct effects on features of one layer, by their places (n,) in `features`."""
        chosen = self.features.select(features)
        read = self.paths.read(self.transcoders.reads[int(chosen.layers[0])])
        return self._rows(read, chosen.positions, self.transcoders.encoder_rows(chosen))

    @torch.no_grad()
    def logit_rows(self, vectors_nD: Tensor) -> Tensor:
        """(n, n_sources) direct effects on the last position's stream after the final norm, along each vector."""
        last = torch.full((len(vectors_nD),), self.n_positions - 1, device=self.tokens.device)
        return self._rows(self.paths.final, last, vectors_nD)

    def sources_of(self, layer: int, position: int) -> Tensor:
        """Columns int32 that can have an effect on a feature of `layer` at `position` (a logit is of layer L)."""
        n_features, n_positions = len(self.features), self.n_positions
        device = self.tokens.device
        early = self.features.positions[: self.first_of_layer[layer]] <= position
        begin = int(self.skip_first)
        places = torch.arange(position + 1, dtype=torch.int32, device=device)
        layers = torch.arange(layer, dtype=torch.int32, device=device)[:, None]
        errors = n_features + layers * n_positions + places[None, begin:]
        tokens = n_features + self.model.n_layers * n_positions + places
        return torch.cat([early.nonzero().squeeze(1).int(), errors.flatten(), tokens])

    def _rows(self, read: Read, positions: Tensor, vectors: Tensor) -> Tensor:
        n_features, n_positions = len(self.features), self.n_positions
        out = torch.zeros(len(vectors), self.n_sources, device=vectors.device)
        for layer, g_SnD in self.paths.walk(read, positions, vectors):
            n_steps = len(g_SnD)
            here, start = (
                (self.embeddings, n_features + self.model.n_layers * n_positions)
                if layer == EMBEDDING
                else (self.errors[layer], n_features + layer * n_positions)
            )
            out[:, start : start + n_steps] = torch.bmm(g_SnD, here[:n_steps, :, None])[..., 0].T
            for writer in () if layer == EMBEDDING else self.transcoders.writers(layer):
                self._contract(out, g_SnD, writer, layer)
        out[:, :n_features] *= self.features.values
        return out

    def _contract(self, out: Tensor, g_SnD: Tensor, read: int, layer: int) -> None:
        written = self._written(read, layer)
        first = self.first_of_layer[read]
        for position, g_nD in enumerate(g_SnD):
            low, high = written.starts[position], written.starts[position + 1]
            if low < high:
                rows = written.rows[written.which[low:high]]
                out[:, first + low : first + high].addmm_(g_nD, rows.T)

    def _written(self, read: int, layer: int) -> Written:
        kept = self._kept.get((read, layer))
        if kept is not None:
            return kept
        low, high = self.first_of_layer[read], self.first_of_layer[read + 1]
        distinct, which = self.features.indices[low:high].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        steps = torch.arange(self.n_positions + 1, device=which.device)
        made = Written(
            rows=self.transcoders.rows_at(read, distinct, layer),
            which=which,
            starts=torch.searchsorted(self.features.positions[low:high], steps).tolist(),
        )
        n_bytes = 4 * made.rows.numel()
        if self._kept_bytes + n_bytes <= KEPT_BYTES:
            self._kept[read, layer] = made
            self._kept_bytes += n_bytes
        return made


def logit_vector(model: GradientModel, token_id: int) -> Tensor:
    """(D,): an unembedding column less its mean over the vocabulary, before any soft cap."""
    return logit_vectors(model, [token_id])[0]


def logit_vectors(model: GradientModel, token_ids: Sequence[int]) -> Tensor:
    """(n, D): `logit_vector` of several tokens."""
    head = model.loaded.model.get_submodule(model.loaded.family.head)
    weight: Tensor = head.weight  # type: ignore[assignment]
    return (weight[list(token_ids)] - weight.mean(0)).detach()
