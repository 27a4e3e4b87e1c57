"""Checkpoints with Orbax: training state in, the same bits out, onto whatever mesh there is.

A step is one folder with three items: `params` (so that the next stage reads no optimizer), `rest` (optimizer
state and step) and `meta` (JSON). Orbax writes into a temporary folder and renames it, so a save that was
killed leaves nothing that `latest_step` or `restore` would take for a checkpoint.

Saving is synchronous: the update step donates its state, and what follows a save may rely on it.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from spct_jax import sharding
from spct_jax.train.state import State


class Checkpoints:
  """The checkpoints of one stage in `folder`, of which the newest `keep` stay. A context manager."""

  def __init__(self, folder: str | pathlib.Path, *, keep: int):
    if keep < 1:
      raise ValueError(f'checkpoints to keep: got {keep}; it must be 1 or more.')
    self.folder = pathlib.Path(folder).resolve()
    self._manager = ocp.CheckpointManager(
        self.folder,
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False),
        item_handlers={
            'params': ocp.StandardCheckpointHandler(),
            'rest': ocp.StandardCheckpointHandler(),
            'meta': ocp.JsonCheckpointHandler(),
        },
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    self._manager.close()

  def latest_step(self) -> int | None:
    """The newest complete checkpoint, None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: State, meta: dict) -> None:
    """Writes `state`, and `meta`, which must be JSON. A checkpoint of the same step stays as it is."""
    if step in self._manager.all_steps():
      return
    rest = {name: value for name, value in state.items() if name != 'params'}
    self._manager.save(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state['params']),
            rest=ocp.args.StandardSave(rest),
            meta=ocp.args.JsonSave(meta),
        ),
    )
    self._manager.wait_until_finished()

  def restore(self, abstract: State, shardings: State, step: int | None = None) -> tuple[State, dict]:
    """(state, meta) of `step`, by default the newest, each leaf laid out by `shardings`."""
    step = self._step(step)
    target = _with_shardings(abstract, shardings)
    rest = {name: value for name, value in target.items() if name != 'params'}
    self._check(step, 'params', target['params'])
    self._check(step, 'rest', rest)
    loaded = self._manager.restore(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardRestore(target['params']),
            rest=ocp.args.StandardRestore(rest),
            meta=ocp.args.JsonRestore(),
        ),
    )
    return {'params': loaded['params'], **loaded['rest']}, loaded['meta']

  def load_params(self, model: Any, shardings: Any, *, key: jax.Array, step: int | None = None) -> Any:
    """Parameters of `step` for `model`, which may have another head than the saved one.

    The backbone must be the same. The scalar head of a reward model that starts from a language model is
    drawn fresh from `key`, and the language model's own head is then not read; between two language
    models (or a reward model and a language model) a missing or spare head is an error.
    """
    step = self._step(step)
    abstract = jax.eval_shape(model.init, key)
    target = _with_shardings(abstract, shardings)
    saved = self._saved(step, 'params')
    heads = [name for name in target if name not in saved]
    if set(heads) - {'reward'}:
      raise ValueError(self._mismatch(step, f'it has no {heads[0]!r}'))
    spare = sorted(set(saved) - set(target))
    if spare and 'reward' not in target:
      raise ValueError(self._mismatch(step, f'it has a {spare[0]!r}, for which the model has no place'))
    shared = {name: value for name, value in target.items() if name in saved}
    self._check(step, 'params', {**saved, **shared})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:  # StandardRestore reads whole trees only
      params = reader.restore(
          self.folder / str(step) / 'params',
          args=ocp.args.PyTreeRestore(
              item=shared,
              restore_args=ocp.checkpoint_utils.construct_restore_args(shared),
              partial_restore=True,
          ),
      )
    if heads:
      fresh = jax.jit(
          lambda key: {name: model.init(key)[name] for name in heads},
          out_shardings={name: shardings[name] for name in heads},
      )
      params.update(fresh(key))
    return params

  def _step(self, step: int | None) -> int:
    steps = sorted(self._manager.all_steps())
    if not steps:
      raise ValueError(f'{self.folder} holds no complete checkpoint; run the stage that writes it first.')
    if step is not None and step not in steps:
      raise ValueError(f'{self.folder} holds no checkpoint of step {step}; it has {steps}.')
    return steps[-1] if step is None else step

  def _saved(self, step: int, item: str) -> Any:
    return self._manager.item_metadata(step)[item].tree

  def _check(self, step: int, item: str, target: Any) -> None:
    """Orbax's own message for a wrong tree is pages long; this one names the first leaf that differs."""
    saved = {path: tuple(leaf.shape) for path, leaf in sharding.leaf_paths(self._saved(step, item))}
    wanted = {path: tuple(leaf.shape) for path, leaf in sharding.leaf_paths(target)}
    for path in sorted(set(saved) | set(wanted)):
      if saved.get(path) != wanted.get(path):
        has = f'has shape {saved[path]}' if path in saved else 'is missing'
        want = f'shape {wanted[path]}' if path in wanted else 'none'
        raise ValueError(self._mismatch(step, f'{item}/{path} {has}, and the model wants {want}'))

  def _mismatch(self, step: int, what: str) -> str:
    return (
        f'checkpoint {self.folder} step {step} is of another model: {what}; use the config that it was'
        ' trained with, or another folder.'
    )


def load_params(
    folder: str | pathlib.Path, model: Any, shardings: Any, *, key: jax.Array, step: int | None = None
) -> Any:
  """`Checkpoints.load_params` for a folder that another stage has written."""
  if not pathlib.Path(folder).is_dir():
    raise ValueError(f'no checkpoint folder {folder}; run the stage that writes it first.')
  with Checkpoints(folder, keep=10**9) as checkpoints:
    return checkpoints.load_params(model, shardings, key=key, step=step)


def _with_shardings(abstract: Any, shardings: Any) -> Any:
  def place(leaf, where):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
  return jax.tree.map(place, abstract, shardings)
