r"""The strict parser: the twelve hazards of the field, the released models' real drifts, and any string at all."""

import random
import time

import pytest

from spct_jax.judges import parse

OK = [
    ('Specific Criteria: a\nAnalysis: b\nScores: \\boxed{8, 6}', (8, 6)),
    ('Scores: \\boxed{8,6}', (8, 6)),
    ('Scores: \\boxed{ 8 ,\t6 }', (8, 6)),
    ('**Scores: \\boxed{8, 8}**', (8, 8)),
    ('**Scores:** \\boxed{8, 8}', (8, 8)),
    ('### Output: \\boxed{10, 7}', (10, 7)),
    ('### Output\n\n\\boxed{10, 7}', (10, 7)),
    ('### Scores:\n$\\boxed{10, 7}$\n', (10, 7)),
    ('> - Final Scores: \\boxed{10, 7}', (10, 7)),
    ('score: \\boxed{10, 7}<|im_end|>', (10, 7)),
    ('3. **Scores:** \\boxed{1, 10}', (1, 10)),
    ('Scores: Response 1 gets 8, Response 2 gets 6, that is \\boxed{8, 6}.', (8, 6)),
    ('Clarity: \\boxed{3, 4}\nScores: \\boxed{8, 6}', (8, 6)),  # per criterion, then final
    ('Response 1 wrote \\boxed{42}.\nScores: \\boxed{8, 6}', (8, 6)),
    ('Scores: \\boxed{8, 6}\nTo repeat, \\boxed{8,6}', (8, 6)),  # said twice, the same
    ('no label, \\boxed{2, 3} and then \\boxed{8, 6}', (8, 6)),
    ('<think>\\boxed{1, 1}\nScores: \\boxed{2, 2}</think>Scores: \\boxed{8, 6}', (8, 6)),
    ('a prompt opened the thought: \\boxed{1, 1}</think>\nScores: \\boxed{8, 6}', (8, 6)),
    ('set {a, {b}} and \\{ brace\nScores: \\boxed{8, 6}', (8, 6)),
    ('\\boxed{8 left open\nScores: \\boxed{8, 6}', (8, 6)),
    ('Scores: \\boxed{8, 6}\r\n', (8, 6)),
    ('ſcores: \\boxed{1, 1}\nScores: \\boxed{8, 6}', (8, 6)),  # no ASCII letters, no label
    ('Score: \\boxed{8}\ngood\nScore: \\boxed{6}\n\nScores: \\boxed{8, 6}', (8, 6)),  # one by one, then together
    ('Output:\n\\boxed{42}\nis what it says.\nScores: \\boxed{8, 6}', (8, 6)),  # a quoted answer
    ('### Output: \\boxed{5, 5}\n**Overall Scores**: \\boxed{8, 6}', (8, 6)),
    ('Overall Score: \\boxed{8, 6}', (8, 6)),
    ('Final Output: \\boxed{8, 6}', (8, 6)),
    ('Score:\nScores: 8, 6\nFinal Score: \\boxed{8, 6}', (8, 6)),
    ('The response has <think> inside it.\nScores: \\boxed{8, 6}', (8, 6)),
    ('Scores: \\boxed{8, 6}\nI see `</think>` in it.', (8, 6)),
    ('Scores: \\boxed{8, 6}\nI see `<think>` and `</think>` in it, </think> twice.', (8, 6)),
    ('draft\nScores: \\boxed{1, 1}</think>\nIt has </think>.\nScores: \\boxed{8, 6}\nIt has </think>.', (8, 6)),
    ('  <thinking>\nScores: \\boxed{1, 1}</thinking>It has <think>.\nScores: \\boxed{8, 6}', (8, 6)),
    ('a\n\t<think>\nScores: \\boxed{1, 1}\n</think>Scores: \\boxed{8, 6}\nIt has </think>.', (8, 6)),
    ('<think>a</think>Scores: \\boxed{8, 6}<think>', (8, 6)),  # in mid-line: a mention
]
FAILED = [
    ('', 'empty'),
    (' \n\t', 'empty'),
    ('<think>x</think> ', 'empty'),
    ('Scores: 8, 6', 'no_box'),
    ('Scores: [[8, 6]]', 'no_box'),
    ('The first is better.', 'no_box'),
    ('Scores: \\boxed {8, 6}', 'no_box'),
    ('Scores: boxed{8, 6}', 'no_box'),
    ('Scores: \\Boxed{8, 6}', 'no_box'),
    ('Accuracy: \\boxed{5, 5}\nScores: 8, 6', 'no_box'),  # an earlier box is not the verdict
    ('Scores: \\boxed{8}', 'wrong_count'),
    ('Scores: \\boxed{8, 6, 7}', 'wrong_count'),
    ('Scores: \\boxed{8, 6,}', 'not_integer'),
    ('Scores: \\boxed{}', 'not_integer'),
    ('Scores: \\boxed{x, x}', 'not_integer'),
    ('Scores: \\boxed{7.5, 6}', 'not_integer'),
    ('Scores: \\boxed{8.0, 6}', 'not_integer'),
    ('Scores: \\boxed{8/10, 6/10}', 'not_integer'),
    ('Scores: \\boxed{8 out of 10, 6}', 'not_integer'),
    ('Scores: \\boxed{eight, six}', 'not_integer'),
    ('Scores: \\boxed{８, ６}', 'not_integer'),
    ('Scores: \\boxed{8，6}', 'not_integer'),
    ('Scores: \\boxed{٨, ٦}', 'not_integer'),
    ('Scores: \\boxed{8; 6}', 'not_integer'),
    ('Scores: \\boxed{8 6}', 'not_integer'),
    ('Scores: \\boxed{08, 6}', 'not_integer'),
    ('Scores: \\boxed{+8, 6}', 'not_integer'),
    ('Scores: \\boxed{1e1, 6}', 'not_integer'),
    ('Scores: \\boxed{\\text{8}, 6}', 'not_integer'),
    ('Scores: \\boxed{8, 6\n}', 'not_integer'),
    ('Scores: \\boxed{8,\u00a06}', 'not_integer'),
    ('Scores: \\boxed{0, 6}', 'out_of_range'),
    ('Scores: \\boxed{11, 6}', 'out_of_range'),
    ('Scores: \\boxed{-1, 6}', 'out_of_range'),
    ('Scores: \\boxed{8, ' + '9' * 5000 + '}', 'out_of_range'),
    ('Scores: \\boxed{8, 6}\nScores: \\boxed{6, 8}', 'disagree'),
    ('Scores: \\boxed{8, 6}\n\nUser: another\n### Output: \\boxed{3, 4}', 'disagree'),  # runs on into a second example
    ('### Output: \\boxed{8, 6}\n\nUser: another\n### Output: \\boxed{3, 4}', 'disagree'),
    ('Scores: \\boxed{8, 6}\nScore: \\boxed{8}', 'disagree'),
    ('Output: \\boxed{4, 2}\nScores: 8, 6', 'no_box'),  # the verdict is the one that cannot be read
    ('Scores: \\boxed{8, 6} or rather \\boxed{x, x}', 'disagree'),
    ('Scores: \\boxed{8, 6} or rather \\boxed{8, 7}', 'disagree'),
    ('<think>Scores: \\boxed{8, 6}', 'unclosed_think'),
    ('<think>a</think>Scores: \\boxed{8, 6}\n <think>', 'unclosed_think'),
    ('so\n<think>I see `<think>` there.\nScores: \\boxed{8, 6}', 'unclosed_think'),
    ('draft\nScores: \\boxed{8, 6}</think>Scores: 8, 6', 'no_box'),
    ('draft\nScores: \\boxed{8, 6}</think>Scores: \\boxed{8,', 'unclosed_box'),
    ('Scores: \\boxed{8, 6', 'unclosed_box'),
    ('Scores: \\boxed{8, 6}\nScores: \\boxed{8,', 'unclosed_box'),
    ('Accuracy: \\boxed{5, 5}\nScores: \\boxed{8,', 'unclosed_box'),
    ('\\boxed{5, 5} finally \\boxed{8,', 'unclosed_box'),
]


@pytest.mark.parametrize('text, expected', OK)
def test_reads(text, expected):
  assert parse.read(text, 2) == parse.Parsed(expected, 'ok')
  assert parse.scores(text, 2) == expected


# Seen to fail: \d for ASCII digits; leading zeros; the last box taken where boxes disagree; a box before a bare
# `Scores:` taken; int() without the look at the length (raises); thoughts read; an open box overlooked, with a
# score line and without; boxes before the score line made to agree, too; `Score` and `Output` ranked with `Scores`;
# think tags counted anywhere; a stray closing tag ignored, or cutting off a verdict before it.
@pytest.mark.parametrize('text, kind', FAILED)
def test_fails_with_a_reason(text, kind):
  assert parse.read(text, 2) == parse.Parsed(None, kind)
  assert parse.scores(text, 2) is None


def test_a_truncated_sample_fails_whatever_it_holds():
  assert parse.read('Scores: \\boxed{8, 6}', 2, truncated=True) == parse.Parsed(None, 'truncated')
  assert parse.read('', 2, truncated=True) == parse.Parsed(None, 'truncated')


def test_one_response_and_its_scale():
  assert parse.scores('Scores: \\boxed{1}', 1, 0, 1) == (1,)
  assert parse.scores('Scores: \\boxed{0}', 1, 0, 1) == (0,)
  assert parse.read('Scores: \\boxed{2}', 1, 0, 1).kind == 'out_of_range'
  assert parse.read('Scores: \\boxed{1, 0}', 1, 0, 1).kind == 'wrong_count'
  assert parse.scores('Scores: \\boxed{0}', 1) is None


@pytest.mark.parametrize('n', range(1, 11))
def test_as_many_scores_as_responses(n):
  values = tuple(range(1, n + 1))
  text = f'Scores: \\boxed{{{", ".join(map(str, values))}}}'
  assert parse.scores(text, n) == values
  assert parse.scores(text, n + 1) is None


def test_the_paper_s_outputs():
  assert [parse.scores(f'Scores: \\boxed{{{inner}}}', 2) for inner in ('8,8', '9,5', '10,7')] == [(8, 8), (9, 5), (10, 7)]


def test_never_raises_and_never_invents():
  rng = random.Random(0)
  atoms = ['Scores', 'Score:', 'Scores: ', '### Output', '\\boxed{', '\\boxed {', '}', '{', '\\{', '\n', '8', '10', ', ', ',', '-1', '0', ' ', '**', '<think>',
           '</think>', '\x00', '\ud800', '７', '\u2028', '8, 6', '\\boxed{8, 6}', '\\boxed{0, 6}', 'ſcores:', '>', '9' * 5000, '٣', '$', ':']
  kinds = set()
  for _ in range(20000):
    text = ''.join(rng.choice(atoms) for _ in range(rng.randrange(12)))
    parsed = parse.read(text, 2)
    kinds.add(parsed.kind)
    assert parsed.kind in parse.KINDS and (parsed.scores is None) == (parsed.kind != 'ok')
    if parsed.scores:
      assert len(parsed.scores) == 2 and all(type(score) is int and 1 <= score <= 10 for score in parsed.scores)
  assert kinds == set(parse.KINDS) - {'truncated'}


@pytest.mark.parametrize(
    'piece',
    ['\\boxed{', '\\boxed{}', '\\boxed{1}', 'Scores:\n', 'Scores: \\boxed{1, 2}\n', 'Scores:' + ' ' * 50 + '\n', '<think>', '</think>', '}', '{', '\n', '#',
     'Output\n', ' ', '<think>\n', '</think>\nScores:\n', 'Output: \\boxed{1, 2}\n', '</think> ', '\\boxed{1,', 'Scores **', 'Score', '1, '],
)
def test_a_megabyte_takes_linear_time(piece):
  for text in (piece * (1_000_000 // len(piece)), piece * (1_000_000 // len(piece)) + 'Scores: \\boxed{8, 6}',
               'Scores: \\boxed{' + piece * (1_000_000 // len(piece)), '\\boxed{8, 6}' + piece * (1_000_000 // len(piece))):
    start = time.process_time()
    parse.read(text, 2)
    assert time.process_time() - start < 1
