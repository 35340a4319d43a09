"""Assembling `DictionaryParameters` in the common cases."""

from __future__ import annotations

from torch import Tensor

from glasshouse.server.dictionaries.architectures import Activation
from glasshouse.server.dictionaries.normalisation import Identity, Normalisation
from glasshouse.server.dictionaries.parameters import (
    DecoderBlock,
    DecoderScale,
    DictionaryParameters,
    EncoderBlock,
    Skip,
)


def single_site(
    *,
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    activation: Activation,
    source_format: str,
    hook_points_in: tuple[str, ...],
    hook_points_out: tuple[str, ...],
    subtract_b_dec: bool = False,
    W_skip: Tensor | None = None,
    normalisation: Normalisation | None = None,
    scale: DecoderScale | None = None,
    model_name: str = "",
    notes: tuple[str, ...] = (),
    kind: str = "",
) -> DictionaryParameters:
    """An SAE or transcoder from logical layouts: W_enc (D, F), W_dec (F, E), W_skip (D, E), b_dec (E,)."""
    return DictionaryParameters(
        kind=kind or ("sae" if hook_points_in == hook_points_out else "transcoder"),
        hook_points_in=hook_points_in,
        hook_points_out=hook_points_out,
        encoders=(EncoderBlock(W_enc=W_enc),),
        decoders=(DecoderBlock(W_dec=W_dec),),
        activation=activation,
        source_format=source_format,
        b_enc=b_enc,
        b_dec=None if b_dec is None else b_dec.unsqueeze(0),
        b_in=b_dec.unsqueeze(0) if subtract_b_dec and b_dec is not None else None,
        skips=() if W_skip is None else (Skip(W_skip=W_skip),),
        normalisation=normalisation or Identity(),
        scale=scale,
        model_name=model_name,
        notes=notes,
    )


def cross_layer(
    *,
    encoders: list[Tensor],
    decoders: list[DecoderBlock],
    activation: Activation,
    b_enc: Tensor,
    b_dec: Tensor,
    source_format: str,
    hook_points_in: tuple[str, ...],
    hook_points_out: tuple[str, ...],
    kind: str = "cross_layer_transcoder",
    skips: tuple[Skip, ...] = (),
    normalisation: Normalisation | None = None,
    scale: DecoderScale | None = None,
    model_name: str = "",
    notes: tuple[str, ...] = (),
) -> DictionaryParameters:
    """One encoder a layer (each (D, F_l) logical), features grouped by source layer; b_enc (sum F_l,), b_dec
    (M, E).
    """
    blocks = tuple(EncoderBlock(W_enc=W_enc, sites=(layer,)) for layer, W_enc in enumerate(encoders))
    return DictionaryParameters(
        kind=kind,
        hook_points_in=hook_points_in,
        hook_points_out=hook_points_out,
        encoders=blocks,
        decoders=tuple(decoders),
        activation=activation,
        source_format=source_format,
        b_enc=b_enc,
        b_dec=b_dec,
        skips=skips,
        normalisation=normalisation or Identity(),
        scale=scale,
        model_name=model_name,
        notes=notes,
    )


def crosscoder(
    *,
    W_enc: Tensor,
    W_dec: list[Tensor],
    activation: Activation,
    b_enc: Tensor,
    b_dec: Tensor,
    source_format: str,
    hook_points: tuple[str, ...],
    normalisation: Normalisation | None = None,
    scale: DecoderScale | None = None,
    per_site: bool = False,
    model_name: str = "",
    notes: tuple[str, ...] = (),
) -> DictionaryParameters:
    """A summed encoder W_enc (S * D, F) and one decoder (F, D) a site.

    Across layers or across two models alike: a site is a hook point of whichever model. With `per_site` every
    feature is gated once a site (its own scale, its own value): group s holds the features as site s sees
    them and writes only there, and b_enc is (S * F,).
    """
    n_sites = len(hook_points)
    sites = tuple(range(n_sites))
    return DictionaryParameters(
        kind="crosscoder",
        hook_points_in=hook_points,
        hook_points_out=hook_points,
        encoders=(EncoderBlock(W_enc=W_enc, sites=sites, repeats=n_sites if per_site else 1),),
        decoders=tuple(
            DecoderBlock(W_dec=rows, group=site if per_site else 0, site=site)
            for site, rows in enumerate(W_dec)
        ),
        activation=activation,
        source_format=source_format,
        b_enc=b_enc,
        b_dec=b_dec,
        normalisation=normalisation or Identity(),
        scale=scale,
        model_name=model_name,
        notes=notes,
    )
