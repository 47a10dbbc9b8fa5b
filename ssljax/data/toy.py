"""Points in the plane: the illustrative example of DeepBASS.

Rottmann, Kahl, Gottschalk 2018, section 4: two classes that bend around
each other:

  r ~ N(1, (1/4)²)      φ ~ π N(1/2, (1/3)²)         Eq. 10
  red  = ( 1/3, −1/10) + r (cos φ,  sin φ)           Eq. 11
  blue = (−1/3,  1/10) + r (cos φ, −sin φ)           Eq. 12

Eq. 10 as printed lacks the π; the paper's figure requires it, and the authors'
code has it. The authors draw new points for every run, as `redrawn` does; the
points of `fixed` are the same for every seed.
"""

import numpy as np

CLASSES = ('blue', 'red')
EACH = 500  # points of each class, to train on and to test
SPLITS = ('train', 'test')

Points = tuple[np.ndarray, np.ndarray]  # [2n, 2] float32, [2n] int32 labels


def normals(shape: tuple[int, ...], key: int) -> np.ndarray:
  """Return N(0, 1) draws of `shape`, float64.

  They are computed from raw Philox words, which NumPy guarantees across
  versions.
  """
  from scipy import special  # slow to import

  words = np.random.Philox(key=key).random_raw(np.prod(shape))
  uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
  return special.ndtri(uniform).reshape(shape)


def yin_yang(each: int, key: int) -> Points:
  """Return n points of each class.

  Args:
    each: n.
    key: of the generator; the points are a function of both.

  Returns:
    Points `[2n, 2]` float32 and labels `[2n]` int32.
  """
  label = np.repeat(np.arange(2, dtype=np.int32), each)
  sign = 2 * label - 1.0  # −1 blue, 1 red
  z = normals((2 * each, 2), key)
  r, phi = 1 + z[:, 0] / 4, np.pi * (1 / 2 + z[:, 1] / 3)
  x = sign / 3 + r * np.cos(phi)
  y = -sign / 10 + sign * r * np.sin(phi)
  return np.stack([x, y], axis=1).astype(np.float32), label


def fixed() -> dict[str, Points]:
  """Return the points of both splits, the same every time."""
  return {split: yin_yang(EACH, key) for key, split in enumerate(SPLITS)}


def redrawn(seed: int) -> dict[str, Points]:
  """Return points of both splits that depend on the seed.

  The labels do not depend on it.
  """
  # 128 bits, of which the high half is 0 for the keys of `fixed`.
  keys = {split: (seed + 1 << 64) + i for i, split in enumerate(SPLITS)}
  return {split: yin_yang(EACH, key) for split, key in keys.items()}
