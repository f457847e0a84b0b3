"""Neural Attention Memory Models: an evolved network decides which tokens each head of a transformer keeps.

An Evolved Universal Transformer Memory, Cetin, Sun, Zhao, Tang, ICLR 2025, arXiv 2410.13166.

The claim: 4,172 parameters that see nothing but attention values, evolved on a few tasks over a frozen
language model, keep a fraction of its KV cache at no loss, where hand-made rules (H2O, key norms) trade
quality for memory; and since attention looks alike everywhere, they work unchanged on other models and in
other fields.

    x_tj[f] = |sum_k hann[k] a_j[s (t - 1) + k] exp(-2 pi i f k / w)|   (1) frame t of token j's attention
    omega_j <- g omega_j + (1 - g) x_tj,  g = gamma^s                     (2) one spectrum a token
    u_j     = [sin(nu age_j), cos(nu age_j), (omega_j - mean) / sd]       (3) 8 + 17 features
    q, k, v = u W1 + b1;  r, m = softmax over newer tokens (q k / sqrt h) v W2 + b2
    score_j = (u_j (1 + m_j) + r_j) . w3 + b3                             (4) backward attention memory, BAM
    keep j iff it is among the best k of its head, k = the most scores >= 0 of a head of the layer     (5)
    theta <- CMA-ES on the mean over tasks of score with the memory / score with the full cache        (6)

Every U tokens each layer and head scores its tokens and forgets; positions stay, gaps stay. w = 32, s = 16,
gamma = .99, U = 512; mean and sd are taken once, in the first evaluation, and belong to the memory.

    python namm.py                                  five minutes, two CPU cores: evolves on a small LM,
                                                    tests on it, another LM and a decision transformer
    python namm.py --config gpu                     4,096 tokens, U = 512, no cap (not yet run on a GPU)
    python namm.py --config text --model SmolLM2-135M-Instruct.Q4_1.gguf --tasks needles:book.txt
    torchrun --nproc_per_node=8 namm.py --config full --templates dataset2prompt.json,choubun.json
    python namm.py --config full --stages 0 --namm namm.pt --test_tasks lb/qasper --templates P.json

Ranks share the evaluations: units of (members x prompt) are dealt out, dear ones first, results are
gathered, and all ranks make the same step. A run resumes at any generation, on any number of ranks.

In your own code, for any transformers causal model whose layers all have full attention:

    memory = Memory(Policy("h2o", update=512, budget=1024), layers_of(attach(model)))
    model(ids, cache=memory)                        # or model.generate(ids, cache=memory)

Where this file departs from the paper and its code
- Statistics are streamed: frames are folded into omega as rows of attention arrive. The reference keeps 512
  rows of all layers and folds them at the update; the recursion is the same.
- The mask is built from what is held. The reference's is right only with absolute positions and a 2-D mask.
- A population runs as one batch on the same prompt (the reference runs batch 1); rows that keep fewer
  tokens are padded and masked. The first block, alike for all members, is not shared.
- Attention, spectra and scores are float32 (products in TF32 on a GPU) after a softmax in float32 and a
  cast to the model's type.
- BAM's newest token attends to itself, as in the code; the text's "strictly newer" would leave it nothing.
- `--evict strict` lets every negative score go. The default follows the code: heads with fewer scores >= 0
  than another head of their layer keep some negative ones, which are attended to.
- CMA-ES renews its eigenvectors every 1 / (10 n (c1 + cmu)) generations, not every one; `diag` and `none`
  are ours, and the demo uses `diag`: at this size and a few dozen generations C stays close to I.
- A task whose full-cache mean is 0 on the drawn prompts is left out of that generation's fitness; if all are,
  the search does not move. A member with a score that is not finite ranks last.
- The window is twice the hop. The demo takes the statistics from 16 prompts, `full` from all of stage 1.
- The MLP ablation is 25 -> 32 ReLU -> 1 on the same features; the one shipped with the reference is linear
  and averages scores, not features.
- `full` runs 300 + 150 + 150 generations and keeps the best validated mean of each stage; the paper stops
  by eye. As there, fitness and validation use the test prompts of three tasks: read the aggregate without
  them.
- SnapKV and StreamingLLM are added as baselines, without pooling and with 4 sinks. A baseline gets the
  size, layer by layer, that the memory had at its largest update.
- ROUGE-L, F1 and the ratio of code are LongBench's. InfiniteBench's summary score is that ROUGE-L, its
  choices are read by one rule for both tasks, its prompts are ours unless --templates has them. ChouBun is
  split by MeCab with unidic-lite. Not here: LongVideoBench, MLVU, and the MuJoCo decision transformers; the
  corridor stands for them.

Reading order: spectral_frame to select are the equations; Policy and LayerMemory what a layer holds and how
it forgets; attach the hook into transformers; CMAES and evolve the search; then tasks, studies and main.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import pickle
import re
import string
import time
import typing
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

import before as common
from before import Run, UserError

BASELINES = ("full", "h2o", "snap", "recency", "streaming", "random", "l2")
KINDS = {
    "dense": (0.12, 0.15),
    "sparse": (0.03, 0.08),
}  # ledgers: how often a token sets and how often it asks


@dataclass
class Config(common.Config):
    """Every setting of the memory, of its evolution and of what it is measured on."""

    # the memory
    window: int = 32  # attention rows in a frame of the spectrogram, w
    hop: int = 16  # attention rows between two frames, s
    decay: float = 0.99  # of the moving average over frames, gamma, a token
    features: typing.Literal["all", "no_recency", "dc"] = "all"  # ablations: without ages; the mean row only
    scorer: typing.Literal["bam", "mlp", "linear"] = "bam"  # network that scores tokens
    hidden: int = 32  # its width
    evict: typing.Literal["ref", "strict"] = "ref"  # strict: a token with a negative score always goes
    update: int = 32  # tokens between two evictions, U
    cap: int | None = 48  # most tokens that a head keeps at an eviction; none: the scores alone decide
    block: int = 128  # queries whose attention is held at a time
    # evolution
    population: int = 16  # members of a generation, lambda
    sigma: float = 0.065  # first step size of CMA-ES
    covariance: typing.Literal["full", "diag", "none"] = "diag"  # what CMA-ES adapts of its covariance
    stages: tuple[int, ...] = (14, 22)  # generations of each stage; stage i has the first i tasks
    prompts: int = 6  # prompts of each task in a generation, the same for all members
    validation: int = 32  # prompts of each task that choose the generation to keep
    validate_every: int = 7  # generations between two validations of the mean
    norm_prompts: int = 16  # prompts of the first task that the features are normalised on
    members: int = 0  # members in one forward pass; 0: all that a rank has
    ablation: bool = True  # also evolve the network that scores each token alone (mlp)
    # the built-in tasks and models
    length: int = 384  # tokens of a ledger
    lm: tuple[int, ...] = (64, 2, 4, 4)  # width, layers, heads, key-value heads of the language model
    ledger: tuple[int, ...] = (8, 8, 16)  # keys, values, filler tokens
    lm_steps: int = 550  # its updates, on ledgers of a quarter of the length
    other: tuple[int, ...] = (96, 3, 6, 6)  # another language model, for transfer
    other_ledger: tuple[int, ...] = (12, 6, 24)  # its ledger
    other_steps: int = 400  # its updates
    other_cap: int = 64  # cap where the ledger has more keys
    corridor: int = 128  # steps of an episode of the decision transformer
    dt_steps: int = 500  # its updates
    learning_rate: float = 3e-3  # of all three
    test: int = 64  # held-out ledgers of each kind
    episodes: int = 96  # held-out episodes of the decision transformer
    sweep: tuple[int, ...] = (24, 32, 64, 96)  # other caps, for the figure
    longer: tuple[int, ...] = (2, 4)  # multiples of the length that are also tested
    # a language model of your own
    model: str = ""  # hub id, folder or .gguf; empty: the built-in study
    tasks: tuple[str, ...] = ()  # lb/NAME, choubun/NAME, inf/NAME or needles:FILE, in order of the stages
    test_tasks: tuple[str, ...] = ()  # evaluated at the end; empty: the same
    data: tuple[str, ...] = ()  # folders (or LongBench's data.zip) with NAME.jsonl; empty: from the hub
    templates: tuple[str, ...] = ()  # JSON files of names and prompts: a benchmark's dataset2prompt.json
    stretch: float = 1.0  # the context grows that many times by NTK scaling of the rotary base
    context: int = 32768  # longest prompt with its answer; a longer one loses its middle
    policies: tuple[str, ...] = ("full", "h2o", "l2", "recency")  # what the memory is compared with
    test_prompts: int | None = None  # prompts of each task in the final evaluation; none: all
    namm: str = ""  # an evolved memory, namm.pt or the reference's checkpoint, that evolution starts from
    chat: bool = False  # wrap the prompts in the model's chat template

    may_change: typing.ClassVar[set[str]] = {
        *("members", "block", "data", "templates", "test_tasks", "policies", "test_prompts")
    }

    def __post_init__(self):
        super().__post_init__()
        if self.window % 2 or self.window != 2 * self.hop:
            raise ValueError(f"--window {self.window} must be even and twice --hop {self.hop}")
        if self.update < 1 or self.update % self.hop:
            raise ValueError(f"--update {self.update} must be a multiple of --hop {self.hop}")
        if min((2, self.cap or 2, self.other_cap or 2, *self.sweep, *self.longer)) < 2 or 0 in (
            self.cap,
            self.other_cap,
        ):
            raise ValueError(
                "--cap and --other_cap are 2 or more, or none; --sweep and --longer 2 or more each"
            )
        if self.population < 4 or self.block < 1 or min((0, *self.stages)) < 0:
            raise ValueError("--population is 4 or more, --block 1 or more, --stages 0 or more each")
        if (
            not 0 < self.decay < 1
            or self.sigma <= 0
            or self.hidden < 1
            or self.stretch < 1
            or self.members < 0
        ):
            raise ValueError(
                "--decay is in (0, 1), --sigma and --hidden positive, --stretch 1, --members 0 or more"
            )
        if self.test_prompts is not None and self.test_prompts < 1:
            raise ValueError("--test_prompts is 1 or more, or none")
        if self.prompts < 1 or self.validation < 2 or self.test < 2 or self.validate_every < 1:
            raise ValueError(
                "--prompts and --validate_every are 1 or more, --validation and --test 2 or more"
            )
        if len(self.lm) != 4 or len(self.other) != 4 or len(self.ledger) != 3 or len(self.other_ledger) != 3:
            raise ValueError("--lm and --other have four numbers, --ledger and --other_ledger three")
        if unknown := [p for p in self.policies if p not in BASELINES]:
            raise ValueError(f"--policies {unknown[0]}: choose from {', '.join(BASELINES)}")
        if self.model and not self.tasks:
            raise ValueError("--model needs --tasks, such as lb/qasper or needles:FILE")
        if not self.model and (self.tasks or self.namm or self.chat or self.data or self.stretch != 1):
            raise ValueError("--tasks, --namm, --chat, --data and --stretch need a --model")
        if not self.model and not (len(self.stages) <= len(KINDS) and sum(self.stages)):
            raise ValueError("the built-in study has one or two --stages, of 1 generation or more in all")
        if self.model and len(self.stages) > len(self.tasks):
            raise ValueError(f"{len(self.stages)} --stages need as many --tasks, there are {len(self.tasks)}")


# --- features: eqs. (1) to (3) ---


def spectral_frame(frames: Tensor) -> Tensor:
    """Magnitudes of the windowed Fourier transform, eq. (1): (..., w) rows of attention -> (..., w/2 + 1).

    The window is a periodic Hann; no centring, no scaling by w.
    """
    window = frames.shape[-1]
    # one flat product: batched products of overlapping frames are 20 times slower
    real, imaginary = (frames.reshape(-1, window) @ fourier(window, frames.device)).chunk(2, -1)
    magnitude = (real.square() + imaginary.square()).sqrt()
    return magnitude.view(*frames.shape[:-1], window // 2 + 1)


def fourier(window: int, device) -> Tensor:
    """hann[k] cos and hann[k] sin of 2 pi f k / w: (w, 2 (w/2 + 1))."""
    k, f = torch.arange(window, device=device), torch.arange(window // 2 + 1, device=device)
    phase = 2 * math.pi * (k[:, None] * f % window) / window
    hann = torch.hann_window(window, periodic=True, device=device)
    return hann[:, None] * torch.cat([phase.cos(), -phase.sin()], 1)


def moving_average(omega: Tensor, frames: Tensor, decay: float, hop: int) -> Tensor:
    """omega <- g omega + (1 - g) x for each frame x, g = decay^hop, eq. (2): (..., F), (..., m, F)."""
    g, m = decay**hop, frames.shape[-2]
    discount = g ** torch.arange(m - 1, -1, -1, device=frames.device, dtype=frames.dtype)
    return g**m * omega + (1 - g) * torch.einsum("...mf,m->...f", frames, discount)


def recency(age: Tensor, size: int = 8, base: float = 50000.0) -> Tensor:
    """sin and cos of the age in tokens at size / 2 frequencies, eq. (3): (...) -> (..., size)."""
    frequency = base ** (-torch.arange(size // 2, device=age.device, dtype=torch.float64) * 2 / size)
    angle = age.double()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1).float()


class Norm:
    """Mean and biased variance of each frequency over every token ever added, by Chan's formula."""

    def __init__(self, bins: int):
        self.count, self.mean = 0.0, torch.zeros(bins, dtype=torch.float64)
        self.var, self.learning = torch.zeros(bins, dtype=torch.float64), False
        self.ready: tuple[Tensor, Tensor] | None = None  # mean and deviation in float32 where they are used

    def add(self, omega: Tensor) -> None:
        """Include the rows of (tokens, bins)."""
        x = omega.double()
        self.merge(float(len(x)), x.mean(0).cpu(), x.var(0, correction=0).cpu())

    def merge(self, count: float, mean: Tensor, var: Tensor) -> None:
        """Include `count` tokens of which only the moments are known."""
        total = self.count + count
        delta, share = mean - self.mean, count / total
        self.var = (1 - share) * self.var + share * var + delta.square() * share * (1 - share)
        self.mean, self.count, self.ready = self.mean + delta * share, total, None

    def __call__(self, omega: Tensor) -> Tensor:
        """z = (omega - mean) / max(sd, 1e-7): (..., bins) -> (..., bins)."""
        if self.ready is None or self.ready[0].device != omega.device:
            self.ready = (
                self.mean.float().to(omega.device),
                self.var.sqrt().clamp(min=1e-7).float().to(omega.device),
            )
        return (omega - self.ready[0]) / self.ready[1]

    @classmethod
    def frozen(cls, mean: Tensor, var: Tensor) -> Norm:
        """Statistics from elsewhere, which no longer change."""
        norm = cls(len(mean))
        norm.count, norm.mean, norm.var = 1.0, mean.double(), var.double()
        return norm

    def state_dict(self) -> dict:
        return {"count": self.count, "mean": self.mean, "var": self.var}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.mean, self.var = state["count"], state["mean"].double(), state["var"].double()
        self.ready = None


# --- scorers: eq. (4) ---


def shapes(scorer: str, inputs: int = 25, hidden: int = 32) -> list[tuple[int, ...]]:
    """Shapes of a scorer's parameters in the order of its flat vector."""
    if scorer == "bam":
        return [(inputs, 3 * hidden), (3 * hidden,), (hidden, 2 * inputs), (2 * inputs,), (inputs,), (1,)]
    return [(inputs, hidden), (hidden,), (hidden,), (1,)] if scorer == "mlp" else [(inputs,), (1,)]


def parameters(scorer: str, inputs: int = 25, hidden: int = 32) -> int:
    """Number of parameters: 4172 for the paper's backward attention memory."""
    return sum(math.prod(s) for s in shapes(scorer, inputs, hidden))


def unpack(theta: Tensor, scorer: str, inputs: int, hidden: int) -> list[Tensor]:
    """(P, parameters) -> the P versions of each parameter, (P, *shape)."""
    sizes = shapes(scorer, inputs, hidden)
    parts = theta.split([math.prod(s) for s in sizes], 1)
    return [part.view(-1, *size) for part, size in zip(parts, sizes, strict=True)]


def backward_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Attention of each token to itself and newer ones: (P, M, n, h) each, valid (P, M, n) -> (P, M, n, h).

    Reversed in time this is causal attention, so that no n x n mask is made; an invalid key is pushed away
    by one more feature, which is 1 in the queries and very negative in that key.
    """
    scale = q.shape[-1] ** -0.5
    if valid is not None:  # four features, so that a GPU's kernels take the width
        far = F.pad(torch.zeros_like(q[..., :1]).masked_fill(~valid[..., None], -1e4), (0, 3))
        q, k, v = F.pad(q, (0, 4), value=1.0), torch.cat([k, far], -1), F.pad(v, (0, 4))
    q, k, v = (x.flip(-2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).flip(-2)
    return out if valid is None else out[..., :-4]


def score_tokens(theta: Tensor, u: Tensor, valid: Tensor | None, scorer: str, hidden: int) -> Tensor:
    """Scores of tokens, eq. (4): theta (P, parameters), u (P, M, n, D), valid (P, M, n) or None -> (P, M, n).

    Member p scores the M sequences u[p]. `bam` sees newer tokens, `mlp` and `linear` each token alone.
    """
    members, many, n, inputs = u.shape
    parts, flat = unpack(theta, scorer, inputs, hidden), u.reshape(members, many * n, inputs)
    if scorer == "linear":
        weight, bias = parts
        return (flat @ weight[..., None] + bias[:, None]).view(members, many, n)
    if scorer == "mlp":
        weight, bias, weight2, bias2 = parts
        h = torch.baddbmm(bias[:, None], flat, weight).relu()
        return (h @ weight2[..., None] + bias2[:, None]).view(members, many, n)
    weight1, bias1, weight2, bias2, weight3, bias3 = parts
    qkv = torch.baddbmm(bias1[:, None], flat, weight1).view(members, many, n, 3 * hidden)
    seen = backward_attention(*qkv.split(hidden, -1), valid)
    out = torch.baddbmm(bias2[:, None], seen.reshape(members, many * n, hidden), weight2)
    residual, multiplier = out.chunk(2, -1)
    y = flat * (1 + multiplier) + residual
    return (y @ weight3[..., None] + bias3[:, None]).view(members, many, n)


# --- selection: eq. (5) ---


def select(score: Tensor, valid: Tensor | None, rule: str, cap: int | None):
    """Which tokens each head keeps, eq. (5): score (N, H, n) -> index (N, H, k) in old order, kept (N, H, k).

    The newest token stays. "ref" keeps as many in every head of a sequence as its most generous head has
    scores >= 0, at most `cap`; "strict" then drops those with a negative score; "budget" keeps `cap`.
    `kept` marks the real entries where rows differ, None if all are; index is None if nothing goes.
    """
    n = score.shape[-1]
    score = score.clone() if valid is None else score.masked_fill(~valid, -math.inf)
    score[..., -1] = math.inf
    if rule == "budget":
        count = torch.full_like(score[:, 0, 0], n).long() if valid is None else valid.sum(-1).amax(1)
    else:
        count = (score >= 0).sum(-1).amax(1)  # (N,)
    count = count if cap is None else count.clamp(max=cap)
    fewest, k = torch.stack([count.min(), count.max()]).tolist()  # the one wait for the device
    if fewest == n and (rule != "strict"):
        return None, None
    values, index = score.topk(k, -1)
    kept = (torch.arange(k, device=score.device) < count[:, None, None]).expand(index.shape)
    if rule == "strict":
        kept = kept & (values >= 0)
    if fewest == k and rule != "strict":
        return index.sort(-1).values, None
    index = index.masked_fill(~kept, n).sort(-1).values
    return index.clamp(max=n - 1), index < n


# --- policies ---


@dataclass
class Policy:
    """Who decides what a layer keeps: `kind` is namm or a baseline; theta holds one row for each member."""

    kind: str = "full"
    update: int = 512  # tokens between two evictions
    budget: int | Sequence[int] | None = None  # tokens a head may keep, one number or one a layer
    theta: Tensor | None = None  # (P, parameters)
    norm: Norm | None = None
    scorer: str = "bam"
    hidden: int = 32
    evict: str = "ref"
    window: int = 32
    hop: int = 16
    decay: float = 0.99
    features: str = "all"
    generator: torch.Generator | None = None  # of the random policy

    def __post_init__(self):
        if self.kind not in ("namm", *BASELINES):
            raise ValueError(f"there is no policy {self.kind}: choose from namm, {', '.join(BASELINES)}")
        if self.kind not in ("full", "namm") and self.budget is None:
            raise ValueError(f"the policy {self.kind} needs a budget")
        if self.kind == "namm" and (self.theta is None or self.norm is None):
            raise ValueError("the policy namm needs theta and the statistics of its features")

    @property
    def members(self) -> int:
        return 1 if self.theta is None else len(self.theta)

    @property
    def needs(self) -> set[str]:
        """Statistics of the attention that a layer must gather for this policy."""
        return {"namm": {"tail", "omega"}, "h2o": {"mass"}, "snap": {"tail"}}.get(self.kind, set())

    def budget_of(self, layer: int) -> int | None:
        return self.budget[layer] if isinstance(self.budget, (list, tuple)) else self.budget


def namm_policy(cfg: Config, theta: Tensor, norm: Norm, **more) -> Policy:
    """The policy of (P, parameters) with the settings of `cfg`."""
    fields = {k: getattr(cfg, k) for k in ("update", "scorer", "hidden", "evict", "window", "hop", "decay")}
    return Policy(
        "namm", theta=theta, norm=norm, **{**fields, "budget": cfg.cap, "features": cfg.features} | more
    )


def namm_score(layer: LayerMemory) -> Tensor:
    """The evolved network on ages and normalised spectrograms, eqs. (3) and (4)."""
    policy, omega = layer.policy, layer["omega"]
    if policy.norm.learning:
        policy.norm.add(omega.flatten(0, 2))  # nothing is evicted yet, so nothing is padded
    z, age = policy.norm(omega), layer.seen - 1 - layer["pos"]
    if policy.features == "dc":
        z = z * (torch.arange(z.shape[-1], device=z.device) == 0)
    r = recency(age) * (policy.features != "no_recency")
    u, members = torch.cat([r, z], -1), policy.members  # (N, H, n, 25), ages first
    valid = layer["valid"].reshape(members, -1, layer.size) if layer.padded else None
    u = u.view(members, -1, *u.shape[2:])
    policy.theta = policy.theta.to(u)
    return score_tokens(policy.theta, u, valid, policy.scorer, policy.hidden).view(age.shape)


def h2o_score(layer: LayerMemory) -> Tensor:
    """Attention received so far; half the budget belongs to the newest tokens (Zhang et al. 2023)."""
    score, newest = layer["mass"].clone(), layer.policy.budget_of(layer.index) // 2
    score[..., max(0, layer.size - newest) :] = math.inf
    return score


def snap_score(layer: LayerMemory) -> Tensor:
    """Attention of the last 8 queries, which also stay (SnapKV without pooling, Li et al. 2024)."""
    hop, observed = layer.policy.hop, min(8, layer.policy.hop, layer.policy.budget_of(layer.index))
    score = layer["tail"][..., hop - observed : hop].sum(-1)
    score[..., -observed:] = math.inf
    return score


def l2_score(layer: LayerMemory) -> Tensor:
    """Keys of small norm stay (Devoto et al. 2024)."""
    return -layer["k"].float().norm(dim=-1)


def recency_score(layer: LayerMemory) -> Tensor:
    return layer["pos"].float()


def streaming_score(layer: LayerMemory) -> Tensor:
    """The newest tokens and the first four (StreamingLLM, Xiao et al. 2024)."""
    sinks = min(4, layer.policy.budget_of(layer.index) - 1)
    return layer["pos"].float().masked_fill(layer["pos"] < sinks, math.inf)


def random_score(layer: LayerMemory) -> Tensor:
    pos = layer["pos"]
    return torch.rand(pos.shape, generator=layer.policy.generator).to(pos.device)


SCORES: dict[str, Callable] = {
    "namm": namm_score,
    "h2o": h2o_score,
    "snap": snap_score,
    "l2": l2_score,
    "recency": recency_score,
    "streaming": streaming_score,
    "random": random_score,
}


# --- the memory: a transformers cache that scores and forgets ---


def with_room(used: Tensor, capacity: int) -> Tensor:
    """(N, H, n, ...) at the front of (N, H, capacity, ...), zeros behind."""
    fresh = used.new_zeros(*used.shape[:2], capacity, *used.shape[3:])
    fresh[:, :, : used.shape[2]] = used
    return fresh


class LayerMemory(CacheLayerMixin):
    """What one layer holds of N sequences: keys, values, positions and the statistics of its policy.

    Everything lies in `store`, (N, H, capacity, ...), with `size` entries in use, in order of position.
    Rows are members times prompts, members first. After an eviction rows may differ in size: `valid` tells.
    """

    is_sliding = False

    def __init__(self, policy: Policy, index: int, block: int = 128, record: bool = False):
        super().__init__()
        self.policy, self.index, self.block, self.record = policy, index, block, record
        self.seen = self.size = 0  # tokens seen, entries held
        self.padded, self.store = False, {}
        self.lengths: list[Tensor | float] = []  # mean entries a head held right after each eviction
        self.positive: list[Tensor] = []  # ... and those with a score >= 0
        self.log: list[tuple[int, Tensor, Tensor]] = []  # with `record`: tokens seen, positions, valid
        self.bad: Tensor | None = None  # (N,) rows with a score that is not finite

    def __getitem__(self, name: str) -> Tensor:
        """The entries in use of keys `k`, values `v`, positions `pos`, `omega`, `tail`, `mass` or `valid`."""
        return self.store[name][:, :, : self.size]

    # what transformers asks of a cache layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Hand the new keys on with a mark, by which `namm_attention` finds this layer."""
        self.is_initialized = True
        key_states.memory = self
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.__init__(self.policy, self.index, self.block, self.record)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store = {k: v.index_select(0, beam_idx.to(v.device)) for k, v in self.store.items()}

    # attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention over what is held and, causally, the new tokens; then learn from it and forget.

        q (N, heads, c, d), k and v (N, H, c, d) -> (N, heads, c, d). The call is cut at multiples of the
        update interval and after `block` queries; the result does not depend on how tokens come in calls.
        """
        out, begin, interval, forgets = [], 0, self.policy.update, self.policy.kind != "full"
        while begin < q.shape[2]:
            end = min(q.shape[2], begin + self.block)
            end = min(end, begin + interval - self.seen % interval) if forgets else end
            part = slice(begin, end)
            self.append(k[:, :, part], v[:, :, part])
            out.append(self.attention(q[:, :, part], scale))
            if forgets and self.seen % interval == 0:
                self.forget()
            begin = end
        return torch.cat(out, 2) if len(out) > 1 else out[0]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write new tokens behind those held, with empty statistics."""
        rows, heads, c, _ = k.shape
        if not self.store or self.size + c > self.store["k"].shape[2]:
            self.reserve(rows, heads, self.size + c, k, v)
        new = slice(self.size, self.size + c)
        self.store["k"][:, :, new], self.store["v"][:, :, new] = k, v
        self.store["pos"][:, :, new] = torch.arange(self.seen, self.seen + c, device=k.device)
        self.store["valid"][:, :, new] = True
        self.size, self.seen = self.size + c, self.seen + c

    def reserve(self, rows: int, heads: int, entries: int, k: Tensor, v: Tensor) -> None:
        """Make room for `entries` tokens and those that come before the next eviction."""
        capacity = max(entries, self.size + max(self.policy.update, self.size // 4))
        held = {name: with_room(old[:, :, : self.size], capacity) for name, old in self.store.items()}
        self.store = held or self.empty(rows, heads, capacity, k, v)

    def empty(self, rows: int, heads: int, capacity: int, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Zeros for all that the policy needs."""
        window, shape = self.policy.window, (rows, heads, capacity)
        store = {"k": k.new_zeros(*shape, k.shape[-1]), "v": v.new_zeros(*shape, v.shape[-1])}
        store |= {"pos": k.new_zeros(shape, dtype=torch.int32), "valid": k.new_zeros(shape, dtype=torch.bool)}
        widths = {"omega": (window // 2 + 1,), "tail": (window,), "mass": ()}
        needed = {name: (*shape, *widths[name]) for name in sorted(self.policy.needs)}
        return store | {name: k.new_zeros(size, dtype=torch.float32) for name, size in needed.items()}

    def attention(self, q: Tensor, scale: float) -> Tensor:
        """Softmax attention of the newest c tokens (N, heads, c, d); feeds the statistics, eq. (1)."""
        keys, values, n = self["k"], self["v"], self.size
        (rows, heads, c, d), kv_heads = q.shape, keys.shape[1]
        mask = None
        if c > 1:  # every held token, and new ones up to itself
            place = torch.arange(n, device=q.device)
            mask = place <= place[n - c :, None]  # (c, n)
        if self.padded:
            mask = self["valid"][:, :, None] if mask is None else self["valid"][:, :, None] & mask
        if not self.policy.needs and not self.padded:
            mask = mask if mask is None else mask.expand(rows, 1, c, n)
            more = dict(attn_mask=mask, scale=scale, enable_gqa=heads > kv_heads)
            return F.scaled_dot_product_attention(q, keys, values, **more)
        logits = (q.reshape(rows, kv_heads, -1, d) @ keys.mT).view(rows, kv_heads, -1, c, n).float() * scale
        if mask is not None:
            logits = logits.masked_fill(~(mask[:, :, None] if self.padded else mask), -math.inf)
        attention = logits.softmax(-1).to(q.dtype)
        self.learn(attention.float().mean(2))  # over the query heads of a key-value head
        return (attention.flatten(2, 3) @ values).view(rows, heads, c, -1)

    def learn(self, rows: Tensor) -> None:
        """Fold rows of attention (N, H, c, n) into the statistics, eqs. (1) and (2), and drop them."""
        if "mass" in self.store:
            self["mass"].add_(rows.sum(2))
        if "tail" not in self.store:
            return
        hop, c, tail = self.policy.hop, rows.shape[2], self["tail"]
        waiting = (self.seen - c) % hop  # rows since the last frame
        if waiting + c < hop:
            tail[..., hop + waiting : hop + waiting + c] = rows.mT
            return
        # the last complete hop, the rows that waited, the new rows: (N, H, n, hop + waiting + c)
        columns = torch.cat([tail[..., : hop + waiting], rows.mT], -1)
        complete = (waiting + c) // hop * hop
        if "omega" in self.store:
            frames = spectral_frame(columns[..., : hop + complete].unfold(-1, 2 * hop, hop))
            self["omega"].copy_(moving_average(self["omega"], frames, self.policy.decay, hop))
        rest = columns[..., complete:]
        tail[..., : rest.shape[-1]] = rest

    def forget(self) -> None:
        """Score every token, choose and keep, eqs. (3) to (5): everything held moves by one index."""
        policy, valid = self.policy, self["valid"] if self.padded else None
        score = SCORES[policy.kind](self)
        if policy.kind == "namm":
            wrong = ~score.isfinite() if valid is None else ~score.isfinite() & valid
            bad = wrong.flatten(1).any(1)
            self.bad = bad if self.bad is None else self.bad | bad
            score = score.nan_to_num()
            chosen = score >= 0 if valid is None else (score >= 0) & valid
            self.positive.append(chosen.sum(-1).float().mean())
        rule = policy.evict if policy.kind == "namm" else "budget"
        index, kept = select(score, valid, rule, policy.budget_of(self.index))
        if index is not None:
            self.take(index, kept)
        length = self["valid"].sum(-1).float().mean() if self.padded else float(self.size)
        self.lengths.append(length)
        if self.record:
            self.log.append((self.seen, self["pos"].clone(), self["valid"].clone()))

    def take(self, index: Tensor, kept: Tensor | None) -> None:
        """Keep the entries `index` (N, H, k) of everything, with room for what comes before the next time."""
        n, k = self.size, index.shape[2]
        for name, old in self.store.items():
            where = index.view(*index.shape, *[1] * (old.dim() - 3)).expand(*index.shape, *old.shape[3:])
            self.store[name] = with_room(old[:, :, :n].gather(2, where), k + self.policy.update)
        self.size, self.padded = k, kept is not None
        if kept is not None:
            self.store["valid"][:, :, :k] = kept

    def nbytes(self, names: Sequence[str]) -> int:
        """Bytes of the entries in use; allocated are up to one update interval more."""
        return sum(self[name].numel() * self[name].element_size() for name in names if name in self.store)


class Memory(Cache):
    """A transformers cache, one `LayerMemory` a layer: model(ids, cache=Memory(policy, layers))."""

    def __init__(self, policy: Policy, layers: int, block: int = 128, record: bool = False):
        super().__init__(layers=[LayerMemory(policy, i, block, record) for i in range(layers)])
        self.policy = policy

    def lengths(self) -> list[float]:
        """For each layer the largest mean number of tokens that a head held right after an eviction."""
        return [max((float(x) for x in layer.lengths), default=float(layer.size)) for layer in self.layers]

    def summary(self) -> dict:
        """Sizes and ages after a run: tokens seen and held, bytes of keys and values, of the statistics."""
        ages = [
            (layer.seen - 1 - layer["pos"].float())[layer["valid"]].mean().item() for layer in self.layers
        ]
        positive = [float(x) for layer in self.layers for x in layer.positive]
        return {
            "updates": len(self.layers[0].lengths),
            "seen": self.layers[0].seen,
            "held after updates": float(np.mean(self.lengths())),
            "held at the end": float(np.mean([layer.size for layer in self.layers])),
            "scores >= 0": float(np.mean(positive)) if positive else None,
            "mean age": float(np.mean(ages)),
            "KV bytes": self.nbytes(("k", "v")),
            "statistics bytes": self.nbytes(("pos", "omega", "tail", "mass")),
        }

    def nbytes(self, names: Sequence[str]) -> int:
        """Bytes in use in all layers, of one member of the population."""
        return sum(layer.nbytes(names) for layer in self.layers) // self.policy.members

    def bad(self) -> Tensor | None:
        """(P,) members with a score that was not finite, None if the policy has no members."""
        flags = [layer.bad for layer in self.layers if layer.bad is not None]
        return torch.stack(flags).any(0).view(self.policy.members, -1).any(1) if flags else None

    def bad_layer(self) -> int:
        """The first layer with a score that was not finite."""
        return next(layer.index for layer in self.layers if layer.bad is not None and bool(layer.bad.any()))


def namm_attention(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
    """transformers' attention interface: (N, heads, c, d) -> (N, c, heads, d), None."""
    layer = getattr(key, "memory", None)
    if layer is None:
        raise UserError(f"{type(module).__name__}: namm attention needs cache=Memory(policy, layers)")
    if attention_mask is not None:
        raise UserError(f"{type(module).__name__} makes its own attention mask, which a memory cannot follow")
    if unknown := [
        k for k in ("softcap", "sliding_window", "s_aux", "position_bias") if kwargs.get(k) is not None
    ]:
        raise UserError(f"{type(module).__name__}: a memory does not know attention with {unknown[0]}")
    out = layer.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("namm", namm_attention)


def attach(model: nn.Module) -> nn.Module:
    """Make a transformers model attend through its `Memory`; UserError where a layer has other attention."""
    config = model.config.get_text_config()
    kinds = {k for k in getattr(config, "layer_types", None) or () if k != "full_attention"}
    kinds |= {"sliding window"} if getattr(config, "use_sliding_window", False) else set()
    kinds |= {"latent attention"} if getattr(config, "kv_lora_rank", None) else set()
    if kinds:
        raise UserError(
            f"{type(model).__name__} has layers of {', '.join(sorted(kinds))}; a memory needs full attention"
        )
    model.set_attn_implementation("namm")

    def refuse_padding(module, args, kwargs):
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if isinstance(mask, Tensor) and not bool((mask != 0).all()):
            raise UserError("a memory takes prompts without padding: one length a batch, no attention_mask")

    if not getattr(model, "takes_memory", False):
        model.register_forward_pre_hook(refuse_padding, with_kwargs=True)
        model.takes_memory = True
    return model


def layers_of(model: nn.Module) -> int:
    return model.config.get_text_config().num_hidden_layers


@torch.inference_mode()
def greedy(
    model, ids: Tensor, memory: Memory, max_new: int, stops: Sequence[int] = (), chunk: int = 512
) -> Tensor:
    """Greedy continuation (N, up to max_new) of prompts (N, T) of one length, through `memory`.

    The prompt is read `chunk` tokens at a time. A row that wrote one of `stops` goes on and is cut by the
    caller; all rows having done so is asked every eighth token.
    """
    logits, out = None, []
    for part in ids.split(chunk, 1):
        logits = model(part, cache=memory, use_cache=True, logits_to_keep=1).logits[:, -1]
    done, stop = (
        torch.zeros(len(ids), dtype=torch.bool, device=ids.device),
        torch.tensor(stops, device=ids.device),
    )
    for t in range(max_new):
        token = logits.argmax(-1)
        out.append(token)
        done |= torch.isin(token, stop)
        if t + 1 == max_new or (t % 8 == 7 and bool(done.all())):
            break
        logits = model(token[:, None], cache=memory, use_cache=True).logits[:, -1]
    return torch.stack(out, 1)


def stretch_rope(model, times: float) -> None:
    """NTK scaling of a Llama's rotary base for t = `times` the context: base (2 t - 1)^(d / (d - 2))."""
    if times == 1:
        return
    rotary, config = getattr(model.base_model, "rotary_emb", None), model.config.get_text_config()
    if rotary is None or rotary.rope_type != "default":
        raise UserError(f"--stretch {times}: {type(model).__name__} has no plain rotary embedding")
    d = 2 * len(rotary.inv_freq)
    base = config.rope_parameters["rope_theta"] * (2 * times - 1) ** (d / (d - 2))
    frequency = 1 / base ** (torch.arange(0, d, 2, dtype=torch.float) / d)
    rotary.inv_freq.copy_(frequency)
    rotary.original_inv_freq.copy_(frequency)
    config.rope_parameters["rope_theta"] = base


# --- CMA-ES: eq. (6) ---


class CMAES:
    """CMA-ES with active covariance update (Hansen 2016), maximising: ask, tell, and the mean is the answer.

    covariance "full" adapts all of C, "diag" its diagonal at (n + 2) / 3 times the rates, "none" only the
    step size. C's eigenvectors are renewed every 1 / (10 n (c1 + cmu)) generations, or every `lazy`.
    """

    def __init__(self, n: int, population: int, sigma: float, covariance: str = "full", lazy: int = 0):
        self.n, self.population, self.covariance = n, population, covariance
        raw = math.log((population + 1) / 2) - torch.arange(1, population + 1, dtype=torch.float64).log()
        mu = population // 2
        self.mueff = float(raw[:mu].sum() ** 2 / raw[:mu].square().sum())
        negative = float(raw[mu:].sum() ** 2 / raw[mu:].square().sum())
        self.c1 = 2 / ((n + 1.3) ** 2 + self.mueff)
        self.cmu = min(1 - self.c1, 2 * (self.mueff - 2 + 1 / self.mueff) / ((n + 2) ** 2 + self.mueff))
        if covariance == "diag":
            self.c1 = min(1.0, self.c1 * (n + 2) / 3)
            self.cmu = min(1 - self.c1, self.cmu * (n + 2) / 3)
        self.cs = (self.mueff + 2) / (n + self.mueff + 5)
        self.ds = 1 + 2 * max(0.0, math.sqrt((self.mueff - 1) / (n + 1)) - 1) + self.cs
        self.cc = (4 + self.mueff / n) / (n + 4 + 2 * self.mueff / n)
        self.chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        alpha = min(
            1 + self.c1 / self.cmu,
            1 + 2 * negative / (negative + 2),
            (1 - self.c1 - self.cmu) / (n * self.cmu),
        )
        self.weights = torch.where(raw > 0, raw / raw[raw > 0].sum(), alpha * raw / -raw[raw < 0].sum())
        self.lazy = lazy or max(1, int(1 / (10 * n * (self.c1 + self.cmu))))
        zeros = lambda: torch.zeros(n, dtype=torch.float64)  # noqa: E731
        self.mean, self.path_sigma, self.path_c, self.sigma, self.generation = (
            zeros(),
            zeros(),
            zeros(),
            sigma,
            0,
        )
        full = covariance == "full"
        self.C = torch.eye(n, dtype=torch.float64) if full else zeros() + 1
        self.B, self.D = (self.C.clone() if full else None), zeros() + 1

    def ask(self, generator: torch.Generator) -> Tensor:
        """A generation (population, n): mean + sigma B D z."""
        if self.covariance == "full" and self.generation and self.generation % self.lazy == 0:
            values, self.B = torch.linalg.eigh((self.C + self.C.mT) / 2)
            self.D = values.clamp(min=1e-20).sqrt()
        z = torch.randn(self.population, self.n, dtype=torch.float64, generator=generator)
        y = z * self.D
        return self.mean + self.sigma * (y if self.B is None else y @ self.B.mT)

    def whiten(self, y: Tensor) -> Tensor:
        """C^(-1/2) y for the rows of (..., n)."""
        return y / self.D if self.B is None else (y @ self.B / self.D) @ self.B.mT

    def tell(self, x: Tensor, fitness: Tensor) -> None:
        """Move towards the better half of x (population, n), larger fitness being better, eq. (6)."""
        order = torch.argsort(fitness.double(), descending=True, stable=True)
        y = (x[order] - self.mean) / self.sigma
        w, n, g = self.weights, self.n, self.generation
        best = w.clamp(min=0) @ y
        self.mean = self.mean + self.sigma * best
        white = self.whiten(y)
        self.path_sigma = (1 - self.cs) * self.path_sigma + math.sqrt(
            self.cs * (2 - self.cs) * self.mueff
        ) * (w.clamp(min=0) @ white)
        length = float(self.path_sigma.norm())
        h = length / math.sqrt(1 - (1 - self.cs) ** (2 * (g + 1))) / self.chi < 1.4 + 2 / (n + 1)
        self.path_c = (1 - self.cc) * self.path_c + h * math.sqrt(self.cc * (2 - self.cc) * self.mueff) * best
        if self.covariance != "none":
            scaled = torch.where(w < 0, w * n / white.square().sum(1).clamp(min=1e-20), w)
            decay = 1 + self.c1 * (1 - h) * self.cc * (2 - self.cc) - self.c1 - self.cmu * float(w.sum())
            if self.covariance == "full":
                update = self.c1 * torch.outer(self.path_c, self.path_c) + self.cmu * (y.mT * scaled) @ y
                self.C = decay * self.C + update
            else:
                update = self.c1 * self.path_c.square() + self.cmu * scaled @ y.square()
                self.C = (decay * self.C + update).clamp(min=1e-20)
                self.D = self.C.sqrt()
        self.sigma *= math.exp(self.cs / self.ds * (length / self.chi - 1))
        self.generation += 1

    FIELDS = ("mean", "sigma", "C", "B", "D", "path_sigma", "path_c", "generation")

    def state_dict(self) -> dict:
        return {k: v.clone() if isinstance(v := getattr(self, k), Tensor) else v for k in self.FIELDS}

    def load_state_dict(self, state: dict) -> None:
        for k in self.FIELDS:
            setattr(self, k, v.clone() if isinstance(v := state[k], Tensor) else v)


# --- the built-in tasks: a ledger read by language models, a corridor walked by a decision transformer ---


class Ledger(typing.NamedTuple):
    """Ids of the tokens: begin, set key k to value v, ask for key k, fillers that mean nothing."""

    keys: int
    values: int
    fillers: int

    @property
    def vocabulary(self) -> int:
        return 1 + self.keys * self.values + self.keys + self.fillers


def ledger(
    count: int, length: int, kind: str, size: Ledger, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ledgers of a kind: ids (count, length), and the latest value of the key where it is asked, else -100.

    After the first token every key is set once, in random order; then each token sets, asks or fills.
    """
    sets, asks = KINDS[kind]
    draw = lambda high: torch.randint(high, (count, length), generator=generator)  # noqa: E731
    u, key, value, filler = torch.rand(count, length, generator=generator), *map(draw, size)
    first = torch.arange(length) <= size.keys
    key[:, 1 : 1 + size.keys] = torch.rand(count, size.keys, generator=generator).argsort(1)[:, : length - 1]
    is_set = (u < sets) | first
    is_set[:, 0], is_get = False, (u >= sets) & (u < sets + asks) & ~first
    begin = 1 + size.keys * size.values
    ids = torch.where(is_set, 1 + key * size.values + value, begin + size.keys + filler)
    ids = torch.where(is_get, begin + key, ids)
    ids[:, 0] = 0
    written = is_set[..., None] & (key[..., None] == torch.arange(size.keys))  # (count, length, keys)
    when = torch.where(written, torch.arange(length)[:, None], -1).cummax(1).values
    latest = value.gather(1, when.gather(2, key[..., None])[..., 0].clamp(min=0))
    return ids, torch.where(is_get, latest, -100)


def ledger_lm(shape: Sequence[int], size: Ledger, context: int):
    """A small Llama; the first `values` logits answer. Weights start at 1 / sqrt(width), embeddings at .5."""
    width, layers, heads, kv = shape
    more = dict(mlp=2 * width, num_key_value_heads=kv, initializer_range=width**-0.5)
    lm = common.tiny_lm(size.vocabulary, width, layers, heads, context, **more)
    nn.init.normal_(lm.model.embed_tokens.weight, std=0.5)
    return lm


def stretched(count: int, length: int, longest: float, generator: torch.Generator) -> Tensor:
    """Positions with random gaps, whose mean is uniform in [1, longest] for each row: (count, length)."""
    mean = 1 + (longest - 1) * torch.rand(count, 1, generator=generator)
    gaps = 1 + ((2 * mean - 1) * torch.rand(count, length, generator=generator)).floor().long()
    return gaps.cumsum(1) - gaps[:, :1]


def optimise(cfg: Config, run: Run, model: nn.Module, hot: nn.Module, steps: int, loss_of: Callable) -> None:
    """AdamW with warm-up and cosine on loss_of(generator), fresh data each step; --compile compiles `hot`."""
    if cfg.compile:
        hot.compile(mode="reduce-overhead" if run.device.type == "cuda" else "default")
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate, (0.9, 0.98), weight_decay=0.01)
    generator, model = run.generator("data"), model.to(run.device).train()
    for step in run.steps(steps, model=model, optimizer=optimizer):
        optimizer.param_groups[0]["lr"] = common.learning_rate(step, steps, cfg.learning_rate, 0.1)
        with run.autocast():
            loss = loss_of(generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(step, loss=loss.detach())
    model.eval()


def train_lm(cfg: Config, run: Run, shape: Sequence[int], size: Ledger, steps: int) -> nn.Module:
    """A language model of ledgers a quarter as long as those it is tested on, at stretched positions."""
    length, model = cfg.length // 4, ledger_lm(shape, size, 4 * cfg.length)

    def loss_of(generator: torch.Generator) -> Tensor:
        halves = [ledger(16, length, kind, size, generator) for kind in KINDS]
        ids, labels = (torch.cat(x).to(run.device) for x in zip(*halves, strict=True))
        place = stretched(len(ids), length, 4.0, generator).to(run.device)
        # without a mask, transformers takes a gap in the positions for the start of another sequence
        whole = dict(attention_mask=torch.ones_like(ids), use_cache=False)
        hidden = model.model(ids, position_ids=place, **whole).last_hidden_state
        asked = labels >= 0
        return F.cross_entropy(model.lm_head(hidden[asked])[:, : size.values].float(), labels[asked])

    optimise(cfg, run, model, model.model, steps, loss_of)
    return model


IDS, STATE = 6, 17  # signals of the corridor; numbers of its state


def corridor(count: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Corridors: states (count, steps, 17), right actions (count, steps), junctions (count, steps).

    A step is a signal (.2), a junction (.3) or nothing. A signal says into which direction, 0 or 1, junctions
    of its id turn from now on; before the first one it is a coin's. A state is the signal's id and the
    junction's id, one-hot, whether it is either, the signal's direction as +-1, and two numbers of noise.
    """
    u = torch.rand(count, steps, generator=generator)
    ident, direction = (torch.randint(k, (count, steps), generator=generator) for k in (IDS, 2))
    signal, junction = u < 0.2, (u >= 0.2) & (u < 0.5)
    one_hot = F.one_hot(ident, IDS)
    flags = torch.stack([signal, junction, signal * (2 * direction - 1)], -1)
    noise = torch.randn(count, steps, 2, generator=generator)
    state = torch.cat([one_hot * signal[..., None], one_hot * junction[..., None], flags, noise], -1)
    written = signal[..., None] & (ident[..., None] == torch.arange(IDS))
    when = (
        torch.where(written, torch.arange(steps)[:, None], -1)
        .cummax(1)
        .values.gather(2, ident[..., None])[..., 0]
    )
    right = torch.where(when >= 0, direction.gather(1, when.clamp(min=0)), direction)
    return state.float(), right, junction


class DecisionTransformer(nn.Module):
    """A GPT-2 over (return-to-go, state, action) with a learned embedding of time (Chen et al. 2021)."""

    def __init__(self, steps: int, width: int = 48, layers: int = 2, heads: int = 4):
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        size = dict(n_embd=width, n_layer=layers, n_head=heads, n_positions=steps, vocab_size=1)
        size |= dict(bos_token_id=None, eos_token_id=None, initializer_range=width**-0.5)
        self.backbone = GPT2Model(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        place = recency(torch.arange(steps), width, 1000.0)  # near in time is near in the embedding
        self.backbone.wpe.weight.data.copy_(0.3 * place)
        self.to_return, self.to_state = nn.Linear(1, width), nn.Linear(STATE, width)
        self.to_action, self.head = nn.Embedding(3, width), nn.Linear(width, 2)

    def forward(self, tokens: Tensor, time: Tensor, memory: Memory | None = None) -> Tensor:
        """Embedded tokens (B, T, width) at steps `time` (B, T) -> logits of the two actions (B, T, 2)."""
        more = dict(cache=memory, use_cache=memory is not None)
        if memory is None:  # repeated positions are not the start of another sequence
            more["attention_mask"] = torch.ones_like(time)
        hidden = self.backbone(inputs_embeds=tokens, position_ids=time, **more)
        return self.head(hidden.last_hidden_state)

    def interleave(self, to_go: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """(B, T), (B, T, 17), (B, T) -> (B, 3 T, width)."""
        parts = [self.to_return(to_go[..., None]), self.to_state(state), self.to_action(action)]
        return torch.stack(parts, 2).flatten(1, 2)


def train_dt(cfg: Config, run: Run) -> nn.Module:
    """Behaviour cloning, conditioned on the return, of an expert that errs at a rate of its own an episode.

    Windows are a quarter of an episode and start at a random time. Only turns at junctions are learnt; the
    action elsewhere is "none".
    """
    window, model = cfg.corridor // 4, DecisionTransformer(cfg.corridor)

    def loss_of(generator: torch.Generator) -> Tensor:
        state, right, junction = corridor(32, window, generator)
        wrong = torch.rand(right.shape, generator=generator) < 0.3 * torch.rand(32, 1, generator=generator)
        turn, start = (
            right ^ wrong.long(),
            torch.randint(cfg.corridor - window + 1, (32, 1), generator=generator),
        )
        reward = (junction & ~wrong).float()
        to_go = (reward.flip(1).cumsum(1).flip(1) / (0.3 * window)).to(run.device)
        action = torch.where(junction, turn, 2).to(run.device)
        time = (start + torch.arange(window)).repeat_interleave(3, 1).to(run.device)
        logits = model(model.interleave(to_go, state.to(run.device), action), time)[:, 1::3]
        here = junction.to(run.device)
        return F.cross_entropy(logits[here].float(), turn.to(run.device)[here])

    optimise(cfg, run, model, model.backbone, cfg.dt_steps, loss_of)
    return model


@torch.inference_mode()
def rollout(model: DecisionTransformer, policy: Policy, corridors: tuple, device, record: bool = False):
    """Walk corridors with the model's own actions: returns (B,) as a share of the junctions, and the memory.

    Return-to-go starts at what an expert without errors gets and is decremented; a step is three tokens.
    """
    state, right, junction = (x.to(device) for x in corridors)
    count, steps = right.shape
    memory = Memory(policy, layers_of(model.backbone), record=record)
    scale = junction.sum(1).float().clamp(min=1)  # (B,)
    got, previous = torch.zeros(count, device=device), None
    for t in range(steps):
        time = torch.full((count, 1), t, device=device)
        parts = [model.to_return((1 - got / scale)[:, None, None]), model.to_state(state[:, t : t + 1])]
        tokens = torch.cat([previous, *parts] if t else parts, 1)  # the action before goes with them
        times = torch.cat([time - 1, time, time] if t else [time, time], 1)
        turn = model(tokens, times, memory)[:, -1].argmax(-1)
        got += (junction[:, t] & (turn == right[:, t])).float()
        previous = model.to_action(torch.where(junction[:, t], turn, 2))[:, None]
    return got / scale, memory


class LedgerTask:
    """Ledgers of one kind and length for one language model; the score is the share of right answers."""

    def __init__(self, cfg: Config, model: nn.Module, kind: str, size: Ledger, length: int, device):
        self.cfg, self.model, self.name, self.size = cfg, attach(model), kind, size
        self.length, self.device = length, device

    def draw(self, count: int, generator: torch.Generator) -> list:
        """Fresh ledgers, in one piece: all have one length."""
        return [ledger(count, self.length, self.name, self.size, generator)]

    def cost(self, piece) -> float:
        return piece[0].numel()

    @torch.inference_mode()
    def run(self, policy: Policy, piece, record: bool = False) -> tuple[Tensor, Memory]:
        """Accuracy (P, B) of each member on the questions after the first quarter, and the memory."""
        ids, labels = (x.to(self.device) for x in piece)
        members = policy.members
        memory = Memory(policy, layers_of(self.model), self.cfg.block, record)
        hidden = self.model.model(ids.repeat(members, 1), cache=memory, use_cache=True).last_hidden_state
        answer = (
            F.linear(hidden, self.model.lm_head.weight[: self.size.values])
            .argmax(-1)
            .view(members, *ids.shape)
        )
        asked = (labels >= 0) & (torch.arange(self.length, device=ids.device) >= self.length // 4)
        right = ((answer == labels) & asked).sum(-1).float()
        return right / asked.sum(-1).clamp(min=1), memory

    def base(self, run: Run, pieces: list) -> np.ndarray:
        """Scores of the model with its full cache (1, B)."""
        return np.concatenate([self.run(Policy("full"), piece)[0].cpu().numpy() for piece in pieces], 1)


# --- evolution ---


def scores_of(
    run: Run, theta: Tensor, tasks: Sequence, draws: Sequence[list], policy_of: Callable, members: int
):
    """Scores of every member on every prompt: one (P, prompts) array a task, members that failed (P,), units.

    A unit of work is some members on one piece of a task's prompts; ranks take units in turn, dear ones
    first, and all gather all results. Out of memory, a unit is done again with half its members at a time.
    """
    many = members or math.ceil(len(theta) / run.world_size)
    groups = [range(i, min(i + many, len(theta))) for i in range(0, len(theta), many)]
    units = [
        (t, i, g) for t, pieces in enumerate(draws) for i in range(len(pieces)) for g in range(len(groups))
    ]
    units.sort(key=lambda u: -tasks[u[0]].cost(draws[u[0]][u[1]]))
    mine, error = {}, None
    try:
        for t, i, g in units[run.rank :: run.world_size]:
            mine[t, i, g] = halve_if_too_large(tasks[t], policy_of, theta[list(groups[g])], draws[t][i])
    except UserError as e:
        error = str(e)
    run.agree(error)
    done = {k: v for part in run.gather(mine) for k, v in part.items()}
    bad = np.zeros(len(theta), bool)
    for (_, _, g), unit in done.items():
        bad[list(groups[g])] |= unit["failed"]
        if bad.all():
            raise UserError(f"layer {unit['layer']}: the scores or attention of every member are not finite")
    column = lambda t, i: np.concatenate([done[t, i, g]["scores"] for g in range(len(groups))])  # noqa: E731
    scores = [np.concatenate([column(t, i) for i in range(len(pieces))], 1) for t, pieces in enumerate(draws)]
    return scores, bad, done


def halve_if_too_large(task, policy_of: Callable, theta: Tensor, piece) -> dict:
    """Scores (P, B), members that failed (P,), and the memory's sizes; in halves where memory is short."""
    try:
        scores, memory = task.run(policy_of(theta), piece)
    except torch.OutOfMemoryError:
        size = f"{task.name}: one member on {task.cost(piece):.0f} tokens"
        if len(theta) == 1:
            raise UserError(f"{size} does not fit; lower --block or --context") from None
        torch.cuda.empty_cache()
        halves = [halve_if_too_large(task, policy_of, part, piece) for part in theta.chunk(2)]
        joined = {k: np.concatenate([h[k] for h in halves]) for k in ("scores", "failed")}
        return halves[0] | joined | {"layer": max(h["layer"] for h in halves)}
    bad = memory.bad()
    failed = np.zeros(len(theta), bool) if bad is None else bad.cpu().numpy()
    unit = {"scores": scores.cpu().numpy(), "failed": failed, "lengths": memory.lengths()}
    return unit | {"layer": memory.bad_layer() if failed.any() else -1, "memory": memory.summary()}


def ratio(scores: Sequence[np.ndarray], base: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """Fitness: mean over tasks of mean score / mean full-cache score on the same prompts; (P,).

    Tasks whose full-cache mean is 0 say nothing and are left out; their places come second. NaN if all are.
    """
    empty = [t for t, b in enumerate(base) if b.mean() == 0]
    parts = [
        s.mean(1) / (b.mean() + 1e-9)
        for t, (s, b) in enumerate(zip(scores, base, strict=True))
        if t not in empty
    ]
    return np.mean(parts, 0) if parts else np.full(len(scores[0]), math.nan), empty


def normalise(cfg: Config, run: Run, task, norm: Norm, generator: torch.Generator, scorer: str) -> None:
    """The first pass: mean parameters 0, nothing forgotten, statistics of the first task's features."""
    theta = torch.zeros(1, parameters(scorer, 9 + cfg.window // 2, cfg.hidden))
    local = Norm(len(norm.mean))
    local.learning = True
    pieces = sorted(task.draw(cfg.norm_prompts, generator), key=task.cost, reverse=True)
    for piece in pieces[run.rank :: run.world_size]:
        task.run(namm_policy(cfg, theta, local, scorer=scorer, budget=None), piece)
    for state in run.gather(local.state_dict()):
        if state["count"]:
            norm.merge(state["count"], state["mean"], state["var"])
    if not norm.count:
        raise UserError(
            f"{task.name}: no prompt reaches --update {cfg.update} tokens, there is nothing to evolve on"
        )


def evolve(cfg: Config, run: Run, tasks: Sequence, scorer: str, start: dict | None = None) -> dict:
    """Evolve a memory in stages, eq. (6): {theta, mean, var, history}; stage i has the first i tasks.

    The mean of the search is validated; a stage begins with the whole state of the search that the stage
    before had at its best validation. All ranks hold the same state; they share the evaluations.
    """
    n = parameters(scorer, 9 + cfg.window // 2, cfg.hidden)
    es, norm = CMAES(n, cfg.population, cfg.sigma, cfg.covariance), Norm(cfg.window // 2 + 1)
    if start:
        es.mean = start["theta"].double()
        norm = Norm.frozen(start["mean"], start["var"])
    known: dict[str, np.ndarray] = {}  # scores of the full cache on the validation prompts
    progress: dict = {"best": es.state_dict(), "best_score": -math.inf, "history": [], "seconds": 0.0}
    ends = np.cumsum(cfg.stages).tolist()
    search, generator = run.generator("search"), run.generator("prompts")
    generator.manual_seed(common.stable_hash(f"{cfg.seed}/prompts"))  # the same for every scorer
    policy_of = lambda theta: namm_policy(cfg, theta, norm, scorer=scorer)  # noqa: E731
    for g in run.steps(int(sum(cfg.stages)), save_every=1, es=es, norm=norm, progress=progress):
        begin = time.perf_counter()
        if not norm.count:
            normalise(cfg, run, tasks[0], norm, generator, scorer)
        stage = next(i for i, end in enumerate(ends) if g < end)
        if g in ends:
            es.load_state_dict(progress["best"])
            progress["best_score"] = -math.inf
        now = tasks[: stage + 1]
        if start and not g:
            progress["best_score"] = validate(cfg, run, es.mean.float()[None], now, policy_of, known)
        theta, draws = es.ask(search), [task.draw(cfg.prompts, generator) for task in now]
        fitness, bad, empty = fitness_of(cfg, run, theta.float(), now, draws, policy_of)
        if len(empty) < len(now):
            es.tell(theta, torch.from_numpy(np.where(bad, -np.inf, fitness)))
        else:
            run.print(
                f"generation {g}: the full cache scores 0 on all its prompts; nothing is learnt from them"
            )
        run.agree(
            None if len(set(run.gather(float(es.mean.sum())))) == 1 else f"generation {g}: the ranks differ"
        )
        numbers = {"fitness": fitness.mean(), "best": fitness.max(), "failed": int(bad.sum())}
        numbers |= {"left_out_tasks": len(empty), "sigma": es.sigma}
        if (g + 1) % cfg.validate_every == 0 or g + 1 in ends:
            score = validate(cfg, run, es.mean.float()[None], now, policy_of, known)
            progress["history"].append([g + 1, stage, score])
            numbers["validation"] = score
            if score > progress["best_score"]:
                progress["best_score"], progress["best"] = score, es.state_dict()
        seconds = time.perf_counter() - begin
        progress["seconds"] += seconds
        run.log(g, **numbers, seconds=seconds)
    return write_memory(cfg, run, progress, norm, scorer)


def write_memory(cfg: Config, run: Run, progress: dict, norm: Norm, scorer: str) -> dict:
    """Leave the best validated mean, its statistics and settings as namm.pt, and return them."""
    theta = progress["best"]["mean"].float()
    result = {"theta": theta, "mean": norm.mean, "var": norm.var, "count": norm.count, "scorer": scorer}
    result |= {k: getattr(cfg, k) for k in ("hidden", "window", "hop", "decay", "features", "update")}
    if run.is_main:
        common.write_atomic(run.folder / "namm.pt", lambda f: torch.save(result, f))
    return result | {k: progress[k] for k in ("history", "seconds")}


def fitness_of(
    cfg: Config, run: Run, theta: Tensor, tasks: Sequence, draws: Sequence[list], policy_of, base=None
):
    """Fitness (P,), members that failed (P,), tasks left out; `base` has the full cache's scores if known."""
    base = base or [task.base(run, pieces) for task, pieces in zip(tasks, draws, strict=True)]
    scores, bad, _ = scores_of(run, theta, tasks, draws, policy_of, cfg.members)
    fitness, empty = ratio(scores, base)
    return fitness, bad, empty


def validate(cfg: Config, run: Run, mean: Tensor, tasks: Sequence, policy_of: Callable, known: dict) -> float:
    """Fitness of the mean on the validation prompts; `known` keeps what the full cache scores on them."""
    seed = torch.Generator().manual_seed(common.stable_hash(f"{cfg.seed}/validation"))
    draws = [task.draw(cfg.validation, seed) for task in tasks]
    for task, pieces in zip(tasks, draws, strict=True):
        if task.name not in known:
            known[task.name] = task.base(run, pieces)
    base = [known[task.name] for task in tasks]
    return float(fitness_of(cfg, run, mean, tasks, draws, policy_of, base)[0][0])


def load_memory(path: str, cfg: Config) -> dict:
    """An evolved memory: {theta, mean, var}; UserError for other dimensions or without statistics.

    Reads namm.pt and the reference's checkpoints (`evolution_state.mean`, buffers `...output_mean`, `_var`).
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(f"{path}: no memory ({str(e).splitlines()[0][:80]})") from None
    flat = dict(common.flat_tensors(data))
    found = {"theta": None, "mean": None, "var": None}
    for name, value in flat.items():
        for key, ends in {
            "theta": ("theta", "evolution_state.mean"),
            "mean": ("output_mean", "mean"),
            "var": ("output_var", "var"),
        }.items():
            if name in ends or (name.endswith(ends[0]) and "output" in ends[0]):
                found[key] = value
    scorer = data.get("scorer", "bam") if isinstance(data, dict) else "bam"
    expected, bins = parameters(scorer, 9 + cfg.window // 2, cfg.hidden), cfg.window // 2 + 1
    if found["theta"] is None or found["theta"].numel() != expected:
        size = 0 if found["theta"] is None else found["theta"].numel()
        inputs = 9 + cfg.window // 2
        raise UserError(
            f"{path}: expected {expected} parameters (= {scorer} {inputs}/{cfg.hidden}), got {size}"
        )
    moments = [found["mean"], found["var"]]
    if (
        any(x is None or x.numel() != bins or not x.isfinite().all() for x in moments)
        or (moments[1] < 0).any()
    ):
        raise UserError(
            f"{path}: no statistics of {bins} frequencies; without them the features mean nothing"
        )
    for name in ("hidden", "window", "hop", "decay", "features"):
        if isinstance(data, dict) and data.get(name, getattr(cfg, name)) != getattr(cfg, name):
            raise UserError(f"{path} was evolved with --{name} {data[name]}, not {getattr(cfg, name)}")
    return {"scorer": scorer} | {k: v.double().flatten() for k, v in found.items()}


def evolved_memory(path: Path, cfg: Config) -> tuple[Tensor, Norm]:
    """theta (1, parameters) and statistics of a file that `evolve` left."""
    found = load_memory(str(path), cfg)
    return found["theta"].float()[None], Norm.frozen(found["mean"], found["var"])


# --- language-model tasks: LongBench, ChouBun, InfiniteBench, needles in a text of your own ---

TEMPLATES = {  # of the three tasks that the paper evolves on; --templates reads those of the others
    "passage_retrieval_en": "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine "
    "which paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\n"
    "Please enter the number of the paragraph that the abstract is from. The answer format must be like "
    '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
    "dureader": "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n"  # noqa: RUF001
    "问题：{input}\n回答：",  # noqa: RUF001
    "narrativeqa": "You are given a story, which can be either a novel or a movie script, and a question. "
    "Answer the question as concisely as you can, using a single phrase if possible. Do not provide any "
    "explanation.\n\nStory: {context}\n\nNow, answer the question based on the story as concisely as you "
    "can, using a single phrase if possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
}


QUESTION = "{context}\n\nQuestion: {input}\n"
INFINITE = {  # ours: InfiniteBench has others for each model
    **dict.fromkeys(
        ("passkey", "number_string", "kv_retrieval", "math_find"), "{context}\n\n{input}\nAnswer:"
    ),
    **dict.fromkeys(("longbook_qa_eng", "longbook_qa_chn"), QUESTION + "Answer:"),
    **dict.fromkeys(
        ("longbook_choice_eng", "code_debug"),
        QUESTION + "A. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}\nThe right letter is",
    ),
    "longbook_sum_eng": "{context}\n\nSummary:",
    "longdialogue_qa_eng": "{context}\n\nThe name that $$MASK$$ stands for is",
    "math_calc": "{context}\n\nThe intermediate values, from left to right, are",
    "code_run": "{context}\n\nThe value of {func_call} is",
}


def words_of(text: str, language: str) -> list[str]:
    """Words of a text: by spaces, by jieba (zh) or by MeCab through fugashi (ja)."""
    if language == "en":
        return text.split()
    try:
        if language == "zh":
            import jieba

            jieba.setLogLevel(60)
            return list(jieba.cut(text, cut_all=False))
        from fugashi import GenericTagger

        return mecab(GenericTagger).parse(text).split()
    except (ImportError, RuntimeError) as e:
        why = str(e).splitlines()[0]
        raise UserError(f'scoring {language} needs: pip install -e ".[asian]" ({why})') from None


def mecab(tagger: type):
    """MeCab with a dictionary that comes as a package, made once."""
    if not hasattr(mecab, "tagger"):
        import unidic_lite

        mecab.tagger = tagger(f"-Owakati -r {unidic_lite.DICDIR}/mecabrc -d {unidic_lite.DICDIR}")
    return mecab.tagger


def plain(text: str, language: str) -> str:
    """Lower case without punctuation and, in English, articles."""
    marks = string.punctuation + ("" if language == "en" else ASIAN_MARKS)
    text = text.lower().translate(dict.fromkeys(map(ord, marks)))
    return (
        " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()) if language == "en" else "".join(text.split())
    )


ASIAN_MARKS = (  # the marks that LongBench drops from Chinese words
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words, as multisets."""
    same = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * same / (len(prediction) + len(answer)) if same else 0.0


def qa_f1(prediction: str, answer: str, classes, language: str = "en") -> float:
    """LongBench's question-answering F1; "char" takes each Chinese character for a word (InfiniteBench)."""
    if language == "en":
        return f1(plain(prediction, "en").split(), plain(answer, "en").split())
    if language == "char":
        return f1(list(plain(prediction, "zh")), list(plain(answer, "zh")))
    cleaned = [[plain(w, language) for w in words_of(text, language)] for text in (prediction, answer)]
    return f1(*([w for w in words if w] for words in cleaned))


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """One longest common subsequence; of several the one that the `rouge` package walks back to."""
    table = np.zeros((len(a) + 1, len(b) + 1), np.int32)
    for i, x in enumerate(a, 1):
        row, before = table[i], table[i - 1]
        for j, y in enumerate(b, 1):
            row[j] = before[j - 1] + 1 if x == y else max(before[j], row[j - 1])
    found, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1, j] > table[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def rouge_l(prediction: str, answer: str, classes, language: str = "en") -> float:
    """ROUGE-L F of the `rouge` package, which LongBench uses.

    The union, over pairs of sentences, of the words in their longest common subsequences, each distinct word
    counting once.
    """
    if language != "en":
        prediction, answer = (" ".join(words_of(text, language)) for text in (prediction, answer))
    # the package takes a sentence of nothing but spaces for one empty word
    said, right = (
        [" ".join(s.split()).split(" ") for s in text.split(".") if s] for text in (prediction, answer)
    )
    union = {w for r in right for s in said for w in common_subsequence(r, s)}
    m, n = (len({w for sentence in text for w in sentence}) for text in (right, said))
    recall, precision = len(union) / m if m else 0.0, len(union) / n if n else 0.0
    return 2 * precision * recall / (precision + recall + 1e-8)


def right_numbers(prediction: str, answer: str, classes) -> float:
    """Share of the numbers in the prediction that are the number in the answer."""
    numbers, right = re.findall(r"\d+", prediction), re.findall(r"\d+", answer)
    return numbers.count(right[0]) / len(numbers) if numbers and right else 0.0


def classification(prediction: str, answer: str, classes) -> float:
    """1 / number of classes that the prediction names, if the right one is among them, else 0.

    A class whose name is part of the right one's does not count.
    """
    named = [c for c in classes or () if c in prediction]
    for c in named:  # the official scorer shortens the list while it walks it, and skips the next one
        if c in answer and c != answer:
            named.remove(c)
    return 1 / len(named) if answer in named else 0.0


def code_similarity(prediction: str, answer: str, classes) -> float:
    """Similarity of the first line that is no comment to the right one, in whole percents."""
    lines = prediction.lstrip("\n").split("\n")
    first = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return (
        round(100 * difflib.SequenceMatcher(None, first, answer).ratio()) / 100 if first and answer else 0.0
    )


def prefix(prediction: str, answer: str, classes) -> float:
    """Share of the answer's characters that the prediction gets right before its first mistake."""
    said = prediction.strip()
    same = next((i for i, c in enumerate(answer) if said[i : i + 1] != c), len(answer))
    return same / len(answer)


def first_number(prediction: str, answer: str, classes) -> float:
    """Whether the first number is the answer (InfiniteBench: passkey, number_string, math_find)."""
    decimal = re.fullmatch(r"\d+\.\d+", answer) is not None
    found = re.search(r"\d+\.\d+|\d+" if decimal else r"\d+", prediction)
    return float(bool(found) and (found[0] == answer or (decimal and float(found[0]) == float(answer))))


def last_number(prediction: str, answer: str, classes) -> float:
    """Whether the last word is the answer (InfiniteBench: code_run)."""
    said = re.sub(r"[\n.`'\":]", " ", prediction).split()
    return float(bool(said) and said[-1].lstrip("0") == answer.strip().lstrip("0"))


def names(prediction: str, answer: str, classes) -> float:
    """Whether a word of the prediction is the answer (InfiniteBench: kv_retrieval, longdialogue)."""
    said = re.sub(r"[\n:\"'.,?!{}]", " ", prediction).split()
    return float(answer in said or answer in [w.upper() for w in said])


def choice(prediction: str, answer: str, classes) -> float:
    """Whether the letter that is chosen is the answer (InfiniteBench: multiple choice)."""
    if prediction[:1] in ("A", "B", "C", "D"):
        return float(prediction[0] == answer)
    said = " ".join(re.sub(r"[\n\"'.,?!{}]", " ", prediction).split())
    for mark in ("answer is:", "answer:", "answer is", "option is"):
        if mark in said:
            return float(said.split(mark, 1)[1].strip()[:1] == answer)
    letter = next((w for w in said.split() if w in ("A", "B", "C", "D")), "")
    return float(letter == answer)


def leading_numbers(prediction: str, answer: str, classes) -> float:
    """Share of a list of numbers that is right before the first mistake (InfiniteBench: math_calc)."""
    said, right = (re.findall(r"\d+", text) for text in (prediction, answer))
    same = next((i for i, x in enumerate(right) if i >= len(said) or said[i] != x), len(right))
    return same / len(right) if right else 0.0


def in_language(metric: Callable, language: str) -> Callable:
    return lambda prediction, answer, classes: metric(prediction, answer, classes, language)


METRICS: dict[str, tuple[Callable, int]] = {  # metric and longest answer in tokens
    **{f"lb/{n}": (qa_f1, k) for n, k in (("narrativeqa", 128), ("qasper", 128), ("multifieldqa_en", 64))},
    **{f"lb/{n}": (qa_f1, 32) for n in ("hotpotqa", "2wikimqa", "musique", "triviaqa")},
    "lb/multifieldqa_zh": (in_language(qa_f1, "zh"), 64),
    "lb/dureader": (in_language(rouge_l, "zh"), 128),
    "lb/vcsum": (in_language(rouge_l, "zh"), 512),
    **{f"lb/{n}": (rouge_l, 512) for n in ("gov_report", "qmsum", "multi_news")},
    "lb/samsum": (rouge_l, 128),
    **{f"lb/{n}": (classification, 64) for n in ("trec", "lsht")},
    **{
        f"lb/{n}": (right_numbers, 32)
        for n in ("passage_retrieval_en", "passage_retrieval_zh", "passage_count")
    },
    **{f"lb/{n}": (code_similarity, 64) for n in ("lcc", "repobench-p")},
    **{f"choubun/{n}": (in_language(qa_f1, "ja"), 64) for n in ("wiki_qa", "edinet_qa", "corp_sec_qa")},
    "choubun/corp_sec_sum": (in_language(rouge_l, "ja"), 128),
    **{f"inf/{n}": (first_number, 32) for n in ("passkey", "number_string", "math_find")},
    **{f"inf/{n}": (names, 50) for n in ("kv_retrieval", "longdialogue_qa_eng")},
    **{f"inf/{n}": (choice, 40) for n in ("longbook_choice_eng", "code_debug")},
    "inf/longbook_qa_eng": (qa_f1, 40),
    "inf/longbook_qa_chn": (in_language(qa_f1, "char"), 40),
    "inf/longbook_sum_eng": (rouge_l, 1200),
    "inf/math_calc": (leading_numbers, 512),
    "inf/code_run": (last_number, 64),
}
HUBS = {"lb": "THUDM/LongBench", "choubun": "SakanaAI/ChouBun", "inf": "xinrongzhang2022/InfiniteBench"}
FIRST_LINE = ("lb/trec", "lb/triviaqa", "lb/samsum", "lb/lsht")  # tasks of which the first line is scored


def read_rows(cfg: Config, task: str) -> list[dict]:
    """The problems of a task: from the first of --data (folders, or a zip) that has them, or the hub."""
    bench, _, name = task.partition("/")
    if task not in METRICS:
        near = difflib.get_close_matches(task, METRICS, 1, 0.0)[0]
        raise UserError(
            f"--tasks {task}: the nearest is {near}; needles:FILE makes one of a text of your own"
        )
    for source in map(Path, cfg.data):
        if not source.is_dir():
            if rows := read_zip(source, name):
                return check_rows(rows, f"{source}, {name}")
            continue
        for file in (source / f"{name}.jsonl", source / "data" / f"{name}.jsonl"):
            if file.exists():
                return check_rows(common.read_jsonl(file, ["context"]), str(file))
    if cfg.data:
        raise UserError(f"--data {','.join(cfg.data)}: no {name}.jsonl")
    if bench == "choubun":
        return check_rows([dict(row) for row in common.load_hub(HUBS[bench], "test", name)], task)
    source = Path(download(HUBS[bench], "data.zip" if bench == "lb" else f"{name}.jsonl"))
    rows = read_zip(source, name) if bench == "lb" else common.read_jsonl(source, ["context"])
    return check_rows(rows or [], task)


def read_zip(source: Path, name: str) -> list | None:
    """Lines of NAME.jsonl in an archive, None if there is none."""
    try:
        with zipfile.ZipFile(source) as archive:
            member = next((n for n in archive.namelist() if Path(n).name == f"{name}.jsonl"), None)
            lines = archive.read(member).decode().splitlines() if member else []
            return [json.loads(line) for line in lines if line.strip()] if member else None
    except (OSError, zipfile.BadZipFile, ValueError) as e:
        raise UserError(f"{source}: neither a folder nor a zip of .jsonl files ({e})") from None


def check_rows(rows: list, where: str) -> list[dict]:
    """The rows, if there are any and each is what a task can read; else UserError names row and field."""
    for i, row in enumerate(rows or [None], 1):
        if not isinstance(row, dict) or not isinstance(row.get("context"), str):
            raise UserError(f"{where}: row {i} is no problem with a context")
        for field in ("options", "all_classes"):
            if not isinstance(row.get(field) or [], list):
                raise UserError(f"{where}: row {i}: {field} is no list")
    return rows


def download(repository: str, file: str) -> str:
    """Path of a dataset's file from the hub's cache."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, file, repo_type="dataset")
    except Exception as e:  # the library raises a dozen kinds
        why = (str(e).splitlines() or [type(e).__name__])[0][:100]
        raise UserError(
            f"{repository}: {file} is not on the hub ({why}); give a folder with --data"
        ) from None


def template_of(cfg: Config, task: str) -> str:
    """The prompt's template: from --templates, else one of those here."""
    bench, _, name = task.partition("/")
    for file in cfg.templates:
        try:
            given = json.loads(Path(file).read_text(encoding="utf-8"))
            found = given.get(task) or given.get(name)
        except (OSError, ValueError, AttributeError) as e:
            raise UserError(f"--templates {file}: no JSON of names and prompts ({e})") from None
        if isinstance(found, str):
            return found
    if found := INFINITE.get(name) if bench == "inf" else TEMPLATES.get(name):
        return found
    raise UserError(f"{task}: no template; --templates takes the benchmark's JSON of task names and prompts")


def fill(template: str, row: dict, task: str) -> str:
    """The template with the fields of a row; InfiniteBench's templates name some that are made here."""
    options = {f"OPTION_{letter}": x for letter, x in zip("ABCD", row.get("options") or (), strict=False)}
    call = re.search(r"[a-zA-Z_]\w*\(.*?\)", str(row.get("input", "")))
    made = {"question": row.get("input", ""), "prompt": row.get("input", ""), **options}
    made |= {"func_call": call[0], "func": call[0].split("(")[0]} if call else {}
    fields = made | row

    def value(found: re.Match) -> str:
        if found[1] not in fields:
            raise UserError(f"{task}: a row has no field {found[1]!r}, which the template names")
        return str(fields[found[1]])

    return re.sub(r"\{(\w+)\}", value, template)


def answers_of(row: dict, task: str) -> list[str]:
    """The right answers as text; of a choice, the letter."""
    answers = row.get("answers", row.get("answer"))
    if answers is None or answers == []:
        raise UserError(f"{task}: a row has neither answers nor answer")
    answers = answers if isinstance(answers, list) else [answers]
    if not all(isinstance(a, (str, int, float)) for a in answers):
        raise UserError(f"{task}: an answer is neither text nor a number")
    if task == "inf/math_calc":
        return [" ".join(map(str, answers))]
    if METRICS[task][0] is choice and row.get("options"):
        letters = [chr(65 + i) for i, option in enumerate(row["options"]) if option in answers]
        return letters or [str(a) for a in answers]
    return [str(a) for a in answers]


def needles(
    path: str, tokenizer, tokens: int, count: int, part: str, seed: int
) -> list[tuple[str, list[str]]]:
    """Prompts of about `tokens` tokens of a real text with codes hidden in it, and the code that is asked.

    Evolution takes its pieces from the first half of the text, the test from the second.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"needles:{path}: {e}") from None
    half = text[: len(text) // 2] if part == "evolve" else text[len(text) // 2 :]
    sentences = re.split(r"(?<=[.!?])\s+", half)
    lengths = [len(ids) for ids in tokenizer(sentences, add_special_tokens=False)["input_ids"]]
    if sum(lengths) < tokens:
        raise UserError(
            f"needles:{path}: {2 * tokens} tokens are needed, half of them for the test; it has fewer"
        )
    rng, out = np.random.default_rng(seed), []
    latest = next(i for i in range(len(lengths) - 1, -1, -1) if sum(lengths[i:]) >= tokens)
    for _ in range(count):
        begin = int(rng.integers(latest + 1))
        end = begin + int(np.searchsorted(np.cumsum(lengths[begin:]), tokens)) + 1
        piece = sentences[begin:end]
        towns = rng.permutation(TOWNS)[:4]
        codes = ["".join(map(str, rng.integers(0, 10, 5))) for _ in towns]
        for place, town, code in zip(sorted(rng.integers(0, len(piece), 4))[::-1], towns, codes, strict=True):
            piece.insert(int(place), f"The code of the library in {town} is {code}.")
        asked = int(rng.integers(4))
        prompt = " ".join(piece) + f"\n\nThe code of the library in {towns[asked]} is"
        out.append((prompt, [codes[asked]]))
    return out


TOWNS = (
    "Aarhus",
    "Bergen",
    "Cadiz",
    "Dover",
    "Evora",
    "Fargo",
    "Ghent",
    "Hobart",
    "Izmir",
    "Jena",
    "Kyoto",
    "Lagos",
)


class TextTask:
    """A task of prompts in words for one language model; a score is in [0, 1]."""

    def __init__(self, cfg: Config, name: str, model, tokenizer, run: Run, part: str = "evolve"):
        self.cfg, self.name, self.model, self.tokenizer, self.device = (
            cfg,
            name,
            attach(model),
            tokenizer,
            run.device,
        )
        self.file, self.cache = (
            run.folder / f"full-cache-{part}-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json",
            {},
        )
        if name.startswith("needles:"):
            self.metric, self.max_new = prefix, 12
            count = max(cfg.prompts, cfg.validation, cfg.norm_prompts) if part == "evolve" else cfg.test
            seed = run.stream(f"{name}/{part}") % 2**32
            rows = needles(name[8:], tokenizer, cfg.context - 160, count, part, seed)
            self.rows = [(prompt, answers, None) for prompt, answers in rows]
        else:
            data, template = read_rows(cfg, name), template_of(cfg, name)
            self.metric, self.max_new = METRICS[name]
            self.rows = [(fill(template, r, name), answers_of(r, name), r.get("all_classes")) for r in data]
        self.stops = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        newline = tokenizer.encode("\n", add_special_tokens=False)
        self.stops += newline[-1:] if name == "lb/samsum" else []
        self.prompts = [self.encode(prompt) for prompt, *_ in self.rows]
        if cfg.resume and self.file.exists():
            self.cache = {int(k): v for k, v in json.loads(self.file.read_text()).items()}

    def encode(self, prompt: str) -> list[int]:
        """Ids with whatever the tokenizer puts around a text; a prompt that is too long loses its middle."""
        room = self.cfg.context - self.max_new - (32 if self.cfg.chat else 0)
        if room < 2:
            raise UserError(
                f"--context {self.cfg.context} leaves no room beside an answer of {self.max_new} tokens"
            )
        ids = self.tokenizer(prompt)["input_ids"]
        if len(ids) > room:
            ends = [
                self.tokenizer.decode(x, skip_special_tokens=True)
                for x in (ids[: room // 2], ids[-(room // 2) :])
            ]
            prompt = "".join(ends)
            ids = self.tokenizer(prompt)["input_ids"]
        if self.cfg.chat:
            if not self.tokenizer.chat_template:
                raise UserError(f"--chat: the tokenizer of {self.cfg.model} has no chat template")
            turn = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def draw(self, count: int | None, generator: torch.Generator) -> list[int]:
        """Places of prompts, without replacement; all of them for None."""
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        return sorted(order) if count is None else order[:count]

    def cost(self, place: int) -> float:
        return float(len(self.prompts[place]))

    @torch.inference_mode()
    def run(self, policy: Policy, place: int, record: bool = False) -> tuple[Tensor, Memory]:
        """Scores (P, 1) of the members' greedy answers to one prompt, and the memory."""
        ids = torch.tensor([self.prompts[place]] * policy.members, device=self.device)
        memory = Memory(policy, layers_of(self.model), self.cfg.block, record)
        tokens = greedy(self.model, ids, memory, self.max_new, self.stops).tolist()
        return torch.tensor([[self.score(row, place)] for row in tokens]), memory

    def score(self, tokens: list[int], place: int) -> float:
        """The metric of one answer, the best over the right ones."""
        end = next((i for i, x in enumerate(tokens) if x in self.stops), len(tokens))
        said = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        if self.name in FIRST_LINE:
            said = said.lstrip("\n").split("\n")[0]
        _, answers, classes = self.rows[place]
        return max(self.metric(said, answer, classes) for answer in answers)

    def base(self, run: Run, places: list[int]) -> np.ndarray:
        """Scores of the full cache (1, B); each prompt is computed once in a run and kept on disk."""
        missing = [p for p in places if p not in self.cache]
        if missing:
            scores, _, _ = scores_of(run, torch.zeros(1, 1), [self], [missing], lambda _: Policy("full"), 1)
            self.cache |= dict(zip(missing, scores[0][0].tolist(), strict=True))
            if run.is_main:
                common.write_json(self.file, self.cache)
        return np.array([[self.cache[p] for p in places]])


# --- the built-in study ---


def tiny_model(cfg: Config, name: str) -> tuple[nn.Module, Ledger | None]:
    """One of the three models without its weights: `base`, `other` or `dt`."""
    if name == "dt":
        return DecisionTransformer(cfg.corridor), None
    shape, size = (cfg.lm, cfg.ledger) if name == "base" else (cfg.other, cfg.other_ledger)
    return ledger_lm(shape, Ledger(*size), 4 * cfg.length), Ledger(*size)


def train_job(name: str, run: Run) -> dict:
    """Train one of the three models and leave model.pt."""
    cfg, begin = run.cfg, time.perf_counter()
    if name == "dt":
        model, steps = train_dt(cfg, run), cfg.dt_steps
    else:
        shape, size, steps = (cfg.lm, cfg.ledger, cfg.lm_steps)
        if name == "other":
            shape, size, steps = cfg.other, cfg.other_ledger, cfg.other_steps
        model = train_lm(cfg, run, shape, Ledger(*size), steps)
    common.write_atomic(run.folder / "model.pt", lambda f: torch.save(model.state_dict(), f))
    count = sum(p.numel() for p in model.parameters())
    return {"parameters": count, "updates_per_s": steps / (time.perf_counter() - begin)}


def trained_model(cfg: Config, root: Path, name: str, device) -> tuple[nn.Module, Ledger | None]:
    """A model that `train_job` left, ready for a memory."""
    model, size = tiny_model(cfg, name)
    model.load_state_dict(torch.load(root / "models" / name / "model.pt", weights_only=True))
    model = model.to(device).eval()
    attach(model.backbone if name == "dt" else model)
    return model, size


class CorridorTask:
    """Rollouts of the decision transformer, behind the same interface as the ledgers."""

    def __init__(self, cfg: Config, model: DecisionTransformer, device):
        self.cfg, self.model, self.name, self.device = cfg, model, "corridor", device

    def draw(self, count: int, generator: torch.Generator) -> list:
        return [corridor(count, self.cfg.corridor, generator)]

    def run(self, policy: Policy, piece, record: bool = False) -> tuple[Tensor, Memory]:
        got, memory = rollout(self.model, policy, piece, self.device, record)
        return got[None], memory


def test_names(cfg: Config) -> list[str]:
    """Tests as where/length/cap; the first of a place has the controls."""
    names = [f"{kind}/1/{cfg.cap}" for kind in KINDS] + [f"other/1/{cfg.other_cap}", f"dt/1/{cfg.cap}"]
    names += [f"dense/{times}/{cfg.cap}" for times in cfg.longer]
    return names + [f"{kind}/1/{cap}" for cap in cfg.sweep for kind in KINDS]


def test_job(name: str, run: Run) -> dict:
    """Scores of all policies on one set of held-out sequences: {policy: {scores, held, ...}}."""
    cfg, root = run.cfg, run.folder.parents[1]
    where, times, cap = name.replace("-", "/").split("/")
    times, cap = int(times), None if cap == "None" else int(cap)
    which = where if where in ("other", "dt") else "base"
    model, size = trained_model(cfg, root, which, run.device)
    kind = where if where in KINDS else "dense"
    task = CorridorTask(cfg, model, run.device) if where == "dt" else None
    task = task or LedgerTask(cfg, model, kind, size, times * cfg.length, run.device)
    count = cfg.episodes if where == "dt" else max(2, cfg.test // times)
    seed = common.stable_hash(f"{cfg.seed}/held out/{where}/{times}")  # the same ledgers for every cap
    piece = task.draw(count, torch.Generator().manual_seed(seed))[0]
    main_test = times == 1 and cap == (cfg.other_cap if where == "other" else cfg.cap)
    policies = test_policies(cfg, root, cap, main_test and where in KINDS, run)
    out, budget = {}, None
    for label, policy in policies.items():
        if policy.kind not in ("namm", "full"):
            policy.budget = budget  # what NAMM held in each layer
        if main_test or policy.kind in ("namm", "full", "h2o", "snap", "recency"):
            with run.timed(label):
                scores, memory = task.run(policy, piece, record=where == "dense" and main_test)
            out[label] = {"scores": scores.mean(0).tolist()} | memory.summary()
            budget = budget or [round(x) for x in memory.lengths() if label == "NAMM"] or None
            if where == "dense" and main_test and label in ("NAMM", "h2o", "snap", "recency"):
                out[label] |= kept_tokens(memory, piece[0], size)
    return {"policies": out, "seconds": run.seconds}


def test_policies(cfg: Config, root: Path, cap: int | None, controls: bool, run: Run) -> dict[str, Policy]:
    """The evolved memory, its controls, and the baselines, whose budget NAMM's own size sets."""
    theta, norm = evolved_memory(root / f"evolve-{cfg.scorer}" / "namm.pt", cfg)
    make = functools.partial(namm_policy, cfg, scorer=cfg.scorer, budget=cap)
    out = {"NAMM": make(theta, norm), "full": Policy("full")}
    if controls:
        if cfg.ablation and cfg.scorer != "mlp":
            alone, its_norm = evolved_memory(root / "evolve-mlp" / "namm.pt", cfg)
            out["NAMM, mlp"] = make(alone, its_norm, scorer="mlp")
        if cap is not None:
            out["NAMM, no cap"] = make(theta, norm, budget=None)
        if cfg.evict != "strict":
            out["NAMM, strict"] = make(theta, norm, evict="strict")
        orders = [torch.randperm(theta.shape[1], generator=run.generator("permutation")) for _ in range(4)]
        shuffled = torch.cat([theta[:, order] for order in orders])
        out["NAMM, entries permuted"] = make(shuffled, norm)
        zeros = torch.zeros(cfg.window // 2 + 1, dtype=torch.float64)
        out["NAMM, not normalised"] = make(theta, Norm.frozen(zeros, zeros + 1))
    more = {"update": cfg.update, "budget": 2, "generator": run.generator("random"), "window": cfg.window}
    return out | {kind: Policy(kind, hop=cfg.hop, **more) for kind in BASELINES[1:]}


def kept_tokens(memory: Memory, ids: Tensor, size: Ledger) -> dict:
    """What was held after the last eviction: a map (layers x heads, tokens) of the first ledger, and shares.

    Shares of the tokens held, by what they are: a key's latest value, an older one, a question, a filler.
    """
    rows = [layer.log[-1] for layer in memory.layers]
    seen = rows[0][0]
    held = torch.zeros(len(rows), *rows[0][1].shape[:2], seen + 1)  # (layers, N, H, tokens + 1)
    for layer, (_, pos, valid) in enumerate(rows):
        held[layer].scatter_(2, pos.cpu().long().masked_fill(~valid.cpu(), seen), 1.0)
    held, ids = held[..., :seen], ids[:, :seen]
    writes = (ids >= 1) & (ids <= size.keys * size.values)
    key = torch.where(writes, (ids - 1) // size.values, -1)
    later = torch.stack(
        [(key == k).flip(1).long().cumsum(1).flip(1) - (key == k).long() for k in range(size.keys)]
    )
    newest = writes & (later.gather(0, key.clamp(min=0)[None])[0] == 0)
    asks = (ids > size.keys * size.values) & (ids <= size.keys * size.values + size.keys)
    kinds = {"latest value": newest, "older value": writes & ~newest, "question": asks}
    kinds["filler"] = ~(writes | asks)
    counts = {k: float((held * m[None, :, None]).sum() / held.sum()) for k, m in kinds.items()}
    return {
        "kept": held[:, 0].flatten(0, 1).int().tolist(),
        "shares": counts,
        "latest": newest[0].int().tolist(),
    }


def toy_study(cfg: Config, run: Run) -> None:
    """Train three small models, evolve on one of them in stages, test everything on all of them."""
    models = run.stage("models").jobs(["base", "other", "dt"], train_job)
    model, size = trained_model(cfg, run.folder, "base", run.device)
    tasks = [LedgerTask(cfg, model, kind, size, cfg.length, run.device) for kind in KINDS]
    evolved = {}
    for scorer in dict.fromkeys((cfg.scorer, *(["mlp"] if cfg.ablation else []))):
        evolved[scorer] = evolve(cfg, run.stage(f"evolve-{scorer}"), tasks[: len(cfg.stages)], scorer)
    names = [n.replace("/", "-") for n in test_names(cfg)]
    tests = run.stage("tests").jobs(names, test_job)
    report(cfg, run, tests, {scorer: found["history"] for scorer, found in evolved.items()})
    run.figure("namm", lambda figure: draw(cfg, figure, tests), (11, 6.5))
    policy = test_policies(cfg, run.folder, cfg.cap, False, run)["NAMM"]
    ids = torch.randint(size.vocabulary, (16, 4 * cfg.length), generator=run.generator("speed"))
    speed = decode_speed(cfg, run, model, ids.to(run.device), policy)
    spent = sum(found["seconds"] for found in evolved.values()) / len(evolved)
    sequences = cfg.population * cfg.prompts * sum((i + 1) * n for i, n in enumerate(cfg.stages))
    speed |= {"generations_per_s": sum(cfg.stages) / spent, "evaluations_per_s": sequences / spent}
    speed |= {"evolution_tokens_per_s": sequences * cfg.length / spent}
    speed |= {f"{k}_updates_per_s": v["updates_per_s"] for k, v in models.items()}
    run.finish(**speed)


def report(cfg: Config, run: Run, tests: dict, histories: dict) -> None:
    """Tables and claims."""
    for name, result in tests.items():
        rows = []
        for label, row in result["policies"].items():
            keys = ("held after updates", "held at the end", "scores >= 0", "mean age", "KV bytes")
            rows.append({"policy": label, "score": common.mean_se(row["scores"])} | {k: row[k] for k in keys})
        where, times, cap = name.split("-")
        length = 3 * cfg.corridor if where == "dt" else int(times) * cfg.length
        run.table(rows, f"{where}, {length} tokens, cap {cap}")
    rows = [
        {"scorer": s, "generation": g, "stage": i, "validation": v}
        for s, h in histories.items()
        for g, i, v in h
    ]
    run.table(rows, "validation of the mean over the generations (ratio to the full cache)")
    for label in ("NAMM", "h2o", "snap", "recency"):
        shares = tests[f"dense-1-{cfg.cap}"]["policies"][label]["shares"]
        run.results["table"].append({"table": "what was kept", "policy": label} | shares)
    of = lambda test, label: tests[test]["policies"][label]["scores"]  # noqa: E731
    places = {kind: f"{kind}-1-{cfg.cap}" for kind in KINDS}
    places |= {"another LM": f"other-1-{cfg.other_cap}", "decision transformer": f"dt-1-{cfg.cap}"}
    for place, test in places.items():
        ours = of(test, "NAMM")
        run.claim(
            f"{place}: NAMM keeps the full cache's score within .05", ours, of(test, "full"), "higher", -0.05
        )
        for label in ("h2o", "snap", "recency", "streaming", "random", "l2"):
            run.claim(f"{place}: NAMM beats {label} at the same size", ours, of(test, label))
    for kind in KINDS:
        for label in ("NAMM, entries permuted", "NAMM, not normalised"):
            run.claim(
                f"{kind}: {label[6:]} (theirs) is worse", of(places[kind], "NAMM"), of(places[kind], label)
            )
        if cfg.scorer == "bam" and cfg.ablation:
            text = f"{kind}: backward attention scores better than token by token (mlp)"
            run.claim(text, of(places[kind], "NAMM"), of(places[kind], "NAMM, mlp"))


COLORS = {"NAMM": "C3", "full": "k", "h2o": "C0", "snap": "C2", "recency": "C1"}


def draw(cfg: Config, figure, tests: dict) -> None:
    """Score against cache size on both kinds of ledger; what was kept, token by token."""
    top, below = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    for axes, kind in zip(top.subplots(1, 2, sharey=True), KINDS, strict=True):
        for label, color in COLORS.items():
            rows = [tests[f"{kind}-1-{cap}"]["policies"][label] for cap in {cfg.cap, *cfg.sweep}]
            rows.sort(key=lambda row: row["held after updates"])
            score = [np.mean(r["scores"]) for r in rows]
            if label == "full":
                axes.axhline(score[0], color=color, ls="--", label=f"full cache ({rows[0]['seen']} tokens)")
                continue
            held = [r["held after updates"] for r in rows]
            se = [np.std(r["scores"], ddof=1) / len(r["scores"]) ** 0.5 for r in rows]
            axes.errorbar(held, score, se, color=color, marker="o", ms=4, label=label)
        row = tests[f"{kind}-1-{cfg.cap}"]["policies"].get("NAMM, no cap")
        if row:
            axes.plot(
                row["held after updates"],
                np.mean(row["scores"]),
                "*",
                color="C3",
                ms=12,
                label="NAMM, no cap",
            )
        axes.set(title=f"{kind} ledger", xlabel="tokens that a head holds after an update")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    top.axes[0].set_ylabel("accuracy")
    policies = tests[f"dense-1-{cfg.cap}"]["policies"]
    for axes, label in zip(below.subplots(3, 1, sharex=True), ("NAMM", "snap", "h2o"), strict=True):
        kept = np.array(policies[label]["kept"])
        axes.imshow(kept, aspect="auto", cmap="Greys", interpolation="nearest")
        latest = np.flatnonzero(policies[label]["latest"])
        axes.plot(latest, np.full(len(latest), -1.0), "v", color="C3", ms=4, clip_on=False)
        share = policies[label]["shares"]["latest value"]
        axes.set(ylabel="layer, head", yticks=[])
        axes.set_title(
            f"{label}: kept tokens; {share:.0%} of them are the latest value of a key (red)", fontsize=8
        )
    axes.set_xlabel("token")


@torch.inference_mode()
def decode_speed(cfg: Config, run: Run, model, ids: Tensor, policy: Policy, tokens: int = 64) -> dict:
    """Tokens a second and bytes, full cache against `policy`: prompts (N, T), then `tokens` more each."""
    rows, out = [], {}
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    size = sum(p.numel() for p in model.parameters())
    for label, chosen in {"full": Policy("full"), "NAMM": policy}.items():
        for _ in range(2):  # the first warms up
            memory, run.seconds = Memory(chosen, layers_of(model), cfg.block), {}
            with run.timed("prefill"):
                for part in ids.split(512, 1):
                    model(part, cache=memory, use_cache=True, logits_to_keep=1)
            with run.timed("decode"):
                greedy(model, ids[:, -1:], memory, tokens)
        speed = {"prefill tokens/s": ids.numel() / run.seconds["prefill"]}
        speed |= {"decode tokens/s": len(ids) * tokens / run.seconds["decode"]}
        speed["prefill MFU"] = 2 * size * speed["prefill tokens/s"] / common.peak_flops(run.device)
        row = {"cache": label, **speed} | {
            k: memory.summary()[k] for k in ("seen", "KV bytes", "statistics bytes")
        }
        rows.append(row | {"held in each layer": " ".join(str(layer.size) for layer in memory.layers)})
        out |= {f"{label}_{k.replace(' ', '_').replace('/s', '_per_s')}": v for k, v in speed.items()}
    if run.device.type == "cuda":
        out["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    run.table(rows, f"speed and memory, {len(ids)} prompts of {ids.shape[1]} tokens")
    return out


# --- a language model of your own ---


def text_study(cfg: Config, run: Run) -> None:
    """Evolve a memory for a real language model, and evaluate it beside other policies of the same size."""
    model, tokenizer = common.load_lm(cfg.model, torch.bfloat16 if run.amp else torch.float32)
    model = attach(model.to(run.device))
    stretch_rope(model, cfg.stretch)
    start = load_memory(cfg.namm, cfg) if cfg.namm else None
    if start and start["scorer"] != cfg.scorer:
        raise UserError(f"{cfg.namm} is of --scorer {start['scorer']}")
    names = cfg.test_tasks or cfg.tasks  # before anything long: a file that is missing shows now
    tests = [TextTask(cfg, name, model, tokenizer, run, "test") for name in names]
    if sum(cfg.stages):
        tasks = [TextTask(cfg, name, model, tokenizer, run) for name in cfg.tasks[: len(cfg.stages)]]
        start = evolve(cfg, run.stage("evolve"), tasks, cfg.scorer, start)
    if start is None:
        raise UserError("nothing to evaluate: give generations with --stages, or a memory with --namm")
    theta, norm = start["theta"].float()[None], Norm.frozen(start["mean"], start["var"])
    if not theta.any():
        run.print(
            "the memory's parameters are all 0: every score is 0 and nothing is evicted"
            + ", but for the cap" * bool(cfg.cap)
        )
    results = {t.name: evaluate_text(cfg, run, t, theta, norm) for t in tests}
    report_text(cfg, run, results)
    longest = max((t for t in tests), key=lambda t: max(map(len, t.prompts)))
    ids = torch.tensor([max(longest.prompts, key=len)], device=run.device)
    run.finish(**decode_speed(cfg, run, model, ids, namm_policy(cfg, theta, norm), 32))


def evaluate_text(cfg: Config, run: Run, task: TextTask, theta: Tensor, norm: Norm) -> dict[str, dict]:
    """{policy: {scores, sizes}} on a task's prompts; NAMM's mean size in each layer is the others' budget."""
    places, out, budget = task.draw(cfg.test_prompts, run.generator(f"test/{task.name}")), {}, None
    for kind in ("namm", *cfg.policies):
        more = {"update": cfg.update, "budget": budget, "hop": cfg.hop, "window": cfg.window}
        seed = run.generator("random policy")
        policy = namm_policy(cfg, theta, norm) if kind == "namm" else Policy(kind, generator=seed, **more)
        begin = time.perf_counter()
        scores, bad, units = scores_of(run, theta, [task], [places], lambda _, policy=policy: policy, 1)
        if bad.any():
            raise UserError(f"{task.name}: the memory's scores are not finite")
        pruned = [
            u["lengths"] for u in units.values() if u["memory"]["updates"]
        ]  # shorter prompts stay whole
        lengths = np.mean(pruned or [u["lengths"] for u in units.values()], 0)
        budget = budget or [max(2, round(x)) for x in lengths]
        numbers = [unit["memory"] for unit in units.values()]
        sizes = {k: float(np.mean([n[k] for n in numbers])) for k in numbers[0] if numbers[0][k] is not None}
        sizes["seconds a prompt"] = (time.perf_counter() - begin) * run.world_size / len(places)
        label = "NAMM" if kind == "namm" else kind
        out[label] = {"scores": scores[0][0].tolist(), "lengths": lengths.tolist()} | sizes
        mean = common.mean_se(out[label]["scores"])
        run.print(
            f"{task.name}: {label} {mean}, {len(places)} prompts, {sizes['seconds a prompt']:.1f} s each"
        )
    return out


def report_text(cfg: Config, run: Run, results: dict) -> None:
    """A table for each task, both aggregates over all tasks and over those not evolved on, and claims."""
    shown = ("seen", "held after updates", "scores >= 0", "mean age", "KV bytes", "seconds a prompt")
    ratios: dict[str, dict[str, float]] = {}
    for name, policies in results.items():
        full, rows = np.mean(policies.get("full", {}).get("scores", [np.nan])), []
        for label, row in policies.items():
            ratios.setdefault(label, {})[name] = np.mean(row["scores"]) / full if full > 0 else math.nan
            start = {"policy": label, "score": common.mean_se(row["scores"]), "of full": ratios[label][name]}
            rows.append(start | {k: row.get(k) for k in shown})
        title = f"needles:{Path(name[8:]).name}" if name.startswith("needles:") else name
        run.table(rows, f"{title}, {len(policies['NAMM']['scores'])} prompts")
        for i in range(len(policies["NAMM"]["lengths"])):
            held = {label: row["lengths"][i] for label, row in policies.items()}
            run.results["table"].append({"table": f"{title}: held in each layer", "layer": i} | held)
    groups = {"all tasks": list(results), "tasks not evolved on": [n for n in results if n not in cfg.tasks]}
    for title, tasks in groups.items():
        rows = []
        for label, of_full in ratios.items() if len(tasks) > 1 else ():
            known = [of_full[n] for n in tasks if not math.isnan(of_full[n])]
            score = float(np.mean([np.mean(results[n][label]["scores"]) for n in tasks]))
            mean_ratio = float(np.mean(known)) if known else None
            rows.append({"policy": label, "mean score": score, "mean ratio": mean_ratio, "tasks": len(tasks)})
        if rows:
            run.table(rows, title)
    joined = {p: [x for policies in results.values() for x in policies[p]["scores"]] for p in ratios}
    for label in joined:
        if label not in ("NAMM", "full"):
            run.claim(f"NAMM beats {label} at the same size", joined["NAMM"], joined[label])
    if "full" in joined:
        run.claim(
            "NAMM keeps the full cache's score within .05", joined["NAMM"], joined["full"], "higher", -0.05
        )
        run.claim("NAMM beats the full cache", joined["NAMM"], joined["full"])


def dry_run(cfg: Config, run: Run) -> None:
    """Print parameters, memory, FLOPs and steps without weights or data."""
    n = parameters(cfg.scorer, 9 + cfg.window // 2, cfg.hidden)
    state = 8 * n * (2 * n if cfg.covariance == "full" else 2)
    run.print(
        f"memory network {cfg.scorer}: {n:,} parameters; CMA-ES, {cfg.covariance}, has {state / 1e6:,.1f} MB"
    )
    if cfg.model:
        model, length = common.meta_model(cfg.model), cfg.context
    else:
        with torch.device("meta"):
            model, length = tiny_model(cfg, "base")[0], cfg.length
    c, size = model.config.get_text_config(), sum(p.numel() for p in model.parameters())
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    numbers = 2 if run.amp or cfg.model else 4
    entry = c.num_key_value_heads * c.num_hidden_layers * (2 * width * numbers)
    extra = c.num_key_value_heads * c.num_hidden_layers * 4 * (cfg.window // 2 + 1 + cfg.window + 1)
    held = length if cfg.cap is None else cfg.cap + cfg.update
    members = (cfg.members or math.ceil(cfg.population / run.world_size)) * (1 if cfg.model else cfg.prompts)
    parts = {"weights": size * numbers, f"full cache, {length:,} tokens": entry * length * members}
    parts[f"cache of {held:,} tokens"] = entry * held * members
    parts["statistics of it"] = extra * held * members
    parts["attention of a block, one layer"] = (
        4 * 3 * c.num_attention_heads * min(cfg.block, cfg.update) * held * members
    )
    rows = [{"on each GPU": k, "GB": f"{v / 1e9:.3f}"} for k, v in parts.items()]
    run.table(rows, f"{cfg.model or 'built-in model'}: {size:,} parameters; {members} sequences at once")
    names = cfg.tasks or list(KINDS)
    for stage, generations in enumerate(cfg.stages):
        tokens = cfg.population * cfg.prompts * (stage + 1) * (10_000 if cfg.model else length)
        flops = 2 * size * tokens
        run.print(
            f"stage {stage + 1}: {generations} generations on {', '.join(names[: stage + 1])}; each "
            f"{tokens:,} tokens{' (10,000 a prompt)' * bool(cfg.model)}, {flops:.1e} FLOP and the attention; "
            f"{flops / run.world_size / 989e12 / 0.4:,.0f} s on {run.world_size} H100 at 40 % MFU"
        )
    if cfg.model:
        missing = [
            t for t in (*cfg.tasks, *cfg.test_tasks) if not t.startswith("needles:") and t not in METRICS
        ]
        run.print(
            f"tasks: {len(cfg.test_tasks or cfg.tasks)} in the test" + f"; unknown: {missing}" * bool(missing)
        )


PAPER = dict(  # the reference's stage configurations
    window=32, hop=16, decay=0.99, scorer="bam", hidden=32, evict="ref", update=512, cap=None, sigma=0.065,
    population=32, covariance="full", prompts=64, validation=500, validate_every=10, norm_prompts=500,
)  # fmt: skip
CONFIGS = {
    "smoke": Config(
        config="smoke", hidden=8, cap=16, population=4, stages=(1, 1), prompts=2, validation=2,
        validate_every=1, norm_prompts=2, length=128, lm=(32, 2, 4, 2), ledger=(4, 4, 8), lm_steps=20,
        other=(24, 1, 2, 2), other_ledger=(4, 3, 8), other_steps=10, other_cap=16, corridor=32, dt_steps=10,
        test=4, episodes=4, sweep=(24,), longer=(2,),
    ),
    "demo": Config(workers=2),
    "gpu": Config(
        config="gpu", update=512, cap=None, population=32, covariance="full", stages=(40, 60), prompts=8,
        validate_every=10, members=8, length=4096, lm=(512, 8, 8, 2), ledger=(32, 16, 64), lm_steps=1500,
        other=(384, 6, 6, 6), other_ledger=(24, 12, 64), other_steps=1000, other_cap=None, corridor=1024,
        dt_steps=1500, learning_rate=1e-3, sweep=(256, 512, 1024), longer=(2,),
    ),
    "text": Config(
        config="text", model="HuggingFaceTB/SmolLM2-135M-Instruct", tasks=("needles:book.txt",), update=512,
        cap=512, population=6, stages=(4,), prompts=2, validation=4, validate_every=1, norm_prompts=2,
        context=3200, test=12, members=1, policies=("full", "h2o", "snap", "recency"),
    ),
    "full": Config(
        config="full", **PAPER, model="meta-llama/Meta-Llama-3-8B", stretch=4.0, context=32768, members=4,
        tasks=("lb/passage_retrieval_en", "lb/dureader", "lb/narrativeqa"), stages=(300, 150, 150),
        test_tasks=tuple(METRICS),
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    cfg = common.parse_config(CONFIGS, argv)
    with Run(cfg) as run:
        if cfg.dry_run:
            dry_run(cfg, run)
        elif cfg.model:
            text_study(cfg, run)
        else:
            toy_study(cfg, run)


if __name__ == "__main__":
    main()
