"""A `mamba2` mixer as standard Mamba-2 (arXiv 2405.21060), which is what serving engines compute, without a loss.

Ours                                              Standard (GraniteMoeHybrid, llama.cpp's granitehybrid)
x, B, C, z, raw = W u                             z, x, B, C, raw = W' u
x, B, C = conv(x, B, C)                           x, B, C = silu(conv'(x, B, C))
dt = softplus(raw + dt_bias)                      the same
S_t = exp(-exp(A_log) dt) S_{t-1} + dt B (x) x    the same
y = C S + D x                                     y = C S + D' x
out = W_o (y * silu(z + z_bias))                  out = W_o (rmsnorm(y * silu(z)) * w)

* silu(v) = v / 2 + v^2 / 4 - ... is v / 2 for tiny v. With conv' = e conv, weights and bias, x, B and C come out as
  e/2 times ours; the error is e |v| / 2 of it.
* C S has one factor each of C, B and x: it is (e/2)^3 times ours. D x has one: D' = (e/2)^2 D makes y so, too.
* rmsnorm(g) = g / sqrt(mean(g^2) + eps): g^2 is far below eps, so it is g / sqrt(eps), over groups or not, and
  w = sqrt(eps) (2/e)^3 gives ours back.
* z_bias is a bias of in_proj's rows of z; the other rows' and out_proj's biases are then zeros.

e is a power of two, so that no weight loses a digit, in bfloat16 neither; the one rounded factor is sqrt(eps). With
e = 2^-30 y is about 2^-93, and float32 and bfloat16 hold whole digits down to 2^-126. float16 holds none of it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models import LlambaConfig
from models.modeling_llamba import LlambaMixer

LINEAR = 2.0**-30  # e above
HALF = LINEAR / 2


@torch.no_grad()
def standard_mixer(mixer: LlambaMixer, epsilon: float, width: int | None = None) -> dict[str, Tensor]:
    """The weights of a mixer in standard form, by their usual names, matrices in the mixer's dtype.

    epsilon: of the model's norms. Vectors (biases, dt_bias, A_log, D, norm.weight) and the convolution are float32.
    in_proj.weight [2I + 2GN + H, d] in the order z, x, B, C, dt, with in_proj.bias and out_proj.bias where the mixer
    has them or a z_bias; conv1d.weight [I + 2GN, 1, K]; norm.weight [I]; out_proj.weight [d, I]. `width`: of a head,
    P or more; what exceeds P are zeros in x, z and out_proj, which no output sees.
    """
    heads, narrow = mixer.n_v_heads, mixer.d_head
    width = width or narrow
    weights = {
        "in_proj.weight": _standard_order(mixer, mixer.in_proj.weight),
        "conv1d.weight": mixer.conv1d.weight.float() * LINEAR,
        "conv1d.bias": mixer.conv1d.bias.float() * LINEAR,
        "dt_bias": mixer.dt_bias.float(),
        "A_log": mixer.A_log.float(),
        "D": mixer.D.float() * HALF**2,
        "out_proj.weight": wider_heads(mixer.out_proj.weight, 1, heads, narrow, width),
        "norm.weight": torch.full((heads * width,), epsilon**0.5 * HALF**-3),
    }
    if mixer.in_proj.bias is not None or mixer.z_bias is not None:
        weights["in_proj.bias"] = _in_proj_bias(mixer)
        zeros = torch.zeros(mixer.out_proj.out_features)
        weights["out_proj.bias"] = zeros if mixer.out_proj.bias is None else mixer.out_proj.bias.float()
    for name in ("in_proj.weight", "in_proj.bias"):  # z and x
        if name in weights:
            weights[name] = wider_heads(weights[name], 0, 2 * heads, narrow, width)
    for name in ("conv1d.weight", "conv1d.bias"):  # x
        weights[name] = wider_heads(weights[name], 0, heads, narrow, width)
    return weights


def _standard_order(mixer: LlambaMixer, rows: Tensor) -> Tensor:
    """in_proj's rows x, B, C, z, dt in the order z, x, B, C, dt."""
    xBC, z, dt = rows.split([mixer.d_conv, mixer.d_inner, mixer.n_v_heads])
    return torch.cat((z, xBC, dt))


def _in_proj_bias(mixer: LlambaMixer) -> Tensor:
    bias = mixer.in_proj.bias
    found = torch.zeros(mixer.in_proj.out_features) if bias is None else bias.float()
    ordered = _standard_order(mixer, found)
    if mixer.z_bias is not None:
        ordered[: mixer.d_inner] += mixer.z_bias.float()
    return ordered


def wider_heads(tensor: Tensor, dim: int, heads: int, narrow: int, width: int) -> Tensor:
    """The first heads * narrow entries of a dimension as heads of `width`, filled with zeros; the rest as it is."""
    if width == narrow:
        return tensor
    first, rest = tensor.split([heads * narrow, tensor.shape[dim] - heads * narrow], dim)
    parted = first.unflatten(dim, (heads, narrow)).movedim(dim + 1, -1)
    filled = F.pad(parted, (0, width - narrow)).movedim(-1, dim + 1)
    return torch.cat((filled.flatten(dim, dim + 1), rest), dim)


def refusals(config: LlambaConfig) -> list[str]:
    """Why no engine would compute what a student of this configuration does; each with what would be right."""
    ssm, mlp, attention = config.ssm_cfg, config.mlp_cfg, config.attention_cfg or {}
    heads = config.num_attention_heads
    found = []
    if len(config.attention_layers) < config.n_layer:
        if ssm["mixer"] != "mamba2":
            found.append("its mixers do not scale x by a step size as the engines' do: train with --mixer mamba2")
        if ssm["activation"] != "identity":
            found.append(f"activation {ssm['activation']!r} after the convolution: only 'identity' has an exact form")
        if config.d_inner % config.d_model:
            found.append(f"d_inner {config.d_inner} is no multiple of d_model {config.d_model}")
    if config.attention_layers:
        if attention["model_type"] == "qwen3":
            found.append("norms of queries and keys, which the engines' attention does not have")
        if any(config.layer_types[index] == "sliding_attention" for index in config.attention_layers):
            found.append("a sliding window, which the engines' attention does not have")
        if config.head_dim * heads != config.d_model:
            found.append(f"head_dim {config.head_dim} is not d_model / heads, {config.d_model} / {heads}")
    if mlp["bias"] or config.lm_head_bias:
        found.append("biases in the MLP or the head, which the engines' do not have")
    if mlp["act_fn"] != "silu":
        found.append(f"the MLP's activation {mlp['act_fn']!r}: the engines' is silu")
    return found
