"""The norm room's operators towards torch: opcheck, compilation, export, refusals, explain."""

import norm_cases
import pytest
import torch
from norm_cases import CASES, both_ways, normal

import tilewright as tw
from tilewright import ops

OPS = torch.ops.tilewright
CHECKED = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def leaf(*shape, seed=0):
    return normal(*shape, seed=seed).requires_grad_()


def tables(length=5, n=4):
    angle = norm_cases.angles(length, n)
    return angle.cos(), angle.sin()


def stats_of(x, kind):
    return OPS.norm(x.detach(), None, None, None, 1e-5, 0.0, kind, "auto")[2]


CALLS = {
    "norm, llama": lambda: (OPS.norm, (leaf(3, 2, 9), leaf(9), None, None, 1e-5, 0.0, "llama")),
    "norm, residual": lambda: (
        OPS.norm, (leaf(3, 9), leaf(9), None, leaf(3, 9, seed=1), 1e-5, 1.0, "gemma"),
    ),
    "norm, layer": lambda: (
        OPS.norm, (leaf(3, 9), leaf(9), leaf(9, seed=2), None, 1e-5, 0.0, "layer"),
    ),
    "norm_backward": lambda: (
        OPS.norm_backward,
        (normal(3, 9), None, normal(3, 9), normal(9), None, stats_of(normal(3, 9), "llama"), 1e-5,
         0.0, "llama", [True, True, False]),
    ),
    "rope": lambda: (OPS.rope, (leaf(2, 5, 3, 10), *tables(), None, False, False, False)),
    "rope, positions": lambda: (
        OPS.rope, (leaf(1, 3, 2, 8), *tables(), torch.tensor([[4, 0, 2]]), True, False, False),
    ),
    "gated": lambda: (OPS.gated, (leaf(3, 8), leaf(3, 8, seed=1), "silu")),
    "gated, joint": lambda: (OPS.gated, (leaf(3, 8), None, "gelu_tanh")),
    "gated_backward": lambda: (
        OPS.gated_backward,
        (normal(3, 8), normal(3, 8), normal(3, 8, seed=1), "gelu", [True, False]),
    ),
    "embedding": lambda: (OPS.embedding, (torch.tensor([[1, 4], [0, 1]]), leaf(5, 6), 0, False)),
    "embedding_backward": lambda: (
        OPS.embedding_backward, (normal(4, 6), torch.tensor([1, 4, 0, 1]), 5, 0, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, clean_memory):
    operator, arguments = CALLS[name]()
    torch.library.opcheck(operator, (*arguments, "auto"), test_utils=CHECKED)


COMPILED = ("rms, residual", "rms", "layer", "rope", "rope, heads first", "swiglu, joint", "geglu",
            "embedding")  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_whole(name, clean_memory):
    """In one graph, forward and backward, equal to eager bit by bit."""
    case = CASES[name]
    tensors = case.make(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    want = both_ways(case.ours, tensors, case.leaves)
    got = both_ways(compiled, tensors, case.leaves)
    assert all(torch.equal(got[part], want[part]) for part in want)


def test_one_compiled_function_takes_two_and_four_axes(clean_memory):
    torch._dynamo.reset()
    compiled = torch.compile(ops.rms_norm, fullgraph=True, backend="aot_eager")
    weight = normal(16)
    for shape in ((6, 16), (2, 3, 4, 16), (9, 16)):
        x = normal(*shape)
        assert torch.equal(compiled(x, weight), ops.rms_norm(x, weight))


def test_in_place_rope_under_compilation(clean_memory):
    torch._dynamo.reset()
    x, (cos, sin) = normal(2, 5, 3, 8), tables()
    want = ops.rope(x, cos, sin)

    def turn(x):
        ops.rope(x, cos, sin, in_place=True)
        return x + 1

    kept = x.clone()
    got = torch.compile(turn, fullgraph=True, backend="aot_eager")(kept)
    assert torch.equal(kept, want) and torch.equal(got, want + 1)


def test_export_and_back(tmp_path, clean_memory):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(normal(16))

        def forward(self, x):
            return ops.swiglu(ops.rms_norm(x, self.weight))

    block, x = Block(), normal(3, 16)
    program = torch.export.export(block, (x,))
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    assert torch.equal(loaded(x), block(x))


def test_gradients_of_the_reference_are_those_of_its_formula():
    """In float64, by finite differences."""
    double = {"dtype": torch.float64}
    x, weight = (normal(3, 7, **double).requires_grad_(), normal(7, **double).requires_grad_())
    check = torch.autograd.gradcheck
    assert check(lambda x, w: ops.rms_norm(x, w, residual=2 * x), (x, weight))
    assert check(lambda x, w: ops.layer_norm(x, w, w), (x, weight))
    assert check(lambda x: ops.geglu(x, x + 1), (x,))
    assert check(lambda w: ops.embedding(torch.tensor([1, 0, 1]), w), (x,))


def test_float16_model_state_is_not_touched():
    """Nothing is written into the inputs, and a graph that is kept gives the same twice."""
    x, weight = leaf(4, 10), leaf(10)
    before = x.detach().clone(), weight.detach().clone()
    y, total = ops.rms_norm(x, weight, residual=x.detach())
    loss = (y * total).sum()
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])


X, W = normal(3, 8), normal(8)
COS, SIN = tables()
Q = normal(2, 5, 3, 8)
REFUSED = {
    "rms_norm: x is torch.int64": lambda: ops.rms_norm(torch.zeros(3, 8, dtype=torch.long)),
    "rms_norm: x has shape (), need axes (..., N)": lambda: ops.rms_norm(torch.tensor(1.0)),
    "rms_norm: x has shape (3, 0), need": lambda: ops.rms_norm(torch.zeros(3, 0)),
    "rms_norm: weight has shape (7,), need (8,): N as in x": lambda: ops.rms_norm(X, W[:7]),
    "rms_norm: weight is torch.int32, need one of": lambda: ops.rms_norm(X, W.int()),
    "rms_norm: residual has shape (2, 8), need (3, 8)": lambda: ops.rms_norm(X, residual=X[:2]),
    "rms_norm: residual is torch.bfloat16, need torch.float32 as in x": lambda: ops.rms_norm(
        X, residual=X.bfloat16()
    ),
    "rms_norm: eps is -1.0, need a finite number": lambda: ops.rms_norm(X, eps=-1.0),
    'rms_norm: no casting "t5". Known: llama, gemma': lambda: ops.rms_norm(X, casting="t5"),
    "layer_norm: bias has shape (8, 1), need (8,)": lambda: ops.layer_norm(X, W, W[:, None]),
    "rope: x has shape (3, 8), need axes (B, L, H, D)": lambda: ops.rope(X, COS, SIN),
    "need axes (B, H, L, D)": lambda: ops.rope(X, COS, SIN, heads_first=True),
    "rope: sin has shape (4, 4), need (5, 4) as cos": lambda: ops.rope(Q, COS, SIN[:4]),
    "rope: cos is torch.float16 and sin torch.float32": lambda: ops.rope(Q, COS.half(), SIN),
    "rope: cos has shape (4, 4), need (5, C) or (2, 5, C)": lambda: ops.rope(Q, COS[:4], SIN[:4]),
    "rope: cos has 5 columns, need 1 to 4, half of D": lambda: ops.rope(Q, *tables(5, 5)),
    "rope: positions is torch.int64 of shape (5,), need": lambda: ops.rope(
        Q, COS, SIN, positions=torch.arange(5)
    ),
    "need axes (P, C) with positions": lambda: ops.rope(
        Q, COS[None], SIN[None], positions=torch.zeros(2, 5, dtype=torch.long)
    ),
    "swiglu: gate has shape (3, 7), need an even last axis": lambda: ops.swiglu(X[:, :7]),
    "swiglu: up has shape (2, 8), need (3, 8) as gate": lambda: ops.swiglu(X, X[:2]),
    "geglu: up is torch.float64, need torch.float32 as in gate": lambda: ops.geglu(X, X.double()),
    'geglu: no approximate "erf". Known: none, tanh': lambda: ops.geglu(X, approximate="erf"),
    "embedding: ids is torch.float32, need torch.int64": lambda: ops.embedding(W, X),
    "embedding: weight has shape (8,), need axes (V, N)": lambda: ops.embedding(
        torch.tensor([0]), W
    ),
    "embedding: padding_idx is 3, need -3 to 2": lambda: ops.embedding(
        torch.tensor([0]), X, padding_idx=3
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(ValueError) as error:
        REFUSED[message]()
    assert message in str(error.value)


def test_numbers_out_of_range_are_refused(impl_once):
    places = torch.tensor([[0, 1, 2, 3, 5], [0, 0, 0, 0, 0]])
    impl_once.require("rope", Q, COS, SIN)
    with pytest.raises(ValueError, match=r"rope: positions\[0, 4\] is 5, need 0 to 4, the rows"):
        ops.rope(Q, COS, SIN, positions=places, impl=impl_once.name)
    for stray in (3, -1):
        with pytest.raises(ValueError, match=rf"embedding: ids\[1\].* is {stray}, need 0 to 2"):
            ops.embedding(torch.tensor([0, stray]), X, impl=impl_once.name)


def test_a_named_implementation_runs_or_raises():
    with pytest.raises(RuntimeError, match='rms_norm: impl "cpp_cpu" cannot run: no kernel for'):
        ops.rms_norm(X.double(), impl="cpp_cpu")
    with pytest.raises(ValueError, match=r'swiglu: no impl "fast"\. Known: auto'):
        ops.swiglu(X, X, impl="fast")


@pytest.mark.parametrize(
    "call",
    [("rms_norm", X, W), ("layer_norm", X), ("rope", Q, COS, SIN), ("swiglu", X), ("geglu", X, X),
     ("embedding", torch.tensor([0]), X)],
    ids=lambda call: call[0],
)  # fmt: skip
def test_explain(call):
    explanation = tw.explain(*call)
    assert explanation.chosen == "cpp_cpu" and "triton_gpu" in explanation.reasons
