"""Environment, logging and tracking: devices, seeds, log lines, metrics.jsonl and W&B behind one face."""

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from arguments import UserError
from masking import MaskingFilter, mask_secrets

log = logging.getLogger(__name__)


SAMPLES = "samples.jsonl"


class BarAwareHandler(logging.StreamHandler):
    """Takes a progress bar off the terminal while a line is written, so that neither lands in the other."""

    def emit(self, record: logging.LogRecord) -> None:
        bars = sys.modules.get("tqdm")  # not imported: there is no bar
        if bars is None or not sys.stderr.isatty():
            super().emit(record)
            return
        with bars.tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def setup_logging(log_file: str | None, *, rank: int = 0) -> None:
    """Time-stamped, flushed lines on stdout and in `log_file`; other ranks than the first only warn, by number.

    An error that nothing catches goes there too, so that its traceback is masked like every line.
    """
    main_process = rank == 0
    if not (main_process and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too: a log stays clean lines
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


def check_device(name: str) -> torch.device:
    """The device, or a `UserError` that says which CUDA devices there are."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count else "none; use --device cpu"
        raise UserError(f"--device {name}: this machine has no such CUDA device (there: {there})")
    return device


def check_devices(args: Any, ranks: Any) -> tuple[torch.device, torch.device]:
    """(student's device, the one that the teacher is loaded on); under torchrun `args.device` becomes the rank's own.

    A `--teacher_device` under torchrun serves all ranks of a host, so no rank may have it for its student.
    """
    args.device = ranks.device(args.device)
    own = check_device(args.device)
    if own.type == "cuda":
        torch.cuda.set_device(own)  # Triton's kernels and CUDA graphs are launched on the current device
    if args.teacher_device is None:
        return own, own
    theirs = check_device(args.teacher_device)
    if ranks.alone:
        return own, theirs
    if theirs.type == "cuda" and (theirs.index or 0) < ranks.local_world_size:
        raise UserError(
            f"--teacher_device {args.teacher_device} is a student's device under torchrun; name one from "
            f"cuda:{ranks.local_world_size} on, or leave it out for a teacher on every rank"
        )
    if args.matrix_tokens or args.hidden_tokens:
        raise UserError(
            f"--teacher_device {args.teacher_device}: the alignment stages need a teacher on every rank; leave it out"
        )
    return own, own


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def enable_determinism() -> None:
    """Deterministic GPU kernels, so that a run repeats bit for bit on the same card."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating tensors, a model's parameters among them, are made in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
    return ", ".join(
        [
            *parts,
            f"lr {get('train/lr', math.nan):.2e}",
            f"grad norm {get('train/grad_norm', math.nan):.3g}",
            f"{get('train/tokens_per_second', math.nan):,.0f} tokens/s",
            f"{get('perf/step_seconds', math.nan):.2f} s/step",
            f"ETA {format_duration(get('perf/eta_seconds', math.nan))}",
            f"{get('perf/peak_memory_gib', math.nan):.1f} GiB",
        ]
    )


class ProgressBar:
    """A tqdm bar on a terminal; nothing at all elsewhere, so that a nohup log stays clean lines."""

    def __init__(self, enabled: bool | None = None):
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self.bar: Any = None

    def show(self, figures: dict[str, Any]) -> None:
        if not self.enabled:
            return
        from tqdm import tqdm

        if self.bar is None or self.bar.desc != figures["stage"]:
            self.close()
            # the rate counts from where this process began, which on resume is not the stage's start
            done, total = max(0, figures["stage_step"] - 1), figures["stage_total"]
            self.bar = tqdm(desc=figures["stage"], initial=done, total=total, unit="step", dynamic_ncols=True)
        self.bar.n = figures["stage_step"]
        self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Tracker:
    """Where figures go: `metrics.jsonl` always, W&B if asked for, the progress bar on a terminal."""

    def __init__(
        self,
        output_dir: Path,
        *,
        wandb_enabled: bool = False,
        config: dict[str, Any] | None = None,
        project: str = "llamba-distill",
        run_name: str | None = None,
        entity: str | None = None,
        mode: str = "online",
        run_id: str | None = None,
        main_process: bool = True,
    ):
        self.path = output_dir / "metrics.jsonl"
        self.main_process = main_process
        self.bar = ProgressBar(None if main_process else False)
        self.wandb: Any = None
        self.writable, self.last_mark, self.stages_begun = True, ("", -1), 0
        if main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
        if wandb_enabled and main_process:
            try:
                self.wandb = start_wandb(output_dir, config or {}, project, run_name, entity, mode, run_id)
            except Exception as error:  # as in _wandb: no service is worth the run
                log.warning("W&B did not start: %s: %s; figures go to %s", type(error).__name__, error, self.path)
        self.run_id = self.wandb.id if self.wandb is not None else run_id

    def log(self, figures: dict[str, Any], *, step: int) -> None:
        """One line of metrics.jsonl (non-finite numbers become null) and one W&B row."""
        if not self.main_process:
            return
        row = {"step": step, **figures}
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
            self.writable = True
        except OSError as error:
            if self.writable:  # a full disk is told once, not at every step
                log.warning("metrics.jsonl could not be written: %s", error)
            self.writable = False
        if "stage_step" in figures:
            self.bar.show(figures)
        shown = {k: v for k, v in figures.items() if "/" in k}
        self._wandb(lambda run: run.log({**shown, "train/optimizer_step": step}))

    def truncate_after(self, step: int) -> None:
        """Drop lines after an optimizer step: a resumed run writes them again."""
        self.last_mark, self.stages_begun = ("", -1), 0
        for path in (self.path, self.path.with_name(SAMPLES)):
            if self.main_process and path.exists():
                self._truncate(path, step)

    def _truncate(self, path: Path, step: int) -> None:
        kept = []
        for line in filter(None, path.read_text(encoding="utf-8", errors="replace").split("\n")):
            try:
                row = json.loads(line)
            except ValueError:
                log.warning("%s: a line that was cut off is dropped", path.name)
                continue
            if row.get("step", 0) <= step:
                kept.append(line + "\n")
                if "stage_begins" in row:
                    self.last_mark = (row["stage_begins"], row["step"])
                    self.stages_begun += 1
        draft = path.with_suffix(".tmp")
        draft.write_text("".join(kept), encoding="utf-8")
        os.replace(draft, path)

    def mark_stage(self, stage: str, step: int) -> None:
        """Note where a stage begins, once: a run killed just after the mark comes back to the same step."""
        if self.last_mark == (stage, step):
            return
        self.last_mark = (stage, step)
        self.log({"stage_begins": stage, "stage": stage}, step=step)
        self.stages_begun += 1
        mark = {"train/stage_number": self.stages_begun, "train/optimizer_step": step}
        self._wandb(lambda run: run.log(mark))
        self._wandb(lambda run: run.summary.update({f"{stage}/first_step": step}))

    def summary(self, figures: dict[str, Any]) -> None:
        """Values of the whole run: parameter counts, steps of each stage."""
        self._wandb(lambda run: run.summary.update(figures))

    def samples(self, columns: list[str], rows: list[list[Any]], *, step: int) -> None:
        """Sample texts: a line each in samples.jsonl, and a W&B table."""
        if not self.main_process:
            return
        lines = [json.dumps({"step": step, **dict(zip(columns, row))}, ensure_ascii=False) for row in rows]
        try:
            with self.path.with_name(SAMPLES).open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            log.warning("%s could not be written: %s", SAMPLES, error)

        def send(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=["step", *columns], data=[[step, *row] for row in rows])
            run.log({"samples/texts": table, "train/optimizer_step": step})

        self._wandb(send)

    def _wandb(self, send: Any) -> None:
        """Training outlives W&B: a failure to report is one warning, and reporting ends."""
        if self.wandb is None:
            return
        try:
            send(self.wandb)
        except Exception as error:  # whatever the client raises, the run goes on
            log.warning("W&B stopped: %s: %s; figures go on in %s", type(error).__name__, error, self.path)
            self.wandb = None

    def close(self) -> None:
        self.bar.close()
        self._wandb(lambda run: run.finish())


def start_wandb(
    folder: Path,
    config: dict[str, Any],
    project: str,
    name: str | None,
    entity: str | None,
    mode: str,
    run_id: str | None,
) -> Any:
    """A W&B run, the same one when `run_id` is given, with axes by optimizer step and tokens."""
    import wandb

    sys.argv[1:] = mask_secrets(sys.argv[1:])  # W&B records the command line
    run = wandb.init(
        dir=os.environ.get("WANDB_DIR", str(folder)),
        project=os.environ.get("WANDB_PROJECT", mask_secrets(project)),
        entity=os.environ.get("WANDB_ENTITY", mask_secrets(entity)),
        name=os.environ.get("WANDB_NAME", mask_secrets(name)),
        mode=os.environ.get("WANDB_MODE", mode),  # type: ignore[arg-type]
        id=run_id,
        resume="allow" if run_id else None,
        config=config,
    )
    run.define_metric("train/optimizer_step")
    run.define_metric("train/tokens")
    for panel in ("train", "eval", "perf", "data", "layers", "samples"):
        run.define_metric(f"{panel}/*", step_metric="train/optimizer_step")
    return run
