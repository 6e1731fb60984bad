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
    """distilled: what the student is (`StudentConfig` as JSON). adaptors: the teachers whose features are given, or "all"."""

    model_type = "radio-student"

    def __init__(
        self, distilled: dict[str, Any] | None = None, adaptors: Sequence[str] | Literal["all"] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.distilled = distilled
        self.adaptors = adaptors if isinstance(adaptors, str) else list(adaptors)


@final
class RadioStudentModel(PreTrainedModel):
    """`model(pixel_values)` gives summary and spatial features; with adaptors a dict with `backbone` and each teacher,
    `pooler_output` and `last_hidden_state` (the student's summary and spatial features).

    pixel_values (b, 3, h, w): RGB in [0, 1]; the student standardises colours itself.
    """

    config_class = RadioStudentConfig
    base_model_prefix = "distilled"
    main_input_name = "pixel_values"

    def __init__(self, config: RadioStudentConfig) -> None:
        super().__init__(config)
        assert config.distilled is not None, "the configuration says nothing of a student: was it read from a folder?"
        self.distilled = build_distilled(StudentConfig.from_json(config.distilled))
        self.distilled.use_heads(config.adaptors if config.adaptors == "all" else tuple(config.adaptors))
        save_constants(self.distilled)
        self.post_init()

    def forward(self, pixel_values: Tensor, feature_fmt: FeatureFormat = "NLC") -> Features | ModelOutput:
        """The student's features; with adaptors a dict, in which transformers' own names stand for the student's, too."""
        out: Features = self.distilled(pixel_values, feature_fmt=feature_fmt)
        if isinstance(out, StudentOutput):
            return out
        own = out[BACKBONE]
        # Pipelines take the first value, or the one called pooler_output, and both have to be tensors.
        return ModelOutput({"pooler_output": own.summary, "last_hidden_state": own.spatial, **out})

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every layer has its weights from its constructor, or from the file."""


def take_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict that may lack the constants of `save_constants`, which a model has from its constructor."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    constants = {name for name, _ in model.named_buffers()}
    assert not unexpected, unexpected
    assert set(missing) <= constants, missing


def save_constants(model: nn.Module) -> None:
    """Have the file hold constants too: transformers builds models without memory and fills in only what is in it."""
    for module in model.modules():
        module._non_persistent_buffers_set.clear()  # pyright: ignore[reportPrivateUsage]  # torch has no other way
