"""Draw a figure of a paper; the program is in the package `figures`."""

import runpy

if __name__ == '__main__':
  runpy.run_module(
    'ssljax.experiments.figures', run_name='__main__', alter_sys=True
  )
