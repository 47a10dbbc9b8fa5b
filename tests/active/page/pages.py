"""Servers of the labelling page, and requests to them, for tests."""

import contextlib
import http.client
import json
import threading
import types

import numpy as np
import PIL.Image

from ssljax.active.page import images as images_lib
from ssljax.active.page import server, service, store, suggestions

TOKEN = 'token'


def draw(root, count=12, size=(8, 8)):
  """Write `count` PNG files whose brightness is their number."""
  root.mkdir(exist_ok=True, parents=True)
  for k in range(count):
    PIL.Image.new('L', size, k % 256).save(root / f'{k:03d}.png')
  return root


def open_page(tmp_path, classes=('cat', 'dog'), count=12, **settings):
  """A service on a folder of images."""
  root = tmp_path / 'images'
  if not root.exists():
    draw(root, count)
  answers = store.Store(tmp_path / 'store', str(root), classes)
  found = images_lib.Images(root, tmp_path / 'store')
  found.scan()
  return service.Service(answers, found, seed=0, **settings)


def publish(page, labels, **meta):
  """Publish predictions: path -> (class, confidence, score)."""
  writer = suggestions.Writer(page.store.folder)
  classes = sorted({label for label, *_ in labels.values()})
  rows = [
    (path, classes.index(label), confidence)
    for path, (label, confidence, _) in labels.items()
  ]
  writer.add(rows)
  writer.score((path, score) for path, (*_, score) in labels.items())
  writer.place((path, k / 20, 0.5) for k, path in enumerate(labels))
  writer.unseen(meta.pop('unseen', []))
  writer.publish(**{'round': 1, 'classes': classes, 'labels': 2} | meta)


@contextlib.contextmanager
def serve(page, host='127.0.0.1', **limits):
  """A server of a page, in a thread."""
  made = server.Server(page, TOKEN, host, 0)
  if limits:
    app = server.make_app(
      page, token=TOKEN, host=host, cookie='cookie', **limits
    )
    made._server.config.app = app
  made.start()
  try:
    yield made
  finally:
    made.stop()


def ask(made, method, path, body=None, headers=None, token=TOKEN):
  """The status, headers and content of an answer."""
  given = {'Host': f'127.0.0.1:{made.port}'}
  if token:
    given['X-Token'] = token
  given |= headers or {}
  connection = http.client.HTTPConnection('127.0.0.1', made.port, timeout=30)
  try:
    data = json.dumps(body).encode() if isinstance(body, dict | list) else body
    connection.request(method, path, data, given)
    answer = connection.getresponse()
    content = answer.read()
  finally:
    connection.close()
  named = {k.lower(): v for k, v in answer.getheaders()}
  if named.get('content-type') == 'application/json':
    content = json.loads(content)
  return types.SimpleNamespace(
    status=answer.status, headers=named, content=content
  )


def at_once(functions):
  """Call functions in threads of their own; their results."""
  results = [None] * len(functions)

  def call(k):
    results[k] = functions[k]()

  threads = [
    threading.Thread(target=call, args=(k,)) for k in range(len(functions))
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return results


def noise(seed, size):
  """A random colour image."""
  pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3))
  return PIL.Image.fromarray(pixels.astype(np.uint8))
