"""Encoding, decoding and crop alignment on the device: the only part of `radio_cache` that needs torch."""

from radio_cache.torch.align import crop_maps
from radio_cache.torch.decode import MapDecoder, decode_codes
from radio_cache.torch.device import pick_device
from radio_cache.torch.encode import Encoded, MapEncoder

__all__ = ["Encoded", "MapDecoder", "MapEncoder", "crop_maps", "decode_codes", "pick_device"]
