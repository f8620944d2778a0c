"""Half fine-tuning: what is drawn, what it costs, rounds, the trainer and the command line."""

import copy

import pytest
import torch
from tiny_models import DECODERS, VOCABULARY
from torch.utils._python_dispatch import TorchDispatchMode

import tilewright as tw
from tilewright import cli, finetune
from tilewright.files import InputError
from tilewright.half import find_units

PER_LAYER = {"attention": 4, "ffn": 3, "norm": 2}


def llama(layers=4, **options):
    torch.manual_seed(0)
    return DECODERS["llama"](num_hidden_layers=layers, **options)


def loss_of(model, n=0):
    tokens = torch.randint(VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(n))
    return model(tokens, labels=tokens).loss


def train(model, optimizer, steps, first=0):
    for n in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, n).backward()
        optimizer.step()


def bits(t):
    return t.detach().clone().view(torch.uint8)


def frozen_of(plan, model):
    return {n: p for n, p in model.named_parameters() if not p.requires_grad}


# --- what is drawn ---


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_counts_of_each_layer_are_those_of_the_paper(layers, seed):
    plan = tw.HalfPlan(llama(layers), seed=seed)
    with plan.round(0):
        counts = plan.report().counts
    assert len(counts) == layers
    assert all(c["attention"] == (2, 4) and c["norm"] == (1, 2) for c in counts)
    of_ffn = [c["ffn"][0] for c in counts]
    assert set(of_ffn) <= {1, 2} and sum(of_ffn) == round(1.5 * layers)


@pytest.mark.parametrize("level", ["category", "layer", "model"])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_every_level_meets_the_ratio(level, ratio):
    plan = tw.HalfPlan(llama(), level=level, ratio=ratio)
    drawn = plan.draw(0)
    assert len(plan.units) == 36
    n_of = {c: sum(u.category == c for u in drawn) for c in PER_LAYER}
    if level == "category":
        assert n_of == {c: round(ratio * 4 * n) for c, n in PER_LAYER.items()}
    elif level == "layer":
        assert all(abs(sum(u.layer == n for u in drawn) - 9 * ratio) < 1 for n in range(4))
    assert abs(len(drawn) - 36 * ratio) <= 1


def test_every_unit_is_drawn_in_some_round_and_no_two_rounds_agree():
    plan = tw.HalfPlan(llama())
    rounds = [plan.draw(t) for t in range(24)]
    assert len(set(rounds)) == 24
    assert set().union(*rounds) == set(plan.units)
    share = [sum(u in r for r in rounds) / 24 for u in plan.units]
    assert 0.1 < min(share) and max(share) < 0.9
    assert rounds[3] == plan.draw(3) and rounds[3] != tw.HalfPlan(plan.model, seed=1).draw(3)


@pytest.mark.parametrize("name", DECODERS)
def test_other_models_have_their_matrices_in_the_right_categories(name):
    model = DECODERS[name]()
    units = find_units(model)
    for unit in units:
        is_norm = all(p.dim() == 1 for p in unit.parameters)
        assert (unit.category == "norm") == is_norm, unit.name
        last = unit.name.split(".")
        if unit.category == "attention":
            assert any("attn" in part or "attention" in part for part in last), unit.name
    assert {u.category for u in units} == {"attention", "ffn", "norm"}
    with tw.HalfPlan(model).round(0):
        named = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert named and not any("embed_tokens" in n or "lm_head" in n for n in named)
        assert "model.norm.weight" not in named


def test_the_report_counts_what_truly_trains():
    model = llama()
    plan = tw.HalfPlan(model)
    with pytest.raises(ValueError, match="before the first round"):
        plan.report()
    shares = set()
    for t in range(6):
        with plan.round(t):
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            report = plan.report()
        assert report.trained == trained and report.share == trained / report.total
        assert report.total == sum(p.numel() for p in model.parameters())
        shares.add(report.of_layers)
        assert f"round {t}: {trained} of" in str(report) and "layer 3: " in str(report)
    assert len(shares) > 1  # k and v are smaller than q and o: 2 of 4 is not half of the weights


# --- what it costs ---


@pytest.mark.parametrize("make", [tw.AdamW, torch.optim.AdamW])
def test_what_stands_still_keeps_its_bits_and_has_no_state(make):
    model = llama()
    plan = tw.HalfPlan(model)
    optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.1)
    with plan.round(0, optimizer):
        frozen = {n: bits(p) for n, p in frozen_of(plan, model).items()}
        train(model, optimizer, 20)
        trained = plan.report().trained
        assert len(frozen) == 4 * 9 // 2
    for name, p in model.named_parameters():
        assert (name in frozen) == (p not in optimizer.state), name
        if name in frozen:
            assert torch.equal(bits(p), frozen[name]), name
    kept = sum(s[n].nbytes for s in optimizer.state.values() for n in ("exp_avg", "exp_avg_sq"))
    assert kept == 8 * trained


class _CountProducts(TorchDispatchMode):
    """Matrix products whose result is as large as one of the weights."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.count += tuple(out.shape) in self.shapes
        return out


def weight_products(model):
    shapes = {
        s for u in find_units_of(model) for p in u.parameters if p.dim() == 2
        for s in (tuple(p.shape), tuple(p.shape)[::-1])
    }  # fmt: skip
    loss = loss_of(model)
    with _CountProducts(shapes) as counter:
        loss.backward()
    return counter.count


def find_units_of(model):
    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(True)
    units = find_units(model)
    for p, flag in zip(model.parameters(), flags, strict=True):
        p.requires_grad_(flag)
    return units


def saved_bytes(model):
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model)
    del loss
    return sum(found.values())


@pytest.mark.parametrize("accelerated", [False, True])
def test_half_of_the_weight_gradients_are_computed(accelerated):
    model = llama()
    if accelerated:
        tw.accelerate(model)
    all_products, all_bytes = weight_products(model), saved_bytes(model)
    plan = tw.HalfPlan(model)
    with plan.round(0):
        model.zero_grad()
        assert all_products == 4 * 7 and weight_products(model) == 4 * 7 // 2
        assert saved_bytes(model) < all_bytes
        with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.requires_grad for p in model.parameters())


# --- rounds ---


def test_a_new_round_trains_another_set_with_fresh_moments():
    model = llama()
    plan = tw.HalfPlan(model)
    optimizer = tw.AdamW(model.parameters(), lr=1e-3)
    with plan.round(0, optimizer):
        train(model, optimizer, 5)
        first = plan.draw(0)
    with plan.round(1, optimizer):
        second = plan.draw(1)
        assert first != second
        train(model, optimizer, 3, first=5)
        steps = {
            n: int(optimizer.state[p]["step"]) for n, p in model.named_parameters()
            if p in optimizer.state
        }  # fmt: skip
    names = {p: n for n, p in model.named_parameters()}
    for unit in plan.units:
        for p in unit.parameters:
            want = {(True, True): 8, (False, True): 3}.get((unit in first, unit in second))
            assert steps.get(names[p]) == want, names[p]
    assert steps["model.embed_tokens.weight"] == 8


def test_a_ratio_of_one_is_plain_adamw_to_the_last_bit():
    ends = []
    for planned in (True, False):
        model = llama()
        optimizer = tw.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        if planned:
            plan = tw.HalfPlan(model, ratio=1.0)
            for t in range(2):
                with plan.round(t, optimizer):
                    train(model, optimizer, 3, first=3 * t)
            assert plan.report().share == 1
        else:
            train(model, optimizer, 6)
        ends.append([bits(p) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_what_was_frozen_before_stays_so():
    model = llama()
    model.model.layers[2].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    plan = tw.HalfPlan(model, ratio=1.0)
    with plan.round(0):
        assert not any(p.requires_grad for p in model.model.layers[2].parameters())
        assert plan.report().trained == sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )
    assert not model.model.embed_tokens.weight.requires_grad


def test_refusals():
    with pytest.raises(ValueError, match=r"no level 'head'\. Known: category, layer, model"):
        tw.HalfPlan(llama(), level="head")
    with pytest.raises(ValueError, match=r"ratio is 1\.5, need 0 <= ratio <= 1"):
        tw.HalfPlan(llama(), ratio=1.5)
    with pytest.raises(ValueError, match="Sequential has no list of layers with attention"):
        tw.HalfPlan(torch.nn.Sequential(torch.nn.Linear(3, 3)))


# --- the trainer ---

DOCUMENTS = [[(7 * i + 3 * j) % 90 + 3 for j in range(60)] for i in range(12)]


def test_finetune_trains_half_of_a_model():
    model = llama(2)
    before = copy.deepcopy(model.state_dict())
    options = dict(steps=3, context=32, learning_rate=1e-2, adapter="half", half_round=2)
    result = finetune(model, DOCUMENTS, **options)
    plan = tw.HalfPlan(llama(2), seed=0)
    active = {u.name for u in plan.draw(2)}
    changed = {n for n, t in result.model.state_dict().items() if not torch.equal(t, before[n])}
    units = {u.name for u in plan.units}
    assert {n.removesuffix(".weight") for n in changed} & units == active
    assert "model.embed_tokens.weight" in changed
    assert all(p.requires_grad for p in result.model.parameters())


def test_finetune_of_half_a_model_resumes(tmp_path):
    from tilewright import train as trainer

    options = dict(steps=4, context=32, learning_rate=1e-2, adapter="half", save_every=2)
    straight = finetune(llama(2), DOCUMENTS, out=tmp_path / "one", **options)
    stopped = trainer.Trainer.step

    def stop_after_two(self, step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        return stopped(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            finetune(llama(2), DOCUMENTS, out=tmp_path / "two", **options)
    resumed = finetune(llama(2), DOCUMENTS, out=tmp_path / "two", resume=True, **options)
    assert resumed.losses == straight.losses
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_options_that_do_not_go_together():
    for options, message in (
        (dict(adapter="half", lora_rank=4), "adapter 'half' and lora_rank 4"),
        (dict(adapter="half", train=("norm",)), "adapter 'half' decides what trains"),
        (dict(adapter="half", half_level="head"), "half_level is 'head', need category"),
        (dict(adapter="half", half_ratio=2.0), "half_ratio is 2.0, need a number"),
        (dict(half_round=1), "half_round belongs to adapter 'half'"),
    ):
        with pytest.raises(InputError, match=message):
            finetune(llama(2), DOCUMENTS, steps=1, context=32, **options)


def test_the_command_line(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    done = cli.main(
        ["finetune", "--model", "tiny-llama", "--data", str(text), "--out", str(tmp_path / "out"),
         "--adapter", "half", "--half-level", "layer", "--steps", "2", "--context", "32"]
    )  # fmt: skip
    assert done == 0, capsys.readouterr().err
    assert "steps         2" in capsys.readouterr().out
