"""Where images come from: folder trees and WebDataset tars, listed once into the columns a cache keeps."""

from cache_builder.sources.listing import Listing, list_images

__all__ = ["Listing", "list_images"]
