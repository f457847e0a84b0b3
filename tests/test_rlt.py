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
def pointers():
    tok = common.CharTokenizer(rlt.SYMBOLS[:6] + "~?!()[]{}$", eos="$")
    turn = "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    tok.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    return rlt.Prompts(tok, rlt.POINTERS, "?", 128)


@pytest.fixture
def models(run):
    torch.manual_seed(3)
    return [rlt.hop_model(run.cfg).eval() for _ in range(2)]


def problems(run, n, p_write=0.5):
    return rlt.make_problems(n, run.cfg, torch.Generator().manual_seed(5), p_write)


def episodes(examples, texts):
    return [Episode(e, [], 0, text) for e, text in zip(examples, texts, strict=True)]


# --- reward


def test_reduce_scores_is_mean_plus_alpha_extreme_over_the_mask_alone():
    x = torch.tensor([[1.0, -2.0, 4.0, 99.0], [3.0, -99.0, -99.0, 99.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    for alpha, kind, expected in (
        (0.5, "min", [0.0, 4.5]),
        (0.5, "max", [3.0, 4.5]),
        (0.0, "max", [1.0, 3.0]),
    ):
        torch.testing.assert_close(rlt.reduce_scores(x, mask, alpha, kind), torch.tensor(expected))


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
    return np.mean(ell) + cfg.alpha * min(ell) - cfg.lam * r_kl + (0 if closed else cfg.penalty)


def test_reward_equals_brute_force_from_softmax_tables_alone_and_in_a_batch(run, pointers, models):
    examples = problems(run, 5)
    texts = [examples[0].trace + "}$", "ab}$", "ab~c", "}$", "abcabcabc}ab}$"]
    split = [(examples[0].trace, True), ("ab", True), ("ab~c", False), ("", True), ("abcabcabc", True)]
    told = episodes(examples, texts)
    numbers, _, _ = rlt.rlt_reward(told, *models, pointers, run)
    assert [(e.t, e.closed) for e in told] == split and numbers["length"].tolist() == [8, 2, 4, 0, 9]
    expected = [
        brute_force_reward(e, *s, *models, pointers, run.cfg) for e, s in zip(examples, split, strict=True)
    ]
    alone = [rlt.rlt_reward([e], *models, pointers, run)[0]["reward"] for e in told]
    for found in (numbers["reward"], torch.cat(alone)):
        torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=1e-4, atol=1e-4)


def test_kl_is_zero_when_teacher_and_student_are_one_model_in_one_context(run, pointers, models):
    same = replace(rlt.POINTERS, teacher="?", solution=("", ""), explanation=("(", ")"))
    alike = rlt.Prompts(pointers.tokenizer, same, "?", 128)
    told = episodes([Example("abcdef", "")], ["abc)$"])
    assert rlt.rlt_reward(told, models[0], models[0], alike, run)[0]["r_kl"].abs() < 1e-6


# --- texts and tokens


@pytest.fixture
def prompts(bpe_tokenizer):
    return rlt.Prompts(bpe_tokenizer, rlt.TEXT, rlt.STRATOS_SYSTEM, 2000)


def test_completions_are_split_at_the_first_closing_tag(prompts):
    tag = "<|end_of_explanation|>"
    texts = [f"x\n\n{tag}y{tag}", "x", tag, ""]
    told = episodes([QUESTION] * 4, texts)
    rlt.align(told, prompts)
    split = [("\n\nx\n\n", True), ("\n\nx", False), ("\n\n", True), ("\n\n", False)]
    assert [(e.t, e.closed) for e in told] == split


def test_spans_hold_t_and_s_although_the_system_prompts_mention_the_tags(prompts):
    e, t = Example("what? <|begin_of_thought|>", "\n\n42\n\n"), "\n\nthink <|end_of_thought|>\n\n"
    told, shown = prompts.teacher(e, t), prompts.student(e, t)
    for x in (told, shown):
        assert x.text[slice(*x.t)] == t and x.text[slice(*x.s)] == e.solution
    solution = f"<|begin_of_solution|>{e.solution}<|end_of_solution|>"
    ours = f"assistant\n{solution}\n\n<|begin_of_explanation|>\n\n"
    assert told.text[: told.begin].endswith(ours)
    ours = f"<|begin_of_thought|>{t}<|end_of_thought|>\n\n{solution}<|im_end|>\n"
    assert shown.text[shown.begin :] == ours


def test_merged_tags_are_dropped_and_both_contexts_hold_the_same_tokens_of_t(prompts):
    tok, t = prompts.tokenizer, "We add the two numbers: 12 plus 30 is 42."
    assert "|>\n\n" in [tok.decode([i]) for i in tok.encode("<|end_of_solution|>\n\nWe")], "the trap is there"
    for question in (QUESTION, replace(QUESTION, question=t)):  # the second restates the explanation
        (e,) = episodes([question], [t + "\n\n<|end_of_explanation|><|im_end|>\n"])
        rlt.align([e], prompts)
        ids = e.student.ids
        in_teacher = [e.teacher.ids[i] for i in e.t_teacher]
        assert in_teacher == [ids[i] for i in e.t_student]
        assert tok.decode(in_teacher).strip() == t, "only paddings may be lost"
        assert len(tok.encode(e.t)) - len(in_teacher) <= 2, "at most a token a side"
        assert tok.decode([ids[i] for i in e.s_student]).strip() == "The answer is 42."
        assert tok.decode(ids[: e.t_student[0]]).strip().endswith("<|begin_of_thought|>")


def test_templates_that_trim_and_models_without_one_are_carried_others_refused(prompts):
    tok = bpe(["abc"])
    tok.chat_template = tok.chat_template.replace("{{ m.content }}", "{{ m.content | trim }}")  # as Llama-3's
    e = replace(QUESTION, question=" spaced ")
    text = rlt.Prompts(tok, rlt.TEXT, "S", 2000).student(e, "t").text
    assert text.endswith("<|end_of_solution|><|im_end|>\n")
    tok.chat_template, tok.eos_token = None, "<|im_start|>"  # no <|im_end|> is asked for
    assert rlt.Prompts(tok, rlt.TEXT, "S", 2000).end_of_turn == "<|im_start|>\n"
    tok.chat_template = tok.chat_template.replace("{{ m.content }}", "<think></think>{{ m.content }}")
    special = bpe(["<|begin_of_thought|>"], additional_special_tokens=["<|begin_of_thought|>"])
    refused = {"special token": special, "template": tok, "fast": SimpleNamespace(is_fast=False)}
    for words, wrong in refused.items():
        with pytest.raises(UserError, match=words):
            rlt.Prompts(wrong, rlt.TEXT, "S", 2000)


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
    steps = [rlt.distinct_rows(step, 4, 14, run) for step in range(6)]
    epochs = [steps[0] + steps[1] + steps[2], steps[3] + steps[4] + steps[5]]
    assert all(len(set(rows)) == 12 for rows in epochs) and epochs[0] != epochs[1]


def test_supervised_tokens_are_those_of_the_stated_span(run, pointers, models):
    e, (model, _) = problems(run, 1)[0], models
    text, supervised = f"!{e.question}[{e.solution}]{{{e.trace}}}$", f"{e.trace}}}$"
    ids = torch.tensor([pointers.tokenizer.encode(text)])
    logp = model.lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    told = pointers.teacher(e, e.trace)
    rlt.sft(model, "one", 1, lambda step: [told], (0.1, 0.0, 1.0), {}, run)
    line = json.loads((run.folder / "one" / "metrics.jsonl").read_text())
    assert line["loss"] == pytest.approx(-logp[-len(supervised) :].mean().item(), rel=1e-5)


def test_every_rank_has_episodes_and_together_they_are_those_of_one(run, pointers):
    def sample(ids, uniforms, temperature):
        return [[int(10 * u)] for u in uniforms[:, 0]]

    examples = problems(run, 3)
    dealt = []
    for run.rank, run.world_size in ((0, 1), (0, 4), (1, 4), (2, 4), (3, 4)):
        dealt.append(
            rlt.rollout(sample, pointers.student, examples, 1, 1.0, pointers, run, run.generator("x"))
        )
    assert dealt[0] == [dealt[i][0] for i in (1, 2, 3)] and all(len(part) == 1 for part in dealt[1:])


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


def stratos(*texts, system="SYS"):
    return {"system": system, "conversations": [{"from": "x", "value": text} for text in texts]}


def test_jsonl_gsm8k_stratos_and_gym_rows(run):
    found = load(run, {"question": "q", "solution": "s", "reasoning_trace": "t"})
    assert found == ([Example("q", "\n\ns\n\n", "\n\nt\n\n")], rlt.STRATOS_SYSTEM)
    (e,), _ = load(run, {"question": "Q", "answer": "r1\nr2\n#### 1,234"})
    assert (e.solution, e.trace) == ("\n\nThe answer is \\boxed{1,234}\n\n", "\n\nr1\nr2\n\n")
    assert [e.judge(e.solution, x) for x in (r"\boxed{1234}", r"\boxed{1235}", "1234")] == [1, 0, 0]
    assert load(run, stratos("Q", BLOCKS)) == ([Example("Q", "\n\nS\n\n", "\n\nT\n\n")], "SYS")
    cfg = replace(run.cfg, teacher="lm", data="gym:basic_arithmetic", problems=3)
    rows, _ = rlt.load_examples(cfg, run)
    assert [e.judge("", e.solution) for e in rows] == [1, 1, 1] and rows[0].judge("", "none") < 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (stratos("Q", BLOCKS, system="OTHER"), "system varies"),
        (stratos("Q", "no blocks"), "row 2: .*begin_of_thought"),
        (stratos(BLOCKS), "row 2: .*question and an answer"),
        (stratos("Q", BLOCKS, BLOCKS), "row 2: .*question and an answer"),
    ],
)
def test_odd_conversations_are_refused_by_file_and_row(run, row, words):
    with pytest.raises(UserError, match=f"x.jsonl.*{words}"):
        load(run, stratos("Q", BLOCKS), row)


# --- the vLLM sampler against a stand-in engine


def test_vllm_sets_every_field_takes_all_prompts_at_once_and_gets_the_weights(
    run, pointers, models, monkeypatch
):
    engine, module = MagicMock(), MagicMock()
    module.LLM.return_value = engine
    engine.generate.return_value = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(2,))])] * 2
    monkeypatch.setitem(sys.modules, "vllm", module)
    sample = rlt.vllm_sampler("lm", models[0], pointers, run)
    assert sample([[1, 2], [3]], torch.rand(2, 5), 0.7) == [[2], [2]]
    (prompts, _), _ = engine.generate.call_args
    assert [p["prompt_token_ids"] for p in prompts] == [[1, 2], [3]]
    worker = engine.llm_engine.model_executor.driver_worker
    ((weights,), _) = worker.model_runner.model.load_weights.call_args
    assert [name for name, _ in weights] == [name for name, _ in models[0].lm.named_parameters()]
    fields = {"max_tokens": 5, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    given = module.SamplingParams.call_args.kwargs
    assert fields.items() <= given.items() and given["stop_token_ids"] == [15]


# --- the script as a user runs it


def test_smoke_runs_resumes_shows_and_ranks_its_own_traces(run_main, tmp_path):
    words = ["--config", "smoke", "--seeds", "1"]
    assert run_main(rlt, *words)[0] == 0
    folder = tmp_path / "out" / "rlt-smoke-s0"
    first = json.loads((folder / "results.json").read_text())
    assert len(first["claims"]) == 7 and len(first["table"]) == 8 and (folder / "rlt.png").exists()
    (folder / "RLT-s0" / "result.json").unlink()
    assert run_main(rlt, *words, "--resume")[0] == 0
    assert json.loads((folder / "results.json").read_text())["table"] == first["table"]
    assert "log teacher - log student" in run_main(rlt, *words, "--show")[1]
    traces = folder / "traces_lam=3.0_chains=2-s0" / "traces.jsonl"
    (tmp_path / "t.jsonl").write_text(traces.read_text())
    run_main(rlt, *words, "--score", "t.jsonl")
    rows = {r["question"]: r["reward"] for r in rlt.read_lines(traces) if r["closed"]}
    ranked = {r["question"]: r["reward"] for r in rlt.read_lines(tmp_path / "t.scored.jsonl")}
    assert {q: ranked[q] for q in rows} == pytest.approx(rows, abs=1e-4), "the same reward"
    assert list(ranked.values()) == sorted(ranked.values(), reverse=True)


def test_two_ranks_with_sharded_models_do_what_one_process_does(run_script, tmp_path, text_files):
    """FSDP2: warm-up, RL, collection, distillation, correctness RL and evaluation of a text model."""
    found = []
    for out, ranks in (("one", 0), ("two", 2)):
        words = [*text_files, "--out", out, "--rows", "RL from a few RLT traces", "distilled from the corpus"]
        run_script(ROOT / "rlt.py", *words, "--micro_tokens", "1000", "--sync_every", "1", ranks=ranks)
        folder = tmp_path / out / "rlt-text-s0-lm"
        rows = []
        for stage in ("teacher_lam=3.0_chains=6-s0", "RL_from_a_few_RLT_traces-s0"):
            rows.append([list(line.values()) for line in rlt.read_lines(folder / stage / "metrics.jsonl")])
        found.append(rows)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=2e-3, atol=2e-3)


def test_bad_input_is_one_line_with_exit_code_2(run_main, tmp_path, text_files):
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}\n')
    other = bpe(["quite another text: 12 plus 30"], size=300)
    common.tiny_lm(len(other), 32, 2).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    for line, words in {
        "--group 1": "--group",
        "--prompts 0": "--prompts 0",
        "--temperature -1": "--temperature -1",
        "--data bad.jsonl": "bad.jsonl, row 1",
        "--data pointers": "--teacher tiny",
        "--context 20": "too few",
        "--teacher nowhere": "--teacher 'nowhere'",
        "--student other": "tokenize differently",
    }.items():
        code, _, errors = run_main(rlt, *text_files, *line.split())
        lines = [x for x in errors.splitlines() if x.startswith("rlt.py")]
        assert code == 2 and len(lines) == 1 and words in lines[0], (line, errors[-500:])
