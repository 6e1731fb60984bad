"""A student's SAM head in the place of segment-anything's image encoder: its predictor and mask generator work unchanged."""

from typing import cast, final

import torch.nn.functional as F
from jaxtyping import Float
from segment_anything.modeling import Sam
from torch import Tensor, nn

from radio_cache.errors import ConfigError
from trainer.dropins.part import StudentAsTeacher, widths, with_part
from trainer.model.student import DistilledStudent


@final
class SamImageEncoder(nn.Module):
    """The encoder that `SamPredictor` calls: images as SAM prepares them -> the decoder's map (b, c, rows, columns).

    Attributes:
        img_size: side of SAM's padded square, in pixels.
        grid_hw: of the decoder. The student's map is resized to it bilinearly.
    """

    def __init__(self, student: StudentAsTeacher, *, img_size: int, grid_hw: tuple[int, int]) -> None:
        super().__init__()
        self.student, self.img_size, self.grid_hw = student, img_size, grid_hw

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c h w"]:
        maps = self.student(images).spatial
        # The mask decoder adds the prompts' dense embedding to the map, so the grids must be equal.
        if tuple(maps.shape[-2:]) != self.grid_hw:
            maps = F.interpolate(maps, self.grid_hw, mode="bilinear", align_corners=False)
        return maps


def sam_with_student(sam: Sam, model: DistilledStudent, teacher: str, *, image_px: int | None = None) -> Sam:
    """Return SAM with a student as its image encoder. Prompt encoder and mask decoder are shared with `sam`.

    Args:
        sam: of segment-anything.
        model: the student.
        teacher: the head that learned SAM's features after the neck.
        image_px: side of the padded square that the student takes; by default SAM's own (1024), or the nearest accepted size.

    Raises:
        ConfigError: for a head of another width.
    """
    spatial_dim, decoder_dim = widths(model, teacher).spatial_dim, int(sam.mask_decoder.transformer_dim)
    if spatial_dim != decoder_dim:
        raise ConfigError(
            f"the head for '{teacher}' gives {spatial_dim} channels, SAM's mask decoder reads {decoder_dim}: "
            "take the head of a SAM whose features after the neck were cached"
        )
    # SAM standardises pixels from 0 to 255.
    scalars = cast(tuple[Tensor, Tensor], (sam.pixel_mean, sam.pixel_std))
    mean, std = ([value / 255 for value in number.flatten().tolist()] for number in scalars)
    student = StudentAsTeacher(
        model, teacher, mean=mean, std=std, image_hw=None if image_px is None else (image_px, image_px)
    )
    rows, columns = (int(side) for side in sam.prompt_encoder.image_embedding_size)
    encoder = SamImageEncoder(student, img_size=int(sam.image_encoder.img_size), grid_hw=(rows, columns))
    return with_part(sam, "image_encoder", encoder.to(scalars[0].device))
