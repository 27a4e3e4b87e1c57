"""AdamW with a learning-rate schedule, global-norm clipping and decay on matrices only.

The update, in this order (gradients are of the mean loss):

    g <- g * min(1, clip_norm / |g|)          over the whole tree; clip_norm = 0 switches it off
    u <- m_hat / (sqrt(v_hat) + eps)          Adam with bias correction, b1, b2
    u <- u + weight_decay * p                 kernels, tables and adapters; never norm scales and biases
    p <- p - lr(count) * u                    count = updates applied so far

The paper names only learning rates (RFT 5e-6, RL 4e-7, meta RM 1e-5); the rest are config fields.

1. Warm-up starts at lr / warmup_steps, not at 0, so that the first step is a step.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

_DECAYED = ('kernel', 'table', 'lora_a', 'lora_b')  # the last name in a leaf's path


@dataclasses.dataclass(frozen=True)
class OptimSettings:
  """Numbers of one optimizer. `warmup_steps` and `total_steps` count updates."""

  schedule: str  # a name of SCHEDULES
  learning_rate: float  # the peak
  warmup_steps: int
  total_steps: int  # where 'cosine' and 'linear' reach their end
  end_fraction: float  # lr there, as a fraction of the peak
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float  # 0 = off

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(
          f'unknown schedule {self.schedule!r}; the known ones are {", ".join(SCHEDULES)}.'
      )
    for name, holds, allowed in (
        ('learning_rate', self.learning_rate > 0 and math.isfinite(self.learning_rate), 'a positive number'),
        ('warmup_steps', self.warmup_steps >= 0, '0 or more'),
        ('total_steps', self.total_steps >= 1, '1 or more'),
        ('end_fraction', 0 <= self.end_fraction <= 1, 'between 0 and 1'),
        ('b1', 0 <= self.b1 < 1, 'at least 0 and below 1'),
        ('b2', 0 <= self.b2 < 1, 'at least 0 and below 1'),
        ('eps', self.eps > 0, 'a positive number'),
        ('weight_decay', self.weight_decay >= 0, '0 or more'),
        ('clip_norm', self.clip_norm >= 0, '0 (off) or a positive number'),
    ):
      if not holds:
        raise ValueError(f'optimizer field {name}: got {getattr(self, name)!r}; it must be {allowed}.')
    if self.schedule == 'constant' and self.warmup_steps:
      raise ValueError(
          f'schedule \'constant\' has no warm-up, but warmup_steps is {self.warmup_steps}; set it to 0,'
          ' or choose \'warmup_constant\'.'
      )
    if self.schedule in ('cosine', 'linear') and self.warmup_steps >= self.total_steps:
      raise ValueError(
          f'schedule {self.schedule!r}: warmup_steps {self.warmup_steps} must be smaller than'
          f' total_steps {self.total_steps}, or nothing is left to decay.'
      )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An Optax transformation, and the schedule inside it so that the learning rate can be logged."""

  transform: optax.GradientTransformation
  schedule: Callable[[jax.Array], jax.Array]


def _warm(settings: OptimSettings, count: jax.Array) -> jax.Array:
  return jnp.minimum(1.0, (count + 1.0) / max(settings.warmup_steps, 1))


def _progress(settings: OptimSettings, count: jax.Array) -> jax.Array:
  return jnp.clip(
      (count - settings.warmup_steps) / (settings.total_steps - settings.warmup_steps), 0.0, 1.0
  )


def _constant(settings: OptimSettings, count: jax.Array) -> jax.Array:
  return jnp.ones_like(count)


def _cosine(settings: OptimSettings, count: jax.Array) -> jax.Array:
  fall = 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(settings, count)))
  return _warm(settings, count) * (settings.end_fraction + (1 - settings.end_fraction) * fall)


def _linear(settings: OptimSettings, count: jax.Array) -> jax.Array:
  fall = 1.0 - _progress(settings, count)
  return _warm(settings, count) * (settings.end_fraction + (1 - settings.end_fraction) * fall)


SCHEDULES = {
    'constant': _constant,
    'warmup_constant': _warm,
    'cosine': _cosine,  # after the warm-up, if any
    'linear': _linear,
}


def make_schedule(settings: OptimSettings) -> Callable[[jax.Array], jax.Array]:
  """count of updates applied so far -> learning rate, float32."""
  shape = SCHEDULES[settings.schedule]
  return lambda count: settings.learning_rate * shape(settings, jnp.asarray(count, jnp.float32))


def decayed(params: dict) -> dict:
  """True where weight decay applies: kernels, tables and adapters, not norm scales and biases."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _DECAYED, params)


def make_optimizer(settings: OptimSettings) -> Optimizer:
  schedule = make_schedule(settings)
  transform = optax.chain(
      optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(),
      optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps),
      optax.add_decayed_weights(settings.weight_decay, mask=decayed),
      optax.scale_by_learning_rate(schedule),
  )
  return Optimizer(transform=transform, schedule=schedule)


def applied_updates(opt_state: optax.OptState) -> jax.Array:
  """How many updates this optimizer state has applied: the count that its schedule reads."""
  return opt_state[-1].count
