"""The work folder: pieces are whole or absent; foreign folders are left alone, other work is refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from llmc.ir.errors import InputError
from llmc.passes.work import KEY, MARKER, PieceTensor, WorkFolder

KEY_A = {"scheme": "gptq-int4-g32", "model": "aa", "calibration": "cc"}


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "codes": generator.integers(0, 16, (5, 7)).astype(np.uint8),
        "scale": generator.standard_normal((5, 3)).astype(np.float16),
        "hidden": generator.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3.5, np.float64),
        "none": np.empty((0, 4), np.float32),
    }


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype
        and left[k].shape == right[k].shape
        and left[k].tobytes() == right[k].tobytes()
        for k in left
    )


@pytest.mark.parametrize("mapped", [False, True])
def test_pieces_come_back_as_they_were_saved(tmp_path: Path, mapped: bool) -> None:
    work = WorkFolder.open(tmp_path / "w", KEY_A, resume=False)
    work.save("layer.0", arrays())
    again = WorkFolder.open(tmp_path / "w", KEY_A, resume=True)
    assert again.resumed == 1 and again.done("layer.0") and not again.done("layer.1")
    found = again.load("layer.0", mapped=mapped)
    assert same(found, arrays())
    assert all(view.flags.aligned and view.flags.writeable != mapped for view in found.values())
    again.save("layer.0", {"codes": np.zeros(3, np.int32)})  # replaced as a whole
    assert list(again.load("layer.0")) == ["codes"]
    again.remove("layer.0")
    assert again.names() == [] and not again.done("layer.0")
    with pytest.raises(KeyError):
        again.load("layer.0")


def test_what_a_killed_writer_leaves_is_no_piece(tmp_path: Path) -> None:
    work = WorkFolder.open(tmp_path / "w", KEY_A, resume=False)
    work.save("layer.0", arrays())
    (work.path / "layer.1.piece.partial").write_bytes(b"half of a piece")
    work.scratch("activations").write_bytes(b"x")
    again = WorkFolder.open(tmp_path / "w", KEY_A, resume=True)
    assert again.names() == ["layer.0"]
    assert sorted(p.name for p in again.path.iterdir()) == [MARKER, KEY, "layer.0.piece"]


def test_work_of_another_compilation_is_refused_by_name_or_started_over(tmp_path: Path) -> None:
    WorkFolder.open(tmp_path / "w", KEY_A, resume=False).save("layer.0", arrays())
    other = {**KEY_A, "scheme": "awq-int4-g32", "context": "64"}
    with pytest.raises(InputError, match=r"another compilation: context, scheme differ; compile without"):
        WorkFolder.open(tmp_path / "w", other, resume=True)
    assert WorkFolder.open(tmp_path / "w", KEY_A, resume=True).names() == ["layer.0"]
    assert WorkFolder.open(tmp_path / "w", other, resume=False).names() == []


@pytest.mark.parametrize("left", [[], [MARKER + ".partial"], [MARKER]], ids=str)
def test_a_folder_whose_making_was_interrupted_is_started_anew(tmp_path: Path, left: list[str]) -> None:
    (tmp_path / "w").mkdir()
    for name in left:
        (tmp_path / "w" / name).write_text("")
    work = WorkFolder.open(tmp_path / "w", KEY_A, resume=True)
    work.save("layer.0", arrays())
    assert work.resumed == 0
    assert WorkFolder.open(tmp_path / "w", KEY_A, resume=True).resumed == 1


def test_pieces_without_a_key_are_not_resumed(tmp_path: Path) -> None:
    work = WorkFolder.open(tmp_path / "w", KEY_A, resume=False)
    work.save("layer.0", arrays())
    (work.path / KEY).unlink()  # killed while an older run's pieces were being cleared
    assert WorkFolder.open(tmp_path / "w", KEY_A, resume=True).names() == []


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, resume: bool, what: str) -> None:
    path, precious = tmp_path / "w", tmp_path / "other"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    if what == "folder":
        os.rename(precious, path)
    elif what == "file":
        path.write_text("dear")
    else:
        path.symlink_to(precious)
    with pytest.raises(InputError, match=r"is not a work folder of llmc; rename it"):
        WorkFolder.open(path, KEY_A, resume=resume)
    kept = path if what == "file" else path / "letter.txt"
    assert kept.read_text() == "dear"


@pytest.mark.parametrize("at", [3, 20, 45, -1])
def test_a_damaged_piece_is_refused(tmp_path: Path, at: int) -> None:
    work = WorkFolder.open(tmp_path / "w", KEY_A, resume=False)
    work.save("layer.0", arrays())
    file = work.path / "layer.0.piece"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"layer\.0\.piece is damaged.*compile without --resume"):
        work.load("layer.0")


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    work = WorkFolder.open(tmp_path / "w", KEY_A, resume=False)
    for name in ("../x", "a/b", "", ".hidden", "a\nb"):
        with pytest.raises(ValueError):
            work.save(name, {})


def test_an_empty_folder_is_not_kept(tmp_path: Path) -> None:
    work = WorkFolder.open(tmp_path / "w", KEY_A, resume=False)
    work.close(keep=True)
    assert not work.path.exists()
    work = WorkFolder.open(tmp_path / "w", KEY_A, resume=False)
    work.save("layer.0", arrays())
    work.close(keep=True)
    assert work.done("layer.0")
    work.close(keep=False)
    assert not work.path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_of_a_mapped_piece_take_no_memory_once_read(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    rows = np.arange(64 << 20, dtype=np.uint8).reshape(1024, -1)
    work = WorkFolder.open(tmp_path / "w", KEY_A, resume=False)
    work.save("layer.0", {"q": rows, "scalar": np.array(2.5, np.float32)})
    views = work.load("layer.0", mapped=True)
    lazy = PieceTensor(views["q"], "q(w)")
    before = resident()
    assert all(np.array_equal(lazy.read(i, i + 8), rows[i : i + 8]) for i in range(0, 1024, 8))
    assert resident() - before < 16 << 20
    assert lazy.shape == (1024, 65536) and lazy.dtype == "uint8" and lazy.read().flags.owndata
    assert PieceTensor(views["scalar"], "s").read() == 2.5
    assert np.array_equal(PieceTensor(rows, "plain").read(3, 5), rows[3:5])
