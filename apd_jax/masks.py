"""The selections by rank, under the name that users import: see `apd_jax.gates.selection`."""

from apd_jax.gates.selection import batch_largest, batch_topk, num_kept, topk

__all__ = ["batch_largest", "batch_topk", "num_kept", "topk"]
