"""The teacher cache: soft targets, captured once on disk, checked, and reused by any number of distillations.

The caller runs the teacher: ``Fill.target`` makes the target of an example, ``CacheWriter`` stores it, ``open_cache`` reads it.
"""

from peftlab.distillation.cache.fill import Fill
from peftlab.distillation.cache.identity import differences, example_key, unfit
from peftlab.distillation.cache.reader import CachedSplit, TeacherCache, open_cache
from peftlab.distillation.cache.writer import SHARD_BYTES, CacheWriter, SplitWriter, check_begun

__all__ = [
    "SHARD_BYTES",
    "CacheWriter",
    "CachedSplit",
    "Fill",
    "SplitWriter",
    "TeacherCache",
    "check_begun",
    "differences",
    "example_key",
    "open_cache",
    "unfit",
]
