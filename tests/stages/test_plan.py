"""The plan: devices and mesh in words, bytes per device to the byte, and a clear end where it cannot fit."""

import jax
import jax.numpy as jnp
import pytest

from spct_jax import sharding
from spct_jax.stages import plan


def test_describe_names_devices_processes_and_axes():
  lines = plan.describe(sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 1}))
  assert lines[0] == 'devices: 4 x cpu, 4 more unused, in 1 process'
  assert lines[1].startswith('mesh: data 2, fsdp 2, tensor 1; JAX ')


def test_a_row_counts_the_bytes_of_one_device():
  # Seen to catch: counting the whole array instead of one device's shard.
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  tree = {
    'q': {'kernel': jax.ShapeDtypeStruct((8, 4, 2), jnp.bfloat16)},
    'scale': jax.ShapeDtypeStruct((8,), jnp.float32),
  }
  rules = (('q/kernel$', ('fsdp', 'tensor', None)), ('scale$', (None,)))
  row = plan.row('parameters', tree, sharding.tree_shardings(tree, rules, mesh))
  assert row == plan.Row('parameters', 8 * 4 * 2 * 2 // 4 + 8 * 4)


def test_the_table_sums_and_marks_estimates():
  rows = [plan.Row('parameters', 3 * 2**20), plan.Row('activations', 2**20, estimate=True)]
  lines = plan.memory(rows, limit=None)
  assert [' '.join(line.split()) for line in lines] == [
    'memory per device',
    'parameters 3.0 MiB',
    'activations 1.0 MiB (estimate)',
    'sum 4.0 MiB',
  ]
  assert (
    lines != plan.memory(rows, limit=2**30) and 'of 1.0 GiB' in plan.memory(rows, limit=2**30)[-1]
  )
  assert plan.memory([], limit=None)[-1].endswith('0 B')


def test_what_cannot_fit_is_an_error_and_what_is_tight_a_warning():
  # Seen to catch: counting estimates in the refusal; refusing only at twice the limit.
  rows = [
    plan.Row('parameters', 80),
    plan.Row('cache', 15),
    plan.Row('activations', 50, estimate=True),
  ]
  assert 'warning: 145% of the device' in plan.memory(rows, limit=100)[-1]
  with pytest.raises(
    ValueError,
    match='cannot fit: 95 B of arrays on a device of 90 B; the largest part is parameters',
  ):
    plan.memory(rows, limit=90)


def test_activations_grow_as_said():
  base = dict(tokens=10, width=8, ffn=16, layers=2, vocab=100, itemsize=2)
  kept = plan.activations(**base, remat=True).bytes
  assert kept == 10 * (2 * 8 * 2 + 2 * 4 * 100)
  assert plan.activations(**base, remat=False).bytes == 10 * (2 * (12 * 8 + 3 * 16) * 2 + 800)


def test_report_prints_a_stage_in_front_of_each_line(capsys):
  plan.report('grpo', {'parameters': 2048}, sharding.make_mesh({'data': -1}))
  lines = capsys.readouterr().out.splitlines()
  assert (
    len(lines) == 3 and all(line.startswith('grpo: ') for line in lines) and '2.0 KiB' in lines[1]
  )


def test_sizes_in_words():
  assert [plan.size(n) for n in (0, 1023, 1536, 1024**2 - 1, 5 * 2**40)] == [
    '0 B',
    '1023 B',
    '1.5 KiB',
    '1.0 MiB',
    '5.0 TiB',
  ]
