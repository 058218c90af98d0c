"""Many runs in one program, side by side by `jax.vmap`: ms per step, and per step and run.

    python benchmarks/instances.py [--json FILE] [--markdown] [--quick]

The runs are of TMS 40-10 with C = 50 and batch 2048.
"""

from __future__ import annotations

import argparse

import jax
from common import Steps, load_config, peak_memory_gib, show, write_json

NUMBERS = (1, 8, 64, 256)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default=None)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="1 and 2 instances of 5-2 with batch 32"
    )
    options = parser.parse_args()
    rows = []
    for number in (1, 2) if options.quick else NUMBERS:
        experiment = load_config("tms.py", "5-2" if options.quick else "40-10")
        running = Steps.build(
            experiment,
            steps=max(1, 32 // number),
            batch_size=32 if options.quick else None,
            instances=number,
        )
        ms, _ = running.ms_and_compile_s(2 if options.quick else 3)
        rows.append(
            {
                "instances": number,
                "ms_per_step": ms,
                "ms_per_step_and_run": ms / number,
                "peak_gib": peak_memory_gib(),
            }
        )
    write_json(options.json, {"device": jax.devices()[0].device_kind, "rows": rows})
    columns = {
        "instances": "instances",
        "ms per step": "ms_per_step",
        "per run": "ms_per_step_and_run",
        "peak GiB": "peak_gib",
    }
    show(
        f"Instances in one program, TMS 40-10, {jax.devices()[0].device_kind}",
        rows,
        columns,
        markdown=options.markdown,
    )


if __name__ == "__main__":
    main()
