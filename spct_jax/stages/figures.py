"""The figures of a report: accuracy against k, score histograms, training curves.

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

# Metrics that a reader looks for come first in their stage's block, housekeeping last, the rest as
# logged.
_FIRST = (
  'loss',
  'reward',
  'correct',
  'accuracy',
  'kl',
  'entropy',
  'parse_failure',
  'ties',
  'no_signal',
  'output_length',
)
_LAST = ('grad_norm', 'param_norm', 'learning_rate', 'count', 'skipped')


def accuracy_vs_k(
  path: str | os.PathLike[str],
  rows: Sequence[Mapping[str, Any]],
  *,
  baselines: Sequence[Mapping[str, Any]],
) -> bool:
  """Per benchmark a line of panels, one per kind of vote; one curve and 95 % band per stage.

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
  figure = _figure(width=1.6 + 4.2 * len(kinds), height=0.5 + 3.6 * len(benchmarks))
  panels = figure.subplots(len(benchmarks), len(kinds), sharey='row', squeeze=False)
  for benchmark, line in zip(benchmarks, panels):
    own = results.whole(rows, benchmark)
    chance = [
      entry['accuracy']
      for entry in baselines
      if (entry['benchmark'], entry['subset'], entry['name']) == (benchmark, 'all', 'random')
    ]
    for guided, axes in zip(kinds, line):
      _curves(axes, own, guided, stages)
      for share in chance:
        axes.axhline(
          100 * share, color='0.45', linewidth=1, dashes=(1, 2), label='random baseline', zorder=1
        )
      axes.set_title(f'{benchmark}: {_GUIDED[guided]}', loc='left', fontsize=10)
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


def _curves(
  axes: Any, rows: Sequence[Mapping[str, Any]], guided: Any, stages: Sequence[str]
) -> None:
  sampled = [row for row in rows if row['temperature'] > 0]
  several = len({(row['temperature'], row['n']) for row in sampled}) > 1
  curves: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
  for row in sampled:
    if row['guided'] == guided:
      curves.setdefault((row['stage'], row['temperature'], row['n']), []).append(row)
  settings = list(dict.fromkeys((temperature, n) for _, temperature, n in curves))
  for (stage, temperature, n), points in curves.items():
    points = sorted(points, key=lambda row: row['k'])
    label = stage + (f', T {temperature:g}, n {"mixed" if n is None else n}' if several else '')
    k = [row['k'] for row in points]
    axes.plot(
      k,
      [100 * row['accuracy'] for row in points],
      label=label,
      zorder=3,
      markersize=5,
      linestyle=_DASHES[settings.index((temperature, n)) % len(_DASHES)],
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
