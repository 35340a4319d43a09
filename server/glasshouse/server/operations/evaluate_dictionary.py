"""A dictionary measured over text, the model spliced: section "metrics" of the SAELens definitions.

For each input, special tokens left as they are:
1. One clean pass captures the dictionary's input and output points and the logits.
2. The output points are replaced by the reconstruction (of the clean input), and the logits captured again.
3. The output points are replaced by zeros at every position, and the logits captured again.
Reconstruction metrics compare 1 with the reconstruction; cross-entropy and KL compare the logits.

A dictionary that writes several points is spliced at all of them at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import stacked
from glasshouse.server.dictionaries.features import SparseFeatures
from glasshouse.server.dictionaries.metrics import ActivationMetrics, SpliceMetrics
from glasshouse.server.dictionaries.store import HeldDictionary
from glasshouse.server.engines.engine import Engine
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.server.types.generation import ExtractionRequest
from glasshouse.server.types.interventions import Intervention, Replace
from glasshouse.server.types.readouts import Array
from glasshouse.server.types.selectors import EVERYWHERE, Selector
from glasshouse.wire import reasons

from .manager import Progress

UNEMBED = "unembed"


@dataclass(frozen=True, kw_only=True, eq=False)
class DictionaryEvaluation:
    """What was measured: `metrics` by name, over `tokens` positions; `density` float32 (d_sae,)."""

    metrics: dict[str, float]
    tokens: int
    density: np.ndarray


async def evaluate(
    engine: Engine,
    held: HeldDictionary,
    inputs: Sequence[tuple[int, ...]],
    max_tokens: int,
    progress: Progress,
) -> DictionaryEvaluation:
    """Measures `held` over at most `max_tokens` tokens of `inputs`.

    Raises:
        FailedPrecondition: no input has two ordinary tokens, so nothing is predicted.
    """
    progress.phase = "measuring"
    chosen = _within(inputs, max_tokens)
    progress.total = sum(len(tokens) for tokens in chosen)
    facts = held.dictionary.facts
    activations = ActivationMetrics(facts.d_sae, facts.d_out * len(held.points_out), engine.info.device)
    splices = SpliceMetrics()
    special = engine.info.special_token_ids
    for tokens in chosen:
        plain = tuple(p for p, token in enumerate(tokens) if token not in special)
        if plain and len(tokens) > 1:
            await _measure(engine, held, tokens, plain, activations, splices)
        progress.done += len(tokens)
    if not splices.n_tokens:
        raise FailedPrecondition(
            "no input holds two ordinary tokens: nothing is predicted",
            reason=reasons.EMPTY_INPUT,
            field="inputs",
            remedy="give longer text",
        )
    return DictionaryEvaluation(
        metrics=_figures(activations, splices),
        tokens=activations.n_tokens,
        density=activations.density.float().cpu().numpy(),
    )


def _figures(activations: ActivationMetrics, splices: SpliceMetrics) -> dict[str, float]:
    figures = asdict(activations.result())
    figures.pop("n_tokens")
    ce_clean, ce_spliced, ce_zero = splices.cross_entropy
    kl, kl_zero = splices.divergence
    return figures | {
        "ce_clean": ce_clean,
        "ce_spliced": ce_spliced,
        "ce_zero": ce_zero,
        "ce_loss_score": splices.ce_score,
        "kl": kl,
        "kl_zero": kl_zero,
        "kl_score": splices.kl_score,
    }


def _within(inputs: Sequence[tuple[int, ...]], max_tokens: int) -> list[tuple[int, ...]]:
    chosen, left = [], max_tokens
    for tokens in inputs:
        if left < 2:
            break
        chosen.append(tokens[:left])
        left -= len(chosen[-1])
    return chosen


async def _measure(
    engine: Engine,
    held: HeldDictionary,
    tokens: tuple[int, ...],
    plain: tuple[int, ...],
    activations: ActivationMetrics,
    splices: SpliceMetrics,
) -> None:
    points_in = [point.name for point in held.points_in]
    points_out = [point.name for point in held.points_out]
    names = list(dict.fromkeys([*points_in, *points_out, UNEMBED]))
    clean = dict(zip(names, await _extract(engine, tokens, names, ()), strict=True))
    at = list(plain)
    x = stacked([torch.from_numpy(clean[name][at]) for name in points_in])
    y = stacked([torch.from_numpy(clean[name][at]) for name in points_out])
    device = engine.info.device
    features, reconstruction = await asyncio.to_thread(_reconstruct, held, x.to(device))
    sites = [reconstruction] if len(points_out) == 1 else list(reconstruction.unbind(dim=1))
    where = Selector(at=plain)
    spliced = tuple(
        Intervention(hook_point=name, edit=Replace(activations=site.float().cpu().numpy()), positions=where)
        for name, site in zip(points_out, sites, strict=True)
    )
    zeroed = tuple(
        Intervention(
            hook_point=point.name,
            edit=Replace(activations=np.zeros(point.width, np.float32)),
            positions=EVERYWHERE,
        )
        for point in held.points_out
    )
    (logits_spliced,) = await _extract(engine, tokens, [UNEMBED], spliced)
    (logits_zeroed,) = await _extract(engine, tokens, [UNEMBED], zeroed)
    activations.add(features, y.to(device), reconstruction)
    cap = engine.info.final_logit_softcap
    tables = (clean[UNEMBED], logits_spliced, logits_zeroed)
    of_clean, of_spliced, of_zeroed = (_capped(table[:-1], cap) for table in tables)
    await asyncio.to_thread(splices.add, of_clean, of_spliced, of_zeroed, torch.tensor(tokens[1:]))


def _capped(logits: Array, cap: float | None) -> Tensor:
    raw = torch.from_numpy(logits)
    return raw if cap is None else torch.tanh(raw / cap) * cap


def _reconstruct(held: HeldDictionary, x: Tensor) -> tuple[SparseFeatures, Tensor]:
    features = held.dictionary.encode(x)
    return features, held.dictionary.decode(features, x)


async def _extract(
    engine: Engine, tokens: tuple[int, ...], names: Sequence[str], interventions: tuple[Intervention, ...]
) -> tuple[Array, ...]:
    request = ExtractionRequest(inputs=(tokens,), hook_points=tuple(names), interventions=interventions)
    async with aclosing(engine.extract(request)) as results:
        async for done in results:
            return done.activations
    raise AssertionError("an extraction yields its input")
