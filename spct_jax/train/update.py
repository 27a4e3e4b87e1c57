"""One optimizer step: gradients of a loss sum, accumulated, divided once, applied.

A loss function gives `(sum, count, aux)`; with microbatches i = 1..m the gradient is

    g = (sum_i grad sum_i) / (sum_i count_i)

and never the mean of the microbatches' means: they hold different numbers of tokens, and the number of
microbatches (or hosts) must not change the result. The metrics are reduced in the same way.

1. A name in `aux` that ends in '_max' is combined by maximum and its count ignored.
2. Where the gradient is not finite the update is skipped: parameters and optimizer state stay as they
   are, bit for bit, the metric `skipped` is 1, and `step` advances, so that a resumed or running job
   does not meet the same batch for ever.
3. Microbatch i takes rows i, i + m, i + 2m, ...: each device splits the rows it already holds.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import optax

from spct_jax import sharding
from spct_jax.train import optim
from spct_jax.train.state import State

LossFn = Callable[[Any, dict], tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]]


def check_rows(num_rows: int, microbatches: int, mesh: Any) -> None:
  """Raises unless a batch of `num_rows` rows splits evenly over microbatches and devices."""
  if microbatches < 1:
    raise ValueError(f'microbatches: got {microbatches}; it must be 1 or more.')
  ways = sharding.data_ways(mesh)
  if num_rows < 1 or num_rows % (ways * microbatches):
    raise ValueError(
        f'a batch of {num_rows} rows cannot be dealt over {microbatches} microbatches x {ways} devices'
        f' (axes {" x ".join(sharding.DATA_AXES)}); use a multiple of {ways * microbatches}.'
    )


def put_batch(batch: dict, mesh: Any) -> dict:
  """A host batch (the same in every process) onto the mesh, its rows over the data axes."""
  return sharding.to_device(batch, sharding.batch_rows(mesh))


def make_step(
    loss_fn: LossFn,
    optimizer: optim.Optimizer,
    *,
    microbatches: int,
    mesh: Any,
    shardings: State,
    frozen: Any = None,
) -> Callable[[State, dict], tuple[State, dict[str, jax.Array]]]:
  """The jitted `step(state, batch) -> (state, metrics)`; it donates the state that it is given.

  `frozen` are arrays that the loss reads and no step changes: the state then holds adapters only, and the loss is of
  `{'frozen': frozen, 'adapters': params}` (`lora.Adapted`). Gradients are of the state's parameters alone.

  `batch` is a dict of arrays whose first dimension is the rows (`put_batch`). `metrics` are float32
  scalars, the same on all devices: loss, count (the loss's denominator), the means of `aux`,
  grad_norm (before clipping), param_norm (before the update), learning_rate, skipped.
  """
  def step(state, batch, frozen=None):
    params = state['params']
    loss = loss_fn
    if frozen is not None:
      loss = lambda params, part: loss_fn({'frozen': frozen, 'adapters': params}, part)
    (total, count, aux), grads = _accumulate(loss, params, batch, microbatches, mesh, shardings)
    denominator = jnp.maximum(count, 1).astype(jnp.float32)
    grads = jax.tree.map(lambda g: g / denominator, grads)
    grad_norm = _norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(total)
    updates, opt_state = optimizer.transform.update(grads, state['opt_state'], params)
    moved = {'params': optax.apply_updates(params, updates), 'opt_state': opt_state}
    kept = {'params': params, 'opt_state': state['opt_state']}
    chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)
    metrics = {
        'loss': total / denominator,
        'count': count,
        **{name: _mean(name, *pair) for name, pair in aux.items()},
        'grad_norm': grad_norm,
        'param_norm': _norm(params),
        'learning_rate': optimizer.schedule(optim.applied_updates(state['opt_state'])),
        'skipped': 1 - finite.astype(jnp.float32),
    }
    metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
    return {**chosen, 'step': state['step'] + 1}, metrics

  places = (shardings, sharding.batch_rows(mesh))
  if frozen is not None:
    places += (jax.tree.map(lambda leaf: leaf.sharding, frozen),)
  jitted = jax.jit(
      step, in_shardings=places, out_shardings=(shardings, sharding.replicated(mesh)), donate_argnums=(0,)
  )
  return jitted if frozen is None else functools.partial(_with_frozen, jitted, frozen)


def _with_frozen(jitted, frozen, state, batch):
  return jitted(state, batch, frozen)


def _accumulate(loss_fn, params, batch, microbatches, mesh, shardings):
  """Sums over microbatches: ((loss sum, count, aux), gradient of the loss sum in float32)."""
  num_rows = jax.tree.leaves(batch)[0].shape[0]
  check_rows(num_rows, microbatches, mesh)

  def summed(params, part):
    total, count, aux = loss_fn(params, part)
    total, count = jnp.asarray(total, jnp.float32), jnp.asarray(count, jnp.float32)
    aux = {name: tuple(jnp.asarray(x, jnp.float32) for x in pair) for name, pair in aux.items()}
    return total, (total, count, aux)

  def one(part):
    grads, sums = jax.grad(summed, has_aux=True)(params, part)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    # Without the constraint the partitioner may keep a whole copy of the accumulator on each device.
    return sums, jax.lax.with_sharding_constraint(grads, shardings['params'])

  if microbatches == 1:
    return one(batch)

  def split(leaf):
    parts = leaf.reshape(num_rows // microbatches, microbatches, *leaf.shape[1:]).swapaxes(0, 1)
    where = NamedSharding(mesh, PartitionSpec(None, sharding.DATA_AXES))
    return jax.lax.with_sharding_constraint(parts, where)

  def body(carry, part):
    sums, grads = one(part)
    return (_add_sums(carry[0], sums), jax.tree.map(jnp.add, carry[1], grads)), None

  parts = jax.tree.map(split, batch)
  start = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
      jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], parts)),
  )
  for name in start[0][2]:
    if name.endswith('_max'):
      start[0][2][name] = (jnp.float32(-jnp.inf), jnp.float32(0))
  return jax.lax.scan(body, start, parts)[0]


def _add_sums(left, right):
  aux = {
      name: jax.tree.map(jnp.maximum if name.endswith('_max') else jnp.add, left[2][name], right[2][name])
      for name in left[2]
  }
  return left[0] + right[0], left[1] + right[1], aux


def _norm(tree: Any) -> jax.Array:
  """The Euclidean norm of all leaves together, float32."""
  return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def _mean(name: str, total: jax.Array, count: jax.Array) -> jax.Array:
  return total if name.endswith('_max') else total / jnp.maximum(count, 1)
