"""Measurements of the library: what it costs, and what it gives back."""
