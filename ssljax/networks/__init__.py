"""One file per architecture, behind one small interface."""
