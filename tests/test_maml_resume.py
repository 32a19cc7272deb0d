"A meta-training that is killed ends with the same numbers, and so does one that is shared by several processes."
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from theria.meta.episodes import digits
from theria.meta.gradients import Protocol, meta_train
from theria.meta.learner import learner_for
from theria.meta.safety import run_maml
from theria.records import Record

CHOICES = dict(data="digits", backend="reference", device="cpu", steps=20, tasks=2, test_tasks=4, n_layers=1, learn_lr=True, momentum=.3, progress=False)
CODE = "import sys, theria.meta.gradients as g; g.meta_train.__kwdefaults__['every'] = 0.; from theria.meta.safety import run_maml; run_maml(out=sys.argv[1], **{choices!r})"


def environment(): return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
def numbers(folder): return [{k: r[k] for k in ("part", "score", "interval", "history", "curve", "rates", "per_task")} for r in Record(folder/"maml.json").rows(every_run=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_maml(out=folder, **CHOICES)
    return numbers(folder)


@pytest.mark.parametrize("steps_before", [1, 9])
def test_a_killed_run_ends_with_the_same_numbers(whole, tmp_path, steps_before):
    p = subprocess.Popen([sys.executable, "-c", CODE.format(choices=CHOICES), str(tmp_path)], env=environment())
    done = 0
    while p.poll() is None and done < steps_before:
        for state in tmp_path.glob("*.state"): done = len(torch.load(state)["history"])
        time.sleep(.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert 1 <= done < 20 and [r["part"] for r in numbers(tmp_path)] == ["start"]
    assert (tmp_path/"maml.json").exists() and len(list(tmp_path.glob("maml-*.state"))) == 1
    run_maml(out=tmp_path, **CHOICES)
    assert numbers(tmp_path) == whole and not list(tmp_path.glob("maml-*.state"))
    assert (tmp_path/"maml.png").stat().st_size > 1000


def test_another_run_does_not_take_the_state(tmp_path):
    state, data = tmp_path/"a.state", digits()
    model = learner_for("digits", 5, n_layers=1, backend="reference")
    go = lambda **kw: meta_train(model, data, Protocol(), **{"tasks": 2, "outer_steps": 3, "resume": state} | kw).history
    first = go()
    assert go(outer_steps=4)[:3] == first
    for other in (dict(seed=1), dict(estimator="fo"), dict(tasks=3), dict(outer_lr=1e-3), dict(estimator="truncated", options={"keep": 2})):
        assert go(**other) == go(**other, resume=None), other


SHARED = """
import os, sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from theria.meta.episodes import digits
from theria.meta.gradients import Protocol, meta_train
from theria.meta.learner import learner_for
import json
dist.init_process_group("gloo")
model = learner_for("digits", 5, n_layers=1, backend="reference").double()
run = meta_train(model, digits(), Protocol(learn_lr=True), tasks=4, outer_steps=3)
if dist.get_rank() == 0: json.dump([run.history, {n: p.flatten()[:3].tolist() for n, p in run.params.items()}, run.rates], open(sys.argv[1], "w"))
dist.destroy_process_group()
"""


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    (tmp_path/"shared.py").write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path/"shared.py"), str(tmp_path/"found.json")]
    subprocess.run(command, env=environment(), check=True, timeout=120)
    history, params, rates = json.loads((tmp_path/"found.json").read_text())
    alone = meta_train(learner_for("digits", 5, n_layers=1, backend="reference").double(), digits(), Protocol(learn_lr=True), tasks=4, outer_steps=3)
    for a, b in zip(history, alone.history): assert a == pytest.approx(b, rel=1e-9)
    for n, p in alone.params.items(): assert params[n] == pytest.approx(p.flatten()[:3].tolist(), rel=1e-9, abs=1e-12)
    assert rates == pytest.approx(alone.rates, rel=1e-9)
