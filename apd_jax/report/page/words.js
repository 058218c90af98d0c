"use strict";
// Arrays of a language page, and how words are shown. Arrays come as {shape, kind, z: base64 of deflated bytes}.

const KINDS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

apd.unpack = async (value) => {
  if (value === null || typeof value !== "object") return value;
  if (Array.isArray(value)) return value;
  if ("z" in value) {
    const bytes = Uint8Array.from(atob(value.z), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return { shape: value.shape, flat: new KINDS[value.kind](await new Response(stream).arrayBuffer()) };
  }
  const entries = await Promise.all(Object.entries(value).map(async ([key, item]) => [key, await apd.unpack(item)]));
  return Object.fromEntries(entries);
};

// Files beside the page, each a script that calls apd.shard(number, data): i -> its data, read once.
apd.beside = (files) => {
  const asked = new Map(), arrived = new Map();
  apd.shard = (i, data) => arrived.set(i, data);
  const read = (i) => new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.onload = () => (arrived.has(i) ? resolve(apd.unpack(arrived.get(i))) : reject(new Error(files[i])));
    script.onerror = () => reject(new Error(files[i]));
    script.src = files[i];
    document.head.append(script);
  });
  return (i) => {
    if (!asked.has(i)) asked.set(i, read(i));
    return asked.get(i);
  };
};

// Row i (of row i, ...) of an array.
apd.at = ({ shape, flat }, ...places) => {
  let start = 0, size = flat.length;
  places.forEach((place, k) => { size /= shape[k]; start += place * size; });
  return flat.subarray(start, start + size);
};

// From the faintest orange that is seen to the house's own at 1.
apd.ink = (g) => {
  const mix = (to) => Math.floor(255 + (to - 255) * (0.15 + 0.85 * g) + 0.5);
  return `rgb(${mix(230)}, ${mix(159)}, ${mix(0)})`;
};

// Blue above 0, vermilion below, at 1 and -1 the house's own.
apd.tint = (level) => `color-mix(in srgb, ${level < 0 ? apd.colors.vermilion : apd.colors.blue} ${Math.round(100 * Math.abs(level))}%, white)`;

// A word of text. g: how much the component is on there, in [0, 1].
apd.token = (text, g = 0, { centre = false, ...more } = {}) => apd.element("span", {
  class: `tok${centre ? " centre" : ""}${/^⏎+$/.test(text) ? " break" : ""}`, style: g > 0 ? `background-color:${apd.ink(g)}` : null, title: g > 0 ? g.toFixed(2) : null, ...more }, text);

// A word by itself, with its spaces to be seen.
apd.word = (text, title) => {
  const cut = /^( *)(.*?)( *)$/s.exec(text), space = (part) => (part ? apd.element("span", { class: "space" }, "·".repeat(part.length)) : null);
  return apd.element("span", { class: "w", title }, space(cut[1]), cut[2], space(cut[3]));
};

apd.meter = (share, kind = "") => apd.element("span", { class: `meter ${kind}` }, apd.element("i", { style: `width:${Math.round(100 * Math.max(0, Math.min(1, share)))}%` }));

apd.percent = (share) => (share === 0 ? "never" : share < 0.0001 ? "< 0.01 %" : `${apd.number(100 * share, 2)} %`);
