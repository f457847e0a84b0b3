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
  python mood.py                                      the effect in miniature, with controls; two CPU cores
  python mood.py --data hopper_medium-v2.hdf5 ...     D4RL, scored in gymnasium; or minari:ID (see README)
  python mood.py --config full --collect --data D     MOOD's data: TD3 agents and RND's, in ExORL's layout
  torchrun --nproc_per_node=8 mood.py --config full --data D     15 tasks; D may be ExORL's folder as well

Departures from the paper and its code
- The paper's tables were not at hand: hyperparameters are read off its code, no figure here is a quotation.
- Kept from the code: log-density averaged over dimensions, without a correction for the clamp; fixed sigma;
  no target actor, no delayed updates; IQL weighs by AWAC's advantage, not by its paper's P(Q') - V.
- Changed: softmax weights times B (only Adam's epsilon notices); V is initialised like the other networks;
  one gamma (the code never passes its flag on); N = 1 works; TD3+BC clones with mu(s), not a noisy sample;
  V has the critics' width (the code: 1024); 1 % of the episodes are held out to measure errors.
- The authors' data are not public. Demo and gpu: gaits that evolution finds for dm_control's cheetah, new
  ones for every seed, actions held for 4 control steps; walking gaits walk at the task's speed.
- The demo's settings (temperature, rate, batch, small actor of 5 units, 2000 updates) were tuned on seeds 1,
  2 and 200 to 205, the same for all rows, but chosen for the gap between the actors; it runs from seed 20 on.
- From resets all gaits share one pose, where an actor may stand still for ever (as on seeds 10 to 17); hence
  returns from states of the target's own held-out episodes, too (`own`).
- float32 with TF32 products on a GPU, an update there is one CUDA graph.

Reading order: ROWS, Agent, the losses, update, train_task, act, evolve.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import dm_env
import gymnasium
import mujoco.rollout
import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import common
from common import Claim, EnsembleLinear, Run, UserError

DOMAINS = {  # MOOD's tasks
    "cheetah": ("run", "walk", "walk_backward", "run_backward"),
    "walker": ("stand", "walk", "run", "spin"),
    "quadruped": ("walk", "run", "stand", "jump"),
    "humanoid": ("stand", "walk", "run"),
}
TASKS = tuple(f"{domain}_{task}" for domain, tasks in DOMAINS.items() for task in tasks)


@dataclass
class Config(common.Config):
    # data
    tasks: tuple[str, ...] = ("cheetah_run_backward",)  # targets; their rewards relabel all trajectories
    data: str = ""  # folder of ExORL's layout, D4RL .hdf5 or minari:ID; empty: gaits, made by this run
    mixture: Literal["same", "cross", "mixed", "all"] = "all"  # the task's agent, others, all but rnd, all
    shuffle: bool = False  # control: the rewards in a random order
    held_out: float = 0.1  # share of each agent's episodes that is not trained on
    hold: int = 4  # control steps of dm_control that an action is held
    # networks
    algo: Literal["bc", "td3bc", "awac", "iql", "asac", "behaviour"] = "awac"  # behaviour: none
    actor: Literal["small", "large", "modern"] = "small"  # modern: residual, layer norm, spectral norm
    critic: Literal["small", "large"] = "small"  # value network of IQL: the same
    small_actor: int = 5  # width of its two hidden layers
    large_actor: int = 64  # width of its two hidden layers
    modern_actor: int = 64  # width of its layer and of its residual block
    small_critic: int = 64  # width of its two hidden layers
    large_critic: int = 128  # width of its two hidden layers
    critics: int = 2  # members of the ensemble (N)
    # offline RL
    pessimism: float = 0.5  # how far disagreement pulls below the mean (p)
    discount: float = 0.95  # gamma
    tau: float = 0.005  # step of the target critics
    std: float = 0.2  # deviation of the policy (sigma)
    noise_clip: float = 0.3  # clip of the policy's noise in the critics' target
    beta: float = 0.03  # temperature of the advantage
    samples: int = 1  # policy actions that estimate the value in the advantage (K)
    expectile: float = 0.7  # of IQL's value loss (kappa)
    bc_coef: float = 0.4  # TD3+BC's weight of cloning (alpha); 0.4 is lambda = 2.5 of Fujimoto and Gu
    updates: int = 2000  # gradient updates
    block: int = 50  # updates a step: their random numbers are drawn together
    batch: int = 64  # transitions an update (B)
    lr: float = 3e-3  # Adam, all networks
    decay: bool = True  # the learning rate falls linearly to 0 over the second half
    standardize: bool = True  # observations, by the mean and deviation of the training data
    # evaluation
    es: int = 1  # actions that evaluation sampling picks from (M); 1: the mean action
    episodes: int = 8  # episodes of an evaluation, each 1000 control steps
    # collecting
    collect: bool = False  # only fill the folder --data, an agent of each task and one of novelty a domain
    collect_episodes: int = 30  # episodes an agent, each 1000 control steps
    generations: int = 16  # of the evolution of a gait
    population: int = 40  # gaits a generation
    spread: tuple[float, ...] = (0.0, 0.15, 0.3)  # perturbation of a gait from episode to episode, in turn

    def check(self):
        super().check()
        if self.share == "run":
            raise UserError("--share run: these networks are small; ranks make cells (--share grid)")
        if self.updates % self.block:
            raise UserError("--updates must be a multiple of --block")
        if self.collect and not self.data:
            raise UserError("--collect fills the folder --data")
        if 1000 % self.hold or (one_set(self.data) and len(self.tasks) > 1):
            raise UserError("--hold: a divisor of 1000; --tasks: one for a single data set")
        if unknown := set(self.tasks) - set(TASKS) - {f"{domain}_rnd" for domain in DOMAINS}:
            raise UserError(f"--tasks {unknown.pop()}: there are {', '.join(TASKS)}")
        if not (self.beta and self.std) or max(self.discount, self.held_out) >= 1:
            raise UserError("--beta and --std must be positive, --discount and --held_out below 1")


SAME, LARGE, SHUFFLED = "target's data", "mixture, larger actor", "mixture, larger actor, shuffled rewards"
# a row is what it changes against AWAC with a small actor on the mixture of all agents' data
ROWS = {
    "behaviour": dict(algo="behaviour"),
    SAME: dict(mixture="same"),
    "mixture": {},
    LARGE: dict(actor="large"),
    "mixture, larger critic": dict(critic="large"),
    "mixture, best of 50": dict(es=50),
    SHUFFLED: dict(actor="large", shuffle=True),
    "mixture, BC, larger actor": dict(algo="bc", actor="large"),
    "target's data, larger actor": dict(mixture="same", actor="large"),
    "mixture, BC": dict(algo="bc"),
    "mixture, IQL": dict(algo="iql"),
    "mixture, IQL, larger actor": dict(algo="iql", actor="large"),
    "mixture, TD3+BC": dict(algo="td3bc"),
    "mixture, ASAC": dict(algo="asac"),
    "mixture, modern actor": dict(actor="modern"),
    "mixture, five critics": dict(critics=5),
    "mixture, no pessimism": dict(pessimism=0.0),
}
CLAIMS = [
    Claim("a larger actor imitates the target's actions better", "error", LARGE, "mixture", "lower"),
    Claim("adding others' data makes a small actor imitate them worse", "error", "mixture", SAME, "higher"),
    Claim("adding others' data lowers a small actor's return", "return", "mixture", SAME, "lower"),
    Claim("a larger actor returns more from the target's own states", "own", LARGE, "mixture"),
    Claim("... than a larger critic does", "own", LARGE, "mixture, larger critic"),
    Claim("a larger actor returns more from resets", "return", LARGE, "mixture"),
    Claim("the best of 50 samples returns more from resets", "return", "mixture, best of 50", "mixture"),
    Claim("control: shuffled rewards return less", "return", SHUFFLED, LARGE, "lower"),
]

DEMO = Config(seed=20, seeds=8, ranks=2, rows=tuple(ROWS)[:8])
CONFIGS = {
    "smoke": replace(
        DEMO,
        rows=(),
        seeds=2,
        ranks=1,
        updates=20,
        block=10,
        batch=16,
        samples=2,
        hold=20,
        episodes=1,
        collect_episodes=3,
        held_out=0.34,
        generations=2,
        population=8,
    ),
    "demo": DEMO,
    "gpu": replace(
        DEMO,
        rows=(),
        seeds=4,
        ranks=4,
        tasks=("cheetah_run_backward", "cheetah_run"),
        large_actor=256,
        updates=20_000,
        batch=256,
        lr=1e-3,
        collect_episodes=200,
        generations=20,
    ),
    "full": replace(
        DEMO,
        rows=(),
        ranks=1,
        seeds=5,
        tasks=TASKS,
        held_out=0.01,
        hold=1,
        small_actor=256,
        large_actor=1024,
        modern_actor=1024,
        small_critic=256,
        large_critic=1024,
        discount=0.99,
        beta=1.0,
        updates=2_000_000,
        block=500,
        batch=1024,
        lr=1e-4,
        decay=False,
        standardize=False,
        episodes=50,
        collect_episodes=1000,
        save_every=200,
    ),
}


# --- tasks ---


def ramp(x: float, low: float, margin: float, at_margin: float = 0.0) -> float:
    """dm_control's tolerance: 1 from `low` up, falling linearly to `at_margin` at low - margin."""
    from dm_control.utils import rewards

    return rewards.tolerance(x, (low, math.inf), margin, sigmoid="linear", value_at_margin=at_margin)


def walker_spin(physics) -> float:
    mujoco.mj_subtreeVel(physics.model.ptr, physics.data.ptr)  # no sensor of walker.xml asks for it
    return ramp(physics.named.data.subtree_angmom["torso"][1], 10, 10)


def quadruped_stand(physics) -> float:
    return ramp(physics.torso_upright(), 1, 2)


def quadruped_jump(physics) -> float:
    return quadruped_stand(physics) * ramp(physics.named.data.subtree_com["torso"][2], 1, 1, at_margin=0.5)


CHEETAH_SPEED = {"run": 10.0, "walk": 2.0, "walk_backward": -2.0, "run_backward": -10.0}  # m/s
OWN_REWARDS = {  # of tasks that dm_control's suite does not have
    "cheetah_walk": lambda physics: ramp(physics.speed(), 2, 2),
    "cheetah_walk_backward": lambda physics: ramp(-physics.speed(), 2, 2),
    "cheetah_run_backward": lambda physics: ramp(-physics.speed(), 10, 10),
    "walker_spin": walker_spin,
    "quadruped_stand": quadruped_stand,
    "quadruped_jump": quadruped_jump,
}


class MoodEnv(common.DmControl):
    """A task of MOOD, 1000 control steps an episode, each action held for `hold` of them."""

    def __init__(self, name: str, hold: int = 1):
        domain, _, task = name.partition("_")
        super().__init__(domain, "run" if name in OWN_REWARDS else task)
        if name in OWN_REWARDS:
            self.env.task.get_reward = OWN_REWARDS[name]
        self.env._n_sub_steps *= hold  # dm_control's own argument for it does not know a task's time step
        self.env._step_limit /= hold

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """options={"physics": (n, p)}: start in one of these states, drawn by the seed."""
        obs, info = super().reset(seed=seed)
        if not options:
            return obs, info
        states, physics = options["physics"], self.env.physics
        with physics.reset_context():
            physics.set_state(states[np.random.default_rng(seed).integers(len(states))])
        return self._read(dm_env.restart(self.env.task.get_observation(physics)))


def relabel(physics: Tensor, action: Tensor, task: str) -> Tensor:
    """The task's reward at each physics state (n, p) and the action (n, m) that led there: (n, 1)."""
    env, reward = MoodEnv(task), torch.empty(len(physics), 1)
    state = env.env.physics
    for i, (row, a) in enumerate(zip(physics.numpy(), action.numpy(), strict=True)):
        state.set_state(row)
        state.set_control(env.low + (a + 1) / 2 * env.span)  # humanoids pay for it
        state.forward()
        reward[i] = float(np.squeeze(env.env.task.get_reward(state)))
    return reward


# --- collecting: evolved gaits ---


def gait(x: np.ndarray, steps: int, hold: int) -> np.ndarray:
    """Open-loop gaits (E, 19) -> actions (E, steps, 6): clip(c + A sin(2 pi f t + phi)), t in seconds."""
    frequency, centre, amplitude, phase = np.split(x[:, None], [1, 7, 13], axis=-1)
    angle = 2 * np.pi * (2 + 1.5 * frequency) * np.arange(steps)[:, None] * 0.01 * hold + np.pi * phase
    return np.clip(0.4 * centre + 1.2 * np.abs(amplitude) * np.sin(angle), -1, 1)


def simulate(env: MoodEnv, start: np.ndarray, action: np.ndarray, hold: int) -> tuple:
    """Physics (E, T + 1, 18) from start (E, 18) and held actions (E, T, 6); velocity at each physics step.

    The sensor lags one step: good enough for evolution, while rewards are computed from physics.
    """
    model = env.env.physics.model.ptr
    begin = np.pad(start, ((0, 0), (1, 0)))  # time, qpos, qvel
    states, sensors = mujoco.rollout.rollout(model, [mujoco.MjData(model)], begin, action.repeat(hold, 1))
    velocity = sensors[..., model.sensor("torso_subtreelinvel").adr[0]]
    return np.concatenate([start[:, None], states[:, hold - 1 :: hold, 1:]], 1), velocity


def evolve(task: str, env: MoodEnv, starts: np.ndarray, rng: np.random.Generator, cfg: Config) -> np.ndarray:
    """The cross-entropy method over a gait's 19 numbers, for three seconds each.

    Fitness falls below and above the task's speed: a walk does not run.
    """
    mean, std = np.zeros(19), np.ones(19)
    for _ in range(cfg.generations):
        x = mean + std * rng.standard_normal((cfg.population, 19))
        start = starts[rng.integers(len(starts), size=len(x))]
        _, velocity = simulate(env, start, gait(x, 300 // cfg.hold, cfg.hold), cfg.hold)
        fitness = np.clip(1 - np.abs(velocity / CHEETAH_SPEED[task] - 1), 0, 1).mean(1)
        elite = x[np.argsort(-fitness)[: max(2, len(x) // 6)]]
        mean, std = elite.mean(0), 0.9 * elite.std(0) + 0.09 * std
    return mean


def collect_gait(folder: Path, source: str, run: Run):
    """Episodes of a gait with perturbed parameters and noisy actions; of coloured noise for source "rnd"."""
    cfg, rng = run.cfg, np.random.default_rng(common.stable_seed(run.cfg.seed, source))
    env, count, steps = MoodEnv("cheetah_run"), cfg.collect_episodes, 1000 // cfg.hold
    starts = np.stack([env.reset(seed=int(s))[1]["physics"] for s in rng.integers(2**31, size=40)])
    noise = rng.standard_normal((count, steps, 6))
    if source == "rnd":
        action = lfilter([0.45], [1, -0.9], noise, axis=1)
    else:
        level = np.resize(cfg.spread, (count, 1)) * np.repeat([0.3, 0.5, 0.5, 0.3], [1, 6, 6, 6])
        x = evolve(source, env, starts, rng, cfg) + level * rng.standard_normal((count, 19))
        action = gait(x, steps, cfg.hold) + 0.1 * noise
    action = np.clip(action, -1, 1)
    physics, _ = simulate(env, starts[rng.integers(len(starts), size=count)], action, cfg.hold)
    for number, (a, states) in enumerate(zip(action, physics, strict=True)):
        write_episode(folder, number, a, observation=states[:, 1:], physics=states)


def write_episode(folder: Path, number: int, action: np.ndarray, **arrays: np.ndarray):
    """An .npz as ExORL has them: T + 1 rows, of which action's t belongs to t - 1 -> t; rewards come later.

    action (T, m), others (T + 1, ...). No time in its name: a collection that goes on writes over its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    padded, zeros = np.pad(action, ((1, 0), (0, 0))), np.zeros((len(action) + 1, 1))
    name = folder / f"0_{number:06d}_{len(action)}.npz"
    np.savez(name, action=padded, reward=zeros, discount=zeros + 1, **arrays)


# --- networks, with a leading axis of ensemble members ---


class Block(nn.Module):
    """x + W2 relu(W1 LN(x)), both matrices over their largest singular value, which torch keeps track of by a
    power iteration each forward pass in training mode.
    """

    def __init__(self, width: int):
        super().__init__()
        inner, outer = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (inner, outer):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.change = nn.Sequential(
            nn.LayerNorm(width), spectral_norm(inner), nn.ReLU(), spectral_norm(outer)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


def network(members: int, inputs: int, outputs: int, width: int, gain: float, modern=False) -> nn.Sequential:
    """Two hidden ReLU layers; modern: one, then a residual block that all members share.

    (members, B, i) -> (members, B, o).
    """
    hidden = [EnsembleLinear(members, width, width, gain), nn.ReLU()]
    if modern:
        hidden = [Block(width)]
    first, last = EnsembleLinear(members, inputs, width, gain), EnsembleLinear(members, width, outputs, gain)
    return nn.Sequential(first, nn.ReLU(), *hidden, last)


class Agent(nn.Module):
    """Actor, critics and their targets, IQL's value network, ASAC's logits, scales of observations."""

    def __init__(self, cfg: Config, obs: int, actions: int, rows: int = 0):
        super().__init__()
        self.members, root2 = cfg.critics, math.sqrt(2)
        width, critic = getattr(cfg, f"{cfg.actor}_actor"), getattr(cfg, f"{cfg.critic}_critic")
        self.actor = network(1, obs, actions, width, 1.0, cfg.actor == "modern")
        self.critic = network(cfg.critics, obs + actions, 1, critic, root2)
        self.value = network(1, obs, 1, critic, root2) if cfg.algo == "iql" else None
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("logits", torch.zeros(rows, dtype=torch.float64))  # g of eq. (7)
        self.register_buffer("centre", torch.zeros(obs))
        self.register_buffer("scale", torch.ones(obs))

    def standard(self, obs: Tensor) -> Tensor:
        return (obs - self.centre) / self.scale

    def mean(self, s: Tensor) -> Tensor:
        """Mean action tanh f(s): (B, d) -> (B, m)."""
        return self.actor(s[None])[0].tanh()

    def q(self, s: Tensor, a: Tensor, target: bool = False) -> Tensor:
        """(B, d), (B, m) -> (N, B)."""
        x = torch.cat([s, a], -1).expand(self.members, -1, -1)
        return (self.target if target else self.critic)(x)[..., 0]

    def v(self, s: Tensor) -> Tensor:
        """(B, d) -> (B,)."""
        return self.value(s[None])[0, :, 0]


# --- the equations ---


class Batch(NamedTuple):
    """Transitions; s and next_s are standardised."""

    s: Tensor  # (B, d)
    a: Tensor  # (B, m)
    reward: Tensor  # (B,)
    next_s: Tensor  # (B, d)
    live: Tensor  # (B,) 1 - terminated


def squash(mean: Tensor, noise: Tensor, clip: float = math.inf) -> Tensor:
    """Clamped normal: mean + noise, noise first clipped to +-clip, kept in [-1, 1]; no gradient outside."""
    return (mean + noise.clamp(-clip, clip)).clamp(-1, 1)


def log_prob(mean: Tensor, a: Tensor, std: float) -> Tensor:
    """l of eq. (4): log-density of the untruncated Normal, averaged over dimensions: (..., m) -> (...)."""
    return -((a - mean) ** 2).mean(-1) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))


def pessimistic(q: Tensor, p: float) -> Tensor:
    """P(q), eq. (1): mean over members minus p times their mean |q_i - q_j|, i != j: (N, ...) -> (...)."""
    n = len(q)
    spread = (q[:, None] - q).abs().sum((0, 1)) / max(1, n * (n - 1))  # U(q)
    return q.mean(0) - p * spread


def future_value(agent: Agent, next_s: Tensor, noise: Tensor, cfg: Config) -> Tensor:
    """What y adds to the reward: V(s') of eq. (5), else P(Q'(s', a')) of eq. (2), noise (B, m): (B,)."""
    if agent.value:
        return agent.v(next_s)
    a = squash(agent.mean(next_s), noise, cfg.noise_clip)
    return pessimistic(agent.q(next_s, a, target=True), cfg.pessimism)


def critic_loss(q: Tensor, y: Tensor) -> Tensor:
    """L_Q of eq. (2): (N, B), (B,) -> ()."""
    return 0.5 * ((q - y) ** 2).sum(0).mean()


@torch.no_grad()
def advantage(agent: Agent, s: Tensor, a: Tensor, noise: Tensor, cfg: Config) -> Tensor:
    """A(s, a) of eq. (3) by the online critics, a_k = mu(s) + noise (K, B, m): (B,)."""
    k = len(noise)
    actions = torch.cat([a[None], squash(agent.mean(s), noise)])  # one pass for data's and policy's actions
    q = agent.q(s.repeat(1 + k, 1), actions.flatten(0, 1)).unflatten(1, (1 + k, -1))  # (N, 1 + K, B)
    return q[:, 0].mean(0) - pessimistic(q[:, 1:], cfg.pessimism).mean(0)


def advantage_weights(advantage: Tensor, beta: float) -> Tensor:
    """w of eq. (4), softmax over the batch with mean 1: (B,) -> (B,)."""
    return (advantage / beta).softmax(-1) * len(advantage)


def expectile_loss(u: Tensor, kappa: float) -> Tensor:
    """L_V of eq. (5): (B,) -> ()."""
    return ((kappa - (u < 0).float()).abs() * u**2).mean()


def td3bc(q: Tensor, mean: Tensor, a: Tensor, alpha: float) -> Tensor:
    """Eq. (6) for q = P(Q(s, a_pi)) (B,), mean action and the data's (B, m) -> ()."""
    return -q.mean() + alpha * q.abs().mean().detach() * ((mean - a) ** 2).mean()


def weighted_rows(logits: Tensor, count: int) -> Tensor:
    """Rows with P(i) = softmax(logits)_i, eq. (7), by a stratified inverse CDF: (n,) -> (count,)."""
    cdf = logits.softmax(0).cumsum(0)
    place = torch.arange(count, device=cdf.device) + torch.rand_like(cdf[:1].expand(count))
    return torch.searchsorted(cdf, place / count * cdf[-1], right=True).clamp(max=len(logits) - 1)


# --- an update: value, critic, actor, targets ---


def cloning(agent: Agent, batch: Batch, noise: Tensor, cfg: Config) -> Tensor:
    """BC; ASAC, on rows drawn by advantage."""
    return -log_prob(agent.mean(batch.s), batch.a, cfg.std).mean()


def by_advantage(agent: Agent, batch: Batch, noise: Tensor, cfg: Config) -> Tensor:
    """AWAC, and IQL as in the authors' code."""
    weight = advantage_weights(advantage(agent, batch.s, batch.a, noise, cfg), cfg.beta)
    return -(weight * log_prob(agent.mean(batch.s), batch.a, cfg.std)).mean()


def by_critic(agent: Agent, batch: Batch, noise: Tensor, cfg: Config) -> Tensor:
    """TD3+BC."""
    mean = agent.mean(batch.s)
    q = pessimistic(agent.q(batch.s, squash(mean, noise[0])), cfg.pessimism)
    return td3bc(q, mean, batch.a, cfg.bc_coef)


ACTOR_LOSS = {"bc": cloning, "asac": cloning, "awac": by_advantage, "iql": by_advantage, "td3bc": by_critic}


def descend(loss: Tensor, net: nn.Module, optimizer) -> Tensor:
    """One step of Adam on the parameters of `net` alone; returns the loss."""
    loss.backward(inputs=list(net.parameters()))
    optimizer.step()  # what has no gradient stays
    optimizer.zero_grad()
    return loss.detach()


def update(agent: Agent, optimizer, batch: Batch, actor_batch: Batch, noise: Tensor, cfg: Config) -> dict:
    """One iteration on a batch; noise (1 + K, B, m) has the deviation sigma. Returns the losses."""
    losses = {}
    if agent.value:
        with torch.no_grad():
            q = pessimistic(agent.q(batch.s, batch.a, target=True), cfg.pessimism)
        loss = expectile_loss(q - agent.v(batch.s), cfg.expectile)
        losses["value_loss"] = descend(loss, agent.value, optimizer)
    if cfg.algo != "bc":
        with torch.no_grad():
            y = batch.reward + cfg.discount * batch.live * future_value(agent, batch.next_s, noise[0], cfg)
        losses["critic_loss"] = descend(critic_loss(agent.q(batch.s, batch.a), y), agent.critic, optimizer)
    loss = ACTOR_LOSS[cfg.algo](agent, actor_batch, noise[1:], cfg)
    losses["actor_loss"] = descend(loss, agent.actor, optimizer)
    common.soft_update(agent.target, agent.critic, cfg.tau)
    return losses


def adam(agent: Agent, cfg: Config) -> torch.optim.Adam:
    """Fused Adam whose rate is a tensor, which a CUDA graph can read; targets have no gradient and stay."""
    rate = torch.tensor(cfg.lr, device=agent.centre.device)
    return torch.optim.Adam(agent.parameters(), rate, fused=True, capturable=rate.is_cuda)


# --- data ---


OWN, OTHER, RND = range(3)  # whose transitions they are: the task's agent's, another's, novelty's


def one_set(path: str) -> bool:
    """Whether --data is one data set with rewards of its own, not trajectories of several agents."""
    return path.startswith("minari:") or Path(path).suffix in (".hdf5", ".h5")


def agents(root: Path) -> list[str]:
    """Folders of a domain's folder that hold episodes: those whose trajectories they are."""
    return sorted(x.name for x in root.glob("*") if any(x.rglob("*.npz")))


def prepare(task: str, run: Run):
    """data.pt in the run's folder: all agents' transitions with the task's reward, and whose they are."""
    cfg, (domain, _, own), parts = run.cfg, task.partition("_"), {}
    root = Path(cfg.data or run.folder).expanduser() / domain
    if one_set(cfg.data):
        own, parts = "data", {"data": common.load_episodes(cfg.data)}
        parts["data"]["reward"] -= float("antmaze" in cfg.data.lower())  # 0 and 1 become -1 and 0
    elif not cfg.data:
        for name in (*DOMAINS[domain], "rnd"):
            collect_gait(root / name, name, run)
    for name in agents(root):
        part = parts[name] = common.load_episodes(str(root / name))
        count, steps = int(part["episode"].max()) + 1, len(part["episode"])
        if "physics" not in part or steps * cfg.hold != 1000 * count:
            raise UserError(f"{root / name}: no physics, or not {1000 // cfg.hold} steps an episode (--hold)")
        part["reward"] = relabel(part["physics"], part["action"], task)
    for name, part in parts.items():
        count = int(part["episode"].max()) + 1
        test = round(cfg.held_out * count) if len(parts) > 1 else 0
        part["held_out"] = part["episode"] >= count - test
        part["whose"] = torch.full_like(
            part["episode"], OWN if name == own else RND if name == "rnd" else OTHER
        )
    data = {key: torch.cat([part[key] for part in parts.values()]) for key in part}
    if data["action"].abs().max() > 1.001:
        raise UserError(f"{cfg.data}: actions reach {data['action'].abs().max():.4g}, beyond [-1, 1]")
    torch.save(data, run.folder / "data.pt")


read_data = functools.lru_cache(maxsize=1)(torch.load)  # what `prepare` wrote; one task's may take gigabytes


def load_data(task: str, run: Run) -> dict:
    """A task's transitions: made anew for every seed, or, from --data, prepared once for all seeds."""
    keeper = copy.copy(run)
    keeper.cfg = replace(run.cfg, seed=0) if run.cfg.data else run.cfg
    folder = keeper.once(f"data {task}", lambda child: prepare(task, child))
    if run.cfg.data:  # what follows is drawn anew for every seed
        torch.manual_seed(common.stable_seed(run.cfg.seed, task))
    return read_data(folder / "data.pt")


def mixture_of(data: dict, task: str, cfg: Config) -> Tensor:
    """Which transitions are trained on, (n,); UserError if there are none."""
    mixtures = {"same": [OWN], "cross": [OTHER], "mixed": [OWN, OTHER], "all": [OWN, OTHER, RND]}
    rows = torch.isin(data["whose"], torch.tensor(mixtures[cfg.mixture])) & ~data["held_out"]
    if not rows.any():
        raise UserError(f"--mixture {cfg.mixture}: {cfg.data} has no such trajectories of {task}; --collect?")
    return rows


# --- a cell of the table ---


def train(cfg: Config, run: Run) -> dict:
    """One cell: train on each task; the means over the tasks, and each one's return if they are many."""
    for task in cfg.tasks:  # all are checked before the first one is trained on
        mixture_of(load_data(task, run), task, cfg)
    found = [train_task(task, cfg, run) for task in cfg.tasks]
    means = {key: float(np.mean([numbers[key] for numbers in found])) for key in found[0]}
    if len(found) > 1:
        means |= {task: numbers["return"] for task, numbers in zip(cfg.tasks, found, strict=True)}
    return means


def train_task(task: str, cfg: Config, run: Run) -> dict:
    """Train an agent on one task's data; its return and its error on held-out actions of the task's agent."""
    data, device = load_data(task, run), run.device
    chosen = mixture_of(data, task, cfg)
    envs, low, high = scoring(task, cfg.data, cfg.hold, cfg.episodes)
    if cfg.algo == "behaviour":
        mine = (data["whose"] == OWN) & chosen
        total = data["reward"][mine].sum() / len(data["episode"][mine].unique())
        return {"return": float(100 * (total - low) / (high - low)), "own": math.nan, "error": math.nan}
    x = {key: value[chosen].to(device) for key, value in data.items()}
    n, width = x["action"].shape
    if envs.single_observation_space.shape != x["observation"].shape[1:]:
        raise UserError(
            f"{cfg.data}: observations are not those of the environment, {envs.observation_space}"
        )
    agent = Agent(cfg, x["observation"].shape[1], width, n * (cfg.algo == "asac")).to(device)
    if cfg.standardize:
        agent.centre, agent.scale = x["observation"].mean(0), x["observation"].std(0) + 1e-3
    if cfg.shuffle:
        x["reward"] = x["reward"][torch.randperm(n, generator=run.generator("shuffle"))]
    obs, following = agent.standard(x["observation"]), agent.standard(x["next_observation"])
    rows = Batch(obs, x["action"], x["reward"][:, 0], following, 1 - x["terminated"][:, 0])
    optimizer = adam(agent, cfg)

    def gather(index: Tensor) -> Batch:
        return Batch(*(column[index] for column in rows))

    @common.graphed  # on a GPU one CUDA graph
    def iterate(index: Tensor, noise: Tensor) -> dict:
        if cfg.algo != "asac":
            batch = gather(index)
            return update(agent, optimizer, batch, batch, noise, cfg)
        drawn = weighted_rows(agent.logits, cfg.batch)
        losses = update(agent, optimizer, gather(index), gather(drawn), noise, cfg)
        both = torch.cat([index, drawn])
        batch, noise = gather(both), noise[1:].repeat(1, 2, 1)
        agent.logits[both] = advantage(agent, batch.s, batch.a, noise, cfg).double() / cfg.beta  # eq. (7)
        return losses

    for step in run.steps(cfg.updates // cfg.block, task, agent=agent, optimizer=optimizer):
        share = step * cfg.block / cfg.updates
        for group in optimizer.param_groups:
            group["lr"].fill_(cfg.lr * (min(1.0, 2 - 2 * share) if cfg.decay else 1.0))
        index = torch.randint(n, (cfg.block, cfg.batch), device=device)
        noise = cfg.std * torch.randn(cfg.block, 1 + cfg.samples, cfg.batch, width, device=device)
        for draws in zip(index, noise, strict=True):
            losses = iterate(*draws)
        run.log(step, **losses)
    return measure(agent.eval(), task, data, cfg, run)


# --- evaluation ---

D4RL = {  # environment of gymnasium, returns of a random and of an expert policy, as published with D4RL
    "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0),
    "hopper": ("Hopper-v4", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v4", 1.629008, 4592.3),
}


@functools.lru_cache(maxsize=1)
def scoring(task: str, path: str, hold: int, count: int) -> tuple:
    """`count` environments, and the returns that count 0 and 100.

    MOOD's tasks count up to 1000, whatever --hold is. Kept until another task's are made; many step in
    processes.
    """
    make, low, high = functools.partial(MoodEnv, task, hold), 0.0, 100 / hold
    if path.startswith("minari:"):
        data = common.need("minari", "data").load_dataset(path.removeprefix("minari:"), download=True)
        low, high = (
            data.storage.metadata.get(f"ref_{k}_score", x) for k, x in (("min", 0.0), ("max", 100.0))
        )

        def make():
            env = data.recover_environment(eval_env=True)
            return gymnasium.wrappers.FlattenObservation(gymnasium.wrappers.RescaleAction(env, -1.0, 1.0))

    elif one_set(path):
        found = [values for name, values in D4RL.items() if name in Path(path).name.lower()]
        if not found:
            raise UserError(f"{path}: only {', '.join(D4RL)} are scored; try a minari: set")
        name, low, high = found[0]
        make = functools.partial(gymnasium.make, name)
    try:
        kind = gymnasium.vector.AsyncVectorEnv if count > 8 else gymnasium.vector.SyncVectorEnv
        return kind([make] * count), low, high
    except gymnasium.error.Error as e:
        raise UserError(f"{path}: its environment cannot be made here ({e})") from None


@torch.no_grad()
def act(agent: Agent, s: Tensor, cfg: Config) -> Tensor:
    """Mean action for es = 1, else evaluation sampling, eq. (8): of `es` samples the best by P(Q).

    (B, d) -> (B, m). The noise is not clipped.
    """
    mean = agent.mean(s)
    if cfg.es == 1:
        return mean
    actions = squash(mean, cfg.std * torch.randn(cfg.es, *mean.shape, device=s.device))
    q = pessimistic(agent.q(s.repeat(cfg.es, 1), actions.flatten(0, 1)), cfg.pessimism)
    best = q.view(cfg.es, -1).argmax(0)
    return actions[best, torch.arange(len(s), device=s.device)]


@torch.no_grad()
def measure(agent: Agent, task: str, data: dict, cfg: Config, run: Run) -> dict:
    """Mean returns from resets and from the target's own held-out states, error on its held-out actions."""
    envs, low, high = scoring(task, cfg.data, cfg.hold, cfg.episodes)
    test, seed = (data["whose"] == OWN) & data["held_out"], common.stable_seed(cfg.seed, "starts") % 2**31

    def policy(obs):
        s = agent.standard(torch.as_tensor(obs, dtype=torch.float32, device=run.device))
        return act(agent, s, cfg).cpu().numpy()

    guess = agent.mean(agent.standard(data["observation"][test].to(run.device))).cpu()
    error = F.mse_loss(guess, data["action"][test]).item()
    numbers, starts = {"return": math.nan, "own": math.nan, "error": error}, {"return": None}
    if "physics" in data and test.any():
        starts["own"] = {"physics": data["physics"][test].numpy()}
    for name, options in starts.items():
        returns = common.evaluate_policy(envs, policy, seed, options)
        numbers[name] = float(100 * (returns.mean() - low) / (high - low))
    return numbers


# --- collecting: agents that learn online ---


class Novelty(nn.Module):
    """Random network distillation: how badly a trained network predicts a random one at the next state."""

    def __init__(self, obs: int):
        super().__init__()
        self.goal, self.guess = (network(1, obs, 64, 256, math.sqrt(2)) for _ in range(2))
        self.scale_in, self.scale_out = (nn.BatchNorm1d(n, affine=False) for n in (obs, 1))

    def forward(self, next_s: Tensor, optimizer) -> Tensor:
        """Train on next states (B, d) and return their novelty (B,), standardised."""
        x = self.scale_in(next_s).clamp(-5, 5)[None]
        error = ((self.guess(x) - self.goal(x).detach()) ** 2).mean(-1)[0]
        descend(error.mean(), self.guess, optimizer)
        return self.scale_out(error[:, None].detach())[:, 0]


def collect(cfg: Config, run: Run) -> dict:
    """A cell of --collect: all episodes that TD3, eq. (6) at alpha = 0, sees while it learns a task (novelty
    for "rnd"), and settings.json in DATA/<domain>/<agent>.

    An update a step; the first episode is uniform noise.
    """
    cfg, (task,) = replace(cfg, algo="td3bc", bc_coef=0.0, actor="large", critic="large"), cfg.tasks
    domain, _, source = task.partition("_")
    folder = Path(cfg.data).expanduser() / domain / source
    env, device = MoodEnv(f"{domain}_run" if source == "rnd" else task, cfg.hold), run.device
    steps = 1000 // cfg.hold
    width, m = env.observation_space.shape[0], env.action_space.shape[0]
    agent, novelty = Agent(cfg, width, m).to(device), Novelty(width).to(device)
    optimizer = adam(agent, cfg)
    optimizer.add_param_group(dict(params=list(novelty.guess.parameters())))
    s, number = torch.zeros(width), torch.zeros(())
    row = Batch(s, torch.zeros(m), number, s, number)
    replay = common.Replay(cfg.collect_episodes * steps, **row._asdict()).to(device)

    @common.graphed
    def learn(noise: Tensor) -> dict:
        batch = Batch(**replay.sample(cfg.batch))
        if source == "rnd":
            batch = batch._replace(reward=novelty(batch.next_s, optimizer))
        return update(agent, optimizer, batch, batch, noise, cfg)

    state = dict(agent=agent, novelty=novelty, replay=replay, optimizer=optimizer)
    for step in run.steps(cfg.collect_episodes, **state):
        obs, info = env.reset(seed=common.stable_seed(cfg.seed, task, step))
        physics, losses, over = [info["physics"]], {}, False
        while not over:
            s = torch.as_tensor(obs, device=device)[None]
            action = torch.rand(1, m, device=device) * 2 - 1
            if step:
                action = squash(agent.mean(s).detach(), cfg.std * torch.randn_like(action))
                losses = learn(cfg.std * torch.randn(2, cfg.batch, m, device=device))
            obs, reward, _, over, info = env.step(action[0].cpu().numpy())
            replay.add(s=s, a=action, reward=[reward], next_s=obs[None], live=[1.0])  # ends are by time
            physics.append(info["physics"])
        rows = slice(step * steps, (step + 1) * steps)
        observation = np.concatenate([replay.s[rows].cpu(), obs[None]])
        write_episode(folder, step, replay.a[rows].cpu(), observation=observation, physics=np.stack(physics))
        run.log(step, episode_return=replay.reward[rows].sum() * cfg.hold, **losses)
    common.write_atomic(folder / "settings.json", common.to_json(vars(cfg)))
    return {"episodes": cfg.collect_episodes}


# --- what is missing, sizes, the figure ---


def missing(cfg: Config) -> list[str]:
    """What is needed of --data and is not there, a line each."""
    path, domains = Path(cfg.data).expanduser(), dict.fromkeys(task.partition("_")[0] for task in cfg.tasks)
    if not cfg.data:
        if cfg.config != "full" and list(domains) == ["cheetah"]:
            return []
        return ["--data FOLDER: MOOD's are not public; ExORL's, or --collect --data FOLDER"]
    if one_set(cfg.data):
        there = cfg.data.startswith("minari:") or path.is_file()
        return [] if there else [f"--data {path}: no such file"]
    empty = [path / domain for domain in domains if not agents(path / domain)]
    return [f"{folder}: no agent's folder of episodes; --collect makes them" for folder in empty]


def dry_run(cfg: Config, run: Run):
    """Parameters and hours with large networks, memory of the data, and what is missing."""
    env = MoodEnv(cfg.tasks[-1])
    width, m = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(replace(cfg, actor="large", critic="large"), width, m)
    size = sum(p.numel() for p in agent.parameters())
    seconds = max(6 * size * cfg.batch / 2e14, 2e-4)  # at 200 TFLOP/s; to launch a CUDA graph takes the rest
    hours = seconds * cfg.updates * len(cfg.tasks) * cfg.seeds / 3600
    run.print(f"{size:,} parameters; {hours:.1f} GPU hours a row")
    steps = cfg.collect_episodes * 1000 // cfg.hold
    run.print(f"{steps:,} transitions an agent, {steps * (2 * width + m + 2) * 4e-9:.2f} GB on the GPU each")
    for line in missing(cfg):
        run.print(f"missing: {line}")


def draw(figure, table: dict):
    """Returns and errors of each row, a dot a seed."""
    for axes, metric in zip(figure.subplots(1, 3, sharey=True), ("return", "own", "error"), strict=True):
        for row, cells in reversed(table.items()):
            values = [cell[metric] for cell in cells]
            axes.plot(values, [row] * len(cells), "o", alpha=0.5)
        axes.set_xlabel(metric)


def main():
    cfg = common.parse_config(CONFIGS)
    with Run(cfg, "collect" if cfg.collect else cfg.data) as run:
        if cfg.dry_run:
            return dry_run(cfg, run)
        if cfg.collect:
            domains = dict.fromkeys(task.partition("_")[0] for task in cfg.tasks)
            names = [f"{domain}_{agent}" for domain in domains for agent in (*DOMAINS[domain], "rnd")]
            run.cfg = replace(cfg, seeds=1, rows=())
            return run.grid({name: dict(tasks=(name,)) for name in names}, collect)
        if found := missing(cfg):
            raise UserError("; ".join(found))
        table = run.grid(ROWS, train)
        run.check(CLAIMS, table)
        run.figure(draw, table)


if __name__ == "__main__":
    main()
