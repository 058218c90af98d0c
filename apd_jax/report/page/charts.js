"use strict";
// What every page shares: the data, small helpers, and the house's charts (Observable Plot). Colours: Okabe and Ito's.
const apd = {};

// Arrays come as {shape, f32: base64}; they become nested arrays whose innermost are Float32Array.
apd.decode = (value) => {
  if (Array.isArray(value)) return value.map(apd.decode);
  if (value === null || typeof value !== "object") return value;
  if (!("f32" in value)) return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, apd.decode(item)]));
  const bytes = Uint8Array.from(atob(value.f32), (letter) => letter.charCodeAt(0));
  const flat = new Float32Array(bytes.buffer);
  const nest = (start, shape) => {
    const size = shape.slice(1).reduce((a, b) => a * b, 1);
    if (shape.length < 2) return flat.subarray(start, start + (shape[0] ?? 1));
    return Array.from({ length: shape[0] }, (_, i) => nest(start + i * size, shape.slice(1)));
  };
  return nest(0, value.shape);
};
apd.data = apd.decode(JSON.parse(document.getElementById("data").textContent));

apd.colors = { black: "#000000", blue: "#0072B2", vermilion: "#D55E00", green: "#009E73", orange: "#E69F00", purple: "#CC79A7", sky: "#56B4E9" };
apd.palette = ["black", "blue", "vermilion", "green", "orange", "purple"].map((name) => apd.colors[name]);

// An element: attributes (functions are listeners), then children. Strings become text, never markup.
apd.element = (name, attributes = {}, ...children) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
};

apd.number = (value, digits = 3) => {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(digits))) : value.toExponential(digits - 2);
};

apd.largest = (matrix) => d3.max(matrix, (row) => d3.max(row, Math.abs)) || 1;

const thinned = (labels, most) => labels.filter((_, i) => i % Math.ceil(labels.length / most) === 0);

// A matrix (rows of numbers) as a heat map; around 0 if signed, else from 0 up. Cells are never blended.
apd.heat = (matrix, { rows, columns, title, xlabel, ylabel, unit = "weight", signed = true, limit = apd.largest(matrix), wide = 330, tall = 300, link }) => {
  rows ??= d3.range(matrix.length);
  columns ??= d3.range(matrix[0].length);
  const across = Math.max(3, Math.min(26, wide / columns.length)), down = Math.max(3, Math.min(26, tall / rows.length));
  const left = 14 + 7.5 * d3.max(rows, (label) => String(label).length);
  const cells = rows.flatMap((row, i) => columns.map((column, j) => ({ row, column, value: matrix[i][j] })));
  return Plot.plot({
    title, ariaLabel: title ?? `${ylabel} by ${xlabel}`,
    width: Math.max(left + 24 + across * columns.length, 132), height: 64 + down * rows.length,
    marginLeft: left + 8, marginTop: 22, marginBottom: 38, marginRight: 12, style: { fontSize: "11px" },
    x: { label: xlabel, labelAnchor: "left", labelArrow: "none", labelOffset: 32, ticks: thinned(columns, Math.max(1, (across * columns.length) / 26)), padding: 0, domain: columns, tickSize: 2 },
    y: { label: ylabel, labelArrow: "none", ticks: thinned(rows, Math.max(1, (down * rows.length) / 13)), padding: 0, domain: rows, tickSize: 2 },
    color: signed ? { type: "diverging", scheme: "RdBu", reverse: true, domain: [-limit, limit], label: unit } : { type: "linear", scheme: "cividis", domain: [0, limit], label: unit },
    marks: [
      Plot.axisY({ label: ylabel, labelAnchor: "top", labelArrow: "none", labelOffset: left, ticks: thinned(rows, Math.max(1, (down * rows.length) / 13)), tickSize: 2 }),
      Plot.cell(cells, { x: "column", y: "row", fill: "value", inset: Math.min(across, down) > 9 ? 0.4 : 0, stroke: signed && Math.min(across, down) > 9 ? "#efebe2" : null, href: link && ((d) => link(d)), ariaLabel: null }),
      Plot.tip(cells, Plot.pointer({ x: "column", y: "row", title: (d) => `${ylabel} ${d.row}, ${xlabel} ${d.column}\n${apd.number(d.value)}`, maxRadius: Math.max(across, down) })),
      Plot.frame({ stroke: "#d8d1c2" }),
    ],
  });
};

apd.legend = (limit, unit, signed = true) =>
  Plot.legend({ color: signed ? { type: "diverging", scheme: "RdBu", reverse: true, domain: [-limit, limit] } : { type: "linear", scheme: "cividis", domain: [0, limit] }, label: unit, width: 186, marginLeft: 10, marginRight: 14, ticks: 3, tickFormat: (v) => apd.number(v, 2) });

// A matrix on a canvas, a pixel per entry: for thumbnails and images.
apd.pixels = (matrix, { limit = apd.largest(matrix), signed = true, width = 44, height = 28, label }) => {
  const canvas = apd.element("canvas", { width: matrix[0].length, height: matrix.length, style: `width:${width}px;height:${height}px`, role: "img", "aria-label": label });
  const context = canvas.getContext("2d"), image = context.createImageData(matrix[0].length, matrix.length);
  const color = signed ? (v) => d3.interpolateRdBu(0.5 - v / limit / 2) : (v) => d3.interpolateCividis(v / limit);
  matrix.forEach((row, i) => row.forEach((value, j) => {
    const { r, g, b } = d3.rgb(color(Math.max(-limit, Math.min(limit, value))));
    image.data.set([r, g, b, 255], 4 * (i * row.length + j));
  }));
  context.putImageData(image, 0, 0);
  return canvas;
};

// The largest of some numbers, by name, as bars.
apd.bars = (bars, { title, xlabel, signed = false, width = 270 }) =>
  Plot.plot({
    title, ariaLabel: title, width, style: { fontSize: "11px" }, height: 56 + 19 * bars.length, marginLeft: 14 + 7.5 * d3.max(bars, (d) => d.name.length), marginTop: 4, marginRight: 16,
    x: { label: xlabel, labelArrow: "none", ticks: 3, tickFormat: (v) => apd.number(v, 2), ...(signed ? {} : { domain: [0, d3.max(bars, (d) => d.value) || 1] }) },
    y: { label: null, domain: bars.map((d) => d.name), tickSize: 0 },
    marks: [
      Plot.barX(bars, { x: "value", y: "name", fill: (d) => (d.value < 0 ? apd.colors.vermilion : apd.colors.blue), insetTop: 2, insetBottom: 2, title: (d) => apd.number(d.value) }),
      Plot.ruleX([0], { stroke: "#8d867a" }),
    ],
  });

// Losses (positive) over steps. `runs` draws the second run dashed.
apd.losses = (points, { width = 760, dashed = null } = {}) => {
  const names = [...new Set(points.map((d) => d.name))];
  const last = d3.groups(points, (d) => d.name + (d.run ?? "")).map(([, group]) => group.at(-1));
  const lines = (some, dash) => Plot.line(some, { x: "step", y: "value", stroke: "name", strokeWidth: (d) => 1.6, strokeDasharray: dash, z: (d) => d.name });
  const solid = points.filter((d) => dashed === null || d.run !== dashed), broken = points.filter((d) => dashed !== null && d.run === dashed);
  return Plot.plot({
    ariaLabel: "Losses over steps", width, height: 340, style: { fontSize: "11px" }, marginLeft: 62, marginRight: 16,
    x: { label: "step", labelArrow: "none", tickFormat: "~s", grid: false, ticks: Math.min(8, width / 90) }, y: { type: "log", label: "loss", labelArrow: "none", grid: true, tickFormat: (v) => (Number.isInteger(Math.log10(v)) || Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-9 ? v.toExponential(0) : "") },
    color: { domain: names, range: apd.palette, legend: true },
    marks: [lines(solid), lines(broken, "4,3"), Plot.tip(points, Plot.pointer({ x: "step", y: "value", title: (d) => `${d.name}${d.run ? ` (${d.run})` : ""}\nstep ${d.step}: ${apd.number(d.value)}` }))],
  });
};

// A sortable table. columns: {name, label, value: row -> what to sort by, cell: row -> node or text, num}.
apd.table = (table, columns, rows, { by, rowClass = () => "" }) => {
  const state = { by, descending: true };
  const head = apd.element("thead", {}, apd.element("tr", {}, ...columns.map((column) =>
    apd.element("th", { scope: "col", "data-column": column.name, class: column.num ? "num" : "", title: column.says }, column.value
      ? apd.element("button", { type: "button", click: () => { state.descending = state.by === column.name ? !state.descending : Boolean(column.num); state.by = column.name; fill(); } }, column.label)
      : column.label))));
  const body = apd.element("tbody");
  const nodes = new Map(rows.map((row) => [row, apd.element("tr", { class: rowClass(row) }, ...columns.map((column) => apd.element("td", { class: column.num ? "num" : "", "data-value": column.value?.(row) }, column.cell(row))))]));
  const fill = () => {
    const column = columns.find((one) => one.name === state.by);
    const order = [...rows].sort((a, b) => (state.descending ? -1 : 1) * d3.ascending(column.value(a), column.value(b)));
    body.replaceChildren(...order.map((row) => nodes.get(row)));
    for (const th of head.querySelectorAll("th")) {
      if (th.dataset.column === state.by) th.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    }
  };
  fill();
  table.replaceChildren(head, body);
};
