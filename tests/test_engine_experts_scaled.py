"""accelerate on experts whose gates multiply their input: Llama 4's, which ask no interface."""

import copy
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from test_engine_experts import MODELS, build, step, words
from yardstick import rms

import tilewright


@pytest.fixture(params=[1, 2])
def models(request, monkeypatch):
    """Stock and accelerated, with one and with two experts a token."""
    config, model, changes = MODELS["llama4"]
    changes = {**changes, "num_experts_per_tok": request.param}
    monkeypatch.setitem(MODELS, "llama4", (config, model, changes))
    stock = build("llama4")
    ours = copy.deepcopy(stock)
    report = tilewright.accelerate(ours)
    mine = [(r.name, r.was, r.now) for r in report.replaced if r.kind == "experts"]
    assert mine == [(f"model.layers.{i}.feed_forward", "Llama4TextMoe", "moe_mlp") for i in (0, 1)]
    assert not [s for s in report.skipped if s.kind == "experts"]
    return stock, ours


def test_each_token_goes_to_its_experts_alone(models, monkeypatch):
    from tilewright.adapt import experts_scaled

    calls = []

    def count(x, ids, gates, *weights, **rule):
        calls.append((tuple(x.shape), tuple(ids.shape), rule["scale_input"], rule["activation"]))
        return tilewright.moe_mlp(x, ids, gates, *weights, **rule)

    monkeypatch.setattr(experts_scaled, "moe_mlp", count)
    stock, ours = models
    (loss, grads), (got, found) = step(stock), step(ours)
    top_k = stock.config.num_experts_per_tok
    assert calls == [((22, 32), (22, top_k), True, "swiglu")] * 2
    assert abs(got - loss) < 2e-6 and found.keys() == grads.keys()
    largest = max(rms(g) for g in grads.values())
    assert all(rms(found[n] - g) <= 1e-5 * rms(g) + 1e-7 * largest for n, g in grads.items())


def test_router_logits_are_collected(models):
    with torch.no_grad():
        collected = [m.model(input_ids=words(), output_router_logits=True) for m in models]
    for one, other in zip(*(c.router_logits for c in collected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_restore_gives_back_the_stock_classes(models):
    stock, ours = models
    tilewright.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    names = [sorted(set(vars(m))) for m in ours.modules()]
    assert names == [sorted(set(vars(m))) for m in stock.modules()]


def test_a_dtype_without_kernel_runs_stock_and_warns_once(models):
    stock, ours = models[0].double(), models[1].double()
    with pytest.warns(UserWarning, match="Llama4TextExperts runs transformers' own experts"):
        got = ours(input_ids=words()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(input_ids=words())
    torch.testing.assert_close(got, stock(input_ids=words()).logits, rtol=1e-6, atol=1e-6)


def test_experts_can_be_called_as_the_stock_layer_does(models):
    rows = torch.randn(4 * 3, 32, generator=torch.Generator().manual_seed(1))
    layers = [m.model.layers[0].feed_forward.experts for m in models]
    assert torch.equal(*(layer(rows) for layer in layers))


def test_what_is_not_known_stays_stock():
    model = build("llama4")
    first, second = (layer.feed_forward for layer in model.model.layers)
    first.experts.act_fn = torch.nn.Softplus()
    second.router.__class__ = type("Other", (type(second.router),), {"forward": lambda *_: None})
    report = tilewright.accelerate(model)
    reasons = {(s.name, s.reason) for s in report.skipped if s.name.endswith("feed_forward")}
    assert reasons == {
        ("model.layers.0.feed_forward", "its experts' activation is Softplus"),
        ("model.layers.1.feed_forward", "its router is a Other"),
    }


@pytest.mark.parametrize("targets", [("gate_up_proj", "down_proj"), ("gate_up_proj",)], ids=len)
def test_lora_by_peft(targets, monkeypatch):
    """Loss and gradients are PEFT's; disabled and in another dtype it is PEFT's own."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[], init_lora_weights=False,
        target_parameters=[f"feed_forward.experts.{t}" for t in targets],
    )  # fmt: skip
    torch.manual_seed(3)
    stock = peft.get_peft_model(build("llama4"), config)
    ours = copy.deepcopy(stock)
    report = tilewright.accelerate(ours)
    assert [r.kind for r in report.replaced].count("experts") == 2
    assert [r.now for r in report.replaced if r.kind == "lora"] == ["moe_mlp"] * 2 * len(targets)
    loss, grads = step(stock)
    with monkeypatch.context() as patched:
        for folded in ("get_delta_factors", "get_delta_weight"):
            patched.setattr(ParamWrapper, folded, lambda *_: pytest.fail("folded"))
        got, found = step(ours)
    assert abs(loss - got) < 2e-6 and grads.keys() == found.keys() and grads
    assert all(rms(found[n] - g) <= 1e-4 * rms(g) + 1e-8 for n, g in grads.items())
    with torch.no_grad():
        with stock.disable_adapter(), ours.disable_adapter():
            without = [m(input_ids=words()).logits for m in (stock, ours)]
        torch.testing.assert_close(*without, rtol=1e-4, atol=1e-4)
        stock.double()
        ours.double()
        with pytest.warns(UserWarning, match="runs transformers' own experts"):
            adapted = [m(input_ids=words()).logits for m in (stock, ours)]
    torch.testing.assert_close(*adapted, rtol=1e-6, atol=1e-6)
    assert (adapted[0] - without[0]).abs().max() > 0.01


def test_a_compiled_model_gives_the_same_logits(models):
    with torch.no_grad():
        need = models[1](input_ids=words()).logits
        compiled = torch.compile(models[1], backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=words()).logits, need)
