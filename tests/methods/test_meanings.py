"""What settings mean."""

import dataclasses

import pytest

import apd_jax
from apd_jax.errors import InputError
from apd_jax.methods import meanings, registry


@pytest.mark.parametrize("name", registry.METHODS)
def test_every_setting_of_every_method_has_a_meaning(name):
    cls = registry.METHODS[name]
    assert list(meanings.meanings(cls)) == list(cls.fields())
    text = apd_jax.explain(name)
    assert all(f"{field} = " in text for field in cls.fields())
    assert max(map(len, text.splitlines())) <= 100


def test_headings_are_no_meanings_and_values_are_the_objects():
    assert meanings.meanings(apd_jax.APD)["num_components"] == "C"
    assert "topk = 3.0 " in apd_jax.explain(apd_jax.APD(topk=3.0))
    with pytest.raises(InputError, match=r"unknown method 'adp'.*Did you mean 'apd'"):
        apd_jax.explain("adp")


def test_a_printed_config_says_what_its_fields_mean():
    config = apd_jax.default_config("spd")
    config.gate_width = 7
    assert str(config) == apd_jax.explain(apd_jax.SPD(gate_width=7))
    assert registry.of(config) == apd_jax.SPD(gate_width=7)
    config.unlock()
    config.mine = 1  # no field of the method: as any config is printed
    assert "mine: 1" in str(config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(apd_jax.APD):
    """A method of one's own."""

    # A heading.
    # how sharp
    sharpness: float = 1.0
    long: float = 2.0  # how long
    topk: float = 2.0


def test_a_method_of_ones_own_is_read_like_the_others():
    found = meanings.meanings(Mine)
    assert (found["sharpness"], found["long"]) == ("how sharp", "how long")
    assert found["topk"].startswith("k, mean active")
