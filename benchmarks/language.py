r"""Time and memory of a language model's train step: of its parts, and as components grow.

    python benchmarks/language.py [--json FILE] [--only glassllm,5M] [--methods spd,vpd] [--quick]

Networks have random weights of the shapes named: time does not depend on them. Every row is a
process of its own: 8 sequences of 64 tokens, C as `suggest` has it, or a multiple. Parts, each as a
program of its own, and the step that is made of them and of more passes:
  target        a forward pass of the network itself
  gate          what is seen of a batch, and the gate's values
  sparse pass   the forward pass with every decomposed matrix Σ_c m_c P_c, 3 % of m on at every
                position: of all pieces (masked), and of those that are on (dispatch)
  pass, grad    such a sparse pass, its KL, and the gradient by the components
  step          all of a train step, by the method's settings for tokens
  share         of the matmul peak of this process, of XLA's own count of operations
  temporaries   of the step, by XLA's plan; GiB: the peak of this process, all programs
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from common import WINDOWS, measure_peaks, peak_memory_gib, show, timed, write_json

from apd_jax.forward import sparse
from apd_jax.forward.dispatch import slots_for
from apd_jax.language import families
from apd_jax.language.decoder import DecoderConfig
from apd_jax.language.pretrained import initial
from apd_jax.language.tokens import predicting
from apd_jax.losses import minimality
from apd_jax.methods import observe, registry, suggest
from apd_jax.methods.optimizers import Trained
from apd_jax.network.outputs import outputs
from apd_jax.network.problem import Problem
from apd_jax.train.state import init_state
from apd_jax.train.step import make_step

B, T, ACTIVE = 8, 64, 0.03
# name -> vocabulary, D, layers, heads, heads of keys, width of the MLP
NETWORKS = {
    "glassllm": (1024, 128, 4, 4, 2, 341),
    "5M": (4096, 256, 4, 8, 8, 768),
    "SmolLM2 layer": (49152, 576, 1, 9, 3, 1536),
}
TINY = (50, 16, 1, 2, 2, 24)
COLUMNS = {
    "network": "network",
    "method": "method",
    "components": "components",
    "target, ms": "target_ms",
    "gate, ms": "gate_ms",
    "sparse pass, ms": "masked_ms",
    "dispatched, ms": "dispatch_ms",
    "times the target": "ratio",
    "pass, grad, ms": "gradient_ms",
    "step, ms": "step_ms",
    "tokens/s": "tokens_per_s",
    "share of peak": "share",
    "compile, s": "compile_s",
    "temporaries, GiB": "temporaries_gib",
    "GiB": "peak_gib",
}


def _problem(network: str, times: float, quick: bool) -> Problem:
    """times: the number of components, of what SPD gives a site by itself."""
    V, D, layers, heads, kv_heads, d_mlp = TINY if quick else NETWORKS[network]
    config = DecoderConfig(
        vocab_size=V,
        d_model=D,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        d_head=D // heads,
        d_mlp=d_mlp,
        context=T,
        names=families.LLAMA,
        rotary=D // heads,
    )
    model = initial(config, None, jax.random.key(0))

    def sample_fn(rng: Any, step: Any) -> Any:
        return jax.random.randint(jax.random.fold_in(rng, step), (B, T), 0, V)

    sizes = {s: model.params[s].shape for s in model.matrices()[: 1 if quick else None]}
    select = {s: {"components": int(times * max(*d, 2 * min(d)))} for s, d in sizes.items()}
    found = Problem(model.apply_fn, model.params, sample_fn, select=select, valid_fn=predicting)
    found.layouts  # noqa: B018 - before params are traced below
    return found


def _measured(fn: Any, *args: Any) -> dict[str, float]:
    """Milliseconds of a call, seconds of compiling, operations and temporaries by XLA's count."""
    lowered = jax.jit(fn).lower(*args)
    began = time.perf_counter()
    program = lowered.compile()
    compile_s = time.perf_counter() - began
    call = lambda: jax.block_until_ready(program(*args))  # noqa: E731
    first = timed(call, 1)
    memory = program.memory_analysis()
    return {
        "ms": 1e3 * timed(call, 3 if first > 1 else WINDOWS),
        "compile_s": compile_s,
        "operations": float((program.cost_analysis() or {}).get("flops", float("nan"))),
        "temporaries_gib": memory.temp_size_in_bytes / 2**30 if memory else float("nan"),
    }


def measure(network: str, name: str, times: float, quick: bool) -> dict[str, Any]:
    """One row. times: the number of components, of what is suggested."""
    problem, settings = _problem(network, times, quick), suggest.for_tokens(name)
    method = registry.by_name(name)(**settings | {"batch_size": B, "loss_units": "absolute"})
    state = jax.jit(lambda key: init_state(key, problem, method))(jax.random.key(0))
    params, components, key = problem.params, state.components, jax.random.key(2)
    C, x = components.num_components, problem.example_batch(jax.random.key(1))
    on = jax.random.bernoulli(key, ACTIVE, (B, T, C))
    slots = slots_for(ACTIVE * C, B * T, C)
    peaks = measure_peaks()

    def gate(trained: Trained, params: Any, x: Any) -> Any:
        return observe.activity(method, problem, trained, params, x)

    def masked(components: Any, params: Any, on: Any, x: Any) -> Any:
        return sparse.apply(problem.apply_fn, params, components, on.astype(jnp.float32), x)

    def dispatched(components: Any, params: Any, on: Any, x: Any) -> Any:
        return sparse.apply(
            problem.apply_fn, params, components, on, x, route="dispatch", slots=slots
        )

    def distance(components: Any, params: Any, g: Any, x: Any) -> Any:
        out, head = outputs(problem.body(params, x)), problem.head(params)
        here = outputs(sparse.apply(problem.body, params, components, g, x))
        return minimality(here, out, "kl", head=head)

    target = _measured(problem.apply_fn, params, x)["ms"]
    g = on.astype(jnp.float32)
    found = {
        "gate": _measured(gate, Trained(components, state.gate), params, x),
        "masked": _measured(masked, components, params, on, x),
        "dispatch": _measured(dispatched, components, params, on, x),
        "gradient": _measured(jax.grad(distance), components, params, g, x),
    }
    step = _measured(make_step(problem, method), state, params, key)
    return {
        "network": network,
        "method": name,
        "components": C,
        "target_ms": target,
        **{f"{part}_ms": one["ms"] for part, one in found.items()},
        "ratio": min(found["masked"]["ms"], found["dispatch"]["ms"]) / target,
        "step_ms": step["ms"],
        "tokens_per_s": 1e3 * B * T / step["ms"],
        "share": step["operations"] / step["ms"] / (peaks.matmul_gflops * 1e6),
        "compile_s": step["compile_s"],
        "temporaries_gib": step["temporaries_gib"],
        "peak_gib": peak_memory_gib(),
        "matmul_gflops": peaks.matmul_gflops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default=None)
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, separated by commas")
    parser.add_argument("--methods", default="spd,vpd")
    parser.add_argument("--times", default="1,2", help="the number of components, of the usual")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="one tiny matrix; the numbers mean nothing"
    )
    parser.add_argument("--one", default=None, help="network,method,times: a row, in this process")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(NETWORKS):
        parser.error(f"unknown networks {sorted(unknown)}; known: {', '.join(NETWORKS)}.")
    if options.one:
        network, name, times = options.one.split(",")
        print(json.dumps(measure(network, name, float(times), options.quick)))
        return
    rows = []
    for network in options.only.split(","):
        for name in options.methods.split(","):
            for times in options.times.split(","):
                one = [sys.executable, __file__, "--one", f"{network},{name},{times}"]
                done = subprocess.run(
                    [*one, *(["--quick"] if options.quick else [])], capture_output=True, text=True
                )
                if done.returncode:
                    print(f"{network}, {name}, {times}: {done.stderr.strip().splitlines()[-1]}")
                    continue
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    show("Language models", rows, COLUMNS, markdown=options.markdown)
    write_json(options.json, rows)


if __name__ == "__main__":
    main()
