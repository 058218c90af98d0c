"""Tables hold the numbers, in the right rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from apd_jax import components as components_lib
from apd_jax.report import tables


def render(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def row(text, start):
    return next(line for line in text.splitlines() if start in line)


def test_results_table():
    metrics = {
        "mmcs": 0.99612,
        "minimality_topk": 1.2345e-4,
        "num_alive_components": 41,
        "num_components": 50,
        "not_shown": 1.0,
    }
    text = render(tables.results_table(metrics, minutes=3.26))
    assert "0.9961" in row(text, "MMCS") and "0.0001234" in row(text, "mask of training")
    assert "41 of 50" in row(text, "alive") and "3.3" in row(text, "minutes")
    assert "scrubbing" not in text and "not_shown" not in text
    assert "minutes" not in render(tables.results_table(metrics))


def test_components_table():
    # Component 0 is diag(3, 4) on W: norm 5, rank 2. Component 1 is zero.
    W = jnp.zeros((2, 2, 2)).at[0].set(jnp.diag(jnp.array([3.0, 4.0])))
    components = components_lib.from_materialized({"W": W, "b": None})
    found = tables.components_tables(components, np.array([0.25, 0.0]), np.array([7, -1]), 200)
    (text,) = map(render, found)
    assert "norm (rank)" in text and "W" in text
    assert row(text, "0.2500").replace("│", " ").split() == ["0", "5", "(2)", "0.2500", "7"]
    assert row(text, "dead").replace("│", " ").split() == ["1", "0", "(0)", "0.0000", "dead"]


@pytest.mark.parametrize("width", [60, 100])
def test_nothing_is_cut_however_narrow_the_terminal(width):
    names = [f"params.layer_{i}.attention.out.kernel" for i in range(9)]
    W = jnp.ones((2, 2, 2)) * 1234.0
    components = components_lib.from_materialized(dict.fromkeys(names, W))
    text = ""
    found = tables.components_tables(components, np.array([0.25, 0.0]), np.array([7, -1]), width)
    for table in (*found, tables.tree_table(components.tree)):
        console = Console(width=width)
        with console.capture() as capture:
            console.print(table)
        text += capture.get()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert text.count("2.47e+03 (1)") == 2 * 9  # ‖P_c‖ = 2 · 1234


def test_tree_table():
    text = render(
        tables.tree_table(
            {
                "layer": {"kernel": jnp.zeros((30, 50)), "bias": jnp.zeros(50)},
                "step": jnp.zeros((), jnp.int32),
            }
        )
    )
    assert row(text, "layer.kernel").replace("│", " ").split() == [
        "layer.kernel",
        "30x50",
        "float32",
        "1,500",
    ]
    assert row(text, "step").replace("│", " ").split() == ["step", "scalar", "int32", "1"]
    assert "1,551" in row(text, "total")  # 1500 + 50 + 1
