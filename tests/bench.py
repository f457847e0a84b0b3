"""Updates a second of mood.py beside CORL's own iql.py and awac.py: python tests/bench.py DIR

DIR is the folder algorithms/offline of a checkout of CORL. Sizes are CORL's: observations of 17, actions of
6, batch 256, two critics, hidden layers 256x2, for AWAC too (CORL's third is taken out). Medians of seven
intervals, in turn, so that slow minutes hit all alike.
"""

import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tabulate import tabulate

import common
import mood

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


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    run = common.Run(common.Config())  # for its device, its precision and oneDNN's products
    g = torch.Generator().manual_seed(0)
    widths = ((ROWS, OBS), (ROWS, ACTIONS), (ROWS,), (ROWS, OBS))
    s, a, reward, next_s = (torch.randn(*width, generator=g).to(run.device) for width in widths)
    data = mood.Batch(s, a.tanh(), reward, next_s, torch.ones_like(reward))
    steps = {}
    for name in ("iql", "awac"):
        steps[f"CORL {name}"] = corl_step(folder, name, data, run.device)
        steps[f"ours {name}"] = our_step(name, data, run.device)
    rates = median_rates(steps, run.device)
    lines = [
        [name, rates[f"ours {name}"], rates[f"CORL {name}"], rates[f"ours {name}"] / rates[f"CORL {name}"]]
        for name in ("iql", "awac")
    ]
    print(tabulate(lines, ["updates a second", "ours", "CORL", "ratio"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
