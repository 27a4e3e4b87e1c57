"""General instruction data at the evaluation: teacher forcing equals greedy decoding, sums are over tokens.

Mutations seen to fail here: the target one place off; the last completion token (end of sequence) not looked at;
one right token enough; the prompt's tokens counted; a mean of the rows' means; rows put back in another order;
parts that training does not learn left out; the source not among what the stage reads.
"""

import json
import math
import types

import jax
import numpy as np
import pytest

from spct_jax import records, sharding
from spct_jax.data import instructions
from spct_jax.sampling.engine import Engine
from spct_jax.stages import general, sft
from spct_jax.testing import scripted, tiny
from spct_jax.text import tokenizer as tokenizers
from spct_jax.train import batches, objectives
from spct_jax.types import PromptBatch, Tasks

EOS = (3, 17, 40)
MODEL = tiny.small_model()
MESH = sharding.make_mesh({'data': 1})


@pytest.fixture(scope='module')
def params():
  return jax.jit(MODEL.init)(jax.random.key(3))


def greedy(params, prompts, *, length):
  """What the engine writes at temperature 0: the token ids of each prompt."""
  engine = Engine(
      model=MODEL, mesh=None, cache_rules=tiny.RULES, rows=4, max_new_tokens=length, eos_ids=EOS, seed=0, stage='x'
  )
  size, width = len(prompts), max(map(len, prompts))
  tokens = np.zeros((size, width), np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, : len(prompt)] = prompt
  count = np.arange(size, dtype=np.int32)
  zeros = np.zeros(size, np.float32)
  rolled = engine.generate(
      params,
      PromptBatch(tokens, np.asarray([len(p) for p in prompts], np.int32), np.ones(size, bool)),
      Tasks(
          prompt=count, uid=np.zeros((size, 2), np.uint32), visit=0 * count, sample=count, temperature=zeros,
          top_p=zeros + 1, top_k=0 * count, min_p=zeros, row_mask=np.ones(size, bool),
      ),
  )  # fmt: skip
  return [tuple(row[mask].tolist()) for row, mask in zip(rolled.tokens, rolled.token_mask)]


@pytest.mark.parametrize('chunk', [0, 5])
def test_teacher_forcing_says_what_greedy_decoding_would_write(params, chunk):
  rng = np.random.default_rng(0)
  prompts = [tuple(rng.integers(1, 61, n).tolist()) for n in rng.integers(1, 9, 120)]
  written = greedy(params, prompts, length=6)
  targets = []
  for i, tokens in enumerate(written):
    place = i % (len(tokens) + 1)  # one token changed: the first, ..., the last, or none
    targets.append(tuple((t + 1) % 61 if j == place else t for j, t in enumerate(tokens)))
  ended = [tokens for tokens in written if tokens[-1] in EOS]
  same = [target == tokens for target, tokens in zip(targets, written)]
  assert ended and 10 < sum(same) < 110
  rows = [batches.Row(str(i), p, t) for i, (p, t) in enumerate(zip(prompts, targets))]
  batch = batches.pad(rows, num_rows=128, buckets=(16,), pad_id=0, columns={})
  nll, exact = objectives.completion_scores(MODEL, MESH, chunk=chunk)(params, batch)
  assert np.asarray(exact)[:120].tolist() == same
  logits = np.asarray(jax.jit(MODEL.apply)({'params': params}, batch['tokens']), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for i, row in enumerate(rows):
    start = len(row.prompt_ids) - 1
    wanted = -sum(logp[i, start + j, t] for j, t in enumerate(row.completion_ids))
    assert nll[i] == pytest.approx(wanted, abs=1e-3)


def test_a_summary_divides_the_sum_by_the_tokens():
  row = lambda exact, nll, tokens: {'exact': exact, 'nll': nll, 'tokens': tokens}
  told = general.summary([row(True, 1.0, 1), row(False, 1.0, 9), row(False, 4.0, 5)])
  assert told['nll'] == pytest.approx(6 / 15) and told['tokens'] == 15 and told['items'] == 3
  assert told['exact'] == pytest.approx(1 / 3) and told['low'] < 1 / 3 < told['high']
  assert general.summary([row(True, None, 1), row(True, 1.0, 1)])['nll'] is None


SOURCE = [
    {'prompt': f'Say {word} {i} times.', 'completion': ' '.join([word] * i)}
    for i, word in ((5, 'five'), (1, 'one'), (4, 'four'), (2, 'two'), (3, 'three'))
]  # not by length, as the batches are
PARTS = {  # an answer of which training learns the second part only: all of it counts here
    'messages': [
        {'role': 'user', 'content': 'And six?'},
        {'role': 'assistant', 'content': [
            {'type': 'text', 'text': 'well well', 'train': False}, {'type': 'text', 'text': ' six', 'train': True}
        ]},
    ]
}  # fmt: skip
LONG = {'id': 'novel', 'prompt': 'Tell me everything.', 'completion': 'word ' * 2000}


@pytest.fixture
def evaluated(run, config, tmp_path):
  """The evaluation of a random base on six rows and one that is too long."""
  path = tmp_path / 'general.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in [LONG, *SOURCE, PARTS]))
  config.evaluate.instructions, config.evaluate.meta, config.evaluate.meta_batch = str(path), '', 4
  config.evaluate.models, config.evaluate.names = ('base',), ('fresh',)
  config.data.instructions = str(tmp_path / 'trained.jsonl')
  (tmp_path / 'trained.jsonl').write_text(json.dumps(SOURCE[2]) + '\n')
  go = lambda: run(lambda info: scripted.verdict(info, (9, 3, 1)[: len(info.order)]), stage='evaluate')
  return types.SimpleNamespace(path=go(), source=path, again=go)


def test_the_stage_writes_each_model_on_rows_of_its_own(evaluated, config):
  from spct_jax.stages import loading
  rows = list(records.read_jsonl(evaluated.path / 'evaluate' / 'base-instructions.jsonl'))
  tok = tokenizers.load(config.tokenizer.path)
  wanted = sft.rows(instructions.load(evaluated.source), tok, tuple(config.sft.buckets), what='sft', strict=False)
  lm = loading.model(config, tok)
  params = loading.params(config, 'base', lm, None, sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}))
  assert [row['uid'] for row in rows] == [row.name for row in wanted] and len(rows) == 6
  total = tokens = 0
  for row, one in zip(rows, wanted):
    ids = np.asarray([one.prompt_ids + one.completion_ids])
    logits = np.asarray(jax.jit(lm.apply)({'params': params}, ids)[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    start = len(one.prompt_ids)
    nll = -sum(logp[t - 1, ids[0, t]] for t in range(start, ids.shape[1]))
    assert row['nll'] == pytest.approx(nll, rel=1e-4)
    assert row['tokens'] == len(one.completion_ids) and one.completion_ids[-1] == tok.eos_ids[0]
    assert row['exact'] == all(logits[t - 1].argmax() == ids[0, t] for t in range(start, ids.shape[1]))
    total, tokens = total + nll, tokens + row['tokens']
  (told,) = json.loads((evaluated.path / 'evaluate' / 'instructions.json').read_text())
  assert told['stage'] == 'fresh' and told['items'] == 6 and told['tokens'] == tokens
  assert told['nll'] == pytest.approx(total / tokens, rel=1e-4) and math.isfinite(told['nll'])


def test_the_report_and_the_results_keep_it_apart(evaluated):
  report = (evaluated.path / 'report.md').read_text()
  assert '| fresh | 0.0 |' in report.partition('## General instruction data')[2]
  assert {row['benchmark'] for row in json.loads((evaluated.path / 'results.json').read_text())} == {'plain'}
  skipped = json.loads((evaluated.path / 'skipped.json').read_text())
  assert [names for reason, names in skipped.items() if 'sft.buckets' in reason] == [['novel']]
  assert '1 evaluated instruction row can be in the training data' in report


def test_a_changed_source_is_measured_again(evaluated, capsys):
  evaluated.again()
  assert 'evaluate: done before' in capsys.readouterr().out
  evaluated.source.write_text(json.dumps(SOURCE[0]) + '\n')
  (told,) = json.loads((evaluated.again() / 'evaluate' / 'instructions.json').read_text())
  assert told['items'] == 1
