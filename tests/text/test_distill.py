"""The training recipe of LLMLingua-2: chunks, teacher, alignment (the authors' own), filters, training."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.token_classifier import TokenClassifier
from tokenthrift.ops.tokens import count_tokens
from tokenthrift.text.distill.align import Alignment, align
from tokenthrift.text.distill.chunks import sentence_chunks
from tokenthrift.text.distill.quality import Sample, good_samples
from tokenthrift.text.distill.teacher import ask, ask_into, read_jsonl
from tokenthrift.text.distill.train import IGNORED, rows_of, train
from tokenthrift.text.spans import words

from .tiny import PROSE, classifier, tokenizer

FILE = np.load(Path(__file__).parents[1] / "golden" / "text" / "llmlingua2_annotation.npz")
SAMPLES = json.loads(str(FILE["samples"]))
RESULTS = json.loads(str(FILE["result_by_window"]))


@pytest.mark.parametrize("window", RESULTS)
@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_the_authors_alignment(window: str, number: int) -> None:
    golden = RESULTS[window][str(number)]
    (original,), (compressed,) = SAMPLES[number]["prompt_list"], SAMPLES[number]["compressed_prompt_list"]
    found = align(original.split(), compressed.split(), int(window))
    assert found.labels == golden["labels"]
    for name in ("variation_rate", "hitting_rate", "matching_rate", "alignment_gap"):
        assert getattr(found, name) == pytest.approx(golden[name])


@pytest.mark.parametrize(("original", "compressed"), [("", ""), ("a b", ""), ("", "a")])
def test_alignment_of_nothing(original: str, compressed: str) -> None:
    found = align(original.split(), compressed.split())
    assert not any(found.labels) and found.variation_rate == 1 and found.alignment_gap == 0


def test_samples_label_the_words_that_the_method_chooses_from() -> None:
    sample = Sample.of("The rent was $412.50, he said.", "rent $412.50")
    kept = [sample.text[a:b].strip() for (a, b), x in zip(sample.spans, sample.alignment.labels, strict=True) if x]
    assert kept == ["rent", "$", "412.50"] or kept == ["rent", "$412.50"]
    assert sample.spans == words(sample.text)
    assert sample.to_dict()["labels"] == [int(x) for x in sample.alignment.labels]


def made(variation: float, gap: float) -> Sample:
    return Sample("", [], Alignment([], variation, gap + 0.5, 0.5))


def test_samples_that_went_wrong_are_left_out() -> None:
    samples = [made(i / 10, 0.0) for i in range(10)] + [made(0.0, 0.9)]
    good = good_samples(samples, 0.8, 0.9)
    assert all(s.alignment.variation_rate < 0.8 for s in good)
    assert made(0.0, 0.9).alignment not in [s.alignment for s in good]
    assert len(good_samples(samples, 1.0, 1.0)) == 11
    assert len(good_samples([made(0.0, 0.0)] * 4)) == 4  # where all are perfect, none is worse than others
    assert good_samples([]) == []
    with pytest.raises(ThriftError, match="outside"):
        good_samples(samples, 0.0)


def test_chunks_are_whole_sentences() -> None:
    found = sentence_chunks(PROSE, tokenizer(), 60)
    assert "".join("".join(found).split()) == "".join(PROSE.split())
    assert all(count_tokens(tokenizer(), chunk) <= 60 for chunk in found)
    assert found[0].endswith(("!", "."))
    long = sentence_chunks("word " * 300, tokenizer(), 60)
    assert len(long) > 3 and all(count_tokens(tokenizer(), chunk) <= 60 for chunk in long)
    assert sentence_chunks(" ", tokenizer()) == []
    with pytest.raises(ThriftError, match="hold nothing"):
        sentence_chunks(PROSE, tokenizer(), 0)


# ---- the teacher ----------------------------------------------------------------------------------------------------


class Teacher:
    """Leaves out every word of less than four letters; what was asked is noted."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.chat = SimpleNamespace(completions=self)

    def create(self, **request: Any) -> Any:
        self.asked.append(request)
        text = request["messages"][-1]["content"].strip().split("\n")[-1]
        short = " ".join(word for word in text.split() if len(word) > 3)
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=f" {short}\n"))])


def test_the_teacher_is_asked_once_for_each_text(tmp_path: Path) -> None:
    teacher, file = Teacher(), tmp_path / "pairs.jsonl"
    assert ask_into(file, ["the long house", "a small {brace}", "the long house"], "big", client=teacher) == 2
    assert read_jsonl(file, ("text", "compressed")) == [
        {"text": "the long house", "compressed": "long house"},
        {"text": "a small {brace}", "compressed": "small {brace}"},
    ]
    assert teacher.asked[0]["temperature"] == 0.3 and teacher.asked[0]["model"] == "big"
    assert [m["role"] for m in teacher.asked[0]["messages"]] == ["system", "user"]
    assert ask_into(file, ["the long house", "another"], "big", client=teacher) == 1
    assert len(teacher.asked) == 3


def test_a_teacher_that_fails_is_one_line() -> None:
    class Down(Teacher):
        def create(self, **request: Any) -> Any:
            raise ConnectionError("refused\nat once")

    with pytest.raises(ThriftError, match="big did not answer: ConnectionError: refused at once"):
        list(ask(["text"], "big", client=Down()))


def test_any_compatible_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            message = {"role": "assistant", "content": "short"}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
            body["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        assert list(ask(["a text"], "m", base_url=url)) == [(0, "short")]
    finally:
        server.shutdown()
        server.server_close()
    assert seen[0][0] == "/v1/chat/completions" and "a text" in seen[0][1]["messages"][1]["content"]
    with pytest.raises(ThriftError, match="OPENAI_API_KEY"):
        list(ask(["a text"], "m"))


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(ThriftError, match=r"line 1 .* with text, labels"):
        read_jsonl(file, ("text", "labels"))
    file.write_text("[1\n")
    with pytest.raises(ThriftError, match="line 1"):
        read_jsonl(file, ("text",))
    with pytest.raises(ThriftError, match="cannot read"):
        read_jsonl(tmp_path / "none", ("text",))


# ---- training -------------------------------------------------------------------------------------------------------


def labelled(count: int = 24) -> list[tuple[str, list[tuple[int, int]], list[bool]]]:
    """Texts of which the words with a capital stay: something that can be learned."""
    generator = torch.Generator().manual_seed(0)
    known = ["Lisbon", "house", "Ana", "rent", "Hale", "porter", "keys", "Rua"]
    out = []
    for _ in range(count):
        chosen = [known[i] for i in torch.randint(0, len(known), (12,), generator=generator)]
        text = " ".join(chosen)
        out.append((text, words(text), [word[0].isupper() for word in chosen]))
    return out


def fresh() -> Any:
    torch.manual_seed(0)
    return type(classifier().model)(classifier().model.config)


def test_what_can_be_learned_is_learned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quiet = {"initializer_range": 0.05, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = type(classifier().model.config)(**{**classifier().model.config.to_dict(), **quiet})
    model = type(classifier().model)(config)
    report = train(model, tokenizer(), labelled(40), epochs=8, lr=1e-2, batch_size=4, window=64, out=tmp_path / "made")
    assert report.losses[-1] < report.losses[0]
    assert report.accuracies[report.best] == max(report.accuracies) > max(report.base, 0.95)
    assert report.samples + report.held_out == 40
    from tokenthrift.models.token_classifier import load_token_classifier

    found = load_token_classifier(str(tmp_path / "made")).probabilities("keys Lisbon")
    assert found[-1][2] > 0.5 > found[0][2]


def test_special_tokens_and_padding_are_no_part_of_the_loss() -> None:
    class WithSpecials:
        """The tokenizer, with a token at each end."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer(), name)

        def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> Any:
            found = tokenizer()(text, add_special_tokens=False, **options)
            return {"input_ids": [0, *found["input_ids"], 1]} if add_special_tokens else found

    judge = TokenClassifier(classifier().model, WithSpecials(), window=16)
    text, spans, labels = labelled(1)[0]
    rows = rows_of(judge, text, spans, labels)
    assert len(rows) > 1 and all(len(ids) == len(of) <= 16 for ids, of in rows)
    for ids, of_token in rows:
        assert (ids[0], ids[-1], of_token[0], of_token[-1]) == (0, 1, IGNORED, IGNORED)
        assert IGNORED not in of_token[1:-1]
    assert sum(len(ids) - 2 for ids, _ in rows) == count_tokens(tokenizer(), text)
    with pytest.raises(ThriftError, match="label it again"):
        rows_of(judge, text, spans[:-1], labels)


def test_the_same_seed_trains_the_same() -> None:
    reports = [train(fresh(), tokenizer(), labelled(8), epochs=1, lr=1e-3, window=64) for _ in range(2)]
    assert reports[0] == reports[1]


def test_settings_that_make_no_sense() -> None:
    for params in ({"epochs": 0}, {"held_out": 1.0}, {"batch_size": 0}):
        with pytest.raises(ThriftError, match="at least one epoch"):
            train(fresh(), tokenizer(), labelled(4), **params)
    with pytest.raises(ThriftError, match="too few"):
        train(fresh(), tokenizer(), labelled(1))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_label_and_train_from_the_command_line(tmp_path: Path) -> None:
    from tokenthrift.cli.distill import app

    encoder, pairs = tmp_path / "encoder", tmp_path / "pairs.jsonl"
    fresh().save_pretrained(encoder)
    tokenizer().save_pretrained(encoder)
    lines = [
        {"text": text, "compressed": " ".join(w for w in text.split() if w[0].isupper())} for text, _, _ in labelled(6)
    ]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = CliRunner().invoke(app, ["label", "--data", str(pairs), "--out", str(tmp_path / "labels.jsonl"), "--json"])
    assert json.loads(done.stdout)["samples"] == 6
    call = ["train", "--data", str(tmp_path / "labels.jsonl"), "--out", str(tmp_path / "made"), "--model", str(encoder)]
    done = CliRunner().invoke(app, [*call, "--epochs", "1"])
    assert "llmlingua2(model=" in done.stdout
    assert (tmp_path / "made" / "model.safetensors").exists()
    with pytest.raises(ThriftError, match="cannot train"):
        CliRunner().invoke(app, [*call[:-1], str(tmp_path / "none")], catch_exceptions=False)
