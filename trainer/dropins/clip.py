"""A student's CLIP head in the place of open_clip's image tower: its text tower and zero-shot classifiers work unchanged."""

from typing import Any, final

import open_clip
from jaxtyping import Float
from torch import Tensor, nn

from radio_cache.errors import ConfigError
from trainer.dropins.part import StudentAsTeacher, widths, with_part
from trainer.model.student import DistilledStudent


@final
class ClipImageTower(nn.Module):
    """The tower that `encode_image` calls: images as open_clip prepares them -> image embeddings (b, c), not normalised.

    preprocess_cfg: open_clip's description of how images are prepared, of which `open_clip.transform.image_transform_v2` makes a
    transform; the student standardises colours itself, and undoes theirs first.
    """

    def __init__(self, student: StudentAsTeacher, *, preprocess_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.student, self.preprocess_cfg = student, preprocess_cfg
        self.image_size, self.image_mean, self.image_std = (preprocess_cfg[key] for key in ("size", "mean", "std"))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        summary = self.student(images).summary
        assert summary is not None  # the constructor's caller checked the teacher
        return summary


def clip_with_student(
    clip: nn.Module, model: DistilledStudent, teacher: str, *, image_hw: tuple[int, int] | None = None
) -> Any:
    """Return a CLIP of open_clip with a student as its image tower. The text tower is shared with `clip`.

    Images are prepared by the new tower's `preprocess_cfg`: as for the CLIP itself, and at the student's size if both take the
    same part of a photo.

    Args:
        clip: of open_clip.
        model: the student.
        teacher: the head that learned this CLIP's embeddings.
        image_hw: input size of the student, in pixels; by default its training size.

    Raises:
        ConfigError: for a head of another width.
    """
    sized = model.config.image_hw if image_hw is None else image_hw
    summary_dim, text_dim = widths(model, teacher).summary_dim, _text_dim(clip)
    if summary_dim is None or summary_dim != text_dim:
        raise ConfigError(
            f"the head for '{teacher}' gives {'no summary' if summary_dim is None else f'summaries of {summary_dim} values'}, "
            f"this CLIP's text embeddings have {text_dim}: take the CLIP that was the teacher"
        )
    config = dict(open_clip.get_model_preprocess_cfg(clip))
    mean, std = (
        config.setdefault("mean", open_clip.OPENAI_DATASET_MEAN),
        config.setdefault("std", open_clip.OPENAI_DATASET_STD),
    )
    same_view = {"crop": "shortest", "squash": "squash"}[model.config.fit] == config.get("resize_mode")
    if same_view and model.config.centre_share == 1 and sized[0] == sized[1]:
        # Prepared at the student's own size, its pixels are those that it was trained with; else they would be resized twice.
        config |= {"size": sized[0], "interpolation": "bicubic"}
    student = StudentAsTeacher(model, teacher, mean=mean, std=std, image_hw=sized)
    return with_part(clip, "visual", ClipImageTower(student, preprocess_cfg=config))


def _text_dim(clip: Any) -> int:
    """Return the width of the text embeddings: of a projection that is a matrix, a Linear, or missing."""
    text = getattr(clip, "text", clip)
    projection = text.text_projection
    if isinstance(projection, nn.Linear):
        return projection.out_features
    return int(text.ln_final.weight.shape[0] if projection is None else projection.shape[1])
