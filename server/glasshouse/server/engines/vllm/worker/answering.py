"""Readouts answered after the forward pass, outside the graph: each question once, for the rows of every request that
asks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import stacked
from glasshouse.server.engines.vllm.contract.messages import RowBlock

from .planning import Answer
from .requests import Question

Array = np.ndarray

# Rows of logits computed at a time: a vocabulary of 128k in float32 takes 32 MiB for 64 rows.
LENS_ROWS = 64

# unembed(final_norm(s)) of a stream (n, W): logits (n, vocab), after the final soft cap.
Lens = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class AnsweringContext:
    """What answers are computed with. `lens`: None on a stage without the unembedding."""

    lens: Lens | None


def answer_rows(
    answer: Answer, question: Question, captured: Mapping[int, Tensor], age: int, context: AnsweringContext
) -> RowBlock:
    """The rows of one question. `age`: steps since the answer was planned."""
    inputs = []
    for site, place in zip(question.sites, answer.places, strict=True):
        taken = captured[site]
        inputs.append(taken if place is None else taken.index_select(0, place))
    return RowBlock(
        kind=question.kind,
        tags=answer.tags,
        readouts=answer.readouts,
        positions=answer.positions + np.int32(age) if age else answer.positions,
        values=_values(question, inputs, context),
    )


def _values(question: Question, inputs: list[Tensor], context: AnsweringContext) -> tuple[Array, ...]:
    match question.kind:
        case "activations":
            joined = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
            return (host(joined, question.dtype),)
        case "features":
            assert question.dictionary is not None
            x = stacked(inputs)
            if question.feature_ids:
                ids = torch.tensor(question.feature_ids, device=x.device)
                values = question.dictionary.encode_features(x, ids).cpu().numpy()
                named = np.array(question.feature_ids, dtype=np.int32)
                return np.broadcast_to(named, values.shape), values
            top = question.dictionary.encode_top_k(x, question.top_k)
            return top.ids.cpu().numpy(), top.values.float().cpu().numpy()
        case "probe":
            assert question.probe is not None
            x = inputs[0].float() if len(inputs) == 1 else torch.cat(inputs, dim=1).float()
            scores = question.probe.margins(x) if question.margin else question.probe.score(x)
            return (scores.float().cpu().numpy(),)
        case "lens":
            if context.lens is None:
                raise ValueError("the logit lens needs the last pipeline stage")
            return _lens(context.lens, inputs[0], question.top_k)
        case _:
            raise ValueError(f"there is no readout of kind {question.kind!r}")


def _lens(lens: Lens, s_NW: Tensor, top_k: int) -> tuple[Array, Array]:
    ids, values = [], []
    for part in torch.split(s_NW, LENS_ROWS):
        logprobs = torch.log_softmax(lens(part).float(), dim=-1)
        best = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1)
        ids.append(best.indices.to(torch.int32))
        values.append(best.values)
    return torch.cat(ids).cpu().numpy(), torch.cat(values).cpu().numpy()


def host(values: Tensor, dtype: str) -> Array:
    """A host array in a wire dtype; may share memory with `values`."""
    if dtype == "bfloat16":
        raw = values.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy()
        return raw.view(ml_dtypes.bfloat16)
    target = torch.float16 if dtype == "float16" else torch.float32
    array: Array = values.to(target).cpu().numpy()
    return array
