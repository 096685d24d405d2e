"""The switch between exact and tf32 products, and where the trainer sets it."""

import pytest
import torch

from modules.products import DTYPES, fp32_products, triton_precision


def test_the_switch_is_put_back():
    def fails():
        with fp32_products("tf32"):
            assert triton_precision() == "tf32"
            with fp32_products("fp32"):
                assert triton_precision() == "tf32x3"
            assert triton_precision() == "tf32"
            raise KeyError

    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError):
        fails()
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("precision", DTYPES)
def test_kernels_go_by_it(precision):
    pytest.importorskip("triton")
    from modules.kernels import softmax, ssd

    expected = {"fp32": "tf32x3", "tf32": "tf32", "bf16": "ieee"}[precision]
    with fp32_products(precision):
        assert ssd.choose_launch(64, 64, DTYPES[precision]).precision == expected
        assert softmax.choose_launch(64, DTYPES[precision]).precision == expected
