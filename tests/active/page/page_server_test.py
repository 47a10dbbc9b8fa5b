"""The server answers those who have the token, and nobody else anything."""

import http.client
import logging
import pathlib
import socket
import sys

import pages
import PIL.Image
import pytest

from ssljax.active.page import server, store
from ssljax.errors import InputError

sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / 'tools'))


@pytest.fixture
def page(tmp_path):
  made = pages.open_page(tmp_path)
  yield made
  made.store.close()


@pytest.fixture
def made(page):
  with pages.serve(page) as serving:
    yield serving


def post(made, path, body, **more):
  return pages.ask(made, 'POST', f'/api/{path}', body, **more)


def test_the_first_address_gives_a_cookie_that_scripts_cannot_read(made):
  found = pages.ask(made, 'GET', f'/?token={pages.TOKEN}', token=None)
  assert found.status == 303 and found.headers['location'] == '/'
  cookie = found.headers['set-cookie']
  assert 'HttpOnly' in cookie and 'SameSite=strict' in cookie
  given = {'Cookie': cookie.split(';')[0]}
  page = pages.ask(made, 'GET', '/', token=None, headers=given)
  assert page.status == 200 and b'page.js' in page.content


@pytest.mark.parametrize('path', ['/', '/api/state', '/thumb/1', '/image/1'])
@pytest.mark.parametrize('token', [None, '', 'wrong', 'tok', 'token '])
def test_without_the_token_nothing_is_shown(path, token, made):
  found = pages.ask(made, 'GET', path, token=token)
  # HTTP drops spaces around a value.
  assert found.status == (403 if (token or '').strip() != 'token' else 200)


def test_another_path_does_not_take_the_token_from_the_address(made):
  path = f'/api/state?token={pages.TOKEN}'
  assert pages.ask(made, 'GET', path, token=None).status == 403


@pytest.mark.parametrize(
  ('host', 'status'),
  [
    ('127.0.0.1', 200),
    ('localhost:1', 200),
    ('[::1]:80', 200),
    ('evil.example', 403),
    ('127.0.0.1.evil.example', 403),
    ('localhost.evil.example', 403),
    ('', 403),
    ('[', 403),
    ('192.168.1.2', 403),
  ],
)
def test_a_name_that_was_made_to_point_here_is_refused(host, status, made):
  found = pages.ask(made, 'GET', '/api/state', headers={'Host': host})
  assert found.status == status


def test_elsewhere_numbers_are_accepted_and_names_are_not(page):
  with pages.serve(page, host='0.0.0.0') as made:
    for host, status in (
      ('192.168.1.2:8000', 200),
      (socket.gethostname(), 200),
      ('evil.example', 403),
    ):
      found = pages.ask(made, 'GET', '/api/state', headers={'Host': host})
      assert found.status == status


@pytest.mark.parametrize(
  'origin', ['http://evil.example', 'null', 'https://127.0.0.1', '']
)
def test_another_site_cannot_label(origin, made, page):
  body = {'who': 'eve', 'answers': [{'file': '001.png', 'label': 'cat'}]}
  found = post(made, 'answers', body, headers={'Origin': origin})
  assert found.status == 403 and not page.store.state.answers


def test_a_cookie_without_an_origin_cannot_label(made, page):
  given = {'Cookie': f'ssljax_label_{made.port}={pages.TOKEN}'}
  body = {'who': 'eve', 'answers': [{'file': '001.png', 'label': 'cat'}]}
  assert post(made, 'answers', body, headers=given, token=None).status == 403
  given['Origin'] = f'http://127.0.0.1:{made.port}'
  assert post(made, 'answers', body, headers=given, token=None).status == 200
  assert page.store.state.labels() == {'001.png': 'cat'}


def test_every_answer_forbids_scripts_of_others(made):
  for path, token in (('/', pages.TOKEN), ('/x', pages.TOKEN), ('/', None)):
    headers = pages.ask(made, 'GET', path, token=token).headers
    policy = headers['content-security-policy']
    assert "default-src 'none'" in policy and 'unsafe' not in policy
    assert headers['x-content-type-options'] == 'nosniff'
    assert headers['referrer-policy'] == 'no-referrer'
    assert 'server' not in headers


def test_a_request_that_is_too_large_is_refused(made):
  assert post(made, 'answers', b'x' * (server.MAX_BODY + 1)).status == 413

  def chunks():
    for _ in range(40):
      yield b'x' * 2**16

  connection = http.client.HTTPConnection('127.0.0.1', made.port, timeout=30)
  given = {'X-Token': pages.TOKEN}
  try:
    connection.request('POST', '/api/answers', chunks(), given)
    assert connection.getresponse().status >= 400
  except OSError:
    pass  # the connection was closed meanwhile
  assert pages.ask(made, 'GET', '/api/state').status == 200


def test_too_many_requests_are_refused_for_a_while(page):
  with pages.serve(page, rate=1.0, burst=5.0) as made:
    found = [pages.ask(made, 'GET', '/x').status for _ in range(8)]
  assert found[:4] == [404] * 4 and found[-1] == 429


def test_what_people_do_is_saved(made, page):
  (item,) = pages.ask(made, 'GET', '/api/next?who=ada&count=1').content
  body = {'who': 'ada', 'answers': [item | {'label': 'cat', 'key': 'k'}]}
  assert post(made, 'answers', body).content == {'saved': 1}
  assert post(made, 'answers', body).content == {'saved': 0}
  assert page.store.state.labels() == {item['file']: 'cat'}
  (back,) = post(made, 'undo', {'who': 'ada'}).content
  assert back['file'] == item['file'] and not page.store.state.labels()


@pytest.mark.parametrize('text', ['\ud800', '\0', 'x' * 4001, None, 5])
def test_a_guideline_that_cannot_be_shown_is_refused(text, made):
  body = {'name': 'cat', 'text': text}
  assert post(made, 'guideline', body).status == 400
  assert pages.ask(made, 'GET', '/api/state').status == 200


def test_classes_are_edited(made, page):
  assert post(made, 'classes', {'op': 'add', 'name': 'bird'}).status == 200
  rename = {'op': 'rename', 'name': 'bird', 'to': '<b>'}
  assert post(made, 'classes', rename).status == 200
  merge = {'op': 'merge', 'name': 'dog', 'to': 'cat'}
  assert post(made, 'classes', merge).status == 200
  text = {'name': '<b>', 'text': 'has wings'}
  assert post(made, 'guideline', text).status == 200
  found = pages.ask(made, 'GET', '/api/state').content['classes']
  assert [(c['name'], c['guideline']) for c in found] == [
    ('cat', ''),
    ('<b>', 'has wings'),
  ]


def test_an_answer_that_is_not_saved_says_so(made, page, monkeypatch):
  def fail(lines):
    raise store.SaveError('No space left on device')

  monkeypatch.setattr(page.store._log, 'append', fail)
  body = {'who': 'ada', 'answers': [{'file': '001.png', 'label': 'cat'}]}
  found = post(made, 'answers', body)
  assert found.status == 507
  assert 'No space left on device' in found.content['problem']
  assert not page.store.state.answers


@pytest.mark.parametrize(
  'body',
  [
    b'',
    b'{',
    b'[]',
    b'[' * 100_000,
    b'\xff',
    {},
    {'who': 'ada'},
    {'who': 5, 'answers': [{'file': '001.png', 'label': 'cat'}]},
    {'who': 'ada', 'answers': {'a': 1}},
    {'who': 'ada', 'answers': [1]},
    {'who': 'ada', 'answers': [{'file': '../x.png', 'label': 'cat'}]},
    {'who': 'ada', 'answers': [{'id': 10**30, 'label': 'cat'}]},
    {'who': 'ada', 'answers': [{'file': '001.png', 'label': ['cat']}]},
    {'who': 'ada', 'answers': [{'file': '001.png', 'label': 'bird'}]},
    {'who': 'ada', 'answers': [{'file': '001.png', 'stamp': 'x'}]},
    {'who': 'ada\n', 'answers': [{'file': '001.png', 'label': 'cat'}]},
    {'who': 'ada', 'batch': 5, 'answers': [{'file': '1', 'label': 'cat'}]},
    {'who': 'ada', 'answers': [{'file': '001.png', 'label': 'cat'}] * 201},
    b'{"who": "ada", "answers": [{"file": "001.png", "stamp": NaN}]}',
    {'who': '\ud800', 'answers': [{'file': '\ud800', 'label': '\ud800'}]},
  ],
)
def test_an_invalid_answer_is_one_line(body, made, page):
  found = post(made, 'answers', body)
  assert found.status == 400 and found.content['problem']
  assert not page.store.state.answers


@pytest.mark.parametrize(
  'path',
  [
    '/image/../../etc/passwd',
    '/image/%2e%2e%2f%2e%2e%2fetc%2fpasswd',
    '/image//etc/passwd',
    '/image/0',
    '/image/-1',
    '/image/99',
    '/image/1.5',
    '/image/' + '9' * 5000,
    '/thumb/%d9%a3',
    '/static/../server.py',
    '/static/%2e%2e/server.py',
    '/static/page.css/..',
    '/export/passwd',
    '/api/answers',
    '/thumb/1%00',
  ],
)
def test_no_other_file_is_reached(path, made):
  found = pages.ask(made, 'GET', path)
  assert found.status in (404, 405) and 'problem' in found.content


def test_an_image_that_does_not_decode_is_told_with_the_reason(made, page):
  (page.images.root / 'bad.png').write_bytes(b'no image')
  page.images.scan()
  number = page.images.index.find('bad.png').id
  found = pages.ask(made, 'GET', f'/thumb/{number}')
  assert found.status == 422
  assert 'no image that Pillow can read' in found.content['problem']


def test_two_annotators_at_once_lose_nothing(made, page):
  pages.draw(page.images.root / 'more', 60)
  page.images.scan()

  def label(who):
    for _ in range(20):
      path = f'/api/next?who={who}&count=1'
      (item,) = pages.ask(made, 'GET', path).content
      body = {'who': who, 'answers': [item | {'label': 'cat', 'key': ''}]}
      assert post(made, 'answers', body).content == {'saved': 1}

  pages.at_once([lambda: label('ada'), lambda: label('bob')])
  state = page.store.state
  assert state.labelled == 40 and not state.conflicts
  assert len(store.read(page.store.folder).labels()) == 40


def test_an_address_in_use_is_refused(made, page):
  with pytest.raises(InputError, match=r'port.*cannot be used'):
    server.Server(page, 'x', '127.0.0.1', made.port)
  with pytest.raises(InputError, match=r'host=1.2.3.4'):
    server.Server(page, 'x', '1.2.3.4', 0)


def test_three_hundred_classes_are_shown(tmp_path):
  names = [f'class {k}' for k in range(300)]
  page = pages.open_page(tmp_path, classes=names)
  with pages.serve(page) as made:
    assert len(pages.ask(made, 'GET', '/api/state').content['classes']) == 300
  page.store.close()


def test_random_requests_raise_nothing_and_reach_nothing(
  page, tmp_path, caplog
):
  import fuzz_page

  secret = tmp_path / 'secret.png'
  PIL.Image.new('L', (9, 9), 77).save(secret)
  (page.images.root / 'link.png').symlink_to(secret)
  page.images.scan()
  with caplog.at_level(logging.WARNING), pages.serve(page) as made:
    found = fuzz_page.attack(
      f'http://127.0.0.1:{made.port}',
      pages.TOKEN,
      count=800,
      clients=4,
      forbidden=[secret.read_bytes(), b'root:x:'],
    )
  assert not found['failures'], found['failures'][:3]
  assert sum(found['statuses'].values()) == 800
  assert found['statuses'].get(500, 0) == 0
  assert not [r for r in caplog.records if r.exc_info]
  store.read(page.store.folder)  # the lines are whole
