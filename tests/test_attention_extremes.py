"""Far offsets, unusual devices, random numbers, and calls in combination."""

import functools

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import (
    DTYPES,
    Case,
    attend,
    bitwise,
    dtype_name,
    gradients,
    int32,
    make_inputs,
    stock_attention,
    with_gradients,
)
from yardstick import assert_errs_at_most_twice_stock

import tilewright
from tilewright import ShiftedSegments
from tilewright.ops.attention import reference

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

FAR = 2**31 + 64  # elements between two batch rows, past what 32 bits can count


def far_apart(t):
    """The same values with batch rows more than 2**31 elements apart; only touched pages exist."""
    room = torch.empty(FAR + t[0].numel(), dtype=t.dtype)
    view = room.as_strided(t.shape, (FAR, *t.stride()[1:]))
    return view.copy_(t)


@by_dtype
@pytest.mark.parametrize("rise", [0.02, 0.3, 4.0], ids="{} a key".format)
def test_scores_that_rise_along_the_keys(impl, rise, dtype):
    """The running maximum grows all the way: in steps too small to matter at once, and at once."""
    length, width = 300, 16
    direction = F.normalize(torch.randn(width), dim=0)
    q = (direction + 0.1 * torch.randn(1, length, 2, width)).to(dtype)
    places = torch.arange(length).view(1, length, 1, 1)
    k = (rise * places * direction + torch.randn(1, length, 2, width)).to(dtype)
    v = torch.randn(1, length, 2, width).to(dtype)
    options = dict(scale=1.0, is_causal=True)
    impl.require("flash_attention", *(t.to(impl.device) for t in (q, k, v)), **options)
    ours = attend(impl, q, k, v, **options)
    truth = tilewright.flash_attention(
        *(t.double() for t in (q, k, v)), **options, impl="reference"
    )
    stock, _ = stock_attention(q, k, v, **options)
    assert_errs_at_most_twice_stock("out", ours, stock, truth)


@pytest.mark.usefixtures("clean_memory")
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "dout"])
def test_offsets_past_31_bits(kernel_once, which):
    if kernel_once.device != "cpu":
        pytest.skip("counts on pages that take no memory before they are touched")
    case = Case(40, 40, 4, 2, head_dim=16, batch=2, is_causal=True)
    *tensors, options = make_inputs(case, torch.bfloat16)
    plain = gradients(kernel_once, *tensors, **options)
    try:
        tensors[which] = far_apart(tensors[which])
    except RuntimeError as error:
        pytest.skip(f"8 GiB of address space: {error}")
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    out = attend(kernel_once, *leaves, **options)
    assert bitwise(out, plain.out)
    grads = torch.autograd.grad(out, leaves, tensors[3])
    wanted = (plain.dq, plain.dk, plain.dv)
    assert all(bitwise(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.usefixtures("clean_memory")
def test_offsets_past_31_bits_in_a_paged_cache(kernel_once):
    if kernel_once.device != "cpu":
        pytest.skip("counts on pages that take no memory before they are touched")
    q, pages = torch.randn(1, 1, 4, 16).bfloat16(), torch.randn(2, 8, 2, 16).bfloat16()
    options = {
        "key_lengths": int32([15]), "page_table": int32([[1, 0]]), "impl": kernel_once.name
    }  # fmt: skip
    try:
        far = far_apart(pages)
    except RuntimeError as error:
        pytest.skip(f"8 GiB of address space: {error}")
    near = tilewright.flash_decode(q, pages, pages, **options)
    assert bitwise(tilewright.flash_decode(q, far, far, **options), near)


def test_the_random_numbers_are_philox():
    """The published first block of Philox4x32-10 for counter 0 and key 0."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    zero, keys = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    uniform = reference.philox_uniform(0, zero, zero, keys)
    assert torch.equal(uniform, torch.tensor([w >> 8 for w in words]).double() / 2**24)


@by_dtype
def test_dropout_leaves_the_log_sum_exp_alone(impl, dtype):
    q, k, v, _, options = make_inputs(Case(60, 60, 4, 2, head_dim=24, is_causal=True), dtype)
    q, k, v = (t.to(impl.device) for t in (q, k, v))
    seed = torch.tensor([11], device=impl.device)
    _, plain = attend(impl, q, k, v, return_lse=True, **options)
    dropped = attend(impl, q, k, v, return_lse=True, dropout_p=0.5, dropout_seed=seed, **options)
    assert bitwise(plain, dropped[1])


def test_everything_at_once(impl):
    """Mask, window, cap, sinks, segments, extra keys and dropout in one call, in float32."""
    case = Case(
        70, 70, 6, 2, head_dim=40, value_dim=24, is_causal=True, window=(50, 3), softcap=3.0,
        sinks=True, segments=ShiftedSegments(32), batch=2, live=((0, 70), (9, 61)),
    )  # fmt: skip
    *tensors, options = make_inputs(case, torch.float32)
    options |= {"dropout_p": 0.2, "dropout_seed": torch.tensor([99])}
    extra, sinks = (torch.randn(5, 2, 40), torch.randn(5, 2, 24)), options.pop("sinks")

    on_device = tuple(t.to(impl.device) for t in extra)
    ours = gradients(impl, *tensors, extra_kv=on_device, sinks=sinks, **options)
    truth = with_gradients(
        functools.partial(tilewright.flash_attention, impl="reference"),
        *(t.double() for t in tensors), extra_kv=tuple(t.double() for t in extra),
        sinks=sinks.double(), **options,
    )  # fmt: skip
    for name in ("out", "lse", "dq", "dk", "dv", "dsinks"):
        mine, wanted = getattr(ours, name).cpu().double(), getattr(truth, name)
        assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-5), name


COMPILED = {
    "packed": dict(cu_seqlens=int32([0, 7, 7, 20])),
    "sinks-softcap-window": dict(sinks=torch.ones(4), softcap=5.0, window=(6, 2)),
    "extra-keys": dict(extra_kv=(torch.ones(3, 2, 16), torch.ones(3, 2, 16))),
    "lse": dict(return_lse=True, is_causal=True),
    "segments": dict(segments=ShiftedSegments(8), is_causal=True, scale=0.3),
    "seeded-dropout": dict(dropout_p=0.4, dropout_seed=torch.tensor([3])),
}


@pytest.mark.usefixtures("clean_memory")
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_every_option_compiles_into_one_graph(options):
    shapes = [(2, 20, h, 16) for h in (4, 2, 2)]
    tensors = [torch.randn(shape[1:] if "cu_seqlens" in options else shape) for shape in shapes]

    def loss(attention, *leaves):
        result = attention(*leaves, **options)
        return result[0].square().sum() + result[1].sum() if "return_lse" in options else (
            result.square().sum()
        )  # fmt: skip

    results = []
    for attention in (
        tilewright.flash_attention,
        torch.compile(tilewright.flash_attention, fullgraph=True, backend="aot_eager"),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        total = loss(attention, *leaves)
        results.append([total.detach(), *torch.autograd.grad(total, leaves)])
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("clean_memory")
def test_decode_compiles_into_one_graph():
    q, cache = torch.randn(2, 1, 4, 16), torch.randn(2, 30, 2, 16)
    decode = functools.partial(
        tilewright.flash_decode, key_lengths=int32([30, 7]), key_starts=int32([0, 2])
    )
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert bitwise(decode(q, cache, cache), compiled(q, cache, cache))


@pytest.mark.usefixtures("clean_memory")
def test_meta_tensors_give_shapes_and_dtypes():
    q, k = (torch.empty(2, 9, h, 16, device="meta", dtype=torch.float16) for h in (4, 2))
    out, lse = tilewright.flash_attention(q, k, k, return_lse=True)
    assert out.shape == (2, 9, 4, 16) and out.dtype == torch.float16 and out.is_meta
    assert lse.shape == (2, 4, 9) and lse.dtype == torch.float32
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    assert tilewright.flash_decode(q[:, :1], k, k, key_lengths=lengths).shape == (2, 1, 4, 16)


@by_dtype
def test_decode_equals_the_last_rows_of_flash_attention(impl, dtype):
    """A cache of 90 tokens and the last 6 queries: two kernels, one meaning."""
    q, k, v, _, _ = make_inputs(Case(90, 90, 8, 2, head_dim=32), dtype)
    q, k, v = (t.to(impl.device) for t in (q, k, v))
    whole = attend(impl, q, k, v, is_causal=True, softcap=4.0, window=(40, 0))
    lengths = int32([90], impl.device)
    options = {"key_lengths": lengths, "softcap": 4.0, "window_left": 40}
    impl.require("flash_decode", q[:, 84:], k, v, **options)
    last = tilewright.flash_decode(q[:, 84:], k, v, impl=impl.name, **options)
    difference = (whole[:, 84:].double() - last.double()).abs().max()
    assert difference <= 4 * torch.finfo(dtype).eps * v.double().abs().max()


def test_pages_past_a_rows_length_are_not_read(impl):
    """Tables are padded with anything: -1, or the index of a page that is not there."""
    q, pages = torch.randn(2, 1, 4, 16), torch.randn(4, 4, 2, 16)
    q, pages = q.to(impl.device), pages.to(impl.device)
    results = []
    for padding in (0, -1, 1000):
        table = int32([[2, 0, 3], [1, padding, padding]], impl.device)
        options = {"key_lengths": int32([11, 4], impl.device), "page_table": table}
        impl.require("flash_decode", q, pages, pages, **options)
        results.append(tilewright.flash_decode(q, pages, pages, impl=impl.name, **options))
    assert bitwise(results[0], results[1]) and bitwise(results[0], results[2])


def test_decode_of_more_queries_than_keys(impl):
    """The first queries stand before the first key: out 0, lse -inf."""
    q, cache = torch.randn(2, 5, 4, 16), torch.randn(2, 8, 2, 16)
    q, cache = q.to(impl.device), cache.to(impl.device)
    options = {
        "key_lengths": int32([3, 8], impl.device), "key_starts": int32([0, 6], impl.device)
    }  # fmt: skip
    impl.require("flash_decode", q, cache, cache, **options)
    out, lse = tilewright.flash_decode(q, cache, cache, return_lse=True, impl=impl.name, **options)
    blind = torch.zeros(2, 5, dtype=torch.bool)
    blind[0, :2] = blind[1, :3] = True
    assert torch.equal((lse == float("-inf")).all(1).cpu(), blind)
    assert not out.cpu()[blind].any() and out.cpu()[~blind].isfinite().all()


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_decode_refuses_a_gradient_of_any_input(impl_once, which):
    tensors = [torch.randn(1, n, 2, 8, device=impl_once.device) for n in (1, 5, 5)]
    tensors[which].requires_grad_()
    options = {"key_lengths": int32([5], impl_once.device)}
    impl_once.require("flash_decode", *tensors, **options)
    out = tilewright.flash_decode(*tensors, impl=impl_once.name, **options)
    with pytest.raises(NotImplementedError, match="flash_decode: it has no gradient"):
        out.sum().backward()


def test_agrees_with_torch_under_a_common_call(impl):
    """Nothing of ours in the truth: torch's own attention in float64."""
    q, k, v, _, _ = make_inputs(Case(50, 50, 4, 2, head_dim=32, batch=2), torch.float32)
    wide = (t.double().transpose(1, 2) for t in (q, k, v))
    wanted = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True).transpose(1, 2)
    ours = attend(impl, *(t.to(impl.device) for t in (q, k, v)), is_causal=True)
    assert torch.allclose(ours.cpu().double(), wanted, atol=1e-5)
