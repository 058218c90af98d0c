"""--mode=curve: points trained one from another, kept, and the same bytes after a stop."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from rich.console import Console

import apd_jax
from apd_jax.commands import curve, runs
from apd_jax.commands.given import Given

V, D, T = 9, 4, 6
SOURCE = """
import jax.numpy as jnp

def network(params, tokens):
    before = jnp.cumsum(jnp.take(params["E"], tokens, axis=0, mode="clip"), axis=1)
    return jnp.tanh(before) @ params["W"].T
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of tokens, after 6 steps of SPD, as `decompose` leaves it."""
    where, rng = epath.Path(tmp_path_factory.mktemp("curve")), np.random.default_rng(0)
    (where / "net.py").write_text(SOURCE)
    np.save(where / "tokens.npy", rng.integers(0, V, (8, T)))
    params = {"E": jnp.asarray(rng.normal(size=(V, D)), jnp.float32)}
    params["W"] = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    settings = {"num_components": 3, "num_steps": 6, "batch_size": 4, "steps_per_call": 3}
    settings |= {"mask_per": "position", "minimality_loss": "kl", "importance_coeff": 0.01}
    network = given(where).function("apply")
    rows = np.load(where / "tokens.npy")
    method = apd_jax.SPD(**settings, layerwise_coeff=0.0)
    apd_jax.decompose(network, params, rows, method, select="W", workdir=where / "run")
    return where


def given(where):
    return Given(f"{where / 'net.py'}:network", str(where / "tokens.npy"))


@pytest.fixture(scope="module")
def walked(folder):
    """A curve of two prices in one call."""
    console = Console(quiet=True)
    curve.curve(folder / "run", console, given(folder), prices=["0.005", "1"], steps=3)
    return json.loads((folder / "run" / "curve.json").read_text())


def told(folder, run="run", **options):
    options = {"prices": "0.005,1", "steps": 3} | options
    network, rows = given(folder).apply, given(folder).data
    flags = [f"--{name}={value}" for name, value in options.items()]
    where = [f"--workdir={folder / run}", f"--apply={network}", f"--data={rows}"]
    return ["--mode=curve", *flags, *where]


def test_every_point_is_trained_from_the_one_before(folder, walked):
    start, first, second = walked["points"]
    assert [p["price"] for p in (start, first, second)] == [0.01, 0.005, 1.0]  # the run's own first
    assert [p["step"] for p in (start, first, second)] == [6, 9, 9]
    run = runs.restore(folder / "run", given(folder))
    base = run.decomposition(0, run.rows)
    one = base.train(3, importance_coeff=0.005)
    kept = apd_jax.load(folder / "run" / "curve" / "steps_3" / "0.005", run.problem.apply_fn)
    for a, b in zip(jax.tree.leaves(one.trained), jax.tree.leaves(kept.trained), strict=True):
        np.testing.assert_array_equal(a, b)
    last = apd_jax.load(folder / "run" / "curve" / "steps_3" / "0.005_1", None)
    assert (last.method.num_steps, last.method.importance_coeff) == (9, 1.0)
    moved = np.asarray(last.components.factors["W"].U) - kept.components.factors["W"].U
    assert 0 < np.abs(moved).max() < 0.01  # three steps from there, not nine from the beginning
    for key in ("delta_ce_rounded_0", "l0_pieces_0", "kl_adversary"):
        assert np.isfinite([p[key] for p in walked["points"]]).all()
    assert (folder / "run" / "figures" / "curve.png").stat().length > 10_000


def test_stopped_after_a_point_it_ends_with_the_same_bytes(folder, walked, main_here):
    shutil.copytree(folder / "run", folder / "stopped")
    other, run = folder / "stopped", folder / "run"
    for name in ("curve.json", "figures/curve.png"):
        (other / name).unlink()
    shutil.rmtree(other / "curve" / "steps_3" / "0.005_1")  # as if killed between two points
    kept = other / "curve" / "steps_3" / "0.005" / "metrics.jsonl"
    kept.write_text("")  # would be missed if that point were trained again
    result = main_here(*told(folder, "stopped"))
    assert result.returncode == 0, result.stderr
    assert "rounded at 0" in result.stdout and "curve.png" in result.stdout
    assert "on the text of --data" in result.stdout and walked["text"] == "the text of --data"
    assert kept.read_text() == ""
    for name in ("curve.json", "figures/curve.png"):
        assert (other / name).read_bytes() == (run / name).read_bytes(), name


def test_what_no_curve_can_be_of(folder, walked, main_here):
    def refused(*words, **options):
        result = main_here(*told(folder, **options))
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert all(word in result.stderr for word in words), result.stderr

    refused("--prices is missing", prices="")
    refused("numbers above 0", "'-1'", prices="1,-1")
    refused("--steps must be at least 1", steps=0)
    shutil.copytree(folder / "run", folder / "longer")
    start = folder / "longer" / "curve" / "start.json"
    start.write_text(json.dumps(json.loads(start.read_text()) | {"step": 5}))
    refused("from step 5, but the run is at step 6", run="longer")
