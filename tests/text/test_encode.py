"""Gate 1: the arrays that the engine reads."""

import subprocess
import sys

import numpy as np
import pytest

from spct_jax.text import encode
from spct_jax.text import tokenizer as tokenizer_lib
from spct_jax.types import Span


@pytest.fixture(scope='module')
def small():
  return tokenizer_lib.load('builtin:small')


def test_a_batch_is_padded_on_the_right():
  batch = encode.batch([[5, 6, 7], [8]], 4, rows=3, pad_id=9)
  np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 9], [8, 9, 9, 9], [9, 9, 9, 9]])
  np.testing.assert_array_equal(batch.length, [3, 1, 0])
  np.testing.assert_array_equal(batch.row_mask, [True, True, False])
  assert batch.tokens.dtype == batch.length.dtype == np.int32 and batch.row_mask.dtype == np.bool_
  assert encode.batch([], 4).tokens.shape == (0, 4)


def test_too_long_too_many_and_empty_are_refused():
  with pytest.raises(ValueError, match='prompt 1 has 5 tokens; allowed: 1..4'):
    encode.batch([[1], [1] * 5], 4)
  with pytest.raises(ValueError, match='prompt 0 has 0 tokens'):
    encode.batch([[]], 4)
  with pytest.raises(ValueError, match='2 prompts for 1 rows'):
    encode.batch([[1], [1]], 4, rows=1)


# Seen to fail: each frame span encoded by itself; neighbouring data spans joined.
def test_frame_is_joined_and_data_is_not(small):
  cut = [Span('Sco', False), Span('res', False), Span('Sco', True), Span('res', True)]
  whole = [Span('Scores', False), Span('Sco', True), Span('', False), Span('res', True)]
  assert encode.encode(cut, small) == encode.encode(whole, small)
  assert encode.encode(cut, small) == small.encode('Scores') + small.encode_data('Sco') + small.encode_data('res')


def test_the_prefix_does_not_depend_on_what_follows(small):
  prefix = [Span('Judge.\n', False), Span('query', True), Span('\n[The Begin of Response 1]\n', False)]
  ids = [encode.encode([*prefix, Span(text, True), Span('\nend', False)], small) for text in ('a', 'b c', '\n', '<|eos|>')]
  start = encode.encode(prefix, small)
  assert all(other[: len(start)] == start for other in ids)


def test_light_modules_do_not_import_jax():
  code = (
      'import sys, spct_jax.text.markers, spct_jax.text.chat, spct_jax.text.encode, spct_jax.judges.prompts, spct_jax.judges.parse;'
      "assert not {'jax', 'transformers', 'torch'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, '-c', code], check=True)
