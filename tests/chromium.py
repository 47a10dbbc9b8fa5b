"""Drives a headless Chromium by its DevTools protocol over two pipes.

No driver and no WebSocket client is needed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'


def find():
  """Path of a Chromium, or None."""
  return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
  """A Chromium with one page."""

  def __init__(self, profile, width=1366, height=768):
    read_end, self._out = os.pipe()
    self._in, write_end = os.pipe()

    def wire():  # the protocol is on descriptors 3 and 4
      os.dup2(read_end, 100)
      os.dup2(write_end, 101)
      os.dup2(100, 3)
      os.dup2(101, 4)

    self._process = subprocess.Popen(
      [
        *(find(), '--headless=new', '--no-sandbox', '--disable-gpu'),
        *('--remote-debugging-pipe', f'--user-data-dir={profile}'),
        *('--no-first-run', '--disable-dev-shm-usage', '--mute-audio'),
        *('--disable-background-networking', '--disable-component-update'),
        *('--disable-extensions', '--disable-sync', 'about:blank'),
      ],
      preexec_fn=wire,
      close_fds=False,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(read_end)
    os.close(write_end)
    self._number, self._buffer, self.errors = 0, b'', []
    targets = self._call('Target.getTargets')['targetInfos']
    target = next(t for t in targets if t['type'] == 'page')
    self._session = self._call(
      'Target.attachToTarget', targetId=target['targetId'], flatten=True
    )['sessionId']
    for domain in ('Page', 'Runtime', 'Log'):
      self.call(f'{domain}.enable')
    self.resize(width, height)

  def _call(self, method, session=None, timeout=60, **params):
    self._number += 1
    number = self._number
    message = {'id': number, 'method': method, 'params': params}
    if session:
      message['sessionId'] = session
    os.write(self._out, json.dumps(message).encode() + b'\0')
    deadline = time.monotonic() + timeout
    while True:
      for found in self._messages(deadline):
        if found.get('id') == number:
          assert 'error' not in found, (method, found['error'])
          return found['result']
        self._note(found)

  def _messages(self, deadline):
    left = deadline - time.monotonic()
    assert left > 0 and select.select([self._in], [], [], left)[0], 'no answer'
    self._buffer += os.read(self._in, 2**20)
    *whole, self._buffer = self._buffer.split(b'\0')
    return [json.loads(text) for text in whole]

  def _note(self, message):
    params = message.get('params', {})
    if message.get('method') == 'Runtime.exceptionThrown':
      self.errors.append(json.dumps(params['exceptionDetails'])[:500])
    entry = params.get('entry', {})
    if message.get('method') == 'Log.entryAdded' and entry['level'] == 'error':
      self.errors.append(f'{entry["text"]} {entry.get("url", "")}')

  def call(self, method, **params):
    """Call a method of the page."""
    return self._call(method, self._session, **params)

  def resize(self, width, height, mobile=False):
    self.call(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=mobile,
    )

  def dark(self, value=True):
    scheme = 'dark' if value else 'light'
    features = [{'name': 'prefers-color-scheme', 'value': scheme}]
    self.call('Emulation.setEmulatedMedia', features=features)

  def open(self, address):
    self.call('Page.navigate', url=address)

  def evaluate(self, code):
    """The value of a JavaScript expression."""
    found = self.call(
      'Runtime.evaluate',
      expression=code,
      returnByValue=True,
      awaitPromise=True,
    )
    details = found.get('exceptionDetails')
    assert details is None, json.dumps(details)[:800]
    return found['result'].get('value')

  def wait(self, code, seconds=30):
    """Wait until an expression is true; its value."""
    deadline = time.monotonic() + seconds
    while True:
      value = self.evaluate(
        f'(() => {{ try {{ return {code} }} catch {{}} }})()'
      )
      if value:
        return value
      assert time.monotonic() < deadline, (code, self.text()[:600], self.errors)
      time.sleep(0.05)

  def text(self):
    return self.evaluate('document.body.innerText')

  def key(self, key, modifiers=0):
    """Press and release a key."""
    named = {'Enter': 13, 'Escape': 27}
    code = named.get(key, ord(key.upper()[0]))
    text = {'Enter': '\r', 'Escape': ''}.get(key, key)
    down = {'key': key, 'windowsVirtualKeyCode': code, 'modifiers': modifiers}
    if text and not modifiers:
      down['text'] = text
    self.call('Input.dispatchKeyEvent', type='keyDown', **down)
    self.call(
      'Input.dispatchKeyEvent',
      type='keyUp',
      key=key,
      windowsVirtualKeyCode=code,
    )

  def click(self, selector, modifiers=0):
    """Click the middle of an element."""
    place = self.evaluate(
      f'(() => {{ const e = document.querySelector({json.dumps(selector)});'
      'e.scrollIntoView({block: "nearest"}); const r = '
      'e.getBoundingClientRect(); return [r.x + r.width / 2, '
      'r.y + r.height / 2]; })()'
    )
    where = dict(x=place[0], y=place[1], button='left', clickCount=1)
    for kind in ('mousePressed', 'mouseReleased'):
      self.call(
        'Input.dispatchMouseEvent', type=kind, modifiers=modifiers, **where
      )

  def type(self, text):
    self.call('Input.insertText', text=text)

  def screenshot(self, path):
    found = self.call('Page.captureScreenshot', format='png')
    path.write_bytes(base64.b64decode(found['data']))

  def close(self):
    self._process.kill()
    self._process.wait()
    os.close(self._out)
    os.close(self._in)
