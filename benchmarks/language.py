r"""Time and memory of a language model's train step: of its parts, and as components grow.

    python benchmarks/language.py [--json FILE] [--only glassllm,5M] [--methods spd,vpd] [--quick]

Networks have random weights of the shapes named: time does not depend on them. Every row is a
process of its own: 8 sequences of 64 tokens, C as `suggest` has it, or a multiple.
  target        a forward pass of the network itself
  sparse pass   the same with every decomposed matrix Σ_c m_c P_c, m of every position
  step          all of a train step, by the method's settings for tokens
  share         of the matmul peak of this process, of XLA's own count of operations
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
from common import measure_peaks, peak_memory_gib, show, timed, write_json

from apd_jax.forward import sparse
from apd_jax.language import families
from apd_jax.language.decoder import DecoderConfig
from apd_jax.language.pretrained import initial
from apd_jax.language.tokens import predicting
from apd_jax.methods import registry, suggest
from apd_jax.network.problem import Problem
from apd_jax.train.state import init_state
from apd_jax.train.step import make_step

B, T = 8, 64
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
    "sparse pass, ms": "sparse_ms",
    "times the target": "ratio",
    "step, ms": "step_ms",
    "tokens/s": "tokens_per_s",
    "share of peak": "share",
    "compile, s": "compile_s",
    "GiB": "peak_gib",
}


def measure(network: str, name: str, times: float, quick: bool) -> dict[str, Any]:
    """One row. times: the number of components, of what is suggested."""
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

    select: Any = model.matrices()
    settings: Any = suggest.for_tokens(name) | {"batch_size": B, "loss_units": "absolute"}
    if times != 1:  # of the size that SPD gives a site by itself
        sizes = {s: model.params[s].shape for s in select}
        counts = {s: int(times * max(*d, 2 * min(d))) for s, d in sizes.items()}
        select = {s: {"components": n} for s, n in counts.items()}
    problem = Problem(model.apply_fn, model.params, sample_fn, select=select, valid_fn=predicting)
    problem.layouts  # noqa: B018 - before params are traced below
    method = registry.by_name(name)(**settings)
    state = jax.jit(lambda key: init_state(key, problem, method))(jax.random.key(0))
    C, x, key = state.components.num_components, sample_fn(jax.random.key(1), 0), jax.random.key(2)
    mask = jax.random.bernoulli(key, 0.03, (B, T, C)).astype(jnp.float32)
    peaks = measure_peaks()

    def seconds(fn: Any, *args: Any) -> tuple[float, float, float]:
        """Of a call, of compiling, and operations by XLA's count."""
        program = jax.jit(fn).lower(*args).compile()
        counted = program.cost_analysis() or {}
        call = lambda: jax.block_until_ready(program(*args))  # noqa: E731
        first = timed(call, 1)
        return timed(call), first, float(counted.get("flops", float("nan")))

    target_s = seconds(model.apply_fn, model.params, x)[0]
    apply_fn = model.apply_fn
    sparse_s = seconds(
        lambda p, c, m, x: sparse.apply(apply_fn, p, c, m, x),
        model.params,
        state.components,
        mask,
        x,
    )[0]
    step = make_step(problem, method)
    began = jax.jit(step).lower(state, model.params, key)
    compile_s = timed(lambda: began.compile(), 1)
    step_s, _, operations = seconds(step, state, model.params, key)
    return {
        "network": network,
        "method": name,
        "components": C,
        "target_ms": 1e3 * target_s,
        "sparse_ms": 1e3 * sparse_s,
        "ratio": sparse_s / target_s,
        "step_ms": 1e3 * step_s,
        "tokens_per_s": B * T / step_s,
        "share": operations / step_s / (peaks.matmul_gflops * 1e9),
        "compile_s": compile_s,
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
    parser.add_argument("--quick", action="store_true", help="tiny; the numbers mean nothing")
    parser.add_argument("--one", default=None, help="network,method,times: a row, in this process")
    options = parser.parse_args()
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
