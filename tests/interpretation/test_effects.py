"""What planted components do to the next token, against their weights."""

import numpy as np
import pytest
from planted import PIECES, SIZES, TEXT, A, B, V, decomposition

from apd_jax.errors import InputError
from apd_jax.interpretation import effects as effects_lib
from apd_jax.interpretation.harvest import harvest


@pytest.fixture(scope="module")
def planted():
    return decomposition()


@pytest.fixture(scope="module")
def found(planted):
    return harvest(planted, TEXT, sizes=SIZES)


@pytest.fixture(scope="module")
def made(planted, found):
    return effects_lib.effects(planted, found, num_contexts=3, num_tokens=V)


def test_effects_are_the_rows_that_components_write(made, found):
    # f(x)_t = W[x_t]: taking P_c away changes the logits there by P_c[x_t], less its mean.
    for c in (0, 1, 3):
        rows = PIECES[c, found.top_tokens[c, :3, 2]]
        change = (rows - rows.mean(1, keepdims=True)).mean(0)
        np.testing.assert_allclose(made.up[c], np.sort(change)[::-1], atol=1e-5)
        np.testing.assert_allclose(change[made.up_token[c]], made.up[c], atol=1e-5)
        np.testing.assert_allclose(change[made.down_token[c]], np.sort(change), atol=1e-5)
    assert made.up_token[0, 0] == B and made.up[0, 0] == pytest.approx(6 - 6 / V, abs=1e-4)
    assert (found.top_tokens[0, :, 2] == A).all()
    assert (made.up_token[2] == -1).all() and not made.up[2].any()  # never on


def test_effects_are_kept_beside_the_harvest(made, found, tmp_path):
    effects_lib.save(made, found, tmp_path)
    again = effects_lib.load(tmp_path, found)
    np.testing.assert_array_equal(again.down_token, made.down_token)
    (tmp_path / effects_lib.FILE).write_bytes((tmp_path / effects_lib.FILE).read_bytes()[:50])
    with pytest.raises(InputError, match=r"effects.parquet is torn or missing"):
        effects_lib.load(tmp_path, found)
    with pytest.raises(InputError, match="of another decomposition"):
        effects_lib.effects(decomposition(scale=2.0), found)
