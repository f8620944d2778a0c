"""What every test shares: a seed, poisoned fresh memory, the implementations, the list of skips."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from shard import pytest_addoption, pytest_configure  # noqa: F401  the options --shard, --record

import tilewright  # noqa: F401  torch and the operators are registered before any test runs
from tilewright import choose, native

CPU_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


@dataclass(frozen=True)
class Target:
    """An implementation under test.

    name     what is passed as impl=
    level    the CPU level that is set while the test runs, or None
    device   where its tensors live
    """

    name: str
    level: str | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.name}-{self.level}" if self.level else self.name

    def require(self, operator: str, *args, **kwargs) -> None:
        """Skip the test, with the reason that `explain` gives, if this cannot run the call."""
        random_state = torch.get_rng_state()  # describing a call with dropout draws a seed
        problem = choose.OPERATORS[operator].problem(*args, **kwargs)
        torch.set_rng_state(random_state)
        candidates = {c.name: c for c in choose.OPERATORS[operator].candidates}
        why_not = candidates[self.name].why_not(problem)
        if why_not is not None:
            pytest.skip(f"{operator}: {self}: {why_not}")


REFERENCE = pytest.param(Target("reference"), id="reference")
LEVELS = [pytest.param(Target("cpp_cpu", level), id=f"cpp_cpu-{level}") for level in CPU_LEVELS]
BEST_LEVEL = pytest.param(Target("cpp_cpu"), id="cpp_cpu")
TRITON = pytest.param(Target("triton_gpu", device="cuda"), id="triton_gpu", marks=pytest.mark.gpu)


def _use(target: Target):
    """Set the target's CPU level for the time of a test, or skip it with the reason."""
    if target.name != "cpp_cpu":
        yield target
        return
    why_not = native.why_not_native()
    if why_not is not None:
        pytest.skip(why_not)
    module = native.native()
    before = module.isa()
    if target.level is not None:
        try:
            module.set_isa(target.level)
        except ValueError as error:
            pytest.skip(str(error))
    yield target
    module.set_isa(before)


@pytest.fixture(params=[REFERENCE, *LEVELS, TRITON])
def impl(request):
    """Each implementation, the C++ one at each CPU level."""
    yield from _use(request.param)


@pytest.fixture(params=[REFERENCE, BEST_LEVEL, TRITON])
def impl_once(request):
    """Each implementation once, for what the CPU level cannot change."""
    yield from _use(request.param)


@pytest.fixture(params=[*LEVELS, TRITON])
def kernel(request):
    """The implementations that are kernels: promises that the reference does not make."""
    yield from _use(request.param)


@pytest.fixture(params=[BEST_LEVEL, TRITON])
def kernel_once(request):
    """Each kernel once."""
    yield from _use(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.detach().fill_(float("nan")).requires_grad_(tensor.requires_grad)
    if tensor.dtype in (torch.int16, torch.int32, torch.int64):
        return tensor.fill_(torch.iinfo(tensor.dtype).min // 2)
    return tensor


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh tensors hold NaN (integers: a wild number), so that what nobody wrote is seen."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):
            return _poison(_original(*args, **kwargs))

        monkeypatch.setattr(owner, name, poisoned)
    return monkeypatch


@pytest.fixture
def clean_memory(poisoned_memory):
    """Take the poison away again: for tests that trace through torch.empty."""
    poisoned_memory.undo()


@pytest.fixture
def ahead_of_time(clean_memory):
    """For tests that compile kernels and read the code: nothing is computed, so fresh memory need
    not be poisoned, nor touched. Skipped where a tool is missing that the wheels bring."""
    from triton_ahead_of_time import missing_tool

    reason = missing_tool()
    if reason is not None:
        pytest.skip(reason)


TARGET_FIXTURES = ("impl", "impl_once", "kernel", "kernel_once")


def _place(item, functions, cases) -> tuple[int, int]:
    """Where a test runs: at its function's place, and there with its case, for each implementation
    in turn, so that what one prepares is still there for the next."""
    function = item.nodeid.split("[")[0]
    params = item.callspec.params if hasattr(item, "callspec") else {}
    case = function, repr([value for name, value in params.items() if name not in TARGET_FIXTURES])
    return functions.setdefault(function, len(functions)), cases.setdefault(case, len(cases))


def pytest_collection_modifyitems(items):
    functions: dict = {}
    cases: dict = {}
    items.sort(key=lambda item: _place(item, functions, cases))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """One line for each reason why something did not run."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("did not run")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5d}  {reason}")
