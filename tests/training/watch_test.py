"""Times of a run by part, traces of steps, and steps that fail."""

import time

from contract_test import OPTIONS
import jax
import numpy as np
import optax
import pytest
import tiny

from ssljax import config
from ssljax.data import feeds
from ssljax.errors import InputError
from ssljax.runs import summary
from ssljax.training import (
  checkpoint,
  loop,
  metrics_writer,
  profile,
  replay,
)
from ssljax.training.job import PARTS

SLOW = 0.1  # seconds between two batches


def slow(images, place):
  """A feed that is slower than the step."""
  feed = feeds.resident(images, place)

  def batches(*args):
    for each in feed.batches(*args):
      time.sleep(SLOW)
      yield each

  return feed._replace(batches=batches)


def test_the_wait_for_a_slow_feed_is_counted_apart_from_the_steps():
  job = tiny.make_job('supervised', 6, shared=False, make_feed=slow)
  options = OPTIONS._replace(evaluate_every=100)
  nothing = metrics_writer.NoMetrics()
  state, progress = loop.fit(job, options, nothing, NoCheckpoints())
  jax.block_until_ready(state)
  parts = progress.by_part()
  assert parts.keys() == {'steps', 'compilation', *PARTS}
  # Six batches; the devices are busy for a part of each wait but the first.
  assert 0.5 * 6 * SLOW < parts['input'] < parts['input'] + parts['steps']
  assert parts['compilation'] > 0 and parts['evaluation'] > 0
  inside = parts['steps'] + parts['compilation'] + parts['input']
  assert inside == pytest.approx(progress.seconds)


class NoCheckpoints:
  """Checkpoints of a run without a folder."""

  folder = None
  save = restore = wait = close = lambda self, *args, **kwargs: None


def test_starving_devices_are_reported_once_a_window_is_full(
  monkeypatch, caplog
):
  monkeypatch.setattr(loop, '_WINDOW', 2 * SLOW)
  job = tiny.make_job('supervised', 6, shared=False, make_feed=slow)
  nothing = metrics_writer.NoMetrics()
  loop.fit(job, OPTIONS, nothing, NoCheckpoints())
  said = [r.getMessage() for r in caplog.records if 'waited' in r.message]
  said = [text for text in said if 'feed=resident' in text]
  assert len(said) == 1 and 'more than 20%' in said[0]


def test_the_table_shows_the_parts_and_warns_of_input_wait():
  shares = {'steps': 0.4, 'input': 0.2, 'checkpoint': 0.001, 'other': 0.399}
  result = {'goodput_parts': shares, 'arms': {'a': {'device_bytes': 2**21}}}
  first, warning = summary.times(result)
  assert first == (
    'time: compiled steps 40%, input wait 20%, other 40%; device memory at '
    'most 2 MiB'
  )
  assert '33%' in warning and 'image_size' in warning  # 0.2 of 0.6
  assert summary.times({'arms': {}}) == []  # of earlier versions


def test_a_trace_is_written_of_the_steps_that_were_asked_for(tmp_path):
  said = []
  watch = profile.Profile(tmp_path / 'profile', (2, 3), said.append)
  job = tiny.make_job('supervised', 6)
  options = OPTIONS._replace(watch=watch)
  loop.fit(job, options, metrics_writer.NoMetrics(), NoCheckpoints())
  assert watch.traced == (2, 4)
  (trace,) = (tmp_path / 'profile').rglob('perfetto_trace.json.gz')
  assert trace.stat().st_size > 1000
  assert len(said) == 1 and f'--logdir={tmp_path}/profile' in said[0]


def test_steps_after_the_end_of_a_job_give_a_line_and_no_trace(tmp_path):
  said = []
  watch = profile.Profile(tmp_path / 'profile', (20, 3), said.append)
  options = OPTIONS._replace(watch=watch)
  job = tiny.make_job('supervised', 6)
  loop.fit(job, options, metrics_writer.NoMetrics(), NoCheckpoints())
  assert 'no trace: the steps 20 to 22' in said[0]
  assert not (tmp_path / 'profile').exists()


@pytest.mark.parametrize('text', ['3', '0:2', '2:0', '-1:2', 'a:b', '1:2:3'])
def test_a_trace_of_other_texts_is_refused(text):
  with pytest.raises(InputError, match='STEP:COUNT'):
    config.from_values('madnn', {'steps': 9, 'profile': text})


def failing(after):
  """An optimiser whose update number `after` divides by zero."""

  def update(grads, count, params=None):
    zero = jax.numpy.where(count == after - 1, 0.0, 1.0)
    return jax.tree.map(lambda g: -0.1 * g / zero, grads), count + 1

  return optax.GradientTransformation(
    lambda params: jax.numpy.zeros([], int), update
  )


def test_a_step_that_fails_is_recorded_and_repeated(tmp_path):
  job = tiny.make_job(
    'supervised', 6, seeds=(3, 4), tx=failing(4), shared=False
  )
  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  options = OPTIONS._replace(evaluate_every=100)
  nothing = metrics_writer.NoMetrics()
  with pytest.raises(loop.DivergedError) as raised:
    loop.fit(job, options, nothing, checkpoints)
  record = raised.value.record
  # The fourth update is infinite, the fifth loss is not finite.
  assert record['step'] == 5 and record['seeds'] == [3, 4]
  assert record['failed_seeds'] == [3] and record['method'] == 'supervised'
  sampler = tiny.samplers(job)[0]
  np.testing.assert_array_equal(record['rows'], [sampler.rows(4)])
  key = jax.random.fold_in(jax.random.key(3), 4)
  assert np.shape(record['keys']) == (1, *jax.random.key_data(key).shape)
  # The fourth step is the first whose state is not finite: the division.
  found = replay.replay(job, options, checkpoints, record['step'])
  assert found.startswith('step 4 failed again')
  assert ' is of div' in found and 'watch_test.py' in found
  checkpoints.close()


def test_the_first_infinite_result_of_finite_numbers_is_named():
  def f(x):
    x = jax.nn.log_softmax(x)  # its maximum begins with -inf
    large = jax.jit(lambda x: jax.numpy.exp(1000 * x))(1 - x)
    return large - jax.numpy.log(0 * x)

  x = jax.numpy.arange(3.0)
  traced = jax.make_jaxpr(f)(x)
  with pytest.raises(replay._InfiniteError, match=r'exp, .*watch_test\.py'):
    replay._evaluate(traced.jaxpr, traced.consts, [x])
  traced = jax.make_jaxpr(jax.nn.log_softmax)(x)
  (found,) = replay._evaluate(traced.jaxpr, traced.consts, [x])
  np.testing.assert_allclose(found, jax.nn.log_softmax(x), rtol=1e-6)


def test_a_step_that_does_not_fail_again_is_said(tmp_path):
  job = tiny.make_job('supervised', 6)
  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  found = replay.replay(job, OPTIONS, checkpoints, 3)
  assert found.startswith('step 3 did not fail again')
  assert not (tmp_path / 'checkpoints').exists()  # nothing is written
  checkpoints.close()
