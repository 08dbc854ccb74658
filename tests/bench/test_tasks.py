from pathlib import Path

import pytest

from tokenthrift.bench.data import Document, default_data, load_data
from tokenthrift.bench.tasks import SUITES, build_cases, token_ends, windows
from tokenthrift.core.errors import ThriftError

from .tiny import SUITE, a_text, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return tiny_tokenizer()


def test_default_cases_are_deterministic_and_answerable(tokenizer: object) -> None:
    cases = build_cases(default_data(), tokenizer, SUITES["quick"], seed=3, limit=4096)
    assert cases == build_cases(default_data(), tokenizer, SUITES["quick"], seed=3, limit=4096)
    assert cases != build_cases(default_data(), tokenizer, SUITES["quick"], seed=4, limit=4096)
    assert len({c.id for c in cases}) == len(cases)
    assert {c.kind for c in cases} == {"document", "lookup", "generation"}
    for case in cases:
        for probe in case.probes:
            assert probe.answer.strip() in case.context  # the answer is in the text,
            if probe.task == "quote":  # right after what is quoted,
                assert probe.lead.split(': "')[1] + probe.answer in case.context
            else:  # once, and not in the question
                assert case.context.count(probe.answer) == 1
                assert probe.answer.strip() not in case.question + probe.lead


def test_images_are_small_and_licensed() -> None:
    images = default_data().images
    licence = (images[0].parent / "LICENSE.md").read_text(encoding="utf-8")
    assert 3 <= len(images) <= 4
    assert all(path.name in licence and path.stat().st_size <= 60_000 for path in images)


def test_windows_split_without_loss(tokenizer: object) -> None:
    text = a_text()
    pieces = windows(Document("d", text), token_ends(tokenizer), 100, 20)
    assert "".join(head + tail for _, head, tail in pieces) == text[: sum(len(h + t) for _, h, t in pieces)]
    assert all(len(tokenizer(tail)["input_ids"]) == 20 for _, _, tail in pieces)  # type: ignore[operator]


def test_short_text_is_one_piece(tokenizer: object) -> None:
    [(_, head, tail)] = windows(
        Document("d", "Forty characters of text, more or less."), token_ends(tokenizer), 100, 20
    )
    assert head + tail == "Forty characters of text, more or less."
    assert windows(Document("d", "Too short"), token_ends(tokenizer), 100, 20) == []


def test_folders_stand_for_the_files_in_them(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("z.txt", "deep/a.md", "deep/er/b.rst", "deep/results.jsonl", "deep/er/c.bin"):
        (tmp_path / name).write_text(a_text(30))
    photo = default_data().images[0]
    (tmp_path / "deep" / "photo.JPG").write_bytes(photo.read_bytes())
    data = load_data([tmp_path, tmp_path / "z.txt"])
    assert [d.name for d in data.documents] == ["a.md", "b.rst", "z.txt"]
    assert [p.name for p in data.images] == ["photo.JPG"]
    assert not data.prompts
    (tmp_path / "empty").mkdir()
    with pytest.raises(ThriftError, match=r"empty holds no files that end in \.jpeg, \.jpg"):
        load_data([tmp_path / "empty"])


def test_own_files(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "a.md").write_text(a_text(), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "Two and two is", "answer": "four"}\n\n{"prompt": "Hello"}\n')
    data = load_data([tmp_path / "a.md", tmp_path / "b.jsonl"])
    cases = build_cases(data, tokenizer, SUITE, limit=2048)
    prompts = [c for c in cases if c.kind == "prompt"]
    assert [c.id for c in prompts] == ["prompt/b.jsonl:1", "prompt/b.jsonl:3"]
    assert prompts[0].probes[0].answer == " four"
    assert not prompts[1].probes


def test_files_of_one_name_are_told_apart(tmp_path: Path, tokenizer: object) -> None:
    paths = [tmp_path / folder / "a.txt" for folder in "xy"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(a_text(200), encoding="utf-8")
    data = load_data([*paths, paths[0]])
    assert [d.name for d in data.documents] == [str(p) for p in paths]
    cases = build_cases(data, tokenizer, SUITE)
    assert len({c.id for c in cases}) == len(cases)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "empty"),
        ("binary.txt", b"a\0b", "binary"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2: not valid JSON"),
        ("list.jsonl", b"[1]\n", "line 1: needs an object"),
        ("no.jsonl", b'{"text": "a"}\n', 'line 1: needs an object with a text "prompt"'),
        ("answer.jsonl", b'{"prompt": "a", "answer": 3}\n', 'line 1: "answer" must be text'),
        ("picture.png", b"not a picture", "cannot read the image"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ThriftError) as error:
        load_data([path])
    assert message in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_prompt_beyond_the_context(tmp_path: Path, tokenizer: object) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "%s"}\n' % ("word " * 200))
    with pytest.raises(ThriftError, match="has 1,000 tokens, the model takes 512"):
        build_cases(load_data([path]), tokenizer, SUITE, limit=512)


def test_text_too_short_to_measure(tmp_path: Path, tokenizer: object) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Hi.")
    with pytest.raises(ThriftError, match="too short"):
        build_cases(load_data([path]), tokenizer, SUITE)
