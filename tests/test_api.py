"""The three-line use, on a Hugging Face folder and on a workdir."""

import functools

import jax
import numpy as np
import pytest

import spct_jax
from spct_jax import sharding, types
from spct_jax.judges import expected, grm
from spct_jax.models import hf, unrolled
from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.transformer import Transformer
from spct_jax.sampling.scoring import Scorer
from spct_jax.testing.scripted import ScriptedEngine, verdict
from spct_jax.text import spellings, tokenizer
from spct_jax.train import lora, peft


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A tiny random judge with its tokenizer, as any Hugging Face folder."""
  path = tmp_path_factory.mktemp('judge')
  tok = tokenizer.load('builtin:small')
  decoder = Transformer(ModelConfig(
      vocab_size=tok.vocab_size, width=16, heads=2, kv_heads=1, head_dim=8, ffn=16,
      period=(BlockConfig(),), num_periods=1,
  ))
  hf.save(path, decoder, decoder.init(jax.random.key(0)), tok)
  return path


@pytest.fixture(scope='module')
def judge(folder):
  return spct_jax.RewardModel.load(folder, template='short', max_prompt_tokens=256, max_new_tokens=6)


def test_score_is_a_function_of_content_and_seed(judge):
  first = judge.score('What is 2 + 2?', ['4', '5'], k=3)
  again = judge.score([{'role': 'user', 'content': 'What is 2 + 2?'}], ['4', '5'], k=3)
  assert first == again and len(first.samples) == 3 and first.best is None
  assert first.scores == (0.0, 0.0) and first.samples[0].parse == 'truncated'
  texts = lambda v: [s.critique for s in v.samples]
  assert texts(judge.score('What is 2 + 2?', ['4', '5'], k=3, seed=1)) != texts(first)
  assert texts(judge.score('What is 2 + 3?', ['4', '5'], k=3)) != texts(first)
  # A sample does not depend on how many there are.
  assert texts(judge.score('What is 2 + 2?', ['4', '5'], k=2)) == texts(first)[:2]


def test_a_judge_in_eight_bits(folder):
  small = spct_jax.RewardModel.load(
      folder, template='short', max_prompt_tokens=256, max_new_tokens=6, weights='int8', cache='int8'
  )
  kernels = [leaf for path, leaf in sharding.leaf_paths(small.params) if path.endswith('kernel')]
  assert len(kernels) == 8 and all(leaf.dtype == np.int8 for leaf in kernels)
  assert len(small.score('What is 2 + 2?', ['4', '5'], k=3).samples) == 3
  with pytest.raises(ValueError, match="cache: got 'int4'"):
    spct_jax.RewardModel.load(folder, cache='int4')


def test_votes_are_summed_in_the_callers_order(judge, monkeypatch):
  # Seen to catch: scores left in the shown order.
  engine = ScriptedEngine(
      judge.tokenizer, lambda info: verdict(info, (3, 9, 5)), max_new_tokens=96
  )
  real = spct_jax.RewardModel._judge
  monkeypatch.setattr(
      spct_jax.RewardModel, '_judge',
      lambda self, k, seed: grm.Judge(engine, self.tokenizer, real(self, k, seed).settings),
  )
  found = judge.score('Which?', ['a', 'b', 'c'], k=4)
  assert found.scores == (12.0, 36.0, 20.0) and found.best == 1
  assert all(sample.scores == (3, 9, 5) for sample in found.samples)
  assert len({info.order for call in engine.calls for info in call}) > 1


def test_votes_that_stop_have_the_best_of_all_samples(judge, monkeypatch):
  # Seen to catch: `early` not handed on; the samples that were asked for counted as saved.
  def write(info):
    return verdict(info, (3 + info.sample % 3, 9, 5)) if info.sample else 'no score'

  engine = ScriptedEngine(judge.tokenizer, write, max_new_tokens=96, rows=2)
  real = spct_jax.RewardModel._judge
  monkeypatch.setattr(
      spct_jax.RewardModel, '_judge',
      lambda self, k, seed: grm.Judge(engine, self.tokenizer, real(self, k, seed).settings),
  )
  full, found = (judge.score('Which?', ['a', 'b', 'c'], k=12, early=early) for early in ('none', 'exact'))
  assert full.votes_saved == 0 and found.best == full.best == 1
  assert found.samples == full.samples[: 12 - found.votes_saved] and found.votes_saved > 2
  assert found.scores == tuple(sum(s.scores[i] for s in found.samples[1:]) for i in range(3))
  loose = judge.score('Which?', ['a', 'b', 'c'], k=12, early='statistical', early_alpha=0.5)
  assert loose.votes_saved > found.votes_saved
  with pytest.raises(ValueError, match="early: got 'exact' with one response"):
    judge.score('Good?', ['a'], early='exact')


def test_the_engine_stops_nothing_that_it_cannot_read(judge):
  found = judge.score('What is 2 + 2?', ['4', '5'], k=3, early='exact')
  assert found == judge.score('What is 2 + 2?', ['4', '5'], k=3) and found.votes_saved == 0


def test_every_sample_of_a_random_judge_votes_where_its_score_line_is_constrained(folder):
  # Seen to fail: the options not handed on; the text read to the end of its last token.
  judge = spct_jax.RewardModel.load(
      folder, template='short', max_prompt_tokens=256, max_new_tokens=20, temperature=1.0, constrain_scores=True
  )
  found = judge.score('What is 2 + 2?', ['4', '5', '6'], k=4)
  assert found.best is not None and all(sample.parse == 'ok' and len(sample.scores) == 3 for sample in found.samples)
  assert all(sample.critique.endswith('}') for sample in found.samples)
  assert len({sample.scores for sample in found.samples}) > 1
  with pytest.raises(ValueError, match='got 20 new tokens at 0 .*takes 2'):
    judge.score('Which?', list('abcde'), k=1)
  with pytest.raises(ValueError, match='a tuple of strings'):
    spct_jax.RewardModel.load(folder, stop_strings='END')


# Seen to fail: expected scores left in the order that was shown; sums of sampled scores returned.
def test_votes_by_expected_scores(judge, monkeypatch):
  engine = ScriptedEngine(judge.tokenizer, lambda info: verdict(info, (3, 9)), max_new_tokens=96)
  real = spct_jax.RewardModel._judge
  asked = lambda self, k, seed: grm.Judge(engine, self.tokenizer, real(self, k, seed).settings)
  monkeypatch.setattr(spct_jax.RewardModel, '_judge', asked)
  found = judge.score('Which?', ['a', 'b'], k=4, expected=True, uid='x')
  example = types.Example(uid='x', messages=(types.Message('user', 'Which?'),), responses=('a', 'b'))
  (drawn,) = grm.judge(asked(judge, 4, 0), [example], samples=4, stage='score').grouped
  assert len({t.order for t in drawn}) == 2
  shown = expected.of(
      functools.partial(Scorer(judge.decoder, None, 1).masses, jax.device_put(judge.params, jax.devices()[0])), drawn,
      [(1, 10)] * 4, spelling=spellings.of(judge.tokenizer), temperature=judge.temperature,
  )
  want = np.asarray([np.asarray(one.scores)[np.argsort(t.order)] for one, t in zip(shown, drawn)])
  np.testing.assert_allclose([sample.expected for sample in found.samples], want, rtol=1e-4)
  np.testing.assert_allclose(found.scores, want.sum(axis=0), rtol=1e-4)
  assert found.samples[0].scores == (3, 9) and found.best == np.argmax(want.sum(axis=0))


@pytest.mark.parametrize(
    ('query', 'responses', 'k', 'message'),
    [
        ('q', [], 8, 'one or more strings'),
        ('q', 'one string', 8, 'one or more strings'),
        ([{'role': 'assistant', 'content': 'hello'}], ['a'], 8, 'end with the user'),
        ('q', ['a'], 0, 'k: got 0'),
        ('q', ['long ' * 400], 1, 'over 256 tokens'),
    ],
)
def test_bad_calls_are_refused(judge, query, responses, k, message):
  with pytest.raises(ValueError, match=message):
    judge.score(query, responses, k=k)


def test_a_folder_without_a_judge_is_refused(tmp_path):
  with pytest.raises(ValueError, match='no folder'):
    spct_jax.RewardModel.load(tmp_path / 'nothing')
  (tmp_path / 'config.json').write_text('{"pipeline": {}, "judge": {}, "tokenizer": {}}')
  with pytest.raises(ValueError, match='finished: none'):
    spct_jax.RewardModel.load(tmp_path)


def test_a_folder_of_two_models_is_refused(folder, tmp_path):
  # Seen to fail: no look at the sizes (an id beyond the table is NaN).
  decoder = Transformer(ModelConfig(
      vocab_size=100, width=16, heads=2, kv_heads=1, head_dim=8, ffn=16, period=(BlockConfig(),), num_periods=1,
  ))
  hf.save(tmp_path / 'small', decoder, decoder.init(jax.random.key(0)))
  tokenizer.load(folder).save(tmp_path / 'small')
  with pytest.raises(ValueError, match='its tokenizer has 2048 tokens, but the model embeds 100'):
    spct_jax.RewardModel.load(tmp_path / 'small')


def test_adapters_are_merged_into_the_base_that_they_name(folder, tmp_path):
  # Seen to fail: the adapters left out.
  decoder, base = hf.load(folder)
  adapted = lora.Adapted(decoder, lora.Settings(rank=2, alpha=4.0, targets=('q', 'down'), rslora=False))
  leaves, structure = jax.tree.flatten(adapted.init(jax.random.key(0)))
  drawn = [jax.random.normal(jax.random.key(number), leaf.shape) for number, leaf in enumerate(leaves)]
  adapters = jax.tree.unflatten(structure, drawn)
  peft.save(tmp_path / 'adapters', adapted, adapters, base=folder)
  judge = spct_jax.RewardModel.load(tmp_path / 'adapters', max_new_tokens=4)
  want, base = (unrolled.params(decoder.config, tree) for tree in (lora.merge(base, adapters, adapted.settings), base))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), judge.params, want)
  kernel = lambda params: np.asarray(params['head']['0']['q']['kernel'])
  assert np.abs(kernel(judge.params) - kernel(base)).max() > 0.1

  config = tmp_path / 'adapters' / 'adapter_config.json'
  config.write_text(config.read_text().replace(str(folder), 'an-organisation/a-model'))
  with pytest.raises(ValueError, match='no such folder'):
    spct_jax.RewardModel.load(tmp_path / 'adapters')
