"""The card of a saved decomposition: its README.md, as model hubs expect it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apd_jax.decomposition import Decomposition

_LOAD = """import apd_jax

apply_fn = ...  # the network's function, apply_fn(params, x)
decomposition = apd_jax.Decomposition.load("path/of/this/folder", apply_fn)
decomposition.component(0)  # P_0, a pytree like the network's params
decomposition.mask(x)  # which components each input needs
"""


def render(
    decomposition: Decomposition,
    name: str,
    metrics: Mapping[str, Any],
    evidence: Mapping[str, Any] | None,
    version: str,
) -> str:
    """Markdown under a YAML front matter: what it is, how it is loaded, its numbers, and its evidence if there is some.

    Args:
      metrics: {name: value}; what is not a number is left out. Without any, the last logged losses stand there.
      evidence: what evidence.json holds.
    """
    components, config = decomposition.components, decomposition.config
    leaves = [
        (f"`{leaf}`", "×".join(map(str, f.shape)), str(f.U.shape[-1])) for leaf, f in components.factors.items()
    ]  # fmt: skip
    trained = f" for {decomposition.history[-1]['step']:,} steps" if decomposition.history else ""
    last = {
        key: value
        for key, value in (decomposition.history[-1] if decomposition.history else {}).items()
        if key != "seconds_per_step"
    }
    numbers = {
        key: value for key, value in (metrics or last).items() if isinstance(value, int | float)
    }
    parts = [
        "---\nlibrary_name: apd_jax\ntags:\n- parameter-decomposition\n- interpretability\n- jax\n---",
        f"# {_cell(name) or 'Decomposition'}",
        f"A network's parameters as {components.num_components} components that sum to them, of which few are needed on any input: "
        f"a parameter decomposition by `apd_jax` {version}, trained{trained} with seed {config.seed} and k = {config.topk:g}. "
        "`params.safetensors` holds the network's weights, `components.safetensors` the components' factors, "
        "`decomposition.json` the settings and the losses.",
        "## Load it",
        f"```python\n{_LOAD}```",
        "The function of the network is code and is not stored here; neither the data nor the code that trained it is needed.",
        "## What is decomposed",
        _table(("leaf", "shape", "rank of the factors"), leaves),
    ]
    if numbers:
        what = "Metrics" if metrics else "Last logged losses"
        parts += [
            f"## {what}",
            _table(("name", "value"), [(key, f"{value:.6g}") for key, value in numbers.items()]),
        ]
    for i, one in enumerate([] if evidence is None else evidence.get("instances", [evidence])):
        title = "## Evidence" + (
            f", instance {i}" if evidence is not None and "instances" in evidence else ""
        )
        marks = {True: "passed", False: "**failed**", None: "–"}
        rows = [
            (str(c["number"]), c["title"], marks[c["passed"]], c["bar"], c["text"] or c["why"])
            for c in one["checks"]
        ]
        parts += [title, one["verdict"], _table(("", "check", "", "bar", ""), rows)]
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(
        "| " + " | ".join(map(_cell, row)) + " |" for row in (head, ("---",) * len(head), *rows)
    )


def _cell(text: str) -> str:
    """Text that stays within its cell and its line."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())
