"""Meta rewards of rows: what is left out, and what shares a prompt."""

import numpy as np

from spct_jax.judges import meta


# Seen to fail: the limit off by one; rewards in the order of the prompts; a prompt made anew for every row.
def test_rows_over_the_limit_are_nan_and_prompts_are_shared():
  rows = [((1, 2, 3), (4, 5)), ((7,), (8,)), ((1, 2, 3), (4, 5, 6)), ([1, 2, 3], [9]), ((7, 8), ())]
  asked = []

  def rewards(prompts, suffixes, prompt_of, on_rows):
    asked.append(prompts)
    on_rows(len(suffixes))
    return np.asarray([sum(prompts[u]) + 100 * sum(suffix) for u, suffix in zip(prompt_of, suffixes)], np.float32)

  told = []
  got = meta.score(rewards, rows, limit=5, on_rows=told.append)
  np.testing.assert_array_equal(got, np.float32([906, 807, np.nan, 906, 807]))  # an empty one is read at its prompt
  assert asked[0] == [(1, 2, 3), (7,)] and told == [4]
  assert np.isnan(meta.score(rewards, rows[2:3], limit=5)).all() and len(asked) == 1
