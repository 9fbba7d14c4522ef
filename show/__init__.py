"""Drawings of a canvas: on a terminal, as a picture, in a page, and from a record of it."""
