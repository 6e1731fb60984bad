"""Teachers by the name their library gives them: `timm:<model>` and `open_clip:<model>/<weights>`.

Such a name is no name for a group in a cache; `group_name` makes one of it. The cache also records the name itself.
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
    """`open_clip:ViT-B-32/laion2b_e16` -> `open_clip-vit-b-32.laion2b_e16`, a name that a group in a cache can have.

    No two models of either library get the same one (a test compares them all). Of a folder its last part counts.
    """
    library, _, model = name.partition(":")
    if model.startswith(FOLDER):
        name = f"{library}:{FOLDER}{Path(model.removeprefix(FOLDER)).name}"
    return re.sub(r"[^a-z0-9._-]", "-", name.lower().replace("/", "."))


def library_preset(name: str) -> TeacherPreset:
    """The preset of one of a library's models. Imports that library.

    Raises UnknownTeacherError with the nearest names, or ConfigError for preprocessing that is not done here.
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
            input_px=224,
            fit="crop",
            weights=WeightsSource(size=""),
        )
    if model.startswith(FOLDER):
        model = FOLDER + str(Path(model.removeprefix(FOLDER)).expanduser().absolute())
    return _timm_preset(name, model) if library == "timm" else _open_clip_preset(name, model)


def _source_of(model: str, files: tuple[str, ...]) -> WeightsSource:
    """Where the weights of a `hf-hub:` or `local-dir:` model lie."""
    if model.startswith(FOLDER):
        return WeightsSource(size="", folder=(model.removeprefix(FOLDER), files))
    return WeightsSource(size="", hub=(model.removeprefix(HUB), files))


def timm_pretrained_config(model: str) -> dict[str, Any]:
    """timm's preprocessing and head of a model, by its name or from the repository or folder that it lies in.

    Raises UnknownTeacherError if that holds no model of timm.
    """
    import timm
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    if not model.startswith((HUB, FOLDER)):
        known: Any = timm.get_pretrained_cfg(model)
        return known.to_dict() if known else {}
    try:
        if model.startswith(FOLDER):
            config, architecture, _ = load_model_config_from_path(model.removeprefix(FOLDER))
        else:
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
    """The path of a file in the cache of the hub, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(repository.partition("@")[0], file)


def _timm_preset(name: str, model: str) -> TeacherPreset:
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
            licence=published.get("license") or _ask(model),
            input_px=prepared.size_px,
            fit=prepared.fit,
            crop_share=prepared.size_px / prepared.resize_px,
            weights=_source_of(model, TIMM_FILES),
        )
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise UnknownTeacherError(_unknown(name, f"timm {timm.__version__}", model, timm.list_models()))
    try:
        config: Any = timm.get_pretrained_cfg(model) or PretrainedCfg()
    except RuntimeError as exc:
        tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
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
        licence=config.license or _ask(hub or url),
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
            licence=_ask(model),
            input_px=prepared.size_px,
            fit=prepared.fit,
            weights=_source_of(model, OPEN_CLIP_FILES),
        )
    architecture, _, tag = model.partition("/")
    if architecture not in open_clip.list_models():
        raise UnknownTeacherError(_unknown(name, "open_clip", architecture, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise UnknownTeacherError(
            f"open_clip has no weights '{tag}' of {architecture}. Known: {', '.join(tags) or 'none'}"
        )
    published: dict[str, Any] = dict(open_clip.get_pretrained_cfg(architecture, tag)) if tag else {}
    prepared = open_clip_preprocessing(
        f"teacher '{name}'", preprocessing_fields(architecture, tag, published_tower(architecture).size_px)
    )
    hub, _, file = str(published.get("hf_hub") or "").rpartition("/")
    files = (file,) if file else OPEN_CLIP_FILES
    url = published.get("url") or None
    return TeacherPreset(
        name=group_name(name),
        family="clip",
        model=architecture,
        tag=tag,
        params="",
        licence=_ask(hub or url or ""),
        input_px=prepared.size_px,
        fit=prepared.fit,
        weights=WeightsSource(size="", hub=(hub, files) if hub else None, url=None if hub else url),
    )


def _unknown(name: str, library: str, model: str, known: list[str]) -> str:
    near = nearest_names(model, known, count=5)
    return (
        f"no teacher is called '{name}': {library} has no model '{model}'. "
        f"Nearest of its {len(known)}: {', '.join(near) or 'none'}"
    )


def _ask(place: str) -> str:
    return f"see {place}" if place else "unknown"
