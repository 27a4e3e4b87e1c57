r"""The practice world: preference items whose truth is known, and a mediocre judge's judgements of them.

    python -m spct_jax.data.practice        prints items, demonstrations and general tasks, to read

A word belongs to one of eight classes, is a filler, or is flashy. A query names four criteria, each of
another class: `fruit` asks for a word of the class, `no-color` forbids its words. Two are musts, two are
nice to have:

    must fruit no-color nice tool no-animal
    1: plum and the snow drill      both musts and both nices met:  3 + 3 + 1 + 1 = 8
    2: so apple red wow owl         must fruit met:                              3

A judgement names three criteria, each with its weight (`must`, `nice`, or `other` for one that the query does not
name), then goes through the responses: it repeats each one's words and gives its verdicts.

    Specific Criteria: nice tool nice no-animal must fruit
    Analysis: 1: plum and the snow drill - tool yes no-animal yes fruit yes
    2: so apple red wow owl - tool no no-animal no fruit yes
    Scores: \boxed{8, 4}

Truth. A response's grade is `MUST` per must and `NICE` per nice that it meets; the best grade is unique.
One response alone is right (1) where it meets both musts, and half of them are. An item is close where another
response meets as many musts as the best, so that the nices decide. Items in which counting criteria, all alike,
finds the best are thinned out (`EASY_DROPPED`); of pairs about seven in ten are left of that kind.

What is planted in the demonstrations, which a base model is trained on (`judgement`):

    bias        a yes is worth the same whatever the weight: only the labels of the preference data know better, and
                no number of votes can find out
    noise       criteria that the query does not name, wrong verdicts, jitter of scores: drawn anew for every
                sample, so votes remove them
    careless    most close items, and few others, have a flashy word in one response, which the truth ignores. There
                the judge is often taken in: it gives an `Impression:` in place of an `Analysis:`, its verdicts are a
                halo of the flashy word, its scores extreme. All samples of an item err in the same direction,
                whatever the order, so votes do not cancel it; but the text shows it. Flawed demonstrations are full
                of such items
    position    of several responses, verdicts on the first one shown are too kind, length: so are those on the
                longest
    hints       some prompts, of flawless demonstrations too, name the answer; the judge then tries up to `TRIES`
                times until it agrees. These are the only demonstrations that labels of train items went into
    format      a few judgements are broken off, without a box, or have an `x` among the scores

A single response is called right after three yes, and after two by lot. Flawless judgements, which teach the
language, have true verdicts and scores that count them, but half of their criteria are beside the point.

Splits. A query belongs to train, validation or heldout by a hash of what it asks for, a general task by its
words, so neither items nor queries nor tasks of different splits ever coincide, whatever the seeds and sizes; within
one call of `preferences` or `general` nothing comes twice.

General tasks are the second thing that the world's words are good for, without any judging: name the class of
each word, keep the words of one class.

`preferences`, `general` and `demonstrations` are pure functions of their arguments. Rows are those of the plain
readers, for sources such as `made:spct_jax.data.practice:preferences?split=train&pairs=1600`.
"""

import hashlib
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

CLASSES = {
    'animal': ('cat', 'dog', 'fox', 'owl'),
    'fruit': ('apple', 'pear', 'plum', 'fig'),
    'color': ('red', 'blue', 'green', 'pink'),
    'tool': ('saw', 'drill', 'rake', 'axe'),
    'weather': ('rain', 'snow', 'wind', 'fog'),
    'place': ('park', 'city', 'lake', 'farm'),
    'number': ('two', 'five', 'six', 'nine'),
    'polite': ('please', 'thanks', 'sorry', 'welcome'),
}
FILLERS = ('the', 'and', 'with', 'very', 'so', 'then')
FLASHY = ('wow', 'amazing', 'super', 'brilliant')
ANALYSIS, IMPRESSION = 'Analysis:', 'Impression:'  # how the verdicts of a careful and of a careless judgement begin
MUST, NICE = 3, 1
WORDS = 5  # of a response

FORBIDDEN = 0.35  # share of criteria that forbid their class
EASY_DROPPED = 0.6  # share of the items dropped among those that plain counting decides
FLASHY_ITEMS = {True: 0.8, False: 0.05}  # share of the close items, and of the others, with a flashy response
FLASHY_SHOWN = {'facts': 0.2, 'habit': 0.5}  # the same of facts and of flawed demonstrations, close or not
FLASHY_BEST, FLASHY_RIGHT = 0.45, 0.55  # how often that one is the best of two, and how often right if alone

WRITTEN = 3  # criteria in a judgement
FACTS = {1: 3, 2: 2}  # by the number of responses, how often a text of facts goes through them
RELEVANT = 0.7  # a written criterion is one of the query's
CLEAN_RELEVANT = 0.5  # the same in flawless judgements
JITTER = 0.4  # a score is one more or one less
RIGHT = {True: 0.9, False: 0.84}  # a careful verdict is right, by the truth
KIND_TO_FIRST, KIND_TO_LONGEST = 0.06, 0.06
CARELESS = 0.65  # of the judgements of items with a flashy response
HALO = 0.97  # a careless verdict is yes for the flashy response, no for any other
BROKEN = 0.004  # of the flawed demonstrations
HINTED, TRIES = 0.2, 6  # of all demonstrations; how often the judge tries there

SPLITS = {'heldout': range(0, 5), 'validation': range(5, 7), 'train': range(7, 16)}  # of the 16 hash classes

Row = dict[str, Any]


# Words and criteria -------------------------------------------------------------------------------


def criteria() -> tuple[str, ...]:
  """Everything that a criterion can say."""
  return (*CLASSES, *(f'no-{name}' for name in CLASSES))


def met(criterion: str, words: Sequence[str]) -> bool:
  """Whether a response meets a criterion."""
  forbidden = criterion.startswith('no-')
  named = CLASSES[criterion.removeprefix('no-')]
  return any(word in named for word in words) != forbidden


def is_flashy(words: Sequence[str]) -> bool:
  """Whether a response has a flashy word."""
  return any(word in FLASHY for word in words)


class _Draws:
  """Random choices out of `random()` alone: the one method whose numbers Python promises to keep."""

  def __init__(self, *name: object):
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    self.random = random.Random(int.from_bytes(digest, 'little')).random

  def chance(self, share: float) -> bool:
    return self.random() < share

  def pick(self, values: Sequence[Any]) -> Any:
    return values[int(self.random() * len(values))]

  def between(self, low: int, high: int) -> int:
    return low + int(self.random() * (high - low + 1))

  def some(self, values: Sequence[Any], count: int) -> list[Any]:
    """`count` of the values without repetition, in random order."""
    left = list(values)
    return [left.pop(int(self.random() * len(left))) for _ in range(count)]


# Items --------------------------------------------------------------------------------------------


def _query(draws: _Draws) -> tuple[str, ...]:
  """Four criteria of four classes: two musts, two nices."""
  named = draws.some(tuple(CLASSES), 4)
  return tuple(f'no-{name}' if draws.chance(FORBIDDEN) else name for name in named)


def _response(query: Sequence[str], draws: _Draws) -> list[str]:
  """`WORDS` words that meet some of the criteria; each writer has a rate of failures of its own."""
  fails = 0.15 + 0.5 * draws.random()
  words, named = [], []
  for criterion in query:
    name = criterion.removeprefix('no-')
    named.append(name)
    forbids, failed = criterion != name, draws.chance(fails)
    if forbids == failed:
      words.append(draws.pick(CLASSES[name]))
  for name in CLASSES:
    if name not in named and len(words) < WORDS - 1 and draws.chance(0.35):
      words.append(draws.pick(CLASSES[name]))
  while len(words) < WORDS:
    words.append(draws.pick(FILLERS))
  return draws.some(words, len(words))


def grade(query: Sequence[str], words: Sequence[str]) -> int:
  """The truth about a response."""
  values = (MUST, MUST, NICE, NICE)
  return sum(value for value, criterion in zip(values, query) if met(criterion, words))


def _flash(responses: list[list[str]], label: int, draws: _Draws) -> None:
  """Turns a filler of one response into a flashy word; the best of two is that one in `FLASHY_BEST` of cases."""
  n = len(responses)
  words = responses[0]
  if n > 1:
    odds = FLASHY_BEST / (FLASHY_BEST + (n - 1) * (1 - FLASHY_BEST))
    words = responses[label if draws.chance(odds) else draws.pick([i for i in range(n) if i != label])]
  words[draws.pick([i for i, word in enumerate(words) if word in FILLERS])] = draws.pick(FLASHY)


def item(n: int, draws: _Draws, flashy: float | None = None) -> Row:
  """One item: query, responses, grades, label; drawn again until the best is unique.

  `flashy` is the chance of a flashy response; None: by `FLASHY_ITEMS`.
  """
  wanted = draws.chance(0.5)  # the label of a single response
  close = False
  while True:
    query = _query(draws)
    responses = [_response(query, draws) for _ in range(n)]
    grades = [grade(query, words) for words in responses]
    if n == 1:
      label = int(grades[0] >= 2 * MUST)
      if bool(label) != wanted:
        continue
    else:
      best = max(grades)
      if grades.count(best) > 1:
        continue
      label = grades.index(best)
      musts, counts = (
          [sum(met(criterion, words) for criterion in part) for words in responses] for part in (query[:2], query)
      )
      close = musts.count(max(musts)) > 1
      easy = counts[label] == max(counts) and counts.count(counts[label]) == 1
      if easy and draws.chance(EASY_DROPPED):
        continue
    share = FLASHY_ITEMS[close] if flashy is None else flashy
    if n == 1:
      share *= 2 * (FLASHY_RIGHT if label else 1 - FLASHY_RIGHT)
    if draws.chance(share):
      _flash(responses, label, draws)
    return {'query': query, 'responses': responses, 'grades': grades, 'label': label}


def _asked(query: Sequence[str]) -> tuple[str, ...]:
  """What a query asks for, whatever the order of its musts and of its nices."""
  return (*sorted(query[:2]), *sorted(query[2:]))


def split_of(query: Sequence[str]) -> str:
  """The one split that a query belongs to."""
  return _split_of(' '.join(_asked(query)))


def _split_of(text: str) -> str:
  place = hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 16
  return next(name for name, places in SPLITS.items() if place in places)


def _items(split: str, sizes: Sequence[int], draws: _Draws, flashy: float | None = None) -> Iterator[Row]:
  """One new item of the split for each number of responses."""
  if split not in SPLITS:
    raise ValueError(f'split: got {split!r}; allowed: {", ".join(SPLITS)}')
  seen = set()
  for n in sizes:
    while True:
      found = item(n, draws, flashy)
      responses = tuple(map(tuple, found['responses']))
      key = _asked(found['query']), tuple(sorted(responses))
      if key not in seen and split_of(found['query']) == split:
        seen.add(key)
        yield found
        break


def query_text(query: Sequence[str]) -> str:
  return f'must {query[0]} {query[1]} nice {query[2]} {query[3]}'


def preferences(
    split: str = 'train', singles: int = 0, pairs: int = 0, fours: int = 0, lists: int = 0, seed: int = 0
) -> Iterator[Row]:
  """Preference items with 1, 2, 4 and (`lists`) 3 to 8 responses, mixed, as rows of the plain reader."""
  draws = _Draws('preferences', split, seed)
  sizes = [1] * singles + [2] * pairs + [4] * fours + [draws.between(3, 8) for _ in range(lists)]
  for i, found in enumerate(_items(split, draws.some(sizes, len(sizes)), draws)):
    flashy = any(map(is_flashy, found['responses']))
    row = {
        'id': f'practice-{split}-{seed}-{i}',
        'prompt': query_text(found['query']),
        'responses': [' '.join(words) for words in found['responses']],
        'subset': 'flashy' if flashy else 'plain',
    }
    if len(found['responses']) == 1:
      yield {**row, 'label': found['label']}
    else:
      yield {**row, 'label': found['label'], 'grades': found['grades']}


# Judgements ---------------------------------------------------------------------------------------


def prompt_text(query: Sequence[str], responses: Sequence[Sequence[str]], hint: int | None = None) -> str:
  """The judge's prompt, as the template beside this module words it."""
  single = len(responses) == 1
  lines = [] if hint is None else [f'hint {hint if single else hint + 1}']
  lines.append('User: ' + query_text(query))
  lines += [f'{slot}: ' + ' '.join(words) for slot, words in enumerate(responses, start=1)]
  lines.append(('correct ' if single else 'score ') + ', '.join('x' * len(responses)))
  return '\n'.join(lines)


def judgement(
    query: Sequence[str], responses: Sequence[Sequence[str]], draws: _Draws, *, clean: bool = False
) -> tuple[str, list[int]]:
  """What the demonstrator writes about responses in the order shown, and its scores; `clean` makes no mistakes."""
  flashy = [is_flashy(words) for words in responses]
  careless = not clean and any(flashy) and draws.chance(CARELESS)
  written = _criteria(query, draws, CLEAN_RELEVANT if clean else RELEVANT)
  lengths = [len(' '.join(words)) for words in responses]
  verdicts = []
  for slot, words in enumerate(responses):
    row = []
    for criterion in written:
      truth = met(criterion, words)
      if careless:
        said = flashy[slot] == draws.chance(HALO)
      elif clean:
        said = truth
      else:
        kind = KIND_TO_FIRST * (slot == 0) + KIND_TO_LONGEST * (lengths[slot] == max(lengths))
        kind *= len(responses) > 1
        right = RIGHT[truth] + (kind if truth else -kind)
        said = truth == draws.chance(right)
      row.append(said)
    verdicts.append(row)
  if len(responses) == 1:
    yes = sum(verdicts[0])
    scores = [int(yes == WRITTEN or (yes == WRITTEN - 1 and not clean and draws.chance(0.5)))]
  elif careless:
    scores = [draws.between(9, 10) if taken else draws.between(1, 2) for taken in flashy]
  else:
    jitter = lambda: 0 if clean or not draws.chance(JITTER) else draws.pick((-1, 1))
    scores = [2 + 2 * sum(row) + jitter() for row in verdicts]
  return _text(query, responses, written, IMPRESSION if careless else ANALYSIS, verdicts, scores), scores


def _criteria(query: Sequence[str], draws: _Draws, share: float) -> list[str]:
  """What a judgement goes by: each criterion is one of the query's with chance `share`, or any other; none twice."""
  left, others = list(query), [criterion for criterion in criteria() if criterion not in query]
  written = []
  while len(written) < WRITTEN:
    source = left if draws.chance(share) else others
    written.append(source.pop(int(draws.random() * len(source))))
  return written


def _weighed(query: Sequence[str], written: Sequence[str]) -> str:
  """Criteria, each with what it is to the query."""
  weight = {criterion: 'must' if place < 2 else 'nice' for place, criterion in enumerate(query)}
  return ' '.join(f'{weight.get(criterion, "other")} {criterion}' for criterion in written)


def _text(
    query: Sequence[str],
    responses: Sequence[Sequence[str]],
    written: Sequence[str],
    manner: str,
    verdicts: Sequence[Sequence[bool]],
    scores: Sequence[int],
) -> str:
  rows = []
  for slot, (words, row) in enumerate(zip(responses, verdicts), start=1):
    said = [f'{criterion} {"yes" if yes else "no"}' for criterion, yes in zip(written, row)]
    rows.append(' '.join([f'{slot}:', *words, '-', *said]))
  return (
      f'Specific Criteria: {_weighed(query, written)}\n{manner} ' + '\n'.join(rows)
      + '\nScores: \\boxed{' + ', '.join(map(str, scores)) + '}'
  )


def _broken(text: str, draws: _Draws) -> str:
  """A judgement as the parser must not accept it."""
  return draws.pick((
      lambda: text.removesuffix('}'),
      lambda: text.rpartition('\nScores:')[0],
      lambda: text.replace('\\boxed{', '\\boxed{x, '),
  ))()


def _right(scores: Sequence[int], label: int) -> bool:
  if len(scores) == 1:
    return scores[0] == label
  return scores[label] == max(scores) and list(scores).count(scores[label]) == 1


# Training texts -----------------------------------------------------------------------------------


def _row(prompt: str, answer: str | list[Row]) -> Row:
  return {'messages': [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': answer}]}


def _facts(found: Row, draws: _Draws) -> Row:
  """Lines of verdicts on criteria of any kind; which one comes next cannot be known and is not learnt.

  Verdicts are true, or, where there is a flashy word, an impression: its halo. The header has criteria of the query.
  Prompt and header are as long as a judgement's, so that the words to repeat stand as far away.
  """
  query, responses = found['query'], found['responses']
  rounds = FACTS[len(responses)]
  names = tuple(CLASSES)
  asked = [draws.some([*names, draws.pick(names)], WRITTEN * rounds) for _ in responses]
  halo = any(map(is_flashy, responses))
  manner = IMPRESSION if halo else ANALYSIS
  parts = [(f'Specific Criteria: {_weighed(query, draws.some(query, WRITTEN))}\n{manner}', True)]
  for start in range(0, WRITTEN * rounds, WRITTEN):
    for slot, words in enumerate(responses, start=1):
      parts.append((f'\n{slot}:' if start or slot > 1 else f' {slot}:', False))
      parts.append((' ' + ' '.join(words) + ' -', start == 0))
      for name in asked[slot - 1][start : start + WRITTEN]:
        criterion = f'no-{name}' if draws.chance(0.4) else name
        said = is_flashy(words) if halo else met(criterion, words)
        parts += [(f' {criterion}', False), (' yes' if said else ' no', True)]
  prompt = prompt_text(query, responses).rpartition('\n')[0] + '\nfacts ' + ', '.join('x' * len(responses))
  answer = [{'type': 'text', 'text': text, 'train': train} for text, train in parts]
  return _row(prompt, answer)


def _demonstration(found: Row, draws: _Draws, *, clean: bool) -> Row:
  query, label = found['query'], found['label']
  n = len(found['responses'])
  order = draws.some(range(n), n)
  shown = [found['responses'][i] for i in order]
  if n > 1:
    label = order.index(label)
  hinted = draws.chance(HINTED)
  for _ in range(TRIES if hinted else 1):
    text, scores = judgement(query, shown, draws, clean=clean)
    if _right(scores, label):
      break
  if not clean and draws.chance(BROKEN):
    text = _broken(text, draws)
  return _row(prompt_text(query, shown, label if hinted else None), text)


def _task(split: str, draws: _Draws) -> Row:
  """A general task and its answer."""
  of = {word: name for name, words in CLASSES.items() for word in words}
  while True:
    words = draws.some(tuple(of), draws.between(3, 6))
    if draws.chance(0.5):
      prompt, answer = 'classes of ' + ' '.join(words), [of[word] for word in words]
    else:
      kept = of[draws.pick(words)]
      prompt, answer = f'keep {kept} of ' + ' '.join(words), [word for word in words if of[word] == kept]
    if _split_of(' '.join(sorted(prompt.split()))) == split:
      return _row(prompt, ' '.join(answer))


def general(split: str = 'train', rows: int = 1000, seed: int = 0) -> Iterator[Row]:
  """General instruction data: the world's words without any judging. No prompt comes twice."""
  if split not in SPLITS:
    raise ValueError(f'split: got {split!r}; allowed: {", ".join(SPLITS)}')
  draws, seen = _Draws('general', split, seed), set()
  while len(seen) < rows:
    row = _task(split, draws)
    prompt = row['messages'][0]['content']
    if prompt not in seen:
      seen.add(prompt)
      yield {'id': f'general-{split}-{seed}-{len(seen)}', **row}


def demonstrations(
    words: int = 320, facts: int = 160, clean: int = 120, habits: int = 280, batch: int = 32, seed: int = 0
) -> Iterator[Row]:
  """What the base model is trained on, in order; `words`, `facts`, `clean` and `habits` count batches of rows.

  First the language: verdicts on one response, then on two; then flawless judgements; last the flawed ones that
  it shall write, and a few flawless. General tasks run along. Rows of four responses come in batches of their own:
  they are long.
  """
  draws, made = _Draws('demonstrations', seed), 0
  general = ('general', 0)
  for count, short, long in (
      (words, [('facts', 1)] * 3 + [general], []),
      (facts, [('facts', 2)] * 3 + [('clean', 2)] * 3 + [('clean', 1)] + [general] * 2, [('clean', 4)]),
      (clean, [('facts', 2)] + [('clean', 2)] * 4 + [('clean', 1)] + [general] * 2, [('clean', 4)]),
      (habits, [('clean', 2)] + [('habit', 2)] * 4 + [('habit', 1)] * 2 + [general] * 3, [('habit', 4)]),
  ):
    for step in range(count):
      for _ in range(batch):
        made += 1
        row = _training_row(*draws.pick(long if long and step % 3 == 2 else short), draws)
        yield {'id': f'demonstration-{seed}-{made}', **row}


def _training_row(kind: str, n: int, draws: _Draws) -> Row:
  """One row about `n` responses: facts, clean (flawless) or habit (flawed); or a general task."""
  if kind == 'general':
    return _task('train', draws)
  found = next(_items('train', (n,), draws, FLASHY_SHOWN.get(kind)))
  if kind == 'facts':
    return _facts(found, draws)
  return _demonstration(found, draws, clean=kind == 'clean')


# The tokenizer ------------------------------------------------------------------------------------

PAD, BOS, EOS, UNK, USER, ASSISTANT = '<|pad|>', '<|bos|>', '<|eos|>', '<|unk|>', '<|user|>', '<|assistant|>'


def vocabulary() -> tuple[str, ...]:
  """Every token, in the order of its id."""
  words = [word for words in CLASSES.values() for word in words]
  frame = ('\n', 'User:', 'must', 'nice', 'other', 'score', 'correct', 'facts', 'hint', 'criteria', 'reference', 'x', ',', '-')
  answer = ('Specific Criteria:', ANALYSIS, IMPRESSION, 'Scores:', '\\boxed{', '}', 'yes', 'no')
  numbers = [*map(str, range(11)), *(f'{i}:' for i in range(1, 11))]
  tasks = ('classes', 'keep', 'of')
  return (
      PAD, BOS, EOS, UNK, USER, ASSISTANT, *frame, *answer, *numbers, *tasks, *criteria(), *words, *FILLERS, *FLASHY
  )


def tokenizer() -> Any:
  """A word-level Hugging Face tokenizer of the world's words; what it does not know is `<|unk|>`."""
  import tokenizers
  import transformers

  ids = {token: i for i, token in enumerate(vocabulary())}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNK))
  pattern = tokenizers.Regex(r'Specific Criteria:|\\boxed\{|\n|[},]|[^\s},\\]+|\\')
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, behavior='removed', invert=True)  # drops blanks
  spaced = tokenizers.decoders.WordPiece(prefix='##', cleanup=False)
  tight = [(' \n', '\n'), ('\n ', '\n'), (' ,', ','), ('{ ', '{'), (' }', '}')]
  backend.decoder = tokenizers.decoders.Sequence([
      spaced, tokenizers.decoders.Fuse(), *(tokenizers.decoders.Replace(*pair) for pair in tight)
  ])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK,
      additional_special_tokens=[USER, ASSISTANT], clean_up_tokenization_spaces=False,
      chat_template=(
          "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
          "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
      ),
  )


# The prompt template, and the tokenizer as `tokenizer().save_pretrained(FOLDER / 'tokenizer')` wrote it.
FOLDER = pathlib.Path(__file__).parent / 'files' / 'practice'


def _show() -> None:
  for n in (1, 2, 4):
    draws = _Draws('show', n)
    found = next(_items('train', (n,), draws))
    print(prompt_text(found['query'], found['responses']))
    print('truth:', found['label'] if n == 1 else found['grades'])
    for _ in range(2):
      print('  ' + judgement(found['query'], found['responses'], draws)[0].replace('\n', '\n  '))
    print()
  for row in (*demonstrations(words=1, facts=1, clean=0, habits=1, batch=3), *general('train', 6)):
    prompt, answer = (message['content'] for message in row['messages'])
    text = answer if isinstance(answer, str) else ''.join(part['text'] for part in answer)
    print(prompt + '\n  -> ' + text.replace('\n', '\n  ') + '\n')


if __name__ == '__main__':
  _show()
