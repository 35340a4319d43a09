"""The contract of gateway and worker: what is packed comes out, ranges are exact, the account of edits adds up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from glasshouse.server.engines.vllm.contract import (
    Clause,
    ConditionPlan,
    EditPlan,
    Ledger,
    Ran,
    ReadoutPlan,
    RequestPlan,
    RowBlock,
    Steering,
    StepError,
    StepReport,
    WatchPlan,
    WorkerSettings,
    cache_salt,
    clause_of,
    engine_arguments,
    messages,
    pack_plan,
    pack_report,
    unpack_plan,
    unpack_report,
)
from glasshouse.server.engines.vllm.worker import runners
from glasshouse.server.interventions.edits import PreparedEdit, Primitive, Scalars
from glasshouse.server.probes.aggregation import Aggregation, Rule
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.selectors import ResolvedPositions

EVERYWHERE = Clause(ranges=((0, 1 << 30),), n_prompt=4)


def add(index: int = 0, clause: Clause = EVERYWHERE) -> EditPlan:
    return EditPlan(
        index=index,
        kind="add",
        clause=clause,
        sites_out=("blocks.0.hook_resid_post",),
        n_vectors=1,
        vectors=b"\0" * 16,
        plain=0.1 + 0.2,
    )


def watch_plan(on_above: float = 0.5) -> WatchPlan:
    return WatchPlan(
        kind="probe", sites=("a", "b"), rule=Rule(aggregation=Aggregation.MEAN, on_above=on_above, off_below=0.4),
        on_prompt=True, on_generated=False, while_on=True, skip_token_ids=(1, 2), probe="p", column=3, margin=True,
    )  # fmt: skip


def test_a_plan_survives_packing() -> None:
    pytest.importorskip("msgspec")
    plan = RequestPlan(
        tag=2**31 - 1,
        n_prompt=4,
        edits=(add(), add(1, Clause(ranges=((1, 2), (5, 9)), excluded_token_ids=(3,), n_prompt=4))),
        readouts=(ReadoutPlan(index=-1, kind="probe", clause=EVERYWHERE, sites=("a", "b"), probe="p", margin=True),),
        conditions=(
            ConditionPlan(
                kind="affine", clause=EVERYWHERE, sites=("a",), limit=-1e30, side=-1.0, scope="latched",
                aggregation="max", weights=b"\1\2", source=None,
            ),
        ),
        watches=(watch_plan(),),
    )  # fmt: skip
    assert unpack_plan(pack_plan(plan)) == plan


def test_what_is_not_a_plan_is_refused() -> None:
    msgspec = pytest.importorskip("msgspec")
    for bad in (b"", b"\x80", msgspec.msgpack.encode({"tag": "x", "n_prompt": 1}), b"\xc1" * 9):
        with pytest.raises(msgspec.MsgspecError):
            unpack_plan(bad)


def block(dtype: Any, n: int = 3) -> RowBlock:
    return RowBlock(
        kind="activations",
        tags=np.arange(n, dtype=np.int32),
        readouts=np.full(n, -2, dtype=np.int32),
        positions=np.arange(n, dtype=np.int32) + 7,
        values=(np.arange(n * 4).reshape(n, 4).astype(dtype), np.ones((n, 0), dtype=np.int32)),
    )


@pytest.mark.parametrize("large", [False, True])
def test_a_report_survives_packing(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("msgspec")
    if large:
        monkeypatch.setattr(messages, "ONE_FRAME_BYTES", 8)
    column = np.array([1, 2], dtype=np.int32)
    report = StepReport(
        rank=3,
        step=9,
        armed=(1, 2),
        closed=(7,),
        errors=(StepError(tag=4, reason="overflow", message="why"),),
        ran=(
            Ran(tags=column, starts=column + 1, counts=column + 2, applied=column + 3),
            Ran(tags=column[:1], starts=column[:1], counts=column[:1], applied=column[:1], steps=5),
        ),
        blocks=(block(np.float32), block(ml_dtypes.bfloat16), block(np.float16, 0), block(np.bool_)),
    )
    frames = pack_report(report)
    # A small message is one frame.
    assert (len(frames) == 1) == (not large)
    found = unpack_report([bytes(frame) for frame in frames])
    assert (found.rank, found.step, found.armed, found.closed) == (3, 9, (1, 2), (7,))
    assert found.errors == report.errors
    for its, own in zip(found.ran, report.ran, strict=True):
        assert its.steps == own.steps
        for name in ("tags", "starts", "counts", "applied"):
            np.testing.assert_array_equal(getattr(its, name), getattr(own, name))
    for ours, theirs in zip(found.blocks, report.blocks, strict=True):
        for name in ("tags", "readouts", "positions"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        for mine, its in zip(ours.values, theirs.values, strict=True):
            assert mine.dtype == its.dtype and mine.shape == its.shape
            np.testing.assert_array_equal(mine, its)


def test_rows_that_nobody_takes_fail_by_name(tmp_path: Path) -> None:
    zmq = pytest.importorskip("zmq")
    from glasshouse.server.engines.vllm.worker.reporter import Reporter

    reporter = Reporter(0, WorkerSettings(max_queued_messages=2, max_message_bytes=1 << 20))
    # Nobody listens: messages queue up to the high-water mark, then rows are dropped and named.
    reporter.connect(f"ipc://{tmp_path}/nobody")
    wide = RowBlock(
        kind="activations",
        tags=np.array([5, 6], dtype=np.int32),
        readouts=np.zeros(2, np.int32),
        positions=np.zeros(2, np.int32),
        values=(np.ones((2, 1 << 18), np.float32),),
    )
    dropped: set[int] = set()
    for step in range(4):
        dropped |= set(reporter.report(step, armed=[step], blocks=[wide]))
    assert dropped == {5, 6} and reporter.n_overflows > 0 and reporter.has_pending
    # What is small is kept, and comes when somebody takes it.
    receiver = zmq.Context.instance().socket(zmq.PULL)
    receiver.bind(f"ipc://{tmp_path}/nobody")
    receiver.setsockopt(zmq.RCVTIMEO, 20_000)
    armed, errors = [], []
    for _ in range(2):
        found = unpack_report(receiver.recv_multipart())
        armed += found.armed
    reporter.report(9)
    while not errors:
        found = unpack_report(receiver.recv_multipart())
        armed += found.armed
        errors += found.errors
    assert sorted(armed) == [0, 1, 2, 3]
    assert {error.tag for error in errors} == {5, 6} and errors[0].reason == "overflow"
    reporter.close()
    receiver.close(linger=0)


def test_excluded_prompt_positions_leave_the_ranges() -> None:
    positions = ResolvedPositions(
        ranges=((0, 5), (7, 9)),
        excluded=frozenset({0, 3, 8}),
        excluded_token_ids=frozenset({2, 1}),
        n_prompt=9,
    )
    found = clause_of(positions)
    assert found.ranges == ((1, 3), (4, 5), (7, 8))
    assert found.excluded_token_ids == (1, 2)
    inside = {p for low, high in found.ranges for p in range(low, high)}
    assert inside == {p for p in range(20) if positions.covers(p, 0)}


def test_a_prompt_that_is_read_is_not_taken_from_the_cache() -> None:
    def plan(low: int, **more: Any) -> RequestPlan:
        where = Clause(ranges=((low, 99),), n_prompt=4)
        read = ReadoutPlan(index=0, kind="activations", clause=where, sites=("a",))
        return RequestPlan(tag=1, n_prompt=4, readouts=(read,), **more)

    assert plan(2).reads_prompt and not plan(3).reads_prompt
    assert not RequestPlan(tag=1, n_prompt=4, edits=(add(),)).reads_prompt


def test_the_account_of_edits() -> None:
    late = Clause(ranges=((2, 4), (6, 100)), excluded_token_ids=(9,), n_prompt=3)
    ledger = Ledger([add(), add(1, late)])
    tokens = [1, 1, 1, 9, 1, 1, 9, 1, 1]
    ledger.ran(0, 3, 3 + 1)
    ledger.ran(3, 1, 1)  # token 9: the second edit leaves it out
    for position in (4, 5):
        ledger.ran(position, 1, 1)
    ledger.ran(6, 1, 1)  # token 9 again
    ledger.ran(2, 1, 2)  # preempted: run again
    ledger.ran(7, 1, 2)
    assert ledger.complete(8) and not ledger.complete(9)
    assert ledger.first_mismatch(tokens) is None
    assert ledger.applied(8, tokens) == {0: 8, 1: 2}
    ledger.ran(8, 1, 1)
    assert ledger.first_mismatch(tokens) == (8, 1, 1, 2)


def test_the_account_of_edits_that_wait() -> None:
    """Those of a watch are due where it had them in force; what ran beyond what was looked at is not asked about."""

    def account() -> Ledger:
        ledger = Ledger([add(), replace(add(1, Clause(ranges=((0, 6), (7, 100)), n_prompt=3)), watch=0)])
        ledger.ran(0, 3, 3)
        for position, applied in ((3, 1), (4, 2), (5, 2), (6, 1), (7, 2), (8, 1), (9, 1)):
            ledger.ran(position, 1, applied)
        # Preempted: all of it in one run.
        ledger.ran(0, 9, 9 + 3)
        return ledger

    right, late, other, early = account(), account(), account(), account()
    right.steered({0: [(4, 8)]}, 9)
    late.steered({0: [(5, 8)]}, 9)
    other.steered({1: [(4, 8)]}, 9)
    early.steered({0: [(4, 8)]}, 10)
    assert right.first_mismatch([1] * 10) is None and early.first_mismatch([1] * 10) is None
    assert late.first_mismatch([1] * 10) == (4, 1, 2, 1)
    assert other.first_mismatch([1] * 10) == (4, 1, 2, 1)
    beyond = account()
    beyond.ran(9, 1, 2)
    beyond.steered({0: [(4, 8)]}, 9)
    assert beyond.first_mismatch([1] * 10) is None
    without = Ledger([add()])
    without.ran(0, 3, 2)
    without.steered({}, 0)
    assert without.first_mismatch([1] * 3) == (0, 3, 2, 3), "nobody steers it: every run is asked about"


def edit(vector: float, positions: ResolvedPositions, name: str = "blocks.0.hook_resid_post") -> PreparedEdit:
    point = HookPoint(
        name=name,
        module_path="",
        kind="residual",
        layer=0,
        width=2,
        n_heads=0,
        d_head=0,
        readable=True,
        writable=True,
    )
    return PreparedEdit(
        index=0, kind="add_vector", hook_points=(point,), positions=positions, primitive=Primitive.ADD,
        vectors=torch.full((1, 2), vector), scalars=Scalars(plain=1.0), content_hash=f"{vector} {positions.ranges}",
    )  # fmt: skip


def test_the_salt_tells_edits_apart() -> None:
    here, there = ResolvedPositions(ranges=((0, 5),)), ResolvedPositions(ranges=((0, 6),))

    def salt(*edits: PreparedEdit, **more: Any) -> str | None:
        return cache_salt(edits, dictionary_keys={}, **more)

    one = edit(1.0, here)
    assert salt() is None and salt(user_salt="u") == "u"
    assert salt(one) == salt(edit(1.0, here))
    different = [
        salt(edit(2.0, here)), salt(edit(1.0, there)), salt(edit(1.0, here, "blocks.1.hook_resid_post")),
        salt(one, one), salt(one, epoch=1), salt(one, user_salt="u"),
    ]  # fmt: skip
    assert len({salt(one), *different}) == len(different) + 1

    def steered(n_prompt: int, waiting: tuple[PreparedEdit, ...] = (one,), bar: float = 0.5) -> str | None:
        # What the watches say is in their plans.
        steering = Steering(watches=(), edits=(waiting,), n_prompt=n_prompt)
        return salt(one, steering=steering, watches=(watch_plan(bar),))

    assert steered(3) == steered(3)
    assert len({salt(one), salt(one, one), steered(3), steered(4), steered(3, ()), steered(3, bar=0.6)}) == 6


def test_the_settings_are_in_the_compile_hash() -> None:
    arguments = engine_arguments(WorkerSettings())
    assert arguments["worker_cls"].endswith("GlasshouseWorker")
    told = json.loads(json.dumps(arguments["additional_config"]))["glasshouse"]
    assert told["plugin_version"] >= 1 and "hook_resid_post" in told["sites"]


class Runner:
    """As much of a runner as its adapter asks for."""

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> None: ...
    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> None: ...
    def _determine_batch_execution_and_padding(self, num_tokens: int, force_eager: bool = False) -> None: ...
    def _dummy_run(self, num_tokens: int, cudagraph_runtime_mode: Any = None) -> None: ...
    def get_model(self) -> None: ...


def test_an_unknown_vllm_is_refused() -> None:
    runners.check_version("0.32.5")
    with pytest.raises(runners.UnsupportedVLLM, match=r"vLLM 0\.40\.0 is not supported"):
        runners.check_version("0.40.0")
    runners.check_signatures(Runner(), v2=False)
    with pytest.raises(runners.UnsupportedVLLM, match=r"no method prepare_inputs|has no parameter dummy_run"):
        runners.check_signatures(Runner(), v2=True)

    class Renamed(Runner):
        def _prepare_inputs(self, output: Any) -> None: ...  # type: ignore[override]

    with pytest.raises(runners.UnsupportedVLLM, match="_prepare_inputs has no parameter scheduler_output"):
        runners.check_signatures(Renamed(), v2=False)
