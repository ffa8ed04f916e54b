"""docs/flags.md from the parser, so that the page never lags behind the flags."""

import argparse
from typing import Any


def markdown_page(parser: argparse.ArgumentParser) -> str:
    """docs/flags.md: the flags of `train.py` as markdown tables, one a group."""
    lines = [
        "# Flags",
        "",
        "All flags of `train.py`, made by `python arguments.py --markdown`. Other scripts list theirs with `--help`.",
        "",
    ]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.option_strings and action.dest != "help"]
        if not actions:
            continue
        title = str(group.title)
        lines += [f"## {title[0].upper()}{title[1:]}", "", "| flag | default | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{a.option_strings[0]}` | {_shown(a)} | {_meaning(a)} |" for a in actions]
        lines.append("")
    return "\n".join(lines[:-1])


def _shown(action: argparse.Action) -> str:
    value: Any = action.default
    if action.const is True:
        return "off"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"`{value}`" if value not in (None, "") else ""


def _meaning(action: argparse.Action) -> str:
    choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
    return f"{action.help}{choices}"
