// Influence, pruning and scores, as the server computes them:
// shares N = |A| over the sum of a target's incoming |A|; influence = w (N + N^2 + ...), w the logits' probabilities.
const LEAST = 1e-10;

/** Shares of the kept edges and the influence of every node through them, in one walk from the logits down. */
function influences(keep) {
  const { n, m, sources, weights, into, byTarget, order, start } = graph;
  const shares = new Float64Array(m), influence = new Float64Array(n);
  for (const target of order) {
    let sum = 0;
    for (let at = into[target]; at < into[target + 1]; at++) if (!keep || keep[byTarget[at]]) sum += Math.abs(weights[byTarget[at]]);
    if (!sum) continue;
    const flow = influence[target] + start[target];
    sum = Math.max(sum, LEAST);
    for (let at = into[target]; at < into[target + 1]; at++) {
      const edge = byTarget[at];
      if (keep && !keep[edge]) continue;
      shares[edge] = Math.abs(weights[edge]) / sum;
      influence[sources[edge]] += flow * shares[edge];
    }
  }
  return { shares, influence };
}

/** The score at which the cumulative share of the scores, largest first, reaches the threshold. */
function cutAt(scores, threshold) {
  if (threshold >= 1 || !scores.length) return -Infinity;
  const ordered = Float64Array.from(scores).sort();
  let whole = 0, sum = 0;
  for (const score of ordered) whole += score;
  for (let i = ordered.length - 1; i >= 0; i--) if ((sum += ordered[i]) >= threshold * Math.max(whole, LEAST)) return ordered[i];
  return ordered[0];
}

const whole = influences(null);

/** Nodes that stay at a threshold. Where the graph states each node's rank (its cumulative influence), that is used:
    it was computed on the whole graph, of which this page may hold a part. */
function strongNodes(threshold) {
  const keep = new Uint8Array(graph.n).fill(1);
  if (threshold >= packed.limits.node) return keep;
  if (graph.ranked) {
    const shares = graph.nodes.map((node, i) => graph.kind[i] < TOKEN ? node.influence : Infinity);
    const last = Math.min(...shares.filter(share => share >= threshold));
    for (let i = 0; i < graph.n; i++) keep[i] = graph.kind[i] >= TOKEN || shares[i] <= last;
  } else {
    const cut = cutAt(whole.influence, threshold / packed.limits.node);
    for (let i = 0; i < graph.n; i++) keep[i] = graph.kind[i] >= TOKEN || whole.influence[i] >= cut;
  }
  return keep;
}

/** The share of the scores among the nodes of a threshold that is in the page: 1 unless edges had to be left out. */
function heldAt(nodeThreshold) {
  const found = packed.held.find(([threshold]) => threshold >= nodeThreshold - 1e-9) || packed.held.at(-1);
  return found ? found[1] : 1;
}

/** { nodes, edges: masks; scores: of each edge kept; influence; nNodes, nEdges }. */
function prune(nodeThreshold, edgeThreshold) {
  const { n, m, sources, targets, kind, start } = graph, nodes = strongNodes(nodeThreshold), edges = new Uint8Array(m);
  for (let e = 0; e < m; e++) edges[e] = nodes[sources[e]] & nodes[targets[e]];
  const left = influences(edges), scores = new Float64Array(m);
  for (let e = 0; e < m; e++) if (edges[e]) scores[e] = left.shares[e] * (left.influence[targets[e]] + start[targets[e]]);
  if (edgeThreshold < packed.limits.edge) {
    const cut = cutAt(scores.filter((_, e) => edges[e]), edgeThreshold / packed.limits.edge / heldAt(nodeThreshold));
    for (let e = 0; e < m; e++) if (scores[e] < cut) edges[e] = 0;
  }
  // Until nothing changes: features and errors without an outgoing edge go, and features without an incoming one.
  for (let changed = true; changed;) {
    changed = false;
    const out = new Uint8Array(n), inward = new Uint8Array(n);
    for (let e = 0; e < m; e++) if (edges[e]) out[sources[e]] = inward[targets[e]] = 1;
    for (let i = 0; i < n; i++) {
      if (!nodes[i] || kind[i] >= TOKEN || (out[i] && (inward[i] || kind[i] !== FEATURE))) continue;
      nodes[i] = 0;
      changed = true;
    }
    for (let e = 0; e < m; e++) edges[e] &= nodes[sources[e]] & nodes[targets[e]];
  }
  let nNodes = 0, nEdges = 0;
  for (const kept of nodes) nNodes += kept;
  for (const kept of edges) nEdges += kept;
  return { nodes, edges, scores, influence: left.influence, nNodes, nEdges };
}

/** Replacement and completeness of the graph with the kept edges. */
function scoresOf(keep) {
  const { n, sources, targets, kind, start } = graph, { shares, influence } = influences(keep);
  const fromErrors = new Float64Array(n);
  let tokens = 0, errors = 0, all = 0, explained = 0;
  for (let i = 0; i < n; i++) {
    if (kind[i] === TOKEN) tokens += influence[i];
    if (kind[i] === ERROR) errors += influence[i];
  }
  for (let e = 0; e < graph.m; e++) {
    if (keep && !keep[e]) continue;
    if (kind[sources[e]] === ERROR) fromErrors[targets[e]] += shares[e];
  }
  for (let i = 0; i < n; i++) {
    all += influence[i] + start[i];
    explained += (1 - fromErrors[i]) * (influence[i] + start[i]);
  }
  return { replacement: tokens + errors ? tokens / (tokens + errors) : NaN, completeness: all ? explained / all : NaN };
}
