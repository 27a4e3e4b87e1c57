"""These tests compile many steps for 8 devices and run each two or three times: compile them in a hurry."""

import jax
import pytest


@pytest.fixture(scope='module', autouse=True)
def _compile_in_a_hurry():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
