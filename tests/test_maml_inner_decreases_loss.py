"Adaptation does what it is for: the loss on the support set goes down, in every task, for every attention."
import pytest
import torch

from theria.meta.adapt import adapt, over_tasks, parameters, spread, task_loss
from theria.meta.episodes import glyphs
from theria.meta.learner import PatchTransformer


@pytest.fixture(scope="module")
def episodes(): return glyphs().sample(5, 1, 1, torch.Generator().manual_seed(0), tasks=20)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_inner_steps_decrease_the_loss(episodes, backend, create_graph):
    model = PatchTransformer(5, n_layers=1, backend=backend)
    loss_fn, theta = over_tasks(task_loss(model), vectorize=backend != "sdpa"), spread(parameters(model), 20)
    adapted = adapt(loss_fn, theta, episodes.support, lr=.05, steps=8, create_graph=create_graph)
    after = loss_fn(adapted.params, episodes.support)
    assert (after < adapted.losses[0]).all()
    assert (adapted.losses.diff(dim=0) < 0).all()


def test_zero_steps_and_zero_rate_change_nothing(episodes):
    model = PatchTransformer(5, n_layers=1)
    loss_fn, theta, batch = task_loss(model), parameters(model), (episodes.support_x[0], episodes.support_y[0])
    none, still = adapt(loss_fn, theta, batch, lr=.1, steps=0), adapt(loss_fn, theta, batch, lr=0., steps=3)
    assert none.losses.numel() == 0 and all(none.params[n] is theta[n] for n in theta)
    assert all(still.params[n].equal(theta[n]) for n in theta) and still.losses.unique().numel() == 1


def test_a_step_against_the_gradient_increases_it(episodes):
    model = PatchTransformer(5, n_layers=1)
    loss_fn, theta, batch = task_loss(model), parameters(model), (episodes.support_x[0], episodes.support_y[0])
    adapted = adapt(loss_fn, theta, batch, lr={n: torch.tensor(-.05) for n in theta}, steps=4)
    assert (adapted.losses.diff() > 0).all()
