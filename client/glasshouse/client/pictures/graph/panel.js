// The side panel: the chosen node with what goes in and out of it, and the pins with their groups.
const MOST_ROWS = 40;

function glyph(i) {
  return make("i", "glyph " + KIND_NAMES[graph.kind[i]]);
}
function groupGlyph(g) {
  const dot = make("i", "glyph group");
  dot.style.background = groupColour(g);
  return dot;
}
function showNode() {
  const card = byId("node"), key = state.selected;
  const scroll = card.dataset.key === String(key) ? card.scrollTop : 0;
  card.dataset.key = String(key);
  if (key === null) card.replaceChildren(...introduction());
  else if (typeof key === "string") card.replaceChildren(...groupCard(key));
  else card.replaceChildren(...nodeCard(key));
  card.scrollTop = scroll;
  const text = card.querySelector(".text"), here = text && text.querySelector(".here");
  if (here) text.scrollTop = here.offsetTop - text.offsetTop - text.clientHeight / 2;
}
function introduction() {
  const top = make("h2", "", "What made it say that?");
  const lines = [
    "Each dot is something the model computed: a feature of a transcoder, what the transcoders left out (errors), a token read, or a token it might say next. An edge is a direct effect, upwards.",
    "Point at a node to see what it is; click it for its inputs and outputs. Pin the ones that matter and group those that mean one thing.",
  ];
  const strongest = graph.order.filter(i => graph.kind[i] === FEATURE && state.shown.nodes[i]).sort((a, b) => whole.influence[b] - whole.influence[a]).slice(0, 14);
  const peak = Math.max(LEAST, ...strongest.map(i => whole.influence[i]));
  const rows = strongest.map(i => ({ node: i, weight: whole.influence[i] }));
  return [top, ...lines.map(text => make("p", "hint", text)), heading("Most influential features", "influence"), list(rows, peak, number)];
}
function nodeCard(i) {
  const node = graph.nodes[i], note = noteOf(i), top = make("div", "top"), button = make("button", "", isPinned(i) ? "Unpin" : "Pin");
  button.id = "pin"; button.title = "P";
  button.addEventListener("click", () => pin(i));
  top.append(make("h2", "", label(i)), button);
  const facts = [place(i)];
  if (node.activation !== null && node.activation !== undefined) facts.push("activation " + number(node.activation));
  if (graph.kind[i] < TOKEN) facts.push("influence " + percent(whole.influence[i] / influenceOfAll()));
  const parts = [top, make("p", "facts", facts.join("  \u00b7  "))];
  if (graph.kind[i] === FEATURE) {
    parts.push(wordList("promotes", note.promoted, "up"), wordList("suppresses", note.suppressed, "down"), textOf(i));
    if (note.dictionary) parts.push(make("p", "facts", note.dictionary));
  }
  if (!state.shown.nodes[i]) parts.push(make("p", "hint", "Pruned away at these thresholds."));
  return [...parts.filter(Boolean), ...sides([i], graph.kind[i])];
}
function groupCard(key) {
  const members = membersOf(key), g = Number(key.slice(6)), top = make("div", "top");
  top.append(make("h2", "", state.groups[g].name));
  return [top, make("p", "facts", count(members.length, "node") + ": weights are sums over them"), ...sides(members, FEATURE)];
}
function sides(members, kind) {
  const parts = [];
  for (const [side, title, none] of [["in", "Inputs", kind === TOKEN || kind === ERROR], ["out", "Outputs", kind === LOGIT]]) {
    if (none) continue;
    const rows = edgesOf(members, side);
    parts.push(heading(title, count(rows.length, "edge")));
    parts.push(rows.length ? list(rows, Math.abs(rows[0].weight), signed, side) : make("p", "hint", "None at these thresholds."));
  }
  return parts;
}
let sumOfAll = 0;
function influenceOfAll() {
  if (!sumOfAll) for (const value of whole.influence) sumOfAll += value;
  return sumOfAll;
}
function heading(text, right) {
  const made = make("h3");
  made.append(make("span", "", text), make("span", "", right));
  return made;
}
function wordList(title, pairs, way) {
  if (!pairs || !pairs.length) return null;
  const made = make("div", "words");
  made.append(make("em", "", title));
  for (const [token, logit] of pairs.slice(0, 8)) {
    const word = make("span", "word " + way, visible(token).replace(/^ +| +$/g, spaces => "\u2423".repeat(spaces.length)));
    word.title = signed(logit) + " logits a unit";
    made.append(word);
  }
  return made;
}
/** The prompt, tinted where this feature is in the graph. */
function textOf(i) {
  const made = make("p", "text"), values = new Map(), node = graph.nodes[i];
  graph.nodes.forEach((other, j) => {
    if (graph.kind[j] === FEATURE && other.layer === node.layer && featureIndex(j) === featureIndex(i)) values.set(other.ctx_idx, other.activation);
  });
  const peak = Math.max(LEAST, ...[...values.values()].map(Math.abs));
  graph.tokens.forEach((token, p) => {
    const span = make("span", p === node.ctx_idx ? "here" : "", visible(token));
    if (values.has(p)) {
      span.style.background = `color-mix(in srgb, var(--feature) ${Math.round(12 + 50 * Math.abs(values.get(p)) / peak)}%, transparent)`;
      span.title = number(values.get(p));
    }
    made.append(span);
  });
  return made;
}
function list(rows, peak, format, side) {
  const box = make("div"), made = make("ul", "list");
  box.append(made);
  const add = from => rows.slice(from, from + MOST_ROWS * (from ? 10 : 1)).forEach(row => made.append(entry(row, peak, format, side)));
  add(0);
  let many = MOST_ROWS;
  if (rows.length > many) {
    const more = make("button", "more", count(rows.length - many, "more"));
    more.addEventListener("click", () => {
      add(many);
      many += MOST_ROWS * 10;
      if (many >= rows.length) more.remove(); else more.textContent = count(rows.length - many, "more");
    });
    box.append(more);
  }
  return box;
}
function entry({ node, weight, share }, peak, format, side) {
  const item = make("li"), button = make("button");
  const meter = make("span", "meter"), bar = make("i", side ? (weight < 0 ? "down" : "up") : "level");
  bar.style.width = 100 * Math.abs(weight) / peak + "%";
  meter.append(bar);
  button.append(glyph(node), make("span", "name", label(node)), make("span", "where", whereabouts(node)), make("span", "value", format(weight)), meter);
  button.title = label(node) + ", " + place(node) + (share === undefined ? "" : "; " + percent(share) + (side === "in" ? " of the input" : " of its input"));
  for (const kind of ["mouseenter", "focus"]) button.addEventListener(kind, () => hover(node));
  for (const kind of ["mouseleave", "blur"]) button.addEventListener(kind, () => hover(null));
  button.addEventListener("click", () => { state.hovered = null; select(node); });
  item.append(button);
  return item;
}

function showPins() {
  const card = byId("pins"), head = make("div", "top");
  head.append(make("h2", "", "Pinned"));
  if (state.pinned.length) {
    const clear = make("button", "more", "Clear");
    clear.addEventListener("click", () => { state.pinned = []; state.groups = []; state.ticked.clear(); update(); });
    head.append(clear);
  }
  if (!state.pinned.length) {
    card.replaceChildren(head, make("p", "hint", "Nothing yet. P pins the chosen node, a double click any."));
    return;
  }
  const parts = [head];
  state.groups.forEach((each, g) => parts.push(...groupRows(each, g)));
  const loose = state.pinned.filter(i => groupIndexOf(i) === undefined);
  parts.push(...loose.map(pinRow));
  if (loose.length > 1 || state.ticked.size > 1) parts.push(grouping());
  card.replaceChildren(...parts);
}
function pinRow(i) {
  const row = make("div", "pin"), tick = make("input"), name = make("button", "name", label(i) + " "), drop = make("button", "drop", "\u00d7");
  tick.type = "checkbox"; tick.checked = state.ticked.has(i);
  tick.setAttribute("aria-label", "Tick " + label(i) + " for a group");
  tick.addEventListener("change", () => { if (tick.checked) state.ticked.add(i); else state.ticked.delete(i); });
  name.append(make("small", "", place(i)));
  name.addEventListener("click", () => select(i));
  drop.setAttribute("aria-label", "Unpin " + label(i));
  drop.addEventListener("click", () => pin(i));
  row.append(tick, glyph(i), name, drop);
  return row;
}
function groupRows(each, g) {
  const head = make("div", "group-head"), name = make("input"), drop = make("button", "more", "Ungroup"), members = make("div", "members");
  name.type = "text"; name.value = each.name; name.setAttribute("aria-label", "Name of the group");
  name.addEventListener("change", () => { each.name = name.value || each.name; update(); });
  drop.addEventListener("click", () => ungroup(g));
  head.append(groupGlyph(g), name, drop);
  members.style.borderColor = groupColour(g);
  members.append(...each.members.map(pinRow));
  return [head, members];
}
function grouping() {
  const form = make("form", "grouping"), name = make("input"), button = make("button", "", "Group");
  name.type = "text"; name.id = "group-name"; name.placeholder = "Group the ticked as\u2026"; name.setAttribute("aria-label", "Name of the new group");
  button.id = "group";
  form.append(name, button);
  form.addEventListener("submit", event => { event.preventDefault(); group(name.value.trim()); });
  return form;
}
