"""The dictionaries of fable: what each reads and writes, its architecture, its size and its target.

`ARCHITECTURES` name how a dictionary is trained; what it is saved as is `coder.SparseCoder`'s matter. A
cross-layer transcoder and a crosscoder train as BatchTopK and are saved as the JumpReLU they are at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["sae", "transcoder", "crosscoder", "cross_layer_transcoder"]
Architecture = Literal["standard", "gated", "jumprelu", "topk", "batchtopk"]

N_LAYERS = 6


@dataclass(frozen=True, kw_only=True)
class DictionaryRecipe:
    """Everything that decides a dictionary's weights, besides the activations.

    d_sae:      features in all; a cross-layer transcoder has d_sae / n_layers a source layer
    target_l0:  features that fire per position, in all; k for the TopK family
    n_tokens:   positions trained on, passes over the activations included
    """

    name: str
    kind: Kind
    architecture: Architecture
    hook_points_in: tuple[str, ...]
    hook_points_out: tuple[str, ...]
    d_sae: int = 1024
    target_l0: float = 32.0
    n_tokens: int = 2_400_000
    batch_size: int = 2048
    lr: float = 2e-3
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    seed: int = 0

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return max(1, self.n_tokens // self.batch_size)

    @property
    def n_groups(self) -> int:
        """Encoders that read one hook point each (cross-layer), or one that reads all of them together."""
        return len(self.hook_points_in) if self.kind == "cross_layer_transcoder" else 1

    def rate(self, step: int) -> float:
        """The learning rate at `step`, as a fraction of its peak: warm-up, plateau, linear fall to zero."""
        decay_start = self.n_steps * (1 - self.decay_fraction)
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step < decay_start:
            return 1.0
        return max(0.0, (self.n_steps - step) / (self.n_steps - decay_start))


def _layers(point: str) -> tuple[str, ...]:
    return tuple(f"blocks.{layer}.{point}" for layer in range(N_LAYERS))


_RESIDUALS, _MLP_INPUTS, _MLP_OUTPUTS = (
    _layers("hook_resid_post"),
    _layers("ln2.hook_out"),
    _layers("hook_mlp_out"),
)
_SAE_ARCHITECTURES: tuple[Architecture, ...] = (
    "standard",
    "gated",
    "jumprelu",
    "topk",
    "batchtopk",
    "jumprelu",
)

#: Where the loss recovered was hardest: more features at a position and more training.
_HARDER: dict[str, dict[str, Any]] = {
    "resid-post-5": {"target_l0": 38.0, "n_tokens": 4_800_000},
    "transcoder-3": {"target_l0": 39.0, "n_tokens": 4_800_000},
}

RECIPES: tuple[DictionaryRecipe, ...] = (
    *(
        DictionaryRecipe(
            name=f"resid-post-{layer}",
            kind="sae",
            architecture=architecture,
            hook_points_in=(_RESIDUALS[layer],),
            hook_points_out=(_RESIDUALS[layer],),
            **_HARDER.get(f"resid-post-{layer}", {}),
        )
        for layer, architecture in enumerate(_SAE_ARCHITECTURES)
    ),
    *(
        DictionaryRecipe(
            name=f"transcoder-{layer}",
            kind="transcoder",
            architecture="batchtopk",
            hook_points_in=(_MLP_INPUTS[layer],),
            hook_points_out=(_MLP_OUTPUTS[layer],),
            d_sae=1536,
            **{"target_l0": 36.0, **_HARDER.get(f"transcoder-{layer}", {})},
        )
        for layer in range(N_LAYERS)
    ),
    DictionaryRecipe(
        name="clt",
        kind="cross_layer_transcoder",
        architecture="batchtopk",
        hook_points_in=_MLP_INPUTS,
        hook_points_out=_MLP_OUTPUTS,
        d_sae=512 * N_LAYERS,
        target_l0=36.0,
        n_tokens=1_800_000,
        batch_size=1024,
    ),
    DictionaryRecipe(
        name="crosscoder",
        kind="crosscoder",
        architecture="batchtopk",
        hook_points_in=_RESIDUALS,
        hook_points_out=_RESIDUALS,
        d_sae=1536,
        target_l0=36.0,
        n_tokens=1_300_000,
        batch_size=1024,
    ),
)


def recipes(names: Sequence[str] | None = None) -> list[DictionaryRecipe]:
    """The recipes of these names, all without names; unknown names are a ValueError that lists the known."""
    known = {recipe.name: recipe for recipe in RECIPES}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"no dictionary {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else list(RECIPES)
