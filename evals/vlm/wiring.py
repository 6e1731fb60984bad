"""Is a student wired right as LLaVA's vision tower? Shown with a small random language model, in the way a harness uses one."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from evals.errors import EvalError
from trainer import load_student
from trainer.dropins.llava import IMAGE_TOKEN, llava_processor, llava_with_student
from trainer.exports.libraries import no_progress_bar
from trainer.model.adaptors import BACKBONE

QUESTION: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]}
]
"""What it is asked about every picture, in words that `word_tokenizer` knows, as processors take it."""

_WORDS = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    IMAGE_TOKEN,
    "USER:",
    "ASSISTANT:",
    "what",
    "is",
    "it",
    "?",
    "a",
    "cat",
    "dog",
)
IMAGE_ID = _WORDS.index(IMAGE_TOKEN)
_NEW_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """A student in LLaVA. tokens: that a picture takes in a prompt. width: of each, before the projector. answer: the random
    language model's, which means nothing. held: what was seen to be so.
    """

    student: str
    teacher: str
    tokens: int
    width: int
    answer: str
    held: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_wiring(run: Path, *, teacher: str = BACKBONE, seed: int = 0) -> Wiring:
    """Build a LLaVA, save it, load it as a harness does, ask it about two pictures of noise.

    teacher: whose features the language model reads, or "backbone". Raises EvalError with what does not hold.
    """
    student = load_student(run, adaptors="all")
    tokenizer, language_model = word_tokenizer(), random_language_model(seed)
    built = llava_with_student(student, language_model, image_token_id=IMAGE_ID, teacher=teacher).eval()
    tokens: int = built.config.image_seq_length
    with tempfile.TemporaryDirectory() as folder, no_progress_bar():
        built.save_pretrained(folder)
        llava_processor(student, tokenizer, teacher=teacher).save_pretrained(folder)
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        processor: Any = AutoProcessor.from_pretrained(folder)
    question: str = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in range(2)]
    one, other = (processor(images=picture, text=question, return_tensors="pt") for picture in pictures)
    held: list[str] = []

    def must(so: bool, what: str) -> None:
        if not so:
            raise EvalError(f"{run} as LLaVA's vision tower: it does not hold that {what}")
        held.append(what)

    must(
        int((one["input_ids"] == loaded.config.image_token_id).sum()) == tokens,
        f"the processor makes room for the {tokens} tokens that the tower gives",
    )
    with torch.inference_mode():
        logits, again, elsewhere = loaded(**one).logits, built(**one).logits, loaded(**other).logits
        answer = loaded.generate(**one, max_new_tokens=_NEW_TOKENS, do_sample=False)[0, one["input_ids"].shape[1] :]
    must(bool(torch.isfinite(logits).all()), "logits are finite")
    must(torch.allclose(logits, again, rtol=1e-4, atol=1e-5), "a saved and loaded LLaVA gives the same logits")
    must(not torch.allclose(logits[:, -1], elsewhere[:, -1]), "another picture gives other logits")
    must(len(answer) > 0, "it generates")
    built(**one, labels=one["input_ids"]).loss.backward()
    inner: Any = built.model
    must(
        all(weight.grad is not None for weight in inner.multi_modal_projector.parameters())
        and all(weight.grad is None for weight in inner.vision_tower.parameters()),
        "the projector learns, and the student stays as it is",
    )
    return Wiring(
        student=student.config.student,
        teacher=teacher,
        tokens=tokens,
        width=int(loaded.config.vision_config.hidden_size),
        answer=str(processor.decode(answer)),
        held=tuple(held),
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of a handful of words: none can be had offline."""
    known = Tokenizer(models.WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=known,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE_TOKEN],
    )


def random_language_model(seed: int) -> Any:
    """A Llama: what transformers declares of it is narrower than what a tower asks."""
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
