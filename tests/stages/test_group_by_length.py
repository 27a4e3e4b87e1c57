"""Steps whose prompts are of one bucket: which items they hold, and that the stages train on them."""

import ml_collections
import numpy as np

from spct_jax.data import stream
from spct_jax.stages import grpo


def section(batch):
  return ml_collections.ConfigDict({'seed': 7, 'grpo': {'batch': batch}})


# Mutations seen to fail: the groups passed over; the stage's seed not used.
def test_a_step_of_grpo_holds_prompts_of_one_bucket():
  groups = np.random.default_rng(1).permutation(np.repeat([0, 1], [26, 11]))
  examples = tuple(f'{group}-{i}' for i, group in enumerate(groups))
  for epoch in range(3):
    steps = [grpo._items(section(4), examples, groups, epoch * 9 + step) for step in range(9)]  # 37 // 4
    chosen = [names for names, _ in steps]
    assert all(visits == [epoch] * 4 for _, visits in steps)
    assert len({name for names in chosen for name in names}) == 36
    assert sum(len({name[0] for name in names}) > 1 for names in chosen) <= 1
  assert grpo._items(section(4), examples, groups, 5) == grpo._items(section(4), examples, groups, 5)
  other = ml_collections.ConfigDict({'seed': 8, 'grpo': {'batch': 4}})
  assert grpo._items(other, examples, groups, 5) != grpo._items(section(4), examples, groups, 5)


def test_without_groups_the_order_is_that_of_the_stream():
  examples = tuple('abcdefg')
  for step in range(4):
    names, visits = grpo._items(section(3), examples, None, step)
    index, seen = stream.indices(stream.stage_seed(7, 'grpo'), step, 3, 7)
    assert names == tuple(examples[i] for i in index) and visits == seen.tolist()
