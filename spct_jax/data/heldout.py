"""A held-out part that stays what it is, and the check that training data does not contain it.

An item belongs to the held-out part if the hash of (seed, uid) falls below `fraction`: adding,
removing or reordering other items never moves it. The part has about that share of the items, not
exactly. Hashing the prompt instead of the uid (`by='prompt'`) keeps all items with one prompt on
one side. `take` holds out a number of items instead of a share.

Contamination is a prompt on both sides: the same conversation, up to case and white space.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

from spct_jax.types import Example


@dataclasses.dataclass(frozen=True)
class Shared:
  """A prompt that stands on both sides: its beginning, and the uids of the items that have it."""

  prompt: str
  train: tuple[str, ...]
  held_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Split:
  """The two parts, each in the order given, and what they share."""

  train: tuple[Example, ...]
  held_out: tuple[Example, ...]
  contamination: tuple[Shared, ...]

  def describe(self) -> str:
    """A few lines for the log."""
    head = f'{len(self.train)} items to train on, {len(self.held_out)} held out'
    if not self.contamination:
      return f'{head}, no prompt in both'
    lines = [f'{head}; {len(self.contamination)} prompts stand in both:']
    lines += [
      f'  {shared.prompt!r}: {", ".join(shared.train)} | {", ".join(shared.held_out)}'
      for shared in self.contamination[:5]
    ]
    if len(self.contamination) > 5:
      lines.append(f'  and {len(self.contamination) - 5} more')
    return '\n'.join(lines)


def prompt_key(example: Example) -> str:
  """The hash of the conversation before the responses, up to case and white space."""
  turns = '\n'.join(f'{m.role}: {" ".join(m.content.casefold().split())}' for m in example.messages)
  return hashlib.blake2b(turns.encode('utf-8'), digest_size=16).hexdigest()


def split(
  examples: Sequence[Example],
  fraction: float,
  seed: int,
  by: str = 'uid',
  may_be_empty: bool = False,
) -> Split:
  """Holds out about the share `fraction` of the examples, by their 'uid' or 'prompt'.

  0 < fraction < 1. An empty part is an error, unless `may_be_empty`: then few items may leave none
  held out, never none to train on.
  """
  keys = {'uid': lambda example: example.uid, 'prompt': prompt_key}
  if by not in keys:
    raise ValueError(f'cannot split by {by!r}: allowed are {", ".join(keys)}')
  if not 0 < fraction < 1:
    raise ValueError(f'fraction is the share to hold out, between 0 and 1, got {fraction}')
  train, held_out = [], []
  for example in examples:
    (held_out if _unit(keys[by](example), seed) < fraction else train).append(example)
  if may_be_empty and not train:
    train, held_out = held_out, []
  if not may_be_empty and not (train and held_out):
    raise ValueError(
      f'holding out {fraction} of {len(examples)} items leaves {len(train)} to train on and'
      f' {len(held_out)} held out: use another fraction, another seed, or more items'
    )
  return Split(tuple(train), tuple(held_out), contamination(train, held_out))


def take(examples: Sequence[Example], limit: int, seed: int) -> Split:
  """Holds out at most `limit` examples: whole prompts, those of the lowest hash first.

  With a `split` by 'prompt' of the same seed before it, this is the next slice of the same order. An
  empty part is an error.
  """
  by_prompt: dict[str, list[int]] = {}
  for i, example in enumerate(examples):
    by_prompt.setdefault(prompt_key(example), []).append(i)
  chosen: set[int] = set()
  for key in sorted(by_prompt, key=lambda key: (_unit(key, seed), key)):
    if len(chosen) + len(by_prompt[key]) <= limit:
      chosen.update(by_prompt[key])
  train = tuple(example for i, example in enumerate(examples) if i not in chosen)
  held_out = tuple(example for i, example in enumerate(examples) if i in chosen)
  if not (train and held_out):
    raise ValueError(
      f'taking {limit} of {len(examples)} items ({len(by_prompt)} prompts, which stay whole) leaves'
      f' {len(train)} to train on and {len(held_out)} held out: take another number, or give more items'
    )
  return Split(train, held_out, ())


def _unit(key: str, seed: int) -> float:
  """A number in [0, 1) that depends on the key and the seed only."""
  text = f'{seed}:{key}'.encode()
  digest = hashlib.blake2b(text, digest_size=8, person=b'heldout').digest()
  return int.from_bytes(digest, 'little') / 2**64


def contamination(train: Iterable[Example], held_out: Iterable[Example]) -> tuple[Shared, ...]:
  """The prompts of `held_out` that `train` has too, in the order of `held_out`."""
  seen: dict[str, list[str]] = {}
  for example in train:
    seen.setdefault(prompt_key(example), []).append(example.uid)
  both: dict[str, list[Example]] = {}
  for example in held_out:
    key = prompt_key(example)
    if key in seen:
      both.setdefault(key, []).append(example)
  return tuple(
    Shared(
      found[0].messages[-1].content[:60], tuple(seen[key]), tuple(example.uid for example in found)
    )
    for key, found in both.items()
  )
