"""Our inner loops beside those of the papers' public code, on the same work: python tests/bench.py rmc DIR

DIR is a folder of a checkout. rmc: sspg_dmc of markov-chain-reasoning; an update of encoder, critics, actor
and temperature from pixels at the paper's sizes, batch 32, chains of 4 steps. Numbers are medians of calls in
turn: slow minutes hit both alike.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from gymnasium.spaces import Box

import rmc


def alternate(ours: Callable, theirs: Callable, rounds: int = 9) -> None:
    """Print median seconds a call of both, in turn; the first round warms up."""
    seconds = []
    for _ in range(rounds + 1):
        times = []
        for call in (ours, theirs):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        seconds.append(times)
    mine, other = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
    print(f"ours {mine:.3f} s, theirs {other:.3f} s, {other / mine:.2f} x")


def bench_rmc(folder: str, batch: int = 32, dims: int = 12) -> None:
    """rmc.update beside SSPG.update of the public PyTorch code; both get a ready batch."""
    for name in ("omegaconf", "skimage", "skimage.util", "skimage.util.shape"):
        sys.modules[name] = mock.MagicMock()  # imported there, not used here
    sys.path.insert(0, folder)
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
    steps = ("gelman_rubin", 16, 1.1, "mean_floor", "mean_ceil", "mean_ceil")
    with redirect_stdout(None):
        reference = SSPG(*steps, use_tb=False, chain_backprop=2, **shared)

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

    alternate(
        lambda: rmc.update(agent, optimizer, row, 4, True, torch.tensor(-float(dims)), cfg),
        lambda: reference.update(stream, 0),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"rmc": bench_rmc}[sys.argv[1]](sys.argv[2])
