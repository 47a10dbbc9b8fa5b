"""Training with several processes, compared with a single process.

Hosts are processes on this machine, connected by its loopback device (gloo).
Sums over devices are computed in another order. In float32 this is a relative
rounding error of 1e-6 per step, which six steps of SGD with momentum and batch
norm increase. The tolerance of 1e-4 is far above that, while a different row or
mask changes a loss in its first or second digit.
"""

import contextlib
import http.server
import importlib.machinery
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import binary
from contract_test import lines
import fake_tfds
import jax
import numpy as np
import orbax.checkpoint as ocp
import people
import pod
import pytest
import tiny

from ssljax import errors
from ssljax.data import datasets
from ssljax.distributed import multihost, placement
from ssljax.runs import run_lock

HERE = pathlib.Path(__file__).parent
NAMES = (*tiny.METHODS, 'asking', 'stream')
# They cover a sharded memory, chosen rows, and images decoded per process.
SHORT = ('asking', 'stream')


def free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


@contextlib.contextmanager
def processes(count, devices, script, *args):
  """Start a script `count` times; kill the processes at the end."""
  path = os.pathsep.join(sys.path)
  environment = binary.environment(devices, PYTHONPATH=path)
  port = free_port()
  started = [
    subprocess.Popen(
      [
        sys.executable,
        str(script),
        *(a.format(port=port, count=count, k=k) for a in args),
      ],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for k in range(count)
  ]
  try:
    yield started
  finally:
    for process in started:
      process.kill()
      process.communicate(timeout=60)


def ended(started, seconds=300):
  """Wait for all processes; return (exit status, output) of each."""
  outputs = [process.communicate(timeout=seconds)[0] for process in started]
  return list(zip([p.returncode for p in started], outputs, strict=True))


def train_pod(folder, names, count, devices, *stop):
  """Train tiny jobs over `count` processes of `devices` devices each."""
  args = str(folder), ','.join(names), '{port}', '{count}', '{k}'
  args += tuple(map(str, stop))
  with processes(count, devices, HERE.parent / 'pod.py', *args) as started:
    for status, output in ended(started):
      assert status == 0, output


def numbers(folder):
  """Rows of every step, weights and memory, and metrics without times."""
  rows, state = np.load(folder / 'rows.npz'), np.load(folder / 'state.npz')
  return [rows[k] for k in rows], [state[k] for k in state], lines(folder)


def check_same(one, other, all_rows=True):
  """Assert that rows are equal and numbers are equal up to rounding."""
  (rows, state, metrics), (rows2, state2, metrics2) = map(numbers, (one, other))
  assert rows and rows2
  if all_rows:
    assert len(rows) == len(rows2)
  for a, b in zip(rows[::-1], rows2[::-1], strict=False):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(state, state2, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert len(metrics) == len(metrics2)
  for a, b in zip(metrics, metrics2, strict=True):
    assert a == {
      k: pytest.approx(v, rel=1e-4, abs=1e-5) if isinstance(v, float) else v
      for k, v in b.items()
    }


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """A function that trains methods on one device and returns the folder."""
  folder = tmp_path_factory.mktemp('alone')

  def trained(names):
    for name in names:
      if not (folder / name / 'state.npz').exists():
        pod.run(folder, name, 1)
    return folder

  return trained


@pytest.mark.parametrize(
  ('count', 'devices', 'names'),
  [
    (2, 2, SHORT),
    pytest.param(1, 8, NAMES, marks=pytest.mark.slow),
    pytest.param(2, 2, NAMES, marks=pytest.mark.slow),
    pytest.param(4, 2, NAMES, marks=pytest.mark.slow),
  ],
)
def test_training_does_not_depend_on_the_number_of_processes(
  alone, tmp_path, count, devices, names
):
  train_pod(tmp_path, names, count, devices)
  for name in names:
    check_same(alone(names) / name, tmp_path / name)


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_processes(alone, tmp_path):
  train_pod(tmp_path, NAMES, 4, 2, 2)
  assert not list(tmp_path.glob('*/state.npz'))
  train_pod(tmp_path, NAMES, 1, 1, 2)
  assert not list(tmp_path.glob('*/state.npz'))
  train_pod(tmp_path, NAMES, 2, 4)
  for name in NAMES:
    check_same(alone(NAMES) / name, tmp_path / name, all_rows=False)


# The binaries.

RUN = (
  *('--dataset=digits', '--network=digits', '--labels=10', '--nobaseline'),
  *('--batch_labelled=8', '--batch_unlabelled=8', '--learning_rate=0.1'),
  *('--checkpoint_seconds=1', '--record_every=5', '--steps=120'),
)
HOSTS = (
  *('--multihost', '--coordinator=127.0.0.1:{port}'),
  *('--processes={count}', '--process={k}'),
)
CHECKPOINTS = 'checkpoints/madnn/seed-0'


def start(folder, *more):
  """Start two processes of two devices that train MA-DNN in a folder."""
  args = *RUN, f'--workdir={folder}', *more, *HOSTS
  return processes(2, 2, binary.EXPERIMENTS / 'madnn.py', *args)


def wait_for_checkpoint(folder, started):
  deadline = time.monotonic() + 120
  while not list((folder / CHECKPOINTS).glob('[0-9]*')):
    assert all(process.poll() is None for process in started), ended(started)
    assert time.monotonic() < deadline, 'no checkpoint within two minutes'
    time.sleep(0.05)


def finish(folder):
  """Finish a run and return the arrays of its last checkpoint."""
  with start(folder) as started:
    for status, output in ended(started):
      assert status == 0, output
  newest = folder / CHECKPOINTS / '120/state'
  reader = ocp.PyTreeCheckpointer()
  saved = reader.metadata(newest).item_metadata.tree
  as_numpy = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
  whole = reader.restore(newest, restore_args=jax.tree.map(as_numpy, saved))
  return jax.tree.leaves(whole)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The final arrays of an uninterrupted run."""
  return finish(tmp_path_factory.mktemp('whole') / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
def test_if_a_process_is_killed_the_others_exit_and_the_run_resumes(
  whole, tmp_path, who
):
  folder = tmp_path / 'run'
  with start(folder) as started:
    wait_for_checkpoint(folder, started)
    started[who].kill()
    # Within a minute, with an error that names the remedy.
    output, _ = started[1 - who].communicate(timeout=60)
    assert started[1 - who].returncode != 0, output
  # If JAX aborts the process first, the message is JAX's.
  messages = 'run the same command on all hosts', 'Terminating process'
  assert any(words in output for words in (*messages, 'heartbeat')), output
  assert not json.loads((folder / 'result.json').read_text())['complete']
  for a, b in zip(finish(folder), whole, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_after_sigterm_to_one_process_all_save_and_exit(whole, tmp_path):
  folder = tmp_path / 'run'
  with start(folder) as started:
    wait_for_checkpoint(folder, started)
    started[1].send_signal(signal.SIGTERM)
    ends = ended(started)
  assert [status for status, _ in ends] == [0, 0], ends
  steps = {re.search(r'saved step (\d+)', said)[1] for _, said in ends}
  assert len(steps) == 1 and (folder / CHECKPOINTS / steps.pop()).is_dir()
  assert not json.loads((folder / 'result.json').read_text())['complete']
  for a, b in zip(finish(folder), whole, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('argument', 'reason'),
  [
    ('--batch_labelled=7', 'not divisible by the 4 devices of all processes'),
    # A different seed for each process.
    ('--seed={k}', '--multihost: the processes differ in what decides'),
  ],
)
def test_bad_input_is_one_line_and_stops_all_processes(
  argument, reason, tmp_path
):
  with start(tmp_path / 'run', argument) as started:
    ends = ended(started)
  assert [status for status, _ in ends] == [2, 2], ends
  for _, said in ends:
    line = next(x for x in said.splitlines() if x.startswith('madnn: '))
    assert reason in line
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_folder_in_use_is_refused_by_all_processes(tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  lock = run_lock.RunLock(folder)
  held = lock.path.read_text()
  with start(folder) as started:
    ends = ended(started)
  assert lock.path.read_text() == held
  lock.release()
  assert [status for status, _ in ends] == [2, 2], ends
  for _, said in ends:
    line = next(x for x in said.splitlines() if x.startswith('madnn: '))
    assert f'another process, {os.getpid()} on' in line
  assert not list(folder.iterdir())


def test_cpu_collectives_of_several_processes_are_serialized(
  monkeypatch, tmp_path
):
  monkeypatch.setenv('XLA_FLAGS', '')
  seen = []
  monkeypatch.setattr(multihost, 'in_cluster', lambda: False)

  def join(**_):
    seen.append(os.environ['XLA_FLAGS'])
    raise errors.InputError('no one is there')

  monkeypatch.setattr(multihost, 'join', join)
  flag = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
  assert binary.run('--multihost', f'--workdir={tmp_path}/run') == 2
  assert flag in seen[0].split()
  # A single process of one device has no collectives.
  monkeypatch.setenv('XLA_FLAGS', '')
  placement.serialize_cpu_collectives()
  assert flag not in os.environ['XLA_FLAGS']


@pytest.mark.slow
def test_a_person_is_asked_once_for_all_processes(tmp_path):
  def command(name, who):
    more = f'--oracle={who}', '--batch_labelled=4', '--batch_unlabelled=8'
    return people.command(tmp_path / name, *more)

  deepbass = binary.EXPERIMENTS / 'deepbass.py', *command('run', 'people')
  statuses = []
  for number in range(3):
    with processes(2, 2, *deepbass, *HOSTS) as started:
      ends = ended(started)
    statuses += [status for status, _ in ends]
    asked = people.answers(tmp_path / 'run', number)
    if asked.exists():
      assert all(f'deepbass: {asked}: ' in said for _, said in ends), ends
      people.fill_in(asked)
  assert statuses == [3, 3, 3, 3, 0, 0]
  # A single process with the true labels as oracle has the same result.
  assert binary.run(*command('alone', 'truth'), binary='deepbass') == 0
  one, other = (
    json.loads((tmp_path / name / 'result.json').read_text())['asked']
    for name in ('run', 'alone')
  )
  assert one == other and len(one[0]['rows']) == 6


@pytest.mark.parametrize(
  ('workers', 'several'), [('10.0.0.2,10.0.0.3', True), ('10.0.0.2', False)]
)
def test_a_tpu_slice_of_several_hosts_is_detected(
  workers, several, monkeypatch
):
  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      known = self.path.endswith(
        '/instance/attributes/worker-network-endpoints'
      )
      meant = known and self.headers['Metadata-Flavor'] == 'Google'
      self.send_response(200 if meant else 404)
      self.end_headers()
      self.wfile.write(workers.encode())

    def log_message(self, *args):
      pass

  assert not multihost.in_cluster()  # there is no libtpu here
  with http.server.HTTPServer(('127.0.0.1', 0), Metadata) as server:
    monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{server.server_port}')
    monkeypatch.setitem(sys.modules, 'libtpu', types.ModuleType('libtpu'))
    sys.modules['libtpu'].__spec__ = importlib.machinery.ModuleSpec(
      'libtpu', None
    )
    # A request that does not come ends after this many seconds.
    server.timeout = 30
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    assert multihost.in_cluster() == several
    thread.join(timeout=60)
    assert not thread.is_alive()
  # Without an answer of the metadata server it is not a slice.
  monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{free_port()}')
  assert not multihost.in_cluster()


def test_several_processes_need_a_folder(capsys):
  assert binary.run('--multihost', binary='madnn') == 2
  assert '--workdir: several processes need one folder' in (
    capsys.readouterr().err
  )


def test_a_hanging_process_exits_with_the_stacks_of_all_threads(tmp_path):
  script = tmp_path / 'stuck.py'
  script.write_text(
    'import time\n'
    'from ssljax.distributed import watchdog\n'
    'def hang():\n'
    '  time.sleep(60)\n'
    'with watchdog.exit_if_idle(0.5):\n'
    '  for _ in range(4):\n'
    '    time.sleep(0.3)\n'
    '    watchdog.reset()\n'
    '  print("so far", flush=True)\n'
    '  hang()\n'
  )
  with processes(1, 1, script) as started:
    ((status, said),) = ended(started, seconds=30)
  assert status == 1
  assert said.startswith('so far\nTimeout') and 'in hang' in said


def test_each_process_reads_its_share_of_the_labels(tmp_path):
  rng = np.random.default_rng(0)
  images = list(rng.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8))
  data, labels = tmp_path / 'data', [0, 1, 2, 0, -1]
  splits = {'train': 5, 'test': [0, 1]}
  fake_tfds.write(data, 'pictures', images, labels, 3, splits=splits, shards=2)
  args = str(data), str(tmp_path), '{port}', '{count}', '{k}'
  with processes(2, 1, HERE.parent / 'label_share.py', *args) as started:
    for status, output in ended(started):
      assert status == 0, output
  found = [json.loads((tmp_path / f'{k}.json').read_text()) for k in range(2)]
  # The rows of 'train' and one of the two rows of 'test' each.
  assert [each['rows'] for each in found] == [[0, 1, 0], [2, 3, 4, 1]]
  alone = datasets.load('pictures', str(data))
  for each in found:
    assert each['labels'] == labels
    assert each['digests'] == alone.train.digests().tolist()
