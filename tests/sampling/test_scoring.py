"""The pass that shares prompts against each row alone: rewards, and masses behind rows that branch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax import pages, sharding
from spct_jax.models import hf_config
from spct_jax.models.transformer import Transformer
from spct_jax.sampling import scoring, suffixes
from spct_jax.sampling.scoring import Branch, Scorer, Sets
from spct_jax.testing import families, tiny

pytestmark = pytest.mark.usefixtures('compiled_quickly')

M, g, hk, hv, BLOCK = 2, 2, 8, 6, 8


def one_softmax(q, keys, values, seen, scale, softcap):
  """q[H, hk], keys[S, M, hk], values[S, M, hv], seen[S] -> [H, hv], float64."""
  out = []
  for h, query in enumerate(np.asarray(q, np.float64)):
    scores = np.asarray(keys[:, h // g], np.float64) @ query * scale
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.where(seen, np.exp(scores - scores[seen].max()), 0)
    out.append(weights / weights.sum() @ np.asarray(values[:, h // g], np.float64))
  return np.stack(out)


# Blocks of 8: of one row in parts (S = 24), of several rows (S = 2), of rows whose prompts differ, of prompts that
# end inside a block or hold nothing. Large scores in one part need the largest score of both.
# Seen to fail: held one more or one less; the next slot; rows of another slot not masked; the last slot not visited;
# the longest prompt that of the first group; a window one wider; the first block of a window one too late; the largest
# score left out (t' = 0); mass not rescaled; own keys of the next row; the last own block left out.
@pytest.mark.parametrize('S', [2, 24])
@pytest.mark.parametrize('window, softcap, prompt_scale, own_scale', [
    (None, None, 1, 1), (3, 2.0, 1, 1), (9, None, 30, 1), (None, 5.0, 1, 30),
])
def test_blocks_over_prompt_and_row_are_one_softmax(S, window, softcap, prompt_scale, own_scale):
  G, R, Z, P = 2, 6, 3, 24
  normal = np.random.default_rng(S).normal
  q = normal(size=(G * R, S, M * g, hk))
  own = normal(size=(G * R, S, M, hk)) * own_scale, normal(size=(G * R, S, M, hv))
  prompt = normal(size=(G * Z, M, P, hk)) * prompt_scale, normal(size=(G * Z, M, P, hv))
  slot = np.array([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2]])
  held = np.take_along_axis(np.array([[24, 0, 13], [5, 16, 8]]), slot, axis=1)
  positions = held[:, :, None] + np.arange(S)
  rows = suffixes.Rows(*map(jnp.asarray, (slot, held, positions)), None)
  run = functools.partial(suffixes.attend, scale=0.5, window=window, softcap=softcap, block=BLOCK)
  single = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
  got = np.asarray(jax.jit(run)(single(q), single(own), single(prompt), rows))
  for n in range(G * R):
    i, r = divmod(n, R)
    z, h = i * Z + slot[i, r], held[i, r]
    keys, values = (np.concatenate([p[z].swapaxes(0, 1)[:h], o[n]]) for p, o in zip(prompt, own))
    for t in range(S):
      distance = h + t - np.arange(h + S)
      seen = (distance >= 0) & (distance < (window or h + S))
      want = one_softmax(q[n, t], keys, values, seen, 0.5, softcap)
      np.testing.assert_allclose(got[n, t], want, atol=2e-4 if max(prompt_scale, own_scale) > 1 else 1e-5)


def _shapes(P, S):
  shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
  whole = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.int32)
  rows = suffixes.Rows(whole(1, 2), whole(1, 2), whole(1, 2, S), None)
  own, prompt = (shape(2, S, M, hk), shape(2, S, M, hv)), (shape(1, M, P, hk), shape(1, M, P, hv))
  return shape(2, S, M * g, hk), own, prompt, rows


def test_no_array_of_all_scores_exists():
  run = functools.partial(suffixes.attend, scale=0.5, block=BLOCK)
  temp = lambda *sizes: jax.jit(run).lower(*_shapes(*sizes)).compile().memory_analysis().temp_size_in_bytes
  assert temp(4096, 64) - temp(64, 64) < 64 * 4096 * 4  # one head's scores of one row


def test_there_is_no_gradient():
  q, *others = _shapes(16, 8)
  total = lambda q, *others: suffixes.attend(q, *others, scale=0.5, block=BLOCK).sum()
  with pytest.raises(ValueError, match='Reverse-mode differentiation does not work'):
    jax.eval_shape(jax.grad(total), q, *others)


def drawn(vocabulary, seed=0, rows=17, held=(8, 1, 5, 0, 21)):
  rng = np.random.default_rng(seed)
  ids = lambda n: rng.integers(0, vocabulary, n).tolist()
  prompt_of = rng.integers(0, len(held), rows).tolist()
  return [ids(n) for n in held], [ids(rng.integers(1, 16)) for _ in prompt_of], prompt_of


def alone(model, params, prompts, rows, prompt_of, width=40):
  """The model itself on each whole row."""
  whole = [prompts[u] + row for u, row in zip(prompt_of, rows)]
  tokens = np.asarray([ids + [0] * (width - len(ids)) for ids in whole], np.int32)
  return np.asarray(jax.jit(model.apply)({'params': params}, tokens, lengths=np.asarray(list(map(len, whole)))))


def made(config):
  model = Transformer(config)
  return model, jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope='module')
def scalar():
  return made(tiny.model_config(head_kind='scalar'))


# Whatever the rows, their order, how many prompts are held and which others there are.
# Seen to fail: positions that begin one later, or at 0; held one less; results put back in the order of the passes;
# the last token of the padded row read; a later prompt not put in its slot; the prompt of the row before.
def test_rewards_are_those_of_whole_rows(scalar, monkeypatch):
  model, params = scalar
  prompts, rows, prompt_of = drawn(61)
  want = alone(model, params, prompts, rows, prompt_of)
  told = []
  got = Scorer(model, None, 4).rewards(params, prompts, rows, prompt_of, told.append)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
  assert sum(told) == 17 and max(told) <= 4
  programs = scoring._rewards._cache_size(), scoring._prefill._cache_size()
  other = Scorer(model, None, 4).rewards(params, prompts[::-1], rows, [4 - u for u in prompt_of])
  np.testing.assert_allclose(other, want, rtol=1e-5, atol=2e-6)
  assert programs == (scoring._rewards._cache_size(), scoring._prefill._cache_size())
  monkeypatch.setattr(scoring, '_HELD', 1)  # a wave for every two prompts
  monkeypatch.setattr(scoring, '_PREFILL', 1)
  order = np.random.default_rng(1).permutation(17)
  few = Scorer(model, None, 6).rewards(params, prompts, [rows[i] for i in order], [prompt_of[i] for i in order])
  np.testing.assert_allclose(few, want[order], rtol=1e-5, atol=2e-6)
  one = Scorer(model, None, 1).rewards(params, prompts, rows[:1], prompt_of[:1])
  np.testing.assert_allclose(one, want[:1], rtol=1e-5, atol=2e-6)


# Long enough for several blocks of prompt and row, which the others are not.
def test_rows_of_several_blocks(scalar):
  model, params = scalar
  rng = np.random.default_rng(3)
  prompts = [rng.integers(0, 61, n).tolist() for n in (150, 129)]
  rows = [rng.integers(0, 61, n).tolist() for n in (130, 5, 70)]
  want = alone(model, params, prompts, rows, (0, 1, 1), width=300)
  np.testing.assert_allclose(
      Scorer(model, None, 2).rewards(params, prompts, rows, (0, 1, 1)), want, rtol=1e-5, atol=2e-6
  )


# Seen to fail: rows in the slot before their own.
@pytest.mark.parametrize('shape', [dict(data=2, fsdp=2, tensor=2), dict(data=4, fsdp=2)], ids=['all', 'rows'])
def test_eight_devices_give_the_rewards_of_one(scalar, shape):
  model, params = scalar
  prompts, rows, prompt_of = drawn(61)
  mesh = sharding.make_mesh(shape)
  there = sharding.to_device(params, sharding.tree_shardings(params, pages.sharding().rules, mesh))
  got = Scorer(model, mesh, 8).rewards(there, prompts, rows, prompt_of)
  np.testing.assert_allclose(got, alone(model, params, prompts, rows, prompt_of), rtol=1e-5, atol=2e-6)


# Seen to fail: the window of every block that of the first; no soft-cap.
@pytest.mark.parametrize('family', ['gemma2', 'mixtral', 'deepseek_v2'])
def test_other_families(family):
  model, params = made(hf_config.read('here', families.config(family, 1, head_kind='scalar')))
  size = model.config.vocab_size
  prompts, rows, prompt_of = drawn(size, rows=6, held=(9, 3))
  want = alone(model, params, prompts, rows, prompt_of, width=24)
  got = Scorer(model, None, 4).rewards(params, prompts, rows, prompt_of)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
