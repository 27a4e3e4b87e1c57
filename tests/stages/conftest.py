"""A tiny pipeline that a scripted engine answers: two files, six training and four evaluated items."""

import importlib.util
import json
import pathlib

import pytest

from spct_jax import sharding
from spct_jax.stages import workdir
from spct_jax.testing import scripted
from spct_jax.text import tokenizer as tokenizers

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / 'configs'

TRAIN = [
    {'id': f't{i}', 'prompt': f'Question {i}?', 'responses': ['the first answer', 'the second one'], 'label': i % 2}
    for i in range(6)
]
EVAL = [
    {'id': 'e0', 'prompt': 'All right?', 'responses': ['good', 'bad'], 'label': 0, 'subset': 'pairs'},
    {'id': 'e1', 'prompt': 'Sometimes right?', 'responses': ['bad', 'good'], 'label': 1, 'subset': 'pairs'},
    {'id': 'e2', 'prompt': 'Half of it unreadable?', 'responses': ['good one', 'bad'], 'label': 0, 'subset': 'pairs'},
    {'id': 'e3', 'prompt': 'Always a tie?', 'responses': ['bad', 'good', 'ugly'], 'label': 1, 'subset': 'triples'},
]


def load_page(name: str, arg: str):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  page = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(page)
  return page.get_config(arg)


@pytest.fixture
def quickstart():
  """`quickstart(choices)` -> the quickstart's page."""
  return lambda arg: load_page('quickstart', arg)


@pytest.fixture
def files(tmp_path):
  """The two JSONL files."""
  for name, rows in (('train', TRAIN), ('eval', EVAL)):
    (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return tmp_path


@pytest.fixture
def config(files):
  """spct_small:smoke on those files, starting from the random base without the warm start."""
  page = load_page('spct_small', f'smoke,data=plain,path={files / "train.jsonl"}')
  with page.unlocked():
    page.data.eval_path = str(files / 'eval.jsonl')
    page.data.eval_reader = 'plain'
    page.data.eval_limit = 0
    page.data.validation_limit = page.grpo.validate_every = 0  # six items to train on; tests of validation bring a file
    page.pipeline.stages = ('sample', 'rft', 'grpo', 'meta_rm', 'evaluate')
    page.sample.model = page.rft.init = 'base'
    page.judge.max_new_tokens = 96
    page.rft.steps = page.grpo.steps = page.meta_rm.steps = 2
    page.model.remat, page.rft.microbatches, page.grpo.microbatches, page.meta_rm.microbatches = False, 1, 1, 1
    page.rft.buckets = page.grpo.buckets = page.meta_rm.buckets = (384,)
    page.judge.buckets = (256,)
    page.evaluate.models = ('base', 'grpo')
    page.grpo.old_logp = 'learner'  # a script has no log-probabilities
    page.logging.tensorboard = False
  return page


@pytest.fixture
def small_config(config):
  """`config` with the smallest decoder, for tests that make several."""
  config.model.width, config.model.head_dim, config.model.ffn, config.model.num_periods = 16, 4, 16, 1
  return config


@pytest.fixture
def run(config, tmp_path):
  """`run(script, stage='pipeline', folder='w')` with the scripted engine; returns the workdir's path."""
  from spct_jax import stages
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1})
  tok = tokenizers.load(config.tokenizer.path)

  def go(script, stage='pipeline', folder='w'):
    engine = scripted.ScriptedEngine(tok, script, max_new_tokens=config.judge.max_new_tokens)
    with workdir.open_workdir(tmp_path / folder, config) as opened:
      stages.RUN[stage](config, opened, mesh, lambda name, params: engine)
    return tmp_path / folder

  return go
