"""How a job says that it did not get to its end."""


class Incomplete(Exception):
    """Some ranges were not written. The message says which, why, what is saved, and how to continue."""
