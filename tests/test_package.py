"""The package as others install and import it: public names, what importing opens, the wheel."""

import importlib
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ROOT

import apd_jax

# A name that goes from this list is deprecated first (CONTRIBUTING.md).
PUBLIC = [
    "APD",
    "SPD",
    "VPD",
    "Components",
    "Decomposition",
    "Targeted",
    "Whole",
    "attributions",
    "components",
    "data",
    "decompose",
    "default_config",
    "default_recipe",
    "load",
    "log_to_wandb",
    "losses",
    "masks",
    "save",
    "sparse",
    "suggest",
]
CONTRACT = {
    "apd_jax.components": ("init", "total", "materialize", "weighted_sum"),
    "apd_jax.attributions": ("gradient",),
    "apd_jax.masks": ("topk", "batch_topk"),
    "apd_jax.sparse": ("apply",),
    "apd_jax.losses": ("faithfulness", "minimality", "hidden_reconstruction", "simplicity"),
    "apd_jax.data": ("from_arrays",),
    "apd_jax.Decomposition": (
        *("activity", "attributions", "mask", "cut", "sparse_output", "ablate", "component"),
        *("instance", "save", "load", "report", "evidence", "config"),
    ),
}


def test_public_names():
    assert set(PUBLIC) <= set(apd_jax.__all__)
    assert all(hasattr(apd_jax, name) for name in apd_jax.__all__)
    for owner, names in CONTRACT.items():
        thing = getattr(apd_jax, owner.removeprefix("apd_jax."))
        for name in names:
            assert hasattr(thing, name), f"{owner}.{name}"
    for entry in ("main", "evidence.__main__", "sweep.__main__"):
        assert importlib.util.find_spec(f"apd_jax.{entry}")


def test_one_version():
    version = re.escape(apd_jax.__version__)
    assert re.search(rf"^## {version}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_importing_opens_nothing_slow_that_it_does_not_use():
    slow = ("orbax", "scipy", "sklearn", "matplotlib", "jinja2")
    code = f"import apd_jax, sys; print([name for name in {slow} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of a fresh environment that has the wheel, and this one's packages behind it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("apd_jax-*.whl")
    venv.create(folder / "fresh", symlinks=True, with_pip=False)
    python = folder / "fresh" / "bin" / "python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    (packages,) = (folder / "fresh" / "lib").glob("python*/site-packages")
    (packages / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


OF_THE_WHEEL = """
import importlib.metadata, pathlib, apd_jax, jax
from apd_jax.commands import configs
assert importlib.metadata.version("apd_jax") == apd_jax.__version__
assert (pathlib.Path(apd_jax.__file__).parent / "py.typed").exists()
path, _, variant = configs.found("configs/tms.py:5-2").partition(":")
assert pathlib.Path(path).is_file() and configs.load("tms").get_config(variant).is_locked
sample = lambda rng, step: jax.random.normal(rng, (4, 2))
settings = apd_jax.APD(num_components=2, num_steps=2, batch_size=4)
found = apd_jax.decompose(lambda p, x: x @ p["W"], {"W": jax.numpy.eye(2)}, sample, settings)
found.report("mine.html", sample(jax.random.key(0), 0))
print(apd_jax.__file__)
"""


def test_a_wheel_runs_by_itself(installed, tmp_path):
    """The package of the wheel: its version, types, configs from any folder, a page."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [installed, "-c", OF_THE_WHEEL], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed.parents[1])
    assert "d3" in (tmp_path / "mine.html").read_text()
