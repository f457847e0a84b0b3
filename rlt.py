"""Reinforcement-Learned Teachers (RLT): reward a teacher for explanations that a student can follow.

Cetin, Zhao, Tang, "Reinforcement Learning Teachers of Test Time Scaling", NeurIPS 2025, arXiv 2506.08388.

The claim. RL on correctness needs a model that already solves the task now and then, and yields solvers, while the
models it yields are mostly used as teachers. An RLT is given the question AND the solution, and is rewarded, densely,
for explanations that make the solution likely to a frozen student. Students distilled from its raw explanations beat
students of much larger reasoning models, and correctness RL that starts from them gets further.

The method, q question, s solution, t explanation ("think"); teacher pi_theta, frozen student pi_S, temperature tau:
  eq. (1)  r_SS = mean_k l_k + alpha min_k l_k,  l_k = log pi_S(s_k | q, t, s_<k)              can the student solve it?
  eq. (2)  r_KL = mean_j d_j + alpha max_j d_j,  d_j = log pi_theta(t_j | q, s, t_<j) - log pi_S(t_j | q, t_<j)
           is each step natural to somebody who does not see s?
  eq. (3)  r = r_SS - lambda r_KL + penalty [closing tag missing]
  eq. (4)  GRPO: A = (r - mean) / (std + 1e-4) in each group of G explanations of one question, then
           loss = - mean over explanations and their tokens of  A exp(lp - sg lp) - beta (e^rho - rho - 1),
           rho = log pi_ref - log pi_theta

How to run
  python rlt.py                                     the effect in miniature, against its baselines (2 CPU cores, < 5 min)
  python rlt.py --easy                              only the control: a task on which correctness RL needs no teacher
  python rlt.py --teacher M --student M --data F    real models and problems: M hub id, folder or .gguf, F a .jsonl
  python rlt.py --show ...                          print one explanation, token by token, with what each one costs
  python rlt.py --score traces.jsonl ...            rank any corpus of (question, solution, reasoning_trace) by the reward
  torchrun --nproc_per_node=8 rlt.py --config full  Qwen2.5-7B on Bespoke-Stratos-17k, the paper's setting
Ranks share the grid of runs in smoke, demo and gpu; with real models they share one run (FSDP2 with --shard).

Where this file departs from the paper and its code
- The paper's formula has a KL divergence; like its code, we use the log-ratio of the sampled token, at temperature tau in
  both models. --exact_kl sums over the vocabulary instead. Like its code, the reference model moves to the policy
  (0.9 of the way) every 32 updates, and r_SS is measured at temperature tau; the paper's formulas show neither.
- Tokens are aligned by character offsets, not by searching for their ids: a token that straddles a tag is left out. The
  code finds the explanation in the question when it only repeats the question.
- Log-softmax in float32 (the code: bfloat16). Pad tokens never enter the loss, groups of any size are batched.
- The teacher's system prompt is our own text with the same structure; warm-up makes the words irrelevant, the tags stay.
- Sampled tokens come from an inverse CDF of numbers that all ranks draw alike, so the number of ranks changes nothing.
- A non-finite loss or reward stops the run (the spec of record would skip the update up to three times).
- MATH answers are compared by a small normaliser in this file, not by SkyThought's grader.
- The demo's task, pointer chasing, is ours. It was chosen so that exploration fails (a first design, 4 chains instead of
  8, was solvable by correctness RL alone: --easy shows it). Only the paper's claim for that regime is tested.

Reading order: Config, the task, Format (the two prompts), rlt_reward, group_advantage and grpo_loss, train_grpo, main.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import json
import math
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import common
from common import Run, UserError


@dataclass
class Config(common.Config):
    # task
    teacher: str | None = (
        None  # model that becomes the teacher (hub id, folder, .gguf); none: the built-in task
    )
    student: str = (
        "self"  # frozen model that computes the reward, pi_S; self: the teacher before any training
    )
    learner: str = (
        "self"  # model that is distilled on the explanations; self: the teacher before any training
    )
    data: str = (
        ""  # .jsonl with question, solution and maybe reasoning_trace; a Stratos or GSM8K hub id; countdown
    )
    bench: str = (
        ""  # what to evaluate on: math500, aime24, gpqa, countdown or a .jsonl; empty: held-out rows of data
    )
    holdout: int = 0  # rows of data kept for evaluation
    easy: bool = False  # only the control: 4 chains, a task that correctness RL solves without a teacher
    symbols: int = 20  # built-in task: symbols in the array (M)
    chains: int = 8  # built-in task: start symbols to follow (W)
    p_write: float = 0.45  # built-in task: chance that a corpus trace writes an intermediate symbol
    width: int = 64  # built-in task: model width
    heads: int = 4  # built-in task: attention heads
    textbook_steps: int = 500  # built-in task: at most so many steps with every symbol written
    web_steps: int = 250  # built-in task: steps on corpus traces
    base_lr: float = 4e-3  # built-in task: learning rate of pre-training
    base_check: bool = True  # built-in task: stop unless the base model follows single hops
    seeds: int = 3  # RL and distillation seeds of each row of the table, on one base model
    # warm-up (SFT of the teacher in its own format)
    warmup: bool = True  # fine-tune the teacher on the corpus traces first
    warmup_steps: int = 40  # optimizer steps
    warmup_batch: int = 64  # texts a step
    warmup_lr: float = 2e-3  # peak of a cosine with 5 % warm-up
    # reinforcement learning
    updates: int = 40  # optimizer steps, one a batch of completions: strictly on-policy
    prompts: int = 8  # questions an update (P)
    group: int = 16  # completions a question (G)
    max_new: int = 64  # tokens of a completion at most
    temperature: float = 1.0  # of sampling and of every log-prob (tau)
    lr: float = 1e-3  # AdamW, constant
    beta: float = 0.04  # weight of the KL to the reference model
    sync_every: int = 32  # updates between two moves of the reference model
    sync_mix: float = 0.9  # how far it moves to the policy
    alpha: float = 0.01  # weight of the min in r_SS and of the max in r_KL
    lam: float = 3.0  # weight of r_KL (lambda); 0: the ablation
    penalty: float = -1.0  # added to the reward when the closing tag is missing
    exact_kl: bool = False  # d_j summed over the vocabulary instead of at the sampled token (ablation)
    retokenize: bool = False  # score the re-encoded text as the paper's code does, not the sampled tokens
    # distillation
    traces: int = 512  # explanations to distil from
    distil_steps: int = 100  # optimizer steps
    distil_batch: int = 64  # texts a step
    distil_lr: float = 1e-3  # peak of a cosine with 10 % warm-up
    cold_traces: int = 64  # explanations for the cold start of correctness RL
    cold_steps: int = 30  # distillation steps for it
    cold_updates: int = 20  # updates of correctness RL after it
    # evaluation
    eval_problems: int = 512  # fresh problems
    eval_samples: int = 1  # answers a problem at eval_temperature (avg@k)
    eval_temperature: float = 0.7  # beside greedy answers
    eval_top_p: float = 1.0  # nucleus of the sampled answers
    eval_new: int = 64  # tokens of an answer at most
    # machine
    context: int = 128  # longest text, tokens; rows that cannot fit are dropped and counted
    micro_tokens: int = 16384  # padded tokens of one forward and backward pass
    sample_batch: int = 1024  # sequences that are decoded together on a rank
    sampler: Literal["hf", "vllm"] = "hf"  # hf: in-script decoding; vllm: an engine a GPU (extra "vllm")
    shard: bool = False  # FSDP2 over the ranks for teacher, reference and student
    offload: bool = False  # keep the frozen models' shards in CPU memory
    # what to do
    stages: tuple[str, ...] = (
        "warmup",
        "rl",
        "collect",
        "distil",
        "eval",
    )  # with real models: which parts to run
    show: bool = False  # print one scored explanation of the newest teacher in the run folder, then exit
    score: str = ""  # .jsonl of question, solution, reasoning_trace to rank by the reward, then exit

    def __post_init__(self):
        if self.group < 2:
            raise ValueError("--group must be at least 2: the advantage compares completions of one question")
        if self.chains > self.symbols or self.symbols > len(SYMBOLS):
            raise ValueError(f"--chains <= --symbols <= {len(SYMBOLS)} is needed")
        unknown = set(self.stages) - {"warmup", "rl", "collect", "distil", "eval"}
        if unknown:
            raise ValueError(f"--stages: unknown {', '.join(sorted(unknown))}")


SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-"

DEMO = Config(workers=2, log_every=10, save_every=1000)
SMALL = Config(
    teacher="HuggingFaceTB/SmolLM2-135M-Instruct", data="openai/gsm8k", holdout=256, temperature=0.7, lr=1e-6, updates=100,
    max_new=512, eval_new=512, context=2048, warmup_lr=1e-5, warmup_batch=16, warmup_steps=200, distil_lr=1e-5,
    distil_batch=32, distil_steps=200, traces=2000, eval_problems=256, retokenize=True, log_every=1, save_every=20,
    sample_batch=128,
)  # fmt: skip
CONFIGS = {
    "smoke": dataclasses.replace(
        DEMO, symbols=6, chains=2, seeds=2, width=32, textbook_steps=20, web_steps=10, base_check=False, warmup_steps=3,
        updates=3, prompts=2, group=4, traces=8, distil_steps=3, distil_batch=8, warmup_batch=8, cold_traces=4,
        cold_steps=2, cold_updates=2, eval_problems=8, log_every=1, workers=1,
    ),
    "demo": DEMO,
    "gpu": dataclasses.replace(
        DEMO, symbols=64, chains=16, width=256, heads=8, textbook_steps=3000, web_steps=1000, base_lr=1e-3, prompts=16,
        group=64, updates=125, max_new=112, eval_new=112, context=256, lr=3e-4, warmup_lr=1e-3, distil_lr=5e-4, traces=2048,
        distil_steps=300, micro_tokens=262144, workers=1, compile=True,
    ),
    "text": dataclasses.replace(
        SMALL, updates=4, prompts=2, group=4, max_new=64, eval_new=96, holdout=8, eval_problems=8, traces=16, warmup_steps=4,
        warmup_batch=4, distil_steps=4, distil_batch=4, micro_tokens=2048, context=1024, stages=("warmup", "rl"),
    ),
    "small": SMALL,
    "full": dataclasses.replace(
        SMALL, teacher="Qwen/Qwen2.5-7B-Instruct", student="bespokelabs/Bespoke-Stratos-7B", learner="Qwen/Qwen2.5-7B-Instruct",
        data="bespokelabs/Bespoke-Stratos-17k", bench="math500", updates=125, prompts=16, group=64, max_new=16384,
        eval_new=32768, eval_top_p=0.95, context=32768, warmup_steps=10400, distil_batch=96, distil_steps=522, traces=16710,
        eval_problems=500, shard=True, save_every=25, sample_batch=32, micro_tokens=32768, holdout=0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A question, its solution and, where the corpus has one, a reasoning trace (texts; s and t with their paddings)."""

    q: str
    s: str
    t: str | None = None


# --- the built-in task: pointer chasing -------------------------------------------------------------------------------
# q is an array f (a permutation of M symbols) and W start symbols, s the W symbols f(f(f(x))), t for each start the chain
# x f(x) f(f(x)) f(f(f(x))). An intermediate symbol may be elided, "~". One hop is one attention lookup; two at once are
# beyond a model of two layers, so an elision is a leap that nobody at this size can follow.


def make_problems(
    n: int, symbols: int, chains: int, p_write: float, generator: torch.Generator
) -> list[Example]:
    """n problems with a corpus trace each that writes every intermediate symbol with probability p_write."""
    f = torch.rand(n, symbols, generator=generator).argsort(1)
    x = [torch.rand(n, symbols, generator=generator).argsort(1)[:, :chains]]
    for _ in range(3):
        x.append(f.gather(1, x[-1]))
    states = torch.stack(x, 2)  # (n, W, 4)
    elided = torch.rand(n, chains, 4, generator=generator) >= p_write
    elided[..., [0, 3]] = False
    alphabet = np.array([*SYMBOLS[:symbols], "~"])
    spell = lambda index: ["".join(row) for row in alphabet[index.flatten(1).numpy()]]  # noqa: E731
    columns = spell(torch.cat([f, x[0]], 1)), spell(x[3]), spell(states.masked_fill(elided, symbols))
    return [Example(*row) for row in zip(*columns, strict=True)]


def hop_tokenizer(symbols: int) -> common.CharTokenizer:
    """One symbol, one token; `$` ends a turn."""
    return common.CharTokenizer(SYMBOLS[:symbols] + "~?!()[]{}$", eos="$")


def hop_model(cfg: Config, vocab: int) -> nn.Module:
    """A GPT-2 of two layers with embeddings large enough that it learns to copy and look up."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = GPT2Config(
        vocab_size=vocab, n_positions=cfg.context, n_embd=cfg.width, n_layer=2, n_head=cfg.heads, n_inner=2 * cfg.width,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(size)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(
                p, std=0.5 if "wte" in name or "wpe" in name else 0.06 if "lm_head" in name else 0.07
            )
    return model


@torch.no_grad()
def hop_accuracy(model: LogProbLM, tok, fmt: Format, examples: list[Example]) -> dict[str, float]:
    """Teacher-forced accuracy of the student format: starts, each single hop, and the last symbol after an elision."""
    ids = torch.tensor(tok([fmt.student(e, e.t)[0] for e in examples])["input_ids"], device=model.device)
    first = len(fmt.chat(fmt.student_system, examples[0].q)) + 1
    logits = model.lm(ids).logits[:, first - 1 : first - 1 + len(examples[0].t)]
    elision = tok.index["~"]
    logits[..., elision] = -torch.inf  # which symbol, if it has to be one
    truth = ids[:, first : first + len(examples[0].t)].unflatten(1, (-1, 4))  # (n, W, 4)
    right, written = (logits.argmax(-1).unflatten(1, (-1, 4)) == truth).float(), truth != elision
    after = {f"hop {k}": right[..., k][written[..., k] & written[..., k - 1]] for k in (1, 2, 3)}
    after |= {"starts": right[..., 0], "leap": right[..., 3][~written[..., 2]]}
    return {k: v.mean().item() for k, v in after.items()}


# --- text tasks -------------------------------------------------------------------------------------------------------


def pad(text: str) -> str:
    """Text between blank lines, as Stratos has it inside its tags."""
    return f"\n\n{text.strip()}\n\n"


def load_examples(cfg: Config, seed: int) -> list[Example]:
    """Read cfg.data: a .jsonl, a Stratos or GSM8K data set (hub id or folder), or `countdown`. Raises UserError."""
    if not cfg.data:
        raise UserError("--data is needed with --teacher: a .jsonl with question and solution on each line")
    if cfg.data == "countdown":
        return countdown(2048, seed)
    if cfg.data.endswith(".jsonl"):
        rows = common.read_jsonl(cfg.data, ("question", "solution"))
        return [
            Example(r["question"], pad(r["solution"]), pad(t) if (t := r.get("reasoning_trace")) else None)
            for r in rows
        ]
    return read_dataset(load_hub(cfg.data), cfg.data)


def load_hub(name: str, split: str = "train", subset: str | None = None):
    """A `datasets` table from a hub id or a local folder; UserError says what to install or download."""
    try:
        import datasets
    except ImportError:
        raise UserError(f'{name}: pip install -e ".[lm]", or give --data file.jsonl') from None
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as e:  # the library raises a dozen kinds
        why = str(e).splitlines()[0][:120]
        raise UserError(
            f"{name}: not a local folder and not to be had from the hub ({why}); --data takes a .jsonl"
        ) from None


def read_dataset(rows, name: str) -> list[Example]:
    """Examples from rows in Stratos form (system, conversations) or GSM8K form (question, answer)."""
    columns = set(rows.column_names)
    if {"system", "conversations"} <= columns:
        if len(set(rows["system"])) != 1:
            raise UserError(f"{name}: the column system is not constant, so there is no one student prompt")
        block = re.compile(
            r"<\|begin_of_thought\|>(.*)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*)<\|end_of_solution\|>",
            re.S,
        )
        examples = []
        for i, turns in enumerate(rows["conversations"]):
            found = block.search(turns[1]["value"])
            if found is None:
                raise UserError(f"{name}, row {i}: field conversations has no thought and solution block")
            examples.append(Example(turns[0]["value"], found[2], found[1]))
        return examples
    if {"question", "answer"} <= columns:
        split = [(r["question"], *r["answer"].rsplit("####", 1)) for r in rows]
        return [Example(q, pad(rf"The answer is \boxed{{{a.strip()}}}"), pad(t)) for q, t, a in split]
    raise UserError(f"{name}: neither Stratos columns (system, conversations) nor GSM8K's (question, answer)")


def countdown(n: int, seed: int) -> list[Example]:
    """n Countdown problems of 3 or 4 numbers with a solution from exhaustive search (the zero-shot transfer task)."""
    rng, examples = np.random.default_rng(seed), []
    while len(examples) < n:
        numbers = [int(x) for x in rng.integers(1, 100, rng.integers(3, 5))]
        reachable = [
            (v, e) for v, e in countdown_values(tuple(numbers)) if v.denominator == 1 and 10 <= v < 100
        ]
        if reachable:
            target, expression = reachable[rng.integers(len(reachable))]
            q = f"Using the numbers {numbers} each exactly once and + - * /, make {target}. Give the expression in \\boxed{{}}."
            examples.append(Example(q, pad(rf"\boxed{{{expression}}}")))
    return examples


def countdown_values(numbers: tuple[int, ...]) -> list[tuple[Fraction, str]]:
    """All values that use every number once, one expression a value."""
    todo, values = [[(Fraction(x), str(x)) for x in numbers]], {}
    while todo:
        terms = todo.pop()
        if len(terms) == 1:
            values.setdefault(*terms[0])
            continue
        for i, j in product(range(len(terms)), repeat=2):
            if i == j:
                continue
            (a, x), (b, y) = terms[i], terms[j]
            rest = [t for k, t in enumerate(terms) if k not in (i, j)]
            todo += [[*rest, (a - b, f"({x} - {y})")], *([[*rest, (a / b, f"({x} / {y})")]] if b else [])]
            if i < j:
                todo += [[*rest, (a + b, f"({x} + {y})")], [*rest, (a * b, f"({x} * {y})")]]
    return list(values.items())


# --- the two prompts --------------------------------------------------------------------------------------------------

TEACHER_SYSTEM = (
    "You explain how problems are solved. Your answer has two sections. The Solution section states the final solution "
    "between <|begin_of_solution|> and <|end_of_solution|>. The Explanation section, between <|begin_of_explanation|> and "
    "<|end_of_explanation|>, sets out the systematic thinking that leads from the question to that solution: analysing "
    "the problem, working through each step, checking it, and reconsidering where needed."
)
STUDENT_SYSTEM = (
    "You solve problems by thinking them through. Your answer has two sections. The Thought section, between "
    "<|begin_of_thought|> and <|end_of_thought|>, sets out your reasoning step by step. The Solution section, between "
    "<|begin_of_solution|> and <|end_of_solution|>, states the final solution, its result in \\boxed{}."
)


@dataclass(frozen=True)
class Format:
    """How q, s and t become the teacher's and the student's text. Spans come from concatenation: the system prompts
    mention the tags, so a search would find those first."""

    chat: Callable[[str, str], str]  # (system, user) -> text up to the assistant's turn
    end_of_turn: str
    teacher_system: str = TEACHER_SYSTEM
    student_system: str = STUDENT_SYSTEM
    solution: tuple[str, str] = ("<|begin_of_solution|>", "<|end_of_solution|>")
    thought: tuple[str, str] = ("<|begin_of_thought|>", "<|end_of_thought|>")
    explanation: tuple[str, str] = ("<|begin_of_explanation|>", "<|end_of_explanation|>")
    gap: str = "\n\n"

    def teacher(self, e: Example, t: str) -> tuple[str, tuple[int, int], int]:
        """Teacher text, character span of t, and where the generated part begins (t starts with the prefilled gap)."""
        head = self.chat(self.teacher_system, e.q) + self.solution[0] + e.s + self.solution[1] + self.gap
        head += self.explanation[0]
        span = (len(head), len(head) + len(t))
        return head + t + self.explanation[1] + self.end_of_turn, span, len(head) + len(self.gap)

    def student(self, e: Example, t: str) -> tuple[str, tuple[int, int], tuple[int, int], int]:
        """Student text, character spans of t and s, and where the assistant's turn begins."""
        turn = self.chat(self.student_system, e.q)
        head = turn + self.thought[0]
        middle = head + t + self.thought[1] + self.gap + self.solution[0]
        spans = (len(head), len(head) + len(t)), (len(middle), len(middle) + len(e.s))
        return middle + e.s + self.solution[1] + self.end_of_turn, *spans, len(turn)

    def teacher_prompt(self, e: Example) -> str:
        """What the teacher continues: question and solution are given, the explanation is opened."""
        text, _, begin = self.teacher(e, self.gap)
        return text[:begin]

    def student_prompt(self, e: Example) -> str:
        """What a student continues: the question alone."""
        return self.chat(self.student_system, e.q)

    def split_completion(self, text: str) -> tuple[str, bool]:
        """(t, closed) of a teacher's completion: t ends at the first closing tag, or is everything when there is none."""
        t, tag, _ = text.partition(self.explanation[1])
        return self.gap + t, bool(tag)

    def answer(self, text: str) -> str:
        """The solution block of a student's text; empty if there is none."""
        found = text.rpartition(self.solution[0])
        return found[2].partition(self.solution[1])[0] if found[1] else ""


HOP_FORMAT = Format(lambda system, q: system + q, "$", "!", "?", ("[", "]"), ("(", ")"), ("{", "}"), "")


def chat_format(tok, student_system: str = STUDENT_SYSTEM) -> Format:
    """The Format of a chat model. Raises UserError if its template or tokenizer cannot carry the spans."""
    if not tok.is_fast:
        raise UserError(
            "the tokenizer has no fast version, so no character offsets: use a model that has one"
        )
    if tok.chat_template is None:
        sys.stderr.write("rlt.py: no chat template, using ChatML\n")
        tok.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )

    def chat(system: str, q: str) -> str:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": q}]
        return tok.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    tags = [tag for pair in (Format.solution, Format.thought, Format.explanation) for tag in pair]
    if special := [tag for tag in tags if tag in tok.all_special_tokens]:
        raise UserError(
            f"{special[0]} is a special token here and would vanish in decoding: use a model without it"
        )
    turns = [
        {"role": r, "content": c}
        for r, c in (("system", "S"), ("user", "Q"), ("assistant", "\n\nA <|x|>\n\n"))
    ]
    whole, head = tok.apply_chat_template(turns, tokenize=False), chat("S", "Q") + turns[2]["content"]
    if not whole.startswith(head) or len(whole) == len(head):
        raise UserError("the chat template changes the assistant's text, so that spans cannot be kept")
    return Format(chat, whole[len(head) :], student_system=student_system)


def tokens_in_span(offsets: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Indices of the tokens whose characters lie inside [begin, end): offsets (T, 2). Straddling tokens are out."""
    a, b = offsets[:, 0], offsets[:, 1]
    return np.flatnonzero((a >= begin) & (b <= end) & (b > a))


def token_offsets(tok, ids: list[int]) -> np.ndarray:
    """Character spans (T, 2) of sampled ids in their decoded text; tokens that share a character share a span."""
    spans, group, at = [], [], 0
    for i in ids:
        group.append(i)
        text = tok.decode(group, skip_special_tokens=True)
        if not text.endswith("\ufffd") or len(group) > 8:  # else a character is not complete yet
            spans += [(at, at + len(text))] * len(group)
            at, group = at + len(text), []
    return np.array(spans + [(at, at)] * len(group)).reshape(-1, 2)


# --- log-probs of a model, and the batches they are computed in -------------------------------------------------------


class LogProbLM(nn.Module):
    """A causal LM whose forward returns log-probs; sharding the whole keeps embeddings and head in FSDP's root unit."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, ids: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        """ids, mask (B, T), right-padded -> fp32 log-probs of the next tokens and entropies, both (B, T - 1)."""
        return common.token_logprobs(self.lm, ids, mask, temperature)


def micro_batches(lengths: list[int], budget: int, run: Run) -> list[np.ndarray]:
    """Length-sorted groups of indices whose padded size is at most `budget` tokens (one sequence at least).

    All ranks get equally many, since FSDP makes them meet in every forward pass: short lists end in empty groups.
    """
    groups, group = [], []
    for i in np.argsort(lengths, kind="stable"):
        if group and lengths[i] * (len(group) + 1) > budget:
            groups, group = [*groups, np.array(group)], []
        group.append(i)
    groups += [np.array(group)] if group else []
    return groups + [np.array([], int)] * (max(run.gather(len(groups))) - len(groups))


def collate(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask (B, T); masks come from lengths, so that a pad id may be a real token. None: a dummy."""
    sequences = sequences or [[0, 0]]
    lengths = torch.tensor([len(x) for x in sequences])
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    ids[mask] = torch.tensor([token for x in sequences for token in x])
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


@torch.no_grad()
def score(model: nn.Module, sequences: list[list[int]], cfg: Config, run: Run) -> Tensor:
    """Log-probs (N, T - 1) of every next token of N sequences at cfg.temperature, in micro-batches."""
    out = torch.zeros(len(sequences), max(map(len, sequences)) - 1, device=run.device)
    for group in micro_batches([len(x) for x in sequences], cfg.micro_tokens, run):
        ids, mask = collate([sequences[i] for i in group], run.device)
        with run.autocast():
            logp, _ = model(ids, mask, cfg.temperature)
        if len(group):
            out[torch.from_numpy(group).to(run.device), : logp.shape[1]] = logp
    return out


# --- the reward -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a kind of problem needs: its tokenizer, its two prompts and its judge of answers."""

    tok: object
    fmt: Format
    correct: Callable[[Example, str], bool]

    @property
    def eos(self) -> int:
        return self.tok.encode(self.fmt.end_of_turn, add_special_tokens=False)[0]

    def encode(self, texts: list[str]) -> list[tuple[list[int], np.ndarray]]:
        """Ids and character offsets (T, 2) of each text."""
        out = self.tok(texts, return_offsets_mapping=True, add_special_tokens=False)
        offsets = (np.array(o).reshape(-1, 2) for o in out["offset_mapping"])
        return list(zip(out["input_ids"], offsets, strict=True))


@dataclass
class Aligned:
    """One explanation in both contexts: the same tokens sit at `think_teacher` and `think_student`."""

    t: str
    closed: bool  # the closing tag was there
    canonical: bool  # the sampled ids are those that the text encodes to
    teacher_ids: list[int]
    student_ids: list[int]
    think_teacher: np.ndarray  # (J,)
    think_student: np.ndarray  # (J,)
    solution: np.ndarray  # (K,) positions of s in student_ids


def align(e: Example, completion: list[int], task: Task, retokenize: bool) -> Aligned:
    """Find the tokens of a sampled explanation in the teacher's and in the student's text.

    A text that encodes back to the sampled ids is scored as encoded. Another one is, too, if `retokenize`; else its
    sampled ids are set into both contexts. Should two encodings of t differ, the tokens that they share are kept.
    """
    t, closed = task.fmt.split_completion(task.tok.decode(completion, skip_special_tokens=True))
    text_t, span_t, begin = task.fmt.teacher(e, t)
    text_s, span_s, span_solution, _ = task.fmt.student(e, t)
    (ids_p, offsets_p), (ids_t, offsets_t), (ids_s, offsets_s) = task.encode([text_t[:begin], text_t, text_s])
    think_t, think_s = tokens_in_span(offsets_t, *span_t), tokens_in_span(offsets_s, *span_s)
    solution, sampled = tokens_in_span(offsets_s, *span_solution), ids_p + completion
    end = int(think_t[-1]) + 1 if len(think_t) else 0
    canonical = ids_t[:end] == sampled[:end]
    if not canonical and not retokenize:
        offsets = np.concatenate([offsets_p, begin + token_offsets(task.tok, completion)])
        ids_t, think_t = sampled, tokens_in_span(offsets, *span_t)
        edges = (offsets[think_t[0], 0], offsets[think_t[-1], 1]) if len(think_t) else (span_t[0], span_t[0])
        cut = [
            span_s[0] + x - span_t[0] for x in edges
        ]  # what lies outside the sampled tokens is encoded as text
        (before, _), (after, offsets_after) = task.encode([text_s[: cut[0]], text_s[cut[1] :]])
        ids_s = before + [sampled[i] for i in think_t] + after
        think_s = len(before) + np.arange(len(think_t))
        solution = (
            len(before) + len(think_t) + tokens_in_span(offsets_after, *(x - cut[1] for x in span_solution))
        )
    key_t = [(ids_t[i], *(offsets_t[i] - span_t[0])) for i in think_t] if retokenize else []
    key_s = [(ids_s[i], *(offsets_s[i] - span_s[0])) for i in think_s] if retokenize else []
    if key_t != key_s:
        shared = set(key_t) & set(key_s)
        think_t, think_s = think_t[[k in shared for k in key_t]], think_s[[k in shared for k in key_s]]
    return Aligned(t, closed, canonical, ids_t, ids_s, think_t, think_s, solution)


def at(logp: Tensor, positions: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens at `positions`, padded (B, L), and their mask: token i is predicted at position i - 1."""
    width = max(1, max(map(len, positions)))
    index = np.ones((len(positions), width), int)
    for row, p in zip(index, positions, strict=True):
        row[: len(p)] = p
    mask = torch.arange(width) < torch.tensor([len(p) for p in positions])[:, None]
    return logp.gather(1, torch.from_numpy(index - 1).to(logp.device)), mask.to(logp.device)


def reduce_scores(x: Tensor, mask: Tensor, alpha: float, kind: Literal["min", "max"]) -> Tensor:
    """mean + alpha * min (or max) over the masked tokens of each row: (B, L) -> (B,); NaN where a row has none."""
    mean = torch.where(mask, x, 0).sum(1) / mask.sum(1)
    extreme = (
        x.masked_fill(~mask, torch.inf).amin(1) if kind == "min" else x.masked_fill(~mask, -torch.inf).amax(1)
    )
    return mean + alpha * extreme


@torch.no_grad()
def exact_kl(teacher: LogProbLM, student: LogProbLM, rows: list[Aligned], cfg: Config, run: Run) -> Tensor:
    """KL(pi_theta || pi_S) over the vocabulary at each think token, (B, J): the paper's formula. Not for sharded models."""
    out = torch.zeros(len(rows), max(1, max(len(r.think_teacher) for r in rows)), device=run.device)
    for group in micro_batches([len(r.teacher_ids) for r in rows], cfg.micro_tokens, run):
        batch, hidden = [rows[i] for i in group], []
        for model, side in ((teacher, "teacher"), (student, "student")):
            ids, mask = collate([getattr(r, f"{side}_ids") for r in batch], run.device)
            h = model.lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            places = [torch.from_numpy(getattr(r, f"think_{side}") - 1).to(run.device) for r in batch]
            hidden.append(torch.cat([x[p] for x, p in zip(h, places, strict=True)]))
        kl = []
        for h_t, h_s in zip(*(h.split(1024) for h in hidden), strict=True):
            log_p, log_q = ((m.lm.get_output_embeddings()(h).float() / cfg.temperature).log_softmax(-1)
                            for m, h in ((teacher, h_t), (student, h_s)))  # fmt: skip
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        parts = torch.cat(kl).split([len(r.think_teacher) for r in batch])
        for i, part in zip(group, parts, strict=True):
            out[i, : len(part)] = part
    return out


def rlt_reward(
    examples: list[Example], completions: list[list[int]], teacher, student, task: Task, cfg: Config, run: Run
) -> tuple[Tensor, dict[str, Tensor], dict]:
    """Eqs. (1) to (3) for B explanations (lists of sampled ids) -> r (B,), its parts (B,) and the numbers per token.

    The student runs once: its pass gives both the solution's log-probs and its half of d. Nothing here has a gradient.
    """
    rows = [align(e, c, task, cfg.retokenize) for e, c in zip(examples, completions, strict=True)]
    logp_student = score(student, [r.student_ids for r in rows], cfg, run)
    solution, solution_mask = at(logp_student, [r.solution for r in rows])  # l_k: (B, K)
    student_think, think_mask = at(logp_student, [r.think_student for r in rows])  # (B, J)
    if cfg.exact_kl:
        d = exact_kl(teacher, student, rows, cfg, run)
    else:
        logp_teacher = score(teacher, [r.teacher_ids for r in rows], cfg, run)
        d = at(logp_teacher, [r.think_teacher for r in rows])[0] - student_think  # d_j: (B, J)
    closed = torch.tensor([r.closed for r in rows], device=run.device)
    r_ss = reduce_scores(solution, solution_mask, cfg.alpha, "min")  # eq. (1)
    r_kl = reduce_scores(d, think_mask, cfg.alpha, "max")  # eq. (2)
    r_kl = torch.where(
        think_mask.any(1), r_kl, 1 + cfg.alpha
    )  # an empty explanation counts 1 for mean and max
    reward = r_ss - cfg.lam * r_kl + cfg.penalty * ~closed  # eq. (3)
    length = think_mask.sum(1).float()
    parts = {
        "r_ss": r_ss,
        "r_kl": r_kl,
        "kl_mean": torch.where(think_mask, d, 0).sum(1) / length.clamp(min=1),
    }
    parts |= {
        "kl_max": d.masked_fill(~think_mask, -torch.inf).amax(1).nan_to_num(neginf=1.0),
        "length": length,
    }
    parts |= {
        "closed": closed.float(),
        "canonical": torch.tensor([float(r.canonical) for r in rows], device=run.device),
    }
    return reward, parts, {"rows": rows, "l": solution, "d": d, "student": student_think}


def correctness_reward(examples: list[Example], completions: list[list[int]], task: Task, run: Run):
    """The baseline's sparse reward: 1 where the answer in a student-format completion is right, else 0; (B,)."""
    texts = [task.tok.decode(c, skip_special_tokens=True) for c in completions]
    right = [float(task.correct(e, text)) for e, text in zip(examples, texts, strict=True)]
    return (
        torch.tensor(right, device=run.device),
        {"length": torch.tensor([float(len(c)) for c in completions])},
        {},
    )


# --- GRPO -------------------------------------------------------------------------------------------------------------


def group_advantage(reward: Tensor, group: int) -> Tensor:
    """(r - mean) / (std + 1e-4) in each group of `group` consecutive completions, unbiased std: (B,) -> (B,). Eq. (4)."""
    r = reward.view(-1, group)
    advantage = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    return torch.where(r.eq(r[:, :1]).all(1, keepdim=True), 0.0, advantage).flatten()


def grpo_loss(logp: Tensor, ref_logp: Tensor, advantage: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Eq. (4): logp, ref_logp, mask (B, T), advantage (B,) -> mean over rows of the mean over each row's own tokens."""
    rho = ref_logp - logp
    k3 = rho.exp() - rho - 1
    token_loss = -((logp - logp.detach()).exp() * advantage[:, None] - beta * k3)
    return (torch.where(mask, token_loss, 0).sum(1) / mask.sum(1).clamp(min=1)).mean()


@torch.no_grad()
def sync_ref(ref: nn.Module, policy: nn.Module, mix: float) -> None:
    """theta_ref <- mix * theta + (1 - mix) * theta_ref, on whatever shard of each is here."""
    for p_ref, p in zip(ref.parameters(), policy.parameters(), strict=True):
        p_ref.lerp_(p.to(p_ref.dtype), mix)


class Sampler:
    """Completions of the current policy. Sharded policies are copied into one bf16 model a GPU before each batch."""

    def __init__(self, policy: LogProbLM, task: Task, cfg: Config, run: Run):
        self.policy, self.eos, self.cfg, self.run, self.lm = policy, task.eos, cfg, run, policy.lm
        if run.sharded:
            with torch.device(run.device):
                self.lm = (
                    type(policy.lm)(policy.lm.config).to(torch.bfloat16 if run.amp else torch.float32).eval()
                )

    def refresh(self) -> None:
        """Bring the policy's weights to where the tokens are made, one parameter at a time."""
        if self.lm is not self.policy.lm:
            target = dict(self.lm.named_parameters())
            for name, full in full_weights(self.policy.lm):
                target[name].data.copy_(full)

    def __call__(
        self, prompts: list[list[int]], uniforms: Tensor, temperature: float, top_p=1.0
    ) -> list[list[int]]:
        """n = len(uniforms) / len(prompts) completions of each prompt (ids up to and including EOS), prompt by prompt."""
        n, out = len(uniforms) // len(prompts), [None] * len(uniforms)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        share = max(1, self.cfg.sample_batch // n)
        self.lm.eval()
        for part in (order[i : i + share] for i in range(0, len(order), share)):
            rows = [i * n + j for i in part for j in range(n)]
            with self.run.autocast():
                tokens, mask, _ = common.generate(
                    self.lm,
                    [prompts[i] for i in part],
                    uniforms[rows],
                    temperature,
                    top_p,
                    self.eos,
                    self.cfg.compile,
                )
            for row, ids, length in zip(rows, tokens.tolist(), mask.sum(1).tolist(), strict=True):
                out[row] = ids[:length]
        return out


class VLLMSampler:
    """The same from a vLLM engine on this rank's GPU, asleep while the models train (extra "vllm")."""

    def __init__(self, policy: LogProbLM, task: Task, cfg: Config, run: Run):
        try:
            import vllm
        except ImportError:
            raise UserError('--sampler vllm needs: pip install -e ".[vllm]"') from None
        self.policy, self.eos, self.vllm = policy, task.eos, vllm
        self.engine = vllm.LLM(
            cfg.teacher, dtype="bfloat16", max_model_len=cfg.context, seed=run.rank, enable_sleep_mode=True,
            distributed_executor_backend="external_launcher", gpu_memory_utilization=0.4, generation_config="vllm",
        )  # fmt: skip

    def refresh(self) -> None:
        self.engine.wake_up()
        model = self.engine.llm_engine.model_executor.driver_worker.model_runner.model
        model.load_weights(full_weights(self.policy.lm))
        self.engine.reset_prefix_cache()

    def __call__(self, prompts, uniforms, temperature, top_p=1.0) -> list[list[int]]:
        n, longest = len(uniforms) // len(prompts), uniforms.shape[1]
        settings = [
            self.vllm.SamplingParams(
                n=n, temperature=temperature, top_p=top_p, top_k=0, repetition_penalty=1.0, max_tokens=longest,
                stop_token_ids=[self.eos], skip_special_tokens=False, detokenize=False, seed=int(uniforms[i * n, 0] * 2**31),
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        outputs = self.engine.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
        self.engine.sleep(level=1)
        return [list(c.token_ids) for o in outputs for c in o.outputs]


def full_weights(lm: nn.Module):
    """(name, whole tensor) of each parameter; a sharded one is gathered while it is looked at, on all ranks alike."""
    for name, p in lm.named_parameters():
        yield name, p.full_tensor() if hasattr(p, "full_tensor") else p


def epoch_indices(step: int, batch: int, n: int, seed: int) -> list[int]:
    """The rows of batch `step` when n rows are walked through in a new order every epoch: a function of the step."""
    places = range(step * batch, (step + 1) * batch)
    orders = {
        e: torch.randperm(n, generator=torch.Generator().manual_seed(seed + e))
        for e in {i // n for i in places}
    }
    return [int(orders[i // n][i % n]) for i in places]


def train_grpo(
    policy: LogProbLM, examples: list[Example], kind: str, student, task: Task, cfg: Config, run: Run
) -> dict:
    """cfg.updates steps of GRPO on `policy`, in place. One loop for the three rewards.

    kind "rlt": teacher prompts, reward eq. (3) from the frozen `student` (lambda = 0 included); kind "sparse": student
    prompts, reward 1 for a right answer. Returns means over the last quarter and the speed.
    """
    reference = copy_frozen(policy, cfg, run)
    model = policy if run.sharded else run.wrap(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, (0.9, 0.999), weight_decay=0.0)
    sampler = (VLLMSampler if cfg.sampler == "vllm" else Sampler)(policy, task, cfg, run)
    prompt = task.fmt.teacher_prompt if kind == "rlt" else task.fmt.student_prompt
    share, history = cfg.prompts // run.world_size, {"names": [], "rows": [], "tokens": 0}
    mine = slice(run.rank * share, (run.rank + 1) * share)
    for step in run.steps(
        cfg.updates, model=policy, optimizer=optimizer, reference=reference, history=history
    ):
        uniforms = torch.rand(cfg.prompts, cfg.group, cfg.max_new, generator=run.generator("sample"))[
            mine
        ].flatten(0, 1)
        batch = [
            examples[i] for i in epoch_indices(step, cfg.prompts, len(examples), run.stream("order"))[mine]
        ]
        prompts = [ids for ids, _ in task.encode([prompt(e) for e in batch])]
        with run.timed("sample"):
            sampler.refresh()
            completions = sampler(prompts, uniforms, cfg.temperature)
        batch, prompts = ([x for x in rows for _ in range(cfg.group)] for rows in (batch, prompts))
        with run.timed("reward"):
            if kind == "rlt":
                reward, parts, detail = rlt_reward(batch, completions, policy, student, task, cfg, run)
            else:
                reward, parts, detail = correctness_reward(batch, completions, task, run)
            stop_at_bad_reward(reward, batch, completions, detail, task, run)
        advantage = group_advantage(reward, cfg.group)
        with run.timed("update"):
            stats = grpo_update(model, reference, prompts, completions, advantage, optimizer, cfg, run)
        if (step + 1) % cfg.sync_every == 0:
            sync_ref(reference, policy, cfg.sync_mix)
        parts["groups_with_signal"] = advantage.view(-1, cfg.group).ne(0).any(1).float()
        numbers = {k: v.mean().to(run.device) for k, v in ({"reward": reward} | parts | stats).items()}
        means = run.mean(torch.stack(list(numbers.values())))
        history["names"], history["tokens"] = list(numbers), history["tokens"] + sum(map(len, completions))
        history["rows"].append(means)
        run.log(step, **dict(zip(numbers, means.unbind(), strict=True)))
    if not history["rows"]:
        return {}
    last = torch.stack(history["rows"])[-max(1, len(history["rows"]) // 4) :].mean(0)
    means = dict(zip(history["names"], last.tolist(), strict=True))
    if means["groups_with_signal"] == 0:
        run.print(f"{run.name}: no group had two different rewards lately, so the policy did not move")
    return means | speed(policy, history["tokens"], run)


def grpo_update(
    model, ref, prompts, completions, advantage: Tensor, optimizer, cfg: Config, run: Run
) -> dict[str, Tensor]:
    """One optimizer step on this rank's completions (lists of ids), in micro-batches; gradients are averaged over ranks."""
    sequences = [p + c for p, c in zip(prompts, completions, strict=True)]
    model.train()
    total, entropy, kl = (torch.zeros((), device=run.device) for _ in range(3))
    for group in micro_batches([len(x) for x in sequences], cfg.micro_tokens, run):
        ids, valid = collate([sequences[i] for i in group], run.device)
        first = torch.tensor([len(prompts[i]) for i in group] or [9], device=run.device)
        mask = valid[:, 1:] & (
            torch.arange(1, ids.shape[1], device=run.device) >= first[:, None]
        )  # completion tokens
        rows = torch.from_numpy(group).to(run.device)
        with run.autocast():
            with torch.no_grad():
                ref_logp, _ = ref(ids, valid, cfg.temperature)
            logp, token_entropy = model(ids, valid, cfg.temperature)
        weight = len(group) / len(
            sequences
        )  # of this micro-batch in the mean over completions; a dummy has none
        a = advantage[rows] if len(group) else torch.zeros(1, device=run.device)
        loss = weight * grpo_loss(logp, ref_logp, a, mask, cfg.beta)
        loss.backward()
        with torch.no_grad():
            count = mask.sum(1).clamp(min=1)
            total += loss.detach()
            entropy += weight * ((token_entropy * mask).sum(1) / count).mean()
            kl += (
                weight
                * (
                    torch.where(mask, (ref_logp - logp).exp() - (ref_logp - logp) - 1, 0).sum(1) / count
                ).mean()
            )
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return {"loss": total, "kl_ref": kl, "entropy": entropy, "grad_norm": norm}


def copy_frozen(model: LogProbLM, cfg: Config, run: Run) -> LogProbLM:
    """A frozen copy with the same sharding: the reference model, or a student that must never move."""
    if not run.sharded:
        return copy.deepcopy(model).requires_grad_(False).eval()
    with torch.device("meta"):
        empty = type(model.lm)(model.lm.config)
    twin = place(empty.to_empty(device="cpu"), cfg, run, trainable=False)
    sync_ref(twin, model, 1.0)
    for ours, theirs in zip(twin.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)
    return twin


def place(lm: nn.Module, cfg: Config, run: Run, trainable: bool) -> LogProbLM:
    """Put a model on this rank's device, or shard it (--shard): trained ones in float32, frozen ones in bfloat16."""
    lm.requires_grad_(trainable)
    if cfg.shard and run.world_size > 1:
        if trainable:
            lm.gradient_checkpointing_enable()
        dtype = torch.float32 if trainable or not run.amp else torch.bfloat16
        return run.shard(LogProbLM(lm), lm.base_model.layers, dtype, cfg.offload and not trainable)
    return LogProbLM(lm).to(run.device)


def stop_at_bad_reward(reward: Tensor, batch, completions, detail, task: Task, run: Run) -> None:
    """Raise UserError, with the example printed, if a reward is NaN or infinite."""
    bad = torch.nonzero(~torch.isfinite(reward)).flatten().tolist()
    if bad:
        sys.stdout.write(f"question {batch[bad[0]].q!r}\nsolution {batch[bad[0]].s!r}\n")
        sys.stdout.write(f"explanation {task.tok.decode(completions[bad[0]])!r}\n")
        for name in ("l", "d"):
            sys.stdout.write(f"{name} {detail[name][bad[0]].tolist() if name in detail else None}\n")
        raise UserError(f"{run.name}: the reward of the example above is {float(reward[bad[0]])}")


def speed(policy: LogProbLM, tokens: int, run: Run) -> dict[str, float]:
    """Throughput of a GRPO run on this rank; MFU counts 2N FLOP a sampled token and 2N x 3 + 6N a trained one."""
    seconds, n = run.seconds, sum(p.numel() for p in policy.parameters())
    total = sum(seconds.get(k, 0.0) for k in ("sample", "reward", "update")) or math.nan
    mfu = 14 * n * tokens / total / common.peak_flops(run.device)
    rates = {f"{k}_tokens_per_s": tokens / seconds.get(k, math.nan) for k in ("sample", "reward", "update")}
    return rates | {"rl_seconds": total, "mfu": mfu}


# --- supervised stages: pre-training of the built-in base, warm-up, distillation ---------------------------------------


def learning_rate(step: int, total: int, peak: float, warmup: float, floor: float = 0.0) -> float:
    """Linear warm-up over a fraction (or number) of the steps, then a cosine to floor * peak."""
    first = warmup if warmup > 1 else warmup * total
    if step < first:
        return peak * (step + 1) / first
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - first) / max(1, total - first))
    return peak * (floor + (1 - floor) * cosine)


def sft(
    model: LogProbLM, batch_of: Callable[[int], list[tuple[str, int]]], steps: int, rate: Callable[[int], float],
    betas: tuple[float, float], decay: float, task: Task, cfg: Config, run: Run, done: Callable[[int], bool] | None = None,
) -> None:  # fmt: skip
    """Train in place on texts whose loss starts at a character: batch_of(step) is the global list of (text, begin).

    Loss: mean over the supervised tokens of the global batch. Texts beyond cfg.context are cut. `done(step)` may end it.
    """
    wrapped = model if run.sharded else run.wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), rate(0), betas, weight_decay=decay)
    ended = {"early": False}
    for step in run.steps(steps, model=model, optimizer=optimizer, ended=ended):
        if ended["early"]:
            break
        rows = batch_of(step)[run.rank :: run.world_size]
        codes = [(i[: cfg.context], o[: cfg.context]) for i, o in task.encode([text for text, _ in rows])]
        masks = [torch.from_numpy(o[:, 0] >= begin) for (_, o), (_, begin) in zip(codes, rows, strict=True)]
        supervised = run.mean(torch.tensor(float(sum(int(m.sum()) for m in masks))))  # a rank's mean share
        loss = torch.zeros((), device=run.device)
        wrapped.train()
        for group in micro_batches([len(i) for i, _ in codes], cfg.micro_tokens, run):
            ids, valid = collate([codes[i][0] for i in group], run.device)
            mask = nn.utils.rnn.pad_sequence(
                [masks[i] for i in group] or [torch.zeros(2, dtype=torch.bool)], True
            )
            with run.autocast():
                logp, _ = wrapped(ids, valid, 1.0)
            part = -(logp * mask[:, 1:].to(run.device)).sum() / supervised.clamp(min=1).to(run.device)
            part.backward()
            loss += part.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for g in optimizer.param_groups:
            g["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(step, loss=run.mean(loss))
        if done and done(step):
            ended["early"], run.last = True, step  # `steps` saves and ends after its last step


def warm_up(teacher: LogProbLM, examples: list[Example], task: Task, cfg: Config, run: Run) -> None:
    """Stage 1: SFT in the teacher's format on corpus traces; the loss starts after the opened explanation tag."""
    rows = [(text, begin) for e in examples if e.t for text, _, begin in [task.fmt.teacher(e, e.t)]]
    if not cfg.warmup or not rows:
        return run.print("no warm-up" + ("" if rows else ": the data have no reasoning traces"))
    batch_of = lambda step: [
        rows[i] for i in epoch_indices(step, cfg.warmup_batch, len(rows), run.stream("sft"))
    ]  # noqa: E731
    rate = functools.partial(learning_rate, total=cfg.warmup_steps, peak=cfg.warmup_lr, warmup=0.05)
    sft(teacher, batch_of, cfg.warmup_steps, rate, (0.9, 0.95), 1e-4, task, cfg, run)


def distil(
    learner: LogProbLM, traces: list[Example], task: Task, cfg: Config, run: Run, steps: int | None = None
) -> None:
    """Stage 4: SFT in the student's format on raw explanations; the loss covers the whole assistant turn."""
    rows = [(text, begin) for e in traces for text, _, _, begin in [task.fmt.student(e, e.t)]]
    batch_of = lambda step: [
        rows[i] for i in epoch_indices(step, cfg.distil_batch, len(rows), run.stream("sft"))
    ]  # noqa: E731
    steps = cfg.distil_steps if steps is None else steps
    rate = functools.partial(learning_rate, total=steps, peak=cfg.distil_lr, warmup=0.1)
    sft(learner, batch_of, steps, rate, (0.9, 0.999), 0.0, task, cfg, run)


def collect(
    teacher: LogProbLM, student, examples: list[Example], task: Task, cfg: Config, run: Run
) -> list[Example]:
    """Stage 3: one raw explanation of each example, scored, appended to traces.jsonl; finished ones are skipped."""
    file, sampler = run.folder / "traces.jsonl", Sampler(teacher, task, cfg, run)
    done = run.gather(file.read_text().count("\n") if file.exists() and cfg.resume else 0)[0]
    if run.is_main and not done:
        file.write_text("")
    sampler.refresh()
    chunk = max(1, cfg.sample_batch // 2) * run.world_size
    for start in range(done, len(examples), chunk):
        part = examples[start : start + chunk]
        part = (
            part + (part * run.world_size)[: -len(part) % run.world_size]
        )  # equal shares; the repeats are dropped below
        generator = torch.Generator().manual_seed(run.stream(f"collect {start}"))
        uniforms = torch.rand(len(part), cfg.max_new, generator=generator)[run.rank :: run.world_size]
        mine = part[run.rank :: run.world_size]
        prompts = [ids for ids, _ in task.encode([task.fmt.teacher_prompt(e) for e in mine])]
        completions = sampler(prompts, uniforms, cfg.temperature)
        reward, parts, detail = rlt_reward(mine, completions, teacher, student, task, cfg, run)
        numbers = {k: v.tolist() for k, v in ({"reward": reward} | parts).items()}
        rows = [{"question": e.q, "solution": e.s, "reasoning_trace": r.t, **{k: v[i] for k, v in numbers.items()}}
                for i, (e, r) in enumerate(zip(mine, detail["rows"], strict=True))]  # fmt: skip
        shares = run.gather(rows)
        if run.is_main:
            ordered = [
                shares[i % run.world_size][i // run.world_size]
                for i in range(min(chunk, len(examples) - start))
            ]
            with open(file, "a") as f:
                f.writelines(json.dumps(common.finite_or_null(r)) + "\n" for r in ordered)
        run.leave_if_stopped()
    run.barrier()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [Example(r["question"], r["solution"], r["reasoning_trace"]) for r in rows]


# --- evaluation -------------------------------------------------------------------------------------------------------


def extract_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} in `text`, braces matched; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth < 0:
            return text[begin:i]
    return None


def equal_answers(a: str | None, b: str | None) -> bool:
    """Whether two short answers agree: as numbers where both are, else as LaTeX without spacing and decoration."""

    def plain(x: str) -> str:
        x = re.sub(
            r"\\(left|right|displaystyle|!|,|;|:|quad|\$)|\\(text|mathrm|mbox)(?=\{)|[\s$]|\^\\circ", "", x
        )
        x = re.sub(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"(\1)/(\2)", re.sub(r"\\[dt]frac", r"\\frac", x))
        x = re.sub(r"\\frac(\d)(\d)", r"(\1)/(\2)", x)
        return re.sub(r"(?<=\d),(?=\d{3}\b)", "", x).strip("{}.").replace("\\%", "").rstrip("%")

    def number(x: str) -> Fraction | None:
        try:
            top, _, bottom = re.sub(r"[()]", "", x).partition("/")
            return Fraction(top) / Fraction(bottom or 1)
        except (ValueError, ZeroDivisionError):
            return None

    if a is None or b is None:
        return False
    a, b = plain(a), plain(b)
    return a == b or (number(a) is not None and number(a) == number(b))


def same_boxed(e: Example, text: str) -> bool:
    """The last boxed answer of a text against the solution's (or against the solution itself if nothing is boxed)."""
    return equal_answers(extract_boxed(text), extract_boxed(e.s) or e.s)


def solves_countdown(e: Example, text: str) -> bool:
    """Whether the boxed expression uses exactly the question's numbers and gives its target; parsed, never evaluated."""

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in operations:
            return operations[type(node.op)](value(node.left), value(node.right))
        raise ValueError("not an arithmetic expression")

    operations = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
    }
    asked = re.search(r"numbers \[([\d, ]+)\].*make (\d+)", e.q)
    expression = (extract_boxed(text) or "").replace("\\times", "*").replace("\\div", "/").strip()[:200]
    if asked is None or sorted(re.findall(r"\d+", expression)) != sorted(re.findall(r"\d+", asked[1])):
        return False
    try:
        return value(ast.parse(expression, mode="eval").body) == int(asked[2])
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def benchmark(name: str, cfg: Config, heldout: list[Example]) -> list[Example]:
    """The problems that --bench names, at most cfg.eval_problems: a hub data set, countdown, a .jsonl, or held-out rows."""
    if name.endswith(".jsonl") or name == "countdown":
        rows = load_examples(dataclasses.replace(cfg, data=name), seed=10**6)
    elif name in ("math500", "aime24"):
        table = (
            load_hub("HuggingFaceH4/MATH-500", "test")
            if name == "math500"
            else load_hub("HuggingFaceH4/aime_2024")
        )
        rows = [Example(r["problem"], rf"\boxed{{{r['answer']}}}") for r in table]
    elif name == "gpqa":
        rng, rows = np.random.default_rng(0), []
        for r in load_hub("Idavidrein/gpqa", subset="gpqa_diamond"):
            options = [r["Correct Answer"], *(r[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
            order = rng.permutation(4)
            lines = [f"{letter}) {options[i].strip()}" for letter, i in zip("ABCD", order, strict=True)]
            question = "\n".join([r["Question"], *lines, "Answer with the letter in \\boxed{}."])
            rows.append(Example(question, rf"\boxed{{{'ABCD'[list(order).index(0)]}}}"))
    elif name:
        raise UserError(f"--bench {name}: choose from math500, aime24, gpqa, countdown or a .jsonl")
    else:
        rows = heldout
    if not rows:
        raise UserError("nothing to evaluate on: give --bench, or keep rows of --data with --holdout")
    return rows[: cfg.eval_problems]


def accuracy(
    model: LogProbLM,
    examples: list[Example],
    task: Task,
    cfg: Config,
    run: Run,
    temperature: float,
    k: int = 1,
) -> np.ndarray:
    """Share of right answers to each problem among k samples (greedy at temperature 0): (N,), the same on all ranks."""
    sampler = Sampler(model, task, cfg, run)
    sampler.refresh()
    generator = torch.Generator().manual_seed(run.stream(f"accuracy {temperature}"))
    uniforms = torch.rand(len(examples), k, cfg.eval_new, generator=generator)[run.rank :: run.world_size]
    mine = examples[run.rank :: run.world_size]
    prompts = [ids for ids, _ in task.encode([task.fmt.student_prompt(e) for e in mine])]
    completions = sampler(prompts, uniforms.flatten(0, 1), temperature, cfg.eval_top_p) if mine else []
    right, _, _ = correctness_reward([e for e in mine for _ in range(k)], completions, task, run)
    out = np.zeros(len(examples))
    for rank, share in enumerate(run.gather(right.view(-1, k).mean(1).tolist())):
        out[rank :: run.world_size] = share
    return out


# --- the study on the built-in task -----------------------------------------------------------------------------------


def hop_task(cfg: Config) -> Task:
    return Task(hop_tokenizer(cfg.symbols), HOP_FORMAT, lambda e, text: HOP_FORMAT.answer(text) == e.s)


def hop_problems(cfg: Config, n: int, kind: str) -> list[Example]:
    """n problems that depend on cfg.seed and `kind` only; "test" is one set for all rows of the table."""
    seed = int.from_bytes(f"{kind} {cfg.seed}".encode(), "little") % 2**63
    return make_problems(n, cfg.symbols, cfg.chains, cfg.p_write, torch.Generator().manual_seed(seed))


def written(texts: list[str], cfg: Config) -> float:
    """Share of the intermediate symbols that are written out (the length of a chain is 4, 2 of them intermediate)."""
    return float(np.mean([1 - t.count("~") / (2 * cfg.chains) for t in texts]))


def hop_base(cfg: Config, run: Run) -> dict:
    """Pre-train the base on both formats, textbook (all written) then web (p_write), and warm the teacher up."""
    task = hop_task(cfg)
    base = LogProbLM(hop_model(cfg, len(task.tok))).to(run.device)
    test = hop_problems(cfg, 256, "gate")

    def batch_of(step: int, stage: Run, p_write: float) -> list[tuple[str, int]]:
        rows = make_problems(64, cfg.symbols, cfg.chains, p_write, stage.generator("data"))
        texts = [
            task.fmt.student(e, e.t)[0] if i % 2 else task.fmt.teacher(e, e.t)[0] for i, e in enumerate(rows)
        ]
        return [(text, cfg.symbols + cfg.chains + 1) for text in texts]  # the loss starts after the question

    def learned(step: int) -> bool:
        if step % 25 != 24:
            return False
        textbook = [dataclasses.replace(e, t=spelled(e, cfg)) for e in test]
        found = hop_accuracy(base, task.tok, task.fmt, textbook)
        return min(found[k] for k in ("starts", "hop 1", "hop 2", "hop 3")) >= 0.99

    textbook, web = run.stage("textbook"), run.stage("web")
    common_settings = ((0.9, 0.98), 0.01, task, cfg)
    sft(base, lambda i: batch_of(i, textbook, 1.0), cfg.textbook_steps,
        lambda i: min(1, (i + 1) / 30) * cfg.base_lr, *common_settings, textbook, learned)  # fmt: skip
    sft(base, lambda i: batch_of(i, web, cfg.p_write), cfg.web_steps,
        lambda i: learning_rate(i, cfg.web_steps, cfg.base_lr, 0.0, 0.05), *common_settings, web)  # fmt: skip
    base.eval()
    gate = hop_accuracy(base, task.tok, task.fmt, test)
    gate["solves"] = accuracy(base, test, task, cfg, run.stage("gate"), 0.7).mean()
    weights = {"base": copy.deepcopy(base.state_dict())}
    warm_up(base, hop_problems(cfg, 64 * cfg.warmup_steps, "warm-up"), task, cfg, run.stage("warmup"))
    weights["warm"] = base.state_dict()
    common.write_atomic(run.folder / "weights.pt", lambda f: torch.save(weights, f))
    return gate


def spelled(e: Example, cfg: Config) -> str:
    """The explanation of a problem with no symbol elided."""
    step, chains = dict(zip(SYMBOLS, e.q[: cfg.symbols], strict=False)), []
    for x in e.q[cfg.symbols :]:
        chains.append(x + step[x] + step[step[x]] + step[step[step[x]]])
    return "".join(chains)


def check_base(name: str, gate: dict, cfg: Config) -> None:
    """A base model that cannot follow single hops makes every later number meaningless: stop."""
    weak = [k for k in ("starts", "hop 1", "hop 2", "hop 3") if not gate[k] >= 0.97]
    if cfg.base_check and (weak or gate["leap"] > 3 / cfg.symbols):
        found = ", ".join(f"{k} {v:.2f}" for k, v in gate.items())
        raise UserError(
            f"{name}: the base model is not what the study needs ({found}); more --textbook_steps or a --seed"
        )


def hop_cell(cfg: Config, run: Run, name: str) -> dict:
    """One row of the table for one seed: train from the shared base and measure on the shared test problems."""
    method, task, folder = name.split("-")[-2], hop_task(cfg), run.folder.parent / f"base-{cfg.chains}"
    weights = torch.load(folder / "weights.pt", map_location=run.device, weights_only=True)

    def model(which: str) -> LogProbLM:
        lm = LogProbLM(hop_model(cfg, len(task.tok))).to(run.device)
        lm.load_state_dict(weights[which])
        return lm

    test, result = hop_problems(cfg, cfg.eval_problems, "test"), {"method": method, "chains": cfg.chains}
    student, learner = model("base").requires_grad_(False).eval(), model("base")

    def measure(lm: LogProbLM, stage: Run) -> dict[str, float]:
        modes = {"greedy": 0.0, "tau .7": 0.7, "tau 1": 1.0}
        return {k: accuracy(lm, test, task, cfg, stage, t).mean() for k, t in modes.items()}

    if method == "base":
        return result | {"written": cfg.p_write} | measure(learner, run)
    if method == "sparse":
        pool = hop_problems(cfg, cfg.prompts * cfg.updates, f"rl {name}")
        result |= train_grpo(learner, pool, "sparse", None, task, cfg, run.stage("rl"))
        return result | measure(learner, run)
    teacher = model("warm")
    if method in ("rlt", "lam0"):
        rl = dataclasses.replace(cfg, lam=0.0) if method == "lam0" else cfg
        pool = hop_problems(cfg, cfg.prompts * cfg.updates, f"rl {name}")
        result |= train_grpo(teacher, pool, "rlt", student, task, rl, run.stage("rl"))
    examples = hop_problems(cfg, cfg.traces, f"distil {name}")
    traces = (
        examples
        if method == "corpus"
        else collect(teacher, student, examples, task, cfg, run.stage("collect"))
    )
    distil(learner, traces, task, cfg, run.stage("distil"))
    result |= {"written": written([e.t.strip("$") for e in traces], cfg)} | measure(learner, run)
    if method != "rlt":
        return result
    result["example"] = explain(teacher, student, test[:1], task, cfg, run)
    cold, pool = model("base"), hop_problems(cfg, cfg.prompts * cfg.cold_updates, f"cold {name}")
    distil(cold, traces[: cfg.cold_traces], task, cfg, run.stage("cold-distil"), cfg.cold_steps)
    result["cold start, before RL"] = measure(cold, run)
    train_grpo(
        cold,
        pool,
        "sparse",
        None,
        task,
        dataclasses.replace(cfg, updates=cfg.cold_updates),
        run.stage("cold-rl"),
    )
    return result | {"cold start, after RL": measure(cold, run)}


def hop_job(name: str, run: Run) -> dict:
    """A job of the study's grid; the last-but-one word of its name is the method, `easy` the control with 4 chains."""
    cfg = easy(run.cfg) if name.startswith("easy") or name == "base-4" else run.cfg
    if re.fullmatch(r"base-\d+", name):
        return hop_base(cfg, run)
    return hop_cell(cfg, run, name)


def easy(cfg: Config) -> Config:
    """The control: half the chains, so that the base solves a problem now and then."""
    return dataclasses.replace(cfg, chains=cfg.chains // 2)


def hop_study(cfg: Config, run: Run) -> None:
    """The table, the claims and the figure of the built-in task, a grid of jobs on one shared base model."""
    chains = [easy(cfg).chains] if cfg.easy else [cfg.chains, easy(cfg).chains]
    for name, gate in run.jobs([f"base-{c}" for c in chains], hop_job).items():
        run.print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in gate.items()))
        check_base(name, gate, cfg)
    hard = [] if cfg.easy else ["rlt", "lam0", "sparse", "corpus", "warm"]
    names = [] if cfg.easy else ["hard-base-0"]
    names += [f"hard-{m}-{i}" for i in range(cfg.seeds) for m in hard]
    names += ["easy-base-0"] + [f"easy-{m}-{i}" for i in range(cfg.seeds) for m in ("rlt", "sparse")]
    results = run.jobs(names, hop_job)

    def column(prefix: str, key: str, inner: str | None = None) -> list[float]:
        found = [results[n] for n in names if n.rsplit("-", 1)[0] == prefix]
        return [(r[inner] if inner else r)[key] for r in found if (inner or key) in r]

    labels = {
        "hard-base": "base model", "hard-corpus": "distilled from the corpus", "hard-warm": "distilled from the teacher before RL",
        "hard-sparse": "correctness RL", "hard-lam0": "distilled from RLT, lambda 0", "hard-rlt": "distilled from RLT",
        "easy-base": f"control, {chains[-1]} chains: base model", "easy-sparse": "control: correctness RL",
        "easy-rlt": "control: distilled from RLT",
    }  # fmt: skip
    keys = ("greedy", "tau .7", "tau 1", "written", "r_ss", "r_kl", "groups_with_signal")
    rows = [
        {"": label, **{k: mean_se(column(p, k)) for k in keys}}
        for p, label in labels.items()
        if column(p, "greedy")
    ]
    for when in () if cfg.easy else ("before RL", "after RL"):
        inner = f"cold start, {when}"
        row = {k: mean_se(column("hard-rlt", k, inner)) for k in keys[:3]}
        rows.append({"": f"{cfg.cold_traces} RLT traces, {when}"} | row | dict.fromkeys(keys[3:]))
    run.table(
        rows,
        f"accuracy on {cfg.eval_problems} fresh problems: mean +- s.e. over {cfg.seeds} RL seeds, one base model",
    )
    if not cfg.easy:
        rlt = column("hard-rlt", "greedy")
        for prefix, text in (("hard-sparse", "an RLT-distilled student beats correctness RL from the same start"),
                             ("hard-corpus", "... beats a student distilled from the corpus"),
                             ("hard-warm", "... beats a student distilled from the teacher before RL"),
                             ("hard-lam0", "without the KL term (lambda = 0) teaching is worse")):  # fmt: skip
            run.claim(text, rlt, column(prefix, "greedy"))
        run.claim("... although r_SS is at least as high (margin 0.05)", column("hard-lam0", "r_ss"), column("hard-rlt", "r_ss"),
                  margin=-0.05)  # fmt: skip
        cold = column("hard-rlt", "greedy", "cold start, after RL")
        run.claim(
            "correctness RL gets further from a few RLT traces than from the base",
            cold,
            column("hard-sparse", "greedy"),
        )
        first = results["hard-rlt-0"]["example"]
        run.print("\none explanation of the trained teacher:\n" + describe(first, cfg.lam, cfg.alpha))
        run.figure(
            "rlt", functools.partial(draw_study, folder=run.folder, seeds=cfg.seeds, example=first), (11, 4.6)
        )
    run.claim("control: where the base solves some, correctness RL needs no teacher (ours: correctness RL)",
              column("easy-sparse", "tau 1"), column("easy-rlt", "tau 1"))  # fmt: skip
    cell = results[names[-2]]
    run.finish(**{k: cell[k] for k in ("sample_tokens_per_s", "reward_tokens_per_s", "update_tokens_per_s", "mfu")},
               updates_per_s=cfg.updates / cell["rl_seconds"])  # fmt: skip


def mean_se(values: list[float]) -> str | None:
    """`mean +- s.e.`, the mean alone where there is one value."""
    if not values:
        return None
    spread = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):.3f}" + ("" if math.isnan(spread) else f" +- {spread:.3f}")


def draw_study(figure, folder, seeds: int, example: dict) -> None:
    """Left: r_SS and r_KL over the updates with and without the KL term. Right: one explanation, coloured by its KL."""
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.1, 1)})
    for method, colour, label in (("rlt", "tab:blue", "RLT"), ("lam0", "tab:red", "lambda = 0")):
        for key, style in (("r_ss", "-"), ("r_kl", "--")):
            runs = [common.read_metrics(folder / f"hard-{method}-{i}" / "rl", key) for i in range(seeds)]
            steps, values = runs[0][0], np.array([v for _, v in runs])
            name = "student's log-prob of the solution, r_SS" if key == "r_ss" else "KL to the student, r_KL"
            left.plot(steps, values.mean(0), style, color=colour, label=f"{label}: {name}")
            left.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.12, lw=0)
    left.set(xlabel="update", ylabel="nats per token", title="Reward terms of the teacher")
    left.legend(fontsize=8)
    d = np.array(example["kl"]).reshape(-1, 4)
    image = right.imshow(d, cmap="YlOrRd", vmin=0, vmax=max(1.0, d.max()), aspect="auto")
    for i, token in enumerate(example["tokens"]):
        right.text(i % 4, i // 4, f"{token}\n{d.flat[i]:.2f}", ha="center", va="center", fontsize=9)
    right.set_xticks(range(4), ["start", "1 hop", "2 hops", "3 hops"])
    right.set(yticks=[], title="One explanation, coloured by its per-token KL")
    figure.colorbar(image, ax=right, label="log teacher - log student")


# --- looking at single explanations ------------------------------------------------------------------------------------


def explain(
    teacher, student, examples: list[Example], task: Task, cfg: Config, run: Run, traces=None
) -> dict | list[dict]:
    """Score one explanation of each example (sampled, or given as texts) and spell out every token of it."""
    if traces is None:
        sampler = Sampler(teacher, task, cfg, run)
        sampler.refresh()
        prompts = [ids for ids, _ in task.encode([task.fmt.teacher_prompt(e) for e in examples])]
        uniforms = torch.rand(
            len(prompts), cfg.max_new, generator=torch.Generator().manual_seed(run.stream("explain"))
        )
        completions = sampler(prompts, uniforms, cfg.temperature)
    else:
        close = task.fmt.explanation[1] + task.fmt.end_of_turn
        completions = [
            task.tok.encode(t.removeprefix(task.fmt.gap) + close, add_special_tokens=False) for t in traces
        ]
    reward, parts, detail = rlt_reward(examples, completions, teacher, student, task, cfg, run)
    out = []
    for i, (e, row) in enumerate(zip(examples, detail["rows"], strict=True)):
        tokens = [task.tok.decode([row.student_ids[j]]) for j in row.think_student]
        solution = [task.tok.decode([row.student_ids[j]]) for j in row.solution]
        numbers = {k: float(v[i]) for k, v in ({"reward": reward} | parts).items()}
        numbers |= {
            "kl": detail["d"][i, : len(tokens)].tolist(),
            "log_student": detail["l"][i, : len(solution)].tolist(),
        }
        numbers |= {"leak": leak(e.s, row.t, [*numbers["kl"]])}
        out.append({"question": e.q, "explanation": row.t, "tokens": tokens, "solution": solution} | numbers)
    return out[0] if len(out) == 1 else out


def leak(s: str, t: str, kl: list[float]) -> dict[str, float]:
    """Where the dearest token stands (0 first, 1 last), what it costs, and how much of s t repeats (4-grams of s)."""
    s, grams = s.strip(), 4
    pieces = {s[i : i + grams] for i in range(max(1, len(s) - grams + 1))}
    place = int(np.argmax(kl)) / max(1, len(kl) - 1) if kl else math.nan
    return {
        "place": place,
        "cost": max(kl, default=math.nan),
        "overlap": sum(p in t for p in pieces) / len(pieces),
    }


def describe(x: dict, lam: float, alpha: float) -> str:
    """One scored explanation as text: what each token costs and how likely it makes each token of the solution."""

    def cells(tokens: list[str], numbers: list[float], low: float, high: float) -> str:
        shade = lambda v: int(np.clip((v - low) / (high - low), 0, 1) * 5)  # noqa: E731
        paint = lambda text, v: f"\033[48;5;{(231, 230, 229, 222, 215, 209)[shade(v)]};30m{text}\033[0m"  # noqa: E731
        parts = [
            f"{token.strip() or repr(token)[1:-1]}{v:+.2f}" for token, v in zip(tokens, numbers, strict=True)
        ]
        return " ".join(
            paint(p, v) if sys.stdout.isatty() else p for p, v in zip(parts, numbers, strict=True)
        )

    return (
        f"question     {x['question'].strip()}\n"
        f"explanation  {x['explanation'].strip()}\n"
        f"cost of each of its tokens, log teacher - log student (d_j):\n  {cells(x['tokens'], x['kl'], 0.0, 3.0)}\n"
        f"student's log-prob of each token of the solution (l_k):\n  {cells(x['solution'], x['log_student'], 0.0, -3.0)}\n"
        f"r_SS {x['r_ss']:.3f} (mean + {alpha} min), r_KL {x['r_kl']:.3f} (mean {x['kl_mean']:.3f} + {alpha} x max "
        f"{x['kl_max']:.2f}), closed {x['closed']:.0f}: reward = r_SS - {lam} r_KL{'' if x['closed'] else ' - 1'} = "
        f"{x['reward']:.3f}; the dearest token stands at {x['leak']['place']:.0%}, {x['leak']['overlap']:.0%} of the "
        f"solution's 4-grams are in the explanation"
    )


# --- the study on real models -----------------------------------------------------------------------------------------


def text_task(cfg: Config) -> tuple[Task, nn.Module, nn.Module]:
    """Task, teacher and frozen student from cfg. UserError where their tokenizers or their formats do not fit."""
    load = functools.partial(common.load_lm, dtype=torch.bfloat16 if cfg.shard else torch.float32)
    lm, tok = load(cfg.teacher)
    student, student_tok = (copy.deepcopy(lm), tok) if cfg.student == "self" else load(cfg.student)
    system = STUDENT_SYSTEM
    if cfg.data and not cfg.data.endswith(".jsonl") and cfg.data != "countdown":
        rows = load_hub(cfg.data)
        system = rows[0]["system"] if "system" in rows.column_names else system
    fmt = chat_format(tok, system)
    task = Task(tok, fmt, solves_countdown if "countdown" in (cfg.data, cfg.bench) else same_boxed)
    probe = Example("What is 2 + 2?", pad(r"It is \boxed{4}."))
    texts = [
        fmt.teacher(probe, pad("Adding 2 and 2 gives 4."))[0],
        fmt.student(probe, pad("Adding 2 and 2 gives 4."))[0],
    ]
    if task.encode(texts)[0][0] != dataclasses.replace(task, tok=student_tok).encode(texts)[0][0]:
        raise UserError(
            "--teacher and --student have different tokenizers: d_j needs the same tokens in both"
        )
    return task, lm, student


def fits(e: Example, task: Task, cfg: Config) -> bool:
    """Whether an explanation of max_new tokens fits both contexts, and the solution has a token to score."""
    text, _, span, _ = task.fmt.student(e, task.fmt.gap)
    (ids_t, _), (ids_s, offsets) = task.encode([task.fmt.teacher_prompt(e), text])
    if len(tokens_in_span(offsets, *span)) == 0:
        raise UserError(f"{cfg.data}: the solution {e.s!r} has no token of its own to score")
    return max(len(ids_t), len(ids_s)) + cfg.max_new + 8 <= cfg.context


def text_study(cfg: Config, run: Run) -> None:
    """Warm-up, RL, collection, distillation and evaluation, each a stage that a resumed run goes through again or skips."""
    if cfg.prompts % run.world_size:
        raise UserError(f"--prompts {cfg.prompts} must be a multiple of the {run.world_size} ranks")
    if cfg.exact_kl and cfg.shard:
        raise UserError("--exact_kl needs whole models: not with --shard")
    rows = load_examples(cfg, cfg.seed)
    task, lm, student = text_task(cfg)
    examples = [e for e in rows if fits(e, task, cfg)]
    run.print(
        f"{len(examples)} problems, {len(rows) - len(examples)} dropped: they do not fit --context {cfg.context}"
    )
    heldout, examples = examples[: cfg.holdout], examples[cfg.holdout :]
    if not examples:
        raise UserError(f"{cfg.data}: no problem is left to train on")
    teacher, student = place(lm, cfg, run, trainable=True), place(student, cfg, run, trainable=False).eval()
    numbers = {}
    if "warmup" in cfg.stages:
        warm_up(teacher, examples, task, cfg, run.stage("warmup"))
    if "rl" in cfg.stages:
        numbers = train_grpo(teacher, examples, "rlt", student, task, cfg, run.stage("rl"))
        export(teacher, task, run, "teacher")
    one = explain(teacher, student, (heldout or examples)[:1], task, cfg, run)
    run.print("\n" + describe(one, cfg.lam, cfg.alpha))
    if numbers:
        run.table(
            [{k: v for k, v in numbers.items() if "per_s" not in k}],
            "RL, means over the last quarter of the updates",
        )
    if {"collect", "distil"} & set(cfg.stages):
        traces = collect(teacher, student, examples[: cfg.traces], task, cfg, run)
    if {"distil", "eval"} & set(cfg.stages):
        text_evaluation(
            traces if "distil" in cfg.stages else None, benchmark(cfg.bench, cfg, heldout), task, cfg, run
        )
    run.finish(**{k: v for k, v in numbers.items() if "per_s" in k or k == "mfu"})


def text_evaluation(
    traces: list[Example] | None, problems: list[Example], task: Task, cfg: Config, run: Run
) -> None:
    """Distil the learner on the traces and compare it with itself before, paired by problem."""
    source = cfg.teacher if cfg.learner == "self" else cfg.learner
    learner = place(
        common.load_lm(source, torch.bfloat16 if cfg.shard else torch.float32)[0], cfg, run, trainable=True
    )
    measure = functools.partial(accuracy, examples=problems, task=task, cfg=cfg, run=run, temperature=cfg.eval_temperature,
                                k=cfg.eval_samples)  # fmt: skip
    before = measure(learner) if "eval" in cfg.stages else None
    if traces is not None:
        distil(learner, traces, task, cfg, run.stage("distil"))
        export(learner, task, run, "distilled")
    if before is not None and traces is not None:
        after, name = measure(learner), f"{cfg.bench or cfg.data}, avg@{cfg.eval_samples}"
        run.table([{"": "before", name: before.mean()}, {"": "distilled from RLT", name: after.mean()}],
                  f"{len(problems)} problems, temperature {cfg.eval_temperature}, top_p {cfg.eval_top_p}, "
                  f"at most {cfg.eval_new} tokens")  # fmt: skip
        run.claim("the student distilled from RLT beats the student before, paired by problem", after, before)


def export(model: LogProbLM, task: Task, run: Run, name: str) -> None:
    """Write a model as a Hugging Face folder on rank 0; a sharded one is gathered parameter by parameter."""
    state = {
        k: v.detach().to("cpu", torch.bfloat16 if run.amp else v.dtype) for k, v in full_weights(model.lm)
    }
    if run.is_main:
        model.lm.save_pretrained(run.folder / name, state_dict=state)
        task.tok.save_pretrained(run.folder / name)
    run.barrier()


def load_newest(cfg: Config, run: Run) -> tuple[LogProbLM, LogProbLM, Task, list[Example], str]:
    """Teacher, student, task and problems for --show and --score: the trained teacher of the run folder if there is one."""
    if cfg.teacher is None:
        folder, task = run.folder / f"base-{cfg.chains}", hop_task(cfg)
        if not (folder / "weights.pt").exists():
            raise UserError(
                f"nothing is trained in {run.folder}: run the script without --show or --score first"
            )
        models, weights = [], torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)
        trained = run.folder / "hard-rlt-0" / "rl" / "checkpoint.pt"
        if trained.exists():
            weights["warm"] = torch.load(trained, map_location="cpu", weights_only=True)["state"]["model"]
        for which in ("warm", "base"):
            models.append(LogProbLM(hop_model(cfg, len(task.tok))).to(run.device).eval())
            models[-1].load_state_dict(weights[which])
        name = "the trained teacher" if trained.exists() else "the teacher before RL"
        return *models, task, hop_problems(cfg, 4, "show"), name
    trained = run.folder / "teacher"
    task, lm, student = text_task(cfg)
    lm = common.load_lm(str(trained))[0] if trained.exists() else lm
    examples = load_examples(cfg, cfg.seed)[:4] if cfg.data else []
    name = f"the teacher in {trained}" if trained.exists() else f"{cfg.teacher}, not trained yet"
    return (
        *(
            place(m, dataclasses.replace(cfg, shard=False), run, trainable=False).eval()
            for m in (lm, student)
        ),
        task,
        examples,
        name,
    )


def score_file(cfg: Config, run: Run) -> None:
    """Rank the traces of a .jsonl by the reward: prints the best and the dearest steps, writes <name>.scored.jsonl."""
    rows = common.read_jsonl(cfg.score, ("question", "solution", "reasoning_trace"))
    teacher, student, task, _, name = load_newest(cfg, run)
    wrap = (lambda x: x) if cfg.teacher is None else pad
    examples = [Example(r["question"], wrap(r["solution"]), wrap(r["reasoning_trace"])) for r in rows]
    found = explain(teacher, student, examples, task, cfg, run, [e.t for e in examples])
    found = found if isinstance(found, list) else [found]
    order = np.argsort([-x["reward"] for x in found], kind="stable")
    keep = ("reward", "r_ss", "r_kl", "kl_mean", "kl_max", "length", "leak")
    target = run.folder / f"{cfg.score.rsplit('/', 1)[-1].removesuffix('.jsonl')}.scored.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(common.finite_or_null(rows[i] | {"rank": n} | {k: found[i][k] for k in keep}))
        for n, i in enumerate(order)
    ]
    common.write_atomic(target, ("\n".join(lines) + "\n").encode())
    run.print(f"scored by {name}, best first:")
    for i in order[:10]:
        x, dear = found[i], int(np.argmax(found[i]["kl"])) if found[i]["kl"] else 0
        context = (
            "".join(x["tokens"][max(0, dear - 8) : dear])
            + ">>"
            + "".join(x["tokens"][dear : dear + 1])
            + "<<"
        )
        run.print(f"  row {i + 1}: reward {x['reward']:.3f}, r_SS {x['r_ss']:.3f}, r_KL {x['r_kl']:.3f}, dearest "
                  f"{x['kl_max']:.2f} at ...{' '.join(context.split())}")  # fmt: skip
    run.print(f"all {len(found)} in {target}")


ARCHITECTURES = {  # what --dry_run needs to know without a network: LlamaConfig / Qwen2Config fields
    "Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "Qwen2.5-32B": ("qwen2", 152064, 5120, 27648, 64, 40, 8, False),
    "Bespoke-Stratos-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "SmolLM2-135M": ("llama", 49152, 576, 1536, 30, 9, 3, True),
}


def meta_parameters(name: str) -> tuple[int, int]:
    """Parameters of a model built on the meta device, and bytes of its bf16 KV cache per token."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = next((v for k, v in ARCHITECTURES.items() if k in name), None)
    if known is None:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError):
            raise UserError(
                f"{name}: not local, and --dry_run knows only {', '.join(ARCHITECTURES)}"
            ) from None
    else:
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "tie_word_embeddings")  # fmt: skip
        config = AutoConfig.for_model(known[0], **dict(zip(keys, known[1:], strict=True)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = config.hidden_size // config.num_attention_heads
    return sum(
        p.numel() for p in model.parameters()
    ), 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head


def dry_run(cfg: Config, run: Run) -> None:
    """Print parameters, memory per GPU, FLOPs and steps of a configuration; no weights, no data."""
    if cfg.teacher is None:
        n = sum(p.numel() for p in hop_model(cfg, cfg.symbols + 10).parameters())
        run.print(f"{cfg.config}: GPT-2 with {n:,} parameters, {cfg.seeds} seeds, {cfg.updates} updates of "
                  f"{cfg.prompts} x {cfg.group} completions of at most {cfg.max_new} tokens")  # fmt: skip
        return
    gpus = run.world_size if run.world_size > 1 else 8
    (n, kv), (n_student, _) = (
        meta_parameters(cfg.teacher),
        meta_parameters(cfg.teacher if cfg.student == "self" else cfg.student),
    )
    shard = gpus if cfg.shard else 1
    gb = {"policy: float32 weights, gradients, AdamW": 16 * n / shard, "reference: bf16": 2 * n / shard,
          "reward student: bf16": 0 if cfg.offload else 2 * n_student / shard, "rollout copy: bf16, whole": 2 * n}  # fmt: skip
    gb["KV cache of one sampling batch at full length"] = (
        kv * min(cfg.sample_batch, cfg.prompts * cfg.group) * cfg.context
    )
    tokens = cfg.prompts * cfg.group * cfg.max_new
    flops = (2 * n + 8 * n + 2 * n + 2 * n_student + 2 * n) * tokens
    rows = [{"per GPU": k, "GB": v / 1e9} for k, v in gb.items()] + [
        {"per GPU": "sum", "GB": sum(gb.values()) / 1e9}
    ]
    run.table(rows, f"{cfg.config} on {gpus} GPUs: teacher {n:,} parameters, student {n_student:,}")
    run.print(f"an update: {cfg.prompts * cfg.group} completions, at most {tokens:,} tokens, {flops:.2e} FLOP, "
              f"{flops / (gpus * 989e12 * 0.4):.0f} s at 40 % of {gpus} H100 (at full length)")  # fmt: skip
    run.print(f"stages: warm-up {cfg.warmup_steps} steps, RL {cfg.updates} updates, {cfg.traces} explanations, "
              f"distillation {cfg.distil_steps} steps, evaluation on {cfg.bench or 'held-out rows'}")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if any(a.startswith("--teacher") for a in argv) and not any(a.startswith("--config") for a in argv):
        argv = ["--config", "text", *argv]  # a real model on a laptop wants that rung's sizes
    cfg = common.parse_config(CONFIGS, argv)
    looking = cfg.show or cfg.score
    with Run(dataclasses.replace(cfg, resume=cfg.resume or bool(looking))) as run:
        if cfg.dry_run:
            dry_run(cfg, run)
        elif cfg.score:
            score_file(cfg, run)
        elif cfg.show:
            teacher, student, task, examples, name = load_newest(cfg, run)
            run.print(
                f"by {name}\n"
                + describe(explain(teacher, student, examples[:1], task, cfg, run), cfg.lam, cfg.alpha)
            )
        elif cfg.teacher is None:
            hop_study(cfg, run)  # pretrain -> warm up -> RL -> collect -> distil -> evaluate, a grid of jobs
        else:
            text_study(cfg, run)  # the same stages, one run over all ranks


if __name__ == "__main__":
    main()
