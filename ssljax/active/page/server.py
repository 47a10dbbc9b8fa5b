"""The page over HTTP, for people whom the program gave its address.

Access is refused unless all of these hold:

  token   in the address that the program prints; a cookie or the header
          `X-Token` afterwards
  Host    an address of this machine: a name of another site that was made to
          point here (DNS rebinding) is refused
  Origin  that of the page, where the browser sends one; a request that changes
          something needs one, or the header `X-Token`

Requests are limited in size and rate. There is no upload, images are served by
number and only if they are in the index, and the page shows names as text.

Starlette and uvicorn are maintained, pure Python and small; the page is three
files without a build step, so that everything works offline.
"""

from collections.abc import Callable
import hmac
import importlib.resources
import ipaddress
import json
import logging
import socket
import threading
import time
from typing import Any
import urllib.parse

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
import uvicorn

from ssljax.active.page import exchange, images, service, store
from ssljax.errors import InputError

PORT = 8470
MAX_BODY = 2**20
MAX_HEADER = 2**14
RATE, BURST = 400.0, 1200.0  # requests per second of an address, and at once
_ADDRESSES = 1000  # whose rates are remembered
_STATIC = {
  'page.js': 'text/javascript; charset=utf-8',
  'page.css': 'text/css; charset=utf-8',
  'icon.svg': 'image/svg+xml',
}
_SECURITY = {
  'content-security-policy': (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
  ),
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-resource-policy': 'same-origin',
  'cross-origin-opener-policy': 'same-origin',
  'permissions-policy': 'camera=(), microphone=(), geolocation=()',
  'x-frame-options': 'DENY',
}
_LOG = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
  """Return True for a name or address of this machine alone."""
  if host == 'localhost':
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


class Guard:
  """ASGI middleware: who may send requests, of which size, how many."""

  def __init__(
    self, app, *, token: str, host: str, cookie: str, rate=RATE, burst=BURST
  ):
    """Guard an application.

    Args:
      app: the application.
      token: that requests need.
      host: that the server is bound to.
      cookie: name of the cookie with the token.
      rate: requests per second of an address.
      burst: requests at once of an address.
    """
    self._app, self._token, self._cookie = app, token, cookie
    self._host, self._rate, self._burst = host, rate, burst
    self._left: dict[str, tuple[float, float]] = {}

  async def __call__(self, scope, receive, send):
    """Answer a request, or refuse it."""
    if scope['type'] != 'http':
      if scope['type'] == 'lifespan':
        await self._app(scope, receive, send)
      elif scope['type'] == 'websocket':
        await send({'type': 'websocket.close', 'code': 1008})
      return
    headers = {k.decode('latin-1'): v for k, v in scope['headers']}
    refused = self._refused(scope, headers)

    async def send_with_headers(message):
      if message['type'] == 'http.response.start':
        own = [(k.encode(), v.encode()) for k, v in _SECURITY.items()]
        names = {k.lower() for k, _ in message['headers']}
        if b'cache-control' not in names:
          own.append((b'cache-control', b'no-store'))
        message['headers'] = [*message['headers'], *own]
      await send(message)

    if refused is not None:
      await refused(scope, receive, send_with_headers)
      return
    try:
      await self._app(scope, _limited(receive), send_with_headers)
    except ClientDisconnect:
      pass

  def _refused(self, scope, headers: dict[str, bytes]) -> Response | None:
    """Return the answer to a request that is refused."""
    if not self._may_ask(scope):
      return problem(429, 'too many requests', {'retry-after': '1'})
    name = headers.get('host', b'').decode('latin-1')
    if not self._is_own(name):
      return problem(403, 'this address is not one of this server')
    origin = headers.get('origin')
    if origin is not None and origin.decode('latin-1') != f'http://{name}':
      return problem(403, 'the request comes from another site')
    in_header = self._is_token(headers.get('x-token', b''))
    if scope['method'] not in ('GET', 'HEAD') and not (origin or in_header):
      return problem(403, 'the request names no origin')
    length = headers.get('content-length', b'0')
    if not length.isdigit() or int(length[:20]) > MAX_BODY:
      return problem(413, f'a request has at most {MAX_BODY} bytes')
    query = urllib.parse.parse_qs(scope['query_string'].decode('latin-1'))
    given = query.get('token', [''])[0].encode()
    is_first = scope['path'] == '/' and self._is_token(given)
    if not (in_header or is_first or self._is_token(self._in_cookie(headers))):
      return problem(
        403, 'open the address that the program printed: the token is wrong'
      )
    return None

  def _may_ask(self, scope) -> bool:
    """Count a request of an address; False if there are too many."""
    who, now = (scope.get('client') or ('',))[0], time.monotonic()
    left, last = self._left.pop(who, (self._burst, now))
    left = min(self._burst, left + (now - last) * self._rate)
    self._left[who] = max(0.0, left - 1), now
    if len(self._left) > _ADDRESSES:
      del self._left[next(iter(self._left))]
    return left >= 1

  def _is_own(self, name: str) -> bool:
    """Return True for a Host header that names this server."""
    try:
      host = urllib.parse.urlsplit(f'//{name}').hostname or ''
    except ValueError:
      return False
    if is_loopback(self._host):
      return is_loopback(host)
    if host in (self._host, 'localhost', socket.gethostname().lower()):
      return True
    try:
      ipaddress.ip_address(host)  # No other site has a number as its name.
    except ValueError:
      return False
    return True

  def _is_token(self, given: bytes) -> bool:
    return hmac.compare_digest(given, self._token.encode())

  def _in_cookie(self, headers: dict[str, bytes]) -> bytes:
    for part in headers.get('cookie', b'').split(b';'):
      name, _, value = part.strip().partition(b'=')
      if name == self._cookie.encode():
        return value
    return b''


def _limited(receive: Callable) -> Callable:
  """Return a `receive` that ends a body which is larger than it said."""
  size = 0

  async def limited():
    nonlocal size
    message = await receive()
    size += len(message.get('body', b''))
    if size > MAX_BODY:
      return {'type': 'http.disconnect'}
    return message

  return limited


def problem(status: int, text: str, headers=None) -> JSONResponse:
  """Return the answer to a request that fails."""
  return JSONResponse({'problem': text}, status, headers)


# Routes.


def _picture(page: service.Service, request: Request) -> Response:
  """Return a thumbnail or an original image."""
  number = _number(request.path_params['id'])
  size = request.path_params['size']
  if size not in ('thumb', 'image') or number is None:
    return problem(404, 'there is no such file')
  entry = page.images.index.entry(number)
  if entry is None:
    return problem(404, 'the file is not in the folder any more')
  try:
    made = (
      page.images.thumbnail(entry)
      if size == 'thumb'
      else page.images.original(entry)
    )
  except images.MissingError as error:
    return problem(404, str(error))
  except ValueError as error:
    return problem(422, str(error))
  # The address changes with the file.
  kept = {'cache-control': 'private, max-age=86400, immutable'}
  return Response(made.content, media_type=made.kind, headers=kept)


def _read(act: Callable[[Request], Any]) -> Callable:
  """Return the endpoint of a GET request."""

  def answer(request: Request) -> Response:
    return _answered(lambda: act(request))

  return answer


def _write(act: Callable[[dict[str, Any]], Any]) -> Callable:
  """Return the endpoint of a POST request with a JSON object."""

  async def answer(request: Request) -> Response:
    try:
      given = json.loads(await request.body(), parse_constant=_refuse)
      if not isinstance(given, dict):
        raise ValueError('no object')
    except (ValueError, RecursionError):
      return problem(400, 'the request is no JSON object')
    return await run_in_threadpool(_answered, lambda: act(given))

  return answer


def make_app(
  page: service.Service, *, token: str, host: str, cookie: str, **limits
) -> Guard:
  """Return the application.

  Args:
    page: what it shows.
    token: that requests need.
    host: that the server is bound to.
    cookie: name of the cookie.
    **limits: `rate` and `burst` of `Guard`.
  """
  static = importlib.resources.files('ssljax.active.page') / 'static'

  async def index(request: Request) -> Response:
    if 'token' in request.query_params:  # not to stay in the history
      answer = RedirectResponse('/', 303)
      answer.set_cookie(cookie, token, httponly=True, samesite='strict')
      return answer
    text = (static / 'page.html').read_bytes()
    return Response(text, media_type='text/html; charset=utf-8')

  async def asset(request: Request) -> Response:
    name = request.path_params['name']
    if name not in _STATIC:
      return problem(404, 'there is no such file')
    return Response((static / name).read_bytes(), media_type=_STATIC[name])

  reading, writing = _reading(page), _writing(page)
  routes = [
    Route('/', index),
    Route('/static/{name}', asset),
    *(Route(f'/api/{name}', _read(act)) for name, act in reading.items()),
    *(
      Route(f'/api/{name}', _write(act), methods=['POST'])
      for name, act in writing.items()
    ),
    Route('/export/{kind}', lambda request: _export(page, request)),
    Route('/{size}/{id}', lambda request: _picture(page, request)),
  ]
  missing = lambda request, error: problem(error.status_code, error.detail)
  app = Starlette(
    routes=routes, exception_handlers={404: missing, 405: missing}
  )
  return Guard(app, token=token, host=host, cookie=cookie, **limits)


def _refuse(constant: str) -> None:
  """Refuse NaN and Infinity, which are no JSON."""
  raise ValueError(constant)


def _number(text: str) -> int | None:
  """Return a number of at most 15 digits; None for another text."""
  is_number = text.isascii() and text.isdigit() and len(text) < 16
  return int(text) if is_number else None


def _reading(page: service.Service) -> dict[str, Callable[[Request], Any]]:
  """Return what the page reads, by address."""

  def text(request: Request, name: str, default='') -> str:
    return request.query_params.get(name, default)

  def number(request: Request, name: str, default: int) -> int:
    given = _number(text(request, name))
    return default if given is None else given

  def following(request: Request):
    given = text(request, 'exclude').split(',')[:1000]
    exclude = [x for x in map(_number, given) if x is not None]
    queue, who = text(request, 'queue', 'acquisition'), text(request, 'who')
    count = number(request, 'count', 5)
    return page.next(queue, count, who, exclude, text(request, 'of'))

  def grid(request: Request):
    of, order = text(request, 'of'), text(request, 'order', 'desc')
    count, skip = number(request, 'count', 48), number(request, 'skip', 0)
    return page.grid(of, order, count, text(request, 'who'), skip)

  return {
    'state': lambda request: page.progress(),
    'next': following,
    'grid': grid,
    'map': lambda request: page.points(),
    'disagreements': lambda request: page.disagreements(),
    'conflicts': lambda request: page.conflicts(),
    'changed': lambda request: page.changed(),
  }


def _writing(page: service.Service) -> dict[str, Callable[[dict], Any]]:
  """Return what the page changes, by address."""

  def text(given: dict, name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
      raise InputError(f'`{name}`: give a text')
    return value

  def answers(given: dict):
    batch = text(given, 'batch') if 'batch' in given else ''
    if len(batch) > 64:
      raise InputError('`batch`: give at most 64 characters')
    saved = page.answer(text(given, 'who'), given.get('answers') or [], batch)
    return {'saved': saved}

  def classes(given: dict):
    acts = {
      'add': lambda name: page.store.add_class(name),
      'rename': lambda name: page.store.rename_class(name, text(given, 'to')),
      'merge': lambda name: page.store.merge_class(name, text(given, 'to')),
    }
    op = text(given, 'op')
    if op not in acts:
      raise InputError(f'`op`={op:.50}: give {", ".join(acts)}')
    acts[op](text(given, 'name'))
    return {}

  def guideline(given: dict):
    page.store.set_guideline(text(given, 'name'), text(given, 'text'))
    return {}

  return {
    'answers': answers,
    'undo': lambda given: page.undo(text(given, 'who')),
    'classes': classes,
    'guideline': guideline,
  }


def _answered(act: Callable[[], Any]) -> Response:
  """Return the result of an action, or the reason why it failed."""
  try:
    return JSONResponse(act())
  except InputError as error:
    return problem(400, str(error))
  except store.SaveError as error:
    return problem(507, f'{error}: make room on the disk')


def _export(page: service.Service, request: Request) -> Response:
  kind = request.path_params['kind']
  if kind not in exchange.FILES:
    return problem(404, 'there is no such format')
  name, media = exchange.FILES[kind]
  with page.store.mutex:
    text = exchange.export(page.store.state, kind)
  disposition = {'content-disposition': f'attachment; filename="{name}"'}
  return Response(text, media_type=media, headers=disposition)


# The server.


class Server:
  """A server in a thread of its own."""

  def __init__(
    self,
    page: service.Service,
    token: str,
    host: str,
    port: int | None = None,
  ):
    """Bind the address; without a port `PORT`, or one that is free.

    Raises:
      InputError: it is in use, or not one of this machine.
    """
    self._socket = bind_any(host) if port is None else bind(host, port)
    self.port = self._socket.getsockname()[1]
    app = make_app(
      page, token=token, host=host, cookie=f'ssljax_label_{self.port}'
    )
    shown = f'[{host}]' if ':' in host else host
    self.address = f'http://{shown}:{self.port}/?token={token}'
    config = uvicorn.Config(
      app,
      log_level='error',
      access_log=False,
      server_header=False,
      proxy_headers=False,
      ws='none',
      lifespan='off',
      http='h11',
      loop='asyncio',
      h11_max_incomplete_event_size=MAX_HEADER,
      limit_concurrency=500,
      timeout_keep_alive=30,
      timeout_graceful_shutdown=3,
    )
    self._server = uvicorn.Server(config)
    self._thread = threading.Thread(target=self._run, daemon=True)

  def _run(self) -> None:
    self._server.run(sockets=[self._socket])

  def start(self) -> None:
    """Begin to answer, in a thread."""
    self._thread.start()
    while not self._server.started and self._thread.is_alive():
      time.sleep(0.01)

  def stop(self) -> None:
    """End, after the answers that are under way."""
    self._server.should_exit = True
    self._thread.join(10)


def bind_any(host: str) -> socket.socket:
  """Return a socket on `PORT`, or on a port that is free."""
  try:
    return bind(host, PORT)
  except InputError:
    return bind(host, 0)


def bind(host: str, port: int) -> socket.socket:
  """Return a socket that is bound to an address.

  Raises:
    InputError: it is in use, or not one of this machine.
  """
  kind = socket.AF_INET6 if ':' in host else socket.AF_INET
  # With the protocol named, asyncio sends each answer at once (TCP_NODELAY).
  made = socket.socket(kind, socket.SOCK_STREAM, socket.IPPROTO_TCP)
  made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    made.bind((host, port))
  except (OSError, OverflowError) as error:
    made.close()
    reason = getattr(error, 'strerror', None) or str(error)
    raise InputError(
      f'`host`={host}, `port`={port}: cannot be used ({reason}): give another '
      '`port`, or 0 for any that is free'
    ) from error
  made.set_inheritable(False)
  return made
