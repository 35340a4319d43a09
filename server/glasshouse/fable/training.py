"""fable's trainer: `python -m glasshouse.fable.training --corpora DIR --out DIR --budget-tokens N`.

1. The corpus is generated, tokenised and cached under the output folder.
2. Muon trains the matrices of the layers, AdamW the embedding and the norms, in bfloat16 autocast.
3. The learning rate warms up, stays, and falls linearly to zero (WSD). The stable phase does not depend on
   the budget, so a run may be resumed with another budget: only where the decay begins moves.
4. Model, optimisers and step are written together, atomically, every `checkpoint_steps` and on SIGTERM;
   starting again continues from there and gives the weights of an uninterrupted run.
5. The end is a Hugging Face folder in bfloat16.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glasshouse.fable.dataset import PackedCorpus, prepare
from glasshouse.fable.muon import Muon
from glasshouse.fable.stopping import StopRequest
from glasshouse.fable.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE

Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights, besides the corpus."""

    d_model: int = 192
    d_ff: int = 512
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 2
    context_length: int = CONTEXT_LENGTH
    batch_size: int = 12
    total_steps: int = 4000
    warmup_steps: int = 50
    decay_fraction: float = 0.35
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    weight_decay: float = 0.05
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate at `step`, as a fraction of its peak."""
        decay_start = self.total_steps * (1 - self.decay_fraction)
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step < decay_start:
            return 1.0
        return max(0.0, (self.total_steps - step) / (self.total_steps - decay_start))


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """A freshly initialised model, the same for the same seed."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_kv_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for everything else."""
    matrices = [param for name, param in model.named_parameters() if param.ndim == 2 and "layers" in name]
    others = [param for name, param in model.named_parameters() if not (param.ndim == 2 and "layers" in name)]
    return [
        Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def make_loss(model: LlamaForCausalLM, compiled: bool) -> Loss:
    """Mean next-token cross-entropy in nats of (batch, position) ids, in bfloat16 autocast."""

    def loss(ids_BP: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ids_BP.device.type, torch.bfloat16):
            hidden_BPD = model.model(input_ids=ids_BP, use_cache=False).last_hidden_state
            logits_BPV = model.lm_head(hidden_BPD[:, :-1])
        return torch.nn.functional.cross_entropy(logits_BPV.flatten(0, 1).float(), ids_BP[:, 1:].flatten())

    return torch.compile(loss) if compiled else loss


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    """Everything the next step depends on, in one file that is either the old or the new one."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> int:
    """Restores what `save_checkpoint` wrote; the number of steps already taken."""
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location=model.device)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face folder: config, bfloat16 safetensors, tokenizer, generation config."""
    twin = LlamaForCausalLM(model.config)
    twin.load_state_dict(model.state_dict())
    twin.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=2, do_sample=True, temperature=0.8
    )
    twin.to(torch.bfloat16).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def train(
    recipe: Recipe,
    corpus: PackedCorpus,
    checkpoint: Path,
    *,
    device: str = "cpu",
    compiled: bool = False,
    checkpoint_steps: int = 200,
    log_steps: int = 20,
    stop_after: int | None = None,
) -> LlamaForCausalLM | None:
    """The trained model, or None where the run was stopped before its end (the checkpoint continues it)."""
    model = build_model(recipe).to(device)
    optimizers = build_optimizers(model, recipe)
    peaks = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
    step = load_checkpoint(checkpoint, model, optimizers) if checkpoint.exists() else 0
    loss_of = make_loss(model, compiled)
    started, losses = time.monotonic(), []
    with StopRequest() as stop:
        while step < recipe.total_steps:
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = peak * recipe.rate(step)
            loss = loss_of(corpus.batch(step, recipe.batch_size, recipe.context_length).to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            losses.append(loss.item())
            if step % log_steps == 0:
                tokens = len(losses) * recipe.batch_size * recipe.context_length
                speed = tokens / (time.monotonic() - started)
                print(
                    f"step {step}/{recipe.total_steps} loss {sum(losses) / len(losses):.4f} "
                    f"rate {recipe.rate(step):.3f} tokens/s {speed:.0f}",
                    flush=True,
                )
                started, losses = time.monotonic(), []
            stopping = stop.asked or step == stop_after
            if stopping or step % checkpoint_steps == 0 or step == recipe.total_steps:
                save_checkpoint(checkpoint, model, optimizers, step)
            if stopping:
                return None
    return model


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train fable, resuming where the last run stopped.")
    parser.add_argument("--corpora", type=Path, help="folder with tinystories_sample.txt and fairytales.txt")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the cache, the checkpoint and the model"
    )
    parser.add_argument(
        "--budget-tokens", type=int, default=20_000_000, help="tokens to train on; the decay ends there"
    )
    parser.add_argument(
        "--corpus-tokens", type=int, default=24_000_000, help="tokens to generate before the corpus repeats"
    )
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--continue-from", type=Path, metavar="OUT", help="start from another run's tokenizer and checkpoint"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument(
        "--export-only", type=Path, metavar="FOLDER", help="write the checkpoint as a model folder and leave"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.continue_from is not None and not (args.out / "checkpoint.pt").exists():
        shutil.copytree(args.continue_from / "corpus" / "tokenizer", args.out / "corpus" / "tokenizer")
        shutil.copy(args.continue_from / "checkpoint.pt", args.out / "checkpoint.pt")
    corpus, tokenizer = prepare(args.out / "corpus", args.corpora, args.corpus_tokens, args.seed)
    steps = args.budget_tokens // (args.batch_size * CONTEXT_LENGTH)
    recipe = Recipe(batch_size=args.batch_size, total_steps=steps, seed=args.seed)
    checkpoint = args.out / "checkpoint.pt"
    if args.export_only is not None:
        model = build_model(recipe)
        step = load_checkpoint(checkpoint, model, build_optimizers(model, recipe))
        export(model, tokenizer, args.export_only)
        print(f"wrote step {step} to {args.export_only}")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"corpus {len(corpus.tokens)} tokens, {steps} steps on {device}", flush=True)
    trained = train(recipe, corpus, checkpoint, device=device, compiled=not args.no_compile)
    if trained is not None:
        export(trained.cpu(), tokenizer, args.out / "model")
        print(f"done: {args.out / 'model'}", flush=True)


if __name__ == "__main__":
    main()
