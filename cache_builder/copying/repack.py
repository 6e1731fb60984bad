"""A klt teacher in the other packing: the codec its copy gets, and the codes from those that are stored.

The two packings share the basis and nothing else. Packed codes name levels of Lloyd's tables times a gain of each token,
zstd codes are multiples of one step: a value of the one is none of the other, so that going over rounds once more. What that
costs is measured, and told (docs/design/006-copies.md).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_builder.pipeline.calibrate import sample_rows
from radio_cache.codecs import label_of
from radio_cache.codecs.base import Codec, Repackable
from radio_cache.codecs.calibrate import CodecRequest, calibrate, packings
from radio_cache.errors import CodecError, MissingRowsError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.transcoding import Conversion
from radio_cache.geometry.crops import valid_tokens
from radio_cache.reader import Cache, CachedTeacher
from radio_cache.statistics.fidelity import token_errors

EXTRA_LOSS = 0.25
"""Encoding again may lose this part of what was lost before, unless a fidelity is asked for."""

_UNMEASURED = 0.0025
_SAMPLE_IMAGES = 256
_SAMPLE_TOKENS = 32_768
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Repacking:
    """request: of the codec that is wanted. conversion: what the teacher's maps are decoded from."""

    request: CodecRequest
    conversion: Conversion

    def record(self) -> CodecRecord:
        """Return the copy's codec record without parameters: the same on every run of the same command."""
        return CodecRecord(request=self.request.to_json(), transcoded_from=self.conversion.to_json())


def repacking_of(teacher: CachedTeacher, packing: str | None, fidelity: float | None) -> Repacking | None:
    """How this teacher comes to the packing that is asked for; None where its codes can stay as they are."""
    codec = teacher.codec
    if packing is None or codec.repackable is None or packing not in packings(codec.name):
        return None
    if packing == teacher.spec.codec.label.partition("/")[2]:
        return None
    kept = teacher.fidelity()
    if fidelity is None:
        loss = EXTRA_LOSS * (1 - kept.cosine) if kept else _UNMEASURED
        fidelity = round(1 - min(max(loss, 1e-5), 0.5), 6)
    # The same command must find its own words again, and JSON keeps no tuple and no type of ours.
    return Repacking(
        CodecRequest(name=codec.name, packing=packing, fidelity=fidelity),
        Conversion(source=teacher.spec.codec.label, fidelity=kept and replace(kept, variance=0.0)),
    )


def choose_codec(source: Cache, name: str, repacking: Repacking) -> tuple[Codec, CodecRecord, str]:
    """The codec that keeps what was asked for, what its spec records, and a sentence for the user.

    In the source's own basis, from a seeded sample of what it stores. Raises CodecError if the fidelity is out of reach,
    MissingRowsError if there is no token to encode.
    """
    teacher = source.teachers[name]
    codec = teacher.codec.repackable
    assert codec is not None, "only teachers that can be repacked have a Repacking"
    rows = sample_rows(source.usable_rows([name]), _SAMPLE_IMAGES, name)
    held_out_images = max(1, round(_HELD_OUT * len(rows)))
    most = max(1, _SAMPLE_TOKENS // max(1, len(rows)))
    kept: list[NDArray[np.float32]] = []
    for some in teacher.batches(rows):
        on_image = tokens_on_images(source, teacher, list(some))
        for row, coordinates, mask in zip(some, codec.coordinates(teacher.codes(some)), on_image, strict=True):
            tokens = coordinates[mask]
            kept.append(tokens[np.random.default_rng((0, row)).permutation(len(tokens))[:most]])
    if not any(map(len, kept)):
        raise MissingRowsError(
            f"{source.url}, teacher '{name}': no image is usable and has a token, so that nothing can be encoded again: copy it "
            "without --packing"
        )
    held_out, seen = np.concatenate(kept[:held_out_images]), np.concatenate(kept[held_out_images:] or kept)
    try:
        found = calibrate(repacking.request, None, seen, held_out, basis=codec.basis)
    except CodecError as exc:
        raise CodecError(f"{source.url}, teacher '{name}': {exc}") from exc
    chosen = found.codec
    record = {"images": len(rows), "tokens": len(seen) + len(held_out), "seed": 0, **found.fidelity.to_json()}
    note = (
        f"{name}: {repacking.conversion.source} does not become {label_of(chosen)} without loss. What is stored is "
        f"encoded again, and keeps a mean cosine of {found.fidelity.cosine:.4f} with it"
    )
    before = repacking.conversion.fidelity
    if before:
        note += f"; of the teacher about {before.cosine * found.fidelity.cosine:.4f} are left, of {before.cosine:.4f}"
    return chosen, replace(repacking.record(), parameters=chosen.to_json(), calibration=record), note


@dataclass(frozen=True)
class Repacked:
    """codes (m, *row_shape) of the new codec; cosines and squared_errors (n,), of the tokens that show the image, beside what
    was stored before."""

    codes: NDArray[Any]
    cosines: NDArray[np.float64]
    squared_errors: NDArray[np.float64]


def repack(old: Repackable, new: Repackable, codes: NDArray[Any], on_image: NDArray[np.bool_]) -> Repacked:
    """Stored codes (m, *row_shape) of one packing in the other, both of the same basis. on_image (m, h, w)."""
    true = old.coordinates(codes)
    made = new.codes_of(true)
    mean = old.basis.rotated_mean
    cosines, squared_errors = token_errors(true[on_image] + mean, new.coordinates(made)[on_image] + mean)
    return Repacked(made, cosines, squared_errors * old.basis.phi**2)


def tokens_on_images(cache: Cache, teacher: CachedTeacher, rows: list[int]) -> NDArray[np.bool_]:
    """(len(rows), grid_h, grid_w): tokens that show the image."""
    return np.stack([valid_tokens((int(h), int(w)), teacher.spec.geometry) for h, w in cache.sizes_hw[rows]])
