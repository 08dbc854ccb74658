"""The harness itself on local tasks, with a tiny random Llama: ours beside its own ``hf``, and plans that act."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenthrift.core.errors import ThriftError

from ...text.tiny import PROSE, language_model, tokenizer

pytest.importorskip("lm_eval", reason="needs the extra: lm-eval")
pytest.importorskip("accelerate", reason="needs the extra: lm-eval")

from tokenthrift.integrations.lm_eval import TokenthriftLM

ROOT = Path(__file__).parents[3]
LINES = PROSE.strip().split("\n")
ANSWERS = [" the keys", " blue-heron-77", " 1998", " no"]
TASKS = {
    "choose": {"output_type": "multiple_choice", "doc_to_choice": ANSWERS, "doc_to_target": "{{label}}"},
    "write": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "roll": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and tasks with their data."""
    folder = tmp_path_factory.mktemp("lm_eval")
    model = language_model(positions=512)
    model.save_pretrained(folder / "model")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(folder / "model")
    words.chat_template = None
    rows = [{"text": text, "label": i % 4, "answer": ANSWERS[i % 4]} for i, text in enumerate([PROSE, *LINES[:2]])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "data")},
            "test_split": "test",
            "target_delimiter": "",
            "doc_to_text": "{{text}}\n\nQuestion: Where are the keys?\nAnswer:",
        }
        (folder / f"{name}.yaml").write_text(json.dumps({**common, **task}), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def evaluate(folder: Path, model: Any, tasks: str, batch_size: int = 1, chat: bool = False, **args: Any) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if isinstance(model, str):
        args = {"pretrained": str(folder / "model"), "dtype": "float32", **args}
    return lm_eval.simple_evaluate(
        model=model,
        model_args=args,
        tasks=[tasks],
        batch_size=batch_size,
        device="cpu",
        task_manager=manager,
        apply_chat_template=chat,
        bootstrap_iters=0,
    )


@cache
def hf(folder: Path, task: str, batch_size: int = 1) -> Any:
    """The harness's own results."""
    return evaluate(folder, "hf", task, batch_size)


def said(results: Any, task: str) -> list[Any]:
    """The model's raw answers, document by document."""
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_empty_plan_is_hf_bit_for_bit(folder: Path, task: str, batch_size: int) -> None:
    ours = evaluate(folder, "tokenthrift", task, batch_size, plan="")
    theirs = hf(folder, task, batch_size)
    assert said(ours, task) == said(theirs, task)
    assert ours["results"] == theirs["results"]


@pytest.mark.parametrize("task", ["choose", "write"])
def test_a_plan_that_keeps_everything(folder: Path, task: str) -> None:
    """The path through generate and back agrees with the harness's own forward, also in batches with padding."""
    for batch_size in (1, 3):
        theirs = said(hf(folder, task, batch_size), task)
        ours = said(evaluate(folder, "tokenthrift", task, batch_size, plan="cache=snapkv(budget=1.0)"), task)
        if task == "write":
            assert ours == theirs
            continue
        for got, wanted in zip(ours, theirs, strict=True):
            for [(log, greedy)], [(log_hf, greedy_hf)] in zip(got, wanted, strict=True):
                assert log == pytest.approx(log_hf, abs=1e-3)
                assert greedy == greedy_hf


def reference(folder: Path, plan: str, prompt: list[int], continuation: list[int]) -> float:
    """Scored without the harness: the prompt in one forward, then a token at a time."""
    import tokenthrift as tt

    model, _ = tt.load(folder / "model")
    total = 0.0
    with torch.no_grad(), tt.apply(plan, model):
        out = model(torch.tensor([prompt]), use_cache=True)
        for token in continuation:
            total += float(out.logits[0, -1].log_softmax(-1)[token])
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
    return total


@pytest.mark.parametrize(
    "plan",
    [
        "cache=snapkv(budget=16, window=4)",
        "cache=streaming_llm(budget=16, every=1)",
        "attention=quest(budget=16, page=4, dense=0)",
        "prefill=gemfilter(budget=24, layer=1)",
    ],
)
def test_the_plan_is_in_force_while_scoring(folder: Path, plan: str) -> None:
    results = evaluate(folder, "tokenthrift", "choose", 3, plan=plan)
    plain = said(hf(folder, "choose"), "choose")
    words = tokenizer()
    text = f"{PROSE}\n\nQuestion: Where are the keys?\nAnswer:"
    ids = words(text + ANSWERS[0])["input_ids"]
    prompt = words(text)["input_ids"]
    [(log, _)] = said(results, "choose")[0][0]
    assert log == pytest.approx(reference(folder, plan, prompt, ids[len(prompt) :]), abs=2e-3)
    assert abs(log - plain[0][0][0][0]) > 0.01
    told = results["config"]["tokenthrift"]["loglikelihood"]
    assert any(stage["tokens_after"] < stage["tokens_before"] for stage in told.values())


def test_the_plan_is_in_force_while_writing(folder: Path) -> None:
    plain = said(hf(folder, "write"), "write")
    reduced = evaluate(folder, "tokenthrift", "write", 3, plan="cache=knorm(budget=4)")
    assert said(reduced, "write") != plain
    assert reduced["config"]["tokenthrift"]["generate_until"]["cache"]["kept"] < 0.2
    drafted = evaluate(folder, "tokenthrift", "write", 1, plan="decode=prompt_lookup()")
    assert said(drafted, "write") == plain
    assert drafted["config"]["tokenthrift"]["generate_until"]["decode"]["tokens_before"] > 0


def contexts(lm: TokenthriftLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenised from here on."""
    seen: list[str] = []
    plain = lm.tok_encode
    monkeypatch.setattr(lm, "tok_encode", lambda text, *a, **k: (seen.append(text), plain(text, *a, **k))[1])
    return seen


@pytest.mark.parametrize("task", ["choose", "write"])
def test_text_is_shortened_before_the_question(folder: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = TokenthriftLM(str(folder / "model"), plan="text=truncate(rate=0.4)", device="cpu", dtype="float32")
    seen = contexts(lm, monkeypatch)
    evaluate(folder, lm, task)
    question = "\n\nQuestion: Where are the keys?\nAnswer:"
    longest = max((text for text in seen if text.endswith(question)), key=len)
    head = longest.removesuffix(question)
    assert PROSE.startswith(head)
    assert len(tokenizer()(head)["input_ids"]) <= 0.4 * len(tokenizer()(PROSE)["input_ids"]) + 1
    if task == "choose":
        assert {longest + answer for answer in ANSWERS} <= set(seen)


def test_text_beside_other_stages_and_a_question(folder: Path) -> None:
    results = evaluate(folder, "tokenthrift", "choose", 2, plan="text=bm25_sentences(rate=0.5) cache=knorm(budget=8)")
    told = results["config"]["tokenthrift"]
    assert told["text"]["text"]["kept"] <= 0.55
    assert told["loglikelihood"]["cache"]["kept"] < 0.5
    with pytest.raises(ThriftError, match="set question_from") as error:
        evaluate(folder, "tokenthrift", "choose", plan="text=bm25_sentences(rate=0.5)", question_from="Query:")
    assert "\n" not in str(error.value)


def test_messages_are_shortened_before_the_template(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = TokenthriftLM(str(folder / "model"), plan="text=truncate(rate=0.4)", device="cpu", dtype="float32")
    seen = contexts(lm, monkeypatch)
    evaluate(folder, lm, "write", chat=True)
    longest = max(seen, key=len)
    head = longest.removeprefix("<user>").removesuffix("\n\nQuestion: Where are the keys?\nAnswer:<answer>")
    assert len(head) < len(longest) - 20
    assert PROSE.startswith(head)
    history = [
        {"role": "system", "content": PROSE},
        {"role": "user", "content": PROSE},
        {"role": "assistant", "content": LINES[0]},
        {"role": "user", "content": "Why?"},
    ]
    shown = lm.apply_chat_template(history)
    assert shown.startswith(f"<system>{PROSE}<user>")
    assert f"<user>{PROSE}" not in shown
    assert history[1]["content"] == PROSE


def test_rolling_with_a_plan(folder: Path) -> None:
    plan = "cache=streaming_llm(budget=12, every=1)"
    results = evaluate(folder, "tokenthrift", "roll", plan=plan)
    ids = tokenizer()(PROSE)["input_ids"]
    start = tokenizer().bos_token_id
    [[log]] = said(results, "roll")[0]
    assert log == pytest.approx(reference(folder, plan, [start], ids), rel=1e-4)
    assert said(results, "roll") != said(hf(folder, "roll"), "roll")
    for plan in ("cache=knorm(budget=16)", "text=truncate()", "prefill=gemfilter(budget=24)"):
        with pytest.raises(ThriftError, match="without a prompt") as error:
            evaluate(folder, "tokenthrift", "roll", plan=plan)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"plan": "cache=snapk()"}, "did you mean 'snapkv'"),
        ({"plan": "cache=snapkv(budget=16"}, "bracket"),
        ({"plan": "connector=divprune(keep=0.5)"}, "has no stage 'connector'"),
        ({"question_from": ""}, "question_from is empty"),
    ],
)
def test_mistakes(folder: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ThriftError, match=message) as error:
        evaluate(folder, "tokenthrift", "choose", **args)
    assert "\n" not in str(error.value)


def test_decoding_by_a_rule_of_its_own_has_no_likelihoods(folder: Path) -> None:
    with pytest.raises(ThriftError, match="generate_until"):
        evaluate(folder, "tokenthrift", "choose", plan="decode=skip_decode()")


def test_a_pack_is_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenthrift.models.packs.loading.folder_of", lambda name: folder / "model")
    lm = TokenthriftLM("smollm2-135m", device="cpu", dtype="float32")
    assert lm.max_length == 512


def test_the_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["tokenthrift"].partition(":")
    assert getattr(sys.modules[module], name) is TokenthriftLM


@pytest.mark.slow
def test_the_command_line(folder: Path) -> None:
    def run(plan: str, out: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tokenthrift.integrations.lm_eval", "--model", "tokenthrift"]
        command += ["--tasks", "write", "--include_path", str(folder), "--output_path", str(out), "--device", "cpu"]
        command += ["--model_args", f"pretrained={folder / 'model'},dtype=float32,plan={plan}"]
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = run("cache=streaming_llm(budget=16,every=4)", folder / "out")
    assert done.returncode == 0, done.stderr
    [file] = (folder / "out").rglob("results_*.json")
    config = json.loads(file.read_text(encoding="utf-8"))["config"]
    assert config["plan"] == "cache=streaming_llm(budget=16, every=4)"
    assert config["tokenthrift"]["generate_until"]["cache"]["kept"] < 1
    failed = run("cache=streaming_lm()", folder / "none")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: unknown method 'streaming_lm'")
    assert "Traceback" not in failed.stderr
