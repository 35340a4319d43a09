"""Features of a dictionary as nodes of a patch sweep, and what the dictionary misses as one more node.

1. A node (dictionary, feature, position) is patched by its change alone: (a' - a) * decoder row (times the output's
   scale on the base) added at every hook point that the dictionary writes, so that the error and every other feature
   stay. a is the activation in the base run, a' what replaces it.
2. The error node (no feature) is target - reconstruction at the dictionary's output; its change is error' - error.
3. A change is a constant of the base run: one node a row, nothing upstream of it moves. A crosscoder's later sites
   read what its own change has made of the stream; they are not encoded anew.

Shapes: N other inputs, T positions, D width of a hook point, F features asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.nodes import Node
from glasshouse.server.dictionaries.dictionary import Dictionary, stacked
from glasshouse.server.types.errors import InvalidArgument, NotFound
from glasshouse.wire import reasons


def feature_nodes(
    model: GradientModel,
    name: str,
    dictionary: Dictionary,
    inputs: Sequence[Tensor | Sequence[int]],
    *,
    positions: Sequence[int | None] | None = None,
    errors: bool = True,
) -> list[Node]:
    """The nodes of every feature that fires on any of the inputs, position by position, errors last.

    `positions` defaults to all of the first input's. At position None a feature counts that fires anywhere.
    """
    fired = [_encode(model, dictionary, model.tokens(tokens)[0])[0] for tokens in inputs]
    n_positions = fired[0].shape[0]
    point = written(model, dictionary)[0]
    grid = []
    for position in range(n_positions) if positions is None else positions:
        rows = [f if position is None else f[[position]] for f in fired if position is None or len(f)]
        active = torch.stack([row.ne(0).any(0) for row in rows]).any(0)
        ids: list[int | None] = [*active.nonzero().squeeze(1).tolist(), *([None] if errors else [])]
        grid += [Node(hook_point=point, position=position, dictionary=name, feature=i) for i in ids]
    return grid


def written(model: GradientModel, dictionary: Dictionary) -> list[str]:
    """The hook points that a dictionary writes, in the order of the forward pass."""
    names = [model.table.resolve(name).name for name in dictionary.facts.hook_points_out]
    return sorted(names, key=model.table.position)


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureChanges:
    """What replaces the features of one dictionary. base: (T, F), others: (N, T, F) activations, or (1, 1, F) for one
    value at every position; errors: hook point -> (T, D), other_errors: (N, T, D) or (1, 1, D). scale: (T, M, 1).
    """

    model: GradientModel
    dictionary: Dictionary
    columns: dict[int, int]
    base: Tensor
    others: Tensor
    errors: dict[str, Tensor]
    other_errors: dict[str, Tensor]
    scale: Tensor

    @property
    def n_others(self) -> int:
        return int(self.others.shape[0])

    def change(self, node: Node, other: int) -> dict[str, Tensor]:
        """Hook point -> (T, D) to add for `node` to take its value of input `other`."""
        if node.feature is None:
            return {name: self.other_errors[name][other] - error for name, error in self.errors.items()}
        column = self.columns[node.feature]
        delta_T = self.others[other, :, column] - self.base[:, column]
        rows = self.dictionary.decoder_rows(torch.tensor([node.feature], device=delta_T.device))
        names = [self.model.table.resolve(name).name for name in self.dictionary.facts.hook_points_out]
        rows_MD = rows[0].view(len(names), -1)
        return {
            name: delta_T[:, None] * rows_MD[site] * self.scale[:, site]
            for site, name in enumerate(names)
            if bool(rows_MD[site].any())
        }


@torch.no_grad()
def feature_changes(
    model: GradientModel,
    base: Tensor,
    nodes: Sequence[Node],
    how: str,
    others: Tensor | None,
    dictionaries: Mapping[str, Dictionary],
) -> dict[str, FeatureChanges]:
    """Dictionary name -> what replaces its nodes among `nodes`. others: (N, T) token ids, None for zero."""
    found = {}
    for name in sorted({node.dictionary for node in nodes if node.dictionary is not None}):
        dictionary = _named(dictionaries, name)
        mine = [node for node in nodes if node.dictionary == name]
        _check_points(model, dictionary, mine)
        ids = sorted({node.feature for node in mine if node.feature is not None})
        wanted = torch.tensor(ids, dtype=torch.int64, device=base.device)
        dictionary.check_feature_ids(wanted, field="nodes.feature")
        ours, errors, scale = _encode(model, dictionary, base[0], wanted)
        if how == "zero":
            theirs = [(torch.zeros_like(ours), {k: torch.zeros_like(e) for k, e in errors.items()})]
        else:
            assert others is not None, "checked by the sweep"
            theirs = [_encode(model, dictionary, row, wanted)[:2] for row in others]
        values = torch.stack([f for f, _ in theirs])
        missed = {k: torch.stack([e[k] for _, e in theirs]) for k in errors}
        if how == "mean":
            values = values.mean((0, 1), keepdim=True)
            missed = {k: e.mean((0, 1), keepdim=True) for k, e in missed.items()}
        elif how == "interchange":
            values, missed = values[:1], {k: e[:1] for k, e in missed.items()}
        found[name] = FeatureChanges(
            model=model,
            dictionary=dictionary,
            columns={feature: column for column, feature in enumerate(ids)},
            base=ours,
            others=values,
            errors=errors,
            other_errors=missed,
            scale=scale,
        )
    return found


@torch.no_grad()
def _encode(
    model: GradientModel, dictionary: Dictionary, tokens_T: Tensor, ids: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(T, F) activations (of all features where no ids are given), the error at every output, the output's scale."""
    facts = dictionary.facts
    names = [model.table.resolve(name).name for name in facts.hook_points_out]
    readings = model.forward(tokens_T[None], read=[*facts.hook_points_in, *names]).readings
    x = stacked([readings[name][0] for name in facts.hook_points_in])
    fired = dictionary.encode(x)
    values = fired.to_dense() if ids is None else dictionary.encode_features(x, ids)
    made, scale = dictionary.decode(fired, x), dictionary.output_scale(x)
    if len(names) == 1:
        made, scale = made[:, None], scale[:, None]
    return values, {name: readings[name][0] - made[:, site] for site, name in enumerate(names)}, scale


def _named(dictionaries: Mapping[str, Dictionary], name: str) -> Dictionary:
    if name not in dictionaries:
        raise NotFound(
            f"There is no dictionary {name!r}.",
            reason=reasons.DICTIONARY_NOT_FOUND,
            resource_type="dictionary",
            resource_name=name,
            closest=tuple(sorted(dictionaries)),
            field="nodes.dictionary",
            remedy="Use a loaded dictionary.",
        )
    return dictionaries[name]


def _check_points(model: GradientModel, dictionary: Dictionary, nodes: Sequence[Node]) -> None:
    first = written(model, dictionary)[0]
    for node in nodes:
        if model.table.resolve(node.hook_point).name != first:
            raise InvalidArgument(
                f"{node.hook_point} is not where {dictionary.facts.name!r} begins to write: {first} is.",
                reason=reasons.DICTIONARY_MISMATCH,
                field="nodes.hook_point",
                value=node.hook_point,
                remedy=f"Use {first}.",
            )
