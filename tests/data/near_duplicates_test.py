import io

import folders
import numpy as np
import PIL.Image

from ssljax.data import folder, splits
from ssljax.data import near_duplicates as near


def picture(seed, size=(64, 48)):
  """A picture with details: a few random discs on a gradient."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:48, :64]
  pixels = 2.0 * x + y
  for _ in range(8):
    cx, cy, r = rng.uniform(0, 64), rng.uniform(0, 48), rng.uniform(4, 14)
    pixels[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = rng.uniform(0, 255)
  image = PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
  return image.resize(size)


def jpeg(image, quality):
  file = io.BytesIO()
  image.save(file, 'JPEG', quality=quality)
  return file.getvalue()


def groups(images):
  looks = [near.look(np.asarray(i)[..., None]) for i in images]
  return near.groups(looks, np.arange(len(images), dtype=np.uint64)).tolist()


def test_scaled_and_recompressed_copies_are_one_group():
  copies = [
    picture(0),
    picture(1),
    picture(0, (128, 96)),
    PIL.Image.open(io.BytesIO(jpeg(picture(0), 40))),
    picture(2),
  ]
  assert groups(copies) == [0, 1, 0, 0, 4]


def test_flat_and_simple_images_are_no_duplicates():
  flat = [PIL.Image.new('L', (32, 32), value) for value in (10, 90, 200)]
  half = [PIL.Image.new('L', (32, 32), value) for value in (200, 90)]
  for image in half:  # equal hashes, but other grey values
    image.paste(0, (0, 0, 16, 32))
  assert len(set(groups([*flat, *half]))) == 5


def test_no_different_digits_of_a_set_are_grouped():
  from sklearn import datasets

  digits = datasets.load_digits().images[:300] * 255 / 16
  found = groups([PIL.Image.fromarray(x.astype(np.uint8)) for x in digits])
  assert len(set(found)) > 295


def test_equal_contents_are_a_group_whatever_they_look_like():
  found = near.groups([None, None, None], np.array([7, 5, 7], np.uint64))
  assert found.tolist() == [7, 5, 7]


def test_near_duplicates_are_named_and_held_out_together(tmp_path, caplog):
  files = {f'cat/{k}.png': picture(k) for k in range(6)}
  files |= {f'dog/{k}.png': picture(10 + k) for k in range(6)}
  files['cat/again.jpg'] = jpeg(picture(0), 50)
  root = folders.write(tmp_path, files)
  data = folder.load(root, image_size=48)
  (said,) = [record.getMessage() for record in caplog.records]
  assert '2 images are near duplicates of one another, groups: 1 ' in said
  assert said.endswith(': cat/0.png, cat/again.jpg')
  names, hashes = data.train.names.tolist(), data.train.groups()
  pair = [names.index('cat/0.png'), names.index('cat/again.jpg')]
  assert len(set(hashes[pair].tolist())) == 1
  # The contents still differ: the record of the data is not changed.
  assert len(set(data.train.digests().tolist())) == 13
  for seed in range(5):
    split = splits.draw_split(
      data.train.labels, 2, per_class=None, seed=seed, test_on=hashes
    )
    tested = np.isin(pair, split.test)
    trained = np.isin(pair, split.trained)
    assert not (tested.any() and trained.any())


def test_exact_copies_are_named_and_held_out_together(tmp_path, caplog):
  files = {f'cat/{k}.png': picture(k) for k in range(5)}
  files |= {f'dog/{k}.png': picture(10 + k) for k in range(5)}
  root = folders.write(tmp_path, files)
  for name in ('cat/copy.png', 'unlabelled/copy.png'):
    folders.write(tmp_path, {name: (tmp_path / 'cat/3.png').read_bytes()})
  data = folder.load(root, image_size=48)
  (said,) = [record.getMessage() for record in caplog.records]
  assert '3 images are exact copies of one another, groups: 1 ' in said
  assert said.endswith(': cat/3.png, cat/copy.png, unlabelled/copy.png')
  names, hashes = data.train.names.tolist(), data.train.groups()
  copies = [names.index(name) for name in names if 'copy' in name]
  copies.append(names.index('cat/3.png'))
  tests = 0
  for seed in range(5):
    split = splits.draw_split(
      data.train.labels, 2, per_class=None, seed=seed, test_on=hashes
    )
    seen = split.seen(data.unlabelled_from)
    tested = np.isin(copies, split.test).any()
    assert not (tested and seen[copies].any())
    tests += tested
  assert tests  # of some seed


def test_few_names_of_many_groups_are_shown():
  keys = np.repeat(np.arange(8, dtype=np.uint64), 6)
  said = near.describe(keys, keys, [f'{row}.png' for row in range(48)])
  assert len(said) == 1 and '48 images are exact copies' in said[0]
  assert '0.png, 1.png, 2.png, 3.png and 2 more; 6.png' in said[0]
  assert said[0].endswith('; and 3 more groups')
