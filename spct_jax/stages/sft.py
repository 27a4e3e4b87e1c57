"""Supervised fine-tuning on general instruction data: the warm start before any judging.

Rows are conversations; the loss is on the last answer only (paper section 3: completion only).
"""

import functools
from typing import Any

from spct_jax import types
from spct_jax.data import instructions, stream
from spct_jax.data.preference import Loaded
from spct_jax.stages import checks, datasets, fit, loading, named, processes
from spct_jax.stages.workdir import Workdir
from spct_jax.text import chat, encode
from spct_jax.text.tokenizer import Tokenizer
from spct_jax.train import batches, objectives

READS = ()
WRITES = ('sft/checkpoint', 'sft/DONE.json')


def rows(
    loaded: Loaded, tok: Tokenizer, buckets: tuple[int, ...], *, what: str, strict: bool
) -> tuple[batches.Row, ...]:
  """Instruction rows as token ids; unusable and over-long ones are counted, named and left out."""
  found, path = [], loaded.source
  if loaded.skipped:
    processes.say(loaded.describe())
  refused = []
  for item in loaded.examples:
    try:
      prompt = encode.encode(chat.wrap_messages(item.messages, tok), tok)
    except ValueError as error:  # the tokenizer's chat template knows no such conversation
      refused.append(f'{item.uid} ({error})')
      continue
    completion, learnt = _answer(item, tok)
    found.append(batches.Row(item.uid, tuple(prompt), completion, learnt=learnt))
  if refused and strict:
    raise ValueError(f'{path}: strict, and the chat template refuses {len(refused)} rows: {"; ".join(refused[:3])}')
  if refused:
    processes.say(f'{what}: the chat template refuses {len(refused)} rows, left out: {"; ".join(refused[:3])}')
  fitting = batches.fitting(found, buckets)
  if fitting.too_long and strict:
    raise ValueError(f'{path}: strict, and {len(fitting.too_long)} rows are too long: {"; ".join(fitting.too_long[:5])}')
  if fitting.too_long:
    processes.say(
        f'{what}: {len(fitting.too_long)} rows are too long and left out: {"; ".join(fitting.too_long[:5])}'
    )
  if not fitting.keep:
    raise ValueError(
        f'{path}: none of {len(found)} instruction rows fits {buckets[-1]} tokens; raise {what}.buckets'
    )
  return tuple(found[i] for i in fitting.keep)


def _answer(item: types.Example, tok: Tokenizer) -> tuple[tuple[int, ...], tuple[bool, ...] | None]:
  """(ids of the answer and its end, which of them are learnt or None for all); parts are encoded one by one."""
  if not isinstance(item, instructions.Instruction):
    return (*tok.encode_data(item.responses[0]), tok.eos_ids[0]), None
  ids, learnt = [], []
  for text, train in item.pieces:
    new = tok.encode_data(text)
    ids += new
    learnt += [train] * len(new)
  return (*ids, tok.eos_ids[0]), (*learnt, item.pieces[-1][1])


def run(config: Any, workdir: Workdir, mesh: Any, generate: Any = None) -> None:
  """Trains `config.sft.init` on `config.sft.data`, in the order that `config.sft.order` says."""
  del generate
  checks.stage(config, mesh, 'sft')
  source = datasets.sft_data(config)
  reads = (
      source,
      *loading.setup_reads(config),
      *named.reads(config, config.sft.init),
  )
  if workdir.is_done('sft', config, reads):
    return processes.say('sft: done before')
  tok = loading.tokenizer(config)
  loaded = instructions.load(source, strict=config.strict)
  data = rows(loaded, tok, tuple(config.sft.buckets), what='sft', strict=config.strict)
  decoder = loading.model(config, tok, name=config.sft.init)
  trained = loading.learner(config, 'sft', decoder)
  seed, order = stream.stage_seed(config.seed, 'sft'), stream.ORDERS[config.sft.order]
  workdir.start('sft', config, reads)

  def batch_of(step):
    index, _ = order(seed=seed, step=step, batch_size=config.sft.batch, size=len(data))
    return batches.pad(
        [data[i] for i in index],
        num_rows=config.sft.batch,
        buckets=tuple(config.sft.buckets),
        pad_id=tok.pad_id,
        columns={},
    )

  fit.fit(
      config,
      workdir,
      mesh,
      stage='sft',
      trained=trained,
      params=functools.partial(loading.params, config, config.sft.init, decoder, workdir, mesh),
      loss_fn=objectives.sft_objective(trained, chunk=config.model.logits_chunk),
      batch_of=batch_of,
      steps=config.sft.steps,
  )
  workdir.mark_done('sft', config, reads, WRITES)
