"""namm.py: equations against closed forms and brute force; the memory inside transformers; evolution."""

import dataclasses
import functools
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

import before as common
import namm
from before import Run, UserError

SMOKE = namm.CONFIGS["smoke"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def a_norm(bins=17, seed=0):
    norm = namm.Norm(bins)
    norm.add(torch.rand(50, bins, generator=rng(seed)))
    return norm


def evolved(members=1, seed=0, scale=0.3, scorer="bam", hidden=8, **more):
    """A policy with random parameters that keeps some tokens and drops others."""
    theta = scale * torch.randn(members, namm.parameters(scorer, 25, hidden), generator=rng(seed))
    return namm.Policy("namm", update=32, theta=theta, norm=a_norm(), scorer=scorer, hidden=hidden, **more)


@functools.cache
def llama(layers=2, heads=4, kv=2, vocab=50, seed=0):
    torch.manual_seed(seed)
    lm = common.tiny_lm(vocab, 32, layers, heads, 512, num_key_value_heads=kv, initializer_range=0.3)
    return namm.attach(lm.eval())


def tokens(count, length, vocab=50, seed=0):
    return torch.randint(vocab, (count, length), generator=rng(seed))


@torch.no_grad()
def run_model(lm, ids, policy, cuts=None, block=128, record=False, **more):
    memory = namm.Memory(policy, namm.layers_of(lm), block, record)
    parts = ids.split(cuts or ids.shape[1], 1)
    logits = [lm(part, cache=memory, use_cache=True, **more).logits for part in parts]
    return torch.cat(logits, 1), memory


# --- features ---


def test_frames_are_the_magnitudes_of_torch_stft():
    x = torch.rand(5, 16 + 160, generator=rng())
    ours = namm.spectral_frame(x.unfold(-1, 32, 16))
    theirs = torch.stft(x, 32, 16, window=torch.hann_window(32), center=False, return_complex=True).abs()
    assert torch.allclose(ours, theirs.mT, atol=1e-5)


def test_a_constant_column_has_a_dc_and_one_sideband():
    a = 0.3
    steady = namm.spectral_frame(torch.full((32,), a))
    assert torch.allclose(steady[:2], torch.tensor([16 * a, 8 * a]), atol=1e-5)
    assert steady[2:].abs().max() < 1e-5
    first = namm.spectral_frame(torch.cat([torch.zeros(16), torch.full((16,), a)]))
    assert first[0] == pytest.approx(8.5 * a, abs=1e-5)


def test_moving_average_of_steady_frames_has_its_closed_form():
    frames = torch.full((1, 7, 1), 4.8)
    omega = namm.moving_average(torch.zeros(1, 1), frames, 0.99, 16)
    assert omega.item() == pytest.approx((1 - 0.99 ** (16 * 7)) * 4.8, rel=1e-5)
    parts = namm.moving_average(
        namm.moving_average(torch.zeros(1, 1), frames[:, :3], 0.99, 16), frames[:, 3:], 0.99, 16
    )
    assert torch.allclose(omega, parts)


@pytest.mark.parametrize("k", [0, 5, 15])
def test_an_impulse_is_flat_in_both_frames_and_they_sum_to_it(k):
    x = torch.zeros(48)
    x[16 + k] = 0.7
    both = namm.spectral_frame(x.unfold(0, 32, 16))
    hann = torch.hann_window(32)
    assert torch.allclose(both[0], (0.7 * hann[16 + k]).expand(17), atol=1e-6)
    assert torch.allclose(both[1], (0.7 * hann[k]).expand(17), atol=1e-6)
    assert torch.allclose(both.sum(0), torch.full((17,), 0.7), atol=1e-6)


def test_ages_become_sines_and_cosines_of_four_frequencies():
    age = torch.tensor([0, 3, 40_000])
    r = namm.recency(age)
    for j, nu in enumerate([50_000 ** (-i / 4) for i in range(4)]):
        assert r[:, j] == pytest.approx([math.sin(nu * a) for a in age.tolist()], abs=1e-6)
        assert r[:, 4 + j] == pytest.approx([math.cos(nu * a) for a in age.tolist()], abs=1e-6)


def test_statistics_merged_in_pieces_are_those_of_the_whole():
    x = torch.rand(1000, 17, generator=rng()) * 5
    whole, pieces = namm.Norm(17), namm.Norm(17)
    whole.add(x)
    for part in x.split([1, 499, 300, 200]):
        other = namm.Norm(17)
        other.add(part)
        pieces.merge(other.count, other.mean, other.var)
    assert torch.allclose(pieces.mean, x.double().mean(0), rtol=1e-6)
    assert torch.allclose(pieces.var, x.double().var(0, correction=0), rtol=1e-6)
    assert torch.allclose(whole.var, pieces.var, rtol=1e-9)
    assert torch.allclose(whole(x).mean(0), torch.zeros(17), atol=1e-4)


# --- scorers and selection ---


def test_the_papers_network_has_4172_parameters_in_its_layout():
    assert namm.parameters("bam") == 4172
    theta = torch.arange(4172.0)[None]
    weight1, bias1, weight2, bias2, weight3, bias3 = namm.unpack(theta, "bam", 25, 32)
    assert weight1.shape == (1, 25, 96) and weight1[0, 1, 0] == 96 and bias1[0, 0] == 2400
    assert weight2.shape == (1, 32, 50) and weight2[0, 0, 0] == 2496 and bias2[0, 0] == 4096
    assert weight3[0, 0] == 4146 and bias3[0, 0] == 4171
    assert namm.parameters("mlp") == 25 * 32 + 32 + 32 + 1 and namm.parameters("linear") == 26


def bam_by_hand(theta, u, valid):
    """One sequence (n, 25), token by token."""
    weight1, bias1, weight2, bias2, weight3, bias3 = (x[0] for x in namm.unpack(theta[None], "bam", 25, 32))
    q, k, v = (u @ weight1 + bias1).split(32, -1)
    out = []
    for i in range(len(u)):
        seen = [j for j in range(i, len(u)) if valid[j] or j == i]
        o = (q[i] @ k[seen].T / math.sqrt(32)).softmax(-1) @ v[seen] @ weight2 + bias2
        y = u[i] * (1 + o[25:]) + o[:25]
        out.append(y @ weight3 + bias3[0])
    return torch.stack(out)


def test_scores_of_a_population_are_those_of_its_members_token_by_token():
    theta, u = 0.3 * torch.randn(3, 4172, generator=rng()), torch.randn(3, 2, 9, 25, generator=rng(1))
    valid = torch.ones(3, 2, 9, dtype=torch.bool)
    score = namm.score_tokens(theta, u, None, "bam", 32)
    valid[:, 1, 4:7] = False
    padded = namm.score_tokens(theta, u, valid, "bam", 32)
    for p in range(3):
        for m in range(2):
            assert torch.allclose(score[p, m], bam_by_hand(theta[p], u[p, m], valid[0, 0]), atol=1e-5)
            real = valid[p, m]
            assert torch.allclose(padded[p, m][real], bam_by_hand(theta[p], u[p, m], real)[real], atol=1e-5)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(namm.score_tokens(theta[order], u[order], None, "bam", 32), score[order], atol=1e-6)


def test_a_score_does_not_depend_on_older_tokens():
    theta, u = torch.randn(1, 4172, generator=rng()), torch.randn(1, 1, 12, 25, generator=rng(1))
    score = namm.score_tokens(theta, u, None, "bam", 32)
    u[:, :, :5] += 3
    again = namm.score_tokens(theta, u, None, "bam", 32)
    assert torch.allclose(score[..., 5:], again[..., 5:], atol=1e-5)
    assert (score[..., :5] - again[..., :5]).abs().min() > 1e-3


@pytest.mark.parametrize("scorer", ["mlp", "linear"])
def test_the_ablations_score_each_token_alone(scorer):
    theta = torch.randn(2, namm.parameters(scorer), generator=rng())
    u = torch.randn(2, 3, 7, 25, generator=rng(1))
    parts, score = namm.unpack(theta, scorer, 25, 32), namm.score_tokens(theta, u, None, scorer, 32)
    for p in range(2):
        if scorer == "linear":
            expected = u[p] @ parts[0][p] + parts[1][p]
        else:
            expected = (u[p] @ parts[0][p] + parts[1][p]).relu() @ parts[2][p] + parts[3][p]
        assert torch.allclose(score[p], expected, atol=1e-5)


def selected(score, rule, cap=None, valid=None):
    """Kept places of each row and head as lists."""
    index, kept = namm.select(score, valid, rule, cap)
    if index is None:
        return [[list(range(score.shape[-1]))] * score.shape[1]] * score.shape[0]
    kept = torch.ones_like(index, dtype=torch.bool) if kept is None else kept
    return [[index[n, h][kept[n, h]].tolist() for h in range(index.shape[1])] for n in range(len(index))]


def test_each_head_keeps_as_many_as_the_most_generous_one_and_its_own_best():
    score = torch.randn(5, 3, 20, generator=rng())
    for cap in (None, 6):
        for n, heads in enumerate(selected(score, "ref", cap)):
            s = score[n].clone()
            s[:, -1] = math.inf
            k = min(int((s >= 0).sum(1).max()), cap or 20)
            for h, kept in enumerate(heads):
                assert kept == sorted(s[h].topk(k).indices.tolist()) and kept[-1] == 19
    strict = selected(score, "strict")
    for n, heads in enumerate(selected(score, "ref")):
        for h, kept in enumerate(heads):
            assert strict[n][h] == [j for j in range(20) if score[n, h, j] >= 0 or j == 19]
            assert set(strict[n][h]) <= set(kept)


def test_a_score_of_zero_stays_and_nothing_moves_when_all_do():
    assert namm.select(torch.zeros(2, 2, 5), None, "ref", None) == (None, None)
    score = torch.tensor([[[-1.0, 0.0, -2.0, 3.0, -4.0]]])
    assert selected(score, "ref") == [[[1, 3, 4]]] == selected(score, "strict")
    assert selected(score, "budget", 2) == [[[3, 4]]]


def test_places_that_are_not_valid_are_never_chosen():
    score, valid = torch.ones(2, 1, 6), torch.ones(2, 1, 6, dtype=torch.bool)
    valid[0, 0, 1:4] = False
    assert selected(score, "ref", None, valid) == [[[0, 4, 5]], [[0, 1, 2, 3, 4, 5]]]


# --- the memory in a model ---


def test_full_memory_is_the_stock_model_however_the_tokens_come():
    lm, ids = llama(), tokens(2, 100)
    lm.set_attn_implementation("eager")
    with torch.no_grad():
        stock = lm(ids).logits
    namm.attach(lm)
    for cuts, block in ((100, 128), (7, 128), (1, 5), (64, 3)):
        assert torch.allclose(run_model(lm, ids, namm.Policy("full"), cuts, block)[0], stock, atol=1e-4)


def test_zero_parameters_evict_nothing():
    lm, ids = llama(), tokens(2, 100)
    policy = dataclasses.replace(evolved(), theta=torch.zeros(1, namm.parameters("bam", 25, 8)))
    logits, memory = run_model(lm, ids, policy)
    assert torch.allclose(logits, run_model(lm, ids, namm.Policy("full"))[0], atol=1e-5)
    assert memory.lengths() == [96.0, 96.0] and memory.layers[0].size == 100


@pytest.mark.parametrize("cuts, block", [(1, 128), (7, 128), (16, 16), (50, 13), (130, 128)])
def test_statistics_and_kept_tokens_do_not_depend_on_blocks(cuts, block):
    lm, ids = llama(), tokens(2, 130)
    one, whole = run_model(lm, ids, evolved(), record=True)
    many, parts = run_model(lm, ids, evolved(), cuts, block, record=True)
    assert torch.allclose(one, many, atol=1e-4)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert a.size == b.size and a.padded == b.padded
        for (seen, pos, valid), (seen2, pos2, valid2) in zip(a.log, b.log, strict=True):
            assert seen == seen2 and torch.equal(pos[valid], pos2[valid2])
        kept = a["valid"]
        assert torch.allclose(a["omega"][kept], b["omega"][kept], atol=1e-5)
        waiting = 16 + a.seen % 16
        assert torch.allclose(a["tail"][kept][:, :waiting], b["tail"][kept][:, :waiting], atol=1e-5)


def test_omega_is_the_discounted_sum_of_the_stft_of_whole_attention_columns():
    lm, ids = llama(kv=2), tokens(1, 96)
    policy = dataclasses.replace(evolved(), theta=torch.zeros(1, namm.parameters("bam", 25, 8)))
    _, memory = run_model(lm, ids, policy, cuts=11)
    lm.set_attn_implementation("eager")
    with torch.no_grad():
        attention = lm(ids, output_attentions=True).attentions
    namm.attach(lm)
    for layer, rows in zip(memory.layers, attention, strict=True):
        grouped = rows[0].unflatten(0, (2, 2)).mean(1)  # (H, q, k)
        columns = F.pad(grouped.mT, (16, 0))  # (H, k, 16 + q)
        frames = torch.stft(
            columns.flatten(0, 1), 32, 16, window=torch.hann_window(32), center=False, return_complex=True
        ).abs()  # (H k, F, t)
        g, expected = 0.99**16, 0
        for t in range(frames.shape[-1]):
            expected = g * expected + (1 - g) * frames[..., t]
        assert torch.allclose(layer["omega"][0].flatten(0, 1), expected, atol=1e-5)


def masked_attention(module, query, key, value, attention_mask, scaling=None, visible=None, **kwargs):
    """Dense attention under visible[layer] (N, heads, q, k): the model that a pruned run must equal."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    logits = (query @ key.mT * scaling).masked_fill(~visible[module.layer_idx], -math.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("masked", masked_attention)


def visibility(memory, count, length, heads):
    """Who sees whom in each layer, rebuilt from the log of evictions: (layers, N, heads, q, k)."""
    place = torch.arange(length)
    out = []
    for layer in memory.layers:
        see = (place[:, None] >= place).expand(count, heads, length, length).clone()
        for seen, pos, valid in layer.log:
            kv = pos.shape[1]
            held = torch.zeros(count, kv, length + 1, dtype=torch.bool)
            held.scatter_(2, pos.long().masked_fill(~valid, length), True)
            held = held[..., :length] | (place >= seen)
            see[:, :, seen:] &= held.repeat_interleave(heads // kv, 1)[:, :, None]
        out.append(see)
    return torch.stack(out)


CASES = [
    evolved(), evolved(evict="strict"), evolved(budget=20), evolved(3), evolved(2, budget=24, evict="strict"),
    evolved(2, 1, scorer="mlp", budget=40),
    *(namm.Policy(k, 32, 20, generator=rng()) for k in namm.BASELINES[1:]),
]  # fmt: skip


@pytest.mark.parametrize(
    "policy", CASES, ids=lambda p: f"{p.kind}-{p.evict}-{p.budget}-{p.members}-{p.scorer}"
)
@torch.no_grad()
def test_a_pruned_run_is_a_dense_one_that_masks_what_was_evicted(policy):
    lm, ids = llama(), tokens(2, 140).repeat(policy.members, 1)
    logits, memory = run_model(lm, ids, policy, cuts=23, record=True)
    assert max(layer.size for layer in memory.layers) < 140
    visible = visibility(memory, len(ids), 140, 4)
    assert not visible[:, :, :, -1].all()
    lm.set_attn_implementation("masked")
    dense = lm(ids, visible=visible, use_cache=False).logits
    namm.attach(lm)
    assert torch.allclose(logits, dense, atol=1e-4)


def test_members_in_one_batch_are_the_members_alone():
    lm, ids = llama(), tokens(2, 100)
    three = evolved(3)
    together, memory = run_model(lm, ids.repeat(3, 1), three, record=True)
    for p in range(3):
        alone, single = run_model(
            lm, ids, dataclasses.replace(three, theta=three.theta[p : p + 1]), record=True
        )
        assert torch.allclose(together[2 * p : 2 * p + 2], alone, atol=1e-4)
        for a, b in zip(memory.layers, single.layers, strict=True):
            rows = slice(2 * p, 2 * p + 2)
            assert a.log[-1][1][rows][a.log[-1][2][rows]].tolist() == b.log[-1][1][b.log[-1][2]].tolist()


def test_shifted_positions_change_nothing_and_reindexed_keys_would():
    lm, ids = llama(), tokens(1, 100)
    logits, memory = run_model(lm, ids, evolved(), record=True)
    more = {"position_ids": torch.arange(1000, 1100)[None]}
    shifted, other = run_model(lm, ids, evolved(), record=True, **more)
    assert torch.allclose(logits, shifted, atol=1e-3)
    for a, b in zip(memory.layers, other.layers, strict=True):
        assert all(torch.equal(x[1], y[1]) for x, y in zip(a.log, b.log, strict=True))
    with torch.no_grad():
        kept_place = lm(ids[:, :1], cache=memory, use_cache=True).logits
        wrong = run_model(lm, ids, evolved())[1]
        reindexed = lm(ids[:, :1], cache=wrong, use_cache=True, position_ids=torch.tensor([[60]])).logits
    assert (kept_place - reindexed).abs().max() > 1e-3


def test_grouped_heads_are_repeated_ones_whose_attention_is_averaged():
    policy, other = evolved(), evolved()
    layer, copy = namm.LayerMemory(policy, 0), namm.LayerMemory(other, 0)
    q, k, v = (torch.randn(1, h, 31, 8, generator=rng(i)) for i, h in enumerate((4, 2, 2)))
    out = layer.attend(q, k, v, 0.3)
    same = copy.attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), 0.3)
    assert torch.allclose(out, same, atol=1e-6)
    assert torch.allclose(layer["omega"], copy["omega"].unflatten(1, (2, 2)).mean(2), atol=5e-2)
    assert torch.allclose(
        layer["tail"][..., 16:31], copy["tail"][..., 16:31].unflatten(1, (2, 2)).mean(2), atol=1e-6
    )


def test_permuting_heads_permutes_what_is_kept():
    q, k, v = (torch.randn(1, 3, 64, 8, generator=rng(i)) for i in range(3))
    order, sets = torch.tensor([2, 0, 1]), []
    for x in ((q, k, v), (q[:, order], k[:, order], v[:, order])):
        layer = namm.LayerMemory(evolved(seed=3, evict="strict"), 0)
        layer.attend(*x, 0.35)
        sets.append([layer["pos"][0, h][layer["valid"][0, h]].tolist() for h in range(3)])
    assert sets[1] == [sets[0][h] for h in order] and len({len(s) for s in sets[0]}) > 1


def attention_of(layer, cuts):
    """One layer of keys that attract in turn: its rows of attention (q, k), and the layer, fed in pieces."""
    q, k, v = (torch.randn(1, 1, 32, 8, generator=rng(i)) for i in range(3))
    for part in zip(*(x.split(cuts, 2) for x in (q, k, v)), strict=True):
        layer.attend(*part, 1.0)
    causal = torch.ones(32, 32).tril().bool()
    return (q[0, 0] @ k[0, 0].T).masked_fill(~causal, -math.inf).softmax(-1)


def test_h2o_keeps_what_was_attended_to_most_and_snap_what_the_last_queries_attended_to():
    for kind, newest in (("h2o", 5), ("snap", 8)):
        layer = namm.LayerMemory(namm.Policy(kind, 32, 10), 0)
        rows = attention_of(layer, 7)
        score = rows.sum(0) if kind == "h2o" else rows[-8:].sum(0)
        best = score[: 32 - newest].topk(10 - newest).indices.tolist()
        assert layer["pos"][0, 0].tolist() == sorted(best) + list(range(32 - newest, 32))


def test_random_is_no_order_of_positions_and_two_draws_differ():
    kept = []
    for seed in (0, 1):
        layer = namm.LayerMemory(namm.Policy("random", 32, 10, generator=rng(seed)), 0)
        attention_of(layer, 32)
        kept.append(layer["pos"][0, 0].tolist())
    assert kept[0] != kept[1] and min(kept[0] + kept[1]) < 22


def test_scores_see_ages_from_the_newest_token_and_no_padding():
    lm, ids, three = llama(), tokens(2, 95), evolved(3)
    _, memory = run_model(lm, ids.repeat(3, 1), three)
    layer = memory.layers[0]
    assert layer.padded
    score = namm.namm_score(layer).unflatten(0, (3, 2))
    u = torch.cat([namm.recency(94 - layer["pos"]), three.norm(layer["omega"])], -1).unflatten(0, (3, 2))
    valid = layer["valid"].unflatten(0, (3, 2))
    for p in range(3):
        for b in range(2):
            for h in range(2):
                real = valid[p, b, h]
                alone = u[p, b, h][real][None, None]
                expected = namm.score_tokens(three.theta[p : p + 1], alone, None, "bam", 8)[0, 0]
                assert torch.allclose(score[p, b, h][real], expected, atol=1e-4)
    ages = (94.0 - layer["pos"])[layer["valid"]]
    first = [(94.0 - x["pos"])[x["valid"]].mean() for x in memory.layers]
    assert memory.summary()["mean age"] == pytest.approx(float(np.mean(first)), rel=1e-5) and ages.min() == 0


@pytest.mark.parametrize("kind", namm.BASELINES[1:])
def test_the_newest_token_stays_in_the_smallest_cache(kind):
    lm, ids = llama(), tokens(2, 64)
    _, memory = run_model(lm, ids, namm.Policy(kind, 32, 2, generator=rng()), record=True)
    assert all((pos[..., -1] == seen - 1).all() for layer in memory.layers for seen, pos, _ in layer.log)


@pytest.mark.parametrize("kind", namm.BASELINES[1:])
def test_baselines_hold_exactly_their_budget_between_updates(kind):
    lm, ids = llama(), tokens(2, 140)
    _, memory = run_model(lm, ids, namm.Policy(kind, 32, [20, 28], generator=rng()), record=True)
    for layer, budget in zip(memory.layers, (20, 28), strict=True):
        assert [pos.shape[-1] for _, pos, _ in layer.log] == [budget] * 4
        assert layer.size == budget + 140 - 128
        last = layer.log[-1][1]
        if kind == "recency":
            assert (last == torch.arange(128 - budget, 128)).all()
        if kind == "streaming":
            assert (last == torch.tensor([*range(4), *range(128 - budget + 4, 128)])).all()
        if kind in ("h2o", "snap"):
            newest = {"h2o": budget // 2, "snap": 8}[kind]
            assert (last[..., -newest:] == torch.arange(128 - newest, 128)).all()


def test_attention_that_h2o_sums_is_one_for_each_query():
    lm, ids = llama(), tokens(2, 100)
    _, memory = run_model(lm, ids, namm.Policy("h2o", 512, 20), cuts=7)
    for layer in memory.layers:
        assert torch.allclose(layer["mass"].sum(-1), torch.full((2, 2), 100.0), rtol=1e-5)


def test_key_norms_are_those_before_the_rotation():
    lm, ids = llama(layers=1), tokens(1, 20)
    _, memory = run_model(lm, ids, namm.Policy("l2", 512, 20))
    attention = lm.model.layers[0]
    with torch.no_grad():
        raw = attention.self_attn.k_proj(attention.input_layernorm(lm.model.embed_tokens(ids)))
    expected = -raw.view(20, 2, 8).norm(dim=-1).T
    assert torch.allclose(namm.l2_score(memory.layers[0])[0], expected, atol=1e-4)


def test_the_memory_really_shrinks_and_says_by_how_much():
    lm, ids = llama(), tokens(1, 256)
    _, full = run_model(lm, ids, namm.Policy("full"))
    _, small = run_model(lm, ids, evolved(budget=16))
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    assert full.summary()["KV bytes"] == 256 * per_token
    assert small.summary()["KV bytes"] == 16 * per_token
    held = sum(
        x.untyped_storage().nbytes() for layer in small.layers for k, x in layer.store.items() if k in "kv"
    )
    assert held == (16 + 32) * per_token
    assert small.lengths() == [16.0, 16.0] and small.summary()["seen"] == 256


def test_attention_is_made_for_a_block_of_queries_at_a_time(monkeypatch):
    seen, learn = [], namm.LayerMemory.learn
    monkeypatch.setattr(
        namm.LayerMemory, "learn", lambda layer, rows: (seen.append(rows.shape), learn(layer, rows))
    )
    run_model(llama(), tokens(1, 200), evolved(budget=16), block=20)
    assert max(shape[2] for shape in seen) == 20 and max(shape[3] for shape in seen) == 16 + 32


def test_bfloat16_models_keep_float32_statistics():
    lm = llama(seed=3).to(torch.bfloat16)
    _, memory = run_model(lm, tokens(1, 70), evolved(budget=20))
    assert memory.layers[0]["omega"].dtype == torch.float32 and memory.layers[0]["k"].dtype == torch.bfloat16
    assert not memory.bad().any()


ARCHITECTURES = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "mistral": {"sliding_window": None}, "phi": {},
    "olmo": {},
    "granite": {}, "gpt_neox": {"num_key_value_heads": 4}, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "starcoder2": {"sliding_window": None}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_any_causal_model_takes_a_memory_unchanged(kind):
    torch.manual_seed(0)
    size = dict(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    size |= dict(num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0) | ARCHITECTURES[kind]
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size)).eval()
    ids = tokens(2, 80)
    stock = lm(ids).logits
    namm.attach(lm)
    assert torch.allclose(run_model(lm, ids, namm.Policy("full"), 9)[0], stock, atol=1e-4)
    _, memory = run_model(lm, ids, evolved(budget=20))
    assert [layer.size for layer in memory.layers] == [36, 36]


@torch.no_grad()
def test_greedy_text_is_that_of_generate_also_through_the_memory():
    lm, ids = llama(), tokens(2, 60)
    ours = namm.greedy(lm, ids, namm.Memory(namm.Policy("full"), 2), 12, chunk=17)
    lm.set_attn_implementation("sdpa")
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    stock = lm.generate(ids, attention_mask=torch.ones_like(ids), **options)
    namm.attach(lm)
    assert torch.equal(ours, stock[:, 60:])
    pruned = namm.greedy(lm, ids[:1], namm.Memory(evolved(budget=20), 2), 12)
    theirs = lm.generate(ids[:1], cache=namm.Memory(evolved(budget=20), 2), **options)
    assert torch.equal(pruned, theirs[:, 60:])


def test_what_a_memory_cannot_follow_is_refused_in_a_line():
    size = dict(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    sliding = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gemma2", **size, num_key_value_heads=2, head_dim=8)
    )
    with pytest.raises(UserError, match="sliding_attention; a memory needs full attention"):
        namm.attach(sliding)
    lm, ids = llama(), tokens(2, 10)
    with pytest.raises(UserError, match="needs cache=Memory"):
        lm(ids)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(UserError, match="without padding"):
        lm(ids, attention_mask=mask, cache=namm.Memory(namm.Policy("full"), 2))
    with pytest.raises(UserError, match="without padding"):
        lm(ids, mask, cache=namm.Memory(namm.Policy("full"), 2))
    with pytest.raises(ValueError, match="needs a budget"):
        namm.Policy("h2o")
    with pytest.raises(ValueError, match="no policy h3o"):
        namm.Policy("h3o", budget=4)


def test_ntk_scaling_gives_the_papers_base():
    lm = common.tiny_lm(10, 256, 1, 2, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    namm.stretch_rope(lm, 4.0)
    assert lm.config.rope_parameters["rope_theta"] == pytest.approx(3.6098e6, rel=1e-4)
    expected = 3.6098e6 ** (-torch.arange(0, 128, 2) / 128)
    assert torch.allclose(lm.model.rotary_emb.inv_freq, expected, rtol=1e-4)
    before = llama().model.rotary_emb.inv_freq.clone()
    namm.stretch_rope(llama(), 1.0)
    assert torch.equal(before, llama().model.rotary_emb.inv_freq)


# --- CMA-ES ---


def test_constants_of_the_papers_size():
    es = namm.CMAES(4172, 32, 0.065, "none")
    assert es.mueff == pytest.approx(9.179, abs=1e-3) and es.c1 == pytest.approx(1.15e-7, rel=1e-2)
    assert es.cmu == pytest.approx(8.37e-7, rel=1e-2) and es.cs == pytest.approx(2.67e-3, rel=1e-2)
    assert es.weights[:16].sum() == pytest.approx(1) and (es.weights[16:] < 0).all()
    assert es.lazy == 24 or es.lazy == 25


def tutorial_step(state, x, f, c1, cmu, cs, ds, cc, mueff, weights, generation):
    """One generation of Hansen's tutorial (1604.00772), Table 1 and Figure 6, in plain numpy."""
    m, sigma, C, ps, pc = state
    n, mu = len(m), len(weights) // 2
    y = (x[np.argsort(-f, kind="stable")] - m) / sigma
    yw = weights[:mu] @ y[:mu]
    values, B = np.linalg.eigh(C)
    inverse_root = B @ np.diag(values**-0.5) @ B.T
    m = m + sigma * yw
    ps = (1 - cs) * ps + np.sqrt(cs * (2 - cs) * mueff) * inverse_root @ yw
    chi = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
    h = float(
        np.linalg.norm(ps) / np.sqrt(1 - (1 - cs) ** (2 * (generation + 1))) < (1.4 + 2 / (n + 1)) * chi
    )
    pc = (1 - cc) * pc + h * np.sqrt(cc * (2 - cc) * mueff) * yw
    w = [v if v >= 0 else v * n / np.linalg.norm(inverse_root @ y[i]) ** 2 for i, v in enumerate(weights)]
    rank_mu = sum(v * np.outer(y[i], y[i]) for i, v in enumerate(w))
    C = (
        (1 + c1 * (1 - h) * cc * (2 - cc) - c1 - cmu * weights.sum()) * C
        + c1 * np.outer(pc, pc)
        + cmu * rank_mu
    )
    return m, sigma * np.exp(cs / ds * (np.linalg.norm(ps) / chi - 1)), C, ps, pc


def test_generations_are_those_of_the_tutorial():
    es, n = namm.CMAES(6, 10, 0.5, "full", lazy=1), 6
    state = (np.zeros(n), 0.5, np.eye(n), np.zeros(n), np.zeros(n))
    for g in range(30):
        x = es.ask(rng(g))
        f = -((x - 1) * torch.arange(1, 7)).square().sum(1)
        es.tell(x, f)
        rates = (es.c1, es.cmu, es.cs, es.ds, es.cc, es.mueff, es.weights.numpy(), g)
        state = tutorial_step(state, x.numpy(), f.numpy(), *rates)
        for ours, theirs in zip((es.mean, es.sigma, es.C, es.path_sigma, es.path_c), state, strict=True):
            assert np.allclose(ours, theirs, atol=1e-9)
        assert torch.linalg.eigvalsh(es.C).min() > 0


FUNCTIONS = {
    "sphere": lambda x: (x**2).sum(-1),
    "ellipsoid": lambda x: ((1000 ** (np.arange(8) / 7) * x) ** 2).sum(-1),
    "rosenbrock": lambda x: (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_many_generations_as_the_cma_package(name):
    cma = pytest.importorskip("cma")
    f, ours, theirs = FUNCTIONS[name], [], []
    for seed in range(3):
        es = namm.CMAES(8, 12, 0.5, "full")
        es.mean += 0.7
        while f(es.mean.numpy()) > 1e-9 and es.generation < 2000:
            x = es.ask(rng(seed + es.generation * 10))
            es.tell(x, -torch.from_numpy(f(x.numpy())))
        ours.append(es.generation)
        options = {"popsize": 12, "seed": seed + 1, "verbose": -9, "tolfun": 0, "tolx": 0, "tolfunhist": 0}
        other = cma.CMAEvolutionStrategy(8 * [0.7], 0.5, options)
        while f(np.asarray(other.mean)) > 1e-9 and other.countiter < 2000:
            x = other.ask()
            other.tell(x, [f(v) for v in x])
        theirs.append(other.countiter)
    assert max(ours) < 2000 and 0.6 < np.mean(ours) / np.mean(theirs) < 1.6


def test_only_the_order_of_fitness_matters_and_not_the_members_names():
    one, two, three = (namm.CMAES(5, 8, 0.3, "full") for _ in range(3))
    for g in range(5):
        x = one.ask(rng(g))
        f = -(x - 2).square().sum(1)
        order = torch.randperm(8, generator=rng(g))
        two.ask(rng(g)), three.ask(rng(g))  # renews their eigenvectors
        one.tell(x, f)
        two.tell(x, (f / 5).exp())
        three.tell(x[order], f[order])
    assert torch.equal(one.mean, two.mean) and torch.allclose(one.C, three.C, atol=1e-12)


def test_the_diagonal_variant_is_the_diagonal_of_the_full_one_at_its_rates():
    full, diag = namm.CMAES(5, 8, 0.3, "full"), namm.CMAES(5, 8, 0.3, "diag")
    assert diag.c1 == pytest.approx(full.c1 * 7 / 3)
    diag.c1, diag.cmu, diag.weights = full.c1, full.cmu, full.weights
    x = full.ask(rng())
    full.tell(x, -x.square().sum(1))
    diag.tell(x, -x.square().sum(1))
    assert torch.allclose(full.C.diagonal(), diag.C, atol=1e-12) and full.sigma == diag.sigma


def test_without_covariance_only_mean_and_step_move():
    es = namm.CMAES(12, 8, 1.0, "none")
    es.mean += 2
    for g in range(300):
        x = es.ask(rng(g))
        es.tell(x, -x.square().sum(1))
    assert torch.equal(es.C, torch.ones(12, dtype=torch.float64)) and es.mean.square().sum() < 1e-8


def test_the_diagonal_variant_samples_from_its_diagonal():
    es = namm.CMAES(4, 8, 0.5, "diag")
    for g in range(5):
        x = es.ask(rng(g))
        es.tell(x, -(x * torch.tensor([100.0, 1, 1, 1])).square().sum(1))
    z = torch.randn(8, 4, dtype=torch.float64, generator=rng(9))
    assert torch.allclose(es.ask(rng(9)), es.mean + es.sigma * es.C.sqrt() * z) and es.C.std() > 1e-3


def test_a_search_that_is_stored_goes_on_alike():
    one, two = namm.CMAES(6, 8, 0.3, "full"), namm.CMAES(6, 8, 0.3, "full")
    for g in range(6):
        if g == 3:
            two.load_state_dict(one.state_dict())
        for es in (one, two) if g >= 3 else (one,):
            x = es.ask(rng(g))
            es.tell(x, -(x - 1).square().sum(1))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(
        one.state_dict().values(), two.state_dict().values(), strict=True))  # fmt: skip


# --- tasks ---


@pytest.mark.parametrize("kind", namm.KINDS)
def test_ledgers_ask_for_the_latest_value(kind):
    size = namm.Ledger(4, 3, 5)
    ids, labels = namm.ledger(6, 200, kind, size, rng())
    sets, asks = namm.KINDS[kind]
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        assert row[0] == 0 and sorted((x - 1) // 3 for x in row[1:5]) == [0, 1, 2, 3]
        now = {}
        for token, label in zip(row, wanted, strict=True):
            if 1 <= token <= 12:
                now[(token - 1) // 3] = (token - 1) % 3
            assert label == (now[token - 13] if 13 <= token < 17 else -100)
    assert (labels >= 0).float().mean() == pytest.approx(asks, abs=0.05)
    assert ((ids[:, 5:] >= 1) & (ids[:, 5:] <= 12)).float().mean() == pytest.approx(sets, abs=0.03)


def test_corridors_turn_where_the_latest_signal_said():
    state, right, junction = namm.corridor(4, 120, rng())
    for row, turn, here in zip(state, right.tolist(), junction.tolist(), strict=True):
        now = {}
        for x, t, j in zip(row.tolist(), turn, here, strict=True):
            assert x[13] == float(j) and (not j or sum(x[6:12]) == 1)
            if x[12]:
                now[x[:6].index(1.0)] = int(x[14] > 0)
            if j and x[6:12].index(1.0) in now:
                assert t == now[x[6:12].index(1.0)]


def test_a_rollout_with_the_whole_cache_is_the_forward_pass_on_what_it_did():
    model = namm.DecisionTransformer(24).eval()
    namm.attach(model.backbone)
    corridors = namm.corridor(3, 24, rng())
    seen = []
    forward = model.forward
    model.forward = lambda *args: seen.append(forward(*args)) or seen[-1]
    got, memory = namm.rollout(model, namm.Policy("full"), corridors, "cpu")
    state, right, junction = corridors
    turns = torch.cat([x[:, -1:].argmax(-1) for x in seen], 1)
    reward = (junction & (turns == right)).float()
    scale = junction.sum(1).clamp(min=1)
    assert torch.allclose(got, reward.sum(1) / scale) and memory.layers[0].seen == 3 * 24 - 1
    to_go = 1 - (reward.cumsum(1) - reward) / scale[:, None]
    inputs = model.interleave(to_go, state, torch.where(junction, turns, 2))
    time = torch.arange(24).repeat_interleave(3)[None].expand(3, -1)
    model.backbone.set_attn_implementation("eager")
    with torch.no_grad():
        logits = forward(inputs, time)[:, 1::3]
    assert torch.allclose(logits, torch.cat([x[:, -1:] for x in seen], 1), atol=1e-4)


def test_scores_of_questions_start_after_the_first_quarter():
    size, cfg = namm.Ledger(4, 3, 5), dataclasses.replace(SMOKE, length=64)
    torch.manual_seed(0)
    model = namm.ledger_lm((16, 1, 2, 2), size, 256).eval()
    task = namm.LedgerTask(cfg, model, "dense", size, 64, "cpu")
    piece = task.draw(5, rng())[0]
    scores, _ = task.run(namm.Policy("full"), piece)
    with torch.no_grad():
        answer = model(piece[0], cache=namm.Memory(namm.Policy("full"), 1)).logits[..., :3].argmax(-1)
    for i in range(5):
        late = [t for t in range(16, 64) if piece[1][i, t] >= 0]
        assert scores[0, i] == pytest.approx(np.mean([float(answer[i, t] == piece[1][i, t]) for t in late]))


# --- metrics and data; the numbers are those of LongBench's own scorer (rouge 1.0.1, fuzzywuzzy 0.18) ---


@pytest.mark.parametrize(
    "task, said, right, classes, score",
    [
        ("lb/qasper", "The cat, sat.", "a cat sat down", None, 0.8),
        ("lb/qasper", "", "a cat", None, 0.0),
        ("lb/passage_retrieval_en", "Paragraph 3 or 12", "Paragraph 12", None, 0.5),
        ("lb/passage_retrieval_zh", "段落7", "段落7", None, 1.0),
        ("lb/passage_count", "5", "5", None, 1.0),
        ("lb/trec", "Other location City", "City", ["City", "Other location", "Food"], 0.5),
        ("lb/lcc", "\n# comment\nreturn x + 1\n", "return x + 2", None, 0.92),
        ("inf/passkey", "The key is 71432.", "71432", None, 1.0),
        ("inf/math_find", "about 3.50", "3.5", None, 1.0),
        ("inf/kv_retrieval", 'value: "ab-12"', "ab-12", None, 1.0),
        ("inf/longbook_choice_eng", "The answer is: B", "B", None, 1.0),
        ("inf/longbook_choice_eng", "C. no", "B", None, 0.0),
        ("inf/math_calc", "[1, 4, 9]", "1 4 8 9", None, 0.5),
        ("inf/code_run", "The value is 12.", "12", None, 1.0),
        ("inf/longbook_qa_chn", "北京市", "北京", None, 0.8),
    ],
)
def test_metrics(task, said, right, classes, score):
    assert namm.METRICS[task][0](said, right, classes) == pytest.approx(score, abs=1e-6)


def test_rouge_counts_each_distinct_word_of_the_union_of_subsequences_once():
    said = "the committee met on monday. it approved the new budget. the budget is large"
    right = "the new budget was approved by the committee. it met monday"
    assert namm.rouge_l(said, right, None) == pytest.approx(0.6666666616780046, abs=1e-6)
    assert namm.rouge_l("", "words", None) == 0.0
    said, right = "The board met on Monday. \n", "The board met in June. It approved"
    assert namm.rouge_l(said, right, None) == pytest.approx(0.4615384565680473, abs=1e-6)


def test_needles_hide_codes_in_real_text_and_halves_do_not_meet(tmp_path, bpe_tokenizer):
    text = " ".join(f"This is sentence number {i} of the book." for i in range(800))
    (tmp_path / "book.txt").write_text(text)
    parts = {}
    for part in ("evolve", "test"):
        rows = namm.needles(str(tmp_path / "book.txt"), bpe_tokenizer, 400, 5, part, 0)
        for prompt, (code,) in rows:
            town = prompt.rsplit(" in ", 1)[1].removesuffix(" is")
            assert f"The code of the library in {town} is {code}." in prompt
            assert prompt.count("The code of the library in") == 5
            assert 400 <= len(bpe_tokenizer.encode(prompt)) <= 700
        parts[part] = {int(n) for prompt, _ in rows for n in namm.re.findall(r"number (\d+)", prompt)}
    assert not parts["evolve"] & parts["test"]
    with pytest.raises(UserError, match="it has fewer"):
        namm.needles(str(tmp_path / "book.txt"), bpe_tokenizer, 50_000, 5, "test", 0)


ROW = {
    "context": "Paragraph 1: a. Paragraph 2: b.",
    "input": "b",
    "answers": ["Paragraph 2"],
    "all_classes": None,
}


def test_benchmark_files_are_read_from_a_folder_a_zip_and_refused_in_a_line(tmp_path):
    line = json.dumps(ROW) + "\n"
    (tmp_path / "passage_retrieval_en.jsonl").write_text(line * 2)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/passage_retrieval_en.jsonl", line * 3)
    name = "lb/passage_retrieval_en"
    text = dataclasses.replace(SMOKE, model="x", tasks=("lb/qasper", "lb/trec"))
    cfg = lambda *data: dataclasses.replace(text, data=tuple(map(str, data)))  # noqa: E731
    assert len(namm.read_rows(cfg(tmp_path), name)) == 2
    assert len(namm.read_rows(cfg(tmp_path / "data.zip"), name)) == 3
    (tmp_path / "empty").mkdir()
    assert len(namm.read_rows(cfg(tmp_path / "empty", tmp_path), name)) == 2
    prompt = namm.fill(namm.template_of(cfg(), name), ROW, name)
    assert prompt.startswith("Here are 30 paragraphs") and "\n\nb\n\nPlease enter" in prompt
    (tmp_path / "bad.zip").write_text("no")
    for data, task, message in (
        (tmp_path, "lb/qasper", "no qasper.jsonl"),
        (tmp_path / "data.zip", "lb/qasper", "no qasper.jsonl"),
        (tmp_path / "bad.zip", "lb/qasper", "neither a folder nor a zip"),
        (tmp_path, "lb/quasper", "the nearest is lb/qasper"),
        (None, "lb/qasper", "give a folder with --data"),
        (None, "choubun/wiki_qa", "neither a folder nor on the hub|pip install"),
    ):
        with pytest.raises(UserError, match=message):
            namm.read_rows(cfg(data) if data else cfg(), task)
    for rows, message in (([], "row 1 is no problem"), (["x"], "row 1 is no problem"),
                          ([ROW, ROW | {"options": 5}], "row 2: options is no list")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            namm.check_rows(rows, "file")
    with pytest.raises(UserError, match="--templates takes"):
        namm.template_of(cfg(), "lb/qasper")
    (tmp_path / "t.json").write_text('{"qasper": "Q {input}"}')
    (tmp_path / "list.json").write_text("[]")
    given = lambda name: dataclasses.replace(text, templates=(str(tmp_path / name),))  # noqa: E731
    assert namm.template_of(given("t.json"), "lb/qasper") == "Q {input}"
    with pytest.raises(UserError, match="no JSON of names and prompts"):
        namm.template_of(given("list.json"), "lb/qasper")


def test_every_task_of_the_full_config_has_a_metric_and_infinitebench_its_prompts():
    full = namm.CONFIGS["full"]
    assert len(full.test_tasks) == 21 + 4 + 12 and set(full.tasks) < set(full.test_tasks)
    for task in namm.METRICS:
        if task.startswith("inf/"):
            row = {"context": "c", "input": "call f(1)", "options": list("abcd")}
            assert "{" not in namm.fill(namm.template_of(full, task), row, task)


def test_templates_of_infinitebench_get_the_fields_they_name():
    row = {
        "context": "def f(x): ...",
        "input": "What is f(3)?",
        "options": ["w", "x", "y", "z"],
        "answer": ["y"],
    }
    filled = namm.fill("{func} {func_call} {question} {OPTION_C} {context}", row, "inf/code_run")
    assert filled == "f f(3) What is f(3)? y def f(x): ..."
    assert namm.answers_of(row, "inf/longbook_choice_eng") == ["C"]
    assert namm.answers_of({"answer": [1, 2]}, "inf/math_calc") == ["1 2"]
    assert namm.answers_of({"answer": 12}, "inf/math_calc") == ["12"]
    with pytest.raises(UserError, match="neither text nor a number"):
        namm.answers_of({"answer": {"a": 1}}, "inf/code_run")
    with pytest.raises(UserError, match="no field 'nothing'"):
        namm.fill("{nothing}", row, "inf/code_run")


# --- evolution ---


class Shares:
    """A task whose score is a known function of theta; it counts what was asked of it."""

    def __init__(self, name="shares", base=0.5):
        self.name, self.value, self.calls = name, base, []

    def draw(self, count, generator):
        return [torch.rand(2, generator=generator) for _ in range(count)]

    def cost(self, piece):
        return float(len(piece))

    def run(self, policy, piece, record=False):
        self.calls.append(len(policy.theta))
        memory = namm.Memory(policy, 1)
        scores = (policy.theta[:, :1] / 10 + 0.5) * torch.ones(1, len(piece))
        memory.layers[0].bad = (policy.theta[:, 0] > 5).repeat_interleave(len(piece))
        memory.layers[0].store = {k: torch.ones(1, 1, 1, dtype=torch.bool) for k in ("pos", "valid")}
        memory.layers[0].size = 1
        return scores, memory

    def base(self, run, pieces):
        return np.full((1, 2 * len(pieces)), self.value)


def policy_of(theta):
    return namm.Policy("namm", theta=theta, norm=a_norm())


def test_fitness_is_the_mean_over_tasks_of_the_ratio_to_the_full_cache():
    cfg, tasks = SMOKE, [Shares(base=0.5), Shares(base=0.25), Shares(base=0.0)]
    theta = torch.zeros(3, 30)
    theta[:, 0] = torch.tensor([0.0, 1.0, 9.0])
    draws = [t.draw(2, rng()) for t in tasks]
    fitness, bad, empty = namm.fitness_of(cfg, Run(cfg), theta, tasks, draws, policy_of)
    assert fitness == pytest.approx([1.5, 1.8, 4.2], rel=1e-6) and empty == [2]
    assert bad.tolist() == [False, False, True]
    with pytest.raises(UserError, match="every member are not finite"):
        namm.fitness_of(cfg, Run(cfg), theta[2:], tasks, draws, policy_of)
    nothing, _, empty = namm.fitness_of(cfg, Run(cfg), theta[:2], tasks[2:], draws[2:], policy_of)
    assert np.isnan(nothing).all() and empty == [0]


def test_prompts_that_the_full_cache_fails_teach_nothing(tmp_path, monkeypatch, capsys):
    cfg = dataclasses.replace(SMOKE, out=str(tmp_path), stages=(2,))
    tasks = ledger_tasks(cfg)[:1]
    tasks[0].base = lambda run, pieces: np.zeros((1, 2))
    with Run(cfg) as run:
        found = namm.evolve(cfg, run, tasks, "bam")
    assert not found["theta"].any() and capsys.readouterr().out.count("nothing is learnt") == 2


def test_too_little_memory_halves_the_members_and_changes_nothing():
    task, theta = Shares(), torch.randn(5, 30, generator=rng())
    expected = namm.halve_if_too_large(task, policy_of, theta, torch.rand(2))["scores"]
    run = task.run

    def small(policy, piece, record=False):
        if len(policy.theta) > 2:
            raise torch.OutOfMemoryError
        return run(policy, piece)

    task.run, task.calls = small, []
    unit = namm.halve_if_too_large(task, policy_of, theta, torch.rand(2))
    assert np.array_equal(unit["scores"], expected) and max(task.calls) == 2 and len(unit["failed"]) == 5
    task.run = lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError)
    with pytest.raises(UserError, match="does not fit; lower --block"):
        namm.halve_if_too_large(task, policy_of, theta, torch.rand(2))


def test_scores_that_are_not_finite_mark_their_member():
    lm, policy = llama(), evolved(3)
    policy.theta[1, 5] = math.nan
    _, memory = run_model(lm, tokens(2, 70).repeat(3, 1), policy)
    assert memory.bad().tolist() == [False, True, False] and memory.bad_layer() == 0


def ledger_tasks(cfg):
    torch.manual_seed(1)
    model = namm.ledger_lm(cfg.lm, namm.Ledger(*cfg.ledger), 4 * cfg.length).eval()
    return [namm.LedgerTask(cfg, model, k, namm.Ledger(*cfg.ledger), cfg.length, "cpu") for k in namm.KINDS]


def test_stages_go_on_from_the_best_validated_state_and_norms_freeze(tmp_path, monkeypatch):
    cfg = dataclasses.replace(SMOKE, out=str(tmp_path), stages=(2, 2))
    values, states, tells = iter([3.0, 2.0, 1.0, 2.0]), [], []
    monkeypatch.setattr(namm, "validate", lambda *args: next(values))
    tell = namm.CMAES.tell
    monkeypatch.setattr(namm.CMAES, "tell", lambda es, x, f: (
        tells.append(es.mean.clone()), tell(es, x, f), states.append(es.mean.clone())))  # fmt: skip
    with Run(cfg) as run:
        found = namm.evolve(cfg, run, ledger_tasks(cfg), "bam")
    assert torch.equal(tells[0], torch.zeros(len(tells[0]), dtype=torch.float64))
    assert torch.equal(tells[2], states[0])  # stage 2 begins where validation was best, after generation 1
    assert torch.equal(found["theta"], states[3].float())
    assert found["count"] == 2 * 2 * 2 * sum(range(32, 129, 32))  # prompts, layers, heads, tokens at updates
    kept = namm.load_memory(str(run.folder / "namm.pt"), cfg)
    assert torch.equal(kept["theta"].float(), found["theta"]) and torch.equal(kept["var"], found["var"])


def test_evolution_from_a_memory_does_not_end_below_it(tmp_path, monkeypatch):
    cfg = dataclasses.replace(SMOKE, out=str(tmp_path), stages=(2,))
    values, norm = iter([5.0, 1.0, 2.0]), a_norm()
    monkeypatch.setattr(namm, "validate", lambda *args: next(values))
    theta = torch.randn(namm.parameters("bam", 25, 8), generator=rng())
    with Run(cfg) as run:
        found = namm.evolve(
            cfg, run, ledger_tasks(cfg), "bam", {"theta": theta, "mean": norm.mean, "var": norm.var}
        )
    assert torch.equal(found["theta"], theta) and torch.equal(found["mean"], norm.mean)


def test_a_killed_evolution_that_is_resumed_ends_alike(tmp_path):
    ends = []
    for name, stop in (("whole", None), ("killed", 1)):
        cfg = dataclasses.replace(SMOKE, out=str(tmp_path / name), stages=(2, 1))
        for resume in (False, True) if stop else (False,):
            with pytest.raises(SystemExit) if stop and not resume else Run(cfg) as run:
                if stop and not resume:
                    with Run(cfg) as run:
                        log = run.log
                        run.log = lambda step, run=run, log=log, **n: (
                            log(step, **n), run.signals.append(15) if step == 0 else None)  # fmt: skip
                        namm.evolve(cfg, run, ledger_tasks(cfg), "bam")
                else:
                    run.cfg = dataclasses.replace(cfg, resume=resume)
                    found = namm.evolve(run.cfg, run, ledger_tasks(cfg), "bam")
                    ends.append(found["theta"])
            cfg = dataclasses.replace(cfg, resume=True)
    assert torch.equal(*ends)


def test_memories_of_other_sizes_or_without_statistics_are_refused(tmp_path):
    path, cfg = tmp_path / "m.pt", dataclasses.replace(SMOKE, hidden=32)
    bins = torch.rand(17, generator=rng())
    buffers = {f"embed.normalizer.output_{k}": bins.view(1, 1, 1, 17) for k in ("mean", "var")}
    reference = {"evolution_state": {"mean": torch.rand(4172)}, "buffers": buffers}
    torch.save(reference, path)
    found = namm.load_memory(str(path), cfg)
    assert torch.allclose(found["theta"].float(), reference["evolution_state"]["mean"])
    assert torch.allclose(found["mean"].float(), bins) and found["scorer"] == "bam"
    for data, message in (
        (
            {"theta": torch.rand(100), "mean": bins, "var": bins},
            r"expected 4172 parameters \(= bam 25/32\), got 100",
        ),
        ({"theta": torch.rand(4172)}, "no statistics of 17 frequencies"),
        ({"theta": torch.rand(4172), "mean": bins, "var": -bins}, "no statistics of 17 frequencies"),
        (
            {"theta": torch.rand(4172), "mean": bins, "var": bins, "decay": 0.5},
            "evolved with --decay 0.5, not 0.99",
        ),
    ):
        torch.save(data, path)
        with pytest.raises(UserError, match=message):
            namm.load_memory(str(path), cfg)
    path.write_text("no")
    with pytest.raises(UserError, match="no memory"):
        namm.load_memory(str(path), cfg)
    with pytest.raises(UserError, match="no such file"):
        namm.load_memory(str(tmp_path / "none"), cfg)


# --- the script ---


@pytest.mark.parametrize(
    "words, message",
    [
        (["--update", "24"], "--update 24 must be a multiple of --hop 16"),
        (["--window", "31"], "--window 31 must be even"),
        (["--cap", "1"], "--cap and --other_cap are 2 or more"),
        (["--policies", "h3o"], "choose from full, h2o"),
        (["--model", "x"], "--model needs --tasks"),
        (["--namm", "x"], "need a --model"),
        (["--stages", "0"], "of 1 generation or more"),
        (["--longer", "1"], "2 or more each"),
        (["--config", "text", "--stages", "1,1"], "need as many --tasks"),
        (
            ["--config", "text", "--model", "/no/such", "--tasks", "needles:a"],
            "neither a local model nor on the hub",
        ),
    ],
)
def test_bad_input_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        namm.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.strip().count("\n") == 0


@pytest.mark.parametrize("more", [{"scorer": "mlp"}, {"scorer": "linear", "cap": None}, {"evict": "strict"}])
def test_reports_of_other_scorers_claim_only_what_they_measured(more):
    cfg = dataclasses.replace(SMOKE, **more)
    row = {"scores": [0.5, 0.6], "held after updates": 4.0, "held at the end": 4.0, "scores >= 0": 1.0}
    row |= {"mean age": 2.0, "KV bytes": 8, "shares": {"filler": 1.0}}
    labels = ["NAMM", "full", *namm.BASELINES[1:], "NAMM, entries permuted", "NAMM, not normalised"]
    labels += ["NAMM, mlp"] if cfg.scorer != "mlp" else []
    names = [n.replace("/", "-") for n in namm.test_names(cfg)]
    tests = {n: {"policies": dict.fromkeys(labels, row)} for n in names}
    run = Run(cfg)
    namm.report(cfg, run, tests, {cfg.scorer: [[1, 0, 1.0]], "mlp": [[1, 0, 1.0]]})
    told = any("backward attention" in c["text"] for c in run.results["claims"])
    assert told == (cfg.scorer == "bam") and len(run.results["claims"]) == 28 + 4 + 2 * told


@pytest.mark.parametrize("config", ["demo", "gpu", "full"])
def test_dry_runs_say_sizes_and_steps(config, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namm.main(["--config", config, "--dry_run"])
    said = capsys.readouterr().out
    assert "4,172 parameters" in said and "generations on" in said and not list(tmp_path.iterdir())
    assert ("8,030,261,248 parameters" in said) == (config == "full")


def test_smoke_runs_every_part_and_resumes(run_script, tmp_path):
    done = run_script(ROOT / "namm.py", "--config", "smoke")
    folder = tmp_path / "out" / "namm-smoke-s0"
    results = json.loads((folder / "results.json").read_text())
    assert {"full", "NAMM", "h2o", "NAMM, mlp"} <= {row.get("policy") for row in results["table"]}
    assert (
        any("decision transformer" in c["text"] for c in results["claims"])
        and results["speed"]["generations_per_s"] > 0
    )
    assert (folder / "namm.png").exists() and "held in each layer" in done.stdout
    (folder / "results.json").unlink()
    run_script(ROOT / "namm.py", "--config", "smoke", "--resume")
    again = json.loads((folder / "results.json").read_text())
    assert again["claims"] == results["claims"]


def test_two_ranks_evolve_what_one_does(run_script, tmp_path):
    words = ["--config", "smoke", "--no_ablation", "--sweep", "", "--longer", ""]
    found = []
    for ranks in (0, 2):
        run_script(ROOT / "namm.py", *words, "--out", f"r{ranks}", ranks=ranks)
        folder = tmp_path / f"r{ranks}" / "namm-smoke-s0"
        found.append(torch.load(folder / "evolve-bam" / "namm.pt", weights_only=True))
    assert torch.allclose(found[0]["theta"], found[1]["theta"], atol=1e-6) and found[0]["theta"].any()
    assert torch.allclose(found[0]["mean"], found[1]["mean"], rtol=1e-6)


def test_a_language_model_from_a_folder_is_evolved_and_evaluated(text_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.txt").write_text(" ".join(f"We add the number {i} now." for i in range(500)))
    (tmp_path / "passage_retrieval_en.jsonl").write_text(
        (json.dumps(ROW | {"context": "Paragraph. " * 60}) + "\n") * 3
    )
    words = [
        "--config",
        "text",
        "--model",
        "lm",
        "--context",
        "500",
        "--update",
        "32",
        "--cap",
        "40",
        "--stages",
        "1,1",
    ]
    words += [
        "--prompts",
        "1",
        "--validation",
        "2",
        "--test",
        "2",
        "--population",
        "4",
        "--hidden",
        "8",
        "--data",
        ".",
    ]
    tasks = ["--tasks", "needles:b.txt,lb/passage_retrieval_en", "--policies", "full,h2o,snap,random"]
    namm.main([*words, *tasks])
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "namm-text-s0" / "results.json").read_text())
    assert "speed and memory" in said and {"NAMM_decode_tokens_per_s", "full_prefill_MFU"} <= set(
        results["speed"]
    )
    rows = [r for r in results["table"] if r["table"] == "needles:b.txt, 2 prompts"]
    assert [r["policy"] for r in rows] == ["NAMM", "full", "h2o", "snap", "random"] and rows[0][
        "held after updates"
    ] <= 40
    memory = tmp_path / "out" / "namm-text-s0" / "evolve" / "namm.pt"
    kept = str(memory.rename(tmp_path / "namm.pt"))
    namm.main([*words[:-2], "--data", ".", *tasks, "--stages", "0", "--namm", kept, "--seed", "1"])
    with pytest.raises(SystemExit):
        namm.main([*words, *tasks, "--stages", "0", "--seed", "2"])
    assert "nothing to evaluate" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_keep_the_same_tokens():
    lm, ids = llama(seed=7), tokens(2, 140)
    logits, memory = run_model(lm, ids, evolved(), record=True)
    other, gpu = run_model(lm.cuda(), ids.cuda(), evolved(), record=True)
    assert torch.allclose(logits, other.cpu(), atol=1e-3)
    for a, b in zip(memory.layers, gpu.layers, strict=True):
        assert all(torch.equal(x[1], y[1].cpu()) for x, y in zip(a.log, b.log, strict=True))
