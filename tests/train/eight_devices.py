"""Steps on meshes of eight devices, in a process of their own: prints the largest errors."""

import json
import os

import conftest

os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax
import meshes
import numpy as np


def main():
    method, problem = meshes.sgd(), meshes.problem_of()
    begin = meshes.initial(method, problem)
    expected = meshes.run(1, 1, method, problem, begin)
    errors = {}
    for D, M in ((4, 2), (1, 8)):
        found = meshes.run(D, M, method, problem, begin)
        meshes.check_same(found, expected)
        errors[f"{D}x{M}"] = max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True)
        )
    print(json.dumps(errors))


if __name__ == "__main__":
    assert conftest.ROOT and jax.device_count() == 8
    main()
