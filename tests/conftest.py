"""Eight virtual CPU devices, strict dtypes and ranks, compiled code cached."""

import gc
import importlib
import os
import pathlib
import re
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Threads of OpenMP and BLAS wait actively for each other; the workers of
# pytest share the cores already.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
# What a test takes is compilation: most of it optimises code that runs once.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_cpu_enable_concurrency_optimized_scheduler=false',  # `parallel`
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_use_fusion_emitters=false',  # they compile slowly: MLIR
    '--xla_cpu_parallel_codegen_split_count=1',
  ]
)
# Subprocesses inherit these.
ROOT = pathlib.Path(__file__).parents[1]
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))
os.environ.setdefault('XDG_CACHE_HOME', str(ROOT / '.jax_cache' / 'user'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
sys.path[:0] = [str(ROOT / 'tests')]

import jax  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')


def promoting(make):
  """Allows an optimiser of optax to mix dtypes, as Adam does."""

  def made(*args, **kwargs):
    tx = make(*args, **kwargs)

    def update(*args):
      with jax.numpy_dtype_promotion('standard'):
        return tx.update(*args)

    return optax.GradientTransformation(tx.init, update)

  return made


optax.adam = promoting(optax.adam)


@pytest.fixture(scope='session')
def bucket_process():
  """The emulator of a bucket, one per process: clients remember its address."""
  import bucket_server

  with bucket_server.running() as server:
    yield server


@pytest.fixture
def bucket(bucket_process, request, tmp_path, monkeypatch):
  """The emulator, with `folder`, one of this test's own in the bucket."""
  from ssljax import buckets

  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(buckets, 'RETRY_SECONDS', 2.0)
  buckets._as_bucket.cache_clear()
  name = re.sub(r'\W+', '-', request.node.name).strip('-')
  bucket_process.folder = buckets.BucketPath(f'gs://bucket/{name}')
  yield bucket_process
  bucket_process.fault = lambda method, path: None
  buckets._impatient.clear()


# What is imported by now stays: no need to look through it for rubbish.
gc.collect()
gc.freeze()
gc.set_threshold(50_000, 20, 100)

# The whole suite is to take minutes. What is marked slow says again, at more
# length, what quicker tests say: of another method that has nothing of its own
# there, of a whole run, of a larger network: `python -m pytest -m slow`.
# A whole test is marked where it stands, and here what depends on a parameter.
_ON_FEATURES = r'.*\[(supervised|madnn)\]'
_RANKED = r'.*\[(entropy|k_centre|typiclust)\]'
_QUICK = r'association\.digits-mnist|deepbass\.digits'  # of the presets
_SAME_ENGINE = r'\[(supervised|association|adaptation)\]'  # no state of images
# Of the consistency methods, the default run tests resuming and sharding only
# for those whose state is of another kind: a table of images, a teacher, counts
# of images, a graph.
_OWN_STATE = 'temporal_ensembling|mean_teacher|flexmatch|laplacenet'
_NO_OWN_STATE = (
  'pseudo_label|pi_model|vat|ict|mixmatch|uda|fixmatch|fixmatch_cta|freematch'
  '|softmatch|madnn_strong|llp_fixmatch|r2d2_fixmatch'
)
_CONSISTENCY = rf'\[({_OWN_STATE}|{_NO_OWN_STATE})\]'
SLOW = (
  rf'contract_test.py::test_seeds_vmapped_.*{_SAME_ENGINE}',
  rf'contract_test.py::test_many_steps_.*{_SAME_ENGINE}',
  rf'contract_test.py::test_each_stage_compiles_once.*{_SAME_ENGINE}',
  rf'contract_test.py::test_the_stream_feed_.*{_SAME_ENGINE}',
  rf'contract_test.py::test_interrupted_and_.*{_SAME_ENGINE}',
  r'contract_test.py::test_(seeds_vmapped|many_steps|each_stage_compiles_once)'
  rf'_.*{_CONSISTENCY}',
  rf'contract_test.py::test_(the_stream_feed|the_truth)_.*{_CONSISTENCY}',
  rf'active_loop_test.py::.*{_CONSISTENCY}',
  r'contract_test.py::test_split_over_.*\[(supervised|adaptation)\]',
  rf'contract_test.py::test_(split_over|interrupted_and)_.*\[({_NO_OWN_STATE})\]',
  rf'contract_test.py::test_(structure|the_quality_of)_.*\[({_NO_OWN_STATE})\]',
  # two_hundred_steps_test.py has the first steps of each.
  rf'contract_test.py::test_training_learns\[({_NO_OWN_STATE})\]',
  r'contract_test.py::test_training_learns\[(temporal_.*|flexmatch)\]',
  # CTAugment's 18 operations compile slowly; views_test.py has quicker ones.
  r'contract_test.py::test_the_loss_.*\[fixmatch_cta\]',
  r'contract_test.py::test_a_checkpoint_of_eight.*\[(r2d2|llp-4)',
  r'contract_test.py::test_a_checkpoint_of_longer.*\[(320-r2d2|64-llp)\]',
  r'contract_test.py::test_a_checkpoint_of_longer.*(64-r2d2|-deepbass)\]',
  r'contract_test.py::test_the_stream_feed_.*\[(r2d2|deepbass)\]',
  r'active_loop_test.py::test_(killed|preempted)_.*\[deepbass\]',
  (
    r'contract_test.py::test_a_checkpoint_of.*'
    r'(ensembling|flexmatch|laplacenet|_fixmatch)'
  ),
  r'contract_test.py::test_(many_steps|seeds_vmapped)_.*\[r2d2\]',
  rf'active_loop_test.py::.*{_SAME_ENGINE}',
  r'active_loop_test.py::.*\[r2d2\]',
  r'main_test.py::test_the_papers_networks_train.*elu_svhn',
  r'main_test.py::test_points_are_trained_on.*\[stream\]',
  r'reproduce_test.py::test_killed_at_any.*\[(before|while) it is kept\]',
  r'loop_test.py::test_a_run_resumes_in_any_stage.*stops[12]',
  r'loop_test.py::test_a_preempted_run.*\[deepbass',
  r'catalogue_test.py::.*\[association/2\]',
  rf'presets_test.py::test_every_preset_takes.*\[(?!({_QUICK})\])',
  r'standard_test.py::test_a_row_does_not_depend.*\[(lba_stl10|madnn|te)\]',
  rf'api_test.py::test_every_method_learns_from_features(?!{_ON_FEATURES})',
  r'contributing_test.py::test_a_recipe_trains.*\[my_',
  r'catalogue_test.py::test_a_figure_is_a_picture.*\[association/3\]',
  r'train_test.py::test_it_is_the_program.*\[madnn\]',
  r'export_test.py::test_the_example_program_reads.*\[1\]',
  r'network_test.py::test_an_nnx_network_trains.*\[madnn\]',
  rf'prediction_test.py::test_every_strategy(?!{_RANKED})',
  r'wide_resnet_test.py::test_training_outputs.*\[wide\]',
  r'compute_dtype_test.py::test_layers.*\[(resnet50v2|shakeshake)\]',
)


LONG = ('contract_test', 'main_test', 'resume_test', 'multihost_test')


@pytest.hookimpl(tryfirst=True)  # before they are selected
def pytest_collection_modifyitems(items):
  """Marks what is slow, and begins with the files that take longest."""
  for item in items:
    if any(re.search(pattern, item.nodeid) for pattern in SLOW):
      item.add_marker('slow')
  items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def import_oracle():
  """Import a library to compare results with, or skip the test without it.

  If SSLJAX_ORACLES is set, a missing library is a failure.
  """
  required = os.environ.get('SSLJAX_ORACLES')
  return importlib.import_module if required else pytest.importorskip


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
