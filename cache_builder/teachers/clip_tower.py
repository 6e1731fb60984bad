"""The image tower for a file of open_clip: the published one, or a plain ViT of the file's own sizes."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import (
    CLIPVisionCfg,
    _build_vision_tower,  # pyright: ignore[reportPrivateUsage]  # the public CLIP class would also build the text tower
    resize_pos_embed,
)
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor

from cache_builder.teachers.preset import FOLDER, HUB, TeacherPreset
from cache_builder.teachers.presets import CLIPS
from cache_builder.teachers.state_dict import (
    LEGACY_SETS,
    OPEN_CLIP_SETS,
    WeightsFile,
    extract_network,
    read_weights_file,
    refuse_adapters,
)
from cache_builder.teachers.traced_conversion import resized_positions
from cache_builder.teachers.weights import first_line, from_hub
from cache_builder.teachers.wrong_weights import first_differences, published_twin
from radio_cache.errors import ConfigError, TeacherWeightsError, UnknownTeacherError

_PREFIX = "visual."
# Adapters in the text tower change no image, so they are not refused.
_TEXT_PREFIXES = (
    "transformer.",
    "text.",
    "token_embedding.",
    "text_decoder.",
)
_CONFIG_FILE = "open_clip_config.json"


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The configuration of an image tower."""

    config: CLIPVisionCfg
    embed_dim: int
    quick_gelu: bool

    note: str = ""
    """Message for the user if the sizes are not the published ones."""

    @property
    def size_px(self) -> int:
        """Side of the tower's own input in pixels."""
        size = self.config.image_size
        return size if isinstance(size, int) else size[0]

    @property
    def patch_px(self) -> int | None:
        """Side of a patch in pixels for open_clip's own ViT; None for other networks."""
        is_vit = self.config.timm_model_name is None and isinstance(self.config.layers, int)
        return int(self.config.patch_size) if is_vit else None

    def build(self) -> Any:
        """Return the network, without weights, on the current device."""
        return _build_vision_tower(self.embed_dim, self.config, self.quick_gelu).eval()

    def at_size(self, size_px: int) -> "Tower":
        """Return the tower for another input size, if it is open_clip's own ViT.

        Other networks are built at their own size and resized by `resize_built`.
        """
        return self if self.patch_px is None else replace(self, config=replace(self.config, image_size=size_px))


def model_config(model: str) -> dict[str, Any]:
    """Return open_clip's configuration of a model, by its name or from its repository or folder.

    Raises:
        UnknownTeacherError: the repository or folder has no valid configuration.
    """
    if not model.startswith((HUB, FOLDER)):
        return dict(open_clip.get_model_config(model) or {})
    return dict(_whole_config(model)["model_cfg"])


def _whole_config(model: str) -> dict[str, Any]:
    """Return the configuration file of an `hf-hub:` or `local-dir:` model, with its required fields checked."""
    try:
        if model.startswith(FOLDER):
            path = Path(model.removeprefix(FOLDER)) / _CONFIG_FILE
        else:
            path = from_hub(model.removeprefix(HUB), (_CONFIG_FILE,))
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        # These lines raise for a missing or misshapen field, so that later code need not check.
        dict(config["model_cfg"]["vision_cfg"])
        int(config["model_cfg"]["embed_dim"])
        dict(config.get("preprocess_cfg", {}))
    except Exception as exc:  # json and the hub client raise many kinds
        raise UnknownTeacherError(
            f"no teacher is called 'open_clip:{model}': its {_CONFIG_FILE} cannot be read ({type(exc).__name__}: "
            f"{first_line(exc)})"
        ) from exc
    return config


def published_tower(model: str) -> Tower:
    """Return the image tower of one of open_clip's configurations.

    Raises:
        UnknownTeacherError: as `model_config`.
        ConfigError: the tower is a network of timm that timm does not know.
    """
    published = model_config(model)
    # Configurations of newer open_clip versions may have fields that the installed one does not know.
    known = {item.name for item in fields(CLIPVisionCfg)}
    config = CLIPVisionCfg(**{key: value for key, value in published["vision_cfg"].items() if key in known})
    config.timm_model_pretrained = False  # or timm would download weights that are replaced at once
    name = config.timm_model_name
    if name is not None and not timm.is_model(str(name)):
        # timm accepts folders and repositories (local-dir:, hf-hub:) for names, too: a file must not redirect it there.
        raise ConfigError(f"the image tower of open_clip's '{model}' is '{name}' of timm, which timm does not know")
    return Tower(
        config=config, embed_dim=int(published["embed_dim"]), quick_gelu=bool(published.get("quick_gelu", False))
    )


def trained_with_quick_gelu(model: str, tag: str) -> bool:
    """Return whether weights were trained with QuickGELU, by open_clip's entry of the tag, or else that of the model.

    open_clip builds the activation of the model's name, and only warns if the weights were trained with the other one.
    """
    of_model = bool(model_config(model).get("quick_gelu", False))
    return bool(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", of_model)) if tag else of_model


def read_clip_file(path: Path, *, teacher: str, legacy_loading: bool = False) -> WeightsFile:
    """Read the tensors of a whole CLIP model by open_clip's names.

    Args:
        path: the weights file.
        teacher: name of the teacher, for messages.
        legacy_loading: as in `TeacherOptions`.

    Raises:
        TeacherWeightsError: as `read_weights_file`; or the file holds adapters.
    """
    file = read_weights_file(path, teacher=teacher, sets=LEGACY_SETS if legacy_loading else OPEN_CLIP_SETS)
    file = extract_network(file, (_PREFIX,), teacher=teacher, path=path)
    unused = (name for name in file.tensors if not name.startswith((_PREFIX, *_TEXT_PREFIXES)))
    refuse_adapters(unused, teacher=teacher, path=path)
    return file


def image_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the image tower, by their names in it."""
    return {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}


def tower_of_file(preset: TeacherPreset, state: dict[str, Tensor], path: Path, origin: str) -> Tower:
    """Return the published tower, or, for a plain ViT of other sizes, one with the file's own sizes.

    Args:
        preset: the teacher.
        state: tensors of the image tower.
        path: the weights file, for messages.
        origin: suffix for messages, from `likely_origin`.

    Raises:
        TeacherWeightsError: the file holds no image tower of this kind, or another published one.
    """
    tower = published_tower(preset.model)
    config = replace(tower.config)
    if tower.patch_px is None or config.attentional_pool or config.pool_type != "tok":
        if not state:
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is not in open_clip's format: it has no tensors of an image tower (visual.)"
                f"{origin}"
            )
        return tower
    if not {"conv1.weight", "proj", "positional_embedding"} <= state.keys():
        raise TeacherWeightsError(
            f"teacher '{preset.name}': {path} is not a CLIP ViT in open_clip's format: it has no visual.conv1.weight "
            f"or no visual.proj{origin}"
        )
    width, _, patch, _ = state["conv1.weight"].shape  # (width, 3, patch, patch)
    layers = 1 + max((int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks.")), default=-1)
    # One position for the class token, and one for each patch of a square.
    num_positions = int(state["positional_embedding"].shape[0])
    tokens = round((num_positions - 1) ** 0.5)
    if tokens**2 + 1 != num_positions:
        raise TeacherWeightsError(
            f"teacher '{preset.name}': {path} has a table of {num_positions} positions, which is not one for a class token and a "
            "square of patches: such a network cannot be this teacher"
        )
    embed_dim = int(state["proj"].shape[1])
    published_sizes = (config.width, config.layers, config.patch_size, config.image_size, tower.embed_dim)
    if published_sizes == (width, layers, patch, tokens * patch, embed_dim):
        return tower
    sizes = (width, layers, patch, embed_dim)
    # Sizes of another preset mean a wrong file; unknown sizes mean a user's own training.
    if _sizes(tower) != sizes and (
        twin := published_twin(preset, CLIPS, lambda other_preset: _sizes(published_tower(other_preset.model)) == sizes)
    ):
        with torch.device("meta"):
            differences = first_differences(tower.build().state_dict(), state)
        raise TeacherWeightsError(
            f"teacher '{preset.name}': {path} is not {preset.model}: {'; '.join(differences)}. Its sizes are those of "
            f"{twin.name}: use --teacher {twin.name}"
        )
    # The file does not record the number of heads: open_clip's default width of a head is assumed.
    if config.width != width:
        config.head_width = CLIPVisionCfg.head_width if width % CLIPVisionCfg.head_width == 0 else int(width)
    config.width, config.layers = int(width), layers
    config.patch_size, config.image_size = int(patch), tokens * int(patch)
    note = (
        f"these weights are not the published {preset.model}: width {width}, {layers} layers, "
        f"{tokens * patch} px; heads of {config.head_width} are assumed, as open_clip does"
    )
    return replace(tower, config=config, embed_dim=embed_dim, note=note)


def _sizes(tower: Tower) -> tuple[Any, ...]:
    """Return the sizes that distinguish published towers, without the size of their input."""
    config = tower.config
    return (config.width, config.layers, config.patch_size if tower.patch_px else None, tower.embed_dim)


def positions_resized(net: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the position embeddings of open_clip's own ViT resized to the network's size.

    open_clip resizes those of a whole model, and a teacher has the image tower only.
    """
    prefixed = {_PREFIX + key: value for key, value in state.items()}
    table = f"{_PREFIX}positional_embedding"
    if table in prefixed:  # PyTorch cannot resize half precision with antialiasing on a CPU
        prefixed[table] = prefixed[table].float()
    resize_pos_embed(prefixed, SimpleNamespace(visual=net))
    return image_tensors(prefixed)


def resize_built(net: Any, tower: Tower, size_px: int, subject: str) -> dict[str, str]:
    """Give a network that is not open_clip's own ViT another input size, as open_clip does.

    Args:
        net: the built network.
        tower: its tower.
        size_px: side of the input in pixels.
        subject: the teacher in words, for messages.

    Returns:
        An entry for `TeacherSpec.loaded` about the resized position tables; {} if none was resized.

    Raises:
        ConfigError: the network takes its own size only.
    """
    # open_clip's own ViT is built at the right size.
    if tower.patch_px is not None or size_px == tower.size_px:
        return {}
    if not isinstance(net, TimmModel) or not hasattr(net.trunk, "set_input_size"):
        raise ConfigError(f"{subject} takes {tower.size_px} px and nothing else, not {size_px} px")
    return resized_positions(net, lambda: net.set_input_size(size_px))


def preprocessing_fields(model: str, tag: str, size_px: int) -> dict[str, Any]:
    """Return the fields of open_clip's PreprocessCfg for the published weights of a tag; its defaults without a tag."""
    if model.startswith((HUB, FOLDER)):
        published: Any = _whole_config(model).get("preprocess_cfg", {})
    else:
        published = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    return {**merge_preprocess_dict(asdict(PreprocessCfg()), published), "size": size_px}
