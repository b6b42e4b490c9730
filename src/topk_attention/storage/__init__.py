"""Keys and values in files: a cache that may be larger than memory, survives a crash and is continued later."""

from .folder import StoredCache
from .rows import StoredRows

__all__ = ["StoredCache", "StoredRows"]
