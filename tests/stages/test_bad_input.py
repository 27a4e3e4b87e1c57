"""What a person gets wrong in a config or a file: a ValueError with what, got, allowed and remedy, and no work done.

Each row of the tables goes through the pipeline, whose door must find it before a parameter is made, and, where
one stage is to blame, through that stage alone. The engine factory fails the test if it is asked for anything.

Mutations seen to fail here: a check of `checks.py` taken out (k_meta, group, meta_batch, names of models); the
instruction file looked at in its first row only; over-long items left to the stage that meets them; every stage's
files counted as written before the first; `withdraw` doing nothing; `sample.require` letting all pass; a negative
`data.eval_limit` cutting the last items off; a message on `top_p` or a schedule that does not say whose.
"""

import importlib.util
import json
import pathlib

import pytest

from spct_jax import records, sharding, stages
from spct_jax.stages import fit, loading, workdir
from spct_jax.testing import scripted
from spct_jax.text import tokenizer as tokenizers

_PAGE = pathlib.Path(__file__).resolve().parents[2] / 'configs' / 'spct_small.py'
_ONE = {'data': 1, 'fsdp': 1, 'tensor': 1}
_TWO = {'data': 2, 'fsdp': 1, 'tensor': 1}


def item(name, **fields):
  return {'id': name, 'prompt': f'Question {name}?', 'responses': ['one answer', 'another'], 'label': 0} | fields


def lines(*rows):
  return ''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows)


GOOD = {
    'train.jsonl': lines(*(item(f't{i}') for i in range(4))),
    'eval.jsonl': lines(*(item(f'e{i}') for i in range(2))),
}


@pytest.fixture
def folder(tmp_path):
  for name, text in GOOD.items():
    (tmp_path / name).write_text(text)
  return tmp_path


@pytest.fixture
def config(folder):
  """spct_small:smoke on two good files, all six stages."""
  spec = importlib.util.spec_from_file_location('page', _PAGE)
  page = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(page)
  found = page.get_config(f'smoke,data=plain,path={folder / "train.jsonl"}')
  found.data.eval_path = str(folder / 'eval.jsonl')
  found.data.validation_limit = found.grpo.validate_every = 0  # four items to train on
  found.logging.tensorboard = False
  # The numbers that the messages below speak of.
  found.judge.buckets, found.judge.max_new_tokens = (256, 512), 16
  for stage in ('sft', 'rft', 'grpo', 'meta_rm'):
    found[stage].buckets, found[stage].microbatches = (544,), 1
  found.grpo.batch = 4
  return found


def put(config, fields):
  for name, value in fields.items():
    *path, last = name.split('.')
    node = config
    for part in path:
      node = node[part]
    assert last in node, name
    node[last] = value


def no_engine(stage, params):
  pytest.fail(f'the engine was asked for, by {stage}')


def go(config, path, stage='pipeline', mesh=None, generate=no_engine):
  """As `main` runs a stage: a refused config is withdrawn from a workdir where nothing was done."""
  with workdir.open_workdir(path, config) as opened:
    try:
      stages.RUN[stage](config, opened, sharding.make_mesh(mesh or _ONE), generate)
    except ValueError:
      opened.withdraw()
      raise


def refused(config, path, words, *, stage='pipeline', mesh=None):
  with pytest.raises(ValueError) as caught:
    go(config, path, stage, mesh)
  for word in words:
    assert word in str(caught.value), (stage, word)
  left = [file.name for file in path.rglob('*') if file.is_file()]
  assert left == ['.lock'], left  # nothing half-written, and the config is not kept
  return str(caught.value)


@pytest.fixture
def idle(monkeypatch):
  """Parameters and training loops that nobody may ask for."""
  for module, name in ((loading, 'params'), (fit, 'fit'), (fit, 'open_session')):
    monkeypatch.setattr(module, name, lambda *a, n=name, **k: pytest.fail(f'{n} was called: work has begun'))


JUDGES = "'base', 'sft', 'rft', 'grpo'"
# fields, words of the message, the one stage to blame (None: the pipeline's own, or too dear alone)
FIELDS = {
    'orders': ({'sample.orders': 'random'}, ('sample.orders', "'random'", 'shuffle, balanced, fixed'), 'sample'),
    'top_p': ({'evaluate.top_p': 0.0}, ('evaluate', 'top_p=0.0', '0 < top_p <= 1'), 'evaluate'),
    'top_p above one': ({'grpo.top_p': 1.5}, ('grpo', 'top_p=1.5', '0 < top_p <= 1'), 'grpo'),
    'min_p': ({'sample.min_p': 1.0}, ('sample', 'min_p=1.0', '0 <= min_p < 1'), 'sample'),
    'top_k': ({'meta_rm.top_k': -1}, ('meta_rm', 'top_k=-1', 'top_k >= 0'), 'meta_rm'),
    'temperature': ({'sample.temperature': -1.0}, ('sample', 'temperature=-1.0', 'temperature >= 0'), 'sample'),
    'grpo at temperature 0': ({'grpo.temperature': 0.0}, ('grpo.temperature', 'got 0.0', 'above 0'), 'grpo'),
    'greedy twice': (
        {'evaluate.temperature': 0.0},
        ('evaluate.temperature', 'got 0', 'above 0', 'evaluate.greedy=False'),
        'evaluate',
    ),
    'ks over the pool': (
        {'evaluate.ks': (1, 8)}, ('evaluate.ks', 'got 8', 'evaluate.samples=4', 'raise the pool'), 'evaluate'
    ),
    'ks not ascending': ({'evaluate.ks': (4, 2)}, ('evaluate.ks', '(4, 2)', 'ascending'), 'evaluate'),
    'no ks': ({'evaluate.ks': ()}, ('evaluate.ks', 'got ()', 'ascending'), 'evaluate'),
    'k of zero': ({'evaluate.ks': (0, 1)}, ('evaluate.ks', 'got 0', 'at least 1'), 'evaluate'),
    'early rule': (
        {'evaluate.early': 'soon'}, ('evaluate.early', "'soon'", "'none', 'exact', 'statistical'"), 'evaluate'
    ),
    'early and smaller votes': (
        {'evaluate.early': 'exact', 'evaluate.meta': ''},
        ('evaluate.early', 'evaluate.ks=(1, 2, 4)', 'set evaluate.ks=(4,)'), 'evaluate',
    ),
    'early and guided': (
        {'evaluate.early': 'exact', 'evaluate.ks': (4,)},
        ('evaluate.early', "'meta_rm'", "evaluate.meta=''"), 'evaluate',
    ),
    'early and balanced': (
        {'evaluate.early': 'statistical', 'evaluate.ks': (4,), 'evaluate.meta': '', 'evaluate.orders': 'balanced'},
        ('evaluate.early', 'balanced', "'shuffle'"), 'evaluate',
    ),
    'early chance': (
        {'evaluate.early': 'statistical', 'evaluate.ks': (4,), 'evaluate.meta': '', 'evaluate.early_alpha': 0.0},
        ('evaluate.early_alpha', 'got 0.0', 'above 0'), 'evaluate',
    ),
    'early in small chunks': (
        {'evaluate.early': 'exact', 'evaluate.ks': (4,), 'evaluate.meta': '', 'judge.chunk_tasks': 3},
        ('evaluate.early', 'chunk_tasks=3', 'raise judge.chunk_tasks'), 'evaluate',
    ),
    'k_meta over k': ({'evaluate.k_meta': 5}, ('evaluate.k_meta', 'got 5', 'k=4', 'k_meta <= k'), 'evaluate'),
    'k_meta below zero': ({'evaluate.k_meta': -1}, ('evaluate.k_meta', 'got -1', 'at least 0'), 'evaluate'),
    'group of one': ({'grpo.group': 1}, ('grpo.group', 'got 1', '2 or more', 'compares the samples'), 'grpo'),
    'grpo bucket': ({'grpo.buckets': (512,)}, ('grpo.buckets', '512', '528', 'raise it'), 'grpo'),
    'steps': ({'sft.steps': -1}, ('sft.steps', 'got -1', 'at least 0'), 'sft'),
    'order of sft': ({'sft.order': 'sorted'}, ('sft.order', "'sorted'", "'shuffle', 'given'"), 'sft'),
    'data of sft': ({'sft.data': '/nowhere/base.jsonl'}, ('/nowhere/base.jsonl', 'check the path'), 'sft'),
    'generator of sft': (
        {'sft.data': 'made:spct_jax.masked:men'}, ('made:spct_jax.masked:men', "no function 'men'", 'mean'), 'sft'
    ),
    'package of the template': (
        {'judge.template': 'package:spct_jax.judges/templates/long'}, ("holds no 'long'", 'short'), 'sample'
    ),
    'package of the tokenizer': (
        {'tokenizer.path': 'package:spct_jax_text/files/small'}, ("cannot import 'spct_jax_text'",), 'sft'
    ),
    'checkpoints': ({'rft.checkpoint_every': 0}, ('rft.checkpoint_every', 'got 0', 'at least 1'), 'rft'),
    'learning rate': ({'meta_rm.lr': 0.0}, ('meta_rm.lr', 'got 0.0', 'positive'), 'meta_rm'),
    'schedule': ({'sft.schedule': 'cosin'}, ('sft', "'cosin'", 'cosine'), 'sft'),
    'warm-up': ({'grpo.warmup_steps': -2}, ('grpo', 'warmup_steps', '-2', '0 or more'), 'grpo'),
    'microbatches': ({'sft.microbatches': 3}, ('sft.batch', '8 rows', '3 microbatches', 'multiple of 3'), 'sft'),
    'buckets': ({'judge.buckets': (512, 256)}, ('judge.buckets', '(512, 256)', 'ascending'), 'sample'),
    'no new tokens': ({'judge.max_new_tokens': 0}, ('judge.max_new_tokens', 'got 0', 'at least 1'), 'sample'),
    'rows': ({'judge.rows': 0}, ('judge.rows', 'got 0', 'at least 1'), 'evaluate'),
    'more samples than rows': (
        {'judge.rows': 4, 'evaluate.samples': 8},
        ('judge.rows', 'got 4', 'evaluate.samples asks for 8', 'raise judge.rows to 8'), 'evaluate',
    ),
    'samples': ({'sample.samples': 0}, ('sample.samples', 'got 0', 'at least 1'), 'sample'),
    'hinted items': (
        {'sample.hinted_items': 'some'}, ('sample.hinted_items', "'some'", "'all', 'unsolved'"), 'sample'
    ),
    'fraction': ({'rft.general_fraction': 1.5}, ('rft.general_fraction', 'got 1.5', '0 to 1'), 'rft'),
    'meta-RM held out': ({'meta_rm.heldout': 1.0}, ('meta_rm.heldout', 'got 1.0', 'not including, 1'), 'meta_rm'),
    'old_logp': ({'grpo.old_logp': 'old'}, ('grpo.old_logp', "'old'", "'sampler', 'learner'"), 'grpo'),
    'clip': ({'grpo.clip_eps': -0.1}, ('grpo', 'clip_eps=-0.1', 'negative'), 'grpo'),
    'updates': ({'grpo.updates': 0}, ('grpo.updates', 'got 0', 'at least 1'), 'grpo'),
    'nothing to validate on': (
        {'grpo.validate_every': 1}, ('grpo.validate_every', 'got 1', 'data.validation_limit=0', 'set'), 'grpo'
    ),
    'validate never': ({'grpo.validate_every': -1}, ('grpo.validate_every', 'got -1', 'at least 0'), 'grpo'),
    'validate by none': ({'grpo.validate_samples': 0}, ('grpo.validate_samples', 'got 0', 'at least 1'), 'grpo'),
    'negative limit to validate': ({'data.validation_limit': -1}, ('data.validation_limit', 'got -1'), 'grpo'),
    'all items to validate on': (
        {'data.validation_limit': 4},
        ('data.validation_limit', 'got 4', 'leaves 0 to train on', 'data.validation_path', 'data.validation_limit=0'),
        None,
    ),
    'no validation file': (
        {'data.validation_limit': 2, 'data.validation_path': '/nowhere/at/all.jsonl'}, ('/nowhere/at/all',), None
    ),
    'principles': ({'trackers.principles': 'Criteria:.*'}, ('trackers.principles', '0 groups', 'exactly one'), 'grpo'),
    'pattern': ({'trackers.patterns.format': '['}, ('trackers.patterns.format', "'['", 'regular'), 'evaluate'),
    'soft': ({'evaluate.soft_temperature': 0.0}, ('evaluate.soft_temperature', 'got 0.0', 'above 0'), 'evaluate'),
    'single': ({'evaluate.single': 'both'}, ('evaluate.single', "'both'", "'binary', 'scale'"), 'evaluate'),
    'keep': ({'logging.keep': 0}, ('logging.keep', 'got 0', 'at least 1'), 'sft'),
    'template': ({'judge.template': 'shrot'}, ('template', "'shrot'", 'grm, short', 'folder'), 'sample'),
    'no models': ({'evaluate.models': ()}, ('evaluate.models', 'none', 'at least one'), 'evaluate'),
    'a model twice': ({'evaluate.models': ('rft', 'rft')}, ('evaluate.models', 'at most once'), 'evaluate'),
    'too few names': (
        {'evaluate.names': ('before',)}, ('evaluate.names', "('before',)", 'one distinct name for each'), 'evaluate'
    ),
    'one name twice': (
        {'evaluate.names': ('a', 'a', 'b')}, ('evaluate.names', "('a', 'a', 'b')", 'distinct'), 'evaluate'
    ),
    'an empty name': ({'evaluate.names': ('a', ' ', 'b')}, ('evaluate.names', "' '", 'distinct'), 'evaluate'),
    'show': ({'evaluate.show': -1}, ('evaluate.show', 'got -1', 'at least 0'), 'evaluate'),
    'no such instructions': (
        {'evaluate.instructions': '/nowhere/general.jsonl'}, ('/nowhere/general.jsonl',), 'evaluate'
    ),
    'meta_batch for instructions': (
        {'evaluate.meta': '', 'evaluate.instructions': 'builtin:instructions', 'evaluate.meta_batch': 0},
        ('evaluate.meta_batch', 'got 0', 'at least 1'), 'evaluate',
    ),
    'unknown model': ({'evaluate.models': ('rft', 'rtf')}, ('evaluate', "'rtf'", JUDGES), 'evaluate'),
    'unknown start': ({'rft.init': 'stf'}, ('rft', "'stf'", JUDGES), 'rft'),
    'meta-RM as judge': ({'evaluate.models': ('meta_rm',)}, ('evaluate', "'meta_rm'", JUDGES), 'evaluate'),
    'meta-RM as policy': ({'meta_rm.policy': 'meta_rm'}, ('meta_rm', "'meta_rm'", JUDGES), 'meta_rm'),
    'meta-RM as start': ({'grpo.init': 'meta_rm'}, ('grpo', "'meta_rm'", JUDGES), 'grpo'),
    'sample is no model': ({'sample.model': 'sample'}, ('sample', "'sample'", JUDGES), 'sample'),
    'judge as meta-RM': ({'evaluate.meta': 'rft'}, ('evaluate', "'rft'", "'meta_rm'"), 'evaluate'),
    'no instructions': (
        {'data.instructions': ''}, ('data.instructions', 'empty', 'sft learns from it', 'give a file'), 'sft'
    ),
    'no instructions for the mix': (
        {'data.instructions': '', 'pipeline.stages': ('sample', 'rft')},
        ('data.instructions', 'empty', 'rft learns from it', 'rft.general_fraction=0'),
        'rft',
    ),
    'unknown stage': ({'pipeline.stages': ('sft', 'smaple')}, ('pipeline.stages', "'smaple'", 'sample, rft'), None),
    'a stage twice': ({'pipeline.stages': ('sft', 'sft')}, ('pipeline.stages', 'at most once'), None),
    'no stage': ({'pipeline.stages': ()}, ('pipeline.stages', 'got ()', 'sft, sample'), None),
    'nobody samples': (
        {'pipeline.stages': ('sft', 'rft')},
        ("'rft' reads sample/trajectories.jsonl", 'no stage before it writes', "add the stage 'sample'"),
        None,
    ),
    'sampled too late': (
        {'pipeline.stages': ('sft', 'rft', 'sample')}, ('sample/trajectories.jsonl', 'before it'), None
    ),
    'nobody trains the start': (
        {'pipeline.stages': ('sample',)}, ("'sample' reads sft/DONE.json", "add the stage 'sft'"), None
    ),
    'nobody trains the meta-RM': (
        {'pipeline.stages': ('sft', 'sample', 'rft', 'grpo', 'evaluate')},
        ("'evaluate' reads meta_rm/DONE.json", "add the stage 'meta_rm'"),
        None,
    ),
    'starts from itself': (
        {'grpo.init': 'grpo'}, ('grpo.init', "'grpo' starts from itself"), None
    ),
    'easy items unknown': (
        {'pipeline.stages': ('grpo',), 'grpo.init': 'base'}, ("'grpo' reads sample/trajectories.jsonl",), None
    ),
    'tokenizer': ({'tokenizer.path': '/nowhere/at/all'}, ('/nowhere/at/all',), 'sft'),
    'width of heads': ({'model.heads': 3}, ('heads', '3', '2'), 'sft'),
    'unknown reader': ({'data.reader': 'plian'}, ('unknown reader', "'plian'", 'plain, hh_rlhf'), 'sft'),
    'negative limit': ({'data.limit': -3}, ('data.limit', 'got -3', '0 = all'), 'sft'),
    'negative limit to evaluate': (
        {'data.eval_path': '', 'data.heldout': 0.5, 'data.eval_limit': -1},
        ('data.eval_limit', 'got -1', '0 = all'),
        'sft',
    ),
    'no data': ({'data.path': ''}, ('data.path', 'empty', 'give the preference file'), 'sft'),
    'nothing held out': (
        {'data.eval_path': '', 'data.heldout': 0.0}, ('fraction', 'between 0 and 1', 'got 0'), 'sft'
    ),
}


@pytest.mark.parametrize('case', FIELDS)
def test_a_wrong_field_is_refused_at_the_door(config, folder, idle, case):
  fields, words, stage = FIELDS[case]
  put(config, fields)
  refused(config, folder / 'w', words)
  if stage:
    refused(config, folder / 'alone', words, stage=stage)


MESHES = {
    'batch of sft': ({'sft.batch': 7}, _TWO, ('sft.batch', '7 rows', '2 devices', 'multiple of 2'), 'sft'),
    'microbatches over devices': (
        {'grpo.microbatches': 3}, _TWO, ('grpo.batch', '16 rows', '3 microbatches', 'multiple of 6'), 'grpo'
    ),
    'meta_batch': (
        {'evaluate.meta_batch': 3}, _TWO, ('evaluate.meta_batch', '3 rows', '2 devices', 'multiple of 2'), 'evaluate'
    ),
    'key/value heads': (
        {}, {'data': 1, 'fsdp': 1, 'tensor': 4}, ('dimension of 2', '4 ways', 'tensor=4', 'smaller axis'), 'sft'
    ),
    'width': (
        {'model.width': 36}, {'data': 1, 'fsdp': 8, 'tensor': 1}, ('dimension of 36', '8 ways', 'fsdp=8'), 'sft'
    ),
    'too many devices': ({}, {'data': 16}, ('impossible mesh', 'data=16', 'needs 16', 'at most 8'), None),
    'unknown axis': ({}, {'model': 2}, ('impossible mesh', "'model'", 'data, fsdp, tensor'), None),
}


@pytest.mark.parametrize('case', MESHES)
def test_an_impossible_mesh_is_refused_at_the_door(config, folder, idle, case):
  fields, mesh, words, stage = MESHES[case]
  put(config, fields)
  refused(config, folder / 'w', words, mesh=mesh)
  if stage:
    refused(config, folder / 'alone', words, stage=stage, mesh=mesh)


LONG = 'word ' * 2000
TIED = {'grades': [1, 1], 'label': None}
BARE = {'label': None}
# which file, its content (None: no file), words of the message, fields
FILES = {
    'missing': ('train.jsonl', None, ('train.jsonl', 'does not exist', 'did you mean'), {}),
    'near': ('eval.jsonl', None, ('eval.jsonl', 'does not exist', "did you mean 'evil.jsonl'"), {}),
    'empty': ('train.jsonl', '', ('train.jsonl', 'is empty', 'a JSON object per line'), {}),
    'blank lines': ('eval.jsonl', '\n\n', ('eval.jsonl', 'is empty'), {}),
    'no JSON': ('train.jsonl', lines(item('a'), '{"id": "b", '), ('train.jsonl:2',), {}),
    'no object': ('eval.jsonl', lines(item('a'), '[1, 2]'), ('eval.jsonl:2', 'list'), {}),
    'a column missing': (
        'train.jsonl',
        lines(item('a'), {'id': 'b', 'prompt': 'x', 'chosen': 'y'}),
        ('train.jsonl:2', "'rejected' is missing", 'columns found'),
        {},
    ),
    'label out of range': (
        'train.jsonl', lines(item('a'), item('b', label=2)), ('train.jsonl:2', '0 to 1', 'got 2'), {}
    ),
    'label of another kind': ('train.jsonl', lines(item('a', label='0')), ('train.jsonl:1', "got '0'"), {}),
    'duplicate ids': (
        'train.jsonl',
        lines(item('a'), item('b'), item('a')),
        ("duplicate id 'a'", 'train.jsonl:3', 'train.jsonl:1', 'give each item its own'),
        {},
    ),
    'duplicate ids to evaluate': (
        'eval.jsonl', lines(item('a'), item('a')), ("duplicate id 'a'", 'eval.jsonl:2', 'eval.jsonl:1'), {}
    ),
    'all tied': (
        'train.jsonl', lines(item('a', **TIED), item('b', **TIED)), ('no usable item', '2: no unique best'), {}
    ),
    'none labelled': (
        'train.jsonl', lines(item('a', **BARE)), ('0 items with a label to train on', '2 to evaluate'), {}
    ),
    'none labelled to evaluate': (
        'eval.jsonl', lines(item('a', **BARE)), ('4 items with a label to train on', '0 to evaluate'), {}
    ),
    'no reader fits': (
        'train.jsonl',
        lines({'text': 'x'}),
        ('train.jsonl:1', "columns found: ['text']", 'Accepted formats'),
        {'data.reader': 'auto'},
    ),
    'strict and tied': (
        'train.jsonl',
        lines(item('a'), item('b', **TIED)),
        ('strict', '1: no unique best (train.jsonl:2)'),
        {'strict': True},
    ),
    'strict and tied to evaluate': (
        'eval.jsonl',
        lines(item('a'), item('b', **TIED)),
        ('strict', '1: no unique best (eval.jsonl:2)'),
        {'strict': True},
    ),
    'strict and unlabelled': (
        'train.jsonl', lines(item('a'), item('b', **BARE)), ('strict', '1 items have no label', 'b'), {'strict': True}
    ),
    'strict and unlabelled to evaluate': (
        'eval.jsonl', lines(item('a'), item('b', **BARE)), ('strict', '1 items have no label', 'b'), {'strict': True}
    ),
    'strict and over-long': (
        'train.jsonl',
        lines(item('a'), item('b', prompt=LONG)),
        ('1 of 2 items are over the limit of 512 prompt tokens: b', 'raise the last of judge.buckets'),
        {'strict': True},
    ),
    'strict and over-long to evaluate': (
        'eval.jsonl',
        lines(item('a'), item('b', prompt=LONG)),
        ('1 of 2 items are over the limit of 512 prompt tokens: b', 'raise the last of judge.buckets'),
        {'strict': True},
    ),
    'all over-long': (
        'train.jsonl',
        lines(item('a', prompt=LONG)),
        ('1 of 1 items are over the limit of 512 prompt tokens: a', 'raise the last of judge.buckets'),
        {},
    ),
    'all over-long to evaluate': (
        'eval.jsonl', lines(item('a', prompt=LONG)), ('1 of 1 items are over the limit of 512 prompt tokens: a',), {}
    ),
}


@pytest.mark.parametrize('case', FILES)
def test_a_wrong_file_is_refused_at_the_door(config, folder, idle, case):
  name, text, words, fields = FILES[case]
  put(config, fields)
  (folder / name).unlink()
  if text is None:
    (folder / 'evil.jsonl').write_text(GOOD['eval.jsonl'])
  else:
    (folder / name).write_text(text)
  refused(config, folder / 'w', words)
  put(config, {'sample.model': 'base', 'evaluate.models': ('base',), 'evaluate.meta': ''})
  refused(config, folder / 'alone', words, stage='sample' if name == 'train.jsonl' else 'evaluate')


INSTRUCTIONS = {
    'missing': (None, ('general.jsonl', 'does not exist')),
    'empty': ('', ('general.jsonl', 'is empty')),
    'malformed': (
        lines({'prompt': 'a', 'completion': 'b'}, {'prompt': 'c'}), ('general.jsonl:2', 'columns found')
    ),
    'no answer': (
        lines({'prompt': 'a', 'completion': 'b'}, {'messages': [{'role': 'user', 'content': 'x'}]}),
        ('general.jsonl:2', "'user'", 'must end with'),
    ),
    'same ids': (
        lines({'id': 'g', 'prompt': 'a', 'completion': 'b'}, {'id': 'g', 'prompt': 'c', 'completion': 'd'}),
        ("duplicate id 'g'", 'general.jsonl:2'),
    ),
}


@pytest.mark.parametrize('case', INSTRUCTIONS)
@pytest.mark.parametrize('stage', ['sft', 'rft'])
def test_wrong_instruction_data_is_refused_at_the_door(config, folder, idle, stage, case):
  text, words = INSTRUCTIONS[case]
  path = folder / 'general.jsonl'
  if text is not None:
    path.write_text(text)
  put(config, {'data.instructions': str(path), 'sample.model': 'base', 'rft.init': 'base'})
  config.pipeline.stages = {'sft': ('sft',), 'rft': ('sample', 'rft')}[stage]
  refused(config, folder / 'w', words)
  refused(config, folder / 'alone', words, stage=stage)


def small(config):
  """The sampling stage alone, from the base model, as cheap as it gets."""
  put(config, {'pipeline.stages': ('sample',), 'sample.model': 'base', 'judge.buckets': (256,)})
  return config


def scripted_factory(config):
  tok = tokenizers.load(config.tokenizer.path)
  engine = scripted.ScriptedEngine(tok, lambda info: 'No verdict.', max_new_tokens=config.judge.max_new_tokens)
  return lambda stage, params: engine


def test_after_a_refusal_a_corrected_config_has_the_same_workdir(config, folder):
  wrong = small(config).copy_and_resolve_references()
  put(wrong, {'sample.orders': 'random', 'seed': 5})
  with pytest.raises(ValueError, match='sample.orders'):
    go(wrong, folder / 'w')
  go(config, folder / 'w', generate=scripted_factory(config))
  assert json.loads((folder / 'w' / 'config.json').read_text())['seed'] == config.seed
  assert len(list(records.read_trajectories(folder / 'w' / 'sample' / 'trajectories.jsonl'))) == 12


def test_after_a_corrected_file_the_same_command_goes_on(config, folder):
  small(config)
  (folder / 'train.jsonl').write_text(lines(item('t0'), 'no JSON'))
  with pytest.raises(ValueError, match='train.jsonl:2'):
    go(config, folder / 'w')
  (folder / 'train.jsonl').write_text(GOOD['train.jsonl'])
  go(config, folder / 'w', generate=scripted_factory(config))
  assert (folder / 'w' / 'sample' / 'DONE.json').exists()


def test_a_workdir_in_which_work_was_done_refuses_another_config(config, folder):
  small(config)
  go(config, folder / 'w', generate=scripted_factory(config))
  before = {path: path.read_bytes() for path in (folder / 'w').rglob('*') if path.is_file() and path.name != '.lock'}
  put(config, {'sample.samples': 5, 'seed': 1})
  with pytest.raises(ValueError) as caught:
    go(config, folder / 'w')
  for word in ('2 fields', 'sample.samples: the workdir has 3, this run has 5', 'seed: the workdir has 0',
               'new --workdir', 'restore the values'):
    assert word in str(caught.value), word
  # A refusal of this config, in a workdir with work, takes nothing back either.
  put(config, {'sample.samples': 3, 'seed': 0, 'pipeline.stages': ('sample', 'smaple')})
  with pytest.raises(ValueError, match='smaple'):
    go(config, folder / 'w')
  after = {path: path.read_bytes() for path in (folder / 'w').rglob('*') if path.is_file() and path.name != '.lock'}
  assert before == after


def test_trajectories_of_other_data_are_refused(config, folder, monkeypatch):
  """The items that changed keep their uids, so nothing else would tell."""
  put(small(config), {'rft.init': 'base', 'meta_rm.policy': 'base', 'grpo.init': 'base'})
  go(config, folder / 'w', stage='sample', generate=scripted_factory(config))
  (folder / 'train.jsonl').write_text(GOOD['train.jsonl'].replace('one answer', 'one other answer'))
  drawn = (folder / 'w' / 'sample' / 'trajectories.jsonl').read_bytes()
  monkeypatch.setattr(loading, 'params', lambda *a, **k: pytest.fail('work has begun'))
  for stage in ('rft', 'grpo', 'meta_rm'):
    with pytest.raises(ValueError) as caught:
      go(config, folder / 'w', stage=stage)
    for word in (stage, 'drawn from other data', 'run --config.stage=sample on this workdir first'):
      assert word in str(caught.value), (stage, word)
    assert not (folder / 'w' / stage).exists()
  monkeypatch.undo()
  # The remedy works, and what was drawn from the old data is kept aside.
  go(config, folder / 'w', stage='sample', generate=scripted_factory(config))
  assert (folder / 'w' / 'sample.old1' / 'trajectories.jsonl').read_bytes() == drawn
