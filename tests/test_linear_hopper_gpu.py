"""The Hopper kernel over packed weights on a GPU: whole grids, streams, graphs, repeatability.

test_linear_hopper.py runs the same code on the host over stand-ins for the instructions; here the
instructions are real, and shapes have many blocks.
"""

import pytest
import torch
from linear_hopper_inputs import FOUR_BITS, problem_of, random_weight, stock
from yardstick import assert_errs_at_most_twice_stock

from tilewright import choose
from tilewright.ops.common.packed import decode
from tilewright.ops.linear import fused_linear, reference
from tilewright.ops.linear.problem import Operands

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _needs_the_kernel():
    weight = random_weight(16, 64)
    x = torch.zeros(1, 64, dtype=BF16, device="cuda")
    problem = choose.OPERATORS["fused_linear"].problem(x, weight.to("cuda"))
    hopper = choose.OPERATORS["fused_linear"].candidates[0]
    assert hopper.name == "cuda_hopper"
    why_not = hopper.why_not(problem)
    if why_not is not None:
        pytest.skip(f"fused_linear: cuda_hopper: {why_not}")


def check(x, weight, **rest):
    """Held against the reference; x, weight and tensors in `rest` are on the CPU."""
    o, p = problem_of(x, weight, **rest)
    truth, _ = reference.fused_linear(
        x, decode(weight), o.bias, o.out_scale, o.down, o.up, p.scale, p.activation
    )
    on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in rest.items()}
    packed = weight.to("cuda")
    y = fused_linear(x.cuda(), packed, impl="cuda_hopper", **on_gpu)
    moved = Operands(*(None if t is None else t.cuda() for t in o))
    assert_errs_at_most_twice_stock("y", y, stock(x.cuda(), packed, moved, p), truth)
    again = fused_linear(x.cuda(), packed, impl="cuda_hopper", **on_gpu)
    assert torch.equal(y, again), "a second run differs"


SIZES = {  # O, I, group size
    "a-model's": (4096, 4096, 64),
    "nothing-divides": (1000, 2056, 128),
    "odd": (333, 1001, 72),
    "long": (256, 14336, 64),
    "small-groups": (512, 1024, 32),
    "one-scale-a-row": (768, 3072, 3072),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("n_tokens", [1, 16, 17, 33, 64, 65, 129, 700])
@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_forward(size, n_tokens, format):
    n_out, n_in, group_size = size
    weight = random_weight(n_out, n_in, format, group_size)
    check(torch.randn(n_tokens, n_in).to(BF16), weight)


@pytest.mark.parametrize("format", FOUR_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("n_tokens", [5, 300])
def test_offsets(format, dtype, n_tokens):
    weight = random_weight(272, 1032, format, 128, dtype, has_offsets=True)
    check(torch.randn(n_tokens, 1032).to(BF16), weight, bias=torch.randn(272))


@pytest.mark.parametrize("n_tokens", [1, 64, 500])
@pytest.mark.parametrize("rank", [1, 8, 33, 64])
def test_low_rank_update(n_tokens, rank):
    weight = random_weight(640, 2048, "nf4", 64)
    down, up = torch.randn(rank, 2048).to(BF16), torch.randn(640, rank).to(BF16)
    x = torch.randn(n_tokens, 2048).to(BF16)
    check(x, weight, down=down, up=up, scale=0.5, bias=torch.randn(640).to(BF16))
    check(x, weight, down=down, up=up, scale=0.5, out_scale=torch.rand(640), activation="relu")


def test_nested_scales_and_input_order():
    weight = random_weight(500, 1024, "nf4", 64, is_nested=True, is_reordered=True)
    check(torch.randn(9, 1024).to(BF16), weight)


def test_streams_and_graphs():
    """Work is on torch's current stream, and can be captured and replayed."""
    weight = random_weight(512, 4096, "int4", 64).to("cuda")
    x = torch.randn(4, 4096, device="cuda").to(BF16)
    expected = fused_linear(x, weight, impl="cuda_hopper")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        other = x * 2
        doubled = fused_linear(other, weight, impl="cuda_hopper")
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(doubled, expected * 2)

    graph, static = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        captured = fused_linear(static, weight, impl="cuda_hopper")
    static.copy_(-x)
    graph.replay()
    assert torch.equal(captured, -expected)


def test_a_named_backward_raises_and_auto_takes_another():
    weight = random_weight(64, 128, "nf4", 64).to("cuda")
    x = torch.randn(4, 128, device="cuda").to(BF16).requires_grad_()
    y = fused_linear(x, weight, impl="cuda_hopper")
    with pytest.raises(RuntimeError, match=r"cuda_hopper.*it has no backward"):
        y.sum().backward()
    fused_linear(x, weight).sum().backward()
    decoded = decode(weight)
    ones = torch.ones(4, 64, device="cuda", dtype=BF16)
    truth = decoded.double().sum(0).expand(4, -1).cpu()
    assert_errs_at_most_twice_stock("dx", x.grad, ones @ decoded.to(BF16), truth)
