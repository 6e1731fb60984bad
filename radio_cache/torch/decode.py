"""Stored codes to features, on the device.

Interpolation is linear, and so is the last step of klt: crops are cut from coordinates, and only what is left is rotated.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs import Codec, Half, Int8, KltPacked, KltZstd
from radio_cache.codecs.klt_packed import GAIN_BITS, GAIN_OF_ONE, GAINS_PER_OCTAVE
from radio_cache.codecs.klt_zstd import GAINS_PER_OCTAVE as ZSTD_GAINS_PER_OCTAVE
from radio_cache.errors import UnsupportedFormatError


class MapDecoder:
    """Decodes the codes of one teacher on one device.

    `coordinates` then `features` is the whole; both are affine in the map, so a crop may be interpolated in between.
    For klt the coordinates are those of `KltBasis`: a Hadamard matrix times them is the PHI-S target.
    """

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self._codec = codec
        arrays = {name: torch.from_numpy(array).to(device) for name, array in codec.arrays().items()}
        if isinstance(codec, KltZstd | KltPacked):
            self._mean = arrays["mean"]
            self._rotation = (arrays["basis"].double().T * codec.basis.phi).float()
        if isinstance(codec, KltPacked):
            self._unpack_plan(codec, arrays, device)
        if isinstance(codec, Int8):
            self._scale = arrays["scale"]

    def coordinates(self, codes: Tensor) -> Float[Tensor, "b h w c"]:
        """Codes (b, *row_shape), on the device, to what may be interpolated, float32."""
        codec = self._codec
        if isinstance(codec, Half):
            return codes.to(torch.float32)
        if isinstance(codec, Int8):
            return torch.ldexp(codes[..., :-1].float(), codes[..., -1:].clamp(min=0).int()) * self._scale
        if isinstance(codec, KltZstd):
            return _zstd_coordinates(codes, codec)
        if isinstance(codec, KltPacked):
            return self._unpack(codes)
        raise UnsupportedFormatError(f"codec '{codec.name}' has no decoder for tensors")

    def features(self, coordinates: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Coordinates to the teacher's features, in its own units."""
        if isinstance(self._codec, KltZstd | KltPacked):
            return coordinates @ self._rotation + self._mean
        return coordinates

    def _unpack_plan(self, codec: KltPacked, arrays: dict[str, Tensor], device: torch.device) -> None:
        groups = len(codec.group_starts)
        starts = torch.cat([GAIN_BITS * torch.arange(groups), torch.from_numpy(codec.bit_starts)]).to(device)
        widths = torch.cat([torch.full((groups,), GAIN_BITS, device=device), arrays["widths"].long()])
        # A field of up to 10 bits starts in byte k and may reach into k + 2; past the end there is nothing to reach for.
        self._bytes = torch.clamp(starts // 8 + torch.arange(3, device=device)[:, None], max=codec.token_bytes - 1)
        self._shifts = (starts % 8).to(torch.int32)
        self._masks = ((1 << widths) - 1).to(torch.int32)
        self._offsets = torch.clamp((1 << widths[groups:]) - 2, min=0).to(torch.int32)
        self._scales = torch.where(widths[groups:] > 0, arrays["scales"], torch.zeros_like(arrays["scales"]))
        self._levels = arrays["levels"]
        self._group_of = torch.from_numpy(codec.group_of).to(device)
        self._num_groups = groups

    def _unpack(self, codes: Tensor) -> Tensor:
        # index_select and take: half of what indexing costs on a CPU.
        low, middle, high = (codes.index_select(-1, places).to(torch.int32) for places in self._bytes)
        fields = ((low | middle << 8 | high << 16) >> self._shifts) & self._masks
        gains = torch.exp2((fields[..., : self._num_groups] - GAIN_OF_ONE).float() / GAINS_PER_OCTAVE)
        levels = self._levels.take((fields[..., self._num_groups :] + self._offsets).long())
        return levels * (self._scales * gains[..., self._group_of])


def _zstd_coordinates(codes: Tensor, codec: KltZstd) -> Tensor:
    """`KltZstd.coordinates` on the device."""
    if codec.layout == "planes":
        low, high = codes[..., 0, :, :, :], codes[..., 1, :, :, :]
        return ((low.to(torch.int16) + high.to(torch.int16) * 256).float() * codec.step).movedim(-3, -1)
    row_height, channels = codes.shape[-2], codec.basis.channels
    h = codec.grid_height(row_height)
    gains, low, high = torch.split(codes, [h, row_height - (channels + 1) * h, channels * h], dim=-2)
    high = high.unflatten(-2, (channels, h)).to(torch.int16)
    if codec.layout == "nibbles":
        # The shift to the right keeps the sign.
        pairs = torch.stack([(low << 4) >> 4, low >> 4], dim=-2).flatten(-3, -2)
        integers = pairs[..., : channels * h, :].unflatten(-2, (channels, h)).to(torch.int16) + high * 16
    else:
        integers = low.unflatten(-2, (channels, h)).to(torch.int16) + high * 256
    steps = codec.step * torch.exp2(gains.float() / ZSTD_GAINS_PER_OCTAVE)
    return integers.movedim(-3, -1).float() * steps[..., None]


def decode_codes(codec: Codec, codes: Tensor) -> Float[Tensor, "*batch c"]:
    """The same values as `codec.decode`, up to float32 rounding, as a float32 tensor on the codes' device."""
    decoder = MapDecoder(codec, codes.device)
    return decoder.features(decoder.coordinates(codes))
