"""A dense map that may have a low-rank addition (LoRA, arXiv 2106.09685) beside its kernel.

    y = x kernel + (x lora_a) lora_b + bias        kernel [*in, *out], lora_a [*in, r], lora_b [r, *out]

Whether there is one is what the parameters say: `train.lora` puts `lora_a` and `lora_b`, which holds the scale
already, beside the kernels that it adapts. As a path of its own the addition keeps what a bfloat16 kernel would
round away, and the backward pass needs no gradient of the size of the kernel. Where a kernel is not multiplied with
one input from one side (experts, latent attention), `whole` is the kernel with the addition in it.

A sampler's kernel may be int8, with its 'step' [*out] beside it (`int8`).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class Dense(nn.Module):
  """From the last `len(inputs)` axes of x, of these sizes, to `outputs`; computed in `dtype`."""

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  dtype: str
  param_dtype: str
  bias: bool = False

  @nn.compact
  def __call__(self, x):
    x = x.astype(self.dtype)
    kernel = self.param('kernel', self._init)
    if self.has_variable('params', 'step'):
      y = self._stepped(x, kernel, self.get_variable('params', 'step'))
    else:
      y = self._product(x, kernel)
    if self.has_variable('params', 'lora_a'):
      low = self._product(x, self.get_variable('params', 'lora_a'))
      y = y + jnp.tensordot(low, self.get_variable('params', 'lora_b').astype(self.dtype), 1)
    if self.bias:
      bias = self.param('bias', nn.initializers.zeros, self.outputs, self.param_dtype).astype(self.dtype)
      y = y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))
    return y

  def _product(self, x, matrix):
    return jnp.tensordot(x, matrix.astype(self.dtype), len(self.inputs))

  def _stepped(self, x, kernel, step):
    """Of an int8 kernel; float32 up to the step, for its sums are some thousand times those of the result."""
    y = jnp.tensordot(x, kernel.astype(self.dtype), len(self.inputs), preferred_element_type=jnp.float32)
    return (y * jnp.expand_dims(step, range(y.ndim - step.ndim))).astype(self.dtype)

  def _init(self, key):
    matrix = math.prod(self.inputs), math.prod(self.outputs)
    return nn.initializers.lecun_normal()(key, matrix, self.param_dtype).reshape(self.inputs + self.outputs)


def low_rank(a: Array, b: Array, axes: int) -> jax.Array:
  """[*stack, *in, r] times [*stack, r, *out], as a kernel of `axes` axes has them."""
  product = lambda a, b: jnp.tensordot(a, b, 1, precision='highest')  # by default bfloat16 on TPUs, TF32 on GPUs
  for _ in range(a.ndim + b.ndim - 2 - axes):
    product = jax.vmap(product)
  return product(a, b)


def whole(module: nn.Module, kernel: Array) -> Array:
  """The kernel of a module, in float32 with the addition that its parameters hold."""
  if not module.has_variable('params', 'lora_a'):
    return kernel
  a, b = (module.get_variable('params', name).astype(jnp.float32) for name in ('lora_a', 'lora_b'))
  return kernel.astype(jnp.float32) + low_rank(a, b, kernel.ndim)
