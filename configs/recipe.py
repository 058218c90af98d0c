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

from typing import Any

from ml_collections import ConfigDict

from apd_jax.commands import configs
from apd_jax.errors import one_of
from apd_jax.recipe.numbers import STAGES, default_recipe

# (mechanisms, probability of each): the target's own fields, which settings made of them follow
SIZES = {
    "tms": ("num_features", "data.feature_probability"),
    "tms_coactive": ("num_groups", "group_probability"),
    "resid_mlp": ("num_features", "data.feature_probability"),
    "gated": ("num_functions", "bit_probability"),
}
# whose hidden activations are reconstructed too: the outputs alone do not tell how they are made
HIDDEN = ("resid_mlp", "gated", "tms_coactive")


def _field(target: Any, path: str) -> Any:
    """A reference to a field: what is made of it follows it."""
    *above, name = path.split(".")
    for part in above:
        target = target[part]
    return target.get_ref(name)


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
    base = configs.target_config(name, rest, sorted(own))
    config, _ = configs.of_target(",".join([name, *rest]), "apd")
    # Full rank (50) would cost many times as much.
    config.apd.rank = 2 if name == "resid_mlp" else base.apd.rank
    mechanisms, probability = (_field(config.target, field) for field in SIZES[name])
    tenths = 13 if name == "resid_mlp" else 20  # of a component per mechanism; likewise
    num_components = (tenths * mechanisms + 5) // 10
    if name == "tms" and base.target.hidden != "none":
        num_components += 1  # room for what is always on, which the recipe finds
    elif name == "resid_mlp" and not split:
        # As many more as hold a matrix of full rank between them.
        num_components += (config.target.get_ref("d_mlp") + config.apd.rank - 1) // config.apd.rank
    config.apd.num_components = num_components
    # 0: found
    config.apd.topk = probability * mechanisms if told or name == "gated" else 0.0
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
