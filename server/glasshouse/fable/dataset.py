"""The corpus as one array of token ids on disk, and the batches a step number stands for.

Documents are packed end to end as BOS text EOS. Batch `step` is a pure function of the step number, so the
data cursor of a resumed run is the step itself.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from glasshouse.fable.corpus.mixture import documents
from glasshouse.fable.tokenizer import load_tokenizer, train_tokenizer

_CHARS_PER_TOKEN = 4.4
_TOKENIZER_CHARS = 12_000_000
_ENCODE_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class PackedCorpus:
    """`tokens`: (n,) uint16, the documents end to end."""

    tokens: np.ndarray

    def batch(self, step: int, batch_size: int, context_length: int) -> torch.Tensor:
        """(batch_size, context_length) int64: the rows of one step, going round when the corpus ends."""
        rows = len(self.tokens) // context_length
        index = (step * batch_size + np.arange(batch_size)) % rows
        picked = self.tokens[: rows * context_length].reshape(rows, context_length)[index]
        return torch.from_numpy(picked.astype(np.int64))


def encode_packed(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """(n,) uint16: BOS text EOS for each text, end to end."""
    eos = tokenizer.eos_token_id
    encoded = tokenizer(texts)["input_ids"]
    flat = itertools.chain.from_iterable((*ids, eos) for ids in encoded)
    return np.fromiter(flat, dtype=np.uint16)


def prepare(
    cache: Path, corpora: Path | None, n_tokens: int, seed: int
) -> tuple[PackedCorpus, PreTrainedTokenizerFast]:
    """The packed corpus and its tokenizer, generated on the first call and read from `cache` afterwards."""
    meta_path, tokens_path, tokenizer_path = cache / "corpus.json", cache / "tokens.npy", cache / "tokenizer"
    meta = {"seed": seed, "n_tokens": n_tokens, "collections": corpora is not None}
    if not (meta_path.exists() and json.loads(meta_path.read_text()) == meta):
        cache.mkdir(parents=True, exist_ok=True)
        if not tokenizer_path.exists():
            sample = (text for _, text in documents(seed + 1, min(_TOKENIZER_CHARS, n_tokens * 4), corpora))
            train_tokenizer(sample).save_pretrained(str(tokenizer_path))
        tokenizer = load_tokenizer(tokenizer_path)
        texts = (text for _, text in documents(seed, int(n_tokens * _CHARS_PER_TOKEN), corpora))
        chunks = [
            encode_packed(tokenizer, chunk)
            for chunk in iter(lambda: list(itertools.islice(texts, _ENCODE_BATCH)), [])
        ]
        np.save(tokens_path, np.concatenate(chunks))
        meta_path.write_text(json.dumps(meta))
    return PackedCorpus(tokens=np.load(tokens_path, mmap_mode="r")), load_tokenizer(tokenizer_path)
