"""The folder of compiled programs."""

import logging

import jax
import pytest

from ssljax import files
from ssljax.cli import compile_cache
from ssljax.errors import InputError

NAMES = (
  'jax_enable_compilation_cache',
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
)


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
  """Restores JAX's settings; no variable decides, and the cache is ours."""
  before = {name: getattr(jax.config, name) for name in NAMES}
  for name in compile_cache._VARIABLES:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'user'))
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def folder():
  return jax.config.jax_compilation_cache_dir


def test_programs_are_kept_in_the_user_s_cache_folder(tmp_path):
  compile_cache.use('auto')
  assert folder().startswith(str(tmp_path / 'user/ssljax/compiled/'))
  assert jax.config.jax_enable_compilation_cache


def test_a_variable_of_jax_decides(monkeypatch, tmp_path):
  before = folder()
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'elsewhere')
  compile_cache.use('auto')
  assert folder() == before and not (tmp_path / 'user').exists()


def test_off_keeps_nothing(tmp_path):
  compile_cache.use('off')
  assert not jax.config.jax_enable_compilation_cache
  assert not (tmp_path / 'user').exists()


def test_a_folder_that_is_named_is_used_and_has_to_be_writable(tmp_path):
  compile_cache.use(str(tmp_path / 'mine'))
  assert folder().startswith(str(tmp_path / 'mine'))
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match=r'compile_cache=.*cannot be written'):
    compile_cache.use(str(tmp_path / 'file'))


def test_a_cache_folder_that_is_not_writable_is_one_line(tmp_path, caplog):
  (tmp_path / 'user').write_text('no folder')
  before = folder()
  with caplog.at_level(logging.WARNING):
    compile_cache.use('auto')
  assert folder() == before
  assert len(caplog.records) == 1
  assert 'XDG_CACHE_HOME' in caplog.text


def test_a_relative_or_unset_user_cache_is_in_the_home_folder(monkeypatch):
  for value in ('', 'relative'):
    monkeypatch.setenv('XDG_CACHE_HOME', value)
    monkeypatch.setenv('HOME', '/home/me')
    assert str(files.user_cache()) == '/home/me/.cache/ssljax'
