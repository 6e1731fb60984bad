"""Models of timm as teachers: DINOv3 (arXiv 2508.10104), C-RADIO (2412.07679, 2601.17237), and any other by its name."""

import contextlib
import io
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, final

import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_data_config
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from torch import Tensor

from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.libraries import timm_pretrained_config
from cache_builder.teachers.preprocessing import timm_preprocessing
from cache_builder.teachers.preset import TeacherOptions, TeacherPreset, TimmChoices
from cache_builder.teachers.probe import probe
from cache_builder.teachers.state_dict import (
    SETS_BEFORE,
    TIMM_SETS,
    WeightsFile,
    extract_network,
    is_out_of_memory,
    load_exactly,
    read_weights_file,
)
from cache_builder.teachers.traced_conversion import is_position_table, resized_positions, traced_conversion
from cache_builder.teachers.weights import describe_source, file_sha256, first_line
from cache_builder.teachers.wrong_weights import looks_like
from radio_cache.errors import ConfigError, TeacherWeightsError
from radio_cache.format.schema import TeacherSpec

_SUMMARY_TOKENS = "radio_model.summary_idxs"


@final
class TimmModel(Teacher):
    """Summary: what timm's classifier would read, or the tokens the preset names. Spatial: the last map, normed in a ViT."""

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        sets = SETS_BEFORE if options.legacy_loading else TIMM_SETS
        file = read_weights_file(path, teacher=preset.name, sets=sets)
        file = _network_of(file, preset, path)
        state = file.tensors
        if _SUMMARY_TOKENS in state:  # NVIDIA's own files say it themselves
            told = tuple(int(token) for token in state[_SUMMARY_TOKENS].flatten())
            preset = replace(preset, timm=replace(preset.timm, summary_tokens=told))
        self._choices = preset.timm
        what = f"teacher '{preset.name}', {preset.model} of timm {timm.__version__},"
        config = resolve_data_config(pretrained_cfg=timm_pretrained_config(preset.model))
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
        named = _in_timms_names(self._net, state, preset, path, options)
        if (
            named.resized
            and prepared.size_px != native
            and not options.legacy_loading
            and hasattr(self._net, "set_input_size")
        ):
            # A file of another size is brought to the size that is asked for at once, not by way of the model's own.
            self._net, native = _network(preset), prepared.size_px
            self._net.set_input_size(img_size=(native, native))
            named = _in_timms_names(self._net, state, preset, path, options)
        load_exactly(self._net, named.tensors, teacher=preset.name, path=path, whose=looks_like(state))
        resized = named.resized | _resize(self._net, prepared.size_px, native=native, what=what)
        self._net.eval()
        self.notes = (*file.notes, *([] if options.legacy_loading else named.notes))
        loaded = ({"tensors": file.chosen} if file.chosen else {}) | resized
        loaded |= {"left_out": ", ".join(named.left_out)[:200]} if named.left_out else {}
        self.spec = TeacherSpec(
            name=preset.name,
            family=preset.family,
            model=preset.model if preset.output else f"timm:{preset.model}",
            licence=preset.licence,
            weights=describe_source(preset.weights, path, options.weights),
            weights_sha256=file_sha256(path),
            geometry=geometry,
            normalisation=prepared.normalisation,
            summary_dim=summary_dim,
            spatial_dim=spatial_dim,
            summary_note=_summary_note(preset),
            spatial_note=_spatial_note(preset),
            compute_dtype=options.dtype,
            codec=options.codec,
            views=1,
            software={"timm": timm.__version__, "torch": version("torch")},
            loaded=loaded,
        )

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        return _features(self._net, images, self._choices)

    def to(self, device: torch.device) -> None:
        self._net.to(device)


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


def _resize(net: Any, size_px: int, *, native: int, what: str) -> dict[str, str]:
    """Make a network take another size, as timm does: position embeddings and windows follow.

    Returns:
        What a spec says of it: which tables of positions were resized.
    """
    if size_px == native:
        return {}
    if hasattr(net, "set_input_size"):
        return resized_positions(net, lambda: net.set_input_size(img_size=(size_px, size_px)))
    if net.pretrained_cfg.get("fixed_input_size"):
        raise ConfigError(f"{what} takes {native} px and nothing else, not {size_px} px")
    return {}


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


class _Converted(NamedTuple):
    """A file's tensors as timm calls them. resized: for the spec. left_out: names in the file. notes: for the user."""

    tensors: dict[str, Tensor]
    resized: dict[str, str]
    left_out: list[str]
    notes: list[str]


_NOT_FOR_FEATURES = re.compile(
    r"mask_token|num_batches_tracked|bias_mask|rope|periods|attn_mask|relative_position_index|relative_coords|"
    r"input_conditioner|summary_idxs|n_averaged"
)
"""Tensors of files that no forward pass in evaluation reads, or that the network computes itself."""


def _network_of(file: WeightsFile, preset: TeacherPreset, path: Path) -> WeightsFile:
    """The tensors of the network alone, if it lies within another one in the file."""
    with torch.device("meta"):
        own = list(_network(preset).state_dict())
    anchors = ("radio_model.model.",) if preset.family == "c-radio" else ()
    if anchors and (below := extract_network(file, anchors, teacher=preset.name, path=path)) is not file:
        return below
    return extract_network(file, own[:1], teacher=preset.name, path=path, own=own)


def _head_only(preset: TeacherPreset, own: Iterable[str]) -> set[str]:
    """Names of tensors that timm's network has with a classifier and not without, in heads of any number of layers."""
    with torch.device("meta"):
        whole = timm.create_model(preset.model, pretrained=False)
    return set(whole.state_dict()) - set(own)


def _in_timms_names(
    net: Any, state: dict[str, Tensor], preset: TeacherPreset, path: Path, options: TeacherOptions
) -> _Converted:
    """Convert the authors' format as timm does, without the classifier.

    Raises TeacherWeightsError if timm does not know the format, or would resample what is no table of positions: then the
    network would be another one than the file's.
    """
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    own: dict[str, Tensor] = net.state_dict()
    heads = _head_only(preset, own)
    resized: dict[str, str] = {}
    left_out: list[str] = []
    notes: list[str] = []
    if convert is not None:
        _refuse_lost_biases(net, state, preset, path)
        state = _without_unit_scales(own, state, preset, path)
        try:
            # timm prints what it skips; and what it logs of resampling is said here.
            with contextlib.redirect_stdout(io.StringIO()):
                done = traced_conversion(lambda tensors: convert(tensors, net), state, taken=own)
        except Exception as exc:  # it looks up what it expects, and raises whatever that raises
            if is_out_of_memory(exc):
                raise
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is in no format that timm knows for {preset.model}: "
                f"{type(exc).__name__}: {first_line(exc)}{looks_like(state)}"
            ) from exc
        others = [name for name in done.resampled if not is_position_table(name)]
        if others and not options.legacy_loading:
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is not of {preset.model}: "
                f"{'; '.join(_shapes(state, own, name) for name in others[:3])}. timm would resample "
                f"{'that' if len(others) == 1 else f'these {len(others)} tensors'}, and the teacher would be another network "
                f"than the file's: ask for the model of timm that the file is of{looks_like(state)}"
            )
        tables = [name for name in done.resampled if is_position_table(name)]
        if tables:
            shapes = _shapes(state, own, tables[0])
            resized["positions"] = f"{shapes}{f', and {len(tables) - 1} more' if len(tables) > 1 else ''}, as timm"
            notes.append(f"timm resizes {len(tables)} tables of positions of the file: {shapes}")
        if done.filled:
            notes.append(f"timm fills in {_some(done.filled)}, which the file has not")
        if len(done.unused) < len(state):
            left_out = [
                name
                for name in done.unused
                if name.split(".", 1)[-1] not in heads
                and name not in heads
                and not _NOT_FOR_FEATURES.search(name)
                and name not in _classifiers(net)
                and state[name].is_floating_point()
                and bool(state[name].any())
            ]
        if left_out:
            notes.append(f"timm leaves out {_some(left_out)} of the file")
        state = done.tensors
    tensors = {
        key: value for key, value in state.items() if key in own or (key not in heads and key not in _classifiers(net))
    }
    return _Converted(tensors, resized, left_out, notes)


def _classifiers(net: Any) -> set[str]:
    classifiers = net.pretrained_cfg.get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    return {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors (such as {names[0]})"


def _shapes(state: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str) -> str:
    """The shapes of a tensor in the file, if it has that name there, and in the network."""
    match = next((key for key in state if key == name or key.endswith(f".{name}")), None)
    in_file = f"{tuple(state[match].shape)}" if match else "of another shape"
    return f"{name} is {in_file}, needed is {tuple(own[name].shape)}"


_LAYER_SCALE = re.compile(r"^(radio_model\.model\.blocks\.\d+\.)layer_scale(\d)\.lambda1$")


def _without_unit_scales(
    own: Mapping[str, Tensor], state: dict[str, Tensor], preset: TeacherPreset, path: Path
) -> dict[str, Tensor]:
    """The tensors of C-RADIO as NVIDIA has them: transformers saves it with layer scales, of one where it has none."""
    scaled = "blocks.0.ls1.gamma" in own and not any(".ls1." in key for key in state)
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _LAYER_SCALE.match(key)
        if match is None:
            out[key] = value
        elif scaled:
            out[f"{match[1]}ls{match[2]}.gamma"] = value
        elif not value.is_meta and bool((value != 1).any()):
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} has layer scales other than one ({key}), which {preset.model} has not"
            )
    return out


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
