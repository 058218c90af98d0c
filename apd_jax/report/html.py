"""`report.html`: one decomposition as one file that opens from disk, and the data that stands in it.

`write` measures, packs and renders; the templates, the style sheet and the scripts lie in `page/`. Arrays travel as base64 float32.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jinja2
import numpy as np
from etils import epath
from jaxtyping import PyTree

from apd_jax import components as components_lib
from apd_jax import losses as losses_lib
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.evaluation import components_view
from apd_jax.evaluation.components_view import Behaviour, Matrix
from apd_jax.report import panel, tables
from apd_jax.targets.base import FeatureTarget, Target
from apd_jax.train.workdir import flat

LARGEST_PAGE = 5_000_000  # bytes; a page above it goes without the live panel
MATRIX_BYTES = 1_200_000  # for the components' matrices, which are shown in part if they need more
SIDES = (64, 48, 32, 24, 16, 12, 8)  # rows and columns shown of a matrix: as many as fit
MAX_MAP = (128, 256)  # inputs and components of the attribution map
MAX_INPUT = 4096  # entries of an input that is shown
MAX_POINTS = 400  # of a loss curve


@dataclasses.dataclass(frozen=True)
class Source:
    """What a report is made from. Only the decomposition (of one instance) must be known; what else is, is shown."""

    name: str
    decomposition: Decomposition
    x: PyTree = None  # inputs [B, ...]; None: nothing that needs inputs is shown
    target: Target | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the config, nested
    metrics: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # with the provenance: step, seed, device, minutes
    arrays: Mapping[str, np.ndarray] = dataclasses.field(
        default_factory=dict
    )  # of the evaluation, for targets made of features
    evidence: Mapping[str, Any] | None = None  # see evidence.json
    evidence_command: str = ""  # what makes the evidence, where there is none yet
    figures: Sequence[str] = ()  # paths from the page
    instances: Sequence[
        tuple[str, str]
    ] = ()  # (label, path from the page) of every instance, if there are several
    instance: int = 0


def write(path: epath.PathLike, source: Source) -> epath.Path:
    """Measures what the page shows and writes it. Cost: that of `components_view`, and of `panel.build` where there is a panel."""
    page = collect(source)
    panel, page["data"]["panel"] = encode(page["data"]["panel"]), None
    text = render("report.html", page)
    if panel:
        size = (len(text.encode()) + len(json.dumps(panel))) / 1e6
        if size <= LARGEST_PAGE / 1e6:
            page["data"]["panel"] = panel
        else:
            page["no_panel"] = (
                f"There is no live panel: with this network's weights the page would have {size:.1f} MB, above its limit of "
                f"{LARGEST_PAGE / 1e6:.0f} MB."
            )
        text = render("report.html", page)
    return save(path, text)


def collect(source: Source) -> dict[str, Any]:
    """All that the template shows, and under "data" what the page's scripts read."""
    d = source.decomposition
    C, x = d.components.num_components, source.x
    norms = {
        name: np.sqrt(np.maximum(square, 0))
        for name, square in jax.device_get(components_lib.squared_norms(d.components)).items()
    }
    ranks = jax.device_get(components_lib.effective_ranks(d.components))
    leaves = {
        name: float(np.linalg.norm(leaf))
        for name, leaf in components_lib.decomposed_leaves(d.components, d.problem.params).items()
    }
    acts = None if x is None else components_view.behaviour(d, x)
    if acts is not None and "firing_rates" in source.arrays:  # from more inputs than the page's
        acts = dataclasses.replace(acts, firing_rates=source.arrays["firing_rates"])
    is_features = (
        isinstance(source.target, FeatureTarget) and "attributions_one_hot" in source.arrays
    )
    whole = np.sqrt(np.sum([norm**2 for norm in norms.values()], axis=0))
    matrices, pages = _matrices(source, whole)
    data = {
        "components": [
            {
                "norms": [float(norms[name][c] / max(leaves[name], 1e-12)) for name in leaves],
                "ranks": [int(ranks[name][c]) for name in leaves],
                "rank": int(sum(rank[c] for rank in ranks.values())),
                "serves": _serves(source, acts, c, bool(whole[c] > 0.01 * whole.max())),
                **(
                    {}
                    if acts is None
                    else {
                        "firing_rate": float(acts.firing_rates[c]),
                        "damage": float(acts.damage[c]),
                    }
                ),
                "page": pages.index(c) if c in pages else None,
            }
            for c in range(C)
        ],
        "leaves": list(leaves),
        "matrices": matrices,
        "behaviour": None if acts is None else _behaviour(acts, x),
        "map": _map(source, acts, is_features),
        "losses": losses(d.history, source.instance if source.instances else None),
        "panel": None,
        "unit": "nats" if d.config.minimality_loss == "kl" else "mean squared error",
        "output": "feature" if is_features else "output",
        "input": "feature" if is_features else "input",
    }
    no_panel = "There is a live panel for networks that are a chain of layers on a vector of inputs; this one has none."
    if source.target is not None and source.target.layers and acts is not None:
        data["panel"], no_panel = panel.build(source.target, d, x, acts.cut), ""
    return {
        "source": source,
        "data": data,
        "no_panel": no_panel,
        "headline": _headline(source),
        "tiles": _tiles(source.metrics, acts, C, data["unit"]),
        "metrics": tables.result_rows(source.metrics, others=True),
        "settings": sorted(flat(source.settings).items()),
        "evidence": _evidence(source),
        "num_examples": 0 if x is None else len(jax.tree.leaves(x)[0]),
        "num_pages": len(pages),
        "paired": C <= 16
        and len(leaves) <= 2,  # small enough for table and map to stand side by side
        "side": max(len(m["target_rows"]) for m in matrices),
        "cut_short": any(
            len(m["target_rows"]) < m["shape"][0] or len(m["target_columns"]) < m["shape"][1]
            for m in matrices
        ),
    }


# Rendering


def render(template: str, page: Mapping[str, Any]) -> str:
    """A template of `page/` with its style and scripts inside; every value is escaped."""
    folder = importlib.resources.files("apd_jax.report") / "page"

    def inside(name: str) -> str:
        text = (folder / name).read_text(encoding="utf-8")
        assert "</script" not in text and "</style" not in text, (
            name
        )  # it would end the element that it stands in
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
    """Arrays as {"shape", "f32": base64 of little-endian float32}; numbers that JSON does not know as None."""
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
    path = epath.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose another place."
        ) from error
    return path


# What is said in words


def _headline(source: Source) -> str:
    d, metrics = source.decomposition, source.metrics
    kind = f"the network {source.target.name}" if source.target else "a network"
    shapes = ", ".join(
        f"{name} {'×'.join(map(str, f.shape))}"
        for name, f in list(d.components.factors.items())[:4]
    )
    more = len(d.components.factors) - 4
    said = f"{d.components.num_components} parameter components of {kind} ({shapes}{f' and {more} more leaves' if more > 0 else ''})"
    steps = (
        f"{metrics['total_steps']:,} steps in {metrics['num_stages']} stages"
        if metrics.get("num_stages", 1) > 1
        else ""
    )
    steps = steps or (f"{metrics['step']:,} steps" if "step" in metrics else "")
    trained = [steps, f"seed {metrics['seed']}" if "seed" in metrics else ""]
    device = (
        f"on {metrics['num_devices']} {metrics['device']} device{'s' * (metrics['num_devices'] > 1)}"
        if "device" in metrics
        else ""
    )
    minutes = (
        f"in {metrics['minutes_decomposition']:.1f} minutes"
        if "minutes_decomposition" in metrics
        else ""
    )
    trained = ", ".join(filter(None, [*trained, " ".join(filter(None, [minutes, device]))]))
    return f"{said}." + (f" Trained for {trained}." if trained else "")


def _tiles(
    metrics: Mapping[str, Any], acts: Behaviour | None, C: int, unit: str
) -> list[tuple[str, str, str]]:
    """(value, what it is, what good looks like) of the few numbers that say most."""
    tiles = []
    if "num_features_owned" in metrics:
        whole = metrics["num_features"]
        tiles.append(
            (
                f"{metrics['num_features_owned']:.3g} of {whole:.3g}",
                "features have a component of their own",
                "good: all",
            )
        )
    if "relative_parameter_error" in metrics:
        tiles.append(
            (
                f"{metrics['relative_parameter_error']:.2g}",
                "of the weights (squared) is missing in the sum",
                "good: 0.001 or less",
            )
        )
    if "minimality_topk" in metrics and "minimality_none" in metrics:
        share = metrics["minimality_topk"] / max(metrics["minimality_none"], 1e-30)
        tiles.append(
            (
                f"{share:.2g}",
                f"{unit} to the target when sparse, over that of no component",
                "good: near 0",
            )
        )
    elif "minimality_topk" in metrics:
        tiles.append(
            (
                f"{metrics['minimality_topk']:.2g}",
                f"{unit} to the target when sparse",
                "good: near 0",
            )
        )
    active = metrics.get(
        "mean_active_components", None if acts is None else float(acts.firing_rates.sum())
    )
    if active is not None:
        tiles.append(
            (f"{active:.2g} of {C}", "components needed per input, on average", "good: few")
        )
    if "num_features_owned" not in metrics and "num_alive_components" in metrics:
        tiles.append(
            (
                f"{metrics['num_alive_components']:.3g} of {C}",
                "components are alive",
                "good: a sharp cut",
            )
        )
    return tiles


def _evidence(source: Source) -> dict[str, Any] | None:
    """The card: the counts, and the checks with the failed ones first."""
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
    """What a component is for, in a word or two; empty for a dead one."""
    a = source.arrays
    if "feature_of_component" in a and "attributions_one_hot" in a:
        if a["feature_of_component"][c] < 0:
            return ""
        column = a["attributions_one_hot"][:, c]
        served = [f for f in np.argsort(-column) if column[f] > 0.5 * column.max()][:3]
        return f"feature{'s' * (len(served) > 1)} " + ", ".join(map(str, served))
    if acts is None or not has_norm or acts.firing_rates[c] == 0:
        return ""
    change = np.abs(acts.change[c])
    largest = [o for o in np.argsort(-change) if change[o] > 0.5 * change.max()][:3]
    return (
        f"output{'s' * (len(largest) > 1)} " + ", ".join(map(str, largest))
        if change.max() > 0
        else ""
    )


# What is drawn


def _matrices(source: Source, whole: np.ndarray) -> tuple[list[dict[str, Any]], list[int]]:
    """The matrices as far as they fit, and the components that they are given of: all, or those with the largest norm."""
    d, a, C = source.decomposition, source.arrays, len(whole)
    shapes = [
        (f.U.shape[-2], f.V.shape[-1])
        for f in d.components.factors.values()
        for _ in range(math.prod(f.U.shape[1:-2]))
    ]
    shapes += [a["feature_weights_target"].shape] if "feature_weights_target" in a else []
    each = {
        side: sum(min(rows, side) * min(columns, side) for rows, columns in shapes) * 16 / 3
        for side in SIDES
    }  # bytes, in base64
    side = next((side for side in SIDES if C * each[side] <= MATRIX_BYTES), SIDES[-1])
    pages = np.sort(np.argsort(-whole)[: max(1, int(MATRIX_BYTES / each[side]))])
    found = components_view.matrices(d, side)
    if (
        "feature_weights_target" in a and a["feature_weights_target"].shape != found[0].shape
    ):  # else it is the leaf itself
        names = [f"feature_weights_{part}" for part in ("components", "target", "sum")]
        parts, target, total = (jax.numpy.asarray(a[name]) for name in names)
        found.insert(
            0,
            components_view.shown(
                "feature to neuron to feature", parts, lambda one: one, target, total, side
            ),
        )
    return [_packed(matrix, pages) for matrix in found], pages.tolist()


def _packed(matrix: Matrix, pages: np.ndarray) -> dict[str, Any]:
    fields = dataclasses.asdict(matrix)
    for name in ("rows", "columns", "values", "row_norms", "column_norms"):
        fields[name] = fields[name][pages]
    return {
        **fields,
        "target_rows": matrix.target_rows.tolist(),
        "target_columns": matrix.target_columns.tolist(),
        "shape": list(matrix.shape),
    }


def _behaviour(acts: Behaviour, x: PyTree) -> dict[str, Any]:
    """The examples that some component needs most, each once, and the change of the outputs."""
    used, index = np.unique(acts.examples, return_inverse=True)
    index = index.reshape(acts.examples.shape)
    strongest = acts.attributions.reshape(
        len(acts.attributions), -1, acts.attributions.shape[-1]
    ).max(axis=1)
    kept = np.any(
        (acts.mask & (acts.attributions > 0)).reshape(strongest.shape[0], -1, strongest.shape[1]),
        axis=1,
    )
    each = np.arange(len(acts.examples))[:, None]
    top = np.argsort(-np.abs(acts.change), axis=1)[:, :10]
    leaf = jax.tree.leaves(x)[0] if len(jax.tree.leaves(x)) == 1 else None
    kind, inputs = "other", None
    if leaf is not None and leaf[0].size <= MAX_INPUT:
        inputs, shape = np.asarray(leaf)[used], leaf.shape[1:]
        if len(shape) == 2 or (len(shape) == 3 and shape[-1] == 1):
            kind, inputs = "image", inputs.reshape(-1, *shape[:2])
        elif len(shape) < 2:
            kind, inputs = (
                "tokens" if np.issubdtype(inputs.dtype, np.integer) else "vector",
                inputs.reshape(len(used), -1),
            )
    per_position = acts.attributions.ndim == 3
    positions = (
        np.asarray(acts.attributions[acts.examples, :, each]).argmax(axis=-1).tolist()
        if per_position
        else None
    )
    return {
        "kind": kind,
        "inputs": None if kind == "other" else inputs,
        "examples": index.tolist(),
        "attributions": strongest[acts.examples, each],
        "kept": kept[acts.examples, each].tolist(),
        "positions": positions,
        "outputs": top.tolist(),
        "change": np.take_along_axis(acts.change, top, axis=1),
    }


def _map(source: Source, acts: Behaviour | None, is_features: bool) -> dict[str, Any] | None:
    """Attributions of inputs (rows) by component (columns), both ordered so that what belongs together stands together."""
    if is_features:
        rows, label = source.arrays["attributions_one_hot"], "feature alone in the input"
    elif acts is not None:
        rows, label = (
            acts.attributions.reshape(len(acts.attributions), -1, acts.attributions.shape[-1]).max(
                axis=1
            ),
            "input",
        )
    else:
        return None
    columns = np.argsort(-rows.max(axis=0), kind="stable")[: MAX_MAP[1]]
    names = np.argsort(-rows.max(axis=1), kind="stable")[: MAX_MAP[0]]
    names = (
        np.sort(names)
        if is_features
        else names[np.argsort(rows[names].argmax(axis=1), kind="stable")]
    )
    main = rows[names].argmax(axis=0)[columns]
    columns = columns[np.argsort(main, kind="stable")] if is_features else np.sort(columns)
    return {
        "values": rows[np.ix_(names, columns)],
        "rows": names.tolist(),
        "columns": columns.tolist(),
        "label": label,
    }


def losses(
    history: Sequence[Mapping[str, Any]], instance: int | None = None
) -> list[dict[str, Any]]:
    """{name, step, value} of every loss in the log, thinned to MAX_POINTS steps. instance: the one of several that is drawn."""
    rows = (
        history
        if len(history) <= MAX_POINTS
        else [history[i] for i in np.linspace(0, len(history) - 1, MAX_POINTS).astype(int)]
    )
    names = ("total", *losses_lib.TERMS)
    read = []
    for row in rows:
        for name in filter(row.__contains__, names):
            value = row[name]
            if isinstance(value, list):
                value = 0.0 if instance is None else value[instance]  # 0 is not drawn
            read.append((name, row["step"], value))
    return [
        {"name": name.replace("_", " "), "step": step, "value": value}
        for name, step, value in read
        if value > 0
    ]
