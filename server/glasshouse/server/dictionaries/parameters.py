"""The parts a dictionary is made of, whatever file they came from.

Every format's loader ends in one `DictionaryParameters`; `glasshouse.server.dictionaries.linear` computes
with it. Weights are views of the mapped files in their stored dtype: a layout on disk that is transposed
against ours is a strided view here, never a copy.

A feature belongs to a *group*. An ordinary SAE has one group. A cross-layer transcoder has one a source
layer.

- `EncoderBlock`  makes the pre-activations of one group, or of `repeats` groups that share one product
- `DecoderBlock`  what the features of one group write at one hook point
- `Skip`          y[site_out] += x[site_in] @ W, on the raw x
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from glasshouse.server.dictionaries.architectures.activation import Activation
from glasshouse.server.dictionaries.normalisation import Identity, Normalisation
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.wire import reasons

KINDS = ("sae", "transcoder", "crosscoder", "cross_layer_transcoder")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EncoderBlock:
    """W_enc: (len(sites) * D, F_group), the sites' activations concatenated in that order."""

    W_enc: Tensor
    sites: tuple[int, ...] = (0,)
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class DecoderBlock:
    """W_dec: (F_group, E), what group `group` writes at output `site`."""

    W_dec: Tensor
    group: int = 0
    site: int = 0


@dataclass(frozen=True, kw_only=True)
class Skip:
    """W_skip: (D, E), logical layout: y[site_out] += x[site_in] @ W_skip."""

    W_skip: Tensor
    site_in: int = 0
    site_out: int = 0


@dataclass(frozen=True, kw_only=True)
class DecoderScale:
    """Pre-activations are multiplied by c = l2 * ||all a feature writes|| + total * (sum of its norms per
    site).

    keep: values stay multiplied and the decoder divides by c (SAELens' rescale_acts_by_decoder_norm, and the
    decoder folding of dictionary_learning's AutoEncoder); otherwise values are divided by c again and only
    the selection sees it (lm-saes' sparsity_include_decoder_norm, science-of-finetuning's code
    normalisation).
    """

    keep: bool
    l2: float = 1.0
    total: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DictionaryParameters:
    """All of one dictionary.

    b_enc: (F,) or None; b_dec: (M, E) or None; b_in: (S, D) subtracted from the normalised input, or None.
    """

    kind: str
    hook_points_in: tuple[str, ...]
    hook_points_out: tuple[str, ...]
    encoders: tuple[EncoderBlock, ...]
    decoders: tuple[DecoderBlock, ...]
    activation: Activation
    source_format: str
    b_enc: Tensor | None = None
    b_dec: Tensor | None = None
    b_in: Tensor | None = None
    skips: tuple[Skip, ...] = ()
    normalisation: Normalisation = field(default_factory=Identity)
    scale: DecoderScale | None = None
    model_name: str = ""
    notes: tuple[str, ...] = ()

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return tuple(size for block in self.encoders for size in [block.W_enc.shape[1]] * block.repeats)

    @property
    def d_in(self) -> int:
        return self.encoders[0].W_enc.shape[0] // len(self.encoders[0].sites)

    @property
    def d_out(self) -> int:
        return self.decoders[0].W_dec.shape[1]

    def map_tensors(self, function: Any) -> DictionaryParameters:
        """The same parameters with every tensor passed through `function`."""
        mapped: DictionaryParameters = _map(self, function)
        return mapped

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Every tensor with a name for messages."""
        found: list[tuple[str, Tensor]] = []
        _walk(self, "", found)
        return found

    def check(self, path: str) -> None:
        """Refuses parts that disagree with each other, naming both."""
        sizes = self.group_sizes
        d_in, d_out, d_sae = self.d_in, self.d_out, sum(sizes)
        for i, encoder in enumerate(self.encoders):
            _agree(path, f"encoder {i} width", encoder.W_enc.shape[0], d_in * len(encoder.sites))
            _agree(path, f"encoder {i} last site", max(encoder.sites) < len(self.hook_points_in), True)
        for decoder in self.decoders:
            expected = (sizes[decoder.group], d_out)
            where = f"decoder of group {decoder.group} to {self.hook_points_out[decoder.site]}"
            _agree(path, where, tuple(decoder.W_dec.shape), expected)
        if self.b_enc is not None:
            _agree(path, "encoder bias", tuple(self.b_enc.shape), (d_sae,))
        if self.b_dec is not None:
            _agree(path, "decoder bias", tuple(self.b_dec.shape), (len(self.hook_points_out), d_out))
        if self.b_in is not None:
            _agree(path, "input bias", tuple(self.b_in.shape), (len(self.hook_points_in), d_in))
        for skip in self.skips:
            _agree(path, "skip connection", tuple(skip.W_skip.shape), (d_in, d_out))
        for name, value in vars(self.activation).items():
            if isinstance(value, Tensor):
                _agree(path, name, tuple(value.shape), (d_sae,))
        selection = self.activation.selection
        if selection is not None:
            room = min(sizes) if selection.per_group else d_sae
            if not 0 < selection.k <= room:
                raise malformed(path, f"k is {selection.k}, expected 1 to {room}")
            if selection.groups and d_sae % selection.groups:
                raise malformed(path, f"{d_sae} features do not divide into {selection.groups} groups")


def malformed(path: str, message: str, remedy: str = "") -> FailedPrecondition:
    """FAILED_PRECONDITION / DICTIONARY_MALFORMED about one file or folder."""
    return FailedPrecondition(
        f"{path}: {message}",
        reason=reasons.DICTIONARY_MALFORMED,
        field="path",
        value=path,
        remedy=remedy
        or "Check that the file is whole and in the format it claims; download or export it again.",
        metadata={"path": path},
    )


def _agree(path: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise malformed(path, f"{what} is {found}, expected {expected} from the other tensors")


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map(item, function) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: _map(getattr(value, f.name), function) for f in fields(value) if f.init}
        return replace(value, **changes)
    return value


def _walk(value: Any, name: str, found: list[tuple[str, Tensor]]) -> None:
    if isinstance(value, Tensor):
        found.append((name, value))
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            _walk(item, f"{name}[{i}]", found)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            _walk(getattr(value, f.name), f"{name}.{f.name}" if name else f.name, found)


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
