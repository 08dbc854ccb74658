"""Budgets of heads from what they hold."""

from __future__ import annotations

import torch

from tokenthrift.ops.head_budgets import budgets_for_mass, budgets_for_mean, needed_shares

HELD = ((0.5, 0.9, 0.95, 0.98, 1.0), (0.1, 0.2, 0.4, 0.7, 1.0), (0.8, 0.8, 0.8, 0.8, 1.0))


def test_a_head_needs_the_share_at_which_it_holds_the_mass():
    held = torch.tensor(HELD)
    torch.testing.assert_close(needed_shares(held, 0.7), torch.tensor([0.125, 0.75, 0.0]))
    torch.testing.assert_close(needed_shares(held, 0.9), torch.tensor([0.25, 0.75 + 0.25 * 2 / 3, 0.875]))
    assert needed_shares(held, 0.0).tolist() == [0, 0, 0]
    assert needed_shares(held, 1.0).tolist() == [1, 1, 1]


def test_budgets_for_a_mass():
    assert budgets_for_mass(HELD, 80, 0.7, 6) == [10, 60, 6]
    assert budgets_for_mass(HELD, 4, 0.7, 6) == [4, 4, 4]
    assert budgets_for_mass(HELD, 80, 1, 6) == [80, 80, 80]


def test_budgets_for_a_mean_hold_one_mass_and_have_the_exact_sum():
    held = (*HELD[:2], (0.3, 0.4, 0.5, 0.6, 1.0))
    budgets = budgets_for_mean(held, 8000, 3000, 6)
    assert sum(budgets) == 9000
    at = [(head, *divmod(n / 2000, 1)) for head, n in zip(held, budgets, strict=True)]
    masses = [head[int(step)] + part * (head[int(step) + 1] - head[int(step)]) for head, step, part in at]
    assert max(masses) - min(masses) < 1e-3
    low, high = budgets_for_mean(held, 8000, 2000, 6), budgets_for_mean(held, 8000, 7000, 6)
    assert all(a < b < c for a, b, c in zip(low, budgets, high, strict=True))


def test_bounds_of_budgets_for_a_mean():
    assert min(budgets_for_mean(HELD, 100, 20, 10)) == 10 and sum(budgets_for_mean(HELD, 100, 20, 10)) == 60
    assert budgets_for_mean(HELD, 100, 5, 10) == [5, 5, 5]
    assert budgets_for_mean(HELD, 100, 100, 10) == [100, 100, 100]
    assert sum(budgets_for_mean(HELD, 100, 99, 10)) == 297 and max(budgets_for_mean(HELD, 100, 99, 10)) == 100
