"""Why did it say "she"? One answer explained end to end: tokens, heads, a circuit, features, and the test of it.

1. Tokens: integrated gradients from the same sentence about Tom. Patching the stream shows where the name's meaning
   travels, patching heads which of them carry it.
2. Circuit: ACDC keeps the few edges without which the answer is lost.
3. Features: an attribution graph on the per-layer transcoders, for either sentence. Of the last position's features,
   those that speak for "she" in the one and for "he" in the other.
4. Test: the first turned off, the second on, and the model goes on writing. What the graph's edges predict is held
   against what happens.
"""

from __future__ import annotations

import time

from rich.padding import Padding

from glasshouse.client import AttributionGraph, FeatureSetting, GraphNode, logit_difference, patch_grid
from glasshouse.client.pictures import HeatMap, Part, circuit_diagram, render
from glasshouse.tour.guide import Guide, expect
from glasshouse.tour.screen import INDENT, Screen

ANNA, TOM = "Anna was tired, so", "Tom was tired, so"
SHE, HE = " she", " he"
THRESHOLD = 0.03
N_SET = 4
MAX_TOKENS = 12


def find_tokens_and_heads(guide: Guide) -> None:
    """Step 1."""
    screen, model = guide.screen, guide.model
    screen.stage(f"Why did it say {SHE.strip()!r}? Tokens and heads")
    screen.code(
        f"metric = logit_difference({SHE!r}, {HE!r})",
        f"model.attribute_tokens({ANNA!r}, metric, baseline={TOM!r})",
        f'model.patch_sweep({ANNA!r}, {TOM!r}, metric=metric, grids=["hook_resid_pre", heads])',
    )
    metric = logit_difference(SHE, HE)
    heads = patch_grid("attn.hook_z", by_head=True, all_positions_at_once=True)
    begun = time.perf_counter()
    tokens = model.attribute_tokens(ANNA, metric, baseline=TOM)
    swept = model.patch_sweep(ANNA, TOM, metric=metric, grids=["hook_resid_pre", heads]).result()
    seconds = time.perf_counter() - begun
    stream, by_head = swept.grids
    n_heads = model.info.n_heads
    for title, rows, columns, values in (
        ("Integrated gradients, from Tom's", ["tokens"], tokens.input.strings[1:], tokens.scores[None, 1:]),
        ("The stream, Tom's patched in", stream.row_labels, stream.column_labels[1:], stream.table[:, 1:]),
        (
            "Each head, Tom's patched in",
            [f"L{layer}" for layer in by_head.axes.layers],
            [f"H{head}" for head in range(n_heads)],
            by_head.table.reshape(-1, n_heads),
        ),
    ):
        _picture(screen, HeatMap(title=title, rows=rows, columns=columns, values=values, unit="logits"))
    carriers = by_head.top(2)
    changed = tokens.value - tokens.baseline_value
    screen.note(
        f"The name decides: {tokens.value:+.1f} logits, with Tom's {tokens.baseline_value:+.1f}. What it means stays in "
        f"its place until heads {' and '.join(f'{found.layer}.{found.column}' for found in carriers)} move it to the "
        f"end. {stream.values.size + by_head.values.size} patches and the gradients took {seconds:.1f} s."
    )
    expect(abs(tokens.residual) < 0.05 * abs(changed), "attributions that sum to the change")
    expect(
        sum(abs(found.effect) for found in carriers) > changed / 2, "two heads that carry half of the change"
    )


def find_circuit(guide: Guide) -> None:
    """Step 2."""
    screen, model = guide.screen, guide.model
    screen.code(f"model.discover_circuit({ANNA!r}, {TOM!r}, threshold={THRESHOLD:g}).result()")
    circuit = model.discover_circuit(ANNA, TOM, threshold=THRESHOLD).result()
    title = f"The circuit: {len(circuit.edges)} of {circuit.n_edges_total} edges"
    _picture(screen, circuit_diagram(title, circuit.edges))
    screen.note(
        f"Alone it does {circuit.faithfulness:.1%} of what the model does here; without it {1 - circuit.completeness:.1%} "
        f"is left. ACDC took {circuit.n_passes} passes, {circuit.seconds:.1f} s."
    )
    expect(circuit.faithfulness > 0.9, "a faithful circuit")
    expect(circuit.completeness > 0.9, "a complete circuit")
    expect(len(circuit.edges) < circuit.n_edges_total / 20, "a small circuit")


def trace_and_test(guide: Guide) -> None:
    """Steps 3 and 4."""
    screen, model = guide.screen, guide.model
    screen.stage("Its features: an attribution graph, tested by intervention")
    screen.code(f"graph = model.attribution_graph({ANNA!r}, targets=[{SHE!r}, {HE!r}]).result()")
    begun = time.perf_counter()
    anna, tom = (model.attribution_graph(text, targets=[SHE, HE]).result() for text in (ANNA, TOM))
    seconds = time.perf_counter() - begun
    for_she, for_he = speaking(anna)[:N_SET], speaking(tom)[::-1][:N_SET]
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
            for node, difference in [*for_she, *for_he]
        ],
        right=[4],
    )
    pruned = anna.prune()
    screen.note(
        f"Both graphs took {seconds:.1f} s. This one has {anna.n_nodes} nodes, {pruned.n_nodes} after pruning; features "
        f"rather than errors carry {anna.scores.replacement:.0%} of its influence. `glasshouse graph` draws it as a page."
    )
    off = [_set(node, 0.0) for node, _ in for_she]
    on = [_set(node, node.activation or 0.0) for node, _ in for_he]
    screen.code("model.intervene_on_features(text, she_features_off + he_features_on, mode='open')")
    changed = model.intervene_on_features(
        ANNA, off + on, mode="open", tokens=[SHE, HE], max_tokens=MAX_TOKENS
    )
    by_token = {change.token: change for change in changed.logits}
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
    before, after = (_sentence(text) for text in (changed.text_before, changed.text_after))
    screen.say(f"{ANNA}{before}   becomes   {ANNA}{after}")
    screen.note(f"Predicted and measured logits correlate by {changed.logit_correlation:.3f}.")
    expect(SHE in before and HE in after, f"{SHE.strip()!r} turned into {HE.strip()!r}")
    expect(changed.logit_correlation > 0.9, "logits that change as the graph predicts")


def speaking(graph: AttributionGraph) -> list[tuple[GraphNode, float]]:
    """Features of the last position by how much more they write into the first target than into the second."""
    she, he = graph.first_logit, graph.first_logit + 1
    differences: dict[int, float] = {}
    for logit, sign in ((she, 1.0), (he, -1.0)):
        for node, weight in graph.incoming(logit, graph.n_nodes_total):
            if node.kind == "feature" and node.position == graph.n_positions - 1:
                differences[node.number] = differences.get(node.number, 0.0) + sign * weight
    numbers = sorted(differences, key=lambda number: -differences[number])
    return [(graph.node(number), differences[number]) for number in numbers]


def _picture(screen: Screen, part: Part) -> None:
    screen.put(Padding(render(part), (0, 0, 0, INDENT)))
    screen.gap()


def _promoted(guide: Guide, node: GraphNode) -> list[str]:
    promoted = (
        guide.model.dictionary(f"transcoder-{node.layer}").feature(node.feature or 0, n_tokens=6).promoted
    )
    return list(promoted.tokens) if promoted is not None else []


def _set(node: GraphNode, value: float) -> FeatureSetting:
    return FeatureSetting(node.layer, node.feature or 0, node.position, value)


def _sentence(text: str) -> str:
    return text.partition(".")[0] + "."
