"""common.py: command line, files, checkpoints, jobs, claims, and the language-model helpers."""

import dataclasses
import json
import math
import random
from dataclasses import dataclass
from typing import Literal

import gymnasium
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import common
from common import Run, UserError, parse_config


@dataclass
class Config(common.Config):
    width: int = 64  # of the model, in units (d)
    rate: float = 1e-3  # step size
    mode: Literal["fast", "slow"] = "fast"  # how
    sizes: tuple[int, ...] = (1, 2)  # of the layers
    name: str | None = None  # of a file
    flag: bool = True  # a switch


CONFIGS = {"smoke": Config(width=2), "demo": Config()}


# --- command line


def test_any_field_can_be_set_on_top_of_a_config():
    line = [
        "--config",
        "smoke",
        "--rate",
        "0.5",
        "--mode",
        "slow",
        "--sizes",
        "3,4",
        "--name",
        "x",
        "--no_flag",
        "--seed=7",
    ]
    cfg = parse_config(CONFIGS, line)
    assert (cfg.config, cfg.width, cfg.rate, cfg.mode, cfg.sizes, cfg.name, cfg.flag, cfg.seed) == (
        "smoke", 2, 0.5, "slow", (3, 4), "x", False, 7,
    )  # fmt: skip
    assert parse_config(CONFIGS, []).config == "demo"
    assert parse_config(CONFIGS, ["--rate", "-1e-3", "--sizes", "-1,2"]).sizes == (-1, 2)
    assert parse_config(CONFIGS, ["--flag", "false", "--name", "none"]).name is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--widht 3", ["--widht", "--width"]),
        ("--width three", ["--width", "three"]),
        ("--mode sloww", ["--mode", "fast, slow"]),
        ("--config dem", ["dem", "demo"]),
        ("--flag maybe", ["--flag", "true, false"]),
        ("--log_every 0", ["--log_every"]),
        ("stray", ["stray"]),
    ],
)
def test_a_bad_argument_is_one_line_with_exit_code_2(line, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(CONFIGS, line.split())
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and all(w in message for w in words), message


def test_a_value_that_the_config_itself_refuses_is_one_line(capsys):
    @dataclass
    class Picky(Config):
        def __post_init__(self):
            if self.width < 1:
                raise ValueError("--width must be positive")

    with pytest.raises(SystemExit) as end:
        parse_config({"demo": Picky()}, ["--width", "0"])
    assert end.value.code == 2 and "--width must be positive" in capsys.readouterr().err


def test_help_lists_every_field_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(CONFIGS, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in text
    assert all(f"{flag} [demo" not in text for flag in ("INT", "STR", "BOOL", "FLOAT")), (
        "a field has no comment"
    )
    assert "of the model, in units (d) [demo: 64]" in text and "seed of every random number generator" in text


# --- files


def test_atomic_write_leaves_the_old_file_when_the_writer_fails(tmp_path):
    file = tmp_path / "x"
    common.write_atomic(file, b"old")

    def fail(f):
        f.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        common.write_atomic(file, fail)
    assert file.read_bytes() == b"old"


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    common.write_json(
        tmp_path / "x", {"a": math.nan, "b": [math.inf, np.float32(1.5)], "c": torch.tensor([1, 2])}
    )
    assert json.loads((tmp_path / "x").read_text()) == {"a": None, "b": [None, 1.5], "c": [1, 2]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"q": "1"}\n{"q": ""}\n', ["line 2", "'q'"]),
        ('{"q": "1"}\n\n{"p": "2"}\n', ["line 3", "'q'"]),
        ('{"q": "1"}\n{"q": \n', ["line 2", "not JSON"]),
        ('{"q": 3}\n', ["line 1", "'q'"]),
        ("[1]\n", ["line 1", "'q'"]),
        ("\n", ["no rows"]),
    ],
)
def test_a_broken_jsonl_names_file_line_and_field(text, words, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        common.read_jsonl(file, ["q"])
    assert all(w in str(error.value) for w in [str(file), *words])


def test_jsonl_rows_may_hold_unicode_line_separators(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"q": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert common.read_jsonl(tmp_path / "x.jsonl", ["q"]) == [{"q": "a\u2028b"}]


# --- runs, checkpoints, jobs


def open_run(tmp_path, **settings):
    return Run(Config(out=str(tmp_path), config="demo", **settings))


def test_checkpoint_round_trip_restores_state_and_every_generator(tmp_path):
    with open_run(tmp_path) as run:
        model, data = torch.nn.Linear(3, 2), {"seen": [1, 2]}
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        run.generator("a")
        run.save(5, model=model, optimizer=optimizer, data=data)

        def draws():
            named = torch.rand(2, generator=run.generator("a")).tolist()
            return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(), named]

        expected, weight = draws(), model.weight.detach().clone()
        moments = optimizer.state_dict()["state"][0]["exp_avg"].clone()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        data["seen"] = []
        assert not torch.equal(model.weight, weight)
        assert run.restore(model=model, optimizer=optimizer, data=data) == 5
        assert draws() == expected
        assert torch.equal(model.weight, weight) and data["seen"] == [1, 2]
        restored = optimizer.state_dict()["state"][0]
        assert restored["step"] == 1 and torch.equal(restored["exp_avg"], moments)


def test_a_generator_made_after_the_restore_goes_on_where_it_was(tmp_path):
    with open_run(tmp_path) as run:
        torch.rand(3, generator=run.generator("late"))
        run.save(1)
        expected = torch.rand(3, generator=run.generator("late"))
    with open_run(tmp_path, resume=True) as run:
        run.restore()
        assert torch.equal(torch.rand(3, generator=run.generator("late")), expected)


def test_a_torn_checkpoint_is_one_error_and_the_one_before_is_kept(tmp_path):
    with open_run(tmp_path) as run:
        run.save(1, data={"x": 1})
        run.save(2, data={"x": 2})
        file = run.folder / "checkpoint.pt"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UserError, match="truncated") as error:
            run.restore(data={})
        assert "checkpoint.previous.pt" in str(error.value) and "\n" not in str(error.value)
        (run.folder / "checkpoint.previous.pt").rename(file)
        assert run.restore(data={}) == 1


def test_checkpoints_are_loaded_with_weights_only(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("this must never run",))

    with open_run(tmp_path) as run:
        torch.save({"step": 1, "rng": [], "state": {"x": Payload()}}, run.folder / "checkpoint.pt")
        with pytest.raises(UserError, match="no checkpoint"):
            run.restore()


def test_steps_go_on_after_the_saved_one_and_drop_later_lines(tmp_path):
    def train(stop_at, **settings):
        with open_run(tmp_path, save_every=2, log_every=1, **settings) as run:
            for step in run.steps(6, state=(state := {"total": 0})):
                state["total"] += step + float(torch.rand(()))
                run.log(step, total=state["total"])
                if step == stop_at:
                    return run.folder
            return run.folder

    whole = (train(None) / "metrics.jsonl").read_text()
    folder = train(4)  # dies in step 4; the checkpoint holds steps 0 to 3
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 5
    train(None, resume=True)
    assert (folder / "metrics.jsonl").read_text() == whole and len(whole.splitlines()) == 6


def test_resume_with_other_settings_names_them(tmp_path, capsys):
    with open_run(tmp_path):
        pass
    with pytest.raises(SystemExit) as end, open_run(tmp_path, resume=True, width=3):
        pass
    assert end.value.code == 2 and "width" in capsys.readouterr().err


def test_a_second_run_without_resume_keeps_the_first_as_backup(tmp_path):
    with open_run(tmp_path) as run:
        (run.folder / "precious").write_text("1")
    with open_run(tmp_path) as run:
        assert not (run.folder / "precious").exists()
        assert (run.folder.with_name(run.folder.name + ".bak") / "precious").exists()


def test_a_non_finite_loss_stops_with_step_term_and_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as end, open_run(tmp_path, save_every=1, log_every=100) as run:
        for step in run.steps(5):
            run.log(step, loss_q=torch.tensor(math.nan if step == 3 else 1.0), other=math.nan)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert "step 3" in message and "loss_q" in message and "checkpoint.pt" in message
    assert torch.load(run.folder / "checkpoint.pt", weights_only=True)["step"] == 3, (
        "the last good one is kept"
    )


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    """The loss of a step is read before its update: a broken gradient shows in the weights first."""
    model = torch.nn.Linear(1, 1)
    with pytest.raises(SystemExit) as end, open_run(tmp_path, save_every=1) as run:
        for step in run.steps(5, model=model):
            run.log(step, loss=torch.tensor(1.0))
            if step == 3:
                model.weight.data.fill_(math.nan)
    assert end.value.code == 2 and "model.weight is not finite" in capsys.readouterr().err
    assert torch.load(run.folder / "checkpoint.pt", weights_only=True)["step"] == 3


def test_a_number_logged_between_two_lines_is_in_the_next_one_although_a_checkpoint_came(tmp_path):
    value = torch.zeros(())
    with open_run(tmp_path, log_every=4, save_every=3) as run:
        for step in run.steps(8):
            run.log(step, loss=value.fill_(step), **({"rare": 7.0} if step == 2 else {}))
    lines = [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [0, 4, 7] and lines[1]["rare"] == 7.0
    assert [x["loss"] for x in lines] == [0.0, 4.0, 7.0], "values, not references to a buffer that changes"


def test_an_early_end_is_the_end_after_a_resume_too(tmp_path):
    seen = []
    for resume in (False, True):
        with open_run(tmp_path, resume=resume) as run:
            for step in run.steps(10):
                seen.append(step)
                if step == 3:
                    run.last = step
    assert seen == [0, 1, 2, 3]


def test_stages_have_their_own_seeds_whatever_ran_before(tmp_path):
    with open_run(tmp_path) as run:
        torch.rand(100)
        run.stage("a")
        first = torch.rand(3)
        run.stage("b")
        assert not torch.equal(torch.rand(3), first)
        run.stage("a")
        assert torch.equal(torch.rand(3), first)


def work(name, run):
    if name == "bad" and not (run.folder.parent / "mended").exists():
        raise UserError("bad fails")
    with open(run.folder.parent / "calls", "a") as f:
        f.write(f"{name}\n")
    return {"name": name, "draw": torch.rand(()).item(), "world": run.world_size}


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_run_once_and_a_rerun_does_only_those_without_result(workers, tmp_path):
    names = ["a", "b", "bad"]
    with pytest.raises(SystemExit) as end, open_run(tmp_path, workers=workers) as run:
        run.jobs(names, work)
    assert end.value.code == 2
    (run.folder / "mended").touch()
    with open_run(tmp_path, workers=workers, resume=True) as run:
        results = run.jobs(names, work)
    assert sorted((run.folder / "calls").read_text().split()) == ["a", "b", "bad"]
    assert [results[n]["name"] for n in names] == names and all(r["world"] == 1 for r in results.values())


def test_jobs_give_the_same_numbers_in_any_number_of_processes(tmp_path):
    found = []
    for workers in (1, 2):
        with open_run(tmp_path / str(workers), workers=workers) as run:
            found.append(run.stage("grid").jobs(["a", "b", "c"], work))
            found[-1]["after"] = torch.rand(3).tolist()
    assert found[0] == found[1]


# --- claims


def test_claim_arithmetic_is_the_paired_standard_error(tmp_path):
    ours, theirs = [3.0, 4.0, 8.0], [1.0, 3.0, 5.0]  # differences 2, 1, 3: mean 2, sd 1, se 1 / sqrt 3
    with open_run(tmp_path) as run:
        row = run.claim("more", ours, theirs)
        assert (row["ours"], row["theirs"], row["diff"], row["holds"]) == (5.0, 3.0, 2.0, True)
        assert row["se"] == pytest.approx(1 / math.sqrt(3))
        assert not run.claim("less", ours, theirs, better="lower")["holds"]
        assert run.claim("less", theirs, ours, better="lower")["holds"]
        assert not run.claim("by more than 1", ours, theirs, margin=1.0)["holds"]  # 2 - 2 se = 0.85
        assert run.claim("not worse by more than 4", theirs, ours, margin=-4.0)["holds"]  # -2 - 2 se = -3.15
        assert not run.claim("not worse by more than 3", theirs, ours, margin=-3.0)["holds"]
        assert run.claim("the same within 3.2", ours, theirs, better="same", margin=3.2)["holds"]
        assert not run.claim("the same within 3.1", ours, theirs, better="same", margin=3.1)["holds"]
        assert not run.claim("one pair", [9.0], [1.0])["holds"]
        with pytest.raises(ValueError, match="margin"):
            run.claim("alike", ours, theirs, better="same")
        with pytest.raises(ValueError, match="paired"):
            run.claim("unpaired", [1.0, 2.0], [1.0])
        run.finish(tokens_per_s=3.0)
    data = json.loads((run.folder / "results.json").read_text())
    assert {"script", "config", "seed", "world_size", "device", "seconds", "table", "claims", "speed"} <= set(
        data
    )
    assert (
        data["speed"] == {"tokens_per_s": 3.0}
        and len(data["claims"]) == 9
        and data["claims"][-1]["se"] is None
    )


# --- language models


def test_char_tokenizer_round_trip_and_offsets():
    tok = common.CharTokenizer("abc$", eos="$")
    out = tok(["cab$", ""], return_offsets_mapping=True)
    assert out["input_ids"] == [[2, 0, 1, 3], []] and out["offset_mapping"][0] == [
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
    ]
    assert tok.decode(tok.encode("cab$")) == "cab$" and tok.decode([2, 3], skip_special_tokens=True) == "c"
    assert len(tok) == 4 and tok.eos_token_id == 3
    with pytest.raises(ValueError, match="z"):
        tok.encode("az")


@pytest.fixture(params=["untied", "tied", "eager", "gpt2"])
def lm(request):
    """A tiny Llama (rotary positions) or GPT-2 (learned ones: a wrong position shows)."""
    torch.manual_seed(1)
    if request.param == "gpt2":
        size = {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        model = GPT2LMHeadModel(GPT2Config(vocab_size=11, **size))
    else:
        model = common.tiny_lm(11, 16, 2, heads=2, context=64, tie_word_embeddings=request.param == "tied")
    if request.param == "eager":
        model.set_attn_implementation("eager")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # far from uniform, so that mistakes show
    return model.eval()


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_token_logprobs_equal_the_full_log_softmax_with_gradients(lm, chunk):
    ids = torch.randint(11, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    logits = lm(ids, attention_mask=mask.long()).logits[:, :-1] / 0.7
    full = logits.log_softmax(-1)
    expected = full.gather(2, ids[:, 1:, None])[..., 0]
    logp, entropy = common.token_logprobs(lm, ids, mask, 0.7, chunk)
    keep = mask[:, 1:]
    torch.testing.assert_close(logp[keep], expected[keep], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy[keep], -(full.exp() * full).sum(-1)[keep], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad((logp * keep).sum(), list(lm.parameters()))
    wanted = torch.autograd.grad((expected * keep).sum(), list(lm.parameters()))
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_token_logprobs_never_holds_a_full_vocabulary_tensor():
    """The largest tensor that any operator makes stays at chunk x V, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    vocabulary, chunk = 5000, 8
    model, ids = common.tiny_lm(vocabulary, 8, 1, heads=1), torch.randint(5000, (4, 65))
    largest = {"rows": 0}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == vocabulary:
                    largest["rows"] = max(largest["rows"], x.numel() // vocabulary)
            return out

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        with Watch():
            logp, _ = common.token_logprobs(model, ids, chunk=chunk)
        assert not [shape for shape in kept if shape[-1:] == (vocabulary,)], "kept from chunk to chunk"
    with Watch():
        logp.sum().backward()
    assert largest["rows"] == chunk


def test_generated_logprobs_equal_a_teacher_forced_forward(lm):
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    tokens, mask, logp = common.generate(lm, prompts, torch.rand(6, 12), temperature=0.7, eos=0)
    for row in range(6):
        n = int(mask[row].sum())
        ids = torch.tensor([prompts[row // 2] + tokens[row, :n].tolist()])
        expected, _ = common.token_logprobs(lm, ids, temperature=0.7)
        torch.testing.assert_close(logp[row, :n], expected[0, -n:], rtol=1e-4, atol=1e-5)
        assert (tokens[row, : n - 1] != 0).all() and (logp[row, n:] == 0).all()
    assert (~mask).any(), "no row ended early: the test saw no padding"


def test_generate_does_not_depend_on_the_batch_it_runs_in(lm):
    prompts, uniforms = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], torch.rand(3, 10)
    tokens, mask, _ = common.generate(lm, prompts, uniforms, eos=0)
    for i, prompt in enumerate(prompts):
        alone, alone_mask, _ = common.generate(lm, [prompt], uniforms[i : i + 1], eos=0)
        assert alone[alone_mask].tolist() == tokens[i][mask[i]].tolist()


def test_greedy_generation_takes_the_argmax(lm):
    tokens, _, _ = common.generate(lm, [[1, 2]], torch.rand(1, 5), temperature=0.0)
    ids = [1, 2]
    for _ in range(5):
        ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokens[0].tolist() == ids[2:]


def test_sampling_follows_softmax_whatever_the_generation_config_says(lm):
    lm.generation_config.update(do_sample=True, top_k=1, repetition_penalty=2.0, temperature=0.1)
    n = 20_000
    tokens, _, _ = common.generate(lm, [[3, 3, 3]], torch.rand(n, 1), temperature=0.7)
    p = (lm(torch.tensor([[3, 3, 3]])).logits[0, -1] / 0.7).softmax(-1)
    expected, observed = n * p, torch.bincount(tokens[:, 0], minlength=11)
    keep = expected > 5
    chi2 = ((observed - expected)[keep] ** 2 / expected[keep]).sum().item()
    assert chi2 < 40, "the 99.99 % quantile of chi^2 with 10 degrees of freedom is 35.6"
    assert keep.sum() > 3


def test_top_p_keeps_the_smallest_set_that_holds_it():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]])).expand(10_000, 4)
    tokens, logp = common.draw_tokens(logits, torch.rand(10_000), 1.0, top_p=0.7)
    share = torch.bincount(tokens, minlength=4) / 10_000
    torch.testing.assert_close(share, torch.tensor([0.0, 2 / 3, 0.0, 1 / 3]), atol=0.02, rtol=0)
    torch.testing.assert_close(logp[tokens == 1][0], torch.tensor(0.5).log())
    assert (common.draw_tokens(logits, torch.rand(10_000), 1.0, top_p=1e-9)[0] == 1).all(), (
        "one token at least"
    )


def test_log_probs_use_float32_logits_under_bfloat16_autocast():
    model = common.tiny_lm(50, 16, 1, heads=1)
    hidden = torch.randn(20, 16) * 5
    with torch.autocast("cpu", torch.bfloat16):
        logits = common.head_logits(model, hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden @ model.lm_head.weight.T, rtol=1e-5, atol=1e-5)


def test_settings_that_change_logits_after_the_head_are_found():
    from transformers import AutoConfig

    kinds = {"gemma2": "final_logit_softcapping", "cohere": "logit_scale", "llama": None, "qwen2": None}
    assert {k: common.rescales_logits(AutoConfig.for_model(k)) for k in kinds} == kinds
    assert common.rescales_logits(AutoConfig.for_model("granite", logits_scaling=8.0)) == "logits_scaling"
    assert common.rescales_logits(AutoConfig.for_model("granite", logits_scaling=1.0)) is None


def test_models_that_rescale_their_logits_are_refused(lm):
    lm.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match="logits_scaling"):
        common.token_logprobs(lm, torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    "a, b",
    [
        (r"10\text{ inches}", "10"),
        (r"\frac{1}{2} \mbox{ cm}^2", "0.5"),
        (r"2\pi\text{ square units}", r"2\pi"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        (r"\frac a2", r"\frac{a}{2}"),
        (r"\frac3{14}", r"\frac{3}{14}"),
        (r"\frac{\sqrt3}2", r"\sqrt{3}/2"),
        (r"\frac{\pi}{2}", r"\pi/2"),
        (r"-\dfrac\pi2", r"-\pi/2"),
        (r"\frac{-1}{2}", "-0.5"),
        ("x=5", "5"),
        ("x = 10{,}000", "10000"),
        (r"10,\!000", "10000"),
        (r"(\text{A})", "(A)"),
        (r"1\frac12", "1.5"),
        (".5", "0.50"),
    ],
)
def test_ways_to_write_one_answer_are_equal(a, b):
    assert common.equal_answers(a, b) and common.equal_answers(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        (r"\sqrt{3}", "3"),
        (r"\sqrt{12}", r"\sqrt12"),  # TeX takes one digit
        (r"\frac{a}{2}", r"\frac{2}{a}"),
        (r"\frac{a+b}{2}", "a+b/2"),
        (r"\frac{1}{2x}", "1/2x"),
        (r"10\text{ inches}", "100"),
        (r"\text{yes}", r"\text{no}"),
        ("x=5", "6"),
        ("a=1,b=2", "2"),
        ("10{,}00", "1000"),
        ("(1,2)", "12"),
    ],
)
def test_different_answers_stay_different(a, b):
    assert not common.equal_answers(a, b) and not common.equal_answers(b, a)


@pytest.mark.parametrize(
    "text, content",
    [
        (r"so \boxed 6.", "6"),
        (r"$\boxed -3$ apples", "-3"),
        (r"\(\boxed \frac{1}{2}\) of it", r"\frac{1}{2}"),
        (r"\boxed{5} or \boxed 6", "6"),
        (r"\boxed 5 or \boxed{6}", "6"),
        (r"\boxed {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{5}, put into \boxed as asked", "5"),
        (r"the answer is $\boxed E$", "E"),
        (r"put into \boxed", None),
        (r"\boxed{5} and \boxed{6", None),
    ],
)
def test_the_last_box_is_read_with_or_without_braces(text, content):
    assert common.extract_boxed(text) == content


def test_casting_leaves_the_rotary_frequencies_alone():
    model = common.cast_parameters(common.tiny_lm(50, 16, 1, heads=1), torch.bfloat16)
    assert (
        model.lm_head.weight.dtype == torch.bfloat16
        and model.model.rotary_emb.inv_freq.dtype == torch.float32
    )


def test_load_lm_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        common.load_lm(str(tmp_path / "model.gguf"))
    with pytest.raises(UserError, match="nobody/nothing"):
        common.load_lm("nobody/nothing")


def test_load_lm_reads_a_local_folder(tmp_path, lm):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    lm.save_pretrained(tmp_path)
    tok = Tokenizer(models.WordLevel({f"w{i}": i for i in range(11)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tok).save_pretrained(tmp_path)
    loaded, tokenizer = common.load_lm(str(tmp_path))
    ids = torch.tensor([tokenizer.encode("w3")])
    assert ids.tolist() == [[3]]
    torch.testing.assert_close(loaded(ids).logits, lm(ids).logits)


# --- reinforcement learning


def test_a_dm_control_task_is_a_gymnasium_environment_with_reproducible_starts():
    from gymnasium.utils.env_checker import check_env

    env = common.dm_control_env("cartpole", "swingup")
    check_env(env, skip_render_check=True)
    a, b = (env.reset(seed=5)[0] for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, env.reset()[0])
    steps, over = 0, False
    while not over:
        _, reward, terminated, over, info = env.step(np.ones(1))
        steps += 1
    assert steps == 1000 and not terminated and 0 <= reward <= 1  # a time limit truncates
    assert info["physics"].shape == (4,)
    with pytest.raises(UserError, match="the nearest is cartpole_swingup"):
        common.dm_control_env("cartpole", "swingupp")


def test_actions_are_scaled_to_the_actuators_range():
    class Spec:
        minimum, maximum, shape = np.array([-2.0, 0.0]), np.array([2.0, 1.0]), (2,)

    env = common.DmControl.__new__(common.DmControl)
    env.low, env.span = Spec.minimum, Spec.maximum - Spec.minimum
    assert env.control([-1, 1]).tolist() == [-2, 1]
    assert env.control([0.5, 5]).tolist() == [1, 1]


class Countdown(gymnasium.Env):
    """Rewards of 1 for `length` steps; odd lengths terminate, even ones are truncated."""

    def __init__(self, length):
        self.length, self.observation_space = length, gymnasium.spaces.Box(0, 99, (1,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.left = self.length
        return np.array([self.left], np.float32), {}

    def step(self, action):
        self.left -= 1
        end = self.left == 0
        return np.array([self.left], np.float32), float(action[0]), end and self.length % 2 == 1, end, {}


def test_evaluation_counts_each_environments_first_episode_only():
    envs = common.vector_env([lambda n=n: Countdown(n) for n in (1, 2, 5)])
    returns = common.evaluate_policy(envs, lambda obs: np.full((3, 1), 0.5, np.float32), seed=0)
    assert returns.tolist() == [0.5, 1.0, 2.5]


def test_environments_in_processes_step_like_those_in_this_one():
    ends = []
    for processes in (False, True):
        envs = common.vector_env([lambda n=n: Countdown(n) for n in (2, 3)], processes, autoreset=False)
        envs.reset(seed=0)
        ends.append(envs.step(np.ones((2, 1), np.float32))[0].tolist())
        envs.close()
    assert ends[0] == ends[1] == [[1], [2]]


def test_the_replay_buffer_keeps_the_last_rows_and_survives_a_checkpoint():
    replay = common.Replay(5)
    for i in range(4):
        replay.add(x=torch.tensor([[2.0 * i], [2.0 * i + 1]]), a=np.array([2 * i, 2 * i + 1]))
    assert sorted(replay.fields["a"].tolist()) == [3, 4, 5, 6, 7]
    drawn = replay.sample(500, torch.Generator().manual_seed(0))
    assert set(drawn["a"].tolist()) == {3, 4, 5, 6, 7} and torch.equal(drawn["x"][:, 0].long(), drawn["a"])
    other = common.Replay(5)
    other.load_state_dict(replay.state_dict())
    other.add(x=torch.tensor([[8.0]]), a=np.array([8]))
    assert sorted(other.fields["a"].tolist()) == [4, 5, 6, 7, 8]
    replay.add(x=torch.arange(9.0)[:, None], a=np.arange(9))  # more than fit
    assert sorted(replay.fields["a"].tolist()) == [4, 5, 6, 7, 8]


def test_a_soft_update_moves_parameters_and_leaves_buffers():
    target, source = (torch.nn.BatchNorm1d(3) for _ in range(2))
    with torch.no_grad():
        source.weight.fill_(3.0)
        source.running_mean.fill_(7.0)
    common.soft_update(target, source, 0.25)
    assert target.weight.tolist() == [1.5] * 3 and target.running_mean.tolist() == [0.0] * 3


def test_an_ensemble_of_linear_layers_is_a_layer_for_each_member():
    layer = common.EnsembleLinear(4, 3, 2)
    layer.orthogonal_(1.5, [torch.Generator().manual_seed(i) for i in (0, 1)])
    x = torch.randn(2, 5, 3)
    out = layer(x)
    for e in range(4):
        torch.testing.assert_close(out[e], x[e // 2] @ layer.weight[e] + layer.bias[e])
        torch.testing.assert_close(layer.weight[e].T @ layer.weight[e], 2.25 * torch.eye(2))
    assert not torch.equal(layer.weight[0], layer.weight[1])
    narrow = common.EnsembleLinear(2, 3, 1)
    narrow.orthogonal_(1.0, [torch.Generator().manual_seed(0)])
    torch.testing.assert_close(narrow(x), x @ narrow.weight + narrow.bias)
