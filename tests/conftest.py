"""Eight fake CPU devices for every test, and programs that compile fast rather than run fast; set before jax starts."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
  """A worker runs many modules: their programs would add up to gigabytes."""
  yield
  jax.clear_caches()
