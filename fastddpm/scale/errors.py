"""Define the error of an incomplete job."""


class Incomplete(Exception):
    """Some ranges were not written. The message says which, why, what is saved, and how to continue."""
