"""Looking at feature maps: pictures for people. Needs numpy and PIL only."""

from radio_cache.view.pca import PcaColours, png_bytes

__all__ = ["PcaColours", "png_bytes"]
