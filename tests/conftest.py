"""Strict by default: 4 devices, no silent broadcasting, shapes checked, full float32 products.

Also what several test files share: the golden arrays of the released implementation, the TMS
pentagon whose decomposition is known, and the command line, in this process or in its own.
"""

import atexit
import gc
import importlib.util
import mmap
import os
import shutil
import tempfile
from pathlib import Path


def _known_to_xla(flag: str) -> bool:
    """XLA aborts at a flag that it does not know, and drops old ones: is it in the library?"""
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None and spec.origin is not None
    for library in Path(spec.origin).parent.glob("*jax_common*.so"):
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content.find(flag.lstrip("-").partition("=")[0].encode()) >= 0
    return False


# Before jax is imported. One thread per device keeps two test processes from fighting over two
# cores. Programs here run once or twice: compiling them fast matters more than running them fast.
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0 "
XLA_FLAGS += "--xla_llvm_disable_expensive_passes=true "
XLA_FLAGS += " ".join(
    filter(
        _known_to_xla,
        ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"],
    )
)
_GIVEN = os.environ.get("XLA_FLAGS", "")
_FOUR = "--xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = f"{_GIVEN} {XLA_FLAGS} {_FOUR}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# No Python lines in programs: an eighth of the time of tracing and lowering.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["MPLBACKEND"] = "agg"
# Threads that wait for each other's turn double what linear algebra in numpy and sklearn costs.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
# Every test process and every command it starts share their compiled programs, for this session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="apd_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Imports and tracing make many objects that stay or that reference counts free: look for circles
# among them more rarely. No gc.freeze(): what is frozen has no referrers; hypothesis warns of it.
gc.set_threshold(50_000, 10, 10)

import shapes

shapes.check()

import dataclasses
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import shared_programs
from absl import flags
from ml_collections import ConfigDict

from apd_jax import components as components_lib
from apd_jax import targets
from apd_jax.ablations.adversary import Kept
from apd_jax.ablations.base import Sources
from apd_jax.commands import cli as cli_lib
from apd_jax.commands import clusters, curve, given, graph, harvest, labels
from apd_jax.components import Components, Factors
from apd_jax.forward.capture import Reading
from apd_jax.forward.sparse import SiteWeights
from apd_jax.gates.base import Activity, Observation
from apd_jax.gates.piece_mlp import PieceMLP
from apd_jax.methods import registry
from apd_jax.methods.apd import APD
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network.problem import Problem
from apd_jax.train.state import TrainState

# jax also builds these pytree nodes from stand-ins (abstract shapes, one copy per device): what
# their fields hold is not checked. Numbers of methods may be traced.
NODES = (PieceMLP, Factors, Components, Trained, TrainState, Sources, Kept, Reading, SiteWeights)
for node in (*NODES, Activity, Observation, *registry.METHODS.values()):
    node.__init__ = inspect.unwrap(node.__init__)

shared_programs.install()

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

ROOT = Path(__file__).parents[1]
# The config of a TMS 5-2, as users write it, and of its training for a few steps.
TMS = {
    "name": "tms",
    "num_features": 5,
    "d_hidden": 2,
    "hidden": "none",
    "feature_probability": 0.2,
    "seed": 0,
    "weights_path": "",
}
PRETRAIN = {
    "num_steps": 20,
    "batch_size": 64,
    "learning_rate": 5e-3,
    "schedule": "linear",
    "warmup_fraction": 0.0,
    "weight_decay": 0.01,
}
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = (
    "tms_small",
    "tms_5_2",
    "tms_id",
    "resid1_small",
    "resid2_small",
    "resid1_bias_gelu",
)


def close(actual: Any, expected: Any, tolerance: float = 1e-5, err_msg: str = "") -> None:
    """Equal up to `tolerance` of the largest expected entry."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        actual,
        expected,
        rtol=0,
        atol=tolerance * max(np.max(np.abs(expected), initial=0.0), 1e-12),
        err_msg=err_msg,
    )


def make_method(**fields: Any) -> APD:
    """The default settings of APD with some fields changed."""
    return APD().replace(**fields)


def make_problem(apply_fn: Callable, params: Any, sample_fn: Any, **fields: Any) -> Problem:
    """A problem of a function, its params and its data."""
    return Problem(apply_fn, params, sample_fn, **fields)


def method_of(config: ConfigDict) -> Method:
    """The settings that an experiment's config (or its `apd`) holds."""
    return registry.of(config.apd if "apd" in config else config)


def seen(scores: jax.Array, x: Any = None, **fields: Any) -> Observation:
    """What a gate on attributions is given of a batch with these ones."""
    return Observation(x, Components({}, scores.shape[-1]), scores, **fields)


def get_config(file: str, *args: str) -> ConfigDict:
    """What a file in configs/ returns for an argument."""
    spec = importlib.util.spec_from_file_location(f"config_{file}", ROOT / "configs" / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)


# The golden arrays


def _our_name(name: str) -> str:
    names = {"linear1": "W", "hidden_0": "hidden", "b_final": "b"}
    return names.get(name, name).replace("bias1_", "bias_in_").replace("bias2_", "bias_out_")


@dataclasses.dataclass(frozen=True)
class Golden:
    """One file of the released implementation's arrays, and the same network built here."""

    name: str
    arrays: dict[str, np.ndarray]
    target: targets.base.Target
    params: dict[str, jax.Array]
    components: Components

    def __getitem__(self, key: str) -> Any:
        array = self.arrays[key]
        return array.item() if array.ndim == 0 else jax.device_put(array)  # compiles nothing

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.arrays)

    @property
    def is_tms(self) -> bool:
        return self.target.name == "tms"

    @property
    def apply_fn(self) -> Callable:
        return self.target.apply_fn

    @property
    def x(self) -> jax.Array:
        return self["x"]

    def matrices(self, prefix: str) -> dict[str, dict[str, jax.Array]]:
        """{leaf path: {"U", "V"}} of the arrays under `prefix`."""
        out: dict[str, dict[str, jax.Array]] = {}
        for key in self.arrays:
            if key.startswith(prefix + "/") and key.count("/") == prefix.count("/") + 2:
                name, factor = key.split("/")[-2:]
                out.setdefault(_our_name(name), {})[factor] = self[key]
        return out


def load_golden(name: str) -> Golden:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    params = {
        _our_name(key.split("/")[1]): jax.device_put(a)
        for key, a in arrays.items()
        if key.startswith("target/")
    }
    config = ConfigDict({"feature_probability": 0.1, "pretrain": {"batch_size": 8}})
    if name.startswith("tms"):
        F, H = params["W"].shape
        config.update(
            {
                "name": "tms",
                "num_features": F,
                "d_hidden": H,
                "hidden": "identity" if "hidden" in params else "none",
            }
        )
    else:
        (F, D), layers = params["W_E"].shape, sum(key.startswith("mlp_in") for key in params)
        config.update(
            {
                "name": "resid_mlp",
                "num_features": F,
                "d_resid": D,
                "num_layers": layers,
                "d_mlp": params["mlp_in_0"].shape[1],
            }
        )
        config.update(
            {
                "activation": "gelu" if "gelu" in name else "relu",
                "embedding": "random",
                "use_bias": "bias" in name,
                "signed": True,
            }
        )
    target = targets.build(config, arrays["x"].shape[0])
    tree: dict[str, Any] = dict.fromkeys(params)
    for key in [key for key in arrays if key.startswith("components/") and key.endswith("/U")]:
        leaf = _our_name(key.split("/")[1])
        U, V = jax.device_put((arrays[key], arrays[key[:-1] + "V"]))
        tree[leaf] = Factors(U, V, shape=params[leaf].shape, uses=target.uses.get(leaf, 1))
    return Golden(name, arrays, target, params, Components(tree))


@pytest.fixture(scope="session", params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


# The TMS pentagon: five unit rows 72° apart, b = -0.3. Feature f alone, at 1, returns 1 - 0.3 = 0.7
# at f, cos 72° - 0.3 = 0.009 at its two neighbours and 0 elsewhere. Its decomposition is known: P_c
# has row c of W and nothing else.


@dataclasses.dataclass(frozen=True)
class Pentagon:
    params: dict[str, jax.Array]
    weights: dict[str, Any]  # P_c, [5, 5, 2]
    components: Components
    x: jax.Array  # one-hot inputs

    @staticmethod
    def apply_fn(params, x):
        return jax.nn.relu(x @ params["W"] @ params["W"].T + params["b"][None, :])


@pytest.fixture(scope="session")
def pentagon() -> Pentagon:
    angles = [2 * math.pi * i / 5 for i in range(5)]
    W = jnp.asarray([[math.cos(a), math.sin(a)] for a in angles])
    weights = {"W": jnp.eye(5)[:, :, None] * W[None], "b": None}
    components = components_lib.from_materialized(weights, uses={"W": 2})
    return Pentagon({"W": W, "b": jnp.full(5, -0.3)}, weights, components, jnp.eye(5))


# The command line

_FLAGS = (
    "config",
    "workdir",
    "other",
    "mode",
    "sweep",
    "halve",
    "criterion",
    "explain",
    "thorough",
    *clusters.NAMES,
    *curve.NAMES,
    *given.NAMES,
    *graph.NAMES,
    *harvest.NAMES,
    *labels.NAMES,
)


@dataclasses.dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def start_cli(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., processes.Command]:
    """Starts `python -m module ...` in a process of its own with one device."""
    env = {"XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count=1"}

    def start(*args: str, module: str = "apd_jax.main") -> processes.Command:
        printed = tmp_path_factory.mktemp("printed")
        return processes.Command(module, *args, root=ROOT, env=env, printed=printed)

    return start


@pytest.fixture(scope="session")
def cli(start_cli: Callable[..., processes.Command]) -> Callable[..., Finished]:
    """Runs it to its end."""

    def run(*args: str, module: str = "apd_jax.main") -> Finished:
        process = start_cli(*args, module=module)
        stdout, stderr = process.communicate(timeout=300)
        return Finished(process.returncode, stdout, stderr)

    return run


@pytest.fixture
def main_here(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Finished]:
    """The same in this process and on its 4 devices, which saves the seconds of an import."""

    def run(*args: str, module: str = "apd_jax.main") -> Finished:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(
            sys, "argv", ["main", *map(str, args)]
        )  # where ml_collections looks for overrides
        for name in [name for name in flags.FLAGS if name.split(".")[0] in _FLAGS]:
            delattr(flags.FLAGS, name)
        sys.modules.pop(module, None)  # its flags are defined anew
        main = importlib.import_module(module)
        code = 0
        capsys.readouterr()
        with (
            warnings.catch_warnings()
        ):  # under Python 3.11 ml_collections loads a config file by a deprecated call
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            try:
                main.main(cli_lib.parse(sys.argv, main._CONFIG))
            except SystemExit as stop:
                code = stop.code
        return Finished(code, *capsys.readouterr())

    return run
