"""Probes and conditions of a fake model: scores anybody can predict.

The probe "vowels" has one label, "vowel"; "letters" has two, "vowel" and "consonant". A score is 0.9 where the token
is such a letter, else 0.1; its margin is the log-odds of that. A published probe scores by the share of vowels so far. A
feature's score is its activation before any edit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from glasshouse.client.testing.failures import invalid
from glasshouse.client.testing.fake_model import FakeModel, select
from glasshouse.v1 import conditions_pb2, inputs_pb2, readouts_pb2
from glasshouse.wire import reasons

VOWELS = frozenset(b"aeiouAEIOU")
_HIT, _MISS = 0.9, 0.1


def probe_labels(model: FakeModel, name: str, field: str) -> tuple[str, tuple[str, ...]]:
    """A probe's resource name and the labels of its columns."""
    return model.concept(model.probes, "probe", name, field)


def share_of_vowels(ids: Sequence[int], n_columns: int) -> list[float]:
    """What a published probe says of tokens: the same for every label but for a factor."""
    share = sum(token in VOWELS for token in ids) / len(ids)
    return [share / (column + 1) for column in range(n_columns)]


def _scores_at(
    probe: tuple[str, tuple[str, ...]], ids: Sequence[int], position: int, output: int
) -> list[float]:
    """One score a label."""
    labels = probe[1]
    token_id = ids[position]
    if set(labels) <= {"vowel", "consonant"}:
        is_vowel = token_id in VOWELS
        is_letter = token_id < 256 and chr(token_id).isascii() and chr(token_id).isalpha()
        hits = {"vowel": is_vowel, "consonant": is_letter and not is_vowel}
        scores = [_HIT if hits[label] else _MISS for label in labels]
    else:
        scores = share_of_vowels(ids[: position + 1], len(labels))
    if output == conditions_pb2.PROBE_OUTPUT_MARGIN:
        return [math.log(max(score, 1e-6) / max(1 - score, 1e-6)) for score in scores]
    return scores


def read_probe(
    model: FakeModel, what: readouts_pb2.ReadProbe, ids: Sequence[int], positions: Iterable[int], field: str
) -> readouts_pb2.ProbeScoreRows:
    """Its scores at some positions."""
    probe = probe_labels(model, what.probe, f"{field}.probe.probe")
    rows = [_scores_at(probe, ids, position, what.output) for position in positions]
    return readouts_pb2.ProbeScoreRows(
        labels=probe[1], scores=[score for row in rows for score in row], probe=probe[0]
    )


class FakeCondition:
    """A condition, checked; it says where it holds."""

    def __init__(self, model: FakeModel, message: conditions_pb2.Condition, field: str) -> None:
        self._model, self._message, self._field = model, message, field
        if message.WhichOneof("threshold") is None:
            raise invalid(f"{field}.above", "no threshold", reasons.FIELD_REQUIRED, "Set above or below")
        self._column = 0
        if message.HasField("feature"):
            dictionary = model.dictionary(message.feature.dictionary, f"{field}.feature.dictionary")
            dictionary.check_features([message.feature.feature], f"{field}.feature.feature")
        elif message.HasField("probe"):
            _, labels = probe_labels(model, message.probe.probe, f"{field}.probe.probe")
            label = message.probe.label
            if label not in labels and (label or len(labels) > 1):
                remedy = f"Use one of {', '.join(labels)}"
                raise invalid(f"{field}.probe.label", "no such label", reasons.VALUE_OUT_OF_RANGE, remedy)
            self._column = labels.index(label) if label else 0
        else:
            raise invalid(field, "no source", reasons.FIELD_REQUIRED, "Set probe or feature")

    @property
    def threshold(self) -> float:
        """What is to be passed."""
        message = self._message
        return message.above if message.HasField("above") else message.below

    def scores(self, ids: Sequence[int], n_prompt: int) -> dict[int, float]:
        """The score at each position it looks at."""
        message = self._message
        selector: inputs_pb2.PositionSelector | None = (
            message.positions if message.HasField("positions") else None
        )
        looked_at = select(selector, ids, n_prompt)
        if message.HasField("feature"):
            dictionary = self._model.dictionary(message.feature.dictionary, self._field)
            features = dictionary.encode(self._model.activations(dictionary.hook_point, ids, looked_at))
            return dict(zip(looked_at, features[:, message.feature.feature].tolist()))
        probe = probe_labels(self._model, message.probe.probe, self._field)
        return {p: _scores_at(probe, ids, p, message.probe.output)[self._column] for p in looked_at}

    def passed(self, ids: Sequence[int], n_prompt: int) -> dict[int, float]:
        """The positions where it holds, with the score there (of the prompt as one: its aggregate)."""
        scores = self.scores(ids, n_prompt)
        scope = self._message.scope
        if scope == conditions_pb2.CONDITION_SCOPE_PROMPT:
            of_prompt = [score for position, score in scores.items() if position < n_prompt]
            if not of_prompt:
                return {}
            how = self._message.prompt_aggregation
            value = max(of_prompt)
            if how == conditions_pb2.PROMPT_AGGREGATION_MEAN:
                value = sum(of_prompt) / len(of_prompt)
            elif how == conditions_pb2.PROMPT_AGGREGATION_LAST:
                value = of_prompt[-1]
            return dict.fromkeys(range(n_prompt - 1, len(ids)), value) if self._passes(value) else {}
        passing = {position: score for position, score in scores.items() if self._passes(score)}
        if scope == conditions_pb2.CONDITION_SCOPE_LATCHED and passing:
            first = min(passing)
            return {p: scores.get(p, passing[first]) for p in range(first, len(ids))}
        return passing

    def _passes(self, score: float) -> bool:
        if self._message.HasField("above"):
            return score > self._message.above
        return score < self._message.below
