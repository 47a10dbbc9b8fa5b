"""Memory and communication of a run, from shapes alone."""
