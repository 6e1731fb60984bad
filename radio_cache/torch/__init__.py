"""The store's tensor code: decoding and crop alignment on the device. The only part of `radio_cache` that needs torch."""

from radio_cache.torch.align import crop_maps
from radio_cache.torch.decode import decode_codes
from radio_cache.torch.device import pick_device

__all__ = ["crop_maps", "decode_codes", "pick_device"]
