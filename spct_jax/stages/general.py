"""General instruction data at the evaluation: what a judge's training costs elsewhere.

    exact   greedy decoding reproduces the whole answer, end of sequence included: seen without decoding, since each
            token must be the likeliest after the true ones before it
    nll     negative log-likelihood per token of the answers: sum over all tokens / their number

Rows are encoded as for sft and padded to `sft.buckets`; the model is the learner's, in `model.dtype`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spct_jax import records, sharding, types
from spct_jax.algos import metrics
from spct_jax.data import instructions
from spct_jax.stages import datasets, logbook, processes, sft
from spct_jax.stages.progress import Progress
from spct_jax.text.tokenizer import Tokenizer
from spct_jax.train import batches, objectives, update

SCHEMA = 'instruction_score/1'


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows to measure, the names of those left out, by reason, and of those that training could see too."""

  rows: tuple[batches.Row, ...]
  left_out: Mapping[str, list[str]]
  contaminated: tuple[str, ...]


def load(config: Any, tok: Tokenizer) -> Rows:
  """The rows of `evaluate.instructions` that can be used."""
  found = instructions.load(config.evaluate.instructions, strict=config.strict)
  rows = sft.rows(found, tok, tuple(config.sft.buckets), what='sft', strict=config.strict)
  kept = {row.name for row in rows}
  left_out = dict(found.skipped)
  lost = [example.uid for example in found.examples if example.uid not in kept]
  if lost:
    left_out[f'over {config.sft.buckets[-1]} tokens (sft.buckets), or refused by the chat template'] = lost
  trained = {
      _content(example)
      for source in {config.data.instructions, datasets.sft_data(config)} - {''}
      for example in instructions.load(source, strict=config.strict).examples
  }
  seen = tuple(e.uid for e in found.examples if e.uid in kept and _content(e) in trained)
  whole = tuple(dataclasses.replace(row, learnt=None) for row in rows)  # parts that training left out count here
  return Rows(whole, left_out, seen)


def _content(example: types.Example) -> tuple:
  return example.messages, example.responses


def scorer(config: Any, decoder: Any, mesh: Any) -> Callable:
  """`(params, host batch) -> (nll, exact)` on the host, compiled once for all models."""
  scores = objectives.completion_scores(decoder, mesh, chunk=config.model.logits_chunk)
  return lambda params, batch: sharding.to_host(scores(params, update.put_batch(batch, mesh)))


def measure(
    config: Any, score: Callable, params: Any, rows: Rows, path: pathlib.Path, *, pad_id: int, desc: str
) -> dict[str, Any]:
  """A model's fields of instructions.json; its rows one by one are in `path`, perhaps from an earlier run."""
  if not processes.as_writer_says(path.exists, what='instruction scores'):
    size = config.evaluate.meta_batch
    order = sorted(range(len(rows.rows)), key=lambda i: rows.rows[i].length)  # alike lengths share a batch
    nll, exact = np.zeros(len(order), np.float32), np.zeros(len(order), bool)
    with Progress(total=len(order), desc=desc) as progress:
      for start in range(0, len(order), size):
        index = order[start : start + size]
        batch = batches.pad(
            [rows.rows[i] for i in index],
            num_rows=size,
            buckets=tuple(config.sft.buckets),
            pad_id=pad_id,
            columns={},
        )
        found = score(params, batch)
        nll[index], exact[index] = (np.asarray(values)[: len(index)] for values in found)
        progress.update(len(index))
    told = [
        {
            'schema': SCHEMA, 'uid': row.name, 'exact': bool(exact[i]), 'nll': logbook.number(nll[i]),
            'tokens': len(row.completion_ids),
        }
        for i, row in enumerate(rows.rows)
    ]
    processes.only_writer(lambda: records.write_jsonl(path, told), what=f'writing {path}')
  return summary(list(records.read_jsonl(path)))


def summary(told: list[dict[str, Any]]) -> dict[str, Any]:
  """Share and interval of `exact`, and nll over all tokens; None if a likelihood is not finite."""
  exact = metrics.summary(np.asarray([row['exact'] for row in told], np.float64), np.ones(len(told), bool))
  tokens = sum(row['tokens'] for row in told)
  total = None if any(row['nll'] is None for row in told) else sum(row['nll'] for row in told)
  return {
      'exact': exact['accuracy'],
      **{name: exact[name] for name in ('stderr', 'low', 'high', 'items')},
      'nll': None if total is None else total / tokens,
      'tokens': tokens,
  }
