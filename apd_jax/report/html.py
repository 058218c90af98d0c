"""`report.html`: one decomposition as one file that opens from disk.

`write` measures what the page shows, packs it and renders the page. Templates, style sheet and
scripts are in `page/`. Arrays are embedded as base64 of float32.

Shapes: B examples, T positions (only with a mask per position), C components.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jinja2
import numpy as np
from etils import epath
from jaxtyping import PyTree

from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.evaluation import components_view
from apd_jax.evaluation.components_view import Behaviour
from apd_jax.network.takes import taken
from apd_jax.paths import user_path
from apd_jax.report import drawn, panel, tables, words
from apd_jax.report.source import Sizes, Source
from apd_jax.targets.base import FeatureTarget
from apd_jax.targets.scoring import large_components
from apd_jax.train.workdir import flat

_UNITS = {"kl": "nats", "mse": "mean squared error"}
MOST_ROWS = 2**20  # examples (positions) that run without one component, of all components
LEAST_EXAMPLES = 3  # that a page has in any case
LARGEST_PAGE = 5_000_000  # bytes; the live panel is left out of a page that would be larger


def write(path: epath.PathLike, source: Source) -> epath.Path:
    """Measures what the page shows and writes it.

    Cost: that of `components_view`, and of `panel.build` where there is a live panel.
    """
    page = collect(source)
    panel, page["data"]["panel"] = encode(page["data"]["panel"]), None
    text = render("report.html", page)
    if panel:
        size = (len(text.encode()) + len(json.dumps(panel))) / 1e6
        if size <= LARGEST_PAGE / 1e6:
            page["data"]["panel"] = panel
        else:
            page["no_panel"] = (
                "There is no live panel: with this network's weights the page would have "
                f"{size:.1f} MB, above its limit of {LARGEST_PAGE / 1e6:.0f} MB."
            )
        text = render("report.html", page)
    return save(path, text)


def report(
    decomposition: Decomposition, path: epath.PathLike, x: PyTree = None, tokens: Any = None
) -> epath.Path:
    """Writes one HTML file that shows every component.

    Its weights, the inputs that need it, and what it changes in the outputs.

    Args:
      path: the file, e.g. "report.html".
      x: inputs [B, ...] on which this is measured. None takes one batch of the training data, if
        the decomposition has a sampler.
      tokens: names for the numbers of integer inputs, and for outputs, of which there is then one
        for every token: a tokenizer or a list, see `apd_jax.report.words.of`.
    Raises:
      InputError: the decomposition holds several instances; choose one by `instance`. The network
        does not take x. A list of names is too short or too long.
    Cost: the gate, and for every component a forward pass, of the first examples of x: MOST_ROWS
    in all, or LEAST_EXAMPLES.
    """
    d, count = decomposition, decomposition.method.num_instances
    if count > 1:
        raise InputError(
            f"this holds {count} decompositions; report one of them, "
            "e.g. .instance(0).report(path)."
        )
    path = user_path(path)
    if x is not None:
        x = taken(d.problem.apply_fn, d.problem.params, x)
    elif d.problem.sample_fn is not None:
        x = d.problem.example_batch(jax.random.key(d.method.seed))
    metrics = {"seed": d.method.seed} | ({"step": d.history[-1]["step"]} if d.history else {})
    name = path.resolve().parent.name if path.stem == "report" else path.stem
    settings = {"apd": d.method.to_dict()}
    named = words.fitting(tokens, d, x)
    return write(path, Source(name, d, x, settings=settings, metrics=metrics, words=named))


def collect(source: Source) -> dict[str, Any]:
    """All that the template shows, and under "data" what the page's scripts read."""
    source = dataclasses.replace(source, x=_affordable(source))
    d = source.decomposition
    C, x = d.components.num_components, source.x
    sizes, acts = Sizes.of(d), _measured(source)
    is_features = (
        isinstance(source.target, FeatureTarget) and "attributions_one_hot" in source.arrays
    )
    matrices, pages = drawn.matrices(source, sizes.whole)
    large = large_components(sizes.whole)
    data = {
        "components": [
            {
                **_component(source, sizes, acts, c, bool(large[c])),
                "page": pages.index(c) if c in pages else None,
            }
            for c in range(C)
        ],
        "leaves": list(sizes.target),
        "matrices": matrices,
        "behaviour": None if acts is None else drawn.behaviour(acts, x, source.words),
        "map": drawn.attribution_map(source, acts, is_features),
        "losses": drawn.losses(d.history, source.instance if source.instances else None),
        "panel": None,
        "unit": _UNITS.get(str(d.method.distance), "units of the loss"),
        "output": "feature" if is_features else "output",
        "input": "feature" if is_features else "input",
    }
    no_panel = (
        "There is a live panel for networks that are a chain of layers on a vector of inputs; this "
        "one has none."
    )
    if source.target is not None and source.target.layers and acts is not None:
        data["panel"], no_panel = panel.build(source.target, d, x, acts.cut), ""
    return {
        "source": source,
        "data": data,
        "no_panel": no_panel,
        "headline": headline(source),
        "tiles": _tiles(source, acts, C, data["unit"]),
        "metrics": tables.result_rows(source.metrics, others=True),
        "settings": sorted(flat(source.settings).items()),
        "evidence": evidence_card(source),
        "num_examples": 0 if x is None else len(jax.tree.leaves(x)[0]),
        "num_pages": len(pages),
        # whether table and map are small enough to stand side by side
        "paired": C <= 16 and len(sizes.target) <= 2,
        "side": max(len(m["target_rows"]) for m in matrices),
        "cut_short": any(
            len(m["target_rows"]) < m["shape"][0] or len(m["target_columns"]) < m["shape"][1]
            for m in matrices
        ),
    }


def _affordable(source: Source) -> PyTree:
    """The first of the page's examples: what every component does is a pass of them for each."""
    d, x = source.decomposition, source.x
    if x is None:
        return None
    first = jax.tree.leaves(x)[0]
    positions = math.prod(first.shape[1:2]) if d.method.per_position else 1
    count = max(MOST_ROWS // (d.components.num_components * positions), LEAST_EXAMPLES)
    return x if count >= len(first) else jax.tree.map(lambda a: a[:count], x)


def _measured(source: Source) -> Behaviour | None:
    """How the components act on the source's inputs; None without inputs."""
    if source.x is None:
        return None
    acts = components_view.behaviour(source.decomposition, source.x)
    if "firing_rates" in source.arrays:  # measured on more inputs than the page's
        acts = dataclasses.replace(acts, firing_rates=source.arrays["firing_rates"])
    return acts


def _component(
    source: Source, sizes: Sizes, acts: Behaviour | None, c: int, is_large: bool
) -> dict[str, Any]:
    """One row of the page's table of components. Norms are over those of the target's leaves."""
    row = {
        "norms": [float(sizes.norms[n][c] / max(norm, 1e-12)) for n, norm in sizes.target.items()],
        "ranks": [int(sizes.ranks[name][c]) for name in sizes.target],
        "rank": int(sum(rank[c] for rank in sizes.ranks.values())),
        "serves": _serves(source, acts, c, is_large),
    }
    if acts is not None:
        row |= {"firing_rate": float(acts.firing_rates[c]), "damage": float(acts.damage[c])}
    return row


# Rendering


def render(template: str, page: Mapping[str, Any]) -> str:
    """A template of `page/`, with style and scripts put into it. Every value is escaped."""
    folder = importlib.resources.files("apd_jax.report") / "page"

    def inside(name: str) -> str:
        text = (folder / name).read_text(encoding="utf-8")
        # Either tag would end the element that the text stands in.
        assert "</script" not in text and "</style" not in text, name
        return text

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("apd_jax.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = lambda value: (
        tables.number(value) if isinstance(value, int | float) else str(value)
    )
    environment.globals["inside"] = inside
    return environment.get_template(template).render({**page, "data": encode(page["data"])})


def encode(value: Any) -> Any:
    """A value as JSON can hold it.

    Arrays become {"shape", "f32": base64 of little-endian float32}; NaN and infinity become None.
    """
    if isinstance(value, np.ndarray | jax.Array):
        flat = np.ascontiguousarray(value, dtype="<f4")
        return {"shape": list(flat.shape), "f32": base64.b64encode(flat.tobytes()).decode()}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def save(path: epath.PathLike, text: str) -> epath.Path:
    """Writes a page.

    Raises:
      InputError: the file cannot be written.
    """
    path = user_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose another place."
        ) from error
    return path


# What is said in words


def headline(source: Source) -> str:
    """What was decomposed, and how long it was trained."""
    d = source.decomposition
    kind = f"the network {source.target.name}" if source.target else "a network"
    shapes = ", ".join(
        f"{name} {'×'.join(map(str, f.shape))}"
        for name, f in list(d.components.factors.items())[:4]
    )
    if (more := len(d.components.factors) - 4) > 0:
        shapes += f" and {more} more leaves"
    said = f"{d.components.num_components} parameter components of {kind} ({shapes})."
    trained = _training(source.metrics)
    return said + (f" Trained for {trained}." if trained else "")


def _training(metrics: Mapping[str, Any]) -> str:
    """Steps, seed, minutes and devices, as far as they are known."""
    steps = seed = minutes = device = ""
    if metrics.get("num_stages", 1) > 1:
        steps = f"{metrics['total_steps']:,} steps in {metrics['num_stages']} stages"
    elif "step" in metrics:
        steps = f"{metrics['step']:,} steps"
    if "seed" in metrics:
        seed = f"seed {metrics['seed']}"
    if "minutes_decomposition" in metrics:
        minutes = f"in {metrics['minutes_decomposition']:.1f} minutes"
    if "device" in metrics:
        n = metrics["num_devices"]
        device = f"on {n} {metrics['device']} device{'s' * (n > 1)}"
    where = " ".join(filter(None, [minutes, device]))
    return ", ".join(filter(None, [steps, seed, where]))


def _tiles(source: Source, acts: Behaviour | None, C: int, unit: str) -> list[tuple[str, str, str]]:
    """The few most important numbers: (value, what it is, what a good value is)."""
    tiles, metrics = [], source.metrics
    if "num_features_owned" in metrics:
        owned = f"{metrics['num_features_owned']:.3g} of {metrics['num_features']:.3g}"
        tiles.append((owned, "features have a component of their own", "good: all"))
    if "relative_parameter_error" in metrics:
        error = f"{metrics['relative_parameter_error']:.2g}"
        what = "of the weights (squared) is missing in the sum"
        tiles.append((error, what, "good: 0.001 or less"))
    if "minimality_topk" in metrics:
        loss, what = metrics["minimality_topk"], f"{unit} to the target when sparse"
        if "minimality_none" in metrics:
            loss /= max(metrics["minimality_none"], 1e-30)
            what += ", over that of no component"
        tiles.append((f"{loss:.2g}", what, "good: near 0"))
    active = metrics.get(
        "mean_active_components", None if acts is None else float(acts.firing_rates.sum())
    )
    if active is not None:
        per = "position" if source.decomposition.method.per_position else "input"
        what = f"components needed per {per}, on average"
        tiles.append((f"{active:.2g} of {C}", what, "good: few"))
    if "num_features_owned" not in metrics and "num_alive_components" in metrics:
        alive = f"{metrics['num_alive_components']:.3g} of {C}"
        tiles.append((alive, "components are alive", "good: a sharp cut"))
    return tiles


def evidence_card(source: Source) -> dict[str, Any] | None:
    """The content of the evidence card, with the failed checks first, and the counts."""
    evidence = source.evidence
    if evidence is not None and "instances" in evidence:
        evidence = dict(enumerate(evidence["instances"])).get(source.instance)
    if evidence is None:
        return None
    checks = sorted(
        evidence["checks"],
        key=lambda check: (check["passed"] is not False, check["passed"] is None, check["number"]),
    )
    counts = {
        key: sum(check["passed"] is passed for check in checks)
        for key, passed in (("passed", True), ("failed", False), ("open", None))
    }
    return {"provenance": {}, **evidence, "checks": checks, "counts": counts}


def _serves(source: Source, acts: Behaviour | None, c: int, has_norm: bool) -> str:
    """The features that a component serves, or the outputs that it changes; "" for a dead one.

    At most three: those with more than half of the largest attribution, or of the largest change.
    """
    a = source.arrays
    if "feature_of_component" in a and "attributions_one_hot" in a:
        if a["feature_of_component"][c] < 0:
            return ""
        column = a["attributions_one_hot"][:, c]
        served = [f for f in np.argsort(-column)[:3] if column[f] > 0.5 * column.max()]
        return f"feature{'s' * (len(served) > 1)} " + ", ".join(map(str, served))
    if acts is None or not has_norm or acts.firing_rates[c] == 0:
        return ""
    change = np.abs(acts.change[c])
    largest = [o for o in np.argsort(-change)[:3] if change[o] > 0.5 * change.max()]
    if not change.max() > 0:
        return ""
    name = words.of_outputs(source.words, source.x, len(change)) or str
    names = [name(int(o)) for o in largest]
    return f"output{'s' * (len(largest) > 1)} " + ", ".join(names)
