"""Every test runs on 8 fake CPU devices, with silent rank promotion forbidden and shapes checked.

jaxtyping reads the shapes in the signatures of the array packages and beartype checks them at each
call; `types.py` stays out of the hook because its records hold host arrays of many kinds.
"""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

# Many tests compile the same programs, in this process and in those that they start: once is enough.
_CACHE = pathlib.Path(__file__).resolve().parents[1] / '.pytest_cache' / 'xla'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

_hook = install_import_hook(
    ['spct_jax.masked', 'spct_jax.algos', 'spct_jax.sampling', 'spct_jax.models'], 'beartype.beartype'
)

_SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared'


@pytest.fixture(scope='session')
def shared() -> pathlib.Path:
  """The folder of real data beside the checkout; a test that needs it skips where it is absent."""
  if not (_SHARED / 'data').is_dir():
    pytest.skip('the folder of real data is not beside this checkout')
  return _SHARED


@pytest.fixture(scope='module')
def compiled_quickly():
  """The compiler's optimizations take longer than all that some tests run."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
