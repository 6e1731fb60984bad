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
    LEGACY_SETS,
    TIMM_SETS,
    WeightsFile,
    extract_network,
    is_out_of_memory,
    load_exactly,
    read_weights_file,
)
from cache_builder.teachers.traced_conversion import is_position_table, resized_positions, traced_conversion
from cache_builder.teachers.weights import describe_source, file_sha256, first_line
from cache_builder.teachers.wrong_weights import likely_origin
from radio_cache.errors import ConfigError, TeacherWeightsError
from radio_cache.format.schema import TeacherSpec

_SUMMARY_TOKENS = "radio_model.summary_idxs"


@final
class TimmModel(Teacher):
    """Summary: the input of timm's classifier, or the preset's tokens. Spatial: the last map, normed in a ViT."""

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        sets = LEGACY_SETS if options.legacy_loading else TIMM_SETS
        file = read_weights_file(path, teacher=preset.name, sets=sets)
        file = _network_of(file, preset, path)
        state = file.tensors
        if _SUMMARY_TOKENS in state:  # NVIDIA's own files contain the numbers of the summary tokens
            summary_tokens = tuple(int(token) for token in state[_SUMMARY_TOKENS].flatten())
            preset = replace(preset, timm=replace(preset.timm, summary_tokens=summary_tokens))
        self._choices = preset.timm
        subject = f"teacher '{preset.name}', {preset.model} of timm {timm.__version__},"
        config = resolve_data_config(pretrained_cfg=timm_pretrained_config(preset.model))
        prepared = timm_preprocessing(subject, config, size_px=options.size_px, fit=options.fit)
        native = int(config["input_size"][1])

        # On the meta device, before any weights: an impossible size fails within a second.
        def unweighted() -> Any:
            net = _network(preset)
            _resize(net, prepared.size_px, native=native, subject=subject)
            return net

        geometry, summary_dim, spatial_dim = probe(
            unweighted, partial(_features, choices=preset.timm), prepared, subject=subject, native_px=native
        )
        self._net = _network(preset)
        named = _in_timms_names(self._net, state, preset, path, options)
        if (
            named.resized
            and prepared.size_px != native
            and not options.legacy_loading
            and hasattr(self._net, "set_input_size")
        ):
            # The tables of a file of another size are resized to the requested size at once: resizing them twice, by way of
            # the model's own size, would lose precision.
            self._net, native = _network(preset), prepared.size_px
            self._net.set_input_size(img_size=(native, native))
            named = _in_timms_names(self._net, state, preset, path, options)
        load_exactly(self._net, named.tensors, teacher=preset.name, path=path, origin=likely_origin(state))
        resized = named.resized | _resize(self._net, prepared.size_px, native=native, subject=subject)
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
        """Return the features of normalised images."""
        return _features(self._net, images, self._choices)

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self._net.to(device)


def _network(preset: TeacherPreset) -> Any:
    """Return timm's network without a classifier.

    Raises:
        ConfigError: the network gives no maps.
    """
    # No teacher reads the classifier, and a file may have one for any number of classes.
    arguments: dict[str, Any] = {} if preset.timm.global_pool is None else {"global_pool": preset.timm.global_pool}
    net: Any = timm.create_model(preset.model, pretrained=False, num_classes=0, **arguments)
    if not hasattr(net, "forward_intermediates"):
        raise ConfigError(
            f"{preset.model} of timm {timm.__version__} gives no maps (it has no forward_intermediates): it cannot be a "
            "teacher"
        )
    return net.eval()


def _resize(net: Any, size_px: int, *, native: int, subject: str) -> dict[str, str]:
    """Give a network another input size, as timm does: position embeddings and windows follow.

    Returns:
        An entry for `TeacherSpec.loaded` about the resized position tables; {} if none was resized.

    Raises:
        ConfigError: the network takes its own size only.
    """
    if size_px == native:
        return {}
    # Convolutional networks have no such method and take any size.
    if hasattr(net, "set_input_size"):
        return resized_positions(net, lambda: net.set_input_size(img_size=(size_px, size_px)))
    if net.pretrained_cfg.get("fixed_input_size"):
        raise ConfigError(f"{subject} takes {native} px and nothing else, not {size_px} px")
    return {}


def _features(net: Any, images: Tensor, choices: TimmChoices) -> Features:
    """Run the network.

    Args:
        net: the network.
        images: (b, 3, h, w).
        choices: the preset's settings.
    """
    # Hiera asserts that the argument is False. In a network without a final norm it has no effect.
    norm = not isinstance(net, Hiera | HieraDet)
    # final: the input of the head, (b, tokens, c) or (b, c, h, w); spatial: (b, c, h, w).
    final, (spatial,) = net.forward_intermediates(images, indices=1, norm=norm, output_fmt="NCHW")
    if choices.norm_map:
        spatial = net.head.norm(spatial)
    tokens = choices.summary_tokens
    summary = final[:, list(tokens)].flatten(1) if tokens else net.forward_head(final, pre_logits=True)
    return Features(summary, spatial.permute(0, 2, 3, 1))  # (b, c, h, w) -> (b, h, w, c)


class _Converted(NamedTuple):
    """The tensors of a file by timm's names."""

    tensors: dict[str, Tensor]

    resized: dict[str, str]
    """Entry for `TeacherSpec.loaded` about resized position tables."""

    left_out: list[str]
    """Names of tensors of the file that are not used."""

    notes: list[str]
    """Messages for the user."""


_NOT_FOR_FEATURES = re.compile(
    r"mask_token|num_batches_tracked|bias_mask|rope|periods|attn_mask|relative_position_index|relative_coords|"
    r"input_conditioner|summary_idxs|n_averaged"
)
"""Tensors of files that no forward pass in evaluation reads, or that the network computes itself: no loss if unused."""


def _network_of(file: WeightsFile, preset: TeacherPreset, path: Path) -> WeightsFile:
    """Return the tensors of the network alone, if it lies within another one in the file."""
    with torch.device("meta"):
        names = list(_network(preset).state_dict())
    # NVIDIA's checkpoints hold the whole model of which timm has the inner one.
    anchors = ("radio_model.model.",) if preset.family == "c-radio" else ()
    if anchors and (below := extract_network(file, anchors, teacher=preset.name, path=path)) is not file:
        return below
    return extract_network(file, names[:1], teacher=preset.name, path=path, names=names)


def _head_only(preset: TeacherPreset, headless: Iterable[str]) -> set[str]:
    """Return the names of the classifier's tensors, in heads of any number of layers.

    Args:
        preset: the teacher.
        headless: names of the tensors of the network without a classifier.
    """
    with torch.device("meta"):
        whole = timm.create_model(preset.model, pretrained=False)
    return set(whole.state_dict()) - set(headless)


def _in_timms_names(
    net: Any, state: dict[str, Tensor], preset: TeacherPreset, path: Path, options: TeacherOptions
) -> _Converted:
    """Convert the authors' format to timm's, without the classifier.

    Args:
        net: timm's network.
        state: tensors by the file's names.
        preset: the teacher.
        path: the weights file, for messages.
        options: options of the user.

    Raises:
        TeacherWeightsError: timm does not know the format, or its conversion would resample a tensor that is no position table:
            the teacher would be another network than the file's.
    """
    # Most of timm's model files define their conversion under this name.
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    expected: dict[str, Tensor] = net.state_dict()
    heads = _head_only(preset, expected)
    resized: dict[str, str] = {}
    left_out: list[str] = []
    notes: list[str] = []
    if convert is not None:
        _refuse_lost_biases(net, state, preset, path)
        state = _without_unit_scales(expected, state, preset, path)
        try:
            # timm prints and logs what it skips and resamples; the notes below report it.
            with contextlib.redirect_stdout(io.StringIO()):
                conversion = traced_conversion(lambda tensors: convert(tensors, net), state, names=expected)
        except Exception as exc:  # a missing tensor raises KeyError, a misshapen one anything
            if is_out_of_memory(exc):
                raise
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is in no format that timm knows for {preset.model}: "
                f"{type(exc).__name__}: {first_line(exc)}{likely_origin(state)}"
            ) from exc
        resampled_weights = [name for name in conversion.resampled if not is_position_table(name)]
        if resampled_weights and not options.legacy_loading:
            subject = "that" if len(resampled_weights) == 1 else f"these {len(resampled_weights)} tensors"
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is not of {preset.model}: "
                f"{'; '.join(_shapes(state, expected, name) for name in resampled_weights[:3])}. timm would resample "
                f"{subject}, and the teacher would be another network than the file's: use the model of timm that the file is "
                f"of{likely_origin(state)}"
            )
        tables = [name for name in conversion.resampled if is_position_table(name)]
        if tables:
            shapes = _shapes(state, expected, tables[0])
            resized["positions"] = f"{shapes}{f', and {len(tables) - 1} more' if len(tables) > 1 else ''}, as timm"
            notes.append(f"timm resizes {len(tables)} tables of positions of the file: {shapes}")
        if conversion.filled:
            notes.append(f"timm fills in {_examples(conversion.filled)}, which the file does not have")
        # If every tensor is unused, the conversion copied them in a way that cannot be traced.
        if len(conversion.unused) < len(state):
            left_out = [
                name
                for name in conversion.unused
                if name.split(".", 1)[-1] not in heads
                and name not in heads
                and not _NOT_FOR_FEATURES.search(name)
                and name not in _classifiers(net)
                and state[name].is_floating_point()
                and bool(state[name].any())
            ]
        if left_out:
            notes.append(f"timm leaves out {_examples(left_out)} of the file")
        state = conversion.tensors
    tensors = {
        key: value
        for key, value in state.items()
        if key in expected or (key not in heads and key not in _classifiers(net))
    }
    return _Converted(tensors, resized, left_out, notes)


def _classifiers(net: Any) -> set[str]:
    """Return the names of the classifier's tensors by timm's configuration; some models have two classifiers."""
    classifiers = net.pretrained_cfg.get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    return {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}


def _examples(names: list[str]) -> str:
    """Return one name, or the number of names with an example."""
    return names[0] if len(names) == 1 else f"{len(names)} tensors (such as {names[0]})"


def _shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> str:
    """Return the shapes of a tensor in the file, if it has this name there, and in the network."""
    match = next((key for key in state if key == name or key.endswith(f".{name}")), None)
    in_file = f"{tuple(state[match].shape)}" if match else "of another shape"
    return f"{name} is {in_file}, needed is {tuple(expected[name].shape)}"


_LAYER_SCALE = re.compile(r"^(radio_model\.model\.blocks\.\d+\.)layer_scale(\d)\.lambda1$")


def _without_unit_scales(
    expected: Mapping[str, Tensor], state: dict[str, Tensor], preset: TeacherPreset, path: Path
) -> dict[str, Tensor]:
    """Return the tensors of C-RADIO by NVIDIA's names, without layer scales of one.

    transformers saves a layer scale for every model; it is one where the model has none.

    Raises:
        TeacherWeightsError: a scale other than one belongs to a network without layer scales.
    """
    has_scales = "blocks.0.ls1.gamma" in expected and not any(".ls1." in key for key in state)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _LAYER_SCALE.match(key)
        if match is None:
            renamed[key] = value
        elif has_scales:
            renamed[f"{match[1]}ls{match[2]}.gamma"] = value
        elif not value.is_meta and bool((value != 1).any()):
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} has layer scales other than one ({key}), which {preset.model} does not have"
            )
    return renamed


def _refuse_lost_biases(net: Any, state: dict[str, Tensor], preset: TeacherPreset, path: Path) -> None:
    """Raise TeacherWeightsError if timm's network would silently lose biases of the attention.

    DINOv3's distilled models have biases of zero, which timm's networks omit.
    """
    if "storage_tokens" not in state or any(key.endswith("q_bias") for key in net.state_dict()):
        return
    for key, bias in state.items():
        if key.endswith("attn.qkv.bias"):
            query, _, value = bias.chunk(3)  # the bias of the keys is masked in the network: it has no effect
            if query.any() or value.any():
                raise TeacherWeightsError(
                    f"teacher '{preset.name}': {path} has biases in its attention ({key}), which {preset.model} does not "
                    f"have: use --teacher timm:{preset.model.partition('.')[0]}_qkvb"
                )


def _summary_note(preset: TeacherPreset) -> str:
    """Return the description of the summary for the spec, which records it: the wording must not change."""
    if preset.timm.summary_tokens:
        return f"summary tokens {', '.join(str(token) for token in preset.timm.summary_tokens)}, side by side"
    if preset.timm.global_pool == "token":
        return "class token after the final norm"
    return "what timm's classifier reads"


def _spatial_note(preset: TeacherPreset) -> str:
    """Return the description of the spatial features for the spec, which records it: the wording must not change."""
    if preset.timm.summary_tokens:
        return "patch tokens of the last block"
    if preset.timm.norm_map:
        return "last stage, after the head's norm"
    if preset.timm.global_pool == "token":
        return "patch tokens after the final norm"
    return "timm's last map, after the final norm of a transformer"
