"""Compile a model's layers one by one, and run eagerly where that fails."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from model_utils import decoder_layers

log = logging.getLogger(__name__)


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


_compiled: dict[Any, Any] = {}


def maybe_compiled(function: Any, compile: bool) -> Any:
    """The function itself, or its compiled form, of which there is one in a process."""
    if not compile:
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=False)
    return _compiled[function]
