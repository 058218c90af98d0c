"""The house's rules: which room may look into which, and that no setting is decoration."""

import ast
import importlib.util
from pathlib import Path

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from apd_jax.methods.config import default_config
from apd_jax.recipe.stages import STAGES

SOURCES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("apd_jax", "configs")
    for path in (ROOT / folder).rglob("*.py")
}
METHOD = ("components", "attributions", "masks", "sparse", "losses", "schedules", "step")


def imports(path: Path, *, at_top: bool = False) -> set[str]:
    """Full names of all modules that a file imports, `from a import b` as a.b too; at_top: only when it is imported itself."""
    names, module = set(), ast.parse(path.read_text())
    for node in module.body if at_top else ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", METHOD)
def test_the_method_knows_no_target_no_config_file_and_no_plot(module):
    outside = (
        "targets",
        "evaluation",
        "evidence",
        "report",
        "experiment",
        "main",
        "train",
        "decomposition",
        "checkpoint",
        "progress",
    )
    found = imports(SOURCES[f"apd_jax/{module}.py"])
    for name in found:
        assert not any(
            name == f"apd_jax.{room}" or name.startswith(f"apd_jax.{room}.") for room in outside
        ), name
        assert not name.startswith(("configs", "matplotlib", "rich", "orbax", "absl", "flax"))


def test_arrows_point_downward():
    """The library call knows no target either; targets and evaluation know no plot and no driver.

    A method of `Decomposition` may open a room above it when it is called.
    """
    drivers = ("apd_jax.main", "apd_jax.experiment")
    forbidden = {
        "apd_jax/train.py": ("apd_jax.targets", "apd_jax.evaluation", "apd_jax.report", *drivers),
        "apd_jax/decomposition.py": (
            "apd_jax.targets",
            "apd_jax.evaluation",
            "apd_jax.report",
            *drivers,
        ),
        "apd_jax/targets/": (
            "apd_jax.evaluation",
            "apd_jax.report",
            "apd_jax.train",
            "apd_jax.step",
            *drivers,
        ),
        "apd_jax/evaluation/": ("apd_jax.report", "apd_jax.train", "apd_jax.evidence", *drivers),
        "apd_jax/report/": drivers,
        "apd_jax/": ("configs",),
        "configs/": ("apd_jax.train", "apd_jax.report", "apd_jax.evaluation", *drivers),
    }
    for prefix, names in forbidden.items():
        for file in [file for file in SOURCES if file.startswith(prefix)]:
            for found in imports(SOURCES[file], at_top=file == "apd_jax/decomposition.py"):
                assert not any(found == name or found.startswith(f"{name}.") for name in names), (
                    f"{file} imports {found}"
                )


def read_names() -> set[str]:
    """Every attribute that some file of the package reads, and the stages, which are read as recipe[stage]."""
    names = set(STAGES)
    for file, path in SOURCES.items():
        if file.startswith("apd_jax/") and file != "apd_jax/config.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    names.add(node.attr)
    return names


def test_every_default_field_is_read():
    assert set(default_config()) - read_names() == set()


def fields(config: ConfigDict) -> set[str]:
    return {
        name
        for key, value in config.items()
        for name in ({key} | fields(value) if isinstance(value, ConfigDict) else {key})
    }


@pytest.mark.parametrize("file", sorted(file for file in SOURCES if file.startswith("configs/")))
def test_every_field_of_a_shipped_config_is_read(file):
    spec = importlib.util.spec_from_file_location(Path(file).stem, SOURCES[file])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The run's own seed is what the three others refer to.
    assert fields(module.get_config()) - read_names() <= {"seed"}


def test_no_defaults_beside_the_config():
    for file, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "get"
            ):
                owner = ast.unparse(node.func.value)
                assert not owner.endswith(("config", "apd", "pretrain", "settings", "c")), (
                    f"{file}:{node.lineno} {owner}.get(...)"
                )


def test_files_stay_readable():
    for file, path in SOURCES.items():
        assert len(path.read_text().splitlines()) <= 400, f"{file}: look for the second idea in it"
