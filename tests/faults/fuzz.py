"""Draws arguments of `decompose`, most of them wrong: one step or one sentence, nothing else.

    python tests/faults/fuzz.py NUMBER_OF_DRAWS

A process of its own, without the types that tests check: users have none either.
"""

import contextlib
import io
import sys
import tempfile

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from small import PARAMS, SETTINGS, B, linear, rows

import apd_jax
from apd_jax.errors import InputError

X = np.ones((B, 4), np.float32)
NUMBERS = st.sampled_from(
    [
        *(0, -1, 1, 2, 3, 7, 0.5, 2**31, 2**63, float("nan"), float("inf"), -0.0, np.int64(2)),
        *(np.float32(0.5), "1", None, True, (), [1], jnp.float32(1.0), jnp.ones(2), 1j),
    ]
)
FIELDS = [name for name in SETTINGS.fields() if name not in ("num_steps", "steps_per_call")]
WORDS = st.sampled_from(["topk", "none", "learned", "exact", "position", "kl", "sgd", "", "x"])
CHANGES = st.dictionaries(st.sampled_from(FIELDS), NUMBERS | WORDS, min_size=1, max_size=2)

WRONG = {
    "apply_fn": st.sampled_from(
        [
            lambda p, x: (linear(p, x),),
            lambda p, x: linear(p, x).sum(),
            lambda p, x: p["absent"],
            lambda p, x: x,
            lambda p, x: linear(p, x).astype(int),
            lambda p, x: linear(p, x) - linear(p, x).mean(axis=0, keepdims=True),
            lambda p, x: linear(p, x) * jnp.nan,
            lambda p, x: float(linear(p, x).sum()),
            lambda p: p,
            lambda p, x: np.asarray(linear(p, x)),
        ]
    ),
    "params": st.sampled_from(
        [
            {},
            {"w": None},
            {"w": "text"},
            {"w": np.ones((4, 3), int)},
            {"w": np.full((4, 3), np.nan)},
            {"w": np.ones((3, 4))},
            {"w": np.ones(4)},
            {"w": np.ones((4, 3), np.float16)},
            {"w": np.ones((4, 3), complex)},
            {"w": np.ones((0, 3))},
            [np.ones((4, 3))],
            None,
            3.0,
        ]
    ),
    "sample_fn": st.sampled_from(
        [
            lambda rng: X,
            lambda rng, step: None,
            lambda rng, step: X[:0],
            lambda rng, step: X[0],
            lambda rng, step: X.astype(str),
            lambda rng, step: int(step),
            lambda rng, step: [X, X],
            [],
            [X, X[:3]],
            [X[0]],
            iter([X]),
            None,
            7,
            "text",
            {"x": X},
        ]
    ),
    "select": st.sampled_from(
        [
            *([], {}, "v", ["w", 3], {"w": None}, {"w": {"rank": -1}}, {"w": {"rnk": 1}}, 3),
            *({"w": {"components": [9]}}, {"w": {"components": []}}),
            *(lambda name, leaf: False, lambda name: name),
        ]
    ),
    "uses": st.sampled_from([{"w": 0}, {"v": 1}, {"w": "1"}, [1], {"w": 1.5}]),
    "valid_fn": st.sampled_from(
        [lambda x: x, lambda x: 1 / 0, lambda x: x[:, :1] > 0, lambda x: None, lambda: 1]
    ),
    "num_active_fn": st.sampled_from([lambda x: x, lambda x: None, lambda: 1]),
    "attribution_fn": st.sampled_from([lambda p, x: x, lambda p, x: 1 / 0, lambda p: p]),
    "elsewhere": st.sampled_from([rows, [X], 3]),
    "method": st.sampled_from(["apd", "sdp", "", 3, apd_jax.SPD(), None]),
    "recipe": st.sampled_from([{}, apd_jax.default_recipe(), 3]),
}


@st.composite
def arguments(draw):
    asked = {"apply_fn": linear, "params": PARAMS, "sample_fn": rows}
    changes = draw(CHANGES) if draw(st.booleans()) else {}
    wrong = draw(st.sets(st.sampled_from(sorted(WRONG)), min_size=not changes, max_size=2))
    return asked | {name: draw(WRONG[name]) for name in sorted(wrong)}, changes


def one(asked, changes) -> str:
    try:
        settings = SETTINGS.replace(**changes)
        if "method" not in asked:
            asked = asked | {"config": settings}
        with contextlib.redirect_stderr(io.StringIO()):
            run = apd_jax.decompose(**asked)
        assert run.history and np.isfinite(run.history[-1]["total"])
        return "trained"
    except InputError as error:
        text = str(error)
        assert text and "\n" not in text.strip(), text
        return "sentence"


def main(draws: int) -> None:
    ends: dict[str, int] = {"trained": 0, "sentence": 0}

    @hypothesis.settings(
        max_examples=draws,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(arguments())
    def check(drawn):
        ends[one(*drawn)] += 1

    check()
    print(ends)


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", tempfile.gettempdir() + "/apd_jax_fuzz")
    main(int(sys.argv[1]))
