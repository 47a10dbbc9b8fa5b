"""Tables of the papers, and the runs that fill them."""
