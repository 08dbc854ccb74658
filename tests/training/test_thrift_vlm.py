"""The training of thrift-vlm: many questions in one sequence are the same as one by one, and folding is exact."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tokenthrift.bench.scene_questions import WORDINGS, Question, ask
from tokenthrift.bench.scenes import NAMES, PLACES, held_out, lay_out
from tokenthrift.bench.seeing import prompt

sys.path.insert(0, str(Path(__file__).parents[2] / "training" / "thrift_vlm"))
thrift_vlm: Any = pytest.importorskip("thrift_vlm")
vlm_parts: Any = pytest.importorskip("vlm_parts")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return vlm_parts.new_tokenizer()


def test_every_word_is_known_and_comes_back(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    for number in range(60):
        scene = lay_out(random.Random(number), held_out())
        for question in ask(scene, random.Random(number), 3):
            ids = tokenizer(prompt(question.text))["input_ids"]
            assert tokenizer.unk_token_id not in ids and ids[0] == tokenizer.bos_token_id
            assert ids == again(prompt(question.text))["input_ids"]
            answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(answer) == question.answer
    assert tokenizer.convert_tokens_to_ids("<image>") == tokenizer(prompt("x"))["input_ids"][1]


class Tiny(torch.nn.Module):
    """What training needs of a LLaVA."""

    def __init__(self, words: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(text_config=SimpleNamespace(bos_token_id=1))
        causal = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=words,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.3,
            )
        ).eval()
        self.lm_head = causal.lm_head
        self.model = torch.nn.Module()
        self.model.language_model = causal.model
        self.model.multi_modal_projector = torch.nn.Linear(6, 32)


@torch.no_grad()
def test_questions_do_not_see_each_other(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thrift_vlm, "GRID", 2)
    model = Tiny(len(tokenizer))
    packed = thrift_vlm.Packed(tokenizer)
    first = [
        Question("what is at the top left?", "bag", "what"),
        Question("where is the bag?", "top left", "where"),
        Question("how many bags are there?", "1", "count"),
    ]
    rows = [first, [Question("is there a coat?", "no", "exists")]]  # the second is padded
    features = torch.randn(2, 4, 6)
    logits, labels, which = thrift_vlm.forward(model, features, packed(rows))
    model.model.language_model.set_attn_implementation("eager")
    done = 0
    for row, asked in enumerate(rows):
        for number, question in enumerate(asked):
            answer = [*tokenizer(question.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            text = tokenizer(prompt(question.text, image=False), add_special_tokens=False)["input_ids"]
            embed = model.model.language_model.get_input_embeddings()
            inputs = torch.cat(
                [
                    embed(torch.tensor([[1]])),
                    model.model.multi_modal_projector(features[row : row + 1]),
                    embed(torch.tensor([text + answer[:-1]])),
                ],
                dim=1,
            )
            plain = model.lm_head(model.model.language_model(inputs_embeds=inputs).last_hidden_state)[0]
            part = slice(done, done + len(answer))
            assert labels[part].tolist() == answer
            assert set(which[part].tolist()) == {row * 1000 + number}
            torch.testing.assert_close(logits[part], plain[-len(answer) :], atol=1e-4, rtol=1e-4)
            done += len(answer)
    assert done == len(logits)


@torch.no_grad()
def test_standardised_inputs_fold_into_one_layer() -> None:
    linear, x = torch.nn.Linear(5, 3), torch.randn(20, 5) * 3 + 1
    layer = thrift_vlm.Standardised(linear, x.mean(0), x.std(0))
    torch.testing.assert_close(layer.folded()(x), layer(x))


def test_patches_are_labelled_where_the_items_are() -> None:
    for number in range(30):
        scene = lay_out(random.Random(number), held_out())
        name, colour, place, row, column = thrift_vlm.patch_labels(scene).reshape(5, 16, 16)
        assert row[3, 7] == 3 and column[3, 7] == 7
        for item in scene.items:
            x, y = (int(value // 14) for value in item.middle)
            assert name[y, x] == NAMES.index(item.name) and colour[y, x] == item.colour
            assert place[y, x] == item.place
        assert {int(value) for value in name.unique()} - {-100, 7} == {NAMES.index(i.name) for i in scene.items}


def test_scenes_are_the_same_every_time() -> None:
    a, b = (thrift_vlm.scene("train", 5, held_out()) for _ in range(2))
    assert a == b != thrift_vlm.scene("check", 5, held_out())
    assert len(PLACES) == 9 and len(WORDINGS) == 7


def test_a_few_patches_show_every_item() -> None:
    for number in range(30):
        scene = lay_out(random.Random(number), held_out())
        labels = thrift_vlm.patch_labels(scene)
        kept = thrift_vlm.few(labels, 24, random.Random(number))
        assert len(set(kept)) == 24 and kept == sorted(kept)
        seen = {(int(labels[0, n]), int(labels[2, n])) for n in kept}
        assert all((NAMES.index(item.name), item.place) in seen for item in scene.items)


def test_the_place_of_a_named_thing_is_told_at_its_name(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = next(
        found
        for found in (lay_out(random.Random(number), held_out()) for number in range(99))
        if len({item.name for item in found.items}) == len(found.items) == 3
    )
    model = Tiny(len(tokenizer))
    model.config.text_config.hidden_size = sum(thrift_vlm.Places.SIZES)
    places = thrift_vlm.Places(model, tokenizer)
    places.tell = torch.nn.Identity()
    ids = torch.tensor(
        [[tokenizer(f"{item.name} there", add_special_tokens=False)["input_ids"] for item in scene.items]]
    )
    told = torch.zeros(1, 3, 2, sum(thrift_vlm.Places.SIZES))
    for number, item in enumerate(scene.items):
        x, y = item.middle
        for start, value in ((0, item.place), (9, int(y // 14)), (25, int(x // 14))):
            told[0, number, 0, start + value] = 50
    image = torch.zeros(1, 4, told.shape[-1])  # the image's tokens come first
    places.states = torch.cat([image, told.flatten(1, 2)], dim=1)
    assert places.loss(ids, [scene]) < 1e-6
    places.states = torch.cat([image, told.flip(1).flatten(1, 2)], dim=1)
    assert places.loss(ids, [scene]) > 10
    nothing = torch.full_like(ids, tokenizer.convert_tokens_to_ids("there"))
    assert places.loss(nothing, [scene]) == 0


def test_the_middle_layers_states_are_told_from(tokenizer: Any) -> None:
    model = Tiny(len(tokenizer))
    model.config.text_config.hidden_size = 32
    places = thrift_vlm.Places(model, tokenizer)
    question = Question("where is the bag?", "top left", "where")
    words = thrift_vlm.Packed(tokenizer)([[question]])
    thrift_vlm.forward(model, torch.randn(1, 256, 6), words)
    assert places.states.shape == (1, 257 + words["ids"].shape[-1], 32)
    bag = next(
        found
        for found in (lay_out(random.Random(n), held_out()) for n in range(99))
        if [i.name for i in found.items] == ["bag"]
    )
    places.loss(words["ids"], [bag]).backward()
    first, second = model.model.language_model.layers
    assert second.mlp.down_proj.weight.grad.any() and first.mlp.down_proj.weight.grad.any()
