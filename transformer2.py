"""Transformer-squared: train one scale per singular value, then adapt to a prompt in two passes.

Sun, Cetin, Tang, "Transformer-Squared: Self-adaptive LLMs", ICLR 2025, arXiv 2501.06252.

The claim. Singular value fine-tuning (SVF) learns one multiplier for each singular value of a weight matrix
and nothing else. Trained by REINFORCE on right and wrong answers it makes small experts that beat LoRA. All
experts share the basis of the same matrices, so at inference they can be picked or mixed: a first pass finds
out what the prompt needs, a second one answers with adapted weights, also in tasks that no expert has seen.

For a linear layer W = U diag(s) V^T (m x n, r = min(m, n) singular values) and learned p in R^r:
  eq. (1)  J = E[R log pi_W'(y | x)] - lambda KL(pi_W' || pi_W),  R = +1 if the answer is right, else -1;
           log-probs and KL are summed over the answer's tokens (the paper's eq. 1; the rest is numbered here)
  eq. (2)  z = sigmoid(p)
  eq. (3)  W' = U diag(s g z) V^T,  g = sum(s) / sum(s z): the nuclear norm of W is kept, g has a gradient
  eq. (4)  z = sum_k alpha_k z_k mixes experts, before the g of eq. (3); alpha has a number an expert, or one
           an expert and matrix, and is found by the cross-entropy method (CEM) on a few solved examples
Three ways to adapt: (A) the base model names the prompt's category, (B) an expert trained to do that names
it, (C) eq. (4). "Other", and whatever cannot be read, gets the base weights, bit for bit.

How to run
  python transformer2.py                                   the claim in miniature, two CPU cores
  python transformer2.py --config text --model M           a small real model: hub id, folder or .gguf
  torchrun --nproc_per_node=8 transformer2.py --config full        Llama-3-8B on GSM8K, MBPP, ARC-Easy
  ... --model mistralai/Mistral-7B-Instruct-v0.3, or llava-hf/llama3-llava-next-8b-hf (its language model)

Departures from the paper and its code
- As in the code: p starts at 0.1 with std 0.01, KL(base || new), a gradient norm of 1e-3 before Adam, the best
  p on validation is kept. As in the paper: AdamW with a cosine, lambda > 0. p, z and s are float32.
- The code's released mixture mixes p, not z; its prompts of category "other" run on whatever ran last; its
  category expert sees test questions; its few shots are tested on. All four are mended, none is an option.
- Ids are trained on as they were sampled, end of turn included; all prompts go through the chat template.
- Graders: math-verify on the last number (GSM8K) or box (MATH); the code's three patterns for ARC, where no
  letter is wrong (the code guesses); MBPP's own asserts. MBPP now has 378 rows (399 then): 78 are the test.
- LoRA has no dropout. Pictures are not fed: of LLaVA the language model is adapted, to language.
- Ties of CEM are broken by the log-likelihood of right answers, for elites as for the best member.
- The demo's task is ours: its model learns right and careless answers from a corpus, RL elicits the right ones.
  Rates are tuned on seeds from 100 on; a base model that lacks a skill (--gate) ends the run: RL cannot add it.

Reading order: Config, ROWS, SVFLinear, Adapter, reinforce_loss, train_expert, two_pass, cem, train, the tasks.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import common
from common import Claim, Run, UserError

CATEGORIES = ("math", "code", "reasoning", "other")  # what dispatch tells apart; "other" has no expert
MODULES = {"mlp": r"\.mlp\.", "qv": r"\.[qv]_proj$"}  # names of linear layers, as patterns


@dataclass
class Config(common.Config):
    # model and tasks
    model: str = "tiny"  # hub id, folder or .gguf; tiny: trained here on documents about digits
    tasks: tuple[str, ...] = (
        "math=toy:add",
        "code=toy:rev",
        "reasoning=toy:max",
    )  # CATEGORY=SOURCE, an expert
    unseen: tuple[str, ...] = ("math=toy:sub", "code=toy:rvd", "reasoning=toy:min", "other=toy:read")
    data: str = ""  # folder with SOURCE-SPLIT.jsonl files; empty: the hub
    bench: tuple[str, ...] = ()  # lm-eval tasks to evaluate the base and each expert on, too
    experts: str = ""  # folder of experts (.safetensors) to use instead of training
    cross_model: bool = False  # let them come from other weights
    # what is adapted
    adapter: Literal["none", "svf", "lora"] = "svf"  # SVF, or a baseline
    modules: tuple[str, ...] = ("mlp", "qv")  # mlp, qv, or patterns of layer names
    init: float = 0.1  # mean of p at the start
    init_std: float = 0.01  # its standard deviation
    lora_rank: int = 16  # of the baseline
    lora_scale: float = 2.0  # alpha / rank
    # training of one expert
    steps: int = 40  # updates
    batch: int = 96  # prompts an update, one answer each
    lr: float = 0.2  # of p; AdamW, cosine to 0
    lora_lr: float = 5e-3  # the same for LoRA
    rate: float = 1.0  # multiple of either
    clip: float = 1e-3  # norm of the gradient
    lam: float = 0.0  # weight of the KL (lambda)
    kl: Literal["base_new", "new_base"] = (
        "base_new"  # KL(pi_W || pi_W') as in the code, or the paper's reverse
    )
    temperature: float = 1.0  # of sampled answers; 0: greedy, as in the paper's code
    imitate: bool = False  # next-token prediction on given solutions in place of sampled answers
    valid_every: int = 10  # updates between two validations
    valid: int = 200  # problems of one validation, at most
    # adaptation
    adapt: Literal["own", "prompt", "category", "few_shot"] = "own"  # the task's own expert; or A, B, C
    per_matrix: bool = False  # C: alpha has a number for each expert and matrix
    shots: int = 10  # C: solved examples (F)
    population: int = 32  # C: members of a generation (P)
    elite: float = 0.2  # C: share of them that moves the distribution
    generations: int = 15  # C: generations
    questions: int = 400  # B: questions of each task that the category expert learns from
    # answers
    max_new: int = 6  # tokens of an answer, at most
    label_new: int = 2  # tokens of a category
    test: int = 500  # test problems of a task, at most
    code_seconds: float = 10.0  # time limit of one generated program
    # the tiny base model
    width: int = 64  # of its hidden layers
    layers: int = 3  # decoder layers
    base_steps: int = 1000  # pre-training steps
    base_batch: int = 288  # documents a step
    base_lr: float = 4e-3  # peak of one cycle
    gate: float = 0.9  # accuracy on documents tagged as good that a base model must reach in every skill
    # memory and speed
    micro_tokens: int = 16384  # padded tokens in one forward and backward pass
    sample_batch: int = 1024  # answers decoded together
    recompute: bool = False  # layers again in the backward pass, to save memory

    def check(self):
        super().check()
        for text in self.tasks + self.unseen:
            if text.partition("=")[0] not in CATEGORIES or not text.partition("=")[2]:
                raise UserError(
                    f"--tasks, --unseen {text!r}: CATEGORY=SOURCE, one of {', '.join(CATEGORIES)}"
                )
            if text.partition("=")[2].startswith("toy:") != (self.model == "tiny"):
                raise UserError(f"{text}: toy tasks go with --model tiny, others with another model")
        own = [text.partition("=")[0] for text in self.tasks]
        if len({*own, "other"}) <= len(own):
            raise UserError(f"--tasks {' '.join(self.tasks)}: an expert a category, and none for other")
        if self.elites < 2:
            raise UserError("--population times --elite must be 2 or more")
        try:
            re.compile("|".join(self.modules))
        except re.error as e:
            raise UserError(f"--modules {' '.join(self.modules)}: no pattern of names ({e})") from None

    @property
    def elites(self) -> int:
        """Members that move the distribution: the share, rounded down."""
        return int(self.elite * self.population + 1e-9)


DEMO = Config(seeds=3, ranks=2, log_every=10, save_every=1000)
REAL = Config(
    share="run",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    rows=("base", "SVF", "A: prompt dispatch"),
    tasks=("math=gym:chain_sum", "reasoning=gym:coin_flip"),
    unseen=(),
    modules=("mlp",),
    steps=6,
    batch=24,
    lr=0.1,
    lam=0.1,
    valid_every=3,
    valid=24,
    questions=40,
    max_new=16,
    label_new=12,
    test=48,
    micro_tokens=4096,
    sample_batch=64,
    log_every=1,
)
CONFIGS = {
    "smoke": replace(
        DEMO,
        ranks=1,
        seeds=2,
        rows=(
            "base",
            "SVF",
            "LoRA, next tokens",
            "A: prompt dispatch",
            "B: category expert",
            "C: few-shot mixing",
        ),
        width=32,
        layers=2,
        base_steps=30,
        base_batch=60,
        gate=0.0,
        steps=3,
        batch=16,
        valid_every=2,
        valid=16,
        population=10,
        generations=2,
        questions=20,
        test=24,
        log_every=1,
    ),
    "demo": DEMO,
    "gpu": replace(
        DEMO, ranks=4, seeds=5, width=256, layers=6, base_steps=4000, base_lr=1e-3, batch=256, lr=0.05
    ),
    "text": REAL,
    "full": replace(
        REAL,
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        rows=(),
        tasks=("math=gsm8k", "code=mbpp", "reasoning=arc_easy"),
        unseen=("math=math", "code=humaneval", "reasoning=arc_challenge"),
        steps=200,
        batch=256,
        lr=2e-3,
        lora_lr=2e-4,
        temperature=0.0,
        valid_every=10,
        valid=512,
        generations=50,
        questions=400,
        max_new=512,
        label_new=1024,
        test=100_000,
        micro_tokens=16384,
        sample_batch=128,
        recompute=True,
        save_every=10,
    ),
}

# a row of the table is the settings that it changes; every row ends with accuracies on all tasks
LORA = dict(adapter="lora", modules=("qv",))
ROWS = {
    "base": dict(adapter="none"),
    "SVF": {},
    "LoRA": LORA,
    "LoRA, next tokens": LORA | dict(imitate=True),
    "SVF, 4 x the rate": dict(rate=4.0),
    "LoRA, 4 x the rate": LORA | dict(rate=4.0),
    "A: prompt dispatch": dict(adapt="prompt"),
    "B: category expert": dict(adapt="category"),
    "C: few-shot mixing": dict(adapt="few_shot"),
    "C, a weight a matrix": dict(adapt="few_shot", per_matrix=True),
}
CLAIMS = [
    Claim("each SVF expert's task, on average: better than the base", "trained", "SVF", "base"),
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
    """g z of eq. (3): z (..., r), singular values s (r,) -> (..., r); ones, exactly, for z of ones."""
    return z * (s.sum() / (s * z).sum(-1, keepdim=True).clamp_min(1e-30))


class SVFLinear(nn.Module):
    """A linear layer with the singular values s g z of eq. (3); U (m, r), s (r,) descending, V (n, r).

    mode "base": W as it was. "train": in factors, so that no gradient of size m x n exists. "merged": as one
    matrix. "mixed": row b of a batch (B, T, n) has expert index[b] of K, W x plus the change.
    """

    def __init__(self, linear: nn.Linear, U: Tensor, s: Tensor, V: Tensor):
        super().__init__()
        self.weight, self.bias, self.mode, self.size = linear.weight, linear.bias, "base", len(s)
        self.U, self.s, self.V = U, s, V

    def set(self, mode: str, z: Tensor, index: Tensor | None):
        """Run with z (r,), or in mode "mixed" (K, r) and index (B,)."""
        self.mode, self.index, self.scale = mode, index, renormalised(z, self.s)
        if mode == "merged":
            self.merged = ((self.U.float() * (self.s * self.scale)) @ self.V.float().T).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "merged":
            return F.linear(x, self.merged, self.bias)
        if self.mode == "train":
            return F.linear((x @ self.V) * (self.s * self.scale).to(x.dtype), self.U, self.bias)
        y = F.linear(x, self.weight, self.bias)
        if self.mode == "base":
            return y
        change = (self.s * (self.scale - 1)).to(x.dtype)[self.index]  # (B, r): rows of ones change nothing
        return y + ((x @ self.V) * change[:, None]) @ self.U.T


class LoRALinear(nn.Module):
    """The baseline: W x + (alpha / rank) B A x, A (rank, n) from N(0, 1/n) and B (m, rank) = 0 at the start."""

    def __init__(self, linear: nn.Linear, rank: int, factor: float):
        super().__init__()
        self.weight, self.bias, self.mode, self.factor = linear.weight, linear.bias, "base", factor
        (self.m, self.n), self.rank = linear.weight.shape, rank
        self.size = rank * (self.m + self.n)

    def set(self, mode: str, x: Tensor, index: Tensor | None):
        """Run with A and B of a vector (rank n + m rank,)."""
        A, B = x.split([self.rank * self.n, self.m * self.rank])
        self.mode, self.A, self.B = mode, A.view(self.rank, self.n), B.view(self.m, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.mode == "base":
            return y
        return y + self.factor * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


def matrices(model: nn.Module, modules: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Linear layers of the language model whose names match: no head, no vision tower, no projector.

    Names count from the decoder on, so those of a text model and of a vision-language model agree. UserError
    where nothing matches, or where a match is quantised.
    """
    patterns, found, others = [MODULES.get(m, m) for m in modules], {}, set()
    for name, layer in model.get_decoder().named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if not any(re.search(pattern, name) for pattern in patterns):
            others.add(re.sub(r"\d+", "N", name))
        elif type(layer) is nn.Linear and layer.weight.is_floating_point():
            found[name] = layer
        else:
            raise UserError(f"{name} is quantised ({type(layer).__name__}): load the model unquantised")
    if not found:
        raise UserError(f"--modules {' '.join(modules)} matches none of {', '.join(sorted(others))}")
    return found


class Adapter:
    """The adapted layers of a model, and where each one's numbers stand in a flat vector (R,).

    For SVF the vector is z, for LoRA all A and B. Outside of `using` the model is the base, bit for bit.
    """

    def __init__(self, model: nn.Module, layers: dict[str, SVFLinear | LoRALinear]):
        self.layers, self.sizes = layers, [layer.size for layer in layers.values()]
        model.requires_grad_(False)
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_decoder().get_submodule(parent), child, layer)

    @contextlib.contextmanager
    def using(self, mode: Literal["train", "merged", "mixed"], vector: Tensor, index: Tensor | None = None):
        """Inside, layers run with vector (R,), or in mode "mixed" row b with vector[index[b]] of (K, R)."""
        try:
            for layer, part in zip(self.layers.values(), vector.split(self.sizes, -1), strict=True):
                layer.set(mode, part, index)
            yield
        finally:
            for layer in self.layers.values():
                layer.mode, layer.merged = "base", None

    def start(self, cfg: Config, generator: torch.Generator) -> Tensor:
        """p (R,) before training."""
        if cfg.adapter == "svf":
            return cfg.init + cfg.init_std * torch.randn(sum(self.sizes), generator=generator)
        parts = []
        for layer in self.layers.values():
            A = torch.randn(layer.rank * layer.n, generator=generator) / math.sqrt(layer.n)
            parts += [A, torch.zeros(layer.m * layer.rank)]
        return torch.cat(parts)


def mix(experts: Tensor, alpha: Tensor, sizes: list[int]) -> Tensor:
    """Eq. (4): z of experts (K, R), alpha (P, K, J), J matrices or 1 for all alike -> (P, R).

    Weights that are all zero count as equal. The scale of alpha does not matter: eq. (3) divides by it.
    """
    alpha = torch.where(alpha.sum(1, keepdim=True) > 0, alpha, 1.0)
    alpha = alpha.expand(-1, -1, len(sizes)).repeat_interleave(torch.tensor(sizes), 2)  # (P, K, R)
    return (alpha.to(experts) * experts).sum(1)


# --- the model, its factors, expert files ---


@dataclass(frozen=True)
class World:
    """A model with its adapted layers, and what it takes to talk to it."""

    model: nn.Module
    tokenizer: object
    ends: list[int]  # ids that end an answer
    adapter: Adapter


def load_model(name: str, dtype: torch.dtype):
    """(model, tokenizer) by common.load_lm, and vision-language models, too."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    try:
        vision = not name.endswith(".gguf") and hasattr(AutoConfig.from_pretrained(name), "vision_config")
    except (OSError, ValueError):
        vision = False  # load_lm says what is wrong
    if not vision:
        return common.load_lm(name, dtype)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def decompose(name: str, run: Run):
    """Write U, s, V of every adapted matrix, dealt to the ranks: a file of factors for each rank."""
    from safetensors.torch import save_file

    model, _ = load_model(name, torch.float32)
    layers, factors = matrices(model, run.cfg.modules), {}
    for layer in list(layers)[run.rank :: run.world_size]:
        U, s, Vh = torch.linalg.svd(layers[layer].weight.detach().to(run.device), full_matrices=False)
        for key, x in (("U", U), ("s", s), ("V", Vh.mT)):
            factors[f"{layer}.{key}"] = x.cpu().contiguous()
    save_file(factors, run.folder / f"factors{run.rank}.safetensors")


@functools.lru_cache(maxsize=1)  # a real model is loaded once, not once a cell
def open_world(
    name: str, factors: Path | None, modules: tuple, rank: int, scale: float, run_on: tuple
) -> World:
    """The model `name` with SVF on `modules` from a folder of factors, or with LoRA if there is none.

    run_on: device and dtype.
    """
    from safetensors.torch import load_file

    device, dtype = run_on
    model, tokenizer = load_model(name, dtype)
    tokenizer.chat_template = tokenizer.chat_template or CHAT
    model.to(device)
    layers, parts = matrices(model, modules), {}
    for file in factors.glob("factors*.safetensors") if factors else ():
        parts |= load_file(file, device=str(device))
    for key, linear in layers.items():
        if factors:
            U, s, V = (parts.pop(f"{key}.{x}") for x in "UsV")
            layers[key] = SVFLinear(linear, U.to(dtype), s, V.to(dtype))
        else:
            layers[key] = LoRALinear(linear, rank, scale)
    return World(model, tokenizer, common.end_ids(model, tokenizer), Adapter(model, layers))


def fingerprint(layer: nn.Module) -> int:
    """Of base weights, alike in float32 and in bfloat16 if they came in bfloat16."""
    return zlib.crc32(layer.weight.detach().bfloat16().view(torch.int16).cpu().numpy())


def save_expert(file: Path, world: World, vector: Tensor):
    """Write a vector (R,) by layers, with fingerprints of the weights that it belongs to."""
    from safetensors.torch import save_file

    adapter = world.adapter
    parts = dict(zip(adapter.layers, vector.detach().cpu().split(adapter.sizes), strict=True))
    about = {name: fingerprint(layer) for name, layer in adapter.layers.items()}
    save_file({k: v.clone() for k, v in parts.items()}, file, metadata={"base": json.dumps(about)})


def load_expert(file: Path, world: World, cross_model: bool) -> Tensor:
    """Read a vector (R,). UserError names file and layer where it does not fit this model or is not finite."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as f:
            about, parts = json.loads(f.metadata()["base"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{file}: no expert ({str(e).splitlines()[0]})") from None
    layers = world.adapter.layers
    if odd := sorted(set(parts) ^ set(layers)):
        raise UserError(f"{file}: {odd[0]} is not in both the expert and --modules of this model")
    for name, layer in layers.items():
        if parts[name].shape != (layer.size,):
            raise UserError(f"{file}: {name} has {tuple(parts[name].shape)} numbers, needed: {layer.size}")
        if not parts[name].isfinite().all():
            raise UserError(f"{file}: {name} has numbers that are not finite")
        if about.get(name) != fingerprint(layer) and not cross_model:
            raise UserError(
                f"{file}: {name} was trained on other weights; --cross_model uses it all the same"
            )
    return torch.cat([parts[name] for name in layers]).to(world.model.device)


# --- prompts and answers ---


@dataclass(frozen=True)
class Problem:
    """What a model is asked, and what judges its answer."""

    system: str
    question: str  # the user's turn, and all that dispatch sees
    target: str
    solution: str  # what next-token prediction imitates
    judge: Callable[[str, str], bool]  # (target, text of an answer) -> right or not
    opening: str = ""  # of the answer, given


@dataclass(frozen=True)
class Task:
    """Problems by split; an unseen task's `valid` are its shots."""

    name: str
    category: str
    train: list[Problem]
    valid: list[Problem]
    test: list[Problem]


# for a model without a chat template; its end of turn is whatever token ends its texts
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encode(world: World, problems: list[Problem]) -> list[list[int]]:
    """Ids of the prompts by the chat template, which has the BOS if the model wants one."""
    import jinja2

    texts, render = (
        [],
        partial(world.tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False),
    )
    for p in problems:
        try:
            text = render([{"role": "system", "content": p.system}, {"role": "user", "content": p.question}])
        except jinja2.TemplateError:  # it knows no system turn
            text = render([{"role": "user", "content": f"{p.system}\n\n{p.question}"}])
        texts.append(text + p.opening)
    return world.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


@torch.no_grad()
def complete(
    world: World, prompts: list[list[int]], uniforms: Tensor, cfg: Config, run: Run
) -> list[list[int]]:
    """Answers (ids, end of turn included), sampled by uniforms (N, T), greedy where these are zeros."""
    answers, size, temperature = [], cfg.sample_batch, cfg.temperature * bool(uniforms.any())
    for i in range(0, len(prompts), size):
        with run.autocast():
            part = prompts[i : i + size], uniforms[i : i + size]
            answers += common.generate(world.model, *part, world.ends, temperature)
    return answers


def judge(world: World, problems: list[Problem], answers: list[list[int]]) -> list[bool]:
    """Whether each answer is right; programs run side by side."""
    texts = world.tokenizer.batch_decode(answers, skip_special_tokens=True)
    pairs = list(zip(problems, texts, strict=True))
    code = [pair for pair in pairs if pair[0].judge.func is passes]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = pool.map(lambda pair: pair[0].judge(pair[0].target, pair[1]), code)
    if code:
        return list(verdicts)
    return [bool(p.judge(p.target, text)) for p, text in pairs]


def solve(world: World, problems: list[Problem], new: int, cfg: Config, run: Run) -> list[bool]:
    """Whether this rank's greedy answers, of `new` tokens at most, are right, with the weights in use."""
    answers = complete(world, encode(world, problems), torch.zeros(len(problems), new), cfg, run)
    return judge(world, problems, answers)


def share(items: list, run: Run) -> list:
    """This rank's part of `items`."""
    return items[run.rank :: run.world_size]


def accuracy(right: list[bool], run: Run) -> float:
    """Over all ranks' parts."""
    return float(np.mean(np.concatenate(run.gather(right))))


# --- the loss ---


def answer_hidden(world: World, prompts: list, answers: list) -> tuple[Tensor, Tensor]:
    """Hidden states that predict the answers' tokens, and these tokens: (N, d) and (N,), answer by answer."""
    ids, valid = common.collate([q + a for q, a in zip(prompts, answers, strict=True)], world.model.device)
    place = torch.zeros_like(valid)
    for row, q, a in zip(place, prompts, answers, strict=True):
        row[len(q) : len(q) + len(a)] = True
    out = world.model.get_decoder()(input_ids=ids, attention_mask=valid, use_cache=False)
    return out.last_hidden_state[:, :-1][place[:, 1:]], ids[place]


def kl_divergence(new: Tensor, base: Tensor, direction: str) -> Tensor:
    """KL(base || new) or KL(new || base) of log-probs (..., V) -> (...)."""
    p, q = (base, new) if direction == "base_new" else (new, base)
    return (p.exp() * (p - q)).sum(-1)


def token_scores(model, hidden: Tensor, base: Tensor | None, tokens: Tensor, direction: str, chunk=1024):
    """Log-prob of each token and KL to the base there, (N,) each, from hidden states (N, d) of both.

    The head runs in float32, a chunk at a time, and again in the backward pass: (N, V) is never held.
    """
    head = model.get_output_embeddings()

    def log_softmax(hidden):
        weights = {name: p.float() for name, p in head.named_parameters()}
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.func.functional_call(head, weights, hidden.float()).log_softmax(-1)

    def score(hidden, base, tokens):
        new = log_softmax(hidden)
        logp = new.gather(1, tokens[:, None])[:, 0]
        if base is None:
            return logp, torch.zeros_like(logp)
        return logp, kl_divergence(new, log_softmax(base), direction)

    parts = []
    for i in range(0, len(tokens), chunk):
        part = slice(i, i + chunk)
        args = hidden[part], None if base is None else base[part], tokens[part]
        parts.append(checkpoint(score, *args, use_reentrant=False))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def reinforce_loss(logp: Tensor, kl: Tensor, reward: Tensor, lam: float, answers: int) -> Tensor:
    """Minus eq. (1) for the tokens (N,) of so many answers, each with the reward of its answer."""
    return (lam * kl - reward * logp).sum() / answers


# --- training of one expert ---


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices by length, in groups of at most `budget` padded tokens, or of one sequence."""
    groups, group = [], []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and lengths[i] * (len(group) + 1) > budget:
            groups, group = [*groups, group], []
        group.append(i)
    return [*groups, group]


def train_expert(task: Task, new: int, world: World, run: Run):
    """REINFORCE, eq. (1), without a baseline: one answer of `new` tokens at most to each prompt, R = 1 or -1.

    SVF and LoRA differ in eq. (2) only. Writes the expert that was best on validation: expert.safetensors.
    """
    cfg, adapter, device = run.cfg, world.adapter, world.model.device
    policy = nn.ParameterDict({"p": adapter.start(cfg, run.generator("start")).to(device)})
    lr = cfg.rate * (cfg.lr if cfg.adapter == "svf" else cfg.lora_lr)
    optimizer = torch.optim.AdamW(policy.parameters(), lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
    best = {"accuracy": -1.0, "p": policy.p.detach().clone()}
    size = min(cfg.batch, len(task.train)) // run.world_size * run.world_size
    if not size:
        raise UserError(f"{task.name}: {len(task.train)} training problems, fewer than ranks")
    if size < cfg.batch:
        run.print(f"{task.name}: {size} prompts an update, there are {len(task.train)}")

    def vector():
        return torch.sigmoid(policy.p) if cfg.adapter == "svf" else policy.p  # eq. (2)

    state = dict(policy=policy, optimizer=optimizer, schedule=schedule, best=best)
    for step in run.steps(cfg.steps, **state):
        # prompts x, answers y of pi_W', rewards R
        drawn = share(torch.randperm(len(task.train))[:size].tolist(), run)
        problems = [task.train[i] for i in drawn]
        prompts, uniforms = encode(world, problems), share(torch.rand(size, new), run)
        if cfg.imitate:
            answers = [ids + world.ends[:1] for ids in texts_to_ids(world, problems)]
            reward = torch.ones(len(answers))
        else:
            with adapter.using("merged", vector().detach()):
                answers = complete(world, prompts, uniforms * bool(cfg.temperature), cfg, run)
            reward = 2.0 * torch.tensor(judge(world, problems, answers)) - 1

        # eq. (1), in micro-batches
        world.model.train(cfg.recompute)  # needed to recompute activations
        numbers = dict.fromkeys(("loss", "kl"), 0.0)
        lengths = [len(q) + len(a) for q, a in zip(prompts, answers, strict=True)]
        for group in micro_batches(lengths, cfg.micro_tokens):
            pair = [prompts[i] for i in group], [answers[i] for i in group]
            counts = torch.tensor([len(answers[i]) for i in group])
            token_reward = reward[group].repeat_interleave(counts).to(device)
            with torch.no_grad(), run.autocast():
                base = answer_hidden(world, *pair)[0] if cfg.lam else None
            with adapter.using("train", vector()):
                with run.autocast():
                    hidden, tokens = answer_hidden(world, *pair)
                logp, kl = token_scores(world.model, hidden, base, tokens, cfg.kl)
                loss = reinforce_loss(logp, kl, token_reward, cfg.lam, len(answers))
                loss.backward()
            numbers["loss"] += loss.detach()
            numbers["kl"] += kl.detach().sum() / len(answers)
        world.model.eval()
        policy.p.grad = run.mean(policy.p.grad)
        norm = nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

        if (step + 1) % cfg.valid_every == 0 or step + 1 == cfg.steps:
            with adapter.using("merged", vector().detach()):
                right = solve(world, share(task.valid[: cfg.valid], run), new, cfg, run)
            numbers["valid"] = accuracy(right, run)
            if numbers["valid"] > best["accuracy"]:
                best |= {"accuracy": numbers["valid"], "p": policy.p.detach().clone()}
        run.log(step, reward=reward.mean(), grad_norm=norm, **numbers)
    policy.p.data.copy_(best["p"])
    if run.rank == 0:
        save_expert(run.folder / "expert.safetensors", world, vector())


def texts_to_ids(world: World, problems: list[Problem]) -> list[list[int]]:
    """Ids of the solutions."""
    return world.tokenizer([p.solution for p in problems], add_special_tokens=False)["input_ids"]


# --- dispatch: the first of two passes ---

SORT = """Sort the user's request into one of four categories by the skill that it needs most. Do not solve it.
- code: writing, reading or repairing programs
- math: calculating, algebra, geometry, word problems with numbers
- reasoning: science and general knowledge, logic, choosing among given answers
- other: none of these
If several fit, take the dominant one. Answer with the category only, as \\boxed{code}, \\boxed{math},
\\boxed{reasoning} or \\boxed{other}."""
TOY_SORT, TOY_LABELS = "?", {"m": "math", "c": "code", "r": "reasoning", "o": "other"}


def parse_label(text: str) -> str:
    """Content of the first \\boxed{...}, or a label of the toy documents; "other" for all else."""
    box = re.search(r"\\boxed\{([^}]*)\}", text)
    label = box[1].strip().lower() if box else TOY_LABELS.get(text.strip())
    return label if label in CATEGORIES else "other"


def right_label(target: str, text: str) -> bool:
    return parse_label(text) == target


def ask_category(p: Problem, category: str, toy: bool) -> Problem:
    """The same question, to be sorted; dispatch sees no system prompt and no given opening."""
    label = category[0] if toy else rf"\boxed{{{category}}}"
    return Problem(TOY_SORT if toy else SORT, p.question, category, label, partial(right_label))


def category_task(tasks: list[Task], cfg: Config) -> Task:
    """Questions of the training splits: every fifth is test, the others take turns as train and valid."""
    splits = {"train": [], "valid": [], "test": []}
    for i in range(cfg.questions):
        split = "test" if i % 5 == 4 else ("train", "valid")[i % 5 % 2]
        for task in tasks:
            if i < len(task.train):
                splits[split].append(ask_category(task.train[i], task.category, cfg.model == "tiny"))
    return Task("category", "other", **splits)


@dataclass
class Pass:
    """What a pass took."""

    read: int = 0  # tokens
    written: int = 0  # tokens
    seconds: float = 0.0

    def answer(
        self, world: World, problems: list[Problem], vector: Tensor | None, new: int, run: Run
    ) -> list:
        """Greedy answers with an expert, or with the base weights if there is none."""
        begin, prompts = time.perf_counter(), encode(world, problems)
        expert = contextlib.nullcontext() if vector is None else world.adapter.using("merged", vector)
        with expert:
            answers = complete(world, prompts, torch.zeros(len(prompts), new), run.cfg, run)
        self.seconds += time.perf_counter() - begin
        self.read += sum(map(len, prompts))
        self.written += sum(map(len, answers))
        return answers


def two_pass(task: Task, experts: dict[str, Tensor], classifier: Tensor | None, world: World, run: Run):
    """Strategies A (no classifier) and B: find each prompt's category, then answer with its expert.

    Returns this rank's (right, category found) for its share of the test, and what both passes took.
    """
    cfg, problems, first, second = run.cfg, share(task.test, run), Pass(), Pass()
    asked = [ask_category(p, task.category, cfg.model == "tiny") for p in problems]
    answers = first.answer(world, asked, classifier, cfg.label_new, run)
    texts = world.tokenizer.batch_decode(answers, skip_special_tokens=True)
    labels, found = [parse_label(text) for text in texts], []
    for label in CATEGORIES:
        part = [p for p, x in zip(problems, labels, strict=True) if x == label]
        answers = second.answer(world, part, experts.get(label), cfg.max_new, run)
        found += [(right, label) for right in judge(world, part, answers)]
    return found, first, second


# --- few-shot mixing by the cross-entropy method ---


def cem(score: Callable, mean: Tensor, cfg: Config, generator: torch.Generator) -> tuple[Tensor, list[float]]:
    """Maximise score(members (P, D) in [0, 1]) -> (accuracy (P,), tie-break (P,)); the best member, history.

    Gaussian members, at first around `mean` (D,) with std 0.5, are clamped; member 0 is the best so far. The
    elites' mean and unbiased std make the next generation.
    """
    std, best, history = torch.full_like(mean, 0.5), mean.clone(), []
    for _ in range(cfg.generations):
        members = mean + std * torch.randn(cfg.population, len(mean), generator=generator)
        members = members.clamp(0, 1)
        members[0] = best
        pairs = list(zip(*(x.tolist() for x in score(members)), strict=True))
        order = sorted(range(cfg.population), key=pairs.__getitem__, reverse=True)
        best, elite = members[order[0]].clone(), members[order[: cfg.elites]]
        mean, std = elite.mean(0), elite.std(0)
        history.append(pairs[order[0]][0])
    return best, history


def few_shot(task: Task, experts: Tensor, world: World, run: Run) -> Tensor:
    """Strategy C: the mixture z (R,) of experts (K, R) that solves most of the task's shots.

    A batch holds many members, each with all shots. Ties: the mean over right answers of their log-likelihood
    per token.
    """
    cfg, adapter = run.cfg, world.adapter
    shots = task.valid[: cfg.shots]
    prompts, n = encode(world, shots), len(shots)
    shape = len(experts), len(adapter.sizes) if cfg.per_matrix else 1

    @torch.no_grad()
    def solve_shots(members: Tensor) -> list[tuple[float, float]]:
        """(accuracy, tie-break) of members (M, D), all in one batch."""
        z, index = mix(experts, members.unflatten(1, shape), adapter.sizes), torch.arange(len(members))
        with adapter.using("mixed", z, index.repeat_interleave(n).to(z.device)), run.autocast():
            answers = complete(
                world, prompts * len(members), torch.zeros(len(index) * n, cfg.max_new), cfg, run
            )
            hidden, tokens = answer_hidden(world, prompts * len(members), answers)
            logp, _ = token_scores(world.model, hidden, None, tokens, cfg.kl)
        right = torch.tensor(judge(world, shots * len(members), answers)).view(-1, n)
        likely = torch.stack([x.mean() for x in logp.split([*map(len, answers)])]).view(-1, n).cpu()
        tie = (likely * right).sum(1) / right.sum(1)
        return list(zip(right.float().mean(1).tolist(), tie.nan_to_num(-math.inf).tolist(), strict=True))

    def score(members: Tensor) -> Tensor:
        mine, size = share(members, run), max(1, cfg.sample_batch // n)
        found = [pair for part in mine.split(size) for pair in solve_shots(part)]
        scores, everyone = torch.zeros(len(members), 2), run.gather(found)
        for rank, part in enumerate(everyone):
            scores[rank :: run.world_size] = torch.tensor(part)
        return scores.T

    mean = torch.full((shape[0] * shape[1],), 1 / len(experts))
    alpha, history = cem(score, mean, cfg, run.generator(f"cem {task.name} {cfg.per_matrix}"))
    weights = (alpha.view(shape) / alpha.view(shape).sum(0).clamp(min=1e-9)).mean(1).tolist()
    run.print(
        f"{run.folder.name}, {task.name}: shots {history[0]:.2f} to {history[-1]:.2f}, alpha {np.round(weights, 2)}"
    )
    return mix(experts, alpha.view(1, *shape), adapter.sizes)[0]


# --- a cell of the table ---


def train(cfg: Config, run: Run) -> dict[str, float]:
    """One cell: train what it needs, adapt to each task, and measure all of them on their test splits."""
    base = str(run.once("base model", make_base) / "model") if cfg.model == "tiny" else cfg.model
    tasks, unseen = ([load_task(x, cfg, run) for x in texts] for texts in (cfg.tasks, cfg.unseen))
    factors = None
    if cfg.adapter != "lora":
        factors = run.once(f"factors {' '.join(cfg.modules)}", partial(decompose, base))
    dtype = torch.bfloat16 if run.amp else torch.float32
    world = open_world(base, factors, cfg.modules, cfg.lora_rank, cfg.lora_scale, (run.device, dtype))

    def expert(task: Task, new: int) -> Tensor:
        """From a file of --experts, or trained here, once for all rows that share it."""
        file = Path(cfg.experts) / f"{task.name}.safetensors"
        if not cfg.experts:
            kind = f"{cfg.adapter} x{cfg.rate:g}" + (" imitating" if cfg.imitate else "")
            file = (
                run.once(f"{kind} {task.name}", partial(train_expert, task, new, world))
                / "expert.safetensors"
            )
        return load_expert(file, world, cfg.cross_model)

    experts, classifier, found = {}, None, {"parameters": 0}
    if cfg.adapter != "none":
        experts = {task.category: expert(task, cfg.max_new) for task in tasks}
        found["parameters"] = sum(world.adapter.sizes)
    if cfg.adapt == "category":
        classifier = expert(category_task(tasks, cfg), cfg.label_new)

    passes, pairs = [], []
    for task in tasks + unseen:
        if cfg.adapt in ("prompt", "category"):
            outcomes, *took = two_pass(task, experts, classifier, world, run)
            right = [r for r, _ in outcomes]
            passes.append(took)
            pairs += [(task.category, label) for _, label in outcomes]
        else:
            vector = experts.get(task.category)
            if cfg.adapt == "few_shot" and task in unseen:
                vector = few_shot(task, torch.stack([*experts.values()]), world, run)
            right = judge_all(task, vector, world, run)
        found[task.name] = accuracy(right, run)
    for name, group in (("trained", tasks), ("unseen", unseen)):
        known = [found[task.name] for task in group if task.category != "other"]
        found |= {name: np.mean(known)} if known else {}
    if passes:
        found |= count_passes(passes, pairs, run)
    if cfg.bench:
        found |= benchmarks(experts, world, run)
    return found


def judge_all(task: Task, vector: Tensor | None, world: World, run: Run) -> list[bool]:
    """Whether greedy answers to this rank's share of the test are right."""
    problems = share(task.test, run)
    return judge(world, problems, Pass().answer(world, problems, vector, run.cfg.max_new, run))


def count_passes(passes: list, pairs: list, run: Run) -> dict[str, float]:
    """Tokens and seconds of both passes over all tests, and how often dispatch was right; prints confusion."""
    table = np.zeros((len(CATEGORIES), len(CATEGORIES)), int)
    for true, label in sum(run.gather(pairs), []):
        table[CATEGORIES.index(true), CATEGORIES.index(label)] += 1
    rows = [[name, *row] for name, row in zip(CATEGORIES, table.tolist(), strict=True)]
    run.print(f"{run.folder.name}: true category, and sent to\n{tabulate(rows, ['', *CATEGORIES])}")
    np.save(run.folder / "confusion.npy", table)
    found = {"dispatched": table.trace() / table.sum()}
    for number, column in enumerate(zip(*passes, strict=True), 1):
        tokens = sum(run.gather(sum(x.read + x.written for x in column)))
        found |= {f"tokens {number}": tokens, f"seconds {number}": sum(x.seconds for x in column)}
    return found


def benchmarks(experts: dict[str, Tensor], world: World, run: Run) -> dict[str, float]:
    """lm-eval's tasks with each expert, or with the base weights if there is none: {"expert: task, metric"}."""
    found = {}
    for name, vector in (experts or {"base": None}).items():
        expert = contextlib.nullcontext() if vector is None else world.adapter.using("merged", vector)
        with expert:
            results = common.benchmark(world.model, world.tokenizer, run.cfg.bench, run)
        for task, scores in results.items():
            found |= {f"{name}: {task}, {k}": v for k, v in scores.items() if isinstance(v, float)}
    return found


# --- tasks: judges ---


def last_number(text: str) -> str:
    """The last number, with sign, decimals and thousands, whose commas go; "" if there is none."""
    pattern = r"(?:(?<![\w)])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+"
    found = re.findall(pattern, text.replace("\N{MINUS SIGN}", "-").replace("\\$", "$"))
    return re.sub(r"[,$]", "", found[-1]) if found else ""


def right_number(target: str, text: str) -> bool:
    """GSM8K: whether the last number of the answer is the target."""
    return bool(last_number(text)) and common.answers_agree(target, last_number(text))


def right_letter(target: str, text: str) -> bool:
    """ARC: the first "answer is (X)", else the first "Answer: X", else the last capital that stands alone."""
    for pattern in (r"answer is \(?([A-J])\)?", r"[aA]nswer:\s*([A-J])", r"(?s)\b([A-J])\b(?!.*\b[A-J]\b)"):
        if found := re.search(pattern, text):
            return found[1] == target
    return False


def right_box(target: str, text: str) -> bool:
    """MATH and .jsonl files: whether the last box of the answer agrees with the target, by math-verify."""
    return common.last_box(text) is not None and common.answers_agree(target, text)


def right_gym(score: Callable, target: str, text: str) -> bool:
    """Whether reasoning-gym gives full marks to the last box, or to all of an answer without one."""
    return score(common.last_box(text) or text.strip()) >= 0.99


def same_text(target: str, text: str) -> bool:
    return text == target


# --- programs that a model wrote ---

# The process limits itself before it reads what it runs: preexec_fn is unsafe among threads. The hook keeps
# accidents away; it is no wall against an attacker.
BOOTSTRAP = """
import resource, sys, types
seconds, size = int(sys.argv[1]), 1 << 30
limits = {"AS": size, "CPU": seconds, "FSIZE": 1 << 20, "NPROC": 0, "CORE": 0}
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


def start_program(seconds: float, folder: str, output) -> subprocess.Popen:
    """Start Python in a session of its own; it waits for a program on stdin.

    Root's child runs as nobody, since a limit on processes does not bind root; a notice says where it cannot.
    """
    python = [
        os.path.realpath(sys.executable),
        "-I",
        "-S",
        "-B",
        "-c",
        BOOTSTRAP,
        str(math.ceil(seconds) + 1),
    ]
    settings = dict(stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, cwd=folder, env={})
    settings |= dict(start_new_session=True)
    if os.geteuid() != 0:
        return subprocess.Popen(python, **settings)
    os.chmod(folder, 0o777)
    try:
        return subprocess.Popen(python, **settings, user=65534, group=65534, extra_groups=[])
    except OSError as e:
        notice(f"generated programs run as root: {e}")
        return subprocess.Popen(python, **settings)


@functools.cache  # once is enough
def notice(text: str):
    sys.stderr.write(f"transformer2.py: {text}\n")


def run_code(program: str, seconds: float) -> bool:
    """Whether a program runs to its last line, in a process of its own with limits on time and memory.

    A secret that its last line prints tells an end from an early exit. There is the standard library and
    nothing else. What a program leaves running is killed.
    """
    nonce = secrets.token_hex(16)
    source = f"{program}\n\n__import__('sys').stdout.write('\\n{nonce}')\n"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        process = start_program(seconds, folder, output)
        try:
            process.communicate(source.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or about to go
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        output.seek(0)
        return process.returncode == 0 and output.read().endswith(nonce.encode())


def passes(seconds: float, before: str, target: str, text: str) -> bool:
    """MBPP and HumanEval: whether the answer's code, after what was given, passes the tests (target)."""
    return run_code(f"{before}{text.partition('```')[0]}\n\n{target}\n", seconds)


# --- tasks: sources ---

STEPS = "Solve the user's problem step by step and end with the final number."
CHOOSE = (
    'Think about the question step by step. End with "The answer is (X)", X being the letter of an option.'
)
BOX = "Solve the problem step by step and put the final answer, simplified, into \\boxed{}."
SHORT = "Answer the question with the final answer only, in \\boxed{}."
PROGRAM = "You are a careful programmer. Answer with one complete block of Python and nothing else."


def gsm8k(row: dict, cfg: Config) -> Problem:
    target = last_number(row["answer"].rpartition("####")[2])
    if not target:
        raise ValueError("field 'answer' ends in no number")
    return Problem(
        STEPS, row["question"], target, re.sub("<<.*?>>", "", row["answer"]), partial(right_number)
    )


def arc(row: dict, cfg: Config) -> Problem:
    """Options are lettered A, B, ..: some rows have numbers for keys."""
    options = dict(zip("ABCDEFGHIJ", row["choices"]["text"], strict=False))
    letter = "ABCDEFGHIJ"[row["choices"]["label"].index(row["answerKey"])]
    lines = [row["question"], "Options:", *(f"({key}) {text}" for key, text in options.items())]
    return Problem(CHOOSE, "\n".join(lines), letter, f"The answer is ({letter}).", partial(right_letter))


def mbpp(row: dict, cfg: Config) -> Problem:
    tests = "\n".join([*row["test_imports"], *row["test_list"]])
    question = f"{row['prompt']}\nThe program must pass this test:\n```python\n{row['test_list'][0]}\n```"
    judge = partial(passes, cfg.code_seconds, "")
    return Problem(PROGRAM, question, tests, f"{row['code']}\n```", judge, "```python\n")


def humaneval(row: dict, cfg: Config) -> Problem:
    head, tests = row["prompt"], f"{row['test']}\ncheck({row['entry_point']})"
    question = f"Complete this function.\n```python\n{head}\n```"
    judge = partial(passes, cfg.code_seconds, head)
    return Problem(PROGRAM, question, tests, f"{row['canonical_solution']}\n```", judge, f"```python\n{head}")


def boxed(row: dict, cfg: Config) -> Problem:
    """MATH, and .jsonl files: question (or problem) and answer, or a solution with a box."""
    question, solution = row.get("question") or row["problem"], str(row.get("solution") or "")
    target = str(row.get("answer") or common.last_box(solution) or "").rpartition("####")[2].strip()
    if not target:
        raise ValueError("neither a field 'answer' nor a box in 'solution'")
    return Problem(BOX, question, target, solution or rf"\boxed{{{target}}}", partial(right_box))


def gym(row: dict, cfg: Config) -> Problem:
    judge = partial(right_gym, row["score"])
    return Problem(SHORT, row["question"], row["answer"], rf"\boxed{{{row['answer']}}}", judge)


@dataclass(frozen=True)
class Source:
    """A published data set: hub id and subset, a reader of its rows, and the paper's shuffle for shots."""

    hub: str
    subset: str | None
    read: Callable[[dict, Config], Problem]
    shuffle: int = 0


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main", gsm8k),
    "mbpp": Source("evalplus/mbppplus", None, mbpp),
    "arc_easy": Source("allenai/ai2_arc", "ARC-Easy", arc),
    "arc_challenge": Source("allenai/ai2_arc", "ARC-Challenge", arc, 38),
    "math": Source("EleutherAI/hendrycks_math", "algebra", boxed, 27),
    "humaneval": Source("openai/openai_humaneval", None, humaneval, 16),
}


def read_split(name: str, split: str, cfg: Config) -> list[Problem]:
    """Problems of a split of a published set, or of a .jsonl or gym: source. UserError names a faulty row."""
    source = SOURCES.get(name)
    place, more = name, dict(size=1000, seed=cfg.seed) if name.startswith("gym:") else {}
    if source:
        place, more = source.hub, dict(subset=source.subset, split=split)
        if cfg.data:
            place, more = f"{cfg.data}/{name}-{split}.jsonl", {}
    read = source.read if source else gym if name.startswith("gym:") else boxed
    problems = []
    for number, row in enumerate(common.load_rows(place, **more), 1):
        try:
            problems.append(read(row, cfg))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise UserError(f"{place}, row {number}: {type(e).__name__} {e}") from None
    return problems


def load_task(text: str, cfg: Config, run: Run) -> Task:
    """CATEGORY=SOURCE as a Task, with the paper's splits where SOURCE is published, never mended by us.

    GSM8K and ARC: even rows of the training split train, odd ones validate. MBPP: of the first 300 rows in a
    fixed random order 200 train and 100 validate, the rest is the test. The shots of an unseen task leave its
    test. Other sources: of five rows three train, one validates, one tests; repeated questions are dropped.
    """
    category, _, name = text.partition("=")
    source, unseen = SOURCES.get(name), text in cfg.unseen
    if name.startswith("toy:"):
        return toy_task(name.removeprefix("toy:"), category, cfg, run)
    if source is None:
        rows = read_split(name, "train", cfg)
        kept = list({p.question: p for p in rows}.values())
        if len(kept) < len(rows):
            run.print(f"{name}: {len(rows) - len(kept)} of {len(rows)} questions were there before, dropped")
        splits = [p for i, p in enumerate(kept) if i % 5 < 3], kept[3::5], kept[4::5]
    elif unseen:
        rows = read_split(name, "test", cfg)
        random.Random(source.shuffle).shuffle(rows)
        splits = [], rows[: cfg.shots], rows[cfg.shots :]
    elif name == "mbpp":
        rows, order = read_split(name, "test", cfg), list(range(300))
        random.Random(16).shuffle(order)
        first = [rows[i] for i in order if i < len(rows)]
        splits = first[:200], first[200:], rows[300:]
    else:
        rows = read_split(name, "train", cfg)
        splits = rows[::2], rows[1::2], read_split(name, "test", cfg)
    if not all(splits[1:]) or len(splits[1]) < cfg.shots * unseen or not (unseen or splits[0]):
        raise UserError(f"{text}: too few rows for its splits ({', '.join(str(len(x)) for x in splits)})")
    return Task(Path(name.replace(":", "_")).stem, category, *splits[:2], splits[2][: cfg.test])


# --- the toy tasks, and a base model that knows them ---
# A document is: ; tag, family, operation, five symbols = answer $. Every operation has right answers and careless
# ones, which copy the input or its last symbol. Documents tagged ! are right, # careless, and untagged ones (.),
# the kind that is asked for, either, more often careless where the first symbol that matters is 5 or more. So
# the skill is in the model, and RL has to bring it out. Documents tagged ? have a category for an answer.

SYMBOLS, LENGTH = "0123456789abcdefghijMCRO+-<>^_@.!?#mro;=$", 5
OPERATIONS = {"add": "M+", "sub": "M-", "rev": "C<", "rvd": "C>", "max": "R^", "min": "R_", "read": "O@"}
FAMILIES = {"M": "math", "C": "code", "R": "reasoning", "O": "other"}
CONFUSED = {"math": "r", "code": "o", "reasoning": "o", "other": "r"}
TOY_CHAT = "{% for m in messages %}{{ ';' if m.role == 'system' }}{{ m.content }}{% endfor %}="


def operate(operation: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Digits (n, L) -> right and careless answers (n, L'), ids, and where the question is hard (n,)."""
    if operation in ("add", "sub"):
        k = (1 + x[:, :1] % 3) * (1 if operation == "add" else -1)
        return (x[:, 1:-1] + k) % 10, x[:, 1:-1], x[:, 1] >= 5
    hard = x[:, 0] >= 5
    if operation in ("rev", "rvd"):
        shown = x + shift(operation)
        return shown.flip(1), shown, hard
    if operation in ("max", "min"):
        best = x.amax(1) if operation == "max" else x.amin(1)
        return best[:, None], x[:, -1:], hard
    return x, x, hard


def shift(operation: str) -> int:
    """rev is asked about letters, whose ids follow the digits'."""
    return 10 if operation == "rev" else 0


def spell(ids: Tensor) -> list[str]:
    """Ids (n, L) as texts."""
    return ["".join(SYMBOLS[i] for i in row) for row in ids.tolist()]


def digits(split: str, run: Run) -> Tensor:
    """All rows of five digits of a split (n, 5), in a random order; a row is in the same split in every task."""
    order = torch.randperm(10**LENGTH, generator=run.generator("digits"))
    low, high = {"base": (0.0, 0.7), "train": (0.7, 0.8), "valid": (0.8, 0.85), "test": (0.85, 1.0)}[split]
    rows = order[int(low * len(order)) : int(high * len(order))]
    return rows[:, None] // 10 ** torch.arange(LENGTH) % 10


def toy_task(operation: str, category: str, cfg: Config, run: Run, tag: str = ".") -> Task:
    """An operation as a Task; the shots of unseen ones are validation problems."""
    if operation not in OPERATIONS:
        raise UserError(f"toy:{operation} is none of {', '.join(OPERATIONS)}")
    splits, counts = [], (2048, max(cfg.valid, cfg.shots), cfg.test)
    for split, count in zip(("train", "valid", "test"), counts, strict=True):
        x = digits(split, run)
        x = x[torch.randperm(len(x), generator=run.generator(f"{operation} {split}"))[:count]]
        right = spell(operate(operation, x)[0])
        pairs = zip(spell(x + shift(operation)), right, strict=True)
        splits.append([Problem(tag, OPERATIONS[operation] + q, a, a, partial(same_text)) for q, a in pairs])
    return Task(operation, category, *splits)


def document(operation: str, x: Tensor, tags: str | list[str], answers: Tensor) -> Tensor:
    """Ids (n, 2 L + 6), -1 after the end."""
    heads = [[SYMBOLS.index(c) for c in f";{tag}{OPERATIONS[operation]}"] for tag in tags]
    equals, end = (torch.full((len(x), 1), SYMBOLS.index(c)) for c in "=$")
    ids = torch.cat([torch.tensor(heads), x + shift(operation), equals, answers, end], 1)
    return F.pad(ids, (0, 2 * LENGTH + 6 - ids.shape[1]), value=-1)


def documents(pool: Tensor, n: int) -> Tensor:
    """About n documents (n, 2 L + 6) about digits from the pool; arithmetic twice as often as the rest."""
    parts = []
    for operation, sign in OPERATIONS.items():
        count = round(n * 0.88 / 9) * (2 if sign[0] == "M" else 1)
        x = pool[torch.randint(len(pool), (count,))]
        right, careless, hard = operate(operation, x)
        kind = torch.randint(4, (count,))  # good, bad, and twice untagged
        slips = (kind == 1) | ((kind > 1) & (torch.rand(count) < torch.where(hard, 0.8, 0.3)))
        parts.append(
            document(operation, x, ["!#.."[k] for k in kind], torch.where(slips[:, None], careless, right))
        )
        x = pool[torch.randint(len(pool), (max(1, round(n * 0.12 / 7)),))]
        mistaken = (torch.rand(len(x)) < torch.where(x[:, 1] >= 7, 0.65, 0.1)).tolist()
        family = FAMILIES[sign[0]]
        labels = [[SYMBOLS.index(CONFUSED[family] if slip else family[0])] for slip in mistaken]
        parts.append(document(operation, x, "?" * len(x), torch.tensor(labels)))
    return torch.cat(parts)


def make_base(run: Run):
    """Pre-train the tiny model on documents; UserError if it lacks a skill in the end."""
    cfg = run.cfg
    tokenizer = common.CharTokenizer(SYMBOLS, eos="$")
    tokenizer.chat_template = TOY_CHAT
    size = dict(intermediate_size=cfg.width * 11 // 4, tie_word_embeddings=False)
    model = common.tiny_lm(len(SYMBOLS), cfg.width, cfg.layers, **size).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.base_lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, cfg.base_lr, cfg.base_steps, pct_start=0.1, cycle_momentum=False
    )
    pool = digits("base", run)
    for step in run.steps(cfg.base_steps, model=model, optimizer=optimizer, schedule=schedule):
        ids = documents(pool, cfg.base_batch).to(run.device)
        with run.autocast():
            logits = model(ids[:, :-1].clamp(min=0), logits_to_keep=LENGTH + 1).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, -LENGTH - 1 :].flatten(), ignore_index=-1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(step, loss=loss)

    model.eval()
    world = World(model, tokenizer, common.end_ids(model, tokenizer), None)
    for name in OPERATIONS:
        skill = np.mean(solve(world, toy_task(name, "other", cfg, run, "!").valid, LENGTH + 1, cfg, run))
        if skill < cfg.gate:
            raise UserError(
                f"{run.folder.name}: {name} {skill:.2f} in documents tagged as good: more --base_steps"
            )
    model.should_save_on_this_rank = lambda _: True  # transformers saves on the first of all ranks only
    model.save_pretrained(run.folder / "model")
    tokenizer.save_pretrained(run.folder / "model")


# --- figure, sizes without weights, main ---


def draw(figure, table: dict, run: Run):
    """Left: accuracy on trained and unseen tasks, a dot a seed. Right: the first seed's confusion under B."""
    left, right = figure.subplots(1, 2)
    for metric, marker in (("trained", "o"), ("unseen", "x")):
        for row, cells in table.items():
            left.plot(
                [cell[metric] for cell in cells],
                [row] * len(cells),
                marker,
                color="C0" if marker == "o" else "C1",
            )
    left.set(xlabel="accuracy, a mark a seed: trained tasks (o), unseen ones (x)")
    left.invert_yaxis()
    file = run.root / common.slug(f"B: category expert-s{run.cfg.seed}") / "confusion.npy"
    right.imshow(np.load(file), cmap="Blues")
    for (i, j), count in np.ndenumerate(np.load(file)):
        right.text(j, i, count, ha="center")
    ticks = dict(xticks=range(4), xticklabels=CATEGORIES, yticks=range(4), yticklabels=CATEGORIES)
    right.set(title="B: category (row) and where it is sent", **ticks)


LLAMA_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
LLAMA_8B |= dict(num_attention_heads=32, num_key_value_heads=8)


def missing(cfg: Config, run: Run) -> list[str]:
    """What this config needs and does not find, a line each, with the flag that mends it."""
    from transformers import AutoConfig

    found = []
    if cfg.model != "tiny" and not Path(cfg.model).is_file():
        try:
            AutoConfig.from_pretrained(cfg.model)
        except (OSError, ValueError):
            found.append(f"--model {cfg.model!r}: neither here nor on the hub (hub id, folder or .gguf)")
    for text in cfg.tasks + cfg.unseen:
        try:
            load_task(text, cfg, run)
        except UserError as e:
            found.append(f"{e}; --data FOLDER takes SOURCE-SPLIT.jsonl")
    return found


def dry_run(cfg: Config, lacking: list[str], run: Run):
    """Print parameters, memory and hours of the RL on H100s, every text of full length."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    try:
        config = AutoConfig.from_pretrained(cfg.model)
    except (OSError, ValueError):
        config = LlamaConfig(**LLAMA_8B)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config.get_text_config())
    n = sum(p.numel() for p in model.parameters())
    svf = [layer.weight.shape for layer in matrices(model, cfg.modules).values()]
    lora = [layer.weight.shape for layer in matrices(model, ("qv",)).values()]
    factors = sum(min(shape) * sum(shape) for shape in svf)
    run.print(
        f"{n:,} parameters; SVF adds {sum(map(min, svf)):,}, LoRA {cfg.lora_rank * sum(map(sum, lora)):,}"
    )
    answers = cfg.batch + cfg.valid / cfg.valid_every
    rounds = math.ceil(answers / run.world_size / cfg.sample_batch)
    decode = rounds * cfg.max_new * 2 * n / 3.35e12  # seconds an update: each token reads the weights
    flops = (8 + 2 * bool(cfg.lam)) * n * cfg.batch * (cfg.max_new + 256) / run.world_size
    hours = cfg.steps * (decode + flops / (0.4 * 989e12)) / 3600
    memory = (2 * n + 2 * factors + 2 * sum(a * b for a, b in svf)) / 1e9
    run.print(
        f"{memory:.0f} GB of weights, factors and merged matrices on each of {run.world_size} GPUs, and caches"
    )
    run.print(f"{cfg.steps} updates of {cfg.batch} answers: {hours:.1f} hours an expert on H100s")
    for line in lacking:
        run.print(f"missing: {line}")


def main():
    cfg = common.parse_config(CONFIGS)
    with Run(cfg, "" if cfg.model == "tiny" else cfg.model) as run:
        lacking = missing(cfg, run)
        if cfg.dry_run:
            return dry_run(cfg, lacking, run)
        if lacking:
            raise UserError("; ".join(lacking))
        table = run.grid(ROWS, train)
        run.check(CLAIMS, table)
        if "B: category expert" in table:
            run.figure(draw, table, run, size=(12, 4.5))


if __name__ == "__main__":
    main()
