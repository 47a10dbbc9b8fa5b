"""Exact copies of training images among the test images.

Some data sets contain them (STL-10 does). They are counted, not removed: the
published errors include them.
"""

import hashlib
from typing import Any

import numpy as np


def digest(content: Any) -> int:
  """Return a hash of 64 bits of bytes, or of an array's values in C order."""
  data: Any = (
    content if isinstance(content, bytes) else np.ascontiguousarray(content)
  )
  hashed = hashlib.blake2b(data, digest_size=8).digest()
  return int.from_bytes(hashed, 'little')


def digests(rows: np.ndarray) -> np.ndarray:
  """Return the hash of each row `[N, ...]`, uint64 `[N]`."""
  return np.array([digest(row) for row in rows], np.uint64)


def count(train: np.ndarray, test: np.ndarray) -> int:
  """Return the number of test rows that are also training rows.

  Args:
    train: `[N]` uint64 of `digests`.
    test: `[M]` uint64 of `digests`.
  """
  return int(np.isin(test, train).sum())


def fingerprint(train: np.ndarray, test: np.ndarray) -> str:
  """Return 16 hexadecimal digits that tell copies of a data set apart.

  Args:
    train: `[N]` uint64 of `digests`.
    test: `[M]` uint64 of `digests`.
  """
  return f'{digest(np.concatenate([train, test])):016x}'


def describe(copies: int | None, tests: int) -> str:
  """Return a sentence on `count` for the start of a run; '' if it is 0.

  Args:
    copies: of `count`, or None if it is not known.
    tests: M.
  """
  if not copies:
    return ''
  return (
    f'{copies} of {tests} test images are exact copies of training images: the '
    'test error counts them too'
  )
