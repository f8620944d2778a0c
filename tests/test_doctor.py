"""`tilewright doctor`: what it says of a whole install, and of broken ones."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tilewright import choose, doctor, native, settings


def run_doctor(*arguments, **environment):
    """A fresh process, since the settings are read once; in / so that no source folder is near."""
    code = "import sys; from tilewright.doctor import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**clean_environment(), **environment}, cwd="/", capture_output=True, text=True,
    )  # fmt: skip


def clean_environment():
    return {k: v for k, v in os.environ.items() if k not in settings.VARIABLES}


def test_a_whole_install_is_reported_and_well():
    done = run_doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("machine", "versions", "built", "settings", "operators", "flash_attention"):
        assert word in done.stdout
    assert done.stdout.rstrip().endswith("all well")


def test_json_names_what_auto_takes_and_every_reason_against_the_others():
    done = run_doctor("--json")
    report = json.loads(done.stdout)
    assert report["broken"] == []
    assert set(report["operators"]) == set(choose.OPERATORS)
    for name, samples in report["operators"].items():
        candidates = {c.name for c in choose.OPERATORS[name].candidates}
        assert samples, f"{name} has no sample problems"
        for choice in samples.values():
            assert {choice["auto"], *choice["why_not"]} - {None} == candidates


def test_the_settings_in_force_are_shown_and_obeyed():
    report = json.loads(run_doctor("--json", TILEWRIGHT_ISA="portable").stdout)
    assert report["settings"] == {"TILEWRIGHT_ISA": "portable"}
    assert report["built"]["_C"]["level"] == "portable"


@pytest.mark.parametrize(
    ("variable", "value"), [("TILEWRIGHT_ISA", "sse9"), ("TILEWRIGHT_IMPL", "fast")]
)
def test_a_setting_that_names_nothing_is_broken(variable, value):
    done = run_doctor(**{variable: value})
    assert done.returncode == 1
    assert f"broken: {variable} is '{value}', need one of" in done.stderr


@pytest.fixture
def no_compiled_module(tmp_path, monkeypatch):
    """As if the folder of the package held no compiled module."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    for cached in (native._cpu, native._cuda, native.native):
        cached.cache_clear()
    yield tmp_path
    for cached in (native._cpu, native._cuda, native.native):
        cached.cache_clear()


def test_a_missing_module_is_broken_and_says_how_to_build_it(no_compiled_module, capsys):
    assert doctor.main([]) == 1
    printed = capsys.readouterr()
    assert "broken: tilewright._C is not built: need _C." in printed.err
    assert "pip install -c constraints.txt ." in printed.err
    with pytest.raises(RuntimeError, match=r"tilewright\._C is not built"):
        native.native()
    with pytest.raises(RuntimeError, match=r"tilewright\._cuda is not built"):
        native.native_cuda()


def test_a_module_of_another_python_is_named(no_compiled_module):
    (no_compiled_module / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert "found only _C.cpython-39-x86_64-linux-gnu.so" in native.why_not_native()


def test_an_old_requirement_is_broken(monkeypatch):
    real = doctor.installed_version
    monkeypatch.setattr(
        doctor, "installed_version", lambda name: "4.0" if name == "transformers" else real(name)
    )
    lines = doctor.broken_requirements()
    assert len(lines) == 1
    assert lines[0].startswith("transformers 4.0 is installed, need transformers>=")


def test_gpus_are_listed_by_their_driver(monkeypatch):
    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetName=lambda handle: "H200",
        nvmlDeviceGetUUID=lambda handle: "GPU-1",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=139 * 2**30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    (gpu,) = doctor.examine_gpus()
    assert (gpu["compute_capability"], gpu["memory_gib"]) == ("9.0", 139.0)
