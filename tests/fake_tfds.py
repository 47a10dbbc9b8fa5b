"""Write small data sets in the TFDS layout (array_record), no TensorFlow."""

import io
import pathlib

import numpy as np
import PIL.Image


def encode(image: np.ndarray, encoding: str = 'png') -> bytes:
  """Encode an image uint8 [H, W, c] as the bytes of a PNG or JPEG file."""
  pixels = image[..., 0] if image.shape[-1] == 1 else image
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, format=encoding)
  return file.getvalue()


def write(
  data_dir,
  name,
  images,
  labels,
  classes=None,
  *,
  splits=None,
  version='1.0.0',
  encoding='png',
  file_names=None,
  shape=None,
  features=None,
  supervised_keys=('image', 'label'),
  config=None,
  shards=1,
):
  """Write `data_dir`/`name`/`version`, rows in the given order.

  Args:
    data_dir: the folder of data sets, as in `--data_dir`.
    name: the data set's name, known to TFDS or new.
    images: [N] arrays uint8 [H, W, c], or bytes that are stored unchanged:
      encoded images, or garbage for a corrupt one.
    labels: [N] int, -1 for an unlabelled image.
    classes: [C] names, or their number; by default the largest label plus 1.
    splits: {name: number of rows or list of rows}; by default both 'train' and
      'test' hold all rows. Numbers take consecutive rows.
    version: of the data set; a folder may hold several.
    encoding: 'png', or 'jpeg' (which is lossy).
    file_names: [N] str, stored as the feature 'file_name'.
    shape: the feature's shape, by default the images' common one, with None
      where they differ.
    features: {key: (feature, [N] values)}, further features; values replace
      those of 'image' or 'label' if it names them.
    supervised_keys: as in `tfds.core.DatasetInfo`, or None.
    config: the name of a builder configuration, an additional folder.
    shards: the number of files of each split.

  Returns:
    The folder of the data set's version.
  """
  import tensorflow_datasets as tfds

  if classes is None:
    classes = int(np.max(labels, initial=0)) + 1
  known = (
    {'num_classes': classes}
    if isinstance(classes, int)
    else {'names': list(classes)}
  )
  columns = {
    'image': (
      tfds.features.Image(
        shape=shape or _shape(images), encoding_format=encoding
      ),
      [i if isinstance(i, bytes) else encode(i, encoding) for i in images],
    ),
    'label': (
      tfds.features.ClassLabel(**known),
      [int(label) for label in labels],
    ),
  }
  if file_names is not None:
    columns['file_name'] = tfds.features.Text(), list(file_names)
  columns.update(features or {})
  columns = {k: v for k, v in columns.items() if v is not None}
  folder = pathlib.Path(data_dir, name, config or '', version)
  folder.mkdir(parents=True)
  rows = _rows(splits, len(images))
  info = _info(tfds, name, config, version, folder, columns, supervised_keys)
  lengths = {
    split: _write_split(
      tfds, folder, name, split, mine, info.features, columns, shards
    )
    for split, mine in rows.items()
  }
  info.set_splits(_split_dict(tfds, name, folder, lengths))
  info.write_to_directory(folder)
  return folder


def serialize(features, example) -> bytes:
  """Return one record; its image is bytes, its label any integer."""
  from tensorflow_datasets.core import example_serializer

  # Not `features.serialize_example`: it would refuse a label out of range.
  encoded = {
    k: v if k in ('image', 'label') else features[k].encode_example(v)
    for k, v in example.items()
  }
  spec = features.get_serialized_info()
  return example_serializer.ExampleSerializer(spec).serialize_example(encoded)


def _shape(images):
  shapes = [i.shape for i in images if not isinstance(i, bytes)]
  sides = zip(*shapes, strict=True)
  return tuple(s[0] if len(set(s)) == 1 else None for s in map(list, sides))


def _rows(splits, count) -> dict[str, list[int]]:
  """Return the rows of each split."""
  if splits is None:
    return {'train': list(range(count)), 'test': list(range(count))}
  rows, start = {}, 0
  for split, which in splits.items():
    if isinstance(which, int):
      rows[split] = list(range(start, start + which))
      start += which
    else:
      rows[split] = list(which)
  return rows


def _info(tfds, name, config, version, folder, columns, supervised_keys):
  features = {key: feature for key, (feature, _) in columns.items()}
  info = tfds.core.DatasetInfo(
    builder=tfds.core.dataset_info.DatasetIdentity(
      name=name,
      version=tfds.core.Version(version),
      data_dir=str(folder),
      module_name='',
      config_name=config,
    ),
    features=tfds.features.FeaturesDict(features),
    supervised_keys=supervised_keys,
  )
  info.set_file_format('array_record')
  return info


def _write_split(tfds, folder, name, split, rows, features, columns, shards):
  """Write the files of a split; return the records and bytes of each."""
  from array_record.python import array_record_module

  lengths = []
  for shard, mine in enumerate(np.array_split(np.array(rows, int), shards)):
    file = f'{name}-{split}.array_record-{shard:05d}-of-{shards:05d}'
    writer = array_record_module.ArrayRecordWriter(
      str(folder / file), 'group_size:1'
    )
    records = [
      serialize(features, {k: v[row] for k, (_, v) in columns.items()})
      for row in mine
    ]
    for record in records:
      writer.write(record)
    writer.close()
    lengths.append((len(records), sum(map(len, records))))
  return lengths


def _split_dict(tfds, name, folder, lengths):
  template = tfds.core.ShardedFileTemplate(
    dataset_name=name, data_dir=folder, filetype_suffix='array_record'
  )
  return tfds.core.splits.SplitDict(
    [
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[n for n, _ in sizes],
        num_bytes=sum(b for _, b in sizes),
        filename_template=template.replace(split=split),
      )
      for split, sizes in lengths.items()
    ]
  )
