"""`llmc doctor`: what is installed, whether it is what llmc needs, and what this machine can run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import click

from .output import emit, facts, json_option, size, table


@click.command("doctor", short_help="Show versions, and what this machine can run.")
@json_option
def command(as_json: bool) -> int:
    """Show versions, processor, memory, and what this machine can compile and run.

    Exit 1 where a package that the base install needs is missing or has the wrong version.
    """
    report = examine()
    emit(report, as_json=as_json, text=_text(report))
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Everything that the command reports, as JSON-able values."""
    from importlib.metadata import version  # slow to import, and --help imports every command

    packages = _packages()
    base_ok = all(package["ok"] for package in packages if package["extra"] == "")
    compile_ok = base_ok and all(package["ok"] for package in packages if package["extra"] == "compile")
    wrong = [
        f"{package['name']} {package['installed'] or 'missing'}"
        for package in packages
        if not package["ok"] and not _left_out(package)
    ]
    return {
        "ok": base_ok,
        "llmc": version("llmc"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu": _cpu(),
        "memory": _memory(),
        "disk_free_bytes": shutil.disk_usage(os.getcwd()).free,
        "can": {"run": base_ok, "compile": compile_ok, "wrong_packages": wrong},
        "linker_needed": False,  # codegen/tvm/elf.py links
        "targets": _targets(),
        "cuda": _cuda(),
        "webgpu": _webgpu(),
    }


def _left_out(package: Mapping[str, Any]) -> bool:
    """Whether a package is of an extra that was not asked for: then nothing is wrong."""
    return package["installed"] is None and package["extra"] not in ("", "compile")


_REQUIREMENT = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(?P<versions>[^;]*)(?:;(?P<marker>.*))?$"
)


def _packages() -> list[dict[str, Any]]:
    from importlib.metadata import requires

    from packaging.specifiers import SpecifierSet

    rows: list[dict[str, Any]] = []
    for text in requires("llmc") or []:
        match = _REQUIREMENT.match(text)
        if match is None:
            continue
        extra = re.search(r"extra == [\"']([^\"']+)", match["marker"] or "")
        if extra and extra[1] == "dev":
            continue
        name, versions = match["name"], match["versions"].strip()
        installed = _version(name)
        rows.append(
            {
                "name": name,
                "extra": extra[1] if extra else "",
                "required": versions,
                "installed": installed,
                "ok": installed is not None and SpecifierSet(versions).contains(installed, prereleases=True),
            }
        )
    return rows


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    from ..runtime import cpu

    levels = cpu.supported_isas()
    return {
        "model": _cpu_model(),
        "logical_cores": os.cpu_count(),
        "threads_used": cpu.default_threads(),
        "isa_levels": levels,
        "isa": cpu.best_isa(),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("model name", "Model")):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> dict[str, int | None]:
    fields: dict[str, int] = {}
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                name, _, value = line.partition(":")
                fields[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return {"total_bytes": fields.get("MemTotal"), "available_bytes": fields.get("MemAvailable")}


def _cuda() -> dict[str, Any]:
    """What of target tvm-cuda this machine can do. `missing`: what it lacks to run kernels, or None."""
    from ..codegen.tvm.gpu.nvrtc import compiler_name
    from ..runtime.executor.cuda_driver import why_absent

    return {"missing": why_absent(), "compiler": compiler_name()}


def _webgpu() -> dict[str, Any]:
    """What of target tvm-webgpu this machine can do. `missing`: what it lacks to run kernels, or None."""
    from ..runtime.executor.webgpu_driver import why_absent

    return {"missing": why_absent()}


def _targets() -> list[dict[str, Any]]:
    try:
        from .targets import listed
    except ImportError:
        return []
    return listed()


def _cuda_text(cuda: Mapping[str, Any]) -> str:
    return f"{_runs(cuda)}; compiled by {cuda['compiler'] or 'nothing: install llmc[cuda]'}"


def _runs(kernels: Mapping[str, Any]) -> str:
    return "run here" if kernels["missing"] is None else f"do not run here ({kernels['missing']})"


def _text(report: dict[str, Any]) -> str:
    cpu, memory = report["cpu"], report["memory"]
    packages = table(
        ("package", "installed", "required", "for", ""),
        (
            (
                row["name"],
                row["installed"] or "missing",
                row["required"] or "any",
                row["extra"] or "base",
                "ok" if row["ok"] else "" if _left_out(row) else "WRONG",
            )
            for row in report["packages"]
        ),
    )
    total, available = memory["total_bytes"], memory["available_bytes"]
    summary = facts(
        [
            ("llmc", report["llmc"]),
            ("python", f"{report['python']} ({sys.executable})"),
            ("platform", report["platform"]),
            (
                "processor",
                f"{cpu['model']}, {cpu['logical_cores']} logical cores, {cpu['threads_used']} threads used",
            ),
            ("instruction sets", f"{', '.join(cpu['isa_levels'])} (kernels for {cpu['isa']} are taken)"),
            ("memory", f"{size(available)} free of {size(total)}" if total and available else None),
            ("disk", f"{size(report['disk_free_bytes'])} free here"),
            ("runs artifacts", "yes" if report["can"]["run"] else "no"),
            ("C compiler, linker", "not needed"),
            ("compiles models", "yes" if report["can"]["compile"] else "no: pip install 'llmc[compile]'"),
            ("CUDA kernels", _cuda_text(report["cuda"])),
            ("WebGPU kernels", _runs(report["webgpu"])),
            ("wrong packages", ", ".join(report["can"]["wrong_packages"]) or None),
        ]
    )
    return f"{summary}\n\n{packages}"
