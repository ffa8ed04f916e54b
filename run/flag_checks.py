"""Checks across flags that need no model, right after parsing: each names the flag to change."""

import importlib.util
import netrc
import os
import re
from pathlib import Path

from arguments import Arguments
from run.mixing import shares_of
from run.plan import stage_names
from run.wandb_run import wandb_settings
from utils import UserError, auto_layers, check_folder_writable


def validate(args: Arguments) -> None:
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
    if args.document_reset and args.attn_implementation == "flash_attention_2" and args.batch_size > 1:
        raise UserError(
            f"--batch_size {args.batch_size}: flash_attention_2 keeps documents apart (--document_reset) only in a "
            "batch of 1; use --batch_size 1 or --attn_implementation sdpa"
        )
    for stage in stage_names(args):
        shares_of(args, stage)
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


def _check_packages(args: Arguments) -> None:
    if args.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError("--attn_implementation flash_attention_2: the package flash-attn is not installed; use sdpa")
    if not args.wandb:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb: the package wandb is not installed (pip install wandb)")
    if wandb_settings(args)["mode"] == "online" and not wandb_login():
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
