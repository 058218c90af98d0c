"use strict";
// Text to read, coloured by a component. A passage: {words, starts, component, activity}: at word t
// are on component[starts[t] .. starts[t + 1]], as much as activity (of 255) says there.

apd.reader = (text, gist) => {
  const element = apd.element, find = (id) => document.getElementById(id), passages = [];
  const state = { passage: 0, component: null, word: null };
  const on = (passage, t) => {
    const [from, to] = [passage.starts[t], passage.starts[t + 1]];
    return Array.from({ length: to - from }, (_, i) => ({ c: passage.component[from + i], g: passage.activity[from + i] / 255 })).sort((a, b) => b.g - a.g || a.c - b.c);
  };
  const levels = (passage, c) => {
    const found = new Float32Array(passage.words.length);
    for (let t = 0; t < found.length; t++) for (let i = passage.starts[t]; i < passage.starts[t + 1]; i++) if (passage.component[i] === c) found[t] = passage.activity[i] / 255;
    return found;
  };
  // Shown at first: of what is on at few of the words, what is on the most at those with letters.
  const telling = (passage) => {
    const total = new Map(), count = new Map();
    passage.words.forEach((word, t) => {
      for (let i = passage.starts[t]; i < passage.starts[t + 1]; i++) {
        const c = passage.component[i];
        total.set(c, (total.get(c) ?? 0) + (/\p{L}/u.test(word) ? passage.activity[i] : 0));
        count.set(c, (count.get(c) ?? 0) + 1);
      }
    });
    const few = [...total.keys()].filter((c) => count.get(c) <= Math.max(1, 0.2 * passage.words.length));
    return d3.greatest(few.length ? few : [...total.keys()], (a, b) => d3.ascending(total.get(a), total.get(b)) || d3.descending(a, b)) ?? null;
  };
  const draw = () => {
    const passage = passages[state.passage];
    find("read-controls").replaceChildren(
      element("button", { type: "button", id: "earlier", disabled: state.passage === 0, click: () => go(state.passage - 1) }, "←"),
      element("span", {}, passage.title ?? `passage ${state.passage + 1} of ${passages.length}`),
      element("button", { type: "button", id: "later", disabled: state.passage === passages.length - 1, click: () => go(state.passage + 1) }, "→"),
      element("label", { class: "push" }, "coloured by component ", element("input", { type: "number", id: "by", min: 0, max: text.num_components - 1, value: state.component, change: (event) => choose(event.target.value === "" ? null : Math.max(0, Math.min(text.num_components - 1, Math.round(event.target.value)))) })));
    const found = state.component === null ? null : levels(passage, state.component);
    find("passage").replaceChildren(...passage.words.flatMap((word, t) => {
      const span = apd.token(word, found?.[t] ?? 0, { click: () => { state.word = t; draw(); } });
      span.classList.toggle("picked", state.word === t);
      return [passage.seams?.includes(t) ? element("span", { class: "seam" }) : "", span, word.endsWith("⏎") ? element("br") : ""];
    }));
    find("scale").replaceChildren(...(state.component === null ? [] : ["0", element("i"), "1", element("span", {}, d3.max(found) > 0 ? "importance" : `component ${state.component} is off in this passage`)]));
    const place = state.word, listed = place === null ? summary(passage) : on(passage, place);
    find("here").replaceChildren(
      element("h3", {}, ...(place === null ? ["Most on in this passage"] : ["On at ", apd.word(passage.words[place])])),
      element("p", { class: "muted small" }, place === null ? "by their largest importance; click on a word for what is on there" : `${listed.length} of ${text.num_components.toLocaleString("en")} components`),
      element("ul", { class: "on" }, ...listed.slice(0, 30).map(({ c, g }) => element("li", { class: c === state.component ? "chosen" : null }, element("button", { type: "button", "data-component": c, title: "colour the text by it", click: () => choose(c) }, c), apd.meter(g), element("span", { class: "gist" }, ...gist(c)), element("a", { href: `#component-${c}`, title: "its page", "aria-label": `page of component ${c}` }, "→")))),
      listed.length > 30 ? element("p", { class: "muted small" }, `and ${listed.length - 30} more`) : "");
  };
  const summary = (passage) => {
    const most = new Map();
    passage.component.forEach((c, i) => most.set(c, Math.max(most.get(c) ?? 0, passage.activity[i] / 255)));
    return Array.from(most, ([c, g]) => ({ c, g })).sort((a, b) => (b.c === state.component) - (a.c === state.component) || b.g - a.g || a.c - b.c);
  };
  const go = (passage) => { Object.assign(state, { passage, word: null }); draw(); };
  const choose = (component) => { state.component = component; draw(); };
  const add = (passage) => { passages.push(passage); Object.assign(state, { passage: passages.length - 1, word: null, component: passage.component.includes(state.component) ? state.component : telling(passage) }); draw(); };

  if (text.passages) {
    const { tokens, starts, component, activity } = text.passages, T = tokens.shape[1];
    for (let p = 0; p < tokens.shape[0]; p++) {
      const ids = Array.from(apd.at(tokens, p)), length = ids.includes(0) ? ids.indexOf(0) : T;
      const edges = starts.flat.subarray(p * T, p * T + length + 1), [from, to] = [edges[0], edges[length]];
      passages.push({ words: ids.slice(0, length).map((id) => text.words[id]), starts: edges.map((edge) => edge - from), component: component.flat.subarray(from, to), activity: activity.flat.subarray(from, to) });
    }
    state.component = telling(passages[0]);
    draw();
  }
  const form = find("type");
  form?.addEventListener("submit", async (event) => {
    event.preventDefault();
    const says = find("type-says");
    says.textContent = "…";
    try {
      const answer = await fetch("activity", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ text: find("type-text").value }) });
      const found = await answer.json();
      if (!answer.ok) throw new Error(found.error);
      says.textContent = `${found.words.length} tokens`;
      add({ title: "your text", ...found });
    } catch (error) {
      says.textContent = error.message;
    }
  });
  return { choose, add };
};
