"""Keys and values of every layer, laid out like the layers, as an explicit pytree.

    {'head': {'0': {'k': [B,M,S,hk], 'v': [B,M,S,hv]}, ...},
     'period': {'0': {'k': [num_periods,B,M,S,hk], 'v': ...}, ...},
     'remainder': {...}}                                    groups without a block are absent

M heads, hk and hv numbers a key and a value. With latent attention a layer holds {'latent': [B,1,S,rank+rope]},
which is key and value in one. `leaves` is the one place that knows. Of a cache in eight bits a leaf is a pair,
`int8.Int8(values [B,M,S,hk], step [B,M,S])`, and so is what `read` gives.

Heads stand before positions, so that a head's keys lie side by side and a step of decoding is a plain
batched product of matrices; the other way round it copies the cache to turn it, three times as slow on a CPU.

The whole pytree is carried through the scan over layers and each layer updates its own slice in
place: as scan inputs and outputs it would exist twice. A layer finds itself by its `LayerRef`.

`start` makes the cache of `Transformer.apply`: the above as 'layers', how many tokens each row holds
('length', so rows may have prefixes of different lengths) and their positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.int8 import Int8, rounded


@dataclasses.dataclass(frozen=True)
class LayerRef:
  """Which layer this is: `group` 'head', 'period' or 'remainder', block `j` of it, in period `i`.

  `i` is a traced integer inside the scan over periods, and None in the other groups.
  """

  group: str
  j: int
  i: object
  config: BlockConfig


def leaves(config: ModelConfig) -> dict[str, tuple[int, int]]:
  """Name -> (heads, numbers a head) of what a layer stores of a token."""
  if config.latent is not None:
    return {'latent': (1, config.latent.rank + config.latent.rope)}
  return {name: (config.kv_heads, config.head_dim) for name in ('k', 'v')}


def init(config: ModelConfig, batch: int, length: int, dtype=None) -> dict:
  """Zeros for `batch` rows of `length` tokens; `dtype` None is the compute dtype of the model, 'int8' makes pairs."""
  dtype = jnp.dtype(config.dtype if dtype is None else dtype)

  def zeros(*shape):
    values = jnp.zeros(shape, dtype)
    return Int8(values, jnp.zeros(shape[:-1], jnp.float32)) if dtype == jnp.int8 else values

  layers = {}
  for group, stack in (('head', ()), ('period', (config.num_periods,)), ('remainder', ())):
    blocks = getattr(config, group)
    if blocks:
      layers[group] = {
          str(j): {
              name: zeros(*stack, batch, heads, length, dim)
              for name, (heads, dim) in leaves(config).items()
          }
          for j in range(len(blocks))
      }
  return layers


def start(config: ModelConfig, batch: int, length: int, dtype=None) -> dict:
  """An empty cache for `Transformer.apply`: `layers`, `length` int32[B], `positions` int32[B, S]."""
  return {
      'layers': init(config, batch, length, dtype),
      'length': jnp.zeros((batch,), jnp.int32),
      'positions': jnp.zeros((batch, length), jnp.int32),
  }


def read(
    cache: dict, ref: LayerRef
) -> tuple[Float[Array, 'B M S hk'] | Int8, Float[Array, 'B M S hv'] | Int8]:
  """The keys and values of one layer."""
  layer = cache[ref.group][str(ref.j)]
  names = ('latent', 'latent') if 'latent' in layer else ('k', 'v')
  if ref.i is None:
    return tuple(layer[name] for name in names)
  take = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, ref.i, axis=0, keepdims=False)
  return tuple(jax.tree.map(take, layer[name]) for name in names)


def write(cache: dict, ref: LayerRef, k: Float[Array, 'B T M hk'], v: Float[Array, 'B T M hv'], index) -> dict:
  """The cache with T tokens of one layer stored from `index` on.

  `index` is one integer for all rows (a slice update, which clamps: the caller keeps `index + T <= S`) or
  int32[B], one per row (a scatter, which drops what falls behind the end).
  """
  layer = cache[ref.group][str(ref.j)]
  new = {'k': k, 'v': v, 'latent': k}
  layer = {name: _put(store, new[name], ref.i, index) for name, store in layer.items()}
  return {**cache, ref.group: {**cache[ref.group], str(ref.j): layer}}


def write_rows(cache: dict, ref: LayerRef, k: Float[Array, 'G b T M hk'], v: Float[Array, 'G b T M hv'], rows) -> dict:
  """The cache with whole rows of one layer overwritten, in G groups: `rows[G, b]` within the group.

  The cache has G * n rows of T positions; a row of n or more is dropped.
  """
  layer = cache[ref.group][str(ref.j)]
  new = {'k': k, 'v': v, 'latent': k}
  layer = {name: _put_rows(store, new[name], ref.i, rows) for name, store in layer.items()}
  return {**cache, ref.group: {**cache[ref.group], str(ref.j): layer}}


def _in_parts(put):
  """Of a cache in eight bits both parts are put, each in its place."""

  def each(store, new, *where):
    if not isinstance(store, Int8):
      return put(store, new, *where)
    new = rounded(new, (new.ndim - 1,))
    step = put(store.step[..., None], new.step[..., None], *where)[..., 0]
    return Int8(put(store.values, new.values, *where), step)

  return each


@_in_parts
def _put_rows(store, new, i, rows):
  G, axis = rows.shape[0], int(i is not None)
  new = jnp.swapaxes(new, 2, 3).astype(store.dtype)  # [G, b, M, T, hd]
  # Group by group, so that on a mesh a group's rows stay on its devices.
  groups = store.reshape(*store.shape[:axis], G, -1, *store.shape[axis + 1:])
  one = lambda group, row, new: group.at[row if i is None else (i, row)].set(new, mode='drop')
  return jax.vmap(one, (axis, 0, 0), axis)(groups, rows, new).reshape(store.shape)


@_in_parts
def _put(store, new, i, index):
  new, index = jnp.swapaxes(new, 1, 2).astype(store.dtype), jnp.asarray(index)  # [B, M, T, hd]
  if index.ndim == 0:
    if i is None:
      return jax.lax.dynamic_update_slice_in_dim(store, new, index, axis=2)
    zero = jnp.zeros((), index.dtype)
    return jax.lax.dynamic_update_slice(store, new[None], (i.astype(index.dtype), zero, zero, index, zero))
  B, M, T, _ = new.shape
  rows, heads = jnp.arange(B)[:, None, None], jnp.arange(M)[None, :, None]
  places = index[:, None, None] + jnp.arange(T)[None, None, :]
  where = (rows, heads, places) if i is None else (i, rows, heads, places)
  return store.at[where].set(new, mode='drop')
