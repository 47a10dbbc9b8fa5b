"""The preemption notice of a single process."""

import os
import signal
import threading

import pytest

from ssljax.distributed import preemption


@pytest.fixture
def terminated():
  """A list that grows at each SIGTERM that the notice does not handle."""
  calls = []
  previous = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
  yield calls
  signal.signal(signal.SIGTERM, previous)


def test_the_first_sigterm_is_noted_and_the_second_has_its_previous_effect(
  terminated,
):
  with preemption.Notice().listen() as preempted:
    assert not preempted()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preempted() and not terminated
    os.kill(os.getpid(), signal.SIGTERM)
    assert preempted() and len(terminated) == 1


@pytest.fixture
def interruptible():
  """SIGINT raises KeyboardInterrupt, whatever the tests inherit."""
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, previous)


def test_an_ignored_ctrl_c_stays_ignored(interruptible):
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with preemption.Notice().listen() as preempted:
    os.kill(os.getpid(), signal.SIGINT)
    assert not preempted()


def test_ctrl_c_is_noted_by_its_name_and_a_second_one_interrupts(interruptible):
  with preemption.Notice().listen() as preempted:
    assert not preempted()
    os.kill(os.getpid(), signal.SIGINT)
    assert preempted() and preempted.signal == 'SIGINT'
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_after_listening_sigterm_has_its_previous_effect(terminated):
  with preemption.Notice().listen() as preempted:
    pass
  os.kill(os.getpid(), signal.SIGTERM)
  assert not preempted() and len(terminated) == 1


def test_outside_the_main_thread_sigterm_keeps_its_effect(terminated):
  def listen():
    with preemption.Notice().listen() as preempted:
      results.append(preempted())

  results, before = [], signal.getsignal(signal.SIGTERM)
  thread = threading.Thread(target=listen, daemon=True)
  thread.start()
  thread.join(timeout=60)
  assert results == [False]
  assert signal.getsignal(signal.SIGTERM) is before and not terminated
