"""Features in bulk: inputs run through the model and encoded, or given activations encoded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import Dictionary, stacked
from glasshouse.server.dictionaries.store import HeldDictionary
from glasshouse.server.readouts.features import FeatureTable
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.generation import ExtractionRequest
from glasshouse.server.types.interventions import FloatArray, Intervention
from glasshouse.server.types.readouts import FeatureRows
from glasshouse.server.types.selectors import Selector
from glasshouse.wire import reasons

from .engine import Engine

# Rows of given activations encoded at a time: a piece of the answer is on its way while the next is made.
ROWS_AT_A_TIME = 2048


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which features of each position: the `top_k` strongest, the named `features`, or with neither every active one."""

    top_k: int = 0
    features: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedInput:
    """One input encoded, or a piece of it from `first_row`: a row a position."""

    index: int
    positions: tuple[int, ...]
    rows: FeatureRows
    first_row: int = 0


def check(dictionary: Dictionary, wanted: Wanted) -> None:
    """Raises InvalidArgument or NotFound where `wanted` makes no sense for `dictionary`."""
    if wanted.top_k and wanted.features:
        raise InvalidArgument(
            "give top_k or features, not both",
            reason=reasons.FIELD_CONFLICT,
            field="features",
            value=wanted.top_k,
            remedy="leave one of them out",
        )
    dictionary.check_feature_ids(torch.tensor(wanted.features, dtype=torch.int64), field="features")


@torch.inference_mode()
def encode_rows(dictionary: Dictionary, x: Tensor, wanted: Wanted) -> FeatureRows:
    """Features of x, (n, d_in) or (n, n_points_in, d_in). Blocks while it computes."""
    if wanted.features:
        ids = torch.tensor(wanted.features, dtype=torch.int64, device=x.device)
        values = dictionary.encode_features(x, ids).cpu().numpy()
        n_rows, n_ids = values.shape
        named = np.tile(np.asarray(wanted.features, dtype=np.int32), n_rows)
        return FeatureRows(np.arange(n_rows + 1, dtype=np.int64) * n_ids, named, values.reshape(-1))
    if wanted.top_k:
        top = dictionary.encode_top_k(x, wanted.top_k)
        return FeatureTable(
            ids=top.ids.cpu().numpy(), activations=top.values.cpu().numpy(), padded=True
        ).rows()
    sparse = dictionary.encode(x)
    return FeatureRows(sparse.indptr.cpu().numpy(), sparse.ids.cpu().numpy(), sparse.values.cpu().numpy())


async def encode_inputs(
    engine: Engine,
    held: HeldDictionary,
    inputs: Sequence[tuple[int, ...]],
    positions: Selector,
    interventions: tuple[Intervention, ...],
    wanted: Wanted,
) -> AsyncGenerator[EncodedInput, None]:
    """Each input as it is done, in any order."""
    held.live("dictionary")
    request = ExtractionRequest(
        inputs=tuple(inputs),
        hook_points=tuple(point.name for point in held.points_in),
        positions=positions,
        interventions=interventions,
    )
    async with aclosing(engine.extract(request)) as results:
        async for done in results:
            x = stacked([torch.from_numpy(array) for array in done.activations]).to(engine.info.device)
            rows = await asyncio.to_thread(encode_rows, held.dictionary, x, wanted)
            yield EncodedInput(index=done.index, positions=done.positions, rows=rows)


def given(held: HeldDictionary, activations: FloatArray, field: str) -> Iterator[Tensor]:
    """Given activations, checked, in pieces of `ROWS_AT_A_TIME` rows.

    Raises:
        InvalidArgument: a shape that is not the dictionary's.
    """
    facts = held.dictionary.facts
    n_points = len(facts.hook_points_in)
    expected = (facts.d_in,) if n_points == 1 else (n_points, facts.d_in)
    if activations.shape[1:] != expected:
        raise InvalidArgument(
            f"the activations have shape {tuple(activations.shape)}, "
            f"{facts.name} reads (n, {', '.join(map(str, expected))})",
            reason=reasons.WRONG_WIDTH,
            field=field,
            value=tuple(activations.shape),
            remedy=f"send activations of {', '.join(facts.hook_points_in)}",
        )
    rows = torch.from_numpy(activations)
    return iter(torch.split(rows, ROWS_AT_A_TIME))


@torch.inference_mode()
def nearest(dictionary: Dictionary, feature: int, count: int) -> list[tuple[int, float]]:
    """The `count` features whose decoder rows are nearest to this one's by cosine, itself left out. Reads the decoder
    once, in pieces.
    """
    d_sae = dictionary.facts.d_sae
    row = dictionary.decoder_rows(torch.tensor([feature])).reshape(-1)
    row = row / row.norm().clamp_min(1e-12)
    norms = dictionary.decoder_norms.clamp_min(1e-12)
    cosines = torch.cat(
        [
            dictionary.decoder_rows(ids).reshape(len(ids), -1) @ row
            for ids in torch.split(torch.arange(d_sae), ROWS_AT_A_TIME)
        ]
    )
    cosines = cosines / norms.to(cosines.device)
    cosines[feature] = -torch.inf
    values, ids = cosines.topk(min(count, d_sae - 1))
    return list(zip(ids.tolist(), values.tolist(), strict=True))
