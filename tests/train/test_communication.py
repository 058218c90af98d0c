"""Bytes read off compiled programs are those worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from apd_jax.train import communication

MESH = {"data": 2, "component": 2}


def read(text, mesh=MESH, **options):
    """(operation, axes, per iteration, count, bytes) of each transfer."""
    return [dataclasses.astuple(transfer) for transfer in communication.read(text, mesh, **options)]


def compiled(fn, *args):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(2, 2), tuple(MESH))
    return (
        jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
        .lower(*args)
        .compile()
        .as_text()
    )


def test_each_axis_has_its_own_bytes():
    def fn(a, b, c):
        return (
            lax.psum(a, "component"),
            lax.psum(b, "data"),
            lax.psum(jnp.sum(c), ("data", "component")),
        )

    text = compiled(fn, jnp.ones((3, 5)), jnp.ones(7, jnp.int16), jnp.ones(4))
    # 3·5 float32, 7 int16 (which CPU sums as int32: 28 bytes, elsewhere 14), one float32.
    component, data, both = read(text)
    assert component == ("all-reduce", ("component",), False, 1, 60)
    assert data[:4] == ("all-reduce", ("data",), False, 1) and data[4] in (14, 28)
    assert both == ("all-reduce", ("data", "component"), False, 1, 4)


def test_gathers_and_permutations():
    def fn(a):
        gathered = lax.all_gather(a, "component")
        return gathered, lax.ppermute(a, "data", [(0, 1), (1, 0)])

    text = compiled(fn, jnp.ones((6, 2)))
    # Every device gets 2·6·2 float32 of the gather, 6·2 of the permutation.
    assert read(text) == [
        ("all-gather", ("component",), False, 1, 96),
        ("collective-permute", ("data",), False, 1, 48),
    ]


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_scan_counts_once_per_step_and_a_search_once_per_iteration(num_steps):
    def layer(x, _):
        return jnp.tanh(lax.psum(x, "component")), None

    def search(x):
        return lax.while_loop(
            lambda x: x.sum() < 100, lambda x: x + lax.psum(x[:2], "data").sum(), x
        )

    def step(x, _):
        return search(lax.scan(layer, x, length=5)[0]), None

    text = compiled(lambda x: lax.scan(step, x, length=num_steps)[0], jnp.ones(10))
    # 5 layers of 10 float32 in every step; 2 float32 in every iteration of the search.
    assert read(text, num_steps=num_steps) == [
        ("all-reduce", ("component",), False, pytest.approx(5), pytest.approx(200)),
        ("all-reduce", ("data",), True, 1, 8),
    ]


def test_pmap_has_one_axis():
    program = jax.pmap(lambda x: lax.pmean(x, "data"), axis_name="data")
    text = program.lower(jnp.ones((4, 3))).compile().as_text()
    assert read(text, {"data": 4}) == [("all-reduce", ("data",), False, 1, 12)]


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("replica_groups={{0,1},{2,3}}", ("component",)),
        ("replica_groups={{0,2},{1,3}}", ("data",)),
        ("replica_groups=[2,2]<=[4]", ("component",)),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ("data",)),
        ("replica_groups=[1,4]<=[4]", ("data", "component")),
        ("replica_groups={}", ("data", "component")),
        ("replica_groups={{0},{1},{2},{3}}", ()),
    ],
)
def test_groups_are_read_in_both_notations(groups, axes):
    line = f"  ROOT %r = f32[2]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"
    text = "\n".join(["ENTRY %main (x: f32[2]) -> f32[2] {", line, "}"])
    assert [t.axes for t in communication.read(text, MESH)] == ([axes] if axes else [])


def test_asynchronous_operations_count_once():
    gathered, reduced = "{{0,1},{2,3}}, dimensions={0}", "{{0,2},{1,3}}, to_apply=%add"
    start = "  %s = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups="
    both = "  %r = (bf16[4]{0}, pred[3]{0}) all-reduce-start(%x, %y), replica_groups="
    lines = [
        "ENTRY %main (x: f32[4]) -> f32[8] {",
        start + gathered,
        "  %d = f32[8]{0} all-gather-done(%s)",
        both + reduced,
        "}",
    ]
    component, data = communication.read("\n".join(lines), MESH)
    assert (component.operation, component.num_bytes) == ("all-gather", 32)
    assert (data.operation, data.num_bytes) == ("all-reduce", 11)
