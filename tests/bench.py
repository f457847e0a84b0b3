"""Our inner loops beside those of the papers' public code, on the same work: python tests/bench.py NAME DIR

NAME mood: DIR is algorithms/offline of a checkout of CORL. Sizes are CORL's: observations of 17, actions of
6, batch 256, two critics, hidden layers 256x2, for AWAC too (CORL's third is taken out). NAME rmc: DIR is
sspg_dmc of markov-chain-reasoning; an update of encoder, critics, actor and temperature from pixels at the
paper's sizes, batch 32, chains of 4 steps. NAME fb: DIR is a checkout of metamotivo;
20 updates of FB with a z for each of 128 transitions, sizes of walker's, z of 50, hidden layers of 256.
Medians of seven intervals (fb: five), in turn, so that slow minutes hit all alike.
"""

import contextlib
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from gymnasium.spaces import Box

import common
import fb
import mood
import rmc

OBS, ACTIONS, ROWS = 17, 6, 100_000


def median_rates(steps: dict[str, Callable[[], object]], device, rounds=7, seconds=1.5) -> dict[str, float]:
    """Calls a second of each step; the first round warms up."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rates = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            sync()
            begin, calls = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                step()
                calls += 1
            sync()
            rates[name].append(calls / (time.perf_counter() - begin))
    return {name: statistics.median(r[1:]) for name, r in rates.items()}


def corl_step(folder: Path, name: str, data: mood.Batch, device) -> Callable:
    """One update of CORL's file, with empty modules in place of d4rl, gym, pyrallis and wandb."""
    for package in ("d4rl", "gym", "pyrallis", "wandb"):
        sys.modules[package] = mock.MagicMock()
    sys.modules["pyrallis"].wrap = lambda: lambda function: function
    if not (folder / f"{name}.py").is_file():
        sys.exit(f"bench.py: no {folder / name}.py; give CORL's folder algorithms/offline")
    spec = importlib.util.spec_from_file_location(f"corl_{name}", folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    buffer = module.ReplayBuffer(OBS, ACTIONS, ROWS, str(device))
    arrays = dict(observations=data.s, actions=data.a, rewards=data.reward, next_observations=data.next_s)
    arrays = {k: v.cpu().numpy() for k, v in arrays.items()}
    with contextlib.redirect_stdout(None):
        buffer.load_d4rl_dataset(arrays | {"terminals": (1 - data.live).cpu().numpy()})
    if name == "iql":
        nets = module.GaussianPolicy(OBS, ACTIONS, 1.0), module.TwinQ(OBS, ACTIONS), module.ValueFunction(OBS)
    else:
        nets = [kind(OBS, ACTIONS, 256) for kind in (module.Actor, module.Critic, module.Critic)]
        for net in [nets[0]._mlp, *(critic._mlp for critic in nets[1:])]:
            del net[4:6]
    pairs = [x for net in nets for x in (net.to(device), torch.optim.Adam(net.parameters(), lr=3e-4))]
    if name == "iql":
        train = module.ImplicitQLearning(1.0, *pairs, device=str(device)).train
    else:
        train = module.AdvantageWeightedActorCritic(*pairs).update
    return lambda: train(buffer.sample(256))


def our_step(name: str, data: mood.Batch, device) -> Callable:
    """One update of ours, as in mood.train_task."""
    sizes = dict(small_actor=256, small_critic=256, batch=256)
    cfg = replace(mood.CONFIGS["demo"], algo=name, **sizes)
    agent = mood.Agent(cfg, OBS, ACTIONS).to(device)
    optimizer = mood.adam(agent, cfg)

    def iterate(index, noise):
        batch = mood.Batch(*(column[index] for column in data))
        return mood.update(agent, optimizer, batch, batch, noise, cfg)

    iterate, queue = common.graphed(iterate), []

    def step():
        if not queue:
            index = torch.randint(ROWS, (cfg.block, cfg.batch), device=device)
            noise = 0.2 * torch.randn(cfg.block, 2, cfg.batch, ACTIONS, device=device)
            queue.extend(zip(index, noise, strict=True))
        iterate(*queue.pop())

    return step


def bench_rmc(folder: Path, run: common.Run, batch: int = 32, dims: int = 12):
    """rmc.update beside SSPG.update of the public PyTorch code; both get a ready batch."""
    for name in ("omegaconf", "skimage", "skimage.util", "skimage.util.shape"):
        sys.modules[name] = mock.MagicMock()  # imported there, not used here
    sys.path.insert(0, str(folder))
    from drqsac import GPCritic
    from drqsac_fsres import ReasoningStochasticActor
    from drqsac_fsres_ada import SSPG
    from drqv2 import Encoder
    from fsres_ada_utils import StepsUpdater

    StepsUpdater.__init__.__defaults__ = (0.99, "cpu")
    torch.manual_seed(0)
    encoder = Encoder((9, 84, 84))
    actor = ReasoningStochasticActor(encoder, (dims,), 50, 1024, -10, 2)
    critic = GPCritic(2, encoder, (dims,), 50, 1024, 0.75)
    shared = dict(training_steps=4, target_steps=4, exploration_steps=4, test_steps=4, num_chains=64)
    shared |= dict(training_chain_init="rb_action", target_chain_init="rb_action", training_chain_mode="all")
    shared |= dict(target_chain_mode="last", exploration_chain_mode="last", deterministic_test_sampling=True)
    shared |= dict(
        training_chain_perturb=False, training_chain_perturb_prob=0, training_chain_perturb_coeff=1
    )
    shared |= dict(encoder=encoder, actor=actor, critic=critic, obs_shape=(9, 84, 84), action_shape=(dims,))
    shared |= dict(device="cpu", lr=1e-4, feature_dim=50, hidden_dim=1024, critic_target_tau=0.01)
    shared |= dict(num_expl_steps=0, update_every_steps=1, init_temperature=0.1, target_entropy=-1.0)
    shared |= dict(per_dim_target_entropy=True, nstep=3, discount=0.99, nstep_entropy_correction=False)
    kinds = ("gelman_rubin", 16, 1.1, "mean_floor", "mean_ceil", "mean_ceil")
    with contextlib.redirect_stdout(None):
        reference = SSPG(*kinds, use_tb=False, chain_backprop=2, **shared)

    generator = np.random.default_rng(0)
    obs, following = (generator.integers(0, 256, (batch, 9, 84, 84), dtype=np.uint8) for _ in range(2))
    action = generator.uniform(-1, 1, (batch, dims)).astype(np.float32)
    reward, discount = np.ones((batch, 1), np.float32), np.full((batch, 1), 0.97, np.float32)
    stream = itertools.repeat((obs, action, reward, discount, following))

    cfg = replace(rmc.CONFIGS["pixels"], batch=batch)
    spaces = SimpleNamespace(
        single_observation_space=Box(0, 255, (3, 3, 84, 84), np.uint8),
        single_action_space=Box(-1.0, 1.0, (dims,)),
    )
    agent = rmc.Agent(cfg, spaces, torch.device("cpu"))
    optimizer = torch.optim.Adam(agent.parameters(), cfg.lr, fused=True)
    frames, next_frames = (torch.as_tensor(x).unflatten(1, (3, 3)) for x in (obs, following))
    columns = [torch.as_tensor(x) for x in (action, reward[:, 0], discount[:, 0])]
    row = rmc.Batch(frames, *columns, next_frames, torch.ones(batch))

    entropy = torch.tensor(-float(dims))
    steps = {"ours": lambda: rmc.update(agent, optimizer, row, 4, True, entropy, cfg)}
    report("rmc", median_rates(steps | {"theirs": lambda: reference.update(stream, 0)}, run.device))


def bench_fb(folder: Path, run: common.Run, obs=24, actions=6, dim=50, width=256, batch=128, count=20):
    """fb.learn beside FBAgent.update, both drawing their transitions from memory on the device."""
    sys.path.insert(0, str(folder))
    with contextlib.redirect_stdout(None):
        from metamotivo.fb import FBAgent, FBAgentConfig

        theirs = FBAgentConfig()
        theirs.model.obs_dim, theirs.model.action_dim, theirs.model.norm_obs = obs, actions, False
        theirs.model.device, theirs.model.archi.z_dim = str(run.device), dim
        for part in (theirs.model.archi.f, theirs.model.archi.b, theirs.model.archi.actor):
            part.hidden_dim = width
        theirs.train.batch_size, theirs.train.discount = batch, 0.98
        reference = FBAgent(**asdict(theirs))
    s, a, next_s = (torch.randn(ROWS, n, device=run.device) for n in (obs, actions, obs))
    data = fb.Data(s, a.tanh(), next_s, torch.ones(ROWS, device=run.device), next_s, {})

    def sample(n):
        i = torch.randint(ROWS, (n,), device=run.device)
        following = {"observation": next_s[i], "terminated": torch.zeros(n, 1, dtype=bool, device=run.device)}
        return {"observation": s[i], "action": data.a[i], "next": following}

    sizes = dict(dim=dim, width=width, width_b=width, batch=batch, codes=batch, updates=count, block=count)
    cfg = replace(fb.Config(), others=0, **sizes)
    agent = fb.Agent(cfg, obs, actions).to(run.device)
    loop = SimpleNamespace(device=run.device, steps=lambda n, **_: range(n), log=lambda *_, **__: None)
    loop.speed = {"steps_per_s": 0}
    buffer = {"train": SimpleNamespace(sample=sample)}
    steps = {"ours": lambda: fb.learn(agent, data, cfg, loop)}
    steps["theirs"] = lambda: [reference.update(buffer, 0) for _ in range(count)]
    report("fb", median_rates(steps, run.device, rounds=5))


def bench_mood(folder: Path, run: common.Run):
    """mood.update beside CORL's."""
    g = torch.Generator().manual_seed(0)
    widths = ((ROWS, OBS), (ROWS, ACTIONS), (ROWS,), (ROWS, OBS))
    s, a, reward, next_s = (torch.randn(*width, generator=g).to(run.device) for width in widths)
    data = mood.Batch(s, a.tanh(), reward, next_s, torch.ones_like(reward))
    for name in ("iql", "awac"):
        steps = {
            "ours": our_step(name, data, run.device),
            "theirs": corl_step(folder, name, data, run.device),
        }
        report(name, median_rates(steps, run.device))


def report(name: str, rates: dict[str, float]):
    ours, theirs = rates["ours"], rates["theirs"]
    print(f"{name}: {ours:.2f} updates a second, theirs {theirs:.2f}: {ours / theirs:.2f} x")


if __name__ == "__main__":
    benches = {"fb": bench_fb, "mood": bench_mood, "rmc": bench_rmc}
    if len(sys.argv) != 3 or sys.argv[1] not in benches:
        sys.exit("python tests/bench.py fb|mood|rmc DIR")
    here = common.Run(common.Config())  # for its device, its precision and oneDNN's products
    benches[sys.argv[1]](Path(sys.argv[2]), here)
