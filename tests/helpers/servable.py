"""Checkpoints of small students that engines can serve, and what to compare of them."""

import shutil
from pathlib import Path

import torch

from conftest import tiny_llama_config
from distill.initialization import calibrate_mixers, student_from_teacher
from helpers.teachers import make_teacher
from model_utils import apply_replacements, transfer_teacher_weights

NEAR_TIE = 1e-3  # nats between the two likeliest tokens, below which either may come first


def servable_student(layers, config=None, **mixers):
    """A student with attention at `layers` and mixers that nothing is neutral of: all weights moved."""
    teacher = make_teacher(config or tiny_llama_config())
    options = {"mixer": "mamba2", "z_bias": False, **mixers}
    student = student_from_teacher(teacher, dtype=torch.float32, device="cpu", **options)
    transfer_teacher_weights(student, teacher, layers)
    calibrate_mixers(student, teacher, torch.randint(0, teacher.config.vocab_size, (2, 64)))
    student = apply_replacements(student, teacher, layers).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".mixer." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return student


def checkpoint_of(student, folder: Path, tokenizer_dir: Path, dtype=torch.float32) -> Path:
    student.to(dtype).save_pretrained(folder)
    for file in (*tokenizer_dir.glob("tokenizer*.json"), *tokenizer_dir.glob("*.jinja")):
        shutil.copy(file, folder / file.name)
    return folder


@torch.no_grad()
def greedy(student, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """The student's greedy tokens after a prompt, and by how much each is likelier than the next one, in nats."""
    tokens, leads = list(prompt), []
    for _ in range(new):
        scores = student(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
        first, second = scores.topk(2).values
        leads.append((first - second).item())
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :], leads


def differs_before_a_near_tie(own: tuple[list[int], list[float]], other: list[int]) -> bool:
    """Whether other greedy tokens part from the student's where its choice is clear."""
    tokens, leads = own
    return next((lead > NEAR_TIE for a, b, lead in zip(tokens, other, leads) if a != b), False)
