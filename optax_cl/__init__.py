"""Continual learning as Optax gradient transformations."""

__version__ = "0.1.0"
