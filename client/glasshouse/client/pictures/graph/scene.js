// Where everything is drawn. A scene has items (one node, or one box of several), the edges behind them, layer bands
// and token columns, in units that are pixels when the whole fits.
const SPACING = 15, GUTTER = 58, STRIP = 50, MOST_LINES = 2500;
const GROUP_COLOURS = ["#d1495b", "#7b5ea7", "#2e86ab", "#b8860b", "#3a7d44", "#c2578f", "#5d737e", "#e07a2f"];

const measure = (() => {
  const pen = document.createElement("canvas").getContext("2d");
  return (text, font) => { pen.font = font; return pen.measureText(text).width; };
})();
const MONO = 'ui-monospace, "DejaVu Sans Mono", Menlo, monospace', SANS = 'system-ui, "DejaVu Sans", sans-serif';

/** Every node that is shown: layers upwards, positions to the right, a cluster in each cell, the strongest first. */
function graphScene(shown, width, height) {
  const { n, kind, rank, position } = graph, nRanks = graph.layers.length, nPositions = graph.tokens.length;
  const room = { width: Math.max(240, width - GUTTER - 14), height: Math.max(180, height - STRIP - 14) };
  const cells = new Map(), logits = [];
  const strength = i => whole.influence[i] || 0;
  for (let i = 0; i < n; i++) {
    if (!shown.nodes[i]) continue;
    if (kind[i] === LOGIT) { logits.push(i); continue; }
    const key = rank[i] * nPositions + position[i];
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(i);
  }
  for (const cell of cells.values()) cell.sort((a, b) => kind[a] - kind[b] || strength(b) - strength(a));
  const textWidths = graph.tokens.map(token => Math.min(76, measure(plain(token), "11px " + MONO) + 12));
  const least = nPositions > 24 || textWidths.reduce((a, b) => a + b, 0) > room.width ? textWidths.map(() => 18) : textWidths;

  let best = null;
  for (let deepest = 1; deepest <= 12; deepest++) {
    const across = new Array(nPositions).fill(1), down = new Array(nRanks).fill(1);
    for (const [key, cell] of cells) across[key % nPositions] = Math.max(across[key % nPositions], Math.ceil(cell.length / deepest));
    for (const [key, cell] of cells) {
      const r = Math.floor(key / nPositions);
      down[r] = Math.max(down[r], Math.ceil(cell.length / across[key % nPositions]));
    }
    const columns = across.map((many, p) => Math.max(least[p], many * SPACING + 10)), rows = down.map(many => many * SPACING + 20);
    const needs = [columns.reduce((a, b) => a + b, 0), rows.reduce((a, b) => a + b, 0)];
    const fit = Math.min(1, room.width / needs[0], room.height / needs[1]);
    if (!best || fit > best.fit + 1e-9) best = { fit, across, columns, rows, needs };
  }
  // What is left of the room is shared out, so that a small graph fills the page.
  const size = { width: Math.max(best.needs[0], room.width / best.fit), height: Math.max(best.needs[1], room.height / best.fit) };
  const stretch = size.width / best.needs[0], lift = (size.height - best.needs[1]) / nRanks;
  const columns = [], bands = [];
  let x = 0, y = size.height;
  best.columns.forEach((wide, p) => { columns.push({ x0: x, x1: x + wide * stretch, text: plain(tokenAt(p)) }); x += wide * stretch; });
  best.rows.forEach((tall, r) => { bands.push({ y1: y, y0: y - tall - lift, text: graph.layers[r] }); y -= tall + lift; });

  const items = [], itemOf = new Int32Array(n).fill(-1), radius = 4.6;
  const strongest = Math.max(LEAST, ...items_strength());
  function items_strength() { return [...cells.values()].flat().filter(i => kind[i] < TOKEN).map(strength); }
  const add = item => { for (const i of item.members) itemOf[i] = items.length; items.push(item); };
  for (const [key, cell] of cells) {
    const p = key % nPositions, r = Math.floor(key / nPositions), column = columns[p], band = bands[r];
    const perRow = best.across[p], nRows = Math.ceil(cell.length / perRow);
    cell.forEach((i, place) => {
      const row = Math.floor(place / perRow), inRow = Math.min(perRow, cell.length - row * perRow);
      add({
        members: [i], kind: kind[i], rank: r, r: radius,
        x: (column.x0 + column.x1) / 2 + (place - row * perRow - (inRow - 1) / 2) * SPACING,
        y: (band.y0 + band.y1) / 2 + (row - (nRows - 1) / 2) * SPACING,
        strength: Math.sqrt(strength(i) / strongest),
      });
    });
  }
  // Logits are pills with their token, in one row that ends at the last column.
  const font = 11 / best.fit, gap = 6 / best.fit, top = bands[nRanks - 1];
  logits.sort((a, b) => graph.start[b] - graph.start[a]);
  const pills = logits.map(i => {
    const text = label(i).replace(/^\u201c\u2423?|\u201d$/g, "") + "  " + percent(graph.start[i]);
    return { i, text, w: measure(text, "11px " + SANS) / best.fit + 14 / best.fit };
  });
  let right = size.width - 2, line = 0;
  const lines = [[]];
  for (const pill of pills) {
    const used = lines[line].reduce((sum, each) => sum + each.w + gap, 0);
    if (used + pill.w > size.width && lines[line].length) { lines.push([]); line++; }
    lines[line].push(pill);
  }
  const tall = 19 / best.fit;
  lines.forEach((row, place) => {
    const taken = row.reduce((sum, each) => sum + each.w + gap, -gap);
    let left = Math.max(2, right - taken);
    const middle = (top.y0 + top.y1) / 2 + (place - (lines.length - 1) / 2) * (tall + gap / 2);
    for (const pill of row) {
      add({ members: [pill.i], kind: LOGIT, rank: nRanks - 1, x: left + pill.w / 2, y: middle, w: pill.w, h: tall, text: pill.text, font });
      left += pill.w + gap;
    }
  });
  return { items, itemOf, bands, columns, ...size, lines: strongestLines(shown, itemOf), fit: best.fit };
}

/** The edges drawn behind: the strongest by score. All of a node's own are drawn when it is chosen. */
function strongestLines(shown, itemOf) {
  const kept = [];
  for (let e = 0; e < graph.m; e++) if (shown.edges[e] && signAllows(graph.weights[e])) kept.push(e);
  kept.sort((a, b) => shown.scores[b] - shown.scores[a]);
  return kept.slice(0, MOST_LINES).map(e => ({ a: itemOf[graph.sources[e]], b: itemOf[graph.targets[e]], weight: graph.weights[e] })).filter(line => line.a >= 0 && line.b >= 0);
}
const signAllows = weight => state.signs === "both" || (weight > 0) === (state.signs === "positive");

/** Pinned nodes as named boxes; a group is one box, and an edge between boxes is the sum of those between members. */
function circuitScene(width, height) {
  const room = { width: Math.max(300, width - GUTTER - 24), height: Math.max(180, height - 24) };
  const loose = state.pinned.filter(i => !groupOf(i));
  const boxes = [
    ...state.groups.map((group, g) => ({ members: group.members, group: g, text: group.name, sub: count(group.members.length, "node") })),
    ...loose.map(i => ({ members: [i], text: label(i), sub: graph.kind[i] === LOGIT ? "p " + percent(graph.start[i]) : graph.kind[i] === TOKEN ? "token " + graph.position[i] : place(i).replace(" at ", " \u00b7 ") })),
  ];
  const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
  for (const box of boxes) {
    box.kind = box.members.length === 1 ? graph.kind[box.members[0]] : FEATURE;
    box.rank = Math.round(mean(box.members.map(i => graph.rank[i])));
    box.column = mean(box.members.map(i => graph.position[i]));
    box.text = shorten(box.text, 22); box.sub = shorten(box.sub, 30);
    box.w = Math.max(64, measure(box.text, "600 12px " + SANS) + 24, measure(box.sub, "10px " + SANS) + 24);
    box.h = 40;
  }
  const ranks = [...new Set(boxes.map(box => box.rank))].sort((a, b) => a - b);
  const rows = ranks.flatMap(rank => {
    const row = boxes.filter(box => box.rank === rank).sort((a, b) => a.column - b.column), split = [[]];
    let used = 0;
    for (const box of row) {
      if (used + box.w + 16 > Math.max(room.width * 1.3, 900) && split.at(-1).length) { split.push([]); used = 0; }
      split.at(-1).push(box); used += box.w + 16;
    }
    return split.map(each => ({ rank, row: each }));
  });
  const needs = [Math.max(room.width, ...rows.map(({ row }) => row.reduce((sum, box) => sum + box.w + 16, 16))), Math.max(room.height, rows.length * 84)];
  const bands = [], tall = needs[1] / Math.max(1, rows.length), items = [], itemOf = new Int32Array(graph.n).fill(-1);
  rows.forEach(({ rank, row }, r) => {
    const y1 = needs[1] - r * tall;
    bands.push({ y1, y0: y1 - tall, text: graph.layers[rank] });
    // Each at its tokens' share of the width, then pushed apart.
    const last = Math.max(1, graph.tokens.length - 1);
    row.forEach(box => { box.x = 8 + box.w / 2 + (box.column / last) * (needs[0] - box.w - 16); box.y = y1 - tall / 2; });
    for (let k = 1; k < row.length; k++) row[k].x = Math.max(row[k].x, row[k - 1].x + (row[k - 1].w + row[k].w) / 2 + 16);
    let limit = needs[0] - 8;
    for (let k = row.length - 1; k >= 0; k--) { row[k].x = Math.min(row[k].x, limit - row[k].w / 2); limit = row[k].x - row[k].w / 2 - 16; }
    for (const box of row) { for (const i of box.members) itemOf[i] = items.length; items.push({ ...box, box: true, font: 12 }); }
  });
  const sums = new Map();
  for (let e = 0; e < graph.m; e++) {
    const a = itemOf[graph.sources[e]], b = itemOf[graph.targets[e]];
    if (a < 0 || b < 0 || a === b) continue;
    const key = a * items.length + b;
    sums.set(key, (sums.get(key) || 0) + graph.weights[e]);
  }
  const all = [...sums].map(([key, weight]) => ({ a: Math.floor(key / items.length), b: key % items.length, weight })).filter(line => signAllows(line.weight));
  const most = Math.max(LEAST, ...all.map(line => Math.abs(line.weight)));
  const fit = Math.min(1, room.width / needs[0], room.height / needs[1]);
  return { items, itemOf, bands, columns: [], width: needs[0], height: needs[1], lines: all.filter(line => Math.abs(line.weight) > most / 200), fit, circuit: true };
}
const shorten = (text, most) => text.length > most ? text.slice(0, most - 1) + "\u2026" : text;
