"""`--config run.yaml`: a run's flags from a file, as if they stood first on the command line; and writing one."""

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from utils import UserError

NOT_IN_A_FILE = ("config", "dry_run")


def with_config(argv: Sequence[str], known: Collection[str]) -> list[str]:
    """The command line with the file of its `--config` before everything else, so that flags override it.

    Raises `UserError` in one line for a file that cannot be read, and for keys that are no flags, with the nearest.
    """
    file = _config_of(argv)
    return [*_flags_of(file, known), *argv] if file else list(argv)


def _config_of(argv: Sequence[str]) -> str | None:
    """The last --config on a command line; the parser itself reports one without a value."""
    found = None
    for word, after in zip(argv, [*argv[1:], ""]):
        if word.startswith("--config="):
            found = word.removeprefix("--config=")
        elif word == "--config" and after:
            found = after
    return found


def _flags_of(file: str, known: Collection[str]) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict | None):
        raise UserError(f"--config {file}: write a flag a line, as in 'max_steps: 1000'")
    words: list[str] = []
    for key, value in (content or {}).items():
        if key not in known or key in NOT_IN_A_FILE:
            near = difflib.get_close_matches(str(key), [name for name in known if name not in NOT_IN_A_FILE], 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else "; docs/flags.md lists them"
            raise UserError(f"--config {file}: {key} is no flag that a file can hold{hint}")
        words += _words(file, key, value)
    return words


def _words(file: str, key: str, value: Any) -> list[str]:
    """A key's words on a command line; none for null, which stands for the default."""
    if value == [] and key != "layers":  # whose emptiness says something
        return []
    if isinstance(value, list) and not any(isinstance(entry, list | dict) for entry in value):
        return [f"--{key}", *map(str, value)]
    if isinstance(value, list | dict):
        raise UserError(f"--config {file}: {key}: write one value or a list of them")
    if value is None:
        return []
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}"]


def config_text(flags: dict[str, Any], comments: Sequence[str] = ()) -> str:
    """A file for `--config` that repeats the flags; None, a default, is left out."""
    import yaml

    plain = {name: _plain(value) for name, value in flags.items() if value is not None and name not in NOT_IN_A_FILE}
    head = "".join(f"# {line}\n" for line in comments)
    return head + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _plain(value: Any) -> Any:
    """YAML's own types alone: `NotGivenName` is a string of its own kind; 1e-05 would be read as a text."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return str(value)
