"""Evaluation: one pool of samples per model, every vote cut from it (design decision 9; paper 2.6, 2.8, 6.1).

    pool     K samples per held-out item at `temperature`, an order per sample; the same orders and uniforms for
             every model, so that models are compared on the same draws
    greedy   temperature 0 under two orders, so that it too has an order-flip rate
    votes    k of `ks`: plain, guided hard (the k_meta best by the meta-RM) and soft (a named departure)

Writes results.json, report.md and figures/ to the workdir, one row per item and model to
evaluate/examples.jsonl, and every trajectory to evaluate/<model>.jsonl.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from spct_jax import records, types
from spct_jax.algos import meta_rm as meta_algo
from spct_jax.algos import metrics, outcome, voting
from spct_jax.judges import grm, meta
from spct_jax.stages import checks, drawing, figures, loading, logbook, meta_rm, processes, report, results
from spct_jax.stages import workdir as workdirs
from spct_jax.stages.progress import Progress
from spct_jax.stages.workdir import Workdir

READS = ()
WRITES = (
    'results.json',
    'report.md',
    'figures',
    'evaluate/examples.jsonl',
    'evaluate/DONE.json',
)
THRESHOLDS = {'binary': 0.5, 'scale': 5.5}  # of the mean score of a single response: above it means right


@dataclasses.dataclass(frozen=True)
class Pool:
  """What one model said about the held-out items, as arrays in the examples' own order of responses."""

  scores: np.ndarray  # int32[B, K, N]
  valid: np.ndarray  # bool[B, K]
  order: np.ndarray  # int32[B, K, N], -1 beyond the last slot and where nothing was drawn
  meta: np.ndarray | None  # float32[B, K], the meta-RM's logits


@dataclasses.dataclass(frozen=True)
class Items:
  """The evaluated items as arrays."""

  examples: tuple[types.Example, ...]
  label: np.ndarray  # int32[B]
  response_mask: np.ndarray  # bool[B, N]
  judged: np.ndarray  # bool[B]: False for over-long items

  @property
  def sizes(self) -> np.ndarray:
    return self.response_mask.sum(axis=1)


def run(config: Any, workdir: Workdir, mesh: Any, generate: Any = None) -> None:
  """Judges the held-out items with every model of `config.evaluate.models` and writes the report."""
  checks.stage(config, mesh, 'evaluate')
  fields = config.evaluate
  reads = (
      *loading.data_reads(config),
      *loading.model_reads(config, *fields.models, fields.meta),
  )
  if workdir.is_done('evaluate', config, reads):
    return processes.say('evaluate: done before')
  tok = loading.tokenizer(config)
  data = loading.data(config)
  examples = data.heldout
  lm = loading.model(config, tok)
  settings = loading.judge_settings(config, fields, orders=fields.orders, single=fields.single)
  greedy_settings = dataclasses.replace(
      settings, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, orders='balanced'
  )
  folder = workdir.start('evaluate', config, reads)
  processes.only_writer(lambda: _clear(workdir.path), what='clearing the report')
  bind = loading.generator(config, lm, tok, mesh, generate)
  score = _meta_scorer(config, workdir, mesh, tok) if fields.meta else None

  pools, greedy, judged = {}, {}, np.ones(len(examples), bool)
  for name in fields.models:
    params = loading.params(config, name, lm, workdir, mesh)
    judge = grm.Judge(bind('evaluate', params), tok, settings)
    planned = grm.plan(judge, examples, samples=fields.samples, stage='evaluate')
    judged[list(planned.overlong)] = False
    if name == fields.models[0]:
      drawing.name_overlong(
          examples, planned.overlong, limit=settings.buckets[-1], desc='evaluate', strict=config.strict
      )
    drawn = drawing.draw(judge, planned, folder / f'{name}.jsonl', desc=f'evaluate {name}')
    logits = None
    if score is not None:
      logits = _meta_scores(
          config, score, examples, drawn, settings, tok, folder / f'{name}-meta.jsonl', name
      )
    pools[name] = pool_of(examples, drawn, samples=fields.samples, logits=logits)
    if fields.greedy:
      judge = grm.Judge(bind('greedy', params), tok, greedy_settings)
      planned = grm.plan(judge, examples, samples=2, stage='greedy')
      drawn = drawing.draw(judge, planned, folder / f'{name}-greedy.jsonl', desc=f'evaluate {name}, greedy')
      greedy[name] = pool_of(examples, drawn, samples=2, logits=None)
    del params, judge

  items = items_of(examples, judged)
  processes.only_writer(
      lambda: publish(config, workdir, items, pools, greedy, data), what='writing the report'
  )
  workdir.mark_done('evaluate', config, reads, WRITES)


def _clear(path: pathlib.Path) -> None:
  """A report of other inputs must not stand there while this one is made."""
  for name in ('results.json', 'report.md'):
    (path / name).unlink(missing_ok=True)


def items_of(examples: tuple[types.Example, ...], judged: np.ndarray) -> Items:
  sizes = np.asarray([len(e.responses) for e in examples])
  return Items(
      examples=examples,
      label=np.asarray([e.label for e in examples], np.int32),
      response_mask=np.arange(sizes.max())[None, :] < sizes[:, None],
      judged=judged,
  )


def pool_of(
    examples: tuple[types.Example, ...],
    drawn: tuple[types.Trajectory, ...],
    *,
    samples: int,
    logits: dict[tuple[str, int], float] | None,
) -> Pool:
  """Stacks trajectories; items without any (over-long) are all invalid."""
  grouped = grm.group(examples, drawn)
  judged = grm.judgments([len(e.responses) for e in examples], grouped)
  b, n = judged.response_mask.shape
  scores, valid = np.zeros((b, samples, n), np.int32), np.zeros((b, samples), bool)
  scores[:, : judged.scores.shape[1]] = judged.scores
  valid[:, : judged.valid.shape[1]] = judged.valid
  order = np.full((b, samples, n), -1, np.int32)
  meta_score = np.full((b, samples), np.nan, np.float32)
  for i, group in enumerate(grouped):
    for j, trajectory in enumerate(group):
      order[i, j, : len(trajectory.order)] = trajectory.order
      if logits is not None:
        meta_score[i, j] = logits[trajectory.uid, trajectory.sample]
  return Pool(scores, valid, order, meta_score if logits is not None else None)


def _meta_scorer(config, workdir, mesh, tok):
  decoder = loading.model(config, tok, head_kind='scalar')
  params = loading.params(config, config.evaluate.meta, decoder, workdir, mesh)
  return meta_rm.scorer(decoder, params, mesh)


def _meta_scores(config, score, examples, drawn, settings, tok, path, name):
  """{(uid, sample): logit}, from the file if an earlier run has scored them."""
  if not processes.as_writer_says(path.exists, what='meta scores'):
    by_uid = {example.uid: example for example in examples}
    rows = [
        meta.prompt_ids(
            by_uid[t.uid], t.order, template=settings.template, tokenizer=tok
        ) + t.token_ids
        for t in drawn
    ]
    with Progress(total=len(rows), desc=f'evaluate {name}, meta-RM') as progress:
      logits = meta.score(
          score,
          rows,
          buckets=tuple(config.meta_rm.buckets),
          batch_rows=config.evaluate.meta_batch,
          pad_id=tok.pad_id,
          on_batch=progress.update,
      )
    lost = int(np.isnan(logits).sum())
    if lost:
      processes.say(
          f'evaluate {name}: {lost} of {len(rows)} trajectories are over {config.meta_rm.buckets[-1]} tokens for the '
          'meta-RM, which ranks them last; raise the last of meta_rm.buckets'
      )
    found = [
        {'schema': 'meta_score/1', 'uid': t.uid, 'sample': t.sample, 'logit': logbook.number(logit)}
        for t, logit in zip(drawn, logits)
    ]
    processes.only_writer(lambda: records.write_jsonl(path, found), what=f'writing {path}')
  return {
      (row['uid'], row['sample']): np.nan if row['logit'] is None else row['logit']
      for row in records.read_jsonl(path)
  }


def rows_of(
    stage: str,
    pool: Pool,
    items: Items,
    *,
    benchmark: str,
    temperature: float,
    ks: tuple[int, ...],
    k_meta: int,
    soft_temperature: float | None,
    threshold: float,
) -> list[dict[str, Any]]:
  """The rows of results.json for one model's pool: the whole set, each subset and each n, every k and guidance."""
  out = []
  for subset, n, part in _parts(items):
    for k in ks:
      kinds = [(False, {})]
      if pool.meta is not None:
        hard = min(k_meta, k) if k_meta else meta_algo.half(k)
        kinds.append(('hard', {'meta_score': pool.meta, 'k_meta': hard}))
        if soft_temperature is not None:
          kinds.append(('soft', {'meta_score': pool.meta, 'temperature': soft_temperature}))
      for guided, guide in kinds:
        row = {
            'stage': stage,
            'benchmark': benchmark,
            'subset': subset,
            'n': n,
            'temperature': float(temperature),
            'k': k,
            'guided': guided,
        }
        if guided == 'hard':
          row['k_meta'] = guide['k_meta']
        out.append(row | _measured(pool, items, part, k=k, guide=guide, threshold=threshold))
  return out


def _parts(items: Items):
  """(subset, n, row mask): the whole, then each subset, then each number of responses where they are mixed."""
  everything = np.ones(len(items.examples), bool)
  subsets = np.asarray([e.subset for e in items.examples])
  same = lambda part: int(items.sizes[part][0]) if len(set(items.sizes[part])) == 1 else None
  yield 'all', same(everything), everything
  if same(everything) is None:
    for n in sorted(set(items.sizes.tolist())):
      yield 'all', n, items.sizes == n
  named = [subset for subset in dict.fromkeys(subsets) if subset != 'all']
  if len(set(subsets)) > 1:
    for subset in named:
      yield str(subset), same(subsets == subset), subsets == subset


def _measured(pool: Pool, items: Items, part, *, k, guide, threshold) -> dict[str, Any]:
  arrays = (pool.scores, pool.valid, items.label, items.response_mask, k)
  whole = metrics.accuracy_at_k(*arrays, row_mask=part, threshold=threshold, **guide)
  fitted = part & items.judged
  judged = metrics.accuracy_at_k(*arrays, row_mask=fitted, threshold=threshold, **guide)
  flips = _order_flip(pool, items, fitted)
  single = fitted & (items.sizes == 1)
  return {
      **{name: whole[name] for name in ('accuracy', 'stderr', 'low', 'high', 'items')},
      'accuracy_judged': judged['accuracy'] if judged['items'] else None,
      'parse_failure': judged['parse_failure'] if judged['items'] else None,
      'ties': judged['ties'] if judged['items'] and judged['parse_failure'] < 1 else None,
      'order_flip': flips,
      'overlong': int((part & ~items.judged).sum()),
      'auc': auc_at_k(pool, items, single, k=k, guide=guide, threshold=threshold),
  }


def _order_flip(pool: Pool, items: Items, part: np.ndarray) -> float | None:
  """How often the verdict changes with the order; None where no item has two parsed samples in two orders."""
  comparable = np.zeros_like(part)
  for i in np.flatnonzero(part & (items.sizes > 1)):
    comparable[i] = len({tuple(order) for order in pool.order[i][pool.valid[i]]}) > 1
  if not comparable.any():
    return None
  return float(metrics.order_flip_rate(
      pool.scores[comparable], pool.valid[comparable], items.response_mask[comparable], pool.order[comparable]
  ))


def auc_at_k(pool: Pool, items: Items, part, *, k: int, guide: dict, threshold: float) -> float | None:
  """ROC-AUC of the mean vote of single responses against their 0/1 labels, averaged over the blocks of k.

  An item none of whose voters parsed says nothing: it stands at the threshold. None where a class is absent.
  """
  positive = items.label[part] == 1
  if not part.any() or positive.all() or not positive.any():
    return None
  found = []
  for start in range(0, pool.valid.shape[1] - k + 1, k):
    block = slice(start, start + k)
    valid, scores = pool.valid[part, block], pool.scores[part, block, :1].astype(np.float32)
    weights = valid
    if 'meta_score' in guide:
      meta_score = guide['meta_score'][part, block]
      if 'temperature' in guide:
        weights = meta_algo.soft_weights(meta_score, valid, guide['temperature'])
      else:
        weights = meta_algo.top_k(meta_score, valid, guide['k_meta'])
    weights = np.asarray(weights, np.float32)
    total = weights.sum(axis=1)
    mean = np.einsum('BK,BK->B', weights, np.where(valid, scores[..., 0], 0)) / np.maximum(total, 1e-30)
    found.append(float(metrics.roc_auc(np.where(total > 0, mean, threshold), positive)))
  return float(np.mean(found))


def baselines(items: Items, benchmark: str) -> list[dict[str, Any]]:
  """What rules that read nothing would score: longest, shortest, first, random."""
  lengths = np.zeros(items.response_mask.shape, np.float32)
  for i, example in enumerate(items.examples):
    lengths[i, : len(example.responses)] = [len(response) for response in example.responses]
  credit = metrics.trivial_baselines(lengths, items.label, items.response_mask)
  out = []
  for subset, n, part in _parts(items):
    if subset == 'all' and not part.all():
      continue
    for name, values in credit.items():
      counted = part & np.asarray(metrics.labelled(items.label, items.response_mask))
      out.append({
          'benchmark': benchmark, 'subset': subset, 'name': name,
          **metrics.summary(np.asarray(values), counted),
      })
  return out


def example_rows(
    stage: str, pool: Pool, items: Items, *, k: int, threshold: float
) -> list[dict[str, Any]]:
  """One row per item: the vote of its first k samples, its credit, and how its samples fared."""
  block = slice(0, k)
  valid = pool.valid[:, block]
  totals = np.asarray(voting.vote(pool.scores[:, block], valid, items.response_mask))
  voters = valid.sum(axis=1)
  credit = np.asarray(voting.credit(
      totals, items.label, items.response_mask, voters > 0, voters.astype(np.float32), threshold
  ))
  out = []
  for i, example in enumerate(items.examples):
    n = len(example.responses)
    best = [] if voters[i] == 0 else np.flatnonzero(totals[i, :n] == totals[i, :n].max()).tolist()
    out.append({
        'schema': 'evaluation/1',
        'stage': stage,
        'uid': example.uid,
        'subset': example.subset,
        'n': n,
        'label': int(items.label[i]),
        'k': k,
        'totals': totals[i, :n].tolist(),
        'best': best,
        'credit': float(credit[i]),
        'voters': int(voters[i]),
        'overlong': not bool(items.judged[i]),
        'scores': [
            pool.scores[i, j, :n].tolist() if pool.valid[i, j] else None for j in range(pool.valid.shape[1])
        ],
        'meta': None if pool.meta is None else [logbook.number(x) for x in pool.meta[i]],
    })
  return out


def publish(
    config: Any, workdir: Workdir, items: Items, pools: dict, greedy: dict, data: loading.Data
) -> None:
  """Writes results.json, report.md, the figures and the per-example rows; process 0 only."""
  fields = config.evaluate
  threshold = THRESHOLDS[fields.single]
  rows, per_example = [], []
  for stage, pool in pools.items():
    if stage in greedy:
      rows += rows_of(
          stage, greedy[stage], items, benchmark=fields.benchmark, temperature=0.0, ks=(1,),
          k_meta=0, soft_temperature=None, threshold=threshold,
      )
    rows += rows_of(
        stage, pool, items, benchmark=fields.benchmark, temperature=fields.temperature,
        ks=tuple(fields.ks), k_meta=fields.k_meta,
        soft_temperature=fields.soft_temperature if fields.soft else None, threshold=threshold,
    )
    per_example += example_rows(stage, pool, items, k=max(fields.ks), threshold=threshold)
  records.write_jsonl(workdir.path / 'evaluate' / 'examples.jsonl', per_example)
  results.write(workdir.path / 'results.json', rows)
  simple = baselines(items, fields.benchmark)
  pictures = _pictures(workdir.path, rows, simple, items, pools)
  skipped = dict(data.skipped)
  if not items.judged.all():
    skipped['over the prompt limit'] = [
        e.uid for e, fits in zip(items.examples, items.judged) if not fits
    ]
  report.write_report(
      workdir.path / 'report.md',
      rows,
      report.Extras(
          title=f'Judges on {fields.benchmark}',
          commit=workdirs.commit(),
          config=workdirs.semantic(config),
          baselines=simple,
          skipped=skipped,
          figures=pictures,
          notes=_notes(items, pools, data, threshold),
      ),
  )
  processes.say(f'evaluate: report in {workdir.path / "report.md"}')


def _pictures(path: pathlib.Path, rows, simple, items: Items, pools) -> dict[str, pathlib.Path]:
  """Draws what has something to show; {caption: file}."""
  folder = path / 'figures'
  folder.mkdir(exist_ok=True)
  histograms = {
      stage: dict(enumerate(
          np.asarray(metrics.score_histogram(pool.scores, pool.valid, items.response_mask)).tolist()
      ))
      for stage, pool in pools.items()
  }
  training = logbook.read_rows(path / 'metrics.jsonl')
  drawn = {
      'Accuracy by the number of samples, with 95 % bands': (
          'accuracy_vs_k.png', lambda file: figures.accuracy_vs_k(file, rows, baselines=simple)
      ),
      'Scores that each stage gave': (
          'score_histogram.png', lambda file: figures.score_histogram(file, histograms)
      ),
      'Training': ('training_curves.png', lambda file: figures.training_curves(file, training)),
  }
  return {caption: folder / name for caption, (name, draw) in drawn.items() if draw(folder / name)}


def _notes(items: Items, pools, data, threshold: float) -> list[str]:
  """Sentences on what an accuracy hides: position bias, repeated questions, and how good the meta-RM is."""
  notes = []
  for stage, pool in pools.items():
    correct = sample_correct(pool, items, threshold)
    drawn = pool.order[:, :, 0] >= 0
    share, number = metrics.accuracy_by_slot(correct, pool.order, items.label, items.response_mask, drawn)
    told = ', '.join(
        f'slot {slot + 1} {results.percent(float(s))} of {int(c)}'
        for slot, (s, c) in enumerate(zip(np.asarray(share), np.asarray(number))) if c
    )
    if told:
      notes.append(f'{stage}: strict accuracy of one sample by the slot of the best response: {told}')
    if pool.meta is not None:
      seen = drawn & np.isfinite(pool.meta)
      target = correct[seen]
      if target.any() and not target.all():
        auc = float(metrics.roc_auc(pool.meta[seen], target))
        notes.append(f'{stage}: ROC-AUC of the meta-RM on these samples: {auc:.3f}')
  if data.contaminated:
    notes.append(
        f'{results.count(len(data.contaminated), "evaluated item")} share a conversation with the training items: '
        + ', '.join(data.contaminated[:5])
    )
  return notes


def sample_correct(pool: Pool, items: Items, threshold: float) -> np.ndarray:
  """bool[B, K]: whether one sample alone is right - Eq 10, and for a single response by the threshold.

  On the 1..10 scale a single response's score is never its 0/1 label, so Eq 10's equality does not apply there.
  """
  right = np.asarray(
      outcome.correct(pool.scores, pool.valid, items.label, items.response_mask)
  )
  says_right = pool.scores[:, :, 0] > threshold
  single = pool.valid & (says_right == (items.label == 1)[:, None])
  return np.where((items.sizes == 1)[:, None], single, right)
