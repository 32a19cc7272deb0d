"Experiments are resumed row by row, failures stay in the table, and their results reach the report and the pages."
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from theria.attention.contract import ContractError
from theria.meta.experiments import EXPERIMENTS, Place, Step, device_tag, experiment_table, measure_step, result_file, results, run_experiments
from theria.meta.safety import run_contract
from theria.records import Record

STORED = Path(__file__).parent.parent/"nbs"/"results"
CPU = dict(device="cpu", backend="reference", progress=False)


def test_a_budget_ends_a_run_and_the_next_continues(tmp_path, monkeypatch):
    from theria.meta.safety import Unit, _work
    clock = iter(range(1000))
    monkeypatch.setattr("theria.meta.safety.time", SimpleNamespace(monotonic=lambda: next(clock)))
    record, units = Record(tmp_path/"r.json", {"preset": "quick"}), [Unit(dict(piece=i), 1., lambda tick: dict(x=1)) for i in range(7)]
    left = [len(_work(units, record, False, seconds=3.)) for _ in range(3)]
    assert left == [4, 1, 0] and [r["piece"] for r in record.rows()] == list(range(7))


def test_nothing_is_computed_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("theria.meta.experiments.source_hash", lambda: "this") # an edit of the package between the two runs would be another run
    run_experiments("bias", out=tmp_path, seconds=0., **CPU)
    assert not (tmp_path/"meta-bias-cpu.json").exists()
    record = run_experiments("robustness", out=tmp_path, **CPU)["robustness"]
    before = (tmp_path/"meta-robustness-cpu.json").read_text()
    assert len(record) == 12 and all(r["works"] for r in record.rows())
    assert len(run_experiments("robustness", out=tmp_path, **CPU)["robustness"]) == 12 and (tmp_path/"meta-robustness-cpu.json").read_text() == before


def test_every_plan_has_different_rows_that_start_with_both_attentions(tmp_path, monkeypatch):
    from theria.records import identity
    ahead = []
    monkeypatch.setattr("theria.meta.experiments.call_ahead", lambda jobs, device, processes: ahead.extend(jobs))
    for preset, device in (("quick", "cpu"), ("full", "cpu"), ("full", "cuda")):
        place = Place(preset, torch.device(device), "reference" if device == "cpu" else "triton_full_fused")
        for name, e in EXPERIMENTS.items():
            units = e.plan(place, tmp_path)
            assert len({identity(u.key) for u in units}) == len(units) > 2 and all(u.weight > 0 for u in units), name
            if device == "cpu": assert not ahead
    assert {(str(c.torch_dtype), c.D, c.window > 0) for c, _, _ in ahead} >= {("torch.bfloat16", 64, False), ("torch.bfloat16", 64, True), ("torch.float16", 128, False), ("torch.float32", 32, False)}
    first = [u.key for u in EXPERIMENTS["cost"].plan(Place("full", torch.device("cpu"), "reference"), tmp_path)][:2]
    assert [(k["estimator"], k["attention"], k["T"]) for k in first] == [("full", "theria", 256), ("full", "math", 256)]


def test_a_failure_is_a_row():
    def broken(q, k, v, **kw): raise RuntimeError("no such kernel at /somewhere/else")
    row = measure_step(Step(8, 1, 2, H=1, D=4, dtype="float32"), "full", broken, torch.device("cpu"))
    assert row["failure"].startswith("RuntimeError: no such kernel") and row["p50"] is None and "/somewhere" not in row["failure"]


@pytest.mark.parametrize("device,backend", [("cpu", "reference"), pytest.param("cuda", "triton_full_fused", marks=pytest.mark.gpu)])
def test_a_run_of_behavior_that_fails_is_a_row_and_the_next_goes_on(tmp_path, monkeypatch, device, backend):
    import theria.meta.experiments as experiments
    from theria.meta.safety import MamlRun
    tiny = dict(data="digits", steps=3, tasks=2, queries=2, test_tasks=4, n_layers=1, d_model=16, learn_lr=True)
    runs = [MamlRun(**tiny, inner_lr=1e30), *(MamlRun(**tiny, estimator=e) for e in ("full", "fo", "anil"))]
    monkeypatch.setattr(experiments, "_behavior_runs", lambda place: runs)
    rows = run_experiments("behavior", out=tmp_path, device=device, backend=backend, progress=False)["behavior"].rows()
    assert [r["estimator"] for r in rows[:4]] == ["full", "full", "fo", "anil"]
    assert "Diverged" in rows[0]["failure"] and rows[0]["score"] is None
    assert all(r["failure"] is None and len(r["history"]) == 3 and 0 <= r["score"] <= 1 for r in rows[1:4]) and not list(tmp_path.glob("*.state"))
    assert {n for n, a in rows[3]["rates"].items() if a != tiny.get("inner_lr", .2)} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("dtype,limit", [("float32", 1e-5), ("bfloat16", .2)])
def test_estimators_of_the_same_number_have_its_error(dtype, limit):
    for estimator in ("full", "mixed", "checkpointed"):
        row = measure_step(Step(8, 3, 2, H=1, D=8, dtype=dtype), estimator, "reference", torch.device("cpu"), ms=1.)
        assert row["failure"] is None and row["error"] < limit and math.isfinite(row["p50"])


def test_results_prefer_a_gpu_and_the_latest_row(tmp_path):
    for tag, score in (("cpu", 1), ("h200", 2), ("h200", 3)):
        Record(tmp_path/f"meta-bias-{tag}.json", dict(device=tag, source=str(score), preset="quick")).add({"K": 1}, {"error": score})
    assert result_file("bias", tmp_path).name == "meta-bias-h200.json" and result_file("bias", tmp_path, "cpu").name == "meta-bias-cpu.json"
    assert [r["error"] for r in results("bias", tmp_path)[0]] == [3]
    for preset, part, K in (("quick", "a", 1), ("quick", "b", 2), ("full", "b", 3)): Record(tmp_path/"meta-ttt-cpu.json", dict(device="cpu", source="x", preset=preset)).add(dict(part=part, K=K), {"error": 0.})
    assert [(r["preset"], r["part"], r["K"]) for r in results("ttt", tmp_path)[0]] == [("quick", "a", 1), ("full", "b", 3)]
    with pytest.raises(ContractError, match="--only cost"): results("cost", tmp_path)
    assert device_tag("NVIDIA H100 80GB HBM3", torch.device("cuda")) == "h100"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_stored_results_fill_their_table(name):
    rows = [r for path in STORED.glob(f"meta-{name}-*.json") for r in results(name, STORED, path.stem.rsplit("-", 1)[1])[0]]
    table = experiment_table(name, rows)
    assert len(table.rows) == len(rows) > 0 and all(any(r.get(c) not in (None, "") for r in table.rows) for c in table.columns if c not in ("failure", "memory", "launches", "busy", "mode", "error", "solver", "seconds_a_step"))  # memory and kernels are measured on a GPU only
    assert not any(isinstance(x, float) and math.isnan(x) for r in rows for x in r.values())


def test_the_report_takes_in_what_lies_beside_it(tmp_path):
    shutil.copy(STORED/"meta-bias-cpu.json", tmp_path)
    c = run_contract(out=tmp_path, tasks=2, depths=(1,), seeds=1, outer_steps=1, test_tasks=4, **CPU)
    text = c.report.read_text()
    assert EXPERIMENTS["bias"].question in text and "implicit, Neumann 5" in text and EXPERIMENTS["ttt"].question not in text
    assert "It treats the saved logsumexp as a constant" in text
