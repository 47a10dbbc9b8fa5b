"""Send random requests to the server of the labelling page.

python tools/fuzz_page.py --requests=100000 --clients=50

Starts the server on a temporary folder beside a secret file. Fails for an
answer of status 500, a traceback, a file outside the folder, a damaged store,
and a server that does not answer afterwards.
"""

import argparse
import collections
import http.client
import json
import logging
import pathlib
import random
import sys
import tempfile
import threading
import time
import urllib.parse

SECRET = b'SECRET-CONTENT-9c1f'
_PATHS = (
  *('/', '/api/state', '/api/next', '/api/grid', '/api/map', '/api/changed'),
  *('/api/disagreements', '/api/conflicts', '/static/page.js', '/x'),
  *('/export/csv', '/export/coco', '/export/labelstudio', '/export/x'),
)
_POSTS = '/api/answers', '/api/undo', '/api/classes', '/api/guideline'
_PIECES = (
  *('..', '%2e%2e', '%2f', '/', '\\', '%5c', '%00', '%0d%0a', '~', '.'),
  *('etc/passwd', 'secret.png', 'link.png', '001.png', '1', '-1', '%', '%ff'),
  *('9' * 30, '٣', "'", '"', '<script>', ';', '1e5', 'store/labels.jsonl'),
)
_VALUES = (
  *(None, True, -1, 0, 1, 5, 10**30, 1.5, '', 'cat', 'dog', 'ada', '\x00'),
  *('<script>alert(1)</script>', '../secret.png', '001.png', 'x' * 5000),
  *([], {}, [1], {'a': 1}, '\ud800', 'label', 'skip', 'add', 'rename', 'merge'),
)
_NAMES = (
  *('who', 'answers', 'batch', 'op', 'name', 'to', 'text', 'file', 'id'),
  *('label', 'answer', 'shown', 'key', 'stamp', 'final', 'queue', 'count'),
  *('exclude', 'of', 'order', 'skip', 'token'),
)


def request(rng: random.Random, token: str, host: str):
  """Return method, path, body and headers of a random request."""
  method, body = 'GET', None
  headers = {'Host': host, 'X-Token': token}
  kind = rng.random()
  if kind < 0.3:
    first = rng.choice(('/image/', '/thumb/', '/static/', '/export/', '/'))
    path = first + ''.join(rng.choices(_PIECES, k=rng.randint(1, 5)))
  elif kind < 0.6:
    path = rng.choice(_PATHS)
    pairs = [
      (rng.choice(_NAMES), str(rng.choice(_VALUES)))
      for _ in range(rng.randint(0, 4))
    ]
    if pairs:
      text = urllib.parse.urlencode(pairs, errors='replace')
      path += '?' + text
  else:
    method, path, body = 'POST', rng.choice(_POSTS), _body(rng)
  if rng.random() < 0.1:
    method = rng.choice(('PUT', 'DELETE', 'HEAD', 'OPTIONS', 'POST', 'PATCH'))
  _spoil(rng, headers)
  path = ''.join(c if '!' <= c <= '~' else urllib.parse.quote(c) for c in path)
  return method, path, body, headers


def _body(rng: random.Random) -> bytes:
  """Return a body that is nearly an answer, or no JSON at all."""
  if rng.random() < 0.1:
    return rng.randbytes(rng.choice((0, 1, 100, 70_000)))
  if rng.random() < 0.01:
    return b'[' * rng.choice((10, 100_000, 2_000_000))

  def thing(depth):
    if depth and rng.random() < 0.5:
      return {rng.choice(_NAMES): thing(depth - 1) for _ in range(4)}
    return rng.choice(_VALUES)

  answer = {
    'file': rng.choice(('001.png', '002.png', '../secret.png', 'link.png')),
    'label': rng.choice(('cat', 'dog', 'bird', None)),
  }
  whole = {'who': 'ada', 'answers': [answer], 'op': 'add', 'name': 'cat'}
  for _ in range(rng.randint(0, 3)):
    target = rng.choice((answer, whole))
    target[rng.choice(_NAMES)] = thing(2)
  return json.dumps(whole).encode()


def _spoil(rng: random.Random, headers: dict[str, str]) -> None:
  """Change a header now and then."""
  if rng.random() < 0.15:
    headers['X-Token'] = rng.choice(('', 'wrong', 'x' * 5000, '\xff'))
  if rng.random() < 0.05:
    headers['Host'] = rng.choice(('', 'evil.example', '[', 'a' * 300, '127.1'))
  if rng.random() < 0.1:
    headers['Origin'] = rng.choice(('null', 'http://evil.example', '', '\xff'))
  if rng.random() < 0.05:
    headers['Cookie'] = rng.choice(('', '=', ';;;', 'a=b; ' * 500, '\xff=\xfe'))
  if rng.random() < 0.02:
    headers['Content-Length'] = rng.choice(('-1', 'x', '9' * 30, '٣'[:0]))
  if rng.random() < 0.02:
    headers[rng.choice(('Range', 'Transfer-Encoding', 'Expect'))] = 'x'


def attack(
  address: str, token: str, *, count: int, clients: int, forbidden, seed=0
) -> dict:
  """Send random requests from several threads.

  Args:
    address: of the server, without a path.
    token: that most requests have.
    count: number of requests.
    clients: number of threads.
    forbidden: texts that no answer may contain.
    seed: of the requests.

  Returns:
    statuses: answers by status; 0 where the server closed the connection.
    failures: requests whose answer contains a forbidden text, or status 500.
    seconds: of every request.
  """
  host = urllib.parse.urlsplit(address).netloc
  statuses: collections.Counter[int] = collections.Counter()
  failures, seconds, mutex = [], [], threading.Lock()

  def client(number: int) -> None:
    rng = random.Random(f'{seed} {number}')
    connection = None
    for _ in range(count // clients):
      method, path, body, headers = request(rng, token, host)
      began, status, content = time.monotonic(), 0, b''
      try:
        if connection is None:
          connection = http.client.HTTPConnection(host, timeout=60)
        connection.putrequest(
          method, path, skip_host=True, skip_accept_encoding=True
        )
        if body is not None and 'Content-Length' not in headers:
          headers['Content-Length'] = str(len(body))
        for name, value in headers.items():
          connection.putheader(name, value.encode('latin-1'))
        connection.endheaders(body)
        answer = connection.getresponse()
        status, content = answer.status, answer.read()
        if answer.getheader('connection') == 'close':
          connection.close()
          connection = None
      except (OSError, http.client.HTTPException):
        if connection is not None:
          connection.close()
        connection = None
      spent = time.monotonic() - began
      bad = status == 500 or any(text in content for text in forbidden)
      with mutex:
        statuses[status] += 1
        seconds.append(spent)
        if bad or b'Traceback' in content:
          failures.append((method, path, body, status, content[:200]))

  threads = [threading.Thread(target=client, args=(k,)) for k in range(clients)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return {
    'statuses': dict(statuses),
    'failures': failures,
    'seconds': sorted(seconds),
  }


def report(result: dict, tracebacks, clients: int, spent: float, lines) -> None:
  """Print what an attack has found.

  Args:
    result: of `attack`.
    tracebacks: logged records that have one.
    clients: number of threads.
    spent: seconds of the attack.
    lines: number of lines in the store.
  """
  seconds = result['seconds']
  print(f'{len(seconds)} requests, {clients} clients, {spent:.0f} s')
  print('statuses:', dict(sorted(result['statuses'].items())))
  print(
    f'latency: median {1000 * seconds[len(seconds) // 2]:.0f} ms, '
    f'p95 {1000 * seconds[int(0.95 * len(seconds))]:.0f} ms'
  )
  print(f'lines in the store: {lines}, all whole')
  print(f'failures: {len(result["failures"])}, tracebacks: {len(tracebacks)}')
  for failure in result['failures'][:5]:
    print(failure)
  for record in tracebacks[:3]:
    print(logging.Formatter().format(record))


def main() -> None:
  """Attack a server of our own, and print what happened."""
  import PIL.Image

  from ssljax.active.page import images, server, service, store

  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--requests', type=int, default=100_000)
  parser.add_argument('--clients', type=int, default=50)
  asked = parser.parse_args()
  logged = []
  handler = logging.Handler()
  handler.emit = lambda record: logged.append(record)
  logging.getLogger().addHandler(handler)
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder) / 'images'
    root.mkdir()
    for k in range(50):
      PIL.Image.new('L', (16, 16), k).save(root / f'{k:03d}.png')
    secret = pathlib.Path(folder) / 'secret.png'
    secret.write_bytes(b'\x89PNG\r\n\x1a\n' + SECRET)
    (root / 'link.png').symlink_to(secret)
    where = pathlib.Path(folder) / 'store'
    answers = store.Store(where, str(root), ['cat', 'dog'])
    found = images.Images(root, where)
    found.scan()
    made = server.Server(
      service.Service(answers, found), 'token', '127.0.0.1', 0
    )
    # The limit on the rate would hide everything else.
    app = server.make_app(
      service.Service(answers, found),
      token='token',
      host='127.0.0.1',
      cookie='c',
      rate=1e9,
      burst=1e9,
    )
    made._server.config.app = app
    made.start()
    began = time.monotonic()
    result = attack(
      f'http://127.0.0.1:{made.port}',
      'token',
      count=asked.requests,
      clients=asked.clients,
      forbidden=[SECRET, b'root:x:'],
    )
    spent = time.monotonic() - began
    answers.undo('ada')  # it still works
    made.stop()
    answers.close()
    lines = len(store.read_lines(where / store.NAME)[0])
    store.read(where)
  tracebacks = [record for record in logged if record.exc_info]
  report(result, tracebacks, asked.clients, spent, lines)
  sys.exit(bool(result['failures'] or tracebacks))


if __name__ == '__main__':
  main()
