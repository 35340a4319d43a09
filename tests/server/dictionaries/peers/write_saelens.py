"""Dictionaries of every architecture, saved by sae-lens."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import D, F, N, expected, randomise, seed, x_of
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)

META = {"hook_name": "blocks.3.hook_resid_post", "model_name": "m"}
OUT_META = {**META, "hook_name_out": "blocks.3.hook_mlp_out"}


def write(out: Path, name: str, cls: type, config_cls: type, **settings: object) -> None:
    transcoder = "transcoder" in name
    basic = {"d_in": D, "d_sae": F, "metadata": SAEMetadata(**(OUT_META if transcoder else META))}
    if transcoder:
        basic |= {"d_out": D, "apply_b_dec_to_input": False}
    dictionary = cls(config_cls(**{**basic, **settings}))
    randomise(dictionary)
    dictionary.save_model(out / name)
    x = x_of(N, D)
    with torch.no_grad():
        f = dictionary.encode(x)
        y = dictionary(x)
    expected(out / name, x, f.to_dense() if f.is_sparse else f, y)


def write_trained(out: Path, name: str, cls: type, config_cls: type, **settings: object) -> None:
    """A training SAE exported for inference: BatchTopK and Matryoshka become jumprelu."""
    basic = {"d_in": D, "d_sae": F, "k": 12, "metadata": SAEMetadata(**META)}
    trained = cls(config_cls(**{**basic, **settings}))
    randomise(trained)
    with torch.no_grad():
        trained.topk_threshold.fill_(0.8)
    trained.save_inference_model(out / name)
    from sae_lens import SAE

    served = SAE.load_from_disk(out / name)
    x = x_of(N, D)
    with torch.no_grad():
        f = served.encode(x)
        expected(out / name, x, f, served(x))


def main(out: Path) -> None:
    seed(0)
    write(out, "standard", StandardSAE, StandardSAEConfig)
    write(out, "standard_layer_norm", StandardSAE, StandardSAEConfig, normalize_activations="layer_norm")
    write(
        out,
        "standard_constant_norm",
        StandardSAE,
        StandardSAEConfig,
        normalize_activations="constant_norm_rescale",
    )
    write(out, "standard_no_b_dec", StandardSAE, StandardSAEConfig, apply_b_dec_to_input=False)
    write(out, "gated", GatedSAE, GatedSAEConfig)
    write(out, "jumprelu", JumpReLUSAE, JumpReLUSAEConfig)
    write(out, "topk", TopKSAE, TopKSAEConfig, k=12)
    write(out, "topk_rescaled", TopKSAE, TopKSAEConfig, k=12, rescale_acts_by_decoder_norm=True)
    write(out, "abstopk", AbsTopKSAE, AbsTopKSAEConfig, k=12)
    write(out, "transcoder", Transcoder, TranscoderConfig)
    write(out, "transcoder_skip", SkipTranscoder, SkipTranscoderConfig)
    write(out, "transcoder_jumprelu", JumpReLUTranscoder, JumpReLUTranscoderConfig)
    write(out, "transcoder_jumprelu_skip", JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig)
    write_trained(out, "batchtopk", BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig)
    write_trained(
        out,
        "matryoshka",
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        matryoshka_widths=[64, F],
    )


main(Path(sys.argv[1]))
