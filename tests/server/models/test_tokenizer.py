"""Ids, pieces, chats and streams of three kinds of tokenizer."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from glasshouse.server.models.tokenizer import TextCodec
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.wire import reasons

UNICODE = "dogs 🐕‍🦺 été — 日本語 𝔘𝔫𝔦 \x00 naïve👩‍👩‍👧‍👦 end"


def stream(codec: TextCodec, ids: list[int]) -> tuple[str, list[str]]:
    decoder = codec.stream_decoder()
    pieces = [decoder.push(token_id) for token_id in ids]
    return "".join(pieces) + decoder.finish(), pieces


def test_decode_is_the_tokenizer_s_own(any_tokenizer: Any) -> None:
    codec, rng = TextCodec(any_tokenizer), random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(codec.vocab_size) for _ in range(rng.randrange(12))]
        expected = any_tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert codec.decode(ids) == expected, ids


def test_streamed_pieces_join_to_the_whole_of_random_ids(any_tokenizer: Any) -> None:
    codec, rng = TextCodec(any_tokenizer), random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(codec.vocab_size) for _ in range(rng.randrange(40))]
        assert stream(codec, ids)[0] == codec.decode(ids), ids


def test_streamed_pieces_join_to_random_text(byte_level: Any) -> None:
    codec, rng = TextCodec(byte_level), random.Random(2)
    for _ in range(100):
        text = "".join(rng.choice(UNICODE) for _ in range(rng.randrange(30)))
        ids = codec.encode(text, add_special_tokens=False)
        whole, pieces = stream(codec, ids)
        assert whole == text == codec.decode(ids)
        assert "�" not in "".join(pieces)


def test_an_emoji_is_held_back_until_whole(byte_level: Any, sentencepiece: Any) -> None:
    codec = TextCodec(byte_level)
    ids = codec.encode("a🐕", add_special_tokens=False)
    assert len(ids) == 5
    assert stream(codec, ids)[1] == ["a", "", "", "", "🐕"]

    codec = TextCodec(sentencepiece)
    ids = [259, *(3 + byte for byte in "🐕".encode()), 260]
    assert stream(codec, ids)[1] == ["once", "", "", "", "", "🐕 upon"]


def test_an_unfinished_character_ends_as_a_replacement(byte_level: Any, sentencepiece: Any) -> None:
    codec = TextCodec(byte_level)
    ids = codec.encode("🐕", add_special_tokens=False)[:2]
    assert stream(codec, ids) == ("�", ["", ""])
    codec = TextCodec(sentencepiece)
    assert stream(codec, [259, 3 + 0xF0, 3 + 0x9F])[0] == "once��"


def test_a_vocabulary_s_own_replacement_character_is_not_held(sentencepiece: Any) -> None:
    assert stream(TextCodec(sentencepiece), [259, 270, 271])[1] == ["once", "�", ""]


def test_leading_spaces_survive_streaming(sentencepiece: Any) -> None:
    codec = TextCodec(sentencepiece)
    ids = [263, 263, 259, 263, 268, 264]
    assert stream(codec, ids)[0] == codec.decode(ids) == "  once  the" + "s"


def test_streaming_costs_the_same_however_long(any_tokenizer: Any) -> None:
    """The window a push decodes stays bounded, whatever came before."""
    codec, rng = TextCodec(any_tokenizer), random.Random(3)
    longest = 0
    decode = codec.decode

    def counting(ids: Any) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    codec.decode = counting  # type: ignore[method-assign]
    decoder = codec.stream_decoder()
    started = time.process_time()
    for _ in range(5000):
        decoder.push(rng.randrange(max(0, codec.vocab_size - 10), codec.vocab_size))
    assert longest <= 32
    assert time.process_time() - started < 5


def test_token_strings_are_readable(byte_level: Any, sentencepiece: Any) -> None:
    codec = TextCodec(byte_level)
    ids = codec.encode("once upon the dog", add_special_tokens=True)
    strings = codec.token_strings(ids)
    assert strings[0] == "<|bos|>"
    assert " the" in strings
    assert "".join(strings[1:]) == "once upon the dog"
    dog = codec.encode("a🐕", add_special_tokens=False)
    assert codec.token_strings(dog) == ["a", "<0xF0>", "<0x9F>", "<0x90>", "<0x95>"]
    assert TextCodec(sentencepiece).token_strings([1, 259, 3 + 0xF0, 268]) == [
        "<s>",
        " once",
        "<0xF0>",
        " the",
    ]


def test_ids_the_tokenizer_lacks_have_no_text(byte_level: Any) -> None:
    """Models pad their vocabulary: a sampled padding row must not break a stream."""
    codec = TextCodec(byte_level)
    beyond = codec.vocab_size + 7
    assert codec.token_strings([beyond]) == [""]
    assert codec.decode([beyond]) == ""
    assert stream(codec, [beyond])[0] == ""


def test_encode_ignores_a_saved_truncation_and_adds_the_bos(byte_level: Any) -> None:
    codec = TextCodec(byte_level)
    ids = codec.encode("once upon a time there was a dog, once upon a time")
    assert ids[0] == byte_level.bos_token_id
    assert len(ids) > 4
    assert codec.encode("a", add_special_tokens=False) == [byte_level.convert_tokens_to_ids("a")]
    assert codec.encode("", add_special_tokens=False) == []


def test_chat(chat_tokenizer: Any) -> None:
    codec = TextCodec(chat_tokenizer)
    assert codec.has_chat_template
    messages = [{"role": "user", "content": "hello"}]
    assert codec.render_chat(messages) == "<|user|>hello\n<|assistant|>"
    assert codec.render_chat(messages, add_generation_prompt=False) == "<|user|>hello\n"
    with pytest.raises(InvalidArgument, match="no tools") as caught:
        codec.render_chat([{"role": "tool", "content": "x"}])
    assert (caught.value.reason, caught.value.field) == (reasons.MESSAGE_MALFORMED, "messages")


def test_no_chat_template(byte_level: Any) -> None:
    codec = TextCodec(byte_level)
    assert not codec.has_chat_template
    with pytest.raises(FailedPrecondition) as caught:
        codec.render_chat([{"role": "user", "content": "hello"}])
    assert caught.value.reason == reasons.NO_CHAT_TEMPLATE
    assert caught.value.remedy
