"""How chunks are composed and drawn: longest prompts first, the host one chunk behind the devices.

Mutations seen to fail here: chunks in the order of the items; a chunk read before the next one is launched; the last
chunk forgotten; a failure that loses the chunk before it.
"""

import dataclasses

import numpy as np
import pytest

from spct_jax import types
from spct_jax.judges import grm, prompts
from spct_jax.sampling import trunks
from spct_jax.testing import scripted
from spct_jax.text import tokenizer as tokenizers
from spct_jax.types import Example, Message

WORDS = {'a': 200, 'b': 4, 'c': 4, 'd': 200, 'e': 4}  # of the items' questions


class Delayed:
  """A scripted engine that is waited for; `log` tells what happened, in order."""

  def __init__(self, engine, log, fails_at=None, at='wait'):
    self.engine, self.log, self.fails_at, self.at, self.calls = engine, log, fails_at, at, 0

  def __call__(self, batch, tasks, infos):
    index, self.calls = self.calls, self.calls + 1
    self.log.append(f'launch {index}')
    if index == self.fails_at and self.at == 'launch':
      raise KeyboardInterrupt

    def wait():
      self.log.append(f'wait {index}')
      if index == self.fails_at:
        raise KeyboardInterrupt
      return self.engine(batch, tasks, infos)

    return wait


@pytest.fixture(scope='module')
def examples():
  return [
      Example(uid=uid, messages=(Message('user', ' '.join(['why'] * words)),), responses=('yes', 'no'), label=0)
      for uid, words in WORDS.items()
  ]


def judge(log, *, fails_at=None, at='wait', chunk_tasks=4):
  tok = tokenizers.load('builtin:small')
  engine = scripted.ScriptedEngine(tok, lambda info: scripted.verdict(info, (8, 3)), max_new_tokens=96)
  settings = grm.Settings(
      template=prompts.load_template('short'), orders='shuffle', single='scale', given_principles=False,
      reference_answer=False, buckets=(300, 800), chunk_prompts=8, chunk_tasks=chunk_tasks, temperature=1.0, top_p=1.0,
      top_k=0, min_p=0.0, seed=3,
  )
  return grm.Judge(Delayed(engine, log, fails_at, at), tok, settings)


def test_items_of_the_longest_prompts_are_drawn_first(examples):
  planned = grm.plan(judge([]), examples, samples=2, stage='x')
  drawn = [(task.info.uid, task.info.sample) for chunk in planned.chunks for task in chunk.tasks]
  assert drawn == [(uid, sample) for uid in 'adbce' for sample in (0, 1)]
  assert [chunk.bucket for chunk in planned.chunks] == [800, 300, 300]


def test_a_chunk_is_read_while_the_next_one_is_drawn(examples):
  log = []
  of = judge(log)
  for chunk, drawn in grm.run(of, grm.plan(of, examples, samples=2, stage='x').chunks):
    log.append(f'read {chunk.index}')
    assert [(t.uid, t.sample) for t in drawn] == [(task.info.uid, task.info.sample) for task in chunk.tasks]
    assert all(t.scores is not None for t in drawn)
  assert log == ['launch 0', 'wait 0', 'launch 1', 'read 0', 'wait 1', 'launch 2', 'read 1', 'wait 2', 'read 2']


@pytest.mark.parametrize('at', ['launch', 'wait'])
def test_a_failure_does_not_take_the_chunk_before_with_it(examples, at):
  of = judge([], fails_at=2, at=at)
  read = []
  with pytest.raises(KeyboardInterrupt):
    for chunk, _ in grm.run(of, grm.plan(of, examples, samples=2, stage='x').chunks):
      read.append(chunk.index)
  assert read == [0, 1]


def test_judging_keeps_the_order_of_the_items(examples):
  judged = grm.judge(judge([]), examples, samples=2, stage='x')
  assert [[t.uid for t in group] for group in judged.grouped] == [[uid] * 2 for uid in WORDS]
  assert judged.judgments.scores.tolist() == [[[8, 3]] * 2] * 5


# Seen to fail when an item's tasks are named by its orders (its prompts are then cut apart).
def test_orders_of_an_item_are_one_trunk_for_the_engine(monkeypatch):
  given = []

  def generate(batch, tasks, infos):
    given.append((batch, tasks, infos))
    tokens, logp, mask = (np.zeros((12, 1), dtype) for dtype in (np.int32, np.float32, bool))
    return types.Rollouts(tokens, logp, mask, np.zeros(12, bool))

  items = [
      Example(uid=uid, messages=(Message('user', ' '.join([word] * 150)),), responses=('yes', 'no', 'perhaps'), label=0)
      for uid, word in (('a', 'why'), ('b', 'how'))
  ]
  scripted_judge = dataclasses.replace(judge([]), generate=generate)
  settings = dataclasses.replace(scripted_judge.settings, chunk_prompts=12, chunk_tasks=12)
  grm.judge(dataclasses.replace(scripted_judge, settings=settings), items, samples=6, stage='x')
  (batch, tasks, infos), = given
  assert trunks.cuts(batch, tasks) == []  # so short prompts are not worth a program
  monkeypatch.setattr(trunks, 'LEAST', 1)
  cut = trunks.cuts(batch, tasks)[0]
  assert len({(info.uid, info.order) for info in infos}) > 6 and len(cut.length) == 2 and cut.length.min() > 150
  assert len({(info.uid, cut.trunk[prompt]) for info, prompt in zip(infos, tasks.prompt)}) == 2
