"""Folders of small images, for tests."""

import PIL.Image


def image(value, size=(6, 4), mode='L'):
  """Returns an image of one value; width and height differ."""
  return PIL.Image.new(mode, size, value)


def write(root, files):
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
      path.write_bytes(content)
    else:
      content.save(path)
  return str(root)
