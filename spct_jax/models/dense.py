"""A dense map that may have a low-rank addition (LoRA, arXiv 2106.09685) beside its kernel.

    y = x kernel + bias + (x lora_a) lora_b        kernel [*in, *out], lora_a [*in, r], lora_b [r, *out]

Whether there is one is what the parameters say: `train.lora` puts `lora_a` and `lora_b`, which holds the scale
already, beside the kernels that it adapts. As a path of its own the addition keeps what a bfloat16 kernel would
round away, and the backward pass needs no gradient of the size of the kernel.
"""

import flax.linen as nn
import jax.numpy as jnp


class Dense(nn.DenseGeneral):
  """`nn.DenseGeneral` over the trailing axes of its input, with the addition."""

  @nn.compact
  def __call__(self, inputs):
    out = super().__call__(inputs)
    if not self.has_variable('params', 'lora_a'):
      return out
    axes = 1 if isinstance(self.axis, int) else len(self.axis)
    down, up = (self.get_variable('params', name).astype(out.dtype) for name in ('lora_a', 'lora_b'))
    return out + jnp.tensordot(jnp.tensordot(inputs.astype(out.dtype), down, axes), up, 1)
