"""Small teachers with random weights of every supported architecture, and students made from them."""

import torch
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from conftest import tiny_llama_config
from distill.initialization import student_config, student_from_teacher
from model_utils import apply_replacements, as_teacher, transfer_teacher_weights

SIZES = {
    k: getattr(tiny_llama_config(), k)
    for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
} | {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "tie_word_embeddings": False}
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
TEACHERS = {
    "grouped queries": tiny_llama_config(),
    "wide heads, biases, tied": tiny_llama_config(
        head_dim=32, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama3 rope": tiny_llama_config(rope_parameters=LLAMA3_ROPE),
    "mistral, sliding": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, sliding in half": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3, biases": Qwen3Config(**SIZES, attention_bias=True),
}


def make_teacher(config, attention: str = "sdpa"):
    torch.manual_seed(torch.seed() % 2**31)
    teacher = as_teacher(AutoModelForCausalLM.from_config(config, attn_implementation=attention))
    with torch.no_grad():
        for p in teacher.parameters():
            p.normal_(std=0.1) if p.ndim == 2 else p.add_(0.1 * torch.randn_like(p))
    return teacher


def make_student(teacher, layers, expand=1):
    student = student_from_teacher(teacher, dtype=torch.float32, device="cpu", expand=expand)
    transfer_teacher_weights(student, teacher, layers)
    return apply_replacements(student, teacher, layers).eval()


def big_pair():
    """Configurations of a teacher and a student that are large enough for an estimate to tell its parts apart."""
    config = tiny_llama_config(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
        vocab_size=32000, num_hidden_layers=8, max_position_embeddings=65536,
    )  # fmt: skip
    return config, student_config(config)
