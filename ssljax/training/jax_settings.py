"""Settings of JAX that change the result of a run."""

from typing import Any

import jax

# Settings that decide types and shapes of the saved arrays.
OF_ARRAYS = ('JAX_ENABLE_X64', 'JAX_DEFAULT_PRNG_IMPL')


def current() -> dict[str, Any]:
  """Return the settings of this process by the name of their variable.

  The bits of every other generator than threefry depend on the platform, which
  then is a setting too.
  """
  config: Any = jax.config  # its settings are no declared attributes
  found = {
    'JAX_ENABLE_X64': bool(config.jax_enable_x64),
    'JAX_DEFAULT_PRNG_IMPL': str(config.jax_default_prng_impl),
    'JAX_THREEFRY_PARTITIONABLE': bool(config.jax_threefry_partitionable),
    'JAX_DEFAULT_MATMUL_PRECISION': config.jax_default_matmul_precision,
  }
  if not found['JAX_DEFAULT_PRNG_IMPL'].startswith('threefry'):
    found['JAX_PLATFORMS'] = jax.default_backend()
  return found


def difference(saved: dict[str, Any], names=None) -> str | None:
  """Return a text about the first setting that differs from the saved ones.

  Args:
    saved: settings by name, as returned by `current`.
    names: settings to compare; all if None.
  """
  now = current()
  for name, value in saved.items():
    if names is not None and name not in names:
      continue
    if name in now and now[name] != value:
      if value is None:
        return f'begun without {name}: unset it'
      shown = int(value) if isinstance(value, bool) else value
      return f'begun with {name}={shown}: set it again'
  return None
