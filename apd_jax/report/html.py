"""`report.html`: one decomposition as one file that opens from disk.

`write` measures what the page shows, packs it and renders the page. Templates, style sheet and
scripts are in `page/`. Arrays are embedded as base64 of float32.

Shapes: B examples, T positions (only with a mask per position), C components.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
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
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.evaluation import components_view
from apd_jax.evaluation.components_view import Behaviour, Matrix
from apd_jax.report import panel, tables
from apd_jax.targets.base import FeatureTarget, Target
from apd_jax.targets.scoring import large_components
from apd_jax.train.progress import loss_names
from apd_jax.train.workdir import flat

LARGEST_PAGE = 5_000_000  # bytes; the live panel is left out of a page that would be larger
MATRIX_BYTES = 1_200_000  # for the components' matrices, which are shown in part if they need more
SIDES = (64, 48, 32, 24, 16, 12, 8)  # rows and columns shown of a matrix: the first that fits
MAX_MAP = (128, 256)  # inputs and components of the attribution map
MAX_INPUT = 4096  # entries of an input that is shown
MAX_POINTS = 400  # of a loss curve


@dataclasses.dataclass(frozen=True)
class Source:
    """What a report is made from.

    Only the name and the decomposition (of one instance) are needed. The page leaves out what
    depends on fields that are not given.
    """

    name: str
    decomposition: Decomposition
    x: PyTree = None  # inputs [B, ...]
    target: Target | None = None
    # the config, nested
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # metrics of the evaluation, and with them step, seed, device and minutes
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # arrays of the evaluation, for targets whose inputs are features
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    evidence: Mapping[str, Any] | None = None  # the content of evidence.json
    evidence_command: str = ""  # the command that makes the evidence, where there is none yet
    figures: Sequence[str] = ()  # paths relative to the page
    # (label, path relative to the page) of every instance, if there are several
    instances: Sequence[tuple[str, str]] = ()
    instance: int = 0


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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Norms and effective ranks of all components."""

    norms: dict[str, np.ndarray]  # {site: [C]}
    ranks: dict[str, np.ndarray]  # {site: [C]}
    target: dict[str, float]  # {site: norm of the target's leaf}

    @classmethod
    def of(cls, d: Decomposition) -> Sizes:
        squares = jax.device_get(components_lib.squared_norms(d.components))
        leaves = components_lib.decomposed_leaves(d.components, d.problem.params)
        return cls(
            {name: np.sqrt(np.maximum(square, 0)) for name, square in squares.items()},
            jax.device_get(components_lib.effective_ranks(d.components)),
            {name: float(np.linalg.norm(leaf)) for name, leaf in leaves.items()},
        )

    @functools.cached_property
    def whole(self) -> np.ndarray:
        """Norm of every component over all its sites, [C]."""
        return np.sqrt(np.sum([norm**2 for norm in self.norms.values()], axis=0))


def report(decomposition: Decomposition, path: epath.PathLike, x: PyTree = None) -> epath.Path:
    """Writes one HTML file that shows every component.

    Its weights, the inputs that need it, and what it changes in the outputs.

    Args:
      path: the file, e.g. "report.html".
      x: inputs [B, ...] on which this is measured. None takes one batch of the training data, if
        the decomposition has a sampler.
    Raises:
      InputError: the decomposition holds several instances; choose one by `instance`.
    Cost: the gate on x, and a forward pass for every component.
    """
    d, count = decomposition, decomposition.method.num_instances
    if count > 1:
        raise InputError(
            f"this holds {count} decompositions; report one of them, "
            "e.g. .instance(0).report(path)."
        )
    path = epath.Path(path)
    if x is None and d.problem.sample_fn is not None:
        x = d.problem.example_batch(jax.random.key(d.method.seed))
    metrics = {"seed": d.method.seed} | ({"step": d.history[-1]["step"]} if d.history else {})
    name = path.resolve().parent.name if path.stem == "report" else path.stem
    return write(path, Source(name, d, x, settings={"apd": d.method.to_dict()}, metrics=metrics))


def collect(source: Source) -> dict[str, Any]:
    """All that the template shows, and under "data" what the page's scripts read."""
    d = source.decomposition
    C, x = d.components.num_components, source.x
    sizes, acts = Sizes.of(d), _measured(source)
    is_features = (
        isinstance(source.target, FeatureTarget) and "attributions_one_hot" in source.arrays
    )
    matrices, pages = _matrices(source, sizes.whole)
    data = {
        "components": [
            {
                **_component(source, sizes, acts, c),
                "page": pages.index(c) if c in pages else None,
            }
            for c in range(C)
        ],
        "leaves": list(sizes.target),
        "matrices": matrices,
        "behaviour": None if acts is None else _behaviour(acts, x),
        "map": _map(source, acts, is_features),
        "losses": losses(d.history, source.instance if source.instances else None),
        "panel": None,
        "unit": "nats" if d.method.minimality_loss == "kl" else "mean squared error",
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
        "headline": _headline(source),
        "tiles": _tiles(source.metrics, acts, C, data["unit"]),
        "metrics": tables.result_rows(source.metrics, others=True),
        "settings": sorted(flat(source.settings).items()),
        "evidence": _evidence(source),
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


def _measured(source: Source) -> Behaviour | None:
    """How the components act on the source's inputs; None without inputs."""
    if source.x is None:
        return None
    acts = components_view.behaviour(source.decomposition, source.x)
    if "firing_rates" in source.arrays:  # measured on more inputs than the page's
        acts = dataclasses.replace(acts, firing_rates=source.arrays["firing_rates"])
    return acts


def _component(source: Source, sizes: Sizes, acts: Behaviour | None, c: int) -> dict[str, Any]:
    """One row of the page's table of components. Norms are over those of the target's leaves."""
    is_large = bool(large_components(sizes.whole)[c])
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


def _tiles(
    metrics: Mapping[str, Any], acts: Behaviour | None, C: int, unit: str
) -> list[tuple[str, str, str]]:
    """The few most important numbers: (value, what it is, what a good value is)."""
    tiles = []
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
        what = "components needed per input, on average"
        tiles.append((f"{active:.2g} of {C}", what, "good: few"))
    if "num_features_owned" not in metrics and "num_alive_components" in metrics:
        alive = f"{metrics['num_alive_components']:.3g} of {C}"
        tiles.append((alive, "components are alive", "good: a sharp cut"))
    return tiles


def _evidence(source: Source) -> dict[str, Any] | None:
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
        served = [f for f in np.argsort(-column) if column[f] > 0.5 * column.max()][:3]
        return f"feature{'s' * (len(served) > 1)} " + ", ".join(map(str, served))
    if acts is None or not has_norm or acts.firing_rates[c] == 0:
        return ""
    change = np.abs(acts.change[c])
    largest = [o for o in np.argsort(-change) if change[o] > 0.5 * change.max()][:3]
    if not change.max() > 0:
        return ""
    return f"output{'s' * (len(largest) > 1)} " + ", ".join(map(str, largest))


# What is drawn


def _matrices(source: Source, whole: np.ndarray) -> tuple[list[dict[str, Any]], list[int]]:
    """The matrices of the components, and which components they are given for.

    Within MATRIX_BYTES: first fewer rows and columns are shown of each matrix, then only the
    components with the largest norm.

    Args:
      whole: norm of every component, [C].
    """
    d, a, C = source.decomposition, source.arrays, len(whole)
    shapes = [
        (f.U.shape[-2], f.V.shape[-1])
        for f in d.components.factors.values()
        for _ in range(math.prod(f.U.shape[1:-2]))
    ]
    shapes += [a["feature_weights_target"].shape] if "feature_weights_target" in a else []
    # Bytes of one component: 4 per entry, times 4/3 in base64.
    each = {
        side: sum(min(rows, side) * min(columns, side) for rows, columns in shapes) * 16 / 3
        for side in SIDES
    }
    side = next((side for side in SIDES if C * each[side] <= MATRIX_BYTES), SIDES[-1])
    pages = np.sort(np.argsort(-whole)[: max(1, int(MATRIX_BYTES / each[side]))])
    found = components_view.matrices(d, side)
    # With the shape of the first leaf, the feature weights are that leaf itself.
    if "feature_weights_target" in a and a["feature_weights_target"].shape != found[0].shape:
        names = [f"feature_weights_{part}" for part in ("components", "target", "sum")]
        parts, target, total = (jax.numpy.asarray(a[name]) for name in names)
        label = "feature to neuron to feature"
        own = components_view.shown(label, parts, lambda one: one, target, total, side)
        found.insert(0, own)
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
    """Per component: the examples with its largest attributions, and the change of the outputs.

    An example that several components need is embedded once.
    """
    used, index = np.unique(acts.examples, return_inverse=True)
    index = index.reshape(acts.examples.shape)
    strongest = _strongest(acts.attributions)
    kept = _strongest(acts.mask & (acts.attributions > 0))
    each = np.arange(len(acts.examples))[:, None]
    top = np.argsort(-np.abs(acts.change), axis=1)[:, :10]
    kind, inputs = _inputs(x, used)
    positions = None
    if acts.attributions.ndim == 3:  # one mask per position
        positions = np.asarray(acts.attributions[acts.examples, :, each]).argmax(axis=-1).tolist()
    return {
        "kind": kind,
        "inputs": inputs,
        "examples": index.tolist(),
        "attributions": strongest[acts.examples, each],
        "kept": kept[acts.examples, each].tolist(),
        "positions": positions,
        "outputs": top.tolist(),
        "change": np.take_along_axis(acts.change, top, axis=1),
    }


def _strongest(values: np.ndarray) -> np.ndarray:
    """[B, *T, C] -> [B, C], the largest over positions."""
    return values.reshape(len(values), -1, values.shape[-1]).max(axis=1)


def _inputs(x: PyTree, used: np.ndarray) -> tuple[str, np.ndarray | None]:
    """How the page draws inputs, and the used ones; ("other", None) if it does not draw them."""
    leaves = jax.tree.leaves(x)
    if len(leaves) != 1 or leaves[0][0].size > MAX_INPUT:
        return "other", None
    inputs, shape = np.asarray(leaves[0])[used], leaves[0].shape[1:]
    if len(shape) == 2 or (len(shape) == 3 and shape[-1] == 1):
        return "image", inputs.reshape(-1, *shape[:2])
    if len(shape) < 2:
        kind = "tokens" if np.issubdtype(inputs.dtype, np.integer) else "vector"
        return kind, inputs.reshape(len(used), -1)
    return "other", None


def _map(source: Source, acts: Behaviour | None, is_features: bool) -> dict[str, Any] | None:
    """Attributions of inputs (rows) by component (columns), at most MAX_MAP, the largest ones.

    Features stay in order, and components are ordered by the feature with their largest
    attribution. Where inputs are not features, components stay in order and inputs are ordered by
    their component.
    """
    if is_features:
        rows, label = source.arrays["attributions_one_hot"], "feature alone in the input"
    elif acts is not None:
        rows, label = _strongest(acts.attributions), "input"
    else:
        return None
    columns = np.argsort(-rows.max(axis=0), kind="stable")[: MAX_MAP[1]]
    names = np.argsort(-rows.max(axis=1), kind="stable")[: MAX_MAP[0]]
    if is_features:
        names = np.sort(names)
        main = rows[names].argmax(axis=0)[columns]
        columns = columns[np.argsort(main, kind="stable")]
    else:
        names = names[np.argsort(rows[names].argmax(axis=1), kind="stable")]
        columns = np.sort(columns)
    return {
        "values": rows[np.ix_(names, columns)],
        "rows": names.tolist(),
        "columns": columns.tolist(),
        "label": label,
    }


def losses(
    history: Sequence[Mapping[str, Any]], instance: int | None = None
) -> list[dict[str, Any]]:
    """{name, step, value} of every loss in the log, at MAX_POINTS steps at most.

    Values of 0 are left out: the axis is logarithmic.

    Args:
      instance: which one is drawn, where the log holds a list per loss, one value per instance.
    """
    rows = history
    if len(history) > MAX_POINTS:
        rows = [history[i] for i in np.linspace(0, len(history) - 1, MAX_POINTS).astype(int)]
    names, read = loss_names(history), []
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
