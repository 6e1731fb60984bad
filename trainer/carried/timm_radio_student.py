"""A distilled student as a model of timm: `timm.create_model("radio_student", student="e-radio-b", features_only=True)`.

Importing this file registers it; `timm.create_model("local-dir:FOLDER", pretrained=True)` then finds exported weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from trainer.students import STUDENTS, ERadio, ERadioConfig, ViT, create_student, refuse_foreign_code

__all__ = ["RadioStudent", "radio_student"]


@final
class RadioStudent(nn.Module):
    """A student with timm's methods. Images are RGB in [0, 1], which timm calls mean (0, 0, 0) and std (1, 1, 1).

    `forward_features` returns a ViT's class tokens and patches, (b, classes + n, c), and any other student's map
    (b, c, h, w). Intermediate features are those of a ViT's blocks, or of E-RADIO's four strides, of which stride 16
    is the map it was trained for, or one map.

    Args:
        student: name, as for `trainer.students.create_student`.
        overrides: settings, as for `trainer.students.create_student`.
        num_classes: of a new, untrained linear classifier on the summary; 0 returns the summary.
    """

    def __init__(
        self,
        student: str = "e-radio-tiny",
        overrides: Mapping[str, Any] | None = None,
        num_classes: int = 0,
        in_chans: int = 3,
        global_pool: str = "",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if in_chans != 3 or global_pool:
            raise ValueError(
                f"a student takes RGB images and pools itself, got in_chans={in_chans}, global_pool='{global_pool}'"
            )
        refuse_foreign_code(student)  # the name may come from a config.json
        self.student = create_student(student, **(overrides or {}))
        self.num_features = self.head_hidden_size = self.student.summary_dim
        self.num_prefix_tokens = self.student.num_summary_tokens if isinstance(self.student, ViT) else 0
        self.head_drop = nn.Dropout(drop_rate)
        # timm's `features_only` wrapper reads this attribute of the model.
        self.feature_info = _feature_info(self.student)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes`, or by none for 0."""
        del global_pool  # a student pools itself
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        summary, spatial = self.student(x, feature_fmt="NLC" if self.num_prefix_tokens else "NCHW")
        if not self.num_prefix_tokens:
            return spatial
        # (b, k * c) -> (b, k, c), in front of the patches: (b, k + n, c)
        return torch.cat([summary.unflatten(1, (self.num_prefix_tokens, -1)), spatial], dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        summary = self.head_drop(
            # (b, k + n, c) -> (b, k * c), or (b, c, h, w) -> (b, c)
            x[:, : self.num_prefix_tokens].flatten(1) if self.num_prefix_tokens else x.mean((2, 3))
        )
        return summary if pre_logits else self.head(summary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head_drop(self.student(x).summary))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the feature maps with these indices (a number: the last ones), and the result of `forward_features`."""
        del norm, stop_early  # a student has no final norm; it runs no further than it must
        if output_fmt != "NCHW":
            raise ValueError(f"intermediate features are maps 'NCHW', not '{output_fmt}'")
        listed = indices if indices is None or isinstance(indices, int) else list(indices)
        taken, _ = feature_take_indices(len(self.feature_info), listed)
        match self.student:
            case ViT():
                maps = [out.spatial for out in self.student.intermediates(x, taken, feature_fmt="NCHW")]
            case ERadio():
                stages = self.student.stages(x)
                maps = [stages[index] for index in taken]
            case _:
                maps = [self.student(x, feature_fmt="NCHW").spatial]
        return maps if intermediates_only else (self.forward_features(x), maps)


def _feature_info(student: nn.Module) -> list[dict[str, Any]]:
    match student:
        case ViT():
            kinds = [
                (f"student.blocks.{block}", student.embed_dim, student.patch_size)
                for block in range(student.config.depth)
            ]
        case ERadio():
            kinds = [
                ("student.conv_stages.0", student.config.width, 4),
                ("student.conv_stages.2", 2 * student.config.width, 8),
                ("student.neck" if student.patch_size == 16 else "student.stage2", student.stage_widths[2], 16),
                ("student.stage3", student.stage_widths[3], 32),
            ]
        case _:
            kinds = [("student", student.embed_dim, student.patch_size)]
    return [{"module": module, "num_chs": width, "reduction": stride} for module, width, stride in kinds]


def _config(num_classes: int = 0) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": None,
        "classifier": "head",
    }


default_cfgs = {"radio_student": _config()}


@register_model
def radio_student(pretrained: bool = False, **kwargs: Any) -> Any:
    """Any student of radio-cache: student="e-radio-b", overrides={...}."""
    # E-RADIO has maps of four strides, as convolutional networks of timm; the others have one.
    pyramid = isinstance(STUDENTS.get(kwargs.get("student", "e-radio-tiny")), ERadioConfig)
    feature_cfg = {"feature_cls": "getter", "out_indices": 4 if pyramid else 1}
    return build_model_with_cfg(RadioStudent, "radio_student", pretrained, feature_cfg=feature_cfg, **kwargs)
