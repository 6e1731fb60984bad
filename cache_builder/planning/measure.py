"""Measured cost of a teacher on this device: a few batches of the user's own images, each stage timed by itself.

The images go through the code of a build, from a cache of only these images in a temporary folder that is deleted afterwards.
"""

import contextlib
import tempfile
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache_builder.build_config import BuildConfig
from cache_builder.pipeline.calibrate import calibrate_on_sample, enough_tokens, too_few_images
from cache_builder.pipeline.device import DeviceWork, device_streams
from cache_builder.pipeline.scan import scan_shard
from cache_builder.pipeline.timing import StageSeconds
from cache_builder.pipeline.views import TeacherView, prefetch_views
from cache_builder.sources import Listing
from cache_builder.teachers.base import Teacher
from radio_cache import __version__
from radio_cache.codecs import CODECS, Codec, Half
from radio_cache.codecs.base import COVARIANCE
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import CodecError, SourceError
from radio_cache.format.documents import PIXELS
from radio_cache.format.schema import CacheMeta
from radio_cache.prefetch.ordered import prefetch_map
from radio_cache.reader import Cache
from radio_cache.shards.encoding import shard_parts
from radio_cache.torch import MapEncoder
from radio_cache.writer import ImageIndex, compressed, create_cache

FIDELITIES = (0.99, 0.999)
COMPARED = tuple(
    CodecRequest.of_label(label, fidelity)
    for label, codec_class in CODECS.items()
    for fidelity in (FIDELITIES if codec_class.reaches_fidelity else FIDELITIES[:1])
)
"""Every codec that a user can choose, at each of `FIDELITIES` where a fidelity can be requested."""

_SEED = 0
_TIMED_BATCHES = 3
_WARM_UP_IMAGES = 2
_MAX_MAP_BYTES = 1 << 30
"""Limit of the float32 maps that are held in memory."""


@dataclass(frozen=True, kw_only=True)
class CodecCost:
    """The bytes of one image's map in one codec, with checksum and index entry.

    Attributes:
        request: the codec.
        bytes_per_image: None if it could not be measured.
        cosine: mean on held-out images of the probe; None for half, or if it could not be measured.
        why: reason why it could not be measured.
    """

    request: CodecRequest
    bytes_per_image: float | None
    cosine: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class TeacherProbe:
    """Seconds per image of one teacher on this device, and bytes per image by codec.

    Attributes:
        images: number of images that went through the teacher.
        decode_s: reading, decoding and resizing, with all threads.
        forward_s: the teacher.
        encode_s: encoding in the requested codec, on the device.
        pack_s: compression and checksums, one thread.
    """

    name: str
    input_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    spatial_dim: int
    summary_dim: int | None
    images: int
    decode_s: float
    forward_s: float
    encode_s: float
    pack_s: float
    requested: CodecRequest
    codecs: tuple[CodecCost, ...]

    @property
    def summary_bytes(self) -> int:
        """Bytes of one image's summary, in float16."""
        return 2 * (self.summary_dim or 0)

    def cost_of(self, request: CodecRequest) -> CodecCost:
        """Return the cost of one of `codecs`."""
        return next(cost for cost in self.codecs if cost.request == request)


@contextlib.contextmanager
def probe_cache(listing: Listing, num_images: int, config: BuildConfig) -> Generator[Cache]:
    """Yield a cache of a seeded sample of the images, without a teacher, in a folder that is removed afterwards.

    Args:
        listing: of the source.
        num_images: size of the sample; a smaller source is taken whole.
        config: of the build that is planned.
    """
    index = listing.index
    # Sorted, so that archives are read forwards, as in a build.
    chosen = np.sort(np.random.default_rng(_SEED).permutation(len(index))[:num_images])
    sample = ImageIndex(
        [index.key(int(row)) for row in chosen],
        index.labels[chosen],
        index.container[chosen],
        index.offset[chosen],
        index.length[chosen],
    )
    # One shard, so that one call scans the sample.
    meta = CacheMeta(
        num_images=len(chosen),
        shard_images=len(chosen),
        creator=f"radio-cache {__version__}",
        max_pixels=config.max_pixels,
        containers=listing.containers,
        class_names=listing.class_names,
        pixels=config.pixels,
    )
    with tempfile.TemporaryDirectory(prefix="radio-cache-plan-") as folder:
        path = Path(folder) / "probe.zarr"
        create_cache(path, meta, sample)
        yield Cache(path)


def time_scan(cache: Cache, pool: ThreadPoolExecutor) -> tuple[Cache, float, float]:
    """Scan every image of a probe cache, as a build does before its first teacher.

    Args:
        cache: from `probe_cache`.
        pool: threads that decode.

    Returns:
        The cache reopened with its scan result, seconds per image with all threads, and bytes per image of the stored
        pixels (0 if none are stored).

    Raises:
        SourceError: if no image is usable.
    """
    started = time.perf_counter()
    receipt = scan_shard(cache, 0, pool)
    seconds = (time.perf_counter() - started) / cache.num_images
    if len(receipt.failures) == cache.num_images:
        first = receipt.failures[0]
        raise SourceError(
            f"none of {cache.num_images} images of the probe can be used: {cache.index.key(first.row)}: {first.reason}"
        )
    pixel_bytes = sum(file.num_bytes for file in receipt.files if file.path.startswith(PIXELS)) / cache.num_images
    return cache.reopened(), seconds, pixel_bytes


def probe_teacher(
    cache: Cache,
    teacher: Teacher,
    requested: CodecRequest,
    config: BuildConfig,
    pool: ThreadPoolExecutor,
    *,
    seconds: float,
    has_trained_weights: bool = True,
) -> TeacherProbe:
    """Run the images of a probe cache through a teacher that is on its device.

    Args:
        cache: the probe cache, scanned.
        teacher: loaded, on its device.
        requested: codec whose encoding is timed.
        config: of the build.
        pool: threads that decode.
        seconds: approximate time limit of the teacher; a slow one gets fewer images.
        has_trained_weights: False for random weights, whose maps do not show the size of calibrated codecs.
    """
    spec = teacher.spec
    # (h, w, c) in float32
    map_bytes = 4 * int(np.prod(spec.geometry.grid_hw)) * spec.spatial_dim
    rows = cache.usable_rows().tolist()[: max(1, _MAX_MAP_BYTES // map_bytes)]
    started = time.perf_counter()
    # The first view only: further views of an image cost about as much each.
    jobs = [(row, (0,)) for row in rows]
    image_views = list(prefetch_views(cache, spec, jobs, pool, StageSeconds(), depth=2 * config.threads))
    decode_s = (time.perf_counter() - started) / len(rows)
    maps, forward_s = _forward(image_views, teacher, config, seconds)
    # (n, h, w)
    valid_masks = np.stack([image_view.valid_tokens(spec.geometry) for image_view in image_views[: len(maps)]])
    # A dict keeps the order and drops the requested codec if it is among those compared.
    requests = dict.fromkeys((*COMPARED, requested))
    costs: list[CodecCost] = []
    # Half is timed if the requested codec cannot be calibrated, as its bytes are then an upper bound.
    timed: Codec = Half()
    for request in requests:
        codec, cost = _measured(request, teacher, maps, valid_masks, has_trained_weights=has_trained_weights)
        costs.append(cost)
        if request == requested and codec is not None:
            timed = codec
    encode_s, pack_s = _encode(timed, maps, torch.device(config.device))
    return TeacherProbe(
        name=spec.name,
        input_hw=spec.geometry.input_hw,
        grid_hw=spec.geometry.grid_hw,
        spatial_dim=spec.spatial_dim,
        summary_dim=spec.summary_dim,
        images=len(maps),
        decode_s=decode_s,
        forward_s=forward_s,
        encode_s=encode_s,
        pack_s=pack_s,
        requested=requested,
        codecs=tuple(costs),
    )


def _forward(
    image_views: list[TeacherView], teacher: Teacher, config: BuildConfig, seconds: float
) -> tuple[NDArray[np.float32], float]:
    """Return the maps (n, h, w, c) of as many images as the time allows, and the seconds per image with all streams."""
    device = torch.device(config.device)
    work = DeviceWork(teacher, device, StageSeconds())
    with device_streams(device) as num_streams, ThreadPoolExecutor(num_streams) as streams:

        def run(images: list[TeacherView], batch: int) -> Generator[NDArray[np.float32]]:
            parts = (images[first : first + batch] for first in range(0, len(images), batch))
            for done in prefetch_map(streams, work.features, parts, depth=num_streams + 1):
                # The copy to the CPU is part of the time, as in a build.
                yield from (part.spatial.cpu().numpy() for part in done)

        def timed(images: list[TeacherView], batch: int) -> float:
            started = time.perf_counter()
            for _ in run(images, batch):
                pass
            return (time.perf_counter() - started) / len(images)

        # The first call loads kernels and allocates memory. The second one has the speed that sets how many images fit.
        warm = [timed(image_views[: _WARM_UP_IMAGES * num_streams], _WARM_UP_IMAGES) for _ in range(2)][-1]
        batch = max(1, min(config.batch_images, int(seconds / _TIMED_BATCHES / warm / num_streams)))
        fitting = image_views[: max(batch, int(seconds / warm))]
        deadline = time.perf_counter() + seconds
        maps = np.concatenate(list(run(fitting, batch)))
        rounds: list[float] = []
        while not rounds or (len(rounds) < _TIMED_BATCHES and time.perf_counter() < deadline):
            rounds.append(timed(fitting, batch))
    # The median ignores a round that another process slowed down.
    return maps, float(np.median(rounds))


def _measured(
    request: CodecRequest,
    teacher: Teacher,
    maps: NDArray[np.float32],
    valid_masks: NDArray[np.bool_],
    *,
    has_trained_weights: bool,
) -> tuple[Codec | None, CodecCost]:
    """Return a codec calibrated on the tokens that show the image, and its cost on these maps.

    The codec is None if it could not be calibrated; its cost then has the reason.
    """
    spec = teacher.spec
    if not request.needs_calibration:
        return Half(), CodecCost(request=request, bytes_per_image=_stored_bytes(Half(), maps))
    # A klt basis needs the covariance of real features, and more tokens than channels.
    if request.codec_class.needs in COVARIANCE:
        if not has_trained_weights:
            return None, CodecCost(request=request, bytes_per_image=None, why="random weights do not show its size")
        if not enough_tokens(spec, len(maps)):
            why = f"{too_few_images(len(maps))} to calibrate {request.name} for {spec.spatial_dim} channels"
            return None, CodecCost(request=request, bytes_per_image=None, why=why)
    try:
        # (h, w, c) and (h, w) per image; the calibration picks the tokens that show the image.
        chosen = calibrate_on_sample(request, range(len(maps)), zip(maps, valid_masks, strict=True))
    except CodecError as exc:
        return None, CodecCost(request=request, bytes_per_image=None, why=str(exc))
    stored = _stored_bytes(chosen.codec, maps)
    return chosen.codec, CodecCost(
        request=request, bytes_per_image=stored, cosine=chosen.recorded.calibration["cosine"]
    )


def _stored_bytes(codec: Codec, maps: NDArray[np.float32]) -> float:
    """Return the bytes of one image's map in a full shard."""
    # The chunks and the index of a shard, shared out over its images.
    return sum(map(len, _parts(codec, codec.encode(maps)))) / len(maps)


def _parts(codec: Codec, codes: NDArray[np.generic]) -> list[bytes | memoryview]:
    # (n, *row_shape) -> n chunks of bytes, compressed as the shard writer does
    chunks = [np.ascontiguousarray(image).reshape(-1).view(np.uint8).data for image in codes]
    level = codec.zstd_level
    return shard_parts([chunk if level is None else compressed(chunk, level=level) for chunk in chunks], len(chunks))


def _encode(codec: Codec, maps: NDArray[np.float32], device: torch.device) -> tuple[float, float]:
    """Return seconds per image of encoding on the device, and of compression and checksums."""
    encoder = MapEncoder(codec, device)
    batch = torch.from_numpy(maps[:32]).to(device)
    with torch.inference_mode():
        # Untimed: the first call loads kernels. Kernels run asynchronously, so that the clock waits for the device.
        encoder(batch[:1])
        _wait_for(device)
        started = time.perf_counter()
        codes = encoder(batch).codes.cpu().numpy()
    encoded = time.perf_counter()
    _parts(codec, codes)
    return (encoded - started) / len(batch), (time.perf_counter() - encoded) / len(batch)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["COMPARED", "CodecCost", "TeacherProbe", "probe_cache", "probe_teacher", "time_scan"]
