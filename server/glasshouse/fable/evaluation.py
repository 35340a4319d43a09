"""fable's evaluation: `python -m glasshouse.fable.evaluation [--model FOLDER] [--corpora DIR] [--json
FILE]`.

Prints every gate with its value, bar and whether it holds, the held-out loss by kind of text, samples, and
the mood-flip experiment. Exit status 1 where a gate is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from glasshouse.fable import model_path
from glasshouse.fable.corpus.labelled import read_labelled
from glasshouse.fable.corpus.mixture import validation_documents
from glasshouse.fable.gates import GateResult, all_gates
from glasshouse.fable.mood_flip import (
    BAR_FLIPPED,
    FlipResult,
    best,
    flip_stories,
    measure_flip,
    mood_direction,
    sweep,
)
from glasshouse.fable.tokenizer import CONTEXT_LENGTH, load_tokenizer

_SAMPLE_PROMPTS = (
    "Once upon a time",
    "Once upon a time, there was a little girl named Lily.",
    "Tom and Anna were the best of friends.",
    "The dog lost his bone.",
    "User: What is the capital of France?\nAssistant:",
    "User: Tell me a sad story.\nAssistant:",
)
_NOT_GATES = frozenset({"counting", "giving (indirect object)"})  # reported, but no gate of the model


@torch.inference_mode()
def held_out_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> dict[str, float]:
    """Nats per token and bits per character over documents (BOS text EOS, cut at the context length)."""
    nats, n_tokens, n_chars = 0.0, 0, 0
    for text in texts:
        ids = [
            *tokenizer(text, truncation=True, max_length=CONTEXT_LENGTH - 1)["input_ids"],
            tokenizer.eos_token_id,
        ]
        ids_P = torch.tensor(ids)
        logits_PV = model(input_ids=ids_P[None]).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits_PV, ids_P[1:], reduction="sum"))
        n_tokens += len(ids) - 1
        n_chars += len(tokenizer.decode(ids[1:-1]))
    return {"nats_per_token": nats / n_tokens, "bits_per_char": nats / n_chars / 0.6931, "tokens": n_tokens}


@torch.inference_mode()
def samples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, temperature: float = 0.8
) -> list[str]:
    """One sampled continuation of each sample prompt."""
    torch.manual_seed(seed)
    texts = []
    for prompt in _SAMPLE_PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=0.95,
            max_new_tokens=160,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


def mood_flip(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, quick: bool, seed: int
) -> tuple[FlipResult, list[FlipResult]]:
    """The measured result at the chosen layer and coefficient, and the sweep that chose them."""
    records = [record for record in read_labelled("mood") if record["split"] == "train"]
    layers, coefficients = ((2, 3), (2.0, 3.0)) if quick else ((1, 2, 3, 4), (1.0, 2.0, 2.5, 3.0, 3.5))
    swept = sweep(model, tokenizer, records, layers, coefficients, 20 if quick else 60, seed)
    chosen = best(swept)
    direction = mood_direction(model, tokenizer, records, chosen.layer)
    stories = flip_stories("validation", 40 if quick else 300, seed)
    return measure_flip(model, tokenizer, stories, chosen.layer, direction, chosen.coefficient), swept


def print_gates(gates: Sequence[GateResult]) -> None:
    """One line a gate, then its groups and mistakes."""
    for gate in gates:
        verdict = "reported" if gate.name in _NOT_GATES else "holds" if gate.holds else "MISSED"
        print(f"{gate.name:32} {gate.value:7.2%}  bar {gate.bar:.0%}  n={gate.n_prompts:<5} {verdict}")
        if gate.by_label:
            print("    " + "  ".join(f"{label} {value:.1%}" for label, value in gate.by_label.items()))
        if gate.mistakes:
            print("    mistakes: " + "; ".join(gate.mistakes[:5]))


def print_flip(result: FlipResult, swept: Sequence[FlipResult]) -> None:
    """The sweep as a table, then the result."""
    print(
        "\nmood flip, sweep on the labelled split (layer, coefficient, flipped, loss rise in nats per token):"
    )
    for row in swept:
        hook_point = f"blocks.{row.layer}.hook_resid_post"
        print(f"    {hook_point}  {row.coefficient:5.2f}  {row.flipped:7.1%}  {row.loss_rise:+.3f}")
    verdict = "holds" if result.holds else "MISSED"
    print(f"{'mood flip':32} {result.flipped:7.2%}  bar {BAR_FLIPPED:.0%}  n={result.n_stories:<5} {verdict}")
    print(
        f"    at blocks.{result.layer}.hook_resid_post, coefficient {result.coefficient}: sad to happy "
        f"{result.flipped_to_happy:.1%}, happy to sad {result.flipped_to_sad:.1%}; "
        f"loss per token {result.loss_plain:.3f} -> {result.loss_steered:.3f} "
        f"({result.loss_rise:+.3f}, bar +1.0)"
    )
    for example in result.examples:
        print("    " + example)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure fable's gates.")
    parser.add_argument(
        "--model", type=Path, default=model_path(), help="model folder; default: the packaged weights"
    )
    parser.add_argument(
        "--corpora", type=Path, help="folder of the public collections, for their held-out loss"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--prompts", type=int, default=1000, help="prompts per gate")
    parser.add_argument("--quick", action="store_true", help="a small mood-flip experiment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(str(args.model), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(args.model)
    gates = all_gates(model, tokenizer, args.prompts, args.seed)
    print_gates(gates)
    held_out = validation_documents(args.seed, 200, args.corpora)
    losses = {kind: held_out_loss(model, tokenizer, texts) for kind, texts in held_out.items()}
    print("\nheld-out loss:")
    for kind, loss in losses.items():
        print(f"    {kind:12} {loss['nats_per_token']:.3f} nats/token  {loss['bits_per_char']:.3f} bits/char")
    texts = samples(model, tokenizer, args.seed)
    print("\nsamples (temperature 0.8):")
    for text in texts:
        print("  - " + text.replace("\n", "\n    "))
    flip, swept = mood_flip(model, tokenizer, quick=args.quick, seed=args.seed)
    print_flip(flip, swept)
    if args.json is not None:
        report: dict[str, Any] = {
            "gates": [{**dataclasses.asdict(gate), "holds": gate.holds} for gate in gates],
            "held_out_loss": losses,
            "mood_flip": {**dataclasses.asdict(flip), "loss_rise": flip.loss_rise, "holds": flip.holds},
            "mood_flip_sweep": [
                {**dataclasses.asdict(row), "loss_rise": row.loss_rise, "examples": []} for row in swept
            ],
            "samples": texts,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    missed = [gate.name for gate in gates if not gate.holds and gate.name not in _NOT_GATES]
    sys.exit(1 if missed or not flip.holds else 0)


if __name__ == "__main__":
    main()
