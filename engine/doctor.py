"""`tilewright doctor`: the machine, what is built, and which implementation each operator takes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch
from packaging.requirements import Requirement

import tilewright
from tilewright import native, settings
from tilewright.choose import OPERATORS, explain_problem

# shown with their versions; those that are not installed are shown as such
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "numpy")


def main(argv: list[str] | None = None) -> int:
    """Print the report. Returns 1 if something that is installed is broken, else 0."""
    parser = argparse.ArgumentParser(prog="tilewright doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    report = examine()
    if parser.parse_args(argv).json:
        print(json.dumps(report, indent=2))
    else:
        print(as_text(report))
    for line in report["broken"]:
        print(f"tilewright doctor: broken: {line}", file=sys.stderr)
    return 1 if report["broken"] else 0


def examine() -> dict:
    """The report as plain data; `broken` lists what is installed and does not work."""
    built, broken = examine_builds()
    broken += broken_settings()
    broken += broken_requirements()
    return {
        "tilewright": tilewright.__version__,
        "machine": examine_machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) or "not installed" for name in PACKAGES},
        },
        "built": built,
        "settings": settings.describe(),
        "operators": examine_operators(),
        "broken": broken,
    }


def examine_machine() -> dict:
    """The processor, its memory in GiB, and the GPUs."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": processor_name(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "gpu": examine_gpus(),
    }


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def examine_gpus() -> list[dict] | str:
    """Each GPU that the driver knows, or why there is none to see."""
    try:
        import pynvml
    except ImportError as error:
        return f"none: {error}"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"none: {error}"
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(
                {
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "uuid": pynvml.nvmlDeviceGetUUID(handle),
                    "compute_capability": f"{major}.{minor}",
                    "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
                    "driver": driver,
                }
            )
        return gpus or "none: the driver knows no GPU"
    except pynvml.NVMLError as error:
        return f"unknown: {error}"
    finally:
        pynvml.nvmlShutdown()


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_builds() -> tuple[dict, list[str]]:
    """The compiled modules, and what is wrong with those that are there."""
    broken = []
    built: dict[str, dict] = {}
    why_not = native.why_not_native()
    if why_not is None:
        try:
            module = native.native()
            built["_C"] = {"levels": module.isa_levels(), "level": module.isa()}
        except ValueError as error:  # TILEWRIGHT_ISA
            built["_C"] = {"why_not": str(error)}
            broken.append(str(error))
    else:
        built["_C"] = {"why_not": why_not}
        broken.append(why_not)  # every complete install has it
    why_not = native.why_not_cuda()
    built["_cuda"] = {"why_not": why_not} if why_not else {"architectures": ["sm_90a"]}
    if why_not and "does not load" in why_not:
        broken.append(why_not)
    built["torch_cuda"] = (
        {"version": torch.version.cuda, "devices": torch.cuda.device_count()}
        if torch.version.cuda
        else {"why_not": "this torch is built without CUDA"}
    )
    return built, broken


def broken_settings() -> list[str]:
    """What is wrong with the environment variables; TILEWRIGHT_ISA is checked with `_C`."""
    forced = settings.forced_impl()
    known = {c.name for operator in OPERATORS.values() for c in operator.candidates}
    if forced is None or forced in known:
        return []
    return [f"TILEWRIGHT_IMPL is {forced!r}, need one of {', '.join(sorted(known))}"]


def broken_requirements() -> list[str]:
    """Installed packages that are older than tilewright needs, and needed ones that are missing."""
    lines = []
    for text in importlib.metadata.requires("tilewright") or []:
        requirement = Requirement(text)
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        version = installed_version(requirement.name)
        if version is None:
            if is_needed:
                lines.append(f"{requirement.name} is not installed, need {requirement}")
        elif not requirement.specifier.contains(version, prereleases=True):
            need = f"{requirement.name}{requirement.specifier}"
            line = f"{requirement.name} {version} is installed, need {need}"
            if line not in lines:  # the same bound may stand in several extras
                lines.append(line)
    return lines


def examine_operators() -> dict:
    """For each operator and sample problem: what "auto" takes, and why not the others."""
    operators: dict[str, dict] = {}
    for name, operator in OPERATORS.items():
        operators[name] = {}
        for description, problem in operator.sample().items():
            explanation = explain_problem(name, problem)
            operators[name][description] = {
                "auto": explanation.chosen,
                "why_not": explanation.reasons,
            }
    return operators


def as_text(report: dict) -> str:
    """The report for a reader: one line a fact."""
    lines = [f"tilewright {report['tilewright']}"]

    def section(title: str, facts: dict) -> None:
        width = max((len(key) for key in facts), default=0)
        lines.append(f"\n{title}")
        lines.extend(f"  {key:{width}}  {value}" for key, value in facts.items())

    machine = dict(report["machine"])
    gpus = machine.pop("gpu")
    machine["memory"] = f"{machine.pop('memory_gib')} GiB"
    machine["torch threads"] = machine.pop("torch_threads")
    if isinstance(gpus, str):
        machine["gpu"] = gpus
    else:
        for index, gpu in enumerate(gpus):
            machine[f"gpu {index}"] = (
                f"{gpu['name']}, {gpu['memory_gib']} GiB, "
                f"compute capability {gpu['compute_capability']}, driver {gpu['driver']}"
            )
    section("machine", machine)
    section("versions", report["versions"])
    section("built", {name: _build_line(build) for name, build in report["built"].items()})
    section(
        "settings",
        {name: report["settings"].get(name, "not set") for name in settings.VARIABLES},
    )
    lines.append('\noperators: what impl="auto" takes here, and why not the others')
    for name, samples in report["operators"].items():
        lines.append(f"  {name}")
        for description, choice in samples.items():
            lines.append(f"    {description}: {choice['auto'] or 'nothing can run this here'}")
            lines.extend(
                f"      not {other}: {reason}" for other, reason in choice["why_not"].items()
            )
    lines.append("")
    lines.append(
        f"broken: {len(report['broken'])} of the above" if report["broken"] else "all well"
    )
    return "\n".join(lines)


def _build_line(build: dict) -> str:
    if "why_not" in build:
        return f"no: {build['why_not']}"
    if "levels" in build:
        return f"yes, levels {', '.join(build['levels'])}; {build['level']} runs here"
    return "yes, " + ", ".join(f"{key} {value}" for key, value in build.items())
