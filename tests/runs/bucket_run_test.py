"""Runs in a bucket: killed, resumed, reported; and what a bucket may refuse."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import binary
from contract_test import OPTIONS, comparable, fit, lines
import fake_tfds
import jax
import numpy as np
import pytest

import ssljax
from ssljax.data import datasets
from ssljax.errors import InputError
from ssljax.runs import auto
from ssljax.training import checkpoint

ALWAYS = OPTIONS._replace(checkpoint_seconds=0.0)
FLAGS = (
  *('--seeds=1', '--steps=24', '--batch_labelled=8', '--batch_unlabelled=24'),
  *('--record_every=6', '--evaluate_every=12', '--checkpoint_seconds=0'),
)
# The networks of the run are tiny in this process, and in the killed one.
RUN = 'import sys, binary; sys.exit(binary.run(*sys.argv[1:]))'
COMMITTED = re.compile(r'checkpoints/madnn/seed-0/(\d+)/commit_success\.txt')


def start(folder):
  """Start the run as a process."""
  return subprocess.Popen(
    [sys.executable, '-c', RUN, *FLAGS, f'--workdir={folder}'],
    env=binary.environment(PYTHONPATH=os.path.dirname(binary.__file__)),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def committed(bucket):
  """The steps whose checkpoints are whole."""
  found = map(COMMITTED.search, bucket.names(bucket.folder.name))
  return sorted(int(each[1]) for each in found if each)


def result_of(folder):
  return json.loads((folder / 'result.json').read_text())


def whole(folder):
  """What the same run measures and reports in a local folder."""
  assert binary.run(*FLAGS, f'--workdir={folder}') == 0
  return lines(folder), result_of(folder)['test_error']


def test_killed_resumed_and_reported(bucket, tmp_path, capsys):
  folder = bucket.folder
  process = start(folder)
  deadline = time.monotonic() + 200
  while not committed(bucket):
    assert process.poll() is None, process.stdout.read()
    assert time.monotonic() < deadline, 'no checkpoint'
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  process.stdout.close()
  assert (folder / 'run.lock').is_file()
  assert (
    not (folder / 'result.json').exists() or not (result_of(folder)['complete'])
  )
  at = committed(bucket)[-1]
  assert at < 24

  (folder / 'checkpoints/madnn/seed-0/23/state/begun').write_bytes(b'1')
  assert binary.run(*FLAGS, f'--workdir={folder}') == 0
  assert not (folder / 'run.lock').exists()
  assert not (folder / 'checkpoints/madnn/seed-0/23').exists()
  assert (lines(folder), result_of(folder)['test_error']) == whole(
    tmp_path / 'whole'
  )
  assert len(list((folder / 'metrics.jsonl').iterdir())) > 1
  events = [n for n in bucket.names(folder.name) if 'tfevents' in n]
  assert len(events) > 1  # those of the killed process are kept

  # Complete: nothing is trained.
  count = len(bucket.requests)
  capsys.readouterr()
  assert binary.run(*FLAGS, f'--workdir={folder}') == 0
  assert f'{folder} holds this run, complete' in capsys.readouterr().out
  assert not any(
    'POST' in r for r in bucket.requests[count:] if 'lock' not in r
  )

  with binary.small():
    model = ssljax.load(str(folder))
  error = result_of(folder)['test_error']['averaged'][0]
  assert 100 * model.result['test_error']['averaged'][0] == 100 * error
  assert model.predict(np.zeros((2, 8, 8, 1), np.uint8)).shape == (2,)
  assert binary.run(folder, tmp_path / 'whole', binary='compare') == 0
  assert '+0.00' in capsys.readouterr().out

  # Another run is refused, and overwriting removes everything of this one.
  line = binary.refused(capsys, *FLAGS, '--seed=5', f'--workdir={folder}')
  assert 'holds a run of other settings' in line
  more = f'--workdir={folder}', '--seed=5', '--overwrite', '--steps=4'
  assert binary.run(*FLAGS, *more) == 0
  assert committed(bucket) == []  # those of seed 0 are gone
  assert (folder / 'checkpoints/madnn/seed-5/4/commit_success.txt').is_file()
  assert {line['seed'] for line in lines(folder)} == {5}


@pytest.mark.slow
def test_a_report_is_written_beside_the_run(bucket):
  assert binary.run(*FLAGS, f'--workdir={bucket.folder}') == 0
  assert binary.run(f'--run={bucket.folder}', binary='html_report') == 0
  text = (bucket.folder / 'report.html').read_text()
  error = result_of(bucket.folder)['test_error']['last'][0]
  assert f'{error:.2f}' in text and str(bucket.folder) in text
  drawn = f'--run={bucket.folder}', '--figure=madnn/5'
  assert binary.run(*drawn, binary='figures') == 0
  png, pdf, table = (
    (bucket.folder / 'figures' / f'madnn-5.seed-0.{kind}').read_bytes()
    for kind in ('png', 'pdf', 'values.csv')
  )
  assert png.startswith(b'\x89PNG') and pdf.startswith(b'%PDF')
  assert table.startswith(b'step,class,0,1,')


def test_the_chosen_run_of_a_comparison_becomes_that_of_the_folder(bucket):
  folder, source = bucket.folder, bucket.folder / 'candidates' / 'madnn'
  content = {
    'config.json': b'{}',
    'metrics.jsonl/000000-000000000000': b'{"step": 1}\n',
    'checkpoints/madnn/seed-0/4/state/d': bytes(9),
  }
  for name, data in content.items():
    (source / name).write_bytes(data)
  record = {'chosen': 'madnn', 'compared': []}
  for _ in range(2):  # an interrupted call is completed by another one
    auto.keep(folder, record)
    assert {n: (folder / n).read_bytes() for n in content} == content
    assert not source.exists() and auto.decided(folder) == record


@pytest.mark.slow
def test_a_damaged_checkpoint_leads_to_the_older_one(bucket, caplog):
  first, _ = fit(bucket.folder, 'madnn', ALWAYS)
  last, where = comparable(first), bucket.folder / 'checkpoints'
  steps = sorted(int(p.name) for p in where.iterdir())
  newest = where / str(steps[-1])
  for path in (newest / 'state' / 'd').iterdir():
    path.write_bytes(path.read_bytes()[:100])
  again, _ = fit(bucket.folder, 'madnn', ALWAYS)
  assert f'step {steps[-1]} cannot be read' in caplog.text
  assert (where / f'damaged-{steps[-1]}' / 'state').is_dir()
  jax.tree.map(np.testing.assert_array_equal, comparable(again), last)


def test_a_bucket_that_cannot_be_read_is_no_damage(bucket):
  fit(bucket.folder, 'madnn', ALWAYS)
  where = bucket.folder / 'checkpoints'
  names = bucket.names(bucket.folder.name)
  checkpoints = checkpoint.Checkpoints(where)
  bucket.fault = lambda method, path: 403
  with pytest.raises(OSError, match='no permission'):
    checkpoints.restore(lambda progress: None)
  bucket.fault = lambda method, path: None
  checkpoints.close()
  assert bucket.names(bucket.folder.name) == names


def expires_after_a_checkpoint(bucket, answer):
  """A fault that begins when a checkpoint of step 6 or more is whole."""

  def fault(method, path):
    late = [step for step in committed(bucket) if step >= 6]
    return answer() if late else None

  return fault


@pytest.mark.slow
def test_a_token_that_expires_stops_the_run_at_a_checkpoint(
  bucket, tmp_path, capsys
):
  bucket.fault = expires_after_a_checkpoint(bucket, lambda: 401)
  line = binary.refused(capsys, *FLAGS, f'--workdir={bucket.folder}')
  bucket.fault = lambda method, path: None
  named = re.findall(r'step (\d+)', line.split('): ')[-1])
  assert str(committed(bucket)[-1]) in named, line
  assert 'run the same command again' in line
  assert 'credentials' in line or 'Credentials' in line
  assert binary.run(*FLAGS, f'--workdir={bucket.folder}') == 0
  found = lines(bucket.folder), result_of(bucket.folder)['test_error']
  assert found == whole(tmp_path / 'whole')


@pytest.mark.slow
def test_a_token_that_is_renewed_in_time_stops_nothing(bucket, tmp_path):
  began = []

  def answer():
    began.append(time.monotonic())
    return 401 if began[-1] - began[0] < 1 else None

  bucket.fault = expires_after_a_checkpoint(bucket, answer)
  assert binary.run(*FLAGS, f'--workdir={bucket.folder}') == 0
  assert len(began) > 1
  found = lines(bucket.folder), result_of(bucket.folder)['test_error']
  assert found == whole(tmp_path / 'whole')


@pytest.mark.parametrize(
  'more, said',
  [
    (('--workdir=gs://nobucket/x',), 'the bucket nobucket does not exist'),
    (('--workdir=s3://bucket/x',), 'is no path on a disk'),
    (
      (
        *('--workdir=gs://bucket/people', '--acquire=entropy'),
        *('--query_every=10', '--query_size=2', '--oracle=people'),
        '--nobaseline',
      ),
      'people open the questions',
    ),
  ],
)
def test_what_a_bucket_cannot_be_is_refused(bucket, capsys, more, said):
  line = binary.refused(capsys, *FLAGS, *more)
  assert said in line
  assert not bucket.names('people') and not bucket.names('x')


def test_a_bucket_without_permission_is_refused(bucket, capsys):
  bucket.fault = lambda method, path: 403
  line = binary.refused(capsys, *FLAGS, f'--workdir={bucket.folder}')
  assert 'no permission' in line and 'roles of docs/pods.md' in line


def test_a_data_set_is_read_from_a_bucket(bucket, tmp_path):
  images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), np.uint8)
  where = fake_tfds.write(tmp_path, 'spots', images, np.arange(40) % 2)
  there = bucket.folder / 'data'
  for path in where.iterdir():
    name = path.relative_to(tmp_path)
    (there / name).write_bytes(path.read_bytes())
  data = datasets.load('spots', str(there))
  np.testing.assert_array_equal(data.train.labels, np.arange(40) % 2)
  rows = np.array([3, 0, 39])
  np.testing.assert_array_equal(data.train.read(rows), images[rows])
  assert any('array_record' in request for request in bucket.requests)


def test_another_process_is_refused(bucket, capsys):
  (bucket.folder / 'run.lock').write_text(
    json.dumps({'pid': 4711, 'host': 'far', 'started': 'noon', 'token': 'x'})
  )
  line = binary.refused(capsys, *FLAGS, f'--workdir={bucket.folder}')
  assert '4711 on far, is running in it since noon' in line
  with pytest.raises(InputError, match='4711'):
    ssljax.fit(
      np.zeros((20, 8, 8, 1), np.uint8),
      np.arange(20) % 2,
      workdir=str(bucket.folder),
      steps=2,
    )
