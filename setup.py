"""Installs ssljax; pyproject.toml holds the metadata."""

import setuptools

setuptools.setup(
  packages=[
    *setuptools.find_packages(include=['ssljax', 'ssljax.*']),
    *(
      f'ssljax.{name}'
      for name in setuptools.find_packages(
        include=['experiments', 'experiments.*']
      )
    ),
  ]
)
