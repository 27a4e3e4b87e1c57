"""The figures of a report: accuracy against k, score histograms, training curves; and sweeps over runs.

Colours are Okabe and Ito's, told apart under every common colour blindness; stages differ in marker
as well, so that a print in grey can be read.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from spct_jax.stages import results

_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
_DASHES = ('-', '--', '-.', ':')
_GUIDED = {
  False: 'plain votes',
  'hard': 'votes guided by the meta-RM',
  'soft': 'votes guided softly',
}
_COLUMNS = 3
_MOST_LINES = 4  # lines of panels per benchmark, so that the picture stays one page

# Metrics that a reader looks for come first in their stage's block, housekeeping last, the rest as
# logged.
_FIRST = (
  'loss',
  'reward',
  'correct',
  'accuracy',
  'validation/accuracy',
  'kl',
  'entropy',
  'parse_failure',
  'ties',
  'no_signal',
  'output_length',
)
_LAST = (
  'principle_sets_of',
  'validation/principle_sets_of',
  'grad_norm',
  'param_norm',
  'learning_rate',
  'count',
  'skipped',
)


def accuracy_vs_k(
  path: str | os.PathLike[str],
  rows: Sequence[Mapping[str, Any]],
  *,
  baselines: Sequence[Mapping[str, Any]],
) -> bool:
  """Per benchmark and number of responses a line of panels, one per kind of vote; one curve and 95 %
  band per stage.

  Where items of different n are mixed, each n has its own line, since chance and difficulty differ;
  beyond `_MOST_LINES` of them, those with the most items do, below a line for all items together.
  Greedy accuracies are marks left of k = 1, and the random baseline is a dotted line. Returns
  False, and draws nothing, if no row was sampled.
  """
  rows = [row for row in results.validated(rows) if row['accuracy'] is not None]
  benchmarks = list(dict.fromkeys(row['benchmark'] for row in rows if row['temperature'] > 0))
  if not benchmarks:
    return False
  stages = list(dict.fromkeys(row['stage'] for row in rows))
  kinds = [
    guided
    for guided in _GUIDED
    if any(row['guided'] == guided and row['temperature'] > 0 for row in rows)
  ]
  lines = [(benchmark, n) for benchmark in benchmarks for n in _sizes(rows, benchmark)]
  figure = _figure(width=1.6 + 4.2 * len(kinds), height=0.5 + 3.6 * len(lines))
  panels = figure.subplots(len(lines), len(kinds), sharey='row', squeeze=False)
  several = {benchmark: len(_sizes(rows, benchmark)) > 1 for benchmark in benchmarks}
  for (benchmark, n), line in zip(lines, panels):
    own = [
      row
      for row in rows
      if (row['benchmark'], row['subset'], row['n']) == (benchmark, 'all', n)
    ]
    chance = [
      entry['accuracy']
      for entry in baselines
      if (entry['benchmark'], entry['subset'], entry['n'], entry['name'])
      == (benchmark, 'all', n, 'random')
    ]
    title = f'{benchmark}, {_responses(n)}' if several[benchmark] else benchmark
    for guided, axes in zip(kinds, line):
      _curves(axes, own, guided, stages)
      for share in chance:
        axes.axhline(
          100 * share, color='0.45', linewidth=1, dashes=(1, 2), label='random baseline', zorder=1
        )
      axes.set_title(f'{title}: {_GUIDED[guided]}', loc='left', fontsize=10)
    line[0].set_ylabel('accuracy, % (band: 95 % interval)')
    low, high = line[0].get_ylim()
    line[0].set_ylim(max(low, -2), min(high, 102))
    named = {
      label: handle for axes in line for handle, label in zip(*axes.get_legend_handles_labels())
    }
    line[-1].legend(
      named.values(),
      named.keys(),
      fontsize=8,
      frameon=False,
      loc='upper left',
      bbox_to_anchor=(1.0, 1.0),
    )
  figure.savefig(path, dpi=130, bbox_inches='tight')
  return True


def _sizes(rows: Sequence[Mapping[str, Any]], benchmark: str) -> list[int | None]:
  """The numbers of responses that have a line of panels of their own; None stands for all items."""
  items = {
    row['n']: row['items']
    for row in rows
    if row['benchmark'] == benchmark and row['subset'] == 'all' and row['temperature'] > 0
  }
  sizes = sorted((n for n in items if n is not None), key=lambda n: (-items[n], n))
  if not sizes:
    return [None]
  if len(sizes) <= _MOST_LINES:
    return sorted(sizes)
  return [*([None] if None in items else []), *sorted(sizes[: _MOST_LINES - 1])]


def _responses(n: int | None) -> str:
  return 'all items' if n is None else results.count(n, 'response')


def _curves(
  axes: Any, rows: Sequence[Mapping[str, Any]], guided: Any, stages: Sequence[str]
) -> None:
  sampled = [row for row in rows if row['temperature'] > 0]
  several = len({row['temperature'] for row in sampled}) > 1
  curves: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
  for row in sampled:
    if row['guided'] == guided:
      curves.setdefault((row['stage'], row['temperature']), []).append(row)
  temperatures = list(dict.fromkeys(temperature for _, temperature in curves))
  for (stage, temperature), points in curves.items():
    points = sorted(points, key=lambda row: row['k'])
    label = stage + (f', T {temperature:g}' if several else '')
    k = [row['k'] for row in points]
    axes.plot(
      k,
      [100 * row['accuracy'] for row in points],
      label=label,
      zorder=3,
      markersize=5,
      linestyle=_DASHES[temperatures.index(temperature) % len(_DASHES)],
      **_look(stage, stages),
    )
    bounds = [results.interval(row) or (math.nan, math.nan) for row in points]
    axes.fill_between(
      k,
      [100 * low for low, _ in bounds],
      [100 * high for _, high in bounds],
      color=_look(stage, stages)['color'],
      alpha=0.15,
      linewidth=0,
      zorder=2,
    )
  if guided is False:
    for row in rows:
      if row['temperature'] == 0 and row['k'] == 1 and row['guided'] is False:
        axes.plot(
          [0.84],
          [100 * row['accuracy']],
          linestyle='none',
          markersize=6,
          markerfacecolor='white',
          label=f'{row["stage"]}, greedy',
          zorder=3,
          **_look(row['stage'], stages),
        )
  ks = sorted({row['k'] for row in sampled})
  axes.set_xscale('log', base=2)
  axes.set_xticks(ks, [str(k) for k in ks])
  axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  axes.set_xlim(0.75, max(ks) * 1.2)
  axes.set_xlabel('samples per vote, k (log scale)')
  _grid(axes)


def _look(stage: str, stages: Sequence[str]) -> dict[str, str]:
  i = stages.index(stage)
  return {'color': _COLOURS[i % len(_COLOURS)], 'marker': _MARKERS[i % len(_MARKERS)]}


def score_histogram(path: str | os.PathLike[str], counts: Mapping[str, Mapping[int, int]]) -> bool:
  """One panel per stage: how often each score was given. False, and no file, if there is none."""
  drawn = {
    stage: {int(score): int(number) for score, number in own.items()}
    for stage, own in counts.items()
  }
  if not drawn:
    return False
  scores = sorted({score for own in drawn.values() for score, number in own.items() if number})
  ticks = list(range(min([*scores, 1]), max([*scores, 10]) + 1))
  columns = min(_COLUMNS, len(drawn))
  lines = math.ceil(len(drawn) / columns)
  figure = _figure(width=4.0 * columns, height=2.9 * lines)
  for i, (stage, own) in enumerate(drawn.items()):
    axes = figure.add_subplot(lines, columns, i + 1)
    total = sum(own.values())
    shares = [100 * own.get(tick, 0) / total if total else 0.0 for tick in ticks]
    axes.bar(ticks, shares, color=_COLOURS[i % len(_COLOURS)], width=0.8, zorder=2)
    axes.set_title(f'{stage}: {results.count(total, "score")}', loc='left', fontsize=10)
    axes.set_xticks(ticks)
    axes.set_xlabel('score')
    axes.set_ylabel('share of scores, %')
    if total:
      axes.set_ylim(0, 1.08 * max(shares))
    else:
      axes.set_ylim(0, 1)
      axes.text(
        0.5, 0.5, 'no judgement parsed', transform=axes.transAxes, ha='center', color='0.35'
      )
    _grid(axes)
    axes.grid(False, axis='x')
  figure.savefig(path, dpi=150)
  return True


def training_curves(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> bool:
  """Rows of metrics.jsonl: one block per stage, one panel per metric. False if there are none.

  Values that are None leave a gap, and values that are lists are not drawn.
  """
  stages = list(dict.fromkeys(row['stage'] for row in rows))
  metrics = {
    stage: _scalar_names([row for row in rows if row['stage'] == stage]) for stage in stages
  }
  stages = [stage for stage in stages if metrics[stage]]
  if not stages:
    return False
  heights = [math.ceil(len(metrics[stage]) / _COLUMNS) for stage in stages]
  figure = _figure(width=4.2 * _COLUMNS, height=2.3 * sum(heights) + 0.4 * len(stages))
  blocks = figure.subfigures(
    len(stages), 1, height_ratios=[height + 0.18 for height in heights], squeeze=False
  )
  for i, (stage, height) in enumerate(zip(stages, heights)):
    block = blocks[i, 0]
    block.suptitle(stage, x=0.01, ha='left', fontweight='bold')
    own = [row for row in rows if row['stage'] == stage]
    for j, name in enumerate(metrics[stage]):
      axes = block.add_subplot(height, _COLUMNS, j + 1)
      points = [(row['step'], row[name]) for row in own if name in row]
      steps = [step for step, _ in points]
      values = [math.nan if value is None else value for _, value in points]
      axes.plot(
        steps,
        values,
        color=_COLOURS[i % len(_COLOURS)],
        linewidth=1.2,
        marker='o' if len(points) <= 30 else None,
        markersize=3,
      )
      axes.set_title(name.replace('_', ' '), loc='left', fontsize=10)
      axes.set_xlabel('step', fontsize=8)
      axes.tick_params(labelsize=8)
      axes.yaxis.set_major_formatter(lambda value, _: f'{value:.6g}')
      axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=6, integer=True))
      finite = [value for value in values if math.isfinite(value)]
      if finite and max(finite) - min(finite) <= 1e-9 * max(1.0, abs(max(finite))):
        _constant(axes, finite[0])
      _grid(axes)
  figure.savefig(path, dpi=120)
  return True


def sweep(
  path: str | os.PathLike[str],
  runs: Mapping[str, Sequence[Mapping[str, Any]]],
  *,
  stage: str,
  names: Sequence[str],
  window: int,
) -> bool:
  """One stage of several runs in one picture: a panel per metric, a curve per run, against the step.

  `runs`: label -> rows of that run's metrics.jsonl. `names`: the metrics, in the order of the panels; one that
  no run logged has no panel. `window`: a point averages what was logged in so many steps up to its
  own, so that what is logged seldom stays as it is; 1 = as logged. None breaks a curve. False, and no
  file, if there is nothing to draw.
  """
  if window < 1:
    raise ValueError(f'window: got {window}; allowed: 1 (as logged) or more steps to average over')
  own = {label: [row for row in rows if row['stage'] == stage] for label, rows in runs.items()}
  found = [
    name
    for name in names
    if any(row.get(name) is not None for rows in own.values() for row in rows)
  ]
  if not found:
    return False
  columns = 2 if len(found) == 4 else min(_COLUMNS, len(found))
  lines = math.ceil(len(found) / columns)
  figure = _figure(width=1.6 + 4.2 * columns, height=0.4 + 3.1 * lines)
  panels = figure.subplots(lines, columns, squeeze=False).flatten()
  labels = list(runs)
  for name, axes in zip(found, panels):
    for label, rows in own.items():
      points = [(row['step'], row[name]) for row in rows if name in row]
      if not points:
        continue
      few = len(points) <= 30
      look = _look(label, labels)
      axes.plot(
        [step for step, _ in points],
        _running_mean(points, window),
        label=label,
        linewidth=1.4,
        color=look['color'],
        linestyle=_DASHES[labels.index(label) % len(_DASHES)],
        marker=look['marker'] if few else None,
        markersize=4,
      )
    axes.set_title(name.replace('_', ' '), loc='left', fontsize=10)
    axes.set_xlabel('step', fontsize=9)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:.6g}')
    _grid(axes)
  for axes in panels[len(found) :]:
    axes.set_visible(False)
  named = {
    label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())
  }
  figure.legend(
    named.values(), named.keys(), title=stage, fontsize=9, frameon=False, loc='outside right upper'
  )
  figure.savefig(path, dpi=130)
  return True


def _running_mean(points: Sequence[tuple[int, float | None]], window: int) -> list[float]:
  """Of each (step, value) the mean over the last `window` steps; a None is NaN and is not averaged in."""
  out = []
  for i, (step, value) in enumerate(points):
    near = [x for at, x in points[: i + 1] if step - window < at and x is not None]
    out.append(math.nan if value is None else sum(near) / len(near))
  return out


def _scalar_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  names: dict[str, None] = {}
  for row in rows:
    for name, value in row.items():
      if name not in ('stage', 'step') and isinstance(value, (int, float)):
        names[name] = None
  rank = {name: i - len(_FIRST) for i, name in enumerate(_FIRST)} | {
    name: 1 + i for i, name in enumerate(_LAST)
  }
  return sorted(names, key=lambda name: rank[name] if name in rank else 0)


def _constant(axes: Any, value: float) -> None:
  """A flat line in a window of its own size: autoscaling would draw rounding noise."""
  margin = 0.5 * abs(value) or 0.5
  axes.set_ylim(value - margin, value + margin)


def _figure(*, width: float, height: float) -> matplotlib.figure.Figure:
  """A figure that no window system and no global state knows of; savefig draws it with Agg."""
  return matplotlib.figure.Figure(figsize=(width, height), layout='constrained')


def _grid(axes: Any) -> None:
  axes.grid(True, color='0.9', linewidth=0.8)
  axes.set_axisbelow(True)
  for side in ('top', 'right'):
    axes.spines[side].set_visible(False)
