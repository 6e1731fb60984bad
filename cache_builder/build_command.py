"""The `radio-cache build` commands that build a cache again, derived from what the cache has recorded."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from cache_builder.build_config import BATCH_IMAGES, BUILD_DEFAULTS
from cache_builder.computed_with import recorded_batch
from cache_builder.sources.listing_record import recorded_request
from cache_builder.teachers import ALIASES, TEACHERS, recorded_name
from cache_builder.teachers.preset import COMPILED
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.reader import Cache, CachedTeacher
from radio_cache.storage.base import is_url


def build_commands(cache: Cache, out: str | None = None) -> list[list[str]]:
    """Return commands, each a list of words, which together build the same cache again.

    One command, or one for each set of teachers that ran in the same precision, batch size and mode: these are options of a
    whole build. Where the choice of the images is not recorded (the cache grew, or was copied), the images are named.

    Args:
        cache: the cache to describe.
        out: where to build; None for the path or URL of the cache itself.
    """
    # Options of a whole build cannot differ between teachers, so each set is a command.
    runs: dict[tuple[str, ...], list[str]] = {}
    for name in cache.teachers.names():
        runs.setdefault(tuple(_run_options(cache, name)), []).append(name)
    images = list(_image_options(cache))
    target = out or short_path(cache.url)
    return [
        ["radio-cache", "build", *images, *_teacher_options(cache, names), *options, "--out", target]
        for options, names in runs.items()
    ]


def short_path(path_or_url: Path | str) -> str:
    """Return a path relative to the current folder, if it lies below; a URL as it is."""
    if is_url(path_or_url):
        return str(path_or_url)
    absolute, folder = Path(path_or_url).absolute(), Path.cwd()
    return str(absolute.relative_to(folder)) if absolute.is_relative_to(folder) else str(path_or_url)


def _image_options(cache: Cache) -> Iterator[str]:
    """Yield the options for the images of a cache, and for how it stores them."""
    request = recorded_request(cache)
    if request is None:
        for container in cache.meta.containers:
            yield from ("--images", short_path(container.path))
    else:
        for source in request.sources:
            yield from ("--images", short_path(source))
        for pattern in request.selection.filters:
            yield from ("--filter", pattern)
        if request.selection.limit is not None:
            yield from ("--limit", str(request.selection.limit))
        if request.selection.shuffle_seed is not None:
            yield from ("--shuffle-seed", str(request.selection.shuffle_seed))
        if request.member:
            yield from ("--member", request.member)
    if cache.meta.max_pixels != BUILD_DEFAULTS["max_pixels"]:
        yield from ("--max-pixels", str(cache.meta.max_pixels))
    if cache.meta.shard_images != BUILD_DEFAULTS["shard_images"]:
        yield from ("--shard-images", str(cache.meta.shard_images))
    if cache.meta.pixels is not None:
        yield from ("--store-pixels", str(cache.meta.pixels.side_px), "--pixel-format", cache.meta.pixels.format)


def _run_options(cache: Cache, name: str) -> Iterator[str]:
    """Yield the options of a whole build that a teacher was made with."""
    spec = cache.teachers[name].spec
    yield from ("--dtype", spec.compute_dtype)
    batch = recorded_batch(cache, name)
    # The default is left out, so that the command stays short.
    if batch is not None and batch != BATCH_IMAGES:
        yield from ("--batch-size", str(batch))
    if COMPILED in spec.software:
        yield "--compile"
    if spec.view_sampling is not None and spec.view_sampling.flip_share > 0:
        yield "--flip-views"


def _teacher_options(cache: Cache, names: Sequence[str]) -> Iterator[str]:
    """Yield the teachers and the options of each."""
    for name in names:
        # The teacher itself comes first: further sizes are levels beside it.
        levels = sorted(cache.teachers.levels(name), key=lambda level: level.spec.level_of is not None)
        spec = levels[0].spec
        requested_name = recorded_name(spec)
        preset = TEACHERS.get(ALIASES.get(requested_name, requested_name))
        yield from ("--teacher", requested_name)
        weights = Path(spec.weights)
        if weights.is_absolute() or weights.is_file():  # a download is described, not named by a path
            yield from ("--weights", f"{requested_name}={weights}")
        sizes = [level.spec.geometry.input_hw[0] for level in levels]
        if preset is None or [preset.input_px] != sizes:
            for size_px in sizes:
                yield from ("--size", f"{requested_name}={size_px}")
        # The own fit of a library's model may be another one in another version.
        if preset is None or preset.fit != spec.geometry.fit:
            yield from ("--fit", f"{requested_name}={spec.geometry.fit}")
        if spec.views > 1:
            yield from ("--views", f"{requested_name}={spec.views - 1}")
        yield from _codec_options(requested_name, levels[0])


def _codec_options(requested_name: str, teacher: CachedTeacher) -> Iterator[str]:
    """Yield the options of a teacher's codec that differ from the default."""
    default = CodecRequest().to_json()
    request = teacher.spec.codec.request_json()
    if request["name"] != default["name"]:
        yield from ("--codec", f"{requested_name}={request['name']}")
    for option in ("packing", "fidelity", "step"):
        if option in request and request[option] != default.get(option):
            yield from (f"--{option}", f"{requested_name}={request[option]}")
