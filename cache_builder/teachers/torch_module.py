"""A user's own network as a teacher: "torch-module:my_package.my_file:MyNet", with its weights from --weights FILE.

The contract is that of a student of the same name. The network takes images (b, 3, h, w), normalised as for ImageNet, and
returns a map (b, c, h / p, w / p), or a summary (b, s) and such a map. Its constructor takes no arguments.
"""

import hashlib
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.preset import TeacherOptions, TeacherPreset
from cache_builder.teachers.state_dict import TIMM_SETS, extract_network, load_exactly, read_weights_file
from cache_builder.teachers.token_centres import TokenCentres, token_centres
from cache_builder.teachers.weights import describe_source, file_sha256, first_line
from radio_cache.allowed_modules import import_class
from radio_cache.errors import ConfigError
from radio_cache.format.schema import IMAGENET_PIXELS, TeacherSpec
from radio_cache.geometry.crops import ViewGeometry


@final
class TorchModule(Teacher):
    """Summary: the network's own, or the mean of its map. Spatial: its map.

    The import path comes from the user. `load_recorded` refuses a path from a cache unless the user allowed it.
    """

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        subject = f"teacher 'torch-module:{preset.model}'"
        network = import_class(preset.model, nn.Module, what=subject, needed="nn.Module")
        try:
            self._net = network().eval()
        except Exception as exc:  # a user's constructor may fail in any way
            raise ConfigError(f"{subject} cannot be built: {type(exc).__name__}: {first_line(exc)}") from exc
        file = read_weights_file(path, teacher=preset.name, sets=TIMM_SETS)
        # The network may lie within a checkpoint of a larger one.
        names = list(self._net.state_dict())
        file = extract_network(file, names[:1], teacher=preset.name, path=path, names=names)
        load_exactly(self._net, file.tensors, teacher=preset.name, path=path)
        self.notes = file.notes
        size = options.size_px or preset.input_px
        out, centres = self._probe(subject, size)
        assert out.summary is not None
        fit, tokens = options.fit or preset.fit, int(out.spatial.shape[1])
        self.spec = TeacherSpec(
            name=preset.name,
            family=preset.family,
            model=f"torch-module:{preset.model}",
            licence=preset.licence,
            weights=describe_source(preset.weights, path, options.weights),
            weights_sha256=file_sha256(path),
            geometry=ViewGeometry(
                fit=fit,
                input_hw=(size, size),
                resize_px=size,
                interpolation="bicubic",
                grid_hw=(tokens, tokens),
                stride_px=centres.stride_px,
                offset_px=centres.offset_px,
            ),
            normalisation=IMAGENET_PIXELS,
            summary_dim=int(out.summary.shape[1]),
            spatial_dim=int(out.spatial.shape[3]),
            summary_note="the module's own summary, or the mean of its map",
            spatial_note="the module's map",
            compute_dtype=options.dtype,
            codec=options.codec,
            views=1,
            software={"torch": version("torch")},
            loaded={"code": _code_digest(network)} | ({"tensors": file.chosen} if file.chosen else {}),
        )

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Return the features of normalised images."""
        return _features(self._net(images))

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self._net.to(device)

    @torch.no_grad()
    def _probe(self, subject: str, size: int) -> tuple[Features, TokenCentres]:
        """Return the features of one black image, and the positions of the tokens.

        Positions that cannot be followed through the layers are assumed to be evenly spaced, with a note.

        Raises:
            ConfigError: the network fails, or its map of a square image is not square.
        """
        out: list[Features] = []

        # With real values: a user's code may not run on the meta device.
        def run() -> int:
            out.append(self(torch.zeros(1, 3, size, size)))
            return int(out[-1].spatial.shape[1])

        try:
            centres = token_centres(self._net, run, subject=subject, size_px=size)
        except ConfigError:
            if not out:  # the network itself raised it, before any features
                raise
            stride = size / out[-1].spatial.shape[1]
            centres = TokenCentres(stride, stride / 2)
            self.notes += (
                f"its tokens are assumed to be evenly spaced, {stride:g} px apart: its layers do not determine it",
            )
        except Exception as exc:  # a user's network may fail in any way
            raise ConfigError(f"{subject} cannot take an image of {size} x {size} pixels: {first_line(exc)}") from exc
        if out[-1].spatial.shape[1] != out[-1].spatial.shape[2]:
            raise ConfigError(f"{subject} gives a map of {tuple(out[-1].spatial.shape[1:3])} tokens for a square image")
        return out[-1], centres


def _features(out: Any) -> Features:
    """Return the features in a network's output: a map (b, c, h, w), or a summary (b, s) and a map.

    Raises:
        ConfigError: the output is anything else.
    """
    match out:
        case Tensor() if out.ndim == 4:
            # (b, c, h, w) -> (b, c) and (b, h, w, c)
            return Features(out.mean((2, 3)), out.permute(0, 2, 3, 1))
        case (Tensor() as summary, Tensor() as tokens_map) if summary.ndim == 2 and tokens_map.ndim == 4:
            return Features(summary, tokens_map.permute(0, 2, 3, 1))
        case _:
            parts = out if isinstance(out, tuple | list) else (out,)
            shapes = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)  # pyright: ignore
            raise ConfigError(f"it returns {shapes}; expected is a map (b, c, h, w), or a summary (b, s) and a map")


def _code_digest(network: type[nn.Module]) -> str:
    """Return the first 16 digits of the SHA-256 of the class's source file: other code is another teacher."""
    return hashlib.sha256(Path(inspect.getfile(network)).read_bytes()).hexdigest()[:16]
