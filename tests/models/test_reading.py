"""Reading with a cache gives what reading anew gives, and computes only what is new."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny_models import FAMILIES, tiny
from tokenthrift.models.scoring import Scorer


class Tokenizer:
    bos_token_id = eos_token_id = 1

    def get_added_vocab(self) -> dict[str, int]:
        return {}


def scorer(family: str = "llama", **changes: Any) -> Scorer:
    return Scorer(tiny(family, **changes), Tokenizer())


@torch.inference_mode()
def anew(judge: Scorer, ids: list[int]) -> torch.Tensor:
    logits = judge.model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(ids[1:]), reduction="none")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_is_rewritten(family: str) -> None:
    judge, generator = scorer(family), torch.Generator().manual_seed(1)
    reading, kept = judge.reading(), []
    for _ in range(4):
        segment = torch.randint(3, 97, (20,), generator=generator).tolist()
        found = reading.surprise(kept + segment, 20)
        assert found.tolist() == pytest.approx(anew(judge, [1, *kept, *segment])[-20:].tolist(), abs=1e-4)
        kept += segment[::2]


def test_only_what_changed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, fed = scorer(), []
    states = judge.states
    monkeypatch.setattr(judge, "states", lambda **kw: fed.append(kw["input_ids"].shape[1]) or states(**kw))
    reading = judge.reading()
    reading.surprise(list(range(10, 60)), 50)
    reading.surprise([*range(10, 50), *range(70, 80)], 10)
    assert fed == [50, 10]
    again = reading.surprise([*range(10, 50), *range(70, 80)], 30)
    assert fed == [50, 10], "known from the first call and the second"
    assert again.tolist() == pytest.approx(anew(judge, [1, *range(10, 50), *range(70, 80)])[-30:].tolist(), abs=1e-4)
    reading.surprise([*range(10, 50), *range(70, 80)], 50)
    reading.surprise([*range(10, 50), *range(70, 85)], 7)
    assert fed == [50, 10, 5]


def test_what_nobody_asked_for_is_scored_when_somebody_does() -> None:
    judge, ids = scorer(), list(range(10, 60))
    reading = judge.reading()
    reading.surprise(ids, 5)
    assert reading.surprise(ids, 20).tolist() == pytest.approx(anew(judge, [1, *ids])[-20:].tolist(), abs=1e-4)
    assert reading.surprise(ids[:30], 30).tolist() == pytest.approx(anew(judge, [1, *ids[:30]]).tolist(), abs=1e-4)


def test_the_first_token_without_a_start() -> None:
    judge = scorer()
    nats = judge.reading(start=False).surprise([5, 6, 7], 3)
    assert nats[0] == pytest.approx(torch.tensor(97.0).log().item())
    assert nats[1:].tolist() == pytest.approx(anew(judge, [5, 6, 7]).tolist(), abs=1e-4)
    assert judge.reading(start=False).surprise([5], 1).tolist() == pytest.approx([torch.tensor(97.0).log().item()])
    assert judge.reading().surprise([], 5).tolist() == []


def test_more_tokens_than_positions() -> None:
    judge = scorer(max_position_embeddings=32)
    reading, ids = judge.reading(), [int(i) for i in torch.randint(3, 97, (100,))]
    for end in range(8, 101, 4):
        found = reading.surprise(ids[:end], 4, fixed=3)
        assert len(found) == 4 and bool(found.isfinite().all())
        assert len(reading._ids) - 1 < 32
        assert reading._ids[1:4] == ids[:3]


def test_a_start_that_was_scored_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, fed, ids = scorer(), [], list(range(10, 60))
    states = judge.states
    nats = judge.reading().surprise(ids, 50)
    monkeypatch.setattr(judge, "states", lambda **kw: fed.append(kw["input_ids"].shape[1]) or states(**kw))
    reading = judge.reading(known=(ids, nats))
    assert reading.surprise(ids[:30], 30).tolist() == nats[:30].tolist()
    assert not fed
    after = [*ids[:30:2], *ids[30:]]
    expected = anew(judge, [1, *after])[-20:].tolist()
    assert reading.surprise(after, 20).tolist() == pytest.approx(expected, abs=1e-4)
    assert fed == [35]
