"""Pairs of a teacher's and a student's sizes."""

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from distill.initialization import student_config
from models import LlambaConfig

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Preset:
    """A pair, and the layers to replace unless a flag says otherwise."""

    teacher: LlamaConfig
    student: LlambaConfig
    layers: tuple[int, ...]


def llama(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **rest: Any) -> LlamaConfig:
    sizes = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads)
    return LlamaConfig(vocab_size=vocabulary, num_key_value_heads=kv_heads, rms_norm_eps=1e-5, **sizes, **rest)


def preset(name: str) -> Preset:
    """8b: Llama-3.1-8B and Llamba-8B; 1b: Llama-3.2-1B and Llamba-1B; smollm2: SmolLM2-135M; tiny: for a CPU."""
    if name == "8b":
        teacher = llama(
            4096, 14336, 32, 32, 8, 128256, head_dim=128, max_position_embeddings=131072,
            rope_parameters={**LLAMA3_ROPE, "factor": 8.0}, tie_word_embeddings=False,
        )  # fmt: skip
        return Preset(teacher, LlambaConfig(), (10, 14, 17, 30))
    if name == "1b":
        teacher = llama(
            2048, 8192, 16, 32, 8, 128256, head_dim=64, max_position_embeddings=131072,
            rope_parameters={**LLAMA3_ROPE, "factor": 32.0}, tie_word_embeddings=True,
        )  # fmt: skip
        mlp = {"intermediate_size": 8192, "bias": False, "act_fn": "silu"}
        student = LlambaConfig(d_model=2048, n_layer=16, tie_embeddings=True, mlp_cfg=mlp)
        return Preset(teacher, student, (5, 7, 8, 15))
    if name == "smollm2":
        rope = {"rope_type": "default", "rope_theta": 100000.0}
        teacher = llama(
            576, 1536, 30, 9, 3, 49152, head_dim=64, max_position_embeddings=8192, rope_parameters=rope,
            tie_word_embeddings=True,
        )  # fmt: skip
        return Preset(teacher, student_config(teacher), (10, 14, 17, 28))
    if name == "tiny":
        teacher = llama(64, 128, 4, 4, 2, 512, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=False)
        return Preset(teacher, student_config(teacher), (1,))
    raise ValueError(f"no preset {name!r}")
