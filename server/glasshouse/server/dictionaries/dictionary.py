"""The one interface of every dictionary: SAE, transcoder, crosscoder, cross-layer transcoder.

Shapes. N positions, D = d_in, E = d_out, F = d_sae, S = number of hook points read, M = number written.

- A dictionary that reads one hook point takes x as (N, D); one that reads several takes x as (N, S, D),
  stacked in the order of `facts.hook_points_in`. The same holds on the way out: (N, E) when it writes one
  hook point, (N, M, E) in the order of `facts.hook_points_out` when it writes several.
- Features have one flat index 0..F-1 whatever the architecture. Where they come in groups (a cross-layer
  transcoder's source layers, a crosscoder's heads), `facts.group_sizes` gives the sizes in order and
  `flat_id(group, i)` the index.

Arithmetic is accumulated in float32 whatever the stored dtype. Where x and the weights are both bfloat16 the
encoder's product itself runs in bfloat16 (its kernel accumulates in float32, its output is rounded to
bfloat16); every other pair of dtypes is multiplied in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.dictionaries.features import SparseFeatures, TopKFeatures
from glasshouse.server.types.errors import InvalidArgument, NotFound
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True)
class DictionaryFacts:
    """What a dictionary is, without its weights.

    kind:         sae | transcoder | crosscoder | cross_layer_transcoder
    architecture: standard | gated | jumprelu | topk | batchtopk | groupmax | abstopk
    dtype:        of the stored encoder, such as bfloat16
    k:            features kept per position, where the architecture fixes it
    notes:        what a reader should know (approximations, guesses from file names), one sentence each
    """

    name: str
    kind: str
    architecture: str
    hook_points_in: tuple[str, ...]
    hook_points_out: tuple[str, ...]
    d_in: int
    d_out: int
    d_sae: int
    dtype: str
    source_format: str
    normalisation: str
    group_sizes: tuple[int, ...]
    k: int | None = None
    competing: bool = False
    has_skip: bool = False
    model_name: str = ""
    notes: tuple[str, ...] = ()

    def flat_id(self, group: int, feature: int) -> int:
        """The flat index of `feature` of the given group (source layer or head)."""
        return sum(self.group_sizes[:group]) + feature

    def group_of(self, feature: int) -> tuple[int, int]:
        """(group, index within it) of a flat feature id."""
        group = 0
        while feature >= self.group_sizes[group]:
            feature -= self.group_sizes[group]
            group += 1
        return group, feature


def stacked(sites: Sequence[Tensor]) -> Tensor:
    """What a dictionary takes of its hook points' (N, D) each: (N, D) of one, (N, S, D) of several."""
    return sites[0] if len(sites) == 1 else torch.stack(list(sites), dim=1)


class Dictionary(ABC):
    """One dictionary, its weights mapped from disk and read only where needed."""

    facts: DictionaryFacts

    @abstractmethod
    def encode(self, x: Tensor) -> SparseFeatures:
        """Every feature that fires on x: (N, D) or (N, S, D)."""

    @abstractmethod
    def encode_top_k(self, x: Tensor, k: int) -> TopKFeatures:
        """The k strongest of the features that fire, strongest first; fewer where fewer fire."""

    @abstractmethod
    def encode_features(self, x: Tensor, feature_ids: Tensor) -> Tensor:
        """(N, len(feature_ids)) float32 values of the named features only, 0 where one does not fire.

        Touches only those features' rows, unless the latents compete (`facts.competing`), where exactness
        needs the full selection.
        """

    @abstractmethod
    def feature_values(self, x: Tensor, feature_ids: Tensor) -> Tensor:
        """`encode_features` with gradients: a feature that fires moves with its pre-activation, one that does not
        stays at 0. Thresholds, gates and the choice of survivors are held.
        """

    @abstractmethod
    def decode(self, features: SparseFeatures, x: Tensor | None = None) -> Tensor:
        """(N, E) or (N, M, E) float32: what the features write, plus the decoder bias.

        With x, the input they came from, a skip connection is added and a normalisation that depends on
        the input is undone. Without it such an output stays in normalised units, and has no skip.
        """

    @abstractmethod
    def decoder_rows(self, feature_ids: Tensor) -> Tensor:
        """(len, E) or (len, M, E) float32: what one unit of each feature writes. Reads only those rows."""

    def decoder_rows_at(self, feature_ids: Tensor, site: int) -> Tensor:
        """(len, E) float32: `decoder_rows` at one of the hook points written, by its place among them."""
        rows = self.decoder_rows(feature_ids)
        return rows if rows.ndim == 2 else rows[:, site]

    def writes_at(self, group: int, site: int) -> bool:
        """Whether features of a group can write at a hook point, by its place among those written."""
        return True

    @abstractmethod
    def encoder_rows(self, feature_ids: Tensor) -> Tensor:
        """(len, D) or (len, S, D) float32: each feature's encoder direction. Reads only those rows."""

    @abstractmethod
    def output_scale(self, x: Tensor) -> Tensor:
        """(N, 1) or (N, M, 1): factor from `decoder_rows` to the output's units on these inputs.

        One everywhere unless a normalisation depends on the input (layer norm, constant norm).
        """

    @property
    @abstractmethod
    def decoder_norms(self) -> Tensor:
        """(F,) float32: L2 norm of all that each feature writes. Computed once, reads the whole decoder."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Dictionary:
        """The same dictionary with its weights copied to a device."""

    @abstractmethod
    def first_not_finite(self) -> str:
        """The name of the first weight with a NaN or infinite entry, or "". Reads every weight."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """What the dictionary makes of x: (N, E) or (N, M, E) float32."""
        return self.decode(self.encode(x), x)

    def error(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """target - reconstruct(x), float32, without gradient. A transcoder needs its target activations."""
        if target is None:
            if self.facts.kind in ("transcoder", "cross_layer_transcoder"):
                raise InvalidArgument(
                    f"dictionary {self.facts.name!r} is a {self.facts.kind}: its error needs the "
                    f"activations at {', '.join(self.facts.hook_points_out)}",
                    reason=reasons.FIELD_REQUIRED,
                    field="target",
                    remedy="Capture the output hook points too and pass them as the target.",
                )
            target = x
        with torch.no_grad():
            missed: Tensor = target.float() - self.reconstruct(x)
        return missed

    def steering_delta(self, x: Tensor, feature_ids: Tensor, deltas: Tensor) -> Tensor:
        """What changing features by `deltas` (N, len) adds to the output: (N, E) or (N, M, E) float32.

        The error term is untouched: output + this keeps everything the dictionary does not explain.
        """
        rows = self.decoder_rows(feature_ids)
        moved: Tensor = torch.tensordot(deltas.float(), rows, dims=1)
        return moved * self.output_scale(x)

    def check_feature_ids(self, feature_ids: Tensor, field: str = "feature_ids") -> None:
        """Refuses ids outside 0..F-1 with NOT_FOUND."""
        if feature_ids.numel() == 0:
            return
        low, high = int(feature_ids.min()), int(feature_ids.max())
        if low < 0 or high >= self.facts.d_sae:
            wrong = low if low < 0 else high
            raise NotFound(
                f"dictionary {self.facts.name!r} has no feature {wrong}: it has {self.facts.d_sae}",
                reason=reasons.FEATURE_OUT_OF_RANGE,
                resource_type="feature",
                resource_name=f"{self.facts.name}/{wrong}",
                field=field,
                remedy=f"Use a feature index from 0 to {self.facts.d_sae - 1}.",
            )
