"use strict";
// The page of one component, at #component-<number>.

apd.componentPage = (place, number) => {
  const { components, matrices, behaviour, leaves } = apd.data, element = apd.element, one = components[number];
  const serving = one.serves ? `It serves ${one.serves}.` : one.firing_rate === 0 ? "The sparse model never keeps it." : "";
  const paged = d3.range(components.length).filter((c) => components[c].page !== null);
  const at = paged.indexOf(number), step = (by, label) => element("a", { href: `#component-${paged[(at + by + paged.length) % paged.length]}` }, label);
  const facts = [
    ...("damage" in one ? [["damage when ablated", apd.number(one.damage)], ["firing rate", `${apd.number(100 * one.firing_rate)} %`]] : []),
    ["effective rank", String(one.rank)],
    ...leaves.slice(0, 6).map((leaf, i) => [`share of ${leaf}`, apd.number(one.norms[i])]),
  ];
  const panel = behaviour?.kind === "vector" && apd.panel ? element("button", { type: "button", class: "go", click: () => {
    apd.panel.set(behaviour.inputs[behaviour.examples[number][0]], components.map((_, c) => (c === number ? 0 : 1)));
    location.hash = "#try";
  } }, "Try the network without it →") : null;
  place.replaceChildren(...[
    element("p", { class: "pager" }, element("a", { href: "#components" }, "← All components"), step(-1, "previous"), step(1, "next")),
    element("header", {}, element("h1", {}, `Component ${number}`), element("p", { class: "lead" }, serving),
      element("ul", { class: "facts" }, ...facts.map(([name, value]) => element("li", {}, element("span", { class: "muted" }, `${name} `), element("b", {}, value)))),
      element("p", {}, panel)),
    behaviour ? element("div", { class: "pair" }, needs(number), changes(number)) : null,
    weights(number, one.page),
  ].filter(Boolean));
};

// What of an input can be shown: entries of a vector, an image, tokens.
apd.input = (values, kind, position) => {
  const element = apd.element;
  if (kind === "image") return apd.pixels(values, { signed: d3.min(values, (row) => d3.min(row)) < 0, width: 96, height: (96 * values.length) / values[0].length, label: "input" });
  if (kind === "tokens") {
    const words = apd.data.behaviour.words, word = (token) => (token in words ? element("span", { class: "word", title: `token ${token}` }, words[token]) : String(token));
    return element("span", {}, ...Array.from(values).flatMap((token, t) => [t === position ? element("mark", {}, word(token)) : word(token), " "]));
  }
  const active = Array.from(values, (value, i) => [i, value]).filter(([, value]) => value !== 0).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const chips = active.slice(0, 8).map(([i, value]) => element("span", { class: "chip" }, `${i}: ${apd.number(value)}`));
  return element("span", {}, ...chips, active.length > 8 ? `and ${active.length - 8} more` : active.length ? "" : "all zero");
};

const needs = (number) => {
  const { behaviour, input } = apd.data, element = apd.element, section = element("section", {}, element("h2", {}, "Inputs that need it most"));
  section.append(element("p", { class: "caption" }, `Those with the largest attribution among fresh inputs${behaviour.kind === "vector" ? `, by ${input} and value` : behaviour.positions ? "; the position where it is largest is marked" : ""}. ✓: kept there in the sparse model. Good: they have one thing in common.`));
  const cards = behaviour.examples[number].map((example, i) => element("li", {},
    behaviour.kind === "other" ? `input ${example}` : apd.input(behaviour.inputs[example], behaviour.kind, behaviour.positions?.[number][i]),
    element("div", { class: "muted" }, `attribution ${apd.number(behaviour.attributions[number][i])} ${behaviour.kept[number][i] ? "✓" : ""}`)));
  section.append(element("ul", { class: "inputs" }, ...cards));
  return section;
};

const changes = (number) => {
  const { behaviour, output } = apd.data, element = apd.element;
  const bars = behaviour.outputs[number].map((o, i) => ({ name: behaviour.names[o] ?? `${output} ${o}`, value: behaviour.change[number][i] }));
  return element("section", {}, element("h2", {}, "What it changes"),
    element("p", { class: "caption" }, "What it adds to each output on those inputs, on average: outputs of the sum less those of the sum without it. Good: few bars."),
    element("div", { class: "chart" }, apd.bars(bars, { xlabel: "change of the output", signed: true, width: Math.min(460, apd.width()) })));
};

const weights = (number, page) => {
  const { matrices } = apd.data, element = apd.element, section = element("section", {}, element("h2", {}, "Weights"));
  section.append(element("p", { class: "caption" }, "Its part of every decomposed matrix, on the target's colour scale; beside it the rows that it reads and the columns that it writes most strongly, by norm."));
  const largest = matrices.map((m) => d3.max(m.values[page], (row) => d3.max(row, Math.abs)) / apd.largest(m.target));
  matrices.forEach((m, k) => {
    if (largest[k] < 0.01) return;
    const limit = apd.largest(m.target), rows = Array.from(m.rows[page]), columns = Array.from(m.columns[page]);
    const strongest = (norms, names, word) => Array.from(norms, (value, i) => ({ name: `${word} ${names[i]}`, value })).sort((a, b) => b.value - a.value).slice(0, 6);
    section.append(
      element("h3", {}, `${m.name} `, element("span", { class: "muted small" }, `${m.shape.join(" × ")}${rows.length < m.shape[0] || columns.length < m.shape[1] ? `, the ${rows.length} × ${columns.length} of largest norm` : ""}`)),
      element("div", { class: "charts" },
        apd.heat(m.values[page], { rows, columns, title: "weights", xlabel: "column", ylabel: "row", limit, wide: Math.min(330, apd.width() - 60) }),
        apd.bars(strongest(m.row_norms[page], rows, "row"), { title: "reads", xlabel: "norm" }),
        apd.bars(strongest(m.column_norms[page], columns, "column"), { title: "writes", xlabel: "norm" })),
    );
  });
  const none = matrices.filter((_, k) => largest[k] < 0.01).map((m) => m.name);
  if (none.length) section.append(element("p", { class: "muted small" }, `Next to nothing (below 1 % of the target's largest weight) in: ${none.join(", ")}.`));
  return section;
};
