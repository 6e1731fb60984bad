"""Decoding of stored codes on the device, and crops of them.

Interpolation is linear, and so are the last steps of decoding: crops are cut from coordinates, and only the tokens of the
crop pass through the last step.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs import Codec, label_of
from radio_cache.errors import UnsupportedFormatError
from radio_cache.torch.align import crop_maps
from radio_cache.torch.registry import DEVICE_CODECS


class MapDecoder:
    """Decode the codes of one teacher on one device.

    `token_coordinates` or `crops`, then `features`, is the whole. For klt the coordinates are those of `KltBasis`: a
    Hadamard matrix times them is the PHI-S target.

    Raises:
        UnsupportedFormatError: if the codec has no decoder for tensors.
    """

    def __init__(self, codec: Codec, device: torch.device) -> None:
        label = label_of(codec)
        if label not in DEVICE_CODECS:
            raise UnsupportedFormatError(f"codec '{label}' has no decoder for tensors")
        self._decoder = DEVICE_CODECS[label].decoder(codec, device)

    def coordinates(self, codes: Tensor) -> Float[Tensor, "b h w c"]:
        """Decode codes (b, *row_shape), on the device, to float32 coordinates.

        They are affine in the map, but a codec with axis transforms returns coefficients: `token_coordinates` and `crops`
        apply these transforms.
        """
        return self._decoder.coordinates(codes)

    def token_coordinates(self, codes: Tensor) -> Float[Tensor, "b h w c"]:
        """Decode codes (b, *row_shape), on the device, to float32 coordinates of tokens."""
        coordinates = self.coordinates(codes)
        _, h, w, _ = coordinates.shape
        transforms = self._decoder.axis_transforms((h, w))
        if transforms is None:
            return coordinates
        rows, columns = transforms
        return torch.einsum("hk,wl,bklc->bhwc", rows, columns, coordinates)

    def crops(
        self, codes: Tensor, rows: Float[Tensor, "b h_out h_in"], columns: Float[Tensor, "b w_out w_in"]
    ) -> Float[Tensor, "b n c"]:
        """Decode codes to the coordinates of crops' tokens; n = h_out * w_out, row-major from the top left.

        Args:
            codes: (b, *row_shape), on the device.
            rows: interpolation weights of `radio_cache.geometry.crops.crop_weights`, top to bottom.
            columns: the same, left to right.
        """
        transforms = self._decoder.axis_transforms((rows.shape[-1], columns.shape[-1]))
        if transforms is not None:
            # Interpolating between inverse transforms of coefficients is one matrix: the map itself is never made.
            rows, columns = rows @ transforms[0], columns @ transforms[1]
        return crop_maps(self.coordinates(codes), rows, columns)

    def features(self, coordinates: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Turn coordinates of tokens into the teacher's features, in its own units."""
        return self._decoder.features(coordinates)


def decode_codes(codec: Codec, codes: Tensor) -> Float[Tensor, "b h w c"]:
    """Decode codes (b, *row_shape) as `codec.decode` does, up to float32 rounding, on the codes' device."""
    decoder = MapDecoder(codec, codes.device)
    return decoder.features(decoder.token_coordinates(codes))
