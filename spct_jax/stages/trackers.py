r"""What a judge writes, counted while it learns: patterns, principles, and how often it says the same.

A judge that is rewarded for its verdict may come to write one list of principles for everything, name a
principle twice, or fall back on a phrase that needs no reading. None of that shows in the reward. The
regexes of the config (`trackers`) say what to look for:

    patterns     name -> regex; the share of judgements whose text it matches is `pattern_<name>`
    principles   its one group is the list of principles: r'Criteria:(.*?)\nAnalysis:'
    separator    splits that list; what it matches, such as a weight, belongs to no principle

With K samples of one item, the principles read up to case, white space and order:

    Accuracy (60%), Tone (40%)         {accuracy, tone}     a set
    tone (50%), accuracy (50%)         {accuracy, tone}     the same set
    Accuracy (50%), accuracy (50%)     {accuracy}           another one; repeated
    I like it.                         not found

give principle_sets 2 of 4 samples, principles_found 3/4, principles_repeated 1/3.

An empty regex counts nothing and has no key. What cannot be said, as where nothing was drawn, is None.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from spct_jax import types
from spct_jax.stages import results


@dataclasses.dataclass(frozen=True)
class Trackers:
  """The compiled regexes; `samples` is how many of an item's samples are looked at for distinct sets."""

  patterns: tuple[tuple[str, re.Pattern], ...]
  principles: re.Pattern | None
  separator: re.Pattern | None
  samples: int


def compiled(fields: Any) -> Trackers:
  """The `trackers` section of a config.

  Raises:
    ValueError: a regex that does not compile, principles without exactly one group, a separator that has
      groups or would cut between any two letters, or a number of samples below 1.
  """
  patterns = tuple(
      (name, _regex(f'trackers.patterns.{name}', fields.patterns[name]))
      for name in sorted(fields.patterns)
      if fields.patterns[name]
  )
  if isinstance(fields.samples, bool) or not isinstance(fields.samples, int) or fields.samples < 1:
    raise ValueError(f'trackers.samples: got {fields.samples!r}; allowed: a whole number of at least 1')
  if not fields.principles:
    return Trackers(patterns, None, None, fields.samples)
  principles = _regex('trackers.principles', fields.principles)
  if principles.groups != 1:
    raise ValueError(
        f'trackers.principles: got {fields.principles!r} with {principles.groups} groups; allowed: exactly one, '
        'around the list of principles; write (?:...) for the others'
    )
  separator = _regex('trackers.separator', fields.separator)
  cut = separator.match('xx', 1)
  if separator.groups or (cut and not cut[0]):
    raise ValueError(
        f'trackers.separator: got {fields.separator!r}; allowed: a regex without groups that matches at least one '
        'character between two principles; write (?:...) for groups, and r"\\s*,\\s*" for commas'
    )
  return Trackers(patterns, principles, separator, fields.samples)


def _regex(name: str, text: Any) -> re.Pattern:
  try:
    return re.compile(text)
  except (re.error, TypeError) as error:
    raise ValueError(
        f'{name}: got {text!r}; allowed: a regular expression of Python; it says: {error}'
    ) from None


def principles_of(trackers: Trackers, text: str) -> list[str] | None:
  """The principles that a judgement names, in its order, case and white space folded; None if not found."""
  found = trackers.principles.search(text)
  if found is None or found[1] is None:
    return None
  folded = (' '.join(part.casefold().split()) for part in trackers.separator.split(found[1]))
  return [part for part in folded if part]


def measure(
    trackers: Trackers, grouped: Sequence[Sequence[types.Trajectory]]
) -> dict[str, float | int | None]:
  """What the samples of each item say; an item of whose samples none names principles has no number of sets.

  Returns `pattern_<name>` and principles_found as shares of all judgements, principles_repeated as the share
  of those with principles that name one twice, principle_sets as the mean over items, and principle_sets_of:
  among how many samples of an item.
  """
  texts = [trajectory.text for group in grouped for trajectory in group]
  out: dict[str, float | int | None] = {
      f'pattern_{name}': _mean(pattern.search(text) is not None for text in texts)
      for name, pattern in trackers.patterns
  }
  if trackers.principles is None:
    return out
  named = [[principles_of(trackers, trajectory.text) for trajectory in group] for group in grouped]
  found = [principles for group in named for principles in group if principles is not None]
  sets = [
      len({frozenset(principles) for principles in group[: trackers.samples] if principles is not None})
      for group in named
  ]
  return out | {
      'principles_found': len(found) / len(texts) if texts else None,
      'principles_repeated': _mean(len(set(p)) < len(p) for p in found),
      'principle_sets': _mean(number for number in sets if number),
      'principle_sets_of': max((min(trackers.samples, len(group)) for group in grouped if group), default=None),
  }


def _mean(values: Iterable[int]) -> float | None:
  values = list(values)
  return sum(values) / len(values) if values else None


def sentence(measured: dict[str, float | int | None]) -> str | None:
  """What `measure` found, for a person; None where it looked for nothing."""
  said = []
  if 'principles_found' in measured:
    said.append(f'principles in {results.percent(measured["principles_found"])} of the judgements')
    if measured['principle_sets'] is not None:
      said.append(f'one of them repeated in {results.percent(measured["principles_repeated"])} of these')
      said.append(
          f'{measured["principle_sets"]:.2f} distinct sets of principles per item among '
          f'{results.count(measured["principle_sets_of"], "sample")}'
      )
  said += [
      f'{name.removeprefix("pattern_")} in {results.percent(share)}'
      for name, share in measured.items()
      if name.startswith('pattern_')
  ]
  return ', '.join(said) or None
