"""Slots are used again, seats are few, and a prompt is kept and read once: results and the compiled program."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from spct_jax.sampling import engine as engine_module
from spct_jax.sampling import loop
from spct_jax.types import PromptBatch


def sized(monkeypatch, **sizes):
  monkeypatch.setattr(engine_module, '_sizes', lambda *_: loop.Sizes(**sizes))


# Nine of twenty tasks are of one prompt, the model has windows and mixed layers, tasks are greedy and drawn: what
# `full` gave, and the uncached model was seen to give, must come again when prompts wait for slots and tasks for seats.
# Seen to fail when a slot is filled while a row still reads it, when the ring or the prompt mask are of another slot,
# and when a task is taken twice or never.
@pytest.mark.parametrize('slots, width, batch', [(2, 2, 1), (3, 1, 2)])
def test_used_slots_and_few_seats_change_nothing(full, monkeypatch, slots, width, batch):
  sized(monkeypatch, rows=4, slots=slots, width=width, batch=batch)
  engine = full.engine(full.model, rows=4)
  got = engine.generate(full.params, full.prompts, full.tasks)
  np.testing.assert_array_equal(got.tokens, full.rollouts.tokens)
  np.testing.assert_array_equal(got.token_mask, full.rollouts.token_mask)
  np.testing.assert_allclose(got.logp, full.rollouts.logp, atol=2e-5)
  _, given, state = engine._begin(full.params, full.prompts, full.tasks, None)
  state, done = loop.advance(*given, state, np.int32(1000))
  assert int(done) == 20 and int(state.fills) == -(-5 // batch) and (np.asarray(state.prompt) == 5).all()


# Seen to fail when rows take their slots (`slots[slot]`) in place of slots their rows' queries.
def test_no_row_gets_a_copy_of_its_prompt(rig, monkeypatch):
  R, P = 24, 400
  sized(monkeypatch, rows=R, slots=2, width=R // 2, batch=1)
  prompts = PromptBatch(np.ones((2, P), np.int32), np.full(2, P, np.int32), np.ones(2, bool))
  tasks = rig.make_tasks(np.arange(R) % 2, np.arange(R) // 2)
  _, given, state = rig.engine(rig.model, rows=R, T=3)._begin(rig.params, prompts, tasks, None)
  text = loop.advance.lower(*given, state, np.int32(1)).compile().as_text()
  assert 'f32[2,2,400,8]' in text
  assert not re.search(r'f32\[24,(2,400|400,2),8\]|= f32\[2,2,400,8\]\S* (copy|gather)\(', text)


# Seen to fail when the scale or the cap of either part, or of the prefill, is left out.
def test_scale_and_soft_cap_of_the_model_are_kept(rig, make_rig):
  capped = make_rig(dataclasses.replace(rig.model.config, attn_softcap=0.7, query_scalar=2.5, logit_softcap=3.0))
  tasks = rig.tasks
  got = capped.engine(capped.model, rows=3).generate(capped.params, capped.prompts, tasks)
  logits = capped.learner_logits(got, capped.prompts, tasks)
  want = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), got.tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(got.logp, np.where(got.token_mask, want, 0.0), atol=1e-5)


def test_limits_end_tasks_and_are_checked(rig):
  engine = rig.engine(rig.model, rows=3, eos_ids=())
  limits = np.arange(20) % 6 + 1
  got = engine.generate(rig.params, rig.prompts, rig.tasks, limits=limits)
  np.testing.assert_array_equal(got.token_mask.sum(axis=1), limits)
  for wrong in (np.full(20, 7), np.zeros(20, int), np.ones(19, int)):
    with pytest.raises(ValueError, match='limits'):
      engine.generate(rig.params, rig.prompts, rig.tasks, limits=wrong)


@pytest.mark.parametrize('prompts, k, rows, P', [
    (256, 32, 256, 1024), (1, 32, 32, 1024), (4, 8, 32, 256), (500, 1, 32, 64), (3, 40, 8, 64), (1, 1, 5, 9),
])
def test_sizes_keep_the_rows_busy(prompts, k, rows, P):
  Q = prompts * k
  sizes = engine_module._sizes(np.full((1, prompts), k), Q, min(rows, Q), P)
  assert sizes.slots <= prompts and sizes.width <= max(k, 1) * 1.5 and 1 <= sizes.batch <= sizes.slots
  assert sizes.slots * min(sizes.width, k) >= min(rows, Q)  # all rows can sit
  assert sizes.slots * sizes.width <= 3 * min(rows, Q) + sizes.batch * sizes.width  # and few seats stay empty


def test_one_prompt_with_nearly_all_tasks_gets_its_seats():
  assert engine_module._sizes(np.array([[31, 1]]), 32, 32, 64).width >= 31
