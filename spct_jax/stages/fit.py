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

import jax

from spct_jax import sharding
from spct_jax.stages import loading, processes
from spct_jax.stages.logbook import MetricsWriter
from spct_jax.stages.progress import Progress
from spct_jax.stages.workdir import Workdir
from spct_jax.train import checkpoint, lora, optim, state as states, update


@dataclasses.dataclass(frozen=True)
class Session:
  """What a training loop holds open: the optimizer, the layout of its state, its checkpoints and its log.

  `trained` is the decoder, or adapters on it: then state and checkpoints hold adapters only.
  """

  stage: str
  init: str  # the name of the model that training starts from
  trained: Any
  key: jax.Array  # of fresh adapters
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

  def start(self, params: Callable[[], Any]) -> tuple[states.State, Any, int]:
    """(state, frozen, steps done): the newest checkpoint, or a fresh optimizer around `params()`.

    `frozen` is `params()` itself under adapters, which are then what the state holds, and else None.
    """
    done = self.checkpoints.latest_step()
    adapted = isinstance(self.trained, lora.Adapted)
    frozen = params() if adapted else None
    if done is None:
      begun = frozen
      if adapted:
        begun = jax.jit(self.trained.start, out_shardings=self.shardings['params'])(self.key, frozen)
      state = states.from_params(begun if adapted else params(), self.optimizer, self.shardings)
    else:
      state, _ = self.checkpoints.restore(self.abstract, self.shardings, done)
      processes.say(f'{self.stage}: continues after step {done}')
    done = 0 if done is None else done
    self.writer.truncate(done - 1)
    return state, frozen, done

  def params(self, state: states.State, frozen: Any) -> Any:
    """The parameters as `trained` takes them."""
    return state['params'] if frozen is None else {'frozen': frozen, 'adapters': state['params']}

  def save(self, step: int, state: states.State) -> None:
    meta = {'stage': self.stage, 'step': step}
    if isinstance(self.trained, lora.Adapted):
      meta |= {'init': self.init, 'lora': dataclasses.asdict(self.trained.settings)}
    self.checkpoints.save(step, state, meta)


def open_session(config: Any, workdir: Workdir, mesh: Any, *, stage: str, trained: Any) -> Session:
  """Opens the checkpoints and the log of a stage; `trained` is its `loading.learner`."""
  optimizer = optim.make_optimizer(loading.optim_settings(config[stage]))
  rules = loading.rules(config.sharding.rules)
  abstract = states.abstract_state(trained, optimizer)
  shardings = states.state_shardings(trained, optimizer, rules, mesh)
  folder = workdir.stage_dir(stage) / 'checkpoint'
  return Session(
      stage=stage,
      init=config[stage].init,
      trained=trained,
      key=loading.adapters_key(config, stage),
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
    trained: Any,
    params: Callable[[], Any],
    loss_fn: update.LossFn,
    batch_of: Callable[[int], dict],
    steps: int,
    extra: Callable[[dict], Mapping[str, Any]] | None = None,
) -> Any:
  """Runs `steps` updates and returns the parameters as `trained` takes them.

  `params` makes what training starts from; `extra(batch)` adds host metrics to a step's row.
  """
  fields = config[stage]
  with open_session(config, workdir, mesh, stage=stage, trained=trained) as session:
    state, frozen, start = session.start(params)
    step_fn = update.make_step(
        loss_fn,
        session.optimizer,
        microbatches=fields.microbatches,
        mesh=mesh,
        shardings=session.shardings,
        frozen=frozen,
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
      return session.params(state, frozen)


def flush(writer: MetricsWriter, progress: Progress, pending: tuple | None) -> None:
  """Reads a dispatched step's metrics and writes its rows."""
  if pending is None:
    return
  step, metrics, extra, began = pending
  host = {name: float(value) for name, value in sharding.to_host(metrics).items()}
  host |= extra
  writer.write(step, host, {'seconds': time.perf_counter() - began})
  progress.update(1, metrics={'loss': host['loss'], 'grad_norm': host['grad_norm']})
