"""transformer2.py: equations against closed forms and enumeration, batches against loops, files faulty."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch import nn

import before as common
import transformer2
from before import Run, UserError
from transformer2 import Config, Problem, SVFLinear, Task

SHAPES = [(7, 4), (4, 7), (5, 5)]


def config(tmp_path, **more):
    small = dict(width=16, layers=2, batch=8, steps=4, validate_every=1, valid_problems=6, shots=4)
    small |= dict(eval_problems=8, population=10, generations=3, log_every=1, device="cpu")
    small |= dict(out=str(tmp_path / "out"), svd=str(tmp_path / "svd"))
    return Config(**small | more)


def make_world(tmp_path, lora=False, **more):
    """An untrained toy world whose weights are large enough for peaked, uneven predictions."""
    cfg = config(tmp_path, **more)
    run = Run(cfg, look=True).stage("test")
    torch.manual_seed(1)
    world = transformer2.toy_world(run, None, cfg)
    with torch.no_grad():
        for p in world.model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    made = transformer2.lora_adapter if lora else transformer2.svf_adapter
    adapter = made(world.model, cfg) if lora else made(world.model, cfg, run)
    return replace(world, adapter=adapter)


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def spread_p(adapter, seed=0, std=1.5):
    """p far from constant, so that an expert differs from the base."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(std * torch.randn(p.shape, generator=g))


def expert(adapter, seed):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(len(x.s), generator=g) for n, x in adapter.layers.items()}


def svf(m, n, bias=True, rank=None, dtype=torch.float64, renormalise=True):
    linear = nn.Linear(n, m, bias=bias, dtype=dtype)
    if rank is not None:
        W = torch.randn(m, rank, dtype=dtype) @ torch.randn(rank, n, dtype=dtype)
        linear.weight.data = W
    U, s, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    layer = SVFLinear(linear, U, s, Vh.T.contiguous(), renormalise)
    nn.init.normal_(layer.p)
    return layer


def dense(layer, p=None):
    """W'(p) of eq. (3), written out, with gradient."""
    z = torch.sigmoid(layer.p if p is None else p)
    return layer.s.sum() / (layer.s * z).sum() * layer.U @ torch.diag(layer.s * z) @ layer.V.T


def in_mode(layer, mode, x):
    layer.mode = mode
    return layer(x)


PROMPTS = (";.M+12345=", ";.M+1=", ";.C<abc=", "=", ";.R^00931234=", ";.O@77=")


def problems_of(prompts=PROMPTS):
    return [Problem(p, p[2:-1], i, "12"[: 1 + i % 2]) for i, p in enumerate(prompts)]


def hash_task(max_new=6, **more):
    """A task whose grader is a coin that depends on the answer alone."""
    return Task("coin", "math", {}, lambda p, text: common.stable_hash(text) % 2 == 0, max_new, **more)


# --- SVF


@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_p_of_any_value_gives_back_w_because_g_cancels_it(shape):
    for value in (-3.0, 0.1, 5.0):
        layer = svf(*shape, dtype=torch.float32)
        nn.init.constant_(layer.p, value)
        layer.merge()
        assert torch.linalg.norm(layer.merged - layer.weight) < 1e-5 * torch.linalg.norm(layer.weight)


def test_rows_of_ones_are_the_base_layer_to_the_bit_because_only_the_difference_is_added():
    layer, x = svf(6, 9, dtype=torch.float32), torch.randn(3, 4, 9)
    layer.scales = torch.ones(3, 6)
    assert torch.equal(in_mode(layer, "rows", x), in_mode(layer, "base", x))
    layer.scales[1, 0] = 2.0
    y = in_mode(layer, "rows", x)
    assert torch.equal(y[[0, 2]], in_mode(layer, "base", x)[[0, 2]]) and not torch.equal(y[1], layer(x)[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_w_prime_keeps_nuclear_norm_and_singular_vectors_and_ignores_the_scale_of_z(shape):
    layer = svf(*shape, dtype=torch.float32)
    z = layer.z().detach()
    scale = layer.scale(z)
    W = layer.U @ torch.diag(layer.s * scale) @ layer.V.T
    torch.testing.assert_close(torch.linalg.svdvals(W).sum(), layer.s.sum())
    torch.testing.assert_close(layer.U.T @ W @ layer.V, torch.diag(layer.s * scale), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.scale(7 * z), scale)
    layer.merge()
    torch.testing.assert_close(layer.merged, W, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense(layer).detach(), W, rtol=1e-5, atol=1e-6)
    free = transformer2.effective_scale(z, layer.s, renormalise=False)
    assert torch.equal(free, z)


def test_effective_scale_of_a_batch_is_that_of_each_row():
    z, s = torch.rand(2, 3, 5), torch.rand(5)
    for i in range(2):
        for j in range(3):
            expected = z[i, j] * s.sum() / (s * z[i, j]).sum()
            torch.testing.assert_close(transformer2.effective_scale(z, s)[i, j], expected)


def test_signs_and_order_of_singular_vectors_do_not_matter():
    layer, x = svf(5, 6), torch.randn(2, 6, dtype=torch.float64)
    y = in_mode(layer, "own", x)
    order, sign = torch.randperm(5), torch.tensor([1, -1, -1, 1, -1])
    layer.U, layer.V, layer.s = (layer.U * sign)[:, order], (layer.V * sign)[:, order], layer.s[order]
    layer.p.data = layer.p.data[order]
    torch.testing.assert_close(in_mode(layer, "own", x), y)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [None, 2])
def test_factored_merged_and_row_forms_are_one_function(shape, rank, bias):
    layer, x = svf(*shape, bias=bias, rank=rank, dtype=torch.float32), torch.randn(3, 2, shape[1])
    own = in_mode(layer, "own", x)
    torch.testing.assert_close(own, nn.functional.linear(x, dense(layer), layer.bias), rtol=1e-4, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(in_mode(layer, "merged", x), own, rtol=1e-4, atol=1e-5)
    layer.scales = layer.scale(layer.z()).expand(3, -1)
    torch.testing.assert_close(in_mode(layer, "rows", x), own, rtol=1e-4, atol=1e-5)


def test_a_zero_matrix_stays_finite_in_all_forms_and_in_the_gradient():
    layer = SVFLinear(nn.Linear(4, 3), torch.eye(3), torch.zeros(3), torch.eye(4)[:, :3])
    layer.weight.data.zero_()
    x = torch.randn(2, 5, 4)
    layer.merge()
    layer.scales = layer.scale(torch.rand(2, 3))
    for mode in ("own", "merged", "rows", "base"):
        assert torch.equal(in_mode(layer, mode, x), layer.bias.expand(2, 5, 3))
    in_mode(layer, "own", x).sum().backward()
    assert layer.p.grad.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_p_is_finite_differences_closed_form_and_dense_trick(shape):
    layer = svf(*shape)
    x, y = (torch.randn(6, k, dtype=torch.float64) for k in shape[::-1])
    loss = lambda out: ((out - y) ** 3).sum()  # noqa: E731
    out = in_mode(layer, "own", x)
    out.retain_grad()
    loss(out).backward()
    grad = layer.p.grad

    G = out.grad.T @ x  # closed form, spec 2.2.3
    z, s = layer.z().detach(), layer.s
    g = s.sum() / (s * z).sum()
    q = (layer.U * (G @ layer.V)).sum(0)
    by_z = g * s * (q - (s * g * z * q).sum() / s.sum())
    torch.testing.assert_close(grad, by_z * z * (1 - z))
    torch.testing.assert_close((z * by_z).sum(), torch.zeros_like(g), atol=1e-9, rtol=0)
    assert by_z.abs().max() > 1e-3

    W = dense(layer).detach().requires_grad_()  # dense trick: dL/dW' first, then back through p -> W'
    loss(nn.functional.linear(x, W, layer.bias)).backward()
    torch.testing.assert_close(grad, torch.autograd.grad(dense(layer), layer.p, W.grad)[0])

    for i in range(len(s)):
        ends = []
        for h in (1e-5, -1e-5):
            p = layer.p.detach().clone()
            p[i] += h
            ends.append(loss(nn.functional.linear(x, dense(layer, p), layer.bias)).item())
        assert grad[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-5)


def test_scales_of_each_row_equal_a_loop_over_rows():
    layer, x = svf(6, 4, dtype=torch.float32), torch.randn(5, 3, 4)
    layer.scales = layer.scale(torch.rand(5, 4))
    y = in_mode(layer, "rows", x)
    for i, scale in enumerate(layer.scales):
        layer.merge(scale)
        torch.testing.assert_close(y[i], in_mode(layer, "merged", x[i]), rtol=1e-4, atol=1e-5)


def test_p_starts_at_init_with_a_small_spread(tmp_path):
    layer = svf(200, 200, dtype=torch.float32)
    layer.reset(config(tmp_path), torch.Generator().manual_seed(0))
    assert layer.p.mean().item() == pytest.approx(0.1, abs=4e-3)
    assert layer.p.std().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("shape", [*SHAPES, (6, 6)])
def test_thin_svd_is_orthonormal_descending_and_exact_even_without_full_rank(shape):
    W = torch.randn(shape) if shape != (6, 6) else torch.randn(6, 2) @ torch.randn(2, 6)
    U, s, V = transformer2.thin_svd(W.bfloat16())
    r = min(shape)
    assert (U.shape, s.shape, V.shape) == ((shape[0], r), (r,), (shape[1], r))
    assert {U.dtype, s.dtype, V.dtype} == {torch.float32} and V.is_contiguous()
    torch.testing.assert_close(U @ torch.diag(s) @ V.T, W.bfloat16().float(), atol=1e-5, rtol=1e-5)
    for x in (U, V):
        torch.testing.assert_close(x.T @ x, torch.eye(r), atol=1e-5, rtol=0)
    assert (s[:-1] >= s[1:]).all() and (s >= 0).all()


# --- LoRA


def test_lora_starts_as_the_identity_and_merged_equals_unmerged(tmp_path):
    layer, x = transformer2.LoRALinear(nn.Linear(5, 7), 2, 3.0, 0.5).eval(), torch.randn(4, 5)
    layer.reset(config(tmp_path), torch.Generator().manual_seed(0))
    base = in_mode(layer, "base", x)
    assert layer.A.abs().min() > 0 and torch.equal(in_mode(layer, "own", x), base)
    nn.init.normal_(layer.B)
    own = in_mode(layer, "own", x)
    torch.testing.assert_close(own, base + 3 * x @ (layer.B @ layer.A).T)
    layer.merge()
    torch.testing.assert_close(in_mode(layer, "merged", x), own)
    torch.testing.assert_close(in_mode(layer, "base", x), base, rtol=0, atol=0)
    layer.train()
    assert not torch.allclose(in_mode(layer, "own", x), own)  # dropout, on the input of A
    torch.testing.assert_close(in_mode(layer, "base", x), base, rtol=0, atol=0)


def test_lora_starts_with_a_of_variance_one_over_its_inputs(tmp_path):
    layer = transformer2.LoRALinear(nn.Linear(400, 3), 16, 2.0, 0.0)
    layer.reset(config(tmp_path), torch.Generator().manual_seed(0))
    assert layer.A.std().item() == pytest.approx(400**-0.5, rel=0.05) and not layer.B.any()


# --- which layers, and how many numbers


def test_layers_are_found_by_pattern_without_the_head_and_every_other_block_on_request(tmp_path):
    model = transformer2.toy_model(config(tmp_path, layers=4))
    find = lambda *args: list(transformer2.layers_to_adapt(model, *args))  # noqa: E731
    mlp = [f"model.layers.{i}.mlp.{k}_proj" for i in range(4) for k in ("gate", "up", "down")]
    qv = [f"model.layers.{i}.self_attn.{k}_proj" for i in range(4) for k in "qv"]
    assert find(("mlp",)) == mlp and find(("qv",)) == qv
    assert set(find(("mlp", "qv"))) == set(mlp + qv)
    assert find(("mlp",), 2) == mlp[:3] + mlp[6:9]
    assert find(("o_proj",)) == [f"model.layers.{i}.self_attn.o_proj" for i in range(4)]
    assert not any("lm_head" in name for name in find((".",)))
    with pytest.raises(UserError, match=r"matches none of .*layers\.N\.mlp\.up_proj"):
        find(("nothing",))


def test_a_vision_tower_is_never_adapted_and_a_quantised_layer_is_refused(tmp_path):
    model = transformer2.toy_model(config(tmp_path))
    model.vision_tower, model.multi_modal_projector = (nn.ModuleDict({"mlp": nn.Linear(2, 2)}) for _ in "ab")
    assert not any("vision" in n or "projector" in n for n in transformer2.layers_to_adapt(model, (".",)))

    class Linear4bit(nn.Linear):
        pass

    model.model.layers[1].mlp.up_proj = Linear4bit(2, 2)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj is quantised \(Linear4bit\)"):
        transformer2.layers_to_adapt(model, ("mlp",))


def test_parameter_counts_of_llama_3_8b_are_the_papers():
    model = common.meta_model("Llama-3-8B")
    layers = lambda *m: transformer2.layers_to_adapt(model, m).values()  # noqa: E731
    svf_size = lambda *m: sum(min(x.weight.shape) for x in layers(*m))  # noqa: E731
    with torch.device("meta"):
        made = lambda x: transformer2.LoRALinear(x, 16, 2.0, 0.0)  # noqa: E731
        own = lambda x: transformer2.own_parameters(made(x)).values()  # noqa: E731
        lora_size = lambda *m: sum(p.numel() for x in layers(*m) for p in own(x))  # noqa: E731
        assert (svf_size("mlp"), svf_size("qv")) == (393_216, 163_840)
        assert (lora_size("qv"), lora_size("mlp", "qv")) == (6_815_744, 35_127_296)


def test_experts_of_llama_fit_the_language_model_of_llava_next_matrix_by_matrix():
    shapes = []
    for name in ("Llama-3-8B", "llava-hf/llama3-llava-next-8b-hf"):
        layers = transformer2.layers_to_adapt(transformer2.meta_language_model(name), ("mlp",))
        assert not any("vision" in n or "projector" in n for n in layers)
        kinds = [".".join(n.split(".")[-3:]) for n in layers]
        shapes.append(list(zip(kinds, (x.weight.shape for x in layers.values()), strict=True)))
    assert shapes[0] == shapes[1] and len(shapes[0]) == 96


def test_svf_trains_one_number_for_each_singular_value_and_nothing_else(world):
    trained = {n for n, p in world.model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.p" for n in world.adapter.layers} == set(world.adapter.state_dict())
    ranks = [min(x.weight.shape) for x in world.adapter.layers.values()]
    assert [p.numel() for p in world.adapter.parameters()] == ranks


# --- the cache of decompositions


def test_svd_cache_is_read_the_second_time_and_a_torn_file_is_made_anew(tmp_path, monkeypatch):
    cfg = config(tmp_path)
    run, model = Run(cfg, look=True), transformer2.toy_model(cfg)
    layers, folder = transformer2.layers_to_adapt(model, ("qv",)), tmp_path / "svd"
    first = transformer2.decompose(layers, folder, run)
    files = sorted(folder.iterdir())
    assert {f.name for f in files} == {f"{key}.safetensors" for key, _ in first.values()}
    made = []
    real = transformer2.thin_svd
    monkeypatch.setattr(transformer2, "thin_svd", lambda w: made.append(w) or real(w))
    again = transformer2.decompose(layers, folder, run)
    assert not made
    for name, layer in layers.items():
        assert again[name][0] == first[name][0]
        for a, b in zip(first[name][1], again[name][1], strict=True):
            assert torch.equal(a, b)
        U, s, V = again[name][1]
        torch.testing.assert_close(U @ torch.diag(s) @ V.T, layer.weight.detach(), atol=1e-5, rtol=1e-5)
    files[0].write_bytes(files[0].read_bytes()[:-40])
    transformer2.decompose(layers, folder, run)
    assert len(made) == 1
    transformer2.decompose(layers, folder, run)
    assert len(made) == 1 and sorted(folder.iterdir()) == files
    with torch.no_grad():
        next(iter(layers.values())).weight[0, 0] += 1  # other weights, other key: nothing stale is read
    assert transformer2.decompose(layers, folder, run) and len(made) == 2


def test_the_key_of_a_matrix_knows_its_shape_and_type():
    W = torch.randn(4, 6)
    keys = [transformer2.weight_key(x) for x in (W, W.view(6, 4), W.view(torch.int32), W + 1)]
    assert len(set(keys)) == 4 and transformer2.weight_key(W.clone()) == keys[0]
    assert transformer2.weight_key(W.T) == transformer2.weight_key(W.T.contiguous())


# --- Adapter.use


def logits(world):
    ids = torch.arange(12).view(2, 6)
    return world.model(ids).logits.detach()


def test_other_after_an_expert_has_the_base_logits_to_the_bit(tmp_path):
    base = logits(make_world(tmp_path, modules=("o_proj",)))  # the layers compared below are untouched there
    world = make_world(tmp_path)
    assert torch.equal(logits(world), base)
    adapter, z = world.adapter, expert(world.adapter, 1)
    with adapter.use(adapter.scales(z)):
        assert (logits(world) - base).abs().max() > 0.1
        with adapter.use(None):
            assert torch.equal(logits(world), base)
    assert torch.equal(logits(world), base)
    rows = transformer2.expert_rows(world, ["math", "other"], {"math": z})
    with adapter.use(rows):
        mixed = logits(world)
    assert torch.equal(mixed[1], base[1]) and not torch.allclose(mixed[0], base[0], atol=0.1)
    with adapter.use(adapter.scales(z)):
        torch.testing.assert_close(mixed[0], logits(world)[0], atol=1e-3, rtol=1e-3)
    adapter.remove()
    assert torch.equal(logits(world), base)
    assert not any(isinstance(m, SVFLinear) for m in world.model.modules())


@pytest.mark.parametrize("how", ["own", "merged", "one", "rows"])
def test_use_goes_back_to_what_was_before_also_after_an_exception(world, how):
    adapter = world.adapter
    spread_p(adapter)
    scales = adapter.scales(expert(adapter, 1))
    rows = {k: v.expand(2, -1) for k, v in scales.items()}
    what = {"one": scales, "rows": rows}.get(how, how)
    base = logits(world)
    with adapter.use("own"):
        own = logits(world)
        with pytest.raises(ZeroDivisionError), adapter.use(what):
            logits(world)
            raise ZeroDivisionError
        assert torch.equal(logits(world), own)
    assert torch.equal(logits(world), base) and not torch.allclose(own, base, atol=0.1)


@pytest.mark.parametrize("inner", ["merged", "one", "rows", "base"])
@pytest.mark.parametrize("outer", ["merged", "one", "rows"])
def test_one_use_inside_another_leaves_the_outer_weights_as_they_were(world, outer, inner):
    adapter, whats = world.adapter, []
    spread_p(adapter)
    for i, how in enumerate((outer, inner)):
        scales = adapter.scales(expert(adapter, i))
        rows = {k: v.expand(2, -1) for k, v in scales.items()}
        whats.append({"one": scales, "rows": rows, "base": None}.get(how, how))
    with adapter.use(whats[0]):
        before = logits(world)
        with adapter.use(whats[1]):
            inside = logits(world)
        assert torch.equal(logits(world), before)
    assert (inner == outer == "merged") or not torch.allclose(inside, before, atol=0.1)
    assert {x.mode for x in adapter.layers.values()} == {"base"}


def test_own_and_merged_are_the_same_model_and_merging_again_follows_p(world):
    for seed in (0, 1):
        spread_p(world.adapter, seed)
        with world.adapter.use("own"):
            own = logits(world)
        with world.adapter.use("merged"):
            torch.testing.assert_close(logits(world), own, atol=1e-3, rtol=1e-3)


# --- files of experts


def test_an_expert_file_comes_back_as_it_was(world, tmp_path):
    z = expert(world.adapter, 1)
    transformer2.save_expert(tmp_path / "new" / "a.safetensors", world.adapter, z, task="add")
    found = transformer2.load_expert(tmp_path / "new" / "a.safetensors", world.adapter)
    assert list(found) == list(world.adapter.layers)
    assert all(torch.equal(found[k], z[k]) for k in z)


def test_an_expert_of_other_weights_needs_cross_model_and_other_names_go_by_order(world, tmp_path):
    z, layers, file = expert(world.adapter, 1), world.adapter.layers, tmp_path / "a"
    transformer2.save_expert(file, SimpleNamespace(layers=layers, key="else"), z)
    with pytest.raises(UserError, match="other weights"):
        transformer2.load_expert(file, world.adapter)
    names = {name: f"{99 - i}.theirs" for i, name in enumerate(layers)}  # not in alphabetical order
    theirs = SimpleNamespace(layers={names[n]: x for n, x in layers.items()}, key="else")
    transformer2.save_expert(file, theirs, {names[n]: x for n, x in z.items()})
    with pytest.raises(UserError, match="another model: --cross_model"):
        transformer2.load_expert(file, world.adapter)
    found = transformer2.load_expert(file, world.adapter, cross_model=True)
    assert all(torch.equal(found[k], z[k]) for k in z)
    backwards = SimpleNamespace(layers=dict(reversed(layers.items())), key="else")
    transformer2.save_expert(file, backwards, z)
    found = transformer2.load_expert(file, world.adapter, cross_model=True)
    assert all(torch.equal(found[k], z[k]) for k in z)  # equal names win over order


def test_a_wrong_shape_names_the_layer_and_a_torn_file_the_file(world, tmp_path):
    z, layers, file = expert(world.adapter, 1), world.adapter.layers, tmp_path / "a"
    name = list(layers)[3]
    wrong = layers | {name: SimpleNamespace(weight=torch.zeros(2, 3))}
    short = z | {name: torch.ones(2)}
    transformer2.save_expert(file, SimpleNamespace(layers=wrong, key=world.adapter.key), short)
    with pytest.raises(UserError, match=rf"{name} is \[2, 3\], but {name}"):
        transformer2.load_expert(file, world.adapter)
    transformer2.save_expert(file, world.adapter, short)  # right shape, but too few numbers
    with pytest.raises(UserError, match=rf"z of {name} has 2 numbers, but the rank of {name} is 16"):
        transformer2.load_expert(file, world.adapter)
    fewer = SimpleNamespace(layers=dict(list(layers.items())[:2]), key="that of two layers")
    transformer2.save_expert(file, fewer, {k: z[k] for k in fewer.layers})
    with pytest.raises(UserError, match=rf"has 2 layers .*adapts {len(layers)} .*--modules"):
        transformer2.load_expert(file, world.adapter)
    file.write_bytes(file.read_bytes()[:30])
    for bad in (file, tmp_path / "none"):
        with pytest.raises(UserError, match="no expert file"):
            transformer2.load_expert(bad, world.adapter)


def test_an_expert_of_a_float32_model_is_one_of_the_same_model_in_bfloat16(world):
    def key():
        adapter = transformer2.svf_adapter(world.model, world.cfg, world.run)
        adapter.remove()
        return adapter.key

    world.adapter.remove()
    common.cast_parameters(world.model, torch.bfloat16)
    half = key()
    common.cast_parameters(world.model, torch.float32)  # as a CPU loads weights that are kept in bfloat16
    assert key() == half
    with torch.no_grad():
        world.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert key() != half


def test_an_expert_trained_with_g_is_refused_where_there_is_none(world, tmp_path):
    free = make_world(tmp_path, renormalise=False)
    for source, target, said in ((world, free, "true"), (free, world, "false")):
        transformer2.save_expert(tmp_path / "a", source.adapter, expert(source.adapter, 1))
        with pytest.raises(UserError, match=f"trained with --renormalise {said}"):
            transformer2.load_expert(tmp_path / "a", target.adapter)


@pytest.mark.parametrize("about", [{}, {"family": "other"}])
def test_an_expert_without_a_family_is_refused_because_other_means_the_base_weights(world, tmp_path, about):
    files, z = tmp_path / "given", expert(world.adapter, 1)
    world = replace(world, cfg=replace(world.cfg, model="m", experts=str(files)))
    transformer2.save_expert(files / "cls.safetensors", world.adapter, z, family="other")
    transformer2.save_expert(files / "sums.safetensors", world.adapter, z, family="math")
    found = transformer2.given_experts(world)
    assert {k: family for k, (family, _) in found.items()} == {"cls": "other", "sums": "math"}
    transformer2.save_expert(files / "x.safetensors", world.adapter, z, **about)
    with pytest.raises(UserError, match=r"x\.safetensors: its family is 'other', none of math, code"):
        transformer2.given_experts(world)


def test_experts_of_another_model_come_with_a_line_on_their_order(world, tmp_path, capsys):
    transformer2.save_expert(
        tmp_path / "g" / "sums.safetensors", world.adapter, expert(world.adapter, 1), family="math"
    )
    for cross in (False, True):
        cfg = replace(world.cfg, model="m", experts=str(tmp_path / "g"), cross_model=cross)
        transformer2.given_experts(replace(world, cfg=cfg))
        assert capsys.readouterr().out.count("matched by their order") == cross


# --- mixing


def test_a_mixture_is_linear_in_z_and_not_in_p(world):
    experts = [expert(world.adapter, i) for i in range(3)]
    for k in range(3):
        one_hot = transformer2.mix(experts, torch.eye(3)[k])
        assert all(torch.equal(one_hot[n], experts[k][n]) for n in one_hot)
    half = transformer2.mix(experts[:2], torch.tensor([0.5, 0.5]))
    for n, z in half.items():
        a, b = (e[n] for e in experts[:2])
        torch.testing.assert_close(z, (a + b) / 2)
        assert (z - torch.sigmoid((a.logit() + b.logit()) / 2)).abs().max() > 0.02


def test_only_the_direction_of_alpha_matters_and_nothing_but_zeros_counts_as_equal(world):
    experts, alpha = [expert(world.adapter, i) for i in range(3)], torch.tensor([0.2, 0.0, 0.9])
    a, b = (world.adapter.scales(transformer2.mix(experts, x)) for x in (alpha, 3 * alpha))
    for n in a:
        torch.testing.assert_close(a[n], b[n])
    zero, even = (world.adapter.scales(transformer2.mix(experts, torch.full((3,), x))) for x in (0.0, 1.0))
    for n in zero:
        torch.testing.assert_close(zero[n], even[n])


def test_alpha_for_each_layer_goes_to_that_layer_and_equal_columns_are_the_global_mixture(world):
    experts, names = [expert(world.adapter, i) for i in range(2)], list(world.adapter.layers)
    alpha = torch.tensor([0.3, 0.6])
    a, b = (transformer2.mix(experts, x) for x in (alpha, alpha[:, None].expand(2, len(names))))
    assert all(torch.equal(a[n], b[n]) for n in names)
    batch = torch.rand(4, 2, len(names))
    batch[1, :, 2] = 0  # one layer of one member
    found = transformer2.mix(experts, batch)
    for j, n in enumerate(names):
        for i in range(4):
            x = batch[i, :, j] if batch[i, :, j].sum() else torch.ones(2)
            torch.testing.assert_close(found[n][i], x[0] * experts[0][n] + x[1] * experts[1][n])


# --- answers


def test_answers_do_not_depend_on_padding_order_or_batches(world):
    problems, task = problems_of(), hash_task()
    answers, totals = transformer2.complete(world, problems, task)
    assert len({tuple(a) for a in answers}) > 1
    for i in (4, 2, 0, 1, 3, 5):
        one, total = transformer2.complete(world, [problems[i]], task)
        assert one[0] == answers[i]
        torch.testing.assert_close(total[0], totals[i], atol=1e-3, rtol=1e-3)
    by_two = replace(world, cfg=replace(world.cfg, sample_batch=2))
    found, _ = transformer2.complete(by_two, problems[::-1], task)
    assert found[::-1] == answers


def test_uniforms_and_row_scales_stay_with_their_problem_when_batches_are_sorted_by_length(world):
    world = replace(world, cfg=replace(world.cfg, sample_batch=4))
    problems, task, n = problems_of(), hash_task(), len(PROMPTS)
    u = torch.rand(n, task.max_new)
    rows = world.adapter.scales({k: torch.rand(n, len(x.s)) for k, x in world.adapter.layers.items()})
    answers, totals = transformer2.complete(world, problems, task, u, rows)
    for i in range(n):
        with world.adapter.use({k: v[i] for k, v in rows.items()}):
            one, total = transformer2.complete(world, [problems[i]], task, u[i : i + 1])
        assert one[0] == answers[i]
        torch.testing.assert_close(total[0], totals[i], atol=2e-3, rtol=1e-3)


def test_an_answer_ends_with_its_first_eos_and_its_log_prob_is_that_of_the_trained_weights(world):
    spread_p(world.adapter, std=0.5)
    with torch.no_grad():
        world.model.lm_head.weight.mul_(0.05)  # nearly uniform: EOS turns up
    problems, task = problems_of(PROMPTS * 8), hash_task(20)
    u = torch.rand(len(problems), 20)
    with world.adapter.use("merged"):
        answers, totals = transformer2.complete(world, problems, task, u)
    assert sum(world.eos in a for a in answers) > 5
    assert not any(world.eos in a[:-1] for a in answers)
    assert all(len(a) == 20 for a in answers if a[-1] != world.eos)
    with world.adapter.use("own"):
        logp, _, mask = transformer2.answer_scores(world, world.encode(problems), answers, {}, kl=False)
    assert mask.sum(1).tolist() == [len(a) for a in answers]
    torch.testing.assert_close(logp.sum(1).detach(), totals, atol=1e-3, rtol=1e-4)


def test_an_answer_is_cut_after_the_token_that_completes_a_stop(world):
    ids = world.tok.encode("12567$")
    cut = lambda *stops: world.tok.decode(transformer2.cut_at_stop(ids, world, stops))  # noqa: E731
    assert (cut("5"), cut("56"), cut("67", "25"), cut("1"), cut("7")) == ("125", "1256", "125", "1", "12567")
    assert cut("9") == cut() == "12567$"
    assert world.text(ids, ("67", "56")) == "12" and world.text(ids, ()) == "12567"


def test_a_stop_ends_an_answer_and_its_log_prob_counts_what_is_kept(world):
    problems = problems_of()
    whole, _ = transformer2.complete(world, problems, hash_task())
    stop = world.tok.decode(whole[0][1:2])
    answers, totals = transformer2.complete(world, problems, hash_task(stops=(stop,)))
    expected = [a[: a.index(whole[0][1]) + 1] if whole[0][1] in a else a for a in whole]
    assert answers == expected and len(answers[0]) <= 2
    short, total = transformer2.complete(world, problems[:1], hash_task(max_new=len(answers[0])))
    assert short[0] == answers[0]
    torch.testing.assert_close(total[0], totals[0], atol=1e-3, rtol=1e-3)


# --- the loss


def test_reinforce_in_expectation_climbs_the_probability_of_right_minus_wrong():
    layer, x = svf(3, 5), torch.randn(5, dtype=torch.float64)
    reward, inside = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    pi = in_mode(layer, "own", x).softmax(0)
    expected = torch.autograd.grad((pi * reward).sum(), layer.p)[0]
    total = torch.zeros_like(expected)
    for action in range(3):
        logp = layer(x).log_softmax(0)[action].view(1, 1)
        loss = transformer2.reinforce_loss(logp, inside, reward[action : action + 1])
        total -= pi[action].detach() * torch.autograd.grad(loss, layer.p)[0]
    torch.testing.assert_close(total, expected)
    assert expected.abs().max() > 1e-4


def test_reinforce_loss_sums_tokens_averages_answers_and_passes_nothing_outside_the_mask():
    logp, kl = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    with torch.no_grad():
        logp[0, 2], kl[0, 2] = -math.inf, math.nan
    loss = transformer2.reinforce_loss(logp, mask, torch.tensor([1.0, -1.0]), kl, 0.3)
    loss.backward()
    assert loss.isfinite()
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.5, -0.5, 0], [0.5, 0.5, 0.5]]))
    torch.testing.assert_close(kl.grad, 0.15 * mask)
    one = torch.tensor([[-2.0]])
    first = transformer2.reinforce_loss(one, one < 0, torch.ones(1))
    twice = transformer2.reinforce_loss(one.repeat(1, 2), one.repeat(1, 2) < 0, torch.ones(1))
    again = transformer2.reinforce_loss(one.repeat(2, 1), one.repeat(2, 1) < 0, torch.ones(2))
    assert (first.item(), twice.item(), again.item()) == (2.0, 4.0, 2.0)


def test_next_token_loss_is_a_mean_over_tokens():
    logp, mask = torch.tensor([[-1.0, -2.0], [-6.0, -100.0]]), torch.tensor([[True, True], [True, False]])
    assert transformer2.ntp_loss(logp, mask).item() == 3.0
    assert transformer2.ntp_loss(logp, mask & False).item() == 0.0


def test_kl_of_both_directions_is_the_brute_force_sum_and_they_differ():
    new, base = (torch.randn(4, 5, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    for direction, (p, q) in {"base_new": (base, new), "new_base": (new, base)}.items():
        pairs = zip(p.tolist(), q.tolist(), strict=True)
        sums = [sum(math.exp(a) * (a - b) for a, b in zip(*pq, strict=True)) for pq in pairs]
        expected = torch.tensor(sums, dtype=torch.float64)
        torch.testing.assert_close(transformer2.kl_divergence(new, base, direction), expected)
        assert not transformer2.kl_divergence(base, base, direction).any()
        near = (base + 1e-4 * new).log_softmax(-1)
        other = transformer2.kl_divergence(near, base, "base_new" if direction != "base_new" else "new_base")
        torch.testing.assert_close(
            transformer2.kl_divergence(near, base, direction), other, rtol=1e-2, atol=0
        )
    both = [transformer2.kl_divergence(new, base, d) for d in ("base_new", "new_base")]
    assert (both[0] - both[1]).abs().min() > 1e-3


ANSWERS = [[3, 4, 42], [7], [1, 2, 3, 4, 5], [42], [9, 9], [0, 42]]  # 0 is a token like any other
TOKENS = float(sum(map(len, ANSWERS)))


@pytest.mark.parametrize("direction", ["base_new", "new_base"])
def test_answer_scores_are_those_of_full_logits_one_answer_at_a_time(tmp_path, direction):
    world = make_world(tmp_path, kl_dir=direction)
    spread_p(world.adapter)
    prompts, adapter = world.encode(problems_of()), world.adapter
    with adapter.use("own"):
        logp, kl, mask = transformer2.answer_scores(world, prompts, ANSWERS, {}, kl=True, chunk=3)
    brute = []
    for i, (p, a) in enumerate(zip(prompts, ANSWERS, strict=True)):
        ids = torch.tensor([p + a])
        with torch.no_grad(), adapter.use(None):
            base = world.model(ids).logits[0, len(p) - 1 : -1].log_softmax(-1)
        with adapter.use("own"):
            new = world.model(ids).logits[0, len(p) - 1 : -1].log_softmax(-1)
        first, second = (base, new) if direction == "base_new" else (new, base)
        div = (first.exp() * (first - second)).sum(-1)
        lp = new[range(len(a)), a]
        torch.testing.assert_close(logp[i, : len(a)], lp, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(kl[i, : len(a)], div, atol=2e-4, rtol=1e-3)
        assert mask[i].tolist() == [j < len(a) for j in range(5)]
        assert not logp[i, len(a) :].any() and not kl[i, len(a) :].any()
        brute.append((i + 1) * lp.sum() + div.sum())  # uneven weights: no mixing up of answers
    assert kl[mask].min() > 1e-4
    weights = torch.arange(1, 7)[:, None]
    ours = torch.autograd.grad((weights * logp + kl).sum(), adapter.parameters())
    theirs = torch.autograd.grad(torch.stack(brute).sum(), adapter.parameters())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_kl_is_zero_at_a_start_without_noise_and_not_after(tmp_path):
    world = make_world(tmp_path, init_std=0.0)
    world.adapter.reset(world.cfg, torch.Generator())
    prompts = world.encode(problems_of())
    with world.adapter.use("own"):
        _, kl, mask = transformer2.answer_scores(world, prompts, ANSWERS, {}, kl=True)
        assert kl[mask].abs().max() < 1e-5
        spread_p(world.adapter, std=0.1)
        assert transformer2.answer_scores(world, prompts, ANSWERS, {}, kl=True)[1][mask].max() > 1e-3


@pytest.mark.parametrize("objective", ["pg", "ntp"])
def test_gradients_do_not_depend_on_the_size_of_micro_batches(tmp_path, objective):
    world = make_world(tmp_path, lam=0.3)
    spread_p(world.adapter)
    reward = torch.tensor([1.0, -1, -1, 1, 1, -1]) if objective == "pg" else None
    found = []
    for budget in (1, 24, 10**6):
        for p in world.adapter.parameters():
            p.grad = None
        stats = transformer2.accumulate(world, problems_of(), ANSWERS, reward, TOKENS, budget)
        found.append([*stats.values(), *(p.grad for p in world.adapter.parameters())])
    for other in found[:2]:
        for a, b in zip(other, found[2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    with world.adapter.use("own"):
        logp, kl, mask = transformer2.answer_scores(world, world.encode(problems_of()), ANSWERS, {}, kl=True)
    if objective == "pg":
        loss = transformer2.reinforce_loss(logp, mask, reward, kl, 0.3)
        torch.testing.assert_close(found[2][1], kl.sum(1).mean().detach(), atol=1e-4, rtol=1e-3)
    else:
        loss = transformer2.ntp_loss(logp, mask)
        assert found[2][1] == 0
    torch.testing.assert_close(found[2][0], loss.detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_recomputed_layers_give_the_same_gradients_also_with_dropout(tmp_path, lora):
    world = make_world(tmp_path, lora, lam=0.3)
    spread_p(world.adapter, std=0.5)
    world.model.train()
    reward, found = torch.tensor([1.0, -1, -1, 1, 1, -1]), []
    for recompute in (False, True):
        if recompute:
            world.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        transformer2.accumulate(world, problems_of(), ANSWERS, reward, TOKENS, 24)
        found.append([p.grad.clone() for p in world.adapter.parameters()])
        for p in world.adapter.parameters():
            p.grad = None
    assert max(g.abs().max() for g in found[0]) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("objective", ["pg", "ntp"])
def test_an_update_that_runs_out_of_memory_halves_its_batches_and_ends_up_the_same(
    tmp_path, monkeypatch, objective
):
    real, states, sizes = transformer2.answer_scores, [], []

    def runs_out(world, prompts, answers, *more):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.cuda.OutOfMemoryError("simulated")
        return real(world, prompts, answers, *more)

    for scores in (real, runs_out):
        monkeypatch.setattr(transformer2, "answer_scores", scores)
        world = make_world(tmp_path / scores.__name__, steps=1, lam=0.1)
        transformer2.train(world, short_task(world), objective, 0.05)
        states.append(world.adapter.state_dict())
    assert max(sizes) == 8 and set(sizes[-3:]) <= {1, 2, 3}
    for key, p in states[0].items():
        torch.testing.assert_close(states[1][key], p, atol=1e-4, rtol=1e-4)


def test_a_rank_that_runs_out_of_memory_waits_for_no_other_one(world):
    class Alone(Run):
        def mean(self, x):
            raise AssertionError("a collective, which the other ranks do not repeat")

    run = world.run.stage("alone")
    run.__class__ = Alone
    reward = torch.tensor([1.0, -1, -1, 1, 1, -1])
    transformer2.accumulate(replace(world, run=run), problems_of(), ANSWERS, reward, TOKENS, 24)
    assert any(p.grad.any() for p in world.adapter.parameters())


def test_micro_batches_hold_every_index_once_within_the_budget():
    lengths = [5, 1, 9, 3, 3, 20, 2]
    groups = transformer2.batches(lengths, 10)
    assert sorted(i for g in groups for i in g) == list(range(7))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 10 for g in groups)
    assert transformer2.batches(lengths, 10**6) == [sorted(range(7), key=lengths.__getitem__)]


# --- training


def short_task(world):
    rng, tok = np.random.default_rng(0), world.tok
    prompts = [tok.decode(x) for x in transformer2.prompts_to("max", rng.integers(0, 10, (20, 5)), ".")]
    made = [Problem(p, p[2:-1], "1", "12") for p in prompts]
    right = lambda p, text: common.stable_hash(text) % 2 == 0  # noqa: E731
    return Task("coin", "math", {"train": made[:14], "valid": made[14:]}, right, 3)


@pytest.mark.parametrize(("lora", "objective"), [(False, "pg"), (True, "pg"), (True, "ntp")])
def test_a_resumed_training_is_the_uninterrupted_one_to_the_bit(tmp_path, monkeypatch, lora, objective):
    more = dict(lora=lora, save_every=1, modules=("qv",), lam=0.1, steps=3)
    world = make_world(tmp_path / "a", **more)
    whole = transformer2.train(world, short_task(world), objective, 0.05)
    state, start = world.adapter.state_dict(), {k: v * 0 for k, v in world.adapter.state_dict().items()}
    assert any(not torch.equal(whole["last"][k], start[k]) for k in start)

    real, calls = transformer2.update, []

    def dies_in_the_third_update(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    world = make_world(tmp_path / "b", **more)
    monkeypatch.setattr(transformer2, "update", dies_in_the_third_update)
    with pytest.raises(KeyboardInterrupt):
        transformer2.train(world, short_task(world), objective, 0.05)
    monkeypatch.setattr(transformer2, "update", lambda *args: calls.append(args) or real(*args))
    world = make_world(tmp_path / "b", **more, resume=True, micro_tokens=9999)
    found = transformer2.train(world, short_task(world), objective, 0.05)
    assert len(calls) == 4 and calls[-1][-1]["micro_tokens"] == 9999
    assert all(torch.equal(found["last"][k], whole["last"][k]) for k in start)
    assert all(torch.equal(world.adapter.state_dict()[k], state[k]) for k in start)
    assert {k: found[k] for k in ("best", "best_step", "curve")} == {
        k: whole[k] for k in ("best", "best_step", "curve")
    }


def test_the_first_of_the_best_validated_states_is_kept_and_the_last_one_reported(world, monkeypatch):
    states, scripted = [], iter([0.2, 0.9, 0.9, 0.1])

    def outcomes(world, problems, task, rows=None):
        assert problems == task["valid"]
        assert all(x.mode == "merged" for x in world.adapter.layers.values())
        states.append(world.adapter.state_dict())
        return np.array([next(scripted)])

    monkeypatch.setattr(transformer2, "outcomes", outcomes)
    found = transformer2.train(world, short_task(world), "pg", 0.05)
    assert (found["best"], found["best_step"]) == (0.9, 2)
    assert found["curve"] == [[1, 0.2], [2, 0.9], [3, 0.9], [4, 0.1]]
    kept = world.adapter.state_dict()
    assert all(
        torch.equal(kept[k], states[1][k]) and torch.equal(found["last"][k], states[3][k]) for k in kept
    )
    assert any(not torch.equal(states[1][k], states[2][k]) for k in kept)


def test_reinforce_makes_the_rewarded_answer_more_likely(tmp_path):
    world = make_world(tmp_path, steps=40, batch=14, validate_every=40)
    task = replace(short_task(world), grade=lambda p, text: text[:1].isdigit(), max_new=1)
    prompts = world.encode(task["train"])
    ids = torch.tensor(prompts)

    def digits():
        with world.adapter.use("own"), torch.no_grad():
            return world.model(ids).logits[:, -1].softmax(-1)[:, :10].sum(1).mean().item()

    world.adapter.reset(world.cfg, torch.Generator().manual_seed(0))
    before = digits()
    transformer2.train(world, task, "pg", 0.2)
    assert digits() > before + 0.1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rollouts_are_sampled_with_new_numbers_each_step_or_greedy_at_temperature_zero(
    tmp_path, monkeypatch, temperature
):
    world, seen, real = make_world(tmp_path, rollout_temp=temperature, steps=2), [], transformer2.complete

    def complete(world, problems, task, uniforms=None, rows=None):
        if len(problems) == 8:  # a batch of training
            assert len({p.prompt for p in problems}) == 8
            seen.append(uniforms)
        return real(world, problems, task, uniforms, rows)

    monkeypatch.setattr(transformer2, "complete", complete)
    transformer2.train(world, short_task(world), "pg", 0.05)
    if temperature:
        assert seen[0].shape == (8, 3) and not torch.equal(*seen)
    else:
        assert seen == [None, None]


def test_batches_of_equal_rewards_are_told_once_whether_right_or_wrong(world, capsys):
    def told(*rewards):
        record = {"mute": 0}
        for reward in rewards:
            transformer2.warn_of_equal_rewards(world.run, reward, record)
        return [line.split("were ")[1].split(":")[0] for line in capsys.readouterr().out.splitlines()]

    n = world.cfg.warn_after
    assert told(*[-1.0] * (n + 3)) == ["wrong"] and told(*[1.0] * (n + 3)) == ["right"]
    assert told(*[-1.0] * (n - 1), 0.5, *[-1.0] * (n - 1)) == []
    assert told(*[1.0, -1.0] * n) == [] and told(*[-1.0] * 2, *[1.0] * n) == ["right"]


def test_too_few_problems_for_the_batch_are_all_used_and_none_is_an_error(world, capsys):
    task = short_task(world)
    run = SimpleNamespace(world_size=4, print=print)
    assert transformer2.batch_size(replace(world.cfg, batch=8), task, run) == 8
    assert transformer2.batch_size(replace(world.cfg, batch=256), task, run) == 12
    assert "12 prompts a step" in capsys.readouterr().out
    with pytest.raises(UserError, match="too few"):
        transformer2.batch_size(replace(world.cfg, batch=3), task, run)


# --- dispatch and two passes


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (r"It is \boxed{math}.", "math"),
        (r"\boxed{ Code }", "code"),
        (r"\boxed{reasoning} or \boxed{math}", "reasoning"),
        (r"\boxed{poetry} or \boxed{math}", "other"),
        (r"\boxed{other}", "other"),
        (r"\boxed{\text{code}} or \boxed{math}", "other"),
        (r"\boxed{{math}}", "other"),
        (r"\boxed{math", "other"),
        ("math", "other"),
        ("", "other"),
    ],
)
def test_the_first_box_is_the_category_and_what_cannot_be_read_is_other(text, label):
    assert transformer2.parse_boxed_label(text) == label


def test_category_questions_are_split_disjointly_with_every_fifth_in_the_test(world):
    tasks = []
    for op in ("add", "rev"):
        family = transformer2.OPERATIONS[op][0]
        made = [Problem(f"p{op}{i}", f"{op}{i:02}", "") for i in range(30)]
        outside = [Problem("x", f"{op} held out", "")]
        splits = {"train": made, "valid": outside, "test": outside}
        tasks.append(Task(op, family, splits, lambda p, text: False, 1))
    found = transformer2.cls_task(replace(world, cfg=replace(world.cfg, cls_questions=20)), tasks)
    questions = {k: [p.question for p in v] for k, v in found.splits.items()}
    assert questions["test"] == [f"{op}{i:02}" for i in (4, 9, 14, 19) for op in ("add", "rev")]
    assert {k: len(v) for k, v in questions.items()} == {"train": 16, "valid": 16, "test": 8}
    everything = [q for v in questions.values() for q in v]
    assert sorted(everything) == sorted(f"{op}{i:02}" for op in ("add", "rev") for i in range(20))
    for p in found["train"]:
        assert p.target == ("math" if "add" in p.question else "code")
        assert p.prompt == f";#{p.question}=" and p.solution == transformer2.LABELS[p.target]
        assert found.grade(p, p.solution) and not found.grade(p, "o") and not found.grade(p, "?")


def test_the_first_category_questions_are_of_all_categories_also_where_a_task_has_few(world):
    asked = lambda op, n: [Problem(f"p{i}", f"{op}{i}", "") for i in range(n)]  # noqa: E731
    sizes = {"math": 400, "code": 7, "reasoning": 400}
    tasks = [Task(f, f, {"train": asked(f, n)}, lambda p, text: False, 1) for f, n in sizes.items()]
    found = transformer2.cls_task(world, tasks)
    for split in ("train", "valid", "test"):
        first = [p.target for p in found[split][:100]]
        assert abs(first.count("math") - first.count("reasoning")) <= 1 and "code" in first, split


def test_dispatch_shows_the_question_only_and_uses_the_category_expert_if_there_is_one(world, monkeypatch):
    seen = []

    def complete(world, problems, task, uniforms=None, rows=None):
        modes = {x.mode for x in world.adapter.layers.values()}
        seen.append(([p.prompt for p in problems], modes, task.max_new, uniforms, rows))
        return [world.tok.encode("mwyo=?"[i]) for i in range(len(problems))], torch.zeros(len(problems))

    monkeypatch.setattr(transformer2, "complete", complete)
    problems = [Problem(";.secret=", p[2:-1], 0) for p in PROMPTS]
    for z, mode in ((None, "base"), (expert(world.adapter, 1), "merged")):
        labels, cost = transformer2.dispatch(world, problems, z)
        assert labels == ["math", "code", "reasoning", "other", "other", "other"]
        asked = [f";#{p[2:-1]}=" for p in PROMPTS]
        assert seen[-1] == (asked, {mode}, world.cfg.cls_new, None, None)
        assert (cost.read, cost.written) == (sum(map(len, asked)), 6)
    assert {x.mode for x in world.adapter.layers.values()} == {"base"}


@pytest.mark.parametrize("mixed", [True, False])
def test_two_passes_answer_each_problem_with_the_expert_of_its_category(world, monkeypatch, mixed):
    labels = ["math", "other", "code", "math", "reasoning", "other"]  # reasoning has no expert here: base
    monkeypatch.setattr(transformer2, "dispatch", lambda *a: (labels, transformer2.Cost(1, 1, 0.0)))
    world = replace(world, cfg=replace(world.cfg, mixed=mixed))
    experts = {"math": expert(world.adapter, 1), "code": expert(world.adapter, 2)}
    texts = {}
    task = replace(hash_task(), grade=lambda p, text: bool(texts.update({p.target: text}) or p.target % 2))
    right, found, (first, second) = transformer2.two_pass(world, problems_of(), task, experts)
    assert right.tolist() == [0, 1, 0, 1, 0, 1] and found == labels and first.read == 1
    differ = 0
    for i, (p, label) in enumerate(zip(problems_of(), labels, strict=True)):
        z = experts.get(label)
        with world.adapter.use(z and world.adapter.scales(z)):
            answer = transformer2.complete(world, [p], task)[0][0]
        assert texts[i] == world.text(answer, ())
        differ += answer != transformer2.complete(world, [p], task)[0][0]
    assert differ >= 2 and second.read == sum(map(len, PROMPTS))


def test_confusion_counts_true_rows_and_found_columns():
    table = transformer2.confusion(["math", "math", "code", "other"], ["code", "code", "other", "math"])
    expected = np.zeros((4, 4), int)
    expected[0, 1], expected[1, 3], expected[3, 0] = 2, 1, 1
    assert (table == expected).all()


# --- the cross-entropy method


def numpy_cem(score, mean, population, elites, generations, noise):
    std, best, history = np.full_like(mean, 0.5), mean.copy(), []
    for t in range(generations):
        x = np.clip(mean + std * noise[t], 0, 1)
        x[0] = best
        accuracy, tie = score(x)
        order = np.lexsort((-tie, -accuracy))
        best = x[order[0]].copy()
        history.append(accuracy[order[0]])
        top = x[order[:elites]]
        mean, std = top.mean(0), top.std(0, ddof=1)
    return best, mean, history


def steps_and_slope(x):
    """A coarse accuracy, on which many members tie, and a finer second score."""
    return (4 * x[:, 0]) // 1 / 4 + (3 * x[:, 1]) // 1 / 3, -((x - 0.4) ** 2).sum(1)


def test_cem_is_the_textbook_one_with_six_elites_of_32_and_unbiased_std(tmp_path):
    cfg = Config(population=32, out=str(tmp_path))
    assert cfg.elites == 6 and replace(cfg, population=10).elites == 2
    mean, members = torch.full((5,), 0.3, dtype=torch.float64), []

    def score(x):
        members.append(x.clone())
        return steps_and_slope(x)

    found = transformer2.cem(score, mean.clone(), 32, 6, 7, torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    noise = [torch.randn(32, 5, generator=g, dtype=torch.float64).numpy() for _ in range(7)]
    best, end, history = numpy_cem(steps_and_slope, mean.numpy(), 32, 6, 7, noise)
    np.testing.assert_allclose(found["best"].numpy(), best)
    np.testing.assert_allclose(found["mean"].numpy(), end)
    np.testing.assert_allclose(found["history"], history)
    assert (np.diff(found["history"]) >= 0).all() and history[-1] > history[0]
    assert all(((x >= 0) & (x <= 1)).all() for x in members)
    assert torch.equal(members[0][0], mean) and members[0].min() == 0 and members[0].max() == 1


def test_ties_of_cem_are_broken_by_the_second_score_for_best_and_elites():
    mean, first = torch.full((2,), 0.5), []

    def score(x):
        first.append(x.clone())
        return torch.ones(len(x)), x[:, 0]

    found = transformer2.cem(score, mean, 32, 6, 1, torch.Generator().manual_seed(0))
    order = first[0][:, 0].argsort(descending=True, stable=True)
    assert torch.equal(found["best"][0], first[0][:, 0].max())
    torch.testing.assert_close(found["mean"][0], first[0][order[:6], 0].mean())


@pytest.mark.parametrize("rule", ["cem", "random"])
def test_search_never_gets_worse_and_cem_finds_the_top_of_a_quadratic(rule):
    target = torch.tensor([0.25, 0.8, 1.0])
    score = lambda x: (-((x - target) ** 2).sum(1), torch.zeros(len(x)))  # noqa: E731
    g = torch.Generator().manual_seed(0)
    found = transformer2.cem(score, torch.full((3,), 1 / 3), 32, 6, 25, g, rule)
    assert all(a <= b for a, b in zip(found["history"], found["history"][1:], strict=False))
    assert found["history"][-1] > found["history"][0]
    if rule == "cem":
        torch.testing.assert_close(found["best"], target, atol=0.03, rtol=0)
        torch.testing.assert_close(found["mean"], target, atol=0.03, rtol=0)
    else:
        assert torch.equal(found["best"], found["mean"])


@pytest.mark.parametrize(("per_layer", "rule"), [(False, "cem"), (True, "cem"), (False, "random")])
def test_the_mixture_of_few_shots_solves_as_many_as_it_says(world, per_layer, rule):
    experts, shots = [expert(world.adapter, i) for i in range(3)], problems_of()[:4]
    z, alpha, history = transformer2.few_shot(world, experts, shots, hash_task(), per_layer, rule)
    assert alpha.shape == (3, len(world.adapter.layers) if per_layer else 1)
    assert alpha.min() >= 0 and alpha.max() <= 1 and history == sorted(history) and len(history) == 3
    expected = transformer2.mix(experts, alpha)
    assert all(torch.equal(z[k], expected[k]) for k in z)
    with world.adapter.use(world.adapter.scales(z)):
        assert transformer2.outcomes(world, shots, hash_task()).mean() == history[-1]
    fresh = replace(world, run=Run(world.cfg, look=True).stage("test"))
    again = transformer2.few_shot(fresh, experts, shots, hash_task(), per_layer, rule)
    assert torch.equal(again[1], alpha)
    with pytest.raises(ValueError, match="twice"):
        transformer2.few_shot(world, [experts[0], experts[0]], shots, hash_task(), per_layer)


def test_few_shot_ties_go_to_the_likelier_right_answers_per_token(world, monkeypatch):
    experts, shots = [expert(world.adapter, i) for i in range(2)], problems_of()[:3]
    name, values = next(iter(world.adapter.layers)), []

    def complete(world, problems, task, uniforms=None, rows=None):
        value = rows[name][:, 0].double()
        values.extend(value[::3].tolist())
        lengths = [1 + p.target for p in problems]
        right = torch.tensor([p.target != 1 for p in problems])  # a wrong answer's likelihood must not count
        return [[1] * n for n in lengths], torch.where(right, value, -100 * value) * torch.tensor(lengths)

    monkeypatch.setattr(transformer2, "complete", complete)
    task = replace(hash_task(), grade=lambda p, text: p.target != 1)
    world = replace(world, cfg=replace(world.cfg, generations=1))
    z, _, history = transformer2.few_shot(world, experts, shots, task, False)
    assert history == [pytest.approx(2 / 3)] and max(values) - min(values) > 0.01
    assert world.adapter.scales(z)[name][0].item() == pytest.approx(max(values), abs=1e-6)


# --- the built-in task


def test_splits_share_no_digits_and_hold_what_they_say():
    rng, found = np.random.default_rng(0), {}
    for split, (low, high) in transformer2.SPLITS.items():
        x = transformer2.draw_digits(200, 5, split, rng, distinct=True)
        share = transformer2.split_of(x)
        assert ((share >= low) & (share < high)).all() and len(x) == 200
        found[split] = {tuple(row) for row in x.tolist()}
        assert len(found[split]) == 200
    assert len(set().union(*found.values())) == 800
    every = transformer2.split_of(np.indices((10,) * 4).reshape(4, -1).T)
    assert (every < 0.7).mean() == pytest.approx(0.7, abs=0.03)


def test_documents_hold_pretraining_digits_only_and_end_after_their_answer():
    length, n = 5, 400
    ids = transformer2.documents(n, length, np.random.default_rng(0))
    assert ids.shape[1] == 2 * length + 6 and len(ids) == pytest.approx(n, abs=20)
    letters = (ids[:, 2] == transformer2.SYMBOLS.index("C")) & (ids[:, 3] == transformer2.SYMBOLS.index("<"))
    x = ids[:, 4 : 4 + length] - 10 * letters[:, None]
    assert x.min() >= 0 and x.max() <= 9
    assert (transformer2.split_of(x) < transformer2.SPLITS["pretrain"][1]).all()
    eos = transformer2.SYMBOLS.index("$")
    for row in ids:
        kept = row[row >= 0]
        assert kept[-1] == eos and (kept == eos).sum() == 1 and (row[len(kept) :] == -1).all()


@pytest.mark.parametrize(
    ("operation", "digits", "right", "careless"),
    [
        ("add", "47391", "951", "739"),
        ("sub", "47391", "517", "739"),
        ("rev", "01234", "edcba", "abcde"),
        ("rvd", "01234", "43210", "01234"),
        ("max", "07391", "9", "1"),
        ("min", "47391", "1", "1"),
        ("read", "47391", "47391", "47391"),
    ],
)
def test_right_and_careless_answers_by_hand(operation, digits, right, careless):
    tok, x = transformer2.toy_tokenizer(), np.array([[int(c) for c in digits]])
    found = [tok.decode(y[0]) for y in transformer2.answers_to(operation, x)[:2]]
    assert found == [right, careless]


def test_tasks_of_one_seed_are_the_same_and_no_problem_is_in_two_splits(tmp_path):
    cfg = config(tmp_path)
    a, b = (transformer2.toy_task("add", cfg, train=50) for _ in range(2))
    assert a.splits == b.splits and {k: len(v) for k, v in a.splits.items()} == dict(
        train=50, valid=6, test=8
    )
    assert len({p.prompt for v in a.splits.values() for p in v}) == 64
    p = a["test"][0]
    assert a.grade(p, p.target) and not a.grade(p, p.target + "1") and p.prompt == f";.{p.question}="
    other = transformer2.toy_task("add", replace(cfg, seed=1), train=50)
    assert other.splits != a.splits


# --- graders, programs, prompts, real tasks ---


def problem(target):
    return Problem("", "", target)


def test_graders_read_the_answer_that_a_person_would_read():
    number = transformer2.grade_number
    assert number(problem("1,200"), "so 1,200 apples") and not number(problem("1,200"), "so 2,200")
    assert not number(problem("3"), "it is -3") and number(problem("-3"), "it is -3.")
    assert number(problem("0.5"), "half, so .5") and number(problem("0.5"), "it costs $.5.")
    assert (
        number(problem("-0.5"), "-$.5") and number(problem("5"), "it is ...5") and number(problem("5"), "v.5")
    )
    assert number(problem("1,200.5"), "$1,200.50") and number(problem("1200"), "1,200.")
    assert number(problem("1,200"), "so 2,200", grader="reference")  # as the paper's code counts
    choice = transformer2.grade_choice
    assert choice(problem("B"), "A looks right, but the answer is (B).") and choice(problem("C"), "Answer: C")
    assert choice(problem("D"), "Hence D") and not choice(problem("A"), "no idea")
    assert transformer2.grade_math(problem(r"\frac{1}{2}"), r"so \boxed{1} or \boxed{\dfrac{1}{2}}")
    assert not transformer2.grade_math(problem("1"), "1")
    assert transformer2.grade_text(problem("Paris"), "The answer is paris.")
    assert transformer2.grade_text(problem("42"), "12 + 30 = 42 apples")
    assert transformer2.vqa_accuracy(["A cat", "cat", "dog"], "the cat.") == pytest.approx(2 / 3)
    assert transformer2.grade_vqa(problem(["x", "x", "y"]), "X") and not transformer2.grade_vqa(
        problem(["x"]), "x"
    )


@pytest.mark.parametrize(
    "program, passes",
    [
        ("x = 1\nassert x == 1", True),
        ("assert False", False),
        ("while True: pass", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("x = [0] * 10**10", False),
        ("import os\nwhile True: os.fork()", False),
        ("import subprocess; subprocess.run(['true'])", False),
        ("def f(:", False),
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n"
            "    x: int\nassert A(1).x == 1",
            True,
        ),
        ("import numpy", False),
    ],
)
def test_programs_run_to_their_end_within_limits_or_fail(program, passes):
    assert transformer2.run_code(program, 2.0, 512) == passes


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_what_a_program_left_running_is_killed_when_its_leader_is_gone(monkeypatch, tmp_path):
    file = tmp_path / "pid"
    child = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    left = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])"

    def start(program, seconds, megabytes, folder, output):  # as if nothing had stopped it from starting one
        wait = f"\nimport os\nwhile not (os.path.exists({str(file)!r}) and open({str(file)!r}).read()): pass"
        command = [sys.executable, "-c", left + wait + "; import time; time.sleep(0.1)"]
        null = subprocess.DEVNULL
        settings = dict(stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True)
        return subprocess.Popen(command, **settings)

    monkeypatch.setattr(transformer2, "start_program", start)
    assert not transformer2.run_code("", 30.0, 512)
    state = Path(f"/proc/{file.read_text()}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] in "ZX":
            return
        time.sleep(0.1)
    raise AssertionError("it still runs")


def test_two_passes_grade_each_answer_on_one_rank(world, monkeypatch):
    monkeypatch.setattr(transformer2, "dispatch", lambda *a: (["other"] * 6, transformer2.Cost()))
    answers = [[1 + i, world.eos] for i in range(6)]
    monkeypatch.setattr(transformer2, "timed_answers", lambda *a: (answers, transformer2.Cost()))
    seen, run = [], world.run.stage("two")
    task = Task("coin", "math", {}, lambda p, text: seen.append(p.target) or p.target % 2 == 0, 6)
    run.rank, run.world_size = 1, 2
    run.gather = lambda mine: [[True] * 3, mine]
    found, _, _ = transformer2.two_pass(replace(world, run=run), problems_of(), task, {})
    assert seen == [1, 3, 5] and found.tolist() == [1, 0] * 3


def test_threads_that_run_programs_are_divided_among_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(transformer2.os, "cpu_count", lambda: 12)
    threads = lambda: transformer2.code_task("mbpp", "code", {}, Config(model="m")).threads  # noqa: E731
    assert threads() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads() == 3


def chat(template=None, refuses_system=False):
    """A Chat over a stand-in template."""

    class Tok:
        bos_token, chat_template = "<s>", "x"

        def apply_chat_template(self, turns, add_generation_prompt, tokenize):
            return "<s>" + "".join(f"[{t['role']}]{t['content']}" for t in turns) + "[assistant]"

    return transformer2.Chat(Tok(), 0, not refuses_system)


def test_a_template_without_system_role_gets_the_system_text_in_the_users_turn():
    assert chat()("S", "Q") == "<s>[system]S[user]Q[assistant]"
    assert chat(refuses_system=True)("S", "Q", "ok") == "<s>[user]S\n\nQ[assistant]ok"


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_hub_tasks_load_from_local_files_with_the_papers_splits(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"work <<1+1=2>>\n#### {i},000"} for i in range(40)]
    write(tmp_path, "gsm8k-train", rows)
    write(tmp_path, "gsm8k-test", [r | {"question": f"test {i}"} for i, r in enumerate(rows[:30])])
    choices = {"text": ["x", "y"], "label": ["1", "2"]}
    arc = [{"question": f"a{i}", "choices": choices, "answerKey": str(1 + i % 2)} for i in range(30)]
    write(tmp_path, "arc_challenge-test", arc)
    mbpp = [
        {"prompt": f"p{i}", "code": "def f(): return 1", "test_imports": [], "test_list": ["assert f() == 1"]}
        for i in range(310)
    ]
    write(tmp_path, "mbpp-test", mbpp)
    human = [
        {
            "prompt": f"def f{i}():\n",
            "test": "def check(f):\n    assert f() == 1",
            "entry_point": f"f{i}",
            "canonical_solution": "    return 1\n",
        }
        for i in range(20)
    ]
    write(tmp_path, "humaneval-test", human)
    write(tmp_path, "math-test", [{"problem": f"m{i}", "solution": rf"so \boxed{{{i}}}"} for i in range(20)])
    cfg = Config(model="m", data=str(tmp_path), eval_problems=0, code_seconds=5)
    load = lambda name, unseen: transformer2.load_task(name, chat(), cfg, unseen)  # noqa: E731
    gsm = load("gsm8k", False)
    assert [p.question for p in gsm["train"]] == [f"q{i}" for i in range(0, 40, 2)]
    assert [p.question for p in gsm["valid"]] == [f"q{i}" for i in range(1, 40, 2)]
    assert gsm.grade(gsm["test"][3], "it is 3000") and "<<" not in gsm["test"][3].solution
    code = load("mbpp", False)
    assert [len(code[s]) for s in ("train", "valid", "test")] == [200, 100, 10] and code.family == "code"
    assert code.grade(code["test"][0], "def f(): return 1") and not code.grade(
        code["test"][0], "def f(): return 2"
    )
    for name in ("arc_challenge", "humaneval", "math"):
        task = load(name, True)
        shots, test = ([p.question for p in task[s]] for s in ("shots", "test"))
        assert len(shots) == cfg.shots and not set(shots) & set(test), name
    arc = load("arc_challenge", True)
    assert all(p.target == "AB"[int(p.question.split("\n")[0][1:]) % 2] for p in arc["test"])
    assert all(
        task.grade(p, p.solution.removesuffix("```"))
        for task in [load("humaneval", True)]
        for p in task["test"]
    )
    with pytest.raises(UserError, match="humaneval has no training split"):
        load("humaneval", False)
    with pytest.raises(UserError, match="no such task"):
        load("gsm9k", False)
    write(tmp_path, "gsm8k-test", [{"question": "q"}])
    with pytest.raises(UserError, match=r"row 1: no field 'answer'"):
        load("gsm8k", False)


ARC = {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}
MBPP = {"prompt": "p", "code": "c", "test_imports": [], "test_list": ["assert f()"]}


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("gsm8k", {"question": "q", "answer": 12}, "field 'answer' is int, needed: str"),
        ("gsm8k", {"question": "q", "answer": "twelve"}, "field 'answer' ends in no number"),
        ("arc_easy", ARC | {"answerKey": "Z"}, "field 'answerKey' is 'Z', the labels are A, B"),
        ("arc_easy", ARC | {"choices": ["x", "y"]}, "field 'choices' is list, needed: dict"),
        (
            "arc_easy",
            ARC | {"choices": {"text": ["x"], "label": "A"}},
            "field 'choices' needs two lists of one length",
        ),
        ("mbpp", MBPP | {"test_list": []}, "fields 'test_list' and 'test_imports' need lines of text"),
        ("mbpp", MBPP | {"test_list": "assert f()"}, "field 'test_list' is str, needed: list"),
        ("math", {"problem": "p", "solution": "It is 5."}, r"field 'solution' has no \\boxed answer"),
    ],
)
def test_a_faulty_row_is_one_line_with_file_row_and_field(tmp_path, name, row, message):
    good = {"gsm8k": {"question": "q0", "answer": "#### 1"}, "arc_easy": ARC, "mbpp": MBPP}
    good["math"] = {"problem": "p0", "solution": r"\boxed 1"}
    for split in ("train", "test"):
        write(tmp_path, f"{name}-{split}", [good[name], row])
    cfg = Config(model="m", data=str(tmp_path), shots=1)
    with pytest.raises(UserError, match=f"{name}-test.jsonl, row 2: {message}"):
        transformer2.load_task(name, chat(), cfg, name == "math")


def test_a_numeric_solution_in_a_jsonl_is_one_line(tmp_path):
    write(tmp_path, "a", [{"question": "q", "answer": "1"}, {"question": "q2", "answer": "1", "solution": 5}])
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: field 'solution' is no text"):
        transformer2.load_task(f"math={tmp_path}/a.jsonl", chat(), Config(model="m"), False)


@pytest.mark.parametrize("unseen", [False, True])
def test_a_question_that_is_there_twice_is_asked_in_one_split_only(tmp_path, capsys, unseen):
    rows = [{"question": f"q{i // 3}", "answer": str(i // 3)} for i in range(90)]
    write(tmp_path, "twice", [r | {"question": r["question"] + " " * (i % 2)} for i, r in enumerate(rows)])
    task = transformer2.load_task(f"math={tmp_path}/twice.jsonl", chat(), Config(model="m", shots=4), unseen)
    asked = [p.question.strip() for part in task.splits.values() for p in part]
    assert len(set(asked)) == len(asked) and len(asked) == (10 if unseen else 30)
    assert capsys.readouterr().err.count("60 of 90 questions were there before, dropped") == 1


def test_training_questions_that_are_in_the_published_test_are_dropped_and_not_those_of_the_test(
    tmp_path, capsys
):
    row = lambda i: {"question": f"q{i}", "answer": f"#### {i}"}  # noqa: E731
    write(tmp_path, "gsm8k-train", [row(i) for i in (1, 2, 3, 3, 4, 5)])
    write(tmp_path, "gsm8k-test", [row(i) for i in (5, 6, 6, 7)])
    task = transformer2.load_task("gsm8k", chat(), Config(model="m", data=str(tmp_path)), False)
    asked = {k: [p.question for p in part] for k, part in task.splits.items()}
    assert asked == {"train": ["q1", "q3"], "valid": ["q2", "q4"], "test": ["q5", "q6", "q6", "q7"]}
    task = transformer2.load_task("gsm8k", chat(), Config(model="m", data=str(tmp_path), shots=1), True)
    assert sorted(p.question for part in task.splits.values() for p in part) == ["q5", "q6", "q7"]
    assert "2 of 6 questions" in capsys.readouterr().err


def test_two_questions_about_two_pictures_are_two_problems():
    twice = [Problem("p", "What is it?", "", image=object()) for _ in range(2)]
    assert transformer2.distinct("vqa", twice) == twice


def test_full_prints_the_papers_parameter_counts_without_weights_or_data(tmp_path, capsys):
    transformer2.main(["--config", "full", "--dry_run", "--device", "cpu", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    for number in ("393,216", "163,840", "6,815,744", "35,127,296", "openai/gsm8k"):
        assert number in out, number


# --- whole runs ---


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke rung, once: its folder and its command."""
    out = tmp_path_factory.mktemp("smoke")
    command = ["--config", "smoke", "--device", "cpu", "--out", str(out), "--svd", str(out / "svd")]
    transformer2.main(command)
    return out / "transformer2-smoke-s0", command


def test_smoke_leaves_tables_claims_figure_and_experts(smoke):
    folder, _ = smoke
    results = json.loads((folder / "results.json").read_text())
    assert len(results["claims"]) == 11 and results["speed"]["rollout_tokens_per_s"] > 0
    tables = {row["table"].split(":")[0] for row in results["table"]}
    assert {"trained tasks", "unseen tasks"} <= tables and any("another" in t for t in tables)
    assert list(folder.glob("svf@1-0-0/*.safetensors"))


def test_the_figure_draws_mean_and_range_of_all_seeds():
    from matplotlib.figure import Figure

    cfg, units = replace(transformer2.DEMO, sweep=(1.0, 4.0)), [(0, 0), (0, 1)]
    accuracy = lambda u, m: 0.1 + 0.4 * u[1] + 0.05 * m  # noqa: E731
    cells = {
        transformer2.cell_name(k, m, *u): {op: {"test_last": accuracy(u, m)} for op in transformer2.TRAINED}
        for k in transformer2.METHODS
        for m in cfg.sweep
        for u in units
    }
    figure, table = Figure(), np.eye(4) + 1
    transformer2.draw_study(figure, cells, cfg, units, [{"confusion": {"A": table, "B": table}}])
    axes = figure.axes[2]
    assert len(axes.lines) == len(axes.collections) == 3 and "all seeds" in axes.get_title()
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.35, 0.5])
    ends = axes.collections[0].get_paths()[0].vertices
    for x, low, high in ((1.0, 0.15, 0.55), (4.0, 0.3, 0.7)):
        at = ends[ends[:, 0] == x][:, 1]
        assert at.min() == pytest.approx(low) and at.max() == pytest.approx(high)


def test_smoke_resumed_trains_nothing_again_and_reports_the_same(smoke):
    folder, command = smoke
    before = json.loads((folder / "results.json").read_text())
    transformer2.main([*command, "--resume"])
    after = json.loads((folder / "results.json").read_text())
    assert before["claims"] == after["claims"] and before["table"] == after["table"]


@pytest.fixture
def real(tmp_path, bpe_tokenizer):
    """A tiny Llama with a BPE tokenizer in a folder and two files of problems; the flags for them."""
    torch.manual_seed(0)
    common.tiny_lm(len(bpe_tokenizer), 32, 2, context=1024, mlp=48).save_pretrained(tmp_path / "lm")
    bpe_tokenizer.save_pretrained(tmp_path / "lm")
    write(tmp_path, "sums", [{"question": f"What is {i} plus 30?", "answer": i + 30} for i in range(40)])
    write(tmp_path, "words", [{"question": f"Which word is it, {i}?", "answer": "two"} for i in range(40)])
    write(tmp_path, "more", [{"question": f"And {i}?", "answer": i} for i in range(40)])
    flags = {"config": "text", "model": tmp_path / "lm", "out": tmp_path / "out", "svd": tmp_path / "svd"}
    flags |= {"tasks": f"math={tmp_path}/sums.jsonl,reasoning={tmp_path}/words.jsonl", "device": "cpu"}
    flags |= {
        "unseen": f"math={tmp_path}/more.jsonl",
        "steps": 3,
        "batch": 4,
        "validate_every": 2,
        "max_new": 6,
    }
    flags |= {"valid_problems": 4, "eval_problems": 6, "shots": 4, "cls_new": 6, "generations": 2}
    return [str(word) for key, value in flags.items() for word in (f"--{key}", value)]


def test_all_stages_on_a_real_tokenizer_and_resume_reads_what_is_there(real, tmp_path, capsys):
    stages = ["--stages", "experts,cls,lora,eval,adapt"]
    transformer2.main([*real, *stages])
    folder = tmp_path / "out" / "transformer2-text-s0"
    results = json.loads((folder / "results.json").read_text())
    rows = {(r["task"], r["row"]) for r in results["table"] if "row" in r and "task" in r}
    assert {("sums", "SVF"), ("sums", "LoRA, RL"), ("words", "LoRA, next token, last")} <= rows
    assert {("sums", "SVF, last"), ("words", "SVF, last")} <= rows
    assert {("more", x) for x in ("base", "A", "B", "C, weights per layer", "... shuffled")} <= rows
    assert {f.stem for f in (folder / "experts").glob("*.safetensors")} == {"sums", "words", "cls"}
    last = load_file(folder / "last" / "sums.safetensors")
    state = torch.load(folder / "svf-sums" / "checkpoint.pt", weights_only=True)["state"]["adapter"]
    assert all(torch.equal(z, torch.sigmoid(state[f"{name}.p"])) for name, z in last.items())
    kept = {f.name: f.stat().st_mtime_ns for f in folder.rglob("*.safetensors")}
    transformer2.main([*real, *stages, "--resume"])
    after = json.loads((folder / "results.json").read_text())
    assert after["table"] == results["table"] and after["claims"] == results["claims"]
    assert {f.name: f.stat().st_mtime_ns for f in folder.rglob("*.safetensors")} == kept
    given = ["--experts", str(folder / "experts"), "--stages", "eval", "--out", str(tmp_path / "again")]
    transformer2.main([*real, *given])
    again = json.loads((tmp_path / "again" / "transformer2-text-s0" / "results.json").read_text())
    svf = lambda table: [r["accuracy"] for r in table if r.get("row") == "SVF"]  # noqa: E731
    assert svf(again["table"]) == svf(results["table"])


def test_a_single_expert_is_used_but_not_mixed_and_a_line_says_why(real, tmp_path, capsys):
    more = ["--tasks", f"math={tmp_path}/sums.jsonl", "--stages", "experts,eval,adapt"]
    transformer2.main([*real, *more])
    results = json.loads((tmp_path / "out" / "transformer2-text-s0" / "results.json").read_text())
    rows = {r["row"] for r in results["table"] if r.get("task") == "more"}
    assert rows == {"base", "expert of its family", "... shuffled"}
    assert capsys.readouterr().out.count("a single expert") == 1


def test_a_model_that_rescales_its_logits_after_the_head_is_one_line(real, tmp_path, bpe_tokenizer, capsys):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=len(bpe_tokenizer), num_key_value_heads=4, **size))
    model.save_pretrained(tmp_path / "lm")
    with pytest.raises(SystemExit) as e:
        transformer2.main(real)
    error = [x for x in capsys.readouterr().err.splitlines() if x.startswith("transformer2.py")]
    assert e.value.code == 2 and len(error) == 1
    assert "Gemma2ForCausalLM rescales its logits (final_logit_softcapping)" in error[0]


def test_two_gloo_ranks_train_the_same_expert_as_one(real, run_script, tmp_path):
    found = {}
    for ranks in (0, 2):
        out = tmp_path / f"ranks{ranks}"
        more = ["--stages", "experts,eval", "--rollout_temp", "0", "--lam", "0.1", "--out", str(out)]
        run_script(ROOT / "transformer2.py", *real, *more, ranks=ranks)
        found[ranks] = load_file(out / "transformer2-text-s0" / "experts" / "sums.safetensors")
    for name, z in found[0].items():
        torch.testing.assert_close(found[2][name], z, rtol=1e-4, atol=1e-5)
        assert z.std() > 1e-3


def test_layers_computed_again_for_memory_train_the_same_expert(real, tmp_path):
    found = []
    for more in ([], ["--recompute"]):
        out = tmp_path / f"recompute{len(more)}"
        transformer2.main([*real, "--stages", "experts", "--lam", "0.1", "--out", str(out), *more])
        found.append(load_file(out / "transformer2-text-s0" / "experts" / "sums.safetensors"))
    assert all(torch.equal(z, found[1][k]) and z.std() > 1e-3 for k, z in found[0].items())


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("modules", "mlp,[", "[: no pattern of names"),
        ("valid_problems", 0, "must be 1 or more"),
        ("cls_new", 0, "must be 1 or more"),
        ("cls_questions", 4, "must be 5 or more"),
        ("pretrain_steps", 0, "must be 1 or more"),
        ("max_new", -1, "must be 0 or more"),
        ("rollout_temp", -0.5, "must be 0 or more"),
        ("eval_problems", -1, "must be 0 or more"),
        ("sweep", "1,2", "also the fourfold"),
        ("sweep", "0,1,4", "above 0"),
    ],
)
def test_a_setting_without_sense_is_one_line_before_anything_runs(tmp_path, capsys, flag, value, words):
    with pytest.raises(SystemExit) as e:
        transformer2.main([f"--{flag}", str(value), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert e.value.code == 2 and not (tmp_path / "out").exists()
    assert error.count("\n") == 1 and f"--{flag}" in error and words in error


def test_all_test_problems_of_the_built_in_task_are_as_many_as_one_can_wait_for(tmp_path):
    assert len(transformer2.toy_task("add", config(tmp_path, eval_problems=0), train=1)["test"]) == 2000
    assert Config(model="m", eval_problems=0).eval_problems == 0  # all of a file


@pytest.mark.parametrize("steps", [1, 3])
def test_a_base_model_of_few_steps_divides_by_nothing(tmp_path, steps):
    cfg = config(tmp_path, pretrain_steps=steps, gate=0.0)
    assert transformer2.pretrain(Run(cfg, look=True).stage("base-0"), 0)["steps"] == steps


@pytest.mark.parametrize(
    "more, words",
    [
        (["--model", "nowhere/nothing"], "nowhere/nothing"),
        (["--modules", "mlpp"], "matches none of"),
        (["--tasks", "poetry=x.jsonl"], "family must be one of"),
        (["--tasks", "math=nofile.jsonl"], "nofile.jsonl: no such file"),
        (["--experts", "nofolder"], "no .safetensors file"),
        (["--stages", "dance"], "dance"),
        (["--elite", "0.01"], "--elite"),
        (["--sweep", "1,4"], "--sweep and --ablations are of the built-in task"),
        (["--ablations"], "--sweep and --ablations are of the built-in task"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2(real, more, words, capfd):
    with pytest.raises(SystemExit) as e:
        transformer2.main([*real, *more])
    error = [x for x in capfd.readouterr().err.splitlines() if x.startswith("transformer2.py")]
    assert e.value.code == 2 and len(error) == 1 and words in error[0]
