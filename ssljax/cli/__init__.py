"""The command line: flags to a `Config`, and the programs."""
