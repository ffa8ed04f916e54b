"""The chunked operator against the recurrence itself, step by step in float64: values and every gradient."""

import itertools
import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.state_space import decay_dtype, ssd_chunked, ssd_matrix, ssd_step

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
LENGTHS = (1, 5, 127, 128, 129, 1000)
NAMES = ("x", "A_log", "B", "C", "D", "initial_state")
# H, G, N, P
HEADS = (8, 4, 8, 16)


@pytest.fixture(autouse=True)
def fresh_seed():
    """New inputs in every run; the seed is printed where a test fails, and SSD_SEED repeats it."""
    seed = int(os.environ.get("SSD_SEED", torch.seed() % 2**31))
    print(f"SSD_SEED={seed}")
    torch.manual_seed(seed)


def log_decay(A_log: Tensor) -> Tensor:
    """log a of the "llamba" mixer."""
    return -F.softplus(A_log.to(decay_dtype(A_log.dtype)))


def operator(x: Tensor, A_log: Tensor, *others: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    """The chunked operator as the "llamba" mixer calls it."""
    return ssd_chunked(x, log_decay(A_log), *others, **options)


def recurrence(x, A_log, B, C, D, initial_state, resets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + B_t (x) x_t, y_t = C_t S_t + D x_t, one token after the other."""
    repeat = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)
    # 1 / (1 + e^A) is exp(-softplus(A)), written another way.
    decay, state, outputs = 1 / (1 + A_log.exp()), initial_state, []
    for t in range(x.shape[1]):
        if resets is not None:
            state = torch.where(resets[:, t, None, None, None], torch.zeros_like(state), state)
        state = decay[:, t, :, None, None] * state + B[:, t, :, :, None] * x[:, t, :, None, :]
        outputs.append(torch.einsum("bhn,bhnp->bhp", C[:, t], state) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def make_inputs(b: int, t: int, dtype: torch.dtype, slow: float = 0.0) -> list[Tensor]:
    """Random inputs, rounded to `dtype`; `slow` shifts A_log so that decays come near 1."""
    H, G, N, P = HEADS
    shapes = ((b, t, H, P), (b, t, H), (b, t, G, N), (b, t, G, N), (H,), (b, H, N, P))
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[1] -= slow
    # The state is kept in the decays' dtype, whatever the inputs are.
    kinds = [dtype] * 5 + [torch.promote_types(dtype, torch.float32)]
    return [tensor.to(kind).requires_grad_() for tensor, kind in zip(inputs, kinds, strict=True)]


def relative(given: Tensor, wanted: Tensor) -> float:
    return ((given.double() - wanted).norm() / wanted.norm().clamp(min=1e-300)).item()


def errors(inputs: list[Tensor], chunk_size: int, resets: Tensor | None = None) -> dict[str, float]:
    """Relative errors of both outputs and of the gradients of all six inputs."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = recurrence(*exact, resets)
    given = operator(*inputs[:5], chunk_size=chunk_size, resets=resets, initial_state=inputs[5])
    upstream = [torch.randn_like(output) for output in given]
    gradients = torch.autograd.grad(given, inputs, upstream)
    wanted_gradients = torch.autograd.grad(wanted, exact, [u.double() for u in upstream])
    pairs = zip(("y", "final state", *NAMES), (*given, *gradients), (*wanted, *wanted_gradients), strict=True)
    return {name: relative(a, b) for name, a, b in pairs}


def assert_close(found: dict[str, float], dtype: torch.dtype) -> None:
    wrong = {name: f"{error:.2e}" for name, error in found.items() if not error < TOLERANCE[dtype]}
    assert not wrong, f"{dtype}: {wrong}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("b, t", itertools.product((1, 3), LENGTHS))
def test_equals_the_recurrence(b, t, dtype):
    assert_close(errors(make_inputs(b, t, dtype), chunk_size=128), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("slow", [4.0, 8.0])
def test_equals_the_recurrence_with_slow_decays(slow, dtype):
    """Half-lives of about 40 and 2000 tokens: most of what is read comes from other chunks."""
    assert_close(errors(make_inputs(2, 1000, dtype, slow), chunk_size=128), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fast_decays_stay_finite_and_exact(dtype):
    """Decays of e^-40 a token: a chunk's product underflows, and no exp of a positive difference may appear."""
    found = errors(make_inputs(1, 300, dtype, slow=-40.0), chunk_size=64)
    # The decay's own gradient is about e^-40 here, below the rounding of the sums that it comes from.
    assert found.pop("A_log") < float("inf")
    assert_close(found, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_documents_are_kept_apart(dtype):
    """Starts at position 0, in mid-chunk, several in one chunk, on a chunk's edge, one token before the end."""
    inputs = make_inputs(3, 200, dtype)
    resets = torch.zeros(3, 200, dtype=torch.bool)
    resets[0, [0, 5, 9, 64, 100, 101, 199]] = True
    resets[1, [32, 33, 190]] = True
    assert_close(errors(inputs, 32, resets), dtype)


def test_packed_documents_equal_documents_alone():
    inputs = make_inputs(1, 150, torch.float64)
    x, A_log, B, C, D, _ = inputs
    resets = torch.zeros(1, 150, dtype=torch.bool)
    starts = [0, 40, 41, 130, 150]
    resets[0, starts[:-1]] = True
    packed = operator(x, A_log, B, C, D, chunk_size=32, resets=resets)[0]
    alone = [operator(x[:, i:j], A_log[:, i:j], B[:, i:j], C[:, i:j], D, chunk_size=32)[0]
             for i, j in itertools.pairwise(starts)]  # fmt: skip
    assert relative(packed, torch.cat(alone, 1)) < 1e-12
    gradient = torch.autograd.grad(packed[:, 41:130].sum(), x)[0]
    assert gradient[:, :41].abs().max() == 0 and gradient[:, 130:].abs().max() == 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_at_length_one_the_gradient_of_the_decay_is_exactly_zero(dtype):
    x, A_log, B, C, D, _ = make_inputs(3, 1, dtype)
    y = operator(x, A_log, B, C, D, chunk_size=128)[0]
    gradient = torch.autograd.grad(y.float().square().sum(), A_log)[0]
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("chunk_size", [1, 16, 100, 256])
def test_the_chunk_size_does_not_change_the_result(chunk_size):
    inputs = make_inputs(2, 129, torch.float64)
    assert_close(errors(inputs, chunk_size), torch.float64)


def test_one_head_for_all_and_a_head_each():
    x, A_log, _, _, D, _ = make_inputs(2, 70, torch.float64)
    H, _, N, P = HEADS
    for G in (1, H):
        B, C = (torch.randn(2, 70, G, N, dtype=torch.float64) for _ in range(2))
        zero = torch.zeros(2, H, N, P, dtype=torch.float64)
        wanted, state = recurrence(x, A_log, B, C, D, zero)
        given, final = operator(x, A_log, B, C, D, chunk_size=32)
        assert relative(given, wanted) < 1e-12 and relative(final, state) < 1e-12


def test_two_halves_with_a_state_between_equal_the_whole():
    x, A_log, B, C, D, state = make_inputs(2, 100, torch.float64)
    whole, final = operator(x, A_log, B, C, D, chunk_size=16, initial_state=state)
    parts = []
    for part in (slice(0, 37), slice(37, 100)):
        y, state = operator(x[:, part], A_log[:, part], B[:, part], C[:, part], D, chunk_size=16, initial_state=state)
        parts.append(y)
    assert relative(torch.cat(parts, 1), whole) < 1e-12 and relative(state, final) < 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_steps_equal_the_recurrence(dtype):
    inputs = make_inputs(3, 20, dtype)
    wanted, wanted_state = recurrence(*[tensor.double() for tensor in inputs])
    x, A_log, B, C, D, state = inputs
    outputs = []
    for t in range(20):
        y, state = ssd_step(x[:, t], log_decay(A_log[:, t]), B[:, t], C[:, t], D, state)
        outputs.append(y)
    assert outputs[0].dtype == dtype and state.dtype == inputs[5].dtype
    assert_close({"y": relative(torch.stack(outputs, 1), wanted), "state": relative(state, wanted_state)}, dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_the_mixing_matrix_is_the_operator(packed):
    x, A_log, B, C, _, _ = make_inputs(2, 50, torch.float64)
    resets = torch.zeros(2, 50, dtype=torch.bool)
    resets[:, [0, 11, 12, 40]] = True
    chosen = resets if packed else None
    matrix = ssd_matrix(log_decay(A_log), B, C, chosen)
    assert matrix.shape == (2, HEADS[0], 50, 50)
    assert torch.equal(matrix, matrix.tril())
    mixed = torch.einsum("bhij,bjhp->bihp", matrix, x)
    assert relative(mixed, operator(x, A_log, B, C, None, chunk_size=16, resets=chosen)[0]) < 1e-12


def test_one_graph_without_breaks():
    """Forward and backward are one traced graph each, packed documents included."""
    inputs = make_inputs(1, 40, torch.float32)
    resets = torch.zeros(1, 40, dtype=torch.bool)
    resets[0, [0, 7]] = True
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager", dynamic=False)
    for starts in (None, resets):
        given = compiled(*inputs[:5], chunk_size=16, resets=starts)[0]
        wanted = operator(*inputs[:5], chunk_size=16, resets=starts)[0]
        assert relative(given, wanted.double()) < 1e-6
        ours, theirs = (torch.autograd.grad(y.square().sum(), inputs[:5]) for y in (given, wanted))
        assert all(relative(a, b.double()) < 1e-5 for a, b in zip(ours, theirs, strict=True))


def test_shapes_without_data():
    """On the meta device, as memory estimates use it."""
    inputs = [tensor.detach().to("meta") for tensor in make_inputs(2, 129, torch.bfloat16)]
    y, state = operator(*inputs[:5], chunk_size=64)
    assert y.shape == inputs[0].shape and y.dtype == torch.bfloat16 and state.dtype == torch.float32
