"""Rotary frequencies, plain and stretched to contexts longer than the trained one, in numpy.

With d the head dimension, b the base, i = 0 ... d/2 - 1 a pair, s the factor and L the original length:

    default   f_i = b^(-2i/d)                                                          arXiv 2104.09864
    linear    f_i / s                                                                  arXiv 2306.15595
    llama3    w f_i + (1 - w) f_i / s,  w = clip((L f_i / 2 pi - low) / (high - low), 0, 1)
    yarn      (1 - r_i) f_i + r_i f_i / s,  r_i = clip((i - first) / (last - first), 0, 1)    arXiv 2309.00071
              first, last: the pairs that turn `beta_fast` and `beta_slow` times in L, d ln(L / 2 pi t) / (2 ln b)

YaRN also multiplies what is rotated (so scores by its square): by 0.1 ln s + 1, or by what the file says.

1. `kind` is a field, so that plain JSON holds which scaling it is.
2. Frequencies are rounded to float32 after every step, in the order of `transformers`, and not once at the end. The
   last bit of a frequency is 6e-8 of it, but a position multiplies it: 30,000 positions on, angles would differ by
   2e-3 and logits by 1e-3 of their scale.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Every wave stretched by `factor`."""

  factor: int | float
  kind: str = 'linear'

  def __post_init__(self):
    _check(self, self.factor > 0, 'factor > 0')


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3's: waves longer than `original_length / low` are stretched, shorter than `/ high` kept."""

  factor: int | float
  low: int | float
  high: int | float
  original_length: int
  kind: str = 'llama3'

  def __post_init__(self):
    fits = self.factor > 0 and 0 < self.low < self.high and self.original_length > 0
    _check(self, fits, 'factor > 0, 0 < low < high and original_length > 0')


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN's: pairs that turn at least `beta_fast` times in the original length are kept, at most `beta_slow` stretched.

  `truncate` rounds the two bounds outwards to whole pairs. `attention_factor` None is derived from `factor`, and from
  `mscale` and `mscale_all_dim` where both are given and not 0 (DeepSeek-V2).
  """

  factor: int | float
  original_length: int
  beta_fast: int | float = 32
  beta_slow: int | float = 1
  attention_factor: int | float | None = None
  mscale: int | float | None = None
  mscale_all_dim: int | float | None = None
  truncate: bool = True
  kind: str = 'yarn'

  def __post_init__(self):
    fits = self.factor > 0 and self.original_length > 0 and self.beta_fast > 0 and self.beta_slow > 0
    _check(self, fits, 'factor, original_length, beta_fast and beta_slow > 0')


SCALINGS = {'linear': LinearScaling, 'llama3': Llama3Scaling, 'yarn': YarnScaling}
RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def frequencies(head_dim: int, theta: int | float, scaling: RopeScaling | None) -> np.ndarray:
  """float32[head_dim / 2]: radians per position of each pair."""
  # In float32 and in the order of the code that checkpoints were trained with, see 2.
  number = np.float32
  exponents = (np.arange(0, head_dim, 2, dtype=number) / number(head_dim)).astype(np.float64)
  turn = (float(number(theta)) ** exponents).astype(number)  # positions per radian
  plain = 1 / turn
  if scaling is None:
    return plain
  factor = number(scaling.factor)
  if scaling.kind == 'linear':
    return plain / factor
  if scaling.kind == 'llama3':
    wave = (1 / plain) * number(2 * math.pi)
    longest, shortest = (number(scaling.original_length / turns) for turns in (scaling.low, scaling.high))
    kept = ((1 / wave) * number(scaling.original_length) - number(scaling.low)) / number(scaling.high - scaling.low)
    mixed = (1 - kept) * plain / factor + kept * plain
    return np.where(wave > longest, plain / factor, np.where(wave < shortest, plain, mixed))
  first, last = _yarn_bounds(head_dim, theta, scaling)
  stretched = np.clip((np.arange(head_dim // 2, dtype=number) - number(first)) / number(last - first), 0, 1)
  kept = 1 - stretched
  return 1 / (factor * turn) * (1 - kept) + plain * kept


def magnitude(scaling: RopeScaling | None) -> float:
  """What rotated queries and keys are multiplied by; 1 for all kinds but yarn."""
  if scaling is None or scaling.kind != 'yarn':
    return 1.0
  if scaling.attention_factor is not None:
    return float(scaling.attention_factor)
  if scaling.mscale and scaling.mscale_all_dim:
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
  return yarn_mscale(scaling.factor, 1.0)


def yarn_mscale(factor: int | float, mscale: int | float) -> float:
  """0.1 mscale ln(factor) + 1, and 1 where nothing is stretched."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_bounds(head_dim, theta, scaling):
  def pair(turns):
    return head_dim * math.log(scaling.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

  first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
  if scaling.truncate:
    first, last = math.floor(first), math.ceil(last)
  # The upper limit is the head dimension, not the number of pairs, as published code has it.
  first, last = max(first, 0), min(last, head_dim - 1)
  return first, last if last != first else last + 0.001


def _check(scaling, fits, needs):
  kind = type(scaling).__dataclass_fields__['kind'].default
  if not fits or scaling.kind != kind:
    raise ValueError(f'rope_scaling: got {scaling}; needs {needs}, and the kind {kind!r}')
