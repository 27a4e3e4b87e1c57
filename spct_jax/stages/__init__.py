"""The stages: each reads files of a workdir and writes files of it; `RUN` is the one place of dispatch.

A stage module has `READS` and `WRITES` (paths in the workdir; a pipeline checks one against the other
before it starts), and `run(config, workdir, mesh, generate=None)`. `generate` replaces the engine: a
function `(stage, params) -> judges.grm.Generate`, which tests use to script what the judge writes.
"""

import importlib


def _stage(name):
  def run(config, workdir, mesh, generate=None):
    return importlib.import_module(f'spct_jax.stages.{name}').run(config, workdir, mesh, generate)
  return run


RUN = {
    'sft': _stage('sft'),
    'sample': _stage('sample'),
    'rft': _stage('rft'),
    'grpo': _stage('grpo'),
    'meta_rm': _stage('meta_rm'),
    'evaluate': _stage('evaluate'),
    'pipeline': _stage('pipeline'),
}
