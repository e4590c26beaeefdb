"""Draw many samples on many machines into a folder of shards, without loss or repetition."""

from fastddpm.scale.errors import Incomplete
from fastddpm.scale.job import Report, sample_shards
from fastddpm.scale.merging import merge

__all__ = ["Incomplete", "Report", "merge", "sample_shards"]
