"""The teacher cache: soft targets captured once, on disk, checked, for as many distillations as one likes.

The caller runs the teacher: ``Fill.target`` makes the target of an example, ``CacheWriter`` stores it, ``open_cache`` reads.
"""

from peftlab.distill.cache.fill import Fill
from peftlab.distill.cache.identity import example_key
from peftlab.distill.cache.reader import CachedSplit, TeacherCache, open_cache
from peftlab.distill.cache.writer import SHARD_BYTES, CacheWriter, SplitWriter

__all__ = [
    "SHARD_BYTES",
    "CacheWriter",
    "CachedSplit",
    "Fill",
    "SplitWriter",
    "TeacherCache",
    "example_key",
    "open_cache",
]
