"""Sixteen requests treated in sixteen ways, as the engine is asked for it and as plain hooks do it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from glasshouse.server.types.interventions import (
    AblateDirection,
    AddVector,
    CapProjection,
    Edit,
    Intervention,
    Replace,
    Rotate,
)
from glasshouse.server.types.selectors import EVERYWHERE, NamedPositions, Selector

from . import formulas
from .formulas import Formula

PROMPTS = [
    "Once upon a time there was a little girl named Lily.",
    "The cats near the tree",
    "One day, a boy named Tom went to the park. It was raining and he was very sad because",
    "The capital of France is",
    "In the end,",
]
N_TOKENS = 20
READ = "blocks.4.hook_resid_post"

# (position, n_prompt) -> whether the selector covers it.
Covers = Callable[[int, int], bool]


@dataclass(frozen=True)
class Part:
    """One intervention: `ours` for the engine; `covers` and `formula`, or one a position, for the oracle."""

    ours: Intervention
    covers: Covers
    formula: Formula | dict[int, Formula]

    def hooked(self, n_prompt: int) -> list[tuple[str, Callable[[int], bool], Formula]]:
        """(hook point, whether a position is edited, the edit) as `Oracle` takes them."""
        name = self.ours.hook_point
        if isinstance(self.formula, dict):
            return [(name, lambda p, at=at: p == at, formula) for at, formula in self.formula.items()]
        return [(name, lambda p: self.covers(p, n_prompt), self.formula)]


Treatment = list[Part]


def everywhere(p: int, n: int) -> bool:
    """Every position."""
    return True


def part(
    name: str,
    edit: Edit,
    formula: Formula | dict[int, Formula],
    positions: Selector | None = None,
    covers: Covers = everywhere,
    keep: bool = False,
) -> Part:
    """At every position unless told otherwise."""
    where = positions or EVERYWHERE
    ours = Intervention(hook_point=name, edit=edit, positions=where, preserve_norm=keep)
    return Part(ours, covers, formula)


def add(
    name: str, v: np.ndarray, c: float, positions: Selector | None = None, covers: Covers = everywhere
) -> Part:
    """Plain steering."""
    return part(name, AddVector(vector=v, coefficient=c), formulas.add(v, c), positions, covers)


def ablate(name: str, v: np.ndarray) -> Part:
    """A direction removed everywhere."""
    return part(name, AblateDirection(vector=v), formulas.ablate(v))


# What stands in where an engine does not reach a hook point.
NEAREST = {
    "hook_embed": "blocks.0.hook_resid_pre",
    "blocks.1.mlp.hook_post": "blocks.1.hook_mlp_out",
    "blocks.0.attn.hook_z": "blocks.0.hook_attn_out",
    "blocks.5.attn.hook_q": "blocks.5.hook_resid_pre",
}


def treatments(d_model: int, d_mlp: int, reached: Collection[str] | None = None) -> list[Treatment]:
    """The sixteen: none, every kind of edit, every kind of selector, several at once and in order. `reached`: the hook
    points there are; None for all.
    """

    def at(name: str) -> str:
        return name if reached is None or name in reached else NEAREST[name]

    rng = np.random.default_rng(7)

    def vector(scale: float = 1.0, width: int = d_model) -> np.ndarray:
        return (rng.standard_normal(width) * scale).astype(np.float32)

    v = [vector() for _ in range(16)]
    inside_mlp = at("blocks.1.mlp.hook_post")
    wide = vector(0.5, d_model if inside_mlp in NEAREST.values() else d_mlp)
    patch, rows = vector(), np.stack([vector() for _ in range(3)])
    prompt = Selector(named=NamedPositions.PROMPT)
    generated = Selector(named=NamedPositions.GENERATED)
    last = Selector(named=NamedPositions.LAST)
    listed = Selector(at=(0, 2, 9))
    norm_scaled = AddVector(vector=v[1], coefficient=0.4, norm_scaled=True)
    kept = AddVector(vector=v[2], coefficient=-2.0)
    cap = CapProjection(vector=v[4], maximum=0.1, minimum=-0.1)
    rotate = Rotate(first=v[5], second=v[6], angle_radians=2.0)
    by_position = {at: formulas.constant(row) for at, row in enumerate(rows, start=1)}
    return [
        [],
        [add("blocks.2.hook_resid_post", v[0], 1.5)],
        [part("blocks.3.hook_resid_pre", norm_scaled, formulas.add_norm(v[1], 0.4))],
        [part("blocks.1.hook_resid_mid", kept, formulas.add_kept(v[2], -2.0), keep=True)],
        [ablate("blocks.4.hook_resid_post", v[3])],
        [part("blocks.3.hook_resid_post", cap, formulas.cap(v[4], -0.1, 0.1))],
        [part("blocks.2.hook_resid_mid", rotate, formulas.rotate(v[5], v[6], 2.0))],
        [
            part(
                "blocks.2.hook_resid_post",
                Replace(activations=patch),
                formulas.constant(patch),
                last,
                lambda p, n: p == n - 1,
            )
        ],
        [add("blocks.1.hook_resid_post", v[7], 2.0, generated, lambda p, n: p >= n)],
        [add("blocks.1.hook_resid_post", v[8], 2.0, prompt, lambda p, n: p < n)],
        [
            add("blocks.2.hook_attn_out", v[9], 1.0, listed, lambda p, n: p in (0, 2, 9)),
            ablate("blocks.3.hook_mlp_out", v[10]),
        ],
        [add(inside_mlp, wide, 1.0, Selector(span=(3, 11)), lambda p, n: 3 <= p < 11)],
        [
            add(
                at("hook_embed"),
                v[11],
                0.5,
                Selector(named=NamedPositions.ALL, exclude_bos=True),
                lambda p, n: p != 0,
            )
        ],
        [
            add("blocks.3.hook_resid_post", v[12], 1.0),
            ablate("blocks.3.hook_resid_post", v[12]),
            add("blocks.3.hook_resid_post", v[13], 1.0, generated, lambda p, n: p >= n),
        ],
        [
            add(at("blocks.0.attn.hook_z"), v[14], 1.0),
            ablate(at("blocks.5.attn.hook_q"), v[15]),
        ],
        [
            part(
                "blocks.2.hook_resid_post",
                Replace(activations=rows),
                by_position,
                Selector(at=(1, 2, 3)),
                lambda p, n: p in (1, 2, 3),
            )
        ],
    ]


def hooked(treatment: Sequence[Part], n_prompt: int) -> list[tuple[str, Callable[[int], bool], Formula]]:
    """A treatment as `Oracle` takes it."""
    return [edit for each in treatment for edit in each.hooked(n_prompt)]
