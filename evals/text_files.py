"""Hand-written lists with one entry per line: names of classes, sentences."""

from pathlib import Path

from radio_cache.errors import ConfigError


def text_lines(file: Path, option: str) -> list[str]:
    """Return the lines of a UTF-8 text file without line ends.

    Args:
        file: to read.
        option: the option that named the file, for the message.

    Raises:
        ConfigError: if the file cannot be read or is in another encoding.
    """
    try:
        # utf-8-sig drops the byte order mark that some editors write in front of the first line.
        return file.read_text(encoding="utf-8-sig").splitlines()
    # Editors on Windows still save in other encodings; guessing one could change names silently.
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{option} {file} is not UTF-8 text (byte {exc.start}): save it as UTF-8") from exc
    except OSError as exc:
        raise ConfigError(f"{option} {file} cannot be read: {exc.strerror or exc}") from exc
