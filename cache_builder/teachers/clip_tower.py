"""The image tower that a file of open_clip belongs to: the published one, or a plain ViT of the file's own sizes."""

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
    OPEN_CLIP_SETS,
    SETS_BEFORE,
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
_OF_TEXT = (
    "transformer.",
    "text.",
    "token_embedding.",
    "text_decoder.",
)  # what is done to the text tower changes no image
_CONFIG_FILE = "open_clip_config.json"


@dataclass(frozen=True, kw_only=True)
class Tower:
    """What it takes to build an image tower. note: empty, or that these are not the published sizes."""

    config: CLIPVisionCfg
    embed_dim: int
    quick_gelu: bool
    note: str = ""

    @property
    def size_px(self) -> int:
        """Side of its own input."""
        size = self.config.image_size
        return size if isinstance(size, int) else size[0]

    @property
    def patch_px(self) -> int | None:
        """Side of a patch of open_clip's own ViT; None for other networks."""
        is_vit = self.config.timm_model_name is None and isinstance(self.config.layers, int)
        return int(self.config.patch_size) if is_vit else None

    def build(self) -> Any:
        """The network, on the current device."""
        return _build_vision_tower(self.embed_dim, self.config, self.quick_gelu).eval()

    def at_size(self, size_px: int) -> "Tower":
        """The same for another input, if it is open_clip's own ViT; other networks take another size once they are built."""
        return self if self.patch_px is None else replace(self, config=replace(self.config, image_size=size_px))


def model_config(model: str) -> dict[str, Any]:
    """open_clip's configuration of a model, by its name or from the repository or folder that it lies in."""
    if not model.startswith((HUB, FOLDER)):
        return dict(open_clip.get_model_config(model) or {})
    return dict(_whole_config(model)["model_cfg"])


def _whole_config(model: str) -> dict[str, Any]:
    try:
        if model.startswith(FOLDER):
            path = Path(model.removeprefix(FOLDER)) / _CONFIG_FILE
        else:
            path = from_hub(model.removeprefix(HUB), (_CONFIG_FILE,))
        config: Any = json.loads(path.read_text(encoding="utf-8"))
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
    """The image tower of one of open_clip's configurations."""
    published = model_config(model)
    known = {item.name for item in fields(CLIPVisionCfg)}
    config = CLIPVisionCfg(**{key: value for key, value in published["vision_cfg"].items() if key in known})
    config.timm_model_pretrained = False
    name = config.timm_model_name
    if name is not None and not timm.is_model(str(name)):
        # timm takes folders and repositories (local-dir:, hf-hub:) for names, too: a file must not lead it to other places.
        raise ConfigError(f"the image tower of open_clip's '{model}' is '{name}' of timm, which timm does not know")
    return Tower(
        config=config, embed_dim=int(published["embed_dim"]), quick_gelu=bool(published.get("quick_gelu", False))
    )


def trained_with_quick_gelu(model: str, tag: str) -> bool:
    """Return whether weights were trained with QuickGELU: open_clip's entry of the tag says it, or else that of the model.

    open_clip builds what the model's name says, and only warns where the weights were trained with the other one.
    """
    of_model = bool(model_config(model).get("quick_gelu", False))
    return bool(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", of_model)) if tag else of_model


def read_clip_file(path: Path, *, teacher: str, legacy_loading: bool = False) -> WeightsFile:
    """The tensors of a whole CLIP model by open_clip's names. Raises TeacherWeightsError."""
    file = read_weights_file(path, teacher=teacher, sets=SETS_BEFORE if legacy_loading else OPEN_CLIP_SETS)
    file = extract_network(file, (_PREFIX,), teacher=teacher, path=path)
    beside = (name for name in file.tensors if not name.startswith((_PREFIX, *_OF_TEXT)))
    refuse_adapters(beside, teacher=teacher, path=path)
    return file


def image_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the image tower, by their names in it."""
    return {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}


def tower_of_file(preset: TeacherPreset, state: dict[str, Tensor], path: Path, whose: str) -> Tower:
    """The published tower; for a plain ViT of other sizes in the file, that with the file's own sizes.

    state: the tensors of the image tower. whose: what the file looks like, to stand behind a message.
    Raises TeacherWeightsError if it is no image tower of this kind, or another published one.
    """
    tower = published_tower(preset.model)
    config = replace(tower.config)
    if tower.patch_px is None or config.attentional_pool or config.pool_type != "tok":
        if not state:
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is not in open_clip's format: it has no tensors of an image tower (visual.)"
                f"{whose}"
            )
        return tower
    if not {"conv1.weight", "proj", "positional_embedding"} <= state.keys():
        raise TeacherWeightsError(
            f"teacher '{preset.name}': {path} is not a CLIP ViT in open_clip's format: it has no visual.conv1.weight "
            f"or no visual.proj{whose}"
        )
    width, _, patch, _ = state["conv1.weight"].shape
    layers = 1 + max((int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks.")), default=-1)
    num_positions = int(state["positional_embedding"].shape[0])
    tokens = round((num_positions - 1) ** 0.5)
    if tokens**2 + 1 != num_positions:
        raise TeacherWeightsError(
            f"teacher '{preset.name}': {path} has a table of {num_positions} positions, which is not one for a class token and a "
            "square of patches: such a network cannot be this teacher"
        )
    embed_dim = int(state["proj"].shape[1])
    own = (config.width, config.layers, config.patch_size, config.image_size, tower.embed_dim)
    if own == (width, layers, patch, tokens * patch, embed_dim):
        return tower
    sizes = (width, layers, patch, embed_dim)
    if _sizes(tower) != sizes and (
        twin := published_twin(preset, CLIPS, lambda one: _sizes(published_tower(one.model)) == sizes)
    ):
        with torch.device("meta"):
            differences = first_differences(tower.build().state_dict(), state)
        raise TeacherWeightsError(
            f"teacher '{preset.name}': {path} is not {preset.model}: {'; '.join(differences)}. Its sizes are those of "
            f"{twin.name}: ask for --teacher {twin.name}"
        )
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
    """What tells published towers apart, other than the size of their input."""
    config = tower.config
    return (config.width, config.layers, config.patch_size if tower.patch_px else None, tower.embed_dim)


def positions_resized(net: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Position embeddings of open_clip's own ViT at the network's size. open_clip resizes those of a whole model; ours is
    the image tower alone."""
    prefixed = {_PREFIX + key: value for key, value in state.items()}
    table = f"{_PREFIX}positional_embedding"
    if table in prefixed:  # PyTorch resizes no half precision with antialiasing on a CPU
        prefixed[table] = prefixed[table].float()
    resize_pos_embed(prefixed, SimpleNamespace(visual=net))
    return image_tensors(prefixed)


def resize_built(net: Any, tower: Tower, size_px: int, what: str) -> dict[str, str]:
    """Make a network that is not open_clip's own ViT take another size, as open_clip does.

    Returns:
        What a spec says of it: which tables of positions were resized.
    """
    if tower.patch_px is not None or size_px == tower.size_px:
        return {}
    if not isinstance(net, TimmModel) or not hasattr(net.trunk, "set_input_size"):
        raise ConfigError(f"{what} takes {tower.size_px} px and nothing else, not {size_px} px")
    return resized_positions(net, lambda: net.set_input_size(size_px))


def preprocessing_fields(model: str, tag: str, size_px: int) -> dict[str, Any]:
    """The fields of open_clip's PreprocessCfg for the published weights of that tag; its defaults where there is no tag."""
    if model.startswith((HUB, FOLDER)):
        published: Any = _whole_config(model).get("preprocess_cfg", {})
    else:
        published = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    return {**merge_preprocess_dict(asdict(PreprocessCfg()), published), "size": size_px}
