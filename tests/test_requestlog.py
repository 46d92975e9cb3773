"The request log on a real Postgres that is killed and comes back, and on a sqlite that two processes write to, one of them killed."
import os, shutil, signal, socket, sqlite3, subprocess, sys, tempfile, time
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from conftest import ROOT, wait
from nbs_lib.config import WrongCall
from nbs_lib.requestlog import COLUMNS, RequestLog, rows

BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None) or Path(shutil.which("postgres") or "/none/postgres").parent
ROW = dict(version="3", model="abc", sha="0" * 16, bytes=1000, width=64, height=48, brightness=80.5, boxes=[[1, 2, 30, 40, "cat", .9]], seconds=.02)
LONG_AGO = datetime(2020, 1, 1, tzinfo=timezone.utc)


class Postgres:
    "A server in a folder, which can be killed and started again. It will not run as root: then it is the user postgres."
    def __init__(self, folder):
        self.folder, self.user = folder, "postgres" if os.getuid() == 0 else None
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"postgresql://nbs:geheim@127.0.0.1:{self.port}/postgres"
        (folder/"password").write_text("geheim")
        if self.user: shutil.chown(folder, self.user), shutil.chown(folder/"password", self.user)
        subprocess.run([BIN/"initdb", "--pgdata", folder/"data", "--username", "nbs", "--pwfile", folder/"password", "--auth", "scram-sha-256"],
                       user=self.user, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    def start(self):
        with open(self.folder/"log", "a") as log:
            self.process = subprocess.Popen([BIN/"postgres", "-D", self.folder/"data", "-p", str(self.port), "-k", self.folder, "-h", "127.0.0.1"],
                                            user=self.user, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        wait(lambda: subprocess.run([BIN/"pg_isready", "--quiet", "--host=127.0.0.1", f"--port={self.port}"]).returncode == 0, 60)

    def kill(self):
        "As by a lack of memory."
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        (self.folder/"data/postmaster.pid").unlink(missing_ok=True)


@pytest.fixture
def postgres():
    if not (BIN/"postgres").exists(): pytest.skip("no postgres: apt-get install postgresql")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed for other users
        it = Postgres(Path(folder))
        it.start()
        yield it
        if it.process.poll() is None: it.kill()


def ids(url, **kw): return [r["id"] for r in rows(url, since=LONG_AGO, **kw)]


def test_postgres_killed_while_requests_come(postgres):
    "No request waits, none is lost, none is there twice."
    log, put, longest = RequestLog(postgres.url, days=1000), [], 0.
    def ask(seconds):
        nonlocal longest
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            put.append(f"{len(put):032x}")
            begin = time.perf_counter()
            log.put(dict(ROW, id=put[-1]))
            longest = max(longest, time.perf_counter() - begin)
            time.sleep(.002)
    ask(1)
    for _ in range(3):
        postgres.kill()
        ask(1)
        assert log.counts["waiting"] and log.error and "geheim" not in log.error and "\n" not in log.error
        with pytest.raises(WrongCall, match=f"postgresql://127.0.0.1/postgres: .*port {postgres.port} failed"): log.recent()
        postgres.start()
        ask(.5)
    wait(lambda: not log.counts["waiting"], 60)
    print(f"{len(put)} requests, the longest put took {longest * 1000:.1f} ms")
    assert sorted(ids(postgres.url)) == put and log.counts == dict(written=len(put), dropped=0, waiting=0) and log.error is None
    assert longest < .1
    found = log.find(put[0])
    assert {k: found[k] for k in ROW} == ROW and list(found) == list(COLUMNS) and datetime.now(timezone.utc) - found["time"] < timedelta(minutes=5)
    log.feedback(put[0], "corrected")
    assert log.find(put[0])["feedback"] == "corrected" and log.recent(1)[0]["id"] == put[-1]
    log.close()


def test_a_table_that_is_dropped_is_made_again_and_a_bad_row_takes_none_with_it(postgres):
    log = RequestLog(postgres.url)
    log.put(ROW)
    wait(lambda: log.counts["written"] == 1, 60)
    with log.db.engine.begin() as connection: connection.exec_driver_sql("DROP TABLE requests")
    for i in range(5): log.put(dict(ROW, version=f"a\0{i}", bytes=2**70 if i == 3 else 1))
    wait(lambda: not log.counts["waiting"], 60)
    assert (log.counts, [r["version"] for r in rows(postgres.url, since=LONG_AGO)]) == (dict(written=5, dropped=1, waiting=0), ["a0", "a1", "a2", "a4"])
    log.close()
    with log.db.engine.begin() as connection: connection.exec_driver_sql("ALTER TABLE requests DROP COLUMN conf")  # as an older version made it
    assert [r["conf"] for r in rows(postgres.url, since=LONG_AGO)] == [None] * 4
    log = RequestLog(postgres.url)
    log.put(dict(ROW, id="f" * 32, conf=.25))
    log.close(30)
    assert log.find("f" * 32)["conf"] == .25
    with pytest.raises(WrongCall, match="password authentication failed") as refused:
        next(rows(postgres.url.replace("geheim", "Gehe1m"), since=LONG_AGO))
    assert "Gehe1m" not in str(refused.value)


WRITER = """
import sys
from nbs_lib.requestlog import RequestLog
log = RequestLog(sys.argv[1], days=1000)
for i in range(int(sys.argv[3])):
    log.put(dict(id=f'{sys.argv[2]}{i:031x}', version='1'))
    if i % 100 == 99: print(i, log.counts, flush=True); __import__('time').sleep(.02)
log.close(60)
print(log.counts['written'], flush=True)
"""


def writer(url, name, number):
    return subprocess.Popen([sys.executable, "-c", WRITER, url, name, str(number)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                            stdout=subprocess.PIPE, text=True)


def test_two_processes_write_to_one_sqlite(tmp_path):
    url = f"sqlite:///{tmp_path}/requests.db"
    both = [writer(url, name, 3000) for name in "ab"]
    assert [p.communicate()[0].splitlines()[-1] for p in both] == ["3000"] * 2
    assert sorted(ids(url)) == [f"{name}{i:031x}" for name in "ab" for i in range(3000)]


def test_a_killed_process_leaves_a_database_that_opens(tmp_path):
    url, written = f"sqlite:///{tmp_path}/requests.db", 0
    for round in range(5):
        process = writer(url, str(round), 10**6)
        for _ in range(2 + 3 * round): process.stdout.readline()
        process.kill()
        process.communicate()
        with closing(sqlite3.connect(tmp_path/"requests.db")) as con:
            assert con.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            [made] = con.execute("SELECT count(*) FROM sqlite_master WHERE name = 'requests'").fetchone()  # a kill may have come before its table
        found = ids(url) if written or made else []
        assert len(found) == len(set(found)) >= written
        written = len(found)
    assert written > 100


def test_what_is_old_goes_with_its_picture(tmp_path):
    url, old = f"sqlite:///{tmp_path}/requests.db", datetime.now(timezone.utc) - timedelta(days=8)
    kept = lambda: sorted(p.name for p in (tmp_path/"pictures").iterdir() if p.name != ".requests")  # which says whose the folder is
    log = RequestLog(url, days=30, pictures=tmp_path/"pictures")
    for name, time_ in dict(a=old, b=None).items(): log.put(dict(ROW, id=name * 32, sha=name * 16, time=time_), b"\xff\xd8\xff" + name.encode())
    log.close(30)
    assert len(ids(url)) == 2 and kept() == [f"{'a' * 16}.jpg", f"{'b' * 16}.jpg"]
    for name in kept(): os.utime(tmp_path/"pictures"/name, (0, old.timestamp()))
    log = RequestLog(url, days=7, pictures=tmp_path/"pictures")  # which forgets when it starts
    wait(lambda: len(kept()) == 1, 60)
    assert ids(url) == ["b" * 32] and kept() == [f"{'b' * 16}.jpg"]
    log.close()
    log = RequestLog(url)
    log.put(dict(ROW, sha="c" * 16), b"\xff\xd8\xff")
    log.close(30)
    assert len(ids(url)) == 2 and len(kept()) == 1  # nobody asked to keep it
