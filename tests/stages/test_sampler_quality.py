"""What bfloat16 and eight bits cost the practice judge, against the learner's float32.

On 600 held-out pairs, one vote each (`python tests/stages/test_sampler_quality.py 600` prints the table again):

    sampler (dtype, matrices, cache)     |difference of logp|     greedy tokens     accuracy of one vote
                                            mean    largest         the same         drawn     greedy
    float32                               < 1e-6      8e-6            1.0            .463       .490
    bfloat16                               .0013      .10             .9992          .467       .490
    float32, int8                          .0023      .13             .9992          .458       .490
    float32, -, int8                       .0011      .11             .9991          .462       .495
    bfloat16, int8, int8                   .0029      .24             .9988          .462       .487

With 600 pairs the standard error of an accuracy is .02.
"""

import dataclasses
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax import sharding
from spct_jax.algos import outcome
from spct_jax.judges import grm
from spct_jax.stages import datasets, loading, samplers
from spct_jax.text import tokenizer as tokenizers

HERE = pathlib.Path(__file__).parent
# (dtype, weights, cache) of the sampler -> bounds: mean and largest |difference of log-probability| of drawn tokens, and
# the share of greedy tokens that are the float32 model's own.
SETTINGS = {
    ('float32', '', ''): (1e-5, 1e-4, 1.0),
    ('bfloat16', '', ''): (0.003, 0.3, 0.995),
    ('float32', 'int8', ''): (0.005, 0.3, 0.995),
    ('float32', '', 'int8'): (0.003, 0.3, 0.995),
    ('bfloat16', 'int8', 'int8'): (0.006, 0.5, 0.995),
}
TESTED = list(SETTINGS)[1], list(SETTINGS)[4]


def page(pairs):
  spec = importlib.util.spec_from_file_location('quickstart', HERE.parents[1] / 'configs' / 'quickstart.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config('seed=0')
  config.mesh.data = 1
  config.model.path = str(HERE / 'practice_base')
  config.data.path = 'made:spct_jax.data.practice:preferences?split=train&pairs=8'
  config.data.eval_path = f'made:spct_jax.data.practice:preferences?split=heldout&pairs={pairs}'
  config.data.validation_limit = 0
  config.judge.buckets, config.judge.max_new_tokens = (32,), 46
  config.judge.chunk_prompts = config.judge.chunk_tasks = 64
  return config


def measure(config, setting, pairs):
  """{logp: mean and largest difference, greedy: agreement, accuracy: of one drawn and of one greedy vote}."""
  config.model.sampler_dtype, config.model.sampler_weights, config.model.sampler_cache = setting
  tok = tokenizers.load(config.tokenizer.path)
  mesh = sharding.make_mesh({'data': 1})
  decoder = loading.model(config, tok)
  params = loading.params(config, 'base', decoder, None, mesh)
  bind = samplers.generator(config, decoder, tok, mesh, None)
  examples = datasets.load(config).heldout[:pairs]
  settings = loading.judge_settings(config, config.evaluate, orders='fixed', single='binary')
  apply, found = jax.jit(lambda params, tokens: jax.nn.log_softmax(decoder.apply({'params': params}, tokens))), {}
  for name, temperature in (('drawn', 1.0), ('greedy', 0.0)):
    judge = grm.Judge(bind('evaluate', params), tok, dataclasses.replace(settings, temperature=temperature))
    judged = grm.judge(judge, examples, samples=1, stage='evaluate')
    found[f'view of {name}'] = bind.cost['view_bytes']
    label = np.array([example.label for example in examples])
    right = outcome.correct(judged.judgments.scores, judged.judgments.valid, label, judged.judgments.response_mask)
    found[f'accuracy {name}'] = float(np.asarray(right).mean())
    off, agree = [], []
    rows = [group[0] for group in judged.grouped]
    for start in range(0, len(rows), 64):
      tokens = np.zeros((64, 78), np.int32)
      for row, one in zip(tokens, rows[start : start + 64]):
        ids = (*one.prompt_ids, *one.token_ids)
        row[: len(ids)] = ids
      logp = np.asarray(apply(params, jnp.asarray(tokens)))
      for table, one in zip(logp, rows[start : start + 64]):
        place = len(one.prompt_ids) - 1 + np.arange(len(one.token_ids))
        off += list(np.abs(table[place, one.token_ids] - np.array(one.logp)))
        agree += list(table[place].argmax(axis=-1) == one.token_ids)
    if name == 'drawn':
      found['mean'], found['most'] = float(np.mean(off)), float(np.max(off))
    else:
      found['agreement'] = float(np.mean(agree))
  return found


# Seen to fail for the reason given: keys and values in eight bits without their step; matrices rounded to four bits
# (`LARGEST = 7`).
@pytest.mark.parametrize('setting', TESTED, ids='-'.join)
def test_the_judge_is_nearly_the_float32_one(setting, compiled_quickly):
  mean, most, agreement = SETTINGS[setting]
  found = measure(page(48), setting, 48)
  assert 1e-6 < found['mean'] < mean and found['most'] < most and found['agreement'] >= agreement, found


if __name__ == '__main__':
  count = int(sys.argv[1])
  for setting in SETTINGS:
    print(setting, {k: round(v, 6) for k, v in measure(page(count), setting, count).items()})
