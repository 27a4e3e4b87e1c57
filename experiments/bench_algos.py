"""How long filter, reward, vote and guided vote of 100,000 items x 32 samples x 4 responses take on
one core.

    python experiments/bench_algos.py --json algos.json

Three ways side by side in one process pinned to one core, round by round: `spct_jax.algos` in one
jit, the same in vectorised numpy, and a plain Python loop written from the paper (on `--loop_items`
items, scaled up). Every output of the first two is compared with the loop on those items, and with
each other on all items: equal to the bit, or the script fails. Times are medians over the rounds,
after compilation, in CPU seconds of the process: with one pinned thread that is the wall time on a
free core, whoever else is on it. The wall time stands beside it, and the two differ where the core
was shared. Goal 0.1 s, floor 0.2 s; about half a minute.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time


def main() -> int:
  args = _flags()
  allowed = sorted(os.sched_getaffinity(0))
  core = allowed[-1] if args.core is None else args.core
  if core not in allowed:
    raise SystemExit(f'--core is {core}, but this process may use {allowed}: choose one of these.')
  os.sched_setaffinity(0, {core})  # before JAX is imported: its thread pool is sized by it
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  command = shlex.join(['python', *sys.argv])
  print(f'command: {command}   (pinned to core {core})')

  import jax
  import numpy as np

  sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  data = _items(np, args.items, args.samples, args.responses, args.dtype, args.seed)
  k_meta = max(1, args.samples // 2)
  on_device = [jax.device_put(x) for x in data.values()]
  program = _jitted(jax, k_meta)
  started = time.perf_counter()
  fast = jax.block_until_ready(program(*on_device))
  compile_s = time.perf_counter() - started

  clocks = {'jit': [], 'wall': [], 'numpy': []}
  for _ in range(args.rounds):
    wall, cpu = time.perf_counter(), time.process_time()
    fast = jax.block_until_ready(program(*on_device))
    clocks['jit'].append(time.process_time() - cpu)
    clocks['wall'].append(time.perf_counter() - wall)
    cpu = time.process_time()
    vectorised = _numpy(np, **data, k_meta=k_meta)
    clocks['numpy'].append(time.process_time() - cpu)
  few = min(args.loop_items, args.items)
  listed = {name: array[:few].tolist() for name, array in data.items()}
  cpu = time.process_time()
  slow = _loop(**listed, k_meta=k_meta)
  loop_s = (time.process_time() - cpu) * args.items / few

  for name, a, b, c in zip(('keep', 'reward', 'vote', 'guided vote'), fast, vectorised, slow):
    a = np.asarray(a)
    if not np.array_equal(a, b) or not np.array_equal(a[:few], np.array(c, a.dtype)):
      raise SystemExit(f'{name}: the three ways differ, so the times mean nothing.')
  print(f'equal to the bit: numpy on {args.items} items, the Python loop on {few}')

  median = {name: statistics.median(times) for name, times in clocks.items()}
  shape = f'B={args.items} K={args.samples} N={args.responses} {args.dtype}'
  task = f'filter, reward, vote and guided vote, {shape}'
  rows = [
      _row(f'algos: {task}, one jit, one core', median['jit'], 's', False, 0.1, 0.2),
      _row('algos: the same, wall', median['wall'], 's', False),
      _row('algos: the same in vectorised numpy', median['numpy'], 's', False),
      _row(f'algos: the same in a Python loop, {few} items scaled up', loop_s, 's', False),
      _row('algos: times as fast as numpy', median['numpy'] / median['jit'], 'x', True),
      _row('algos: times as fast as the loop', loop_s / median['jit'], 'x', True),
      _row('algos: compile and first run, wall', compile_s, 's', False),
  ]
  for row in rows:
    print(f"{row['value']:10.4g} {row['unit']:2} {row['name']}")
  if args.json:
    with open(args.json, 'w') as f:
      json.dump(rows, f, indent=2)
  return 0


def _flags() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--json', metavar='FILE', help='write the measurements there')
  parser.add_argument('--items', type=int, default=100_000, help='B (default %(default)s)')
  parser.add_argument('--samples', type=int, default=32, help='K (default %(default)s)')
  parser.add_argument(
      '--responses', type=int, default=4, help='largest N (default %(default)s); n is mixed, 1..N'
  )
  parser.add_argument(
      '--dtype',
      choices=['int8', 'int32'],
      default='int8',
      help='of the scores (default %(default)s)',
  )
  parser.add_argument('--rounds', type=int, default=11, help='timed rounds (default %(default)s)')
  parser.add_argument(
      '--loop_items', type=int, default=2_000, help='items of the Python loop (default %(default)s)'
  )
  parser.add_argument('--core', type=int, help='the core to run on (default: the last one allowed)')
  parser.add_argument(
      '--seed', type=int, default=0, help='of the random items (default %(default)s)'
  )
  return parser.parse_args()


def _items(np, items, samples, responses, dtype, seed):
  """Mixed n, invalid samples, ties in scores and in meta scores, the last sample of each item
  hinted."""
  rng = np.random.default_rng(seed)
  n = rng.integers(1, responses + 1, items)
  hinted = np.zeros((items, samples), bool)
  hinted[:, -1] = True
  return {
      'scores': rng.integers(1, 11, (items, samples, responses)).astype(dtype),
      'valid': rng.random((items, samples)) < 0.9,
      'label': rng.integers(0, n).astype(np.int32),
      'response_mask': np.arange(responses)[None] < n[:, None],
      'hinted': hinted,
      'meta_score': np.round(rng.normal(size=(items, samples)), 1).astype(np.float32),
  }


def _jitted(jax, k_meta):
  from spct_jax.algos import grpo, meta_rm, outcome, rft, voting

  @jax.jit
  def program(scores, valid, label, response_mask, hinted, meta_score):
    correct = outcome.correct(scores, valid, label, response_mask)
    voters = meta_rm.top_k(meta_score, valid, k_meta)
    return (
        rft.keep(correct, hinted),
        grpo.reward(correct),
        voting.vote(scores, valid, response_mask),
        voting.vote(scores, voters, response_mask),
    )

  return program


def _numpy(np, scores, valid, label, response_mask, hinted, meta_score, k_meta):
  responses = response_mask.shape[1]
  single = response_mask.sum(1) == 1
  gold_index = np.where(single, response_mask.argmax(1), np.clip(label, 0, responses - 1))
  gold = np.take_along_axis(scores, gold_index[:, None, None], 2)[..., 0]
  rival = response_mask & (np.arange(responses) != gold_index[:, None])
  best_rival = np.where(rival[:, None], scores, np.iinfo(scores.dtype).min).max(2)
  correct = valid & np.where(single[:, None], gold == label[:, None], gold > best_rival)
  easy = (correct | hinted).all(1) & (~hinted).any(1)
  keep = correct & (hinted | ~easy[:, None])
  order = np.argsort(np.where(valid, -meta_score, np.inf), axis=1, kind='stable')
  voters = np.zeros_like(valid)
  np.put_along_axis(voters, order[:, :k_meta], True, 1)
  totals = [
      np.where(
          response_mask,
          np.einsum('bkn,bk->bn', scores, w, dtype=np.float32, casting='unsafe'),
          -np.inf,
      )
      for w in (valid, voters & valid)
  ]
  return (
      keep,
      np.where(correct, 1.0, -1.0).astype(np.float32),
      *(t.astype(np.float32) for t in totals),
  )


def _loop(scores, valid, label, response_mask, hinted, meta_score, k_meta):
  """Sample by sample, as the paper says it."""
  keeps, rewards, votes, guided = [], [], [], []
  for b in range(len(scores)):
    present = [i for i in range(len(response_mask[b])) if response_mask[b][i]]
    correct = []
    for sample, parsed in zip(scores[b], valid[b]):
      if not parsed:
        correct.append(False)
      elif len(present) == 1:
        correct.append(sample[present[0]] == label[b])
      else:
        correct.append(all(sample[label[b]] > sample[i] for i in present if i != label[b]))
    plain = [c for c, h in zip(correct, hinted[b]) if not h]
    easy = bool(plain) and all(plain)
    keeps.append([c and (h or not easy) for c, h in zip(correct, hinted[b])])
    rewards.append([1.0 if c else -1.0 for c in correct])
    parsed = [j for j in range(len(valid[b])) if valid[b][j]]
    chosen = sorted(parsed, key=lambda j: -meta_score[b][j])[:k_meta]
    for voters, totals in ((parsed, votes), (chosen, guided)):
      row = [float('-inf')] * len(response_mask[b])
      for i in present:
        row[i] = float(sum(scores[b][j][i] for j in voters))
      totals.append(row)
  return keeps, rewards, votes, guided


def _row(name, value, unit, higher_is_better, goal=None, floor=None):
  return {
      'name': name,
      'value': value,
      'unit': unit,
      'higher_is_better': higher_is_better,
      'goal': goal,
      'floor': floor,
  }


if __name__ == '__main__':
  sys.exit(main())
