"""Secrets kept out of logs, checkpoints and trackers: whatever looks like a token, key or password becomes `***`."""

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any

MASK = "***"
SECRET_WORDS = set("token secret password passwd key apikey credential credentials authorization".split())
COMMIT_WORDS = {"revision", "commit", "sha", "sha1", "hash"}  # 40 hex digits are an id there, not a W&B key
SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bwandb_v\d+_\w{16,}|\b(?:sk|pk)-[\w-]{16,}|\bgh[pousr]_\w{16,}|\bAKIA[A-Z0-9]{12,}"
    r"|(?<=://)[^/@\s:]*:[^/@\s]+(?=@)|(?i:(?<=\bbearer )\S+)"
)
SECRET_SETTING = re.compile(
    r"(?i)\b((?:\w*[_-])?(?:token|secret|password|passwd|api_?key)\s*[=:]\s*)(['\"]?)[^\s'\"&]{6,}"
)
HEX_KEY = re.compile(r"\b[0-9a-f]{40}\b")


def mask_secrets(value: Any, name: str = "") -> Any:
    """A copy of flags, settings or a text, with `***` for everything that looks like a token, key or password.

    Masked are strings under a name that says so (`..._token`, `api_key`; counts of tokens are numbers and stay),
    strings in the form of the known kinds of tokens, passwords in URLs, and the values of environment variables
    with such names. 40 hex digits are a W&B key except under a name of commits.
    """
    return _masked(value, name, _environment_secrets())


def _masked(value: Any, name: str, known: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _masked(entry, str(key), known) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_masked(entry, name, known) for entry in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    words = _words(name)
    if value and words & SECRET_WORDS:
        return MASK
    return _masked_text(value, known, hex_keys=not words & COMMIT_WORDS)


def _masked_text(text: str, known: list[str], hex_keys: bool = True) -> str:
    for secret in known:
        text = text.replace(secret, MASK)
    text = SECRET_SETTING.sub(rf"\1\2{MASK}", SECRET_VALUE.sub(MASK, text))
    return HEX_KEY.sub(MASK, text) if hex_keys else text


def _environment_secrets() -> list[str]:
    """Values of environment variables whose names speak of a secret (HF_TOKEN, WANDB_API_KEY, ...)."""
    found = [value for name, value in os.environ.items() if len(value) >= 8 and _words(name) & SECRET_WORDS]
    return sorted(found, key=len, reverse=True)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


class MaskingFilter(logging.Filter):
    """Masks secrets in every log line, and in the traceback that a record may carry."""

    def filter(self, record: logging.LogRecord) -> bool:
        with contextlib.suppress(TypeError, ValueError):  # arguments that do not fit: the handler reports it
            record.msg, record.args = mask_secrets(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = mask_secrets(logging.Formatter().formatException(record.exc_info))
        return True
