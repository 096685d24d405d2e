"""State space duality over packed histories: the reference in PyTorch and the choice of kernels.

Legend: T packed tokens, B sequences, H heads of P channels, N state size, Q chunk length,
K = T / Q chunks, S read tokens. Sequence b is tokens offsets[b] to offsets[b+1]; tokens behind the
last offset are padding, where the output is 0.

    y_i = sum over j <= i of the same sequence of (C_i . B_j) exp(sum_{k=j+1..i} dt_k A) dt_j x_j
          + D x_i

which is the recurrence h_i = exp(dt_i A) h_{i-1} + dt_i x_i B_i^T, y_i = h_i C_i + D x_i, started
anew with every sequence (Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 6).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # tokens of the reference's matrix products


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
    read_S: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """The formula above in chunks, y [T, H, P], or [S, H, P] at the tokens `read_S`; TorchScript.

    Inside a chunk the sum is a masked matrix product; between chunks one state [N, H, P] is
    carried, and dropped where a sequence ends. Where few tokens are read, less than one a chunk,
    the products exist for those alone; in a program of torch.export, which is one for all sizes,
    always. `dt` is positive already, `A` negative. Computes in fp32, or in fp64 when `x` is.
    """
    tokens, heads, channels = x_THP.shape
    sequences = offsets_B1.shape[0] - 1
    kind = x_THP.dtype
    if kind != torch.float64:
        kind = torch.float32
    fill = (chunk - tokens % chunk) % chunk
    segment_T = sequence_of_tokens(offsets_B1, tokens + fill)
    x_KQHP = F.pad(x_THP.to(kind), (0, 0, 0, 0, 0, fill)).view(-1, chunk, heads, channels)
    dt_KQH = F.pad(dt_TH.to(kind), (0, 0, 0, fill)).view(-1, chunk, heads)
    B_KQN = F.pad(B_TN.to(kind), (0, 0, 0, fill)).view(-1, chunk, B_TN.shape[1])
    segment_KQ = segment_T.view(-1, chunk)
    log_decay_KQH = torch.cumsum(dt_KQH * A_H.to(kind), dim=1)

    # Between chunks: what each chunk adds to the state, and how much of the old one it keeps.
    last_K1 = segment_KQ[:, -1:]
    to_end_KQH = torch.exp(log_decay_KQH[:, -1:] - log_decay_KQH)
    to_end_KQH = dt_KQH * to_end_KQH * (segment_KQ == last_K1).unsqueeze(-1).to(kind)
    added_KNE = B_KQN.transpose(1, 2) @ (x_KQHP * to_end_KQH.unsqueeze(-1)).flatten(2)
    before_K1 = F.pad(last_K1[:-1], (0, 0, 1, 0), value=-1.0)
    kept_KH = torch.exp(log_decay_KQH[:, -1]) * (last_K1 == before_K1).to(kind)
    entering_KNE = _entering_states(added_KNE, kept_KH.repeat_interleave(channels, dim=1))
    continues_KQ = (segment_KQ == before_K1) & (segment_KQ < sequences)
    from_start_KQH = torch.exp(log_decay_KQH) * continues_KQ.unsqueeze(-1).to(kind)

    # What is read, R tokens against each of M chunks: all tokens of all chunks, or one by one.
    place_Q = torch.arange(chunk, device=x_THP.device)
    few = read_S is not None
    if few and (torch.jit.is_scripting() or not _exporting()):
        few = read_S is not None and read_S.shape[0] * chunk <= tokens
    if read_S is None or not few:
        C_MRN = F.pad(C_TN.to(kind), (0, 0, 0, fill)).view(-1, chunk, C_TN.shape[1])
        segment_MR, place_MR, x_MRHP = segment_KQ, place_Q.unsqueeze(0), x_KQHP
        log_decay_MRH, from_start_MRH = log_decay_KQH, from_start_KQH
    else:
        C_MRN = C_TN.index_select(0, read_S).to(kind).unsqueeze(1)
        segment_MR = segment_T.index_select(0, read_S).unsqueeze(1)
        place_MR = (read_S % chunk).unsqueeze(1)
        x_MRHP = x_THP.index_select(0, read_S).to(kind).unsqueeze(1)
        log_decay_MRH = log_decay_KQH.flatten(0, 1).index_select(0, read_S).unsqueeze(1)
        from_start_MRH = from_start_KQH.flatten(0, 1).index_select(0, read_S).unsqueeze(1)
        chunk_S = torch.div(read_S, chunk, rounding_mode="floor")
        x_KQHP, dt_KQH = x_KQHP.index_select(0, chunk_S), dt_KQH.index_select(0, chunk_S)
        B_KQN = B_KQN.index_select(0, chunk_S)
        segment_KQ = segment_KQ.index_select(0, chunk_S)
        log_decay_KQH = log_decay_KQH.index_select(0, chunk_S)
        entering_KNE = entering_KNE.index_select(0, chunk_S)

    # Within a chunk: (C B^T) elementwise decay, only pairs j <= i of one sequence. The others'
    # decay may be any number up to 1: beyond, exp could overflow, and 0 inf is not a number.
    inside_MR = segment_MR < sequences
    pair_MRQ = (segment_MR.unsqueeze(2) == segment_KQ.unsqueeze(1)) & inside_MR.unsqueeze(2)
    pair_MRQ = pair_MRQ & (place_MR.unsqueeze(2) >= place_Q)
    CB_MRQ = (C_MRN @ B_KQN.transpose(1, 2)).masked_fill(~pair_MRQ, 0.0)
    read_MHR, log_decay_KHQ = log_decay_MRH.transpose(1, 2), log_decay_KQH.transpose(1, 2)
    between_MHRQ = read_MHR.unsqueeze(3) - log_decay_KHQ.unsqueeze(2)
    weight_MHRQ = torch.exp(between_MHRQ.clamp(max=0.0)) * CB_MRQ.unsqueeze(1)
    y_MHRP = weight_MHRQ @ (x_KQHP * dt_KQH.unsqueeze(-1)).transpose(1, 2)

    carried_MRHP = (C_MRN @ entering_KNE).unflatten(2, (heads, channels))
    y_MRHP = torch.addcmul(y_MHRP.transpose(1, 2), carried_MRHP, from_start_MRH.unsqueeze(-1))
    D_MRH1 = (D_H.to(kind) * inside_MR.unsqueeze(-1).to(kind)).unsqueeze(-1)
    y_MRHP = torch.addcmul(y_MRHP, D_MRH1, x_MRHP)
    y_THP = y_MRHP.reshape(-1, heads, channels).to(x_THP.dtype)
    if read_S is None or few:
        return y_THP[:tokens]
    return y_THP.index_select(0, read_S)


def _entering_states(added_KNE: Tensor, kept_KE: Tensor) -> Tensor:
    """The state that each chunk starts from, [K, N, E]: 0, then kept * state + added."""
    if not torch.jit.is_scripting() and _exporting():
        return _entering_states_exported(added_KNE, kept_KE)
    # Unbound once: the gradient of indexing by k would fill a tensor of all chunks for each k. What
    # is kept stands beside each channel: with one number a head, broadcast, a step takes twice as
    # long.
    added, kept = added_KNE.unbind(0), kept_KE.unbind(0)
    state_NE = torch.zeros_like(added[0])
    entering: list[Tensor] = []
    for k in range(len(added)):
        entering.append(state_NE)
        state_NE = torch.addcmul(added[k], kept[k], state_NE)
    return torch.stack(entering)


@torch.jit.unused
def _exporting() -> bool:
    return torch.compiler.is_exporting()


@torch.jit.unused
def _entering_states_exported(added_KNE: Tensor, kept_KE: Tensor) -> Tensor:
    """`_entering_states` as one node of a program: an unrolled loop would fix the number of chunks,
    and take minutes to compile."""
    from torch._higher_order_ops.scan import scan  # there is no public name for it yet

    def following(state_NE: Tensor, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        added_NE, kept_E = chunk
        # The copy: what a step gives out must not be what it was given.
        return torch.addcmul(added_NE, kept_E, state_NE), state_NE.clone()

    _, entering_KNE = scan(following, torch.zeros_like(added_KNE[0]), (added_KNE, kept_KE))
    return entering_KNE


def causal_conv_reference(
    x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, position_T: Tensor
) -> Tensor:
    """Depthwise causal convolution and SiLU that never crosses a sequence start, [T, E].

    y_t = SiLU(bias + sum_{k<K, k <= position_t} weight[K-1-k] x_{t-k}), where `position_T` is the
    token's place in its own sequence.
    """
    width = weight_EK.shape[1]
    tokens = x_TE.shape[0]
    taps_KE = weight_EK.t().contiguous()  # a strided row would slow each product down
    y_TE = torch.addcmul(bias_E, taps_KE[width - 1], x_TE)
    padded = F.pad(x_TE, (0, 0, width - 1, 0))
    for k in range(1, width):
        inside_T1 = (position_T >= k).unsqueeze(1).to(x_TE.dtype)
        start = width - 1 - k
        y_TE = torch.addcmul(y_TE, padded[start : start + tokens] * inside_T1, taps_KE[start])
    return F.silu(y_TE).to(x_TE.dtype)


def ssd(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    D_H: Tensor,
    offsets_B1: Tensor,
    read_S: Tensor | None = None,
) -> Tensor:
    """`ssd_reference` on CPU; on CUDA the same sum by our Triton kernels, in the dtype of `x`."""
    if not x_THP.is_cuda:
        return ssd_reference(x_THP, dt_TH, A_H, B_TN, C_TN, D_H, offsets_B1, read_S)
    from modules.kernels.ssd import ssd_triton  # Triton is there only where a GPU is

    y_THP = ssd_triton(x_THP, dt_TH, A_H, B_TN, C_TN, D_H, offsets_B1)
    return y_THP if read_S is None else y_THP.index_select(0, read_S)


def causal_conv(x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, position_T: Tensor) -> Tensor:
    """`causal_conv_reference` on CPU and in TorchScript; on CUDA the same in one Triton kernel."""
    if torch.jit.is_scripting() or not x_TE.is_cuda:
        return causal_conv_reference(x_TE, weight_EK, bias_E, position_T)
    return _causal_conv_cuda(x_TE, weight_EK, bias_E, position_T)


@torch.jit.unused
def _causal_conv_cuda(
    x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, position_T: Tensor
) -> Tensor:
    from modules.kernels.conv import causal_conv_triton

    return causal_conv_triton(x_TE, weight_EK, bias_E, position_T)
