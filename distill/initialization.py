"""A student built to a teacher's sizes, its mixers started from the teacher's attention.

Softmax attention and the mixer share a shape: y_t = sum_s w(t, s) x_s with w from C_t . B_s. So queries become C,
keys B, values x, and the output projection stays. What attention lacks is chosen so that the first forward pass is
close to un-decayed linear attention and finite:

* grouped queries: key and value heads are repeated, so that every head has its own B and x;
* `expand` mixer heads for each of the attention's: copies that differ in their memory (`spread_over_copies`);
* convolution: the identity (its last tap 1), with the biases of q, k and v as its bias;
* gate: zero weights and z_bias = 1.2785, where silu is 1, so that the gate starts open and exactly neutral;
* D: zero, since attention has no skip of its own;
* biases: those of q, k and v go into the convolution's, that of the output projection (`attention_bias`) into
  out_proj's, for which in_proj gets one too, of zeros;
* norms of queries and keys (Qwen3): their weights are folded into C and B; dividing each token's query and key by its
  size has no place in a mixer, nor have rotary positions and a sliding window;
* C: queries times head_dim**-0.5, attention's own scale (`calibrate_mixers` fits the product of x, B and C);
* A_log: it has no bias, so zero weights give a decay of 0.5 a token (softplus(0) = log 2). Rows along the mean of
  the layer's normalised inputs make the decay slow on real text, with a half life fitted to each head's attention
  (`fitted_half_lives`). Too long ones make the first steps spike; `benchmarks/start.py` compares the choices.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from models import LlambaConfig, LlambaForCausalLM
from models.modeling_llamba import AttentionInputs, LlambaMixer, attention_module
from models.state_space import decay_dtype

log = logging.getLogger(__name__)

SILU_IS_ONE = 1.2784645427610738  # silu(z) = 1
HALF_LIVES = [2.0**power for power in range(9)]  # tokens, that a fit chooses from
FIT_LENGTH = 512  # tokens of a sequence that it looks at: its matrices are [b, H, t, t]


def student_config(
    teacher: PreTrainedConfig, expand: int = 1, mixer: str = "llamba", z_bias: bool = True
) -> LlambaConfig:
    """Llamba sizes for a teacher's configuration: N = head_dim, G = H = `expand` times the attention heads.

    mixer, z_bias: the entries of `ssm_cfg`.
    """
    head_dim = getattr(teacher, "head_dim", None) or teacher.hidden_size // teacher.num_attention_heads
    heads = expand * teacher.num_attention_heads
    ratio = heads * head_dim / teacher.hidden_size
    return LlambaConfig(
        vocab_size=teacher.vocab_size,
        d_model=teacher.hidden_size,
        n_layer=teacher.num_hidden_layers,
        tie_embeddings=teacher.tie_word_embeddings,
        pad_vocab_size_multiple=1,
        lm_head_bias=False,
        norm_epsilon=teacher.rms_norm_eps,
        mlp_cfg={
            "intermediate_size": teacher.intermediate_size,
            "bias": getattr(teacher, "mlp_bias", False),
            "act_fn": teacher.hidden_act,
        },
        ssm_cfg={
            "d_state": head_dim,
            "n_v_heads": heads,
            "n_qk_heads": heads,
            "expand": int(ratio) if ratio.is_integer() else ratio,
            "chunk_size": max(64, head_dim),  # 64 was 2% faster than 128 at head_dim 64 (third quality report)
            "activation": "identity",
            "bias": getattr(teacher, "attention_bias", False),  # of the output projection
            **({} if mixer == "llamba" else {"mixer": mixer}),
            **({} if z_bias else {"z_bias": False}),
        },
        bos_token_id=teacher.bos_token_id,
        eos_token_id=teacher.eos_token_id,
        pad_token_id=teacher.pad_token_id,
    )


def student_from_teacher(
    teacher: PreTrainedModel, *, dtype: torch.dtype, device: torch.device | str, **mixers: Any
) -> LlambaForCausalLM:
    """A student of the teacher's sizes with every mixer started from the teacher's attention of that layer.

    mixers: how they are, as `student_config` takes it.
    """
    with torch.device(device):
        student: Any = LlambaForCausalLM(student_config(teacher.config, **mixers))
        student.to(dtype)
    if hasattr(teacher.model.layers[0].self_attn, "q_norm"):
        log.warning(
            "the teacher's norms of queries and keys have no place in a mixer: their weights are folded into C and "
            "B, the division by each token's size is lost"
        )
    for index, layer in enumerate(student.backbone.layers):
        start_mixer(layer.mixer, teacher.model.layers[index].self_attn, teacher.config)
    return student


@torch.no_grad()
def start_mixer(mixer: LlambaMixer, attention: Any, config: PreTrainedConfig) -> None:
    """Write one attention layer's projections into a mixer, as the module's docstring says.

    q_proj [H*P, d], k_proj and v_proj [KV*P, d], o_proj [d, H*P] -> in_proj rows (x, B, C, z, A_log), out_proj. A
    mixer of E * H heads starts with E copies of each, one set of H after the other.
    """
    weight, copies = mixer.in_proj.weight, mixer.n_v_heads // config.num_attention_heads
    weight.zero_()
    weight[: mixer.d_conv].copy_(values_keys_queries(attention, config, "weight", copies))
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1.0
    mixer.conv1d.bias.zero_()
    if attention.q_proj.bias is not None:
        mixer.conv1d.bias.copy_(values_keys_queries(attention, config, "bias", copies))
    if mixer.z_bias is not None:
        mixer.z_bias.fill_(SILU_IS_ONE)
    mixer.D.zero_()
    mixer.out_proj.weight.copy_(attention.o_proj.weight.repeat(1, copies))
    if attention.o_proj.bias is not None:
        mixer.in_proj.bias.zero_()
        mixer.out_proj.bias.copy_(attention.o_proj.bias)


def values_keys_queries(attention: Any, config: PreTrainedConfig, kind: str, copies: int) -> torch.Tensor:
    """Weights or biases of v, k and q as the mixer's x, B and C have them, [3*E*H*P, ...], E copies of each head."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    v, k, q = (getattr(projection, kind) for projection in (attention.v_proj, attention.k_proj, attention.q_proj))
    v, k, q = (part.unflatten(0, (count, -1)) for part, count in ((v, groups), (k, groups), (q, heads)))
    q = q * q.shape[1] ** -0.5
    if hasattr(attention, "q_norm"):
        q, k = (part * norm.weight.view(-1, *[1] * (part.ndim - 2)) for part, norm in
                ((q, attention.q_norm), (k, attention.k_norm)))  # fmt: skip
    v, k = (part.repeat_interleave(heads // groups, 0) for part in (v, k))
    return torch.cat([part for part in (v, k, q) for _ in range(copies)]).flatten(0, 1)


@dataclass
class LayerVisit:
    """One teacher layer on the way through: its attention, what went in and what came out."""

    index: int
    attention: Any
    u: torch.Tensor  # [b, t, d], the normalised input
    attended: torch.Tensor  # [b, t, d]
    options: dict[str, Any]  # what else the attention was given: positions, rotary embedding, mask


def attention_half(layer: Any, hidden: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher layer's first half for hidden states [b, t, d]: its normalised input u and its attention's output."""
    u = layer.input_layernorm(hidden)
    return u, layer.self_attn(hidden_states=u, past_key_values=None, **options)[0]


def mlp_half(layer: Any, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Its second half: the hidden states [b, t, d] after it."""
    hidden = hidden + attended
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def visit_layers(
    backbone: Any,
    inputs: torch.Tensor,
    positions: torch.Tensor | None = None,
    halves: tuple[Any, Any] = (attention_half, mlp_half),
) -> Iterator[LayerVisit]:
    """Walk through a teacher's backbone, `teacher.model`, without gradients; one layer's tensors at a time.

    inputs int64 [b, t]; positions [b, t] restart at each document; `halves` may be compiled. The next layer runs when
    the caller asks for it. All supported architectures are pre-norm, attention then MLP.
    """
    first, second = halves
    with torch.no_grad():
        hidden = backbone.embed_tokens(inputs)
        layers = range(len(backbone.layers))
        shared = AttentionInputs(backbone.config, backbone.rotary_emb, hidden, positions, layers=layers)
    for index, layer in enumerate(backbone.layers):
        options = shared.for_layer(index)
        with torch.no_grad():
            u, attended = first(layer, hidden, options)
        yield LayerVisit(index, layer.self_attn, u, attended, options)
        with torch.no_grad():
            hidden = second(layer, hidden, attended)


@torch.no_grad()
def calibrate_mixers(
    student: LlambaForCausalLM,
    teacher: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    half_lives: tuple[float, float] | None = None,
    split: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3),
    per_head: bool = True,
) -> dict[int, float]:
    """Set each mixer's decay and the scale of its output on a few real sequences, tokens int64 [b, t].

    A_log's rows lie along the mean m of the normalised inputs, so that A_log is about `softplus^-1(ln 2 / half_life)`
    on average, with half lives (in tokens) fitted to each head's attention, and those of its further copies
    (`spread_over_copies`); or, given `half_lives`, spread evenly in their logarithm from the first head's to the
    last's. The least-squares factor between the mixer's output and the attention's, one a layer or `per_head`, goes
    into x, B and C with the exponents of `split`: with all of it in C, its weights would be so small that the first
    Adam step is many times their size (seen on SmolLM2-135M: loss 0.85 -> 17505 in one step at lr 7e-4, against 0.83
    -> 2.1 with cube roots). `benchmarks/start.py` compares the choices. Returns the relative error of each mixer's
    output. Replaced layers take no part.
    """
    errors: dict[int, float] = {}
    for visit in visit_layers(teacher.model, tokens):
        if visit.index not in student.config.attention_layers:
            mixer: Any = student.backbone.layers[visit.index].mixer
            errors[visit.index] = calibrate_mixer(mixer, visit, half_lives=half_lives, split=split, per_head=per_head)
    log.info("mixers calibrated: mean relative error %.3f", sum(errors.values()) / max(len(errors), 1))
    return errors


@torch.no_grad()
def calibrate_mixer(
    mixer: LlambaMixer,
    visit: LayerVisit,
    *,
    half_lives: tuple[float, float] | None = None,
    split: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3),
    per_head: bool = True,
) -> float:
    """`calibrate_mixers` for one mixer and the visit of its layer; returns the relative error of its output."""
    weight = mixer.in_proj.weight
    u = visit.u.to(weight.device, weight.dtype)
    wanted = visit.attended.to(weight.device, torch.float32)
    mean = visit.u.to(weight.device).float().mean(dim=(0, 1))
    if half_lives is None:
        lives = spread_over_copies(fitted_half_lives(mixer, visit), mixer.n_v_heads)
    else:
        lives = spread_half_lives(mixer.n_v_heads, half_lives).to(mean.device)
    start_decays(mixer, mean, lives)
    if mixer.z_bias is None:
        open_gate(mixer, mean)
    factor = head_factors(mixer, u, wanted, per_head)
    size = factor.abs().clamp(min=1e-6)
    scale = torch.cat([(size**exponent).repeat_interleave(mixer.d_head) for exponent in split])
    scale[: mixer.d_inner] *= factor.sign().repeat_interleave(mixer.d_head)
    weight[: len(scale)] *= scale[:, None]
    mixer.conv1d.bias *= scale
    return ((mixer(u).float() - wanted).norm() / wanted.norm().clamp(min=1e-20)).item()


def start_decays(mixer: Any, mean: torch.Tensor, lives: torch.Tensor) -> None:
    """Give the heads half lives [H], in tokens, at the mean normalised input [d].

    Of a "mamba2" mixer A dt = ln 2 / half life is shared out evenly, A = dt: a head then forgets by a step of a few
    times its usual size, and writes about as much at each. B's convolution is divided by dt at once: with a factor
    of up to 370 in B's rows each optimizer step would be as much smaller beside them (10M tokens, six attention
    layers: KL 0.2149 for A = 1 without it, 0.2082 with it, 0.2084 for A = dt; benchmarks/reports).
    """
    rows = mixer.in_proj.weight[-mixer.n_v_heads :]
    if mixer.A_log is None:
        rows.copy_(decay_rows(mean, lives))
        return
    dt = (math.log(2.0) / lives).sqrt()
    mixer.A_log.copy_(dt.log())
    mixer.dt_bias.zero_()
    rows.copy_(along(mean, torch.log(torch.expm1(dt))))
    groups = slice(mixer.d_inner, mixer.d_inner + mixer.n_qk_heads * mixer.d_state)  # B's channels
    each = dt.repeat_interleave(mixer.d_state)
    mixer.conv1d.weight[groups] /= each[:, None, None]
    mixer.conv1d.bias[groups] /= each


def open_gate(mixer: Any, mean: torch.Tensor) -> None:
    """Without a z_bias: z's rows along the mean input [d], so that the gate is about neutral on the usual token."""
    rows = mixer.in_proj.weight[mixer.d_conv : mixer.d_conv + mixer.d_inner]
    rows.copy_(along(mean, torch.full((len(rows),), SILU_IS_ONE, device=mean.device)))


def along(mean: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Rows [n, d] along the mean input [d] that give `values` [n] on it."""
    return values[:, None] * mean / mean.square().sum()


def decay_rows(mean: torch.Tensor, lives: torch.Tensor) -> torch.Tensor:
    """A_log's rows [H, d] along the mean input [d], for half lives [H] in tokens."""
    return along(mean, torch.log(torch.expm1(math.log(2.0) / lives)))


def spread_half_lives(heads: int, ends: tuple[float, float]) -> torch.Tensor:
    """[H] half lives, evenly spread in their logarithm from the first head's to the last's."""
    first, last = (math.log(tokens) for tokens in ends)
    return torch.linspace(first, last, heads).exp()


def spread_over_copies(lives: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads] half lives from those fitted to H attention heads, [H], `heads` a multiple of H.

    Each further copy of a head remembers 8 times as long as the one before, or an eighth as long where the fit is
    above 4 tokens: a short and a long memory, between which their least-squares factors (`head_factors`) choose.
    """
    step = torch.where(lives > 4, 1 / 8, 8.0)
    return torch.cat([lives * step**copy for copy in range(heads // len(lives))])


def fitted_half_lives(mixer: LlambaMixer, visit: "LayerVisit") -> torch.Tensor:
    """Of `HALF_LIVES`, for each attention head the one with which a mixer's head comes closest to it: [H], in tokens.

    Closest: y_i = sum_j 2^(-(i-j)/half life) C_i . B_j x_j explains most of o_i = sum_j softmax(q k^T)_ij x_j, by its
    best factor: the largest (y . o)^2 / (y . y), sums over the first `FIT_LENGTH` tokens of all sequences.
    """
    u = visit.u[:, :FIT_LENGTH].to(mixer.D.device, mixer.D.dtype)
    options = {
        "position_ids": visit.options["position_ids"][:, :FIT_LENGTH],
        "position_embeddings": [part[:, :FIT_LENGTH] for part in visit.options["position_embeddings"]],
    }
    weights = attention_matrix(visit.attention, visit.u[:, :FIT_LENGTH], options).to(u.device)
    heads = weights.shape[1]  # the first copies; all are alike yet
    x, B, C = (part[:, :, :heads].to(weights).transpose(1, 2) for part in mixer.project(u)[:3])  # [b, H, t, P or N]
    wanted = weights @ x
    scores = C @ B.transpose(-1, -2)
    back = torch.arange(u.shape[1], device=u.device)
    back = back[:, None] - back
    explained = []
    for life in HALF_LIVES:
        y = torch.where(back < 0, 0, scores * 2 ** (-back / life)) @ x
        explained.append((y * wanted).sum((0, 2, 3)).square() / y.square().sum((0, 2, 3)).clamp(min=1e-20))
    return torch.tensor(HALF_LIVES, device=u.device)[torch.stack(explained).argmax(0)]


def head_factors(mixer: LlambaMixer, u: torch.Tensor, wanted: torch.Tensor, per_head: bool) -> torch.Tensor:
    """Least-squares factors [H] of the heads' outputs against wanted [b, t, d]; one for all unless `per_head`.

    The normal equations come from y^T y and W^T W, since the heads' parts of the output, H times as large as it,
    would not fit at 8B.
    """
    seen: list[torch.Tensor] = []
    hook = mixer.out_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mixer(u)
    hook.remove()
    y, weight = seen[0].flatten(0, 1).to(wanted.dtype), mixer.out_proj.weight.to(wanted.dtype)  # [b*t, I], [d, I]
    if mixer.out_proj.bias is not None:
        wanted = wanted - mixer.out_proj.bias
    shape = (mixer.n_v_heads, mixer.d_head)
    products = ((weight.T @ weight) * (y.T @ y)).unflatten(1, shape).sum(-1).unflatten(0, shape).sum(1)  # [H, H]
    match = (y * (wanted.flatten(0, 1) @ weight)).sum(0).unflatten(0, shape).sum(-1)
    if not per_head:
        return (match.sum() / products.sum().clamp(min=1e-20)).expand(mixer.n_v_heads).clamp(min=1e-6)
    ridge = 1e-4 * products.diagonal().mean() * torch.eye(mixer.n_v_heads, device=y.device, dtype=y.dtype)
    return torch.linalg.solve(products + ridge, match)


def attention_matrix(attention: Any, u: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """softmax(q k^T) [b, H, t, t] of one decoder layer's attention for normalised inputs u [b, t, d].

    With rotary positions, grouped queries, q and k norms, sliding window and document boundaries. float32 or
    better. The mask is made from the positions, since flash attention is given none.
    """
    wide = decay_dtype(u.dtype)
    shape = (*u.shape[:-1], -1, attention.head_dim)
    q, k = attention.q_proj(u).view(shape), attention.k_proj(u).view(shape)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    rotate = attention_module(attention.config.model_type).apply_rotary_pos_emb
    q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *options["position_embeddings"])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * attention.scaling
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return scores.masked_fill(~visible_pairs(options["position_ids"], window), -torch.inf).softmax(-1)


def visible_pairs(position_ids: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool [b, 1, t, t]: row i sees column j of the same document, at most `window` - 1 tokens back.

    position_ids [b, t] restart at 0 where a document starts.
    """
    t = position_ids.shape[1]
    index = torch.arange(t, device=position_ids.device)
    back = index[:, None] - index
    near = (back >= 0) & (back < (window or t))
    documents = (position_ids == 0).cumsum(-1)
    return (near & (documents[:, :, None] == documents[:, None, :]))[:, None]
