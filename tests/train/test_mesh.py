"""Components split over devices: the masks, losses and gradients of one device.

Steps are compared under plain gradient descent: Adam would hide a gradient that is too large by
the number of devices.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, XLA_FLAGS, close, seen
from jax.sharding import PartitionSpec as P
from meshes import (
    MESHES,
    PARAMS,
    check_mesh,
    initial,
    per_position,
    problem_of,
    run,
    sample_fn,
    sequences,
    sgd,
)
from networks import NETWORKS
from processes import Command

from apd_jax import components as components_lib
from apd_jax import masks
from apd_jax.errors import InputError
from apd_jax.forward import sparse
from apd_jax.gates.base import AlwaysOn
from apd_jax.gates.ranked import BatchTopK, LearnedThreshold, Threshold
from apd_jax.network.problem import Problem
from apd_jax.train import placement


def mapped(fn, D, M, in_specs, out_specs):
    devices = np.asarray(jax.devices()[: D * M]).reshape(D, M)
    mesh = jax.sharding.Mesh(devices, ("data", "component"))
    return jax.jit(
        jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )


# Masks


def scores_with_ties():
    """Three values: every cut lies among ties."""
    return jnp.asarray(np.random.default_rng(1).integers(0, 3, (8, 12)).astype(np.float32))


AXES = {"axis_name": "data", "component_axis": "component"}
BOTH = P("data", "component")


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_masks_are_those_of_one_device_also_on_ties(mesh):
    scores, valid = scores_with_ties(), jnp.arange(8) % 3 > 0
    gate = AlwaysOn(BatchTopK(1.5), 4)
    kinds = {
        "batch_topk": (lambda a, v, **axes: masks.batch_topk(a, 1.4, **axes)),
        "valid": (lambda a, v, **axes: masks.batch_topk(a, 1.4, valid=v, **axes)),
        "batch_largest": (lambda a, v, **axes: masks.batch_largest(a, jnp.int32(31), **axes)),
        "topk": (
            lambda a, v, component_axis=None, **_: masks.topk(a, 3, component_axis=component_axis)
        ),
        "always_on": (lambda a, v, **axes: gate(seen(a, **axes)).active),
    }

    def all_kinds(a, v, **axes):
        return {name: fn(a, v, **axes) for name, fn in kinds.items()}

    split = mapped(functools.partial(all_kinds, **AXES), *mesh, (BOTH, P("data")), BOTH)
    found = split(scores, valid)
    for name, expected in jax.jit(all_kinds)(scores, valid).items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    # By a stable sort: lower examples, then lower components first. 8 · 1.4 = 11.2.
    order = np.argsort(-np.asarray(scores).ravel(), kind="stable")
    np.testing.assert_array_equal(np.flatnonzero(found["batch_topk"]), np.sort(order[:11]))
    rows = np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(np.nonzero(found["topk"])[1].reshape(8, 3), np.sort(rows, axis=1))
    # The first 4 on every input, and 8 · 1.5 = 12 of the other 8.
    assert found["always_on"][:, :4].all() and found["always_on"][:, 4:].sum() == 12


def test_gates_with_thresholds_are_those_of_one_device():
    scores = jnp.asarray(np.random.default_rng(2).uniform(size=(8, 12)), jnp.float32)
    thresholds = jnp.log(jnp.asarray(np.random.default_rng(3).uniform(size=12), jnp.float32))

    def all_kinds(a, t, **axes):
        kinds = {"threshold": Threshold(0.3), "learned": LearnedThreshold(t)}
        return {name: AlwaysOn(gate, 4)(seen(a, **axes)) for name, gate in kinds.items()}

    split = mapped(functools.partial(all_kinds, **AXES), 2, 2, (BOTH, P("component")), BOTH)
    jax.tree.map(
        np.testing.assert_array_equal,
        split(scores, thresholds),
        jax.jit(all_kinds)(scores, thresholds),
    )


# The sparse pass, on networks that use their weights in different ways


@pytest.mark.parametrize(
    "name, route",
    [
        ("attention_tied_embedding", "auto"),
        ("scanned_layers", "auto"),
        ("normalised_weights", "auto"),
        ("normalised_weights", "materialize"),
    ],
)
def test_sparse_pass_and_its_gradient_on_any_network(name, route):
    fn, params, x = NETWORKS[name]()
    layouts = Problem(fn, params, lambda key, step: x).layouts
    components = components_lib.init(
        jax.random.key(0), params, num_components=4, rank=2, init_scale=9.0, layouts=layouts
    )
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (x.shape[0], 4)).at[:, 0].set(True)
    direction = jax.random.normal(jax.random.key(2), jax.eval_shape(fn, params, x).shape)

    def loss(components, mask, axis=None):
        out = sparse.apply(
            fn, params, components_lib.split_over(components, axis), mask, x, route=route, slots=3
        )
        return jnp.sum(out * direction), out

    value = jax.value_and_grad(loss, has_aux=True)
    (_, out), gradient = jax.jit(value)(components, mask)
    specs = placement._specs(components)
    split = mapped(
        lambda c, m: value(c, m, "component"),
        1,
        4,
        (specs, P(None, "component")),
        ((P(), P()), specs),
    )
    (_, found), found_gradient = split(components, mask)
    close(found, out, 1e-5)
    for a, b in zip(jax.tree.leaves(found_gradient), jax.tree.leaves(gradient), strict=True):
        assert np.abs(b).max() > 0
        close(a, b, 2e-5)


# The step


LEARNED = {
    "mask": "learned",
    "threshold": 0.05,
    "importance_coeff": 0.1,
    "threshold_learning_rate": 0.02,
    "inactive": "uniform",
    "num_always_on": 3,
    "unit_norm_U": True,
}
ROW_BY_ROW = {
    "mask": "topk",
    "topk": 2.0,
    "unit_norm_U": True,
    "sparse_route": "masked",
    "num_always_on": 3,
    "attribution": "activation",
    "simplicity_coeff_final": 0.1,
}
PROBED = {
    "attribution_mode": "probe",
    "hidden_reconstruction_coeff": 0.5,
    "sparse_route": "dispatch",
}
IN_KL = {"minimality_loss": "kl", "attribution_metric": "kl"}
WITHOUT_GATE = {
    "mask": "none",
    "attribution_lp_coeff": 0.1,
    "minimality_coeff": 0.5,
    "attribution_mode": "reverse",
}


@pytest.mark.parametrize(
    "fields",
    [
        PROBED,
        ROW_BY_ROW,
        {"mask": "exact", "attributions_at": "components"} | IN_KL,
        WITHOUT_GATE,
        {"mask": "threshold", "threshold": 0.05, "attribution": "ablation", "inactive": "uniform"},
        LEARNED,
        {"attribution": "integrated_gradient", "optimizer": "adamw", "weight_decay": 0.1},
    ],
    ids=str,
)
def test_steps_are_those_of_one_device(fields):
    problem = problem_of(num_active_fn=lambda x: jnp.sum(x != 0, axis=1))
    _, metrics = check_mesh(2, 2, sgd(**fields), problem)
    # Nothing diverges: agreement means something.
    assert max(np.abs(metric).max() for metric in metrics.values()) < 1e3


def test_steps_per_position_with_padding():
    def valid(x):
        return x.sum((1, 2))[:, None] * jnp.array([[1.0, 0.5]]) > 0.3

    problem = problem_of(per_position, sequences, valid_fn=valid)
    check_mesh(2, 2, sgd(mask_per="position"), problem)


def test_gradient_is_that_of_a_hand_written_loss():
    """One step of gradient descent, against autodiff of the loss with every P_c formed.

    That one on one device, with the mask by sorting.
    """
    method = sgd(topk=2.0, schatten_p=1.0, schedule="constant", simplicity_coeff=0.2)
    begin = initial(method, problem_of())
    (after, _), _ = run(1, 4, method, problem_of(), begin, num_steps=1)
    x = np.asarray(jax.jit(sample_fn)(jax.random.key(1), 0))
    factors = {name: (f.U, f.V) for name, f in begin.components.factors.items()}
    params = {name: np.asarray(a) for name, a in PARAMS.items()}

    def form(factors):
        return {name: U @ V for name, (U, V) in factors.items()}

    weights = form(factors)
    h = np.maximum(x @ params["W"] + params["b"], 0)
    through_W = np.einsum("bi,cih,bh,ho->bco", x, weights["W"], 1.0 * (h > 0), params["V"])
    moved = np.einsum("bh,cho->bco", h, weights["V"]) + through_W
    scores = np.mean(moved**2, axis=-1)
    mask = np.zeros(scores.size)
    mask[np.argsort(-scores.ravel(), kind="stable")[:32]] = 1
    mask = mask.reshape(scores.shape).astype(np.float32)

    def loss(factors):
        weights = form(factors)
        missing = sum(jnp.sum((params[name] - w.sum(0)) ** 2) for name, w in weights.items())
        through = jnp.einsum("bi,bc,cih->bh", x, mask, weights["W"])
        h_sparse = jax.nn.relu(through + params["b"][None])
        out = jnp.einsum("bh,bc,cho->bo", h_sparse, mask, weights["V"])
        minimality = jnp.mean((out - h @ params["V"]) ** 2)
        norms = sum(
            jnp.sqrt(jnp.sum(U**2, 1) * jnp.sum(V**2, 2)).sum(1) for U, V in factors.values()
        )
        return missing / 50 + minimality + 0.2 * jnp.sum(mask * norms[None]) / (50 * 16)

    for name, (dU, dV) in jax.jit(jax.grad(loss))(factors).items():
        U, V = factors[name]
        for new, old, d in ((after.factors[name].U, U, dU), (after.factors[name].V, V, dV)):
            assert np.abs(d).max() > 1e-3
            np.testing.assert_allclose((old - new) / 0.3, d, atol=1e-4 * np.abs(d).max())


# Eight devices, in a process of their own


def test_eight_devices(tmp_path):
    """Two components on each, and one on each."""
    process = Command("eight_devices", root=ROOT, env={"XLA_FLAGS": XLA_FLAGS}, printed=tmp_path)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    found = json.loads(printed.splitlines()[-1])
    assert set(found) == {"4x2", "1x8"} and max(found.values()) < 1e-5, found


# Refusals


def test_refusals():
    with pytest.raises(
        InputError, match="num_components = 8 is not divisible by num_component_shards = 3"
    ):
        sgd(num_component_shards=3).check()
    with pytest.raises(InputError, match="num_component_shards must be at least 1; got 0"):
        sgd(num_component_shards=0).check()
    with pytest.raises(
        InputError,
        match="num_component_shards = 8 does not divide the 4 devices; choose a divisor of 4",
    ):
        placement.arrange(sgd(num_component_shards=8), jax.devices())
    with pytest.raises(InputError, match="batch_size = 15 is not divisible by the 2 devices"):
        placement.arrange(sgd(num_component_shards=2, batch_size=15), jax.devices())
    # The batch is not split.
    placement.arrange(sgd(num_component_shards=4, batch_size=15), jax.devices())
