"""Files written to each format's documented layout, with their forward pass in float64 beside them.

A `Case` says where the files are, what goes in, and what must come out: features f (N, F) in the flat order
of the format's loader, and the output y (N, E) or (N, M, E). Nothing here uses the server's code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.server.dictionaries.layouts.openmoss import (
    llama_scope,
    llama_scope_r1_distill,
    lm_saes_clt,
    lm_saes_clt_topk,
    lm_saes_crosscoder,
    lm_saes_sae,
)
from tests.server.dictionaries.layouts.saelens_gemma import (
    gemma_scope_1,
    gemma_scope_1_embedding,
    gemma_scope_1_transcoder,
    gemma_scope_2,
    gemma_scope_2_affine_transcoder,
    gemma_scope_2_clt,
    gemma_scope_2_crosscoder,
    saelens_gated,
    saelens_new,
    saelens_old,
    saelens_skip_transcoder,
    saelens_unfolded,
)
from tests.server.dictionaries.layouts.several_layers import (
    circuit_tracer_clt,
    finetuning,
    kissane,
    kissane_scaled,
    transcoder_set,
)
from tests.server.dictionaries.layouts.shared import Case, D, Draw, F, N
from tests.server.dictionaries.layouts.trainers import (
    bussmann,
    dictionary_learning,
    goodfire,
    openai,
    qwen_scope,
    sparsify_groupmax_transcoder,
    sparsify_skip_without_transcode_key,
    sparsify_topk,
)

__all__ = ["CASES", "Case", "D", "Draw", "F", "N", "transcoder_set"]

CASES: dict[str, Callable[[Path], Case]] = {
    "saelens new": saelens_new,
    "saelens old": saelens_old,
    "saelens unfolded norm": saelens_unfolded,
    "saelens skip transcoder": saelens_skip_transcoder,
    "saelens gated": saelens_gated,
    "gemma scope 1": gemma_scope_1,
    "gemma scope 1 transcoder": gemma_scope_1_transcoder,
    "gemma scope 1 embedding": gemma_scope_1_embedding,
    "gemma scope 2": gemma_scope_2,
    "gemma scope 2 affine transcoder": gemma_scope_2_affine_transcoder,
    "gemma scope 2 crosscoder": gemma_scope_2_crosscoder,
    "gemma scope 2 clt": gemma_scope_2_clt,
    "sparsify topk": sparsify_topk,
    "sparsify groupmax transcoder": sparsify_groupmax_transcoder,
    "sparsify skip, old config": sparsify_skip_without_transcode_key,
    "dictionary_learning AutoEncoder": dictionary_learning("AutoEncoder", 30),
    "dictionary_learning AutoEncoderNew": dictionary_learning("AutoEncoderNew", 31),
    "dictionary_learning GatedAutoEncoder": dictionary_learning("GatedAutoEncoder", 32),
    "dictionary_learning JumpReluAutoEncoder": dictionary_learning("JumpReluAutoEncoder", 33),
    "dictionary_learning AutoEncoderTopK": dictionary_learning("AutoEncoderTopK", 34),
    "dictionary_learning BatchTopKSAE": dictionary_learning("BatchTopKSAE", 35),
    "dictionary_learning MatryoshkaBatchTopKSAE": dictionary_learning("MatryoshkaBatchTopKSAE", 36),
    "openai topk": openai(37, "TopK", False),
    "openai relu tied": openai(38, "ReLU", True),
    "llama scope": llama_scope,
    "llama scope r1 distill": llama_scope_r1_distill,
    "lm-saes sae": lm_saes_sae,
    "lm-saes crosscoder": lm_saes_crosscoder,
    "lm-saes clt": lm_saes_clt,
    "lm-saes clt topk": lm_saes_clt_topk,
    "goodfire": goodfire,
    "qwen-scope": qwen_scope,
    "bussmann vanilla": bussmann(52, "vanilla"),
    "bussmann topk": bussmann(53, "topk"),
    "bussmann batchtopk": bussmann(54, "batchtopk"),
    "bussmann jumprelu": bussmann(55, "jumprelu"),
    "circuit-tracer clt": circuit_tracer_clt,
    "kissane": kissane,
    "kissane scaled": kissane_scaled,
    "finetuning relu": finetuning(81, 1, batch=False, normalised=False),
    "finetuning batchtopk crosscoder norm": finetuning(82, 1, batch=True, normalised=True),
    "finetuning batchtopk sae norm": finetuning(83, 2, batch=True, normalised=False, suffix=".safetensors"),
    "finetuning batchtopk mixed": finetuning(84, 3, batch=True, normalised=False),
    "finetuning batchtopk none": finetuning(85, 4, batch=True, normalised=True),
    "finetuning batchtopk decoupled": finetuning(86, 5, batch=True, normalised=False),
}
