"""Models of timm as teachers: DINOv3 (arXiv 2508.10104), C-RADIO (2412.07679, 2601.17237), and any other by its name."""

import contextlib
import io
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_data_config
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from torch import Tensor

from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.preprocessing import timm_preprocessing
from cache_builder.teachers.preset import TeacherOptions, TeacherPreset, TimmChoices
from cache_builder.teachers.probe import probe
from cache_builder.teachers.state_dict import load_exactly, read_state_dict
from cache_builder.teachers.weights import describe_source, file_sha256, first_line
from cache_builder.teachers.wrong_weights import looks_like
from radio_cache.errors import ConfigError, TeacherWeightsError
from radio_cache.schema import TeacherSpec

_SUMMARY_TOKENS = "radio_model.summary_idxs"


@final
class TimmModel(Teacher):
    """Summary: what timm's classifier would read, or the tokens the preset names. Spatial: the last map, normed in a ViT."""

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        state = read_state_dict(path, teacher=preset.name)
        if _SUMMARY_TOKENS in state:  # NVIDIA's own files say it themselves
            told = tuple(int(token) for token in state[_SUMMARY_TOKENS].flatten())
            preset = replace(preset, timm=replace(preset.timm, summary_tokens=told))
        self._choices = preset.timm
        what = f"teacher '{preset.name}', {preset.model} of timm {timm.__version__},"
        config = resolve_data_config(pretrained_cfg=_pretrained_cfg(preset.model))
        prepared = timm_preprocessing(what, config, size_px=options.size_px, fit=options.fit)
        native = int(config["input_size"][1])

        def unweighted() -> Any:
            net = _network(preset)
            _resize(net, prepared.size_px, native=native, what=what)
            return net

        geometry, summary_dim, spatial_dim = probe(
            unweighted, partial(_features, choices=preset.timm), prepared, what=what, native_px=native
        )
        self._net = _network(preset)
        named = _in_timms_names(self._net, state, preset, path)
        load_exactly(self._net, named, teacher=preset.name, path=path, whose=looks_like(state))
        _resize(self._net, prepared.size_px, native=native, what=what)
        self._net.eval()
        self.spec = TeacherSpec(
            name=preset.name, family=preset.family, model=preset.model if preset.output else f"timm:{preset.model}",
            licence=preset.licence, weights=describe_source(preset.weights, path, options.weights),
            weights_sha256=file_sha256(path), geometry=geometry, normalisation=prepared.normalisation,
            summary_dim=summary_dim, spatial_dim=spatial_dim,
            summary_note=_summary_note(preset), spatial_note=_spatial_note(preset),
            compute_dtype=options.dtype, codec=options.codec, views=1,
            software={"timm": timm.__version__, "torch": version("torch")},
        )  # fmt: skip

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        return _features(self._net, images, self._choices)

    def to(self, device: torch.device) -> None:
        self._net.to(device)


def _pretrained_cfg(model: str) -> dict[str, Any]:
    config: Any = timm.get_pretrained_cfg(model)
    return config.to_dict() if config else {}


def _network(preset: TeacherPreset) -> Any:
    """Without a classifier: nothing here reads it, and a file may have one for any number of classes."""
    arguments: dict[str, Any] = {} if preset.timm.global_pool is None else {"global_pool": preset.timm.global_pool}
    net: Any = timm.create_model(preset.model, pretrained=False, num_classes=0, **arguments)
    if not hasattr(net, "forward_intermediates"):
        raise ConfigError(
            f"{preset.model} of timm {timm.__version__} gives no maps (it has no forward_intermediates): it cannot be a "
            "teacher"
        )
    return net.eval()


def _resize(net: Any, size_px: int, *, native: int, what: str) -> None:
    """Make a network take another size, as timm does: position embeddings and windows follow."""
    if size_px == native:
        return
    if hasattr(net, "set_input_size"):
        net.set_input_size(img_size=(size_px, size_px))
    elif net.pretrained_cfg.get("fixed_input_size"):
        raise ConfigError(f"{what} takes {native} px and nothing else, not {size_px} px")


def _features(net: Any, images: Tensor, choices: TimmChoices) -> Features:
    norm = not isinstance(
        net, Hiera | HieraDet
    )  # which asserts that nobody asks; where there is no final norm it does nothing
    final, (spatial,) = net.forward_intermediates(images, indices=1, norm=norm, output_fmt="NCHW")
    if choices.norm_map:
        spatial = net.head.norm(spatial)
    tokens = choices.summary_tokens
    summary = final[:, list(tokens)].flatten(1) if tokens else net.forward_head(final, pre_logits=True)
    return Features(summary, spatial.permute(0, 2, 3, 1))


def _in_timms_names(net: Any, state: dict[str, Tensor], preset: TeacherPreset, path: Path) -> dict[str, Tensor]:
    """The file's tensors as timm calls them: its own conversion of the authors' formats, and no classifier."""
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        _refuse_lost_biases(net, state, preset, path)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # timm prints what it skips
                state = dict(convert(state, net))
        except Exception as exc:  # it looks up what it expects, and raises whatever that raises
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is in no format that timm knows for {preset.model}: "
                f"{type(exc).__name__}: {first_line(exc)}{looks_like(state)}"
            ) from exc
    classifiers = net.pretrained_cfg.get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    own = net.state_dict()
    return {
        key: value
        for key, value in state.items()
        if key in own or not any(key in (f"{head}.weight", f"{head}.bias") for head in heads)
    }


def _refuse_lost_biases(net: Any, state: dict[str, Tensor], preset: TeacherPreset, path: Path) -> None:
    """DINOv3's distilled models have biases of zero, which timm's networks leave out; others would lose theirs."""
    if "storage_tokens" not in state or any(key.endswith("q_bias") for key in net.state_dict()):
        return
    for key, bias in state.items():
        if key.endswith("attn.qkv.bias"):
            query, _, value = bias.chunk(3)  # the bias of keys is masked: it changes nothing
            if query.any() or value.any():
                raise TeacherWeightsError(
                    f"teacher '{preset.name}': {path} has biases in its attention ({key}), which {preset.model} has not: ask "
                    f"for --teacher timm:{preset.model.partition('.')[0]}_qkvb"
                )


def _summary_note(preset: TeacherPreset) -> str:
    if preset.timm.summary_tokens:
        return f"summary tokens {', '.join(str(token) for token in preset.timm.summary_tokens)}, side by side"
    if preset.timm.global_pool == "token":
        return "class token after the final norm"
    return "what timm's classifier reads"


def _spatial_note(preset: TeacherPreset) -> str:
    if preset.timm.summary_tokens:
        return "patch tokens of the last block"
    if preset.timm.norm_map:
        return "last stage, after the head's norm"
    if preset.timm.global_pool == "token":
        return "patch tokens after the final norm"
    return "timm's last map, after the final norm of a transformer"
