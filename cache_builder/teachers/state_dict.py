"""Reading of weights files without running code from them, and strict loading into a network."""

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
"""Meta evaluates the teacher of a training, which is the moving average of the student."""

LEGACY_SETS = ("state_dict", "model")
"""Sets of tensors, one within the other, that were loaded before specs recorded what was loaded."""

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
"""Other names of sets of tensors, tried in this order after those of the library."""

_OF_THE_OPTIMISER = re.compile(r"optim|sched|scaler|rng|loss|amp|hyper|callback|loop|buffer|meta|args|config")

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into the names of tensors."""

_ADAPTERS = re.compile(
    r"(?:^|[._])(?:lora|loha|lokr|dora|ia3)(?:[._]|$)|(?i:adapters?)(?:[._]|$)|(?:^|[._])(?:prompt_embeddings|prompt_tokens)(?:\.|$)|"
    r"(?:^|\.)(?i:w_[ab]s?)[._]\d"
)
"""Tensors that were trained beside a frozen network and change what it computes, as PEFT, loralib, SAMed and VPT name them."""

_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.")

_REQUIRED_GLOBAL = re.compile(r"GLOBAL (\S+)")
_MAX_STAND_INS = 64

_SETTINGS = re.compile(
    r"argparse\.Namespace|pathlib\.\w+|numpy(\.\w+)*\.(scalar|dtype|_reconstruct|ndarray|\w+DType)|_codecs\.encode|"
    r"(omegaconf|yacs|addict|easydict|ml_collections|mmengine|mmcv|lightning|lightning_fabric|pytorch_lightning)(\.\w+)+|"
    r"datetime\.\w+|builtins\.(dict|list|set|int|float|str|tuple|object|range|slice|complex)|typing\.Any|uuid\.UUID"
)
"""Classes of settings and counts that trainings save beside their weights. They are replaced by inert stand-ins, never run."""


class _StandIn:
    """An inert replacement for an object beside the weights. It ignores its arguments and state."""

    def __new__(cls, *_: Any, **__: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Return a dict in place of a defaultdict, which PyTorch would not fill."""
    return {}


@dataclass
class WeightsFile:
    """The tensors of a file by name."""

    tensors: dict[str, Tensor]

    chosen: str = ""
    """Name of the set of tensors that is used; empty if the file holds one set only."""

    others: list[str] = field(default_factory=list[str])
    """Names of the other sets."""

    @property
    def notes(self) -> tuple[str, ...]:
        """A message for the user about the chosen set, if there was a choice."""
        if not self.chosen:
            return ()
        return (f"the weights are those of '{self.chosen}'; the file also holds {_quoted(self.others)}",)

    def choose(self, chosen: str, others: Iterable[str]) -> None:
        """Record a choice between several sets of tensors, within the set that was chosen before."""
        self.chosen = f"{self.chosen}/{chosen}" if self.chosen else chosen
        self.others += others


def read_state_dict(path: Path, *, teacher: str) -> dict[str, Tensor]:
    """Return the tensors of a weights file by name, from the set that timm prefers.

    Raises:
        TeacherWeightsError: as `read_weights_file`.
    """
    return read_weights_file(path, teacher=teacher).tensors


def read_weights_file(path: Path, *, teacher: str, sets: Sequence[str] = TIMM_SETS) -> WeightsFile:
    """Read a safetensors or PyTorch file or a TorchScript archive. No code in the file can run.

    One set of tensors is chosen, and the additions of wrappers such as DistributedDataParallel are removed from their names.

    Args:
        path: the weights file.
        teacher: name of the teacher, for messages.
        sets: names of sets of tensors in the order in which the teacher's own library prefers them.

    Raises:
        TeacherWeightsError: the file is a pickle that needs code, is damaged, cannot be read, or holds no tensors.
    """
    loaded = _read(path, teacher)
    # Sets may be nested ({"teacher": {"state_dict": {...}}}): descend until a level holds the tensors themselves.
    file = WeightsFile({})
    while isinstance(loaded, dict):
        level = cast(dict[Any, Any], loaded)
        names = [str(name) for name, value in level.items() if _holds_tensors(value)]
        names = [name for name in names if not _OF_THE_OPTIMISER.search(name)]
        known = list(dict.fromkeys(name for name in (*sets, *_OTHER_SETS) if name in names))
        has_tensors = any(isinstance(value, Tensor) for value in level.values())
        if not known and not has_tensors and len(names) > 1:
            raise TeacherWeightsError(
                f"teacher '{teacher}': {path} holds several sets of tensors ({_quoted(names)}), and none has a known name: save "
                "the right one alone"
            )
        # A dict of tensors is the state dict itself, unless it also holds a set with a known name.
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
    # DistributedDataParallel adds a prefix each time a model is wrapped.
    while all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    file.tensors = tensors
    return file


def extract_network(
    file: WeightsFile, anchors: Sequence[str], *, teacher: str, path: Path, names: Sequence[str] = ()
) -> WeightsFile:
    """Extract a network from a larger one: its tensors, named without the modules around it.

    Args:
        file: the tensors of the file.
        anchors: beginnings of names of the network's tensors. The first one that any module of the file contains is used.
        teacher: name of the teacher, for messages.
        path: the weights file, for messages.
        names: all names of the network's tensors. More than half of them must lie below the module: `conv1.weight` alone ends
            many names.

    Returns:
        The tensors below the module; the file itself if the network does not lie in another one.

    Raises:
        TeacherWeightsError: several modules of the file hold such a network, and the names do not decide between them.
    """
    for anchor in anchors:
        prefixes = {
            key[:start]
            for key in file.tensors
            # Only at the beginning of a part: "pos_embed" must not match "rel_pos_embed".
            if (start := key.find(anchor)) >= 0 and (start == 0 or key[start - 1] == ".")
        }
        if "" in prefixes:
            return file
        prefixes = {
            prefix for prefix in prefixes if 2 * sum(prefix + name in file.tensors for name in names) >= len(names)
        }
        if prefixes:
            return _below(file, sorted(prefixes, key=len), teacher=teacher, path=path)
    return file


# Names of averaged networks. "momentum" is not one of them: MoCo evaluates its base encoder.
_AVERAGES = re.compile(r"(?:^|[._])(?:teacher|ema|averaged?)(?:$|[._])")


def _below(file: WeightsFile, prefixes: list[str], *, teacher: str, path: Path) -> WeightsFile:
    """Return the tensors below the only prefix, or below that of the averaged network.

    Raises:
        TeacherWeightsError: the prefixes do not decide, or tensors outside are adapters.
    """
    averages = [prefix for prefix in prefixes if _AVERAGES.search(prefix)]
    if len(prefixes) > 1 and len(averages) != 1:
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} holds several such networks ({_quoted(prefixes)}), and their names do not decide: "
            "save the state dict of the right one alone"
        )
    prefix = averages[0] if len(prefixes) > 1 else prefixes[0]
    refuse_adapters((key for key in file.tensors if not key.startswith(prefix)), teacher=teacher, path=path)
    below = {key.removeprefix(prefix): value for key, value in file.tensors.items() if key.startswith(prefix)}
    network = WeightsFile(below, file.chosen, list(file.others))
    if len(prefixes) > 1:
        network.choose(prefix.rstrip("."), (unused.rstrip(".") for unused in prefixes if unused != prefix))
    return network


def refuse_adapters(unused: Iterable[str], *, teacher: str, path: Path) -> None:
    """Raise TeacherWeightsError if unused tensors are adapters, which change what the network computes.

    Args:
        unused: names of tensors outside of the network in the file, such as those of heads.
        teacher: name of the teacher, for messages.
        path: the weights file, for messages.
    """
    adapters = [name for name in unused if _ADAPTERS.search(name)]
    if adapters:
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} holds {len(adapters)} tensors of adapters or prompts (such as {adapters[0]}) beside "
            "the network, which would be left out, so that the teacher would be the network without them: merge them into its "
            "weights, and save its state dict"
        )


def _holds_tensors(value: Any) -> bool:
    """Return whether a value is a dict with tensors at any depth."""
    if not isinstance(value, dict):
        return False
    items = cast(dict[Any, Any], value).values()
    return any(isinstance(item, Tensor) or _holds_tensors(item) for item in items)


def _quoted(names: Iterable[str]) -> str:
    """Return the names in quotes, separated by commas."""
    return ", ".join(f"'{name}'" for name in names)


def _read(path: Path, teacher: str) -> Any:
    """Return the content of a weights file: usually tensors by name, or nested dicts of them.

    Raises:
        TeacherWeightsError: as `read_weights_file`.
    """
    # One shard would load as a network with most of its tensors missing.
    if _SHARD.search(path.name):
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} is one of several files that hold the weights together, and weights are read from one "
            "file: load them with their own library, and save the state dict with safetensors.torch.save_file"
        )
    if path.name.endswith((".index.json", ".npz", ".gguf", ".onnx", ".h5", ".msgpack")):
        kind = "an index of several files" if path.suffix == ".json" else f"a {path.suffix} file"
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} is {kind}, and weights are read from one file of PyTorch or safetensors: load it with "
            "its own library, and save the state dict with safetensors.torch.save_file"
        )
    try:
        # By content as well as by name: the target of a link in the Hugging Face cache has a hash for its name.
        if path.suffix == ".safetensors" or is_safetensors(path):
            from safetensors.torch import load_file

            return load_file(path)
        if is_torchscript(path):
            return read_torchscript(path)
        return _read_pickle(path)
    except pickle.UnpicklingError as exc:
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} is not a plain file of tensors, and files that can run code are not opened "
            f"({_refusal_reason(exc)}). Save its state dict with torch.save, or as safetensors; fetch it again if it is one"
        ) from exc
    except Exception as exc:  # torch and safetensors raise RuntimeError, EOFError, KeyError ... on damaged files
        if is_out_of_memory(exc):
            raise out_of_memory_error(teacher, path) from exc
        # torch raises EINVAL for seeks in truncated files; every other errno is a problem of the disk.
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
    """Read a pickle with `weights_only=True`. Settings beside the weights become inert stand-ins."""
    stand_ins: list[tuple[Callable[..., Any], str]] = [(_plain_dict, "collections.defaultdict")]
    while True:
        try:
            with torch.serialization.safe_globals(cast(Any, stand_ins)):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as exc:
            # PyTorch names one refused class per attempt: read again with a stand-in for it.
            refused = _REQUIRED_GLOBAL.search(str(exc))
            name = refused[1] if refused else ""
            name = name if "." in name else f"builtins.{name}"  # PyTorch omits this module
            known = {global_name for _, global_name in stand_ins}
            if not _SETTINGS.fullmatch(name) or name in known or len(stand_ins) >= _MAX_STAND_INS:
                raise
            # One class each: PyTorch stores them by module and name, and looks both up in the class itself.
            module, _, short = name.rpartition(".")
            stand_ins.append((type(short, (_StandIn,), {"__module__": module}), name))


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins like safetensors, whatever its name: link targets often have no extension."""
    with path.open("rb") as file:
        start = file.read(9)
    # Eight bytes with the length of the header, then the header, a JSON object.
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of any library means a lack of memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(phrase in str(error) for phrase in (*OUT_OF_MEMORY_PHRASES, "os error 12"))


def out_of_memory_error(teacher: str, path: Path) -> TeacherWeightsError:
    """Return the error for weights that do not fit into memory."""
    size = path.stat().st_size / 1e9
    return TeacherWeightsError(
        f"teacher '{teacher}': there is too little memory for the weights in {path} ({size:.2f} GB, and up to twice as much "
        "in float32, beside the network): free some, or use a machine with more. The file itself is not at fault"
    )


def _refusal_reason(error: pickle.UnpicklingError) -> str:
    """Return why a pickle is not read."""
    # PyTorch's own message goes on to explain how to run the code in the file.
    refused = _REQUIRED_GLOBAL.search(str(error))
    if refused:
        return f"it requires {refused[1]}"
    return "PyTorch finds no tensors in it" if "weights_only" in str(error) else first_line(error)


def load_exactly(net: torch.nn.Module, state: dict[str, Tensor], *, teacher: str, path: Path, origin: str = "") -> None:
    """Load all tensors of a network; none may be missing or unused.

    Args:
        net: the network.
        state: its tensors by name.
        teacher: name of the teacher, for messages.
        path: the weights file, for messages.
        origin: suffix for messages, from `likely_origin`.

    Raises:
        TeacherWeightsError: tensors are missing, left over, or of another shape or kind. The message names examples.
    """
    expected = net.state_dict()
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    common = expected.keys() & state.keys()
    wrong = [key for key in common if expected[key].shape != state[key].shape]
    # Loading would silently cast them: the integers of a quantised network are no weights without their scales.
    quantised = sorted(
        key for key in common if expected[key].is_floating_point() and not state[key].is_floating_point()
    )
    problems = [
        f"{len(names)} {problem} (such as {example})"
        for names, problem, example in (
            (missing, "tensors missing", "".join(missing[:1])),
            (extra, "tensors too many", "".join(extra[:1])),
            (wrong, "of another shape", ", ".join(first_differences(expected, state))),
            (
                quantised,
                "of another kind",
                "".join(f"{key} is {state[key].dtype}, needed is {expected[key].dtype}" for key in quantised[:1]),
            ),
        )
        if names
    ]
    if problems:
        adapters = any(_ADAPTERS.search(key) for key in extra)
        cure = ". Adapters and prompts have to be merged into the weights first" if adapters else origin
        raise TeacherWeightsError(f"teacher '{teacher}': {path} does not fit the network: {'; '.join(problems)}{cure}")
    # Strict and complete: all differences were reported above, in one message.
    net.load_state_dict(state)
