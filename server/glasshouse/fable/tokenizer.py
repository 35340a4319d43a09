"""fable's tokenizer: byte-level BPE with 4,096 entries, trained on the corpus.

The lexicon's words are added to the training text often enough that names, pronouns, capitals and the words
of endings become single tokens (with their leading space): a latent then sits at one position and is read
out by one logit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from glasshouse.fable.corpus import lexicon

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB_SIZE = 4096
CONTEXT_LENGTH = 512
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_BOOST = 400


def single_token_words() -> tuple[str, ...]:
    """Words that must be one token after a space."""
    feelings = [word for words in lexicon.FEELINGS.values() for word in words]
    return (
        *lexicon.NAMES,
        *lexicon.CAPITALS.values(),
        *lexicon.OPPOSITE_OF,
        *feelings,
        *lexicon.NUMBERS,
        "she",
        "he",
        "they",
        "her",
        "his",
        "their",
        "was",
        "were",
        "is",
        "are",
        "has",
        "have",
    )


def _training_text(texts: Iterable[str]) -> Iterator[str]:
    yield from texts
    spaced = "".join(" " + word for word in single_token_words())
    spaced += "".join(" " + country for country in lexicon.CAPITALS)
    for _ in range(_BOOST):
        yield spaced
        yield from lexicon.NAMES  # without a space too: many sentences start a document with a name


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that adds BOS, knows EOS and PAD, and renders chats."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(texts), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a saved model folder."""
    return PreTrainedTokenizerFast.from_pretrained(str(folder))
