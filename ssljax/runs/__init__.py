"""From a `Config` to a run, and from a folder to a finished run."""
