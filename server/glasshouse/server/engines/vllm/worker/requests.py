"""A request's plan, installed: its slots taken, its clauses turned into integer tables that planning can concatenate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.engines.vllm.contract import Clause, EditPlan, RequestPlan
from glasshouse.server.engines.watching import Roster
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.interventions.features import PreparedFeatureEdit
from glasshouse.server.probes.served import ServedProbe

from . import conditional
from .conditional import ConditionalEdits
from .loaded import loaded
from .steering import Rosters, SteeredRequest, steered_request
from .tables import EditTable, VectorTable

Array = np.ndarray

# Columns of an edit segment: one range of one edit's clause.
SLOT, SITE, TURN, KIND, LOW, HIGH = range(6)
# Columns of a readout segment, one range of one readout's clause at one of its sites. READOUT is its index in the request.
READOUT, SOURCE, READ_SITE, QUESTION, READ_LOW, READ_HIGH = range(6)

ADD, PROJECT, ROTATE, REPLACE = range(4)
_KINDS = {"add": ADD, "project": PROJECT, "rotate": ROTATE, "replace": REPLACE}


@dataclass(eq=False, kw_only=True)
class FeatureEdit:
    """An edit of features, ready to apply, with its turn at each point it touches."""

    clause: Clause
    prepared: PreparedFeatureEdit
    turns: dict[str, int]

    @property
    def group(self) -> tuple[int, tuple[int, ...]]:
        """Edits of one group are measured and written together."""
        return id(self.prepared.dictionary), tuple(self.turns.values())


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of captured rows: readouts of all requests that ask the same are answered together."""

    kind: str
    sites: tuple[int, ...]
    dtype: str
    top_k: int
    dictionary: Dictionary | None
    feature_ids: tuple[int, ...]
    probe: ServedProbe | None
    margin: bool
    roster: Roster | None = None

    @cached_property
    def products(self) -> int:
        """Multiplications a row, about; none where rows are only copied out."""
        if self.dictionary is not None:
            facts = self.dictionary.facts
            named = len(self.feature_ids) if not facts.competing else 0
            return facts.d_in * len(facts.hook_points_in) * (named or facts.d_sae)
        if self.probe is not None:
            return sum(layer.weights.numel() for layer in self.probe.layers)
        return 0


class Questions:
    """Questions by number, for as long as a request asks them."""

    def __init__(self) -> None:
        self._numbers: dict[Question, int] = {}
        self._asked: dict[int, int] = {}
        self._by_number: dict[int, Question] = {}
        self._next = 0

    def __getitem__(self, number: int) -> Question:
        return self._by_number[number]

    def ask(self, question: Question) -> int:
        """Its number."""
        number = self._numbers.get(question)
        if number is None:
            number = self._numbers[question] = self._next
            self._next += 1
            self._by_number[number] = question
            self._asked[number] = 0
        self._asked[number] += 1
        return number

    def withdraw(self, number: int) -> None:
        """One request fewer asks it."""
        self._asked[number] -= 1
        if not self._asked[number]:
            del self._asked[number], self._numbers[self._by_number.pop(number)]


@dataclass(eq=False, kw_only=True)
class InstalledRequest:
    """A request this worker works for."""

    tag: int
    n_prompt: int
    slots: list[int] = field(default_factory=list)
    vector_rows: list[int] = field(default_factory=list)
    edit_segments: Array = field(default_factory=lambda: np.empty((0, 6), np.int64))
    feature_edits: list[FeatureEdit] = field(default_factory=list)
    read_segments: Array = field(default_factory=lambda: np.empty((0, 6), np.int64))
    questions: list[int] = field(default_factory=list)
    # Edit slot -> token ids left out from the end of the prompt on; the same by readout index.
    excluded_tokens: dict[int, Array] = field(default_factory=dict)
    read_excluded_tokens: dict[int, Array] = field(default_factory=dict)
    # Whether membership depends on more than ranges, so that every step is planned anew.
    volatile: bool = False
    # Its edits where some are under conditions; then the tables hold none of it. `by_token`: their clauses ask for tokens.
    conditional: ConditionalEdits | None = None
    by_token: bool = False
    # The monitors that may steer it; what lies here of its edits is then what is in force.
    steering: SteeredRequest | None = None
    scores_question: int = -1
    failed: bool = False

    @property
    def edited(self) -> bool:
        """Whether any position has been edited, or will be whatever comes."""
        begun = self.steering is not None and self.steering.begun
        return bool(len(self.edit_segments) or self.feature_edits or self.conditional or begun)


def install(
    plan: RequestPlan,
    *,
    sites: Mapping[str, int],
    edits: EditTable,
    vectors: VectorTable,
    questions: Questions,
    dictionaries: Mapping[str, Dictionary],
    probes: Mapping[str, ServedProbe],
    rosters: Rosters,
) -> InstalledRequest:
    """Takes slots for `plan`. What lies on other pipeline stages is left to them. Raises with nothing taken."""
    installed = InstalledRequest(tag=plan.tag, n_prompt=plan.n_prompt)
    try:
        if plan.watches:
            roster = rosters.of(plan.watches, width=vectors.width, dictionaries=dictionaries, probes=probes)
            installed.steering = steered_request(plan, roster)
        if plan.conditions:
            _install_conditional(installed, plan, sites, vectors, dictionaries, probes)
        else:
            _install_edits(installed, plan, sites, edits, vectors, dictionaries)
        _install_readouts(installed, plan, sites, questions, dictionaries, probes)
        if installed.steering is not None:
            installed.steering.put_in_force(installed)
    except BaseException:
        uninstall(installed, edits=edits, vectors=vectors, questions=questions)
        raise
    return installed


def uninstall(
    request: InstalledRequest, *, edits: EditTable, vectors: VectorTable, questions: Questions
) -> None:
    """Gives its slots back."""
    for slot in request.slots:
        edits.replacement[slot] = None
    edits.slots.give(request.slots)
    vectors.release(request.vector_rows)
    for number in request.questions:
        questions.withdraw(number)
    request.slots, request.vector_rows, request.questions = [], [], []


def _install_edits(
    installed: InstalledRequest,
    plan: RequestPlan,
    sites: Mapping[str, int],
    edits: EditTable,
    vectors: VectorTable,
    dictionaries: Mapping[str, Dictionary],
) -> None:
    segments: list[tuple[int, int, int, int, int, int]] = []
    watches: list[int] = []
    steering = installed.steering
    turns: dict[str, int] = {}
    for edit in plan.edits:
        touched = list(dict.fromkeys((*edit.sites_in, *edit.sites_out)))
        at = {name: turns.get(name, 0) for name in touched}
        turns.update({name: turn + 1 for name, turn in at.items()})
        if not _is_local(touched, sites, f"edit {edit.index}"):
            continue
        excluded = np.array(edit.clause.excluded_token_ids, dtype=np.int64)
        installed.volatile = installed.volatile or excluded.size > 0
        if edit.kind == "features":
            prepared = conditional.feature_edit(edit, loaded(dictionaries, edit.dictionary))
            ready = FeatureEdit(clause=edit.clause, prepared=prepared, turns=at)
            installed.feature_edits.append(ready)
            if steering is not None:
                steering.features.append((edit.watch, ready))
            continue
        slot = edits.slots.take(1)[0]
        installed.slots.append(slot)
        if edit.vector_keys:
            rows = vectors.use(edit.vector_keys)
        else:
            rows = vectors.write(edit.vectors, edit.n_vectors)
        installed.vector_rows.extend(rows)
        _write(edits, slot, edit, rows)
        installed.volatile = installed.volatile or edits.replacement[slot] is not None
        if excluded.size:
            installed.excluded_tokens[slot] = excluded
        name = edit.sites_out[0]
        for low, high in edit.clause.ranges:
            segments.append((slot, sites[name], at[name], _KINDS[edit.kind], low, high))
            watches.append(edit.watch)
    installed.edit_segments = np.array(segments, dtype=np.int64).reshape(-1, 6)
    if steering is not None:
        steering.segments, steering.watch_S = installed.edit_segments, np.array(watches, dtype=np.int64)


def _install_conditional(
    installed: InstalledRequest,
    plan: RequestPlan,
    sites: Mapping[str, int],
    vectors: VectorTable,
    dictionaries: Mapping[str, Dictionary],
    probes: Mapping[str, ServedProbe],
) -> None:
    """All edits of a request with conditions, those without one too: their order counts."""
    device = vectors.rows_VW.device
    conditions = [
        conditional.prepared_condition(
            condition, width=vectors.width, device=device, dictionaries=dictionaries, probes=probes
        )
        for condition in plan.conditions
    ]
    edits: list[PreparedIntervention] = []
    touched: list[str] = []
    for edit in plan.edits:
        looked_at = plan.conditions[edit.condition].sites if edit.condition >= 0 else ()
        if not _is_local((*looked_at, *edit.sites_in, *edit.sites_out), sites, f"edit {edit.index}"):
            continue
        touched += edit.sites_out
        ready: PreparedIntervention
        if edit.kind == "features":
            ready = conditional.feature_edit(edit, loaded(dictionaries, edit.dictionary))
        else:
            ready = conditional.plain_edit(
                edit, vectors.values(edit.vectors, edit.n_vectors, edit.vector_keys)
            )
        if edit.condition >= 0:
            conditional.condition_steered(ready, conditions[edit.condition])
        edits.append(ready)
        if installed.steering is not None:
            installed.steering.conditional.append((edit.watch, edit.clause, ready))
    if edits:
        installed.by_token = any(edit.clause.excluded_token_ids for edit in plan.edits) or any(
            condition.clause.excluded_token_ids for condition in plan.conditions
        )
        installed.conditional = ConditionalEdits(
            n_prompt=plan.n_prompt, edits=edits, conditions=conditions, device=device
        )


def _install_readouts(
    installed: InstalledRequest,
    plan: RequestPlan,
    sites: Mapping[str, int],
    questions: Questions,
    dictionaries: Mapping[str, Dictionary],
    probes: Mapping[str, ServedProbe],
) -> None:
    segments: list[tuple[int, int, int, int, int, int]] = []
    for readout in plan.readouts:
        if not _is_local(readout.sites, sites, f"readout {readout.index}"):
            continue
        question = Question(
            kind=readout.kind,
            sites=tuple(sites[name] for name in readout.sites),
            dtype=readout.dtype,
            top_k=readout.top_k,
            dictionary=loaded(dictionaries, readout.dictionary) if readout.dictionary else None,
            feature_ids=readout.feature_ids,
            probe=loaded(probes, readout.probe) if readout.probe else None,
            margin=readout.margin,
            roster=None
            if installed.steering is None or readout.kind != "scores"
            else installed.steering.roster,
        )
        number = questions.ask(question)
        installed.questions.append(number)
        if question.roster is not None:
            installed.scores_question = number
        if readout.clause.excluded_token_ids:
            installed.volatile = True
            installed.read_excluded_tokens[readout.index] = np.array(
                readout.clause.excluded_token_ids, dtype=np.int64
            )
        for source, site in enumerate(question.sites):
            for low, high in readout.clause.ranges:
                segments.append((readout.index, source, site, number, low, high))
    installed.read_segments = np.array(segments, dtype=np.int64).reshape(-1, 6)


def _is_local(names: Sequence[str], sites: Mapping[str, int], what: str) -> bool:
    here = [name for name in names if name in sites]
    if here and len(here) != len(names):
        missing = next(name for name in names if name not in sites)
        raise ValueError(f"{what} needs {here[0]} and {missing}, which lie on different pipeline stages")
    return bool(here)


def _write(table: EditTable, slot: int, edit: EditPlan, rows: list[int]) -> None:
    several = edit.kind == "replace" and len(rows) > 1
    if not several:
        table.vectors_E3[slot, : len(rows)] = rows
    table.replacement[slot] = np.array(rows, dtype=np.int64) if several else None
    low = -math.inf if edit.low is None else edit.low
    high = math.inf if edit.high is None else edit.high
    table.numbers_E4[slot] = (edit.plain, edit.scaled, low, high)
    table.keep_norm_E[slot] = edit.preserve_norm
