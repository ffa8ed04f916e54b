"""The distillation loss alone: time and extra memory of forward and backward, dense and chunked, in one process.

python -m benchmarks.loss [--tokens 4096 --hidden 4096 --vocabulary 128256] [--chunks 512 1024] [--json FILE]
python -m benchmarks.loss --device cpu --tokens 64 --hidden 32 --vocabulary 1000 --chunks 16   # does it run?

Times are medians after a warm-up (CUDA events on a GPU). Extra memory is the peak above what is allocated before the
call; the head gradient's own float32 buffer [vocabulary, hidden] is allocated before it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import extra_peak, milliseconds, show
from distill.losses import chunked_kd_loss, dense_kd_loss


class Problem:
    """Random bf16 hidden states [n, d] and heads [V, d] of student and teacher; every token counts."""

    def __init__(self, n: int, d: int, V: int, device: str):
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).bfloat16()

        self.hidden, self.theirs = (random(n, d) / d**0.5 for _ in range(2))
        self.head, self.their_head = random(V, d).requires_grad_(), random(V, d)
        self.hidden.requires_grad_()
        self.labels = torch.randint(0, V, (n,), device=device)
        self.valid = torch.ones(n, dtype=torch.bool, device=device)
        self.buffer = torch.zeros(V, d, device=device)
        self.scale = torch.tensor(1.0 / n, device=device)

    def dense(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The reference; its logits are made in `dtype` (its loss is float32 or wider either way)."""
        self.hidden.grad = self.head.grad = None
        logits = self.hidden.to(dtype) @ self.head.to(dtype).T
        target = self.theirs.to(dtype) @ self.their_head.to(dtype).T
        terms = dense_kd_loss(logits, target, self.labels, self.valid, grad_scale=self.scale)
        terms.loss.backward()
        return terms.kl_sum

    def chunked(self, chunk: int | None, compile: bool, frozen: bool = False, ce_weight: float = 0.0) -> torch.Tensor:
        self.hidden.grad = self.head.grad = None
        terms = chunked_kd_loss(
            self.hidden, self.head.detach() if frozen else self.head, self.theirs, self.their_head, self.labels,
            self.valid, grad_scale=self.scale, head_grad=None if frozen else self.buffer, chunk_size=chunk,
            compile=compile, ce_weight=ce_weight,
        )  # fmt: skip
        terms.loss.backward()
        return terms.kl_sum

    def products(self) -> None:
        """The four matrix products over all tokens at once: student and teacher logits, both gradients."""
        hidden, head = self.hidden.detach(), self.head.detach()
        logits = self.theirs @ self.their_head.T
        logits = hidden @ head.T
        logits @ head
        logits.T @ hidden

    def errors(self, chunk: int | None, compile: bool) -> dict[str, float]:
        """Relative errors of the chunked gradients and KL, against the dense loss on float32 logits."""
        wanted_kl = self.dense(torch.float32)
        hidden_grad, head_grad = self.hidden.grad, self.head.grad
        assert hidden_grad is not None and head_grad is not None
        self.buffer.zero_()
        kl = self.chunked(chunk, compile)
        assert self.hidden.grad is not None
        pairs = {"hidden": (self.hidden.grad, hidden_grad), "head": (self.buffer, head_grad), "kl": (kl, wanted_kl)}
        return {
            f"{key}_error": ((a.float() - b.float()).norm() / b.float().norm()).item()
            for key, (a, b) in pairs.items()
        }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    problem = Problem(args.tokens, args.hidden, args.vocabulary, args.device)
    compile = args.device != "cpu"  # a GPU
    runs: dict[str, Callable[[], Any]] = {"four products alone": problem.products}
    runs["chunked, default"] = lambda: problem.chunked(None, compile)
    for chunk in args.chunks:
        runs[f"chunked {chunk}"] = lambda chunk=chunk: problem.chunked(chunk, compile)  # type: ignore[misc]
    runs["chunked, default, with hard labels"] = lambda: problem.chunked(None, compile, ce_weight=0.5)
    runs["chunked, default, frozen head"] = lambda: problem.chunked(None, compile, frozen=True)
    runs["dense"] = problem.dense
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        took = milliseconds(run, compile, args.repeats)
        problem.hidden.grad = problem.head.grad = None
        rows.append({"way": name, "ms": took, "extra_gib": extra_peak(run, compile)})
        show(rows[-1])
    if not args.no_errors:
        rows.append({"way": "chunked, default", **problem.errors(None, compile)})
        show(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--chunks", type=int, nargs="*", default=[1024, 2048])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no_errors", action="store_true", help="skip the comparison with float32 logits (14 GiB)")
    parser.add_argument("--json", type=Path, default=None, help="write the rows to this file as well")
    args = parser.parse_args()
    torch.manual_seed(0)
    where = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}: {args.tokens} tokens x {args.hidden}, vocabulary {args.vocabulary}")
    rows = measure(args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
