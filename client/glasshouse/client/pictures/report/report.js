// Draws the parts of the data in their order; a part is a heat map, a text or bars.
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const visible = token => token.replace(/\n/g, "\u21b5\n").replace(/\t/g, "\u21e5");
const quoted = token => "\u201c" + token.replace(/\n/g, "\u21b5").replace(/^ +| +$/g, spaces => "\u2423".repeat(spaces.length)) + "\u201d";
const FIGURES = 320; // Cells up to which each says its number.

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
function number(value, figures = 3) {
  if (value === null) return "\u2013";
  const size = Math.abs(value), text = size !== 0 && (size < 1e-3 || size >= 1e5) ? size.toExponential(figures - 1) : String(Number(size.toPrecision(figures)));
  return (value < 0 ? "\u2212" : "+") + text;
}
/** As many decimals as give the scale three figures. */
function figure(value, scale) {
  const text = Math.abs(value).toFixed(Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(scale)))));
  return Number(text) ? (value < 0 ? "\u2212" : "+") + text : "0";
}
/** Colours an element as its value's share of the scale, and tells the value where it is pointed at. */
function tint(element, value, scale, telling) {
  const share = Math.min(1, Math.abs(value ?? 0) / scale);
  if (share > 0.004) element.style.background = `color-mix(in srgb, var(--${value < 0 ? "negative" : "positive"}) ${(100 * Math.sqrt(share) * share ** 0.25).toFixed(1)}%, var(--cell))`;
  element.classList.toggle("strong", share > 0.42);
  element.tabIndex = -1;
  element.addEventListener("mousemove", event => tell(telling, value, event.clientX, event.clientY));
  element.addEventListener("focus", () => { const box = element.getBoundingClientRect(); tell(telling, value, box.right, box.bottom); });
  for (const kind of ["mouseleave", "blur"]) element.addEventListener(kind, () => { byId("tip").hidden = true; });
}
const tell = (telling, value, x, y) => tip(number(value, 4), telling, x, y);
function tip(strong, text, x, y) {
  const box = byId("tip");
  box.replaceChildren(make("b", "", strong), "  " + text);
  box.hidden = false;
  box.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.offsetWidth - 8)) + "px";
  box.style.top = Math.min(y + 16, innerHeight - box.offsetHeight - 6) + "px";
}
function heat(part) {
  const table = make("table", "heat"), body = table.createTBody(), foot = table.createTFoot().insertRow();
  if (part.rows.length * part.columns.length <= FIGURES && part.columns.length <= 20) table.classList.add("figures");
  part.rows.forEach((name, r) => {
    const row = body.insertRow(), head = make("th", "", name);
    head.scope = "row";
    row.append(head);
    part.columns.forEach((column, c) => {
      const cell = row.insertCell(), value = part.values[r][c];
      if (value === null) { cell.className = "none"; return; }
      if (table.classList.contains("figures")) cell.textContent = figure(value, part.scale);
      tint(cell, value, part.scale, name + ", " + quoted(column));
    });
  });
  foot.append(make("th"));
  const turned = !table.classList.contains("figures") && part.columns.some(column => column.trim().length > 2) || part.columns.some(column => column.length > 8);
  for (const column of part.columns) {
    const head = make("th", turned ? "turned" : "");
    head.scope = "col";
    head.append(make("span", "", column.replace(/\n/g, "\u21b5").trim() || "\u2423"));
    foot.append(head);
  }
  walk(table, [...body.rows].map(row => [...row.cells].slice(1)));
  const wide = make("div", "wide");
  wide.append(table);
  return wide;
}
function text(part) {
  const made = make("p", "text"), spans = part.tokens.map((token, at) => {
    const span = make("span", "", visible(token));
    tint(span, part.values[at], part.scale, quoted(token) + " at " + at);
    return span;
  });
  made.append(...spans);
  walk(made, [spans]);
  return made;
}
function bars(part) {
  const made = make("div", "bars"), low = part.values.some(value => value < 0);
  part.labels.forEach((name, at) => {
    const value = part.values[at] ?? 0, share = Math.min(1, Math.abs(value) / part.scale), track = make("div", "track" + (low ? "" : " one")), bar = make("i");
    bar.style.background = `var(--${value < 0 ? "negative" : "positive"})`;
    bar.style.width = (low ? 50 : 100) * share + "%";
    bar.style[value < 0 ? "right" : "left"] = low ? "50%" : "0";
    track.append(bar);
    const label = make("div", "name", name);
    label.title = name;
    made.append(label, track, make("div", "value", number(part.values[at])));
  });
  return made;
}
function draw(tag, attributes, text) {
  const made = document.createElementNS(byId("svg").namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
function circuit(part) {
  const tall = 62, widest = Math.max(...part.levels.map((_, level) => part.nodes.filter(node => node[1] === level).length), 1);
  const width = Math.max(760, widest * 74 + 90), height = part.levels.length * tall, left = 84;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "circuit", role: "group", "aria-label": part.title });
  const spots = part.places.map(([x, y]) => [left + x * (width - left - 6), height - y * height]), lines = [], boxes = [];
  part.levels.forEach((name, level) => {
    const y = height - (level + 1) * tall;
    if (level % 2) svg.append(draw("rect", { x: 0, y, width, height: tall, class: "band" }));
    svg.append(draw("text", { x: left - 16, y: y + tall / 2 + 4, "text-anchor": "end", class: "level" }, name));
  });
  part.edges.forEach(([a, b], at) => {
    const [ax, ay] = spots[a], [bx, by] = spots[b], value = part.values[at] ?? 0, share = Math.sqrt(Math.min(1, Math.abs(value) / part.scale));
    const shift = { q: -13, k: 0, v: 13 }[part.ports[at]] ?? 0, y0 = ay - 13, y1 = by + 13, bend = (y0 - y1) / 2;
    // Between nodes of one column the line goes around those it passes.
    const around = Math.abs(ax - bx) < 8 && y0 - y1 > tall ? 40 + (y0 - y1) / 9 : 0;
    const line = draw("path", { d: `M${ax} ${y0}C${ax - around} ${y0 - bend} ${bx + shift - around} ${y1 + bend} ${bx + shift} ${y1}`, class: value < 0 ? "line negative" : "line positive" });
    line.style.strokeWidth = 0.6 + 3.4 * share;
    line.style.opacity = 0.2 + 0.7 * share;
    lines.push(line);
  });
  svg.append(...lines);
  part.nodes.forEach(([name, level], at) => {
    const [x, y] = spots[at], box = draw("g", { class: "box", tabindex: -1, "aria-label": name });
    box.append(draw("rect", { x: x - 31, y: y - 13, width: 62, height: 26, rx: 7 }), draw("text", { x, y: y + 4, "text-anchor": "middle" }, name));
    const touching = part.edges.map((edge, e) => edge.includes(at) ? e : -1).filter(e => e >= 0);
    const show = (px, py) => {
      svg.classList.add("chosen");
      lines.forEach((line, e) => line.classList.toggle("here", touching.includes(e)));
      boxes.forEach((other, k) => other.classList.toggle("here", k === at || touching.some(e => part.edges[e].includes(k))));
      const inward = touching.filter(e => part.edges[e][1] === at), told = inward.sort((a, b) => Math.abs(part.values[b]) - Math.abs(part.values[a])).slice(0, 6)
        .map(e => part.nodes[part.edges[e][0]][0] + (part.ports[e] ? " (" + part.ports[e] + ")" : ""));
      tip(name, inward.length + " in, " + (touching.length - inward.length) + " out" + (told.length ? ": from " + told.join(", ") + (inward.length > 6 ? "\u2026" : "") : ""), px, py);
    };
    box.addEventListener("mousemove", event => show(event.clientX, event.clientY));
    box.addEventListener("focus", () => { const found = box.getBoundingClientRect(); show(found.right, found.bottom); });
    for (const kind of ["mouseleave", "blur"]) box.addEventListener(kind, () => { svg.classList.remove("chosen"); byId("tip").hidden = true; });
    boxes.push(box);
  });
  svg.append(...boxes);
  walk(svg, part.levels.map((_, level) => boxes.filter((_, k) => part.nodes[k][1] === level)).reverse().filter(row => row.length));
  const wide = make("div", "wide");
  wide.append(svg);
  return wide;
}
/** One stop for the Tab key; arrows go from cell to cell. */
function walk(holder, rows) {
  const first = rows.flat()[0];
  if (first) first.tabIndex = 0;
  holder.addEventListener("keydown", event => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const r = rows.findIndex(row => row.includes(document.activeElement));
    if (!step || r < 0) return;
    const next = (rows[r + step[0]] || [])[rows[r].indexOf(document.activeElement) + step[1]];
    event.preventDefault();
    if (next) next.focus();
  });
}
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "\u2600" : "\u263e";
}
const toggle = () => { chosen = true; setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); };

let chosen = false;
const dark = matchMedia("(prefers-color-scheme: dark)");
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", event => { if (!chosen) setTheme(event.matches ? "dark" : "light"); });
byId("theme").addEventListener("click", toggle);
document.addEventListener("keydown", event => { if (event.key.toLowerCase() === "t" && !event.ctrlKey && !event.metaKey && !event.altKey) toggle(); });
document.title = data.title;
byId("title").textContent = data.title;
byId("about").textContent = data.about;
for (const [name, value] of data.facts) {
  const fact = make("div");
  fact.append(make("dt", "", name), make("dd", "", value));
  byId("facts").append(fact);
}
for (const part of data.parts) {
  const section = make("section", "part"), top = make("div", "top");
  top.append(make("h2", "", part.title));
  if (part.kind === "heat" || part.kind === "text") {
    const scale = make("span", "scale");
    scale.append(make("span", "", number(-part.scale)), make("i"), make("span", "", number(part.scale) + (part.unit ? " " + part.unit : "")));
    top.append(scale);
  } else if (part.unit) top.append(make("span", "scale", part.unit));
  section.append(top, { heat, text, bars, circuit }[part.kind](part));
  byId("parts").append(section);
}
