"""The loop of the stages that learn from fixed rows: sft, rft, meta_rm.

    state <- newest checkpoint, or a fresh optimizer around the given parameters
    for step: batch_of(step) -> jitted update -> metrics of the step before are read and written

`batch_of(step)` is a pure function, so a killed run, started again, redoes the steps after its newest
checkpoint exactly. Rows of metrics.jsonl are written before the checkpoint that covers them.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from spct_jax import sharding
from spct_jax.stages import loading, processes
from spct_jax.stages.logbook import MetricsWriter
from spct_jax.stages.progress import Progress
from spct_jax.stages.workdir import Workdir
from spct_jax.train import checkpoint, optim, state as states, update


@dataclasses.dataclass(frozen=True)
class Session:
  """What a training loop holds open: the optimizer, the layout of its state, its checkpoints and its log."""

  stage: str
  optimizer: optim.Optimizer
  abstract: states.State
  shardings: states.State
  checkpoints: checkpoint.Checkpoints
  writer: MetricsWriter

  def __enter__(self) -> 'Session':
    return self

  def __exit__(self, *error: Any) -> None:
    self.writer.close()
    self.checkpoints.close()

  def start(self, params: Callable[[], Any]) -> tuple[states.State, int]:
    """(state, steps done): the newest checkpoint, or a fresh optimizer around `params()`."""
    done = self.checkpoints.latest_step()
    if done is None:
      state, done = states.from_params(params(), self.optimizer, self.shardings), 0
    else:
      state, _ = self.checkpoints.restore(self.abstract, self.shardings, done)
      processes.say(f'{self.stage}: continues after step {done}')
    self.writer.truncate(done - 1)
    return state, done

  def save(self, step: int, state: states.State) -> None:
    self.checkpoints.save(step, state, {'stage': self.stage, 'step': step})


def open_session(config: Any, workdir: Workdir, mesh: Any, *, stage: str, decoder: Any) -> Session:
  """Opens the checkpoints and the log of a stage."""
  optimizer = optim.make_optimizer(loading.optim_settings(config[stage]))
  rules = loading.rules(config.sharding.rules)
  abstract = states.abstract_state(decoder, optimizer)
  shardings = states.state_shardings(decoder, optimizer, rules, mesh)
  folder = workdir.stage_dir(stage) / 'checkpoint'
  return Session(
      stage=stage,
      optimizer=optimizer,
      abstract=abstract,
      shardings=shardings,
      checkpoints=checkpoint.Checkpoints(folder, keep=config.logging.keep),
      writer=MetricsWriter(workdir, stage, tensorboard=config.logging.tensorboard),
  )


def fit(
    config: Any,
    workdir: Workdir,
    mesh: Any,
    *,
    stage: str,
    decoder: Any,
    params: Callable[[], Any],
    loss_fn: update.LossFn,
    batch_of: Callable[[int], dict],
    steps: int,
    extra: Callable[[dict], Mapping[str, Any]] | None = None,
) -> Any:
  """Runs `steps` updates and returns the parameters; `extra(batch)` adds host metrics to a step's row."""
  fields = config[stage]
  with open_session(config, workdir, mesh, stage=stage, decoder=decoder) as session:
    state, start = session.start(params)
    step_fn = update.make_step(
        loss_fn,
        session.optimizer,
        microbatches=fields.microbatches,
        mesh=mesh,
        shardings=session.shardings,
    )
    if steps == 0:
      session.save(0, state)
    pending = None
    with Progress(total=steps, desc=stage, start=start) as progress:
      for step in range(start, steps):
        began = time.perf_counter()
        batch = batch_of(step)
        state, metrics = step_fn(state, update.put_batch(batch, mesh))
        flush(session.writer, progress, pending)
        pending = step, metrics, dict(extra(batch)) if extra else {}, began
        if (step + 1) % fields.checkpoint_every == 0 or step + 1 == steps:
          flush(session.writer, progress, pending)
          pending = None
          session.save(step + 1, state)
    return state['params']


def flush(writer: MetricsWriter, progress: Progress, pending: tuple | None) -> None:
  """Reads a dispatched step's metrics and writes its rows."""
  if pending is None:
    return
  step, metrics, extra, began = pending
  host = {name: float(value) for name, value in sharding.to_host(metrics).items()}
  host |= extra
  writer.write(step, host, {'seconds': time.perf_counter() - began})
  progress.update(1, metrics={'loss': host['loss'], 'grad_norm': host['grad_norm']})
