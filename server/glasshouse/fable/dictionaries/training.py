"""The dictionaries' trainer: `python -m glasshouse.fable.dictionaries.training --corpora DIR --out DIR`.

1. fable's activations on the generator's text (and the collections, in the shares of the model's own training)
   are harvested once, under OUT/activations.
2. Each dictionary trains on them with Adam: unit-norm decoder rows, a learning rate that warms up and falls to
   zero, a controller for the sparsity coefficient where L0 is not fixed.
3. Features that have not fired for a while start again at positions that are badly explained, those with the
   largest errors most likely (https://transformer-circuits.pub/2023/monosemantic-features, neuron resampling).
4. Everything the next step depends on is checkpointed together, atomically, every `CHECKPOINT_STEPS` and on
   SIGTERM; starting again continues from there and gives the weights of an uninterrupted run.
5. A finished dictionary is written to OUT/dictionaries/NAME in the server's own format.

Several processes may train different dictionaries (`--only`) from one harvest.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.fable import model_path
from glasshouse.fable.dictionaries.activations import ActivationStore, fingerprint, prepare
from glasshouse.fable.dictionaries.coder import SparseCoder, measure_units
from glasshouse.fable.dictionaries.export import export
from glasshouse.fable.dictionaries.recipes import RECIPES, DictionaryRecipe, recipes
from glasshouse.fable.dictionaries.sparsity import Controller, Sparse
from glasshouse.fable.stopping import StopRequest
from glasshouse.server.models.loading import load_model

CHECKPOINT_STEPS = 500
LOG_STEPS = 100
_UNITS_BATCHES = 16
_RESETS = 16  # times that silent features start again, evenly over the first _RESET_FRACTION of a run
_RESET_FRACTION = 0.7
_GATED_AUXILIARY = 1.0
_ADAM_BETAS = (0.9, 0.999)


class Trainer:
    """One dictionary in training. `step` steps are done; everything else follows from it and the store."""

    def __init__(self, recipe: DictionaryRecipe, store: ActivationStore, device: str = "cpu") -> None:
        self.recipe, self.store, self.device = recipe, store, device
        units_in, units_out = (
            measure_units(torch.cat([self._read(step, points) for step in range(_UNITS_BATCHES)]))
            for points in (recipe.hook_points_in, recipe.hook_points_out)
        )
        self.coder = SparseCoder(recipe, units_in, units_out).to(device)
        self.optimizer = torch.optim.Adam(
            self.coder.parameters(), lr=recipe.lr, betas=_ADAM_BETAS, fused=True
        )
        self.controller = Controller(recipe.target_l0)
        self.silent_steps = torch.zeros(recipe.d_sae, dtype=torch.int64, device=device)
        self.step = 0

    def _read(self, step: int, hook_points: tuple[str, ...]) -> Tensor:
        return self.store.batch(step, self.recipe.batch_size, hook_points).to(self.device)

    def advance(self) -> dict[str, float]:
        """One optimiser step: unexplained variance, L0, coefficient and share of silent features."""
        recipe, coder = self.recipe, self.coder
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.rate(self.step)
        x_BSD = coder.units_in.enter(self._read(self.step, recipe.hook_points_in))
        y_BMD = x_BSD
        if recipe.hook_points_out != recipe.hook_points_in:
            y_BMD = coder.units_out.enter(self._read(self.step, recipe.hook_points_out))
        sparse = coder.sparsifier(coder.encode_linear(x_BSD))
        error_BMD = y_BMD - coder.decode(sparse.features)
        unexplained = _power(error_BMD)
        loss = unexplained
        if sparse.cost is not None:
            loss = loss + self.controller.coefficient * sparse.cost
        if sparse.gate is not None:
            loss = loss + _GATED_AUXILIARY * self._gate_loss(sparse.gate, y_BMD)
        loss.backward()  # type: ignore[no-untyped-call]
        coder.project_gradient()
        self.optimizer.step()
        self.optimizer.zero_grad()
        coder.normalise_decoder()
        l0 = self._count(sparse)
        self.step += 1
        if self._time_to_reset():
            self._reset_silent(x_BSD, error_BMD.detach())
        silent = float((self.silent_steps >= self._reset_every).float().mean())
        return {
            "unexplained": float(unexplained.detach()),
            "l0": l0,
            "coefficient": self.controller.coefficient,
            "silent": silent,
        }

    def _gate_loss(self, gate_BF: Tensor, y_BMD: Tensor) -> Tensor:
        """Unexplained variance of the gate's own reconstruction, through a frozen decoder."""
        W_dec, b_dec = self.coder.W_dec.detach(), self.coder.b_dec.detach()
        with torch.autocast(gate_BF.device.type, torch.bfloat16):
            product = gate_BF @ W_dec
        return _power(y_BMD - (product.float() + b_dec).view(y_BMD.shape))

    @torch.no_grad()
    def _count(self, sparse: Sparse) -> float:
        """Books what fired; the mean number of features per position."""
        self.silent_steps += 1
        self.silent_steps[sparse.features.sum(0) > 0] = 0
        l0 = int(sparse.features.count_nonzero()) / sparse.features.shape[0]
        if sparse.cost is not None:
            self.controller.update(l0)
        return l0

    @property
    def _reset_every(self) -> int:
        return max(1, int(self.recipe.n_steps * _RESET_FRACTION) // _RESETS)

    def _time_to_reset(self) -> bool:
        return self.step % self._reset_every == 0 and self.step <= self.recipe.n_steps * _RESET_FRACTION

    @torch.no_grad()
    def _reset_silent(self, x_BSD: Tensor, error_BMD: Tensor) -> None:
        """Starts silent features again, and forgets their moments."""
        silent = (self.silent_steps >= self._reset_every).nonzero().squeeze(1)[: x_BSD.shape[0] // 2]
        if silent.numel() == 0:
            return
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        weights = error_BMD.flatten(1).square().sum(1).square().cpu()
        picked = torch.multinomial(weights, silent.numel(), generator=generator).to(self.device)
        self.coder.reset_features(silent, x_BSD[picked], error_BMD[picked])
        self.silent_steps[silent] = 0
        for parameter in self.coder.parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                values = self.optimizer.state[parameter][moment]
                if parameter is self.coder.W_enc:
                    values[silent // values.shape[2], :, silent % values.shape[2]] = 0.0
                elif parameter is not self.coder.b_dec:
                    values[silent] = 0.0

    def save(self, path: Path) -> None:
        """Everything the next step depends on, in one file that is either the old or the new one."""
        state = {
            "recipe": dataclasses.asdict(self.recipe),
            "coder": self.coder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "controller": self.controller.state_dict(),
            "silent_steps": self.silent_steps,
            "step": self.step,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Restores what `save` wrote; a checkpoint of another recipe is a ValueError."""
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=self.device)
        if state["recipe"] != dataclasses.asdict(self.recipe):
            raise ValueError(f"{path} is of another recipe of {self.recipe.name}: remove it to start again")
        self.coder.load_state_dict(state["coder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.controller.load_state_dict(state["controller"])
        self.silent_steps = state["silent_steps"]
        self.step = state["step"]


def _power(error_BMD: Tensor) -> Tensor:
    """Mean squared error as a share of the variance, which is one an element in normalised units."""
    return error_BMD.square().mean()


def train(
    recipe: DictionaryRecipe,
    store: ActivationStore,
    checkpoint: Path,
    *,
    device: str = "cpu",
    stop_after: int | None = None,
    log: bool = True,
) -> SparseCoder | None:
    """The trained coder, or None where the run was stopped before its end (the checkpoint continues it)."""
    trainer = Trainer(recipe, store, device)
    if checkpoint.exists():
        trainer.load(checkpoint)
    started, first = time.monotonic(), trainer.step
    with StopRequest() as stop:
        while trainer.step < recipe.n_steps:
            measured = trainer.advance()
            if log and trainer.step % LOG_STEPS == 0:
                speed = (trainer.step - first) * recipe.batch_size / (time.monotonic() - started)
                figures = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
                print(
                    f"{recipe.name} {trainer.step}/{recipe.n_steps}  {figures}  positions/s {speed:.0f}",
                    flush=True,
                )
            stopping = stop.asked or trainer.step == stop_after
            if stopping or trainer.step % CHECKPOINT_STEPS == 0 or trainer.step == recipe.n_steps:
                trainer.save(checkpoint)
            if stopping and trainer.step < recipe.n_steps:
                return None
    return trainer.coder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train fable's dictionaries.")
    parser.add_argument("--corpora", type=Path, help="folder of the public collections")
    parser.add_argument("--out", type=Path, required=True, help="activations, checkpoints and dictionaries")
    parser.add_argument("--model", type=Path, default=model_path(), help="default: the packaged weights")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="; ".join(recipe.name for recipe in RECIPES)
    )
    parser.add_argument("--budget-tokens", type=int, help="positions to train each on; default: its recipe's")
    parser.add_argument("--harvest-tokens", type=int, default=1_300_000, help="distinct positions")
    parser.add_argument("--harvest-only", action="store_true")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        chosen = recipes(args.only)
    except ValueError as error:
        parser.error(str(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mark = fingerprint(args.model)
    points = sorted(
        {point for recipe in RECIPES for point in (*recipe.hook_points_in, *recipe.hook_points_out)}
    )
    loaded = load_model(args.model, dtype="float32", device=device)
    store = prepare(loaded, args.out / "activations" / mark, args.corpora, args.harvest_tokens, points)
    if args.harvest_only:
        return
    for recipe in chosen:
        if args.budget_tokens is not None:
            recipe = dataclasses.replace(recipe, n_tokens=args.budget_tokens)
        coder = train(recipe, store, args.out / "checkpoints" / mark / f"{recipe.name}.pt", device=device)
        if coder is None:
            print("stopped; the same command continues", flush=True)
            return
        export(coder.cpu(), args.out / "dictionaries" / mark / recipe.name)
        print(f"wrote {recipe.name}", flush=True)


if __name__ == "__main__":
    main()
