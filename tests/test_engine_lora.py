"""PEFT's LoRA layers through lora_linear: equal to stock PEFT, and stock wherever it must be."""

import copy
import pickle

import peft
import pytest
import tiny_models as tiny
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from yardstick import assert_errs_at_most_twice_stock, rms

import tilewright as tw
from tilewright.adapt import lora_layers

LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def adapted(model, seed=3, **options):
    """PEFT's LoRA with both factors away from their start, so that the update counts."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": LINEARS, **options})
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def llama(**options):
    return adapted(tiny.seeded(tiny.DECODERS["llama"]), **options)


def kinds(report):
    return [r for r in report.replaced if r.kind == "lora"]


@pytest.fixture
def fused_calls(monkeypatch):
    """The layers' calls of our operator, counted."""
    calls = []
    original = lora_layers.lora_linear

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(lora_layers, "lora_linear", counted)
    return calls


# one layer, against float64

# (tokens, inputs, outputs, rank)
SHAPES = {
    "one of everything": (1, 1, 1, 1),
    "nothing divides": (7, 65, 33, 3),
    "usual": (64, 128, 96, 8),
}
# dtype of the base and of x, of the adapter, and whether stock and ours run under autocast. An
# adapter of more digits than x loses them where it meets x, as it does in stock under autocast.
PRECISIONS = {
    "float32": (torch.float32, torch.float32, ()),
    "bfloat16": (torch.bfloat16, torch.bfloat16, ()),
    "bfloat16, adapter float32 as PEFT has it": (torch.bfloat16, torch.float32, ("stock",)),
    "autocast": (torch.float32, torch.float32, ("stock", "ours")),
}


class Layer(nn.Module):
    def __init__(self, n_in, n_out, dtype, bias=True):
        super().__init__()
        self.proj = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.proj(x)


def outcome(model, x, dy, autocast):
    """y, and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    layer = model.base_model.model.proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return y, *torch.autograd.grad(y, (x, down, up), dy.to(y.dtype))


def truth_of(layer, weight, x, dy, change=torch.Tensor.double):
    """The same in float64 from the layer's numbers as they are stored, `change` applied to each."""
    down, up = (m["default"].weight.detach() for m in (layer.lora_A, layer.lora_B))
    leaves = [change(t.detach().double()).requires_grad_() for t in (x, down, up)]
    y = leaves[0] @ change(weight.double()).T + layer.scaling["default"] * (
        leaves[0] @ leaves[1].T @ leaves[2].T
    )
    if layer.base_layer.bias is not None:
        y = y + change(layer.base_layer.bias.detach().double())
    return y, *torch.autograd.grad(y, leaves, change(dy.double()))


def compare(stock, ours, weight, x, dy, autocast=()):
    layer = stock.base_model.model.proj
    results = zip(
        ("y", "dx", "dA", "dB"),
        outcome(ours, x, dy, "ours" in autocast),
        outcome(stock, x, dy, "stock" in autocast),
        truth_of(layer, weight, x, dy),
        truth_of(layer, weight, x, dy, torch.Tensor.abs),
        strict=True,
    )
    for name, got, want, truth, terms in results:
        assert got.dtype == want.dtype, name
        if autocast:  # what is float32 has been rounded on the way, in stock as in ours
            got, want = got.bfloat16(), want.bfloat16()
        assert_errs_at_most_twice_stock(name, got, want, truth, terms)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_errs_at_most_twice_stock_peft(shape, precision, fused_calls):
    tokens, n_in, n_out, rank = SHAPES[shape]
    dtype, of_adapter, autocast = PRECISIONS[precision]
    stock = adapted(Layer(n_in, n_out, dtype), r=rank, target_modules=["proj"])
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(of_adapter)
    ours = copy.deepcopy(stock)
    tw.accelerate(ours)
    x, dy = torch.randn(2, tokens, n_in).to(dtype), torch.randn(2, tokens, n_out).to(dtype)
    weight = stock.base_model.model.proj.base_layer.weight.detach()
    compare(stock, ours, weight, x, dy, autocast)
    assert len(fused_calls) == 1


FORMATS = {
    "nf4": tw.NF4(),
    "nf4, nested": tw.NF4(double_quant=True),
    "int4": tw.Int4(),
    "int4 with offsets": tw.Int4(symmetric=False, group_size=32),
    "int8": tw.Int8(),
    "fp8": tw.FP8(),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_over_a_packed_base_it_errs_at_most_twice_peft_over_the_decoded_one(
    dtype, format, fused_calls
):
    model = Layer(136, 40, dtype)
    tw.quantize(model, FORMATS[format])
    packed = adapted(model, target_modules=["proj"])
    stock = copy.deepcopy(packed)
    decoded = stock.base_model.model.proj.base_layer
    stock.base_model.model.proj.base_layer = decoded.to_linear()
    tw.accelerate(packed)
    x, dy = torch.randn(3, 9, 136).to(dtype), torch.randn(3, 9, 40).to(dtype)
    before = {k: v.clone() for k, v in decoded.state_dict().items()}
    weight = tw.dequantize_weight(decoded.packed, torch.float32)
    compare(stock, packed, weight, x, dy, autocast=("stock",) if dtype == torch.bfloat16 else ())
    after = packed.base_model.model.proj.base_layer.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert len(fused_calls) == 1


# whole models


def loss_and_gradients(model):
    ids = tiny.tokens()
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same_training(a, b):
    loss_a, grads_a = loss_and_gradients(a)
    loss_b, grads_b = loss_and_gradients(b)
    assert (loss_a - loss_b).abs() <= 2e-6 * loss_b.abs()
    assert grads_a.keys() == grads_b.keys() and grads_a
    for name, grad in grads_a.items():
        # float32 over some ten layers: sums in another order
        assert rms(grad - grads_b[name]) <= 1e-5 * rms(grads_b[name]), name


def test_the_report_names_the_layers():
    report = tw.accelerate(llama())
    assert len(kinds(report)) == 8
    assert {(r.was, r.now, r.note) for r in kinds(report)} == {("Linear", "lora_linear", "")}
    assert "lora       base_model.model.model.layers.{0-1}.self_attn.q_proj" in str(report)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2, window in one layer", "gemma2, softcap and windows"]
)
def test_loss_and_gradients_are_those_of_stock_peft(name, fused_calls):
    stock = adapted(tiny.seeded(tiny.DECODERS[name])).train()
    ours = copy.deepcopy(stock)
    tw.accelerate(ours)
    same_training(ours, stock)
    assert len(fused_calls) == 8


def test_restore_gives_back_peft_itself():
    model = llama()
    classes = [type(m) for m in model.modules()]
    state = [sorted(vars(m)) for m in model.modules()]
    tw.accelerate(model)
    assert [type(m) for m in model.modules()] != classes
    model(tiny.tokens())
    tw.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == state


def test_a_copy_and_a_pickled_model_run_the_same():
    model = llama()
    tw.accelerate(model)
    want = model(tiny.tokens()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tiny.tokens()).logits, want)
        tw.restore(other)
        assert type(other.base_model.model.model.layers[0].mlp.up_proj) is peft.tuners.lora.Linear


def test_saved_files_are_peft_files(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "stock")
    tw.accelerate(model)
    model.save_pretrained(tmp_path / "ours")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()
    want = model(tiny.tokens()).logits
    stock = PeftModel.from_pretrained(tiny.seeded(tiny.DECODERS["llama"]), tmp_path / "ours")
    assert (stock(tiny.tokens()).logits - want).abs().max() <= 2e-5


def test_trained_adapters_agree_after_some_steps(tmp_path):
    def train(model):
        args = hf.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, seed=1,
            learning_rate=1e-2, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no",
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tiny.tokens(8)]
        trainer = hf.Trainer(model, args, train_dataset=data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    stock = llama()
    ours = copy.deepcopy(stock)
    tw.accelerate(ours)
    assert train(ours) == pytest.approx(train(stock), rel=1e-4)


# dropout


def test_dropout_is_unbiased_and_replayed_in_the_backward(fused_calls):
    model = adapted(
        Layer(512, 24, torch.float32, bias=False), lora_dropout=0.25, target_modules=["proj"]
    )
    tw.accelerate(model.train())
    layer = model.base_model.model.proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(6, 512)
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    assert torch.equal(model(x), y)  # the seed is drawn from torch's own generator
    assert fused_calls[0]["dropout_p"] == 0.25

    # what was kept, found by looking: y is linear in the factors of each element of x
    factors = dropped_factors(model, x, layer, seed=5)
    dropped = factors == 0
    assert (factors[~dropped] * 0.75 - 1).abs().max() <= 1e-3
    factors = torch.where(dropped, 0.0, 1 / 0.75)
    share = dropped.float().mean().item()
    assert abs(share - 0.25) <= 7 * (0.25 * 0.75 / factors.numel()) ** 0.5
    kept = (x * factors).double()
    want = torch.autograd.grad(
        (
            x.double() @ layer.base_layer.weight.detach().double().T
            + 3 * (kept @ down.double().T @ up.double().T)
        ).sum(),
        (down, up),
    )
    torch.manual_seed(5)
    got = torch.autograd.grad(model(x).sum(), (down, up))
    for g, w in zip(got, want, strict=True):
        assert rms(g - w) <= 1e-5 * rms(w)
    model.eval()
    plain = model(x)
    tw.restore(model)
    assert (plain - model(x)).abs().max() <= 2e-5


def dropped_factors(model, x, layer, seed):
    """(T, I) by how dA depends on x: with A = 0 but one row, and B known, dA is the dropped x."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    factors = torch.empty_like(x)
    for t in range(x.shape[0]):
        torch.manual_seed(seed)
        y = model(x)
        (grad,) = torch.autograd.grad(y[t].sum(), down)
        factors[t] = grad[0] / (3 * up[:, 0].sum() * x[t])
    return torch.where(factors.abs() < 1e-3, 0.0, factors).detach()


def test_dropout_under_recomputation_has_the_same_gradients(fused_calls):
    stock = llama(lora_dropout=0.3).train()
    tw.accelerate(stock)
    plain = copy.deepcopy(stock)
    stock.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(7)
    loss_a, grads_a = loss_and_gradients(stock)
    torch.manual_seed(7)
    loss_b, grads_b = loss_and_gradients(plain)
    assert torch.equal(loss_a, loss_b)
    assert all(torch.equal(grads_a[n], grads_b[n]) for n in grads_b)


# where PEFT's own path must run


def disabled():
    model = llama()
    model.base_model.disable_adapter_layers()
    return model


def merged():
    model = llama()
    model.merge_adapter()
    return model


def two_active():
    model = llama()
    model.add_adapter("other", LoraConfig(r=2, target_modules=LINEARS, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return model


def none_of_that_name():
    model = llama()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    model.set_adapter("other")
    return model


def hooked(which):
    def build():
        model = llama()
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                inner = {"base": module.base_layer, "A": module.lora_A["default"]}[which]
                inner.register_forward_hook(lambda module, args, out: out * 1.5)
        return model

    return build


class OwnLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_base():
    model = tiny.seeded(tiny.DECODERS["llama"])
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
            linear.__class__ = OwnLinear
        layer.mlp.down_proj.__class__ = OwnLinear
    return adapted(model)


STOCK = {  # name: (model, what the report says)
    "disabled": (disabled, "its adapters are disabled"),
    "merged": (merged, "its adapter is merged into the base"),
    "two adapters": (two_active, "2 adapters are active at once"),
    "another adapter": (none_of_that_name, "it has no adapter 'other', which is the active one"),
    "DoRA with dropout": (
        lambda: llama(use_dora=True, lora_dropout=0.1),
        "DoRA with dropout multiplies the base by another input than the layer's",
    ),
    "another variant": (
        lambda: llama(use_dora=False, velora_config=peft.VeloraConfig(num_groups=8)),
        "its adapter is a variant (VeloraLinearVariant)",
    ),
    "bias": (lambda: llama(lora_bias=True), "its adapter has a bias (lora_bias)"),
    "hook on the base": (hooked("base"), "there are hooks on its base layer"),
    "hook on A": (hooked("A"), "there are hooks on its A layer"),
    "own base": (own_base, "its base is a OwnLinear, not exactly torch.nn.Linear"),
}


@pytest.mark.parametrize("case", STOCK)
def test_stays_with_peft_and_says_why(case, fused_calls):
    build, reason = STOCK[case]
    model = build().eval()
    with torch.no_grad():
        want = model(tiny.tokens()).logits
        report = tw.accelerate(model)
        got = model(tiny.tokens()).logits
    reasons = {s.reason for s in report.skipped if s.kind == "lora"}
    assert reasons == {reason}
    assert (got - want).abs().max() <= 2e-5
    assert len(fused_calls) == (2 if case == "another adapter" else 0)  # where that one is
    stays = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    if case != "another adapter":
        assert {type(m) for m in stays} == {peft.tuners.lora.Linear}


def test_what_happens_to_an_accelerated_model_is_seen(fused_calls):
    model = llama().eval()
    stock = copy.deepcopy(model)
    tw.accelerate(model)
    ids = tiny.tokens()

    def agree(fused, act=lambda m: m(ids).logits):
        fused_calls.clear()
        with torch.no_grad():
            assert (act(model) - act(stock)).abs().max() <= 2e-5
        assert len(fused_calls) == fused

    agree(8)
    with model.disable_adapter(), stock.disable_adapter():
        agree(0)
    agree(8)
    for m in (model, stock):
        m.merge_adapter()
    agree(0)
    for m in (model, stock):
        m.unmerge_adapter()
    agree(8)
    torch.manual_seed(9)
    other = LoraConfig(r=2, target_modules=LINEARS, init_lora_weights=False)
    model.add_adapter("other", other)
    torch.manual_seed(9)
    stock.add_adapter("other", other)
    for m in (model, stock):
        m.set_adapter("other")
    agree(8)
    names = ["default", "other"]
    agree(0, lambda m: m(ids, adapter_names=names).logits)
    handle = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(
        lambda *unused: None
    )
    agree(7)
    handle.remove()
    agree(8)


def test_a_plain_linear_is_left_to_torch():
    report = tw.accelerate(llama())
    assert not any("k_proj" in r.name for r in report.replaced)
    with pytest.raises(ValueError, match="accelerate: nothing in the model can be replaced"):
        tw.accelerate(nn.Sequential(nn.Linear(4, 4)))


def test_a_compiled_layer_is_one_graph(clean_memory):
    model = adapted(Layer(64, 48, torch.float32), target_modules=["proj"])
    x = torch.randn(5, 64)
    want = model(x)
    tw.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert (compiled(x) - want).abs().max() <= 2e-5
