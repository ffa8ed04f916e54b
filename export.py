"""Writes a student for engines that serve models: transformers without remote code, vLLM, SGLang, llama.cpp.

    python export.py --model RUN/final --format granite --output FOLDER

checks that an exact form exists, writes it, loads it with the engine's own code, compares it with the student on a
real text, and only then gives the folder its name (docs/serving.md).
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flags.reading import HelpFormatter, Parser, real
from hub.hub_files import reading_status
from serving.llama_cpp import EngineDiffers
from utils import UserError, check_folder_writable, complain, wait_passively

if TYPE_CHECKING:
    from models import LlambaConfig, LlambaForCausalLM

DTYPES = {"granite": ("float32", "bfloat16"), "gguf": ("float32", "bfloat16", "q8_0")}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model", "--student_model", required=True, help="checkpoint folder or hub id of the student")
    add("--format", choices=list(DTYPES), required=True, help="granite: a folder for transformers, vLLM and SGLang; "
        "gguf: a file for llama.cpp")  # fmt: skip
    add("--output", required=True, help="folder to write, which must not exist yet")
    add("--dtype", default="auto", help="float32, bfloat16 or, of gguf, q8_0; auto: the checkpoint's own")
    add("--local_files_only", action="store_true", help="read from the caches alone")
    add("--network_patience", type=real(0), default=600.0, help="seconds to ride out a network fault")
    return parser.parse_args(argv)


def validate(args: argparse.Namespace) -> None:
    """Checks that need no model. Raises `UserError` naming the flag to change."""
    known = DTYPES[args.format]
    if args.dtype == "float16":
        raise UserError(
            "--dtype float16: its range does not hold the exported mixers' small numbers (2**-93); use "
            + " or ".join(known)
        )
    if args.dtype not in ("auto", *known):
        raise UserError(f"--dtype {args.dtype}: --format {args.format} knows auto, {', '.join(known)}")
    if args.format == "gguf":
        from serving.gguf_model import gguf_package

        gguf_package()
    output = Path(args.output)
    check_folder_writable("--output", output)
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {args.output} holds files already: name a new folder")


def check_servable(config: "LlambaConfig", args: argparse.Namespace) -> None:
    """Raise a `UserError` in one line with everything that the format has no exact form of."""
    from serving.gguf_model import gguf_refusals
    from serving.standard import refusals

    found = refusals(config) + (gguf_refusals(config) if args.format == "gguf" else [])
    if found:
        raise UserError(f"--model {args.model} has no exact form as {args.format}: it has {'; '.join(found)}")


def export(args: argparse.Namespace) -> None:
    """Check, write, prove, and only then give the folder its name."""
    validate(args)
    import torch

    from hub.model_files import fetch_model
    from model_utils import get_student_model, load_config
    from models import LlambaConfig
    from serving.folder import draft_of

    network = dict(local_files_only=args.local_files_only, network_patience=args.network_patience)
    fetch_model("--model", args.model, weights=True, **network)
    config = load_config(args.model, config_class=LlambaConfig, local_files_only=True)
    check_servable(config, args)
    tokenizer = own_tokenizer(args.model)
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if config.dtype in ("bfloat16", torch.bfloat16) else "float32"
    write = write_gguf_folder if args.format == "gguf" else write_granite_folder
    with draft_of(Path(args.output)) as draft:
        student = get_student_model(args.model, None, dtype=torch.float32, local_files_only=True).eval()
        print(write(draft, student, tokenizer, dtype))
    print(f"written: {args.output}")


def own_tokenizer(name: str) -> Any:
    """The fast tokenizer beside a student's weights, which needs no code of the checkpoint's own."""
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {name}: its tokenizer cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error


def write_granite_folder(folder: Path, student: "LlambaForCausalLM", tokenizer: Any, dtype: str) -> str:
    """Model, tokenizer and card for transformers, vLLM and SGLang; returns the proof in a sentence."""
    import torch

    from serving.card import GRANITE, told, write_card
    from serving.granite import write_granite
    from serving.proof import prove_granite

    rounded = write_granite(folder, student, tokenizer, getattr(torch, dtype))
    proof = prove_granite(student, folder, tokenizer, rounded)
    write_card(folder, student.config, "granitemoehybrid", dtype, told(proof), GRANITE)
    return told(proof)


def write_gguf_folder(folder: Path, student: "LlambaForCausalLM", tokenizer: Any, dtype: str) -> str:
    """A GGUF file and its card for llama.cpp; returns the proof in a sentence, or why there is none."""
    from serving import llama_cpp
    from serving.card import GGUF, UNPROVEN, told, write_card
    from serving.gguf_model import write_gguf
    from serving.proof import prove_gguf

    file = folder / f"model-{dtype}.gguf"
    write_gguf(file, student, tokenizer, dtype)
    here = llama_cpp.is_installed()
    sentence = told(prove_gguf(student, file, tokenizer, rounded=dtype != "float32")) if here else UNPROVEN
    write_card(folder, student.config, "granitehybrid", dtype, sentence, GGUF.replace("FILE", file.name))
    return sentence


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    wait_passively()
    try:
        return reading_status(lambda: export(args))
    except EngineDiffers as error:
        complain(f"{error}; nothing is kept")
        return 1


if __name__ == "__main__":
    sys.exit(main())
