"""GRPO with a truncated sampler and replay: its own engine, two devices, the small base of the practice world."""

import json
import pathlib

import pytest

from spct_jax import sharding, stages
from spct_jax.stages import budget, loading, workdir
from spct_jax.types import Kept, Trajectory

pytestmark = pytest.mark.usefixtures('compiled_quickly')

BASE = pathlib.Path(__file__).parent / 'practice_base'


@pytest.fixture
def page(quickstart):
  config = quickstart('smoke')
  config.model.path = str(BASE)
  config.data.validation_limit = config.grpo.validate_every = 0
  config.grpo.init, config.grpo.drop_too_easy = 'base', False
  config.grpo.steps, config.grpo.updates, config.grpo.checkpoint_every = 2, 2, 2
  config.grpo.top_p, config.grpo.replay_kept = 0.9, 3
  config.logging.tensorboard = False
  return config


def train(config, path):
  with workdir.open_workdir(path, config) as opened:
    stages.RUN['grpo'](config, opened, sharding.make_mesh(dict(data=2, fsdp=1, tensor=1)))
  return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


# Seen to fail when the batch gets the sampler's full log-probabilities, when the learner's
# log-probabilities are over the full vocabulary, and when the cap cuts at every step (`kept_capped` of 1).
@pytest.mark.slow
def test_grpo_replays_what_its_sampler_drew_from(page, tmp_path, capsys):
  rows = train(page, tmp_path / 'w')
  assert len(rows) == 2
  for row in rows:  # metrics are of the first update after a rollout
    assert abs(row['ratio'] - 1) < 1e-5 and row['logp_gap_max'] < 1e-4
    assert 0.5 < row['kept_mass'] < 0.9999 and row['kept_tokens'] > 1 and 0 < row['kept_capped'] < 0.5
    assert row['skipped'] == 0
  assert rows[1]['kl'] > 0 == round(rows[0]['kl'], 6)  # the policy has moved
  assert 'biased' not in capsys.readouterr().out


def test_the_memory_of_the_record_is_told_and_a_bias_too(page, tmp_path, capsys):
  tok, mesh = loading.tokenizer(page), sharding.make_mesh(dict(data=2, fsdp=1, tensor=1))
  table = {row.name: row.bytes for row in budget.rows(page, mesh, 'grpo', tok)}
  assert table['record of kept tokens'] == 32 // 2 * 78 * 3 * 4  # chunk_tasks, T, ids of 4 bytes
  assert table['kept tokens of a batch'] == 16 // 2 * 128 * 3 * 4
  page.grpo.replay_kept, page.grpo.steps, page.grpo.schedule, page.grpo.warmup_steps = 0, 0, 'constant', 0
  assert 'record of kept tokens' not in {row.name for row in budget.rows(page, mesh, 'grpo', tok)}
  with workdir.open_workdir(tmp_path / 'w', page) as opened:
    stages.RUN['grpo'](page, opened, mesh)
  assert 'importance ratios are biased; grpo.replay_kept=64' in capsys.readouterr().out


def test_sizes_of_the_kept_sets():
  one = lambda kept: Trajectory('u', 0, 0, (0, 1), False, (5,), (8,) * 3, (-1.0,) * 3, '', None, 'count', kept)
  some = Kept(ids=((8,),) * 3, logp=(0.0,) * 3, count=(1, 9, 2))
  sizes = stages.grpo.kept_sizes(((one(some), one(some)), ()), cap=4)
  assert sizes == {'kept_tokens': 4.0, 'kept_capped': pytest.approx(1 / 3)}
  assert stages.grpo.kept_sizes(((), ()), cap=4) == {'kept_tokens': 0.0, 'kept_capped': 0.0}
