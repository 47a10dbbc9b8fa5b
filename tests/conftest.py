"""Eight virtual CPU devices, strict dtypes and ranks, compiled code cached."""

import os
import pathlib
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# What a test takes is compilation: half of it optimises code that runs once.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_cpu_enable_concurrency_optimized_scheduler=false',  # `parallel`
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
  ]
)
# Subprocesses inherit these.
ROOT = pathlib.Path(__file__).parents[1]
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
sys.path[:0] = [str(ROOT / 'experiments'), str(ROOT / 'tests')]

import jax  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')


@pytest.fixture(scope='session')
def sets(tmp_path_factory):
  """A --data_dir with small data sets under official names."""
  import official  # its imports take seconds, which few tests need

  folder = tmp_path_factory.mktemp('tensorflow_datasets')
  official.write_sets(folder)
  return folder


def forget_programs():
  """Frees what was compiled: a process has only so many memory maps."""
  tiny.shared_program.cache_clear()
  jax.clear_caches()


@pytest.fixture(scope='module', autouse=True)
def programs_of_a_module():
  """Programs last as long as their module."""
  yield
  forget_programs()


@pytest.fixture(scope='module', params=tiny.METHODS)
def name(request):
  """Every method in turn: all tests of one run before the next one's."""
  yield request.param
  forget_programs()
