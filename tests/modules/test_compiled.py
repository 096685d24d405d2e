"""The programs that are compiled against the encoder; compiled: trainer/test_export_compiled.py."""

import pytest
import torch

from data.compiled import FORWARD, STEP
from modules.compiled import programs
from modules.encoder import Encoder
from modules.ssd import CHUNK


@pytest.mark.parametrize(
    ("kind", "restore_order"),
    [("causal", False), ("bidirectional", False), ("bidirectional", True)],
)
@torch.no_grad()
def test_programs_answer_as_the_encoder_at_any_size(kind, restore_order):
    torch.manual_seed(1)
    config = {"kind": kind, "width": 16, "layers": 2, "state": 4, "head": 8, "expand": 2}
    config |= {"conv": 4, "dropout": 0.1, "norm_embedding": True, "beta": 0.5}
    encoder = Encoder(**config, restore_order=restore_order).eval()
    for weight in encoder.parameters():  # the initial ones hardly move the residual stream
        weight.add_(0.1 * torch.randn_like(weight))
    found = programs(config | {"restore_order": restore_order}, encoder)
    assert set(found) == ({FORWARD, STEP} if kind == "causal" else {FORWARD})
    forward = found[FORWARD].module()
    for chunks, lengths in ((3, [1, 95]), (5, [CHUNK, 0, CHUNK + 1, 2 * CHUNK]), (40, [3] * 400)):
        x_KQD, offsets_B1 = torch.randn(chunks, CHUNK, 16), torch.tensor([0, *lengths]).cumsum(0)
        read_S = torch.randperm(int(offsets_B1[-1]))[: len(lengths) + 1]
        expected_SD = encoder(x_KQD.flatten(0, 1), offsets_B1, read_S)
        torch.testing.assert_close(forward(x_KQD, offsets_B1, read_S), expected_SD)
    if kind == "causal":
        x_BD, state_BF = torch.randn(7, 16), torch.rand(7, encoder.state_numbers)
        expected = encoder.step(x_BD, state_BF)
        torch.testing.assert_close(found[STEP].module()(x_BD, state_BF), expected)
