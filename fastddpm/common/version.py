"""The version of fastddpm."""

__version__ = "0.1.0"
