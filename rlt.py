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
  eq. (3)  r = r_SS - lambda r_KL - 1 where the closing tag is missing
  eq. (4)  GRPO: A = (r - mean) / (std + 1e-4) over the G explanations of a question; the loss is the mean
           over explanations of the mean over their tokens of -(exp(lp - sg lp) A - beta (e^rho - rho - 1)),
           lp = log pi_T, rho = log pi_ref - lp

How to run
  python rlt.py                                     the effect in miniature, with baselines, on two CPU cores
  python rlt.py --config text --teacher M --data F  a real model: hub id, folder, .gguf; F: .jsonl or gym:NAME
  python rlt.py --show                              the best explanation of the trained teacher, by tokens
  python rlt.py --score F                           the same of (question, solution, reasoning_trace) lines
  torchrun --nproc_per_node=8 rlt.py --config full  Qwen2.5-7B on Bespoke-Stratos-17k, the paper's setting

Departures from the paper and its code
- From the paper's code: d_j is the log-ratio at the sampled token, not a divergence; tau inside r_SS; the
  reference moves 0.9 of the way to the policy every 32 updates; explanations are encoded anew from text.
- The explanation is found by character offsets; a token that straddles a tag is left out, so the blank line
  that the teacher's prompt ends with is not scored. The code looks for its ids, and finds the question where
  the explanation only repeats that.
- Float32 log-softmax, no pad in any loss. The teacher's system prompt is ours, one explanation a question is
  collected, problems that may exceed --context are dropped instead of cut (of its 32,768 tokens an answer of
  `full` has 30,720), a warm-up's first step has rate 0. lm-eval's prompts and graders, where the paper used
  SkyThought's.
- Samples are an inverse CDF of numbers that all ranks draw alike, so their number changes no result; vLLM
  draws its own.
- The demo's task, pointer chasing, is ours and was selected: exploration must fail. With two chains it
  does not, and correctness RL wins: two control rows. Settings were tuned on seeds from 100 on.

Reading order: Config, ROWS, TEXT, Prompts, rlt_reward, grpo_loss, train_grpo, train.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

import common
from common import Claim, Run, UserError

SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-"


@dataclass
class Config(common.Config):
    # models and data
    teacher: str = "tiny"  # becomes the teacher: hub id, folder or .gguf; tiny: trained here on pointers
    student: str = ""  # frozen model that computes the reward (pi_S); empty: the teacher as it starts
    learner: str = ""  # model that is distilled; empty: the teacher as it starts
    data: str = "pointers"  # or a .jsonl with question, solution, reasoning_trace; Stratos, GSM8K; gym:NAME
    problems: int = 1536  # of pointers and gym: problems to make
    holdout: int = 256  # problems kept for evaluation, the last ones
    bench: tuple[str, ...] = ()  # lm-eval tasks to evaluate students on, too
    # pointers
    symbols: int = 20  # size of the array (M)
    chains: int = 6  # start symbols to follow (W)
    p_write: float = 0.3  # chance that a corpus trace writes an intermediate symbol
    width: int = 64  # of the tiny model
    base_batch: int = 16  # texts a step of its pre-training
    base_steps: int = 1500  # pre-training steps with every symbol written, at most
    web_steps: int = 250  # pre-training steps on corpus traces
    base_lr: float = 4e-3  # of pre-training
    # supervised stages
    warmup_steps: int = 40  # optimizer steps of the teacher on corpus traces, where there are any
    warmup_batch: int = 32  # texts a step
    source: Literal["teacher", "warm teacher", "corpus"] = "teacher"  # of what is distilled; warm: before RL
    traces: int = 384  # explanations to distil from
    distil_steps: int = 80  # optimizer steps
    distil: float = 1.0  # share of the two that the learner gets; 0: no distillation
    sft_lr: float = 1e-3  # peak of both; linear warm-up (5 and 10 %), then cosine
    distil_batch: int = 32  # texts a step
    # reinforcement learning
    updates: int = 40  # optimizer steps, one for each batch of completions
    solve: float = 0.0  # share of them that the learner gets of correctness RL, after distillation
    prompts: int = 8  # questions an update (P)
    group: int = 8  # completions a question (G)
    max_new: int = 32  # tokens of an explanation, at most
    temperature: float = 1.0  # of sampling and of every log-prob (tau)
    lr: float = 1e-3  # AdamW, constant
    beta: float = 0.04  # weight of the KL to the reference model
    sync_every: int = 32  # updates between two moves of the reference model, 0.9 of the way to the policy
    alpha: float = 0.01  # weight of the min in r_SS and of the max in r_KL
    lam: float = 3.0  # weight of r_KL (lambda)
    # evaluation, memory and speed
    eval_new: int = 40  # tokens of an answer, at most
    context: int = 128  # tokens of the longest text; problems that may not fit are dropped and counted
    micro_tokens: int = 8192  # padded tokens in one forward and backward pass
    sample_batch: int = 1024  # sequences decoded together on a rank
    sampler: Literal["hf", "vllm"] = "hf"  # transformers' loop, or a vLLM engine on each GPU
    recompute: bool = False  # activations in the backward pass, to save memory
    # instead of training
    show: bool = False  # rank the explanations that the trained teacher wrote, print the best by tokens
    score: str = ""  # the same for a .jsonl with question, solution, reasoning_trace

    def check(self):
        super().check()
        if self.group < 2 or not self.temperature:
            raise UserError("--group must be 2 or more (completions are compared), and --temperature not 0")
        if not self.chains <= self.symbols <= len(SYMBOLS):
            raise UserError(f"--chains <= --symbols <= {len(SYMBOLS)} is needed")
        if self.share == "run" and self.prompts % int(os.environ.get("WORLD_SIZE", self.ranks)):
            raise UserError(f"--prompts {self.prompts} must be a multiple of the ranks: groups stay whole")
        tiny = self.teacher == "tiny"
        if tiny != (self.data == "pointers") or (tiny and self.bench):
            raise UserError("--data pointers goes with --teacher tiny, other data and --bench with others")


DEMO = Config(seeds=3, ranks=2, save_every=1000)
SMOKE = Config(
    problems=40,
    holdout=8,
    symbols=6,
    chains=2,
    base_steps=20,
    web_steps=10,
    warmup_steps=3,
    updates=3,
    prompts=2,
    group=4,
    max_new=10,
    traces=8,
    distil_steps=3,
)
REAL = replace(
    SMOKE,
    share="run",
    rows=("RLT", "distilled from the corpus"),
    teacher="Qwen/Qwen2.5-0.5B-Instruct",
    data="openai/gsm8k",
    warmup_batch=4,
    sft_lr=1e-5,
    max_new=48,
    temperature=0.7,
    lr=1e-6,
    context=1024,
    micro_tokens=2048,
    log_every=1,
)
CONFIGS = {
    "smoke": SMOKE,
    "demo": DEMO,
    "gpu": replace(
        DEMO,
        ranks=8,
        seeds=8,
        symbols=32,
        width=128,
        base_batch=64,
        base_steps=4000,
        base_lr=2e-3,
        web_steps=500,
        updates=60,
        prompts=16,
        group=16,
        traces=1024,
        distil_steps=160,
        micro_tokens=65536,
    ),
    "text": REAL,
    "full": replace(
        REAL,
        teacher="Qwen/Qwen2.5-7B-Instruct",
        student="bespokelabs/Bespoke-Stratos-7B",
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
        eval_new=30720,
        context=32768,
        micro_tokens=32768,
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
    "teacher before RL": dict(source="warm teacher"),
    "RL from a few RLT traces": dict(distil=0.25, solve=0.4),
    "two chains: RLT": dict(chains=2),
    "two chains: correctness RL": dict(chains=2, distil=0.0, solve=1.0),
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
        "control, two chains: correctness RL beats distilling from RLT",
        "sampled",
        "two chains: correctness RL",
        "two chains: RLT",
    ),
]


# --- problems ---


def share_right(solution: str, text: str) -> float:
    """Share of the solution's symbols that stand at their place in an answer "...[solution]"."""
    _, there, rest = text.rpartition("[")
    answer = there and rest.partition("]")[0]
    right = sum(a == b for a, b in zip(solution, answer, strict=False))
    return right / max(len(solution), len(answer))


def right_box(solution: str, text: str) -> float:
    """1 if the last box of the answer agrees with that of the solution (or with all of it), else 0."""
    return float("box" in text and common.answers_agree(solution, text))


def gym_score(score: Callable, solution: str, text: str) -> float:
    """What a reasoning-gym task gives for the last box of the answer; there may be other solutions."""
    return score(common.last_box(text))


@dataclass(frozen=True)
class Example:
    """A question, its solution and perhaps a reasoning trace, and what judges an answer.

    Solution and trace hold the blank lines that pad them; the one before a trace belongs to its tag.
    """

    question: str
    solution: str
    trace: str = ""
    system: str = ""  # prompt of the student, where its format has none
    judge: Callable = right_box  # (solution, text) -> credit in [0, 1]; 1 is right


def make_problems(n: int, cfg: Config, generator: torch.Generator, p_write: float) -> list[Example]:
    """Pointer chasing. The question is an array f (a permutation of M symbols) and W starts, the solution the
    W symbols f(f(f(x))), the trace a chain x, f(x), f(f(x)), f(f(f(x))) for each start.

    Each intermediate symbol is written with probability p_write, else elided ("~"). One hop is one attention
    lookup; two at once are beyond two layers, so an elision is a leap that nobody at this size can follow.
    """
    f, order = (torch.rand(n, cfg.symbols, generator=generator).argsort(1) for _ in range(2))
    hops = [order[:, : cfg.chains]]
    for _ in range(3):
        hops.append(f.gather(1, hops[-1]))
    chains = torch.stack(hops, 2)  # (n, W, 4)
    elided = torch.rand(chains.shape, generator=generator) >= p_write
    elided[..., [0, 3]] = False
    columns = torch.cat([f, hops[0]], 1), hops[3], chains.masked_fill(elided, len(SYMBOLS)).flatten(1)
    return [Example(*row, judge=share_right) for row in zip(*map(letters, columns), strict=True)]


def letters(rows: Tensor):
    """Symbols by their numbers (n, L), a text a row."""
    return ["".join((SYMBOLS + "~")[i] for i in row) for row in rows.tolist()]


def load_examples(cfg: Config, run: Run) -> list:
    """Examples from what --data names; UserError for what cannot be used."""
    source = cfg.data
    if source == "pointers":
        return make_problems(cfg.problems, cfg, run.generator("problems"), cfg.p_write)
    rows = common.load_rows(
        source, subset="main" if "gsm8k" in source else None, size=cfg.problems, seed=cfg.seed
    )
    rows = [row | sections(row) for row in rows]
    common.need_text(source, rows, ["question", "solution"])
    gap, examples = "" if cfg.teacher == "tiny" else "\n\n", []
    for row in rows:
        trace = str(row.get("reasoning_trace") or "").strip()
        solution, trace = gap + row["solution"].strip() + gap, trace and trace + gap
        judge = partial(gym_score, row["score"]) if source.startswith("gym:") else right_box
        examples.append(Example(row["question"], solution, trace, row.get("system") or STRATOS_SYSTEM, judge))
    return examples


def sections(row: dict) -> dict:
    """What Stratos and GSM8K call otherwise, as question, solution and reasoning_trace."""
    if "conversations" in row:  # a question, and an answer of a thought block and a solution block
        turns = [turn.get("value") for turn in row["conversations"] or ()]
        if len(turns) != 2:
            return {}
        found = re.search(BLOCKS, str(turns[1]), re.DOTALL)
        return {"question": turns[0]} | (found.groupdict() if found else {})
    if row.get("answer") and "solution" not in row:  # GSM8K: a rationale, #### and a number; gym: a solution
        trace, _, number = str(row["answer"]).rpartition("####")
        return {"solution": rf"The answer is \boxed{{{number.strip()}}}", "reasoning_trace": trace}
    return {}


BLOCKS = (
    r"<\|begin_of_thought\|>(?P<reasoning_trace>.*?)<\|end_of_thought\|>.*?"
    r"<\|begin_of_solution\|>(?P<solution>.*?)<\|end_of_solution\|>"
)


# --- the two prompts ---


@dataclass(frozen=True)
class Prompt:
    """The pieces of an answer; for "t" and "s" explanation and solution are put in."""

    system: str  # prompt; empty: the example's
    answer: tuple
    own: str  # the piece with which the model's own part begins


# the system prompt of Bespoke-Stratos-17k and its models, misprint included: students have seen these words
STRATOS_SYSTEM = """\
Your role as an assistant involves thoroughly exploring questions through a systematic long thinking \
process before providing the final precise and accurate solutions. This requires engaging in a \
comprehensive cycle of analysis, summarizing, exploration, reassessment, reflection, backtracing, and \
iteration to develop well-considered thinking process. Please structure your response into two main \
sections: Thought and Solution. In the Thought section, detail your reasoning process using the specified \
format: <|begin_of_thought|> {thought with steps separated with '

'} <|end_of_thought|> Each step should include detailed considerations such as analisying questions, \
summarizing relevant findings, brainstorming new ideas, verifying the accuracy of the current steps, \
refining any errors, and revisiting previous steps. In the Solution section, based on various attempts, \
explorations, and reflections from the Thought section, systematically present the final solution that you \
deem correct. The solution should remain a logical, accurate, concise expression style and detail \
necessary step needed to reach the conclusion, formatted as follows: <|begin_of_solution|> {final \
formatted, precise, and clear solution} <|end_of_solution|> Now, try to solve the following question \
through the above guidelines:"""
TEACHER_SYSTEM = """\
You explain how problems are solved. Your answer has two sections. The Solution section states the \
solution between <|begin_of_solution|> and <|end_of_solution|>. The Explanation section, between \
<|begin_of_explanation|> and <|end_of_explanation|>, sets out the systematic thinking that leads from the \
question to that solution: analysis, every step worked through, checks, and reconsideration."""
TEXT = (
    Prompt(
        TEACHER_SYSTEM,
        (
            "<|begin_of_solution|>",
            "s",
            "<|end_of_solution|>\n\n<|begin_of_explanation|>\n\n",
            "t",
            "<|end_of_explanation|>",
        ),
        own="t",
    ),
    Prompt(
        "",
        (
            "<|begin_of_thought|>\n\n",
            "t",
            "<|end_of_thought|>\n\n<|begin_of_solution|>",
            "s",
            "<|end_of_solution|>",
        ),
        own="<|begin_of_thought|>\n\n",
    ),
)
POINTERS = Prompt("!", ("[", "s", "]{", "t", "}"), own="t"), Prompt("?", ("(", "t", ")[", "s", "]"), own="(")
# for a model without a chat template; its end of turn is whatever token ends its texts
CHAT = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Text:
    """What a teacher or a student reads, and where t and s stand in it."""

    ids: list[int]
    first: int  # token of the model's own part: generated, or trained on
    t: dict  # {(id, first character counted from where t begins): place} of t's tokens
    s: dict  # the same of s


@dataclass(frozen=True)
class Explanation:
    """A completion of the teacher, in both contexts."""

    example: Example  # its trace is the explanation
    closed: bool  # the closing tag was there
    teacher: Text
    student: Text

    @property
    def shared(self) -> list:
        """Tokens of t that both contexts have: all of them, unless t's ends merge with what surrounds it."""
        return [token for token in self.teacher.t if token in self.student.t]


class Prompts:
    """How q, s and t become the texts of teacher and student, and these become tokens.

    Spans come from concatenation, never from a search: the system prompts mention the tags. UserError if the
    tokenizer or its chat template cannot carry them.
    """

    def __init__(self, tokenizer, teacher: Prompt, student: Prompt):
        self.tokenizer, self.teacher, self.student = tokenizer, teacher, student
        written = "".join(teacher.answer + student.answer)
        if lost := [token for token in tokenizer.all_special_tokens if token in written]:
            raise UserError(f"special tokens of this model would vanish in decoding: {', '.join(lost)}")
        tokenizer.chat_template = tokenizer.chat_template or CHAT
        head, whole = self.chat("S", "Q") + "A", self.chat("S", "Q", "A")
        if not whole.startswith(head) or whole == head:
            raise UserError("the chat template alters the assistant's text, so spans cannot be kept")
        self.end_of_turn = whole.removeprefix(head)

    def chat(self, system: str, question: str, *answer: str) -> str:
        """System, user and assistant turn by the template; without the last, up to where it begins."""
        turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        turns += [{"role": "assistant", "content": text} for text in answer]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=not answer, tokenize=False)

    def write(self, prompt: Prompt, e: Example) -> Text:
        """The question and its answer; t is the example's trace.

        A token that straddles pieces (a tag and t, say) belongs to none of them.
        """
        text, spans, places = self.chat(prompt.system or e.system, e.question), {}, {}
        for piece in prompt.answer:
            content = {"s": e.solution, "t": e.trace}.get(piece, piece)
            spans[piece] = len(text), len(text) + len(content)
            text += content
        text += self.end_of_turn
        code = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        for piece in ("t", "s"):
            begin, end = spans[piece]
            tokens = enumerate(zip(code.ids, code.offsets, strict=True))
            places[piece] = {(x, a - begin): i for i, (x, (a, b)) in tokens if begin <= a < b <= end}
        first = sum(a < spans[prompt.own][0] for a, _ in code.offsets)
        return Text(code.ids, first, **places)

    def explain(self, e: Example, completion: str) -> Explanation:
        """Encode a completion anew, in both contexts. t ends at the first closing tag, or with the text."""
        t, closing, _ = completion.partition(self.teacher.answer[-1])
        e = replace(e, trace=t)
        return Explanation(e, bool(closing), self.write(self.teacher, e), self.write(self.student, e))


# --- models, and the batches they get ---


class LogProbLM(nn.Module):
    """A causal LM whose forward gives log-probs. Sharded whole: FSDP's root has embeddings and head."""

    def __init__(self, lm: nn.Module, tokenizer):
        super().__init__()
        self.lm, self.tokenizer = lm, tokenizer

    def forward(self, ids: Tensor, mask: Tensor, temperature: float) -> Tensor:
        """ids, mask (B, T), right-padded -> fp32 log-probs of the next tokens, (B, T - 1)."""
        return common.token_logprobs(self.lm, ids, mask, temperature)


def load(name: str | Path, run: Run, trainable=False) -> LogProbLM:
    """A model on this rank's device, or sharded: float32 if it is trained, else bfloat16 on GPUs.

    The tiny one is trained when somebody asks for it first.
    """
    if name == "tiny":
        name = run.once(f"base chains={run.cfg.chains}", make_base)
    lm, tokenizer = common.load_lm(str(name), torch.bfloat16 if run.amp and not trainable else torch.float32)
    tokenizer.chat_template = tokenizer.chat_template or CHAT
    if trainable and run.cfg.recompute:
        lm.gradient_checkpointing_enable()
    return run.shard(LogProbLM(lm, tokenizer).requires_grad_(trainable))


def full_weights(model: LogProbLM):
    """Yields (name, whole tensor) of each parameter, one by one, on all ranks together."""
    for name, p in model.lm.named_parameters():
        p = p.detach()
        yield name, p.full_tensor() if hasattr(p, "full_tensor") else p


def export(model: LogProbLM, run: Run) -> str:
    """Make the run's folder one of Hugging Face, with model and tokenizer; returns it."""
    state = {name: p.cpu() for name, p in full_weights(model)}
    if run.rank == 0:
        # transformers saves on the first of all ranks only, but another may make this cell
        model.lm.should_save_on_this_rank = lambda _: True
        model.lm.save_pretrained(run.folder, state_dict=state)
        model.tokenizer.save_pretrained(run.folder)
    run.gather("saved")
    return str(run.folder)


@dataclass
class Episode:
    """A completion as it was sampled."""

    example: Example
    ids: list[int]  # prompt and completion, the end of turn included
    first: int  # where in ids the completion begins
    text: str  # the completion, decoded

    def credit(self) -> float:
        """What the completion is worth as an answer."""
        return self.example.judge(self.example.solution, self.text)


def log_probs(model: nn.Module, items: list, temperature: float, run: Run):
    """Yields indices of items (Text or Episode), log-probs of their next tokens (B, T - 1) and loss mask.

    Micro-batches by length, of cfg.micro_tokens padded tokens at most (or a single item). Every rank gets
    equally many, since FSDP makes them meet in each forward pass: some end with a dummy, its mask empty.
    """
    model.train(torch.is_grad_enabled() and run.cfg.recompute)  # dropout is off unless that needs it
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    size = max(1, run.cfg.micro_tokens // max((len(x.ids) for x in items), default=1))
    count = max(run.gather(math.ceil(len(items) / size)))
    for start in range(0, count * size, size):
        group = order[start : start + size]
        batch = [items[i] for i in group] or [Episode(None, [0, 0], 2, "")]
        ids, valid = common.collate([x.ids for x in batch], run.device)
        first = torch.tensor([[x.first] for x in batch], device=run.device)
        mask = valid & (valid.cumsum(1) > first)
        with run.autocast():
            logp = model(ids, valid, temperature)
        yield group, logp, mask[:, 1:]


@torch.no_grad()
def score(model: nn.Module, items: list, run: Run) -> Tensor:
    """Log-probs (N, T) of all tokens of N texts at cfg.temperature; that of the first is 0."""
    out = torch.zeros(len(items), max((len(x.ids) for x in items), default=1), device=run.device)
    for group, logp, _ in log_probs(model, items, run.cfg.temperature, run):
        out[group, 1 : 1 + logp.shape[1]] = logp[: len(group)]
    return out


# --- the reward ---


def rlt_reward(ell: Tensor, d: Tensor, closed: bool, cfg: Config) -> dict:
    """Eqs. (1) to (3): the reward of an explanation and its parts, from l_k (K,) and d_j (J,)."""
    r_ss = ell.mean() + cfg.alpha * ell.min()  # eq. (1)
    r_kl = d.mean() + cfg.alpha * d.max() if len(d) else d.new_tensor(1 + cfg.alpha)  # eq. (2)
    reward = r_ss - cfg.lam * r_kl - float(not closed)  # eq. (3)
    return {"reward": reward, "r_ss": r_ss, "r_kl": r_kl, "length": len(d), "closed": closed}


def rewards(episodes: list[Episode], teacher, student, prompts, run) -> list:
    """Each explanation, its reward with parts, l (K,) and d (J,). No gradient flows.

    One pass of the student gives the solution's log-probs and its half of d.
    """
    told = [prompts.explain(e.example, e.text) for e in episodes]
    by_student = score(student, [e.student for e in told], run)  # (B, T)
    by_teacher = score(teacher, [e.teacher for e in told], run)
    rows = []
    for e, ours, theirs in zip(told, by_teacher, by_student, strict=True):
        ell = theirs[[*e.student.s.values()]]
        d = ours[[e.teacher.t[x] for x in e.shared]] - theirs[[e.student.t[x] for x in e.shared]]
        rows.append((e, rlt_reward(ell, d, e.closed, run.cfg), ell, d))
    return rows


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


def hf_sampler(model: LogProbLM, run: Run):
    """Sampling from `model` by transformers; one that is sharded is copied to each rank, whole."""
    lm, size, ends = model.lm, run.cfg.sample_batch, common.end_ids(model.lm, model.tokenizer)
    if run.world_size > 1:
        from transformers import AutoModelForCausalLM

        with run.device:
            lm = AutoModelForCausalLM.from_config(lm.config, dtype=lm.dtype)

    @torch.no_grad()
    def sample(ids, uniforms, temperature):
        """One completion of each of N lists of ids, decided by uniforms (N, T)."""
        for mine, (_, p) in zip(lm.parameters(), full_weights(model), strict=True):
            mine.copy_(p)
        lm.eval()
        out = []
        for i in range(0, len(ids), size):
            with run.autocast():
                out += common.generate(lm, ids[i : i + size], uniforms[i : i + size], ends, temperature)
        return out

    return sample


def vllm_sampler(model: LogProbLM, run: Run):
    """The same by a vLLM engine on this rank's GPU, asleep while models train; all prompts in one call.

    Its own random numbers decide, not `uniforms`.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the weights stay in this process
    vllm, ends = common.need("vllm", "vllm"), common.end_ids(model.lm, model.tokenizer)
    size = model.lm.num_parameters()
    if size not in ENGINES:
        ENGINES[size] = vllm.LLM(
            model.lm.name_or_path,
            distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            max_model_len=run.cfg.context,
            dtype="bfloat16",
            gpu_memory_utilization=0.4,
            enable_sleep_mode=True,
            seed=run.rank,
        )
    engine = ENGINES[size]

    def sample(ids, uniforms, temperature):
        engine.wake_up()
        engine.apply_model(lambda served: served.load_weights(full_weights(model)))
        engine.reset_prefix_cache()
        params = vllm.SamplingParams(  # of the whole distribution: no top_p, no penalty
            temperature=temperature, max_tokens=uniforms.shape[1], stop_token_ids=ends
        )
        outputs = engine.generate([{"prompt_token_ids": x} for x in ids], params, use_tqdm=False)
        engine.sleep(level=1)
        return [list(o.outputs[0].token_ids) for o in outputs]

    return sample


SAMPLERS = {"hf": hf_sampler, "vllm": vllm_sampler}
ENGINES = {}  # one for each size of model: it holds a GPU, and only the weights differ


def rollout(sample, explain: bool, examples, temperature, prompts, run, chance=None) -> list[Episode]:
    """This rank's share of the episodes of all examples, in order: explanations of solutions, or answers.

    A text is continued from where the model's own part begins. All ranks draw the numbers of all samples
    from `chance`.
    """
    prompt, new = (prompts.teacher, run.cfg.max_new) if explain else (prompts.student, run.cfg.eval_new)
    uniforms = torch.rand(len(examples), new, generator=chance)
    mine = torch.arange(len(examples)).tensor_split(run.world_size)[run.rank].tolist()
    texts = [prompts.write(prompt, replace(examples[i], trace="")) for i in mine]
    opened = [x.ids[: x.first] for x in texts]
    episodes = []
    for i, ids, more in zip(mine, opened, sample(opened, uniforms[mine], temperature), strict=True):
        text = prompts.tokenizer.decode(more, skip_special_tokens=True)
        episodes.append(Episode(examples[i], ids + more, len(ids), text))
    return episodes


def distinct(items: list, count: int, run: Run, step: int) -> list:
    """`count` different items for a step, on a walk through all of them in a new order every epoch.

    What is left of an epoch, fewer than `count`, is skipped.
    """
    a_epoch = len(items) // count
    order = torch.randperm(len(items), generator=run.generator(f"epoch {step // a_epoch}"))
    return [items[i] for i in order[step % a_epoch * count :][:count]]


def train_grpo(start: str | Path, examples: list[Example], updates: int, explain: bool, prompts, run) -> str:
    """`updates` steps of GRPO from the model `start`; returns the trained one's folder.

    One loop for the paper and its baseline. `explain`: the policy explains given solutions, rewarded by eq.
    (3); else it answers questions, and a right answer is 1. Groups never straddle ranks.
    """
    cfg = run.cfg
    policy, reference = (load(start, run, trainable=True) for _ in range(2))
    student = load(cfg.student or cfg.teacher, run) if explain else None
    sample = SAMPLERS[cfg.sampler](policy, run)
    optimizer = torch.optim.AdamW(
        policy.parameters(), cfg.lr, weight_decay=0.0, fused=run.device.type == "cuda"
    )
    for step in run.steps(updates, model=policy, optimizer=optimizer, reference=reference):
        batch = [e for e in distinct(examples, cfg.prompts, run, step) for _ in range(cfg.group)]
        episodes = rollout(sample, explain, batch, cfg.temperature, prompts, run)

        if explain:
            found = [parts for _, parts, *_ in rewards(episodes, policy, student, prompts, run)]
        else:
            found = [{"reward": e.credit() >= 1} for e in episodes]
        numbers = default_collate(found)  # of lists of dicts a dict of (B,)
        advantage = group_advantage(numbers["reward"].float().to(run.device), cfg.group)
        ref_logp = score(reference, episodes, run)

        total = 0.0
        for group, logp, mask in log_probs(policy, episodes, cfg.temperature, run):
            rows = group or [0]  # of a dummy, whose mask is empty
            ref = ref_logp[rows, 1 : 1 + logp.shape[1]]
            loss = grpo_loss(logp, ref, advantage[rows], mask, cfg.beta)
            loss = loss * len(rows) / len(episodes)  # the mean over all completions
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % cfg.sync_every == 0:
            common.soft_update(reference, policy, 0.9)
        run.log(step, loss=total, **{k: v.float().mean() for k, v in numbers.items()})
    return export(policy, run)


# --- the supervised stages ---


def sft(model, stage: str, steps: int, batch_of, lr, run, warmup=0.0, floor=0.0, stop=None, **adam):
    """Train in place on batch_of(step), the texts of all ranks; the loss is the mean over supervised tokens.

    The rate rises to lr in a share `warmup` of the steps, then a cosine takes it down to `floor` of that.
    stop(step) may end the stage early; then True is returned.
    """
    from transformers import get_cosine_with_min_lr_schedule_with_warmup as cosine

    optimizer = torch.optim.AdamW(model.parameters(), lr, **adam, fused=run.device.type == "cuda")
    schedule = cosine(optimizer, round(warmup * steps), steps, min_lr_rate=floor)
    for step in run.steps(steps, stage, model=model, optimizer=optimizer, schedule=schedule):
        batch = batch_of(step)[run.rank :: run.world_size]
        supervised = run.mean(sum(len(x.ids) - x.first for x in batch))  # of a rank: gradients are averaged
        total = 0.0
        for _, logp, mask in log_probs(model, batch, 1.0, run):
            loss = -(logp * mask).sum() / supervised
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(step, loss=total)
        if stop and stop(step):
            return True


def fine_tune(name: str, texts: list, batch: int, steps: int, run: Run, **recipe) -> str:
    """SFT of a model on texts, in a new order every epoch; returns its folder. recipe: more for sft."""
    model = load(name, run, trainable=True)
    if texts:
        batch_of = partial(distinct, texts, min(batch, len(texts)), run)
        sft(model, "sft", steps, batch_of, run.cfg.sft_lr, run, **recipe)
    return export(model, run)


def collect(name: Path, examples: list[Example], prompts, run):
    """One raw explanation of each example, with its reward and the numbers of each token: traces.jsonl."""
    teacher, chance = load(name, run), run.generator("collect 0")
    sample = SAMPLERS[run.cfg.sampler](teacher, run)
    episodes = rollout(sample, True, examples, run.cfg.temperature, prompts, run, chance)
    write_explanations(run.folder / "traces.jsonl", episodes, teacher, prompts, run)


def write_explanations(file: Path, episodes: list[Episode], teacher, prompts, run):
    """A line for each, of all ranks, the best first: texts, reward with parts, tokens with d_j (of t) or l_k
    (of s).
    """
    student, rows = load(run.cfg.student or run.cfg.teacher, run), []
    for e, parts, ell, d in rewards(episodes, teacher, student, prompts, run):
        told = e.example
        row = {"question": told.question, "solution": told.solution, "reasoning_trace": told.trace} | parts
        for key, tokens, values in (("l", e.student.s, ell), ("d", e.shared, d)):
            words = prompts.tokenizer.batch_decode([[x] for x, _ in tokens])
            row[key] = list(zip(words, values.tolist(), strict=True))
        rows.append(row)
    # rewards may be on several GPUs
    everyone = sorted(itertools.chain(*run.gather(rows)), key=lambda row: -float(row["reward"]))
    if run.rank == 0:
        common.write_atomic(file, "".join(common.to_json(row) + "\n" for row in everyone))
    return everyone


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n") if line]


# --- the tiny base model of the pointer task ---


POINTER_CHAT = """\
{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"""


def hop_model(cfg: Config) -> LogProbLM:
    """A GPT-2 of two layers; embeddings this large are what makes it learn to copy and to look up."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = common.CharTokenizer(SYMBOLS[: cfg.symbols] + "~?!()[]{}$", eos="$")
    tokenizer.chat_template = POINTER_CHAT
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=cfg.context,
        n_embd=cfg.width,
        n_inner=2 * cfg.width,
        n_layer=2,
        n_head=4,
        activation_function="gelu_pytorch_tanh",
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    lm = GPT2LMHeadModel(config)
    for name, p in lm.named_parameters():
        std = 0.5 if "wte" in name or "wpe" in name else 0.06 if "lm_head" in name else 0.07
        if p.dim() == 2:
            nn.init.normal_(p, std=std)
    return LogProbLM(lm, tokenizer)


def make_base(run: Run):
    """Pre-train on both formats: textbook (all written) until it can hop, then web (p_write)."""
    cfg = run.cfg
    model = run.shard(hop_model(cfg))
    prompts = Prompts(model.tokenizer, *POINTERS)
    spelled = make_problems(64, cfg, run.generator("spelled"), 1.0)

    def batch_of(p_write: float, step: int):
        problems = make_problems(cfg.base_batch, cfg, run.generator(f"{p_write} {step}"), p_write)
        texts = [prompts.write(prompts.student, e) for e in problems[::2]]
        texts += [prompts.write(prompts.teacher, e) for e in problems[1::2]]
        return [replace(x, first=texts[0].first) for x in texts]  # loss after the question

    def learned(step: int):
        """Is the right symbol likely even at the worst place of spelled-out explanations, in both texts?

        What a base model lacks in one place, no reward can teach.
        """
        if step % 25 < 24:
            return False
        lowest = []
        for prompt in (prompts.teacher, prompts.student):
            texts = [prompts.write(prompt, e) for e in spelled]
            places = [*texts[0].t.values()]  # the same in all of them
            lowest.append(score(model, texts, run)[:, places].exp().mean(0).min())
        return min(lowest) >= 0.95

    lr, steps, adam = cfg.base_lr, cfg.base_steps, dict(betas=(0.9, 0.98), weight_decay=0.01)
    textbook = partial(batch_of, 1.0)
    if not sft(model, "textbook", steps, textbook, lr, run, 30 / steps, floor=1.0, stop=learned, **adam):
        run.print(f"{run.folder.name}: the model does not hop yet; it needs more --base_steps")
    sft(model, "web", cfg.web_steps, partial(batch_of, cfg.p_write), lr, run, floor=0.05, **adam)
    export(model, run)


# --- a cell of the table ---

EVAL_TEMPERATURE = 0.7  # of sampled answers


def open_task(cfg: Config, run: Run):
    """The prompts, the held-out problems and the others (with --score: all), where they fit.

    UserError if models and data do not go together or are too few; no weights are needed.
    """
    from transformers import AutoTokenizer

    tiny, examples, fitting = cfg.teacher == "tiny", load_examples(cfg, run), []
    names = [name for name in (cfg.teacher, cfg.student, cfg.learner) if name]
    tokenizers = [hop_model(cfg).tokenizer if x == "tiny" else pretrained(AutoTokenizer, x) for x in names]
    known = tokenizers[0].get_vocab()
    if any(x.get_vocab() != known for x in tokenizers):
        raise UserError(f"{', '.join(names)} tokenize differently; d_j compares the same tokens in both")
    prompts = Prompts(tokenizers[0], *(POINTERS if tiny else TEXT))
    for e in examples:
        if tiny and {*e.question + e.solution + e.trace} - known.keys():
            raise UserError(f"{cfg.data}: {e.question[:60]!r} has characters unknown to the tiny teacher")
        told, shown = (prompts.write(x, e) for x in (prompts.teacher, prompts.student))
        longest = max(len(told.ids), len(shown.ids)) + max(0, cfg.max_new - len(shown.t))
        if max(longest, shown.first + cfg.eval_new) <= cfg.context and shown.s:
            fitting.append(e)
    if dropped := len(examples) - len(fitting):
        run.print(f"{dropped} problems dropped: beyond --context {cfg.context}, or no solution to score")
    heldout, examples = fitting[-cfg.holdout :], fitting[: -cfg.holdout]
    if cfg.score:
        examples = fitting
    elif len(examples) < cfg.prompts:
        raise UserError(f"{cfg.data}: {len(examples)} problems are too few for --holdout and --prompts")
    if (cfg.score or cfg.source == "corpus") and not any(e.trace for e in examples):
        raise UserError(f"{cfg.data}: no problem has a reasoning_trace to rank or to distil")
    return prompts, heldout, examples


def evaluate(name: str, examples: list[Example], prompts, run):
    """Held-out problems: share solved and mean credit of greedy answers, share solved by sampled ones."""
    sample, credits = SAMPLERS[run.cfg.sampler](load(name, run), run), []
    for temperature in (0.0, EVAL_TEMPERATURE):
        chance = run.generator("answers")
        episodes = rollout(sample, False, examples, temperature, prompts, run, chance)
        credits.append(np.concatenate(run.gather([e.credit() for e in episodes])))
    greedy, sampled = credits
    found = {"solved": (greedy == 1).mean(), "credit": greedy.mean(), "sampled": (sampled == 1).mean()}
    return found | (benchmarks(name, examples[0].system, prompts, run) if run.cfg.bench else {})


def benchmarks(name: str, system: str, prompts, run):
    """Exact match in lm-eval's tasks, with the student's system prompt; each rank decodes a whole model."""
    cfg = run.cfg
    if cfg.sampler == "vllm":
        vllm = common.need("lm_eval.models.vllm_causallms", "vllm")
        lm = vllm.VLLM(name, max_model_len=cfg.context, gpu_memory_utilization=0.4)
    else:
        lm = common.load_lm(name)[0].to(run.device)
    found, gen = {}, dict(max_gen_toks=cfg.eval_new, do_sample=True, temperature=EVAL_TEMPERATURE)
    scores = common.benchmark(
        lm, prompts.tokenizer, cfg.bench, run, system_instruction=system, gen_kwargs=gen
    )
    for task, numbers in scores.items():
        found |= {f"{task} {key}": value for key, value in numbers.items() if "exact_match," in key}
    return found


def explanations(examples: list[Example], prompts, run):
    """What the learner is distilled from: the corpus's traces, or a teacher's with their mean r_SS and r_KL.

    A teacher is warmed up on the corpus, then (unless the source is "warm teacher") trained by RL.
    """
    cfg, kind = run.cfg, f"chains={run.cfg.chains}"
    traced = [e for e in examples if e.trace]
    if cfg.source == "corpus":
        return traced[: cfg.traces], {}
    texts = [prompts.write(prompts.teacher, e) for e in traced]
    warm_up = partial(
        fine_tune,
        cfg.teacher,
        texts,
        cfg.warmup_batch,
        cfg.warmup_steps,
        warmup=0.05,
        betas=(0.9, 0.95),
        weight_decay=1e-4,
    )
    teacher = run.once(f"warm {kind}", warm_up)
    if cfg.source == "teacher":
        kind = f"lam={cfg.lam} {kind}"
        teacher = run.once(
            f"teacher {kind}", partial(train_grpo, teacher, examples, cfg.updates, True, prompts)
        )
    examples = examples[: cfg.traces]
    rows = read_lines(
        run.once(f"traces {kind}", partial(collect, teacher, examples, prompts)) / "traces.jsonl"
    )
    traces = {(row["question"], row["solution"]): row["reasoning_trace"] for row in rows}
    numbers = {key: np.mean([row[key] for row in rows]) for key in ("r_ss", "r_kl")}
    return [replace(e, trace=traces[e.question, e.solution]) for e in examples], numbers


def train(cfg: Config, run: Run) -> dict[str, float]:
    """One cell of the table: teacher, explanations, distilled student, correctness RL, as settings say."""
    prompts, heldout, examples = open_task(cfg, run)
    numbers, learner = {}, cfg.learner or cfg.teacher
    if cfg.distil:
        traces, numbers = explanations(examples, prompts, run)
        texts = [prompts.write(prompts.student, e) for e in traces[: math.ceil(cfg.distil * len(traces))]]
        steps = math.ceil(cfg.distil * cfg.distil_steps)
        learner = fine_tune(learner, texts, cfg.distil_batch, steps, run, warmup=0.1, weight_decay=0.0)
    if cfg.solve:
        learner = train_grpo(learner, examples, math.ceil(cfg.solve * cfg.updates), False, prompts, run)
    return evaluate(learner, heldout, prompts, run) | numbers


# --- looking at explanations ---


def rank(cfg: Config, run: Run):
    """Rank (question, solution, reasoning_trace) rows by the trained teacher's reward, a closing tag granted:
    --score; or --show those that it wrote. The best is printed token by token.
    """
    kind = f"lam={cfg.lam}_chains={cfg.chains}-s{cfg.seed}"
    teacher, wrote = run.root / f"teacher_{kind}", run.root / f"traces_{kind}/traces.jsonl"
    if not wrote.exists():
        raise UserError(f"there is no {wrote}: train without --show and --score first")
    rows, cfg.data = read_lines(wrote), cfg.score
    if cfg.score:
        prompts, _, examples = open_task(cfg, run)
        episodes = [Episode(e, [], 0, e.trace + prompts.teacher.answer[-1]) for e in examples if e.trace]
        wrote, episodes = Path(cfg.score).with_suffix(".scored.jsonl"), episodes[run.rank :: run.world_size]
        rows = write_explanations(wrote, episodes, load(teacher, run), prompts, run)
    for key, value in rows[0].items():
        run.print(f"{key}: {value}")
    run.print(f"the best of {wrote}; d: log teacher - log student, l: log-prob of s")


def draw(figure, table: dict):
    """Share solved in each row, a dot a seed."""
    axes = figure.subplots()
    for row, cells in table.items():
        axes.plot([cell["solved"] for cell in cells], [row] * len(cells), "o")
    axes.set(xlabel="held-out problems solved, a dot a seed")
    axes.invert_yaxis()


# --- sizes without weights, and what is missing ---


def pretrained(kind, name: str):
    """A transformers config or tokenizer, as `kind` says; no weights."""
    path = Path(name)
    if path.suffix == ".gguf":
        return kind.from_pretrained(path.parent, gguf_file=path.name)
    return kind.from_pretrained(name)


def missing(cfg: Config, run: Run) -> list[str]:
    """What this config needs and does not find or cannot use, a line each, with the flag that mends it."""
    from transformers import AutoConfig

    found = []

    def check(flag, look, *args):
        try:
            look(*args)
        except (UserError, OSError, ValueError) as e:
            found.append(f"{flag}: {str(e).splitlines()[0]}")

    for flag in ("teacher", "student", "learner"):
        name = getattr(cfg, flag)
        if name != getattr(Config, flag):
            check(f"--{flag} {name}", pretrained, AutoConfig, name)
    for row in cfg.rows or ROWS:
        look = load_examples if found else open_task
        check("--data and models", look, replace(cfg, **ROWS.get(row, {})), run)
    if cfg.bench:
        check("--bench", common.need, "lm_eval", "lm")
    if cfg.sampler == "vllm":
        check("--sampler vllm", common.need, "vllm", "vllm")
    return list(dict.fromkeys(found))


def dry_run(cfg: Config, lacking: list[str], run: Run):
    """Print parameters, memory and hours of the RL on H100s, every text of full length.

    Decoding is bound by memory bandwidth: each step reads the weights and the cache of all sequences. A
    teacher that is not here counts as Qwen2.5-7B.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

    try:
        config = hop_model(cfg).lm.config if cfg.teacher == "tiny" else pretrained(AutoConfig, cfg.teacher)
    except (OSError, ValueError):
        config = Qwen2Config(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        )
    with torch.device("meta"):
        n = AutoModelForCausalLM.from_config(config).num_parameters()
    heads = config.num_attention_heads
    width = config.hidden_size * getattr(config, "num_key_value_heads", heads) / heads  # of keys, of values
    gpus, completions = max(8, run.world_size), cfg.prompts * cfg.group
    tokens = completions * cfg.max_new / gpus  # of an update, on one GPU
    cache = tokens * 4 * config.num_hidden_layers * width  # bytes, at the end
    decode = cfg.max_new * (2 * n + cache / 2) / 3.35e12  # seconds an update
    learn = 14 * n * tokens / (0.4 * 989e12)  # 8 n FLOPs a token, the other models 6 n; 40 % of the peak
    memory = (22 * n / gpus + 2 * n) / 1e9  # AdamW 16 bytes, reference 4, student 2; what decodes
    hours = cfg.updates * (decode + learn) / 3600
    run.print(
        f"{n:,} parameters; {memory:.0f} GB on each of {gpus} GPUs, {cache / 1e9:.0f} of cache in one wave\n"
        f"{cfg.updates} updates of {completions} completions: {hours:.1f} hours, "
        f"{decode / (decode + learn):.0%} decoding"
    )
    for line in lacking:
        run.print(f"missing: {line}")


def main():
    cfg = common.parse_config(CONFIGS)
    looking = cfg.show or cfg.score
    if looking:
        cfg.ranks = 1
    with Run(cfg, cfg.teacher) as run:
        if looking:
            return rank(cfg, run)
        lacking = missing(cfg, run)
        if cfg.dry_run:
            return dry_run(cfg, lacking, run)
        if lacking:
            raise UserError("; ".join(lacking))
        table = run.grid(ROWS, train)
        run.check(CLAIMS, table)
        run.figure(draw, table)


if __name__ == "__main__":
    main()
