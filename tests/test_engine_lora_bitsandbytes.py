"""LoRA over 4-bit layers of bitsandbytes: read once as ours, with the same results."""

import copy

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from yardstick import assert_errs_at_most_twice_stock, rms

import tilewright as tw
from tilewright.adapt import lora_layers

bnb = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")


def packed_by_bitsandbytes(linear, **options):
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, **options
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(), requires_grad=False,
        quant_type=options.get("quant_type", "fp4"),
        compress_statistics=options.get("compress_statistics", True), module=layer,
    )  # fmt: skip
    if linear.bias is not None:
        layer.bias = linear.bias
    return layer.to("cpu")


class Layer(nn.Module):
    def __init__(self, dtype, **options):
        super().__init__()
        self.proj = packed_by_bitsandbytes(nn.Linear(128, 48, dtype=dtype), **options)

    def forward(self, x):
        return self.proj(x)


def adapted(model, targets=("proj",)):
    model.is_loaded_in_4bit = True  # how PEFT knows
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(targets))
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


OPTIONS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4, nested": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
}


def outcome(layer, model, x, dy):
    x = x.clone().requires_grad_()
    y = model(x)
    wanted = x, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_errs_at_most_twice_bitsandbytes_and_peft(dtype, options):
    stock = adapted(Layer(dtype, **OPTIONS[options]))
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    ours = copy.deepcopy(stock)
    report = tw.accelerate(ours)
    kind = OPTIONS[options]["quant_type"]
    assert [r.note for r in report.replaced] == [f"over bitsandbytes {kind}, copied into ours"]
    x, dy = torch.randn(9, 128).to(dtype), torch.randn(9, 48).to(dtype)
    layer = stock.base_model.model.proj
    weight = layer.base_layer.weight
    decoded = functional.dequantize_4bit(weight.data, weight.quant_state).double()

    def truth(change):
        down, up = (m["default"].weight.detach() for m in (layer.lora_A, layer.lora_B))
        leaves = [change(t.double()).requires_grad_() for t in (x, down, up)]
        y = leaves[0] @ change(decoded).T + 3 * (leaves[0] @ leaves[1].T @ leaves[2].T)
        y = y + change(layer.base_layer.bias.detach().double())
        return y, *torch.autograd.grad(y, leaves, change(dy.double()))

    for name, got, want, true, terms in zip(
        ("y", "dx", "dA", "dB"),
        outcome(ours.base_model.model.proj, ours, x, dy),
        outcome(layer, stock, x, dy),
        truth(torch.Tensor.double),
        truth(torch.Tensor.abs),
        strict=True,
    ):
        assert_errs_at_most_twice_stock(name, got, want, true, terms)


def llama():
    model = tiny.seeded(tiny.DECODERS["llama"], hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            setattr(layer.mlp, name, packed_by_bitsandbytes(linear, **OPTIONS["nf4, nested"]))
    return model


def test_a_model_trains_as_with_peft_alone_and_comes_back(tmp_path):
    stock = adapted(llama(), ("up_proj", "down_proj")).train()
    ours = copy.deepcopy(stock)
    classes = [type(m) for m in ours.modules()]
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    report = tw.accelerate(ours)
    assert len([r for r in report.replaced if r.kind == "lora"]) == 4
    ids, grads = tiny.tokens(), []
    for model in (ours, stock):
        model(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        assert rms(grad - grads[1][name]) <= 1e-5 * rms(grads[1][name]), name

    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).train()
    assert (again(ids).logits - stock(ids).logits).abs().max() <= 2e-5
    tw.restore(ours)
    assert [type(m) for m in ours.modules()] == classes
    after = ours.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)


def test_it_is_read_once_and_again_when_replaced(monkeypatch):
    reads = []
    original = lora_layers.read_bitsandbytes
    monkeypatch.setattr(
        lora_layers, "read_bitsandbytes", lambda *args: reads.append(args) or original(*args)
    )
    model = adapted(Layer(torch.float32, **OPTIONS["nf4"])).train()
    tw.accelerate(model)
    x = torch.randn(3, 128)
    for _ in range(3):
        model(x)
    assert len(reads) == 1
    with pytest.warns(UserWarning, match="rounding errors"):
        model.merge_adapter()  # bitsandbytes packs a new weight
        model.unmerge_adapter()
    stock = copy.deepcopy(model)
    tw.restore(stock)
    assert (model(x) - stock(x)).abs().max() <= 2e-5
    assert len(reads) == 2


def test_a_base_that_has_not_been_quantized_stays():
    layer = Layer(torch.float32, **OPTIONS["nf4"])
    linear = nn.Linear(128, 48)
    layer.proj.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False)
    with pytest.raises(ValueError, match="its base is not quantized yet"):
        tw.accelerate(adapted(layer))


def test_blocks_that_cross_rows_oddly_stay_with_bitsandbytes():
    layer = Layer(torch.float32, **OPTIONS["nf4"])
    layer.proj = packed_by_bitsandbytes(nn.Linear(36, 16), **OPTIONS["nf4"])
    with pytest.raises(ValueError, match="Linear4bit stays: its base cannot be read"):
        tw.accelerate(adapted(layer))
