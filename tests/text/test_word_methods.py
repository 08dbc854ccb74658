"""TCRA, FrugalPrompt, SpecPC on text, random words, summaries: what each of them scores, keeps and refuses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan
from tokenthrift.core.view import Lazy
from tokenthrift.models.attributing import decompx_of, embedding_parts, globenc_of, label_parts
from tokenthrift.ops.tokens import count_tokens
from tokenthrift.text.compressed import CompressedText
from tokenthrift.text.frugal_prompt import FrugalPrompt, unit_range
from tokenthrift.text.runtime import compress_text
from tokenthrift.text.spans import join, sentences, words
from tokenthrift.text.specpc_text import SpecPCText
from tokenthrift.text.summarise import summarise
from tokenthrift.text.tcra import TCRA, distances

from .tiny import PROSE, HashingEmbedder, language_model, scorer, sequence_classifier, tokenizer


def run(call: str, text: str, question: str | None = None, embedder: Any = None, **params: Any) -> CompressedText:
    step = next(iter(Plan.parse(call)))
    method = step.info.make(**{**step.params, **params})
    return compress_text([method], text, question, tokenizer(), Lazy(scorer), embedder or HashingEmbedder())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("tcra(rounds=0)", "rounds and window of at least 1"),
        ("frugal_prompt(attribution=lime)", "knows attribution='decompx'"),
        ("frugal_prompt(compat=percentage)", "compat='budget', 'percent'"),
        ("frugal_prompt(compat=percent, rate=20)", "needs a rate such as 0.5"),
        ("frugal_prompt(label=-1)", "label of at least 0"),
        ("frugal_prompt(window=2)", "window of at least 4"),
        ("frugal_prompt(model=3)", "hub id"),
        ("specpc_text(pool=median)", "pool='max', 'mean' and 'none'"),
        ("specpc_text(reduction=sum)", "reduction='max' and 'mean'"),
        ("specpc_text(window=0)", "window, kernel and context of at least 1"),
        ("specpc_text(first_layer=-1)", "first_layer of at least 0"),
    ],
)
def test_wrong_parameters_are_refused_when_the_plan_is_read(call: str, said: str) -> None:
    with pytest.raises(ThriftError, match=said) as error:
        Plan.parse(call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tcra", "frugal_prompt", "specpc_text", "recomp_extractive", "exit"])
@pytest.mark.parametrize(("text", "rate"), [(PROSE, 1.0), (PROSE, 10_000), ("One", 0.1), ("", 0.5)])
def test_what_keeps_everything_asks_no_model(name: str, text: str, rate: float) -> None:
    class Never:
        def __getattr__(self, name: str) -> Any:
            if name in ("model", "tokenizer"):
                return None  # it may be loaded
            raise AssertionError(name)

    method = Plan.parse(name).at("text")[0].info.make(rate=rate)
    assert compress_text([method], text, "Who?", tokenizer(), Never(), Never()).text == text


# ---- random_words ---------------------------------------------------------------------------------------------------


def test_random_words_differ_by_seed_and_are_spread() -> None:
    text = " ".join(f"word{i}" for i in range(400))
    kept = [run("random_words", text, rate=0.5, seed=seed).kept for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    for half in (range(len(text) // 2), range(len(text) // 2, len(text))):
        share = sum(b - a for a, b in kept[0] if a in half) / len(half)
        assert 0.4 < share < 0.6


# ---- tcra -----------------------------------------------------------------------------------------------------------


class Counting(HashingEmbedder):
    def __init__(self) -> None:
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str], unit: bool = True) -> Tensor:
        self.asked += texts
        return super().embed(texts, unit)


def test_tcra_distances_are_those_of_the_text_without_each_word() -> None:
    text = "keys keys keys porter"
    units, embedder = words(text), HashingEmbedder()
    whole = embedder.embed([text])[0]
    moved = [1 - float(embedder.embed([join(text, [u for u in units if u != unit])])[0] @ whole) for unit in units]
    mean = sum(moved) / len(moved)
    assert distances(text, units, embedder) == pytest.approx([m / mean for m in moved], rel=1e-4)
    assert distances(text, [], embedder) == []
    assert run("tcra", text, rate=0.4).text.strip() == "porter"


def test_tcra_reads_whole_sentences_together() -> None:
    embedder = Counting()
    run("tcra(window=60)", PROSE, rate=0.5, embedder=embedder)
    units = words(PROSE)
    parts = TCRA(window=60).passages(PROSE, units, tokenizer())
    assert [i for part in parts for i in part] == list(range(len(units)))
    assert len(embedder.asked) == len(units) + len(parts)
    starts = {start for start, _ in sentences(PROSE)}
    assert all(units[part.start][0] in starts or PROSE[units[part.start][0]].isspace() for part in parts)
    assert all(count_tokens(tokenizer(), join(PROSE, [units[i] for i in part])) <= 60 for part in parts)


def test_tcra_scores_again_in_every_round() -> None:
    """Of two words that mean the same, each can be spared, but not both: one round drops both."""

    class Meaning(HashingEmbedder):
        def embed(self, texts: Sequence[str], unit: bool = True) -> Tensor:
            return super().embed([re.sub(r"\b(big|large)( (big|large))?\b", "big", t) for t in texts], unit)

    text = "big large house garden"
    one, two = (run(f"tcra(rounds={r})", text, rate=0.6, embedder=Meaning()).text.split() for r in (1, 2))
    assert not {"big", "large"} & set(one)
    assert {"big", "large"} & set(two)


# ---- frugal_prompt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribution", ["decompx", "globenc"])
@pytest.mark.parametrize("label", [0, 1])
def test_frugal_scores_are_the_sums_over_pieces(attribution: str, label: int) -> None:
    """Each sentence by itself, as the paper says it; here all words are plain, so pieces are easily told apart."""
    text = "The porter has the keys. Nobody remembers the password of the safe. He stayed for eleven years."
    model, made = sequence_classifier()
    got = FrugalPrompt(attribution=attribution, label=label).salience(text, words(text), model, made)
    want: list[float] = []
    for span in sentences(text):
        inputs = made(join(text, [span]).strip(), return_tensors="pt")
        inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        if attribution == "globenc":
            raw = globenc_of(model, inputs)[0, 0]
        else:
            raw = label_parts(model, decompx_of(model, inputs))[0, :, label]
        scores = ((raw - raw.min()) / (raw.max() - raw.min())).tolist()
        merged: list[float] = []
        for piece, score in zip(made.convert_ids_to_tokens(inputs["input_ids"][0]), scores, strict=True):
            if piece.startswith("##"):
                merged[-1] += score
            else:
                merged.append(score)
        if attribution == "globenc":
            merged = [(m - min(merged)) / (max(merged) - min(merged)) for m in merged]
        want += merged[1:-1]  # without [CLS] and [SEP]
    assert got == pytest.approx(want, abs=1e-4)


def test_frugal_percent_keeps_a_share_of_the_words() -> None:
    model, made = sequence_classifier()
    text = "The porter has the keys. Nobody remembers the password of the safe."
    out = run("frugal_prompt(compat=percent)", text, rate=0.6, model=(model, made))
    scores = FrugalPrompt().salience(text, words(text), model, made)
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])[: round(len(scores) * 0.6)]
    assert out.text == join(text, [words(text)[i] for i in sorted(ranked)])


def test_frugal_takes_the_embedding_where_there_is_no_classifier() -> None:
    model, made = sequence_classifier()
    text = "The porter has the keys."
    inputs = {k: v for k, v in made(text, return_tensors="pt").items() if k != "token_type_ids"}
    parts = embedding_parts(decompx_of(model.bert, inputs), inputs["attention_mask"])[0]
    whole = model.bert(**inputs).last_hidden_state.mean(1).norm()
    assert float(parts.sum()) == pytest.approx(float(whole), rel=1e-4)
    got = FrugalPrompt().of_tokens(model.bert, inputs)[0]
    assert got.tolist() == pytest.approx(parts.tolist(), rel=1e-4)


def test_frugal_cuts_long_sentences_and_says_what_it_cannot_read() -> None:
    model, made = sequence_classifier()
    text = "porter " * 300
    out = run("frugal_prompt(window=20)", text, rate=0.5, model=(model, made))
    assert 0 < out.tokens_after <= out.tokens_before / 2 + 1
    with pytest.raises(ThriftError, match="label=7"):
        run("frugal_prompt(label=7)", PROSE, model=(model, made))
    with pytest.raises(ThriftError, match="LlamaForCausalLM is no BERT-type encoder"):
        run("frugal_prompt", PROSE, model=(language_model(), made))


def test_unit_range() -> None:
    assert unit_range(torch.tensor([2.0, -1.0, 0.5])).tolist() == [1.0, 0.0, 0.5]
    assert unit_range(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


# ---- specpc_text ----------------------------------------------------------------------------------------------------


def attention_of(ids: list[int], rows: int) -> list[Tensor]:
    model = language_model(2048)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return [layer[0, :, -rows:] for layer in found]


def test_specpc_words_have_the_attention_of_the_questions_tokens() -> None:
    text, question = "The porter has the keys. He stayed for eleven years.", "Who has the keys?"
    units, made = words(text), tokenizer()
    method = SpecPCText(kernel=1, pool="none", weighted=False, first_layer=1)
    got = method.attended(text, units, question, language_model(2048), made)
    ids = made.encode(text, add_special_tokens=False)
    asked = made.encode(f"\n\n{question}", add_special_tokens=False)[:]
    start = made.bos_token_id
    layer = attention_of([start, *ids, *asked], len(asked))[1]
    scores = layer.amax((0, 1))[1 : len(ids) + 1].tolist()
    ends = made(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for (a, b), score in zip(units, got, strict=True):
        assert score == pytest.approx(max(s for s, (_, e) in zip(scores, ends, strict=True) if a < e <= b), abs=1e-5)


def test_specpc_without_a_question_keeps_the_end() -> None:
    out = run("specpc_text(window=5)", PROSE, rate=0.3, model=(language_model(2048), tokenizer()))
    assert out.text.endswith("-77.\n")


def test_specpc_reads_long_texts_in_equal_parts() -> None:
    """In the part that it lies in, a text's score is what it is alone."""
    text = "The porter has the keys. He stayed.\n" * 2
    half = len(text) // 2
    model, made = language_model(2048), tokenizer()
    n = count_tokens(made, text)
    method = SpecPCText(context=(n + 1) // 2)
    both = method.attended(text, words(text), "Who?", model, made)
    alone = SpecPCText().attended(text[:half], words(text[:half]), "Who?", model, made)
    both[len(alone)] = alone[0]  # the line break before this word is in the part before
    assert both == pytest.approx(alone * 2, abs=1e-5)


def test_specpc_says_what_it_cannot_read() -> None:
    with pytest.raises(ThriftError, match="shorten the question or choose another model"):
        run("specpc_text", PROSE, "Why? " * 100)
    with pytest.raises(ThriftError, match="first_layer=9: the draft model has 2 layers"):
        run("specpc_text(first_layer=9)", PROSE, "Why?", model=(language_model(2048), tokenizer()))
    with pytest.raises(ThriftError, match="cannot draft for specpc_text"):
        run("specpc_text", PROSE, "Why?", model=(torch.nn.Linear(2, 2), tokenizer()))


def test_specpc_in_a_session_with_a_reduced_cache() -> None:
    """The session's own model drafts; its cache stage has no part in that, and no forward is counted."""
    from tokenthrift import apply

    model = language_model(2048)
    want = run("specpc_text", PROSE, "Who?", rate=0.4, model=(model, tokenizer())).kept
    with apply("text=specpc_text(rate=0.4) cache=knorm(budget=8)", model, tokenizer()) as session:
        got = session.compress(PROSE, question="Who?").kept
    assert got == want
    assert session.report().forwards == 0


# ---- summarise ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_summaries_are_written_passage_by_passage(writer: Path) -> None:
    out = summarise(PROSE, str(writer), rate=0.2, window=60)
    again = summarise(PROSE, str(writer), rate=0.2, window=60, tokenizer=tokenizer())
    assert (out.text, out.tokens_after) == (again.text, again.tokens_after)
    assert out.original == PROSE
    assert out.tokens_before == count_tokens(tokenizer(), PROSE)
    assert out.tokens_after == count_tokens(tokenizer(), str(out))
    assert summarise("", str(writer)).text == ""


class Echo:
    """Writes what it reads."""

    device, config = torch.device("cpu"), SimpleNamespace(is_encoder_decoder=True)
    generation_config = SimpleNamespace(eos_token_id=1)

    def generate(self, input_ids: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        return input_ids[:, :max_new_tokens]


def test_a_summary_has_whole_sentences_of_every_passage() -> None:
    text = " ".join(f"It is {n}. He stayed for {n} years." for n in range(6))
    size = count_tokens(tokenizer(), text)
    out = summarise(text, (Echo(), tokenizer()), rate=0.5, prompt="", window=size // 3 + 8)
    lines = out.text.split("\n")
    assert len(lines) == 3
    starts = {text[a:b].strip(): a for a, b in sentences(text)}
    for line in lines:
        assert all(part.strip() in starts for part in (join(line, [span]) for span in sentences(line)))
    assert [starts[join(line, sentences(line)[:1]).strip()] for line in lines] == sorted(text.index(x) for x in lines)
    assert size / 4 < out.tokens_after <= size / 2 + 3
    short = summarise("It is here for eleven long years.", (Echo(), tokenizer()), rate=4, prompt="")
    assert short.text and "It is here for eleven long years.".startswith(short.text)


def test_what_cannot_summarise_is_refused(writer: Path) -> None:
    with pytest.raises(ThriftError, match="needs a sequence-to-sequence model such as T5, not LlamaForCausalLM"):
        summarise(PROSE, (language_model(), tokenizer()))
    with pytest.raises(ThriftError, match="give a folder, hub id or"):
        summarise(PROSE, None)
    with pytest.raises(ThriftError, match="a window larger than 4"):
        summarise(PROSE, str(writer), window=4)
    with pytest.raises(ThriftError, match="keep ratio 0"):
        summarise(PROSE, str(writer), rate=0.0)
    with pytest.raises(ThriftError, match="unknown method 'summarise' at stage text"):
        run("text=summarise", PROSE)


# ---- with the packs -------------------------------------------------------------------------------------------------


@pytest.mark.packs
@pytest.mark.parametrize(
    ("call", "question", "word"),
    [
        ("tcra", None, "blue-heron-77"),
        ("frugal_prompt", None, "password"),
        ("frugal_prompt(attribution=globenc)", None, "blue-heron-77"),
        ("specpc_text", "Who has the keys?", "porter"),
        ("random_words", None, " "),
    ],
)
def test_they_run_on_the_packs(call: str, question: str | None, word: str) -> None:
    from tokenthrift import compress

    step = next(iter(Plan.parse(call)))
    text = "".join(line for line in PROSE.splitlines(keepends=True)[3:])
    out = compress(text, step.name, rate=0.5, question=question, protect="none", **step.params)
    assert word in out.text
    assert out.tokens_after <= 0.5 * out.tokens_before + 1
