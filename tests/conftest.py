"""Eight fake CPU devices for every test, and programs that compile fast rather than run fast; set before jax starts."""

import importlib.metadata
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if importlib.metadata.version("jax").startswith("0.10."):  # later ones do not know the flag; a third of all time
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait in loops: with a worker per core thrice the time
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import pytest
from xdist.scheduler import LoadFileScheduling

jax.config.update("jax_disable_most_optimizations", True)  # where a plugin has imported jax already
hypothesis.settings.register_profile("untimed", deadline=None)  # machines are busy
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
  """A worker runs many modules: their programs would add up to gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture
def optimised():
  """What runs for long is compiled as it is for users."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config):
  """Of workers that share a directory of programs one may find what another has written half; it compiles it then."""
  config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")


def pytest_collection_modifyitems(items):
  """The laws of one method run one after the other, as they share what is compiled."""
  method = lambda item: getattr(item, "callspec", None) and item.callspec.params.get("name")
  laws = [i for i, item in enumerate(items) if item.path.name == "test_methods.py" and method(item)]
  for i, item in zip(laws, sorted((items[i] for i in laws), key=method), strict=True):
    items[i] = item


class Scheduling(LoadFileScheduling):
  """A worker gets what shares programs: all tests of a file, but of the laws, which take longest, a method's."""

  def _split_scope(self, nodeid):
    file, _, test = nodeid.partition("::")
    method = test.partition("[")[2].rstrip("]").split("-")[0]
    return f"{file} {method}" if file.endswith("test_methods.py") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  return Scheduling(config, log)
