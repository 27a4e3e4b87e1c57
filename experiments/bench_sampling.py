"""k votes of one prompt: what sampling them costs, side by side.

    python experiments/bench_sampling.py --json sampling.json           all bars, several minutes
    python experiments/bench_sampling.py --bars=mid,top_p --repeats=3
    python experiments/bench_sampling.py --tiny                         smoke: everything small, no bar means anything

Each side is a process of its own, all pinned to one core, one after the other; the same weights (a folder
that transformers reads), float32, caches on:

    ours          spct_jax.sampling: a prompt is prefilled, kept and read once for all of its samples
    each, copied  the unshared twin, here in this file: the same layers, blockwise prefill and draw in one
                  jitted program, but a cache of prompt and answer for every sample; each sample's prompt is
                  prefilled ('each'), or every prompt once and its cache copied ('copied')
    hf            transformers.generate, num_return_sequences = k, sdpa; where torch and transformers are there
    tunix         the sampler of google-tunix, every prompt given k times; where it is there

Times are medians over the repeats, after compilation, in CPU seconds of the process: with one pinned thread
that is the wall time on a free core, whoever else is on it. The wall time stands beside it, and the two
differ where the core was shared. Peaks are of resident memory, weights and compiler included; 'temp' is what
the compiled program asks for beside its arguments, 'caches' what it carries from step to step. Before any
time counts, the sides must agree on the next token's logits after a prompt.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.abspath(__file__)
MID = dict(vocab=32768, width=512, layers=8, heads=8, kv_heads=4, ffn=1536)
TINY = dict(vocab=32768, width=64, layers=12, heads=4, kv_heads=2, ffn=192)
SMOKE = dict(vocab=300, width=16, layers=2, heads=4, kv_heads=2, ffn=32)


@dataclasses.dataclass(frozen=True)
class Work:
  """`prompts` prompts of P tokens, k samples each of N tokens, all of them side by side."""

  model: str
  prompts: int
  P: int
  k: int
  N: int
  top_p: float = 1.0


LONG = {k: Work('mid', 1, 1024, k, 32) for k in (1, 4, 8, 16, 32)}
SHORT = Work('mid', 4, 256, 8, 128)
BARS = ('long', 'mid', 'tiny', 'top_p', 'votes', 'one', 'decode', 'memory', 'share', 'programs')


def main() -> int:
  args = _flags()
  if args.side:
    return _child(args)
  bars = args.bars.split(',') if args.bars else list(BARS)
  unknown = sorted(set(bars) - set(BARS))
  if unknown:
    raise SystemExit(f'--bars: got {", ".join(unknown)}; allowed are {", ".join(BARS)}')
  allowed = sorted(os.sched_getaffinity(0))
  core = allowed[-1] if args.core is None else args.core
  if core not in allowed:
    raise SystemExit(f'--core is {core}, but this process may use {allowed}: choose one of these.')
  print(f'command: {shlex.join(["python", *sys.argv])}   (pinned to core {core})')
  with tempfile.TemporaryDirectory() as folder:
    bench = Bench(args, core, folder)
    rows = [row for bar in bars for row in getattr(bench, bar)()]
  print()
  for row in rows:
    bar = '' if row['goal'] is None else f'   goal {row["goal"]:g}, floor {row["floor"]:g}'
    print(f"{row['value']:10.4g} {row['unit']:4} {row['name']}{bar}")
  if args.json:
    with open(args.json, 'w') as f:
      json.dump(rows, f, indent=2)
  return 0


def _flags() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--json', metavar='FILE', help='write the measurements there')
  parser.add_argument('--bars', default='', help=f'some of {",".join(BARS)} (default: all)')
  parser.add_argument('--repeats', type=int, default=3, help='timed runs of each side (default %(default)s)')
  parser.add_argument('--core', type=int, help='the core to run on (default: the last one allowed)')
  parser.add_argument('--tiny', action='store_true', help='smoke: a very small model and very small work')
  parser.add_argument('--side', help=argparse.SUPPRESS)  # what a process of its own runs
  parser.add_argument('--work', help=argparse.SUPPRESS)
  parser.add_argument('--folder', help=argparse.SUPPRESS)
  return parser.parse_args()


# --- the bars


class Bench:
  """Runs sides, each of them once for the same work, and makes rows of what they say."""

  def __init__(self, args, core, folder):
    self.args, self.core, self.folder, self.ran = args, core, folder, {}
    self.shapes = dict.fromkeys(('mid', 'tiny'), SMOKE) if args.tiny else {'mid': MID, 'tiny': TINY}

  def long(self):
    return self._against('hf', LONG[32], 10, 6) + self._against('tunix', LONG[32])

  def mid(self):
    return self._against('hf', SHORT, 2.5, 2) + self._against('each', SHORT) + self._against('tunix', SHORT)

  def tiny(self):
    work = dataclasses.replace(SHORT, model='tiny')
    return self._against('hf', work, 6, 4) + self._against('each', work) + self._against('tunix', work)

  def top_p(self):
    work = dataclasses.replace(SHORT, top_p=0.95)
    return self._against('hf', work, 4, 3) + self._against('tunix', work)

  def votes(self):
    """Against each vote prefilled: the ratio as a part of k."""
    rows = []
    for k in (4, 8, 16):
      ratio, *rest = self._against('each', LONG[k])
      rows += [{**ratio, 'name': f'{ratio["name"]}, over k', 'value': ratio['value'] / k, 'goal': 0.55, 'floor': 0.4}]
      rows += rest
    return rows

  def one(self):
    """What sharing costs where there is nothing to share; beside it 16 prompts at once."""
    rows = []
    for work in (LONG[1], dataclasses.replace(SHORT, prompts=16, k=1, N=32)):
      ratio, *rest = self._against('each', work)
      rows += [{**ratio, 'name': f'{ratio["name"]}, nothing shared', 'goal': 1 / 1.15, 'floor': 0.8}, *rest]
    return rows

  def decode(self):
    """Decoding alone: N tokens less one, which costs a prefill and a step."""
    work, rate = self._sized(LONG[32]), {}
    for side in ('ours', 'copied'):
      whole = self._run(side, work)
      first = self._run(side, dataclasses.replace(work, N=1))
      if whole and first:
        rate[side] = whole['cpu'] - first['cpu']
    name = f'decode: times as fast as a copied cache, {_said(work)}'
    return [_row(name, rate['copied'] / max(rate['ours'], 1e-9), 'x', True, 4, 3)]

  def memory(self):
    work = self._sized(LONG[16])
    ours, each = self._run('ours', work), self._run('each', work)
    whole = lambda side: side['temp'] + side['caches']
    name = f'memory: temp and caches of each vote prefilled over ours, {_said(work)}'
    rows = [_row(name, whole(each) / whole(ours), 'x', True, 15, 8)]
    for name, side in (('ours', ours), ('each', each)):
      for part in ('temp', 'caches'):
        rows.append(_row(f'memory: {part} of {name}', side[part] / 2**20, 'MiB', False))
    return rows

  def share(self):
    got = self._run('share', self._sized(Work('tiny', 256, 1024, 32, 1500)))
    what = f'{got["rows"]} rows, {got["slots"]} slots of {got["width"]} seats'
    return [
        _row(f'share: useful of the rows paid, prefilled tokens as rows, {what}', got['share'], '', True, 0.85, 0.75),
        _row('share: useful of the decoded rows', got['decoded'], '', True),
        _row('share: seats a row', got['slots'] * got['width'] / got['rows'], '', False),
    ]

  def programs(self):
    got = self._run('programs', dataclasses.replace(SHORT, model='tiny', N=8))
    return [
        _row('programs: compiled in the first pass over four prompt lengths', got['first'], '', False, 8, 12),
        _row('programs: compiled in the second pass', got['second'], '', False, 0, 0),
    ]

  def _sized(self, work):
    if not self.args.tiny:
      return work
    return dataclasses.replace(work, prompts=min(work.prompts, 8), P=16, k=min(work.k, 6), N=min(work.N, 15))

  def _against(self, other, work, goal=None, floor=None):
    work = self._sized(work)
    a, b = self._run('ours', work), self._run(other, work)
    if not b:
      return []
    for x, y in zip(a['logits'], b['logits'], strict=True):
      if abs(x - y) > 1e-3:
        raise SystemExit(f'{other} gives the logits {b["logits"]}, ours are {a["logits"]}: not the same model.')
    name = _said(work)
    rows = [_row(f'{name}: times as fast as {other}', b['cpu'] / a['cpu'], 'x', True, goal, floor)]
    for side, got in (('ours', a), (other, b)):
      rows.append(_row(f'{name}: {side}, CPU', got['cpu'], 's', False))
      rows.append(_row(f'{name}: {side}, wall', got['wall'], 's', False))
      rows.append(_row(f'{name}: {side}, peak', got['peak'] / 2**20, 'MiB', False))
      if 'compiled' in got:
        rows.append(_row(f'{name}: {side}, programs compiled', got['compiled'], '', False))
    return rows

  def _run(self, side, work):
    """What a process of its own says; None where its library is not installed."""
    needs = {'hf': ('torch', 'transformers'), 'tunix': ('tunix',)}.get(side, ())
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
      print(f'{side}: left out, {", ".join(missing)} not installed', flush=True)
      return None
    if (side, work) not in self.ran:
      folder = os.path.join(self.folder, work.model)
      if not os.path.isdir(folder):
        self._process('make', work, folder)
      self.ran[side, work] = self._process(side, work, folder)
      print(f'{side:7} {_said(work)}: {self.ran[side, work]}', flush=True)
    return self.ran[side, work]

  def _process(self, side, work, folder):
    flags = ['--side', side, '--work', json.dumps(dataclasses.asdict(work)), '--folder', folder]
    flags += ['--repeats', str(self.args.repeats), *(['--tiny'] if self.args.tiny else [])]
    one = {name: '1' for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')}
    xla = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_multi_thread_eigen=false'
    environment = {**os.environ, **one, 'XLA_FLAGS': xla, 'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'}
    ran = subprocess.run(
        [sys.executable, HERE, *flags], env=environment, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {self.core}),  # before any thread pool is sized
    )
    if ran.returncode:
      raise SystemExit(f'{side} failed on {work}, see above')
    return json.loads(ran.stdout.splitlines()[-1])


def _said(work: Work) -> str:
  prompts = '' if work.prompts == 1 else f'{work.prompts} prompts, '
  truncated = '' if work.top_p == 1 else f', top-p {work.top_p:g}'
  return f'{work.model}, {prompts}P={work.P}, k={work.k}, N={work.N}{truncated}'


def _row(name, value, unit, higher_is_better, goal=None, floor=None):
  return {
      'name': name,
      'value': value,
      'unit': unit,
      'higher_is_better': higher_is_better,
      'goal': goal,
      'floor': floor,
  }


# --- what a process of its own does


def _child(args) -> int:
  sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
  work = Work(**json.loads(args.work))
  if args.side in ('hf', 'tunix'):
    result = {'hf': _hf, 'tunix': _tunix}[args.side](work, args.folder, args.repeats)
  else:
    sides = {'make': _make, 'ours': _ours, 'each': _each, 'copied': _copied, 'share': _share, 'programs': _programs}
    shape = SMOKE if args.tiny else {'mid': MID, 'tiny': TINY}[work.model]
    result = sides[args.side](work, args.folder, args.repeats, shape)
  print(json.dumps(result))
  return 0


def _timed(run, repeats, warm=None):
  """Medians of `run()` after one run of it (or of `warm`) that does not count, and the peak of resident memory."""
  (warm or run)()
  cpu, wall = [], []
  for _ in range(repeats):
    start = time.process_time(), time.perf_counter()
    run()
    cpu.append(time.process_time() - start[0])
    wall.append(time.perf_counter() - start[1])
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {'cpu': statistics.median(cpu), 'wall': statistics.median(wall), 'peak': peak}


def _prompts(work, vocab):
  import numpy as np

  return np.random.default_rng(0).integers(1, vocab, (work.prompts, work.P)).astype(np.int32)


def _make(work, folder, repeats, shape):
  """Random weights in a folder that all sides read."""
  import jax
  from spct_jax.models import hf
  from spct_jax.models.config import BlockConfig, ModelConfig
  from spct_jax.models.transformer import Transformer

  config = ModelConfig(
      vocab_size=shape['vocab'], width=shape['width'], heads=shape['heads'], kv_heads=shape['kv_heads'],
      head_dim=shape['width'] // shape['heads'], ffn=shape['ffn'],
      period=(BlockConfig(rope_theta=1e6),),  # the one base that Tunix's Llama computes with, whatever its config says
      num_periods=shape['layers'], tied=True,
  )
  model = Transformer(config)
  hf.save(folder, model, jax.jit(model.init)(jax.random.key(0)))
  return {}


def _counted():
  """A list that grows by one with every program that is compiled."""
  import jax

  seen = []
  event = '/jax/core/compile/backend_compile_duration'
  listen = lambda name, *_, **__: seen.append(name) if name == event else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  return seen


def _next_logits(model, params, tokens):
  """The first logits after the first prompt."""
  import jax
  import jax.numpy as jnp

  hidden = jax.jit(lambda params: model.unembed(params, model.hidden(params, jnp.asarray(tokens[:1]))[:, -1:]))
  return [float(x) for x in hidden(params)[0, 0, :4]]


def _rig(work, folder, rows, max_new_tokens):
  from spct_jax.models import hf, unrolled
  from spct_jax.sampling.engine import Engine

  stacked, params = hf.load(folder)
  model, params = unrolled.model(stacked), unrolled.consume(stacked.config, params)  # as a judge holds them
  engine = Engine(
      model=model, mesh=None, cache_rules=(), rows=rows, max_new_tokens=max_new_tokens, eos_ids=(), seed=0,
      stage='bench',
  )
  return engine, params


def _batch(work, tokens):
  import numpy as np
  from spct_jax.types import PromptBatch, Tasks

  Q = work.prompts * work.k
  prompt, sample = np.divmod(np.arange(Q, dtype=np.int32), work.k)
  full = lambda value, dtype: np.full(Q, value, dtype)
  prompts = PromptBatch(
      tokens=tokens, length=np.full(work.prompts, tokens.shape[1], np.int32), row_mask=np.ones(work.prompts, bool)
  )
  return prompts, Tasks(
      prompt=prompt, uid=np.stack([prompt, prompt], axis=1).astype(np.uint32), visit=full(0, np.int32), sample=sample,
      temperature=full(1, np.float32), top_p=full(work.top_p, np.float32), top_k=full(0, np.int32),
      min_p=full(0, np.float32), row_mask=full(True, bool),
  )


def _ours(work, folder, repeats, shape):
  import numpy as np
  from spct_jax.sampling import loop

  engine, params = _rig(work, folder, work.prompts * work.k, work.N)
  prompts, tasks = _batch(work, _prompts(work, shape['vocab']))
  compiled = _counted()
  result = _timed(lambda: engine.generate(params, prompts, tasks), repeats)
  result['compiled'] = len(compiled)
  _, given, state = engine._begin(params, prompts, tasks, None)
  program = loop.advance.lower(*given, state, np.int32(1)).compile()
  result['temp'], result['caches'] = program.memory_analysis().temp_size_in_bytes, _bytes((state.slots, state.ring))
  return {**result, 'logits': _next_logits(engine.model, params, prompts.tokens)}


def _bytes(tree):
  import jax

  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _each(work, folder, repeats, shape):
  return _twin(work, folder, repeats, shape, copied=False)


def _copied(work, folder, repeats, shape):
  return _twin(work, folder, repeats, shape, copied=True)


def _twin(work, folder, repeats, shape, copied):
  """The unshared sampler: rows side by side, each with a cache of its prompt and its answer."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from spct_jax.models import blockwise, hf, kv_cache, unrolled
  from spct_jax.sampling import decoding, keys

  stacked, params = hf.load(folder)
  model, (k, N, P) = unrolled.model(stacked), (work.k, work.N, work.P)
  R = work.prompts * k

  def prefill(weights, tokens):
    B = tokens.shape[0]
    positions = jnp.broadcast_to(jnp.arange(P), (B, P))

    def attend(ref, q, k, v, cache):
      return blockwise.causal(q, k, v, q.shape[-1] ** -0.5), kv_cache.write(cache, ref, k, v, 0)

    cache = kv_cache.init(model.config, B, P + N - 1)
    return model.run_layers(weights, model.embed(weights, tokens), positions, attend, cache)[1]

  def step(weights, settings, carry):
    t, token, cache, out, logps = carry
    place = P - 1 + t
    seen = jnp.arange(P + N - 1) <= place

    def attend(ref, q, k, v, cache):
      cache = kv_cache.write(cache, ref, k, v, place)
      keys_, values = kv_cache.read(cache, ref)
      q = q.reshape(R, keys_.shape[1], -1, q.shape[-1])
      scores = jnp.einsum('RMgd,RMSd->RMgS', q, keys_) * q.shape[-1] ** -0.5
      weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
      return jnp.einsum('RMgS,RMSd->RMgd', weights, values).reshape(R, 1, -1, q.shape[-1]), cache

    x = model.embed(weights, token[:, None])
    x, cache = model.run_layers(weights, x, jnp.full((R, 1), place), attend, cache)
    names, *settings = settings
    token, logp = decoding.sample(model.unembed(weights, x)[:, 0], keys.uniform(names, jnp.full(R, t)), *settings)
    return t + 1, token, cache, out.at[:, t].set(token), logps.at[:, t].set(logp)

  @jax.jit
  def generate(weights, tokens, settings):
    rows = jnp.repeat(tokens, k, axis=0)
    if copied:
      cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, k, axis=0), prefill(weights, tokens))
    else:
      cache = prefill(weights, rows)
    carry = jnp.int32(0), rows[:, -1], cache, jnp.zeros((R, N), jnp.int32), jnp.zeros((R, N))
    carry = jax.lax.while_loop(lambda carry: carry[0] < N, lambda carry: step(weights, settings, carry), carry)
    return carry[3:]

  prompts, tasks = _batch(work, _prompts(work, shape['vocab']))
  names = keys.task_keys(0, 'bench', tasks.uid, tasks.visit, tasks.sample)
  settings = (names, *map(jnp.asarray, (tasks.temperature, tasks.top_p, tasks.top_k, tasks.min_p)))
  weights = jax.jit(lambda params: unrolled.params(stacked.config, params))(params)
  compiled, tokens = _counted(), jnp.asarray(prompts.tokens)
  result = _timed(lambda: np.asarray(generate(weights, tokens, settings)[0]), repeats)
  result['compiled'] = len(compiled)
  caches = _bytes(jax.eval_shape(lambda: kv_cache.init(model.config, R, P + N - 1)))
  # The caches live and die in this program, so its own count holds them.
  temp = generate.lower(weights, tokens, settings).compile().memory_analysis().temp_size_in_bytes
  return {**result, 'temp': temp - caches, 'caches': caches,
          'logits': _next_logits(stacked, params, prompts.tokens)}


def _hf(work, folder, repeats):
  import torch
  import transformers

  torch.set_num_threads(1)
  transformers.utils.logging.set_verbosity_error()
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='sdpa')
  model.eval()
  model.generation_config.eos_token_id = None
  tokens = torch.tensor(_prompts(work, model.config.vocab_size), dtype=torch.long)
  settings = dict(
      attention_mask=torch.ones_like(tokens), do_sample=True, temperature=1.0, top_k=0, top_p=work.top_p,
      num_return_sequences=work.k, min_new_tokens=work.N, max_new_tokens=work.N, pad_token_id=0, use_cache=True,
  )
  with torch.inference_mode():
    short = {**settings, 'min_new_tokens': 2, 'max_new_tokens': 2, 'num_return_sequences': 1}
    result = _timed(lambda: model.generate(tokens, **settings), repeats, lambda: model.generate(tokens, **short))
    logits = model(tokens[:1], logits_to_keep=1).logits[0, -1, :4]
  return {**result, 'logits': logits.tolist()}


class _Ids:
  """A tokenizer whose texts are ids with blanks between them; 0 is padding, no prompt has it."""

  bos_id = eos_id = pad_id = staticmethod(lambda: 0)

  def encode(self, text):
    return [int(word) for word in text.split()]

  def decode(self, ids):
    return ' '.join(map(str, ids))


def _tunix(work, folder, repeats):
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx
  from tunix.generate import sampler as samplers
  from tunix.models.llama3 import model as models, params

  with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
    fields = json.load(file)
  config = models.ModelConfig(
      num_layers=fields['num_hidden_layers'], vocab_size=fields['vocab_size'], embed_dim=fields['hidden_size'],
      hidden_dim=fields['intermediate_size'], num_heads=fields['num_attention_heads'], head_dim=fields['head_dim'],
      num_kv_heads=fields['num_key_value_heads'], norm_eps=fields['rms_norm_eps'], weight_tying=True,
      rope_theta=fields['rope_theta'],
  )
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ('fsdp', 'tp'))
  with mesh:
    model = params.create_model_from_safe_tensors(folder, config, mesh, dtype=jnp.float32)
    cache = samplers.CacheConfig(work.P + work.N, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = samplers.Sampler(model, _Ids(), cache)
    tokens = _prompts(work, config.vocab_size)
    texts = [_Ids().decode(row) for row in np.repeat(tokens, work.k, axis=0)]
    compiled = _counted()
    run = lambda: sampler(
        texts, max_generation_steps=work.N, max_prompt_length=work.P, eos_tokens=[-1], temperature=1.0,
        top_p=work.top_p, seed=0,
    )
    result = _timed(run, repeats)
    if [len(row) for row in run().tokens] != [work.N] * len(texts):
      raise SystemExit(f'tunix did not give {work.N} tokens to every sample')
    causal = jnp.tril(jnp.ones((1, work.P, work.P), bool))
    ahead = nnx.jit(lambda model, tokens: model(tokens, jnp.arange(work.P)[None], None, causal)[0][0, -1, :4])
    logits = ahead(model, jnp.asarray(tokens[:1]))
  return {**result, 'compiled': len(compiled), 'logits': [float(x) for x in logits]}


def _share(work, folder, repeats, shape):
  """Outputs forced to lognormal(450, 0.45) in 200 to 1500 tokens; a model of one small layer runs them."""
  import numpy as np
  import jax
  from spct_jax.models.config import BlockConfig, ModelConfig
  from spct_jax.models.transformer import Transformer
  from spct_jax.sampling import loop
  from spct_jax.sampling.engine import Engine

  config = ModelConfig(
      vocab_size=64, width=8, heads=1, kv_heads=1, head_dim=8, ffn=8, period=(BlockConfig(),), num_periods=1
  )
  model = Transformer(config)
  prompts, tasks = _batch(work, _prompts(work, 64))
  Q = len(tasks.prompt)
  rows = min(256, Q // 8)
  engine = Engine(
      model=model, mesh=None, cache_rules=(), rows=rows, max_new_tokens=work.N, eos_ids=(), seed=0, stage='bench'
  )
  lengths = np.clip(np.random.default_rng(0).lognormal(np.log(450), 0.45, Q), 200, 1500)
  limits = np.maximum(lengths * work.N // 1500, 1).astype(np.int32)
  _, given, state = engine._begin(jax.jit(model.init)(jax.random.key(0)), prompts, tasks, limits)
  state, done = loop.advance(*given, state, np.int32(2**30))
  sizes = given[1]
  decoded, prefilled = int(state.clock) * rows, int(state.fills) * sizes.batch * work.P
  useful = int(np.asarray(state.length).sum())
  if int(done) != Q or useful != limits.sum():
    raise SystemExit(f'{int(done)} of {Q} samples ended with {useful} tokens in place of {limits.sum()}')
  return {'share': useful / (decoded + prefilled), 'decoded': useful / decoded, 'rows': rows, **sizes._asdict()}


def _programs(work, folder, repeats, shape):
  import numpy as np

  engine, params = _rig(work, folder, work.prompts * work.k, work.N)
  compiled, passes = _counted(), []
  for visit in range(2):
    for P in (32, 64, 128, 256):
      prompts, tasks = _batch(work, _prompts(dataclasses.replace(work, P=P), shape['vocab']))
      engine.generate(params, prompts, dataclasses.replace(tasks, visit=np.full(len(tasks.prompt), visit, np.int32)))
    passes.append(len(compiled))
  return {'first': passes[0], 'second': passes[1] - passes[0]}


if __name__ == '__main__':
  sys.exit(main())
