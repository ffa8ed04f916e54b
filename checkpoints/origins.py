"""Where a run's models and text come from, as its checkpoints record it, so that a resumed run takes the same."""

from dataclasses import dataclass
from typing import Any

from text.text_sources import TEXT_VERSION, has_subset


@dataclass
class Origins:
    """What a run keeps to from its first step to its last."""

    text_version: int = TEXT_VERSION  # of the rules from files to tokens

    @classmethod
    def recorded(cls, metadata: dict[str, Any]) -> "Origins":
        """Those of a checkpoint's `training_state.json`; what it does not say was begun before it was recorded."""
        return cls(text_version=metadata.get("text_version", 1))

    def as_metadata(self) -> dict[str, Any]:
        """The entries of `training_state.json`."""
        return {"text_version": self.text_version}


def flags_as_made(metadata: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's flags, with what they meant when a subset that a local source does not have meant none."""
    flags = metadata["flags"]
    if Origins.recorded(metadata).text_version > 1 or has_subset(
        flags.get("dataset_name", ""), flags.get("dataset_subset", "")
    ):
        return flags
    return {**flags, "dataset_subset": ""}
