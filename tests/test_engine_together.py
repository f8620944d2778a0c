"""Gate and up of an accelerated model by one linear_group: the same bits, and hooks are heard."""

import pytest
import tiny_models as tiny
import torch
from linear_inputs import bitwise
from peft import LoraConfig, get_peft_model
from torch import nn

import tilewright as tw
from tilewright.adapt import gates, together

TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]


def build(base="nf4", dtype=torch.float32, targets=TARGETS, **options):
    model = tiny.seeded(tiny.DECODERS["llama"]).to(dtype)
    if base != "dense":
        tw.quantize(model, tw.NF4(group_size=16) if base == "nf4" else tw.Int8())
    if targets:
        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False,
                            **options)  # fmt: skip
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    return model


def mlps(model):
    return [m for m in model.modules() if hasattr(m, "gate_proj")]


@pytest.fixture
def groups(monkeypatch):
    """How many layers each call of linear_group has."""
    calls, usual = [], together.linear_group

    def counted(x, layers):
        calls.append(len(layers))
        return usual(x, layers)

    monkeypatch.setattr(together, "linear_group", counted)
    return calls


def outcome(model, seed=5):
    """Logits, and the gradients of what trains."""
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(tiny.tokens()).logits
    if logits.requires_grad:
        logits.float().square().mean().backward()
    return logits.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def one_by_one(monkeypatch, model, **options):
    with monkeypatch.context() as patched:
        patched.setattr(gates, "project", lambda x, *modules: tuple(m(x) for m in modules))
        return outcome(model, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_results_have_the_bits_of_separate_calls(monkeypatch, groups, base, dtype, dropout):
    model = build(base, dtype, lora_dropout=dropout).train()
    tw.accelerate(model)
    logits, grads = one_by_one(monkeypatch, model)
    assert groups == []
    ours, our_grads = outcome(model)
    assert groups == [2, 2]
    assert bitwise(logits, ours) and grads.keys() == our_grads.keys()
    eps = torch.finfo(dtype).eps
    for name, grad in grads.items():
        if ".1.mlp" in name:  # nothing of dx has reached these yet
            assert bitwise(grad, our_grads[name]), name
        else:
            off = (grad - our_grads[name]).float().norm()
            assert off <= 8 * eps * grad.float().norm(), name
    assert not all(bitwise(g, our_grads[n]) for n, g in grads.items()), "dx is summed otherwise"


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_packed_layers_without_adapters(monkeypatch, groups, base):
    model = build(base, torch.bfloat16, targets=None).eval()
    tw.accelerate(model)
    with torch.no_grad():
        expected, _ = one_by_one(monkeypatch, model)
        for _ in range(2):  # the second time by the prepared call
            assert bitwise(outcome(model)[0], expected)
    assert groups == [2] * 4


def test_some_layers_have_an_adapter_and_others_none(monkeypatch, groups):
    model = build("nf4", targets=["up_proj"])
    tw.accelerate(model)
    expected, _ = one_by_one(monkeypatch, model)
    assert bitwise(outcome(model)[0], expected) and groups == [2, 2]


def test_a_plain_linear_beside_an_adapter_is_left_to_torch(groups):
    model = build("dense", targets=["up_proj"])
    tw.accelerate(model)
    outcome(model)
    assert groups == []


def test_restore_ends_it(groups):
    model = build("nf4").eval()
    stock, _ = outcome(model)
    tw.accelerate(model)
    outcome(model)
    assert groups == [2, 2]
    tw.restore(model)
    assert bitwise(outcome(model)[0], stock) and groups == [2, 2]


def hook_of_forward(module):
    return module.register_forward_hook(lambda *_: None)


def hook_before(module):
    return module.register_forward_pre_hook(lambda *_: None)


def hook_of_backward(module):
    return module.register_full_backward_hook(lambda *_: None)


class Patched:
    """A forward of the instance's own, as offloading puts it there."""

    def __init__(self, module):
        self.module, usual = module, module.forward
        module.forward = lambda x: usual(x)

    def remove(self):
        del self.module.forward


class Compiled:
    def __init__(self, module):
        self.module = module
        module._compiled_call_impl = module._call_impl

    def remove(self):
        self.module._compiled_call_impl = None


WATCHED = [hook_of_forward, hook_before, hook_of_backward, Patched, Compiled]


@pytest.mark.parametrize("watch", WATCHED, ids=[w.__name__ for w in WATCHED])
@pytest.mark.parametrize("which", ["gate_proj", "up_proj"])
@pytest.mark.parametrize("base", ["adapter", "packed"])
def test_a_projection_that_somebody_watches_is_called(groups, base, which, watch):
    model = build("nf4", targets=TARGETS if base == "adapter" else None)
    tw.accelerate(model)
    expected, _ = outcome(model)
    groups.clear()
    handle = watch(getattr(mlps(model)[0], which))
    assert bitwise(outcome(model)[0], expected)
    assert groups == [2]  # the other layer's
    handle.remove()
    outcome(model)
    assert groups == [2, 2, 2]


def test_hooks_see_what_they_saw(groups):
    model = build("nf4").eval()
    tw.accelerate(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        outcome(model)
    finally:
        handle.remove()
    assert groups == []
    assert sum("Linear" in name for name in seen) >= 2 * 7
    mlps(model)[0].up_proj.register_forward_hook(lambda module, given, y: 2 * y)
    doubled, _ = outcome(model)
    tw.restore(model)
    assert (doubled - outcome(model)[0]).abs().max() <= 2e-5


def test_adapters_that_peft_has_to_run(groups):
    model = build("nf4").eval()
    tw.accelerate(model)
    with model.disable_adapter():
        outcome(model)
    assert groups == []
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    names = ["default", "other"]
    with torch.no_grad():
        model(tiny.tokens(), adapter_names=names)
    assert groups == []
    model.set_adapter("other")
    outcome(model)
    assert groups == [2, 2]


def test_a_subclass_with_another_forward_is_called(groups):
    model = build("nf4", targets=None)
    tw.accelerate(model)
    projection = mlps(model)[0].up_proj
    cls = type(projection)
    projection.__class__ = type("Mine", (cls,), {"forward": lambda self, x: cls.forward(self, x)})
    outcome(model)
    assert groups == [2]


def test_recomputed_layers_have_the_same_gradients(groups):
    grads = []
    for recompute in (False, True):
        model = build("nf4", lora_dropout=0.3).train()
        tw.accelerate(model)
        if recompute:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        grads.append(outcome(model)[1])
    assert groups == [2] * (2 + 4)
    assert all(bitwise(g, grads[1][n]) for n, g in grads[0].items())


def test_a_compiled_layer_is_one_graph_of_separate_calls(groups, clean_memory):
    model = build("nf4").eval()
    tw.accelerate(model)
    mlp = mlps(model)[0]
    x = torch.randn(3, 32)
    want = mlp(x)
    groups.clear()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    assert (compiled(x) - want).abs().max() <= 2e-5 and groups == []
