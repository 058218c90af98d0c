"""Trained language models from files, and text as tokens."""

from apd_jax.language import tokens
from apd_jax.language.decoder import Decoder, DecoderConfig
from apd_jax.language.interventions import Intervention, steer, swap, swapped
from apd_jax.language.pretrained import LanguageModel, load, save
from apd_jax.language.sampling import generate
from apd_jax.language.tokenizer import Tokenizer

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Intervention",
    "LanguageModel",
    "Tokenizer",
    "generate",
    "load",
    "save",
    "steer",
    "swap",
    "swapped",
    "tokens",
]
