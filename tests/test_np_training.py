"Training a neural process: tasks with their best answers, the switches, resuming after a kill, and what is learned."
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from theria.attention import ops
from theria.attention.contract import ContractError, rel_err
from theria.attention.launch import listening
from theria.neural_process.model import Size
from theria.neural_process.tasks import KERNELS, TASKS, draw, example
from theria.neural_process.training import PLANS, Optimizer, Step, Switches, share, train_np
from theria.records import Record

ROOT = Path(__file__).parent.parent
TINY = Size(16, 2, 2, 21, 3)
PLAIN, FUSED = (dict.fromkeys(("mlp", "heads", "gmm", "adamw"), how) for how in ("reference", "fused"))
KNOWN = [*KERNELS, "gp", "sawtooth"]


def gradient_errors(runs, trained, batches, size, device):
    "Of runs by name: the error of the gradient for the last batch against float64, at the rounded weights that the first run has after some steps."
    device, first = torch.device(device), next(iter(runs.values()))
    on = lambda b, dtype=None: type(b)(*(t.to(device, dtype) for t in b))
    step = Step(first.build(size, device), first, lr=1e-3, clip=1.)
    for b in batches[:trained]: step(on(b))
    weights = [p.detach().clone() for p in step.net.parameters()]
    def gradient(switches, dtype=None):
        net = switches.build(size, device).to(dtype)
        with torch.no_grad(): torch._foreach_copy_(list(net.parameters()), weights)
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(net.loss(*on(batches[trained], dtype)), list(net.parameters()))])
    truth = gradient(Switches(attention="reference", precision="fp32", **PLAIN), torch.float64)
    return {name: rel_err(gradient(s), truth) for name, s in runs.items()}


def train(switches, batches, size=TINY, device="cpu", lr=1e-2, clip=1., **kw):
    device = torch.device(device)
    step = Step(switches.build(size, device), switches, lr=lr, clip=clip, **kw)
    losses = [step(type(b)(*(t.to(device) for t in b))).item() for b in batches]
    return losses, torch.cat([m.detach().float().flatten() for m in step.optimizer.masters]).cpu()


# Tasks

@pytest.mark.parametrize("task", KNOWN)
def test_no_prediction_beats_the_best_one(task):
    "The known answer is the best on average, with its own mean moved or its spread changed as much as with no context at all."
    drawn = draw(task, 400, 10, 5, seed=3, judge=True)
    assert drawn.best.mean() > drawn.prior.mean() + .05
    if task == "sawtooth": return
    gains = []
    for seed in range(60):
        e = example(task, 10, 40, seed)
        density = lambda mean, std: (-.5*((e.batch.target_y[0] - mean)/std)**2 - std.log() - .5*math.log(2*math.pi)).mean()
        gains.append([density(e.mean, e.std) - density(m, s) for m, s in ((e.mean + .3*e.std, e.std), (e.mean, 1.4*e.std), (e.mean, e.std/1.4))])
    assert (torch.tensor(gains).mean(0) > 0).all()


def test_tasks_of_a_kind_differ_and_repeat():
    for task in KNOWN:
        a, b, c = (draw(task, 3, 6, 5, seed, 7).batch for seed in (1, 1, 2))
        assert all(torch.equal(s, t) for s, t in zip(a, b))
        assert not torch.equal(a.context_y, c.context_y) and not torch.equal(a.context_y[0], a.context_y[1])
        assert all(t.isfinite().all() and t.dtype == torch.float32 for t in a)


def test_measured_series():
    pytest.importorskip("statsmodels", reason="the measured series come with statsmodels, an optional requirement")
    batch = draw("series", 6, 20, 10).batch
    assert batch.context_x.abs().max() <= 2 and batch.context_y.abs().max() < 10
    places = torch.cat([batch.context_x, batch.target_x], 1)[..., 0]
    assert all(len(set(row.tolist())) == 30 for row in places)
    with pytest.raises(ContractError, match="choose fewer"): draw("series", 1, 10_000, 10)


# Switches

def test_every_switch_trains_the_same_model():
    batches, size = [draw("gp", 2, 8, 6, 0, i).batch for i in range(3)], TINY._replace(n_layers=1)
    losses, theta = train(Switches(attention="sdpa", precision="fp32", **PLAIN), batches, size)
    for kw in (dict(attention="reference"), dict(rows="needed"), dict(checkpoint=True), dict(mlp="fused"), dict(heads="fused"), dict(gmm="fused"), dict(attention="theria"), dict(attention="theria-once"),
               dict(attention="theria-two", rows="needed", checkpoint=True, **FUSED)):
        other, phi = train(Switches(**{**dict(attention="sdpa", precision="fp32", **PLAIN), **kw}), batches, size)
        assert other == pytest.approx(losses, abs=2e-4), kw
        assert rel_err(phi, theta) < 5e-3, kw


def test_low_precision_trains_as_well():
    batches = [draw("rbf", 8, 12, 16, 0, i).batch for i in range(60)]
    ends = {}
    for precision in ("fp32", "autocast", "bf16"):
        losses, theta = train(Switches(attention="sdpa", precision=precision, **PLAIN), batches)
        ends[precision] = sum(losses[-10:])/10
        assert theta.isfinite().all() and sum(losses[:5])/5 - ends[precision] > .15
    assert max(ends.values()) - min(ends.values()) < .05


@pytest.mark.parametrize("adamw", ["reference", "fused"])
def test_masters_begin_at_the_weights_before_rounding(adamw):
    exact = list(Switches(precision="fp32").build(TINY, torch.device("cpu")).parameters())
    for behind in (False, True):
        switches = Switches(attention="sdpa", precision="bf16", behind=behind, **PLAIN | dict(adamw=adamw))
        step = Step(switches.build(TINY, torch.device("cpu")), switches)
        assert step.optimizer.fused == (adamw == "fused")
        for p, m, e in zip(step.net.parameters(), step.optimizer.masters, exact, strict=True):
            assert torch.equal(m, e) and torch.equal(p, e.bfloat16()) and not hasattr(p, "exact")


def test_replaced_weights_are_not_undone_by_what_they_were_rounded_from():
    switches = Switches(attention="sdpa", precision="bf16", **PLAIN)
    net, other = (switches.build(TINY, torch.device("cpu"), seed) for seed in (0, 1))
    net.load_state_dict(other.state_dict())
    for m, p in zip(Step(net, switches).optimizer.masters, other.parameters(), strict=True): assert torch.equal(m, p.float())


def test_first_losses_in_bf16_are_those_of_fp32():
    "While the learning rate rises, masters that begin on the grid of bf16 numbers move other weights than the gradient asks for."
    batches = [draw("gp", 4, 16, 24, 0, i).batch for i in range(12)]
    def losses(precision, forget=False):
        switches = Switches(attention="sdpa", precision=precision, **PLAIN)
        net = switches.build(Size(64, 3, 4, 172, 5), torch.device("cpu"))
        for p in net.parameters() if forget else (): del p.exact
        step, found = Step(net, switches, clip=1.), []
        for i, b in enumerate(batches):
            step.optimizer.set_lr(1e-5*(i + 1))
            found.append(step(b).item())
        return found
    truth, right, wrong = losses("fp32"), losses("bf16"), losses("bf16", True)
    away = [max(abs(a - b) for a, b in zip(x, truth)) for x in (right, wrong)]
    assert away[0] < 2e-3 < away[1] and away[0] < away[1]/5


def test_gradients_in_bf16_err_alike():
    batches = [draw("gp", 4, 8, 12, 0, i).batch for i in range(21)]
    plain = Switches(attention="sdpa", precision="bf16", **PLAIN)
    for trained in (0, 20):
        errors = gradient_errors({"sdpa": plain, "reference": replace(plain, attention="reference", rows="needed", checkpoint=True)}, trained, batches, TINY, "cpu")
        assert 1e-4 < errors["reference"] < 1.5*errors["sdpa"] < .1, errors


def test_the_optimizer_is_adamw_with_clipping():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(3)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = Optimizer(params, 1e-2, .1, clip=.5), torch.optim.AdamW(twins, lr=1e-2, weight_decay=.1)
    for i in range(5):
        for p, t in zip(params, twins): p.grad = torch.randn(5, 3); t.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(twins, .5)
        ours.set_lr(lr := 1e-2/(i + 1))
        theirs.param_groups[0]["lr"] = lr
        ours.step()
        theirs.step()
    for p, t in zip(params, twins): assert rel_err(p, t) < 1e-6


@pytest.mark.parametrize("change, words", [
    (dict(graph=True), "got graph=True on cpu"), (dict(precision="fp8"), "got precision='fp8'"), (dict(compile="yes"), "got compile='yes'"), (dict(attention="faster"), "got attention='faster'")])
def test_a_switch_that_cannot_be_is_refused(change, words, tmp_path):
    with pytest.raises(ContractError, match=words): train_np(device="cpu", out=tmp_path, switches=Switches(**change), progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, words", [
    (dict(steps=0), "got steps=0"), (dict(contexts=()), "no context size"), (dict(contexts=(4, 0)), "got contexts"), (dict(lr=math.nan), "got lr=nan"), (dict(seed=2**31), "got seed="),
    (dict(task="digits"), "got task='digits'"), (dict(preset="huge"), "got preset='huge'"), (dict(device="tpu"), "got device='tpu'")])
def test_a_run_that_cannot_be_is_refused(change, words, tmp_path):
    with pytest.raises(ContractError, match=words): train_np(**{"device": "cpu", "out": tmp_path, "progress": False, **change})


# Learning

def test_it_learns_towards_the_posterior(tmp_path):
    "A few seconds of training close half of the way between no context and the exact answer."
    run = train_np("quick", "rbf", device="cpu", out=tmp_path, progress=False, size=Size(32, 2, 2, 64, 5), steps=240, every=120, batch=16, contexts=(16,), targets=24, lr=4e-3, test=200)
    first, last = (r["judged"][0] for r in sorted(run.record.rows(part="chunk"), key=lambda r: r["to"]))
    assert last["best"] > last["model"] > first["model"] and first["best"] == last["best"]
    assert share(last) > .5
    page = run.page.read_text()
    assert page.count("<svg") == 5 and "exact posterior" in page and "reference" in page


RUN = dict(task="rbf", device="cpu", progress=False, steps=60, every=5, batch=4, contexts=(4, 8), targets=8, test=20)
KILLED = f"""
import sys
import torch
torch.set_num_threads(1)
from theria.neural_process import training
from theria.neural_process.model import Size
training.source_hash = lambda: "the same"
training.train_np(out=sys.argv[1], size=Size{tuple(TINY)}, **{RUN})
"""

def test_a_killed_run_ends_with_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("theria.neural_process.training.source_hash", lambda: "the same")  # an edit of any module in between would rightly make it another run
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path/"killed")], env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path/"killed"/"train-np.pt").exists() and time.monotonic() < deadline and killed.poll() is None: time.sleep(.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    chunks = lambda record: [(r["to"], r["losses"], r["judged"]) for r in sorted(record.rows(part="chunk"), key=lambda r: r["to"])]
    before = len(Record(tmp_path/"killed"/"train-np.json").rows(every_run=True, part="chunk"))
    again, whole = (chunks(train_np(out=tmp_path/folder, size=TINY, **RUN).record) for folder in ("killed", "whole"))
    assert 1 <= before < 12 == len(again) and again == whole


def test_an_unreadable_checkpoint_starts_the_run_over(tmp_path, capsys):
    kw = dict(task="rbf", device="cpu", out=tmp_path, progress=False, size=TINY, steps=6, every=3, batch=4, contexts=(4,), targets=8, test=20)
    losses = [r["losses"] for r in train_np(**kw).record.rows(part="chunk")]
    (tmp_path/"train-np.pt").write_bytes(b"not a checkpoint")
    assert [r["losses"] for r in train_np(**kw).record.rows(part="chunk")] == losses
    assert "cannot be read" in capsys.readouterr().err


def test_presets_are_what_they_say():
    assert set(PLANS) == {"quick", "full"} and PLANS["full"].size == Size()
    assert all(plan.warmup < 1 and plan.every <= plan.steps for plan in PLANS.values())
    assert set(KNOWN) | {"series"} == set(TASKS)


# What a recorded graph cannot hold: numbers that travel between host and device

class Travels(TorchDispatchMode):
    "Names every operation that would read a number back from a GPU or bring one from the host, also inside the operators of this package; kernels are not run."
    KINDS = {"lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "_pin_memory"}

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name, self.calls = f.overloadpacket.__name__, self.calls + 1
        chosen = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if chosen or name in self.KINDS: self.found.append(name)
        if f.namespace != "theria": return f(*args, **kwargs or {})
        with self, listening(lambda *a, **k: None): return ops.IMPLEMENTATIONS[name](*args, **kwargs or {})


@pytest.mark.parametrize("travel", [lambda x: x.new_tensor((1., 0.)), lambda x: x*torch.tensor(3.), lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: torch.as_tensor([1.]).to(x.device)])
def test_travelling_numbers_are_found(travel):
    x = torch.randn(4)
    with Travels() as seen: travel(x)
    assert seen.found


@pytest.mark.parametrize("attention", ["reference", "theria", "theria-two", "theria-once", "theria-fp8"])
@pytest.mark.parametrize("parts", [PLAIN, FUSED], ids=["plain", "fused"])
def test_nothing_travels_in_a_step(attention, parts):
    batch = draw("gp", 4, 8, 12, 0, 0).batch
    for precision, checkpoint, rows in (("bf16", False, "all"), ("autocast", True, "needed"), ("bf16", True, "needed"), ("autocast", False, "all")):
        switches = Switches(attention=attention, precision=precision, checkpoint=checkpoint, rows=rows, behind=checkpoint, **parts)
        step = Step(switches.build(TINY, torch.device("cpu")), switches, clip=None if checkpoint else 1.)
        with listening(lambda *a, **k: None): step(batch)  # the first step makes the moments
        with Travels() as seen: step(batch)
        assert seen.calls > 100 and not seen.found, switches


# On a GPU

BIG = Size(128, 3, 2, 200, 5)

def gpu_batches(n, B=4): return [draw("gp", B, 64, 100, 0, i).batch for i in range(n)]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["autocast", "bf16"])
@pytest.mark.parametrize("parts", [PLAIN, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_recorded_step_is_the_eager_step_to_the_last_bit(precision, parts, checkpoint):
    "Twelve different batches; the graph is recorded at the first, and what its warm-up changed is put back."
    runs = [train(Switches(attention="theria", precision=precision, checkpoint=checkpoint, graph=graph, **parts), gpu_batches(12), BIG, "cuda", 1e-3) for graph in (False, True)]
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("precision, checkpoint", [("autocast", False), ("bf16", False), ("bf16", True)])
def test_an_update_behind_the_backward_pass_changes_no_bit(precision, checkpoint, graph):
    "On two streams, over twelve steps: a parameter that is updated too early or read too late would show."
    plain = Switches(attention="theria", precision=precision, checkpoint=checkpoint, **FUSED)
    runs = [train(s, gpu_batches(12, 16), BIG._replace(n_layers=6), "cuda", 1e-2, None) for s in (plain, replace(plain, behind=True, graph=graph))]
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.gpu
def test_several_shapes_share_one_recorded_model():
    batches = [draw("gp", 4, M, 50, 0, i).batch for i, M in enumerate((16, 64, 16, 33, 64, 16))]
    runs = [train(Switches(attention="theria", precision="bf16", graph=graph, **PLAIN), batches, BIG, "cuda", 1e-3) for graph in (False, True)]
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.gpu
@pytest.mark.parametrize("attention, compiled", [("cudnn", "whole"), ("flash", "blocks"), ("theria", "blocks"), ("theria", "whole")])
def test_a_compiled_and_recorded_step_stays_with_the_plain_one(attention, compiled):
    parts = FUSED if attention == "theria" else PLAIN
    plain, _ = train(Switches(attention="flash", precision="autocast", **PLAIN), gpu_batches(20), BIG, "cuda", 1e-3)
    torch._dynamo.reset()
    fast, _ = train(Switches(attention=attention, precision="bf16", compile=compiled, graph=True, **parts), gpu_batches(20), BIG, "cuda", 1e-3)
    assert fast == pytest.approx(plain, abs=.03)


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [0, 100, 300])
def test_gradients_err_as_those_of_the_plain_model(trained):
    "At the weights where a plain run has arrived, so that no drift of two runs is in between."
    plain = Switches(attention="flash", precision="bf16", **PLAIN)
    fast = replace(plain, attention="theria", checkpoint=True, rows="needed", **FUSED)
    errors = gradient_errors({"plain": plain, "fast": fast, "fp8": replace(fast, attention="theria-fp8")}, trained, gpu_batches(trained + 1, 16), BIG, "cuda")
    assert errors["fast"] < 2*errors["plain"] + 1e-6 and errors["fp8"] < 16*errors["plain"], errors


@pytest.mark.gpu
def test_every_switch_on_trains_as_the_plain_model_over_hundreds_of_steps():
    "At first all runs agree; once rounding has grown, none is further from the plain run of its precision than plain runs are from each other, in three repetitions together."
    from theria.neural_process.matrix import COMPARED, Shape, apart, compare_losses, smoothed
    repeated = [compare_losses(COMPARED, Shape("", 16, 64, 100, BIG), 300, seed=seed) for seed in range(3)]
    plain = [(x[a], x[b]) for x in repeated for a, b in combinations([name for name in x if name.startswith("plain")], 2)]
    first, later = max(apart(a[:15], b[:15], 1) for a, b in plain), max(apart(a, b) for a, b in plain)
    assert first < .01 and later < .1  # else they say nothing about the others
    for losses in repeated:
        for name, x in losses.items():
            means, other = smoothed(x, 50), losses["plain, autocast" if "autocast" in name else "plain, bf16"]
            assert means[-1] < means[0] - .3, name
            assert apart(x[:15], other[:15], 1) < (16 if "FP8" in name else 2)*first, (name, first)  # rounding to E4M3 is 2⁵ times as coarse as to bf16
            assert apart(x, other) < (4 if "FP8" in name else 2)*later, (name, later)
