"""Metrics of a run: metrics.jsonl, Weights & Biases, the bar in the terminal."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run.metrics_file import read_metrics
from run.terminal import StageBar
from run.wandb_run import WandbRun, start_wandb
from utils import SAMPLES, write_whole

log = logging.getLogger(__name__)


class Tracker:
    """Where figures go: `metrics.jsonl` always, W&B once it is started, the progress bar on a terminal."""

    def __init__(self, output_dir: Path, *, main_process: bool = True, held: Callable[[], bool] = lambda: True):
        self.path = output_dir / "metrics.jsonl"
        self.main_process, self.held = main_process, held
        self.bar = StageBar(None if main_process else False)
        self.wandb: WandbRun | None = None
        self.wandb_id: str | None = None
        self.writable, self.last_mark, self.stages_begun = True, ("", -1), 0
        if main_process:
            output_dir.mkdir(parents=True, exist_ok=True)

    def start_wandb(self, config: dict[str, Any], **settings: Any) -> None:
        """Report to W&B from now on; `settings` as of `run.wandb_run.start_wandb`. What cannot start is a warning."""
        if not self.main_process:
            return
        try:
            self.wandb = start_wandb(self.path.parent, config, run_id=self.wandb_id, **settings)
        except Exception as error:  # as in _wandb: no service is worth the run
            log.warning("W&B did not start: %s: %s; figures go to %s", type(error).__name__, error, self.path)
            return
        self.wandb_id = self.wandb.id
        for row in read_metrics(self.path) if self.path.exists() else ():  # of a run that goes on
            self.wandb.note_best(row)
            self.wandb.tokens = row.get("train/tokens") or self.wandb.tokens

    def log(self, figures: dict[str, Any], *, step: int) -> None:
        """One line of metrics.jsonl (non-finite numbers become null) and one W&B row."""
        if not (self.main_process and self.held()):
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
        self.bar.show(figures)
        if "stage_begins" not in figures:
            self._wandb(lambda run: run.log(figures, step=step))

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
        write_whole(path, "".join(kept).encode())

    def mark_stage(self, stage: str, step: int) -> None:
        """Note where a stage begins, once: a run killed just after the mark comes back to the same step."""
        if self.last_mark == (stage, step):
            return
        self.last_mark = (stage, step)
        self.log({"stage_begins": stage, "stage": stage}, step=step)
        self.stages_begun += 1
        self._wandb(lambda run: run.stage(stage, self.stages_begun, step))

    def summary(self, figures: dict[str, Any]) -> None:
        """Values of the whole run: parameter counts, steps of each stage."""
        self._wandb(lambda run: run.summary(figures))

    def alert(self, title: str, text: str, *, level: str = "WARN") -> None:
        """A message to whoever follows the run at W&B."""
        self._wandb(lambda run: run.alert(title, text, level=level))

    def samples(self, columns: list[str], rows: list[list[Any]], *, step: int) -> None:
        """Sample texts: a line each in samples.jsonl, and a W&B table."""
        if not (self.main_process and self.held()):
            return
        lines = [json.dumps({"step": step, **dict(zip(columns, row))}, ensure_ascii=False) for row in rows]
        try:
            with self.path.with_name(SAMPLES).open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            log.warning("%s could not be written: %s", SAMPLES, error)

        self._wandb(lambda run: run.samples(columns, rows, step=step))

    def _wandb(self, send: Callable[[WandbRun], None]) -> None:
        """Training outlives W&B: a failure to report is one warning, and reporting ends."""
        if self.wandb is None:
            return
        try:
            send(self.wandb)
        except Exception as error:  # whatever the client raises, the run goes on
            log.warning("W&B stopped: %s: %s; figures go on in %s", type(error).__name__, error, self.path)
            self.wandb = None

    def close(self, status: int = 0) -> None:
        """Take the bar off, and end the W&B run with the run's exit status."""
        self.bar.close()
        self._wandb(lambda run: run.close(status))
        self.wandb = None
