"""Zarr arrays beside the sharded maps: plain, verified, and the attributes of groups."""
