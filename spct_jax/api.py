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
from spct_jax.judges import endings, grm, prompts
from spct_jax.judges import expected as expected_scores
from spct_jax.models import hf, int8, unrolled
from spct_jax.models.transformer import Transformer
from spct_jax.sampling.engine import Engine
from spct_jax.sampling.scoring import Scorer
from spct_jax.stages import loading, named, workdir
from spct_jax.text import spellings
from spct_jax.text import tokenizer as tokenizers
from spct_jax.train import lora, peft

_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # prompt buckets, in tokens
_ROWS = 16  # judgements that are scored at once on a device, where scores are expected ones


@dataclasses.dataclass(frozen=True)
class Sample:
  """One judgement: what the judge wrote, and its score per response (None if it did not parse; `parse` says why).

  `expected`: the mean of each score over all that the judge might have written at its place, where asked for.
  """

  critique: str
  scores: tuple[int, ...] | None
  parse: str
  expected: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class Verdict:
  """`scores`: the sum over the samples that parsed, one per response. `best`: the index of the highest, ties drawn by
  the seed; None if no sample parsed. `votes_saved`: samples that were not needed, where the vote may stop early."""

  scores: tuple[float, ...]
  best: int | None
  samples: tuple[Sample, ...]
  votes_saved: int


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
  ends: endings.Endings
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
      stop_strings: Sequence[str] = (),
      stop_at_scores: bool = False,
      constrain_scores: bool = False,
      weights: str = '',
      cache: str = '',
  ) -> 'RewardModel':
    """Loads a Hugging Face folder (config.json, safetensors, tokenizer), a PEFT folder, or a workdir of this package.

    stage: which model of a workdir: 'grpo', 'rft' or 'sft'; the furthest that is finished if None.
    template, max_prompt_tokens, max_new_tokens: by default a workdir's own, else 'grm', 4096 and 1024.
    temperature: of the samples (paper: 0.5). dtype: of the computation; bfloat16 on accelerators, float32 on a CPU.
    stop_strings: texts that end a sample, which is cut before them. stop_at_scores: a sample ends with its score line.
    constrain_scores: only score lines that parse are drawn, within max_new_tokens: every sample votes.
    weights, cache: 'int8' keeps matrices, or keys and values, in eight bits: half the memory of bfloat16, and what is
    drawn then is nearly the model's (`models/int8.py`); '' for dtype.
    """
    for name, value in (('weights', weights), ('cache', cache)):
      if value not in ('', 'int8'):
        raise ValueError(f"{name}: got {value!r}; allowed: 'int8', or '' for dtype")
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
      raise ValueError(f'no folder {str(folder)!r}; give a Hugging Face folder or a workdir with a trained stage')
    strings = stop_strings if isinstance(stop_strings, str) else tuple(stop_strings)
    ends = endings.Endings(strings, stop_at_scores, constrain_scores)
    dtype = dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    mesh = sharding.make_mesh({'data': -1})
    found = _open_workdir(folder, stage, mesh) if _is_workdir(folder) else _open_hf(folder, dtype, mesh)
    decoder, params, tok, page = found
    endings.check(ends, tok, max_new_tokens or page['max_new_tokens'])
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
        ends=ends,
        cache_dtype=cache or None,
    )

  def score(
      self,
      query_or_messages: str | Sequence[dict[str, str]] | Sequence[types.Message],
      responses: Sequence[str],
      k: int = 8,
      seed: int = 0,
      uid: str | None = None,
      early: str = 'none',
      early_alpha: float = 0.05,
      expected: bool = False,
  ) -> Verdict:
    """Judges n >= 1 responses with k samples.

    query_or_messages: the user's query, or a conversation that ends with it: `{'role', 'content'}` dicts.
    uid: names the randomness; with none, the content is hashed, so the same question gets the same samples.
    early: 'exact' stops once no outcome of the other samples can change which of n >= 2 responses is best: `best` is
      that of all k samples, `scores` are the sums of those that were needed. 'statistical' stops when another best is
      unlikely: its chance is at most `early_alpha`.
    expected: votes are expected scores: the exact probability of every score is used, not the one that was drawn.
    """
    example = _example(query_or_messages, responses, uid)
    if k < 1:
      raise ValueError(f'k: got {k} samples; allowed: 1 or more')
    rule = grm.early(early, alpha=early_alpha, threshold=0.0)
    if rule is not None and len(responses) == 1:
      raise ValueError(
          f'early: got {early!r} with one response; what a single response gets is its score, which every sample '
          "changes: leave early='none'"
      )
    if rule is not None and expected:
      raise ValueError(
          f'early: got {early!r} with expected=True; votes stop when the drawn scores have decided, which expected ones '
          "have not: leave one of them out"
      )
    spelling = spellings.of(self.tokenizer) if expected else None
    judged = grm.judge(self._judge(k, seed), [example], samples=k, stage='score', early=rule)
    if judged.overlong:
      raise ValueError(
          f'the prompt is over {self.max_prompt_tokens} tokens; shorten the responses, or load with a larger '
          'max_prompt_tokens'
      )
    arrays = judged.judgments
    samples = tuple(map(_sample, judged.grouped[0], self._expected(judged.grouped[0], spelling)))
    scores = arrays.scores
    if expected:
      scores = [sample.expected or sample.scores or (0,) * len(responses) for sample in samples]
      scores = np.asarray([scores], np.float32)
    totals = np.asarray(voting.vote(scores, arrays.valid, arrays.response_mask))[0]
    draw = int(hashlib.blake2b(f'{seed}:{example.uid}'.encode(), digest_size=4).hexdigest(), 16) / 2**32
    best = int(voting.winner(totals[None], arrays.response_mask, np.asarray([draw], np.float32))[0])
    return Verdict(
        scores=tuple(float(total) for total in totals),
        best=best if arrays.valid.any() else None,
        samples=samples,
        votes_saved=k - len(judged.grouped[0]),
    )

  def _expected(self, trajectories, spelling) -> list[expected_scores.Expected | None]:
    if spelling is None:
      return [None] * len(trajectories)
    scorer = Scorer(self.decoder, self.mesh, _ROWS * sharding.data_ways(self.mesh))
    scale = prompts.SCALES['pointwise']
    return expected_scores.of(
        functools.partial(scorer.masses, self.params), trajectories, [scale] * len(trajectories),
        spelling=spelling, temperature=self.temperature,
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
        ends=self.ends,
    )
    engine = _engine(
        self.decoder, self.mesh, self.cache_rules, k, self.max_new_tokens, self.tokenizer.eos_ids, seed,
        self.cache_dtype,
    )
    generate = lambda batch, tasks, infos, withdraw=None: engine.generate(self.params, batch, tasks, withdraw=withdraw)
    return grm.Judge(generate, self.tokenizer, settings)


@functools.lru_cache(maxsize=32)
def _engine(decoder, mesh, cache_rules, rows, max_new_tokens, eos_ids, seed, cache_dtype):
  return Engine(
      model=decoder, mesh=mesh, cache_rules=cache_rules, rows=rows, max_new_tokens=max_new_tokens,
      eos_ids=eos_ids, seed=seed, stage='score', cache_dtype=cache_dtype,
  )


def _sample(trajectory: types.Trajectory, expected: expected_scores.Expected | None) -> Sample:
  """Scores in the order of the caller's responses: the shown order is undone."""
  def own(shown):
    if shown is None:
      return None
    out = [0] * len(trajectory.order)
    for slot, response in enumerate(trajectory.order):
      out[response] = shown[slot]
    return tuple(out)

  means = None if expected is None else expected.scores
  return Sample(trajectory.text, own(trajectory.scores), trajectory.parse, own(means))


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
