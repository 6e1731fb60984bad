"""Lists that people write by hand, a line for each entry: names of classes, sentences."""

from pathlib import Path

from radio_cache.errors import ConfigError


def text_lines(file: Path, option: str) -> list[str]:
    """Return the lines of a UTF-8 text file without line ends; a mark of the byte order in front is no part of the first.

    Raises:
        ConfigError: if the file cannot be read or is in another encoding; `option` is what named it.
    """
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{option} {file} is not UTF-8 text (byte {exc.start}): save it as UTF-8") from exc
    except OSError as exc:
        raise ConfigError(f"{option} {file} cannot be read: {exc.strerror or exc}") from exc
