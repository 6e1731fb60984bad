"""Pictures of feature maps, and tables about a cache. Pictures need NumPy and PIL only."""

from radio_cache.view.pca import PcaColours, png_bytes

__all__ = ["PcaColours", "png_bytes"]
