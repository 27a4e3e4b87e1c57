"""Rejective fine-tuning: reject wrong and too easy trajectories, fine-tune on the rest (paper 2.2, 2.3).

    keep    Eq 10 holds, and not (plain sample of an item whose plain samples are all right)
    rows    kept trajectories, mixed with general instruction data in `general_fraction` of the rows
    loss    on the sampled tokens only, under the prompt without the hint (a departure is a field)
"""

import collections
import functools
import json
from typing import Any

import numpy as np

from spct_jax import types
from spct_jax.algos import rft
from spct_jax.data import instructions, stream
from spct_jax.judges import grm
from spct_jax.stages import checks, datasets, drawing, fit, loading, named, processes, sample, sft
from spct_jax.stages.workdir import Workdir
from spct_jax.train import batches, objectives

READS = ('sample/trajectories.jsonl', 'sample/hinted.jsonl')
WRITES = ('rft/kept.jsonl', 'rft/filter.json', 'rft/checkpoint', 'rft/DONE.json')


def select(
    examples: tuple[types.Example, ...],
    plain: tuple[types.Trajectory, ...],
    hinted: tuple[types.Trajectory, ...],
    *,
    drop_too_easy: bool,
) -> tuple[list[types.Trajectory], dict[str, int]]:
  """The kept trajectories in item order, plain before hinted, and how many fell to which rule."""
  grouped = [
      p + h
      for p, h in zip(grm.group(examples, plain), grm.group(examples, hinted, hinted=True))
  ]
  judged, correct = drawing.judged(examples, grouped)
  b, k = judged.valid.shape
  if k == 0:
    return [], {'drawn': 0, 'kept': 0}
  is_hinted = np.zeros((b, k), bool)
  drawn = np.zeros((b, k), bool)
  for i, group in enumerate(grouped):
    drawn[i, : len(group)] = True
    is_hinted[i, : len(group)] = [t.hinted for t in group]
  # A sample that was never drawn (over-long items) is hinted-and-wrong here: it changes no rule.
  keep = np.asarray(rft.keep(correct, is_hinted | ~drawn)) if drop_too_easy else correct
  kept = [t for i, group in enumerate(grouped) for j, t in enumerate(group) if keep[i, j]]
  counts = collections.Counter(
      drawn=int(drawn.sum()),
      unparsed=int((drawn & ~judged.valid).sum()),
      wrong=int((drawn & judged.valid & ~correct).sum()),
      too_easy=int((correct & ~keep).sum()),
      kept=int(keep.sum()),
      kept_hinted=int((keep & is_hinted).sum()),
      items_rescued_by_hint=int(
          ((keep & is_hinted).any(axis=1) & ~(correct & ~is_hinted).any(axis=1)).sum()
      ),
  )
  return kept, dict(counts)


def run(config: Any, workdir: Workdir, mesh: Any, generate: Any = None) -> None:
  """Filters what the sample stage drew and fine-tunes `config.rft.init` on it."""
  del generate
  checks.stage(config, mesh, 'rft')
  fields = config.rft
  reads = (
      *READS,
      *((config.data.instructions,) if fields.general_fraction > 0 else ()),
      *datasets.reads(config),
      *named.reads(config, fields.init),
  )
  if workdir.is_done('rft', config, reads):
    return processes.say('rft: done before')
  sample.require(config, workdir, 'rft')
  tok = loading.tokenizer(config)
  data = datasets.load(config)
  decoder = loading.model(config, tok, name=fields.init)
  trained = loading.learner(config, 'rft', decoder)
  settings = loading.judge_settings(
      config, config.sample, orders=config.sample.orders, single='binary'
  )
  buckets = tuple(fields.buckets)
  folder = workdir.start('rft', config, reads)
  plain, hinted = (drawing.load(workdir.path / name) for name in READS)
  kept, counts = select(data.train, plain, hinted, drop_too_easy=fields.drop_too_easy)
  judged, too_long = _rows(kept, data.train, settings, tok, fields.keep_hint, buckets)
  general = ()
  if fields.general_fraction > 0:
    loaded = instructions.load(config.data.instructions, strict=config.strict)
    general = sft.rows(loaded, tok, buckets, what='rft', strict=config.strict)
  counts |= {'rows': len(judged), 'too_long': len(too_long), 'general_rows': len(general)}
  processes.say('rft: ' + ', '.join(f'{name} {count}' for name, count in counts.items()))
  fraction, steps = fields.general_fraction, fields.steps
  if not judged:
    left = 'only general instruction data is left' if general else 'nothing is left'
    processes.say(
        f'rft: no trajectory was kept, so {left} to learn from; judge quality cannot rise from here '
        '(is the base model able to write the format?)'
    )
    fraction, steps = 1.0, fields.steps if general else 0
  processes.write_once(
      folder / 'filter.json', json.dumps({**counts, 'too_long_rows': too_long}, indent=2) + '\n'
  )
  drawing.save(folder / 'kept.jsonl', kept)

  def batch_of(step):
    source, index, _ = stream.mix(
        seed=stream.stage_seed(config.seed, 'rft'),
        step=step,
        batch_size=fields.batch,
        sizes=(len(judged), len(general)),
        fraction=fraction,
    )
    chosen = [(judged, general)[s][i] for s, i in zip(source, index)]
    return batches.pad(
        chosen,
        num_rows=fields.batch,
        buckets=buckets,
        pad_id=tok.pad_id,
        columns={'general': np.asarray(source) == 1},
    )

  fit.fit(
      config,
      workdir,
      mesh,
      stage='rft',
      trained=trained,
      params=functools.partial(loading.params, config, fields.init, decoder, workdir, mesh),
      loss_fn=objectives.sft_objective(trained, chunk=config.model.logits_chunk),
      batch_of=batch_of,
      steps=steps,
      extra=lambda batch: {'general_fraction': float(batch['general'][batch['row_mask']].mean())},
  )
  workdir.mark_done('rft', config, reads, WRITES)


def _rows(kept, examples, settings, tok, keep_hint, buckets):
  """Learner rows of kept trajectories; a hinted one is learnt under the prompt without its hint."""
  by_uid = {example.uid: example for example in examples}
  rows = []
  for trajectory in kept:
    prompt_ids = None
    if trajectory.hinted and not keep_hint:
      prompt = grm.prompt_of(
          by_uid[trajectory.uid], trajectory.order, settings=settings, hinted=False
      )
      prompt_ids = grm.prompt_ids(prompt, tok)
    rows.append(batches.from_trajectory(trajectory, prompt_ids))
  fitting = batches.fitting(rows, buckets)
  return tuple(rows[i] for i in fitting.keep), list(fitting.too_long)
