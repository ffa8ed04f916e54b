"""Every flag of `train.py`, with units and defaults, and the checks that need no model.

No torch and no transformers here, so that `--help` is quick. `python arguments.py --markdown` prints docs/flags.md.
"""

import argparse
import importlib.util
import math
import netrc
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils import UserError, mask_secrets

FROM_TEACHER = "from_teacher"  # the --student_model that is built to the teacher's sizes


class NotGiven(list):
    """The layers of a run whose command names none: a default, unless the student has layers of its own."""


DEFAULT_LAYERS = NotGiven([10, 14, 17, 30])  # Llama 3.1 8B has 32


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in exactly one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        complain(message.replace("\n", "\\n").replace("\r", "\\r"))
        raise SystemExit(2)


def complain(message: str) -> None:
    """A user's mistake in one line on stderr; under torchrun the first rank speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {mask_secrets(message)}", file=sys.stderr)


def whole(minimum: int, maximum: int = 2**63 - 1):
    """A parser of whole numbers from `minimum` to `maximum` (int64's by default), whose complaint says so."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is above {maximum}, the largest that is possible")
        return value

    return parse


def real(minimum: float, *, above: bool = False, maximum: float = math.inf):
    """A parser of finite numbers from `minimum` (exclusive with `above`) to `maximum`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > minimum if above else value >= minimum) and value <= maximum):
            upper = f" and at most {maximum:g}" if maximum < math.inf else ""
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number {'above' if above else 'of at least'} {minimum:g}{upper}"
            )
        return value

    return parse


def layer(text: str) -> int | str:
    """A layer's index, or `auto:K` with K at least 1, as it is."""
    if re.fullmatch(r"auto:0*[1-9][0-9]{0,8}", text):
        return f"auto:{int(text[5:])}"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a layer's index or auto:K, K at least 1") from None


def auto_layers(layers: Sequence[int | str]) -> int | None:
    """K where `--layers` is `auto:K`, else None."""
    return next((int(entry[5:]) for entry in layers if isinstance(entry, str)), None)


def device(text: str) -> str:
    """`cpu`, `cuda` or `cuda:N`; N has at most two digits, since torch keeps it in 8 bits and wraps round."""
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; use cpu, cuda or cuda:N")
    return "cuda:0" if text == "cuda" else text


def build_parser() -> Parser:
    """The parser with every flag, in groups."""
    parser = Parser(
        prog="train.py",
        description="Distil a Llama teacher into a hybrid Mamba-2 student.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("models").add_argument
    add("--teacher_model", default="meta-llama/Llama-3.1-8B-Instruct", help="hub id or folder of the teacher")
    add(
        "--student_model",
        default="goombalab/Llamba-8B-untied-unaligned",
        help="hub id or folder of the student, a checkpoint of this toolkit, or from_teacher",
    )
    add(
        "--layers",
        type=layer,
        nargs="+",
        default=DEFAULT_LAYERS,
        help="layers to replace by the teacher's (a distilled student keeps its own); negative ones are ignored "
        "(-1: none); auto:K: K found by measuring",
    )
    add("--expand", type=whole(1, 4), default=1, help="from_teacher: mixer heads for each attention head, at most 4")
    add("--choice_tokens", type=whole(1), default=8192, help="tokens of stage 1 or --choice_dataset for auto:K")
    add("--choice_dataset", default="", help="text for auto:K other than stage 1's: hub id, folder or file")
    add("--freeze_mlp", action="store_true", help="do not train the MLPs")
    add("--freeze_replaced_layers", action="store_true", help="do not train the replaced layers")
    add("--freeze_embeddings", action="store_true", help="do not train embedding and head")
    add(
        "--attn_implementation",
        choices=["sdpa", "eager", "flash_attention_2"],
        default="sdpa",
        help="attention of the teacher and of replaced layers",
    )

    add = parser.add_argument_group("stage 1 data").add_argument
    add(
        "--dataset_name",
        default="HuggingFaceFW/fineweb-edu",
        help="hub id, or folder or file (parquet, jsonl, jsonl.gz)",
    )
    add(
        "--dataset_subset",
        default="CC-MAIN-2014-49",
        help="configuration on the hub, subfolder of a folder; '' for none, as by default where a local one lacks it",
    )
    add("--dataset_split", default="train", help="split")
    add("--dataset_revision", default=None, help="commit, tag or branch on the hub")
    add("--dataset_text_field", default="text", help="column that holds the text")
    add("--no_dataset_streaming", action="store_true", help="load stage 1 at once instead of streaming it")
    add("--shuffle_buffer", type=whole(0), default=10000, help="documents shuffled together; 0: no shuffling")
    add("--seq_length", type=whole(1), default=4096, help="tokens a sequence")
    add("--document_reset", action="store_true", help="keep documents that are packed together apart")
    add("--on_bad_data", choices=["error", "skip"], default="error", help="what to do with unreadable rows or files")
    add("--network_patience", type=real(0), default=600.0, help="seconds to ride out a network fault")
    add("--local_files_only", action="store_true", help="read models, tokenizer and data from the caches alone")

    add = parser.add_argument_group("stage 2 data").add_argument
    add("--second_dataset_name", default="teknium/OpenHermes-2.5", help="hub id, folder or file; '' skips stage 2")
    add("--skip_stage2", action="store_true", help="end after stage 1")
    add("--second_dataset_epochs", type=whole(1), default=4, help="epochs of stage 2")
    add("--second_dataset_tokens", type=whole(1), default=200_000_000, help="tokens an epoch of stage 2")
    add("--second_dataset_text_field", default="text", help="column with plain text, if there is one")
    add("--second_dataset_split", default="train", help="split")
    add("--second_dataset_subset", default="", help="configuration on the hub, subfolder of a folder; '' for none")
    add("--second_dataset_revision", default=None, help="commit, tag or branch on the hub")

    add = parser.add_argument_group("optimisation").add_argument
    add("--max_steps", type=whole(1), default=100_000, help="optimizer steps of stage 1")
    add("--epochs", type=whole(0), default=0, help="above 0: whole passes over stage 1; --max_steps is ignored")
    add("--epoch_step_hint", type=whole(0), default=0, help="optimizer steps an epoch; 0: estimated by sampling")
    add("--batch_size", type=whole(1), default=1, help="sequences a micro step, per rank")
    add("--grad_accumulation_steps", type=whole(1), default=1, help="micro steps an optimizer step")
    add("--optimizer", choices=["adamw", "adamw8bit", "muon", "flashadamw"], default="adamw8bit", help="optimizer")
    add("--max_lr", type=real(0, above=True), default=1e-5, help="highest learning rate")
    add("--min_lr", type=real(0), default=1e-8, help="last learning rate")
    add("--warmup_ratio", type=real(0, maximum=1), default=0.1, help="share of a stage's steps that warm up")
    add("--decay_ratio", type=real(0, maximum=1), default=0.1, help="share of a stage's steps that cool down")
    add("--weight_decay", type=real(0), default=0.1, help="AdamW weight decay; not on norms, biases, D, z_bias")
    add("--grad_clip", type=real(0, above=True), default=1.0, help="largest gradient norm")
    add("--max_bad_steps", type=whole(1), default=10, help="non-finite updates in a row that end the run")
    add("--seed", type=whole(0), default=42, help="seed of data order and initialisation")

    add = parser.add_argument_group("loss").add_argument
    add("--temperature", type=real(0, above=True), default=1.0, help="softmax temperature of the distillation term")
    add(
        "--kl_weight",
        type=real(0),
        default=1.0,
        help="weight of the distillation term; 0: hard labels alone; no teacher but for what needs one",
    )
    add("--ce_weight", type=real(0), default=0.0, help="weight of the hard-label cross-entropy")
    add(
        "--layer_weight",
        type=real(0),
        default=0.0,
        help="weight of the distance to the teacher after each layer but the last; 0: off",
    )

    add = parser.add_argument_group("alignment stages (MOHAWK)").add_argument
    add("--matrix_tokens", type=whole(0), default=0, help="tokens of the matrix stage; 0: off")
    add("--matrix_seq_length", type=whole(2), default=512, help="tokens a sequence in the matrix stage")
    add("--matrix_lr", type=real(0, above=True), default=5e-4, help="highest learning rate of the matrix stage")
    add("--hidden_tokens", type=whole(0), default=0, help="tokens of the hidden stage; 0: off")
    add("--hidden_lr", type=real(0, above=True), default=2e-3, help="highest learning rate of the hidden stage")

    add = parser.add_argument_group("hardware and speed").add_argument
    add(
        "--device",
        type=device,
        default="cuda:0",
        help="student's device: cpu, cuda, cuda:N (torchrun: the rank's own)",
    )
    add("--teacher_device", type=device, default=None, help="teacher's device; the student's if not given")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="bfloat16",
        help="dtype of weights and products",
    )
    add(
        "--parallel",
        choices=["auto", "ddp", "fsdp"],
        default="auto",
        help="under torchrun: replicate (ddp) or shard (fsdp) the models; auto: replicate where a step fits",
    )
    add("--no_compile", action="store_true", help="run eagerly on CUDA too")
    add("--no_cuda_graphs", action="store_true", help="launch every kernel of a small pair's step from the host")
    add(
        "--gradient_checkpointing",
        choices=["none", "selective", "full", "auto"],
        default="auto",
        help="activations to recompute; auto: as few as the memory allows",
    )
    add("--update_in_backward", action="store_true", help="update each weight as soon as its gradient is there")
    add("--teacher_fp8", action="store_true", help="teacher's matrix products in fp8, where the card has it")
    add("--deterministic", action="store_true", help="deterministic GPU kernels, slower")

    add = parser.add_argument_group("logging").add_argument
    add("--log_interval", type=whole(1), default=1, help="optimizer steps a log line")
    add("--log_file", type=os.path.expanduser, default=None, help="file for the log, beside the terminal")
    add("--wandb", action="store_true", help="report to Weights & Biases")
    add("--wandb_project", default="llamba-distill", help="W&B project")
    add("--wandb_run_name", default=None, help="W&B run name")
    add("--wandb_entity", default=None, help="W&B entity")
    add("--wandb_mode", choices=["online", "offline", "disabled"], default="online", help="W&B mode")

    add = parser.add_argument_group("evaluation while training").add_argument
    add("--eval_interval", type=whole(0), default=0, help="optimizer steps between evaluations; 0: off")
    add("--eval_dataset", default="", help="held-out text: hub id, folder or file")
    add("--eval_dataset_subset", default="", help="configuration on the hub, subfolder of a folder; '' for none")
    add("--eval_dataset_split", default="train", help="split")
    add("--eval_dataset_text_field", default="text", help="column that holds the text")
    add("--eval_tokens", type=whole(1), default=100_000, help="tokens an evaluation")
    add("--diagnostics_interval", type=whole(0), default=500, help="optimizer steps between figures by layer; 0: off")
    add("--sample_interval", type=whole(0), default=0, help="optimizer steps between sample texts; 0: off")
    add("--sample_prompts", default="", help="file with a prompt a line; none: a few that come with it")

    add = parser.add_argument_group("checkpoints").add_argument
    add(
        "--output_dir",
        type=os.path.expanduser,
        default="distilled_llamba",
        help="folder of checkpoints, metrics and plots",
    )
    add("--save_interval", type=whole(1), default=1_000_000, help="micro steps between checkpoints")
    add("--save_minutes", type=real(0), default=30.0, help="minutes between checkpoints; 0: off")
    add(
        "--keep_checkpoints",
        type=whole(1),
        default=2,
        help="checkpoints to keep; final and stable-* are never pruned",
    )
    add(
        "--no_stable_checkpoint",
        action="store_true",
        help="do not keep stable-*, the state before each stage's cooldown, from which a longer run goes on",
    )
    add(
        "--resume",
        default="auto",
        help="auto: newest checkpoint in --output_dir; none: start anew; or a checkpoint folder",
    )
    add("--resume_force", action="store_true", help="resume although flags that change the result differ")
    add("--resume_step", type=whole(0), default=0, help="align log and schedule to this optimizer step, nothing else")
    return parser


# Flags that do not change what is computed: a resumed run may change them freely. Of these device, no_compile,
# gradient_checkpointing and deterministic may change how it is rounded: whoever ran out of memory must be able to go
# on with more recomputation, so this is allowed, but only the same choice resumes bit for bit.
FREE_FLAGS = frozenset(
    "device teacher_device parallel no_compile no_cuda_graphs gradient_checkpointing log_interval log_file "
    "wandb wandb_project wandb_run_name wandb_entity wandb_mode eval_interval eval_dataset eval_tokens "
    "eval_dataset_subset eval_dataset_split eval_dataset_text_field "
    "diagnostics_interval sample_interval sample_prompts "
    "output_dir save_interval save_minutes keep_checkpoints no_stable_checkpoint resume resume_force resume_step "
    "local_files_only network_patience max_bad_steps deterministic".split()
)
RESULT_FLAGS = frozenset(action.dest for action in build_parser()._actions if action.dest != "help") - FREE_FLAGS


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse command-line flags; a wrong one is one line on stderr and exit status 2."""
    parser = build_parser()
    parser.set_defaults(dataset_subset=None)
    args = parser.parse_args(argv)
    if args.dataset_subset is None:
        args.dataset_subset = default_subset(args.dataset_name)
    return args


def default_subset(name: str) -> str:
    """FineWeb-Edu's default subset, but none of a local file, or of a local folder that does not have it."""
    path, subset = Path(name).expanduser(), str(build_parser().get_default("dataset_subset"))
    there = not path.exists() or (path / subset).is_dir() or (path / "data" / subset).is_dir()
    return subset if there else ""


def validate(args: argparse.Namespace) -> None:
    """Checks across flags that need no model; raises `UserError` naming the flag to change."""
    if args.warmup_ratio + args.decay_ratio > 1:
        raise UserError(
            f"--warmup_ratio {args.warmup_ratio:g} + --decay_ratio {args.decay_ratio:g} is above 1; lower one of them"
        )
    if args.kl_weight == 0 and args.ce_weight == 0:
        raise UserError("--kl_weight 0 and --ce_weight 0 leave no loss; set one of them above 0")
    if args.layer_weight and args.kl_weight == 0:
        raise UserError("--layer_weight needs the teacher's forward pass: set --kl_weight above 0")
    for flag, used in (("max_lr", True), ("matrix_lr", args.matrix_tokens), ("hidden_lr", args.hidden_tokens)):
        if used and args.min_lr > getattr(args, flag):
            raise UserError(f"--min_lr {args.min_lr:g} is above --{flag} {getattr(args, flag):g}; lower it")
    if args.expand > 1 and args.student_model != FROM_TEACHER:
        raise UserError(f"--expand {args.expand} needs --student_model from_teacher: others have sizes of their own")
    if auto_layers(args.layers) is not None and len(args.layers) > 1:
        raise UserError(f"--layers {' '.join(map(str, args.layers))}: auto:K stands alone; leave the others out")
    if args.choice_dataset and auto_layers(args.layers) is None:
        raise UserError("--choice_dataset needs --layers auto:K, the layers to choose on it")
    if args.eval_interval and not args.eval_dataset:
        raise UserError("--eval_interval needs --eval_dataset, the held-out text to evaluate on")
    if args.sample_prompts and not args.sample_interval:
        raise UserError("--sample_prompts needs --sample_interval, the steps between sample texts")
    if args.update_in_backward and args.grad_accumulation_steps > 1:
        raise UserError("--update_in_backward needs --grad_accumulation_steps 1: each gradient is used once")
    if args.update_in_backward and args.dtype == "float16":
        raise UserError(
            "--update_in_backward --dtype float16: an overflow is found after other weights have moved; use bfloat16"
        )
    if args.update_in_backward and args.optimizer == "flashadamw":
        raise UserError("--update_in_backward --optimizer flashadamw cannot clip one tensor at a time; use adamw8bit")
    if args.document_reset and args.attn_implementation == "flash_attention_2" and args.batch_size > 1:
        raise UserError(
            f"--batch_size {args.batch_size}: flash_attention_2 keeps documents apart (--document_reset) only in a "
            "batch of 1; use --batch_size 1 or --attn_implementation sdpa"
        )
    _check_packages(args)
    if args.sample_prompts:
        read_prompts(args.sample_prompts)
    check_folder_writable("--output_dir", Path(args.output_dir))
    if args.log_file:
        check_folder_writable("--log_file", Path(args.log_file).parent)
        if Path(args.log_file).is_dir():
            raise UserError(f"--log_file {args.log_file} is a folder; name a file")
        if Path(args.log_file).exists() and not os.access(args.log_file, os.W_OK):
            raise UserError(f"--log_file {args.log_file} cannot be written; name another file")


def _check_packages(args: argparse.Namespace) -> None:
    if args.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError("--attn_implementation flash_attention_2: the package flash-attn is not installed; use sdpa")
    if not args.wandb:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb: the package wandb is not installed (pip install wandb)")
    mode = os.environ.get("WANDB_MODE", args.wandb_mode)
    if mode == "online" and not wandb_login():
        raise UserError("--wandb_mode online: not logged in; run 'wandb login' or use --wandb_mode offline")


def read_prompts(file: str) -> list[str]:
    """`--sample_prompts`: the lines of a file that are not empty; raises `UserError` where there are none."""
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sample_prompts {file}: cannot be read ({error}); name a text file") from error
    if not lines:
        raise UserError(f"--sample_prompts {file} holds no prompt; write one a line")
    return lines


def wandb_login() -> bool:
    """True if W&B can log in: by WANDB_API_KEY, by an identity token, or by its host's entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = re.sub(r"^https?://", "", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


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


def markdown_page() -> str:
    """docs/flags.md: the flags as markdown tables, one a group."""
    lines = [
        "# Flags",
        "",
        "All flags of `train.py`, made by `python arguments.py --markdown`. Other scripts list theirs with `--help`.",
        "",
    ]
    for group in build_parser()._action_groups:
        actions = [action for action in group._group_actions if action.option_strings and action.dest != "help"]
        if not actions:
            continue
        title = str(group.title)
        lines += [f"## {title[0].upper()}{title[1:]}", "", "| flag | default | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{a.option_strings[0]}` | {_shown(a)} | {_meaning(a)} |" for a in actions]
        lines.append("")
    return "\n".join(lines[:-1])


def _shown(action: argparse.Action) -> str:
    value: Any = action.default
    if action.nargs == 0:
        return "off"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"`{value}`" if value not in (None, "") else ""


def _meaning(action: argparse.Action) -> str:
    choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
    return f"{action.help}{choices}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--markdown"]:
        print(markdown_page())
    else:
        parse_arguments(sys.argv[1:])
