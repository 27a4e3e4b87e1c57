"""The mesh, the rules, and the two crossings between host and devices."""

import math
import os

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P
import numpy as np
import pytest

from spct_jax import sharding

RULES = (
    ('(^|/)table$', ('tensor', 'fsdp')),
    ('q/kernel$', ('fsdp', 'tensor', None)),
    ('kernel$', ('fsdp', 'tensor')),
    ('rows$', (('data', 'fsdp'), None)),
    ('scale$', ()),
)


def _mesh(data, fsdp, tensor):
  return sharding.make_mesh({'data': data, 'fsdp': fsdp, 'tensor': tensor})


def test_mesh_sizes_and_the_rest():
  mesh = sharding.make_mesh({'data': 2, 'fsdp': -1, 'tensor': 2})
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert all(kind == AxisType.Auto for kind in mesh.axis_types)
  assert dict(sharding.make_mesh({'data': -1}).shape) == {'data': 8, 'fsdp': 1, 'tensor': 1}
  assert math.prod(_mesh(1, 1, 1).shape.values()) == 1  # fewer devices than there are


# Mutation seen: without the `fixed > available` test, jax.make_mesh raises without a remedy.
@pytest.mark.parametrize(
    'shape, said',
    [
        ({'data': 4, 'fsdp': 4, 'tensor': 1}, r'impossible mesh: .*needs 16 devices, and there are 8; make'),
        ({'data': 3, 'fsdp': -1, 'tensor': 1}, r'ask for 3 and there are 8 devices; make their product a divisor'),
        ({'data': 16, 'fsdp': -1, 'tensor': 1}, r'ask for 16 and there are 8 devices'),
        ({'data': -1, 'fsdp': -1, 'tensor': 1}, r'at most one axis may be -1'),
        ({'data': 0, 'fsdp': 1, 'tensor': 1}, r'data=0; a size is a positive integer, or -1'),
        ({'data': 2.0, 'fsdp': 1, 'tensor': 1}, r'data=2.0'),
        ({'model': 2}, r"unknown axis 'model'; the axes are data, fsdp, tensor"),
    ],
)
def test_impossible_mesh(shape, said):
  with pytest.raises(ValueError, match=said):
    sharding.make_mesh(shape)


# Mutations seen: last match instead of first; no None in front of a stacked leaf.
def test_spec_first_match_and_stacked_leaves():
  mesh = _mesh(2, 2, 2)
  assert sharding.spec_for('head/0/q/kernel', (8, 4, 6), RULES, mesh) == P('fsdp', 'tensor', None)
  assert sharding.spec_for('period/1/q/kernel', (3, 8, 4, 6), RULES, mesh) == P(None, 'fsdp', 'tensor', None)
  assert sharding.spec_for('opt_state/1/mu/period/1/up/kernel', (3, 8, 4), RULES, mesh) == P(None, 'fsdp', 'tensor')
  assert sharding.spec_for('rows', (8, 5), RULES, mesh) == P(('data', 'fsdp'), None)
  assert sharding.spec_for('scale', (7,), RULES, mesh) == P()
  assert sharding.spec_for('opt_state/1/count', (), RULES, mesh) == P()  # a scalar needs no rule


@pytest.mark.parametrize(
    'path, shape, rules, said',
    [
        ('head/0/odd', (8, 8), RULES, r"no sharding rule matches 'head/0/odd' with shape \(8, 8\).*Add a rule"),
        ('head/0/up/kernel', (8, 7), RULES, r"'head/0/up/kernel' with shape \(8, 7\): its dimension of 7 .* tensor=2"),
        ('rows', (6, 2), RULES, r'cannot be split 4 ways over data=2 x fsdp=2'),
        ('head/0/q/kernel', (4, 8, 4, 6), RULES, r'3 entries .* has shape \(4, 8, 4, 6\); name every dimension'),
        ('table', (8, 8), (('table', ('model', None)),), r"names an unknown axis \('model'\)"),
        ('table', (8, 8), (('table', ('fsdp', 'fsdp')),), r'names one axis twice'),
        ('table', (8,), (('table', 'fsdp'),), r"got the string 'fsdp'; a spec is a tuple"),
    ],
)
def test_rules_that_do_not_fit(path, shape, rules, said):
  with pytest.raises(ValueError, match=said):
    sharding.spec_for(path, shape, rules, _mesh(2, 2, 2))


def test_shardings_and_bytes_need_no_devices():
  mesh = AbstractMesh((4, 16, 8), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
  tree = {'table': jax.ShapeDtypeStruct((1024, 64), 'bfloat16'), 'scale': jax.ShapeDtypeStruct((64,), 'float32')}
  shardings = sharding.tree_shardings(tree, RULES, mesh)
  # 1024/8 x 64/16 entries of 2 bytes, and 64 of 4. Mutation seen: the whole shape instead of the shard's.
  assert sharding.bytes_per_device(tree, shardings) == 128 * 4 * 2 + 64 * 4


# Mutation seen: rows dealt over 'data' only, which leaves two copies of each row.
def test_batch_rows_split_over_both_data_axes():
  mesh = _mesh(2, 2, 2)
  rows = sharding.to_device(np.arange(24.0).reshape(8, 3), sharding.batch_rows(mesh))
  assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
  assert sharding.data_ways(mesh) == 4


# Mutation seen: every shard filled with the first rows.
def test_there_and_back():
  mesh = _mesh(2, 2, 2)
  host = {
      'table': np.arange(64, dtype=np.float32).reshape(8, 8),
      'scale': np.arange(5, dtype=np.int64),
      'step': np.int32(3),
      'mask': np.array([True, False]),
  }
  rules = (*RULES, ('mask$', (None,)))
  device = sharding.to_device(host, sharding.tree_shardings(host, rules, mesh))
  assert device['table'].sharding.spec == P('tensor', 'fsdp')
  assert device['scale'].dtype == np.int32  # as everywhere in JAX
  back = sharding.to_host(device)
  for name, value in host.items():
    assert isinstance(back[name], np.ndarray)
    np.testing.assert_array_equal(back[name], value)


def test_replication_of_what_one_process_cannot_read():
  """The path that several processes take, run in one: an array split over all devices is made whole."""
  mesh = _mesh(2, 2, 2)
  split = sharding.to_device(np.arange(8.0), sharding.batch_rows(mesh))
  whole = sharding._replicate(mesh)(split)
  assert whole.is_fully_replicated
  np.testing.assert_array_equal(np.asarray(whole), np.arange(8.0))


def test_devices_on_a_cpu_share_the_memory_of_the_machine():
  whole = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  assert sharding.memory_limit(jax.devices()) == whole // 8


class Lent:
  """A device that tells what it lets us use."""

  platform, process_index = 'gpu', 0

  def __init__(self, limit, process_index=0):
    self.limit, self.process_index = limit, process_index

  def memory_stats(self):
    return None if self.limit is None else {'bytes_limit': self.limit}


def test_the_least_device_of_this_process_is_the_limit():
  assert sharding.memory_limit([Lent(70), Lent(60), Lent(None), Lent(50, process_index=1)]) == 60
  assert sharding.memory_limit([Lent(None)]) is None
