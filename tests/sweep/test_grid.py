"""The text of --sweep: what it spans, and every mistake in a sentence."""

import pytest
from conftest import make_method

from apd_jax.errors import InputError
from apd_jax.sweep.grid import parse


def test_axes_seeds_and_settings():
    grid = parse(" seed=0:3 ; topk=0.5,1,2;learning_rate = 1e-3,3e-3; ", make_method())
    assert grid.seeds == (0, 1, 2)
    assert grid.axes == {"topk": (0.5, 1.0, 2.0), "learning_rate": (1e-3, 3e-3)}
    # The last axis changes fastest.
    assert [tuple(setting.values()) for setting in grid.settings] == [
        (k, rate) for k in (0.5, 1.0, 2.0) for rate in (1e-3, 3e-3)
    ]


def test_log_has_equal_ratios():
    # From 1 to 100 in five: 10^0, 10^0.5 = 3.16228, 10, 31.6228, 100.
    assert parse("simplicity_coeff=log(1, 100, 5)", make_method()).axes["simplicity_coeff"] == (
        1.0,
        3.16228,
        10.0,
        31.6228,
        100.0,
    )


def test_seeds_alone_or_not_at_all():
    assert parse("seed=4,2", make_method()).settings == [{}] and parse(
        "seed=4,2", make_method()
    ).seeds == (4, 2)
    assert parse("topk=2", make_method(seed=9)).seeds == (9,)


def test_the_ceiling_has_every_axis_at_its_largest():
    method = make_method(hidden_reconstruction_coeff=0.0)
    ceiling = parse("topk=3,0.5;hidden_reconstruction_coeff=0,2", method).ceiling(method)
    assert (ceiling.topk, ceiling.hidden_reconstruction_coeff, ceiling.simplicity_coeff) == (
        3.0,
        2.0,
        method.simplicity_coeff,
    )
    assert method.topk == 1.0  # a copy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--sweep is empty"),
        (" ; ", "--sweep is empty"),
        ("topk", "'topk'; write field=values"),
        ("topkk=1", "unknown field in --sweep 'topkk'.*Did you mean 'topk'"),
        ("num_components=5,10", "num_components cannot be swept, as it changes the program itself"),
        ("topk=1;topk=2", "names topk twice"),
        ("topk=", "topk in --sweep has '' where a number is needed"),
        ("topk=1,two", "'two' where a number"),
        ("topk=1,nan", "'nan' where a number"),
        ("topk=1,1.0", "holds a value twice"),
        ("topk=0:3", "'0:3' where a number"),
        ("topk=log(0,1,3)", "two numbers above 0"),
        ("topk=log(1,2,1)", "a count of at least 2"),
        ("topk=1,20", "topk must be above 0 and at most 10"),
        ("learning_rate=0,1", "learning_rate must be a finite number above 0"),
        ("seed=3:3", "holds no value; the end of a range is not part of it"),
        ("seed=1.5", "whole number"),
        ("weight_decay=0.1,1", "would change nothing: it is read with optimizer = 'adamw' only"),
        ("threshold=0.1,1", "mask = 'threshold' only"),
    ],
)
def test_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse(text, make_method())
