"""Text in: files and TFDS data sets become Examples, and (seed, step) says which of them a batch
holds."""

from spct_jax.data.heldout import split
from spct_jax.data.preference import load

__all__ = ['load', 'split']
