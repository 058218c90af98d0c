"use strict";
// Draws the page of two runs.

(() => {
  const { names, hrefs, losses, cosine, rows, columns, pairs } = apd.data, find = (id) => document.getElementById(id);
  const width = document.documentElement.clientWidth - 40;
  const component = (c, href) => (href ? apd.element("a", { href: `${href}#component-${c}` }, String(c)) : String(c));
  if (pairs.length) {
    apd.table(find("table"), [
      { name: "first", label: `component of ${names[0]}`, num: true, value: (d) => d.first, cell: (d) => component(d.first, hrefs[0]) },
      { name: "second", label: `of ${names[1]}`, num: true, value: (d) => d.second, cell: (d) => component(d.second, hrefs[1]) },
      { name: "cosine", label: "cosine", num: true, value: (d) => d.cosine, cell: (d) => d.cosine.toFixed(3) },
      { name: "ratio", label: "norm ratio", num: true, value: (d) => d.ratio, cell: (d) => apd.number(d.ratio) },
      { name: "firing", label: "firing rates", num: true, value: (d) => d.firing_rates[0] ?? -1, cell: (d) => d.firing_rates.map((rate) => (rate === null ? "–" : `${apd.number(100 * rate, 2)} %`)).join(", ") },
    ], pairs, { by: "cosine" });
    find("cosines").replaceChildren(apd.legend(1, "cosine"), apd.heat(cosine, { rows, columns, limit: 1, xlabel: `component of ${names[1]}`, ylabel: `of ${names[0]}`, unit: "cosine", wide: Math.min(420, width - 70), tall: 420 }));
  }
  if (losses.length) find("losses").replaceChildren(apd.losses(losses, { width: Math.max(320, Math.min(880, width)), dashed: "second" }));
})();
