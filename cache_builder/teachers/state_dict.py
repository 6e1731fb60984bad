"""Reading a weights file without running code from it, and loading all of it into a network."""

import errno
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cache_builder.teachers.torchscript import is_torchscript, read_torchscript
from cache_builder.teachers.weights import first_line
from cache_builder.teachers.wrong_weights import first_differences
from radio_cache.errors import TeacherWeightsError
from radio_cache.torch.memory import OUT_OF_MEMORY_PHRASES

TIMM_SETS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""The sets of tensors of a training checkpoint, in the order in which timm's `load_state_dict` prefers them."""

OPEN_CLIP_SETS = ("state_dict",)
DINOV2_SETS = ("teacher", "state_dict", "model")
"""Meta evaluates the teacher of a training, which is the average of the student."""

SETS_BEFORE = ("state_dict", "model")
"""What was taken, one within the other, while a spec did not say what was loaded."""

_OTHER_SETS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "teacher",
    "net",
    "network",
    "module",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "ema",
    "params_ema",
    "params",
    "backbone",
    "encoder",
    "student",
    "weights",
)
"""Other names of such sets, tried in this order after those of the library."""

_OF_THE_OPTIMISER = re.compile(r"optim|sched|scaler|rng|loss|amp|hyper|callback|loop|buffer|meta|args|config")

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into the names of tensors."""

_ADAPTERS = re.compile(
    r"(?:^|[._])(?:lora|loha|lokr|dora|ia3)(?:[._]|$)|(?i:adapters?)(?:[._]|$)|(?:^|[._])(?:prompt_embeddings|prompt_tokens)(?:\.|$)|"
    r"(?:^|\.)(?i:w_[ab]s?)[._]\d"
)
"""Tensors that were trained beside a frozen network and change what it computes, as PEFT, loralib, SAMed and VPT name them."""

_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.")

_ASKS_FOR = re.compile(r"GLOBAL (\S+)")
_MOST_SETTINGS = 64

_SETTINGS = re.compile(
    r"argparse\.Namespace|pathlib\.\w+|numpy(\.\w+)*\.(scalar|dtype|_reconstruct|ndarray|\w+DType)|_codecs\.encode|"
    r"(omegaconf|yacs|addict|easydict|ml_collections|mmengine|mmcv|lightning|lightning_fabric|pytorch_lightning)(\.\w+)+|"
    r"datetime\.\w+|builtins\.(dict|list|set|int|float|str|tuple|object|range|slice|complex)|typing\.Any|uuid\.UUID"
)
"""Classes of settings and counts that trainings keep beside their weights. None of them is run: inert stand-ins are made."""


class _StandIn:
    """Stands for an object beside the weights. It keeps nothing and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Stands for a defaultdict, which PyTorch would not fill."""
    return {}


@dataclass
class WeightsFile:
    """The tensors of a file by name.

    chosen: which set of tensors was taken, empty where the file holds one only. others: the names of the other sets.
    """

    tensors: dict[str, Tensor]
    chosen: str = ""
    others: list[str] = field(default_factory=list[str])

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for the user about the set that was taken, if there was a choice."""
        if not self.chosen:
            return ()
        return (f"the weights are those of '{self.chosen}'; the file also holds {_quoted(self.others)}",)

    def choose(self, chosen: str, others: Iterable[str]) -> None:
        """Note a choice between several sets of tensors, inside the set that was chosen before."""
        self.chosen = f"{self.chosen}/{chosen}" if self.chosen else chosen
        self.others += others


def read_state_dict(path: Path, *, teacher: str) -> dict[str, Tensor]:
    """Tensors by name from a weights file, as `read_weights_file` does, of the usual set."""
    return read_weights_file(path, teacher=teacher).tensors


def read_weights_file(path: Path, *, teacher: str, sets: Sequence[str] = TIMM_SETS) -> WeightsFile:
    """Read a safetensors or PyTorch file or a TorchScript archive; nothing in the file can run.

    Takes one set of tensors, and removes what wrappers such as DistributedDataParallel put into their names.

    Args:
        sets: names of sets of tensors in the order in which the teacher's own library prefers them.

    Raises:
        TeacherWeightsError: a pickle that needs code, a damaged file, one that cannot be read just now, or no tensors.
    """
    loaded = _read(path, teacher)
    file = WeightsFile({})
    while isinstance(loaded, dict):
        level = cast(dict[Any, Any], loaded)
        names = [str(name) for name, value in level.items() if _holds_tensors(value)]
        names = [name for name in names if not _OF_THE_OPTIMISER.search(name)]
        known = list(dict.fromkeys(name for name in (*sets, *_OTHER_SETS) if name in names))
        has_tensors = any(isinstance(value, Tensor) for value in level.values())
        if not known and not has_tensors and len(names) > 1:
            raise TeacherWeightsError(
                f"teacher '{teacher}': {path} holds several sets of tensors ({_quoted(names)}), and which one is meant cannot "
                "be known: save the one alone"
            )
        if not known and (has_tensors or not names):
            break
        chosen = known[0] if known else names[0]
        if len(known) > 1:
            file.choose(chosen, known[1:])
        loaded = level[chosen]
    if not isinstance(loaded, dict):
        raise TeacherWeightsError(f"teacher '{teacher}': {path} holds a {type(loaded).__name__}, not tensors by name")
    items = cast(dict[Any, Any], loaded).items()
    tensors = {_WRAPPERS.sub("", str(key)): value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise TeacherWeightsError(f"teacher '{teacher}': {path} holds no tensors")
    while all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    file.tensors = tensors
    return file


def extract_network(
    file: WeightsFile, anchors: Sequence[str], *, teacher: str, path: Path, own: Sequence[str] = ()
) -> WeightsFile:
    """Take the network out of a larger one: its tensors' names without the modules that it lies in.

    Args:
        anchors: beginnings of names that the network has. The first that the file has below any module counts.
        own: names of the network, more than half of which must lie below that module: `conv1.weight` alone ends many names.

    Returns:
        The tensors below that module; the file itself if the network does not lie in another one.

    Raises:
        TeacherWeightsError: several modules of the file hold such a network, and none is known to be the one.
    """
    for anchor in anchors:
        prefixes = {
            key[:place]
            for key in file.tensors
            if (place := key.find(anchor)) >= 0 and (place == 0 or key[place - 1] == ".")
        }
        if "" in prefixes:
            return file
        prefixes = {prefix for prefix in prefixes if 2 * sum(prefix + name in file.tensors for name in own) >= len(own)}
        if prefixes:
            return _below(file, sorted(prefixes, key=len), teacher=teacher, path=path)
    return file


# MoCo evaluates its base encoder, not the one of momentum: only names that leave no doubt.
_AVERAGES = re.compile(r"(?:^|[._])(?:teacher|ema|averaged?)(?:$|[._])")


def _below(file: WeightsFile, prefixes: list[str], *, teacher: str, path: Path) -> WeightsFile:
    averages = [prefix for prefix in prefixes if _AVERAGES.search(prefix)]
    if len(prefixes) > 1 and len(averages) != 1:
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} holds several such networks ({_quoted(prefixes)}), and which one is meant cannot be "
            "known: save the state dict of the one alone"
        )
    prefix = averages[0] if len(prefixes) > 1 else prefixes[0]
    refuse_adapters((key for key in file.tensors if not key.startswith(prefix)), teacher=teacher, path=path)
    below = {key.removeprefix(prefix): value for key, value in file.tensors.items() if key.startswith(prefix)}
    taken = WeightsFile(below, file.chosen, list(file.others))
    if len(prefixes) > 1:
        taken.choose(prefix.rstrip("."), (other.rstrip(".") for other in prefixes if other != prefix))
    return taken


def refuse_adapters(left_out: Iterable[str], *, teacher: str, path: Path) -> None:
    """Raise TeacherWeightsError if tensors that would be left out change what the network computes.

    Args:
        left_out: names of tensors that lie outside of the network in the file, such as those of heads.
    """
    adapters = [name for name in left_out if _ADAPTERS.search(name)]
    if adapters:
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} holds {len(adapters)} tensors of adapters or prompts (such as {adapters[0]}) beside "
            "the network, which would be left out, so that the teacher would be the network without them: merge them into its "
            "weights, and save its state dict"
        )


def _holds_tensors(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    inner = cast(dict[Any, Any], value).values()
    return any(isinstance(one, Tensor) or _holds_tensors(one) for one in inner)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _read(path: Path, teacher: str) -> Any:
    if _SHARD.search(path.name):
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} is one of several files that hold the weights together, and weights are read from one "
            "file: load them with their own library, and save the state dict with safetensors.torch.save_file"
        )
    if path.name.endswith((".index.json", ".npz", ".gguf", ".onnx", ".h5", ".msgpack")):
        what = "an index of several files" if path.suffix == ".json" else f"a {path.suffix} file"
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} is {what}, and weights are read from one file of PyTorch or safetensors: load it with "
            "its own library, and save the state dict with safetensors.torch.save_file"
        )
    try:
        if path.suffix == ".safetensors" or is_safetensors(path):
            from safetensors.torch import load_file

            return load_file(path)
        if is_torchscript(path):
            return read_torchscript(path)
        return _read_pickle(path)
    except pickle.UnpicklingError as exc:
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} is not a plain file of tensors, and files that can run code are not opened "
            f"({_what_stops_it(exc)}). Save its state dict with torch.save, or as safetensors; fetch it again if it is one"
        ) from exc
    except Exception as exc:  # torch and safetensors raise RuntimeError, EOFError, KeyError ... on damaged files
        if is_out_of_memory(exc):
            raise out_of_memory_error(teacher, path) from exc
        if isinstance(exc, OSError) and exc.errno not in (None, errno.EINVAL):
            raise TeacherWeightsError(
                f"teacher '{teacher}': {path} cannot be read just now: {exc.strerror}. The file itself may be whole: see to its "
                "permissions and its disk, and run the same command again"
            ) from exc
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} cannot be read as weights: {first_line(exc).rstrip('.')}. Its "
            f"{path.stat().st_size} bytes are not the whole file, or not such a file: fetch it again"
        ) from exc


def _read_pickle(path: Path) -> Any:
    """Read with `weights_only=True`; settings beside the weights become inert stand-ins."""
    stand_ins: list[tuple[Callable[..., Any], str]] = [(_plain_dict, "collections.defaultdict")]
    while True:
        try:
            with torch.serialization.safe_globals(cast(Any, stand_ins)):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as exc:
            asked = _ASKS_FOR.search(str(exc))
            name = asked[1] if asked else ""
            name = name if "." in name else f"builtins.{name}"  # PyTorch leaves that out
            known = {other for _, other in stand_ins}
            if not _SETTINGS.fullmatch(name) or name in known or len(stand_ins) >= _MOST_SETTINGS:
                raise
            # A class for each: PyTorch keeps them by module and name, and looks both up in the class itself.
            module, _, short = name.rpartition(".")
            stand_ins.append((type(short, (_StandIn,), {"__module__": module}), name))


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do, whatever its name: files behind links often have none."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a library says that there is too little memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(phrase in str(error) for phrase in (*OUT_OF_MEMORY_PHRASES, "os error 12"))


def out_of_memory_error(teacher: str, path: Path) -> TeacherWeightsError:
    """The error for weights that do not fit into memory."""
    size = path.stat().st_size / 1e9
    return TeacherWeightsError(
        f"teacher '{teacher}': there is too little memory for the weights in {path} ({size:.2f} GB, and up to twice as much "
        "in float32, beside the network): free some, or use a machine with more. The file itself is not at fault"
    )


def _what_stops_it(error: pickle.UnpicklingError) -> str:
    """Why a pickle is not read. PyTorch's own words go on to tell how to run what is in it."""
    asked = _ASKS_FOR.search(str(error))
    if asked:
        return f"it asks for {asked[1]}"
    return "PyTorch finds no tensors in it" if "weights_only" in str(error) else first_line(error)


def load_exactly(net: torch.nn.Module, state: dict[str, Tensor], *, teacher: str, path: Path, whose: str = "") -> None:
    """Load all of a network's tensors.

    Raises TeacherWeightsError naming what is missing, left over or misshapen, and whose the file may be. whose: that, if
    the tensors' names here are not those in the file.
    """
    own = net.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    both = own.keys() & state.keys()
    wrong = [key for key in both if own[key].shape != state[key].shape]
    # Loading would cast them without a word: the integers of a quantised network are no weights without their scales.
    quantised = sorted(key for key in both if own[key].is_floating_point() and not state[key].is_floating_point())
    problems = [
        f"{len(names)} {what} (such as {example})"
        for names, what, example in (
            (missing, "tensors missing", "".join(missing[:1])),
            (extra, "tensors too many", "".join(extra[:1])),
            (wrong, "of another shape", ", ".join(first_differences(own, state))),
            (
                quantised,
                "of another kind",
                "".join(f"{key} is {state[key].dtype}, needed is {own[key].dtype}" for key in quantised[:1]),
            ),
        )
        if names
    ]
    if problems:
        adapters = any(_ADAPTERS.search(key) for key in extra)
        cure = ". Adapters and prompts have to be merged into the weights first" if adapters else whose
        raise TeacherWeightsError(f"teacher '{teacher}': {path} does not fit the network: {'; '.join(problems)}{cure}")
    net.load_state_dict(state)
