"""Evaluation: one pool of samples per model, every vote cut from it (design decision 9; paper 2.6, 2.8, 6.1).

    pool     K samples per held-out item at `temperature`, an order per sample; the same orders and uniforms for
             every model, so that models are compared on the same draws
    greedy   temperature 0 under two orders, so that it too has an order-flip rate
    votes    k of `ks`: plain, guided hard (the k_meta best by the meta-RM) and soft (a named departure), and what
             guidance gains over the plain vote of the same samples; `evaluate.expected`: also by expected scores
    early    votes that stop once they are decided (`evaluate.early`): then the one vote is of all samples, plain, and
             what needs the others is left out
    general  held-out instruction data: which answers greedy decoding reproduces, and their likelihood

Writes results.json, report.md and figures/ to the workdir, one row per item and stage to
evaluate/examples.jsonl, general instruction data to evaluate/instructions.json (it has no votes, so it is no row
of results.json), and every trajectory to evaluate/<model>.jsonl. `evaluate.names` are what tables and figures call
the models; files keep the models' own names (`named.slug`).
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

from spct_jax import records, types
from spct_jax.algos import metrics
from spct_jax.judges import expected, grm, meta, prompts
from spct_jax.models.transformer import Transformer
from spct_jax.sampling.scoring import Scorer
from spct_jax.stages import (
    checks, console, datasets, drawing, exhibit, figures, general, loading, logbook, measure, meta_rm, named,
    processes, report, results, samplers, trackers,
)  # fmt: skip
from spct_jax.stages import workdir as workdirs
from spct_jax.stages.progress import Progress
from spct_jax.stages.workdir import Workdir
from spct_jax.text import spellings

READS = ()
WRITES = (
    'results.json',
    'report.md',
    'figures',
    'evaluate/examples.jsonl',
    'evaluate/DONE.json',
)


@dataclasses.dataclass(frozen=True)
class Said:
  """What one model said: votes are cut from `pool`; `first` is each uid's first sample."""

  pool: measure.Pool
  greedy: measure.Pool | None
  first: dict[str, types.Trajectory]
  general: dict[str, Any] | None  # on general instruction data
  tracked: dict[str, Any]  # patterns and principles in the texts of the pool


def run(config: Any, workdir: Workdir, mesh: Any, generate: Any = None) -> None:
  """Judges the held-out items with every model of `config.evaluate.models` and writes the report."""
  checks.stage(config, mesh, 'evaluate')
  fields = config.evaluate
  reads = (
      *datasets.reads(config),
      *named.reads(config, *fields.models, fields.meta),
      *((fields.instructions,) if fields.instructions else ()),
  )
  if workdir.is_done('evaluate', config, reads):
    return processes.say('evaluate: done before')
  tok = loading.tokenizer(config)
  data = datasets.load(config)
  examples = data.heldout
  settings = loading.judge_settings(
      config, fields, orders=fields.orders, single=fields.single, ends=loading.judge_endings(config)
  )
  greedy_settings = dataclasses.replace(
      settings, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, orders='balanced'
  )
  early = grm.early(fields.early, alpha=fields.early_alpha, threshold=measure.THRESHOLDS[fields.single])
  folder = workdir.start('evaluate', config, reads)
  processes.only_writer(lambda: _clear(workdir.path), what='clearing the report')
  score = _meta_scorer(config, workdir, mesh, tok) if fields.meta else None
  rows = general.load(config, tok) if fields.instructions else None

  @functools.lru_cache(maxsize=None)
  def tools(decoder):
    """What is compiled once for all models of one shape."""
    return samplers.generator(config, decoder, tok, mesh, generate), general.scorer(config, decoder, mesh)

  watch = trackers.compiled(config.trackers)
  found, judged = {}, np.ones(len(examples), bool)
  for name, stage in zip(fields.models, loading.stage_names(config)):
    decoder, file, said = loading.model(config, tok, name=name), named.slug(name), named.label(name)
    bind, reproduce = tools(decoder)
    params = loading.params(config, name, decoder, workdir, mesh)
    told = None
    if rows is not None:
      told = general.measure(
          config, reproduce, params, rows, folder / f'{file}-instructions.jsonl',
          pad_id=tok.pad_id, desc=f'evaluate {said}, instructions',
      )
    judge = grm.Judge(bind('evaluate', params), tok, settings)
    planned = grm.plan(judge, examples, samples=fields.samples, stage='evaluate', early=early)
    judged[list(planned.overlong)] = False
    if name == fields.models[0]:
      drawing.name_overlong(
          examples, planned.overlong, limit=settings.buckets[-1], desc='evaluate', strict=config.strict
      )
    drawn = drawing.draw(judge, planned, folder / f'{file}.jsonl', desc=f'evaluate {said}')
    logits = None
    if score is not None:
      logits = _meta_scores(
          config, score, examples, drawn, settings, tok, folder / f'{file}-meta.jsonl', said
      )
    means = None
    if fields.expected:
      means = _expected_scores(
          config, decoder, params, mesh, drawn, settings, tok, folder / f'{file}-expected.jsonl', said
      )
    pool = measure.pool_of(examples, drawn, samples=fields.samples, logits=logits, expected=means)
    first = {t.uid: t for t in drawn if t.sample == 0}
    tracked = trackers.measure(watch, grm.group(examples, drawn))
    greedy = None
    if fields.greedy:
      judge = grm.Judge(bind('greedy', params), tok, greedy_settings)
      planned = grm.plan(judge, examples, samples=2, stage='greedy')
      drawn = drawing.draw(judge, planned, folder / f'{file}-greedy.jsonl', desc=f'evaluate {said}, greedy')
      greedy = measure.pool_of(examples, drawn, samples=2, logits=None)
    found[stage] = Said(pool, greedy, first, told, tracked)
    del params, judge

  items = measure.items_of(examples, judged)
  processes.only_writer(
      lambda: publish(config, workdir, items, found, data, rows), what='writing the report'
  )
  workdir.mark_done('evaluate', config, reads, WRITES)


def _clear(path: pathlib.Path) -> None:
  """A report of other inputs must not stand there while this one is made."""
  for name in ('results.json', 'report.md'):
    (path / name).unlink(missing_ok=True)


def _meta_scorer(config, workdir, mesh, tok):
  decoder = loading.model(config, tok, name=config.evaluate.meta, head_kind='scalar')
  params = loading.params(config, config.evaluate.meta, decoder, workdir, mesh)
  return meta_rm.scorer(decoder, params, mesh, config.evaluate.meta_batch)


def _meta_scores(config, score, examples, drawn, settings, tok, path, name):
  """{(uid, sample): logit}, from the file if an earlier run has scored them."""
  if not processes.as_writer_says(path.exists, what='meta scores'):
    by_uid = {example.uid: example for example in examples}
    prompt_ids = meta.reader(template=settings.template, tokenizer=tok)
    rows = [(prompt_ids(by_uid[t.uid], t.order), t.token_ids) for t in drawn]
    with Progress(total=len(rows), desc=f'evaluate {name}, meta-RM') as progress:
      logits = meta.score(score, rows, limit=config.meta_rm.buckets[-1], on_rows=progress.update)
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


def _expected_scores(config, decoder, params, mesh, drawn, settings, tok, path, name):
  """{(uid, sample): expected scores as shown, or None}, from the file if an earlier run has them."""
  if not processes.as_writer_says(path.exists, what='expected scores'):
    model = Transformer(dataclasses.replace(decoder.config, remat=False))
    masses = functools.partial(Scorer(model, mesh, config.evaluate.meta_batch).masses, params)
    scales = [prompts.SCALES[grm.mode(len(t.order), settings)] for t in drawn]
    with Progress(total=len(drawn), desc=f'evaluate {name}, expected scores') as progress:
      told = expected.of(
          functools.partial(masses, on_rows=progress.update), drawn, scales, spelling=spellings.of(tok),
          temperature=settings.temperature,
      )
    found = [
        {
            'schema': 'expected/1', 'uid': t.uid, 'sample': t.sample,
            'scores': None if one is None else list(one.scores), 'lost': None if one is None else one.lost.tolist(),
        }
        for t, one in zip(drawn, told)
    ]
    processes.only_writer(lambda: records.write_jsonl(path, found), what=f'writing {path}')
  rows = list(records.read_jsonl(path))
  lost = [share for row in rows for share in row['lost'] or ()]
  elsewhere = ''
  if lost:
    elsewhere = f'; at {len(lost)} places {results.percent(float(np.mean(lost)))} of the probability went elsewhere'
  processes.say(
      f'evaluate {name}: expected scores of {sum(row["scores"] is not None for row in rows)} of {len(rows)} judgements, '
      f'the drawn ones of the others{elsewhere}'
  )
  return {(row['uid'], row['sample']): row['scores'] for row in rows}


def publish(
    config: Any, workdir: Workdir, items: measure.Items, found: dict[str, Said], data: datasets.Data,
    instructions: general.Rows | None,
) -> None:
  """Writes results.json, report.md, the figures and the per-example rows, and prints the result; process 0 only."""
  fields = config.evaluate
  threshold = measure.THRESHOLDS[fields.single]
  pools = {stage: said.pool for stage, said in found.items()}
  rows, per_example = [], []
  for stage, pool in pools.items():
    if found[stage].greedy is not None:
      rows += measure.rows_of(
          stage, found[stage].greedy, items, benchmark=fields.benchmark, temperature=0.0, ks=(1,),
          k_meta=0, soft_temperature=None, threshold=threshold,
      )
    sampled = measure.rows_of(
        stage, pool, items, benchmark=fields.benchmark, temperature=fields.temperature,
        ks=tuple(fields.ks), k_meta=fields.k_meta,
        soft_temperature=fields.soft_temperature if fields.soft else None, threshold=threshold,
        early=fields.early != 'none',
    )
    for row in results.whole(sampled, fields.benchmark):
      if row['k'] == 1 and row['guided'] is False:
        row.update(found[stage].tracked)
    rows += sampled
    per_example += measure.example_rows(stage, pool, items, k=max(fields.ks), threshold=threshold)
  records.write_jsonl(workdir.path / 'evaluate' / 'examples.jsonl', per_example)
  results.write(workdir.path / 'results.json', rows)
  simple = measure.baselines(items, fields.benchmark)
  pictures = _pictures(workdir.path, rows, simple, items, pools)
  skipped = dict(data.skipped)
  if not items.judged.all():
    skipped['over the prompt limit'] = [
        e.uid for e, fits in zip(items.examples, items.judged) if not fits
    ]
  shown = _exhibits(items, found, threshold, show=fields.show)
  told = [{'stage': stage, **said.general} for stage, said in found.items() if said.general is not None]
  notes = _notes(items, pools, data, threshold, ks=tuple(fields.ks), early=fields.early)
  notes += [_by_expected(stage, rows, fields.benchmark) for stage, pool in pools.items() if pool.expected is not None]
  said_of = {stage: trackers.sentence(said.tracked) for stage, said in found.items()}
  notes += [f'{stage}: {words}' for stage, words in said_of.items() if words]
  if instructions is not None:
    if instructions.contaminated:
      notes.append(
          f'{results.count(len(instructions.contaminated), "evaluated instruction row")} can be in the training data '
          f'(data.instructions, sft.data): {", ".join(instructions.contaminated[:5])}'
      )
    skipped |= {f'instruction rows, {reason}': list(names) for reason, names in instructions.left_out.items()}
    processes.write_text(
        workdir.path / 'evaluate' / 'instructions.json', json.dumps(told, indent=2, allow_nan=False) + '\n'
    )
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
          notes=notes,
          instructions=told,
          exhibits=[exhibit.markdown(one) for one in shown],
      ),
  )
  for one in shown:
    processes.say('', exhibit.console(one))
  processes.say(*console.table(rows), *console.instructions(told), '')
  processes.say(f'evaluate: report in {workdir.path / "report.md"}')


def _by_expected(stage: str, rows: list[dict[str, Any]], benchmark: str) -> str:
  """A sentence on what votes by expected scores give."""
  told = ', '.join(
      f'k = {row["k"]} {results.percent(row["expected_accuracy"])} ({results.points(row["expected_gain"])})'
      for row in results.whole(rows, benchmark)
      if row['stage'] == stage and 'expected_accuracy' in row
  )
  return f'{stage}: votes by the expected scores of the same samples, and what they gain: {told}'


def _exhibits(items: measure.Items, found: dict[str, Said], threshold: float, *, show: int) -> list[exhibit.Exhibit]:
  """The first `show` items on which training is seen, with every stage's first sample."""
  right = {
      stage: measure.sample_correct(said.pool, items, threshold)[:, 0] for stage, said in found.items()
  }
  out = []
  for i in exhibit.choose(items.examples, right, items.judged, show=show):
    example = items.examples[i]
    out.append(exhibit.Exhibit(
        example,
        {stage: said.first[example.uid] if example.uid in said.first else None for stage, said in found.items()},
        {stage: bool(right[stage][i]) for stage in found},
    ))
  return out


def _pictures(path: pathlib.Path, rows, simple, items: measure.Items, pools) -> dict[str, pathlib.Path]:
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


def _notes(items: measure.Items, pools, data, threshold: float, *, ks: tuple[int, ...], early: str) -> list[str]:
  """Sentences on what an accuracy hides: position bias, headroom, how good the meta-RM is, repeated questions."""
  notes = []
  for stage, pool in pools.items():
    if early != 'none':  # which samples there are depends on what they say
      saved = results.percent(measure.votes_saved(pool, items.judged))
      notes.append(f'{stage}: votes stopped once they were decided ({early}) and saved {saved} of the samples')
      continue
    correct = measure.sample_correct(pool, items, threshold)
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
    best = ', '.join(
        f'k = {k} {results.percent(measure.oracle_accuracy(pool, items, k=k, threshold=threshold))}' for k in ks
    )
    notes.append(
        f'{stage}: headroom of guided votes, if an oracle let only samples vote that are right by themselves, where '
        f'there are any: {best}'
    )
  if data.contaminated:
    notes.append(
        f'{results.count(len(data.contaminated), "evaluated item")} share a conversation with the training items: '
        + ', '.join(data.contaminated[:5])
    )
  if data.validation_contaminated:
    notes.append(
        f'{results.count(len(data.validation_contaminated), "validation item")} share a conversation with the '
        'training or the evaluated items: ' + ', '.join(data.validation_contaminated[:5])
    )
  return notes
