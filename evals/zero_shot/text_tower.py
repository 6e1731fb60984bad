"""Text towers of CLIPs: from a teacher's weights file, or from a model of open_clip."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from jaxtyping import Float
from numpy.typing import NDArray
from open_clip.model import (
    CLIPTextCfg,
    _build_text_tower,  # pyright: ignore[reportPrivateUsage]  # the public CLIP class would also build the image tower
)
from torch import Tensor

from cache_builder.teachers.clip_tower import model_config, read_clip_file, trained_with_quick_gelu
from cache_builder.teachers.state_dict import load_exactly
from cache_builder.teachers.weights import check_network, file_sha256, first_line
from evals.encoders.library import Weights
from evals.encoders.open_clip_model import load_open_clip
from evals.errors import EvalError
from radio_cache.errors import TeacherWeightsError

_BATCH_SENTENCES = 256
_TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """Maps sentences to the space in which a CLIP compares them with images.

    Attributes:
        description: a short phrase for tables.
        content: identifies weights and tokenizer, on which the vectors depend.
        load: loads the tower to a device; called only if no classifier of it is stored.
    """

    description: str
    content: str
    load: Callable[[torch.device], Callable[[list[str]], Float[Tensor, "n c"]]]


def teacher_text_tower(name: str, model: str, weights: Path, *, tag: str = "") -> TextTower:
    """Return the text tower in a teacher's weights file in open_clip's format, which holds both towers.

    Widths and layers are those of the file. Loading raises EvalError or TeacherWeightsError for a file without a text tower.

    Args:
        name: of the teacher, for messages.
        model: open_clip's name of the architecture.
        weights: the file.
        tag: open_clip's name of the weights; "" for others.
    """
    # OpenAI's weights need the approximate GELU, which the architecture's name does not include.
    quick_gelu = trained_with_quick_gelu(model, tag)

    def load(device: torch.device) -> Callable[[list[str]], Tensor]:
        config = model_config(model)
        state = _text_state(read_clip_file(weights, teacher=name).tensors)
        if "positional_embedding" not in state or "token_embedding.weight" not in state:
            raise EvalError(
                f"{weights} holds no text tower, only an image tower: zero-shot needs the whole {model}; give it by "
                f"--text-weights {name}=FILE"
            )
        text, embed_dim = _text_config(config["text_cfg"], state, int(config["embed_dim"]))
        tower: Any = _build_text_tower(embed_dim, text, quick_gelu).eval()
        load_exactly(tower, state, teacher=f"{name}, text tower", path=weights)
        return _embedder(tower.to(device), _tokenizer(model, text.context_length), device)

    # Part of the identity only where it differs, so that classifiers of earlier versions stay valid.
    of_model = trained_with_quick_gelu(model, "")
    content = f"{file_sha256(weights)} {model}{' other activation' if quick_gelu != of_model else ''}"
    return TextTower(description=f"text tower of {model}", content=content, load=load)


def open_clip_text_tower(model: str, weights: Weights) -> TextTower:
    """Return the text tower of a model of open_clip, with the same weights as its image tower."""
    # Published and random weights have no file whose hash could identify them: the loaded tensors do.
    net = load_open_clip(model, weights)
    name = model.rpartition("/")[0] if "/" in model else model
    digest = hashlib.sha256()
    # Sorted, so that the hash does not depend on the order of modules.
    for key, value in sorted(_text_state(net.state_dict()).items()):
        digest.update(key.encode() + value.numpy().tobytes())

    def load(device: torch.device) -> Callable[[list[str]], Tensor]:
        text = net.to(device)
        tokenizer = _tokenizer(name, None)

        def embed(sentences: list[str]) -> Tensor:
            return text.encode_text(tokenizer(sentences).to(device))

        return embed

    return TextTower(description=f"text tower of {model}", content=f"{digest.hexdigest()} {name}", load=load)


def embed_sentences(embed: Callable[[list[str]], Tensor], sentences: list[str]) -> NDArray[np.float32]:
    """Return (n, c) vectors of length 1, one per sentence."""
    parts: list[Tensor] = []
    with torch.inference_mode():
        for first in range(0, len(sentences), _BATCH_SENTENCES):
            vectors = embed(sentences[first : first + _BATCH_SENTENCES]).float()
            parts.append(torch.nn.functional.normalize(vectors, dim=-1).cpu())
    return torch.cat(parts).numpy()


def _embedder(tower: Any, tokenizer: Any, device: torch.device) -> Callable[[list[str]], Tensor]:
    """Return a function from sentences to vectors."""
    return lambda sentences: tower(tokenizer(sentences).to(device))


def _tokenizer(model: str, context_length: int | None) -> Any:
    """Return the tokenizer of a model: CLIP's comes with open_clip, SigLIP's and others are repositories of Hugging Face.

    Raises:
        TeacherWeightsError: if the repository cannot be downloaded.
    """
    config = model_config(model)
    repository: str | None = config.get("text_cfg", {}).get("hf_tokenizer_name")
    try:
        # The hub client retries for minutes without a network: it is tried first, unless the files are there.
        if repository is not None and not isinstance(try_to_load_from_cache(repository, _TOKENIZER_FILE), str):
            check_network(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
        return open_clip.get_tokenizer(model, context_length=context_length)
    except Exception as exc:  # transformers and the hub client raise many kinds; the cure is the same for all
        raise TeacherWeightsError(
            f"the tokenizer of {model} is huggingface.co/{repository}, which could not be downloaded ({first_line(exc)}).\n"
            f"On a machine with a network: hf download {repository} --include '*token*' --include '*.model'\n"
            f"and copy what that makes, the folder models--{str(repository).replace('/', '--')}, into {HF_HUB_CACHE}; "
            "transformers must be installed, too"
        ) from exc


def _text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the text tower by its own names; some files prefix them with `text.`, others mix both towers."""
    # Files of SigLIP and newer models prefix the tower; OpenAI's layout does not.
    if any(key.startswith("text.") for key in state):
        return {key.removeprefix("text."): value for key, value in state.items() if key.startswith("text.")}
    image_keys = ("visual.", "logit_scale", "logit_bias", "attn_mask")
    return {key: value for key, value in state.items() if not key.startswith(image_keys)}


def _text_config(published: dict[str, Any], state: dict[str, Tensor], embed_dim: int) -> tuple[CLIPTextCfg, int]:
    """Return the published configuration with the sizes of the file, and the width of the output."""
    field_names = {item.name for item in fields(CLIPTextCfg)}
    text = CLIPTextCfg(**{key: value for key, value in published.items() if key in field_names})
    # The position embedding (tokens, c) states both sizes.
    length, width = (int(side) for side in state["positional_embedding"].shape)
    # The numbers of the residual blocks count the layers.
    layers = 1 + max((int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks.")), default=-1)
    # A matrix (c, out) in CLIP; a linear layer, weight (out, c), in SigLIP.
    if "text_projection" in state:
        embed_dim = int(state["text_projection"].shape[1])
    elif "text_projection.weight" in state:
        embed_dim = int(state["text_projection.weight"].shape[0])
    if width != text.width:
        # As open_clip reads OpenAI's files: heads of 64, or a single one.
        text.heads = width // 64 if width % 64 == 0 else 1
    text.context_length, text.width, text.layers = length, width, layers
    text.vocab_size = int(state["token_embedding.weight"].shape[0])
    return text, embed_dim
