"""The tables of the PostgreSQL store: one schema of a database, its versions, and connecting to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from ....ir.errors import InputError
from .base import Settings
from .records import settings_text
from .schema import packed

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[tuple[Any, ...]]

VERSION = 2
DEFAULT_NAME = "llmc"
_PARAMETER = "llmc_store"
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,47}")
_LOCK_CLASS = int.from_bytes(b"llmc", "big")
_CONNECT_SECONDS = "10"

# As in SQLite, passages, features and vectors are tables of their own. The words of the full-text index come
# folded from us, separated by spaces, so that every kind of word that the parser can see in them is stemmed
# alike, and none is left out as too common: phrases stay whole.
SCHEMA = """
CREATE TABLE meta (key text PRIMARY KEY, value text NOT NULL);

CREATE TABLE documents (
    row bigint PRIMARY KEY,
    id text COLLATE "C" NOT NULL UNIQUE,
    path text COLLATE "C" NOT NULL,
    title text NOT NULL,
    media_type text NOT NULL,
    digest text NOT NULL,
    size bigint NOT NULL,
    modified_ns bigint NOT NULL,
    metadata text NOT NULL
);
CREATE INDEX documents_path ON documents (path);

CREATE TABLE chunks (
    row bigint PRIMARY KEY,
    id text COLLATE "C" NOT NULL UNIQUE,
    document bigint NOT NULL REFERENCES documents ON DELETE CASCADE,
    ordinal bigint NOT NULL,
    title text NOT NULL,
    heading text NOT NULL,
    text text NOT NULL,
    "start" bigint NOT NULL,
    "end" bigint NOT NULL,
    page bigint,
    tokens bigint NOT NULL,
    mentions bigint NOT NULL,
    words tsvector NOT NULL
);
CREATE INDEX chunks_document ON chunks (document, ordinal);
CREATE INDEX chunks_words ON chunks USING gin (words);

CREATE TABLE features (
    chunk bigint PRIMARY KEY REFERENCES chunks ON DELETE CASCADE,
    terms bytea STORAGE EXTERNAL NOT NULL,
    title_counts bytea NOT NULL,
    text_counts bytea NOT NULL,
    spans bytea STORAGE EXTERNAL NOT NULL,
    mentions bytea NOT NULL
);

CREATE TABLE vectors (
    chunk bigint PRIMARY KEY REFERENCES chunks ON DELETE CASCADE,
    vector halfvec NOT NULL
);

CREATE TABLE triples (
    chunk bigint NOT NULL REFERENCES chunks ON DELETE CASCADE,
    origin text COLLATE "C" NOT NULL,
    subject text COLLATE "C" NOT NULL,
    predicate text COLLATE "C" NOT NULL,
    object text COLLATE "C" NOT NULL
);
CREATE INDEX triples_chunk ON triples (chunk);

CREATE TABLE extracted (
    chunk bigint NOT NULL REFERENCES chunks ON DELETE CASCADE,
    origin text COLLATE "C" NOT NULL,
    quarantine text,
    PRIMARY KEY (chunk, origin)
);

CREATE TEXT SEARCH DICTIONARY stem (TEMPLATE = snowball, Language = english);
CREATE TEXT SEARCH CONFIGURATION words (PARSER = "default");
ALTER TEXT SEARCH CONFIGURATION words ADD MAPPING FOR
    asciiword, word, numword, asciihword, hword, numhword, hword_asciipart, hword_part, hword_numpart,
    int, uint, float, sfloat, version WITH stem;
"""
TABLES = ("documents", "chunks", "features", "vectors", "triples", "extracted", "meta")

_MIGRATED = 512  # rows that are sent together


def _pack_mentions(connection: Connection) -> None:
    """1 → 2, as 2 → 3 of SQLite's. A table is filled beside the old one, so that who reads waits for the end
    alone, when they change places.
    """
    made = SCHEMA[SCHEMA.index("CREATE TABLE features (") :]
    connection.execute(made[: made.index(";")].replace("features", "features_2", 1).encode())
    last = -1
    sql = f"SELECT chunk, mentions FROM features WHERE chunk > %s ORDER BY chunk LIMIT {_MIGRATED}"
    while rows := connection.execute(sql.encode(), (last,)).fetchall():
        last = rows[-1][0]
        connection.execute(
            "INSERT INTO features_2"
            " SELECT chunk, terms, title_counts, text_counts, spans, packed"
            " FROM features JOIN unnest(%s::bigint[], %s::bytea[]) AS new (chunk, packed) USING (chunk)",
            ([row for row, _ in rows], [packed(mentions) for _, mentions in rows]),
        )
    connection.execute("""
        DROP TABLE features;
        ALTER TABLE features_2 RENAME TO features;
        ALTER TABLE features RENAME CONSTRAINT features_2_pkey TO features_pkey;
        ALTER TABLE features RENAME CONSTRAINT features_2_chunk_fkey TO features_chunk_fkey;
        ALTER TABLE extracted ADD COLUMN origin text COLLATE "C" NOT NULL DEFAULT 'llm:';
        ALTER TABLE extracted ALTER COLUMN origin DROP DEFAULT;
        ALTER TABLE extracted DROP CONSTRAINT extracted_pkey;
        ALTER TABLE extracted ADD PRIMARY KEY (chunk, origin);
        DELETE FROM extracted e WHERE quarantine IS NULL
            AND EXISTS (SELECT * FROM triples t WHERE t.chunk = e.chunk);
        INSERT INTO extracted (chunk, origin, quarantine)
            SELECT DISTINCT chunk, origin, NULL::text FROM triples ON CONFLICT DO NOTHING;
    """)


MIGRATIONS: dict[int, Callable[[Connection], None]] = {1: _pack_mentions}
"""Version → what makes it the next one, in a transaction of the caller."""


@dataclass(frozen=True)
class Place:
    """A store in a database: `url` is for connecting, `location` for people (without the password)."""

    url: str
    location: str
    name: str
    password: str

    @property
    def key(self) -> tuple[int, int]:
        """Of the advisory lock: of this database, for this store."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return _LOCK_CLASS, int.from_bytes(digest[:4], "big") >> 1


def place_of(location: str) -> Place:
    """Take a URL apart, as libpq reads it, with `llmc_store` for us.

    Raises InputError where the name of the store is none.
    """
    parts = urlsplit(location)
    query = parse_qsl(parts.query, keep_blank_values=True)
    names = [value for name, value in query if name == _PARAMETER]
    name = names[-1] if names else DEFAULT_NAME
    reserved = name.startswith("pg_") or name in ("public", "information_schema")
    if not _NAME.fullmatch(name) or reserved:
        raise InputError(
            f"{_PARAMETER}={name[:60]!r}: is no name for a store",
            remedy="use small letters, digits and _, at most 48, and not a schema that PostgreSQL uses",
        )
    kept = [(key, value) for key, value in query if key != _PARAMETER]
    user, _, host = parts.netloc.rpartition("@")
    account, _, password = user.partition(":")
    password = unquote(password) or next((value for key, value in kept if key == "password"), "")
    shown = [(key, value) for key, value in kept if key not in ("password", "sslpassword")]
    if names:
        shown.append((_PARAMETER, name))
    netloc = f"{account}@{host}" if account else host
    return Place(
        url=urlunsplit(parts._replace(query=_query(kept))),
        location=urlunsplit(parts._replace(netloc=netloc, query=_query(shown))),
        name=name,
        password=password,
    )


def _query(pairs: list[tuple[str, str]]) -> str:
    return urlencode(pairs, quote_via=quote, safe="/")


@contextlib.contextmanager
def explained(place: Place) -> Generator[None]:
    """Turn an error of PostgreSQL into an InputError that names the store, the cause and the way out."""
    import psycopg

    try:
        yield
    except psycopg.Error as error:
        raise _explain(error, place) from None


def _explain(error: psycopg.Error, place: Place) -> InputError:
    import psycopg
    from psycopg import errors

    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    if place.password:
        cause = cause.replace(place.password, "…")
    remedies: tuple[tuple[Any, str], ...] = (
        (errors.DiskFull, "make room on the server; nothing of the store is lost"),
        (errors.InsufficientPrivilege, "ask the owner of the database for the right"),
        (errors.ReadOnlySqlTransaction, "open it for writing, on a server that is not a replica"),
        (errors.LockNotAvailable, "somebody reads it: try again when they are done"),
        (errors.UndefinedTable, "the store was removed, or is damaged: index again"),
        (errors.UniqueViolation, "give each chunk an id of its own"),
        (psycopg.OperationalError, "check that the server runs, and the URL's host, user and password"),
    )
    remedy = next((text for kind, text in remedies if isinstance(error, kind)), "")
    return InputError(f"{place.location}: {cause}", remedy=remedy)


def connect(place: Place, *, read_only: bool) -> Connection:
    """A connection in which transactions are begun and ended by hand; names are looked up in the store."""
    try:
        import psycopg
    except ImportError:
        raise InputError(
            f"{place.location}: psycopg, which speaks to PostgreSQL, is not installed",
            remedy="pip install 'llmc[postgres]'",
        ) from None
    with explained(place):
        connection = psycopg.connect(
            place.url,
            autocommit=True,
            client_encoding="utf8",
            connect_timeout=_CONNECT_SECONDS,
            application_name=f"llmc process {os.getpid()} on {socket.gethostname()}"[:63],
        )
        try:
            rows = connection.execute(
                "SELECT quote_ident(n.nspname) FROM pg_extension e"
                " JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
            ).fetchall()
            path = ", ".join([f'"{place.name}"', *(name for (name,) in rows)])
            connection.execute("SELECT set_config('search_path', %s, false)", (path,))
            if read_only:
                connection.execute("SET default_transaction_read_only = on")
        except BaseException:
            connection.close()
            raise
    return connection


def version_of(connection: Connection, place: Place) -> int | None:
    """The store's version; None where there is no schema of the name.

    Raises InputError where the schema is not ours, or of a newer llmc.
    """
    found = connection.execute("SELECT to_regnamespace(quote_ident(%s))::oid", (place.name,)).fetchone()
    if found is None or found[0] is None:
        return None
    ours = connection.execute(
        "SELECT to_regclass(quote_ident(%s) || '.meta'), has_schema_privilege(%s, 'USAGE')", (place.name,) * 2
    ).fetchone()
    if ours is None or not ours[1]:
        raise InputError(f"{place.location}: schema {place.name!r} may not be used", remedy="ask its owner")
    rows: dict[str, str] = {}
    if ours[0] is not None:
        with contextlib.suppress(_undefined_column()):
            rows = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    version = rows.get("llmc_store_version", "")
    if not version.isdecimal():
        raise InputError(
            f"{place.location}: schema {place.name!r} is of another program, not a store",
            remedy=f"add ?{_PARAMETER}=NAME to the URL, with another name",
        )
    if int(version) > VERSION:
        raise InputError(
            f"{place.location}: is of store version {version}, this llmc knows versions up to {VERSION}",
            remedy="use a newer llmc, or index the documents into a new store",
        )
    return int(version)


def _undefined_column() -> type[Exception]:
    from psycopg import errors

    return errors.UndefinedColumn


def create_tables(connection: Connection, place: Place) -> None:
    """Make an empty store, all or nothing, unless somebody else just has."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", place.key)
        if version_of(connection, place) is not None:
            return
        encoding = connection.execute("SHOW server_encoding").fetchone()
        if encoding != ("UTF8",):
            raise InputError(f"{place.location}: the database is not in UTF-8", remedy="create it with UTF8")
        _add_pgvector(connection, place)
        connection.execute(f'CREATE SCHEMA "{place.name}"'.encode())
        connection.execute(SCHEMA.encode())
        values = {
            "llmc_store_version": str(VERSION),
            "identity": uuid.uuid4().hex,
            "generation": str(time.time_ns() // 1000),
            "settings": settings_text(Settings()),
        }
        for pair in values.items():
            connection.execute("INSERT INTO meta VALUES (%s, %s)", pair)


def _add_pgvector(connection: Connection, place: Place) -> None:
    from psycopg import errors

    try:
        with connection.transaction():
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public")
    except (errors.FeatureNotSupported, errors.UndefinedFile):
        raise InputError(
            f"{place.location}: the server has no pgvector",
            remedy="install it there (on Debian, the package postgresql-17-pgvector)",
        ) from None
    except errors.InsufficientPrivilege:
        raise InputError(
            f"{place.location}: may not add pgvector to the database",
            remedy="let its owner run: CREATE EXTENSION vector",
        ) from None
    where = connection.execute(
        "SELECT quote_ident(n.nspname), e.extversion,"
        " EXISTS (SELECT * FROM pg_type WHERE typname = 'halfvec')"
        " FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
    ).fetchone()
    if where is None or not where[2]:
        found = where[1] if where else "unknown"
        raise InputError(
            f"{place.location}: its pgvector is {found}, stores need 0.7 or newer",
            remedy="update it there, then run: ALTER EXTENSION vector UPDATE",
        )
    connection.execute("SELECT set_config('search_path', %s, false)", (f'"{place.name}", {where[0]}',))


def migrate(connection: Connection, place: Place) -> None:
    """Bring a store of an older version to this one, in one transaction. Raises InputError for a damaged one,
    which stays as it is.
    """
    with connection.transaction():
        for older in range(version_of(connection, place) or VERSION, VERSION):
            try:
                MIGRATIONS[older](connection)
            except (TypeError, ValueError):
                raise InputError(
                    f"{place.location}: is damaged: what was worked out of a passage cannot be read",
                    remedy="index the documents into a new store",
                ) from None
        connection.execute("UPDATE meta SET value = %s WHERE key = 'llmc_store_version'", (str(VERSION),))
