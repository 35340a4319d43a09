// The graph as arrays: node i of n, edge e of m from sources[e] to targets[e], ordered by target.
const byId = id => document.getElementById(id);
const packed = JSON.parse(byId("data").textContent);
const FEATURE = 0, ERROR = 1, TOKEN = 2, LOGIT = 3;
const KINDS = { "cross layer transcoder": FEATURE, "mlp reconstruction error": ERROR, embedding: TOKEN, logit: LOGIT };
const KIND_NAMES = ["feature", "error", "token", "logit"];

function unpack(text, Type) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return new Type(bytes.buffer);
}

const graph = (() => {
  const nodes = packed.nodes, n = nodes.length, Wide = n > 65535 ? Uint32Array : Uint16Array;
  const sources = unpack(packed.sources, Wide), targets = unpack(packed.targets, Wide), weights = unpack(packed.weights, Float32Array);
  const m = weights.length, kind = Uint8Array.from(nodes, node => KINDS[node.feature_type]);
  // Layers of transcoders that stand between the embedding (rank 0) and the logits (the last rank).
  const depths = [...new Set(nodes.filter((_, i) => kind[i] < TOKEN).map(node => Number(node.layer)))].sort((a, b) => a - b);
  const rankOf = new Map(depths.map((layer, place) => [layer, place + 1]));
  const rank = Int32Array.from(nodes, (node, i) => kind[i] === TOKEN ? 0 : kind[i] === LOGIT ? depths.length + 1 : rankOf.get(Number(node.layer)));
  const into = offsets(targets, n), outOf = offsets(sources, n), byTarget = gather(targets, into), bySource = gather(sources, outOf);
  return {
    nodes, n, m, kind, rank, sources, targets, weights, into, outOf, byTarget, bySource,
    position: Int32Array.from(nodes, node => node.ctx_idx),
    start: Float64Array.from(nodes, (node, i) => kind[i] === LOGIT ? node.token_prob : 0),
    ranked: nodes.every((node, i) => kind[i] >= TOKEN || typeof node.influence === "number"),
    tokens: packed.metadata.prompt_tokens,
    layers: ["embed", ...depths.map(layer => "L" + layer), "logits"],
    // From the logits down: an edge always goes to a later layer.
    order: Array.from(nodes.keys()).sort((a, b) => rank[b] - rank[a]),
  };
  function offsets(ends, count) {
    const starts = new Uint32Array(count + 1);
    for (const end of ends) starts[end + 1]++;
    for (let i = 0; i < count; i++) starts[i + 1] += starts[i];
    return starts;
  }
  function gather(ends, starts) {
    const next = starts.slice(), found = new Uint32Array(m);
    for (let e = 0; e < m; e++) found[next[ends[e]]++] = e;
    return found;
  }
})();

const number = value => {
  const size = Math.abs(value);
  return size === 0 ? "0" : size >= 100 ? value.toFixed(0) : size >= 0.1 ? value.toFixed(2) : size >= 0.001 ? value.toFixed(4) : value.toExponential(1);
};
const signed = value => (value < 0 ? "\u2212" : "+") + number(Math.abs(value));
const percent = share => (100 * share).toFixed(share > 0.9995 || share < 0.0995 && share > 0 ? (share < 0.0005 ? 2 : 1) : 1).replace(/\.0$/, "") + " %";
const visible = token => token.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
const plain = token => visible(token).trim() || visible(token).replace(/ /g, "\u2423") || "\u2205";
const quoted = token => "\u201c" + visible(token).replace(/^ +| +$/g, spaces => "\u2423".repeat(spaces.length)) + "\u201d";
const count = (value, word) => value.toLocaleString("en") + " " + word + (value === 1 ? "" : "s");

// What is known of feature i of layer l: its label and the tokens it promotes and suppresses.
const noteOf = i => packed.features[graph.nodes[i].layer + "/" + featureIndex(i)] || {};
const featureIndex = i => Number(graph.nodes[i].node_id.split("_")[1]);
const tokenAt = position => graph.tokens[position] ?? "?";

function label(i) {
  const node = graph.nodes[i];
  if (graph.kind[i] === TOKEN) return quoted(tokenAt(node.ctx_idx));
  if (graph.kind[i] === ERROR) return "error of " + graph.layers[graph.rank[i]];
  if (graph.kind[i] === LOGIT) return (logitText(node) ?? node.clerp) || "logit " + node.feature;
  const note = noteOf(i), words = (note.promoted || []).slice(0, 4).map(pair => plain(pair[0])).join(" ");
  return note.label || node.clerp || words || "feature " + featureIndex(i);
}
function logitText(node) {
  const found = /^Output ['"]([\s\S]*)['"] \(p=/.exec(node.clerp);
  return found && quoted(found[1].replace(/\\n/g, "\n").replace(/\\t/g, "\t").replace(/\\(['"\\])/g, "$1"));
}
function place(i) {
  const where = "at " + graph.position[i] + " " + quoted(tokenAt(graph.position[i]));
  if (graph.kind[i] === FEATURE) return graph.layers[graph.rank[i]] + " #" + featureIndex(i) + " " + where;
  if (graph.kind[i] === LOGIT) return "p " + percent(graph.nodes[i].token_prob);
  return (graph.kind[i] === ERROR ? "mlp error " : "embedding ") + where;
}

/** A place in a few letters, for lists. */
function whereabouts(i) {
  if (graph.kind[i] === LOGIT) return percent(graph.nodes[i].token_prob);
  return (graph.kind[i] === TOKEN ? "token " + graph.position[i] : graph.layers[graph.rank[i]]) + (graph.kind[i] === TOKEN ? "" : " " + plain(tokenAt(graph.position[i])));
}

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
