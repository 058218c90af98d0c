"use strict";
// The network and its components, run from their weights: the same numbers as apd_jax gives, in double precision.

// data: layers, leaves {name: matrix or vector}, factors {name: {ranks, U, V}}, rule; see report/panel.py.
apd.network = (data) => {
  const { layers, leaves, factors, rule } = data;
  const num_components = Object.values(factors)[0].ranks.length;

  // P_c = U_c V_c of one leaf, as views into the flat arrays: {U [a r], V [r b], r}.
  const shortOf = Object.fromEntries(Object.entries(factors).map(([name, { ranks, U, V }]) => {
    const [a, b] = [leaves[name].length, leaves[name][0].length];
    let at = 0;
    return [name, ranks.map((r) => { const one = { r, U: U.subarray(at * a, (at + r) * a), V: V.subarray(at * b, (at + r) * b) }; at += r; return one; })];
  }));

  const dense = (h, W, transpose) => {
    if (transpose) return W.map((row) => row.reduce((sum, w, j) => sum + w * h[j], 0));
    const out = new Array(W[0].length).fill(0);
    h.forEach((value, i) => { if (value !== 0) W[i].forEach((w, j) => { out[j] += value * w; }); });
    return out;
  };

  // out += scale · h P_c, or scale · h P_cᵀ.
  const addProduct = (out, h, leaf, c, scale, transpose) => {
    const { r, U, V } = shortOf[leaf][c], [a, b] = [leaves[leaf].length, leaves[leaf][0].length];
    const first = (j) => { let sum = 0; if (transpose) for (let i = 0; i < b; i++) sum += h[i] * V[j * b + i]; else for (let i = 0; i < a; i++) sum += h[i] * U[i * r + j]; return sum; };
    for (let j = 0; j < r; j++) {
      const inner = scale * first(j);
      if (transpose) for (let i = 0; i < a; i++) out[i] += inner * U[i * r + j];
      else for (let i = 0; i < b; i++) out[i] += inner * V[j * b + i];
    }
  };

  const erf = (x) => { // to 1.2e-7 (Numerical Recipes' Chebyshev fit)
    const t = 1 / (1 + 0.5 * Math.abs(x));
    const c = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277];
    const rest = t * Math.exp(-x * x + c.reduceRight((sum, one) => sum * t + one, 0));
    return x >= 0 ? 1 - rest : rest - 1;
  };
  const normal = (x) => 0.5 * (1 + erf(x / Math.SQRT2));
  const activations = {
    relu: [(x) => Math.max(x, 0), (x) => (x > 0 ? 1 : 0)],
    gelu: [(x) => x * normal(x), (x) => normal(x) + (x * Math.exp(-x * x / 2)) / Math.sqrt(2 * Math.PI)],
  };

  // The outputs, with scales[c] P_c in the sum for every decomposed leaf; scales = null is the target itself.
  // along: a component whose direction the outputs are derived in; then [outputs, derivative].
  const run = (x, scales = null, along = null) => {
    let h = Array.from(x), t = along === null ? null : h.map(() => 0), kept = [];
    const product = (v, leaf, transpose) => {
      if (scales === null || !(leaf in factors)) return dense(v, leaves[leaf], transpose);
      const out = new Array(transpose ? leaves[leaf].length : leaves[leaf][0].length).fill(0);
      scales.forEach((scale, c) => { if (scale !== 0) addProduct(out, v, leaf, c, scale, transpose); });
      return out;
    };
    for (const { op, leaf, transpose, size } of layers) {
      if (op === "linear") {
        const before = h;
        h = product(before, leaf, transpose);
        if (t) { t = product(t, leaf, transpose); if (leaf in factors) addProduct(t, before, leaf, along, 1, transpose); }
      } else if (op === "bias") h = h.map((value, i) => value + leaves[leaf][i]);
      else if (op in activations) {
        const [value, slope] = activations[op];
        if (t) t = t.map((d, i) => d * slope(h[i]));
        h = h.map(value);
      } else if (op === "keep") kept.push([h, t]);
      else if (op === "add") { const through = (v) => (v && leaf ? product(v, leaf, false) : v), [h0, t0] = kept.pop().map(through); h = h.map((value, i) => value + h0[i]); if (t) t = t.map((d, i) => d + t0[i]); }
      else if (op === "pad") { h = [...h, ...new Array(size).fill(0)]; if (t) t = [...t, ...new Array(size).fill(0)]; }
      else if (op === "last") { h = h.slice(-size); if (t) t = t.slice(-size); }
      else throw new Error(`unknown layer ${op}`);
    }
    return along === null ? h : [h, t];
  };

  const all = new Array(num_components).fill(1);
  // A_c(x) = sqrt(mean_o (J P_c)_o²), at the weights that the run took it at.
  const attributions = (x) => d3.range(num_components).map((c) => {
    const [, slope] = run(x, rule.at === "components" ? all : null, c);
    return Math.sqrt(slope.reduce((sum, d) => sum + d * d, 0) / slope.length);
  });
  const mask = (given) => {
    const ranked = d3.range(rule.num_always_on, num_components).sort((a, b) => given[b] - given[a]).slice(0, rule.topk);
    return given.map((value, c) => (rule.all || c < rule.num_always_on || ("topk" in rule ? ranked.includes(c) : rule.cuts[c] !== null && value > rule.cuts[c]) ? 1 : 0));
  };
  return { num_components, run, attributions, mask, has_rule: rule !== null };
};
