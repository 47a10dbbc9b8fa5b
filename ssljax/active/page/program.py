"""The program that shows the page: a server, and a learner beside it."""

from collections.abc import Callable
import json
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple

from ssljax.active.page import images, server, service, store
from ssljax.errors import InputError

_DELAYS = 5, 30, 120, 600  # seconds before the learner starts again
_INDEXED = 600  # seconds that an import waits for the index


class Options(NamedTuple):
  """Settings of the server and its page."""

  host: str = '127.0.0.1'
  port: int | None = None  # the usual one, or one that is free
  random_share: float = 0.2
  learn: bool = True
  seed: int | None = None


class Learning:
  """Keeps a learner running, and tells the page why it does not."""

  def __init__(self, page: service.Service, settings: dict[str, Any]):
    """Start the process, in a thread."""
    self._page, self._settings = page, settings
    self._stop = threading.Event()
    self._process: subprocess.Popen | None = None
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self) -> None:
    import os

    failures = 0
    while not self._stop.is_set():
      began = time.monotonic()
      with tempfile.TemporaryFile('w+') as errors:
        process = self._process = subprocess.Popen(
          [
            *(sys.executable, '-m', 'ssljax.active.page.learner'),
            *(json.dumps(self._settings), str(os.getpid())),
          ],
          stdin=subprocess.DEVNULL,
          stdout=subprocess.DEVNULL,
          stderr=errors,
          start_new_session=True,  # Ctrl-C is for the server, which ends it
        )
        status = process.wait()
        if self._stop.is_set():
          return
        errors.seek(0)
        lines = errors.read()[-10_000:].strip().splitlines()
      reason = lines[-1][:300] if lines else f'exit status {status}'
      failures = 0 if time.monotonic() - began > 600 else failures + 1
      delay = _DELAYS[min(failures, len(_DELAYS)) - 1]
      self._page.learner_problem = (
        f'learning has stopped ({reason}); it starts again in {delay} s. '
        'Answers are saved all the same.'
      )
      if self._stop.wait(delay):
        return
      self._page.learner_problem = ''

  def stop(self) -> None:
    """End the process."""
    self._stop.set()
    if self._process is not None:
      self._process.terminate()
      try:
        self._process.wait(5)
      except subprocess.TimeoutExpired:
        self._process.kill()
    self._thread.join(5)


def fill(found: images.Images, say: Callable[[str], None]) -> None:
  """Index the whole folder."""
  found.scan()
  count = found.index.count()
  say(f'{count} images in {found.root}')


def show(
  answers: store.Store,
  found: images.Images,
  options: Options,
  settings: dict[str, Any],
  say: Callable[[str], None],
  on_change: Callable[[store.State], None] | None = None,
) -> None:
  """Show the page until the process is asked to end.

  Args:
    answers: the store.
    found: the images.
    options: of the page.
    settings: of the learner.
    say: prints a line.
    on_change: is called with the state after answers, at most once a second.
  """
  page = service.Service(
    answers, found, random_share=options.random_share, seed=options.seed
  )
  stop = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.set())
  token = secrets.token_urlsafe(24)
  made = server.Server(page, token, options.host, options.port)
  found.watch()
  made.start()
  say(f'open {made.address}')
  if not server.is_loopback(options.host):
    say(
      f'warning: `host`={options.host}: everyone on the network who has this '
      'address sees the images and can label; the connection is not encrypted'
    )
  learning = Learning(page, settings) if options.learn else None
  seen = -1
  while not stop.wait(1):
    if on_change is not None and answers.version != seen:
      seen = answers.version
      with answers.mutex:
        on_change(answers.state)
  found.close()
  made.stop()
  if learning is not None:
    learning.stop()
  say(f'{answers.state.labelled} labelled images in {answers.folder}')


def import_labels(
  answers: store.Store,
  found: images.Images,
  path: pathlib.Path,
  say: Callable[[str], None],
) -> None:
  """Add the labels of a file to the store."""
  from ssljax.active.page import exchange

  fill(found, say)
  before = set(answers.state.classes)
  try:
    count = exchange.add(answers, found, path)
  except store.SaveError as error:
    raise InputError(
      f'`store`={answers.folder}: cannot be written ({error}): make room'
    ) from error
  say(f'{count} new labels from {path}')
  new = [name for name in answers.state.classes if name not in before]
  if new:
    say(f'{len(new)} new classes from {path}: {", ".join(new)}')
