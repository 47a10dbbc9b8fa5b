"""Deep semi-supervised image classification in JAX.

    import ssljax
    model = ssljax.fit(images, labels)  # -1 marks an unlabelled image
    model.predict(new_images)

`fit`, `load` and `Classifier` train and use models. `load_data` and
`draw_split` read data sets and draw label splits. `register_method`,
`register_network` and `register_augmentation` make a user's own known by name.
The packages below, such as `ssljax.core` and `ssljax.methods`, are for new
methods.
"""

import importlib

# Public name -> module; imported when first used, so that `import ssljax` is
# light.
_PUBLIC = {
  'fit': 'ssljax.api',
  'load': 'ssljax.api',
  'Model': 'ssljax.api',
  'Evaluation': 'ssljax.api',
  'Classifier': 'ssljax.estimator',
  'Config': 'ssljax.config',
  'InputError': 'ssljax.errors',
  'load_data': 'ssljax.data.datasets:load',
  'draw_split': 'ssljax.data.splits',
  'register_method': 'ssljax.config',
  'register_network': 'ssljax.registry',
  'register_augmentation': 'ssljax.registry',
}
_MODULES = (
  'core',
  'losses',
  'methods',
  'networks',
  'neighbours',
  'optimizers',
  'registry',
)

__all__ = sorted(_PUBLIC)
__version__ = '0.2.0'  # the only place


def __getattr__(name: str):
  """Import a public name when it is first used."""
  if name in _MODULES:
    return importlib.import_module(f'ssljax.{name}')
  if name not in _PUBLIC:
    raise AttributeError(f"module 'ssljax' has no attribute {name!r}")
  module, _, attribute = _PUBLIC[name].partition(':')
  found = getattr(importlib.import_module(module), attribute or name)
  globals()[name] = found
  return found


def __dir__():
  """List the public names."""
  return [*__all__, *_MODULES]
