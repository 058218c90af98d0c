"""Decompositions as people use them: in loops, in notebooks, with frameworks' own names."""

import functools
import json
import logging
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

import apd_jax
from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.components import matches, tables_of
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.network.problem import Problem
from apd_jax.recipe import scales
from apd_jax.report import style
from apd_jax.train.progress import ProgressDisplay

B, T, V, D = 8, 4, 7, 6
TOKENS = np.random.default_rng(0).integers(0, V, (32, T))
ROWS = np.random.default_rng(1).normal(size=(32, 4)).astype(np.float32)
ROWS.setflags(write=False)
SMALL = {"batch_size": B, "num_steps": 2, "steps_per_call": 2, "rank": 1}


class Words(nn.Module):
    """Tokens, learned positions, attention with biases of heads, an unembedding."""

    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(V, D)(tokens) + self.param("pos", nn.initializers.normal(), (T, D))[None]
        h = h + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(h))
        return nn.Dense(V)(h)


class WordsNNX(nnx.Module):
    """The same with a tied unembedding."""

    def __init__(self, rngs):
        self.embed, self.norm = nnx.Embed(V, D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)
        self.pos = nnx.Param(jax.random.normal(rngs.params(), (T, D)))
        self.attend = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)

    def __call__(self, tokens):
        h = self.embed(tokens) + self.pos[jnp.arange(tokens.shape[1])][None]
        return self.embed.attend(h + self.attend(self.norm(h)))


def linen():
    params = Words().init(jax.random.key(0), TOKENS[:1])
    return Words().apply, params


def flax_nnx():
    graph, params = nnx.split(WordsNNX(nnx.Rngs(0)))
    return lambda params, x: nnx.merge(graph, params)(x), params


def far(sparse, target):
    """A distance of every example."""
    return jnp.abs(sparse - target).sum(-1)


def two_layers(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """With a loss of its own, in a folder of a difficult name, on arrays that are read only."""
    keys = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(keys[0], (4, 5)), "v": jax.random.normal(keys[1], (5, 3))}
    folder = tmp_path_factory.mktemp("ein Ordner (größer)") / "läuft"
    settings = apd_jax.APD(num_components=3, topk=1.0, minimality_loss=far, **SMALL)
    batches = apd_jax.data.from_arrays(ROWS, B)
    return apd_jax.decompose(two_layers, params, batches, settings, workdir=folder), folder


@pytest.fixture
def found(trained):
    return trained[0]


@pytest.mark.parametrize("network", [linen, flax_nnx])
def test_tables_and_biases_of_heads_are_left_out(network):
    """Positions added, tokens looked up (tied or not); what is multiplied stays."""
    fn, params = network()
    names = {name.removesuffix(".value") for name in tables_of(fn, params, TOKENS[:2])}
    last = {".".join(name.split(".")[-2:]) for name in names}
    heads = {"query.bias", "key.bias", "value.bias"}
    assert last >= heads and any(name.endswith("pos") for name in names)
    assert any(name.endswith("embedding") for name in names)
    assert not any(name.endswith("kernel") for name in names)


def test_the_default_takes_matrices_and_a_star_takes_all(caplog):
    problem = Problem(*linen(), lambda rng, step: jnp.asarray(TOKENS[:B]))
    with caplog.at_level(logging.INFO):
        assert len(problem.site_names) == 5
    assert all(name.endswith("kernel") for name in problem.site_names)
    assert "params.Embed_0.embedding" in caplog.text and "params.pos" in caplog.text
    every = components_lib.selected_paths(problem.params, "*")
    assert len(every) == len(jax.tree.leaves(problem.params))


def test_names_of_nnx_match_with_and_without_value():
    params = flax_nnx()[1]
    for pattern in ("attend.*.kernel", "attend.*.kernel.value", ["attend.*.kernel"]):
        assert len(components_lib.selected_paths(params, pattern)) == 4
    assert components_lib.selected_paths(params, "pos") == ["pos.value"]
    assert components_lib.as_select(lambda name, a: name.endswith("kernel"), params)
    # A dict with a key "value" beside others keeps its name.
    names = ["attn.key", "attn.query", "attn.value"]
    assert [name for name in names if matches(name, "attn", names)] == []
    assert [name for name in names if matches(name, "*.value", names)] == ["attn.value"]


def test_nothing_compiles_twice(found, caplog):
    """A loop over a corpus: every call with the same shapes uses the program of the first."""
    x, mask = ROWS[:B], np.ones((B, 3), bool)

    def everything(x):
        found.mask(x), found.attributions(x), found.activity(x), found.mask(x, found.cut(x))
        found.sparse_output(x), found.sparse_output(x, mask)
        found.ablate([0], x), found.component(1)

    everything(x)
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        everything(ROWS[B : 2 * B])
        found.ablate([1, 2], x), found.component(0)
    assert not [r.message for r in caplog.records if "ompil" in r.message]


def test_what_is_printed_is_short(found):
    for shown in (repr(found), repr(found.components), repr(found.problem)):
        assert len(shown) < 300
    assert "3 components at 2 sites" in repr(found) and "2 steps" in repr(found)


def test_what_a_notebook_shows(found):
    page = found._repr_html_()
    assert "<svg" in page and "3, of which" in page and len(page) < 30_000
    assert page.count("<text") == 2
    assert style.new_figure(3.0, 2.0, "a caption")._repr_png_().startswith(b"\x89PNG")


def test_progress_in_a_notebook_is_a_line_that_changes(monkeypatch):
    """Without ipywidgets, which rich would ask for."""
    lines: list[str] = []
    place = types.SimpleNamespace(update=lambda data, raw: lines.append(data["text/plain"]))
    shown = types.SimpleNamespace(display=lambda *data, **options: place)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    with ProgressDisplay("run", 10, console=Console(force_jupyter=True)) as display:
        display.update(5, {"total": 0.5})
        display.update(10, {"total": 0.25})
    assert len(lines) == 2 and "step 10/10" in lines[1] and "total 0.25" in lines[1]


# Losses


def test_next_token_and_a_function_as_loss():
    logits, x = jax.random.normal(jax.random.key(0), (B, T, V)), jnp.asarray(TOKENS[:B])
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], x[:, 1:])
    found = losses.minimality(logits, logits, "next_token", None, {"tokens": x, "segments": x * 0})
    np.testing.assert_allclose(found, each.mean(), rtol=1e-6)
    counts = np.arange(T) < 3  # the last position is padding
    weights = jnp.broadcast_to(jnp.asarray(counts / counts.mean(), jnp.float32), (B, T))
    found = losses.minimality(logits, logits, "next_token", weights, x)
    np.testing.assert_allclose(found, each[:, :2].mean(), rtol=1e-6)
    # On devices with unequal padding: the mean of what they say is that of the whole batch.
    valid = jnp.asarray(np.arange(T) < np.arange(B)[:, None] % (T - 1) + 2)
    whole = losses.minimality(logits, logits, "next_token", valid / valid.mean(), x)
    by_device = jax.vmap(
        lambda logits, weights, x: losses.minimality(
            *(logits[None], logits[None], "next_token", weights[None], x[None], "data")
        ),
        axis_name="data",
    )(logits, valid / valid.mean(), x)
    assert len({int(row.sum()) for row in valid}) > 1
    np.testing.assert_allclose(by_device.mean(), whole, rtol=1e-6)
    other = logits.at[:, 3].set(jnp.nan)
    found = losses.minimality(other, 0 * logits, far, weights)
    np.testing.assert_allclose(found, jnp.abs(logits)[:, :3].sum(-1).mean(), rtol=1e-6)
    for wrong, sentence in (
        (lambda s, t: jnp.zeros(3), "one for every example"),
        (lambda s, t: jnp.sum(s), "padding cannot be told"),
    ):
        with pytest.raises(InputError, match=sentence):
            losses.minimality(logits, logits, wrong, weights)
    with pytest.raises(InputError, match="one array of tokens"):
        losses.minimality(logits, logits, "next_token", None, {"a": x, "b": x})


@pytest.mark.parametrize("name", ["spd", "vpd", "whole", "targeted"])
def test_every_method_takes_a_function(name):
    """In its settings; the terms all go through `losses.minimality`."""
    method = registry.of(registry.settings(registry.by_name(name)(minimality_loss=far)))
    method.check()
    assert method.minimality_loss is far and method.distance is far
    assert method.to_dict()["minimality_loss"].endswith("test_library.far")


def test_a_loss_that_is_a_function_is_stored_by_its_name(trained):
    found, folder = trained
    config = json.loads((folder / "config.json").read_text())
    assert config["minimality_loss"].endswith("test_library.far")
    found.save(folder / "saved")
    load = functools.partial(apd_jax.load, folder / "saved", two_layers)
    np.testing.assert_array_equal(load().mask(ROWS), found.mask(ROWS))
    assert load(minimality_loss=far).method == found.method
    of_workdir = apd_jax.load(folder, two_layers, minimality_loss=far)
    assert of_workdir.method.minimality_loss is far
    with pytest.raises(InputError, match=r"minimality_loss was the function .*far, .* of load"):
        load().report(folder / "report.html", ROWS)


def test_a_loss_that_measures_nothing_is_named(trained):
    problem = Problem(two_layers, trained[0].problem.params, [ROWS])
    for wrong, said in (
        (lambda a, b: 0.0 * jnp.sum(a), "minimality_loss is 0 where"),
        (lambda a, b: jnp.sum(a - b) * jnp.nan, "minimality_loss is not finite where"),
    ):
        method = apd_jax.APD(loss_units="target", minimality_loss=wrong)
        with pytest.raises(InputError, match=said):
            scales.measure(problem, method)


def test_rows_go_to_weights_and_biases_if_asked(monkeypatch):
    written: list[tuple[dict, int]] = []
    run = types.SimpleNamespace(log=lambda row, step: written.append((row, step)))
    stand_in = types.SimpleNamespace(init=lambda **options: run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    write = apd_jax.log_to_wandb(project="p")
    assert write({"step": 3, "stage": "refine", "total": [0.5, 0.25]}) is None
    assert written == [({"total/0": 0.5, "total/1": 0.25}, 3)]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb is not installed"):
        apd_jax.log_to_wandb()
