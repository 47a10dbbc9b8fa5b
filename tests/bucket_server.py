"""A bucket on loopback: the PyPI package gcp-storage-emulator, and faults.

The emulator ignores preconditions, sends no generation with an object's content
and knows no range of last bytes, all of which TensorStore, array_record or a
lock need. They are added here as the JSON API documents them. `faults` makes it
answer like a bucket without permission, or to an expired token.

    python bucket_server.py PORT
"""

import contextlib
import functools
import http.server
import json
import logging
import os
import re
import sys
import threading
import time
from unittest import mock
import urllib.parse

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

NAME = 'bucket'  # of the only bucket
logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)
DENIED = {
  401: 'Invalid Credentials',
  403: 'test does not have storage.objects.list access to the bucket.',
  503: 'Backend Error',
}


class _Handler(server.RequestHandler):
  """Answers requests one at a time: the emulator's storage has no lock."""

  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True
  bucket = None  # the `Bucket` that it belongs to

  def handle_one_request(self):
    self._generation = None
    if isinstance(self.rfile, _Again):
      self.rfile = self.rfile.rest
    self._is_locked = False
    try:
      with contextlib.suppress(ConnectionError):  # the client has gone
        super().handle_one_request()
    finally:
      if self._is_locked:
        self.bucket.lock.release()

  def parse_request(self):
    # A precondition holds until the write.
    self._is_locked = self.bucket.lock.acquire()
    return super().parse_request() and self._is_admitted()

  def _is_admitted(self):
    """Whether the emulator itself may answer; else the answer is sent."""
    self.bucket.requests.append(f'{self.command} {self.path}')
    status = self.bucket.fault(self.command, self.path) or self._refusal()
    if status:
      self.rfile.read(int(self.headers.get('content-length') or 0))
      self._answer(status)
    return not status

  def _refusal(self):
    """The status of a precondition that fails, or None."""
    url = urllib.parse.urlparse(self.path)
    query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
    found = re.search('/b/([^/]+)/o(?:/(.*))?$', url.path)
    if not found:
      return None
    name = urllib.parse.unquote(found[2] or '') or query.get('name', '')
    name = name or self._name_in_body()
    here = self.bucket.generation(found[1], name)
    self._generation = here if self.command == 'GET' else None
    if query.get('ifGenerationMatch', here) != here:
      return 412
    return 304 if query.get('ifGenerationNotMatch') == here != '0' else None

  def _name_in_body(self):
    """The object's name, of an upload that has it in its first part."""
    if 'multipart/related' not in self.headers.get('content-type', ''):
      return ''
    data = self.rfile.read(int(self.headers['content-length']))
    self.rfile = _Again(data, self.rfile)
    found = re.search(rb'"name": *("(?:[^"\\]|\\.)*")', data)
    return json.loads(found[1]) if found else ''

  def _answer(self, status):
    error = {'code': status, 'message': DENIED.get(status, 'refused')}
    text = b'' if status == 304 else json.dumps({'error': error}).encode()
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(text)))
    self.end_headers()
    self.wfile.write(text)

  def end_headers(self):
    if self._generation not in (None, '0') and 'alt=media' in self.path:
      self.send_header('x-goog-generation', self._generation)
    super().end_headers()


class _Again:
  """A stream whose next bytes were read already."""

  def __init__(self, data, rest):
    self._data, self.rest = data, rest

  def read(self, count):
    taken, self._data = self._data[:count], self._data[count:]
    return taken

  def readline(self, *args):
    return self.rest.readline(*args)

  def close(self):
    self.rest.close()


class Bucket:
  """The server, with the environment that leads every library to it."""

  def __init__(self, port=0):
    self.lock, self.requests = threading.RLock(), []
    self.fault = lambda method, path: None  # -> a status, or None
    self._storage = Storage(use_memory_fs=True)
    buckets.create_bucket(NAME, self._storage)
    handler = type('Handler', (_Handler,), {'bucket': self})
    make = functools.partial(handler, self._storage)
    self.server = http.server.ThreadingHTTPServer(('127.0.0.1', port), make)
    self.server.daemon_threads = True
    self.url = f'http://127.0.0.1:{self.server.server_port}'

  def generation(self, bucket, name):
    """The generation of an object, '0' of none."""
    with self.lock:
      try:
        return self._storage.get_file_obj(bucket, name)['generation']
      except Exception:  # the emulator's own, of an absent bucket or object
        return '0'

  def names(self, prefix=''):
    """The names of the objects."""
    with self.lock:
      known = self._storage.objects.get(NAME, {})
      return sorted(name for name in known if name.startswith(prefix))

  @property
  def environment(self):
    return dict.fromkeys(
      (
        'STORAGE_EMULATOR_HOST',  # gcsfs and Google's client
        'TENSORSTORE_GCS_HTTP_URL',  # TensorStore
        'CLOUD_STORAGE_EMULATOR_ENDPOINT',  # array_record
      ),
      self.url,
    )


@contextlib.contextmanager
def running():
  """A server of this process, and the environment of its clients."""
  bucket = Bucket()
  thread = threading.Thread(target=bucket.server.serve_forever, daemon=True)
  thread.start()
  try:
    with mock.patch.dict(os.environ, bucket.environment):
      yield bucket
  finally:
    bucket.server.shutdown()
    bucket.server.server_close()


if __name__ == '__main__':
  served = Bucket(int(sys.argv[1]))
  print(*(f'{k}={v}' for k, v in served.environment.items()), flush=True)
  threading.Thread(target=served.server.serve_forever, daemon=True).start()
  while True:
    time.sleep(60)
