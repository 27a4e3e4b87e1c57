r"""Where a judgement ends besides at an end-of-sequence token, as options of use.

    stop_strings      the text holds one of the strings; it is cut before the one that ends first, the longest if
                      several end there (as vLLM leaves them out; transformers keeps them)
    at_scores         the score line is complete; the text is cut behind its box. What the model would have said after
                      it could only have spoiled the scores (`text.score_line`)
    constrain_scores  the score line is drawn among what parses: exactly n integers in range, within the limit of
                      tokens, whatever the model does. It ends the text

Token ids and log-probabilities stay as they were sampled, so the last token may say more than the text does. Such
samples are not what the model would have written, so no stage trains on them: the stages that draw trajectories to
learn from (sample, grpo, meta_rm) have none of these options.

Scores of constrained lines follow the model's distribution among the tokens that are allowed at each step
(`sampling.decoding`): a model that never meant to give scores still gives some.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import functools
import re

import numpy as np

from spct_jax import types
from spct_jax.text import endings, score_line
from spct_jax.text.tokenizer import Tokenizer

_OPEN_THOUGHT = re.compile(r'<think(?:ing)?>\s*$', re.IGNORECASE | re.ASCII)
_TAIL = 16  # tokens that the opening tag at the end of a prompt and blanks behind it take at most


@dataclasses.dataclass(frozen=True)
class Endings:
  """The options; all of them off is a judgement that ends as the model ends it."""

  stop_strings: tuple[str, ...]
  at_scores: bool
  constrain_scores: bool

  def __post_init__(self):
    strings = self.stop_strings
    for option, value in (('stop_at_scores', self.at_scores), ('constrain_scores', self.constrain_scores)):
      if not isinstance(value, bool):
        raise ValueError(f'{option}: got {value!r}; allowed: True, False')
    if not isinstance(strings, tuple) or not all(isinstance(text, str) and text for text in strings):
      raise ValueError(f'stop_strings: got {strings!r}; allowed: a tuple of strings of at least one character')
    if strings and self.constrain_scores:
      raise ValueError(
          f'stop_strings: got {strings} with constrain_scores, whose text ends with the score line and not before; set '
          'one of the two'
      )


_LEAST = (1, 1, 10, False)
NONE = Endings(stop_strings=(), at_scores=False, constrain_scores=False)


def check(wanted: Endings, tokenizer: Tokenizer, max_new_tokens: int, responses: int = 1) -> None:
  """ValueError for what no tokens spell, and for a limit that the score line of so many responses does not fit into."""
  guides(wanted, tokenizer, [_LEAST], [_LEAST], 1)
  if wanted.constrain_scores:
    line = responses, *_LEAST[1:]
    table, starts = endings.constrained(tokenizer, (line,))
    need = int(table.need[starts[line]])
    if need > max_new_tokens:
      of = '' if responses == 1 else f' of {responses} responses'
      raise ValueError(
          f'constrain_scores: a score line{of} takes up to {need} tokens, the limit is {max_new_tokens}; raise '
          'max_new_tokens'
      )


def kind(prompt: types.Prompt, prompt_ids: tuple[int, ...], tokenizer: Tokenizer) -> endings.Kind:
  """What the score line of a prompt has to be: how many scores, from, to, and whether a thought is to be closed."""
  return len(prompt.order), prompt.low, prompt.high, in_thought(prompt_ids, tokenizer)


def in_thought(prompt_ids: tuple[int, ...], tokenizer: Tokenizer) -> bool:
  """Whether the prompt ends with an opening tag, as templates of some thinking models do."""
  return _OPEN_THOUGHT.search(tokenizer.decode(prompt_ids[-_TAIL:])) is not None


def guides(
    wanted: Endings, tokenizer: Tokenizer, all_kinds: Iterable[endings.Kind], kinds: Iterable[endings.Kind], Q: int
) -> tuple[types.Guide, ...]:
  """The engine's tables for tasks of these kinds, padded to Q tasks.

  The table is made for `all_kinds` of a run at once, so that its chunks share one program.
  """
  kinds = tuple(kinds)
  made = []
  if wanted.stop_strings:
    table, start = endings.stop_strings(tokenizer, wanted.stop_strings)
    made.append((table, [start] * len(kinds)))
  if wanted.constrain_scores:
    table, starts = endings.constrained(tokenizer, tuple(sorted(set(all_kinds))))
    made.append((table, [starts[kind] for kind in kinds]))
  elif wanted.at_scores:
    table, starts = endings.score_line_closes(tokenizer)
    made.append((table, [starts[kind[3]] for kind in kinds]))
  fill = lambda starts: np.array([*starts, *[starts[0]] * (Q - len(starts))], np.int32)
  return tuple(dataclasses.replace(table, start=fill(starts)) for table, starts in made)


def cut(text: str, wanted: Endings, kind: endings.Kind) -> str:
  """The text of a sample that a guide stopped: what its last token says beyond is left out."""
  if wanted == NONE:
    return text
  said, ends = text.encode('utf-8', 'replace'), []
  if wanted.stop_strings:
    end = _strings(wanted.stop_strings).end(0, said)
    if end is not None:
      found = [each.encode('utf-8', 'surrogatepass') for each in wanted.stop_strings]
      ends.append((end, end - max(len(each) for each in found if said[:end].endswith(each))))
  if wanted.constrain_scores or wanted.at_scores:
    reader = score_line.constrained(*kind[:3]) if wanted.constrain_scores else score_line.closes()
    end = reader.automaton.end(reader.start(kind[3]), said)
    ends += [] if end is None else [(end, end)]
  return said[: min(ends)[1]].decode('utf-8', 'replace') if ends else text


_strings = functools.lru_cache(maxsize=16)(endings.strings_automaton)
