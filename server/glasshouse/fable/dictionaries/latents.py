"""Single features that know the generator's latents: mood, gender, number.

For every label of a labelled set, features of the stream's dictionaries are ranked by how well their activation
alone separates it from the other labels (area under the ROC curve, ties counted half): chosen on the set's train
split, reported on its test split. An activation is that at the last position of a prompt; for mood, which a
whole story carries, the mean over its positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.fable import labelled
from glasshouse.fable.dictionaries.activations import encode, harvest
from glasshouse.fable.dictionaries.fit import select
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.hooks.table import HookTable

_POOLED = {"mood": True, "gender": False, "number": False}
_MOST_RECORDS = 600  # a split; enough for two digits


@dataclass(frozen=True, kw_only=True)
class LatentFeature:
    """The feature that separates `label` best, and its area under the curve on the test split."""

    latent: str
    label: str
    dictionary: str
    feature: int
    auc: float


def area_under_curve(values_NF: Tensor, positive_N: Tensor) -> Tensor:
    """(F,): the chance that a positive row has the larger value, ties counted half."""
    columns_FN = values_NF.T.contiguous()
    ordered_FN = columns_FN.sort(dim=1).values
    below = torch.searchsorted(ordered_FN, columns_FN)
    up_to = torch.searchsorted(ordered_FN, columns_FN, right=True)
    ranks_FN = (below + up_to + 1) / 2
    n_positive = int(positive_N.sum())
    n_negative = len(positive_N) - n_positive
    excess_F = ranks_FN[:, positive_N].sum(1) - n_positive * (n_positive + 1) / 2
    return excess_F / (n_positive * n_negative)


def _values(
    table: HookTable, dictionaries: Sequence[Dictionary], texts: Sequence[str], pooled: bool
) -> list[Tensor]:
    """(N, F) of each dictionary: one row a text."""
    points = sorted({point for dictionary in dictionaries for point in dictionary.facts.hook_points_in})
    rows: list[list[Tensor]] = [[] for _ in dictionaries]
    for ids in encode(table.loaded, texts):
        activations = harvest(table, [ids], points)
        for dictionary, found in zip(dictionaries, rows, strict=True):
            x = select(activations, dictionary.facts.hook_points_in)
            dense = dictionary.encode(x if pooled else x[-1:]).to_dense()
            found.append(dense.mean(0))
    return [torch.stack(found) for found in rows]


def find_latent_features(table: HookTable, dictionaries: Sequence[Dictionary]) -> list[LatentFeature]:
    """The best feature of each label, over all these dictionaries."""
    found: list[LatentFeature] = []
    for latent, pooled in _POOLED.items():
        records = labelled(latent)
        split = {
            name: [record for record in records if record["split"] == name][:_MOST_RECORDS]
            for name in ("train", "test")
        }
        values = {
            name: _values(table, dictionaries, [record["text"] for record in part], pooled)
            for name, part in split.items()
        }
        for label in sorted({record["label"] for record in records}):
            is_label = {
                name: torch.tensor([record["label"] == label for record in part])
                for name, part in split.items()
            }
            areas = [area_under_curve(of_one, is_label["train"]) for of_one in values["train"]]
            best = max(range(len(areas)), key=lambda index: float(areas[index].max()))
            feature = int(areas[best].argmax())
            test = area_under_curve(values["test"][best][:, feature : feature + 1], is_label["test"])
            found.append(
                LatentFeature(
                    latent=latent,
                    label=label,
                    dictionary=dictionaries[best].facts.name,
                    feature=feature,
                    auc=float(test),
                )
            )
    return found
