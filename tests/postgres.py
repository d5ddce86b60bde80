"""A PostgreSQL server for tests: in a temporary folder, spoken to over a Unix socket, thrown away."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

_NOBODY = ("postgres", "nobody")
"""Users under whom the server runs where the tests run as root, which it refuses."""


def find_server() -> Path | None:
    """The folder of PostgreSQL's programs, on PATH or where Debian puts them; best one that has pgvector."""
    on_path = shutil.which("initdb")
    debian = sorted(
        (path for path in Path("/usr/lib/postgresql").glob("*/bin/initdb") if path.parts[-3].isdecimal()),
        key=lambda path: -int(path.parts[-3]),
    )
    found = [path.parent for path in ([Path(on_path)] if on_path else []) + debian]
    found = [folder for folder in found if (folder / "pg_ctl").exists()]
    return next((folder for folder in found if has_pgvector(folder)), found[0] if found else None)


def has_pgvector(programs: Path) -> bool:
    """Whether the server whose programs these are can add pgvector to a database."""
    command = [str(programs / "pg_config"), "--sharedir"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return Path(done.stdout.strip(), "extension", "vector.control").exists()


@contextmanager
def server() -> Generator[str]:
    """The URL of a running server with an empty database. Skips the test where there is none to start."""
    programs = find_server()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: postgresql-17, postgresql-17-pgvector)")
    if not has_pgvector(programs):
        pytest.skip(f"no pgvector for the PostgreSQL in {programs}")
    # Not in pytest's folder: a socket's path has at most 107 bytes, and another user must reach it.
    folder = Path(tempfile.mkdtemp(prefix="llmc-pg-"))
    try:
        user = _user()
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        with _running(programs, folder, user) as url:
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _user() -> pwd.struct_passwd | None:
    if os.getuid() != 0:
        return None
    for name in _NOBODY:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    pytest.skip(f"PostgreSQL does not run as root, and there is no user {' or '.join(_NOBODY)}")


@contextmanager
def _running(programs: Path, folder: Path, user: pwd.struct_passwd | None) -> Generator[str]:
    as_user = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}
    options = {"cwd": folder, "env": {**os.environ, "LC_ALL": "C.UTF-8"}, **as_user}

    def call(name: str, *arguments: str) -> None:
        command = [str(programs / name), *arguments]
        with (folder / f"{name}.log").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=120, **options)
        if done.returncode:
            raise RuntimeError(f"{name} failed: {(folder / f'{name}.log').read_text()[-2000:]}")

    data = str(folder / "data")
    call("initdb", "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-instructions")
    settings = (
        f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=50"
    )
    call("pg_ctl", "-D", data, "-l", str(folder / "server.log"), "-w", "-o", settings, "start")
    try:
        yield f"postgresql://tester@/postgres?host={quote(str(folder), safe='')}"
    finally:
        call("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
