// What the reader has chosen. A key names what is selected: a node's number, or "group 0".
const state = {
  nodeThreshold: 1, edgeThreshold: 1, signs: "both", errors: true, view: "graph",
  selected: null, hovered: null, pinned: [], ticked: new Set(), groups: [], shown: null, scene: null,
};

(function restore() {
  // An error of layer l shares its id with feature l of layer 0: an id means the feature where there is one.
  const numbers = new Map(), saved = packed.metadata ? packed.qParams || {} : {};
  graph.nodes.forEach((node, i) => { if (!numbers.has(node.node_id) || graph.kind[numbers.get(node.node_id)] === ERROR) numbers.set(node.node_id, i); });
  const known = ids => [...new Set((ids || []).map(id => numbers.get(id)).filter(i => i !== undefined))];
  state.pinned = known(saved.pinnedIds);
  for (const [name, ...ids] of saved.supernodes || []) {
    const members = known(ids);
    if (!members.length) continue;
    state.groups.push({ name: String(name), members });
    for (const i of members) if (!state.pinned.includes(i)) state.pinned.push(i);
  }
  state.selected = known([saved.clickedId])[0] ?? null;
})();

const isPinned = i => state.pinned.includes(i);
const groupIndexOf = i => { const found = state.groups.findIndex(group => group.members.includes(i)); return found < 0 ? undefined : found; };
const groupOf = i => state.groups[groupIndexOf(i)];

/** What an item is called in `selected` and `hovered`, and back. */
const keyOf = item => item.group === undefined ? item.members[0] : "group " + item.group;
function itemOfKey(key) {
  if (key === null) return null;
  const { scene } = state;
  if (typeof key === "number") return scene.itemOf[key] >= 0 ? scene.itemOf[key] : null;
  const found = scene.items.findIndex(item => item.group !== undefined && keyOf(item) === key);
  return found < 0 ? null : found;
}
const membersOf = key => key === null ? [] : typeof key === "number" ? [key] : (state.groups[Number(key.slice(6))] || { members: [] }).members;

/** The lines of one item, the strongest each way, whether drawn behind or not. */
const MOST_OWN = 400;
function linesOf(at) {
  const { scene } = state;
  if (scene.circuit) {
    const most = Math.max(LEAST, ...scene.lines.map(line => Math.abs(line.weight)));
    return scene.lines.filter(line => line.a === at || line.b === at).map(line => ({ ...line, most }));
  }
  const found = [];
  for (const side of ["in", "out"]) {
    const rows = edgesOf(scene.items[at].members, side), most = rows.length ? Math.abs(rows[0].weight) : 1;
    for (const row of rows.slice(0, MOST_OWN)) {
      const other = scene.itemOf[row.node];
      if (other >= 0) found.push({ a: side === "in" ? other : at, b: side === "in" ? at : other, weight: row.weight, most });
    }
  }
  return found;
}

/** The edges into or out of some nodes, summed by the other end: { node, weight, share of the target's input }. */
function edgesOf(members, side) {
  const inside = new Set(members), sums = new Map();
  for (const i of members) {
    const starts = side === "in" ? graph.into : graph.outOf, list = side === "in" ? graph.byTarget : graph.bySource;
    for (let at = starts[i]; at < starts[i + 1]; at++) {
      const e = list[at], node = side === "in" ? graph.sources[e] : graph.targets[e];
      if (!isShown(e) || inside.has(node)) continue;
      const sum = sums.get(node) || { node, weight: 0, share: 0 };
      sum.weight += graph.weights[e];
      sum.share += whole.shares[e];
      sums.set(node, sum);
    }
  }
  return [...sums.values()].filter(row => signAllows(row.weight)).sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}
const isShown = e => state.shown.edges[e] || (state.view === "circuit" && isPinned(graph.sources[e]) && isPinned(graph.targets[e]));

function toggle(list, value) {
  const at = list.indexOf(value);
  if (at < 0) list.push(value); else list.splice(at, 1);
  return at < 0;
}
function pin(i) {
  if (toggle(state.pinned, i)) { update(); return; }
  state.ticked.delete(i);
  for (const group of state.groups) group.members = group.members.filter(member => member !== i);
  state.groups = state.groups.filter(group => group.members.length);
  update();
}
/** Groups the ticked pins, or all that are in no group, under a name. */
function group(name) {
  const ticked = state.pinned.filter(i => state.ticked.has(i));
  const members = ticked.length ? ticked : state.pinned.filter(i => groupIndexOf(i) === undefined);
  if (members.length < 2) return;
  for (const other of state.groups) other.members = other.members.filter(i => !members.includes(i));
  state.groups = state.groups.filter(other => other.members.length);
  state.groups.push({ name: name || label(members[0]), members });
  state.ticked.clear();
  update();
}
function ungroup(g) {
  state.groups.splice(g, 1);
  if (typeof state.selected === "string") state.selected = null;
  update();
}
/** The likeliest logit, the most influential features, and the tokens that matter most to them. */
function pinStrongest() {
  const ranked = Array.from(graph.order).filter(i => state.shown.nodes[i]).sort((a, b) => whole.influence[b] - whole.influence[a]);
  const first = kind => ranked.filter(i => graph.kind[i] === kind);
  const best = graph.order.filter(i => graph.kind[i] === LOGIT).sort((a, b) => graph.start[b] - graph.start[a]).slice(0, 2);
  for (const i of [...first(TOKEN).slice(0, 4), ...first(FEATURE).slice(0, 12), ...best]) if (!isPinned(i)) state.pinned.push(i);
  update();
}
function exported(onlyShown) {
  const keep = i => !onlyShown || state.shown.nodes[i] || isPinned(i), links = [];
  for (let e = 0; e < graph.m; e++) {
    if (onlyShown && !state.shown.edges[e]) continue;
    const [source, target] = [graph.sources[e], graph.targets[e]].map(i => graph.nodes[i].node_id);
    links.push({ source, target, weight: Number(graph.weights[e].toPrecision(9)) });
  }
  const ids = list => list.map(i => graph.nodes[i].node_id), selected = typeof state.selected === "number" ? ids([state.selected])[0] : "";
  const settings = { node_threshold: onlyShown ? state.nodeThreshold : packed.limits.node, edge_threshold: onlyShown ? state.edgeThreshold : packed.limits.edge };
  return {
    metadata: { ...packed.metadata, node_threshold: settings.node_threshold, pruning_settings: { ...packed.metadata.pruning_settings, ...settings } },
    qParams: { ...packed.qParams, pinnedIds: ids(state.pinned), supernodes: state.groups.map(group => [group.name, ...ids(group.members)]), clickedId: selected },
    nodes: graph.nodes.filter((_, i) => keep(i)),
    links,
  };
}
