"""Teachers by the names of their library: `timm:<model>` and `open_clip:<model>/<weights>`.

Such a name cannot be that of a group in a cache, so `group_name` derives one. The cache records the whole name, too.
"""

import os
import re
from pathlib import Path
from typing import Any

from cache_builder.teachers.preprocessing import open_clip_preprocessing, timm_preprocessing
from cache_builder.teachers.preset import FOLDER, HUB, TeacherPreset, WeightsSource
from cache_builder.teachers.presets import OPEN_CLIP_FILES, TIMM_FILES
from cache_builder.teachers.weights import check_network, first_line
from radio_cache.allowed_modules import split_path
from radio_cache.errors import UnknownTeacherError, nearest_names

LIBRARIES = ("timm", "open_clip", "torch-module")


def is_library_name(name: str) -> bool:
    """Return whether a name is one of a library's models."""
    return name.partition(":")[0] in LIBRARIES and ":" in name


def group_name(name: str) -> str:
    """Return the name of the group for a library's model: `timm:vit_base.x` -> `timm-vit_base.x`.

    No two models of either library get the same one (a test compares them all). Of a folder only the last part is used.
    """
    library, _, model = name.partition(":")
    if model.startswith(FOLDER):
        name = f"{library}:{FOLDER}{Path(model.removeprefix(FOLDER)).name}"
    return re.sub(r"[^a-z0-9._-]", "-", name.lower().replace("/", "."))


def library_preset(name: str) -> TeacherPreset:
    """Return the preset of a library's model. This imports the library.

    Raises:
        UnknownTeacherError: the library has no such model. The message lists the nearest names.
        ConfigError: the model's preprocessing is not supported.
    """
    library, _, model = name.partition(":")
    if library == "torch-module":
        split_path(model, what=f"teacher '{name}'")
        return TeacherPreset(
            name=group_name(name),
            family="torch-module",
            model=model,
            params="",
            licence="your own",
            input_px=224,  # the default of --size for a module, whose own size is unknown
            fit="crop",
            weights=WeightsSource(size=""),
        )
    # Absolute, because the cache records the name, and may be opened from another folder.
    if model.startswith(FOLDER):
        model = FOLDER + str(Path(model.removeprefix(FOLDER)).expanduser().absolute())
    return _timm_preset(name, model) if library == "timm" else _open_clip_preset(name, model)


def _source_of(model: str, files: tuple[str, ...]) -> WeightsSource:
    """Return the source of the weights of a `hf-hub:` or `local-dir:` model."""
    if model.startswith(FOLDER):
        return WeightsSource(size="", folder=(model.removeprefix(FOLDER), files))
    return WeightsSource(size="", hub=(model.removeprefix(HUB), files))


def timm_pretrained_config(model: str) -> dict[str, Any]:
    """Return timm's pretrained configuration of a model, by its name or from its repository or folder.

    Raises:
        UnknownTeacherError: the repository or folder holds no model of timm.
    """
    import timm
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    if not model.startswith((HUB, FOLDER)):
        published: Any = timm.get_pretrained_cfg(model)
        return published.to_dict() if published else {}
    try:
        if model.startswith(FOLDER):
            config, architecture, _ = load_model_config_from_path(model.removeprefix(FOLDER))
        else:
            # The hub client retries for a minute without a network; this check fails within seconds.
            if not isinstance(try_to_load(model.removeprefix(HUB), "config.json"), str):
                check_network(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
            config, architecture, _ = load_model_config_from_hf(model.removeprefix(HUB))
    except Exception as exc:  # json, the hub client and timm raise many kinds
        raise UnknownTeacherError(
            f"no teacher is called 'timm:{model}': its config.json, as timm writes it, cannot be read ({first_line(exc)})"
        ) from exc
    if not timm.is_model(architecture):
        raise UnknownTeacherError(f"'timm:{model}' is of '{architecture}', which timm {timm.__version__} does not know")
    return dict(config)


def try_to_load(repository: str, file: str) -> Any:
    """Return the path of a file in the local cache of the hub; no string if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(repository.partition("@")[0], file)


def _timm_preset(name: str, model: str) -> TeacherPreset:
    """Return the preset of a model of timm."""
    import timm
    from timm.data.config import resolve_data_config
    from timm.models import PretrainedCfg

    if model.startswith((HUB, FOLDER)):
        published = timm_pretrained_config(model)
        prepared = timm_preprocessing(f"teacher '{name}'", resolve_data_config(pretrained_cfg=published))
        return TeacherPreset(
            name=group_name(name),
            family="timm",
            model=model,
            params="",
            licence=published.get("license") or _see(model),
            input_px=prepared.size_px,
            fit=prepared.fit,
            crop_share=prepared.size_px / prepared.resize_px,
            weights=_source_of(model, TIMM_FILES),
        )
    # timm's names: architecture.weights
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise UnknownTeacherError(_unknown_message(name, f"timm {timm.__version__}", model, timm.list_models()))
    try:
        config: Any = timm.get_pretrained_cfg(model) or PretrainedCfg()
    except RuntimeError as exc:
        tags = [full_name.partition(".")[2] for full_name in timm.list_models(f"{architecture}.*", pretrained=True)]
        raise UnknownTeacherError(
            f"timm {timm.__version__} has no weights '{tag}' of {architecture}. Known: {', '.join(tags) or 'none'}"
        ) from exc
    prepared = timm_preprocessing(f"teacher '{name}'", resolve_data_config(pretrained_cfg=config.to_dict()))
    hub, url = config.hf_hub_id, config.url
    return TeacherPreset(
        name=group_name(name),
        family="timm",
        model=model,
        params="",
        # The libraries know few licences; the address of the weights leads to the others.
        licence=config.license or _see(hub or url),
        input_px=prepared.size_px,
        fit=prepared.fit,
        crop_share=prepared.size_px / prepared.resize_px,
        weights=WeightsSource(
            size="",
            hub=(hub, (config.hf_hub_filename,) if config.hf_hub_filename else TIMM_FILES) if hub else None,
            url=url if url and not hub else None,
        ),
    )


def _open_clip_preset(name: str, model: str) -> TeacherPreset:
    """Return the preset of a model of open_clip."""
    import open_clip

    from cache_builder.teachers.clip_tower import preprocessing_fields, published_tower

    if model.startswith((HUB, FOLDER)):
        prepared = open_clip_preprocessing(
            f"teacher '{name}'", preprocessing_fields(model, "", published_tower(model).size_px)
        )
        return TeacherPreset(
            name=group_name(name),
            family="clip",
            model=model,
            params="",
            licence=_see(model),
            input_px=prepared.size_px,
            fit=prepared.fit,
            weights=_source_of(model, OPEN_CLIP_FILES),
        )
    architecture, _, tag = model.partition("/")
    if architecture not in open_clip.list_models():
        raise UnknownTeacherError(_unknown_message(name, "open_clip", architecture, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    # A model without a tag is an architecture for weights from --weights.
    if tag and tag not in tags:
        raise UnknownTeacherError(
            f"open_clip has no weights '{tag}' of {architecture}. Known: {', '.join(tags) or 'none'}"
        )
    published: dict[str, Any] = dict(open_clip.get_pretrained_cfg(architecture, tag)) if tag else {}
    prepared = open_clip_preprocessing(
        f"teacher '{name}'", preprocessing_fields(architecture, tag, published_tower(architecture).size_px)
    )
    # open_clip's "hf_hub" ends in a slash, or in the name of one file: "repository/" or "repository/file".
    hub, _, file = str(published.get("hf_hub") or "").rpartition("/")
    files = (file,) if file else OPEN_CLIP_FILES
    url = published.get("url") or None
    return TeacherPreset(
        name=group_name(name),
        family="clip",
        model=architecture,
        tag=tag,
        params="",
        licence=_see(hub or url or ""),
        input_px=prepared.size_px,
        fit=prepared.fit,
        # The hub before the plain address: it resumes downloads and checks them.
        weights=WeightsSource(size="", hub=(hub, files) if hub else None, url=None if hub else url),
    )


def _unknown_message(name: str, library: str, model: str, known: list[str]) -> str:
    """Return the message for a model that a library does not have, with the nearest names."""
    near = nearest_names(model, known, count=5)
    return (
        f"no teacher is called '{name}': {library} has no model '{model}'. "
        f"Nearest of its {len(known)}: {', '.join(near) or 'none'}"
    )


def _see(location: str) -> str:
    """Return a licence that refers to the location of the weights."""
    return f"see {location}" if location else "unknown"
