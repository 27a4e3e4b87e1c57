"""All of SPCT in one command: the stages of `config.pipeline.stages`, one after the other.

Before the first one works, every stage's config is checked and what it reads is held against what the
stages before it write and what the workdir has. A finished stage is skipped, so the same command continues
a killed run.
"""

import importlib
from typing import Any

from spct_jax.stages import budget, checks, datasets, drawing, loading, processes
from spct_jax.stages.workdir import Workdir

READS = ()
WRITES = ()

STAGES = ('sft', 'sample', 'rft', 'grpo', 'meta_rm', 'evaluate')


def run(config: Any, workdir: Workdir, mesh: Any, generate: Any = None) -> None:
  """Runs the pipeline."""
  run_stages(tuple(config.pipeline.stages), config, workdir, mesh, generate)


def run_stages(
    names: tuple[str, ...], config: Any, workdir: Workdir, mesh: Any, generate: Any = None
) -> None:
  """Checks everything, then runs the stages in turn."""
  check(names, config, workdir, mesh)
  _record_template(config, workdir)
  for number, name in enumerate(names, start=1):
    processes.say(f'--- {number}/{len(names)} {name}')
    _module(name).run(config, workdir, mesh, generate)
  processes.say(f'done: {workdir.path}')


def check(names: tuple[str, ...], config: Any, workdir: Workdir, mesh: Any) -> None:
  """Everything that can be known to be wrong before work starts.

  Raises:
    ValueError: an unknown or repeated stage, a bad number, a file that nobody writes, data that cannot be
      used, or a model that does not divide over the mesh.
  """
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
  found = datasets.load(config)
  processes.say(
      f'data: {len(found.train)} items to train on, {len(found.heldout)} to evaluate'
      + (f', {len(found.validation)} to validate on' if found.validation else '')
      + ''.join(f', {len(places)} skipped ({reason})' for reason, places in found.skipped.items())
  )
  if found.contaminated:
    processes.say(f'data: {len(found.contaminated)} evaluated items share a conversation with the training items')
  if found.validation_contaminated:
    processes.say(
        f'data: {len(found.validation_contaminated)} validation items share a conversation with the training or '
        f'the evaluated items: {", ".join(found.validation_contaminated[:5])}'
    )
  _check_lengths(config, found, names)


def _record_template(config, workdir):
  """W/chat_template.jinja is what frames every prompt of the run: the tokenizer's template, or the fallback."""
  tok = loading.tokenizer(config)
  path = workdir.path / 'chat_template.jinja'

  def write():
    if not path.is_file() or path.read_bytes() != tok.template.encode():  # a finished run stays as it is
      processes.write_text(path, tok.template)

  processes.only_writer(write, what=f'writing {path}')
  if tok.chat_template is None:
    processes.say('chat template: the tokenizer has none; prompts are framed by plain lines (chat_template.jinja)')


def _check_lengths(config, found, names):
  """Names the over-long items now: an error of a later stage would come after the training of the earlier ones."""
  tok = loading.tokenizer(config)
  samplers = [name for name in names if name in budget.SAMPLERS and name != 'evaluate'][:1]
  judged = [(name, name, found.train, 'binary') for name in samplers]
  if 'grpo' in names and config.grpo.validate_every:
    judged.append(('grpo', 'grpo, validation', found.validation, 'binary'))
  if 'evaluate' in names:
    checks.score_endings(config, max(len(example.responses) for example in found.heldout))
    judged.append(('evaluate', 'evaluate', found.heldout, config.evaluate.single))
  for name, desc, examples, single in judged:
    settings = loading.judge_settings(config, config[name], orders='fixed', single=single)
    drawing.name_overlong(
        examples,
        drawing.overlong(examples, settings, tok),
        limit=settings.buckets[-1],
        desc=desc,
        strict=config.strict,
    )


def _module(name: str) -> Any:
  return importlib.import_module(f'spct_jax.stages.{name}')
