"""Validation items: where they come from, what GRPO says of them, and that a killed run says the same.

Mutations seen to fail here: validation under the step as its visit; under the stage name of the rollouts; validation
after the step in place of before it; the last validation left out; the row behind the last checkpoint kept on resume;
ties credited as Eq 10 does; items of one prompt on both sides; contamination by the held-out items not looked for.
"""

import json

import jax
import numpy as np
import pytest

from spct_jax import records, sharding, stages
from spct_jax.data import heldout
from spct_jax.judges import grm
from spct_jax.sampling import keys, loop
from spct_jax.stages import datasets, figures, grpo, loading, samplers, workdir
from spct_jax.testing import scripted
from spct_jax.text import tokenizer as tokenizers

WATCHED = [
    {'id': 'v0', 'prompt': 'Watched pair?', 'responses': ['good', 'bad'], 'label': 0},
    {'id': 'v1', 'prompt': 'Watched triple?', 'responses': ['bad', 'poor', 'good'], 'label': 2},
    {'id': 'v2', 'prompt': 'Watched alone?', 'responses': ['right'], 'label': 1},
]
SAID = {  # two samples each: scores in the item's own order, principles, and the analysis; None does not parse
    'v0': [((9, 3), 'Truth (60%), Tone (40%)', 'read'), ((5, 5), 'tone (50%), truth (50%)', 'read')],
    'v1': [((1, 2, 9), 'Truth (50%), truth (50%)', 'read'), None],
    'v2': [((1,), 'Truth', 'at a glance'), ((0,), 'Tone', 'read')],
}


class Killed(BaseException):
  pass


def script(info):
  if info.uid in SAID:
    told = SAID[info.uid][info.sample]
    if told is None:
      return 'I like it.'
    scores, principles, analysis = told
    shown = ', '.join(str(scores[response]) for response in info.order)
    return f'Specific Criteria: {principles}\nAnalysis: {analysis}\nScores: \\boxed{{{shown}}}'
  mark = (int(info.uid[1:]) * 3 + info.sample * 5 + info.visit * 11) % 10 + 1
  return scripted.verdict(info, (mark, (mark + 3) % 10 + 1))


@pytest.fixture
def config(config, files):
  path = files / 'watched.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in WATCHED))
  config.data.validation_path, config.data.validation_limit = str(path), 8
  config.grpo.init, config.grpo.drop_too_easy = 'base', False
  config.grpo.steps, config.grpo.checkpoint_every = 3, 2
  config.grpo.validate_every, config.grpo.validate_samples = 2, 2
  config.trackers.patterns = {'careless': 'at a glance'}
  return config


@pytest.fixture
def train(config, tmp_path):
  """`train(on_task, folder)`: GRPO alone; returns the workdir and, for each call of the engine, (stage, infos)."""
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1})
  tok = tokenizers.load(config.tokenizer.path)

  def go(on_task=lambda stage, info: None, folder='w'):
    seen = []

    def bind(stage, params):
      def answer(info):
        on_task(stage, info)
        return script(info)

      engine = scripted.ScriptedEngine(tok, answer, max_new_tokens=config.judge.max_new_tokens)

      def generate(prompts, tasks, infos):
        seen.append((stage, infos))
        return engine(prompts, tasks, infos)

      return generate

    with workdir.open_workdir(tmp_path / folder, config) as opened:
      stages.RUN['grpo'](config, opened, mesh, bind)
    return tmp_path / folder, seen

  return go


def near(value):
  return pytest.approx(value, abs=1e-6)


def test_to_the_digit(train, config):
  config.logging.tensorboard = True
  path, seen = train()
  rows = list(records.read_jsonl(path / 'metrics.jsonl'))
  assert [row['step'] for row in rows] == [0, 1, 2, 3]
  assert ['validation/accuracy' in row for row in rows] == [True, False, True, True]
  assert ['reward' in row for row in rows] == [True, True, True, False]

  tok = tokenizers.load(config.tokenizer.path)
  asked = [info for stage, infos in seen if stage == grpo.VALIDATE for info in infos][:6]
  length = np.mean([len(tok.encode_data(script(info))) + 1 for info in asked])
  wanted = {
      'accuracy': (0.75 + 0.5 + 0.5) / 3,  # a tie of two earns a half
      'stderr': np.std([0.75, 0.5, 0.5], ddof=1) / 3**0.5,
      'correct': 3 / 6,
      'ties': 1 / 3,  # of the parsed judgements of several responses
      'parse_failure': 1 / 6,
      'output_length': length,
      'pattern_careless': 1 / 6,
      'principles_found': 5 / 6,
      'principles_repeated': 1 / 5,
      'principle_sets': (1 + 1 + 2) / 3,
      'principle_sets_of': 2,
  }
  for row in (rows[0], rows[2], rows[3]):
    found = {name: value for name, value in row.items() if name.startswith('validation/')}
    assert found == {f'validation/{name}': near(value) for name, value in wanted.items()}
  for row in rows[:3]:  # the rollouts of training are watched too; all write the same two principles
    assert (row['principle_sets'], row['principle_sets_of'], row['principles_found']) == (1, config.grpo.group, 1)
    assert row['principles_repeated'] == row['pattern_careless'] == 0

  timing = list(records.read_jsonl(path / 'timing.jsonl'))
  assert [row['step'] for row in timing if 'validation_seconds' in row] == [0, 2, 3]
  board = b''.join(file.read_bytes() for file in (path / 'tensorboard' / 'grpo').iterdir())
  for name in ('validation/accuracy', 'pattern_careless', 'principle_sets', 'principles_repeated', 'ties'):
    assert name.encode() in board
  names = figures._scalar_names(rows)
  assert names.index('validation/accuracy') < 6
  assert figures.training_curves(path / 'curves.png', rows)


def test_each_validation_is_the_same_draw_and_none_is_a_rollout(train, config):
  _, seen = train()
  by_stage = {name: [infos for stage, infos in seen if stage == name] for name in ('grpo', grpo.VALIDATE)}
  assert len(by_stage['grpo']) + len(by_stage[grpo.VALIDATE]) == len(seen)
  # Validation, step 0, step 1, validation, step 2, validation.
  calls = [stage == grpo.VALIDATE for stage, _ in seen]
  assert calls == [True, False, False, True, False, True]
  first, *others = by_stage[grpo.VALIDATE]
  assert others == [first, first]
  examples = {e.uid: e for e in datasets.load(config).validation}
  settings = loading.judge_settings(config, config.grpo, orders='group', single='binary')
  for info in first:
    orders = grm.item_orders(examples[info.uid], settings=settings, stage=grpo.VALIDATE, visit=0, samples=2)
    assert info.order == orders[info.sample] and info.visit == 0
  assert {info.uid for info in first} == set(SAID)
  assert not {info.uid for infos in by_stage['grpo'] for info in infos} & set(SAID)


def test_no_other_stage_has_its_keys():
  uid = np.asarray([[1, 2]], np.uint32)
  told = {
      tuple(np.asarray(jax.random.key_data(keys.task_keys(0, stage, uid, np.zeros(1, int), np.zeros(1, int))))[0])
      for stage in (grpo.VALIDATE, *stages.RUN, 'greedy')
  }
  assert len(told) == 2 + len(stages.RUN)


def test_killed_at_any_moment_it_ends_in_the_same_bytes(train, config, monkeypatch):
  config.grpo.validate_every = 1
  whole, _ = train(folder='whole')
  expected = (whole / 'metrics.jsonl').read_bytes()
  metrics = whole.parent / 'killed' / 'metrics.jsonl'

  def dying(last):
    count = {'grpo': 0, grpo.VALIDATE: 0}

    def on_task(stage, info):
      count[stage] += 1
      if (stage, count[stage]) == last:
        raise Killed

    return on_task

  def killed(*args):
    raise Killed

  # In the rollouts of step 1, with no checkpoint yet; in the validation before step 2, with one; from there on, in the
  # validation after the last step.
  group = config.grpo.batch * config.grpo.group
  for last in (('grpo', group + 5), (grpo.VALIDATE, 2 * 6 + 5), (grpo.VALIDATE, 6 + 5)):
    with pytest.raises(Killed):
      train(dying(last), folder='killed')
    assert metrics.read_bytes() != expected
  # After the last row is written, and before the stage is done.
  with monkeypatch.context() as patch:
    patch.setattr(workdir.Workdir, 'mark_done', killed)
    with pytest.raises(Killed):
      train(folder='killed')
  assert metrics.read_bytes() == expected
  train(folder='killed')
  assert metrics.read_bytes() == expected


def test_no_step_is_validated_once(train, config):
  config.grpo.steps = 0
  path, seen = train()
  (row,) = records.read_jsonl(path / 'metrics.jsonl')
  assert row['step'] == 0 and row['validation/accuracy'] == near(7 / 12) and len(seen) == 1


def test_the_progress_line_is_short_and_leaves_out_what_is_unknown():
  row = {'reward': -0.5, 'kl': 0.1, 'parse_failure': 0.0, 'ties': 0.25, 'loss': 1.0, 'pattern_careless': 0.5}
  assert grpo._shown(row, validation=None) == {
      'reward': -0.5, 'kl': 0.1, 'parse_failure': 0.0, 'ties': 0.25, 'careless': 0.5
  }
  full = grpo._shown(row | {'principle_sets': 3.5, 'principles_repeated': 0.0}, validation=0.75)
  assert list(full) == ['reward', 'kl', 'parse_failure', 'ties', 'validation', 'careless', 'sets', 'repeated']


def test_without_validation_items_nothing_moves(config):
  config.data.validation_limit, config.grpo.validate_every = 0, 0
  data = datasets.load(config)
  assert [e.uid for e in data.train] == [f't{i}' for i in range(6)] and data.validation == ()
  assert config.data.validation_path not in datasets.reads(config)


def test_items_of_a_file_are_read_and_what_is_shared_is_named(config, files):
  assert [e.uid for e in datasets.load(config).validation] == ['v0', 'v1', 'v2']
  assert config.data.validation_path in datasets.reads(config)
  extra = [
      {'id': 'x0', 'prompt': 'question  3?', 'responses': ['a', 'b'], 'label': 0},  # of the training items
      {'id': 'x1', 'prompt': 'ALL right?', 'responses': ['a', 'b'], 'label': 0},  # of the evaluated items
      {'id': 'x2', 'prompt': 'Nobody knows?', 'responses': ['a', 'b']},
  ]
  (files / 'watched.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in [*WATCHED, *extra]))
  data = datasets.load(config)
  assert [e.uid for e in data.validation] == ['v0', 'v1', 'v2', 'x0', 'x1']
  assert set(data.validation_contaminated) == {'x0', 'x1'} and data.contaminated == ()
  assert data.skipped['no label'] == ['x2']
  assert len(data.train) == 6 and len(data.heldout) == 4
  config.data.validation_limit = 2
  assert [e.uid for e in datasets.load(config).validation] == ['v0', 'v1']


def test_items_are_taken_from_training_by_prompt_and_seed(config, files):
  config.data.validation_path = ''
  rows = [
      {'id': f't{i}', 'prompt': f'Question {i // 2}?', 'responses': [f'a{i}', 'b'], 'label': 0} for i in range(40)
  ]
  (files / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  config.data.limit = 0
  seen = {}
  for seed in (0, 1):
    config.seed = seed
    data = datasets.load(config)
    assert data == datasets.load(config)
    prompts = lambda examples: {heldout.prompt_key(e) for e in examples}
    assert len(data.validation) == 8 and len(prompts(data.validation)) == 4
    assert not prompts(data.train) & prompts(data.validation) and data.validation_contaminated == ()
    assert sorted(e.uid for e in (*data.train, *data.validation)) == sorted(row['id'] for row in rows)
    seen[seed] = {e.uid for e in data.validation}
  assert seen[0] != seen[1]
  config.data.validation_limit = 7  # prompts stay whole
  assert len(datasets.load(config).validation) == 6
  # Where the held-out part is split off too, none of it is among them.
  config.data.eval_path, config.data.heldout = '', 0.3
  data = datasets.load(config)
  assert not prompts(data.heldout) & prompts(data.validation) and len(data.validation) == 6


def test_validation_compiles_nothing_anew_and_draws_other_tokens(config):
  config.judge.max_new_tokens = 8
  tok = tokenizers.load(config.tokenizer.path)
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1})
  decoder = loading.model(config, tok)
  params = loading.params(config, 'base', decoder, None, mesh)
  bind = samplers.generator(config, decoder, tok, mesh, None)
  settings = loading.judge_settings(config, config.grpo, orders='group', single='binary')
  data = datasets.load(config)
  drawn, sizes = {}, []
  for stage, examples in (('grpo', data.train[:4]), (grpo.VALIDATE, data.train[:2]), (grpo.VALIDATE, data.train[:2])):
    judged = grm.judge(grm.Judge(bind(stage, params), tok, settings), examples, samples=2, stage=stage)
    drawn.setdefault(stage, []).append([t.token_ids for group in judged.grouped for t in group])
    sizes.append([program._cache_size() for program in (loop.start, loop.advance)])
  assert sizes[0] == sizes[1] == sizes[2]
  assert drawn[grpo.VALIDATE][0] == drawn[grpo.VALIDATE][1] and drawn[grpo.VALIDATE][0] != drawn['grpo'][0][:4]
