"""How long a Hugging Face folder takes to become parameters, beside `transformers` on the same cores.

    python experiments/bench_load.py --json load.json                # a 1.5B-shaped bfloat16 folder, 3.1 GB in --folder
    python experiments/bench_load.py --size 0.1b --rounds 5

The folder (the shape of Qwen2.5-1.5B, random weights) is made on the fly and read once, so that it lies in the page
cache. Then, alternating, fresh processes load it: ours with `spct_jax.models.hf.load(folder, dtype='bfloat16')`, theirs
with `AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)`. The clock runs from the call, imports done,
until every byte of every parameter has been read by the same numpy reduction. `transformers` maps the file and copies
nothing, so its figure stands twice: with its mapped parameters read so (in a warm page cache that is little more than
a walk over memory), and with parameters of its own, cloned and read, which is what ours are and what training,
another layout or an evicted page cache needs. Before it, each process touches and frees as much memory as the model
has: a virtual machine gets pages that it never used from its host, a hundred times slower, and that is no loader's
time. Both see the same cores and decide themselves how many threads they take. A value is the median over the rounds
of our seconds over theirs; goal and floor 1. Needs torch.
"""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHAPES = {  # width, layers, heads, key/value heads, feed-forward, vocabulary
    '1.5b': (1536, 28, 12, 2, 8960, 151936),
    '0.5b': (896, 24, 14, 2, 4864, 151936),
    '0.1b': (768, 12, 12, 2, 2048, 32000),
    'tiny': (64, 2, 4, 2, 128, 512),
}
WAYS = ('ours', 'own', 'mapped')  # how the parameters are held: our load, theirs cloned, theirs as it is


def main() -> int:
  args = _flags()
  if args.child:
    return _child(args.child, args.folder)
  command = shlex.join(['python', *sys.argv])
  cores = sorted(os.sched_getaffinity(0))
  print(f'command: {command}   (cores {cores})')
  own = tempfile.mkdtemp(prefix='bench_load_', dir=args.folder)
  try:
    folder = pathlib.Path(own) / 'model'
    size = _make(folder, args.size)
    print(f'{args.size}: {size / 1e9:.2f} GB of bfloat16')
    for file in folder.iterdir():
      _read_through(file)
    seconds = {who: [] for who in WAYS}
    for round_ in range(args.rounds):
      for who in WAYS if round_ % 2 == 0 else reversed(WAYS):
        seconds[who].append(_measure(who, folder))
      times = ', '.join(f'{who} {found[-1]:.2f} s' for who, found in seconds.items())
      print(f'round {round_ + 1}: {times}', flush=True)
  finally:
    shutil.rmtree(own)
  rows = []
  for who in WAYS[1:]:
    ratio = statistics.median(a / b for a, b in zip(seconds['ours'], seconds[who]))
    ours, theirs = (statistics.median(seconds[way]) for way in ('ours', who))
    print(f'ours {ours:.2f} s, transformers {who} {theirs:.2f} s: ratio {ratio:.3f} (at most 1.0)')
    rows.append({
        'name': f'load_{args.size}_over_transformers_{who}', 'value': ratio, 'unit': 'ratio', 'higher_is_better': False,
        'goal': 1.0, 'floor': 1.0,
    })  # fmt: skip
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + '\n')
  return 0


def _make(folder: pathlib.Path, size: str) -> int:
  """Writes the folder and returns the bytes of its tensors; values are one random block, repeated."""
  sys.path.insert(0, str(ROOT))
  import jax.numpy as jnp
  import numpy as np
  from spct_jax import sharding
  from spct_jax.models import hf_config, hf_folder, hf_names
  from spct_jax.models.transformer import Transformer

  width, layers, heads, kv_heads, ffn, vocab = SHAPES[size]
  fields = {
      'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'vocab_size': vocab, 'hidden_size': width,
      'num_hidden_layers': layers, 'num_attention_heads': heads, 'num_key_value_heads': kv_heads,
      'intermediate_size': ffn, 'hidden_act': 'silu', 'tie_word_embeddings': True, 'rms_norm_eps': 1e-6,
      'rope_theta': 1e6, 'max_position_embeddings': 32768, 'torch_dtype': 'bfloat16',
  }  # fmt: skip
  config = hf_config.read('config.json', fields)
  entries = []
  for path, leaf in sharding.leaf_paths(Transformer(config).abstract_params()):
    names, _ = hf_names.tensors_of(config, path)
    names, shape = ([names], leaf.shape) if isinstance(names, str) else (names, leaf.shape[1:])
    entries += [(name, 'bfloat16', hf_names.file_shape(config, path, shape)) for name in names]
  block = (np.random.default_rng(0).standard_normal(2**20, np.float32) * 0.02).astype(jnp.bfloat16)
  folder.mkdir()
  values = (np.resize(block, shape) for _, _, shape in entries)
  total = hf_folder.write_tensors(folder / 'model.safetensors', entries, values)
  hf_folder.write_json(folder / 'config.json', fields)
  return total


def _read_through(path: pathlib.Path) -> None:
  with open(path, 'rb') as file:
    while file.read(2**24):
      pass


def _measure(who: str, folder: pathlib.Path) -> float:
  """Seconds that a fresh process takes."""
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, __file__, '--child', who, '--folder', str(folder)]
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f'{who}: {done.stderr[-2000:]}')
  return float(done.stdout.split()[-1])


def _child(who: str, folder: str) -> int:
  import numpy as np

  size = sum(file.stat().st_size for file in pathlib.Path(folder).iterdir())
  np.empty(size + size // 8, np.uint8).fill(1)
  touch = lambda values: int(np.bitwise_xor.reduce(values.reshape(-1).view(np.uint8).view(np.uint64)))
  if who == 'ours':
    import jax
    from spct_jax.models import hf

    jax.devices()
    start = time.perf_counter()
    _, params = hf.load(folder, dtype='bfloat16')
    seen = [touch(np.asarray(leaf)) for leaf in jax.tree.leaves(params)]
  else:
    import torch
    import transformers

    transformers.AutoModelForCausalLM, transformers.models.qwen2.modeling_qwen2  # imports are lazy there
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    values = [p.detach() for p in model.parameters()]
    values = [value.clone() for value in values] if who == 'own' else values
    seen = [touch(value.view(torch.int16).numpy()) for value in values]
  seconds = time.perf_counter() - start
  assert seen
  print(seconds)
  return 0


def _flags() -> argparse.Namespace:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--size', default='1.5b', choices=SHAPES, help='shape of the folder')
  flags.add_argument('--rounds', type=int, default=5, help='pairs of fresh processes')
  flags.add_argument('--folder', default=tempfile.gettempdir(), help='where the folder is made')
  flags.add_argument('--json', help='file to write the results to')
  flags.add_argument('--child', choices=WAYS, help=argparse.SUPPRESS)
  return flags.parse_args()


if __name__ == '__main__':
  sys.exit(main())
