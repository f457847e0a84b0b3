"""Simple ingredients for offline RL on heterogeneous data: a larger actor, and the MOOD testbed.

Cetin, Tirinzoni, Pirotta, Lazaric, Ollivier, Touati, "Simple Ingredients for Offline Reinforcement Learning",
ICML 2024, arXiv 2403.13097; facts of the authors' code are from github.com/facebookresearch/offline_rl.

The claim. Offline RL gets worse when trajectories collected for related but different tasks are simply added to
its data. Of the explanations tested (conservatism, critic ensembles, a bias of advantage weighting, how actions
are picked at test time, network size) the size of the actor matters most: with a larger one AWAC and IQL cope.

Actor mu(s) = tanh f(s), a = mu + sigma n kept in [-1, 1]; N critics Q_i, targets Q'; one update is
  eq. (1)  U(q) = mean_{i != j} |q_i - q_j|,  P(q) = mean_i q_i - p U(q)      of two at p = 1/2: their minimum
  eq. (2)  y = r + gamma (1 - terminated) P(Q'(s', a')),  a' ~ pi(s') with noise clipped to +-0.3
           L_Q = 1/2 sum_i mean (Q_i(s, a) - y)^2
  eq. (3)  A(s, a) = mean_i Q_i(s, a) - 1/K sum_k P(Q(s, a_k)),  a_k ~ pi(s)   pessimism for the policy only
  eq. (4)  AWAC: L_pi = -mean_b w_b l(s_b, a_b),  w = B softmax_b(A / beta),  l the log-density a dimension
  eq. (5)  IQL: L_V = mean |kappa - 1{u < 0}| u^2,  u = P(Q'(s, a)) - V(s);  y = r + gamma (1 - terminated) V(s')
  eq. (6)  TD3+BC: L_pi = -mean P(Q(s, a_pi)) + alpha sg(mean |P(Q(s, a_pi))|) mse(mu(s), a)
  eq. (7)  ASAC: l is maximised on rows drawn with P(i) = softmax(g)_i over all the data, g_i = A_i / beta
  eq. (8)  evaluation sampling: act with argmax_k P(Q(s, a_k)) of M samples
then Q' moves tau of the way to Q.

How to run
  python mood.py                                    four seeds, five mixtures and baselines, on two CPU cores
  python mood.py --collect --data D                 build a testbed folder D (cheetah; --collect_with td3: all)
  python mood.py --data D --repeat 4                train on it; also ExORL's folders
  python mood.py --data hopper_medium-v2.hdf5 --splits all --normalize --repeat 1    D4RL; minari:ID likewise
  python mood.py --rows baseline,big_actor,... (all: see ROWS)     the paper's hypotheses, one a row
  python mood.py --config bench --corl DIR          updates a second beside CORL's own files
  torchrun --nproc_per_node=8 mood.py --config full --data D       15 tasks x 4 mixtures x all rows x 5 seeds
Jobs task/mixture/row are dealt to ranks and workers; the seeds of a job share one batched network.

Where this file departs from the paper and its code
- Its tables were not at hand: hyperparameters are read off the authors' code, no figure here is quoted from them.
- Kept from the code: log-density averaged over dimensions and without the truncation's correction; fixed sigma;
  no target actor, no delayed updates; the advantage of IQL is AWAC's, V is not in it (iql_value: Q' - V, as in
  the IQL paper). Changed: softmax weights times B (only Adam's epsilon notices); V is initialised as the other
  networks; one gamma (the code's flag is never passed on); N = 1 works; TD3+BC clones with mu(s), not with a
  noisy sample; of a row drawn twice ASAC keeps the last score; states of modern critics can be saved.
- Collected data are ours: agents of TD3 (and of TD3 on RND's novelty) trained online, or, for the demo,
  evolved open-loop gaits of the cheetah. The authors' data are not public.
- Seeds draw random numbers from their own generators: stacked or alone, they get the same.
- The demo is selected and small: gamma 0.95, actions held for 4 physics steps, observations standardised, data
  of five gaits, an actor of 8 units against one of 128, the same settings for both. A temperature three times
  lower and higher is shown for both (low_beta, high_beta).

Reading order: ROWS, Config, Agent, the losses, update, LogSampler, Learner, act, train_arm, main.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import re
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal
from unittest import mock

import gymnasium
import mujoco
import mujoco.rollout
import numpy as np
import torch
from torch import Tensor, nn

import common
from common import EnsembleLinear, Replay, Run, UserError

SPLITS = ("same", "cross", "mixed", "mixed+rnd", "all")

# the paper's hypotheses, one a row: what changes against the baseline
ROWS: dict[str, Callable[[Config], dict]] = {
    "baseline": lambda c: {},
    "big_actor": lambda c: {"actor": c.big_actor},
    "modern_actor": lambda c: {"actor": c.modern_actor},
    "big_critic": lambda c: {"critic": c.big_critic},
    "five_critics": lambda c: {"critics": 5},
    "no_pessimism": lambda c: {"pessimism": 0.0},
    "low_beta": lambda c: {"beta": c.beta / 3},
    "low_beta_big_actor": lambda c: {"beta": c.beta / 3, "actor": c.big_actor},
    "high_beta": lambda c: {"beta": c.beta * 3},
    "high_beta_big_actor": lambda c: {"beta": c.beta * 3, "actor": c.big_actor},
    "asac": lambda c: {"algo": "asac"},
    "asac_big_actor": lambda c: {"algo": "asac", "actor": c.big_actor},
    "iql": lambda c: {"algo": "iql"},
    "iql_big_actor": lambda c: {"algo": "iql", "actor": c.big_actor},
    "iql_value": lambda c: {"algo": "iql", "iql_advantage": "value"},
    "td3bc": lambda c: {"algo": "td3bc"},
    "td3bc_big_actor": lambda c: {"algo": "td3bc", "actor": c.big_actor},
    "bc": lambda c: {"algo": "bc"},
    "bc_big_actor": lambda c: {"algo": "bc", "actor": c.big_actor},
}


@dataclass
class Config(common.Config):
    """Settings; the paper's symbol, where it has one, stands last in the comment."""

    tasks: tuple[str, ...] = ("cheetah_run_backward",)  # target tasks, whose reward relabels all trajectories
    data: str = ""  # testbed or ExORL folder, MOOD or D4RL .hdf5, minari:ID; empty: made by this run
    splits: tuple[str, ...] = ("same", "mixed", "mixed+rnd")  # mixtures; first and last are compared
    rows: tuple[str, ...] = ("baseline", "big_actor")  # rows of the hypothesis table, for each mixture
    more_rows: tuple[str, ...] = ("big_critic", "asac", "iql", "bc", "bc_big_actor")  # for the last one only
    seeds: int = 4  # seeds trained side by side in one batched network, from --seed on
    held_out: float = 0.1  # share of each source's episodes that is not trained on
    clip_actions: bool = False  # clip actions of the data to [-1, 1] instead of refusing them
    algo: Literal["bc", "td3bc", "awac", "iql", "asac"] = "awac"  # offline RL algorithm of the baseline
    actor: str = "s8x2"  # s: plain, m: modern (residual, layer norm, spectral norm); width x depth
    big_actor: str = "s128x2"  # of the row big_actor
    modern_actor: str = "m128x1"  # of the row modern_actor
    critic: str = "s64x2"  # critics, and IQL's value network
    big_critic: str = "s128x2"  # of the row big_critic
    critics: int = 2  # members of the critic ensemble, N
    pessimism: float = 0.5  # how far disagreement pulls below the mean; with two 0.5 is their minimum, p
    discount: float = 0.95  # gamma
    tau: float = 0.005  # step of the target critics towards the critics
    std: float = 0.2  # fixed standard deviation of the policy, sigma
    noise_clip: float = 0.3  # clip of the policy's noise in the critics' target
    beta: float = 0.2  # temperature of the advantage weights
    samples: int = 1  # policy actions that estimate the value in the advantage, K
    advantage_clip: float = math.inf  # upper clip of the advantage
    weights: Literal["softmax", "exp"] = "softmax"  # softmax over the batch, or CORL's exp clipped at 100
    iql_advantage: Literal["policy", "value"] = "policy"  # as the authors' code, or Q - V as IQL's paper
    expectile: float = 0.7  # of IQL's value loss, kappa
    bc_coef: float = 0.4  # TD3+BC's weight of cloning, alpha; 0.4 is lambda 2.5 of Fujimoto and Gu
    updates: int = 4000  # gradient updates
    batch: int = 256  # transitions a seed and update, B
    lr: float = 1e-3  # Adam, all networks
    decay: bool = True  # the learning rate falls linearly to 0 over the second half
    normalize: bool = True  # standardise observations with the training data's statistics
    es: int = 50  # actions that evaluation sampling picks from, M; 1: none
    episodes: int = 8  # episodes of each evaluation and seed
    repeat: int = 4  # physics steps an action is held, rewards averaged; the testbed's own is 1
    collect: bool = False  # only build the data folder --data (default: in the run folder)
    collect_with: Literal["gait", "td3"] = "gait"  # evolved gaits (cheetah), or agents trained online
    collect_episodes: int = 120  # episodes a source
    collect_steps: int = 500  # physics steps of an episode
    collect_envs: int = 4  # environments that an online agent acts in
    collect_updates: float = 0.5  # updates of an online agent for each action taken
    collect_net: str = "s256x2"  # actor and critics of the online agents
    gait_generations: int = 25  # generations of the cross-entropy method
    gait_population: int = 64  # gaits a generation
    gait_spread: tuple[float, ...] = (
        0.0,
        0.3,
        0.6,
    )  # perturbation of the collected gaits, episode by episode
    corl: str = ""  # --config bench: folder with CORL's own iql.py and awac.py, to be timed beside ours

    may_change: ClassVar[set[str]] = {"rows", "more_rows"}

    def __post_init__(self):
        super().__post_init__()
        for name in ("actor", "big_actor", "modern_actor", "critic", "big_critic", "collect_net"):
            if not re.fullmatch(r"[sm][1-9]\d*x[1-9]\d*", getattr(self, name)):
                raise ValueError(
                    f"--{name} {getattr(self, name)}: write s256x2 (plain) or m1024x1 (modern), width x depth"
                )
        for name, known in (("splits", SPLITS), ("rows", ROWS), ("more_rows", ROWS)):
            for value in getattr(self, name):
                if value not in known:
                    near = difflib.get_close_matches(value, known, 1, 0.0)[0]
                    raise ValueError(
                        f"--{name} {value}: the nearest is {near} (there are {', '.join(known)})"
                    )
        at_least_one = ("seeds", "critics", "samples", "updates", "batch", "es", "episodes", "repeat")
        for name in (*at_least_one, "collect_episodes", "collect_steps", "collect_envs", "gait_population"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more")
        if self.beta <= 0 or self.std <= 0 or self.lr <= 0:
            raise ValueError("--beta, --std and --lr must be positive")
        if self.pessimism < 0 or not 0 <= self.discount < 1 or not 0 < self.expectile < 1:
            raise ValueError("--pessimism must be 0 or more, --discount in [0, 1), --expectile in (0, 1)")
        if not 0 <= self.held_out < 1 or not self.splits or not (self.rows or self.more_rows):
            raise ValueError("--held_out must be in [0, 1); --splits and --rows must name something")


# --- networks: the leading axis holds the stacked seeds, times the members for critics ---


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1, eps=1e-12)


def times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(E, i, o), (E, o) -> (E, i), with the same bits for every number of members E."""
    return (matrices * vectors[:, None]).sum(-1)


class SpectralLinear(EnsembleLinear):
    """Linear layers over their largest singular value, one power iteration a forward pass in training mode.

    u (members, outputs) and v (members, inputs) are buffers; the gradient flows through sigma = v^T W u.
    """

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__(members, inputs, outputs)
        self.register_buffer("u", torch.zeros(members, outputs))
        self.register_buffer("v", torch.zeros(members, inputs))

    def matrices(self) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.v.copy_(unit(times(self.weight, self.u)))
                self.u.copy_(unit((self.weight * self.v[..., None]).sum(1)))
        u, v = self.u.clone(), self.v.clone()  # another pass may move them before the backward of this one
        sigma = (v * times(self.weight, u)).sum(-1)
        return self.weight / sigma[:, None, None]

    @torch.no_grad()
    def orthogonal_(self, gain: float, generators: Sequence[torch.Generator]) -> None:
        super().orthogonal_(gain, generators)
        for i, u in enumerate(self.u):
            generator = generators[i * len(generators) // len(self.u)]
            u.copy_(unit(torch.randn(u.shape, generator=generator, dtype=u.dtype)))


class EnsembleLayerNorm(nn.Module):
    """Layer norm with a scale and shift for each member."""

    def __init__(self, members: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, nn.functional.layer_norm(x, x.shape[-1:]), self.weight)


class Block(nn.Module):
    """x + W2 relu(W1 LN(x)), both matrices spectrally normalised."""

    def __init__(self, members: int, width: int):
        super().__init__()
        self.norm = EnsembleLayerNorm(members, width)
        self.inner, self.outer = (SpectralLinear(members, width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(self.norm(x)).relu_())


def network(size: str, members: int, inputs: int, outputs: int) -> nn.Sequential:
    """`size` s256x2: two hidden ReLU layers of 256; m1024x1: a ReLU layer of 1024 and one residual block."""
    kind, width, depth = re.fullmatch(r"([sm])(\d+)x(\d+)", size).groups()
    width, depth = int(width), int(depth)
    layers = [EnsembleLinear(members, inputs, width), nn.ReLU(inplace=True)]
    if kind == "m":
        layers += [Block(members, width) for _ in range(depth)]
    else:
        for _ in range(depth - 1):
            layers += [EnsembleLinear(members, width, width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, EnsembleLinear(members, width, outputs))


class Agent(nn.Module):
    """Actor, critics, target critics and value network of S seeds side by side."""

    def __init__(self, cfg: Config, seeds: Sequence[int], obs: int, actions: int):
        super().__init__()
        self.seeds, self.critics = seeds, cfg.critics
        self.actor = network(cfg.actor, len(seeds), obs, actions)
        self.critic = network(cfg.critic, len(seeds) * cfg.critics, obs + actions, 1)
        self.value = network(cfg.critic, len(seeds), obs, 1) if cfg.algo == "iql" else None
        generators = [torch.Generator().manual_seed(common.stable_hash(f"{s}/init")) for s in seeds]
        for net, gain in ((self.actor, 1.0), (self.critic, math.sqrt(2)), (self.value, math.sqrt(2))):
            for layer in net.modules() if net is not None else ():
                if isinstance(layer, EnsembleLinear):
                    layer.orthogonal_(gain, generators)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)

    def mean(self, s: Tensor) -> Tensor:
        """Mean action tanh f(s): (S, B, d) -> (S, B, m)."""
        return self.actor(s).tanh()

    def q(self, s: Tensor, a: Tensor, target: bool = False) -> Tensor:
        """(S, B, d), (S, B, m) -> (S, N, B)."""
        values = (self.target if target else self.critic)(torch.cat([s, a], -1))
        return values.view(len(s), self.critics, s.shape[1])


# --- losses ---


def squash(mean: Tensor, noise: Tensor, clip: float = math.inf) -> Tensor:
    """Clamped normal: mean + noise, noise first clipped to +-clip, kept in [-1, 1]; no gradient outside."""
    return (mean + noise.clamp(-clip, clip)).clamp(-1, 1)


def log_prob(mean: Tensor, a: Tensor, std: float) -> Tensor:
    """Log-density of the untruncated Normal(mean, std), averaged over action dimensions: (..., m) -> (...)."""
    return -((a - mean) ** 2).mean(-1) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))


def pessimistic(q: Tensor, p: float) -> Tensor:
    """P(q), eq. (1): mean over members minus p times their mean |q_i - q_j|, i != j: (S, N, B) -> (S, B)."""
    n = q.shape[1]
    if n == 1:
        return q[:, 0]
    # sum_{i<j} |q_i - q_j| = sum_k (2k - N + 1) q_(k) over the sorted members, k from 0
    rank = torch.arange(n, device=q.device, dtype=q.dtype)
    share = 1 / n - p * 2 * (2 * rank - n + 1) / (n * (n - 1))
    return (q.sort(1)[0] * share[:, None]).sum(1)


def advantage_weights(advantage: Tensor, beta: float, kind: str = "softmax") -> Tensor:
    """w of eq. (4), softmax over the batch with mean 1, or exp clipped at 100: (S, B) -> (S, B)."""
    if kind == "exp":
        return (advantage / beta).exp().clamp(max=100)
    return (advantage / beta).softmax(-1) * advantage.shape[-1]


def expectile_loss(u: Tensor, kappa: float) -> Tensor:
    """|kappa - 1{u < 0}| u^2, eq. (5), elementwise."""
    return (kappa - (u < 0).to(u.dtype)).abs() * u**2


def advantage(agent: Agent, s: Tensor, a: Tensor, mean: Tensor, noise: Tensor, cfg: Config) -> Tensor:
    """A(s, a) = mean_i Q_i(s, a) - 1/K sum_k P(Q(s, a_k)), eq. (3), by the online critics: (S, B).

    a_k is `mean` (S, B, m) plus noise (K, S, B, m).
    """
    k, b = len(noise), s.shape[1]
    sampled = torch.cat([a, *(squash(mean, n) for n in noise)], 1)  # one pass for data and policy actions
    q = agent.q(s.repeat(1, 1 + k, 1), sampled)
    policy = pessimistic(q[..., b:], cfg.pessimism).view(len(s), k, b).mean(1)
    return q[..., :b].mean(1) - policy


def critic_target(agent: Agent, batch: dict, noise: Tensor, cfg: Config) -> Tensor:
    """y of eq. (2), a' from the online actor with clipped noise (S, B, m), standard normal: (S, B)."""
    with torch.no_grad():
        a = squash(agent.mean(batch["next"]), cfg.std * noise, cfg.noise_clip)
        q = agent.q(batch["next"], a, target=True)
        return batch["reward"] + cfg.discount * batch["live"] * pessimistic(q, cfg.pessimism)


def td3bc_loss(q: Tensor, a: Tensor, action: Tensor, alpha: float) -> Tensor:
    """Eq. (6) for q = P(Q(s, a_pi)) (S, B), a = mu(s) and the data's action (S, B, m) -> (S,)."""
    return -q.mean(-1) + alpha * q.abs().mean(-1).detach() * ((a - action) ** 2).mean((-1, -2))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step on the sum over seeds; gradients of this optimizer's parameters only."""
    parameters = optimizer.param_groups[0]["params"]
    for p, g in zip(parameters, torch.autograd.grad(loss.sum(), parameters), strict=True):
        p.grad = g
    optimizer.step()


def update(agent: Agent, opt: dict, batch: dict, actor_batch: dict, noise: Tensor, cfg: Config) -> dict:
    """One iteration: critic, actor, targets, in this order. Returns per-seed losses (S,), weights (S, B)."""
    s, a, log = batch["obs"], batch["action"], {}
    if cfg.algo != "bc":
        if cfg.algo == "iql":
            with torch.no_grad():
                q = pessimistic(agent.q(s, a, target=True), cfg.pessimism)
            u = q - agent.value(s)[..., 0]
            log["value_loss"] = expectile_loss(u, cfg.expectile).mean(-1)
            descend(opt["value"], log["value_loss"])
            with torch.no_grad():  # V as it is after its step; it has no target network
                y = batch["reward"] + cfg.discount * batch["live"] * agent.value(batch["next"])[..., 0]
        else:
            y = critic_target(agent, batch, noise[0], cfg)
        q = agent.q(s, a)  # eq. (2)
        log["critic_loss"] = 0.5 * ((q - y[:, None]) ** 2).sum(1).mean(-1)
        descend(opt["critic"], log["critic_loss"])
        log["q_max"] = q.detach().abs().amax((1, 2))
    s, a = actor_batch["obs"], actor_batch["action"]
    mean = agent.mean(s)
    if cfg.algo == "td3bc":
        sample = squash(mean, cfg.std * noise[1])
        q = pessimistic(agent.q(s, sample), cfg.pessimism)
        log["actor_loss"] = td3bc_loss(q, mean, a, cfg.bc_coef)
        weight = torch.ones_like(q)
    else:
        if cfg.algo in ("bc", "asac"):
            weight = torch.ones_like(s[..., 0])
        elif cfg.algo == "iql" and cfg.iql_advantage == "value":
            weight = advantage_weights(u.detach(), cfg.beta, cfg.weights)
        else:
            with torch.no_grad():
                gain = advantage(agent, s, a, mean, cfg.std * noise[1:], cfg)
                weight = advantage_weights(gain.clamp(max=cfg.advantage_clip), cfg.beta, cfg.weights)
        log["actor_loss"] = -(weight * log_prob(mean, a, cfg.std)).mean(-1)
    descend(opt["actor"], log["actor_loss"])
    if cfg.algo != "bc":
        common.soft_update(agent.target, agent.critic, cfg.tau)
    return log | {"weight": weight}


BLOCK = 1024


class LogSampler(nn.Module):
    """Draws rows with P(i) = softmax(logits)_i, eq. (7), for each seed, in log space, on the device.

    Two levels: logits in blocks of 1024, and the log of each block's mass.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str = "cpu"):
        super().__init__()
        blocks = -(-max(sizes) // BLOCK)
        row = torch.arange(blocks * BLOCK, device=device).view(blocks, BLOCK)
        logits = [torch.where(row < n, 0.0, -1e30) for n in sizes]  # uniform at first; padding never drawn
        self.register_buffer("logits", torch.stack(logits))  # (S, blocks, BLOCK)
        self.register_buffer("mass", self.logits.double().logsumexp(-1))  # (S, blocks)

    def sample(self, uniform: Tensor) -> Tensor:
        """Stratified inverse CDF: (S, B) in [0, 1) -> rows (S, B); u_k = (k + U_k) / B."""
        count, row = uniform.shape[1], torch.arange(len(uniform), device=uniform.device)[:, None]
        u = (torch.arange(count, device=uniform.device) + uniform.double()) / count
        cdf = (self.mass - self.mass.amax(1, keepdim=True)).exp().cumsum(1)  # (S, blocks)
        place = u * cdf[:, -1:]
        last = (cdf < cdf[:, -1:]).sum(1, keepdim=True)  # the last block with mass: rounding may point beyond
        block = torch.minimum(torch.searchsorted(cdf, place, right=True), last)
        before = torch.where(block > 0, cdf.gather(1, (block - 1).clamp(min=0)), 0.0)
        inside = (place - before) / (cdf.gather(1, block) - before)
        logits = self.logits[row, block].double()  # (S, B, BLOCK)
        cdf = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)
        found = torch.searchsorted(cdf, inside[..., None] * cdf[..., -1:], right=True)[..., 0]
        return block * BLOCK + torch.minimum(found, (cdf < cdf[..., -1:]).sum(-1))

    def update(self, index: Tensor, logits: Tensor) -> None:
        """Set logits (S, n) of rows (S, n); of a row that stands twice the last in the list counts."""
        order = index.argsort(dim=1, stable=True)
        ordered = index.gather(1, order)
        last = torch.searchsorted(ordered, ordered, right=True) - 1
        self.logits.view(len(index), -1).scatter_(1, ordered, logits.gather(1, order.gather(1, last)))
        if index.shape[1] < self.mass.shape[1]:
            block = index // BLOCK
            row = torch.arange(len(index), device=index.device)[:, None]
            self.mass.scatter_(1, block, self.logits[row, block].double().logsumexp(-1))
        else:
            self.mass.copy_(self.logits.double().logsumexp(-1))


# --- tasks ---

DOMAINS = {
    "cheetah": ("run", "walk", "walk_backward", "run_backward"),
    "walker": ("stand", "walk", "run", "spin"),
    "quadruped": ("walk", "run", "stand", "jump"),
    "humanoid": ("stand", "walk", "run"),
}
CHEETAH_SPEED = {"run": 10.0, "walk": 2.0, "walk_backward": -2.0, "run_backward": -10.0}  # m/s


def split_task(name: str) -> tuple[str, str]:
    """cheetah_run_backward -> (cheetah, run_backward); UserError names the nearest task of the testbed."""
    domain, _, task = name.partition("_")
    if task not in DOMAINS.get(domain, ()):
        known = [f"{d}_{t}" for d, tasks in DOMAINS.items() for t in tasks]
        near = difflib.get_close_matches(name, known, 1, 0.0)[0]
        raise UserError(f"--tasks {name}: no such task; the nearest is {near} (there are {', '.join(known)})")
    return domain, task


def cheetah_reward(velocity: np.ndarray, task: str) -> np.ndarray:
    """clip(+-v / m, 0, 1): torso velocity (m/s) up to the task's speed m, in its direction."""
    return np.clip(velocity / CHEETAH_SPEED[task], 0, 1)


def linear(x: float, low: float, margin: float, at_margin: float = 0.0) -> float:
    """dm_control's tolerance from `low` up, falling linearly to `at_margin` at low - margin."""
    from dm_control.utils import rewards

    return rewards.tolerance(x, (low, math.inf), margin, sigmoid="linear", value_at_margin=at_margin)


def walker_spin(physics) -> float:
    mujoco.mj_subtreeVel(physics.model.ptr, physics.data.ptr)  # no sensor of walker.xml asks for it
    return linear(physics.named.data.subtree_angmom["torso"][1], 10, 10)


def quadruped_stand(physics) -> float:
    return linear(physics.torso_upright(), 1, 2)


def quadruped_jump(physics) -> float:
    height = physics.named.data.subtree_com["torso"][2]
    return quadruped_stand(physics) * linear(height, 1, 1, at_margin=0.5)


def cheetah_velocity(physics, task: str) -> float:
    return float(cheetah_reward(physics.speed(), task))


# tasks that dm_control's suite does not have, as functions of its physics
REWARDS = {("cheetah", t): functools.partial(cheetah_velocity, task=t) for t in CHEETAH_SPEED}
REWARDS |= {("walker", "spin"): walker_spin, ("quadruped", "stand"): quadruped_stand}
REWARDS |= {("quadruped", "jump"): quadruped_jump}


def reward_functions(domain: str) -> dict[str, Callable]:
    """{task: function of dm_control physics} for every task of the domain, the suite's own where it has one."""
    own = {t: f for (d, t), f in REWARDS.items() if d == domain}
    suite = {t: common.dm_control_env(domain, t).env.task.get_reward for t in DOMAINS[domain] if t not in own}
    return {t: (own | suite)[t] for t in DOMAINS[domain]}


class TestbedEnv(common.DmControl):
    """A task of the testbed; info["rewards"] (tasks,) has the step's reward in every task of its domain."""

    def __init__(self, domain: str, task: str, repeat: int = 1):
        base = "walk" if domain in ("walker", "quadruped", "humanoid") else "run"
        super().__init__(common.dm_control_env(domain, base).env)
        self.functions, self.repeat = reward_functions(domain), repeat
        self.column = list(self.functions).index(task)

    def step(self, action):
        total, count = np.zeros(len(self.functions)), 0
        for _ in range(self.repeat):
            obs, _, terminated, truncated, info = super().step(action)
            total += [f(self.env.physics) for f in self.functions.values()]
            count += 1
            if terminated or truncated:
                break
        return obs, float(total[self.column]), terminated, truncated, info | {"rewards": total / count}


def relabel(physics: np.ndarray, action: np.ndarray, domain: str, task: str) -> np.ndarray:
    """Reward of `task` at each physics state (n, p) and the action (n, m) that led there: (n,).

    Velocity sensors are computed from the state; the humanoid's rewards depend on the action, too.
    """
    env, reward = common.dm_control_env(domain, DOMAINS[domain][0]), reward_functions(domain)[task]
    out = np.empty(len(physics), np.float32)
    for i, state in enumerate(physics):
        with env.env.physics.reset_context():
            env.env.physics.set_state(state)
        env.env.physics.set_control(env.control(action[i]))
        out[i] = reward(env.env.physics)
    return out


class Cheetah(gymnasium.vector.VectorEnv):
    """dm_control's cheetah, many at a time without its overhead: 1000 physics steps of 10 ms an episode.

    Observations are qpos[1:] and qvel. options={"physics": (n, 18)} to `reset` starts there instead.
    """

    def __init__(self, num_envs: int, task: str = "run", repeat: int = 1):
        self.model = common.dm_control_env("cheetah", "run").env.physics.model.ptr
        self.datas = [mujoco.MjData(self.model) for _ in range(num_envs)]
        self.num_envs, self.task, self.repeat = num_envs, task, repeat
        self.sensor = self.model.sensor("torso_subtreelinvel").adr[0]
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (17,), np.float32)
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (6,), np.float32)

    def physics(self) -> np.ndarray:
        return np.stack([np.concatenate([d.qpos, d.qvel]) for d in self.datas])

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        rng, limited, self.clock = np.random.RandomState(seed), self.model.jnt_limited == 1, 0
        low, high = self.model.jnt_range[limited].T
        for i, d in enumerate(self.datas):
            mujoco.mj_resetData(self.model, d)
            if options and "physics" in options:
                d.qpos[:], d.qvel[:] = np.split(options["physics"][i], 2)
                mujoco.mj_forward(self.model, d)
            else:  # as dm_control, to the bit: random joint angles, then 200 steps to settle
                mujoco.mj_forward(self.model, d)
                d.qpos[limited] = rng.uniform(low, high)
                self.advance(d, 200)
        return self.physics()[:, 1:].astype(np.float32), {}

    def advance(self, d: mujoco.MjData, steps: int) -> None:
        for _ in range(steps):  # in this order the sensors belong to the state after the step
            mujoco.mj_step2(self.model, d)
            mujoco.mj_step1(self.model, d)

    def step(self, actions: np.ndarray):
        total = np.zeros(self.num_envs)
        for _ in range(min(self.repeat, 1000 - self.clock)):
            for d, action in zip(self.datas, actions, strict=True):
                d.ctrl[:] = action
                self.advance(d, 1)
            velocity = np.array([d.sensordata[self.sensor] for d in self.datas])
            total += cheetah_reward(velocity, self.task)
            self.clock += 1
        over = np.full(self.num_envs, self.clock == 1000)
        return self.physics()[:, 1:].astype(np.float32), total, np.zeros_like(over), over, {}

    def open_loop(self, start: np.ndarray, controls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Physics (E, T + 1, 18) and velocities (E, T) that follow from start (E, 18), controls (E, T, 6)."""
        controls = np.concatenate([controls, np.zeros_like(controls[:, :1])], 1)
        full = np.concatenate([np.zeros((len(start), 1)), start], 1)  # time, qpos, qvel
        threads = torch.get_num_threads()
        datas = [mujoco.MjData(self.model) for _ in range(threads)]
        with mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0) as pool:
            states, sensors = pool.rollout(self.model, datas, full, controls)
        # mj_step leaves the sensors of the state before the step: hence one step more, and row t + 1
        return np.concatenate([full[:, None, 1:], states[:, :-1, 1:]], 1), sensors[:, 1:, self.sensor]


def make_envs(domain: str, task: str, count: int, repeat: int) -> gymnasium.vector.VectorEnv:
    """`count` environments of a testbed task, stepped together."""
    if domain == "cheetah":
        return Cheetah(count, task, repeat)
    return common.vector_env([functools.partial(TestbedEnv, domain, task, repeat)] * count)


# --- data sets ---


@dataclass
class Transitions:
    """n transitions; source and episode say where each is from, physics is the state after it, if known."""

    obs: Tensor  # (n, d)
    action: Tensor  # (n, m) in [-1, 1]
    reward: Tensor  # (n,)
    next: Tensor  # (n, d)
    live: Tensor  # (n,) 1 - terminated
    source: Tensor  # (n,) index into `sources`
    episode: Tensor  # (n,)
    sources: tuple[str, ...] = ("data",)
    physics: np.ndarray | None = None  # (n, p) float64

    def __len__(self) -> int:
        return len(self.obs)

    def rows(self, keep: Tensor) -> Transitions:
        """The transitions where `keep` (n,) is true."""
        tensors = {f.name: getattr(self, f.name)[keep] for f in dataclasses.fields(self)[:7]}
        physics = None if self.physics is None else self.physics[keep.numpy()]
        return replace(self, **tensors, physics=physics)

    def select(self, sources: Sequence[str]) -> Transitions:
        """The transitions of these sources, in their order here."""
        return self.rows(torch.isin(self.source, torch.tensor([self.sources.index(s) for s in sources])))

    def held_out(self, share: float) -> tuple[Transitions, Transitions]:
        """Training rows, and the last `share` of each source's episodes."""
        test = torch.zeros(len(self), dtype=torch.bool)
        for k in range(len(self.sources)):
            episodes = self.episode[self.source == k].unique()
            test |= (self.source == k) & torch.isin(
                self.episode, episodes[len(episodes) - round(share * len(episodes)) :]
            )
        return self.rows(~test), self.rows(test)


def concatenate(parts: Sequence[Transitions], sources: Sequence[str]) -> Transitions:
    """One data set of several with a single source each; episodes are numbered on."""
    first = np.cumsum([0, *(int(p.episode.max()) + 1 for p in parts)])
    parts = [
        replace(p, source=torch.full_like(p.source, k), episode=p.episode + int(first[k]))
        for k, p in enumerate(parts)
    ]
    tensors = {
        f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Transitions)[:7]
    }
    physics = None if any(p.physics is None for p in parts) else np.concatenate([p.physics for p in parts])
    return Transitions(**tensors, sources=tuple(sources), physics=physics)


def from_episodes(observation, action, reward, terminated, physics=None) -> Transitions:
    """Episodes (E, T + 1, ...) whose row t of action, reward and terminated belongs to obs[t-1] -> obs[t]."""
    count, steps = observation.shape[0], observation.shape[1] - 1
    flat = lambda x: torch.as_tensor(np.ascontiguousarray(x, np.float32)).flatten(0, 1)  # noqa: E731
    scalar = lambda x: flat(np.reshape(x, (count, steps + 1))[:, 1:])  # noqa: E731
    episode = torch.arange(count).repeat_interleave(steps)
    return Transitions(
        obs=flat(observation[:, :-1]),
        action=flat(action[:, 1:]),
        reward=scalar(reward),
        next=flat(observation[:, 1:]),
        live=1 - scalar(terminated),
        source=torch.zeros(count * steps, dtype=torch.long),
        episode=episode,
        physics=None if physics is None else np.asarray(physics)[:, 1:].reshape(count * steps, -1),
    )


def open_hdf5(path: Path):
    try:
        import h5py
    except ImportError:
        raise UserError(f'{path} needs h5py: pip install -e ".[data]"') from None
    try:
        return h5py.File(path, "r")
    except OSError as e:
        raise UserError(f"{path}: no HDF5 file, or a broken one ({str(e).splitlines()[0][:80]})") from None


def fields(path: Path, found: dict, needed: Sequence[str]) -> list[np.ndarray]:
    """The needed arrays, of one length; UserError lists what is there or names the array that is off."""
    if missing := [k for k in needed if k not in found]:
        raise UserError(f"{path}: no field {', '.join(missing)}; it has {', '.join(sorted(found))}")
    arrays = [np.asarray(found[k][()]) for k in needed]
    axes = 2 if arrays[0].ndim > 2 else 1
    for name, x in zip(needed, arrays, strict=True):
        if x.shape[:axes] != arrays[0].shape[:axes]:
            raise UserError(f"{path}: {name} has shape {x.shape}, {needed[0]} has {arrays[0].shape}")
    return arrays


EPISODE_KEYS = ("observation", "action", "reward", "terminated")


def load_hdf5(path: Path) -> Transitions:
    """A MOOD file (episodes, T + 1, ...) or a D4RL file (steps, ...), told apart by their keys."""
    with open_hdf5(path) as file:
        if "observations" in file:
            return from_d4rl(path, {k: file[k] for k in file if k != "infos" and k != "metadata"})
        physics = file["physics"][()] if "physics" in file else None
        return from_episodes(*fields(path, file, EPISODE_KEYS), physics)


def from_d4rl(path: Path, found: dict) -> Transitions:
    """d4rl.qlearning_dataset: rows that end by time-out are dropped, as is the file's last; terminals count.

    Without `timeouts` an episode ends at 1000 steps. `next_observations` are used where the file has them.
    """
    obs, action, reward, terminal = fields(path, found, ("observations", "actions", "rewards", "terminals"))
    n, terminal = len(obs), terminal.reshape(-1).astype(bool)
    if "timeouts" in found:
        timeout = fields(path, found, ("observations", "timeouts"))[1].reshape(-1).astype(bool)
    else:
        timeout, since = np.zeros(n, bool), 0
        for i in range(n):
            timeout[i] = since == 999
            since = 0 if terminal[i] or timeout[i] else since + 1
    follows = np.concatenate([obs[1:], obs[-1:]])
    if "next_observations" in found:
        follows = fields(path, found, ("observations", "next_observations"))[1]
    keep = ~timeout
    keep[-1] = False
    episode = np.concatenate([[0], np.cumsum(terminal | timeout)[:-1]])[keep]
    tensor = lambda x: torch.as_tensor(x[keep].astype(np.float32))  # noqa: E731
    reward = reward.reshape(-1) - ("antmaze" in path.name)  # 0 and 1 become -1 and 0
    live = tensor(1.0 - terminal)
    source = torch.zeros(int(keep.sum()), dtype=torch.long)
    return Transitions(
        tensor(obs), tensor(action), tensor(reward), tensor(follows), live, source, torch.as_tensor(episode)
    )


def load_minari(name: str) -> Transitions:
    """A Minari data set that is on this machine or can be downloaded; dict observations: goal appended."""
    try:
        import minari
    except ImportError:
        raise UserError('minari:... needs minari: pip install -e ".[data]"') from None
    try:
        data = minari.load_dataset(name, download=True)
    except Exception as e:  # whatever the hub's client raises
        raise UserError(
            f"minari:{name}: neither here nor downloadable ({type(e).__name__}: {str(e)[:100]})"
        ) from None
    parts = []
    for k, episode in enumerate(data.iterate_episodes()):
        obs = episode.observations
        if isinstance(obs, dict):
            obs = np.concatenate([obs["observation"], obs["desired_goal"]], -1)
        shifted = [
            np.concatenate([x[:1], x]) for x in (episode.actions, episode.rewards, episode.terminations)
        ]
        part = from_episodes(*(np.asarray(x)[None] for x in (obs, *shifted)))
        parts.append(replace(part, episode=part.episode + k))
    tensors = {
        f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Transitions)[:7]
    }
    return Transitions(**tensors)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: no npz file, or a broken one ({str(e).splitlines()[0][:80]})") from None


def load_exorl(folder: Path, domain: str, task: str) -> Transitions:
    """ExORL / url_benchmark episodes TIMESTAMP_INDEX_LENGTH.npz, relabelled with the task from their physics.

    A source is the folder that holds the files, or the one above `buffer`.
    """
    parts, sources = {}, sorted({f.parent for f in folder.rglob("*.npz")})
    for parent in sources:
        episodes = []
        for path in sorted(parent.glob("*.npz")):
            keys = ("observation", "action", "discount", "physics")
            obs, action, discount, physics = fields(path, load_npz(path), keys)
            reward = np.concatenate([[0], relabel(physics[1:], action[1:], domain, task)])
            episodes.append(from_episodes(*(x[None] for x in (obs, action, reward, discount == 0, physics))))
        name = parent.parent.name if parent.name == "buffer" else parent.name
        parts[name] = concatenate(episodes, [name] * len(episodes))
        parts[name].source.zero_()
    return concatenate(list(parts.values()), list(parts))


def load_testbed(folder: Path, task: str, repeat: int) -> Transitions:
    """The folder that --collect builds for a domain, with the rewards of `task`; checksums are verified."""
    parts, sources = [], []
    for index in sorted(folder.glob("*/index.json")):
        if (found := json.loads(index.read_text())["settings"]["repeat"]) != repeat:
            raise UserError(f"{index}: collected with --repeat {found}, this run has {repeat}")
        needed = ("observation", "action", f"reward_{task}", "terminated", "physics")
        pieces = [from_episodes(*fields(p, load_npz(p), needed)) for p in shards(index)]
        parts.append(concatenate(pieces, [index.parent.name] * len(pieces)))
        parts[-1].source.zero_()
        sources.append(index.parent.name)
    return concatenate(parts, sources)


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_data(data: str, task: str, repeat: int = 1) -> Transitions:
    """--data: a testbed folder, a folder of ExORL episodes, a MOOD or D4RL .hdf5 file, or minari:ID."""
    if data.startswith("minari:"):
        return load_minari(data.removeprefix("minari:"))
    path = Path(data).expanduser()
    if path.is_file():
        return load_hdf5(path)
    domain, name = split_task(task)
    for folder in (path / domain, path):
        if any(folder.glob("*/index.json")):
            return load_testbed(folder, name, repeat)
        if any(folder.rglob("*.npz")):
            return load_exorl(folder, domain, name)
    urls = "rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/hopper_medium-v2.hdf5"
    raise UserError(
        f"--data {data}: no data for {domain} there; build it with --collect --data {data}, or give a D4RL file ({urls})"
    )


def validate(data: Transitions, name: str, clip_actions: bool) -> list[str]:
    """Stop at what cannot be trained on, return warnings for what can. Checks are done on tensors."""
    notes = []
    for field in ("obs", "action", "reward", "next"):
        x = getattr(data, field).reshape(len(data), -1)
        if not x.isfinite().all():
            row = int((~x.isfinite().all(1)).nonzero()[0])
            raise UserError(f"{name}: {field} of transition {row} is not finite")
    largest = float(data.action.abs().max())
    if largest > 1 and not clip_actions:
        raise UserError(f"{name}: actions reach {largest:.4g}, outside [-1, 1]; --clip_actions clips them")
    data.action.clamp_(-1, 1)
    if float(data.reward.min()) == float(data.reward.max()):
        notes.append("the reward is constant: is the target task in the data?")
    if not data.live.any():
        raise UserError(f"{name}: every transition is terminal")
    same = (
        (data.episode[1:] == data.episode[:-1]) & (data.source[1:] == data.source[:-1]) & (data.live[:-1] > 0)
    )
    jumps = int((same & ((data.next[:-1] - data.obs[1:]).abs().amax(1) > 1e-4)).sum())
    if jumps:
        notes.append(f"in {jumps} places the next observation is not where the episode goes on")
    return notes


def split_sources(split: str, task: str, sources: Sequence[str]) -> list[str]:
    """Sources of a mixture: same (objective), cross, mixed (their union), mixed+rnd; all: whatever is there."""
    others = [s for s in sources if s not in (task, "rnd")]
    chosen = {"same": [task], "cross": others, "mixed": [task, *others], "mixed+rnd": [task, *others, "rnd"]}
    chosen["all"] = list(sources)
    if absent := [s for s in chosen[split] if s not in sources]:
        raise UserError(f"--splits {split}: no source {', '.join(absent)} (there are {', '.join(sources)})")
    return chosen[split]


# --- training ---

CHUNK = 32  # updates whose random numbers are drawn together


class Learner(nn.Module):
    """S seeds side by side: their agent, optimizers, data on the device and random numbers.

    Seed i draws from a generator of its own, seeded anew by (seed, chunk of updates): it gets the same numbers
    alone, in company and after a resume. `data` is one data set for all seeds, or a list with one for each.
    """

    def __init__(self, cfg: Config, seeds: Sequence[int], data: Sequence[Transitions], device="cpu"):
        super().__init__()
        self.cfg, self.seeds, self.device, self.chunk = cfg, list(seeds), torch.device(device), -1
        dtype, (width, actions) = data[0].obs.dtype, (data[0].obs.shape[1], data[0].action.shape[1])
        self.agent = Agent(cfg, seeds, width, actions).to(device, dtype)
        self.optimizers = {}
        for name, net in self.agent.named_children():
            if name != "target" and not (cfg.algo == "bc" and name == "critic"):
                self.optimizers[name] = adam(net.parameters(), cfg.lr, self.device)
        mean = (
            torch.stack([d.obs.mean(0, keepdim=True) for d in data])
            if cfg.normalize
            else torch.zeros(1, 1, width)
        )
        std = (
            torch.stack([d.obs.std(0, keepdim=True) + 1e-3 for d in data])
            if cfg.normalize
            else torch.ones(1, 1, width)
        )
        for name, x in (("obs_mean", mean), ("obs_std", std)):
            self.register_buffer(name, x.to(device, dtype).expand(len(seeds), 1, width).clone())
        # a transition is one row of a table, so that a batch is one gather; data of further seeds comes after
        self.parts = [width, actions, width, 1, 1]
        scaled = [[(x - m) / s for x in (d.obs, d.next)] for d, m, s in zip(data, mean, std, strict=False)]
        tables = [
            torch.cat([o, d.action, n, d.reward[:, None], d.live[:, None]], 1)
            for d, (o, n) in zip(data, scaled, strict=True)
        ]
        self.table, self.source = torch.cat(tables).to(device), torch.cat([d.source for d in data]).to(device)
        self.sizes = [len(d) for d in data] * (len(seeds) // len(data))
        first = np.cumsum([0, *self.sizes[:-1]]) if len(data) > 1 else np.zeros(len(seeds))
        self.first = torch.as_tensor(first).long().to(device)[:, None]
        self.limit = 10 * max(float(d.reward.abs().max()) for d in data) / (1 - cfg.discount)
        self.register_buffer(
            "source_weight", torch.zeros(len(seeds), len(data[0].sources), device=device, dtype=dtype)
        )
        self.register_buffer("diverged", torch.full((len(seeds),), -1))
        self.sampler = LogSampler(self.sizes, device) if cfg.algo == "asac" else None
        k = cfg.samples
        draws = {"bc": 0, "td3bc": 2, "asac": 1 + 2 * k}.get(cfg.algo, 1 + k)
        self.index = torch.zeros(len(seeds), cfg.batch, dtype=torch.long, device=device)
        self.uniform = torch.zeros(len(seeds), cfg.batch, device=device)
        self.noise = torch.zeros(draws, len(seeds), cfg.batch, actions, device=device, dtype=dtype)
        if cfg.compile:
            for net in self.agent.children():
                net.compile()
        self.iterate = (
            graphed(self.iteration) if cfg.compile and self.device.type == "cuda" else self.iteration
        )

    def draw(self, step: int) -> None:
        """Fill index (S, B), uniform (S, B) and noise (draws, S, B, m) for an update; no sync with a GPU."""
        chunk, place = divmod(step, CHUNK)
        if chunk != self.chunk:
            self.chunk, drawn = chunk, []
            for seed, size in zip(self.seeds, self.sizes, strict=True):
                g = torch.Generator(self.device).manual_seed(common.stable_hash(f"{seed}/{chunk}"))
                index = torch.randint(size, (CHUNK, self.cfg.batch), generator=g, device=self.device)
                uniform = torch.rand(CHUNK, self.cfg.batch, generator=g, device=self.device)
                shape = (CHUNK, len(self.noise), *self.noise.shape[2:])
                noise = torch.randn(shape, generator=g, device=self.device, dtype=self.noise.dtype)
                drawn.append((index, uniform, noise))
            self.drawn = [torch.stack(x, 1) for x in zip(*drawn, strict=True)]
        index, uniform, noise = self.drawn
        self.index.copy_(index[place])
        self.uniform.copy_(uniform[place])
        self.noise.copy_(noise[place].transpose(0, 1))

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """Rows (S, B) of each seed's data as fields (S, B, ...)."""
        obs, action, following, reward, live = self.table[index + self.first].split(self.parts, -1)
        return {
            "obs": obs,
            "action": action,
            "next": following,
            "reward": reward[..., 0],
            "live": live[..., 0],
        }

    def iteration(self) -> dict[str, Tensor]:
        """One update of all seeds, for ASAC with its two batches and the logits that they get."""
        batch, index = self.batch(self.index), self.index
        actor_batch = batch
        if self.sampler is not None:
            index = self.sampler.sample(self.uniform)
            actor_batch = self.batch(index)
        out = update(self.agent, self.optimizers, batch, actor_batch, self.noise, self.cfg)
        self.source_weight.scatter_add_(1, self.source[index + self.first], out.pop("weight"))
        if self.sampler is not None:
            rows = torch.cat([self.index, index], 1)
            both = self.batch(rows)
            noise = self.cfg.std * torch.cat(
                [self.noise[1 : 1 + self.cfg.samples], self.noise[1 + self.cfg.samples :]], 2
            )
            with torch.no_grad():
                mean = self.agent.mean(both["obs"])
                gain = advantage(self.agent, both["obs"], both["action"], mean, noise, self.cfg)
            self.sampler.update(rows, gain.clamp(max=self.cfg.advantage_clip) / self.cfg.beta)
        return out

    def step(self, step: int) -> dict[str, Tensor]:
        """Update number `step`; returns losses and the largest |Q|, each (S,), still on the device."""
        rate = self.cfg.lr * (min(1.0, 2 - 2 * step / self.cfg.updates) if self.cfg.decay else 1.0)
        for optimizer in self.optimizers.values():
            set_rate(optimizer, rate)
        self.draw(step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"):
            return self.iterate()

    @torch.no_grad()
    def retire(self, seed: int, step: int) -> None:
        """Zero a diverged seed, so that the others go on and the checkpoint stays finite."""
        self.diverged[seed] = step
        states = [x for o in self.optimizers.values() for s in o.state.values() for x in s.values()]
        for x in (*self.agent.parameters(), *self.agent.buffers(), *states):
            if x.ndim > 1:
                x.view(len(self.seeds), -1)[seed] = 0

    def state(self) -> dict:
        """What a checkpoint needs."""
        return {"learner": self} | {f"{name}_optimizer": o for name, o in self.optimizers.items()}


def adam(parameters, rate: float, device: torch.device) -> torch.optim.Adam:
    """Fused Adam, on a GPU fit for a CUDA graph. In float64, which tests use, unfused: its bits are the same
    for a seed alone and in company, those of the fused loop's last few elements are not."""
    parameters, graph = list(parameters), device.type == "cuda"
    fused = parameters[0].dtype != torch.float64
    return torch.optim.Adam(parameters, torch.tensor(rate) if graph else rate, fused=fused, capturable=graph)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def graphed(function: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """Replay `function`, which reads and writes tensors at fixed places, as one CUDA graph from its 4th call."""
    calls, stream, graph, out = 0, torch.cuda.Stream(), torch.cuda.CUDAGraph(), {}

    def call() -> dict[str, Tensor]:
        nonlocal calls, out
        calls += 1
        if calls < 4:  # lazily made state (Adam's moments, workspaces) must be there before the capture
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = function()
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if calls == 4:
            with torch.cuda.graph(graph):
                out = function()
        graph.replay()
        return out

    return call


# --- evaluation ---


@torch.no_grad()
def act(agent: Agent, s: Tensor, count: int, noise: Tensor | None, cfg: Config) -> Tensor:
    """Mean action for count = 1, else evaluation sampling, eq. (8): of `count` samples the best by P(Q).

    s (S, B, d); noise (S, B, count, m), standard normal, unclipped. Returns (S, B, m).
    """
    mean = agent.mean(s)
    if count == 1:
        return mean
    samples = squash(mean[:, :, None], cfg.std * noise)
    wide = s.repeat_interleave(count, 1)
    q = pessimistic(agent.q(wide, samples.flatten(1, 2)), cfg.pessimism).view(*s.shape[:2], count)
    return samples.gather(2, q.argmax(-1)[..., None, None].expand(-1, -1, 1, samples.shape[-1]))[:, :, 0]


def evaluate(learner: Learner, envs, count: int, seed: int, options: dict | None = None) -> np.ndarray:
    """Returns (S, episodes) of all seeds' policies, in lock step over the environments of `envs`."""
    agent, cfg, s = learner.agent, learner.cfg, len(learner.seeds)
    generator = torch.Generator(learner.device).manual_seed(seed)
    episodes, actions = envs.num_envs // s, envs.single_action_space.shape[0]
    kind = {"device": learner.device, "dtype": learner.obs_mean.dtype}

    def policy(obs: np.ndarray) -> np.ndarray:
        x = torch.as_tensor(obs).to(**kind).view(s, episodes, -1)
        noise = torch.randn(s, episodes, count, actions, generator=generator, **kind) if count > 1 else None
        a = act(agent, (x - learner.obs_mean) / learner.obs_std, count, noise, cfg)
        return a.reshape(s * episodes, actions).float().cpu().numpy()

    agent.eval()
    returns = common.evaluate_policy(envs, policy, seed, options).reshape(s, episodes)
    agent.train()
    return returns


@torch.no_grad()
def imitation_error(learner: Learner, data: Sequence[Transitions]) -> list[float]:
    """Mean squared error to the actions of `data` (one set a seed, or one for all): (S,)."""
    learner.agent.eval()
    errors = []
    for i in range(len(learner.seeds)):
        d = data[i % len(data)]
        s = ((d.obs.to(learner.device) - learner.obs_mean[i]) / learner.obs_std[i]).expand(
            len(learner.seeds), -1, -1
        )
        errors.append(float(((learner.agent.mean(s)[i] - d.action.to(learner.device)) ** 2).mean()))
    learner.agent.train()
    return errors


# --- collecting a testbed folder ---
#
# FOLDER/<domain>/<source>/index.json   {"format": 1, "settings": {...}, "files": {shard: sha256}}, written last
# FOLDER/<domain>/<source>/00000.npz    episodes (E, T + 1, ...): observation float32, action, terminated,
#                                       physics float64, and reward_<task> for every task of the domain; row t
#                                       of action, reward and terminated belongs to t - 1 -> t, row 0 is zero


def gait(x: np.ndarray, steps: int, repeat: int) -> np.ndarray:
    """Open-loop gait (E, 19) -> actions (E, steps, 6): clip(c + A sin(2 pi f t + phi)), t in seconds."""
    f, c, amplitude, phase = 2 + 1.5 * x[:, :1], 0.4 * x[:, 1:7], 1.2 * abs(x[:, 7:13]), np.pi * x[:, 13:]
    angle = 2 * np.pi * f[:, None] * np.arange(steps)[None, :, None] * 0.01 * repeat + phase[:, None]
    return np.clip(c[:, None] + amplitude[:, None] * np.sin(angle), -1, 1)


def evolve_gait(env: Cheetah, task: str, starts: np.ndarray, rng, cfg: Config) -> np.ndarray:
    """Cross-entropy method over the gait's 19 parameters for the return of 400 physics steps."""
    mean, std = np.zeros(19), np.ones(19)
    for _ in range(cfg.gait_generations):
        x = mean + std * rng.standard_normal((cfg.gait_population, 19))
        start = starts[rng.integers(len(starts), size=len(x))]
        controls = gait(x, 400 // cfg.repeat, cfg.repeat).repeat(cfg.repeat, 1)
        score = cheetah_reward(env.open_loop(start, controls)[1], task).sum(1)
        elite = x[np.argsort(-score)[: max(2, len(x) // 6)]]
        mean, std = elite.mean(0), 0.9 * elite.std(0) + 0.09 * std
    return mean


def gait_episodes(env: Cheetah, mean: np.ndarray | None, starts: np.ndarray, rng, cfg: Config) -> dict:
    """Episodes of a gait with perturbed parameters and noisy actions, or of coloured noise for mean None."""
    count, steps = cfg.collect_episodes, cfg.collect_steps // cfg.repeat
    if mean is None:
        noise, actions = rng.standard_normal((count, steps, 6)), np.zeros((count, steps, 6))
        for t in range(steps):
            actions[:, t] = 0.9 * actions[:, t - 1] + 0.45 * noise[:, t]
    else:
        spread = np.repeat([0.3, 0.5, 0.5, 0.3], [1, 6, 6, 6])  # of f, c, A, phi
        level = np.array(cfg.gait_spread)[
            np.arange(count) % len(cfg.gait_spread)
        ]  # good and bad episodes, in turn
        x = mean + level[:, None] * spread * rng.standard_normal((count, 19))
        actions = gait(x, steps, cfg.repeat) + 0.1 * rng.standard_normal((count, steps, 6))
    actions = np.clip(actions, -1, 1)
    start = starts[rng.integers(len(starts), size=count)]
    physics, velocity = env.open_loop(start, actions.repeat(cfg.repeat, 1))
    physics = physics[:, :: cfg.repeat]
    shifted = lambda x: np.concatenate([np.zeros_like(x[:, :1]), x], 1).astype(np.float32)  # noqa: E731
    rewards = {t: cheetah_reward(velocity, t).reshape(count, steps, -1).mean(-1) for t in CHEETAH_SPEED}
    shard = {
        "observation": physics[..., 1:].astype(np.float32),
        "action": shifted(actions),
        "physics": physics,
    }
    shard |= {f"reward_{t}": shifted(r) for t, r in rewards.items()}
    return shard | {"terminated": np.zeros((count, steps + 1), bool)}


def collect_gait(source: str, run: Run) -> dict:
    """One source of the cheetah's data for each data folder; its gait is evolved once for all of them."""
    cfg, env, task = run.cfg, Cheetah(64), source.split("/")[1]
    env.reset(seed=cfg.seed)
    starts, rng = env.physics(), np.random.default_rng(run.stream("gait"))
    mean = None if task == "rnd" else evolve_gait(env, task, starts, rng, cfg)
    for folder, seed in data_folders(cfg, run).items():
        draws = np.random.default_rng(common.stable_hash(f"{seed}/{source}"))
        shard = gait_episodes(env, mean, starts, draws, cfg)
        write_shard(folder / source / "00000.npz", shard)
        write_index(folder / source, 1, cfg)
    return {"transitions": shard["action"].shape[0] * (shard["action"].shape[1] - 1)}


class Novelty(nn.Module):
    """Random network distillation: how badly a trained network predicts a random one at the next state."""

    def __init__(self, obs: int, device: torch.device, rate: float):
        super().__init__()
        self.goal, self.guess = (network("s256x2", 1, obs, 64) for _ in range(2))
        for net in (self.goal, self.guess):
            for layer in net.modules():
                if isinstance(layer, EnsembleLinear):
                    layer.orthogonal_(math.sqrt(2), [torch.default_generator])
        self.register_buffer("mean", torch.zeros(obs))
        self.register_buffer("square", torch.ones(obs))
        self.register_buffer("scale", torch.ones(()))
        self.to(device)
        self.optimizer = adam(self.guess.parameters(), rate, device)

    def forward(self, following: Tensor) -> Tensor:
        """Train on next states (1, B, d) and return their novelty (1, B), scaled to a mean near 1."""
        self.mean.lerp_(following.mean((0, 1)), 0.01)
        self.square.lerp_((following**2).mean((0, 1)), 0.01)
        x = ((following - self.mean) / (self.square - self.mean**2).clamp(min=1e-6).sqrt()).clamp(-5, 5)
        with torch.no_grad():
            goal = self.goal(x)
        error = ((self.guess(x) - goal) ** 2).mean(-1)
        descend(self.optimizer, error.mean(-1))
        self.scale.lerp_(error.detach().mean(), 0.01)
        return error.detach() / self.scale


def collect_td3(source: str, run: Run) -> dict:
    """All transitions that a TD3 agent sees while it learns its task online, or RND's novelty for rnd.

    A round is one episode in each of cfg.collect_envs environments and one shard; the first is uniform noise.
    """
    domain, task = source.split("/")
    cfg = replace(
        run.cfg, algo="td3bc", bc_coef=0.0, actor=run.cfg.collect_net, critic=run.cfg.collect_net, decay=False
    )
    first = DOMAINS[domain][0] if task == "rnd" else task
    makers = [functools.partial(TestbedEnv, domain, first, cfg.repeat)] * cfg.collect_envs
    envs = common.vector_env(makers, cfg.collect_envs > 1, autoreset=False)
    width, actions = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent, column = Agent(cfg, [cfg.seed], width, actions).to(run.device), list(DOMAINS[domain]).index(first)
    optimizers = {k: adam(getattr(agent, k).parameters(), cfg.lr, run.device) for k in ("actor", "critic")}
    novelty = Novelty(width, run.device, cfg.lr) if task == "rnd" else None
    replay = Replay(cfg.collect_episodes * cfg.collect_steps // cfg.repeat, run.device)
    state = {"agent": agent, "replay": replay} | {f"{k}_optimizer": o for k, o in optimizers.items()}
    if novelty:
        state |= {"novelty": novelty, "novelty_optimizer": novelty.optimizer}
    (folder,) = data_folders(cfg, run)
    draw, debt = run.generator("online"), 0.0
    steps, rounds = cfg.collect_steps // cfg.repeat, -(-cfg.collect_episodes // cfg.collect_envs)
    normal = lambda *shape: torch.randn(shape, generator=draw).to(run.device)  # noqa: E731
    for k in run.steps(rounds, save_every=max(1, rounds // 20), **state):
        obs, info = envs.reset(seed=common.stable_hash(f"{run.stream('reset')}/{k}") % 2**31)
        rows = [
            (
                obs,
                np.zeros((cfg.collect_envs, actions)),
                np.zeros((cfg.collect_envs, len(DOMAINS[domain]))),
                info["physics"],
            )
        ]
        for _ in range(steps):
            if k == 0:
                action = (torch.rand(cfg.collect_envs, actions, generator=draw) * 2 - 1).numpy()
            else:
                with torch.no_grad():
                    mean = agent.mean(torch.as_tensor(obs, device=run.device)[None])[0]
                action = squash(mean, cfg.std * normal(*mean.shape)).cpu().numpy()
            following, _, terminated, _, info = envs.step(action)
            rows.append((following, action, info["rewards"], info["physics"]))
            reward = np.float32(info["rewards"][:, column])
            replay.add(
                obs=obs,
                action=np.float32(action),
                reward=reward,
                next=following,
                live=np.float32(~terminated),
            )
            obs, debt = following, debt + cfg.collect_envs * cfg.collect_updates
            while k and debt >= 1:
                batch, debt = {n: x[None] for n, x in replay.sample(cfg.batch, draw).items()}, debt - 1
                if novelty:
                    batch["reward"] = novelty(batch["next"])
                numbers = update(agent, optimizers, batch, batch, normal(2, 1, cfg.batch, actions), cfg)
            debt = debt if k else 0.0
        columns = [np.stack(x, 1) for x in zip(*rows, strict=True)]
        shard = dict(
            zip(
                ("observation", "action", "physics"),
                (columns[0], np.float32(columns[1]), columns[3]),
                strict=True,
            )
        )
        shard |= {f"reward_{t}": np.float32(columns[2][..., i]) for i, t in enumerate(DOMAINS[domain])}
        shard["terminated"] = np.zeros(columns[0].shape[:2], bool)  # these tasks end by time only
        write_shard(folder / source / f"{k:05d}.npz", shard)
        score = columns[2][..., column].sum(1).mean() * cfg.repeat
        run.log(
            k, episode_return=float(score), **({"critic_loss": numbers["critic_loss"].mean()} if k else {})
        )
    envs.close()
    write_index(folder / source, rounds, cfg)
    return {"transitions": rounds * cfg.collect_envs * steps, "last_return": float(score)}


def write_shard(path: Path, shard: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_atomic(path, lambda file: np.savez(file, **shard))


def collect_settings(cfg: Config) -> dict:
    """What decides the contents of a data folder."""
    names = [f.name for f in dataclasses.fields(cfg) if f.name.startswith(("collect_", "gait_"))]
    online = ("lr", "batch", "discount", "tau", "std", "noise_clip") if cfg.collect_with == "td3" else ()
    settings = {name: getattr(cfg, name) for name in ("seed", "repeat", *names, *online)}
    return common.finite_or_null(settings)


def write_index(folder: Path, shards: int, cfg: Config) -> None:
    """The file that makes a source complete."""
    files = {f"{k:05d}.npz": file_digest(folder / f"{k:05d}.npz") for k in range(shards)}
    common.write_json(folder / "index.json", {"format": 1, "settings": collect_settings(cfg), "files": files})


def complete(folder: Path, cfg: Config) -> bool:
    """Whether the source is there; UserError if it is there with other settings or a broken file."""
    index = folder / "index.json"
    if not index.exists():
        return False
    found = json.loads(index.read_text())
    if changed := [k for k, v in collect_settings(cfg).items() if found["settings"].get(k) != v]:
        raise UserError(f"{index} was collected with other values of {', '.join(changed)}")
    shards(index)
    return True


def shards(index: Path) -> list[Path]:
    """The files of a source, after a look at their checksums."""
    for name, digest in json.loads(index.read_text())["files"].items():
        if not (index.parent / name).exists() or file_digest(index.parent / name) != digest:
            raise UserError(
                f"{index.parent / name} is missing or broken; delete {index.parent} and --collect again"
            )
    return [index.parent / name for name in json.loads(index.read_text())["files"]]


def data_folders(cfg: Config, run: Run) -> dict[Path, int]:
    """{folder: seed} of the data: --data, or, made by this run, one for each seed (the others share one)."""
    root = run.folder.parents[run.name.count("/")] if run.name else run.folder
    if cfg.data or cfg.collect:
        return {Path(cfg.data or root / "data").expanduser(): cfg.seed}
    return {root / "data" / f"seed{seed}": seed for seed in seeds(cfg)}


def collect(cfg: Config, run: Run) -> float:
    """Fill the data folders, one job a source, what is complete is kept; returns transitions a second."""
    domains = sorted({split_task(name)[0] for name in cfg.tasks})
    if cfg.collect_with == "gait" and domains != ["cheetah"]:
        raise UserError(
            "--collect_with gait knows only the cheetah; use --collect_with td3 for other domains"
        )
    sources = [f"{d}/{t}" for d in domains for t in (*DOMAINS[d], "rnd")]
    folders = data_folders(cfg, run)
    todo = [s for s in sources if not all(complete(f / s, cfg) for f in folders)]
    begin = time.time()
    work = collect_gait if cfg.collect_with == "gait" else collect_td3
    made = run.stage("collect").jobs(todo, work)
    rate = len(folders) * sum(m["transitions"] for m in made.values()) / (time.time() - begin)
    rows = [{"source": s, **m} for s, m in made.items()]
    run.table(rows or [{"source": s, "transitions": "complete"} for s in sources], "collected", keep=False)
    return rate


# --- the grid ---

REFERENCE_RETURNS = {  # of a random and an expert policy, as published with D4RL
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
}
GYMNASIUM = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4"}


def rows(cfg: Config) -> dict[str, dict]:
    """{row: settings that it changes}."""
    return {name: change(cfg) for name, change in ROWS.items()}


def seeds(cfg: Config) -> list[int]:
    return list(range(cfg.seed, cfg.seed + cfg.seeds))


def targets(cfg: Config) -> list[str]:
    """The tasks of the grid: those of the testbed, or the one data set that --data names."""
    if cfg.data.startswith("minari:"):
        return [cfg.data.removeprefix("minari:").replace("/", ".")]
    return [Path(cfg.data).stem] if cfg.data.endswith(".hdf5") else list(cfg.tasks)


def grid(cfg: Config) -> list[str]:
    """Job names task/split/row, those that take longest first."""
    jobs = [(t, s, r) for t in targets(cfg) for s in cfg.splits for r in cfg.rows]
    jobs += [(t, cfg.splits[-1], r) for t in targets(cfg) for r in cfg.more_rows if r not in cfg.rows]
    cost = {r: flops(replace(cfg, **change)) for r, change in rows(cfg).items()}
    return ["/".join(job) for job in sorted(jobs, key=lambda job: -cost[job[2]])]


def evaluation_envs(cfg: Config, task: str, count: int):
    """Environments in which a data set's policies are scored, None where there are none for it here."""
    if cfg.data.startswith("minari:"):
        import minari

        data = minari.load_dataset(cfg.data.removeprefix("minari:"))
        return common.vector_env([functools.partial(data.recover_environment, eval_env=True)] * count)
    if cfg.data.endswith(".hdf5"):
        if name := next((g for g in GYMNASIUM if g in task.lower()), None):
            return common.vector_env([functools.partial(gymnasium.make, GYMNASIUM[name])] * count)
        task = task.rpartition("__")[2]  # <data set>__<domain_task>.hdf5
        if task.partition("_")[2] not in DOMAINS.get(task.partition("_")[0], ()):
            return None
    return make_envs(*split_task(task), count, cfg.repeat)


def normalized_score(returns: np.ndarray, task: str) -> np.ndarray:
    """D4RL's 100 (R - random) / (expert - random) where the reference returns are published, else R."""
    name = next((g for g in REFERENCE_RETURNS if g in task.lower()), None)
    if name is None:
        return returns
    low, high = REFERENCE_RETURNS[name]
    return 100 * (returns - low) / (high - low)


def train_arm(name: str, run: Run) -> dict:
    """One task, mixture and row of the table, all seeds side by side."""
    task, split, row = name.split("/")
    cfg = replace(run.cfg, **rows(run.cfg)[row])
    folders = [cfg.data] if cfg.data else [str(f) for f in data_folders(cfg, run)]
    train, test, notes = [], [], []
    for folder in folders:
        data = load_data(folder, task, cfg.repeat)
        notes += validate(data, folder, cfg.clip_actions)
        target = task.partition("_")[2]
        train.append(data.select(split_sources(split, target, data.sources)).held_out(cfg.held_out)[0])
        test.append((data.select([target]) if target in data.sources else data).held_out(cfg.held_out)[1])
    learner = Learner(cfg, seeds(cfg), train, run.device)
    with run.timed("training"):
        done = fit(learner, run)
    result = {"seconds": run.seconds["training"], "updates": done, "notes": sorted(set(notes))}
    result["parameters"] = sum(p.numel() for p in learner.agent.actor.parameters()) // cfg.seeds
    result["diverged"] = learner.diverged.tolist()
    weight = learner.source_weight / learner.source_weight.sum(1, keepdim=True)
    result["weight"] = dict(zip(train[0].sources, weight.T.tolist(), strict=True))
    if len(test[0]):
        result["imitation_error"] = imitation_error(learner, test)
    with run.timed("evaluation"):
        result["returns"] = score(learner, task, test, run)
    return result | {"evaluation_seconds": run.seconds["evaluation"]}


def fit(learner: Learner, run: Run) -> int:
    """Train, log, and set seeds aside that diverge: a loss that is not finite, or |Q| beyond 10 r / (1 - gamma)."""
    cfg = learner.cfg
    for step in run.steps(cfg.updates, **learner.state()):
        out = learner.step(step)
        if step % cfg.log_every and step != run.last:
            continue
        values = dict(zip(out, torch.stack(list(out.values())).tolist(), strict=True))  # one sync
        dead = learner.diverged.tolist()
        for i in range(cfg.seeds):
            column = [v[i] for v in values.values()]
            if dead[i] < 0 and (
                not all(map(math.isfinite, column))
                or values.get("q_max", [0.0] * cfg.seeds)[i] > learner.limit
            ):
                learner.retire(i, step)
                dead[i] = step
                run.print(f"{run.name}: seed {cfg.seed + i} diverged at update {step}; the others go on")
        alive = [i for i in range(cfg.seeds) if dead[i] < 0]
        run.log(step, **{k: sum(v[i] for i in alive) / len(alive) for k, v in values.items() if alive})
        if not alive:
            run.last = step
    return step + 1


def score(learner: Learner, task: str, test: Sequence[Transitions], run: Run) -> dict[str, list]:
    """Mean return of each seed's policy, {"reset 1": [...], "reset 50": [...]}, also from the target's own states.

    The second start, only for the cheetah, is a random state in the second half of held-out target episodes.
    """
    cfg, count, out = learner.cfg, learner.cfg.episodes, {}
    envs = evaluation_envs(cfg, task, cfg.seeds * count)
    if envs is None:
        return {}
    starts = {"reset": None}
    if isinstance(envs, Cheetah) and len(test[0]) and test[0].physics is not None:
        rng = np.random.default_rng(run.stream("starts"))
        states = [later_states(test[i % len(test)]) for i in range(cfg.seeds)]
        starts["mid"] = {"physics": np.concatenate([s[rng.integers(len(s), size=count)] for s in states])}
    for start, options in starts.items():
        for samples in sorted({1, cfg.es} if cfg.algo != "bc" else {1}):  # cloning has no critic to ask
            returns = evaluate(learner, envs, samples, run.stream(start) % 2**31, options)
            returns[learner.diverged.cpu().numpy() >= 0] = math.nan
            out[f"{start} {samples}"] = normalized_score(returns, task).mean(1).tolist()
    envs.close()
    return out


def later_states(data: Transitions) -> np.ndarray:
    """Physics states in the second half of each episode: (k, p)."""
    episode = data.episode.numpy()
    place = np.arange(len(data)) - np.searchsorted(episode, episode)
    return data.physics[place >= place.max() / 2]


# --- what comes out ---


def report(cfg: Config, run: Run, results: dict[str, dict]) -> None:
    """The table of all arms, the differences that added data make, the claims, the figure."""
    measures = ["imitation_error", *dict.fromkeys(m for r in results.values() for m in r["returns"])]
    lines = []
    for name, r in results.items():
        numbers = r["returns"] | {"imitation_error": r.get("imitation_error", [])}
        task, split, row = name.split("/")
        line = {"task": task, "data": split, "row": row, "actor parameters": r["parameters"]}
        line |= {m: mean_and_error(numbers.get(m, [])) for m in measures}
        line["target's weight"] = r["weight"].get(task.partition("_")[2])
        line["diverged"] = sum(step >= 0 for step in r["diverged"]) or None
        lines.append(line)
        for note in r["notes"]:
            run.print(f"{name}: {note}")
    lines.sort(key=lambda x: (x["task"], cfg.splits.index(x["data"]), list(rows(cfg)).index(x["row"])))
    run.table(lines, f"mean +- s.e. over {cfg.seeds} seeds; returns by start and number of sampled actions")
    narrow, wide = cfg.splits[0], cfg.splits[-1]
    pick = lambda t, split, row, m: results[f"{t}/{split}/{row}"]["returns"].get(m, [])  # noqa: E731
    if narrow != wide and (shared := [r for r in rows(cfg) if r in cfg.rows]):
        changes = []
        for row in shared:
            line = {"row": row}
            for m in measures[1:]:
                pairs = [np.subtract(pick(t, wide, row, m), pick(t, narrow, row, m)) for t in targets(cfg)]
                line[m] = mean_and_error(np.concatenate(pairs).tolist())
            changes.append(line)
        if len(measures) > 1:
            run.table(changes, f"what adding data does: {wide} minus {narrow}, paired by seed")
    if {"baseline", "big_actor"} <= set(cfg.rows) and narrow != wide:
        claims(cfg, run, results)
    run.figure("mood", functools.partial(draw, cfg, results), (11, 3.6))


def mean_and_error(values: Sequence[float]) -> str | None:
    """mean +- standard error, without the seeds that diverged."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    if not values:
        return None
    error = f" +- {np.std(values, ddof=1) / math.sqrt(len(values)):.3g}" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{error}"


def claims(cfg: Config, run: Run, results: dict[str, dict]) -> None:
    """The paper's sentences, paired by task and seed; seeds that diverged on either side are left out."""
    narrow, wide, many = cfg.splits[0], cfg.splits[-1], cfg.es

    def claim(text: str, ours: tuple, theirs: tuple, better: str) -> None:
        sides = []
        for split, row, measure in (ours, theirs):
            found = [results.get(f"{t}/{split}/{row}", {}) for t in targets(cfg)]
            sides.append([x for r in found for x in (r.get("returns", {}) | r).get(measure, [])])
        pairs = [p for p in zip(*sides, strict=False) if None not in p and all(map(math.isfinite, p))]
        if pairs:
            run.claim(text, *zip(*pairs, strict=True), better)

    for start, where in (("reset", "from resets"), ("mid", "from the target's own states")):
        one, best = f"{start} 1", f"{start} {many}"
        small, big, same = (wide, "baseline", one), (wide, "big_actor", one), (narrow, "baseline", one)
        claim(f"adding data lowers the small actor's return {where}", small, same, "lower")
        claim(f"on the mixture a larger actor returns more {where}", big, small, "higher")
        claim(f"... than a larger critic does {where}", big, (wide, "big_critic", one), "higher")
        claim(
            f"on the mixture the best of {many} samples returns more {where}",
            (wide, "baseline", best),
            small,
            "higher",
        )
        claim(
            f"control: on its own data that returns less {where}", (narrow, "baseline", best), same, "lower"
        )
    error = "imitation_error"
    claim(
        "on the mixture a larger actor imitates the target better",
        (wide, "big_actor", error),
        (wide, "baseline", error),
        "lower",
    )
    claim("... also by cloning alone", (wide, "bc_big_actor", error), (wide, "bc", error), "lower")


def draw(cfg: Config, results: dict[str, dict], figure) -> None:
    """Returns for each mixture from both starts, small and large actor, with and without sampling."""
    average = lambda name, m: np.nanmean(
        [np.nan if x is None else x for x in results[name]["returns"].get(m, [np.nan])]
    )  # noqa: E731
    starts = list(dict.fromkeys(m.split()[0] for m in next(iter(results.values()))["returns"]))
    axes = figure.subplots(1, len(starts) + 1, squeeze=False)[0]
    task, place = targets(cfg)[0], np.arange(len(cfg.splits))
    shown = [r for r in ("baseline", "big_actor") if r in cfg.rows] or list(cfg.rows[:2])
    for ax, start in zip(axes, starts, strict=False):
        bars = [(r, k) for r in shown for k in sorted({1, cfg.es})]
        for j, (row, k) in enumerate(bars):
            height = [average(f"{task}/{s}/{row}", f"{start} {k}") for s in cfg.splits]
            label = f"{dict(baseline=cfg.actor, big_actor=cfg.big_actor).get(row, row)}{', best of ' + str(k) if k > 1 else ''}"
            ax.bar(
                place + 0.2 * (j - 1.5),
                height,
                0.2,
                label=label,
                color=f"C{j // 2}",
                alpha=0.5 if j % 2 else 1,
            )
            for i, s in enumerate(cfg.splits):
                dots = results[f"{task}/{s}/{row}"]["returns"].get(f"{start} {k}", [])
                ax.plot([i + 0.2 * (j - 1.5)] * len(dots), dots, ".", color="black", ms=3)
        ax.set_xticks(place, cfg.splits)
        ax.set_title(
            {"reset": "return from resets", "mid": "return from the target's states"}[start], fontsize=9
        )
        ax.legend(fontsize=7)
    lasting = [
        n for n in results if n.startswith(f"{task}/{cfg.splits[-1]}/") and results[n].get("imitation_error")
    ]
    for j, name in enumerate(lasting):
        errors = results[name]["imitation_error"]
        axes[-1].barh(j, np.mean(errors), color="C2", alpha=0.6)
        axes[-1].plot(errors, [j] * len(errors), ".", color="black", ms=3)
    axes[-1].set_yticks(range(len(lasting)), [n.rpartition("/")[2] for n in lasting], fontsize=7)
    axes[-1].set_title(f"error on the target's actions, {cfg.splits[-1]}", fontsize=9)


DIMENSIONS = {"cheetah": (17, 6), "walker": (24, 6), "quadruped": (78, 12), "humanoid": (67, 21)}


def parameters(cfg: Config) -> dict[str, int]:
    """Parameters of one seed's actor, critics together, and value network."""
    obs, actions = DIMENSIONS.get(targets(cfg)[0].partition("_")[0], (17, 6))
    with torch.device("meta"):
        nets = {"actor": network(cfg.actor, 1, obs, actions), "value": network(cfg.critic, 1, obs, 1)}
        nets["critic"] = network(cfg.critic, cfg.critics, obs + actions, 1)
    return {k: sum(p.numel() for p in n.parameters()) for k, n in nets.items()}


def flops(cfg: Config) -> float:
    """Estimated FLOPs of one update of all seeds: 2 a parameter and row forward, 6 with the backward pass."""
    n, k = parameters(cfg), cfg.samples
    passes = 3 * n["actor"]
    if cfg.algo == "iql":
        passes += (1 + 3 + 1 + k) * n["critic"] + 4 * n["value"]
    elif cfg.algo != "bc":
        passes += (
            n["actor"]
            + {"td3bc": 1 + 3 + 2, "asac": 1 + 3 + 2 + 2 * k}.get(cfg.algo, 1 + 3 + 1 + k) * n["critic"]
        )
    return 2.0 * cfg.batch * cfg.seeds * passes


def dry_run(cfg: Config, run: Run) -> None:
    """Sizes, memory and FLOPs of every job of the grid, without data."""
    table, jobs = [], grid(cfg)
    for row in dict.fromkeys(job.rpartition("/")[2] for job in jobs):
        c = replace(cfg, **rows(cfg)[row])
        n = parameters(c)
        line = {"row": row, "jobs": sum(job.endswith(f"/{row}") for job in jobs)} | n
        held = (
            16 * (n["actor"] + n["value"] + n["critic"]) + 4 * n["critic"]
        )  # weights, gradients, Adam, targets
        table.append(line | {"MB a job": cfg.seeds * held / 1e6, "GFLOP an update": flops(c) / 1e9})
    run.table(table, f"{len(jobs)} jobs of {cfg.seeds} seeds and {cfg.updates} updates, batch {cfg.batch}")
    total = sum(line["jobs"] * line["GFLOP an update"] for line in table) * 1e9 * cfg.updates
    each = [len(jobs[r :: run.world_size]) for r in range(run.world_size)]
    obs, actions = DIMENSIONS.get(targets(cfg)[0].partition("_")[0], (17, 6))
    rows_ = cfg.collect_episodes * cfg.collect_steps // cfg.repeat
    run.print(f"{total:.3g} FLOPs in all; jobs by rank: {each}")
    run.print(
        f"data of {rows_:,} transitions a source: {rows_ * (2 * obs + actions + 2) * 4 / 1e9:.2f} GB a source on the device"
    )


# --- speed beside CORL ---


def bench(cfg: Config, run: Run) -> None:
    """Updates a second at CORL's sizes, one seed and four; with --corl also those of its own public files."""
    generator = torch.Generator().manual_seed(cfg.seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    n = 100_000
    zeros = torch.zeros(n, dtype=torch.long)
    data = Transitions(
        normal(n, 17), normal(n, 6).tanh(), normal(n), normal(n, 17), torch.ones(n), zeros, zeros
    )
    theirs, lines = corl_speed(cfg, data) if cfg.corl else {}, []
    # CORL: two hidden layers for IQL, three for AWAC; Q - V and exp weights; standardised observations
    sizes = {"iql": {"iql_advantage": "value", "actor": "s256x2", "critic": "s256x2"}}
    sizes["awac"] = {"actor": "s256x3", "critic": "s256x3"}
    for algo, change in sizes.items():
        for count in (1, 4):
            c = replace(cfg, algo=algo, weights="exp", seeds=count, batch=256, samples=1, critics=2, **change)
            learner = Learner(c, list(range(count)), [data], run.device)
            rate = count * rate_of(learner.step, run.device)
            line = {"algorithm": algo, "seeds": count, "updates_per_s": rate, "CORL": theirs.get(algo)}
            lines.append(line | {"ratio": rate / theirs[algo] if theirs else None})
    run.table(lines, f"updates a second of all seeds together, {torch.get_num_threads()} threads")
    speed = {f"{x['algorithm']}_{x['seeds']}_seeds_updates_per_s": x["updates_per_s"] for x in lines}
    run.finish(**speed, **{f"corl_{k}_updates_per_s": v for k, v in theirs.items()})


def rate_of(step: Callable[[int], object], device: torch.device, seconds: float = 4.0) -> float:
    """Calls a second of step(i), after ten calls to warm up; the best of three intervals."""
    sync, rates, i = torch.cuda.synchronize if device.type == "cuda" else lambda: None, [], 0
    for _ in range(10):
        step(i := i + 1)
    for _ in range(3):
        sync()
        begin, first = time.perf_counter(), i
        while time.perf_counter() - begin < seconds:
            step(i := i + 1)
        sync()
        rates.append((i - first) / (time.perf_counter() - begin))
    return max(rates)


def corl_speed(cfg: Config, data: Transitions) -> dict[str, float]:
    """Time the update of CORL's iql.py and awac.py in the folder --corl, with empty modules for d4rl, gym, wandb."""
    for name in ("d4rl", "gym", "pyrallis", "wandb"):
        sys.modules.setdefault(name, mock.MagicMock())
    sys.modules["pyrallis"].wrap = lambda: lambda function: function
    device, modules = "cuda" if torch.cuda.is_available() else "cpu", {}
    for name in ("iql", "awac"):
        path = Path(cfg.corl).expanduser() / f"{name}.py"
        if not path.is_file():
            raise UserError(f"--corl: no {path}; give the folder algorithms/offline of a checkout of CORL")
        spec = importlib.util.spec_from_file_location(f"corl_{name}", path)
        modules[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    arrays = {"observations": data.obs, "actions": data.action, "rewards": data.reward}
    arrays = {
        k: v.numpy()
        for k, v in (arrays | {"next_observations": data.next, "terminals": 1 - data.live}).items()
    }
    optimizer = lambda net: torch.optim.Adam(net.parameters(), lr=3e-4)  # noqa: E731
    rates = {}
    for name, module in modules.items():
        buffer = module.ReplayBuffer(17, 6, len(data), device)
        with contextlib.redirect_stdout(None):
            buffer.load_d4rl_dataset(arrays)
        if name == "iql":
            nets = (module.GaussianPolicy(17, 6, 1.0), module.TwinQ(17, 6), module.ValueFunction(17))
            learner = module.ImplicitQLearning(
                1.0, *(x for n in nets for x in (n.to(device), optimizer(n))), device=device
            )
            train = learner.train
        else:
            nets = (module.Actor(17, 6, 256), module.Critic(17, 6, 256), module.Critic(17, 6, 256))
            train = module.AdvantageWeightedActorCritic(
                *(x for n in nets for x in (n.to(device), optimizer(n)))
            ).update
        rates[name] = rate_of(
            lambda _, train=train, buffer=buffer: train(buffer.sample(256)), torch.device(device)
        )
    return rates


CONFIGS = {
    "demo": Config(workers=2),
    "bench": Config(config="bench"),  # only times updates, at CORL's sizes, with one seed and with four
    "smoke": Config(
        config="smoke",
        seeds=2,
        splits=("same", "mixed+rnd"),
        rows=("baseline", "big_actor"),
        more_rows=("asac", "iql", "iql_value", "td3bc", "bc", "five_critics", "modern_actor"),
        actor="s8x2",
        big_actor="s16x2",
        modern_actor="m8x1",
        critic="s8x2",
        big_critic="m8x1",
        batch=16,
        updates=20,
        es=4,
        episodes=1,
        log_every=5,
        collect_episodes=10,
        collect_steps=40,
        gait_generations=2,
        gait_population=8,
        samples=2,
    ),
    "gpu": Config(
        config="gpu",
        tasks=("cheetah_run", "cheetah_walk", "cheetah_walk_backward", "cheetah_run_backward"),
        seeds=5,
        splits=("same", "cross", "mixed", "mixed+rnd"),
        critic="s256x2",
        big_critic="s1024x2",
        big_actor="s1024x2",
        batch=512,
        updates=20000,
        compile=True,
        log_every=500,
        save_every=20000,
        collect_episodes=400,
        workers=1,
    ),
    "full": Config(
        config="full",
        tasks=tuple(f"{d}_{t}" for d, tasks in DOMAINS.items() for t in tasks),
        seeds=5,
        compile=True,
        splits=("same", "cross", "mixed", "mixed+rnd"),
        rows=tuple(ROWS),
        more_rows=(),
        actor="s256x2",
        big_actor="s1024x2",
        modern_actor="m1024x2",
        critic="s256x2",
        big_critic="m1024x1",
        discount=0.99,
        beta=1.0,
        batch=1024,
        updates=2_000_000,
        lr=1e-4,
        decay=False,
        normalize=False,
        repeat=1,
        held_out=0.0,
        episodes=50,
        log_every=10000,
        save_every=50000,
        collect_with="td3",
        collect_episodes=1000,
        collect_steps=1000,
        collect_net="s1024x2",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    cfg = common.parse_config(CONFIGS, argv)
    with Run(cfg) as run:
        if cfg.dry_run:
            return dry_run(cfg, run)
        if cfg.config == "bench":
            return bench(cfg, run)
        speed = {}
        if cfg.collect or not cfg.data:
            if cfg.collect_with == "td3" and not cfg.collect:
                raise UserError(
                    f"--config {cfg.config} trains on data: --data FOLDER, which --collect --data FOLDER builds, or ExORL's, or a D4RL file"
                )
            speed["collected_transitions_per_s"] = collect(cfg, run)
        if cfg.collect:
            folder = next(iter(data_folders(cfg, run)))
            run.print(f"\ntrain on it: python mood.py --data {folder} --repeat {cfg.repeat}")
            return run.finish(**speed)
        results = run.jobs(grid(cfg), train_arm)
        report(cfg, run, results)
        total = sum(r["seconds"] for r in results.values())
        speed["updates_per_s"] = sum(r["updates"] * cfg.seeds for r in results.values()) / total
        run.finish(**speed)


if __name__ == "__main__":
    main()
