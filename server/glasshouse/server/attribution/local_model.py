"""The local replacement model: the model on one prompt with its MLPs taken apart into features and an error.

https://transformer-circuits.pub/2025/attribution-graphs/methods.html

1. One pass reads every transcoder's input, every MLP contribution and the embeddings, and records the attention
   patterns and norm scales. error = contribution - reconstruction; features and error are zero at position 0.
2. A second pass with patterns and scales held and every MLP contribution y replaced by
   skip + (y - skip).detach(): the numbers are the model's, and gradients flow along attention, norms and skips
   alone. It is linear from any contribution to any later transcoder input and to the logits.
3. A row: a vector injected as the gradient at a target's input (a feature's encoder row, or an unembedding column
   less its mean over the vocabulary, after the final norm) gives, contracted with what every source writes, the
   source's direct effect on the target. Rows share one graph: their backward passes are one, with the rows in front.

Reconstructions hold the decoder's bias, learned positions have no node: incoming edges do not sum to a
pre-activation.

Shapes: B rows, T positions, D d_model, L layers, n active features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.freezing import Freeze, stop_gradient
from glasshouse.server.attribution.gradient_model import Edit, GradientModel, Pass
from glasshouse.server.attribution.transcoders import ActiveFeatures, Transcoders

EMBED = "hook_embed"


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A row to compute: `vector` (D,) injected at the hook point read, or, with no hook point, at the stream after
    the final norm.
    """

    hook_point: str | None
    position: int
    vector: Tensor


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
        self.held, self.inputs = run.held, {name: run.readings[name] for name in reads}
        self._encoder_rows = transcoders.encoder_rows(self.features)
        self._writes = self._by_position(transcoders.decoder_rows(self.features))

    @property
    def n_sources(self) -> int:
        """Features, errors (layer-major) and tokens: the columns of a row."""
        n_layers, n_positions = self.errors.shape[:2]
        return len(self.features) + (n_layers + 1) * n_positions

    def feature_target(self, feature: int) -> Target:
        """The row of an active feature, by its place in `features`."""
        return Target(
            hook_point=self.transcoders.reads[int(self.features.layers[feature])],
            position=int(self.features.positions[feature]),
            vector=self._encoder_rows[feature],
        )

    def linear_pass(self) -> Pass:
        """The second pass; its graph serves every row that is asked of it."""
        written = self.transcoders.written
        edits: dict[str, list[Edit]] = {}
        inputs: dict[str, Tensor] = {}
        for read, layer, W_skip in self.transcoders.skips():
            edits.setdefault(read, []).append(_noting(inputs, read))
            edits.setdefault(written[layer], []).append(_linear_in_skip(inputs, read, W_skip))
        for layer in range(len(written)):  # cut at the neurons, so that no MLP is walked through backwards
            edits[f"blocks.{layer}.mlp.hook_post"] = [stop_gradient]
        return self.model.forward(
            self.tokens,
            read=self.inputs,
            differentiate=[EMBED, *written],
            edits=edits,
            freeze=Freeze(patterns=True, norms=True, held=self.held),
        )

    def rows(self, run: Pass, targets: Sequence[Target]) -> Tensor:
        """(len(targets), n_sources): the direct effect of every source on each target."""
        n_targets, n_positions = len(targets), run.hidden.shape[1]
        vectors: dict[str | None, Tensor] = {}
        for row, target in enumerate(targets):
            if target.hook_point not in vectors:
                vectors[target.hook_point] = run.hidden.new_zeros(n_targets, *run.hidden.shape)
            vectors[target.hook_point][row, 0, target.position] = target.vector
        outputs = [run.hidden if name is None else run.readings[name] for name in vectors]
        found = run.pull_back(outputs, list(vectors.values()), retain=True, n_rows=n_targets)
        gradients = {name: gradient[:, 0] for name, gradient in found.items()}

        n_features = len(self.features)
        out = torch.zeros(n_targets, self.n_sources, device=run.hidden.device)
        for layer, name in enumerate(self.transcoders.written):
            gradient_BTD = gradients[name]
            for position, (places, rows_mD) in self._writes.get(layer, {}).items():
                out[:, places] += gradient_BTD[:, position] @ rows_mD.T
            start = n_features + layer * n_positions
            errors = torch.einsum("btd,td->bt", gradient_BTD, self.errors[layer])
            out[:, start : start + n_positions] = errors
        tokens = torch.einsum("btd,td->bt", gradients[EMBED], self.embeddings)
        out[:, -n_positions:] = tokens
        return out

    def _by_position(
        self, writes: dict[int, tuple[Tensor, Tensor]]
    ) -> dict[int, dict[int, tuple[Tensor, Tensor]]]:
        """layer -> position -> (places, value * decoder row (m, D)): one product a layer and position."""
        found: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        for layer, (places, rows) in writes.items():
            scaled = rows * self.features.values[places, None]
            positions = self.features.positions[places]
            found[layer] = {
                position: (places[positions == position], scaled[positions == position])
                for position in sorted(set(positions.tolist()))
            }
        return found


def _noting(inputs: dict[str, Tensor], name: str) -> Edit:
    def edit(live: Tensor) -> None:
        inputs[name] = live.clone()

    return edit


def _linear_in_skip(inputs: dict[str, Tensor], read: str, W_skip: Tensor) -> Edit:
    def edit(live: Tensor) -> None:
        skip = inputs[read] @ W_skip
        live.copy_(skip + (live - skip).detach())

    return edit


def logit_vector(model: GradientModel, token_id: int) -> Tensor:
    """(D,): an unembedding column less its mean over the vocabulary, before any soft cap."""
    head = model.loaded.model.get_submodule(model.loaded.family.head)
    weight: Tensor = head.weight  # type: ignore[assignment]
    return (weight[token_id] - weight.mean(0)).detach()
