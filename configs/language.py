"""Language models: one from a path, or a small one that is trained on text first.

    python -m apd_jax.main --config=configs/language.py:prose --workdir=runs/prose \\
        --config.target.text='~/books/*.txt'
    python -m apd_jax.main --config=configs/language.py:MODEL,vpd --workdir=runs/model \\
        --config.target.text='~/books/*.txt'

Argument: "prose" for a model of 4 layers, width 128 and 2,048 tokens that is trained on the text,
or MODEL, the path of a pretrained one (a Hugging Face folder, a .gguf or glassllm file; see
docs/language.md). Then
    spd, vpd, whole, targeted, apd   the method; spd if none is named
    mlp, attention                   decompose only these matrices of a layer; else all of them
    layer0, layer1, ...              only these layers
    shuffled                         control: MODEL with the entries of each matrix in random places
    smoke                            every stage in seconds on a CPU; the result means nothing
The text is any glob pattern over UTF-8 files; without one, half of a novel that comes with the
package, which is enough to see that everything works. A tenth of its documents is held out for the
evaluation. `targeted` decomposes what the network does on --config.target.chosen, another pattern.
"""

from typing import Any

from ml_collections import ConfigDict

from apd_jax.commands import configs
from apd_jax.methods import suggest

METHODS = ("spd", "vpd", "whole", "targeted", "apd")
SITES = ("mlp", "attention")


def get_config(arg: str = "prose") -> ConfigDict:
    """The experiment `arg`, e.g. "prose,vpd" or "~/models/pythia-14m,mlp,layer2".

    Raises:
      InputError: an unknown variant, or two methods.
    """
    model, *rest = arg.split(",")
    known = (*METHODS, *SITES, "smoke", "shuffled")
    named, layers = configs.variants(
        "language", ",".join(rest), known, size=r"layer\d+", form="layer0"
    )
    methods, sites = named & set(METHODS), named & set(SITES)
    configs.at_most_one("language", arg, methods, sites)

    method = methods.pop() if methods else "spd"
    config = configs.begin("language", num_batches=8, batch_size=16, method=method)
    target = config.target
    target.model = "" if model == "prose" else model
    target.text = ""  # the sample
    target.chosen = ""
    target.context = 64
    target.held_out = 0.1
    target.document_chars = 5000
    target.sites = sites.pop() if sites else "all"
    target.layers = tuple(int(name.removeprefix("layer")) for name in layers)  # (): all
    target.shuffled = "shuffled" in named
    target.dtype = "float32"
    target.remat = False
    target.vocab_size = 2048
    target.num_layers = 4
    target.d_model = 128
    target.num_heads = 4
    target.d_mlp = 384
    target.pretrain = configs.pretraining(2000, 16, 2e-3, warmup_fraction=0.05, weight_decay=0.1)
    _decomposition(config.apd, method)
    if "smoke" in named:
        target.update(num_layers=1, d_model=16, d_mlp=32, vocab_size=300, context=16)
        configs.smoke(config, 20, 8, pretrain_steps=20, evaluation_size=8)
        if method != "apd":
            config.apd.update(faithfulness_warmup_steps=10, num_components=20)
    return config.lock()


def _decomposition(apd: Any, method: str) -> None:
    """What is suggested for language models."""
    apd.update(suggest.for_tokens(method))
    apd.loss_units = "target"
    apd.update(batch_size=16, steps_per_call=10, log_every_steps=50, checkpoint_every_steps=500)
