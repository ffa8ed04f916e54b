"""Files of a Hub dataset: which ones there are, and reading them by byte range over a network that fails at times.

Every request goes through a `Patience`, which waits out faults (429, 5xx, cut connections, stalled reads, short
bodies) with growing pauses and gives up with `DataStreamLost` after `network_patience` seconds of one outage.
"""

import io
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from utils import UserError, complain

log = logging.getLogger(__name__)

T = TypeVar("T")

HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}
TRANSIENT_STATUS = {408, 425, 429}
HF_URL = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<commit>[^/]+)/(?P<path>.+)")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
READ_AHEAD = 1 << 22  # bytes of one range request when a file is read from front to back
PATHS_A_REQUEST = 500  # files whose sizes are asked for at once
LARGEST_RANGE = 1 << 24  # bytes; larger reads are split, so that a fault costs little


class DataStreamLost(RuntimeError):
    """The network stayed away for longer than `network_patience`; the loader's state is still good."""


def exit_status(work: Callable[[], None]) -> int:
    """Run a download: 0 when done, else one line on stderr and 2 for a mistake, 1 for what another run may mend."""
    try:
        work()
    except UserError as error:
        complain(str(error))
        return 2
    except (DataStreamLost, OSError) as error:
        complain(f"{error}; run it again to go on")
        return 1
    return 0


def reading_status(work: Callable[[], None]) -> int:
    """Run a script that reads models or text: 0, or one line on stderr and 2 for a mistake, 4 for a lost network."""
    try:
        work()
    except UserError as error:
        complain(str(error))
        return 2
    except DataStreamLost as error:
        complain(str(error))
        return 4
    return 0


class Cancelled(RuntimeError):
    """The loader was closed while it waited for the network."""


class ShortBody(OSError):
    """The server sent fewer bytes than the range that was asked for."""


class Patience:
    """Calls functions that use the network, again and again until they succeed or `limit` seconds are over."""

    def __init__(self, limit: float, first_pause: float = FIRST_PAUSE):
        self.limit, self.first_pause = limit, first_pause
        self.stop = threading.Event()

    def call(self, what: str, function: Callable[[], T]) -> T:
        """`function()`; transient faults are waited out, others are raised as they are.

        Raises `DataStreamLost` when an outage outlasts the limit, `Cancelled` when `stop` is set meanwhile.
        """
        since, pause = None, self.first_pause
        while True:
            try:
                result = function()
            except Exception as error:
                if not is_transient(error):
                    raise
                now = time.monotonic()
                since = now if since is None else since
                left = self.limit - (now - since)
                if left <= 0:
                    raise DataStreamLost(
                        f"{what}: the network did not recover within --network_patience {self.limit:g} s "
                        f"({_one_line(error)})"
                    ) from error
                wait = min(max(pause, retry_after(error)), left)
                log.warning(
                    "%s: %s; trying again in %.0f s (patience left: %.0f s)", what, _one_line(error), wait, left
                )
                if self.stop.wait(wait):
                    raise Cancelled(what) from error
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if since is not None:
                    log.info("%s: the network is back after %.0f s", what, time.monotonic() - since)
                return result


def is_transient(error: BaseException) -> bool:
    """True for faults that may pass: HTTP 408, 425, 429 and 5xx, broken or timed-out connections, short bodies."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    for cause in _chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        status = _status(cause)
        if status is not None:
            return status in TRANSIENT_STATUS or status >= 500
        if isinstance(cause, (ShortBody, ConnectionError, TimeoutError)):
            return True
        library = type(cause).__module__.partition(".")[0]
        if library in HTTP_LIBRARIES and isinstance(cause, _transport_errors()):
            return True
    return False


def retry_after(error: BaseException) -> float:
    """Seconds that the server asked to wait (`Retry-After`), 0 where it did not."""
    for cause in _chain(error):
        headers = getattr(getattr(cause, "response", None), "headers", None) or {}
        value = headers.get("Retry-After", "")
        if value.isdigit():
            return float(value)
    return 0.0


def _transport_errors() -> tuple[type[BaseException], ...]:
    from huggingface_hub.utils import httpx  # the client that huggingface_hub itself uses

    return (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.DecodingError)


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


class HubFile(io.RawIOBase):
    """One file of a dataset repository at a fixed commit, readable and seekable by range requests."""

    def __init__(self, repo: str, commit: str, path: str, patience: Patience):
        from huggingface_hub import hf_hub_url

        self.url = hf_hub_url(repo, path, repo_type="dataset", revision=commit)
        self.what, self.patience = f"{repo}/{path}", patience
        self.offset = 0
        self._size: int | None = None

    @property
    def size(self) -> int:
        """Bytes in the file, as the server states them."""
        if self._size is None:
            self._range(0, 1)
        return self._size or 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.offset}.get(whence)
        self.offset = offset + (self.size if base is None else base)
        return self.offset

    def read(self, count: int = -1) -> bytes:  # type: ignore[override]
        stop = self.size if count is None or count < 0 else min(self.offset + count, self.size)
        parts = []
        while self.offset < stop:
            parts.append(self._range(self.offset, min(stop, self.offset + LARGEST_RANGE)))
            self.offset += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _range(self, start: int, stop: int) -> bytes:
        return self.patience.call(f"reading {self.what}", lambda: self._request(start, stop))

    def _request(self, start: int, stop: int) -> bytes:
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        response = get_session().get(
            self.url, headers=headers, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        if response.status_code == 416 and start == 0:  # an empty file has no range
            self._size = 0
            return b""
        raise_for_access(lambda: hf_raise_for_status(response), self.what)
        data = response.content
        if response.status_code == 200:  # the server passed over the range and sent the whole file
            self._size = len(data)
            return data[start:stop]
        self._size = int(response.headers["Content-Range"].rpartition("/")[2])
        if len(data) != min(stop, self._size) - start:
            raise ShortBody(f"{len(data)} bytes came instead of {stop - start}")
        return data


def raise_for_access(check: Callable[[], Any], what: str) -> None:
    """`check()`, with a repository that is not there or may not be read as a `UserError` that begins with `what`."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        check()
    except GatedRepoError as error:
        raise gated(what) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{what}: not found on the Hub: check the name; if it is private, {HOW_TO_LOG_IN}") from error


HOW_TO_LOG_IN = "get a token at huggingface.co/settings/tokens and run `hf auth login` or set HF_TOKEN"


def gated(name: str) -> UserError:
    """What to tell someone who may not read a gated repository (yet)."""
    return UserError(f"{name} is gated: accept its licence on its Hub page, then {HOW_TO_LOG_IN}")


@dataclass(frozen=True)
class HubListing:
    """The files of one split of a Hub dataset at one commit."""

    repo: str
    commit: str
    paths: list[str]
    sizes: dict[str, int]  # bytes by path


def list_hub_files(
    name: str, subset: str, split: str, revision: str | None, patience: Patience, flag: str = "--dataset_"
) -> HubListing:
    """The data files of a Hub dataset, as the `datasets` library finds them (README configurations included).

    A subset that is no configuration of the repository may be a folder of it, also under data/. Raises
    `UserError` for a repository, revision, subset or split that is not there, or access that is not given.
    """
    data_files = patience.call(f"listing {name}", lambda: _data_files(name, subset, revision, flag))
    if split not in data_files:
        raise UserError(f"{flag}split {split}: {name} has {', '.join(map(str, data_files)) or 'none'}")
    matches = [HF_URL.fullmatch(str(url)) for url in data_files[split]]
    if not matches or None in matches:
        raise UserError(f"{name}: no readable data files in split {split}")
    found = [match for match in matches if match is not None]
    repo, commit, paths = found[0]["repo"], found[0]["commit"], sorted(match["path"] for match in found)
    sizes = patience.call(f"sizes of {name}'s files", lambda: _sizes(repo, commit, paths))
    return HubListing(repo, commit, paths, sizes)


def _sizes(repo: str, commit: str, paths: list[str]) -> dict[str, int]:
    from huggingface_hub import HfApi, RepoFile

    parts = [paths[at : at + PATHS_A_REQUEST] for at in range(0, len(paths), PATHS_A_REQUEST)]
    where: Any = dict(revision=commit, repo_type="dataset")
    infos = [info for part in parts for info in HfApi().get_paths_info(repo, part, **where)]
    return {info.path: info.size for info in infos if isinstance(info, RepoFile)}


def _data_files(name: str, subset: str, revision: str | None, flag: str) -> dict[Any, list[str]]:
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    attempts: list[dict[str, str]] = [{"name": subset} if subset else {}]
    attempts += [{"data_dir": folder} for folder in (subset, f"data/{subset}") if subset]
    first: Exception | None = None
    for options in attempts:
        try:
            builder = load_dataset_builder(f"hf://datasets/{name}", revision=revision, **options)
        except DatasetNotFoundError as error:
            raise (gated(name) if "gated" in str(error) else UserError(" ".join(str(error).split()))) from error
        except (ValueError, FileNotFoundError) as error:
            if is_transient(error):
                raise
            first = first or error
            continue
        if not builder.config.data_files:
            raise ConnectionError(f"the Hub did not say what files {name} has")
        return builder.config.data_files
    assert first is not None
    raise UserError(f"{name}, {flag}subset {subset or '(none)'}: {' '.join(str(first).split())[:400]}") from first


def cached_files(name: str, subset: str, split: str, revision: str | None) -> tuple[Path | None, list[str]]:
    """What the caches hold of a Hub dataset: its snapshot folder (or None), and Arrow files of `datasets`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        page = ["README.md"]  # of a part of a repository only what is asked for here has to be there
        where: Any = dict(repo_type="dataset", revision=revision, local_files_only=True, allow_patterns=page)
        snapshot = Path(snapshot_download(name, **where))
    except LocalEntryNotFoundError:
        snapshot = None
    return snapshot, _prepared_arrow_files(name, subset, split)


def _prepared_arrow_files(name: str, subset: str, split: str) -> list[str]:
    """Arrow files that `datasets.load_dataset` has prepared in HF_DATASETS_CACHE, newest preparation first."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / name.replace("/", "___")
    prepared = sorted(folder.glob(f"{subset or '*'}/*/*/dataset_info.json"), key=lambda p: p.stat().st_mtime)
    for info in reversed(prepared):
        files = sorted(str(path) for path in info.parent.glob(f"*-{split}*.arrow"))
        if files:
            return files
    return []


def cached_tree(name: str, commit: str) -> list[str]:
    """Every file that a Hub dataset has at a commit, as far as the cache knows; empty where it does not."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return [entry.path for entry in get_cached_repo_tree(name, repo_type="dataset", revision=commit)]
    except LocalEntryNotFoundError:
        return []


def cache_folders() -> str:
    """Where `cached_files` looks, for messages."""
    from datasets import config
    from huggingface_hub import constants

    return f"{constants.HF_HUB_CACHE} and {config.HF_DATASETS_CACHE}"
