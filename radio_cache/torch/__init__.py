"""Encoding, decoding and crop alignment on the device: the only part of `radio_cache` that needs torch."""

from radio_cache.torch.align import crop_maps
from radio_cache.torch.base import DeviceDecoder, DeviceEncoder, Encoded
from radio_cache.torch.decode import MapDecoder, decode_codes
from radio_cache.torch.device import pick_device
from radio_cache.torch.encode import MapEncoder
from radio_cache.torch.registry import DEVICE_CODECS, DeviceCodec

__all__ = [
    "DEVICE_CODECS",
    "DeviceCodec",
    "DeviceDecoder",
    "DeviceEncoder",
    "Encoded",
    "MapDecoder",
    "MapEncoder",
    "crop_maps",
    "decode_codes",
    "pick_device",
]
