"""A micro step as one CUDA graph: the host starts it with a single call instead of thousands of kernel launches.

A small pair (SmolLM2-135M at 16 x 1024 tokens) needs 90 ms of the device and 105 ms of the host for a step; as a
graph it takes what the device needs. A large pair keeps the device busy anyway and is left as it is.
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from data import Batch
from loop.forms import MicroStep, Sums

log = logging.getLogger(__name__)

EAGER_CALLS = 2  # before the capture: they compile, and show what memory a step takes
LARGEST_SHARE = 0.45  # of the device's memory: a graph keeps its activations' memory to itself


class CapturedMicroStep:
    """Wraps a micro step for `trainer.run_stage`: the same kernels on the same numbers, launched as a graph.

    The first calls run as they are; then the step is captured, unless it takes more than `LARGEST_SHARE` of the
    device's memory. A batch of another shape runs as it is, and document positions are not for here.
    Gradients stay where the graph writes them: a parameter whose `.grad` was dropped gets its buffer back, zeroed.
    """

    def __init__(
        self,
        micro_step: MicroStep,
        parameters: list[nn.Parameter],
        device: torch.device,
    ):
        self.micro_step, self.parameters, self.device = micro_step, parameters, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0
        self.gradients: list[tuple[nn.Parameter, Tensor]] = []  # kept for a graph alone: they are memory

    def __call__(self, batch: Batch, grad_scale: Tensor) -> Sums:
        """As the micro step itself; figures are copies."""
        self.calls += 1
        if self.calls == EAGER_CALLS + 1 and self.gradients:
            self._capture(batch, grad_scale)
        if self.graph is None or batch.inputs.shape != self.batch.inputs.shape:
            sums = self.micro_step(batch, grad_scale)
            if self.calls == EAGER_CALLS and self._has_room():
                self.gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
            return sums
        self._restore_gradients()
        for name in ("tokens", "valid"):
            getattr(self.batch, name).copy_(getattr(batch, name))
        self.scale.copy_(grad_scale)
        self.graph.replay()
        return {name: value.clone() for name, value in self.sums.items()}

    def _has_room(self) -> bool:
        return torch.cuda.max_memory_allocated(self.device) < LARGEST_SHARE * torch.cuda.mem_get_info(self.device)[1]

    def _restore_gradients(self) -> None:
        """Put every parameter's gradient where the graph adds to it."""
        dropped = [buffer for parameter, buffer in self.gradients if parameter.grad is None]
        if dropped:
            torch._foreach_zero_(dropped)
        for parameter, buffer in self.gradients:
            if parameter.grad is not None and parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer

    def _capture(self, batch: Batch, grad_scale: Tensor) -> None:
        """Record a step without running it; one that cannot be recorded gives a warning and runs without a graph."""
        copies = {name: getattr(batch, name).clone() for name in ("tokens", "valid")}
        self.batch = replace(batch, **copies, on_host=None, following=None)
        self.scale = grad_scale.clone()
        self._restore_gradients()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader's thread pins memory beside
                self.sums = self.micro_step(self.batch, self.scale)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            log.warning("a step cannot be captured as a CUDA graph here, running it without: %s", reason)
            self.gradients = []
            return
        self.graph = graph
        log.info("a step runs as one CUDA graph from now on")
