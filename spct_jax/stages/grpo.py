"""Rule-based GRPO (paper 2.4, 2.5): the judge is rewarded +1 for finding the best response, -1 otherwise.

One step:
    1. `batch` items by (seed, step); one order per item, drawn anew at each visit; G samples of that prompt
    2. correct (Eq 10) -> reward -> group advantages; a verdict that does not parse is wrong
    3. log-probabilities of the frozen reference, and pi_old (the sampler's own, or the learner's)
    4. `updates` optimizer steps on the sampled token ids

Before every `validate_every`-th step and after the last, the policy judges the validation items, always under the
same orders and uniforms, so that two points of the curve differ by the policy alone. One order per item, as in
training, so that an item is one prompt; what a slot favours averages out over the items.

Departures, each a field: pi_old is the sampler's by default (`old_logp`); a group without signal gives zero
advantages and is counted (`no_signal`); where sampling truncates, log-probabilities are over the tokens that were
kept (`replay_kept`; `train.objectives`, 2) or, as it is off, over the full vocabulary; a step's prompts may be of one
bucket (`group_by_length`), so that its rewards and slots are of items of that length.
"""

import time
from typing import Any

import numpy as np

from spct_jax import sharding, types
from spct_jax.algos import grpo, metrics, outcome, rft
from spct_jax.data import stream
from spct_jax.judges import grm
from spct_jax.stages import (
    checks,
    datasets,
    drawing,
    fit,
    loading,
    named,
    processes,
    results,
    sample,
    samplers,
    trackers,
)
from spct_jax.stages.measure import THRESHOLDS
from spct_jax.stages.progress import Progress
from spct_jax.stages.workdir import Workdir
from spct_jax.train import batches, objectives, update

READS = ()
EASY = ('sample/trajectories.jsonl',)  # read too where `drop_too_easy` is on
WRITES = ('grpo/checkpoint', 'grpo/DONE.json')

VALIDATE = 'grpo-validate'  # names the randomness of validation: no rollout of training shares it


def run(config: Any, workdir: Workdir, mesh: Any, generate: Any = None) -> None:
  """Trains `config.grpo.init` against itself frozen, or against `config.grpo.reference`."""
  checks.stage(config, mesh, 'grpo')
  fields = config.grpo
  reads = (
      *(EASY if fields.drop_too_easy else ()),
      *datasets.reads(config),
      *named.reads(config, fields.init, fields.reference),
  )
  if workdir.is_done('grpo', config, reads):
    return processes.say('grpo: done before')
  if fields.drop_too_easy:
    sample.require(config, workdir, 'grpo')
  if checks.truncates(fields) and not fields.replay_kept:
    processes.say(
        'grpo: sampling is truncated (top_p, top_k or min_p) and the learner takes the full vocabulary, so importance '
        'ratios are biased; grpo.replay_kept=64 takes both over the tokens that were kept'
    )
  tok = loading.tokenizer(config)
  decoder = loading.model(config, tok, name=fields.init)
  trained = loading.learner(config, 'grpo', decoder)
  settings = loading.judge_settings(config, fields, orders='group', single='binary')
  bind = samplers.generator(config, trained, tok, mesh, generate)
  data = datasets.load(config)
  examples, lengths = _usable(config, data.train, settings, tok, desc='grpo')
  watched = ()
  if fields.validate_every:
    watched, _ = _usable(config, data.validation, settings, tok, desc='grpo, validation')
  tracked = trackers.compiled(config.trackers)
  if fields.drop_too_easy:
    left = hard(examples, drawing.load(workdir.path / EASY[0]))
    examples, lengths = tuple(examples[i] for i in left), lengths[left]
  # The bucket of each item's prompt: rows of one bucket are alike in length.
  groups = np.searchsorted(sorted(settings.buckets), lengths) if fields.group_by_length else None
  workdir.start('grpo', config, reads)
  init = loading.params(config, fields.init, decoder, workdir, mesh)
  # Under adapters these arrays are the frozen base too: the reference is the policy with its adapters off.
  reference, referee = init, decoder
  if fields.reference not in ('', fields.init):
    referee = loading.model(config, tok, name=fields.reference)
    reference = loading.params(config, fields.reference, referee, workdir, mesh)
  scored = {'chunk': config.model.logits_chunk, 'replay': fields.replay_kept > 0}
  ref_logp = objectives.token_logp(referee, mesh, **scored)
  own_logp = ref_logp if trained == referee else objectives.token_logp(trained, mesh, **scored)
  loss_fn = objectives.grpo_objective(
      trained,
      clip_eps=fields.clip_eps,
      kl_coef=fields.kl_coef,
      temperature=fields.temperature,
      **scored,
  )

  def validate(learner_params):
    judge = grm.Judge(bind(VALIDATE, learner_params), tok, settings)
    judged = grm.judge(judge, watched, samples=fields.validate_samples, stage=VALIDATE)
    return validation(judged, watched, tracked)

  with fit.open_session(config, workdir, mesh, stage='grpo', trained=trained) as session:
    state, frozen, start = session.start(lambda: init)
    del init
    step_fn = update.make_step(
        loss_fn,
        session.optimizer,
        microbatches=fields.microbatches,
        mesh=mesh,
        shardings=session.shardings,
        frozen=frozen,
    )
    if fields.steps == 0:
      session.save(0, state)
    latest = None
    with Progress(total=fields.steps, desc='grpo', start=start) as progress:
      for step in range(start, fields.steps):
        began = time.perf_counter()
        checked = {}
        if fields.validate_every and step % fields.validate_every == 0:
          checked = validate(session.params(state, frozen))
          latest = checked['validation/accuracy']
        clock = {'start': time.perf_counter()}
        chosen, visits = _items(config, examples, groups, step)
        judge = grm.Judge(bind('grpo', session.params(state, frozen)), tok, settings)
        judged = grm.judge(judge, chosen, samples=fields.group, stage='grpo', visits=visits)
        del judge  # and with it the sampler's view of the parameters
        clock['sampled'] = time.perf_counter()
        batch, measured = rows(judged, chosen, config=config, pad_id=tok.pad_id)
        measured |= trackers.measure(tracked, judged.grouped)
        if batch is None:
          processes.say(f'grpo: step {step}: every item of the batch is over-long; nothing to learn')
          session.writer.write(step, {**measured, **checked}, {})
          progress.update(1)
        else:
          device = update.put_batch(batch, mesh)
          device['ref_logp'] = ref_logp(reference, device, fields.temperature)
          device['old_logp'] = device['sampler_logp']
          if fields.old_logp == 'learner':
            device['old_logp'] = own_logp(session.params(state, frozen), device, fields.temperature)
          for inner in range(fields.updates):
            state, new = step_fn(state, device)
            if inner == 0:  # the gap between sampler and learner means something before the first update only
              learned = new
          learned = {name: float(value) for name, value in sharding.to_host(learned).items()}
          now = time.perf_counter()
          session.writer.write(
              step,
              {**learned, **measured, **checked},
              {
                  **({'validation_seconds': clock['start'] - began} if checked else {}),
                  'sample_seconds': clock['sampled'] - clock['start'],
                  'learn_seconds': now - clock['sampled'],
                  **getattr(bind, 'cost', {}),
              },
          )
          progress.update(1, metrics=_shown(measured | learned, validation=latest))
        if (step + 1) % fields.checkpoint_every == 0 or step + 1 == fields.steps:
          session.save(step + 1, state)
    if fields.validate_every:
      began = time.perf_counter()
      checked = validate(session.params(state, frozen))
      # A row of its own, beyond the last checkpoint: a run that is killed before it is done writes it anew.
      session.writer.write(fields.steps, checked, {'validation_seconds': time.perf_counter() - began})
      processes.say(
          f'grpo: accuracy {results.percent(checked["validation/accuracy"])}, standard error '
          f'{results.percent(checked["validation/stderr"])}, on {results.count(len(watched), "validation item")} '
          f'after step {fields.steps}'
      )
  workdir.mark_done('grpo', config, reads, WRITES)


def _shown(row: dict[str, Any], *, validation: float | None) -> dict[str, Any]:
  """What the progress line says of a step, in few words; what does not exist is left out."""
  found = {name: row[name] for name in ('reward', 'kl', 'parse_failure', 'ties')}
  found['validation'] = validation
  for name, value in row.items():
    if name.startswith('pattern_'):
      found[name.removeprefix('pattern_')] = value
  found |= {'sets': row.get('principle_sets'), 'repeated': row.get('principles_repeated')}
  return {name: value for name, value in found.items() if value is not None}


def _usable(config, examples, settings, tok, *, desc):
  """(the items whose prompt fits, the tokens of each prompt); the others are named before anything is drawn."""
  lengths, limit = drawing.lengths(examples, settings, tok), settings.buckets[-1]
  kept = lengths <= limit
  drawing.name_overlong(
      examples, np.flatnonzero(~kept).tolist(), limit=limit, desc=desc, strict=config.strict
  )
  return tuple(e for e, keep in zip(examples, kept) if keep), lengths[kept]


def hard(
    examples: tuple[types.Example, ...], plain: tuple[types.Trajectory, ...]
) -> np.ndarray:
  """int[B']: the positions of the items that some plain sample got wrong (paper 2.5), or that have none."""
  grouped = grm.group(examples, plain)
  _, correct = drawing.judged(examples, grouped)
  if not correct.size:
    return np.arange(len(examples))
  drawn = np.arange(correct.shape[1])[None, :] < np.asarray([len(g) for g in grouped])[:, None]
  easy = np.asarray(rft.too_easy(correct, ~drawn))
  left = np.flatnonzero(~easy)
  processes.say(f'grpo: {len(examples) - len(left)} of {len(examples)} items are too easy and left out')
  if not len(left):
    raise ValueError(
        'grpo: every item is too easy (all plain samples of the sample stage are right), so nothing is left to '
        'learn from; give harder items, or set grpo.drop_too_easy=False'
    )
  return left


def _items(config, examples, groups, step):
  """The items of a step, and the epoch of each: a pure function of (seed, step)."""
  index, visits = stream.indices(
      seed=stream.stage_seed(config.seed, 'grpo'), step=step, batch_size=config.grpo.batch, size=len(examples),
      groups=groups,
  )
  return tuple(examples[i] for i in index), [int(v) for v in visits]


def rows(
    judged: grm.Judged, examples: tuple, *, config: Any, pad_id: int
) -> tuple[dict | None, dict[str, Any]]:
  """The learner's batch of one step, and what to log of it; None if no item of the batch fits its prompt."""
  fields = config.grpo
  label = np.asarray([e.label for e in examples], np.int32)
  scores, valid, mask = (
      judged.judgments.scores, judged.judgments.valid, judged.judgments.response_mask,
  )
  correct = np.asarray(outcome.correct(scores, valid, label, mask))
  reward = np.asarray(grpo.reward(correct))
  advantage = np.asarray(grpo.advantages(reward, eps=fields.advantage_eps))
  present = np.asarray([bool(group) for group in judged.grouped])
  learnt, gains = [], []
  for i, group in enumerate(judged.grouped):
    for trajectory, gain in zip(group, advantage[i]):
      learnt.append(batches.from_trajectory(trajectory))
      gains.append(gain)
  fitting = batches.fitting(learnt, tuple(fields.buckets)) if learnt else batches.Fitting((), ())
  measured = measure(judged, correct, reward, label, present)
  measured['rows_too_long'] = len(fitting.too_long)
  if fields.replay_kept:
    measured |= kept_sizes(judged.grouped, fields.replay_kept)
  if not fitting.keep:
    return None, measured
  batch = batches.pad(
      [learnt[i] for i in fitting.keep],
      num_rows=fields.batch * fields.group,
      buckets=tuple(fields.buckets),
      pad_id=pad_id,
      columns={'advantage': np.asarray([gains[i] for i in fitting.keep], np.float32)},
      replay_kept=fields.replay_kept,
  )
  return batch, measured


def kept_sizes(grouped: tuple[tuple[types.Trajectory, ...], ...], cap: int) -> dict[str, float]:
  """Of the steps of all trajectories: how many tokens truncation kept, and at what share of them the cap cut."""
  counts = [trajectory.kept.count for group in grouped for trajectory in group if trajectory.kept is not None]
  count = np.concatenate([np.zeros(0, int), *counts])
  return {
      'kept_tokens': float(count.mean()) if count.size else 0.0,
      'kept_capped': float((count > cap).mean()) if count.size else 0.0,
  }


def measure(judged, correct, reward, label, present) -> dict[str, Any]:
  """The host side of a GRPO row: what the judge did, over the items that fitted."""
  scores, valid, mask = (
      judged.judgments.scores, judged.judgments.valid, judged.judgments.response_mask,
  )
  k, n = valid.shape[1], mask.shape[1]
  order = np.full((len(judged.grouped), k, n), -1, np.int32)
  lengths = []
  for i, group in enumerate(judged.grouped):
    for j, trajectory in enumerate(group):
      order[i, j, : len(trajectory.order)] = trajectory.order
      lengths.append(len(trajectory.token_ids))
  drawn = np.broadcast_to(present[:, None], valid.shape)
  by_slot, in_slot = metrics.accuracy_by_slot(correct, order, label, mask, drawn)
  count = max(int(present.sum()), 1)
  signal = np.asarray(grpo.has_signal(reward)) & present
  return {
      'reward': float(reward[present].mean()) if present.any() else 0.0,
      'correct': float(correct[present].mean()) if present.any() else 0.0,
      'no_signal': 1.0 - float(signal.sum()) / count,
      'parse_failure': float(metrics.parse_failure_rate(valid, drawn)),
      'ties': float(metrics.tie_rate(scores, valid, mask)),
      'scores': np.asarray(metrics.score_histogram(scores, valid, mask)),
      'slot_accuracy': np.asarray(by_slot),
      'slot_count': np.asarray(in_slot),
      'output_length': float(np.mean(lengths)) if lengths else 0.0,
      'overlong': int((~present).sum()),
  }


def validation(
    judged: grm.Judged, examples: tuple[types.Example, ...], tracked: trackers.Trackers
) -> dict[str, Any]:
  """What the validation items say, under 'validation/': the accuracy of one sample, ties credited 1/m, and more.

  `correct` is strict (Eq 10), so a tie is wrong there; the rest is what a row of training says too.
  """
  label = np.asarray([e.label for e in examples], np.int32)
  scores, valid, mask = (
      judged.judgments.scores, judged.judgments.valid, judged.judgments.response_mask,
  )
  correct = np.asarray(outcome.correct(scores, valid, label, mask))
  present = np.asarray([bool(group) for group in judged.grouped])
  seen = measure(judged, correct, np.asarray(grpo.reward(correct)), label, present)
  voted = metrics.accuracy_at_k(
      scores, valid, label, mask, 1, row_mask=present, threshold=THRESHOLDS['binary']
  )
  found = {name: voted[name] for name in ('accuracy', 'stderr')}
  found |= {name: seen[name] for name in ('correct', 'ties', 'parse_failure', 'output_length')}
  found |= trackers.measure(tracked, judged.grouped)
  return {f'validation/{name}': value for name, value in found.items()}
