"""A model's files, brought from the Hub into its cache, where transformers then finds them without the network.

transformers itself gives up at the first long fault, and passes over what it cannot reach but could do without
(a chat template, say), so everything it may ask for is fetched here, each file through the same `Patience` as data.
"""

import fnmatch
import functools
import logging
from pathlib import Path

from hub.hub_files import DataStreamLost, Patience, ShortBody, is_transient, raise_for_access
from model_utils import require_model_folder
from models.loading import check_files
from utils import FROM_TEACHER, UserError

__all__ = ["DataStreamLost", "fetch_model"]

log = logging.getLogger(__name__)

SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")  # configurations and tokenizer
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first kind that there is
TEMPLATES = "additional_chat_templates/"


def fetch_model(
    flag: str,
    name: str,
    *,
    local_files_only: bool,
    network_patience: float,
    weights: bool = False,
    commit: str | None = None,
) -> str | None:
    """Bring configuration and tokenizer of a hub id into the cache, with `weights` those as well; returns its commit.

    `commit` pins it to one. Nothing is fetched for a local folder and `from_teacher` (which have none), or with
    `local_files_only`. A Hub that cannot be reached is waited for `network_patience` seconds, unless the whole
    model is in the cache. Raises `UserError` naming flag and model for a repository that is not there or not to be
    read, `DataStreamLost` when the network stays away for longer than the patience.
    """
    from huggingface_hub import constants

    path = Path(name).expanduser()
    if name == FROM_TEACHER or path.exists() or path.is_absolute() or name.startswith((".", "~")):
        return None
    what, waiting = f"{flag} {name}", Patience(network_patience)
    if not (local_files_only or constants.HF_HUB_OFFLINE):
        try:
            raise_for_access(lambda: _fetch(what, name, weights, waiting, commit), what)
        except (UserError, DataStreamLost):
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{what} cannot be fetched from the Hub: {' '.join(str(error).split())[:300]}") from error
    snapshot = _snapshot(name, commit)
    if snapshot is None and commit is not None:
        raise UserError(f"{what}: its commit {commit}, which the run was begun with, is not in the cache")
    return None if snapshot is None else snapshot.name


def _fetch(what: str, name: str, weights: bool, patience: Patience, commit: str | None) -> None:
    names = patience.call(what, lambda: _names(what, name, commit))
    wanted = [file for file in names if "/" not in file.removeprefix(TEMPLATES) and _matches(file, SETTINGS)]
    kinds = [[file for file in names if "/" not in file and _matches(file, (kind,))] for kind in WEIGHTS]
    for file in [*wanted, *(next(filter(None, kinds), []) if weights else [])]:
        patience.call(f"{what}, {file}", functools.partial(_download, name, file, commit))


def _names(what: str, name: str, commit: str | None) -> list[str]:
    """All files of a model's repository; none when it cannot be asked for them and the cache has them all."""
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi().model_info(name, revision=commit, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return [entry.rfilename for entry in info.siblings or []]
    except Exception as error:
        if not is_transient(error) or not _is_cached(name, commit):
            raise
        log.warning("%s: the Hub cannot be reached (%s); its copy in the cache is used", what, type(error).__name__)
        return []


def _snapshot(name: str, commit: str | None) -> Path | None:
    """The folder of a repository in the cache, which is named after its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=commit, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _is_cached(name: str, commit: str | None) -> bool:
    folder = _snapshot(name, commit)
    if folder is None:
        return False
    try:
        require_model_folder(str(folder))
        check_files(folder)
    except (UserError, ValueError):
        return False
    return True


def _download(name: str, file: str, commit: str | None) -> None:
    """One file into the cache, with the faults that have no type of their own made `is_transient`.

    The Hub is asked for the file's size first: `hf_hub_download` would ask too, but goes on asking on its own for
    half a minute when that fails, whatever the patience.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    get_hf_file_metadata(hf_hub_url(name, file, revision=commit), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    try:
        hf_hub_download(name, file, revision=commit)
    except OSError as error:
        if "Consistency check failed" in str(error):
            raise ShortBody(f"{file} came in part") from error
        raise


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
