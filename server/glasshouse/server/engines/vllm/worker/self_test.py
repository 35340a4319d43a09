"""Before the first request: do the hooks that were traced into the graph run, read what they claim, and take effect?

On made-up tokens, in the model as it will serve (compiled or not), one pass with every hook point read, and one more a hook
point with a vector added there:

1. Every hook point must fire.
2. A stream must be what came before plus what was added: resid_mid = resid_pre + attn_out, resid_post = resid_mid +
   mlp_out, and what leaves a layer enters the next. That is what the names promise, checked on the model that was loaded.
3. Where a vector is added, the point must read what it was plus the vector, and the sums further on must have it too:
   an edit that the model does not go on with breaks them.

Attention has no cache to read in such a pass and puts out whatever lies in memory, so what it adds is first set to numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import junctions
from .actions import Action, Capture, PlainAdd, Rows
from .hooks import Hooks

_N_TOKENS = 8


class SelfTestFailed(RuntimeError):
    """The hooks of the loaded model do not do what they claim."""


def run(hooks: Hooks, dummy_pass: Callable[[int], None]) -> None:
    """Raises `SelfTestFailed` with the hook point that is wrong."""
    _check_sums(_pass(hooks, dummy_pass, None), edited="")
    for site, name in enumerate(hooks.sites.names):
        _check_sums(_pass(hooks, dummy_pass, site), edited=name)


class _Settling:
    """Puts finite numbers where attention left none."""

    members: Sequence[int] = ()

    def __call__(self, x: Tensor, residual: Tensor | None) -> None:
        ramp = torch.arange(x.shape[1], dtype=torch.float32, device=x.device) % 5 - 2
        x.copy_((0.1 * ramp).expand_as(x))


class _Adding:
    """Adds a vector that stands out from what it finds, and checks that it is there afterwards."""

    members: Sequence[int] = ()

    def __init__(self, name: str, rows: Rows) -> None:
        self._name = name
        self._rows = rows
        self.error = ""

    def __call__(self, x: Tensor, residual: Tensor | None) -> None:
        before = self._rows.take(x, residual).clone()
        scale = float(before.abs().max()) + 1.0
        ramp = torch.arange(before.shape[1], dtype=torch.float32, device=before.device) % 7 - 3
        delta = (ramp * scale).expand_as(before).contiguous()
        PlainAdd(rows=self._rows, delta_NW=delta, members=())(x, residual)
        after = self._rows.take(x, residual)
        self.error = _difference(self._name, "adding a vector", after, before.float() + delta)


def _pass(hooks: Hooks, dummy_pass: Callable[[int], None], edited: int | None) -> dict[str, Tensor]:
    sites = hooks.sites
    captures: list[Capture] = []
    adding: _Adding | None = None
    actions: dict[int, list[Action]] = {}
    for site, (target, junction) in enumerate(zip(sites.targets, sites.junctions, strict=True)):
        rows = Rows(target=target, n_tokens=_N_TOKENS, rows_N=None)
        at = actions.setdefault(junction, [])
        if sites.names[site].endswith("hook_attn_out"):
            at.append(_Settling())
        if site == edited:
            adding = _Adding(sites.names[site], rows)
            at.append(adding)
        captures.append(Capture(rows=rows, members=()))
        at.append(captures[-1])
    fired: set[int] = set()

    def runner(index: int, todo: list[Action]) -> junctions.JunctionRun:
        def run_junction(x: Tensor, residual: Tensor | None) -> None:
            fired.add(index)
            for action in todo:
                action(x, residual)

        return run_junction

    for index, todo in actions.items():
        junctions.set_run(index, runner(index, todo))
    try:
        dummy_pass(_N_TOKENS)
    finally:
        junctions.clear()
    silent = [name for name, j in zip(sites.names, sites.junctions, strict=True) if j not in fired]
    if silent:
        raise SelfTestFailed(
            f"{silent[0]} did not fire: the compiled graph lacks its hook. Delete vLLM's and Inductor's compile caches, or "
            "start with enforce_eager"
        )
    if adding is not None and adding.error:
        raise SelfTestFailed(adding.error)
    found = {}
    for name, capture in zip(sites.names, captures, strict=True):
        assert capture.taken_NW is not None
        found[name] = capture.taken_NW
    return found


def _sums(found: dict[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Points and the points that they must be the sum of."""
    layers = sorted({int(name.split(".")[1]) for name in found if name.endswith("hook_mlp_out")})
    for layer in layers:
        at = f"blocks.{layer}.hook_"
        if f"{at}resid_mid" in found:
            yield f"{at}resid_mid", (f"{at}resid_pre", f"{at}attn_out")
            yield f"{at}resid_post", (f"{at}resid_mid", f"{at}mlp_out")
        else:
            yield f"{at}resid_post", (f"{at}resid_pre", f"{at}attn_out", f"{at}mlp_out")
        yield f"blocks.{layer + 1}.hook_resid_pre", (f"{at}resid_post",)


def _check_sums(found: dict[str, Tensor], *, edited: str) -> None:
    for name, parts in _sums(found):
        # The first layer of a later pipeline stage has its resid_pre on the stage before.
        if name == edited or any(point not in found for point in (name, *parts)):
            continue
        expected = torch.stack([found[part].float() for part in parts]).sum(0)
        error = _difference(name, f"the sum of {', '.join(parts)}", found[name], expected)
        if error:
            raise SelfTestFailed(f"{error}, with {edited} edited" if edited else error)


def _difference(name: str, what: str, found: Tensor, expected: Tensor) -> str:
    scale = float(expected.abs().max()) + 1.0
    tolerance = (1e-5 if found.dtype == torch.float32 else 0.05) * scale
    error = float((found.float() - expected).abs().max())
    if error <= tolerance:
        return ""
    return f"{name}: {what} is off by {error:.3g} on made-up tokens (activations up to {scale:.3g})"
