"""Causal attention by the libraries' kernels: which one when, what is lowered for it, and splash against our own."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax import sharding
from spct_jax.models import blockwise, prefill
from spct_jax.sampling import loop


# Seen to fail: capabilities compared as text ('10.0' < '9.0'), and a cap that cuDNN would drop.
@pytest.mark.parametrize('want, arguments', [
    ('blockwise', ('cpu', None, 'bfloat16', 128, 128, None)),
    ('cudnn', ('gpu', '8.0', 'bfloat16', 128, 128, None)),
    ('cudnn', ('cuda', '9.0', 'float16', 256, 256, None)),
    ('cudnn', ('gpu', '10.0', 'bfloat16', 192, 192, None)),
    ('blockwise', ('gpu', '8.9', 'bfloat16', 256, 256, None)),
    ('blockwise', ('gpu', None, 'bfloat16', 256, 256, None)),
    ('blockwise', ('gpu', '9.0', 'bfloat16', 100, 100, None)),
    ('blockwise', ('gpu', '9.0', 'float32', 128, 128, None)),
    ('blockwise', ('gpu', '9.0', 'bfloat16', 256, 256, 50.0)),
    ('blockwise', ('gpu', '9.0', 'bfloat16', 128, 64, None)),
    ('splash', ('tpu', None, 'bfloat16', 256, 256, 50.0)),
    ('splash', ('tpu', None, 'float32', 64, 64, None)),
    ('blockwise', ('tpu', None, 'float16', 128, 128, None)),
])
def test_the_means_follow_from_device_and_sizes(want, arguments):
  assert prefill.means(*arguments) == want


def shapes(T=200, H=8, M=2, d=128, e=128, dtype=jnp.bfloat16):
  return tuple(jax.ShapeDtypeStruct((2, T, heads, size), dtype) for heads, size in ((H, d), (M, d), (M, e)))


def lowered(by, platform, window, softcap, target):
  run = functools.partial(prefill.causal, scale=0.1, window=window, softcap=softcap, by=by)
  checks = [jax.export.DisabledSafetyCheck.custom_call(target)]
  return str(jax.export.export(jax.jit(run), platforms=[platform], disabled_checks=checks)(*shapes()).mlir_module())


# Nothing here runs: cuDNN is not there, and is only asked for its version.
@pytest.mark.parametrize('window', [None, 64])
def test_the_program_for_a_gpu_calls_cudnn(window, monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as library

  monkeypatch.setattr(library, 'cuda_versions', types.SimpleNamespace(cudnn_get_version=lambda: 91000))
  text = lowered('cudnn', 'cuda', window, None, '__cudnn$fmhaSoftmax')
  assert '__cudnn$fmhaSoftmax' in text and 'tensor<2x8x200x200' not in text
  assert ('CAUSAL' in text) and (f'sliding_window_length\\22: {window or 0}' in text)


def test_the_program_for_a_tpu_calls_splash():
  text = lowered('splash', 'tpu', 64, 50.0, 'tpu_custom_call')
  assert 'tpu_custom_call' in text and 'splash' in text and 'x200x200' not in text and 'x256x256' not in text


def drawn(T, H=4, M=2, d=16, e=16):
  normal = np.random.default_rng(0).normal
  return tuple(jnp.asarray(normal(size=(2, T, n, size)), jnp.float32) for n, size in ((H, d), (M, d), (M, e)))


# Seen to fail: the scale left out; a window one key too wide; query heads dealt to the wrong key heads.
@pytest.mark.parametrize('T, window, softcap', [(130, None, 3.0), (300, 70, None)])
def test_splash_is_blockwise_attention(T, window, softcap):
  q, k, v = drawn(T)
  got = jax.jit(functools.partial(prefill.splash, scale=0.4, window=window, softcap=softcap, interpret=True))(q, k, v)
  want = jax.jit(functools.partial(blockwise.causal, scale=0.4, window=window, softcap=softcap))(q, k, v)
  np.testing.assert_allclose(got, want, atol=2e-5)


# Seen to fail: keys whole and queries cut where there are two key heads (a device then reads the wrong ones).
@pytest.mark.parametrize('M', [2, 1])
def test_on_a_mesh_each_device_runs_its_own_heads(M, monkeypatch):
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  monkeypatch.setattr(prefill, 'means', lambda *_: 'splash')
  monkeypatch.setitem(prefill._BY, 'splash', functools.partial(prefill.splash, interpret=True))
  settings = types.SimpleNamespace(mesh=mesh)
  q, k, v = (jnp.concatenate([x, x + 1]) for x in drawn(128, M=M))
  program = jax.jit(lambda *args: loop._causal(settings, *args, 0.4, None, None)).lower(q, k, v).compile()
  np.testing.assert_allclose(program(q, k, v), blockwise.causal(q, k, v, 0.4), atol=2e-5)
  assert tuple(program.output_shardings.spec)[:3] == (sharding.DATA_AXES, None, 'tensor')
