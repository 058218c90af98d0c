r"""Fills in launch/jobset.yaml and hands it to kubectl.

    python launch/jobset.py --name=apd --image=IMAGE --processes=4 [--gpus=8] [--dry-run] \
        [--module=apd_jax.main] -- --config=... --workdir=gs://...
"""

import argparse
import json
import pathlib
import string
import subprocess


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument(
        "--image",
        required=True,
        help="container image with this repository as its working directory",
    )
    parser.add_argument("--processes", required=True, type=int, help="pods")
    parser.add_argument("--gpus", default=8, type=int, help="GPUs per pod")
    parser.add_argument("--dry-run", action="store_true", help="print the JobSet and do nothing")
    parser.add_argument("--module", default="apd_jax.main", help="what is run")
    parser.add_argument("args", nargs="+", help="what follows python -m MODULE")
    given = parser.parse_args()
    template = string.Template((pathlib.Path(__file__).parent / "jobset.yaml").read_text())
    jobset = template.substitute(
        NAME=given.name,
        IMAGE=given.image,
        PROCESSES=given.processes,
        GPUS=given.gpus,
        MODULE=given.module,
        ARGS=json.dumps(given.args),  # a JSON list is YAML
    )
    if given.dry_run:
        print(jobset, end="")
    else:
        subprocess.run(["kubectl", "apply", "--filename=-"], input=jobset, text=True, check=True)


if __name__ == "__main__":
    main()
