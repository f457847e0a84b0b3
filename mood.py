"""Simple ingredients for offline RL on heterogeneous data: a larger actor, and the MOOD testbed.

Cetin, Tirinzoni, Pirotta, Lazaric, Ollivier, Touati, "Simple Ingredients for Offline Reinforcement Learning",
ICML 2024, arXiv 2403.13097. Facts of the authors' code: github.com/facebookresearch/offline_rl.

The claim. Offline RL gets worse when trajectories collected for related but different tasks are simply added
to its data. Of the explanations tested (conservatism, critic ensembles, a bias of advantage weighting, how an
action is picked at test time, network size) the size of the actor matters most: with a larger one AWAC and
IQL cope.

Actor mu(s) = tanh f(s), a = mu + sigma n kept in [-1, 1]; N critics Q_i, their targets Q'. One update:
  eq. (1)  U(q) = mean_{i != j} |q_i - q_j|,  P(q) = mean_i q_i - p U(q)    of two at p = 1/2: the minimum
  eq. (2)  y = r + gamma (1 - terminated) P(Q'(s', a')),  a' ~ pi(s') with noise clipped to +-0.3
           L_Q = 1/2 sum_i mean (Q_i(s, a) - y)^2
  eq. (3)  A(s, a) = mean_i Q_i(s, a) - 1/K sum_k P(Q(s, a_k)),  a_k ~ pi(s)    pessimism for the policy only
  eq. (4)  AWAC: L_pi = -mean_b w_b l(s_b, a_b),  w = B softmax_b(A / beta),  l the log-density a dimension
  eq. (5)  IQL: L_V = mean |kappa - 1{u < 0}| u^2,  u = P(Q'(s, a)) - V(s);  y = r + gamma (1 - term.) V(s')
  eq. (6)  TD3+BC: L_pi = -mean P(Q(s, a_pi)) + alpha sg(mean |P(Q(s, a_pi))|) mse(mu(s), a)
  eq. (7)  ASAC: mean l is maximised on rows drawn with P(i) = softmax(g)_i of all the data, g_i = A_i / beta
  eq. (8)  evaluation sampling: act with argmax_k P(Q(s, a_k)) of M samples
then Q' moves tau of the way to Q.

How to run
  python mood.py                                    four seeds, three mixtures, baselines; two CPU cores
  python mood.py --collect --data D                 build a testbed folder (cheetah; --collect_with td3: all)
  python mood.py --data D                           train on it; ExORL's folders: --repeat 1 --splits all
  python mood.py --data hopper_medium-v2.hdf5       D4RL, scored in gymnasium; or minari:ID
  python mood.py --rows baseline,big_actor,...      the paper's hypotheses, one a row (all: see ROWS)
  torchrun --nproc_per_node=8 mood.py --config full --data D    15 tasks, 4 mixtures, 5 seeds a job
Jobs task/mixture/row are dealt to ranks and workers; the seeds of a job share one batched network. On a GPU
--compile captures an update in one CUDA graph; auto precision is float32 with TF32 products.

Where this file departs from the paper and its code
- The paper's tables were not at hand: hyperparameters are read off its code, no figure here is a quotation.
- Kept from the code: log-density averaged over dimensions, without a correction for the clamp; fixed sigma;
  no target actor, no delayed updates; IQL weighs by AWAC's advantage, V is not in it. The row iql_value is
  the IQL paper's: Q' - V, min(exp(3 A), 100).
- Changed: softmax weights times B (only Adam's epsilon notices); V is initialised like the other networks;
  one gamma (the code never passes its flag on); N = 1 works; TD3+BC clones with mu(s), not with a noisy
  sample; of a row drawn twice ASAC keeps the last score.
- Collected data are ours: agents of TD3 (of TD3 on RND's novelty for "rnd") trained online, or, in the demo,
  evolved open-loop gaits of the cheetah, one a task for all seeds ("rnd": coloured noise). The authors' data
  are not public.
- The demo is small and selected: gamma 0.95, beta 0.1, actions held for 4 physics steps, observations
  standardised, an actor of 8 units against one of 128, the same settings for both; a temperature three times
  lower and higher is shown for both (low_beta, high_beta). At gamma 0.98 with every action held for one step
  the effect of width was there, too, that of evaluation sampling hardly (not at all with small critics).
  "At its best of three temperatures": picked for each seed by the returns of the other seeds.
- Not here: CORL's variants of the algorithms (learned deviations, target actors, delayed updates), of which
  the exp weights are (--weights exp); evaluating without training again; halving a stack of seeds that does
  not fit a GPU.

Reading order: ROWS, Config, Agent, the losses, update, LogSampler, Learner, act, train_arm, main.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import gymnasium
import mujoco
import mujoco.rollout
import numpy as np
import torch
from torch import Tensor, nn

import before as common
from before import EnsembleLinear, Replay, Run, UserError


def one_file(data: str) -> bool:
    """Whether --data names an HDF5 file."""
    return data.endswith((".hdf5", ".h5"))


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
    # as in the IQL paper
    "iql_value": lambda c: {"algo": "iql", "iql_advantage": "value", "weights": "exp", "beta": 1 / 3},
    "td3bc": lambda c: {"algo": "td3bc"},
    "td3bc_big_actor": lambda c: {"algo": "td3bc", "actor": c.big_actor},
    "bc": lambda c: {"algo": "bc"},
    "bc_big_actor": lambda c: {"algo": "bc", "actor": c.big_actor},
}

BETAS = ("baseline", "big_actor", "low_beta", "low_beta_big_actor", "high_beta", "high_beta_big_actor")
MORE_ROWS = ("big_critic", "asac", "iql", "bc", "bc_big_actor", *BETAS[2:])


@dataclass
class Config(common.Config):
    """Settings; the paper's symbol, where it has one, stands last in the comment."""

    tasks: tuple[str, ...] = ("cheetah_run_backward",)  # target tasks, whose reward relabels all trajectories
    data: str = ""  # testbed or ExORL folder, MOOD or D4RL .hdf5, minari:ID; empty: made by this run
    splits: tuple[str, ...] = ("same", "mixed", "mixed+rnd")  # mixtures; first and last are compared
    rows: tuple[str, ...] = ("baseline", "big_actor")  # rows of the hypothesis table, for each mixture
    more_rows: tuple[str, ...] = MORE_ROWS  # further rows, for the last mixture only
    seeds: int = 4  # seeds trained side by side in one batched network, from --seed on
    held_out: float = 0.1  # share of each source's episodes that is not trained on
    clip_actions: bool = False  # clip actions of the data to [-1, 1] instead of refusing them
    algo: Literal["bc", "td3bc", "awac", "iql", "asac"] = "awac"  # offline RL algorithm of the baseline
    actor: str = "s8x2"  # s: plain, m: modern (residual, layer norm, spectral norm); width x depth
    big_actor: str = "s128x2"  # of the row big_actor
    modern_actor: str = "m128x1"  # of the row modern_actor
    critic: str = "s64x2"  # critics
    value: str = "s64x2"  # IQL's value network
    big_critic: str = "s128x2"  # of the row big_critic
    critics: int = 2  # members of the critic ensemble, N
    pessimism: float = 0.5  # how far disagreement pulls below the mean; with two 0.5 is their minimum, p
    discount: float = 0.95  # gamma
    tau: float = 0.005  # step of the target critics towards the critics
    std: float = 0.2  # fixed standard deviation of the policy, sigma
    noise_clip: float = 0.3  # clip of the policy's noise in the critics' target
    beta: float = 0.1  # temperature of the advantage weights
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
    eval_every: int = 0  # updates between evaluations on the way; 0: only at the end
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
    gait_spread: tuple[float, ...] = (0.0, 0.3, 0.6)  # perturbation of the collected gaits, in turn

    may_change: ClassVar[set[str]] = {"rows", "more_rows"}

    def __post_init__(self):
        super().__post_init__()
        for name in ("actor", "big_actor", "modern_actor", "critic", "big_critic", "value", "collect_net"):
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
        if self.data.startswith("minari:") or one_file(self.data):
            self.splits = ("all",)  # there is no other source to mix with
        at_least_one = ("seeds", "critics", "samples", "updates", "batch", "es", "episodes", "repeat")
        for name in (*at_least_one, "collect_episodes", "collect_steps", "collect_envs", "gait_population"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more")
        if self.beta <= 0 or self.std <= 0 or self.lr <= 0:
            raise ValueError("--beta, --std and --lr must be positive")
        if self.pessimism < 0 or not 0 <= self.discount < 1 or not 0 < self.expectile < 1:
            raise ValueError("--pessimism must be 0 or more, --discount in [0, 1), --expectile in (0, 1)")
        if not 0 <= self.tau <= 1 or self.noise_clip < 0 or self.collect_updates < 0:
            raise ValueError("--tau must be in [0, 1], --noise_clip and --collect_updates 0 or more")
        if not 0 <= self.held_out < 1:
            raise ValueError("--held_out must be in [0, 1)")
        if not (self.tasks and self.splits and (*self.rows, *self.more_rows)):
            raise ValueError("--tasks, --splits and --rows must name something")
        if not self.repeat <= self.collect_steps <= 1000 or self.repeat > 400 or not self.gait_spread:
            raise ValueError(
                "--collect_steps must be from --repeat to 1000, --repeat up to 400, --gait_spread given"
            )


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
        u, v = self.u.clone(), self.v.clone()  # a further pass before the backward one would move them
        sigma = (v * times(self.weight, u)).sum(-1)
        return self.weight / sigma[:, None, None]

    @torch.no_grad()
    def orthogonal_(self, gain: float, generators: Sequence[torch.Generator]) -> None:
        super().orthogonal_(gain, generators)
        for i, u in enumerate(self.u):
            generator = generators[i * len(generators) // len(self.u)]
            u.copy_(unit(torch.randn(u.shape, generator=generator, dtype=u.dtype)))
        self.v.copy_(unit(times(self.weight, self.u)))


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
        self.critics = cfg.critics
        self.actor = network(cfg.actor, len(seeds), obs, actions)
        self.critic = network(cfg.critic, len(seeds) * cfg.critics, obs + actions, 1)
        self.value = network(cfg.value, len(seeds), obs, 1) if cfg.algo == "iql" else None
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
    """l of eq. (4): log-density of the untruncated Normal, averaged over dimensions: (..., m) -> (...)."""
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
            weight = advantage_weights(u.detach().clamp(max=cfg.advantage_clip), cfg.beta, cfg.weights)
        else:
            with torch.no_grad():
                gain = advantage(agent, s, a, mean, cfg.std * noise[1:], cfg).clamp(max=cfg.advantage_clip)
                weight = advantage_weights(gain, cfg.beta, cfg.weights)
        log["actor_loss"] = -(weight * log_prob(mean, a, cfg.std)).mean(-1)
    descend(opt["actor"], log["actor_loss"])
    if cfg.algo != "bc":
        common.soft_update(agent.target, agent.critic, cfg.tau)
    return log | {"weight": weight}


BLOCK = 256


class LogSampler(nn.Module):
    """Draws rows with P(i) = softmax(logits)_i, eq. (7), for each seed, in log space, on the device.

    Two levels: logits in blocks of 256, and the log of each block's mass.
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
        self.logits.view(len(index), -1).scatter_(
            1, ordered, logits.gather(1, order.gather(1, last)).to(self.logits.dtype)
        )
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


def tolerance_up(x: float, low: float, margin: float, at_margin: float = 0.0) -> float:
    """dm_control's tolerance from `low` up, falling linearly to `at_margin` at low - margin."""
    from dm_control.utils import rewards

    return rewards.tolerance(x, (low, math.inf), margin, sigmoid="linear", value_at_margin=at_margin)


def walker_spin(physics) -> float:
    mujoco.mj_subtreeVel(physics.model.ptr, physics.data.ptr)  # no sensor of walker.xml asks for it
    return tolerance_up(physics.named.data.subtree_angmom["torso"][1], 10, 10)


def quadruped_stand(physics) -> float:
    return tolerance_up(physics.torso_upright(), 1, 2)


def quadruped_jump(physics) -> float:
    height = physics.named.data.subtree_com["torso"][2]
    return quadruped_stand(physics) * tolerance_up(height, 1, 1, at_margin=0.5)


def cheetah_velocity(physics, task: str) -> float:
    return float(cheetah_reward(physics.speed(), task))


# tasks that dm_control's suite does not have, as functions of its physics
REWARDS = {("cheetah", t): functools.partial(cheetah_velocity, task=t) for t in CHEETAH_SPEED}
REWARDS |= {("walker", "spin"): walker_spin, ("quadruped", "stand"): quadruped_stand}
REWARDS |= {("quadruped", "jump"): quadruped_jump}


@functools.cache
def reward_functions(domain: str) -> dict[str, Callable]:
    """{task: function of dm_control physics} for the domain's tasks, the suite's own where it has one."""
    own = {t: f for (d, t), f in REWARDS.items() if d == domain}
    suite = {t: common.dm_control_env(domain, t).env.task.get_reward for t in DOMAINS[domain] if t not in own}
    return {t: (own | suite)[t] for t in DOMAINS[domain]}


class TestbedEnv(common.DmControl):
    """A task of the testbed, each action held for `repeat` steps whose rewards are added up.

    info["rewards"] has their means in every task of the domain, or in this one alone without `every`.
    """

    def __init__(self, domain: str, task: str, repeat: int = 1, every: bool = True):
        super().__init__(common.dm_control_env(domain, "run").env)
        found = reward_functions(domain)
        self.functions, self.repeat = found if every else {task: found[task]}, repeat
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


@functools.cache
def relabelling_env(domain: str) -> common.DmControl:
    return common.dm_control_env(domain, DOMAINS[domain][0])


def relabel(physics: np.ndarray, action: np.ndarray, domain: str, task: str) -> np.ndarray:
    """Reward of `task` at each physics state (n, p) and the action (n, m) that led there: (n,).

    Velocity sensors are computed from the state; the humanoid's rewards depend on the action, too.
    """
    env, reward = relabelling_env(domain), reward_functions(domain)[task]
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
        physics = None if self.physics is None else self.physics[keep.numpy()]
        return replace(self, **{k: getattr(self, k)[keep] for k in COLUMNS}, physics=physics)

    def select(self, sources: Sequence[str]) -> Transitions:
        """The transitions of these sources, in their order here."""
        return self.rows(torch.isin(self.source, torch.tensor([self.sources.index(s) for s in sources])))

    def held_out(self, share: float) -> tuple[Transitions, Transitions]:
        """Training rows, and the last `share` of each source's episodes; at least one is trained on."""
        test = torch.zeros(len(self), dtype=torch.bool)
        for k in self.source.unique():
            episodes = self.episode[self.source == k].unique()
            first = max(1, len(episodes) - round(share * len(episodes)))
            test |= (self.source == k) & torch.isin(self.episode, episodes[first:])
        return self.rows(~test), self.rows(test)


COLUMNS = ("obs", "action", "reward", "next", "live", "source", "episode")


def join(parts: dict[str, list[Transitions]]) -> Transitions:
    """One data set of {source: pieces}; episodes are numbered on from piece to piece."""
    pieces, episodes = [], 0
    for k, piece in ((k, piece) for k, found in enumerate(parts.values()) for piece in found):
        numbered = piece.episode - piece.episode[0] + episodes
        pieces.append(replace(piece, source=torch.full_like(piece.source, k), episode=numbered))
        episodes = int(numbered[-1]) + 1
    tensors = {k: torch.cat([getattr(x, k) for x in pieces]) for k in COLUMNS}
    physics = None if any(x.physics is None for x in pieces) else np.concatenate([x.physics for x in pieces])
    return Transitions(**tensors, sources=tuple(parts), physics=physics)


def from_episodes(observation, action, reward, terminated, physics=None) -> Transitions:
    """Episodes (E, T + 1, ...) whose row t of action, reward and terminated belongs to obs[t-1] -> obs[t]."""
    count, steps = observation.shape[0], observation.shape[1] - 1
    flat = lambda x: torch.as_tensor(np.ascontiguousarray(x, np.float32)).flatten(0, 1)  # noqa: E731
    scalar = lambda x: flat(np.reshape(x, (count, steps + 1))[:, 1:])  # noqa: E731
    columns = flat(observation[:, :-1]), flat(action[:, 1:]), scalar(reward), flat(observation[:, 1:])
    source, episode = torch.zeros(count * steps).long(), torch.arange(count).repeat_interleave(steps)
    states = None if physics is None else np.asarray(physics)[:, 1:].reshape(count * steps, -1)
    return Transitions(*columns, 1 - scalar(terminated), source, episode, physics=states)


def open_hdf5(path: Path):
    try:
        import h5py
    except ImportError:
        raise UserError(f'{path} needs h5py: pip install -e ".[data]"') from None
    try:
        return h5py.File(path, "r")
    except OSError as e:
        raise UserError(f"{path}: no HDF5 file, or a broken one ({str(e).splitlines()[0][:80]})") from None


def read_fields(path: Path, found: dict, needed: Sequence[str]) -> list[np.ndarray]:
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
            return from_d4rl(path, file)
        return from_episodes(*read_fields(path, file, (*EPISODE_KEYS, *({"physics"} & set(file)))))


def from_d4rl(path: Path, found: dict) -> Transitions:
    """d4rl.qlearning_dataset: rows that end by time-out are dropped, as is the file's last; terminals count.

    Without `timeouts` an episode ends at 1000 steps. `next_observations` are used where the file has them.
    """
    names = ("observations", "actions", "rewards", "terminals")
    more = [k for k in ("timeouts", "next_observations") if k in found]
    obs, action, reward, terminal, *rest = read_fields(path, found, (*names, *more))
    rest, n, terminal = dict(zip(more, rest, strict=True)), len(obs), terminal.reshape(-1).astype(bool)
    if "timeouts" in rest:
        timeout = rest["timeouts"].reshape(-1).astype(bool)
    else:
        timeout, since = np.zeros(n, bool), 0
        for i in range(n):
            timeout[i] = since == 999
            since = 0 if terminal[i] or timeout[i] else since + 1
    follows = rest.get("next_observations", np.concatenate([obs[1:], obs[-1:]]))
    keep = ~timeout
    keep[-1] = False
    episode = np.concatenate([[0], np.cumsum(terminal | timeout)[:-1]])[keep]
    tensor = lambda x: torch.as_tensor(x[keep].astype(np.float32))  # noqa: E731
    reward = reward.reshape(-1) - (d4rl_name(path.name) == "antmaze")  # 0 and 1 become -1 and 0
    live = tensor(1.0 - terminal)
    source = torch.zeros(int(keep.sum()), dtype=torch.long)
    return Transitions(
        tensor(obs), tensor(action), tensor(reward), tensor(follows), live, source, torch.as_tensor(episode)
    )


GOAL_KEYS = ("observation", "desired_goal")


def flat_goal(obs: dict[str, np.ndarray]) -> np.ndarray:
    if missing := [k for k in GOAL_KEYS if k not in obs]:
        raise UserError(f"observations have no {', '.join(missing)}, only {', '.join(obs)}")
    return np.concatenate([obs[k] for k in GOAL_KEYS], -1)


def load_minari(name: str) -> Transitions:
    """A Minari data set that is on this machine or can be downloaded; truncations are not terminal."""
    try:
        import minari
    except ImportError:
        raise UserError('minari:... needs minari: pip install -e ".[data]"') from None
    try:
        data = minari.load_dataset(name, download=True)
    except Exception as e:  # whatever the hub's client raises
        reason = f"{type(e).__name__}: {str(e)[:100]}"
        raise UserError(f"minari:{name}: neither here nor downloadable ({reason})") from None
    pieces = []
    for episode in data.iterate_episodes():
        obs = (
            flat_goal(episode.observations)
            if isinstance(episode.observations, dict)
            else episode.observations
        )
        after = (np.concatenate([x[:1], x]) for x in (episode.actions, episode.rewards, episode.terminations))
        pieces.append(from_episodes(*(np.asarray(x)[None] for x in (obs, *after))))
    return join({"data": pieces})


def load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: no npz file, or a broken one ({str(e).splitlines()[0][:80]})") from None


def load_exorl(folder: Path, domain: str, task: str) -> Transitions:
    """ExORL / url_benchmark episodes TIMESTAMP_INDEX_LENGTH.npz, relabelled with the task from their physics.

    A source is the folder that holds the files, or the one above `buffer`. About 12,000 transitions a second.
    """
    parts = {}
    for path in sorted(folder.rglob("*.npz")):
        keys = ("observation", "action", "discount", "physics")
        obs, action, discount, physics = read_fields(path, load_npz(path), keys)
        reward = np.concatenate([[0], relabel(physics[1:], action[1:], domain, task)])
        piece = from_episodes(*(x[None] for x in (obs, action, reward, discount == 0, physics)))
        parent = path.parent.parent if path.parent.name == "buffer" else path.parent
        parts.setdefault(parent.name, []).append(piece)
    return join(parts)


def load_testbed(folder: Path, task: str, repeat: int) -> Transitions:
    """The folder that --collect builds for a domain, with the rewards of `task`; checksums are verified."""
    parts, needed = {}, ("observation", "action", f"reward_{task}", "terminated", "physics")
    for source in sorted(x for x in folder.iterdir() if x.is_dir()):
        files, settings = verified(source)
        if settings["repeat"] != repeat:
            raise UserError(f"{source}: collected with --repeat {settings['repeat']}, this run has {repeat}")
        parts[source.name] = [from_episodes(*read_fields(f, load_npz(f), needed)) for f in files]
    return join(parts)


def load_data(data: str, task: str, repeat: int = 1) -> Transitions:
    """--data: a testbed folder, a folder of ExORL episodes, a MOOD or D4RL .hdf5 file, or minari:ID."""
    if data.startswith("minari:"):
        return load_minari(data.removeprefix("minari:"))
    path = Path(data).expanduser()
    if path.is_file():
        if "__" in path.stem and repeat != 1:
            raise UserError(f"{path}: recorded at --repeat 1, this run has {repeat}")
        return load_hdf5(path)
    if one_file(data):
        raise UserError(f"--data {data}: no such file")
    domain, name = split_task(task)
    folder = path if path.name == domain else path / domain
    if any(folder.glob("*/index.json")):
        return load_testbed(folder, name, repeat)
    if any(folder.rglob("*.npz")):
        if repeat != 1:
            raise UserError(f"{folder}: ExORL's episodes are recorded at --repeat 1, this run has {repeat}")
        return load_exorl(folder, domain, name)
    file = "rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/hopper_medium-v2.hdf5"
    build = f"build them with --collect --data {data}, or give a D4RL file ({file})"
    raise UserError(f"--data {data}: no data in {folder}; {build}")


def validate(data: Transitions, name: str, clip_actions: bool) -> list[str]:
    """Stop at what cannot be trained on, return warnings for what can. Checks are done on tensors."""
    if not len(data):
        raise UserError(f"{name}: no transitions")
    if data.obs.ndim != 2 or data.action.ndim != 2:
        shapes = f"{tuple(data.obs.shape[1:])} and {tuple(data.action.shape[1:])}"
        raise UserError(f"{name}: observations and actions must be vectors, not {shapes}")
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
    goes_on = (data.episode[1:] == data.episode[:-1]) & (data.live[:-1] > 0)
    jumps = int((goes_on & ((data.next[:-1] - data.obs[1:]).abs().amax(1) > 1e-4)).sum())
    if jumps:
        notes.append(f"in {jumps} places the next observation is not where the episode goes on")
    return notes


def split_sources(split: str, task: str, sources: Sequence[str]) -> list[str]:
    """Sources of a mixture: same (objective), cross, mixed (their union), mixed+rnd; all: what there is."""
    others = [s for s in sources if s not in (task, "rnd")]
    chosen = {"same": [task], "cross": others, "mixed": [task, *others], "mixed+rnd": [task, *others, "rnd"]}
    chosen["all"] = list(sources)
    if not chosen[split]:
        raise UserError(f"--splits {split}: the data have only the source {', '.join(sources)}")
    if absent := [s for s in chosen[split] if s not in sources]:
        there = f"there are {', '.join(sources)}; --splits all takes them all"
        raise UserError(f"--splits {split}: no source {', '.join(absent)} ({there})")
    return chosen[split]


# --- training ---

CHUNK = 32  # updates whose random numbers are drawn together


class Learner(nn.Module):
    """S seeds side by side: their agent, optimizers, data on the device and random numbers.

    Seed i draws from a generator of its own, seeded anew by (seed, chunk of updates): it gets the same
    numbers alone, in company and after a resume. `data` has one data set for all seeds, or one for each.
    """

    def __init__(self, cfg: Config, seeds: Sequence[int], data: Sequence[Transitions], device="cpu"):
        super().__init__()
        self.cfg, self.seeds, self.device, self.chunk = cfg, list(seeds), torch.device(device), -1
        dtype, (width, actions) = data[0].obs.dtype, (data[0].obs.shape[1], data[0].action.shape[1])
        self.agent = Agent(cfg, seeds, width, actions).to(device, dtype)
        self.optimizers = {}
        for name, net in self.agent.named_children():
            if name != "target" and not (cfg.algo == "bc" and name == "critic"):
                self.optimizers[name] = adam(net.parameters(), cfg.lr)
        scales = [(d.obs.mean(0), d.obs.std(0) + 1e-3) for d in data]
        if not cfg.normalize:
            scales = [(torch.zeros_like(m), torch.ones_like(m)) for m, _ in scales]
        for name, x in zip(("obs_mean", "obs_std"), zip(*scales, strict=True), strict=True):
            each = torch.stack(x).to(device)[:, None].expand(len(seeds), 1, width)
            self.register_buffer(name, each.clone())  # (S, 1, d)
        # a transition is one row of a table, so that a batch is one gather; data of further seeds comes after
        self.parts, tables = [width, actions, width, 1, 1], []
        for d, (m, s) in zip(data, scales, strict=True):
            columns = (d.obs - m) / s, d.action, (d.next - m) / s, d.reward[:, None], d.live[:, None]
            tables.append(torch.cat(columns, 1))
        self.table, self.source = torch.cat(tables).to(device), torch.cat([d.source for d in data]).to(device)
        self.sizes = [len(d) for d in data] * (len(seeds) // len(data))
        first = np.cumsum([0, *self.sizes[:-1]]) if len(data) > 1 else np.zeros(len(seeds))
        self.first = torch.as_tensor(first).long().to(device)[:, None]
        largest = max(1.0, *(float(d.reward.abs().max()) for d in data))
        self.limit = 10 * largest / (1 - cfg.discount)  # of |Q|: beyond it a seed has diverged
        weights = torch.zeros(len(seeds), len(data[0].sources), device=device, dtype=torch.float64)
        self.register_buffer("source_weight", weights)  # what the actor's loss has given to each source
        self.register_buffer("diverged", torch.full((len(seeds),), -1))  # the step, for those that have
        self.rate = torch.tensor(cfg.lr, device=device)
        self.sampler = LogSampler(self.sizes, device) if cfg.algo == "asac" else None
        k = cfg.samples
        draws = {"bc": 0, "td3bc": 2, "asac": 1 + 2 * k}.get(cfg.algo, 1 + k)
        self.index = torch.zeros(len(seeds), cfg.batch, dtype=torch.long, device=device)
        self.uniform = torch.zeros(len(seeds), cfg.batch, device=device)
        self.noise = torch.zeros(draws, len(seeds), cfg.batch, actions, device=device, dtype=dtype)
        if cfg.compile:
            for net in self.agent.children():
                net.compile()
        in_graph = cfg.compile and self.device.type == "cuda"
        self.iterate = graphed(self.iteration) if in_graph else self.iteration

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
        batch = {"obs": obs, "action": action, "next": following}
        return batch | {"reward": reward[..., 0], "live": live[..., 0]}

    def iteration(self) -> dict[str, Tensor]:
        """One update of all seeds, for ASAC with its two batches and the logits that they get."""
        batch, index = self.batch(self.index), self.index
        actor_batch = batch
        if self.sampler is not None:
            index = self.sampler.sample(self.uniform)
            actor_batch = self.batch(index)
        out = update(self.agent, self.optimizers, batch, actor_batch, self.noise, self.cfg)
        self.source_weight.scatter_add_(1, self.source[index + self.first], out.pop("weight").double())
        if self.sampler is not None:
            rows = torch.cat([self.index, index], 1)
            both = self.batch(rows)
            noise = self.cfg.std * torch.cat(self.noise[1:].chunk(2), 2)  # (K, S, 2B, m)
            with torch.no_grad():
                mean = self.agent.mean(both["obs"])
                gain = advantage(self.agent, both["obs"], both["action"], mean, noise, self.cfg)
            self.sampler.update(rows, gain.clamp(max=self.cfg.advantage_clip) / self.cfg.beta)
        return out

    def step(self, step: int) -> dict[str, Tensor]:
        """Update number `step`; returns losses and the largest |Q|, each (S,), still on the device."""
        rate = self.cfg.lr * (min(1.0, 2 - 2 * step / self.cfg.updates) if self.cfg.decay else 1.0)
        for optimizer in self.optimizers.values():
            group = optimizer.param_groups[0]
            if self.device.type == "cuda":  # a CUDA graph reads the rate where it was at the capture
                group |= {"lr": self.rate.fill_(rate), "capturable": True}
            else:
                group["lr"] = rate
        self.draw(step)
        # without autocast's cache of cast weights: they change between the passes of one update
        half = self.cfg.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            return self.iterate()

    @torch.no_grad()
    def retire(self, seed: int, step: int) -> None:
        """Start a diverged seed afresh: checkpoints stay finite, and its numbers are not used any more."""
        if self.diverged[seed] < 0:
            self.diverged[seed] = step
        one = lambda x: x.view(len(self.seeds), -1)[seed]  # noqa: E731
        fresh = Agent(self.cfg, self.seeds, self.parts[0], self.parts[1])
        for x, y in zip(self.agent.state_dict().values(), fresh.state_dict().values(), strict=True):
            one(x).copy_(one(y))
        for optimizer in self.optimizers.values():
            for x in (x for state in optimizer.state.values() for x in state.values() if x.ndim > 1):
                one(x).zero_()
        if self.sampler is not None:
            for x, y in zip(self.sampler.buffers(), LogSampler(self.sizes).buffers(), strict=True):
                one(x).copy_(one(y))
        self.source_weight[seed] = 0

    def state(self) -> dict:
        """What a checkpoint needs."""
        return {"learner": self} | {f"{name}_optimizer": o for name, o in self.optimizers.items()}


def adam(parameters, rate: float) -> torch.optim.Adam:
    """Fused Adam. In float64, which tests use, unfused: a seed gets the same bits alone and in company, which
    the last few elements of the fused loop do not."""
    parameters = list(parameters)
    return torch.optim.Adam(parameters, rate, fused=parameters[0].dtype != torch.float64)


def graphed(function: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """Replay `function`, whose tensors stay where they are, as one CUDA graph from its 4th call on."""
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
    """Mean squared error to the actions of `data` (one set for all seeds, or one for each): (S,)."""
    learner.agent.eval()
    errors = [0.0] * len(learner.seeds)
    for k, d in enumerate(data):
        total = 0.0
        for obs, action in zip(d.obs.split(4096), d.action.split(4096), strict=True):
            s = (obs.to(learner.device) - learner.obs_mean) / learner.obs_std  # (S, rows, d)
            total += ((learner.agent.mean(s) - action.to(learner.device)) ** 2).mean(-1).sum(-1)
        errors[k :: len(data)] = (total / len(d)).tolist()[k :: len(data)]
    learner.agent.train()
    return errors


# --- collecting a testbed folder ---
#
# FOLDER/<domain>/<source>/index.json   {"format": 1, "settings": {...}, "files": {shard: sha256}}; the end
# FOLDER/<domain>/<source>/00000.npz    episodes (E, T + 1, ...): observation, action, reward_<task> of every
#                                       task (float32), physics (float64), terminated (bool); row t of action,
#                                       reward and terminated belongs to t - 1 -> t, row 0 is zero


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
        self.optimizer = adam(self.guess.parameters(), rate)

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
    (folder,), (domain, task) = data_folders(run.cfg, run), source.split("/")
    nets = {"actor": run.cfg.collect_net, "critic": run.cfg.collect_net}
    cfg, names = replace(run.cfg, algo="td3bc", bc_coef=0.0, **nets), DOMAINS[domain]
    first, n = names[0] if task == "rnd" else task, cfg.collect_envs
    envs = common.vector_env(
        [functools.partial(TestbedEnv, domain, first, cfg.repeat)] * n, n > 1, autoreset=False
    )
    width, actions = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent = Agent(cfg, [cfg.seed], width, actions).to(run.device)
    optimizers = {k: adam(getattr(agent, k).parameters(), cfg.lr) for k in ("actor", "critic")}
    novelty = Novelty(width, run.device, cfg.lr) if task == "rnd" else None
    replay = Replay(cfg.collect_episodes * cfg.collect_steps // cfg.repeat, run.device)
    state = {"agent": agent, "replay": replay} | {f"{k}_optimizer": o for k, o in optimizers.items()}
    state |= {"novelty": novelty, "novelty_optimizer": novelty.optimizer} if novelty else {}
    draw, steps = run.generator("online"), cfg.collect_steps // cfg.repeat
    rounds = -(-cfg.collect_episodes // n)
    normal = lambda *shape: torch.randn(shape, generator=draw).to(run.device)  # noqa: E731
    for k in run.steps(rounds, save_every=max(1, rounds // 20), **state):
        obs, info = envs.reset(seed=common.stable_hash(f"{run.stream('reset')}/{k}") % 2**31)
        rows, numbers = [(obs, np.zeros((n, actions)), np.zeros((n, len(names))), info["physics"])], {}
        for t in range(steps):
            if k:
                with torch.no_grad():
                    mean = agent.mean(torch.as_tensor(obs, device=run.device)[None])[0]
                action = squash(mean, cfg.std * normal(n, actions)).cpu().numpy()
            else:
                action = (torch.rand(n, actions, generator=draw) * 2 - 1).numpy()
            following, _, terminated, _, info = envs.step(action)
            rows.append((following, action, info["rewards"], info["physics"]))
            reward = np.float32(info["rewards"][:, names.index(first)])
            live = np.float32(~terminated)
            replay.add(obs=obs, action=np.float32(action), reward=reward, next=following, live=live)
            obs, clock, share = following, k * steps + t, n * cfg.collect_updates
            for _ in range(int((clock + 1) * share) - int(clock * share) if k else 0):
                batch = {name: x[None] for name, x in replay.sample(cfg.batch, draw).items()}
                if novelty:
                    batch["reward"] = novelty(batch["next"])
                out = update(agent, optimizers, batch, batch, normal(2, 1, cfg.batch, actions), cfg)
                numbers = {name: out[name].mean() for name in ("critic_loss", "actor_loss")}
        observation, action, rewards, physics = (np.stack(x, 1) for x in zip(*rows, strict=True))
        shard = {"observation": observation, "action": np.float32(action), "physics": physics}
        shard |= {f"reward_{name}": np.float32(rewards[..., i]) for i, name in enumerate(names)}
        shard["terminated"] = np.zeros(observation.shape[:2], bool)  # these tasks end by time only
        write_shard(folder / source / f"{k:05d}.npz", shard)
        score = float(rewards[..., names.index(first)].sum(1).mean() * cfg.repeat)
        run.log(k, episode_return=score, **numbers)
    envs.close()
    if lost := [k for k in range(rounds) if not (folder / source / f"{k:05d}.npz").exists()]:
        raise UserError(
            f"{folder / source}: {len(lost)} shards have been deleted; collect it without --resume"
        )
    write_index(folder / source, rounds, cfg)
    return {"transitions": rounds * n * steps}


def write_shard(path: Path, shard: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_atomic(path, lambda file: np.savez(file, **shard))


def collect_settings(cfg: Config) -> dict:
    """What decides the contents of a data folder."""
    names = [f.name for f in dataclasses.fields(cfg) if f.name.startswith(("collect_", "gait_"))]
    if cfg.collect_with == "td3":
        names += ["lr", "batch", "discount", "tau", "std", "noise_clip", "critics", "pessimism"]
    return common.finite_or_null({name: getattr(cfg, name) for name in ("seed", "repeat", *names)})


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_index(source: Path, count: int, cfg: Config) -> None:
    """The file that makes a source of `count` shards complete."""
    files = {name: digest(source / name) for name in (f"{k:05d}.npz" for k in range(count))}
    common.write_json(source / "index.json", {"format": 1, "settings": collect_settings(cfg), "files": files})


def read_index(source: Path) -> dict:
    """The index of a source; UserError if there is none, or one of something else."""
    try:
        index = json.loads((source / "index.json").read_text())
        if index["format"] == 1 and index["files"] and index["settings"]:
            return index
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise UserError(f"{source / 'index.json'} is missing or broken: --collect has not ended there")


def verified(source: Path) -> tuple[list[Path], dict]:
    """The files of a source, after a look at their checksums, and the settings they were collected with."""
    index = read_index(source)
    for name, expected in index["files"].items():
        if not (source / name).exists() or digest(source / name) != expected:
            raise UserError(f"{source / name} is missing or broken; delete {source} and --collect again")
    return [source / name for name in index["files"]], index["settings"]


def complete(source: Path, cfg: Config) -> bool:
    """Whether the source is there; UserError if it is there with other settings or a broken file."""
    if not (source / "index.json").exists():
        return False
    found = verified(source)[1]
    if changed := [k for k, v in collect_settings(cfg).items() if found.get(k) != v]:
        raise UserError(f"{source / 'index.json'} was collected with other values of {', '.join(changed)}")
    return True


def data_folders(cfg: Config, run: Run) -> dict[Path, int]:
    """{folder: seed} of the data: --data, or, made by this run, one for each seed (the others share one)."""
    root = run.folder.parents[run.name.count("/")] if run.name else run.folder
    if cfg.data or cfg.collect:
        return {Path(cfg.data or root / "data").expanduser(): cfg.seed}
    return {root / "data" / f"seed{seed}": seed for seed in seed_list(cfg)}


def collect(cfg: Config, run: Run) -> dict[str, float]:
    """Fill the data folders, one job a source; what is complete is kept. Returns the throughput."""
    domains = sorted({split_task(name)[0] for name in cfg.tasks})
    if cfg.collect_with == "gait" and domains != ["cheetah"]:
        raise UserError(
            "--collect_with gait knows only the cheetah; use --collect_with td3 for other domains"
        )
    sources, folders = [f"{d}/{t}" for d in domains for t in (*DOMAINS[d], "rnd")], data_folders(cfg, run)
    todo = [s for s in sources if not all(complete(f / s, cfg) for f in folders)]
    run.barrier()  # all have looked before anyone writes
    stage, begin = run.stage("collect"), time.time()
    for source in todo if run.is_main else ():
        (stage.folder / source / "result.json").unlink(missing_ok=True)  # its data have been deleted
    run.barrier()
    made = stage.jobs(todo, collect_gait if cfg.collect_with == "gait" else collect_td3)
    if not made:
        run.print(f"{', '.join(map(str, folders))}: complete")
        return {}
    run.table([{"source": s, **m} for s, m in made.items()], "collected", keep=False)
    count = len(folders) * sum(m["transitions"] for m in made.values())
    return {"collected_transitions_per_s": count / (time.time() - begin)}


# --- the grid ---

REFERENCE_RETURNS = {  # of a random and an expert policy, as published with D4RL
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
}
GYMNASIUM = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4"}


def row_changes(cfg: Config) -> dict[str, dict]:
    """{row: settings that it changes}."""
    return {name: change(cfg) for name, change in ROWS.items()}


def seed_list(cfg: Config) -> list[int]:
    return list(range(cfg.seed, cfg.seed + cfg.seeds))


def targets(cfg: Config) -> list[str]:
    """The tasks of the grid: those of the testbed, or the one data set that --data names."""
    if cfg.data.startswith("minari:"):
        return [cfg.data.removeprefix("minari:").replace("/", ".")]
    return [Path(cfg.data).stem] if one_file(cfg.data) else list(cfg.tasks)


def grid(cfg: Config) -> list[str]:
    """Job names task/split/row, those that take longest first."""
    jobs = [(t, s, r) for t in targets(cfg) for s in cfg.splits for r in cfg.rows]
    jobs += [(t, cfg.splits[-1], r) for t in targets(cfg) for r in cfg.more_rows if r not in cfg.rows]
    work = {r: cost(replace(cfg, **change), jobs[0][0])["GFLOP"] for r, change in row_changes(cfg).items()}
    return ["/".join(job) for job in sorted(dict.fromkeys(jobs), key=lambda job: -work[job[2]])]


def evaluation_envs(cfg: Config, task: str, count: int):
    """Environments in which a data set's policies are scored, None where there are none for it here."""
    if cfg.data.startswith("minari:"):
        import minari

        data = minari.load_dataset(cfg.data.removeprefix("minari:"))
        return common.vector_env([functools.partial(minari_env, data)] * count)
    if one_file(cfg.data):
        if name := GYMNASIUM.get(d4rl_name(task)):
            return common.vector_env([functools.partial(gymnasium.make, name)] * count)
        task = task.rpartition("__")[2]  # <data set>__<domain_task>.hdf5
        if task.partition("_")[2] not in DOMAINS.get(task.partition("_")[0], ()):
            return None
    domain, name = split_task(task)
    if domain == "cheetah":
        return Cheetah(count, name, cfg.repeat)
    return common.vector_env([functools.partial(TestbedEnv, domain, name, cfg.repeat, every=False)] * count)


def minari_env(data) -> gymnasium.Env:
    """The environment of a Minari data set, with the flat observations of `load_minari`."""
    env = data.recover_environment(eval_env=True)
    if not isinstance(env.observation_space, gymnasium.spaces.Dict):
        return env
    widths = [env.observation_space[k].shape[0] for k in GOAL_KEYS]
    space = gymnasium.spaces.Box(-np.inf, np.inf, (sum(widths),))
    return gymnasium.wrappers.TransformObservation(env, flat_goal, space)


def d4rl_name(text: str) -> str | None:
    """halfcheetah, hopper, walker2d or antmaze, if a file or task is called so in any spelling."""
    plain = re.sub("[^a-z0-9]", "", text.lower())
    return next((name for name in REFERENCE_RETURNS if name in plain), None)


def normalized_score(returns: np.ndarray, task: str) -> np.ndarray:
    """D4RL's 100 (R - random) / (expert - random) where the reference returns are published, else R."""
    if (name := d4rl_name(task)) is None:
        return returns
    low, high = REFERENCE_RETURNS[name]
    return 100 * (returns - low) / (high - low)


def train_arm(name: str, run: Run) -> dict:
    """One task, mixture and row of the table, all seeds side by side."""
    task, split, row = name.split("/")
    cfg, target = replace(run.cfg, **row_changes(run.cfg)[row]), task.partition("_")[2]
    train, test, notes = [], [], set()
    for folder in [cfg.data] if cfg.data else data_folders(cfg, run):
        data = load_data(str(folder), task, cfg.repeat)
        notes |= set(validate(data, str(folder), cfg.clip_actions))
        train.append(data.select(split_sources(split, target, data.sources)).held_out(cfg.held_out)[0])
        test.append((data.select([target]) if target in data.sources else data).held_out(cfg.held_out)[1])
    learner = Learner(cfg, seed_list(cfg), train, run.device)
    envs = evaluation_envs(cfg, task, cfg.seeds * cfg.episodes)
    if envs and envs.single_observation_space.shape != train[0].obs.shape[1:]:
        shapes = f"{train[0].obs.shape[1]} numbers, the environment's {envs.single_observation_space.shape}"
        raise UserError(f"{cfg.data}: observations of {shapes}")
    starts = evaluation_starts(cfg, task, test if isinstance(envs, Cheetah) else [])
    result = fit(learner, envs, starts, run)
    result |= {"parameters": sum(p.numel() for p in learner.agent.actor.parameters()) // cfg.seeds}
    dead = learner.diverged.cpu().numpy() >= 0
    weight = learner.source_weight / learner.source_weight.sum(1, keepdim=True)
    weight[learner.diverged >= 0] = math.nan
    result |= {"weight": dict(zip(train[0].sources, weight.T.tolist(), strict=True)), "notes": sorted(notes)}
    result["diverged"] = learner.diverged.tolist()
    if len(test[0]):
        result["imitation_error"] = np.where(dead, math.nan, imitation_error(learner, test)).tolist()
    returns = score(learner, envs, starts) if envs else {}
    result["returns"] = {
        k: normalized_score(r, task if one_file(cfg.data) else "").tolist() for k, r in returns.items()
    }
    return result


def fit(learner: Learner, envs, starts: dict, run: Run) -> dict:
    """Train, log, evaluate on the way, set seeds aside that diverge: not finite, or |Q| beyond the limit."""
    cfg, done, begin = learner.cfg, 0, time.perf_counter()
    for step in run.steps(cfg.updates, **learner.state()):
        out, done = learner.step(step), done + 1
        saves, looks = (step + 1) % cfg.save_every == 0, cfg.eval_every and (step + 1) % cfg.eval_every == 0
        if step % cfg.log_every and step != run.last and not (saves or looks or run.signals):
            continue
        values = dict(zip(out, torch.stack(list(out.values())).tolist(), strict=True))  # one sync
        dead = [d >= 0 for d in learner.diverged.tolist()]
        for i in range(cfg.seeds):
            finite = all(math.isfinite(v[i]) for v in values.values())
            if finite and values.get("q_max", [0.0] * cfg.seeds)[i] <= learner.limit:
                continue
            if not dead[i]:
                print(
                    f"{run.name}: seed {cfg.seed + i} diverged at update {step}; the others go on", flush=True
                )
            learner.retire(i, step)
            dead[i] = True
        alive = [i for i in range(cfg.seeds) if not dead[i]]
        numbers = {k: sum(v[i] for i in alive) / len(alive) for k, v in values.items() if alive}
        if looks and envs and alive:
            with run.timed("evaluation"):
                numbers |= {f"return {k}": np.nanmean(r) for k, r in score(learner, envs, starts).items()}
        run.log(step, **numbers)
        if not alive:
            run.last = step
    seconds = time.perf_counter() - begin - run.seconds.get("evaluation", 0.0)  # the last step was synced
    return {"updates_per_s": done * cfg.seeds / seconds if done else None, "updates": run.last + 1}


def evaluation_starts(cfg: Config, task: str, test: Sequence[Transitions]) -> dict[str, tuple]:
    """{name: (seed, options of reset)}, alike for all rows and mixtures of a task.

    From a reset, and, with held-out data (`test`) that have physics, from states in the second halves of
    their episodes: the target task's own where there are such, else all. Only the cheetah can start there.
    """
    seed = {k: common.stable_hash(f"{cfg.seed}/{task}/{k}") % 2**31 for k in ("reset", "mid")}
    starts = {"reset": (seed["reset"], None)}
    if test and all(len(t) and t.physics is not None for t in test):
        rng, states = np.random.default_rng(seed["mid"]), []
        for i in range(cfg.seeds):
            data = test[i % len(test)]
            place = np.arange(len(data)) - torch.searchsorted(data.episode, data.episode).numpy()
            later = data.physics[place >= place.max() / 2]
            states.append(later[rng.integers(len(later), size=cfg.episodes)])
        starts["mid"] = (seed["mid"], {"physics": np.concatenate(states)})
    return starts


def score(learner: Learner, envs, starts: dict[str, tuple]) -> dict[str, np.ndarray]:
    """Mean return of each seed's policy (S,) by start and number of sampled actions, e.g. "reset 50"."""
    cfg, out = learner.cfg, {}
    for name, (seed, options) in starts.items():
        for count in sorted({1, cfg.es} if cfg.algo != "bc" else {1}):  # cloning has no critic to ask
            returns = evaluate(learner, envs, count, seed, options).mean(1)
            out[f"{name} {count}"] = np.where(learner.diverged.cpu().numpy() >= 0, math.nan, returns)
    return out


# --- what comes out ---


class Results:
    """The grid's results as arrays over tasks and seeds, NaN for seeds that diverged."""

    def __init__(self, cfg: Config, jobs: dict[str, dict]):
        self.cfg, self.jobs = cfg, jobs
        names = [m for r in jobs.values() for m in r["returns"]]
        self.measures = ["imitation_error", *dict.fromkeys(names)]

    def __call__(self, split: str, row: str, measure: str, task: str | None = None) -> np.ndarray:
        """(tasks x seeds,) or, of one task, (seeds,); empty where it was not measured."""
        found = []
        for t in [task] if task else targets(self.cfg):
            job = self.jobs.get(f"{t}/{split}/{row}", {})
            found += (job.get("returns", {}) | job).get(measure, [])
        return np.array(found, float)


def mean_and_error(x: np.ndarray) -> str | None:
    """mean +- standard error, without NaN."""
    x = x[np.isfinite(x)]
    if not len(x):
        return None
    return f"{x.mean():.3g}" + (f" +- {x.std(ddof=1) / math.sqrt(len(x)):.2g}" if len(x) > 1 else "")


def report(cfg: Config, run: Run, jobs: dict[str, dict]) -> None:
    """The table of all arms, the differences that added data make, the claims, the figure."""
    results, lines, narrow, wide = Results(cfg, jobs), [], cfg.splits[0], cfg.splits[-1]
    for note in sorted({note for job in jobs.values() for note in job["notes"]}):
        run.print(f"note: {note}")
    order = [(t, s, r) for t in targets(cfg) for s in cfg.splits for r in ROWS if f"{t}/{s}/{r}" in jobs]
    for task, split, row in order:
        job = jobs[f"{task}/{split}/{row}"]
        line = {"task": task, "data": split, "row": row, "actor parameters": job["parameters"]}
        line |= {m: mean_and_error(results(split, row, m, task)) for m in results.measures}
        weight = job["weight"].get(task.partition("_")[2])
        line["target's weight"] = weight and mean_and_error(np.array(weight, float))
        lines.append(line | {"diverged": sum(step >= 0 for step in job["diverged"]) or None})
    run.table(lines, f"mean +- s.e. over {cfg.seeds} seeds; returns by start and number of sampled actions")
    if narrow == wide or len(results.measures) == 1:
        return
    lines = []
    for row in (r for r in ROWS if r in cfg.rows):
        change = {m: results(wide, row, m) - results(narrow, row, m) for m in results.measures[1:]}
        lines.append({"row": row} | {m: mean_and_error(x) for m, x in change.items()})
    if lines:
        run.table(lines, f"what adding data does: {wide} minus {narrow}, paired by seed")
    if {"baseline", "big_actor"} <= set(cfg.rows):
        claims(cfg, run, results)
        run.figure("mood", functools.partial(plot, cfg, results), (11, 3.6))


def claims(cfg: Config, run: Run, results: Results) -> None:
    """The paper's sentences, paired by task and seed; a pair with a seed that diverged is left out."""
    narrow, wide = cfg.splits[0], cfg.splits[-1]

    def claim(text: str, ours: tuple | np.ndarray, theirs: tuple | np.ndarray, better: str) -> None:
        a, b = (results(*x) if isinstance(x, tuple) else x for x in (ours, theirs))
        if len(a) and len(a) == len(b) and (keep := np.isfinite(a) & np.isfinite(b)).any():
            run.claim(text, a[keep], b[keep], better)

    for start, where in (("reset", "from resets"), ("mid", "from the target's own states")):
        one, best = f"{start} 1", f"{start} {cfg.es}"
        small, big, same = (wide, "baseline", one), (wide, "big_actor", one), (narrow, "baseline", one)
        claim(f"adding data lowers the small actor's return {where}", small, same, "lower")
        claim(f"on the mixture a larger actor returns more {where}", big, small, "higher")
        claim(f"... than a larger critic does {where}", big, (wide, "big_critic", one), "higher")
        if set(BETAS) <= {*cfg.rows, *cfg.more_rows}:
            mine, theirs = (picked([results(wide, r, one) for r in BETAS[k::2]]) for k in (1, 0))
            claim(f"... each size at its best of three temperatures {where}", mine, theirs, "higher")
        if cfg.es > 1:
            text = f"on the mixture the best of {cfg.es} samples returns more {where}"
            claim(text, (wide, "baseline", best), small, "higher")
    arms = [(wide, row, "imitation_error") for row in ("big_actor", "baseline", "bc_big_actor", "bc")]
    claim("on the mixture a larger actor imitates the target better", arms[0], arms[1], "lower")
    claim("... also by cloning alone", arms[2], arms[3], "lower")


def picked(arms: list[np.ndarray]) -> np.ndarray:
    """For each seed its return under the setting with the best mean over the other seeds: (n,)."""
    table = np.stack(arms)  # (settings, n)
    rest = [np.nan_to_num(np.delete(table, i, 1)).sum(1) for i in range(table.shape[1])]
    return np.array([table[r.argmax(), i] for i, r in enumerate(rest)])


def plot(cfg: Config, results: Results, figure) -> None:
    """First task: returns on each mixture by actor and samples; errors on the target's actions by row."""
    task, wide, place = targets(cfg)[0], cfg.splits[-1], np.arange(len(cfg.splits))
    titles = {"reset": "return from resets", "mid": "return from the target's own states"}
    starts = [k for k in titles if f"{k} 1" in results.measures]
    axes = figure.subplots(1, len(starts) + 1, squeeze=False)[0]
    bars = [(row, k) for row in ("baseline", "big_actor") for k in sorted({1, cfg.es})]
    for ax, start in zip(axes, starts, strict=False):
        for j, (row, k) in enumerate(bars):
            x = place + 0.8 * (j + 0.5) / len(bars) - 0.4
            found = [results(split, row, f"{start} {k}", task) for split in cfg.splits]
            label = {"baseline": cfg.actor, "big_actor": cfg.big_actor}[row] + (
                f", best of {k}" if k > 1 else ""
            )
            style = {"color": "C0" if row == "baseline" else "C1", "alpha": 0.5 if k > 1 else 1.0}
            ax.bar(x, [np.nanmean(r) for r in found], 0.8 / len(bars), label=label, **style)
            ax.plot(np.repeat(x, cfg.seeds), np.concatenate(found), ".", color="black", ms=3)
        ax.set_xticks(place, cfg.splits)
        ax.set_title(titles[start], fontsize=9)
        ax.set_ylim(0, 1.3 * ax.get_ylim()[1])
        ax.legend(fontsize=7, ncol=2, loc="upper right")
    errors = {row: results(wide, row, "imitation_error", task) for row in ROWS}
    errors = {row: e for row, e in errors.items() if len(e)}
    for j, e in enumerate(errors.values()):
        axes[-1].barh(j, np.nanmean(e), color="C2", alpha=0.6)
        axes[-1].plot(e, [j] * len(e), ".", color="black", ms=3)
    axes[-1].set_yticks(range(len(errors)), list(errors), fontsize=7)
    axes[-1].set_title(f"error on the target's actions, {wide}", fontsize=9)


DIMENSIONS = {"cheetah": (17, 6), "walker": (24, 6), "quadruped": (78, 12), "humanoid": (67, 21)}


def cost(cfg: Config, task: str) -> dict[str, float]:
    """Of a job: parameters of a seed's networks, MB on the device, estimated GFLOP of an update of all seeds.

    2 FLOP a parameter and row forward, 6 with the backward pass.
    """
    obs, actions = DIMENSIONS.get(task.rpartition("__")[2].partition("_")[0], (17, 6))
    iql, k = cfg.algo == "iql", cfg.samples
    with torch.device("meta"):
        nets = {"actor": network(cfg.actor, 1, obs, actions), "value": network(cfg.value, 1, obs, 1)}
        nets["critics"] = network(cfg.critic, cfg.critics, obs + actions, 1)
    n = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    n["value"] *= iql
    passes = 3 * n["actor"] + 4 * n["value"]
    if cfg.algo != "bc":  # targets 1, training 3, advantage 1 + K
        gain = 0 if iql and cfg.iql_advantage == "value" else 1 + k
        critic = 1 + 3 + {"td3bc": 2, "asac": 2 + 2 * k}.get(cfg.algo, gain)
        passes += critic * n["critics"] + n["actor"] * {"iql": 0, "asac": 3}.get(cfg.algo, 1)
    held = 16 * sum(n.values()) + 4 * n["critics"]  # weights, gradients, two moments; targets
    return n | {"MB": cfg.seeds * held / 1e6, "GFLOP": 2 * cfg.batch * cfg.seeds * passes / 1e9}


def dry_run(cfg: Config, run: Run) -> None:
    """Sizes, memory and FLOPs of the grid's jobs, without data."""
    jobs, changes = [job.split("/") for job in grid(cfg)], row_changes(cfg)
    costs = [{"task": t, "row": r} | cost(replace(cfg, **changes[r]), t) for t, _, r in jobs]
    shown = {(c["task"].partition("_")[0], c["row"]): c for c in costs}
    run.table(
        list(shown.values()), "a job by domain and row: parameters a seed, MB, GFLOP an update of all seeds"
    )
    shares = [len(jobs[r :: run.world_size]) for r in range(run.world_size)]
    run.print(f"{len(jobs)} jobs of {cfg.seeds} seeds and {cfg.updates} updates, {shares} by rank")
    run.print(f"{sum(c['GFLOP'] for c in costs) * 1e9 * cfg.updates:.3g} FLOP in all")
    rows = cfg.collect_episodes * (cfg.collect_steps // cfg.repeat)
    if one_file(cfg.data) or cfg.data.startswith("minari:"):
        return
    for domain, (obs, actions) in DIMENSIONS.items():
        if any(split_task(t)[0] == domain for t in cfg.tasks):
            size = rows * (2 * obs + actions + 2) * 4 / 1e9
            run.print(f"{domain}: {rows:,} transitions a source, {size:.2f} GB on the device")


FULL = ("baseline", "big_actor", "modern_actor", "iql", "iql_big_actor", "td3bc", "td3bc_big_actor")

CONFIGS = {
    "demo": Config(workers=2, log_every=1000, save_every=1000),
    "smoke": Config(
        config="smoke", seeds=2, splits=("same", "mixed+rnd"), rows=("baseline", "big_actor"),
        more_rows=("asac", "iql", "iql_value", "td3bc", "bc", "five_critics", "modern_actor"), actor="s8x2",
        big_actor="s16x2", modern_actor="m8x1", critic="s8x2", value="s8x2", big_critic="m8x1", samples=2,
        batch=16, updates=20, es=4, episodes=1, log_every=10, collect_episodes=10, collect_steps=40,
        gait_generations=2, gait_population=8,
    ),
    "gpu": Config(
        config="gpu", tasks=("cheetah_run_backward", "cheetah_run"), seeds=5, compile=True,
        splits=("same", "mixed+rnd"), rows=("baseline", "big_actor", "modern_actor"),
        more_rows=("big_critic", "five_critics", "asac", "iql", "iql_big_actor", "td3bc", "bc",
            "bc_big_actor"),
        big_actor="s1024x2", modern_actor="m1024x1", critic="s256x2", value="s256x2", big_critic="s1024x2",
        batch=512, updates=10_000, log_every=500, save_every=10_000, collect_episodes=400,
    ),
    "full": Config(
        config="full", tasks=tuple(f"{d}_{t}" for d, tasks in DOMAINS.items() for t in tasks), seeds=5,
        compile=True, splits=("same", "cross", "mixed", "mixed+rnd"), rows=FULL,
        more_rows=tuple(row for row in ROWS if row not in FULL),
        actor="s256x2", big_actor="s1024x2", modern_actor="m1024x2", critic="s256x2", big_critic="m1024x1",
        value="s1024x2", discount=0.99, beta=1.0, batch=1024, updates=2_000_000, lr=1e-4, decay=False,
        normalize=False, repeat=1, held_out=0.0, episodes=50, eval_every=500_000, log_every=10_000,
        save_every=50_000, collect_with="td3", collect_episodes=1000, collect_steps=1000,
        collect_net="s1024x2",
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    cfg = common.parse_config(CONFIGS, argv)
    with Run(cfg) as run:
        if cfg.dry_run:
            return dry_run(cfg, run)
        speed = {}
        if cfg.collect or not cfg.data:
            if cfg.collect_with == "td3" and not cfg.collect:
                wanted = "--data FOLDER: what --collect --data FOLDER builds, ExORL's, or a D4RL file"
                raise UserError(f"--config {cfg.config} needs {wanted}")
            speed = collect(cfg, run)
        if cfg.collect:
            folder = next(iter(data_folders(cfg, run)))
            run.print(
                f"\ntrain on it: python mood.py --data {folder} --repeat {cfg.repeat} --tasks {cfg.tasks[0]}"
            )
            return run.finish(**speed)
        jobs = run.jobs(grid(cfg), train_arm)
        report(cfg, run, jobs)
        rates = [job["updates_per_s"] for job in jobs.values() if job["updates_per_s"]]
        run.finish(**speed, updates_per_s=len(rates) / sum(1 / x for x in rates) if rates else None)


if __name__ == "__main__":
    main()
