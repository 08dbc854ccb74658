"""Self-information: against a plain forward, over windows and batches, and where the tokens lie."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AddedToken

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.scoring import LOGITS, Embedder, Scorer, document_start

from ..text.tiny import PROSE, language_model, tokenizer


def plain_nats(text: str, model: object) -> list[float]:
    """Token by token from the logits of one forward over <s> and the text."""
    ids = torch.tensor([[0, *tokenizer()(text)["input_ids"]]])
    with torch.inference_mode():
        log_p = model(ids).logits[0].log_softmax(-1)
    return [-float(log_p[t, ids[0, t + 1]]) for t in range(ids.shape[1] - 1)]


def test_equals_a_plain_forward() -> None:
    model = language_model(512)
    text = PROSE.strip()
    scored = Scorer(model, tokenizer()).self_information(text)
    torch.testing.assert_close(torch.tensor([x for *_, x in scored]), torch.tensor(plain_nats(text, model)))
    assert [(a, b) for a, b, _ in scored] == Scorer(model, tokenizer()).token_spans(text)


@pytest.mark.parametrize("biased", [False, True])
def test_the_vocabulary_in_parts(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = language_model(512), PROSE.strip()
    if biased:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-3, 3, 400))
    monkeypatch.setitem(LOGITS, "cpu", 1)
    scorer = Scorer(model, tokenizer())
    assert scorer._head is model.lm_head
    scored = scorer.self_information(text)
    torch.testing.assert_close(torch.tensor([x for *_, x in scored]), torch.tensor(plain_nats(text, model)))


def test_a_head_that_is_more_than_its_weight_is_asked_for_its_logits() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(states)

    model, text = language_model(512), "He stayed for years"
    model.lm_head.__class__ = Doubled
    scorer = Scorer(model, tokenizer())
    assert scorer._head is None
    scored = scorer.self_information(text)
    torch.testing.assert_close(torch.tensor([x for *_, x in scored]), torch.tensor(plain_nats(text, model)))


def test_segments_are_scored_each_on_its_own_whatever_the_batches() -> None:
    model, segments = language_model(512), [(0, 33), (33, 96), (96, 97), (97, 240)]
    expected = [x for a, b in segments for x in plain_nats(PROSE[a:b].rstrip() or PROSE[a:b], model)]
    for batch_tokens in (1, 50, 4096):
        scored = Scorer(model, tokenizer(), batch_tokens=batch_tokens).self_information(PROSE, segments)
        torch.testing.assert_close(torch.tensor([x for *_, x in scored]), torch.tensor(expected))
        assert scored[0][0] == 0
        assert scored[-1][1] == 240


def test_windows_give_every_token_at_least_the_overlap_as_context() -> None:
    model, text = language_model(512), PROSE.strip()
    ids = tokenizer()(text)["input_ids"]
    scored = Scorer(model, tokenizer(), window=32, overlap=8).self_information(text)
    assert len(scored) == len(ids) > 100
    at = 31 + 2 * 23  # the first fresh token of the fourth window
    with torch.inference_mode():
        log_p = model(torch.tensor([[0, *ids[at - 8 : at]]])).logits[0, -1].log_softmax(-1)
    assert scored[at][2] == pytest.approx(-float(log_p[ids[at]]), rel=1e-4)


def test_a_text_far_longer_than_the_positions() -> None:
    progress: list[tuple[int, int]] = []
    scored = Scorer(
        language_model(64), tokenizer(), progress=lambda done, total: progress.append((done, total))
    ).self_information(PROSE * 10)
    assert all(math.isfinite(nats) and nats >= 0 for *_, nats in scored)
    assert progress[-1] == (len(scored), len(scored))
    assert scored[-1][1] == len(PROSE * 10)


def test_without_bos_and_eos_the_first_token_is_a_guess_among_all() -> None:
    model, text = language_model(512), "He did not like the heat"
    scored = Scorer(model, tokenizer(special=False)).self_information(text, [(0, 6), (6, 24), (5, 6)])
    assert scored[0][2] == pytest.approx(math.log(400))
    ids = torch.tensor([tokenizer()(text[:6])["input_ids"]])
    with torch.inference_mode():
        log_p = model(ids).logits[0].log_softmax(-1)
    assert scored[1][2] == pytest.approx(-float(log_p[0, ids[0, 1]]), rel=1e-4)


def test_a_model_that_changes_its_logits_after_the_head_is_asked_for_its_logits() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=1.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    scorer = Scorer(model, tokenizer())
    assert scorer._head is None
    scored = scorer.self_information("He stayed for years")
    torch.testing.assert_close(
        torch.tensor([x for *_, x in scored]), torch.tensor(plain_nats("He stayed for years", model))
    )


def test_nothing_to_score() -> None:
    scorer = Scorer(language_model(), tokenizer())
    assert scorer.self_information("") == []
    assert scorer.self_information("", []) == []
    assert [(a, b) for a, b, _ in scorer.self_information(" \n ")] == scorer.token_spans(" \n ")


def test_a_model_without_an_output_head() -> None:
    with pytest.raises(ThriftError, match="LlamaModel gives no token probabilities"):
        Scorer(language_model().model, tokenizer())


def test_the_start_of_a_document_is_not_that_of_a_chat_turn() -> None:
    chat = AddedToken("<|endoftext|>")
    named = copy.deepcopy(tokenizer())
    named.add_special_tokens({"additional_special_tokens": [chat]})
    assert document_start(named) == named.convert_tokens_to_ids("<|endoftext|>") != named.bos_token_id
    assert document_start(tokenizer()) == 0
    assert document_start(tokenizer(special=False)) is None


@pytest.mark.packs
def test_the_packs() -> None:
    from tokenthrift.models.packs import load

    scorer = Scorer(*load("smollm2-135m"))
    text = "The capital of France is Paris. The capital of France is Wednesday."
    nats = {text[a:b]: x for a, b, x in scorer.self_information(text, [(0, 32), (32, 67)])}
    assert nats[" Paris"] < 2 < 6 < nats[" Wednesday"]
    near, far = Embedder(*load("minilm-l6")).embed(["A cat sleeps.", "A kitten naps."]), "GDP rose."
    other = Embedder(*load("minilm-l6")).embed([far])
    assert near[0] @ near[1] > near[0] @ other[0]


def test_scoring_is_not_among_the_forwards_that_a_session_counts() -> None:
    seen: list[object] = []
    model = language_model(512)
    hook = model.register_forward_hook(lambda *call: seen.append(call))
    Scorer(model, tokenizer()).self_information(PROSE)
    hook.remove()
    assert not seen
