"""What distillation reaches for its tokens: a list of experiments, one after another, on one device.

    python -m benchmarks.quality --train FOLDER --valid FILE --output runs/quality --only hand-0 hand-6
    python -m benchmarks.quality --output runs/quality --device cuda:1 --only hand-3 hand-10  # beside it
    python -m benchmarks.quality --output runs/quality --report  # table and plot alone

An experiment is a line of `quality.txt`: a name and flags of train.py, or `--tokens N` for another budget. Each is
`train.main` in this process, so that imports, compiled layers and the judging teacher are there from the second one
on. All stages of an experiment share its tokens. After each, a line goes to `results.jsonl`, and `results.md` and
`results.png` are made anew; what is already there is not run again, and a run that was killed goes on from its
checkpoint.
"""

import argparse
import gc
import json
import logging
import os
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from arguments import parse_arguments
from run.flag_checks import validate
from utils import UserError, complain

log = logging.getLogger("quality")
STAGES = ("matrix", "hidden", "stage1", "stage2")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub id of the teacher")
    add("--train", default="../shared/data/fineweb_like/CC-MAIN-2014-49", help="text of stage 1")
    add("--valid", default="../shared/data/fineweb_like/valid.parquet", help="held-out text of the figures")
    add("--stage2", default="../shared/data/hermes_like", help="conversations of stage 2")
    add("--experiments", type=Path, default=Path(__file__).with_suffix(".txt"), help="file with a line an experiment")
    add("--only", nargs="+", default=[], metavar="NAME", help="experiments to run; all that have layers if not given")
    add("--again", action="store_true", help="run them although their results are there")
    add("--list", action="store_true", help="print the experiments' command lines and do nothing")
    add("--report", action="store_true", help="make table and plot of the results so far, run nothing")
    add("--tokens", type=int, default=25_000_000, help="tokens of an experiment, all stages together")
    add("--seq_length", type=int, default=1024, help="tokens a sequence")
    add("--evaluations", type=int, default=10, help="held-out evaluations on the way")
    add("--eval_tokens", type=int, default=100_000, help="tokens of each; the last figures take the whole file")
    add("--recall_pairs", type=int, nargs="*", default=[8, 32], help="pairs in the recall contexts; none: skip")
    add("--recall_lengths", type=int, nargs="*", default=[256, 1024], help="tokens of the ten tasks' contexts")
    add("--recall_rows", type=int, default=500, help="questions a recall task and length")
    add("--device", default="cuda:0", help="torch device")
    add("--dtype", default="bfloat16", help="dtype of train.py")
    add("--minutes", type=float, default=0, help="start no experiment that would end after this time; 0: no limit")
    add("--compile_cache", type=Path, default=None, help="folder of compiled kernels, shared by runs side by side")
    add("--keep_models", action="store_true", help="keep each run's final model")
    add("--output", type=Path, default=Path("runs/quality"), help="folder of results and runs")
    return parser.parse_args(argv)


def read_experiments(file: Path) -> dict[str, list[str]]:
    """Flags by name, in the file's order; raises `UserError` for a line without a name or with an unknown @NAME."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        name, colon, text = line.partition(":")
        if not line.strip() or line.startswith("#"):
            continue
        if not colon or not name.strip():
            raise UserError(f"--experiments {file}: line {number} has no 'name:' in front of its flags")
        flags: list[str] = []
        for word in shlex.split(text):
            if word.startswith("@") and word[1:] not in found:
                raise UserError(f"--experiments {file}: line {number}: {word} is no earlier experiment")
            flags += found[word[1:]] if word.startswith("@") else [word]
        found[name.strip()] = flags
    return found


def command_line(bench: argparse.Namespace, name: str, flags: list[str]) -> list[str]:
    """The whole line for train.py, with `--max_steps` from what the other stages leave of the budget."""
    from run import plan

    tokens, flags = budget(bench, flags)
    line = [
        "--teacher_model", bench.teacher, "--student_model", "from_teacher", "--seq_length", str(bench.seq_length),
        "--dataset_name", bench.train, "--dataset_subset", "", "--second_dataset_name", bench.stage2,
        "--second_dataset_epochs", "1", "--log_interval", "10", "--save_minutes", "0", "--keep_checkpoints", "1",
        "--eval_dataset", bench.valid, "--eval_tokens", str(bench.eval_tokens), "--device", bench.device,
        "--dtype", bench.dtype, "--output_dir", str(bench.output / "runs" / name), *flags,
    ]  # fmt: skip
    if "--second_dataset_tokens" not in flags:
        line.append("--skip_stage2")
    args = parse_arguments(line)
    sequences = plan.sequences_a_step(vars(args), 1)
    others = [name for name in plan.stage_names(args) if name != "stage1"]
    steps = {name: plan.planned_steps(args, name, 1) for name in others}
    spent = sum(steps[name] * sequences * plan.sequence_length(args, name) for name in others)
    left = (tokens - spent) // (sequences * args.seq_length)
    if left < 1:
        raise UserError(f"{name}: the other stages take {spent:,} of --tokens {tokens:,}; stage 1 needs a step")
    total = left + sum(steps.values())
    return [*line, "--max_steps", str(left), "--eval_interval", str(max(1, total // max(1, bench.evaluations)))]


def budget(bench: argparse.Namespace, flags: list[str]) -> tuple[int, list[str]]:
    """Tokens of all stages of an experiment (its last `--tokens N`, or the bench's), and its other flags."""
    tokens, rest = bench.tokens, list(flags)
    while "--tokens" in rest:
        at = rest.index("--tokens")
        try:
            tokens = int(rest[at + 1])
        except (IndexError, ValueError):
            raise UserError(f"--experiments: --tokens {' '.join(rest[at + 1 : at + 2])} is no number") from None
        del rest[at : at + 2]
    return tokens, rest


class Judge:
    """The teacher beside which every student is measured: loaded once, its own recall taken once."""

    def __init__(self, bench: argparse.Namespace):
        import evaluate
        from evaluation.recall import recall_answers, recall_cells
        from hardware.devices import check_device
        from model_utils import get_teacher_model, get_tokenizer

        self.args = evaluate.parse(
            ["--student", "", "--teacher", bench.teacher, "--seq_length", str(bench.seq_length), "--batch_size", "8"]
        )  # fmt: skip
        import torch

        self.valid, self.device, self.dtype = bench.valid, check_device(bench.device), getattr(torch, bench.dtype)
        self.tokenizer = get_tokenizer(bench.teacher)
        self.teacher = get_teacher_model(bench.teacher, dtype=self.dtype, device=self.device)
        self.cells = recall_cells(self.tokenizer, bench.recall_pairs, bench.recall_lengths, bench.recall_rows)
        self.answers = recall_answers(self.teacher, self.tokenizer, self.cells, self.device)

    def figures(self, folder: Path) -> dict[str, Any]:
        """Held-out figures over the whole file, and recall of student and teacher."""
        import evaluate
        from evaluation.held_out import held_out_figures
        from evaluation.recall import recall_answers
        from evaluation.recall_summary import recall_summary
        from model_utils import get_student_model

        student = get_student_model(str(folder), self.teacher, dtype=self.dtype, device=self.device).eval()
        batches = evaluate.held_out_batches(self.args, self.valid, self.tokenizer)
        held_out = held_out_figures(student, self.teacher, batches, 2**62, self.device)
        answers = recall_answers(student, self.tokenizer, self.cells, self.device)
        recall, shares = recall_summary(self.cells, answers, self.answers)
        return {
            "attention_layers": student.config.attention_layers,
            "held_out": held_out,
            "recall": recall,
            "recall_share": shares,
        }


def from_metrics(folder: Path) -> dict[str, Any]:
    """Tokens and tokens/s of each stage, and the held-out curve, from a run's metrics.jsonl.

    tokens/s is the median of the stage's log lines after the first, which compiles.
    """
    from run.metrics_file import read_metrics

    rows = read_metrics(folder)
    trained = [row for row in rows if "train/tokens_per_second" in row]
    found: dict[str, Any] = {"stages": {}}
    before = 0
    for stage in STAGES:
        mine = [row for row in trained if row["stage"] == stage]
        if mine:
            rates = [row["train/tokens_per_second"] for row in mine]
            tokens = mine[-1]["train/tokens"] - before
            found["stages"][stage] = {"tokens": tokens, "tokens_per_second": statistics.median(rates[1:] or rates)}
            before = mine[-1]["train/tokens"]
    names = ("train/tokens", "eval/kl", "eval/top1_agreement", "eval/perplexity_ratio")
    found["curve"] = [[row[name] for name in names] for row in rows if "eval/kl" in row]
    return found


def own_flags(line: list[str]) -> str:
    """An experiment's own part of its command line."""
    return shlex.join(line[line.index("--output_dir") + 2 :])


def run(bench: argparse.Namespace, name: str, line: list[str], judge: Judge) -> dict[str, Any]:
    """Train and judge one experiment; its row for results.jsonl, with "error" where it did not end well."""
    import torch

    import train
    from utils import library_versions

    folder = bench.output / "runs" / name
    on_gpu = bench.device.startswith("cuda")
    row: dict[str, Any] = {
        "name": name,
        "flags": own_flags(line),
        "command": shlex.join(["python", "train.py", *line]),
        "device": torch.cuda.get_device_name(bench.device) if on_gpu else "CPU",
        "versions": library_versions(),
    }
    began = time.perf_counter()
    try:
        status = train.main(line)
        row["train_seconds"] = round(time.perf_counter() - began, 1)
        if status >= 128:
            raise SystemExit(status)
        if status:
            return {**row, "error": f"train.py ended with status {status}"}
        row |= from_metrics(folder) | judge.figures(folder / "final")
    except Exception as error:  # one experiment that fails does not take the rest with it
        log.exception("%s failed", name)
        return {**row, "error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    row["seconds"] = round(time.perf_counter() - began, 1)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if not bench.keep_models:
        shutil.rmtree(folder / "final")
    return row


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The last good row of each experiment, in the order of the first."""
    file = folder / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["name"]: row for row in rows if "error" not in row}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, a row an experiment."""
    tasks = list(dict.fromkeys(task for row in rows for task in row["recall"] if "/" in task))
    teacher = next((row["recall"] for row in rows if row["recall"]), {})
    heads = ["experiment", "attention layers", "million tokens", "KL", "top-1", "perplexity ratio"]
    heads += ["tokens/s by stage", "recall share", "never trained", *tasks]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        held = row["held_out"]
        speeds = ", ".join(f"{stage} {found['tokens_per_second']:,.0f}" for stage, found in row["stages"].items())
        layers = " ".join(map(str, row["attention_layers"])) or "none"
        tokens = sum(found["tokens"] for found in row["stages"].values()) / 1e6
        shares = [row.get("recall_share", {}).get(group, {}).get("share") for group in ("all", "never_trained")]
        cells = [row["name"], layers, f"{tokens:.1f}", f"{held['kl']:.4f}", f"{held['top1_agreement']:.1%}"]
        cells += [f"{held['perplexity_ratio']:.3f}", speeds, *("" if s is None else f"{s:.1%}" for s in shares)]
        cells += [f"{row['recall'][task]['student']:.0%}" if task in row["recall"] else "" for task in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    if teacher:
        cells = [
            "teacher",
            "all",
            "",
            "0",
            "100%",
            "1",
            "",
            "100%",
            "100%",
            *(f"{teacher[t]['teacher']:.0%}" for t in tasks),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {row['name']}: `{row['flags']}`" for row in rows) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out KL against tokens, a line an experiment."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for number, row in enumerate(rows):
        points = [(tokens / 1e6, kl) for tokens, kl, *_ in row["curve"] if tokens]
        points.append((sum(found["tokens"] for found in row["stages"].values()) / 1e6, row["held_out"]["kl"]))
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axis.plot(*zip(*points), style, color=f"C{number % 10}", marker="o", markersize=3, label=row["name"])
    axis.set(xlabel="million tokens, all stages", ylabel="held-out KL, nats a token", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(folder: Path) -> None:
    """Write results.md and results.png of all rows so far."""
    rows = list(read_results(folder).values())
    if rows:
        (folder / "results.md").write_text(table(rows))
        draw(rows, folder / "results.png")


def chosen_lines(bench: argparse.Namespace) -> dict[str, list[str]]:
    """The command lines to run; raises `UserError` for an unknown name or a bad flag, before anything is run."""
    experiments = read_experiments(bench.experiments)
    unknown = [name for name in bench.only if name not in experiments]
    if unknown:
        raise UserError(f"--only {' '.join(unknown)}: no such experiment in {bench.experiments}")
    names = bench.only or [name for name, flags in experiments.items() if "--layers" in flags]
    done = {} if bench.again else read_results(bench.output)
    lines = {name: command_line(bench, name, experiments[name]) for name in names}
    lines = {name: line for name, line in lines.items() if name not in done or done[name]["flags"] != own_flags(line)}
    if not bench.list:
        for line in lines.values():
            validate(parse_arguments(line))
    return lines


def work(bench: argparse.Namespace, lines: dict[str, list[str]]) -> int:
    """Run every line; returns how many failed."""
    import torch

    # All experiments of this process share dynamo's caches: a graph for each kind of layer, shape and mode.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    judge = Judge(bench)
    began, longest, failed = time.perf_counter(), 0.0, 0
    for number, (name, line) in enumerate(lines.items(), 1):
        elapsed = time.perf_counter() - began
        if bench.minutes and number > 1 and elapsed + longest > 60 * bench.minutes:
            print(
                f"--minutes {bench.minutes:g}: {len(lines) - number + 1} experiments are left for later", flush=True
            )
            break
        print(f"== {number}/{len(lines)} {name}", flush=True)
        if bench.again or name in read_results(bench.output):  # its result there is of other flags
            shutil.rmtree(bench.output / "runs" / name, ignore_errors=True)
        row = run(bench, name, line, judge)
        longest = max(longest, time.perf_counter() - began - elapsed)
        failed += "error" in row
        with (bench.output / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        report(bench.output)
        if "error" in row:
            print(f"== {name}: {row['error']}", flush=True)
        else:
            held = row["held_out"]
            print(
                f"== {name}: KL {held['kl']:.4f}, top-1 {held['top1_agreement']:.1%}, {row['seconds']} s", flush=True
            )
    return failed


def main(argv: list[str] | None = None) -> int:
    bench = parse(argv)
    if bench.compile_cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(bench.compile_cache.absolute() / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(bench.compile_cache.absolute() / "triton")
    try:
        lines = {} if bench.report else chosen_lines(bench)
        if bench.list:
            print("\n".join(f"{name}: python train.py {shlex.join(line)}" for name, line in lines.items()))
            return 0
        bench.output.mkdir(parents=True, exist_ok=True)
        failed = work(bench, lines) if lines else 0
    except (UserError, OSError) as error:
        complain(str(error))
        return 2
    report(bench.output)
    print(f"written: {bench.output}/results.jsonl, results.md, results.png")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
