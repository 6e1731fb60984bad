"""Sources of images: folder trees, WebDataset tars, Parquet files and lists of files.

A source is listed once, into the columns of a cache's image index.
"""

from cache_builder.sources.listing import Listing, list_for, list_images, record_listing
from cache_builder.sources.listing_record import ListingRequest
from cache_builder.sources.selection import Selection

__all__ = ["Listing", "ListingRequest", "Selection", "list_for", "list_images", "record_listing"]
