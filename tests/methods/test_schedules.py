"""Learning rates against the released implementation's curves and by hand.

The golden file has all 1000 steps.
"""

import jax
import numpy as np
import optax
import pytest
from conftest import GOLDEN, close

from apd_jax.errors import InputError
from apd_jax.methods import schedules


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "exponential"])
def test_the_released_curves(kind):
    with np.load(GOLDEN / "lr_schedules.npz") as golden:
        schedule = jax.jit(
            jax.vmap(schedules.learning_rate(kind, 3e-3, 1000, warmup_fraction=0.05))
        )
        close(schedule(golden["step"]), 3e-3 * golden[kind])


def test_the_cosine_is_a_quarter_wave_not_a_half():
    # 101 steps: cos(½π·50/100) = cos 45°; a half wave would be at ½ there. It ends at 0.
    quarter = schedules.learning_rate("cosine", 2.0, 101)
    np.testing.assert_allclose(
        [quarter(0), quarter(50), quarter(100)], [2.0, 2 * np.cos(np.pi / 4), 0.0], atol=1e-6
    )
    assert abs(quarter(50) - optax.cosine_decay_schedule(2.0, 100)(50)) > 0.4


def test_the_half_cosine_ends_at_a_tenth():
    # VPD's: 0.1 + 0.45 (1 + cos π t/(T-1)): 1, 0.55 half way, 0.1.
    half = schedules.learning_rate("half_cosine", 2.0, 101)
    np.testing.assert_allclose([half(0), half(50), half(100)], [2.0, 1.1, 0.2], rtol=1e-6)


def test_every_kind_is_tried():
    tried = {"constant", "linear", "cosine", "exponential", "half_cosine"}
    assert set(schedules.KINDS) == tried


def test_warm_up_starts_at_zero_and_can_be_left_out():
    # 20 % of 10 steps: 0, ½, then the linear decay over the other 8: 1, 7/8, ...
    schedule = schedules.learning_rate("linear", 1.0, 10, 0.2)
    np.testing.assert_allclose([schedule(i) for i in range(4)], [0.0, 0.5, 1.0, 0.875], rtol=1e-6)
    assert schedules.learning_rate("linear", 1.0, 10)(0) == 1.0
    assert np.isfinite(schedules.learning_rate("cosine", 1.0, 1)(0))


def test_unknown_kind_is_refused():
    known = "constant, linear, cosine, half_cosine, exponential"
    with pytest.raises(
        InputError, match=f"unknown learning-rate schedule 'cosin'; choose one of {known}"
    ):
        schedules.learning_rate("cosin", 1.0, 10)
