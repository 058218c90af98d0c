"use strict";
// The table of components of a language model, their pages, and the way between these.

(async () => {
  const text = await apd.unpack(apd.data), element = apd.element, find = (id) => document.getElementById(id);
  const { words, sites, num_components: C } = text, numbers = d3.range(C);
  const list = (pair, c) => Array.from(apd.at(pair.token, c), (id, i) => ({ id, value: apd.at(pair.value, c)[i], count: pair.count && apd.at(pair.count, c)[i] })).filter((d) => d.id > 0);
  const chips = (pair, c, most, unit) => (pair ? list(pair, c).slice(0, most).map((d) => apd.word(words[d.id], `${apd.number(d.value)} ${unit}`)) : []);
  const where = (c) => Array.from(apd.at(text.site, c), (site, i) => ({ name: sites[site - 1], share: apd.at(text.site_share, c)[i] })).filter((d) => d.name);
  const short = (name) => name.replace(/\.weight$/, "").split(".").slice(-3).join(".");
  const rate = (c) => text.rate.flat[c], whenOn = (c) => (rate(c) ? text.mean.flat[c] / rate(c) : 0);
  const push = (c) => (text.up ? apd.at(text.up.value, c)[0] : 0);
  const labelled = text.labels.some((label) => label), gist = (c) => (text.labels[c] ? [text.labels[c]] : chips(text.input, c, 3, "nats"));

  // Groups of components that fire together; those that are alone are in none.
  const members = d3.group(text.group ? numbers.filter((c) => rate(c) > 0) : [], (c) => text.group.flat[c]);
  const group = (c) => (text.group && members.get(text.group.flat[c])?.length > 1 ? text.group.flat[c] : null);
  const groupLink = (c, says = "") => element("a", { href: `#group-${group(c)}` }, `${says}${group(c)}`);

  // Where the page has no room for all windows, they lie in files beside it, by number.
  const files = text.shards?.files ?? [], parts = [], read = apd.beside(files), said = new Map();
  const partOf = (c) => (text.shards ? Math.floor(c / text.shards.size) : 0), missing = (c) => files.length > 0 && !parts[partOf(c)];
  const arrive = (i) => read(i).then((part) => {
    if (parts[i]) return;
    parts[i] = part;
    for (const c of numbers) if (partOf(c) === i) said.delete(c);
  });

  // Windows of text around what a component is on at.
  const windows = (kind, c) => {
    const part = parts[partOf(c)], { tokens, activity } = (part ?? text)[kind], row = part ? c % text.shards.size : c;
    return d3.range(tokens.shape[1]).map((k) => ({ ids: apd.at(tokens, row, k), levels: apd.at(activity, row, k) })).filter((w) => w.ids[w.ids.length >> 1] > 0);
  };
  const coloured = ({ ids, levels }, side = ids.length) => {
    const half = ids.length >> 1;
    return d3.range(Math.max(0, half - side), Math.min(ids.length, half + side + 1)).filter((i) => ids[i] > 0).map((i) => apd.token(words[ids[i]], levels[i] / 255, { centre: i === half }));
  };

  // The table: what is searched for, in order, a few rows at a time.
  const state = { by: text.up ? "push" : "rate", descending: true, shown: 50, found: numbers, says: "" };
  const columns = [
    { name: "component", label: "component", value: (c) => c, cell: (c) => element("a", { href: `#component-${c}` }, String(c)) },
    { name: "where", label: "where", value: (c) => apd.at(text.site, c)[0], cell: (c) => { const at = where(c); return element("span", { title: at.map((d) => d.name).join(", ") }, `${short(at[0]?.name ?? "")}${at.length > 1 ? ` and ${at.length - 1} more` : ""}`); } },
    { name: "rate", label: "on at", num: true, says: "share of tokens", value: rate, cell: (c) => apd.percent(rate(c)) },
    { name: "mean", label: "importance", num: true, says: "mean where it is on", value: whenOn, cell: (c) => apd.number(whenOn(c), 2) },
    ...(labelled ? [{ name: "label", label: "label", value: (c) => text.labels[c] || "~", cell: (c) => text.labels[c] }] : []),
    ...(text.group ? [{ name: "group", label: "group", num: true, says: "and how many are in it", value: (c) => group(c) ?? Infinity, cell: (c) => (group(c) === null ? "" : element("span", {}, groupLink(c), ` of ${members.get(group(c)).length}`)) }] : []),
    { name: "input", label: "fires on", cell: (c) => element("span", {}, ...chips(text.input, c, 4, "nats")) },
    ...(text.up ? [{ name: "push", label: "pushes up", says: "sorted by the largest change of a logit", value: push, cell: (c) => element("span", {}, ...chips(text.up, c, 4, "logits")) }] : []),
    { name: "snippet", label: "strongest context", cell: (c) => { const first = windows("top", c)[0]; return element("div", { class: "snippet" }, ...(first ? coloured(first, 7) : [])); } },
  ];
  const head = element("tr", {}, ...columns.map((column) => element("th", { scope: "col", "data-column": column.name, class: column.num ? "num" : null, title: column.says }, column.value ? element("button", { type: "button", click: () => { state.descending = state.by === column.name ? !state.descending : !["component", "where", "label", "group"].includes(column.name); state.by = column.name; state.shown = 50; fill(); } }, column.label) : column.label)));
  const body = element("tbody");
  find("table").replaceChildren(element("thead", {}, head), body);
  const fill = () => {
    const { value } = columns.find((one) => one.name === state.by), sign = state.descending ? -1 : 1;
    // What is never on comes last, whatever the order.
    const order = [...state.found].sort((a, b) => (rate(b) > 0) - (rate(a) > 0) || sign * d3.ascending(value(a), value(b)) || a - b);
    body.replaceChildren(...order.slice(0, state.shown).map((c) => element("tr", { class: rate(c) ? null : "dead" }, ...columns.map((column) => element("td", { class: column.num ? "num" : null }, column.cell(c))))));
    for (const th of head.children) th.dataset.column === state.by ? th.setAttribute("aria-sort", state.descending ? "descending" : "ascending") : th.removeAttribute("aria-sort");
    find("count").textContent = `${state.found.length.toLocaleString("en")} of ${C.toLocaleString("en")} components, ${state.found.filter((c) => rate(c) > 0).length.toLocaleString("en")} ever on${state.says}`;
    find("more").hidden = state.shown >= state.found.length;
  };
  find("more").addEventListener("click", () => { state.shown += 200; fill(); });

  // What is searched: a component's number, its sites, its words, and what stands around those that it is on at.
  const all = (c) => {
    if (!said.has(c)) {
      const lists = ["input", "next", "up", "down"].flatMap((name) => (text[name] ? list(text[name], c).map((d) => words[d.id]) : []));
      const contexts = ["top", "random"].flatMap((kind) => windows(kind, c).flatMap(({ ids, levels }) => [Array.from(ids, (id) => words[id]).slice(Math.max(0, (ids.length >> 1) - 3), (ids.length >> 1) + 3).join(""), ...Array.from(ids, (id, i) => (levels[i] ? words[id] : ""))]));
      said.set(c, [text.labels[c], ...where(c).map((d) => d.name), ...lists, ...contexts].join("\n").toLowerCase());
    }
    return said.get(c);
  };
  const groupAsked = (asked) => (text.group ? /^group (\d+)$/.exec(asked)?.[1] : null);
  const search = (says) => {
    const asked = find("search").value.trim().toLowerCase(), one = groupAsked(asked);
    state.found = one ? members.get(Number(one)) ?? [] : asked ? numbers.filter((c) => String(c) === asked || all(c).includes(asked)) : numbers;
    state.says = asked ? says : "";
    state.shown = 50;
    fill();
    return asked;
  };
  find("search").addEventListener("input", async () => {
    const toRead = groupAsked(find("search").value.trim().toLowerCase()) ? 0 : files.filter((_, i) => !parts[i]).length;
    if (!search(toRead ? "; reading contexts …" : "") || !toRead) return;
    const lost = (await Promise.allSettled(files.map((_, i) => arrive(i)))).filter((one) => one.status === "rejected").length;
    search(lost ? `; ${lost} of ${files.length} files of contexts are missing beside this page` : "");
  });

  // A component's page.
  const wordTable = (pair, c, heads, meter) => element("table", { class: "list" }, element("thead", {}, element("tr", {}, ...heads.map((label, i) => element("th", { class: i ? "num" : null }, label)))), element("tbody", {}, ...list(pair, c).map((d) => element("tr", {}, element("td", {}, apd.word(words[d.id])), element("td", { class: "num" }, meter ? apd.meter(Math.abs(d.value) / meter, d.value < 0 ? "blue" : "") : null, ` ${apd.number(d.value)}`), pair.count ? element("td", { class: "num" }, d.count.toLocaleString("en")) : null))));
  const section = (title, caption, ...rest) => element("section", {}, element("h2", {}, title), element("p", { class: "caption" }, caption), ...rest);
  const contexts = (kind, c) => element("ul", { class: `contexts ${kind}` }, ...windows(kind, c).map((w) => element("li", {}, element("span", { class: "g" }, (w.levels[w.levels.length >> 1] / 255).toFixed(2)), element("span", {}, ...coloured(w)))));
  const others = (c) => Array.from(apd.at(text.others.number, c), (d, i) => ({ c: d - 1, share: apd.at(text.others.share, c)[i] })).filter((d) => d.c >= 0);
  // Attention: partners of queries, and of keys; levels by how many words the key is before the query.
  const partners = (side, c) => Array.from(apd.at(side.number, c), (d, i) => ({ c: d - 1, at: [c, i], place: `layer ${apd.at(side.layer, c)[i]}, head ${apd.at(side.head, c)[i]}`, peak: apd.at(side.peak, c)[i], levels: Array.from(apd.at(side.level, c, i), (level) => (level - 128) / 127) })).filter((d) => d.c >= 0);
  const strip = (peak, levels) => element("span", { class: "strip" }, ...levels.map((level, i) => element("i", { title: `${apd.number(level * peak)}, key ${i} before`, style: `background-color:${apd.tint(level)}` })));
  const attention = (c) => (text.attention ? [["Attends to", "query", "keys", text.attention.queries], ["Attended to by", "key", "queries", text.attention.keys]] : []).flatMap(([title, own, other, side]) => {
    const found = partners(side, c);
    return found.length ? [section(title, `What it, as a ${own}, and ${other} add to a head's attention score, at inputs of length 1 along what each reads, by how many words the key is before the query: from the left, 0 to ${found[0].levels.length - 1}. Blue adds where both activations have one sign, vermilion takes away. The largest of components that are ever on; how often both are is not in it.`, element("table", { class: "list attention" }, element("tbody", {}, ...found.map((d) => element("tr", {}, element("td", {}, element("a", { href: `#component-${d.c}` }, String(d.c)), " ", ...gist(d.c)), element("td", { class: "num" }, strip(d.peak, d.levels), " ", apd.number(d.peak), element("br"), element("span", { class: "muted small" }, d.place)))))))] : [];
  });
  const grouped = (c) => {
    if (group(c) === null) return [];
    const rest = members.get(group(c)).filter((d) => d !== c), shown = rest.slice(0, 30);
    return [section("Its group", "Components that are on at the same words, so that one name for all of them takes fewer bits than one for each.", element("table", { class: "list group" }, element("tbody", {}, ...shown.map((d) => element("tr", {}, element("td", {}, element("a", { href: `#component-${d}` }, String(d)), " ", ...gist(d)), element("td", { class: "num muted small" }, short(where(d)[0]?.name ?? "")))))), element("p", { class: "small" }, groupLink(c, `All ${rest.length + 1} of group `)))];
  };
  const page = (c) => {
    const alive = rate(c) > 0, step = (by, label) => element("a", { href: `#component-${(c + by + C) % C}` }, label);
    const strongest = text.up && alive ? Math.max(push(c), -apd.at(text.down.value, c)[0]) || 1 : 1, nats = "PMI", columns = ["word", "nats", "times"];
    const left = element("div", {}, section("Strongest contexts", "The importance of the component at every word; the underlined word is the one that the number is of.", contexts("top", c)), section("Any contexts", "A uniform sample of the words where it is on.", contexts("random", c)));
    const right = element("div", {},
      ...(text.up ? [section("Pushes up", "Logits of the next word with the component, less those without it, at its strongest contexts.", wordTable(text.up, c, ["next word", "logits"], strongest)), section("Pushes down", "The same, at the other end.", wordTable(text.down, c, ["next word", "logits"], strongest))] : []),
      ...attention(c),
      section("Fires on", `${nats} of a word with the component being on at it.`, wordTable(text.input, c, columns)),
      section("Comes before", `${nats} of the next word with the component being on.`, wordTable(text.next, c, columns)),
      section("Often on with", "Share of its firings in which the other is on as well.", element("table", { class: "list" }, element("tbody", {}, ...others(c).map((d) => element("tr", {}, element("td", {}, element("a", { href: `#component-${d.c}` }, String(d.c)), " ", ...gist(d.c)), element("td", { class: "num" }, apd.meter(d.share), ` ${apd.percent(d.share)}`)))))),
      ...grouped(c));
    const beside = element("p", { id: "beside", class: "muted small", role: "status" }, alive && missing(c) ? "Reading more contexts …" : "");
    if (alive && missing(c)) arrive(partOf(c)).then(() => { if (location.hash === `#component-${c}`) page(c); }, () => { beside.textContent = `More contexts are in ${files[partOf(c)]}, which is missing beside this page.`; });
    find("component-page").replaceChildren(
      element("p", { class: "pager" }, element("a", { href: "#components" }, "← All components"), step(-1, "previous"), step(1, "next")),
      element("header", {}, element("h1", {}, `Component ${c}`), element("p", { class: "lead" }, ...(alive ? [...(text.labels[c] ? [element("strong", {}, text.labels[c]), element("br")] : []), "Fires on ", ...(list(text.input, c).length ? chips(text.input, c, 3, "nats") : ["no word in particular"]), ...(text.up ? [" and pushes up ", ...chips(text.up, c, 3, "logits")] : [])] : ["Never on in the text that was counted."])),
        element("ul", { class: "facts" }, ...[["on at", apd.percent(rate(c))], ["importance where on", apd.number(whenOn(c))], ...where(c).map((d) => [`share of ${d.name}`, apd.number(d.share, 2)])].map(([name, value]) => element("li", {}, element("span", { class: "muted" }, `${name} `), element("b", {}, value)))),
        alive && find("read") ? element("p", {}, element("button", { type: "button", class: "go", click: () => { reader.choose(c); location.hash = "#read"; } }, "Colour the text by it →")) : ""),
      beside,
      alive ? element("div", { class: "columns" }, left, right) : "");
  };

  const reader = find("read") ? apd.reader(text, gist) : null;
  fill();
  if (text.losses?.length) find("loss-chart").replaceChildren(apd.losses(text.losses, { width: Math.max(320, Math.min(880, document.documentElement.clientWidth - 40)) }));
  const route = () => {
    const asked = /^#group-(\d+)$/.exec(location.hash)?.[1], number = Number(/^#component-(\d+)$/.exec(location.hash)?.[1] ?? NaN), opened = number < C;
    find("overview-page").hidden = opened;
    find("component-page").hidden = !opened;
    if (opened) {
      page(number);
      scrollTo(0, 0);
    } else if (asked) {
      find("search").value = `group ${asked}`;
      search("");
      find("components").scrollIntoView();
    } else if (location.hash.length > 1) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
  };
  addEventListener("hashchange", route);
  route();
  document.body.dataset.ready = "true";
})();
