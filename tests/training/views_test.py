"""Views as a loss sees them: it writes them into the memory, row by row."""

import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax.augment.preprocess import Preprocess
from ssljax.core import BatchSpec, Method, Recorded, Stage, View, all_views
from ssljax.data import feeds
from ssljax.errors import InputError
from ssljax.training.compiled import Program

SHAPE = (tiny.ROWS, tiny.SIDE, tiny.SIDE, 1)
ROWS = np.array([5, 60, 7, 0, 33, 20, 8, 41], np.int32)
LABELLED = 4  # of them, the first
DOUBLE = Preprocess(  # x ← 2 x
  lambda images: (), lambda fitted, image: 2 * image, lambda shape: ()
)


def noise(key, image):
  """An augmentation that tells keys apart."""
  return image + jax.random.normal(key, image.shape)


def add(number):
  """An augmentation that is not random."""
  return lambda key, image: image + number


@struct.dataclass
class Seen:
  """The views of every row, zeros where there was none."""

  views: dict


def remember(params, state, batch, key):
  """A loss that writes every view of a batch into the memory."""
  del key
  spec = BatchSpec(LABELLED, len(ROWS) - LABELLED)
  found = {'image': batch.image} | dict(batch.views)
  seen = dict(state.memory.views)
  for name, images in found.items():
    if isinstance(images, Recorded):
      images, record = images
      images = images + record[:, None, None, None]
    # The part of the rows is known by its length and by its name.
    rows = batch.rows
    if len(images) < len(rows):
      rows = rows[spec.part(name)]
    seen[name] = seen[name].at[rows].set(images)
  loss = jnp.sum(jax.tree.leaves(params)[0]) * 0.0
  return loss, (state.replace(memory=Seen(seen)), {})


def seen(
  *views, rows=ROWS, make_feed=feeds.resident, seeds=1, devices=1, **data
):
  """Views `[S, N, H, W, c]` by name, as a step with these rows sees them."""
  names = {'image', *(view.name for view in views)}
  stage = Stage(
    name='only',
    steps=1,
    tx=optax.sgd(0.1),
    batch_spec=BatchSpec(LABELLED, len(ROWS) - LABELLED),
    loss=remember,
    views=views,
  )
  method = Method(
    name='views',
    stages=(stage,),
    init=lambda *_: Seen({name: jnp.zeros(SHAPE) for name in names}),
  )
  shared, mesh = tiny.make_data(devices, make_feed)
  shared = shared._replace(**({'augmentation': None} | data))
  program = Program(method, tiny.NET, shared, mesh, seeds=seeds)
  rows = np.stack([rows] * seeds)
  state = program.initial(tiny.make_splits(range(seeds)), rows)
  pixels, placed = next(shared.train.batches(lambda _: rows, [0]))
  source = pixels, program.fitted
  state, _ = program.steps[0](state, source, placed, np.int32(0))
  return jax.tree.map(np.asarray, state.memory.views)


TWO = (View('weak', noise), View('strong', noise))


@functools.cache
def two():
  """Two views of the same augmentation beside the default one."""
  return seen(View('image', noise), *TWO)


def test_views_of_a_row_differ_though_their_augmentation_is_the_same():
  views = [two()[name][0, ROWS] for name in ('image', 'weak', 'strong')]
  for i, j in ((0, 1), (0, 2), (1, 2)):
    difference = np.abs(views[i] - views[j]).reshape(len(ROWS), -1)
    assert (difference.max(axis=1) > 0.1).all()


def test_the_noise_of_every_row_and_view_is_another():
  clean = seen()['image'][0, ROWS]
  drawn = [two()[name][0, ROWS] - clean for name in ('image', 'weak', 'strong')]
  flat = np.concatenate(drawn).reshape(3 * len(ROWS), -1)
  assert len(np.unique(flat.round(4), axis=0)) == 3 * len(ROWS)
  # Standard normal noise: 384 draws, so a mean within 4/√384.
  assert abs(flat.mean()) < 4 / np.sqrt(flat.size)


def test_another_view_changes_no_bit_of_the_default_one():
  alone = seen(View('image', noise))
  np.testing.assert_array_equal(two()['image'], alone['image'])
  # Nor where the default view is not augmented.
  np.testing.assert_array_equal(seen(*TWO)['image'], seen()['image'])


def test_a_view_of_a_row_does_not_depend_on_the_rest_of_the_batch():
  order = np.array([3, 6, 1, 4, 0, 7, 2, 5])
  again = seen(View('image', noise), *TWO, rows=ROWS[order])
  for name, views in two().items():
    np.testing.assert_array_equal(again[name], views)


def test_a_view_does_not_depend_on_its_place_among_the_views():
  swapped = seen(*TWO[::-1], View('image', noise))
  for name, views in two().items():
    np.testing.assert_array_equal(swapped[name], views)


@pytest.mark.parametrize('part', ['labelled', 'unlabelled'])
def test_a_view_of_a_part_equals_that_of_all_rows_there(part):
  whole = seen(View(part, noise))[part][0]
  found = seen(View(part, noise, rows=part))[part][0]
  inside = ROWS[:LABELLED] if part == 'labelled' else ROWS[LABELLED:]
  outside = np.setdiff1d(np.arange(tiny.ROWS), inside)
  np.testing.assert_array_equal(found[inside], whole[inside])
  assert (found[outside] == 0).all()


def test_a_view_is_augmented_before_and_after_preprocessing():
  pixels = tiny.images()[0][ROWS].astype(np.float32) / 255
  run = dict(preprocess=DOUBLE, on_pixels=add(1.0))
  own = View('own', augment=add(5.0), on_pixels=add(10.0))
  views = seen(own, own._replace(name='alone', after_run=False), **run)
  close = lambda name, wanted: np.testing.assert_allclose(
    views[name][0, ROWS], wanted, rtol=1e-6
  )
  close('image', 2 * (pixels + 1))
  close('own', 2 * (pixels + 1 + 10) + 5)
  close('alone', 2 * (pixels + 10) + 5)


def test_the_runs_own_augmentation_comes_before_the_views():
  # 2 (x + 1), and not 2 x + 1.
  double = View('double', lambda key, image: 2 * image)
  views = seen(double, augmentation=add(1.0))
  pixels = tiny.images()[0][ROWS].astype(np.float32) / 255
  np.testing.assert_allclose(views['image'][0, ROWS], pixels + 1, rtol=1e-6)
  np.testing.assert_allclose(
    views['double'][0, ROWS], 2 * (pixels + 1), rtol=1e-6
  )


def test_a_streamed_feed_has_the_same_views():
  views = View('unlabelled', noise, rows='unlabelled'), View('weak', noise)
  resident = seen(*views, seeds=2)
  streamed = seen(*views, seeds=2, make_feed=tiny.streamed)
  for name in resident:
    np.testing.assert_allclose(
      streamed[name], resident[name], rtol=1e-6, atol=1e-6
    )
  assert (resident['weak'][0, ROWS] != resident['weak'][1, ROWS]).all()


def test_views_are_the_same_over_eight_devices():
  # A part of four rows is not divided by eight devices.
  views = View('unlabelled', noise, rows='unlabelled'), View('weak', noise)
  one, eight = seen(*views), seen(*views, devices=8)
  for name in one:
    np.testing.assert_allclose(eight[name], one[name], rtol=1e-6, atol=1e-6)


def test_stages_with_other_views_do_not_share_a_step():
  def change(method, **of_second):
    (stage,) = method.stages
    return method._replace(stages=(stage, stage._replace(**of_second)))

  data, mesh = tiny.make_data()
  program = tiny.make_job('madnn').program
  steps = lambda **of_second: (
    Program(change(program.method, **of_second), tiny.NET, data, mesh).steps
  )
  first, second = steps(name='again')
  assert first is second
  for of_second in (
    dict(views=TWO),
    dict(after_update=lambda state, batch: state),
  ):
    first, second = steps(**of_second)
    assert first is not second


def adapt(key, image, memory):
  """An augmentation that tells keys and memories apart, and its record."""
  shift = jnp.sum(memory.views['image']) + 1000.0
  drawn = jax.random.normal(key)
  return image + drawn + shift, -drawn


def test_an_adaptive_view_sees_the_memory_and_its_record_reaches_the_loss():
  pixels = tiny.images()[0][ROWS].astype(np.float32) / 255
  run = dict(preprocess=DOUBLE, on_pixels=add(1.0), augmentation=add(3.0))
  own = View('own', augment=add(5.0), on_pixels=add(10.0), adaptive=adapt)
  part = View('unlabelled', rows='unlabelled', adaptive=adapt)
  views = seen(own, part, **run)
  # The loss adds the record −n to 2 (x + 1 + 10 + n + 1000) + 3 + 5.
  rest = views['own'][0, ROWS] - (2 * (pixels + 1011) + 8)
  drawn = rest[:, 0, 0, 0]
  np.testing.assert_allclose(rest, rest[:, :1, :1, :1] + 0 * rest, atol=2e-3)
  assert len(np.unique(drawn.round(2))) == len(ROWS)  # a key for each row
  others = views['unlabelled'][0, ROWS[LABELLED:]]
  rest = others - (2 * (pixels[LABELLED:] + 1001) + 3)
  assert (abs(rest[:, 0, 0, 0] - drawn[LABELLED:]) > 1e-2).all()  # and view
  np.testing.assert_allclose(
    views['image'], seen(**run)['image'], rtol=1e-6
  )  # other views do not change


@pytest.mark.parametrize('how', ['devices', 'stream', 'seeds'])
def test_adaptive_views_do_not_depend_on_feed_devices_or_seeds(how):
  view = View('own', adaptive=adapt)
  part = View('unlabelled', rows='unlabelled', adaptive=adapt)
  options = {
    'devices': dict(devices=8),
    'stream': dict(make_feed=tiny.streamed),
    'seeds': dict(seeds=2),
  }[how]
  one, other = seen(view, part), seen(view, part, **options)
  for name in one:
    np.testing.assert_allclose(other[name][0], one[name][0], atol=2e-3)


def test_the_default_view_cannot_be_adaptive():
  stage = Stage(
    name='only',
    tx=optax.sgd(0.1),
    batch_spec=BatchSpec(4),
    loss=remember,
    views=(View('image', adaptive=adapt),),
  )
  with pytest.raises(InputError, match='adaptive'):
    all_views(stage)
