"""A frozen student as the vision tower of Hugging Face's LLaVA: the language model reads its patch features.

Importing this file registers the tower with transformers' auto classes, so that a LLaVA with it is saved and loaded like any
other. Needs transformers.
"""

from typing import Any, Protocol, cast, final

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trainer.carried.modeling_radio_student import save_constants, take_weights
from trainer.dropins.part import StudentAsTeacher, widths
from trainer.exports.preprocessing import image_processor_settings
from trainer.model.adaptors import BACKBONE
from trainer.model.student import STARTING_SETTINGS, DistilledStudent, StudentConfig, build_distilled

IMAGE_TOKEN = "<image>"
"""The placeholder of a picture in LLaVA's prompts."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The prompt format that LLaVA-1.5 was trained with: pictures first, then the text, between USER: and ASSISTANT:."""


class LanguageModel(Protocol):
    """The used parts of a causal language model of transformers: its decoder, and the layer from states to logits."""

    config: Any
    model: nn.Module
    lm_head: nn.Linear


@final
class StudentTowerConfig(PretrainedConfig):
    """The configuration of a student as a vision tower.

    Attributes:
        distilled: `StudentConfig` as JSON.
        teacher: name of the head whose features the tower returns, or "backbone".
    """

    model_type = "radio-student-tower"

    def __init__(
        self,
        distilled: dict[str, Any] | None = None,
        teacher: str = BACKBONE,
        hidden_size: int = 0,
        patch_size: int = 0,
        image_size: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.distilled, self.teacher = distilled, teacher
        self.hidden_size, self.patch_size, self.image_size = hidden_size, patch_size, image_size


@final
class StudentTower(PreTrainedModel):
    """Images (b, 3, h, w), RGB in [0, 1] -> one hidden state, the patch features (b, n, c), and the summary beside it."""

    config_class = StudentTowerConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"

    def __init__(self, config: StudentTowerConfig) -> None:
        super().__init__(config)
        assert config.distilled is not None
        model = build_distilled(StudentConfig.from_json(config.distilled))
        # The student standardises colours, and transformers' processor for an exported student does not.
        self.tower = StudentAsTeacher(model, config.teacher, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        save_constants(self.tower)
        self.post_init()

    def forward(
        self, pixel_values: Float[Tensor, "b 3 h w"], return_dict: bool = True, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return transformers' output. Its hidden states are always a tuple of one."""
        del return_dict, kwargs  # they select layers, and there is only one
        out = self.tower(pixel_values.to(self.tower.mean.dtype))
        # (b, c, h, w) -> (b, n, c)
        tokens = out.spatial.flatten(2).transpose(1, 2)
        hidden = cast(tuple[torch.FloatTensor, ...], (tokens,))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=out.summary, hidden_states=hidden)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: layers get their weights from their constructors or from the file."""


AutoConfig.register(StudentTowerConfig.model_type, StudentTowerConfig)
AutoModel.register(StudentTowerConfig, StudentTower)


def tower_config(model: DistilledStudent, teacher: str = BACKBONE) -> StudentTowerConfig:
    """Return transformers' configuration of a student at its training size.

    Raises:
        ConfigError: for a teacher without a head.
    """
    fields = model.config.to_json()
    fields["overrides"] = {key: value for key, value in fields["overrides"].items() if key not in STARTING_SETTINGS}
    factor = 1 if teacher == BACKBONE else model.adaptors.upsample
    return StudentTowerConfig(
        distilled=fields,
        teacher=teacher,
        hidden_size=widths(model, teacher).spatial_dim,
        patch_size=model.patch_size // factor,
        image_size=max(model.config.image_hw),
    )


def llava_with_student(
    model: DistilledStudent, language_model: LanguageModel, *, image_token_id: int, teacher: str = BACKBONE
) -> LlavaForConditionalGeneration:
    """Build a LLaVA of a frozen student and a language model, with their weights and a new projector between them.

    Args:
        model: the student.
        language_model: a causal language model of transformers.
        image_token_id: token that represents a patch in prompts. An image has `image_seq_length` of them.
        teacher: name of the head whose features the tower returns, or "backbone".
    """
    vision, (h, w) = tower_config(model, teacher), model.config.image_hw
    config = LlavaConfig(
        vision_config=vision,
        text_config=language_model.config,
        image_token_index=image_token_id,
        # The last hidden state, in full: the tower has no class token to leave out.
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(h // vision.patch_size) * (w // vision.patch_size),
    )
    llava = LlavaForConditionalGeneration(config)
    inner: Any = llava.model
    # Copied into the model that transformers built, so that saving and loading work as for any LLaVA.
    take_weights(inner.vision_tower.tower.student, model.state_dict())
    # The student stays frozen, and the new projector learns to read it.
    inner.vision_tower.requires_grad_(False)
    inner.language_model.load_state_dict(language_model.model.state_dict())
    llava.lm_head.load_state_dict(language_model.lm_head.state_dict())
    return llava


def llava_processor(
    model: DistilledStudent,
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher: str = BACKBONE,
    chat_template: str = CHAT_TEMPLATE,
) -> LlavaProcessor:
    """Build the processor of pictures and text for `llava_with_student`, to be saved beside the model.

    A picture takes as many tokens in a prompt as the tower returns. Colours stay in [0, 1].

    Args:
        model: the student.
        tokenizer: has the token "<image>".
        teacher: as for `llava_with_student`.
        chat_template: prompt format of the language model, in Jinja.
    """
    settings = image_processor_settings(model)
    kind: Any = getattr(transformers, settings.pop("image_processor_type"))
    return LlavaProcessor(
        image_processor=kind(**settings),
        tokenizer=tokenizer,
        patch_size=tower_config(model, teacher).patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE_TOKEN,
        chat_template=chat_template,
    )
