"""Figures of a distilled student beside its teacher: held-out KL, agreement, perplexity, recall, speed.

    python evaluate.py --student RUN/final --teacher MODEL --dataset_name FILE --tokens 100000

prints a table, writes `evaluation.json` and `evaluation.png` into `--output_dir` (default: the student's folder),
and with `--tasks` or `--suite` runs lm-evaluation-harness on the same checkpoint (`requirements-eval.txt`).
"""

import argparse
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.card import write_into_card
from evaluation.harness import SUITES, harness_figures, with_suite
from evaluation.report import draw, print_table
from flags.reading import HelpFormatter, Parser, device_name, real, whole
from hub.hub_files import reading_status
from utils import UserError, check_folder_writable, wait_passively

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_PAIRS = 306  # different names in `recall.phone_book`


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
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
    lengths = dict(type=whole(128), nargs="*", default=[256, 1024, 4096])
    add("--recall_lengths", **lengths, help="tokens of the ten recall tasks' contexts; none: skip")
    add("--recall_rows", type=whole(1), default=500, help="questions a recall task and length")
    add("--recall_generated", type=whole(0), default=100, help="of these, those that are answered by generating too")
    add("--speed_tokens", type=whole(0), default=64, help="tokens to generate for the speed figures; 0: skip")
    add("--speed_contexts", type=whole(1), nargs="+", default=[128, 1024], help="lengths of their prompts, in tokens")
    add("--speed_batches", type=whole(1), nargs="+", default=[1], help="rows generated at once for them")
    add("--tasks", nargs="*", default=[], help="lm-evaluation-harness tasks")
    suites = "; ".join(f"{name}: {' '.join(tasks)}" for name, tasks in SUITES.items())
    add("--suite", choices=list(SUITES), help=f"several tasks by one name, before those of --tasks ({suites})")
    add("--include_path", default="", help="lm-evaluation-harness: folder with more tasks (YAML)")
    add("--limit", type=real(0, above=True), help="lm-evaluation-harness: rows (or share of rows) a task")
    add("--device", type=device_name, default="cuda:0", help="cpu, cuda or cuda:N")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="weights' dtype")
    attention = ["sdpa", "eager", "flash_attention_2"]
    add("--attn_implementation", choices=attention, default="sdpa", help="attention of the teacher and of a hybrid")
    add("--local_files_only", action="store_true", help="read from the caches alone")
    add("--network_patience", type=real(0), default=600.0, help="seconds to ride out a network fault")
    add(
        "--output_dir", default="", help="where evaluation.json and evaluation.png go (default: the student's folder)"
    )
    args = parser.parse_args(argv)
    args.tasks = with_suite(args.tasks, args.suite)
    return args


def validate(args: argparse.Namespace) -> Path:
    """Checks that need no model; returns the folder for the figures. Raises `UserError` naming the flag to change."""
    output = Path(args.output_dir or args.student)
    if not args.output_dir and not output.is_dir():
        raise UserError(f"--student {args.student} is no folder here: give --output_dir for the figures")
    runs = Path(args.student)
    if (runs / "final" / "config.json").is_file() and not (runs / "config.json").exists():
        raise UserError(f"--student {args.student} is a run's folder; its model is {runs / 'final'}")
    check_folder_writable("--output_dir", output)
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        flag = "--suite" if args.suite else "--tasks"
        raise UserError(f"{flag} needs lm-evaluation-harness: pip install -r requirements-eval.txt")
    if args.include_path and not Path(args.include_path).is_dir():
        raise UserError(f"--include_path {args.include_path}: no such folder")
    if not (args.tasks or measures_itself(args)):
        raise UserError(
            "nothing to measure: give --dataset_name, --recall_pairs, --recall_lengths, --speed_tokens or --tasks"
        )
    return output


def measures_itself(args: argparse.Namespace) -> bool:
    """True where there are figures to take other than the harness'."""
    return bool(args.dataset_name or args.recall_pairs or args.recall_lengths or args.speed_tokens)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Every figure that the flags ask for."""
    report: dict[str, Any] = {"student": args.student, "teacher": args.teacher, "flags": vars(args)}
    if measures_itself(args):
        report |= own_figures(args)  # both models are gone when it returns
    if args.tasks:
        report["harness"] = harness_figures(
            args.student,
            args.tasks,
            device=args.device,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            batch_size=args.batch_size,
            limit=args.limit,
            include_path=args.include_path,
            offline=args.local_files_only,
        )
    return report


def held_out_batches(args: argparse.Namespace, name: str, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """One unshuffled pass over the held-out text `name`, as the flags say."""
    from data import SourceSpec, build_loader

    spec = SourceSpec(
        name=name,
        subset=args.dataset_subset,
        split=args.dataset_split,
        text_field=args.dataset_text_field,
        shuffle_buffer=0,
        local_files_only=args.local_files_only,
        network_patience=args.network_patience,
    )
    return build_loader(spec, tokenizer, seq_length=args.seq_length, batch_size=args.batch_size, epochs=1)


def own_figures(args: argparse.Namespace) -> dict[str, Any]:
    """Held-out figures, recall and speed: text and sizes are looked at before any weight is loaded."""
    import torch

    from evaluation.generation_speed import speed_figures
    from evaluation.held_out import held_out_figures
    from evaluation.recall import recall_answers, recall_cells
    from evaluation.recall_summary import recall_summary
    from hardware.devices import check_device
    from hub.model_files import fetch_model
    from model_utils import (
        check_pair,
        check_teacher_config,
        get_student_model,
        get_teacher_model,
        get_tokenizer,
        load_config,
    )
    from models import LlambaConfig

    where = check_device(args.device)
    network = dict(local_files_only=args.local_files_only, network_patience=args.network_patience)
    for flag, name in (("--teacher", args.teacher), ("--student", args.student)):
        fetch_model(flag, name, weights=True, **network)
    local: dict[str, Any] = dict(local_files_only=True)
    teacher_config = load_config(args.teacher, **local)
    check_teacher_config(teacher_config, args.teacher)
    check_pair(load_config(args.student, config_class=LlambaConfig, **local), teacher_config, args.student)
    tokenizer = get_tokenizer(args.teacher, **local)
    batches = iter(held_out_batches(args, args.dataset_name, tokenizer) if args.dataset_name else ())
    first = list(itertools.islice(batches, 1))
    options = dict(dtype=getattr(torch, args.dtype), device=where, attn_implementation=args.attn_implementation)
    teacher = get_teacher_model(args.teacher, **options, **local)
    student = get_student_model(args.student, teacher, **options, **local).eval()
    models = {"student": student, "teacher": teacher}
    report: dict[str, Any] = {}
    if args.dataset_name:
        report["held_out"] = held_out_figures(student, teacher, itertools.chain(first, batches), args.tokens, where)
    if args.speed_tokens:  # before recall generates: a first call is timed too
        report["generation"] = speed_figures(models, args.speed_batches, args.speed_contexts, args.speed_tokens)
    if args.recall_pairs or args.recall_lengths:
        lengths = [length for length in args.recall_lengths if length <= teacher_config.max_position_embeddings]
        cells = recall_cells(tokenizer, args.recall_pairs, lengths, args.recall_rows)
        answers = [recall_answers(model, tokenizer, cells, where, args.recall_generated) for model in models.values()]
        report["recall"], report["recall_share"] = recall_summary(cells, *answers)
    return report


def report_figures(args: argparse.Namespace) -> None:
    """Check, measure, print, write."""
    output = validate(args)
    report = evaluate(args)
    print_table(report)
    output.mkdir(parents=True, exist_ok=True)
    (output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, output / "evaluation.png")
    carded = write_into_card(Path(args.student), report)
    card = f", {Path(args.student) / 'README.md'}" if carded else ""
    print(f"\nwritten: {output / 'evaluation.json'}, {output / 'evaluation.png'}{card}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    wait_passively(args.device)
    return reading_status(lambda: report_figures(args))


if __name__ == "__main__":
    sys.exit(main())
