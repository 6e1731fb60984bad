"""A student in the place of a big model's image encoder, inside other people's libraries.

`sam_with_student` for segment-anything, `clip_with_student` for open_clip, `DinoV2Backbone` for code that wants DINOv2's
outputs, `llava_with_student` for Hugging Face's LLaVA (which `trainer.dropins.llava` holds, because only it needs
transformers). They take images as the library prepares them; the student's heads speak the teachers' units.
"""

from trainer.dropins.clip import ClipImageTower, clip_with_student
from trainer.dropins.dinov2 import DinoV2Backbone
from trainer.dropins.sam import SamImageEncoder, sam_with_student

__all__ = ["ClipImageTower", "DinoV2Backbone", "SamImageEncoder", "clip_with_student", "sam_with_student"]
