"""The meta reward model: learns which trajectories are right (paper 2.7).

    data    the sample stage's plain trajectories, and `samples` per item from the policy to be guided,
            right and wrong, each in the order that its sample saw
    target  Eq 10 on the trajectory's own scores; a trajectory that does not parse is a negative
    loss    binary cross-entropy on the scalar at the last token

A share of the items is held out - all their trajectories with them - and measures ROC-AUC.
"""

import dataclasses
import functools
import json
from typing import Any

import numpy as np

from spct_jax import types
from spct_jax.algos import metrics
from spct_jax.data import heldout, stream
from spct_jax.judges import grm, meta
from spct_jax.models.transformer import Transformer
from spct_jax.sampling.scoring import Scorer
from spct_jax.stages import checks, datasets, drawing, fit, loading, named, processes, sample, samplers
from spct_jax.stages.workdir import Workdir
from spct_jax.train import batches, lora, objectives

READS = ('sample/trajectories.jsonl',)
WRITES = ('meta_rm/trajectories.jsonl', 'meta_rm/data.json', 'meta_rm/checkpoint', 'meta_rm/DONE.json')


def targets(
    examples: tuple[types.Example, ...], grouped: list[list[types.Trajectory]]
) -> list[np.ndarray]:
  """bool[len(group)] per item: whether each trajectory is right by Eq 10."""
  _, correct = drawing.judged(examples, grouped)
  return [correct[i, : len(group)] for i, group in enumerate(grouped)]


def scorer(decoder: Transformer | lora.Adapted, params: Any, mesh: Any, rows: int) -> meta.Score:
  """The meta-RM as a function of token ids, which takes `rows` trajectories at once; a prompt is read once for all."""
  if isinstance(decoder, lora.Adapted):
    decoder, params = decoder.model, decoder.join(params)
  model = Transformer(dataclasses.replace(decoder.config, remat=False))
  return functools.partial(Scorer(model, mesh, rows).rewards, params)


def run(config: Any, workdir: Workdir, mesh: Any, generate: Any = None) -> None:
  """Samples the policy, then trains the scalar head and its backbone on all trajectories."""
  checks.stage(config, mesh, 'meta_rm')
  fields = config.meta_rm
  reads = (
      *READS,
      *datasets.reads(config),
      *named.reads(config, fields.init, fields.policy),
  )
  if workdir.is_done('meta_rm', config, reads):
    return processes.say('meta_rm: done before')
  sample.require(config, workdir, 'meta_rm')
  tok = loading.tokenizer(config)
  data = datasets.load(config)
  settings = loading.judge_settings(
      config, fields, orders=config.sample.orders, single='binary'
  )
  folder = workdir.start('meta_rm', config, reads)

  lm = loading.model(config, tok, name=fields.policy)
  policy = loading.params(config, fields.policy, lm, workdir, mesh)
  judge = grm.Judge(samplers.generator(config, lm, tok, mesh, generate)('meta_rm', policy), tok, settings)
  planned = grm.plan(judge, data.train, samples=fields.samples, stage='meta_rm')
  drawing.name_overlong(
      data.train, planned.overlong, limit=settings.buckets[-1], desc='meta_rm', strict=config.strict
  )
  own = drawing.draw(judge, planned, folder / 'trajectories.jsonl', desc='meta_rm, sampling')
  del policy, judge

  earlier = drawing.load(workdir.path / READS[0])
  train, held = _rows(config, data.train, (earlier, own), settings, tok)
  right = sum(target for _, target in train)
  summary = {
      'trajectories': len(train),
      'right': int(right),
      'wrong': int(len(train) - right),
      'heldout_trajectories': len(held),
  }
  processes.say('meta_rm: ' + ', '.join(f'{name} {count}' for name, count in summary.items()))
  if not train:
    raise ValueError(
        'meta_rm: no trajectory fits meta_rm.buckets, so there is nothing to learn from; raise the last bucket'
    )
  if right in (0, len(train)):
    processes.say(
        f'meta_rm: all {len(train)} trajectories are {"right" if right else "wrong"}, so it cannot tell them apart; '
        'its guidance is no better than chance'
    )

  decoder = loading.model(config, tok, name=fields.init, head_kind='scalar')
  trained = loading.learner(config, 'meta_rm', decoder)

  groups = None
  if fields.group_by_length:
    groups = np.searchsorted(sorted(fields.buckets), [row.length for row, _ in train])

  def batch_of(step):
    index, _ = stream.indices(
        seed=stream.stage_seed(config.seed, 'meta_rm'), step=step, batch_size=fields.batch, size=len(train),
        groups=groups,
    )
    return batches.pad(
        [train[i][0] for i in index],
        num_rows=fields.batch,
        buckets=tuple(fields.buckets),
        pad_id=tok.pad_id,
        columns={'target': np.asarray([train[i][1] for i in index], bool)},
    )

  params = fit.fit(
      config,
      workdir,
      mesh,
      stage='meta_rm',
      trained=trained,
      params=functools.partial(loading.params, config, fields.init, decoder, workdir, mesh),
      loss_fn=objectives.meta_rm_objective(trained),
      batch_of=batch_of,
      steps=fields.steps,
  )
  score = scorer(trained, params, mesh, fields.batch // fields.microbatches)
  # Of the training rows as many as are held out, and at least 1,000: enough to see a fit that does not carry over.
  spread = np.unique(np.linspace(0, len(train) - 1, min(len(train), max(len(held), 1000))).round().astype(int))
  for name, rows in (('train', [train[i] for i in spread]), ('heldout', held)):
    logits = meta.score(
        score,
        [(row.prompt_ids, row.completion_ids) for row, _ in rows],
        limit=fields.buckets[-1],
    )
    positive = np.asarray([target for _, target in rows], bool)
    both = 0 < positive.sum() < len(rows)
    summary[f'auc_{name}'] = float(metrics.roc_auc(logits, positive)) if both else None
  processes.say(f'meta_rm: ROC-AUC train {summary["auc_train"]}, held out {summary["auc_heldout"]}')
  processes.write_once(folder / 'data.json', json.dumps(summary, indent=2) + '\n')
  workdir.mark_done('meta_rm', config, reads, WRITES)


def _rows(config, examples, sources, settings, tok):
  """([(row, target)] to train on, the same of held-out items); over-long trajectories are named."""
  sides = (tuple(examples), ())
  if config.meta_rm.heldout > 0:
    parts = heldout.split(
        examples,
        fraction=config.meta_rm.heldout,
        seed=config.seed + 1,  # not the split that made these items training items
        by='prompt',
        may_be_empty=True,
    )
    sides = (parts.train, parts.held_out)
  out = []
  prompt_ids = meta.reader(template=settings.template, tokenizer=tok)
  for part in sides:
    found, wanted = [], []
    for drawn in sources if part else ():
      grouped = grm.group(part, drawn)
      for example, group, right in zip(part, grouped, targets(part, grouped)):
        for trajectory, target in zip(group, right):
          prompt = prompt_ids(example, trajectory.order)
          found.append(batches.Row(f'{example.uid} sample {trajectory.sample}', prompt, trajectory.token_ids))
          wanted.append(bool(target))
    fitting = batches.fitting(found, tuple(config.meta_rm.buckets))
    if fitting.too_long:
      processes.say(
          f'meta_rm: {len(fitting.too_long)} trajectories are too long and left out: '
          + '; '.join(fitting.too_long[:5])
      )
    out.append([(found[i], wanted[i]) for i in fitting.keep])
  return out
