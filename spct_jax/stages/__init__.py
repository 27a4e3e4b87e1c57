"""The stages: each reads files of a workdir and writes files of it; `RUN` is the one place of dispatch.

A stage module has `READS` and `WRITES` (paths in the workdir; they are checked one against the other before
anything starts), and `run(config, workdir, mesh, generate=None)`. `generate` replaces the engine: a function
`(stage, params) -> judges.grm.Generate`, which tests use to script what the judge writes.
"""

import importlib


def _only(name):
  """One stage alone, behind the same checks as a pipeline."""

  def run(config, workdir, mesh, generate=None):
    pipeline = importlib.import_module('spct_jax.stages.pipeline')
    pipeline.run_stages((name,), config, workdir, mesh, generate)

  return run


def _convert(config, workdir, mesh, generate=None):
  importlib.import_module('spct_jax.stages.convert').run(config, workdir, mesh, generate)


def _pipeline(config, workdir, mesh, generate=None):
  importlib.import_module('spct_jax.stages.pipeline').run(config, workdir, mesh, generate)


RUN = {
    'sft': _only('sft'),
    'sample': _only('sample'),
    'rft': _only('rft'),
    'grpo': _only('grpo'),
    'meta_rm': _only('meta_rm'),
    'evaluate': _only('evaluate'),
    'pipeline': _pipeline,
    'convert': _convert,
}
# What may run without a workdir; it is then given None.
WITHOUT_WORKDIR = ('convert',)
