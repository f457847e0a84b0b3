"""Serial Markov chain reasoning (SSPG): act by the steady state of a chain of Gaussian steps over actions.

Cetin, Celiktutan, "Policy Gradient With Serial Markov Chain Reasoning", NeurIPS 2022, arXiv 2210.06766.

The claim. A policy need not be one forward pass. An agent that keeps revising its action by a small stochastic
step (a BT-policy, an ordinary tanh-Gaussian that sees the state and its current belief) acts by the steady
state of that chain: any distribution, not only a Gaussian. It reasons longer where the decision is harder,
until parallel chains agree, and less where it can start from what it thought a moment ago.

State s, action a in [-1, 1]^A; kernel (mu, sigma)(s, a); L steps of reasoning, B of them live; N critics Q_c:
  eq. (1)  a_i = tanh u_i,  u_i = mu(s, a_{i-1}) + sigma(s, a_{i-1}) eps_i          the reasoning Markov chain
           Theorem: d E_p[Q] = E_{a ~ p} d E_{a' ~ kernel(a)} [sum_n E[Q(a_n) | a_0 = a'] - E_p[Q]], p the steady
           state. One step is differentiated, later ones run on frozen parameters: B steps are live.
  eq. (2)  log p(a_i) = logsumexp_j log N(u_i; mu_j, sigma_j) - log L - log |d tanh(u_i)|,  j over the chain
  eq. (3)  Q~ = mean_c Q_c - beta mean_{c != c'} |Q_c - Q_c'|                               a pessimistic value
  eq. (4)  y = r + gamma (Q~'(s', a_L) - alpha log p(a_L)),  loss = mean sum_c (Q_c(s, a) - y)^2 / 2
           the chain at s' starts from the replayed action a; Q' has Polyak averages of the parameters
  eq. (5)  loss = mean_i [alpha log p(a_i) - Q~(s, a_i)]       over all L actions; a_0 is the a_L of eq. (4)
  eq. (6)  loss = -log alpha mean_i [log p(a_i) + H]
  eq. (7)  R_k = sqrt((k - 1) / k + largest eigenvalue of W^-1 B),  W, B: covariance within, between M chains
           acting: reason until R_k < 1.1, from the M particles of the last decision on
  eq. (8)  kbar <- .99 kbar + .01 k;  L = ceil(kbar), and k is never below floor(kbar) - 1

How to run
  python rmc.py                                      the claim in miniature, with controls: two CPU cores
  python rmc.py --config full --env Humanoid-v4      the paper's MuJoCo setting: SSPG, GPL-SAC, SAC
  python rmc.py --config pixels --env dm:walker_run  its DeepMind Control setting, from pixels
  torchrun --nproc_per_node=8 rmc.py --config full --seeds 5      ranks take other rows and seeds

Departures from the paper's code
- R_k is exact; the code's symmetrised W^-1 B is not affine invariant and overestimates k (tests show it). Even
  i.i.d. samples need k > 2 in many dimensions: this floor is measured beside k.
- The pixel code thinks adaptively, discards it and acts by a fixed chain of 4; it counts evaluation and random
  steps in kbar, too. Here one chain acts, and training decisions alone are counted.
- Actions are fed as [-1, 1] everywhere; ensemble members are orthogonal each; target networks are not projected
  (averages of norm 1 have norm <= 1); log alpha's loss and the factor 1/2 are the same in both settings.
- Evaluation starts from fresh particles; the best of the last M is taken where the code searches all k M.
- An observation is stored once. A block of --save_every steps starts new episodes, so that resuming is exact.
- The demo's bandit and tracking tasks have exact critics and an annealed temperature, for the Gaussian, too:
  without annealing both collapse to a single mode. The bounded kernel of tracking is ours.

Reading order: Config, ROWS, Kernel, unroll, mixture_logp, the losses, psrf, think, update, train.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import wrappers
from gymnasium.spaces import Box
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

import common
from common import Claim, EnsembleLinear, Run, UserError


@dataclass
class Config(common.Config):
    # task
    env: str = "Pendulum-v1"  # gymnasium id, dm:domain_task, or ours: bandit, tracking
    envs: int = 8  # environments that step together (E)
    steps: int = 1200  # steps of all of them
    random_steps: int = 125  # of these, with uniform actions and no updates
    pixels: int = 0  # side of the camera's picture, for dm: tasks; 0: the state
    stack: int = 1  # frames in an observation
    repeat: int = 1  # times that a dm: task repeats an action
    nstep: int = 1  # rewards in a target
    discount: float = 0.99  # gamma
    reward_scale: float = 0.1  # factor on rewards in training
    capacity: int = 1_000_000  # observations kept, over all environments
    # networks
    critics: int = 3  # ensemble (N)
    width: int = 64  # of hidden layers
    features: int = 50  # that actor and critics read from a picture
    log_std: tuple[float, float] = (-10.0, 2.0)  # range of log sigma
    bound: float = 0.0  # largest change of u by a step of reasoning; 0: any
    # reasoning
    chain: bool = True  # False: the kernel sees no action, so one step is SAC's Gaussian
    live: int = 2  # steps of a training chain whose parameters get gradients (B)
    length: int = 0  # of training chains (L); 0: as many as acting needs, ceil(kbar)
    unbiased: bool = False  # leave a_i's own kernel out of log p(a_i)
    actor_start: Literal["target", "replay"] = "target"  # a_0 of eq. (5): last action of eq. (4), or replayed
    particles: int = 64  # parallel chains when acting (M)
    max_steps: int = 16  # of reasoning for an action
    threshold: float = 1.1  # of R_k, to stop
    first_kbar: float = 4.0  # where the average number of steps begins
    decay: float = 0.99  # of that average, a decision
    memory: bool = True  # reason on from the last decision's particles; False: from uniform ones
    # learning
    updates: int = 4  # critic updates a step of the environments
    actor_every: int = 2  # critic updates to an update of actor and temperature
    batch: int = 128  # transitions an update
    lr: float = 1e-3  # Adam, for all
    tau: float = 0.01  # share of the critics that the target takes up in an update
    clip: float = 40.0  # largest norm of the actor's gradient; 0: any
    beta_target: float = 0.75  # pessimism in eq. (4)
    beta_actor: float = 0.5  # pessimism in eq. (5); with two critics 0.5 is their minimum
    alpha: float = 0.2  # first temperature
    anneal: float = 0.0  # share of the run in which alpha falls to 1, geometrically; 0: it is learned
    target_entropy: float | None = None  # H in nats; None: the paper's for the task, else -A
    entropy_start: float = 0.5  # H an action dimension at first, with entropy_steps
    entropy_steps: int = 0  # steps of H from there to its final value; 0: none
    # evaluation
    eval_every: int = 300  # steps between two evaluations
    episodes: int = 16  # an evaluation
    best: bool = False  # act by the particle of highest value in evaluation, not by a random one

    def check(self):
        super().check()
        if min(self.particles, self.max_steps) < 2:
            raise UserError("--particles and --max_steps must be 2 or more: R_k compares chains over time")
        if self.unbiased and self.length == 1:
            raise UserError("--unbiased needs another kernel: --length must be 2 or more, or 0")
        if self.pixels and not self.env.startswith("dm:"):
            raise UserError(f"--pixels: {self.env} has no camera here; take a dm:domain_task")
        if self.share == "run":
            raise UserError("--share run: networks this small fit one device; ranks take cells (grid)")
        make_envs(self, 1).close()


# the paper's target entropies; -A for other tasks
ENTROPY = {
    "Hopper": -1,
    "HalfCheetah": -3,
    "Walker2d": -3,
    "Ant": -4,
    "Humanoid": -2,
    "InvertedPendulum": -0.05,
}

ONE_STEP_TASKS = ("bandit", "tracking")  # ours; their value is exact, so they have no critics to learn
ONE_STEP = dict(discount=0.0, reward_scale=1.0, updates=2, actor_every=1, random_steps=1, eval_every=10**6)
BANDIT = ONE_STEP | dict(env="bandit", alpha=20.0, anneal=0.6, log_std=(-5.0, 1.0), capacity=4096)
TRACKING = ONE_STEP | dict(
    env="tracking", alpha=10.0, anneal=0.5, log_std=(-5.0, -1.5), length=4, capacity=4096
)
# a row of the table is the settings that it changes: the difference of two rows is an idea of the paper
ROWS = {
    "SSPG": {},
    "GPL-SAC": dict(chain=False),
    "SAC": dict(chain=False, critics=2, beta_target=0.5, updates=1, actor_every=1),
    "bandit: chain": BANDIT,
    "bandit: all steps live": BANDIT | dict(live=16),
    "bandit: Gaussian": BANDIT | dict(chain=False),
    "tracking: bounded": TRACKING | dict(bound=0.3),
    "tracking: unrestricted": TRACKING,
}
DEMO_ROWS = tuple(row for row in ROWS if row != "SAC")
DEMO = Config(seeds=5, ranks=2, rows=DEMO_ROWS, log_every=50, save_every=600)
FULL = replace(
    DEMO,
    ranks=1,
    rows=("SSPG", "GPL-SAC", "SAC"),
    env="Hopper-v4",
    envs=1,
    steps=125_000,
    random_steps=5000,
    reward_scale=1.0,
    critics=10,
    width=256,
    updates=20,
    actor_every=20,
    batch=256,
    lr=3e-4,
    tau=0.005,
    alpha=1.0,
    eval_every=1000,
    episodes=10,
    compile=True,
    save_every=25_000,
)
CONFIGS = {
    "smoke": replace(
        DEMO, ranks=1, seeds=1, rows=tuple(ROWS), steps=8, random_steps=2, particles=8, width=16, batch=8
    ),
    "demo": DEMO,
    "gpu": replace(FULL, steps=30_000, rows=("SSPG", "GPL-SAC"), seeds=2, ranks=4, eval_every=5000),
    "full": FULL,
    "pixels": replace(
        FULL,
        env="dm:quadruped_run",
        envs=2,
        steps=775_000,
        random_steps=1000,
        pixels=84,
        stack=3,
        repeat=2,
        nstep=3,
        capacity=100_000,
        critics=2,
        width=1024,
        actor_start="replay",
        updates=1,
        actor_every=1,
        lr=1e-4,
        tau=0.01,
        clip=0.0,
        beta_actor=0.75,
        alpha=0.1,
        entropy_steps=250_000,
        eval_every=2500,
        best=True,
    ),
}
CLAIMS = [
    Claim(
        "the chain is closer to distributions of 2, 4 and 8 modes than a Gaussian (soft-value gap, nats)",
        "gap",
        "bandit: chain",
        "bandit: Gaussian",
        "lower",
    ),
    Claim("... also by the W2 distance", "w2", "bandit: chain", "bandit: Gaussian", "lower"),
]


# --- tasks ---

MODES = (1, 2, 4, 8)  # numbers of goals, one-hot in an observation
JUMPS = (0.0, 0.6, 1.2, 2.4, math.pi)  # turns of the goal that reasoning is measured after
SPREAD, RADIUS = 0.1, 0.65  # of a goal's Gaussian, of the circle that goals lie on


def goal_places(obs: Tensor) -> tuple[Tensor, Tensor]:
    """n (...), and the goals (..., 8, 2) of observations (..., 6), of which the first n count."""
    n = obs[..., :4] @ obs.new_tensor(MODES)
    slot = torch.arange(max(MODES), device=obs.device)
    angle = torch.atan2(obs[..., 5], obs[..., 4])[..., None] + 2 * math.pi * slot / n[..., None]
    return n, RADIUS * torch.stack([angle.cos(), angle.sin()], -1)


def goal_reward(obs: Tensor, action: Tensor) -> Tensor:
    """Log-density of an equal mixture of n Gaussians on a circle: obs (..., 6), action (..., 2) -> (...).

    With alpha = 1 the mixture is the best MaxEnt policy, of soft value 0.
    """
    n, goals = goal_places(obs)
    distance = (action[..., None, :] - goals).square().sum(-1) / (2 * SPREAD**2)
    absent = torch.arange(max(MODES), device=obs.device) >= n[..., None]
    logits = (-distance).masked_fill(absent, -torch.inf)
    return logits.logsumexp(-1) - n.log() - math.log(2 * math.pi * SPREAD**2)


def goal_sample(obs: Tensor, count: int) -> Tensor:
    """`count` samples (count, 2) of the mixture of one observation (6,)."""
    n, goals = goal_places(obs)
    slot = torch.randint(int(n), (count,), device=obs.device)
    return goals[slot] + SPREAD * torch.randn(count, 2, device=obs.device)


class Goals(gymnasium.vector.VectorEnv):
    """One-step tasks without an end. Environment i has MODES[i] goals turned by `phi`; if that is None, one
    goal each, turned anew after every step. Observations are (one-hot n, cos phi, sin phi).
    """

    def __init__(self, count: int, phi: float | None):
        self.num_envs, self.fixed = count, phi
        self.single_observation_space = Box(-1.0, 1.0, (6,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, (2,), np.float32)

    def _observe(self):
        kinds = torch.arange(self.num_envs) % (1 if self.fixed is None else len(MODES))
        phi = np.full(self.num_envs, self.fixed)
        if self.fixed is None:
            phi = self.random.uniform(-math.pi, math.pi, self.num_envs)
        self.obs = goal_observation(kinds, torch.as_tensor(phi))
        return self.obs.numpy()

    def reset(self, *, seed=None, options=None):
        self.random = np.random.default_rng(seed)
        return self._observe(), {}

    def step(self, actions):
        reward = goal_reward(self.obs, torch.as_tensor(actions)).numpy()
        never = np.zeros(self.num_envs, bool)
        return self._observe(), reward, never, never, {}


def goal_observation(kinds: Tensor, phi: Tensor) -> Tensor:
    """Observations (E, 6) of MODES[kinds] goals turned by phi: (E,) each."""
    return torch.cat([F.one_hot(kinds, len(MODES)), phi.cos()[:, None], phi.sin()[:, None]], 1).float()


class Dm(common.DmControl):
    """A dm_control task with repeated actions; with `side`, seen through its camera.

    A picture is uint8 (3 stack, side, side): the last `stack` frames, the first one repeated at a start.
    """

    def __init__(self, cfg: Config, domain: str, task: str):
        self.side, self.stack, self.camera = cfg.pixels, cfg.stack, 2 * (domain == "quadruped")
        super().__init__(domain, task)
        self.env.step = functools.partial(repeat, self.env.step, cfg.repeat)
        if self.side:
            self.observation_space = Box(0, 255, (3 * cfg.stack, cfg.pixels, cfg.pixels), np.uint8)

    def _read(self, step):
        if not self.side:
            return super()._read(step)
        frame = self.env.physics.render(self.side, self.side, camera_id=self.camera).transpose(2, 0, 1)
        self.frames = [frame] * self.stack if step.first() else [*self.frames[1:], frame]
        return np.concatenate(self.frames), {}


def repeat(step, times: int, action: np.ndarray):
    """`times` steps of dm_control with one action, or up to the end; rewards are added."""
    reward = 0.0
    for _ in range(times):
        now = step(action)
        reward += now.reward
        if now.last():
            break
    return now._replace(reward=reward)


def make_env(cfg: Config) -> gymnasium.Env:
    """One environment with actions in [-1, 1] and a flat or pictured observation; UserError if it has none."""
    dm = re.fullmatch(r"dm:(ball_in_cup|point_mass|humanoid_CMU|[^_]+)_(\w+)", cfg.env)
    if re.search("-v[23]$", cfg.env):
        raise UserError(f"--env {cfg.env}: gymnasium has {cfg.env[:-1]}4 (like v2) and {cfg.env[:-1]}5")
    try:
        env = Dm(cfg, *dm.groups()) if dm else gymnasium.make(cfg.env)
    except UserError:
        raise
    except Exception as e:  # the libraries raise a dozen kinds
        raise UserError(
            f"--env {cfg.env} cannot be made ({e}); pictures need MUJOCO_GL=egl or osmesa"
        ) from None
    action, obs = env.action_space, env.observation_space
    if not isinstance(action, Box) or not action.is_bounded():
        raise UserError(f"--env {cfg.env}: actions must be a bounded Box, not {action}")
    if not isinstance(obs, Box) or len(obs.shape) not in (1, 3):
        raise UserError(f"--env {cfg.env}: observations must be a vector or a picture, not {obs}")
    env = wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env if cfg.pixels else wrappers.DtypeObservation(env, np.float32)


def make_envs(cfg: Config, count: int) -> gymnasium.vector.VectorEnv:
    """`count` environments; after an episode's end the next step ignores its action and starts a new one."""
    if cfg.env in ONE_STEP_TASKS:
        phi = np.random.default_rng(cfg.seed).uniform(-math.pi, math.pi)
        return Goals(count, phi if cfg.env == "bandit" else None)
    return gymnasium.vector.SyncVectorEnv([functools.partial(make_env, cfg)] * count)


# --- replay ---


class Batch(NamedTuple):
    """Transitions: obs (B, ...), action (B, A), reward (B,), discount (B,), next_obs, and which count (B,)."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_obs: Tensor
    live: Tensor


def sample(replay: common.Replay, cfg: Config) -> Batch:
    """`cfg.batch` n-step transitions from rows (T, E, ...) of time; frames are stacked by index.

    Row t has the newest frame of the observation, the action, and what followed. The row after an episode's
    end has its last observation and no transition (live = 0); `age` counts steps since the episode began.
    """
    rows, device = replay.capacity, replay.added.device
    oldest = (replay.added - rows + cfg.stack - 1).clamp(min=0)
    share = torch.rand(cfg.batch, dtype=torch.float64, device=device)
    t = oldest + (share * (replay.added - cfg.nstep - oldest)).long()
    env = torch.randint(replay.reward.shape[1], (cfg.batch,), device=device)

    def observation(t):
        back = torch.arange(cfg.stack - 1, -1, -1, device=device)
        when = t[:, None] - torch.minimum(back, replay.age[t % rows, env][:, None])
        return replay.frame[when % rows, env[:, None]].flatten(1, 2)

    reward = torch.zeros(cfg.batch, device=device)
    going, end = torch.ones_like(env, dtype=torch.bool), t
    for i in range(cfg.nstep):
        reward += going * cfg.discount**i * replay.reward[end % rows, env]
        end = end + going
        going = going & ~replay.done[(end - 1) % rows, env]
    discount = cfg.discount ** (end - t) * ~replay.terminated[(end - 1) % rows, env]
    action, live = replay.action[t % rows, env], replay.live[t % rows, env]
    return Batch(observation(t), action, reward, discount.float(), observation(end), live)


# --- networks ---


class Encoder(nn.Module):
    """DrQ-v2's four convolutions: pictures (B, C, H, W) in bytes -> features (B, F)."""

    def __init__(self, channels: int):
        super().__init__()
        sizes = [(channels, 2), (32, 1), (32, 1), (32, 1)]
        self.layers = nn.ModuleList(nn.Conv2d(inputs, 32, 3, stride) for inputs, stride in sizes)
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, 2**0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, picture: Tensor) -> Tensor:
        x = picture / 255 - 0.5
        for layer in self.layers:
            x = layer(x).relu_()
        return x.flatten(1)


def random_shift(picture: Tensor, pad: int = 4) -> Tensor:
    """Each picture (B, C, H, W) moved by up to `pad` pixels both ways, its border repeated."""
    for axis in (2, 3):
        size = picture.shape[axis]
        shift = torch.randint(-pad, pad + 1, (len(picture), 1), device=picture.device)
        where = (torch.arange(size, device=picture.device) + shift).clamp(0, size - 1)
        where = where[:, None, :, None] if axis == 2 else where[:, None, None, :]
        picture = picture.gather(axis, where.expand_as(picture))
    return picture


class ResidualNet(nn.Module):
    """N networks for states: a layer, a residual block of spectral norm 1, a layer; (1 or N, B, in) -> (N, B, out)."""

    def __init__(self, members: int, inputs: int, outputs: int, width: int):
        super().__init__()
        self.first = EnsembleLinear(members, inputs, width, 2**0.5)
        self.block = nn.ModuleList(EnsembleLinear(members, width, width, 2**0.5) for _ in range(2))
        self.last = EnsembleLinear(members, width, outputs, 0.01 * 2**0.5)
        self.scale = nn.Parameter(torch.ones(members, 1, width))
        self.shift = nn.Parameter(torch.zeros(members, 1, width))
        self.register_buffer("left", F.normalize(torch.randn(2, members, 1, width), dim=-1))
        self.members = members

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.expand(self.members, -1, -1)).relu()
        normed = F.layer_norm(h, h.shape[-1:], eps=1e-3) * self.scale + self.shift
        return self.last(h + self.block[1](self.block[0](normed).relu()))

    @torch.no_grad()
    def project(self):
        """Divide the block's weights by their largest singular values: one step of power iteration a call."""
        for layer, left in zip(self.block, self.left, strict=True):
            right = F.normalize(left @ layer.weight, dim=-1)
            left.copy_(F.normalize(right @ layer.weight.mT, dim=-1))
            layer.weight /= (left @ layer.weight * right).sum(-1, keepdim=True)


def picture_net(members: int, inputs: int, outputs: int, width: int, gain: float) -> nn.Sequential:
    """N networks of three layers for what was read from a picture."""
    sizes = [(inputs, width), (width, width), (width, outputs)]
    layers = [m for size in sizes for m in (EnsembleLinear(members, *size, gain), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def make_trunk(inputs: int, cfg: Config) -> nn.Module:
    """What reads an encoded picture; a state is read as it is."""
    if not cfg.pixels:
        return nn.Identity()
    linear = nn.Linear(inputs, cfg.features)
    nn.init.orthogonal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.LayerNorm(cfg.features), nn.Tanh())


class Kernel(nn.Module):
    """The BT-policy: what was read of s (B, Z) and belief a (B, A) -> mean and log sigma of u (B, A)."""

    def __init__(self, inputs: int, dims: int, cfg: Config):
        super().__init__()
        self.chain, self.bound, self.range = cfg.chain, cfg.bound, cfg.log_std
        inputs += dims * cfg.chain
        if cfg.pixels:
            self.net = picture_net(1, inputs, 2 * dims, cfg.width, 1.0)
        else:
            self.net = ResidualNet(1, inputs, 2 * dims, cfg.width)

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([state, action], -1) if self.chain else state
        mean, z = self.net(x[None])[0].chunk(2, -1)
        low, high = self.range
        log_std = low + (high - low) * (z.tanh() + 1) / 2
        if self.bound:  # a change of u of limited size
            mean = action.clamp(-0.999, 0.999).atanh() + self.bound * (mean / self.bound).tanh()
        return mean, log_std


class Critics(nn.Module):
    """Features (B, F) and L actions for each, (B, L, A) -> (N, B, L); a picture is read once for all of them."""

    def __init__(self, inputs: int, read: int, dims: int, cfg: Config):
        super().__init__()
        self.trunk = make_trunk(inputs, cfg)
        if cfg.pixels:
            self.net = picture_net(cfg.critics, read + dims, 1, cfg.width, 2**0.5)
        else:
            self.net = ResidualNet(cfg.critics, read + dims, 1, cfg.width)
        self.members = cfg.critics

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        state = self.trunk(features)[:, None].expand(-1, actions.shape[1], -1)
        x = torch.cat([state, actions], -1).flatten(0, 1)
        return self.net(x.expand(self.members, -1, -1)).view(self.members, *actions.shape[:2])


class ExactCritic(nn.Module):
    """The value of our one-step tasks is their reward: (B, 6), (B, L, 2) -> (1, B, L)."""

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        return goal_reward(features[:, None], actions)[None]


def twin(module: nn.Module) -> nn.Module:
    """The module once more, on the same memory, with its parameters treated as constants."""
    other = copy.deepcopy(module).requires_grad_(False)
    for mine, theirs in zip(other.parameters(), module.parameters(), strict=True):
        mine.data = theirs.data
    return other


class Agent(nn.Module):
    """All networks; `frozen` and `judge` are twins of kernel and critics for eqs. (1) and (5)."""

    def __init__(self, cfg: Config, envs: gymnasium.vector.VectorEnv, device: torch.device):
        super().__init__()
        obs, (dims,) = envs.single_observation_space.shape, envs.single_action_space.shape
        self.encoder, inputs = nn.Identity(), obs[0]
        if cfg.pixels:
            self.encoder = Encoder(obs[0])
            inputs = self.encoder(torch.zeros(1, *obs)).shape[1]
        read = cfg.features if cfg.pixels else inputs
        self.trunk, self.kernel = make_trunk(inputs, cfg), Kernel(read, dims, cfg)
        self.critics = Critics(inputs, read, dims, cfg) if cfg.env not in ONE_STEP_TASKS else ExactCritic()
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(cfg.alpha)))
        self.to(device)
        self.twins = twin(self.kernel), twin(self.critics)  # a tuple: no submodules, nothing to save

    def actor_parameters(self) -> list[nn.Parameter]:
        return [*self.trunk.parameters(), *self.kernel.parameters()]

    def critic_parameters(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.critics.parameters()]

    def project(self):
        """Spectral norm 1 for the residual blocks that learn."""
        for module in (self.kernel, self.critics):
            for net in module.children():
                if isinstance(net, ResidualNet):
                    net.project()


# --- the chain and its losses ---


def unroll(
    kernel: nn.Module, frozen: nn.Module, state: Tensor, action: Tensor, length: int, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Eqs. (1) and (2): a chain from `action` (B, A) at `state` (B, Z) -> actions (B, L, A), log-probs (B, L).

    Gradients flow through all actions, and into the parameters of the first `cfg.live` steps.
    """
    steps = []
    for i in range(length):
        live = i < cfg.live
        mean, log_std = kernel(state, action) if live else frozen(state.detach(), action)
        raw = mean + log_std.exp() * torch.randn_like(mean)
        action = raw.tanh()
        steps.append((raw, mean, log_std))
    raw, mean, log_std = (torch.stack(column, 1) for column in zip(*steps, strict=True))
    return raw.tanh(), mixture_logp(raw, mean, log_std, cfg.unbiased)


def mixture_logp(raw: Tensor, mean: Tensor, log_std: Tensor, unbiased: bool = False) -> Tensor:
    """Eq. (2): log-density of tanh(raw) (B, n, A) under m equal kernels (B, m, A) -> (B, n).

    `unbiased` leaves out kernel i for action i, which it produced; then m = n.
    """
    table = ((raw[:, :, None] - mean[:, None]) * (-log_std[:, None]).exp()).square()  # (B, n, m, A)
    table = (-0.5 * table - log_std[:, None] - 0.5 * math.log(2 * math.pi)).sum(-1)
    kernels = mean.shape[1]
    if unbiased:
        own = torch.eye(kernels, dtype=torch.bool, device=raw.device)
        table, kernels = table.masked_fill(own, -torch.inf), kernels - 1
    squash = (2 * (math.log(2) - raw - F.softplus(-2 * raw))).sum(-1)  # log |d tanh(raw)|
    return table.logsumexp(-1) - math.log(kernels) - squash


def pessimism(q: Tensor, beta: float) -> Tensor:
    """Eq. (3): (N, ...) -> (...). Sorted, the mean of |Q_c - Q_c'| over ordered pairs is a weighted sum."""
    n = len(q)
    weights = (2 * torch.arange(n, device=q.device, dtype=q.dtype) - n + 1) * 2 / max(n * (n - 1), 1)
    return q.mean(0) - beta * torch.einsum("n,n...->...", weights, q.sort(0).values)


def critic_loss(q: Tensor, y: Tensor, live: Tensor) -> Tensor:
    """Eq. (4): critics (N, B), their common target (B,), and which rows are transitions (B,)."""
    return 0.5 * (live * (q - y).square()).sum(0).mean()


def actor_loss(q: Tensor, logp: Tensor, alpha: Tensor, beta: float) -> Tensor:
    """Eq. (5): critics (N, B, L) and log-probs (B, L) of the chain's actions."""
    return (alpha * logp - pessimism(q, beta)).mean()


def temperature_loss(log_alpha: Tensor, logp: Tensor, entropy: Tensor) -> Tensor:
    """Eq. (6): `entropy` is the target H."""
    return -log_alpha * (logp.detach() + entropy).mean()


def target_entropy(step: int, dims: int, cfg: Config) -> float:
    """H at this step: from entropy_start a dimension on a line to the final value, where asked for."""
    final = cfg.target_entropy
    if final is None:
        final = ENTROPY.get(cfg.env.split("-")[0], -dims)
    left = max(1 - step / cfg.entropy_steps, 0) if cfg.entropy_steps else 0
    return final + left * (cfg.entropy_start * dims - final)


# --- acting ---


def psrf(x: Tensor) -> Tensor:
    """Eq. (7): (..., M, k, A), M chains of k steps -> R_k (...), in float64 on the CPU."""
    chains, steps, dims = x.shape[-3:]
    means = x.mean(-2, keepdim=True)
    inside, apart = (x - means).flatten(-3, -2), (means - means.mean(-3, keepdim=True)).squeeze(-2)
    within = inside.mT @ inside / (chains * (steps - 1))
    between = apart.mT @ apart / (chains - 1)
    within, between = torch.stack([within, between]).double().cpu()
    noise = 1e-6 * within.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12  # a saturated W is singular
    factor = torch.linalg.cholesky_ex(within + noise[..., None, None] * torch.eye(dims))[0]
    ratio = torch.linalg.solve_triangular(factor, between, upper=False)
    ratio = torch.linalg.solve_triangular(factor, ratio.mT, upper=False)
    largest = torch.linalg.eigvalsh(ratio.nan_to_num(1e9, 1e9))[..., -1]  # NaN is not agreement
    return ((steps - 1) / steps + largest).sqrt()


@torch.no_grad()
def think(
    kernel: nn.Module, state: Tensor, particles: Tensor, shortest: int, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Reason at `state` (E, Z) from `particles` (E, M, A) until chains agree -> particles, steps k (E,).

    An environment's particles stay what they were at its own k.
    """
    count, chains, _ = particles.shape
    state = state.repeat_interleave(chains, 0)
    now, visited = particles, []
    running, steps = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.long)
    for k in range(1, cfg.max_steps + 1 if cfg.chain else 2):
        mean, log_std = kernel(state, now.flatten(0, 1))
        now = (mean + log_std.exp() * torch.randn_like(mean)).tanh().view_as(particles)
        visited.append(now)
        particles = torch.where(running.to(now.device)[:, None, None], now, particles)
        steps += running
        if k >= max(2, shortest):
            running = running & ~(psrf(torch.stack(visited, 2)) < cfg.threshold)
        if not running.any():
            break
    return particles, steps


def uniform(*shape: int, device=None) -> Tensor:
    """Actions drawn from all of [-1, 1]."""
    return torch.rand(shape, device=device) * 2 - 1


@torch.no_grad()
def act(
    agent: Agent, obs: Tensor, memory: Tensor, kbar: float, cfg: Config, best: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Observations (E, ...) and memory (E, M, A) -> actions (E, A), the new memory, steps k (E,)."""
    features = agent.encoder(obs)
    start = memory if cfg.memory else uniform(*memory.shape, device=memory.device)
    memory, steps = think(agent.kernel, agent.trunk(features), start, math.floor(kbar) - 1, cfg)
    pick = torch.randint(cfg.particles, (len(obs),), device=obs.device)
    if best:
        pick = pessimism(agent.critics(features, memory), cfg.beta_actor).argmax(1)
    return memory[torch.arange(len(obs), device=obs.device), pick], memory, steps


def iid_steps(dims: int, cfg: Config, repeats: int = 64) -> float:
    """The k of perfect mixing: mean steps until R_k < threshold for i.i.d. Gaussian samples."""
    x = torch.randn(repeats, cfg.particles, cfg.max_steps, dims)
    agree = [psrf(x[:, :, :k]) < cfg.threshold for k in range(2, cfg.max_steps)]
    agree = torch.stack([*agree, torch.ones(repeats, dtype=torch.bool)])
    return (agree.int().argmax(0) + 2).double().mean().item()


# --- training ---


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float = 0.0):
    """A step down the gradient, of limited norm if `clip` says so."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()


def update(
    agent: Agent, optimizers: dict, batch: Batch, length: int, with_actor: bool, entropy: Tensor, cfg: Config
) -> dict[str, Tensor]:
    """A step of the critics, and of actor and temperature if asked for; no host sync in it."""
    frozen, judge = agent.twins
    alpha, logs = agent.log_alpha.exp().detach(), {}
    agent.project()
    obs, following = batch.obs, batch.next_obs
    if cfg.pixels:
        obs, following = random_shift(obs), random_shift(following)

    features = agent.encoder(obs)
    with torch.no_grad():  # the target starts reasoning at s' from the replayed action, eq. (4)
        next_features = agent.encoder(following)
        chain, logp = unroll(frozen, frozen, agent.trunk(next_features), batch.action, length, cfg)
        next_q = pessimism(agent.target(next_features, chain[:, -1:])[..., 0], cfg.beta_target)
        y = batch.reward + batch.discount * (next_q - alpha * logp[:, -1])
    if cfg.env not in ONE_STEP_TASKS:
        loss = critic_loss(agent.critics(features, batch.action[:, None])[..., 0], y, batch.live)
        descend(optimizers["critic_optimizer"], loss)
        common.soft_update(agent.target, agent.critics, cfg.tau)
        logs["critic_loss"] = loss.detach()

    if with_actor:
        start = chain[:, -1] if cfg.actor_start == "target" else batch.action
        features = features.detach()
        chain, logp = unroll(agent.kernel, frozen, agent.trunk(features), start, length, cfg)
        loss = actor_loss(judge(features, chain), logp, alpha, cfg.beta_actor)
        descend(optimizers["actor_optimizer"], loss, cfg.clip)
        if not cfg.anneal:
            descend(optimizers["temperature"], temperature_loss(agent.log_alpha, logp, entropy))
        logs |= {"actor_loss": loss.detach(), "logp": logp.detach().mean()}
    return logs


def make_replay(cfg: Config, envs: gymnasium.vector.VectorEnv) -> common.Replay:
    """Rows of time for all environments: see `sample`."""
    obs, count = envs.single_observation_space, envs.num_envs
    frame = (obs.shape[0] // cfg.stack, *obs.shape[1:])
    flag = torch.zeros(count, dtype=torch.bool)
    return common.Replay(
        min(cfg.capacity // count, cfg.steps),
        frame=torch.zeros(count, *frame, dtype=torch.uint8 if cfg.pixels else torch.float32),
        action=torch.zeros(count, *envs.single_action_space.shape),
        reward=torch.zeros(count),
        terminated=flag,
        done=flag,
        live=flag,
        age=torch.zeros(count, dtype=torch.long),
    )


def train(cfg: Config, run: Run) -> dict[str, float]:
    """One cell of the table: act, store, learn; then what the claims compare."""
    device, envs = run.device, make_envs(cfg, cfg.envs)
    agent, replay = Agent(cfg, envs, device), make_replay(cfg, envs).to(device)
    dims, frame = envs.single_action_space.shape[0], replay.frame.shape[2]
    measure = {"bandit": measure_bandit, "tracking": measure_tracking}.get(cfg.env) or Control(cfg)
    gpu = device.type == "cuda"
    adam = functools.partial(torch.optim.Adam, lr=cfg.lr, fused=True, capturable=gpu)
    optimizers = {"actor_optimizer": adam(agent.actor_parameters()), "temperature": adam([agent.log_alpha])}
    if cfg.env not in ONE_STEP_TASKS:
        optimizers["critic_optimizer"] = adam(agent.critic_parameters())
    mind = {"particles": uniform(cfg.envs, cfg.particles, dims, device=device), "kbar": cfg.first_kbar}

    @functools.cache  # each of the few lengths has its own CUDA graph
    def learner(length, with_actor):
        def learn(entropy):
            return update(agent, optimizers, sample(replay, cfg), length, with_actor, entropy, cfg)

        return common.graphed(learn) if cfg.compile else learn

    for step in run.steps(cfg.steps, agent=agent, replay=replay, mind=mind, **optimizers):
        if step % cfg.save_every == 0:  # where a resumed run begins, all runs begin new episodes
            obs, _ = envs.reset(seed=int(torch.randint(2**31, ())))
            age, ended = np.zeros(cfg.envs, int), np.zeros(cfg.envs, bool)
        now = torch.as_tensor(obs, device=device)

        # reason, act, store
        action = uniform(cfg.envs, dims, device=device)
        if step >= cfg.random_steps:
            action, mind["particles"], steps = act(agent, now, mind["particles"], mind["kbar"], cfg)
            mind["kbar"] = average_steps(mind["kbar"], steps, cfg)
        obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
        done = terminated | truncated | ((step + 2) % cfg.save_every == 0)
        row = dict(frame=now[:, -frame:], action=action, reward=cfg.reward_scale * reward.astype(np.float32))
        row |= dict(terminated=terminated, done=done, live=~ended, age=age)
        replay.add(**{name: value[None] for name, value in row.items()})
        age, ended = np.where(ended, 0, age + 1), done

        # learn
        logs = {"reward": reward.mean(), "kbar": mind["kbar"]}
        if cfg.anneal:
            agent.log_alpha.data.fill_(math.log(cfg.alpha) * max(1 - step / (cfg.anneal * cfg.steps), 0))
        entropy = torch.tensor(target_entropy(step, dims, cfg), device=device)
        length = (cfg.length or math.ceil(mind["kbar"])) if cfg.chain else 1
        for i in range(cfg.updates if step >= max(cfg.random_steps, cfg.nstep) else 0):
            logs |= learner(length, (i + 1) % cfg.actor_every == 0)(entropy)
        if step % cfg.eval_every == 0:
            logs |= measure(agent, mind["kbar"], cfg, run)
        run.log(step, alpha=agent.log_alpha.exp(), **logs)

    rate = run.speed["steps_per_s"]
    run.speed |= {"env_steps_per_s": rate * cfg.envs, "critic_updates_per_s": rate * cfg.updates}
    return measure(agent, mind["kbar"], cfg, run)


def average_steps(kbar: float, steps: Tensor, cfg: Config) -> float:
    """Eq. (8) for E decisions at once; float64: a constant k = 7 must not round up to L = 8."""
    keep = cfg.decay ** len(steps)
    return keep * kbar + (1 - keep) * steps.double().mean().item()


# --- evaluation ---


class Control:
    """Return of whole episodes and steps of reasoning k, in environments and with particles of its own."""

    def __init__(self, cfg: Config):
        self.envs = make_envs(cfg, cfg.episodes)

    def __call__(self, agent: Agent, kbar: float, cfg: Config, run: Run) -> dict[str, float]:
        dims, steps = self.envs.single_action_space.shape[0], []
        memory = uniform(cfg.episodes, cfg.particles, dims, device=run.device)

        def policy(obs):
            nonlocal memory
            now = torch.as_tensor(obs, device=run.device)
            action, memory, k = act(agent, now, memory, kbar, cfg, cfg.best)
            steps.append(k.double().mean().item())
            return action.cpu().numpy()

        returns = common.evaluate_policy(self.envs, policy, int(torch.randint(2**31, ())))
        return {"return": returns.mean(), "k": np.mean(steps), "k_iid": iid_steps(dims, cfg)}


def w2(x: Tensor, y: Tensor) -> float:
    """Wasserstein-2 distance of two samples (n, d): the best assignment."""
    cost = torch.cdist(x, y).square().cpu().numpy()
    return cost[linear_sum_assignment(cost)].mean() ** 0.5


@torch.no_grad()
def measure_bandit(agent: Agent, kbar: float, cfg: Config, run: Run) -> dict[str, float]:
    """Soft-value gap E[log p(a) - r(a)] (the KL to the best policy, nats), W2, and correlation of a_i, a_i+1.

    log p has the kernels of 2048 chains after 32 steps; the 512 actions come from other chains.
    """
    found, samples = {}, []
    obs = torch.as_tensor(make_envs(cfg, len(MODES)).reset()[0], device=run.device)
    gaps, distances, floors, lags = [], [], [], []
    for context in obs:
        state, action = context.expand(2560, -1), uniform(2560, 2, device=run.device)
        for _ in range(32):
            before = action
            mean, log_std = agent.kernel(state, before)
            raw = mean + log_std.exp() * torch.randn_like(mean)
            action = raw.tanh()
        logp = mixture_logp(raw[None, :512], mean[None, 512:], log_std[None, 512:])[0]
        gaps.append((logp - goal_reward(context, action[:512])).mean().item())
        target = goal_sample(context, 512)
        distances.append(w2(action[:512], target))
        floors.append(w2(goal_sample(context, 512), target))
        lags.append(np.mean([np.corrcoef(before[:, i].cpu(), action[:, i].cpu())[0, 1] for i in range(2)]))
        samples.append(action[:512])
    np.save(run.folder / "samples.npy", torch.stack(samples).cpu())
    memory = torch.stack(samples)[:, : cfg.particles]
    found = {f"gap_{n}": gap for n, gap in zip(MODES, gaps, strict=True)}
    found |= {"gap": np.mean(gaps[1:]), "w2": np.mean(distances[1:]), "w2_target": np.mean(floors[1:])}
    k = think(agent.kernel, obs, memory, 0, cfg)[1].double().mean().item()
    return found | {"lag_1": np.mean(lags), "k": k, "k_iid": iid_steps(2, cfg)}


@torch.no_grad()
def measure_tracking(agent: Agent, kbar: float, cfg: Config, run: Run) -> dict[str, float]:
    """Steps k after the goal has turned by d, from particles that agreed before, and from uniform ones."""
    count, device = 64, run.device
    one, phi = torch.zeros(count, dtype=torch.long, device=device), uniform(count, device=device) * math.pi
    obs = goal_observation(one, phi)
    cold = uniform(count, cfg.particles, 2, device=device)
    memory, _ = think(agent.kernel, obs, cold, cfg.max_steps, cfg)  # all steps: it has settled
    found = {}
    for turn in JUMPS:
        after = goal_observation(one, phi + turn)
        particles, steps = think(agent.kernel, after, memory, 0, cfg)
        found[f"k_{turn:.1f}"] = steps.double().mean().item()
    distances = [w2(x, goal_sample(o, cfg.particles)) for x, o in zip(particles, after, strict=True)]
    steps = think(agent.kernel, obs, cold, 0, cfg)[1]
    return found | {"k_cold": steps.double().mean().item(), "w2_3.1": np.mean(distances)}


# --- figure, main ---


def draw(figure, table: dict, run: Run) -> None:
    """Actions for 4 and 8 goals, the gap over n, k over the jump, and returns."""
    axes = figure.subplots(1, 5)
    for axis, row in zip(axes, ("bandit: chain", "bandit: Gaussian"), strict=False):
        for samples in np.load(run.root / common.slug(f"{row}-s{run.cfg.seed}") / "samples.npy")[1:]:
            axis.plot(*samples.T, ".", markersize=2)
        axis.set(title=f"{row}, n = 2, 4, 8", xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    for row, cells in table.items():
        color = f"C{list(table).index(row)}"
        for metrics in cells:
            for axis, keys in (
                (axes[2], [f"gap_{n}" for n in MODES]),
                (axes[3], [f"k_{d:.1f}" for d in JUMPS]),
            ):
                if keys[0] in metrics:
                    axis.plot(MODES if axis is axes[2] else JUMPS, [metrics[k] for k in keys], color=color)
    return


def dry_run(cfg: Config, run: Run):
    """Print parameters, memory and hours."""


def main():
    cfg = common.parse_config(CONFIGS)
    with Run(cfg) as run:
        if cfg.dry_run:
            return dry_run(cfg, run)
        table = run.grid(ROWS, train)
        run.check(CLAIMS, table)


if __name__ == "__main__":
    main()
