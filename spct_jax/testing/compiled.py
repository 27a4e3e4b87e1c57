"""The engine's program compiled from shapes alone, also for devices that are not there, and what stands in its loops."""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
import numpy as np

from spct_jax import sharding
from spct_jax.sampling import loop
from spct_jax.sampling.engine import Engine


def advance(
    engine: Engine, params: Any, sizes: loop.Sizes, *, prompts: int, prompt_length: int, tasks: int
) -> jax.stages.Compiled:
  """`loop.advance` for `prompts` and `tasks` of each group; `params` are side by side, abstract, with their shardings."""
  settings = engine._settings
  G, mesh = settings.groups, settings.mesh
  # Rows of the groups lie over the data axes, caches by the rules, scalars everywhere.
  rows = lambda leaf: _placed(leaf, sharding.batch_rows(mesh) if leaf.ndim else sharding.replicated(mesh))
  of = lambda shape, dtype=np.int32: jax.ShapeDtypeStruct((G, *shape), dtype)
  U, Q = prompts, tasks
  dealt = loop.Prompts(count=of(()), tokens=of((U, prompt_length)), length=of((U,)), first=of((U,)), number=of((U,)))
  queue = loop.Queue(
      count=of(()), uid=of((Q, 2), np.uint32), visit=of((Q,)), sample=of((Q,)), limit=of((Q,)),
      temperature=of((Q,), np.float32), top_p=of((Q,), np.float32), top_k=of((Q,)), min_p=of((Q,), np.float32),
  )
  _, state = jax.eval_shape(lambda *args: loop.start(settings, sizes, {}, *args), dealt, queue)
  caches = {
      'slots': loop.cache_shardings(settings, 'prompt', G * sizes.slots, prompt_length),
      'ring': loop.cache_shardings(settings, 'rows', G * sizes.rows, engine.max_new_tokens),
  }
  state = type(state)(**{
      name: jax.tree.map(_placed, leaf, caches[name]) if name in caches else jax.tree.map(rows, leaf)
      for name, leaf in state._asdict().items()
  })
  dealt, queue = jax.tree.map(rows, (dealt, queue))
  root = _placed(jax.ShapeDtypeStruct((2,), np.uint32), sharding.replicated(mesh))
  steps = _placed(jax.ShapeDtypeStruct((), np.int32), sharding.replicated(mesh))
  return loop.advance.lower(settings, sizes, params, root, dealt, queue, state, steps).compile()


def placed(shapes: Any, where: Any) -> Any:
  """Shapes with their shardings."""
  return jax.tree.map(_placed, shapes, where)


def _placed(leaf, where: NamedSharding):
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


class Instruction(NamedTuple):
  """One line of a compiled program: what it does, and its results' (dtype, shape), of one device."""

  operation: str
  results: tuple[tuple[str, tuple[int, ...]], ...]
  line: str

  @property
  def elements(self) -> int:
    return max((math.prod(shape) for _, shape in self.results), default=0)


COLLECTIVES = ('all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter', 'all-reduce')
_LINE = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(')
_CALLED = re.compile(r'(?:body|condition|to_apply|calls|called_computations|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)')


def instructions(text: str, *, loops: bool) -> list[Instruction]:
  """Those of the program; with `loops` those that the bodies of `while` run, directly or through what they call."""
  computations, name = {}, None
  for line in text.splitlines():
    start = re.match(r'^(?:ENTRY )?%?([\w.\-]+)\s*\(.*\{\s*$', line)
    if start:
      name = start[1]
      computations[name] = []
    elif name is not None and _LINE.match(line):
      computations[name].append(line)
  if loops:
    computations = {name: computations[name] for name in sorted(_looped(computations))}
  return [_instruction(line) for lines in computations.values() for line in lines]


def _looped(computations: dict[str, list[str]]) -> set[str]:
  waiting = [
      body for lines in computations.values() for line in lines for body in re.findall(r'\bbody=%?([\w.\-]+)', line)
  ]
  seen = set()
  while waiting:
    name = waiting.pop()
    if name in computations and name not in seen:
      seen.add(name)
      called = [found for line in computations[name] for found in _CALLED.findall(line)]
      waiting += [one for found in called for one in re.findall(r'[\w.\-]+', found)]
  return seen


def _instruction(line: str) -> Instruction:
  results, operation = _LINE.match(line).groups()
  shapes = re.findall(r'\b([a-z]+[0-9]+|pred)\[([0-9,]*)\]', results)
  parsed = tuple((dtype, tuple(int(size) for size in dims.split(',') if size)) for dtype, dims in shapes)
  return Instruction(operation.removesuffix('-start').removesuffix('-done'), parsed, line.strip())


def moved(text: str, least: int, *, loops: bool, operations: tuple[str, ...] = COLLECTIVES[:3]) -> list[Instruction]:
  """The collectives whose results have `least` elements or more."""
  found = instructions(text, loops=loops)
  return [one for one in found if one.operation in operations and one.elements >= least]
