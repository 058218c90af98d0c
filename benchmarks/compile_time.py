"""How long the train step of every shipped config takes to trace and compile, without a cache.

    python benchmarks/compile_time.py [--json FILE] [--markdown] [--quick]

The program is that of a run on one device: `steps_per_call` steps, with an untrained target. Of a
recipe, which trains in stages, it is the program of the fields in its config.
`--quick` takes the smoke variant of two configs.
"""

from __future__ import annotations

import argparse
import time

import jax
from common import Steps, load_config, show, write_json

from apd_jax.train.step import scan_steps

LIMIT_S = 15.0
CONFIGS = [
    ("tms.py", "5-2"),
    ("tms.py", "40-10"),
    ("tms.py", "40-10,id"),
    ("tms.py", "40-10,rotation"),
    ("resid_mlp.py", "1layer"),
    ("resid_mlp.py", "1layer,long"),
    ("resid_mlp.py", "1layer,clean"),
    ("resid_mlp.py", "2layer"),
    ("resid_mlp.py", "3layer"),
    ("linear.py", ""),
    ("gated.py", ""),
    ("digits.py", ""),
    ("induction.py", ""),
    ("tms_coactive.py", ""),
    ("recipe.py", "tms,40-10,told"),
    ("recipe.py", "resid_mlp,2layer,told"),
]
QUICK = [("tms.py", "5-2,smoke"), ("linear.py", "2x2,smoke")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default=None)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for file, variant in QUICK if options.quick else CONFIGS:
        experiment = load_config(file, variant)
        running = Steps.build(experiment, steps=experiment.apd.steps_per_call)
        began = time.perf_counter()
        program = scan_steps(running.step, running.steps)
        jax.jit(program).lower(running.state, running.params, jax.random.key(0)).compile()
        seconds = time.perf_counter() - began
        rows.append(
            {
                "config": f"{file}:{variant}".removesuffix(":"),
                "compile_s": seconds,
                "in time": "yes" if seconds < LIMIT_S else "no",
            }
        )
    write_json(
        options.json, {"device": jax.devices()[0].device_kind, "limit_s": LIMIT_S, "rows": rows}
    )
    columns = {"config": "config", "compile s": "compile_s", f"under {LIMIT_S:.0f} s": "in time"}
    show(
        f"Compiling the train step, {jax.devices()[0].device_kind}, nothing cached",
        rows,
        columns,
        markdown=options.markdown,
    )


if __name__ == "__main__":
    main()
