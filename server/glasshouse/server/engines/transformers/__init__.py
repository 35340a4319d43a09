"""The transformers engine: continuous batching over the library's own model code.

- `cache`: keys and values of rows that decode together, and of a prompt being fed.
- `passes`: one forward pass with its edits and captures.
- `sampler`: logits to tokens, each row by its own rules and its own seed.
- `row`: one generation in progress.
- `bulk`: forward-only work: extraction and scoring.
- `stream`: events from the engine's thread to the caller's loop, bounded.
- `scheduler`: what the next step does.
- `engine`: the thread that steps, and the interface around it.
"""
