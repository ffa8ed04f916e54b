"""A frozen teacher's matrix products in fp8, where the card has it."""

import torch
from torch import Tensor, nn

from model_utils import decoder_layers
from utils import UserError

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0  # torch.finfo(FP8).max


class Fp8Linear(nn.Module):
    """A frozen linear layer with fp8 (e4m3) weights: one scale an output row, and one a token, taken on the fly."""

    weight: Tensor  # fp8 [out, in]
    scale: Tensor  # float32 [out, 1]

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = to_fp8(linear.weight.detach())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [.., in] -> [.., out], in the inputs' dtype."""
        rows, scale = to_fp8(inputs.flatten(0, -2))
        out = fp8_product(rows, scale, self.weight, self.scale, inputs.dtype).unflatten(0, inputs.shape[:-1])
        return out if self.bias is None else out + self.bias


def to_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes of a matrix [m, k] and its float32 scales [m, 1]: each row's largest entry becomes 448."""
    wide = matrix.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_LARGEST
    return (wide / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8), scale


def fp8_product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """left [m, k] times right [n, k] transposed, both fp8 with a float32 scale a row: [m, n] in `dtype`.

    On a GPU by the matrix units (which return bf16), elsewhere by their definition in float32.
    """
    if not left.is_cuda:
        return ((left.float() @ right.float().T) * left_scale * right_scale.T).to(dtype)
    out = torch._scaled_mm(left, right.T, left_scale, right_scale.T, out_dtype=torch.bfloat16, use_fast_accum=True)
    return out.to(dtype)


def check_fp8(device: torch.device) -> None:
    """Raise a `UserError` unless the device multiplies fp8 matrices (compute capability 8.9 or above)."""
    if device.type != "cuda":
        raise UserError(f"--teacher_fp8 needs a CUDA device with fp8 matrix units, not {device}")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--teacher_fp8: {name} (compute capability {major}.{minor}) has no fp8; 8.9 or above does")


@torch.no_grad()
def quantise_teacher_fp8(teacher: nn.Module) -> float:
    """Put fp8 weights into the teacher's layers, in place; embedding, norms and head stay. Returns GiB of fp8.

    To be done after everything that reads the teacher's weights (transfer, replacement, sharing). A student's
    frozen tensors that share storage with the teacher keep it. Layers whose widths are no multiple of 16 stay.
    """
    held = 0
    for layer in decoder_layers(teacher):
        linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        for name, module in linears:
            if module.in_features % 16 or module.out_features % 16:
                continue
            parent, _, last = name.rpartition(".")
            quantised = Fp8Linear(module)
            setattr(layer.get_submodule(parent), last, quantised)
            held += quantised.weight.numel()
    return held / 2**30
