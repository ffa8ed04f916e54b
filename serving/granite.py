"""A student as a GraniteMoeHybrid without experts, which transformers, vLLM and SGLang know by themselves.

Its residual stack is the student's with multipliers of 1; the MLP's gate and up are one matrix there.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.files import read_json, safetensors_stream, write_stream
from models import LlambaConfig, LlambaForCausalLM
from models.layers import CONV_WIDTH
from serving.folder import write_text
from serving.standard import standard_mixer
from utils import write_whole

UNBOUNDED = 131072  # positions of a student without attention layers, which has no bound of its own


def granite_config(config: LlambaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the exported model; layers by their older names, which every version reads."""
    ssm, attention = config.ssm_cfg, config.attention_cfg or {}
    head_dim = config.d_model // config.num_attention_heads if attention else ssm["d_state"]
    kinds = ["attention" if index in config.attention_layers else "mamba" for index in range(config.n_layer)]
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "layer_types": kinds,
        "use_cache": bool(config.attention_layers),  # transformers 5.23's cache takes its length from one of these
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": config.mlp_cfg["act_fn"],
        "intermediate_size": config.mlp_cfg["intermediate_size"],
        "shared_intermediate_size": config.mlp_cfg["intermediate_size"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "rms_norm_eps": config.norm_epsilon,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": head_dim**-0.5,
        "attention_bias": attention_biases(config),
        "num_attention_heads": config.d_model // head_dim,
        "num_key_value_heads": attention.get("num_key_value_heads") or config.d_model // head_dim,
        "position_embedding_type": "rope",
        "rope_parameters": attention.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": attention.get("max_position_embeddings") or UNBOUNDED,
        "mamba_n_heads": ssm["n_v_heads"],
        "mamba_n_groups": ssm["n_qk_heads"],
        "mamba_d_state": ssm["d_state"],
        "mamba_d_head": config.d_inner // ssm["n_v_heads"],
        "mamba_d_conv": CONV_WIDTH,
        "mamba_expand": config.d_inner // config.d_model,
        "mamba_chunk_size": ssm["chunk_size"],
        "mamba_conv_bias": True,
        "mamba_proj_bias": ssm["bias"] or ssm["z_bias"],
        **{name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def attention_biases(config: LlambaConfig) -> bool:
    """Whether the attention layers have biases: Qwen2's always, of q, k and v alone."""
    attention = config.attention_cfg or {}
    return bool(attention.get("attention_bias")) or attention.get("model_type") == "qwen2"


def write_granite(folder: Path, student: LlambaForCausalLM, tokenizer: Any, dtype: torch.dtype) -> bool:
    """Write configuration, weights and tokenizer: matrices in `dtype`, vectors and convolutions in float32.

    Returns whether that rounded a weight.
    """
    write_text(folder / "config.json", json.dumps(granite_config(student.config, dtype), indent=2) + "\n")
    tensors = dict(granite_tensors(student))
    stored = {name: tensor.to(dtype) if tensor.ndim == 2 else tensor.float() for name, tensor in tensors.items()}
    write_stream(folder / "model.safetensors", safetensors_stream(stored, None))
    generation = copy.deepcopy(student.generation_config)
    generation.use_cache = bool(student.config.attention_layers)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version knows
    write_whole(folder / "tokenizer_config.json", json.dumps(settings, indent=2).encode())
    return any(not torch.equal(tensors[name], tensor.to(tensors[name].dtype)) for name, tensor in stored.items())


@torch.no_grad()
def granite_tensors(student: LlambaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the exported model by its name there."""
    config, backbone = student.config, student.backbone
    yield "model.embed_tokens.weight", backbone.embedding.weight  # type: ignore[misc]
    yield "model.norm.weight", backbone.final_layernorm.weight
    if not config.tie_embeddings:
        yield "lm_head.weight", student.lm_head.weight
    for index, layer in enumerate(backbone.layers):
        here = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{here}.{norm}.weight", getattr(layer, norm).weight
        mlp: Any = layer.mlp
        both = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        yield f"{here}.shared_mlp.input_linear.weight", both
        yield f"{here}.shared_mlp.output_linear.weight", mlp.down_proj.weight
        if index in config.attention_layers:
            yield from _attention(layer.self_attn, f"{here}.self_attn", attention_biases(config))
        else:
            for name, tensor in standard_mixer(layer.mixer, config.norm_epsilon).items():  # type: ignore[arg-type]
                yield f"{here}.mamba.{name}", tensor


def _attention(attention: Any, here: str, biased: bool) -> Iterator[tuple[str, Tensor]]:
    for name in "qkvo":
        projection = getattr(attention, f"{name}_proj")
        yield f"{here}.{name}_proj.weight", projection.weight
        if biased:
            bias = projection.bias
            yield f"{here}.{name}_proj.bias", torch.zeros(len(projection.weight)) if bias is None else bias
