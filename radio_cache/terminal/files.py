"""Files that a command writes beside its table, checked before the work begins, so that no result is lost at its end."""

import errno
import io
import os
import stat
import sys
from pathlib import Path
from typing import final

import click
from PIL import Image

from radio_cache.errors import ConfigError
from radio_cache.storage.local import write_atomically
from radio_cache.terminal.output import DATA_ON_STANDARD_OUTPUT

STANDARD_OUTPUT = Path("-")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg")


@final
class OutputFile(click.ParamType[Path]):
    """The type of an option that names a file to write. Refuses paths that could not be written at the end.

    Args:
        endings: file name endings that are allowed, such as ".png"; none allows all, and "-" for standard output.
    """

    name = "file"

    def __init__(self, *endings: str) -> None:
        self._endings = endings

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path == STANDARD_OUTPUT and not self._endings:
            if ctx is not None:
                ctx.meta[DATA_ON_STANDARD_OUTPUT] = True
            return path
        if self._endings and path.suffix.lower() not in self._endings:
            self.fail(
                f"'{path}' should end in {' or '.join(self._endings)}, because its ending sets the format", param, ctx
            )
        if path.is_dir():
            self.fail(f"'{path}' is a folder: give the name of a file in it", param, ctx)
        # The first folder that exists decides; those below it are created when the file is written.
        folder = Path(os.path.realpath(path)).parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            self.fail(f"'{path}' cannot be written: '{folder}' is a file, not a folder", param, ctx)
        if not os.access(path if path.exists() and not path.is_file() else folder, os.W_OK):
            self.fail(f"'{path}' cannot be written: no permission to write in '{folder}'", param, ctx)
        return path


def write_output(path: Path, data: bytes) -> None:
    """Write a file that a user named, replacing an existing one atomically.

    A link stays a link, and its target is written. A device or a pipe is written into.

    Args:
        path: of the file; "-" is standard output.
        data: the whole contents.

    Raises:
        ConfigError: with the reason, if the file cannot be written.
    """
    try:
        if path == STANDARD_OUTPUT:
            sys.stdout.buffer.write(data if data.endswith(b"\n") else data + b"\n")
            sys.stdout.flush()
            return
        # Renaming over a link would replace the link.
        target = Path(os.path.realpath(path))
        if target.exists() and not stat.S_ISREG(target.stat().st_mode):
            # Unbuffered, so that an error appears here and not when the file is closed.
            with path.open("wb", buffering=0) as device:
                device.write(data)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, data)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror or exc}{_cure(exc)}") from exc


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture with `write_output`, as PNG or JPEG by the ending of the path.

    Args:
        path: ending in one of `PICTURE_ENDINGS`.
        picture: in mode RGB.

    Raises:
        ConfigError: with the reason, if the file cannot be written.
    """
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG" if path.suffix.lower() == ".png" else "JPEG")
    write_output(path, encoded.getvalue())


def _cure(exc: OSError) -> str:
    return "; free some space, or name a file on another disk" if exc.errno in {errno.ENOSPC, errno.EDQUOT} else ""
