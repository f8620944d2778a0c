"""accelerate on norms, gated layers and rotary positions: what they compute, what they leave."""

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model
from test_norm import summed_exactly
from torch import nn

import tilewright as tw
from tilewright import ops
from tilewright.adapt import forms, gates, norms, rotary

LONG = 700  # tokens: large enough that no replaced layer leaves the call to torch
FAMILIES = {  # replaced beside attention: norms, gated layers, rotary positions
    "llama": (5, 2, 2),
    "mistral, window": (5, 2, 2),
    "qwen2, window in one layer": (5, 2, 2),
    "qwen3": (9, 2, 2),
    "gemma2, softcap and windows": (9, 2, 2),
    "gemma3, windows": (13, 2, 2),
    "phi3, window": (5, 2, 2),
}


def build(name, **more):
    builders = {**tiny.DECODERS, **tiny.ENCODERS}
    return tiny.seeded(builders[name], max_position_embeddings=LONG, **more)


def counts(report):
    return tuple(len(tiny.of_kind(report, kind)[0]) for kind in ("norm", "mlp", "rope"))


@pytest.fixture
def used(monkeypatch):
    """The names of our operators that ran."""
    names = set()
    for module, operator in (
        (norms, "rms_norm"),
        (norms, "layer_norm"),
        (gates, "swiglu"),
        (gates, "geglu"),
        (rotary, "rope"),
    ):

        def spying(*args, _name=operator, **kwargs):
            names.add(_name)
            return getattr(ops, _name)(*args, **kwargs)

        monkeypatch.setattr(module, operator, spying)
    return names


def loss_and_gradients(model, ids):
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), grads


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_models(name, used):
    """Logits and gradients in float32, in shapes where every kernel runs; then exactly stock."""
    model = build(name, attn_implementation="eager")
    classes = {n: type(m) for n, m in model.named_modules()}
    ids = tiny.tokens(length=LONG)
    want, want_gradients = loss_and_gradients(model, ids)
    report = tw.accelerate(model)
    assert counts(report) == FAMILIES[name] and not report.skipped
    got, got_gradients = loss_and_gradients(model, ids)
    assert used == {"rms_norm", "rope", "geglu" if "gemma" in name else "swiglu"}
    assert (got - want).abs().max() <= 1e-4  # over 700 tokens
    largest = max(g.abs().max() for g in want_gradients.values())
    for part, gradient in want_gradients.items():
        assert (got_gradients[part] - gradient).abs().max() <= 1e-4 * largest, part
    tw.restore(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    again, _ = loss_and_gradients(model, ids)
    assert torch.equal(again, want)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_layer_norm_of_encoders(name, used):
    """In bfloat16, as near to float32 as stock; float32 itself is left to torch."""
    ids = torch.cat([tiny.tokens(length=LONG - 2)] * 4)  # 8 x 698 x 32 elements
    mask = torch.ones_like(ids)
    model = build(name)
    with torch.no_grad():
        truth = model(ids, attention_mask=mask).last_hidden_state
        report = tw.accelerate(model)
        assert (model(ids, attention_mask=mask).last_hidden_state - truth).abs().max() <= 2e-5
        assert counts(report) == (5, 0, 0) and used == set()
        tw.restore(model.bfloat16())
        stock = model(ids, attention_mask=mask).last_hidden_state
        tw.accelerate(model)
        ours = model(ids, attention_mask=mask).last_hidden_state
    assert used == {"layer_norm"}
    miss, of_stock = ((t - truth).square().mean().sqrt() for t in (ours, stock))
    assert miss <= 1.2 * of_stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3, windows", "gpt_oss, sinks and windows"])
def test_a_norm_is_bitwise_the_stock_one(name, dtype):
    """Where squares add up without rounding; the weight in x's dtype, and in float32 under it."""
    model = build(name).to(dtype)
    norm = model.model.norm
    x = summed_exactly(3, 50, 32, dtype=dtype)
    with torch.no_grad():
        norm.weight.normal_()
        for weight_dtype in (dtype, torch.float32):
            norm.to(weight_dtype)
            want = norm(x)
            tw.accelerate(model)
            got = norm(x)
            assert got.dtype == want.dtype and torch.equal(got, want)
            tw.restore(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "phi3, window", "glm, part of a head"])
def test_rotated_queries_and_keys_are_bitwise_the_stock_ones(name, dtype):
    stock = rotary.modeling_llama.apply_rotary_pos_emb
    if name != "llama":
        stock = rotary.modeling_phi3.apply_rotary_pos_emb
    n = 3 if name.startswith("glm") else 8
    angle = torch.arange(5.0)[:, None] * torch.rand(n)
    cos, sin = (torch.cat((t, t), dim=-1)[None].to(dtype) for t in (angle.cos(), angle.sin()))
    q, k = torch.randn(2, 5, 4, 16).to(dtype), torch.randn(2, 5, 2, 16).to(dtype)
    for axis in (1, 2):
        both = (t.transpose(1, 2) if axis == 1 else t for t in (q, k))
        both = list(both)
        want = stock(*both, cos, sin, unsqueeze_dim=axis)
        got = rotary.turning(stock)(*both, cos, sin, unsqueeze_dim=axis)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_replaced_classes_look_like_the_stock_ones():
    """By name and by isinstance, in the model, in a copy and in a pickle."""
    model = build("llama")
    tw.accelerate(model)
    classes = type(model.model.norm), type(model.model.layers[0].self_attn)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        norm, layer = same.model.norm, same.model.layers[0]
        assert type(norm).__name__ == "LlamaRMSNorm" and type(norm) is classes[0]
        assert isinstance(norm, norms.LlamaRMSNorm) and type(norm) is not norms.LlamaRMSNorm
        assert isinstance(layer.mlp, gates.LlamaMLP)
        assert type(layer.self_attn) is classes[1]
        tw.restore(same)
        assert type(norm) is norms.LlamaRMSNorm and type(layer.mlp) is gates.LlamaMLP


def test_other_models_of_the_class_stay_stock(used):
    ours, stock = build("llama"), build("llama")
    tw.accelerate(ours)
    stock(tiny.tokens(length=LONG))
    assert used == set()


@pytest.mark.parametrize("when", ["before", "after"])
def test_with_peft(when, used):
    """The projections of a gated layer may become LoRA layers at either time."""
    model = build("llama", attn_implementation="eager")
    ids = tiny.tokens(length=LONG)
    adapter = LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)

    def adapted():
        torch.manual_seed(3)
        return get_peft_model(copy.deepcopy(model), adapter)

    stock = adapted()
    want, want_gradients = loss_and_gradients(stock, ids)
    if when == "after":
        ours = stock
        tw.accelerate(ours)
    else:
        tw.accelerate(model)
        ours = adapted()
    used.clear()
    got, got_gradients = loss_and_gradients(ours, ids)
    assert used == {"rms_norm", "rope", "swiglu"}
    assert (got - want).abs().max() <= 1e-4
    assert got_gradients.keys() == want_gradients.keys() and len(got_gradients) == 8
    tw.restore(ours)
    again, _ = loss_and_gradients(ours, ids)
    assert torch.equal(again, want)


def test_under_autocast_and_with_checkpointing(used):
    """As Trainer runs it with mixed precision: the same loss as stock within bfloat16."""
    model = build("llama").train()
    model.gradient_checkpointing_enable()
    ids = tiny.tokens(length=LONG)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, labels=ids).loss

    want = run()
    tw.accelerate(model)
    loss = run()
    loss.backward()
    assert used == {"rms_norm", "rope", "swiglu"}
    assert abs(loss - want) <= 5e-3 * want
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_layer_norm_under_autocast_is_stock(used):
    model = build("bert")
    tw.accelerate(model)
    x = torch.randn(5000, 32).bfloat16()
    norm = model.embeddings.LayerNorm
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), nn.functional.layer_norm(x, (32,), norm.weight, norm.bias,
                                                             norm.eps))  # fmt: skip
    assert used == set()


def test_hooks_on_an_activation_are_seen():
    model = build("llama")
    tw.accelerate(model)
    seen = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    model(tiny.tokens(length=LONG))
    assert seen == [1]


def test_unknown_forms_stay_stock():
    """An RMSNorm with another formula, an activation without a kernel, other rotary functions."""

    class OddRMSNorm(nn.Module):
        def forward(self, x):
            return x / x.abs().mean(-1, keepdim=True)

    model = build("llama", hidden_act="relu")
    model.model.norm = OddRMSNorm()
    report = tw.accelerate(model)
    reasons = {(s.kind, s.was): s.reason for s in report.skipped}
    assert reasons == {
        ("norm", "OddRMSNorm"): "its forward is none of those that rms_norm and layer_norm compute",
        ("mlp", "LlamaMLP"): "its activation is ReLU",
    }
    report = tw.accelerate(build("gpt_oss, sinks and windows"))
    assert {s.reason for s in tiny.of_kind(report, "rope")[1]} == {
        "its apply_rotary_pos_emb is none of those that rope computes"
    }
    report = tw.accelerate(build("deepseek_v3, values narrower than keys"))
    assert {s.reason for s in tiny.of_kind(report, "rope")[1]} == {
        "it may call apply_rotary_pos_emb_interleave instead"
    }


def test_without_kernels_nothing_is_replaced(monkeypatch):
    """A missing C++ part would leave the reference, which is slower than stock."""
    monkeypatch.setattr(forms, "why_not_native", lambda: "tilewright._C is not built")
    report = tw.accelerate(build("llama"))
    assert {r.kind for r in report.replaced} == {"attention"}
    assert {s.reason for s in report.skipped} == {"tilewright._C is not built"}


def test_float64_models_stay_stock():
    report = tw.accelerate(build("llama").double())
    assert {r.kind for r in report.replaced} <= {"attention", "mlp", "rope"}
    assert "its parameters are torch.float64" in {s.reason for s in report.skipped}
