"""The packaged weights: an ordinary model folder that has learnt what it should."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from glasshouse.fable import model_path
from glasshouse.fable.corpus.labelled import read_labelled
from glasshouse.fable.corpus.mixture import validation_documents
from glasshouse.fable.evaluation import held_out_loss
from glasshouse.fable.gates import GateResult, all_gates, padded
from glasshouse.fable.mood_flip import (
    BAR_FLIPPED,
    BAR_LOSS_RISE,
    flip_stories,
    measure_flip,
    mood_direction,
    resid_post,
    steered,
)
from glasshouse.fable.tokenizer import load_tokenizer, single_token_words

FLIP_LAYER, FLIP_COEFFICIENT = 4, 3.5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model only loses time to a second thread, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(str(model_path()), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(model_path())


def test_the_folder_is_a_small_llama_in_half_precision(model: LlamaForCausalLM) -> None:
    files = {path.name for path in model_path().iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    } <= files
    assert (model_path() / "model.safetensors").stat().st_size < 13_000_000
    assert model.config.model_type == "llama"
    assert model.config.tie_word_embeddings
    assert 3_000_000 <= sum(param.numel() for param in model.parameters()) <= 6_000_000
    assert LlamaForCausalLM.from_pretrained(str(model_path())).dtype == torch.bfloat16


def test_the_tokenizer_round_trips_and_keeps_known_words_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (
        "Lily was happy.",
        "  two  spaces\n\nand lines",
        "caf\u00e9 \u65e5\u672c \U0001f98a",
        "User: Hi\nAssistant:",
    ):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    assert len(tokenizer) == 4096
    assert [
        word
        for word in single_token_words()
        if len(tokenizer.encode(" " + word, add_special_tokens=False)) != 1
    ] == []


def test_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|bos|>System: Be kind.\nUser: Hello!\nAssistant:"


@pytest.fixture(scope="module")
def gates(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, GateResult]:
    return {gate.name: gate for gate in all_gates(model, tokenizer, 200, seed=1)}


@pytest.mark.parametrize(
    "name",
    [
        "pronoun gender agreement",
        "subject-verb number agreement",
        "capital-of lookup",
        "opposites",
        "opposites of things",
        "ending follows mood",
        "counting",
        "giving (indirect object)",
    ],
)
def test_the_gate_holds(gates: dict[str, GateResult], name: str) -> None:
    assert gates[name].holds, gates[name].mistakes


def test_adding_the_mood_direction_flips_endings(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = [record for record in read_labelled("mood") if record["split"] == "train"][:200]
    direction = mood_direction(model, tokenizer, records, FLIP_LAYER)
    result = measure_flip(
        model, tokenizer, flip_stories("validation", 30, 5), FLIP_LAYER, direction, FLIP_COEFFICIENT
    )
    assert result.flipped >= BAR_FLIPPED
    assert result.loss_rise < BAR_LOSS_RISE


def test_steering_adds_the_vector_where_asked_and_leaves_no_hook(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids_BP, _ = padded(tokenizer, ["The dog was here."])
    keep_BP = (ids_BP != tokenizer.bos_token_id).float()
    vector_BD = torch.randn(1, model.config.hidden_size)
    before = resid_post(model, ids_BP, 1)
    with steered(model, 1, vector_BD, keep_BP):
        during = resid_post(model, ids_BP, 1)
    torch.testing.assert_close(during, before + keep_BP[..., None] * vector_BD)
    torch.testing.assert_close(resid_post(model, ids_BP, 1), before)


def test_the_held_out_loss_is_that_of_a_trained_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = validation_documents(0, 40, None)
    assert held_out_loss(model, tokenizer, texts["stories"])["nats_per_token"] < 0.9


def test_the_runtime_part_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, glasshouse.fable, glasshouse.fable.corpus.mixture, glasshouse.fable.corpus.labelled\n"
        "glasshouse.fable.labelled('mood'); glasshouse.fable.model_path()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
