"""Reading: the hook points there are, activations at some of them, and what each layer would say next."""

from __future__ import annotations

import numpy as np
from rich.text import Text

from glasshouse.client import read_logit_lens
from glasshouse.tour.guide import Guide, expect

SENTENCE = "The little dog lost his ball."
QUESTION = "The capital of France is called"
ANSWER = "Paris"


def list_hook_points(guide: Guide) -> None:
    """A block's hook points, and how many there are."""
    screen, model = guide.screen, guide.model
    screen.stage("Hook points: every place in the forward pass that can be read or edited")
    screen.code("model.hook_points()")
    points = model.hook_points()
    names = [point.name for point in points]
    expect(guide.middle in names, f"{guide.middle} among the hook points")
    layer = model.info.n_layers // 2
    wanted = (
        "hook_resid_pre",
        "attn.hook_q",
        "attn.hook_pattern",
        "attn.hook_z",
        "mlp.hook_post",
        "hook_resid_post",
    )
    shown = [p for p in points if p.name.removeprefix(f"blocks.{layer}.") in wanted]
    screen.table(
        ["name", "in the checkpoint's code", "width", "read", "edit"],
        [
            (
                p.name,
                p.module_path,
                str(p.width or "-"),
                "yes" if p.readable else "",
                "yes" if p.writable else "",
            )
            for p in shown
        ],
        right=[2],
    )
    screen.note(f"{len(shown)} of {len(points)}: {sum(p.writable for p in points)} can be edited.")


def read_activations(guide: Guide) -> None:
    """The residual stream of a sentence at every layer, as numbers: one norm a token."""
    screen, model = guide.screen, guide.model
    screen.stage("Activations: the residual stream of a sentence, at every layer")
    points = [f"blocks.{layer}.hook_resid_post" for layer in range(model.info.n_layers)]
    screen.code(f"model.activations({SENTENCE!r}, hook_points=[{points[0]!r}, ...])")
    acts = model.activations(SENTENCE, hook_points=points)
    shape = (len(acts.token_ids), model.info.d_model)
    expect(all(array.shape == shape for array in acts.values()), f"arrays of shape {shape}")
    expect(all(np.isfinite(array).all() for array in acts.values()), "finite activations")
    norms = np.stack([np.linalg.norm(acts[point], axis=1) for point in points])
    screen.table(
        ["norm at", *(token.strip() for token in acts.tokens[1:])],
        [
            (point, *(_shaded(value, row[1:].max()) for value in row[1:]))
            for point, row in zip(points, norms, strict=True)
        ],
        right=range(1, shape[0]),
    )
    screen.note(f"{len(points)} arrays of shape {shape}, {acts[points[0]].dtype}.")


def read_lens(guide: Guide) -> None:
    """The logit lens at every layer, where the answer appears."""
    screen, model = guide.screen, guide.model
    points = [f"blocks.{layer}.hook_resid_post" for layer in range(model.info.n_layers)]
    screen.stage(f"Logit lens: what each layer would say after {QUESTION!r}")
    screen.code("model.generate(..., readouts=[read_logit_lens(hook_point, top_k=4), ...])")
    found = model.generate(
        QUESTION,
        max_tokens=1,
        temperature=0.0,
        readouts=[read_logit_lens(point, top_k=4) for point in points],
    ).result()
    lens = found.tokens[0].logit_lens
    rows: list[list[str | Text]] = []
    for point in points:
        top = lens[point]
        cells: list[str | Text] = [
            Text(
                f"{token.strip() or repr(token)} {np.exp(logprob):.0%}",
                style="bold" if token.strip() == ANSWER else "",
            )
            for token, logprob in zip(top.tokens, top.logprobs, strict=True)
        ]
        rows.append([point, *cells])
    screen.table(["after", "1st", "2nd", "3rd", "4th"], rows)
    expect(found.text.strip() == ANSWER, f"{QUESTION!r} to be answered {ANSWER!r}, not {found.text!r}")
    screen.note(f"The model answers {found.text.strip()!r}.")


def _shaded(value: float, most: float) -> Text:
    """A number, the brighter the larger."""
    share = value / most
    return Text(f"{value:.0f}", style="dim" if share < 0.4 else "bold" if share > 0.8 else "")
