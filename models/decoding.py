"""One token through the layers on tensors of fixed address: what a CUDA graph records, and a CPU runs as it is.

Shapes: b batch, d d_model, S the cache's capacity in tokens, h key/value heads, r query heads for each of them, w
head width; of a mixer as in mixer.py. What is kept from token to token is changed where it stands.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .layers import vector_product

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # `apply_rotary_pos_emb`


def mixer_step(layer: Any, hidden: Tensor, keys: Tensor, values: Tensor, now: Tensor) -> Tensor:
    """A block with a mixer: hidden [b, 1, d] -> [b, 1, d].

    keys [b, K-1, c] and values [b, H, N, P] move on by a token; now bool [b, 1]: False where it is padding.
    """
    hidden = hidden + layer.mixer.step(layer.input_layernorm(hidden), keys, values, now)
    return hidden + mlp_step(layer.mlp, layer.post_attention_layernorm(hidden))


def attention_step(
    layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], rotate: Rotate, keys: Tensor, values: Tensor,
    place: Tensor, visible: Tensor,
) -> Tensor:  # fmt: skip
    """A decoder layer of transformers: hidden [b, 1, d] -> [b, 1, d]; keys and values [b, h, S, w] take a token more.

    rotary: cosine and sine [b, 1, w], which `rotate` (`apply_rotary_pos_emb`) takes; place [1] is the token's place
    in the cache; visible bool [b, S]: what it sees, itself included.
    """
    attention = layer.self_attn
    query, key, value = query_key_value(attention, layer.input_layernorm(hidden), rotary, rotate)
    keys.index_copy_(2, place, key)
    values.index_copy_(2, place, value)
    y = attend(query, keys, values, visible[:, None, None], attention.scaling)
    hidden = hidden + vector_product(attention.o_proj, y)
    return hidden + mlp_step(layer.mlp, layer.post_attention_layernorm(hidden))


def query_key_value(
    attention: Any, u: Tensor, rotary: tuple[Tensor, Tensor], rotate: Rotate
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [b, h*r, 1, w], key and value [b, h, 1, w] of inputs u [b, 1, d], as Llama, Mistral, Qwen do."""
    shape = (*u.shape[:-1], -1, attention.head_dim)
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (vector_product(linear, u).view(shape) for linear in linears)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), *rotary)
    return query, key, value.transpose(1, 2)


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """One token's attention: query [b, h*r, 1, w], keys and values [b, h, S, w], visible [b, 1, 1, S]; [b, 1, h*r*w].

    On CUDA cuDNN's kernel reads the keys of a group of queries once; a CPU's is 6 times faster in bf16 with these
    queries as rows of one product, which on CUDA is 2 to 15 times slower.
    """
    if query.is_cuda:
        y = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)
    rows = query.squeeze(2).unflatten(1, (keys.shape[1], -1))  # [b, h, r, w]
    mask = visible.expand(-1, -1, rows.shape[2], -1)
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale).flatten(1)[:, None]


def mlp_step(mlp: Any, u: Tensor) -> Tensor:
    """SwiGLU of one token, u [b, 1, d] -> [b, 1, d]; a student's MLP and transformers' have the same names."""
    gate, up = vector_product(mlp.gate_proj, u), vector_product(mlp.up_proj, u)
    return vector_product(mlp.down_proj, mlp.act_fn(gate) * up)
