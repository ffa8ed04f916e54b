"""The discrete Mamba-2 operator (state-space duality, arXiv 2405.21060), in plain torch.

Per head, with a_t = exp(l_t), l_t <= 0:   S_t = a_t S_{t-1} + B_t (x) x_t,   y_t = C_t^T S_t + D x_t.

Shapes: b batch, t time, H heads, G groups of B and C (H a multiple of G), R = H / G heads a group, P head width,
N state size, c chunks, Q chunk length. Decays are handled as cumulative sums of log a <= 0, in float32 or better;
`exp` only ever sees differences that are <= 0 within a document, and -inf across one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def ssd_chunked(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    chunk_size: int = 128,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a whole sequence in chunks: matrix products inside, states across.

    x [b, t, H, P], log_decay [b, t, H] (log a, at most 0), B and C [b, t, G, N], D [H]; resets bool [b, t] (True
    where a document starts: nothing before it is seen); initial_state [b, H, N, P]. Returns y [b, t, H, P] in x's
    dtype and the final state [b, H, N, P] in the decays' dtype. Section 6 of arXiv 2405.21060, with x as it is given.
    """
    _, t, H, _ = x.shape
    G = B.shape[2]
    R, Q = H // G, min(chunk_size, t)
    wide = decay_dtype(x.dtype)

    # Heads before time, so that every product below is one batched matrix product on contiguous operands.
    xc, Bc, Cc = (_in_chunks(tensor, Q) for tensor in (x, B, C))  # [b, H or G, c, Q, P or N]
    total = _in_chunks(log_decay.to(wide)[..., None], Q).squeeze(-1).cumsum(-1)  # [b, H, c, Q]
    inside, enters, leaves, starts = _document_masks(resets, Q, -t % Q, x.device)

    scores = (Cc @ Bc.transpose(-1, -2)).unflatten(1, (G, 1))  # [b, G, 1, c, Q, Q]
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~inside, -torch.inf).exp()
    weights = (scores * decay.unflatten(1, (G, R))).flatten(1, 2)  # [b, H, c, Q, Q]
    if D is not None:  # D x_t is one more term on the diagonal: no pass over x of its own, forward or backward
        weights = weights + D.to(wide)[:, None, None, None] * torch.eye(Q, dtype=wide, device=x.device)
    y = weights.to(x.dtype) @ xc

    to_end = (total[..., -1:] - total).masked_fill(~leaves, -torch.inf).exp()  # [b, H, c, Q]
    Bx = (Bc.unflatten(1, (G, 1)) * to_end.unflatten(1, (G, R))[..., None]).to(x.dtype).flatten(1, 2)
    added = Bx.transpose(-1, -2) @ xc  # [b, H, c, N, P]: what each chunk adds to the state
    states = _states_at_chunk_starts(added, total[..., -1], starts, initial_state)
    if states is None:
        return _merge_chunks(y, t), added[:, :, -1].to(wide)

    from_start = total.masked_fill(~enters, -torch.inf).exp()  # [b, H, c, Q]
    Cx = (Cc.unflatten(1, (G, 1)) * from_start.unflatten(1, (G, R))[..., None]).to(x.dtype).flatten(1, 2)
    y = y + Cx @ states.to(x.dtype)
    through = from_start[:, :, -1, -1, None, None]  # what is left of the last chunk's incoming state at its end
    return _merge_chunks(y, t), through * states[:, :, -1] + added[:, :, -1]


def _in_chunks(tensor: Tensor, Q: int) -> Tensor:
    """[b, t, h, w] -> [b, h, c, Q, w], contiguous, with zeros after the last token."""
    pad = -tensor.shape[1] % Q
    if pad:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, pad))
    return tensor.transpose(1, 2).unflatten(2, (-1, Q)).contiguous()


def _merge_chunks(y: Tensor, t: int) -> Tensor:
    """[b, H, c, Q, P] -> [b, t, H, P]."""
    return y.flatten(2, 3)[:, :, :t].transpose(1, 2)


def decay_dtype(dtype: torch.dtype) -> torch.dtype:
    """Decays and states are float64 for float64 inputs, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def _document_masks(
    resets: Tensor | None, Q: int, pad: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Which pairs in a chunk see each other, which rows see the incoming state, which reach the outgoing one.

    Returns inside [.., Q, Q], enters [.., Q], leaves [.., Q] (broadcast over [b, H, c]) and the number of document
    starts in each chunk [b, 1, c] (None without resets).
    """
    causal = torch.ones(Q, Q, dtype=torch.bool, device=device).tril()
    if resets is None:
        everywhere = torch.ones(Q, dtype=torch.bool, device=device)
        return causal, everywhere, everywhere, None
    started = F.pad(resets, (0, pad)).unflatten(1, (-1, Q))[:, None].int().cumsum(-1)  # in this chunk so far
    inside = causal & (started[..., :, None] == started[..., None, :])
    return inside, started == 0, started == started[..., -1:], started[..., -1]


def _states_at_chunk_starts(
    added: Tensor, log_decay: Tensor, starts: Tensor | None, initial: Tensor | None
) -> Tensor | None:
    """The state before each chunk [b, H, c, N, P] from what each chunk adds [b, H, c, N, P]; None if there is none.

    One small matrix product over chunks, in the inputs' dtype: state k is the sum over j < k of what chunk j added
    times exp(log_decay summed from j + 1 to k - 1), and the initial state (float32 or better, then so is the result)
    times exp(log_decay summed from 0 to k - 1). log_decay [b, H, c]; starts [b, 1, c] document starts in each chunk.
    """
    c = log_decay.shape[-1]
    if c == 1:
        return None if initial is None else initial[:, :, None]
    through = log_decay.cumsum(-1)
    before = F.pad(through, (1, 0))[..., :-1]
    visible = torch.ones(c, c, dtype=torch.bool, device=added.device).tril(-1)
    reached = None
    if starts is not None:
        ends = starts.cumsum(-1)
        begins = ends - starts
        visible = visible & (begins[..., :, None] == ends[..., None, :])
        reached = begins == 0
    decay = (before[..., :, None] - through[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    states = (decay.to(added.dtype) @ added.flatten(3)).unflatten(3, added.shape[3:])
    if initial is not None:
        left = before if reached is None else before.masked_fill(~reached, -torch.inf)
        states = states + left.exp()[..., None, None] * initial[:, :, None]
    return states


def ssd_step(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: x [b, H, P], log_decay [b, H], B and C [b, G, N], state [b, H, N, P].

    Returns y [b, H, P] in x's dtype and the new state.
    """
    repeat = x.shape[1] // B.shape[1]
    wide = state.dtype
    Bh, Ch = (tensor.repeat_interleave(repeat, 1).to(wide) for tensor in (B, C))
    decay = log_decay.to(wide).exp()[..., None, None]
    state = decay * state + Bh[..., None] * x.to(wide)[:, :, None, :]
    y = (Ch[..., None, :] @ state).squeeze(-2)
    if D is not None:
        y = y + D.to(wide)[:, None] * x.to(wide)
    return y.to(x.dtype), state


def ssd_step_(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """As `ssd_step`, with the state changed where it stands and products that compile into one kernel; returns y."""
    repeat = x.shape[1] // B.shape[1]
    wide = state.dtype
    if repeat > 1:
        B, C = B.repeat_interleave(repeat, 1), C.repeat_interleave(repeat, 1)
    B, C, x_wide = B.to(wide), C.to(wide), x.to(wide)
    state.mul_(log_decay.to(wide).exp()[..., None, None]).addcmul_(B[..., None], x_wide[..., None, :])
    y = torch.addcmul((C[..., None] * state).sum(-2), D.to(wide)[:, None], x_wide)
    return y.to(x.dtype)


def ssd_matrix(log_decay: Tensor, B: Tensor, C: Tensor, resets: Tensor | None = None) -> Tensor:
    """The sequence-mixing matrix M [b, H, t, t] with y = M x (without D): M[i, j] = C_i . B_j prod_{j<k<=i} a_k.

    log_decay [b, t, H], B and C [b, t, G, N]. Quadratic in t: for short sequences (arXiv 2408.10189, section 4.1).
    """
    t, G = B.shape[1:3]
    R = log_decay.shape[2] // G
    wide = decay_dtype(B.dtype)
    total = log_decay.to(wide).transpose(1, 2).cumsum(-1)
    visible = torch.ones(t, t, dtype=torch.bool, device=B.device).tril()
    if resets is not None:
        documents = resets.long().cumsum(-1)[:, None]
        visible = visible & (documents[..., :, None] == documents[..., None, :])
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    scores = (C.transpose(1, 2) @ B.permute(0, 2, 3, 1)).to(wide)
    return (scores[:, :, None] * decay.unflatten(1, (G, R))).flatten(1, 2)
