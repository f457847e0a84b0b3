"""Hyperbolic deep reinforcement learning (S-RYM): an agent's last features live in the Poincare ball.

Cetin, Chamberlain, Bronstein, Hunt, "Hyperbolic Deep Reinforcement Learning", ICLR 2023, arXiv 2210.01542.
Hyper++ is of Klein et al., "Understanding and Improving Hyperbolic Deep RL", ICLR 2026, arXiv 2512.14202.

The claim. What an agent can reach from a state is a tree, and hyperbolic space has room for trees. A naive
hyperbolic last layer fails, since its gradients explode at the border of the ball. S-RYM (spectral norm on
the Euclidean encoder, features times 1 / sqrt n) is stable, and generalises better from fewer dimensions.

Curvature -1: points x, p in the ball |x| < 1, v in R^n; output i has an offset p_i and a normal w_i.
  eq. (1)  exp_0(v) = tanh(|v|) v / |v|
  eq. (2)  x (+) y = ((1 + 2<x,y> + |y|^2) x + (1 - |x|^2) y) / (1 + 2<x,y> + |x|^2 |y|^2)   Mobius addition
  eq. (3)  f_i(x) = |w_i| asinh(2 <z,w_i> / ((1 - |z|^2) |w_i|)),  z = -p_i (+) x       hyperplane layer (A)
  eq. (4)  2 <z,w> / (1 - |z|^2) = 2 (<x, w + 2 s p> - (1 + |x|^2) s) / (1 - |x|^2),  s = <p,w> / (1 - |p|^2)
           so eq. (3) is one matrix product for all outputs; the z of a pair (x, p_i) is never made
  eq. (5)  S-RYM: x = exp_0(E(o) / sqrt n),  each convolution and linear layer of E has spectral norm 1
  eq. (6)  Riemannian Adam: r = (1 - |p|^2)^2 / 4 grad,  p <- exp_p(-lr m / (sqrt v + eps)),  m averages r
           and is transported along, v averages |r|_p^2: one number a point
  eq. (7)  Hyper++: v = sigmoid(<u,h> + c) atanh(.95) h,  h = tanh(RMSNorm(E(o))) / sqrt n,
           on the hyperboloid (x_0, x_r) = (cosh|v|, sinh|v| v / |v|);  with offsets r_i and normals z_i
           f_i = |z_i| asinh((cosh r_i <x_r,z_i> - x_0 sinh r_i |z_i|) / |z_i|)
  eq. (8)  HL-Gauss: a return is a Gaussian over bins, the critic's loss the cross entropy with it
  eq. (9)  GAE: A_t = d_t + gamma lambda A_{t+1},  d_t = r_t + gamma V_{t+1} - V_t
  eq. (10) PPO: mean max(-A ratio, -A clip(ratio)) + .5 value loss - .01 entropy
  eq. (11) C51: y = sum_{k<n} gamma^k r_k + gamma^n z, its probability shared by the neighbouring atoms
  eq. (12) delta = max_ijk (min(A_ik, A_kj) - A_ij),  A_ij = (d_ir + d_jr - d_ij) / 2,  d a distance, r a base
           relative: 2 delta / diameter

How to run
  python hyperbolic_rl.py                                        the claim in miniature: two CPU cores
  python hyperbolic_rl.py --config full --env procgen:bigfish    the paper's Procgen setting, one of 16 games
  python hyperbolic_rl.py --config atari --env atari:pong        data-efficient Rainbow on Atari 100K
  torchrun --nproc_per_node=8 hyperbolic_rl.py --config full     ranks take other rows and seeds

Departures
- w_i starts at N(0, (0.01 / sqrt n)^2), as the paper says (its code passes that number as the mean: |w_i| is
  about sqrt n); in the demo with |w_i| about 0.3, since small ones first drive x to the border.
- Hyper++ makes three passes over a rollout, as all rows do; its paper two (--rows Hyper++ --epochs 2).
- delta is that of the last hidden layer before ReLU or ball, in Euclidean distance.
- A minibatch has the same number of steps of each environment, so that ranks can share it.
- Every --save_every steps all episodes start anew, so that resuming is exact. A time limit is an end.
- PPO's acting runs no power iteration: one normalised weight serves a rollout, and all tests.
- Rainbow (no public code): noise lies on normalised weights, not on biases; a lost life ends a training
  episode; the replay holds the whole run, 2.8 GB of stacked frames.
- The demo's pictures are scaled up (gain): an encoder of spectral norm 1 cannot raise the norm of small ones.
- Returns of several games are left to rliable; `score` is Procgen's normalised return.

Reading order: Config, ROWS, hyperplane_scores, srym, RiemannianAdam, Tail, train_ppo, train_rainbow.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from matplotlib.patches import Circle
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import common
from common import Claim, Run, UserError


@dataclass
class Config(common.Config):
    # task
    env: str = "tree"  # tree (ours), procgen:GAME or atari:GAME
    envs: int = 64  # environments that step together (E)
    levels: int = 50  # levels to train on; the test has others
    cells: int = 3  # side of the tree's maze, in rooms
    horizon: int = 24  # steps of an episode of the tree
    # network
    gain: float = 2.0  # pictures are floats in [-gain, gain]
    channels: tuple[int, ...] = (8, 16)  # of the IMPALA stacks
    features: int = 32  # of the last hidden layer (n)
    flat_features: int = 64  # the same where they live in flat space
    geometry: Literal["flat", "ball", "hyperboloid"] = "ball"  # where they live
    spectral: bool = True  # spectral normalisation of all layers before the geometry
    rescale: bool = True  # features times 1 / sqrt n before exp_0
    relu: bool = False  # ReLU before exp_0
    normals: float = 0.3  # first standard deviation of w_i, times sqrt n
    bins: int = 0  # of a categorical critic (HL-Gauss); 0: a scalar with a clipped squared error
    # learning
    algo: Literal["ppo", "rainbow"] = "ppo"  # on IMPALA's residual stacks; data-efficient Rainbow's encoder
    steps: int = 37  # PPO: iterations of rollout and update; Rainbow: steps of the environment
    lr: float = 4e-3  # Adam's and Riemannian Adam's, constant
    adam_eps: float = 1e-5  # epsilon of both
    discount: float = 0.999  # gamma
    max_grad: float = 0.5  # the gradient's norm is clipped to this
    # PPO
    rollout: int = 32  # steps of each environment an iteration (T)
    epochs: int = 3  # passes over them
    minibatches: int = 4  # updates a pass
    gae_lambda: float = 0.95  # lambda
    clip: float = 0.2  # of the ratio, and of the change of a value
    value_coef: float = 0.5  # weight of the value loss
    entropy_coef: float = 0.01  # weight of the entropy
    # Rainbow
    warmup: int = 1600  # steps before the first update
    batch: int = 32  # transitions an update
    nstep: int = 20  # rewards in a target
    atoms: int = 51  # of a return's distribution
    reach: float = 10.0  # atoms and bins lie in [-reach, reach]
    noise: float = 0.1  # first sigma of the noisy layers
    priority: float = 0.5  # exponent of a transition's loss (omega)
    correction: float = 0.4  # exponent of the importance weights (beta) at first; 1 at the end
    target_every: int = 2000  # steps between two copies to the target network
    # evaluation
    eval_every: int = 12  # steps between two evaluations
    episodes: int = 700  # an evaluation, on the training and on the test levels
    points: int = 300  # features that the relative delta is computed on

    def check(self):
        super().check()
        if self.cells < 2:
            raise UserError("--cells must be 2 or more: a maze has a start, a key and a treasure")
        make_envs(self, 1, slice(None), train=True)


# a row of the table is the settings that it changes: the difference of two rows is an idea of the paper
ROWS = {
    "S-RYM": {},
    "euclidean": dict(geometry="flat", spectral=False),
    "naive": dict(spectral=False, rescale=False, relu=True),
    "Hyper++": dict(geometry="hyperboloid", spectral=False, bins=51),
    "S-RYM, n = 8": dict(features=8),
    "S-RYM, n = 2": dict(features=2),
    "S-RYM, one iteration": dict(steps=1),
    "euclidean, SN": dict(geometry="flat"),
}
DEMO = Config(seed=20, seeds=4, ranks=2, rows=tuple(ROWS)[:7], log_every=1)
FULL = replace(
    DEMO,
    seed=0,
    seeds=5,
    rows=(),
    ranks=1,
    env="procgen:starpilot",
    levels=200,
    gain=1.0,
    normals=0.01,
    channels=(16, 32, 32),
    flat_features=256,
    lr=5e-4,
    minibatches=8,
    steps=1526,  # 25 M steps
    rollout=256,
    eval_every=50,
    episodes=10,
    points=1000,
)
CONFIGS = {
    "smoke": replace(DEMO, seed=0, ranks=1, seeds=1, envs=8, rollout=8, steps=3, episodes=8, points=32),
    "demo": DEMO,
    "gpu": replace(DEMO, ranks=8, cells=5, horizon=64, channels=(16, 32, 32), lr=1e-3, steps=30, rollout=256),
    "full": FULL,
    "atari": replace(
        FULL,
        rows=("S-RYM", "euclidean"),
        seeds=10,
        env="atari:pong",
        algo="rainbow",
        features=256,
        envs=1,
        steps=100_000,
        lr=1e-4,
        adam_eps=1.5e-4,
        discount=0.99,
        max_grad=10.0,
        log_every=500,
        eval_every=25_000,
        save_every=25_000,
    ),
}
CLAIMS = [
    Claim("S-RYM returns more on new levels than a naive hyperbolic layer", "test", "S-RYM", "naive"),
    Claim("... and its gradients are smaller", "gradient", "S-RYM", "naive", "lower"),
    Claim("S-RYM returns more on new levels than the Euclidean agent", "test", "S-RYM", "euclidean"),
    Claim("... and loses less from training levels to new ones", "gap", "S-RYM", "euclidean", "lower"),
    Claim(
        "... and keeps it in 8 dimensions of 32, margin 0.09", "test", "S-RYM, n = 8", "S-RYM", margin=-0.09
    ),
    Claim("relative delta falls in training", "delta", "S-RYM", "S-RYM, one iteration", "lower"),
    Claim("Hyper++ returns no less than S-RYM, margin 0.1", "test", "Hyper++", "S-RYM", margin=-0.1),
    Claim("... and learns in less time (us a step)", "learn_us", "Hyper++", "S-RYM", "lower"),
]

# Procgen's constants for easy levels: return of a random and of a perfect agent
PROCGEN = {
    "bigfish": (1, 40),
    "bossfight": (0.5, 13),
    "caveflyer": (3.5, 12),
    "chaser": (0.5, 13),
    "climber": (2, 12.6),
    "coinrun": (5, 10),
    "dodgeball": (1.5, 19),
    "fruitbot": (-1.5, 32.4),
    "heist": (3.5, 10),
    "jumper": (3, 10),
    "leaper": (3, 10),
    "maze": (5, 10),
    "miner": (1.5, 13),
    "ninja": (3.5, 10),
    "plunder": (4.5, 30),
    "starpilot": (2.5, 64),
}


# --- the ball ---


def dot(x: Tensor, y: Tensor) -> Tensor:
    """(..., n) each -> (..., 1)."""
    return (x * y).sum(-1, keepdim=True)


def mobius_add(x: Tensor, y: Tensor) -> Tensor:
    """Eq. (2): (..., n) each -> (..., n)."""
    xy, xx, yy = dot(x, y), dot(x, x), dot(y, y)
    return ((1 + 2 * xy + yy) * x + (1 - xx) * y) / (1 + 2 * xy + xx * yy)


def into_ball(x: Tensor) -> Tensor:
    """Points (..., n) too close to the border are pulled back: to 4e-3 in float32, 1e-5 in float64."""
    limit = 1 - (4e-3 if x.dtype == torch.float32 else 1e-5)
    return x * (limit / x.norm(dim=-1, keepdim=True).clamp(min=1e-15)).clamp(max=1)


def expmap0(v: Tensor) -> Tensor:
    """Eq. (1): vectors (..., n) to points of the ball, at distance 2 |v| from 0."""
    norm = v.norm(dim=-1, keepdim=True).clamp(min=1e-15)
    return into_ball(norm.clamp(max=15).tanh() * v / norm)


def expmap(p: Tensor, v: Tensor) -> Tensor:
    """exp_p(v): from points p (..., n) along tangent vectors v (..., n)."""
    return into_ball(mobius_add(p, expmap0(v / (1 - dot(p, p)))))


def transport(p: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """Parallel transport of tangent vectors v (..., n) from p to q: gyr[q, -p] v lambda_p / lambda_q."""
    pp, qq, pq, pv, qv = dot(p, p), dot(q, q), dot(p, q), dot(p, v), dot(q, v)
    a, b = 2 * pq * pv - pp * qv - pv, qq * pv - qv
    turned = v + 2 * (a * q - b * p) / (1 - 2 * pq + pp * qq)  # gyr[q, -p] v
    return turned * (1 - qq) / (1 - pp)


def hyperplane_scores(x: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """Eqs. (3), (4): points (B, n), offsets and normals (O, n) -> (B, O); linear near 0, of weight 2 w."""
    shift = (p * w).sum(-1) / (1 - p.square().sum(-1))  # s, (O,)
    xx, norm = dot(x, x), w.norm(dim=-1).clamp(min=1e-15)
    sinh = 2 * (x @ (w + 2 * shift[:, None] * p).T - (1 + xx) * shift) / (1 - xx)
    return norm * (sinh / norm).asinh()


class BallPoints(nn.Parameter):
    """Rows are points of the ball: RiemannianAdam moves them along geodesics."""


class HyperplaneLayer(nn.Module):
    """Layer (A): points of the ball (B, n) -> (B, outputs). Train it with RiemannianAdam."""

    def __init__(self, n: int, outputs: int, std: float = 0.01):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, n) * std / n**0.5)
        self.offset = BallPoints(torch.zeros(outputs, n))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return hyperplane_scores(x, self.offset, self.weight)


class ToBall(nn.Module):
    """Eq. (5): features (B, n) to points of the ball, in float32 at least."""

    def __init__(self, rescale: bool = True):
        super().__init__()
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * (60 / x.norm(dim=-1, keepdim=True).clamp(min=60))
        return expmap0(x / x.shape[-1] ** 0.5 if self.rescale else x)


def srym(encoder: nn.Module) -> nn.Module:
    """Anybody's encoder, whose last layer is linear, as S-RYM's: it gives points of the ball (B, n)."""
    return nn.Sequential(normalise(encoder), ToBall())


def normalise(module: nn.Module) -> nn.Module:
    """Spectral norm on every convolution and linear layer; one power iteration a forward in training mode."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            spectral_norm(layer)
    return module


class RiemannianAdam(torch.optim.Adam):
    """Adam for all parameters but BallPoints, which take the steps of eq. (6)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if isinstance(p, BallPoints) and p.grad is not None:
                    self._move(p, group)
                    p.grad = None  # Adam passes over it
        return super().step(closure)

    def _move(self, p: Tensor, group: dict):
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state |= dict(
                step=p.new_zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p[:, :1])
            )
        step = state["step"].add_(1)
        half = (1 - dot(p, p)) / 2  # 1 / lambda_p
        gradient = half.square() * p.grad
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].lerp_(dot(gradient, gradient) / half.square(), 1 - beta2)
        along = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        moved = expmap(p, -group["lr"] * along)
        mean.copy_(transport(p, moved, mean))
        p.copy_(moved)


# --- the hyperboloid ---


def hyperboloid_scores(x: Tensor, r: Tensor, z: Tensor) -> Tensor:
    """Eq. (7), f: points (B, n + 1), offsets (O,), normals (O, n) -> (B, O); asinh's argument is bounded."""
    norm = z.norm(dim=-1).clamp(min=1e-15)
    sinh = x[:, 1:] @ (z / norm[:, None] * r.cosh()[:, None]).T - x[:, :1] * r.sinh()
    bound = 36.7  # log(2 / eps) of float64
    above, below = (F.softplus(sign * sinh - bound, beta=50) for sign in (1, -1))
    return norm * (sinh - above + below).asinh()


class HyperboloidLayer(nn.Module):
    """Points of the hyperboloid (B, n + 1) -> (B, outputs), computed in float64."""

    def __init__(self, n: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, n) / n**0.5)
        self.offset = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return hyperboloid_scores(x, self.offset.double(), self.weight.double()).float()


class ToHyperboloid(nn.Module):
    """Eq. (7), v and x: features (B, n) to points of the hyperboloid (B, n + 1), in float64."""

    def __init__(self, n: int):
        super().__init__()
        self.norm, self.scale = nn.RMSNorm(n, elementwise_affine=False), nn.Linear(n, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).tanh() / x.shape[-1] ** 0.5
        v = (self.scale(h).sigmoid() * math.atanh(0.95) * h).double()
        norm = v.norm(dim=-1, keepdim=True).clamp(min=1e-15)
        return torch.cat([norm.cosh(), norm.sinh() * v / norm], -1)


# --- tasks ---

AGENT, KEY, TREASURE = (255, 255, 255), (255, 220, 0), (0, 255, 60)  # colours
REWARDS = np.array([0.5, 1.0])  # of key and treasure


class Levels(NamedTuple):
    """L mazes on a grid of squares, S by S; places are squares of the flat picture."""

    wall: np.ndarray  # (L, S S)
    picture: np.ndarray  # (L, 3, S S), without agent and key
    places: np.ndarray  # (L, 3): start, key, treasure


def make_levels(seed: list[int], count: int, cells: int) -> Levels:
    """Mazes of cells x cells rooms: trees, for each room but the first opens to the one above or to the left.

    Rooms are the odd squares, and walls or passages lie between. Colours and noise of a level mean nothing.
    """
    random, side = np.random.default_rng(seed), 2 * cells + 1
    odd = np.arange(1, side, 2)
    rooms = np.add.outer(odd * side, odd).ravel()
    up = random.random((count, len(rooms))) < 0.5
    up[:, :cells], up[:, ::cells] = False, True
    passage = rooms - np.where(up, side, 1)
    passage[:, 0] = rooms[0]
    wall = np.ones((count, side**2), bool)
    wall[:, rooms] = False
    np.put_along_axis(wall, passage, False, 1)
    places = rooms[random.random((count, len(rooms))).argsort(1)[:, :3]]

    floor, stone = random.uniform(60, 120, (2, count, 3, 1))
    picture = np.where(wall[:, None], stone + 75, floor) + random.uniform(-30, 30, (count, 3, side**2))
    picture = picture.astype(np.uint8)
    picture[np.arange(count), :, places[:, 2]] = TREASURE
    return Levels(wall, picture, places)


class TreasureTree(gymnasium.vector.VectorEnv):
    """Fetch the key, then the treasure, in a maze that is a tree; actions: up, right, down, left.

    Pictures (3, S, S) in bytes. Levels are drawn for all `total` environments and those of `mine` played, so
    that ranks see what one would.
    """

    def __init__(self, levels: Levels, total: int, mine: slice, horizon: int):
        self.levels, self.total, self.mine, self.horizon = levels, total, mine, horizon
        self.num_envs, self.side = len(range(total)[mine]), math.isqrt(levels.wall.shape[1])
        self.moves = np.array([-self.side, 1, self.side, -1])
        self.single_observation_space = Box(0, 255, (3, self.side, self.side), np.uint8)
        self.single_action_space = Discrete(len(self.moves))

    def reset(self, *, seed=None, options=None):
        self.random = np.random.default_rng(seed)
        self.level, self.place, self.age, self.stage = np.zeros((4, self.num_envs), int)
        self._begin(np.arange(self.num_envs))
        return self._picture(), {}

    def _begin(self, new: np.ndarray):
        level = self.random.integers(len(self.levels.wall), size=self.total)[self.mine]
        self.level[new] = level[new]
        self.place[new] = self.levels.places[self.level[new], 0]
        self.age[new] = self.stage[new] = 0

    def _picture(self) -> np.ndarray:
        picture, lying = self.levels.picture[self.level], np.flatnonzero(self.stage == 0)
        picture[lying, :, self.levels.places[self.level[lying], 1]] = KEY
        picture[np.arange(self.num_envs), :, self.place] = AGENT
        return picture.reshape(-1, 3, self.side, self.side)

    def step(self, actions):
        ahead = self.place + self.moves[actions]
        blocked = self.levels.wall[self.level, ahead]
        self.place = np.where(blocked, self.place, ahead + self.moves[actions])
        reached = self.place == self.levels.places[self.level, self.stage + 1]
        reward = REWARDS[self.stage] * reached
        self.stage += reached
        self.age += 1
        done = (self.stage == 2) | (self.age >= self.horizon)
        self._begin(np.flatnonzero(done))
        return self._picture(), reward, done, np.zeros_like(done), {}


class Procgen(gymnasium.vector.VectorEnv):
    """Procgen's own vector environment (gym3) as gymnasium's; pictures (3, 64, 64) in bytes."""

    def __init__(self, game: str, count: int, levels: int):
        self.num_envs, self.make = count, common.need("procgen", "procgen").ProcgenGym3Env
        self.settings = dict(num=count, env_name=game, num_levels=levels, distribution_mode="easy")
        self.single_observation_space = Box(0, 255, (3, 64, 64), np.uint8)
        self.single_action_space = Discrete(15)

    def reset(self, *, seed=None, options=None):
        self.env = self.make(rand_seed=seed, **self.settings)
        return self._observe()[0], {}

    def _observe(self) -> tuple:
        reward, obs, first = self.env.observe()
        return obs["rgb"].transpose(0, 3, 1, 2), reward, first, np.zeros_like(first), {}

    def step(self, actions):
        self.env.act(actions.astype(np.int32))
        return self._observe()


def make_envs(cfg: Config, count: int, mine: slice, train: bool) -> gymnasium.vector.VectorEnv:
    """The `mine` of `count` environments, on training levels or others; ended ones start anew in that step.

    UserError for a game that there is not, or that needs a package.
    """
    kind, _, game = cfg.env.partition(":")
    here = len(range(count)[mine])
    if cfg.env == "tree":
        levels = make_levels([cfg.seed, train], cfg.levels if train else 1000, cfg.cells)
        return TreasureTree(levels, count, mine, cfg.horizon)
    if kind == "procgen":
        if game not in PROCGEN:
            raise UserError(f"--env {cfg.env}: Procgen's games are {', '.join(PROCGEN)}")
        return Procgen(game, here, cfg.levels if train else 0)
    if kind == "atari":
        ale = common.need("ale_py", "atari")
        rules = dict(repeat_action_probability=0.0, use_fire_reset=False, autoreset_mode="SameStep")
        train &= mine != slice(None)  # an evaluation plays whole games for raw rewards
        try:
            return ale.AtariVectorEnv(game, here, **rules, life_loss_info=train, reward_clipping=train)
        except AssertionError as e:
            raise UserError(f"--env {cfg.env}: {e}") from None
    raise UserError(f"--env {cfg.env}: tree, procgen:GAME or atari:GAME")


def draw_seed() -> int:
    """A seed of environments."""
    return int(torch.randint(2**31, ()))


# --- networks ---


class Residual(nn.Module):
    """ReLU, convolution, ReLU, convolution, and the input added."""

    def __init__(self, channels: int):
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.block = nn.Sequential(nn.ReLU(), first, nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def make_body(shape: tuple[int, ...], cfg: Config) -> tuple:
    """The convolutions for pictures (C, H, W), and how many numbers (B, F) they give."""
    inputs, layers = shape[0], []
    if cfg.algo == "rainbow":
        layers += [nn.Conv2d(inputs, 32, 5, 5), nn.ReLU(), nn.Conv2d(32, 64, 5, 5)]
    else:
        for channels in cfg.channels:
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.MaxPool2d(3, 2, 1)]
            layers += [Residual(channels), Residual(channels)]
            inputs = channels
    body = nn.Sequential(*layers, nn.Flatten(), nn.ReLU())
    return body, body(torch.zeros(1, *shape)).shape[1]


class Tail(nn.Module):
    """Last hidden layer, map into the geometry, outputs: (B, inputs) -> (B, outputs). Here rows differ."""

    def __init__(self, inputs: int, outputs: int, cfg: Config):
        super().__init__()
        n = cfg.flat_features if cfg.geometry == "flat" else cfg.features
        self.hidden = nn.Linear(inputs, n)
        if cfg.geometry == "flat":
            self.place, self.last = nn.ReLU(), nn.Linear(n, outputs)
        elif cfg.geometry == "ball":
            self.place = nn.Sequential(nn.ReLU() if cfg.relu else nn.Identity(), ToBall(cfg.rescale))
            self.last = HyperplaneLayer(n, outputs, cfg.normals)
        else:
            self.place, self.last = ToHyperboloid(n), HyperboloidLayer(n, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x).float()
        with torch.autocast(x.device.type, enabled=False):
            return self.last(self.place(x))


class Net(nn.Module):
    """Encoder and tails: pictures (B, C, H, W) -> logits and critic (PPO), value and gains (Rainbow)."""

    def __init__(self, envs: gymnasium.vector.VectorEnv, cfg: Config):
        super().__init__()
        actions, atoms, self.gain = int(envs.single_action_space.n), cfg.atoms, cfg.gain
        self.sizes = [[actions, cfg.bins or 1]] if cfg.algo == "ppo" else [[atoms], [actions * atoms]]
        self.body, width = make_body(envs.single_observation_space.shape, cfg)
        self.tails = nn.ModuleList(Tail(width, sum(sizes), cfg) for sizes in self.sizes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, 2**0.5 if isinstance(layer, nn.Conv2d) else 1.0)
                nn.init.zeros_(layer.bias)
        if cfg.geometry == "flat":
            for tail in self.tails:
                tail.last.weight.data *= 0.01
        if cfg.spectral:
            normalise(nn.ModuleList([self.body, *(tail.hidden for tail in self.tails)]))
        self.to(memory_format=torch.channels_last)

    def forward(self, obs: Tensor) -> list[Tensor]:
        x, found = self.read(obs), []
        for tail, sizes in zip(self.tails, self.sizes, strict=True):
            found += tail(x).float().split(sizes, 1)
        return found

    def read(self, obs: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in bytes -> (B, F)."""
        return self.body(self.gain * (obs / 127.5 - 1))


# --- PPO ---


class Batch(NamedTuple):
    """Steps (T, E, ...), or B of them."""

    obs: Tensor
    action: Tensor
    logp: Tensor
    value: Tensor
    advantage: Tensor
    target: Tensor  # return that the critic learns


def gae(reward: Tensor, value: Tensor, done: Tensor, discount: float, decay: float) -> Tensor:
    """Eq. (9): reward and done (T, E), value (T + 1, E) -> advantages (T, E)."""
    going = 1 - done.float()
    delta = reward + discount * going * value[1:] - value[:-1]
    advantage, last = torch.empty_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        last = delta[t] + discount * decay * going[t] * last
        advantage[t] = last
    return advantage


def hl_gauss(target: Tensor, edges: Tensor) -> Tensor:
    """Eq. (8): targets (B,), edges of bins (bins + 1,) -> (B, bins); the Gaussian is .75 bins wide."""
    width = 0.75 * (edges[1] - edges[0])
    target = target.clamp(edges[0], edges[-1])[:, None]
    below = torch.special.ndtr((edges - target) / width)
    return below.diff(dim=1) / (below[:, -1:] - below[:, :1])


def bin_edges(cfg: Config, device: torch.device) -> Tensor:
    return torch.linspace(-cfg.reach, cfg.reach, cfg.bins + 1, device=device)


def value_of(critic: Tensor, cfg: Config) -> Tensor:
    """What the critic says (..., 1 or bins) as one number (...)."""
    if not cfg.bins:
        return critic[..., 0]
    edges = bin_edges(cfg, critic.device)
    return critic.softmax(-1) @ (edges[1:] + edges[:-1]) / 2


def value_loss(critic: Tensor, batch: Batch, cfg: Config) -> Tensor:
    """Squared error of the value or the clipped value, the larger one; or the cross entropy with eq. (8)."""
    if cfg.bins:
        wanted = hl_gauss(batch.target, bin_edges(cfg, critic.device))
        return -(wanted * critic.log_softmax(1)).sum(1).mean()
    value = critic[:, 0]
    clipped = batch.value + (value - batch.value).clamp(-cfg.clip, cfg.clip)
    errors = torch.maximum((value - batch.target).square(), (clipped - batch.target).square())
    return 0.5 * errors.mean()


def ppo_loss(logits: Tensor, critic: Tensor, batch: Batch, cfg: Config) -> tuple:
    """Eq. (10): a network's outputs for the batch, whose advantages are normalised -> loss, entropy."""
    policy = Categorical(logits=logits, validate_args=False)
    ratio = (policy.log_prob(batch.action) - batch.logp).exp()
    clipped = ratio.clamp(1 - cfg.clip, 1 + cfg.clip)
    policy_loss = torch.maximum(-batch.advantage * ratio, -batch.advantage * clipped).mean()
    entropy = policy.entropy().mean()
    loss = policy_loss + cfg.value_coef * value_loss(critic, batch, cfg) - cfg.entropy_coef * entropy
    return loss, entropy


def scaled(
    reward: Tensor, done: Tensor, before: Tensor, moments: Tensor, discount: float, run: Run
) -> Tensor:
    """Rewards (T, E) over the standard deviation of all R_t = r_t + gamma R_{t-1} so far, clipped.

    `before` (E,), the last R, and `moments` (3,), sums of 1, R and R^2, are updated in place.
    """
    returns = []
    for r, end in zip(reward, done, strict=True):
        returns.append(r + discount * before)
        before.copy_(returns[-1] * ~end)
    x = torch.stack(returns).double()
    moments += run.mean(torch.stack([torch.ones_like(x), x, x.square()]).mean((1, 2)))
    mean, square = moments[1:] / moments[0]
    return (reward / (square - mean.square() + 1e-8).sqrt()).clamp(-10, 10).float()


class Rollout(NamedTuple):
    """T steps of E environments: (T, E, ...); the critic's outputs (T + 1, E, ...)."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    done: Tensor
    logits: Tensor
    critic: Tensor


@torch.no_grad()
def play(net: nn.Module, envs, obs: np.ndarray, noise: Tensor, run: Run) -> tuple:
    """The policy's steps from `obs`, and the observation after them; the argmax of logits plus Gumbel noise
    (T, E, actions) is a sample of their softmax.
    """
    steps = []
    net.eval()
    with parametrize.cached(), run.autocast():  # one normalised weight for all T steps
        for gumbel in noise:
            picture = torch.as_tensor(obs, device=run.device)
            logits, critic = net(picture)
            action = (logits + gumbel).argmax(1)
            obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
            facts = (torch.as_tensor(x, device=run.device) for x in (reward, terminated | truncated))
            steps.append((picture, action, *facts, logits, critic))
        *columns, critics = zip(*steps, strict=True)
        critics = (*critics, net(torch.as_tensor(obs, device=run.device))[1])
    net.train()
    return Rollout(*(torch.stack(column) for column in (*columns, critics))), obs


def standardise(advantage: Tensor, run: Run) -> Tensor:
    """To mean 0 and standard deviation 1 over the minibatch of all ranks."""
    centred = advantage - run.mean(advantage.mean())
    return centred / (run.mean(centred.square().mean()).sqrt() + 1e-7)


def train_ppo(cfg: Config, run: Run) -> dict:
    """One cell of the table by PPO: play, advantages, epochs of minibatches; then what the claims compare."""
    device, share = run.device, cfg.envs // run.world_size
    if cfg.envs % run.world_size:
        raise UserError(f"--envs {cfg.envs} must be a multiple of the ranks that share the run")
    mine = slice(run.rank * share, (run.rank + 1) * share)
    envs = make_envs(cfg, cfg.envs, mine, train=True)
    net, moments = Net(envs, cfg).to(device), torch.zeros(3, dtype=torch.float64, device=device)
    parallel = run.wrap(net)
    forward = torch.compile(parallel) if cfg.compile else parallel
    optimizer = RiemannianAdam(net.parameters(), cfg.lr, eps=cfg.adam_eps, fused=True)
    columns, obs = torch.arange(share, device=device), None

    for step in run.steps(cfg.steps, net=net, optimizer=optimizer, scale={"moments": moments}):
        if obs is None or step % cfg.save_every == 0:  # as in a run that resumes here
            obs, _ = envs.reset(seed=draw_seed())
            before = torch.zeros(share, device=device)

        # play
        noise = -torch.empty(cfg.rollout, cfg.envs, net.sizes[0][0]).exponential_().log()  # Gumbel's
        seen, obs = play(net, envs, obs, noise[:, mine].to(device), run)
        reward = scaled(seen.reward, seen.done, before, moments, cfg.discount, run)
        value = value_of(seen.critic, cfg)
        advantage = gae(reward, value, seen.done, cfg.discount, cfg.gae_lambda)
        logp = Categorical(logits=seen.logits, validate_args=False).log_prob(seen.action)
        data = Batch(seen.obs, seen.action, logp, value[:-1], advantage, advantage + value[:-1])

        # learn
        begin, logs = time.perf_counter(), []
        for _ in range(cfg.epochs):
            order = torch.rand(cfg.rollout, cfg.envs).argsort(0)[:, mine].to(device)
            for rows in order.chunk(cfg.minibatches):
                batch = Batch(*(x[rows, columns].flatten(0, 1) for x in data))
                batch = batch._replace(advantage=standardise(batch.advantage, run))
                with run.autocast():
                    logits, critic = forward(batch.obs)
                loss, entropy = ppo_loss(logits, critic, batch, cfg)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(net.parameters(), cfg.max_grad)
                optimizer.step()
                logs.append(torch.stack([loss, entropy, norm]).detach())
        means = torch.stack(logs).mean(0).tolist()  # here a GPU is waited for
        learning = time.perf_counter() - begin
        logs = dict(zip(("loss", "entropy", "gradient"), means, strict=True))
        logs["reward"] = seen.reward.mean()
        logs["learn_us"] = 1e6 * learning / (cfg.rollout * cfg.envs)
        if step % cfg.eval_every == 0 or step == cfg.steps - 1:
            logs |= measure_returns(sampled(net.eval(), run), cfg)
            logs |= measure_features(net, seen.obs, cfg, run)
        run.log(step, **logs)

    return summary(cfg, run)


# --- Rainbow ---


class Noise(nn.Module):
    """A noisy layer's weight (O, n) in training mode: plus factorised noise of learned size (1706.10295)."""

    def __init__(self, weight: Tensor, sigma: float):
        super().__init__()
        self.sigma = nn.Parameter(torch.full_like(weight, sigma / weight.shape[1] ** 0.5))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        left, right = (torch.randn(n, device=weight.device) for n in weight.shape)
        left, right = (x.sign() * x.abs().sqrt() for x in (left, right))
        return weight + self.sigma * left[:, None] * right


def project(probs: Tensor, reward: Tensor, discount: Tensor, atoms: Tensor) -> Tensor:
    """Eq. (11): probabilities (B, atoms) of z, rewards and discounts (B,) -> those of reward + discount z."""
    width = atoms[1] - atoms[0]
    moved = (reward[:, None] + discount[:, None] * atoms).clamp(atoms[0], atoms[-1])
    near = (1 - (moved[:, :, None] - atoms).abs() / width).clamp(min=0)  # (B, from, to)
    return (probs[:, :, None] * near).sum(1)


def log_probs(net: nn.Module, obs: Tensor) -> Tensor:
    """Dueling streams: pictures (B, C, H, W) -> log-probabilities of a return's atoms (B, actions, atoms)."""
    value, gain = net(obs)
    gain = gain.unflatten(1, (-1, value.shape[1]))
    return (value[:, None] + gain - gain.mean(1, keepdim=True)).log_softmax(2)


class Transitions(NamedTuple):
    """What Rainbow learns from: B rows of the replay, n steps each."""

    rows: Tensor  # (B,)
    probability: Tensor  # of being drawn
    obs: Tensor
    action: Tensor
    reward: Tensor  # discounted sum of up to n
    discount: Tensor  # gamma^n, 0 beyond an episode's end
    after: Tensor  # pictures n steps later


def sample(replay: common.Replay, cfg: Config) -> Transitions:
    """Transitions drawn by priority; a cumulative sum of 10^5 priorities takes no longer than a tree."""
    n, device = cfg.nstep, replay.added.device
    sums = replay.priority[: int(replay.added) - n].cumsum(0, dtype=torch.float64)
    rows = torch.searchsorted(sums, torch.rand(cfg.batch, device=device) * sums[-1]).clamp(max=len(sums) - 1)
    steps = torch.arange(n, device=device)
    following = rows[:, None] + steps
    going = F.pad(~replay.done[following], (1, 0), value=True).cumprod(1)  # (B, n + 1)
    reward = (cfg.discount**steps * going[:, :-1] * replay.reward[following]).sum(1)
    facts = replay.obs[rows], replay.action[rows], reward, cfg.discount**n * going[:, -1]
    return Transitions(rows, replay.priority[rows] / sums[-1], *facts, replay.obs[rows + n])


def rainbow_loss(net: nn.Module, target: nn.Module, batch: Transitions, atoms: Tensor) -> Tensor:
    """Cross entropy (B,) with eq. (11) at the action that `net` prefers and `target` values (double DQN)."""
    each = torch.arange(len(batch.rows), device=atoms.device)
    with torch.no_grad():
        best = (log_probs(net, batch.after).exp() @ atoms).argmax(1)
        probs = log_probs(target, batch.after)[each, best].exp()
        wanted = project(probs, batch.reward, batch.discount, atoms)
    return -(wanted * log_probs(net, batch.obs)[each, batch.action]).sum(1)


def train_rainbow(cfg: Config, run: Run) -> dict:
    """One cell of the table by Rainbow: act, store, learn; then what the claims compare."""
    device = run.device
    envs = make_envs(cfg, 1, slice(1), train=True)
    net = Net(envs, cfg).to(device)
    for layer in (x for tail in net.tails for x in (tail.hidden, tail.last)):
        parametrize.register_parametrization(layer, "weight", Noise(layer.weight, cfg.noise))
    target = copy.deepcopy(net).requires_grad_(False)
    optimizer = RiemannianAdam(net.parameters(), cfg.lr, eps=cfg.adam_eps, fused=True)
    picture, zero = torch.as_tensor(envs.reset(seed=0)[0][0]), torch.zeros(())
    row = dict(obs=picture, action=zero.long(), reward=zero, done=zero.bool(), priority=zero)
    replay = common.Replay(cfg.steps, **row).to(device)
    atoms, obs = torch.linspace(-cfg.reach, cfg.reach, cfg.atoms, device=device), None

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        q = log_probs(net, torch.as_tensor(obs, device=device)).exp() @ atoms
        return q.argmax(1).cpu().numpy()

    for step in run.steps(cfg.steps, net=net, target=target, optimizer=optimizer, replay=replay):
        if obs is None or step % cfg.save_every == 0:
            obs, _ = envs.reset(seed=draw_seed())

        # act with the layers' noise, and store
        action, before = act(obs), obs
        obs, reward, terminated, truncated, _ = envs.step(action)
        done = terminated | truncated | ((step + 1) % cfg.save_every == 0)
        highest = replay.priority.max().clamp(min=1)[None]
        replay.add(obs=before, action=action, reward=np.float32(reward), done=done, priority=highest)
        # learn
        logs = {"reward": reward[0]}
        if step >= max(cfg.warmup, cfg.nstep):
            batch = sample(replay, cfg)
            loss = rainbow_loss(net, target, batch, atoms)
            beta = cfg.correction + (1 - cfg.correction) * step / cfg.steps
            weight = batch.probability**-beta
            optimizer.zero_grad(set_to_none=True)
            (weight / weight.max() * loss).mean().backward()
            logs["gradient"] = nn.utils.clip_grad_norm_(net.parameters(), cfg.max_grad)
            optimizer.step()
            replay.priority[batch.rows] = loss.detach() ** cfg.priority
            logs["loss"] = loss.mean()
        if step % cfg.target_every == 0:
            target.load_state_dict(net.state_dict())
        if step % cfg.eval_every == 0 or step == cfg.steps - 1:
            net.eval()
            logs |= measure_returns(act, cfg)
            net.train()
        run.log(step, **logs)
    return summary(cfg, run)


# --- evaluation ---


def sampled(net: nn.Module, run: Run) -> Callable:
    """PPO's policy as a function of observations in numpy: it samples, as in Procgen's protocol."""

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        logits, _ = net(torch.as_tensor(obs, device=run.device))
        return Categorical(logits=logits).sample().cpu().numpy()

    return act


def measure_returns(policy: Callable, cfg: Config) -> dict:
    """Mean return on training levels, on others, and their difference; an episode of each environment."""
    found = {}
    for name in ("train", "test"):
        envs = make_envs(cfg, cfg.episodes, slice(None), name == "train")
        found[name] = common.evaluate_policy(envs, policy, draw_seed()).mean()
    return found | {"gap": found["train"] - found["test"]}


@torch.no_grad()
def measure_features(net: nn.Module, obs: Tensor, cfg: Config, run: Run) -> dict:
    """Relative delta of features of pictures (T, E, ...), and the share of points beyond |x| = .99."""
    (tail,), pictures = net.tails, obs.flatten(0, 1)
    features = tail.hidden(net.read(pictures[torch.randperm(len(pictures))[: cfg.points]])).float()
    exact = "donot_use_mm_for_euclid_dist"  # TF32 would round a product
    found = {"delta": relative_delta(torch.cdist(features, features, compute_mode=exact))}
    if cfg.geometry == "ball":
        found["border"] = (tail.place(features).norm(dim=1) > 0.99).float().mean()
        np.save(run.folder / f"points{run.rank}.npy", tail.place(tail.hidden(net.read(obs[:, 0]))).cpu())
    return found


def relative_delta(distance: Tensor, bases: int = 4, chunk: int = 16) -> Tensor:
    """Eq. (12) from distances (N, N): 0 for a tree, at most 1; the mean over the first points as base r."""
    found = []
    for row in distance[:bases]:
        products = (row[:, None] + row - distance) / 2  # A
        best = [torch.minimum(some[:, :, None], products).amax(1) for some in products.split(chunk)]
        found.append((torch.cat(best) - products).amax())
    return 2 * torch.stack(found).mean() / distance.max()


def read_metrics(folder: Path) -> list:
    """The lines of a cell's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(cfg: Config, run: Run) -> dict:
    """What was measured last; of PPO the mean gradient norm and the rank correlation of delta and return."""
    lines = read_metrics(run.folder)
    found = {k: v for k, v in lines[-1].items() if k not in ("step", "loss", "reward")}
    game = cfg.env.removeprefix("procgen:")
    if game in PROCGEN:
        low, high = PROCGEN[game]
        found["score"] = (found["test"] - low) / (high - low)
    if "delta" in found:
        pairs = [(line["delta"], line["test"]) for line in lines if "delta" in line]
        found["delta_rank"] = stats.spearmanr(*zip(*pairs, strict=True)).statistic
        for key in ("gradient", "learn_us"):
            found[key] = np.mean([line[key] for line in lines])
    return found


# --- figure, main ---


def draw(figure, table: dict, run: Run):
    """Means over seeds: returns, gradient norms over training, delta over return; an episode in the disc."""
    *axes, disc = figure.subplots(1, 4)
    cfg = run.cfg
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    for row in table:
        cells = [read_metrics(run.root / common.slug(f"{row}-s{seed}")) for seed in seeds]
        for axis, x, y in zip(axes, ("step", "step", "test"), ("test", "gradient", "delta"), strict=True):
            lines = [[(line[x], line[y]) for line in cell if "test" in line] for cell in cells]
            axis.plot(*np.mean(lines, 0).T, label=row)
            axis.set(xlabel=x, ylabel=y)
    axes[0].legend(fontsize="x-small")
    points = np.load(run.root / common.slug(f"S-RYM, n = 2-s{cfg.seed}") / "points0.npy")
    disc.scatter(*points.T, c=range(len(points)), s=8)
    disc.add_patch(Circle((0, 0), 1, fill=False))
    disc.set(title="S-RYM, n = 2", aspect="equal")


def dry_run(cfg: Config, run: Run):
    """Print parameters and steps of a cell."""
    net = Net(make_envs(cfg, 1, slice(None), train=True), cfg)
    parameters = sum(p.numel() for p in net.parameters())
    steps = cfg.steps * (cfg.envs * cfg.rollout if cfg.algo == "ppo" else 1)
    run.print(f"{cfg.env}: {parameters:,} parameters, {steps:,} steps of environments a cell")


def main():
    cfg = common.parse_config(CONFIGS)
    with Run(cfg, model=cfg.env.partition(":")[2]) as run:
        if cfg.dry_run:
            return dry_run(cfg, run)
        table = run.grid(ROWS, train_ppo if cfg.algo == "ppo" else train_rainbow)
        run.check(CLAIMS, table)
        if cfg.algo == "ppo" and "S-RYM, n = 2" in table:
            run.figure(draw, table, run, size=(16, 4))


if __name__ == "__main__":
    main()
