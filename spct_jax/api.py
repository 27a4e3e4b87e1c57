"""The three-line use of a trained judge:

    judge = spct_jax.RewardModel.load('my_judge')
    verdict = judge.score('What is 2 + 2?', ['4', '5'], k=8)
    verdict.best, verdict.scores, verdict.samples[0].critique

It votes as an evaluation does: k samples, each in an order of its own, summed per response (paper 2.6, Eq 14).
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from spct_jax import pages, sharding, types
from spct_jax.algos import voting
from spct_jax.judges import grm, prompts
from spct_jax.models import hf, int8, unrolled
from spct_jax.models.transformer import Transformer
from spct_jax.sampling.engine import Engine
from spct_jax.stages import loading, named, workdir
from spct_jax.text import tokenizer as tokenizers
from spct_jax.train import lora, peft

_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # prompt buckets, in tokens


@dataclasses.dataclass(frozen=True)
class Sample:
  """One judgement: what the judge wrote, and its score per response (None if it did not parse; `parse` says why)."""

  critique: str
  scores: tuple[int, ...] | None
  parse: str


@dataclasses.dataclass(frozen=True)
class Verdict:
  """`scores`: the sum over the samples that parsed, one per response. `best`: the index of the highest, ties drawn by
  the seed; None if no sample parsed."""

  scores: tuple[float, ...]
  best: int | None
  samples: tuple[Sample, ...]


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """A generative judge with its parameters, layers side by side (`unrolled`); made by `load`."""

  decoder: Transformer
  params: Any
  tokenizer: tokenizers.Tokenizer
  template: prompts.Template
  mesh: Any
  max_prompt_tokens: int
  max_new_tokens: int
  temperature: float
  cache_rules: tuple
  cache_dtype: str | None

  @classmethod
  def load(
      cls,
      folder: str | pathlib.Path,
      *,
      stage: str | None = None,
      template: str | None = None,
      max_prompt_tokens: int | None = None,
      max_new_tokens: int | None = None,
      temperature: float = 0.5,
      dtype: str | None = None,
      weights: str = '',
      cache: str = '',
  ) -> 'RewardModel':
    """Loads a Hugging Face folder (config.json, safetensors, tokenizer), a PEFT folder, or a workdir of this package.

    stage: which model of a workdir: 'grpo', 'rft' or 'sft'; the furthest that is finished if None.
    template, max_prompt_tokens, max_new_tokens: by default a workdir's own, else 'grm', 4096 and 1024.
    temperature: of the samples (paper: 0.5). dtype: of the computation; bfloat16 on accelerators, float32 on a CPU.
    weights, cache: 'int8' keeps matrices, or keys and values, in eight bits: half the memory of bfloat16, and what is
    drawn then is nearly the model's (`models/int8.py`); '' for dtype.
    """
    for name, value in (('weights', weights), ('cache', cache)):
      if value not in ('', 'int8'):
        raise ValueError(f"{name}: got {value!r}; allowed: 'int8', or '' for dtype")
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
      raise ValueError(f'no folder {str(folder)!r}; give a Hugging Face folder or a workdir with a trained stage')
    dtype = dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    mesh = sharding.make_mesh({'data': -1})
    found = _open_workdir(folder, stage, mesh) if _is_workdir(folder) else _open_hf(folder, dtype, mesh)
    decoder, params, tok, page = found
    decoder = Transformer(dataclasses.replace(decoder.config, dtype=dtype, param_dtype=dtype, remat=False))
    params = unrolled.consume(decoder.config, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    decoder = unrolled.model(decoder)
    if weights:
      params = jax.jit(int8.quantise, static_argnums=0)(decoder.config, params)
    return cls(
        decoder=decoder,
        params=params,
        tokenizer=tok,
        template=prompts.load_template(template or page['template']),
        mesh=mesh,
        max_prompt_tokens=max_prompt_tokens or page['max_prompt_tokens'],
        max_new_tokens=max_new_tokens or page['max_new_tokens'],
        temperature=temperature,
        cache_rules=pages.sharding().cache_rules,
        cache_dtype=cache or None,
    )

  def score(
      self,
      query_or_messages: str | Sequence[dict[str, str]] | Sequence[types.Message],
      responses: Sequence[str],
      k: int = 8,
      seed: int = 0,
      uid: str | None = None,
  ) -> Verdict:
    """Judges n >= 1 responses with k samples.

    query_or_messages: the user's query, or a conversation that ends with it: `{'role', 'content'}` dicts.
    uid: names the randomness; with none, the content is hashed, so the same question gets the same samples.
    """
    example = _example(query_or_messages, responses, uid)
    if k < 1:
      raise ValueError(f'k: got {k} samples; allowed: 1 or more')
    judged = grm.judge(self._judge(k, seed), [example], samples=k, stage='score')
    if judged.overlong:
      raise ValueError(
          f'the prompt is over {self.max_prompt_tokens} tokens; shorten the responses, or load with a larger '
          'max_prompt_tokens'
      )
    arrays = judged.judgments
    totals = np.asarray(voting.vote(arrays.scores, arrays.valid, arrays.response_mask))[0]
    draw = int(hashlib.blake2b(f'{seed}:{example.uid}'.encode(), digest_size=4).hexdigest(), 16) / 2**32
    best = int(voting.winner(totals[None], arrays.response_mask, np.asarray([draw], np.float32))[0])
    return Verdict(
        scores=tuple(float(total) for total in totals),
        best=best if arrays.valid.any() else None,
        samples=tuple(_sample(trajectory) for trajectory in judged.grouped[0]),
    )

  def _judge(self, k: int, seed: int) -> grm.Judge:
    limit = self.max_prompt_tokens
    settings = grm.Settings(
        template=self.template,
        orders='shuffle',
        single='scale',
        given_principles=False,
        reference_answer=False,
        buckets=tuple(length for length in _LENGTHS if length < limit) + (limit,),
        chunk_prompts=k,
        chunk_tasks=k,
        temperature=self.temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        seed=seed,
    )
    engine = _engine(
        self.decoder, self.mesh, self.cache_rules, k, self.max_new_tokens, self.tokenizer.eos_ids, seed,
        self.cache_dtype,
    )
    generate = lambda batch, tasks, infos: engine.generate(self.params, batch, tasks)
    return grm.Judge(generate, self.tokenizer, settings)


@functools.lru_cache(maxsize=32)
def _engine(decoder, mesh, cache_rules, rows, max_new_tokens, eos_ids, seed, cache_dtype):
  return Engine(
      model=decoder, mesh=mesh, cache_rules=cache_rules, rows=rows, max_new_tokens=max_new_tokens,
      eos_ids=eos_ids, seed=seed, stage='score', cache_dtype=cache_dtype,
  )


def _sample(trajectory: types.Trajectory) -> Sample:
  """Scores in the order of the caller's responses: the shown order is undone."""
  scores = None
  if trajectory.scores is not None:
    own = [0] * len(trajectory.order)
    for slot, response in enumerate(trajectory.order):
      own[response] = trajectory.scores[slot]
    scores = tuple(own)
  return Sample(trajectory.text, scores, trajectory.parse)


def _example(query, responses, uid) -> types.Example:
  if isinstance(responses, str) or not responses or not all(isinstance(r, str) for r in responses):
    raise ValueError(f'responses: got {responses!r:.80}; allowed: a list of one or more strings')
  if isinstance(query, str):
    messages = (types.Message('user', query),)
  else:
    messages = tuple(
        m if isinstance(m, types.Message) else types.Message(m['role'], m['content']) for m in query
    )
  if not messages or messages[-1].role != 'user':
    raise ValueError(
        f'the conversation must end with the user turn to be answered; got roles {[m.role for m in messages]}'
    )
  if uid is None:
    content = json.dumps([[dataclasses.astuple(m) for m in messages], list(responses)])
    uid = hashlib.blake2b(content.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()
  return types.Example(uid=uid, messages=messages, responses=tuple(responses))


def _is_workdir(folder: pathlib.Path) -> bool:
  path = folder / 'config.json'
  if not path.is_file():
    return False
  try:
    fields = json.loads(path.read_text(encoding='utf-8'))
  except json.JSONDecodeError:
    return False
  return isinstance(fields, dict) and {'pipeline', 'judge', 'tokenizer'} <= fields.keys()


def _open_hf(folder, dtype, mesh):
  """A Hugging Face folder, or adapters in the layout of PEFT, merged into the base that they name."""
  if peft.is_folder(folder):
    page = ConfigDict({'model': {'path': str(folder)}})
    base = pathlib.Path(named.chain(page, 'base', 'folder')[1].path)
    decoder, params, tok, page = _open_hf(base, dtype, mesh)
    adapted, adapters = peft.load(folder, decoder, mesh, rules=(('', ()),))
    params = jax.jit(lora.merge, static_argnums=2, donate_argnums=0)(params, adapters, adapted.settings)
    return decoder, params, tok, page
  tok, size = tokenizers.load(folder), hf.read_config(folder).vocab_size
  if tok.vocab_size > size:
    raise ValueError(
        f'{folder}: its tokenizer has {tok.vocab_size} tokens, but the model embeds {size}; the folder was put together '
        'from two models'
    )
  # Whole on every device, and read once.
  decoder, params = hf.load(folder, dtype=dtype, mesh=mesh, rules=(('', ()),), vocab_multiple=1)
  page = {'template': 'grm', 'max_prompt_tokens': 4096, 'max_new_tokens': 1024}
  return decoder, params, tok, page


def _open_workdir(folder, stage, mesh):
  config = ConfigDict(json.loads((folder / 'config.json').read_text(encoding='utf-8')))
  finished = [name for name in reversed(named.LANGUAGE) if (folder / name / 'DONE.json').exists()]
  if not finished or (stage is not None and stage not in finished):
    raise ValueError(
        f'workdir {folder}: {"stage " + repr(stage) if stage else "no trained stage"} is '
        f'{"not " if stage else ""}finished there; finished: {", ".join(finished) or "none"}'
    )
  tok = loading.tokenizer(config)
  stage = stage or finished[0]
  decoder = loading.model(config, tok, name=stage)
  params = loading.params(config, stage, decoder, workdir.Workdir(folder), mesh)
  params = jax.device_put(params, sharding.replicated(mesh))
  page = {
      'template': config.judge.template,
      'max_prompt_tokens': config.judge.buckets[-1],
      'max_new_tokens': config.judge.max_new_tokens,
  }
  return decoder, params, tok, page
