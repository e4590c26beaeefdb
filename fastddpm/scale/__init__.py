"""Many samples on many machines: shards in a folder, none lost, none twice."""

from fastddpm.scale.errors import Incomplete
from fastddpm.scale.job import Report, sample_shards
from fastddpm.scale.merging import merge

__all__ = ["Incomplete", "Report", "merge", "sample_shards"]
