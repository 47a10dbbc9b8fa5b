"""A person labels in a browser; the server is killed; nothing is lost."""

import pathlib
import signal

import chromium
import numpy as np
import page_process
import pages
import PIL.Image
import pytest

from ssljax.active.page import store, suggestions

pytestmark = pytest.mark.skipif(
  chromium.find() is None, reason='there is no Chromium on this machine'
)
MARKUP = '<img src=x onerror="document.title=1">'


@pytest.fixture
def start():
  with page_process.started() as program:
    yield program


@pytest.fixture
def browser(tmp_path):
  made = chromium.Browser(tmp_path / 'profile')
  yield made
  made.close()


def sign_in(browser, address, name='Ada'):
  browser.open(address)
  browser.wait('document.querySelector("#who").open')
  browser.evaluate('document.querySelector("#name").value = ""')
  browser.type(name)
  browser.key('Enter')


def label_by_keyboard(browser, count, key_of):
  """Label images, one key each; their files and keys."""
  given = {}
  for _ in range(count):
    file = browser.wait(
      'document.querySelector("#picture img")?.complete && page.current?.file'
    )
    given[file] = key_of(file)
    browser.key(given[file])
    browser.wait(f'page.current?.file !== {file!r}')
  return given


def publish(folder, root, count):
  """Predictions of all images but the first `count`: all are cats."""
  writer = suggestions.Writer(folder)
  paths = sorted(p.name for p in root.iterdir())
  writer.add((path, 0, 0.9 - k / 1e4) for k, path in enumerate(paths))
  writer.score((path, -k) for k, path in enumerate(paths))
  writer.publish(round=1, classes=['cat'], labels=2, method='madnn')


def test_labels_given_in_a_browser_survive_a_kill(start, tmp_path, browser):
  root, folder = pages.draw(tmp_path / 'images', 90), tmp_path / 'store'
  classes = f'cat,dog,{MARKUP}'
  args = [f'--images={root}', f'--store={folder}', f'--classes={classes}']
  args += ['--nolearn']
  program = start(*args, '--port=0')
  publish(folder, root, 90)
  sign_in(browser, program.address)
  key_of = lambda file: '123'[int(file[:3]) % 3]
  given = label_by_keyboard(browser, 30, key_of)
  browser.wait('page.state.labelled === 30')
  latencies = browser.evaluate('page.latencies')
  assert len(latencies) >= 28

  browser.key('u')
  browser.wait('page.state.labelled === 29')
  undone = browser.evaluate('page.current.file')
  assert undone in given and 'was:' in browser.text()
  del given[undone]

  browser.click('[data-view=grid]')
  browser.wait('document.querySelectorAll(".tile").length > 30')
  browser.click('.tile:nth-child(1)')
  browser.click('.tile:nth-child(20)', modifiers=8)  # with shift
  confirmed = browser.evaluate('page.grid.picked().map((i) => i.file)')
  assert len(confirmed) == 20
  assert 'Confirm 20 as cat' in browser.text()
  browser.click('#confirm')
  browser.wait('page.state.labelled === 49')

  assert not browser.errors
  # Labels of a moment without a server stay in the browser.
  browser.click('[data-view=label]')
  browser.wait('page.preloaded > 4')  # images that are shown without it
  program.end(signal.SIGKILL)
  kept = label_by_keyboard(browser, 2, key_of)
  browser.wait('document.body.innerText.includes("Not saved")')
  wanted = {f: ('cat', 'dog', MARKUP)[int(k) - 1] for f, k in given.items()}
  wanted |= dict.fromkeys(confirmed, 'cat')
  assert store.read(folder).labels() == wanted

  # The old page must not ask the new program, which has another token.
  browser.open('about:blank')
  browser.wait('location.href === "about:blank"')
  # The killed server gave no answer, not a wrong one.
  missing = list(browser.errors)
  assert all('net::ERR_' in error for error in missing), missing
  program = start(*args, f'--port={program.port}')
  browser.open(program.address)
  browser.wait('page.state.labelled === 51')
  wanted |= {f: ('cat', 'dog', MARKUP)[int(k) - 1] for f, k in kept.items()}
  assert store.read(folder).labels() == wanted
  assert browser.evaluate('document.title') == 'Label images'
  assert MARKUP in browser.text()
  assert browser.errors == missing
  assert program.end() == 0


@pytest.mark.slow
def test_suggestions_come_and_change_as_the_model_learns(
  start, tmp_path, browser
):
  from sklearn import datasets

  digits = datasets.load_digits()
  root = tmp_path / 'images'
  root.mkdir()
  for k, image in enumerate(digits.images[:600]):
    pixels = (image * 255 / 16).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(root / f'{k:04d}.png')
  args = [f'--images={root}', f'--store={tmp_path / "store"}', '--port=0']
  args += ['--classes=0,1,2,3,4,5,6,7,8,9', '--method=supervised']
  program = start(*args, '--network=linear', '--steps=100', '--every=30')
  truth = lambda file: str(digits.target[int(file[:4])])
  sign_in(browser, program.address)
  browser.wait('page.state.learner.message?.includes("two classes")', 120)
  errors = []
  for number in (1, 2):
    label_by_keyboard(browser, 40, truth)
    browser.wait(f'page.state.round >= {number}', 180)
    errors.append(error_of(tmp_path / 'store', truth))
  assert errors[1] < errors[0] < 0.5
  browser.wait('page.current?.shown.suggestion')
  assert not browser.errors
  assert program.end() == 0


def error_of(folder: pathlib.Path, truth):
  """The error of the published predictions."""
  found = suggestions.Suggestions(folder)
  found.refresh()
  paths = list(found.by_confidence())
  return np.mean([found.of(path).label != truth(path) for path in paths])
