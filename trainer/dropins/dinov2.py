"""A student with the outputs of DINOv2, for code written for facebookresearch's models: `forward_features` and friends."""

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from radio_cache.errors import ConfigError
from trainer.dropins.part import StudentAsTeacher, widths
from trainer.model.adaptors import BACKBONE
from trainer.model.student import DistilledStudent

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@final
class DinoV2Backbone(nn.Module):
    """A student with the methods of DINOv2's backbones.

    `forward` returns the class token (b, c). `forward_features` returns a dict with `x_norm_clstoken` (b, c),
    `x_norm_patchtokens` (b, n, c) row-major, and no register tokens, `x_norm_regtokens` (b, 0, c). Images are
    standardised with ImageNet's colours, as for DINOv2. Sizes that the student does not accept are resized to the nearest.

    Args:
        model: the student.
        teacher: the head of a DINOv2, or "backbone" for the student's own features (whose class token may be wider).

    Raises:
        ConfigError: for a teacher without summaries.
    """

    def __init__(self, model: DistilledStudent, teacher: str = BACKBONE) -> None:
        super().__init__()
        known = widths(model, teacher)
        if known.summary_dim is None:
            raise ConfigError(f"the head for '{teacher}' gives no summary, which DINOv2's class token stands for")
        self.student = StudentAsTeacher(model, teacher, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        self.embed_dim = self.num_features = known.spatial_dim
        self.num_register_tokens = 0
        self.patch_size = model.patch_size if teacher == BACKBONE else model.patch_size // model.adaptors.upsample

    def forward_features(self, x: Float[Tensor, "b 3 h w"], masks: Tensor | None = None) -> dict[str, Tensor | None]:
        """Return DINOv2's dict of features.

        Raises:
            ConfigError: for masks, since a student has no mask token.
        """
        if masks is not None:
            raise ConfigError("a student has no mask token: forward_features takes no masks")
        out = self.student(x)
        # (b, c, h, w) -> (b, n, c)
        patches = out.spatial.flatten(2).transpose(1, 2)
        return {
            "x_norm_clstoken": out.summary,
            "x_norm_patchtokens": patches,
            # (b, 0, c): code that concatenates register tokens keeps working.
            "x_norm_regtokens": patches[:, :0],
            "masks": None,
        }

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        summary = self.student(x).summary
        assert summary is not None  # the constructor checks it
        return summary

    def get_intermediate_layers(
        self,
        x: Float[Tensor, "b 3 h w"],
        n: int = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Return the last layer, the only one that a head predicts: tokens, or maps with `reshape`, and perhaps the class token.

        Raises:
            ConfigError: for more than one layer.
        """
        del norm  # heads learned DINOv2's features behind its norm
        if n != 1:
            raise ConfigError(f"a student stands for DINOv2's last layer alone, not for n={n}")
        out = self.student(x)
        spatial = out.spatial if reshape else out.spatial.flatten(2).transpose(1, 2)
        assert out.summary is not None  # the constructor checks it
        return ((spatial, out.summary),) if return_class_token else (spatial,)
