"""Updates a second of mood.py beside CORL's own iql.py and awac.py: python tests/bench_corl.py DIR

DIR is the folder algorithms/offline of a checkout of CORL. Sizes are CORL's: observations of 17, actions of
6, batch 256, hidden layers 256x2 (IQL) and 256x3 (AWAC), two critics, exp weights, standardised observations.
Numbers are medians of seven intervals, in turn; they go to results.json in out/mood-bench-s0.
"""

import contextlib
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import before as common
import mood


def median_rates(steps: dict[str, Callable[[], object]], device: torch.device, rounds=7, seconds=1.5) -> dict:
    """Calls a second of each step, in turn for `rounds` intervals: slow minutes hit all alike."""
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
    return {name: statistics.median(r[1:]) for name, r in rates.items()}  # the first round warms up


def corl_steps(folder: Path, data: mood.Transitions, device: torch.device) -> dict[str, Callable]:
    """One update of CORL's files, with empty modules in place of d4rl, gym, pyrallis and wandb."""
    for name in ("d4rl", "gym", "pyrallis", "wandb"):
        sys.modules[name] = mock.MagicMock()
    sys.modules["pyrallis"].wrap = lambda: lambda function: function
    arrays = {"observations": data.obs, "actions": data.action, "rewards": data.reward}
    arrays |= {"next_observations": data.next, "terminals": 1 - data.live}
    steps = {}
    for name in ("iql", "awac"):
        if not (folder / f"{name}.py").is_file():
            sys.exit(f"bench_corl.py: no {folder / name}.py; give CORL's folder algorithms/offline")
        spec = importlib.util.spec_from_file_location(f"corl_{name}", folder / f"{name}.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        buffer = module.ReplayBuffer(17, 6, len(data), str(device))
        with contextlib.redirect_stdout(None):
            buffer.load_d4rl_dataset({k: v.numpy() for k, v in arrays.items()})
        if name == "iql":
            nets = module.GaussianPolicy(17, 6, 1.0), module.TwinQ(17, 6), module.ValueFunction(17)
        else:
            nets = module.Actor(17, 6, 256), module.Critic(17, 6, 256), module.Critic(17, 6, 256)
        pairs = [x for net in nets for x in (net.to(device), torch.optim.Adam(net.parameters(), lr=3e-4))]
        if name == "iql":
            train = module.ImplicitQLearning(1.0, *pairs, device=str(device)).train
        else:
            train = module.AdvantageWeightedActorCritic(*pairs).update
        steps[name] = lambda train=train, buffer=buffer: train(buffer.sample(256))
    return steps


def main() -> None:
    cfg = replace(mood.CONFIGS["demo"], config="bench", workers=1, weights="exp", decay=False)
    with common.Run(cfg) as run:
        g, n = torch.Generator().manual_seed(0), 100_000
        sizes = (n, 17), (n, 6), (n,), (n, 17)
        obs, action, reward, following = (torch.randn(*size, generator=g) for size in sizes)
        zeros = torch.zeros(n, dtype=torch.long)
        data = mood.Transitions(obs, action.tanh(), reward, following, torch.ones(n), zeros, zeros)
        steps = corl_steps(Path(sys.argv[1] if len(sys.argv) > 1 else "."), data, run.device)
        small = {"actor": "s256x2", "critic": "s256x2", "value": "s256x2"}
        sizes = {"iql": {"iql_advantage": "value"} | small, "awac": {"actor": "s256x3", "critic": "s256x3"}}
        arms = list(itertools.product(sizes, ("float32", "bfloat16"), (1, 4)))
        for algo, dtype, count in arms:
            c = replace(cfg, algo=algo, seeds=count, dtype=dtype, **sizes[algo])
            learner, number = mood.Learner(c, list(range(count)), [data], run.device), itertools.count()
            steps[f"{algo} {dtype} {count}"] = lambda learner=learner, number=number: learner.step(
                next(number)
            )
        rates, lines = median_rates(steps, run.device), []
        for algo, dtype, count in arms:
            rate = count * rates[f"{algo} {dtype} {count}"]
            line = {"algorithm": algo, "dtype": dtype, "seeds": count, "updates_per_s": rate}
            lines.append(line | {"CORL": rates[algo], "ratio": rate / rates[algo]})
        run.table(lines, f"updates a second of all seeds together, {torch.get_num_threads()} threads")
        run.finish(**{name.replace(" ", "_") + "_steps_per_s": rate for name, rate in rates.items()})


if __name__ == "__main__":
    main()
