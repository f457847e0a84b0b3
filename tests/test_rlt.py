"""rlt.py: reward, alignment of tokens, GRPO, data and command line, against closed forms."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import ROOT, bpe

import common
import rlt
from common import Run, UserError
from rlt import Episode, Example

QUESTION = Example("What is 12 plus 30?", "\n\nThe answer is 42.\n\n")


@pytest.fixture
def run(tmp_path):
    """The pointer task with two symbols to follow, and no base model yet."""
    cfg = replace(rlt.CONFIGS["smoke"], out=str(tmp_path), temperature=0.7, alpha=0.3, micro_tokens=100)
    run = Run(cfg)
    run.folder.mkdir(parents=True)
    return run


@pytest.fixture
def models(run):
    torch.manual_seed(3)
    return [rlt.hop_model(run.cfg).eval() for _ in range(2)]


@pytest.fixture
def pointers(models):
    return rlt.Prompts(models[0].tokenizer, *rlt.POINTERS)


def problems(run, n, p_write=0.5):
    return rlt.make_problems(n, run.cfg, torch.Generator().manual_seed(5), p_write)


def episodes(examples, texts):
    return [Episode(e, [], 0, text) for e, text in zip(examples, texts, strict=True)]


# --- reward


def brute_force_reward(e, t, closed, teacher, student, prompts, cfg):
    """Eqs. (1) to (3) from whole softmax tables, one token at a time; one symbol is one token here."""

    def logp(model, text):
        ids = torch.tensor([prompts.tokenizer.encode(text)])
        table = (model.lm(ids).logits[0].double() / cfg.temperature).log_softmax(-1)
        return [None] + [table[i - 1, ids[0, i]].item() for i in range(1, ids.shape[1])]

    head_t, head_s = f"!{e.question}[{e.solution}]{{", f"?{e.question}("
    of_teacher = logp(teacher, head_t + t + "}$")
    of_student = logp(student, head_s + t + f")[{e.solution}]$")
    ell = of_student[len(head_s + t) + 2 :][: len(e.solution)]
    d = [of_teacher[len(head_t) + j] - of_student[len(head_s) + j] for j in range(len(t))]
    r_kl = np.mean(d) + cfg.alpha * max(d) if d else 1 + cfg.alpha
    return np.mean(ell) + cfg.alpha * min(ell) - cfg.lam * r_kl - (not closed)


def test_reward_equals_brute_force_from_softmax_tables_alone_and_in_a_batch(run, pointers, models):
    examples = problems(run, 5)
    texts = [examples[0].trace + "}$", "ab}$", "ab~c", "}$", "abcabcabc}ab}$"]
    split = [(examples[0].trace, True), ("ab", True), ("ab~c", False), ("", True), ("abcabcabc", True)]
    told = episodes(examples, texts)
    found = rlt.rewards(told, *models, pointers, run)
    assert [(e.example.trace, e.closed) for e, *_ in found] == split
    alone = [rlt.rewards([e], *models, pointers, run)[0] for e in told]
    for e, s, one, other in zip(examples, split, found, alone, strict=True):
        expected = brute_force_reward(e, *s, *models, pointers, run.cfg)
        assert [x[1]["reward"].item() for x in (one, other)] == pytest.approx([expected] * 2, abs=1e-4)


def test_kl_is_zero_when_teacher_and_student_are_one_model_in_one_context(run, pointers, models):
    alike = rlt.Prompts(pointers.tokenizer, rlt.POINTERS[1], rlt.POINTERS[1])
    told = episodes(problems(run, 1), ["abc]"])
    ((_, parts, _, d),) = rlt.rewards(told, models[0], models[0], alike, run)
    assert parts["r_kl"].abs() < 1e-6 and len(d) == 3


# --- texts and tokens


@pytest.fixture
def prompts(bpe_tokenizer):
    return rlt.Prompts(bpe_tokenizer, *rlt.TEXT)


def test_completions_are_split_at_the_first_closing_tag(prompts):
    tag = "<|end_of_explanation|>"
    told = [prompts.explain(QUESTION, x) for x in (f"x\n\n{tag}y{tag}", "x", tag, "")]
    split = [("x\n\n", True), ("x", False), ("", True), ("", False)]
    assert [(e.example.trace, e.closed) for e in told] == split


def test_places_are_those_of_t_and_s_although_the_system_prompts_mention_the_tags(prompts):
    system, t = rlt.STRATOS_SYSTEM, "think <|end_of_thought|>\n\n"
    e = Example("what? <|begin_of_thought|>", "\n\n42\n\n", t, system)
    told, shown = (prompts.write(x, e) for x in (prompts.teacher, prompts.student))
    decode = prompts.tokenizer.decode
    solution = f"<|begin_of_solution|>{e.solution}<|end_of_solution|>"
    ours = f"assistant\n{solution}\n\n<|begin_of_explanation|>\n\n"
    assert decode(told.ids[: told.first]).endswith(ours)
    ours = f"<|begin_of_thought|>\n\n{e.trace}<|end_of_thought|>\n\n{solution}<|im_end|>\n"
    assert decode(shown.ids[shown.first :]) == ours
    assert system in decode(shown.ids) and system not in decode(told.ids)


def test_merged_tags_are_dropped_and_both_contexts_hold_the_same_tokens_of_t(prompts):
    tok, t = prompts.tokenizer, "We add the two numbers: 12 plus 30 is 42."
    assert "|>\n\n" in [tok.decode([i]) for i in tok.encode("<|end_of_solution|>\n\nWe")], "the trap is there"
    for question in (QUESTION, replace(QUESTION, question=t)):  # the second restates the explanation
        e = prompts.explain(question, t + "\n\n<|end_of_explanation|><|im_end|>\n")
        ids, t_student = e.student.ids, [e.student.t[x] for x in e.shared]
        in_teacher = [e.teacher.ids[e.teacher.t[x]] for x in e.shared]
        assert in_teacher == [ids[i] for i in t_student]
        assert tok.decode(in_teacher).strip() == t, "only paddings may be lost"
        assert tok.decode([ids[i] for i in e.student.s.values()]).strip() == "The answer is 42."
        assert tok.decode(ids[: t_student[0]]).strip().endswith("<|begin_of_thought|>")


def test_templates_that_trim_and_models_without_one_are_carried_others_refused(prompts):
    tok = bpe(["abc"])
    tok.chat_template = tok.chat_template.replace("{{ m.content }}", "{{ m.content | trim }}")  # as Llama-3's
    e = replace(QUESTION, question=" spaced ")
    prompts = rlt.Prompts(tok, *rlt.TEXT)
    assert tok.decode(prompts.write(prompts.student, e).ids).endswith("<|end_of_solution|><|im_end|>\n")
    tok.chat_template, tok.eos_token = None, "<|im_start|>"  # no <|im_end|> is asked for
    assert rlt.Prompts(tok, *rlt.TEXT).end_of_turn == "<|im_start|>\n"
    tok.chat_template = tok.chat_template.replace("{{ m.content }}", "<think></think>{{ m.content }}")
    special = bpe(["<|begin_of_thought|>"], additional_special_tokens=["<|begin_of_thought|>"])
    for words, wrong in {"special token": special, "template": tok}.items():
        with pytest.raises(UserError, match=words):
            rlt.Prompts(wrong, *rlt.TEXT)


# --- GRPO and supervised training


def test_advantages_are_centred_scaled_by_the_unbiased_std_and_zero_in_a_constant_group():
    r = torch.tensor([1.0, 2.0, 6.0, 0.1, 0.1, 0.1])
    a = rlt.group_advantage(r, 3)
    torch.testing.assert_close(a[:3], torch.tensor([-2.0, -1.0, 3.0]) / (math.sqrt(7) + 1e-4))
    assert a[3:].tolist() == [0.0, 0.0, 0.0]


def test_grpo_loss_has_the_stated_value_and_gradient_on_the_mask_alone():
    logp, ref = torch.randn(2, 4).requires_grad_(), torch.randn(2, 4)
    a, mask = torch.tensor([1.5, -0.5]), torch.tensor([[True, True, False, False], [True, True, True, False]])
    loss = rlt.grpo_loss(logp, ref, a, mask, 0.04)
    (gradient,) = torch.autograd.grad(loss, logp)
    rho = (ref - logp).detach()
    each = -(a[:, None] - 0.04 * (rho.exp() - rho - 1))
    weight = mask / mask.sum(1, keepdim=True) / 2
    torch.testing.assert_close(loss, (each * weight).sum())
    torch.testing.assert_close(gradient, (-a[:, None] + 0.04 * (1 - rho.exp())) * weight)
    at_ref = rlt.grpo_loss(logp, logp.detach(), torch.zeros(2), mask, 0.04)
    assert at_ref == 0 and torch.autograd.grad(at_ref, logp)[0].abs().max() == 0


def test_no_question_comes_twice_in_an_update_and_all_come_once_an_epoch(run):
    steps = [rlt.distinct(list(range(14)), 4, run, step) for step in range(6)]
    epochs = [steps[0] + steps[1] + steps[2], steps[3] + steps[4] + steps[5]]
    assert all(len(set(rows)) == 12 for rows in epochs) and epochs[0] != epochs[1]


def test_supervised_tokens_are_those_of_the_stated_span(run, pointers, models):
    e, (model, _) = problems(run, 1)[0], models
    text, supervised = f"!{e.question}[{e.solution}]{{{e.trace}}}$", f"{e.trace}}}$"
    ids = torch.tensor([pointers.tokenizer.encode(text)])
    logp = model.lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    told = pointers.write(pointers.teacher, e)
    rlt.sft(model, "one", 1, lambda step: [told], 0.1, run, floor=1.0)
    line = json.loads((run.folder / "one" / "metrics.jsonl").read_text())
    assert line["loss"] == pytest.approx(-logp[-len(supervised) :].mean().item(), rel=1e-5)


def test_the_episodes_of_all_ranks_together_are_those_of_one(run, pointers):
    def sample(ids, uniforms, temperature):
        return [[int(10 * u)] for u in uniforms[:, 0]]

    dealt = []
    for run.rank, run.world_size in ((0, 1), (0, 4), (1, 4), (2, 4), (3, 4)):
        chance = run.generator("x")
        dealt.append(rlt.rollout(sample, False, problems(run, 3), 1.0, pointers, run, chance))
    assert [[e] for e in dealt[0]] + [[]] == dealt[1:]


@pytest.mark.parametrize("config", ["smoke", "demo", "gpu"])
def test_a_right_answer_fits_and_is_rewarded(run, config, monkeypatch):
    run.cfg = replace(rlt.CONFIGS[config], updates=1, width=32)
    prompts = rlt.Prompts(rlt.hop_model(run.cfg).tokenizer, *rlt.POINTERS)
    examples = problems(run, run.cfg.prompts)
    right = {e.question: f"({e.trace})[{e.solution}]$" for e in examples}

    def sample(ids, uniforms, temperature):
        answers = [right[prompts.tokenizer.decode(x)[1:]] for x in ids]
        return [prompts.tokenizer.encode(x)[: uniforms.shape[1]] for x in answers]

    monkeypatch.setattr(rlt, "load", lambda *args, **more: rlt.hop_model(run.cfg))
    monkeypatch.setitem(rlt.SAMPLERS, "hf", lambda *args: sample)
    rlt.train_grpo("", examples, 1, False, prompts, run)
    assert json.loads((run.folder / "metrics.jsonl").read_text())["reward"] == 1


# --- problems and data


def test_problems_are_what_they_say(run):
    run.cfg = replace(run.cfg, symbols=20, chains=8)
    rows = problems(run, 100, p_write=0.45)
    for e in rows:
        f = dict(zip(rlt.SYMBOLS, e.question[:20], strict=False))
        for i, x in enumerate(e.question[20:]):
            chain, told = [x, f[x], f[f[x]], f[f[f[x]]]], e.trace[4 * i : 4 * i + 4]
            assert all(c in (w, "~") for c, w in zip(told, chain, strict=True))
            assert told[0] == x and told[3] == chain[3] == e.solution[i]
        credit = [e.judge(e.solution, text) for text in (f"(x)[{e.solution}]$", f"[{e.solution}a]", "no")]
        assert credit[0] == 1 and 0 < credit[1] < 1 and credit[2] == 0
    assert 1 - sum(e.trace.count("~") for e in rows) / 1600 == pytest.approx(0.45, abs=0.04)


def load(run, *rows):
    (run.folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rlt.load_examples(replace(run.cfg, teacher="lm", data=str(run.folder / "x.jsonl")), run)


BLOCKS = (
    "<|begin_of_thought|>\n\nT\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nS\n\n<|end_of_solution|>"
)


def stratos(*texts):
    return {"system": "SYS", "conversations": [{"from": "x", "value": text} for text in texts]}


def test_jsonl_gsm8k_stratos_and_gym_rows(run):
    (e,) = load(run, {"question": "q", "solution": "s", "reasoning_trace": "t"})
    assert e == Example("q", "\n\ns\n\n", "t\n\n", rlt.STRATOS_SYSTEM)
    (e,) = load(run, {"question": "Q", "answer": "r1\nr2\n#### 1,234"})
    assert (e.solution, e.trace) == ("\n\nThe answer is \\boxed{1,234}\n\n", "r1\nr2\n\n")
    assert [e.judge(e.solution, x) for x in (r"\boxed{1234}", r"\boxed{1235}", "1234")] == [1, 0, 0]
    assert load(run, stratos("Q", BLOCKS)) == [Example("Q", "\n\nS\n\n", "T\n\n", "SYS")]
    cfg = replace(run.cfg, teacher="lm", data="gym:basic_arithmetic", problems=3)
    rows = rlt.load_examples(cfg, run)
    assert rows[0].judge("", rows[0].solution) == 1 and rows[0].judge("", "none") < 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (stratos("Q", "no blocks"), "row 2: field 'solution'"),
        (stratos(BLOCKS), "row 2: field 'question'"),
        ({"question": "Q", "solution": 3}, "row 2: field 'solution'"),
    ],
)
def test_odd_conversations_are_refused_by_file_and_row(run, row, words):
    with pytest.raises(UserError, match=f"x.jsonl.*{words}"):
        load(run, stratos("Q", BLOCKS), row)


# --- the vLLM sampler against a stand-in engine


def test_vllm_takes_all_prompts_at_once_and_gets_the_weights(run, pointers, models, monkeypatch):
    engine, module = MagicMock(), MagicMock()
    module.LLM.return_value = engine
    engine.generate.return_value = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(2,))])] * 2
    monkeypatch.setitem(sys.modules, "vllm", module)
    sample = rlt.vllm_sampler(models[0], run)
    assert sample([[1, 2], [3]], torch.rand(2, 5), 0.7) == [[2], [2]]
    (prompts, _), _ = engine.generate.call_args
    assert [p["prompt_token_ids"] for p in prompts] == [[1, 2], [3]]
    ((copy,), _) = engine.apply_model.call_args
    copy(served := MagicMock())
    ((weights,), _) = served.load_weights.call_args
    assert [name for name, _ in weights] == [name for name, _ in models[0].lm.named_parameters()]
    assert module.SamplingParams.call_args.kwargs == dict(max_tokens=5, temperature=0.7, stop_token_ids=[15])


# --- the script as a user runs it


def test_smoke_runs_resumes_and_ranks_its_own_traces(run_main, tmp_path, text_files):
    words = ["--config", "smoke"]
    assert run_main(rlt, *words)[0] == 0
    folder = tmp_path / "out" / "rlt-smoke-s0-tiny"
    first = json.loads((folder / "results.json").read_text())
    assert len(first["table"]) == 8 and (folder / "rlt.png").exists()
    (folder / "RLT-s0" / "result.json").unlink()
    assert run_main(rlt, *words, "--resume")[0] == 0
    assert json.loads((folder / "results.json").read_text())["table"] == first["table"]
    traces = folder / "traces_lam=3.0_chains=2-s0" / "traces.jsonl"
    shown = run_main(rlt, *words, "--show")[1]
    run_main(rlt, *words, "--score", traces)
    rows = {r["question"]: r["reward"] for r in rlt.read_lines(traces) if r["closed"]}
    ranked = {r["question"]: r["reward"] for r in rlt.read_lines(traces.with_suffix(".scored.jsonl"))}
    assert {q: ranked[q] for q in rows} == pytest.approx(rows, abs=1e-4)
    assert [*ranked.values()] == sorted(ranked.values(), reverse=True)
    assert f"reward: {rlt.read_lines(traces)[0]['reward']}" in shown
    assert "unknown to the tiny teacher" in run_main(rlt, *words, "--score", "p.jsonl")[2]


def test_two_ranks_with_sharded_models_do_what_one_process_does(run_script, tmp_path, text_files):
    """FSDP2: warm-up, RL, collection, distillation, correctness RL and evaluation of a text model."""
    found = []
    for out, ranks in (("one", 0), ("two", 2)):
        words = [*text_files, "--out", out, "--rows", "RL from a few RLT traces", "distilled from the corpus"]
        run_script(ROOT / "rlt.py", *words, "--micro_tokens", "1000", "--sync_every", "1", ranks=ranks)
        folder = tmp_path / out / "rlt-text-s0-lm"
        rows = []
        for stage in ("teacher_lam=3.0_chains=2-s0", "RL_from_a_few_RLT_traces-s0"):
            rows.append([list(line.values()) for line in rlt.read_lines(folder / stage / "metrics.jsonl")])
        found.append(rows)
    run_script(ROOT / "rlt.py", *words, "--score", "p.jsonl", ranks=2)
    assert len(rlt.read_lines(tmp_path / "p.scored.jsonl")) == 4
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=2e-3, atol=2e-3)


def test_bad_input_is_one_line_with_exit_code_2(run_main, tmp_path, text_files):
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}\n')
    other = bpe(["quite another text: 12 plus 30"], size=300)
    common.tiny_lm(len(other), 32, 2).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    for line, words in {
        "--data bad.jsonl": "bad.jsonl, row 1",
        "--context 20": "too few",
        "--eval_new 1900": "too few",
        "--holdout 8 --prompts 1": "no problem has a reasoning_trace",
        "--temperature 0": "--temperature",
        "--teacher tiny --data pointers --bench a": "--bench",
        "--teacher nowhere": "--teacher nowhere",
        "--student other": "tokenize differently",
    }.items():
        code, _, errors = run_main(rlt, *text_files, *line.split())
        lines = [x for x in errors.splitlines() if x.startswith("rlt.py")]
        assert code == 2 and len(lines) == 1 and words in lines[0], (line, lines)


def test_the_dry_run_of_full_counts_and_says_what_is_missing(run_main):
    code, out, _ = run_main(rlt, "--config", "full", "--dry_run", "--teacher", "nowhere")
    assert code == 0 and "7,6" in out and "missing: --teacher nowhere" in out
