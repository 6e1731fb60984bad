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
    """What `SamPredictor` calls: images as SAM prepares them -> the map its decoder reads, (b, c, rows, columns).

    img_size: side of SAM's padded square, in pixels. grid_hw: of the decoder; the student's map is resized to it bilinearly.
    """

    def __init__(self, student: StudentAsTeacher, *, img_size: int, grid_hw: tuple[int, int]) -> None:
        super().__init__()
        self.student, self.img_size, self.grid_hw = student, img_size, grid_hw

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c h w"]:
        maps = self.student(images).spatial
        if tuple(maps.shape[-2:]) != self.grid_hw:
            maps = F.interpolate(maps, self.grid_hw, mode="bilinear", align_corners=False)
        return maps


def sam_with_student(sam: Sam, model: DistilledStudent, teacher: str, *, image_px: int | None = None) -> Sam:
    """SAM with a student for its image encoder; prompt encoder and mask decoder are SAM's own, and shared with it.

    teacher: the head that learned SAM's features after the neck. image_px: side of the padded square the student is shown;
    by default SAM's own (1024), or the nearest the student takes. Raises ConfigError for a head of another width.
    """
    spatial_dim, decoder_dim = widths(model, teacher).spatial_dim, int(sam.mask_decoder.transformer_dim)
    if spatial_dim != decoder_dim:
        raise ConfigError(
            f"the head for '{teacher}' gives {spatial_dim} channels, SAM's mask decoder reads {decoder_dim}: "
            "take the head of a SAM whose features after the neck were cached"
        )
    # SAM standardises pixels from 0 to 255.
    numbers = cast(tuple[Tensor, Tensor], (sam.pixel_mean, sam.pixel_std))
    mean, std = ([value / 255 for value in number.flatten().tolist()] for number in numbers)
    student = StudentAsTeacher(
        model, teacher, mean=mean, std=std, image_hw=None if image_px is None else (image_px, image_px)
    )
    rows, columns = (int(side) for side in sam.prompt_encoder.image_embedding_size)
    encoder = SamImageEncoder(student, img_size=int(sam.image_encoder.img_size), grid_hw=(rows, columns))
    return with_part(sam, "image_encoder", encoder.to(numbers[0].device))
