"""Does a dictionary fit the tap it was put on? L0 and FVU on a few tokens, and a loud warning when absurd.

Transcoders hide several taps behind one name (before the norm, before its gain, after it), formats leave hook
points to be guessed, and a wrong one still loads: its L0 and FVU give it away (one wrong tap measured L0 664
and FVU 6.8e4 where the right one had 12.8 and 0.50). The first position of a text is often an attention sink
with an enormous norm: leave it out of what is passed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.metrics import ActivationMetrics

#: A reconstruction this bad explains nothing: predicting the mean has an FVU of 1.
ABSURD_FVU = 1.0
DOUBTFUL_FVU = 0.8
#: A quarter of all the features on every token is not sparse, in any published dictionary.
ABSURD_DENSITY = 0.25
#: Too few tokens to judge a variance by.
FEWEST_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Sanity:
    """verdict: fits | doubtful | absurd | unmeasured. warning is "" where it fits."""

    l0: float
    fvu: float
    n_tokens: int
    verdict: str
    warning: str


def check(dictionary: Dictionary, x: Tensor, target: Tensor | None = None) -> Sanity:
    """Encodes x (N, D) or (N, S, D) and compares with `target` (what the output hook points held; x for an
    SAE).
    """
    facts = dictionary.facts
    y = x if target is None else target
    width = y.flatten(1).shape[1]
    metrics = ActivationMetrics(facts.d_sae, width, device=y.device)
    fired = dictionary.encode(x)
    metrics.add(fired, y, dictionary.decode(fired, x))
    figures = metrics.result()
    verdict, why = _judge(figures.l0, figures.fvu, facts.d_sae, figures.n_tokens)
    return Sanity(
        l0=figures.l0,
        fvu=figures.fvu,
        n_tokens=figures.n_tokens,
        verdict=verdict,
        warning=_warning(dictionary, verdict, why, figures.l0, figures.fvu) if why else "",
    )


def _judge(l0: float, fvu: float, d_sae: int, n_tokens: int) -> tuple[str, str]:
    if n_tokens < FEWEST_TOKENS:
        return "unmeasured", ""
    if not math.isfinite(fvu) or not math.isfinite(l0):
        return "absurd", "its output is not finite"
    if l0 == 0:
        return "absurd", "no feature fires on any token"
    if fvu >= ABSURD_FVU:
        return "absurd", "it reconstructs worse than the mean activation would"
    if l0 > ABSURD_DENSITY * d_sae:
        return "absurd", f"more than {ABSURD_DENSITY:.0%} of its features fire on every token"
    if fvu >= DOUBTFUL_FVU:
        return "doubtful", "it explains little of the activations"
    return "fits", ""


def _warning(dictionary: Dictionary, verdict: str, why: str, l0: float, fvu: float) -> str:
    facts = dictionary.facts
    taps = ", ".join(facts.hook_points_in)
    if facts.hook_points_out != facts.hook_points_in:
        taps += " -> " + ", ".join(facts.hook_points_out)
    lead = "WRONG TAP?" if verdict == "absurd" else "Doubtful:"
    return (
        f"{lead} dictionary {facts.name} ({facts.source_format}, {facts.architecture}) on {taps}: {why} "
        f"(L0 {l0:.1f} of {facts.d_sae}, FVU {fvu:.3g}). Check that the model is the one it was trained on, and the "
        f"hook points: for an MLP's input try hook_resid_mid, ln2.hook_normalized (before the gain) or ln2.hook_out "
        f"(after it)."
    )
