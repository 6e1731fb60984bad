"""Teachers by the name their library gives them: `timm:<model>` and `open_clip:<model>/<weights>`.

Such a name is no name for a group in a cache; `group_name` makes one of it. The cache also records the name itself.
"""

import re
from typing import Any

from cache_builder.teachers.preprocessing import open_clip_preprocessing, timm_preprocessing
from cache_builder.teachers.preset import TeacherPreset, WeightsSource
from cache_builder.teachers.presets import OPEN_CLIP_FILES, TIMM_FILES
from radio_cache.errors import UnknownTeacherError, nearest_names

LIBRARIES = ("timm", "open_clip")


def is_library_name(name: str) -> bool:
    """Whether a name is one of a library's models."""
    return name.partition(":")[0] in LIBRARIES and ":" in name


def group_name(name: str) -> str:
    """`open_clip:ViT-B-32/laion2b_e16` -> `open_clip-vit-b-32.laion2b_e16`, a name that a group in a cache can have.

    No two models of either library get the same one (a test compares them all).
    """
    return re.sub(r"[^a-z0-9._-]", "-", name.lower().replace("/", "."))


def library_preset(name: str) -> TeacherPreset:
    """The preset of one of a library's models. Imports that library.

    Raises UnknownTeacherError with the nearest names, or ConfigError for preprocessing that is not done here.
    """
    library, _, model = name.partition(":")
    return _timm_preset(name, model) if library == "timm" else _open_clip_preset(name, model)


def _timm_preset(name: str, model: str) -> TeacherPreset:
    import timm
    from timm.data.config import resolve_data_config
    from timm.models import PretrainedCfg

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
        name=group_name(name), family="timm", model=model, params="", licence=config.license or _ask(hub or url),
        input_px=prepared.size_px, fit=prepared.fit,
        weights=WeightsSource(
            size="", hub=(hub, (config.hf_hub_filename,) if config.hf_hub_filename else TIMM_FILES) if hub else None,
            url=url if url and not hub else None,
        ),
    )  # fmt: skip


def _open_clip_preset(name: str, model: str) -> TeacherPreset:
    import open_clip

    from cache_builder.teachers.clip_tower import preprocessing_fields, published_tower

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
        name=group_name(name), family="clip", model=architecture, tag=tag, params="", licence=_ask(hub or url or ""),
        input_px=prepared.size_px, fit=prepared.fit,
        weights=WeightsSource(size="", hub=(hub, files) if hub else None, url=None if hub else url),
    )  # fmt: skip


def _unknown(name: str, library: str, model: str, known: list[str]) -> str:
    near = nearest_names(model, known, count=5)
    return (
        f"no teacher is called '{name}': {library} has no model '{model}'. "
        f"Nearest of its {len(known)}: {', '.join(near) or 'none'}"
    )


def _ask(place: str) -> str:
    return f"see {place}" if place else "unknown"
