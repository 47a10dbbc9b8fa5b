"""`Classifier`: scikit-learn's interface on top of `fit`."""

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ssljax import api
from ssljax.core import UNLABELLED
from ssljax.errors import InputError, require

_UNLABELLED_TEXTS = ('-1', '')
_OWN = (
  *('method', 'network', 'optimizer', 'steps', 'augment', 'validation'),
  *('random_state', 'progress'),
)


class Classifier(ClassifierMixin, BaseEstimator):
  """A semi-supervised classifier of images or feature vectors.

  In `fit(X, y)` a label of -1 marks an unlabelled row, as everywhere in
  scikit-learn; among labels that are texts, None, '-1' and '' do too. All other
  arguments are those of `ssljax.fit`. `score` is the accuracy on labelled rows.

  Attributes:
    classes_: `[C]` the labels, sorted.
    model_: the trained `ssljax.Model`.
    n_features_in_: D, for feature vectors.
  """

  def __init__(
    self,
    method: Any = 'madnn',
    *,
    network: Any = None,
    optimizer: Any = None,
    steps: int | None = None,
    augment: Any = None,
    validation: float = 0,
    random_state: Any = 0,
    progress: bool = False,
    **settings: Any,
  ) -> None:
    """Hold the arguments of `ssljax.fit`.

    Args:
      method: see `ssljax.fit`.
      network: likewise.
      optimizer: likewise.
      steps: likewise.
      augment: likewise.
      validation: likewise.
      random_state: the seed: an integer, None or a `RandomState`.
      progress: show a progress bar.
      **settings: other settings of the method's runs, such as `eta=0.3`. They
        are parameters of the estimator too, for `GridSearchCV`.
    """
    self.method = method
    self.network = network
    self.optimizer = optimizer
    self.steps = steps
    self.augment = augment
    self.validation = validation
    self.random_state = random_state
    self.progress = progress
    self._settings = dict(settings)

  def get_params(self, deep: bool = True) -> dict[str, Any]:
    """Return the arguments of the estimator, settings included."""
    found = {name: getattr(self, name) for name in _OWN}
    return found | self._settings

  def set_params(self, **params: Any) -> 'Classifier':
    """Set arguments or settings by name."""
    for name, value in params.items():
      if name in _OWN:
        setattr(self, name, value)
      else:
        self._settings[name] = value
    return self

  def fit(self, X: Any, y: Any) -> 'Classifier':
    """Train on rows `X` with labels `y [N]`.

    Args:
      X: features `[N, D]`, or images `[N, H, W, c]` or `[N, H, W]`.
      y: labels, integers or texts; -1 (or None among texts) if unlabelled.

    Raises:
      InputError: an argument cannot work.
    """
    X, y = self._checked(X, y)
    known = _known(y)
    require(
      known.any(), '`y`: no row has a label; give at least one of each class'
    )
    self.classes_, codes = np.unique(y[known], return_inverse=True)
    if len(self.classes_) < 2:
      raise InputError(
        f'`y`: has the one class {self.classes_[0]!r}; give rows of at least '
        'two classes'
      )
    labels = np.full(len(y), UNLABELLED, np.int64)
    labels[known] = codes
    arguments = self.get_params()
    seed = _seed(arguments.pop('random_state'))
    self.model_ = api.fit(
      X, labels, classes=len(self.classes_), seed=seed, **arguments
    )
    return self

  def _checked(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and labels as arrays, after scikit-learn's checks."""
    require(
      y is not None,
      '`y`: Classifier requires y to be passed, but the target y is None; give '
      'labels, -1 where unlabelled',
    )
    y = _as_labels(y)
    known = y[_known(y)]
    if len(known):
      check_classification_targets(known)
    if _rank(X) > 2:  # images
      return check_array(X, allow_nd=True, dtype=None), y
    X, _ = validate_data(self, X, np.zeros(len(y)), dtype=np.float32)
    require(
      len(X) == len(y), f'`y`: has {len(y)} rows, `X` {len(X)}; give as many'
    )
    return X, y

  def _rows(self, X: Any) -> np.ndarray:
    """Return the rows of a prediction, after scikit-learn's checks."""
    check_is_fitted(self, 'model_')
    if len(self.model_.shape) == 1:
      return validate_data(self, X, dtype=np.float32, reset=False)
    return check_array(X, allow_nd=True, dtype=None)

  def predict_proba(self, X: Any) -> np.ndarray:
    """Return the probability `[M, C]` of each class of `classes_`."""
    rows = self._rows(X)
    return self.model_.predict_proba(rows).astype(np.float64)

  def predict(self, X: Any) -> np.ndarray:
    """Return the most probable label `[M]`."""
    rows = self._rows(X)
    return self.classes_[self.model_.predict(rows)]

  def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
    """Return the accuracy on the rows that have a label.

    Args:
      X: rows, as in `fit`.
      y: labels; rows without one are left out.
      sample_weight: `[M]` weights of the rows, or None.

    Raises:
      InputError: no row has a label.
    """
    y = _as_labels(y)
    known = _known(y)
    require(known.any(), '`y`: no row has a label; give some labels')
    right = self.predict(X)[known] == y[known]
    weight = None if sample_weight is None else np.asarray(sample_weight)[known]
    return float(np.average(right, weights=weight))


def _rank(X: Any) -> int:
  """Return the rank of an array-like."""
  rank = getattr(X, 'ndim', None)
  return np.asarray(X).ndim if rank is None else rank


def _as_labels(y: Any) -> np.ndarray:
  """Return labels `[N]`; those that are texts, or mixed, as objects."""
  y = np.asarray(y)
  if y.ndim == 2 and y.shape[1] == 1:
    from sklearn.utils import column_or_1d

    y = column_or_1d(y, warn=True)
  require(y.ndim == 1, f'`y`: has shape {y.shape}; give one label per row')
  if y.dtype == object and not any(isinstance(x, str) for x in y):
    # Integers and None or NaN for a missing one, as tables have them.
    y = np.array([UNLABELLED if _is_missing(x) else x for x in y])
  return y


def _is_missing(label: Any) -> bool:
  """True for None and NaN, which mark a missing label in tables."""
  return label is None or (isinstance(label, float) and label != label)


def _known(y: np.ndarray) -> np.ndarray:
  """Return `[N]` bool: the rows that have a label."""
  if y.dtype == object:
    unlabelled = UNLABELLED, *_UNLABELLED_TEXTS
    return np.array([not (_is_missing(x) or x in unlabelled) for x in y], bool)
  if y.dtype.kind in 'iuf':
    return (y != UNLABELLED) & ~np.isnan(y.astype(float))
  # NumPy turns a -1 among texts into '-1'; a table's empty cell is ''.
  return ~np.isin(y.astype(str), _UNLABELLED_TEXTS)


def _seed(random_state: Any) -> int:
  """Return the seed that a `random_state` stands for."""
  if isinstance(random_state, int | np.integer):
    return int(random_state)
  return int(check_random_state(random_state).randint(2**31 - 1))
