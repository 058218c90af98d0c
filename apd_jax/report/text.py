"""The page of a language model: its components on text, as one file that opens from disk.

`write` packs a harvest, what components do to the next token, and a few passages of text. Words
are numbers from 1 into one list; 0 is no word. Arrays are embedded as base64 of deflated bytes.
Contexts that it has no room for lie in a folder beside it, as scripts that it reads on demand.

Shapes: C components, K windows of W tokens, P passages of T tokens, V tokens.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError, of_kind
from apd_jax.interpretation import effects as effects_lib
from apd_jax.interpretation import qk
from apd_jax.interpretation.effects import Effects
from apd_jax.interpretation.harvest import Harvest
from apd_jax.interpretation.qk import Partners
from apd_jax.interpretation.reading import Reading, quantised, read
from apd_jax.language import DecoderConfig
from apd_jax.paths import user_path
from apd_jax.report import drawn, html, tables, words
from apd_jax.report.source import Source
from apd_jax.train.workdir import flat

LARGEST_PAGE = 20_000_000  # bytes
SHOWN = ((16, 8), (8, 4), (4, 2), (2, 1))  # top and random windows; fewer until the page fits
SHARD = 2_000_000  # words of contexts in a file beside the page, as a page of its own would hold
MOST_PAIRS = 600_000  # of a word and a component that is on there, in the passages
MOST_SITES = 6  # of a component that are named


@dataclasses.dataclass(frozen=True)
class TextSource:
    """What the page of a language model is made from.

    source: as of every report; its x are tokens [B, T] for passages, its words their names.
    labels: what components are called; labelled_by: who said so.
    serve_command: what opens the page with a box to type in. live: it is this page.
    attention: the partners of queries and of keys; None: none, or no `language.Decoder`.
    groups: of components that fire together; grouped_by: how they were found.
    """

    source: Source
    harvest: Harvest
    effects: Effects | None = None
    labels: Mapping[int, str] = dataclasses.field(default_factory=dict)
    labelled_by: str = ""
    serve_command: str = ""
    live: bool = False
    attention: tuple[Partners, Partners] | None = None
    groups: Int[np.ndarray, " C"] | None = None
    grouped_by: str = ""


def report(
    decomposition: Decomposition,
    path: epath.PathLike,
    x: Any = None,
    tokens: Any = None,
    harvest: Harvest | None = None,
    effects: Effects | None = None,
    decoder: DecoderConfig | None = None,
    groups: Any = None,
) -> epath.Path:
    """Writes one HTML file that shows where on text every component is on, and what it does.

    Args:
      x: tokens [B, T] of passages to read; None: the page has none.
      tokens: their names, see `apd_jax.report.words.of`; None: numbers.
      harvest: of this decomposition.
      effects: of this harvest; None: they are measured.
      decoder: of a `language.Decoder`, its config; None: the page has no partners in attention.
      groups: [C], of components that fire together, e.g. `clusters.Clustering.partition`.
    Raises:
      InputError: the harvest is of another decomposition, or groups are not one number for each.
    Cost: that of `effects` and `qk.partners`, and the gate on x.
    """
    seen: Harvest = of_kind("harvest", harvest, Harvest, "a Harvest, of interpretation.harvest")
    seen.must_be_of(decomposition)
    if effects is None:
        effects = effects_lib.effects(decomposition, seen)
    of_kind("effects", effects, Effects, "Effects, of interpretation.effects")
    of_kind("decoder", decoder, (DecoderConfig, type(None)), "the config of a language.Decoder")
    path, d = user_path(path), decomposition
    name = path.resolve().parent.name if path.stem == "report" else path.stem
    metrics = {"seed": d.method.seed} | ({"step": d.history[-1]["step"]} if d.history else {})
    settings = {"apd": d.method.to_dict()}
    x = None if x is None else _as_tokens(np.asarray(x))
    named = words.fitting(tokens, d, x, seen.top_tokens)
    source = Source(name, d, x, settings=settings, metrics=metrics, words=named)
    attention = partners(d, decoder, seen) if decoder else None
    groups = None if groups is None else _checked(np.asarray(groups), seen.num_components)
    shown = TextSource(source, seen, effects, attention=attention, groups=groups)
    return write(path, shown)


def _checked(groups: np.ndarray, num_components: int) -> np.ndarray:
    whole = np.issubdtype(groups.dtype, np.integer) and groups.min(initial=0) >= 0
    if not whole or groups.shape != (num_components,):
        raise InputError(
            f"groups need a whole number from 0 for each of {num_components} components; got "
            f"{groups.dtype} {groups.shape}."
        )
    return groups


def partners(
    decomposition: Decomposition, decoder: DecoderConfig, harvest: Harvest
) -> tuple[Partners, Partners] | None:
    """Those of components that are ever on, see `qk.partners`."""
    components, params = decomposition.components, decomposition.problem.params
    return qk.partners(components, params, decoder, harvest.firing_rate > 0)


def write(path: epath.PathLike, source: TextSource) -> epath.Path:
    """Writes the page; where it is too large, its contexts into STEM.contexts/ beside it.

    Raises:
      InputError: it cannot be written.
    """
    path = user_path(path)
    folder = path.parent / f"{path.stem}.contexts"
    text, shards = _written(source, f"{folder.name}/")
    before = set(folder.glob("*.js")) if folder.exists() else set()
    files = {folder / name: content for name, content in shards.items()}
    for file, content in files.items():
        html.save(file, content)
    html.save(path, text)
    for file in before - set(files):  # of an earlier page
        file.unlink()
    return path


def page(source: TextSource) -> str:
    """The page by itself, with as many windows of text as it has room for."""
    return _written(source, None)[0]


def _written(source: TextSource, folder: str | None) -> tuple[str, dict[str, str]]:
    """The page, and the files that it reads in a folder beside it, if it may have one."""
    found, of = source.harvest, source.source
    passages = None if of.x is None else _passages(of.decomposition, np.asarray(of.x), found)
    most, text = (found.top_tokens.shape[1], found.random_tokens.shape[1]), ""

    def rendered(data: dict[str, Any], shown: tuple[int, int], rest: str) -> str:
        left_out = ""
        if shown != most:
            left_out = (
                f"To fit into a page, each has {shown[0]} of its {most[0]} strongest contexts and "
                f"{shown[1]} of {most[1]} others; {rest}."
            )
        return html.render("text.html", _around(source, data) | {"left_out": left_out})

    for top, random in SHOWN:
        shown = (min(top, most[0]), min(random, most[1]))
        text = rendered(_data(source, passages, shown), shown, "the files of the harvest hold all")
        if len(text.encode()) <= LARGEST_PAGE:
            return text, {}
        if folder is not None:
            break
    if folder is None:
        return text, {}
    shown = (min(SHOWN[-1][0], most[0]), min(SHOWN[-1][1], most[1]))
    ids = _ids(source, passages, most)
    size, files = _shards(found, ids)
    data = _data(source, passages, shown, ids)
    data["shards"] = {"files": [folder + name for name in files], "size": size}
    rest = f"the others lie in {folder} beside it, and are read when they are shown or searched"
    return rendered(data, shown, rest), files


def _shards(found: Harvest, ids: np.ndarray) -> tuple[int, dict[str, str]]:
    """Components in a file, and {name: script} of files that hold all contexts.

    Names say what is in them: a page never reads those of another.
    """
    per_component = found.top_tokens[0].size + found.random_tokens[0].size
    size = max(1, SHARD // per_component)
    scripts = []
    for i, start in enumerate(range(0, found.num_components, size)):
        rows = slice(start, start + size)
        content = json.dumps(_windows(found, rows, (None, None), lambda t: _word(ids, t)))
        scripts.append(f"apd.shard({i}, {content});\n")
    digest = hashlib.sha256("".join(scripts).encode()).hexdigest()[:12]
    return size, {f"{digest}-{i}.js": script for i, script in enumerate(scripts)}


def _around(source: TextSource, data: Mapping[str, Any]) -> dict[str, Any]:
    """All that the template shows."""
    of, found = source.source, source.harvest
    bounded = found.input_missed.any() or found.next_missed.any()
    return {
        "source": of,
        "data": data,
        "live": source.live,
        "serve_command": source.serve_command,
        "labelled_by": source.labelled_by,
        "grouped_by": source.grouped_by,
        "headline": html.headline(of),
        "tiles": _tiles(of.metrics, found),
        "evidence": html.evidence_card(of),
        "metrics": tables.result_rows(of.metrics, others=True),
        "settings": sorted(flat(of.settings).items()),
        "num_tokens": found.num_tokens,
        "threshold": found.threshold,
        "counts_note": "among the words that it fires on most often" if bounded else "",
    }


def _ids(source: TextSource, passages: Reading | None, shown: tuple[int, int]) -> np.ndarray:
    """The tokens that are named, in order."""
    found, made, (top, random) = source.harvest, source.effects, shown
    used = [found.top_tokens[:, :top], found.random_tokens[:, :random]]
    used += [found.input_token, found.next_token]
    used += [] if made is None else [made.up_token, made.down_token]
    used += [] if passages is None else [passages.tokens]
    ids = np.unique(np.concatenate([a.ravel() for a in used]))
    return ids[ids >= 0]


def _word(ids: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    return packed(np.where(tokens < 0, 0, np.searchsorted(ids, tokens) + 1))


def _windows(
    found: Harvest, rows: slice, shown: tuple[int | None, int | None], word: Callable
) -> dict[str, Any]:
    """Text around what some components are on at."""
    top, random = shown
    return {
        name: {"tokens": word(tokens[rows, :n]), "activity": packed(quantised(g[rows, :n]))}
        for name, tokens, g, n in (
            ("top", found.top_tokens, found.top_activity, top),
            ("random", found.random_tokens, found.random_activity, random),
        )
    }


def _data(
    source: TextSource,
    passages: Reading | None,
    shown: tuple[int, int],
    ids: np.ndarray | None = None,
) -> dict[str, Any]:
    """What the page's scripts read. ids: the tokens that are named; None: those in it."""
    found, of, made = source.harvest, source.source, source.effects
    ids = _ids(source, passages, shown) if ids is None else ids

    def word(tokens: np.ndarray) -> dict[str, Any]:
        return _word(ids, tokens)

    def pair(tokens: np.ndarray, value: np.ndarray, **more: np.ndarray) -> dict[str, Any]:
        return {"token": word(tokens), "value": packed(value)} | {
            name: packed(array) for name, array in more.items()
        }

    site, share = _sites(of.decomposition)
    data = {
        "num_components": found.num_components,
        "words": ["", *map(of.words or str, ids.tolist())],
        "labels": [source.labels.get(c, "") for c in range(found.num_components)],
        "sites": list(of.decomposition.components.factors),
        "site": packed(site),
        "site_share": packed(share),
        "rate": packed(found.firing_rate),
        "mean": packed(found.mean_activity),
        "input": pair(found.input_token, found.input_pmi, count=found.input_count),
        "next": pair(found.next_token, found.next_pmi, count=found.next_count),
        "up": made and pair(made.up_token, made.up),
        "down": made and pair(made.down_token, made.down),
        "others": {"number": packed(found.coactive + 1), "share": packed(found.coactive_share)},
        "attention": source.attention
        and dict(zip(("queries", "keys"), map(_attention, source.attention), strict=True)),
        "group": None if source.groups is None else packed(source.groups),
        "passages": None,
        "shards": None,
        "losses": drawn.losses(of.decomposition.history, None),
    } | _windows(found, slice(None), shown, word)
    if passages is not None:
        arrays = {n: packed(getattr(passages, n)) for n in ("starts", "component", "activity")}
        data["passages"] = {"tokens": word(passages.tokens)} | arrays
    return data


def _attention(found: Partners) -> dict[str, Any]:
    """number: from 1. peak: max |S(τ)|; level: S(τ) in 127ths of it, and 128 for 0."""
    peak = np.abs(found.values).max(axis=2)
    level = 128 + np.rint(127 * found.values / np.maximum(peak, 1e-30)[..., None])
    return {
        "number": packed(found.component + 1),
        "layer": packed(found.layer),
        "head": packed(found.head),
        "peak": packed(peak),
        "level": packed(level.astype(int)),
    }


def packed(array: np.ndarray) -> dict[str, Any]:
    """An array in the smallest kind of number that holds it, deflated; see `apd.unpack`."""
    kind = "f4"
    if not np.issubdtype(array.dtype, np.floating):
        largest = int(array.max(initial=0))
        kind = next(k for k, bits in (("u1", 8), ("u2", 16), ("u4", 32)) if largest < 2**bits)
    content = np.ascontiguousarray(array, dtype=f"<{kind}").tobytes()
    deflated = base64.b64encode(zlib.compress(content, 9)).decode()
    return {"shape": list(array.shape), "kind": kind, "z": deflated}


def _as_tokens(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or not np.issubdtype(x.dtype, np.integer):
        raise InputError(f"passages are tokens, integers [B, T]; got {x.dtype} {x.shape}.")
    return x


def _passages(decomposition: Decomposition, tokens: np.ndarray, found: Harvest) -> Reading | None:
    """As many of the rows as there is room for."""
    whole = read(decomposition, _as_tokens(tokens).astype(np.int32), found.threshold)
    T = tokens.shape[1]
    ends = whole.starts[::T]  # pairs before each row
    count = int(np.searchsorted(ends, MOST_PAIRS, side="right")) - 1
    if count < 1:
        return None
    n = ends[count]
    starts = whole.starts[: count * T + 1]
    return Reading(whole.tokens[:count], starts, whole.component[:n], whole.activity[:n])


def _sites(decomposition: Decomposition) -> tuple[np.ndarray, np.ndarray]:
    """The sites of every component's largest shares of a weight's norm, from 1, and the shares."""
    components, params = decomposition.components, decomposition.problem.params
    leaves = components_lib.decomposed_leaves(components, params)
    squares = components_lib.squared_norms(components)
    shares = np.stack(
        [
            np.sqrt(np.maximum(square, 0)) / max(float(np.linalg.norm(leaves[name])), 1e-12)
            for name, square in squares.items()
        ],
        axis=1,
    )
    numbers = {name: i + 1 for i, name in enumerate(components.factors)}
    place = np.array([numbers[name] for name in squares])
    order = np.argsort(-shares, axis=1, kind="stable")[:, :MOST_SITES]
    share = np.take_along_axis(shares, order, axis=1)
    there = share > 0.01 * np.maximum(share[:, :1], 1e-12)
    return np.where(there, place[order], 0), np.where(there, share, 0).astype(np.float32)


def _tiles(metrics: Mapping[str, Any], found: Harvest) -> list[tuple[str, str, str]]:
    """The few most important numbers: (value, what it is, what a good value is)."""
    tiles = []
    rounded = "rounded_0" if "ce_rounded_0" in metrics else "gates"
    if f"delta_ce_{rounded}" in metrics:
        nats = f"{metrics[f'delta_ce_{rounded}']:+.2f}"
        tiles.append((nats, "nats of cross-entropy, with what is on alone", "good: near 0"))
    if f"ce_recovered_{rounded}" in metrics:
        share = f"{metrics[f'ce_recovered_{rounded}']:.0%}"
        what = "of the cross-entropy recovered, from matrices at zero to the target"
        tiles.append((share, what, "good: near 100 %"))
    rate, C = float(found.firing_rate.sum()), found.num_components
    tiles.append((f"{rate:.3g} of {C:,}", "components on at a word, on average", "good: few"))
    alive = int((found.firing_rate > 0).sum())
    tiles.append((f"{alive:,}", "components that are ever on", ""))
    return tiles


def as_json(reading: Reading, places: Int[np.ndarray, " n"], names: list[str]) -> str:
    """Some positions b·T + t of a reading for `apd.reader`: their words, and what is on at each.

    seams: where rows begin, whose text was read without that before.
    """
    spans = [np.arange(*reading.starts[[place, place + 1]]) for place in places]
    kept, rows = np.concatenate(spans), places // reading.tokens.shape[1]
    return json.dumps(
        {
            "words": names,
            "starts": np.cumsum([0, *map(len, spans)]).tolist(),
            "component": reading.component[kept].tolist(),
            "activity": reading.activity[kept].tolist(),
            "seams": (np.flatnonzero(np.diff(rows)) + 1).tolist(),
        }
    )
