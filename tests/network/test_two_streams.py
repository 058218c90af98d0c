"""Two streams of data side by side: what is decomposed here, and what is elsewhere."""

import jax
import numpy as np
import pytest

from apd_jax.errors import InputError
from apd_jax.network import data

BATCHES = np.random.default_rng(1).normal(size=(5, 8, 4)).astype(np.float32)


def test_two_iterables_side_by_side_begin_anew_together():
    here, elsewhere = (data.source(list(b)) for b in (BATCHES[:3], BATCHES[3:5]))
    batches = data.paired(here, elsewhere).since(2)
    for number in (2, 3, 4):
        batch = next(batches)
        np.testing.assert_array_equal(batch["here"], BATCHES[number % 3])
        np.testing.assert_array_equal(batch["elsewhere"], BATCHES[3 + number % 2])


def test_two_samplers_draw_apart_from_each_other():
    def sample(rng, step):
        return jax.random.normal(jax.random.fold_in(rng, step), (4, 3))

    key = jax.random.key(0)
    batch = data.paired(sample, sample)(key, 1)
    np.testing.assert_array_equal(batch["here"], sample(key, 1))
    assert not np.isclose(batch["here"], batch["elsewhere"]).any()


def test_a_sampler_and_an_iterable_are_no_pair():
    with pytest.raises(InputError, match=r"must both be functions .*, or both be iterables"):
        data.paired(data.source(list(BATCHES)), lambda rng, step: BATCHES[0])
