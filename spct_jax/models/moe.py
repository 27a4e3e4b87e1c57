"""A mixture of experts in place of the feed-forward network: each token goes through its K best of E.

    p = softmax(router x)                                       over all experts, float32
    y = sum over the K chosen e of  w_e * down_e(act(gate_e x) * up_e x)   +   shared(x)

`w` are the K largest p, as they are or divided by their sum, times `scale`. With groups (DeepSeek-V2,
arXiv 2405.04434 section 2.2.2) the experts of all but the `top_groups` groups with the largest p are out
of the draw. Ties go to the earlier expert.

No token is dropped and there is no capacity: a token's result depends on that token alone, so padding
cannot matter. There is no auxiliary loss that balances the load either: fine-tuning leaves the router to the
task's loss (or freezes it), and balancing it against few prompts would undo what pre-training balanced.

The tokens are sorted by expert and each expert's are cut into blocks, the last one padded; a loop runs over the
blocks that there are. The work is that of K experts a token, and no [E, tokens, D] exists, forward or backward;
the backward pass computes the hidden layer again. On TPUs, which have an instruction for it, the sorted tokens go
through `jax.lax.ragged_dot` instead. Elsewhere that is emulated by multiplying every row with every expert: on one
core of a CPU, E = 32 and K = 4, it takes 60 times as long as the blocks, and all experts for all tokens 11 times.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spct_jax.models.config import Experts, ModelConfig
from spct_jax.models.dense import whole
from spct_jax.models.int8 import Int8, plain
from spct_jax.models.primitives import ACTIVATIONS, dense

LARGEST_BLOCK = 128  # rows of one product


def choose(
    logits: Float[Array, 'N E'], experts: Experts
) -> tuple[Float[Array, 'N K'], Int[Array, 'N K']]:
  """(weights, indices) of the experts that each token goes through, the best first; float32."""
  scores = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  weights, chosen = jax.lax.top_k(_in_best_groups(scores, experts), experts.top_k)
  if experts.renormalise:
    weights = weights / weights.sum(axis=-1, keepdims=True)
  return weights * experts.scale, chosen


def _in_best_groups(scores, experts):
  """The scores, 0 outside the best groups."""
  if experts.groups == 1:
    return scores
  N, E = scores.shape
  grouped = scores.reshape(N, experts.groups, E // experts.groups)
  _, best = jax.lax.top_k(grouped.max(axis=-1), experts.top_groups)
  kept = jax.nn.one_hot(best, experts.groups, dtype=bool).any(axis=1)
  return jnp.where(kept[:, :, None], grouped, 0.0).reshape(N, E)


class MoE(nn.Module):
  """`[B, T, D] -> [B, T, D]`.

      router/kernel [D,E]; experts/gate/kernel and experts/up/kernel [E,D,F], experts/down/kernel [E,F,D];
      shared/gate/kernel and shared/up/kernel [D,S], shared/down/kernel [S,D]   where there are shared experts
  """

  model: ModelConfig
  experts: Experts

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    model, experts, (B, T, D) = self.model, self.experts, x.shape
    tokens = x.reshape(B * T, D)
    router = _Kernel((D, experts.count), experts.router_dtype or model.param_dtype, name='router')()
    # float32: two experts whose logits agree to three digits are common, and bfloat16 holds no more.
    logits = jnp.dot(tokens.astype(jnp.float32), router.astype(jnp.float32), precision='highest')
    weights, chosen = choose(logits, experts)
    kernels = _Experts(model, experts, name='experts')()
    each = expert_outputs(model.activation, tokens, *kernels, chosen)
    out = jnp.einsum('NKD,NK->ND', each.astype(jnp.float32), weights)
    if experts.shared_ffn:
      out = out + _Shared(model, experts.shared_ffn, name='shared')(tokens).astype(jnp.float32)
    return out.astype(x.dtype).reshape(B, T, D)


class _Kernel(nn.Module):
  shape: tuple[int, ...]
  param_dtype: str

  @nn.compact
  def __call__(self):
    # The experts' axis is a batch of kernels: it takes no part in the fan-in.
    init = nn.initializers.lecun_normal(batch_axis=tuple(range(len(self.shape) - 2)))
    kernel = whole(self, self.param('kernel', init, self.shape, jnp.dtype(self.param_dtype)))
    return Int8(kernel, self.get_variable('params', 'step')) if self.has_variable('params', 'step') else kernel


class _Experts(nn.Module):
  """The stacked kernels (gate, up, down), in the compute dtype."""

  model: ModelConfig
  experts: Experts

  @nn.compact
  def __call__(self):
    E, D, F = self.experts.count, self.model.width, self.experts.ffn
    shapes = {'gate': (E, D, F), 'up': (E, D, F), 'down': (E, F, D)}
    kernels = (_Kernel(shape, self.model.param_dtype, name=name)() for name, shape in shapes.items())
    return tuple(kernel if isinstance(kernel, Int8) else kernel.astype(self.model.dtype) for kernel in kernels)


class _Shared(nn.Module):
  """The network that all tokens go through."""

  model: ModelConfig
  ffn: int

  def setup(self):
    c = self.model
    self.gate = dense(c, (c.width,), (self.ffn,), c.mlp_bias)
    self.up = dense(c, (c.width,), (self.ffn,), c.mlp_bias)
    self.down = dense(c, (self.ffn,), (c.width,), c.mlp_bias)

  def __call__(self, x):
    return self.down(ACTIVATIONS[self.model.activation](self.gate(x)) * self.up(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_outputs(
    activation: str,
    x: Float[Array, 'N D'],
    gate: Float[Array, 'E D F'] | Int8,
    up: Float[Array, 'E D F'] | Int8,
    down: Float[Array, 'E F D'] | Int8,
    chosen: Int[Array, 'N K'],
) -> Float[Array, 'N K D']:
  """Each token through each of its experts, unweighted."""
  blocked, ragged = functools.partial(_blocked, activation), functools.partial(_ragged, activation)
  return jax.lax.platform_dependent(x, gate, up, down, chosen, tpu=ragged, default=blocked)


def _forward(activation, *args):
  return expert_outputs(activation, *args), args


def _backward(activation, args, cotangent):
  # One choice of platform each way: differentiating through it would keep what every branch needs.
  blocked, ragged = (functools.partial(f, activation) for f in (_blocked_backward, _ragged_backward))
  return (*jax.lax.platform_dependent(*args, cotangent, tpu=ragged, default=blocked), None)


expert_outputs.defvjp(_forward, _backward)


def _dot(x, kernel):
  """float32."""
  y = jnp.dot(x, plain(kernel).astype(x.dtype), preferred_element_type=jnp.float32)
  return y * kernel.step[None, :] if isinstance(kernel, Int8) else y


def _mlp(activation, x, gate, up, down):
  hidden = (ACTIVATIONS[activation](_dot(x, gate)) * _dot(x, up)).astype(x.dtype)
  return _dot(hidden, down).astype(x.dtype) if isinstance(down, Int8) else jnp.dot(hidden, down)


def _of(kernel, e):
  """The kernel of expert e."""
  return jax.tree.map(lambda leaf: leaf[e], kernel)


def _ragged(activation, x, gate, up, down, chosen):
  N, K = chosen.shape
  order = jnp.argsort(chosen.reshape(-1))
  rows, sizes = x[order // K], jnp.bincount(chosen.reshape(-1), length=gate.shape[0])
  expert = chosen.reshape(-1)[order]

  def dot(x, kernel):
    matrices, sizes_ = plain(kernel).astype(x.dtype), sizes.astype(jnp.int32)
    y = jax.lax.ragged_dot(x, matrices, group_sizes=sizes_, preferred_element_type=jnp.float32)
    return y * kernel.step[expert] if isinstance(kernel, Int8) else y

  hidden = ACTIVATIONS[activation](dot(rows, gate)) * dot(rows, up)
  out = dot(hidden.astype(x.dtype), down).astype(x.dtype)
  return jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(N, K, -1)


def _ragged_backward(activation, x, gate, up, down, chosen, cotangent):
  return jax.vjp(lambda *leaves: _ragged(activation, *leaves, chosen), x, gate, up, down)[1](cotangent)


def _block_size(rows, E):
  """A power of two: large products, but few padding rows where experts are many and tokens few."""
  size = 8
  while size < LARGEST_BLOCK and size * E < rows:
    size *= 2
  return size


def _layout(chosen, E, size):
  """(expert of each block, number of blocks in use, row of each (token, choice)) in blocks of `size` rows.

  Two experts, blocks of two, five tokens that chose 1 0 1 1 0:

      block    0    1    2    3 (unused)
      expert   0    1    1
      rows     1 4  0 2  3 .             so the tokens' rows are 2 0 3 4 1
  """
  flat = chosen.reshape(-1)
  counts = jnp.bincount(flat, length=E)
  blocks = -(-counts // size)
  ends = jnp.cumsum(blocks)
  expert = jnp.searchsorted(ends, jnp.arange(flat.size // size + E), side='right')
  order = jnp.argsort(flat)
  rank = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size), unique_indices=True)
  # From the place among all that are sorted to the place in the expert's own blocks.
  shift = (ends - blocks) * size - (jnp.cumsum(counts) - counts)
  return expert, ends[-1], rank + shift[flat]


def _rows(values, row, length):
  """[N * K, D] values in their rows of [length, D], 0 in the rows that pad."""
  return jnp.zeros((length, values.shape[-1]), values.dtype).at[row].set(values, unique_indices=True)


def _blocked(activation, x, gate, up, down, chosen):
  N, K = chosen.shape
  size = _block_size(N * K, gate.shape[0])
  expert, used, row = _layout(chosen, gate.shape[0], size)
  rows = _rows(jnp.repeat(x, K, axis=0), row, len(expert) * size)

  def block(i, out):
    e, at = expert[i], i * size
    y = _mlp(activation, jax.lax.dynamic_slice_in_dim(rows, at, size), _of(gate, e), _of(up, e), _of(down, e))
    return jax.lax.dynamic_update_slice_in_dim(out, y, at, axis=0)

  out = jax.lax.fori_loop(0, used, block, jnp.zeros_like(rows))
  return out[row].reshape(N, K, -1)


def _blocked_backward(activation, x, gate, up, down, chosen, cotangent):
  N, K = chosen.shape
  size = _block_size(N * K, gate.shape[0])
  expert, used, row = _layout(chosen, gate.shape[0], size)
  rows = _rows(jnp.repeat(x, K, axis=0), row, len(expert) * size)
  pulled = _rows(cotangent.reshape(N * K, -1), row, len(expert) * size)

  def block(i, carry):
    out, sums = carry
    e, at = expert[i], i * size
    mlp = functools.partial(_mlp, activation)
    _, pull = jax.vjp(mlp, jax.lax.dynamic_slice_in_dim(rows, at, size), gate[e], up[e], down[e])
    y, *kernels = pull(jax.lax.dynamic_slice_in_dim(pulled, at, size))
    out = jax.lax.dynamic_update_slice_in_dim(out, y, at, axis=0)
    return out, [total.at[e].add(kernel) for total, kernel in zip(sums, kernels)]

  # float32 sums: a kernel's gradient is the sum over all blocks of its expert.
  sums = [jnp.zeros(kernel.shape, jnp.float32) for kernel in (gate, up, down)]
  out, sums = jax.lax.fori_loop(0, used, block, (jnp.zeros_like(rows), sums))
  dx = out[row].reshape(N, K, -1).astype(jnp.float32).sum(axis=1).astype(x.dtype)
  return dx, *(total.astype(kernel.dtype) for total, kernel in zip(sums, (gate, up, down)))
