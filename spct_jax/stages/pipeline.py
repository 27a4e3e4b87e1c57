"""All of SPCT in one command: the stages of `config.pipeline.stages`, one after the other.

Before the first one works, every stage's config is checked and what it reads is held against what the
stages before it write and what the workdir has. A finished stage is skipped, so the same command continues
a killed run.
"""

import importlib
from typing import Any

from spct_jax.stages import budget, checks, loading, processes
from spct_jax.stages.workdir import Workdir

READS = ()
WRITES = ()

STAGES = ('sft', 'sample', 'rft', 'grpo', 'meta_rm', 'evaluate')


def run(config: Any, workdir: Workdir, mesh: Any, generate: Any = None) -> None:
  """Runs the pipeline."""
  names = tuple(config.pipeline.stages)
  check(config, workdir, mesh)
  for number, name in enumerate(names, start=1):
    processes.say(f'--- {number}/{len(names)} {name}')
    _module(name).run(config, workdir, mesh, generate)
  processes.say('pipeline: done')


def check(config: Any, workdir: Workdir, mesh: Any) -> None:
  """Everything that can be known to be wrong before work starts.

  Raises:
    ValueError: an unknown or repeated stage, a bad number, a file that nobody writes, data that cannot be
      used, or a model that does not divide over the mesh.
  """
  names = tuple(config.pipeline.stages)
  unknown = [name for name in names if name not in STAGES]
  if unknown or len(set(names)) != len(names) or not names:
    raise ValueError(
        f'pipeline.stages: got {names}; allowed: each of {", ".join(STAGES)} at most once, in the order they run'
    )
  for name in names:
    checks.stage(config, mesh, name)
  written: set[str] = set()
  for name in names:
    module = _module(name)
    for path in (*module.READS, *checks.wants(config, name)):
      here = workdir.path / path
      if path not in written and not processes.as_writer_says(here.exists, what=f'looking for {path}'):
        raise ValueError(
            f'stage {name!r} reads {path}, which no stage before it writes and the workdir does not hold; '
            f'add the stage {path.split("/")[0]!r} before it, or change what {name} starts from'
        )
    written.update(module.WRITES)
  budget.report(config, mesh, names)
  found = loading.data(config)
  processes.say(
      f'data: {len(found.train)} items to train on, {len(found.heldout)} to evaluate'
      + ''.join(f', {len(places)} skipped ({reason})' for reason, places in found.skipped.items())
  )
  if found.contaminated:
    processes.say(f'data: {len(found.contaminated)} evaluated items share a conversation with the training items')


def _module(name: str) -> Any:
  return importlib.import_module(f'spct_jax.stages.{name}')
