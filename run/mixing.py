"""`--mix`, `--second_mix` and `--recall_share`: what a stage reads beside its own data set."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from arguments import Arguments
from text.recall_text import GENERATED
from utils import UserError

if TYPE_CHECKING:
    from text.mixture import MixedSpec
    from text.text_sources import SourceSpec

NO_COMMIT = "-"  # of a source that is not on the Hub


def mix_flag(stage: str) -> str:
    """The flag that names what is mixed into a stage."""
    return "second_mix" if stage == "stage2" else "mix"


def shares_of(args: Arguments, stage: str) -> dict[str, float]:
    """Shares of a stage's sequences by the name of what is mixed in; `--recall_share` unless `recall` is named.

    Raises `UserError` where one is named twice, or nothing is left to the stage's own data set.
    """
    flag = mix_flag(stage)
    pairs = [text.rpartition("=")[::2] for text in getattr(args, flag)]
    shares = {name: float(share) for name, share in pairs}
    if len(shares) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--{flag}: {twice} is named twice; give it one share")
    if args.recall_share and GENERATED not in shares:
        shares[GENERATED] = args.recall_share
    if sum(shares.values()) >= 1:
        listed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise UserError(
            f"--{flag}: the shares ({listed}) leave nothing to the stage's own data set; their sum must be below 1"
        )
    return shares


def mixed_sources(args: Arguments, stage: str, main: "SourceSpec", commits: str | None) -> list["MixedSpec"]:
    """What is mixed into a stage; commits: of its sources on the Hub, where they are known, as `commits_of` says.

    A name is NAME[:SUBSET[:SPLIT[:FIELD]]], or `recall` for generated documents.
    """
    from text.mixture import MixedSpec  # torch, which checks of flags do without

    shares = shares_of(args, stage)
    known = commits.split() if commits else [NO_COMMIT] * len(shares)
    found = []
    for (name, share), commit in zip(shares.items(), known, strict=True):
        place, subset, split, field = [*name.split(":"), "", "", ""][:4]
        source = None
        if name != GENERATED:
            source = replace(
                main,
                name=place,
                subset=subset,
                split=split or "train",
                text_field=field or "text",
                revision=None if commit == NO_COMMIT else commit,
                flag=f"--{mix_flag(stage)} {name}: ",
            )
        found.append(MixedSpec(name, share, source))
    return found


def commits_of(commits: Sequence[str | None]) -> str | None:
    """The commits of all mixed sources as one text, or None where none is on the Hub."""
    return " ".join(commit or NO_COMMIT for commit in commits) if any(commits) else None
