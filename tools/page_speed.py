"""Measure the labelling page.

python tools/page_speed.py --part=start   # seconds to the first image
python tools/page_speed.py --part=index   # memory of an index
python tools/page_speed.py --part=load    # latency while a model trains
python tools/page_speed.py --part=rank    # a ranking against a forward pass

`load` needs Chromium for the time from a key to the next image; without it the
requests alone are timed.
"""

import argparse
import atexit
import http.client
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

import numpy as np
import PIL.Image

ROOT = pathlib.Path(__file__).parents[1]
LABEL = ROOT / 'experiments' / 'label.py'


def draw(root: pathlib.Path, count: int, side: int) -> None:
  """Write PNG files of noise in two brightnesses, 1,000 a folder."""
  rng = np.random.default_rng(0)
  for k in range(count):
    folder = root / f'{k // 1000:03d}'
    if k % 1000 == 0:
      folder.mkdir(parents=True)
    low = 120 * (k % 2)
    pixels = rng.integers(low, low + 130, (side, side, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(folder / f'{k:06d}.png')


class Program:
  """The program as a process of its own."""

  def __init__(self, *args):
    self.began = time.monotonic()
    self.process = subprocess.Popen(
      [sys.executable, LABEL, '--port=0', *map(str, args)],
      stdout=subprocess.PIPE,
      text=True,
    )
    atexit.register(self.end)  # after a failure, too
    for line in self.process.stdout:
      found = re.match(r'open (http://\S+)', line)
      if found:
        self.address = found[1]
        parts = urllib.parse.urlsplit(self.address)
        self.host = parts.netloc
        self.token = urllib.parse.parse_qs(parts.query)['token'][0]
        self.connection = http.client.HTTPConnection(self.host, timeout=60)
        return
    raise SystemExit('the program ended')

  def ask(self, path, body=None):
    """Return status and content."""
    method = 'GET' if body is None else 'POST'
    data = None if body is None else json.dumps(body)
    self.connection.request(method, path, data, {'X-Token': self.token})
    answer = self.connection.getresponse()
    content = answer.read()
    kind = answer.getheader('content-type')
    if kind == 'application/json':
      content = json.loads(content)
    return answer.status, content

  def end(self):
    """End the program."""
    self.process.terminate()
    self.process.wait()

  def memory(self) -> int:
    """Return the largest resident memory in MiB."""
    text = pathlib.Path(f'/proc/{self.process.pid}/status').read_text()
    return int(re.search(r'VmHWM:\s+(\d+)', text)[1]) // 1024


def start(folder: pathlib.Path, count: int) -> None:
  """Print the time to the first image of a folder, without an index."""
  draw(folder / 'images', count, 8)
  found = []
  for _ in range(3):
    shutil.rmtree(folder / 'store', ignore_errors=True)
    program = Program(
      f'--images={folder / "images"}',
      f'--store={folder / "store"}',
      '--classes=a,b',
    )
    while True:
      items = program.ask('/api/next?who=me&count=1')[1]
      if items:
        break
      time.sleep(0.01)
    assert program.ask(f'/image/{items[0]["id"]}')[0] == 200
    found.append(time.monotonic() - program.began)
    program.end()
  shown = ', '.join(f'{seconds:.2f}' for seconds in sorted(found))
  print(f'{count} PNG files: first image after {shown} s (three starts)')


def index(folder: pathlib.Path, count: int) -> None:
  """Print memory and time of an index of many files."""
  for files in (1000, count):
    root = folder / f'images-{files}'
    template = root / 'x.png'
    root.mkdir()
    PIL.Image.new('L', (8, 8)).save(template)
    for k in range(files - 1):
      if k % 1000 == 0:
        (root / f'{k // 1000:03d}').mkdir()
      os.link(template, root / f'{k // 1000:03d}' / f'{k:06d}.png') if (
        k % 30_000
      ) else shutil.copy(template, root / f'{k // 1000:03d}' / f'{k:06d}.png')
      if k % 30_000 == 0:
        template = root / f'{k // 1000:03d}' / f'{k:06d}.png'
    program = Program(
      f'--images={root}',
      f'--store={folder / f"store-{files}"}',
      '--classes=a,b',
      '--nolearn',
    )
    while not program.ask('/api/state')[1]['complete']:
      time.sleep(0.2)
    seconds = time.monotonic() - program.began
    state = program.ask('/api/state')[1]
    for _ in range(100):
      program.ask('/api/next?who=me&count=12')
    print(
      f'{state["images"]} files: indexed after {seconds:.1f} s, at most '
      f'{program.memory()} MiB'
    )
    program.end()


def load(folder: pathlib.Path, count: int) -> None:
  """Print latencies while a model trains on the same cores."""
  draw(folder / 'images', count, 32)
  program = Program(
    f'--images={folder / "images"}',
    f'--store={folder / "store"}',
    '--classes=a,b',
    '--every=5',
    '--steps=100000',
    '--method=supervised',
    '--network=mlp',
  )
  timed = {'next': [], 'image': [], 'answer': []}

  def time_of(name, path, body=None):
    began = time.monotonic()
    status, content = program.ask(path, body)
    assert status == 200, (status, content)
    timed[name].append(1000 * (time.monotonic() - began))
    return content

  def label(count):
    for _ in range(count):
      (item,) = time_of('next', '/api/next?who=me&count=1')
      time_of('image', f'/image/{item["id"]}?v={item["stamp"]}')
      name = 'ab'[int(item['file'][-10:-4]) % 2]
      answer = item | {'label': name, 'key': item['file']}
      time_of('answer', '/api/answers', {'who': 'me', 'answers': [answer]})

  while not program.ask('/api/state')[1]['complete']:
    time.sleep(0.1)
  label(20)
  while program.ask('/api/state')[1]['learner'].get('state') != 'training':
    time.sleep(0.2)
  time.sleep(5)  # it compiles
  for name in timed:
    timed[name].clear()
  label(300)
  print('requests of one client while the learner trains, in ms:')
  for name, values in timed.items():
    print(f'  {name:7} {_quantiles(values)}')
  _clients(program, 50)
  _browser(program, folder)
  program.connection.close()  # the server has closed it, too
  state = program.ask('/api/state')[1]['learner'].get('state')
  print(f'the learner at the end: {state}')
  program.end()


def _quantiles(values) -> str:
  median, high, most = np.percentile(values, [50, 95, 100])
  return f'median {median:.1f}, p95 {high:.1f}, largest {most:.1f}'


def _clients(program: Program, count: int) -> None:
  """Print the latency of many clients at once."""
  spent, mutex = [], threading.Lock()

  def client():
    connection = http.client.HTTPConnection(program.host, timeout=60)
    for k in range(10):
      began = time.monotonic()
      path = '/api/next?who=me&count=1' if k % 2 else f'/image/{k + 1}'
      connection.request('GET', path, headers={'X-Token': program.token})
      answer = connection.getresponse()
      answer.read()
      assert answer.status == 200
      with mutex:
        spent.append(1000 * (time.monotonic() - began))
    connection.close()

  threads = [threading.Thread(target=client) for _ in range(count)]
  began = time.monotonic()
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  rate = len(spent) / (time.monotonic() - began)
  print(f'{count} clients: {_quantiles(spent)} ms, {rate:.0f} requests/s')


def _browser(program: Program, folder: pathlib.Path) -> None:
  """Print the time from a key to the next image."""
  sys.path.insert(0, str(ROOT / 'tests'))
  import chromium

  if chromium.find() is None:
    print('there is no Chromium on this machine')
    return
  browser = chromium.Browser(folder / 'profile')
  browser.open(program.address)
  browser.wait('document.querySelector("#who").open')
  browser.type('Ada')
  browser.key('Enter')
  for _ in range(200):
    file = browser.wait(
      'document.querySelector("#picture img")?.complete && page.current?.file'
    )
    browser.key('ab'[int(file[-10:-4]) % 2])
    browser.wait(f'page.current?.file !== {file!r}')
    time.sleep(0.15)  # a quick person
  values = browser.evaluate('page.latencies')
  print(
    f'from a key to the next image ({len(values)}): {_quantiles(values)} ms'
  )
  browser.close()


def rank(folder: pathlib.Path, count: int) -> None:
  """Print the time of a ranking against one forward pass."""
  from ssljax.active.page import images, learner, store

  draw(folder / 'images', count, 32)
  answers = store.Store(folder / 'store', str(folder / 'images'), ['a', 'b'])
  found = images.Images(folder / 'images', folder / 'store')
  found.scan()
  entries = found.index.after(0, count)
  given = [
    {'file': e.path, 'label': 'ab'[int(e.path[-10:-4]) % 2]}
    for e in entries[:40]
  ]
  answers.answer('me', given)
  for name in ('entropy', 'margin', 'k_centre', 'typiclust'):
    made = learner.Learner(
      learner.Settings(
        str(folder / 'store'),
        str(folder / 'images'),
        acquire=name,
        method='supervised',
        steps=20,
      )
    )
    made._begin()
    made._read_store()
    made.learn()
    pixels, _ = made.rows.read(entries)
    labels = made._labels()
    spent = {
      lambda m=made, x=pixels: m.model.outputs(x): [],
      lambda m=made, y=labels: m.publish(m.model, ['a', 'b'], y): [],
    }
    for _ in range(3):
      for act, seconds in spent.items():
        began = time.process_time()
        act()
        seconds.append(time.process_time() - began)
    forward, ranked = map(np.median, spent.values())
    print(
      f'{count} images of 32x32, {made.model.config.network.network}, {name}: '
      f'forward pass {forward:.2f} CPU s, read, predict, rank and publish '
      f'{ranked:.2f} = {ranked / forward:.2f} times',
      flush=True,
    )
  answers.close()


PARTS = {'start': start, 'index': index, 'load': load, 'rank': rank}
COUNTS = {'start': 10_000, 'index': 200_000, 'load': 2_000, 'rank': 10_000}


def main() -> None:
  """Measure the parts that the flags name."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--part', choices=PARTS, required=True)
  parser.add_argument('--count', type=int)
  asked = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    count = asked.count or COUNTS[asked.part]
    PARTS[asked.part](pathlib.Path(folder), count)


if __name__ == '__main__':
  main()
