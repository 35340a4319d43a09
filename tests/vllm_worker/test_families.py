"""Every family's adapter, in vLLM's own implementation, against Hugging Face with hooks: a tiny random model each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.oracles.vllm_engines import require
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from glasshouse.server.engines.vllm.contract import Clause, EditPlan, ReadoutPlan, RequestPlan
from glasshouse.server.engines.vllm.contract.settings import MLP_INPUT, SITES
from glasshouse.server.hooks.attachment import attach
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.models.loading import wrap_model
from glasshouse.server.types.hook_points import HookPoint

from .harness import Ask, run_vllm

require()
pytestmark = pytest.mark.timeout(300)

N_NEW = 6
FOREVER = 1 << 30
# Head sizes are those that vLLM's attention on a CPU takes.
_BASE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = _BASE | {
    "head_dim": 32,
    "query_pre_attn_scalar": 20,
    "sliding_window": 8,
    "final_logit_softcapping": 3.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_NEOX = {key: value for key, value in _BASE.items() if key != "num_key_value_heads"} | {
    "attention_bias": True
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _BASE | {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": _BASE | {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": _BASE | {"model_type": "qwen2"},
    "qwen3": _BASE | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": _GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 1.5},
    "gemma3": _GEMMA | {"model_type": "gemma3_text", "final_logit_softcapping": None},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 64,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 64,
        "n_inner": 96,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _NEOX | {"model_type": "gpt_neox"},
    "gpt_neox_sequential": _NEOX | {"model_type": "gpt_neox", "use_parallel_residual": False},
    "olmo2": _BASE | {"model_type": "olmo2"},
    "phi3": _BASE | {"model_type": "phi3", "tie_word_embeddings": False},
}


def build(name: str, folder: Path) -> Any:
    """A model whose gains and biases are as random as its weights, saved for vLLM."""
    settings = dict(MODELS[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0, 0.3)
                if parameter_name.endswith("weight") and not name.startswith("gemma"):
                    parameter.add_(1.0)
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return model


def edits(rng: np.random.Generator, sites: list[str]) -> dict[str, np.ndarray]:
    """A vector at every kind of hook point, each on a layer of its own where there are enough."""
    chosen = {}
    for place, kind in enumerate(SITES):
        name = f"blocks.{place % 3}.{kind}"
        if name in sites:
            chosen[name] = rng.standard_normal(64).astype(np.float32)
    return chosen


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_hook_point_reads_and_edits_as_hugging_face_does(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "model")
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, all_special_ids=[1, 2])
    table = HookTable(wrap_model(model, tokenizer, name=name))
    sites = [f"blocks.{layer}.{kind}" for layer in range(3) for kind in SITES]
    sites = [site for site in sites if any(point.name == site for point in table.points)]
    prompt = tuple(int(token) for token in np.random.default_rng(5).integers(3, 64, size=11))
    everywhere = Clause(ranges=((0, FOREVER),), n_prompt=len(prompt))
    later = Clause(ranges=((4, FOREVER),), n_prompt=len(prompt))
    vectors = edits(np.random.default_rng(6), sites)
    plan = RequestPlan(
        tag=1,
        n_prompt=len(prompt),
        edits=tuple(
            EditPlan(
                index=index,
                kind="add",
                clause=later,
                sites_out=(site,),
                n_vectors=1,
                vectors=vector.tobytes(),
                plain=0.7,
            )
            for index, (site, vector) in enumerate(vectors.items())
        ),
        readouts=(
            *(
                ReadoutPlan(index=index, kind="activations", clause=everywhere, sites=(site,))
                for index, site in enumerate(sites)
            ),
            ReadoutPlan(
                index=len(sites), kind="lens", clause=everywhere, sites=("blocks.1.hook_resid_post",), top_k=5
            ),
        ),
    )
    untouched = RequestPlan(tag=2, n_prompt=len(prompt), readouts=plan.readouts)
    session = run_vllm(
        tmp_path / "run",
        [
            Ask(prompt=prompt, plan=plan, max_tokens=N_NEW, skip_cache=True, salt="edited"),
            Ask(prompt=prompt, plan=untouched, max_tokens=N_NEW, skip_cache=True),
            Ask(prompt=prompt, max_tokens=N_NEW),
        ],
        engine={"model": str(tmp_path / "model"), "skip_tokenizer_init": True, "max_model_len": 64},
    )
    assert not session.failure, session.failure[-4000:]
    assert session.boots[0]["hooks"], session.boots[0]["refusal"]
    # What the MLP reads is tested with the transcoders that read it; not every adapter has it.
    assert {site for site in session.boots[0]["sites"] if not site.endswith(MLP_INPUT)} == set(sites)
    plain = session.answers[2]
    for answer, added in zip(session.answers, (vectors, {}), strict=False):
        assert not answer.error
        logits, captured = hooked_pass(model, table, [*prompt, *answer.token_ids[:-1]], added)
        logprobs = torch.log_softmax(logits, dim=-1)
        for step, (token, logprob) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            row = logprobs[len(prompt) - 1 + step]
            assert float(row[token]) >= float(row.max()) - 1e-4
            assert abs(float(row[token]) - logprob) < 1e-4
        for index, site in enumerate(sites):
            found = np.stack([answer.rows[index][p][0] for p in range(len(prompt) + N_NEW - 1)])
            scale = captured[site].abs().max()
            np.testing.assert_allclose(found, captured[site], atol=2e-5 * float(scale), err_msg=site)
        check_lens(model, table, captured["blocks.1.hook_resid_post"], answer.rows[len(sites)])
    untouched_answer = session.answers[1]
    assert untouched_answer.token_ids == plain.token_ids
    np.testing.assert_allclose(untouched_answer.logprobs, plain.logprobs, atol=1e-6)
    assert not np.allclose(session.answers[0].logprobs, plain.logprobs, atol=1e-2), "the edits are not idle"


@torch.no_grad()
def hooked_pass(
    model: Any, table: HookTable, ids: list[int], added: dict[str, np.ndarray]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (T, vocab) and every hook point (T, W), with 0.7 times the vectors added from position 4 on."""
    captured: dict[str, Tensor] = {}

    def at(point: HookPoint, tensor: Tensor) -> bool:
        if point.name in added:
            tensor[0, 4:] += 0.7 * torch.from_numpy(added[point.name])
        captured[point.name] = tensor[0].clone()
        return point.name in added

    names = [point.name for point in table.points if point.name.rsplit(".", 1)[-1] in SITES]
    with attach(table, names, at):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits, captured


@torch.no_grad()
def check_lens(model: Any, table: HookTable, stream: Tensor, rows: dict[int, tuple[np.ndarray, ...]]) -> None:
    """unembed(final_norm(s)), by the model's own modules."""
    family = table.loaded.family
    normed = model.get_submodule(family.norm)(stream)
    logprobs = torch.log_softmax(family.unembed(model, normed)[1], dim=-1)
    for position, (ids, values) in rows.items():
        best = logprobs[position].topk(5)
        np.testing.assert_allclose(values, best.values, atol=1e-4)
        assert set(ids.tolist()) == set(best.indices.tolist())


def test_a_family_without_an_adapter_is_served_plain(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "stablelm", **(_BASE | {"num_key_value_heads": 2, "partial_rotary_factor": 1.0})
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    prompt = (5, 9, 33, 21)
    session = run_vllm(
        tmp_path / "run",
        [Ask(prompt=prompt, max_tokens=4)],
        engine={"model": str(tmp_path / "model"), "skip_tokenizer_init": True, "max_model_len": 64},
    )
    assert not session.failure, session.failure[-4000:]
    assert not session.boots[0]["hooks"]
    assert "stablelm" in session.boots[0]["refusal"]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert session.answers[0].token_ids == expected[0, len(prompt) :].tolist()
