"Measuring: what is counted, how contenders are timed, what failures cost, and the commands around it."
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import theria
from theria import bench, cli
from theria.attention.contract import ContractError
from theria.attention.tuning import Config
from theria.bench import CONTENDERS, EXECUTED, FIRST, NEEDED, PASSES, SECOND, Bench, Case, Contender, DeviceLost, Stopwatch, Work
from theria.records import Record, from_json

ROOT = Path(theria.__file__).parents[1]
TINY = Case(1, 2, 9, 9, 8, "float32")
CASES = st.builds(Case, st.integers(1, 2), st.sampled_from([2, 4]), st.integers(2, 9), st.integers(2, 9), st.integers(1, 5), st.just("float64"), st.booleans(),
                  Hkv=st.sampled_from([1, 2]), Dv=st.integers(1, 5))
WINDOWS = st.builds(lambda Lq, more, window: Case(1, 1, Lq, Lq + more, 4, "float64", window=window), st.integers(1, 12), st.integers(0, 12), st.integers(1, 30))


def record(tmp_path, **run): return Record(tmp_path/"r.json", run)
def by(rows): return {r["contender"]: r for r in rows}


@pytest.fixture
def contender(monkeypatch):
    "Add a contender for one test."
    return lambda name, attention, **kw: monkeypatch.setitem(CONTENDERS, name, Contender(lambda case, x: attention, cpu=True, **kw))


# Counting

@given(WINDOWS)
def test_pairs_of_a_window_are_those_of_its_mask(case):
    assert bench.pairs(case) == bench.visible(case).sum()


@given(st.integers(1, 200), st.integers(1, 200))
def test_pairs_follow_the_convention(Lq, Lk):
    assert bench.pairs(Case(1, 1, Lq, Lk, 8)) == Lq*Lk
    assert bench.pairs(Case(1, 1, Lq, Lq, 8, causal=True)) == Lq*Lq/2 == bench.visible(Case(1, 1, Lq, Lq, 8, causal=True)).sum() - Lq/2


def test_rates_are_those_of_the_literature():
    case = Case(4, 16, 4096, 4096, 128)
    assert bench.tflops(case, NEEDED["forward"], 1.) == 4*4*16*4096**2*128/1e9
    assert NEEDED["backward"]/NEEDED["forward"] == 2.5
    assert bench.tflops(replace(case, causal=True), 2, 1.) == bench.tflops(case, 2, 1.)/2 == bench.tflops(case, 2, 2.)


KERNEL_UNITS = {"forward": 2, "backward": 7, "jvp": 5, "tangent_backward": 15, "double_backward": 18}   # as they multiply, tiles that are made twice counted twice


def executed(contender, name):
    "Products that a pass multiplies, counted while it runs."
    from theria.attention import autograd  # noqa: F401  registers the operators, whose formulas are replaced below
    case = replace(TINY, Lq=16, Lk=16, D=16, Dv=16)
    x, flop = bench.inputs(case, second=True), bench.unit(case)
    with_tdo = lambda name, args: 3 if name == "tangent_backward" and args[13] is not None else 0   # G of a tangent of dO twice, and one product more
    formulas = {getattr(torch.ops.theria, op): partial(lambda units, op, *args, **kw: (units + with_tdo(op, args))*flop, units, op) for op, units in KERNEL_UNITS.items()}
    with CONTENDERS[contender].context():
        run = PASSES[name].build(CONTENDERS[contender].make(case, x), x)
        with FlopCounterMode(display=False, custom_mapping=formulas) as counted: run()
    return counted.get_total_flops()/flop


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("who", EXECUTED)
def test_executed_products_are_those_that_pytorch_counts(who, name): assert executed(who, name) == EXECUTED[who][name]


def test_where_one_walk_does_not_fit_two_products_more_are_counted(monkeypatch):
    from theria.attention import tuning
    q, case = torch.empty(1, 1, 16, 16), replace(TINY, Lq=16, Lk=16)
    assert bench.executed(case, "theria", "double-backward", q) == EXECUTED["theria"]["double-backward"] and bench.executed(case, "cudnn", "forward", q) is None
    monkeypatch.setattr(tuning, "lookup", lambda *a: None)
    assert {n: bench.executed(case, "theria", n, q) - u for n, u in EXECUTED["theria"].items() if bench.executed(case, "theria", n, q) != u} == {
        "double-backward": 2, "forward+backward+double-backward": 2}


# The exact answer

@settings(max_examples=20)
@given(CASES, st.integers(1, 40))
def test_the_oracle_does_not_depend_on_its_slices(case, size):
    x = bench.inputs(case, second=True)
    whole, sliced = bench.oracle(case, x), bench.oracle(case, x, size)
    assert set(whole) == {n for p in PASSES.values() for n in p.outputs.split()}
    for n, y in whole.items(): assert torch.allclose(y, sliced[n], rtol=1e-12, atol=1e-12) and y.shape == bench.last_heads(case, torch.empty(bench.shape_of(case, n)), n).shape


@settings(max_examples=15)
@given(CASES, st.sampled_from(list(PASSES)))
def test_every_pass_of_the_reference_agrees_with_the_oracle(case, name):
    x = bench.inputs(case, second=True)
    out = PASSES[name].build(CONTENDERS["reference"].make(case, x), x)()
    assert max(bench.errors(case, name, out, bench.oracle(case, x)).values()) < 1e-10


@pytest.mark.parametrize("name", PASSES)
def test_theria_is_measured_right(name):
    case = replace(TINY, D=16, Dv=16, causal=True)
    x = bench.inputs(case, second=name in SECOND)
    out = PASSES[name].build(CONTENDERS["theria"].make(case, x), x)()
    assert max(bench.errors(case, name, out, bench.oracle(case, x)).values()) < 1e-5


def test_inputs_are_random_and_repeatable():
    a, b, c = (bench.inputs(TINY, seed=s) for s in (0, 0, 1))
    assert torch.equal(a["q"], b["q"]) and not torch.equal(a["q"], c["q"]) and not torch.equal(a["q"], a["k"]) and a["q"].std() > .5


# The clock

class Clock(Stopwatch):
    "Every contender takes as long as it says, and the order is noted."
    def __init__(self): super().__init__(); self.order = []
    def __call__(self, run): self.order.append(run); return run()


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(.01, 400.), min_size=1), st.floats(1., 100.))
def test_contenders_take_turns_and_get_the_same_time(costs, ms):
    clock, entered = Clock(), []
    def context(n):
        entered.append(n)
        return bench.nullcontext()
    runs = {n: partial(float, c) for n, c in costs.items()}
    times = bench.interleave(runs, ms, clock, {n: partial(context, n) for n in runs}, most=200)
    assert all(set(t) == {costs[n]} for n, t in times.items()) and entered[:len(runs)] == list(runs)
    rounds = 3 if sum(costs.values()) > 500 else 5
    for n, t in times.items():
        assert len(t) % rounds == 0 and rounds <= len(t) <= 200
        if rounds < len(t) < 200//rounds*rounds: assert abs(len(t)*costs[n] - ms) <= rounds*costs[n]/2 + 1e-6
    first_turns = [clock.order.index(r, sum(1 if costs[n] > 100 else 3 for n in runs)) for r in runs.values()]
    assert first_turns == sorted(first_turns)


@given(st.lists(st.floats(0, 1e3), min_size=1))
def test_quantiles_are_ordered_and_inside(times):
    q = bench.quantiles(times)
    assert min(times) <= q["p20"] <= q["p50"] <= q["p80"] <= max(times) or len(set(times)) == 1


def test_the_clock_of_a_cpu_is_the_wall():
    import time
    watch = Stopwatch("cpu")
    assert 4 < watch.read(watch(lambda: time.sleep(.005))) < 500


# Failures

def boom(*a): raise RuntimeError("first line of /usr/lib/secret/thing.cpp:17\nsecond line")
def hungry(*a): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 88.00 GiB")


def test_failures_are_rows_and_spoil_nothing(tmp_path, contender):
    contender("boom", boom), contender("hungry", hungry)
    contender("nan", lambda q, k, v: F.scaled_dot_product_attention(q, k, v)*float("nan"))
    contender("detached", lambda q, k, v: F.scaled_dot_product_attention(q, k, v).detach())
    contender("rough", lambda q, k, v: F.scaled_dot_product_attention(q, k, v)*1.01)
    b = Bench(record(tmp_path), ms=1.)
    b.measure(Work(TINY, ("backward",), ("boom", "hungry", "nan", "detached", "rough", "math")))
    rows = by(b.record.rows())
    failure = {c: r["failure"] for c, r in rows.items()}
    assert failure["boom"] == "RuntimeError: first line of thing.cpp:17" and failure["hungry"].startswith("OutOfMemoryError: CUDA out of memory")
    assert failure["nan"].startswith("ArithmeticError: wrong result, relative error nan of dq") and failure["detached"].startswith("RuntimeError: element 0 of tensors")
    assert failure["rough"] is None and .001 < rows["rough"]["error"] < .1 and rows["math"]["p50"] > 0
    for c in ("boom", "hungry", "nan", "detached"): assert rows[c]["p50"] is None and rows[c]["tflops"] is None and rows[c]["calls"] == 0


def test_a_cell_says_that_memory_ran_out():
    rows = [made_up(TINY, "forward", "theria", 1.), made_up(TINY, "forward", "math", None), made_up(TINY, "forward", "flash", None)]
    rows[1]["failure"] = "OutOfMemoryError: CUDA out of memory. Tried to allocate 88.00 GiB"
    line = bench.comparison(rows, "forward").rows[0]
    assert (line["math"], line["flash"], line["faster"]) == ("out of memory", "failed", None)


def test_names_of_kernels_are_told_apart_by_the_spacer():
    space, events = ("void at::native::frac_kernel_cuda(...)", 1.), [("a", 2.), ("b", 3.), ("Memcpy DtoD", 9.)]
    assert bench.split_names([("before", 1.), space, *events, space, space, ("a", 1.)], 3) == [dict(b=3., a=2.), {}, dict(a=1.)]
    assert bench.split_names([space, *events], 2) is None


def test_speedups_need_both_sides():
    rows = [made_up(Case(1, 8, n, n, 64), p, c, t) for n, t in ((8192, 1.), (16384, 2.)) for p in ("jvp", "hvp") for c, t in (("theria", t), ("math", None if n == 16384 else 9*t))]
    assert bench.speedups(rows, grid="second-order", D=64) == {"jvp": [(8192, 9.)], "hvp": [(8192, 9.)]}
    assert bench.speedups(rows, grid="sdpa") == {} and "hvp" in bench.speedup_figure(rows, D=64)


def test_files_are_merged_row_by_row(tmp_path):
    for n, (source, ms) in enumerate((("a", 1.), ("b", 2.))):
        r = Record(tmp_path/f"{n}.json", dict(device="GPU", torch="2", triton="3", precision="highest", source=source))
        for contender in ("theria", "math")[n:]:
            row = made_up(TINY, "forward", contender, ms)
            split = [k for k in row if k in {"part", "pass", "mode", "contender", *asdict(TINY)}]
            r.add({k: row[k] for k in split}, {k: v for k, v in row.items() if k not in split})
    merged = bench.merge_files(tmp_path/"all.json", [tmp_path/"0.json", tmp_path/"1.json"])
    assert [(r["contender"], r["p50"], r["source"]) for r in merged.rows(every_run=True)] == [("theria", 1., "a"), ("math", 2., "b")]
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["0.json", "1.json", "all.json"]


def test_what_does_not_fit_together_is_timed_apart(tmp_path, monkeypatch):
    interleave = bench.interleave
    def cramped(runs, *a, **kw): return hungry() if len(runs) > 1 else interleave(runs, *a, **kw)
    monkeypatch.setattr(bench, "interleave", cramped)
    b = Bench(record(tmp_path), ms=1.)
    b.measure(Work(TINY, ("forward",), ("math", "sdpa")))
    assert [r["failure"] for r in b.record.rows()] == [None, None] and all(r["p50"] > 0 for r in b.record.rows())


def test_a_lost_device_ends_the_run_and_the_next_one_gets_past_it(tmp_path, contender, monkeypatch):
    contender("killer", boom)
    def lost(f, device):
        try: return f(), None
        except RuntimeError as e: raise DeviceLost(f"the GPU stopped answering after {bench.reason(e)}") from e
    work = Work(TINY, ("forward",), ("sdpa", "killer", "math"))
    with monkeypatch.context() as m:
        m.setattr(bench, "attempt", lost)
        with pytest.raises(DeviceLost): Bench(record(tmp_path), ms=1.).measure(work)
    assert [r["contender"] for r in record(tmp_path).rows()] == ["killer"]
    b = Bench(record(tmp_path), ms=1.)
    b.measure(work)
    rows = by(b.record.rows())
    assert not b.missing(work) and rows["math"]["p50"] > 0 and rows["killer"]["failure"]


def test_a_device_that_does_not_answer_is_noticed():
    if torch.cuda.is_available(): assert bench.attempt(boom, "cuda")[1].startswith("RuntimeError")
    else:
        with pytest.raises(DeviceLost, match="after RuntimeError: first line"): bench.attempt(boom, "cuda")   # no CUDA here, so synchronizing fails


# Resuming

def test_only_what_is_missing_is_measured(tmp_path, contender):
    calls = []
    def counting(q, k, v):
        calls.append(1)
        return F.scaled_dot_product_attention(q, k, v)
    contender("counting", counting)
    plan = [Work(TINY, ("forward",), ("counting",)), Work(replace(TINY, causal=True), ("forward",), ("math",))]
    assert bench.work_through(Bench(record(tmp_path), ms=1.), plan, progress=False) == 0
    seen = len(calls)
    b = Bench(record(tmp_path), ms=1.)
    assert bench.work_through(b, plan, progress=False) == 0 and len(calls) == seen > 0
    wider = [plan[0]._replace(contenders=("counting", "math")), plan[1]]
    assert [len(b.missing(w)) for w in wider] == [1, 0]
    assert bench.work_through(b, wider, progress=False) == 0 and len(calls) > seen    # in turns with the new one, so measured again
    assert len(Bench(record(tmp_path, source="another"), ms=1.).missing(plan[0])) == 1


def test_an_interruption_keeps_what_is_finished(tmp_path, contender):
    def stop(q, k, v): raise KeyboardInterrupt
    contender("stop", stop)
    plan = [Work(TINY, ("forward",), ("sdpa",)), Work(replace(TINY, causal=True), ("forward",), ("stop",))]
    with pytest.raises(KeyboardInterrupt, match="finished rows are kept in .*run the same command again"):
        bench.run_plan("sdpa", plan, tmp_path, torch.device("cpu"), ms=1., show=False)
    rows = from_json((tmp_path/"bench-sdpa.json").read_text())
    assert [r["key"].get("contender") for r in rows["rows"]] == [None, "sdpa"]
    p = next(iter(rows["sessions"].values()))
    assert {"device_name", "torch", "triton", "commit", "command", "source"} <= set(p["provenance"]) and {"device", "source", "convention", "ms"} <= set(p["run"])


def test_nothing_new_begins_after_the_limit(tmp_path):
    b = Bench(record(tmp_path), ms=1.)
    assert bench.work_through(b, [Work(TINY, ("forward",), ("math",))], seconds=-1, progress=False) == 1 and len(b.record) == 0


def test_processes_that_compile_ahead_say_what_fails():
    said, case = [], replace(TINY, Lq=4, Lk=4)
    bench.call_ahead([(case, "forward", "reference"), (case, "forward", "efficient")], "cpu", 2, said.append)
    assert len(said) == 1 and said[0].startswith("Compiling efficient ahead for forward of B1 H2 N4 D8 failed: RuntimeError")


# Plans

@pytest.mark.parametrize("plan", [bench.plan_sdpa, bench.plan_second_order])
def test_plans_grow_and_name_no_case_twice(plan):
    sizes = []
    for preset in ("small", "medium", "large", "paper"):
        work = plan(preset, "float16")
        cases = [w.case for w in work]
        assert len(set(cases)) == len(cases) and {c.dtype for c in cases} == {"float16"}
        assert all(set(w.passes) <= set(PASSES) and set(w.contenders) <= set(CONTENDERS) for w in work)
        sizes.append(len(work))
    assert sizes == sorted(sizes)


def test_the_medium_plan_has_the_anchors_and_the_named_shapes():
    plan = {str(w.case): w for w in bench.plan_sdpa("medium")}
    for D in (64, 128):
        for causal in ("", " causal"): assert set(plan[f"B4 H16 N4096 D{D}{causal}"].contenders) == {"theria", "flash", "cudnn", "efficient", "flex", "math"}
    assert {"B1 H8 11000×10000 D64", "B1 H8 205000×200000 D64", "B16 H8 564×64 D64"} <= set(plan)
    second = {str(w.case): w for w in bench.plan_second_order("medium")}
    assert {"B4 H8 N2048 D64", "B1 H8 N16384 D64", "B1 H8 N16384 D128", "B8 H8 N128 D64", "B1 H16 1024×9216 D64 window8192"} <= set(second)
    assert second["B4 H8 N512 D64"].modes == ("eager", "graph") and set(second["B4 H8 N512 D64"].passes) == set(SECOND)
    paper = {str(w.case) for w in bench.plan_second_order("paper")}
    assert {f"B2 H12 N{2**i} D64" for i in range(5, 12)} | {"B1 H32 N8192 D64", "B1 H1 N8192 D64", "B1 H1 N131072 D64", "B4 H8 N32 D128 causal", "B1 H8 N65536 D64"} <= paper


def test_compiling_ahead_needs_few_calls_for_many_cases():
    jobs = bench.compile_ahead(bench.plan_sdpa("medium"))
    assert 0 < len([j for j in jobs if j[2] == "theria"]) <= 16 and {j[2] for j in jobs} == {"theria", "flex"}
    assert len(bench.compile_ahead(bench.plan_second_order("medium"))) < 2*len(bench.plan_second_order("medium"))


# Tables and figures

def made_up(case, name, contender, p50, **facts):
    row = bench._row(case, name, contender, dict(memory=2**30, error=1e-3, errors={}) | facts, p50 and [p50]*3, None if p50 else "failed", EXECUTED.get(contender, {}).get(name))
    return {"part": "time", **asdict(case), "pass": name, "mode": "eager", "contender": contender, **row}


def test_a_comparison_has_the_best_of_the_others_beside_theria():
    case = Case(4, 16, 4096, 4096, 64)
    rows = [made_up(case, "backward", "theria", 2., memory=2**20, error=2e-3), made_up(case, "backward", "cudnn", 1.), made_up(case, "backward", "math", 9., error=1e-4),
            made_up(replace(case, causal=True), "backward", "cudnn", 3.)]
    first, second = bench.comparison(rows, "backward", ceiling=800.).rows
    assert (first["faster"], first["memory"], first["theirs"], first["error"], first["their_error"]) == (.5, 1., 1024., 2e-3, 1e-4)
    assert first["share"] == f"{100*bench.tflops(case, 5, 2.)/800:.0f}\u202f%" and first["executed"] == bench.tflops(case, 7, 2.)
    assert "theria" in second and second["theria"] == "" and second["faster"] is None and second["cudnn"].startswith("3.00 (")


def test_figures_show_every_contender_and_ceiling():
    rows = [made_up(Case(1, 16, n, n, 64), "forward", c, n/1e4, memory=n*1000) for n in (512, 1024, 2048) for c in CONTENDERS]
    time, rate, memory = (bench.length_figure(rows, "forward", what, D=64, causal=False) for what in ("p50", "tflops", "memory"))
    for picture in (time, rate, memory, bench.roofline(rows, "forward", 800., 4.)): assert all(c in picture for c in CONTENDERS)
    assert "TFLOP/s" in rate and "peak memory" in memory and bench.select(rows, "forward", D=128) == []
    looks = [tuple(sorted(bench.LOOK[c].items())) for c in ("theria", "flash", "cudnn", "efficient", "math", "flex")]
    assert len(set(looks)) == len(looks)


# Searching

@pytest.mark.parametrize("op", bench.FOOTPRINT)
def test_a_search_space_has_pinned_winners_and_nothing_that_cannot_fit(op):
    for D, itemsize in ((16, 2), (64, 2), (128, 2), (256, 2), (64, 4), (128, 4), (256, 4)):
        space = bench.search_space(op, D, itemsize)
        assert 3 < len(space) < 100 and len(set(space)) == len(space)
        other = [c.BM if op.endswith("_kv") else c.BN for c in space]
        assert all(bench.FOOTPRINT[op][2]*n*D*itemsize*c.stages <= 232_448 for n, c in zip(other, space))


class Scripted(Stopwatch):
    "A clock that knows how long each configuration takes, and runs it all the same."
    def __init__(self, ms, device="cpu"): super().__init__(device); self.ms, self.seen = ms, []
    def __call__(self, run):
        run()
        self.seen.append(run.args[3])
        return self.ms(run.args[3])


@pytest.mark.parametrize("op", ["forward", "backward_kv", "double_q"])
def test_a_search_under_a_scripted_clock(tmp_path, op):
    case, fast = Case(1, 1, 20, 20, 16, "float32"), Config(32, 16, 4, 1)
    b = Bench(record(tmp_path), ms=1.)
    b.watch = Scripted(lambda c: .5 if c == fast else 1.)
    won = bench.search(b, op, case, configs=[Config(16, 16, 4, 1), fast])
    assert won["config"] == list(fast) and won["p50"] == .5 and won["right"] == won["tried"] >= 2 and set(b.watch.seen) >= {fast, Config(16, 16, 4, 1)}
    assert all(r["failure"] is None and set(r["errors"]) and max(r["errors"].values()) < 1e-5 for r in b.record.rows(part="tune"))
    bench.merge_table(tmp_path/"t.json", "sm_90", [won])
    assert json.loads((tmp_path/"t.json").read_text()) == {"sm_90": {op: {"float32 D16 short": list(fast)}}}


def test_the_pinned_configuration_stays_unless_another_is_faster_by_a_hundredth(tmp_path):
    case, other = Case(1, 1, 20, 20, 16, "float32"), Config(16, 16, 4, 1)
    for factor, stays in ((.995, True), (.98, False)):
        b = Bench(Record(tmp_path/f"{factor}.json"), ms=1.)
        b.watch = Scripted(lambda c: factor if c == other else 1.)
        won = bench.search(b, "forward", case, configs=[other])
        assert (won["config"] == won["pinned"]) == stays and (won["config"] == list(other)) != stays


def test_a_whole_tuning_run_is_kept_and_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "environment", lambda *a: dict(benchmark="tune"))
    monkeypatch.setattr(bench, "Stopwatch", partial(Scripted, lambda c: float(c.BM)))
    cases, configs = [Case(1, 1, 20, 20, 16, "float32")], [Config(16, 16, 4, 1), Config(32, 16, 4, 1)]
    run = partial(bench.run_tune, ("jvp",), cases, tmp_path, torch.device("cpu"), ms=1., table=tmp_path/"t.json", show=False, configs=configs)
    assert run(seconds=-1) == [] and not (tmp_path/"t.json").exists()
    found = run()
    stamp = (tmp_path/"bench-tune.json").stat().st_mtime_ns
    assert [(r["op"], r["config"]) for r in found] == [("jvp", [16, 16, 4, 1])]
    assert run() == found and (tmp_path/"bench-tune.json").stat().st_mtime_ns == stamp
    assert set(json.loads((tmp_path/"t.json").read_text())["interpreter"]) == {"jvp"}


def test_a_wrong_candidate_never_wins(tmp_path, monkeypatch):
    case, host_call = Case(1, 1, 5, 5, 16, "float32"), bench.host_call
    def spoiled(case, op, y, config=None):
        out = host_call(case, op, y, config)
        if config == Config(16, 32, 4, 1): out["o"].mul_(1.001)
        return out
    monkeypatch.setattr(bench, "host_call", spoiled)
    b = Bench(record(tmp_path), ms=1.)
    won = bench.search(b, "forward", case, configs=[Config(16, 32, 4, 1), Config(16, 16, 4, 1)])
    rows = {tuple(r[f] for f in Config._fields): r["failure"] for r in b.record.rows(part="tune")}
    assert rows[16, 32, 4, 1].startswith("ArithmeticError: wrong result") and won["config"] != [16, 32, 4, 1] and won["right"] == won["tried"] - 1


def test_a_search_without_a_right_candidate_says_so_and_leaves_the_table_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "bounds", lambda case, op, x, exact: {"o": 0.})
    b, case = Bench(record(tmp_path), ms=1.), Case(1, 1, 5, 5, 16, "float32")
    won = bench.search(b, "forward", case, configs=[Config(16, 16, 4, 1)])
    assert (won["config"], won["p50"], won["right"], won["tried"]) == (None, None, 0, 2)
    bench.merge_table(tmp_path/"t.json", "sm_90", [won])
    assert json.loads((tmp_path/"t.json").read_text()) == {} and bench.winners_table([won]).rows[0]["config"] == "none is right"


def test_what_the_compiler_refuses_is_not_called(tmp_path, monkeypatch):
    case, called, host_call = Case(1, 1, 5, 5, 16, "float32"), [], bench.host_call
    def watched(case, op, y, config=None):
        called.append(config)
        return host_call(case, op, y, config)
    monkeypatch.setattr(bench, "host_call", watched)
    refuse = lambda configs: [(None, "OutOfResources: out of resource: shared memory") if c.BM == 64 else (dict(shared=1, registers=2, spills=0), None) for c in configs]
    b = Bench(record(tmp_path), ms=1.)
    won = bench.search(b, "forward", case, refuse, [Config(64, 16, 4, 1), Config(16, 16, 4, 1)])
    assert won["config"] == [16, 16, 4, 1] and {c.BM for c in called if c} == {16}
    assert {r["BM"]: r["spills"] for r in b.record.rows(part="tune")} == {64: None, 16: 0}


def test_the_table_stays_readable(tmp_path):
    path = bench.pinned_table(str(tmp_path/"configs.json"))
    before = json.loads(path.read_text())
    assert json.loads(bench.table_text(before)) == before
    case = Case(1, 1, 4096, 4096, 256, "float16", causal=True)
    bench.merge_table(path, "sm_90", [dict(asdict(case), op="forward", config=[16, 16, 4, 1])])
    after = json.loads(path.read_text())
    assert after["sm_90"]["forward"].pop("float16 D256 causal") == [16, 16, 4, 1] and after == before
    names = re.findall(r'^   "(.+?)": \[\d+, \d+, \d+, \d+\],?$', path.read_text(), re.M)
    assert "float16 D256 causal" in names and names.index("bfloat16 D64") < names.index("bfloat16 D128")


# The commands

@pytest.fixture
def call(capsys):
    def call(*argv):
        with pytest.raises(SystemExit) as e: cli.main(["bench", *map(str, argv)])
        return e.value.code, *capsys.readouterr()
    return call


SMALL = ["--device", "cpu", "--preset", "small", "--lengths", "8", "--dims", "8", "--causal", "no", "--heads", "1", "--tokens", "8", "--dtype", "float32", "--ms", "1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("command", ["sdpa", "second-order", "tune"])
def test_without_a_gpu_one_sentence_says_what_is_needed(call, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(command)
    assert (code, out) == (2, "") and re.fullmatch(r"theria bench: got a machine without a CUDA device; accepted is .+: .+\.\n", err) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["sdpaa"], ["sdpa", "--dtype", "float61"], ["sdpa", "--lengths", "512,0"], ["sdpa", "--passes", "sideways", *SMALL], ["sdpa", "--only", "N7", *SMALL],
                                  ["sdpa", "--contenders", "cudnn", *SMALL], ["second-order", "--modes", "fast"], ["sdpa", "--preset", "huge"], ["show", "no.json"], ["sdpa", "--ms", "0"],
                                  ["tune", "sideways", "--device", "cpu"], ["tune", "--table", "no/such/folder/t.json", "--device", "cpu"]], ids=" ".join)
def test_a_bad_value_is_one_sentence(call, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*argv)
    assert (code, out) == (2, "") and re.fullmatch(r"theria bench: got .+; accepted .+: .+\.\n", err) and not list(tmp_path.glob("**/*.json"))


def test_names_in_the_help_are_those_of_the_package(call):
    assert set(bench.SDPA_PRESETS) == set(bench.SECOND_PRESETS) == {"small", "medium", "large", "paper"}
    for command in ("sdpa", "second-order", "tune", "show"): assert call(command, "--help")[0] == 0
    assert all(c in call()[1] for c in ("sdpa", "second-order", "tune", "show"))


def test_a_plan_is_printed_anywhere(call):
    code, out, err = call("sdpa", "--plan", "--dtype", "float16,bfloat16", "--only", "11000x10000")
    assert (code, err) == (0, "") and len(out.splitlines()) == 2 and out.startswith("B1 H8 11000×10000 D64, float16: forward, backward, forward+backward by theria, flash, cudnn")


def test_a_run_on_the_cpu_is_kept_shown_and_not_repeated(call, tmp_path):
    code, out, err = call("sdpa", *SMALL, "--contenders", "reference,sdpa", "--out", tmp_path)
    path = tmp_path/"bench-sdpa.json"
    assert code == 0 and "forward+backward in float32, called from Python" in out and "Result file: " in out and "Traceback" not in err
    before, rows = path.stat().st_mtime_ns, [r for r in from_json(path.read_text())["rows"] if r["key"]["part"] == "time"]
    assert len(rows) == len(FIRST)*2 and all(r["value"]["failure"] is None for r in rows)
    assert call("sdpa", *SMALL, "--contenders", "reference,sdpa", "--out", tmp_path)[0] == 0 and path.stat().st_mtime_ns == before
    code, shown, err = call("show", path)
    assert (code, err) == (0, "") and shown.count("B1 H1 N8 D8") == len(FIRST)
    assert call("second-order", *SMALL, "--passes", "hvp", "--out", tmp_path)[0] == 0 and (tmp_path/"bench-second-order.json").exists()


def test_showing_a_foreign_file_leaves_it_alone(call, tmp_path):
    (tmp_path/"mine.json").write_text("{}")
    code, out, err = call("show", tmp_path/"mine.json")
    assert (code, out) == (2, "") and "not in the format" in err and [p.name for p in tmp_path.iterdir()] == ["mine.json"]


def test_the_script_runs_from_a_bare_checkout_as_it_is_typed(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, str(ROOT/"scripts"/"bench_sdpa.py"), "--preset", "medium", "--dtype", "float16"]
    p = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert p.returncode == 2 and p.stderr.startswith("theria bench: got a machine without a CUDA device") and p.stderr.count("\n") == 1
    p = subprocess.run([*argv, "--plan"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert p.returncode == 0 and p.stdout.startswith("B4 H16 N4096 D64, float16: forward, backward, forward+backward by theria, flash, cudnn, efficient, flex, math")


# On a GPU

@pytest.mark.gpu
def test_gpu_times_are_those_of_tritons_own_harness():
    from triton.testing import do_bench
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    run = lambda: a @ a
    ours = bench.quantiles(bench.interleave({"": run}, 100, Stopwatch("cuda"))[""])["p50"]
    assert abs(ours/do_bench(run, quantiles=[.5]) - 1) < .1


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_contenders_are_the_kernels_they_are_called(tmp_path):
    device = torch.device("cuda")
    b = Bench(Record(tmp_path/"r.json", device="cuda"), device, ms=2.)
    plan = [Work(Case(1, 4, 512, 512, 64), FIRST, ("theria", "flash", "cudnn", "efficient", "flex", "math"))]
    assert bench.work_through(b, plan, progress=False) == 0
    rows = b.record.rows(part="time")
    assert [r["contender"] for r in rows if r["failure"]] == [] and all(r["memory"] > 0 and r["error"] < .02 for r in rows)
    bench.name_kernels(b, plan)
    names = {r["contender"]: " ".join(r["kernels"]) for r in b.record.rows(part="kernels", **{"pass": "forward"})}
    for c, word in (("theria", "_forward"), ("flash", "flash"), ("cudnn", "cudnn"), ("efficient", "fmha"), ("flex", "triton")): assert word in names[c].lower()


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_second_order_is_measured_from_python_and_as_a_graph(tmp_path):
    b = Bench(Record(tmp_path/"r.json", device="cuda"), torch.device("cuda"), ms=2.)
    b.measure(Work(Case(2, 4, 256, 256, 64), SECOND, ("theria", "math"), ("eager", "graph")))
    rows = b.record.rows()
    assert len(rows) == len(SECOND)*2*2 and [(r["contender"], r["pass"], r["mode"], r["failure"]) for r in rows if r["failure"]] == []
    time = {(r["contender"], r["pass"], r["mode"]): r["p50"] for r in rows}
    assert time["theria", "forward+backward+double-backward", "graph"] < time["theria", "forward+backward+double-backward", "eager"]


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_search_finds_a_right_configuration(tmp_path):
    configs = [Config(64, 64, 4, 2), Config(128, 64, 8, 3)]
    found = bench.run_tune(("forward", "tangent_kv"), [Case(2, 4, 512, 512, 64)], tmp_path, torch.device("cuda"), ms=2., processes=2, table=bench.pinned_table(str(tmp_path/"t.json")),
                           show=False, configs=configs)
    assert [r["op"] for r in found] == ["forward", "tangent_kv"] and all(r["p50"] > 0 for r in found)
    tried = Record(tmp_path/"bench-tune.json").rows(every_run=True, part="tune")
    assert any(r["registers"] and r["shared"] for r in tried)


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_uses_of_the_second_order_agree_with_the_math_path(tmp_path):
    from theria.uses import run_uses
    rows = run_uses(tmp_path, ms=2., lengths={"penalty": (256,), "curvature": (256,), "forces": (64,)}, d_model=128, n_heads=2).rows()
    assert len(rows) == 6 and [r["failure"] for r in rows] == [None]*6 and all(r["p50"] > 0 and r["memory"] > 0 for r in rows)
    for part, what in (("penalty", "loss"), ("curvature", "eigenvalue"), ("forces", "loss")):
        ours, theirs = ([r[what] for r in rows if (r["part"], r["attention"]) == (part, a)][0] for a in ("theria", "math"))
        assert abs(ours - theirs) <= .05*abs(theirs) + 1e-3, (part, ours, theirs)  # bf16 on both sides
