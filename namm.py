"""Neural Attention Memory Models: an evolved network decides which tokens each head of a transformer keeps.

Cetin, Sun, Zhao, Tang, "An Evolved Universal Transformer Memory", ICLR 2025, arXiv 2410.13166.

The claim. 4,172 parameters that see nothing but attention values, evolved on a few tasks over a frozen
language model, keep a fraction of its KV cache at no loss, where hand-made rules (H2O, key norms) trade
quality for memory. Attention looks alike everywhere, so they work unchanged on other models and in other
fields.

Token j gets attention a_j[q] from query q; every U tokens each layer and head scores its tokens and forgets:
  eq. (1)  x_tj[f] = |sum_k hann[k] a_j[s (t - 1) + k] exp(-2 pi i f k / w)|     frame t of a spectrogram
  eq. (2)  omega_j <- g omega_j + (1 - g) x_tj,  g = gamma^s                     one spectrum a token
  eq. (3)  u_j = [sin(nu age_j), cos(nu age_j), (omega_j - mean) / sd]           8 + 17 features
  eq. (4)  q, k, v = u W1 + b1;  r, m = softmax over newer tokens (q k / sqrt h) v W2 + b2
           score_j = (u_j (1 + m_j) + r_j) . w3 + b3                   backward attention memory, BAM
  eq. (5)  keep j iff it is among the best k of its head, k = the most scores >= 0 of a head of its layer
  eq. (6)  theta <- CMA-ES on the mean over tasks of score with the memory / score with the full cache
Positions stay, gaps stay. w = 32, s = 16, gamma = .99; mean and sd are taken once, before the first
generation, and belong to the memory.

How to run
  python namm.py                          two CPU cores: evolves on a small language model, tests it there, on
                                          another one and on a decision transformer
  python namm.py --config text --model M --tasks F.jsonl     a real model; F: lines with prompt and answer
  python namm.py --config text --model M --tasks longbench_qasper --memory namm.pt      test without evolving
  torchrun --nproc_per_node=8 namm.py --config full     the paper's setting: Llama-3-8B on LongBench
In your own code, for any transformers causal model whose layers all have full attention:
  cache = Memory(Policy("h2o", cap=1024), attach(model))
  model.generate(ids, cache=cache, prefill_chunk_size=512)

Departures from the paper and its code
- Statistics are streamed: frames are folded into omega as attention arrives; the code keeps 512 rows of all
  layers until the update. The recursion is the same. Masks are made from what is held.
- As in the code, BAM's newest token attends to itself, and heads with fewer scores >= 0 than another of their
  layer keep negative ones. A population runs as one batch; rows that keep fewer are padded on the old side.
- C waits for its eigenvectors Hansen's 1 / (10 n (c1 + cmu)) generations. The search is stored as the fitness
  of its members and replayed from seeds: 32 numbers a generation.
- A task that the full cache scores 0 on is left out of that generation's fitness. `full` runs 300 + 150 + 150
  generations; the paper stops by eye. Prompts and metrics are lm-eval's; the middle is cut by tokens.
- A memory's size counts every update: it is the cap at which a rule, which holds at most what was seen, holds
  as many tokens in the mean. That cap is what rules get, so all sizes are of one kind.
- SnapKV is added: the last 8 queries, pooled over 5 neighbours. The MLP is 25 -> 32 ReLU -> 1 on the same
  features; the code's is linear. The demo's cap is ours. Its decision transformer reads discrete tokens and
  is judged with the expert's history; the paper's MuJoCo, video and Japanese tasks are not here.

Reading order: Config, ROWS, the equations (spectral_frame to select), LayerMemory, CMAES, evolve, train.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    Cache,
    DynamicLayer,
    GenerationConfig,
)

import common
from common import Claim, Run, UserError

HOP, DECAY = 16, 0.99  # s, queries between two frames, which are twice as long; gamma, a token
BINS, HIDDEN = HOP + 1, 32  # frequencies of a frame, width of the network
INPUTS = 8 + BINS  # features of eq. (3)
BLOCK = 128  # queries whose attention is held at a time
SHORTEST = 96  # tokens of which a quarter has room for all keys of any built-in task, and questions


@dataclass
class Config(common.Config):
    # the memory
    policy: Literal["namm", "full", "h2o", "snapkv", "l2", "recency", "random"] = "namm"  # what stays, by row
    scorer: Literal["bam", "mlp"] = "bam"  # network that scores tokens
    update: int = 32  # tokens between two evictions (U)
    cap: int = 0  # most tokens that a head keeps; 0: the scores alone decide
    memory: str = ""  # namm.pt or a checkpoint of the reference, to test instead of evolving one
    # evolution
    population: int = 16  # members of a generation (lambda)
    stages: tuple[int, ...] = (8, 12)  # generations of each stage; stage i has the first i tasks
    prompts: int = 1  # of each task in a generation, the same for all members
    validation: int = 0  # first prompts of each task, which choose the generation to keep; 0: all
    validate_every: int = 4  # generations between two validations of the mean
    members: int = 16  # in one forward pass
    # tasks
    tasks: tuple[str, ...] = ("dense", "sparse")  # of evolution: these, lm-eval tasks, or .jsonl files
    tests: tuple[str, ...] = ()  # of the table; none: those of evolution
    sequences: int = 4  # ledgers in a prompt of a built-in task
    test: int = 72  # ledgers of its test
    length: int = 256  # their tokens
    steps: int = 300  # optimizer steps that train a built-in model
    # a model of your own
    model: str = ""  # hub id, folder or .gguf
    data: str = ""  # local copy of the lm-eval tasks' data set
    stretch: float = 1.0  # the context grows that many times by NTK scaling of the rotary base
    context: int = 32768  # longest prompt with its answer; a longer one loses its middle
    max_new: int = 16  # tokens of an answer to a .jsonl's prompt

    def check(self):
        super().check()
        if self.update % HOP or self.population < 4:
            raise UserError(f"--update is a multiple of {HOP}, --population 4 or more")
        if not 0 < len(self.stages) <= len(self.tasks) or min(self.stages) < 1:
            raise UserError("each of --stages is 1 or more and has one of --tasks")
        if self.model:
            return
        if not {*self.tasks, *self.tests} <= {*TASKS}:
            raise UserError(f"without --model tasks are {', '.join(TASKS)}")
        if self.length < max(SHORTEST, self.update):
            raise UserError(f"--length is {SHORTEST} or more, and no less than --update")


# a row of the table is the settings that it changes
ROWS = {
    "NAMM": dict(policy="namm", scorer="bam"),
    "full cache": dict(policy="full"),
    "MLP scorer": dict(policy="namm", scorer="mlp"),
    "H2O": dict(policy="h2o"),
    "SnapKV": dict(policy="snapkv"),
    "L2": dict(policy="l2"),
    "recency": dict(policy="recency"),
    "random": dict(policy="random"),
}
DEMO = Config(
    seed=30, seeds=5, ranks=2, cap=48, validation=4, tests=("dense", "sparse", "other LM", "corridor")
)
TEXT = Config(
    share="run",
    rows=("NAMM", "full cache", "H2O", "L2", "recency"),
    update=512,
    population=4,
    stages=(3,),
    tasks=(),
    save_every=1,
)
CONFIGS = {
    "smoke": replace(DEMO, seed=0, seeds=1, ranks=1, population=4, stages=(2, 1), test=8, length=96, steps=9),
    "demo": DEMO,
    "gpu": replace(DEMO, ranks=5, update=512, cap=512, population=32, stages=(20, 30), length=4096),
    "text": TEXT,
    "full": replace(
        TEXT,
        model="meta-llama/Meta-Llama-3-8B",
        stretch=4.0,
        tasks=("longbench_passage_retrieval_en", "longbench_dureader", "longbench_narrativeqa"),
        stages=(300, 150, 150),
        population=32,
        prompts=64,
        validate_every=10,
        members=4,
    ),
}
CLAIMS = [
    Claim("NAMM scores what the full cache does, margin .05", "dense", "NAMM", "full cache", margin=-0.05),
    Claim("... more than H2O at the same size", "dense", "NAMM", "H2O"),
    Claim("... more than SnapKV", "dense", "NAMM", "SnapKV"),
    Claim("sparse ledgers: NAMM scores more than H2O", "sparse", "NAMM", "H2O"),
    Claim("zero-shot on another language model: more than H2O", "other LM", "NAMM", "H2O"),
    Claim("zero-shot on a decision transformer: more than H2O", "corridor", "NAMM", "H2O"),
    Claim(
        "without the cap it scores what the full cache does, margin .05",
        "free",
        "NAMM",
        "full cache",
        margin=-0.05,
    ),
    Claim(
        "... and holds fewer tokens than where each is scored alone",
        "free size",
        "NAMM",
        "MLP scorer",
        "lower",
    ),
]


# --- features: eqs. (1) to (3) ---


def spectral_frame(rows: Tensor) -> Tensor:
    """Eq. (1), magnitudes of the windowed Fourier transform: (..., w) attention -> (..., w/2 + 1).

    The window is a periodic Hann; no centring, no scaling.
    """
    x = torch.fft.rfft(rows * torch.hann_window(rows.shape[-1], device=rows.device))
    return torch.hypot(x.real, x.imag)  # on a CPU in less than half the time of abs


def moving_average(omega: Tensor, frames: Tensor) -> Tensor:
    """Eq. (2) for one frame after the other: omega (..., F), frames (..., m, F) -> (..., F)."""
    for x in frames.unbind(-2):
        omega = omega.lerp(x, 1 - DECAY**HOP)
    return omega


def recency(age: Tensor) -> Tensor:
    """The ages of eq. (3), sin and cos of the age in tokens at 4 frequencies nu: (...) -> (..., 8)."""
    nu = 50000.0 ** (-torch.arange(4, device=age.device).double() / 4)
    angle = age.double()[..., None] * nu
    return torch.cat([angle.sin(), angle.cos()], -1).float()


def normalise(omega: Tensor, moments: Tensor) -> Tensor:
    """The spectra of eq. (3): omega (..., F), mean and variance (2, F) -> (..., F)."""
    mean, var = moments.to(omega)
    return (omega - mean) / var.sqrt().clamp(min=1e-7)


# --- scorers: eq. (4) ---


# shapes of the network's layers, in the order of theta: a row of weights an input, and the biases
SHAPES = {
    "bam": [(INPUTS + 1, 3 * HIDDEN), (HIDDEN + 1, 2 * INPUTS), (INPUTS + 1, 1)],
    "mlp": [(INPUTS + 1, HIDDEN), (HIDDEN + 1, 1)],
}


def parameters(scorer: str) -> int:
    """Numbers in theta: 4,172 for the paper's."""
    return sum(map(math.prod, SHAPES[scorer]))


def affine(x: Tensor, layer: Tensor) -> Tensor:
    """x W + b: x (N, H, n, inputs), layer (N, 1, inputs + 1, outputs) -> (N, H, n, outputs)."""
    W, b = layer.split([x.shape[-1], 1], -2)
    return x @ W + b


def score_tokens(theta: Tensor, u: Tensor, scorer: str) -> Tensor:
    """Eq. (4): theta (N, parameters), features u (N, H, n, 25), oldest first -> (N, H, n)."""
    shapes = SHAPES[scorer]
    layers = theta.split([*map(math.prod, shapes)], 1)
    first, second, *last = (x.view(-1, 1, *shape) for x, shape in zip(layers, shapes, strict=True))
    if scorer == "mlp":  # each token alone
        return affine(affine(u, first).relu(), second)[..., 0]
    # reversed in time, attention to newer tokens is causal attention: no n x n mask is made
    q, k, v = affine(u, first).flip(-2).chunk(3, -1)
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).flip(-2)
    residual, multiplier = affine(seen, second).chunk(2, -1)
    return affine(u * (1 + multiplier) + residual, *last)[..., 0]


# --- selection: eq. (5) ---


def select(score: Tensor, valid: Tensor, cap: int) -> Tensor:
    """Eq. (5): scores and valid places (N, H, n) -> places that each head keeps (N, H, k), -1 where none.

    Every head of a sequence keeps as many as its most generous head has scores >= 0, at most `cap`; the
    newest stays. Sequences that keep fewer are padded in front, where backward attention, which looks at
    newer tokens only, never sees the padding.
    """
    score = score.masked_fill(~valid, -math.inf)
    score[..., -1] = math.inf
    count = (score >= 0).sum(-1).amax(-1).clamp(max=cap)  # (N,)
    place = score.topk(int(count.max()), -1).indices
    real = torch.arange(place.shape[-1], device=score.device) < count[:, None, None]
    return place.masked_fill(~real, -1).sort(-1).values


# --- policies: a rule for forgetting is one score; those that are never negative leave all to the cap ---


NOBODY = torch.zeros(1, 0)


@dataclass
class Policy:
    """Who decides what a layer keeps: "namm", whose theta has a row a member, or a baseline."""

    kind: str = "full"
    update: int = 512  # tokens between two evictions (U)
    cap: int | list = 0  # most tokens that a head keeps, or those of each layer; 0: any number
    scorer: str = "bam"
    theta: Tensor = NOBODY  # (P, parameters), a row a member
    moments: Tensor | None = None  # mean and variance of each frequency (2, F)
    sums: Tensor | None = None  # count, sum, sum of squares (3, F), where they are still being learnt


def namm_score(layer: LayerMemory) -> Tensor:
    """The evolved network on ages and normalised spectra, eqs. (3) and (4)."""
    policy, omega = layer.policy, layer.store["omega"]
    if policy.sums is not None:
        x = omega.double().flatten(0, 2)
        policy.sums += torch.stack([x**0, x, x**2]).sum(1).cpu()
    u = torch.cat([recency(layer.seen - 1 - layer.store["pos"]), normalise(omega, policy.moments)], -1)
    theta = policy.theta.to(u).repeat_interleave(len(u) // len(policy.theta), 0)  # a row a sequence
    return score_tokens(theta, u, policy.scorer)


def h2o_score(layer: LayerMemory) -> Tensor:
    """Attention received so far; half the cap belongs to the newest tokens (Zhang et al. 2023)."""
    newest = layer.store["pos"] >= layer.seen - layer.cap // 2
    return layer.store["mass"][..., 0].masked_fill(newest, math.inf)


def snapkv_score(layer: LayerMemory) -> Tensor:
    """Attention of the last 8 queries, which stay, averaged over 5 neighbours (Li et al. 2024)."""
    mass = F.avg_pool1d(layer.store["tail"][..., -8:].sum(-1), 5, stride=1, padding=2)
    return mass.masked_fill(layer.store["pos"] >= layer.seen - 8, math.inf)


SCORES = {
    "namm": namm_score,
    "h2o": h2o_score,
    "snapkv": snapkv_score,
    "l2": lambda layer: 1 / layer.store["k"].float().norm(dim=-1),  # small keys stay (Devoto et al. 2024)
    "recency": lambda layer: layer.store["pos"].float(),
    "random": lambda layer: torch.rand_like(layer.store["pos"], dtype=torch.float32),
}


# --- the memory: a transformers cache that scores and forgets ---


class LayerMemory(DynamicLayer):
    """What one layer holds of N sequences in `store`, (N, H, n, ...), oldest first: keys `k`, values `v`,
    positions `pos`, which places are `valid`, and the statistics of its policy.

    Rows are members times prompts, members first. After an eviction rows may differ in size.
    """

    def __init__(self, policy: Policy, cap: float):
        super().__init__()
        self.policy, self.cap = policy, round(cap) or sys.maxsize
        self.seen, self.store = 0, {}
        self.widths = {"mass": 1, "tail": HOP, "omega": BINS}  # of statistics of the attention to a token
        self.held = [
            (0, 0)
        ]  # tokens seen and mean of those that a head holds, at first and after each update

    def update(self, k: Tensor, v: Tensor, *args, **kwargs):
        """Mark the new keys, by which `namm_attention` finds this layer."""
        k.memory = self
        return k, v

    def get_seq_length(self):
        return self.seen

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention over what is held and, causally, the new tokens; then learn from it and forget.

        q (N, heads, c, d), k and v (N, H, c, d) -> (N, heads, c, d). The call is cut where an update falls
        and after BLOCK queries; the result does not depend on how tokens come in calls.
        """
        out, begin, interval = [], 0, self.policy.update
        while begin < q.shape[2]:
            end = min(begin + BLOCK, begin + interval - self.seen % interval, q.shape[2])
            self.append(k[:, :, begin:end], v[:, :, begin:end])
            out.append(self.attention(q[:, :, begin:end], scale))
            if self.seen % interval == 0:
                if self.policy.kind != "full":
                    self.forget()
                self.held.append((self.seen, self.store["valid"].float().sum(-1).mean().item()))
            begin = end
        return torch.cat(out, 2)

    def append(self, k: Tensor, v: Tensor):
        """Hold new tokens, which have no statistics yet; attention before the sequence counts as 0."""
        shape = k.shape[:3]
        pos = torch.arange(self.seen, self.seen + shape[2], device=k.device).expand(shape)
        new = {"k": k, "v": v, "pos": pos, "valid": torch.ones_like(pos, dtype=torch.bool)}
        for name, width in self.widths.items():
            new[name] = k.new_zeros(*shape, width, dtype=torch.float32)
        if self.store:
            new = {name: torch.cat([self.store[name], x], 2) for name, x in new.items()}
        self.store, self.seen = new, self.seen + shape[2]

    def attention(self, q: Tensor, scale: float) -> Tensor:
        """Softmax attention of the newest c tokens (N, heads, c, d) over all that is held; feeds `learn`."""
        k, v = self.store["k"], self.store["v"]
        c, (kv, n) = q.shape[2], k.shape[1:3]
        place = torch.arange(n, device=q.device)
        visible = self.store["valid"][:, :, None, None] & (place <= place[n - c :, None])  # (N, H, 1, c, n)
        logits = (q.unflatten(1, (kv, -1)) @ k[:, :, None].mT).float() * scale  # (N, H, heads / H, c, n)
        attention = logits.masked_fill(~visible, -math.inf).softmax(-1).to(q.dtype)
        self.learn(attention.float().mean(2))  # over the query heads of a key-value head
        return (attention @ v[:, :, None]).flatten(1, 2)

    def learn(self, rows: Tensor):
        """Fold rows of attention (N, H, c, n) into the statistics, eqs. (1) and (2), and drop them."""
        self.store["mass"] += rows.sum(2)[..., None]
        # the last complete hop, which the next frame begins with, the rows after it, the new rows
        columns = torch.cat([self.store["tail"], rows.mT], -1)
        complete = columns.shape[-1] // HOP - 1
        if complete and self.policy.kind == "namm":
            frames = spectral_frame(columns.unfold(-1, 2 * HOP, HOP))
            self.store["omega"] = moving_average(self.store["omega"], frames)
        self.store["tail"] = columns[..., complete * HOP :].clone()
        self.widths["tail"] = self.store["tail"].shape[-1]

    def forget(self):
        """Score every token, choose and keep, eqs. (3) to (5): everything held moves by one index."""
        score = SCORES[self.policy.kind](self).nan_to_num(nan=-math.inf)  # such a member fails by itself
        place = select(score, self.store["valid"], self.cap)
        n, heads = (torch.arange(size, device=place.device) for size in place.shape[:2])
        at = n[:, None, None], heads[:, None], place
        self.store = {name: x[at] for name, x in self.store.items()} | {"valid": place >= 0}


class Memory(Cache):
    """A transformers cache with a `LayerMemory` a layer of an attached model."""

    def __init__(self, policy: Policy, model):
        caps = np.broadcast_to(policy.cap, model.config.get_text_config().num_hidden_layers)
        super().__init__(layers=[LayerMemory(policy, cap) for cap in caps])


def size_of(*held: list[tuple]) -> float:
    """The size of a memory from what a layer `held` in each of some prompts.

    A rule holds min(seen, cap) tokens after an update. The size is the cap of the rule that holds as many in
    the mean over all updates; 0, any number, if there are none.
    """
    seen, tokens = np.concatenate(held).T
    caps = np.unique(seen)  # between two of them a rule's mean is linear in its cap
    return np.interp(tokens.mean(), np.minimum(seen, caps[:, None]).mean(1), caps)


def namm_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """transformers' attention interface: (N, heads, c, d) -> (N, c, heads, d), None."""
    if attention_mask is not None or kwargs.get("sliding_window") or not hasattr(key, "memory"):
        raise UserError(
            f"{type(module).__name__}: a memory needs plain causal attention and cache=Memory(...)"
        )
    return key.memory.attend(query, key, value, scaling).transpose(1, 2), None


def namm_mask(*args, attention_mask=None, **kwargs):
    """transformers' mask interface: a memory makes its own masks."""
    if attention_mask is not None and not attention_mask.all():
        raise UserError("a memory takes prompts without padding: those of one length in a batch")


AttentionInterface.register("namm", namm_attention)
AttentionMaskInterface.register("namm", namm_mask)


def attach(model):
    """Let a transformers model attend through its `Memory`; UserError where a layer has other attention."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if {*kinds} - {"full_attention"}:
        raise UserError(f"{type(model).__name__} has layers of {kinds}: a memory needs full attention")
    model.set_attn_implementation("namm")
    return model


# --- CMA-ES: eq. (6) ---


class CMAES:
    """CMA-ES with active covariance update (Hansen 2016, arXiv 1604.00772), maximising; `mean` is the answer.

    C's eigenvectors B and their lengths D are renewed every 1 / (10 n (c1 + cmu)) generations; C is I at
    first.
    """

    def __init__(self, n: int, population: int, sigma: float = 0.065):
        raw = math.log((population + 1) / 2) - torch.arange(1, population + 1).double().log()  # w'
        better, worse = raw.tensor_split([population // 2])
        mu_eff, mu_eff_minus = (float(w.sum() ** 2 / w.square().sum()) for w in (better, worse))
        self.mu_eff = mu_eff
        self.c1 = c1 = 2 / ((n + 1.3) ** 2 + mu_eff)
        self.cmu = cmu = min(1 - c1, 2 * (mu_eff - 2 + 1 / mu_eff) / ((n + 2) ** 2 + mu_eff))
        alpha = min(1 + c1 / cmu, 1 + 2 * mu_eff_minus / (mu_eff + 2), (1 - c1 - cmu) / (n * cmu))
        self.weights = torch.cat([better / better.sum(), -alpha * worse / worse.sum()])
        self.c_sigma = (mu_eff + 2) / (n + mu_eff + 5)
        self.d_sigma = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + self.c_sigma
        self.cc = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)
        self.chi_n = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # E ||N(0, I)||
        self.n, self.sigma, self.generation = n, sigma, 0
        self.interval = max(1, int(1 / (10 * n * (c1 + cmu))))
        self.mean, self.path_sigma, self.path_c = torch.zeros(3, n).double()
        self.C, self.eigen = torch.eye(n).double(), None

    def ask(self, generator: torch.Generator) -> Tensor:
        """Sample a generation (lambda, n): mean + sigma B D z."""
        if self.generation and self.generation % self.interval == 0:
            D2, B = torch.linalg.eigh(self.C)
            self.eigen = B, D2.clamp(min=1e-20).sqrt()
        y = torch.randn(len(self.weights), self.n, generator=generator, dtype=torch.float64)
        if self.eigen:
            B, D = self.eigen
            y = y * D @ B.mT
        return self.mean + self.sigma * y

    def tell(self, x: Tensor, fitness: Tensor):
        """Move towards the better half of x (lambda, n); NaN ranks last."""
        order = fitness.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)
        y = white = (x[order] - self.mean) / self.sigma
        if self.eigen:
            B, D = self.eigen
            white = (y @ B / D) @ B.mT  # C^(-1/2) y
        self.generation += 1
        # selection and recombination
        positive = self.weights.clamp(min=0)
        step = positive @ y
        self.mean = self.mean + self.sigma * step
        # step-size control
        c, cc = self.c_sigma, self.cc
        self.path_sigma = (1 - c) * self.path_sigma + math.sqrt(c * (2 - c) * self.mu_eff) * (
            positive @ white
        )
        length = float(self.path_sigma.norm()) / self.chi_n
        self.sigma *= math.exp(c / self.d_sigma * (length - 1))
        # covariance matrix adaptation
        h = length / math.sqrt(1 - (1 - c) ** (2 * self.generation)) < 1.4 + 2 / (self.n + 1)
        self.path_c = (1 - cc) * self.path_c + h * math.sqrt(cc * (2 - cc) * self.mu_eff) * step
        w = torch.where(self.weights < 0, self.weights * self.n / white.square().sum(1), self.weights)
        decay = 1 + self.c1 * (1 - h) * cc * (2 - cc) - self.c1 - self.cmu * float(self.weights.sum())
        rates = torch.cat([self.cmu * w, w.new_tensor([self.c1])])
        steps = torch.cat([y, self.path_c[None]])
        self.C.addmm_(steps.mT * rates, steps, beta=decay)


# --- built-in tasks and models: ledgers read by language models, a corridor by a decision transformer ---

FILLERS, VOCABULARY = 16, 128  # tokens that mean nothing, all tokens


class Task(NamedTuple):
    """Prompts, and what scores a memory on one: attempt(policy, place) -> scores (P,), memory."""

    prompts: int
    attempt: Callable


def ledgers(sets: float, asks: float, count: int, length: int, world: World):
    """Ledgers: ids (count, length), and the latest value of the key where it is asked, else -1.

    After the first token every key is set once, in random order; then each token sets a key to a value, asks
    for a key, or is a filler.
    """
    keys, values, shape = world.keys, world.values, (count, length)
    u = torch.rand(shape)
    key, value, filler = (torch.randint(n, shape) for n in (keys, values, FILLERS))
    u[:, 0], u[:, 1 : keys + 1] = 1.0, 0.0
    key[:, 1 : keys + 1] = torch.rand(count, keys).argsort(1)
    is_set = u < sets
    is_ask = ~is_set & (u < sets + asks)
    ids = torch.where(is_ask, FILLERS + key, filler)
    ids = torch.where(is_set, FILLERS + keys + key * values + value, ids)
    written = is_set[..., None] & (key[..., None] == torch.arange(keys))  # (count, length, keys)
    when = torch.where(written, torch.arange(length)[:, None], 0).cummax(1).values
    latest = value.gather(1, when.gather(2, key[..., None])[..., 0])
    return ids, torch.where(is_ask, latest, -1)


def corridors(count: int, length: int, world: World):
    """Episodes as a decision transformer reads them, (return-to-go, state, action) a step: like `ledgers`.

    A state is a token of a ledger: a signal says which way the junctions of its id turn from now on, and a
    turn the right way earns 1. The expert errs in .15 of them; elsewhere it does nothing.
    """
    state, right = ledgers(0.2, 0.3, count, length // 3, world)
    earned = (right >= 0) & (torch.rand(right.shape) > 0.15)
    action = torch.where(right >= 0, right ^ ~earned, 2)
    to_go = earned.flip(1).cumsum(1).flip(1).clamp(max=4)
    ids = torch.stack([VOCABULARY - 1 - to_go, state, VOCABULARY - 10 + action], 2)
    return ids.flatten(1), F.pad(right[..., None], (1, 1), value=-1).flatten(1)


@dataclass
class World:
    """A built-in model: its sizes, those of its ledgers, and what it is trained on, 8 of each drill a step.

    Drills of ledgers ask more often than the tests do: half the steps teach as much.
    """

    name: str
    width: int
    layers: int
    keys: int
    values: int
    drills: tuple[Callable, ...] = (partial(ledgers, 0.12, 0.4), partial(ledgers, 0.03, 0.4))


DENSE = partial(ledgers, 0.12, 0.15)
LM, OTHER = World("LM", 64, 2, 8, 8), World("other LM", 48, 3, 10, 5)
DT = World("decision transformer", 48, 2, 6, 2, 5 * (corridors,))
TASKS = {
    "dense": (LM, DENSE),
    "sparse": (LM, partial(ledgers, 0.03, 0.08)),
    "other LM": (OTHER, DENSE),
    "corridor": (DT, corridors),
}


def new_lm(world: World):
    """A small Llama."""
    lm = common.tiny_lm(
        VOCABULARY,
        world.width,
        world.layers,
        heads=world.width // 16,
        intermediate_size=2 * world.width,
        initializer_range=world.width**-0.5,
    )
    nn.init.normal_(lm.model.embed_tokens.weight, std=0.5)
    return lm


def train_lm(world: World, run: Run):
    """A model for sequences a quarter as long as those of the test; leaves model.pt.

    Positions are stretched up to four times, so that those of the test are familiar.
    """
    cfg = run.cfg
    model = new_lm(world).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=cfg.steps + 1, pct_start=0.11)
    for step in run.steps(cfg.steps, model=model, optimizer=optimizer, schedule=schedule):
        parts = [drill(8, cfg.length // 4, world) for drill in world.drills]
        ids, target = (torch.cat(x).to(run.device) for x in zip(*parts, strict=True))
        place = torch.arange(ids.shape[1]) * torch.randint(1, 5, (len(ids), 1))
        # without a mask, transformers takes a gap for the start of another sequence
        logits = model(
            ids, attention_mask=torch.ones_like(ids), position_ids=place.to(run.device), use_cache=False
        ).logits
        loss = F.cross_entropy(logits.mT, target, ignore_index=-1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        run.log(step, loss=loss)
    torch.save(model.state_dict(), run.folder / "model.pt")


def open_task(name: str, part: str, run: Run) -> Task:
    """The task of a name. The score of a built-in one is the share of right answers after the first quarter.

    A prompt of it is a few sequences, which run in one batch; each `part`, evolve or test, has others.
    """
    cfg = run.cfg
    prompts, count = (1, cfg.test) if part == "test" else (1000, cfg.sequences)
    if cfg.model:
        return text_task(name, run)
    world, make = TASKS[name]
    model, folder = new_lm(world), run.once(f"model {world.name}", partial(train_lm, world))
    model.load_state_dict(torch.load(folder / "model.pt"))
    attach(model.to(run.device))

    @torch.inference_mode()
    def attempt(policy, place):
        torch.manual_seed(common.stable_seed(cfg.seed, part, name, place))  # alike for all memories
        ids, target = (x.to(run.device) for x in make(count, cfg.length, world))
        target[:, : cfg.length // 4] = -1
        memory = Memory(policy, model)
        answer = model(ids.repeat(len(policy.theta), 1), cache=memory).logits.argmax(-1)
        right = answer.view(-1, *ids.shape) == target
        return right.sum((1, 2)) / (target >= 0).sum(), memory

    return Task(prompts, attempt)


# --- tasks for a language model of your own: lm-eval's, or lines of a .jsonl ---


@cache
def open_lm(name: str, stretch: float, device: torch.device):
    """(model, tokenizer), its context `stretch` times as long by NTK scaling of the rotary base."""
    model, tokenizer = common.load_lm(name, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if stretch > 1:
        rotary, rope = model.model.rotary_emb, model.config.rope_parameters
        width = 2 * len(rotary.inv_freq)
        rope["rope_theta"] *= (2 * stretch - 1) ** (width / (width - 2))
        model.model.rotary_emb = type(rotary)(model.config)
    return attach(model).to(device), tokenizer


def share_right(answer: str, said: str) -> float:
    """Similarity of the answer and of as many characters that were said first."""
    return difflib.SequenceMatcher(None, answer, said.strip()[: len(answer)]).ratio()


def read_questions(name: str, cfg: Config) -> tuple[list, list, dict]:
    """Prompts, what judges an answer to each with a credit in [0, 1], and settings of generation.

    Those of a .jsonl with prompt and answer, or of an lm-eval task, as it words and judges them.
    """
    if name.endswith(".jsonl"):
        rows = common.load_rows(name, ["prompt", "answer"])
        judges = [partial(share_right, row["answer"]) for row in rows]
        return [row["prompt"] for row in rows], judges, dict(max_new_tokens=cfg.max_new)
    manager = common.need("lm_eval.tasks", "lm").TaskManager()
    local = {"dataset_path": cfg.data} if cfg.data else {}
    try:  # a member of a group can be loaded with another path
        task = manager.load([{"group": "local", "task": [{"task": name} | local]}])["tasks"][name]
        docs, more = list(task.eval_docs), task.config.generation_kwargs
        settings = dict(max_new_tokens=more["max_gen_toks"], stop_strings=more["until"] or None)
    except Exception as e:  # lm-eval and datasets raise a dozen kinds
        raise UserError(
            f"--tasks {name}: {repr(e)[:99]} (--data takes a local copy, .[longbench] the metrics)"
        ) from None

    def judge(doc, said):
        return float(next(iter(task.process_results(doc, [said]).values())))

    return [task.doc_to_text(doc) for doc in docs], [partial(judge, doc) for doc in docs], settings


def text_task(name: str, run: Run) -> Task:
    """Greedy answers of --model to a task's prompts."""
    cfg = run.cfg
    model, tokenizer = open_lm(cfg.model, cfg.stretch, run.device)
    texts, judges, settings = read_questions(name, cfg)
    ends = common.end_ids(model, tokenizer)
    settings |= dict(eos_token_id=ends, pad_token_id=ends[0], prefill_chunk_size=cfg.update)
    half = (cfg.context - settings["max_new_tokens"]) // 2
    prompts = [x if len(x) <= 2 * half else x[:half] + x[-half:] for x in tokenizer(texts)["input_ids"]]

    @torch.inference_mode()
    def attempt(policy, place):
        ids = torch.tensor(prompts[place], device=run.device).repeat(len(policy.theta), 1)
        memory = Memory(policy, model)
        tokens = model.generate(
            ids,
            GenerationConfig(**settings),
            cache=memory,
            attention_mask=torch.ones_like(ids),
            tokenizer=tokenizer,
        )
        said = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
        return torch.tensor([judges[place](text) for text in said]), memory

    return Task(len(prompts), attempt)


# --- evolution ---


def collect(task: Task, places, policies: list, run: Run) -> tuple[Tensor, list]:
    """Scores (P, prompts) of the members of all policies, and the last's size in each layer.

    Ranks share the prompts.
    """
    mine = {}
    for place in places[run.rank :: run.world_size]:
        scores, memories = zip(*(task.attempt(policy, place) for policy in policies), strict=True)
        mine[place] = torch.cat(scores).cpu(), [layer.held for layer in memories[-1].layers]
    done = reduce(dict.__or__, run.gather(mine))
    scores, held = zip(*(done[place] for place in places), strict=True)
    return torch.stack(scores, 1), [*map(size_of, *held)]


def fitness_of(theta: Tensor, moments: Tensor, tasks: list[Task], draws: list, run: Run) -> Tensor:
    """The fitness of eq. (6): theta (P, parameters) -> (P,).

    A task that the full cache scores 0 on is left out; NaN without any.
    """
    cfg, ratios = run.cfg, []
    groups = theta.split(cfg.members)
    policies = [
        Policy(),
        *(Policy("namm", cfg.update, cfg.cap, cfg.scorer, group, moments) for group in groups),
    ]
    for task, places in zip(tasks, draws, strict=True):
        full, *scores = collect(task, places, policies, run)[0].mean(1)
        ratios.append(torch.stack(scores) / full.where(full > 0, math.nan))
    return torch.stack(ratios).nanmean(0)


def learn_moments(task: Task, run: Run) -> Tensor:
    """The mean and variance of eq. (3), (2, F): with theta 0 all scores are 0, and nothing is forgotten."""
    cfg, sums = run.cfg, torch.zeros(3, BINS).double()
    theta = torch.zeros(1, parameters(cfg.scorer))
    policy = Policy("namm", cfg.update, 0, cfg.scorer, theta, torch.ones(2, BINS), sums)
    collect(task, range(task.prompts)[: cfg.validation or None], [policy], run)
    count, total, squares = sum(run.gather(sums))
    if not count[0]:
        raise UserError(f"no prompt reaches --update {cfg.update} tokens: there is nothing to forget")
    mean = total / count
    return torch.stack([mean, squares / count - mean.square()])


def replay(record: Tensor, run: Run) -> CMAES:
    """The search as it was, from the fitness of its generations (G, lambda); NaN: not of its past."""
    es = CMAES(parameters(run.cfg.scorer), run.cfg.population)
    for g, fitness in enumerate(record):
        if not fitness.isnan().any():
            es.tell(es.ask(run.generator(f"generation {g}")), fitness)
    return es


def evolve(cfg: Config, run: Run):
    """Evolve a memory in stages, and leave the mean of the best validated generation as namm.pt.

    A stage begins with the whole state of the search that had the best validation in the stage before. All
    ranks make the same steps; they share the evaluations.
    """
    run.cfg, ends, es = cfg, list(itertools.accumulate(cfg.stages)), None
    tasks = [open_task(name, "evolve", run) for name in cfg.tasks[: len(ends)]]
    moments, state = learn_moments(tasks[0], run), {"best": -math.inf, "best_at": 0}
    state["past"] = torch.full((ends[-1], cfg.population), math.nan).double()  # fitness
    for g in run.steps(ends[-1], state=state):
        now = tasks[: bisect.bisect(ends, g) + 1]
        if g in ends:  # a new stage
            state["past"][state["best_at"] :], state["best"], es = math.nan, -math.inf, None
        es = es or replay(state["past"], run)

        theta, score = es.ask(run.generator(f"generation {g}")), math.nan
        draws = [torch.randperm(task.prompts)[: cfg.prompts].tolist() for task in now]
        fitness = fitness_of(theta, moments, now, draws, run)
        if not fitness.isnan().any():
            state["past"][g] = fitness
            es.tell(theta, fitness)

        if (g + 1) % cfg.validate_every == 0 or g + 1 in ends:
            draws = [range(task.prompts)[: cfg.validation or None] for task in now]
            score = fitness_of(es.mean[None], moments, now, draws, run).item()
            if score > state["best"]:
                state |= {"best": score, "best_at": g + 1}
                save_memory(run.folder / "namm.pt", es.mean, moments, run)
        run.log(g, fitness=fitness.mean(), validation=score)


# --- files of evolved memories: the layout of the reference's checkpoints ---

MOMENTS = tuple(f"stored_buffers_to_save.token_embedding_0_output_{name}" for name in ("mean", "var"))


def save_memory(file: Path, theta: Tensor, moments: Tensor, run: Run):
    """theta (parameters,), mean and variance (2, F), on rank 0."""
    if run.rank == 0:
        torch.save({"evolution_state": {"mean": theta} | dict(zip(MOMENTS, moments, strict=True))}, file)


def load_memory(file: str | Path, cfg: Config) -> tuple[Tensor, Tensor]:
    """theta (1, parameters), mean and variance (2, F); UserError for what is no such memory."""
    scalar, n = np.float64(0).__reduce__()[0], parameters(cfg.scorer)
    known = [  # the reference's files hold a number of numpy's
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Float64DType,
    ]
    try:
        with torch.serialization.safe_globals(known):
            state = torch.load(file, map_location="cpu")["evolution_state"]
        theta, moments = state["mean"].view(1, n), torch.stack([state[key].view(BINS) for key in MOMENTS])
        if not (theta.isfinite().all() and moments[1].min() > 0):
            raise ValueError("a number is not finite, or a frequency has no variance")
    except Exception as e:  # files from outside raise a dozen kinds
        raise UserError(f"{file}: no memory of {n} parameters ({cfg.scorer}): {str(e)[:99]}") from None
    return theta, moments


# --- a cell of the table ---


def test(cfg: Config, budgets: dict, run: Run) -> dict:
    """{test: ([(mean size, score), ...], size of each layer)}, which is also tests.json.

    A network is tested without the cap, then with it; a rule gets `budgets`, NAMM's size in each layer.
    """
    policy, found = Policy(cfg.policy, cfg.update), {}
    if cfg.policy == "namm":
        given = cfg.scorer == "bam" and cfg.memory  # an MLP is always evolved
        file = given or run.once(f"evolve {cfg.scorer}", partial(evolve, cfg)) / "namm.pt"
        policy = Policy("namm", cfg.update, 0, cfg.scorer, *load_memory(file, cfg))
    for name in cfg.tests or cfg.tasks:
        task, points = open_task(name, "test", run), []
        for cap in sorted({0, cfg.cap}) if cfg.policy == "namm" else [budgets[name]]:
            scores, sizes = collect(task, range(task.prompts), [replace(policy, cap=cap)], run)
            points.append((np.mean(sizes), scores.mean().item()))
        found[name] = points, sizes
    if run.rank == 0:
        common.write_atomic(run.folder / "tests.json", json.dumps(found))
    return found


def train(cfg: Config, run: Run) -> dict[str, float]:
    """One cell of the table: evolve a memory if nobody has yet, then test it or its rival.

    "held" and "free" are of the first test; "free" where a network's scores alone decide what it holds.
    """
    namm = replace(cfg, policy="namm", scorer="bam")
    found = json.loads((run.once("NAMM's tests", partial(test, namm, {})) / "tests.json").read_text())
    if cfg != namm:
        found = test(cfg, {name: sizes for name, (_, sizes) in found.items()}, run)
    scores = {name: points[-1][1] for name, (points, _) in found.items()}
    points, _ = next(iter(found.values()))
    (free_size, free), (held, _) = points[0], points[-1]
    return scores | {"held": held, "free": free, "free size": free_size}


# --- figure, main ---


def draw(figure, table: dict, run: Run):
    """Score against cache size in each test, mean over the seeds."""
    names = run.cfg.tests or run.cfg.tasks
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        for row in table:
            files = run.root.glob(f"{common.slug(row)}*-s*/tests.json")
            points = [json.loads(file.read_text())[name][0] for file in files]
            axes.plot(*np.mean(points, 0).T, ".-", label=row)
        axes.set(title=name, xlabel="tokens that a head holds")
    axes.legend(fontsize=7)


def missing(cfg: Config):
    """UserError for a memory, task or model that cannot be had; every prompt is worded once."""
    if cfg.memory:
        load_memory(cfg.memory, cfg)
    if not cfg.model:
        return
    for name in cfg.tasks + cfg.tests:
        if cfg.context < read_questions(name, cfg)[2]["max_new_tokens"] + 2:
            raise UserError(f"--context {cfg.context} has no room for a prompt of {name} and its answer")
    try:
        if not Path(cfg.model).is_file():
            AutoConfig.from_pretrained(cfg.model)
    except (OSError, ValueError):
        raise UserError(f"--model {cfg.model}: neither here nor on the hub (id, folder, .gguf)") from None


def dry_run(cfg: Config, run: Run):
    """Print what evolution reads and the hours of that, for prompts of 10,000 tokens; what is missing."""
    reads = (cfg.population + 1) * cfg.prompts * sum(n * g for n, g in enumerate(cfg.stages, 1))
    hours = reads * 10_000 * 2e9 / (0.4 * 989e12) / 3600
    run.print(
        f"{sum(cfg.stages)} generations read {reads:,} prompts; a billion parameters of the model take 2 GB "
        f"a GPU and {hours:.1f} hours of an H100 at 40 %"
    )
    try:
        missing(cfg)
    except UserError as e:
        run.print(f"missing: {e}")


def main():
    cfg = common.parse_config(CONFIGS)
    with Run(cfg, cfg.model) as run:
        if cfg.dry_run:
            return dry_run(cfg, run)
        missing(cfg)
        table = run.grid(ROWS, train)
        run.check(CLAIMS, table)
        run.figure(draw, table, run, size=(15, 4))


if __name__ == "__main__":
    main()
