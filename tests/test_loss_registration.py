"""The loss room's operators towards torch: opcheck, compilation, autocast, refusals, explain."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import normal
from torch.utils.checkpoint import checkpoint

import tilewright as tw
from tilewright import ops
from tilewright.ops.loss.problem import SKIPPED

OPS = torch.ops.tilewright
CHECKED = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
NAMES = ("linear_cross_entropy", 1, "auto")


def head(n_ids=1):
    ids = torch.arange(7 * n_ids).view(7, n_ids) % 11
    ids[2] = SKIPPED
    leaves = [normal(*shape).requires_grad_() for shape in ((7, 5), (11, 5), (11,))]
    return *leaves, ids, torch.rand(11), 0.7, 3.0


def stats_of(inputs):
    return OPS.head_statistics(*(t.detach() if isinstance(t, torch.Tensor) else t for t in inputs),
                               True, *NAMES)[3]  # fmt: skip


def plain(inputs):
    return [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]


CALLS = {
    "head_statistics": lambda: (OPS.head_statistics, (*head(2), True, *NAMES)),
    "head_statistics, log-probabilities alone": lambda: (
        OPS.head_statistics, (*head(), False, *NAMES),
    ),
    "head_statistics_backward": lambda: (
        OPS.head_statistics_backward,
        (*plain(head()), stats_of(head()), normal(7, 1), normal(7), None, [True, False, True],
         *NAMES),
    ),
    "head_loss": lambda: (
        OPS.head_loss,
        (*head(2), normal(7, 2).requires_grad_(), normal(7), None, [True, True, True], *NAMES),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, clean_memory):
    operator, arguments = CALLS[name]()
    torch.library.opcheck(operator, arguments, test_utils=CHECKED)


def inputs():
    h, weight = normal(3, 6, 8).requires_grad_(), normal(20, 8, seed=1).requires_grad_()
    labels = torch.arange(18).view(3, 6)
    labels[0, :4] = -100
    return h, weight, labels


USES = {
    "mean": lambda h, w, y: ops.linear_cross_entropy(h, w, y, label_smoothing=0.1, z_loss=1e-3),
    "none": lambda h, w, y: ops.linear_cross_entropy(h, w, y, reduction="none").square().sum(),
    "log-probabilities": lambda h, w, y: ops.linear_log_probs(h, w, y).square().sum(),
}


def both(function, *arguments):
    loss = function(*arguments)
    return loss, *torch.autograd.grad(loss, [t for t in arguments if t.requires_grad])


@pytest.mark.parametrize("name", USES)
def test_compiled_whole(name, clean_memory):
    """In one graph, forward and backward, equal to eager bit by bit."""
    torch._dynamo.reset()
    compiled = torch.compile(USES[name], fullgraph=True, backend="aot_eager")
    want, got = both(USES[name], *inputs()), both(compiled, *inputs())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(name, reentrant):
    want = both(USES[name], *inputs())
    h, weight, labels = inputs()
    loss = checkpoint(USES[name], h, weight, labels, use_reentrant=reentrant)
    loss.backward()
    assert torch.equal(loss, want[0]) and torch.equal(h.grad, want[1])
    assert torch.equal(weight.grad, want[2])


@pytest.mark.parametrize("name", USES)
def test_autocast(name, clean_memory):
    """As torch's own: products in bfloat16, gradients in the dtype of the leaves."""
    h, weight, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss, dh, dweight = both(USES[name], h, weight, labels)
    low = [t.detach().bfloat16().requires_grad_() for t in (h, weight)]
    want = both(USES[name], *low, labels)
    assert torch.equal(loss, want[0])
    assert dh.dtype == dweight.dtype == torch.float32
    assert torch.equal(dh, want[1].float()) and torch.equal(dweight, want[2].float())
    torch._dynamo.reset()
    compiled = torch.compile(USES[name], fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(h, weight, labels), loss)


def test_a_graph_that_is_kept_gives_the_same_twice():
    h, weight, labels = inputs()
    loss = USES["mean"](h, weight, labels)
    first = torch.autograd.grad(loss, (h, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (h, weight), retain_graph=True)
    third = torch.autograd.grad(3 * loss, (h, weight))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
        torch.testing.assert_close(c, 3 * a)


def test_gradients_of_the_reference_are_those_of_its_formula():
    """In float64, by finite differences; those of soft_probs and token_weight among them."""
    double = {"dtype": torch.float64}
    h, weight = normal(4, 5, **double).requires_grad_(), normal(7, 5, **double).requires_grad_()
    probs = torch.rand(4, 3, **double).requires_grad_()
    tokens = torch.rand(4, **double).requires_grad_()
    labels, ids = torch.tensor([0, 6, -100, 3]), torch.tensor([[1, 2, 2]] * 4)

    def loss(h, weight, probs, tokens, reduction):
        return ops.linear_cross_entropy(
            h, weight, labels, soft_ids=ids, soft_probs=probs, soft_weight=0.4, softcap=2.0,
            token_weight=tokens, label_smoothing=0.1, z_loss=0.1, reduction=reduction,
        )  # fmt: skip

    for reduction in ("mean", "sum", "none"):
        leaves = (h, weight, probs, tokens)
        assert torch.autograd.gradcheck(lambda *t, r=reduction: loss(*t, r), leaves)


def test_export_and_back(tmp_path, clean_memory):
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(normal(20, 8))

        def forward(self, h, labels):
            return ops.linear_log_probs(h, self.weight, labels)

    module, (h, _, labels) = Head(), inputs()
    program = torch.export.export(module, (h.detach(), labels))
    torch.export.save(program, tmp_path / "head.pt2")
    loaded = torch.export.load(tmp_path / "head.pt2").module()
    assert torch.equal(loaded(h.detach(), labels), module(h, labels))


def test_views_are_taken_as_they_are():
    """Every second token, every second row of the head, and labels in int32."""
    h, weight = normal(18, 16), normal(40, 16, seed=1)
    labels = torch.arange(9)
    want = ops.linear_cross_entropy(h[::2, :8].contiguous(), weight[::2, 8:].contiguous(), labels)
    got = ops.linear_cross_entropy(h[::2, :8], weight[::2, 8:], labels.int())
    torch.testing.assert_close(got, want)
    turned = ops.linear_cross_entropy(h[:9], weight.T.contiguous().T, labels)
    torch.testing.assert_close(turned, F.cross_entropy(h[:9] @ weight.T, labels))


H, W = normal(4, 8), normal(20, 8)
Y = torch.arange(4)
CE, LP = ops.linear_cross_entropy, ops.linear_log_probs
REFUSED = {
    "linear_cross_entropy: needs labels, or soft_ids and soft_probs": lambda: CE(H, W),
    "linear_cross_entropy: h is torch.int64, need one of": lambda: CE(H.long(), W, Y),
    "linear_cross_entropy: weight is torch.bfloat16, need torch.float32": lambda: CE(
        H, W.bfloat16(), Y
    ),
    "linear_cross_entropy: weight has shape (20, 7), need axes (V, N)": lambda: CE(H, W[:, :7], Y),
    "linear_cross_entropy: labels is torch.int64 of shape (3,), need": lambda: CE(H, W, Y[:3]),
    "linear_cross_entropy: labels is torch.float32 of shape (4,)": lambda: CE(H, W, Y.float()),
    "linear_cross_entropy: bias has shape (19,), need (20,): V": lambda: CE(
        H, W, Y, bias=torch.zeros(19)
    ),
    "linear_cross_entropy: class_weight is torch.int64": lambda: CE(
        H, W, Y, class_weight=torch.ones(20, dtype=torch.long)
    ),
    "linear_cross_entropy: token_weight is torch.float32 of shape (2, 2)": lambda: CE(
        H, W, Y, token_weight=torch.ones(2, 2)
    ),
    'linear_cross_entropy: no reduction "avg". Known: mean, sum, none': lambda: CE(
        H, W, Y, reduction="avg"
    ),
    "linear_cross_entropy: label_smoothing is 1.5, need 0 to 1": lambda: CE(
        H, W, Y, label_smoothing=1.5
    ),
    "linear_cross_entropy: z_loss is -1.0, need a finite number": lambda: CE(H, W, Y, z_loss=-1.0),
    "linear_cross_entropy: softcap is 0.0, need a number above 0": lambda: CE(H, W, Y, softcap=0.0),
    "linear_cross_entropy: logit_scale is inf": lambda: CE(H, W, Y, logit_scale=float("inf")),
    "linear_cross_entropy: denominator is 0, need a number above 0": lambda: CE(
        H, W, Y, denominator=0
    ),
    "linear_cross_entropy: denominator has shape (2,), need one element": lambda: CE(
        H, W, Y, denominator=torch.ones(2)
    ),
    'a denominator belongs to reduction="mean", not "sum"': lambda: CE(
        H, W, Y, reduction="sum", denominator=3
    ),
    "linear_cross_entropy: soft_ids came without soft_probs": lambda: CE(
        H, W, Y, soft_ids=Y[:, None]
    ),
    "linear_cross_entropy: soft_ids is torch.int64 of shape (4,), need": lambda: CE(
        H, W, soft_ids=Y, soft_probs=torch.ones(4)
    ),
    "linear_cross_entropy: soft_probs is torch.float32 of shape (4, 2)": lambda: CE(
        H, W, soft_ids=Y[:, None], soft_probs=torch.ones(4, 2)
    ),
    "linear_cross_entropy: soft_weight is 2, need 0 to 1": lambda: CE(
        H, W, Y, soft_ids=Y[:, None], soft_probs=torch.ones(4, 1), soft_weight=2
    ),
    "linear_log_probs: labels is torch.int64 of shape (3,), need": lambda: LP(H, W, Y[:3]),
    "linear_log_probs: h has shape (), need axes (..., N)": lambda: LP(torch.tensor(1.0), W, Y),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(ValueError) as error:
        REFUSED[message]()
    assert message in str(error.value)


@pytest.mark.parametrize("impl", ["reference", "cpp_cpu"])
def test_numbers_out_of_range_are_refused(impl):
    for stray in (20, -1, -101):
        labels = torch.tensor([[0, 1], [stray, 2]])
        for call in (CE, LP):
            text = rf"{call.__name__}: labels\[2\].* is {stray}, need 0 to 19, the rows of weight"
            with pytest.raises(ValueError, match=text):
                call(H.view(2, 2, 8), W, labels, impl=impl)
    with pytest.raises(ValueError, match=r"soft_ids\[3, 1\].* is 20, need 0 to 19"):
        ids = torch.tensor([[1, -1]] * 3 + [[2, 20]])
        CE(H, W, Y, soft_ids=ids, soft_probs=torch.ones(4, 2), impl=impl)


def test_explain_says_what_runs():
    assert tw.explain("linear_cross_entropy", H, W, Y).chosen == "cpp_cpu"
    assert tw.explain("linear_log_probs", H.double(), W.double(), Y).chosen == "reference"
