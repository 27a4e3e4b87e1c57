"""Low-rank adapters (LoRA, arXiv 2106.09685) on chosen projections of a frozen decoder.

    y = x W + s (x A) B        W frozen [*in, *out]; A [*in, r] random, B [r, *out] zero: the start is the base, exactly
    s = alpha / r, or alpha / sqrt(r) with `rslora` (arXiv 2312.03732)

The adapters are a tree of their own, float32, with the paths of the kernels that they adapt:

    {'period': {'0': {'q': {'lora_a': [P, D, r], 'lora_b': [P, r, H, hd]}, ...}}, ...}

State, gradients, optimizer and checkpoints are of this tree alone. `join` puts it beside the base for a forward
pass, in which `models.dense` adds each pair as a path of its own; `merge` makes W + s A B, for the sampler, the
next stage and the export.

1. A scalar head learns whole: its kernel is in the adapters' tree, and starts as the base's.
2. Adapters have no dropout: it would make a step depend on more than its batch.
3. Each expert of a mixture has a pair of its own, added to its kernel in the layer; a router is never adapted.
4. A rank may be above a matrix's own, as in PEFT: keys and values are often narrower than the rest.
5. A is uniform within 1 / sqrt(fan-in), as PEFT draws it; the paper has a Gaussian.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from spct_jax import sharding
from spct_jax.models import hf_names
from spct_jax.models.config import ModelConfig
from spct_jax.models.dense import low_rank
from spct_jax.models.transformer import Transformer

PAIR = ('lora_a', 'lora_b')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Which projections are adapted, and how. `targets` are names of projections, such as 'q' or 'experts/up'."""

  rank: int
  alpha: float
  targets: tuple[str, ...]
  rslora: bool

  def __post_init__(self):
    if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
      raise ValueError(f'lora.rank: got {self.rank!r}; allowed: a whole number of at least 1, or 0 for no adapters')
    if not (math.isfinite(self.alpha) and self.alpha > 0):
      raise ValueError(f'lora.alpha: got {self.alpha!r}; allowed: a positive number (the scale is alpha / rank)')
    if not self.targets or len(set(self.targets)) != len(self.targets):
      raise ValueError(f"lora.targets: got {self.targets}; allowed: one or more distinct names, such as ('q', 'v')")

  @property
  def scale(self) -> float:
    """s of the equation."""
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """The axes of a kernel: those that count matrices (periods, experts), and those of a matrix."""

  stack: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


def kernels(model: Transformer) -> dict[str, Kernel]:
  """Every kernel of the blocks that can be adapted, by its path."""
  found = {}
  for path, leaf in sharding.leaf_paths(model.abstract_params()):
    parts = path.split('/')
    if parts[0] not in ('head', 'period', 'remainder') or parts[-1] != 'kernel' or parts[-2] == 'router':
      continue
    names, axes = hf_names.tensors_of(model.config, path)
    stacked = hf_names.depth(names)
    shape = leaf.shape[stacked:]
    found[path] = Kernel(leaf.shape[:stacked], shape[:axes], shape[axes:])
  return found


def projection(path: str) -> str:
  """The name that a target is held against: 'q' of 'period/0/q/kernel'."""
  return '/'.join(path.split('/')[2:-1])


def adapted(model: Transformer, settings: Settings) -> dict[str, Kernel]:
  """The part of `kernels` that the targets name.

  Raises:
    ValueError: a target that no projection has.
  """
  every = kernels(model)
  named = lambda target, path: projection(path) == target or projection(path).endswith(f'/{target}')
  for target in settings.targets:
    if not any(named(target, path) for path in every):
      known = dict.fromkeys(map(projection, every))
      raise ValueError(f'lora.targets: got {target!r}; this model has {", ".join(known)}')
  return {path: kernel for path, kernel in every.items() if any(named(target, path) for target in settings.targets)}


@dataclasses.dataclass(frozen=True)
class Adapted:
  """A frozen decoder and its adapters in the place of a model: objectives and state take it as they take one.

  `init` makes the adapters, which are all there is to train; elsewhere `params` is `{'frozen', 'adapters'}`.
  """

  model: Transformer
  settings: Settings

  @property
  def config(self) -> ModelConfig:
    return self.model.config

  def init(self, key: jax.Array) -> dict:
    """Adapters that change nothing: A random, B zero; a scalar head is zero here, and the base's in `start`."""
    c, rank, tree = self.config, self.settings.rank, {}
    for number, (path, kernel) in enumerate(adapted(self.model, self.settings).items()):
      bound = math.prod(kernel.inputs) ** -0.5
      shape = (*kernel.stack, *kernel.inputs, rank)
      drawn = jax.random.uniform(jax.random.fold_in(key, number), shape, minval=-bound, maxval=bound)
      put(tree, path, {'lora_a': drawn, 'lora_b': jnp.zeros((*kernel.stack, rank, *kernel.outputs))})
    if c.head_kind == 'scalar':
      tree['reward'] = {'kernel': jnp.zeros((c.width, 1))}
    return tree

  def start(self, key: jax.Array, base: dict) -> dict:
    """`init`, with the base's own scalar head."""
    tree = self.init(key)
    if 'reward' in tree:
      tree['reward'] = {'kernel': base['reward']['kernel'].astype(jnp.float32)}
    return tree

  def abstract_params(self) -> dict:
    return jax.eval_shape(self.init, jax.random.key(0))

  def join(self, params: dict) -> dict:
    """The base with the adapters beside their kernels, as a forward pass takes it."""
    return _join(params['frozen'], params['adapters'], self.settings.scale)

  def hidden(self, params: dict, *args: Any) -> jax.Array:
    """As `Transformer.hidden`."""
    return self.model.hidden(self.join(params), *args)

  def unembed(self, params: dict, x: jax.Array) -> jax.Array:
    """As `Transformer.unembed`."""
    return self.model.unembed(self.join(params), x)

  def apply(self, variables: dict, tokens: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """As `Transformer.apply`."""
    return self.model.apply({'params': self.join(variables['params'])}, tokens, lengths=lengths)


def concatenate(parts: list[tuple[Adapted, dict]]) -> tuple[Adapted, dict]:
  """Adapters trained one upon the other, the newest first, as one of the sum of their ranks and of scale 1.

      s1 A1 B1 + s2 A2 B2 = [A1 A2] [s1 B1 ; s2 B2]

  A kernel that one of them leaves alone has zeros in its part; a scalar head is the newest one's.
  """
  if len(parts) == 1:
    return parts[0]
  model = parts[0][0].model
  every = kernels(model)
  of = [adapted(part.model, part.settings) for part, _ in parts]
  chosen = [path for path in every if any(path in kernels_ for kernels_ in of)]
  rank = sum(part.settings.rank for part, _ in parts)
  settings = Settings(rank, float(rank), tuple(dict.fromkeys(map(projection, chosen))), False)
  adapted(model, settings)
  tree = {name: leaf for name, leaf in parts[0][1].items() if name == 'reward'}
  for path in chosen:
    kernel, downs, ups = every[path], [], []
    for (part, adapters), kernels_ in zip(parts, of):
      r = part.settings.rank
      node = at(adapters, path) if path in kernels_ else {}
      blank = jnp.zeros((*kernel.stack, *kernel.inputs, r)), jnp.zeros((*kernel.stack, r, *kernel.outputs))
      down, up = (node['lora_a'], part.settings.scale * node['lora_b']) if node else blank
      downs.append(down)
      ups.append(up)
    pair = jnp.concatenate(downs, axis=-1), jnp.concatenate(ups, axis=len(kernel.stack))
    put(tree, path, dict(zip(PAIR, pair)))
  return Adapted(model, settings), tree


def at(tree: dict, path: str) -> dict:
  """The adapters of the kernel at `path`."""
  for name in path.split('/')[:-1]:
    tree = tree[name]
  return tree


def put(tree: dict, path: str, pair: dict) -> None:
  """Places the adapters of the kernel at `path`."""
  *above, _ = path.split('/')
  for name in above:
    tree = tree.setdefault(name, {})
  tree.update(pair)


def merge(base: dict, adapters: dict, settings: Settings, dtype: str | None = None) -> dict:
  """W + s A B from float32, in `dtype` or that of the base; a scalar head takes the place of the base's.

  Stacked kernels are merged a layer at a time, so that no float32 copy of all of them exists.
  """
  return _merge(base, adapters, settings.scale, dtype, stacked=False)


def _join(base, adapters, scale):
  out = dict(base)
  for name, node in adapters.items():
    if isinstance(node, dict):
      out[name] = _join(base[name], node, scale)
    else:
      out[name] = node * scale if name == 'lora_b' else node
  return out


def _merge(base, adapters, scale, dtype, stacked):
  out = dict(base)
  if 'lora_a' in adapters:
    one = lambda each: _sum(*each, scale, dtype or base['kernel'].dtype)
    each = (base['kernel'], adapters['lora_a'], adapters['lora_b'])
    return {**out, 'kernel': jax.lax.map(one, each) if stacked else one(each)}
  for name, node in adapters.items():
    if isinstance(node, dict):
      out[name] = _merge(base[name], node, scale, dtype, stacked or name == 'period')
    else:
      out[name] = node.astype(dtype or base[name].dtype)
  return out


def _sum(kernel, a, b, scale, dtype):
  return (kernel.astype(jnp.float32) + scale * low_rank(a, b, kernel.ndim)).astype(dtype)
