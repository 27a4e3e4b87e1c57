"""A finished stage of a workdir, made without running it. Imported by tests only."""

import os
from typing import Any

from spct_jax import sharding
from spct_jax.models.transformer import Transformer
from spct_jax.stages import loading, named, workdir
from spct_jax.train import checkpoint, lora, optim, state as states


def write_stage(
    path: str | os.PathLike, config: Any, stage: str, trained: Transformer | lora.Adapted, params: Any
) -> None:
  """The stage's checkpoint and its two records, as far as others look at them; `params` of what was trained."""
  reads = named.reads(config, config[stage].init)
  with workdir.open_workdir(path, config) as opened:
    opened.start(stage, config, reads)
    optimizer = optim.make_optimizer(loading.optim_settings(config[stage]))
    one = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1})
    places = states.state_shardings(trained, optimizer, loading.rules(config.sharding.rules), one)
    with checkpoint.Checkpoints(opened.path / stage / 'checkpoint', keep=1) as saved:
      saved.save(2, states.from_params(params, optimizer, places), {'stage': stage})
    opened.mark_done(stage, config, reads)
