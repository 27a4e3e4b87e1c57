"""What is measured on a model's pool of samples: the rows of results.json and of examples.jsonl.

Every accuracy is cut from one pool (design decision 9): k samples vote, plain or guided, for the whole set, for
each subset and for each number of responses. An item that is over-long counts as wrong in `accuracy` and is left
out of `accuracy_judged` and of all rates.

A single response is judged by a threshold on its mean score: at test time its scale is 1..10 while its label is 0
or 1 (paper 4.2), so Eq 10's equality cannot apply there.
"""

import dataclasses
from typing import Any

import numpy as np

from spct_jax import types
from spct_jax.algos import meta_rm as meta_algo
from spct_jax.algos import metrics, outcome, voting
from spct_jax.judges import grm
from spct_jax.stages import logbook

THRESHOLDS = {'binary': 0.5, 'scale': 5.5}  # of the mean score of a single response: above it means right


@dataclasses.dataclass(frozen=True)
class Pool:
  """What one model said about the held-out items, as arrays in the examples' own order of responses."""

  scores: np.ndarray  # int32[B, K, N]
  valid: np.ndarray  # bool[B, K]
  order: np.ndarray  # int32[B, K, N], -1 beyond the last slot and where nothing was drawn
  meta: np.ndarray | None  # float32[B, K], the meta-RM's logits
  expected: np.ndarray | None = None  # float32[B, K, N], expected scores; where there is none, the sampled one


@dataclasses.dataclass(frozen=True)
class Items:
  """The evaluated items as arrays."""

  examples: tuple[types.Example, ...]
  label: np.ndarray  # int32[B]
  response_mask: np.ndarray  # bool[B, N]
  judged: np.ndarray  # bool[B]: False for over-long items

  @property
  def sizes(self) -> np.ndarray:
    return self.response_mask.sum(axis=1)


def items_of(examples: tuple[types.Example, ...], judged: np.ndarray) -> Items:
  sizes = np.asarray([len(e.responses) for e in examples])
  return Items(
      examples=examples,
      label=np.asarray([e.label for e in examples], np.int32),
      response_mask=np.arange(sizes.max())[None, :] < sizes[:, None],
      judged=judged,
  )


def pool_of(
    examples: tuple[types.Example, ...],
    drawn: tuple[types.Trajectory, ...],
    *,
    samples: int,
    logits: dict[tuple[str, int], float] | None,
    expected: dict[tuple[str, int], tuple[float, ...] | None] | None = None,
) -> Pool:
  """Stacks trajectories; items without any (over-long) are all invalid.

  `expected` are expected scores in the order that the sample saw.
  """
  grouped = grm.group(examples, drawn)
  judged = grm.judgments([len(e.responses) for e in examples], grouped)
  b, n = judged.response_mask.shape
  scores, valid = np.zeros((b, samples, n), np.int32), np.zeros((b, samples), bool)
  scores[:, : judged.scores.shape[1]] = judged.scores
  valid[:, : judged.valid.shape[1]] = judged.valid
  order = np.full((b, samples, n), -1, np.int32)
  meta_score = np.full((b, samples), np.nan, np.float32)
  means = scores.astype(np.float32)
  for i, group in enumerate(grouped):
    for j, trajectory in enumerate(group):
      order[i, j, : len(trajectory.order)] = trajectory.order
      if expected is not None and expected[trajectory.uid, trajectory.sample] is not None:
        means[i, j, list(trajectory.order)] = expected[trajectory.uid, trajectory.sample]
      if logits is not None:
        meta_score[i, j] = logits[trajectory.uid, trajectory.sample]
  return Pool(
      scores, valid, order, meta_score if logits is not None else None, means if expected is not None else None
  )


def rows_of(
    stage: str,
    pool: Pool,
    items: Items,
    *,
    benchmark: str,
    temperature: float,
    ks: tuple[int, ...],
    k_meta: int,
    soft_temperature: float | None,
    threshold: float,
    early: bool = False,
) -> list[dict[str, Any]]:
  """The rows of results.json for one model's pool: the whole set, each subset and each n, every k and guidance.

  `early`: the votes stopped once they were decided. The accuracy and the ties of votes of all samples are then what
  they are without it, and rows say `votes_saved`; `auc` and `order_flip` are None, because they need every sample.
  """
  out = []
  for subset, n, part in _parts(items):
    flips = None if early else _order_flip(pool, items, part & items.judged)
    for k in ks:
      kinds = [(False, {})]
      if pool.meta is not None:
        hard = min(k_meta, k) if k_meta else meta_algo.half(k)
        kinds.append(('hard', {'meta_score': pool.meta, 'k_meta': hard}))
        if soft_temperature is not None:
          kinds.append(('soft', {'meta_score': pool.meta, 'temperature': soft_temperature}))
      for guided, guide in kinds:
        row = {
            'stage': stage,
            'benchmark': benchmark,
            'subset': subset,
            'n': n,
            'temperature': float(temperature),
            'k': k,
            'guided': guided,
        }
        if guided == 'hard':
          row['k_meta'] = guide['k_meta']
        measured, credit = _measured(pool, items, part, k=k, guide=guide, threshold=threshold)
        if guided is False:
          plain = credit
          if pool.expected is not None:
            measured |= _expected(pool, items, part, credit, k=k, threshold=threshold)
        else:
          measured |= _gain(credit, plain, items, part)
        if early:
          measured |= _stopped(pool, part & items.judged)
        out.append(row | measured | {'order_flip': flips})
  return out


def votes_saved(pool: Pool, part: np.ndarray) -> float | None:
  """Share of the samples that the votes of these items did not need."""
  drawn = pool.order[part][:, :, 0] >= 0
  return float(1 - drawn.mean()) if drawn.size else None


def _stopped(pool: Pool, part: np.ndarray) -> dict[str, float | None]:
  """What a row of stopped votes says otherwise: the parse failures of the samples that there are."""
  drawn = pool.order[:, :, 0] >= 0
  drawn &= part[:, None]
  failed = float(1 - pool.valid[drawn].mean()) if drawn.any() else None
  return {'parse_failure': failed, 'auc': None, 'votes_saved': votes_saved(pool, part)}


def _expected(pool: Pool, items: Items, part, plain: np.ndarray, *, k: int, threshold: float) -> dict[str, float]:
  """What the same votes give by expected scores, and how much more than by the sampled ones."""
  by_means = dataclasses.replace(pool, scores=pool.expected)
  fields, credit = _measured(by_means, items, part, k=k, guide={}, threshold=threshold)
  gains = _gain(credit, plain, items, part)
  kept = {name: fields[name] for name in ('accuracy', 'stderr', 'low', 'high', 'ties', 'auc')}
  return {f'expected_{name}': value for name, value in (kept | gains).items()}


def _gain(credit: np.ndarray, plain: np.ndarray, items: Items, part: np.ndarray) -> dict[str, float]:
  """What guidance changes: the same samples in the same blocks, with and without it."""
  counted = part & np.asarray(metrics.labelled(items.label, items.response_mask))
  found = metrics.paired(credit, plain, counted)
  return {'gain': found['gain']} | {f'gain_{name}': found[name] for name in ('stderr', 'low', 'high')}


def oracle_accuracy(pool: Pool, items: Items, *, k: int, threshold: float) -> float:
  """Accuracy of votes of k in which only samples that are right by themselves vote, where there are any.

  A block with such a sample earns 1, which is what a perfect guide could make of it; a block without one keeps its
  plain vote, in which wrong samples may still tie or even add up to the right winner.
  """
  blocks = pool.valid.shape[1] // k
  right = sample_correct(pool, items, threshold)[:, : blocks * k].reshape(-1, blocks, k)
  valid = pool.valid[:, : blocks * k].reshape(-1, blocks, k)
  voters = np.where(right.any(axis=2, keepdims=True), right, valid).reshape(-1, blocks * k)
  return metrics.accuracy_at_k(
      pool.scores[:, : blocks * k], voters, items.label, items.response_mask, k, threshold=threshold
  )['accuracy']


def _parts(items: Items):
  """(subset, n, row mask): the whole, then each subset, then each number of responses where they are mixed."""
  everything = np.ones(len(items.examples), bool)
  subsets = np.asarray([e.subset for e in items.examples])
  same = lambda part: int(items.sizes[part][0]) if len(set(items.sizes[part])) == 1 else None
  yield 'all', same(everything), everything
  if same(everything) is None:
    for n in sorted(set(items.sizes.tolist())):
      yield 'all', n, items.sizes == n
  named = [subset for subset in dict.fromkeys(subsets) if subset != 'all']
  if len(set(subsets)) > 1:
    for subset in named:
      yield str(subset), same(subsets == subset), subsets == subset


def _measured(pool: Pool, items: Items, part, *, k, guide, threshold) -> tuple[dict[str, Any], np.ndarray]:
  """(fields of a row, credit float64[B] of each item)."""
  arrays = (pool.scores, pool.valid, items.label, items.response_mask, k)
  whole = metrics.accuracy_at_k(*arrays, row_mask=part, threshold=threshold, **guide)
  fitted = part & items.judged
  judged = metrics.accuracy_at_k(*arrays, row_mask=fitted, threshold=threshold, **guide)
  single = fitted & (items.sizes == 1)
  fields = {
      **{name: whole[name] for name in ('accuracy', 'stderr', 'low', 'high', 'items')},
      'accuracy_judged': judged['accuracy'] if judged['items'] else None,
      'parse_failure': judged['parse_failure'] if judged['items'] else None,
      'ties': judged['ties'] if judged['items'] and judged['parse_failure'] < 1 else None,
      'overlong': int((part & ~items.judged).sum()),
      'auc': auc_at_k(pool, items, single, k=k, guide=guide, threshold=threshold),
  }
  return fields, whole['credit']


def _order_flip(pool: Pool, items: Items, part: np.ndarray) -> float | None:
  """How often the verdict changes with the order; None where no item has two parsed samples in two orders."""
  comparable = np.zeros_like(part)
  for i in np.flatnonzero(part & (items.sizes > 1)):
    comparable[i] = len({tuple(order) for order in pool.order[i][pool.valid[i]]}) > 1
  if not comparable.any():
    return None
  return float(metrics.order_flip_rate(
      pool.scores[comparable], pool.valid[comparable], items.response_mask[comparable], pool.order[comparable]
  ))


def auc_at_k(pool: Pool, items: Items, part, *, k: int, guide: dict, threshold: float) -> float | None:
  """ROC-AUC of the mean vote of single responses against their 0/1 labels, averaged over the blocks of k.

  An item none of whose voters parsed says nothing: it stands at the threshold. None where a class is absent.
  """
  positive = items.label == 1
  if not (part & positive).any() or not (part & ~positive).any():
    return None
  blocks = pool.valid.shape[1] // k
  cut = lambda values: values[:, : blocks * k].reshape(-1, k)  # of all items, so that no part compiles its own
  valid = weights = cut(pool.valid)
  if 'meta_score' in guide:
    meta_score = cut(guide['meta_score'])
    if 'temperature' in guide:
      weights = meta_algo.soft_weights(meta_score, valid, guide['temperature'])
    else:
      weights = meta_algo.top_k(meta_score, valid, guide['k_meta'])
  # In float64, so that unanimous items tie once they are rounded, whatever their weights.
  weights = np.asarray(weights, np.float64)
  total = weights.sum(axis=1)
  mean = np.einsum('BK,BK->B', weights, np.where(valid, cut(pool.scores[:, :, 0]), 0)) / np.maximum(total, 1e-30)
  votes = np.where(total > 0, mean, threshold).reshape(-1, blocks)
  return float(np.mean([metrics.roc_auc(vote, positive, part) for vote in votes.T]))


def baselines(items: Items, benchmark: str) -> list[dict[str, Any]]:
  """What rules that read nothing would score: longest, shortest, first, random."""
  lengths = np.zeros(items.response_mask.shape, np.float32)
  for i, example in enumerate(items.examples):
    lengths[i, : len(example.responses)] = [len(response) for response in example.responses]
  credit = metrics.trivial_baselines(lengths, items.label, items.response_mask)
  out = []
  for subset, n, part in _parts(items):
    for name, values in credit.items():
      counted = part & np.asarray(metrics.labelled(items.label, items.response_mask))
      out.append({
          'benchmark': benchmark, 'subset': subset, 'n': n, 'name': name,
          **metrics.summary(np.asarray(values), counted),
      })
  return out


def example_rows(
    stage: str, pool: Pool, items: Items, *, k: int, threshold: float
) -> list[dict[str, Any]]:
  """One row per item: the vote of its first k samples, its credit, and how its samples fared."""
  block = slice(0, k)
  valid = pool.valid[:, block]
  totals = np.asarray(voting.vote(pool.scores[:, block], valid, items.response_mask))
  voters = valid.sum(axis=1)
  credit = np.asarray(voting.credit(
      totals, items.label, items.response_mask, voters > 0, voters.astype(np.float32), threshold
  ))
  out = []
  for i, example in enumerate(items.examples):
    n = len(example.responses)
    best = [] if voters[i] == 0 else np.flatnonzero(totals[i, :n] == totals[i, :n].max()).tolist()
    out.append({
        'schema': 'evaluation/1',
        'stage': stage,
        'uid': example.uid,
        'subset': example.subset,
        'n': n,
        'label': int(items.label[i]),
        'k': k,
        'totals': totals[i, :n].tolist(),
        'best': best,
        'credit': float(credit[i]),
        'voters': int(voters[i]),
        'overlong': not bool(items.judged[i]),
        'scores': [
            pool.scores[i, j, :n].tolist() if pool.valid[i, j] else None for j in range(pool.valid.shape[1])
        ],
        'meta': None if pool.meta is None else [logbook.number(x) for x in pool.meta[i]],
    })
  return out


def sample_correct(pool: Pool, items: Items, threshold: float) -> np.ndarray:
  """bool[B, K]: whether one sample alone is right - Eq 10, and for a single response by the threshold.

  On the 1..10 scale a single response's score is never its 0/1 label, so Eq 10's equality does not apply there.
  """
  right = np.asarray(
      outcome.correct(pool.scores, pool.valid, items.label, items.response_mask)
  )
  says_right = pool.scores[:, :, 0] > threshold
  single = pool.valid & (says_right == (items.label == 1)[:, None])
  return np.where((items.sizes == 1)[:, None], single, right)
