"""Direct logit attribution: what each part of the model writes straight into a logit.

https://transformer-circuits.pub/2021/framework (the residual stream as a sum), with the final norm's scale frozen:

1. One pass, probes at every contribution (embedding, attention, MLP) and at z and the neurons, norm scales
   frozen at their own values. The final norm is then a linear map, so the uncapped logit is
   constant + sum over contributions c of c . d, where d (D,) is the gradient of the logit at the last stream.
2. Layers, attention and MLP: c . d at the position.
3. Heads and neurons: attention's output is linear in z and the MLP's in its neurons (a post-norm's scale is
   frozen too), so z . (gradient of the contribution . d at z) is a head's part, and the same for a neuron.
   What is left of the contribution is its bias.
4. A dictionary's features at a place on the stream: value * decoder row . d, with the reconstruction's bias and
   the error as parts of their own.

The parts of `contributions` and `constant` sum to the logit; heads and their bias sum to their attention's part.
Only the direct path counts: nothing that a later layer makes of a contribution. A parallel block's two
contributions count like any others.

Shapes: T positions, D d_model, H heads, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.editing import split_heads
from glasshouse.server.attribution.freezing import Freeze
from glasshouse.server.attribution.gradient_model import GradientModel, Pass
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.models.families.norms import regain
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.wire import reasons

_CONTRIBUTIONS = ("hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureParts:
    """What a dictionary's features at one hook point and position write into the logit.

    ids (n,) int64 and parts (n,), strongest |part| first. bias, error: numbers. All sum to `total`, the part of
    the whole activation.
    """

    ids: Tensor
    parts: Tensor
    bias: float
    error: float
    total: float


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectAttribution:
    """The parts of one (weighted sum of) logit at one position.

    logit: before the final soft cap. constant: what the final norm's and the head's biases add.
    contributions: hook point -> part. heads: (L, H). head_bias, neuron_bias: (L,), what attention and MLP write
    whatever their heads and neurons do. neurons: (L, d_mlp). direction: (D,), the gradient at the last stream.
    """

    logit: float
    constant: float
    contributions: dict[str, float]
    heads: Tensor
    head_bias: Tensor
    neurons: Tensor
    neuron_bias: Tensor
    direction: Tensor

    @property
    def layers(self) -> Tensor:
        """(L,): attention and MLP of each layer together."""
        n_layers = self.heads.shape[0]
        return torch.tensor(
            [
                sum(self.contributions[f"blocks.{layer}.{c}"] for c in _CONTRIBUTIONS)
                for layer in range(n_layers)
            ]
        )

    @property
    def remainder(self) -> float:
        """logit less all parts and the constant: rounding, nothing else."""
        return self.logit - self.constant - sum(self.contributions.values())


def attribute_directly(
    model: GradientModel, tokens_T: Tensor, targets: Mapping[int, float], *, position: int = -1
) -> DirectAttribution:
    """Decompose sum of weight * logit over `targets` (token id -> weight) at `position`."""
    loaded = model.loaded
    _check_targets(targets, loaded.vocab_size)
    tokens = model.tokens(tokens_T)
    embeddings = [name for name in ("hook_embed", "hook_pos_embed") if model.has(name)]
    layers = range(model.n_layers)
    blocks = [f"blocks.{layer}.{c}" for layer in layers for c in _CONTRIBUTIONS]
    inner = [f"blocks.{layer}.{c}" for layer in layers for c in ("attn.hook_z", "mlp.hook_post")]
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    run = model.forward(
        tokens, read=[*embeddings, *blocks, *inner], differentiate=[*inner, last], freeze=Freeze(norms=True)
    )
    logit = _weighted(run, targets, position)
    direction = run.gradients(logit, retain=True)[last][0, position]

    parts = {name: _part(run, name, direction, position) for name in [*embeddings, *blocks]}
    heads, neurons = [], []
    for layer in layers:
        block = f"blocks.{layer}."
        z = _inner_parts(run, block + "hook_attn_out", block + "attn.hook_z", direction, position)
        post = _inner_parts(run, block + "hook_mlp_out", block + "mlp.hook_post", direction, position)
        heads.append(split_heads(z, loaded.n_heads).sum(-1))
        neurons.append(post)
    heads_LH, neurons_LF = torch.stack(heads), torch.stack(neurons)
    attention, mlps = (
        torch.tensor([parts[f"blocks.{layer}.{c}"] for layer in layers], device=heads_LH.device)
        for c in _CONTRIBUTIONS
    )
    return DirectAttribution(
        logit=float(logit.detach()),
        constant=_constant(model, targets),
        contributions=parts,
        heads=heads_LH,
        head_bias=attention - heads_LH.sum(-1),
        neurons=neurons_LF,
        neuron_bias=mlps - neurons_LF.sum(-1),
        direction=direction,
    )


def attribute_features_directly(
    model: GradientModel,
    tokens_T: Tensor,
    found: DirectAttribution,
    dictionary: Dictionary,
    *,
    position: int = -1,
) -> FeatureParts:
    """Split the part of one activation on the stream into the dictionary's features.

    The dictionary must write at one point of the stream: a residual or a contribution. At a residual point the
    total is what the stream up to there writes directly.
    """
    facts = dictionary.facts
    target = _stream_point(model, dictionary)
    read = [*facts.hook_points_in, target]
    with torch.no_grad():
        run = model.forward(model.tokens(tokens_T), read=read)
        rows = [run.readings[name][:, position] for name in facts.hook_points_in]
        x = rows[0] if len(rows) == 1 else torch.stack(rows, dim=1)
        fired = dictionary.encode(x)
        ids, values = fired.row(0)
        ids = ids.long()
        written = dictionary.decoder_rows(ids) * dictionary.output_scale(x)
        parts = values * (written @ found.direction)
        reconstruction = float(dictionary.decode(fired, x)[0] @ found.direction)
        total = float(run.readings[target][0, position] @ found.direction)
        order = parts.abs().argsort(descending=True)
    return FeatureParts(
        ids=ids[order],
        parts=parts[order],
        bias=reconstruction - float(parts.sum()),
        error=total - reconstruction,
        total=total,
    )


def _part(run: Pass, name: str, direction: Tensor, position: int) -> float:
    return float(run.readings[name][0, position].detach() @ direction)


def _inner_parts(run: Pass, contribution: str, inner: str, direction: Tensor, position: int) -> Tensor:
    """(width,): z or the neurons of one layer at the position, times their gradient to the contribution . d."""
    objective = run.readings[contribution][0, position] @ direction
    (gradient,) = torch.autograd.grad(objective, run.probes[inner], retain_graph=True)
    return (gradient[0, position] * run.readings[inner][0, position]).detach()


def _weighted(run: Pass, targets: Mapping[int, float], position: int) -> Tensor:
    logits = run.logits(position, capped=False)[0]
    return logits[list(targets)] @ torch.tensor(
        list(targets.values()), dtype=logits.dtype, device=logits.device
    )


@torch.no_grad()
def _constant(model: GradientModel, targets: Mapping[int, float]) -> float:
    """The weighted logits of a stream that the final norm made zero."""
    loaded, family = model.loaded, model.loaded.family
    assert family.norm is not None and family.norm_kind is not None
    nothing = torch.zeros(1, loaded.d_model, device=loaded.device)
    hidden = regain(family.norm_kind, loaded.model.get_submodule(family.norm), nothing)
    logits = family.unembed(loaded.model, hidden)[0][0]
    return float(sum(weight * float(logits[token]) for token, weight in targets.items()))


def _check_targets(targets: Iterable[int], vocab_size: int) -> None:
    wrong = [token for token in targets if not 0 <= token < vocab_size]
    if wrong or not list(targets):
        raise InvalidArgument(
            f"Target token {wrong[0]} is not in the vocabulary." if wrong else "There is no target token.",
            reason=reasons.TOKEN_OUT_OF_RANGE if wrong else reasons.FIELD_REQUIRED,
            field="targets",
            value=wrong[0] if wrong else None,
            remedy=f"Use token ids from 0 to {vocab_size - 1}.",
        )


def _stream_point(model: GradientModel, dictionary: Dictionary) -> str:
    facts = dictionary.facts
    points = [model.table.resolve(name) for name in facts.hook_points_out]
    if len(points) != 1 or points[0].kind != "residual":
        raise FailedPrecondition(
            f"Dictionary {facts.name!r} writes at {', '.join(facts.hook_points_out)}; a direct attribution needs "
            "one point on the residual stream.",
            reason=reasons.DICTIONARY_MISMATCH,
            field="dictionary",
            value=facts.name,
            remedy="Use a dictionary of hook_resid_pre, hook_resid_mid, hook_resid_post, hook_attn_out or "
            "hook_mlp_out.",
        )
    return points[0].name
