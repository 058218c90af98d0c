"""The house's rules: which room may look into which, and that no setting is decoration."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from apd_jax.methods import registry
from apd_jax.recipe.numbers import STAGES

SOURCES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("apd_jax", "configs")
    for path in (ROOT / folder).rglob("*.py")
}
MODULES = {
    file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
    for file, path in SOURCES.items()
    if file.startswith("apd_jax/")
}
# A file imports from its own line or the lines above it. Entries (`__main__`, `main`) and the faces
# that users import (`apd_jax`, `apd_jax.masks`, `apd_jax.sparse`) are the last line.
LINES = (
    ("errors", "paths", "collectives"),
    ("components",),
    ("network",),
    ("forward",),
    ("attributions",),
    ("gates",),
    ("ablations",),
    ("losses",),
    ("methods",),
    ("train",),
    ("recipe",),
    ("decomposition", "call"),
    ("storage",),
    ("language",),
    ("targets",),
    ("evaluation",),
    ("interpretation",),
    ("evidence", "report", "sweep"),
    ("commands", "main", "serve", "masks", "sparse", "apd_jax", "__main__"),
)
LINE_OF = {room: number for number, rooms in enumerate(LINES) for room in rooms}


@functools.cache
def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports; `from a import b` as a.b where that is one."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {name for name in parts if name in MODULES}
            names |= inside or {node.module}
            if len(inside) < len(parts):
                names.add(node.module)
    return names


def room(module: str) -> str:
    """The first name below apd_jax; an entry is a room of its own."""
    parts = module.split(".")
    return parts[-1] if parts[-1] == "__main__" or len(parts) == 1 else parts[1]


GRAPH = {
    module: {name for name in imports(path) if name in MODULES and name != module}
    for module, path in MODULES.items()
}


def test_every_file_is_in_a_room():
    assert {room(module) for module in MODULES} == set(LINE_OF)


def test_arrows_point_up_the_list_only():
    wrong = [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        for name in names
        if LINE_OF[room(name)] > LINE_OF[room(module)]
        or (LINE_OF[room(name)] == LINE_OF[room(module)] and room(name) == "apd_jax")
    ]
    assert not wrong


def test_there_is_no_circle():
    left = dict(GRAPH)
    while free := [module for module, names in left.items() if not names & set(left)]:
        left = {module: names for module, names in left.items() if module not in free}
    assert not left, f"these import each other: {sorted(left)}"


def test_modules_are_not_opened_behind_the_graph():
    """By their names as text: only the package's own face opens rooms late."""
    for module, path in MODULES.items():
        if module != "apd_jax":
            assert not re.search(r"import_module\(|__import__\(", path.read_text()), module


@pytest.mark.parametrize("line", range(LINE_OF["methods"] + 1))
def test_the_method_knows_no_plot_and_no_checkpoint(line):
    for module, path in MODULES.items():
        if LINE_OF[room(module)] == line:
            for name in imports(path):
                assert not name.startswith(("configs", "matplotlib", "rich", "orbax", "absl"))


def test_shared_code_does_not_ask_which_method_it_is():
    asks = r"method\.name ==|config\.mask\b|isinstance\(\w*method\w*, (APD|SPD|VPD|Whole|Targeted)"
    for module, path in MODULES.items():
        if not module.startswith("apd_jax.methods."):
            found = re.search(asks, path.read_text())
            # The recipe is APD's, and says so where it takes its settings.
            assert not found or module == "apd_jax.recipe.numbers", f"{module}: {found}"


@functools.cache
def read_names() -> set[str]:
    """Every attribute that some file of the package reads, and names that are read as text."""
    names = set(STAGES)
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


@pytest.mark.parametrize("method", registry.METHODS)
def test_every_setting_is_read(method):
    assert set(registry.METHODS[method].fields()) - read_names() == set()


def fields(config: ConfigDict) -> set[str]:
    return {
        name
        for key, value in config.items()
        for name in ({key} | fields(value) if isinstance(value, ConfigDict) else {key})
    }


CONFIGS = sorted(
    file for file in SOURCES if file.startswith("configs/") and not Path(file).stem.startswith("_")
)


@pytest.mark.parametrize("file", CONFIGS)
def test_every_field_of_a_shipped_config_is_read(file):
    spec = importlib.util.spec_from_file_location(Path(file).stem, SOURCES[file])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The run's own seed is what the three others refer to; a method is named for the registry.
    assert fields(module.get_config()) - read_names() <= {"seed", "method"}


def test_no_defaults_beside_the_config():
    ends = ("config", "apd", "pretrain", "settings", "c")
    for file, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                hidden = node.func.attr == "get" and owner.endswith(ends)
                assert not hidden, f"{file}:{node.lineno} {owner}.get(...)"


def test_files_stay_readable():
    for file, path in SOURCES.items():
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, f"{file}: look for the second idea in it"
        assert max(map(len, lines), default=0) <= 100, f"{file} has a line over 100"


_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.comprehension, ast.BoolOp)


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_functions_stay_readable(file):
    """At most 60 lines of code (docstrings aside) and 20 branches."""
    for node in ast.walk(ast.parse(SOURCES[file].read_text())):
        if isinstance(node, ast.FunctionDef):
            start = (
                node.body[1].lineno if ast.get_docstring(node) and node.body[1:] else node.lineno
            )
            where = f"{file}: {node.name}"
            assert (node.end_lineno or start) - start < 60, f"{where} is long"
            assert sum(isinstance(n, _BRANCHES) for n in ast.walk(node)) <= 20, f"{where} branches"
