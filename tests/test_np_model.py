"The rectangular-attention transformer: against its dense specification, its symmetries, its padding, its kernels."
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from theria.attention.contract import TOLERANCE, ContractError, rel_err
from theria.distributed import context_parallel, run_ranks
from theria.neural_process.gmm import log_prob
from theria.neural_process.model import ATTENTIONS, ROWS, Size, TransformerNP, dense_forward, mixture_quantile
from theria.neural_process.training import Optimizer, Switches, attention_kernels, compile_parts

PLAIN = dict(mlp="reference", heads="reference", gmm="reference")


def tasks(B, M, N, x_dim=1, dtype=torch.float64, device="cpu"):
    return [torch.randn(*shape, dtype=dtype, device=device) for shape in ((B, M, x_dim), (B, M), (B, N, x_dim), (B, N))]


def value_and_gradients(f, net, batch):
    z = f(*batch[:3])
    return z, torch.autograd.grad(log_prob(z, batch[3]).mean(), list(net.parameters()))


@settings(max_examples=12)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([(1, 4), (2, 3), (3, 5)]), st.integers(1, 2), st.integers(1, 33), st.sampled_from(ROWS))
def test_sliced_attention_is_masked_attention(B, M, N, heads, x_dim, d_ff, rows):
    H, D = heads
    net = TransformerNP(Size(H*D, 2, H, d_ff, 2, x_dim), attention="reference", rows=rows, **PLAIN).double()
    batch = tasks(B, M, N, x_dim)
    (z, grads), (plain, plain_grads) = value_and_gradients(net, net, batch), value_and_gradients(partial(dense_forward, net), net, batch)
    assert rel_err(z, plain) < TOLERANCE[torch.float64]
    for g, p in zip(grads, plain_grads): assert (g - p).norm() <= 1e-11*(1 + p.norm())


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(2, 12), st.integers(2, 12), st.randoms(use_true_random=False))
def test_symmetries(B, M, N, random):
    net = TransformerNP(Size(16, 2, 2, 21, 3), attention="sdpa", **PLAIN).double()
    cx, cy, tx, _ = tasks(B, M, N)
    i, j = (torch.tensor(random.sample(range(n), n)) for n in (M, N))
    some = j[:random.randint(1, N)]
    with torch.no_grad():
        z = net(cx, cy, tx)
        assert rel_err(net(cx[:, i], cy[:, i], tx), z) < TOLERANCE[torch.float64]
        assert rel_err(net(cx, cy, tx[:, some]), z[:, some]) < TOLERANCE[torch.float64]
        assert rel_err(net(cx[:1], cy[:1], tx[:1]), z[:1]) < TOLERANCE[torch.float64]
        other = net(cx, cy + 1, tx)
    assert rel_err(other, z) > 1e-3


def test_the_context_does_not_see_the_targets():
    net = TransformerNP(Size(16, 3, 2, 21, 3), attention="reference", **PLAIN).double()
    cx, cy, tx, _ = tasks(2, 5, 4)
    tx.requires_grad_()
    h = net.embed(cx, cy, tx)
    for block in net.blocks: h = block(h, 5)
    assert h[:, 5:].sum().requires_grad
    assert torch.autograd.grad(h[:, :5].square().sum(), tx)[0].abs().max() == 0


def test_the_padding_stays_zero_in_training():
    net = TransformerNP(Size(16, 2, 2, 21, 3), attention="sdpa", **PLAIN)
    padding = lambda: torch.cat([t.flatten() for b in net.blocks for t in (b.w1[21:], b.w2[:, 21:])] + [net.head1[:, 21:].flatten(), net.head2[..., 21:].flatten()])
    assert padding().numel() == 2*2*16*11 + 3*19*11
    before, optimizer = net.blocks[0].w1[:21].clone(), Optimizer(net.parameters(), 1e-2, weight_decay=.1)
    for _ in range(5):
        optimizer.zero_grad()
        net.loss(*tasks(3, 6, 5, dtype=torch.float32)).backward()
        optimizer.step()
    assert padding().abs().max() == 0
    assert (net.blocks[0].w1[:21] - before).abs().max() > 1e-2


def test_theria_s_kernels_in_the_model():
    "Through Triton's interpreter here, on the GPU where there is one: the same predictions and gradients as the dense form in float64."
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = TransformerNP(Size(32, 1, 2, 21, 3), attention="theria", **PLAIN).to(device)
    batch = tasks(2, 19, 14, dtype=torch.float32, device=device)
    wide = TransformerNP(Size(32, 1, 2, 21, 3), attention="reference", **PLAIN).double()
    wide.load_state_dict(net.state_dict())
    (z, grads), (plain, plain_grads) = value_and_gradients(net, net, batch), value_and_gradients(partial(dense_forward, wide), wide, [t.cpu().double() for t in batch])
    assert rel_err(z.cpu(), plain) < TOLERANCE[torch.float32]
    for g, p in zip(grads, plain_grads): assert (g.cpu() - p).norm() <= 1e-5*(1 + p.norm())


def test_fused_parts_in_the_model():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fused = TransformerNP(Size(32, 1, 2, 21, 3), attention="sdpa", mlp="fused", heads="fused", gmm="fused").to(device)
    plain = TransformerNP(Size(32, 1, 2, 21, 3), attention="sdpa", **PLAIN).to(device)
    plain.load_state_dict(fused.state_dict())
    batch = tasks(2, 5, 4, dtype=torch.float32, device=device)
    losses = [net.loss(*batch) for net in (fused, plain)]
    assert rel_err(*losses) < 1e-5
    for (name, g), p in zip(zip(dict(fused.named_parameters()), torch.autograd.grad(losses[0], list(fused.parameters()))), torch.autograd.grad(losses[1], list(plain.parameters()))):
        assert (g - p).norm() <= 3e-5*(1 + p.norm()), name


@pytest.mark.parametrize("attention", ["reference", "sdpa"])
def test_one_graph_without_breaks(attention):
    net = TransformerNP(Size(16, 2, 2, 21, 3), attention=attention, **PLAIN)
    batch = tasks(2, 5, 4, dtype=torch.float32)
    compiled = torch.compile(net.loss, fullgraph=True, backend="aot_eager", dynamic=False)(*batch)
    assert rel_err(compiled, net.loss(*batch)) < 1e-6
    got, expected = (torch.autograd.grad(loss, list(net.parameters())) for loss in (compiled, net.loss(*batch)))
    for a, b in zip(got, expected): assert (a - b).norm() <= 1e-6*(1 + b.norm())


@pytest.mark.parametrize("attention, parts, precision, rows", [("sdpa", "reference", "fp32", "all"), ("theria", "fused", "bf16", "needed")])
def test_blocks_share_one_compilation(attention, parts, precision, rows):
    "Four blocks, one graph, or two if the last computes less; embedding and score have one each. The compiler sees theria's operators as they are."
    from torch._dynamo.testing import CompileCounterWithBackend
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    switches, counter, batch = Switches(attention, rows, parts, parts, parts, precision=precision), CompileCounterWithBackend("aot_eager"), tasks(1, 4, 3, dtype=torch.float32, device=device)
    torch._dynamo.reset()
    compiled, plain = (switches.build(Size(16, 4, 1, 21, 3), device) for _ in range(2))
    loss, expected = compile_parts(compiled, "blocks", counter)(*batch), plain.loss(*batch)
    loss.backward()
    expected.backward()
    assert counter.frame_count == (3 if rows == "all" else 4) and rel_err(loss, expected) < 1e-6
    for p, q in zip(compiled.parameters(), plain.parameters()): assert (p.grad - q.grad).norm() <= 1e-2*(q.grad.norm() + 1e-3)


def test_what_no_prediction_needs_is_left_out():
    from torch.utils.flop_counter import FlopCounterMode
    B, M, N, d, f = 2, 8, 24, 32, 64
    size, batch, counts = Size(d, 3, 2, f, 2), tasks(B, M, N, dtype=torch.float32), []
    for rows in ROWS:
        with FlopCounterMode(display=False) as counter: TransformerNP(size, attention="reference", rows=rows, **PLAIN)(*batch[:3])
        counts.append(counter.get_total_flops())
    keys, last = 4*N*d*d, M*(4*d*d + 4*M*d + 4*d*f)  # keys and values of targets in every block; of context rows in the last: query and output maps, attention, network
    assert counts[0] - counts[1] == B*(3*keys + last)


def part_of_a_task(world, batch, state):
    "Loss and gradients of one rank's part of every task; its rows attend to the observations of all ranks."
    net = TransformerNP(Size(16, 2, 2, 21, 3), attention=partial(context_parallel, backend="reference"), **PLAIN).double()
    net.load_state_dict(state)
    mine = [t.chunk(world, 1)[torch.distributed.get_rank()] for t in batch]
    loss = net.loss(*mine)
    return loss.detach(), torch.autograd.grad(loss, list(net.parameters()))


def test_rows_can_be_dealt_out_to_ranks():
    "Each rank embeds, projects and predicts its own rows; only keys and values travel. The means over ranks are loss and gradients of the whole task."
    net = TransformerNP(Size(16, 2, 2, 21, 3), attention="reference", **PLAIN).double()
    batch = tasks(2, 8, 6)
    exact = net.loss(*batch)
    exact_grads = torch.autograd.grad(exact, list(net.parameters()))
    losses, grads = zip(*run_ranks(2, part_of_a_task, 2, batch, net.state_dict()))
    assert losses[0] != losses[1] and rel_err(sum(losses)/2, exact) < TOLERANCE[torch.float64]
    for g, e in zip(zip(*grads), exact_grads): assert (sum(g)/2 - e).norm() <= 1e-11*(1 + e.norm())


def test_mixture_quantiles_against_sampling():
    z = torch.tensor([[1., -1., -1.], [0., 2., -.5], [-1., 3., .5]], dtype=torch.float64)
    k = torch.multinomial(z[:, 0].softmax(0), 400_000, replacement=True)
    samples = z[k, 1] + z[k, 2].exp()*torch.randn(len(k), dtype=torch.float64)
    for level in (.05, .3, .5, .9, .99):
        below = (samples < mixture_quantile(z, level)).double().mean()
        assert abs(below - level) < 5*(level*(1 - level)/len(k))**.5


@pytest.mark.parametrize("change, words", [
    (dict(attention="fastest"), "got attention='fastest'"), (dict(rows="some"), "got rows='some'"), (dict(mlp="triton"), "got mlp='triton'"),
    (dict(size=Size(d_model=30, n_heads=4)), "got d_model=30 and n_heads=4"), (dict(size=Size(n_layers=0)), "got n_layers=0")])
def test_a_model_that_cannot_be_is_refused(change, words):
    with pytest.raises(ContractError, match=words): TransformerNP(**{"size": Size(16, 1, 2, 21, 3), **change})


@pytest.mark.parametrize("shapes", [((2, 5), (2, 5), (2, 4, 1)), ((2, 5, 1), (2, 6), (2, 4, 1)), ((2, 5, 1), (2, 5), (3, 4, 1)), ((2, 0, 1), (2, 0), (2, 4, 1)), ((2, 5, 2), (2, 5), (2, 4, 2)),
                                    ((2, 5, 1), (2, 5), (2, 0, 1))])
def test_tasks_that_do_not_fit_are_refused(shapes):
    net = TransformerNP(Size(16, 1, 2, 21, 3), attention="sdpa", **PLAIN)
    with pytest.raises(ContractError, match="bring the tasks into these shapes"): net(*(torch.zeros(s) for s in shapes))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash", "cudnn", "efficient", "theria", "theria-two", "theria-once"])
@pytest.mark.parametrize("rows, compiled", [("all", False), ("needed", False), ("all", True)])
def test_the_kernel_that_was_asked_for_runs_and_is_right(attention, rows, compiled):
    from theria.bench import kernel_names
    size = Size(128, 2, 2, 200, 3)
    net = TransformerNP(size, attention=attention, rows=rows, **PLAIN).cuda()
    batch = tasks(3, 70, 61, dtype=torch.float32, device="cuda")
    torch._dynamo.reset()
    loss = torch.compile(net.loss, fullgraph=True, dynamic=False) if compiled else net.loss
    def run():
        with torch.autocast("cuda", torch.bfloat16): found = loss(*batch)
        return found, torch.autograd.grad(found, list(net.parameters()))
    run()
    assert attention_kernels(kernel_names(run), attention)
    plain = TransformerNP(size, attention="reference", **PLAIN).cuda()
    plain.load_state_dict(net.state_dict())
    exact = plain.double().loss(*(t.double() for t in batch))
    (found, grads), exact_grads = run(), torch.autograd.grad(exact, list(plain.parameters()))
    assert rel_err(found, exact) < 2e-2
    flat = [torch.cat([g.flatten().double() for g in gs]) for gs in (grads, exact_grads)]
    assert rel_err(*flat) < 4e-2


@pytest.mark.gpu
def test_keys_are_not_copied():
    "The memory of the attention call is its output and row statistics: no copy of the sliced keys and values."
    B, M, N, H, D = 2, 4000, 1000, 8, 64
    qkv = torch.randn(B, M + N, 3*H*D, device="cuda", dtype=torch.bfloat16)
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in qkv.chunk(3, -1))
    for attention in ("theria", "flash"):
        f = ATTENTIONS[attention]
        with torch.no_grad():
            f(q, k[:, :, :M], v[:, :, :M])
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            o = f(q, k[:, :, :M], v[:, :, :M])
        output = B*H*(M + N)*(2*D + 4)
        assert torch.cuda.max_memory_allocated() - before < output + 2*B*M*H*D//2, attention
        assert o.shape == q.shape
