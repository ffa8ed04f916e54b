"""Figures of a distilled student beside its teacher: held-out KL, agreement, perplexity, recall, speed.

    python evaluate.py --student RUN/final --teacher MODEL --dataset_name FILE --tokens 100000

prints a table, writes `evaluation.json` and `evaluation.png` into `--output_dir` (default: the student's folder),
and with `--tasks` runs lm-evaluation-harness on the same checkpoint (`requirements-eval.txt`).
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from arguments import Parser, UserError, check_folder_writable, complain, device, real, whole
from hub_files import DataStreamLost

MOST_PAIRS = 306  # different names in `recall.phone_book`


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--student", "--student_model", required=True, help="checkpoint folder or hub id of the student")
    add("--teacher", "--teacher_model", required=True, help="folder or hub id of the teacher")
    add("--dataset_name", default="", help="hub id, folder or file with held-out text; empty: no held-out figures")
    add("--dataset_subset", default="", help="subset (configuration) or subfolder of the data set")
    add("--dataset_split", default="train", help="split of the data set")
    add("--dataset_text_field", default="text", help="column that holds the text")
    add("--tokens", type=whole(1), default=100_000, help="held-out tokens to evaluate on")
    add("--seq_length", type=whole(1), default=1024, help="tokens a sequence")
    add("--batch_size", type=whole(1), default=4, help="sequences a forward pass")
    pairs = dict(type=whole(1, MOST_PAIRS), nargs="*", default=[8, 32, 128])
    add("--recall_pairs", **pairs, help="pairs in the recall contexts; none: skip")
    add("--recall_rows", type=whole(1), default=50, help="questions a recall task and length")
    add("--speed_tokens", type=whole(0), default=64, help="tokens to generate for the speed figure; 0: skip")
    add("--tasks", nargs="*", default=[], help="lm-evaluation-harness tasks")
    add("--include_path", default="", help="lm-evaluation-harness: folder with more tasks (YAML)")
    add("--limit", type=real(0, above=True), help="lm-evaluation-harness: rows (or share of rows) a task")
    add("--device", type=device, default="cuda:0", help="cpu, cuda or cuda:N")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="weights' dtype")
    attention = ["sdpa", "eager", "flash_attention_2"]
    add("--attn_implementation", choices=attention, default="sdpa", help="attention of the teacher and of a hybrid")
    add("--local_files_only", action="store_true", help="read from the caches alone")
    add("--network_patience", type=real(0), default=600.0, help="seconds to ride out a network fault")
    add(
        "--output_dir", default="", help="where evaluation.json and evaluation.png go (default: the student's folder)"
    )
    return parser.parse_args(argv)


def validate(args: argparse.Namespace) -> Path:
    """Checks that need no model; returns the folder for the figures. Raises `UserError` naming the flag to change."""
    output = Path(args.output_dir or args.student)
    if not args.output_dir and not output.is_dir():
        raise UserError(f"--student {args.student} is no folder here: give --output_dir for the figures")
    check_folder_writable("--output_dir", output)
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness: pip install -r requirements-eval.txt")
    if args.include_path and not Path(args.include_path).is_dir():
        raise UserError(f"--include_path {args.include_path}: no such folder")
    if not (args.dataset_name or args.recall_pairs or args.speed_tokens or args.tasks):
        raise UserError("nothing to measure: give --dataset_name, --recall_pairs, --speed_tokens or --tasks")
    return output


def held_out_figures(
    student: Any, teacher: Any, batches: Iterable[Any], tokens: int, device: Any
) -> dict[str, float]:
    """`figures_of` a student and a teacher that are whole models on this process' devices."""
    from distillation import DistillationStep
    from teacher import OwnTeacher

    head = teacher.get_output_embeddings().weight.to(device)
    step, hidden_states = DistillationStep(student, head), OwnTeacher(teacher, device)
    was_training = student.training
    student.eval()
    figures = figures_of(lambda batch: held_out_sums(step, hidden_states, head, batch, device), batches, tokens)
    student.train(was_training)
    return figures


def held_out_sums(step: Any, hidden_states: Any, teacher_head: Any, batch: Any, device: Any) -> Any:
    """float64 [5] on the host: KL, agreement, the student's and the teacher's cross-entropy, tokens of a batch.

    step: a `distillation.DistillationStep`, also replicated or sharded; hidden_states: a teacher of teacher.py.
    """
    import torch

    from losses import chunked_kd_loss
    from trainer import to_device

    here = to_device(batch, device, {}, non_blocking=False)
    theirs = hidden_states.finish(here)
    one = torch.ones((), device=device)
    terms = step(here.inputs, here.labels, here.valid, here.position_ids, theirs, one)
    options: dict[str, Any] = dict(kl_weight=0.0, ce_weight=1.0)
    own = chunked_kd_loss(theirs, teacher_head, None, None, here.labels, here.valid, **options)
    row = (terms.kl_sum, terms.agree_sum, terms.ce_sum, own.ce_sum, terms.tokens)
    return torch.stack([value.double() for value in row]).cpu()


def figures_of(
    sums_of: Callable[[Any], Any],
    batches: Iterable[Any],
    tokens: int,
    over_ranks: Callable[[Any], Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """KL(teacher || student) at temperature 1, top-1 agreement and both perplexities over at least `tokens` tokens.

    `batches` yields `data.Batch`, of which `sums_of` gives `held_out_sums` (only valid positions count); `over_ranks`
    adds those of all ranks. Returns kl (nats a token), top1_agreement (0 to 1), student_perplexity,
    teacher_perplexity, perplexity_ratio, tokens; nothing once `stop()` says so. Raises `UserError` where there is no
    token.
    """
    import torch

    sums = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            row = sums_of(batch)
            sums += row if over_ranks is None else over_ranks(row)
            if stop():
                return {}
            if sums[4] >= tokens:
                break
    kl, agree, ours_ce, theirs_ce, count = sums.tolist()
    if not count:
        raise UserError("the held-out data holds no whole sequence: use more text or a smaller --seq_length")
    return {
        "kl": kl / count,
        "top1_agreement": agree / count,
        "student_perplexity": math.exp(min(ours_ce / count, 700.0)),
        "teacher_perplexity": math.exp(min(theirs_ce / count, 700.0)),
        "perplexity_ratio": math.exp(min((ours_ce - theirs_ce) / count, 700.0)),
        "tokens": count,
    }


def recall_figures(models: dict[str, Any], tokenizer: Any, args: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Accuracy of each model for each task and number of pairs."""
    from recall import TASKS, recall_accuracy, recall_rows

    figures: dict[str, Any] = {}
    for task in TASKS:
        for pairs in args.recall_pairs:
            rows = recall_rows(task, pairs, args.recall_rows)
            for name, model in models.items():
                accuracy = recall_accuracy(model, tokenizer, rows, device)
                figures.setdefault(f"{task}/{pairs}", {})[name] = accuracy
    return figures


def speed_figures(models: dict[str, Any], tokenizer: Any, tokens: int, device: Any) -> dict[str, float]:
    """Generated tokens a second, greedy, batch 1, after one warm-up."""
    import torch

    prompt = tokenizer("The history of", return_tensors="pt").to(device)
    options = dict(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, use_cache=True)
    figures = {}
    for name, model in models.items():
        model.generate(**prompt, **{**options, "min_new_tokens": 2, "max_new_tokens": 2})
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        model.generate(**prompt, **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        figures[name] = tokens / (time.perf_counter() - start)
    return figures


def harness_figures(args: argparse.Namespace) -> dict[str, Any]:
    """lm-evaluation-harness results of the student for `--tasks`: {task: {metric: value}}.

    In a process of its own, started elsewhere: it imports a package whose name is this script's.
    """
    student = Path(args.student)
    options = {
        "--model": "hf",
        "--model_args": f"pretrained={student.resolve() if student.is_dir() else student},"
        f"trust_remote_code=True,dtype={args.dtype},attn_implementation={args.attn_implementation}",
        "--tasks": ",".join(args.tasks),
        "--device": args.device,
        "--batch_size": str(args.batch_size),
    }
    if args.limit is not None:
        options["--limit"] = f"{args.limit:g}"
    if args.include_path:
        options["--include_path"] = str(Path(args.include_path).resolve())
    env = {**os.environ, "HF_HUB_OFFLINE": "1"} if args.local_files_only else None
    with tempfile.TemporaryDirectory() as folder:
        options["--output_path"] = folder
        command = [sys.executable, "-m", "lm_eval", *itertools.chain(*options.items())]
        if subprocess.run(command, cwd=folder, env=env).returncode:
            raise UserError(f"--tasks {' '.join(args.tasks)}: lm-evaluation-harness failed (its own words are above)")
        results = json.loads(next(Path(folder).rglob("results_*.json")).read_text())["results"]
    return {task: {k: v for k, v in found.items() if isinstance(v, float)} for task, found in results.items()}


def print_table(report: dict[str, Any]) -> None:
    """The report as aligned columns."""
    for name, value in report.get("held_out", {}).items():
        print(f"{name:<28}{value:>14.4f}")
    for section in ("recall", "tokens_per_second"):
        figures = report.get(section)
        if not figures:
            continue
        print(f"\n{section:<28}{'student':>14}{'teacher':>14}")
        rows = figures if section == "recall" else {"generate, batch 1": figures}
        for name, pair in rows.items():
            print(f"{name:<28}{pair['student']:>14.3f}{pair['teacher']:>14.3f}")
    for task, figures in report.get("harness", {}).items():
        print(f"\n{task}")
        for name, value in figures.items():
            print(f"  {name:<26}{value:>14.4f}")


def draw(report: dict[str, Any], path: Path) -> None:
    """Recall by number of pairs and speed, for both models; the held-out figures in the title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [name for name in ("recall", "tokens_per_second") if name in report]
    figure, axes = plt.subplots(
        1, max(1, len(panels)), figsize=(4 + 4 * len(panels), 4.5), layout="constrained", squeeze=False
    )
    colours = {"teacher": "tab:gray", "student": "tab:blue"}
    for name, axis in zip(panels, axes[0]):
        if name == "recall":
            draw_recall(report[name], axis, colours)
        else:
            bars = axis.bar(list(colours), [report[name][model] for model in colours], color=list(colours.values()))
            axis.bar_label(bars, fmt="%.1f")
            axis.set(ylabel="generated tokens a second, batch 1")
    if not panels:
        axes[0, 0].axis("off")
    held = report.get("held_out")
    if held:
        figure.suptitle(
            f"KL {held['kl']:.3f} nats, top-1 agreement {held['top1_agreement']:.1%}, "
            f"perplexity ratio {held['perplexity_ratio']:.3f}"
        )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_recall(recall: dict[str, Any], axis: Any, colours: dict[str, str]) -> None:
    """A line for each model and task."""
    for task, style in zip(sorted({name.split("/")[0] for name in recall}), ("o-", "s--")):
        pairs = sorted(int(name.split("/")[1]) for name in recall if name.startswith(task))
        for model, colour in colours.items():
            values = [recall[f"{task}/{count}"][model] for count in pairs]
            axis.plot(pairs, values, style, color=colour, label=f"{model}, {task.replace('_', ' ')}")
    axis.set(xlabel="pairs in context", ylabel="accuracy", ylim=(-0.03, 1.03))
    axis.set_xscale("log")
    axis.minorticks_off()
    counts = sorted({int(name.split("/")[1]) for name in recall})
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.legend()


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Every figure that the flags ask for."""
    report: dict[str, Any] = {"student": args.student, "teacher": args.teacher, "flags": vars(args)}
    if args.dataset_name or args.recall_pairs or args.speed_tokens:
        report |= own_figures(args)  # both models are gone when it returns
    if args.tasks:
        report["harness"] = harness_figures(args)
    return report


def own_figures(args: argparse.Namespace) -> dict[str, Any]:
    """Held-out figures, recall and speed: text and sizes are looked at before any weight is loaded."""
    import torch

    from model_files import fetch_model
    from model_utils import (
        check_pair,
        check_teacher_config,
        get_student_model,
        get_teacher_model,
        get_tokenizer,
        load_config,
    )
    from models import LlambaConfig
    from parallel import Ranks
    from stage_text import held_out_batches
    from utils import check_device

    where = check_device(args.device)
    for flag, name in (("--teacher", args.teacher), ("--student", args.student)):
        fetch_model(flag, name, args, weights=True)
    local: dict[str, Any] = dict(local_files_only=True)
    teacher_config = load_config(args.teacher, **local)
    check_teacher_config(teacher_config, args.teacher)
    check_pair(load_config(args.student, config_class=LlambaConfig, **local), teacher_config, args.student)
    tokenizer = get_tokenizer(args.teacher, **local)
    batches = iter(held_out_batches(args, args.dataset_name, tokenizer, Ranks()) if args.dataset_name else ())
    first = list(itertools.islice(batches, 1))
    options = dict(dtype=getattr(torch, args.dtype), device=where, attn_implementation=args.attn_implementation)
    teacher = get_teacher_model(args.teacher, **options, **local)
    student = get_student_model(args.student, teacher, **options, **local).eval()
    models = {"student": student, "teacher": teacher}
    report: dict[str, Any] = {}
    if args.dataset_name:
        report["held_out"] = held_out_figures(student, teacher, itertools.chain(first, batches), args.tokens, where)
    if args.recall_pairs:
        report["recall"] = recall_figures(models, tokenizer, args, where)
    if args.speed_tokens:
        report["tokens_per_second"] = speed_figures(models, tokenizer, args.speed_tokens, where)
    return report


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        output = validate(args)
        report = evaluate(args)
    except UserError as error:
        complain(str(error))
        return 2
    except DataStreamLost as error:
        complain(str(error))
        return 4
    print_table(report)
    output.mkdir(parents=True, exist_ok=True)
    (output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, output / "evaluation.png")
    print(f"\nwritten: {output / 'evaluation.json'}, {output / 'evaluation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
