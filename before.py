"""What the ten scripts share: command line, one `Run` per process, helpers for LMs and RL. No method is here.

Reading order: `Config` and `parse_config` (a dataclass becomes the command line), `Run` (ranks, seeds, output
folder, checkpoints, jobs, claims), then helpers for language models, `load_lm`, `generate`, `token_logprobs`,
and for reinforcement learning, `DmControl`, `evaluate_policy`, `Replay`, `EnsembleLinear`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import difflib
import functools
import gc
import hashlib
import inspect
import json
import logging
import math
import os
import pickle
import random
import re
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class UserError(Exception):
    """Something that the person at the keyboard can mend; `Run` makes it one line and exit code 2."""


@dataclass
class Config:
    """Settings that every script has; a script inherits them and adds its own, one commented line a field."""

    config: str = "demo"  # rung of the ladder that the other defaults come from
    seed: int = 0  # seed of every random number generator
    device: str = "auto"  # auto: CUDA if there is one, else CPU; or cpu, cuda, mps
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: bfloat16 on CUDA only
    compile: bool = False  # torch.compile the hot step, with CUDA graphs on a GPU
    workers: int = 1  # processes that share the independent jobs of one rank
    out: str = "out"  # folder that holds the run folders
    resume: bool = False  # go on from the run folder's checkpoints and skip its finished jobs
    log_every: int = 10  # steps between two lines of metrics.jsonl
    save_every: int = 100  # steps between two checkpoints
    tensorboard: bool = False  # write TensorBoard events beside metrics.jsonl
    dry_run: bool = False  # print sizes, memory, FLOPs and steps of this config, load nothing, exit

    may_change: typing.ClassVar[set[str]] = set()  # a script's own settings that --resume may alter

    def __post_init__(self):
        if min(self.workers, self.log_every, self.save_every) < 1:
            raise ValueError("--workers, --log_every and --save_every must be 1 or more")


# settings that a resumed run may have changed
MAY_CHANGE = {"device", "compile", "workers", "out", "resume", "log_every", "save_every", "tensorboard"}


def parse_value(hint, text: str):
    """Read `text` as `hint` (int, float, str, bool, Literal, tuple[x, ...], x | None) or raise ValueError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return tuple(parse_value(args[0], part) for part in text.split(",") if part)
    if type(None) in args:
        inner = next(a for a in args if a is not type(None))
        return None if text.lower() == "none" else parse_value(inner, text)
    choices = args if origin is typing.Literal else (True, False) if hint is bool else ()
    if choices:
        found = [c for c in choices if str(c).lower() == text.lower()]
        if not found:
            raise ValueError(f"choose from {', '.join(str(c).lower() for c in choices)}")
        return found[0]
    return hint(text)


def parse_config(configs: dict[str, Config], argv: Sequence[str] | None = None) -> Config:
    """Build a script's Config from the command line: `--config NAME` picks a rung, any field can be set.

    Booleans: `--flag`, `--flag false` or `--no_flag`. A bad name or value is one line and exit code 2.
    """
    default = "demo" if "demo" in configs else next(iter(configs))
    cls = type(configs[default])
    types, about = typing.get_type_hints(cls), (sys.modules[cls.__module__].__doc__ or "").split("\n")[0]
    hints = {f.name: types[f.name] for f in dataclasses.fields(cls)}
    parser = argparse.ArgumentParser(Path(inspect.getfile(cls)).name, description=about, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, no usage block
    sources = [inspect.getsource(c) for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", "\n".join(sources), re.M))
    for name, hint in hints.items():
        kind = hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")
        text = f"{comments.get(name, '')} [{default}: {getattr(configs[default], name)}]".replace("%", "%%")
        optional = {"nargs": "?", "const": "true"} if hint is bool else {}
        parser.add_argument(f"--{name}", metavar=kind.upper(), help=text, **optional)
        if hint is bool:
            off = {"action": "store_const", "const": "false", "help": argparse.SUPPRESS}
            parser.add_argument(f"--no_{name}", dest=name, **off)
    words = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(words[:-1]):  # argparse takes a value such as -1e-3 for a flag
        if word.startswith("--") and hints.get(word[2:], bool) is not bool:
            words[i : i + 2] = [f"{word}={words[i + 1]}", ""]
    given, unknown = parser.parse_known_args([word for word in words if word])
    nearest = functools.partial(difflib.get_close_matches, n=1, cutoff=0.0)
    if unknown:
        near = nearest(unknown[0].split("=")[0].lstrip("-"), hints)[0]
        parser.error(f"unknown argument {unknown[0]}; the nearest is --{near} (--help lists all)")
    chosen = given.config or default
    if chosen not in configs:
        near = nearest(chosen, configs)[0]
        parser.error(f"--config {chosen}: the nearest is {near} (there are {', '.join(configs)})")
    values, flag = {"config": chosen}, ""
    try:
        for name, text in vars(given).items():
            if text is not None and name != "config":
                flag = f"--{name} {text}: "
                values[name] = parse_value(hints[name], text)
        flag = ""
        return dataclasses.replace(configs[chosen], **values)
    except ValueError as e:
        parser.error(f"{flag}{e}")


def finite_or_null(data):
    """Copy nested `data` for JSON: tensors and arrays become lists, NaN and infinities None."""
    if isinstance(data, dict):
        return {str(k): finite_or_null(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite_or_null(v) for v in data]
    if isinstance(data, (np.generic, np.ndarray, Tensor)):
        return finite_or_null(data.tolist())
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_atomic(path: Path, data: bytes | Callable[[typing.BinaryIO], object]) -> None:
    """Write bytes (or call a writer) on a temporary file, fsync, rename: the old file or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        data(file) if callable(data) else file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, data) -> None:
    """Write `data` as JSON, atomically."""
    write_atomic(path, json.dumps(finite_or_null(data), indent=1).encode())


def read_jsonl(path: str | Path, required: Sequence[str]) -> list[dict]:
    """Read one JSON object a line; UserError names file, line and field where a `required` one is no text."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise UserError(f"{path}, line {number}: not JSON ({e.msg})") from None
        for field in required:
            value = rows[-1].get(field) if isinstance(rows[-1], dict) else None
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path}, line {number}: field {field!r} is missing, empty or no string")
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def stable_hash(text: str) -> int:
    """56 bits of SHA-256: a seed that is the same in every process, which hash() is not."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


class Run:
    """The process: rank, device, precision, seeds, and the folder with metrics, checkpoints and results.

    Use it as `with Run(cfg) as run:`; a UserError inside becomes one line and exit code 2. `stage` and `jobs`
    make child runs with their own subfolder, checkpoint and seeds: a part of a script gives the same numbers
    whether the parts before it ran just now or were restored. `look` leaves the run folder as it is.
    """

    def __init__(self, cfg: Config, look: bool = False, worker: int | None = None):
        self.cfg, self.script, self.name = cfg, Path(inspect.getfile(type(cfg))).stem, ""
        self.writes = not (
            look or cfg.dry_run or worker is not None
        )  # whether entering makes the folder anew
        local_rank, distributed = (
            int(os.environ.get("LOCAL_RANK", 0)),
            "RANK" in os.environ and worker is None,
        )
        device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if distributed and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.talks, self.sharded = not self.rank and not worker, False
        self.signals: list[int] = []  # those that came, one list for a run and its children
        self.handlers: dict[int, typing.Any] = {}
        self.amp = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and self.device.type == "cuda")
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * cfg.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // processes))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.amp
        self.folder = Path(cfg.out) / f"{self.script}-{cfg.config}-s{cfg.seed}"
        self.results: dict = {"table": [], "claims": [], "speed": {}}
        self._begin()

    def _begin(self) -> None:
        """What a run and each child has for itself: clock, generators, numbers not yet read or written."""
        self.started, self.is_main, self.seconds, self.last = time.time(), self.rank == 0, {}, -1
        self._pending: list[tuple[int, dict]] = []
        self._unwritten: dict[str, float] = {}
        self.generators: dict[str, torch.Generator] = {}
        self._seed("")

    def _seed(self, part: str) -> None:
        """Seed the global generators for a named part of this run, alike on all ranks."""
        random.seed(self.stream(f"{part}python"))
        np.random.seed(self.stream(f"{part}numpy") % 2**32)
        torch.manual_seed(self.stream(f"{part}torch"))

    def __enter__(self) -> Run:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._on_signal)
        try:
            self.agree(self._open_folder() if self.is_main and self.writes else None)
        except UserError as e:
            self.__exit__(UserError, e, None)
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if isinstance(error, UserError):
            if self.talks or not self.world_size > 1:
                sys.stderr.write(f"{self.script}.py: {error}\n")
            sys.exit(2)
        if kind is None and dist.is_initialized():
            gc.collect()  # sharded models let go of their communicators before these go
            dist.barrier()
            dist.destroy_process_group()

    def agree(self, error: str | None) -> None:
        """Raise UserError on all ranks if one has an error: a rank that left alone would hang the others."""
        errors = [e for e in self.gather(error) if e]
        if errors:
            raise UserError(errors[0])

    def _on_signal(self, number, frame) -> None:
        """Remember it: `steps` ends the step and saves. A second one, two seconds later, does not wait."""
        if self.signals and time.time() - self.signalled > 2:
            os._exit(128 + number)
        self.signals.append(number)
        self.signalled = time.time()
        if number == signal.SIGTERM:  # Ctrl-C reaches worker processes by itself
            for process in mp.active_children():
                process.terminate()

    def _open_folder(self) -> str | None:
        """Make the folder; an old one is kept as .bak. Returns an error if --resume finds other settings."""
        file, now = self.folder / "config.json", finite_or_null(dataclasses.asdict(self.cfg))
        if self.cfg.resume and file.exists():
            before = json.loads(file.read_text())
            if changed := [
                k for k in now if k not in MAY_CHANGE | self.cfg.may_change and before.get(k) != now[k]
            ]:
                return f"--resume: {file} has other values of {', '.join(changed)}"
        elif self.folder.exists():
            names = (self.folder.with_name(f"{self.folder.name}.bak{n or ''}") for n in range(10**6))
            self.folder.rename(next(name for name in names if not name.exists()))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, now)
        return None

    # randomness and ranks

    def stream(self, name: str) -> int:
        """A seed for `name` that depends on cfg.seed and on this run's name, the same on all ranks."""
        return stable_hash(f"{self.cfg.seed}/{self.name}/{name}")

    def generator(self, name: str, per_rank: bool = False) -> torch.Generator:
        """The CPU generator called `name`, alike on all ranks unless `per_rank`; checkpoints carry it."""
        name = f"{name}/{self.rank}" if per_rank else name
        if name not in self.generators:
            self.generators[name] = torch.Generator().manual_seed(self.stream(name))
        return self.generators[name]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def mean(self, x: Tensor | float) -> Tensor:
        """Mean over the ranks of a tensor or number, in a new tensor on its device."""
        x = torch.as_tensor(x).detach().clone()
        if self.world_size > 1:
            dist.all_reduce(x)
        return x / self.world_size

    def gather(self, obj) -> list:
        """The `obj` of every rank, in rank order, on every rank."""
        everyone = [obj] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, obj)
        return everyone

    def wrap(self, model: nn.Module) -> nn.Module:
        """Data parallelism: DDP over the ranks, or the model itself when there is one rank."""
        if self.world_size == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model, [self.device] if self.device.type == "cuda" else None
        )

    def shard(
        self, model: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype, offload=False
    ) -> nn.Module:
        """FSDP2: cast each of `layers`, then the rest of `model`, to `dtype` and shard it over the ranks.

        Forward passes run in bfloat16 if the run's precision is that, gradients are averaged in float32. A
        frozen model frees its gathered weights after each pass; `offload` keeps its shards in CPU memory.
        On one rank the model is only moved and cast.
        """
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        if self.world_size == 1:
            return cast_parameters(model, dtype).to(self.device)
        half = torch.bfloat16 if self.amp else None
        options = {"mesh": device_mesh(self.device.type, self.world_size)}
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        options["offload_policy"] = CPUOffloadPolicy() if offload else OffloadPolicy()
        if not any(p.requires_grad for p in model.parameters()):
            options["reshard_after_forward"] = True
        for part in (*layers, model):
            fully_shard(cast_parameters(part, dtype), **options)
        self.sharded = True
        return model

    def autocast(self):
        """bfloat16 autocast where the run's precision asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    # parts of a run

    def stage(self, name: str, alone: bool = False) -> Run:
        """A child run in the subfolder `name`, on the same ranks or `alone` (world size 1)."""
        child = object.__new__(Run)
        child.__dict__ |= self.__dict__ | {
            "folder": self.folder / name,
            "name": f"{self.name}/{name}".lstrip("/"),
        }
        if alone:
            child.rank, child.world_size = 0, 1
        child._begin()
        if child.is_main:
            child.folder.mkdir(parents=True, exist_ok=True)
        child.barrier()
        return child

    def jobs(self, names: Iterable[str], work: Callable[[str, Run], dict]) -> dict[str, dict]:
        """Run `work(name, child)` for each independent job and return {name: result} on every rank.

        Jobs are dealt to the ranks; cfg.workers processes a rank take them in order, so `work` must be
        importable. A child is alone. A finished job leaves <name>/result.json, which --resume keeps. Ranks on
        several nodes need the output folder on a shared disk if a later job reads what an earlier one left.
        """
        names = list(names)
        share = names[self.rank :: self.world_size]
        if self.cfg.workers > 1 and len(share) > 1:
            begun = mp.get_context("spawn").Value("i", 0)  # jobs that some worker has begun
            args, count = (
                (self.cfg, self.folder, self.name, share, work, begun),
                min(self.cfg.workers, len(share)),
            )
            workers = mp.spawn(_job_process, args, count, join=False)
            try:
                while not workers.join(timeout=0.1, grace_period=3600):
                    pass
            except mp.ProcessExitedException as e:
                if not self.signals:
                    sys.exit(e.exit_code)
        self.leave_if_stopped()
        for name in share:
            self._job(name, work)
        self._seed("after jobs")  # whatever was done in this process
        found = {name: json.loads((self.folder / name / "result.json").read_text()) for name in share}
        found = {name: result for part in self.gather(found) for name, result in part.items()}
        return {name: found[name] for name in names}

    def _job(self, name: str, work: Callable[[str, Run], dict]) -> None:
        file, begin = self.folder / name / "result.json", time.time()
        if not file.exists():
            write_json(file, work(name, self.stage(name, alone=True)))
            print(f"  {name}: {time.time() - begin:.0f} s", flush=True)

    def steps(self, total: int, save_every: int = 0, **state) -> Iterator[int]:
        """Yield the steps still to do; the loop around it needs no other bookkeeping.

        `state` (modules, optimizers, dicts of plain data) is restored before the first step when the run
        resumes, and saved every `save_every` (or cfg.save_every) steps, after the last, and at SIGTERM or
        SIGINT (exit code 0 or 130). Setting self.last inside the loop ends it, saved, after that step.
        """
        self.last = total - 1
        first = self.restore(**state) if self.cfg.resume else 0
        live = self.talks and sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=first, desc=self.name or self.script, disable=not live, leave=False
        )
        for step in range(first, total):
            if step > self.last:
                break
            yield step
            self.bar.update()
            stop = bool(self.mean(float(len(self.signals))))
            if stop or (step + 1) % (save_every or self.cfg.save_every) == 0 or step == self.last:
                self.read_numbers()
                self.save(step + 1, **state)
            if stop:
                self.leave_if_stopped()
        self.bar.close()

    def leave_if_stopped(self) -> None:
        """Exit on all ranks if a signal came: with 130 after SIGINT, 0 after SIGTERM."""
        numbers = {int(number) for numbers in self.gather(self.signals) for number in numbers}
        if numbers:
            self.print(f"stopped after a saved step; --resume goes on from {self.folder}")
            sys.exit(130 if signal.SIGINT in numbers else 0)

    def save(self, step: int, **state) -> None:
        """Write checkpoint.pt atomically: step, state and the RNGs of all ranks; the one before is kept.

        A sharded model is gathered into rank 0's CPU memory, so that any number of ranks can resume.
        """
        rng = self.gather(rng_state(self.generators))
        data = {"step": step, "last": self.last, "rng": rng}
        data["state"] = {k: self._state(v, state) for k, v in state.items()}
        file, previous, error = self.folder / "checkpoint.pt", self.folder / "checkpoint.previous.pt", None
        if self.is_main:
            bad = [
                k for k, v in flat_tensors(data["state"]) if v.is_floating_point() and not v.isfinite().all()
            ]
            if bad:
                error = f"{self.name or self.script}, step {step - 1}: {bad[0]} is not finite; {self._good()}"
            else:
                if file.exists():
                    previous.unlink(missing_ok=True)
                    file.rename(previous) if os.name == "nt" else os.link(file, previous)
                write_atomic(file, lambda f: torch.save(data, f))
        self.agree(error)

    def _good(self) -> str:
        file = self.folder / "checkpoint.pt"
        return f"the last good checkpoint is {file}" if file.exists() else "there is no checkpoint yet"

    def restore(self, **state) -> int:
        """Load checkpoint.pt into `state` and the RNGs and return its step, 0 where there is none.

        Lines of metrics.jsonl from that step on are dropped. A torn file is a UserError.
        """
        file, metrics = self.folder / "checkpoint.pt", self.folder / "metrics.jsonl"
        if not file.exists():
            if self.is_main:
                metrics.unlink(missing_ok=True)
            return 0
        try:
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            step, self.last = data["step"], data["last"]
        except (RuntimeError, OSError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as e:
            kept = self.folder / "checkpoint.previous.pt"
            hint = f"; the one before it is whole: mv {kept} {file}" if kept.exists() else ""
            raise UserError(
                f"{file} is truncated or no checkpoint ({str(e).splitlines()[0][:80]}){hint}"
            ) from None
        for key, target in state.items():
            self._state(target, state, load=data["state"][key])
        set_rng_state(data["rng"][self.rank % len(data["rng"])], self)
        if self.is_main and metrics.exists():
            lines = [x for x in metrics.read_text().splitlines() if x.endswith("}")]
            kept = [x + "\n" for x in lines if json.loads(x)["step"] < step]
            write_atomic(metrics, "".join(kept).encode())
        return step

    def _state(self, target, state: dict, load=None):
        """The state of one checkpoint entry, or with `load` its restoration; optimizers belong to `model`."""
        if isinstance(target, dict):
            return target if load is None else target.update(load)
        if not self.sharded or not isinstance(target, (nn.Module, torch.optim.Optimizer)):
            return target.state_dict() if load is None else target.load_state_dict(load)
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=load is None)
        if isinstance(target, nn.Module):
            get, set_, args = dcp.get_model_state_dict, dcp.set_model_state_dict, (target,)
        else:
            get, set_, args = (
                dcp.get_optimizer_state_dict,
                dcp.set_optimizer_state_dict,
                (state["model"], target),
            )
            if load is not None and 0 in load["state"]:  # saved unsharded: parameters are numbered, not named
                names = [name for name, p in state["model"].named_parameters() if p.requires_grad]
                groups = [g | {"params": [names[i] for i in g["params"]]} for g in load["param_groups"]]
                load = {"state": {names[i]: v for i, v in load["state"].items()}, "param_groups": groups}
        return get(*args, options=options) if load is None else set_(*args, load, options=options)

    # numbers

    def print(self, *parts) -> None:
        """Print on rank 0, above the progress bar."""
        if self.talks:
            tqdm.write(" ".join(map(str, parts)), file=sys.stdout)
            sys.stdout.flush()

    def log(self, step: int, **numbers: Tensor | float) -> None:
        """Write numbers to metrics.jsonl every cfg.log_every steps, with one GPU sync a line.

        A non-finite number with "loss" or "reward" in its name stops the run, also at a step without a line.
        """
        copies = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in numbers.items()}
        self._pending.append((step, copies))
        if step % self.cfg.log_every and step != self.last:
            return
        self.read_numbers()
        numbers, self._unwritten = self._unwritten, {}
        if not self.is_main:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(finite_or_null({"step": step} | numbers)) + "\n")
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in list(numbers.items())[:5]})
        if self.bar.disable:
            text = ", ".join(f"{k} {v:.4g}" for k, v in list(numbers.items())[:8])
            self.print(f"{self.name} {step}: {text}")
        if self.cfg.tensorboard:
            for k, v in numbers.items():
                tensorboard_writer(self.folder).add_scalar(k, v, step)

    def read_numbers(self) -> None:
        """Read what was logged since the last read; stop all ranks at the first non-finite loss or reward."""
        flat = [(step, k, v) for step, numbers in self._pending for k, v in numbers.items()]
        tensors = [v.float().reshape(()).to(self.device) for _, _, v in flat if isinstance(v, Tensor)]
        values, error = iter(torch.stack(tensors).tolist() if tensors else ()), None
        for step, key, value in flat:
            value = next(values) if isinstance(value, Tensor) else float(value)
            self._unwritten[key] = value
            if error is None and not math.isfinite(value) and ("loss" in key or "reward" in key):
                error = f"{self.name or self.script}, step {step}: {key} is {value}; {self._good()}"
        self._pending = []
        self.agree(error)

    @contextlib.contextmanager
    def timed(self, phase: str):
        """Add the seconds spent inside to self.seconds[phase]; a GPU's queue is drained at both ends."""
        sync = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        sync()
        begin = time.perf_counter()
        yield
        sync()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def claim(
        self, text: str, ours: Sequence, theirs: Sequence, better="higher", margin: float = 0.0
    ) -> dict:
        """Record one sentence of the paper with the numbers of both sides, paired by seed or problem.

        diff is the mean of ours - theirs, se its standard error (sd with n - 1, over sqrt n). "higher" or
        "lower" holds when diff lies beyond `margin` by 2 se on that side (negative: "not worse by more than
        that"), "same" when |diff| + 2 se < margin. One pair has no standard error and never holds.
        """
        if len(ours) != len(theirs) or not len(ours) or better not in ("higher", "lower", "same"):
            raise ValueError("a claim needs paired numbers, and better is higher, lower or same")
        if better == "same" and not margin > 0:
            raise ValueError("a parity claim names its margin")
        pairs = np.asarray(ours, float) - np.asarray(theirs, float)
        diff, se = pairs.mean(), pairs.std(ddof=1) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        gain = diff if better == "higher" else -diff
        holds = abs(diff) + 2 * se < margin if better == "same" else gain - 2 * se > margin
        row = {"text": text, "ours": np.mean(ours), "theirs": np.mean(theirs), "diff": diff, "se": se}
        row |= {"better": better, "margin": margin, "n": len(pairs), "holds": bool(holds)}
        self.results["claims"].append(finite_or_null(row))
        return row

    def table(self, rows: Sequence[dict], title: str, keep: bool = True) -> None:
        """Print rows of equal keys as an aligned table and keep them for results.json."""
        self.results["table"] += [{"table": title} | row for row in rows] if keep else []
        cell = lambda v: f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v)  # noqa: E731
        lines = [list(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in lines)
        self.print(f"\n{title}\n{text}")

    def figure(self, name: str, draw: Callable, size: tuple[float, float] = (8, 4)) -> None:
        """Save `draw(figure)` as <name>.png in the run folder; without matplotlib say what to install."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return self.print(f'no {name}.png: pip install -e ".[plots]"')
        if self.is_main:
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            figure.savefig(self.folder / f"{name}.png", dpi=110)
            self.print(f"figure: {self.folder / name}.png")

    def finish(self, **speed: float) -> None:
        """Print the claims and write results.json; `speed` is e.g. tokens_per_s=..."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        head = {"script": self.script, "config": self.cfg.config, "seed": self.cfg.seed}
        head |= {
            "world_size": self.world_size,
            "device": device,
            "seconds": round(time.time() - self.started, 1),
        }
        if self.is_main:
            write_json(self.folder / "results.json", head | self.results | {"speed": speed})
        if claims := self.results["claims"]:
            keys = ("text", "ours", "theirs", "diff", "se", "n", "holds")
            self.table([{k: c[k] for k in keys} for c in claims], "claims", keep=False)
        self.print(f"\n{head['seconds']:.0f} s on {device}; results in {self.folder / 'results.json'}")


def _job_process(index: int, cfg: Config, folder: Path, name: str, share: list[str], work, begun) -> None:
    """Worker process `index` of `Run.jobs`: takes the next job until none is left, on a run of its own."""
    with Run(cfg, worker=index) as run:
        run.folder, run.name = folder, name
        while not run.signals:
            with begun.get_lock():
                mine, begun.value = begun.value, begun.value + 1
            if mine >= len(share):
                break
            try:
                run._job(share[mine], work)
            except UserError:
                with begun.get_lock():  # one line in all, and no worker begins another job
                    first, begun.value = begun.value < 10**9, 10**9
                if first:
                    raise
                sys.exit(2)


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the parameters and leave the buffers: rotary frequencies are wrong in bfloat16."""
    for p in module.parameters():
        p.data = p.data.to(dtype)
    return module


def flat_tensors(data, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor in nested dicts and lists."""
    if isinstance(data, Tensor):
        yield name, data
    elif isinstance(data, (dict, list, tuple)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from flat_tensors(value, f"{name}.{key}".lstrip("."))


@functools.cache
def device_mesh(kind: str, size: int):
    """The mesh of all ranks, one for all models."""
    return dist.init_device_mesh(kind, (size,))


@functools.cache
def tensorboard_writer(folder: Path):
    """The event writer of a run folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('--tensorboard needs: pip install -e ".[tensorboard]"') from None
    writer = SummaryWriter(folder)
    atexit.register(writer.close)
    return writer


def rng_state(generators: dict[str, torch.Generator]) -> dict:
    """Every random number generator of the process, as tensors and plain data."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest]}
    state["cuda"] = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return state | {
        "torch": torch.get_rng_state(),
        "named": {k: g.get_state() for k, g in generators.items()},
    }


def set_rng_state(state: dict, run: Run) -> None:
    """Undo `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    for name, saved in state["named"].items():
        run.generator(name).set_state(saved)


def mean_se(values: list[float]) -> str | None:
    """`mean +- s.e.` of some values; the value alone if there is one, None if there is none."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else None
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


# --- language models ---


class CharTokenizer:
    """One character, one token, behind the part of the Hugging Face tokenizer interface that the scripts use.

    `eos` is the character that ends a turn. A character outside `alphabet` raises ValueError.
    """

    is_fast, chat_template, all_special_tokens = True, None, ()

    def __init__(self, alphabet: str, eos: str):
        self.alphabet, self.eos_token, self.eos_token_id = alphabet, eos, alphabet.index(eos)
        self.index = {c: i for i, c in enumerate(alphabet)}

    def __len__(self) -> int:
        return len(self.alphabet)

    def __call__(self, texts: list[str], return_offsets_mapping=False, add_special_tokens=False) -> dict:
        if unknown := set("".join(texts)) - set(self.alphabet):
            raise ValueError(f"not in the alphabet: {sorted(unknown)}")
        out = {"input_ids": [[self.index[c] for c in text] for text in texts]}
        if return_offsets_mapping:
            out["offset_mapping"] = [[(i, i + 1) for i in range(len(text))] for text in texts]
        return out

    def encode(self, text: str, add_special_tokens=False) -> list[int]:
        return self([text])["input_ids"][0]

    def decode(self, ids: Iterable[int], skip_special_tokens=False) -> str:
        dropped = self.eos_token_id if skip_special_tokens else None
        return "".join(self.alphabet[i] for i in ids if i != dropped)


def tiny_lm(vocab: int, width: int, layers: int, heads: int = 4, context: int = 512, **more):
    """A transformers LlamaForCausalLM from scratch: what hooks into it hooks into the real ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = dict(vocab_size=vocab, hidden_size=width, intermediate_size=more.pop("mlp", 4 * width))
    size |= dict(num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=context)
    return LlamaForCausalLM(LlamaConfig(**size | dict(bos_token_id=None, eos_token_id=None) | more))


def load_lm(name: str, dtype: torch.dtype = torch.float32):
    """Load (model, tokenizer) from a folder, a .gguf file or a hub id; UserError says what is missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, utils

    utils.logging.disable_progress_bar()
    path, where = Path(name).expanduser(), {}
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"{name}: no such file")
        name, where = str(path.parent), {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False, **where)
    except ImportError as e:
        raise UserError(f'{name}: {str(e).strip().splitlines()[0]} (pip install -e ".[lm]")') from None
    except (OSError, ValueError) as e:
        raise UserError(f"{name}: neither a local model nor on the hub ({str(e).splitlines()[0]})") from None
    if where:  # its weights are whole numbers now, and it may be saved as any other model
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    return model.eval(), tokenizer


def draw_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sample of softmax(logits / temperature): (B, V), uniform (B,) -> tokens, log-probs (B,).

    Temperature 0 is greedy, with the log-probs of temperature 1. Log-probs are those before the top_p cut.
    """
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        return logp.argmax(-1), logp.amax(-1)
    p, order = logp.double().exp(), None
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p[:, 1:] *= p.cumsum(-1)[:, :-1] < top_p  # the smallest set that holds top_p, one token at least
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None].double() * cdf[:, -1:], right=True)
    token = token.clamp_(max=p.shape[1] - 1)
    token = token if order is None else order.gather(1, token)
    return token[:, 0], logp.gather(1, token)[:, 0]


@torch.no_grad()
def generate(
    model,
    prompts: list[list[int]],
    uniforms: Tensor,
    temperature=1.0,
    top_p=1.0,
    eos=-1,
    compile=False,
    stop: Callable[[list[list[int]]], list[bool]] | None = None,
    features: dict[str, Tensor] | None = None,
):
    """Sample completions with a static KV cache; every setting is explicit, generation_config is not read.

    prompts: P lists of ids. uniforms: (P * n, T) numbers in [0, 1) that decide the samples: n rows a prompt,
    T tokens at most. A prompt runs once and shares its keys and values out; `features` (pictures) go along.
    `stop` is asked every 16 tokens which rows (lists of ids) have said enough. Returns tokens (P * n, T'),
    mask (true up to and including the first `eos`) and fp32 log-probs at `temperature`.
    """
    from transformers import StaticCache

    if not all(prompts) or len(uniforms) % len(prompts):
        raise ValueError("every prompt needs a token, and as many rows of uniforms as the others")
    device, (rows, steps) = model.device, uniforms.shape
    n, longest, uniforms = rows // len(prompts), max(map(len, prompts)), uniforms.to(device)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # left-padded
    pads = torch.tensor([longest - len(p) for p in prompts], device=device)
    place = torch.arange(longest + steps, device=device)
    seen, positions = place[:longest] >= pads[:, None], (place[:longest] - pads[:, None]).clamp(min=0)
    prefill = dict(attention_mask=seen.long(), position_ids=positions, use_cache=True, logits_to_keep=1)
    start = model(ids, **prefill, **features or {})
    cache = StaticCache(config=model.config, max_cache_len=longest + steps)
    for layer, filled in enumerate(start.cache.layers):
        cache.update(filled.keys.repeat_interleave(n, 0), filled.values.repeat_interleave(n, 0), layer)
    logits, pads = start.logits[:, -1].repeat_interleave(n, 0), pads.repeat_interleave(n)
    forward = torch.compile(model, mode="reduce-overhead") if compile else model
    tokens = torch.full((rows, steps), max(eos, 0), device=device)
    mask, logps = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros(rows, steps, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    for t in range(steps):
        token, logp = draw_tokens(logits, uniforms[:, t], temperature, top_p)
        mask[:, t], tokens[:, t], logps[:, t] = ~done, torch.where(done, tokens[:, t], token), logp * ~done
        done |= token == eos
        may_sync = t % 16 == 15 or device.type == "cpu"
        if stop and t % 16 == 15:
            done |= torch.tensor(stop(tokens[:, : t + 1].tolist()), device=device)
        if t + 1 == steps or (may_sync and done.all()):
            break
        visible = ((place >= pads[:, None]) & (place <= longest + t)).long()
        step = dict(attention_mask=visible, position_ids=(longest + t - pads)[:, None], cache=cache)
        logits = forward(tokens[:, t : t + 1], **step).logits[:, -1]
    return tokens[:, : t + 1], mask[:, : t + 1], logps[:, : t + 1]


def rescales_logits(config) -> str | None:
    """The setting by which a model changes logits after its head (Gemma-2, Granite, Cohere), None if none."""
    fields = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    text = config.get_text_config()
    return next((f for f in fields if getattr(text, f, None) not in (None, 1, 1.0)), None)


def head_logits(model, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
    """float32 logits (N, V) of hidden states (N, d); in bfloat16 they are off by 0.06 at magnitude 16."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:  # something hooks into it
        return head(hidden).float()
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(hidden.float(), head.weight.float() if weight is None else weight, bias)


def _gather_logprobs(model, hidden: Tensor, weight: Tensor | None, targets: Tensor, temperature: float):
    logp = (head_logits(model, hidden, weight) / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.detach().exp() * logp.detach()).sum(-1)


def token_logprobs(
    model, ids: Tensor, mask: Tensor | None = None, temperature: float = 1.0, chunk: int = 1024
):
    """fp32 log softmax(z / temperature) of the next tokens, and entropies: padded ids (B, T) -> (B, T - 1).

    The head runs over `chunk` positions at a time, again in the backward pass: (B, T, V) is never held.
    ValueError for a model that rescales its logits after the head.
    """
    if rescaled := rescales_logits(model.config):
        raise ValueError(f"{type(model).__name__} rescales its logits ({rescaled})")
    out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    hidden, targets = out.last_hidden_state[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    head = model.get_output_embeddings()
    weight = head.weight.float() if type(head) is nn.Linear else None  # cast once for all chunks
    score = functools.partial(checkpoint, _gather_logprobs, use_reentrant=False)
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    parts = [score(model, h, weight, y, temperature) for h, y in pieces]
    # FSDP warns of outputs that are views: hence clone
    logp, entropy = (torch.cat(x).view(len(ids), -1).clone() for x in zip(*parts, strict=True))
    return logp, entropy


def peak_flops(device: torch.device) -> float:
    """Dense bfloat16 FLOP/s of a known GPU (data sheets), else what a float32 matrix product reaches here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}
    if found := [flops for key, flops in known.items() if key in name]:
        return found[0]
    a = torch.randn(1024, 1024, device=device)
    (a @ a).sum().item()
    begin = time.perf_counter()
    for _ in range(5):
        b = a @ a
    b.sum().item()
    return 5 * 2 * 1024**3 / (time.perf_counter() - begin)


ARCHITECTURES = {  # model type, vocabulary, width, MLP width, layers, heads, key-value heads, tied embeddings
    "Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "Qwen2.5-32B": ("qwen2", 152064, 5120, 27648, 64, 40, 8, False),
    "Bespoke-Stratos-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "Llama-3-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, False),
    "Llama-3-70B": ("llama", 128256, 8192, 28672, 80, 64, 8, False),
    "Mistral-7B": ("mistral", 32768, 4096, 14336, 32, 32, 8, False),
    "SmolLM2-135M": ("llama", 49152, 576, 1536, 30, 9, 3, True),
}


def meta_model(name: str) -> nn.Module:
    """A model on the meta device: from the table above, else from the config of a local folder or hub id."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if found := [v for k, v in ARCHITECTURES.items() if k in name and not Path(name).exists()]:
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        keys += ("num_key_value_heads", "tie_word_embeddings")
        config = AutoConfig.for_model(found[0][0], **dict(zip(keys, found[0][1:], strict=True)))
    else:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError):
            known = ", ".join(ARCHITECTURES)
            raise UserError(f"{name}: not local, and --dry_run knows only {known}") from None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def collate(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask (B, T); masks come from lengths: pad ids may be real. [] makes a dummy."""
    lengths = torch.tensor([len(x) for x in sequences] or [2])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for x in sequences or [[0, 0]] for token in x])
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def learning_rate(step: int, total: int, peak: float, warmup: float, floor: float = 0.0) -> float:
    """Linear warm-up over a share of the steps, then a cosine from peak to floor * peak."""
    first = warmup * total
    if step < first:
        return peak * (step + 1) / first
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - first) / max(1, total - first))
    return peak * (floor + (1 - floor) * cosine)


def load_hub(name: str, split: str = "train", subset: str | None = None):
    """A `datasets` table from a hub id or a local folder; UserError says what to install or give instead."""
    try:
        import datasets
    except ImportError:
        raise UserError(f'{name}: pip install -e ".[lm]", or give a .jsonl') from None
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as e:  # the library raises a dozen kinds
        why = (str(e).splitlines() or [type(e).__name__])[0][:120]
        raise UserError(f"{name}: neither a folder nor on the hub ({why}); a .jsonl will do") from None


def extract_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...}, braces matched, or of a last \\boxed 6; None if there is none."""
    boxes = list(re.finditer(r"\\boxed(?:\s*(\{)|\s+(?=[-+]?\.?[\d\\]|[a-zA-Z]\$))", text))
    rest, depth = text[boxes[-1].end() :] if boxes else "", 0
    if boxes and not boxes[-1][1]:
        return re.match(r"(?:(?!\\[)\]])[^\s$])*", rest)[0].rstrip(".,;:") or None
    for i, c in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(c, 0)
        if depth < 0:
            return rest[:i]
    return None


def equal_answers(a: str | None, b: str | None) -> bool:
    """Whether two short answers agree: as numbers if both are, else as LaTeX without its decoration.

    Units after a number, a variable before a single "=", and the ways to write one fraction or root go.
    """

    def plain(x: str) -> str:
        x = re.sub(r"\\(left|right|displaystyle|[!,;:$ ]|q?quad)|[\s$~]", "", x).replace("{,}", ",")
        x = re.sub(r"(\d.*?)\\(?:text|mathrm|mbox)\{[a-zA-Z.]*\}(?:\^\{?\d\}?)?$", r"\1", x)  # a unit
        x = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", x)
        x = re.sub(r"\^\{?\\circ\}?|\\?%", "", x).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
        x = re.sub(r"^[a-zA-Z]\w?=(?=[^=]+$)", "", x)
        x = re.sub(r"\\(sqrt|frac)(\\[a-zA-Z]+|\w)", r"\\\1{\2}", x)  # \sqrt3, \frac12: arguments get braces
        x = re.sub(r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})(\\[a-zA-Z]+|\w)", r"\1{\2}", x)
        above, below = r"(-?(?:[^{}+,=/-]|\{[^{}]*\})+)", r"(\d*\.?\d+|[a-zA-Z]|\\[a-zA-Z]+|\\sqrt\{\w+\})"
        x = re.sub(rf"^(-?)\\frac\{{{above}\}}\{{{below}\}}$", r"\1\2/\3", x)  # no sums: a/b says the same
        if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", x):  # a number with thousands, not a list
            x = x.replace(",", "")
        x = x.rstrip(".")
        return x[1:-1] if re.fullmatch(r"\{[^{}]*\}", x) else x

    def number(x: str) -> Fraction | str:
        decimal, whole = (
            r"(-?)(\d{0,40}\.?\d{1,40})",
            re.fullmatch(r"(-?)(\d{0,9})\\frac\{(\d+)\}\{(\d+)\}", x[:60]),
        )
        if whole and int(whole[4]):  # a fraction, or a mixed number
            value = int(whole[2] or 0) + Fraction(int(whole[3]), int(whole[4]))
            return -value if whole[1] else value
        parts = [re.fullmatch(decimal, p) for p in x[:100].split("/")]
        if not all(parts) or len(parts) > 2 or (len(parts) == 2 and not Fraction(parts[1][0])):
            return x
        return Fraction(parts[0][0]) / Fraction(parts[1][0] if len(parts) == 2 else 1)

    return a is not None and b is not None and number(plain(a)) == number(plain(b))


# --- reinforcement learning ---


class DmControl(gymnasium.Env):
    """A dm_control environment as a gymnasium one: flat float32 observations, actions scaled to [-1, 1].

    A time limit truncates, a discount of 0 terminates. info["physics"] is the physics state (float64).
    """

    metadata: typing.ClassVar[dict] = {"render_modes": ["rgb_array"]}

    def __init__(self, env, camera: int = 0, size: int = 84):
        self.env, self.camera, self.size, self.render_mode = env, camera, size, "rgb_array"
        spec, shapes = env.action_spec(), env.observation_spec().values()
        self.low, self.span = spec.minimum, spec.maximum - spec.minimum
        width = sum(int(np.prod(s.shape)) for s in shapes)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, spec.shape, np.float32)

    def _read(self, step):
        obs = np.concatenate([np.ravel(x) for x in step.observation.values()]).astype(np.float32)
        return obs, {"physics": self.env.physics.get_state()}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:  # dm_control's tasks draw their starts from a generator of their own
            self.env.task._random = np.random.RandomState(seed)
        return self._read(self.env.reset())

    def control(self, action: np.ndarray) -> np.ndarray:
        """From [-1, 1] to the range of the actuators."""
        return self.low + (np.clip(np.asarray(action, float), -1, 1) + 1) / 2 * self.span

    def step(self, action):
        step = self.env.step(self.control(action))
        obs, info = self._read(step)
        terminated = step.last() and step.discount == 0
        return obs, float(step.reward), terminated, step.last() and not terminated, info

    def render(self):
        return self.env.physics.render(self.size, self.size, camera_id=self.camera)


def dm_control_env(domain: str, task: str, **more) -> DmControl:
    """The task of dm_control's suite as a gymnasium environment; UserError names the nearest one."""
    os.environ.setdefault("MUJOCO_GL", "egl" if not os.environ.get("DISPLAY") else "glfw")
    logging.getLogger("absl").setLevel(logging.ERROR)  # MuJoCo's deprecations in the suite's own files
    from dm_control import suite

    if (domain, task) not in suite.ALL_TASKS:
        names = [f"{d}_{t}" for d, t in suite.ALL_TASKS]
        near = difflib.get_close_matches(f"{domain}_{task}", names, 1, 0.0)[0]
        raise UserError(f"{domain}_{task}: no such task in dm_control; the nearest is {near}")
    return DmControl(suite.load(domain, task), **more)


def vector_env(makers: Sequence[Callable[[], gymnasium.Env]], processes: bool = False, autoreset=True):
    """Step environments together, here or in a process each. An ended one restarts in the step that ends it,
    unless `autoreset` is off: then all are reset together."""
    kind = gymnasium.vector.AsyncVectorEnv if processes else gymnasium.vector.SyncVectorEnv
    mode = gymnasium.vector.AutoresetMode
    return kind(list(makers), autoreset_mode=mode.SAME_STEP if autoreset else mode.DISABLED)


@torch.no_grad()
def evaluate_policy(envs, policy: Callable, seed: int, options: dict | None = None) -> np.ndarray:
    """Return of the first episode of each environment of a vector env: (n,), undiscounted.

    `policy` maps observations (n, d) to actions (n, m), both numpy; it keeps getting all n rows.
    """
    obs, _ = envs.reset(seed=seed, options=options)
    total, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    while running.any():
        obs, reward, terminated, truncated, _ = envs.step(policy(obs))
        total += reward * running
        running &= ~(terminated | truncated)
    return total


class Replay:
    """The last `capacity` transitions as one table per field on the training device.

    Fields are named by the first `add`; each is (rows, ...). `sample` draws rows with replacement.
    """

    def __init__(self, capacity: int, device: torch.device | str = "cpu"):
        self.capacity, self.device, self.size, self.next = capacity, torch.device(device), 0, 0
        self.fields: dict[str, Tensor] = {}

    def add(self, **rows: Tensor | np.ndarray) -> None:
        rows = {k: torch.as_tensor(v)[-self.capacity :].to(self.device) for k, v in rows.items()}
        n = len(next(iter(rows.values())))
        for k, v in rows.items():
            if k not in self.fields:
                self.fields[k] = torch.zeros(self.capacity, *v.shape[1:], dtype=v.dtype, device=self.device)
        place = (self.next + torch.arange(n, device=self.device)) % self.capacity
        for k, v in rows.items():
            self.fields[k][place] = v
        self.next, self.size = (self.next + n) % self.capacity, min(self.size + n, self.capacity)

    def sample(self, count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        where = generator.device if generator else self.device
        i = torch.randint(self.size, (count,), generator=generator, device=where).to(self.device)
        return {k: v[i] for k, v in self.fields.items()}

    def state_dict(self) -> dict:
        return {"size": self.size, "next": self.next, "fields": self.fields}

    def load_state_dict(self, state: dict) -> None:
        self.size, self.next = state["size"], state["next"]
        self.fields = {k: v.to(self.device) for k, v in state["fields"].items()}


class EnsembleLinear(nn.Module):
    """`members` linear layers as one batched product: (members, B, inputs) -> (members, B, outputs).

    x may have fewer members than the layer: each of them then serves as many consecutive layers. Weights
    (members, inputs, outputs) are zero until `orthogonal_` or the caller fills them.
    In float64 on one CPU thread a member gets the same bits alone and in company (widths that 8 divides).
    """

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(members, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def matrices(self) -> Tensor:
        """What multiplies x; layers that constrain their weights override this."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != len(self.weight):
            x = x.repeat_interleave(len(self.weight) // len(x), 0)
        if self.weight.shape[2] == 1 and x.dtype == torch.float64:
            # slower; batched matrix-vector products change their bits with the number of members
            return (x * self.matrices().mT).sum(-1, keepdim=True) + self.bias
        return torch.baddbmm(self.bias, x, self.matrices())

    @torch.no_grad()
    def orthogonal_(self, gain: float, generators: Sequence[torch.Generator]) -> None:
        """Orthogonal weights and zero biases; each generator serves as many consecutive members."""
        for i, w in enumerate(self.weight):
            generator = generators[i * len(generators) // len(self.weight)]
            fresh = torch.empty(w.shape[1], w.shape[0], dtype=w.dtype)
            w.copy_(nn.init.orthogonal_(fresh, gain, generator=generator).T)
        self.bias.zero_()


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source, for all parameters in one fused call; buffers stay."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
