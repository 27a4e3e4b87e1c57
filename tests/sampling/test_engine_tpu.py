"""The engine's program compiled for a slice of TPUs that is not there; skipped where libtpu is not installed.

    pip install "jax[tpu]"      for the libtpu that this JAX wants; another may crash in its own cost model
"""

import functools
import math
import re

import jax
import numpy as np
import pytest

from spct_jax import pages, sharding
from spct_jax.models import int8, unrolled
from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.transformer import Transformer
from spct_jax.sampling import loop
from spct_jax.sampling.engine import Engine
from spct_jax.stages import samplers
from spct_jax.testing import compiled

P, T = 512, 128
CONFIG = ModelConfig(  # Gemma 2's two kinds of layer, narrower; of the last one prefill needs no attention
    vocab_size=8192, width=1024, heads=8, kv_heads=4, head_dim=256, ffn=4096, num_periods=1,
    period=(BlockConfig(window=256), BlockConfig()), tied=True, norm_plus_one=True, post_norms=True, activation='gelu_tanh', attn_softcap=50.0,
    logit_softcap=30.0, embed_scaled=True, dtype='bfloat16', param_dtype='bfloat16',
)


@pytest.fixture(scope='module')
def mesh():
  """2 x 4 chips of v5e, as data=2, tensor=4."""
  pytest.importorskip('libtpu')
  topologies = pytest.importorskip('jax.experimental.topologies')
  with pytest.MonkeyPatch.context() as patch:
    for name, value in (
        ('TPU_SKIP_MDS_QUERY', '1'), ('TPU_ACCELERATOR_TYPE', 'v5litepod-8'), ('TPU_WORKER_HOSTNAMES', 'localhost'),
        ('TPU_WORKER_ID', '0'), ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
    ):
      patch.setenv(name, value)
    devices = topologies.get_topology_desc('v5e:2x4', 'tpu').devices
  return jax.sharding.Mesh(
      np.array(devices).reshape(2, 1, 4), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3
  )


def program(mesh, eight_bits):
  page, decoder = pages.sharding(), Transformer(CONFIG)
  flat = unrolled.model(decoder).config
  shapes = jax.eval_shape(functools.partial(unrolled.params, CONFIG), decoder.abstract_params())
  if eight_bits:
    shapes = jax.eval_shape(functools.partial(int8.quantise, flat), shapes)
  params = compiled.placed(shapes, samplers.int8_layout(flat, shapes, page.sampler_rules, mesh))
  engine = Engine(
      model=decoder, mesh=mesh, cache_rules=page.cache_rules, rows=64, max_new_tokens=T, eos_ids=(1,), seed=0,
      stage='x', cache_dtype='int8' if eight_bits else None,
  )
  sizes = loop.Sizes(rows=32, slots=2, width=32, batch=1)
  return compiled.advance(engine, params, sizes, prompts=4, prompt_length=P, tasks=64), params


# Seen to fail: the kernel without its `shard_map`, which the compiler refuses.
def test_a_slice_of_eight_runs_splash_on_its_own_heads_and_moves_no_weight(mesh):
  made, params = program(mesh, eight_bits=False)
  text, least = made.as_text(), CONFIG.width * CONFIG.head_dim  # k of one of four chips
  assert not compiled.moved(text, least, loops=False), 'a weight moves'
  calls = [one for one in compiled.instructions(text, loops=True) if 'tpu_custom_call' in one.line]
  kernel = [re.findall(r'bf16\[([0-9,]+)\]', one.line) for one in calls]
  # Two query heads of a chip, P queries, 256 numbers; not all eight heads.
  assert any(f'2,{P},256' in shape for found in kernel for shape in found), kernel
  assert not any(shape.endswith(f'8,{P},256') for found in kernel for shape in found), kernel

  small, eight = program(mesh, eight_bits=True)
  weights = lambda tree: sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )
  assert weights(eight) < 0.52 * weights(params)
  one, two = made.memory_analysis(), small.memory_analysis()
  # The arguments hold weights and caches; no float copy of them comes back among the temporaries.
  assert two.argument_size_in_bytes < 0.6 * one.argument_size_in_bytes
  assert two.temp_size_in_bytes - one.temp_size_in_bytes < 0.3 * weights(params)
