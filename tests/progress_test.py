"""Progress in a log file."""

from ssljax import progress


def test_a_log_file_gets_one_line_for_each_state(capsys, monkeypatch):
  monkeypatch.setattr(progress, '_SECONDS', 0)
  with progress.progress(40, 'reading', done=10) as bar:
    bar.update(10)
    bar.update(20)
  lines = capsys.readouterr().err.splitlines()
  assert [line.split(',')[0] for line in lines][-2:] == [
    'reading: 20 of 40 images',
    'reading: 40 of 40 images',
  ]
  assert all('\r' not in line for line in lines)


def test_short_work_writes_nothing(capsys):
  with progress.progress(3, 'reading') as bar:
    bar.update(3)
  assert capsys.readouterr().err == ''
