"""The output folder of a run: its checkpoints by serial number, publishing, pruning, what dead processes left."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints.files import damage, exchange, read_manifest, sync_folder
from checkpoints.lock import process_start

CHECKPOINT = re.compile(r"checkpoint-\d+|stable-\w+|final")
LEFT_OVER = re.compile(r"\.(?P<kind>tmp|old)-(?P<name>.+)-(?P<pid>\d+)-(?P<ticks>\w+)")


class RunFolder:
    """A folder of checkpoints. The serial number in a manifest, not the step in a name, says which is the newest:
    a run that was resumed from an older one has newer checkpoints of smaller steps.
    """

    def __init__(self, path: Path, log: Callable[[str], Any], *, clean: bool = True):
        self.path, self.log = path, log
        self._device: int | None = None
        if path.is_dir():
            self._device = path.stat().st_dev
            if clean:
                self._clean_left_overs()
        complete = self.complete()
        self.last_good: str | None = complete[0].name if complete else None

    def checkpoints(self) -> list[Path]:
        """Every folder with a checkpoint's name, complete or not."""
        if not self.path.is_dir():
            return []
        return [path for path in sorted(self.path.iterdir()) if CHECKPOINT.fullmatch(path.name) and path.is_dir()]

    def manifests(self) -> list[tuple[Path, dict[str, Any]]]:
        """(folder, manifest) of every checkpoint with a readable manifest, the last written first."""
        found = []
        for folder in self.checkpoints():
            with contextlib.suppress(ValueError):  # incomplete: whoever resumes names it
                found.append((folder, read_manifest(folder)))
        return sorted(found, key=lambda pair: -pair[1]["serial"])

    def complete(self) -> list[Path]:
        """Checkpoints whose files are there in their sizes, the last written first."""
        return [folder for folder, _ in self.manifests() if damage(folder, hashes=False) is None]

    def next_serial(self) -> int:
        """One more than any serial number here."""
        return max((manifest["serial"] for _, manifest in self.manifests()), default=0) + 1

    def is_best(self, name: str) -> bool:
        """True if a checkpoint of this name was saved as the best."""
        return any(manifest.get("best", False) for folder, manifest in self.manifests() if folder.name == name)

    def check_mount(self) -> None:
        """Refuse to write where the output folder was a mount that is gone: into the empty folder under it."""
        if self._device is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._device = self.path.stat().st_dev
        device = self.path.stat().st_dev
        if device != self._device and not (self.last_good and (self.path / self.last_good).is_dir()):
            raise OSError(f"{self.path} is on another file system than at the start: is its mount gone?")
        self._device = device

    def private(self, kind: str, name: str) -> Path:
        """A path of this process in the folder, that `checkpoints` passes over and the next start clears away."""
        ticks = (process_start(os.getpid()) or "/0").rpartition("/")[2]
        return self.path / f".{kind}-{name}-{os.getpid()}-{ticks}"

    def publish(self, temporary: Path, name: str) -> None:
        """Give a complete folder its name; where one has it, the two change places in one step."""
        target = self.path / name
        if not target.exists():
            os.rename(temporary, target)
        elif not exchange(temporary, target):
            aside = self.private("old", name)  # put back at the next start, should this be the end
            os.rename(target, aside)
            os.rename(temporary, target)
            shutil.rmtree(aside, ignore_errors=True)
        sync_folder(self.path)
        self.last_good = name

    def prune(self, keep: int) -> None:
        """Remove all but the last `keep` complete checkpoints, the best one, `final` and the `stable-` ones."""
        complete, manifests = self.complete(), dict(self.manifests())
        best = next((folder for folder in complete if manifests[folder].get("best", False)), None)
        steps = [folder for folder in complete if folder.name.startswith("checkpoint-")]
        for folder in steps[keep:]:
            if folder != best:
                doomed = self.private("tmp", folder.name)
                os.rename(folder, doomed)  # at once, so that no half of it is ever taken for a checkpoint
                shutil.rmtree(doomed)

    def _clean_left_overs(self) -> None:
        """Remove what dead processes left half written; the run's lock sees to it that there is no live one."""
        for path in self.path.iterdir():
            found = LEFT_OVER.fullmatch(path.name)
            if not found or (process_start(int(found["pid"])) or "").endswith(f"/{found['ticks']}"):
                continue
            target = self.path / found["name"]
            try:
                if found["kind"] == "old" and not target.exists():
                    os.rename(path, target)
                else:
                    shutil.rmtree(path)
            except OSError as error:
                self.log(f"{path} is left over and cannot be removed ({error.strerror})")
