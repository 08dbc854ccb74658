"""What cannot work says so in one line: layers without keys and values, wrong stages, budgets, calibrations."""

from __future__ import annotations

import pytest
import torch

import attention_plans
import cache_plans
import tokenthrift as tt
from models.test_decoder import check_eviction
from tiny_models import FAMILIES, fingerprint, generate, prompt, tiny
from tokenthrift.cli.main import run
from tokenthrift.models.frequency_chunks import score_chunks
from tokenthrift.models.retrieval_heads import score_heads

_DELTA = {f"linear_{part}": 8 for part in ("key_head_dim", "value_head_dim")} | {
    f"linear_num_{part}_heads": 2 for part in ("key", "value")
}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MLA |= {"num_key_value_heads": 6}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 1, "mamba_d_state": 8}
_THREE_AND_ONE = ["linear_attention"] * 3 + ["full_attention"]
UNSUPPORTED = {
    "qwen3_next": (
        {"num_hidden_layers": 4, "layer_types": _THREE_AND_ONE, "num_experts": 4, "num_experts_per_tok": 2, **_DELTA},
        "layer 0 (Qwen3NextGatedDeltaNet) has linear attention",
    ),
    "qwen3_5_text": (
        {"num_hidden_layers": 4, "layer_types": _THREE_AND_ONE, **_DELTA},
        "layer 0 (Qwen3_5GatedDeltaNet) has linear attention",
    ),
    "mamba": ({}, "layer 0 (MambaMixer) has linear attention"),
    "mamba2": ({"num_heads": 8, "head_dim": 12, "n_groups": 1}, "layer 0 (Mamba2Mixer) has linear attention"),
    "rwkv": ({}, "layer 0 (RwkvBlock) has linear attention"),
    "jamba": (
        {"attn_layer_period": 2, "attn_layer_offset": 0, "num_experts": 2, "num_experts_per_tok": 1},
        "layer 1 (JambaMambaMixer) has linear attention",
    ),
    "falcon_h1": (_MAMBA | {"mamba_d_ssm": 96}, "layer 0 (FalconH1Mixer) has linear attention beside"),
    "recurrent_gemma": (
        {"num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 48},
        "layer 0 (RecurrentGemmaDecoderLayer) has linear attention",
    ),
    "deepseek_v2": (_MLA | _EXPERTS, "layer 0 (DeepseekV2Attention) has multi-head latent attention (MLA)"),
    "deepseek_v3": (_MLA | _EXPERTS, "layer 0 (DeepseekV3Attention) has multi-head latent attention (MLA)"),
    "deepseek_v32": (_MLA | _EXPERTS, "layer 0 (DeepseekV32Attention) has multi-head latent attention (MLA)"),
    "youtu": (_MLA, "layer 0 (YoutuAttention) has multi-head latent attention (MLA)"),
}
PREFILL = {
    "fastv": "fastv(layer=1)",
    "pyramiddrop": "pyramiddrop",
    "dhsa": "dhsa",
    "spatten_cascade": "spatten_cascade",
    "gemfilter": "gemfilter(budget=8, layer=0)",
    "lazy_llm": "lazy_llm",
    "prepacking": "prepacking",
    "specpc": "specpc(model=nowhere)",
    "token_sparse_attention": "token_sparse_attention(min_tokens=4)",
}
PLANS = [
    *(cache_plans.plan(name, 8) for name in cache_plans.METHODS),
    *(attention_plans.plan(name, 8) for name in attention_plans.METHODS),
    *PREFILL.values(),
]


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def test_every_prefill_method_is_tried():
    assert {info.name for info in tt.methods(stage="prefill")} == set(PREFILL)


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_every_method_names_the_layer_that_has_no_keys_and_values(family):
    changes, said = UNSUPPORTED[family]
    model = tiny(family, "eager", **changes)
    before = fingerprint(model)
    for plan in PLANS:
        with pytest.raises(tt.ThriftError) as error:
            tt.apply(plan, model).install()
        assert said in one_line(error), plan
    assert fingerprint(model) == before


def test_drafts_still_run_over_latents():
    model, inputs = tiny("deepseek_v3", **UNSUPPORTED["deepseek_v3"][0]), prompt(length=20)
    plain = generate(model, inputs)
    with tt.apply("prompt_lookup(adaptive=False)", model):
        assert torch.equal(generate(model, inputs), plain)


HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": _MAMBA
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
    | {"shared_intermediate_size": 16},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_with_a_state_are_left_alone_beside_full_attention(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, HYBRIDS[family])
    for step in (1, 5):
        check_eviction(family, "sdpa", step, "snapkv(budget=12, window=4)")
    model, inputs = tiny(family), prompt(length=20)
    plain = generate(model, inputs)
    with tt.apply("quest(budget=64, page=4)", model):
        assert torch.equal(generate(model, inputs), plain)
    for place in ("gemfilter", "lazy_llm", "prepacking"):
        with pytest.raises(tt.ThriftError, match=rf"prefill={place} .* its layer 0 \(\w+\) has "):
            tt.apply(PREFILL[place], model).install()


def test_calibrations_name_the_layer_too():
    model = tiny("deepseek_v3", **UNSUPPORTED["deepseek_v3"][0])
    for search in (score_heads, score_chunks):
        with pytest.raises(tt.ThriftError, match=r"layer 0 \(DeepseekV3Attention\) has multi-head latent"):
            search(model)


# ---- plans ----------------------------------------------------------------------------------------------------------

BUDGETS = [
    info.name
    for stage in ("cache", "attention", "prefill")
    for info in tt.methods(stage=stage)
    if "budget" in info.defaults
]
PROTECTED = [
    "streaming_llm(budget=4, sinks=4)",
    "expected_attention(budget=4, sinks=4)",
    "lagkv(budget=4, sinks=4)",
    "tree_kv(budget=4, sinks=4)",
    "razor_attention(budget=5, sinks=4)",
    "snapkv(budget=32, window=32)",
    "pyramid_kv(budget=8, window=8)",
    "speckv(budget=32, window=32)",
    "ems(budget=32, window=32)",
    "ada_kv(budget=32, base=snapkv)",
    "quest(budget=15, page=16)",
    "token_select(budget=112, sinks=16, local=96)",
    "specpc(model=nowhere, budget=63, window=64)",
]


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("budget", ["0", "-3", "0.0", "1.5", "nan", "true", "many"])
def test_a_budget_that_is_none_is_refused_when_the_plan_is_read(name, budget):
    more = ", model=nowhere" if name == "specpc" else ""
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(f"{name}(budget={budget}{more})")
    assert "budget" in one_line(error) or "ratio" in one_line(error)


@pytest.mark.parametrize("plan", PROTECTED)
def test_a_budget_smaller_than_what_is_protected_is_refused_when_the_plan_is_read(plan):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(plan)
    assert plan.split("(")[0] in one_line(error)
    assert "budget" in one_line(error)


@pytest.mark.parametrize("name", cache_plans.METHODS)
def test_a_share_that_has_no_room_for_what_is_protected_still_runs(name):
    """A twentieth of 20 tokens is one entry: fewer than there are sinks and votes."""
    model = tiny("llama")
    with tt.apply(cache_plans.plan(name, 0.05), model) as session, torch.no_grad():
        cache = model(**prompt(length=20, pad=6)).past_key_values
        generate(model, prompt(length=20, pad=6), 2)
    assert [layer.stored for layer in cache.layers] == [1, 1] or name in ("ada_kv", "razor_attention", "pyramid_kv")
    assert session.report().stages["cache"].kept <= 0.5


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("cache=quest(budget=64)", "write attention=quest"),
        ("attention=snapkv", "write cache=snapkv"),
        ("prefill=h2o", "write cache=h2o"),
        ("cache=gemfilter", "write prefill=gemfilter"),
        ("decode=knorm", "write cache=knorm"),
        ("cash=knorm", "did you mean 'cache'"),
    ],
)
def test_a_method_at_a_wrong_stage_is_told_its_own(plan, said):
    for refused in (tt.Plan.parse, lambda p: tt.apply(p, tiny("llama"))):
        with pytest.raises(tt.ThriftError) as error:
            refused(plan)
        assert said in one_line(error)


def test_a_stage_that_the_model_does_not_have_is_told():
    with pytest.raises(tt.ThriftError) as error:
        tt.apply("vision=tome", tiny("llama"))
    assert "has no stage 'vision'" in one_line(error)


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    from decoding.draft_models import WORDS, tokenizer

    def save(family, **changes):
        where = tmp_path / family
        tiny(family, "eager", **changes).save_pretrained(where)
        tokenizer(WORDS).save_pretrained(where)
        return str(where)

    return save


def told(capsys, *call):
    with pytest.raises(SystemExit) as ended:
        run(list(call))
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and "Traceback" not in said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("plan", ["knorm(budget=8)", "quest(budget=8, page=4)", "lazy_llm"])
def test_the_command_line_names_the_layer(folder, capsys, plan):
    model = folder("deepseek_v3", **UNSUPPORTED["deepseek_v3"][0])
    assert "layer 0 (DeepseekV3Attention)" in told(capsys, "generate", "word3", "--model", model, "--plan", plan)
    model = folder("mamba")
    assert "layer 0 (MambaMixer)" in told(capsys, "generate", "word3", "--model", model, "--plan", plan)


@pytest.mark.parametrize("name", ["razor_attention", "fasa"])
def test_the_command_line_refuses_the_calibration_of_another_model(folder, capsys, tmp_path, name):
    out = tmp_path / "made.json"
    options = ["--set", "tokens=64", "--set", "queries=8", "--set", "top=8"] if name == "fasa" else []
    with pytest.raises(SystemExit) as ended:
        run(["calibrate", name, "--model", folder("llama"), "--out", str(out), *options])
    assert ended.value.code == 0
    capsys.readouterr()
    given = "heads" if name == "razor_attention" else "chunks"
    other = folder("qwen2")
    said = told(capsys, "generate", "word3", "--model", other, "--plan", f"{name}(budget=8, {given}='{out}')")
    assert "was made for another model (llama of 2 layers" in said and f"tokenthrift calibrate {name}" in said
    model = folder("deepseek_v3", **UNSUPPORTED["deepseek_v3"][0])
    assert "layer 0 (DeepseekV3Attention)" in told(capsys, "calibrate", name, "--model", model, "--out", str(out))


@pytest.mark.parametrize("plan", ["knorm(budget=0)", "streaming_llm(budget=3)", "cache=quest"])
def test_the_command_line_refuses_plans_before_it_loads_a_model(capsys, monkeypatch, tmp_path, plan):
    monkeypatch.chdir(tmp_path)  # where bench writes its results
    told(capsys, "generate", "word3", "--model", "/nowhere", "--plan", plan)
    told(capsys, "bench", "--model", "/nowhere", "--plans", plan)
