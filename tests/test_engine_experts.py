"""accelerate on mixtures of experts: found, equal to transformers' eager experts, undone."""

import copy
import warnings

import peft
import pytest
import torch
import transformers as hf
from peft.tuners.lora.layer import ParamWrapper
from tiny_models import _DECODER, LENGTH, VOCABULARY
from yardstick import rms

import tilewright

_FEW = dict(num_experts_per_tok=2)
_QWEN = dict(num_experts=4, moe_intermediate_size=24, decoder_sparse_step=1, **_FEW)
MODELS = {
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, dict(num_local_experts=4, **_FEW)),
    "qwen2_moe": (
        hf.Qwen2MoeConfig, hf.Qwen2MoeForCausalLM,
        dict(shared_expert_intermediate_size=24, norm_topk_prob=False, **_QWEN),
    ),
    "qwen3_moe": (hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, dict(norm_topk_prob=True, **_QWEN)),
    "olmoe": (hf.OlmoeConfig, hf.OlmoeForCausalLM, dict(num_experts=4, **_FEW)),
    "deepseek_v3": (
        hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM,
        dict(
            num_key_value_heads=4, head_dim=4, q_lora_rank=16, kv_lora_rank=16,
            qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=4,
            moe_intermediate_size=24, n_group=2, topk_group=1, n_shared_experts=1,
            first_k_dense_replace=1, **_FEW,
        ),
    ),
    "gpt_oss": (hf.GptOssConfig, hf.GptOssForCausalLM, dict(num_local_experts=4, **_FEW)),
    "llama4": (
        hf.Llama4TextConfig, hf.Llama4ForCausalLM,
        dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=48),
    ),
}  # fmt: skip
LAYERS = {"deepseek_v3": 1}  # with experts; the others have two
by_model = pytest.mark.parametrize("name", MODELS)


def build(name, dtype=torch.float32, experts="eager"):
    config, model, changes = MODELS[name]
    torch.manual_seed(1)
    built = model._from_config(
        config(**{**_DECODER, **changes}), experts_implementation=experts, dtype=dtype
    )
    with torch.no_grad():  # routers and biases start at 0 in some
        for p in built.parameters():
            if not p.any():
                p.normal_(std=0.25)
    return built.eval()


def words(rows=2, length=LENGTH):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def step(model):
    model.zero_grad()
    loss = model(input_ids=words(), labels=words()).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@by_model
def test_loss_and_gradients_are_those_of_eager_experts(name):
    loss, grads = step(build(name))
    model = build(name)
    report = tilewright.accelerate(model)
    mine = [r for r in report.replaced if r.kind == "experts"]
    assert len(mine) == LAYERS.get(name, 2)
    assert {r.now for r in mine} == {"moe_mlp"}
    got, found = step(model)
    assert abs(got - loss) < 2e-6
    assert found.keys() == grads.keys()
    largest = max(rms(g) for g in grads.values())
    for n, g in grads.items():
        assert rms(found[n] - g) <= 1e-5 * rms(g) + 1e-7 * largest, n


@by_model
def test_bfloat16_is_as_close_to_float32_as_stock(name):
    exact, _ = step(build(name))
    stock = build(name, torch.bfloat16)
    ours = copy.deepcopy(stock)
    tilewright.accelerate(ours)
    # one loss is one draw: logits have many
    with torch.no_grad():
        truth = build(name).bfloat16().double()(input_ids=words()).logits
        errors = [rms(m(input_ids=words()).logits.double() - truth) for m in (ours, stock)]
    assert errors[0] <= 1.3 * errors[1], errors
    assert abs(step(ours)[0].float() - exact) < 0.05


@by_model
def test_generates_the_same_tokens_in_float32(name):
    stock, ours = build(name), build(name)
    tilewright.accelerate(ours)
    given = dict(input_ids=words(), max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(**given), stock.generate(**given))


@pytest.mark.parametrize("name", [n for n in MODELS if n != "llama4"])
def test_restore_gives_back_the_stock_experts(name):
    model = build(name, experts="grouped_mm")
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    tilewright.accelerate(model)
    assert model.config._experts_implementation == "tilewright"
    tilewright.restore(model)
    assert model.config._experts_implementation == "grouped_mm"
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == before


def test_the_operator_runs(monkeypatch):
    from tilewright.adapt import experts

    calls = []
    monkeypatch.setattr(
        experts, "moe_mlp", lambda *a, **k: calls.append(k) or tilewright.moe_mlp(*a, **k)
    )
    model = build("mixtral")
    tilewright.accelerate(model)
    calls.clear()
    model(input_ids=words())
    assert [c["activation"] for c in calls] == ["swiglu", "swiglu"]


def test_by_transformers_own_switch():
    from tilewright.adapt import experts

    experts.register()
    loss, _ = step(build("gpt_oss"))
    model = build("gpt_oss", experts="tilewright")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs(step(model)[0] - loss) < 2e-6


def test_an_unknown_gate_stays_stock():
    model = build("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = torch.nn.Softplus()
    report = tilewright.accelerate(model)
    reasons = {s.reason for s in report.skipped if s.kind == "experts"}
    assert reasons == {"its _apply_gate is none of the activations of moe_mlp"}


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_activations_are_found_by_trying(act):
    from tilewright.adapt.experts import gate_rule

    config = hf.MixtralConfig(**_DECODER, num_local_experts=2, hidden_act=act)
    module = hf.MixtralForCausalLM(config).model.layers[0].mlp.experts
    found = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}[act]
    assert gate_rule(module) == {"activation": found, "interleaved": False}


def test_a_dtype_without_kernel_runs_stock_and_warns_once():
    model, stock = build("mixtral"), build("mixtral").double()
    tilewright.accelerate(model)
    model.double()
    with pytest.warns(UserWarning, match="MixtralExperts runs transformers' own experts: its in"):
        got = model(input_ids=words()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=words())
    torch.testing.assert_close(got, stock(input_ids=words()).logits, rtol=1e-5, atol=1e-5)


def test_autocast_and_gradient_checkpointing():
    stock, ours = build("qwen3_moe"), build("qwen3_moe")
    tilewright.accelerate(ours)
    for model in (stock, ours):
        model.train()
        model.gradient_checkpointing_enable()
    (loss, grads), (got, found) = step(stock), step(ours)
    assert abs(loss - got) < 2e-6
    assert all(rms(found[n] - g) <= 1e-4 * rms(g) + 1e-7 for n, g in grads.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [step(m)[0] for m in (stock, ours)]
    assert abs(losses[0] - losses[1]) < 0.02


# --- PEFT's LoRA on the experts' weights ---


def with_lora(name, targets=("gate_up_proj", "down_proj"), dtype=torch.float32):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[], init_lora_weights=False,
        target_parameters=[f"mlp.experts.{t}" for t in targets],
    )  # fmt: skip
    torch.manual_seed(3)
    return peft.get_peft_model(build(name, dtype), config)


@pytest.mark.parametrize("targets", [("gate_up_proj", "down_proj"), ("down_proj",)], ids=len)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_lora_on_experts_by_peft(name, targets, monkeypatch):
    """Loss and gradients are PEFT's, and its folded weights are never made."""
    loss, grads = step(with_lora(name, targets))
    model = with_lora(name, targets)
    report = tilewright.accelerate(model)
    assert [r.kind for r in report.replaced].count("experts") == 2
    now = [r.now for r in report.replaced if r.kind == "lora"]
    assert now == ["moe_mlp"] * 2 * len(targets)
    for folded in ("get_delta_factors", "get_delta_weight"):
        monkeypatch.setattr(ParamWrapper, folded, lambda *_: pytest.fail("folded"))
    got, found = step(model)
    assert abs(loss - got) < 2e-6 and grads.keys() == found.keys() and grads
    assert all(rms(found[n] - g) <= 1e-4 * rms(g) + 1e-8 for n, g in grads.items())


def test_states_in_which_the_update_is_peft_s():
    """Disabled, merged, another implementation of experts, a dtype without a kernel, restored."""
    stock, ours = with_lora("mixtral"), with_lora("mixtral")
    tilewright.accelerate(ours)

    def agree(change=None):
        logits = []
        for model in (stock, ours):
            if change is not None:
                change(model)
            with torch.no_grad():
                logits.append(model(input_ids=words()).logits)
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        return logits[0]

    adapted = agree()
    with stock.disable_adapter(), ours.disable_adapter():
        assert (agree() - adapted).abs().max() > 0.01
    agree(lambda m: m.merge_adapter())
    agree(lambda m: m.unmerge_adapter())
    agree(lambda m: m.base_model.model.set_experts_implementation("eager"))
    ours.base_model.model.set_experts_implementation("tilewright")
    stock.double()
    ours.double()
    with pytest.warns(UserWarning, match="runs transformers' own experts"):
        agree()
    stock.float()
    ours.float()
    tilewright.restore(ours)
    assert {type(m) for m in ours.modules() if isinstance(m, ParamWrapper)} == {ParamWrapper}
    assert (agree() - adapted).abs().max() < 1e-4


def test_a_compiled_model_gives_the_same_logits():
    model = build("qwen3_moe")
    tilewright.accelerate(model)
    with torch.no_grad():
        need = model(input_ids=words()).logits
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=words()).logits, need)
