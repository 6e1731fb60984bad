"""Hugging Face's LLaVA reads a student's patches: forward, generate, save and load, with a tiny random language model."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from trainer.dropins.llava import llava_processor, llava_with_student
from trainer.model.student import backbone_and_heads

IMAGE_TOKEN, VOCABULARY = 60, 64
PIXELS = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def prompt(llava: LlavaForConditionalGeneration) -> torch.Tensor:
    return torch.tensor([[1, *[IMAGE_TOKEN] * llava.config.image_seq_length, 5, 6, 7]])


@pytest.mark.parametrize(("teacher", "tokens"), [("backbone", 16), ("dino", 64)])
def test_patches_of_the_frozen_student_reach_the_language_model(small_student, teacher: str, tokens: int) -> None:
    words = language_model()
    llava = llava_with_student(small_student, words, image_token_id=IMAGE_TOKEN, teacher=teacher).eval()
    assert llava.config.image_seq_length == tokens
    with torch.no_grad():
        out = llava(input_ids=prompt(llava), pixel_values=PIXELS)
        own, heads = backbone_and_heads(small_student(PIXELS))
        expected = llava.model.multi_modal_projector(own.spatial if teacher == "backbone" else heads[teacher].spatial)
        seen = llava.model.get_image_features(
            PIXELS, vision_feature_layer=-1, vision_feature_select_strategy="full"
        ).pooler_output
        torch.testing.assert_close(torch.stack(list(seen)), expected, rtol=1e-4, atol=1e-5)
        other = llava(input_ids=prompt(llava), pixel_values=1 - PIXELS)
        embeds = words.model.embed_tokens(prompt(llava))
        embeds[:, 1 : 1 + tokens] = expected
        torch.testing.assert_close(out.logits, words(inputs_embeds=embeds).logits, rtol=1e-3, atol=1e-4)
    assert out.logits.shape == (1, tokens + 4, VOCABULARY)
    assert not torch.allclose(out.logits[:, -1], other.logits[:, -1])
    generated = llava.generate(input_ids=prompt(llava), pixel_values=PIXELS, max_new_tokens=5, do_sample=False)
    assert generated.shape[0] == 1
    assert tokens + 4 < generated.shape[1] <= tokens + 9


def test_only_projector_and_language_model_learn(small_student) -> None:
    llava = llava_with_student(small_student, language_model(), image_token_id=IMAGE_TOKEN)
    llava(input_ids=prompt(llava), pixel_values=PIXELS, labels=prompt(llava)).loss.backward()
    assert all(parameter.grad is None for parameter in llava.model.vision_tower.parameters())
    assert all(parameter.grad is not None for parameter in llava.model.multi_modal_projector.parameters())


def test_a_llava_with_a_student_is_saved_and_loaded_as_any_other(small_student, tmp_path: Path) -> None:
    llava = llava_with_student(small_student, language_model(), image_token_id=IMAGE_TOKEN).eval()
    llava.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        one, other = (model(input_ids=prompt(llava), pixel_values=PIXELS).logits for model in (llava, loaded))
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_a_saved_processor_asks_as_llava_was_trained_to_be_asked(small_student, tmp_path: Path) -> None:
    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "<image>": 1, "USER:": 2, "ASSISTANT:": 3, "what?": 4}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    llava_processor(small_student, tokenizer).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    picture = {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]}
    asked = processor.apply_chat_template([picture], add_generation_prompt=True)
    assert asked == "USER: <image>\nwhat? ASSISTANT:"
    earlier = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "what?"}]
    assert processor.apply_chat_template([*earlier, picture]) == "USER: what? ASSISTANT: what? USER: <image>\nwhat? "
    ids = processor(images=(PIXELS[0] * 255).byte().permute(1, 2, 0).numpy(), text=asked, return_tensors="pt")[
        "input_ids"
    ]
    assert ids.tolist() == [[2, *[1] * 16, 4, 3]]
