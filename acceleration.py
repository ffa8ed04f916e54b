"""Speed and memory of a step: compilation, recomputed activations, an fp8 teacher, updates during the backward pass.

Nothing here changes the names of a state dict. `accelerate` applies what the flags ask for, once both models stand;
`UpdateInBackward` wraps an optimizer. Memory is estimated in `memory.py`.
"""

import argparse
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from arguments import UserError
from losses import chunked_kd_loss, layer_distances
from model_utils import teacher_hidden
from optimizer import block_length, build_optimizer

log = logging.getLogger(__name__)

MODES = ("none", "selective", "full")  # of recomputation, cheapest in time first
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0  # torch.finfo(FP8).max
# What "selective" keeps of a layer: the results of its projections and of attention, which are dear to compute again.
# All else (norms, convolution, the state-space operator's small products, gates) is made again in the backward pass.
KEPT = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The residual layers of a teacher (`model.layers`) or a student (`backbone.layers`)."""
    backbone = model.backbone if hasattr(model, "backbone") else model.model
    return backbone.layers


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile every layer in place, one by one, so that one graph serves all equal layers.

    Names of the state dict stay as they are. Embedding, final norm and head are left alone. `options` go to
    `nn.Module.compile`.
    """
    # Every layer shares the code object of nn.Module.__call__, and one graph is kept for each kind of layer, mode
    # (train, eval, no_grad) and shape: the default limit of 8 is soon reached.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in decoder_layers(model):
        layer.compile(dynamic=False, **options)


def uncompile_layers(model: nn.Module) -> None:
    """Undo `compile_layers`."""
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled layers eagerly: for generation and other calls whose shapes change from call to call."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiles_here(what: str, run: Callable[[], Any]) -> bool:
    """Run something compiled for the first time; a failure is one warning line and False.

    Running out of memory is not a failure to compile, and is raised.
    """
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever compiler, backend or kernel raises: eager code does the same job
        reason = " ".join(str(error).split())[:300]
        log.warning("%s does not compile here, running it eagerly: %s: %s", what, type(error).__name__, reason)
        return False
    return True


def set_activation_checkpointing(model: nn.Module, modes: str | Sequence[str]) -> None:
    """Choose what each layer's backward pass recomputes: one mode for all layers, or one a layer.

    none: nothing (a compiled layer still recomputes elementwise work where that saves memory traffic); selective:
    all but projections and attention (`KEPT`); full: the whole layer from its input. Gradients are the same.
    A layer's class is swapped for a subclass, so that names stay and a compiled layer has it in its graph.
    """
    layers = decoder_layers(model)
    chosen = [modes] * len(layers) if isinstance(modes, str) else list(modes)
    for layer, mode in zip(layers, chosen, strict=True):
        if mode not in MODES:
            raise ValueError(f"checkpointing mode {mode!r} is not one of {', '.join(MODES)}")
        plain: Any = getattr(type(layer), "recomputes_of", type(layer))
        layer.__class__ = plain if mode == "none" else _recomputing(plain, mode)


@functools.cache
def _recomputing(layer_class: Any, mode: str) -> Any:
    """A subclass whose forward pass is recomputed in the backward pass as `mode` says."""
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        # It warns of in-place operations under torch.compile, of which the layers have none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def run(*inner: Any, **named: Any) -> Any:
            return layer_class.forward(self, *inner, **named)

        return checkpoint(run, *args, **options, **kwargs) if torch.is_grad_enabled() else run(*args, **kwargs)

    members = {"forward": forward, "recomputes_of": layer_class, "recomputes": mode}
    members["__module__"] = layer_class.__module__
    return type(layer_class.__name__, (layer_class,), members)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


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


class UpdateInBackward:
    """Wraps an optimizer so that each parameter is updated, and its gradient freed, as soon as the gradient is there.

    No two layers' gradients live at once: for a full-parameter 8B student in bf16 that is 16 GiB less. The global
    norm is not known before the last gradient, so gradients are clipped by this rule: at parameter i of step k,

        divisor = max(1, max(norm of step k - 1, norm of step k's gradients so far, i included) / grad_clip).

    The backward pass starts at the last layers, so a spike is mostly seen by the second term. Once a gradient of a
    step is not finite, no later parameter of that step is updated. Needs one micro step an optimizer step.
    A head whose gradient is accumulated outside autograd (`losses.chunked_kd_loss`) is updated by `finish_step`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, grad_clip: float):
        self.inner, self.grad_clip = optimizer, grad_clip
        self.groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        device = next(iter(self.groups)).device
        self.previous = torch.zeros((), device=device)  # norm of the step before
        self.squares = torch.zeros((), device=device)  # of this step so far
        self.handles = [p.register_post_accumulate_grad_hook(self._update) for p in self.groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self.squares = self.squares + norm * norm
        so_far = self.squares.sqrt()
        bad = (~torch.isfinite(so_far)).float()
        divisor = (torch.maximum(self.previous, so_far) / self.grad_clip).clamp(min=1.0)
        inner: Any = self.inner
        inner.grad_scale, inner.found_inf = torch.where(bad > 0, torch.ones_like(divisor), divisor), bad
        everything = inner.param_groups
        inner.param_groups = [{**self.groups[parameter], "params": [parameter]}]
        try:
            inner.step()
        finally:
            inner.param_groups = everything
            inner.grad_scale = inner.found_inf = None
        parameter.grad = None

    def finish_step(self) -> tuple[Tensor, Tensor]:
        """Update what autograd has not seen, and begin the next step; returns (norm, 1.0 if anything was skipped)."""
        for parameter in self.groups:
            self._update(parameter)
        norm = self.squares.sqrt()
        bad = (~torch.isfinite(norm)).float()
        self.previous = torch.where(bad > 0, self.previous, norm)
        self.squares = torch.zeros_like(self.squares)
        return norm, bad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients and what was seen of a step that is given up."""
        self.inner.zero_grad(set_to_none=set_to_none)
        self.squares = torch.zeros_like(self.squares)

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "previous_norm": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.previous = state.pop("previous_norm").to(self.previous.device)
        self.inner.load_state_dict(state)
        self.groups = {p: group for group in self.inner.param_groups for p in group["params"]}

    def master_weights(self) -> dict[Tensor, Tensor]:
        inner: Any = self.inner
        return inner.master_weights()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self.handles:
            handle.remove()


def compiles(args: argparse.Namespace) -> bool:
    """torch.compile is on by default on CUDA and off on the CPU."""
    return args.device.startswith("cuda") and not args.no_compile


def accelerate(args: argparse.Namespace, models: Any, modes: str | Sequence[str]) -> None:
    """Apply checkpointing, the fp8 teacher and compilation to a pair (`stages.Models`), in place.

    If anything fails to compile, everything runs eagerly, and `args.no_compile` says so from then on.
    """
    set_activation_checkpointing(models.student, modes)
    if args.teacher_fp8 and models.teacher is not None:
        check_fp8(models.teacher_device)
        log.info("teacher in fp8: %.2f GiB of matrices", quantise_teacher_fp8(models.teacher))
    if not compiles(args):
        return
    if models.dtype != torch.float32:
        # The only float32 product of a bf16 step mixes chunk states; TF32 keeps more of them than their bf16 sources.
        torch.set_float32_matmul_precision("high")
    pair = [model for model in (models.teacher, models.student) if model is not None]
    for model in pair:
        compile_layers(model)
    if not compiles_here("a layer, the loss or the optimizer", functools.partial(trial_step, args, models)):
        args.no_compile = True
        for model in pair:
            uncompile_layers(model)
    models.student.zero_grad(set_to_none=True)


def trial_step(args: argparse.Namespace, models: Any) -> None:
    """Everything compiled, once, at the shapes of the run: both models, loss, backward pass, optimizer."""
    shape = (args.batch_size, args.seq_length)
    tokens = torch.zeros(shape, dtype=torch.long, device=models.device)
    positions = None
    if args.document_reset:  # two documents, so that attention gets its mask
        positions = torch.arange(shape[1], device=models.device) % max(1, shape[1] // 2)
        positions = positions.expand(shape).contiguous()
    matches = args.layer_weight > 0  # the teacher's hidden states are then those of every layer
    theirs: Any = None
    their_head = None
    if args.kl_weight > 0:
        where = None if positions is None else positions.to(models.teacher_device)
        theirs = teacher_hidden(models.teacher, tokens.to(models.teacher_device), where, matches).to(models.device)
        their_head = models.teacher.get_output_embeddings().weight.to(models.device)
    half = torch.float16 if models.dtype == torch.float16 else None
    with torch.autocast(models.device.type, half, enabled=half is not None):
        states = models.student.backbone(tokens, position_ids=positions, output_hidden_states=matches)
    options = dict(temperature=args.temperature, kl_weight=args.kl_weight, ce_weight=args.ce_weight)
    head = models.student.lm_head.weight.detach()
    valid = torch.ones(shape, dtype=torch.bool, device=models.device)
    last = theirs[-1] if matches else theirs
    terms = chunked_kd_loss(states.last_hidden_state, head, last, their_head, tokens, valid, compile=True, **options)
    loss = terms.loss
    if matches:
        loss = loss + layer_distances(states.hidden_states, theirs, valid, True)
    loss.backward()
    _try_optimizer(args, models.student)


def _try_optimizer(args: argparse.Namespace, student: Any) -> None:
    """An update of a small tensor of each kind of block that the matrices divide into, and a linear layer's."""
    matrices = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
    kinds = {(block_length(p) or 64, p.dtype, p.device) for p in matrices}
    tensors = (torch.zeros(2, width, dtype=dtype, device=device) for width, dtype, device in kinds)
    dtype, device = student.lm_head.weight.dtype, student.lm_head.weight.device
    linear = nn.Linear(64, 64, bias=False, dtype=dtype, device=device)
    small = nn.ModuleList([nn.ParameterList(tensors), linear])
    for parameter in small.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(args.optimizer, small, lr=args.max_lr, weight_decay=args.weight_decay, kernel=True).step()
