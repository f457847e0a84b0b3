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
  python rlt.py --easy                              only the control: correctness RL needs no teacher there
  python rlt.py --teacher M --student M --data F    real models, M: hub id, folder or .gguf; F: .jsonl
  python rlt.py --show                              the newest teacher explains, with the cost of each token
  python rlt.py --score F                           rank (question, solution, reasoning_trace) lines
  torchrun --nproc_per_node=8 rlt.py --config full  Qwen2.5-7B on Bespoke-Stratos-17k, the paper's setting
Rungs: smoke, demo, gpu (ranks share a grid of runs); text, small, full (ranks share one run, --shard: FSDP2).

Where this file departs from the paper and its code
- The paper writes a KL divergence; like its code we take the log-ratio at the sampled token (--exact_kl sums
  over the vocabulary). From the code, too: tau inside r_SS; the reference model moves 0.9 of the way to the
  policy every 32 updates; -1 for a missing closing tag; an empty explanation counts 1 for mean and for max.
- The explanation is found by character offsets; a token that straddles a tag is left out. The code looks for
  its ids, so it finds the question if the explanation only repeats that. Where a text does not encode back to
  the sampled ids, `full` scores the re-encoded text as the code does, --no_retokenize the sampled ids.
- Logits and log-softmax in float32, no pad token in any loss, rewards in batches (the code: bfloat16, pads,
  one by one).
- The teacher's system prompt is ours, of the same structure. A small normaliser compares MATH answers.
- Sampling is an inverse CDF of uniform numbers that all ranks draw alike: their number changes no result.
- A sharded checkpoint is one file, gathered on rank 0. Running out of GPU memory, or a reward that is not
  finite, stops the run. The teacher's half of d always has a forward pass of its own.
- One explanation a question is collected (the paper picks among several for its 32B students). Countdown
  problems are generated here. --exact_kl needs whole models, evaluation runs one --bench at a time, at avg@1
  unless --eval_samples says otherwise (16 or more for AIME), and its answers are sampled in-script.
- The demo's task, pointer chasing, is ours and was selected: exploration must fail. With half the chains it
  does not, and correctness RL wins (--easy); at --p_write 0.45 it failed in two seeds of three. Only the
  paper's claim for the first regime is tested.

Reading order: Config, the built-in task, Format (the two prompts), rlt_reward, grpo_loss, train_grpo, main.
"""

from __future__ import annotations

import ast
import copy
import functools
import json
import math
import operator
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

import common
from common import Run, UserError

STAGES = ("warmup", "baselines", "rl", "collect", "distil", "eval")
SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-"


@dataclass
class Config(common.Config):
    # models and data; without a teacher, the built-in task
    teacher: str | None = None  # model that becomes the teacher: hub id, folder or .gguf
    student: str = "self"  # frozen model that computes the reward (pi_S); self: the teacher as it starts
    learner: str = "self"  # model that is distilled; self: the teacher as it starts
    data: str = ""  # .jsonl with question, solution and maybe reasoning_trace; Stratos or GSM8K; or countdown
    bench: str = ""  # math500, aime24, gpqa, countdown or a .jsonl to evaluate on; empty: held-out rows
    holdout: int = 0  # rows of data kept for evaluation
    stages: tuple[str, ...] = (STAGES[0], *STAGES[2:])  # real models: parts to run; baselines, too
    # built-in task
    easy: bool = False  # only the control with half the chains
    symbols: int = 20  # size of the array (M)
    chains: int = 8  # start symbols to follow (W)
    p_write: float = 0.4  # chance that a corpus trace writes an intermediate symbol
    width: int = 64  # of the base model
    heads: int = 4  # of the base model
    textbook_steps: int = 500  # pre-training steps with every symbol written, at most
    web_steps: int = 250  # pre-training steps on corpus traces
    base_lr: float = 4e-3  # of pre-training
    base_check: bool = True  # stop when the base model cannot follow single hops
    seeds: int = 3  # seeds of RL and distillation for each row of the table, on one base model
    # warm-up: SFT of the teacher in its own format
    warmup: bool = True  # do it
    warmup_steps: int = 40  # optimizer steps
    warmup_batch: int = 64  # texts a step
    warmup_lr: float = 2e-3  # peak; 5 % linear warm-up, then cosine
    # reinforcement learning
    updates: int = 40  # optimizer steps, one for each batch of completions
    prompts: int = 8  # questions an update (P)
    group: int = 16  # completions a question (G)
    max_new: int = 64  # tokens a completion, at most
    temperature: float = 1.0  # of sampling and of every log-prob (tau)
    lr: float = 1e-3  # AdamW, constant
    beta: float = 0.04  # weight of the KL to the reference model
    sync_every: int = 32  # updates between two moves of the reference model
    sync_mix: float = 0.9  # how far it moves towards the policy
    alpha: float = 0.01  # weight of the min in r_SS and of the max in r_KL
    lam: float = 3.0  # weight of r_KL (lambda)
    penalty: float = -1.0  # reward for a missing closing tag
    exact_kl: bool = False  # d_j summed over the vocabulary as the paper writes it, not at the sampled token
    retokenize: bool = False  # score re-encoded texts, not the sampled ids, where the two differ
    # distillation
    sft_tokens: int = 16384  # longer texts are cut in warm-up and distillation, and counted
    sft_save_every: int = 1000  # steps between two checkpoints of these stages
    traces: int = 512  # explanations to collect and distil from
    distil_steps: int = 80  # optimizer steps
    distil_batch: int = 64  # texts a step
    distil_lr: float = 1e-3  # peak; 10 % linear warm-up, then cosine
    cold_traces: int = 64  # built-in task: explanations for the cold start of correctness RL
    cold_steps: int = 30  # built-in task: distillation steps of the cold start
    cold_updates: int = 16  # built-in task: updates of correctness RL after it
    # evaluation
    eval_problems: int = 512  # problems, at most
    eval_samples: int = 1  # answers a problem (avg@k)
    eval_temperature: float = 0.7  # of an answer; the built-in task is also measured at 0 and 1
    eval_top_p: float = 1.0  # nucleus of an answer
    eval_new: int = 64  # tokens an answer, at most
    # memory and speed
    context: int = 128  # tokens of the longest text; problems that may not fit are dropped and counted
    micro_tokens: int = 4096  # padded tokens in one forward and backward pass
    sample_batch: int = 1024  # sequences decoded together on a rank
    sampler: Literal["hf", "vllm"] = "hf"  # in-script decoding, or a vLLM engine on each GPU
    shard: bool = False  # FSDP2 over the ranks for teacher, reference, student and learner
    offload: bool = False  # with shard: keep the frozen models in CPU memory
    # looking instead of training
    show: bool = False  # print one scored explanation of the newest teacher and exit
    score: str = ""  # .jsonl to rank by the reward with the newest teacher, then exit

    may_change: ClassVar[set[str]] = {
        *("stages", "bench", "eval_problems", "eval_samples", "eval_new", "micro_tokens", "sample_batch"),
        *("sampler", "shard", "offload", "show", "score"),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.teacher is None and (self.data or self.bench or {self.student, self.learner} != {"self"}):
            raise ValueError("--data, --bench, --student and --learner need a --teacher")
        longest = max(self.max_new, self.eval_new, 4 * self.chains)
        if self.teacher is None and self.symbols + 2 * self.chains + longest + 8 > self.context:
            raise ValueError(f"--context {self.context} is too short for --symbols, --chains and --max_new")
        if self.group < 2:
            raise ValueError("--group must be 2 or more: the advantage compares completions of one question")
        if not self.chains <= self.symbols <= len(SYMBOLS):
            raise ValueError(f"--chains <= --symbols <= {len(SYMBOLS)} is needed")
        if unknown := set(self.stages) - set(STAGES):
            raise ValueError(f"--stages: {', '.join(sorted(unknown))} is none of {', '.join(STAGES)}")


# fmt: off
DEMO = Config(workers=2, log_every=4, save_every=1000)
SMALL = Config(teacher="HuggingFaceTB/SmolLM2-135M-Instruct", data="openai/gsm8k", holdout=256, updates=100,
    max_new=512, temperature=0.7, lr=1e-6, retokenize=True, warmup_steps=200, warmup_batch=16, warmup_lr=1e-5,
    traces=2000, distil_steps=200, distil_batch=32, distil_lr=1e-5, eval_problems=256, eval_new=512,
    context=2048, micro_tokens=16384, sample_batch=128, log_every=1, save_every=20)
CONFIGS = {
    "smoke": replace(DEMO, workers=1, symbols=6, chains=2, seeds=2, width=32, textbook_steps=20, web_steps=10,
        base_check=False, warmup_steps=3, warmup_batch=8, updates=3, prompts=2, group=4, traces=8,
        distil_steps=3, distil_batch=8, cold_traces=4, cold_steps=2, cold_updates=2, eval_problems=8,
        log_every=1),
    "demo": DEMO,
    "gpu": replace(DEMO, workers=1, symbols=64, chains=16, width=256, heads=8, textbook_steps=3000,
        web_steps=1000, base_lr=1e-3, warmup_lr=1e-3, updates=125, prompts=16, group=64, max_new=112, lr=3e-4,
        traces=2048, distil_steps=300, distil_lr=5e-4, eval_new=112, context=256, micro_tokens=262144),
    "text": replace(SMALL, stages=("warmup", "rl"), holdout=8, warmup_steps=4, warmup_batch=4, updates=4,
        prompts=2, group=4, max_new=64, traces=16, distil_steps=4, distil_batch=4, eval_problems=8,
        eval_new=96, context=1024, micro_tokens=2048),
    "small": SMALL,
    "full": replace(SMALL, teacher="Qwen/Qwen2.5-7B-Instruct", student="bespokelabs/Bespoke-Stratos-7B",
        learner="Qwen/Qwen2.5-7B-Instruct", data="bespokelabs/Bespoke-Stratos-17k", bench="math500",
        holdout=0, warmup_steps=10440, updates=125, prompts=16, group=64, max_new=16384, traces=17000,
        distil_steps=522, distil_batch=96, eval_problems=500, eval_top_p=0.95, eval_new=32768, context=32768,
        sample_batch=16, micro_tokens=32768, shard=True, save_every=25),
}
# fmt: on


@dataclass(frozen=True)
class Example:
    """A question, its solution and perhaps a reasoning trace; s and t hold the blank lines that pad them."""

    q: str
    s: str
    t: str | None = None


@dataclass(frozen=True)
class Task:
    """What the stages work with: settings, process, tokenizer, the two prompts and a judge of answers."""

    cfg: Config
    run: Run
    tok: object
    fmt: Format
    correct: Callable[[Example, str], bool]

    @property
    def eos(self) -> int:
        """The id that ends a turn."""
        return self.tok.encode(self.fmt.end_of_turn, add_special_tokens=False)[0]

    def encode(self, texts: list[str]) -> list[tuple[list[int], np.ndarray]]:
        """Ids and character offsets (T, 2) of each text."""
        out = self.tok(texts, return_offsets_mapping=True, add_special_tokens=False)
        offsets = [np.array(o).reshape(-1, 2) for o in out["offset_mapping"]]
        return list(zip(out["input_ids"], offsets, strict=True))

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        return self.tok(texts, add_special_tokens=False)["input_ids"]


# --- the built-in task, pointer chasing ---
# q is an array f (a permutation of M symbols) and W starts, s the W symbols f(f(f(x))), t for each start a
# chain x, f(x), f(f(x)), f(f(f(x))) whose intermediate symbols may be elided ("~"). One hop is one attention
# lookup; two at once are beyond two layers, so an elision is a leap that nobody at this size can follow.


def make_problems(n: int, cfg: Config, generator: torch.Generator, p_write: float) -> list[Example]:
    """n problems, each with a corpus trace that writes an intermediate symbol with probability p_write."""
    f = torch.rand(n, cfg.symbols, generator=generator).argsort(1)
    x = [torch.rand(n, cfg.symbols, generator=generator).argsort(1)[:, : cfg.chains]]
    for _ in range(3):
        x.append(f.gather(1, x[-1]))
    elided = torch.rand(n, cfg.chains, 4, generator=generator) >= p_write
    elided[..., [0, 3]] = False
    trace = torch.stack(x, 2).masked_fill(elided, cfg.symbols).flatten(1)  # (n, 4 W)
    alphabet = np.array([*SYMBOLS[: cfg.symbols], "~"])
    spelled = (["".join(row) for row in alphabet[c.numpy()]] for c in (torch.cat([f, x[0]], 1), x[3], trace))
    return [Example(*row) for row in zip(*spelled, strict=True)]


def hop_model(cfg: Config) -> LogProbLM:
    """A GPT-2 of two layers; embeddings this large are what makes it learn to copy and to look up."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = dict(vocab_size=cfg.symbols + 10, n_positions=cfg.context, n_embd=cfg.width, n_inner=2 * cfg.width)
    size |= dict(n_layer=2, n_head=cfg.heads, activation_function="gelu_pytorch_tanh")
    size |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    size |= dict(bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
    lm = GPT2LMHeadModel(GPT2Config(**size))
    for name, p in lm.named_parameters():
        std = 0.5 if "wte" in name or "wpe" in name else 0.06 if "lm_head" in name else 0.07
        if p.dim() == 2:
            nn.init.normal_(p, std=std)
    return LogProbLM(lm).eval()


@torch.no_grad()
def hop_accuracy(model: LogProbLM, examples: list[Example], task: Task) -> dict[str, float]:
    """Teacher-forced accuracy in the student's format: starts, single hops, last symbols after an elision."""
    ids = torch.tensor(task.ids([task.fmt.student(e, e.t)[0] for e in examples]), device=task.run.device)
    first, length = len(task.fmt.student_prompt(examples[0])) + 1, len(examples[0].t)
    logits = model.lm(ids).logits[:, first - 1 : first - 1 + length]
    elision = task.tok.index["~"]
    logits[..., elision] = -torch.inf  # which symbol, if it must be one
    truth = ids[:, first : first + length].unflatten(1, (-1, 4))  # (n, W, 4)
    right, written = (logits.argmax(-1).unflatten(1, (-1, 4)) == truth).float(), truth != elision
    found = {f"hop {k}": right[..., k][written[..., k] & written[..., k - 1]] for k in (1, 2, 3)}
    found |= {"starts": right[..., 0], "leap": right[..., 3][~written[..., 2]]}
    return {k: v.mean().item() for k, v in found.items()}


# --- problems as text ---


def pad(text: str) -> str:
    """Text between blank lines, as it stands inside the tags of Bespoke-Stratos."""
    return f"\n\n{text.strip()}\n\n"


def load_examples(data: str, seed: int) -> tuple[list[Example], str]:
    """Examples and the student's system prompt from a .jsonl, a Stratos or GSM8K table, or `countdown`."""
    if not data:
        raise UserError("--data is needed with --teacher: a .jsonl with question and solution in every line")
    if data == "countdown":
        return countdown(2048, seed), STUDENT_SYSTEM
    if data.endswith(".jsonl"):
        rows = common.read_jsonl(data, ("question", "solution"))
        parts = [(r["question"], r["solution"], r.get("reasoning_trace")) for r in rows]
        return [Example(q, pad(s), pad(str(t)) if t else None) for q, s, t in parts], STUDENT_SYSTEM
    rows = common.load_hub(data, subset="main" if "gsm8k" in data else None)
    if {"question", "answer"} <= set(rows.column_names):  # GSM8K: rationale #### number
        parts = [(r["question"], *r["answer"].rpartition("####")[::2]) for r in rows]
        made = [Example(q, pad(rf"The answer is \boxed{{{s.strip()}}}"), pad(t)) for q, t, s in parts]
        return made, STUDENT_SYSTEM
    if not {"system", "conversations"} <= set(rows.column_names):
        raise UserError(f"{data}: neither system and conversations (Stratos) nor question and answer (GSM8K)")
    if len(set(rows["system"])) != 1:
        raise UserError(f"{data}: the column system varies, so there is no one student prompt")
    (a, b), (c, d) = ([re.escape(tag) for tag in pair] for pair in (Format.thought, Format.solution))
    block, examples = re.compile(rf"{a}(.*){b}\s*{c}(.*){d}", re.S), []
    for i, turns in enumerate(rows["conversations"]):
        if (found := block.search(turns[1]["value"])) is None:
            raise UserError(f"{data}, row {i + 1}: field conversations has no thought and solution block")
        examples.append(Example(turns[0]["value"], found[2], found[1]))
    return examples, rows[0]["system"]


def countdown(n: int, seed: int) -> list[Example]:
    """n Countdown problems of 3 or 4 numbers (the zero-shot transfer), solved by exhaustive search."""
    rng, examples = np.random.default_rng(seed), []
    while len(examples) < n:
        numbers = [int(x) for x in rng.integers(1, 100, rng.integers(3, 5))]
        reachable = [(v, e) for v, e in countdown_values(numbers) if v.denominator == 1 and 10 <= v < 100]
        if reachable:
            target, expression = reachable[rng.integers(len(reachable))]
            q = f"Use each of the numbers {numbers} once, with + - * /, to make {target}. Box the expression."
            examples.append(Example(q, pad(rf"\boxed{{{expression}}}")))
    return examples


def countdown_values(numbers: list[int]) -> list[tuple[Fraction, str]]:
    """Every value that uses all numbers once, with one expression for it."""
    todo, values = [[(Fraction(x), str(x)) for x in numbers]], {}
    while todo:
        terms = todo.pop()
        if len(terms) == 1:
            values.setdefault(*terms[0])
        for i, j in product(range(len(terms)), repeat=2):
            (a, x), (b, y) = terms[i], terms[j]
            made = [(a - b, f"({x} - {y})"), *([(a / b, f"({x} / {y})")] if b else [])] if i != j else []
            made += [(a + b, f"({x} + {y})"), (a * b, f"({x} * {y})")] if i < j else []
            rest = [t for k, t in enumerate(terms) if k not in (i, j)]
            todo += [[*rest, m] for m in made]
    return list(values.items())


# --- the two prompts ---

TEACHER_SYSTEM = (
    "You explain how problems are solved. Your answer has two sections. The Solution section states the "
    "solution between <|begin_of_solution|> and <|end_of_solution|>. The Explanation section, between "
    "<|begin_of_explanation|> and <|end_of_explanation|>, sets out the systematic thinking that leads from "
    "the question to that solution: analysis, every step worked through, checks, and reconsideration."
)
STUDENT_SYSTEM = (
    "You solve problems by thinking them through. Your answer has two sections. The Thought section, between "
    "<|begin_of_thought|> and <|end_of_thought|>, sets out your reasoning step by step. The Solution "
    "section, between <|begin_of_solution|> and <|end_of_solution|>, states it, the result in \\boxed{}."
)


@dataclass(frozen=True)
class Format:
    """How q, s and t become the texts of teacher and student. Spans come from concatenation, never from a
    search: the system prompts mention the tags."""

    chat: Callable[[str, str], str]  # (system, user) -> text up to where the assistant's turn begins
    end_of_turn: str
    teacher_system: str = TEACHER_SYSTEM
    student_system: str = STUDENT_SYSTEM
    solution: tuple[str, str] = ("<|begin_of_solution|>", "<|end_of_solution|>")
    thought: tuple[str, str] = ("<|begin_of_thought|>", "<|end_of_thought|>")
    explanation: tuple[str, str] = ("<|begin_of_explanation|>", "<|end_of_explanation|>")
    gap: str = "\n\n"

    def teacher(self, e: Example, t: str) -> tuple[str, tuple[int, int], int]:
        """Teacher's text, span of t in it, and where generation begins: after the gap that t starts with."""
        head = self.chat(self.teacher_system, e.q) + self.solution[0] + e.s + self.solution[1] + self.gap
        head += self.explanation[0]
        text = head + t + self.explanation[1] + self.end_of_turn
        return text, (len(head), len(head) + len(t)), len(head) + len(self.gap)

    def student(self, e: Example, t: str) -> tuple[str, tuple[int, int], tuple[int, int], int]:
        """Student's text, spans of t and of s in it, and where the assistant's turn begins."""
        turn = self.student_prompt(e)
        head = turn + self.thought[0]
        middle = head + t + self.thought[1] + self.gap + self.solution[0]
        text = middle + e.s + self.solution[1] + self.end_of_turn
        return text, (len(head), len(head) + len(t)), (len(middle), len(middle) + len(e.s)), len(turn)

    def teacher_prompt(self, e: Example) -> str:
        """What the teacher continues: question and solution given, explanation opened."""
        text, _, begin = self.teacher(e, self.gap)
        return text[:begin]

    def student_prompt(self, e: Example) -> str:
        """What a student continues: the question alone."""
        return self.chat(self.student_system, e.q)

    def split_completion(self, text: str) -> tuple[str, bool]:
        """(t, closed): t ends at the first closing tag of a completion; without one it is all of it."""
        t, tag, _ = text.partition(self.explanation[1])
        return self.gap + t, bool(tag)

    def answer(self, text: str) -> str:
        """The last solution block in a student's completion, empty if there is none."""
        _, tag, rest = text.rpartition(self.solution[0])
        return rest.partition(self.solution[1])[0] if tag else ""


HOP_FORMAT = Format(lambda system, q: system + q, "$", "!", "?", ("[", "]"), ("(", ")"), ("{", "}"), "")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_format(tok, student_system: str) -> Format:
    """The Format of a chat model. UserError if its tokenizer or template cannot carry the spans."""
    if not tok.is_fast:
        raise UserError("the tokenizer has no fast version, so no character offsets: take another model")
    tags = [tag for pair in (Format.solution, Format.thought, Format.explanation) for tag in pair]
    if special := [tag for tag in tags if tag in tok.all_special_tokens]:
        raise UserError(f"{special[0]} is a special token of this model and would vanish in decoding")
    if tok.chat_template is None:
        sys.stderr.write("rlt.py: the model has no chat template, taking ChatML\n")
        tok.chat_template = CHATML

    def chat(system: str, q: str) -> str:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": q}]
        return tok.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    words = {"system": "S", "user": "Q", "assistant": "\n\nA <|x|>\n\n"}
    try:
        whole = tok.apply_chat_template([{"role": r, "content": c} for r, c in words.items()], tokenize=False)
        head = chat("S", "Q") + words["assistant"]
    except Exception as e:  # whatever the template raises, for one that knows no system role
        raise UserError(f"the chat template refuses system, user and assistant turns ({e})") from None
    if not whole.startswith(head) or whole == head:
        raise UserError("the chat template alters the assistant's text, so spans cannot be kept")
    return Format(chat, whole.removeprefix(head), student_system=student_system)


def tokens_in_span(offsets: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Indices of the tokens whose characters, one at least, all lie in [begin, end); offsets (T, 2)."""
    a, b = offsets[:, 0], offsets[:, 1]
    return np.flatnonzero((a >= begin) & (b <= end) & (b > a))


def token_offsets(tok, ids: list[int]) -> np.ndarray:
    """Character spans (T, 2) of sampled ids in their text; tokens that share a character share a span."""
    spans, group, at = [], [], 0
    for i, token in enumerate(ids):
        group.append(token)
        text = tok.decode(group, skip_special_tokens=True)
        if text.endswith("\ufffd") and len(group) < 4 and i + 1 < len(ids):
            continue  # bytes of an unfinished UTF-8 character
        spans += [(at, at + len(text))] * len(group)
        at, group = at + len(text), []
    return np.array(spans).reshape(-1, 2)


# --- log-probs, and the batches they come in ---


class LogProbLM(nn.Module):
    """A causal LM whose forward gives log-probs. Sharded whole: FSDP's root has embeddings and head."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """ids, mask (B, T), right-padded -> fp32 log-probs and entropies of the next tokens, (B, T - 1)."""
        return common.token_logprobs(self.lm, ids, mask, temperature)


def micro_batches(lengths: list[int], task: Task) -> list[np.ndarray]:
    """Length-sorted groups of indices, each at most cfg.micro_tokens padded tokens (or a single sequence).

    Every rank gets equally many, since FSDP makes them meet in each forward pass: some end with empty groups.
    """
    groups, group = [], []
    for i in np.argsort(lengths, kind="stable"):
        if group and lengths[i] * (len(group) + 1) > task.cfg.micro_tokens:
            groups, group = [*groups, np.array(group)], []
        group.append(i)
    groups += [np.array(group)] if group else []
    return groups + [np.array([], int)] * (max(task.run.gather(len(groups))) - len(groups))


@torch.no_grad()
def score(model: nn.Module, sequences: list[list[int]], task: Task) -> Tensor:
    """Log-probs (N, T - 1) of all next tokens of N sequences at cfg.temperature, in micro-batches."""
    device = task.run.device
    out = torch.zeros(len(sequences), max(map(len, sequences)) - 1, device=device)
    for group in micro_batches([len(x) for x in sequences], task):
        with task.run.autocast():
            logp, _ = model(*common.collate([sequences[i] for i in group], device), task.cfg.temperature)
        if len(group):
            out[torch.from_numpy(group).to(device), : logp.shape[1]] = logp
    return out


# --- the reward ---


@dataclass
class Aligned:
    """An explanation in both contexts: its j-th token stands at think_teacher[j] and think_student[j]."""

    t: str
    closed: bool  # the closing tag was there
    canonical: bool  # the text encodes to the sampled ids
    matched: bool  # both contexts have the same tokens of t, none had to be dropped
    teacher_ids: list[int]
    student_ids: list[int]
    think_teacher: np.ndarray  # (J,)
    think_student: np.ndarray  # (J,)
    solution: np.ndarray  # (K,) positions of s in student_ids


def align(e: Example, completion: list[int], task: Task) -> Aligned:
    """Find the tokens of a sampled explanation (ids, with or without EOS) in both contexts.

    A text that encodes back to the sampled ids is scored as encoded; so is any other if cfg.retokenize, else
    its sampled ids are set into both contexts. Where two encodings of t differ, what they share is kept.
    """
    t, closed = task.fmt.split_completion(task.tok.decode(completion, skip_special_tokens=True))
    text_t, span_t, begin = task.fmt.teacher(e, t)
    text_s, span_s, span_solution, _ = task.fmt.student(e, t)
    (ids_p, offsets_p), (ids_t, offsets_t), (ids_s, offsets_s) = task.encode([text_t[:begin], text_t, text_s])
    think_t, think_s = tokens_in_span(offsets_t, *span_t), tokens_in_span(offsets_s, *span_s)
    solution, sampled, matched = tokens_in_span(offsets_s, *span_solution), ids_p + completion, True
    end = int(think_t[-1]) + 1 if len(think_t) else 0
    canonical = ids_t[:end] == sampled[:end]
    if not canonical and not task.cfg.retokenize:
        offsets = np.concatenate([offsets_p, begin + token_offsets(task.tok, completion)])
        ids_t, think_t = sampled, tokens_in_span(offsets, *span_t)
        edges = (offsets[think_t[0], 0], offsets[think_t[-1], 1]) if len(think_t) else (span_t[0], span_t[0])
        cut = [span_s[0] + x - span_t[0] for x in edges]  # text outside the sampled tokens is encoded as text
        (before, _), (after, offsets_after) = task.encode([text_s[: cut[0]], text_s[cut[1] :]])
        ids_s = before + [sampled[i] for i in think_t] + after
        think_s = len(before) + np.arange(len(think_t))
        solution = tokens_in_span(offsets_after, *(x - cut[1] for x in span_solution))
        solution = solution + len(before) + len(think_t)
    else:
        key_t = [(ids_t[i], *(offsets_t[i] - span_t[0])) for i in think_t]
        key_s = [(ids_s[i], *(offsets_s[i] - span_s[0])) for i in think_s]
        matched = key_t == key_s
        if not matched:
            shared = set(key_t) & set(key_s)
            think_t, think_s = think_t[[k in shared for k in key_t]], think_s[[k in shared for k in key_s]]
    return Aligned(t, closed, canonical, matched, ids_t, ids_s, think_t, think_s, solution)


def at(logp: Tensor, positions: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens at `positions`, padded (B, L), and mask; token i is predicted at i - 1."""
    lengths = np.array([len(p) for p in positions])
    mask = np.arange(max(1, lengths.max())) < lengths[:, None]
    index = np.ones(mask.shape, int)
    index[mask] = np.concatenate(positions)
    return logp.gather(1, torch.from_numpy(index - 1).to(logp.device)), torch.from_numpy(mask).to(logp.device)


def reduce_scores(x: Tensor, mask: Tensor, alpha: float, kind: Literal["min", "max"]) -> Tensor:
    """mean + alpha min (or max) over each row's masked entries, (B, L) -> (B,); NaN for a row without any."""
    sign = 1.0 if kind == "max" else -1.0
    extreme = sign * (sign * x).masked_fill(~mask, -torch.inf).amax(1)
    return torch.where(mask, x, 0).sum(1) / mask.sum(1) + alpha * extreme


@torch.no_grad()
def exact_kl(teacher: LogProbLM, student: LogProbLM, rows: list[Aligned], task: Task) -> Tensor:
    """KL(pi_T || pi_S) over the whole vocabulary at each token of t, (B, J). Not for sharded models."""
    out = torch.zeros(len(rows), max(1, *(len(r.think_teacher) for r in rows)), device=task.run.device)
    for i, row in enumerate(rows):
        hidden = []
        for model, ids, places in (
            (teacher, row.teacher_ids, row.think_teacher),
            (student, row.student_ids, row.think_student),
        ):
            inputs, mask = common.collate([ids], task.run.device)
            with task.run.autocast():
                h = model.lm.base_model(input_ids=inputs, attention_mask=mask, use_cache=False)
            hidden.append(h.last_hidden_state[0, places - 1])
        begin = 0
        for chunk in zip(*(h.split(1024) for h in hidden), strict=True):
            logits = (common.head_logits(m.lm, h) for m, h in zip((teacher, student), chunk, strict=True))
            log_p, log_q = ((z / task.cfg.temperature).log_softmax(-1) for z in logits)  # (J, V) each
            out[i, begin : begin + len(log_p)] = (log_p.exp() * (log_p - log_q)).sum(-1)
            begin += len(log_p)
    return out


def rlt_reward(
    examples: list[Example], completions: list[list[int]], teacher: nn.Module, student: nn.Module, task: Task
) -> tuple[Tensor, dict[str, Tensor], dict]:
    """Eqs. (1) to (3) for B explanations (sampled ids) -> reward (B,), its parts (B,), what each token got.

    One pass of the student gives the solution's log-probs and its half of d. No gradient flows.
    """
    cfg, rows = task.cfg, [align(e, c, task) for e, c in zip(examples, completions, strict=True)]
    student_logp = score(student, [r.student_ids for r in rows], task)
    solution, solution_mask = at(student_logp, [r.solution for r in rows])  # l_k, (B, K)
    student_think, think = at(student_logp, [r.think_student for r in rows])  # (B, J)
    if cfg.exact_kl:
        d = exact_kl(teacher, student, rows, task)
    else:
        teacher_logp = score(teacher, [r.teacher_ids for r in rows], task)
        d = at(teacher_logp, [r.think_teacher for r in rows])[0] - student_think  # d_j, (B, J)
    closed = torch.tensor([r.closed for r in rows], device=d.device)
    r_ss = reduce_scores(solution, solution_mask, cfg.alpha, "min")  # eq. (1)
    r_kl = reduce_scores(d, think, cfg.alpha, "max")  # eq. (2)
    r_kl = torch.where(think.any(1), r_kl, 1 + cfg.alpha)
    reward = r_ss - cfg.lam * r_kl + cfg.penalty * ~closed  # eq. (3)
    kl_max = torch.where(think.any(1), d.masked_fill(~think, -torch.inf).amax(1), 1.0)
    canonical, matched = (
        torch.tensor(x, device=d.device) for x in zip(*((r.canonical, r.matched) for r in rows), strict=True)
    )
    parts = {"r_ss": r_ss, "r_kl": r_kl, "kl_mean": r_kl - cfg.alpha * kl_max, "kl_max": kl_max}
    parts |= {"length": think.sum(1).float(), "closed": closed.float()}
    parts |= {"canonical": canonical.float(), "matched": matched.float()}
    return reward, parts, {"rows": rows, "l": solution, "d": d}


def correctness_reward(examples: list[Example], completions: list[list[int]], task: Task):
    """The baseline's sparse reward (B,): 1 where a student's completion (ids) has the right answer, or 0."""
    texts = [task.tok.decode(c, skip_special_tokens=True) for c in completions]
    right = [float(task.correct(e, text)) for e, text in zip(examples, texts, strict=True)]
    length = torch.tensor([float(len(c)) for c in completions])
    return torch.tensor(right, device=task.run.device), {"length": length}, {}


# --- GRPO ---


def group_advantage(reward: Tensor, group: int) -> Tensor:
    """Eq. (4): (r - mean) / (std + 1e-4) over each `group` consecutive completions, (B,) -> (B,).

    The std has n - 1 in it. A group of equal rewards has advantage 0 exactly.
    """
    r = reward.view(-1, group)
    advantage = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    return torch.where(r.eq(r[:, :1]).all(1, keepdim=True), 0.0, advantage).flatten()


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """e^rho - rho - 1, rho = ref_logp - logp: a non-negative one-sample estimate of KL(policy || ref)."""
    rho = ref_logp - logp
    return rho.exp() - rho - 1


def mean_by_row(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over rows of the mean over each row's masked entries: (B, T) -> (); a row without any counts 0."""
    return (torch.where(mask, x, 0).sum(1) / mask.sum(1).clamp(min=1)).mean()


def grpo_loss(logp: Tensor, ref_logp: Tensor, advantage: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Eq. (4): logp, ref_logp, mask (B, T), advantage (B,) -> (). Gradient in logp: -A + beta (1 - e^rho)."""
    ratio = (logp - logp.detach()).exp()  # 1, but it carries the gradient
    return mean_by_row(-(ratio * advantage[:, None] - beta * k3(logp, ref_logp)), mask)


@torch.no_grad()
def sync_ref(ref: nn.Module, policy: nn.Module, mix: float) -> None:
    """theta_ref <- mix theta + (1 - mix) theta_ref, in place, on whatever shard is here."""
    for p_ref, p in zip(ref.parameters(), policy.parameters(), strict=True):
        mine, theirs = (x.to_local() if hasattr(x, "to_local") else x for x in (p_ref, p))
        mine.copy_(theirs) if mix == 1 else mine.lerp_(theirs.to(mine), mix)


def full_weights(lm: nn.Module):
    """(name, whole tensor) of each parameter; sharded ones are gathered one by one, on all ranks together."""
    for name, p in lm.named_parameters():
        yield name, p.full_tensor() if hasattr(p, "full_tensor") else p


class Sampler:
    """Completions of a policy. A sharded one is copied into a whole bfloat16 model on each rank first."""

    def __init__(self, policy: LogProbLM, task: Task):
        self.policy, self.task, self.lm = policy, task, policy.lm
        if task.run.sharded:
            dtype = torch.bfloat16 if task.run.amp else torch.float32
            self.lm = empty_twin(policy.lm, task.run.device, dtype)

    def __call__(self, prompts: list[list[int]], uniforms: Tensor, temperature: float, top_p=1.0):
        """uniforms (N, T) decide the samples, N / len(prompts) a prompt -> N lists of ids, EOS included."""
        cfg, run, out = self.task.cfg, self.task.run, [None] * len(uniforms)
        if self.lm is not self.policy.lm:
            mine = dict(self.lm.named_parameters())
            for name, whole in full_weights(self.policy.lm):
                mine[name].data.copy_(whole)
        n = len(uniforms) // len(prompts)
        m = n if n <= cfg.sample_batch else math.gcd(n, cfg.sample_batch)  # large groups come in pieces
        prompts = [p for p in prompts for _ in range(n // m)]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        share = max(1, cfg.sample_batch // m)
        settings = {"temperature": temperature, "top_p": top_p, "eos": self.task.eos, "compile": cfg.compile}
        for part in (order[i : i + share] for i in range(0, len(order), share)):
            rows, batch = [i * m + j for i in part for j in range(m)], [prompts[i] for i in part]
            with run.autocast():
                tokens, mask, _ = common.generate(self.lm.eval(), batch, uniforms[rows], **settings)
            for row, ids, length in zip(rows, tokens.tolist(), mask.sum(1).tolist(), strict=True):
                out[row] = ids[:length]
        return out


class VLLMSampler:
    """The same from a vLLM engine on this rank's GPU, asleep while the models train (extra "vllm")."""

    engines: ClassVar[dict] = {}

    def __init__(self, policy: LogProbLM, task: Task):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the weights stay in this process
        try:
            import vllm
        except ImportError:
            raise UserError('--sampler vllm needs: pip install -e ".[vllm]"') from None
        self.policy, self.task, self.vllm = policy, task, vllm
        settings = dict(dtype="bfloat16", max_model_len=task.cfg.context, generation_config="vllm")
        settings |= dict(gpu_memory_utilization=0.4, enable_sleep_mode=True, seed=task.run.rank)
        if "RANK" in os.environ:
            settings["distributed_executor_backend"] = "external_launcher"
        name = task.cfg.teacher  # one engine for all stages: it holds a GPU
        if name not in self.engines:
            self.engines[name] = vllm.LLM(name, **settings)
        self.engine = self.engines[name]

    def __call__(self, prompts: list[list[int]], uniforms: Tensor, temperature: float, top_p=1.0):
        self.engine.wake_up()
        worker = self.engine.llm_engine.model_executor.driver_worker
        worker.model_runner.model.load_weights(full_weights(self.policy.lm))
        self.engine.reset_prefix_cache()
        n = len(uniforms) // len(prompts)
        settings = dict(n=n, max_tokens=uniforms.shape[1], stop_token_ids=[self.task.eos], detokenize=False)
        settings |= dict(temperature=temperature, top_p=top_p, top_k=0, repetition_penalty=1.0)
        seeds = (uniforms[::n, 0] * 2**31).long().tolist()
        params = [self.vllm.SamplingParams(**settings, seed=seed) for seed in seeds]
        outputs = self.engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        self.engine.sleep(level=1)
        return [list(c.token_ids) for o in outputs for c in o.outputs]


def make_sampler(policy: LogProbLM, task: Task) -> Sampler | VLLMSampler:
    """The teacher's sampler, as cfg.sampler names it."""
    return (VLLMSampler if task.cfg.sampler == "vllm" else Sampler)(policy, task)


def empty_twin(lm: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A model of the same make with parameters still to be filled; buffers (rotary frequencies) are there."""
    with torch.device("meta"):
        twin = type(lm)(lm.config)
    twin = common.cast_parameters(twin, dtype).to_empty(device=device).eval()
    for ours, theirs in zip(twin.buffers(), lm.buffers(), strict=True):
        ours.copy_(theirs)
    twin.tie_weights()
    return twin


def rows_of(step: int, batch: int, n: int, seed: int) -> list[int]:
    """Row numbers of batch `step` on a walk through n rows, in a new order every epoch: no state to save."""
    places, shuffled = range(step * batch, (step + 1) * batch), {}
    for epoch in {i // n for i in places}:
        shuffled[epoch] = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return [shuffled[i // n][i % n] for i in places]


def train_grpo(policy: LogProbLM, examples: list[Example], kind: str, student, task: Task) -> dict:
    """cfg.updates steps of GRPO on `policy`, in place: one loop for the paper's reward and its baselines.

    kind "rlt": the policy explains given solutions, the frozen `student` rewards by eq. (3), lambda = 0 too;
    "sparse": it answers, 1 for a right answer. Returns means over the last quarter of the updates, and speed.
    """
    cfg, run, reference = task.cfg, task.run, copy_frozen(policy, task)
    model = policy if run.sharded else run.wrap(policy)
    adam = dict(betas=(0.9, 0.999), weight_decay=0.0, fused=run.device.type == "cuda")
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, **adam)
    sampler = make_sampler(policy, task) if kind == "rlt" else Sampler(policy, task)
    prompt = task.fmt.teacher_prompt if kind == "rlt" else task.fmt.student_prompt
    share, mute = cfg.prompts // run.world_size, 0
    history = {"rows": [], "tokens": 0, "seconds": run.seconds}
    mine = slice(run.rank * share, (run.rank + 1) * share)  # whole groups: advantages need no other rank
    state = {"model": policy, "optimizer": optimizer, "reference": reference, "history": history}
    for step in run.steps(cfg.updates, **state):
        run.seconds = history["seconds"]  # those before a resume included
        uniforms = torch.rand(cfg.prompts, cfg.group, cfg.max_new, generator=run.generator("sample"))[mine]
        batch = [examples[i] for i in rows_of(step, cfg.prompts, len(examples), run.stream("order"))[mine]]
        prompts = task.ids([prompt(e) for e in batch])
        with run.timed("sample"):
            completions = sampler(prompts, uniforms.flatten(0, 1), cfg.temperature)
        batch, prompts = ([x for x in rows for _ in range(cfg.group)] for rows in (batch, prompts))
        with run.timed("reward"):
            if kind == "rlt":
                reward, parts, detail = rlt_reward(batch, completions, policy, student, task)
            else:
                reward, parts, detail = correctness_reward(batch, completions, task)
            stop_at_bad_reward(reward, batch, completions, detail, task)
        advantage = group_advantage(reward, cfg.group)
        with run.timed("update"):
            parts |= grpo_update(model, reference, prompts, completions, advantage, optimizer, task)
        if (step + 1) % cfg.sync_every == 0:
            sync_ref(reference, policy, cfg.sync_mix)
        signal = advantage.view(-1, cfg.group).ne(0).any(1).float()  # groups with something to learn
        parts = {"reward": reward, "signal": signal} | parts
        means = run.mean(torch.stack([v.mean().to(run.device) for v in parts.values()]))
        means = dict(zip(parts, means.tolist(), strict=True))
        history["tokens"] += sum(map(len, completions))
        history["rows"].append(means)
        run.log(step, **means)
        mute = 0 if means["signal"] else mute + 1
        if mute == 10:
            run.print(
                f"{run.name} {step}: in 10 updates no group had two different rewards; the policy stands"
            )
        if means.get("closed") == 0:
            run.print(f"{run.name} {step}: every explanation was cut at --max_new {cfg.max_new}: raise it")
    run.seconds = history["seconds"]
    last = history["rows"][-max(1, cfg.updates // 4) :]
    means = {k: float(np.mean([row[k] for row in last])) for k in last[0]} if last else {}
    return means | speed(policy, history["tokens"], kind, run)


def grpo_update(model, reference, prompts, completions, advantage: Tensor, optimizer, task: Task) -> dict:
    """One optimizer step on this rank's completions (lists of ids), in micro-batches, averaged over ranks."""
    cfg, run, device = task.cfg, task.run, task.run.device
    sequences = [p + c for p, c in zip(prompts, completions, strict=True)]
    model.train(run.sharded)  # which turns on gradient checkpointing; no model here has dropout
    stats = {k: torch.zeros((), device=device) for k in ("loss", "kl_ref", "entropy")}
    for group in micro_batches([len(x) for x in sequences], task):
        ids, valid = common.collate([sequences[i] for i in group], device)
        first = torch.tensor([len(prompts[i]) for i in group] or [2], device=device)
        mask = valid[:, 1:] & (torch.arange(1, ids.shape[1], device=device) >= first[:, None])  # to EOS
        a = advantage[torch.from_numpy(group).to(device)] if len(group) else torch.zeros(1, device=device)
        weight = len(group) / len(sequences)  # in the mean over completions; a dummy has none
        with run.autocast():
            with torch.no_grad():
                ref_logp, _ = reference(ids, valid, cfg.temperature)
            logp, entropy = model(ids, valid, cfg.temperature)
        loss = weight * grpo_loss(logp, ref_logp, a, mask, cfg.beta)
        loss.backward()
        with torch.no_grad():
            stats["loss"] += loss
            stats["kl_ref"] += weight * mean_by_row(k3(logp, ref_logp), mask)
            stats["entropy"] += weight * mean_by_row(entropy, mask)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return stats | {"grad_norm": norm.full_tensor() if hasattr(norm, "full_tensor") else norm}


def place(lm: nn.Module, task: Task, trainable: bool) -> LogProbLM:
    """A model on this rank's device, or sharded (cfg.shard): trained in float32, frozen in bfloat16."""
    lm.requires_grad_(trainable)
    dtype = torch.float32 if trainable or not task.run.amp else torch.bfloat16
    if not task.cfg.shard or task.run.world_size == 1:
        return LogProbLM(common.cast_parameters(lm, dtype)).to(task.run.device).eval()
    if not hasattr(lm.base_model, "layers"):
        raise UserError(f"--shard: {type(lm).__name__} keeps its decoder layers elsewhere than in .layers")
    if trainable:
        lm.gradient_checkpointing_enable()
    offload = task.cfg.offload and not trainable
    return task.run.shard(LogProbLM(lm), lm.base_model.layers, dtype, offload).eval()


def copy_frozen(model: LogProbLM, task: Task) -> LogProbLM:
    """A frozen copy of a model, sharded as it is: the reference."""
    if not task.run.sharded:
        return copy.deepcopy(model).requires_grad_(False).eval()
    twin = place(empty_twin(model.lm, "cpu", torch.bfloat16), task, trainable=False)
    sync_ref(twin, model, 1.0)
    return twin


def stop_at_bad_reward(reward: Tensor, batch, completions, detail: dict, task: Task) -> None:
    """UserError on all ranks, with the example printed, if a reward is NaN or infinite."""
    error = None
    for i in torch.nonzero(~reward.isfinite()).flatten().tolist()[:1]:
        e, text = batch[i], task.tok.decode(completions[i])
        sys.stdout.write(f"question {e.q!r}\nsolution {e.s!r}\nexplanation {text!r}\n")
        sys.stdout.writelines(f"{k}: {detail[k][i].tolist()}\n" for k in ("l", "d") if k in detail)
        error = f"{task.run.name}: the reward of the example printed above is {reward[i].item()}"
    task.run.agree(error)


def speed(policy: LogProbLM, tokens: int, kind: str, run: Run) -> dict[str, float]:
    """Tokens/s of each phase on this rank. MFU: 2N FLOP to sample a token, 4N to reward, 8N to train."""
    phases = {k: run.seconds.get(k, math.nan) for k in ("sample", "reward", "update")}
    each = 14 if kind == "rlt" else 10  # a right answer costs nothing to reward
    flops, total = each * sum(p.numel() for p in policy.parameters()) * tokens, sum(phases.values())
    rates = {"mfu": flops / total / common.peak_flops(run.device), "rl_seconds": total}
    return rates | {f"{k}_tokens_per_s": tokens / v for k, v in phases.items()}


# --- the supervised stages ---


def sft(model: LogProbLM, batch_of: Callable, steps: int, rate: Callable, adam: dict, task: Task, done=None):
    """Train in place: batch_of(step) is the global batch as (text, character where the loss begins).

    Loss: mean over the supervised tokens of the batch. Too long texts are cut. rate(step) is the learning
    rate, `adam` the other settings of AdamW; done(step) may end it early.
    """
    cfg, run = task.cfg, task.run
    wrapped = model if run.sharded else run.wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), rate(0), **adam, fused=run.device.type == "cuda")
    limit, cut = min(cfg.context, cfg.sft_tokens), 0
    for step in run.steps(steps, cfg.sft_save_every, model=model, optimizer=optimizer):
        rows = batch_of(step)[run.rank :: run.world_size]
        codes = task.encode([text for text, _ in rows])
        cut += sum(len(i) > limit for i, _ in codes)
        codes = [(i[:limit], o[:limit]) for i, o in codes]
        masks = [torch.from_numpy(o[:, 0] >= begin) for (_, o), (_, begin) in zip(codes, rows, strict=True)]
        supervised = float(run.mean(sum(m.sum() for m in masks).double()))  # a rank; gradients are averaged
        loss = torch.zeros((), device=run.device)
        wrapped.train(run.sharded)
        for group in micro_batches([len(i) for i, _ in codes], task):
            ids, valid = common.collate([codes[i][0] for i in group], run.device)
            parts = [masks[i] for i in group] or [torch.zeros(2, dtype=torch.bool)]
            mask = nn.utils.rnn.pad_sequence(parts, batch_first=True)[:, 1:].to(run.device)
            with run.autocast():
                logp, _ = wrapped(ids, valid, 1.0)
            part = -torch.where(mask, logp, 0).sum() / max(1.0, supervised)
            part.backward()
            loss += part.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for g in optimizer.param_groups:
            g["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if done and done(step):
            run.last = step
        run.log(step, loss=run.mean(loss))
    if cut:
        run.print(f"{run.name}: {cut} texts were cut at {limit} tokens on this rank")


def sft_on(model: LogProbLM, rows: list[tuple[str, int]], steps: int, batch: int, rate, adam, task: Task):
    """`sft` on a fixed list of texts, in a new order every epoch."""
    seed = task.run.stream("sft")
    sft(model, lambda i: [rows[j] for j in rows_of(i, batch, len(rows), seed)], steps, rate, adam, task)


def warm_up(teacher: LogProbLM, examples: list[Example], task: Task) -> None:
    """Stage 1: SFT in the teacher's format on corpus traces; the loss begins after the opened explanation."""
    rows = [(text, begin) for e in examples if e.t for text, _, begin in [task.fmt.teacher(e, e.t)]]
    cfg, steps = task.cfg, task.cfg.warmup_steps
    if not cfg.warmup or not rows:
        return task.run.print("no warm-up" + ("" if rows else ": no problem has a reasoning trace"))
    rate = functools.partial(common.learning_rate, total=steps, peak=cfg.warmup_lr, warmup=0.05)
    sft_on(teacher, rows, steps, cfg.warmup_batch, rate, dict(betas=(0.9, 0.95), weight_decay=1e-4), task)


def distil(learner: LogProbLM, traces: list[Example], task: Task, steps: int) -> None:
    """Stage 4: SFT in the student's format on raw explanations; the loss covers the assistant's turn."""
    rows = [(text, begin) for e in traces for text, _, _, begin in [task.fmt.student(e, e.t)]]
    rate = functools.partial(common.learning_rate, total=steps, peak=task.cfg.distil_lr, warmup=0.1)
    adam = dict(betas=(0.9, 0.999), weight_decay=0.0)
    sft_on(learner, rows, steps, task.cfg.distil_batch, rate, adam, task)


def read_traces(file: Path) -> list[Example]:
    """The explanations that `collect` wrote."""
    rows = common.read_jsonl(file, ("question", "solution"))
    return [Example(r["question"], r["solution"], r["reasoning_trace"]) for r in rows]


def collect(teacher: LogProbLM, student, examples: list[Example], task: Task) -> list[Example]:
    """Stage 3: one raw explanation of each example, with its reward, in traces.jsonl; done ones are kept."""
    cfg, run, file = task.cfg, task.run, task.run.folder / "traces.jsonl"
    sampler = make_sampler(teacher, task)
    if run.is_main:  # an interrupted write may have left half a line
        kept = file.read_text() if cfg.resume and file.exists() else ""
        common.write_atomic(file, kept[: kept.rfind("\n") + 1].encode())
    run.barrier()
    done, chunk = file.read_text().count("\n"), cfg.sample_batch * run.world_size
    for start in range(done, len(examples), chunk):
        end = min(start + chunk, len(examples))
        places = range(start + run.rank, end + (start - end) % run.world_size, run.world_size)
        places = [min(i, end - 1) for i in places]  # equal shares; the repeats go below
        seeds = [torch.Generator().manual_seed(run.stream(f"collect {i}")) for i in places]
        uniforms = torch.stack([torch.rand(cfg.max_new, generator=g) for g in seeds])
        mine = [examples[i] for i in places]
        completions = sampler(task.ids([task.fmt.teacher_prompt(e) for e in mine]), uniforms, cfg.temperature)
        reward, parts, detail = rlt_reward(mine, completions, teacher, student, task)
        numbers = {k: v.tolist() for k, v in ({"reward": reward} | parts).items()}
        origin = {"teacher": cfg.teacher or "built-in task", "run": run.name or run.script, "seed": cfg.seed}
        texts = [
            {"id": i, **origin, "question": e.q, "solution": e.s} for i, e in zip(places, mine, strict=True)
        ]
        rows = [x | {"reasoning_trace": r.t} for x, r in zip(texts, detail["rows"], strict=True)]
        rows = run.gather([row | {k: v[i] for k, v in numbers.items()} for i, row in enumerate(rows)])
        ordered = [row for rank_rows in zip(*rows, strict=True) for row in rank_rows][: end - start]
        if run.is_main:
            with open(file, "a") as f:
                f.writelines(json.dumps(common.finite_or_null(r)) + "\n" for r in ordered)
        run.leave_if_stopped()
    run.barrier()
    return read_traces(file)


# --- evaluation ---


def same_boxed(e: Example, text: str) -> bool:
    """The last boxed answer of a text against the solution's, or the whole solution if that boxes nothing."""
    return common.equal_answers(common.extract_boxed(text), common.extract_boxed(e.s) or e.s)


def solves_countdown(e: Example, text: str) -> bool:
    """Whether the boxed expression makes the target from the question's numbers; parsed, never evaluated."""
    operations = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
    operations[ast.Div] = operator.truediv

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in operations:
            return operations[type(node.op)](value(node.left), value(node.right))
        raise ValueError("no arithmetic expression")

    asked = re.search(r"numbers \[([\d, ]+)\].* make (\d+)", e.q)
    expression = (
        (common.extract_boxed(text) or "").replace("\\times", "*").replace("\\div", "/").strip()[:200]
    )
    if asked is None or sorted(re.findall(r"\d+", expression)) != sorted(re.findall(r"\d+", asked[1])):
        return False
    try:
        return value(ast.parse(expression, mode="eval").body) == int(asked[2])
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def benchmark(name: str, heldout: list[Example], cfg: Config) -> list[Example]:
    """At most cfg.eval_problems of what --bench names: a hub table, countdown, a .jsonl, or held-out rows."""
    if name.endswith(".jsonl") or name == "countdown":
        rows, _ = load_examples(name, seed=10**6)
    elif name in ("math500", "aime24"):
        hub, split = {"math500": ("MATH-500", "test"), "aime24": ("aime_2024", "train")}[name]
        table = common.load_hub(f"HuggingFaceH4/{hub}", split)
        rows = [Example(r["problem"], rf"\boxed{{{r['answer']}}}") for r in table]
    elif name == "gpqa":
        rng, rows = np.random.default_rng(0), []
        for r in common.load_hub("Idavidrein/gpqa", subset="gpqa_diamond"):
            options = [r["Correct Answer"], *(r[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
            order = rng.permutation(4)
            lines = [f"{letter}) {options[i].strip()}" for letter, i in zip("ABCD", order, strict=True)]
            question = "\n".join([r["Question"], *lines, "Box the letter of the right answer."])
            rows.append(Example(question, rf"\boxed{{{'ABCD'[order.tolist().index(0)]}}}"))
    elif name:
        raise UserError(f"--bench {name}: choose math500, aime24, gpqa, countdown or a .jsonl")
    else:
        rows = heldout
    if not rows:
        raise UserError("nothing to evaluate on: give --bench, or keep rows of --data with --holdout")
    return rows[: cfg.eval_problems]


def accuracy(model: LogProbLM, examples: list[Example], task: Task, temperature: float, k=1) -> np.ndarray:
    """Share of right answers to each problem among k (greedy at temperature 0): (N,), on every rank."""
    cfg, run = task.cfg, task.run
    generator = torch.Generator().manual_seed(run.stream(f"accuracy at {temperature}"))
    uniforms = torch.rand(len(examples), k, cfg.eval_new, generator=generator)
    places = range(run.rank, len(examples) + -len(examples) % run.world_size, run.world_size)
    todo = [i % len(examples) for i in places]  # equal shares: sharded models move together
    mine = [examples[i] for i in todo]
    prompts = task.ids([task.fmt.student_prompt(e) for e in mine])
    completions = Sampler(model, task)(prompts, uniforms[todo].flatten(0, 1), temperature, cfg.eval_top_p)
    right, _, _ = correctness_reward([e for e in mine for _ in range(k)], completions, task)
    shares = run.gather(right.view(-1, k).mean(1).tolist())
    return np.array([shares[i % run.world_size][i // run.world_size] for i in range(len(examples))])


# --- the study on the built-in task: a grid of jobs on one base model ---

LABELS = {
    "start": "base model",
    "corpus": "distilled from the corpus",
    "warm": "distilled from the teacher before RL",
    "sparse": "correctness RL from the base",
    "lam0": "distilled from RLT, lambda = 0",
    "rlt": "distilled from RLT",
}


def hop_task(cfg: Config, run: Run) -> Task:
    """The Task of pointer chasing: one symbol, one token; `$` ends a turn."""
    tok = common.CharTokenizer(SYMBOLS[: cfg.symbols] + "~?!()[]{}$", eos="$")
    return Task(cfg, run, tok, HOP_FORMAT, lambda e, text: HOP_FORMAT.answer(text) == e.s)


def hop_problems(cfg: Config, n: int, purpose: str, p_write: float | None = None) -> list[Example]:
    """n problems that depend on cfg.seed and their purpose only: all rows of the table share one test set."""
    generator = torch.Generator().manual_seed(common.stable_hash(f"{cfg.seed} {purpose}"))
    return make_problems(n, cfg, generator, cfg.p_write if p_write is None else p_write)


def easy(cfg: Config) -> Config:
    """The control: half the chains, so that the base solves a problem now and then."""
    return replace(cfg, chains=cfg.chains // 2)


def hop_job(name: str, run: Run) -> dict:
    """One job of the grid: `base-W` trains the base with W chains, `[easy-]method-seed` fills one cell."""
    *head, method, last = name.split("-")
    cfg = easy(run.cfg) if head or (method == "base" and int(last) == easy(run.cfg).chains) else run.cfg
    task = hop_task(cfg, run)
    return hop_base(task) if method == "base" else hop_cell(method, int(last), task)


def hop_base(task: Task) -> dict:
    """Pre-train on both formats, textbook (all written) then web (p_write), and warm up; both are saved."""
    cfg, run = task.cfg, task.run
    base, test = hop_model(cfg).to(run.device), hop_problems(cfg, 256, "gate")
    spelled = hop_problems(cfg, 256, "gate", p_write=1.0)
    hops = ("starts", "hop 1", "hop 2", "hop 3")

    def batch_of(step: int, p_write: float) -> list[tuple[str, int]]:
        generator = torch.Generator().manual_seed(run.stream(f"{step} {p_write}"))
        problems = make_problems(64, cfg, generator, p_write)
        texts = [(task.fmt.student if i % 2 else task.fmt.teacher)(e, e.t)[0] for i, e in enumerate(problems)]
        return [(text, cfg.symbols + cfg.chains + 1) for text in texts]  # the loss begins after the question

    def learned(step: int) -> bool:
        if step % 25 != 24:
            return False
        found = hop_accuracy(base, spelled, task)
        return min(found[k] for k in hops) >= 0.99

    constant = lambda i: cfg.base_lr * min(1, (i + 1) / 30)  # noqa: E731
    cosine = lambda i: common.learning_rate(i, cfg.web_steps, cfg.base_lr, 0.0, 0.05)  # noqa: E731
    all_written, as_found = (functools.partial(batch_of, p_write=p) for p in (1.0, cfg.p_write))
    adam = dict(betas=(0.9, 0.98), weight_decay=0.01)
    textbook, web = (replace(task, run=run.stage(name)) for name in ("textbook", "web"))
    sft(base, all_written, cfg.textbook_steps, constant, adam, textbook, learned)
    sft(base, as_found, cfg.web_steps, cosine, adam, web)
    gate = hop_accuracy(base, test, task) | {"solves": accuracy(base, test, task, 1.0).mean()}
    able = min(gate[k] for k in hops) >= 0.97 and gate["leap"] < 3 / cfg.symbols
    stuck = gate["solves"] < 0.005 or cfg.chains < run.cfg.chains  # the control may solve some
    if cfg.base_check and not (able and stuck):
        found = ", ".join(f"{k} {v:.2f}" for k, v in gate.items())
        raise UserError(
            f"{run.name}: single hops, no leaps and no luck are needed, not {found}; try a --seed"
        )
    weights = {"base": copy.deepcopy(base.state_dict())}
    corpus = hop_problems(cfg, cfg.warmup_batch * cfg.warmup_steps, "warm-up")
    warm_up(base, corpus, replace(task, run=run.stage("warmup")))
    weights["warm"] = base.state_dict()
    common.write_atomic(run.folder / "weights.pt", lambda f: torch.save(weights, f))
    return gate


def hop_weights(which: str, folder: Path, task: Task) -> LogProbLM:
    """The base model, or the warmed-up teacher, of this run folder."""
    model = hop_model(task.cfg).to(task.run.device)
    file = folder / f"base-{task.cfg.chains}" / "weights.pt"
    model.load_state_dict(torch.load(file, map_location=task.run.device, weights_only=True)[which])
    return model


def hop_cell(method: str, seed: int, task: Task) -> dict:
    """One row of the table for one seed: train from the shared base, measure on the shared test problems."""
    cfg, run, control = task.cfg, task.run, "easy" in task.run.name
    model = functools.partial(hop_weights, folder=run.folder.parent, task=task)
    test = hop_problems(cfg, cfg.eval_problems, "test")
    pool = hop_problems(cfg, cfg.prompts * cfg.updates, f"rl {seed}")
    learner, student, teacher = model("base"), model("base").requires_grad_(False), model("warm")

    def at_stage(name: str, **changed) -> Task:
        return replace(task, run=run.stage(name), cfg=replace(cfg, **changed))

    def measure(lm: LogProbLM) -> dict[str, float]:
        modes = {"greedy": 0.0, "tau .7": 0.7, "tau 1": 1.0}
        return {k: accuracy(lm, test, task, temperature).mean() for k, temperature in modes.items()}

    if method == "start":
        return {"written": cfg.p_write} | measure(learner)
    if method == "sparse":
        numbers = train_grpo(learner, pool, "sparse", None, at_stage("rl"))
        return numbers | measure(learner)
    result, traces = {}, hop_problems(cfg, cfg.traces, f"distil {seed}")
    if method in ("rlt", "lam0"):
        lam = 0.0 if method == "lam0" else cfg.lam
        result = train_grpo(teacher, pool, "rlt", student, at_stage("rl", lam=lam))
    if method != "corpus":
        traces = collect(teacher, student, traces, at_stage("collect"))
    distil(learner, traces, at_stage("distil"), cfg.distil_steps)
    elided = np.mean([e.t.count("~") for e in traces]) / (2 * cfg.chains)
    result |= {"written": 1 - float(elided)} | measure(learner)
    if method == "rlt" and not control:
        result["example"] = explain(teacher, student, test[:1], task)[0]
        cold = model("base")
        distil(cold, traces[: cfg.cold_traces], at_stage("cold-distil"), cfg.cold_steps)
        result["cold start, before RL"] = measure(cold)
        train_grpo(cold, pool, "sparse", None, at_stage("cold-rl", updates=cfg.cold_updates))
        result["cold start, after RL"] = measure(cold)
    return result


def hop_study(cfg: Config, run: Run) -> None:
    """Run the grid, then print and keep the table, the claims and the figure."""
    grid = {} if cfg.easy else {"": ("rlt", "lam0", "sparse", "warm", "corpus")}
    grid["easy-"] = ("rlt", "sparse")
    chains = [(cfg if not prefix else easy(cfg)).chains for prefix in grid]
    for name, gate in run.jobs([f"base-{c}" for c in chains], hop_job).items():
        run.print(f"  {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in gate.items()))
    cells = {(p, "start"): [f"{p}start-0"] for p in grid}
    for prefix, methods in grid.items():
        cells |= {(prefix, m): [f"{prefix}{m}-{i}" for i in range(cfg.seeds)] for m in methods}
    names = [name for cell in cells.values() for name in cell]
    results = run.jobs(sorted(names, key=lambda name: "rlt" not in name), hop_job)  # the longest first

    def column(prefix: str, method: str, key: str, inner: str | None = None) -> list[float]:
        found = (results[n][inner] if inner else results[n] for n in cells[prefix, method])
        return [x[key] for x in found if key in x]

    keys, rows = ("greedy", "tau .7", "tau 1", "written", "r_ss", "r_kl", "signal"), []
    for prefix, method in sorted(cells, key=lambda cell: cell[0]):
        count = cfg.chains if not prefix else easy(cfg).chains
        numbers = {k: common.mean_se(column(prefix, method, k)) for k in keys}
        rows.append({"chains": count, "row": LABELS[method]} | numbers)
    for when in () if cfg.easy else ("before RL", "after RL"):
        numbers = {k: common.mean_se(column("", "rlt", k, f"cold start, {when}")) for k in keys}
        rows.append({"chains": cfg.chains, "row": f"{cfg.cold_traces} RLT traces, {when}"} | numbers)
    rows.sort(key=lambda row: -row["chains"])
    how = f"{cfg.eval_problems} fresh problems, +- s.e. over {cfg.seeds} seeds on one base model"
    run.table(rows, f"accuracy on {how}")
    if not cfg.easy:
        hop_claims(column, run)
        example = results["rlt-0"]["example"]
        run.print("\none explanation of the trained teacher\n" + describe(example, cfg))
        draw = functools.partial(draw_study, folder=run.folder, seeds=cfg.seeds, example=example)
        run.figure("rlt", draw, (11, 5))
    sparse, rlt = (column("easy-", method, "tau 1") for method in ("sparse", "rlt"))
    run.claim("control, half the chains: correctness RL beats distilling from RLT (tau 1)", sparse, rlt)
    first = next(iter(grid))
    rates = [k for k in results[f"{first}rlt-0"] if "per_s" in k or k == "mfu"]
    numbers = {k: float(np.mean(column(first, "rlt", k))) for k in [*rates, "rl_seconds"]}
    run.finish(updates_per_s=cfg.updates / numbers.pop("rl_seconds"), **numbers)


def hop_claims(column: Callable, run: Run) -> None:
    """The paper's sentences, paired by seed: greedy accuracy of the RLT student against the rest."""
    ours, sparse = column("", "rlt", "greedy"), column("", "sparse", "greedy")
    run.claim("a student distilled from RLT beats correctness RL from the same start", ours, sparse)
    run.claim("... beats one distilled from the corpus", ours, column("", "corpus", "greedy"))
    run.claim("... beats one distilled from the teacher before RL", ours, column("", "warm", "greedy"))
    run.claim("without the KL term (theirs) teaching is worse", ours, column("", "lam0", "greedy"))
    r_ss = column("", "lam0", "r_ss"), column("", "rlt", "r_ss")
    run.claim("... though r_SS without it (ours) is as high or higher, margin 0.05", *r_ss, margin=-0.05)
    cold = column("", "rlt", "greedy", "cold start, after RL")
    run.claim("correctness RL gets further from a few RLT traces than from the base", cold, sparse)


def draw_study(figure, folder: Path, seeds: int, example: dict) -> None:
    """Left: r_SS and r_KL over the updates, with and without the KL term. Right: an explanation by its KL."""
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.1, 1)})
    for method, colour, name in (("rlt", "tab:blue", "RLT"), ("lam0", "tab:red", "lambda = 0")):
        files = [folder / f"{method}-{i}" / "rl" / "metrics.jsonl" for i in range(seeds)]
        runs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        steps = [row["step"] for row in runs[0]]
        for key, style, what in (("r_ss", "-", "log-prob of the solution, r_SS"), ("r_kl", "--", "KL, r_KL")):
            values = np.array([[row[key] for row in rows] for rows in runs])
            left.plot(steps, values.mean(0), style, color=colour, label=f"{name}: {what}")
            left.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.12, lw=0)
    left.set(xlabel="update", ylabel="nats per token", title="The teacher's reward terms (band: all seeds)")
    left.legend(fontsize=8)
    d = np.zeros(-(-len(example["kl"]) // 4) * 4)
    d[: len(example["kl"])] = example["kl"]
    image = right.imshow(d.reshape(-1, 4), cmap="YlOrRd", vmin=0, vmax=d.max(initial=3.0), aspect="auto")
    for i, token in enumerate(example["tokens"]):
        right.text(i % 4, i // 4, f"{token}\n{d[i]:.2f}", ha="center", va="center", fontsize=9)
    right.set_xticks(range(4), ["start", "1 hop", "2 hops", "3 hops"])
    right.set(yticks=[], title="One explanation, each token coloured by its KL")
    figure.colorbar(image, ax=right, label="log teacher - log student")


# --- looking at explanations ---


def explain(teacher, student, examples: list[Example], task: Task, given: bool = False) -> list[dict]:
    """Score one explanation of each example, sampled or `given` as e.t, and spell out what each token got."""
    if given:
        close = task.fmt.explanation[1] + task.fmt.end_of_turn
        completions = task.ids([e.t.removeprefix(task.fmt.gap) + close for e in examples])
    else:
        uniforms = torch.rand(len(examples), task.cfg.max_new, generator=task.run.generator("explain"))
        prompts = task.ids([task.fmt.teacher_prompt(e) for e in examples])
        completions = make_sampler(teacher, task)(prompts, uniforms, task.cfg.temperature)
    reward, parts, detail = rlt_reward(examples, completions, teacher, student, task)
    out = []
    for i, (e, row) in enumerate(zip(examples, detail["rows"], strict=True)):
        spell = lambda places, ids=row.student_ids: [task.tok.decode([ids[j]]) for j in places]  # noqa: E731
        x = {"question": e.q, "explanation": row.t}
        x |= {"tokens": spell(row.think_student), "solution": spell(row.solution)}
        x["kl"] = detail["d"][i, : len(x["tokens"])].tolist()
        x["l"] = detail["l"][i, : len(x["solution"])].tolist()
        x |= {k: float(v[i]) for k, v in ({"reward": reward} | parts).items()}
        grams = {e.s.strip()[j : j + 4] for j in range(max(1, len(e.s.strip()) - 3))}
        x["dearest"] = int(np.argmax(x["kl"])) if x["kl"] else 0
        out.append(x | {"leak": sum(g in row.t for g in grams) / len(grams)})
    return out


def describe(x: dict, cfg: Config) -> str:
    """One scored explanation as text; on a terminal the background darkens with the cost."""

    def cells(tokens: list[str], numbers: list[float], worst: float) -> str:
        shades, texts = (231, 230, 229, 222, 215, 209), []
        for token, v in zip(tokens, numbers, strict=True):
            text = f"{token.strip() or repr(token)[1:-1]} {v:+.2f}"
            shade = shades[int(min(max(v / worst, 0), 1) * 5)]
            texts.append(f"\033[48;5;{shade};30m{text}\033[0m" if sys.stdout.isatty() else text)
        return " | ".join(texts)

    place = x["dearest"] / max(1, len(x["kl"]) - 1)
    r_kl = f"r_KL {x['r_kl']:.3f} = mean {x['kl_mean']:.3f} + {cfg.alpha} max {x['kl_max']:.2f}"
    penalty = "" if x["closed"] else f" {cfg.penalty:+} (not closed)"
    lines = (
        f"question     {x['question'].strip()}",
        f"explanation  {x['explanation'].strip()}",
        "what each of its tokens costs, log teacher - log student (d_j)",
        f"  {cells(x['tokens'], x['kl'], 3.0)}",
        "what the student gives each token of the solution (l_k)",
        f"  {cells(x['solution'], x['l'], -3.0)}",
        f"r_SS {x['r_ss']:.3f}; {r_kl}; reward {x['reward']:.3f} = r_SS - {cfg.lam} r_KL{penalty}",
        f"the dearest token stands {place:.0%} into t; t holds {x['leak']:.0%} of the solution's 4-grams",
    )
    return "\n".join(lines)


def newest(cfg: Config, run: Run) -> tuple[LogProbLM, LogProbLM, Task, list[Example]]:
    """Teacher, student, task and problems for --show and --score, as trained in the run folder, if so."""
    if cfg.teacher:
        data = replace(cfg, shard=False, data=cfg.score or cfg.data, holdout=0)
        task, lm, student, examples, _ = text_task(data, run)
        trained = run.folder / "teacher"
        run.print(f"teacher: {trained if trained.exists() else f'{cfg.teacher}, not trained yet'}")
        if trained.exists():
            lm, _ = common.load_lm(str(trained))
        return place(lm, task, False), place(student, task, False), task, examples
    task, trained = hop_task(cfg, run), run.folder / "rlt-0" / "rl" / "checkpoint.pt"
    if not trained.exists():
        raise UserError(f"no teacher in {run.folder}: train one without --show or --score, or give --teacher")
    teacher, student = (hop_weights(which, run.folder, task) for which in ("warm", "base"))
    teacher.load_state_dict(torch.load(trained, map_location=run.device, weights_only=True)["state"]["model"])
    return teacher, student, task, hop_problems(cfg, 4, "show")


def score_file(cfg: Config, run: Run) -> None:
    """Rank the traces in a .jsonl by the reward; print the best ten with their dearest step, write all."""
    rows = common.read_jsonl(cfg.score, ("question", "solution", "reasoning_trace"))
    teacher, student, task, _ = newest(cfg, run)
    padded, found = pad if cfg.teacher else str, []
    examples = [Example(r["question"], padded(r["solution"]), padded(r["reasoning_trace"])) for r in rows]
    try:
        for i in range(0, len(examples), 64):
            found += explain(teacher, student, examples[i : i + 64], task, given=True)
    except ValueError as e:
        raise UserError(f"{cfg.score}: {e}; for ordinary text give --teacher and --student") from None
    order = np.argsort([-x["reward"] for x in found], kind="stable").tolist()
    for i in order[:10]:
        x, j = found[i], found[i]["dearest"]
        words = [*x["tokens"][max(0, j - 8) : j], " >>", *x["tokens"][j : j + 1], "<<"]
        step = " ".join("".join(words).split())
        numbers = f"reward {x['reward']:.3f}, r_SS {x['r_ss']:.3f}, r_KL {x['r_kl']:.3f}"
        run.print(f"row {i + 1}: {numbers}; dearest token {x['kl_max']:.2f}: {step}")
    kept = ("reward", "r_ss", "r_kl", "kl_mean", "kl_max", "length", "leak")
    ranked = [rows[i] | {"rank": n + 1} | {k: found[i][k] for k in kept} for n, i in enumerate(order)]
    lines = [json.dumps(common.finite_or_null(r)) + "\n" for r in ranked]
    target = Path(cfg.score).with_suffix(".scored.jsonl")
    if run.is_main:
        common.write_atomic(target, "".join(lines).encode())
    run.print(f"all {len(rows)} in {target}")


# --- the study on real models: the stages one after the other on all ranks ---


def text_task(cfg: Config, run: Run) -> tuple[Task, nn.Module, nn.Module, list[Example], str]:
    """Task, teacher, frozen student, the problems that fit and the student's system prompt.

    UserError where models or data do not go together.
    """
    rows, system = load_examples(cfg.data, cfg.seed)
    dtype = torch.bfloat16 if cfg.shard else torch.float32
    lm, tok = common.load_lm(cfg.teacher, dtype)
    student, student_tok = copy.deepcopy(lm), tok
    if cfg.student != "self":
        student, student_tok = common.load_lm(cfg.student, dtype)
    fmt, judged = chat_format(tok, system), cfg.bench or cfg.data
    task = Task(cfg, run, tok, fmt, solves_countdown if judged == "countdown" else same_boxed)
    probe = [make(rows[0], pad("So 12 + 30 = 42."))[0] for make in (fmt.teacher, fmt.student)]
    if (
        task.ids(probe) != replace(task, tok=student_tok).ids(probe)
        or tok.get_vocab() != student_tok.get_vocab()
    ):
        raise UserError("--teacher and --student tokenize differently; d_j compares the same tokens in both")
    fitting, mute = [], 0
    for e in rows:
        text, _, span, _ = fmt.student(e, fmt.gap)
        (ids_t, _), (ids_s, offsets) = task.encode([fmt.teacher_prompt(e), text])
        if not len(tokens_in_span(offsets, *span)):
            mute += 1  # no token of the solution lies between its tags
        elif max(len(ids_t), len(ids_s)) + cfg.max_new + 8 <= cfg.context:
            fitting.append(e)
    dropped = f"{len(rows) - len(fitting) - mute} dropped, beyond --context {cfg.context}"
    run.print(f"{len(fitting)} problems; {dropped}" + (f"; {mute} without a token to score" if mute else ""))
    if len(fitting) <= cfg.holdout:
        raise UserError(f"{cfg.data}: no problem is left to train on beside --holdout {cfg.holdout}")
    return task, lm, student, fitting, system


def text_study(cfg: Config, run: Run) -> None:
    """Warm-up, RL, collection, distillation, evaluation, as cfg.stages says; --resume keeps finished ones."""
    if cfg.prompts % run.world_size:
        raise UserError(f"--prompts {cfg.prompts} is no multiple of the {run.world_size} ranks")
    if min(cfg.warmup_batch, cfg.distil_batch) < run.world_size:
        raise UserError(f"--warmup_batch and --distil_batch must be at least the {run.world_size} ranks")
    if cfg.exact_kl and cfg.shard:
        raise UserError("--exact_kl needs whole models, so not with --shard")
    task, lm, student, examples, system = text_task(cfg, run)
    heldout, examples = examples[: cfg.holdout], examples[cfg.holdout :]
    problems = benchmark(cfg.bench, heldout, cfg) if "eval" in cfg.stages else []
    teacher, student = place(lm, task, trainable=True), place(student, task, trainable=False)
    numbers, corpora, part = {}, {}, examples[: cfg.traces]
    if "warmup" in cfg.stages:
        warm_up(teacher, examples, replace(task, run=run.stage("warmup")))
    if "baselines" in cfg.stages:
        corpora["the corpus"] = [e for e in part if e.t]
        before = replace(task, run=run.stage("before-rl"))
        corpora["the teacher before RL"] = collect(teacher, student, part, before)
    if "rl" in cfg.stages:
        numbers = train_grpo(teacher, examples, "rlt", student, replace(task, run=run.stage("rl")))
        export(teacher, task, "teacher")
        rows = [{"": k, "mean": float(v)} for k, v in numbers.items() if "per_s" not in k]
        run.table(rows, "RL, last quarter of the updates")
    one = explain(teacher, student, (heldout or examples)[:1], task)
    run.print("\n" + describe(one[0], cfg))
    if "collect" in cfg.stages:
        corpora["RLT"] = collect(teacher, student, part, task)
    elif "distil" in cfg.stages:
        corpora["RLT"] = read_traces(run.folder / "traces.jsonl")
    del teacher, student, lm
    if "distil" in cfg.stages or problems:
        distilled = {k: v for k, v in corpora.items() if v} if "distil" in cfg.stages else {}
        text_students(distilled, problems, examples, system, task)
    updates = {"updates_per_s": cfg.updates / numbers["rl_seconds"]} if numbers else {}
    run.finish(**{k: v for k, v in numbers.items() if "per_s" in k or k == "mfu"}, **updates)


def text_students(
    corpora: dict, problems: list[Example], pool: list[Example], system: str, task: Task
) -> None:
    """Distil the learner on each corpus, train it by correctness RL too ("baselines"), compare by problem."""
    cfg, run, accuracies = task.cfg, task.run, {}
    name = cfg.teacher if cfg.learner == "self" else cfg.learner
    for source in ("nothing", *(["correctness RL"] if "baselines" in cfg.stages else []), *corpora):
        lm, tok = common.load_lm(name, torch.bfloat16 if cfg.shard else torch.float32)
        stage = replace(
            task, run=run.stage(f"student-{source.replace(' ', '-')}"), tok=tok, fmt=chat_format(tok, system)
        )
        learner = place(lm, task, trainable=True)
        stage.run.sharded = task.run.sharded
        if source == "correctness RL":
            train_grpo(learner, pool, "sparse", None, stage)
        elif source in corpora:
            distil(learner, corpora[source], stage, cfg.distil_steps)
        if source == "RLT":
            export(learner, replace(stage, run=run), "distilled")
        if problems:
            accuracies[source] = accuracy(learner, problems, stage, cfg.eval_temperature, cfg.eval_samples)
    if problems:
        how = f"temperature {cfg.eval_temperature}, top_p {cfg.eval_top_p}, at most {cfg.eval_new} tokens"
        table = [
            {"student of": k, f"avg@{cfg.eval_samples}": common.mean_se(v.tolist())}
            for k, v in accuracies.items()
        ]
        run.table(table, f"{cfg.bench or cfg.data}: {len(problems)} problems, +- s.e. over problems, {how}")
    for source in [k for k in accuracies if k != "RLT" and "RLT" in accuracies]:
        text = f"a student of RLT beats a student of {source}"
        run.claim(text, accuracies["RLT"], accuracies[source])


def export(model: LogProbLM, task: Task, name: str) -> None:
    """Write a model and its tokenizer as a Hugging Face folder in the run folder."""
    state = {}
    for name_, whole in full_weights(model.lm):
        if task.run.is_main:
            state[name_] = whole.detach().cpu()
    if task.run.is_main:
        model.lm.save_pretrained(task.run.folder / name, state_dict=state)
        task.tok.save_pretrained(task.run.folder / name)
    task.run.barrier()


# --- sizes without weights ---


def dry_run(cfg: Config, run: Run) -> None:
    """Print parameters, memory on each GPU, FLOPs and steps of a configuration without weights or data."""
    size = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    if not cfg.teacher:
        with torch.device("meta"):
            n, runs = (
                size(hop_model(cfg)),
                6 * cfg.seeds,
            )  # RL: RLT, lambda = 0, sparse, cold start, and two in the control
        tokens = cfg.updates * cfg.prompts * cfg.group * cfg.max_new
        return run.print(f"{n:,} parameters; {runs} runs of at most {cfg.updates} updates, {tokens:,} tokens")
    teacher = common.meta_model(cfg.teacher)
    student = teacher if cfg.student == "self" else common.meta_model(cfg.student)
    c, n, gpus = teacher.config, size(teacher), run.world_size if run.world_size > 1 or not cfg.shard else 8
    # a token's keys and values in bfloat16
    kv = 4 * c.num_hidden_layers * c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    parts = {"teacher: fp32 weights, gradients and AdamW": 16 * n / gpus, "reference: bf16": 2 * n / gpus}
    parts["reward student: bf16"] = 0 if cfg.offload else 2 * size(student) / gpus
    parts["rollout copy: bf16, whole"] = 2 * n
    parts["KV cache of a sampling batch, 1k prompt"] = kv * cfg.sample_batch * (cfg.max_new + 1024)
    parts["layer inputs for the backward pass"] = 2 * cfg.micro_tokens * c.hidden_size * c.num_hidden_layers
    parts["sum"] = sum(parts.values())
    rows = [{"on each GPU": k, "GB": f"{v / 1e9:.1f}"} for k, v in parts.items()]
    run.table(rows, f"{cfg.config} on {gpus} GPUs: teacher {n:,} parameters, student {size(student):,}")
    tokens = cfg.prompts * cfg.group * cfg.max_new
    # sample 2N, policy 8N with recomputation, reference 2N, re-score 2N, student 2N
    flops = (14 * n + 2 * size(student)) * tokens
    seconds = flops / gpus / 989e12 / 0.4
    run.print(
        f"an update: up to {tokens:,} tokens, {flops:.1e} FLOP; {seconds:.0f} s on {gpus} H100, 40 % MFU"
    )
    run.print(f"steps: warm-up {cfg.warmup_steps}, RL {cfg.updates}, distillation {cfg.distil_steps}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if any(a.startswith("--teacher") for a in argv) and not any(a.startswith("--config") for a in argv):
        argv = ["--config", "text", *argv]  # a real model on a laptop wants the sizes of that rung
    cfg = common.parse_config(CONFIGS, argv)
    with Run(cfg, look=bool(cfg.show or cfg.score)) as run:
        if cfg.dry_run:
            dry_run(cfg, run)
        elif cfg.score:
            score_file(cfg, run)
        elif cfg.show:
            teacher, student, task, examples = newest(cfg, run)
            run.print(describe(explain(teacher, student, examples[:1], task)[0], cfg))
        elif cfg.teacher:
            text_study(cfg, run)
        else:
            hop_study(cfg, run)


if __name__ == "__main__":
    main()
