"""`python -m dgemma`."""

from .cli import main

main(prog_name="dgemma")
