"""Further training: from a workdir, from a decomposition, from components."""

import dataclasses
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, make_method
from ml_collections import ConfigDict

import apd_jax
from apd_jax import components as components_lib
from apd_jax.errors import InputError, Interrupted
from apd_jax.methods import registry
from apd_jax.methods.optimizers import Trained
from apd_jax.network.problem import Problem
from apd_jax.train import checkpoint, progress, workdir
from apd_jax.train import loop as train
from apd_jax.train.begin import begin as begin_of

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)}
SMALL = {"num_components": 3, "num_steps": 8, "batch_size": 8, "learning_rate": 1e-2}
SMALL |= {"steps_per_call": 4, "log_every_steps": 4, "checkpoint_every_steps": 4, "topk": 1.0}
SMALL |= {"init_scale": 3.0}


def sample_fn(key, step):
    return jax.random.normal(jax.random.fold_in(key, step), (8, 4))


def network(params, x):
    return x @ params["w"]


def run(method, **more):
    return apd_jax.decompose(network, PARAMS, sample_fn, method, **more)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def short():
    """Eight steps of APD."""
    return run(make_method(**SMALL))


def test_where_init_is_given_none_is_drawn(short, monkeypatch):
    """Many sites take minutes to compile what would be thrown away."""
    monkeypatch.setattr(train, "init_state", None)
    found = run(make_method(**SMALL).replace(num_steps=4), init=short)
    assert found.history[-1]["step"] == 4


def test_a_workdir_goes_on_bit_for_bit_and_never_back(tmp_path, monkeypatch):
    eight, sixteen = make_method(**SMALL), make_method(**SMALL).replace(num_steps=16)
    run(eight, workdir=tmp_path / "whole")
    whole = run(sixteen, workdir=tmp_path / "whole")
    assert [row["step"] for row in whole.history] == [4, 8, 12, 16]
    assert workdir.load_config(tmp_path / "whole").num_steps == 16

    class Display(progress.ProgressDisplay):
        def update(self, step, values):
            if step == 12:
                os.kill(os.getpid(), signal.SIGTERM)

    run(eight, workdir=tmp_path / "stopped")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(train, "ProgressDisplay", Display)
        run(sixteen, workdir=tmp_path / "stopped")
    same(run(sixteen, workdir=tmp_path / "stopped").trained, whole.trained)
    states = [checkpoint.read(tmp_path / n / "checkpoints")[2] for n in ("whole", "stopped")]
    same(*states)  # the optimizer's arrays, too
    with pytest.raises(InputError, match="has come to step 16 already, behind num_steps = 8"):
        run(eight, workdir=tmp_path / "whole")
    with pytest.raises(InputError, match=r"topk is 1.0 there and 2.0 here"):
        run(sixteen.replace(topk=2.0, num_steps=20), workdir=tmp_path / "whole")


def test_a_sweep_and_a_stage_before_the_last_keep_their_length(tmp_path):
    def config(steps, explore=5, **more):
        apd = registry.settings(make_method(num_steps=steps))
        return ConfigDict({"apd": apd, "recipe": {"explore": {"num_steps": explore}}} | more)

    workdir.claim(tmp_path / "run", config(8))
    workdir.claim(tmp_path / "run", config(9))
    with pytest.raises(InputError, match=r"explore.num_steps is 5 there and 6 here"):
        workdir.claim(tmp_path / "run", config(10, explore=6))
    workdir.claim(tmp_path / "sweep", config(8, sweep={"halve": 2}))
    with pytest.raises(InputError, match=r"apd.num_steps is 8 there and 9 here"):
        workdir.claim(tmp_path / "sweep", config(9, sweep={"halve": 2}))


def test_train_goes_on_where_it_ended(short, tmp_path):
    """Steps 9 to 16 of a run of 16, with a fresh optimizer: stopped or not, the same."""
    more = short.train(8, workdir=tmp_path)
    assert [row["step"] for row in more.history] == [4, 8, 12, 16]
    assert more.method == short.method.replace(num_steps=16)
    shutil.rmtree(tmp_path / "checkpoints" / "16")  # as a kill before the last one leaves it
    same(short.train(8, workdir=tmp_path).trained, more.trained)
    other = dataclasses.replace(short, components=jax.tree.map(lambda a: 2 * a, short.components))
    with pytest.raises(InputError, match="init differs"):
        other.train(8, workdir=tmp_path)


THRESHOLDS = make_method(**SMALL).replace(mask="learned", threshold=0.1)
PIECES = apd_jax.SPD(num_components=3, num_steps=4, batch_size=8, gate_width=2)


@pytest.mark.parametrize("method", [THRESHOLDS, PIECES, make_method(**SMALL, num_instances=2)])
def test_more_components_begin_at_zero_with_the_gate_of_the_others(method):
    problem, axis = Problem(network, PARAMS, sample_fn), int(method.num_instances > 1)
    state = begin_of(problem, method, fresh(problem, method))
    few = Trained(state.components, jax.tree.map(lambda a: a + 1, state.gate))
    begun = begin_of(problem, method.replace(num_components=5), few, 7)
    f, g = few.components.factors["w"], begun.components.factors["w"]
    assert (g.num_pieces, begun.components.num_components) == (5, 5) and np.all(begun.step == 7)
    first = (slice(None),) * axis + (slice(3),)
    close(g.weights.sum(axis), f.weights.sum(axis))
    np.testing.assert_array_equal(g.U[first], f.U)
    for a, b in zip(jax.tree.leaves(few.gate), jax.tree.leaves(begun.gate), strict=True):
        np.testing.assert_array_equal(a, b[first])


def fresh(problem, method):
    """Trained, as the method begins."""
    keys = jax.random.split(jax.random.key(3), method.num_instances)

    def make(key):
        components = method.make_components(key, problem)
        return Trained(components, method.make_gate(key, problem, components))

    return jax.vmap(make)(keys) if len(keys) > 1 else make(keys[0])


def test_given_components_are_where_it_begins_and_new_ones_are_trained(short):
    rows = jnp.eye(4)[:, :, None] * PARAMS["w"][None]
    made = Trained(components_lib.from_materialized({"w": rows}), {"of": jnp.ones(1)})
    problem = Problem(network, PARAMS, sample_fn)
    begun = begin_of(problem, THRESHOLDS.replace(num_components=4), made)  # another kind of gate
    same(begun.components, made.components)
    assert list(begun.gate) == ["log_thresholds"]
    more = short.train(4, num_components=5)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(more.trained))
    assert np.abs(more.components.factors["w"].V[3:]).max() > 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_components": 2}, "init holds 3 components, more than the 2"),
        ({"num_instances": 2}, "init holds 1 decompositions at 'w', and num_instances = 2"),
        ({"rank": 1, "num_components": 4}, "rank 3 at 'w' and the settings ask for 1"),
    ],
)
def test_what_does_not_fit_is_refused(short, fields, sentence):
    with pytest.raises(InputError, match=sentence):
        run(make_method(**SMALL).replace(**fields), init=short)
    with pytest.raises(InputError, match="at least 1; got 0"):
        short.train(0)


def test_a_run_that_is_asked_to_stop_stays_stopped(tmp_path):
    problem, rows = Problem(network, PARAMS, sample_fn), []
    sixteen = make_method(**SMALL).replace(num_steps=16)

    def stop(row):
        rows.append(row)
        return row["step"] >= 8

    first, history = train.fit(problem, sixteen, workdir=tmp_path, on_log=stop)
    assert [row["step"] for row in rows] == [4, 8] == [row["step"] for row in history]
    # What is no bool asks for nothing.
    again, logged = train.fit(problem, sixteen, workdir=tmp_path, on_log=lambda row: len(rows))
    same(first, again)
    assert logged == history
    # A run of more steps goes on.
    _, history = train.fit(problem, sixteen.replace(num_steps=20), workdir=tmp_path)
    assert history[-1]["step"] == 20
