"""FB-AWARE: zero-shot control by forward-backward representations, finer and from any offline data.

Cetin, Touati, Ollivier, "Finer Behavioral Foundation Models via Auto-Regressive Features and Advantage
Weighting", RLC 2025, arXiv 2412.04368.

The claim. Forward-backward representations (FB) learn, from data without rewards, an optimal policy for every
reward: code the reward into z, act by pi_z. But z is linear in the reward, which blurs it. Features that are
computed block by block, each reading the coarser part of z, make the code nonlinear and keep FB's theorem.
And on many offline data FB stays flat, until its policies are trained by advantage weighting.

State s, next state s' ~ rho in the data, z of K blocks on the sphere of radius sqrt d; bars: slow copies;
C codes an update, each shared by G transitions; E members of F.
  eq. (1)  M^pi(s, a, X) = sum_t gamma^t Pr(s_{t+1} in X | s, a, pi) = F(s, a, z)^T B(s', z) rho(ds')  at pi_z
           loss = sum_e [mean_{i != j} (F_e(i)^T B(j) - gamma_i mean_e' Fbar_e'(i')^T Bbar(j))^2 / 2
           - mean_i F_e(i)^T B(i)],  where i is a transition, j a next state, B(i) that of i's own next state
  eq. (2)  + mean_{i != j} (B(i)^T B(j))^2 / 2 - mean_i |B(i)|^2      orthonormal features: E[B B^T] = I
  eq. (3)  B_k(s, z) = sqrt d_k b_k / |b_k|,  b_k a network of s and sqrt d_j z_j / |z_j|, j < k
  eq. (4)  z_k = E_rho[r B_k(s', z)], k = 1..K; then z sqrt d / |z|    prompts: rewards, goals, demonstrations
  eq. (5)  r_z(s') = B(s', z)^T E[B B^T]^-1 z                          a reward of which z is the code
  eq. (6)  P(Q) = mean_e Q_e - c mean_{e != e'} |Q_e - Q_e'|,  Q_e = F_e(s, a, z)^T z
  eq. (7)  TD3: loss = -mean P(Q(s, mu(s, z) + noise))
  eq. (8)  A = mean_e Q_e(s, a, z) - P(Q(s, a', z)),  a' ~ pi_z(s)
  eq. (9)  p = softmax(A / (beta sqrt d)) over the transitions of z,  w ~ p / (1 - p)     improved weights
  eq. (10) AW: loss = -sum w log N(a; mu(s, z), std)
  eq. (11) evaluation sampling: the best of M actions by P(Q)

How to run
  python fb.py                                      the claim in miniature, with controls: two CPU cores
  python fb.py --task goal:1,-0.5                   then act by a prompt; nothing is trained
  python fb.py --config walker                      random torques on dm_control's walker: stand, walk, ...
  torchrun --nproc_per_node=8 fb.py --config full --data exorl/walker/rnd
  python fb.py --config full --env Hopper-v4 --data hopper_medium-v2.hdf5    or minari:ID, with its rewards

What is known and what is ours
- The paper's text was not at hand beyond abstract and captions, and its code is not public. Sizes are those
  of Meta's public FB code. Block norms, directions as input (eq. 3), codes shared by G transitions, the form
  of eq. (9) and its groups are ours.
- From that code: targets by the mean of F, pessimism in the actor only, a fixed deviation, log-density
  averaged over dimensions and without a correction for the clamp.
- beta counts in sqrt d: rewards of codes on the sphere (eq. 5) have a mean square of about d; those of a
  single task, where d = 1, are scaled to mean square 1. That code's beta of 1 is 1 / sqrt d here.
- Layer norms have no gains: those would be shared by the members. B's first biases are random, since after a
  layer norm a state of few dimensions would else count by its direction alone.
- Single-task rows take half of the updates, and the tasks share a batch. Actions are means (--best_of 1).
- Part A of the demo gives the policies (shortest paths) and solves for F, so it tests features alone.
- In part B actions off a random plane stall; springs that pull to changing goals collect the data.

Reading order: ROWS, Backward, the losses, encode, learn, act; then train_grid.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import gymnasium
import mujoco.rollout
import numpy as np
import torch
from dm_control.utils import rewards
from torch import Tensor, nn

import common
from common import Claim, EnsembleLinear, Run, UserError

DOMAINS = {  # of dm_control, and their tasks
    "walker": "stand walk run spin",
    "cheetah": "run walk walk_backward run_backward",
    "quadruped": "walk run stand jump",
    "humanoid": "stand walk run",
}
D4RL = {  # returns of a random and of an expert policy
    "HalfCheetah": (-280.18, 12135.0),
    "Hopper": (-20.27, 3234.3),
    "Walker2d": (1.63, 4592.3),
}


@dataclass
class Config(common.Config):
    # task and data
    env: str = "point_mass"  # ours; a domain of dm_control; a gymnasium id, for --data with rewards; grid
    data: str = ""  # ExORL's or mood.py's folder of the domain, D4RL's .hdf5, minari:ID; empty: noise
    collect: int = 0  # episodes of noise
    task: str = ""  # prompt for what was trained before: walker_run, goal:x,y,... or demo:EPISODE.npz
    seen: int = 0  # first coordinates of an observation, which B sees; 0: all
    goals: int = 32  # of the point mass, drawn for each seed
    # representation
    method: Literal["fb", "single", "fixed"] = "fb"  # single: networks for each of --codes tasks; fixed: none
    dim: int = 16  # of z (d)
    groups: int = 1  # blocks of z and B (K); 1: FB
    codes: int = 8  # different z in an update (C)
    others: int = 0  # next states that a z meets beside those of its transitions; 0: all of the update
    width: int = 96  # hidden units of F and actor
    width_b: int = 64  # hidden units of each block of B
    members: int = 2  # of F (E)
    # learning
    discount: float = 0.95  # gamma
    ortho: float = 1.0  # weight of eq. (2)
    goal_ratio: float = 0.8  # share of z that are codes of goals in the data; others are uniform
    tau: float = 0.03  # share of the networks that the slow copies take up in an update
    pessimism: float = 0.5  # c of eq. (6); with two members 0.5 is their minimum
    std: float = 0.2  # of the policy; fixed: actions are uniform in [-std, std]
    noise_clip: float = 0.3  # of the policy's noise, but for eqs. (8) and (11)
    actor: Literal["td3", "aw"] = "td3"  # eq. (7) or (10)
    beta: float = 0.25  # temperature of eq. (9) for rewards of mean square 1; that of eq. (5) is about d
    updates: int = 1200  # gradient updates
    block: int = 50  # updates a step: their transitions are drawn together
    batch: int = 128  # transitions an update
    lr: float = 2e-3  # Adam
    # prompts and evaluation
    prompt: int = 5000  # labelled next states that a reward is coded from
    episodes: int = 10  # of a task
    best_of: int = 1  # actions in evaluation sampling (M); 1: the mean action

    def check(self):
        super().check()
        few = self.batch <= self.codes or self.updates < 2 * self.block
        if few or self.dim % self.groups or self.batch % self.codes:
            raise UserError(
                "--dim: a multiple of --groups; --batch: of --codes, two or more; --updates: two --block"
            )

    def missing(self) -> str:
        """What there is to learn from and is not there, if anything."""
        made = not self.data and self.collect and self.env in (*DOMAINS, "point_mass")
        if made or self.data.startswith("minari:") or os.path.exists(self.data):
            return ""
        return f"--data {self.data}: not there; ExORL's or mood.py's folder of {self.env}, .hdf5, minari:ID"


GRID = dict(env="grid", dim=8, discount=0.9, lr=3e-3)
AW, ARE = dict(actor="aw"), dict(groups=2)
SINGLE = dict(method="single", dim=1, codes=4, others=0)
# a row of the table is the settings that it changes: the difference of two rows is an idea of the paper
ROWS = {
    "FB-AW": AW,
    "FB-AWARE": AW | ARE,
    "FB": {},
    "FB-ARE": ARE,
    "TD3": SINGLE,
    "TD3-AW": SINGLE | AW,
    "hold still": dict(method="fixed", std=0.0),
    "random actions": dict(method="fixed", std=1.0),
    "grid: best linear": GRID | dict(method="fixed"),
    "grid: FB": GRID,
    "grid: FB-ARE": GRID | ARE,
    "grid: FB-ARE, K = 4": GRID | dict(groups=4),
}
DEMO = Config(seeds=5, ranks=2, collect=100, seen=2, others=24)
WALKER = replace(
    DEMO, rows=("FB-AW", "FB-AWARE", "FB", "random actions"), seeds=1, env="walker", collect=40, seen=0,
    dim=32, width=128, discount=0.98, goal_ratio=0.5, tau=0.01, updates=3000, batch=256, lr=1e-3,
)  # fmt: skip
CONFIGS = {
    "smoke": replace(
        DEMO, seeds=1, ranks=1, collect=6, width=16, updates=20, block=10,
        episodes=1, best_of=2, goals=4, save_every=1,
    ),
    "demo": replace(DEMO, seed=10),
    "walker": WALKER,
    "gpu": replace(DEMO, ranks=8, others=0, dim=48, width=512, width_b=256, updates=20_000),
    "full": replace(
        WALKER, ranks=1, rows=("FB-AW", "FB-AWARE", "FB", "FB-ARE", "TD3-AW", "random actions"), seeds=5,
        collect=0, dim=100, codes=16, others=0, width=1024, width_b=256, updates=3_000_000, block=500,
        batch=1024, lr=1e-4, beta=0.1, prompt=50_000, save_every=200,
    ),
}  # fmt: skip
CLAIMS = [
    Claim("blocks explain what no linear code can", "error", "grid: FB-ARE", "grid: best linear", "lower"),
    Claim("... while FB stays above that bound", "error", "grid: FB", "grid: best linear"),
    Claim("... and so more goals are reached", "reached", "grid: FB-ARE", "grid: FB"),
    Claim("advantage weighting earns more where FB stays flat", "goals", "FB-AW", "FB"),
    Claim("... and ends nearer to the goals (m)", "distance", "FB-AW", "FB", "lower"),
    Claim("... and for agents of a single task (m)", "distance", "TD3-AW", "TD3", "lower"),
    Claim("blocks add to advantage weighting", "goals", "FB-AWARE", "FB-AW"),
]


# --- tasks ---


UNITS = np.array([0.15, 0.15, 0.05, 0.05])  # of the point mass's observations: m, m/s


def point_goals(cfg: Config):
    """Goals (goals, 2) in metres."""
    return np.random.default_rng([cfg.seed, 1]).uniform(-0.25, 0.25, (cfg.goals, 2))


def near(distance):
    """The point mass's reward: 1 within 3 cm of the goal, 0.1 at 9 cm."""
    return rewards.tolerance(distance, (0, 0.03), 0.06)


class PointMass:
    """dm_control's point mass under eight redundant thrusters, `count` times; rewards are computed elsewhere.

    Actions (count, 8) in [-1, 1] push by W a as far as they lie in the plane of W, drawn by the seed: others
    stall, so data cover little of what an actor may try. Observations are position and velocity; a step takes
    0.1 s.
    """

    def __init__(self, count, seed):
        from dm_control.suite import point_mass

        self.num_envs, self.seconds = count, 12.0
        self.model = mujoco.MjModel.from_xml_string(*point_mass.get_model_and_assets())
        self.thrusters = np.linalg.qr(np.random.default_rng(seed).standard_normal((8, 2)))[0].T  # W

    def reset(self, seed, options):
        places = np.random.default_rng(seed).uniform(-0.25, 0.25, (self.num_envs, 2))
        self.state = np.pad(places, ((0, 0), (1, 2)))  # time, position, velocity
        return np.float32(self.state[:, 1:] / UNITS), {}

    def step(self, actions):
        force = actions @ self.thrusters.T
        off = np.square(actions - force @ self.thrusters).sum(1, keepdims=True)
        control = (force.clip(-1, 1) * np.exp(-off / 0.25))[:, None].repeat(5, 1)
        data = [mujoco.MjData(self.model)]
        self.state = mujoco.rollout.rollout(self.model, data, self.state, control)[0][:, -1]
        over = self.state[:, 0] > self.seconds - 0.01
        return np.float32(self.state[:, 1:] / UNITS), 0.0 * over, over & False, over, {}


def ramp(x, top, margin, at_margin=0.0):
    """1 from `top` on, below it linear down to `at_margin` at top - margin."""
    return rewards.tolerance(x, (top, math.inf), margin, "linear", at_margin)


OWN = {  # rewards of MOOD's and ExORL's tasks that dm_control does not have
    "cheetah_walk": lambda physics: ramp(physics.speed(), 2, 2),
    "cheetah_walk_backward": lambda physics: ramp(-physics.speed(), 2, 2),
    "cheetah_run_backward": lambda physics: ramp(-physics.speed(), 10, 10),
    "walker_spin": lambda physics: ramp(physics.named.data.subtree_angmom["torso"][1], 10, 10),
    "quadruped_stand": lambda physics: ramp(physics.torso_upright(), 1, 2),
    "quadruped_jump": lambda physics: (
        OWN["quadruped_stand"](physics) * ramp(physics.named.data.subtree_com["torso"][2], 1, 1, 0.5)
    ),
}


def task_names(cfg: Config) -> list[str]:
    """All tasks of the environment."""
    if cfg.env == "point_mass":
        return [f"goal {i}" for i in range(cfg.goals)]
    return DOMAINS.get(cfg.env, "reward").split()


def make_env(cfg: Config, task: str):
    """A task of dm_control or OWN, or a gymnasium environment; flat observations, actions in [-1, 1]."""
    if cfg.env in DOMAINS:
        own = OWN.get(f"{cfg.env}_{task}")
        env = common.DmControl(cfg.env, "run" if own else task)
        if own:
            env.env.task.get_reward = own
        return env
    try:
        env = gymnasium.wrappers.FlattenObservation(gymnasium.make(cfg.env))
        return gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)
    except Exception as e:  # gymnasium's and the environments' own
        raise UserError(f"--env {cfg.env}: {e}") from None


def widths(cfg: Config) -> tuple[int, ...]:
    """Numbers in an observation and in an action."""
    if cfg.env == "point_mass":
        return 4, 8
    env = make_env(cfg, task_names(cfg)[0])
    return *env.observation_space.shape, *env.action_space.shape


def make_envs(cfg: Config, tasks: list[str], count: int):
    """`count` environments of each task, one task after the other."""
    if cfg.env == "point_mass":
        return PointMass(len(tasks) * count, cfg.seed)
    return gymnasium.vector.SyncVectorEnv(
        [partial(make_env, cfg, task) for task in tasks for _ in range(count)]
    )


def roll(envs, policy, seed: int):
    """An episode of each of n environments: returns (n,), observations (T, n, o), actions (T, n, m)."""
    steps = []

    def recorded(obs):
        steps.append((obs.copy(), policy(obs)))
        return steps[-1][1]

    returns = common.evaluate_policy(envs, recorded, seed)
    return returns, *map(np.stack, zip(*steps, strict=True))


# --- data ---


class Data(NamedTuple):
    """n transitions on the device, and all that load_episodes read."""

    s: Tensor  # (n, o)
    a: Tensor  # (n, m)
    next_s: Tensor  # (n, o)
    live: Tensor  # (n,) 1 - terminated
    goal: Tensor  # (n, seen) of next_s what B sees
    raw: dict[str, Tensor]


def load_data(cfg: Config, run: Run) -> Data:
    """The transitions of --data, or of episodes that are collected once a seed."""
    source = cfg.data or str(run.once(f"data {cfg.env}", collect))
    raw = common.load_episodes(source)
    found = tuple(raw[key].shape[1] for key in ("observation", "action"))
    if found != widths(cfg) or cfg.seen > found[0] or raw["action"].abs().max() > 1.001:
        raise UserError(
            f"{source}: observation and action have {found} numbers, in {cfg.env} {widths(cfg)}; "
            "--seen at most the first, actions in [-1, 1]"
        )
    if cfg.env in DOMAINS and "physics" not in raw:
        raise UserError(f"{source}: no physics to compute rewards from")
    next_s, live = raw["next_observation"], 1 - raw["terminated"][:, 0]
    columns = raw["observation"], raw["action"], next_s, live, next_s[:, : cfg.seen or None]
    return Data(*(x.to(run.device) for x in columns), raw)


def label(raw: dict[str, Tensor], rows: Tensor, cfg: Config) -> Tensor:
    """Rewards of all tasks at the next states of `rows` (n,): (tasks, n), on the CPU."""
    if cfg.env == "point_mass":
        places = raw["next_observation"][rows, :2].numpy() * UNITS[:2]
        distance = np.linalg.norm(places - point_goals(cfg)[:, None], axis=-1)
        return torch.tensor(near(distance)).float()
    if cfg.env not in DOMAINS:
        return raw["reward"][rows].T
    envs = [make_env(cfg, name) for name in task_names(cfg)]
    physics, found = envs[0].env.physics, []
    for state, action in zip(raw["physics"][rows].numpy(), raw["action"][rows].numpy(), strict=True):
        physics.set_state(state)
        physics.set_control(envs[0].low + (action + 1) / 2 * envs[0].span)  # humanoids pay for it
        physics.forward()
        found.append([float(env.env.task.get_reward(physics)) for env in envs])
    return torch.tensor(found).T


def collect(run: Run):
    """Episodes in ExORL's layout: torques that change now and then, 1000 steps for dm_control.

    For the point mass 500 steps, on which springs of random stiffness pull to goals that change.
    There row t of an action belongs to t - 1 -> t, row 0 to nothing.
    """
    cfg, draw, physics = run.cfg, np.random.standard_normal, []
    envs, point = make_envs(cfg, task_names(cfg)[:1], cfg.collect), cfg.env == "point_mass"
    envs.seconds = 50.1  # of the point mass
    aim = np.zeros((cfg.collect, 2) if point else envs.action_space.shape)
    stiffness = np.random.uniform(2, 20, (cfg.collect, 1))

    def policy(obs):
        change = np.random.random(stiffness.shape) < (0.02 if point else 0.1)
        aim[:] = np.where(change, np.random.uniform(-1, 1, aim.shape), aim)
        if not point:
            physics.append([env.env.physics.get_state() for env in envs.envs])
            return (1.5 * aim + 0.2 * draw(aim.shape)).clip(-1, 1)
        place, velocity = np.split(obs * UNITS, 2, 1)
        force = (stiffness * (0.28 * aim - place) - 2 * velocity).clip(-1, 1) + 0.3 * draw(aim.shape)
        return (force @ envs.thrusters + 0.05 * draw((len(obs), 8))).clip(-1, 1)

    _, obs, action = roll(envs, policy, cfg.seed + 10**6)
    none = np.zeros(obs.shape[:2])
    rows = dict(observation=obs, action=np.roll(action, 1, 0), reward=none, discount=none + 1)
    if physics:
        rows["physics"] = np.array(physics)
    for i in range(cfg.collect):
        np.savez(run.folder / f"{i:06d}.npz", **{key: x[:, i] for key, x in rows.items()})


# --- networks, with a leading axis of members ---


def bent(members, width, outputs):
    """The layers after a first linear one."""
    norm = nn.LayerNorm(width, elementwise_affine=False)
    return norm, nn.Tanh(), EnsembleLinear(members, width, outputs), nn.ReLU()


class TwoStreams(nn.Module):
    """Two inputs embedded apart, then read together: (members, B, left), (members, B, right) -> outputs."""

    def __init__(self, members, left, right, outputs, width):
        super().__init__()
        linear, half = partial(EnsembleLinear, members), width // 2
        self.left = nn.Sequential(linear(left, width), *bent(members, width, half))
        self.right = nn.Sequential(linear(right, width), *bent(members, width, half))
        self.head = nn.Sequential(linear(2 * half, width), nn.ReLU(), linear(width, outputs))

    def forward(self, left, right):
        return self.head(torch.cat([self.left(left), self.right(right)], -1))


def sphere(z: Tensor) -> Tensor:
    """z (..., d) on the sphere of radius sqrt d; 0 stays 0."""
    return math.sqrt(z.shape[-1]) * nn.functional.normalize(z, dim=-1)


class Backward(nn.Module):
    """B of eq. (3), K networks in one: block k reads the state and the directions of z's blocks before k.

    Directions alone: B(s, c z) = B(s, z), so that a reward's scale changes nothing but the scale of its code.
    """

    def __init__(self, inputs, cfg):
        super().__init__()
        groups, width, part = cfg.groups, cfg.width_b, cfg.dim // cfg.groups
        self.groups, self.dim = groups, cfg.dim
        self.first = EnsembleLinear(groups, inputs, width)
        nn.init.normal_(self.first.bias)  # else the norm leaves a state's direction alone
        if groups > 1:
            self.code = nn.Parameter(torch.randn(groups, cfg.dim, width) / math.sqrt(cfg.dim))
            before = torch.ones(groups, groups).tril(-1).repeat_interleave(part, 1)
            self.register_buffer("before", before[:, None])  # (K, 1, d): 1 for the blocks before k
        self.rest = nn.Sequential(*bent(groups, width, width), EnsembleLinear(groups, width, part))

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        """s (C, J, o), or (1, J, o) for states that all codes meet, and z (C, d) -> (C, J, d).

        With a single block (1, J, o) -> (1, J, d). The first layer is a sum over state and code.
        """
        h = self.first(s.flatten(0, 1).expand(self.groups, -1, -1)).unflatten(1, s.shape[:2])
        if self.groups > 1:
            direction = sphere(z.unflatten(-1, (self.groups, -1))).flatten(-2)
            h = h + ((direction * self.before) @ self.code)[:, :, None]
        b = sphere(self.rest(h.flatten(1, 2))).unflatten(1, (-1, s.shape[1]))
        return b.permute(1, 2, 0, 3).flatten(2)


class Agent(nn.Module):
    """F, B, their slow copies, and the actor, for (C, G, ...): G transitions for each of C codes z (C, d).

    Agents of a single task are the same with networks of their own for each task, z = 1 and Q = F (d = 1).
    """

    def __init__(self, cfg, obs, actions):
        super().__init__()
        self.members, self.own = cfg.members, cfg.codes if cfg.method == "single" else 1
        self.forward_map = TwoStreams(
            cfg.members * self.own, obs + cfg.dim, obs + actions, cfg.dim, cfg.width
        )
        self.backward_map = Backward(cfg.seen or obs, cfg)
        self.actor = TwoStreams(self.own, obs + cfg.dim, obs, actions, cfg.width)
        self.maps = nn.ModuleList([self.forward_map, self.backward_map])  # for one optimizer
        self.slow = copy.deepcopy(self.maps).requires_grad_(False)
        self.slow_forward, self.slow_backward = self.slow

    def rows(self, s: Tensor, more: Tensor) -> Tensor:
        """(C, G, o) and (C, G or 1, ...) side by side, for the networks they go to: (own, C G / own, ...)."""
        rows = torch.cat([s, more.expand(-1, s.shape[1], -1)], -1)
        return rows.reshape(self.own, -1, rows.shape[-1])

    def mean(self, s: Tensor, z: Tensor) -> Tensor:
        """Mean action: (C, G, o), (C, d) -> (C, G, m)."""
        right = s.reshape(self.own, -1, s.shape[-1])
        return self.actor(self.rows(s, z[:, None]), right).tanh().view(*s.shape[:2], -1)

    def features(self, net: nn.Module, s: Tensor, a: Tensor, z: Tensor) -> Tensor:
        """F(s, a, z) by `net`, forward_map or its slow copy: (E, C, G, d)."""
        inputs = (x.repeat(self.members, 1, 1) for x in (self.rows(s, z[:, None]), self.rows(s, a)))
        return net(*inputs).view(self.members, *s.shape[:2], -1)

    def q(self, s: Tensor, a: Tensor, z: Tensor) -> Tensor:
        """Q = F^T z of M actions for each state, a (M, C, G, m): (E, M, C, G)."""
        rows = s.repeat(1, len(a), 1), a.transpose(0, 1).flatten(1, 2)
        q = (self.features(self.forward_map, *rows, z) * z[:, None]).sum(-1)
        return q.unflatten(-1, (len(a), -1)).transpose(1, 2)


# --- the equations ---


class Batch(NamedTuple):
    """G transitions for each of C codes, next states for eq. (1) and for codes of goals, as B sees them."""

    s: Tensor  # (C, G, o)
    a: Tensor  # (C, G, m)
    next_s: Tensor  # (C, G, o)
    live: Tensor  # (C, G)
    met: Tensor  # (C, J, seen), or (1, J, seen) for all codes
    goal: Tensor  # (C, 1, seen)
    own: Tensor  # (C or 1, G, J) which of `met` is the transition's own next state


def measure(f: Tensor, b: Tensor) -> Tensor:
    """Density F^T B of the successor measure: (E, C, G, d), (C or 1, J, d) -> (E, C, G, J)."""
    return torch.einsum("ecgd,cjd->ecgj", f, b)


def fb_loss(m: Tensor, target: Tensor, discount: Tensor, own: Tensor) -> Tensor:
    """Eq. (1): m (E, C, G, J), target (C, G, J), gamma_i (C, G), own next states (C or 1, G, J) -> ().

    Other next states j are independent samples of rho; the own one carries the term that is linear in m.
    """
    error = (m - discount[..., None] * target).masked_fill(own, 0.0)
    pairs = target.numel() * (1 - 1 / own.shape[-1])
    diagonal = (m * own).sum() / discount.numel()
    return 0.5 * error.square().sum() / pairs - diagonal


def ortho_loss(b: Tensor) -> Tensor:
    """Eq. (2), the mean over codes: (C, J, d) -> ()."""
    count, norms = b.shape[1], b.square().sum(-1)
    off = (b @ b.mT).square().sum() - norms.square().sum()
    return 0.5 * off / (len(b) * count * (count - 1)) - norms.mean()


def encode(backward: Backward, states: Tensor, reward: Tensor) -> Tensor:
    """Eq. (4), before it is projected: states (C or 1, J, seen), rewards (C, J) -> z (C, d).

    A goal is a reward of 1 at one state, a demonstration at each of its states. A block depends on those
    before it only, so pass k settles block k, and after K passes z = mean_j r_j B(s_j, z) holds exactly.
    """
    z = states.new_zeros(len(reward), backward.dim)
    for _ in range(backward.groups):
        z = (reward[:, None] @ backward(states, z))[:, 0] / reward.shape[1]
    return z


def covariance(b: Tensor) -> Tensor:
    """E[B B^T] over states and a small ridge: (..., J, d) -> (..., d, d)."""
    return b.mT @ b / b.shape[-2] + 1e-4 * torch.eye(b.shape[-1]).to(b)


def decode(b: Tensor, z: Tensor) -> Tensor:
    """Eq. (5): the reward (J,) at states with features B(s, z) (J, d), of which z (d,) is the code."""
    return b @ torch.linalg.solve(covariance(b), z)


@torch.no_grad()
def sample_z(backward: Backward, goal: Tensor, cfg: Config) -> Tensor:
    """Codes to train on, (C, d): of goals (C, 1, seen) in a share of goal_ratio, else uniform."""
    uniform = torch.randn(len(goal), cfg.dim, device=goal.device)
    coded = encode(backward, goal, torch.ones_like(goal[..., 0]))
    return sphere(torch.where(torch.rand_like(uniform[:, :1]) < cfg.goal_ratio, coded, uniform))


def pessimistic(q: Tensor, c: float) -> Tensor:
    """P of eq. (6): mean over members minus c times their mean |difference| of two: (E, ...) -> (...)."""
    n = len(q)
    return q.mean(0) - c * (q[:, None] - q).abs().sum((0, 1)) / max(1, n * (n - 1))


def noisy(mean: Tensor, std: float, clip: float = math.inf) -> Tensor:
    """mean + clipped noise, kept in [-1, 1]; the gradient passes as if it were not."""
    a = mean + (std * torch.randn_like(mean)).clamp(-clip, clip)
    return a + (a.clamp(-1, 1) - a).detach()


def advantage_weights(advantage: Tensor, cfg: Config) -> Tensor:
    """Eq. (9): (C, G) -> (C, G), of sum 1."""
    log_p = (advantage / (cfg.beta * math.sqrt(cfg.dim))).log_softmax(-1)
    log_w = (log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))).log_softmax(-1)
    return log_w.exp() / len(advantage)


def by_advantage(agent: Agent, batch: Batch, z: Tensor, cfg: Config) -> Tensor:
    """Eqs. (8) and (10), but for a constant; no gradient of Q, which may be wrong off the data."""
    mean = agent.mean(batch.s, z)
    with torch.no_grad():
        q, drawn = agent.q(batch.s, torch.stack([batch.a, noisy(mean, cfg.std)]), z).unbind(1)
        weight = advantage_weights(q.mean(0) - pessimistic(drawn, cfg.pessimism), cfg)
    return (weight * (batch.a - mean).square().mean(-1)).sum() / (2 * cfg.std**2)


def by_critic(agent: Agent, batch: Batch, z: Tensor, cfg: Config) -> Tensor:
    """Eq. (7)."""
    action = noisy(agent.mean(batch.s, z), cfg.std, cfg.noise_clip)
    return -pessimistic(agent.q(batch.s, action[None], z), cfg.pessimism).mean()


ACTOR_LOSS = {"td3": by_critic, "aw": by_advantage}


# --- training ---


def gather(data: Data, index: Tensor, cfg: Config) -> Batch:
    """The batch of transitions with numbers (C, 1 + G + others).

    For each code one transition that ends at a goal, G to learn from, and others to meet the ends of.
    """
    mine = index[:, 1 : 1 + cfg.batch // cfg.codes]
    met = index[:, 1:] if cfg.others else mine.reshape(1, -1)
    own = torch.eye(cfg.batch // len(met), met.shape[1], device=index.device).bool()
    own = own.view(-1, mine.shape[1], met.shape[1])
    return Batch(*(x[mine] for x in data[:4]), data.goal[met], data.goal[index[:, :1]], own)


def representation_loss(agent: Agent, batch: Batch, slow: Tensor, z: Tensor, cfg: Config) -> Tensor:
    """Eqs. (1) and (2) on a batch; slow: Fbar(s', a', z) (E, C, G, d)."""
    target = measure(slow.mean(0, keepdim=True), agent.slow_backward(batch.met, z))[0]
    b = agent.backward_map(batch.met, z)
    m = measure(agent.features(agent.forward_map, batch.s, batch.a, z), b)
    return fb_loss(m, target, cfg.discount * batch.live, batch.own) + cfg.ortho * ortho_loss(b)


def critic_loss(agent: Agent, batch: Batch, slow: Tensor, z: Tensor, reward: Tensor, cfg: Config) -> Tensor:
    """TD3's, for agents of a single task: squared errors to r + gamma P(Q'(s', a')), reward (C, G)."""
    y = reward + cfg.discount * batch.live * pessimistic(slow[..., 0], cfg.pessimism)
    return 0.5 * (agent.q(batch.s, batch.a[None], z)[:, 0] - y).square().mean(-1).sum()


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """One step on the optimizer's parameters; nothing else gets a gradient, F none from the actor's loss."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    optimizer.step()
    return loss.detach()


def learn(agent: Agent, data: Data, cfg: Config, run: Run):
    """The training loop: without rewards, but for agents of a single task."""
    single = cfg.method == "single"
    maps, actor = (
        torch.optim.Adam(network.parameters(), cfg.lr, fused=True, capturable=data.s.is_cuda)
        for network in (agent.maps, agent.actor)
    )
    if single:  # rewards of mean square 1, for which beta is meant
        earned = sphere(label(data.raw, torch.arange(len(data.s)), cfg)[: cfg.codes]).to(run.device)

    def update(index):
        batch = gather(data, index, cfg)
        z = torch.ones_like(batch.live[:, :1]) if single else sample_z(agent.backward_map, batch.goal, cfg)
        with torch.no_grad():
            next_a = noisy(agent.mean(batch.next_s, z), cfg.std, cfg.noise_clip)
            slow = agent.features(agent.slow_forward, batch.next_s, next_a, z)
        if single:
            loss = critic_loss(agent, batch, slow, z, earned.gather(1, index[:, 1:]), cfg)
        else:
            loss = representation_loss(agent, batch, slow, z, cfg)
        loss = descend(maps, loss)
        common.soft_update(agent.slow, agent.maps, cfg.tau)
        return loss, descend(actor, ACTOR_LOSS[cfg.actor](agent, batch, z, cfg))

    update = common.graphed(update)  # on a GPU one CUDA graph
    # a single task needs half of the updates
    for step in run.steps(cfg.updates // cfg.block // (1 + single), agent=agent, maps=maps, actor=actor):
        shape = cfg.block, cfg.codes, 1 + cfg.batch // cfg.codes + cfg.others
        for index in torch.randint(len(data.s), shape, device=run.device):
            loss, actor_loss = update(index)
        run.log(step, loss=loss, actor_loss=actor_loss)


def train(cfg: Config, run: Run) -> dict[str, float]:
    """One cell of the table: learn, code the tasks, act."""
    if cfg.env == "grid":
        return train_grid(cfg, run)
    data, names = load_data(cfg, run), task_names(cfg)
    if cfg.method == "single":
        codes = min(cfg.codes, len(names))
        cfg = replace(cfg, codes=codes, batch=cfg.batch // codes * codes)
    if cfg.method == "fixed":
        return evaluate(
            lambda obs: np.random.uniform(-cfg.std, cfg.std, (len(obs), data.a.shape[1])), names, cfg, run
        )
    agent = Agent(cfg, *widths(cfg)).to(run.device)
    prompt(agent, data, cfg)  # tasks without any reward in the data end here, not after learning
    learn(agent, data, cfg, run)
    torch.save(agent.state_dict(), run.folder / "agent.pt")
    z = prompt(agent, data, cfg)
    return evaluate(partial(act, agent, z, cfg), names[: len(z)], cfg, run)


# --- acting and evaluation ---


@torch.no_grad()
def prompt(agent: Agent, data: Data, cfg: Config) -> Tensor:
    """Codes of all tasks, from their rewards at some states of the data: (tasks, d); 1 for single tasks."""
    if cfg.method == "single":
        return data.goal.new_ones(cfg.codes, 1)
    rows = torch.randperm(len(data.s))[: cfg.prompt]
    reward = label(data.raw, rows, cfg).to(data.goal)
    z = encode(agent.backward_map, data.goal[rows][None], reward)
    if z.norm(dim=1).min() < 1e-6:
        raise UserError("a task's rewards in the data have no code; --prompt takes more states")
    return sphere(z)


@torch.no_grad()
def act(agent: Agent, z: Tensor, cfg: Config, obs: np.ndarray) -> np.ndarray:
    """Mean actions, or by eq. (11) the best of M by P(Q), noise not clipped.

    Observations (n, o) of n / C environments for each of the codes z (C, d) -> (n, m).
    """
    s = torch.as_tensor(obs).to(z).unflatten(0, (len(z), -1))
    a = agent.mean(s, z)
    if cfg.best_of > 1:
        tried = noisy(a.expand(cfg.best_of, *a.shape), cfg.std)
        best = pessimistic(agent.q(s, tried, z), cfg.pessimism).argmax(0)
        a = tried.take_along_dim(best[None, ..., None], 0)[0]
    return a.flatten(0, 1).cpu().numpy()


def evaluate(policy, names: list[str], cfg: Config, run: Run) -> dict[str, float]:
    """Mean return of each task, from the same starts for all rows.

    On the point mass means over goals, `four` over those that agents of a single task learn, and the mean
    distance (m) to the goal at the end.
    """
    returns, obs, _ = roll(make_envs(cfg, names, cfg.episodes), policy, cfg.seed)
    if cfg.env != "point_mass":
        found = dict(zip(names, returns.reshape(len(names), -1).mean(1), strict=True))
        if (robot := cfg.env.split("-")[0]) in D4RL:
            low, high = D4RL[robot]
            found["score"] = 100 * (found["reward"] - low) / (high - low)
        return found
    places = obs[..., :2].reshape(len(obs), len(names), -1, 2) * UNITS[:2]
    np.save(run.folder / "places.npy", places[:, :4])
    distance = np.linalg.norm(places - point_goals(cfg)[: len(names), None], axis=-1)
    reward = near(distance[len(obs) // 2 :]).mean((0, 2))
    return dict(goals=reward.mean(), distance=distance[-1].mean(), four=reward[:4].mean())


def answer(cfg: Config, run: Run):
    """--task: act by a prompt with the finished agent of the first of --rows; nothing is trained."""
    row = [*cfg.rows, *ROWS][0]
    cfg = replace(cfg, **ROWS.get(row, {}))
    file = run.root / common.slug(f"{row}-s{cfg.seed}") / "agent.pt"
    if not file.is_file() or cfg.method != "fb":
        raise UserError(f"--task: no {file}; first run without --task, then name an FB row in --rows")
    data, names = load_data(cfg, run), task_names(cfg)
    agent, n = Agent(cfg, *widths(cfg)).to(run.device), data.goal.shape[1]
    kind, _, what = cfg.task.partition(":")
    task = names[0] if what else cfg.task.removeprefix(f"{cfg.env}_")
    try:
        agent.load_state_dict(torch.load(file, map_location=run.device))
        if what:
            rows = [what.split(",")] if kind == "goal" else next(common.read_exorl(what))[0][:, :n]
            states = torch.tensor(np.array(rows, np.float32)[None], device=run.device)
            z = sphere(encode(agent.backward_map, states, torch.ones_like(states[..., 0])))
        else:
            z = prompt(agent, data, cfg)[[names.index(task)]]
    except Exception as e:  # files from outside raise a dozen kinds
        raise UserError(
            f"--task: {str(e)[:90]!r}; there are {names}, goal: and {n} numbers, demo:FILE.npz, for {file}"
        ) from None
    returns, obs, _ = roll(make_envs(cfg, [task], cfg.episodes), partial(act, agent, z, cfg), cfg.seed)
    found = (
        f"ends at {obs[-1, :, :n].mean(0).round(2)}"
        if what or cfg.env == "point_mass"
        else f"return {returns.mean():.2f}"
    )
    run.print(f"{cfg.task}: {found}")


# --- part A: exact measures on a grid ---


def grid_world(side: int, discount: float) -> tuple[Tensor, Tensor]:
    """The next cell (S, 5) after staying or a step, and measures (S, 5 S, S) of shortest paths to each cell.

    A measure is the exact density P (I - gamma P_pi)^-1 / rho, rho uniform.
    """
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    moves, eye = torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]), torch.eye(side**2)
    following = (place[:, None] + moves).clamp(0, side - 1) @ torch.tensor([side, 1])
    distance = (place[:, None] - place).abs().sum(-1)
    policy = eye[following.gather(1, distance[following].argmin(1)).T]  # P_pi (g, s, s')
    return following, side**2 * eye[following.flatten()] @ torch.linalg.inv(eye - discount * policy)


def best_forward(b: Tensor, m: Tensor) -> Tensor:
    """The F (C, SA, d) that minimises eq. (1) for features B (C, S, d): M B / S, times E[B B^T]^-1."""
    return torch.linalg.solve(covariance(b), (m @ b / b.shape[1]).mT).mT


def grid_error(f: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """|F B^T - M|^2 / |M|^2, the mean over codes."""
    return ((f @ b.mT - m).square().sum((1, 2)) / m.square().sum((1, 2))).mean()


def linear_bound(m: Tensor, dim: int) -> float:
    """The least grid_error of any features that do not see z, by the spectrum of M^T M / |M|^2."""
    gram = (m.mT @ m / m.square().sum((1, 2), keepdim=True)).mean(0).double()  # trace 1
    return 1 - torch.linalg.eigvalsh(gram)[-dim:].sum().item()


def reached(q: Tensor, following: Tensor) -> float:
    """Share of (goal, start) with the greedy policy of q (goals, 5 S) at the goal after 4 S^(1/2) steps."""
    cells = len(following)
    action = q.view(cells, cells, -1).argmax(-1)
    place = torch.arange(cells).expand(cells, -1)
    for _ in range(4 * math.isqrt(cells)):
        place = following[place, action.gather(1, place)]
    return place.T.eq(torch.arange(cells)).float().mean().item()


def train_grid(cfg: Config, run: Run) -> dict[str, float]:
    """One cell of part A: policies and measures are given, B is learned, F follows in closed form."""
    following, m = grid_world(7, cfg.discount)
    if cfg.method == "fixed":
        return {"error": linear_bound(m, cfg.dim)}
    states = 7 * torch.eye(len(m))[None]  # of unit variance, roughly
    backward = Backward(len(m), cfg)
    optimizer = torch.optim.Adam(backward.parameters(), cfg.lr)

    def represent(goal):
        """Codes z (C, d) of goals (C,), features B (C, S, d), F (C, 5 S, d)."""
        z = sphere(encode(backward, states[0, goal][:, None], torch.ones(len(goal), 1)))
        b = backward(states, z).expand(len(z), -1, -1)
        return z, b, best_forward(b, m[goal])

    for step in run.steps(cfg.updates // 5, backward=backward, optimizer=optimizer):
        goal = torch.randperm(len(m))[:16]
        _, b, f = represent(goal)
        run.log(step, loss=descend(optimizer, grid_error(f, b, m[goal])))
    with torch.no_grad():
        z, b, f = represent(torch.arange(len(m)))
    goal, part = len(m) // 2, cfg.dim // cfg.groups
    codes = [decode(b[goal, :, :k], z[goal, :k]) for k in range(part, cfg.dim + 1, part)]
    np.save(run.folder / "picture.npy", torch.stack([m[goal, 0], f[goal, 0] @ b[goal].T, *codes]))
    return {"error": grid_error(f, b, m).item(), "reached": reached((f @ z[..., None])[..., 0], following)}


# --- figure, sizes, main ---


def draw(figure, run):
    """Measures from a corner of the grid, the code of a goal from coarse to fine; paths of the point mass."""

    def load(row, name):
        return np.load(run.root / common.slug(f"{row}-s{run.cfg.seed}") / name)

    axes = figure.subplots(3, 3).flat
    images = [*load("grid: FB", "picture.npy")[:2], *load("grid: FB-ARE", "picture.npy")[1:]]
    titles = ["exact measure", "FB", "FB-ARE", "code of a goal, first block", "code of a goal, both blocks"]
    for image, title, axis in zip(images, titles, axes, strict=False):
        axis.imshow(image.reshape(7, 7))
        axis.set_title(title)
    for row, axis in zip(tuple(ROWS)[:4], axes, strict=False):
        for k, goal in enumerate(point_goals(run.cfg)[:4]):
            axis.plot(*load(row, "places.npy")[:, k].T.swapaxes(1, 2), f"C{k}", linewidth=0.8)
            axis.plot(*goal, f"C{k}*", markersize=12)
        axis.set(title=f"{row}: paths to four goals", aspect="equal")


def dry_run(cfg, run):
    """Parameters and hours of a cell, and what is missing."""
    size = sum(p.numel() for p in Agent(cfg, *widths(cfg)).parameters() if p.requires_grad)
    hours = cfg.updates * 12 * size * cfg.batch / 3.6e17
    run.print(f"{size:,} parameters, {hours:.1f} hours a cell at 100 TFLOP/s. {cfg.missing()}")


def main():
    cfg = common.parse_config(CONFIGS)
    with Run(cfg, cfg.data) as run:
        if cfg.dry_run:
            return dry_run(cfg, run)
        if cfg.missing():
            raise UserError(cfg.missing())
        if cfg.task:
            return answer(cfg, run)
        table = run.grid(ROWS, train)
        run.check(CLAIMS, table)
        if set(table) >= set(ROWS) and cfg.env == "point_mass":
            run.figure(draw, run, size=(9, 9))


if __name__ == "__main__":
    main()
