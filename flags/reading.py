"""What `arguments.py` and the scripts declare their flags with: a field's help and parser, and checked values.

No torch and no transformers here, so that a wrong flag is answered at once.
"""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import field
from typing import Any, NoReturn

from utils import complain


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in exactly one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        complain(message.replace("\n", "\\n").replace("\r", "\\r"))
        raise SystemExit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the module's text as it is, and with the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, "", [], False) or "(default" in (action.help or "")
        return action.help if silent else super()._get_help_string(action)


def whole(minimum: int, maximum: int = 2**63 - 1):
    """A parser of whole numbers from `minimum` to `maximum` (int64's by default), whose complaint says so."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is above {maximum}, the largest that is possible")
        return value

    return parse


def real(minimum: float, *, above: bool = False, maximum: float = math.inf):
    """A parser of finite numbers from `minimum` (exclusive with `above`) to `maximum`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > minimum if above else value >= minimum) and value <= maximum):
            upper = f" and at most {maximum:g}" if maximum < math.inf else ""
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number {'above' if above else 'of at least'} {minimum:g}{upper}"
            )
        return value

    return parse


def switch(text: str) -> bool:
    """`true` or `false`, what may stand behind a flag that is on by itself."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def layer(text: str) -> int | str:
    """A layer's index, or `auto:K` with K at least 1, as it is; '' for none."""
    if not text:
        return text
    if re.fullmatch(r"auto:0*[1-9][0-9]{0,8}", text):
        return f"auto:{int(text[5:])}"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a layer's index or auto:K, K at least 1") from None


def mix_source(text: str) -> str:
    """NAME[:SUBSET[:SPLIT[:FIELD]]]=SHARE, the share above 0 and below 1, as it is."""
    name, _, share = text.rpartition("=")
    try:
        good = bool(name) and 0 < float(share) < 1 and name.count(":") < 4 and not name.startswith(":")
    except ValueError:
        good = False
    if not good:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME[:SUBSET[:SPLIT[:FIELD]]]=SHARE with a share between 0 and 1"
        )
    return text


def device_name(text: str) -> str:
    """`cpu`, `cuda` or `cuda:N`; N has at most two digits, since torch keeps it in 8 bits and wraps round."""
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; use cpu, cuda or cuda:N")
    return "cuda:0" if text == "cuda" else text


def flag(default: Any, help: str, *, parse: Callable[[str], Any] | None = None, **options: Any) -> Any:
    """A field that is a flag of its name: its default, its help, how its text is read, and argparse's own options."""
    options |= {"type": parse} if parse else {}
    made: dict[str, Any] = {"default_factory": lambda: default} if isinstance(default, list) else {"default": default}
    return field(**made, metadata={"help": help, **options})
