"""One of several processes that open a data set without kept labels.

`multihost_test.py` starts it as `label_share.py DATA_DIR FOLDER PORT PROCESSES
PROCESS`. FOLDER/PROCESS.json then has the rows that it read and what it found.
"""

import json
import pathlib
import sys

from ssljax.data import datasets, records
from ssljax.distributed import multihost

if __name__ == '__main__':
  data, folder, port, processes, process = sys.argv[1:]
  multihost.join(f'127.0.0.1:{port}', int(processes), int(process))
  seen, fetch = [], records.fetch

  def counted(split, opened, rows, field):
    """Fetch records, and note the rows of both splits."""
    seen.extend(rows)
    return fetch(split, opened, rows, field)

  records.fetch = counted
  found = datasets.load('pictures', data, test_split='test')
  result = {
    'rows': [int(row) for row in seen],
    'labels': found.train.labels.tolist(),
    'digests': found.train.digests().tolist(),
  }
  pathlib.Path(folder, f'{process}.json').write_text(json.dumps(result))
