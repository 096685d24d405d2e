"""State space duality over packed histories: the reference in PyTorch and the choice of kernels.

Legend: T packed tokens, B sequences, H heads of P channels, N state size, Q chunk length,
K = T / Q chunks. Sequence b is tokens offsets[b] to offsets[b+1]; tokens behind the last offset
are padding, where the output is 0.

    y_i = sum over j <= i of the same sequence of (C_i . B_j) exp(sum_{k=j+1..i} dt_k A) dt_j x_j
          + D x_i

which is the recurrence h_i = exp(dt_i A) h_{i-1} + dt_i x_i B_i^T, y_i = h_i C_i + D x_i, started
anew with every sequence (Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 6).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_of_tokens(offsets_B1: Tensor, tokens: int) -> Tensor:
    """The sequence that each of `tokens` tokens belongs to, int64 [T]; B for padding."""
    position_T = torch.arange(tokens, device=offsets_B1.device, dtype=offsets_B1.dtype)
    return torch.bucketize(position_T, offsets_B1[1:].contiguous(), right=True)


def ssd_reference(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    D_H: Tensor,
    offsets_B1: Tensor,
    chunk: int = 32,
) -> Tensor:
    """The formula above in chunks, y [T, H, P]; any length, any device, TorchScript.

    Inside a chunk the sum is a masked matrix product; between chunks one state [H, P, N] is
    carried, and dropped where a sequence ends. `dt` is positive already, `A` negative. Computes
    in fp32, or in fp64 when `x` is.
    """
    tokens, heads, channels = x_THP.shape
    kind = x_THP.dtype
    if kind != torch.float64:
        kind = torch.float32
    segment_T = sequence_of_tokens(offsets_B1, tokens)
    padding_T = segment_T == offsets_B1.shape[0] - 1

    fill = (chunk - tokens % chunk) % chunk
    x_KQHP = F.pad(x_THP.to(kind), (0, 0, 0, 0, 0, fill)).view(-1, chunk, heads, channels)
    dt_KQH = F.pad(dt_TH.to(kind), (0, 0, 0, fill)).view(-1, chunk, heads)
    B_KQN = F.pad(B_TN.to(kind), (0, 0, 0, fill)).view(-1, chunk, B_TN.shape[1])
    C_KQN = F.pad(C_TN.to(kind), (0, 0, 0, fill)).view(-1, chunk, C_TN.shape[1])
    segment_KQ = F.pad(segment_T, (0, fill), value=float(offsets_B1.shape[0])).view(-1, chunk)

    log_decay_KQH = torch.cumsum(dt_KQH * A_H.to(kind), dim=1)
    xdt_KQHP = x_KQHP * dt_KQH.unsqueeze(-1)

    # Within a chunk: (C B^T) elementwise decay, only pairs j <= i of one sequence.
    i = torch.arange(chunk, device=x_THP.device)
    pair_KQQ = (segment_KQ.unsqueeze(2) == segment_KQ.unsqueeze(1)) & (i.unsqueeze(1) >= i)
    log_decay_KHQ = log_decay_KQH.transpose(1, 2)
    between_KHQQ = log_decay_KHQ.unsqueeze(3) - log_decay_KHQ.unsqueeze(2)
    between_KHQQ = between_KHQQ.masked_fill(~pair_KQQ.unsqueeze(1), -float("inf"))
    weight_KHQQ = (C_KQN @ B_KQN.transpose(1, 2)).unsqueeze(1) * torch.exp(between_KHQQ)
    y_KHQP = weight_KHQQ @ xdt_KQHP.transpose(1, 2)

    # Between chunks: what each chunk adds to the state, and how much of the old one it keeps.
    last_K1 = segment_KQ[:, -1:]
    to_end_KQH = torch.exp(log_decay_KQH[:, -1:] - log_decay_KQH)
    to_end_KQH = to_end_KQH * (segment_KQ == last_K1).unsqueeze(-1).to(kind)
    added_KHPN = torch.einsum("kqhp,kqn->khpn", xdt_KQHP * to_end_KQH.unsqueeze(-1), B_KQN)
    before_K1 = F.pad(last_K1[:-1], (0, 0, 1, 0), value=-1.0)
    kept_KH = torch.exp(log_decay_KQH[:, -1]) * (last_K1 == before_K1).to(kind)
    # Unbound once: the gradient of indexing by k would fill a tensor of all chunks for each k.
    added, kept = added_KHPN.unbind(0), kept_KH.unsqueeze(2).unsqueeze(3).unbind(0)
    state_HPN = torch.zeros_like(added[0])
    entering: list[Tensor] = []
    for k in range(len(added)):
        entering.append(state_HPN)
        state_HPN = torch.addcmul(added[k], kept[k], state_HPN)
    entering_KHPN = torch.stack(entering)

    from_start_KQH = torch.exp(log_decay_KQH) * (segment_KQ == before_K1).unsqueeze(-1).to(kind)
    carried_KHQP = C_KQN.unsqueeze(1) @ entering_KHPN.transpose(2, 3)
    y_KHQP = y_KHQP + carried_KHQP * from_start_KQH.transpose(1, 2).unsqueeze(-1)

    y_THP = y_KHQP.transpose(1, 2).reshape(-1, heads, channels)[:tokens]
    y_THP = y_THP + D_H.to(kind).view(-1, 1) * x_THP.to(kind)
    return y_THP.masked_fill(padding_T.view(-1, 1, 1), 0.0).to(x_THP.dtype)


def causal_conv_reference(
    x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, position_T: Tensor
) -> Tensor:
    """Depthwise causal convolution and SiLU that never crosses a sequence start, [T, E].

    y_t = SiLU(bias + sum_{k<K, k <= position_t} weight[K-1-k] x_{t-k}), where `position_T` is the
    token's place in its own sequence.
    """
    width = weight_EK.shape[1]
    tokens = x_TE.shape[0]
    y_TE = torch.addcmul(bias_E, weight_EK[:, width - 1], x_TE)
    padded = F.pad(x_TE, (0, 0, width - 1, 0))
    for k in range(1, width):
        inside_T1 = (position_T >= k).unsqueeze(1).to(x_TE.dtype)
        start = width - 1 - k
        y_TE = torch.addcmul(y_TE, padded[start : start + tokens] * inside_T1, weight_EK[:, start])
    return F.silu(y_TE).to(x_TE.dtype)


def ssd(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    D_H: Tensor,
    offsets_B1: Tensor,
) -> Tensor:
    """`ssd_reference` on CPU; on CUDA the same sum by our Triton kernels, in the dtype of `x`."""
    if not x_THP.is_cuda:
        return ssd_reference(x_THP, dt_TH, A_H, B_TN, C_TN, D_H, offsets_B1)
    from modules.kernels.ssd import ssd_triton  # Triton is there only where a GPU is

    return ssd_triton(x_THP, dt_TH, A_H, B_TN, C_TN, D_H, offsets_B1)
