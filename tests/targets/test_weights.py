"""Weights files: what is written is read again, and every mismatch is one clear sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax.targets import weights

LIKE = {
    "Dense_0": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)},
    "W": jnp.ones((4, 2)),
}
FLAT = {
    "Dense_0.kernel": np.arange(6.0).reshape(2, 3),
    "Dense_0.bias": np.zeros(3),
    "W": np.ones((4, 2)),
}
EXTENSIONS = [".npz", ".safetensors"]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_round_trip(tmp_path, extension):
    path = tmp_path / f"target{extension}"
    weights.save(path, LIKE)
    loaded = weights.load(path, jax.eval_shape(lambda: LIKE))
    assert jax.tree.structure(loaded) == jax.tree.structure(LIKE)
    assert all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(LIKE), strict=True)
    )
    assert [file.name for file in tmp_path.iterdir()] == [
        path.name
    ]  # nothing unfinished is left behind
    weights.save(path, jax.tree.map(lambda leaf: 2 * leaf, LIKE))  # overwrites
    np.testing.assert_array_equal(weights.load(path, LIKE)["W"], 2 * LIKE["W"])


def test_names_are_dotted_and_precision_follows_the_target(tmp_path):
    path = tmp_path / "target.npz"
    np.savez(path, **{name: leaf.astype(np.float64) for name, leaf in FLAT.items()})
    loaded = weights.load(path, LIKE)
    assert loaded["Dense_0"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(loaded["Dense_0"]["kernel"], FLAT["Dense_0.kernel"])


def without(name):
    return {key: leaf for key, leaf in FLAT.items() if key != name}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without("W"), r"lacks 'W' of shape \(4, 2\); it holds .*'Dense_0.kernel': \(2, 3\)"),
        (
            FLAT | {"V": np.ones(7)},
            r"holds 'V' of shape \(7,\), but the target has .*'W': \(4, 2\)",
        ),
        (
            FLAT | {"W": np.ones((2, 4))},
            r"holds 'W' with shape \(2, 4\), but the target's has shape \(4, 2\)",
        ),
        (FLAT | {"W": np.full((4, 2), np.nan)}, "values in 'W' that are not finite in float32"),
        (FLAT | {"W": np.full((4, 2), 1e300)}, "values in 'W' that are not finite in float32"),
        (
            FLAT | {"W": np.full((4, 2), "a")},
            "holds 'W' with dtype <U1, which is not a real number",
        ),
        (FLAT | {"W": np.full((4, 2), None)}, "cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_mismatches_are_refused(tmp_path, arrays, message):
    path = tmp_path / "target.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        weights.load(path, LIKE)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("content", [None, b"", b"not a weights file at all"])
def test_unreadable_files_are_refused(tmp_path, extension, content):
    path = tmp_path / f"target{extension}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read: .+") as error:
        weights.load(path, LIKE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "action", [lambda path: weights.save(path, LIKE), lambda path: weights.load(path, LIKE)]
)
def test_other_extensions_are_refused(tmp_path, action):
    with pytest.raises(ValueError, match=r"target.pt must end in .npz or .safetensors"):
        action(tmp_path / "target.pt")


def test_transposed_arrays_keep_their_values(tmp_path):
    """safetensors writes the memory of an array as it lies."""
    params = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3).T}
    weights.save(tmp_path / "w.safetensors", params)
    np.testing.assert_array_equal(
        weights.load(tmp_path / "w.safetensors", params)["w"], params["w"]
    )
