"""The numerics that teacher passes on a GPU share, on the CPU: the bias between documents, and attention under it."""

import torch

from q4kd.trainer.kernels.numerics import attention, attention_bias


def test_a_position_sees_its_own_document_up_to_itself() -> None:
    starts_BT = torch.tensor([[0, 0, 2, 2], [0, 0, 0, 0]])
    bias_B1TT = attention_bias(starts_BT, torch.float32)
    assert bias_B1TT.shape == (2, 1, 4, 4)
    for batch, rows in enumerate(starts_BT.tolist()):
        for position, start in enumerate(rows):
            seen = [0.0 if start <= other <= position else -torch.inf for other in range(4)]
            assert bias_B1TT[batch, 0, position].tolist() == seen


def test_attention_under_the_bias_is_that_of_each_document_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    q_BNTD, k_BKTD, v_BKTD = (torch.randn(1, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    together = attention(q_BNTD, k_BKTD, v_BKTD, attention_bias(torch.tensor([[0, 0, 0, 0, 4, 4]]), torch.float32))
    parts = [attention(*(one[:, :, cut] for one in (q_BNTD, k_BKTD, v_BKTD))) for cut in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-6, atol=1e-6)
