"""One file per paper: a method is a `NamedTuple` of pure functions."""
