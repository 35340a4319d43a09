"""Named directions in vLLM's workers: sent once, kept while somebody uses them, never at the price of a request."""

from __future__ import annotations

import gc
from typing import Any

import torch

from glasshouse.server.engines.vllm.contract.settings import LOAD_VECTORS, UNLOAD_VECTORS
from glasshouse.server.engines.vllm.gateway.vectors import WorkerVectors
from glasshouse.server.interventions.edits import PreparedEdit, Primitive, Scalars
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.selectors import ResolvedPositions

POINT = HookPoint(
    name="blocks.0.hook_resid_post", module_path="", kind="residual", layer=0, width=4, n_heads=0, d_head=0,
    readable=True, writable=True,
)  # fmt: skip


class Workers:
    """Holds what real ones would, and counts what they are sent."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.n_sent = 0

    async def call(self, method: str, arguments: tuple[Any, ...]) -> None:
        if method == LOAD_VECTORS:
            self.n_sent += len(arguments[0])
            self.held |= arguments[0]
        else:
            assert method == UNLOAD_VECTORS
            for key in arguments[0]:
                del self.held[key]


def edit(value: float, *, named: bool = True, rows: int = 1) -> PreparedEdit:
    """An edit by a direction of the registry, or by an inline one."""
    return PreparedEdit(
        index=0, kind="add", hook_points=(POINT,), positions=ResolvedPositions(ranges=((0, 9),)),
        primitive=Primitive.ADD, vectors=torch.full((rows, 4), value), scalars=Scalars(),
        resources=("joy@1",) if named else (),
    )  # fmt: skip


async def test_a_direction_is_sent_once() -> None:
    workers = Workers()
    vectors = WorkerVectors(workers.call, capacity=4)
    first, second = edit(1.0), edit(1.0)
    one, two = await vectors.lease([first, edit(2.0)]), await vectors.lease([second])
    assert one is not None and two is not None
    assert workers.n_sent == 2
    assert one.keys[id(first)] == two.keys[id(second)]
    assert workers.held[two.keys[id(second)][0]] == torch.ones(4).numpy().tobytes()


async def test_what_has_no_name_goes_with_its_request() -> None:
    workers = Workers()
    assert await WorkerVectors(workers.call, capacity=4).lease([edit(1.0, named=False)]) is None
    assert not workers.n_sent


async def test_what_nobody_uses_makes_room_and_what_is_used_stays() -> None:
    workers = Workers()
    vectors = WorkerVectors(workers.call, capacity=2)
    used, left = edit(1.0), edit(2.0)
    lease, old = await vectors.lease([used]), await vectors.lease([left])
    assert lease is not None and old is not None
    assert await vectors.lease([edit(3.0)]) is None  # both are in use
    keys = old.keys[id(left)]
    del old
    gc.collect()
    new = await vectors.lease([edit(3.0)])
    assert new is not None
    assert keys[0] not in workers.held
    assert lease.keys[id(used)][0] in workers.held
    assert await vectors.lease([edit(4.0, rows=3)]) is None
    assert len(workers.held) == 2
