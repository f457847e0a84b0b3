"""Reinforcement-Learned Teachers (RLT): reward a teacher for explanations that a student can follow.

Cetin, Zhao, Tang, "Reinforcement Learning Teachers of Test Time Scaling", NeurIPS 2025, arXiv 2506.08388.

The claim. RL on correctness needs a model that already solves the task now and then, and it makes solvers,
while the models it makes are mostly used as teachers. An RLT gets the question AND the solution, and a dense
reward for an explanation that makes the solution likely to a frozen student. Students distilled from its raw
explanations beat students of far larger reasoning models; correctness RL that starts from them gets further.

Question q, solution s, explanation t; teacher pi_T, frozen student pi_S; log-probs at temperature tau:
  eq. (1)  r_SS = mean_k l_k + alpha min_k l_k,  l_k = log pi_S(s_k | q, t, s_<k)
           can the student get to the solution?
  eq. (2)  r_KL = mean_j d_j + alpha max_j d_j,  d_j = log pi_T(t_j | q, s, t_<j) - log pi_S(t_j | q, t_<j)
           is every step natural to somebody who does not see s?
  eq. (3)  r = r_SS - lambda r_KL + penalty where the closing tag is missing
  eq. (4)  GRPO: A = (r - mean) / (std + 1e-4) over the G explanations of a question; the loss is the mean
           over explanations of the mean over their tokens of -(exp(lp - sg lp) A - beta (e^rho - rho - 1)),
           lp = log pi_T, rho = log pi_ref - lp

How to run
  python rlt.py                                     the effect in miniature, with baselines, on two CPU cores
  python rlt.py --config text --teacher M --data F  a real model: hub id, folder, .gguf; F: .jsonl or gym:NAME
  python rlt.py --show                              the trained teacher explains, with the cost of each token
  python rlt.py --score F                           rank (question, solution, reasoning_trace) lines
  torchrun --nproc_per_node=8 rlt.py --config full  Qwen2.5-7B on Bespoke-Stratos-17k, the paper's setting

Departures from the paper and its code
- The paper writes a KL divergence; like its code we take the log-ratio at the sampled token. From the code,
  too: tau inside r_SS; the reference moves 0.9 of the way to the policy every 32 updates; -1 for a missing
  closing tag; an empty explanation counts 1 for mean and for max; explanations are re-encoded from text.
- The explanation is found by character offsets; a token that straddles a tag is left out. The code looks for
  its ids, so it finds the question if the explanation only repeats that.
- Log-softmax in float32, no pad token in any loss, rewards in batches (the code: bfloat16, pads, one by one).
- The teacher's system prompt is ours, of the same structure. One explanation a question is collected.
  Supervised texts are cut at --context. lm-eval's prompts and graders where the paper used SkyThought's.
- Samples are an inverse CDF of numbers that all ranks draw alike: their number changes no result.
- The demo's task, pointer chasing, is ours and was selected: exploration must fail. With half the chains it
  does not, and correctness RL wins: two control rows. Settings were tuned on seeds from 100 on.

Reading order: Config, ROWS, Prompts, align, rlt_reward, grpo_loss, train_grpo, train.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

import common
from common import Claim, Run, UserError

SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-"


@dataclass
class Config(common.Config):
    # models and data
    teacher: str = "tiny"  # becomes the teacher: hub id, folder or .gguf; tiny: trained here on pointers
    student: str = "self"  # frozen model that computes the reward (pi_S); self: the teacher as it starts
    learner: str = "self"  # model that is distilled; self: the teacher as it starts
    data: str = "pointers"  # or a .jsonl with question, solution, reasoning_trace; Stratos, GSM8K; gym:NAME
    problems: int = 1536  # of pointers and gym: problems to make
    holdout: int = 256  # problems kept for evaluation, the last ones
    bench: tuple[str, ...] = ()  # lm-eval tasks to evaluate students on, too
    # pointers
    symbols: int = 20  # size of the array (M)
    chains: int = 6  # start symbols to follow (W)
    part: float = 1.0  # share of the chains that a problem asks for: below 1 the control
    p_write: float = 0.3  # chance that a corpus trace writes an intermediate symbol
    width: int = 64  # of the tiny model
    base_batch: int = 16  # texts a step of its pre-training
    base_steps: int = 1500  # pre-training steps with every symbol written, at most
    web_steps: int = 250  # pre-training steps on corpus traces
    base_lr: float = 4e-3  # of pre-training
    base_check: bool = True  # stop when the tiny model cannot follow single hops
    # supervised stages
    warmup_steps: int = 40  # optimizer steps of the teacher on corpus traces
    warmup_batch: int = 32  # texts a step
    warmup_lr: float = 1e-3  # peak; 5 % linear warm-up, then cosine
    source: Literal["teacher", "corpus"] = "teacher"  # explanations that the learner is distilled from
    traces: int = 384  # explanations to distil from
    distil_steps: int = 80  # optimizer steps
    distil: float = 1.0  # share of the two that the learner gets; 0: no distillation
    distil_lr: float = 1e-3  # peak; 10 % linear warm-up, then cosine
    distil_batch: int = 32  # texts a step
    # reinforcement learning
    updates: int = 40  # optimizer steps, one for each batch of completions
    teach: float = 1.0  # share of them that the teacher gets; 0: explanations of the teacher before RL
    solve: float = 0.0  # share that the learner gets of correctness RL, after distillation
    prompts: int = 8  # questions an update (P)
    group: int = 8  # completions a question (G)
    max_new: int = 32  # tokens a completion, at most
    temperature: float = 1.0  # of sampling and of every log-prob (tau)
    lr: float = 1e-3  # AdamW, constant
    beta: float = 0.04  # weight of the KL to the reference model
    sync_every: int = 32  # updates between two moves of the reference model
    sync_mix: float = 0.9  # how far it moves towards the policy
    alpha: float = 0.01  # weight of the min in r_SS and of the max in r_KL
    lam: float = 3.0  # weight of r_KL (lambda)
    penalty: float = -1.0  # reward for a missing closing tag
    # evaluation, memory and speed
    eval_new: int = 40  # tokens of an answer, at most
    eval_temperature: float = 0.7  # of an answer; also measured greedily
    context: int = 128  # tokens of the longest text; problems that may not fit are dropped and counted
    micro_tokens: int = 8192  # padded tokens in one forward and backward pass
    sample_batch: int = 1024  # sequences decoded together on a rank
    sampler: Literal["hf", "vllm"] = "hf"  # transformers' loop, or a vLLM engine on each GPU
    recompute: bool = False  # activations in the backward pass, to save memory
    # looking instead of training
    show: bool = False  # print one scored explanation of the trained teacher and exit
    score: str = ""  # .jsonl to rank by the reward of the trained teacher, then exit

    def check(self):
        super().check()
        if self.group < 2:
            raise UserError("--group must be 2 or more: the advantage compares completions of one question")
        if not 1 <= self.chains * self.part <= self.symbols <= len(SYMBOLS):
            raise UserError(f"1 <= --chains * --part <= --symbols <= {len(SYMBOLS)} is needed")
        if not (self.teacher and self.data):
            raise UserError(
                "--teacher (hub id, folder or .gguf) and --data (.jsonl, hub id or gym:NAME) are needed"
            )
        if self.share == "run" and self.prompts % int(os.environ.get("WORLD_SIZE", 1)):
            raise UserError(f"--prompts {self.prompts} must be a multiple of the ranks: groups stay whole")
        if (self.teacher == "tiny") != (self.data == "pointers"):
            raise UserError("--data pointers goes with --teacher tiny, other data with another teacher")


DEMO = Config(seeds=3, ranks=2, log_every=4, save_every=1000)
REAL = replace(
    DEMO,
    ranks=1,
    seeds=1,
    share="run",
    rows=("RLT", "distilled from the corpus"),
    data="",
    teacher="",
    problems=64,
    holdout=4,
    warmup_steps=2,
    warmup_lr=1e-5,
    warmup_batch=4,
    distil_batch=4,
    traces=4,
    distil_steps=2,
    distil_lr=1e-5,
    updates=2,
    prompts=2,
    group=4,
    max_new=48,
    temperature=0.7,
    lr=1e-6,
    eval_new=48,
    context=1024,
    micro_tokens=2048,
    sample_batch=64,
    log_every=1,
    save_every=20,
)
CONFIGS = {
    "smoke": replace(
        DEMO,
        ranks=1,
        seeds=2,
        problems=40,
        holdout=8,
        symbols=6,
        chains=2,
        width=32,
        base_steps=20,
        web_steps=10,
        base_check=False,
        warmup_steps=3,
        warmup_batch=8,
        distil_batch=8,
        updates=3,
        prompts=2,
        group=4,
        max_new=10,
        traces=8,
        distil_steps=3,
        log_every=1,
    ),
    "demo": DEMO,
    "gpu": replace(
        DEMO,
        ranks=8,
        seeds=8,
        problems=4096,
        symbols=32,
        chains=6,
        width=128,
        base_batch=64,
        base_steps=4000,
        base_lr=2e-3,
        web_steps=500,
        updates=60,
        prompts=16,
        group=16,
        max_new=40,
        traces=1024,
        distil_steps=160,
        eval_new=56,
        micro_tokens=65536,
    ),
    "text": REAL,
    "full": replace(
        REAL,
        teacher="Qwen/Qwen2.5-7B-Instruct",
        student="bespokelabs/Bespoke-Stratos-7B",
        learner="Qwen/Qwen2.5-7B-Instruct",
        data="bespokelabs/Bespoke-Stratos-17k",
        holdout=64,
        bench=("hendrycks_math500", "aime24", "gpqa_diamond_cot_zeroshot"),
        warmup_batch=16,
        warmup_steps=10440,
        distil_batch=96,
        traces=17000,
        distil_steps=522,
        updates=125,
        prompts=16,
        group=64,
        max_new=16384,
        eval_new=32768,
        context=32768,
        micro_tokens=32768,
        sample_batch=4096,
        sampler="vllm",
        recompute=True,
    ),
}

# a row is the settings that it changes; every row ends with a student and its score on held-out problems
ROWS = {
    "RLT": {},
    "RLT, lambda = 0": dict(lam=0.0),
    "correctness RL": dict(distil=0.0, solve=1.0),
    "distilled from the corpus": dict(source="corpus"),
    "teacher before RL": dict(teach=0.0),
    "RL from a few RLT traces": dict(distil=0.25, solve=0.4),
    "half the chains: RLT": dict(part=0.5),
    "half the chains: correctness RL": dict(part=0.5, distil=0.0, solve=1.0),
}
CLAIMS = [
    Claim(
        "a student distilled from RLT beats correctness RL from the same start",
        "solved",
        "RLT",
        "correctness RL",
    ),
    Claim("... beats one distilled from the corpus", "solved", "RLT", "distilled from the corpus"),
    Claim("... beats one distilled from the teacher before RL", "solved", "RLT", "teacher before RL"),
    Claim("without the KL term (theirs) teaching is worse", "solved", "RLT", "RLT, lambda = 0"),
    Claim(
        "... though r_SS without it (ours) is as high or higher, margin 0.1",
        "r_ss",
        "RLT, lambda = 0",
        "RLT",
        margin=-0.1,
    ),
    Claim(
        "correctness RL gets further from a few RLT traces than from the base",
        "solved",
        "RL from a few RLT traces",
        "correctness RL",
    ),
    Claim(
        "control, half the chains: correctness RL beats distilling from RLT",
        "sampled",
        "half the chains: correctness RL",
        "half the chains: RLT",
    ),
]


# --- problems ---


@dataclass(frozen=True)
class Example:
    """A question, its solution and perhaps a reasoning trace, and how much credit an answer's text deserves.

    Solution and trace hold the blank lines that pad them between their tags.
    """

    question: str
    solution: str
    trace: str | None = None
    credit: Callable[[str], float] = field(default=lambda text: 0.0, compare=False)  # in [0, 1]; 1 is right


def make_problems(n: int, cfg: Config, generator: torch.Generator, p_write: float) -> list[Example]:
    """Pointer chasing. The question is an array f (a permutation of M symbols) and W starts, the solution the
    W symbols f(f(f(x))), the trace a chain x, f(x), f(f(x)), f(f(f(x))) for each start.

    Each intermediate symbol is written with probability p_write, else elided ("~"). One hop is one attention
    lookup; two at once are beyond two layers, so an elision is a leap that nobody at this size can follow.
    """
    f = torch.rand(n, cfg.symbols, generator=generator).argsort(1)
    starts = torch.rand(n, cfg.symbols, generator=generator).argsort(1)[:, : round(cfg.chains * cfg.part)]
    x = [starts]
    for _ in range(3):
        x.append(f.gather(1, x[-1]))
    elided = torch.rand(n, starts.shape[1], 4, generator=generator) >= p_write
    elided[..., [0, 3]] = False
    trace = torch.stack(x, 2).masked_fill(elided, cfg.symbols).flatten(1)  # (n, 4 W)
    alphabet = np.array([*SYMBOLS[: cfg.symbols], "~"])
    questions, solutions, traces = (
        ["".join(row) for row in alphabet[c.numpy()]] for c in (torch.cat([f, starts], 1), x[3], trace)
    )
    rows = zip(questions, solutions, traces, strict=True)
    return [Example(*row, credit=partial(share_right, row[1])) for row in rows]


def share_right(solution: str, text: str) -> float:
    """Share of the solution's symbols that stand at their place in an answer "...[solution]"."""
    _, there, rest = text.rpartition("[")
    answer = rest.partition("]")[0] if there else ""
    right = sum(a == b for a, b in zip(solution, answer, strict=False))
    return right / max(len(solution), len(answer))


def padded(text: str) -> str:
    """Text between blank lines, as it stands inside the tags of Bespoke-Stratos."""
    return f"\n\n{text.strip()}\n\n"


def right_box(solution: str, text: str) -> float:
    """1 if the last box of the answer agrees with that of the solution (or with all of it), else 0."""
    return float(common.last_box(text) is not None and common.answers_agree(solution, text))


def load_examples(cfg: Config, run: Run) -> tuple[list[Example], str]:
    """Examples and the student's system prompt from what --data names; UserError for unknown columns."""
    source = cfg.data
    if source == "pointers":
        return make_problems(cfg.problems, cfg, run.generator("problems"), cfg.p_write), POINTERS.student
    gym = dict(size=cfg.problems, seed=cfg.seed) if source.startswith("gym:") else {}
    rows = common.load_rows(source, subset="main" if "gsm8k" in source else None, **gym)
    if "conversations" in rows[0]:
        if len({row["system"] for row in rows}) > 1:
            raise UserError(f"{source}: the column system varies, so there is no one student prompt")
        return [stratos(row, source) for row in rows], rows[0]["system"]
    common.need_text(source, rows, ("question", "answer" if "answer" in rows[0] else "solution"))
    examples = []
    for row in rows:
        trace, solution = row.get("reasoning_trace"), row.get("solution")
        if "answer" in row and not solution:  # GSM8K: rationale #### number; gym: the answer alone
            trace, _, number = row["answer"].rpartition("####")
            solution = rf"The answer is \boxed{{{number.strip()}}}"
        credit = partial(right_box, solution)
        if gym:
            credit = lambda text, score=row["score"]: score(common.last_box(text))  # noqa: E731
        examples.append(Example(row["question"], padded(solution), padded(trace) if trace else None, credit))
    return examples, STRATOS_SYSTEM


def stratos(row: dict, source: str) -> Example:
    """A row of Bespoke-Stratos: two turns, the second with a thought block and a solution block."""
    question, answer = (turn["value"] for turn in row["conversations"])
    parts = []
    for begin, end in (TEXT.thought, TEXT.solution):
        _, there, rest = answer.partition(begin)
        part, closed, _ = rest.partition(end)
        if not (there and closed):
            raise UserError(f"{source}: a conversation has no {begin} ... {end}")
        parts.append(part)
    return Example(question, parts[1], parts[0], partial(right_box, parts[1]))


# --- the two prompts ---


@dataclass(frozen=True)
class Tags:
    """System prompts of teacher and student, the tags around s and t, and the gap between sections."""

    teacher: str
    student: str
    solution: tuple[str, str]
    thought: tuple[str, str]
    explanation: tuple[str, str]
    gap: str


# the system prompt of Bespoke-Stratos-17k and its models, misprint included: students have seen these words
STRATOS_SYSTEM = (
    "Your role as an assistant involves thoroughly exploring questions through a systematic long "
    "thinking process before providing the final precise and accurate solutions. This requires "
    "engaging in a comprehensive cycle of analysis, summarizing, exploration, reassessment, "
    "reflection, backtracing, and iteration to develop well-considered thinking process. Please "
    "structure your response into two main sections: Thought and Solution. In the Thought section, "
    "detail your reasoning process using the specified format: <|begin_of_thought|> {thought with "
    "steps separated with '\n\n'} <|end_of_thought|> Each step should include detailed considerations"
    " such as analisying questions, summarizing relevant findings, brainstorming new ideas, verifying"
    " the accuracy of the current steps, refining any errors, and revisiting previous steps. In the "
    "Solution section, based on various attempts, explorations, and reflections from the Thought "
    "section, systematically present the final solution that you deem correct. The solution should "
    "remain a logical, accurate, concise expression style and detail necessary step needed to reach "
    "the conclusion, formatted as follows: <|begin_of_solution|> {final formatted, precise, and clear"
    " solution} <|end_of_solution|> Now, try to solve the following question through the above "
    "guidelines:"
)
TEACHER_SYSTEM = (
    "You explain how problems are solved. Your answer has two sections. The Solution section states the "
    "solution between <|begin_of_solution|> and <|end_of_solution|>. The Explanation section, between "
    "<|begin_of_explanation|> and <|end_of_explanation|>, sets out the systematic thinking that leads from "
    "the question to that solution: analysis, every step worked through, checks, and reconsideration."
)
TEXT = Tags(
    TEACHER_SYSTEM,
    STRATOS_SYSTEM,
    solution=("<|begin_of_solution|>", "<|end_of_solution|>"),
    thought=("<|begin_of_thought|>", "<|end_of_thought|>"),
    explanation=("<|begin_of_explanation|>", "<|end_of_explanation|>"),
    gap="\n\n",
)
POINTERS = Tags("!", "?", solution=("[", "]"), thought=("(", ")"), explanation=("{", "}"), gap="")
# for a model without a chat template; its end of turn is whatever token ends its texts
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Prompts:
    """How q, s and t become the texts of teacher and student, and these become tokens.

    Spans come from concatenation, never from a search: the system prompts mention the tags. UserError if the
    tokenizer or its chat template cannot carry them.
    """

    def __init__(self, tokenizer, tags: Tags, student_system: str):
        self.tokenizer, self.tags, self.student_system = tokenizer, tags, student_system
        if not tokenizer.is_fast:
            raise UserError("the tokenizer has no fast version, so no character offsets: take another model")
        for tag in (*tags.solution, *tags.thought, *tags.explanation):
            if tag in tokenizer.all_special_tokens:
                raise UserError(f"{tag} is a special token of this model and would vanish in decoding")
        tokenizer.chat_template = tokenizer.chat_template or CHAT
        turns = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "Q"), ("assistant", "A"))]
        try:
            head, whole = self.chat("S", "Q") + "A", tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as e:  # whatever the template raises, for one that knows no system role
            raise UserError(f"the chat template refuses system, user and assistant turns ({e})") from None
        if not whole.startswith(head) or whole == head:
            raise UserError("the chat template alters the assistant's text, so spans cannot be kept")
        self.end_of_turn = whole.removeprefix(head)

    def chat(self, system: str, question: str) -> str:
        """The text up to where the assistant's turn begins."""
        turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def teacher(self, e: Example, t: str) -> tuple[str, tuple[int, int], int]:
        """Teacher's text, span of t in it, and where generation begins: after the gap that t starts with."""
        solution = self.tags.solution[0] + e.solution + self.tags.solution[1] + self.tags.gap
        head = self.chat(self.tags.teacher, e.question) + solution + self.tags.explanation[0]
        text = head + t + self.tags.explanation[1] + self.end_of_turn
        return text, (len(head), len(head) + len(t)), len(head) + len(self.tags.gap)

    def student(self, e: Example, t: str) -> tuple[str, tuple[int, int], tuple[int, int], int]:
        """Student's text, spans of t and of s in it, and where the assistant's turn begins."""
        turn = self.student_prompt(e)
        head = turn + self.tags.thought[0]
        middle = head + t + self.tags.thought[1] + self.tags.gap + self.tags.solution[0]
        text = middle + e.solution + self.tags.solution[1] + self.end_of_turn
        span = len(middle), len(middle) + len(e.solution)
        return text, (len(head), len(head) + len(t)), span, len(turn)

    def teacher_prompt(self, e: Example) -> str:
        """What the teacher continues: question and solution given, explanation opened."""
        text, _, begin = self.teacher(e, self.tags.gap)
        return text[:begin]

    def student_prompt(self, e: Example) -> str:
        """What a student continues: the question alone."""
        return self.chat(self.student_system, e.question)

    def split_completion(self, text: str) -> tuple[str, bool]:
        """(t, closed): t ends at the first closing tag of a completion; without one it is all of it."""
        t, tag, _ = text.partition(self.tags.explanation[1])
        return self.tags.gap + t, bool(tag)

    def encode(self, texts: list[str]) -> list[tuple[list[int], np.ndarray]]:
        """Ids and character offsets (T, 2) of each text."""
        out = self.tokenizer(texts, return_offsets_mapping=True, add_special_tokens=False)
        offsets = [np.array(o).reshape(-1, 2) for o in out["offset_mapping"]]
        return list(zip(out["input_ids"], offsets, strict=True))


def tokens_in_span(offsets: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Indices of the tokens whose characters, one at least, all lie in [begin, end); offsets (T, 2)."""
    a, b = offsets[:, 0], offsets[:, 1]
    return np.flatnonzero((a >= begin) & (b <= end) & (b > a))


@dataclass
class Episode:
    """A completion and all that belongs to it; `align` finds where t and s stand in both contexts."""

    example: Example
    prompt: list[int]
    completion: list[int]  # sampled ids, the end of turn included
    text: str  # the completion, decoded
    t: str = ""
    closed: bool = True  # the closing tag was there
    teacher_ids: list[int] = field(default_factory=list)
    student_ids: list[int] = field(default_factory=list)
    t_teacher: np.ndarray | None = None  # (J,) places of t's tokens in teacher_ids
    t_student: np.ndarray | None = None  # (J,) places of the same tokens in student_ids
    s_student: np.ndarray | None = None  # (K,) places of s in student_ids


def align(episodes: list[Episode], prompts: Prompts):
    """Re-encode t in both contexts and find its tokens; where the two differ, what they share is kept."""
    for e in episodes:
        e.t, e.closed = prompts.split_completion(e.text)
    told = [prompts.teacher(e.example, e.t) for e in episodes]
    shown = [prompts.student(e.example, e.t) for e in episodes]
    codes = prompts.encode([text for text, *_ in told + shown])
    for i, e in enumerate(episodes):
        (e.teacher_ids, offsets_t), (e.student_ids, offsets_s) = codes[i], codes[i + len(episodes)]
        span_t, span_s, span_solution = told[i][1], shown[i][1], shown[i][2]
        e.s_student = tokens_in_span(offsets_s, *span_solution)
        t_teacher, t_student = tokens_in_span(offsets_t, *span_t), tokens_in_span(offsets_s, *span_s)
        keys_t = [(e.teacher_ids[j], *(offsets_t[j] - span_t[0])) for j in t_teacher]
        keys_s = [(e.student_ids[j], *(offsets_s[j] - span_s[0])) for j in t_student]
        shared = set(keys_t) & set(keys_s)
        e.t_teacher = t_teacher[[k in shared for k in keys_t]]
        e.t_student = t_student[[k in shared for k in keys_s]]


# --- models, and the batches they get ---


@dataclass(frozen=True)
class Task:
    """What the stages work with."""

    cfg: Config
    run: Run
    prompts: Prompts
    start: str  # the model that becomes the teacher: name or folder

    @property
    def student(self) -> str:
        """The frozen student that computes the reward."""
        return self.start if self.cfg.student == "self" else self.cfg.student


class LogProbLM(nn.Module):
    """A causal LM whose forward gives log-probs. Sharded whole: FSDP's root has embeddings and head."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor, mask: Tensor, temperature: float) -> Tensor:
        """ids, mask (B, T), right-padded -> fp32 log-probs of the next tokens, (B, T - 1)."""
        return common.token_logprobs(self.lm, ids, mask, temperature)


def load(name: str, task: Task, trainable: bool = False) -> LogProbLM:
    """A model on this rank's device, or sharded: float32 if it is trained, else bfloat16 on GPUs."""
    dtype = torch.bfloat16 if task.run.amp and not trainable else torch.float32
    lm, _ = common.load_lm(name, dtype)
    if trainable and task.cfg.recompute:
        lm.gradient_checkpointing_enable()
    model = LogProbLM(lm).requires_grad_(trainable)
    return task.run.shard(model, dtype).train(trainable)  # no model here has dropout


def whole(p: Tensor) -> Tensor:
    """A sharded tensor gathered, on all ranks together; others as they are."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def full_weights(model: LogProbLM) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each parameter, one by one."""
    return ((name, whole(p)) for name, p in model.lm.named_parameters())


def export(model: LogProbLM, folder: Path, task: Task) -> str:
    """Write model and tokenizer as a Hugging Face folder."""
    state = {name: p.detach().cpu() for name, p in full_weights(model)}
    if task.run.rank == 0:
        model.lm.should_save_on_this_rank = lambda _: (
            True
        )  # transformers saves on the first of all ranks only
        model.lm.save_pretrained(folder, state_dict=state)
        task.prompts.tokenizer.save_pretrained(folder)
    task.run.gather("saved")
    return str(folder)


def micro_batches(sequences: list[list[int]], supervised: list[list[int]], task: Task) -> Iterator[tuple]:
    """Yields indices, ids and mask (B, T), and the loss mask (B, T - 1) of the next tokens, by length.

    At most cfg.micro_tokens padded tokens each (or a single sequence). Every rank gets equally many, since
    FSDP makes them meet in each forward pass: some end with a dummy without index, its loss mask empty.
    """
    groups, device = [[]], task.run.device
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if groups[-1] and len(sequences[i]) * (len(groups[-1]) + 1) > task.cfg.micro_tokens:
            groups.append([])
        groups[-1].append(i)
    groups += [[]] * (max(task.run.gather(len(groups))) - len(groups))
    for group in groups:
        ids, valid = common.collate([sequences[i] for i in group] or [[0, 0]], device)
        mask, _ = common.collate([supervised[i] for i in group] or [[0, 0]], device)
        yield group, ids, valid, mask[:, 1:] > 0


@torch.no_grad()
def score(model: nn.Module, sequences: list[list[int]], task: Task) -> Tensor:
    """Log-probs (N, T - 1) of all next tokens of N sequences at cfg.temperature, in micro-batches."""
    out = torch.zeros(len(sequences), max(map(len, sequences)) - 1, device=task.run.device)
    for group, ids, valid, _ in micro_batches(sequences, sequences, task):
        with task.run.autocast():
            logp = model(ids, valid, task.cfg.temperature)
        out[group, : logp.shape[1]] = logp[: len(group)]
    return out


# --- the reward ---


def at(logp: Tensor, places: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens at `places`, padded (B, L), and mask; token i is predicted at i - 1."""
    width = max(1, *map(len, places))
    index = torch.tensor([[*row, *[0] * (width - len(row))] for row in places], device=logp.device)
    return logp.gather(1, (index - 1).clamp(min=0)), index > 0


def reduce_scores(x: Tensor, mask: Tensor, alpha: float, kind: Literal["min", "max"]) -> Tensor:
    """mean + alpha min (or max) over each row's masked entries, (B, L) -> (B,); NaN for a row without any."""
    sign = 1.0 if kind == "max" else -1.0
    extreme = sign * (sign * x).masked_fill(~mask, -torch.inf).amax(1)
    return torch.where(mask, x, 0).sum(1) / mask.sum(1) + alpha * extreme


def rlt_reward(
    episodes: list[Episode], teacher: nn.Module, student: nn.Module, task: Task
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Eqs. (1) to (3): "reward" and its parts (B,), then l_k (B, K) and d_j (B, J). No gradient flows.

    One pass of the student gives the solution's log-probs and its half of d.
    """
    cfg = task.cfg
    align(episodes, task.prompts)
    student_logp = score(student, [e.student_ids for e in episodes], task)
    teacher_logp = score(teacher, [e.teacher_ids for e in episodes], task)
    ell, solution = at(student_logp, [e.s_student for e in episodes])  # l_k, (B, K)
    student_t, think = at(student_logp, [e.t_student for e in episodes])
    d = at(teacher_logp, [e.t_teacher for e in episodes])[0] - student_t  # d_j, (B, J)
    closed = torch.tensor([e.closed for e in episodes], device=d.device)
    r_ss = reduce_scores(ell, solution, cfg.alpha, "min")  # eq. (1)
    r_kl = reduce_scores(d, think, cfg.alpha, "max")  # eq. (2)
    r_kl = torch.where(think.any(1), r_kl, 1 + cfg.alpha)
    reward = r_ss - cfg.lam * r_kl + cfg.penalty * ~closed  # eq. (3)
    numbers = {"reward": reward, "r_ss": r_ss, "r_kl": r_kl, "length": think.sum(1), "closed": closed}
    return numbers, ell, d


def correctness_reward(episodes: list[Episode], task: Task) -> dict[str, Tensor]:
    """The baseline's sparse reward (B,): 1 where an answer is right, else 0."""
    right = [e.example.credit(e.text) >= 1 for e in episodes]
    return {"reward": torch.tensor(right, dtype=torch.float32, device=task.run.device)}


# --- GRPO ---


def group_advantage(reward: Tensor, group: int) -> Tensor:
    """Eq. (4): (r - mean) / (std + 1e-4) over each `group` consecutive completions, (B,) -> (B,).

    The std has n - 1 in it. A group of equal rewards has advantage 0 exactly.
    """
    r = reward.view(-1, group)
    advantage = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    return torch.where(r.eq(r[:, :1]).all(1, keepdim=True), 0.0, advantage).flatten()


def grpo_loss(logp: Tensor, ref_logp: Tensor, advantage: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Eq. (4): logp, ref_logp, mask (B, T), advantage (B,) -> (). Gradient in logp: -A + beta (1 - e^rho)."""
    ratio = (logp - logp.detach()).exp()  # 1, but it carries the gradient
    rho = ref_logp - logp
    loss = -(ratio * advantage[:, None] - beta * (rho.exp() - rho - 1))
    return (torch.where(mask, loss, 0).sum(1) / mask.sum(1).clamp(min=1)).mean()


class Sampler:
    """Completions of a model by transformers' own loop."""

    def __init__(self, lm: nn.Module, task: Task):
        self.lm, self.task, self.ends = lm, task, common.end_ids(lm, task.prompts.tokenizer)

    @torch.no_grad()
    def refresh(self, model: LogProbLM):
        """Take over the weights of `model` if it is another one: a sharded model is copied to each rank."""
        if self.lm is not model.lm:
            for mine, (_, p) in zip(self.lm.parameters(), full_weights(model), strict=True):
                mine.copy_(p)

    def __call__(self, prompts: list[list[int]], uniforms: Tensor, temperature: float) -> list[list[int]]:
        """One completion a prompt, decided by uniforms (N, T), cfg.sample_batch at a time."""
        out, size, training = [], self.task.cfg.sample_batch, self.lm.training
        self.lm.eval()
        for i in range(0, len(prompts), size):
            part = slice(i, i + size)
            with self.task.run.autocast():
                out += common.generate(self.lm, prompts[part], uniforms[part], self.ends, temperature)
        self.lm.train(training)
        return out


class VLLMSampler:
    """The same by a vLLM engine on this rank's GPU, asleep while models train; all prompts in one call."""

    engines: ClassVar[dict] = {}

    def __init__(self, name: str, model: LogProbLM, task: Task):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the weights stay in this process
        self.vllm, self.ends = common.need("vllm", "vllm"), common.end_ids(model.lm, task.prompts.tokenizer)
        settings = dict(dtype="bfloat16", max_model_len=task.cfg.context, generation_config="vllm")
        settings |= dict(gpu_memory_utilization=0.4, enable_sleep_mode=True, seed=task.run.rank)
        if "RANK" in os.environ:
            settings["distributed_executor_backend"] = "external_launcher"
        kind = type(model.lm), *(p.shape for p in model.lm.parameters())
        if kind not in self.engines:  # it holds a GPU, and only the weights differ
            self.engines[kind] = self.vllm.LLM(name, **settings)
        self.engine = self.engines[kind]

    def refresh(self, model: LogProbLM):
        self.engine.wake_up()
        worker = self.engine.llm_engine.model_executor.driver_worker
        worker.model_runner.model.load_weights(full_weights(model))
        self.engine.reset_prefix_cache()

    def __call__(self, prompts: list[list[int]], uniforms: Tensor, temperature: float) -> list[list[int]]:
        each = dict(max_tokens=uniforms.shape[1], stop_token_ids=self.ends, detokenize=False)
        each |= dict(temperature=temperature, top_p=1.0, top_k=0, repetition_penalty=1.0)
        params = [self.vllm.SamplingParams(**each, seed=int(u * 2**31)) for u in uniforms[:, 0].tolist()]
        outputs = self.engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        self.engine.sleep(level=1)
        return [list(o.outputs[0].token_ids) for o in outputs]


def make_sampler(name: str, model: LogProbLM, task: Task) -> Sampler | VLLMSampler:
    """What cfg.sampler says, for a model that was loaded from `name`."""
    if task.cfg.sampler == "vllm":
        return VLLMSampler(name, model, task)
    if task.run.world_size == 1:
        return Sampler(model.lm, task)
    dtype = torch.bfloat16 if task.run.amp else torch.float32
    return Sampler(common.load_lm(name, dtype)[0].to(task.run.device), task)


def rollout(
    sampler, examples: list[Example], prompt_of: Callable, uniforms: Tensor, temperature, task
) -> list:
    """An episode of each example; uniforms (N, T) decide the samples."""
    prompts = [ids for ids, _ in task.prompts.encode([prompt_of(e) for e in examples])]
    completions = sampler(prompts, uniforms, temperature)
    texts = task.prompts.tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [Episode(*row) for row in zip(examples, prompts, completions, texts, strict=True)]


def distinct_rows(step: int, count: int, n: int, run: Run) -> list[int]:
    """`count` different row numbers for a step, on a walk through n rows in a new order every epoch."""
    a_epoch = n // count
    order = torch.randperm(n, generator=run.generator(f"epoch {step // a_epoch}"))
    return order[step % a_epoch * count :][:count].tolist()


def train_grpo(start: str, examples: list[Example], updates: int, explain: bool, task: Task) -> str:
    """`updates` steps of GRPO from the model `start`; returns the trained one's folder.

    One loop for the paper and its baseline. `explain`: the policy explains given solutions, rewarded by eq.
    (3); else it answers questions, and a right answer is 1. Groups never straddle ranks.
    """
    cfg, run, device = task.cfg, task.run, task.run.device
    policy, reference = load(start, task, trainable=True), load(start, task)
    student = load(task.student, task) if explain else None
    prompt_of = task.prompts.teacher_prompt if explain else task.prompts.student_prompt
    sampler = make_sampler(start, policy, task)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, weight_decay=0.0, fused=device.type == "cuda")
    share = cfg.prompts * cfg.group // run.world_size
    mine = slice(run.rank * share, (run.rank + 1) * share)
    for step in run.steps(updates, model=policy, optimizer=optimizer, reference=reference):
        rows = distinct_rows(step, cfg.prompts, len(examples), run)
        batch = [examples[i] for i in rows for _ in range(cfg.group)][mine]
        uniforms = torch.rand(cfg.prompts * cfg.group, cfg.max_new)[mine]
        sampler.refresh(policy)
        episodes = rollout(sampler, batch, prompt_of, uniforms, cfg.temperature, task)

        if explain:
            numbers, _, _ = rlt_reward(episodes, policy, student, task)
        else:
            numbers = correctness_reward(episodes, task)
        advantage = group_advantage(numbers["reward"], cfg.group)

        sequences = [e.prompt + e.completion for e in episodes]
        sampled = [
            [0] * len(e.prompt) + [1] * len(e.completion) for e in episodes
        ]  # the end of turn included
        losses = []
        for group, ids, valid, mask in micro_batches(sequences, sampled, task):
            with run.autocast():
                with torch.no_grad():
                    ref_logp = reference(ids, valid, cfg.temperature)
                logp = policy(ids, valid, cfg.temperature)
            loss = grpo_loss(logp, ref_logp, advantage[group or [0]], mask, cfg.beta)
            loss = loss * len(group) / len(episodes)  # the mean over all completions
            loss.backward()
            losses.append(loss.detach())
        norm = whole(nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % cfg.sync_every == 0:
            common.soft_update(reference, policy, cfg.sync_mix)
        numbers["signal"] = advantage.view(-1, cfg.group).ne(0).any(1)  # groups with something to learn
        run.log(step, loss=sum(losses), grad_norm=norm, **{k: v.float().mean() for k, v in numbers.items()})
    return export(policy, run.folder / "model", task)


# --- the supervised stages ---


def sft(
    model: LogProbLM,
    stage: str,
    steps: int,
    batch_of: Callable,
    rate: Callable,
    task: Task,
    stop=None,
    **adam,
):
    """Train in place: batch_of(step) is the global batch, (text, character where the loss begins) each.

    The loss is the mean over the supervised tokens of the batch; longer texts are cut at cfg.context.
    rate(step) is the learning rate, stop(step) may end the stage early.
    """
    cfg, run = task.cfg, task.run
    optimizer = torch.optim.AdamW(model.parameters(), rate(0), **adam, fused=run.device.type == "cuda")
    for step in run.steps(steps, stage, model=model, optimizer=optimizer):
        texts, begins = zip(*batch_of(step)[run.rank :: run.world_size], strict=True)
        codes = [(ids[: cfg.context], offsets[: cfg.context]) for ids, offsets in task.prompts.encode(texts)]
        masks = [(o[:, 0] >= begin).tolist() for (_, o), begin in zip(codes, begins, strict=True)]
        supervised = run.mean(float(sum(map(sum, masks)))).to(run.device)  # of a rank: gradients are averaged
        losses = []
        for _, ids, valid, mask in micro_batches([ids for ids, _ in codes], masks, task):
            with run.autocast():
                logp = model(ids, valid, 1.0)
            loss = -(logp * mask).sum() / supervised
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(step, loss=sum(losses))
        if stop and stop(step):
            break


def fine_tune(
    name: str, texts: list, batch: int, steps: int, peak: float, warmup: float, task: Task, **adam
) -> str:
    """SFT of a model on (text, character where the loss begins), in a new order every epoch -> its folder."""
    model, batch = load(name, task, trainable=True), min(batch, len(texts))
    rate = partial(common.learning_rate, total=steps, peak=peak, warmup=warmup)

    def batch_of(step: int) -> list[tuple[str, int]]:
        return [texts[i] for i in distinct_rows(step, batch, len(texts), task.run)]

    if texts:
        sft(model, "sft", steps, batch_of, rate, task, **adam)
    return export(model, task.run.folder / "model", task)


def collect(name: str, examples: list[Example], task: Task):
    """One raw explanation of each example, with its reward: traces-*.jsonl, a file a chunk."""
    cfg, run = task.cfg, task.run
    teacher, student = load(name, task), load(task.student, task)
    sampler, chunk = make_sampler(name, teacher, task), cfg.sample_batch * run.world_size
    for start in range(0, len(examples), chunk):
        part, file = examples[start : start + chunk], run.folder / f"traces-{start:07d}.jsonl"
        if run.gather(file.exists())[0]:
            continue
        uniforms = torch.rand(len(part), cfg.max_new, generator=run.generator(f"collect {start}"))
        sampler.refresh(teacher)
        mine = slice(run.rank, None, run.world_size)
        episodes = rollout(
            sampler, part[mine], task.prompts.teacher_prompt, uniforms[mine], cfg.temperature, task
        )
        rows = run.gather(spell(episodes, teacher, student, task))
        if run.rank == 0:
            ordered = [rows[i % run.world_size][i // run.world_size] for i in range(len(part))]
            common.write_atomic(file, "".join(common.to_json(row) + "\n" for row in ordered))
        run.gather("written")


def read_traces(folder: Path) -> list[dict]:
    """The lines that `collect` wrote."""
    files = sorted(folder.glob("traces-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().split("\n") if line]


# --- the tiny base model of the pointer task ---


def hop_model(cfg: Config) -> LogProbLM:
    """A GPT-2 of two layers; embeddings this large are what makes it learn to copy and to look up."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = dict(vocab_size=cfg.symbols + 10, n_positions=cfg.context, n_embd=cfg.width, n_inner=2 * cfg.width)
    size |= dict(n_layer=2, n_head=max(4, cfg.width // 32), activation_function="gelu_pytorch_tanh")
    size |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    size |= dict(bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
    lm = GPT2LMHeadModel(GPT2Config(**size))
    for name, p in lm.named_parameters():
        std = 0.5 if "wte" in name or "wpe" in name else 0.06 if "lm_head" in name else 0.07
        if p.dim() == 2:
            nn.init.normal_(p, std=std)
    return LogProbLM(lm)


def worst_step(model: LogProbLM, examples: list[Example], task: Task) -> float:
    """Mean probability of the right symbol at its lowest, over all places of spelled-out explanations in both
    formats: what a base model lacks in one place, no reward can teach."""
    episodes = [Episode(e, [], [], e.trace + task.prompts.tags.explanation[1]) for e in examples]
    align(episodes, task.prompts)
    told, _ = at(score(model, [e.teacher_ids for e in episodes], task), [e.t_teacher for e in episodes])
    shown, _ = at(score(model, [e.student_ids for e in episodes], task), [e.t_student for e in episodes])
    return min(x.exp().mean(0).min().item() for x in (told, shown))


def make_base(cfg: Config, run: Run):
    """Pre-train on both formats, textbook (all written), then web (p_write); stop if it cannot hop."""
    tokenizer = common.CharTokenizer(SYMBOLS[: cfg.symbols] + "~?!()[]{}$", eos="$")
    turn = "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    task = Task(cfg, run, Prompts(tokenizer, POINTERS, POINTERS.student), "")
    model = run.shard(hop_model(cfg)).train()

    def batch_of(step: int, p_write: float) -> list[tuple[str, int]]:
        problems = make_problems(cfg.base_batch, cfg, run.generator(f"{p_write} {step}"), p_write)
        shown = [task.prompts.student(e, e.trace) for e in problems[::2]]
        told = [task.prompts.teacher(e, e.trace) for e in problems[1::2]]
        return [(text, len(problems[0].question) + 1) for text, *_ in shown + told]  # loss after the question

    def learned(step: int) -> bool:
        return step % 25 == 24 and worst_step(model, spelled, task) >= 0.95

    spelled = make_problems(64, cfg, run.generator("spelled"), 1.0)
    adam = dict(betas=(0.9, 0.98), weight_decay=0.01)
    constant = lambda step: cfg.base_lr * min(1, (step + 1) / 30)  # noqa: E731
    cosine = partial(common.learning_rate, total=cfg.web_steps, peak=cfg.base_lr, floor=0.05)
    sft(model, "textbook", cfg.base_steps, partial(batch_of, p_write=1.0), constant, task, learned, **adam)
    worst = worst_step(model, spelled, task)
    if cfg.base_check and worst < 0.9:
        raise UserError(
            f"the base model follows single hops with {worst:.2f} only: more --base_steps, another --seed"
        )
    sft(model, "web", cfg.web_steps, partial(batch_of, p_write=cfg.p_write), cosine, task, **adam)
    export(model, run.folder / "model", task)


# --- a cell of the table ---


def open_task(start: str, cfg: Config, run: Run) -> tuple[Task, list[Example]]:
    """The task of the model `start`, and the problems that fit; UserError if the two do not go together."""
    examples, system = load_examples(cfg, run)
    _, tokenizer = common.load_lm(start)
    prompts = Prompts(tokenizer, POINTERS if cfg.data == "pointers" else TEXT, system)
    for name in {cfg.student, cfg.learner} - {"self", start}:
        if common.load_lm(name)[1].get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{name} and {start} tokenize differently; d_j compares the same tokens in both")
    answers = [prompts.student(e, prompts.tags.gap) for e in examples]
    codes = prompts.encode([text for text, *_ in answers])
    questions = prompts.encode([prompts.teacher_prompt(e) for e in examples])
    fitting = []
    for e, (_, _, span, _), (ids, offsets), (told, _) in zip(
        examples, answers, codes, questions, strict=True
    ):
        fits = max(len(ids), len(told)) + cfg.max_new + 8 <= cfg.context
        if fits and len(tokens_in_span(offsets, *span)):
            fitting.append(e)
    if dropped := len(examples) - len(fitting):
        run.print(
            f"{dropped} problems dropped: beyond --context {cfg.context}, or no solution token to score"
        )
    if len(fitting) < cfg.holdout + cfg.prompts:
        raise UserError(f"{cfg.data}: {len(fitting)} problems are too few for --holdout and --prompts")
    return Task(cfg, run, prompts, start), fitting


def evaluate(name: str, examples: list[Example], task: Task) -> dict[str, float]:
    """Held-out problems: share solved and mean credit of greedy answers, share solved by sampled ones."""
    cfg, run, model = task.cfg, task.run, load(name, task)
    sampler, mine = make_sampler(name, model, task), slice(run.rank, None, run.world_size)
    credits = []
    for temperature in (0.0, cfg.eval_temperature):
        sampler.refresh(model)
        uniforms = torch.rand(len(examples), cfg.eval_new, generator=run.generator("answers"))[mine]
        answers = rollout(sampler, examples[mine], task.prompts.student_prompt, uniforms, temperature, task)
        credits.append(np.concatenate(run.gather([e.example.credit(e.text) for e in answers])))
    greedy, sampled = credits
    found = {"solved": (greedy == 1).mean(), "credit": greedy.mean(), "sampled": (sampled == 1).mean()}
    if cfg.bench:
        lm = model.lm
        if cfg.sampler == "vllm":
            vllm = common.need("lm_eval.models.vllm_causallms", "vllm")
            lm = vllm.VLLM(name, max_model_len=cfg.context, gpu_memory_utilization=0.4)
        elif run.world_size > 1:  # lm-eval decodes a whole model on each rank
            lm = common.load_lm(name)[0].to(run.device)
        decoding = dict(max_gen_toks=cfg.eval_new, do_sample=True, temperature=cfg.eval_temperature)
        options = dict(system=task.prompts.student_system, gen_kwargs=decoding)
        for name, scores in common.benchmark(lm, task.prompts.tokenizer, cfg.bench, **options).items():
            found[name] = next(v for metric, v in scores.items() if metric.startswith("exact_match,"))
    return found


def explanations(examples: list[Example], task: Task) -> tuple[list[Example], dict[str, float]]:
    """What the learner is distilled from, and the teacher's numbers in the last quarter of its RL."""
    cfg, numbers, kind = task.cfg, {}, f"part={task.cfg.part}"
    if cfg.source == "corpus":
        return [e for e in examples if e.trace][: cfg.traces], numbers

    def once(name: str, make: Callable, *args, **more) -> Path:
        return task.run.once(name, lambda child: make(*args, replace(task, run=child), **more))

    told = [task.prompts.teacher(e, e.trace) for e in examples if e.trace]
    texts = [(text, begin) for text, _, begin in told]  # the loss begins after the opened explanation
    sizes = (cfg.warmup_batch, cfg.warmup_steps, cfg.warmup_lr, 0.05)
    folder = once(f"warm {kind}", fine_tune, task.start, texts, *sizes, betas=(0.9, 0.95), weight_decay=1e-4)
    if cfg.teach:
        updates, kind = math.ceil(cfg.teach * cfg.updates), f"lam={cfg.lam} {kind}"
        folder = once(f"teacher {kind}", train_grpo, str(folder / "model"), examples, updates, True)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        late = [line for line in lines if line["step"] >= 0.75 * lines[-1]["step"]]
        numbers = {k: float(np.mean([line[k] for line in late])) for k in ("r_ss", "r_kl", "signal")}
    part = examples[: cfg.traces]
    rows = read_traces(once(f"traces {kind}", collect, str(folder / "model"), part))
    return [replace(e, trace=row["reasoning_trace"]) for e, row in zip(part, rows, strict=True)], numbers


def train(cfg: Config, run: Run) -> dict[str, float]:
    """One cell of the table: teacher, explanations, distilled student, correctness RL, as settings say."""
    start = cfg.teacher
    if start == "tiny":
        start = str(run.once(f"base part={cfg.part}", lambda child: make_base(cfg, child)) / "model")
    task, examples = open_task(start, cfg, run)
    heldout, examples = examples[-cfg.holdout :], examples[: -cfg.holdout]
    numbers = dict.fromkeys(("written", "r_ss", "r_kl", "signal"), math.nan)
    learner = start if cfg.learner == "self" else cfg.learner
    if cfg.distil:
        traces, found = explanations(examples, task)
        text = "".join(e.trace for e in traces)
        numbers |= found | {
            "written": 1 - 2 * text.count("~") / max(1, len(text))
        }  # two of four may be elided
        shown = [task.prompts.student(e, e.trace) for e in traces[: math.ceil(cfg.distil * len(traces))]]
        texts = [(text, begin) for text, _, _, begin in shown]  # the loss covers the assistant's turn
        steps = math.ceil(cfg.distil * cfg.distil_steps)
        learner = fine_tune(
            learner, texts, cfg.distil_batch, steps, cfg.distil_lr, 0.1, task, weight_decay=0.0
        )
    if cfg.solve:
        learner = train_grpo(learner, examples, math.ceil(cfg.solve * cfg.updates), False, task)
    return evaluate(learner, heldout, task) | numbers


# --- looking at explanations ---


def spell(episodes: list[Episode], teacher: nn.Module, student: nn.Module, task: Task) -> list[dict]:
    """Score explanations and spell them out: texts, tokens with what each got, parts of the reward."""
    numbers, ell, d = rlt_reward(episodes, teacher, student, task)
    decode, out = task.prompts.tokenizer.decode, []
    for i, e in enumerate(episodes):
        row = {"question": e.example.question, "solution": e.example.solution, "reasoning_trace": e.t}
        row |= {
            "t": [decode([e.student_ids[j]]) for j in e.t_student],
            "d": d[i, : len(e.t_student)].tolist(),
        }
        row |= {
            "s": [decode([e.student_ids[j]]) for j in e.s_student],
            "l": ell[i, : len(e.s_student)].tolist(),
        }
        out.append(row | {k: v[i].item() for k, v in numbers.items()})
    return out


def describe(row: dict) -> str:
    """A spelled-out explanation, token by token."""
    costs = " | ".join(
        f"{token.strip() or repr(token)} {d:+.2f}" for token, d in zip(row["t"], row["d"], strict=True)
    )
    gains = " | ".join(
        f"{token.strip() or repr(token)} {x:+.2f}" for token, x in zip(row["s"], row["l"], strict=True)
    )
    return (
        f"question {row['question']}\nexplanation {row['reasoning_trace']}\n"
        f"each token's log teacher - log student, d_j: {costs}\n"
        f"each solution token's log-prob, l_k: {gains}\n"
        f"reward {row['reward']:.3f}: r_SS {row['r_ss']:.3f}, r_KL {row['r_kl']:.3f}, closed {row['closed']}"
    )


def made(kind: str, cfg: Config, run: Run) -> Path:
    """The folder of what `run.once` made of this kind for these settings and the first seed."""
    folder = run.folder / common.slug(f"{kind} part={cfg.part}-s{cfg.seed}")
    if not folder.exists():
        raise UserError(f"there is no {folder}: train without --show and --score first")
    return folder


def rank_file(cfg: Config, run: Run):
    """--score: rank (question, solution, reasoning_trace) rows by the reward of the trained teacher."""
    start, teacher = cfg.teacher, str(made(f"teacher lam={cfg.lam}", cfg, run) / "model")
    if start == "tiny":
        start = str(made("base", cfg, run) / "model")
    rows = common.load_rows(cfg.score, ("question", "solution", "reasoning_trace"))
    task, _ = open_task(start, cfg, run)
    tags, wrap = task.prompts.tags, padded if task.prompts.tags.gap else str
    episodes = []
    for row in rows:
        text = wrap(row["reasoning_trace"]).removeprefix(tags.gap) + tags.explanation[1]
        episodes.append(Episode(Example(row["question"], wrap(row["solution"])), [], [], text))
    scored = spell(episodes, load(teacher, task), load(task.student, task), task)
    ranked = sorted(scored, key=lambda row: -row["reward"])
    target = Path(cfg.score).with_suffix(".scored.jsonl")
    common.write_atomic(target, "".join(common.to_json(row) + "\n" for row in ranked))
    run.print(
        f"{describe(ranked[0])}\nthe best of {len(rows)}; all, ranked, with every token's numbers: {target}"
    )


def draw(figure, cfg: Config, run: Run):
    """Left: r_SS and r_KL over the updates, with and without the KL term. Right: an explanation by its KL."""
    left, right = figure.subplots(1, 2)
    for lam, colour in ((3.0, "tab:blue"), (0.0, "tab:red")):
        for file in sorted(run.folder.glob(f"teacher_lam={lam}_part=1.0*/metrics.jsonl")):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            for key, style in (("r_ss", "-"), ("r_kl", "--")):
                label = f"{key}, lambda = {lam:g}" if file.parent.name.endswith(f"-s{cfg.seed}") else None
                left.plot(
                    [x["step"] for x in lines], [x[key] for x in lines], style, color=colour, label=label
                )
    left.set(xlabel="update", ylabel="nats per token", title="The teacher's reward terms, a line a seed")
    left.legend()
    row = read_traces(made("traces lam=3.0", cfg, run))[0]
    cost = np.resize(row["d"], (-(-len(row["d"]) // 4), 4))
    image = right.imshow(cost, cmap="YlOrRd", vmin=0, vmax=3, aspect="auto")
    for i, (token, d) in enumerate(zip(row["t"], row["d"], strict=True)):
        right.text(i % 4, i // 4, f"{token}\n{d:.2f}", ha="center", va="center")
    right.set(xticks=[], yticks=[], title="One explanation: start, 1, 2, 3 hops; colour: KL")
    figure.colorbar(image, ax=right, label="log teacher - log student")


# --- sizes without weights, and what is missing ---

QWEN_7B = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
QWEN_7B |= dict(num_key_value_heads=4, vocab_size=152064)


def missing(cfg: Config) -> list[str]:
    """What this config needs and does not find, a line each, with the flag that takes a local copy."""
    from huggingface_hub import dataset_info, model_info
    from transformers import AutoTokenizer

    found, problem = [], "not here and not on the hub; a local folder will do"
    for flag in ("teacher", "student", "learner"):
        name = getattr(cfg, flag)
        if name in ("self", "tiny") or Path(name).is_file():
            continue
        try:
            AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError):
            found += [f"--{flag} {name}: {problem}"] if absent(model_info, name) else []
    if "/" in cfg.data and not Path(cfg.data).exists() and absent(dataset_info, cfg.data):
        found.append(f"--data {cfg.data}: {problem}, so will a .jsonl")
    if cfg.sampler == "vllm" and importlib.util.find_spec("vllm") is None:
        found.append('vllm: pip install -e ".[vllm]", or --sampler hf (a thousand GPU hours in full)')
    return found


def absent(ask: Callable, name: str) -> bool:
    """Whether the hub does not answer, or does not have it."""
    try:
        ask(name, timeout=10)
    except Exception:  # the library raises a dozen kinds
        return True
    return False


def dry_run(cfg: Config, run: Run):
    """Print what is missing, and parameters, memory and hours of the RL on H100s, every text of full length.

    Decoding is bound by memory bandwidth: each step reads the weights and the cache of all sequences.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**QWEN_7B)
    if cfg.teacher == "tiny":
        config = hop_model(cfg).lm.config
    elif Path(cfg.teacher).is_dir():
        config = AutoConfig.from_pretrained(cfg.teacher)
    with torch.device("meta"):
        n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    a_token = 4 * config.num_hidden_layers * heads * config.hidden_size // config.num_attention_heads
    gpus, completions = (run.world_size if run.world_size > 1 else 8), cfg.prompts * cfg.group
    cache = completions / gpus * cfg.max_new * a_token  # bytes of keys and values at the end
    decode = cfg.max_new * (2 * n + cache / 2) / 3.35e12  # seconds an update
    flops = 14 * n * completions * cfg.max_new  # policy 8 N a token, reference, student and teacher 2 N each
    update = flops / gpus / (0.4 * 989e12)  # seconds at 40 % of an H100's peak
    memory = {"teacher, gradients, AdamW": 16 * n / gpus, "reference, student": 4 * n / gpus}
    memory |= {"copy that decodes": 2 * n, "its cache": cache}
    sizes = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in memory.items())
    seconds = decode + update
    run.print(f"{n:,} parameters; GB on each of {gpus} GPUs: {sizes}")
    run.print(f"{cfg.updates} updates of {completions} completions, {flops:.1e} FLOP, {seconds:.0f} s each")
    run.print(f"{cfg.updates * seconds / 3600:.1f} hours, {decode / seconds:.0%} of it decoding")
    for line in missing(cfg):
        run.print(f"missing: {line}")


def main():
    cfg = common.parse_config(CONFIGS)
    with Run(cfg, "" if cfg.teacher == "tiny" else cfg.teacher) as run:
        if cfg.dry_run:
            return dry_run(cfg, run)
        if found := missing(cfg):
            raise UserError("; ".join(found))
        if cfg.score:
            return rank_file(cfg, run)
        if not cfg.show:
            table = run.grid(ROWS, train)
            run.check(CLAIMS, table)
        if cfg.data == "pointers" and not cfg.rows and not cfg.show:
            run.figure(draw, cfg, run, size=(11, 5))
        if cfg.show or not cfg.rows or "RLT" in cfg.rows:
            run.print(describe(read_traces(made(f"traces lam={cfg.lam}", cfg, run))[0]))


if __name__ == "__main__":
    main()
