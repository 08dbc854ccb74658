"""AWRS: the authors' numbers, the exact law, unbiased weights, and what constraints look like from outside."""

from __future__ import annotations

import json
import re
from itertools import permutations
from math import exp, inf, isclose
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tokenthrift as tt
from tokenthrift.core.errors import ThriftError
from tokenthrift.decoding import rejection
from tokenthrift.decoding.awrs import Awrs, constrained_generate
from tokenthrift.decoding.particles import Population

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "decoding" / "awrs.npz")
LAWS = [(law, mask) for law in ("flat", "peaked") for mask in ("a", "b")]

# ---- one token ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["recursive", "geometric", "improper"])
@pytest.mark.parametrize(("law", "mask"), LAWS)
def test_tokens_weights_and_questions_are_those_of_the_authors_code(law, mask, algorithm):
    logp, allowed = np.log(GOLDEN[f"p_{law}"]), GOLDEN[f"mask_{mask}"]
    for seed, (token, weight, checks) in enumerate(GOLDEN[f"{law}_{mask}_{algorithm}"]):
        out = rejection.draw(logp, lambda t: bool(allowed[t]), np.random.default_rng(seed), algorithm)
        assert (out.token, out.checks) == (token, checks)
        assert isclose(out.log_weight, weight, abs_tol=1e-12)


P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


def orders():
    """Every order of drawing without replacement, with its probability."""
    for order in permutations(range(len(P))):
        chance, left = 1.0, 1.0
        for token in order:
            chance *= P[token] / left
            left -= P[token]
        yield list(order), chance


@pytest.mark.parametrize("allowed", [{1, 4}, {4}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}])
@pytest.mark.parametrize("algorithm", ["recursive", "improper"])
def test_over_all_orders_the_law_is_p_given_accepted_and_the_mean_weight_z(monkeypatch, allowed, algorithm):
    z = P[list(allowed)].sum()
    law, weighted, total = np.zeros(5), np.zeros(5), 0.0
    for order, chance in orders():
        left = P[order][::-1].cumsum()[::-1].tolist()
        monkeypatch.setattr(rejection, "_order", lambda *_, order=order, left=left: (order, left))
        out = rejection.draw(np.log(P), allowed.__contains__, np.random.default_rng(0), algorithm)
        law[out.token] += chance
        weighted[out.token] += chance * exp(out.log_weight)
        total += chance
    target = np.where([t in allowed for t in range(5)], P, 0)
    assert isclose(total, 1)
    np.testing.assert_allclose(law, target / z, atol=1e-12)
    np.testing.assert_allclose(weighted, target if algorithm == "recursive" else target / z, atol=1e-12)


@pytest.mark.parametrize("max_accepts", [2, 4])
def test_geometric_weights_are_unbiased(max_accepts):
    allowed, rng, n = {1, 4}, np.random.default_rng(1), 6000
    outs = [rejection.draw(np.log(P), allowed.__contains__, rng, "geometric", max_accepts) for _ in range(n)]
    weights = np.array([[exp(out.log_weight) * (out.token == t) for t in (1, 4)] for out in outs])
    error = weights.std(0) / n**0.5
    assert (error < 0.004).all()
    np.testing.assert_array_less(abs(weights.mean(0) - P[[1, 4]]), 4 * error)
    ones = sum(out.token == 1 for out in outs)
    assert abs(ones / n - 0.3 / 0.35) < 4 * (0.122 / n) ** 0.5  # off by 0.02: seen with a chance of 0.9


def test_a_rare_token_is_found_with_its_weight():
    logp = np.log(np.array([1 - 1e-9 - 1e-12, 1e-9, 1e-12]))
    out = rejection.draw(logp, {2}.__contains__, np.random.default_rng(0), "recursive")
    assert out.token == 2 and isclose(exp(out.log_weight), 1e-12, rel_tol=1e-6)
    for algorithm in ("geometric", "improper"):
        assert rejection.draw(logp, {2}.__contains__, np.random.default_rng(0), algorithm).token == 2


def test_nothing_accepted_is_said_after_one_question_a_token():
    for algorithm in ("recursive", "geometric", "improper"):
        asked = []
        out = rejection.draw(np.log(P), asked.append, np.random.default_rng(0), algorithm)
        assert out.log_weight == -inf and sorted(asked) == [0, 1, 2, 3, 4] and out.checks == 5


def test_what_the_law_forbids_is_never_asked():
    logp = np.array([np.log(0.5), np.log(0.5), -736.0, -inf])
    asked = set()
    for algorithm in ("recursive", "geometric", "improper"):
        rejection.draw(logp, lambda t: bool(asked.add(t)), np.random.default_rng(0), algorithm)
    assert asked == {0, 1}
    with pytest.raises(ThriftError, match="no token a probability"):
        rejection.draw(np.full(4, -inf), asked.__contains__, np.random.default_rng(0))
    with pytest.raises(ThriftError, match="not by 'quick'"):
        rejection.draw(logp, asked.__contains__, np.random.default_rng(0), "quick")


def test_everything_allowed_costs_two_questions():
    for seed in range(20):
        out = rejection.draw(np.log(P), lambda t: True, np.random.default_rng(seed))
        assert out.checks == 2 and isclose(out.log_weight, 0, abs_tol=1e-12)


# ---- sequences ------------------------------------------------------------------------------------------------------

END = 1


def allowed(prefix, token):
    """A dead end for most that begin with 2; later tokens depend on earlier ones."""
    if token == END:
        return len(prefix) == 2
    if len(prefix) == 1 and prefix[0] == 2:
        return token == 3
    return len(prefix) < 2 and token % 2 == 0


def enumerate_law(model, prompt):
    """p(x) of all texts of two tokens and an end that are allowed."""
    vocab = model.config.vocab_size
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        rows = torch.tensor([[*prompt, t] for t in range(vocab)])
        second = model(rows).logits[:, -1].double().softmax(-1)
        pairs = [(a, b) for a in range(vocab) for b in range(vocab) if allowed((), a) and allowed((a,), b)]
        third = model(torch.tensor([[*prompt, a, b] for a, b in pairs])).logits[:, -1].double().softmax(-1)
    return {
        (a, b, END): float(first[a] * second[a, b] * third[i, END])
        for i, (a, b) in enumerate(pairs)
        if END not in (a, b)
    }


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("algorithm", ["recursive", "geometric"])
def test_particles_are_properly_weighted(llama, algorithm, threshold):
    prompt, runs = [5, 7, 2], 250
    law = enumerate_law(llama, prompt)
    z = sum(law.values())
    likely = max(law, key=law.get)
    totals, hits = np.zeros(runs), np.zeros(runs)
    for seed in range(runs):
        out = constrained_generate(
            llama,
            None,
            prompt,
            allowed,
            particles=6,
            ess_threshold=threshold,
            algorithm=algorithm,
            max_new_tokens=3,
            seed=seed,
            generate={"eos_token_id": END, "pad_token_id": 0},
        )
        totals[seed] = exp(out.log_evidence)
        for tokens, weight, complete in zip(out.tokens, out.weights, out.complete, strict=True):
            assert weight == 0 or (complete and tuple(tokens) in law)
            hits[seed] += totals[seed] * weight * (tuple(tokens) == likely)
    for seen, true in ((totals, z), (hits, law[likely])):
        error = seen.std() / runs**0.5
        assert error < 0.2 * true
        assert abs(seen.mean() - true) < 4 * error


def test_greedy_is_greedy_under_a_mask(model, prompts):
    def odd(prefix, token):
        return token % 3 != len(prefix) % 3

    rows = [prompts(seed, length) for seed, length in enumerate((14, 9))]
    ids = torch.tensor([[0] * (14 - len(r)) + r for r in rows])
    mask = (torch.arange(14) >= 14 - torch.tensor([[14], [9]])).long()
    masked = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda _, text: [t for t in range(24) if odd(text[14:], t)],
    )
    with tt.apply(tt.Plan(decode=Awrs(constraint=odd)), model) as session:
        ours = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert ours.tolist() == masked.tolist()
    record = session.records["decode"]
    assert record.tokens_before == record.tokens_after == 12 and record.extra["checks"] >= 24


def test_the_law_of_a_sampled_row_in_a_padded_batch(llama, prompts):
    """300 draws a row: a chi-square test that sees a token's share off by 0.1 with a chance above 0.9."""
    rows, allowed = [prompts(0, 12), prompts(1, 7)], {2, 3, 5, 7}
    ids = torch.tensor([[0] * (12 - len(r)) + r for r in rows])
    mask = (torch.arange(12) >= 12 - torch.tensor([[12], [7]])).long()
    made = Awrs(constraint=lambda prefix, token: token in allowed, seed=3)
    with tt.apply(tt.Plan(decode=made), llama):
        out = llama.generate(
            ids.repeat(300, 1), attention_mask=mask.repeat(300, 1), do_sample=True, top_k=0, max_new_tokens=1
        )
    for i, row in enumerate(rows):
        p = llama(torch.tensor([row])).logits[0, -1].softmax(-1)[sorted(allowed)]
        p = (p / p.sum()).detach().numpy()
        counts = np.array([(out[i::2, -1] == t).sum() for t in sorted(allowed)])
        assert counts.sum() == 300
        assert ((counts - 300 * p) ** 2 / (300 * p)).sum() < 16.3  # 0.1% at 3 degrees of freedom


def test_the_same_seed_gives_the_same_text(llama):
    def run(seed):
        return constrained_generate(llama, None, [3, 4], lambda p, t: t % 2 == 0, seed=seed, max_new_tokens=10).tokens

    assert run(1) == run(1) != run(2)


def test_resampling_keeps_the_evidence_and_copies_by_weight():
    population = Population.at(None, 4)
    population.tokens = [[0], [1], [2], [3]]
    population.log_weights = np.log([0.5, 0.25, 1e-9, 0.25 - 1e-9])
    before = population.log_evidence
    assert 2 < population.effective < 3
    drawn = population.resample(np.random.default_rng(0))
    assert isclose(population.log_evidence, before) and population.effective == pytest.approx(4)
    assert drawn.count(0) == 2 and [[t] for t in drawn] == population.tokens


def test_dead_particles_are_replaced(llama):
    """Half of the first tokens lead nowhere."""
    out = constrained_generate(
        llama, None, [3, 4], lambda p, t: not p or p[0] % 2 == 0, particles=16, max_new_tokens=6, seed=0
    )
    assert all(tokens[0] % 2 == 0 for tokens in out.tokens) and sum(out.weights) == pytest.approx(1)


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_a_constraint_that_nothing_satisfies_is_an_error_and_no_loop(llama):
    asked = []
    with pytest.raises(ThriftError, match="after 0 tokens the constraint accepts no token"):
        constrained_generate(llama, None, [3], lambda p, t: asked.append(t), particles=2)
    assert len(asked) == 48
    with pytest.raises(ThriftError, match="after 4 tokens"):
        constrained_generate(llama, None, [3], lambda p, t: len(p) < 4)
    with (
        tt.apply(tt.Plan(decode=Awrs(constraint=lambda p, t: len(p) < 4)), llama),
        pytest.raises(ThriftError, match="after 4 tokens"),
    ):
        llama.generate(torch.tensor([[3], [4]]), do_sample=False, max_new_tokens=8)
    assert "generate" not in vars(llama)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("awrs()", "awrs needs one of"),
        ("awrs(regex='a', json_schema='{}')", "awrs needs one of"),
        ("awrs(regex='a', particles=0)", "particles of at least 1"),
        ("awrs(regex='a', ess_threshold=1.5)", "from 0 to 1"),
        ("awrs(regex='a', max_accepts=1)", "max_accepts of at least 2"),
        ("awrs(regex='a', algorithm='best')", "not 'best'"),
        ("awrs(json_schema='{nope')", "neither JSON nor the path"),
        ("awrs(json_schema='nowhere.json')", "neither JSON nor the path"),
        ("awrs(constraint=3)", "a constraint is a callable"),
    ],
)
def test_bad_parameters(plan, message):
    with pytest.raises(ThriftError, match=message):
        tt.Plan.parse(f"decode={plan}")


def test_bad_calls(llama):
    made = Awrs(constraint=lambda p, t: True, particles=2)
    with tt.apply(tt.Plan(decode=made), llama):
        ids = torch.tensor([[3, 4]])
        for options, message in (
            ({"do_sample": False}, "do_sample=True"),
            ({"do_sample": True, "num_beams": 2}, "num_beams"),
            ({"do_sample": True, "use_cache": False}, "use_cache"),
            ({"do_sample": True, "output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ):
            with pytest.raises(ThriftError, match=message):
                llama.generate(ids, max_new_tokens=4, **options)
    with pytest.raises(ThriftError, match="prompt is empty"):
        constrained_generate(llama, None, [], lambda p, t: True)
    with pytest.raises(ThriftError, match="needs the tokenizer"):
        constrained_generate(llama, None, [3], lambda p, t: True, text=True)


# ---- text and grammars ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker():
    """A random model of bytes, and its tokenizer."""
    vocab = {"<pad>": 0, "<eos>": 1}
    for char in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[char] = len(vocab)
    vocab |= {"12": len(vocab), "tr": len(vocab) + 1}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("1", "2"), ("t", "r")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab) + 2,  # padded, as many models are
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def test_a_rule_on_text_sees_whole_characters(speaker):
    model, tokenizer = speaker
    asked = set()

    def accept(text, more):
        asked.add(more)
        return len(text) == 4 if not more else len(text) + len(more) <= 4 and more in "12é"

    usual = {*tokenizer("13x2é").input_ids, *tokenizer("12").input_ids, 1}
    others = [t for t in range(len(tokenizer) + 2) if t not in usual]
    out = constrained_generate(
        model, tokenizer, "ab", accept, text=True, particles=24, max_new_tokens=12, generate={"suppress_tokens": others}
    )
    assert all(out.complete[i] and re.fullmatch("[12é]{4}", out.texts[i]) for i, w in enumerate(out.weights) if w)
    assert any("é" in text for text, weight in zip(out.texts, out.weights, strict=True) if weight)
    assert asked >= {"", "1", "2", "é", "12", "3", "x"} and "\ufffd" not in asked  # never asked about half of one


def test_regex(speaker):
    pytest.importorskip("llguidance")
    model, tokenizer = speaker
    for seed in range(5):
        out = constrained_generate(model, tokenizer, "n:", regex="-?[0-9]{3,4}(true|x)", seed=seed, particles=3)
        assert out.complete == [True] * 3
        assert all(re.fullmatch("-?[0-9]{3,4}(true|x)", text) for text in out.texts)
    with tt.apply("decode=awrs(regex='[0-9]{3}|no')", model, tokenizer) as session:
        for sample in (False, True):
            ids = tokenizer(["ab", "xy"], return_tensors="pt")
            out = model.generate(**ids, do_sample=sample, max_new_tokens=9, **({"top_k": 0} if sample else {}))
            for text in tokenizer.batch_decode(out[:, 2:], skip_special_tokens=True):
                assert re.fullmatch("[0-9]{3}|no", text)
    assert session.records["decode"].extra["complete"] == 4
    assert session.records["decode"].extra["log_evidence"] < -5


def test_json_schema(speaker, tmp_path):
    pytest.importorskip("llguidance")
    model, tokenizer = speaker
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 12, 123]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    for source in (schema, json.dumps(schema), str(path)):
        made = Awrs(json_schema=source, seed=0)
        with tt.apply(tt.Plan(decode=made), model, tokenizer):
            out = model.generate(**tokenizer("ab", return_tensors="pt"), do_sample=False, max_new_tokens=120)
        said = tokenizer.decode(out[0, 2:], skip_special_tokens=True)
        if out[0, -1] == 1:
            data = json.loads(said)
            assert set(data) == {"ok", "n"} and isinstance(data["ok"], bool) and data["n"] in (1, 12, 123)
        else:
            assert re.match(r"\s*\{", said)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"regex": "(ab"}, "the regex constraint cannot be used"),
        ({"json_schema": '{"type": "nope"}'}, "Invalid type"),
        ({"json_schema": '{"allOf": [{"type": "string"}, {"type": "integer"}]}'}, "Unsatisfiable"),
        ({"regex": r"[^\s\S]"}, "accepts no token"),
    ],
)
def test_grammars_that_cannot_be_satisfied(speaker, params, message):
    pytest.importorskip("llguidance")
    with pytest.raises(ThriftError, match=message):
        constrained_generate(*speaker, "ab", **params)


def test_without_the_library_the_extra_is_named(speaker, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ThriftError, match=r"pip install 'tokenthrift\[constrained\]'"):
        constrained_generate(*speaker, "ab", regex="a+")
