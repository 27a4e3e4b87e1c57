"""Training state that is born sharded: `{'params', 'opt_state', 'step'}`, a pytree of arrays.

    abstract = eval_shape(init)  ->  shardings by the rules  ->  jit(init, out_shardings=shardings)

No device ever holds a leaf whole that the rules split, not even while it is made. The optimizer's
moments carry their parameter's name at the end of their path, so the same rules place them.

`step` counts the batches seen, and so the position in the data order; the optimizer's own count is
of the updates applied. They differ by the updates skipped for gradients that were not finite.
"""

from typing import Any

import jax
import jax.numpy as jnp

from spct_jax import sharding
from spct_jax.train import optim

State = dict[str, Any]


def _with_optimizer(params: Any, optimizer: optim.Optimizer) -> State:
  return {
      'params': params,
      'opt_state': optimizer.transform.init(params),
      'step': jnp.zeros((), jnp.int32),
  }


def abstract_state(model: Any, optimizer: optim.Optimizer) -> State:
  """Shapes and dtypes of the state; no device is touched."""
  return jax.eval_shape(lambda key: _with_optimizer(model.init(key), optimizer), jax.random.key(0))


def state_shardings(model: Any, optimizer: optim.Optimizer, rules: sharding.Rules, mesh: Any) -> State:
  return sharding.tree_shardings(abstract_state(model, optimizer), rules, mesh)


def create(model: Any, optimizer: optim.Optimizer, key: jax.Array, shardings: State) -> State:
  """A fresh model and optimizer."""
  init = jax.jit(lambda key: _with_optimizer(model.init(key), optimizer), out_shardings=shardings)
  return init(key)


def from_params(params: Any, optimizer: optim.Optimizer, shardings: State) -> State:
  """A fresh optimizer for given parameters, which are copied: the update step donates its state, and
  the caller may keep `params` as the frozen reference."""
  def init(params):
    return _with_optimizer(jax.tree.map(jnp.copy, params), optimizer)
  params = jax.device_put(params, shardings['params'])  # where they are already, this moves nothing
  return jax.jit(init, in_shardings=(shardings['params'],), out_shardings=shardings)(params)
