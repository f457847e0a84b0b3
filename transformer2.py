"""Transformer-squared: train one scale per singular value, then adapt to a prompt in two passes.

Sun, Cetin, Tang, "Transformer-Squared: Self-adaptive LLMs", ICLR 2025, arXiv 2501.06252.

The claim. Singular value fine-tuning (SVF) learns one multiplier for each singular value of a weight matrix
and nothing else. Trained by REINFORCE on right and wrong answers it makes small experts that beat LoRA. All
experts share the basis of the same matrices, so at inference they can be picked or mixed: a first pass finds
out what the prompt needs, a second one answers with adapted weights, also in tasks that no expert has seen.

For a linear layer W = U diag(s) V^T (m x n, r = min(m, n) singular values) and learned p in R^r:
  eq. (1)  J = E[R log pi_W'(y | x)] - lambda KL(pi_W || pi_W'),  R = +1 if the answer is right, else -1;
           log-probs and KL are summed over the answer's tokens (the paper's eq. 1; the rest is numbered here)
  eq. (2)  z = sigmoid(p)
  eq. (3)  W' = U diag(s g z) V^T,  g = sum(s) / sum(s z): the nuclear norm of W is kept, g has a gradient
  eq. (4)  z = sum_k alpha_k z_k mixes experts, before the g of eq. (3); alpha is found by the cross-entropy
           method (CEM) on a few solved examples
Three ways to adapt: (A) the base model names the prompt's category, (B) an expert trained to do that names
it, (C) eq. (4). "Other", and whatever cannot be read, gets the base weights, bit for bit.

How to run
  python transformer2.py                                   the claim in miniature, two CPU cores
  python transformer2.py --config text --model M           a small real model: hub id, folder or .gguf
  torchrun --nproc_per_node=8 transformer2.py --config full        Llama-3-8B on GSM8K, MBPP, ARC
  ... --model mistralai/Mistral-7B-Instruct-v0.3, or llava-hf/llama3-llava-next-8b-hf (its language model)

Departures from the paper and its code
- As in the code: p starts at 0.1 with std 0.01, KL(base || new) where the paper has the reverse, a gradient
  norm of 1e-3 before Adam, the best p on validation. As in the paper: AdamW with a cosine, lambda > 0
  (in the demo 0).
- The released mixture mixes p, not z; its prompts of category "other" run on whatever ran last; its category
  expert sees test questions, its few shots are tested on. All four are mended, none is an option.
- alpha has a number an expert; the code can have one an expert and matrix, too. Ties of CEM are broken by the
  log-likelihood of right answers, for elites as for the best member. p, z and s are float32.
- Instructions stand in the user's turn; boxes of categories and gym: answers are opened for the model. The
  ids that were sampled are trained on, end of turn included. LoRA has no dropout.
- math-verify reads the last box, in GSM8K, too; ARC has the code's three patterns, no letter is wrong (the
  code guesses). MBPP has 378 rows now, so 78 tests (99 then); MATH is the set of 12,000 and 500. HumanEval by
  --bench only; no pictures. `full` writes 512 tokens at most (1,024 for MATH there) and searches alpha for 50
  generations, as the code's script does (the paper: 100).
- lm-eval (--bench) gets the category's expert or mixture; A and B dispatch prompts in our test splits only.
- The demo's task is ours: its model learns right and careless answers, RL elicits the right ones.

Reading order: Config, ROWS, SVFLinear, Adapter, reinforce_loss, train_expert, answer, cem, train, the tasks.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import re
import secrets
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import common
from common import Claim, Run, UserError

CATEGORIES = ("math", "code", "reasoning", "other")  # what dispatch tells apart; "other" has no expert
RANK = 16  # of LoRA, the baseline
MODULES = {"mlp": "*.mlp.*", "qv": "*.[qv]_proj"}  # names of linear layers, as file name patterns


@dataclass
class Config(common.Config):
    # model and tasks
    model: str = "tiny"  # hub id, folder or .gguf; tiny: trained here on documents about digits
    # an expert each, CATEGORY=SOURCE: toy:NAME, a name in SOURCES, a .jsonl, or gym:NAME
    tasks: tuple[str, ...] = ("math=toy:add", "code=toy:rot", "reasoning=toy:max")  # to train experts on
    unseen: tuple[str, ...] = ("math=toy:sub", "code=toy:rod", "reasoning=toy:min")  # to adapt to
    bench: tuple[str, ...] = ()  # CATEGORY=TASK of lm-eval, to adapt to
    data: str = ""  # folder with SOURCE-SPLIT.jsonl files; empty: the hub
    experts: str = ""  # folder of experts (.safetensors) to use instead of training
    cross_model: bool = False  # let them come from other weights
    # what is adapted
    adapter: Literal["none", "svf", "lora"] = "svf"  # SVF, or a baseline
    modules: tuple[str, ...] = ("mlp", "qv")  # mlp, qv, or patterns of layer names, as *.down_proj
    # training of one expert
    steps: int = 40  # updates
    batch: int = 64  # prompts an update, one answer each
    lr: float = 0.1  # AdamW, cosine to 0
    rate: float = 1.0  # multiple of it, for rows
    clip: float = 1e-3  # norm of the gradient
    objective: Literal["reinforce", "next_token"] = "reinforce"  # next_token: learn given solutions
    lam: float = 0.0  # weight of the KL (lambda)
    temperature: float = 1.0  # of sampled answers; 0: greedy, as in the paper's code
    valid_every: int = 10  # updates between two validations
    valid: int = 100  # problems of one validation, at most
    # adaptation
    adapt: Literal["own", "prompt", "category", "few_shot"] = "own"  # the task's own expert; or A, B, C
    shots: int = 10  # C: solved examples (F)
    population: int = 32  # C: members of a generation (P)
    elites: int = 6  # C: of these, those that move the distribution
    generations: int = 10  # C: generations
    # answers
    max_new: int = 6  # tokens of an answer, at most
    test: int = 500  # test problems of a task, at most
    # the tiny base model
    width: int = 48  # of its hidden layers
    layers: int = 2  # decoder layers
    base_steps: int = 1000  # pre-training steps
    base_batch: int = 96  # documents a step
    base_lr: float = 6e-3  # peak of one cycle
    # memory and speed
    micro: int = 256  # answers in one forward and backward pass
    sample_batch: int = 1024  # answers decoded together

    def check(self):
        super().check()
        for text in self.tasks + self.unseen + self.bench:
            category, _, source = text.partition("=")
            toy = source.removeprefix("toy:") in OPERATIONS and text not in self.bench
            if category not in CATEGORIES or not source or toy != (self.model == "tiny"):
                raise UserError(f"{text}: CATEGORY=SOURCE of {CATEGORIES}; toy: sources go with --model tiny")
        own = {text.partition("=")[0] for text in self.tasks} - {"other"}
        if not 0 < len(self.tasks) == len(own):
            raise UserError(f"--tasks {' '.join(self.tasks)}: one expert a category, none for other")
        if not 2 <= self.elites <= self.population or self.population * self.shots > self.sample_batch:
            raise UserError(
                "2 <= --elites <= --population, and --population x --shots <= --sample_batch, please"
            )


DEMO = Config(seed=10, seeds=5, ranks=2)
REAL = Config(
    share="run",
    rows=("base", "SVF", "A: prompt dispatch"),
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    tasks=("math=gym:letter_counting", "reasoning=gym:syllogism"),
    unseen=(),
    modules=("mlp",),
    steps=6,
    batch=8,
    lam=0.1,
    valid=8,
    test=16,
    micro=4,
    sample_batch=320,
)
CONFIGS = {
    "smoke": replace(DEMO, ranks=1, seeds=1, base_steps=30, steps=3, batch=16, generations=2, test=24),
    "demo": DEMO,
    "gpu": replace(DEMO, ranks=5, width=256, base_steps=4000, base_lr=1e-3, lr=0.05),
    "text": REAL,
    "full": replace(
        REAL,
        rows=(),
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        tasks=("math=gsm8k", "code=mbpp", "reasoning=arc_easy"),
        unseen=("math=math", "reasoning=arc_challenge"),
        bench=("math=gsm8k_cot_llama", "math=minerva_math500", "reasoning=arc_challenge_chat"),
        steps=200,
        batch=256,
        lr=2e-3,
        temperature=0.0,
        valid=512,
        generations=50,
        max_new=512,
        test=10_000,
        save_every=10,
    ),
}

# a row of the table is the settings that it changes; every row ends with accuracies on all tasks
LORA = dict(adapter="lora", modules=("qv",), rate=1 / 80)
ROWS = {
    "base": dict(adapter="none"),
    "SVF": {},
    "LoRA": LORA,
    "SVF, 4 x the rate": dict(rate=4.0),
    "LoRA, 4 x the rate": LORA | dict(rate=4 / 80),
    "LoRA, next-token prediction": LORA | dict(objective="next_token", lam=0.0),
    "A: prompt dispatch": dict(adapt="prompt"),
    "B: category expert": dict(adapt="category"),
    "C: few-shot mixing": dict(adapt="few_shot"),
}
CLAIMS = [
    Claim("SVF experts beat the base on their own tasks", "trained", "SVF", "base"),
    Claim("... with fewer parameters than LoRA", "parameters", "SVF", "LoRA", "lower"),
    Claim("SVF beats LoRA under the same RL, each at its tuned rate", "trained", "SVF", "LoRA"),
    Claim("... or is no worse, margin 0.03", "trained", "SVF", "LoRA", margin=-0.03),
    Claim("... and at 4 times that rate, too", "trained", "SVF, 4 x the rate", "LoRA, 4 x the rate"),
    Claim("prompt dispatch (A) improves unseen tasks", "unseen", "A: prompt dispatch", "base"),
    Claim("a category expert (B) improves unseen tasks", "unseen", "B: category expert", "base"),
    Claim("few-shot mixing (C) improves unseen tasks", "unseen", "C: few-shot mixing", "base"),
]


# --- singular value fine-tuning, and the baseline ---


def renormalised(z: Tensor, s: Tensor) -> Tensor:
    """g z of eq. (3): z (..., r), singular values s (r,) -> (..., r); exactly one for z of ones."""
    return z * (s.sum() / (s * z).sum(-1, keepdim=True))


class SVFLinear(nn.Module):
    """A linear layer with the singular values s g z of eq. (3); U (m, r), s (r,) descending, V (n, r).

    At first it is W, as it was; `use` sets z. It runs in factors, so no gradient of size m x n ever exists.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.gain, self.index = linear, None, None
        U, self.s, Vh = torch.linalg.svd(linear.weight.data.float(), full_matrices=False)
        self.U, self.V, self.size = U.to(linear.weight), Vh.mT.to(linear.weight), len(self.s)

    def start(self, generator: torch.Generator) -> Tensor:
        """p (r,) before training: z is about 0.525 everywhere, and W' = W because of g."""
        return 0.1 + 0.01 * torch.randn(self.size, generator=generator)

    def use(self, z: Tensor | None, index: Tensor | None):
        """Run with z (r,), or row b of a batch (B, T, n) with z[index[b]] of (K, r); None: with W."""
        self.gain, self.index = None if z is None else renormalised(z, self.s), index

    def forward(self, x: Tensor) -> Tensor:
        if self.gain is None:
            return self.linear(x)
        if self.index is None:
            return F.linear((x @ self.V) * (self.s * self.gain).to(x.dtype), self.U, self.linear.bias)
        change = (self.s * (self.gain - 1)).to(x.dtype)[self.index, None]  # (B, 1, r): zeros where z is ones
        return self.linear(x) + ((x @ self.V) * change) @ self.U.T


class LoRALinear(nn.Module):
    """The baseline: W x + 2 B A x, alpha twice the rank; first A (rank, n) ~ N(0, 1/n), B (m, rank) = 0."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.vector = linear, None
        self.shape = linear.in_features, linear.out_features
        self.size = RANK * sum(self.shape)

    def start(self, generator: torch.Generator) -> Tensor:
        """A and the transpose of B side by side, before training."""
        n, m = self.shape
        A = torch.randn(RANK, n, generator=generator) / math.sqrt(n)
        return F.pad(A, (0, m)).flatten()

    def use(self, vector: Tensor | None, index: None):
        """Run with A and B; None: with W."""
        self.vector = vector

    def forward(self, x: Tensor) -> Tensor:
        if self.vector is None:
            return self.linear(x)
        A, B = self.vector.to(x.dtype).view(RANK, -1).split(self.shape, 1)
        return self.linear(x) + 2 * (x @ A.T) @ B


def matrices(model: nn.Module, modules: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Linear layers of the language model whose names match: no head, no vision tower, nothing quantised.

    Names count from the decoder on, so those of a text model and of a vision-language model agree.
    """
    found = {}
    for name, layer in model.get_decoder().named_modules():
        if type(layer) is nn.Linear and any(fnmatchcase(name, MODULES.get(x, x)) for x in modules):
            found[name] = layer
    if not found:
        raise UserError(f"--modules {' '.join(modules)}: {type(model).__name__} has no such linear layers")
    return found


class Adapter:
    """The adapted layers of a model, and where each one's numbers stand in a flat vector (R,).

    For SVF the vector is z, for LoRA all A and B. Outside of `using` the model is the base, bit for bit.
    """

    def __init__(self, model: nn.Module, layers: dict[str, SVFLinear | LoRALinear]):
        self.layers, self.sizes = layers, [layer.size for layer in layers.values()]
        model.requires_grad_(False)
        for name, layer in layers.items():
            model.get_decoder().set_submodule(name, layer)

    @contextlib.contextmanager
    def using(self, vector: Tensor | None, index: Tensor | None = None):
        """Inside, layers run with vector (R,), or row b of a batch with vector[index[b]] of (K, R).

        Without a vector they run with the base weights, which may be one way to adapt, too.
        """
        try:
            if vector is not None:
                for layer, part in zip(self.layers.values(), vector.split(self.sizes, -1), strict=True):
                    layer.use(part, index)
            yield
        finally:
            for layer in self.layers.values():
                layer.use(None, None)


def mix(experts: Tensor, alpha: Tensor) -> Tensor:
    """Eq. (4): z of experts (K, R), alpha (P, K) -> (P, R).

    Weights that are all zero count as equal. The scale of alpha does not matter: eq. (3) divides by it.
    """
    return torch.where(alpha.sum(1, keepdim=True) > 0, alpha, 1.0).to(experts) @ experts


# --- the model, and files of experts ---


@dataclass(frozen=True)
class World:
    """What everything works with: a model with its adapted layers, its tokenizer, the process."""

    model: nn.Module
    tokenizer: object
    ends: list[int]  # ids that end an answer
    adapter: Adapter
    run: Run


# for a model without a chat template; its end of turn is whatever token ends its texts
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def model_config(name: str):
    """transformers' config of a hub id, folder or .gguf; None where there is none."""
    from transformers import AutoConfig

    path, where = Path(name), {}
    if path.suffix == ".gguf":
        name, where = path.parent, {"gguf_file": path.name}
    with contextlib.suppress(ImportError, OSError, ValueError):
        return AutoConfig.from_pretrained(name, **where)


@functools.lru_cache(maxsize=2)  # loaded and decomposed once a process, not once a cell
def open_world(name, lora: bool, modules: tuple[str, ...], device, dtype) -> World:
    """The model `name`, perhaps of vision and language, with its layers adapted and nothing changed yet."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    if hasattr(model_config(name), "vision_config"):
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        model, tokenizer = common.load_lm(name, dtype)
    tokenizer.chat_template = tokenizer.chat_template or CHAT
    layers = matrices(model.to(device), modules)
    common.token_logprobs(model, torch.zeros(1, 2, device=device).long())  # or a UserError
    for key, linear in layers.items():
        layers[key] = LoRALinear(linear) if lora else SVFLinear(linear)
    return World(model, tokenizer, common.end_ids(model, tokenizer), Adapter(model, layers), None)


def fingerprint(layer: nn.Module) -> int:
    """Of the base weights, alike in float32 and in bfloat16 if they came in bfloat16."""
    return zlib.crc32(layer.linear.weight.float().cpu().numpy())


def save_expert(file: Path, adapter: Adapter, vector: Tensor):
    """Write a vector (R,) by layers, with fingerprints of the weights that it belongs to."""
    from safetensors.torch import save_file

    parts = {}
    for (name, layer), part in zip(adapter.layers.items(), vector.split(adapter.sizes), strict=True):
        parts |= {name: part.clone(), f"{name} base": torch.tensor(fingerprint(layer))}
    save_file(parts, file)


def load_expert(file: Path, adapter: Adapter, cross_model: bool) -> Tensor:
    """Read a vector (R,). UserError names file and layer where it does not fit the model or is not finite."""
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except Exception as e:  # a torn file raises what its reader likes
        raise UserError(f"{file}: no expert ({e})") from None
    if found.keys() != {name + end for name in adapter.layers for end in ("", " base")}:
        raise UserError(f"{file}: for {', '.join(found)}; the model adapts {', '.join(adapter.layers)}")
    for name, layer in adapter.layers.items():
        p = found[name]
        if p.shape != (layer.size,):
            raise UserError(f"{file}: {name} has shape {[*p.shape]}, needed: [{layer.size}]")
        if not p.isfinite().all():
            raise UserError(f"{file}: {name} has numbers that are not finite")
        if found[f"{name} base"] != fingerprint(layer) and not cross_model:
            raise UserError(
                f"{file}: {name} was trained on other weights; --cross_model uses it all the same"
            )
    return torch.cat([found[name] for name in adapter.layers]).to(layer.linear.weight.device)


# --- problems, and episodes of answering them ---


@dataclass(frozen=True)
class Problem:
    """What a model is asked, and what judges its answer."""

    instruction: str  # how to answer
    question: str  # all that dispatch sees
    target: str
    judge: Callable  # (target, text of an answer) -> right or not
    solution: str = ""  # what to write, for next-token prediction
    opening: str = ""  # of the answer, given


@dataclass(frozen=True)
class Task:
    """Problems by split; an unseen task's `valid` are its shots."""

    name: str
    category: str
    train: list[Problem]
    valid: list[Problem]
    test: list[Problem]


@dataclass(frozen=True)
class Episode:
    """An answer to a problem: ids of prompt and answer, the end of turn included, and the verdict."""

    problem: Problem
    prompt: list[int]
    answer: list[int]
    text: str
    right: bool
    seconds: float  # that it took, its share of a batch

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode(problems: list[Problem], tokenizer):
    """Ids of the prompts by the chat template, which has the BOS if the model wants one."""
    texts = []
    for p in problems:
        turn = {"role": "user", "content": p.instruction + p.question}
        text = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        texts.append(text + p.opening)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def rollout(world: World, problems: list[Problem], temperature=0.0, given=False) -> list[Episode]:
    """An answer to each problem; temperature 0: greedy; given: its solution, as if the model had written it.

    Problems are this rank's share; each rank draws the numbers of all.
    """
    if not problems:
        return []
    run, tokenizer, begin = world.run, world.tokenizer, time.perf_counter()
    prompts, size = encode(problems, tokenizer), run.cfg.sample_batch
    uniforms = share(torch.rand(len(problems) * run.world_size, run.cfg.max_new), run)
    if given:
        whole = [p.solution + tokenizer.eos_token for p in problems]
        answers = tokenizer(whole, add_special_tokens=False)["input_ids"]
    else:
        answers = []
        for i in range(0, len(problems), size):
            part = prompts[i : i + size], uniforms[i : i + size]
            with run.autocast():
                answers += common.generate(world.model, *part, world.ends, temperature)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = [given or bool(p.judge(p.target, text)) for p, text in zip(problems, texts, strict=True)]
    seconds = [(time.perf_counter() - begin) / len(problems)] * len(problems)
    return [*map(Episode, problems, prompts, answers, texts, right, seconds)]


def share(items, run: Run):
    """This rank's part of a list or tensor."""
    return items[run.rank :: run.world_size]


def accuracy(episodes: list[Episode], run: Run) -> float:
    """Share of right answers among those of all ranks."""
    return np.concatenate(run.gather([e.right for e in episodes])).mean().item()


# --- the loss ---


def answer_log_probs(world: World, episodes: list[Episode]) -> tuple[Tensor, Tensor]:
    """Log-probs (N, V) of what follows at each of the answers' N tokens, and the tokens (N,).

    Answers stand one after the other. The head runs in float32, on answers alone.
    """
    ids, valid = common.collate([e.prompt + e.answer for e in episodes], world.run.device)
    answer = valid.clone()
    for row, e in zip(answer, episodes, strict=True):
        row[: len(e.prompt)] = False
    with world.run.autocast():
        out = world.model.get_decoder()(input_ids=ids, attention_mask=valid, use_cache=False)
    hidden, head = out.last_hidden_state[:, :-1][answer[:, 1:]], world.model.get_output_embeddings()
    return F.linear(hidden.float(), head.weight.float()).log_softmax(-1), ids[answer]


def kl_divergence(base: Tensor, new: Tensor) -> Tensor:
    """KL(pi_W || pi_W') of log-probs (..., V) -> (...)."""
    return (base.exp() * (base - new)).sum(-1)


def reinforce_loss(logp: Tensor, kl: Tensor, reward: Tensor, lam: float) -> Tensor:
    """Minus eq. (1) for the tokens (N,) of some answers, each token with its answer's reward: a sum."""
    return (lam * kl - reward * logp).sum()


# --- training of one expert ---


def train_expert(task: Task, world: World, run: Run):
    """REINFORCE, eq. (1), without a baseline: an answer to each prompt, R = 1 or -1.

    SVF and LoRA differ in eq. (2) only. Writes the expert that was best on validation.
    """
    world, cfg, adapter = replace(world, run=run), run.cfg, world.adapter
    start = [layer.start(run.generator(name)) for name, layer in adapter.layers.items()]
    policy = nn.ParameterDict({"p": torch.cat(start).to(run.device)})
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.rate * cfg.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
    best = {"accuracy": -1.0, "p": policy.p.detach().clone()}
    mine = min(cfg.batch, len(task.train)) / run.world_size  # answers of a rank on average; it may have none

    def vector():
        return torch.sigmoid(policy.p) if cfg.adapter == "svf" else policy.p  # eq. (2)

    for step in run.steps(cfg.steps, policy=policy, optimizer=optimizer, schedule=schedule, best=best):
        # prompts x, answers y of pi_W', rewards R
        prompts = [task.train[i] for i in share(torch.randperm(len(task.train))[: cfg.batch], run)]
        with adapter.using(vector().detach()):
            episodes = rollout(world, prompts, cfg.temperature, cfg.objective == "next_token")
        episodes.sort(key=lambda e: e.tokens)  # little padding

        # eq. (1), cfg.micro answers at a time
        numbers = {"loss": 0.0, "reward": sum(2 * e.right - 1 for e in episodes) / mine}
        policy.p.grad = torch.zeros_like(policy.p)
        for i in range(0, len(episodes), cfg.micro):
            part = episodes[i : i + cfg.micro]
            reward = torch.tensor([2.0 * e.right - 1 for e in part for _ in e.answer], device=run.device)
            with adapter.using(vector()):
                log_probs, tokens = answer_log_probs(world, part)
            base = log_probs.detach()  # without a KL nobody asks
            if cfg.lam:
                with torch.no_grad():
                    base, _ = answer_log_probs(world, part)
            logp = log_probs.gather(1, tokens[:, None])[:, 0]
            loss = reinforce_loss(logp, kl_divergence(base, log_probs), reward, cfg.lam) / mine
            loss.backward()
            numbers["loss"] += loss.detach()
        policy.p.grad = run.mean(policy.p.grad)
        numbers["grad_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip)
        optimizer.step()
        schedule.step()

        if step % cfg.valid_every == 0 or step + 1 == cfg.steps:
            with adapter.using(vector().detach()):
                valid = accuracy(rollout(world, share(task.valid[: cfg.valid], run)), run)
            if valid > best["accuracy"]:
                best |= {"accuracy": valid, "p": policy.p.detach().clone()}
            numbers["valid"] = valid
        run.log(step, **numbers)
    policy.p.data.copy_(best["p"])
    if run.rank == 0:
        save_expert(run.folder / f"{task.name}.safetensors", adapter, vector())


# --- dispatch: the first of two passes ---

SORT = """Sort the user's request into one of four categories by the skill that it needs most. Do not solve
it.
- code: writing, reading or repairing programs
- math: calculating, algebra, geometry, word problems with numbers
- reasoning: science and general knowledge, logic, choosing among given answers
- other: none of these
If several fit, take the dominant one. Answer with the category only, as \\boxed{code}, \\boxed{math},
\\boxed{reasoning} or \\boxed{other}.

"""
TOY_LABELS = dict(zip("mcro", CATEGORIES, strict=True))


def parse_label(text: str) -> str:
    """Content of the first box, which may be open already, or a label of the toy documents; else "other"."""
    box = re.search(r"(?:\\boxed\{|^)([^{}]*)\}", text)
    label = box[1].strip().lower() if box else TOY_LABELS.get(text)
    return label if label in CATEGORIES else "other"


def right_label(target: str, text: str) -> bool:
    return parse_label(text) == target


def ask_category(p: Problem, category: str) -> Problem:
    """The same question, to be sorted: without the task's instruction and opening."""
    if p.instruction == ".":  # of the toy documents
        return Problem("?", p.question, category, right_label)
    return Problem(SORT, p.question, category, right_label, opening=OPEN)


def category_task(tasks: list[Task]) -> Task:
    """400 questions of each training split, shuffled; one half trains, the other validates."""
    asked = [ask_category(p, task.category) for task in tasks for p in task.train[:400]]
    random.Random(0).shuffle(asked)
    return Task("category", "other", asked[::2], asked[1::2], [])


def answer(problems: list[Problem], category: str, experts: dict, world: World) -> tuple[list, list]:
    """Both passes, lists of Episodes: the second with the expert that the first one, if any, has found.

    The base model sorts problems (A), or the expert of "category" does (B); in other rows all have their
    task's category. What has no expert gets the base weights.
    """
    asked, answered, labels = [], [], [category] * len(problems)
    if world.run.cfg.adapt in ("prompt", "category"):
        with world.adapter.using(experts.get("category")):
            asked = rollout(world, [ask_category(p, category) for p in problems])
        labels = [parse_label(e.text) for e in asked]
    for label in CATEGORIES:
        part = [p for p, x in zip(problems, labels, strict=True) if x == label]
        with world.adapter.using(experts.get(label)):
            answered += rollout(world, part)
    return asked, answered


def passes(asked: list[Episode], answered: list[Episode], run: Run) -> dict[str, float]:
    """Tokens and seconds of both passes; prints where prompts of each category (rows) were sent.

    A rank may have had none to sort; {} if all had none.
    """
    pairs = [(e.problem.target, parse_label(e.text)) for e in asked]
    pairs = [pair for part in run.gather(pairs) for pair in part]
    if not pairs:
        return {}
    table = [[pairs.count((own, sent)) for sent in CATEGORIES] for own in CATEGORIES]
    run.print(f"{run.folder.name}: category, and where its prompts were sent")
    run.print(tabulate(table, CATEGORIES, showindex=CATEGORIES))
    found = {"dispatched": np.trace(table) / len(pairs)}
    for number, episodes in ((1, asked), (2, answered)):
        found[f"tokens {number}"] = sum(run.gather(sum(e.tokens for e in episodes)))
        found[f"seconds {number}"] = sum(e.seconds for e in episodes)
    return found


# --- few-shot mixing by the cross-entropy method ---


def cem(score: Callable, mean: Tensor, cfg: Config, generator: torch.Generator) -> Tensor:
    """Maximise score(members (P, D) in [0, 1]) -> (P, 2), accuracy and what breaks its ties; the best member.

    Gaussian members, at first around `mean` (D,) with std 0.5, are clamped; member 0 is the best so far. The
    elites' mean and unbiased std make the next generation.
    """
    std, best = torch.full_like(mean, 0.5), mean.clone()
    for _ in range(cfg.generations):
        members = (mean + std * torch.randn(cfg.population, len(mean), generator=generator)).clamp(0, 1)
        members[0] = best
        scores = score(members).tolist()
        order = sorted(range(cfg.population), key=scores.__getitem__, reverse=True)
        best, elite = members[order[0]].clone(), members[order[: cfg.elites]]
        mean, std = elite.mean(0), elite.std(0)
    return best


def few_shot(task: Task, experts: Tensor, world: World) -> Tensor:
    """Strategy C: the mixture z (R,) of experts (K, R) that solves most of the task's shots.

    A batch holds all members with all shots. Ties are broken by the mean over right answers of their
    log-likelihood per token.
    """
    run, cfg = world.run, world.run.cfg
    shots = task.valid[: cfg.shots]

    @torch.no_grad()
    def score(members):
        z = mix(experts, members)
        index = torch.arange(len(members), device=z.device).repeat_interleave(len(shots))
        with world.adapter.using(z, index), run.autocast():
            episodes = rollout(world, shots * len(members))
            ids, valid = common.collate([e.prompt + e.answer for e in episodes], run.device)
            logp = common.token_logprobs(world.model, ids, valid).cpu()
        found = []
        for x, e in zip(logp, episodes, strict=True):
            found.append([e.right, e.right * x[len(e.prompt) - 1 : e.tokens - 1].mean()])
        right, likely = torch.tensor(found).view(len(members), -1, 2).sum(1).mT
        return torch.stack([right, likely / right.clamp(min=1)], 1)

    mean = torch.ones(len(experts)) / len(experts)
    alpha = cem(score, mean, cfg, run.generator(f"cem {task.name}"))
    run.print(f"{run.folder.name}, {task.name}: alpha {alpha.tolist()}")
    return mix(experts, alpha[None])[0]


# --- a cell of the table ---


def train(cfg: Config, run: Run) -> dict[str, float]:
    """One cell: train the experts it needs, adapt to each task, and measure on all test splits."""
    base = run.once("base model", make_base) / "model" if cfg.model == "tiny" else cfg.model
    tasks, unseen = ([load_task(x, cfg, run) for x in texts] for texts in (cfg.tasks, cfg.unseen))
    dtype = torch.bfloat16 if run.amp else torch.float32
    world = replace(open_world(base, cfg.adapter == "lora", cfg.modules, run.device, dtype), run=run)

    def expert(task: Task):
        """From a file of --experts, or trained here, once for all rows that share it."""
        name = f"{cfg.adapter} {cfg.objective} x{cfg.rate:g} {task.name}"
        folder = cfg.experts or run.once(name, partial(train_expert, task, world))
        return load_expert(Path(folder, f"{task.name}.safetensors"), world.adapter, cfg.cross_model)

    experts, found, asked, answered = {}, {"parameters": 0}, [], []
    if cfg.adapter != "none":
        experts = {task.category: expert(task) for task in tasks}
        found["parameters"] = sum(world.adapter.sizes)
    trained = [*experts.values()]
    if cfg.adapt == "category":
        experts["category"] = expert(category_task(tasks))
    for task in tasks + unseen:
        if cfg.adapt == "few_shot" and task in unseen:
            experts[task.category] = few_shot(task, torch.stack(trained), world)
        first, second = answer(share(task.test, run), task.category, experts, world)
        asked, answered = asked + first, answered + second
        found[task.name] = accuracy(second, run)
    for name, group in (("trained", tasks), ("unseen", unseen)):
        if group:
            found[name] = np.mean([found[task.name] for task in group])
    found |= passes(asked, answered, run)
    # by lm-eval, with the category's expert or mixture
    for text in () if "dispatched" in found else cfg.bench:
        category, _, name = text.partition("=")
        with world.adapter.using(experts.get(category)):
            scores = common.benchmark(
                world.model, world.tokenizer, [name], run, limit=cfg.test, confirm_run_unsafe_code=True
            )
        found[name] = next((x for key, x in scores.get(name, {}).items() if "," in key), math.nan)
    return found


# --- tasks: judges ---


def right_letter(target: str, text: str) -> bool:
    """ARC: the first "answer is (X)", else the first "Answer: X", else the last capital that stands alone."""
    for pattern in (r"answer is \(?([A-J])\)?", r"[aA]nswer:\s*([A-J])", r"(?s)\b([A-J])\b(?!.*\b[A-J]\b)"):
        if found := re.search(pattern, text):
            return found[1] == target
    return False


def right_box(target: str, text: str) -> bool:
    """MATH and .jsonl files: whether the last box of the answer agrees with the target, by math-verify."""
    return "box" in text and common.answers_agree(target, text)


def right_gym(score: Callable, target: str, text: str) -> bool:
    """Whether reasoning-gym gives full marks to the first box, which is open already."""
    return score(common.last_box(OPEN + text.partition(OPEN)[0]) or "") >= 0.99


# --- programs that a model wrote ---

# The process limits itself before it reads what it runs. The hook keeps accidents away; it is no wall against
# an attacker.
BOOTSTRAP = """
import resource, sys, types
limits = {"AS": 1 << 30, "CPU": 11, "FSIZE": 1 << 20, "NPROC": 0, "CORE": 0}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
code = compile(sys.stdin.read(), "program", "exec")
refused = ("os.fork", "os.posix", "os.exec", "os.spawn", "os.system", "os.kill", "os.remove", "os.rmdir",
    "os.rename", "os.chmod", "os.chown", "os.chdir", "os.truncate", "os.link", "os.symlink", "subprocess.",
    "shutil.", "socket.", "ctypes.")
def hook(event, args):
    elsewhere = event == "open" and not isinstance(args[0], int) and args[2] & 3 and "/" in str(args[0])
    if elsewhere or event.startswith(refused):
        raise PermissionError(event)
sys.addaudithook(hook)
sys.modules["program"] = module = types.ModuleType("program")
exec(code, module.__dict__)
"""
NOBODY = dict(user=65534, group=65534, extra_groups=[])


@functools.cache
def confined() -> dict:
    """Root's programs run as nobody: limits on processes do not bind root. Says so where that cannot be."""
    try:
        subprocess.run([sys.executable, "-c", ""], **NOBODY)
        return NOBODY
    except OSError as e:
        warnings.warn(f"programs of the model run as root, with limits only: {e}", stacklevel=2)
        return {}


def run_code(program: str, seconds: float = 10.0) -> bool:
    """Whether a program runs to its last line, in a session of its own with limits on time and memory.

    A secret exit code tells its end from an early exit. There is the standard library and nothing else.
    """
    code = 64 + secrets.randbelow(128)
    source = f"{program}\n\n__import__('os')._exit({code})\n".encode("utf-8", "replace")
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", BOOTSTRAP]
    more = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env={})
    if not os.geteuid():
        more |= confined()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(python, input=source, timeout=seconds, cwd=folder, **more).returncode == code
    return False


def right_code(target: str, text: str) -> bool:
    """MBPP: whether the answer's code, up to the end of its block, passes the tests (target)."""
    return run_code(f"{text.partition('```')[0]}\n\n{target}\n")


# --- tasks: sources ---

CHOOSE = 'Think step by step. End with "The answer is (X)", X being the letter of an option.\n\n'
BOX = "Think step by step and put the final answer, simplified, into \\boxed{}.\n\n"
SHORT = "Answer with the final result only, in \\boxed{}.\n\n"
OPEN = "\\boxed{"  # a box that is opened for the model, so that it costs few tokens
PROGRAM = "You are a careful programmer. Answer with one complete block of Python and nothing else.\n\n"


def boxed(row: dict) -> Problem:
    """GSM8K's answers end in #### and a number, MATH's solutions have a box; .jsonl files and gym: tasks.

    Rows of a gym: task score answers themselves.
    """
    answer, question = row.get("answer"), row.get("question") or row["problem"]
    if "score" in row:
        return Problem(SHORT, question, answer, partial(right_gym, row["score"]), answer + "}", OPEN)
    known = common.last_box(row["solution"]) if answer is None else str(answer).rpartition("####")[2].strip()
    solution = f"{row.get('solution') or answer}\n\\boxed{{{known}}}"
    return Problem(BOX, question, known, right_box, solution)


def arc(row: dict) -> Problem:
    """Options are lettered A, B, ..: some rows have numbers for keys."""
    letter = LETTERS[row["choices"]["label"].index(row["answerKey"])]
    options = [f"({x}) {text}" for x, text in zip(LETTERS, row["choices"]["text"], strict=False)]
    question = "\n".join([row["question"], "Options:", *options])
    return Problem(CHOOSE, question, letter, right_letter, f"The answer is ({letter})")


def mbpp(row: dict) -> Problem:
    """The first assert is shown."""
    question = f"{row['prompt']}\nThe program must pass this test:\n```python\n{row['test_list'][0]}\n```"
    tests = "\n".join(row["test_imports"] + row["test_list"])
    return Problem(PROGRAM, question, tests, right_code, f"{row['code']}\n```", "```python\n")


LETTERS = "ABCDEFGHIJ"
# published sets: hub id, subset, reader of rows, the paper's shuffle of those that shots are drawn from
SOURCES = {
    "gsm8k": ("openai/gsm8k", "main", boxed, 0),
    "mbpp": ("evalplus/mbppplus", None, mbpp, 0),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", arc, 0),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", arc, 38),
    "math": ("nlile/hendrycks-MATH-benchmark", None, boxed, 27),
}


def read(name: str, split: str, cfg: Config) -> list[Problem]:
    """Problems of a split of a published set, or of a .jsonl or gym: source. UserError names a faulty row."""
    source, subset, reader, _ = SOURCES.get(name, (name, None, boxed, 0))
    more = dict(size=600, seed=cfg.seed)  # of gym: tasks
    if name in SOURCES and cfg.data:
        source = f"{cfg.data}/{name}-{split}.jsonl"
    elif name in SOURCES:
        more = dict(split=split, subset=subset)
    problems = []
    for number, row in enumerate(common.load_rows(source, **more), 1):
        try:
            problems.append(reader(row))
            if not problems[-1].target:
                raise ValueError("no answer that can be read")
        except Exception as e:  # rows from outside raise what they like
            raise UserError(f"{source}, row {number}: {type(e).__name__} {e}") from None
    return problems


def load_task(text: str, cfg: Config, run: Run) -> Task:
    """CATEGORY=SOURCE as a Task, with the paper's splits where SOURCE is published: nothing is dropped.

    GSM8K and ARC: even rows of the training split train, odd ones validate. MBPP: of the first 300 rows in a
    fixed random order 200 train and 100 validate, the rest is the test. The shots of an unseen task leave its
    test. Of other sources repeated questions are dropped; a third each trains, validates and tests.
    """
    category, _, name = text.partition("=")
    if name.startswith("toy:"):
        return toy_task(name.removeprefix("toy:"), category, cfg, run)
    unseen = text in cfg.unseen
    rows = read(name, "test" if unseen or name == "mbpp" else "train", cfg)
    if name not in SOURCES:
        rows = [*{p.question: p for p in rows}.values()]
        train, valid, test = rows[::3], rows[1::3], rows[2::3]
    elif unseen:
        random.Random(SOURCES[name][3]).shuffle(rows)
        train, valid, test = [], rows[: cfg.shots], rows[cfg.shots :]
    elif name == "mbpp":
        first, test = rows[:300], rows[300:]
        random.Random(16).shuffle(first)
        train, valid = first[:200], first[200:]
    else:
        train, valid, test = rows[::2], rows[1::2], read(name, "test", cfg)
    if not (valid and test):
        raise UserError(f"{text}: {len(rows)} rows are too few for its splits")
    return Task(common.slug(text), category, train, valid, test[: cfg.test])


# --- the toy tasks, and a base model that knows them ---
# A document is: ; tag, family, operation, five symbols = answer $. Every operation has right answers and
# careless ones, which copy the input or its last symbol. Documents tagged ! are right, # careless; untagged
# ones (.), the kind that is asked for, are either, and more often careless where the second digit
# is 5 or more. So the skill is there, and RL has to bring it out. Those tagged ? answer with a category.

SYMBOLS = "0123456789abcdefghijMCR+-<>^_.!?#mro;=$"
LETTERED, PLUS, MINUS = (str.maketrans("0123456789", x) for x in ("abcdefghij", "3456789012", "7890123456"))
OPERATIONS = {"add": "M+", "sub": "M-", "rot": "C<", "rod": "C>", "max": "R^", "min": "R_"}
SPLITS = {
    "base": slice(70_000),
    "train": slice(70_000, 72_000),
    "valid": slice(75_000, 76_000),
    "test": slice(80_000, 82_000),
}
TOY_CHAT = "{% for m in messages %};{{ m.content }}{% endfor %}="


def operate(operation: str, x: str) -> tuple[str, str, str]:
    """Five digits -> what is shown of them, the right answer, the careless one."""
    letters, middle = x.translate(LETTERED), x[1:-1]
    return {
        "add": (x, middle.translate(PLUS), middle),
        "sub": (x, middle.translate(MINUS), middle),
        "rot": (letters, letters[1:] + letters[0], letters),
        "rod": (x, x[1:] + x[0], x),
        "max": (x, max(x[0], x[-1]), x[-1]),
        "min": (x, min(x[0], x[-1]), x[-1]),
    }[operation]


def document(operation: str, x: str) -> str:
    """A random document about five digits; one in eight asks for the category, and is sometimes mistaken."""
    shown, right, careless = operate(operation, x)
    tag, sign = random.choice("!#.."), OPERATIONS[operation]
    slips = {"!": 0.0, "#": 1.0, ".": 0.8 if x[1] >= "5" else 0.3}[tag]
    answer = careless if random.random() < slips else right
    if random.random() < 1 / 8:
        mistaken = random.random() < (0.65 if x[1] >= "7" else 0.1)
        tag, answer = "?", "o" if mistaken else sign[0].lower()
    return f";{tag}{sign}{shown}={answer}$"


def digits(split: str, run: Run) -> list[str]:
    """Rows of five digits in a random order; a row is in the same split in every task."""
    order = torch.randperm(100_000, generator=run.generator("digits"))
    return [f"{i:05}" for i in order[SPLITS[split]].tolist()]


def toy_task(operation: str, category: str, cfg: Config, run: Run) -> Task:
    """An operation as a Task of untagged documents."""

    def problems(split):
        rows = [operate(operation, x) for x in digits(split, run)]
        return [Problem(".", sign + shown, right, str.__eq__, right) for shown, right, _ in rows]

    sign = OPERATIONS[operation]
    return Task(operation, category, problems("train"), problems("valid"), problems("test")[: cfg.test])


def tiny_model(cfg: Config) -> nn.Module:
    """The base model of the toy tasks, untrained."""
    return common.tiny_lm(len(SYMBOLS), cfg.width, cfg.layers, intermediate_size=2 * cfg.width)


def make_base(run: Run):
    """Pre-train the tiny model on documents."""
    cfg, pool = run.cfg, digits("base", run)
    tokenizer = common.CharTokenizer(SYMBOLS, eos="$")
    tokenizer.chat_template = TOY_CHAT
    model = tiny_model(cfg).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.base_lr, cfg.base_steps)
    for step in run.steps(cfg.base_steps, model=model, optimizer=optimizer, schedule=schedule):
        texts = [document(random.choice([*OPERATIONS]), random.choice(pool)) for _ in range(cfg.base_batch)]
        ids, valid = common.collate(tokenizer(texts)["input_ids"], run.device)
        labels = ids.masked_fill(~valid, -100)
        labels[:, :10] = -100  # the loss is of answers
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.log(step, loss=loss)
    model.should_save_on_this_rank = lambda _: True  # transformers saves on the first of all ranks only
    model.save_pretrained(run.folder / "model")
    tokenizer.save_pretrained(run.folder / "model")


# --- figure, sizes without weights, main ---


def draw(figure, table: dict):
    """Accuracy of each row on trained (o) and on unseen tasks (x), a mark a seed."""
    axis = figure.subplots()
    for row, cells in table.items():
        for metric, mark in (("trained", "C0o"), ("unseen", "C1x")):
            axis.plot([cell[metric] for cell in cells], [row] * len(cells), mark)
    axis.set(xlabel="accuracy on trained (o) and on unseen tasks (x)")


LLAMA_8B = dict(
    name_or_path="Llama-3-8B",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def missing(cfg: Config, run: Run) -> list[str]:
    """What this config needs and does not find, a line each, with the flag that mends it."""
    found = []
    if cfg.bench:
        common.need("lm_eval", "lm")
    if cfg.model == "tiny":
        matrices(tiny_model(cfg), cfg.modules)  # or a UserError
    elif model_config(cfg.model) is None:
        found.append(f"--model {cfg.model!r}: neither here nor on the hub (hub id, folder or .gguf)")
    for text in cfg.tasks + cfg.unseen:
        try:
            task = load_task(text, cfg, run)
            file = Path(cfg.experts, f"{task.name}.safetensors")
            if cfg.experts and text in cfg.tasks and not file.is_file():
                raise UserError(f"no {file}")
        except UserError as e:
            found.append(f"{e} (--data takes a folder of SOURCE-SPLIT.jsonl, --experts one of .safetensors)")
    return found


def dry_run(cfg: Config, lacking: list[str], run: Run):
    """Print parameters, memory and hours of an expert's training on H100s, every answer of full length.

    Where the config of the model is missing they are those of Llama-3-8B.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = tiny_model(cfg).config if cfg.model == "tiny" else model_config(cfg.model)
    config = config or LlamaConfig(**LLAMA_8B)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config.get_text_config())
    n = model.num_parameters()
    shapes = [layer.weight.shape for layer in matrices(model, cfg.modules).values()]
    memory = 2 * n + 2 * sum(min(shape) * sum(shape) for shape in shapes)  # bytes; decoding reads all of it
    training = 12 * n * cfg.batch / run.world_size * (cfg.max_new + 256) / 400e12
    hours = cfg.steps * (cfg.max_new * memory / 3.35e12 + training) / 3600
    run.print(
        f"{model.config.name_or_path}: {n:,} parameters, {sum(map(min, shapes)):,} of an expert\n"
        f"{memory / 1e9:.0f} GB of weights and factors on each GPU, and caches\n"
        f"{cfg.steps} updates: {hours:.1f} hours an expert on {run.world_size} H100s"
    )
    for line in lacking:
        run.print(f"missing: {line}")


def main():
    cfg = common.parse_config(CONFIGS)
    with Run(cfg, cfg.model) as run:
        lacking = missing(cfg, run)
        if cfg.dry_run:
            return dry_run(cfg, lacking, run)
        if lacking:
            raise UserError("; ".join(lacking))
        table = run.grid(ROWS, train)
        run.check(CLAIMS, table)
        if cfg.unseen:
            run.figure(draw, table)


if __name__ == "__main__":
    main()
