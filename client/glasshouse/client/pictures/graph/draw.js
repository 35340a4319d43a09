// Two canvases: edges beneath, kept as a picture while the view moves; bands, nodes and labels above.
const canvases = { edges: byId("edges"), nodes: byId("nodes") };
const view = { k: 1, x: 0, y: 0 };
let size = { width: 0, height: 0, ratio: 1 }, colours = {}, drawn = null, settle = 0, pending = false;

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["page", "panel", "band", "line", "ink", "soft", "faint", "positive", "negative", "feature", "weak", "error", "accent"])
    colours[name] = style.getPropertyValue("--" + name).trim();
}
const toScreen = (x, y) => [x * view.k + view.x, y * view.k + view.y];
const edgeColour = weight => weight < 0 ? colours.negative : colours.positive;

function resize() {
  const box = byId("stage").getBoundingClientRect();
  size = { width: box.width, height: box.height, ratio: window.devicePixelRatio || 1 };
  for (const canvas of Object.values(canvases)) {
    canvas.width = Math.round(box.width * size.ratio);
    canvas.height = Math.round(box.height * size.ratio);
  }
}
function fitView() {
  const { scene } = state, bottom = scene.circuit ? 8 : STRIP;
  view.k = Math.min((size.width - GUTTER - 8) / scene.width, (size.height - bottom - 6) / scene.height);
  view.x = GUTTER + (size.width - GUTTER - 8 - scene.width * view.k) / 2;
  view.y = 4 + (size.height - bottom - 8 - scene.height * view.k) / 2;
  redraw();
}
function zoomAt(factor, x, y) {
  const k = Math.min(14, Math.max(0.08, view.k * factor));
  view.x = x - (x - view.x) * k / view.k;
  view.y = y - (y - view.y) * k / view.k;
  view.k = k;
  redraw();
}
/** Moves the view until the item is inside it. */
function reveal(item) {
  const [x, y] = toScreen(item.x, item.y), floor = state.scene.circuit ? 0 : STRIP, edge = 10, side = Math.max(edge, (item.w || 0) * scaleOf(item) / 2 + 6);
  const dx = Math.max(GUTTER + side - x, 0) || Math.min(size.width - side - x, 0);
  const dy = Math.max(edge - y, 0) || Math.min(size.height - floor - edge - y, 0);
  if (dx || dy) { view.x += dx; view.y += dy; redraw(); }
}

/** Draws at the next frame. Few edges are drawn afresh; many are moved as a picture and drawn when the view rests. */
function redraw(fresh = false) {
  if (fresh) drawn = null;
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    if (!state.scene) return;
    if (!drawn || state.scene.lines.length < 600) drawEdges();
    else if (drawn.k !== view.k || drawn.x !== view.x || drawn.y !== view.y) {
      const k = view.k / drawn.k;
      canvases.edges.style.transform = `matrix(${k},0,0,${k},${view.x - drawn.x * k},${view.y - drawn.y * k})`;
      clearTimeout(settle);
      settle = setTimeout(drawEdges, 110);
    }
    drawNodes();
  });
}

function curve(path, a, b) {
  const y0 = a.y - (a.box ? a.h / 2 : 0), y1 = b.y + (b.box ? b.h / 2 : 0), bend = (y0 - y1) * 0.5;
  path.moveTo(a.x, y0);
  path.bezierCurveTo(a.x, y0 - bend, b.x, y1 + bend, b.x, y1);
}
/** The scene's edges as a few paths, one for each sign and strength. */
function pathsOf(scene) {
  if (scene.paths) return scene.paths;
  const most = Math.max(LEAST, ...scene.lines.slice(0, 60000).map(line => Math.abs(line.weight))), steps = 7, found = new Map();
  for (const line of scene.lines) {
    const share = Math.sqrt(Math.abs(line.weight) / most), step = Math.max(1, Math.ceil(share * steps)), key = line.weight < 0 ? -step : step;
    if (!found.has(key)) found.set(key, new Path2D());
    curve(found.get(key), scene.items[line.a], scene.items[line.b]);
  }
  scene.paths = [...found].sort((a, b) => Math.abs(a[0]) - Math.abs(b[0])).map(([key, path]) => ({ path, weight: key, share: Math.abs(key) / steps }));
  return scene.paths;
}
function drawEdges() {
  clearTimeout(settle);
  const { scene } = state, pen = canvases.edges.getContext("2d"), busy = Math.min(1, 700 / Math.max(1, scene.lines.length));
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, canvases.edges.width, canvases.edges.height);
  pen.setTransform(size.ratio, 0, 0, size.ratio, 0, 0);
  drawBands(pen, scene);
  pen.setTransform(size.ratio * view.k, 0, 0, size.ratio * view.k, size.ratio * view.x, size.ratio * view.y);
  const thick = scene.circuit ? 6 : 3.4;
  for (const { path, weight, share } of pathsOf(scene)) {
    pen.strokeStyle = edgeColour(weight);
    pen.globalAlpha = scene.circuit ? 0.3 + 0.55 * share : (0.03 + 0.6 * share ** 1.5) * (0.5 + 0.5 * busy);
    pen.lineWidth = (0.5 + thick * share) / view.k;
    pen.stroke(path);
  }
  pen.globalAlpha = 1;
  canvases.edges.style.transform = "";
  drawn = { ...view };
}
function drawBands(pen, scene) {
  scene.bands.forEach((band, r) => {
    const [, y0] = toScreen(0, band.y0), [, y1] = toScreen(0, band.y1);
    pen.fillStyle = r % 2 ? colours.band : colours.panel;
    pen.fillRect(0, y0, size.width, y1 - y0);
  });
  pen.strokeStyle = colours.line;
  pen.lineWidth = 1;
  pen.globalAlpha = 0.5;
  for (const column of scene.columns.slice(1)) {
    if ((column.x1 - column.x0) * view.k < 7) break;
    const [x] = toScreen(column.x0, 0);
    pen.beginPath(); pen.moveTo(x, 0); pen.lineTo(x, size.height); pen.stroke();
  }
  pen.globalAlpha = 1;
}

function drawNodes() {
  const { scene } = state, pen = canvases.nodes.getContext("2d");
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, canvases.nodes.width, canvases.nodes.height);
  pen.setTransform(size.ratio, 0, 0, size.ratio, 0, 0);
  const chosen = [...new Set([state.selected, state.hovered])].map(itemOfKey).filter(item => item !== null);
  const near = new Set(chosen), selected = itemOfKey(state.selected);
  for (const one of chosen) for (const line of linesOf(one)) {
    near.add(line.a); near.add(line.b);
    drawLine(pen, scene.items[line.a], scene.items[line.b], line, one === selected ? 0.9 : 0.75);
  }
  canvases.edges.style.opacity = chosen.length ? 0.16 : 1;
  scene.items.forEach((item, at) => drawItem(pen, item, !chosen.length || near.has(at) ? 1 : 0.28));
  for (const at of chosen) ring(pen, scene.items[at], at === selected ? 2.6 : 1.6, colours.accent, 3.5);
  drawFrame(pen, scene);
}
function drawLine(pen, a, b, line, alpha) {
  const path = new Path2D(), most = line.most || Math.abs(line.weight);
  const [ax, ay] = toScreen(a.x, a.y), [bx, by] = toScreen(b.x, b.y);
  curve(path, { x: ax, y: ay, box: a.box, h: a.h * view.k }, { x: bx, y: by, box: b.box, h: b.h * view.k });
  const share = Math.sqrt(Math.abs(line.weight) / most);
  pen.strokeStyle = edgeColour(line.weight);
  pen.globalAlpha = alpha * (0.12 + 0.88 * share);
  pen.lineWidth = 0.5 + (state.scene.circuit ? 6 : 4) * share;
  pen.stroke(path);
  pen.globalAlpha = 1;
}
/** Pills are as large as their text when the whole fits, and grow less than the graph does. */
const scaleOf = item => item.box ? view.k : Math.min(view.k, 1.5 * state.scene.fit);
function outline(pen, item, x, y, grow) {
  pen.beginPath();
  if (item.w) {
    const w = item.w * scaleOf(item) + 2 * grow, h = item.h * scaleOf(item) + 2 * grow;
    pen.roundRect(x - w / 2, y - h / 2, w, h, item.box && item.kind !== LOGIT ? 8 : h / 2);
    return;
  }
  const r = Math.max(2.2, item.r * Math.min(view.k, 3.2)) + grow;
  if (item.kind === FEATURE) pen.arc(x, y, r, 0, 2 * Math.PI);
  else if (item.kind === ERROR) { pen.moveTo(x, y - r * 1.15); pen.lineTo(x + r * 1.15, y); pen.lineTo(x, y + r * 1.15); pen.lineTo(x - r * 1.15, y); pen.closePath(); }
  else pen.roundRect(x - r, y - r, 2 * r, 2 * r, 2);
}
function drawItem(pen, item, alpha) {
  const [x, y] = toScreen(item.x, item.y);
  const half = (item.w || 2 * item.r) * view.k;
  if (x < GUTTER - half || x > size.width + half || y < -half || y > size.height + half) return;
  pen.globalAlpha = alpha;
  outline(pen, item, x, y, 0);
  const group = item.group ?? groupIndexOf(item.members[0]);
  if (item.box) drawBox(pen, item, x, y, group);
  else if (item.kind === LOGIT) drawPill(pen, item, x, y);
  else {
    pen.fillStyle = item.kind === FEATURE ? mix(colours.weak, colours.feature, item.strength) : item.kind === ERROR ? colours.panel : colours.soft;
    pen.fill();
    pen.lineWidth = item.kind === ERROR ? 1.3 : 1;
    pen.strokeStyle = item.kind === ERROR ? mix(colours.line, colours.error, 0.6 + 0.4 * item.strength) : item.kind === FEATURE ? colours.feature : colours.soft;
    pen.stroke();
  }
  if (!item.box && isPinned(item.members[0])) ring(pen, item, 1.6, group === undefined ? colours.ink : groupColour(group), 2.2);
  pen.globalAlpha = 1;
}
function drawPill(pen, item, x, y) {
  const most = Math.max(...graph.start);
  pen.fillStyle = mix(colours.panel, colours.accent, 0.12 + 0.88 * graph.start[item.members[0]] / most);
  pen.fill();
  pen.strokeStyle = colours.accent; pen.lineWidth = 1; pen.stroke();
  pen.fillStyle = graph.start[item.members[0]] > most * 0.45 ? colours.page : colours.ink;
  write(pen, item.text, x, y + 0.5, item.font * scaleOf(item), SANS);
}
function drawBox(pen, item, x, y, group) {
  const tint = item.group !== undefined ? groupColour(group) : [colours.feature, colours.error, colours.soft, colours.accent][item.kind];
  pen.fillStyle = colours.panel; pen.fill();
  pen.fillStyle = mix(colours.panel, tint, 0.14); pen.fill();
  pen.strokeStyle = tint; pen.lineWidth = item.group !== undefined ? 2 : 1.3; pen.stroke();
  if (item.group !== undefined) { outline(pen, item, x, y, 3); pen.lineWidth = 1; pen.stroke(); }
  pen.fillStyle = colours.ink;
  write(pen, item.text, x, y - 7 * view.k, 12 * view.k, SANS, 600);
  pen.fillStyle = colours.soft;
  write(pen, item.sub, x, y + 9 * view.k, 10 * view.k, SANS);
}
function write(pen, text, x, y, pixels, family, weight = 400) {
  if (pixels < 4) return;
  pen.font = weight + " " + pixels + "px " + family;
  pen.textAlign = "center"; pen.textBaseline = "middle";
  pen.fillText(text, x, y);
}
function ring(pen, item, width, colour, grow) {
  const [x, y] = toScreen(item.x, item.y);
  outline(pen, item, x, y, grow);
  pen.strokeStyle = colour; pen.lineWidth = width; pen.stroke();
}

/** Layer names at the left and tokens below stay in sight wherever the view is. */
function drawFrame(pen, scene) {
  pen.fillStyle = colours.panel;
  pen.fillRect(0, 0, GUTTER - 6, size.height);
  if (!scene.circuit) pen.fillRect(0, size.height - STRIP, size.width, STRIP);
  pen.strokeStyle = colours.line; pen.lineWidth = 1;
  pen.beginPath(); pen.moveTo(GUTTER - 6.5, 0); pen.lineTo(GUTTER - 6.5, size.height);
  if (!scene.circuit) { pen.moveTo(0, size.height - STRIP + 0.5); pen.lineTo(size.width, size.height - STRIP + 0.5); }
  pen.stroke();
  pen.fillStyle = colours.soft; pen.textAlign = "right"; pen.textBaseline = "middle"; pen.font = "11px " + SANS;
  for (const band of scene.bands) {
    const [, y] = toScreen(0, (band.y0 + band.y1) / 2);
    if (y < 8 || y > size.height - (scene.circuit ? 8 : STRIP + 6)) continue;
    pen.fillText(band.text, GUTTER - 14, y);
  }
  drawTokens(pen, scene);
}
function drawTokens(pen, scene) {
  const here = state.hovered ?? state.selected, at = typeof here === "number" && graph.kind[here] !== LOGIT ? graph.position[here] : -1;
  const middle = size.height - STRIP / 2, texts = scene.columns.map(column => shorten(column.text, 14));
  pen.font = "700 11px " + MONO;
  const letter = pen.measureText("m").width, upright = scene.columns.every((column, p) => texts[p].length * letter + 4 <= (column.x1 - column.x0) * view.k);
  let free = -Infinity;
  scene.columns.forEach((column, p) => {
    const [x0] = toScreen(column.x0, 0), [x1] = toScreen(column.x1, 0), x = (x0 + x1) / 2;
    if (x < GUTTER || x > size.width) return;
    pen.font = (p === at ? "700 " : "") + "11px " + MONO;
    pen.fillStyle = p === at ? colours.accent : colours.ink;
    if (upright) { pen.textAlign = "center"; pen.fillText(texts[p], x, middle); return; }
    if (p !== at && x - free < 11) return; // No room: every so many.
    free = x;
    pen.save(); pen.translate(x + 3, size.height - STRIP + 6); pen.rotate(-Math.PI / 3.4); pen.textAlign = "right";
    pen.fillText(shorten(column.text, 8), 0, 0); pen.restore();
  });
}
function mix(from, to, share) {
  const a = rgb(from), b = rgb(to), s = Math.min(1, Math.max(0, share || 0));
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * s)).join(",")})`;
}
const rgb = hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));
const groupColour = g => GROUP_COLOURS[g % GROUP_COLOURS.length];

function itemAt(x, y) {
  let best = null, least = 11;
  const { scene } = state;
  if (x < GUTTER - 6 || (!scene.circuit && y > size.height - STRIP)) return null;
  scene.items.forEach((item, at) => {
    const [ix, iy] = toScreen(item.x, item.y);
    const far = item.w ? Math.max(Math.abs(x - ix) - item.w * scaleOf(item) / 2, Math.abs(y - iy) - item.h * scaleOf(item) / 2, 0)
      : Math.max(0, Math.hypot(x - ix, y - iy) - item.r * Math.min(view.k, 3.2) * 0.5);
    if (far < least) { least = far; best = at; }
  });
  return best;
}
