"use strict";
// Draws the overview, and switches between it and the components' pages by the address's hash.

apd.width = () => document.documentElement.clientWidth - 40;

(() => {
  const { components, leaves, matrices, map, losses, panel } = apd.data, element = apd.element;
  const find = (id) => document.getElementById(id);

  // The table.
  const limits = matrices.map((m) => apd.largest(m.target));
  const thumbnail = (row) => {
    if (row.page === null) return "";
    const k = d3.maxIndex(matrices, (m, i) => apd.largest(m.values[row.page]) / limits[i]);
    return apd.pixels(matrices[k].values[row.page], { limit: limits[k], label: `weights of component ${row.number} in ${matrices[k].name}` });
  };
  const shares = (row) => {
    const k = d3.maxIndex(row.norms);
    return element("span", { class: "shares" }, apd.pixels([row.norms], { limit: largestShare, signed: false, width: Math.min(160, 10 * leaves.length), height: 12, label: leaves.map((leaf, i) => `${leaf} ${apd.number(row.norms[i], 2)}`).join(", ") }), element("span", { class: "small", title: leaves[k] }, ` ${apd.number(row.norms[k], 2)} ${leaves[k].split(".").slice(-3).join(".")}`));
  };
  const largestShare = d3.max(components, (one) => d3.max(one.norms)) || 1;
  const rows = components.map((one, number) => ({ ...one, number }));
  const most = d3.max(rows, (row) => row.damage) || 1;
  const measured = "damage" in rows[0];
  apd.table(find("table"), [
    { name: "component", label: "component", value: (d) => d.number, cell: (d) => (d.page === null ? String(d.number) : element("a", { href: `#component-${d.number}` }, `component ${d.number}`)) },
    { name: "weights", label: "", cell: thumbnail },
    { name: "serves", label: "serves", value: (d) => d.serves || "~", cell: (d) => d.serves || (d.firing_rate === 0 ? "never kept" : "–") },
    ...(measured ? [
      { name: "damage", label: "damage", num: true, value: (d) => d.damage, cell: (d) => element("span", {}, element("span", { class: "level", style: `width:${(64 * d.damage) / most}px` }), apd.number(d.damage)) },
      { name: "firing", label: "firing rate", num: true, value: (d) => d.firing_rate, cell: (d) => `${apd.number(100 * d.firing_rate, 2)} %` },
    ] : []),
    { name: "rank", label: "rank", num: true, says: "effective rank, over all leaves", value: (d) => d.rank, cell: (d) => (leaves.length > 1 && leaves.length < 5 ? `${d.rank} (${d.ranks.join(" + ")})` : String(d.rank)) },
    ...(leaves.length > 6 ? [{ name: "norm-0", label: `shares of ${leaves.length} weights`, says: "one cell for every weight, in order; the largest share", value: (d) => d3.max(d.norms), cell: shares }] : []),
    ...(leaves.length > 6 ? [] : leaves).map((leaf, i) => ({ name: `norm-${i}`, label: `share of ${leaf}`, num: true, value: (d) => d.norms[i], cell: (d) => apd.number(d.norms[i], 2) })),
  ], rows, { by: measured ? "damage" : "norm-0", rowClass: (d) => (d.serves || !measured ? "" : "dead") });

  const drawOverview = () => {
    if (map) {
      const limit = apd.largest(map.values), options = { rows: map.rows, columns: map.columns, signed: false, limit, wide: Math.min(960, apd.width() - 70), tall: 420 };
      find("map-chart").replaceChildren(
        apd.legend(limit, "attribution (units of the output)", false),
        apd.heat(map.values, { ...options, xlabel: "component", ylabel: map.label.startsWith("feature") ? "feature" : "input", unit: "attribution", link: (d) => (components[d.column].page === null ? null : `#component-${d.column}`) }));
    }
    const shown = matrices.slice(0, 12);
    find("sum-charts").replaceChildren(...shown.flatMap((m, k) => {
      const options = { rows: m.target_rows, columns: m.target_columns, xlabel: "column", ylabel: "row", limit: limits[k], wide: Math.min(225, apd.width() - 60) };
      const difference = m.target.map((row, i) => row.map((value, j) => m.total[i][j] - value));
      return [
        element("h3", {}, `${m.name} `, element("span", { class: "muted small" }, m.shape.join(" × "))),
        element("div", { class: "charts" }, apd.heat(m.target, { ...options, title: "target" }), apd.heat(m.total, { ...options, title: "sum of components" }), apd.heat(difference, { ...options, title: "sum − target" }), apd.legend(limits[k], "weight")),
      ];
    }), matrices.length > shown.length ? element("p", { class: "muted small" }, `The first ${shown.length} of ${matrices.length} matrices; the components' pages have all.`) : "");
    if (losses.length) find("loss-chart").replaceChildren(apd.losses(losses, { width: Math.max(320, Math.min(880, apd.width())) }));
  };

  if (panel) apd.panel = apd.livePanel(find("panel"), panel);
  drawOverview();

  const route = () => {
    const number = Number(/^#component-(\d+)$/.exec(location.hash)?.[1] ?? NaN);
    const opened = Number.isInteger(number) && components[number]?.page != null;
    find("overview-page").hidden = opened;
    find("component-page").hidden = !opened;
    if (!opened) apd.panel?.update(); // its chart takes the width that it has once it is shown
    if (opened) {
      apd.componentPage(find("component-page"), number);
      scrollTo(0, 0);
    } else if (location.hash.length > 1) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
  };
  addEventListener("hashchange", route);
  route();
})();
