"""BM25, RECOMP and EXIT: the scores are those of the authors' code; what is kept, and what is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan
from tokenthrift.core.view import Lazy
from tokenthrift.models.embeddings import embed
from tokenthrift.text.asking import best_of_first
from tokenthrift.text.bm25_sentences import okapi, terms
from tokenthrift.text.compressed import CompressedText
from tokenthrift.text.exit import ASK, usefulness
from tokenthrift.text.passages import passages
from tokenthrift.text.runtime import compress_text
from tokenthrift.text.spans import join, sentences

from .tiny import PROSE, HashingEmbedder, language_model, scorer, tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "text"
BM25, RECOMP, EXIT = (np.load(GOLDEN / f"{name}.npz") for name in ("bm25", "recomp", "exit"))
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def run(call: str, text: str, question: str | None = None, **params: Any) -> CompressedText:
    step = next(iter(Plan.parse(call)))
    method = step.info.make(**{**step.params, **params})
    return compress_text([method], text, question, tokenizer(), Lazy(scorer), HashingEmbedder())


@pytest.mark.parametrize("name", ["bm25_sentences", "recomp_extractive", "exit"])
@pytest.mark.parametrize("question", [None, "", " \n"])
def test_no_question_is_refused_before_anything_loads(name: str, question: str | None) -> None:
    def never() -> Any:
        raise AssertionError("loaded")

    with pytest.raises(ThriftError, match=f"{name} keeps what a question needs: give one") as error:
        compress_text([Plan.parse(name).at("text")[0]], PROSE, question, tokenizer(), Lazy(never), Lazy(never))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("bm25_sentences(b=1.5)", "b from 0 to 1"),
        ("bm25_sentences(k1=-1)", "k1 and epsilon of at least 0"),
        ("recomp_extractive(top=0)", "keeps nothing"),
        ("recomp_extractive(model=3)", r"pack, folder, hub id or \(model, tokenizer\), not 3"),
        ("exit(threshold=1.5)", "is no probability"),
        ("exit(threshold=float('nan'))", "cannot read|is no probability"),
        ("exit(context=0)", "reads nothing"),
        ("exit(model='')", "not ''"),
    ],
)
def test_wrong_parameters_are_refused_when_the_plan_is_read(call: str, said: str) -> None:
    with pytest.raises(ThriftError, match=said):
        Plan.parse(call)


def test_what_only_fits_a_loaded_model_is_refused() -> None:
    with pytest.raises(ThriftError, match="an adapter into a model that it loads itself"):
        run("exit", PROSE, "Who?", model=(language_model(), tokenizer()), adapter="some/adapter")


def test_a_limit_beside_the_rate() -> None:
    text = "One is here. Two is there. Three is far. Four is gone."
    units, scores = sentences(text), [0.1, 0.4, 0.3, 0.2]
    kept = [best_of_first(text, units, scores, 1.0, tokenizer(), n) for n in (0, 1, 2, 9)]
    assert kept == [[units[1]], [units[1]], units[1:3], units]
    assert best_of_first(text, units, scores, 0.25, tokenizer(), 3) == [units[1]]


@pytest.mark.parametrize("rate", [0.3, 60])
def test_texts_in_chunks_are_chosen_from_as_a_whole(rate: float) -> None:
    """A count may be more than a chunk has: the chunk must not keep all of its sentences for that."""
    question = "Who has the keys of the porter?"
    methods = [Plan.parse(f"text=recomp_extractive(rate={rate})").at("text")[0]]
    out = compress_text(methods, PROSE, question, tokenizer(), embedder=HashingEmbedder(), chunk=40)
    assert out.tokens_after <= (rate if rate > 1 else rate * out.tokens_before + 1)
    assert "The keys are with the porter." in out.text
    limited = [Plan.parse("text=recomp_extractive(top=1)").at("text")[0]]
    with pytest.raises(ThriftError, match="leave chunk out"):
        compress_text(limited, PROSE, question, tokenizer(), embedder=HashingEmbedder(), chunk=40)


# ---- bm25_sentences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads(str(BM25["cases"])), ids=lambda c: f"{c['query'][-1]}-{c['params']}")
def test_bm25_scores_equal_those_of_rank_bm25(case: dict[str, Any]) -> None:
    got = okapi(case["query"], json.loads(str(BM25["documents"])), **case["params"])
    np.testing.assert_allclose(got, case["scores"], rtol=1e-12, atol=1e-12)


def test_bm25_of_nothing() -> None:
    assert okapi(["a"], []) == []
    assert okapi([], [["a"]]) == [0]
    assert okapi(["a"], [[], []]) == [0, 0]


def test_terms_are_lower_case_and_solid_scripts_are_cut() -> None:
    assert terms("The Rua-Nova, 14; 日本の House_2") == ["the", "rua", "nova", "14", "日", "本", "の", "house_2"]


def test_bm25_keeps_the_sentence_with_the_rare_word() -> None:
    out = run("bm25_sentences", PROSE, "Where is the PASSWORD of the safe?", rate=0.2)
    assert "- The password of the safe is blue-heron-77.\n" in out.text
    assert "Lisbon" not in out.text


# ---- recomp_extractive ----------------------------------------------------------------------------------------------


@cache
def encoder() -> BertModel:
    weights = np.load(GOLDEN / "globenc_decompx_tinybert.npz")
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    model = BertModel(config).eval()
    model.load_state_dict({k[7:]: torch.tensor(weights[k]) for k in weights if k.startswith("W:bert.")})
    return model


class Words(dict):  # type: ignore[type-arg]
    """The tokenizer of the golden file: a word is the sum of its characters."""

    def to(self, device: Any) -> Words:
        return self

    def __call__(self, texts: list[str], **_: Any) -> Words:
        rows = [[1] + [4 + sum(map(ord, w)) % 26 for w in text.split()] + [2] for text in texts]
        n = max(map(len, rows))
        return Words(
            input_ids=torch.tensor([r + [0] * (n - len(r)) for r in rows]),
            attention_mask=torch.tensor([[1] * len(r) + [0] * (n - len(r)) for r in rows]),
        )


def test_recomp_scores_equal_the_authors() -> None:
    documents, queries = (json.loads(str(RECOMP[name])) for name in ("documents", "queries"))
    embedded = embed(queries + documents, encoder(), Words(), unit=False)
    np.testing.assert_allclose(embedded[: len(queries)] @ embedded[len(queries) :].T, RECOMP["scores"], rtol=1e-5)


def test_recomp_keeps_the_sentences_of_the_highest_scores() -> None:
    documents, queries = (json.loads(str(RECOMP[name])) for name in ("documents", "queries"))
    text = "\n\n".join(documents)
    for query, scores in zip(queries, RECOMP["scores"], strict=True):
        best = sorted(np.argsort(-scores)[:2])
        out = run("recomp_extractive", text, query, rate=1.0, top=2, model=(encoder(), Words()))
        assert out.text.strip() == "\n\n".join(documents[i] for i in best)
        assert run("recomp_extractive", text, query, rate=1.0, model=(encoder(), Words())).text == text


def test_recomp_takes_the_embedder_that_is_there() -> None:
    out = run("recomp_extractive", PROSE, "Who has the keys of the porter?", top=1, rate=1.0)
    assert out.text == "- The keys are with the porter.\n"
    assert "model=<BertModel>" in run("recomp_extractive", PROSE, "Who?", model=(encoder(), Words())).method


def test_a_limit_may_save_what_the_rate_does_not() -> None:
    method = Plan.parse("text=recomp_extractive(rate=1.0, top=1)").at("text")
    out = compress_text(
        method, PROSE, "Who has the keys of the porter?", tokenizer(), embedder=HashingEmbedder(), min_saving=0.5
    )
    assert out.text == "- The keys are with the porter.\n"


# ---- exit -----------------------------------------------------------------------------------------------------------


@cache
def judge() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model of the golden file, whose tokens are characters."""
    model = LlamaForCausalLM(LlamaConfig(**json.loads(str(EXIT["config"])))).eval()
    weights = {k[2:]: torch.tensor(EXIT[k]) for k in EXIT if k.startswith("W:")}
    model.load_state_dict(weights, strict=False)
    made = Tokenizer.from_str(str(EXIT["tokenizer"]))
    return model, PreTrainedTokenizerFast(tokenizer_object=made, chat_template=GEMMA)


@pytest.mark.parametrize("case", json.loads(str(EXIT["cases"])), ids=lambda c: c["question"])
def test_exit_probabilities_equal_the_authors(case: dict[str, Any]) -> None:
    text = str(EXIT["context"])
    units = sentences(text)
    assert [join(text, [unit]).strip() for unit in units] == json.loads(str(EXIT["sentences"]))
    np.testing.assert_allclose(usefulness(text, units, case["question"], *judge()), case["yes"], atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.05, 0.3, 0.9])
def test_exit_keeps_what_the_authors_threshold_keeps(threshold: float) -> None:
    text, said = str(EXIT["context"]), json.loads(str(EXIT["sentences"]))
    for case in json.loads(str(EXIT["cases"])):
        useful = [s for s, p in zip(said, case["yes"], strict=True) if p >= threshold]
        best = [said[int(np.argmax(case["yes"]))]]  # the authors would keep nothing
        out = run("exit", text, case["question"], rate=1.0, threshold=threshold, model=judge())
        assert out.text.strip() == " ".join(useful or best)


def test_exit_reads_long_texts_in_passages() -> None:
    """Each sentence is judged in its own passage, as if the text were no longer than that."""
    text = " ".join(f"This is sentence number {i} of the text." for i in range(12))
    units = sentences(text)
    model, made = judge()
    parts = passages(text, units, made, 150)
    assert len(parts) == 4
    want = []
    for part in parts:
        alone = text[units[part.start][0] : units[part.stop - 1][1]]
        want += usefulness(alone, sentences(alone), "Why?", model, made, 1000)
    told: list[tuple[int, int]] = []
    got = usefulness(text, units, "Why?", model, made, 150, lambda *done: told.append(done))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert told[-1] == (12, 12)
    assert np.abs(np.array(got) - usefulness(text, units, "Why?", model, made)).max() > 1e-3


def test_exit_without_a_chat_template_asks_plainly() -> None:
    model = language_model(2048)
    scores = usefulness(PROSE, sentences(PROSE), "Who?", model, tokenizer())
    prompt = (
        f"<s>Query:\nWho?\nFull context:\n{PROSE.strip()}\nSentence:\n- The keys are with the porter.\n{ASK}\nAnswer:"
    )
    yes, no = (tokenizer().encode(a, add_special_tokens=False)[0] for a in (" Yes", " No"))
    if yes == no:
        pytest.skip("the tiny tokenizer has no two answers")
    ids = torch.tensor([tokenizer().encode(prompt, add_special_tokens=False)])
    with torch.no_grad():
        want = model(ids).logits[0, -1, [yes, no]].softmax(-1)[0]
    assert scores[6] == pytest.approx(float(want), abs=1e-3)


def test_exit_says_what_it_cannot_ask() -> None:
    model, made = judge()
    with pytest.raises(ThriftError, match="shorten the question") as error:
        usefulness(PROSE, sentences(PROSE), "Why? " * 1000, model, made)
    assert "\n" not in str(error.value)
    with pytest.raises(ThriftError, match="BertModel gives no token probabilities"):
        usefulness(PROSE, sentences(PROSE), "Why?", encoder(), made)


def test_passages_are_whole_units_of_even_length() -> None:
    text = "word " * 100
    units = [(i, i + 5) for i in range(0, 500, 5)]
    made = tokenizer()
    size = len(made("word ", add_special_tokens=False)["input_ids"])
    found = passages(text, units, made, 40 * size)
    assert [i for part in found for i in part] == list(range(100))
    assert [len(part) for part in found] == [34, 34, 32]
    assert passages(text, units, made, 1) == [range(i, i + 1) for i in range(100)]
    assert passages("", [], made, 10) == []


# ---- with the packs -------------------------------------------------------------------------------------------------


@pytest.mark.packs
@pytest.mark.parametrize("name", ["bm25_sentences", "recomp_extractive"])
def test_the_right_sentence_with_the_packs(name: str) -> None:
    from tokenthrift import compress

    assert "porter" in compress(PROSE, name, rate=0.3, question="Who has the keys of the front door?").text


@pytest.mark.packs
def test_exit_runs_on_the_pack() -> None:
    from tokenthrift import compress

    out = compress(PROSE, "exit", rate=0.5, question="Who has the keys?")
    assert 0 < out.tokens_after <= 0.5 * out.tokens_before + 1
