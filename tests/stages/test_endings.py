"""Options of use, in an evaluation by the engine itself; what is trained on is drawn without them."""

import dataclasses
import json

import pytest

from spct_jax import sharding, stages
from spct_jax.judges import endings, grm
from spct_jax.stages import checks, loading, pipeline, workdir


@pytest.fixture
def page(small_config):
  page = small_config
  page.judge.max_new_tokens = 24
  page.evaluate.models, page.evaluate.meta, page.evaluate.greedy = ('base',), '', False
  page.evaluate.samples, page.evaluate.ks, page.evaluate.temperature = 2, (1, 2), 1.0
  page.evaluate.constrain_scores = True
  return page


# Seen to fail: the options left out of the stage's settings; a chunk with fewer kinds of score lines of its own.
def test_an_evaluation_of_constrained_lines_has_no_parse_failure(page, tmp_path, compiled_quickly):
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1})
  with workdir.open_workdir(tmp_path / 'w', page) as opened:
    stages.RUN['evaluate'](page, opened, mesh)
  rows = json.loads((tmp_path / 'w' / 'results.json').read_text())
  assert rows and all(row['parse_failure'] == 0 for row in rows)
  drawn = [json.loads(line) for line in (tmp_path / 'w' / 'evaluate' / 'base.jsonl').read_text().splitlines()]
  assert len(drawn) == 8 and all(row['parse'] == 'ok' and row['text'].endswith('}') for row in drawn)
  assert {len(row['scores']) for row in drawn} == {2, 3}  # one table for items of two and of three responses


def test_stages_that_draw_to_learn_refuse_such_options(page):
  # Seen to fail: settings that read the evaluation's fields in every stage.
  names = {'stop_strings', 'stop_at_scores', 'constrain_scores'}
  assert loading.judge_endings(page) == dataclasses.replace(endings.NONE, constrain_scores=True)
  for stage in ('sample', 'grpo', 'meta_rm'):
    assert names.isdisjoint(page[stage].keys()) and names <= set(page.evaluate.keys())
    settings = loading.judge_settings(page, page[stage], orders='shuffle', single='binary')
    assert isinstance(settings, grm.Settings) and settings.ends == endings.NONE
    page[stage].stop_at_scores = False
    with pytest.raises(ValueError, match=f'{stage}.stop_at_scores: judgements to learn from are drawn as the model'):
      checks.sampling(page, stage)


def test_a_limit_that_the_longest_score_line_does_not_fit_into_is_said_before_work_starts(page, tmp_path):
  # Seen to fail: only the line of a single response looked at; the engine then said so in the middle of the stage.
  page.judge.max_new_tokens, page.evaluate.models = 15, ('base',)  # one of the items has three responses
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1})
  with workdir.open_workdir(tmp_path / 'w', page) as opened:
    for start in (
        lambda: stages.RUN['evaluate'](page, opened, mesh), lambda: pipeline.check(('evaluate',), page, opened, mesh)
    ):
      with pytest.raises(ValueError, match='a score line of 3 responses takes up to 16 tokens, the limit is 15'):
        start()
    assert not (tmp_path / 'w' / 'evaluate').exists()
