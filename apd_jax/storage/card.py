"""The card of a saved decomposition: its README.md, as model hubs expect it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from apd_jax.decomposition import Decomposition

_LOAD = """import apd_jax

apply_fn = ...  # the network's function, apply_fn(params, x)
decomposition = apd_jax.from_pretrained("{where}", apply_fn)
decomposition.component(0)  # P_0, a pytree like the network's params
decomposition.mask(x)  # which components each input needs
"""


def render(
    decomposition: Decomposition,
    name: str,
    metrics: Mapping[str, Any],
    evidence: Mapping[str, Any] | None,
    version: str,
    repo_id: str = "",
) -> str:
    """Markdown under a YAML front matter.

    What it is, how it is loaded, its numbers, and its evidence if there is some.

    Args:
      metrics: {name: value}; what is not a number is left out. Without any, the last logged losses
        stand there.
      evidence: what evidence.json holds.
      repo_id: where it lies on the hub.
    """
    history = decomposition.history
    last = {k: v for k, v in (history[-1] if history else {}).items() if k != "seconds_per_step"}
    numbers = {k: v for k, v in (metrics or last).items() if isinstance(v, int | float)}
    parts = [
        "---\nlibrary_name: apd_jax\ntags:\n- parameter-decomposition\n- interpretability\n"
        "- jax\n---",
        f"# {_cell(name) or 'Decomposition'}",
        _about(decomposition, version),
        "## Load it",
        f"```python\n{_LOAD.format(where=repo_id or 'path/of/this/folder')}```",
        "The function of the network is code and is not stored here; neither the data nor the code "
        "that trained it is needed.",
        "## What is decomposed",
        _table(
            ("leaf", "shape", "rank of the factors", "pieces"),
            [
                (f"`{leaf}`", "×".join(map(str, f.shape)), str(f.rank), str(f.num_pieces))
                for leaf, f in decomposition.components.factors.items()
            ],
        ),
    ]
    if numbers:
        rows = [(key, f"{value:.6g}") for key, value in numbers.items()]
        what = "Metrics" if metrics else "Last logged losses"
        parts += [f"## {what}", _table(("name", "value"), rows)]
    return "\n\n".join(parts + _evidence(evidence) + _settings(decomposition)) + "\n"


def _settings(decomposition: Decomposition) -> list[str]:
    """Those that are not at the method's default."""
    method = decomposition.method
    default = type(method)()
    changed = [name for name in method.fields() if getattr(method, name) != getattr(default, name)]
    rows = [(f"`{name}`", f"`{getattr(method, name)!r}`") for name in changed]
    rest = f"The others are the defaults of method `{method.name}`."
    return ["## Settings", _table(("setting", "value"), rows), rest]


def _about(decomposition: Decomposition, version: str) -> str:
    method, history = decomposition.method, decomposition.history
    trained = f" for {history[-1]['step']:,} steps" if history else ""
    k = "" if method.k is None else f" and k = {method.k:g}"
    gate = ", `gate.safetensors` its gate" if jax.tree.leaves(decomposition.gate) else ""
    count = decomposition.components.num_components
    return (
        f"A network's parameters as {count} components that sum to them, of which few are needed "
        f"on any input: a parameter decomposition by `apd_jax` {version}, method "
        f"`{method.name}`, trained{trained} with seed {method.seed}{k}. "
        "`params.safetensors` holds the network's weights, `components.safetensors` the "
        f"components' factors{gate}, `decomposition.json` the settings and the losses."
    )


def _evidence(evidence: Mapping[str, Any] | None) -> list[str]:
    """What the checks say; of several instances one after the other."""
    if evidence is None:
        return []
    several, parts = "instances" in evidence, []
    marks = {True: "passed", False: "**failed**", None: "–"}
    for i, one in enumerate(evidence["instances"] if several else [evidence]):
        rows = [
            (str(c["number"]), c["title"], marks[c["passed"]], c["bar"], c["text"] or c["why"])
            for c in one["checks"]
        ]
        title = "## Evidence" + (f", instance {i}" if several else "")
        parts += [title, one["verdict"], _table(("", "check", "", "bar", ""), rows)]
    return parts


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(
        "| " + " | ".join(map(_cell, row)) + " |" for row in (head, ("---",) * len(head), *rows)
    )


def _cell(text: str) -> str:
    """Text that stays within its cell and its line."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())
