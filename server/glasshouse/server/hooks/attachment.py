"""Callbacks attached to a set of hook points for as long as a context lasts.

Only the modules of the asked points get hooks: without an attachment a forward pass runs no code of ours
outside the attention function.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from glasshouse.server.hooks.table import HookTable
from glasshouse.server.hooks.taps import Remove, TapCallback, install_tap


class Attachment:
    """Installed taps. Leaving the context, or `remove`, takes all of them off; removing twice is harmless."""

    def __init__(self, removes: list[Remove]) -> None:
        self._removes = removes

    def remove(self) -> None:
        while self._removes:
            self._removes.pop()()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def attach(table: HookTable, names: Iterable[str], callback: TapCallback) -> Attachment:
    """Call `callback(point, tensor)` at each named point of every forward pass until removed.

    `names` may be canonical or aliases; a point named twice is tapped once. `tensor` is the live activation,
    (B, T, width), possibly a non-contiguous view; the callback may edit it in place and returns whether it
    did. Attention maps come as (B, n_heads, n_query, n_key), to read only. Points that are the same tensor
    (``resid_post`` of one layer, ``resid_pre`` of the next) are called in the order of the forward pass.
    ``unembed`` cannot be attached: the engine has the logits in hand.
    """
    points = {table.resolve(name).name for name in names}
    removes: list[Remove] = []
    attachment = Attachment(removes)
    try:
        for name in sorted(points, key=table.position):
            removes.append(install_tap(table.loaded.model, table.tap(name), callback))
    except BaseException:
        attachment.remove()
        raise
    return attachment
