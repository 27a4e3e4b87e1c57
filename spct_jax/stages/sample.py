"""Rejective sampling, first half: N_RFT plain and one hinted sample per item (paper 2.3).

Every trajectory is recorded, right or wrong: the wrong ones are the meta-RM's negatives. What is
kept is decided by the rft stage.
"""

import json
from typing import Any

from spct_jax.judges import grm
from spct_jax.stages import checks, datasets, drawing, loading, named, processes, samplers
from spct_jax.stages.workdir import Workdir

READS = ()
WRITES = (
    'sample/trajectories.jsonl',
    'sample/hinted.jsonl',
    'sample/items.json',
    'sample/DONE.json',
)


def reads(config: Any) -> tuple[str, ...]:
  """What the drawn trajectories depend on."""
  return (*datasets.reads(config), *named.reads(config, config.sample.model))


def require(config: Any, workdir: Workdir, stage: str) -> None:
  """Trajectories are joined to items by uid, so they must have been drawn from the present data."""
  if not workdir.is_done('sample', config, reads(config)):
    raise ValueError(
        f'{stage}: the trajectories in {workdir.stage_dir("sample")} are missing, unfinished, or were drawn from other '
        'data or another model; run --config.stage=sample on this workdir first'
    )


def run(config: Any, workdir: Workdir, mesh: Any, generate: Any = None) -> None:
  """Draws `config.sample.samples` trajectories per training item from `config.sample.model`."""
  checks.stage(config, mesh, 'sample')
  fields = config.sample
  if workdir.is_done('sample', config, reads(config)):
    return processes.say('sample: done before')
  tok = loading.tokenizer(config)
  data = datasets.load(config)
  decoder = loading.model(config, tok, name=fields.model)
  settings = loading.judge_settings(config, fields, orders=fields.orders, single='binary')
  folder = workdir.start('sample', config, reads(config))
  params = loading.params(config, fields.model, decoder, workdir, mesh)
  bind = samplers.generator(config, decoder, tok, mesh, generate)
  judge = grm.Judge(bind('sample', params), tok, settings)
  planned = grm.plan(judge, data.train, samples=fields.samples, stage='sample')
  limit = settings.buckets[-1]
  overlong = drawing.name_overlong(
      data.train, planned.overlong, limit=limit, desc='sample', strict=config.strict
  )
  drawn = drawing.draw(judge, planned, folder / 'trajectories.jsonl', desc='sample')

  hinted_path = folder / 'hinted.jsonl'
  if fields.hinted_samples:
    examples = data.train
    if fields.hinted_items == 'unsolved':
      examples = unsolved(data.train, drawn)
    hinted_judge = grm.Judge(bind('hinted', params), tok, settings)
    hinted = grm.plan(
        hinted_judge, examples, samples=fields.hinted_samples, stage='hinted', hinted=True
    )
    hint_overlong = [examples[i].uid for i in hinted.overlong if examples[i].uid not in overlong]
    if hint_overlong:
      processes.say(
          f'sample: with the hint {len(hint_overlong)} more items are over {limit} prompt tokens: '
          + ', '.join(hint_overlong[:5])
      )
    drawing.draw(hinted_judge, hinted, hinted_path, desc='sample, hinted')
  else:
    hint_overlong = []
    drawing.save(hinted_path, ())

  items = {
      'train': [example.uid for example in data.train],
      'overlong': overlong,
      'overlong_with_hint': hint_overlong,
      'skipped': data.skipped,
  }
  processes.write_once(folder / 'items.json', json.dumps(items, indent=2) + '\n')
  workdir.mark_done('sample', config, reads(config), WRITES)


def unsolved(examples, drawn):
  """Items none of whose plain samples is right (paper 2.3 leaves open which items are hinted)."""
  grouped = grm.group(examples, drawn)
  _, correct = drawing.judged(examples, grouped)
  return tuple(e for e, right in zip(examples, correct.any(axis=1)) if not right)
