"""Importance: who is asked, and in which portions."""

import torch

from tokenthrift.ops.importance import BLOCK, attention_received, importance
from vision.views import view


def rows_of(attention, asked):
    def rows(index):
        asked.append(index)
        return attention[:, :, index]

    return rows


def test_cls_is_asked_once():
    attention, asked = torch.rand(2, 3, 9, 9), []
    seen = view(torch.zeros(2, 9, 4), prefix=2, attention=None)
    seen.offer("attention", rows_of(attention, asked))
    for _ in range(2):
        torch.testing.assert_close(importance(seen), attention[:, :, 0].mean(1))
    assert asked == [slice(0, 1)]


def test_without_cls_all_are_asked_in_blocks():
    n = 2 * BLOCK + 5
    attention, asked = torch.rand(1, 2, n, n), []
    seen = view(torch.zeros(1, n, 4), prefix=0, attention=torch.zeros(1, 1, 1, 1))
    seen.offer("attention", rows_of(attention, asked))
    torch.testing.assert_close(importance(seen), attention.mean((1, 2)))
    torch.testing.assert_close(attention_received(seen), attention.mean(1).sum(1))
    assert max(index.stop - index.start for index in asked) == BLOCK


def test_a_first_token_that_sees_only_itself_is_not_asked():
    attention = torch.randn(2, 3, 9, 9).masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(importance(view(torch.zeros(2, 9, 4), attention=attention)), attention.mean((1, 2)))


def test_half_precision_is_summed_in_float32():
    attention = torch.rand(1, 2, 300, 300).to(torch.bfloat16)
    seen = view(torch.zeros(1, 300, 4), prefix=0, attention=attention)
    torch.testing.assert_close(importance(seen), attention.float().mean((1, 2)))
