"""Transformers models on theria's attention, against their own eager attention: first and second order, eager and compiled, padded and not."""
import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported: nothing here may look for files on the network

import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers", reason="the extra theria[huggingface] is not installed")
from transformers import (BertConfig, BertForMaskedLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification, WhisperConfig, WhisperForConditionalGeneration)

from theria.attention.contract import ContractError, rel_err
from theria.drop_in import replace_sdpa
from theria.huggingface import attention_forward, check_model, register
from theria.meta.adapt import adapt, parameters, task_loss
from theria.meta.variants import stats_detach

transformers.logging.set_verbosity_error()
CUDA = torch.cuda.is_available()
TOL = 1e-10  # float64 on both sides, two layers, two derivatives
SIZES = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=4, max_position_embeddings=16)
CONFIGS = {"gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2)),
           "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2)),
           "bert": (BertForMaskedLM, BertConfig(**SIZES)),
           "vit": (ViTForImageClassification, ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4))}
TEXT = [name for name in CONFIGS if name != "vit"]
ENDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
WHISPER = WhisperConfig(vocab_size=31, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                        num_mel_bins=4, max_source_positions=6, max_target_positions=16, suppress_tokens=None, begin_suppress_tokens=None, **ENDS)
MORE = {"a window of three keys": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=3, max_window_layers=0)),
        "windows in every other layer": (Gemma2ForCausalLM, Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=4, sliding_window=3, attn_logit_softcapping=None)),
        "an encoder of sound": (WhisperForConditionalGeneration, WHISPER),
        "a position bias": (T5ForConditionalGeneration, T5Config(vocab_size=31, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, **ENDS)),
        "a soft cap": (Gemma2ForCausalLM, Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=4))}


@pytest.fixture(autouse=True)
def names(monkeypatch):
    "The names, and an eager softmax in the model's dtype: some models compute it in float32 whatever they are asked for."
    register(), register("theria_reference", backend="reference")
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim=None, *args, dtype=None, **kw: softmax(x, dim, *args, dtype=None if x.dtype == torch.float64 else dtype, **kw))


def tiny(name, implementation="theria", dtype=torch.float64):
    "A model with weights large enough for attention to be far from uniform."
    cls, config = {**CONFIGS, **MORE}[name]
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    model = cls(config).to(dtype).eval()
    for p in model.parameters():
        if p.dim() > 1: nn.init.normal_(p, std=0.5)
    return model


def inputs(name, padded=False):
    "A batch of two, and which positions are real; the second sentence is padded on the left."
    torch.manual_seed(1)
    if name == "vit": return dict(pixel_values=torch.randn(2, 3, 8, 8, dtype=torch.float64)), torch.ones(2, dtype=torch.bool)
    tokens, real = torch.randint(31, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    if padded: real[1, :3] = False
    if name == "an encoder of sound": return dict(input_features=torch.randn(2, 4, 12, dtype=torch.float64), decoder_input_ids=tokens), real
    if name == "a position bias": return dict(input_ids=tokens, attention_mask=real.long(), decoder_input_ids=tokens.flip(1)), torch.ones_like(real)
    return dict(input_ids=tokens) | (dict(attention_mask=real.long()) if padded else {}), real


def loss(model, params, batch, real): return torch.func.functional_call(model, params, (), batch).logits.sin().masked_fill(~real[..., None], 0.).sum()


def orders(name, implementation, padded, forward=True):
    "Value, gradient, gradient of a gradient penalty, and a Hessian-vector product forward over reverse, all by parameter."
    model, (batch, real) = tiny(name, implementation), inputs(name, padded)
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    f = lambda params: loss(model, params, batch, real)
    value = f(params)
    grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
    penalty = torch.autograd.grad(sum(g.pow(2).sum() for g in grads), list(params.values()))
    found = dict(value=[value], grad=list(grads), penalty=list(penalty))
    if not forward: return found
    torch.manual_seed(2)
    tangents = {n: torch.randn_like(p) for n, p in params.items()}
    point = {n: p.detach() for n, p in params.items()}
    hvp = torch.func.jvp(torch.func.grad(f), (point,), (tangents,))[1]
    return found | dict(hvp=list(hvp.values()))


def close(ours, theirs, tol=TOL):
    "Relative error over all tensors together: some gradients (of key biases) are zero in exact arithmetic."
    flat = lambda xs: torch.cat([x.detach().flatten() for x in xs])
    return rel_err(flat(ours), flat(theirs)) <= tol


@pytest.mark.parametrize("name, padded", [*((n, False) for n in CONFIGS), *((n, True) for n in TEXT), *((n, n != "an encoder of sound") for n in MORE if n != "a soft cap")])
def test_every_order_equals_eager(name, padded):
    ours, theirs = (orders(name, i, padded) for i in ("theria", "eager"))
    for what in ours: assert close(ours[what], theirs[what]), what


def test_a_broken_attention_is_seen():
    transformers.AttentionInterface.register("broken", lambda module, q, k, v, mask, **options: (stats_detach(q, k, v).transpose(1, 2).contiguous(), None))
    broken, theirs = (orders("vit", i, False, forward=False) for i in ("broken", "eager"))
    assert close(broken["grad"], theirs["grad"]) and not close(broken["penalty"], theirs["penalty"], 1e-3)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_compiled_in_one_graph(name):
    model, (batch, real) = tiny(name), inputs(name, name != "vit")
    want = model(**batch).logits
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).logits
    grads = [torch.autograd.grad(y[real].sin().sum(), list(model.parameters()), allow_unused=True) for y in (got, want)]
    assert close([got[real]], [want[real]]) and all(a is None and b is None or close([a], [b]) or b.abs().max() < 1e-12 for a, b in zip(*grads))


@pytest.mark.slow
def test_hessian_vector_product_compiled_in_one_graph():
    model, (batch, real) = tiny("llama"), inputs("llama", True)
    point = {n: p.detach() for n, p in model.named_parameters()}
    tangents = {n: torch.randn_like(p) for n, p in point.items()}
    hvp = lambda p, t: torch.func.jvp(torch.func.grad(lambda p: loss(model, p, batch, real)), (p,), (t,))[1]
    torch._dynamo.reset()
    compiled = torch.compile(hvp, backend="aot_eager", fullgraph=True)(point, tangents)
    assert close(list(compiled.values()), list(hvp(point, tangents).values()))


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_one_maml_step_through_an_unmodified_model(name):
    meta = {}
    for implementation in ("theria", "eager"):
        model, (batch, _) = tiny(name, implementation), inputs(name)
        x = next(iter(batch.values()))
        y = torch.tensor([0, 1]) if name == "vit" else x.roll(-1, 1)
        fit = lambda out, y: F.cross_entropy(out.logits.flatten(0, -2), y.flatten())
        theta, loss_fn = parameters(model), task_loss(model, fit)
        for full in (True, False):
            adapted = adapt(loss_fn, theta, (x, y), lr=0.05, steps=2, create_graph=full)
            start = theta if full else adapted.params
            meta[implementation, full] = torch.autograd.grad(loss_fn(adapted.params, (x, y)), list(start.values()))
    assert close(meta["theria", True], meta["eager", True])
    assert not close(meta["theria", True], meta["theria", False], 1e-2)  # the second-order part is there, and large


def test_generation_with_left_padding_and_a_cache():
    batch, _ = inputs("llama", True)
    said = {i: tiny("llama", i).generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0) for i in ("theria", "eager")}
    assert said["theria"].shape == (2, 12) and torch.equal(said["theria"], said["eager"])


def test_position_bias_of_t5():
    torch.manual_seed(0)
    config = T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0., decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).double().eval()
    for p in model.parameters():
        if p.dim() > 1: nn.init.normal_(p, std=0.3)
    batch, real = inputs("bert", True)
    out = {}
    for implementation in ("theria", "eager"):
        model.set_attn_implementation(implementation)
        y = model(**batch, labels=batch["input_ids"]).logits
        out[implementation] = y, *torch.autograd.grad(y.sin().sum(), [p for n, p in model.named_parameters() if "relative_attention_bias" in n])
    assert all(close([a], [b]) and b.norm() > 1e-3 for a, b in zip(out["theria"], out["eager"]))


def test_dropout_is_applied_in_training_only():
    model, (batch, _) = tiny("llama"), inputs("llama")
    for layer in model.model.layers: layer.self_attn.attention_dropout = 0.5
    runs = lambda: [model(**batch).logits for _ in range(2)]
    assert torch.equal(*runs())
    model.train()
    assert not torch.equal(*runs())


def test_a_model_on_sdpa_with_theria_underneath():
    model, (batch, real) = tiny("vit", "sdpa"), inputs("vit")
    params = list(model.parameters())
    def penalty(model):
        g = torch.autograd.grad(model(**batch).logits.sin().sum(), params, create_graph=True)
        return torch.autograd.grad(sum(x.pow(2).sum() for x in g), params)
    with replace_sdpa(): ours = penalty(model)
    model.set_attn_implementation("eager")
    assert close(ours, penalty(model))


def test_what_is_refused():
    batch, _ = inputs("llama")
    with pytest.raises(ContractError, match="got output_attentions from the model"): tiny("llama")(**batch, output_attentions=True)
    with pytest.raises(ContractError, match="got softcap from the model, a soft cap on the scores; .* attn_implementation='eager'"): tiny("a soft cap")(**batch)
    assert tiny("a soft cap", "eager")(**batch).logits.isfinite().all()
    with pytest.raises(ContractError, match="attn_implementation='eager'"): check_model(tiny("gpt2", "eager"))
    assert check_model(tiny("llama", "theria_reference")) == ["LlamaForCausalLM", "LlamaModel"]


def test_models_that_ignore_the_name_are_found():
    from transformers import XLNetConfig, XLNetModel
    model = XLNetModel(XLNetConfig(vocab_size=31, d_model=16, n_layer=1, n_head=2, d_inner=24))
    model.config._attn_implementation = "theria"
    with pytest.raises(ContractError, match="got a XLNetModel, whose code computes attention by itself"): check_model(model)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(CONFIGS))
def test_fused_kernels_on_the_gpu(name):
    "float32 on the fused kernels, against float64 on the CPU, beside what the model's eager attention reaches."
    def derivatives(implementation, device, dtype):
        model, (batch, real) = tiny(name, implementation).to(device, dtype), inputs(name, name != "vit")
        batch = {n: x.to(device, dtype if x.is_floating_point() else None) for n, x in batch.items()}
        params = list(model.parameters())
        y = model(**batch).logits.sin().masked_fill(~real.to(device)[..., None], 0.).sum()
        grads = torch.autograd.grad(y, params, create_graph=True)
        return [g.cpu() for g in grads], [g.cpu() for g in torch.autograd.grad(sum(g.pow(2).sum() for g in grads), params)]
    flat = lambda xs: torch.cat([x.detach().double().flatten() for x in xs])
    register("theria_fused", backend="triton_full_fused")
    want, ours, eager = derivatives("eager", "cpu", torch.float64), derivatives("theria_fused", "cuda", torch.float32), derivatives("eager", "cuda", torch.float32)
    for a, b, c in zip(ours, eager, want): assert rel_err(flat(a), flat(c)) <= 2*rel_err(flat(b), flat(c)) + 1e-6
