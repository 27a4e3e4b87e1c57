"""From a model in training to one that samples: its engine, and the engine's view of the parameters."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spct_jax import sharding
from spct_jax.judges import grm
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
      kept=min(config.grpo.replay_kept, decoder.config.vocab_size) if stage == 'grpo' else 0,
  )


def view(
    config: Any, trained: Transformer | lora.Adapted, mesh: Any, learner_params: Any
) -> tuple[Any, dict[str, float]]:
  """The sampler's copy of the parameters, in its dtype and layout, and its cost {'view_bytes', 'view_seconds'}.

  Where dtype and layout are the learner's own, it is the learner's own arrays and costs nothing (decision 3). Of a
  frozen base with adapters it is W + s A B.
  """
  settings = trained.settings if isinstance(trained, lora.Adapted) else None
  decoder = trained.model if isinstance(trained, lora.Adapted) else trained
  dtype = np.dtype(config.model.sampler_dtype)
  layout = sharding.tree_shardings(decoder.abstract_params(), loading.rules(config.sharding.sampler_rules), mesh)
  if settings is None:
    same = jax.tree_util.tree_map_with_path(
        lambda path, leaf, where: (
            leaf.dtype == _sampler_dtype(path, leaf, dtype) and leaf.sharding.is_equivalent_to(where, leaf.ndim)
        ),
        learner_params,
        layout,
    )
    if all(jax.tree.leaves(same)):
      return learner_params, {'view_bytes': 0.0, 'view_seconds': 0.0}
  start = time.perf_counter()
  made = jax.block_until_ready(_cast(str(dtype), _frozen(layout), settings)(learner_params))
  size = sharding.bytes_per_device(made, layout)
  return made, {'view_bytes': float(size), 'view_seconds': time.perf_counter() - start}


def _sampler_dtype(path, leaf, dtype):
  """Norm scales and routers keep their own dtype: they are few, and are multiplied in float32."""
  own = path[-1].key == 'scale' or path[-2].key == 'router'
  return leaf.dtype if own else np.dtype(dtype)


def _frozen(tree):
  leaves, structure = jax.tree.flatten(tree)
  return tuple(leaves), structure


@functools.lru_cache(maxsize=None)
def _cast(dtype: str, layout: tuple, settings: lora.Settings | None):
  """One compiled merge, cast and reshard per dtype, layout and adapters."""
  leaves, structure = layout

  def merged(tree):
    if settings is not None:
      tree = lora.merge(tree['frozen'], tree['adapters'], settings, dtype)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.astype(_sampler_dtype(path, leaf, dtype)), tree)

  return jax.jit(merged, out_shardings=jax.tree.unflatten(structure, leaves))


Factory = Callable[[str, Any], grm.Generate]


def generator(
    config: Any, trained: Transformer | lora.Adapted, tok: tokenizers.Tokenizer, mesh: Any, generate: Factory | None
) -> Factory:
  """`(stage, params) -> Generate`: the given one, or the engine, compiled once per stage.

  The engine's Generate holds the sampler's view of the parameters until it is dropped; `bind.cost` is what making
  the last view took.
  """
  if generate is not None:
    return generate
  engines: dict[str, Engine] = {}

  def bind(stage, learner_params):
    if stage not in engines:
      engines[stage] = engine(config, trained, tok, mesh, stage)
    held, bind.cost = view(config, trained, mesh, learner_params)
    return lambda prompts_, tasks, infos: engines[stage].launch(held, prompts_, tasks)

  bind.cost = {}

  return bind
