"""Writing: a story, streamed as it is made."""

from __future__ import annotations

import time
from collections.abc import Iterator

from glasshouse.tour.guide import Guide, expect

PROMPT = "Once upon a time, there was a brave girl named Lily."
MAX_TOKENS = 140
SEED = 1


def generate(guide: Guide) -> None:
    """Streams a story; the same seed gives the same one again."""
    screen, model = guide.screen, guide.model
    screen.stage("Generation: tokens as they are made")
    screen.code(f"model.generate({PROMPT!r}, max_tokens={MAX_TOKENS}, temperature=0.7, seed={SEED})")
    begun = time.perf_counter()
    with model.generate(PROMPT, max_tokens=MAX_TOKENS, temperature=0.7, seed=SEED) as stream:

        def pieces() -> Iterator[str]:
            yield PROMPT
            shown = 0
            for token in stream:
                shown += len(token.text)
                yield token.text
            yield stream.text[shown:]

        screen.stream(pieces())
    seconds = time.perf_counter() - begun
    usage = stream.usage
    expect(usage is not None and usage.generated_tokens > 10, "a story of more than ten tokens")
    assert usage is not None
    screen.note(
        f"{usage.generated_tokens} tokens, the first after {usage.time_to_first_token_seconds * 1000:.0f} ms, "
        f"{usage.generated_tokens / seconds:.0f} tokens/s; ended by {stream.finish_reason}."
    )
    again = model.generate(PROMPT, max_tokens=MAX_TOKENS, temperature=0.7, seed=SEED).result()
    expect(again.text == stream.text, "the same seed to give the same story")
    screen.note("The same seed gives the same story again.")
