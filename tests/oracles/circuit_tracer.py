"""circuit-tracer in its own process, on a model and transcoders of ours: see `peers/trace_circuit_tracer.py`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glasshouse.server.dictionaries.architectures import BatchTopK, JumpReLU, ReLU
from glasshouse.server.dictionaries.architectures.activation import Activation
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.linear import LinearDictionary

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("GLASSHOUSE_PEERS_PYTHON", str(ROOT / ".cache/peers/venv/bin/python")))
SCRIPT = ROOT / "tests/server/attribution/peers/trace_circuit_tracer.py"


class Worker:
    """A process that is told to work by a line and answers with seconds and bytes. A context manager."""

    def __init__(self, command: Sequence[str], log: Path, threads: int) -> None:
        self._command, self._threads = command, threads
        self._errors = log.open("w+")

    def __enter__(self) -> Self:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(self._threads),
            "MKL_NUM_THREADS": str(self._threads),
        }
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.communicate()
        self._errors.close()

    def trace(self, *, save: bool = False) -> tuple[float, int]:
        """Seconds, and bytes of memory at the peak."""
        assert self._process.stdin is not None
        self._process.stdin.write("save\n" if save else "go\n")
        self._process.stdin.flush()
        seconds, peak = self._answer().split()
        return float(seconds), int(peak)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self._command[1]} ended: {self._errors.read()[-3000:]}")
        return line.strip()


class CircuitTracer(Worker):
    """`folder` already holds the model's Hugging Face folder as `model`."""

    def __init__(
        self,
        folder: Path,
        dictionaries: Sequence[Dictionary],
        tokens: Sequence[int],
        *,
        batch_size: int = 512,
        max_features: int | None = None,
        threads: int = 1,
    ) -> None:
        ask = {
            "tokens": list(tokens),
            "batch_size": batch_size,
            "max_features": max_features,
            "cross_layer": len(dictionaries) == 1,
            "threads": threads,
        }
        (folder / "ask.json").write_text(json.dumps(ask))
        save_file(_tensors(dictionaries), folder / "transcoders.safetensors")
        super().__init__([str(PYTHON), str(SCRIPT), str(folder)], folder / "errors.txt", threads)
        self.folder = folder

    def graph(self) -> dict[str, Tensor]:
        """What was saved last."""
        return load_file(self.folder / "graph.safetensors")


def _tensors(dictionaries: Sequence[Dictionary]) -> dict[str, Tensor]:
    parts = [_linear(dictionary) for dictionary in dictionaries]
    if len(parts) > 1:
        found = {
            "W_enc": torch.stack([p.parameters.encoders[0].W_enc.float().T for p in parts]),
            "W_dec": torch.stack([p.parameters.decoders[0].W_dec.float() for p in parts]),
            "b_enc": torch.stack([_bias(p) for p in parts]),
            "b_dec": torch.cat([_out(p) for p in parts]),
            "threshold": torch.stack([_threshold(p.parameters.activation, p.facts.d_sae) for p in parts]),
        }
    else:
        p = parts[0].parameters
        n_layers = len(p.encoders)
        found = {
            "W_enc": torch.stack([block.W_enc.float().T for block in p.encoders]),
            "b_enc": _bias(parts[0]).view(n_layers, -1),
            "b_dec": _out(parts[0]),
            "threshold": _threshold(p.activation, parts[0].facts.d_sae).view(n_layers, -1),
        }
        for layer in range(n_layers):
            mine = sorted((b for b in p.decoders if b.group == layer), key=lambda block: block.site)
            assert [block.site for block in mine] == list(range(layer, n_layers))
            found[f"W_dec_{layer}"] = torch.stack([block.W_dec.float() for block in mine], dim=1)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _linear(dictionary: Dictionary) -> LinearDictionary:
    assert isinstance(dictionary, LinearDictionary) and not dictionary.facts.has_skip
    assert dictionary.parameters.scale is None and dictionary.parameters.b_in is None
    return dictionary


def _bias(dictionary: LinearDictionary) -> Tensor:
    b_enc = dictionary.parameters.b_enc
    return torch.zeros(dictionary.facts.d_sae) if b_enc is None else b_enc.float()


def _out(dictionary: LinearDictionary) -> Tensor:
    b_dec = dictionary.parameters.b_dec
    shape = len(dictionary.facts.hook_points_out), dictionary.facts.d_out
    return torch.zeros(shape) if b_dec is None else b_dec.float()


def _threshold(activation: Activation, d_sae: int) -> Tensor:
    if isinstance(activation, JumpReLU):
        return activation.threshold.float().clamp_min(0.0)
    if isinstance(activation, BatchTopK):
        return torch.full((d_sae,), max(activation.threshold, 0.0))
    assert isinstance(activation, ReLU)
    return torch.zeros(d_sae)
