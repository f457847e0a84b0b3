"""namm.py: equations against closed forms and brute force, the memory in transformers, the search, files."""

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


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def policy(kind="namm", cap=24, members=1, scale=0.3):
    """A policy; as namm one with random parameters, which keeps some tokens and drops others."""
    theta = scale * torch.randn(members, 4172, generator=rng())
    moments = torch.rand(2, namm.BINS, generator=rng(1)).double()
    return namm.Policy(kind, 32, cap, "bam", theta, moments)


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
    weights = (1 - 0.99**16) * 0.99 ** (16 * torch.arange(8, -1, -1))
    more = dict(window=torch.hann_window(32), center=False, return_complex=True)
    for cut in (1, 7, 16, 150):
        memory = read(lm, ids, policy(cap=0, scale=0.0), cut)[1]
        assert memory.layers[0].held[-1] == (128, 128)  # scores of 0 evict nothing
        for layer, attention in zip(memory.layers, whole, strict=True):
            columns = F.pad(attention.unflatten(1, (2, 2)).mean(2).mT, (16, -6))
            frames = torch.stft(columns.flatten(0, 2), 32, 16, **more).abs()
            wanted = (frames * weights).sum(-1).view(2, 2, 150, 17)
            torch.testing.assert_close(layer.store["omega"], wanted, atol=2e-6, rtol=1e-4)


# --- scores


def test_the_papers_network_has_4172_parameters_and_scores_by_the_formula_token_by_token():
    theta, u = policy(members=2).theta, torch.randn(2, 3, 9, 25, generator=rng(3))
    scores, sizes = namm.score_tokens(theta, u, "bam"), [2400, 96, 1600, 50, 25, 1]
    assert theta.shape[1] == 4172
    W1, b1, W2, b2, w3, b3 = theta[1].split(sizes)
    q, k, v = (u[1, 2] @ W1.view(25, 96) + b1).split(32, 1)
    for i in range(9):
        seen = (q[i] @ k[i:].T / 32**0.5).softmax(0) @ v[i:]  # itself and newer tokens
        r, mul = (seen @ W2.view(32, 50) + b2).split(25)
        wanted = (u[1, 2, i] * (1 + mul) + r) @ w3 + b3[0]
        torch.testing.assert_close(scores[1, 2, i], wanted, atol=1e-4, rtol=1e-4)


def test_each_head_keeps_its_best_as_many_as_the_most_generous_head_has_and_the_newest():
    valid = (torch.arange(8) >= torch.tensor([0, 2, 5])[:, None, None]).expand(3, 2, 8)
    for trial in range(30):
        score = torch.randn(3, 2, 8, generator=rng(trial)) - 0.5
        place = namm.select(score, valid, 5)
        score = score.masked_fill(~valid, -math.inf)
        score[..., -1] = math.inf
        for n in range(3):
            k = min(5, int((score[n] >= 0).sum(1).max()))
            for h in range(2):
                assert place[n, h][place[n, h] >= 0].tolist() == sorted(score[n, h].topk(k).indices.tolist())


# --- the memory


def visible_of(log, length):
    """Who is seen when (N, H, query, key), from what was held after each eviction."""
    pos = log[0][1]
    seen = torch.ones(length, length).tril().bool().expand(*pos.shape[:2], -1, -1).clone()
    for at, pos, valid in log:
        held = torch.zeros(*pos.shape[:2], length + 1).bool()
        held.scatter_(2, pos.masked_fill(~valid, length), True)
        seen[..., at:, :at] &= held[..., None, :at]
    return seen


@pytest.mark.parametrize("kind", namm.SCORES)
def test_a_pruned_run_is_a_dense_one_that_masks_what_was_evicted(kind, monkeypatch):
    lm, logs, forget = llama(), {}, namm.LayerMemory.forget

    def logged(layer):
        forget(layer)
        logs.setdefault(id(layer), []).append((layer.seen, layer.store["pos"], layer.store["valid"]))
        assert layer.store["pos"][..., -1].eq(layer.seen - 1).all()

    monkeypatch.setattr(namm.LayerMemory, "forget", logged)
    ids = tokens().repeat(2, 1)  # two members, whose rows keep different numbers
    found, memory = read(lm, ids, policy(kind, [24, 16], members=2), 37)
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
    assert memory.layers[0].store["k"].shape[2] <= 24 + 150 % 32  # it really shrinks
    sizes = [namm.size_of(layer.held) for layer in memory.layers]
    assert kind == "namm" or sizes == pytest.approx([24, 16])


def test_a_memory_s_size_is_the_cap_of_the_rule_that_holds_as_many_in_the_mean_over_all_updates():
    held = [(0, 0), (32, 32), (64, 64), (96, 49), (128, 65)]  # the first to drop something is the third
    cap = namm.size_of(held, [(0, 0)])  # and a prompt that is over before an update
    assert sum(min(seen, cap) for seen, _ in held) == pytest.approx(32 + 64 + 49 + 65)


def test_h2o_sums_one_for_each_query_and_snapkv_pools_the_last_ones():
    ids = tokens(2, 64)
    h2o, snap = (read(llama(), ids, policy(kind, 99))[1].layers[0] for kind in ("h2o", "snapkv"))
    assert h2o.store["mass"].sum((2, 3)).allclose(torch.tensor(64.0))
    mass, score = snap.store["tail"][..., 8:].sum(-1), namm.snapkv_score(snap)
    torch.testing.assert_close(score[..., 20], mass[..., 18:23].mean(-1))


def test_generate_takes_the_memory_in_chunks_and_a_full_one_writes_what_the_model_writes():
    lm, ids = llama(), tokens(1, 100)
    more = dict(max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(ids))
    wanted = stock(lm, lambda: lm.generate(ids, **more))
    for chosen in (namm.Policy(), policy()):
        memory = namm.Memory(chosen, lm)
        found = lm.generate(ids, cache=memory, prefill_chunk_size=32, **more)
        assert torch.equal(found, wanted) == (chosen.kind == "full") and memory.get_seq_length() == 139
    assert memory.layers[0].store["k"].shape[2] <= 24 + 139 - 128


def test_what_a_memory_cannot_follow_is_one_line():
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    sliding = namm.attach(MistralForCausalLM(MistralConfig(vocab_size=50, num_key_value_heads=2, **size)))
    for model, cache in ((sliding, namm.Memory(policy(), sliding)), (llama(), None)):
        with pytest.raises(UserError, match="plain causal"):
            model(tokens(), cache=cache)
    with pytest.raises(UserError, match="without padding"):
        read(llama(), tokens(), policy(), attention_mask=torch.arange(150).expand(2, -1) > 3)


# --- the search


def test_constants_of_the_papers_size():
    es = namm.CMAES(4172, 32)
    found = es.mu_eff, es.c1, es.cmu, es.c_sigma
    assert found == pytest.approx((9.179, 1.148e-7, 8.37e-7, 2.67e-3), rel=2e-3) and es.interval == 25


def test_a_generation_is_that_of_the_tutorial_and_nan_ranks_last():
    es = namm.CMAES(6, 9, 0.5)
    x, fitness = es.ask(rng()), torch.rand(9, generator=rng(1)).double()
    es.tell(x, fitness.exp().index_fill(0, fitness.argmin(), math.nan))  # only the order matters
    y, w = x[fitness.argsort(descending=True)] / 0.5, es.weights
    step, scaled = w.clamp(min=0) @ y, torch.where(w < 0, w * 6 / y.square().sum(1), w)
    path = math.sqrt(es.cc * (2 - es.cc) * es.mu_eff) * step
    C = (1 - es.c1 - es.cmu * w.sum()) * torch.eye(6) + es.c1 * path.outer(path) + es.cmu * y.T * scaled @ y
    torch.testing.assert_close(es.mean, 0.5 * step)
    torch.testing.assert_close(es.C, C.double())


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
    ids, target = namm.DENSE(3, 120, namm.LM)
    for n, i in (target >= 0).nonzero().tolist():
        said = ids[n, :i] - namm.FILLERS - 8  # values of the eight keys
        values = said[(said >= 0) & (said // 8 == ids[n, i] - namm.FILLERS)]
        assert target[n, i] == values[-1] % 8


def a_run(tmp_path, **more):
    return common.Run(replace(SMOKE, out=str(tmp_path), device="cpu", **more))


def test_fitness_is_the_mean_ratio_to_the_full_cache_and_leaves_out_tasks_it_fails(tmp_path):
    def task(full, members):
        scores = {"full": [full], "namm": members}
        return namm.Task(3, lambda p, place: (torch.tensor(scores[p.kind]), mock.Mock(layers=[])))

    tasks, theta = (
        [task(0.5, [0.25, 0.5]), task(0.2, [0.2, 0.3]), task(0.0, [0.1, 0.0])],
        torch.zeros(2, 4172),
    )
    found = namm.fitness_of(theta, None, tasks, [[0, 2]] * 3, a_run(tmp_path))
    assert found.tolist() == pytest.approx([0.75, 1.25])


def test_moments_are_those_of_all_features_at_once_and_the_newest_token_has_age_0(monkeypatch):
    monkeypatch.setattr(namm, "recency", mock.Mock(wraps=namm.recency))
    chosen = replace(policy(cap=0, scale=0.0), sums=torch.zeros(3, 17).double())
    layers = read(llama(), tokens(2, 40), chosen)[1].layers  # one update, after 32 tokens
    x = torch.cat([layer.store["omega"][:, :, :32].flatten(0, 2) for layer in layers]).double()
    torch.testing.assert_close(chosen.sums, torch.stack([x**0, x, x**2]).sum(1))
    assert namm.recency.call_args[0][0][0, 0].tolist() == [*range(31, -1, -1)]


# --- files, language models, the script


@pytest.mark.parametrize("numbers, var", [(4172, 1.0), (756, 1.0), (4172, 0.0)])
def test_the_reference_s_checkpoints_load_by_their_exact_keys_or_are_refused(numbers, var, tmp_path):
    state, file = {"mean": torch.rand(numbers)}, tmp_path / "ckpt.pt"
    for name, value in (("mean", 2.0), ("var", var)):
        key = "stored_buffers_to_save.token_embedding_0_output_" + name
        state[key] = torch.full((1, 1, 1, 17), value)
        state[key.replace("output", "online_new_output")] = torch.zeros(1, 1, 1, 17)  # ends alike
    torch.save({"evolution_state": state, "best_val_loss": np.float64(0.5)}, file)
    if numbers < 4172 or not var:
        with pytest.raises(UserError, match="no memory of 4172 parameters"):
            namm.load_memory(file, SMOKE)
        return
    theta, moments = namm.load_memory(file, SMOKE)
    assert torch.equal(theta[0], state["mean"]) and moments[:, 3].tolist() == [2.0, 1.0]
    namm.save_memory(file, theta[0], moments, a_run(tmp_path))
    assert torch.equal(namm.load_memory(file, SMOKE)[0], theta)


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
        "--config text --model lm --tasks q.jsonl --rows NAMM H2O --stages 2 --prompts 2 --validation 9 "
        "--update 32 --cap 40 --context 120 --max_new 4"
    )
    return words.split()


def test_a_language_model_from_a_folder_evolves_a_memory_on_two_ranks_as_on_one(
    text_words, run_script, tmp_path
):
    tables, evolved = [], []
    for ranks in (0, 2):
        run_script(ROOT / "namm.py", *text_words, "--out", f"out{ranks}", ranks=ranks)
        folder = tmp_path / f"out{ranks}" / "namm-text-s0-lm"
        tables.append(json.loads((folder / "results.json").read_text())["table"])
        evolved.append(namm.load_memory(folder / "evolve_bam-s0" / "namm.pt", SMOKE)[0])
    assert tables[0] == tables[1]
    assert torch.equal(*evolved) and evolved[0].any()


def test_smoke_runs_and_a_killed_evolution_ends_alike_from_a_small_file(run_script, tmp_path):
    words = ["--config", "smoke", "--rows", "NAMM", "full cache", "--save_every", "1"]
    run_script(ROOT / "namm.py", *words)
    folder = tmp_path / "out" / "namm-smoke-s0"
    evolved = folder / "evolve_bam-s0"
    first, memory = json.loads((folder / "results.json").read_text()), (evolved / "namm.pt").read_bytes()
    (evolved / "step00000003" / ".metadata").unlink()
    for made in ("evolve_bam-s0", "NAMM_s_tests-s0", "NAMM-s0"):
        (folder / made / "result.json").unlink()
    run_script(ROOT / "namm.py", *words, "--resume")
    assert json.loads((folder / "results.json").read_text())["table"] == first["table"]
    assert (evolved / "namm.pt").read_bytes() == memory
    assert sum(f.stat().st_size for f in (evolved / "step00000002").iterdir()) < 20_000


@pytest.mark.parametrize(
    "words, message",
    [
        ("--tasks longbench_qasper dense", "without --model"),
        ("--stages 1 0", "each of --stages is 1"),
        ("--length 95", "--length is 96"),
        ("--config text --model lm --tasks no.jsonl", "no.jsonl"),
        ("--config text --model lm --tasks q.jsonl --context 17", "--context 17"),
    ],
)
def test_bad_input_is_one_line(words, message, text_words, run_main, tmp_path):
    code, _, err = run_main(namm, "--ranks", 1, *words.split())
    assert code == 2 and message in err and not (tmp_path / "out").exists()


def test_a_dry_run_names_hours_and_what_is_missing(text_words, run_main):
    code, out, _ = run_main(namm, *text_words, "--memory", "no.pt", "--dry_run")
    assert code == 0 and "hours" in out and "missing: no.pt: no memory of 4172" in out
