"""From a model in training to one that samples: its engine, and the engine's view of the parameters."""

import dataclasses
import functools
import time
import weakref
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
import numpy as np

from spct_jax import sharding
from spct_jax.judges import grm
from spct_jax.models import int8, unrolled
from spct_jax.models.config import ModelConfig
from spct_jax.models.transformer import Transformer
from spct_jax.sampling.engine import Engine
from spct_jax.stages import loading
from spct_jax.text import tokenizer as tokenizers
from spct_jax.train import lora


def engine(
    config: Any, decoder: Transformer | lora.Adapted, tok: tokenizers.Tokenizer, mesh: Any, stage: str
) -> Engine:
  """The sampler of a stage; its randomness is keyed by the stage's name. GRPO's records what will be replayed."""
  dtype = config.model.sampler_dtype
  return Engine(
      Transformer(dataclasses.replace(decoder.config, dtype=dtype, param_dtype=dtype, remat=False)),
      mesh=mesh,
      cache_rules=loading.rules(config.sharding.cache_rules),
      rows=config.judge.rows,
      max_new_tokens=config.judge.max_new_tokens,
      eos_ids=tok.eos_ids,
      seed=config.seed,
      stage=stage,
      cache_dtype=config.model.sampler_cache or None,
      kept=min(config.grpo.replay_kept, decoder.config.vocab_size) if stage == 'grpo' else 0,
  )


def view(
    config: Any, trained: Transformer | lora.Adapted, mesh: Any, learner_params: Any
) -> tuple[Any, dict[str, float]]:
  """The parameters as the sampler's loop reads them, and the cost of making them {'view_bytes', 'view_seconds'}.

  Layers side by side (`unrolled`), in the sampler's dtype and layout. A leaf that is all this already is the learner's
  own array and costs nothing (decision 3): on one device with equal dtypes that is all but the layers of a scan,
  which the learner holds stacked and a loop of steps cannot read in place. Of a frozen base with adapters the view is
  W + s A B. With `sampler_weights` its matrices are in eight bits (`int8`), rounded from the learner's.
  """
  decoder, settings = (trained.model, trained.settings) if isinstance(trained, lora.Adapted) else (trained, None)
  base, adapters = (learner_params, {}) if settings is None else (learner_params['frozen'], learner_params['adapters'])
  shapes, layout = abstract_view(config, decoder, mesh)
  held = own(decoder.config, shapes, layout, base, adapters)
  leaves, places = dict(held), tuple((path, place) for path, place in sharding.leaf_paths(layout) if path not in held)
  start = time.perf_counter()
  if places:
    leaves |= jax.block_until_ready(_make(decoder.config, *_dtypes(config), places, settings)(base, adapters))
  made = jax.tree_util.tree_map_with_path(lambda path, _: leaves[_said(path)], shapes)
  size = sharding.bytes_per_device({path: leaves[path] for path, _ in places}, dict(places))
  return made, {'view_bytes': float(size), 'view_seconds': time.perf_counter() - start if places else 0.0}


def abstract_view(config: Any, decoder: Transformer, mesh: Any) -> tuple[Any, Any]:
  """Shapes and shardings of the view, without making it."""
  made = functools.partial(_cast, decoder.config, *_dtypes(config))
  shapes = jax.eval_shape(made, decoder.abstract_params())
  return shapes, int8_layout(unrolled.model(decoder).config, shapes, loading.rules(config.sharding.sampler_rules), mesh)


def int8_layout(model: ModelConfig, shapes: Any, rules: sharding.Rules, mesh: Any) -> Any:
  """As `sharding.tree_shardings`; a step of `int8` lies as the outputs of its matrix do and needs no rule."""
  of = {path.rpartition('/')[0]: (path, leaf.shape) for path, leaf in sharding.leaf_paths(shapes) if int8.inputs(model, path)}

  def place(path, leaf):
    path, step = _said(path), path[-1].key == 'step'
    name, shape = of[path.rpartition('/')[0]] if step else (path, leaf.shape)
    spec = sharding.spec_for(name, tuple(shape), rules, mesh)
    if step:
      spec = jax.P(*(axes for number, axes in enumerate(spec) if number not in int8.inputs(model, name)))
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, shapes)


def _dtypes(config):
  return config.model.sampler_dtype, config.model.sampler_weights == 'int8'


def own(model: ModelConfig, shapes: Any, layout: Any, base: Any, adapters: Any) -> dict[str, Any]:
  """Path -> leaf of what the view has from `base` as it is. Leaves may be abstract, with their sharding."""
  pairs = sharding.leaf_paths(unrolled.params(model, adapters, take=lambda leaf, i: leaf))
  adapted = {path.rpartition('/')[0] for path, _ in pairs}
  alone = dict(sharding.leaf_paths(unrolled.params(model, base, take=lambda leaf, i: None)))  # none of a scan's layers

  def same(path, shape, place):
    leaf = alone.get(path)
    return leaf is not None and leaf.dtype == shape.dtype and leaf.sharding.is_equivalent_to(place, len(leaf.shape))

  return {
      path: alone[path]
      for (path, shape), place in zip(sharding.leaf_paths(shapes), jax.tree.leaves(layout))
      if path.rpartition('/')[0] not in adapted and same(path, shape, place)
  }


def _said(path):
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _cast(model: ModelConfig, dtype: str, eight_bits: bool, params: Any) -> Any:
  """The layers side by side in the sampler's dtype."""
  params = unrolled.params(model, params)
  if eight_bits:
    params = int8.quantise(unrolled.model(Transformer(model)).config, params)
  return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.astype(_sampler_dtype(path, leaf, dtype)), params)


def _sampler_dtype(path, leaf, dtype):
  """Norm scales and routers keep their own dtype: they are few, and are multiplied in float32. So does int8."""
  own = path[-1].key in ('scale', 'step') or path[-2].key == 'router' or leaf.dtype == np.int8
  return leaf.dtype if own else np.dtype(dtype)


@functools.lru_cache(maxsize=None)
def _make(model: ModelConfig, dtype: str, eight_bits: bool, places: tuple, settings: lora.Settings | None):
  """One compiled merge, cast and reshard of the leaves at `places` per model, dtype, layout and adapters."""

  def made(base, adapters):
    if settings is not None:
      sides = unrolled.params(model, base), unrolled.params(model, adapters)
      base = lora.merge(*sides, settings, 'float32' if eight_bits else dtype)  # to be rounded once
    leaves = dict(sharding.leaf_paths(_cast(model, dtype, eight_bits, base)))
    return {path: leaves[path] for path, _ in places}

  return jax.jit(made, out_shardings=dict(places))


Factory = Callable[[str, Any], grm.Generate]


def generator(
    config: Any, trained: Transformer | lora.Adapted, tok: tokenizers.Tokenizer, mesh: Any, generate: Factory | None
) -> Factory:
  """`(stage, params) -> Generate`: the given one, or the engine, compiled once per stage.

  The engine's Generate holds the sampler's view of the parameters until it is dropped; stages that are bound to the
  same parameters meanwhile share it. `bind.cost` is what making the last view took.
  """
  if generate is not None:
    return generate
  engines: dict[str, Engine] = {}
  latest: list[weakref.ref] = []  # to a view, and to the leaves that it was made of: neither is kept alive

  def viewed(learner_params):
    leaves = jax.tree.leaves(learner_params)
    if latest and len(latest) == 1 + len(leaves):
      held, *made_of = (ref() for ref in latest)
      if held is not None and all(a is b for a, b in zip(made_of, leaves)):
        bind.cost = {'view_bytes': 0.0, 'view_seconds': 0.0}
        return held
    params, bind.cost = view(config, trained, mesh, learner_params)
    held = _Held(params)
    latest[:] = map(weakref.ref, (held, *leaves))
    return held

  def bind(stage, learner_params):
    if stage not in engines:
      engines[stage] = engine(config, trained, tok, mesh, stage)
    held = viewed(learner_params)
    return lambda prompts_, tasks, infos, withdraw=None: engines[stage].launch(held.params, prompts_, tasks, withdraw)

  bind.cost = {}

  return bind


class _Held:
  """A view that several engines may read."""

  def __init__(self, params):
    self.params = params
