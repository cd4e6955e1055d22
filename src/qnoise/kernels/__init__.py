"""Backends of floor 2: the numerics of ``reference.py`` at speed, on contiguous rows. Nothing here is public."""
