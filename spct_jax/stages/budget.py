"""What each stage will hold on one device, told before anything is loaded: from shapes and shardings alone.

Arrays are exact; activations are an estimate (`plan.activations`).
"""

from typing import Any

import jax

from spct_jax import sharding
from spct_jax.models import kv_cache
from spct_jax.sampling import loop
from spct_jax.stages import loading, plan, processes, samplers
from spct_jax.train import optim, state as states

LEARNERS = ('sft', 'rft', 'grpo', 'meta_rm')
SAMPLERS = ('sample', 'grpo', 'meta_rm', 'evaluate')


def rows(config: Any, mesh: Any, stage: str, tok: Any) -> list[plan.Row]:
  """The memory table of one stage."""
  rules = loading.rules(config.sharding.rules)
  fields, out = config[stage], []
  if stage in LEARNERS:
    head_kind = 'scalar' if stage == 'meta_rm' else 'lm'
    out += _learner(config, mesh, rules, stage, loading.model(config, tok, name=fields.init, head_kind=head_kind))
  if stage in SAMPLERS:
    names = {'sample': 'model', 'grpo': 'init', 'meta_rm': 'policy'}
    sampled = fields.models if stage == 'evaluate' else (fields[names[stage]],)
    decoder = max((loading.model(config, tok, name=name) for name in sampled), key=lambda model: model.num_params)
    params = decoder.abstract_params()
    layout = sharding.tree_shardings(params, rules, mesh)
    adapted = stage == 'grpo' and loading.lora_settings(config, stage) is not None
    if stage == 'grpo':
      apart = fields.reference not in ('', fields.init)
      frozen = (loading.model(config, tok, name=fields.reference) if apart else decoder).abstract_params()
      if apart or not adapted:  # else it is the base that the adapters are on
        out.append(plan.row('frozen reference', frozen, sharding.tree_shardings(frozen, rules, mesh)))
    elif stage not in LEARNERS:
      out.append(plan.row('parameters', params, layout))
    out += _view(config, mesh, stage, decoder, adapted)
    out += _caches(config, mesh, decoder)
    if stage == 'grpo' and fields.replay_kept:
      out += _kept(config, mesh)
    if stage == 'evaluate' and fields.meta:
      scalar = loading.model(config, tok, name=fields.meta, head_kind='scalar').abstract_params()
      out.append(plan.row('parameters of the meta-RM', scalar, sharding.tree_shardings(scalar, rules, mesh)))
  return out


def _learner(config, mesh, rules, stage, decoder):
  fields = config[stage]
  trained = loading.learner(config, stage, decoder)
  optimizer = optim.make_optimizer(loading.optim_settings(fields))
  abstract = states.abstract_state(trained, optimizer)
  layout = states.state_shardings(trained, optimizer, rules, mesh)
  gradients = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, 'float32'), abstract['params'])
  c = decoder.config
  sequences = fields.batch * (fields.group if stage == 'grpo' else 1)
  per_device = -(-sequences // (fields.microbatches * sharding.data_ways(mesh)))
  chunk = config.model.logits_chunk
  held = min(chunk, fields.buckets[-1]) / fields.buckets[-1] if chunk else 1.0  # share of the positions with logits
  out = []
  if trained is not decoder:
    base = decoder.abstract_params()
    out.append(plan.row('frozen parameters', base, sharding.tree_shardings(base, rules, mesh)))
  return out + [
      plan.row('parameters' if trained is decoder else 'adapters', abstract['params'], layout['params']),
      plan.row('optimizer state', abstract['opt_state'], layout['opt_state']),
      plan.row('gradients', gradients, layout['params']),
      plan.activations(
          tokens=per_device * fields.buckets[-1],
          width=c.width,
          ffn=c.ffn,
          layers=c.num_layers,
          vocab=round(c.vocab_size * held) if c.head_kind == 'lm' else 1,
          itemsize=2 if c.dtype == 'bfloat16' else 4,
          remat=c.remat,
      ),
  ]


def _view(config, mesh, stage, decoder, adapted):
  """What of the sampler's view is not the learner's own arrays."""
  shapes, places = samplers.abstract_view(config, decoder, mesh)
  base = decoder.abstract_params()
  layout = sharding.tree_shardings(base, loading.rules(config.sharding.rules), mesh)
  base = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), base, layout)
  adapters = loading.learner(config, stage, decoder).abstract_params() if adapted else {}
  held = samplers.own(decoder.config, shapes, places, base, adapters)
  made, where = (
      {path: leaf for path, leaf in sharding.leaf_paths(tree) if path not in held} for tree in (shapes, places)
  )
  return [plan.row("sampler's view of the parameters", made, where)] if made else []


def _caches(config, mesh, decoder):
  """Prompt slots (at most as many as prompts) and rows of the engine, padded to what the mesh divides.

  Where prompts are cut in trunks and branches, the slots of both together never hold more than those of whole prompts.
  """
  ways = sharding.data_ways(mesh)
  fields = config.judge
  out = []
  for name, batch, length in (
      ('prompt', fields.chunk_prompts, fields.buckets[-1]),
      ('rows', fields.rows, fields.max_new_tokens),
  ):
    batch = ways * -(-batch // ways)
    dtype = config.model.sampler_cache or config.model.sampler_dtype
    shapes = jax.eval_shape(lambda b=batch, s=length: kv_cache.init(decoder.config, b, s, dtype))
    layout = loop.cache_layout(name, shapes, loading.rules(config.sharding.cache_rules), mesh)
    out.append(plan.row(f'cache of {"prompts" if name == "prompt" else "rows"}', shapes, layout))
  return out


def _kept(config, mesh):
  """The ids of kept tokens: of all tasks of an engine call, and of the learner's batch."""
  ways, fields = sharding.data_ways(mesh), config.grpo
  out = []
  for name, count, length in (
      ('record of kept tokens', config.judge.chunk_tasks, config.judge.max_new_tokens),
      ('kept tokens of a batch', fields.batch * fields.group, fields.buckets[-1]),
  ):
    ids = jax.ShapeDtypeStruct((ways * -(-count // ways), length, fields.replay_kept), 'int32')
    out.append(plan.row(name, ids, sharding.batch_rows(mesh)))
  return out


def report(config: Any, mesh: Any, stages: tuple[str, ...]) -> None:
  """Prints the table of the stage that needs most, and a line for each of the others.

  Raises:
    ValueError: a stage cannot fit, or the parameters or caches do not divide over the mesh.
  """
  tok = loading.tokenizer(config)
  decoder = loading.model(config, tok)
  tables = {stage: rows(config, mesh, stage, tok) for stage in stages}
  sums = {stage: sum(row.bytes for row in table) for stage, table in tables.items()}
  processes.say(f'model: {decoder.num_params:,} parameters, {decoder.config.num_layers} layers')
  limit = sharding.memory_limit(mesh.devices.flatten())
  largest = max(sums, key=sums.get)
  for stage, table in tables.items():
    lines = plan.memory(table, limit=limit)
    if stage == largest:
      processes.say(*(f'{stage}: {line}' for line in lines))
  others = ', '.join(f'{stage} {plan.size(total)}' for stage, total in sums.items() if stage != largest)
  if others:
    processes.say(f'memory per device of the other stages: {others}')
