"""The encoder and decoder of every codec on a device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from radio_cache.torch.base import DeviceDecoder, DeviceEncoder
from radio_cache.torch.half import HalfDecoder, HalfEncoder
from radio_cache.torch.int8 import Int8Decoder, Int8Encoder
from radio_cache.torch.klt_ans import KltAnsDecoder, KltAnsEncoder
from radio_cache.torch.klt_packed import KltPackedDecoder, KltPackedEncoder
from radio_cache.torch.klt_zstd import KltZstdDecoder, KltZstdEncoder


class DeviceCodec(NamedTuple):
    """Classes that encode and decode on a device; both are built from the codec and the device."""

    encoder: Callable[[Any, torch.device], DeviceEncoder]
    decoder: Callable[[Any, torch.device], DeviceDecoder]


DEVICE_CODECS: dict[str, DeviceCodec] = {
    "half": DeviceCodec(HalfEncoder, HalfDecoder),
    "int8": DeviceCodec(Int8Encoder, Int8Decoder),
    "klt/packed": DeviceCodec(KltPackedEncoder, KltPackedDecoder),
    "klt/zstd": DeviceCodec(KltZstdEncoder, KltZstdDecoder),
    "klt/ans": DeviceCodec(KltAnsEncoder, KltAnsDecoder),
}
"""Key in `radio_cache.codecs.CODECS` -> the codec's classes on a device."""
