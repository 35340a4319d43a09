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
function tell(telling, value, x, y) {
  const tip = byId("tip");
  tip.replaceChildren(make("b", "", number(value, 4)), "  " + telling);
  tip.hidden = false;
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.min(y + 16, innerHeight - tip.offsetHeight - 6) + "px";
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
  if (part.kind !== "bars") {
    const scale = make("span", "scale");
    scale.append(make("span", "", number(-part.scale)), make("i"), make("span", "", number(part.scale) + (part.unit ? " " + part.unit : "")));
    top.append(scale);
  } else if (part.unit) top.append(make("span", "scale", part.unit));
  section.append(top, { heat, text, bars }[part.kind](part));
  byId("parts").append(section);
}
