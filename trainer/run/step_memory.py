"""A check, before the first step, that a step fits into the machine's memory.

On a GPU torch refuses an allocation that does not fit. On a CPU the system overcommits, and kills the process that uses too much.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from radio_cache.errors import TrainingError

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def saved_activation_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Return the bytes that a forward pass saves for its backward pass, parameters excluded."""
    parameter_pointers = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}  # address -> bytes; views of one storage count once

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_pointers:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()  # kept alive until all is counted, or an address could be used twice
    del out
    return sum(saved.values())


def refuse_oversized_step(
    *, per_image: float, images: int, fixed: float, path: str, processes: int, accumulate: int, available: float | None
) -> None:
    """Raise TrainingError for a pass that does not fit into memory, with the settings that make it fit.

    Args:
        per_image: bytes that a pass needs for each of its images.
        images: images of one pass.
        fixed: bytes of weights, gradients and moments.
        path: path of the group in the recipe, such as "stages.0.groups.0".
        processes: processes that share this machine's memory.
        accumulate: passes that a batch is cut into already.
        available: available bytes; None if unknown, and then nothing is refused.
    """
    needed = processes * (fixed + per_image * images)
    if available is None or needed <= available:
        return
    room = available / processes - fixed
    # The fewest passes that divide the images evenly and fit.
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
    """Return the bytes that are still available, the least of the machine's and the container's; None if unknown.

    Args:
        meminfo: file of the machine's memory.
        cgroup: folder of the container's limits, of version 2 or 1.
    """
    available: list[float] = []
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available.append(sum(1024.0 * int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")))
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
        # The usage includes file pages that the system frees on demand.
        cached = [int(line.split()[1]) for line in statistics if line.startswith(("inactive_file ", "active_file "))]
        available.append(float(spare + sum(cached)))
    return min(available, default=None)
