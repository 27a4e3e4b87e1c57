"""These tests compile many steps for 8 devices and run each two or three times: compile them in a hurry."""

import pytest


@pytest.fixture(scope='module', autouse=True)
def _in_a_hurry(compiled_quickly):
  del compiled_quickly
