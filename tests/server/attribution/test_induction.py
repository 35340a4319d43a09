"""A two-layer attention-only model, trained here to continue random tokens that come again: its induction heads are found.

What they do is known: a head of the first layer attends to the token before (and so writes, at every position, what came
before it), a head of the second attends from a token to the one that followed its first occurrence, reading the first
head's output as its keys. Which heads do it is read off the attention patterns; the methods have to name the same.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from glasshouse.server.attribution.attribution_patching import attribution_patch
from glasshouse.server.attribution.circuits import discover_circuit
from glasshouse.server.attribution.edge_attribution import attribute_edges
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import LogProbability
from glasshouse.server.attribution.nodes import node_grid
from glasshouse.server.attribution.sweeps import patch_sweep
from glasshouse.server.models.loading import wrap_model

N_VOCAB, N_HALF, N_STEPS = 64, 8, 900


@pytest.fixture(scope="module")
def model() -> GradientModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=N_VOCAB,
        hidden_size=64,
        intermediate_size=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    network = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    for layer in network.model.layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    trained = [p for name, p in network.named_parameters() if "mlp" not in name]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(0)
    for _ in range(N_STEPS):
        loss = continuation_loss(network, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, all_special_ids=[1, 2])
    return GradientModel(wrap_model(network.eval().requires_grad_(False), tokenizer, name="induction"))


def continuation_loss(network: Any, generator: torch.Generator) -> Tensor:
    """Each row has eight tokens and a successor of each, kept but for random jumps: only what followed a token before
    says what follows it now, and no distance does.
    """
    n_rows, n_tokens = 64, 8
    rows = torch.arange(n_rows)
    tokens = torch.rand(n_rows, N_VOCAB - 3, generator=generator).argsort(1)[:, :n_tokens] + 3
    successor = torch.rand(n_rows, n_tokens, generator=generator).argsort(1)
    current = torch.randint(0, n_tokens, (n_rows,), generator=generator)
    seen = torch.zeros(n_rows, n_tokens, dtype=torch.bool)
    sequence, known = [], []
    for _ in range(24):
        jumps = torch.rand(n_rows, generator=generator) < 0.3
        anywhere = torch.randint(0, n_tokens, (n_rows,), generator=generator)
        sequence.append(tokens[rows, current])
        known.append(seen[rows, current] & ~jumps)
        seen[rows[~jumps], current[~jumps]] = True
        current = torch.where(jumps, anywhere, successor[rows, current])
    inputs, counted = torch.stack(sequence, 1), torch.stack(known, 1)[:, :-1]
    logits = network(inputs, use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs[:, 1:], reduction="none")
    return (each * counted).sum() / counted.sum()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, int]:
    """... A B ... A; the same with another token for the first A, so that nothing says that B follows; and B."""
    generator = torch.Generator().manual_seed(4)
    first = torch.randperm(N_VOCAB - 3, generator=generator)[: N_HALF + 1] + 3
    first, other = first[:-1], first[-1]
    place = N_HALF // 2
    clean = torch.cat([first, first[place : place + 1]])
    corrupt = clean.clone()
    corrupt[place] = other
    return clean, corrupt, int(first[place + 1])


def known_heads(model: GradientModel, clean: Tensor) -> tuple[set[int], set[int]]:
    """By what they attend to: previous-token heads of layer 0, induction heads of layer 1."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)]
    before, again = (x[0] for x in model.forward(clean[None], read=names).readings.values())
    positions = torch.arange(1, len(clean))
    previous = before[:, positions, positions - 1].mean(1)
    induction = again[:, -1, N_HALF // 2 + 1]
    found = tuple({int(head) for head in (score > 0.4).nonzero()} for score in (previous, induction))
    print("previous", previous.tolist(), "induction", induction.tolist())
    return found[0], found[1]


def test_its_heads_are_found(model: GradientModel, inputs: tuple[Tensor, Tensor, int]) -> None:
    clean, corrupt, target = inputs
    previous, induction = known_heads(model, clean)
    assert previous and induction and len(previous) < 4
    metric = LogProbability(targets=(target,))
    assert float(metric(model.forward(clean[None]))) > -1.0
    nodes = node_grid(model, "attn.hook_z", n_positions=len(clean), positions=[None], by_head=True)
    swept = [
        result
        for batch in patch_sweep(model, clean, nodes, metric, others=corrupt, batch_size=8)
        for result in batch
    ]
    effect = torch.tensor([result.effect for result in swept]).view(2, 4)
    scores = attribution_patch(model, clean, corrupt, metric, components=["attn.hook_z"]).scores
    atp = scores["attn.hook_z"].sum(-1)
    print("patching", effect.tolist(), "AtP", atp.tolist())
    assert int(effect[0].argmin()) in previous
    assert effect[0].min() < -1.0 and (effect[0] < -0.1).sum() == 1
    assert int(effect[1].argmin()) in induction  # several do the same: none is needed alone


def test_its_edge_is_found(model: GradientModel, inputs: tuple[Tensor, Tensor, int]) -> None:
    """The previous-token head is composed into the induction head's keys, by ACDC and by EAP-IG."""
    clean, corrupt, _ = inputs
    previous, induction = known_heads(model, clean)
    wanted = {(f"a0.h{p}", f"a1.h{i}.k") for p in previous for i in induction}
    circuit = discover_circuit(model, clean, corrupt, threshold=0.05)
    edges = {(str(source), str(destination)) for source, destination in circuit.edges}
    print("ACDC", sorted(edges), circuit.faithfulness, circuit.completeness)
    between = {(a, b) for a, b in edges if a.startswith("a0") and b.startswith("a1")}
    assert between and between <= wanted
    assert circuit.faithfulness > 0.9
    assert {source for source, destination in edges if destination == "logits"} & {
        f"a1.h{i}" for i in induction
    }
    metric = LogProbability(targets=(inputs[2],))
    best = attribute_edges(model, clean, corrupt, metric, steps=16).top(12)
    assert {(str(source), str(destination)) for source, destination, _ in best} & wanted
