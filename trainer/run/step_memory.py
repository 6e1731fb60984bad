"""Whether a step fits into the machine's memory, before it is tried: the system ends a process that takes too much.

On a GPU torch refuses what does not fit; on a CPU the system hands out more than there is, and kills whoever uses it.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from radio_cache.errors import TrainingError

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def saved_activation_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, beside the parameters themselves."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()  # alive until it is counted, or memory would be used again under the same address
    del out
    return sum(kept.values())


def refuse_oversized_step(
    *, per_image: float, images: int, fixed: float, path: str, processes: int, accumulate: int, available: float | None
) -> None:
    """Raise TrainingError for a pass that does not fit into memory, with the settings that make it fit.

    Args:
        per_image: bytes that a pass needs for each of its images.
        images: of one pass.
        fixed: bytes of weights, gradients and moments.
        path: of the group, such as "stages.0.groups.0".
        processes: that share this machine's memory.
        accumulate: passes that a batch is cut into already.
        available: bytes; None where the system does not say.
    """
    needed = processes * (fixed + per_image * images)
    if available is None or needed <= available:
        return
    room = available / processes - fixed
    fits = next((n for n in range(2, images + 1) if images % n == 0 and per_image * images / n <= room), None)
    if fits is None:
        cure = "a smaller --image-size or student, --set checkpoint_activations=true, or a machine with more memory"
    else:
        cure = (
            f"--set accumulate={accumulate * fits} (the same sum, but for batch norms, in passes of {images // fits} images), "
            "or a smaller --batch-size"
        )
    raise TrainingError(
        f"a step of {path} needs about {needed / 1e9:.1f} GB of memory ({per_image / 1e6:.0f} MB for each of {images} images"
        f"{'' if processes == 1 else f', in {processes} processes'}), and {available / 1e9:.1f} GB are free: {cure}"
    )


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> float | None:
    """Return the bytes that may be used yet, of the machine and of the container; None where the system does not say."""
    found: list[float] = []
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        found.append(sum(1024.0 * int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")))
    except (OSError, KeyError, ValueError, IndexError):
        pass
    for limit, usage in (
        (cgroup / "memory.max", cgroup / "memory.current"),
        (cgroup / "memory/memory.limit_in_bytes", cgroup / "memory/memory.usage_in_bytes"),
    ):
        try:
            spare = int(limit.read_text()) - int(usage.read_text())  # "max" is no number: no limit
            statistics = (limit.parent / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        # File pages that the system gives back count as used.
        cached = [int(line.split()[1]) for line in statistics if line.startswith(("inactive_file ", "active_file "))]
        found.append(float(spare + sum(cached)))
    return min(found, default=None)
