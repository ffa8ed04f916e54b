"""The chunked loss against the dense one in float64, in value and gradient, and the pitfalls of KD losses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.losses import accumulate_product, chunked_kd_loss, dense_kd_loss, scaled_terms

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}  # bf16 rounds logits of 10 by 0.03


def problem(n, dtype, V=97, d=16, scale=1.0):
    hidden, theirs = (torch.randn(n, d, dtype=dtype) * scale for _ in range(2))
    head, their_head = (torch.randn(V, d, dtype=dtype) for _ in range(2))
    return hidden, head, theirs, their_head, torch.randint(0, V, (n,)), torch.rand(n) < 0.7


def error(given, wanted, smallest=1e-9):
    return ((given.double() - wanted).norm() / wanted.norm().clamp(min=smallest)).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 7, 33])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.0), (2.0, 1.0, 0.5), (0.5, 0.7, 0.0), (1.0, 0.0, 1.0)])
@pytest.mark.parametrize("in_place", [False, True])
def test_chunked_equals_dense_in_float64(dtype, n, weights, in_place):
    temperature, kl_weight, ce_weight = weights
    hidden, head, theirs, their_head, labels, valid = problem(n, dtype)
    options = dict(temperature=temperature, kl_weight=kl_weight, ce_weight=ce_weight, grad_scale=0.3)
    exact_hidden, exact_head = (x.detach().double().clone().requires_grad_() for x in (hidden, head))
    target = theirs.double() @ their_head.double().T if kl_weight else None
    wanted = dense_kd_loss(exact_hidden @ exact_head.T, target, labels, valid, **options)
    wanted.loss.backward()

    hidden.requires_grad_(), head.requires_grad_()
    buffer = torch.zeros_like(head, dtype=torch.promote_types(dtype, torch.float32)) if in_place else None
    given = chunked_kd_loss(
        hidden, head, theirs if kl_weight else None, their_head if kl_weight else None, labels, valid,
        head_grad=buffer, chunk_size=5, **options,
    )  # fmt: skip
    given.loss.backward()
    assert (head.grad is None) == in_place
    pairs = [(hidden.grad, exact_hidden.grad), (buffer if in_place else head.grad, exact_head.grad)]
    # bf16 logits tie for the top choice now and then, so agreement is compared in wider types alone; layers: no part
    left_out = {"layer_sum"} | ({"agree_sum"} if dtype == torch.bfloat16 else set())
    compared = [name for name in given._fields if name not in left_out]
    pairs += [(getattr(given, name), getattr(wanted, name)) for name in compared]
    # bf16 rounds logits by an absolute 0.03: what nearly cancels (one token's gradient) has no relative precision
    smallest = 0.5 if dtype == torch.bfloat16 else 1e-9
    assert max(error(a.detach(), b.detach(), smallest) for a, b in pairs) < TOLERANCE[dtype]


def test_identical_models_score_zero_and_agree():
    hidden, head, _, _, labels, _ = problem(20, torch.float64)
    terms = chunked_kd_loss(hidden.requires_grad_(), head, hidden, head, labels, torch.ones(20, dtype=torch.bool))
    assert abs(terms.kl_sum.item()) < 1e-12 and terms.agree_sum == terms.tokens == 20
    assert terms.loss_sum > 1  # the cross-entropy keeps the teacher's entropy
    terms.loss.backward()
    assert hidden.grad.abs().max() < 1e-12


def test_nothing_valid_gives_zero_and_no_nan():
    hidden, head, theirs, their_head, labels, _ = problem(9, torch.float32, scale=1e4)
    head.requires_grad_()
    terms = chunked_kd_loss(
        hidden.requires_grad_(), head, theirs, their_head, labels, torch.zeros(9, dtype=torch.bool)
    )
    terms.loss.backward()
    assert all(value.item() == 0 for value in terms if value is not None)
    assert not hidden.grad.any() and not head.grad.any()


def test_temperature_keeps_the_gradients_size():
    """T^2 makes up for the 1 / T^2 of soft targets: for small logits gradients hardly depend on T."""
    sizes = []
    for temperature in (1.0, 4.0):
        torch.manual_seed(1)
        hidden, head, theirs, their_head, labels, valid = problem(30, torch.float64, scale=1e-3)
        hidden.requires_grad_()
        options = dict(temperature=temperature)
        chunked_kd_loss(hidden, head, theirs, their_head, labels, valid, **options).loss.backward()
        sizes.append(hidden.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-2)


def test_invalid_rows_never_count():
    hidden, head, theirs, their_head, labels, valid = problem(12, torch.float32)
    changed = hidden.clone()
    changed[~valid] = 1e4
    results = []
    for values in (hidden, changed):
        values = values.clone().requires_grad_()
        terms = chunked_kd_loss(values, head, theirs, their_head, labels, valid)
        terms.loss.backward()
        results.append((terms.loss_sum.detach(), values.grad[valid]))
        assert not values.grad[~valid].any()
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_frozen_head_gets_no_gradient_and_evaluation_none_at_all():
    hidden, head, theirs, their_head, labels, valid = problem(12, torch.float32)
    terms = chunked_kd_loss(hidden.requires_grad_(), head, theirs, their_head, labels, valid)
    terms.loss.backward()
    assert head.grad is None and hidden.grad.any()
    with torch.no_grad():
        again = chunked_kd_loss(hidden, head, theirs, their_head, labels, valid)
    assert not again.loss.requires_grad and torch.allclose(again.kl_sum, terms.kl_sum)


def test_the_head_buffer_accumulates_over_micro_steps():
    hidden, head, theirs, their_head, labels, valid = problem(16, torch.float64)
    head.requires_grad_()
    buffer = torch.zeros_like(head)
    for rows in (slice(0, 5), slice(5, 16)):
        part = hidden[rows].clone().requires_grad_()
        chunked_kd_loss(
            part, head, theirs[rows], their_head, labels[rows], valid[rows], head_grad=buffer
        ).loss.backward()
    chunked_kd_loss(hidden.requires_grad_(), head, theirs, their_head, labels, valid).loss.backward()
    assert torch.allclose(buffer, head.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("in_place", [False, True])
def test_1x8_and_2x4_have_the_same_gradients(in_place):
    """Each micro step is divided by the valid tokens of the whole step; its halves hold 13 and 4 of them."""
    hidden, head, theirs, their_head, labels, _ = problem(32, torch.float64)
    valid = torch.arange(32) % 16 < torch.where(torch.arange(32) < 16, 13, 4)
    gradients = []
    for size in (32, 16):
        weight, buffer = head.clone().requires_grad_(), torch.zeros_like(head) if in_place else None
        inputs = hidden.clone().requires_grad_()
        for start in range(0, 32, size):
            rows = slice(start, start + size)
            chunked_kd_loss(
                inputs[rows], weight, theirs[rows], their_head, labels[rows], valid[rows],
                grad_scale=1 / valid.sum(), head_grad=buffer, chunk_size=7,
            ).loss.backward()  # fmt: skip
        gradients.append((inputs.grad, buffer if in_place else weight.grad))
    for one, two in zip(*gradients):
        assert one.any() and torch.allclose(one, two, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("in_place", [False, True])
def test_float16_gradients_do_not_underflow(in_place):
    """Autocast's case: hidden states in float16, the head in float32; the loss scale is applied before the cast."""
    hidden, head, theirs, their_head, labels, valid = problem(24, torch.float32)
    hidden, theirs = hidden.half().requires_grad_(), theirs.half()
    head, their_head = head.half().float().requires_grad_(), their_head.half()
    buffer = torch.zeros_like(head) if in_place else None
    scale = torch.tensor(2.0**16 * 1e-7)  # gradients of 1e-7 would be 0 or subnormal in float16
    chunked_kd_loss(
        hidden, head, theirs, their_head, labels, valid, grad_scale=scale, head_grad=buffer
    ).loss.backward()
    exact_hidden, exact_head = (x.detach().double().requires_grad_() for x in (hidden, head))
    target = theirs.double() @ their_head.double().T
    dense_kd_loss(exact_hidden @ exact_head.T, target, labels, valid, grad_scale=scale.double()).loss.backward()
    given = buffer if in_place else head.grad
    assert given.dtype == torch.float32 and error(given, exact_head.grad) < 5e-3
    assert error(hidden.grad, exact_hidden.grad) < 5e-3


def test_a_float16_head_gradient_may_be_larger_than_float16():
    """Through autograd too it stays float32: the sum over tokens can exceed 65504 where no single term does."""
    hidden, head = torch.full((64, 16), 30.0).half(), torch.zeros(50, 16, requires_grad=True)
    labels, valid = torch.zeros(64, dtype=torch.long), torch.ones(64, dtype=torch.bool)
    options = dict(kl_weight=0.0, ce_weight=1.0, grad_scale=100.0)
    chunked_kd_loss(hidden, head, None, None, labels, valid, **options).loss.backward()
    assert head.grad[0, 0].item() == pytest.approx(-0.98 * 30 * 64 * 100, rel=1e-3)


def test_a_missing_teacher_is_an_error():
    hidden, head, _, _, labels, valid = problem(4, torch.float32)
    with pytest.raises(ValueError, match="no teacher was given"):
        chunked_kd_loss(hidden, head, None, None, labels, valid)
    with pytest.raises(ValueError, match="no teacher was given"):
        dense_kd_loss(hidden @ head.T, None, labels, valid, kl_weight=0.5)


def test_vocabularies_that_differ():
    hidden, head, theirs, their_head, labels, valid = problem(4, torch.float32)
    with pytest.raises(ValueError, match="student head has 97 rows, the teacher's 96"):
        chunked_kd_loss(hidden, head, theirs, their_head[:-1], labels, valid)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_no_tensor_of_tokens_by_vocabulary_is_ever_made():
    n, V, d = 512, 1000, 8
    hidden, head, theirs, their_head, labels, valid = problem(n, torch.float32, V=V, d=d)
    hidden.requires_grad_(), head.requires_grad_()
    with LargestTensor() as chunked:
        chunked_kd_loss(hidden, head, theirs, their_head, labels, valid, ce_weight=0.5, chunk_size=64).loss.backward()
    with LargestTensor() as dense:
        dense_kd_loss(hidden @ head.T, theirs @ their_head.T, labels, valid).loss.backward()
    assert chunked.numel <= 64 * V < n * V <= dense.numel


def test_accumulated_product():
    total, left, right = torch.randn(5000, 7), torch.randn(5000, 30).bfloat16(), torch.randn(30, 7).bfloat16()
    wanted = total.double() + left.double() @ right.double()
    accumulate_product(total, left, right)
    assert error(total, wanted) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("V", [1000, 9001])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "kl_weight": 0.7, "ce_weight": 0.4}])
def test_the_kernel_on_a_gpu(V, options):
    hidden, head, theirs, their_head, labels, valid = (x.cuda() for x in problem(300, torch.bfloat16, V=V, d=64))
    exact_hidden, exact_head = (x.detach().double().clone().requires_grad_() for x in (hidden, head))
    logits = exact_hidden @ exact_head.T
    wanted = dense_kd_loss(logits, theirs.double() @ their_head.double().T, labels, valid, **options)
    wanted.loss.backward()
    hidden.requires_grad_(), head.requires_grad_()
    for compile in (True, False):
        hidden.grad, buffer = None, torch.zeros(V, 64, device="cuda")
        given = chunked_kd_loss(
            hidden, head, theirs, their_head, labels, valid,
            head_grad=buffer, chunk_size=128, compile=compile, **options,
        )  # fmt: skip
        given.loss.backward()
        assert error(hidden.grad, exact_hidden.grad) < 2e-2 and error(buffer, exact_head.grad) < 2e-2
        assert error(given.kl_sum, wanted.kl_sum) < 2e-2 and error(given.ce_sum, wanted.ce_sum) < 1e-2
        assert error(given.loss, wanted.loss) < 1e-2 and given.tokens == wanted.tokens
        assert abs(given.agree_sum - wanted.agree_sum) <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("options", [(1.0, 1.0, 0.0), (1.0, 0.5, 0.5), (3.0, 1.0, 0.2)])
def test_the_kernel_is_its_definition(options):
    from distill.loss_kernel import fused_scaled_terms as kernel

    student, teacher = (3 * torch.randn(50, 5003, device="cuda") for _ in range(2))
    labels, valid = torch.randint(0, 5003, (50,), device="cuda"), torch.rand(50, device="cuda") < 0.8
    scale = torch.tensor(0.01, device="cuda")
    wanted = scaled_terms(exact := student.double(), teacher.double(), labels, valid, scale.double(), *options)
    given = kernel(student, teacher, labels, valid, scale, *options)
    assert error(given, wanted) < 1e-5 and error(student, exact) < 1e-5
