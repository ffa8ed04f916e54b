"""Flags that say how a student is made: what one is that is there already, it is, whatever their defaults say.

A command that does not give them means the student's own, which its checkpoints and cards then record; one that
gives them otherwise is refused.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from arguments import Arguments, is_given
from model_utils import is_distilled
from models import LlambaConfig
from utils import UserError

MIXER_FLAGS = ("expand", "mixer", "no_z_bias")
STUDENT_FLAGS = ("layers", *MIXER_FLAGS)


def keep_flags(args: Arguments, saved: Mapping[str, Any]) -> None:
    """For a run that resumes: what the command does not give is the checkpoint's."""
    for name in STUDENT_FLAGS:
        if not is_given(getattr(args, name)):
            setattr(args, name, saved[name])


def settle_flags(args: Arguments, student: LlambaConfig, teacher: PreTrainedConfig, source: str) -> None:
    """For a new run from a student that is there: what the command does not give is the student's.

    Raises `UserError` for what the student is not. Its layers are settled once it is distilled.
    """
    for name, own in mixers_own(student, teacher).items():
        given = getattr(args, name)
        if is_given(given) and given != own:
            shown = "--no_z_bias" if name == "no_z_bias" else f"--{name} {given}"
            truth = "a gate with a bias" if name == "no_z_bias" else f"--{name} {own}"
            raise UserError(f"{shown}: {source} has mixers of its own, with {truth}; leave it out")
        setattr(args, name, own)
    if is_distilled(student):
        args.layers = settle_layers(args.layers, student, source)


def mixers_own(student: LlambaConfig, teacher: PreTrainedConfig) -> dict[str, Any]:
    """The values of MIXER_FLAGS that would make mixers of a student's kind from this teacher."""
    heads = teacher.num_attention_heads
    width = heads * (getattr(teacher, "head_dim", None) or teacher.hidden_size // heads)
    ratio = student.d_inner / width
    return {
        "expand": int(ratio) if ratio.is_integer() else ratio,
        "mixer": student.ssm_cfg["mixer"],
        "no_z_bias": not student.ssm_cfg["z_bias"],
    }


def settle_layers(layers: list[int | str], student: LlambaConfig, source: str) -> list[int | str]:
    """`--layers` of a distilled student; where they are not given, the student's own.

    Raises `UserError` for layers that it does not have.
    """
    own = sorted(student.attention_layers)
    if not is_given(layers):
        return list(own)
    if named_layers(layers) != set(own):
        raise UserError(
            f"--layers {' '.join(map(str, layers))}: {source} is a distilled student, whose attention layers are "
            f"{' '.join(map(str, own)) or 'none'}; leave --layers out"
        )
    return layers


def named_layers(layers: Iterable[int | str]) -> set[int | str]:
    """What `--layers` names: indices, or auto:K; negative numbers name none."""
    return {layer for layer in layers if isinstance(layer, str) or layer >= 0}
