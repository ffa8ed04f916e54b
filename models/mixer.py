"""What stands in attention's place: convolution, state-space operator and gate.

Shapes: b batch, t time, d d_model, I d_inner, H x-heads, G B/C-heads, P = I / H, N state size, K convolution width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .cache import MixerState
from .configuration_llamba import LlambaConfig
from .layers import CONV_WIDTH, CausalConv1d, FilledLinear, vector_product
from .state_space import decay_dtype, ssd_chunked, ssd_step, ssd_step_


class LlambaMixer(nn.Module):
    """Mamba-2: in_proj -> causal convolution -> state-space operator -> gate -> out_proj.

    `ssm_cfg["mixer"]`: "llamba", the discrete form that is published, log a_t = -softplus(A_log_t); or "mamba2", the
    form of arXiv 2405.21060, which others serve: dt_t = softplus(raw_t + dt_bias), log a_t = -exp(A_log) dt_t, and
    what enters the state is multiplied by dt_t (on B's side: each head has its own).
    """

    def __init__(self, config: LlambaConfig):
        super().__init__()
        ssm = config.ssm_cfg
        self.d_inner, self.d_state, self.chunk_size = config.d_inner, ssm["d_state"], ssm["chunk_size"]
        self.n_v_heads, self.n_qk_heads = ssm["n_v_heads"], ssm["n_qk_heads"]
        self.d_head = self.d_inner // self.n_v_heads
        groups = self.n_qk_heads * self.d_state
        self.d_conv = self.d_inner + 2 * groups
        self.in_proj_rows = (self.d_inner, groups, groups, self.d_inner, self.n_v_heads)  # x, B, C, z, A_log
        self.in_proj = FilledLinear(config.d_model, sum(self.in_proj_rows), bias=ssm["bias"])
        self.z_bias = nn.Parameter(torch.zeros(self.d_inner)) if ssm["z_bias"] else None
        self.dt_bias: Any = None
        self.A_log: Any = None
        if ssm["mixer"] == "mamba2":
            self.dt_bias = nn.Parameter(torch.zeros(self.n_v_heads))
            self.A_log = nn.Parameter(torch.zeros(self.n_v_heads))
        self.conv1d: Any = CausalConv1d(self.d_conv)
        self.D = nn.Parameter(torch.ones(self.n_v_heads))
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=ssm["bias"])
        self.activation = nn.Identity() if ssm["activation"] == "identity" else ACT2FN[ssm["activation"]]

    def project(
        self, u: Tensor, resets: Tensor | None = None, mask: Tensor | None = None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [b,t,H,P], B and C [b,t,G,N], log a [b,t,H], z [b,t,I], and the convolution's inputs [b,K-1+t,..].

        u [b, t, d]; resets bool [b, t]; mask [b, t] is 0 at padding; past [b, K-1, I+2GN] precedes the sequence.
        """
        xBC, z, raw = self._project_in(u)
        if mask is not None:
            xBC = xBC * mask[..., None].to(xBC.dtype)
        padded = F.pad(xBC, (0, 0, CONV_WIDTH - 1, 0)) if past is None else torch.cat((past, xBC), dim=1)
        mixed = self.activation(self.conv1d(padded, resets))
        if mask is not None:
            mixed = mixed * mask[..., None].to(mixed.dtype)
        groups = self.n_qk_heads * self.d_state
        x, B, C = mixed.split([self.d_inner, groups, groups], dim=-1)
        x = x.unflatten(-1, (self.n_v_heads, self.d_head))
        B, C = (part.unflatten(-1, (self.n_qk_heads, self.d_state)) for part in (B, C))
        log_decay, dt = self._log_decay(raw)
        if dt is not None:
            B = (B * dt[..., None]).to(B.dtype)
        return x, B, C, log_decay, z, padded

    def _log_decay(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """log a_t and the step sizes dt_t (None for "llamba"), both [b, t, H] in float32 or better."""
        wide = decay_dtype(raw.dtype)
        if self.A_log is None:
            return -F.softplus(raw.to(wide)), None
        dt = F.softplus(raw.to(wide) + self.dt_bias.to(wide))
        return -torch.exp(self.A_log.to(wide)) * dt, dt

    def _project_in(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """in_proj's xBC [b, t, I+2GN], z [b, t, I] and what the decays come from [b, t, H]."""
        filled = isinstance(self.in_proj, FilledLinear)  # an adapter around it knows nothing of the rows filled in
        projected = self.in_proj(u, keep_fill=True) if filled else self.in_proj(u)
        rows = [self.d_conv, self.d_inner, self.n_v_heads]
        xBC, z, raw, _ = projected.split([*rows, projected.shape[-1] - sum(rows)], dim=-1)
        return xBC, z, raw

    def decays(self, u: Tensor) -> Tensor:
        """a_t for inputs u [b, t, d]: [b, t, H], float32 or better."""
        rows = self.in_proj.weight[-self.n_v_heads :]
        bias = None if self.in_proj.bias is None else self.in_proj.bias[-self.n_v_heads :]
        return self._log_decay(F.linear(u, rows, bias))[0].exp()

    def forward(
        self,
        u: Tensor,
        resets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MixerState | None = None,
    ) -> Tensor:
        """u [b, t, d] -> [b, t, d]; `cache` is read and replaced by the state after the last token."""
        past = state = None
        if cache is not None and cache.is_initialized:
            past, state = cache.keys, cache.values
        x, B, C, log_decay, z, padded = self.project(u, resets, attention_mask, past)
        if state is not None and u.shape[1] == 1:
            y, state = ssd_step(x[:, 0], log_decay[:, 0], B[:, 0], C[:, 0], self.D, state)
            y = y[:, None]
        else:
            y, state = ssd_chunked(
                x, log_decay, B, C, self.D, chunk_size=self.chunk_size, resets=resets, initial_state=state
            )
        if cache is not None:
            # A copy: a view would keep the convolution's inputs of the whole prompt alive.
            cache.update(padded[:, -(CONV_WIDTH - 1) :].clone(), state)
            cache.advance(u.shape[1])
        return self.out_proj(y.flatten(2) * self._gate(z))

    def step(self, u: Tensor, keys: Tensor, values: Tensor, now: Tensor | None = None) -> Tensor:
        """One token, u [b, 1, d] -> [b, 1, d], in few operations that fuse; what is kept changes where it stands.

        keys [b, K-1, I+2GN]: the last inputs of the convolution; values [b, H, N, P]: the state; now bool [b, 1]:
        False where the token is padding.
        """
        xBC, z, raw = vector_product(self.in_proj, u).split([self.d_conv, self.d_inner, self.n_v_heads], dim=-1)
        if now is not None:
            xBC = xBC * now[..., None]
        window = torch.cat((keys, xBC), dim=1)  # [b, K, I+2GN]
        mixed = self.activation(self.conv1d(window)[:, 0])
        if now is not None:
            mixed = mixed * now
        keys.copy_(window[:, 1:])
        groups = self.n_qk_heads * self.d_state
        x, B, C = mixed.split([self.d_inner, groups, groups], dim=-1)
        x = x.unflatten(-1, (self.n_v_heads, self.d_head))
        B, C = (part.unflatten(-1, (self.n_qk_heads, self.d_state)) for part in (B, C))
        log_decay, dt = self._log_decay(raw[:, 0])
        if dt is not None:
            B = (B * dt[..., None]).to(B.dtype)
        y = ssd_step_(x, log_decay, B, C, self.D, values)
        return vector_product(self.out_proj, y.flatten(1)[:, None] * self._gate(z))

    def _gate(self, z: Tensor) -> Tensor:
        return F.silu(z if self.z_bias is None else z + self.z_bias.to(z.dtype))
