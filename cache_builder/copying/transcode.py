"""Transcoding of a klt teacher to another packing: the codec of the copy, and its codes.

The packings share the basis and nothing else. Packed codes are levels of Lloyd's tables times a gain of each token,
zstd codes are multiples of one step, and ans codes are coefficients of a DCT. So transcoding rounds a second time. The cost is
measured and recorded (docs/design/006-copies.md).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_builder.pipeline.calibrate import SampledMaps, sample_rows
from radio_cache.codecs import label_of
from radio_cache.codecs.base import Codec, Transcodable
from radio_cache.codecs.calibrate import CodecRequest, calibrate, packings
from radio_cache.errors import CodecError, MissingRowsError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.transcoding import Transcoding
from radio_cache.geometry.crops import valid_tokens
from radio_cache.reader import Cache, CachedTeacher
from radio_cache.statistics.fidelity import token_errors

EXTRA_LOSS = 0.25
"""Additional loss that transcoding may cause by default, as a share of the source's loss (1 - cosine)."""

_UNMEASURED_LOSS = 0.0025
"""Allowed loss (1 - cosine) where the source recorded no fidelity."""

_SAMPLE_IMAGES = 256
_SAMPLE_TOKENS = 32_768
_HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class TranscodingPlan:
    """The transcoding of one teacher.

    Attributes:
        request: the codec of the copy.
        conversion: the source's codec label and fidelity, as recorded in the copy.
    """

    request: CodecRequest
    conversion: Transcoding

    def record(self) -> CodecRecord:
        """Return the copy's codec record without parameters, which is equal on every run of the same command."""
        return CodecRecord(request=self.request.to_json(), transcoded_from=self.conversion.to_json())


def plan_transcoding(teacher: CachedTeacher, packing: str | None, fidelity: float | None) -> TranscodingPlan | None:
    """Return the plan to transcode a teacher to `packing`, or None if its codes stay unchanged.

    Args:
        teacher: of the source.
        packing: requested packing; None keeps the stored one.
        fidelity: mean cosine with the stored maps; None allows `EXTRA_LOSS` of the loss recorded in the source.
    """
    codec = teacher.codec
    if packing is None or codec.transcodable is None or packing not in packings(codec.name):
        return None
    if packing == teacher.spec.codec.label.partition("/")[2]:
        return None
    source_fidelity = teacher.fidelity()
    if fidelity is None:
        loss = EXTRA_LOSS * (1 - source_fidelity.cosine) if source_fidelity else _UNMEASURED_LOSS
        # A loss of 0 would request a fidelity of 1, which no quantiser reaches.
        fidelity = round(1 - min(max(loss, 1e-5), 0.5), 6)
    # A repeated command compares this request with the stored one, so both hold only values that JSON preserves.
    return TranscodingPlan(
        CodecRequest(name=codec.name, packing=packing, fidelity=fidelity),
        Transcoding(
            source=teacher.spec.codec.label, fidelity=source_fidelity and replace(source_fidelity, variance=0.0)
        ),
    )


def choose_codec(source: Cache, name: str, transcoding: TranscodingPlan) -> tuple[Codec, CodecRecord, str]:
    """Calibrate the codec of the copy, in the source's basis, on a seeded sample of the stored maps.

    Returns:
        The codec, its record in the spec, and a progress message.

    Raises:
        CodecError: if the fidelity is out of reach.
        MissingRowsError: if there is no token to encode.
    """
    teacher = source.teachers[name]
    codec = teacher.codec.transcodable
    assert codec is not None, "only teachers that can be transcoded have a TranscodingPlan"
    # Seeded by the name: an interrupted and repeated command calibrates the same codec.
    rows = sample_rows(source.usable_rows([name]), _SAMPLE_IMAGES, name)
    held_out_images = max(1, round(_HELD_OUT_SHARE * len(rows)))
    tokens_per_image = max(1, _SAMPLE_TOKENS // max(1, len(rows)))
    sampled_tokens: list[NDArray[np.float32]] = []
    maps = SampledMaps() if transcoding.request.codec_class.needs == "maps" else None
    for batch_rows in teacher.batches(rows):
        on_image = tokens_on_images(source, teacher, list(batch_rows))
        for row, coordinates, mask in zip(
            batch_rows, codec.coordinates(teacher.codes(batch_rows)), on_image, strict=True
        ):
            tokens = coordinates[mask]  # (h, w, c) -> (tokens on the image, c)
            if maps is not None:
                maps.add(coordinates, mask, held_out=len(sampled_tokens) < held_out_images)
            # Seeded per row, so that the sample does not depend on how rows fall into batches.
            sampled_tokens.append(tokens[np.random.default_rng((0, row)).permutation(len(tokens))[:tokens_per_image]])
    if not any(map(len, sampled_tokens)):
        raise MissingRowsError(
            f"{source.url}, teacher '{name}': no usable image has a token on its grid, so that the new codec cannot be "
            "calibrated: copy it without --packing"
        )
    # Split by image: tokens of one image resemble each other, and would make the held-out cosine too high.
    # A single image serves as both.
    held_out, calibration_tokens = (
        np.concatenate(sampled_tokens[:held_out_images]),
        np.concatenate(sampled_tokens[held_out_images:] or sampled_tokens),
    )
    try:
        # In the source's basis, so that only the quantisation changes and no second rotation adds error.
        calibrated = calibrate(
            transcoding.request,
            None,
            calibration_tokens,
            held_out,
            basis=codec.basis,
            maps=maps and maps.sample(),
        )
    except CodecError as exc:
        raise CodecError(f"{source.url}, teacher '{name}': {exc}") from exc
    chosen = calibrated.codec
    record = {
        "images": len(rows),
        "tokens": len(calibration_tokens) + len(held_out),
        "seed": 0,
        **calibrated.fidelity.to_json(),
    }
    note = (
        f"{name}: transcoding {transcoding.conversion.source} to {label_of(chosen)} is lossy. The copy has a mean cosine of "
        f"{calibrated.fidelity.cosine:.4f} with the stored maps"
    )
    source_fidelity = transcoding.conversion.fidelity
    if source_fidelity:
        # Measured against the stored maps only: the cosine with the teacher is estimated by the product.
        combined = source_fidelity.cosine * calibrated.fidelity.cosine
        note += f", and of about {combined:.4f} with the teacher (the source: {source_fidelity.cosine:.4f})"
    return chosen, replace(transcoding.record(), parameters=chosen.to_json(), calibration=record), note


@dataclass(frozen=True)
class TranscodedShard:
    """Codes of the new codec, compared with the stored maps.

    Attributes:
        codes: (m, *row_shape) of the new codec.
        cosines: (n,) of the valid tokens.
        squared_errors: (n,) of the valid tokens.
    """

    codes: NDArray[Any]
    cosines: NDArray[np.float64]
    squared_errors: NDArray[np.float64]


def transcode(
    old: Transcodable, new: Transcodable, codes: NDArray[Any], on_image: NDArray[np.bool_]
) -> TranscodedShard:
    """Transcode stored codes to another packing of the same basis.

    Args:
        old: codec of the codes.
        new: codec of the result, with the basis of `old`.
        codes: (m, *row_shape).
        on_image: (m, h, w), True for tokens that show the image; the others are not compared.
    """
    stored = old.coordinates(codes)  # (m, h, w, c), in the klt basis
    new_codes = new.codes_of(stored)
    # The rotation preserves angles, so that cosines need no inverse rotation; coordinates are centred, features are not.
    mean = old.basis.rotated_mean
    cosines, squared_errors = token_errors(stored[on_image] + mean, new.coordinates(new_codes)[on_image] + mean)
    # Coordinates are in units of phi; errors are recorded in those of the features.
    return TranscodedShard(new_codes, cosines, squared_errors * old.basis.phi**2)


def tokens_on_images(cache: Cache, teacher: CachedTeacher, rows: list[int]) -> NDArray[np.bool_]:
    """Return the mask (len(rows), grid_h, grid_w) of the tokens that show the image."""
    return np.stack([valid_tokens((int(h), int(w)), teacher.spec.geometry) for h, w in cache.sizes_hw[rows]])
