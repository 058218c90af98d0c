"""A harvest on its way: all that changes from batch to batch, and its file.

Shapes: C components.
"""

from __future__ import annotations

import dataclasses
import io
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from etils import epath
from jaxtyping import Float, Int

from apd_jax.errors import InputError, first_line
from apd_jax.interpretation import columns
from apd_jax.interpretation.token_counts import TokenCounts
from apd_jax.interpretation.windows import Kept

UNFINISHED = "unfinished.npz"


@dataclasses.dataclass
class State:
    """All that changes from batch to batch. crc: of the tokens read so far, in this process."""

    about: str
    kept: Kept
    inputs: TokenCounts
    following: TokenCounts
    fired: Int[np.ndarray, " C"]
    summed: Float[np.ndarray, " C"]
    num_tokens: int = 0
    step: int = 0
    crc: int = 0
    crc_kept: int = 0

    def __repr__(self) -> str:
        return wl.pformat(self)

    def read(self, tokens: np.ndarray, again: int | None = None) -> None:
        """Remembers a batch's tokens.

        Args:
          again: the number of a batch that was counted by an earlier process.
        Raises:
          InputError: those batches were others.
        """
        self.crc = zlib.crc32(tokens.tobytes(), self.crc)
        if again is not None and again + 1 == self.step and self.crc != self.crc_kept:
            raise InputError(
                f"the first {self.step} batches are not those that this harvest began with; give "
                "the same text, batch size and seed, or another folder."
            )

    def arrays(self) -> dict[str, np.ndarray]:
        leaves, _ = jax.tree.flatten(jax.device_get(self.kept))
        found = {f"kept_{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        for name in ("inputs", "following"):
            found |= {f"{name}_{k}": v for k, v in getattr(self, name).arrays().items()}
        found |= {"fired": self.fired, "summed": self.summed}
        return found | {"numbers": np.array([self.num_tokens, self.step, self.crc], np.int64)}

    def write(self, folder: epath.Path) -> None:
        """Whole or not at all."""
        content = io.BytesIO()
        np.savez(content, about=np.array(self.about), **self.arrays())
        columns.write(folder / UNFINISHED, content.getvalue())

    def resume(self, folder: epath.Path) -> None:
        """Takes up what `write` has written, if anything.

        Raises:
          InputError: it is torn, or of something else.
        """
        path = folder / UNFINISHED
        if not path.exists():
            return
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays = dict(file)
        except Exception as error:  # zip, header, system
            raise InputError(f"{path} is torn ({first_line(error)}); remove it.") from error
        if str(arrays["about"]) != self.about:
            raise InputError(
                f"{folder} holds an unfinished harvest of another decomposition, or with other "
                "settings; give another folder, or remove it."
            )
        leaves, form = jax.tree.flatten(self.kept)
        here = [jnp.asarray(arrays[f"kept_{i}"]) for i in range(len(leaves))]
        self.kept = jax.tree.unflatten(form, here)
        for name in ("inputs", "following"):
            for field in ("keys", "counts", "taken", "total"):
                setattr(getattr(self, name), field, arrays[f"{name}_{field}"])
        self.fired, self.summed = arrays["fired"], arrays["summed"]
        self.num_tokens, self.step, self.crc_kept = map(int, arrays["numbers"])
