"""The tour's stages that tell an explanation: what `explanation` finds, drawn, step by step."""

from __future__ import annotations

import time

from rich.padding import Padding

from glasshouse.client import GraphNode
from glasshouse.client.pictures import HeatMap, Part, circuit_diagram, render
from glasshouse.tour import explanation
from glasshouse.tour.explanation import ANNA, HE, SHE, THRESHOLD, TOM
from glasshouse.tour.guide import Guide, expect
from glasshouse.tour.screen import INDENT, Screen


def show_tokens_and_heads(guide: Guide) -> None:
    """Step 1."""
    screen, model = guide.screen, guide.model
    screen.stage(f"Why did it say {SHE.strip()!r}? Tokens and heads")
    screen.code(
        f"metric = logit_difference({SHE!r}, {HE!r})",
        f"model.attribute_tokens({ANNA!r}, metric, baseline={TOM!r})",
        f'model.patch_sweep({ANNA!r}, {TOM!r}, metric=metric, grids=["hook_resid_pre", heads])',
    )
    begun = time.perf_counter()
    found = explanation.find_carriers(model)
    seconds = time.perf_counter() - begun
    tokens, stream, heads = found.tokens, found.stream, found.heads
    n_heads = model.info.n_heads
    for title, rows, columns, values in (
        ("Integrated gradients, from Tom's", ["tokens"], tokens.input.strings[1:], tokens.scores[None, 1:]),
        ("The stream, Tom's patched in", stream.row_labels, stream.column_labels[1:], stream.table[:, 1:]),
        (
            "Each head, Tom's patched in",
            [f"L{layer}" for layer in heads.axes.layers],
            [f"H{head}" for head in range(n_heads)],
            heads.table.reshape(-1, n_heads),
        ),
    ):
        _picture(screen, HeatMap(title=title, rows=rows, columns=columns, values=values, unit="logits"))
    screen.note(
        f"The name decides: {tokens.value:+.1f} logits, with Tom's {tokens.baseline_value:+.1f}. What it means stays in "
        f"its place until heads {' and '.join(found.strongest)} move it to the end. "
        f"{stream.values.size + heads.values.size} patches and the gradients took {seconds:.1f} s."
    )
    expect(abs(tokens.residual) < 0.05 * abs(found.change), "attributions that sum to the change")
    expect(found.carried > found.change / 2, "two heads that carry half of the change")


def show_circuit(guide: Guide) -> None:
    """Step 2."""
    screen = guide.screen
    screen.code(f"model.discover_circuit({ANNA!r}, {TOM!r}, threshold={THRESHOLD:g}).result()")
    circuit = explanation.find_circuit(guide.model)
    title = f"The circuit: {len(circuit.edges)} of {circuit.n_edges_total} edges"
    _picture(screen, circuit_diagram(title, circuit.edges))
    screen.note(
        f"Alone it does {circuit.faithfulness:.1%} of what the model does here; without it {1 - circuit.completeness:.1%} "
        f"is left. ACDC took {circuit.n_passes} passes, {circuit.seconds:.1f} s."
    )
    expect(circuit.faithfulness > 0.9, "a faithful circuit")
    expect(circuit.completeness > 0.9, "a complete circuit")
    expect(len(circuit.edges) < circuit.n_edges_total / 20, "a small circuit")


def show_features(guide: Guide) -> None:
    """Steps 3 and 4."""
    screen, model = guide.screen, guide.model
    screen.stage("Its features: an attribution graph, tested by intervention")
    screen.code(f"graph = model.attribution_graph({ANNA!r}, targets=[{SHE!r}, {HE!r}]).result()")
    begun = time.perf_counter()
    voices = explanation.find_voices(model)
    seconds = time.perf_counter() - begun
    screen.table(
        ["feature", "at", "promotes", "speaks for", "by"],
        [
            (
                f"transcoder-{node.layer}/{node.feature}",
                repr(node.token.strip()),
                " ".join(token.strip() for token in _promoted(guide, node)),
                SHE.strip() if difference > 0 else HE.strip(),
                f"{difference:+.1f}",
            )
            for node, difference in [*voices.for_she, *voices.for_he]
        ],
        right=[4],
    )
    pruned = voices.anna.prune()
    screen.note(
        f"Both graphs took {seconds:.1f} s. This one has {voices.anna.n_nodes} nodes, {pruned.n_nodes} after pruning; "
        f"features rather than errors carry {voices.anna.scores.replacement:.0%} of its influence. `glasshouse graph` "
        f"draws it as a page."
    )
    screen.code("model.intervene_on_features(text, she_features_off + he_features_on, mode='open')")
    swap = explanation.swap_voices(model, voices)
    by_token = {change.token: change for change in swap.swapped.logits}
    screen.table(
        [ANNA, "p before", "p after", "logit, predicted", "measured"],
        [
            (
                token.strip(),
                f"{by_token[token].probability_before:.1%}",
                f"{by_token[token].probability_after:.1%}",
                f"{by_token[token].predicted:+.1f}",
                f"{by_token[token].measured:+.1f}",
            )
            for token in (SHE, HE)
        ],
        right=[1, 2, 3, 4],
    )
    before, after = swap.sentences
    screen.say(f"{ANNA}{before}   becomes   {ANNA}{after}")
    screen.note(
        f"Predicted and measured logits correlate by {swap.swapped.logit_correlation:.3f}. As many other features, swapped "
        f"the same way, leave {swap.left_by_control:.0%} of the difference between the two."
    )
    expect(SHE in before and HE in after, f"{SHE.strip()!r} turned into {HE.strip()!r}")
    expect(swap.swapped.logit_correlation > 0.9, "logits that change as the graph predicts")
    expect(swap.left_by_control > 0.5, "other features to change little")


def _picture(screen: Screen, part: Part) -> None:
    screen.put(Padding(render(part), (0, 0, 0, INDENT)))
    screen.gap()


def _promoted(guide: Guide, node: GraphNode) -> list[str]:
    promoted = (
        guide.model.dictionary(f"transcoder-{node.layer}").feature(node.feature or 0, n_tokens=6).promoted
    )
    return list(promoted.tokens) if promoted is not None else []
