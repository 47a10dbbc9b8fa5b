"""Several processes, each with devices of its own, against a single one.

Hosts are processes of this machine, which meet over its loopback (gloo). What
is summed over devices is summed in another order: of float32 a relative
difference of 1e-6 a step is rounding, and six steps of SGD with momentum on a
network of batch norm carry it on; 1e-4 is far above that, and a row or a mask
that differs changes a loss in its first or second digit.
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
import jax
import numpy as np
import orbax.checkpoint as ocp
import people
import pod
import pytest
import tiny

from ssljax import errors
from ssljax.distributed import multihost, placement

HERE = pathlib.Path(__file__).parent
NAMES = (*tiny.METHODS, 'asking', 'stream')
# A memory split over devices, what is chosen, and what each one decodes.
SHORT = ('asking', 'stream')


def free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


@contextlib.contextmanager
def processes(count, devices, script, *args):
  """Starts a script so many times; none survives."""
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
      process.communicate()


def ended(started, seconds=300):
  """(exit status, output) of every process."""
  outputs = [process.communicate(timeout=seconds)[0] for process in started]
  return list(zip([p.returncode for p in started], outputs, strict=True))


def train_pod(folder, names, count, devices, *stop):
  """Trains tiny jobs over so many processes of so many devices."""
  args = str(folder), ','.join(names), '{port}', '{count}', '{k}'
  args += tuple(map(str, stop))
  with processes(count, devices, HERE / 'pod.py', *args) as started:
    for status, output in ended(started):
      assert status == 0, output


def numbers(folder):
  """Rows of every step, weights and memory, and metrics but for times."""
  rows, state = np.load(folder / 'rows.npz'), np.load(folder / 'state.npz')
  return [rows[k] for k in rows], [state[k] for k in state], lines(folder)


def check_same(one, other, all_rows=True):
  """The same rows in the same order, and numbers up to rounding."""
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
  """A folder with every method that was asked for, trained on one device."""
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
def test_what_is_learned_does_not_depend_on_the_processes(
  alone, tmp_path, count, devices, names
):
  train_pod(tmp_path, names, count, devices)
  for name in names:
    check_same(alone(names) / name, tmp_path / name)


@pytest.mark.slow
def test_a_run_goes_on_over_any_other_processes(alone, tmp_path):
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
  """Two processes of two devices that train MA-DNN in a folder."""
  args = *RUN, f'--workdir={folder}', *more, *HOSTS
  return processes(2, 2, binary.EXPERIMENTS / 'madnn.py', *args)


def wait_for_checkpoint(folder, started):
  while not list((folder / CHECKPOINTS).glob('[0-9]*')):
    assert all(process.poll() is None for process in started), ended(started)
    time.sleep(0.05)


def finish(folder):
  """Lets a run come to its end; its last checkpoint's arrays."""
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
  """The arrays that a run ends with which nothing interrupts."""
  return finish(tmp_path_factory.mktemp('whole') / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
def test_if_one_is_killed_the_others_end_and_the_run_goes_on(
  whole, tmp_path, who
):
  folder = tmp_path / 'run'
  with start(folder) as started:
    wait_for_checkpoint(folder, started)
    started[who].kill()
    # Within a minute, with an error that says what to do.
    output, _ = started[1 - who].communicate(timeout=60)
    assert started[1 - who].returncode != 0, output
  # Whom JAX itself ends says it in JAX's words.
  said = 'the same command on all of them goes on', 'Terminating process'
  assert any(words in output for words in (*said, 'heartbeat')), output
  assert not json.loads((folder / 'result.json').read_text())['complete']
  for a, b in zip(finish(folder), whole, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_if_one_is_asked_to_go_all_of_them_save_and_go(whole, tmp_path):
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
    ('--batch_labelled=7', 'not divided by the 4 devices of all processes'),
    # Another one for each process.
    ('--seed={k}', '--multihost: what decides the result is not the same'),
  ],
)
def test_bad_input_is_one_line_and_ends_all_of_them(argument, reason, tmp_path):
  with start(tmp_path / 'run', argument) as started:
    ends = ended(started)
  assert [status for status, _ in ends] == [2, 2], ends
  for _, said in ends:
    line = next(x for x in said.splitlines() if x.startswith('madnn: '))
    assert reason in line
  assert not (tmp_path / 'run').exists()


def test_processes_exchange_one_thing_after_the_other(monkeypatch, tmp_path):
  monkeypatch.setenv('XLA_FLAGS', '')
  seen = []
  monkeypatch.setattr(multihost, 'are_around', lambda: False)

  def join(**_):
    seen.append(os.environ['XLA_FLAGS'])
    raise errors.InputError('no one is there')

  monkeypatch.setattr(multihost, 'join', join)
  flag = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
  assert binary.run('--multihost', f'--workdir={tmp_path}/run') == 2
  assert flag in seen[0].split()
  # A single process of one device has nothing to exchange.
  monkeypatch.setenv('XLA_FLAGS', '')
  placement.order_exchanges()
  assert flag not in os.environ['XLA_FLAGS']


@pytest.mark.slow
def test_a_person_is_asked_once_for_all_of_them(tmp_path):
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
  # The truth, of a single process, has the same to say.
  assert binary.run(*command('alone', 'truth'), binary='deepbass') == 0
  one, other = (
    json.loads((tmp_path / name / 'result.json').read_text())['asked']
    for name in ('run', 'alone')
  )
  assert one == other and len(one[0]['rows']) == 6


@pytest.mark.parametrize(
  ('workers', 'several'), [('10.0.0.2,10.0.0.3', True), ('10.0.0.2', False)]
)
def test_a_slice_of_several_hosts_is_found_out(workers, several, monkeypatch):
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

  assert not multihost.are_around()  # there is no libtpu here
  with http.server.HTTPServer(('127.0.0.1', 0), Metadata) as server:
    monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{server.server_port}')
    monkeypatch.setitem(sys.modules, 'libtpu', types.ModuleType('libtpu'))
    sys.modules['libtpu'].__spec__ = importlib.machinery.ModuleSpec(
      'libtpu', None
    )
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert multihost.are_around() == several
    thread.join()
  # Nobody answers: it is no slice.
  monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{free_port()}')
  assert not multihost.are_around()


def test_several_processes_need_a_folder(capsys):
  assert binary.run('--multihost', binary='madnn') == 2
  assert '--workdir: several processes need one folder' in (
    capsys.readouterr().err
  )


def test_what_stands_still_ends_with_the_stacks_of_all_threads(tmp_path):
  script = tmp_path / 'stuck.py'
  script.write_text(
    'import time\n'
    'from ssljax.distributed import watchdog\n'
    'def hang():\n'
    '  time.sleep(60)\n'
    'with watchdog.awake(0.5):\n'
    '  for _ in range(4):\n'
    '    time.sleep(0.3)\n'
    '    watchdog.alive()\n'
    '  print("so far", flush=True)\n'
    '  hang()\n'
  )
  with processes(1, 1, script) as started:
    ((status, said),) = ended(started, seconds=30)
  assert status == 1
  assert said.startswith('so far\nTimeout') and 'in hang' in said
