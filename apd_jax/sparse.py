"""The sparse pass, under the name that users import: see `apd_jax.forward.sparse`."""

from apd_jax.forward.sparse import apply

__all__ = ["apply"]
