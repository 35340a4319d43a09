"""Path patching: the effect of a sender on chosen receivers along direct paths only.

https://arxiv.org/abs/2211.00593 (appendix B).

1. Read the sender on the other input, and every head's z (and MLP output, where MLPs are held too) on the base.
2. Run the base with the sender replaced and all other heads held at their base values, and read the receivers:
   what reaches them from the sender through the stream (and the MLPs, unless held) and nothing else.
3. Run the base with the receivers set to those values, everything else live. I = m(that run) - m(base).

Receivers are queries, keys, values of heads, MLP inputs, or the last stream for the direct effect on logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glasshouse.server.attribution.editing import setting
from glasshouse.server.attribution.gradient_model import Edit, GradientModel
from glasshouse.server.attribution.metrics import Metric
from glasshouse.server.attribution.nodes import Node
from glasshouse.server.attribution.sweeps import PatchResult, patching
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


@torch.no_grad()
def path_patch(
    model: GradientModel,
    base_T: Tensor,
    other_T: Tensor,
    sender: Node,
    receivers: Sequence[Node],
    metric: Metric,
    *,
    hold_mlps: bool = False,
) -> PatchResult:
    """The effect of `sender` taking its value on the other input, as seen by `receivers` alone."""
    base, other = model.tokens(base_T), model.tokens(other_T)
    order = model.table.position
    early = [r for r in receivers if order(r.hook_point) <= order(sender.hook_point)]
    if early or not receivers:
        what = f"{early[0].hook_point} runs before {sender.hook_point}" if early else "There is no receiver"
        raise InvalidArgument(
            f"{what}.",
            reason=reasons.VALUE_OUT_OF_RANGE if early else reasons.FIELD_REQUIRED,
            field="receivers",
            remedy="Give receivers that run after the sender.",
        )
    components = ("attn.hook_z", "hook_mlp_out") if hold_mlps else ("attn.hook_z",)
    held = [f"blocks.{layer}.{component}" for layer in range(model.n_layers) for component in components]
    plain = model.forward(base, read=[*held, *metric.reads])
    sent = model.forward(other, read=[sender.hook_point]).readings[sender.hook_point][0]

    edits: dict[str, list[Edit]] = {name: [setting(plain.readings[name])] for name in held}
    for name, steps in patching(model, [sender], [sent]).items():
        edits.setdefault(name, []).extend(steps)
    names = sorted({receiver.hook_point for receiver in receivers})
    reached = model.forward(base, read=names, edits=edits).readings
    arrivals: dict[str, list[Edit]] = {}
    for receiver in receivers:
        for name, steps in patching(model, [receiver], [reached[receiver.hook_point][0]]).items():
            arrivals.setdefault(name, []).extend(steps)
    value = float(metric(model.forward(base, read=metric.reads, edits=arrivals))[0])
    return PatchResult(node=sender, value=value, effect=value - float(metric(plain)[0]))
