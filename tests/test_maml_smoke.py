"A meta-gradient exists for every estimator and every attention that can be differentiated twice, and an outer loop turns it into learning."
import pytest
import torch

from theria.meta.adapt import over_tasks, parameters, spread, task_loss
from theria.meta.episodes import glyphs, load_data
from theria.meta.gradients import ESTIMATORS, FULL, Protocol, evaluate, find_estimator, meta_gradient, meta_train
from theria.meta.learner import PatchTransformer, learner_for


find_estimator("cg") # imports those that are not of the first three
RULE = {e: dict(prox=30., lr=.01) if e in ("cg", "neumann") else {} for e in ESTIMATORS}
FIRST = ("full", "fo", "fo_strict")


def plain(q, k, v): return torch.softmax(q @ k.mT/q.shape[-1]**.5, -1) @ v


@pytest.mark.parametrize("attention", ["auto", "reference", plain], ids=["auto", "reference", "callable"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_for_every_parameter(estimator, attention):
    model = PatchTransformer(5, n_layers=1, backend=attention)
    e = glyphs().sample(5, 1, 2, torch.Generator().manual_seed(0))
    m = meta_gradient(estimator, task_loss(model), parameters(model), e.support, e.query, steps=2, **{"lr": .1} | RULE[estimator])
    assert m.grads.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert m.grads[name].shape == p.shape and m.grads[name].isfinite().all()
        if not name.endswith("k_proj.bias") and estimator != "reptile": assert m.grads[name].abs().max() > 0, name  # a softmax ignores a shift of its row
    assert m.loss.isfinite() and not m.loss.requires_grad and m.adapted.losses.shape == (2,) and m.adapted.unused == ()
    assert all(g.grad_fn is None for g in m.grads.values())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tasks_together_are_tasks_alone(estimator):
    model, e = PatchTransformer(3, n_layers=1).double(), glyphs().sample(3, 2, 2, torch.Generator().manual_seed(0), tasks=3).to(dtype=torch.float64)
    loss_fn, theta = task_loss(model), parameters(model)
    alone = [meta_gradient(estimator, loss_fn, theta, s, q, steps=3, **{"lr": .2} | RULE[estimator]) for s, q in zip(zip(*e.support), zip(*e.query))]
    for vectorize in (True, False):
        m = meta_gradient(estimator, over_tasks(loss_fn, vectorize), spread(theta, 3), e.support, e.query, steps=3, **{"lr": .2} | RULE[estimator])
        torch.testing.assert_close(m.loss, torch.stack([a.loss for a in alone]), rtol=1e-12, atol=0)
        for n in theta: torch.testing.assert_close(m.grads[n], torch.stack([a.grads[n] for a in alone]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", FIRST)
def test_outer_loop_learns(estimator):
    train, test, model = glyphs(), glyphs("test"), PatchTransformer(5, n_layers=1)
    start = evaluate(model, None, test, tasks=100)
    run = meta_train(model, train, estimator=estimator, outer_steps=80)
    end = evaluate(model, run.params, test, tasks=100)
    assert len(run.history) == 80 and not any(p.requires_grad for p in run.params.values())
    assert end.accuracy - end.interval > start.accuracy + start.interval
    assert abs(end.before - .2) < .05


def test_same_seed_same_run_and_other_seed_another():
    model, data = PatchTransformer(3, n_layers=1), glyphs()
    runs = [meta_train(model, data, Protocol(ways=3), estimator=FULL, tasks=2, outer_steps=2, seed=s).history for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("name,protocol,steps", [("sinusoid", Protocol(1, 10, 10, .02, 3), 60), ("digits", Protocol(5, 5, 3, .1, 4), 20)], ids=["sinusoid", "digits"])
def test_other_tasks_are_learned(name, protocol, steps):
    model, train, test = learner_for(name, protocol.ways, n_layers=1), load_data(name, "train"), load_data(name, "test")
    run = meta_train(model, train, protocol, tasks=8, outer_steps=steps, outer_lr=5e-3)
    start, end = (evaluate(model, p, test, protocol, tasks=60, seed=1) for p in (None, run.params))
    better = end.accuracy - start.accuracy if test.measure == "accuracy" else start.accuracy - end.accuracy
    assert better > start.interval + end.interval
    assert (end.accuracy - end.before if test.measure == "accuracy" else end.before - end.accuracy) > end.interval  # adaptation itself helps
