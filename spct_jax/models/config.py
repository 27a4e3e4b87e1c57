"""What a decoder is, as plain frozen data: hashable (a static jit argument) and JSON-able.

The layers come as `head` blocks, then `period` repeated `num_periods` times (stacked and scanned), then
`remainder` blocks. A plain model has one block in its period and no head or remainder; one that
alternates local and global attention has two blocks in its period.

The keyword defaults below only switch features off, for tests and notebooks. `from_dict`, which the
stages use, takes no defaults: every field must be on the config page.
"""

import dataclasses
import math

from spct_jax.models.rope import SCALINGS, RopeScaling, yarn_mscale

DTYPES = ('float32', 'bfloat16', 'float16')
HEAD_KINDS = ('lm', 'scalar')
ACTIVATIONS = ('silu', 'gelu_tanh', 'gelu', 'relu')


@dataclasses.dataclass(frozen=True)
class Experts:
  """A mixture of experts in place of the feed-forward network; see `moe`.

  `count` experts of width `ffn`, of which a token goes through `top_k`, and one that all tokens go through of
  width `shared_ffn` (0: none). `renormalise` makes the chosen weights sum to one; `scale` then multiplies
  them. The experts stand in `groups` equal groups, of which only the best `top_groups` are chosen from.
  `router_dtype` is what the router is stored in, None the model's; it computes in float32, so settings that differ
  in this only are equal.
  """

  count: int
  top_k: int
  ffn: int
  shared_ffn: int = 0
  renormalise: bool = False
  scale: int | float = 1.0
  groups: int = 1
  top_groups: int = 1
  router_dtype: str | None = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    if not (1 <= self.top_k <= self.count and self.ffn >= 1 and self.shared_ffn >= 0):
      raise ValueError(
          f'experts: got {self}; needs 1 <= top_k <= count, a positive ffn and a shared_ffn that is not negative'
      )
    if self.groups < 1 or self.count % self.groups or not 1 <= self.top_groups <= self.groups:
      raise ValueError(
          f'experts: got {self.groups} groups, {self.top_groups} of them chosen, of {self.count} experts; the groups '
          'must divide the experts evenly, and at least one and at most all of them be chosen'
      )
    if self.top_k > self.top_groups * (self.count // self.groups):
      raise ValueError(
          f'experts: got top_k={self.top_k} of {self.top_groups} groups with {self.count // self.groups} experts each; '
          'lower top_k or choose more groups'
      )


@dataclasses.dataclass(frozen=True)
class Latent:
  """Multi-head latent attention; see `mla`.

  Keys and values are made from a latent of `rank` numbers per token. Of a head's query and key, `nope` numbers
  are not rotated and `rope` are; the rotated part of the key is one for all heads. A head's value has `value`
  numbers. `q_rank`: queries are made from a latent of their own, of this size; None: from the residual stream.
  """

  rank: int
  nope: int
  rope: int
  value: int
  q_rank: int | None = None

  def __post_init__(self):
    sizes = (self.rank, self.nope, self.rope, self.value, 1 if self.q_rank is None else self.q_rank)
    if min(sizes) < 1 or self.rope % 2:
      raise ValueError(f'latent: got {self}; needs positive sizes, and an even `rope`, for it turns pairs')


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """What may differ between two blocks of one model.

  `window`: a query sees the `window` latest positions, itself included; None is global attention.
  `experts`: in place of the feed-forward network; None is that network.
  """

  window: int | None = None
  rope_theta: int | float = 10000.0
  rope_scaling: RopeScaling | None = None
  experts: Experts | None = None

  def __post_init__(self):
    if self.window is not None and self.window < 1:
      raise ValueError(f'window: got {self.window}; needs a positive count of tokens, or None for global')
    if not self.rope_theta > 0:
      raise ValueError(f'rope_theta: got {self.rope_theta}; needs a positive base, for example 10000.0')
    if self.rope_scaling is not None and self.rope_scaling.kind == 'yarn' and not self.rope_theta > 1:
      raise ValueError(f'rope_theta: got {self.rope_theta}; with yarn needs a base above 1, for example 10000.0')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One decoder. `width` is D, `heads` H, `kv_heads` M, `ffn` F of the alphabet of `types`.

  `vocab_multiple` pads the embedding table to a multiple of it, so that it divides over devices;
  logits are cut back to `vocab_size`. `dtype` is what is computed in, `param_dtype` what is stored.
  `remat` recomputes each layer in the backward pass instead of keeping its activations.

  norm_plus_one: norms multiply by 1 + scale, and scales start at 0 (Gemma).
  post_norms: what attention and MLP add to the residual stream is normed too.
  qkv_bias, o_bias, mlp_bias: biases on q, k and v; on o; on gate, up and down.
  query_scalar: scores are divided by its square root; None is head_dim.
  attn_softcap, logit_softcap: cap * tanh(x / cap) of the scores before the mask, and of the logits.
  embed_scaled: embeddings are multiplied by sqrt(width), rounded to `dtype`.
  latent: keys and values come from a latent, and `head_dim` is the query's; None: they are projected. `qkv_bias` is
    then the bias of what makes the latents.
  family: the Hugging Face `model_type` it came from, which its config.json shall have again where that can describe
    it; None is any. It changes no number, so models that differ in it only are equal.
  """

  vocab_size: int
  width: int
  heads: int
  kv_heads: int
  head_dim: int
  ffn: int
  period: tuple[BlockConfig, ...]
  num_periods: int
  head: tuple[BlockConfig, ...] = ()
  remainder: tuple[BlockConfig, ...] = ()
  vocab_multiple: int = 1
  tied: bool = False
  norm_eps: float = 1e-6
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  norm_plus_one: bool = False
  post_norms: bool = False
  activation: str = 'silu'
  query_scalar: int | float | None = None
  attn_softcap: int | float | None = None
  logit_softcap: int | float | None = None
  embed_scaled: bool = False
  latent: Latent | None = None
  head_kind: str = 'lm'
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  remat: bool = False
  family: str | None = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    for name in ('head', 'period', 'remainder'):
      blocks = getattr(self, name)
      if not isinstance(blocks, tuple) or not all(isinstance(b, BlockConfig) for b in blocks):
        raise ValueError(f'{name}: got {blocks!r}; needs a tuple of BlockConfig, for example (BlockConfig(),)')
    for name in ('vocab_size', 'width', 'heads', 'kv_heads', 'head_dim', 'ffn', 'vocab_multiple'):
      if not getattr(self, name) >= 1:
        raise ValueError(f'{name}: got {getattr(self, name)}; needs a positive integer')
    if self.heads % self.kv_heads:
      raise ValueError(
          f'heads: got {self.heads} query heads for kv_heads={self.kv_heads}; every key/value head serves '
          'the same number of query heads, so kv_heads must divide heads'
      )
    if self.latent is not None:
      self._check_latent()
    elif self.head_dim % 2:
      raise ValueError(f'head_dim: got {self.head_dim}; rotary embedding turns pairs, so it must be even')
    if self.num_periods < 0 or bool(self.period) != (self.num_periods > 0):
      raise ValueError(
          f'num_periods: got {self.num_periods} with {len(self.period)} blocks in the period; needs a positive '
          'count with a period, and 0 without one'
      )
    if not self.num_layers:
      raise ValueError('a model needs at least one block in head, period or remainder')
    if not self.norm_eps > 0:
      raise ValueError(f'norm_eps: got {self.norm_eps}; needs a small positive number, for example 1e-6')
    for name in ('query_scalar', 'attn_softcap', 'logit_softcap'):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f'{name}: got {value}; needs a positive number, or None')
    _one_of('activation', self.activation, ACTIVATIONS)
    _one_of('head_kind', self.head_kind, HEAD_KINDS)
    _one_of('dtype', self.dtype, DTYPES)
    _one_of('param_dtype', self.param_dtype, DTYPES)

  @property
  def num_layers(self) -> int:
    return len(self.head) + len(self.period) * self.num_periods + len(self.remainder)

  @property
  def padded_vocab(self) -> int:
    return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

  @property
  def layers(self) -> tuple[BlockConfig, ...]:
    """Every block in the order it runs."""
    return self.head + self.period * self.num_periods + self.remainder

  def score_scale(self, block: BlockConfig) -> float:
    """What `q k^T` of a block is multiplied by.

    With a latent and YaRN by the square of its magnitude for `mscale_all_dim` too (DeepSeek-V2): the unrotated part
    of queries and keys is to grow like the rotated part.
    """
    scale = (self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5
    scaling = block.rope_scaling
    if self.latent is not None and scaling is not None and scaling.kind == 'yarn' and scaling.mscale_all_dim:
      scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale

  def _check_latent(self):
    if (self.kv_heads, self.head_dim, self.qk_norm) != (self.heads, self.latent.nope + self.latent.rope, False):
      raise ValueError(
          f'latent: got {self.latent} with {self.kv_heads} key heads of {self.heads}, head_dim={self.head_dim} and '
          f'qk_norm={self.qk_norm}; every head has its own key, head_dim is nope + rope, and there is no qk_norm'
      )

  def to_dict(self) -> dict:
    """JSON-able; `from_dict` undoes it."""
    out = dataclasses.asdict(self)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}

  @classmethod
  def from_dict(cls, fields: dict) -> 'ModelConfig':
    """Every field must be present and none may be unknown."""
    fields = _checked('model config', dict(fields), cls)
    for name in ('head', 'period', 'remainder'):
      fields[name] = tuple(_block(name, block) for block in fields[name])
    if fields['latent'] is not None:
      fields['latent'] = Latent(**_checked('latent', dict(fields['latent']), Latent))
    return cls(**fields)


def _block(where: str, fields: dict) -> BlockConfig:
  fields = _checked(f'block of {where}', dict(fields), BlockConfig)
  if fields['rope_scaling'] is not None:
    scaling = dict(fields['rope_scaling'])
    _one_of('rope_scaling kind', scaling.get('kind'), tuple(SCALINGS))
    cls = SCALINGS[scaling['kind']]
    fields['rope_scaling'] = cls(**_checked('rope_scaling', scaling, cls))
  if fields['experts'] is not None:
    fields['experts'] = Experts(**_checked('experts', dict(fields['experts']), Experts))
  return BlockConfig(**fields)


def _checked(what: str, fields: dict, cls: type) -> dict:
  known = [field.name for field in dataclasses.fields(cls)]
  unknown, missing = sorted(set(fields) - set(known)), [name for name in known if name not in fields]
  if unknown or missing:
    raise ValueError(f'{what}: unknown fields {unknown}, missing fields {missing}; the fields are {known}')
  return fields


def _one_of(name: str, value: str, allowed: tuple[str, ...]):
  if value not in allowed:
    raise ValueError(f'{name}: got {value!r}; allowed are {", ".join(allowed)}')
