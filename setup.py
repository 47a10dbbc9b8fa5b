"""Installs ssljax."""

import setuptools

setuptools.setup(
  name='ssljax',
  version='0.1.0',
  description='Deep semi-supervised image classification in JAX',
  packages=setuptools.find_packages(include=['ssljax', 'ssljax.*']),
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'array-record>=0.8',
    'chex>=0.1.90',
    'dm-pix>=0.4.4',
    'flax>=0.12',
    'grain>=0.2.12',
    'jax>=0.10',
    'numpy>=2.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.20',
    'pillow>=10.0',
    'scikit-learn>=1.5',
    'scipy>=1.12',
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.7',
    'tqdm>=4.66',
  ],
  extras_require={
    'figures': ['matplotlib>=3.8'],
    'prepare': ['tensorflow>=2.16'],
    'test': [
      'matplotlib>=3.8',
      'pytest>=8.0',
      'pytest-xdist>=3.7',
      'ruff>=0.8',
    ],
  },
)
