"""A forward pass with gradients, on a twin of the served model.

1. `GradientModel` makes the twin once (`twin`): shared weights, hooks of its own, float32. It may be used from
   any thread but the event loop's; a lock lets one forward pass run at a time.
2. `forward` attaches what was asked, runs the tokens, and takes everything off again before it returns. At a
   hook point, in this order: edits (in place), a freeze, a *probe*, after-edits, a reading.
3. A probe is a zero added to the live activation. Its gradient is the gradient at the point, whatever happens
   to the tensor later (edits are in place, and two points can be one tensor). Nothing upstream of the first
   probe is recorded.
4. Logits are made from the final hidden state only where they are asked for; probabilities are of the capped
   logits, gradient rows may be asked of the uncapped ones.

Shapes: B batch, T positions, V vocabulary. All inputs of a batch have T tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from glasshouse.server.attribution.freezing import (
    NOTHING_FROZEN,
    Freeze,
    Held,
    freeze_norm,
    record_scale,
    stop_gradient,
)
from glasshouse.server.attribution.resuming import BaseRun, RecordingMemory, Resume, run_suffix
from glasshouse.server.attribution.twin import twin_of
from glasshouse.server.hooks.attachment import attach
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.hooks.taps import Remove
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.wire import reasons

Edit = Callable[[Tensor], None]
"""Changes a live activation in place: (B, T, width), or (B, H, T, T) for attention maps."""

Edits = Mapping[str, Sequence[Edit]]

_EMBEDDED_AT_ONCE = 8192


class _Embedded(Exception):
    """The embeddings are seen; the rest of the pass is not wanted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """What a forward pass left: readings, probes, and the hidden state after the final norm.

    hidden: (B, T, d_model). readings: (B, T, width) under the names asked for, with their graph where there are
    probes. probes: the zeros to differentiate by, same shapes. held: patterns and scales, where recorded.
    """

    loaded: LoadedModel
    hidden: Tensor
    readings: dict[str, Tensor]
    probes: dict[str, Tensor]
    held: Held

    def logits(self, position: int = -1, *, capped: bool = True) -> Tensor:
        """(B, V) at one position, after the final soft cap or before it."""
        raw, after_cap = self.loaded.family.unembed(self.loaded.model, self.hidden[:, position])
        return after_cap if capped else raw

    def gradients(self, objective: Tensor, *, retain: bool = False) -> dict[str, Tensor]:
        """The gradient of a scalar at every probe; zero where it does not depend on one.

        With rows that do not see each other, the gradient of a sum over rows is each row's own.
        """
        return self.pull_back([objective], [torch.ones_like(objective)], retain=retain)

    def pull_back(
        self,
        outputs: Sequence[Tensor],
        vectors: Sequence[Tensor],
        *,
        retain: bool = False,
        n_rows: int | None = None,
    ) -> dict[str, Tensor]:
        """Vector-Jacobian products: `vectors` injected as the gradients of `outputs`, read at every probe.

        With `n_rows` the vectors and the results have that many rows in front: one graph serves all of them.
        """
        rows = () if n_rows is None else (n_rows,)
        pairs = [(o, v) for o, v in zip(outputs, vectors) if o.requires_grad]
        if not pairs:
            return {name: probe.new_zeros(*rows, *probe.shape) for name, probe in self.probes.items()}
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            list(self.probes.values()),
            [v for _, v in pairs],
            retain_graph=retain,
            allow_unused=True,
            is_grads_batched=n_rows is not None,
        )
        return {
            name: probe.new_zeros(*rows, *probe.shape) if gradient is None else gradient
            for (name, probe), gradient in zip(self.probes.items(), found)
        }


class GradientModel:
    """The twin of a served model, its hook points by name, and passes through it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = twin_of(loaded)
        self.table = HookTable(self.loaded)
        self._lock = threading.Lock()
        self._norm_taps = {
            tap.point.name: tap for tap in self.loaded.family.taps if tap.where == "normalized"
        }

    @property
    def n_layers(self) -> int:
        return self.loaded.n_layers

    def has(self, name: str) -> bool:
        """Whether this architecture has the hook point `name`."""
        return any(point.name == name for point in self.table.points)

    def tokens(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """(1, T) or (B, T) int64 on the model's device."""
        tokens = torch.as_tensor(token_ids, dtype=torch.int64, device=self.loaded.device)
        tokens = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
        if tokens.shape[1] == 0:
            raise InvalidArgument(
                "The input has no tokens.",
                reason=reasons.EMPTY_INPUT,
                field="input",
                remedy="Give at least one token.",
            )
        return tokens

    @cached_property
    def mean_embedding(self) -> Tensor:
        """(d_model,): what `hook_embed` is on average over the vocabulary, whatever the model does to its embeddings."""
        total = torch.zeros(self.loaded.d_model, device=self.loaded.device)

        def add(embedded_B1D: Tensor) -> None:
            total.add_(embedded_B1D.sum((0, 1)))
            raise _Embedded

        for some in torch.split(torch.arange(self.loaded.vocab_size), _EMBEDDED_AT_ONCE):
            try:
                self.forward(self.tokens(some[:, None]), edits={"hook_embed": [add]})
            except _Embedded:
                continue
        return total / self.loaded.vocab_size

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        read: Iterable[str] = (),
        differentiate: Iterable[str] = (),
        edits: Edits | None = None,
        after: Edits | None = None,
        freeze: Freeze = NOTHING_FROZEN,
        record: bool = False,
        gradients: bool | None = None,
        resume: Resume | None = None,
    ) -> Pass:
        """One pass over equal-length rows.

        `edits` run before the probes, `after` behind them (a hook on the gradient goes there). `record` keeps
        every pattern and norm scale for a later pass to be held at. `gradients` records a graph even without
        probes, for edits that bring leaves of their own. `resume` starts at a later layer and position of a base
        run; every tensor of the pass then begins at that position.
        """
        reading = {name: self._name(name) for name in read}
        probing = {name: self._name(name) for name in differentiate}
        visit = _Visit(
            set(reading.values()),
            set(probing.values()),
            self._named(edits),
            self._named(after),
            freeze,
            record,
        )
        with torch.inference_mode(False), self._lock:
            with_graph = bool(probing) if gradients is None else gradients
            with torch.set_grad_enabled(with_graph):
                hidden = self._run(tokens_BT, visit, resume)
        return Pass(
            loaded=self.loaded,
            hidden=hidden,
            readings={asked: visit.readings[name] for asked, name in reading.items()},
            probes={asked: visit.probes[name] for asked, name in probing.items()},
            held=Held(patterns=visit.patterns, scales=visit.scales),
        )

    @torch.no_grad()
    def base_run(self, tokens_BT: Tensor) -> BaseRun:
        """What passes that `resume` start from: each row's streams, keys and values."""
        base, names = BaseRun(), [f"blocks.{layer}.hook_resid_pre" for layer in range(self.n_layers)]
        visit = _Visit(set(names), set(), {}, {}, NOTHING_FROZEN, False)
        with torch.inference_mode(False), self._lock:
            self.loaded.attention.memory = RecordingMemory(self.loaded, base, tokens_BT.shape[1])
            try:
                self._run(tokens_BT, visit, None)
            finally:
                self.loaded.attention.memory = None
        base.streams.update({layer: visit.readings[name] for layer, name in enumerate(names)})
        return base

    def _name(self, name: str) -> str:
        return self.table.resolve(name).name

    def _named(self, edits: Edits | None) -> dict[str, list[Edit]]:
        named: dict[str, list[Edit]] = {}
        for name, steps in (edits or {}).items():
            named.setdefault(self._name(name), []).extend(steps)
        return named

    def _run(self, tokens_BT: Tensor, visit: _Visit, resume: Resume | None) -> Tensor:
        removes: list[Remove] = []

        def detach() -> None:
            while removes:
                removes.pop()()

        model, held = self.loaded.model, visit.freeze.held
        names = visit.points()
        try:
            if visit.freeze.norms:
                for name, tap in self._norm_taps.items():
                    value = None if held is None else held.scales.get(name)
                    names.discard(name)
                    removes.append(freeze_norm(model, tap, value, visit.at_norm(tap.point)))
            if visit.record:
                removes += [record_scale(model, tap, visit.scales) for tap in self._norm_taps.values()]
            if visit.freeze.patterns or visit.record:
                names |= {p.name for p in self.table.points if p.name.endswith("attn.hook_pattern")}
            removes.append(attach(self.table, names, visit).remove)
            if resume is not None:
                return run_suffix(self.loaded, tokens_BT, resume, detach)
            positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
            return self.loaded.family.forward_hidden(model, tokens_BT, positions)
        finally:
            detach()


class _Visit:
    """The callback of one pass."""

    def __init__(
        self,
        reading: set[str],
        probing: set[str],
        edits: Edits,
        after: Edits,
        freeze: Freeze,
        record: bool,
    ) -> None:
        self._reading, self._probing, self._edits, self._after = reading, probing, edits, after
        self.freeze, self.record = freeze, record
        self.readings: dict[str, Tensor] = {}
        self.probes: dict[str, Tensor] = {}
        self.patterns: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}

    def points(self) -> set[str]:
        return self._reading | self._probing | set(self._edits) | set(self._after)

    def at_norm(self, point: HookPoint) -> Edit:
        def at(tensor: Tensor) -> None:
            if point.name in self.points():
                self(point, tensor)

        return at

    def __call__(self, point: HookPoint, tensor: Tensor, /) -> bool:
        name = point.name
        wrote = name in self._edits or name in self._after or name in self._probing
        for edit in self._edits.get(name, ()):
            edit(tensor)
        if name.endswith("attn.hook_pattern"):
            self._at_pattern(name, tensor)
        if name in self._probing:
            probe = torch.zeros(tensor.shape, device=tensor.device, requires_grad=True)
            tensor.add_(probe)
            self.probes[name] = probe
        for edit in self._after.get(name, ()):
            edit(tensor)
        if name in self._reading:
            self.readings[name] = tensor.clone()
        return wrote

    def _at_pattern(self, name: str, pattern: Tensor) -> None:
        if self.freeze.patterns:
            held = None if self.freeze.held is None else self.freeze.held.patterns.get(name)
            if pattern.requires_grad:
                stop_gradient(pattern)
            if held is not None:
                pattern.copy_(held.expand_as(pattern))
        if self.record:
            self.patterns[name] = pattern.detach().clone()
