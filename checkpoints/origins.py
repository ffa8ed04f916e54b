"""Where a run's models and text come from, as its checkpoints record it, so that a resumed run takes the same."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from text.text_sources import TEXT_VERSION, has_subset
from utils import UserError

# What a run reads by its flag, and the flag of its revision, if it has one.
REVISIONS = {
    "teacher_model": None,
    "student_model": None,
    "dataset_name": "dataset_revision",
    "second_dataset_name": "second_dataset_revision",
    "eval_dataset": None,
    "choice_dataset": None,
    "mix": None,
    "second_mix": None,
}

COMMIT = "_commit"  # ends names of commits in the metadata, which would else be masked as keys


@dataclass
class Origins:
    """What a run keeps to from its first step to its last."""

    text_version: int = TEXT_VERSION  # of the rules from files to tokens
    commits: dict[str, str] = field(default_factory=dict)  # by flag: of what comes from the Hub

    @classmethod
    def recorded(
        cls, metadata: dict[str, Any], flags: Mapping[str, Any], loader: dict[str, Any] | None = None
    ) -> "Origins":
        """Those of a checkpoint's `training_state.json`; what it does not say was begun before it was recorded.

        loader: its saved data state, which has always known the commit of the text that its stage was reading.
        The commit of what the flags now name otherwise, or at another revision, is not kept to.
        """
        before, commits, found = metadata["flags"], {}, recorded_commits(metadata)
        if loader and loader["commit"]:
            second = metadata["progress"]["stage"] == "stage2"
            found["second_dataset_name" if second else "dataset_name"] = loader["commit"]
        for flag, commit in found.items():
            named_by = [flag, REVISIONS.get(flag) or flag]
            if all(before.get(name) == flags.get(name) for name in named_by):
                commits[flag] = commit
        return cls(metadata.get("text_version", 1), commits)

    def note(self, flag: str, commit: str | None) -> None:
        """Keep to this commit of what `flag` names from here on; None: it has none."""
        if commit is not None:
            self.commits[flag] = commit

    def check_same(self, everyone: list[dict[str, str]]) -> None:
        """Raise a `UserError` where ranks found different commits, since a push came between."""
        changed = sorted(flag for flag in REVISIONS if len({commits.get(flag) for commits in everyone}) > 1)
        if changed:
            raise UserError(f"--{changed[0]}: it was changed on the Hub while the run started; start it again")

    def as_metadata(self) -> dict[str, Any]:
        """The entries of `training_state.json`."""
        commits = {f"{flag}{COMMIT}": commit for flag, commit in self.commits.items()}
        return {"text_version": self.text_version, "commits": commits}


def recorded_commits(metadata: dict[str, Any]) -> dict[str, str]:
    """The commits of a checkpoint's `training_state.json` by flag."""
    return {name.removesuffix(COMMIT): commit for name, commit in metadata.get("commits", {}).items()}


def flags_as_made(metadata: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's flags, with what they meant when a subset that a local source does not have meant none."""
    flags = metadata["flags"]
    name, subset = flags.get("dataset_name", ""), flags.get("dataset_subset", "")
    if metadata.get("text_version", 1) > 1 or has_subset(name, subset):
        return flags
    return {**flags, "dataset_subset": ""}
