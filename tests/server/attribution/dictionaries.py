"""Small random dictionaries for tiny models."""

from __future__ import annotations

import torch
from torch import Tensor

from glasshouse.server.dictionaries.architectures import ReLU
from glasshouse.server.dictionaries.formats.build import cross_layer, single_site
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.dictionaries.parameters import DecoderBlock

N_FEATURES = 12


def _drawn(seed: int, *shape: int, scale: float = 0.3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def random_dictionary(
    hook_in: str, hook_out: str, d_model: int, *, seed: int = 0, skip: bool = False
) -> LinearDictionary:
    parameters = single_site(
        W_enc=_drawn(seed, d_model, N_FEATURES),
        W_dec=_drawn(seed + 1, N_FEATURES, d_model),
        b_enc=_drawn(seed + 2, N_FEATURES),
        b_dec=_drawn(seed + 3, d_model),
        activation=ReLU(),
        source_format="test",
        hook_points_in=(hook_in,),
        hook_points_out=(hook_out,),
        W_skip=_drawn(seed + 4, d_model, d_model) if skip else None,
    )
    return LinearDictionary(f"random-{seed}", parameters)


def random_clt(hooks_in: tuple[str, ...], hooks_out: tuple[str, ...], d_model: int) -> LinearDictionary:
    n = len(hooks_in)
    parameters = cross_layer(
        encoders=[_drawn(layer, d_model, N_FEATURES) for layer in range(n)],
        decoders=[
            DecoderBlock(W_dec=_drawn(100 + 10 * group + site, N_FEATURES, d_model), group=group, site=site)
            for group in range(n)
            for site in range(group, n)
        ],
        activation=ReLU(),
        b_enc=_drawn(7, n * N_FEATURES),
        b_dec=_drawn(8, n, d_model),
        source_format="test",
        hook_points_in=hooks_in,
        hook_points_out=hooks_out,
    )
    return LinearDictionary("random-clt", parameters)
