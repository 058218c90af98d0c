"""The recipe: training in stages, with one set of numbers for all targets (`apd_jax.recipe`).

    python -m apd_jax.main --config=configs/recipe.py:tms,40-10 --workdir=runs/recipe_tms
    python -m apd_jax.main --config=configs/recipe.py:resid_mlp,2layer --workdir=runs/recipe_resid

Argument: the name of a target's file in configs/, then that file's own arguments. The target
network and its data are that file's; of the decomposition only sizes are taken from the target: C
and the rank, and whether hidden activations are to be reconstructed. k, the mean number of active
components, is found, and so is how many are always on: one where TMS has a matrix in the hidden
space, and in ResidMLP as many as hold W_out between them, which features can only share, as one
dense part. Further arguments:
    told     k is set to the true mean instead of found; for gated always, which no modes explain
    split    (resid_mlp) nothing is always on, so that W_out must be split too
    learned  a learned threshold per component (`mask = "learned"`) in `polish` and `refine`
    smoke    every stage in seconds on a CPU; the result means nothing
Results: docs/results.md.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from apd_jax.errors import one_of
from apd_jax.recipe.numbers import STAGES, default_recipe

shared = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_shared.py"))))

# (mechanisms, probability of each), from the target's own fields
SIZES = {
    "tms": lambda t: (t.num_features, t.feature_probability),
    "tms_coactive": lambda t: (t.num_groups, t.group_probability),
    "resid_mlp": lambda t: (t.num_features, t.feature_probability),
    "gated": lambda t: (t.num_functions, t.bit_probability),
}
# whose hidden activations are reconstructed too: the outputs alone do not tell how they are made
HIDDEN = ("resid_mlp", "gated", "tms_coactive")


def get_config(arg: str = "tms,40-10") -> ConfigDict:
    """The experiment `arg`, e.g. "tms,5-2" or "resid_mlp,2layer,smoke".

    Raises:
      InputError: an unknown target, or what the target's own file refuses.
    """
    name, *rest = arg.split(",")
    one_of("recipe target", name, tuple(SIZES))
    own = {"told", "learned"} | ({"split"} if name == "resid_mlp" else set())
    told, learned, split = (
        variant in own and variant in rest for variant in ("told", "learned", "split")
    )
    rest = [variant for variant in rest if variant not in own]
    base = shared.load(name).get_config(*[",".join(rest)] if rest else [])
    mechanisms, probability = SIZES[name](base.target)

    config, _ = shared.of_target(",".join([name, *rest]), "apd")
    # Full rank (50) would cost many times as much.
    config.apd.rank = 2 if name == "resid_mlp" else base.apd.rank
    config.apd.num_components = round((1.3 if name == "resid_mlp" else 2) * mechanisms)  # likewise
    if name == "tms" and base.target.hidden != "none":
        config.apd.num_components += 1  # room for what is always on, which the recipe finds
    elif name == "resid_mlp" and not split:
        # As many more as hold a matrix of full rank between them.
        config.apd.num_components += -(-base.target.d_mlp // config.apd.rank)
    config.apd.topk = mechanisms * probability if told or name == "gated" else 0.0  # 0: found
    config.apd.batch_size = 256 if name == "resid_mlp" else 512
    # Whether; how strongly, the recipe says.
    config.apd.hidden_reconstruction_coeff = float(name in HIDDEN)
    recipe: Any = default_recipe()
    recipe.find_always_on = not split
    if learned:
        # An active component costs what dropping one at the threshold does:
        # minimality_coeff · (threshold · recipe.threshold)².
        recipe.polish.update(mask="learned", inactive="uniform", importance_coeff=0.23)
        recipe.refine.update(mask="learned", importance_coeff=2.3e-3)
    config.recipe = recipe
    if "smoke" in rest:
        config.apd.batch_size = 64
        config.apd.steps_per_call = config.apd.log_every_steps = (
            config.apd.checkpoint_every_steps
        ) = 5
        config.recipe.restarts = 2
        config.recipe.update({stage: {"num_steps": 10} for stage in STAGES})
    return config.lock()
