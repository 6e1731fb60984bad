"""Check of a student as LLaVA's vision tower, with a small random language model and as a harness uses it."""

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
"""The question about every picture, in words of `word_tokenizer` and in the form that processors take."""

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
# The placeholder that the processor repeats for every token of a picture.
IMAGE_ID = _WORDS.index(IMAGE_TOKEN)
_NEW_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """The result of a check.

    Attributes:
        tokens: number of tokens of a picture in a prompt.
        width: of each token, before the projector.
        answer: of the random language model; it has no meaning.
        held: the checks that passed.
    """

    student: str
    teacher: str
    tokens: int
    width: int
    answer: str
    held: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record of this check."""
        return asdict(self)


def check_wiring(run: Path, *, teacher: str = BACKBONE, seed: int = 0) -> Wiring:
    """Build a LLaVA, save it, load it as a harness does, and run it on two pictures of noise.

    Args:
        run: folder of the student's run.
        teacher: whose features the language model reads, or "backbone".
        seed: of language model and pictures.

    Raises:
        EvalError: if a check fails.
    """
    student = load_student(run, adaptors="all")
    tokenizer, language_model = word_tokenizer(), random_language_model(seed)
    built = llava_with_student(student, language_model, image_token_id=IMAGE_ID, teacher=teacher).eval()
    tokens: int = built.config.image_seq_length
    # Through the disk, as a harness loads it: registration and configs are tested, too.
    with tempfile.TemporaryDirectory() as folder, no_progress_bar():
        built.save_pretrained(folder)
        llava_processor(student, tokenizer, teacher=teacher).save_pretrained(folder)
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        processor: Any = AutoProcessor.from_pretrained(folder)
    question: str = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    # Noise of another size than the student's input, so that the processor has to resize.
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in range(2)]
    # The same question, so that logits can differ by the picture alone.
    inputs, other_inputs = (processor(images=picture, text=question, return_tensors="pt") for picture in pictures)
    passed: list[str] = []

    def require(holds: bool, check: str) -> None:
        if not holds:
            raise EvalError(f"{run} as LLaVA's vision tower: this does not hold: {check}")
        passed.append(check)

    require(
        int((inputs["input_ids"] == loaded.config.image_token_id).sum()) == tokens,
        f"the processor makes room for the {tokens} tokens that the tower gives",
    )
    with torch.inference_mode():
        logits, built_logits, other_logits = (
            loaded(**inputs).logits,
            built(**inputs).logits,
            loaded(**other_inputs).logits,
        )
        answer = loaded.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
    require(bool(torch.isfinite(logits).all()), "logits are finite")
    require(
        torch.allclose(logits, built_logits, rtol=1e-4, atol=1e-5), "a saved and loaded LLaVA gives the same logits"
    )
    require(not torch.allclose(logits[:, -1], other_logits[:, -1]), "another picture gives other logits")
    require(len(answer) > 0, "it generates")
    # One backward pass shows what a training of LLaVA would change.
    built(**inputs, labels=inputs["input_ids"]).loss.backward()
    # transformers nests the parts of LLaVA below `model`.
    llava_parts: Any = built.model
    require(
        all(weight.grad is not None for weight in llava_parts.multi_modal_projector.parameters())
        and all(weight.grad is None for weight in llava_parts.vision_tower.parameters()),
        "the projector learns, and the student stays as it is",
    )
    return Wiring(
        student=student.config.student,
        teacher=teacher,
        tokens=tokens,
        width=int(loaded.config.vision_config.hidden_size),
        answer=str(processor.decode(answer)),
        held=tuple(passed),
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words, because a real one would have to be downloaded."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE_TOKEN],
    )


def random_language_model(seed: int) -> Any:
    """Return a tiny Llama with random weights; typed Any because the declared types of transformers are too narrow."""
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
    # The caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
