"""A student as one GGUF file of llama.cpp's architecture `granitehybrid`, written with gguf-py.

Written here and not by llama.cpp's converter, which leaves out rotary positions for Granite's names. Beside
`serving.granite`, rotary pairs lie side by side (queries and keys are permuted), d_inner is 2 d_model (llama.cpp ends
the process otherwise), A is -exp(A_log), and what is no large matrix is float32.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models import LlambaConfig, LlambaForCausalLM
from models.layers import CONV_WIDTH
from models.modeling_llamba import LlambaBlock
from serving.gguf_vocabulary import GgufVocabulary
from serving.granite import UNBOUNDED
from serving.standard import standard_mixer
from utils import UserError

KINDS = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
MATRICES = set("token_embd output attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down ssm_in ssm_out".split())
LLAMA_CPP_EXPAND = 2  # d_inner / d_model, the only one that it takes
ROPES = ("default", "llama3")


def gguf_package() -> Any:
    """The package gguf; a `UserError` says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("--format gguf needs the package gguf: pip install -r requirements-export.txt") from error
    return gguf


def gguf_refusals(config: LlambaConfig) -> list[str]:
    """What llama.cpp's granitehybrid has no place for, beside `serving.standard.refusals`."""
    found = []
    if len(config.attention_layers) < config.n_layer:
        if config.ssm_cfg["z_bias"] or config.ssm_cfg["bias"]:
            found.append(
                "a bias of the mixers' in_proj, which llama.cpp does not have: train with --no_z_bias, or use "
                "--format granite"
            )
        if LLAMA_CPP_EXPAND * config.d_model % config.d_inner:
            found.append(
                f"d_inner {config.d_inner} cannot be padded to 2 d_model, {2 * config.d_model}, which is llama.cpp's "
                "only size: use --format granite"
            )
    rope = _rope(config)["rope_type"]
    if rope not in ROPES:
        found.append(
            f"rotary positions of type {rope!r}: use --format granite, or a teacher with {' or '.join(ROPES)}"
        )
    return found


def _rope(config: LlambaConfig) -> dict[str, Any]:
    return (config.attention_cfg or {}).get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0}


def write_gguf(path: Path, student: LlambaForCausalLM, tokenizer: Any, kind: str) -> None:
    """Write the file: settings, tokenizer and tensors, matrices in `kind` (a key of `KINDS`)."""
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, "granitehybrid")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    add_settings(writer, student.config)
    GgufVocabulary(tokenizer).add_to(writer, student.config.vocab_size)
    for tensor_name, tensor in gguf_tensors(student):
        stored, stored_kind = encoded(tensor_name, tensor, KINDS[kind])
        writer.add_tensor(tensor_name, stored, raw_dtype=stored_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def encoded(name: str, tensor: Tensor, kind: str) -> tuple[np.ndarray, Any]:
    """A tensor's bytes and their type: matrices in `kind`, others, and rows that it does not divide, in float32."""
    gguf = gguf_package()
    wanted = gguf.GGMLQuantizationType[kind if name.removesuffix(".weight").split(".")[-1] in MATRICES else "F32"]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    if tensor.shape[-1] % block:
        wanted = gguf.GGMLQuantizationType.F32
    array = tensor.detach().float().contiguous().numpy()
    return gguf.quants.quantize(array, wanted), wanted


def add_settings(writer: Any, config: LlambaConfig) -> None:
    """The architecture's sizes; a layer is a mixer where it has no key/value heads."""
    ssm, attention = config.ssm_cfg, config.attention_cfg or {}
    head_dim = config.d_model // config.num_attention_heads if attention else ssm["d_state"]
    heads = config.d_model // head_dim
    kv = attention.get("num_key_value_heads") or heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(attention.get("max_position_embeddings") or UNBOUNDED)
    writer.add_embedding_length(config.d_model)
    kinds = [index in config.attention_layers for index in range(config.n_layer)]
    idle = idle_attention(config)
    kinds += [] if idle is None else [idle]
    writer.add_block_count(len(kinds))
    writer.add_feed_forward_length(config.mlp_cfg["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv([kv if attends else 0 for attends in kinds])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_attention_scale(head_dim**-0.5)
    writer.add_embedding_scale(1.0)
    writer.add_residual_scale(1.0)
    writer.add_logit_scale(1.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_rope_scaling_finetuned(True)  # Granite's switch for rotary positions
    writer.add_ssm_conv_kernel(CONV_WIDTH)
    writer.add_ssm_inner_size(LLAMA_CPP_EXPAND * config.d_model)
    writer.add_ssm_state_size(ssm["d_state"])
    writer.add_ssm_time_step_rank(ssm["n_v_heads"])
    writer.add_ssm_group_count(ssm["n_qk_heads"])


@torch.no_grad()
def gguf_tensors(student: LlambaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name in the file, still in its own dtype."""
    config, backbone = student.config, student.backbone
    yield "token_embd.weight", backbone.embedding.weight  # type: ignore[misc]
    yield "output_norm.weight", backbone.final_layernorm.weight
    if not config.tie_embeddings:
        yield "output.weight", student.lm_head.weight
    if _rope(config)["rope_type"] == "llama3" and config.attention_layers:
        yield "rope_freqs.weight", rope_factors(config)
    layers: list[Any] = [*backbone.layers]
    if idle_attention(config) is not None:
        layers.append(idle_layer(config))
    for index, layer in enumerate(layers):
        here = f"blk.{index}"
        yield f"{here}.attn_norm.weight", layer.input_layernorm.weight
        yield f"{here}.ffn_norm.weight", layer.post_attention_layernorm.weight
        for name in ("gate", "up", "down"):
            yield f"{here}.ffn_{name}.weight", getattr(layer.mlp, f"{name}_proj").weight
        if hasattr(layer, "self_attn"):
            yield from _attention(layer.self_attn, config, here)
        else:
            yield from _mixer(layer.mixer, config, here)


def idle_attention(config: LlambaConfig) -> bool | None:
    """Of a student whose layers are all of one kind: whether its idle layer is attention; None of a hybrid.

    llama.cpp ends the process over a granitehybrid without either kind, so one of the other is put behind the last.
    """
    if 0 < len(config.attention_layers) < config.n_layer:
        return None
    return not config.attention_layers


def idle_layer(config: LlambaConfig) -> Any:
    """A layer that adds nothing: all of its matrices are zeros."""
    kept = LlambaConfig(**{**config.to_dict(), "n_layer": 1, "attention_layers": []})
    layer: Any = LlambaBlock(kept)
    if idle_attention(config):
        del layer.mixer
        layer.self_attn = nn.Module()
        for name in "qkvo":
            layer.self_attn.add_module(f"{name}_proj", nn.Linear(config.d_model, config.d_model, bias=False))
    for parameter in layer.parameters():
        parameter.data.zero_()
    return layer


def _attention(attention: Any, config: LlambaConfig, here: str) -> Iterator[tuple[str, Tensor]]:
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for short, name in names.items():
        projection = getattr(attention, f"{short}_proj")
        for kind in ("weight", "bias"):
            tensor = getattr(projection, kind)
            if tensor is not None:
                yield f"{here}.{name}.{kind}", pairs_side_by_side(tensor, heads[short]) if short in heads else tensor


def pairs_side_by_side(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys, [heads * P, ...], whose rotary pairs (i, i + P/2) become (2i, 2i + 1)."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _mixer(mixer: Any, config: LlambaConfig, here: str) -> Iterator[tuple[str, Tensor]]:
    weights = standard_mixer(mixer, config.norm_epsilon, LLAMA_CPP_EXPAND * config.d_model // mixer.n_v_heads)
    yield f"{here}.ssm_in.weight", weights["in_proj.weight"]
    yield f"{here}.ssm_conv1d.weight", weights["conv1d.weight"].squeeze(1)
    yield f"{here}.ssm_conv1d.bias", weights["conv1d.bias"]
    yield f"{here}.ssm_dt.bias", weights["dt_bias"]
    yield f"{here}.ssm_a", -weights["A_log"].exp()[:, None]
    yield f"{here}.ssm_d", weights["D"][:, None]
    yield f"{here}.ssm_norm.weight", weights["norm.weight"].unflatten(0, (mixer.n_qk_heads, -1))
    yield f"{here}.ssm_out.weight", weights["out_proj.weight"]


def rope_factors(config: LlambaConfig) -> Tensor:
    """float32 [P / 2]: by what Llama 3's scaling divides each rotary frequency."""
    attention = config.attention_config()
    plain = 1.0 / (_rope(config)["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim))
    return plain / ROPE_INIT_FUNCTIONS["llama3"](attention, torch.device("cpu"))[0]
