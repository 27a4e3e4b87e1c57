"""Writes the golden fixtures of `test_golden`: what `transformers` computes of one tiny model of each family.

    python tests/models/make_golden.py [family ...]        all of them by default; needs torch and transformers

Each gets golden/FAMILY/{config.json, model.safetensors, expected.safetensors}; expected holds `tokens` [2, 14] and
their `lengths`, `logits` [2, 14, V] (real positions), the `score` of a sequence-classification head [1, D] and its
`rewards` [2], `prompts` [3, 11] and their `prompt_lengths`, and the `greedy` tokens [3, 64].
"""

import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers

from spct_jax.testing import families

GOLDEN = pathlib.Path(__file__).parent / 'golden'
# Small ones in which the family's own choices are seen: windows, pattern, caps, a scaling of rotary embeddings.
SEEDS = {
    'llama': 4, 'mistral': 2, 'qwen2': 6, 'qwen3': 5, 'gemma2': 9, 'gemma3_text': 6, 'mixtral': 0, 'qwen3_moe': 15,
    'deepseek_v2': 0,
}
LENGTHS, PROMPTS, NEW = np.array([14, 9], np.int32), np.array([3, 11, 7], np.int32), 64


def right_padded(rng, vocab, lengths):
  tokens = rng.integers(1, vocab, (len(lengths), max(lengths))).astype(np.int32)
  return np.where(np.arange(max(lengths))[None, :] < lengths[:, None], tokens, 0)


def build(family, seed, head_kind):
  auto = transformers.AutoModelForCausalLM if head_kind == 'lm' else transformers.AutoModelForSequenceClassification
  settings = transformers.AutoConfig.for_model(**families.config(family, seed, head_kind=head_kind))
  # Other implementations leave out the soft cap, or do not take sizes that are odd.
  model = auto.from_config(settings, attn_implementation='eager', experts_implementation='eager').eval()
  for name, parameter in model.named_parameters():
    parameter.copy_(torch.tensor(families.tensor(family, name, tuple(parameter.shape), seed)))
  return model


@torch.no_grad()
def write(family, seed):
  folder = GOLDEN / family
  model, scalar = build(family, seed, 'lm'), build(family, seed, 'scalar')
  rng, vocab = np.random.default_rng(seed), model.config.vocab_size
  tokens, prompts = right_padded(rng, vocab, LENGTHS), right_padded(rng, vocab, PROMPTS)
  long = lambda x: torch.tensor(x, dtype=torch.long)
  real = np.arange(tokens.shape[1])[None, :] < LENGTHS[:, None]
  logits = model(long(tokens), attention_mask=long(real)).logits.numpy() * real[:, :, None]
  rewards = scalar(long(tokens), attention_mask=long(real)).logits.numpy()[:, 0]
  greedy = [
      model.generate(
          long(prompts[b : b + 1, :length]), attention_mask=torch.ones((1, length), dtype=torch.long),
          max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0,
      )[0, length:].numpy()
      for b, length in enumerate(PROMPTS)
  ]
  with tempfile.TemporaryDirectory() as temporary:  # without its generation config
    model.save_pretrained(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ('config.json', 'model.safetensors'):
      (folder / file).write_bytes((pathlib.Path(temporary) / file).read_bytes())
  expected = {
      'tokens': tokens, 'lengths': LENGTHS, 'logits': logits, 'score': scalar.score.weight.numpy(), 'rewards': rewards,
      'prompts': prompts, 'prompt_lengths': PROMPTS, 'greedy': np.stack(greedy).astype(np.int32),
  }
  expected = {k: np.ascontiguousarray(v) for k, v in expected.items()}
  safetensors.numpy.save_file(expected, folder / 'expected.safetensors')
  print(family, {file.name: file.stat().st_size for file in sorted(folder.iterdir())})


if __name__ == '__main__':
  for name in sys.argv[1:] or SEEDS:
    write(name, SEEDS[name])
