"""How far a teacher with fp8 matrices is from itself in bf16, on real text.

    python -m benchmarks.fp8 --teacher FOLDER --text valid.parquet

KL(bf16 || fp8) in nats a token, top-1 agreement and both perplexities, at temperature 1.
"""

import argparse
from typing import Any

import torch

import evaluate
from distill.losses import KDTerms, chunked_kd_loss
from distill.teacher import OwnTeacher, TeacherBackbone
from evaluation import held_out
from hardware.fp8 import quantise_teacher_fp8
from model_utils import get_teacher_model, get_tokenizer


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub id")
    parser.add_argument("--text", default="../shared/data/fineweb_like/valid.parquet", help="what train.py reads")
    parser.add_argument("--seq_length", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens to measure on, at least")
    parser.add_argument("--device", default="cuda:0", help="torch device; without fp8 units the codes are emulated")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    bench = parse(argv)
    device = torch.device(bench.device)
    exact, coarse = (get_teacher_model(bench.teacher, dtype=torch.bfloat16, device=device) for _ in range(2))
    held, student = quantise_teacher_fp8(coarse), TeacherBackbone(coarse)
    own, head = OwnTeacher(exact, device), exact.get_output_embeddings().weight
    options = [
        "--student",
        "",
        "--teacher",
        bench.teacher,
        "--seq_length",
        str(bench.seq_length),
        "--batch_size",
        "4",
    ]
    batches = evaluate.held_out_batches(evaluate.parse(options), bench.text, get_tokenizer(bench.teacher))

    def step(inputs: Any, labels: Any, valid: Any, positions: Any, theirs: Any, scale: Any) -> KDTerms:
        return chunked_kd_loss(student(inputs, positions), head, theirs, head, labels, valid, grad_scale=scale)

    def sums(batch: Any) -> torch.Tensor:
        return held_out.held_out_sums(step, own, head, batch.to(device))

    found = held_out.figures_of(sums, batches, bench.tokens)
    print(
        f"{held:.2f} GiB in fp8; {found['tokens']:,.0f} tokens: KL {found['kl']:.5f}, top-1 "
        f"{found['top1_agreement']:.2%}, perplexity {found['teacher_perplexity']:.3f} -> "
        f"{found['student_perplexity']:.3f}"
    )


if __name__ == "__main__":
    main()
