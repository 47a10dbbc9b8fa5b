"""Runs on a data set that is drawn anew for every seed."""

import binary
import numpy as np
import pytest

from ssljax.core import UNLABELLED
from ssljax.data import datasets
from ssljax.runs import load
from ssljax.training import metrics_writer

RUN = (
  '--dataset=yin-yang-redrawn',
  '--network=deepbass_toy',
  '--labels=4',
  '--steps=3',
  '--iterations=2',
  '--query_every=1',
  '--query_size=2',
  '--query_passes=2',
  '--passes=2',
)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  base = tmp_path_factory.mktemp('redrawn')
  (base / 'none.flags').touch()
  for name, more in {
    'both': ('--seeds=2', '--seeds_at_once=2'),
    'second': ('--seeds=1', '--seed=1'),
  }.items():
    where = f'--flagfile={base}/none.flags', f'--workdir={base}/{name}'
    assert binary.run(*where, *RUN, *more, binary='deepbass') == 0
  return base


@pytest.mark.slow
def test_a_seed_has_the_same_points_and_results_in_any_run(folders):
  both, alone = (load.load(folders / n, seed=1) for n in ('both', 'second'))
  want = datasets.load('yin-yang-redrawn', seed=1)
  for run in (both, alone):
    for part in ('train', 'test'):
      np.testing.assert_array_equal(
        datasets.arrays(getattr(run.dataset, part)),
        datasets.arrays(getattr(want, part)),
      )
  timing = metrics_writer.TIMING
  lines = [
    [{k: v for k, v in x.items() if k not in timing} for x in run.measured]
    for run in (both, alone)
  ]
  assert lines[0] == lines[1]
  # The labels that were acquired are those of the seed's own points.
  known = [np.asarray(run.state.labels)[0] for run in (both, alone)]
  np.testing.assert_array_equal(*known)
  assert (known[0] != UNLABELLED).sum() > 8


@pytest.mark.slow
def test_a_figure_of_a_seed_shows_its_own_points(folders):
  first, second = (load.load(folders / 'both', seed=seed) for seed in (0, 1))
  one, other = (
    run.infer(run.state, run.program.data.test, np.arange(9)).logits
    for run in (first, second)
  )
  assert not np.array_equal(one, other)
  points = [datasets.arrays(run.dataset.train) for run in (first, second)]
  assert not np.array_equal(*points)
