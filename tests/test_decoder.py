"The training example: what it learns, what it cannot learn, and the commands as they are typed."
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from theria.attention.contract import ContractError
from theria.decoder import DecoderTransformer, gradient_norms, main, pick_device, random_task, shapes, synthetic_task, train_decoder

ROOT = Path(__file__).parent.parent
SCRIPT = "examples/minimal_decoder_transformer.py"
LINE = re.compile(r"Step +(\d+) \| Loss: (\d+\.\d{4})")


def run_script(*argv, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run([sys.executable, SCRIPT, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def test_the_synthetic_task_is_learned_by_the_command():
    done = run_script("--use-synthetic-task", "--steps", "200", "--seed", "42")
    steps, losses = zip(*((int(step), float(loss)) for step, loss in LINE.findall(done.stdout)))
    assert done.returncode == 0 and done.stderr == ""
    assert steps == (0, 50, 100, 150, 199)
    assert 1.4 < losses[0] < 1.8 and losses[-1] < 0.05
    decrease, percent = re.search(r"^Loss decrease: (\S+) \((\S+)%\)$", done.stdout, re.M).groups()
    assert float(decrease) == pytest.approx(losses[0] - losses[-1], abs=2e-4)
    assert float(percent) == pytest.approx(100*float(decrease)/losses[0], abs=0.1)


@pytest.mark.parametrize("seed, is_causal", [(0, False), (1, True)])
def test_the_synthetic_task_is_learned_from_other_seeds(seed, is_causal):
    assert max(train_decoder("synthetic", steps=200, seed=seed, device="cpu", is_causal=is_causal).losses[-20:]) < 0.05


def test_the_random_task_is_not_learned(capsys):
    main(["--steps", "200", "--seed", "42", "--device", "cpu"])
    losses = [float(loss) for _, loss in LINE.findall(capsys.readouterr().out)]
    assert len(losses) == 5 and min(losses) > 1.4
    tail = train_decoder("random", steps=120, seed=1, device="cpu").losses[-60:]
    assert math.log(5) - 0.03 < sum(tail)/len(tail) < 1.75  # the standard error of this mean is below 0.01


def test_runs_repeat_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    a, b, c = (train_decoder("synthetic", steps=4, seed=seed, device="cpu").losses for seed in (5, 5, 6))
    assert a == b and a != c
    assert torch.equal(torch.get_rng_state(), state)


def test_backends_and_callables_give_the_same_run():
    runs = [train_decoder("synthetic", steps=10, device="cpu", backend=backend) for backend in ("auto", "reference", "sdpa", F.scaled_dot_product_attention)]
    assert [run.backend for run in runs] == ["reference", "reference", "sdpa", "scaled_dot_product_attention"]
    for run in runs[1:]: assert run.losses == pytest.approx(runs[0].losses, rel=1e-4)


def test_callback_sees_every_step_with_gradients():
    seen = []
    run = train_decoder(steps=3, device="cpu", callback=lambda step, loss, model: seen.append((step, loss, gradient_norms(model))))
    assert [(step, loss) for step, loss, _ in seen] == list(enumerate(run.losses))
    assert all(norm is not None and norm > 1e-4 for _, _, norms in seen for norm in norms.values())
    assert run.decrease == run.losses[0] - run.losses[-1] and run.device == torch.device("cpu")


def test_training_updates_every_parameter():
    one, two = (train_decoder("synthetic", steps=steps, device="cpu", length=8, batch=64).model for steps in (1, 2))
    # the first of two steps ends where the single step ends, so what differs is the second update
    assert all(not torch.equal(p, q) for (name, p), q in zip(one.named_parameters(), two.parameters()) if not name.endswith("k_proj.bias"))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32))
def test_tasks(batch, length, seed):
    tokens, labels = synthetic_task(batch, length, torch.Generator().manual_seed(seed))
    signal = tokens >= 95
    assert tokens.shape == (batch, length) and tokens.min() >= 0 and tokens.max() < 100
    assert (signal.sum(1) == 1).all() and torch.equal(tokens[signal] - 95, labels)
    tokens, labels = random_task(batch, length, torch.Generator().manual_seed(seed))
    assert tokens.shape == (batch, length) and 0 <= tokens.min() and tokens.max() < 100 and 0 <= labels.min() and labels.max() < 5


@pytest.mark.parametrize("is_causal", [False, True])
def test_logits_depend_on_every_token(is_causal):
    torch.manual_seed(0)
    model, tokens = DecoderTransformer(is_causal=is_causal), torch.randint(100, (1, 16))
    logits = model(tokens)
    for i in range(16):
        changed = tokens.clone()
        changed[0, i] = (changed[0, i] + 1) % 100
        assert not torch.equal(model(changed), logits)


def test_shapes_are_those_of_the_call_and_leave_the_model_as_it_was():
    model, tokens = DecoderTransformer(n_heads=2), torch.randint(100, (3, 9))
    attend = [block.attention.attend for block in model.blocks]
    rows = {name: (shape, contiguous) for name, shape, contiguous in shapes(model, tokens)}
    assert rows["blocks.1.attention k"] == ((3, 2, 9, 32), False) and rows["head"] == ((3, 5), True)
    assert [block.attention.attend for block in model.blocks] == attend
    assert not any(m._forward_hooks for m in model.modules())


def test_a_detached_attention_is_seen_by_the_gradient_norms():
    detached = lambda q, k, v: F.scaled_dot_product_attention(q, k, v).detach()
    seen = []
    train_decoder(steps=1, device="cpu", backend=detached, callback=lambda step, loss, model: seen.append(gradient_norms(model)))
    assert [name for name, norm in seen[0].items() if norm is None] == ["blocks.0.attention", "blocks.1.attention"]


@pytest.mark.parametrize("argv", [(), ("--d_model", "128", "--n_heads", "1"), ("--d_model", "320", "--n_heads", "1"), ("--verbose",), ("--backend", "sdpa")])
def test_calls_that_work(argv, capsys):
    main([*argv, "--steps", "2", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert [int(step) for step, _ in LINE.findall(out)] == [0, 1] and out.splitlines()[-1].startswith("Loss decrease: ") and err == ""
    assert ("strided view" in out and "gradient norms: tokens" in out) == ("--verbose" in argv)


@pytest.mark.parametrize("argv, starts", [
    (["--d_model", "64", "--n_heads", "5"], "got d_model=64 and n_heads=5"),
    (["--n_heads", "0"], "got n_heads=0"),
    (["--d_model", "-64"], "got d_model=-64"),
    (["--steps", "0"], "got steps=0"),
    (["--steps", "many"], "Invalid value for '--steps'"),
    (["--seed", "-1"], "got seed=-1"),
    (["--seed", str(2**63)], "got seed=9223372036854775808"),
    (["--backend", "flash"], "got backend='flash'"),
    (["--device", "tpu"], "got device='tpu'"),
    (["--device", "meta"], "got device='meta'"),
    (["--device", "cuda:-1"], "got device='cuda:-1'"),
    (["--device", "cuda:99"], "got device='cuda:99'"),
    (["--d-model", "64"], "No such option: --d-model"),
    (["extra"], "Got unexpected extra argument"),
])
def test_refusals_are_one_sentence_and_exit_code_2(argv, starts, capsys):
    with pytest.raises(SystemExit) as e: main(argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ""
    assert err.startswith(starts) and err.endswith(".\n") and err.count("\n") == 1


def test_an_interrupted_run_says_so(capsys, monkeypatch):
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr("theria.decoder.train_decoder", interrupt)
    with pytest.raises(SystemExit) as e: main([])
    assert e.value.code == 130 and capsys.readouterr().err == "interrupted.\n"


def test_python_refusals():
    for call, got in [(lambda: train_decoder("sorting"), "task='sorting'"), (lambda: train_decoder(batch=0), "batch=0"),
                      (lambda: train_decoder(n_layers=0), "n_layers=0"), (lambda: train_decoder(seed=1.5), "seed=1.5"),
                      (lambda: pick_device("gpu"), "device='gpu'"), (lambda: DecoderTransformer()(torch.zeros(1, 0, dtype=torch.long)), "sequences of 0 tokens")]:
        with pytest.raises(ContractError, match=re.escape(f"got {got}")): call()


def readme():
    "The commands of examples/README.md that work, those that are refused, and the sentences shown for the latter."
    work, refused = (ROOT/"examples"/"README.md").read_text(encoding="utf-8").split("### What is refused")
    calls = lambda text: [shlex.split(line, comments=True)[2:] for line in text.splitlines() if line.startswith(f"python {SCRIPT}")]
    return calls(work), calls(refused), [line for line in refused.splitlines() if line.startswith("got ")]


WORK, REFUSED, SENTENCES = readme()


@pytest.mark.parametrize("argv", [argv for argv in WORK if not set(argv) & {"triton_full_fused", "--help"}], ids=" ".join)
def test_commands_of_the_readme_work(argv, capsys):
    main([*argv, "--steps", "1", "--verbose"])
    assert re.search(r"^Loss decrease: 0\.0000 \(0\.0%\)$", capsys.readouterr().out, re.M)


def test_the_readme_shows_every_command():
    assert len(WORK) == 10 and len(REFUSED) == len(SENTENCES) == 4
    assert ["--use-synthetic-task", "--steps", "200", "--seed", "42"] in WORK and ["--verbose", "--steps", "5"] in WORK


@pytest.mark.parametrize("argv, sentence", list(zip(REFUSED, SENTENCES)), ids=[" ".join(argv) for argv in REFUSED])
def test_refusals_of_the_readme_on_a_machine_without_a_gpu(argv, sentence):
    done = run_script(*argv, TRITON_INTERPRET="0")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence + "\n")
