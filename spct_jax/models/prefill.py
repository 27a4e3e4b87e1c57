"""Causal attention of whole prompts, by the best means that a device has; none makes an array of all scores.

    cudnn       GPUs: `jax.nn.dot_product_attention(implementation='cudnn')`. Of 16 bits, without a cap on the scores,
                heads of a multiple of 8 up to 128, from Hopper on up to 256, keys as long as values.
    splash      TPUs: Pallas' splash attention, which knows windows and caps (Gemma 2). bfloat16 and float32.
    blockwise   everywhere else, and where those two do not apply: `blockwise`, plain JAX.

Which one is decided by `means` from sizes and device before anything is traced, so only that one is compiled. All take
right padding as it is: real queries stand before it. There is no derivative to rely on: made for the sampler's prefill.
"""


import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spct_jax.models import blockwise

MEANS = ('blockwise', 'cudnn', 'splash')
_BLOCKS = (512, 256, 128)  # queries and keys of a block of splash, which wants a multiple of 128 of both


def means(
    platform: str, capability: str | None, dtype: str, key_dim: int, value_dim: int, softcap: int | float | None
) -> str:
  """One of `MEANS`. `capability` is a GPU's compute capability, such as '9.0'; None: not known, or no GPU."""
  if platform == 'tpu' and dtype in ('bfloat16', 'float32'):
    return 'splash'
  if platform in ('gpu', 'cuda') and dtype in ('bfloat16', 'float16') and softcap is None and key_dim == value_dim:
    # Versions as numbers: '10.0' is above '9.0'.
    hopper = capability is not None and tuple(map(int, capability.split('.'))) >= (9, 0)
    if key_dim % 8 == 0 and key_dim <= (256 if hopper else 128):
      return 'cudnn'
  return 'blockwise'


def causal(
    q: Float[Array, 'B T H d'],
    k: Float[Array, 'B T M d'],
    v: Float[Array, 'B T M e'],
    scale: float,
    window: int | None,
    softcap: int | float | None,
    by: str,
) -> Float[Array, 'B T H e']:
  """Query t sees keys t - window + 1 to t (all up to t without a window), by one of `MEANS`; as `blockwise.causal`."""
  return _BY[by](q, k, v, scale, window, softcap)


def _cudnn(q, k, v, scale, window, softcap):
  assert softcap is None  # `means` sees to it
  return jax.nn.dot_product_attention(
      q, k.astype(q.dtype), v.astype(q.dtype), scale=scale, is_causal=True,
      local_window_size=None if window is None else (window - 1, 0), implementation='cudnn',
  )


def splash(
    q: Float[Array, 'B T H d'],
    k: Float[Array, 'B T M d'],
    v: Float[Array, 'B T M e'],
    scale: float,
    window: int | None,
    softcap: int | float | None,
    interpret: bool = False,
) -> Float[Array, 'B T H e']:
  """Splash attention; `interpret` runs its kernel as plain operations, anywhere."""
  (_, T, H, _), size = q.shape, -(-q.shape[1] // _BLOCKS[-1]) * _BLOCKS[-1]
  ready = lambda x: jnp.pad(x, ((0, 0), (0, size - T), (0, 0), (0, 0))).swapaxes(1, 2)  # [B, heads, size, d]
  # The kernel has no scale of its own; float32, so that one rounding remains.
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)
  kernel = _splash_kernel(size, H, window, softcap, interpret)
  out = jax.vmap(kernel)(ready(q), ready(k.astype(q.dtype)), ready(v.astype(q.dtype)))
  return out.swapaxes(1, 2)[:, :T]


def _splash_kernel(size, heads, window, softcap, interpret):
  # Imported where it is used: it takes Pallas half a second, which nothing but a TPU needs.
  from jax.experimental.pallas.ops.tpu import splash_attention as library

  block = next(block for block in _BLOCKS if size % block == 0)
  if window is None or window >= size:
    mask = library.CausalMask((size, size))
  else:
    mask = library.LocalMask((size, size), (window - 1, 0), 0)
  return library.make_splash_mha(
      library.MultiHeadMask((mask,) * heads), head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap,
      block_sizes=library.BlockSizes(block_q=block, block_kv=block), interpret=interpret,
  )


_BY = {'blockwise': blockwise.causal, 'cudnn': _cudnn, 'splash': splash}
