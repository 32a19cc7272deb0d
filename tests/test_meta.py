"Episodes keep the rules of the protocol, data faults are one clear sentence, and adaptation refuses what it cannot do."
import hashlib
import io
import os
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import theria.meta.episodes as episodes
from theria.attention.contract import ContractError
from theria.meta.adapt import adapt, over_tasks, parameters, rates, spread, task_loss
from theria.meta.episodes import Characters, DataError, glyphs, omniglot, rotated
from theria.meta.gradients import ESTIMATORS, FO_STRICT, Diverged, Protocol, evaluate, meta_gradient, meta_train, register_estimator
from theria.meta.learner import PatchTransformer, patches

CLASSES, INSTANCES = 12, 9


def toy(): # gray levels name the class and the instance
    return Characters("toy", [str(i) for i in range(CLASSES)], lambda i: torch.tensor([[[i, s]] for s in range(INSTANCES)], dtype=torch.uint8), INSTANCES)


@given(st.integers(1, CLASSES), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99), st.integers(1, 3))
def test_episode_rules(ways, shots, queries, seed, tasks):
    batch = toy().sample(ways, shots, queries, torch.Generator().manual_seed(seed), tasks)
    assert batch.support_x.shape == (tasks, ways*shots, 1, 2) and batch.query_y.shape == (tasks, ways*queries)
    for t in range(tasks):
        seen = [(*(x.flatten()*255).round().int().tolist(), y.item()) for part in ("support", "query") for x, y in zip(*(z[t] for z in getattr(batch, part)))]
        assert len({s[:2] for s in seen}) == ways*(shots + queries)
        label = {c: y for c, _, y in seen}
        assert len(label) == ways and all(label[c] == y for c, _, y in seen) and sorted(label.values()) == list(range(ways))
        assert batch.support_y[t].bincount().tolist() == [shots]*ways and batch.query_y[t].bincount().tolist() == [queries]*ways


@pytest.mark.parametrize("kw,match", [(dict(ways=13), "up to 12 ways"), (dict(shots=5, queries=5), "together 10 instances"), (dict(ways=0), "got ways=0"),
                                      (dict(shots=1.5), "got shots=1.5"), (dict(queries=True), "got queries=True"), (dict(tasks=0), "got tasks=0")])
def test_impossible_episodes_are_refused(kw, match):
    with pytest.raises(ContractError, match=match): toy().sample(**{"ways": 5, "shots": 1, "queries": 1} | kw)


def test_glyph_splits_share_no_class_and_no_drawing():
    sets = [glyphs(s) for s in episodes.SPLITS]
    names = [n for s in sets for n in s.names]
    assert len(names) == len(set(names)) > 1000
    codes = [[int(n[2:].split()[0], 16) for n in s.names] for s in sets]
    drawn = [{episodes._bitmap(c, f) for c in cs for f in episodes._inventory()[c]} for cs in codes]
    assert not drawn[0] & drawn[2] and not drawn[0] & drawn[1] and not drawn[1] & drawn[2]


def test_glyph_images_are_characters_in_ink():
    data = glyphs("validation")
    for i in range(len(data)):
        x = data.images(i)
        assert x.shape == (20, 28, 28) and x.dtype == torch.uint8
        assert (x > 128).flatten(1).sum(1).min() >= 4, data.names[i]
        assert len({bytes(im.numpy()) for im in x}) == 20
    border = torch.stack([data.images(i) for i in range(len(data))]).float()
    assert border[..., 0, :].mean() < 8 and border[..., :, 0].mean() < 8


def test_glyphs_do_not_depend_on_the_order_of_use():
    a, b = glyphs(seed=4), glyphs(seed=4)
    first = a.images(7)
    b.images(3)
    assert b.images(7).equal(first) and not glyphs(seed=5).images(7).equal(first)
    assert glyphs(seed=4, noise=0.).images(7).eq(0).float().mean() > .5


def archive(path, part="background", hands=4, alphabets=("Greek", "Latin", "Tifinagh"), extra=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as z:
        for name in extra: z.writestr(name, b"")
        for a, alphabet in enumerate(alphabets):
            for c in (1, 2):
                for h in range(hands):
                    im, f = Image.new("1", (105, 105), 1), io.BytesIO()
                    ImageDraw.Draw(im).line((20*a + 10, 10*c, 90, 60 + 8*h), fill=0, width=5)
                    im.save(f, "png")
                    z.writestr(f"images_{part}/{alphabet}/character{c:02d}/{a:03d}{c}_{h + 1:02d}.png", f.getvalue())
    return path


@pytest.fixture
def root(tmp_path):
    archive(tmp_path/"omniglot"/"images_background.zip", extra=("images_background/", "__MACOSX/images_background/Greek/character01/._0001_01.png"))
    archive(tmp_path/"omniglot"/"images_evaluation.zip", "evaluation", alphabets=("Avesta", "Sylheti"))
    return tmp_path


def test_omniglot_reads_the_published_layout(root, monkeypatch):
    monkeypatch.setenv("THERIA_DATA", str(root))
    train, test = omniglot(), omniglot("test")
    assert train.names == ("Greek character01", "Greek character02", "Latin character01", "Latin character02", "Tifinagh character01", "Tifinagh character02")
    assert (len(test), test.instances, test.title) == (4, 4, "Omniglot (evaluation)")
    assert omniglot("evaluation", root).images(0).equal(test.images(0))
    x = train.images(0)
    assert x.shape == (4, 28, 28) and x[:, -1].max() == 0 and 100 < x.max() and x.float().mean() < 60


def test_omniglot_ink_is_area(root):
    with zipfile.ZipFile(root/"omniglot"/"images_background.zip") as z, z.open("images_background/Latin/character02/0012_03.png") as f:
        raw = 1 - torch.tensor(list(Image.open(f).convert("L").tobytes())).float().view(105, 105)/255
    x = omniglot(root=root).images(3)[2].float()/255
    assert x.mean().item() == pytest.approx(raw.mean().item(), abs=2e-3)
    assert torch.nn.functional.interpolate(raw[None, None], (28, 28), mode="area")[0, 0].sub(x).abs().mean() < .02


def test_rotations_are_classes(root):
    data = omniglot(root=root, rotations=True)
    assert len(data) == 24 and len(set(data.names)) == 24
    for r in range(4): assert data.images(8 + r).equal(data.images(8).rot90(r, (1, 2)))
    assert len(rotated(data)) == 96


def test_one_character_with_fewer_drawings_limits_all(root):
    path = root/"omniglot"/"images_background.zip"
    with zipfile.ZipFile(path) as z: kept = {n: z.read(n) for n in z.namelist() if not n.endswith("0002_04.png")}
    with zipfile.ZipFile(path, "w") as z:
        for n, data in kept.items(): z.writestr(n, data)
    assert omniglot(root=root).instances == 3


@pytest.mark.parametrize("fault", ["truncated", "empty", "text", "flipped", "png", "other"])
def test_damaged_archives_are_named(root, fault):
    path = root/"omniglot"/"images_background.zip"
    data = bytearray(path.read_bytes())
    if fault == "truncated": data = data[:len(data)//2]
    if fault == "empty": data = b""
    if fault == "text": data = b"<html>not found</html>"
    if fault == "flipped":
        first = data.index(b"\x89PNG")
        data[first + 60] ^= 255
    path.write_bytes(data)
    if fault == "png":
        with zipfile.ZipFile(path, "w") as z: z.writestr("images_background/Greek/character01/0001_01.png", b"\x89PNG broken")
    if fault == "other":
        with zipfile.ZipFile(path, "w") as z: z.writestr("images/cat.png", b"")
    with pytest.raises(DataError, match="got a damaged Omniglot archive .*images_background.zip.*delete it") as e: omniglot(root=root).images(0)
    assert "\n" not in str(e.value)


def test_absent_data_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(episodes, "OMNIGLOT_URL", (tmp_path/"nowhere").as_uri() + "/")
    monkeypatch.setenv("THERIA_DATA", str(tmp_path/"data"))
    with pytest.raises(DataError, match="set THERIA_DATA") as e: omniglot()
    assert "\n" not in str(e.value) and not list(tmp_path.rglob("*zip*"))


def test_data_folder_that_cannot_be_made(tmp_path):
    (tmp_path/"file").write_text("not a folder")
    with pytest.raises(DataError, match="set THERIA_DATA"): omniglot(root=tmp_path/"file")


def test_download_is_checked_and_atomic(tmp_path, monkeypatch):
    served = archive(tmp_path/"server"/"images_evaluation.zip", "evaluation")
    monkeypatch.setattr(episodes, "OMNIGLOT_URL", (tmp_path/"server").as_uri() + "/")
    with pytest.raises(DataError, match="its MD5 is"): omniglot("evaluation", tmp_path/"data")
    assert not [p for p in (tmp_path/"data").rglob("*") if p.is_file()]
    monkeypatch.setitem(episodes.OMNIGLOT_MD5, "evaluation", hashlib.md5(served.read_bytes()).hexdigest())
    assert len(omniglot("evaluation", tmp_path/"data")) == 6
    assert [p.name for p in (tmp_path/"data").rglob("*") if p.is_file()] == ["images_evaluation.zip"]
    served.unlink()
    assert len(omniglot("evaluation", tmp_path/"data")) == 6


@pytest.mark.skipif("THERIA_DATA" not in os.environ, reason="THERIA_DATA names no folder with the real Omniglot")
def test_real_omniglot():
    train, test = omniglot("background"), omniglot("evaluation", rotations=True)
    assert (len(train), train.instances, len(test), test.instances) == (964, 20, 4*659, 20)
    e = train.sample(20, 5, 15, torch.Generator().manual_seed(0))
    assert e.query_x.shape == (300, 28, 28) and .02 < e.query_x.mean() < .2 and e.support_x.max() > .6
    model, protocol = PatchTransformer(5, n_layers=1), Protocol(queries=3)
    run = meta_train(model, train, protocol, tasks=4, outer_steps=40)
    assert evaluate(model, run.params, test, protocol, tasks=60).accuracy > evaluate(model, None, test, protocol, tasks=60).accuracy + .03


def test_learner_accepts_any_leading_shape_and_refuses_other_images():
    net = PatchTransformer(4, image=12, patch=3, d_model=8, n_heads=2, n_layers=1)
    x = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(net(x)[1, 2], net(x[1, 2]))
    assert patches(x, 3).shape == (2, 3, 16, 9)
    with pytest.raises(ContractError, match=r"\(\.\.\., 12, 12\)|\(…, 12, 12\)"): net(torch.rand(2, 28, 28))


def test_rates_are_checked_by_name():
    theta = parameters(PatchTransformer(2, n_layers=1))
    with pytest.raises(ContractError, match="one rate per parameter"): rates({n: .1 for n in list(theta)[1:]}, theta)
    with pytest.raises(ContractError, match="got lr=True"): rates(True, theta)
    with pytest.raises(ContractError, match="got steps=1.0"): adapt(None, theta, None, lr=.1, steps=1.)


def test_strict_watches_tasks_that_run_together():
    model, scale = PatchTransformer(3, n_layers=1), torch.ones((), requires_grad=True)
    e = glyphs().sample(3, 1, 1, torch.Generator().manual_seed(0), tasks=2)
    run = lambda loss_fn, **kw: meta_gradient(FO_STRICT, over_tasks(loss_fn, **kw), spread(parameters(model), 2), e.support, e.query, lr=.1, steps=1)
    inner = task_loss(model)
    for kw in (dict(vectorize=True), dict(vectorize=False)):
        assert run(inner, **kw).grads["position"].shape == (2, 16, 32)
        with pytest.raises(ContractError, match="not in params"): run(lambda p, b: scale*inner(p, b), **kw)


def test_estimators_are_open_and_state_what_they_differentiate():
    assert all(e.differentiates and e.name == name for name, e in ESTIMATORS.items())
    try:
        @register_estimator("twice_first_order", "nothing new: a copy of FO, doubled")
        def double(*args, **kw):
            m = ESTIMATORS["fo"].estimate(*args, **kw)
            return m._replace(grads={n: 2*g for n, g in m.grads.items()})
        theta, loss_fn = {"t": torch.ones(2)}, lambda p, b: (p["t"]**2).sum()
        fo, twice = (meta_gradient(n, loss_fn, theta, None, None, lr=.1, steps=2).grads["t"] for n in ("fo", "twice_first_order"))
        assert twice.equal(2*fo)
    finally: ESTIMATORS.pop("twice_first_order", None)


def test_divergence_is_reported_not_returned():
    with pytest.raises(Diverged, match="outer step 0.*smaller"):
        meta_train(PatchTransformer(3, n_layers=1), glyphs(), Protocol(ways=3, lr=1e30), tasks=2, outer_steps=5)


def flat(grads): return torch.cat([g.detach().double().flatten() for g in grads.values()])


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["full", "mixed", "checkpointed"])
@pytest.mark.parametrize("backend", ["reference", "triton_full_fused"])
def test_a_meta_gradient_recorded_as_a_cuda_graph_is_the_same(backend, estimator):
    from theria.meta.learner import learner_for
    model, data = learner_for("glyphs", 5, backend=backend).cuda(), glyphs()
    go = lambda graph: meta_train(model, data, Protocol(learn_lr=True, momentum=.5), estimator=estimator, tasks=4, outer_steps=4, graph=graph)
    eager, graph = go(False), go(True)
    assert max(abs(a["query_loss"] - b["query_loss"]) for a, b in zip(eager.history, graph.history)) < 1e-3
    assert eager.history[0]["query_loss"] != eager.history[-1]["query_loss"]
    assert ((flat(eager.params) - flat(graph.params)).norm()/flat(eager.params).norm()).item() < 1e-3


def allocated(run):
    "The most bytes that a call has allocated at one time on the CPU."
    from torch.profiler import ProfilerActivity, profile
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: out = run()
    now = most = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    assert out is not None and most > 0
    return most


def growth(weigh, deeper=(4, 12)): return (weigh(deeper[1]) - weigh(deeper[0]))/(deeper[1] - deeper[0])


def least(step): # what the graph of a step must keep: θ_k, and of each of the six linear maps of a block the input (three share one) and the gradient of the output
    d, wide = step.H*step.D, step.wide*step.H*step.D
    return step.n_layers*step.B*step.T*4*((3*d + wide) + (5*d + wide))


@pytest.mark.parametrize("T", [8, 64])
def test_an_inner_step_costs_one_copy_of_the_parameters(T):
    from dataclasses import replace
    from theria.meta.experiments import Step
    step, device = Step(T, 0, 4, H=2, D=16, dtype="float32"), torch.device("cpu")
    theta = sum(p.nbytes for p in step.problem("reference", device, 0)[1].values())
    found = {e: growth(lambda K: allocated(replace(step, K=K).run(e, "reference", device, 0))) for e in ("full", "mixed", "checkpointed")}
    assert all(abs(found[e]/theta - 1) < .01 for e in ("mixed", "checkpointed")), (found, theta)
    assert found["full"] > theta + least(step), (found, theta, least(step))


def test_a_learned_rate_costs_a_second_copy_since_its_gradient_needs_the_velocity():
    from theria.meta.experiments import Step
    def weigh(K):
        loss_fn, theta, support, query = Step(8, K, 4, H=2, D=16, dtype="float32").problem("reference", torch.device("cpu"), 0)
        learned = {n: torch.tensor(.02, requires_grad=True) for n in theta}
        return allocated(lambda: meta_gradient("mixed", loss_fn, theta, support, query, lr=learned, steps=K, also=learned))/sum(p.nbytes for p in theta.values())
    assert abs(growth(weigh) - 2) < .02


@pytest.mark.gpu
@pytest.mark.parametrize("T", [64, 256])
def test_estimators_of_the_same_number_agree_on_a_gpu_and_keep_less(T):
    from dataclasses import replace
    from theria.meta.experiments import Step, measure_step
    step, device = Step(T, 0, 8, dtype="float32"), torch.device("cuda")
    theta = sum(p.nbytes for p in step.problem("reference", device, 0)[1].values())
    rows = {(e, K): measure_step(replace(step, K=K), e, "triton_full_fused", device, ms=1.) for K in (4, 12) for e in ("full", "mixed", "checkpointed")}
    assert all(r["failure"] is None and r["error"] < 1e-4 for r in rows.values()), rows
    found = {e: growth(lambda K: rows[e, K]["memory"]) for e in ("full", "mixed", "checkpointed")}
    # one copy of θ a step, give or take one at each end of the eight steps between the two runs, and tensors are rounded up to 512 bytes
    assert all(abs(found[e]/theta - 1) < 1/8 + .02 for e in ("mixed", "checkpointed")), (found, theta)
    assert found["full"] > theta + least(step), (found, theta, least(step))
    if T == 256: assert max(rows[e, 12]["memory"] for e in ("mixed", "checkpointed")) < rows["full", 12]["memory"]/3
