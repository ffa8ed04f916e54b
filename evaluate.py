"""Figures of a distilled student beside its teacher: held-out KL, agreement, perplexity, recall, speed.

    python evaluate.py --student RUN/final --teacher MODEL --dataset_name FILE --tokens 100000

prints a table, writes `evaluation.json` and `evaluation.png` into `--output_dir` (default: the student's folder),
and with `--tasks` runs lm-evaluation-harness on the same checkpoint (`requirements-eval.txt`).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from arguments import UserError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--student", required=True, help="checkpoint folder or hub id of the student")
    add("--teacher", required=True, help="folder or hub id of the teacher")
    add("--dataset_name", default="", help="hub id, folder or file with held-out text; empty: no held-out figures")
    add("--dataset_subset", default="", help="subset (configuration) or subfolder of the data set")
    add("--dataset_split", default="train", help="split of the data set")
    add("--dataset_text_field", default="text", help="column that holds the text")
    add("--tokens", type=int, default=100_000, help="held-out tokens to evaluate on")
    add("--seq_length", type=int, default=1024, help="tokens a sequence")
    add("--batch_size", type=int, default=4, help="sequences a forward pass")
    add("--recall_pairs", type=int, nargs="*", default=[8, 32, 128], help="pairs in the recall contexts; none: skip")
    add("--recall_rows", type=int, default=50, help="questions a recall task and length")
    add("--speed_tokens", type=int, default=64, help="tokens to generate for the speed figure; 0: skip")
    add("--tasks", nargs="*", default=[], help="lm-evaluation-harness tasks")
    add("--limit", type=float, default=None, help="lm-evaluation-harness: rows (or share of rows) a task")
    add("--device", default="cuda:0", help="torch device")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="weights' dtype")
    add("--local_files_only", action="store_true", help="read from the caches alone")
    add(
        "--output_dir", default="", help="where evaluation.json and evaluation.png go (default: the student's folder)"
    )
    return parser.parse_args(argv)


def held_out_figures(
    student: Any,
    teacher: Any,
    batches: Iterable[Any],
    tokens: int,
    device: Any,
) -> dict[str, float]:
    """`figures_of` a student and a teacher that are whole models on this process' devices."""
    import torch

    from losses import chunked_kd_loss
    from model_utils import teacher_hidden

    teacher_device = next(teacher.parameters()).device
    teacher_head = teacher.get_output_embeddings().weight.to(device)

    def sums(batch: Any) -> torch.Tensor:
        inputs, labels = batch.tokens[:, :-1].to(device), batch.tokens[:, 1:].to(device)
        valid = batch.valid.to(device)
        positions = None if batch.position_ids is None else batch.position_ids.to(device)
        there = None if positions is None else positions.to(teacher_device)
        theirs = teacher_hidden(teacher, inputs.to(teacher_device), there).to(device)
        ours = student.backbone(inputs, position_ids=positions).last_hidden_state.to(theirs.dtype)
        terms = chunked_kd_loss(ours, student.lm_head.weight.to(theirs.dtype), theirs, teacher_head, labels, valid)
        return figure_sums(terms, theirs, teacher_head, labels, valid)

    was_training = student.training
    student.eval()
    figures = figures_of(sums, batches, tokens)
    student.train(was_training)
    return figures


def figure_sums(terms: Any, theirs: Any, teacher_head: Any, labels: Any, valid: Any) -> Any:
    """float64 [5] on the host: KL, agreement, the student's and the teacher's cross-entropy, tokens of a batch."""
    import torch

    from losses import chunked_kd_loss

    own = chunked_kd_loss(theirs, teacher_head, None, None, labels, valid, kl_weight=0.0, ce_weight=1.0)
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

    `batches` yields `data.Batch`, of which `sums_of` gives `figure_sums` (only valid positions count); `over_ranks`
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

    prompt = tokenizer("The history of", return_tensors="pt", add_special_tokens=False).to(device)
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


def harness_figures(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """lm-evaluation-harness results of the student for `--tasks`."""
    try:
        import lm_eval
    except ImportError as error:
        raise UserError("--tasks needs lm-evaluation-harness: pip install -r requirements-eval.txt") from error
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},trust_remote_code=True,dtype={args.dtype}",
        tasks=args.tasks,
        device=args.device,
        limit=args.limit,
    )
    return results["results"]


def print_table(report: dict[str, Any]) -> None:
    """The report as an aligned two-column or three-column table."""
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
        shown = ", ".join(f"{k}={v:.4f}" for k, v in figures.items() if isinstance(v, float))
        print(f"{task:<28}{shown}")


def draw(report: dict[str, Any], path: Path) -> None:
    """Recall by number of pairs for both models, and the held-out figures as text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    recall = report.get("recall", {})
    for task, style in zip(sorted({name.split("/")[0] for name in recall}), ("o-", "s--")):
        pairs = sorted(int(name.split("/")[1]) for name in recall if name.startswith(task))
        for model, colour in (("teacher", "tab:gray"), ("student", "tab:blue")):
            values = [recall[f"{task}/{count}"][model] for count in pairs]
            axis.plot(pairs, values, style, color=colour, label=f"{model}, {task.replace('_', ' ')}")
    axis.set(xlabel="pairs in context", ylabel="accuracy", ylim=(-0.03, 1.03))
    if recall:
        axis.set_xscale("log", base=2)
        axis.legend()
    held = report.get("held_out")
    if held:
        axis.set_title(
            f"KL {held['kl']:.3f} nats, top-1 agreement {held['top1_agreement']:.1%}, "
            f"perplexity ratio {held['perplexity_ratio']:.3f}"
        )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Load both models and gather every figure that the flags ask for."""
    import torch

    from model_utils import get_student_model, get_teacher_model, get_tokenizer
    from parallel import Ranks
    from stages import held_out_batches
    from utils import check_device

    device = check_device(args.device)
    tokenizer = get_tokenizer(args.teacher, local_files_only=args.local_files_only)
    options: dict[str, Any] = dict(dtype=getattr(torch, args.dtype), device=device)
    options["local_files_only"] = args.local_files_only
    teacher = get_teacher_model(args.teacher, **options)
    student = get_student_model(args.student, teacher, **options).eval()
    models = {"student": student, "teacher": teacher}
    report: dict[str, Any] = {"student": args.student, "teacher": args.teacher}
    if args.dataset_name:
        batches = held_out_batches(args, args.dataset_name, tokenizer, Ranks())
        report["held_out"] = held_out_figures(student, teacher, batches, args.tokens, device)
    if args.recall_pairs:
        report["recall"] = recall_figures(models, tokenizer, args, device)
    if args.speed_tokens:
        report["tokens_per_second"] = speed_figures(models, tokenizer, args.speed_tokens, device)
    if args.tasks:
        report["harness"] = harness_figures(args.student, args)
    return report


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        report = evaluate(args)
        output = Path(args.output_dir or args.student)
        if not output.is_dir():
            raise UserError(f"--output_dir {output}: no such folder")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(report)
    (output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, output / "evaluation.png")
    print(f"\nwritten: {output / 'evaluation.json'}, {output / 'evaluation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
