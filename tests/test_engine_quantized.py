"""QuantizedLinear, quantize, dequantize and merge."""

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from yardstick import assert_errs_at_most_twice_stock, rms

import tilewright as tw
from tilewright.quantized import QuantizedLinear

FORMATS = {
    "nf4": tw.NF4(),
    "nf4, nested": tw.NF4(double_quant=True),
    "fp4": tw.FP4(group_size=32),
    "int4": tw.Int4(),
    "int4 with offsets": tw.Int4(symmetric=False, group_size=32),
    "int8": tw.Int8(),
    "fp8 by blocks": tw.FP8(scaling="block"),
    "mxfp4": tw.MXFP4(),
}


def layer(format="nf4", n_in=136, n_out=40, dtype=torch.float32):
    linear = nn.Linear(n_in, n_out, dtype=dtype)
    return linear, QuantizedLinear.from_linear(linear, FORMATS[format])


def llama(**more):
    return tiny.seeded(tiny.DECODERS["llama"], **more)


# the layer


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_dx_err_at_most_twice_torch_over_the_decoded_weight(format, dtype):
    linear, packed = layer(format, dtype=dtype)
    decoded = tw.dequantize_weight(packed.packed, torch.float32).double()
    x, dy = torch.randn(3, 7, 136).to(dtype), torch.randn(3, 7, 40).to(dtype)
    stock = copy.deepcopy(linear)
    stock.weight.data = decoded.to(dtype)

    def outcome(module):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        return y, torch.autograd.grad(y, leaf, dy)[0]

    def truth(change):
        wide, up = change(x.double()), change(dy.double())
        weight, bias = change(decoded), change(linear.bias.detach().double())
        return wide @ weight.T + bias, up @ weight

    for name, got, want, true, terms in zip(
        ("y", "dx"), outcome(packed), outcome(stock), truth(lambda t: t), truth(torch.abs),
        strict=True,
    ):  # fmt: skip
        assert_errs_at_most_twice_stock(name, got, want, true, terms)


@pytest.mark.parametrize("format", FORMATS)
def test_copies_files_and_state_dicts_hold_the_same_layer(format, tmp_path):
    _, packed = layer(format)
    x = torch.randn(5, 136)
    want = packed(x)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x), want)
    state = packed.state_dict()
    assert {"codes", "scales", "packing", "bias"} <= set(state)
    torch.manual_seed(4)
    _, other = layer(format)
    assert not torch.equal(other(x), want)
    other.load_state_dict(state)
    assert torch.equal(other(x), want)
    torch.manual_seed(4)
    _, other = layer(format)
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(x), want)


def test_a_state_dict_of_another_format_is_refused():
    state = layer("nf4")[1].state_dict()
    for format in ("fp4", "int4", "nf4, nested"):
        with pytest.raises(RuntimeError, match="is packed with format nf4, group_size 64"):
            nn.ModuleDict({"proj": layer(format)[1]}).load_state_dict(
                {f"proj.{name}": tensor for name, tensor in state.items()}
            )
    with pytest.raises(RuntimeError, match=r'Missing key.*"codes"'):
        layer("nf4")[1].load_state_dict(nn.Linear(136, 40).state_dict())


@pytest.mark.parametrize("format", ["nf4", "nf4, nested", "int4 with offsets", "fp8 by blocks"])
def test_another_dtype_leaves_the_packed_tensors_alone(format):
    _, packed = layer(format)
    before = {n: t.clone() for n, t in packed.state_dict().items() if n != "bias"}
    decoded = tw.dequantize_weight(packed.packed, torch.float32)
    packed.to(torch.bfloat16)
    after = packed.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert after["bias"].dtype == torch.bfloat16 and packed.weight.dtype == torch.bfloat16
    assert packed.to_linear().weight.dtype == torch.bfloat16
    assert packed(torch.randn(2, 136, dtype=torch.bfloat16)).dtype == torch.bfloat16
    packed.float()
    assert torch.equal(packed.weight + 0, decoded)
    meta = copy.deepcopy(packed).to("meta")
    assert meta.packed.device.type == "meta" and meta.packed.shape == (40, 136)


def test_the_weight_reads_as_the_decoded_matrix_and_refuses_to_be_written():
    _, packed = layer()
    decoded = tw.dequantize_weight(packed.packed)
    weight = packed.weight
    assert weight.shape == (40, 136) and weight.dtype == torch.float32
    assert type(weight * 2) is torch.Tensor and torch.equal(weight * 2, decoded * 2)
    assert torch.equal(nn.functional.linear(torch.eye(136), weight), decoded.T)
    refusal = "weight is decoded from packed codes and cannot be written"
    with pytest.raises(RuntimeError, match=refusal):
        packed.weight.data += 1
    with pytest.raises(RuntimeError, match=refusal):
        packed.weight.data = decoded
    with pytest.raises(RuntimeError, match=refusal):
        packed.weight.zero_()
    assert torch.equal(packed.weight + 0, decoded)
    other = torch.zeros(40, 136)
    other += packed.weight
    assert torch.equal(other, decoded)


def test_a_compiled_layer_is_one_graph(clean_memory):
    for format in ("nf4", "nf4, nested"):
        torch._dynamo.reset()
        _, packed = layer(format)
        x = torch.randn(5, 136)
        compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), packed(x))


# models


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_packs_all_but_the_head_and_dequantize_takes_it_back(format):
    model = llama(tie_word_embeddings=False)
    dense = copy.deepcopy(model)
    report = tw.quantize(model, FORMATS[format])
    assert len(report.replaced) == 14
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("lm_head", "it is the output embedding")
    ]
    assert report.bytes_before == sum(p.nbytes for p in dense.parameters()) + sum(
        b.nbytes for b in dense.buffers()
    )
    assert report.bytes_after < 0.6 * report.bytes_before
    assert "bytes before" in str(report) and "model.layers.{0-1}.mlp.up_proj" in str(report)
    ids = tiny.tokens()
    packed = model(ids).logits
    back = tw.dequantize(model)
    assert len(back.replaced) == 14 and back.bytes_after == report.bytes_before
    assert (model(ids).logits - packed).abs().max() <= 1e-4 * packed.abs().max()
    kinds = [type(m) for m in dense.modules()]
    assert [type(m) for m in model.modules()] == kinds
    for (name, was), (_, now) in zip(
        dense.named_parameters(), model.named_parameters(), strict=True
    ):
        if "proj" not in name:
            assert torch.equal(was, now), name
        else:
            assert 0 < rms(now - was) < 0.2 * rms(was), name


def test_what_is_shared_stays_and_what_stands_twice_stays_one():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.embed.weight
            self.one = nn.Linear(16, 16)
            self.again = self.one
            self.hooked = nn.Linear(16, 16)
            self.hooked.register_forward_hook(lambda *unused: None)
            self.attention = nn.MultiheadAttention(16, 2)
            self.double = nn.Linear(16, 16, dtype=torch.float64)

    model = Model()
    report = tw.quantize(model, tw.Int8())
    assert [r.name for r in report.replaced] == ["one"]
    assert type(model.one) is QuantizedLinear and model.again is model.one
    assert {s.name: s.reason for s in report.skipped} == {
        "head": "its weight is shared by embed and head",
        "hooked": "there are hooks on it",
        "attention.out_proj": "it is not exactly torch.nn.Linear",
        "double": "its weight is torch.float64",
    }


def test_the_filter_decides_also_about_the_head():
    model = llama()
    report = tw.quantize(model, tw.NF4(), lambda name, linear: "mlp" in name or name == "lm_head")
    assert len(report.replaced) == 7
    assert {s.reason for s in report.skipped} == {"the filter leaves it out"}
    assert type(model.lm_head) is QuantizedLinear
    report = tw.quantize(model, tw.Int8())
    assert len(report.replaced) == 8 and len(report.skipped) == 7
    assert {s.reason for s in report.skipped} == {"it is packed already (nf4)"}


def test_adapters_are_not_packed_but_the_base_below_them_is():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    dense = model(tiny.tokens()).logits
    report = tw.quantize(model, tw.Int8())
    assert len(report.replaced) == 14
    assert {type(m) for n, m in model.named_modules() if "lora_" in n} & {QuantizedLinear} == set()
    assert 0 < rms(model(tiny.tokens()).logits - dense) < 0.05 * rms(dense)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tw.quantize("model", tw.NF4()), "quantize: model is a str, need a torch.nn"),
        (lambda: tw.quantize(llama(), "nf4"), r"quantize: format is 'nf4', need one of NF4\(\)"),
        (lambda: tw.quantize(llama(), tw.NF4(), "mlp"), "quantize: filter is 'mlp', need a func"),
        (
            lambda: tw.quantize(llama(), tw.NF4(), lambda name, linear: False),
            "quantize: no linear layer can be packed",
        ),
        (lambda: tw.dequantize([]), "dequantize: model is a list, need a torch.nn.Module"),
        (lambda: tw.dequantize(llama()), "dequantize: this LlamaForCausalLM has no packed layer"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# LoRA over packed layers, without accelerate: stock PEFT takes them as linear layers


def qlora(format="nf4", targets="all-linear", **options):
    model = llama()
    if format is not None:
        tw.quantize(model, FORMATS[format])
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_peft_takes_packed_layers_and_its_files_reload(tmp_path):
    model = qlora()
    assert sum("lora_A" in n for n, _ in model.named_parameters()) == 14
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n for n in trainable)
    ids = tiny.tokens()
    want = model(ids).logits
    model.save_pretrained(tmp_path)
    base = llama()
    tw.quantize(base, FORMATS["nf4"])
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(ids).logits, want)


def test_accelerated_and_stock_peft_agree_over_packed_layers():
    stock = qlora("nf4, nested").train()
    ours = copy.deepcopy(stock)
    packed = {n: b.clone() for n, b in stock.named_buffers()}
    report = tw.accelerate(ours)
    assert {r.note for r in report.replaced if r.kind == "lora"} == {"over nf4"}
    ids, found = tiny.tokens(), []
    for model in (ours, stock):
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert (found[0][0] - found[1][0]).abs() <= 2e-6 * found[1][0]
    for name, grad in found[0][1].items():
        assert rms(grad - found[1][1][name]) <= 1e-5 * rms(found[1][1][name]), name
    assert all(torch.equal(b, packed[n]) for n, b in ours.named_buffers())


def test_the_usual_recipe_under_autocast_errs_at_most_twice_as_peft_does():
    model = llama().to(torch.bfloat16)
    tw.quantize(model, tw.NF4(double_quant=True))
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    torch.manual_seed(3)
    stock = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    stock.train()
    ours = copy.deepcopy(stock)
    tw.accelerate(ours)
    ids, grads = tiny.tokens(), {}
    for name, of, autocast in (
        ("truth", stock, False),
        ("stock", stock, True),
        ("ours", ours, True),
    ):
        of.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            of(ids, labels=ids).loss.backward()
        grads[name] = {n: p.grad.clone() for n, p in of.named_parameters() if p.requires_grad}
    errors = {
        name: rms(torch.cat([(g - grads["truth"][n]).flatten() for n, g in grads[name].items()]))
        for name in ("stock", "ours")
    }
    assert grads["ours"].keys() == grads["truth"].keys() and errors["stock"] > 0
    assert errors["ours"] <= 2 * errors["stock"], errors


def test_peft_cannot_merge_into_a_packed_layer_and_is_told_who_can():
    with pytest.raises(RuntimeError, match=r"tilewright\.merge merges adapters"):
        qlora().merge_adapter()
    with pytest.raises(RuntimeError, match=r"tilewright\.merge merges adapters"):
        qlora().merge_and_unload(safe_merge=True)


# merge


def test_merging_over_the_decoded_weight_says_what_rounding_costs():
    model = qlora().eval()
    ids = tiny.tokens()
    want = model(ids).logits
    done = tw.merge(model)
    assert type(done.model).__name__ == "LlamaForCausalLM" and len(done.layers) == 14
    assert not any(
        "lora" in n or isinstance(m, QuantizedLinear) for n, m in done.model.named_modules()
    )
    assert (done.model(ids).logits - want).abs().max() <= 2e-5
    assert done.rms_error == 0.0  # float32 holds the sum as it was computed
    assert "merged 14 layers, rms error 0" in str(done)


def test_merging_over_the_original_weight_errs_by_the_quantization_error():
    dense = llama()
    model = qlora()
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    original = dense.model.layers[1].mlp.up_proj.weight
    error = rms(original - layer.base_layer.weight)
    update = layer.get_delta_weight("default")
    done = tw.merge(model, base="original", original=dense)
    record = next(r for r in done.layers if "1.mlp.up_proj" in r.name)
    assert record.rms_error == pytest.approx(error, rel=1e-5)
    assert record.rms_update == pytest.approx(rms(update), rel=1e-5)
    merged = done.model.model.layers[1].mlp.up_proj.weight
    assert rms(merged - (original + update)) <= 1e-7 * rms(merged)


def test_merging_into_packed_weights_again_reports_their_error(tmp_path):
    model = qlora()
    intended = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            intended[name] = module.base_layer.weight + module.get_delta_weight("default")
    done = tw.merge(model, format=tw.Int4())
    assert len(done.layers) == 14
    for record in done.layers:
        layer = done.model.get_submodule(record.name.removeprefix("base_model.model."))
        error = rms(layer.weight - intended[record.name])
        assert record.rms_error == pytest.approx(error, rel=1e-5) and error > 0
    done.model.save_pretrained(tmp_path)
    again = type(done.model).from_pretrained(tmp_path)
    assert torch.equal(again(tiny.tokens()).logits, done.model(tiny.tokens()).logits)


def test_bfloat16_and_folders_and_single_layers(tmp_path):
    dense = llama().to(torch.bfloat16)
    dense.save_pretrained(tmp_path)
    model = get_peft_model(copy.deepcopy(dense), LoraConfig(r=4, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    intended = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    one = tw.merge(copy.deepcopy(layer))
    assert type(one.model) is nn.Linear and one.model.weight.dtype == torch.bfloat16
    error = rms(one.model.weight.float() - intended)
    assert one.rms_error == pytest.approx(error, rel=1e-5)
    assert 0 < error <= torch.finfo(torch.bfloat16).eps / 2 * rms(intended)
    tw.quantize(model, tw.NF4())
    done = tw.merge(model, base="original", original=tmp_path)
    assert torch.equal(done.model.model.layers[0].self_attn.q_proj.weight, one.model.weight)
    tw.quantize(done.model, tw.NF4(), lambda name, linear: name.endswith("q_proj"))


def merged_already():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tw.merge(3), "merge: model is a int, need a torch.nn.Module"),
        (lambda: tw.merge(llama()), "merge: this LlamaForCausalLM has no LoRA layer"),
        (lambda: tw.merge(qlora(), "w4"), 'merge: no base "w4". Known: dequantized, original'),
        (lambda: tw.merge(qlora(), "original"), "merge: original belongs to base=.original., and"),
        (lambda: tw.merge(qlora(), format="nf4"), r"merge: format is 'nf4', need one of NF4\(\)"),
        (
            lambda: tw.merge(qlora(), "original", original={}),
            "merge: original has no model.layers.0.self_attn.q_proj.weight, need the model before",
        ),
        (
            lambda: tw.merge(qlora(), "original", original=llama(hidden_size=48)),
            r"q_proj.weight in original has shape \(32, 48\), need \(32, 32\)",
        ),
        (lambda: tw.merge(merged_already()), "cannot be merged: it is merged already"),
        (lambda: tw.merge(qlora(None, use_dora=True)), "is a variant of LoRA .DoraLinearVariant"),
        (lambda: tw.merge(qlora(None, lora_bias=True)), "default has a bias .lora_bias."),
    ],
)
def test_merge_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tensors as \.safetensors"):
        tw.merge(qlora(), "original", original=tmp_path)
