"""The discrete Mamba-2 operator (state-space duality, arXiv 2405.21060), in plain torch.

Per head, with a_t = exp(-softplus(A_log_t)):   S_t = a_t S_{t-1} + B_t (x) x_t,   y_t = C_t^T S_t + D x_t.

Shapes: b batch, t time, H heads, G groups of B and C (H a multiple of G), R = H / G heads a group, P head width,
N state size, c chunks, Q chunk length. Decays are handled as cumulative sums of log a <= 0, in float32 or better;
`exp` only ever sees differences that are <= 0 within a document, and -inf across one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def ssd_chunked(
    x: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    chunk_size: int = 128,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a whole sequence in chunks: matrix products inside, states across.

    x [b, t, H, P], A_log [b, t, H], B and C [b, t, G, N], D [H]; resets bool [b, t] (True where a document starts:
    nothing before it is seen); initial_state [b, H, N, P]. Returns y [b, t, H, P] in x's dtype and the final state
    [b, H, N, P] in the decays' dtype. Section 6 of arXiv 2405.21060, with x not scaled by a step size.
    """
    b, t, H, P = x.shape
    G, N = B.shape[2:]
    R, Q = H // G, min(chunk_size, t)
    pad = -t % Q
    c = (t + pad) // Q
    wide = decay_dtype(x.dtype)

    # Heads before time, so that every product below is one batched matrix product on contiguous operands.
    def chunks(tensor: Tensor) -> Tensor:  # [b, t, h, w] -> [b, h, c, Q, w]
        return F.pad(tensor, (0, 0, 0, 0, 0, pad)).transpose(1, 2).unflatten(2, (c, Q))

    log_a = F.pad(-F.softplus(A_log.to(wide)), (0, 0, 0, pad)).transpose(1, 2).unflatten(2, (c, Q))
    total = log_a.cumsum(-1)  # [b, H, c, Q]
    inside, enters, leaves, passes = _document_masks(resets, b, c, Q, pad, x.device)

    xc, Bc, Cc = chunks(x), chunks(B), chunks(C)
    scores = (Cc @ Bc.transpose(-1, -2)).unflatten(1, (G, 1))  # [b, G, 1, c, Q, Q]
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~inside, -torch.inf).exp()
    weights = (scores * decay.unflatten(1, (G, R))).to(x.dtype).flatten(1, 2)  # [b, H, c, Q, Q]

    to_end = (total[..., -1:] - total).masked_fill(~leaves, -torch.inf).exp()  # [b, H, c, Q]
    Bx = (Bc.unflatten(1, (G, 1)) * to_end.unflatten(1, (G, R))[..., None]).to(x.dtype).flatten(1, 2)
    added = (Bx.transpose(-1, -2) @ xc).to(wide)  # [b, H, c, N, P]: what each chunk adds to the state
    states = _states_at_chunk_starts(added, total[..., -1], passes, initial_state)

    from_start = total.masked_fill(~enters, -torch.inf).exp()  # [b, H, c, Q]
    Cx = (Cc.unflatten(1, (G, 1)) * from_start.unflatten(1, (G, R))[..., None]).to(x.dtype).flatten(1, 2)
    y = weights @ xc + Cx @ states[:, :, :-1].to(x.dtype)
    if D is not None:
        y = y + D.to(x.dtype)[:, None, None, None] * xc
    return y.flatten(2, 3)[:, :, :t].transpose(1, 2), states[:, :, -1]


def decay_dtype(dtype: torch.dtype) -> torch.dtype:
    """Decays and states are float64 for float64 inputs, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def _document_masks(
    resets: Tensor | None, b: int, c: int, Q: int, pad: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Which pairs in a chunk see each other, which rows see the incoming state, which reach the outgoing one.

    Returns inside [.., Q, Q], enters [.., Q], leaves [.., Q] (broadcast over [b, H, c]) and, per chunk, the number
    of document starts up to its end [b, 1, c + 1] (None without resets).
    """
    causal = torch.ones(Q, Q, dtype=torch.bool, device=device).tril()
    if resets is None:
        everywhere = torch.ones(Q, dtype=torch.bool, device=device)
        return causal, everywhere, everywhere, None
    started = F.pad(resets, (0, pad)).view(b, 1, c, Q).long().cumsum(-1)  # documents begun in this chunk so far
    inside = causal & (started[..., :, None] == started[..., None, :])
    ends = F.pad(started[..., -1].cumsum(-1), (1, 0))  # [b, 1, c + 1]
    return inside, started == 0, started == started[..., -1:], ends


def _states_at_chunk_starts(
    added: Tensor, log_decay: Tensor, ends: Tensor | None, initial: Tensor | None
) -> Tensor:
    """States before each chunk and after the last: [b, H, c + 1, N, P] from what each chunk adds [b, H, c, N, P].

    One small matrix product over chunks: state k is the sum over j < k of exp(sum of log_decay from j + 1 to k - 1)
    times what chunk j added, the initial state counting as a chunk before the first. log_decay [b, H, c].
    """
    b, H, c, N, P = added.shape
    if initial is None:
        initial = torch.zeros_like(added[:, :, 0])
    sources = torch.cat((initial.to(added.dtype)[:, :, None], added), 2)  # [b, H, c + 1, N, P]
    upto = F.pad(log_decay.cumsum(-1), (1, 0))  # decay of everything before chunk k
    visible = torch.ones(c + 1, c + 1, dtype=torch.bool, device=added.device).tril()
    if ends is not None:
        visible = visible & (ends[..., :, None] == ends[..., None, :])
    decay = (upto[..., :, None] - upto[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    return (decay @ sources.flatten(3)).unflatten(3, (N, P))


def ssd_step(
    x: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: x [b, H, P], A_log [b, H], B and C [b, G, N], state [b, H, N, P].

    Returns y [b, H, P] in x's dtype and the new state.
    """
    repeat = x.shape[1] // B.shape[1]
    wide = state.dtype
    Bh, Ch = (tensor.repeat_interleave(repeat, 1).to(wide) for tensor in (B, C))
    decay = torch.exp(-F.softplus(A_log.to(wide)))[..., None, None]
    state = decay * state + Bh[..., None] * x.to(wide)[:, :, None, :]
    y = (Ch[..., None, :] @ state).squeeze(-2)
    if D is not None:
        y = y + D.to(wide)[:, None] * x.to(wide)
    return y.to(x.dtype), state


def ssd_matrix(A_log: Tensor, B: Tensor, C: Tensor, resets: Tensor | None = None) -> Tensor:
    """The sequence-mixing matrix M [b, H, t, t] with y = M x (without D): M[i, j] = C_i . B_j prod_{j<k<=i} a_k.

    A_log [b, t, H], B and C [b, t, G, N]. Quadratic in t: for short sequences (arXiv 2408.10189, section 4.1).
    """
    t, G = B.shape[1:3]
    R = A_log.shape[2] // G
    wide = decay_dtype(B.dtype)
    total = -F.softplus(A_log.to(wide)).transpose(1, 2)
    total = total.cumsum(-1)
    visible = torch.ones(t, t, dtype=torch.bool, device=B.device).tril()
    if resets is not None:
        documents = resets.long().cumsum(-1)[:, None]
        visible = visible & (documents[..., :, None] == documents[..., None, :])
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    scores = (C.transpose(1, 2) @ B.permute(0, 2, 3, 1)).to(wide)
    return (scores[:, :, None] * decay.unflatten(1, (G, R))).flatten(1, 2)
