"""All benchmarks, one after the other. Each runs in a process of its own and prints its tables.

    python benchmarks [--json FILE] [--markdown] [--quick] [--only step_time,scaling]

step_time      a train step of the paper's settings: bound, parts, memory, the original
compile_time   every shipped config
instances      many runs in one program
scaling        components, rank, batch, devices; the cost model; a transformer on paper
architectures  the sparse pass on any network
probes         attributions of wide outputs
communication  what a step sends between devices (8 virtual ones)

Takes seven and a half minutes on two quiet cores. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_json

HERE = Path(__file__).parent
PARTS = (
    "step_time",
    "compile_time",
    "instances",
    "scaling",
    "architectures",
    "probes",
    "communication",
)
MARKDOWN = PARTS[:4]
# Flags of the parts that --quick runs; it leaves out the others.
QUICK = {"architectures": ["--only", "MLP"]} | {part: ["--quick"] for part in MARKDOWN}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default=None, help="file for the results of all parts, by part")
    parser.add_argument("--markdown", action="store_true", help="tables for the docs")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny shapes: shows that everything runs; the numbers mean nothing",
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}.")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in [part for part in chosen if not options.quick or part in QUICK]:
            file, began = Path(folder) / f"{part}.json", time.monotonic()
            flags = [
                *(["--markdown"] if options.markdown and part in MARKDOWN else []),
                *(QUICK[part] if options.quick else []),
            ]
            subprocess.run(
                [sys.executable, str(HERE / f"{part}.py"), "--json", str(file), *flags], check=True
            )
            found[part] = json.loads(file.read_text())
            print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr)
            write_json(options.json, found)


if __name__ == "__main__":
    main()
