"""Fixtures and options that every test file may use."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from llmc.codegen.tvm import cpu
from llmc.codegen.tvm.worker import ready_workers

# Before any test imports transformers or huggingface_hub: a test that needs the hub is a test that fails on
# a train.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch reads this when it is imported: tiny models lose time to more threads, and two exist nearly
# everywhere. Where files are tested side by side, the cores have work.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# What llmc keeps to save time (runtime/cache_folder.py) is a user's; the tests' own goes with the tests.
_caches = tempfile.TemporaryDirectory(prefix="llmc-tests-")
os.environ["XDG_CACHE_HOME"] = _caches.name
if "PYTEST_XDIST_WORKER" not in os.environ:
    # One folder for all processes of a run, and none of an earlier run's.
    os.environ["LLMC_CACHE"] = f"{_caches.name}/llmc"

USUAL = cpu._USUAL
LONG = bool(os.environ.get("LLMC_LONG_TESTS"))
"""Whether tests that try many things at random try all of them, which takes a quarter of an hour more."""

only_long = pytest.mark.skipif(not LONG, reason="LLMC_LONG_TESTS=1: more of what others stand for")

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in tests/golden/")


LONGEST = (
    "resume",
    "families",
    "tvm_quantized",
    "tvm_attention_kernels",
    "quantize_absorb",
    "memory",
    "engine_tvm",
)
"""Files to begin with: where files are tested side by side, no long one should be left for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)  # stable: within a file, and among the others, the order stays


def pytest_collection_finish() -> None:
    _let_stay()


def _let_stay() -> None:
    """Look for reference cycles no more among what is there: modules that were imported, a million objects,
    which every compilation would go through once.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _imported_stays() -> Iterator[None]:
    yield
    _let_stay()


@pytest.fixture(scope="session", autouse=True)
def _one_kernel_compiler() -> Iterator[None]:
    """One process compiles kernels for all tests: each compilation would wait for its own to import TVM."""
    with ready_workers(1, at_once=False):
        yield


@pytest.fixture(scope="session", autouse=True)
def _this_machines_level() -> Iterator[None]:
    """Kernels for the level that the tests run on: those of a lesser one are never loaded, and are most of
    what a compilation takes. Tests that name levels, and those with `usual_levels`, have theirs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_BASELINE", ())
        yield


@pytest.fixture
def usual_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for the levels of most machines, where nothing is said."""
    monkeypatch.setattr(cpu, "_BASELINE", USUAL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data that lies beside the checkout; the test is skipped where there is none."""
    named = os.environ.get("LLMC_SHARED_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set LLMC_SHARED_DATA")
    return folder


class Golden:
    """Compares text with a file under tests/golden/, or writes it with --update-golden."""

    def __init__(self, update: bool) -> None:
        self._update = update

    def check(self, name: str, text: str) -> None:
        path = GOLDEN / name
        if self._update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path.name} is missing: pytest --update-golden writes it"
        assert path.read_text() == text, f"{path.name} differs: read the diff, then pytest --update-golden"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(bool(request.config.getoption("--update-golden")))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory):
    """A function name → Hugging Face folder of the tiny model, made once a session."""
    from .models import save_tiny

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp("tiny") / name)
        return made[name]

    return folder
