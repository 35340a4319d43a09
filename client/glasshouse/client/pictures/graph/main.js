// Events, and what follows a change.
function select(key) {
  state.selected = key;
  const at = itemOfKey(key);
  if (at !== null) reveal(state.scene.items[at]);
  showNode();
  say(key);
  redraw();
}
function hover(key) {
  if (state.hovered === key) return;
  state.hovered = key;
  redraw();
}
function say(key) {
  if (typeof key !== "number") return;
  byId("said").textContent = KIND_NAMES[graph.kind[key]] + " " + label(key) + ", " + place(key) + (isPinned(key) ? ", pinned" : "");
}
/** After a change of thresholds, pins, groups or view. */
function update({ fit = false } = {}) {
  state.shown = prunedOnce();
  const before = state.scene;
  state.scene = state.view === "graph" ? graphScene(state.shown, size.width, size.height) : circuitScene(size.width, size.height);
  if (state.selected !== null && typeof state.selected === "string" && itemOfKey(state.selected) === null) state.selected = null;
  state.hovered = null;
  if (fit || !before || before.width !== state.scene.width || before.height !== state.scene.height) fitView();
  showCounts();
  showNode();
  showPins();
  redraw(true);
}
/** Pruning is the slow part: done again only when what it depends on has changed. */
let pruned = { of: "" };
function prunedOnce() {
  const of = [state.nodeThreshold, state.edgeThreshold, state.errors].join();
  if (pruned.of !== of) {
    const kept = prune(state.nodeThreshold, state.edgeThreshold);
    pruned = { of, ...kept, quality: scoresOf(kept.edges) };
    if (!state.errors) withoutErrors(pruned);
  }
  return pruned;
}
function withoutErrors(shown) {
  for (let i = 0; i < graph.n; i++) if (graph.kind[i] === ERROR && shown.nodes[i]) { shown.nodes[i] = 0; shown.nNodes--; }
  for (let e = 0; e < graph.m; e++) if (shown.edges[e] && graph.kind[graph.sources[e]] === ERROR) { shown.edges[e] = 0; shown.nEdges--; }
}
function showCounts() {
  const { shown, scene } = state, drawn = scene.circuit ? scene.lines.length : Math.min(MOST_LINES, shown.nEdges);
  byId("counts").textContent = scene.circuit ? count(scene.items.length, "box").replace("boxs", "boxes") + ", " + count(drawn, "edge")
    : shown.nNodes.toLocaleString("en") + " of " + count(graph.n, "node") + ", " + count(shown.nEdges, "edge") + (drawn < shown.nEdges && state.signs === "both" ? " (strongest " + drawn.toLocaleString("en") + " drawn)" : "");
  byId("counts").dataset.nodes = shown.nNodes;
  byId("counts").dataset.edges = shown.nEdges;
  byId("pin-count").textContent = state.pinned.length;
  byId("empty").hidden = !(scene.circuit && !state.pinned.length);
  byId("legend").hidden = Boolean(scene.circuit);
  const stated = (packed.metadata.info || {}).scores || packed.scores, now = shown.quality;
  byId("scores").replaceChildren(...[
    ["replacement", "How much of the logits' influence comes from tokens through features alone, errors being the rest"],
    ["completeness", "How much of the nodes' input is from features and tokens, errors being the rest"],
  ].map(([name, meaning]) => {
    const box = make("div"), value = make("dd", "", Number.isFinite(now[name]) ? now[name].toFixed(3) : "\u2013");
    box.title = meaning + ": of what is shown, and of the whole graph.";
    if (stated) value.append(make("small", "", " / " + stated[name].toFixed(3)));
    box.append(make("dt", "", name), value);
    return box;
  }));
}

function setView(name) {
  state.view = name;
  for (const each of ["graph", "circuit"]) byId("tab-" + each).setAttribute("aria-selected", String(each === name));
  byId("stage").setAttribute("aria-label", name === "graph" ? "Graph" : "Circuit");
  update({ fit: true });
}
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "\u2600" : "\u263e";
  readColours();
  redraw(true);
}
const otherTheme = () => document.documentElement.dataset.theme === "dark" ? "light" : "dark";

function slider(id, output, name, limit) {
  const input = byId(id);
  input.max = limit;
  input.value = state[name];
  const show = () => { byId(output).textContent = percent(state[name]); };
  let waiting = false;
  input.addEventListener("input", () => {
    state[name] = Number(input.value) >= limit - 1e-9 ? limit : Number(input.value);
    show();
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; update(); });
  });
  show();
}
function found(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const scored = [];
  for (let i = 0; i < graph.n; i++) {
    const note = noteOf(i), node = graph.nodes[i];
    const all = [label(i), place(i), node.node_id, node.clerp, tokenAt(graph.position[i]), KIND_NAMES[graph.kind[i]], ...(note.promoted || []).map(pair => pair[0])].join(" ").toLowerCase();
    if (words.every(word => all.includes(word))) scored.push(i);
  }
  return scored.sort((a, b) => state.shown.nodes[b] - state.shown.nodes[a] || whole.influence[b] + graph.start[b] - whole.influence[a] - graph.start[a]).slice(0, 40);
}
function searching() {
  const box = byId("search"), results = byId("found");
  let rows = [], at = 0;
  const close = () => { results.hidden = true; box.setAttribute("aria-expanded", "false"); hover(null); };
  const take = i => { close(); box.value = ""; if (state.view === "circuit" && !isPinned(i)) setView("graph"); select(i); byId("nodes").focus(); };
  const mark = () => [...results.children].forEach((row, k) => { row.setAttribute("aria-selected", String(k === at)); if (k === at) row.scrollIntoView({ block: "nearest" }); });
  box.addEventListener("input", () => {
    if (!box.value.trim()) { close(); return; }
    rows = found(box.value); at = 0;
    results.replaceChildren(...rows.map(i => {
      const row = make("li"), name = make("span", "name", label(i) + " ");
      row.setAttribute("role", "option");
      name.append(make("small", "", place(i)));
      row.append(glyph(i), name, ...(state.shown.nodes[i] ? [] : [make("small", "", "pruned")]));
      row.addEventListener("mousedown", event => { event.preventDefault(); take(i); });
      row.addEventListener("mouseenter", () => hover(i));
      return row;
    }));
    if (!rows.length) results.replaceChildren(make("li", "none", "No such node."));
    results.hidden = false;
    box.setAttribute("aria-expanded", "true");
    mark();
  });
  box.addEventListener("keydown", event => {
    if (event.key === "Escape") { close(); box.blur(); return; }
    if (results.hidden || !rows.length) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { at = (at + (event.key === "ArrowDown" ? 1 : rows.length - 1)) % rows.length; mark(); hover(rows[at]); event.preventDefault(); }
    if (event.key === "Enter") { take(rows[at]); event.preventDefault(); }
  });
  box.addEventListener("blur", close);
}

function showTip(item, x, y) {
  const tip = byId("tip");
  if (!item || keyOf(item) === state.selected) { tip.hidden = true; return; }
  const key = keyOf(item), parts = [];
  if (typeof key === "string") parts.push(make("b", "", item.text), make("p", "", membersOf(key).map(label).join(", ")));
  else {
    const node = graph.nodes[key], note = noteOf(key), facts = [place(key)];
    if (typeof node.activation === "number") facts.push("activation " + number(node.activation));
    if (graph.kind[key] < TOKEN) facts.push("influence " + percent(whole.influence[key] / influenceOfAll()));
    parts.push(make("b", "", label(key)), make("p", "", facts.join("  \u00b7  ")), wordList("promotes", (note.promoted || []).slice(0, 5), "up"), wordList("suppresses", (note.suppressed || []).slice(0, 5), "down"));
  }
  tip.replaceChildren(...parts.filter(Boolean));
  tip.hidden = false;
  tip.style.left = Math.max(4, Math.min(x + 16, size.width - tip.offsetWidth - 8)) + "px";
  tip.style.top = (y + 20 + tip.offsetHeight > size.height ? Math.max(4, y - tip.offsetHeight - 14) : y + 20) + "px";
}
function pointing() {
  const canvas = canvases.nodes, fingers = new Map();
  let moved = 0, spread = 0;
  const place_ = event => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const distance = () => { const [a, b] = [...fingers.values()]; return Math.hypot(a[0] - b[0], a[1] - b[1]); };
  canvas.addEventListener("pointerdown", event => {
    fingers.set(event.pointerId, place_(event));
    canvas.setPointerCapture(event.pointerId);
    moved = 0;
    if (fingers.size === 2) spread = distance();
  });
  canvas.addEventListener("pointermove", event => {
    const here = place_(event), before = fingers.get(event.pointerId);
    if (!before) {
      const at = itemAt(...here), item = at === null ? null : state.scene.items[at];
      canvas.classList.toggle("over", at !== null);
      hover(item && keyOf(item));
      showTip(item, ...here);
      return;
    }
    fingers.set(event.pointerId, here);
    if (fingers.size === 2) { const now = distance(), [a, b] = [...fingers.values()]; zoomAt(now / spread, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2); spread = now; moved = 99; return; }
    moved += Math.abs(here[0] - before[0]) + Math.abs(here[1] - before[1]);
    if (moved < 4) return;
    canvas.classList.add("dragging");
    showTip(null);
    view.x += here[0] - before[0];
    view.y += here[1] - before[1];
    redraw();
  });
  const release = event => {
    if (!fingers.delete(event.pointerId)) return;
    canvas.classList.remove("dragging");
    if (moved >= 4 || event.type === "pointercancel") return;
    const at = itemAt(...place_(event));
    if (at !== null && event.shiftKey && state.scene.items[at].group === undefined) { pin(state.scene.items[at].members[0]); return; }
    select(at === null ? null : keyOf(state.scene.items[at]));
    showTip(null);
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => { hover(null); showTip(null); });
  canvas.addEventListener("dblclick", event => {
    const at = itemAt(...place_(event));
    if (at !== null && state.scene.items[at].group === undefined) pin(state.scene.items[at].members[0]);
  });
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    showTip(null);
    zoomAt(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), ...place_(event));
  }, { passive: false });
}

/** The next item of the layer, or the nearest of a layer above or below. */
function step(dx, dy) {
  const { items } = state.scene, from = itemOfKey(state.selected);
  if (!items.length) return;
  if (from === null) { select(keyOf(items.reduce((best, item) => item.y < best.y ? item : best))); return; }
  const here = items[from];
  let candidates;
  if (dx) {
    const row = items.filter(item => item.rank === here.rank).sort((a, b) => a.x - b.x || a.y - b.y);
    candidates = [row[(row.indexOf(here) + dx + row.length) % row.length]];
  } else {
    const ranks = items.map(item => item.rank).filter(rank => dy > 0 ? rank > here.rank : rank < here.rank);
    if (!ranks.length) return;
    const next = dy > 0 ? Math.min(...ranks) : Math.max(...ranks);
    candidates = items.filter(item => item.rank === next).sort((a, b) => Math.abs(a.x - here.x) - Math.abs(b.x - here.x));
  }
  if (candidates[0]) select(keyOf(candidates[0]));
}
function follow(side) {
  const rows = edgesOf(membersOf(state.selected), side);
  if (rows.length) select(rows[0].node);
}
function download(onlyShown) {
  const link = make("a"), name = (packed.metadata.slug || "graph") + ".json";
  link.href = URL.createObjectURL(new Blob([JSON.stringify(exported(onlyShown))], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 4000);
  byId("saving").close();
}
function openSaving() {
  byId("save-all").textContent = "Everything: " + count(graph.n, "node") + ", " + count(graph.m, "edge");
  byId("save-shown").textContent = "What is shown: " + count(state.shown.nNodes, "node") + ", " + count(state.shown.nEdges, "edge");
  byId("saving").showModal();
}
const keys = {
  ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, 1), ArrowDown: () => step(0, -1),
  Enter: () => { const first = byId("node").querySelector("button"); if (first) first.focus(); },
  Escape: () => select(null), i: () => follow("in"), o: () => follow("out"),
  p: () => { if (typeof state.selected === "number") pin(state.selected); },
  g: () => { const name = byId("group-name"); if (name) name.focus(); },
  v: () => setView(state.view === "graph" ? "circuit" : "graph"), t: () => chooseTheme(otherTheme()), s: openSaving,
  "/": () => byId("search").focus(), "?": () => byId("keys").showModal(),
  "+": () => zoomAt(1.3, size.width / 2, size.height / 2), "=": () => zoomAt(1.3, size.width / 2, size.height / 2),
  "-": () => zoomAt(1 / 1.3, size.width / 2, size.height / 2), 0: fitView,
};
let themeChosen = false;
function chooseTheme(theme) { themeChosen = true; setTheme(theme); }

(function start() {
  const { metadata } = packed;
  const special = /^<[^<>\s]+>$/.test(tokenAt(0)) && metadata.prompt.startsWith(tokenAt(0)); // Such as <|bos|>.
  const asked = special ? metadata.prompt.slice(tokenAt(0).length) : metadata.prompt;
  document.title = "Why? " + asked;
  const best = graph.order.filter(i => graph.kind[i] === LOGIT).sort((a, b) => graph.start[b] - graph.start[a])[0];
  const prompt = make("span");
  prompt.append(make("bdi", "", visible(asked)));
  byId("prompt").append(prompt, ...(best === undefined ? [] : [make("small", "", "\u2192"), make("b", "", label(best))]));
  byId("prompt").title = metadata.prompt;
  const sets = metadata.transcoder_list || [];
  byId("about").title = sets.join(", ");
  byId("about").textContent = [metadata.scan, count(graph.tokens.length, "token"), sets.length > 2 ? count(sets.length, "transcoder") : sets.join(", "),
    packed.limits.node < 1 && "to " + percent(packed.limits.node) + " of influence"].filter(Boolean).join("  \u00b7  ");
  state.nodeThreshold = packed.thresholds.node;
  state.edgeThreshold = packed.thresholds.edge;
  slider("node-threshold", "node-value", "nodeThreshold", packed.limits.node);
  slider("edge-threshold", "edge-value", "edgeThreshold", packed.limits.edge);
  byId("errors").addEventListener("change", event => { state.errors = event.target.checked; update(); });
  byId("signs").addEventListener("change", event => { state.signs = event.target.value; update(); });
  byId("tab-graph").addEventListener("click", () => setView("graph"));
  byId("tab-circuit").addEventListener("click", () => setView("circuit"));
  byId("theme").addEventListener("click", () => chooseTheme(otherTheme()));
  byId("help").addEventListener("click", () => byId("keys").showModal());
  byId("save").addEventListener("click", openSaving);
  byId("save-all").addEventListener("click", () => download(false));
  byId("save-shown").addEventListener("click", () => download(true));
  byId("pin-strongest").addEventListener("click", pinStrongest);
  byId("zoom-in").addEventListener("click", keys["+"]);
  byId("zoom-out").addEventListener("click", keys["-"]);
  byId("zoom-fit").addEventListener("click", fitView);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", event => { if (!themeChosen) setTheme(event.matches ? "dark" : "light"); });
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea") || document.querySelector("dialog[open]")) return;
    if (event.target.matches("button") && event.key === "Enter") return;
    const act = keys[event.key] || keys[event.key.toLowerCase()];
    if (!act) return;
    event.preventDefault();
    act();
  });
  searching();
  pointing();
  resize();
  setTheme(dark.matches ? "dark" : "light");
  update({ fit: true });
  new ResizeObserver(() => { resize(); update({ fit: true }); }).observe(byId("stage"));
})();
