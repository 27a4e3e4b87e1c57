"""What the quickstart shows over several seeds, which beta it takes, and what judging costs elsewhere.

    python experiments/quickstart.py seeds --out=/tmp/seeds --seeds=0,1,2 --heldout=4000 --clock
    python experiments/quickstart.py beta --from=/tmp/seeds/seed-0 --out=/tmp/beta --betas=0,0.005,0.04,0.2,1
    python experiments/quickstart.py general --from=/tmp/seeds/seed-0 --out=/tmp/general

seeds    the quickstart once per seed; table.md, table.json, scaling.png, and what it must show as pass or FAIL.
         With --clock also the page as it stands, twice: with a cold compilation cache, then with a warm one
beta     GRPO from the RFT policy of a finished run, once per weight of the KL; beta.md, beta.png. Chosen on the
         validation items, and no held-out item is judged
general  RFT from the base of a finished run, with and without general instruction data; general.md. Judging is
         measured on the validation items, the general tasks on their held-out rows

Every run is an ordinary `python -m spct_jax.main`, one after the other, with a workdir below --out; OUT/NAME.json
records its seconds and its peak resident memory. A finished run is skipped and a killed one continues, by the same
command. Every number of the method is the page's; the numbers here are those that the measurements are held to.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

# JAX, and what imports it, comes after the last run: a parent's memory would be in the peak of its children.
ROOT = pathlib.Path(__file__).resolve().parents[1]

MINUTES, GOAL_MINUTES, GIGABYTES = 10, 6, 4.0
VOTES = (8, 32)


def main() -> int:
  args = _flags()
  sys.path.insert(0, str(ROOT))
  try:
    {'seeds': seeds, 'beta': beta, 'general': general}[args.command](args)
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


def _flags() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(dest='command', required=True)
  made = {
      name: commands.add_parser(name, help=words, description=words)
      for name, words in (
          ('seeds', 'the quickstart once per seed, and what it shows'),
          ('beta', 'GRPO once per weight of the KL'),
          ('general', 'RFT with and without general instruction data'),
      )
  }
  for name, sub in made.items():
    sub.add_argument('--out', required=True, metavar='DIR', help='folder to write into')
    if name != 'seeds':
      sub.add_argument('--from', required=True, dest='source', metavar='WORKDIR', help='a finished run')
    sub.add_argument('--page', default='configs/quickstart.py', help='page of numbers (default %(default)s)')
    sub.add_argument('--choices', default='', metavar='WORDS', help='more words after its colon: smoke')
  made['seeds'].add_argument('--seeds', required=True, type=_listed(int), help='such as 0,1,2')
  made['seeds'].add_argument('--heldout', type=int, help='held-out pairs (default: as the page says)')
  made['seeds'].add_argument('--clock', action='store_true', help='also time the page as it stands')
  made['seeds'].add_argument('--json', metavar='FILE', help='write what was measured against the bars there')
  made['beta'].add_argument('--betas', required=True, type=_listed(float), help='such as 0,0.005,0.04,0.2,1')
  made['beta'].add_argument('--lr', type=float, help='grpo.lr (default: as the page says)')
  made['beta'].add_argument('--steps', type=int, help='grpo.steps (default: as the page says)')
  made['beta'].add_argument(
      '--window', type=int, default=10, help='steps that a point averages, in figure and table (default %(default)s)'
  )
  return parser.parse_args()


def _listed(kind):
  """A parser of '0,1,2', without repetitions."""
  parse = lambda text: tuple(dict.fromkeys(kind(word) for word in text.split(',')))
  parse.__name__ = f'list of {kind.__name__}'  # argparse names it in its errors
  return parse


# --- runs


def launch(out: pathlib.Path, name: str, command: Sequence[str], *, env: Mapping[str, str], source: str) -> dict:
  """Runs a command that makes out/name, unless out/name.json says that it is done; returns that record.

  Record: command, source (what the result was made from, besides), cold (out/name was not there before), and
  attempts of {seconds, peak_bytes, code}. A run that was killed together with this script left no attempt.
  """
  path = out / f'{name}.json'
  record = {'command': list(command), 'source': source, 'cold': not (out / name).exists(), 'attempts': []}
  if path.exists():
    before = json.loads(path.read_text())
    differs = [key for key in ('command', 'source') if before[key] != record[key]]
    if differs:
      raise ValueError(
          f'{path}: another {" and ".join(differs)} made {out / name}: {shlex.join(before["command"])}; '
          'give the same flags, or a new --out'
      )
    record = before
  if record['attempts'] and record['attempts'][-1]['code'] == 0:
    print(f'{name}: done before', flush=True)
    return record
  print(f'{name}: {shlex.join(command)}', flush=True)
  began = time.perf_counter()
  process = subprocess.Popen(command, cwd=ROOT, env=dict(env))
  try:
    _, status, usage = os.wait4(process.pid, 0)
  except KeyboardInterrupt:  # it had its Ctrl-C too, and writes a checkpoint
    os.wait4(process.pid, 0)
    raise
  process.returncode = os.waitstatus_to_exitcode(status)
  record['attempts'].append({
      'seconds': time.perf_counter() - began,
      'peak_bytes': usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024),
      'code': process.returncode,
  })
  _write(path, json.dumps(record, indent=2) + '\n')
  if process.returncode:
    raise ValueError(f'{name} ended with exit code {process.returncode}; the same command continues it')
  return record


def _write(path: pathlib.Path, text: str) -> None:
  from spct_jax import jsonl  # which does not import JAX

  jsonl.write_text(path, text)


def _stage(args: argparse.Namespace, out: pathlib.Path, name: str, *, words: Sequence[str], fields: Sequence[str],
           env: Mapping[str, str], source: str) -> dict:
  """`launch` of the door with the page, the words after its colon and --config.FIELD=VALUE."""
  chosen = ','.join(word for word in (*words, args.choices) if word)
  page = f'--config={args.page}' + (f':{chosen}' if chosen else '')
  options = [page, *(f'--config.{field}' for field in fields), f'--workdir={out / name}']
  return launch(out, name, [sys.executable, '-m', 'spct_jax.main', *options], env=env, source=source)


def _cold() -> dict[str, str]:
  """The environment without a compilation cache of its owner's: the workdir then has its own."""
  return {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}


def _out(args: argparse.Namespace) -> pathlib.Path:
  out = pathlib.Path(args.out).expanduser().absolute()
  out.mkdir(parents=True, exist_ok=True)
  return out


def _config(workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / 'config.json'
  if not path.is_file():
    raise ValueError(f'{workdir}: no config.json there; give the workdir of a run')
  return json.loads(path.read_text())


def _exported(args: argparse.Namespace, out: pathlib.Path, model: str) -> tuple[pathlib.Path, str, dict]:
  """(Hugging Face folder of a model of --from, what it was made from, the config of --from)."""
  workdir = pathlib.Path(args.source).expanduser().absolute()
  config = _config(workdir)
  done = workdir / model / 'DONE.json'
  if not done.is_file():
    raise ValueError(f'--from={workdir}: its stage {model!r} is not finished; start that run again first')
  source = done.read_text()
  name = f'model-{model}'
  command = [
      sys.executable, '-m', 'spct_jax.main', '--config=configs/convert.py:do=export',
      f'--config.model={workdir}:{model}', f'--config.convert.to={out / name}',
  ]
  launch(out, name, command, env=os.environ, source=source)
  return out / name, source, config


# --- seeds


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run as the table needs it; `votes` are the lines of evaluate/examples.jsonl, by stage."""

  seed: int
  rows: Sequence[Mapping[str, Any]]
  votes: Mapping[str, Sequence[Mapping[str, Any]]]
  instructions: Sequence[Mapping[str, Any]]
  evaluate: Mapping[str, Any]  # that section of its config
  commit: str | None


def seeds(args: argparse.Namespace) -> None:
  out, cold = _out(args), _cold()
  words = [] if args.heldout is None else [f'heldout={args.heldout}']
  records = {}
  for seed in args.seeds:
    name = f'seed-{seed}'
    records[name] = _stage(args, out, name, words=[f'seed={seed}', *words], fields=(), env=cold, source='')
  if args.clock:
    warm = cold | {'JAX_COMPILATION_CACHE_DIR': str(out / 'clock-cold' / 'xla_cache')}
    for name, env in (('clock-cold', cold), ('clock-warm', warm)):
      records[name] = _stage(args, out, name, words=(), fields=(), env=env, source='')
  told = summary([load(out / f'seed-{seed}', seed) for seed in args.seeds], records)
  held = bars(told)
  _write(out / 'table.json', json.dumps(told | {'bars': [bar.line() for bar in held]}, indent=2) + '\n')
  text = '\n'.join([*table(told), '', *(f'    {bar.words()}' for bar in held)])
  _write(out / 'table.md', text + '\n')
  print('', text, '', sep='\n')
  scaling(out / 'scaling.png', told)
  if args.json:
    _write(pathlib.Path(args.json), json.dumps([bar.line() for bar in held], indent=2) + '\n')
  print(f'{out / "table.md"}, {out / "scaling.png"}')


def load(workdir: pathlib.Path, seed: int) -> Run:
  from spct_jax import records
  from spct_jax.stages import results

  votes = {}
  for line in records.read_jsonl(workdir / 'evaluate' / 'examples.jsonl'):
    votes.setdefault(line['stage'], []).append(line)
  general_tasks = workdir / 'evaluate' / 'instructions.json'
  return Run(
      seed=seed,
      rows=results.read(workdir / 'results.json'),
      votes=votes,
      instructions=json.loads(general_tasks.read_text()) if general_tasks.exists() else (),
      evaluate=_config(workdir)['evaluate'],
      commit=json.loads((workdir / 'evaluate' / 'DONE.json').read_text())['commit'],
  )


# What the table says of a stage: heading -> (n, k, temperature above 0, field of a row of results.json).
LINES = {
    'pairs, greedy': (2, 1, False, 'accuracy'),
    'pairs, one sample': (2, 1, True, 'accuracy'),
    'pairs, vote of 8': (2, 8, True, 'accuracy'),
    'pairs, vote of 32': (2, 32, True, 'accuracy'),
    'best of four, one sample': (4, 1, True, 'accuracy'),
    'best of four, vote of 8': (4, 8, True, 'accuracy'),
    'one response, one sample': (1, 1, True, 'accuracy'),
    'one response, vote of 8': (1, 8, True, 'accuracy'),
    'one response, ROC-AUC of the vote of 8': (1, 8, True, 'auc'),
    'judgements that do not parse': (None, 1, True, 'parse_failure'),
    'pairs, ties of one sample': (2, 1, True, 'ties'),
}


def summary(runs: Sequence[Run], records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """All figures of table, figure and bars; shares in 0..1, over the seeds as {mean, low, high, values}.

  A guided vote's gain is paired by item: an item's credits are averaged over the seeds first, since all seeds judge
  the same held-out items, and the interval is over items.
  """
  stages = list(dict.fromkeys(row['stage'] for row in runs[0].rows))
  lines = {
      heading: {stage: _over([_value(run.rows, stage, *where) for run in runs]) for stage in stages}
      for heading, where in LINES.items()
  }
  lines |= {
      f'judgements, {name.removeprefix("pattern_")}': {
          stage: _over([_value(run.rows, stage, None, 1, True, name) for run in runs]) for stage in stages
      }
      for name in dict.fromkeys(key for row in runs[0].rows for key in row if key.startswith('pattern_'))
  }
  exact = {
      stage: _over([next((r['exact'] for r in run.instructions if r['stage'] == stage), None) for run in runs])
      for stage in stages
  }
  if any(exact.values()):
    lines['general tasks, reproduced'] = exact
  votes = lambda stage, k: _over([_value(run.rows, stage, 2, k, True, 'accuracy') for run in runs])
  curves = {stage: {k: votes(stage, k) for k in runs[0].evaluate['ks']} for stage in stages}
  return {
      'stages': stages,
      'seeds': [run.seed for run in runs],
      'temperature': runs[0].evaluate['temperature'],
      'items': {str(n): _items(runs[0].rows, n) for n in (1, 2, 4)},
      'commits': list(dict.fromkeys(run.commit for run in runs)),
      'lines': lines,
      'curves': curves,
      'gains': [gain for stage in stages for gain in _gains(runs, stage)],
      'runs': {
          name: {
              'seconds': sum(attempt['seconds'] for attempt in record['attempts']),
              'peak_bytes': max(attempt['peak_bytes'] for attempt in record['attempts']),
              'whole': record['cold'] and len(record['attempts']) == 1,
          }
          for name, record in records.items()
      },
  }


def _value(rows, stage, n, k, sampled, field) -> float | None:
  for row in rows:
    where = (row['stage'], row['subset'], row['n'], row['k'], row['guided'], row['temperature'] > 0)
    if where == (stage, 'all', n, k, False, sampled):
      return row.get(field)
  return None


def _items(rows, n) -> int | None:
  return next((row['items'] for row in rows if (row['subset'], row['n']) == ('all', n)), None)


def _over(values: Sequence[float | None]) -> dict[str, Any] | None:
  """Mean and range; None where a seed has no value."""
  if not values or None in values:
    return None
  return {'mean': sum(values) / len(values), 'low': min(values), 'high': max(values), 'values': list(values)}


def _gains(runs: Sequence[Run], stage: str) -> list[dict[str, Any]]:
  """What guidance gains on the plain vote of the same samples of the pairs, and what an oracle would gain."""
  import numpy as np

  from spct_jax.algos import metrics
  from spct_jax.stages import measure

  fields = runs[0].evaluate
  pairs = [[line for line in run.votes[stage] if line['n'] == 2] for run in runs]
  if not pairs[0] or pairs[0][0]['meta'] is None:
    return []
  uids = [[line['uid'] for line in lines] for lines in pairs]
  if any(other != uids[0] for other in uids):
    raise ValueError('the seeds judged different held-out items, so they cannot be paired; use one page for all')
  pools, items = zip(*(_pool(lines) for lines in pairs))
  threshold = measure.THRESHOLDS[fields['single']]
  counted = np.ones(len(uids[0]), bool)
  out = []

  def credit(k, guide):
    found = [
        metrics.accuracy_at_k(
            pool.scores, pool.valid, item.label, item.response_mask, k, threshold=threshold,
            **({'meta_score': pool.meta, **guide} if guide is not None else {}),
        )['credit']
        for pool, item in zip(pools, items)
    ]
    return np.mean(found, axis=0)

  for k in fields['ks']:
    plain = credit(k, None)
    # k_meta None: half of k, as in the evaluation
    guides = {'hard': {'k_meta': min(fields['k_meta'], k) if fields['k_meta'] else None}}
    if fields['soft']:
      guides['soft'] = {'temperature': fields['soft_temperature']}
    best = np.mean([
        measure.oracle_accuracy(pool, item, k=k, threshold=threshold) for pool, item in zip(pools, items)
    ])
    for guided, guide in guides.items():
      out.append({
          'stage': stage, 'k': k, 'guided': guided, **metrics.paired(credit(k, guide), plain, counted),
          'oracle': float(best - plain.mean()),
      })
  return out


def _pool(lines):
  """Lines of examples.jsonl as the arrays of an evaluation; the orders shown are not in them."""
  import numpy as np

  from spct_jax.stages import measure

  scores = np.asarray([[s if s is not None else [0] * line['n'] for s in line['scores']] for line in lines], np.int32)
  valid = np.asarray([[s is not None for s in line['scores']] for line in lines])
  meta = np.asarray([[math.nan if m is None else m for m in line['meta']] for line in lines], np.float32)
  pool = measure.Pool(scores, valid, np.full(scores.shape, -1, np.int32), meta)
  label = np.asarray([line['label'] for line in lines], np.int32)
  judged = np.asarray([not line['overlong'] for line in lines])
  return pool, measure.Items((), label, np.ones((len(lines), scores.shape[2]), bool), judged)


def table(told: Mapping[str, Any]) -> list[str]:
  """Markdown: a line per measure, a column per stage, the mean over seeds and in brackets their range."""
  from spct_jax.stages import results

  stages = told['stages']
  out = ['| % | ' + ' | '.join(stages) + ' |', '|---|' + '---|' * len(stages)]
  for heading, found in told['lines'].items():
    out.append(f'| {heading} | ' + ' | '.join(_cell(found[stage]) for stage in stages) + ' |')
  gains = {(gain['stage'], gain['k'], gain['guided']): gain for gain in told['gains']}
  for k in VOTES:
    for guided, words in (('hard', 'guided hard'), ('soft', 'guided softly')):
      cells = [_gain_cell(gains.get((stage, k, guided))) for stage in stages]
      if any(cell != '–' for cell in cells):
        out.append(f'| pairs, vote of {k} {words}: points on plain, 95 % | ' + ' | '.join(cells) + ' |')
    oracle = [gains.get((stage, k, 'hard')) for stage in stages]
    if any(oracle):
      cells = ['–' if gain is None else results.points(gain['oracle']) for gain in oracle]
      out.append(f'| pairs, vote of {k}: points that an oracle guide would gain | ' + ' | '.join(cells) + ' |')
  counts = {n: number for n, number in told['items'].items() if number is not None}
  out += [
      '',
      f'{results.count(len(told["seeds"]), "training seed")} ({", ".join(map(str, told["seeds"]))}): mean, and in '
      'brackets lowest and highest; '
      f'temperature {told["temperature"]:g} unless greedy. Held-out items, the same for all: '
      + ', '.join(f'{number} of {results.count(int(n), "response")}' for n, number in counts.items())
      + f'. Commit {", ".join(str(commit) for commit in told["commits"])}.',
      '',
      '| run | seconds | peak memory, GB |',
      '|---|---|---|',
      *(
          f'| {name}{"" if run["whole"] else " (interrupted or found begun)"} | {run["seconds"]:.0f} '
          f'| {run["peak_bytes"] / 1e9:.2f} |'
          for name, run in told['runs'].items()
      ),
  ]
  return out


def _cell(found: Mapping[str, Any] | None) -> str:
  from spct_jax.stages import results

  if found is None:
    return '–'
  words = results.decimals(found['mean'])
  if len(found['values']) == 1:
    return words
  return f'{words} ({results.decimals(found["low"])} to {results.decimals(found["high"])})'


def _gain_cell(gain: Mapping[str, Any] | None) -> str:
  from spct_jax.stages import results

  if gain is None:
    return '–'
  return f'{results.points(gain["gain"])} [{results.points(gain["low"])}, {results.points(gain["high"])}]'


@dataclasses.dataclass(frozen=True)
class Bar:
  """What the quickstart must show: `value` at `floor` or better, strictly so where `strict`; None = not measured."""

  name: str
  value: float | None
  unit: str
  floor: float
  goal: float
  higher_is_better: bool
  strict: bool
  said: str  # the figures behind the value

  def passed(self) -> bool | None:
    if self.value is None:
      return None
    # Differences of shares are off by an ulp: 0.73 - 0.70 must be 3 points.
    gap = round(self.value - self.floor, 9) * (1 if self.higher_is_better else -1)
    return gap > 0 if self.strict else gap >= 0

  def words(self) -> str:
    verdict = {True: 'pass', False: 'FAIL', None: '  – '}[self.passed()]
    if self.value is None:
      return f'{verdict}  {self.name}: not measured'
    least = {(True, True): 'above', (True, False): 'at least', (False, True): 'below', (False, False): 'at most'}
    wanted = f'{least[self.higher_is_better, self.strict]} {self.floor:g} wanted'
    return f'{verdict}  {self.name}: {self.value:.2f} {self.unit}, {wanted} ({self.said})'

  def line(self) -> dict[str, Any]:
    names = ('value', 'unit', 'higher_is_better', 'goal', 'floor')
    return {'name': f'quickstart: {self.name}'} | {name: getattr(self, name) for name in names}


def bars(told: Mapping[str, Any]) -> list[Bar]:
  """The bars of a summary whose stages are base, RFT and SPCT, in this order."""
  if len(told['stages']) != 3:
    raise ValueError(f'evaluate.names: got {told["stages"]}; the bars are on three: base, RFT, SPCT')
  base, rft, spct = told['stages']
  mean = lambda heading, stage: (told['lines'][heading][stage] or {'mean': None})['mean']
  one, greedy, eight, many = 'pairs, one sample', 'pairs, greedy', 'pairs, vote of 8', 'pairs, vote of 32'
  found = [
      _above(f'one sample, {rft} above {base}', mean(one, rft), mean(one, base), 3, strict=False),
      _above(f'one sample, {spct} above {rft}', mean(one, spct), mean(one, rft), 6, strict=False),
      _above(f'greedy {spct} above {base} with 32 votes', mean(greedy, spct), mean(many, base), 0, strict=True),
      _above(f'{spct}, 8 votes above 1', mean(eight, spct), mean(one, spct), 4, strict=False),
      _above(f'{spct}, 32 votes above 8', mean(many, spct), mean(eight, spct), 0, strict=True),
      _excludes_zero(told, f'{rft}, 8 votes guided hard above plain', rft, ('hard',)),
      _excludes_zero(told, f'{spct}, 8 votes guided hard or softly above plain', spct, ('hard', 'soft')),
  ]
  for heading in (
      'best of four, one sample', 'best of four, vote of 8', 'one response, one sample', 'one response, vote of 8',
      'one response, ROC-AUC of the vote of 8',
  ):
    found.append(_rises(f'{heading}, rises from stage to stage', [mean(heading, stage) for stage in told['stages']]))
  failures = [mean('judgements that do not parse', stage) for stage in (rft, spct)]
  known = None not in failures
  found.append(Bar(
      f'parse failures of {rft} and {spct}', 100 * max(failures) if known else None, '%', 2, 2, False, True,
      ', '.join(f'{100 * share:.2f}' for share in failures) if known else '',
  ))
  return found + _clocked(told['runs'])


def _above(name: str, value: float | None, other: float | None, least: float, *, strict: bool) -> Bar:
  if value is None or other is None:
    return Bar(name, None, 'points', least, least, True, strict, '')
  said = f'{100 * value:.2f} % against {100 * other:.2f} %'
  return Bar(name, 100 * (value - other), 'points', least, least, True, strict, said)


def _rises(name: str, values: Sequence[float | None]) -> Bar:
  """By the smallest of its steps."""
  if None in values:
    return Bar(name, None, 'points', 0, 0, True, True, '')
  step = min(after - before for before, after in zip(values, values[1:]))
  return Bar(name, 100 * step, 'points', 0, 0, True, True, ', '.join(f'{100 * value:.2f} %' for value in values))


def _excludes_zero(told, name: str, stage: str, kinds: Sequence[str]) -> Bar:
  """By the lower end of the interval, of the better kind."""
  name = f'{name}, lower end of the 95 % interval'
  gains = [g for g in told['gains'] if g['stage'] == stage and g['k'] == VOTES[0] and g['guided'] in kinds]
  if not gains:
    return Bar(name, None, 'points', 0, 0, True, True, '')
  said = '; '.join(f'{gain["guided"]} {_gain_cell(gain)}' for gain in gains)
  return Bar(name, 100 * max(gain['low'] for gain in gains), 'points', 0, 0, True, True, said)


def _clocked(runs: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
  """Time and memory; a run that was interrupted has no time."""
  cold, warm = (runs.get(name) for name in ('clock-cold', 'clock-warm'))
  seconds = cold['seconds'] if cold and cold['whole'] else None
  again = warm['seconds'] if warm and warm['whole'] else None
  saved = seconds - again if seconds is not None and again is not None else None
  peak = max(run['peak_bytes'] for run in runs.values()) / 1e9 if runs else None
  said = f'{seconds:.0f} s cold, {again:.0f} s warm' if saved is not None else ''
  return [
      Bar('the whole command', seconds, 's', 60 * MINUTES, 60 * GOAL_MINUTES, False, False, f'{os.cpu_count()} cores'),
      Bar('seconds that a warm compilation cache saves', saved, 's', 0, 0, True, True, said),
      Bar('peak resident memory of a run', peak, 'GB', GIGABYTES, GIGABYTES, False, True, 'the largest of all runs'),
  ]


def scaling(path: pathlib.Path, told: Mapping[str, Any]) -> None:
  """Left: accuracy of plain votes against k, mean and range over seeds. Right: what guidance gains on them."""
  import matplotlib.figure
  import matplotlib.ticker

  looks = (('#0072B2', 'o'), ('#D55E00', 's'), ('#009E73', '^'), ('#CC79A7', 'D'))  # Okabe and Ito's colours
  dashes = {'hard': '-', 'soft': '--'}
  figure = matplotlib.figure.Figure(figsize=(10.5, 4.2), layout='constrained')
  panels = figure.subplots(1, 2 if told['gains'] else 1, squeeze=False)[0]
  for i, stage in enumerate(told['stages']):
    color, marker = looks[i % len(looks)]
    look = {'color': color, 'marker': marker, 'markersize': 5}
    points = [(k, found) for k, found in told['curves'][stage].items() if found is not None]
    ks = [k for k, _ in points]
    panels[0].plot(ks, [100 * found['mean'] for _, found in points], label=stage, **look)
    low, high = ([100 * found[end] for _, found in points] for end in ('low', 'high'))
    panels[0].fill_between(ks, low, high, color=color, alpha=0.2, linewidth=0)
    for j, (guided, dash) in enumerate(dashes.items()):
      own = [gain for gain in told['gains'] if (gain['stage'], gain['guided']) == (stage, guided)]
      if own:
        ends = [[100 * (g['gain'] - g['low']) for g in own], [100 * (g['high'] - g['gain']) for g in own]]
        beside = [gain['k'] * 1.05 ** (2 * i + j) for gain in own]  # so that no bar hides another
        panels[1].errorbar(
            beside, [100 * gain['gain'] for gain in own], yerr=ends, linestyle=dash, capsize=2, linewidth=1.2,
            label=f'{stage}, {guided}', **look,
        )
  panels[0].set_title(f'plain votes on pairs; band: range of {len(told["seeds"])} seeds', loc='left', fontsize=10)
  panels[0].set_ylabel('accuracy, %')
  if told['gains']:
    panels[1].axhline(0, color='0.4', linewidth=1)
    panels[1].set_title('guided minus plain votes; bars: 95 % intervals', loc='left', fontsize=10)
    panels[1].set_ylabel('points')
  for axes in panels:
    ks = list(told['curves'][told['stages'][0]])
    axes.set_xscale('log', base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel('samples per vote, k (log scale)')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
  figure.savefig(path, dpi=130)


# --- beta


def beta(args: argparse.Namespace) -> None:
  out = _out(args)
  policy, source, config = _exported(args, out, 'rft')
  # The policy is the model's start here, so no stage before GRPO knows which items are too easy for it.
  fields = ['stage=grpo', f'model.path={policy}', 'grpo.init=base', 'grpo.drop_too_easy=False']
  fields += [f'grpo.{name}={value}' for name, value in (('lr', args.lr), ('steps', args.steps)) if value is not None]
  for number, weight in enumerate(args.betas, start=1):
    print(f'--- {number}/{len(args.betas)} beta {weight:g}', flush=True)
    _stage(
        args, out, f'beta-{weight:g}', words=[f'seed={config["seed"]}'], fields=[*fields, f'grpo.kl_coef={weight}'],
        env=os.environ, source=source,
    )
  from spct_jax.stages import figures, logbook

  runs = {f'{weight:g}': logbook.read_rows(out / f'beta-{weight:g}' / 'metrics.jsonl') for weight in args.betas}
  patterns = [f'pattern_{name}' for name, regex in config['trackers']['patterns'].items() if regex]
  names = ['validation/accuracy', 'kl', 'entropy', 'principle_sets', *patterns, 'parse_failure']
  labelled = {f'beta {weight}': rows for weight, rows in runs.items()}
  figures.sweep(out / 'beta.png', labelled, stage='grpo', names=names, window=args.window)
  text = '\n'.join(beta_table(runs, names=names[1:], window=args.window))
  _write(out / 'beta.md', text + '\n')
  print('', text, '', f'{out / "beta.md"}, {out / "beta.png"}', sep='\n')


def beta_table(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, names: Sequence[str], window: int) -> list[str]:
  """Markdown: a line per beta; the winner has the best validation accuracy at the end, where training leaves it."""
  from spct_jax.stages import results

  found = {}
  for weight, rows in runs.items():
    checked = [row for row in rows if row['stage'] == 'grpo' and row.get('validation/accuracy') is not None]
    if not checked:
      raise ValueError(f'beta {weight}: nothing was validated; set grpo.validate_every above 0 on the page')
    last = max(row['step'] for row in rows if row['stage'] == 'grpo')
    late = [row for row in rows if row['stage'] == 'grpo' and last - window <= row['step'] < last]
    values = [[row[name] for row in late if row.get(name) is not None] for name in names]
    found[weight] = (checked[0], max(checked, key=lambda row: row['validation/accuracy']), checked[-1], values)
  winner = max(found, key=lambda weight: found[weight][2]['validation/accuracy'])
  out = [
      '| beta | validation accuracy at the start, % | best (step) | at the end, ± standard error | '
      + ' | '.join(name.replace('_', ' ') for name in names) + ' |',
      '|---|---|---|---|' + '---|' * len(names),
  ]
  for weight, (first, best, final, values) in found.items():
    mark = '**' if weight == winner else ''
    out.append(
        f'| {mark}{weight}{mark} | {results.decimals(first["validation/accuracy"])} '
        f'| {results.decimals(best["validation/accuracy"])} ({best["step"]}) '
        f'| {results.decimals(final["validation/accuracy"])} ± {results.decimals(final["validation/stderr"])} | '
        + ' | '.join(f'{sum(own) / len(own):.3f}' if own else '–' for own in values) + ' |'
    )
  final = found[winner][2]
  close = [
      weight for weight, (_, _, other, _) in found.items()
      if weight != winner and final['validation/accuracy'] - other['validation/accuracy'] < final['validation/stderr']
  ]
  out += [
      '',
      f'Winner on the validation items, at the end of training: beta {winner}'
      + (f'; within one standard error of it: {", ".join(close)}' if close else '')
      + f'. The other columns are means over the last {results.count(window, "step")}.',
  ]
  return out


# --- general


def general(args: argparse.Namespace) -> None:
  out = _out(args)
  start, source, config = _exported(args, out, 'sft')
  fields = [
      "pipeline.stages=('sample','rft','evaluate')", f'model.path={start}', 'sample.model=base', 'rft.init=base',
      "evaluate.models=('base','rft')", "evaluate.names=('base','rft')", 'evaluate.meta=',
      # Judging is measured on the validation items here: the held-out ones are for the table.
      f'data.eval_path={config["data"]["validation_path"]}', 'data.validation_limit=0',
  ]
  share = config['rft']['general_fraction']
  arms = {'with': share, 'without': 0.0}
  if not share:
    raise ValueError(f'--from={args.source}: its rft.general_fraction is 0, so there is nothing to leave out')
  for name, fraction in arms.items():
    _stage(
        args, out, name, words=[f'seed={config["seed"]}'], fields=[*fields, f'rft.general_fraction={fraction}'],
        env=os.environ, source=source,
    )
  text = '\n'.join(general_table({name: load(out / name, config['seed']) for name in arms}, share))
  _write(out / 'general.md', text + '\n')
  print('', text, '', str(out / 'general.md'), sep='\n')


def general_table(runs: Mapping[str, Run], share: float) -> list[str]:
  """Markdown: base, RFT with and RFT without the mix, on general tasks and on judging."""
  from spct_jax.stages import results

  shown = [
      ('base', 'base', runs['with']),
      (f'RFT with the mix ({100 * share:g} % of the rows)', 'rft', runs['with']),
      ('RFT without', 'rft', runs['without']),
  ]
  out = [
      '| | general tasks reproduced, % (95 %) | nll per token | validation pairs, one sample, % |',
      '|---|---|---|---|',
  ]
  for words, stage, run in shown:
    told = next((row for row in run.instructions if row['stage'] == stage), None)
    if told is None:
      raise ValueError('evaluate.instructions is empty on the page, so there are no general tasks to measure')
    nll = '–' if told['nll'] is None else f'{told["nll"]:.4f}'
    out.append(
        f'| {words} | {results.decimals(told["exact"])} [{results.decimals(told["low"])}, '
        f'{results.decimals(told["high"])}] of {told["items"]} | {nll} '
        f'| {results.decimals(_value(run.rows, stage, 2, 1, True, "accuracy"))} |'
    )
  return out


if __name__ == '__main__':
  sys.exit(main())
