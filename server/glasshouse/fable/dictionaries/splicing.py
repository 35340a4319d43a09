"""The model's loss with a dictionary in it: CE loss recovered = (CE_zero - CE_spliced) / (CE_zero - CE_clean).

What is spliced, always from the same weights and text, BOS left as it is:

- SAE: the reconstruction in place of the stream at its hook point.
- Transcoder: what it makes of the MLP's input in place of the MLP's output.
- Cross-layer transcoder: all MLP outputs at once, each made of what the layers before it read in the spliced
  pass itself, so that errors compound.
- Crosscoder: one layer at a time, the reconstruction of that layer from the clean streams of all layers; the
  loss recovered is the mean over layers.

Zero replaces the same hook points by zeros at every position, BOS too, as SAELens does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.fable.dictionaries.activations import padded_batches
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.hooks.attachment import attach
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.types.hook_points import HookPoint


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Nats per token: the model's own, spliced, and with zeros; one entry a spliced set of hook points."""

    clean: float
    spliced: list[float]
    zero: list[float]

    @property
    def recovered_each(self) -> list[float]:
        pairs = zip(self.spliced, self.zero, strict=True)
        return [(zero - spliced) / (zero - self.clean) for spliced, zero in pairs]

    @property
    def recovered(self) -> float:
        return sum(self.recovered_each) / len(self.recovered_each)

    @property
    def rise(self) -> float:
        """Nats per token that the splice costs, mean over the spliced sets."""
        return sum(self.spliced) / len(self.spliced) - self.clean


class Batch:
    """One padded batch: ids (B, P) and the positions `keep` (B, P) that are neither padding nor BOS."""

    def __init__(self, table: HookTable, ids_BP: Tensor, mask_BP: Tensor) -> None:
        self.table = table
        self.ids_BP = ids_BP
        self.mask_BP = mask_BP
        self.keep_BP = mask_BP & (ids_BP != table.loaded.bos_token_id)

    def loss(
        self, hook_points: Sequence[str] = (), edit: Callable[[HookPoint, Tensor], bool] | None = None
    ) -> tuple[float, int]:
        """(sum of nats, predicted tokens) with `edit` at some hook points."""
        loaded = self.table.loaded
        positions_BP = torch.arange(self.ids_BP.shape[1]).expand_as(self.ids_BP)
        with attach(self.table, hook_points if edit else (), edit or _look_away):
            hidden_BPD = loaded.family.forward_hidden(loaded.model, self.ids_BP, positions_BP)
        predicted_BP = self.mask_BP[:, 1:]
        logits_NV, _ = loaded.family.unembed(loaded.model, hidden_BPD[:, :-1][predicted_BP])
        targets_N = self.ids_BP[:, 1:][predicted_BP]
        nats = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        return float(nats), int(predicted_BP.sum())

    def capture(self, hook_points: Sequence[str]) -> dict[str, Tensor]:
        """(N, width) clean activations of the kept positions."""
        found: dict[str, Tensor] = {}

        def take(point: HookPoint, tensor: Tensor) -> bool:
            found[point.name] = tensor[self.keep_BP].clone()
            return False

        self.loss(hook_points, take)
        return found


def _look_away(point: HookPoint, tensor: Tensor) -> bool:
    return False


def _zero(point: HookPoint, tensor: Tensor) -> bool:
    tensor.zero_()
    return True


Splice = Callable[[Batch], tuple[float, int]]


def _splice_stream(dictionary: Dictionary) -> list[tuple[Splice, tuple[str, ...]]]:
    points = dictionary.facts.hook_points_in

    def run(batch: Batch) -> tuple[float, int]:
        def edit(point: HookPoint, tensor: Tensor) -> bool:
            tensor[batch.keep_BP] = dictionary.reconstruct(tensor[batch.keep_BP])
            return True

        return batch.loss(points, edit)

    return [(run, points)]


def _splice_mlps(dictionary: Dictionary) -> list[tuple[Splice, tuple[str, ...]]]:
    """Transcoders of one or of all layers: output m is made of the inputs that have been read when m is due."""
    facts = dictionary.facts
    order_in = {name: index for index, name in enumerate(facts.hook_points_in)}
    order_out = {name: index for index, name in enumerate(facts.hook_points_out)}

    def run(batch: Batch) -> tuple[float, int]:
        read_NSD = torch.zeros(int(batch.keep_BP.sum()), len(order_in), facts.d_in)

        def edit(point: HookPoint, tensor: Tensor) -> bool:
            if point.name in order_in:
                read_NSD[:, order_in[point.name]] = tensor[batch.keep_BP]
                return False
            made = dictionary.reconstruct(read_NSD if len(order_in) > 1 else read_NSD[:, 0])
            made_NME = made.view(len(read_NSD), len(order_out), facts.d_out)
            tensor[batch.keep_BP] = made_NME[:, order_out[point.name]]
            return True

        return batch.loss((*facts.hook_points_in, *facts.hook_points_out), edit)

    return [(run, facts.hook_points_out)]


def _splice_each_layer(dictionary: Dictionary) -> list[tuple[Splice, tuple[str, ...]]]:
    points = dictionary.facts.hook_points_in

    def splice_at(index: int) -> Splice:
        def run(batch: Batch) -> tuple[float, int]:
            found = batch.capture(points)
            made_NMD = dictionary.reconstruct(torch.stack([found[point] for point in points], dim=1))

            def edit(point: HookPoint, tensor: Tensor) -> bool:
                tensor[batch.keep_BP] = made_NMD[:, index]
                return True

            return batch.loss((points[index],), edit)

        return run

    return [(splice_at(index), (point,)) for index, point in enumerate(points)]


def splices_of(dictionary: Dictionary) -> list[tuple[Splice, tuple[str, ...]]]:
    """Each way this dictionary is spliced, with the hook points it replaces."""
    if dictionary.facts.kind == "sae":
        return _splice_stream(dictionary)
    return (
        _splice_each_layer(dictionary) if dictionary.facts.kind == "crosscoder" else _splice_mlps(dictionary)
    )


class LossMeter:
    """Losses of dictionaries on one set of rows; the clean and the zeroed ones are measured once each."""

    def __init__(self, table: HookTable, rows: Sequence[list[int]]) -> None:
        self._batches = [Batch(table, ids_BP, mask_BP) for ids_BP, mask_BP in padded_batches(rows)]
        self._zeroed: dict[tuple[str, ...], float] = {}
        self.n_tokens = sum(int(batch.mask_BP[:, 1:].sum()) for batch in self._batches)
        self.clean = self._mean(lambda batch: batch.loss())

    @torch.inference_mode()
    def _mean(self, run: Splice) -> float:
        parts = [run(batch) for batch in self._batches]
        return sum(nats for nats, _ in parts) / sum(count for _, count in parts)

    def _zero(self, points: tuple[str, ...]) -> float:
        if points not in self._zeroed:
            self._zeroed[points] = self._mean(lambda batch: batch.loss(points, _zero))
        return self._zeroed[points]

    def measure(self, dictionary: Dictionary) -> Losses:
        """The losses of one dictionary."""
        splices = splices_of(dictionary)
        return Losses(
            clean=self.clean,
            spliced=[self._mean(run) for run, _ in splices],
            zero=[self._zero(points) for _, points in splices],
        )
