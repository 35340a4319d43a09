"""Tiny tokenizers and model folders, made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = "once upon a time there was a little dog who liked the big red ball. once upon a time the end."
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_tokenizer(*, chat_template: str | None = None) -> Any:
    """GPT-2's kind: byte-level BPE, with a BOS that encoding adds, and an added word outside the alphabet."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|pad|>", "<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    backend.add_tokens([AddedToken("two words", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
    )
    backend.enable_truncation(max_length=4)  # left over from a training run
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>",
        chat_template=chat_template,
    )  # fmt: skip


def sentencepiece_tokenizer() -> Any:
    """Llama 2's kind: metaspace pieces, byte fallback, a leading space that decoding strips."""
    words = ["▁once", "▁upon", "▁a", "▁time", "▁", "s", "é", "▁été", "the", "▁the", "日", "�"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {word: 259 + index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def wordpiece_tokenizer() -> Any:
    """BERT's kind: pieces joined by ##."""
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "dog", "##s", "##gy", "the", "red", ".", "'"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "wordpiece": wordpiece_tokenizer,
}


@pytest.fixture(params=sorted(TOKENIZERS))
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture
def byte_level() -> Any:
    return byte_level_tokenizer()


@pytest.fixture
def chat_tokenizer() -> Any:
    return byte_level_tokenizer(chat_template=CHAT_TEMPLATE)


@pytest.fixture
def sentencepiece() -> Any:
    return sentencepiece_tokenizer()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder("llama", hidden_size=...) -> a saved model folder with a tokenizer."""

    def make(model_type: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 331, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1,
            "eos_token_id": [2, 5],
        }  # fmt: skip
        config = AutoConfig.for_model(model_type, **(sizes | settings))
        folder = tmp_path / f"tiny-{model_type}"
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
        byte_level_tokenizer().save_pretrained(folder)
        return folder

    return make
