"""rlt.py: reward, alignment of tokens, GRPO, stages and command line, against closed forms."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, bpe

import common
import rlt
from common import Run, UserError
from rlt import Example, Task


@pytest.fixture
def cfg(tmp_path):
    return dataclasses.replace(rlt.CONFIGS["smoke"], out=str(tmp_path))


@pytest.fixture
def task(cfg):
    with Run(cfg) as run:
        yield rlt.hop_task(cfg, run)


@pytest.fixture
def models(cfg):
    """Teacher and student of the built-in task, different and far from uniform."""
    torch.manual_seed(3)
    return [rlt.hop_model(cfg) for _ in range(2)]


def problems(cfg, n, p_write=0.5):
    return rlt.make_problems(n, cfg, torch.Generator().manual_seed(5), p_write)


# --- reward


def test_reduce_scores_is_mean_plus_alpha_extreme_over_the_mask_alone():
    x = torch.tensor([[1.0, -2.0, 4.0, 99.0], [3.0, -99.0, -99.0, 99.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    torch.testing.assert_close(rlt.reduce_scores(x, mask, 0.5, "min"), torch.tensor([1.0 - 1.0, 3.0 + 1.5]))
    torch.testing.assert_close(rlt.reduce_scores(x, mask, 0.5, "max"), torch.tensor([1.0 + 2.0, 3.0 + 1.5]))
    torch.testing.assert_close(rlt.reduce_scores(x, mask, 0.0, "max"), torch.tensor([1.0, 3.0]))
    shuffled = torch.tensor([2, 0, 1, 3])
    torch.testing.assert_close(
        rlt.reduce_scores(x[:, shuffled], mask[:, shuffled], 0.5, "min"),
        rlt.reduce_scores(x, mask, 0.5, "min"),
    )


def brute_force_reward(e, t, closed, teacher, student, task, cfg):
    """Eqs. (1) to (3) from whole softmax tables, one token at a time; one symbol is one token here."""

    def logp(model, text):
        ids = torch.tensor([task.tok.encode(text)])
        table = (model.lm(ids).logits[0].double() / cfg.temperature).log_softmax(-1)
        return [None] + [table[i - 1, ids[0, i]].item() for i in range(1, ids.shape[1])]

    head_t, head_s = f"!{e.q}[{e.s}]{{", f"?{e.q}("
    of_teacher, of_student = logp(teacher, head_t + t + "}$"), logp(student, head_s + t + f")[{e.s}]$")
    start = len(head_s) + len(t) + 2
    ell = of_student[start : start + len(e.s)]
    d = [of_teacher[len(head_t) + j] - of_student[len(head_s) + j] for j in range(len(t))]
    r_ss = np.mean(ell) + cfg.alpha * min(ell)
    r_kl = np.mean(d) + cfg.alpha * max(d) if d else 1 + cfg.alpha
    return r_ss - cfg.lam * r_kl + (0 if closed else cfg.penalty)


@pytest.mark.parametrize("retokenize", [False, True])
def test_reward_equals_brute_force_from_softmax_tables(retokenize, cfg, task, models):
    cfg = dataclasses.replace(cfg, retokenize=retokenize, temperature=0.7, alpha=0.3, micro_tokens=100)
    task = dataclasses.replace(task, cfg=cfg)
    examples = problems(cfg, 5)
    texts = [examples[0].t + "}$", "ab}$", "ab~c", "}$", "abcabcabc}ab}$"]
    split = [(examples[0].t, True), ("ab", True), ("ab~c", False), ("", True), ("abcabcabc", True)]
    reward, parts, _ = rlt.rlt_reward(examples, task.ids(texts), *models, task)
    expected = [brute_force_reward(e, *s, *models, task, cfg) for e, s in zip(examples, split, strict=True)]
    torch.testing.assert_close(reward, torch.tensor(expected).float(), rtol=1e-4, atol=1e-4)
    assert parts["closed"].tolist() == [1, 1, 0, 1, 1] and parts["canonical"].tolist() == [1.0] * 5
    assert parts["length"].tolist() == [8, 2, 4, 0, 9]


def test_reward_does_not_depend_on_the_batch_around_it(cfg, task, models):
    examples = problems(cfg, 4)
    completions = task.ids([e.t + "}$" for e in examples[:2]] + ["a}$", "abcabcabcabc"])
    together, _, _ = rlt.rlt_reward(examples, completions, *models, task)
    alone = [rlt.rlt_reward([e], [c], *models, task)[0] for e, c in zip(examples, completions, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_kl_is_zero_when_teacher_and_student_are_one_model_in_one_context(cfg, task, models):
    same = dataclasses.replace(rlt.HOP_FORMAT, teacher_system="?", solution=("", ""), explanation=("(", ")"))

    class NoSolution(rlt.Format):
        def teacher(self, e, t):
            return super().teacher(dataclasses.replace(e, s=""), t)

    fmt = NoSolution(**{f.name: getattr(same, f.name) for f in dataclasses.fields(same)})
    for temperature in (0.5, 1.0):
        changed = dataclasses.replace(cfg, temperature=temperature)
        alike = dataclasses.replace(task, fmt=fmt, cfg=changed)
        _, parts, _ = rlt.rlt_reward(problems(cfg, 2), task.ids(["abc)$", "~"]), models[0], models[0], alike)
        assert parts["r_kl"].abs().max() < 1e-6


class Lookup(torch.nn.Module):
    """A model that gives each next symbol its log-prob from a function of (text so far, symbol)."""

    def __init__(self, tok, rule):
        super().__init__()
        self.tok, self.rule = tok, rule

    def forward(self, ids, mask, temperature):
        texts = [self.tok.decode(row[m].tolist()) for row, m in zip(ids, mask, strict=True)]
        logp = torch.zeros(ids.shape[0], ids.shape[1] - 1)
        for row, text in enumerate(texts):
            for i in range(1, len(text)):
                logp[row, i - 1] = self.rule(text[:i], text[i])
        return logp, torch.zeros_like(logp)


def test_a_student_sure_of_the_solution_has_r_ss_zero_and_the_reading_is_not_off_by_one(cfg, task, models):
    sure = Lookup(task.tok, lambda before, symbol: 0.0 if "[" in before and symbol != "]" else -7.0)
    shifted = Lookup(task.tok, lambda before, symbol: 0.0 if symbol == "[" or before[-1] == "[" else -7.0)
    e = Example("abcdefab", "cd")
    for student, expected in ((sure, 0.0), (shifted, -3.5 - 0.01 * 7)):
        _, parts, _ = rlt.rlt_reward([e], task.ids(["ab}$"]), models[0], student, task)
        assert parts["r_ss"].item() == pytest.approx(expected)


def test_leaking_the_solution_pays_without_kl_and_costs_its_surprise_with_it(cfg, task):
    """The student copies what t states but is surprised by a leaked symbol; single steps are natural."""
    follows = {"a": "b", "b": "c"}  # the steps that a student can make

    def student_rule(before, symbol):
        if "[" in before:  # the solution: certain if t ends in it
            return -0.01 if before.split("(")[1].split(")")[0].endswith("c") else -3.0
        last = before[-1]
        return -0.1 if last in "(" or follows.get(last) == symbol else -4.0

    student, teacher = Lookup(task.tok, student_rule), Lookup(task.tok, lambda before, symbol: -0.05)
    e, texts = Example("abcdefab", "c"), ["}$", "ac}$", "abc}$"]  # nothing, the leak, the steps
    rewards = {}
    for lam in (0.0, 3.0):
        changed = dataclasses.replace(task, cfg=dataclasses.replace(cfg, lam=lam))
        rewards[lam], _, _ = rlt.rlt_reward([e] * 3, task.ids(texts), teacher, student, changed)
    nothing, leak, steps = rewards[0.0].tolist()
    assert leak == pytest.approx(steps) and leak > nothing + 2
    d_first, d_leak, d_step = -0.05 + 0.1, -0.05 + 4.0, -0.05 + 0.1
    kl_leak = (d_first + d_leak) / 2 + cfg.alpha * d_leak
    kl_steps = (d_first + 2 * d_step) / 3 + cfg.alpha * d_step
    nothing, leak_kl, steps_kl = rewards[3.0].tolist()
    assert leak_kl == pytest.approx(leak - 3 * kl_leak, abs=1e-4)
    assert steps_kl == pytest.approx(steps - 3 * kl_steps, abs=1e-4)
    assert steps_kl > leak_kl + 5


def test_exact_kl_is_the_full_sum_and_the_sampled_ratio_is_unbiased_for_it(cfg, task, models):
    changed = dataclasses.replace(task, cfg=dataclasses.replace(cfg, exact_kl=True, temperature=0.7))
    e = problems(cfg, 1)[0]
    _, _, detail = rlt.rlt_reward([e] * 2, task.ids(["abc}$", "a}$"]), *models, changed)
    for j, t in enumerate(("", "a", "ab")):
        texts = [f"!{e.q}[{e.s}]{{{t}", f"?{e.q}({t}"]
        logits = [
            m.lm(torch.tensor([task.tok.encode(x)])).logits[0, -1] for m, x in zip(models, texts, strict=True)
        ]
        log_p, log_q = ((z / 0.7).log_softmax(-1) for z in logits)
        assert detail["d"][0, j].item() == pytest.approx(
            (log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-4
        )
    assert (detail["d"][0] >= 0).all()


# --- texts and tokens


def test_split_completion():
    split = rlt.HOP_FORMAT.split_completion
    assert split("ab}c") == ("ab", True) and split("ab") == ("ab", False) and split("}ab") == ("", True)
    assert split("a}b}") == ("a", True) and split("") == ("", False)
    chat = rlt.Format(lambda system, q: system + q, "<|im_end|>")
    assert chat.split_completion("x\n\n<|end_of_explanation|><|im_end|>") == ("\n\nx\n\n", True)


def test_spans_hold_t_and_s_although_the_system_prompts_mention_the_tags():
    fmt = rlt.Format(lambda system, q: f"<{system}>{q}", "<end>")
    e, t = Example("what? <|begin_of_thought|>", "\n\n42\n\n"), "\n\nthink <|end_of_thought|>\n\n"
    assert "<|begin_of_solution|>" in fmt.teacher_system and "<|begin_of_thought|>" in fmt.student_system
    text, (a, b), begin = fmt.teacher(e, t)
    assert text[a:b] == t and text[a:begin] == "\n\n" and text[:begin] == fmt.teacher_prompt(e)
    assert text.startswith(f"<{fmt.teacher_system}>{e.q}<|begin_of_solution|>{e.s}<|end_of_solution|>\n\n")
    text, (a, b), (c, d), turn = fmt.student(e, t)
    assert text[a:b] == t and text[c:d] == e.s and text[:turn] == fmt.student_prompt(e)
    assert text[turn:] == (
        f"<|begin_of_thought|>{t}<|end_of_thought|>\n\n<|begin_of_solution|>{e.s}<|end_of_solution|><end>"
    )


@pytest.fixture
def text_task(bpe_tokenizer, cfg):
    fmt = rlt.chat_format(bpe_tokenizer, rlt.STUDENT_SYSTEM)
    cfg = dataclasses.replace(cfg, context=2048, retokenize=True)
    return Task(cfg, Run(cfg), bpe_tokenizer, fmt, rlt.same_boxed)


QUESTION = Example("What is 12 plus 30?", rlt.pad("The answer is 42."))


def test_merged_tags_are_dropped_and_both_contexts_hold_the_same_tokens_of_t(text_task):
    tok, t = text_task.tok, "We add the two numbers: 12 plus 30 is 42."
    assert "|>\n\n" in [
        tok.decode([i]) for i in tok.encode("<|end_of_solution|>\n\nWe", add_special_tokens=False)
    ]
    completion = tok.encode(t + "\n\n<|end_of_explanation|><|im_end|>\n", add_special_tokens=False)
    for question in (QUESTION, dataclasses.replace(QUESTION, q=t + " longer question, shifted prefix")):
        row = rlt.align(question, completion, text_task)
        in_teacher = [row.teacher_ids[i] for i in row.think_teacher]
        assert row.closed and row.t == f"\n\n{t}\n\n"
        assert in_teacher == [row.student_ids[i] for i in row.think_student]
        assert tok.decode(in_teacher).strip() == t, "only paddings may be lost"
        assert len(tok.encode(row.t, add_special_tokens=False)) - len(in_teacher) <= 2, (
            "at most a token a side"
        )
        solution = tok.decode([row.student_ids[i] for i in row.solution])
        assert solution.strip() == "The answer is 42."


def test_an_explanation_that_restates_the_question_is_scored_in_the_think_section(text_task):
    e = dataclasses.replace(QUESTION, q="We add the two numbers: 12 plus 30 is 42.")
    tail = "\n\n<|end_of_explanation|><|im_end|>"
    row = rlt.align(e, text_task.tok.encode(e.q + tail, add_special_tokens=False), text_task)
    _, (a, _), _, _ = text_task.fmt.student(e, row.t)
    before = text_task.tok.decode(row.student_ids[: row.think_student[0]])
    assert before.strip().endswith("<|begin_of_thought|>") and len(before) >= a - 1


@pytest.mark.parametrize("closed", [True, False])
def test_sampled_ids_and_re_encoded_text_agree_when_the_sample_is_canonical(closed, text_task):
    text = "We add 12 plus 30, naïve 日本語" + ("\n\n<|end_of_explanation|><|im_end|>" if closed else "")
    prompt = text_task.fmt.teacher_prompt(QUESTION)
    whole = text_task.ids([prompt + text])[0]
    completion = whole[len(text_task.ids([prompt])[0]) :]
    rows = []
    for retokenize in (True, False):
        changed = dataclasses.replace(
            text_task, cfg=dataclasses.replace(text_task.cfg, retokenize=retokenize)
        )
        rows.append(rlt.align(QUESTION, completion, changed))
    assert rows[0].canonical and rows[0].closed == closed
    assert rows[0].student_ids == rows[1].student_ids and rows[0].teacher_ids == rows[1].teacher_ids
    assert np.array_equal(rows[0].think_student, rows[1].think_student)


def test_a_sample_that_does_not_encode_back_is_scored_as_sampled_or_as_text(text_task):
    tok = text_task.tok
    pieces = [
        tok.encode(c, add_special_tokens=False)[0] for c in "plus"
    ]  # four letters where the BPE has one token
    completion = pieces + tok.encode(" 30\n\n<|end_of_explanation|><|im_end|>", add_special_tokens=False)
    as_text = rlt.align(QUESTION, completion, text_task)
    sampled = dataclasses.replace(text_task, cfg=dataclasses.replace(text_task.cfg, retokenize=False))
    as_sampled = rlt.align(QUESTION, completion, sampled)
    assert not as_text.canonical and not as_sampled.canonical
    for row, has_pieces in ((as_text, False), (as_sampled, True)):
        think = [row.student_ids[i] for i in row.think_student]
        assert think == [row.teacher_ids[i] for i in row.think_teacher]
        assert (any(think[i : i + 4] == pieces for i in range(len(think)))) == has_pieces
        assert tok.decode(think).strip() == "plus 30"
        assert tok.decode([row.student_ids[i] for i in row.solution]).strip() == "The answer is 42."
        assert tok.decode(row.student_ids) == text_task.fmt.student(QUESTION, row.t)[0]


def test_offsets_of_sampled_ids_cover_split_characters(text_task):
    tok = text_task.tok
    byte_ids = [
        tok.convert_tokens_to_ids(c)
        for c in tok.backend_tokenizer.pre_tokenizer.pre_tokenize_str("é語")[0][0]
    ]
    ids = tok.encode("a", add_special_tokens=False) + byte_ids + [tok.eos_token_id]
    assert rlt.token_offsets(tok, ids).tolist() == [[0, 1]] + [[1, 2]] * 2 + [[2, 3]] * 3 + [[3, 3]]


def test_chat_formats_that_cannot_carry_spans_are_refused(bpe_tokenizer):
    tok = bpe(["<|begin_of_thought|>"], additional_special_tokens=["<|begin_of_thought|>"])
    with pytest.raises(UserError, match="special token"):
        rlt.chat_format(tok, "")
    tok = bpe(["abc"])
    tok.chat_template = tok.chat_template.replace("{{ m.content }}", "{{ m.content | trim }}")
    with pytest.raises(UserError, match="template"):
        rlt.chat_format(tok, "")
    with pytest.raises(UserError, match="fast"):
        rlt.chat_format(SimpleNamespace(is_fast=False), "")


# --- GRPO


def test_advantages_are_centred_scaled_by_the_unbiased_std_and_grouped_in_order():
    r = torch.tensor([1.0, 2.0, 6.0, 0.1, 0.1, 0.1])
    a = rlt.group_advantage(r, 3)
    std = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2)
    torch.testing.assert_close(a[:3], torch.tensor([-2.0, -1.0, 3.0]) / (std + 1e-4))
    assert a[3:].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(rlt.group_advantage(1000 * r[:3] + 7, 3), a[:3], rtol=1e-3, atol=1e-3)
    assert rlt.group_advantage(torch.full((64,), 0.1), 64).eq(0).all()


def test_grpo_loss_and_gradient_have_their_closed_form():
    torch.manual_seed(0)
    logp = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    ref, a, beta = torch.randn(3, 5, dtype=torch.double), torch.tensor([1.5, -0.5, 2.0]).double(), 0.04
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    loss = rlt.grpo_loss(logp, ref, a, mask, beta)
    (grad,) = torch.autograd.grad(loss, logp)
    rho, value, wanted = ref - logp.detach(), 0.0, torch.zeros(3, 5).double()
    for i, n in enumerate([5, 2, 3]):
        for j in range(n):
            value += (-a[i] + beta * (rho[i, j].exp() - rho[i, j] - 1)) / n / 3
            wanted[i, j] = (-a[i] + beta * (1 - rho[i, j].exp())) / n / 3
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(grad, wanted)
    (grad,) = torch.autograd.grad(rlt.grpo_loss(logp, logp.detach(), a * 0, mask, beta), logp)
    assert grad.abs().max() == 0, "at the reference the KL term has no gradient"


def test_update_ignores_what_follows_eos_and_any_padding(cfg, task, models):
    """The step is the same with a longer row beside it in a micro-batch and in micro-batches of one."""
    prompts, completions = task.ids(["!abcdefab[cd]{"] * 2), task.ids(["ab}$", "abcabcabc}$"])
    steps = []
    for micro_tokens in (1, 10_000):
        changed = dataclasses.replace(task, cfg=dataclasses.replace(cfg, micro_tokens=micro_tokens))
        model = rlt.copy_frozen(models[0], task).requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        rlt.grpo_update(model, models[1], prompts, completions, torch.tensor([1.0, -2.0]), optimizer, changed)
        steps.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_tokens", [1, 10_000])
def test_update_is_a_gradient_step_on_the_tokens_of_the_completion_alone(micro_tokens, cfg, task, models):
    """Against autograd through whole softmax tables: the prompt has no loss, the EOS has."""
    policy, reference = models
    prompts, completions = task.ids(["!abcdefab[cd]{", "!ab[c]{"]), task.ids(["ab}$", "abcabc"])
    advantage, losses = torch.tensor([1.0, -2.0]), []
    for prompt, completion, a in zip(prompts, completions, advantage, strict=True):
        ids = torch.tensor([prompt + completion])
        tables = [(m.lm(ids).logits[0, :-1] / cfg.temperature).log_softmax(-1) for m in models]
        lp, ref = (t.gather(1, ids[0, 1:, None])[-len(completion) :, 0] for t in tables)
        ref = ref.detach()
        losses.append((-(lp - lp.detach()).exp() * a + cfg.beta * ((ref - lp).exp() - (ref - lp) - 1)).mean())
    grads = torch.autograd.grad((losses[0] + losses[1]) / 2, list(policy.parameters()))
    norm = torch.stack([g.norm() for g in grads]).norm()
    expected = [p - 0.1 * g / max(1.0, norm) for p, g in zip(policy.parameters(), grads, strict=True)]
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    task = dataclasses.replace(task, cfg=dataclasses.replace(cfg, micro_tokens=micro_tokens))
    stats = rlt.grpo_update(policy, reference, prompts, completions, advantage, optimizer, task)
    torch.testing.assert_close(stats["grad_norm"], norm, rtol=1e-4, atol=1e-5)
    for p, e in zip(policy.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-4, atol=1e-6)


def test_update_moves_the_likelihood_with_the_advantage(cfg, task, models):
    prompts, completions = task.ids(["!abcdefab[cd]{"] * 2), task.ids(["ab}$", "cd}$"])
    sequences = [p + c for p, c in zip(prompts, completions, strict=True)]
    before = rlt.score(models[0], sequences, task).sum(1)
    optimizer, frozen = torch.optim.SGD(models[0].parameters(), 0.01), rlt.copy_frozen(models[0], task)
    rlt.grpo_update(models[0], frozen, prompts, completions, torch.tensor([1.0, -1.0]), optimizer, task)
    change = rlt.score(models[0], sequences, task).sum(1) - before
    assert change[0] > 0 > change[1]


def test_sync_moves_the_reference_and_training_leaves_the_student_alone(cfg, task, models):
    policy, ref = models
    old, new = (
        [p.detach().clone() for p in ref.parameters()],
        [p.detach().clone() for p in policy.parameters()],
    )
    rlt.sync_ref(ref, policy, 0.9)
    for r, o, n in zip(ref.parameters(), old, new, strict=True):
        torch.testing.assert_close(r.detach(), 0.9 * n + 0.1 * o)
    student = rlt.hop_model(cfg).requires_grad_(False)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    changed = dataclasses.replace(cfg, sync_every=1, lr=0.1)
    rlt.train_grpo(policy, problems(cfg, 4), "rlt", student, dataclasses.replace(task, cfg=changed))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert any(not torch.equal(p, n) for p, n in zip(policy.parameters(), new, strict=True))


def test_a_nan_reward_stops_with_the_example_printed(cfg, task, models, capsys):
    class Broken(torch.nn.Module):
        def forward(self, ids, mask, temperature):
            return torch.full((ids.shape[0], ids.shape[1] - 1), math.nan), torch.zeros(1)

    examples = problems(cfg, 2)
    with pytest.raises(UserError, match="nan"):
        rlt.train_grpo(models[0], examples, "rlt", Broken(), task)
    printed = capsys.readouterr().out
    assert any(e.q in printed for e in examples) and "explanation" in printed and "l: [nan" in printed


def test_batches_walk_through_every_row_once_an_epoch():
    seen = [i for step in range(9) for i in rlt.rows_of(step, 4, 12, seed=1)]
    epochs = [seen[i : i + 12] for i in range(0, 36, 12)]
    assert all(sorted(e) == list(range(12)) for e in epochs) and epochs[0] != epochs[1]
    assert (
        rlt.rows_of(2, 5, 7, seed=1) == [i for step in range(3) for i in rlt.rows_of(step, 5, 7, seed=1)][10:]
    )


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_a_group_larger_than_the_sampling_batch_gives_the_same_completions(n_prompts, cfg, task, models):
    prompts, uniforms = (
        task.ids(["!abcdefab[cd]{", "!ab[c]{", "!fedcbaab[cd]{"])[:n_prompts],
        torch.rand(n_prompts * 8, 9),
    )
    found = []
    for size in (1000, 8, 4):
        changed = dataclasses.replace(task, cfg=dataclasses.replace(cfg, sample_batch=size))
        found.append(rlt.Sampler(models[0], changed)(prompts, uniforms, 1.0))
    assert found[0] == found[1] == found[2] and len(found[0]) == n_prompts * 8


# --- supervised stages


def test_supervised_tokens_are_those_of_the_stated_spans(cfg, task, monkeypatch):
    e, losses = problems(cfg, 1)[0], []
    for stage, text, supervised in (
        ("warmup", f"!{e.q}[{e.s}]{{{e.t}}}$", f"{e.t}}}$"),
        ("distil", f"?{e.q}({e.t})[{e.s}]$", f"({e.t})[{e.s}]$"),
    ):
        model = rlt.hop_model(cfg)
        ids = torch.tensor([task.tok.encode(text)])
        logp = model.lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected = -logp[-len(supervised) :].mean().item()
        changed = dataclasses.replace(cfg, warmup_steps=1, warmup_batch=1, distil_batch=1, log_every=1)
        here = dataclasses.replace(task, cfg=changed, run=task.run.stage(stage))
        rlt.warm_up(model, [e], here) if stage == "warmup" else rlt.distil(model, [e], here, 1)
        losses = [json.loads(x)["loss"] for x in (here.run.folder / "metrics.jsonl").read_text().splitlines()]
        assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_learning_rate_warms_up_and_ends_at_its_floor():
    rates = [common.learning_rate(i, 100, 2.0, 0.1, 0.05) for i in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * (0.05 + 0.95 * 0.5)) and rates[100] == pytest.approx(0.1)


# --- tasks and answers


def test_problems_are_what_they_say(cfg):
    cfg = dataclasses.replace(cfg, symbols=20, chains=8)
    rows = problems(cfg, 200, p_write=0.45)
    for e in rows:
        f = dict(zip(rlt.SYMBOLS, e.q[:20], strict=False))
        assert sorted(f.values()) == sorted(rlt.SYMBOLS[:20]) and len(set(e.q[20:])) == 8
        for i, x in enumerate(e.q[20:]):
            chain = [x, f[x], f[f[x]], f[f[f[x]]]]
            assert e.s[i] == chain[3] and all(
                c in (w, "~") for c, w in zip(e.t[4 * i : 4 * i + 4], chain, strict=True)
            )
            assert e.t[4 * i] == x and e.t[4 * i + 3] == chain[3]
    share = 1 - sum(e.t.count("~") for e in rows) / (200 * 16)
    assert share == pytest.approx(0.45, abs=0.03)


def test_boxed_answers():
    assert common.extract_boxed(r"so \boxed{1} or \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert common.extract_boxed("none") is None and common.extract_boxed(r"\boxed{open") is None
    same = [(r"\frac{1}{2}", "0.5"), (r"\dfrac12", "1/2"), ("1,000", "1000"), (r"\text{yes}", "yes")]
    same += [
        ("50\\%", "50"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        ("90^\\circ", "90"),
        ("-3", "-3.0"),
        ("\\$5", "5"),
    ]
    assert all(common.equal_answers(a, b) for a, b in same), [x for x in same if not common.equal_answers(*x)]
    different = [("1", "2"), (r"\frac{1}{2}", "2"), ("x", "y"), (None, "1"), ("12", "1,2"), ("1/0", "1")]
    assert not any(common.equal_answers(a, b) for a, b in different)


def test_countdown_search_and_judge_agree_with_brute_force():
    from itertools import permutations

    reached = {v for v, _ in rlt.countdown_values([2, 3, 7])}
    brute = set()
    for a, b, c in permutations([2, 3, 7]):
        for x in (a + b, a - b, a * b, a / b):
            brute |= {x + c, x - c, c - x, x * c, *([x / c] if c else []), *([c / x] if x else [])}
    assert {round(float(v), 9) for v in reached} == {round(v, 9) for v in brute}
    for e in rlt.countdown(20, seed=1):
        assert rlt.solves_countdown(e, e.s)
    e = Example("Use each of the numbers [2, 3, 7] once, with + - * /, to make 13. Box the expression.", "")
    right = [r"\boxed{2*3+7}", r"\boxed{(7 + (2 \times 3))}"]
    wrong = [
        "13",
        *(rf"\boxed{{{x}}}" for x in ("13", "6+7", "2*3*7", "2**3+7", "__import__('os')", "2/(3-3)+7")),
    ]
    wrong.append(r"\boxed{" + "(" * 150 + "2*3+7}")
    assert all(rlt.solves_countdown(e, x) for x in right) and not any(
        rlt.solves_countdown(e, x) for x in wrong
    )


def test_jsonl_traces_and_stratos_rows_are_read(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"question": "q1", "solution": "s1"}\n{"question": "q2", "solution": "s2", "reasoning_trace": "t"}\n'
    )
    rows, system = rlt.load_examples(str(file), 0)
    assert rows == [Example("q1", "\n\ns1\n\n"), Example("q2", "\n\ns2\n\n", "\n\nt\n\n")]
    assert system == rlt.STUDENT_SYSTEM
    file.write_text('{"question": "q1", "solution": "s1"}\n{"question": "q2"}\n')
    with pytest.raises(UserError, match=r"line 2.*'solution'"):
        rlt.load_examples(str(file), 0)


def stratos_row(system="SYS", value=None):
    answer = (
        "<|begin_of_thought|>\n\nT\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nS\n\n<|end_of_solution|>"
    )
    turns = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": value or answer}]
    return {"system": system, "conversations": turns}


class Table(list):
    """Rows with the two features of a `datasets` table that the script uses."""

    @property
    def column_names(self):
        return list(list.__getitem__(self, 0))

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([stratos_row()], ([Example("Q", "\n\nS\n\n", "\n\nT\n\n")], "SYS")),
        ([stratos_row(), stratos_row(system="OTHER")], "system varies"),
        ([stratos_row(), stratos_row(value="no tags")], "row 2"),
        ([{"a": 1}], "neither"),
    ],
)
def test_stratos_form(rows, expected, monkeypatch):
    monkeypatch.setattr(common, "load_hub", lambda *a, **k: Table(rows))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            rlt.load_examples("org/data", 0)
    else:
        assert rlt.load_examples("org/data", 0) == expected


def test_gsm8k_form(monkeypatch):
    monkeypatch.setattr(
        common, "load_hub", lambda *a, **k: Table([{"question": "Q", "answer": "r1\nr2\n#### 1,234"}])
    )
    (e,), _ = rlt.load_examples("openai/gsm8k", 0)
    assert (e.s, e.t) == ("\n\nThe answer is \\boxed{1,234}\n\n", "\n\nr1\nr2\n\n")
    assert (
        rlt.same_boxed(e, r"\boxed{1234}")
        and not rlt.same_boxed(e, r"\boxed{1235}")
        and not rlt.same_boxed(e, "1234")
    )


def test_hub_data_without_network_is_one_line():
    with pytest.raises(UserError, match=r"nobody/nothing.*jsonl") as error:
        common.load_hub("nobody/nothing")
    assert "\n" not in str(error.value)


# --- the vLLM sampler against a stand-in engine


def test_vllm_sampler_sets_every_sampling_field_and_hands_over_the_weights(cfg, task, models, monkeypatch):
    calls = SimpleNamespace(params=[], weights={}, awake=0, prompts=None)

    class LLM:
        def __init__(self, model, **settings):
            calls.settings = settings
            runner = SimpleNamespace(
                model=SimpleNamespace(load_weights=lambda it: calls.weights.update(dict(it)))
            )
            executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
            self.llm_engine = SimpleNamespace(model_executor=executor)

        def wake_up(self):
            calls.awake += 1

        def sleep(self, level):
            calls.awake -= 1

        def reset_prefix_cache(self):
            pass

        def generate(self, prompts, params, use_tqdm):
            calls.prompts = [p["prompt_token_ids"] for p in prompts]
            return [
                SimpleNamespace(outputs=[SimpleNamespace(token_ids=(k, 2)) for k in range(p.n)])
                for p in params
            ]

    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **k: calls.params.append(k) or SimpleNamespace(**k))
    monkeypatch.setitem(__import__("sys").modules, "vllm", fake)
    out = rlt.VLLMSampler(models[0], task)([[1, 2], [3]], torch.rand(6, 5), 0.7)
    assert out == [[0, 2], [1, 2], [2, 2]] * 2 and calls.prompts == [[1, 2], [3]] and calls.awake == 0
    assert set(calls.weights) == {n for n, _ in models[0].lm.named_parameters()}
    for p in calls.params:
        fields = {
            "n": 3,
            "max_tokens": 5,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
        }
        assert fields.items() <= p.items() and p["stop_token_ids"] == [task.eos]


def test_vllm_missing_is_one_line(task, models):
    with pytest.raises(UserError, match=r"\[vllm\]"):
        rlt.VLLMSampler(models[0], task)


# --- the script as a user runs it


def test_smoke_runs_resumes_shows_and_scores(run_script, tmp_path):
    run_script(ROOT / "rlt.py", "--config", "smoke")
    folder = tmp_path / "out" / "rlt-smoke-s0"
    first = json.loads((folder / "results.json").read_text())
    assert len(first["claims"]) == 7 and {
        "sample_tokens_per_s",
        "reward_tokens_per_s",
        "updates_per_s",
        "mfu",
    } <= set(first["speed"])
    again = run_script(ROOT / "rlt.py", "--config", "smoke", "--resume")
    second = json.loads((folder / "results.json").read_text())
    assert second["claims"] == first["claims"] and "distil 0" not in again.stdout
    assert "log teacher - log student" in run_script(ROOT / "rlt.py", "--config", "smoke", "--show").stdout
    rows = [{"question": "abcdefab", "solution": "cd", "reasoning_trace": t} for t in ("abcd", "ab~d")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run_script(ROOT / "rlt.py", "--config", "smoke", "--score", "t.jsonl")
    ranked = [json.loads(x) for x in (tmp_path / "t.scored.jsonl").read_text().splitlines()]
    assert [r["rank"] for r in ranked] == [1, 2] and ranked[0]["reward"] >= ranked[1]["reward"]


def test_all_stages_on_a_real_tokenizer_resume_where_they_were(run_script, tmp_path, text_files):
    stages = ["--stages", "warmup,baselines,rl,collect,distil,eval"]
    out = run_script(ROOT / "rlt.py", *text_files, *stages).stdout
    folder = tmp_path / "out" / "rlt-text-s0"
    assert "9 problems; 1 dropped" in out and "what each of its tokens costs" in out
    traces = [json.loads(x) for x in (folder / "traces.jsonl").read_text().splitlines()]
    assert len(traces) == 5 and all(math.isfinite(t["reward"]) for t in traces)
    assert [t["id"] for t in traces] == list(range(5)) and {t["teacher"] for t in traces} == {"lm"}
    results = json.loads((folder / "results.json").read_text())
    rivals = ("nothing", "correctness RL", "the corpus", "the teacher before RL")
    assert [c["text"] for c in results["claims"]] == [
        f"a student of RLT beats a student of {x}" for x in rivals
    ]
    assert (folder / "teacher" / "config.json").exists() and (folder / "distilled" / "config.json").exists()
    before = (folder / "rl" / "metrics.jsonl").read_text()
    (folder / "traces.jsonl").write_text("\n".join(json.dumps(t) for t in traces[:3]) + '\n{"question": "ha')
    run_script(ROOT / "rlt.py", *text_files, *stages, "--resume")
    resumed = [json.loads(x) for x in (folder / "traces.jsonl").read_text().splitlines()]
    assert (
        len(resumed) == 5
        and resumed[:3] == traces[:3]
        and (folder / "rl" / "metrics.jsonl").read_text() == before
    )


def test_score_ranks_a_file_with_given_models_and_refuses_text_for_the_built_in_task(
    run_script, tmp_path, text_files
):
    traces = ["We add the two numbers.", "naïve 日本", "It is 31."]
    row = {"question": "What is 1 plus 30?", "solution": r"It is \boxed{31}."}
    lines = [json.dumps(row | {"reasoning_trace": t}) + "\n" for t in traces]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    run_script(ROOT / "rlt.py", "--teacher", "lm", "--score", "t.jsonl", "--context", 700, "--max_new", 12)
    ranked = [json.loads(x) for x in (tmp_path / "t.scored.jsonl").read_text().splitlines()]
    assert sorted(r["reasoning_trace"] for r in ranked) == sorted(traces) and not (tmp_path / "out").exists()
    rewards = [r["reward"] for r in ranked]
    assert rewards == sorted(rewards, reverse=True) and all(math.isfinite(r) for r in rewards)
    done = run_script(ROOT / "rlt.py", "--score", "t.jsonl", check=False)
    assert done.returncode == 2 and "--teacher" in done.stderr and "Traceback" not in done.stderr


def test_bad_input_is_one_line_with_exit_code_2(run_script, tmp_path, text_files):
    other = bpe(["quite another text: 12 plus 30"], size=300)
    common.tiny_lm(len(other), 32, 2).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}\n')
    for arguments, words in (
        (["--group", "1"], "--group"),
        (["--student", "other"], "tokenize differently"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 1"),
        (["--context", "20"], "no problem is left"),
        (["--teacher", "nowhere"], "nowhere"),
        (["--stages", "warmup,dance"], "dance"),
    ):
        done = run_script(ROOT / "rlt.py", *text_files, *arguments, check=False)
        lines = [x for x in done.stderr.splitlines() if x.startswith("rlt.py")]
        assert done.returncode == 2 and len(lines) == 1 and words in lines[0], (arguments, done.stderr[-500:])
        assert "Traceback" not in done.stderr


def test_dry_run_of_full_needs_no_network_and_counts_parameters(run_script, tmp_path):
    out = run_script(ROOT / "rlt.py", "--config", "full", "--dry_run").stdout
    assert "teacher 7,615,616,512 parameters" in out and "8 GPUs" in out and not (tmp_path / "out").exists()
    rows = {
        line.rsplit(None, 1)[0]: float(line.rsplit(None, 1)[1]) for line in out.splitlines() if "bf16" in line
    }
    assert rows["reference: bf16"] == pytest.approx(2 * 7.615616512 / 8, abs=0.06)
    assert float(next(x for x in out.splitlines() if x.startswith("sum")).split()[-1]) < 80
