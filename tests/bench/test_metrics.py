import math

import numpy as np
import pytest
import torch

from tokenthrift.bench import metrics


def test_kl_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert metrics.kl_divergence(p.log(), q.log()) == pytest.approx(by_hand, abs=1e-6)


def test_kl_equals_torch() -> None:
    p, q = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)).split([3, 4])[0], torch.randn(3, 50)
    by_torch = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert metrics.kl_divergence(p, q) == pytest.approx(float(by_torch), rel=1e-5)
    assert metrics.kl_divergence(p, p) == 0.0
    assert metrics.kl_divergence(p, p + 3.0) == pytest.approx(0.0, abs=1e-6)  # logits are up to a constant


def test_agreement_hits_and_nats() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert metrics.top1_agreement(logits, logits.flip(0)) == 0.0
    assert metrics.top1_agreement(logits, logits * 2) == 1.0
    assert metrics.hits(logits, torch.tensor([1, 1])) == 0.5
    by_hand = -(2 - math.log(1 + math.e**2 + math.e) + 0 - math.log(math.e**3 + 2)) / 2
    assert metrics.nats_per_token(logits, torch.tensor([1, 1])) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "same"), [("ab", "ab", 1.0), ("abc", "abd", 2 / 3), ("", "", 1.0), ("ab", "abcd", 0.5)]
)
def test_common_prefix(a: str, b: str, same: float) -> None:
    assert metrics.common_prefix([*map(ord, a)], [*map(ord, b)]) == same


def test_bootstrap_covers_the_true_mean() -> None:
    """95% intervals hold the true mean about 95 times in 100; the percentile bootstrap falls a little short."""
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(300):
        _, low, high = metrics.bootstrap({"x": rng.normal(1.0, 2.0, 40).tolist()}, seed, draws=500)
        inside += low <= 1.0 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_bootstrap_width_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(0, 1, 400)
    mean, low, high = metrics.bootstrap({"x": values.tolist()})
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_bootstrap_weighs_tasks_equally_and_is_deterministic() -> None:
    strata = {"a": [0.0] * 30, "b": [1.0], "none": []}
    assert metrics.bootstrap(strata) == (0.5, 0.5, 0.5)
    assert metrics.bootstrap({"a": [0, 1, 1]}, seed=3) == metrics.bootstrap({"a": [0, 1, 1]}, seed=3)
    assert math.isnan(metrics.bootstrap({})[0])
