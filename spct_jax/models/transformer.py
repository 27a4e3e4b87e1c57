"""The decoder as pure functions over one parameter tree.

    {'embed': {'table': [Vpad, D]},
     'head': {'0': block, ...}, 'period': {'0': block with [num_periods, ...] leaves, ...}, 'remainder': {...},
     'final_norm': {'scale': [D]},
     'unembed': {'kernel': [D, Vpad]}            untied language models only
     'reward': {'kernel': [D, 1]}}               scalar head only

    block: attn_norm/scale [D], q/kernel [D,H,hd], k/kernel and v/kernel [D,M,hd], o/kernel [H,hd,D],
           mlp_norm/scale [D], gate/kernel and up/kernel [D,F], down/kernel [F,D]
           (+ q, k, v /bias with qkv_bias; o/bias; gate, up, down /bias with mlp_bias; q_norm/scale and
           k_norm/scale [hd] with qk_norm; attn_post_norm/scale and mlp_post_norm/scale [D] with post_norms)

`apply` is the whole model. The engine and the trainer compose the pieces: `embed`, `run_layers` (which
carries any cache pytree through the layers and leaves attention to the caller's `attend`), `unembed`.
A sampler's matrices may be int8, each with a 'step' beside it (`int8`).
The final norm belongs to `unembed` and `rewards`: `hidden` and `run_layers` return the residual stream.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from spct_jax.models import attention, kv_cache, reward_head
from spct_jax.models.blocks import Block
from spct_jax.models.config import ModelConfig
from spct_jax.models.kv_cache import LayerRef
from spct_jax.models.primitives import RMSNorm

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Transformer:
  """A decoder: hashable settings, no state. Parameters go in and come out explicitly."""

  config: ModelConfig

  # --- parameters

  def init(self, key: jax.Array) -> dict:
    """Random parameters in `param_dtype`: kernels scaled by their fan-in, the table by the width."""
    c, dtype = self.config, jnp.dtype(self.config.param_dtype)
    table_key, layers_key, out_key = jax.random.split(key, 3)
    table = jax.random.normal(table_key, (c.padded_vocab, c.width)) * c.width**-0.5
    scale = jnp.full((c.width,), 0.0 if c.norm_plus_one else 1.0, dtype)
    params = {'embed': {'table': table.astype(dtype)}, 'final_norm': {'scale': scale}}
    params |= self._init_layers(layers_key)
    if c.head_kind == 'scalar':
      params['reward'] = reward_head.init(out_key, c)
    elif not c.tied:
      kernel = jax.random.normal(out_key, (c.width, c.padded_vocab)) * c.width**-0.5
      params['unembed'] = {'kernel': kernel.astype(dtype)}
    return params

  def _init_layers(self, key):
    c = self.config
    x = jnp.zeros((1, 1, c.width), jnp.dtype(c.dtype))
    positions = jnp.zeros((1, 1), jnp.int32)
    keys = jax.random.split(key, c.num_layers)

    def init(block, key):
      # The values stand in for what attention gives of them: as many heads as queries have.
      attend = lambda q, k, v: (jnp.repeat(v, q.shape[2] // v.shape[2], axis=2), None)
      return Block(c, block).init(key, x, positions, attend, False)['params']

    # Layers of one shape are made by one traced block: a program that repeats the random number generator
    # for each layer takes XLA a quarter of a minute to compile at six layers.
    alike = {}
    for block in dict.fromkeys(c.layers):
      shapes = jax.eval_shape(functools.partial(init, block), keys[0])
      alike.setdefault(str(shapes), []).append(block)
    place, made = {}, []
    for blocks in alike.values():
      members = [i for i, block in enumerate(c.layers) if block in blocks]
      place |= {i: (len(made), at) for at, i in enumerate(members)}
      made.append(jax.lax.map(functools.partial(init, blocks[0]), keys[jnp.array(members)]))

    def layer(i):
      kind, at = place[i]
      return jax.tree.map(lambda leaf: leaf[at], made[kind])

    def stack(layers):
      # Block j of every period: one kind, and evenly spaced in it, because the periods are alike.
      kind, at = place[layers[0]][0], [place[i][1] for i in layers]
      step = at[1] - at[0] if len(at) > 1 else 1
      return jax.tree.map(lambda leaf: leaf[at[0] : at[-1] + 1 : step], made[kind])

    first, period, last = len(c.head), len(c.period), len(c.head) + len(c.period) * c.num_periods
    groups = {
        'head': [layer(j) for j in range(first)],
        'period': [stack(range(first + j, last, period)) for j in range(period)],
        'remainder': [layer(j) for j in range(last, c.num_layers)],
    }
    return {name: dict(zip(map(str, range(len(b))), b)) for name, b in groups.items() if b}

  def abstract_params(self) -> dict:
    """Shapes and dtypes of the parameters, without making them."""
    return jax.eval_shape(self.init, jax.random.key(0))

  @property
  def num_params(self) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract_params()))

  def init_cache(self, batch: int, length: int) -> dict:
    """An empty cache for `apply`, with room for `length` tokens in each of `batch` rows."""
    return kv_cache.start(self.config, batch, length)

  # --- pieces

  def embed(self, params: dict, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
    x = jnp.take(params['embed']['table'], tokens, axis=0)
    if 'step' in params['embed']:
      x = x * jnp.take(params['embed']['step'], tokens, axis=0)[:, :, None]
    x = x.astype(self.config.dtype)
    if self.config.embed_scaled:
      # Rounded like the checkpoints' own code: sqrt(3072) is 55.5 in bfloat16, not 55.43.
      x = x * jnp.asarray(self.config.width**0.5, x.dtype)
    return x

  def run_layers(
      self, params: dict, x: Float[Array, 'B T D'], positions: Int[Array, 'B T'], attend, cache=None
  ):
    """All blocks in order; returns `(x, cache)`.

    `attend(ref, q, k, v, cache) -> (out, cache)` is called once per layer (once per block of the period, in
    the scan) with rotated q `[B,T,H,hk]`, k `[B,T,M,hk]` and v `[B,T,M,hv]` (M, hk, hv: `kv_cache.leaves`); `out` is
    `[B,T,H,hv]`. `cache` is any pytree, carried whole.
    """
    c, cached = self.config, cache is not None

    def block(ref, block_params, x, cache):
      return Block(c, ref.config).apply(
          {'params': block_params}, x, positions, lambda q, k, v: attend(ref, q, k, v, cache), cached
      )

    def lone(group, x, cache):
      for j, config in enumerate(getattr(c, group)):
        run = functools.partial(block, LayerRef(group, j, None, config))
        if c.remat:
          run = jax.checkpoint(run)
        x, cache = run(params[group][str(j)], x, cache)
      return x, cache

    def period(carry, xs):
      i, stack = xs
      for j, config in enumerate(c.period):
        carry = block(LayerRef('period', j, i, config), stack[str(j)], *carry)
      return carry, None

    x, cache = lone('head', x, cache)
    if c.period:
      # Inside a scan nothing can merge the recomputation away, so the barriers against it only cost.
      body = jax.checkpoint(period, prevent_cse=False) if c.remat else period
      (x, cache), _ = jax.lax.scan(body, (x, cache), (jnp.arange(c.num_periods), params['period']))
    return lone('remainder', x, cache)

  def unembed(self, params: dict, x: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    """Final norm and logits, float32, capped if the model caps them, cut to the true vocabulary."""
    x = self._final_norm(params, x)
    if self.config.tied:
      table = params['embed']['table'].astype(x.dtype)
      logits = jnp.einsum('BTD,VD->BTV', x, table, preferred_element_type=jnp.float32)
    else:
      kernel = params['unembed']['kernel'].astype(x.dtype)
      logits = jnp.einsum('BTD,DV->BTV', x, kernel, preferred_element_type=jnp.float32)
    out = params['embed' if self.config.tied else 'unembed']
    if 'step' in out:
      logits = logits * out['step'][None, None, :]
    return attention.capped(logits[:, :, : self.config.vocab_size], self.config.logit_softcap)

  def rewards(
      self, params: dict, x: Float[Array, 'B T D'], lengths: Int[Array, ' B']
  ) -> Float[Array, ' B']:
    """The scalar head on the last real token of each row."""
    last = self._final_norm(params, reward_head.last_token(x, lengths)[:, None, :])
    return reward_head.reward(params['reward'], last[:, 0, :])

  def _final_norm(self, params, x):
    return RMSNorm(self.config).apply({'params': params['final_norm']}, x)

  # --- the whole model

  def hidden(
      self,
      params: dict,
      tokens: Int[Array, 'B T'],
      lengths: Int[Array, ' B'] | None = None,
      positions: Int[Array, 'B T'] | None = None,
      segments: Int[Array, 'B T'] | None = None,
  ) -> Float[Array, 'B T D']:
    """The residual stream after the last block; what `unembed` and `rewards` take. Arguments as in `apply`."""
    B, T = tokens.shape
    if positions is None:
      positions = jnp.arange(T)[None, :] if segments is None else attention.segment_positions(segments)
    positions = jnp.broadcast_to(positions, (B, T))
    tokens = _real(tokens, lengths, segments)
    mask = attention.causal_mask(T, lengths, segments)

    def attend(ref, q, k, v, cache):
      seen = attention.window_mask(mask, ref.config.window, positions, positions)
      return self._dot_product(ref, q, k, v, jnp.broadcast_to(seen, (B, T, T))), cache

    return self.run_layers(params, self.embed(params, tokens), positions, attend)[0]

  def _dot_product(self, ref, q, k, v, mask):
    scale, cap = self.config.score_scale(ref.config), self.config.attn_softcap
    return attention.dot_product(q, k, v, mask, scale=scale, softcap=cap)

  def hidden_cached(self, params: dict, tokens: Int[Array, 'B T'], lengths, positions, cache: dict):
    """`hidden` of tokens that follow those in `cache`; returns `(x, cache)`."""
    B, T = tokens.shape
    held, S = cache['length'], cache['positions'].shape[1]
    lengths = jnp.full((B,), T, jnp.int32) if lengths is None else lengths
    tokens = _real(tokens, lengths, None)
    _check_room(held, lengths, S)
    places = held[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    positions = jnp.broadcast_to(places if positions is None else positions, (B, T))
    key_positions = cache['positions'].at[jnp.arange(B)[:, None], places].set(positions, mode='drop')
    # The stored index is the order of arrival, so it is also the causal order. Padding lands behind the real
    # tokens, where no real query of this call sees it and the next call overwrites it.
    mask = jnp.arange(S)[None, None, :] <= places[:, :, None]

    def attend(ref, q, k, v, layers):
      layers = kv_cache.write(layers, ref, k, v, held)
      keys, values = (jnp.swapaxes(leaf, 1, 2) for leaf in kv_cache.read(layers, ref))
      seen = attention.window_mask(mask, ref.config.window, positions, key_positions)
      return self._dot_product(ref, q, keys, values, seen), layers

    x, layers = self.run_layers(params, self.embed(params, tokens), positions, attend, cache['layers'])
    # Under jit an overflow cannot raise; NaN is loud, dropped tokens would not be.
    x = jnp.where((held + lengths > S)[:, None, None], jnp.nan, x)
    return x, {'layers': layers, 'length': held + lengths, 'positions': key_positions}

  def apply(
      self,
      variables: dict,
      tokens: Int[Array, 'B T'],
      lengths: Int[Array, ' B'] | None = None,
      positions: Int[Array, 'B T'] | None = None,
      segments: Int[Array, 'B T'] | None = None,
      cache: dict | None = None,
  ):
    """Logits float32[B, T, V], or rewards float32[B] with a scalar head; with a cache, `(that, new cache)`.

    tokens: right-padded, or with `segments` on any side.
    lengths: real tokens per row (None: all are); padding never reaches a real position.
    positions: for rotary embedding and windows; by default the index, counted from the start of the
      segment or on from the cached tokens.
    segments: several sequences in one row, numbered from 1, 0 = padding; attention stays within a
      segment. Where a segment is not contiguous, give positions. A scalar head takes one sequence per row, so that
      padding may be on any side; a row of several is NaN, or a ValueError outside of jit.
    cache: from `init_cache` or a previous call; it keeps only real tokens.
    """
    params = variables['params']
    if segments is not None and cache is not None:
      raise ValueError(
          'segments: got them together with a cache, which knows one sequence per row, padded on the right; give each '
          'sequence its own row and its `lengths`'
      )
    if segments is not None and self.config.head_kind == 'scalar':
      _check_alone(segments)
    if cache is None:
      x = self.hidden(params, tokens, lengths, positions, segments)
    else:
      x, cache = self.hidden_cached(params, tokens, lengths, positions, cache)
    if self.config.head_kind == 'scalar':
      ends = jnp.full((tokens.shape[0],), tokens.shape[1]) if lengths is None else lengths
      if segments is not None:
        places = jnp.arange(1, tokens.shape[1] + 1)[None, :]
        ends = jnp.where((segments > 0) & (places <= ends[:, None]), places, 0).max(axis=1)
      out = self.rewards(params, x, ends)
      if segments is not None:
        out = jnp.where(segments.max(axis=1) > 1, jnp.nan, out)
    else:
      out = self.unembed(params, x)
    return out if cache is None else (out, cache)


def _real(tokens, lengths, segments):
  """Token 0 in place of padding: an id outside the table would become NaN, and 0 weight times NaN is NaN."""
  if lengths is not None:
    tokens = jnp.where(jnp.arange(tokens.shape[1])[None, :] < lengths[:, None], tokens, 0)
  if segments is not None:
    tokens = jnp.where(segments > 0, tokens, 0)
  return tokens


def _check_alone(segments):
  if not isinstance(segments, jax.core.Tracer) and (most := int(segments.max())) > 1:
    raise ValueError(
        f'segments: got {most} sequences in a row for a scalar head, which gives a row one number; give each sequence '
        'its own row'
    )


def _check_room(held, lengths, S):
  if isinstance(held, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer):
    return
  need = int((held + lengths).max())
  if need > S:
    raise ValueError(f'cache: got {need} tokens for a row with room for {S}; make it with a larger `length`')
