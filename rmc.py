"""Serial Markov chain reasoning (SSPG): act by the steady state of a chain of Gaussian steps over actions.

Cetin, Celiktutan, "Policy Gradient With Serial Markov Chain Reasoning", NeurIPS 2022, arXiv 2210.06766.

The claim. A policy need not be one forward pass. An agent that keeps revising its action by a stochastic
step (a BT-policy, an ordinary tanh-Gaussian that sees the state and its current belief) acts by the steady
state of that chain: any distribution, not only a Gaussian. It reasons longer where the decision is harder,
until parallel chains agree, and less where it can start from what it thought a moment ago.

State s, action a in [-1, 1]^A; kernel (mu, sigma)(s, a); L steps of reasoning, B of them live; N critics Q:
  eq. (1)  a_i = tanh u_i,  u_i = mu(s, a_{i-1}) + sigma(s, a_{i-1}) eps_i          the reasoning Markov chain
           Theorem, p the steady state: d E_p[Q] = E_{a ~ p} d E_{a' ~ kernel(a)} sum_n (E[Q(a_n) | a_0 = a']
           - E_p[Q]). One step is differentiated, later ones run on frozen parameters: B steps are live.
  eq. (2)  log p(a_i) = logsumexp_j log N(u_i; mu_j, sigma_j) - log L - log |d tanh(u_i)|,  j over the chain
  eq. (3)  Q~ = mean_c Q_c - beta mean_{c != c'} |Q_c - Q_c'|                              a pessimistic value
  eq. (4)  y = r + gamma (Q~'(s', a_L) - alpha log p(a_L)),  loss = mean sum_c (Q_c(s, a) - y)^2 / 2
           y = r if s' is terminal; the chain starts from the replayed action; Q' has averaged parameters
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
- R_k is exact; the code's symmetrised W^-1 B is not affine invariant and overestimates k (tests show it).
  Even i.i.d. samples need k > 2 in many dimensions: this floor is measured beside k (k_iid).
- The pixel code thinks adaptively, discards it and acts by a fixed chain of 4; it counts evaluation and
  random steps in kbar, too. Here one chain acts, and training decisions alone are counted.
- Actions are fed as [-1, 1]; ensemble members are orthogonal each; target networks are not projected: they
  start at norm sqrt 2 and become means of norm 1 at the rate tau; eqs. (4) and (6) are alike in both
  settings; Adam's epsilon is torch's. What the code sets for single tasks are flags here, as it is for
  Hopper and quadruped_run: walker_* has batch 512 and one-step targets, humanoid_* lr 8e-5 and 100 features;
  300,000 steps for Walker2d, Ant, Humanoid, 400,000 for HalfCheetah; a capacity of 1e6 for other dm: tasks.
- GPL-SAC has SSPG's pessimism, .75 in the target, where the code's has .5. Rows that are no transition are
  left out of all losses. Particles that all coincide at a bound of the actions count as agreed.
- Evaluation starts from fresh particles; the best of the last M is taken where the code searches all k M.
- An observation is stored once. Every --save_every steps all episodes start anew, so that resuming is exact.
- The demo's bandit and tracking tasks have exact critics and a temperature that falls to 1, for the Gaussian,
  too: at 1 from the start both collapse to a single mode. The bounded kernel of tracking is ours.

Reading order: Config, ROWS, Kernel, unroll, mixture_logp, the losses, psrf, think, update, train.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

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
    steps: int = 900  # steps of all of them
    random_steps: int = 100  # of these, with uniform actions and no updates
    pixels: int = 0  # side of the camera's picture, for dm: tasks; 0: the state
    stack: int = 1  # frames in an observation
    repeat: int = 1  # times that a dm: task repeats an action
    nstep: int = 1  # rewards in a target
    discount: float = 0.97  # gamma
    reward_scale: float = 0.1  # factor on rewards in training
    capacity: int = 1_000_000  # observations kept, over all environments
    # networks
    critics: int = 2  # ensemble (N)
    width: int = 64  # of hidden layers
    features: int = 50  # that actor and critics read from a picture
    log_std: tuple[float, float] = (-10.0, 2.0)  # range of log sigma
    bound: float = 0.0  # largest change of u by a step of reasoning; 0: any
    # reasoning
    chain: bool = True  # False: the kernel sees no action, so one step is SAC's Gaussian
    live: int = 2  # steps of a training chain whose parameters get gradients (B)
    length: int = 0  # of training chains (L); 0: as many as acting needs, ceil(kbar)
    unbiased: bool = False  # leave a_i's own kernel out of log p(a_i)
    start_replayed: bool = False  # a_0 of eq. (5) is the replayed action, not the last one of eq. (4)
    particles: int = 64  # parallel chains when acting (M)
    max_steps: int = 16  # of reasoning for an action
    threshold: float = 1.1  # of R_k, to stop
    # learning
    updates: int = 4  # critic updates a step of the environments
    actor_every: int = 2  # critic updates to an update of actor and temperature
    batch: int = 256  # transitions an update
    lr: float = 1e-3  # Adam, for all
    tau: float = 0.01  # share of the critics that the target takes up in an update
    clip: float = 40.0  # largest norm of the actor's gradient; 0: any
    beta_target: float = 0.75  # pessimism in eq. (4)
    beta_actor: float = 0.5  # pessimism in eq. (5); with two critics 0.5 is their minimum
    alpha: float = 0.2  # first temperature
    anneal: float = 0.0  # share of the run in which alpha falls to 1, geometrically; 0: it is learned
    target_entropy: float | None = None  # H in nats; None: the paper's for the task, else -A
    entropy_steps: int = 0  # steps in which H falls from 0.5 A to its final value; 0: none
    # evaluation
    eval_every: int = 900  # steps between two evaluations
    episodes: int = 16  # an evaluation
    best: bool = False  # act by the particle of highest value in evaluation, not by a random one

    def check(self):
        super().check()
        if min(self.particles, self.max_steps, self.critics) < 2:
            raise UserError("--particles, --max_steps and --critics must be 2 or more, to be compared")
        make_envs(self, 1)


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
ONE_STEP = dict(
    pixels=0,
    stack=1,
    nstep=1,
    discount=0.0,
    reward_scale=1.0,
    updates=2,
    batch=192,
    actor_every=1,
    random_steps=1,
    eval_every=10**6,
)
BANDIT = ONE_STEP | dict(env="bandit", envs=8, alpha=20.0, anneal=0.6, log_std=(-5.0, 1.0))
TRACKING = ONE_STEP | dict(
    env="tracking", envs=4, updates=1, alpha=10.0, anneal=0.5, log_std=(-5.0, -1.5), length=4
)
# a row of the table is the settings that it changes: the difference of two rows is an idea of the paper
ROWS = {
    "SSPG": {},
    "GPL-SAC": dict(chain=False),
    "SAC": dict(chain=False, critics=2, beta_target=0.5, beta_actor=0.5, updates=1, actor_every=1),
    "bandit: chain": BANDIT,
    "bandit: Gaussian": BANDIT | dict(chain=False),
    "tracking: bounded": TRACKING | dict(bound=0.3),
    "tracking: unrestricted": TRACKING,
}
DEMO_ROWS = tuple(row for row in ROWS if row != "SAC")
DEMO = Config(seeds=4, ranks=2, rows=DEMO_ROWS, log_every=50, save_every=450)
FULL = replace(
    DEMO,
    ranks=1,
    rows=("SSPG", "GPL-SAC", "SAC"),
    env="Hopper-v4",
    envs=1,
    steps=125_000,
    random_steps=5000,
    reward_scale=1.0,
    discount=0.99,
    critics=10,
    width=256,
    updates=20,
    actor_every=20,
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
        DEMO,
        ranks=1,
        seeds=1,
        rows=tuple(ROWS),
        steps=8,
        random_steps=2,
        particles=8,
        width=16,
        eval_every=4,
        episodes=4,
    ),
    "demo": replace(DEMO, seed=10),
    "gpu": replace(FULL, steps=10_000, seeds=2, ranks=4),
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
        start_replayed=True,
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
        "soft-value gap to 2, 4 and 8 modes (nats): a chain of Gaussian steps fits what a Gaussian cannot",
        "gap",
        "bandit: chain",
        "bandit: Gaussian",
        "lower",
    ),
    Claim("... and so it is by the W2 distance", "w2", "bandit: chain", "bandit: Gaussian", "lower"),
    Claim(
        "... while one mode costs the chain nothing, margin 0.05",
        "gap_1",
        "bandit: chain",
        "bandit: Gaussian",
        "lower",
        -0.05,
    ),
    Claim(
        "SSPG returns no less than SAC with the same critics, margin 50",
        "return",
        "SSPG",
        "GPL-SAC",
        margin=-50.0,
    ),
    Claim(
        "steps of reasoning rise with the turn of the goal, by 1 more than for the unrestricted kernel",
        "rise",
        "tracking: bounded",
        "tracking: unrestricted",
        margin=1.0,
    ),
    Claim(
        "memory saves steps of reasoning, 5 more than for the unrestricted kernel",
        "saved",
        "tracking: bounded",
        "tracking: unrestricted",
        margin=5.0,
    ),
]


# --- tasks ---

MODES = (1, 2, 4, 8)  # numbers of goals, one-hot in an observation
SLOTS = 8  # places on a circle; each of n goals takes 8 / n of them
JUMPS = (0.0, 0.6, 1.2, 2.4, math.pi)  # turns of the goal that reasoning is measured after
SPREAD, RADIUS = 0.1, 0.65  # of a goal's Gaussian, of the circle that goals lie on


def goal_places(obs: Tensor) -> Tensor:
    """Goals (..., 8, 2) of observations (..., 6): n places on a circle, each 8 / n times."""
    n = 2.0 ** obs[..., :4].argmax(-1)
    slot = torch.arange(SLOTS, device=obs.device)
    angle = torch.atan2(obs[..., 5], obs[..., 4])[..., None] + 2 * math.pi * slot / n[..., None]
    return RADIUS * torch.stack([angle.cos(), angle.sin()], -1)


def goal_reward(obs: Tensor, action: Tensor) -> Tensor:
    """Log-density of an equal mixture of Gaussians at the goals: obs (..., 6), action (..., 2) -> (...).

    With alpha = 1 this mixture is the best MaxEnt policy, of soft value 0.
    """
    distance = (action[..., None, :] - goal_places(obs)).square().sum(-1)
    return (-distance / (2 * SPREAD**2)).logsumexp(-1) - math.log(SLOTS * 2 * math.pi * SPREAD**2)


def goal_sample(obs: Tensor, count: int) -> Tensor:
    """`count` samples (count, 2) of the mixture of one observation (6,)."""
    slot = torch.randint(SLOTS, (count,), device=obs.device)
    return goal_places(obs)[slot] + SPREAD * torch.randn(count, 2, device=obs.device)


class Goals(gymnasium.vector.VectorEnv):
    """One-step tasks without an end: environment i has MODES[i] goals at phi; if `turning` one, elsewhere in
    each step. Observations are (one-hot n, cos phi, sin phi).
    """

    def __init__(self, count: int, phi: float, turning: bool):
        self.num_envs, self.phi, self.turn = count, phi, math.pi * turning
        self.kinds = torch.arange(count) % (1 if turning else len(MODES))
        self.single_observation_space = Box(-1.0, 1.0, (1, 6), np.float32)
        self.single_action_space = Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.random = np.random.default_rng(seed)
        return self._observe(), {}

    def _observe(self):
        phi = self.phi + self.random.uniform(-self.turn, self.turn, self.num_envs)
        self.obs = goal_observation(self.kinds, torch.as_tensor(phi))
        return self.obs[:, None].numpy()

    def step(self, actions):
        reward = goal_reward(self.obs, torch.as_tensor(actions)).numpy()
        never = np.zeros(self.num_envs, bool)
        return self._observe(), reward, never, never, {}


def goal_observation(kinds: Tensor, phi: Tensor) -> Tensor:
    """Observations (E, 6) of MODES[kinds] goals turned by phi: (E,) each."""
    return torch.cat([F.one_hot(kinds, len(MODES)), phi.cos()[:, None], phi.sin()[:, None]], 1).float()


class Dm(common.DmControl):
    """A dm_control task with repeated actions and a camera, whose pictures are (3, side, side)."""

    render_mode = "rgb_array"

    def __init__(self, cfg: Config, domain: str, task: str):
        super().__init__(domain, task)
        self.repeat, self.side, self.camera = cfg.repeat, cfg.pixels, 2 * (domain == "quadruped")

    def render(self):
        return self.env.physics.render(self.side, self.side, camera_id=self.camera).transpose(2, 0, 1)

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = super().step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def make_env(cfg: Config) -> gymnasium.Env:
    """One environment with actions in [-1, 1]; UserError for one that cannot be had.

    Observations are the last `stack` vectors in float32, or with `pixels` frames (3, side, side) in bytes.
    """
    dm = re.fullmatch(r"dm:(ball_in_cup|point_mass|humanoid_CMU|[^_]+)_(\w+)", cfg.env)
    if re.search(r"^(Ant|H|In|Pusher|Reacher|Swimmer|Walker2d).*-v[23]$", cfg.env):  # MuJoCo's
        raise UserError(f"--env {cfg.env}: gymnasium has {cfg.env[:-1]}4 (like v2) and {cfg.env[:-1]}5")
    try:
        env = Dm(cfg, *dm.groups()) if dm else gymnasium.make(cfg.env)
        if cfg.pixels:
            env = wrappers.AddRenderObservation(env)
    except Exception as e:  # the libraries raise a dozen kinds
        raise UserError(f"--env {cfg.env}: {e}; pictures are for dm: tasks, with OpenGL") from None
    actions = env.action_space
    if not isinstance(actions, Box) or not actions.is_bounded():
        raise UserError(f"--env {cfg.env}: actions must be a bounded Box, not {actions}")
    env = wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    if not cfg.pixels:
        env = wrappers.DtypeObservation(wrappers.FlattenObservation(env), np.float32)
    return wrappers.FrameStackObservation(env, cfg.stack)


def make_envs(cfg: Config, count: int) -> gymnasium.vector.VectorEnv:
    """`count` environments; after an episode's end the next step ignores its action and starts a new one."""
    if cfg.env in ONE_STEP_TASKS:
        phi = np.random.default_rng(cfg.seed).uniform(-math.pi, math.pi)
        return Goals(count, phi, turning=cfg.env == "tracking")
    return gymnasium.vector.SyncVectorEnv([functools.partial(make_env, cfg)] * count)


# --- replay ---


class Batch(NamedTuple):
    """Transitions: obs (B, ...), action (B, A), reward, discount (B,), next_obs, and which of them count."""

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
    oldest = (replay.added - rows + cfg.stack).clamp(min=0)
    t = torch.rand(cfg.batch, dtype=torch.float64, device=device) * (replay.added - cfg.nstep - oldest)
    t = oldest + t.long()
    env = torch.randint(replay.reward.shape[1], (cfg.batch,), device=device)

    def observation(t):
        back = torch.arange(cfg.stack - 1, -1, -1, device=device)
        when = t[:, None] - torch.minimum(back, replay.age[t % rows, env][:, None])
        return replay.frame[when % rows, env[:, None]]  # (B, stack, ...)

    reward = torch.zeros(cfg.batch, device=device)
    going, end = torch.ones_like(env, dtype=torch.bool), t
    for i in range(cfg.nstep):
        reward += going * cfg.discount**i * replay.reward[end % rows, env]
        end = end + going
        going = going & ~replay.done[(end - 1) % rows, env]
    discount = cfg.discount ** (end - t) * ~replay.terminated[(end - 1) % rows, env]
    action, live = replay.action[t % rows, env], ~replay.done[(t - 1) % rows, env]
    return Batch(observation(t), action, reward, discount.float(), observation(end), live)


# --- networks ---


class Encoder(nn.Sequential):
    """DrQ-v2's four convolutions: S frames (B, S, 3, H, W) in bytes -> features (B, F)."""

    def __init__(self, frames: int):
        layers = []
        for inputs, stride in ((3 * frames, 2), (32, 1), (32, 1), (32, 1)):
            layers += [nn.Conv2d(inputs, 32, 3, stride), nn.ReLU()]
        super().__init__(*layers, nn.Flatten())

    def forward(self, picture: Tensor) -> Tensor:
        return super().forward(picture.flatten(1, 2) / 255 - 0.5)


def random_shift(picture: Tensor) -> Tensor:
    """The frames (S, 3, H, W) of each example moved by up to 4 pixels both ways, the border repeated."""
    for _ in range(2):  # rows, then columns
        size = picture.shape[-2]
        shift = torch.randint(-4, 5, (len(picture), 1), device=picture.device)
        where = (torch.arange(size, device=picture.device) + shift).clamp(0, size - 1)
        picture = picture.gather(-2, where[:, None, None, :, None].expand_as(picture)).mT
    return picture


class ResidualNet(nn.Module):
    """N networks for states, with a residual block of spectral norm 1: (N, B, in) -> (N, B, out)."""

    def __init__(self, members: int, inputs: int, outputs: int, width: int):
        super().__init__()
        self.first = EnsembleLinear(members, inputs, width, 2**0.5)
        self.block = nn.ModuleList(EnsembleLinear(members, width, width, 2**0.5) for _ in range(2))
        self.last = EnsembleLinear(members, width, outputs, 0.01 * 2**0.5)
        self.scale = nn.Parameter(torch.ones(members, 1, width))
        self.shift = nn.Parameter(torch.zeros(members, 1, width))
        self.register_buffer("left", F.normalize(torch.randn(2, members, 1, width), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        normed = F.layer_norm(h, h.shape[-1:], eps=1e-3) * self.scale + self.shift
        return self.last(h + self.block[1](self.block[0](normed).relu()))

    @torch.no_grad()
    def project(self):
        """Divide the block's weights by their largest singular values: one step of power iteration a call."""
        for layer, left in zip(self.block, self.left, strict=True):
            stretched = F.normalize(left @ layer.weight, dim=-1) @ layer.weight.mT
            norm = stretched.norm(dim=-1, keepdim=True)
            left.copy_(stretched / norm)
            layer.weight /= norm


def make_net(members: int, inputs: int, outputs: int, gain: float, cfg: Config) -> nn.Module:
    """N networks for states, or of three layers for what was read from a picture."""
    if not cfg.pixels:
        return ResidualNet(members, inputs, outputs, cfg.width)
    sizes = [(inputs, cfg.width), (cfg.width, cfg.width), (cfg.width, outputs)]
    layers = [m for size in sizes for m in (EnsembleLinear(members, *size, gain), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def make_trunk(inputs: int, cfg: Config) -> nn.Module:
    """What reads an encoded picture; a state is read as it is."""
    if not cfg.pixels:
        return nn.Identity()
    return nn.Sequential(nn.Linear(inputs, cfg.features), nn.LayerNorm(cfg.features), nn.Tanh())


class Kernel(nn.Module):
    """The BT-policy: what was read of s (B, Z) and belief a (B, A) -> mean and log sigma of u (B, A)."""

    def __init__(self, inputs: int, dims: int, cfg: Config):
        super().__init__()
        self.chain, self.bound, self.range = cfg.chain, cfg.bound, cfg.log_std
        self.net = make_net(1, inputs + dims * cfg.chain, 2 * dims, 1.0, cfg)

    def forward(self, state: Tensor, action: Tensor) -> tuple:
        x = torch.cat([state, action], -1) if self.chain else state
        mean, z = self.net(x[None])[0].chunk(2, -1)
        low, high = self.range
        log_std = low + (high - low) * (z.tanh() + 1) / 2
        if self.bound:  # a change of u of limited size
            mean = action.clamp(-0.999, 0.999).atanh() + self.bound * (mean / self.bound).tanh()
        return mean, log_std


class Critics(nn.Module):
    """Features (B, F) and L actions for each, (B, L, A) -> (N, B, L); a picture is read once for all L."""

    def __init__(self, inputs: int, read: int, dims: int, cfg: Config):
        super().__init__()
        self.members, self.trunk = cfg.critics, make_trunk(inputs, cfg)
        self.net = make_net(cfg.critics, read + dims, 1, 2**0.5, cfg)

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        state = self.trunk(features)[:, None].expand(-1, actions.shape[1], -1)
        x = torch.cat([state, actions], -1).flatten(0, 1)
        return self.net(x.expand(self.members, -1, -1)).view(-1, *actions.shape[:2])


class ExactCritic(nn.Module):
    """The value of our one-step tasks is their reward, for two who agree: (B, 6), (B, L, 2) -> (2, B, L)."""

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        return goal_reward(features[:, None], actions).expand(2, -1, -1)


def twin(module: nn.Module) -> nn.Module:
    """The module once more, on the same memory, with its parameters treated as constants."""
    return copy.deepcopy(module, {id(p): nn.Parameter(p.data, False) for p in module.parameters()})


class Agent(nn.Module):
    """All networks; the twins of kernel and critics are for eqs. (1) and (5)."""

    def __init__(self, cfg: Config, envs: gymnasium.vector.VectorEnv, device: torch.device):
        super().__init__()
        obs, (dims,) = envs.single_observation_space.shape, envs.single_action_space.shape
        self.encoder = Encoder(obs[0]) if cfg.pixels else nn.Flatten()
        inputs = self.encoder(torch.zeros(1, *obs)).shape[1]
        read = cfg.features if cfg.pixels else inputs
        self.trunk, self.kernel = make_trunk(inputs, cfg), Kernel(read, dims, cfg)
        self.critics = ExactCritic() if cfg.env in ONE_STEP_TASKS else Critics(inputs, read, dims, cfg)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, 2**0.5 if isinstance(layer, nn.Conv2d) else 1.0)
                nn.init.zeros_(layer.bias)
        self.residual = [net for net in self.modules() if isinstance(net, ResidualNet)]
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(cfg.alpha)))
        self.to(device)
        # plain lists and tuples: no submodules, for they have no memory of their own to save
        self.twins = twin(self.kernel), twin(self.critics)


# --- the chain and its losses ---


def unroll(
    kernel: nn.Module, frozen: nn.Module, state: Tensor, action: Tensor, length: int, cfg: Config
) -> tuple:
    """Eqs. (1), (2): a chain from `action` (B, A) at `state` (B, Z) -> actions (B, L, A), log-probs (B, L).

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

    `unbiased` leaves out kernel i for action i, which it produced (then m = n), unless it is the only one.
    """
    table = ((raw[:, :, None] - mean[:, None]) * (-log_std[:, None]).exp()).square()  # (B, n, m, A)
    table = (-0.5 * table - log_std[:, None] - 0.5 * math.log(2 * math.pi)).sum(-1)
    kernels = mean.shape[1]
    if unbiased and kernels > 1:
        own = torch.eye(kernels, dtype=torch.bool, device=raw.device)
        table, kernels = table.masked_fill(own, -torch.inf), kernels - 1
    squash = (2 * (math.log(2) - raw - F.softplus(-2 * raw))).sum(-1)  # log |d tanh(raw)|
    return table.logsumexp(-1) - math.log(kernels) - squash


def pessimism(q: Tensor, beta: float) -> Tensor:
    """Eq. (3): (N, ...) -> (...). Sorted, the mean of |Q_c - Q_c'| over ordered pairs is a weighted sum."""
    weights = torch.linspace(-1, 1, len(q), dtype=q.dtype, device=q.device) * 2 / len(q)
    spread = (q.sort(0).values.movedim(0, -1) * weights).sum(-1)  # TF32 would round a matrix product
    return q.mean(0) - beta * spread


def critic_loss(q: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Eq. (4): critics (N, B), their common target (B,), and a weight for each row (B,)."""
    return 0.5 * (weight * (q - y).square()).sum(0).mean()


def actor_loss(q: Tensor, logp: Tensor, alpha: Tensor, beta: float, weight: Tensor) -> Tensor:
    """Eq. (5): critics (N, B, L) and log-probs (B, L) of the chain's actions."""
    return (weight * (alpha * logp - pessimism(q, beta)).mean(-1)).mean()


def temperature_loss(log_alpha: Tensor, logp: Tensor, entropy: Tensor, weight: Tensor) -> Tensor:
    """Eq. (6): log-probs (B, L); `entropy` is the target H."""
    return -log_alpha * (weight * (logp.detach().mean(-1) + entropy)).mean()


def target_entropy(step: int, dims: int, cfg: Config) -> float:
    """H at this step: on a line from 0.5 a dimension to the final value."""
    final = cfg.target_entropy
    if final is None:
        final = ENTROPY.get(cfg.env.split("-")[0], -dims)
    return np.interp(step, (0, cfg.entropy_steps or 1), (0.5 * dims, final)).item()


# --- acting ---


def psrf(x: Tensor) -> Tensor:
    """Eq. (7): (..., M, k, A), M chains of k steps -> R_k (...), in float64 on the CPU; infinite for NaN."""
    chains, steps, dims = x.shape[-3:]
    x = x.double()  # exact where float32 products are rounded to TF32
    means = x.mean(-2, keepdim=True)
    inside, apart = (x - means).flatten(-3, -2), (means - means.mean(-3, keepdim=True)).squeeze(-2)
    within = inside.mT @ inside / (chains * (steps - 1))
    between = apart.mT @ apart / (chains - 1)
    within, between = torch.stack([within, between]).cpu()
    noise = 1e-6 * within.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12  # where a saturated W is singular
    ratio = torch.linalg.solve_ex(within + noise[..., None, None] * torch.eye(dims), between)[0]
    largest = torch.linalg.eigvals(ratio.nan_to_num(1e9, 1e9)).real.amax(-1)
    return ((steps - 1) / steps + largest).sqrt()


@torch.no_grad()
def think(kernel: nn.Module, state: Tensor, particles: Tensor, shortest: int, cfg: Config) -> tuple:
    """Reason at `state` (E, Z) from `particles` (E, M, A) until chains agree -> particles, steps k (E,).

    An environment's particles stay what they were at its own k.
    """
    state = state.repeat_interleave(particles.shape[1], 0)
    now, visited = particles, []
    running = torch.ones(len(particles), dtype=torch.bool)
    steps = torch.zeros(len(particles), dtype=torch.float64)
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
def act(agent: Agent, obs: Tensor, memory: Tensor, kbar: float, cfg: Config, best: bool = False) -> tuple:
    """Observations (E, ...) and memory (E, M, A) -> actions (E, A), the new memory, steps k (E,)."""
    features = agent.encoder(obs)
    memory, steps = think(agent.kernel, agent.trunk(features), memory, math.floor(kbar) - 1, cfg)
    pick = torch.randint(cfg.particles, (len(obs),), device=obs.device)
    if best:
        pick = pessimism(agent.critics(features, memory), cfg.beta_actor).argmax(1)
    return memory[torch.arange(len(obs), device=obs.device), pick], memory, steps


def iid_steps(dims: int, cfg: Config) -> float:
    """The k of perfect mixing: a kernel that forgets at once, mean and log sigma 0, 64 times."""
    particles = torch.zeros(64, cfg.particles, dims)
    _, steps = think(lambda state, action: (0 * action, 0 * action), torch.zeros(64, 1), particles, 0, cfg)
    return steps.mean().item()


# --- training ---


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float = 0.0):
    """A step of what `loss` has a gradient for; Adam leaves the rest of its parameters alone."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()


def update(
    agent: Agent, optimizer, batch: Batch, length: int, with_actor: bool, entropy: Tensor, cfg: Config
) -> dict:
    """A step of the critics, and of actor and temperature if asked for; no host sync in it."""
    frozen, judge = agent.twins
    alpha, logs = agent.log_alpha.exp().detach(), {}
    for net in agent.residual:
        net.project()
    shift = random_shift if cfg.pixels else nn.Identity()
    weight = batch.live / batch.live.float().mean()

    features = agent.encoder(shift(batch.obs))
    with torch.no_grad():  # the target starts reasoning at s' from the replayed action, eq. (4)
        next_features = agent.encoder(shift(batch.next_obs))
        chain, logp = unroll(frozen, frozen, agent.trunk(next_features), batch.action, length, cfg)
        next_q = pessimism(agent.target(next_features, chain[:, -1:])[..., 0], cfg.beta_target)
        y = batch.reward + batch.discount * (next_q - alpha * logp[:, -1])
    if cfg.env not in ONE_STEP_TASKS:
        loss = critic_loss(agent.critics(features, batch.action[:, None])[..., 0], y, weight)
        descend(optimizer, loss)
        common.soft_update(agent.target, agent.critics, cfg.tau)
        logs["critic_loss"] = loss.detach()

    if with_actor:
        start = batch.action if cfg.start_replayed else chain[:, -1]
        features = features.detach()
        chain, logp = unroll(agent.kernel, frozen, agent.trunk(features), start, length, cfg)
        loss = actor_loss(judge(features, chain), logp, alpha, cfg.beta_actor, weight)
        descend(optimizer, loss, cfg.clip)
        if not cfg.anneal:
            descend(optimizer, temperature_loss(agent.log_alpha, logp, entropy, weight))
        logs["actor_loss"] = loss.detach()
    return logs


def train(cfg: Config, run: Run) -> dict:
    """One cell of the table: act, store, learn; then what the claims compare."""
    device, count = run.device, cfg.envs
    envs, tests = make_envs(cfg, count), make_envs(cfg, cfg.episodes)
    dims = envs.single_action_space.shape[0]
    measure = {"bandit": measure_bandit, "tracking": measure_tracking}.get(cfg.env, measure_control)
    agent = Agent(cfg, envs, device)
    optimizer = torch.optim.Adam(agent.parameters(), cfg.lr, fused=True, capturable=device.type == "cuda")
    frame, flag = torch.as_tensor(envs.reset()[0])[:, -1], torch.zeros(count, dtype=torch.bool)
    row = dict(frame=frame, action=uniform(count, dims), reward=torch.zeros(count), age=flag.long())
    rows = max(min(cfg.capacity // count, cfg.steps), cfg.stack + cfg.nstep + 1)
    replay = common.Replay(rows, **row, terminated=flag, done=flag)
    replay.to(device)
    mind = {"particles": uniform(count, cfg.particles, dims, device=device), "kbar": 4.0}

    @functools.cache  # each of the few lengths has its own CUDA graph
    def learner(length, with_actor):
        def learn(entropy):
            return update(agent, optimizer, sample(replay, cfg), length, with_actor, entropy, cfg)

        return common.graphed(learn) if cfg.compile else learn

    obs = None
    for step in run.steps(cfg.steps, agent=agent, replay=replay, mind=mind, optimizer=optimizer):
        if (
            obs is None or step % cfg.save_every == 0
        ):  # where a resumed run begins, all runs begin new episodes
            obs, _ = envs.reset(seed=int(torch.randint(2**31, ())))
            age, ended = np.zeros(count, int), np.zeros(count, bool)
        now = torch.as_tensor(obs, device=device)

        # reason, act, store
        action = uniform(count, dims, device=device)
        if step >= cfg.random_steps:
            action, mind["particles"], steps = act(agent, now, mind["particles"], mind["kbar"], cfg)
            mind["kbar"] = average_steps(mind["kbar"], steps)
        obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
        done = terminated | truncated | ((step + 2) % cfg.save_every == 0)
        row = dict(frame=now[:, -1], action=action, reward=np.float32(cfg.reward_scale * reward))
        row |= dict(terminated=terminated, done=done, age=age)
        replay.add(**{name: value[None] for name, value in row.items()})
        age, ended = np.where(ended, 0, age + 1), done

        # learn
        logs = {"reward": reward.mean(), "kbar": mind["kbar"]}
        if cfg.anneal:
            agent.log_alpha.data.fill_(math.log(cfg.alpha) * max(1 - step / (cfg.anneal * cfg.steps), 0))
        entropy = torch.full((), target_entropy(step, dims, cfg), device=device)  # no sync
        length = (cfg.length or math.ceil(mind["kbar"])) if cfg.chain else 1
        for i in range(cfg.updates if step >= max(cfg.random_steps, cfg.nstep) else 0):
            logs |= learner(length, (step * cfg.updates + i + 1) % cfg.actor_every == 0)(entropy)
        if step and step % cfg.eval_every == 0:
            logs |= measure(agent, tests, mind["kbar"], cfg, run)
        run.log(step, alpha=agent.log_alpha.exp(), **logs)

    rate = run.speed["steps_per_s"]
    run.speed |= {"env_steps_per_s": rate * count, "updates_per_s": rate * cfg.updates}
    return measure(agent, tests, mind["kbar"], cfg, run)


def average_steps(kbar: float, steps: Tensor) -> float:
    """Eq. (8) for E decisions at once; in float64, where a constant k = 7 does not round up to L = 8."""
    keep = 0.99 ** len(steps)
    return keep * kbar + (1 - keep) * steps.mean().item()


# --- evaluation ---


def measure_control(agent: Agent, envs, kbar: float, cfg: Config, run: Run) -> dict:
    """Return of an episode of each environment and steps of reasoning k, with particles of its own."""
    dims, steps = envs.single_action_space.shape[0], []
    memory = uniform(envs.num_envs, cfg.particles, dims, device=run.device)

    def policy(obs):
        nonlocal memory
        now = torch.as_tensor(obs, device=run.device)
        action, memory, k = act(agent, now, memory, kbar, cfg, cfg.best)
        steps.append(k.mean().item())
        return action.cpu().numpy()

    returns = common.evaluate_policy(envs, policy, int(torch.randint(2**31, ())))
    return {"return": returns.mean(), "k": np.mean(steps), "k_iid": iid_steps(dims, cfg)}


def w2(x: Tensor, y: Tensor) -> float:
    """Wasserstein-2 distance of two samples (n, d): the best assignment."""
    cost = torch.cdist(x, y).square().cpu().numpy()
    return cost[linear_sum_assignment(cost)].mean() ** 0.5


@torch.no_grad()
def measure_bandit(agent: Agent, envs: Goals, kbar: float, cfg: Config, run: Run) -> dict:
    """Soft-value gap E[log p(a) - r(a)] (the KL to the best policy, nats), W2, and how a_i+1 follows a_i.

    log p has the kernels of 2048 chains after 32 steps; the 512 actions come from other chains. lag_1 is the
    correlation of two successive actions about the circle's centre, all n together. Other means: n > 1.
    """
    obs = torch.as_tensor(envs.reset()[0][: len(MODES), 0], device=run.device)
    state = obs.repeat_interleave(2560, 0)
    action = uniform(len(state), 2, device=run.device)
    for _ in range(32):
        before = action
        mean, log_std = agent.kernel(state, before)
        raw = mean + log_std.exp() * torch.randn_like(mean)
        action = raw.tanh()
    lag = (before * action).sum() / action.square().sum()
    raw, mean, log_std, action = (x.view(-1, 2560, 2) for x in (raw, mean, log_std, action))
    action = action[:, :512]
    logp = mixture_logp(raw[:, :512], mean[:, 512:], log_std[:, 512:])
    gaps = (logp - goal_reward(obs[:, None], action)).mean(1).tolist()
    distances = [w2(x, goal_sample(o, 512)) for x, o in zip(action, obs, strict=True)]
    np.save(run.folder / "actions.npy", action.cpu())
    found = {f"gap_{n}": gap for n, gap in zip(MODES, gaps, strict=True)}
    return found | {"gap": np.mean(gaps[1:]), "w2": np.mean(distances[1:]), "lag_1": lag.item()}


@torch.no_grad()
def measure_tracking(agent: Agent, envs: Goals, kbar: float, cfg: Config, run: Run) -> dict:
    """Steps k after the goal has turned by d, from particles that had settled, and from uniform ones."""
    phi = uniform(64, device=run.device) * math.pi
    one = torch.zeros_like(phi, dtype=torch.long)
    cold = uniform(64, cfg.particles, 2, device=run.device)
    settled, _ = think(agent.kernel, goal_observation(one, phi), cold, cfg.max_steps, cfg)
    found = {}
    for turn in JUMPS:
        obs = goal_observation(one, phi + turn)
        particles, steps = think(agent.kernel, obs, settled, 0, cfg)
        found[f"k_{turn:.1f}"] = steps.mean().item()
    apart = [w2(x, goal_sample(o, cfg.particles)) for x, o in zip(particles, obs, strict=True)]
    steps = think(agent.kernel, goal_observation(one, phi), cold, 0, cfg)[1]
    still, first = found["k_0.0"], steps.mean().item()
    return found | {
        "k_cold": first,
        "saved": first - still,
        "rise": found["k_3.1"] - still,
        "w2_3.1": np.mean(apart),
    }


# --- figure, main ---


def draw(figure, table: dict, run: Run):
    """Actions for 2, 4 and 8 goals of the first seed; the gap over goals and k over turns, with intervals."""
    *pictures, gap, reasoning = figure.subplots(1, 4)
    for axis, row in zip(pictures, ("bandit: chain", "bandit: Gaussian"), strict=True):
        for actions in np.load(run.root / common.slug(f"{row}-s{run.cfg.seed}") / "actions.npy")[1:]:
            axis.plot(*actions.T, ".", markersize=2)
        axis.set(title=f"{row}: actions", xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    for axis, task, name, places, title in (
        (gap, "bandit", "gap_{}", MODES, "soft-value gap over goals"),
        (reasoning, "tracking", "k_{:.1f}", JUMPS, "steps over the turn of the goal"),
    ):
        for row in table:
            if row.startswith(task):
                columns = [[cell[name.format(x)] for cell in table[row]] for x in places]
                axis.errorbar(places, *zip(*map(common.interval, columns), strict=True), label=row)
        axis.set(title=title)
        axis.legend()


def dry_run(cfg: Config, run: Run):
    """Print parameters, memory and hours of a cell; the milliseconds are guesses for an H100."""
    envs = make_envs(cfg, 1)
    parameters = sum(p.numel() for p in Agent(cfg, envs, torch.device("cpu")).parameters())
    replay = min(cfg.capacity, cfg.steps * cfg.envs) * envs.reset()[0].nbytes / cfg.stack
    update, act = (8, 10) if cfg.pixels else (0.7, 5)
    hours = cfg.steps * (cfg.updates * update + cfg.envs * act) / 3.6e6
    size = (16 * parameters + replay) / 1e9
    run.print(
        f"{cfg.env}: {parameters:,} parameters, {size:.2f} GB with replay; a cell takes {hours:.1f} hours"
    )


def main():
    cfg = common.parse_config(CONFIGS)
    with Run(cfg, "" if cfg.env == CONFIGS[cfg.config].env else common.slug(cfg.env)) as run:
        if cfg.dry_run:
            return dry_run(cfg, run)
        table = run.grid(ROWS, train)
        run.check(CLAIMS, table)
        if set(table) >= set(DEMO_ROWS):
            run.figure(draw, table, run, size=(15, 4))


if __name__ == "__main__":
    main()
