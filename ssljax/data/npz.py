"""Read arrays of an .npz file without trusting it.

`numpy.load` believes the shape in an array's header, and reads a header of any
length. Here both are compared with the sizes in the archive, and these with the
size of the file, before memory is allocated. All errors are `ValueError`s or
errors of the standard library and NumPy.
"""

from collections.abc import Collection
import io
import math
import os
from typing import IO, NamedTuple
import zipfile

import numpy as np

_SUFFIX = '.npy'
_MAX_HEADER = 10_000  # bytes, NumPy's own limit
_METHODS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # those of NumPy
_MOST_DEFLATED = 1032  # bytes that one byte of a deflate stream may become
_KINDS = 'biufcSU'  # of dtypes: numbers and texts


class _Header(NamedTuple):
  """The header of an array."""

  shape: tuple[int, ...]
  dtype: np.dtype
  length: int  # bytes before the data

  @property
  def bytes(self) -> int:
    """The size of the data."""
    return math.prod(self.shape) * self.dtype.itemsize


def read(
  file: IO, wanted: Collection[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Return some arrays of an open .npz file, and the names of its members.

  Args:
    file: seekable.
    wanted: names of arrays; those that are not in the file are left out.

  Returns:
    The arrays by name, and the names of all members, in which '.npy' is left
    out. A member without that ending is no array.

  Raises:
    Exception: the file or one of the arrays is invalid.
  """
  if not zipfile.is_zipfile(file):
    raise ValueError('it is no zip archive, or a truncated one')
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  with zipfile.ZipFile(file) as archive:
    members = archive.infolist()
    named = [info.filename for info in members]
    found = {}
    for name in wanted:
      count = named.count(name + _SUFFIX)
      if count > 1:
        raise ValueError(f'it has {count} arrays named {name}')
      if count:
        info = members[named.index(name + _SUFFIX)]
        found[name] = _array(archive, info, name, size)
  return found, [_listed(name) for name in named]


def _listed(name: str) -> str:
  """Return the name of a member for messages, on one line."""
  text = ' '.join(name.removesuffix(_SUFFIX).split())[:40]
  return text if name.endswith(_SUFFIX) else f'{text} (not .npy)'


def _array(
  archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, size: int
) -> np.ndarray:
  """Return the array of a member of an archive of `size` bytes."""
  _refuse_member(info, name, size)
  with archive.open(info) as member:
    header = _read_header(member, name)
  _refuse_header(header, info, name)
  with archive.open(info) as member:
    array = np.lib.format.read_array(
      member, allow_pickle=False, max_header_size=_MAX_HEADER
    )
    member.read(1)  # at its end the checksum is compared
  return array


def _refuse_member(info: zipfile.ZipInfo, name: str, size: int) -> None:
  """Raise for a member that cannot be read, or claims impossible sizes."""
  if info.flag_bits & 1:
    raise ValueError(f'the array {name} is encrypted')
  if info.compress_type not in _METHODS:
    raise ValueError(
      f'the array {name} has the unknown compression {info.compress_type}'
    )
  most = info.compress_size
  if info.compress_type == zipfile.ZIP_DEFLATED:
    most *= _MOST_DEFLATED
  if info.compress_size > size or info.file_size > most:
    raise ValueError(
      f'the array {name} claims {info.file_size} bytes, which cannot be in a '
      f'file of {size} bytes'
    )


def _read_header(member: IO[bytes], name: str) -> _Header:
  """Read the header at the beginning of a member."""
  magic = member.read(np.lib.format.MAGIC_LEN)
  if not magic:
    raise ValueError(f'the array {name} is empty')
  version = np.lib.format.read_magic(io.BytesIO(magic))
  if version not in ((1, 0), (2, 0)):
    raise ValueError(f'the array {name} has the unknown format {version}')
  field = member.read(2 * version[0])
  length = int.from_bytes(field, 'little')
  if length > _MAX_HEADER:
    raise ValueError(f'the header of the array {name} has {length} bytes')
  parse = (
    np.lib.format.read_array_header_1_0
    if version == (1, 0)
    else np.lib.format.read_array_header_2_0
  )
  text = io.BytesIO(field + member.read(length))
  shape, _, dtype = parse(text, max_header_size=_MAX_HEADER)
  return _Header(shape, dtype, len(magic) + len(field) + length)


def _refuse_header(header: _Header, info: zipfile.ZipInfo, name: str) -> None:
  """Raise for a header that does not describe the data behind it."""
  dtype = header.dtype
  if dtype.hasobject:
    raise ValueError(
      f'the array {name} holds Python objects, which are not loaded '
      '(allow_pickle=False)'
    )
  simple = dtype.kind in _KINDS and dtype.subdtype is None
  if not simple or not dtype.itemsize:
    raise ValueError(f'the array {name} has dtype {dtype!s:.60}')
  data = info.file_size - header.length
  if min(header.shape, default=1) < 0 or header.bytes != data:
    raise ValueError(
      f'the array {name} has shape {header.shape!s:.60} and dtype {dtype}, '
      f'but {data} bytes of data'
    )
  memory = _physical_memory()
  if memory is not None and data > memory:
    raise ValueError(
      f'the array {name} has {data} bytes, this machine {memory} of memory'
    )


def _physical_memory() -> int | None:
  """Return the bytes of memory of this machine, if known."""
  try:
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (AttributeError, OSError, ValueError):
    return None
