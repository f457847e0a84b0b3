"""Updates a second of mood.py beside CORL's own iql.py and awac.py: python tests/bench_corl.py DIR

DIR is the folder algorithms/offline of a checkout of CORL. Sizes are CORL's: observations of 17, actions of
6, batch 256, hidden layers 256x2 (IQL) and 256x3 (AWAC), two critics, exp weights, standardised observations.
Numbers are the best of three intervals of 4 s; they go to results.json in out/mood-bench-s0.
"""

import contextlib
import importlib.util
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import common
import mood


def rate_of(step, device: torch.device, seconds: float = 4.0) -> float:
    """Calls a second of step(i), after ten calls to warm up."""
    sync, rates, i = torch.cuda.synchronize if device.type == "cuda" else lambda: None, [], 0
    for _ in range(10):
        step(i := i + 1)
    for _ in range(3):
        sync()
        begin, first = time.perf_counter(), i
        while time.perf_counter() - begin < seconds:
            step(i := i + 1)
        sync()
        rates.append((i - first) / (time.perf_counter() - begin))
    return max(rates)


def corl_rates(folder: Path, data: mood.Transitions, device: torch.device) -> dict[str, float]:
    """Updates a second of CORL's files, with empty modules in place of d4rl, gym, pyrallis and wandb."""
    for name in ("d4rl", "gym", "pyrallis", "wandb"):
        sys.modules[name] = mock.MagicMock()
    sys.modules["pyrallis"].wrap = lambda: lambda function: function
    arrays = {"observations": data.obs, "actions": data.action, "rewards": data.reward}
    arrays |= {"next_observations": data.next, "terminals": 1 - data.live}
    rates = {}
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
        rates[name] = rate_of(lambda _, train=train, buffer=buffer: train(buffer.sample(256)), device)
    return rates


def main() -> None:
    cfg = replace(mood.CONFIGS["demo"], config="bench", workers=1, weights="exp", decay=False)
    with common.Run(cfg) as run:
        g, n = torch.Generator().manual_seed(0), 100_000
        sizes = (n, 17), (n, 6), (n,), (n, 17)
        obs, action, reward, following = (torch.randn(*size, generator=g) for size in sizes)
        zeros = torch.zeros(n, dtype=torch.long)
        data = mood.Transitions(obs, action.tanh(), reward, following, torch.ones(n), zeros, zeros)
        theirs, lines = corl_rates(Path(sys.argv[1] if len(sys.argv) > 1 else "."), data, run.device), []
        small = {"actor": "s256x2", "critic": "s256x2", "value": "s256x2"}
        sizes = {"iql": {"iql_advantage": "value"} | small, "awac": {"actor": "s256x3", "critic": "s256x3"}}
        for algo in sizes:
            for dtype in ("float32", "bfloat16"):
                for count in (1, 4):
                    c = replace(cfg, algo=algo, seeds=count, dtype=dtype, **sizes[algo])
                    learner = mood.Learner(c, list(range(count)), [data], run.device)
                    rate = count * rate_of(learner.step, run.device)
                    line = {"algorithm": algo, "dtype": dtype, "seeds": count, "updates_per_s": rate}
                    lines.append(line | {"CORL": theirs[algo], "ratio": rate / theirs[algo]})
        run.table(lines, f"updates a second of all seeds together, {torch.get_num_threads()} threads")
        names = [f"{x['algorithm']}_{x['dtype']}_{x['seeds']}_seeds_updates_per_s" for x in lines]
        speed = dict(zip(names, (x["updates_per_s"] for x in lines), strict=True))
        run.finish(**speed, **{f"corl_{k}_updates_per_s": v for k, v in theirs.items()})


if __name__ == "__main__":
    main()
