"""`generate` on the fast path: a cache of fixed addresses, and a step that is one CUDA graph of compiled layers.

On a CPU the same step runs as it is. Shapes as in decoding.py.
"""

import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.utils import logging

from .decoding import attention_step, mixer_step
from .workspace import Workspace, capacity_for

logger = logging.get_logger(__name__)
ATTENTION = (
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
)  # what `project` makes as they do
ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies are the same at every length
AHEAD = 4096  # tokens that a cache has room for ahead of what is needed, if so many may come
SPARE = 4  # workspaces that are kept for calls to come
PART = 16384  # tokens of a prompt, all rows together, that are read in one forward pass
Step = Callable[..., Tensor]  # `mixer_step` and `attention_step`, or what they are compiled to


class FastCache(Cache):
    """A cache in a `Workspace`, which is found or made once the number of rows is known.

    model: whose cache it is; tokens: the most that may come. It grows beyond that where it must.
    """

    def __init__(self, model: PreTrainedModel, tokens: int):
        super().__init__(layers=[])
        self.model, self.tokens = weakref.ref(model), tokens
        self.space: Workspace | None = None
        self.plain = False  # whether single tokens, too, go through the layers' own forward passes

    is_compileable = False  # its step is compiled here and not by transformers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.space is None else self.space.length.tokens

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + length, 0

    def reset(self) -> None:
        if self.space is not None:
            self.space.clear()

    def reserve(self, batch: int, tokens: int) -> Workspace:
        """Room for `tokens` more in each of `batch` rows; raises ValueError where it holds another number of rows."""
        old, needed = self.space, self.get_seq_length() + tokens
        if old is not None and old.batch != batch:
            raise ValueError(f"past_key_values: {batch} rows for a cache of {old.batch}")
        if old is None or (old.capacity and old.capacity < needed):
            most = max(needed, min(self.tokens, needed + max(AHEAD, needed // 2)))
            self._move(batch, most)
        assert self.space is not None
        return self.space

    def _move(self, batch: int, tokens: int, rows: Tensor | None = None) -> None:
        """Into another workspace, with all rows or those at `rows`."""
        model, old = self.model(), self.space
        assert model is not None, "the model is gone, and its cache with it"
        self.space = decoder_of(model).workspace(self, model, batch, tokens)
        self.layers = self.space.layers
        if old is not None:
            self.space.take(old, rows)
            decoder_of(model).leave(old, self)

    def go_on(self, model: PreTrainedModel, options: GenerationConfig, mode: GenerationMode | str) -> None:
        """Before another call of `generate`: weights may have moved since, and layers been hooked or wrapped."""
        self.plain = not wants_fast_path(model, options, mode)
        decoder_of(model).check_weights(model)

    def advance(self, tokens: int, attention_mask: Tensor | None) -> None:
        """After a forward pass over `tokens` tokens a row; attention_mask [b, seen + tokens] is 0 at padding."""
        space = self.space
        assert space is not None
        start, end = space.length.tokens, space.length.tokens + tokens
        if space.capacity:
            space.seen[:, start:end] = True if attention_mask is None else attention_mask[:, start:end].bool()
        space.length.tokens = end
        space.place.fill_(end)

    def next_logits(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor | None:
        """Logits [b, 1, vocabulary] of a forward pass over one more token a row; None where it is something else.

        Raises ValueError for another model than the one whose cache it is.
        """
        if self.model() is not model:
            raise ValueError("past_key_values: a fast cache belongs to the model whose generate() made it")
        tokens, mask = inputs["input_ids"], inputs["attention_mask"]
        if self.plain or not self.get_seq_length() or tokens is None or tokens.shape[1] != 1:
            return None
        if mask is not None and (not torch.is_tensor(mask) or mask.ndim != 2):
            return None
        return self._step(tokens, inputs["position_ids"], mask)

    def _step(self, tokens: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        space = self.reserve(tokens.shape[0], 1)
        space.tokens.copy_(tokens)
        if attention_mask is not None:
            space.now.copy_(attention_mask[:, -1:])
        if space.capacity:
            space.positions.copy_(space.place if position_ids is None else position_ids)
        if space.graph is None:
            logits = space.step(self.model(), mixer_step, attention_step)
        else:
            space.graph.replay()
            logits = space.logits.clone()
        space.length.tokens += 1
        return logits

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows become copies of the rows at `indices`."""
        if self.space is not None:
            self._move(len(indices), self.space.capacity, indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.space is not None:
            self.batch_select_indices(torch.arange(self.space.batch).repeat_interleave(repeats))

    def __deepcopy__(self, memo: dict[int, object]) -> "FastCache":
        """Another cache that goes on from here, in a workspace of its own."""
        model = self.model()
        assert model is not None, "the model is gone, and its cache with it"
        copied = FastCache(model, self.tokens)
        if self.space is not None:
            copied.space = self.space
            copied._move(self.space.batch, self.space.capacity)
        return copied


class Decoder:
    """A model's workspaces, and its layers compiled: one of each kind for all of that kind."""

    def __init__(self) -> None:
        self.spaces: list[tuple[Workspace, weakref.ref[FastCache]]] = []  # with the cache that uses it
        self.weights: list[tuple[int, torch.dtype]] = []
        self.steps: list[tuple[Step, Step]] | None = None  # what to record, the best first

    def workspace(self, cache: FastCache, model: Any, batch: int, tokens: int) -> Workspace:
        """One that no living cache uses, cleared; on CUDA with its graph."""
        capacity = capacity_for(tokens) if model.config.attention_layers else 0
        with torch.inference_mode(False), torch.no_grad():
            if model.device.type != "cuda":
                return Workspace(model, batch, capacity)
            self.check_weights(model)
            space = self._spare(batch, capacity)
            if space is None:
                try:
                    space = self._record(model, batch, capacity)
                except torch.OutOfMemoryError:
                    self.forget()
                    torch.cuda.empty_cache()
                    space = self._record(model, batch, capacity)
        room = torch.cuda.get_device_properties(model.device).total_memory // 16
        self.spaces.append((space, weakref.ref(cache, lambda _: self.forget(SPARE, room))))
        return space

    def check_weights(self, model: nn.Module) -> None:
        """A graph knows addresses: where a weight or buffer stands elsewhere or is of another dtype, none holds."""
        weights = [(tensor.data_ptr(), tensor.dtype) for tensor in tensors_of(model)]
        if weights != self.weights:
            for space, _ in self.spaces:
                space.graph = None
            self.spaces, self.weights = [], weights

    def _spare(self, batch: int, capacity: int) -> Workspace | None:
        for pair in list(self.spaces):
            space, owner = pair
            if owner() is None and (space.batch, space.capacity) == (batch, capacity) and self._drop(pair):
                space.clear()
                return space
        return None

    def _drop(self, pair: tuple[Workspace, weakref.ref[FastCache]]) -> bool:
        """Whether it was there still: another thread may have been quicker, or a cache whose time ended meanwhile."""
        try:
            self.spaces.remove(pair)
        except ValueError:
            return False
        return True

    def leave(self, space: Workspace, cache: FastCache) -> None:
        """A cache has moved out of a workspace that it used."""
        for pair in list(self.spaces):
            if pair[0] is space and pair[1]() is cache:
                self._drop(pair)

    def forget(self, most: int = 0, room: int = 0) -> None:
        """Give up workspaces that no cache uses, but for the last `most`, of `room` bytes together."""
        for pair in [pair for pair in reversed(self.spaces) if pair[1]() is None]:
            most, room = most - 1, room - pair[0].nbytes()
            if most < 0 or room < 0:
                self._drop(pair)

    def _record(self, model: Any, batch: int, capacity: int) -> Workspace:
        """A new workspace with a graph of compiled layers; of plain ones, or none, where that fails."""
        if self.steps is None:
            compiled = torch.compile(own_code(mixer_step)), torch.compile(own_code(attention_step))
            self.steps = [compiled, (mixer_step, attention_step)]
            logger.warning_once("generate compiles the model's decoding step, once in a process: some 10 to 20 s")
        while self.steps:
            space = Workspace(model, batch, capacity)
            try:
                space.record(model, *self.steps[0])
                return space
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no compiler, say: whatever it is, generating goes on without
                kind = "compiled" if len(self.steps) > 1 else "recorded"
                logger.warning(f"the decoding step cannot be {kind}, and is slower without: {error}")
                del self.steps[0]
        return Workspace(model, batch, capacity)


DECODERS: weakref.WeakKeyDictionary[nn.Module, Decoder] = weakref.WeakKeyDictionary()


def decoder_of(model: nn.Module) -> Decoder:
    return DECODERS.setdefault(model, Decoder())


def own_code(function: Any) -> FunctionType:
    """A copy of a function with a code object of its own.

    torch counts what it compiles for each code object and gives up after eight: models must not use up each other's.
    """
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def read_in_parts(backbone: Any, inputs: dict[str, Any], kept: int) -> Any:
    """The backbone's output for a prompt of any length in bounded memory: PART tokens after PART tokens.

    inputs: those of a forward pass with a cache, without gradients; kept: how many of the last hidden states
    [b, kept, d] are wanted, 0 for all. What a part leaves in the cache lets the next one go on exactly.
    """
    sizes = (inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]).shape
    batch, t = sizes[:2]
    part = max(PART // batch // 128, 1) * 128
    mask = inputs["attention_mask"]
    if t <= part or not (mask is None or (torch.is_tensor(mask) and mask.ndim == 2)):
        return backbone(**inputs, return_dict=True)
    states: list[Tensor] = []
    for start in range(0, t, part):
        end = min(start + part, t)
        names = ("input_ids", "inputs_embeds", "position_ids")
        now = inputs | {name: inputs[name][:, start:end] for name in names if inputs[name] is not None}
        now["attention_mask"] = None if mask is None else mask[:, : mask.shape[1] - t + end]
        output = backbone(**now, return_dict=True)
        states = [torch.cat((*states, output.last_hidden_state), 1)[:, -kept:]]
    output.last_hidden_state = states[0]
    return output


def wants_fast_path(model: PreTrainedModel, options: GenerationConfig, mode: GenerationMode | str) -> bool:
    """Whether `generate` with these options takes the fast path; where it cannot, it says so once.

    mode: transformers' way of decoding. A cache or a compilation of one's own choice, or none, is not asked about.
    """
    chosen = options.cache_implementation is not None or options.compile_config is not None
    if chosen or options.use_cache is False or options.disable_compile:
        return False
    reason = why_plain(model, options, getattr(mode, "value", str(mode)))
    if reason and model.device.type == "cuda":
        logger.warning_once(f"generate takes its plain path, which is slower: {reason}")
    return not reason


def why_plain(model: Any, options: GenerationConfig, mode: str) -> str:
    """Why a call of `generate` with these options cannot take the fast path; empty where it can.

    mode: transformers' name of the way of decoding. The device waits meanwhile: modules are gone through once.
    """
    attention = [model.backbone.layers[index].self_attn for index in model.config.attention_layers]
    rope = getattr(model.backbone.rotary_emb, "rope_type", "default")
    if mode not in ("greedy_search", "sample") or getattr(options, "is_assistant", False):
        return f"decoding by {mode.replace('_', ' ')} reorders or takes back tokens"
    if model.training:
        return "the model is in training mode"
    if any(type(layer).__name__ not in ATTENTION for layer in attention):
        return f"{type(attention[0]).__name__} is not one that it knows"
    if attention and rope not in ROPES:
        return f"rotary frequencies of type {rope!r} change with the length"
    modules = list(model.modules())
    if getattr(model, "hf_quantizer", None) is not None or any(not is_plain(module) for module in modules):
        return "some modules are wrapped, hooked, sharded or quantized"
    devices = {p.device for module in modules for p in module._parameters.values() if p is not None}
    if len(devices) > 1 or model.device.type not in ("cpu", "cuda"):
        return "the weights lie on several devices, or on one that is no GPU of CUDA"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on, whose casts a graph would keep"
    return ""


def is_plain(module: nn.Module) -> bool:
    """Whether a module is torch's, transformers' or of this folder, and nothing stands around it."""
    own = __name__.split(".")[0]
    known = type(module).__module__.split(".")[0] in ("transformers", "transformers_modules", own)
    known = known or type(module).__module__.startswith("torch.nn.")
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return known and not hooked and all(type(p.data) is Tensor for p in module._parameters.values() if p is not None)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers; shared ones several times, which takes half the time of `parameters()`."""
    kept = (entries for module in model.modules() for entries in (module._parameters, module._buffers))
    return [tensor for entries in kept for tensor in entries.values() if tensor is not None]
