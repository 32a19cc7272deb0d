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


def test_nothing_is_computed_twice(tmp_path):
    run_experiments("bias", out=tmp_path, seconds=0., **CPU)
    assert not (tmp_path/"meta-bias-cpu.json").exists()
    record = run_experiments("robustness", out=tmp_path, **CPU)["robustness"]
    before = (tmp_path/"meta-robustness-cpu.json").read_text()
    assert len(record) == 12 and all(r["works"] for r in record.rows())
    assert len(run_experiments("robustness", out=tmp_path, **CPU)["robustness"]) == 12 and (tmp_path/"meta-robustness-cpu.json").read_text() == before


def test_every_plan_has_different_rows_that_start_with_both_attentions(tmp_path):
    from theria.records import identity
    for preset in ("quick", "full"):
        place = Place(preset, torch.device("cpu"), "reference")
        for name, e in EXPERIMENTS.items():
            units = e.plan(place, tmp_path)
            assert len({identity(u.key) for u in units}) == len(units) > 5 and all(u.weight > 0 for u in units), name
    first = [u.key for u in EXPERIMENTS["cost"].plan(Place("full", torch.device("cpu"), "reference"), tmp_path)][:2]
    assert [(k["estimator"], k["attention"], k["T"]) for k in first] == [("full", "theria", 256), ("full", "math", 256)]


def test_a_failure_is_a_row():
    def broken(q, k, v, **kw): raise RuntimeError("no such kernel at /somewhere/else")
    row = measure_step(Step(8, 1, 2, H=1, D=4, dtype="float32"), "full", broken, torch.device("cpu"))
    assert row["failure"].startswith("RuntimeError: no such kernel") and row["p50"] is None and "/somewhere" not in row["failure"]


@pytest.mark.parametrize("dtype,limit", [("float32", 1e-5), ("bfloat16", .2)])
def test_estimators_of_the_same_number_have_its_error(dtype, limit):
    for estimator in ("full", "mixed", "checkpointed"):
        row = measure_step(Step(8, 3, 2, H=1, D=8, dtype=dtype), estimator, "reference", torch.device("cpu"), ms=1.)
        assert row["failure"] is None and row["error"] < limit and math.isfinite(row["p50"])


def test_results_prefer_a_gpu_and_the_latest_row(tmp_path):
    for tag, score in (("cpu", 1), ("h200", 2), ("h200", 3)):
        Record(tmp_path/f"meta-bias-{tag}.json", dict(device=tag, source=score, preset="quick")).add({"K": 1}, {"error": score})
    assert result_file("bias", tmp_path).name == "meta-bias-h200.json" and result_file("bias", tmp_path, "cpu").name == "meta-bias-cpu.json"
    assert [r["error"] for r in results("bias", tmp_path)[0]] == [3]
    with pytest.raises(ContractError, match="--only cost"): results("cost", tmp_path)
    assert device_tag("NVIDIA H100 80GB HBM3", torch.device("cuda")) == "h100"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_stored_results_fill_their_table(name):
    rows, _ = results(name, STORED)
    table = experiment_table(name, rows)
    assert len(table.rows) == len(rows) > 0 and all(any(r.get(c) not in (None, "") for r in table.rows) for c in table.columns if c not in ("failure", "memory", "mode", "error", "solver", "seconds_a_step"))
    assert not any(isinstance(x, float) and math.isnan(x) for r in rows for x in r.values())


def test_the_report_takes_in_what_lies_beside_it(tmp_path):
    shutil.copy(STORED/"meta-bias-cpu.json", tmp_path)
    c = run_contract(out=tmp_path, tasks=2, depths=(1,), seeds=1, outer_steps=1, test_tasks=4, **CPU)
    text = c.report.read_text()
    assert EXPERIMENTS["bias"].question in text and "implicit, Neumann 5" in text and EXPERIMENTS["ttt"].question not in text
    assert "It treats the saved logsumexp as a constant" in text
