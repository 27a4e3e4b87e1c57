"""Votes that stop: what an item keeps is the shortest run of its samples that decides, however the engine ran.

Mutations seen to fail here: samples beyond the vote's need kept; the known samples counted with gaps; scores left in
the shown order; an item cut by a chunk; the range of the scale in the place of the binary one.
"""

import dataclasses

import numpy as np
import pytest

from spct_jax.algos import voting
from spct_jax.judges import grm, prompts
from spct_jax.testing import scripted
from spct_jax.text import tokenizer as tokenizers
from spct_jax.types import Example, Message

K = 12
SIZES = {'a': 2, 'b': 3, 'c': 1, 'd': 2, 'e': 4}


@pytest.fixture(scope='module')
def tok():
  return tokenizers.load('builtin:small')


@pytest.fixture(scope='module')
def examples():
  return [
      Example(uid=uid, messages=(Message('user', f'why {uid}?'),), responses=tuple('abcd'[:n]), label=0)
      for uid, n in SIZES.items()
  ]


def script(seed):
  """One sample in eight does not parse; the last response is usually ahead, on a only just."""
  def write(info):
    rng = np.random.default_rng([seed, ord(info.uid), info.sample])
    n = SIZES[info.uid]
    if rng.random() < 1 / 8:
      return 'I would rather not say.'
    ahead = (np.arange(n) == n - 1) * (0 if info.uid == 'a' else 7)
    scores = rng.integers(0, 2, 1) if n == 1 else np.clip(rng.integers(1, 4, n) + ahead, 1, 10)
    return scripted.verdict(info, tuple(int(score) for score in scores))
  return write


def judge(tok, *, seed=0, rows=4, **changes):
  settings = grm.Settings(**{
      **dict(
          template=prompts.load_template('short'), orders='shuffle', single='binary', given_principles=False,
          reference_answer=False, buckets=(300,), chunk_prompts=30, chunk_tasks=30, temperature=1.0, top_p=1.0,
          top_k=0, min_p=0.0, seed=3,
      ),
      **changes,
  })
  return grm.Judge(scripted.ScriptedEngine(tok, script(seed), max_new_tokens=96, rows=rows), tok, settings)


def run(judge, examples, rule='exact', alpha=0.1):
  early = grm.early(rule, alpha=alpha, threshold=0.5)
  return grm.judge(judge, examples, samples=K, stage='x', early=early)


def outcome(judgments):
  """The winners of each item; of a single response, whether its mean is above, below or on the threshold."""
  totals = np.asarray(voting.vote(judgments.scores, judgments.valid, judgments.response_mask))
  single = judgments.response_mask.sum(axis=1) == 1
  side = np.sign(totals[:, :1] - 0.5 * judgments.valid.sum(axis=1, keepdims=True))
  return np.where(single[:, None], side, totals == totals.max(axis=1, keepdims=True))


def test_stopped_votes_have_the_winners_of_the_full_vote_and_keep_its_first_samples(tok, examples):
  saved = []
  for seed in range(12):
    full, early = run(judge(tok, seed=seed), examples, 'none'), run(judge(tok, seed=seed), examples)
    np.testing.assert_array_equal(outcome(early.judgments), outcome(full.judgments))
    for kept, every in zip(early.grouped, full.grouped):
      assert kept == every[: len(kept)]
    saved.append([K - len(kept) for kept in early.grouped])
  mean = dict(zip(SIZES, np.mean(saved, axis=0)))
  assert mean['a'] < mean['d'] and min(mean['b'], mean['d'], mean['e']) > 1 and mean['c'] > 0.5


@pytest.mark.parametrize('rule', ['exact', 'statistical'])
def test_neither_rows_nor_chunks_change_what_is_kept(tok, examples, rule):
  wanted = run(judge(tok, rows=4), examples, rule).grouped
  assert sum(map(len, wanted)) < K * len(SIZES)
  for rows, changes in ((1, {}), (7, {}), (1000, {}), (4, {'chunk_tasks': 12}), (4, {'chunk_tasks': 100})):
    assert run(judge(tok, rows=rows, **changes), examples, rule).grouped == wanted, (rows, changes)


class Ragged:
  """Ends samples in any order and tells of some alone, as an engine does whose samples differ in length."""

  def __init__(self, engine, seed):
    self._engine, self._rng = engine, np.random.default_rng(seed)

  def __call__(self, batch, tasks, infos, withdraw):
    whole = self._engine(batch, tasks, infos)
    order, gone = self._rng.permutation(len(infos)), np.zeros(len(tasks.prompt), bool)
    for index in np.split(order[: -len(order) // 4], range(5, len(order) * 3 // 4, 5)):
      index = index[~gone[index]]
      gone[withdraw(index, whole.take(index))] = True
    return dataclasses.replace(whole, withdrawn=gone)


@pytest.mark.parametrize('rule', ['exact', 'statistical'])
def test_samples_that_end_in_any_order_keep_the_same(tok, examples, rule):
  wanted = run(judge(tok), examples, rule).grouped
  for seed in range(6):
    of = judge(tok)
    of = dataclasses.replace(of, generate=Ragged(of.generate, seed))
    assert run(of, examples, rule).grouped == wanted


def test_samples_that_are_not_needed_are_never_started(tok, examples):
  of = judge(tok, rows=1)
  started = []
  write = of.generate._script
  of.generate._script = lambda info: (started.append((info.uid, info.sample)), write(info))[1]
  kept = [(t.uid, t.sample) for group in run(of, examples).grouped for t in group]
  assert started == sorted(started) and sorted(kept) == started


def test_the_statistical_rule_saves_more(tok, examples):
  kept = lambda rule, seed: sum(map(len, run(judge(tok, seed=seed), examples, rule).grouped))
  count = lambda rule: sum(kept(rule, seed) for seed in range(6))
  assert count('statistical') < 0.95 * count('exact')


def test_items_stay_whole_and_long_ones_first(tok, examples):
  long = dataclasses.replace(examples[0], uid='z', messages=(Message('user', ' '.join(['why'] * 200)),))
  of = judge(tok, buckets=(300, 800))
  planned = grm.plan(of, [*examples, long], samples=K, stage='x', early=grm.Early(None, 0.5))
  chunks = [list(dict.fromkeys(task.info.uid for task in chunk.tasks)) for chunk in planned.chunks]
  assert chunks == [['z', 'a'], ['b', 'c'], ['d', 'e']]


@pytest.mark.parametrize('changes, rule, words', [
    ({'chunk_tasks': 11}, 'exact', 'chunk_tasks=11.*raise judge.chunk_tasks'),
    ({'chunk_prompts': 3}, 'exact', "'b'.*raise judge.chunk_prompts"),
    ({'orders': 'balanced'}, 'statistical', "balanced.*'shuffle'"),
    ({}, 'sometimes', "'sometimes'.*'none', 'exact', 'statistical'"),
])
def test_what_cannot_stop_early_is_refused_before_the_engine_runs(tok, examples, changes, rule, words):
  of = judge(tok, **changes)
  with pytest.raises(ValueError, match=words):
    run(of, examples, rule)
  assert not of.generate.calls


@pytest.mark.parametrize('alpha', [0.0, 1.0])
def test_a_chance_of_none_or_all_is_refused(alpha):
  with pytest.raises(ValueError, match='early_alpha'):
    grm.early('statistical', alpha=alpha, threshold=0.5)
  assert grm.early('exact', alpha=alpha, threshold=0.5).alpha is None
