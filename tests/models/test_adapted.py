"""Adapters merged into a base model that is loaded for them."""

from __future__ import annotations

import sys

import pytest
import torch

import tokenthrift as tt
from tiny_models import tiny
from tokenthrift.models.adapted import load_adapted
from tokenthrift.text.runtime import compress_text

from ..text.tiny import PROSE, tokenizer


@pytest.fixture
def saved(tmp_path):
    """A base model in a folder, an adapter that changes it in another, and logits with the adapter."""
    peft = pytest.importorskip("peft")
    model = tiny("llama", vocab_size=400, max_position_embeddings=2048)
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        want = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(input_ids=ids).logits, want, atol=1e-2)
    return tmp_path, ids, want


@pytest.mark.parametrize("named", [True, False])
def test_the_adapter_is_merged(saved, named):
    folder, ids, want = saved
    model, made = load_adapted(str(folder / "adapter"), str(folder / "base") if named else None)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
    assert made.is_fast and not model.training


def test_exit_asks_the_adapted_model(saved):
    folder, _, _ = saved
    answers = []
    for params in ({"adapter": str(folder / "adapter")}, {"model": str(folder / "base")}):
        method = tt.Plan(text={"exit": {"rate": 0.4, **params}}).at("text")[0]
        out = compress_text([method], PROSE, "Who has the keys?", tokenizer())
        assert 0 < out.tokens_after <= 0.4 * out.tokens_before + 1
        answers.append(out.kept)
    assert answers[0] != answers[1]


def test_what_is_no_adapter_is_refused(saved):
    folder, _, _ = saved
    with pytest.raises(tt.ThriftError, match="is no adapter: it needs"):
        load_adapted(str(folder / "base"))
    (folder / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(tt.ThriftError, match="cannot load the adapter") as error:
        load_adapted(str(folder / "adapter"))
    assert "\n" not in str(error.value)


def test_without_peft_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(tt.ThriftError, match="pip install 'tokenthrift\\[adapters\\]'"):
        load_adapted("some/adapter-that-is-not-there")
