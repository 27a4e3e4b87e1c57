"""Trains 'builtin:small', the byte-level BPE that the package carries (about 2,000 entries).

    python experiments/train_small_tokenizer.py [--folder=spct_jax/text/files/small] [--size=2048]

The texts are the package's own: its judge templates, its data files, and verdicts in the format
that a judge writes. Training is deterministic, so a second run writes the same files. Every digit
is an entry of its own, so that a score is read from one or two tokens in every context. Takes a few
seconds.
"""

import argparse
from collections.abc import Iterator
import json
import pathlib

import tokenizers

import spct_jax

PACKAGE = pathlib.Path(spct_jax.__file__).parent
PAD, BOS, EOS = '<|pad|>', '<|bos|>', '<|eos|>'
ROLES = ('<|user|>', '<|assistant|>', '<|system|>')
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content']"
    " + eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def strings(value: object) -> Iterator[str]:
  """Every text inside a JSON value."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict):
    for inner in value.values():
      yield from strings(inner)
  elif isinstance(value, list):
    for inner in value:
      yield from strings(inner)


def corpus() -> Iterator[str]:
  """The package's own texts; the interface of a judge several times, since every prompt repeats it."""
  for file in sorted(PACKAGE.glob('judges/templates/*/*.txt')):
    yield from [file.read_text(encoding='utf-8')] * 4
  for file in sorted(PACKAGE.glob('data/files/*.jsonl')):
    for line in file.read_text(encoding='utf-8').splitlines():
      yield from strings(json.loads(line))
  for first in range(1, 11):
    for second in range(1, 11):
      yield (
          'Specific Criteria: accuracy (weight 60%), clarity (weight 40%)\n'
          'Analysis: Response 1 answers the query and is correct. '
          'Response 2 is wrong, and it is less clear.\n'
          f'Scores: \\boxed{{{first}, {second}}}\n'
      )


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--folder', type=pathlib.Path, default=PACKAGE / 'text' / 'files' / 'small')
  parser.add_argument('--size', type=int, default=2048)
  args = parser.parse_args()
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
  ])
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=args.size,
      min_frequency=1,
      special_tokens=[PAD, BOS, EOS, *ROLES],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
  )
  tokenizer.train_from_iterator(corpus(), trainer)
  args.folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(args.folder / 'tokenizer.json'), pretty=False)
  config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'bos_token': BOS,
      'eos_token': EOS,
      'pad_token': PAD,
      'additional_special_tokens': list(ROLES),
      'clean_up_tokenization_spaces': False,
      'model_max_length': 1_000_000,
      'chat_template': CHAT_TEMPLATE,
  }
  text = json.dumps(config, indent=2) + '\n'
  (args.folder / 'tokenizer_config.json').write_text(text, encoding='utf-8')
  print(f'{tokenizer.get_vocab_size()} entries in {args.folder}')


if __name__ == '__main__':
  main()
