"Result files under crashes, concurrent writers and damage."
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import theria.records
from theria.records import Damaged, Record, from_json, git_state, provenance, public_command, to_json, write_atomic

DATA = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5).filter(lambda k: k != "$float"), x, max_size=3))
LOOSE = dict(parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))

WRITER = """
import sys
from theria.records import Record
path, name, rows, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
record = Record(path, run=dict(seed=0))
for n in range(rows):
    record.add(dict(writer=name, n=n), dict(text="x"*size))
    print(n, flush=True)
"""


def writer(path, name, rows, size):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(rows), str(size)], stdout=subprocess.PIPE, text=True,
                            cwd=Path(theria.records.__file__).parents[1])


@given(DATA)
@settings(max_examples=150, deadline=None)
def test_plain_data_survive_strict_json(x):
    text = to_json(x)
    json.loads(text, **LOOSE)
    assert to_json(from_json(text)) == text


def test_other_data_are_refused_by_name():
    with pytest.raises(TypeError, match="of type set, but holds only numbers"): to_json({"a": {1}})
    with pytest.raises(TypeError, match=r"other than '\$float'"): to_json({"$float": "nan"})


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.03])
def test_killed_while_writing_loses_nothing_finished(tmp_path, delay):
    path = tmp_path/"r.json"
    p = writer(path, "w", 10_000, 500_000)
    done = [int(p.stdout.readline()) for _ in range(4)]
    time.sleep(delay)
    p.send_signal(signal.SIGKILL)
    done += [int(line) for line in p.stdout.read().split()]
    assert p.wait() == -signal.SIGKILL
    record = Record(path, run=dict(seed=0), notify=pytest.fail)
    assert {r["n"] for r in record.rows()} >= set(done) and len(record) <= len(done) + 1
    assert all(len(r["text"]) == 500_000 for r in record.rows())
    record.add(dict(writer="after", n=0), dict(text=""))
    assert sorted(os.listdir(tmp_path)) == [".r.json.lock", "r.json"]   # the temporary file of the killed process is swept


def test_concurrent_writers_keep_each_others_rows(tmp_path):
    path = tmp_path/"deep"/"r.json"
    writers = [writer(path, name, 25, 1000) for name in "abc"]
    assert [p.wait(timeout=60) for p in writers] == [0, 0, 0]
    for p in writers: p.stdout.close()
    record = Record(path, run=dict(seed=0), notify=pytest.fail)
    assert {(r["writer"], r["n"]) for r in record.rows()} == {(w, n) for w in "abc" for n in range(25)}
    assert len(record.provenances) == 3


def test_rows_of_other_runs_do_not_mix(tmp_path):
    a, b = (Record(tmp_path/"r.json", run=dict(seed=s, lr=math.nan)) for s in (0, 1))
    a.add(dict(n=1), dict(loss=math.nan))
    b.add(dict(n=1), dict(loss=2.0))
    again = Record(tmp_path/"r.json", run=dict(lr=math.nan, seed=0))
    assert len(again) == 1 and math.isnan(again[dict(n=1)]["loss"])
    assert [r["seed"] for r in again.rows(every_run=True)] == [0, 1]
    assert again.once(dict(n=1), lambda: pytest.fail("computed twice"))["seed"] == 0
    assert len(Record(tmp_path/"r.json", run=dict(seed=0))) == 0   # fewer parameters are another run too


def good_text(folder):
    Record(folder/"good.json", run=dict(seed=0)).add(dict(n=1), dict(loss=1.0))
    return (folder/"good.json").read_text()


@pytest.mark.parametrize("harm", [
    lambda t: t[:len(t)//2], lambda t: "", lambda t: "\0"*len(t), lambda t: t.replace("1.0", "NaN"), lambda t: "[]",
    lambda t: t.replace("theria-record-1", "theria-record-9"), lambda t: t.replace('"session":', '"sesion":'), lambda t: t + t,
    lambda t: t.replace('"rows"', '"lines"'), lambda t: t.replace('"provenance"', '"origin"'), lambda t: "[" * 100_000])
def test_a_damaged_file_is_kept_aside_and_computed_again(tmp_path, harm):
    bad, path = harm(good_text(tmp_path)), tmp_path/"r.json"
    (tmp_path/"r.damaged-1.json").write_text("an earlier one")
    path.write_text(bad)
    with pytest.warns(Damaged, match=r"r\.json is damaged \(.+\), so it was kept aside as r\.damaged-2\.json"):
        record = Record(path, run=dict(seed=0))
    assert len(record) == 0
    record.once(dict(n=1), lambda: dict(loss=2.0))
    assert Record(path, run=dict(seed=0))[dict(n=1)]["loss"] == 2.0
    assert (tmp_path/"r.damaged-2.json").read_text() == bad
    assert (tmp_path/"r.damaged-1.json").read_text() == "an earlier one"


@pytest.mark.parametrize("old, new", [("0.125", "0.625"), ('"n": 2', '"n": 3'), ('"seed": 0', '"seed": 1'), ('"theria": "', '"theria": "9'), ('"seconds": null', '"seconds": 1'),
                                      ('{"loss": 0.125}', "{}"), (', "seconds": null', "")])
def test_a_row_that_was_changed_is_damage(tmp_path, old, new):
    path, said = tmp_path/"r.json", []
    for n in (1, 2): Record(path, dict(seed=0)).add(dict(n=n), dict(loss=1/4**n if n > 1 else .125))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    r = Record(path, dict(seed=0), notify=said.append)
    assert len(r) == 0 and len(said) == 1 and "r.damaged-1.json" in said[0] and (tmp_path/"r.damaged-1.json").exists()


def test_damage_during_a_run_costs_no_row_of_that_run(tmp_path):
    said = []
    record = Record(tmp_path/"r.json", notify=said.append)
    record.add(dict(n=1), dict(loss=1.0))
    (tmp_path/"r.json").write_text("junk")
    record.add(dict(n=2), dict(loss=2.0))
    assert [r["n"] for r in Record(tmp_path/"r.json", notify=pytest.fail).rows()] == [1, 2]
    assert len(said) == 1 and (tmp_path/"r.damaged-1.json").read_text() == "junk"


def test_opening_creates_nothing(tmp_path):
    assert len(Record(tmp_path/"none"/"r.json")) == 0
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_processes_are_swept(tmp_path):
    (tmp_path/".r.json.k1ll3d.tmp").write_text("half")
    (tmp_path/".other.json.busy.tmp").write_text("not ours")
    Record(tmp_path/"r.json").add(dict(n=1), dict(loss=1.0))
    assert sorted(os.listdir(tmp_path)) == [".other.json.busy.tmp", ".r.json.lock", "r.json"]


def test_writing_keeps_links_and_modes_and_fails_cleanly(tmp_path):
    (tmp_path/"real.json").write_text("old")
    (tmp_path/"real.json").chmod(0o640)
    (tmp_path/"link.json").symlink_to("real.json")
    write_atomic(tmp_path/"link.json", "new")
    assert (tmp_path/"link.json").is_symlink() and (tmp_path/"real.json").read_text() == "new"
    assert (tmp_path/"real.json").stat().st_mode & 0o777 == 0o640
    with pytest.raises(UnicodeEncodeError): write_atomic(tmp_path/"real.json", "\ud800")
    assert (tmp_path/"real.json").read_text() == "new" and len(list(tmp_path.iterdir())) == 2


def test_commands_are_published_without_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = public_command(["/opt/x/bin/theria", "contract", f"--out={tmp_path}/runs/a", "--data", "/home/ada/omniglot", "~/me.py:f"])
    assert command == "theria contract --out=runs/a --data omniglot me.py:f"
    assert public_command(["theria", "audit", "a/b.py:f", "../c", "https://x.org/y"]) == "theria audit a/b.py:f ../c https://x.org/y"


def test_provenance_is_complete_and_impersonal():
    p = provenance()
    assert {"device_name", "torch", "triton", "numpy", "python", "theria", "platform", "commit", "dirty", "command", "utc"} <= set(p)
    assert str(Path.home()) not in to_json(p) and os.uname().nodename not in [str(v) for v in p.values()]


def test_the_commit_is_the_packages_own(tmp_path):
    package = tmp_path/"repo"/"venv"/"theria"
    package.mkdir(parents=True)
    shutil.copy(theria.records.__file__, package/"records.py")
    (package/"__init__.py").write_text('__version__ = "0"')
    git = lambda *a: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *a], cwd=tmp_path/"repo", check=True,
                                    capture_output=True, text=True).stdout.strip()
    code = "import json, theria.records as r; print(json.dumps([r.git_state(), r.source_hash()]))"
    state = lambda: json.loads(subprocess.run([sys.executable, "-c", code], cwd=package.parent, check=True, capture_output=True).stdout)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "somebody else's")
    foreign, source = state()
    assert foreign == dict(commit=None, dirty=None)
    git("add", "."), git("commit", "-q", "-m", "ours")
    assert state() == [dict(commit=git("rev-parse", "HEAD"), dirty=False), source]
    with open(package/"records.py", "a") as f: f.write("\n")
    dirty, changed = state()
    assert dirty["dirty"] is True and changed != source
