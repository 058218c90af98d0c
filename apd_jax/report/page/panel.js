"use strict";
// The live panel: inputs and components by sliders; target, sparse and edited outputs.

apd.MOST_SHOWN = 16; // of inputs, components and outputs, where there are more: those that matter for this input

apd.livePanel = (place, data) => {
  const network = apd.network(data), element = apd.element;
  const state = { x: Array.from(data.start), scales: new Array(network.num_components).fill(1), shown: new Set() };
  const inputs = element("div"), components = element("div"), chart = element("div", { class: "chart" }), errors = element("p", { class: "small", "aria-live": "polite" }), numbers = element("div", { class: "scroll tall" });

  const slider = (kind, i, value, [low, high], label, mark, set) => {
    const output = element("output", {}, value.toFixed(2));
    const input = element("input", { type: "range", min: low, max: high, step: 0.01, value, "aria-label": label, [`data-${kind}`]: i, input: (event) => { set(Number(event.target.value)); output.textContent = Number(event.target.value).toFixed(2); update(false); } });
    return element("label", { class: "slider" }, String(i), input, output, mark);
  };

  // What is shown of many: the `count` of largest score.
  const chosen = (scores, count = apd.MOST_SHOWN) => scores.length <= count ? d3.range(scores.length) : d3.range(scores.length).sort((a, b) => scores[b] - scores[a]).slice(0, count).sort((a, b) => a - b);

  const update = (rebuild = true) => {
    const target = network.run(state.x), edited = network.run(state.x, state.scales);
    const attributions = network.has_rule ? network.attributions(state.x) : null;
    const mask = attributions && network.mask(attributions), sparse = mask && network.run(state.x, mask);
    Object.assign(panel, { target, edited, sparse, attributions, mask });

    if (rebuild) {
      const active = chosen(state.x.map((value, i) => Math.abs(value) + (state.shown.has(i) ? 10 : 0))).filter((i) => data.num_inputs <= apd.MOST_SHOWN || state.x[i] !== 0 || state.shown.has(i));
      inputs.replaceChildren(...active.map((i) => slider("input", i, state.x[i], [Math.min(data.lowest, state.x[i]), Math.max(data.highest, state.x[i])], `${apd.data.input} ${i}`, null, (value) => { state.x[i] = value; state.shown.add(i); })));
      if (active.length < data.num_inputs) {
        const absent = d3.range(data.num_inputs).filter((i) => !active.includes(i));
        inputs.append(element("select", { "aria-label": "add an input", change: (event) => { const i = Number(event.target.value); state.shown.add(i); state.x[i] = data.highest; update(); } }, element("option", {}, `set another of the ${data.num_inputs} …`), ...absent.map((i) => element("option", { value: i }, `${apd.data.input} ${i}`))));
      }
    }
    const scores = (attributions ?? state.scales.map(() => 0)).map((a, c) => a + 1e6 * (state.scales[c] !== 1 && state.scales[c] !== mask?.[c]));
    const order = chosen(scores).join();
    if (rebuild || order !== components.dataset.order) {
      components.dataset.order = order;
      components.replaceChildren(...order.split(",").map(Number).map((c) => slider("component", c, state.scales[c], [0, 1], `component ${c}`, element("span", { class: "kept", title: "kept in the sparse model on this input", "data-kept": c }), (value) => { state.scales[c] = value; })));
      if (network.num_components > apd.MOST_SHOWN) components.append(element("p", { class: "small muted" }, `The ${apd.MOST_SHOWN} of ${network.num_components} with the largest attribution on this input.`));
    }
    for (const mark of components.querySelectorAll("[data-kept]")) mark.textContent = mask?.[mark.dataset.kept] ? "✓" : "";

    draw(target, sparse, edited);
  };

  const draw = (target, sparse, edited) => {
    const spread = target.map((value, o) => Math.abs(value) + Math.abs(value - edited[o]) + (sparse ? Math.abs(value - sparse[o]) : 0));
    const outputs = chosen(spread), series = [["target", target, "circle", apd.colors.black], ["sparse", sparse, "triangle", apd.colors.blue], ["edited", edited, "times", apd.colors.vermilion]].filter(([, values]) => values);
    const points = series.flatMap(([name, values]) => outputs.map((o) => ({ name, output: o, value: values[o] })));
    chart.replaceChildren(Plot.plot({
      ariaLabel: "Outputs of the target, the sparse and the edited network", width: chart.clientWidth || 380, height: 78 + 22 * outputs.length, marginLeft: 50, marginRight: 14, marginTop: 22, style: { fontSize: "11px" },
      x: { label: "output value", labelArrow: "none", nice: true, domain: d3.extent([0, 1, ...points.map((d) => d.value)]), ticks: 5 },
      y: { label: null, domain: outputs, padding: 0.4, tickSize: 0, grid: true, type: "point" },
      color: { domain: series.map((d) => d[0]), range: series.map((d) => d[3]) },
      symbol: { domain: series.map((d) => d[0]), range: series.map((d) => d[2]), legend: true },
      marks: [Plot.axisY({ label: apd.data.output, labelAnchor: "top", labelArrow: "none", tickSize: 0 }), Plot.dot(points, { x: "value", y: "output", stroke: "name", symbol: "name", r: (d) => (d.name === "target" ? 6.5 : 4.5), strokeWidth: 1.8 })],
    }));
    const error = (values) => apd.number(d3.mean(values, (value, o) => (value - target[o]) ** 2));
    errors.replaceChildren(`Mean squared error to the target: ${sparse ? `sparse ${error(sparse)}, ` : ""}edited ${error(edited)}.`);
    const shown = (value) => element("td", { class: "num", "data-value": value }, value.toFixed(4));
    numbers.replaceChildren(element("table", { class: "numbers" },
      element("thead", {}, element("tr", {}, element("th", {}, apd.data.output), ...series.map(([name]) => element("th", { class: "num" }, name)))),
      element("tbody", {}, ...target.map((_, o) => element("tr", { "data-output": o }, element("td", {}, String(o)), ...series.map(([, values]) => shown(values[o])))))));
  };

  const button = (label, act) => element("button", { type: "button", click: () => { act(); update(); } }, label);
  const setAll = (values) => { state.scales = Array.from(values); };
  const panel = {
    network, state, update,
    set: (x, scales) => { state.x = Array.from(x); state.shown.clear(); setAll(scales); update(); },
  };
  place.replaceChildren(
    element("div", {}, element("h3", {}, "Inputs"), element("div", { class: "controls" }, button("clear", () => { state.x.fill(0); state.shown.clear(); }), button("an example", () => { state.x = Array.from(data.start); state.shown.clear(); })), inputs),
    element("div", {}, element("h3", {}, "Components"), element("div", { class: "controls" }, button("all on", () => setAll(state.scales.map(() => 1))), button("all off", () => setAll(state.scales.map(() => 0))), network.has_rule ? button("as sparse (✓)", () => setAll(panel.mask)) : null), components),
    element("div", {}, element("h3", {}, "Outputs"), chart, errors, element("details", {}, element("summary", {}, "numbers"), numbers)),
  );
  if (!network.has_rule) place.append(element("p", { class: "small muted" }, "This run's kind of attribution is not taken in the page: there are no sparse outputs."));
  update();
  return panel;
};
