"""The student: configuration, state-space operator, mixer and language model."""

from .configuration_llamba import LlambaConfig
from .modeling_llamba import LlambaForCausalLM, LlambaMixer, LlambaModel

__all__ = ["LlambaConfig", "LlambaForCausalLM", "LlambaMixer", "LlambaModel"]
