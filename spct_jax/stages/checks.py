"""What can be known to be wrong before anything is loaded: every stage calls its check first.

A pipeline calls the checks of all its stages before the first one works.
"""

from typing import Any

from spct_jax.train import update

ORDERS = ('shuffle', 'balanced', 'fixed')


def training(config: Any, mesh: Any, stage: str) -> None:
  """Numbers of a training stage, and whether its batch divides over microbatches and devices."""
  fields = config[stage]
  for name, least in (('steps', 0), ('batch', 1), ('microbatches', 1), ('checkpoint_every', 1)):
    _at_least(f'{stage}.{name}', fields[name], least)
  if not fields.lr > 0:
    raise ValueError(f'{stage}.lr: got {fields.lr}; allowed: a positive learning rate')
  _ascending(f'{stage}.buckets', fields.buckets)
  rows = fields.batch * (fields.group if stage == 'grpo' else 1)
  try:
    update.check_rows(rows, fields.microbatches, mesh)
  except ValueError as error:
    raise ValueError(f'{stage}.batch: {error}') from None
  if stage == 'rft' and not 0 <= fields.general_fraction <= 1:
    raise ValueError(f'rft.general_fraction: got {fields.general_fraction}; allowed: 0 to 1')


def sampling(config: Any, stage: str) -> None:
  """Numbers of a stage that draws judgements."""
  fields = config[stage]
  judge = config.judge
  for name, value in (
      ('judge.max_new_tokens', judge.max_new_tokens),
      ('judge.chunk_prompts', judge.chunk_prompts),
      ('judge.chunk_tasks', judge.chunk_tasks),
      ('judge.rows', judge.rows),
      (f'{stage}.samples', fields.samples),
  ):
    _at_least(name, value, 1)
  _ascending('judge.buckets', judge.buckets)
  if 'orders' in fields and fields.orders not in ORDERS:
    raise ValueError(f'{stage}.orders: got {fields.orders!r}; allowed: {", ".join(ORDERS)}')
  if stage == 'sample':
    _at_least('sample.hinted_samples', fields.hinted_samples, 0)
    if fields.hinted_items not in ('all', 'unsolved'):
      raise ValueError(f"sample.hinted_items: got {fields.hinted_items!r}; allowed: 'all', 'unsolved'")


def grpo(config: Any, mesh: Any) -> None:
  """A group of one has no advantage, so GRPO would learn nothing from it."""
  fields = config.grpo
  if fields.group < 2:
    raise ValueError(
        f'grpo.group: got {fields.group}; allowed: 2 or more, because an advantage compares the samples of one '
        'prompt (the paper uses 4)'
    )
  training(config, mesh, 'grpo')
  _at_least('grpo.updates', fields.updates, 1)
  if fields.old_logp not in ('sampler', 'learner'):
    raise ValueError(f"grpo.old_logp: got {fields.old_logp!r}; allowed: 'sampler', 'learner'")
  if fields.clip_eps < 0 or fields.kl_coef < 0:
    raise ValueError(
        f'grpo: got clip_eps={fields.clip_eps}, kl_coef={fields.kl_coef}; neither may be negative'
    )
  if not fields.temperature > 0:
    raise ValueError(
        f'grpo.temperature: got {fields.temperature}; allowed: above 0, because the learner divides by it'
    )


def evaluation(config: Any) -> None:
  """Votes must fit into the pool, and the voters into the vote."""
  sampling(config, 'evaluate')
  fields = config.evaluate
  ks = tuple(fields.ks)
  _ascending('evaluate.ks', ks)
  if ks[-1] > fields.samples:
    raise ValueError(
        f'evaluate.ks: got {ks[-1]} votes from a pool of evaluate.samples={fields.samples}; raise the pool or '
        'lower k'
    )
  _at_least('evaluate.k_meta', fields.k_meta, 0)
  if fields.meta and fields.k_meta > ks[-1]:
    raise ValueError(
        f'evaluate.k_meta: got {fields.k_meta} voters out of at most k={ks[-1]} samples; allowed: k_meta <= k, '
        'or 0 for half of k'
    )
  if fields.single not in ('binary', 'scale'):
    raise ValueError(f"evaluate.single: got {fields.single!r}; allowed: 'binary', 'scale'")
  if not fields.models:
    raise ValueError('evaluate.models: got none; name at least one of base, sft, rft, grpo')


def stage(config: Any, mesh: Any, name: str) -> None:
  """The checks of one stage by its name."""
  if name == 'grpo':
    grpo(config, mesh)
  elif name == 'evaluate':
    evaluation(config)
  elif name == 'sample':
    sampling(config, name)
  else:
    training(config, mesh, name)
    if name == 'meta_rm':
      sampling(config, name)
      if not 0 <= config.meta_rm.heldout < 1:
        raise ValueError(f'meta_rm.heldout: got {config.meta_rm.heldout}; allowed: 0 up to, not including, 1')


def models(config: Any, name: str) -> tuple[str, ...]:
  """The trained models that a stage starts from or judges with ('base' is none)."""
  fields = config[name]
  found = {
      'sft': lambda: (fields.init,),
      'sample': lambda: (fields.model,),
      'rft': lambda: (fields.init,),
      'grpo': lambda: (fields.init,),
      'meta_rm': lambda: (fields.init, fields.policy),
      'evaluate': lambda: (*fields.models, fields.meta),
  }[name]()
  wrong = [model for model in found if model not in ('', 'base', 'sft', 'rft', 'grpo', 'meta_rm')]
  if wrong:
    raise ValueError(f'{name}: unknown model {wrong[0]!r}; allowed: base, sft, rft, grpo (and meta_rm to guide)')
  return tuple(model for model in dict.fromkeys(found) if model not in ('', 'base'))


def _at_least(name: str, value: int, least: int) -> None:
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise ValueError(f'{name}: got {value!r}; allowed: a whole number of at least {least}')


def _ascending(name: str, values: Any) -> None:
  values = list(values)
  if not values or values != sorted(set(values)) or values[0] < 1:
    raise ValueError(f'{name}: got {tuple(values)}; allowed: distinct positive numbers, ascending')
