"""AdamW against float64 and torch's own: accuracy, threads, clipping, state dicts, refusals."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from yardstick import assert_errs_at_most_twice_stock

import tilewright as tw
from tilewright import native, ops

STEPS = 4
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
SHAPES = {
    "one": (1,),
    "none": (0, 7),
    "scalar": (),
    "below-a-vector": (3,),
    "nothing-divides": (37, 41),
    "past-a-chunk": (16384 + 5,),
    "several-chunks": (3, 20001),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def gradients_of(shapes, dtype=torch.float32, steps=STEPS):
    """[step][tensor]; some are tiny, some zero, as gradients of rare tokens are."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        found.append([(g * 10.0 ** (4 * g.clamp(max=0))).to(dtype) for g in drawn])
    return found


def start(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def train(optimizer, parameters, gradients):
    for of_step in gradients:
        for p, g in zip(parameters, of_step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return optimizer


def truth_of(parameters, gradients, lr, betas, eps, weight_decay):
    """p, m, v in float64, by torch's own optimizer in that precision."""
    exact = [nn.Parameter(p.detach().double()) for p in parameters]
    optimizer = torch.optim.AdamW(
        exact, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False
    )
    train(optimizer, exact, [[g.double() for g in gs] for gs in gradients])
    return [(p.detach(), optimizer.state[p]) for p in exact]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step_errs_at_most_twice_as_much_as_torchs(shape, dtype, impl):
    impl.require("adamw_update", start([shape], dtype))
    gradients = gradients_of([shape], dtype)
    ours, stock = ([p.detach().to(impl.device).requires_grad_() for p in start([shape], dtype)]
                   for _ in range(2))  # fmt: skip
    on_device = [[g.to(impl.device) for g in gs] for gs in gradients]
    mine = train(tw.AdamW(ours, **OPTIONS, impl=impl.name), ours, on_device)
    theirs = train(torch.optim.AdamW(stock, **OPTIONS, foreach=False), stock, on_device)
    ((p, state),) = truth_of(start([shape], dtype), gradients, **OPTIONS)
    # each step rounds once more: of few elements, stock may have been lucky in all of them
    assert_errs_at_most_twice_stock("p", ours[0], stock[0], p, STEPS * p.abs())
    if dtype == torch.float32:
        for name in ("exp_avg", "exp_avg_sq"):
            got, true = mine.state[ours[0]][name], state[name]
            rest = theirs.state[stock[0]][name], true, STEPS * true.abs()
            assert_errs_at_most_twice_stock(name, got, *rest)
            if got.numel() > 5:
                with pytest.raises(AssertionError):
                    assert_errs_at_most_twice_stock(name, 1.01 * got, *rest)
    change = p - start([shape], dtype)[0].double()
    if change.numel() > 5 and dtype == torch.float32:  # a step that is 1 % too long is seen
        with pytest.raises(AssertionError):
            assert_errs_at_most_twice_stock(
                "p", (ours[0].cpu() + 0.01 * change).to(dtype), stock[0], p, STEPS * p.abs()
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_step_in_16_bits_is_the_rounding_of_the_exact_one(dtype, kernel):
    """From 0, where a step that is 1 % too long shows in 16 bits."""
    zeros = [nn.Parameter(torch.zeros(3001, dtype=dtype)) for _ in range(2)]
    kernel.require("adamw_update", zeros)
    gradients = gradients_of([(3001,)], dtype, steps=1)
    (p, q), options = zeros, {**OPTIONS, "lr": 0.3}
    train(tw.AdamW([p], **options, impl=kernel.name), [p], gradients)
    ((truth, _),) = truth_of([q], gradients, **options)
    assert (p != truth.to(dtype)).double().mean() < 0.01  # ties and near ties
    assert ((1.01 * truth).to(dtype) != truth.to(dtype)).double().mean() > 0.5


def test_many_steps_stay_as_exact_as_torchs(kernel):
    parameters = start([(501,)])
    gradients = gradients_of([(501,)], steps=300)
    kernel.require("adamw_update", parameters)
    options = {**OPTIONS, "betas": (0.9, 0.999), "lr": 1e-3}
    ours, stock = start([(501,)]), start([(501,)])
    train(tw.AdamW(ours, **options, impl=kernel.name), ours, gradients)
    train(torch.optim.AdamW(stock, **options, foreach=False), stock, gradients)
    ((p, _),) = truth_of(parameters, gradients, **options)
    assert_errs_at_most_twice_stock("p", ours[0], stock[0], p)


@pytest.mark.parametrize("ages", [False, True])
def test_the_number_of_threads_changes_no_bit(ages, kernel_once):
    shapes = [(100_003,), (7,), (50, 1000)]
    kernel_once.require("adamw_update", start(shapes))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            parameters = start(shapes)
            optimizer = tw.AdamW(parameters, **OPTIONS, ages=ages, clip_norm=0.5)
            train(optimizer, parameters, gradients_of(shapes))
            results.append([optimizer.last_norm, *parameters])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "gapped", "expanded gradient"])
def test_any_strides(layout):
    def make():
        base = torch.linspace(-1, 1, 12 * 10).view(12, 10)
        if layout == "transposed":
            return nn.Parameter(base.t())
        return nn.Parameter(base[:, ::2] if layout == "gapped" else base)

    ours, stock = make(), make()
    gradient = torch.randn(stock.shape)
    if layout == "expanded gradient":
        gradient = torch.randn(1, 10).expand(12, 10)
    for p in (ours, stock):
        p.grad = gradient
    tw.AdamW([ours], **OPTIONS).step()
    torch.optim.AdamW([stock], **OPTIONS).step()
    assert torch.allclose(ours, stock, rtol=1e-6, atol=1e-7)


def test_groups_closures_maximize_and_missing_gradients():
    results = []
    for kind in (tw.AdamW, torch.optim.AdamW):
        a, b, c = start([(5,), (6,), (7,)])
        groups = [{"params": [a], "lr": 0.1}, {"params": [b, c], "maximize": True}]
        optimizer = kind(groups, lr=torch.tensor(0.01), weight_decay=0.3)

        def closure(optimizer=optimizer, a=a, b=b):
            optimizer.zero_grad()
            loss = (a**2).sum() + (b**3).sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        assert c not in optimizer.state
        results.append((torch.tensor(losses), a, b, c))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


# --- the norm, clipping, scaling ---


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_norm_of_all_gradients(dtype, impl):
    tensors = [torch.randn(s, device=impl.device).to(dtype) for s in SHAPES.values()]
    impl.require("gradient_norm", tensors)
    exact = torch.cat([t.double().flatten() for t in tensors]).norm()
    got = tw.gradient_norm(tensors, impl=impl.name)
    assert got.dtype == torch.float64 and abs(got - exact) <= 1e-7 * exact
    assert tw.gradient_norm([], impl=impl.name) == 0
    assert not abs(1.01 * got - exact) <= 1e-7 * exact


@pytest.mark.parametrize("limit", [0.7, 1e6, math.inf])
def test_clipping_is_that_of_torch_and_writes_no_gradient(limit):
    shapes = [(1000, 30), (11,)]
    ours, stock = start(shapes), start(shapes)
    mine = tw.AdamW(ours, **OPTIONS, clip_norm=limit)
    theirs = torch.optim.AdamW(stock, **OPTIONS)
    for of_step in gradients_of(shapes):
        for p, q, g in zip(ours, stock, of_step, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        mine.step()
        norm = nn.utils.clip_grad_norm_(stock, limit)
        theirs.step()
        assert torch.allclose(mine.last_norm, norm, rtol=1e-6)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, of_step, strict=True))
    for p, q in zip(ours, stock, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
        assert torch.allclose(mine.state[p]["exp_avg"], theirs.state[q]["exp_avg"], rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(bad):
    (p,) = start([(9,)])
    optimizer = tw.AdamW([p], clip_norm=1.0)
    train(optimizer, [p], gradients_of([(9,)]))
    before = copy.deepcopy((p.detach(), optimizer.state[p]))
    p.grad[3] = bad
    optimizer.step()
    assert not optimizer.last_norm.isfinite()
    assert torch.equal(p, before[0])
    for name, held in before[1].items():
        assert torch.equal(optimizer.state[p][name], held), name


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_under_a_gradient_scaler(clip_norm):
    """Unscaled on the way; a step with an infinity is left out, as with torch's own."""
    results = []
    for kind in (tw.AdamW, torch.optim.AdamW):
        (p,) = start([(40,)])
        own = {"clip_norm": clip_norm} if kind is tw.AdamW else {}
        optimizer = kind([p], **OPTIONS, **own)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        for n in range(6):
            optimizer.zero_grad()
            scaler.scale((p * torch.sin(torch.arange(40.0) + n)).sum()).backward()
            if n == 3:
                p.grad[5] = float("inf")
            if clip_norm and not own:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_([p], clip_norm)
            scaler.step(optimizer)
            scaler.update()
        results.append((p, optimizer.state[p]["step"], torch.tensor(scaler.get_scale())))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert results[0][1] == 5


# --- state dicts ---


# torch keeps float16 states for float16, where squares of small gradients are 0
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_torchs_state_dicts_load_here_and_ours_there(dtype):
    shapes = [(33, 5), (4,)]
    gradients = gradients_of(shapes, dtype)
    one, other = start(shapes, dtype), start(shapes, dtype)
    ours = train(tw.AdamW(one, **OPTIONS), one, gradients)
    theirs = train(torch.optim.AdamW(other, **OPTIONS), other, gradients)
    crossed = torch.optim.AdamW(one, lr=1.0), tw.AdamW(other, lr=1.0)
    crossed[0].load_state_dict(ours.state_dict())
    crossed[1].load_state_dict(theirs.state_dict())
    assert crossed[0].param_groups[0]["lr"] == crossed[1].param_groups[0]["lr"] == 1e-2
    state = crossed[1].state[other[0]]
    assert state["exp_avg"].dtype == torch.float32 and state["step"] == STEPS
    train(crossed[0], one, gradients)
    train(crossed[1], other, gradients)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    for p, q in zip(one, other, strict=True):
        assert torch.allclose(p.float(), q.float(), atol=limit)


KINDS = [{}, {"ages": True}, {"narrow": "master"}, {"narrow": "stochastic"}, {"state_bits": 8}]


@pytest.mark.parametrize("how", ["state dict", "copied", "pickled"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_going_on_from_what_was_kept_changes_no_bit(options, how):
    shapes = [(33, 50), (4,)]
    gradients = gradients_of(shapes, torch.bfloat16, 6)
    straight = start(shapes, torch.bfloat16)
    train(tw.AdamW(straight, **OPTIONS, **options), straight, gradients)
    p = start(shapes, torch.bfloat16)
    optimizer = train(tw.AdamW(p, **OPTIONS, **options), p, gradients[:3])
    if how == "state dict":
        saved, p = copy.deepcopy(optimizer.state_dict()), [nn.Parameter(t.detach()) for t in p]
        optimizer = tw.AdamW(p, lr=5.0, **options)
        optimizer.load_state_dict(saved)
    elif how == "copied":
        p, optimizer = copy.deepcopy((p, optimizer))
    else:
        p, optimizer = pickle.loads(pickle.dumps((p, optimizer)))
    train(optimizer, p, gradients[3:])
    for ours, one_go in zip(p, straight, strict=True):
        assert torch.equal(ours, one_go)


def test_transformers_trainer_takes_it_and_resumes_to_the_last_bit(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tiny_models import DECODERS, VOCABULARY

    data = [{n: torch.randint(VOCABULARY, (11,)) for n in ("input_ids", "labels")}
            for _ in range(16)]  # fmt: skip
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_steps=2, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        model = DECODERS["llama"]()
        optimizer = tw.AdamW(model.parameters(), lr=1e-2, clip_norm=1.0, ages=True)
        trainer = transformers.Trainer(
            model, args, train_dataset=data, optimizers=(optimizer, None)
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        state = optimizer.state[next(iter(model.parameters()))]
        assert (state["age"] == 4).all() and state["age"].dtype == torch.int32
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# --- refusals ---


def test_refusals():
    (p,) = start([(6,)])
    for options, message in (
        ({"lr": -1.0}, "AdamW: lr is -1.0, need 0 or more"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\), need 0 <= beta < 1"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0, need more than 0"),
        ({"narrow": "up"}, "no narrow 'up'. Known: nearest, stochastic, master"),
        ({"state_bits": 4}, "state_bits is 4, need 8 or 32"),
        ({"only": {torch.zeros(3): torch.zeros(3, dtype=torch.bool)}}, "none of params"),
        ({"only": {p: torch.zeros(5, dtype=torch.bool)}}, r"shape \(6,\), is a mask of shape"),
        ({"only": {p: torch.tensor([1, 6])}}, "holds place 6, need 0 to 5"),
        ({"only": {p: torch.tensor([1, 1])}}, "holds a place twice"),
        ({"only": {p: torch.tensor([1.0])}}, "need a bool mask"),
    ):
        with pytest.raises(ValueError, match=message):
            tw.AdamW([p], **options)


def test_gradients_that_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"in group 0 is .*sparse_coo, need a dense"):
        tw.AdamW(table.parameters()).step()
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match=r"torch\.complex64, need one of float32"):
        tw.AdamW([p]).step()


def test_state_dicts_that_are_refused():
    (p,) = start([(6,)])
    p.grad = torch.ones(6)
    for saved, options, message in (
        (torch.optim.AdamW([p], amsgrad=True), {}, "group 0 of the state dict has amsgrad"),
        (torch.optim.AdamW([p]), {"state_bits": 8}, "of 32 bits, need 8 as in state_bits"),
    ):
        saved.step()
        with pytest.raises(ValueError, match=message):
            tw.AdamW([p], **options).load_state_dict(saved.state_dict())


def test_states_that_do_not_fit_are_refused_before_a_kernel_sees_them():
    (p,) = start([(600,)])
    for options in ({}, {"ages": True}, {"state_bits": 8}, {"only": {p: torch.arange(90)}}):
        optimizer = train(tw.AdamW([p], **options), [p], gradients_of([(600,)], steps=1))
        state = optimizer.state[p]
        for name, held in list(state.items()):
            if name == "places":
                continue
            for wrong in (held.new_ones(held.numel() + 1), held.double()):
                state[name] = wrong
                with pytest.raises(ValueError, match=r"adamw_update: the .* of tensor 0 has"):
                    optimizer.step()
            state[name] = held
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["places"][-1] = 600
    with pytest.raises(ValueError, match="holds place 600, need 0 to 599"):
        tw.AdamW([p]).load_state_dict(saved)
    matrix = nn.Parameter(torch.ones(4, 5))
    optimizer = train(tw.SM3([matrix]), [matrix], gradients_of([(4, 5)], steps=1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["row"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"row in the state dict has shape \(3,\), need \(4,\)"):
        tw.SM3([matrix]).load_state_dict(saved)
    optimizer.state[matrix]["column"] = torch.ones(7)
    with pytest.raises(ValueError, match="4 rows and 7 columns do not fit each other"):
        optimizer.step()


def call(**changed):
    p, g, m, v = (torch.ones(4) for _ in range(4))
    lists = dict(parameters=[p], gradients=[g], means=[m], squares=[v], ages=[torch.zeros(())])
    ops.adamw_update(**{**lists, "lr": 0.1, **changed})


def test_what_the_operator_refuses():
    call()
    for changed, message in (
        ({"means": []}, "means has 0 entries, need 1 as parameters"),
        ({"gradients": [torch.ones(5)]}, r"gradients\[0\] has shape \(5,\), need \(4,\)"),
        ({"gradients": [torch.ones(4).double()]}, r"gradients\[0\] is torch.float64"),
        ({"squares": [torch.ones(8)[::2]]}, r"squares\[0\] has shape \(4,\) and strides \(2,\)"),
        ({"means": [torch.ones(4).half()]}, r"means\[0\] is torch.float16"),
        ({"places": [torch.tensor([1])]}, r"means\[0\] has shape \(4,\).*need 1"),
        ({"lr": float("inf")}, "lr is inf, need 0 or more"),
        ({"rounding": "stochastic"}, r"rounding is 'stochastic' and parameters\[0\]"),
        ({"rounding": "down"}, "no rounding 'down'. Known: nearest, stochastic"),
    ):
        with pytest.raises(ValueError, match="adamw_update: .*" + message):
            call(**changed)
    with pytest.raises(ValueError, match=r"gradient_norm: gradients\[1\] is torch.int64"):
        tw.gradient_norm([torch.ones(3), torch.ones(3).long()])
    with pytest.raises(ValueError, match=r'no impl "fast"\. Known: auto'):
        call(impl="fast")
    if native.why_not_native() is None:
        double = {n: [torch.ones(4).double()] for n in
                  ("parameters", "gradients", "means", "squares")}  # fmt: skip
        call(**double)
        with pytest.raises(RuntimeError, match='impl "cpp_cpu" cannot run: no kernel for'):
            call(**double, impl="cpp_cpu")
