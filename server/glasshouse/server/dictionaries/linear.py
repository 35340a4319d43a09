"""`LinearDictionary`: every architecture of the field is an affine encode, a nonlinearity and an affine
decode.

1. x~ = normalise(x) - b_in
2. h = x~ W_enc + b_enc, per encoder block; times c, where a decoder-norm scale c applies
3. the architecture scores h and, where latents compete, picks the survivors
4. f = score, or score / c where the scale is for the selection alone
5. y = denormalise(f W_dec (/ c where values stay scaled) + b_dec) + x W_skip

Section 6 of the formats' reference; `parameters.py` says what the parts are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from glasshouse.server.dictionaries import encode as tiled
from glasshouse.server.dictionaries.decode import weighted_rows
from glasshouse.server.dictionaries.dictionary import Dictionary, DictionaryFacts
from glasshouse.server.dictionaries.encode import ROWS_AT_A_TIME, Tile
from glasshouse.server.dictionaries.features import NO_FEATURE, SparseFeatures, TopKFeatures
from glasshouse.server.dictionaries.parameters import DictionaryParameters, EncoderBlock, dtype_name
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

#: Rows of a decoder read at a time when all its norms are wanted.
NORM_ROWS = 8192
#: An encoder of at most this many elements is kept in float32 beside its stored form once it has been used.
KEPT_WIDE = 4 << 20


class LinearDictionary(Dictionary):
    """A dictionary over `DictionaryParameters`. Immutable and safe to share between threads."""

    def __init__(self, name: str, parameters: DictionaryParameters) -> None:
        p = parameters
        self.parameters = p
        self.facts = DictionaryFacts(
            name=name,
            kind=p.kind,
            architecture=p.activation.name,
            hook_points_in=p.hook_points_in,
            hook_points_out=p.hook_points_out,
            d_in=p.d_in,
            d_out=p.d_out,
            d_sae=sum(p.group_sizes),
            dtype=dtype_name(p.encoders[0].W_enc.dtype),
            source_format=p.source_format,
            normalisation=p.normalisation.name,
            group_sizes=p.group_sizes,
            k=p.activation.k,
            competing=p.activation.competing,
            has_skip=bool(p.skips),
            model_name=p.model_name,
            notes=p.notes,
        )
        self._wide: dict[int, Tensor] = {}
        self._offsets = (0, *itertools.accumulate(p.group_sizes))

    # ---- encode ----

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseFeatures:
        sites = self._sites(x)
        parts = [self._encode_rows(rows) for rows in torch.split(sites, ROWS_AT_A_TIME)]
        return tiled.concatenate(parts)

    def _encode_rows(self, sites: Tensor) -> SparseFeatures:
        n_rows, d_sae = sites.shape[0], self.facts.d_sae
        selection = self.parameters.activation.selection
        if selection is not None:
            ids, scores = tiled.select(self._tiles(sites), n_rows, d_sae, selection)
            table = TopKFeatures(ids=ids, values=self._values(ids, scores), d_sae=d_sae)
            return table.sparse()
        fired = tiled.compact(self._tiles(sites), n_rows, d_sae)
        return fired.with_values(self._values(fired.ids, fired.values))

    @torch.no_grad()
    def encode_top_k(self, x: Tensor, k: int) -> TopKFeatures:
        if k < 1:
            raise InvalidArgument(
                f"k is {k}",
                reason=reasons.VALUE_OUT_OF_RANGE,
                field="top_k",
                value=k,
                remedy="Ask for at least 1.",
            )
        parts = [self._top_k_rows(rows, k) for rows in torch.split(self._sites(x), ROWS_AT_A_TIME)]
        if len(parts) == 1:
            return parts[0]
        return TopKFeatures(
            ids=torch.cat([p.ids for p in parts]),
            values=torch.cat([p.values for p in parts]),
            d_sae=self.facts.d_sae,
        )

    def _top_k_rows(self, sites: Tensor, k: int) -> TopKFeatures:
        d_sae = self.facts.d_sae
        activation = self.parameters.activation
        selection = activation.selection
        wanted = min(k, d_sae)
        reordered = self.parameters.scale is not None and not self.parameters.scale.keep
        if selection is None and not reordered:
            ids, scores = tiled.top_k(self._tiles(sites), wanted, 0.0, by_magnitude=False)
        elif selection is not None and not (selection.groups or selection.per_group or reordered):
            ids, scores = tiled.top_k(
                self._tiles(sites), min(wanted, selection.k), selection.floor, selection.by_magnitude
            )
        else:
            return self._strongest(self._encode_rows(sites), k)
        return tiled.strongest_first(ids, self._values(ids, scores), k, d_sae)

    def _strongest(self, fired: SparseFeatures, k: int) -> TopKFeatures:
        """The k strongest of what fired, where the order of the values is not the order of the scores."""
        n_rows, d_sae = fired.n_positions, self.facts.d_sae
        counts = fired.indptr.diff()
        most = int(counts.max()) if n_rows else 0
        ids = torch.full((n_rows, most), NO_FEATURE, dtype=torch.int32, device=fired.ids.device)
        values = torch.zeros(n_rows, most, device=fired.ids.device)
        rows = fired.rows
        slot = torch.arange(rows.numel(), device=rows.device) - fired.indptr[:-1][rows]
        ids[rows, slot], values[rows, slot] = fired.ids, fired.values
        keys = values.masked_fill(ids == NO_FEATURE, -torch.inf)
        order = keys.argsort(dim=1, descending=True)[:, :k]
        return tiled.strongest_first(ids.gather(1, order), values.gather(1, order), k, d_sae)

    @torch.no_grad()
    def encode_features(self, x: Tensor, feature_ids: Tensor) -> Tensor:
        self.check_feature_ids(feature_ids)
        device = self.parameters.encoders[0].W_enc.device
        feature_ids = feature_ids.to(device).long()
        sites = self._sites(x)
        out = torch.zeros(sites.shape[0], feature_ids.numel(), device=device)
        if self.facts.competing:
            place = torch.full((self.facts.d_sae,), -1, dtype=torch.long, device=device)
            place[feature_ids] = torch.arange(feature_ids.numel(), device=device)
            fired = self.encode(x)
            columns = place[fired.ids.long()]
            keep = columns >= 0
            out[fired.rows[keep], columns[keep]] = fired.values[keep]
            return out[:, place[feature_ids]]
        for here, h in self._pre_activations(sites, feature_ids):
            ids = feature_ids[here]
            out[:, here] = self._values(ids.unsqueeze(0), self.parameters.activation.score(h, ids))
        return out

    def feature_values(self, x: Tensor, feature_ids: Tensor) -> Tensor:
        exact = self.encode_features(x.detach(), feature_ids)
        feature_ids = feature_ids.to(exact.device).long()
        slope = self.parameters.activation.slope(feature_ids).expand(feature_ids.numel())
        if self.parameters.scale is not None and not self.parameters.scale.keep:
            slope = slope / self._scale[feature_ids]
        moved = torch.zeros_like(exact)
        for here, h in self._pre_activations(self._sites(x), feature_ids):
            moved[:, here] = (h - h.detach()) * slope[here]
        return exact + (exact != 0) * moved

    def _pre_activations(self, sites: Tensor, feature_ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(which of the ids, their (scaled) pre-activations (N, some) float32), block by block."""
        first = 0
        for block in self.parameters.encoders:
            x_flat = self._block_input(sites, block)
            for _ in range(block.repeats):
                size = block.W_enc.shape[1]
                here = ((feature_ids >= first) & (feature_ids < first + size)).nonzero().squeeze(1)
                if here.numel():
                    ids = feature_ids[here]
                    h = x_flat.float() @ block.W_enc[:, ids - first].float()
                    yield here, self._affine(h, ids)
                first += size

    def _sites(self, x: Tensor) -> Tensor:
        """x as (N, S, D), refused where its shape is not the dictionary's."""
        n_sites, d_in = len(self.facts.hook_points_in), self.facts.d_in
        expected = (d_in,) if n_sites == 1 else (n_sites, d_in)
        if tuple(x.shape[1:]) != expected:
            raise InvalidArgument(
                f"dictionary {self.facts.name!r} reads activations of shape (positions, "
                f"{', '.join(map(str, expected))}), found {tuple(x.shape)}",
                reason=reasons.WRONG_WIDTH,
                field="activations",
                value=tuple(x.shape),
                remedy=f"Give the activations at {', '.join(self.facts.hook_points_in)}.",
            )
        return x.unsqueeze(1) if n_sites == 1 else x

    def _block_input(self, sites: Tensor, block: EncoderBlock) -> Tensor:
        """(N, len(block.sites) * D) ready for the product, in the dtype the product runs in."""
        p = self.parameters
        half = sites.dtype == block.W_enc.dtype and sites.dtype == torch.bfloat16
        plain = p.b_in is None and p.normalisation.name == "none"
        x = sites
        if not plain:
            x = p.normalisation.enter(sites.float())
            if p.b_in is not None:
                x = x - p.b_in.float()
        if block.sites != tuple(range(x.shape[1])):
            x = x[:, list(block.sites)]
        return x.flatten(1).to(torch.bfloat16 if half else torch.float32)

    def _tiles(self, sites: Tensor) -> Iterator[Tile]:
        """Score tiles of every group, in the order of the flat ids except where groups share a product."""
        activation = self.parameters.activation
        group, first = 0, 0
        for index, block in enumerate(self.parameters.encoders):
            x = self._block_input(sites, block)
            size = block.W_enc.shape[1]
            W_enc, convert = self._weights(index, x.dtype)
            for start, product in tiled.products(x, W_enc, convert):
                if not activation.half_exact or self.parameters.scale is not None:
                    product = product.float()
                for repeat in range(block.repeats):
                    low = first + repeat * size + start
                    features = slice(low, low + product.shape[1])
                    h = product.clone() if repeat + 1 < block.repeats else product
                    yield Tile(low, group + repeat, activation.score(self._affine(h, features), features))
            group += block.repeats
            first += size * block.repeats

    def _weights(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """The encoder of a block for a product in `dtype`, and how its tiles are widened where they have to be.

        A small encoder is widened once and kept: a decoding step has few rows, and would spend more on widening than
        on the product.
        """
        W_enc = self.parameters.encoders[index].W_enc
        if W_enc.dtype == dtype:
            return W_enc, None
        if W_enc.numel() > KEPT_WIDE:
            return W_enc, _to_float32
        wide = self._wide.get(index)
        if wide is None:
            wide = self._wide[index] = _to_float32(W_enc)
        return wide, None

    def _affine(self, h: Tensor, features: slice | Tensor) -> Tensor:
        """h + b_enc, times the decoder-norm scale; in place."""
        b_enc = self.parameters.b_enc
        if b_enc is not None:
            h.add_(b_enc[features])
        if self.parameters.scale is not None:
            h.mul_(self._scale[features])
        return h

    def _values(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Float32 values of scores; `ids` broadcasts against them."""
        values = scores.float()
        if self.parameters.scale is not None and not self.parameters.scale.keep:
            values = values / self._scale[ids.clamp_min(0).long()]
        if self.facts.competing or values.ndim == 2:
            values = values.masked_fill((ids == NO_FEATURE).expand_as(values), 0.0)
        return values

    # ---- decode ----

    @torch.no_grad()
    def decode(self, features: SparseFeatures, x: Tensor | None = None) -> Tensor:
        p = self.parameters
        n_rows, n_out = features.n_positions, len(self.facts.hook_points_out)
        values = features.values
        if p.scale is not None and p.scale.keep:
            values = values / self._scale[features.ids.long()]
        out = torch.zeros(n_rows, n_out, self.facts.d_out, device=values.device)
        groups: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for block in p.decoders:
            if block.group not in groups:
                groups[block.group] = self._entries_of(block.group, features, values)
            indptr, ids, of_group = groups[block.group]
            if ids.numel():
                out[:, block.site] += weighted_rows(indptr, ids, of_group, block.W_dec)
        if p.b_dec is not None:
            out += p.b_dec.float()
        sites = None if x is None else self._sites(x).float()
        back = p.normalisation.fixed_way_back if sites is None else p.normalisation.way_back(sites)
        if back is not None and p.normalisation.name != "none":
            out = out * back.scale + back.shift
        if sites is not None:
            for skip in p.skips:
                out[:, skip.site_out] += sites[:, skip.site_in] @ skip.W_skip.float()
        return out.squeeze(1) if n_out == 1 else out

    def _entries_of(self, group: int, f: SparseFeatures, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(indptr, ids within the group, values) of one group's entries."""
        if len(self.facts.group_sizes) == 1:
            return f.indptr, f.ids, values
        low, high = self._offsets[group], self._offsets[group + 1]
        keep = (f.ids >= low) & (f.ids < high)
        indptr = torch.zeros_like(f.indptr)
        indptr[1:] = torch.bincount(f.rows[keep], minlength=f.n_positions).cumsum(0)
        return indptr, f.ids[keep] - low, values[keep]

    @torch.no_grad()
    def decoder_rows(self, feature_ids: Tensor) -> Tensor:
        self.check_feature_ids(feature_ids)
        rows = self._written_by(feature_ids.long(), range(len(self.facts.hook_points_out)))
        return rows.squeeze(1) if len(self.facts.hook_points_out) == 1 else rows

    @torch.no_grad()
    def decoder_rows_at(self, feature_ids: Tensor, site: int) -> Tensor:
        self.check_feature_ids(feature_ids)
        return self._written_by(feature_ids.long(), range(site, site + 1)).squeeze(1)

    def writes_at(self, group: int, site: int) -> bool:
        return any((block.group, block.site) == (group, site) for block in self.parameters.decoders)

    def _written_by(self, feature_ids: Tensor, sites: range) -> Tensor:
        """(len, len(sites), E) float32: what one unit of each feature writes at these hook points."""
        rows = self._stored_rows(feature_ids, sites)
        if self.parameters.scale is not None and self.parameters.scale.keep:
            rows = rows / self._scale[feature_ids].view(-1, 1, 1)
        back = self.parameters.normalisation.fixed_way_back
        if back is not None and self.parameters.normalisation.name != "none":
            scale = back.scale[sites.start : sites.stop] if back.scale.ndim == 2 else back.scale
            rows = rows * scale
        return rows

    def _stored_rows(self, feature_ids: Tensor, sites: range) -> Tensor:
        """(len, len(sites), E) float32 rows as stored."""
        device = self.parameters.decoders[0].W_dec.device
        feature_ids = feature_ids.to(device)
        rows = torch.zeros(feature_ids.numel(), len(sites), self.facts.d_out, device=device)
        for block in self.parameters.decoders:
            if block.site not in sites:
                continue
            low, high = self._offsets[block.group], self._offsets[block.group + 1]
            here = ((feature_ids >= low) & (feature_ids < high)).nonzero().squeeze(1)
            if here.numel():
                rows[here, block.site - sites.start] += block.W_dec[feature_ids[here] - low].float()
        return rows

    @torch.no_grad()
    def encoder_rows(self, feature_ids: Tensor) -> Tensor:
        self.check_feature_ids(feature_ids)
        n_sites, d_in = len(self.facts.hook_points_in), self.facts.d_in
        device = self.parameters.encoders[0].W_enc.device
        feature_ids = feature_ids.to(device).long()
        rows = torch.zeros(feature_ids.numel(), n_sites, d_in, device=device)
        first = 0
        for block in self.parameters.encoders:
            size = block.W_enc.shape[1]
            for _ in range(block.repeats):
                here = ((feature_ids >= first) & (feature_ids < first + size)).nonzero().squeeze(1)
                if here.numel():
                    picked = block.W_enc[:, feature_ids[here] - first].float().T
                    rows[here.unsqueeze(1), list(block.sites)] = picked.reshape(-1, len(block.sites), d_in)
                first += size
        return rows.squeeze(1) if n_sites == 1 else rows

    @torch.no_grad()
    def output_scale(self, x: Tensor) -> Tensor:
        sites = self._sites(x).float()
        n_rows, n_out = sites.shape[0], len(self.facts.hook_points_out)
        scale = torch.ones(n_rows, n_out, 1, device=sites.device)
        if self.parameters.normalisation.fixed_way_back is None:
            scale = scale * self.parameters.normalisation.way_back(sites).scale
        return scale.squeeze(1) if n_out == 1 else scale

    # ---- whole-file facts, lazily ----

    @cached_property
    def decoder_norms(self) -> Tensor:
        return self._norms(l2=1.0, total=0.0)

    @cached_property
    def _scale(self) -> Tensor:
        """(F,) float32: the decoder-norm scale."""
        scale = self.parameters.scale
        assert scale is not None, "asked for only where a scale applies"
        return self._norms(l2=scale.l2, total=scale.total)

    @torch.no_grad()
    def _norms(self, *, l2: float, total: float) -> Tensor:
        squares = torch.zeros(self.facts.d_sae, device=self.parameters.decoders[0].W_dec.device)
        sums = torch.zeros_like(squares)
        for block in self.parameters.decoders:
            low = self._offsets[block.group]
            for start in range(0, block.W_dec.shape[0], NORM_ROWS):
                square = block.W_dec[start : start + NORM_ROWS].float().square().sum(-1)
                squares[low + start : low + start + square.numel()] += square
                sums[low + start : low + start + square.numel()] += square.sqrt()
        return l2 * squares.sqrt() + total * sums

    @torch.no_grad()
    def first_not_finite(self) -> str:
        for name, tensor in self.parameters.named_tensors():
            chunks = torch.split(tensor, NORM_ROWS) if tensor.ndim else (tensor,)
            if not all(bool(chunk.isfinite().all()) for chunk in chunks):
                return name
        return ""

    def to(self, device: torch.device | str) -> LinearDictionary:
        moved = self.parameters.map_tensors(lambda tensor: cast("Tensor", tensor).to(device))
        return LinearDictionary(self.facts.name, moved)


def _to_float32(weights: Tensor) -> Tensor:
    return weights.float()
