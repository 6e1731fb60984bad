"""Where images come from: folder trees, WebDataset tars and lists of files, listed once into the columns a cache keeps."""

from cache_builder.sources.listing import Listing, list_for, list_images, record_listing
from cache_builder.sources.listing_record import ListingRequest
from cache_builder.sources.selection import Selection

__all__ = ["Listing", "ListingRequest", "Selection", "list_for", "list_images", "record_listing"]
