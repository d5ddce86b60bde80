"""The house rules that no other test would notice: who imports whom, what is packaged, what is loaded."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from llmc.cli.main import COMMANDS

from .conftest import ROOT

FOLDERS = ("llmc", "frontend", "ir", "passes", "codegen", "runtime", "plugins", "cli")
# Folder → the folders of ours that it may import at all; "codegen.artifact" narrows to one module.
ALLOWED: dict[str, set[str]] = {
    "ir": set(),
    "frontend": {"ir", "plugins.entries"},
    "passes": {"ir", "plugins.entries", "plugins.options"},
    "codegen": {
        "ir",
        "frontend",
        "passes",
        "plugins.entries",
        "plugins.options",
        "runtime.cpu",
        "runtime.cache_folder",
    },
    "runtime": {
        "codegen.artifact",
        "frontend.lora",
        "frontend.lora_gguf",
        "ir.adapters",
        "ir.errors",
        "ir.dtypes",
        "ir.expert_parts",
        "ir.gguf_rows",
        "ir.stored_modules",
        "ir.weights",
        "plugins.entries",
        "plugins.options",
    },
}
HEAVY = {"torch", "transformers", "tvm", "tvm_ffi", "onnx", "onnx_ir", "gguf", "huggingface_hub"}


def _modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == "llmc" else ["llmc", *parts])


def _imports(path: Path, *, toplevel_only: bool = False) -> list[tuple[int, str]]:
    """(line, absolute module) of every import in a file, those inside functions too by default."""
    tree = ast.parse(path.read_text())
    package = _name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    nodes = _toplevel(tree) if toplevel_only else list(ast.walk(tree))
    found: list[tuple[int, str]] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            # `from ..ir import core` imports llmc.ir.core: name the member where it is a module of ours.
            for alias in node.names:
                member = f"{module}.{alias.name}"
                found.append((node.lineno, member if _is_module(member) else module))
    return found


def _toplevel(tree: ast.Module) -> list[ast.AST]:
    """Statements that run on import: everything but function bodies and `if TYPE_CHECKING:`."""
    out: list[ast.AST] = []
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        out.append(node)
        waiting += ast.iter_child_nodes(node)
    return out


def _is_module(name: str) -> bool:
    if not name.startswith("llmc."):
        return False
    parts = name.split(".")[1:]
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    allowed = {f"llmc.{folder}", *(f"llmc.{name}" for name in ALLOWED[folder])}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in _modules(folder)
        for line, module in _imports(path)
        if module.split(".")[0] == "llmc" and module not in {"llmc", "llmc.codegen"}
        if not any(module == name or module.startswith(name + ".") for name in allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_inside_the_package_imports_are_relative() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in FOLDERS
        for path in _modules(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("llmc."))
        or (isinstance(node, ast.Import) and any(alias.name.startswith("llmc.") for alias in node.names))
    ]
    assert not wrong, wrong


def test_runtime_names_no_compile_time_package() -> None:
    ir = ("errors", "dtypes", "adapters", "expert_parts", "gguf_rows", "row_orders", "stored_modules")
    ir += ("weights", "types")
    beside = ("codegen/artifact", *(f"ir/{name}" for name in ir))
    adapters = ("frontend/lora", "frontend/safetensors", "frontend/mapped")  # read where they are served too
    files = [*_modules("runtime"), *(ROOT / f"{name}.py" for name in (*beside, *adapters))]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files
        for line, module in _imports(path)
        if module.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_of_the_command_line_are_lazy() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module} at import time"
        for path in [*(ROOT / f"cli/{name}.py" for name in ("main", *COMMANDS)), ROOT / "llmc/__init__.py"]
        for line, module in _imports(path, toplevel_only=True)
        if module.split(".")[0] in HEAVY | {"numpy", "onnxruntime", "tokenizers"}
        or (module.startswith("llmc.") and not module.startswith(("llmc.cli", "llmc.ir.errors")))
    ]
    assert not wrong, "\n".join(wrong)


def test_wheel_holds_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    wanted = [name for name in names if name.split("/")[0] in FOLDERS and (ROOT / name).is_file()]
    if not wanted:
        pytest.skip("not a git checkout: no list of the sources")
    # Built from a copy: setuptools leaves build/ and egg-info where it builds, and reuses a stale build/.
    for name in [*wanted, "pyproject.toml", "setup.py", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    command += ["-w", str(tmp_path)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    missing = [name for name in wanted if (name if name.startswith("llmc/") else f"llmc/{name}") not in held]
    assert not missing, f"not in the wheel: {missing}"


SLOW = "importlib.metadata"
"""It and the e-mail parser that it brings take 30 ms of CPU time, a seventh of `llmc --help`."""


def _loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names = done.stdout.splitlines()
    return {name.split(".")[0] for name in names} | {name for name in names if name == SLOW}


def test_help_loads_nothing_heavy() -> None:
    loaded = _loaded_after(
        "from llmc.cli.main import main\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(['--help'])"
    )
    assert "click" in loaded
    assert not loaded & (HEAVY | {"numpy", "onnxruntime", "tokenizers", "rich", "tvm_ffi", "jinja2", SLOW})


def test_opening_a_model_looks_for_no_packages() -> None:
    assert SLOW not in _loaded_after("import llmc.runtime.loader")


def test_only_kernel_compilers_load_tvm() -> None:
    """Importing TVM takes a second: the workers do it meanwhile."""
    modules = ("cpu", "cuda", "webgpu", "weights")
    code = "; ".join(f"import llmc.codegen.tvm.{module}" for module in modules)
    assert not _loaded_after(code) & {"tvm", "tvm_ffi"}


def test_importing_llmc_loads_nothing_heavy() -> None:
    assert not _loaded_after("import llmc") & (HEAVY | {"numpy", "onnxruntime", "tokenizers", "tvm_ffi"})


# Module → distribution, where the names differ.
_DISTRIBUTIONS = {
    "tvm": "apache-tvm",
    "tvm_ffi": "apache-tvm-ffi",
    "ml_dtypes": "ml-dtypes",
    "onnx_ir": "onnx-ir",
    "Stemmer": "pystemmer",
}


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    used = ("compile", "tools", "plot", "rag", "postgres", "webgpu")
    listed = (*project["dependencies"], *(one for name in used for one in extras[name]))
    names = {re.split(r"[^\w.-]", text)[0].lower() for text in listed}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}, which pyproject.toml does not name"
        for folder in FOLDERS
        for path in _modules(folder)
        for line, module in _imports(path)
        if (top := module.split(".")[0]) not in sys.stdlib_module_names and top != "llmc"
        if _DISTRIBUTIONS.get(top, top.replace("_", "-")) not in names
    ]
    assert not wrong, "\n".join(wrong)


def test_public_names_are_there() -> None:
    pytest.importorskip("torch")
    import llmc
    from llmc.codegen import driver
    from llmc.runtime import loader

    assert {name for name in llmc.__all__ if not hasattr(llmc, name)} == set()
    assert inspect.unwrap(llmc.load) is loader.load  # with what makes kernels that take adapters
    functions = (llmc.compile, driver.compile_model)
    public, inner = (inspect.signature(function).parameters for function in functions)
    # `render` and `detect` are how the driver gets what the runtime, which it may not import, knows of chat
    # templates; `say` is the command line's. What belongs together is one argument of the driver.
    joined = {"calib", "calib_tokens", "resume"} | {"max_kl", "max_ppl_increase"}
    assert set(public) - joined == set(inner) - {"render", "detect", "say", "calibration"}


def test_imports_set_no_environment_variables() -> None:
    folders = [folder for folder in FOLDERS if folder != "cli"]
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in folders
        for path in _modules(folder)
        for node in _toplevel(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign | ast.Call) and "os.environ" in ast.unparse(node)
        if isinstance(node, ast.Assign) or "setdefault" in ast.unparse(node.func)
    ]
    assert not wrong, wrong
