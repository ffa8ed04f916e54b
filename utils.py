"""Small things that everything may use, without torch: the user's error, log lines, masked secrets, formats."""

import contextlib
import functools
import importlib.metadata
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


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


def mask_secrets(value: object, name: str = "") -> Any:
    """A copy of flags, settings or a text, with `***` for everything that looks like a token, key or password.

    Masked are strings under a name that says so (`..._token`, `api_key`; counts of tokens are numbers and stay),
    strings in the form of the known kinds of tokens, passwords in URLs, and the values of environment variables
    with such names. 40 hex digits are a W&B key except under a name of commits.
    """
    return _masked(value, name, _environment_secrets())


def _masked(value: object, name: str, known: list[str]) -> Any:
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


SAMPLES = "samples.jsonl"


def wait_passively(device: str = "cpu") -> None:
    """On a CPU, before torch is imported: idle threads of its pool sleep and do not spin, unless the user said how.

    Pools that spin on the same cores as other work, one of a second run say, slow a run down 2 to 13 times; alone it
    costs 6% to 22% (benchmarks/reports/waiting-cpu-2026-11-26.md).
    """
    if device == "cpu" and not any(name.startswith(("OMP_WAIT_POLICY", "KMP_", "GOMP_")) for name in os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


class BarAwareHandler(logging.StreamHandler):
    """Takes a progress bar off the terminal while a line is written, so that neither lands in the other."""

    def emit(self, record: logging.LogRecord) -> None:
        bars = sys.modules.get("tqdm")  # not imported: there is no bar
        if bars is None or not sys.stderr.isatty():
            super().emit(record)
            return
        with bars.tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def on_terminal() -> bool:
    """True where bars are to be seen: the first rank's stderr is a terminal."""
    return os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()


def progress_bar(description: str, total: int | None, unit: str = "", initial: int = 0) -> Any:
    """A tqdm bar, for `with`, that goes when it is done; off a terminal it does nothing."""
    from tqdm import tqdm

    return tqdm(
        desc=description, total=total, unit=unit, unit_scale=True, leave=False, initial=initial, dynamic_ncols=True,
        disable=not on_terminal(),
    )  # fmt: skip


def setup_logging(log_file: str | None, *, rank: int = 0) -> None:
    """Time-stamped, flushed lines on stdout and in `log_file`; other ranks than the first only warn, by number.

    An error that nothing catches goes there too, so that its traceback is masked like every line.
    """
    main_process = rank == 0
    handlers: list[logging.Handler] = [BarAwareHandler(sys.stdout)]
    if log_file and main_process:
        Path(log_file).expanduser().parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(Path(log_file).expanduser()))
    for handler in handlers:
        handler.addFilter(MaskingFilter())
    logging.basicConfig(
        level=logging.INFO if main_process else logging.WARNING,
        format="%(asctime)s %(message)s" if main_process else f"%(asctime)s rank {rank}: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=handlers,
        force=True,
    )
    sys.excepthook = lambda *error: log.critical("ended by an unexpected error", exc_info=error)
    for noisy in ("httpx", "httpx2", "urllib3", "filelock", "fsspec", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@functools.cache  # reads each package's metadata
def library_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    names = ("torch", "transformers", "datasets", "pytorch-optimizer", "safetensors", "tokenizers", "wandb")
    versions = {"python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def format_duration(seconds: float) -> str:
    """`2d 03:04:05`, `3:04:05` or `4:05`."""
    if not math.isfinite(seconds):
        return "?"
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    hours, minutes, left = rest // 3600, rest // 60 % 60, rest % 60
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{left:02}"
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def format_count(number: float) -> str:
    """`409.6M`: a number of tokens or parameters in at most four digits."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.0f}"


def format_line(figures: dict[str, Any]) -> str:
    """The log line of one interval, from the loop's figures."""
    get = figures.get
    parts = [
        f"{get('stage')} {get('stage_step')}/{get('stage_total')}",
        f"step {get('train/optimizer_step')}",
        f"loss {get('train/loss', math.nan):.4f}",
    ]
    if "train/kl" in figures:
        parts += [f"KL {figures['train/kl']:.4f}", f"top-1 {figures['train/top1_agreement']:.1%}"]
    eta = f"ETA {format_duration(get('perf/eta_seconds', math.nan))}"
    if get("perf/run_eta_seconds", 0.0) > 1.01 * get("perf/eta_seconds", math.nan):
        eta += f" (whole run {format_duration(figures['perf/run_eta_seconds'])})"
    return ", ".join(
        [
            *parts,
            f"lr {get('train/lr', math.nan):.2e}",
            f"grad norm {get('train/grad_norm', math.nan):.3g}",
            f"{get('train/tokens_per_second', math.nan):,.0f} tokens/s",
            f"{get('perf/step_seconds', math.nan):.2f} s/step",
            eta,
            f"{get('perf/peak_memory_gib', math.nan):.1f} GiB",
        ]
    )


FROM_TEACHER = "from_teacher"  # the --student_model that is built to the teacher's sizes


class UserError(Exception):
    """A user's mistake: `train.py` prints it as one line and exits with status 2."""


def auto_layers(layers: Sequence[int | str]) -> int | None:
    """K where `--layers` is `auto:K`, else None."""
    return next((int(entry[5:]) for entry in layers if isinstance(entry, str)), None)


def existing_folder(path: Path) -> Path:
    """The nearest folder at or above a path, absolute, that is there already."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_folder_writable(flag: str, folder: Path) -> None:
    """Raise a `UserError` unless files can be made in `folder`, which need not exist; leaves nothing behind."""
    existing = folder.absolute()
    try:
        while not existing.exists():
            if existing.is_symlink():
                raise UserError(f"{flag} {folder}: {existing} is a link to a folder that is not there")
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(f"{flag} {folder}: {existing} is a file, not a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot write in {existing} ({error.strerror})") from error


def complain(message: str) -> None:
    """A user's mistake in one line on stderr; under torchrun the first rank speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {mask_secrets(message)}", file=sys.stderr)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, rename it, and sync the folder: it is whole or as it was."""
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
