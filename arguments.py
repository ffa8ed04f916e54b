"""Every flag of `train.py`, typed, with units and defaults.

No torch and no transformers here, so that `--help` is quick. `python arguments.py --markdown` prints docs/flags.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from flags.config_file import with_config
from flags.page import markdown_page
from flags.reading import Parser, device_name, flag, layer, mix_source, real, switch, whole
from utils import UserError


class NotGiven(list):
    """The layers of a run whose command names none: a default, unless the student has layers of its own."""


class NotGivenName(str):
    """A name that no flag gave."""


class NotGivenNumber(int):
    """A number that no flag gave."""


def is_given(value: object) -> bool:
    """False for a default that tells itself from the same value given, and for a switch that is off."""
    return not isinstance(value, NotGiven | NotGivenName | NotGivenNumber) and value is not False


DEFAULT_LAYERS = NotGiven([10, 14, 17, 30])  # Llama 3.1 8B has 32
DEFAULT_SUBSET = NotGivenName("CC-MAIN-2014-49")


@dataclass
class ModelsFlags:
    """models"""

    teacher_model: str = flag("meta-llama/Llama-3.1-8B-Instruct", "hub id or folder of the teacher")
    student_model: str = flag(
        "goombalab/Llamba-8B-untied-unaligned",
        "hub id or folder of the student, a checkpoint of this toolkit, or from_teacher",
    )
    layers: list[int | str] = flag(
        DEFAULT_LAYERS,
        "layers to replace by the teacher's (a distilled student keeps its own); negative ones are ignored "
        "(none given, or -1: none); auto:K: K found by measuring",
        parse=layer,
        nargs="*",
    )
    expand: int = flag(
        NotGivenNumber(1), "from_teacher: mixer heads for each attention head, at most 4", parse=whole(1, 4)
    )
    mixer: str = flag(
        NotGivenName("llamba"),
        "from_teacher: llamba, as published; or mamba2, which scales by a step size, as engines serve it",
        choices=["llamba", "mamba2"],
    )
    no_z_bias: bool = flag(False, "from_teacher: a gate without a bias")
    choice_tokens: int = flag(8192, "tokens of stage 1 or --choice_dataset for auto:K", parse=whole(1))
    choice_recall_share: float = flag(
        0.5, "share of choice_tokens that are generated and ask for memory; 0: none", parse=real(0, maximum=1)
    )
    choice_dataset: str = flag("", "text for auto:K other than stage 1's: hub id, folder or file")
    freeze_mlp: bool = flag(False, "do not train the MLPs")
    freeze_replaced_layers: bool = flag(False, "do not train the replaced layers")
    freeze_embeddings: bool = flag(False, "do not train embedding and head")
    attn_implementation: str = flag(
        "sdpa", "attention of the teacher and of replaced layers", choices=["sdpa", "eager", "flash_attention_2"]
    )


@dataclass
class Stage1DataFlags:
    """stage 1 data"""

    dataset_name: str = flag("HuggingFaceFW/fineweb-edu", "hub id, or folder or file (parquet, jsonl, jsonl.gz)")
    dataset_subset: str = flag(
        DEFAULT_SUBSET,
        "configuration on the hub, subfolder of a folder; '' for none, as by default where a local one lacks it",
    )
    dataset_split: str = flag("train", "split")
    dataset_revision: str | None = flag(None, "commit, tag or branch on the hub")
    dataset_text_field: str = flag("text", "column that holds the text")
    mix: list[str] = flag(
        [],
        "NAME[:SUBSET[:SPLIT[:FIELD]]]=SHARE of the sequences from other data sets; recall=SHARE: generated text",
        parse=mix_source,
        nargs="+",
        metavar="SOURCE",
    )
    recall_share: float = flag(
        0.0,
        "share of the sequences of every stage that are generated and ask for memory; recall in a mix goes before it",
        parse=real(0, maximum=0.99),
    )
    no_dataset_streaming: bool = flag(False, "load stage 1 at once instead of streaming it")
    shuffle_buffer: int = flag(10000, "documents shuffled together; 0: no shuffling", parse=whole(0))
    seq_length: int = flag(4096, "tokens a sequence", parse=whole(1))
    document_reset: bool = flag(False, "keep documents that are packed together apart")
    on_bad_data: str = flag("error", "what to do with unreadable rows or files", choices=["error", "skip"])
    network_patience: float = flag(600.0, "seconds to ride out a network fault", parse=real(0))
    local_files_only: bool = flag(False, "read models, tokenizer and data from the caches alone")


@dataclass
class Stage2DataFlags:
    """stage 2 data"""

    second_dataset_name: str = flag("teknium/OpenHermes-2.5", "hub id, folder or file; '' skips stage 2")
    skip_stage2: bool = flag(False, "end after stage 1")
    second_dataset_epochs: int = flag(4, "epochs of stage 2", parse=whole(1))
    second_dataset_tokens: int = flag(200_000_000, "tokens an epoch of stage 2", parse=whole(1))
    second_dataset_text_field: str = flag("text", "column with plain text, if there is one")
    second_mix: list[str] = flag([], "as --mix, for stage 2", parse=mix_source, nargs="+", metavar="SOURCE")
    second_dataset_split: str = flag("train", "split")
    second_dataset_subset: str = flag("", "configuration on the hub, subfolder of a folder; '' for none")
    second_dataset_revision: str | None = flag(None, "commit, tag or branch on the hub")


@dataclass
class OptimisationFlags:
    """optimisation"""

    max_steps: int = flag(100_000, "optimizer steps of stage 1", parse=whole(1))
    epochs: int = flag(0, "above 0: whole passes over stage 1; --max_steps is ignored", parse=whole(0))
    epoch_step_hint: int = flag(0, "optimizer steps an epoch; 0: estimated by sampling", parse=whole(0))
    batch_size: int = flag(1, "sequences a micro step, per rank", parse=whole(1))
    grad_accumulation_steps: int = flag(1, "micro steps an optimizer step", parse=whole(1))
    optimizer: str = flag("adamw8bit", "optimizer", choices=["adamw", "adamw8bit", "muon"])
    max_lr: float = flag(1e-5, "highest learning rate", parse=real(0, above=True))
    min_lr: float = flag(1e-8, "last learning rate", parse=real(0))
    warmup_ratio: float = flag(0.1, "share of a stage's steps that warm up", parse=real(0, maximum=1))
    decay_ratio: float = flag(0.1, "share of a stage's steps that cool down", parse=real(0, maximum=1))
    weight_decay: float = flag(0.1, "AdamW weight decay; not on norms, biases, D, z_bias", parse=real(0))
    grad_clip: float = flag(1.0, "largest gradient norm", parse=real(0, above=True))
    max_bad_steps: int = flag(10, "non-finite updates in a row that end the run", parse=whole(1))
    seed: int = flag(42, "seed of data order and initialisation", parse=whole(0))


@dataclass
class LossFlags:
    """loss"""

    temperature: float = flag(1.0, "softmax temperature of the distillation term", parse=real(0, above=True))
    kl_weight: float = flag(
        1.0, "weight of the distillation term; 0: hard labels alone; no teacher but for what needs one", parse=real(0)
    )
    ce_weight: float = flag(0.0, "weight of the hard-label cross-entropy", parse=real(0))
    layer_weight: float = flag(
        0.0, "weight of the distance to the teacher after each layer but the last; 0: off", parse=real(0)
    )


@dataclass
class AlignmentStagesFlags:
    """alignment stages (MOHAWK)"""

    matrix_tokens: int = flag(0, "tokens of the matrix stage; 0: off", parse=whole(0))
    matrix_seq_length: int = flag(512, "tokens a sequence in the matrix stage", parse=whole(2))
    matrix_lr: float = flag(5e-4, "highest learning rate of the matrix stage", parse=real(0, above=True))
    hidden_tokens: int = flag(0, "tokens of the hidden stage; 0: off", parse=whole(0))
    hidden_lr: float = flag(2e-3, "highest learning rate of the hidden stage", parse=real(0, above=True))


@dataclass
class HardwareAndSpeedFlags:
    """hardware and speed"""

    device: str = flag("cuda:0", "student's device: cpu, cuda, cuda:N (torchrun: the rank's own)", parse=device_name)
    teacher_device: str | None = flag(None, "teacher's device; the student's if not given", parse=device_name)
    dtype: str = flag("bfloat16", "dtype of weights and products", choices=["float32", "bfloat16", "float16"])
    parallel: str = flag(
        "auto",
        "under torchrun: replicate (ddp) or shard (fsdp) the models; auto: replicate where a step fits",
        choices=["auto", "ddp", "fsdp"],
    )
    no_compile: bool = flag(False, "run eagerly on CUDA too")
    no_cuda_graphs: bool = flag(False, "launch every kernel of a small pair's step from the host")
    gradient_checkpointing: str = flag(
        "auto",
        "activations to recompute; auto: as few as the memory allows",
        choices=["none", "selective", "full", "auto"],
    )
    update_in_backward: bool = flag(False, "update each weight as soon as its gradient is there")
    teacher_fp8: bool = flag(False, "teacher's matrix products in fp8, where the card has it")
    deterministic: bool = flag(False, "deterministic GPU kernels, slower")


@dataclass
class LoggingFlags:
    """logging"""

    log_interval: int = flag(1, "optimizer steps a log line", parse=whole(1))
    log_file: str | None = flag(None, "file for the log, beside the terminal", parse=os.path.expanduser)
    wandb: bool = flag(False, "report to Weights & Biases")
    wandb_project: str = flag(NotGivenName("llamba-distill"), "W&B project")
    wandb_run_name: str | None = flag(None, "W&B run name")
    wandb_entity: str | None = flag(None, "W&B entity")
    wandb_mode: str = flag(NotGivenName("online"), "W&B mode", choices=["online", "offline", "disabled"])


@dataclass
class EvaluationWhileTrainingFlags:
    """evaluation while training"""

    eval_interval: int = flag(0, "optimizer steps between evaluations; 0: off", parse=whole(0))
    eval_dataset: str = flag("", "held-out text: hub id, folder or file")
    eval_dataset_subset: str = flag("", "configuration on the hub, subfolder of a folder; '' for none")
    eval_dataset_split: str = flag("train", "split")
    eval_dataset_text_field: str = flag("text", "column that holds the text")
    eval_tokens: int = flag(100_000, "tokens an evaluation", parse=whole(1))
    diagnostics_interval: int = flag(500, "optimizer steps between figures by layer; 0: off", parse=whole(0))
    sample_interval: int = flag(0, "optimizer steps between sample texts; 0: off", parse=whole(0))
    sample_prompts: str = flag("", "file with a prompt a line; none: a few that come with it")


@dataclass
class CheckpointsFlags:
    """checkpoints"""

    output_dir: str = flag("distilled_llamba", "folder of checkpoints, metrics and plots", parse=os.path.expanduser)
    save_interval: int = flag(1_000_000, "micro steps between checkpoints", parse=whole(1))
    save_minutes: float = flag(30.0, "minutes between checkpoints; 0: off", parse=real(0))
    keep_checkpoints: int = flag(2, "checkpoints to keep; final and stable-* are never pruned", parse=whole(1))
    no_stable_checkpoint: bool = flag(
        False, "do not keep stable-*, the state before each stage's cooldown, from which a longer run goes on"
    )
    resume: str = flag("auto", "auto: newest checkpoint in --output_dir; none: start anew; or a checkpoint folder")
    resume_force: bool = flag(False, "resume although flags that change the result differ")
    resume_step: int = flag(0, "align log and schedule to this optimizer step, nothing else", parse=whole(0))


@dataclass
class WholeRunFlags:
    """the run as a whole"""

    config: str | None = flag(
        None, "file with flags (YAML, as run.yaml in a run's folder); flags beside it override it"
    )
    dry_run: bool = flag(False, "print what the run would do and take, a few steps measured; nothing is written")


@dataclass
class Arguments(
    WholeRunFlags,
    ModelsFlags,
    Stage1DataFlags,
    Stage2DataFlags,
    OptimisationFlags,
    LossFlags,
    AlignmentStagesFlags,
    HardwareAndSpeedFlags,
    LoggingFlags,
    EvaluationWhileTrainingFlags,
    CheckpointsFlags,
):
    """Every flag of `train.py`, parsed."""


def build_parser() -> Parser:
    """The parser with every flag, in groups."""
    parser = Parser(
        prog="train.py",
        description="Distil a Llama teacher into a hybrid Mamba-2 student.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = Arguments()
    for group in Arguments.__bases__:
        add = parser.add_argument_group(group.__doc__).add_argument
        for entry in fields(group):
            default = getattr(defaults, entry.name)
            if default is False:
                add(
                    f"--{entry.name}",
                    nargs="?",
                    const=True,
                    default=False,
                    type=switch,
                    metavar="true|false",
                    **entry.metadata,
                )
            else:
                add(f"--{entry.name}", default=default, **entry.metadata)
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
    "local_files_only network_patience max_bad_steps deterministic config dry_run".split()
)
RESULT_FLAGS = frozenset(entry.name for entry in fields(Arguments)) - FREE_FLAGS


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse command-line flags; a wrong one is one line on stderr and exit status 2."""
    parser, given = build_parser(), list(sys.argv[1:] if argv is None else argv)
    try:
        given = with_config(given, [entry.name for entry in fields(Arguments)])
    except UserError as error:
        parser.error(str(error))
    args = parser.parse_args(given, namespace=Arguments())
    args.layers = (
        args.layers if isinstance(args.layers, NotGiven) else [entry for entry in args.layers if entry != ""]
    )
    if isinstance(args.dataset_subset, NotGivenName):
        args.dataset_subset = default_subset(args.dataset_name)
    return args


def default_subset(name: str) -> str:
    """FineWeb-Edu's default subset, but none of a local file, or of a local folder that does not have it."""
    path = Path(name).expanduser()
    there = not path.exists() or (path / DEFAULT_SUBSET).is_dir() or (path / "data" / DEFAULT_SUBSET).is_dir()
    return str(DEFAULT_SUBSET) if there else ""


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--markdown"]):
        print(markdown_page(build_parser()))
    else:
        parse_arguments(sys.argv[1:])
