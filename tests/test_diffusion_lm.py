"""diffusion_lm.py: the path beside the frozen LM, corruption, solvers, guidance, decoding, command line."""

import json
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch
from conftest import ROOT
from scipy import stats
from torch import nn
from torch.nn import functional as F

import common
import diffusion_lm as dlm

CFG = replace(dlm.CONFIGS["smoke"], size=8, sigma=3.0, hidden=16)
VOCAB = 40


def make(vocabulary=VOCAB, **settings):
    """A Llama of two layers with grouped queries, a path whose parameters are all random, and settings."""
    torch.manual_seed(3)
    size = dict(num_key_value_heads=2, intermediate_size=48, initializer_range=0.2)
    lm, cfg = common.tiny_lm(vocabulary, 32, 2, **size).requires_grad_(False), replace(CFG, **settings)
    path = dlm.DiffusionPath(lm, cfg)
    torch.manual_seed(4)
    for p in path.parameters():
        nn.init.normal_(p, std=0.3)
    return lm, path, cfg


def batch_of(B=3, K=4, kind=1):
    """Texts of nine tokens with K diffusion tokens each."""
    ids, places = torch.randint(VOCAB, (B, 9)), torch.rand(B, 8).argsort(1)[:, :K]
    return dlm.Batch(ids, places, ids.gather(1, places + 1), places >= 0, torch.full_like(places, kind))


@torch.no_grad()
def logits(lm, path, batch, x, t):
    return dlm.lm_head(lm, path.merge(x, path.condition(t, batch.label), dlm.look(lm, batch)))


X, TIME = torch.randn(3, 4, 8), torch.rand(3, 4)


# --- the path


@pytest.mark.parametrize("rank, kind", [(0, 0), (0, 3), (2, 1)])
def test_logits_are_the_lm_s_to_the_bit_at_time_zero_whatever_the_path_and_always_for_a_new_path(rank, kind):
    lm, path, cfg = make(rank=rank, conditional=True)
    batch = batch_of(kind=kind)
    own = dlm.lm_head(lm, dlm.look(lm, batch).hidden)
    torch.testing.assert_close(own, lm(batch.ids).logits.take_along_dim(batch.places[..., None], 1))
    assert torch.equal(logits(lm, path, batch, 1e4 * X, 0 * TIME), own)
    assert not torch.allclose(logits(lm, path, batch, X, TIME), own)
    new, h = dlm.DiffusionPath(lm, cfg), torch.randn(5, 32)
    assert torch.equal(logits(lm, new, batch, X, TIME), own)
    assert torch.equal(new.blocks[1].up_proj(h), lm.base_model.layers[1].mlp.up_proj(h))


def test_every_parameter_learns_but_w_s_last_bias():
    _, path, cfg = make(conditional=True, rank=2)
    batch = dlm.with_noise(batch_of(), replace(cfg, draws=3))
    assert batch.t.unique().numel() == batch.t.numel()
    path(batch).mean().backward()
    silent = [name for name, p in path.named_parameters() if p.grad.abs().max() < 1e-7]
    assert silent == ["weight.2.bias"]


def test_vocabulary_lies_on_a_sphere_so_its_scale_is_free():
    _, path, cfg = make()
    table = path.embed(torch.arange(VOCAB))
    torch.testing.assert_close(table.norm(dim=1), torch.full((VOCAB,), cfg.size**0.5))
    for p in path.embedding.parameters():
        p.data *= 3
    torch.testing.assert_close(path.embed(torch.arange(VOCAB)), table)


def test_diffusion_tokens_see_the_context_up_to_their_place_and_not_each_other():
    lm, path, _ = make()
    batch = replace(batch_of(), places=torch.tensor([[2, 5, 7, 1]] * 3))
    before, first = logits(lm, path, batch, X, TIME), torch.tensor([1.0, 0, 0, 0])

    def changed(x, t):
        return ((logits(lm, path, batch, x, t) - before).abs().amax((0, 2)) > 1e-4).tolist()

    assert changed(X + first[:, None], TIME) == changed(X, TIME * (1 - first / 2)) == [1, 0, 0, 0]
    batch.ids[:, 3] = (batch.ids[:, 3] + 1) % VOCAB
    assert changed(X, TIME) == [0, 1, 1, 0]


def test_modulation_is_additive_and_time_is_not_scaled():
    lm, path, _ = make(hidden=4)
    norm = lm.base_model.layers[0].input_layernorm
    nn.init.normal_(norm.weight)
    h, m, s = torch.randn(3, 2, 5, 32)
    wanted = norm(h) / norm.weight * (norm.weight + m) + s
    torch.testing.assert_close(dlm.modulated_norm(norm, h, m, s), wanted, rtol=1e-3, atol=1e-4)
    path.time = nn.Identity()
    start, half = path.tau(torch.tensor([0.0, 0.5]), None)
    assert start.tolist() == [1, 1, 0, 0] and half[0] == torch.tensor(0.5).cos()


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_corruption_goes_from_noise_to_the_token_with_the_variance_that_scales_it(t):
    x1, x0 = torch.randn(20_000, 8), CFG.sigma * torch.randn(20_000, 8)
    x = dlm.corrupt(x1, x0, torch.full((20_000,), t))
    scale = make()[1].condition(torch.tensor(t), torch.tensor(0))[0]
    assert (x / scale).var().item() == pytest.approx(1, abs=0.02)
    assert t == 0.3 or torch.equal(x, x1 if t else x0)


# --- solvers

TIMES = [0.0, 0.2, 0.35, 0.8, 1.0]


def test_a_constant_prediction_is_reached_exactly_by_all_solvers():
    x, goal = torch.randn(2, 3, 1, 4)
    for solve in (dlm.euler, dlm.midpoint):
        torch.testing.assert_close(solve(lambda *_: goal, x, TIMES), goal)
    found, count = dlm.adaptive(lambda *_: goal, x, 0.1)
    torch.testing.assert_close(found, goal)
    assert count.max() <= 6


def test_euler_is_a_recency_weighted_vote_and_the_last_midpoint_interval_extrapolates():
    x0, *votes = torch.randn(5, 3)
    visited = []

    def predict(x, t, end):
        visited.append(x)
        return votes[len(visited) - 1]

    dlm.euler(predict, x0, TIMES)
    weights = [1 / (1 - end) - 1 / (1 - t) for t, end in pairwise(TIMES[:-1])]
    vote = sum(weight * v for weight, v in zip(weights, votes, strict=False))
    torch.testing.assert_close(visited[3], (1 - TIMES[3]) * (x0 + vote))
    visited.clear()
    torch.testing.assert_close(dlm.midpoint(predict, x0, TIMES[-2:]), 2 * votes[1] - votes[0])


def test_a_gaussian_s_exact_posterior_mean_carries_noise_to_it_with_the_solvers_orders():
    x0 = torch.randn(500, 1, 1, dtype=torch.double)

    def predict(x, t, end):  # of N(1, 0.5^2) from N(0, 1)
        t = torch.as_tensor(t).view(-1, 1, 1)
        return 1 + t * 0.25 / (t**2 * 0.25 + (1 - t) ** 2) * (x - t)

    def error(solve, n):
        times = torch.linspace(0, 0.8, n, dtype=torch.double).tolist()
        return (solve(predict, x0, times) - 0.8 - 0.2**0.5 * x0).norm()

    assert error(dlm.euler, 101) / error(dlm.euler, 201) == pytest.approx(2, abs=0.2)
    assert error(dlm.midpoint, 101) / error(dlm.midpoint, 201) > 3.5
    torch.testing.assert_close(dlm.adaptive(predict, x0, 1e-3)[0], 1 + 0.5 * x0, rtol=0.02, atol=0.02)


def test_adaptive_counts_are_calls_and_rows_do_not_depend_on_their_batch():
    x, calls = torch.randn(16, 1, 4), []

    def solve(rows):
        calls.clear()
        frequency = torch.linspace(0, 20, 16)[rows, None, None]

        def predict(x, t, end):
            calls.append(t)
            return (frequency * t[..., None] + x).sin()

        return dlm.adaptive(predict, x[rows], 0.05)

    found, count = solve(slice(None))
    assert count.max() == len(calls) and count[-1] > 2 * count[0]
    alone, calls_alone = solve(slice(7, 8))
    assert torch.equal(alone[0], found[7]) and calls_alone[0] == count[7] == len(calls)


# --- decoding


def test_x_hat_is_sampled_from_p_or_its_mode_or_its_mean():
    z, table = torch.randn(5).double(), torch.randn(5, 3).double()
    counts = dlm.draw_token(z.expand(20_000, 5), 1.0).bincount(minlength=5)
    assert stats.chisquare(counts, 2e4 * z.softmax(0)).pvalue > 1e-3
    torch.testing.assert_close(dlm.to_embedding(z, table, "average", 1.0), (z.softmax(0) @ table).float())
    for kind, heat in (("argmax", 1.0), ("sample", 0.0)):
        assert torch.equal(dlm.to_embedding(z, table, kind, heat), table[z.argmax()])


@pytest.mark.parametrize("evals", [2, 8])
def test_the_exact_posterior_keeps_the_lm_s_probabilities_at_any_number_of_evaluations(evals):
    lm, path, cfg = make(bayes=True, evals=evals)
    context = dlm.look(lm, batch_of(1, 1))
    p, best = dlm.lm_head(lm, context.hidden).softmax(-1).max(-1)
    context = context._replace(hidden=context.hidden.expand(1, 8000, -1))
    token, _ = dlm.Decoder(lm, path, cfg).solve(context, torch.zeros(1, 8000).long(), 1.0)
    assert stats.binomtest(int((token == best).sum()), 8000, p.item()).pvalue > 1e-3


def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_unconditional_one():
    lm, path, cfg = make(conditional=True, x_hat="average", evals=4)
    batch, found = batch_of(), []
    path.reader.register_forward_pre_hook(lambda _, x: found.append(x[0]))
    for g, kind, evaluations in ((1, 1, 4), (1, dlm.NOBODY, 4), (0, 1, 7)):
        torch.manual_seed(0)
        decoder, label = dlm.Decoder(lm, path, replace(cfg, guidance=g)), torch.full((3, 4), kind)
        assert (decoder.solve(dlm.look(lm, batch), label, 0.0)[1] == evaluations).all()
    known, free, zero = found[2], found[5], found[-1]  # what the last evaluation gets
    torch.testing.assert_close(zero, free)
    assert not torch.allclose(known, free)


def test_a_class_is_dropped_for_one_token_in_five():
    dropped = dlm.with_noise(batch_of(500, 8), replace(CFG, draws=4)).label == dlm.NOBODY
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("evals, solver, calls", [(1, "adaptive", 0), (6, "euler", 5), (7, "midpoint", 6)])
def test_the_main_path_runs_once_a_token_and_time_zero_costs_nothing(evals, solver, calls):
    lm, path, cfg = make(evals=evals, solver=solver)
    modules, seen = (lm.base_model, path.reader, path.time), []
    for module in modules:
        module.register_forward_hook(lambda module, *_: seen.append(module))
    dlm.generate(dlm.Decoder(lm, path, cfg), [[1, 2, 3], [4]], 5, [99], 0, 1.0)
    assert [seen.count(module) for module in modules] == [5, 5 * calls, 2 * calls]  # tabulated, too


def test_one_evaluation_writes_what_transformers_writes_whatever_the_padding():
    lm, path, cfg = make(evals=1)
    prompts = [[5, 1, 2, 1, 7, 8], [3], [9, 9]]
    wanted = common.generate(lm, prompts, torch.rand(3, 8), [1], 0.0)
    found = dlm.generate(dlm.Decoder(lm, path, cfg), prompts, 8, [1], 0, 0.0).tolist()
    for row, more in zip(found, wanted, strict=True):
        assert row == more + [1] * (len(row) - len(more))


def test_a_cached_and_padded_token_is_decoded_as_in_the_parallel_pass():
    lm, path, cfg = make(evals=5, x_hat="average", sigma=0.0)
    decoder = dlm.Decoder(lm, path, cfg)
    _, row = dlm.generate(decoder, [[5, 1, 2], [3]], 6, [99], 0, 0.0)
    places = torch.arange(6)[None]
    batch = dlm.Batch(F.pad(row, (1, 0), value=3)[None], places, 0 * places, places >= 0, 0 * places)
    assert torch.equal(decoder.solve(dlm.look(lm, batch), batch.label, 0.0)[0][0], row)


@pytest.mark.parametrize("both", [False, True])
def test_lists_have_one_word_twice_or_one_of_each_topic_and_counts_are_right(both):
    batch = dlm.duplicates(500, (4, 12), both)
    counts = F.one_hot(batch.ids, 261).sum(1)[:, : dlm.WORDS]
    assert ((counts == 2).sum(1) == 1 + both).all() and torch.equal(batch.targets % 2, batch.label)
    assert (counts.gather(1, batch.targets) == 2).all()
    asked = dlm.how_often(batch, 1.0)
    assert torch.equal(counts.gather(1, asked.ids[:, -1:]), asked.targets - dlm.NONE)


# --- real models and the script


TEXT = "--config text --model lm --data p.jsonl --steps 3 --max_new 6 --hidden 16 --context 99"


def test_labels_are_the_answer_and_its_end_and_every_answer_is_an_example(bpe_tokenizer, tmp_path):
    turns = [dict(role="user", content="We add."), dict(role="assistant", content="It is 42.")]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": 2 * turns, "category": "math"}))
    examples = dlm.load_conversations(replace(CFG, data=str(tmp_path / "c.jsonl")))
    batch = dlm.conversations(examples, bpe_tokenizer, 200)
    texts = [bpe_tokenizer.decode(row[mask]) for row, mask in zip(batch.targets, batch.mask, strict=True)]
    assert texts == ["It is 42.<|im_end|>"] * 2 and not batch.label.any()


def test_lm_eval_shows_five_examples_as_turns_and_grades_what_our_decoder_writes(
    bpe_tokenizer, words_task, monkeypatch
):
    seven, spy = bpe_tokenizer.encode("7"), mock.MagicMock(wraps=dlm.generate)
    monkeypatch.setattr(dlm, "generate", spy)
    monkeypatch.setattr(dlm, "draw_token", lambda z, temperature: torch.full(z.shape[:-1], *seven))
    lm, path, cfg = make(len(bpe_tokenizer), bench=("words",), max_new=3)
    found = dlm.benchmarks(dlm.Decoder(lm, path, cfg), bpe_tokenizer, cfg, common.Run(cfg))
    asked = map(bpe_tokenizer.decode, spy.call_args.args[1])
    assert found == {"words": 0.5} and {text.count("user\n7") for text in asked} == {6}


def losses(folder):
    files = sorted(folder.rglob("metrics.jsonl"))
    return [json.loads(line)["loss"] for file in files for line in file.open()]


def test_two_ranks_train_as_one_does_and_leave_the_lm_alone(text_files, run_script, tmp_path):
    words = [ROOT / "diffusion_lm.py", *TEXT.split(), "--rows", "full finetuning", "T = 4"]
    run_script(*words, "--out", "one")
    done = run_script(*words, "--out", "two", ranks=2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)
    before, after = done.stdout.split("checksum of the LM: ")[1].split(" before training, ")
    assert after.startswith(before)


def test_smoke_runs_and_a_killed_run_resumes_to_the_same_numbers(run_script, tmp_path):
    rows = ["T = 4", "T = 15, midpoint", "adaptive", "classes: g = 3"]
    words = [ROOT / "diffusion_lm.py", "--config", "smoke", "--save_every", "3", "--rows", *rows]
    folder = tmp_path / "out" / "diffusion_lm-smoke-s0"

    def run(*more):
        run_script(*words, *more)
        found = json.loads((folder / "results.json").read_text())
        assert all(found["speed"][row][0]["tokens_per_s"] > 0 for row in rows)
        return found["table"]

    first, path = run(), folder / "L2D_blind=False_classes=False-s0"
    for file in (path / "result.json", path / "step00000006/.metadata", folder / "T_=_4-s0/result.json"):
        file.unlink()
    assert run("--resume") == first


SIZES = {
    "meta-llama/Llama-3.2-1B-Instruct": ("73,344,256", "992,945,408", "3,407,872"),
    "meta-llama/Llama-3.1-8B-Instruct": ("281,036,032", "6,918,522,112", "13,631,488"),
    "Qwen/Qwen2.5-1.5B-Instruct": ("103,324,928", "1,357,825,280", "4,358,144"),
    "Qwen/Qwen2.5-7B-Instruct": ("233,008,384", "6,582,236,416", "10,092,544"),
}


@pytest.mark.parametrize("model", SIZES)
def test_the_dry_run_has_the_paper_s_parameter_counts_and_says_what_is_missing(model, run_main, tmp_path):
    code, out, _ = run_main(dlm, "--config", "full", "--model", model, "--dry_run")
    assert code == 0 and all(size in out for size in SIZES[model])
    assert f"missing: --model '{model}'" in out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, line",
    [
        ("--solver midpoint --evals 16", "odd number, such as 17"),
        ("--solver adaptive", "--x_hat average"),
        ("--method LoRA", "goes with --evals 1"),
        ("--config text --model lm --data p.jsonl --holdout 11", "leaves no answer"),
        ("--config text --model . --dry_run", "made for llama and qwen2"),
        ("--config text --model none --data p.jsonl", "neither here nor on the hub"),
        ("--config text --model lm --data bad.jsonl", "lack messages"),
        ("--config text --model lm --data p.jsonl --bench mbpp_instruct", "HF_ALLOW_CODE_EVAL=1"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_computed(words, line, text_files, run_main, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "Q"}\n' * 3)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    code, _, err = run_main(dlm, *words.split())
    assert code == 2 and line in err and not (tmp_path / "out").exists()
