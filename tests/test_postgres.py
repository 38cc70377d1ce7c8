"""What only a server can do to a ledger: be down, refuse, vanish in mid-call, hold other data."""

from __future__ import annotations

import threading

import psycopg
import pytest
from postgres import PASSWORD

from society.errors import (
    InvariantViolated,
    LedgerUnreachable,
    NotANotebook,
    NotebookDamaged,
    NotebookInUse,
    UsageError,
)
from society.memory import postgres
from society.memory.ledger import Ledger
from society.memory.schema import metadata
from society.records import NewInsight, Scope, SocietyState

SCOPE = Scope("toy/cpu", "cpu-A")


@pytest.fixture
def ledger(postgres_url):
    with Ledger.open(postgres_url) as ledger:
        yield ledger


@pytest.fixture
def raw(postgres_url):
    """Any client."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        yield connection


def post(ledger, key="k"):
    return ledger.commit(SCOPE, "s001", "ada", [NewInsight("x", ())], key=key)


# --- opening -------------------------------------------------------------------------------------


def test_an_address_names_the_ledger_wherever_it_is_opened(ledger, postgres_url):
    assert ledger.shared
    assert ledger.address == str(ledger.path) == postgres_url
    for read_only in (False, True):
        with Ledger.open(postgres_url, read_only=read_only) as other:
            assert other.id == ledger.id
            assert len(other.id) == 16


def test_a_password_is_in_no_address_and_no_message(postgres_server, postgres_url):
    database = postgres_url.rpartition("/")[2]
    postgres_server.execute(f"ALTER DATABASE {database} OWNER TO ann")
    open_to_her = postgres_server.url_of(database, f"ann:{PASSWORD}")
    with Ledger.open(open_to_her) as ledger:
        assert ledger.address == postgres_server.url_of(database, "ann")
    for wrong in ("ann", "ann:wr0ng", "ann:%20wr0ng", "nobody-known"):
        address = postgres_server.url_of(database, wrong)
        with pytest.raises(LedgerUnreachable) as caught:
            Ledger.open(address if wrong != "nobody-known" else f"{address}?password=wr0ng")
        assert "wr0ng" not in str(caught.value)
        assert "user" in str(caught.value)


def test_the_password_may_come_from_the_environment(postgres_server, postgres_url, monkeypatch):
    database = postgres_url.rpartition("/")[2]
    postgres_server.execute(f"ALTER DATABASE {database} OWNER TO ann")
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    Ledger.open(postgres_server.url_of(database, "ann")).close()


@pytest.mark.parametrize("read_only", [False, True])
def test_no_server(read_only):
    with pytest.raises(LedgerUnreachable, match=r"server runs.*host and port"):
        Ledger.open("postgresql://ann@127.0.0.1:9/lab", read_only=read_only)


def test_no_database(postgres_server):
    with pytest.raises(NotANotebook, match="createdb"):
        Ledger.open(postgres_server.url_of("nothing_here"))


def test_no_rights(postgres_server, postgres_url):
    address = postgres_server.url_of(postgres_url.rpartition("/")[2], f"ann:{PASSWORD}")
    with pytest.raises(NotebookDamaged, match="GRANT"):
        Ledger.open(address)


def test_what_is_no_ledger(postgres_url, raw):
    with pytest.raises(NotANotebook, match="no notebook's ledger"):
        Ledger.open(postgres_url, read_only=True)
    raw.execute("CREATE TABLE customers (name text)")
    with pytest.raises(NotANotebook, match="no notebook's ledger"):
        Ledger.open(postgres_url)
    assert raw.execute("SELECT count(*) FROM customers").fetchone() == (0,)
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    assert raw.execute(tables).fetchone() == (1,)


@pytest.mark.parametrize(
    "address",
    ["mysql://ann@host/lab", "http://host", "postgresql://host:port/lab", "postgresql://host",
     "sqlite://x"],
)  # fmt: skip
def test_other_addresses(address):
    with pytest.raises(UsageError, match="postgresql://USER@HOST"):
        Ledger.open(address)


def test_two_processes_may_make_the_same_ledger(postgres_url):
    ids = []

    def make():
        with Ledger.open(postgres_url) as ledger:
            ids.append(ledger.id)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 4
    assert len(set(ids)) == 1


def test_a_reader_writes_nothing(ledger, postgres_url):
    with Ledger.open(postgres_url, read_only=True) as reader:
        with pytest.raises(NotebookDamaged, match="for reading only"):
            reader.start_society(1, {})
        assert reader.societies() == ()


def test_a_file_made_after_a_database_in_one_process_has_all_its_foreign_keys(ledger, tmp_path):
    """SQLAlchemy remembers that PostgreSQL got those of mutually dependent tables by ALTER."""
    wanted = {name: len(table.foreign_key_constraints) for name, table in metadata.tables.items()}
    with Ledger.open(tmp_path / "ledger.sqlite") as other, other._db.read() as tx:
        query = "SELECT count(DISTINCT id) FROM pragma_foreign_key_list(?)"
        found = {name: tx.exec_driver_sql(query, (name,)).scalar_one() for name in wanted}
    assert found == wanted


# --- raw SQL that only PostgreSQL has ------------------------------------------------------------


def test_raw_truncation(ledger, raw):
    ledger.start_society(1, {})
    for table in ("runs", "leases", "hypotheses", "tallies", "scopes"):
        with pytest.raises(psycopg.IntegrityError, match="nothing is deleted"):
            raw.execute(f"TRUNCATE {table} CASCADE")


def test_raw_insert_that_would_update(ledger, raw):
    ledger.start_society(1, {})
    post(ledger)
    for end in ("DO UPDATE SET agent = 'eve'", "DO NOTHING"):
        with pytest.raises(psycopg.IntegrityError, match="holds this already"):
            raw.execute(f"INSERT INTO commits VALUES ('k', 's001', 'x', 0) ON CONFLICT (key) {end}")


def test_raw_writers_stand_in_the_same_queue(ledger, postgres_url, raw, monkeypatch):
    """A transaction that has written anything holds the lock until it ends."""
    ledger.start_society(1, {})
    monkeypatch.setitem(postgres._SETTINGS, "lock_timeout", "200ms")
    with Ledger.open(postgres_url) as other, psycopg.connect(postgres_url) as slow:
        slow.execute("INSERT INTO scopes (task, tier) VALUES ('a', 'b')")
        with pytest.raises(NotebookInUse, match="locked by another process"):
            post(other)
        assert other.scopes() == ()
        slow.commit()
        assert post(other)
        assert len(other.scopes()) == 2


def test_text_with_nul_in_what_names_a_thing_is_refused(ledger):
    society = ledger.start_society(1, {}).id
    with pytest.raises(InvariantViolated, match="NUL"):
        ledger.commit(SCOPE, society, "a\0da", [], key="k")


# --- a connection that is lost -------------------------------------------------------------------


def test_a_connection_lost_between_calls_is_made_again(ledger, raw):
    society = ledger.start_society(1, {}).id
    version = ledger.version()
    _end_the_others(raw)
    assert ledger.society(society).state is SocietyState.RUNNING
    assert ledger.version() > version


def test_a_connection_lost_within_a_call(ledger, raw):
    ledger.start_society(1, {})
    with pytest.raises(LedgerUnreachable, match=r"was lost.*--resume"):
        _write_and_be_cut_off(ledger, raw)
    assert ledger.scopes() == ()
    assert post(ledger)


def _write_and_be_cut_off(ledger, raw):
    with ledger._db.write() as tx:
        tx.exec_driver_sql("INSERT INTO scopes (task, tier) VALUES ('a', 'b')")
        _end_the_others(raw)
        tx.exec_driver_sql("SELECT 1")


def _end_the_others(raw):
    raw.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
