"""The papers' tables, and the runs that fill them."""
