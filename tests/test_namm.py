"""namm.py: equations against closed forms and brute force, the memory inside transformers, the search, files."""

import functools
import json
import math
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM

import common
import namm
from common import UserError

SMOKE = namm.CONFIGS["smoke"]
POLICIES = ("namm", "h2o", "snapkv", "l2", "recency", "random")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def policy(kind="namm", cap=24, members=1, scorer="bam", scale=0.3):
    """A policy; as namm one with random parameters, which keeps some tokens and drops others."""
    theta = scale * torch.randn(members, namm.parameters(scorer), generator=rng())
    moments = torch.rand(2, namm.BINS, generator=rng(1)).double()
    return namm.Policy(kind, 32, cap, scorer, theta if kind == "namm" else namm.NOBODY, moments)


@functools.cache
def llama(kv=2):
    torch.manual_seed(0)
    lm = common.tiny_lm(50, 32, 2, 4, 4096, num_key_value_heads=kv, initializer_range=0.3)
    return namm.attach(lm.eval())


def tokens(count=2, length=150):
    return torch.randint(50, (count, length), generator=rng(2))


@torch.no_grad()
def read(lm, ids, chosen, cut=1000, **more):
    """Logits and memory after reading `cut` tokens at a time."""
    torch.manual_seed(0)
    memory = namm.Memory(chosen, lm)
    return torch.cat([lm(part, cache=memory, **more).logits for part in ids.split(cut, 1)], 1), memory


def stock(lm, function):
    """Call `function` while the model has attention of its own."""
    lm.set_attn_implementation("eager")
    with torch.no_grad():
        found = function()
    namm.attach(lm)
    return found


# --- features


def test_omega_is_the_discounted_sum_of_the_stft_of_whole_columns_however_tokens_come():
    lm, ids = llama(), tokens()
    whole = stock(lm, lambda: lm(ids, output_attentions=True).attentions)
    for cut in (1, 7, 16, 150):
        memory = read(lm, ids, policy(cap=0, scale=0.0), cut)[1]
        for layer, attention in zip(memory.layers, whole, strict=True):
            columns = F.pad(attention.view(2, 2, 2, 150, 150).mean(2).mT, (16, 0))[..., : 16 + 144]
            window = torch.hann_window(32)
            frames = torch.stft(
                columns.flatten(0, 2), 32, 16, window=window, center=False, return_complex=True
            ).abs()
            weights = (1 - 0.99**16) * 0.99 ** (16 * torch.arange(8, -1, -1))
            wanted = (frames * weights).sum(-1).view(2, 2, 150, 17)
            torch.testing.assert_close(layer.store["omega"], wanted, atol=2e-6, rtol=1e-4)


def test_a_constant_has_a_dc_and_one_sideband_and_an_impulse_is_flat():
    wanted = torch.tensor([16.0, 8.0] + 15 * [0.0])
    torch.testing.assert_close(namm.spectral_frame(torch.ones(32)), wanted, atol=1e-5, rtol=0)
    both = namm.spectral_frame(F.one_hot(torch.tensor(21), 48).float().unfold(0, 32, 16))
    torch.testing.assert_close(both.sum(0), torch.ones(17))
    steady = namm.moving_average(torch.zeros(17), wanted.expand(5, 17))
    torch.testing.assert_close(steady, (1 - 0.99**80) * wanted)


def test_ages_are_sines_and_cosines_also_beyond_the_reference_s_table():
    age = 40_000 * 50_000 ** (-0.25)
    found = namm.recency(torch.tensor([0, 40_000]))
    assert found[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found[1, 1].item() == pytest.approx(math.sin(age), abs=1e-5)


# --- scores


def test_the_papers_network_has_4172_parameters_and_its_score_is_the_formula_token_by_token():
    assert namm.parameters("bam") == 4172
    theta, u = policy(members=2).theta, torch.randn(2, 3, 9, 25, generator=rng(3))
    scores = namm.score_tokens(theta, u, "bam")
    for p, m, i in ((0, 0, 0), (1, 2, 4), (1, 1, 8)):
        W1, b1 = theta[p, :2400].view(25, 96), theta[p, 2400:2496]
        W2, b2, w3, b3 = (
            theta[p, 2496:4096].view(32, 50),
            theta[p, 4096:4146],
            theta[p, 4146:4171],
            theta[p, 4171],
        )
        q, k, v = (u[p, m] @ W1 + b1).split(32, 1)
        seen = (q[i] @ k[i:].T / 32**0.5).softmax(0) @ v[i:]
        r, mul = (seen @ W2 + b2).split(25)
        wanted = (u[p, m, i] * (1 + mul) + r) @ w3 + b3
        torch.testing.assert_close(scores[p, m, i], wanted, atol=1e-4, rtol=1e-4)
    u[:, :, :4] = 0  # older tokens
    torch.testing.assert_close(namm.score_tokens(theta, u, "bam")[..., 4:], scores[..., 4:])


def test_each_head_keeps_its_best_as_many_as_the_most_generous_head_has_and_the_newest():
    for trial in range(30):
        score = torch.randn(3, 2, 8, generator=rng(trial)) - 0.5
        valid = torch.arange(8) >= torch.tensor([0, 2, 5])[:, None, None].expand(3, 2, 1)
        place, real = namm.select(score, valid, 5)
        for n in range(3):
            padded = score[n].masked_fill(~valid[n], -math.inf)
            padded[:, -1] = math.inf
            k = min(5, int((padded >= 0).sum(1).max()))
            for h in range(2):
                kept = place[n, h][real[n, h]].tolist()
                assert kept == sorted(padded[h].topk(k).indices.tolist())


# --- the memory


def visible_of(log, length):
    """Who is seen when (N, H, query, key), from what was held after each eviction."""
    pos = log[0][1]
    seen = torch.ones(length, length).tril().bool().expand(*pos.shape[:2], -1, -1).clone()
    for at, pos, valid in log:
        held = torch.zeros(*pos.shape[:2], length).bool().scatter_(2, pos, valid)
        seen[..., at:, :at] &= held[..., None, :at]
    return seen


@pytest.mark.parametrize("kind", POLICIES)
def test_a_pruned_run_is_a_dense_one_that_masks_what_was_evicted(kind, monkeypatch):
    lm, ids, logs, forget = llama(), tokens(), {}, namm.LayerMemory.forget

    def logged(layer):
        before = layer.store["pos"].shape[2]
        forget(layer)
        store = {name: x.clone() for name, x in layer.store.items()}
        logs.setdefault(id(layer), []).append((layer.seen, store["pos"], store["valid"]))
        assert store["pos"].shape[2] <= before and store["pos"][..., -1].eq(layer.seen - 1).all()

    monkeypatch.setattr(namm.LayerMemory, "forget", logged)
    found, memory = read(lm, ids, policy(kind, members=1), 37)
    log = list(logs.values())

    def dense(module, q, k, v, mask, scaling, **kwargs):
        seen = visible_of(log[module.layer_idx], q.shape[2]).repeat_interleave(2, 1)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        attention = (q @ k.mT * scaling).masked_fill(~seen, -math.inf).softmax(-1)
        return (attention @ v).transpose(1, 2), None

    AttentionInterface.register("dense", dense)
    lm.set_attn_implementation("dense")
    with torch.no_grad():
        wanted = lm(ids, use_cache=False).logits
    namm.attach(lm)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)
    held = [layer.store["k"].shape[2] for layer in memory.layers]
    assert max(held) <= 24 + 150 % 32 and memory.size() <= 24  # it really shrinks
    assert kind == "namm" or memory.size() == 24


def test_zero_parameters_evict_nothing_and_a_full_memory_is_the_stock_model():
    lm, ids = llama(), tokens()
    wanted = stock(lm, lambda: lm(ids).logits)
    for chosen in (policy(cap=0, scale=0.0), namm.Policy()):
        found, memory = read(lm, ids, chosen, 40)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert memory.size() == 150


def test_members_in_one_batch_are_the_members_alone():
    lm, ids, together = llama(), tokens(1), policy(members=3)
    found = read(lm, ids.repeat(3, 1), together)[0]
    for i in range(3):
        alone = read(lm, ids, replace(together, theta=together.theta[i : i + 1]))[0]
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-4, rtol=1e-3)


def test_h2o_sums_one_for_each_query_and_snapkv_pools_the_last_ones():
    lm, ids = llama(), tokens(2, 64)
    memory = read(lm, ids, policy("h2o", cap=99))[1]
    assert memory.layers[0].store["mass"].sum((2, 3)).allclose(torch.tensor(64.0))
    layer = read(lm, ids, policy("snapkv", cap=99))[1].layers[0]
    mass, score = layer.store["tail"][..., 8:].sum(-1), namm.snapkv_score(layer)
    torch.testing.assert_close(score[..., 20], mass[..., 18:23].mean(-1))
    assert score[..., -8:].isinf().all() and score[..., :-8].isfinite().all()


def test_generate_takes_the_memory_in_chunks_and_a_full_one_writes_what_the_model_writes():
    lm, ids = llama(), tokens(1, 100)
    more = dict(max_new_tokens=40, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    wanted = stock(lm, lambda: lm.generate(ids, **more))
    found = lm.generate(ids, cache=namm.Memory(namm.Policy(), lm), prefill_chunk_size=32, **more)
    assert torch.equal(found, wanted)
    memory = namm.Memory(policy(), lm)
    lm.generate(ids, cache=memory, prefill_chunk_size=32, **more)
    assert memory.get_seq_length() == 139 and memory.layers[0].store["k"].shape[2] <= 24 + 139 - 128


def test_what_a_memory_cannot_follow_is_one_line():
    config = dict(
        vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    sliding = namm.attach(
        MistralForCausalLM(MistralConfig(**config, num_key_value_heads=2, sliding_window=4))
    )
    with pytest.raises(UserError, match="plain causal"):
        sliding(tokens() % 9, cache=namm.Memory(policy(), sliding))
    with pytest.raises(UserError, match="plain causal"):
        llama()(tokens())
    with pytest.raises(UserError, match="without padding"):
        read(llama(), tokens(), policy(), attention_mask=torch.arange(150).expand(2, -1) > 3)
    model = mock.Mock()
    model.config.get_text_config.return_value.layer_types = ["sliding_attention"]
    with pytest.raises(UserError, match="full attention"):
        namm.attach(model)


def test_a_score_that_is_not_finite_evicts_and_stops_nothing():
    chosen = policy(members=2)
    chosen.theta[1] = math.nan
    logits, memory = read(llama(), tokens(2), chosen)
    assert (
        logits.isfinite().all()
        and memory.layers[0].store["valid"][1].sum() < memory.layers[0].store["valid"][0].sum()
    )


# --- the search


def tutorial_step(x, fitness, sigma):
    """Mean, sigma and C after the first step, in numpy, from the lines of Hansen's tutorial."""
    lam, n = x.shape
    raw = np.log((lam + 1) / 2) - np.log(np.arange(1, lam + 1))
    mu, minus = (w.sum() ** 2 / (w**2).sum() for w in (raw[: lam // 2], raw[lam // 2 :]))
    c1 = 2 / ((n + 1.3) ** 2 + mu)
    cmu = 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu)
    cs, cc = (mu + 2) / (n + mu + 5), (4 + mu / n) / (n + 4 + 2 * mu / n)
    alpha = min(1 + c1 / cmu, 1 + 2 * minus / (mu + 2), (1 - c1 - cmu) / n / cmu)
    w = np.where(raw > 0, raw / raw[raw > 0].sum(), alpha * raw / -raw[raw < 0].sum())
    y = x[np.argsort(-fitness)] / sigma
    step = np.maximum(w, 0) @ y
    length = np.sqrt(cs * (2 - cs) * mu) * np.linalg.norm(step)
    chi = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
    assert length / np.sqrt(1 - (1 - cs) ** 2) / chi < 1.4 + 2 / (n + 1)  # h = 1
    pc = np.sqrt(cc * (2 - cc) * mu) * step
    w0 = np.where(w < 0, w * n / (y**2).sum(1), w)
    C = (1 - c1 - cmu * w.sum()) * np.eye(n) + c1 * np.outer(pc, pc) + cmu * y.T @ np.diag(w0) @ y
    return sigma * step, sigma * np.exp(cs / (1 + cs) * (length / chi - 1)), C


def test_a_generation_is_that_of_the_tutorial_and_nan_ranks_last():
    es, other = namm.CMAES(6, 9, 0.5), namm.CMAES(6, 9, 0.5)
    x, fitness = es.ask(rng()), torch.rand(9, generator=rng(1)).double()
    mean, sigma, C = tutorial_step(x.numpy(), fitness.numpy(), 0.5)
    es.tell(x, fitness.exp().index_fill(0, fitness.argmin(), math.nan))  # only the order matters
    other.tell(x.flip(0), fitness.flip(0))
    for a, b in ((es.mean, mean), (es.C, C), (es.sigma, sigma), (es.mean, other.mean)):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_constants_of_the_papers_size():
    es = namm.CMAES(4172, 32, 0.065)
    found = es.mu_eff, es.c1, es.cmu, es.c_sigma
    assert found == pytest.approx((9.179, 1.148e-7, 8.37e-7, 2.67e-3), rel=2e-3) and es.interval == 25


def test_the_search_solves_an_ellipsoid_with_its_eigenvectors():
    es, generator = namm.CMAES(8, 12, 0.5), rng()
    es.mean += 1
    scales = 10 ** torch.linspace(0, 3, 8).double()
    for _ in range(320):
        x = es.ask(generator)
        es.tell(x, -(scales * x.square()).sum(1))
    assert (scales * es.mean.square()).sum() < 1e-8 and torch.linalg.eigvalsh(es.C).min() > 0


# --- tasks


def test_ledgers_ask_for_the_latest_value():
    ids, target = namm.KINDS["dense"](3, 120, namm.LM, rng())
    for row, answers in zip(ids.tolist(), target.tolist(), strict=True):
        latest = {}
        for token, answer in zip(row, answers, strict=True):
            if token >= namm.FILLERS + 8:
                key, latest[key] = divmod(token - namm.FILLERS - 8, 8)[0], (token - namm.FILLERS) % 8
            assert answer == (
                latest[token - namm.FILLERS] if namm.FILLERS <= token < namm.FILLERS + 8 else -1
            )


def test_corridors_earn_for_turns_as_the_latest_signal_says():
    ids, target = namm.KINDS["corridor"](4, 90, namm.DT, rng())
    to_go, state, action = ids.view(4, 30, 3).unbind(2)
    right = target.view(4, 30, 3)[..., 1]
    earned = (action - namm.VOCABULARY + 10 == right) & (right >= 0)
    assert torch.equal(namm.VOCABULARY - 1 - to_go, earned.flip(1).cumsum(1).flip(1).clamp(max=4))
    assert 0.6 < earned.sum() / (right >= 0).sum() < 1 and (target.view(4, 30, 3)[..., ::2] < 0).all()


def a_run(tmp_path, **more):
    return common.Run(replace(SMOKE, out=str(tmp_path), device="cpu", **more))


def test_fitness_is_the_mean_ratio_to_the_full_cache_and_leaves_out_tasks_it_fails(tmp_path, monkeypatch):
    def task(full, members):
        scores = {True: [full], False: members}
        return namm.Task(
            3, lambda p, place: (torch.tensor(scores[p.kind == "full"]), mock.Mock(size=lambda: 1.0))
        )

    tasks = [task(0.5, [0.25, 0.5]), task(0.2, [0.2, 0.3]), task(0.0, [0.1, 0.0])]
    run, theta = a_run(tmp_path), torch.zeros(2, 4172)
    found = namm.fitness_of(theta, None, tasks, [[0, 2]] * 3, run)
    assert found.tolist() == pytest.approx([0.75, 1.25])
    assert namm.fitness_of(theta, None, tasks[2:], [[1]], run).isnan().all()


def test_moments_are_those_of_all_features_at_once(tmp_path, monkeypatch):
    seen, run, lm = [], a_run(tmp_path), llama()
    plain = namm.normalise
    monkeypatch.setattr(
        namm, "normalise", lambda omega, m: (seen.append(omega.flatten(0, 2)), plain(omega, m))[1]
    )
    task = namm.Task(3, lambda p, place: (torch.ones(1), read(lm, tokens(1, 70 + place), p)[1]))
    run.cfg.validation = 0
    found, x = namm.learn_moments(task, run), torch.cat(seen).double()
    torch.testing.assert_close(found, torch.stack([x.mean(0), x.var(0, correction=0)]), rtol=1e-6, atol=1e-9)
    with pytest.raises(UserError, match="nothing to forget"):
        namm.learn_moments(namm.Task(1, lambda p, place: (torch.ones(1), read(lm, tokens(1, 9), p)[1])), run)


# --- files, language models, the script


def checkpoint(tmp_path, n=4172, **moments):
    """A file as the reference leaves it; its buffers of the last pass end alike."""
    state = {"mean": torch.rand(n), "sigma": torch.tensor(0.1)}
    for name in ("mean", "var"):
        plain = "token_embedding_0_output_" + name
        state["stored_buffers_to_save." + plain] = moments.get(name, torch.ones(1, 1, 1, 17))
        state["stored_buffers_to_save." + plain.replace("output", "online_new_output")] = torch.zeros(
            1, 1, 1, 17
        )
    data = {"evolution_state": state, "iter_num": 7, "best_val_loss": np.float64(0.5)}
    torch.save(data, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt", state


def test_the_reference_s_checkpoints_load_by_their_exact_keys_and_ours_are_alike(tmp_path):
    file, state = checkpoint(tmp_path)
    theta, moments = namm.load_memory(file, SMOKE)
    assert torch.equal(theta[0], state["mean"]) and torch.equal(moments, torch.ones(2, 17))
    namm.save_memory(file, theta[0], moments, a_run(tmp_path))
    assert torch.equal(namm.load_memory(file, SMOKE)[0], theta)


@pytest.mark.parametrize("change", [dict(n=756), dict(var=torch.zeros(17)), dict(mean=torch.ones(9))])
def test_other_sizes_or_no_variance_are_refused(change, tmp_path):
    with pytest.raises(UserError, match="no memory of 4172 parameters"):
        namm.load_memory(checkpoint(tmp_path, **change)[0], SMOKE)


def test_ntk_scaling_gives_the_papers_base(monkeypatch):
    lm = common.tiny_lm(9, 256, 1, 2, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    monkeypatch.setattr(common, "load_lm", lambda *args: (lm, None))
    namm.open_lm("any", 4.0, torch.device("cpu"))
    wanted = 3.6098e6 ** -(torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(lm.model.rotary_emb.inv_freq, wanted, rtol=1e-4, atol=0)


def test_lm_eval_s_prompts_are_not_corrected_and_its_metric_judges(tmp_path, monkeypatch):
    for name in ("jieba", "fuzzywuzzy", "rouge"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    row = dict(context="A\u2028story.", question="Who?", answers=["a cat"], all_classes=None)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    head = "configs:\n- config_name: narrativeqa\n  data_files:\n  - split: test\n    path: rows.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\n{head}---\n")
    texts, judges, settings = namm.read_questions("longbench_narrativeqa", replace(SMOKE, data=str(tmp_path)))
    assert "Answer the question asconcisely" in texts[0] and "A\u2028story." in texts[0]
    assert judges[0]("The cat!") == 1 and settings["max_new_tokens"] == 128


@pytest.fixture
def text_words(text_files, tmp_path):
    """Arguments for the text config in miniature, with a line separator inside a prompt."""
    rows = [
        {"prompt": "We add the\u2028numbers: " * 8 + f"{i} plus 30 is", "answer": "We add"} for i in range(4)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    words = (
        "--config text --model lm --tasks q.jsonl --stages 2 --update 32 --cap 40 --context 120 --max_new 4"
    )
    return words.split()


def test_a_language_model_from_a_folder_evolves_a_memory_on_two_ranks_as_on_one(
    text_words, run_script, tmp_path
):
    common_words = [*text_words, "--rows", "NAMM", "H2O", "--prompts", "2"]
    run_script(ROOT / "namm.py", *common_words, "--out", "one")
    run_script(ROOT / "namm.py", *common_words, "--out", "two", ranks=2)
    first, second = ((tmp_path / out / "namm-text-s0-lm") for out in ("one", "two"))
    tables = [json.loads((folder / "results.json").read_text())["table"] for folder in (first, second)]
    assert tables[0] == tables[1] and tables[0]["NAMM"][0]["held"] <= 40
    a, b = (namm.load_memory(f / "evolve_bam-s0" / "namm.pt", SMOKE)[0] for f in (first, second))
    assert torch.equal(a, b) and a.any()


def test_smoke_runs_and_a_killed_evolution_ends_alike_from_a_small_file(run_script, tmp_path):
    words = ["--config", "smoke", "--rows", "NAMM", "full cache", "--save_every", "1"]
    run_script(ROOT / "namm.py", *words)
    folder = tmp_path / "out" / "namm-smoke-s0"
    first = json.loads((folder / "results.json").read_text())
    memory = (folder / "evolve_bam-s0" / "namm.pt").read_bytes()
    (folder / "evolve_bam-s0" / "step00000003" / ".metadata").unlink()
    for made in ("evolve_bam-s0", "NAMM_s_tests-s0", "NAMM-s0"):
        (folder / made / "result.json").unlink()
    run_script(ROOT / "namm.py", *words, "--resume")
    assert json.loads((folder / "results.json").read_text())["table"] == first["table"]
    assert (folder / "evolve_bam-s0" / "namm.pt").read_bytes() == memory
    assert sum(f.stat().st_size for f in (folder / "evolve_bam-s0" / "step00000002").iterdir()) < 20_000


@pytest.mark.parametrize(
    "words, message",
    [
        ("--update 40", "multiple of 16"),
        ("--stages 1 1 1", "has a task"),
        ("--tasks longbench_qasper dense", "with it lm-eval"),
        ("--memory no.pt", "no memory of 4172"),
        ("--config text --model lm --tasks no.jsonl", "no.jsonl"),
        ("--config text --model no --tasks q.jsonl", "neither here nor on the hub"),
    ],
)
def test_bad_input_is_one_line(words, message, text_words, run_main, tmp_path):
    code, out, err = run_main(namm, "--ranks", 1, *words.split())
    assert code == 2 and message in err and "Traceback" not in err and not (tmp_path / "out").exists()
