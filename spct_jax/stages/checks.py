"""What can be known to be wrong before work starts: every stage calls `stage` first.

A pipeline calls it for all its stages before the first one works.
"""

from typing import Any

from spct_jax.data import instructions, stream
from spct_jax.judges import endings, grm
from spct_jax.stages import datasets, loading, named, trackers
from spct_jax.text import spellings
from spct_jax.train import update

ORDERS = ('shuffle', 'balanced', 'fixed')


def training(config: Any, mesh: Any, stage: str) -> None:
  """Numbers of a training stage, and whether its batch divides over microbatches and devices."""
  fields = config[stage]
  for name, least in (('steps', 0), ('batch', 1), ('microbatches', 1), ('checkpoint_every', 1)):
    _at_least(f'{stage}.{name}', fields[name], least)
  if not fields.lr > 0:
    raise ValueError(f'{stage}.lr: got {fields.lr}; allowed: a positive learning rate')
  _at_least('logging.keep', config.logging.keep, 1)
  _ascending(f'{stage}.buckets', fields.buckets)
  loading.lora_settings(config, stage)
  try:
    loading.optim_settings(fields)
  except ValueError as error:
    raise ValueError(f'{stage}: {error}') from None
  rows = fields.batch * (fields.group if stage == 'grpo' else 1)
  try:
    update.check_rows(rows, fields.microbatches, mesh)
  except ValueError as error:
    raise ValueError(f'{stage}.batch: {error}') from None
  if stage == 'rft' and not 0 <= fields.general_fraction <= 1:
    raise ValueError(f'rft.general_fraction: got {fields.general_fraction}; allowed: 0 to 1')
  if stage == 'sft' and fields.order not in stream.ORDERS:
    raise ValueError(f'sft.order: got {fields.order!r}; allowed: {", ".join(map(repr, stream.ORDERS))}')
  if stage == 'sft' or (stage == 'rft' and fields.general_fraction > 0):
    source = datasets.sft_data(config) if stage == 'sft' else config.data.instructions
    if not source:
      raise ValueError(
          f'data.instructions is empty, and {stage} learns from it; give a file of general instruction data'
          + (', or set rft.general_fraction=0' if stage == 'rft' else ', or set sft.data')
      )
    instructions.load(source, strict=config.strict)  # says what is wrong with the file


def sampling(config: Any, stage: str) -> None:
  """Numbers of a stage that draws judgements."""
  fields = config[stage]
  judge = config.judge
  samples = f'{stage}.group' if stage == 'grpo' else f'{stage}.samples'
  k = fields.group if stage == 'grpo' else fields.samples
  for name, value in (
      ('judge.max_new_tokens', judge.max_new_tokens),
      ('judge.chunk_prompts', judge.chunk_prompts),
      ('judge.chunk_tasks', judge.chunk_tasks),
      ('judge.rows', judge.rows),
      (samples, k),
  ):
    _at_least(name, value, 1)
  if k > judge.rows:
    raise ValueError(
        f'judge.rows: got {judge.rows}, but {samples} asks for {k} samples of a prompt, which are to share one reading '
        f'of it; raise judge.rows to {k} or more, or ask for fewer samples'
    )
  _ascending('judge.buckets', judge.buckets)
  of_use = () if stage == 'evaluate' else ('stop_strings', 'stop_at_scores', 'constrain_scores')
  refused = [name for name in of_use if name in fields]
  if refused:
    raise ValueError(
        f'{stage}.{refused[0]}: judgements to learn from are drawn as the model writes them, to its own end; remove '
        f'the field, or set evaluate.{refused[0]}, which is an option of use'
    )
  if 'orders' in fields and fields.orders not in ORDERS:
    raise ValueError(f'{stage}.orders: got {fields.orders!r}; allowed: {", ".join(ORDERS)}')
  if stage == 'sample':
    _at_least('sample.hinted_samples', fields.hinted_samples, 0)
    if fields.hinted_items not in ('all', 'unsolved'):
      raise ValueError(f"sample.hinted_items: got {fields.hinted_items!r}; allowed: 'all', 'unsolved'")
  for name in ('sampler_weights', 'sampler_cache'):
    if config.model[name] not in ('', 'int8'):
      raise ValueError(f"model.{name}: got {config.model[name]!r}; allowed: 'int8', or '' for model.sampler_dtype")
  try:
    loading.judge_settings(config, fields, orders='shuffle', single='binary')
  except ValueError as error:
    raise ValueError(f'{stage}: {error}') from None


def grpo(config: Any, mesh: Any) -> None:
  """A group of one has no advantage, so GRPO would learn nothing from it."""
  fields = config.grpo
  if fields.group < 2:
    raise ValueError(
        f'grpo.group: got {fields.group}; allowed: 2 or more, because an advantage compares the samples of one '
        'prompt (the paper uses 4)'
    )
  training(config, mesh, 'grpo')
  sampling(config, 'grpo')
  _at_least('grpo.updates', fields.updates, 1)
  _at_least('grpo.validate_every', fields.validate_every, 0)
  _at_least('grpo.validate_samples', fields.validate_samples, 1)
  _at_least('data.validation_limit', config.data.validation_limit, 0)
  if fields.validate_every and not config.data.validation_limit:
    raise ValueError(
        f'grpo.validate_every: got {fields.validate_every} with data.validation_limit=0, so there is nothing to '
        'validate on; set data.validation_limit to a number of items, or grpo.validate_every=0'
    )
  trackers.compiled(config.trackers)
  longest = config.judge.buckets[-1] + config.judge.max_new_tokens
  if fields.buckets[-1] < longest:
    raise ValueError(
        f'grpo.buckets: the last is {fields.buckets[-1]}, but a prompt and its judgement may have {longest} tokens '
        '(judge.buckets and judge.max_new_tokens); a group must not lose its long samples, so raise it'
    )
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
  _at_least('grpo.replay_kept', fields.replay_kept, 0)
  if fields.replay_kept and not truncates(fields):
    raise ValueError(
        f'grpo.replay_kept: got {fields.replay_kept}, but nothing truncates the sampling (grpo.top_p=1, top_k=0, '
        'min_p=0), so every token is kept and the full vocabulary is right; set grpo.replay_kept=0, or truncate'
    )


def truncates(fields: Any) -> bool:
  """Whether a stage draws from less than the full vocabulary."""
  return fields.top_p < 1 or fields.top_k > 0 or fields.min_p > 0


def evaluation(config: Any, mesh: Any) -> None:
  """Votes must fit into the pool, and the voters into the vote."""
  sampling(config, 'evaluate')
  score_endings(config)
  trackers.compiled(config.trackers)
  fields = config.evaluate
  ks = tuple(fields.ks)
  _ascending('evaluate.ks', ks)
  if fields.greedy and fields.temperature == 0:
    raise ValueError(
        'evaluate.temperature: got 0 with evaluate.greedy, which judges at temperature 0 already; allowed: above 0, '
        'or evaluate.greedy=False'
    )
  if ks[-1] > fields.samples:
    raise ValueError(
        f'evaluate.ks: got {ks[-1]} votes from a pool of evaluate.samples={fields.samples}; raise the pool or '
        'lower k'
    )
  _early(config)
  _at_least('evaluate.k_meta', fields.k_meta, 0)
  if fields.meta and fields.k_meta > ks[-1]:
    raise ValueError(
        f'evaluate.k_meta: got {fields.k_meta} voters out of at most k={ks[-1]} samples; allowed: k_meta <= k, '
        'or 0 for half of k'
    )
  if fields.single not in ('binary', 'scale'):
    raise ValueError(f"evaluate.single: got {fields.single!r}; allowed: 'binary', 'scale'")
  _at_least('evaluate.show', fields.show, 0)
  if fields.meta or fields.instructions or fields.expected:
    _at_least('evaluate.meta_batch', fields.meta_batch, 1)
    try:
      update.check_rows(fields.meta_batch, 1, mesh)
    except ValueError as error:
      raise ValueError(f'evaluate.meta_batch: {error}') from None
  if fields.instructions:
    _ascending('sft.buckets', config.sft.buckets)  # the lengths of its rows
    instructions.load(fields.instructions, strict=config.strict)  # says what is wrong with the file
  if fields.expected:
    spellings.of(loading.tokenizer(config))  # an error where it cannot be told what its tokens add to a text
  if fields.meta:
    if fields.soft and not fields.soft_temperature > 0:
      raise ValueError(f'evaluate.soft_temperature: got {fields.soft_temperature}; allowed: above 0')
  if len(set(fields.models)) != len(fields.models):
    raise ValueError(f'evaluate.models: got {tuple(fields.models)}; allowed: each at most once')
  if not fields.models:
    raise ValueError('evaluate.models: got none; name at least one of base, sft, rft, grpo, or a folder')
  names = tuple(fields.names)
  if names and (
      len(names) != len(fields.models)
      or len(set(names)) != len(names)
      or not all(isinstance(name, str) and name.strip() for name in names)
  ):
    raise ValueError(
        f'evaluate.names: got {names} for the models {tuple(fields.models)}; allowed: () for their own names, or one '
        'distinct name for each, in the same order'
    )
  labels = tuple(map(named.label, fields.models))
  if not names and len(set(labels)) != len(labels):
    raise ValueError(
        f'evaluate.models: tables would call two of {tuple(fields.models)} the same, {labels}; give evaluate.names, '
        'one distinct name for each'
    )


def _early(config: Any) -> None:
  """Votes that stop have the winner of the full vote, and nothing else of it: no smaller k, no guidance."""
  fields, judge = config.evaluate, config.judge
  try:
    rule = grm.early(fields.early, alpha=fields.early_alpha, threshold=0.0)
  except ValueError as error:
    raise ValueError(f'evaluate.{error}') from None
  if rule is None:
    return
  if tuple(fields.ks) != (fields.samples,):
    raise ValueError(
        f'evaluate.early: got {fields.early!r} with evaluate.ks={tuple(fields.ks)}; votes stop once the vote of all '
        f'evaluate.samples is decided, so only that one is known: set evaluate.ks=({fields.samples},), or '
        "evaluate.early='none'"
    )
  if fields.meta:
    raise ValueError(
        f'evaluate.early: got {fields.early!r} with evaluate.meta={fields.meta!r}; the meta-RM picks the voters among '
        "all samples, so no vote is decided before the last: set evaluate.meta='', or evaluate.early='none'"
    )
  if fields.expected:
    raise ValueError(
        f'evaluate.early: got {fields.early!r} with evaluate.expected; votes stop when the drawn scores have decided, '
        'which expected ones have not: leave one of them out'
    )
  try:
    grm.check_early(rule, orders=fields.orders, samples=fields.samples, chunk_tasks=judge.chunk_tasks)
  except ValueError as error:
    raise ValueError(f'evaluate.{error}') from None


def score_endings(config: Any, responses: int = 1) -> None:
  """Stop strings and score lines that the tokenizer cannot spell, or not within the limit: of so many responses."""
  wanted = loading.judge_endings(config)
  if wanted != endings.NONE:
    try:
      endings.check(wanted, loading.tokenizer(config), config.judge.max_new_tokens, responses)
    except ValueError as error:
      raise ValueError(f'evaluate: {error}') from None


def stage(config: Any, mesh: Any, name: str) -> None:
  """The checks of one stage by its name."""
  wants(config, name)
  if name == 'grpo':
    grpo(config, mesh)
  elif name == 'evaluate':
    evaluation(config, mesh)
  elif name == 'sample':
    sampling(config, name)
  else:
    training(config, mesh, name)
    if name == 'meta_rm':
      sampling(config, name)
      if not 0 <= config.meta_rm.heldout < 1:
        raise ValueError(f'meta_rm.heldout: got {config.meta_rm.heldout}; allowed: 0 up to, not including, 1')


# Where a stage takes a model: fields that name one, and which heads it may have. An empty name is no model.
TAKES = {
    'sft': {'init': ('lm',)},
    'sample': {'model': ('lm',)},
    'rft': {'init': ('lm',)},
    'grpo': {'init': ('lm',), 'reference': ('lm',)},
    'meta_rm': {'init': ('lm', 'scalar'), 'policy': ('lm',)},
    'evaluate': {'models': ('lm',), 'meta': ('scalar',)},
}
_MAY_BE_EMPTY = ('grpo.reference', 'evaluate.meta')


def wants(config: Any, name: str) -> tuple[str, ...]:
  """The files of other stages that a stage needs besides its READS: records of trained models, and what fields add.

  Raises:
    ValueError: a name that is no model and no folder with one, or a model with the wrong kind of head.
  """
  found = []
  for field, kinds in TAKES[name].items():
    where, value = f'{name}.{field}', config[name][field]
    for model in value if field == 'models' else (value,):
      if model == '' and where in _MAY_BE_EMPTY:
        continue
      named.check(config, model, where, kinds)
      found += [f'{model}/DONE.json'] if model in named.TRAINED else []
  if name == 'grpo' and config.grpo.drop_too_easy:
    found.append('sample/trajectories.jsonl')
  return tuple(dict.fromkeys(found))


def _at_least(name: str, value: int, least: int) -> None:
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise ValueError(f'{name}: got {value!r}; allowed: a whole number of at least {least}')


def _ascending(name: str, values: Any) -> None:
  values = list(values)
  for value in values:
    _at_least(name, value, 1)
  if not values or values != sorted(set(values)) or values[0] < 1:
    raise ValueError(f'{name}: got {tuple(values)}; allowed: distinct positive numbers, ascending')
