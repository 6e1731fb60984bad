"""A distilled student as a model of Hugging Face transformers: `AutoModel.from_pretrained(folder, trust_remote_code=True)`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from trainer.model.adaptors import BACKBONE
from trainer.model.student import Features, StudentConfig, build_distilled
from trainer.students.base import FeatureFormat, StudentOutput


@final
class RadioStudentConfig(PretrainedConfig):
    """The configuration of a student in transformers.

    Attributes:
        distilled: `StudentConfig` as JSON.
        adaptors: teachers whose features the model returns, or "all".
    """

    model_type = "radio-student"

    def __init__(
        self, distilled: dict[str, Any] | None = None, adaptors: Sequence[str] | Literal["all"] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.distilled = distilled
        self.adaptors = adaptors if isinstance(adaptors, str) else list(adaptors)


@final
class RadioStudentModel(PreTrainedModel):
    """A student in transformers: `model(pixel_values)` returns summary and spatial features.

    With adaptors it returns a dict with `backbone`, each teacher, and `pooler_output` and `last_hidden_state` (the student's
    summary and spatial features).

    pixel_values (b, 3, h, w): RGB in [0, 1]. The student standardises colours itself.
    """

    config_class = RadioStudentConfig
    base_model_prefix = "distilled"
    main_input_name = "pixel_values"

    def __init__(self, config: RadioStudentConfig) -> None:
        super().__init__(config)
        assert config.distilled is not None, "the configuration has no student: read it from an exported folder"
        self.distilled = build_distilled(StudentConfig.from_json(config.distilled))
        self.distilled.use_heads(config.adaptors if config.adaptors == "all" else tuple(config.adaptors))
        save_constants(self.distilled)
        self.post_init()

    def forward(self, pixel_values: Tensor, feature_fmt: FeatureFormat = "NLC") -> Features | ModelOutput:
        """Return the student's features, or with adaptors a dict that has them under transformers' own names, too."""
        out: Features = self.distilled(pixel_values, feature_fmt=feature_fmt)
        if isinstance(out, StudentOutput):
            return out
        backbone = out[BACKBONE]
        # Pipelines take the first value, or the one called pooler_output, and both must be tensors.
        return ModelOutput({"pooler_output": backbone.summary, "last_hidden_state": backbone.spatial, **out})

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: layers get their weights from their constructors or from the file."""


def take_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict that may lack the constants of `save_constants`, which constructors set."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    constants = {name for name, _ in model.named_buffers()}
    # Only constants may be missing. A missing parameter would keep its random first value unnoticed.
    assert not unexpected, unexpected
    assert set(missing) <= constants, missing


def save_constants(model: nn.Module) -> None:
    """Make the file hold constants, too: transformers builds models on the meta device and fills in only the file's tensors."""
    for module in model.modules():
        module._non_persistent_buffers_set.clear()  # pyright: ignore[reportPrivateUsage]  # torch has no other way
