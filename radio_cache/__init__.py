"""radio-cache: the store of teacher features, its codecs and its crop geometry. Needs no torch, dask or faiss."""

from radio_cache.errors import RadioCacheError
from radio_cache.format.schema import CacheMeta, TeacherSpec
from radio_cache.reader import Cache, CachedTeacher

__all__ = ["Cache", "CacheMeta", "CachedTeacher", "RadioCacheError", "TeacherSpec"]
__distribution__ = "radio-cache"  # `radio_cache.start` recognises our packages by this line
__version__ = "0.1.0"
