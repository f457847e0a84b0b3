"""What the ten scripts share: command line, one `Run` per process, helpers for LMs and RL. No method is here.

Reading order: `Config` and `parse_config` (a dataclass becomes the command line), `Run` (ranks, seeds by
step, checkpoints, the grid of rows x seeds, claims), then helpers for language models (`load_lm`, `generate`,
`token_logprobs`, `answers_agree`, `benchmark`, `load_rows`) and for reinforcement learning (`DmControl`,
`evaluate_policy`, `Replay`, `EnsembleLinear`, `graphed`). tests/example.py is a whole script in this form.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import importlib
import inspect
import json
import logging
import math
import os
import random
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from ctypes.util import find_library
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import regex
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.run as torchrun
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process is meant


class UserError(Exception):
    """Something that the person at the keyboard can mend; `Run` makes it one line and exit code 2."""


# --- command line ---


@dataclass
class Config:
    """Settings that every script has; a script inherits them and adds its own, one commented line a field."""

    config: str = "demo"  # rung of the ladder that the other defaults come from
    seed: int = 0  # first seed; a seed redraws everything that chance decides
    seeds: int = 1  # seeds of each row of the table: seed, seed + 1, ...
    rows: tuple[str, ...] = ()  # rows of the table to make; all of them if none is named
    ranks: int = 1  # processes on this machine; torchrun sets it otherwise
    share: Literal["grid", "run"] = "grid"  # ranks make other cells of the table each, or each cell together
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto: bfloat16 on CUDA only
    compile: bool = False  # torch.compile or CUDA graphs for the hot step
    out: str = "out"  # folder that holds the run folders
    resume: bool = False  # go on from the run folder: finished cells are kept, unfinished ones go on
    log_every: int = 10  # steps between two lines of metrics.jsonl
    save_every: int = 100  # steps between two checkpoints: what a crash may cost
    dry_run: bool = False  # check what this config needs, print sizes and hours, compute nothing

    def check(self):
        """UserError for a setting that makes no sense; scripts add their own and call super().check().

        Numbers are finite and not negative; counts are 1 or more, unless their default is 0.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device here")
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            if type(default) not in (int, float):
                continue
            low = -math.inf if default < 0 else min(default, 1) if type(default) is int else 0
            if not math.isfinite(value) or value < low:
                raise UserError(f"--{field.name} {value}: must be finite and at least {low}")


def parse_config(configs: dict[str, Config], args: list[str] | None = None) -> Config:
    """A script's Config from the command line (tyro): `--config NAME` picks a rung, any field can be set.

    A bad flag, value or setting ends the process with exit code 2.
    """
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default="demo", choices=list(configs))
    name = first.parse_known_args(args)[0].config
    default = replace(configs[name], config=name)
    cfg = tyro.cli(type(default), default=default, args=args, use_underscores=True)
    try:
        cfg.check()
    except UserError as e:
        first.exit(2, f"{first.prog}: {e}\n")
    return cfg


# --- files ---


def write_atomic(path: Path, text: str):
    """Write beside and rename: a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def to_json(data) -> str:
    """JSON in which tensors and arrays of one number are numbers, and NaN and infinities null."""
    plain = json.loads(json.dumps(data, default=float), parse_constant=lambda _: None)
    return json.dumps(plain, ensure_ascii=False)


def stable_seed(*parts) -> int:
    """32 bits that are the same in every process, which hash() is not."""
    return zlib.crc32(repr(parts).encode())


# --- the run ---


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper: `metric` of row `ours` against row `theirs`, paired by seed.

    It holds if the 95 % t-interval of how much better ours is lies above `margin`; a negative margin says
    "not worse by more than that".
    """

    text: str
    metric: str
    ours: str
    theirs: str
    better: Literal["higher", "lower"] = "higher"
    margin: float = 0.0


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t-interval; NaN for a single value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), math.nan
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def judge(claim: Claim, table: dict) -> dict:
    """The claim's entry in results.json: difference, half-width of its interval (ci95), whether it holds."""
    ours = np.array([cell[claim.metric] for cell in table[claim.ours]], float)
    theirs = np.array([cell[claim.metric] for cell in table[claim.theirs]], float)
    diff, half = interval(ours - theirs)
    gain = -diff if claim.better == "lower" else diff
    found = dict(mean_ours=ours.mean(), mean_theirs=theirs.mean(), diff=diff, ci95=half, n=len(ours))
    return asdict(claim) | found | {"holds": bool(gain - half > claim.margin)}


class Run:
    """The process: rank, device, precision, and the run folder with metrics, checkpoints and results.

    `with Run(cfg) as run:` makes a UserError one line and exit code 2, and writes results.json at the end.
    `train` and `make` get a child of it, a cell, with folder, seeds and checkpoints of its own. `model` ends
    the folder's name.
    """

    def __init__(self, cfg: Config, model: str = ""):
        if cfg.ranks > 1 and "RANK" not in os.environ and not cfg.dry_run:
            launch(cfg.ranks)
        self.cfg, self.script = cfg, Path(inspect.getfile(type(cfg))).stem
        self.started, self.results, self.speed = time.time(), {}, {}
        name = f"{self.script}-{cfg.config}-s{cfg.seed}" + (model and f"-{Path(model).name}")
        self.root = self.folder = Path(cfg.out) / name
        gpu = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
        self.device, self.rank, self.world_size = torch.device("cpu"), 0, 1
        if gpu:
            local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
            self.device = torch.device("cuda", local)  # ranks that make other cells may share one
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ:  # Gloo for the CPU and for ranks that share a GPU, which NCCL refuses
            crowded = gpu and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count()
            dist.init_process_group("gloo" if crowded else None, timeout=datetime.timedelta(days=1))
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.amp = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and gpu)
        torch.set_float32_matmul_precision("high" if self.amp else "highest")  # TF32
        use_onednn()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is UserError:
            time.sleep(3 * bool(self.rank))  # rank 0 tells an error of all ranks: its end ends the others
            sys.stderr.write(f"{self.script}.py: {error}\n")
            sys.exit(2)
        if kind:
            return
        if self.results and self.rank == 0:
            device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
            seconds = time.time() - self.started
            head = dict(script=self.script, config=self.cfg.config, seed=self.cfg.seed)
            head |= dict(world_size=self.world_size, device=device, seconds=seconds)
            write_atomic(self.root / "results.json", to_json(head | self.results))
            self.print(f"\n{seconds:.0f} s, {self.world_size} ranks, {device}; see {self.root}")
        if dist.is_initialized():
            self.gather("finished")
            dist.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # the interpreter's own end aborts now and then: Gloo's threads still hold tensors

    # randomness and ranks

    def generator(self, name: str) -> torch.Generator:
        """A new CPU generator that depends on the seed and `name` only: alike for all rows, on all ranks."""
        return torch.Generator().manual_seed(stable_seed(self.cfg.seed, name))

    def _seed(self, *where):
        """Seed the global generators for a place in a cell, alike on all ranks and in all rows (pairs)."""
        seed = stable_seed(self.cfg.seed, *where)
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def mean(self, x: Tensor | float) -> Tensor:
        """Mean over the ranks of a tensor or number, in a new tensor on its device."""
        x = torch.as_tensor(x).detach().clone()
        if self.world_size > 1:
            dist.all_reduce(x)
        return x / self.world_size

    def gather(self, obj) -> list:
        """The `obj` of every rank, in rank order, on every rank; a barrier, too."""
        everyone = [obj] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, obj)
        return everyone

    def wrap(self, model: nn.Module) -> nn.Module:
        """Data parallelism: DDP where ranks share the run, the model itself elsewhere."""
        return nn.parallel.DistributedDataParallel(model) if self.world_size > 1 else model

    def shard(self, model: nn.Module) -> nn.Module:
        """A model on the device; FSDP2 by decoder layer where ranks share the run.

        Forward passes run in bfloat16 if the run's precision is that, gradients are averaged in float32.
        Everything gathered is freed after each pass, the root too: a pass without gradient must not keep it.
        """
        if self.world_size == 1:
            return model.to(self.device)
        half = torch.bfloat16 if self.amp else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
        for part in (*layers, model):
            fully_shard(part, mp_policy=policy, reshard_after_forward=True)
        return model

    def autocast(self):
        """bfloat16 autocast where the run's precision asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    # the grid: rows of the table x seeds

    def grid(self, rows: dict[str, dict], train: Callable) -> dict[str, list[dict]]:
        """{row: [what train(cfg, run) returned for each seed]}; `rows` maps a row to the settings it changes.

        A finished cell leaves result.json and is not made again. Ranks on several nodes need a shared disk.
        """
        chosen = self.cfg.rows or tuple(rows)
        if unknown := sorted(set(chosen) - set(rows)):
            raise UserError(f"--rows: {unknown[0]!r} is none of {', '.join(map(repr, rows))}")
        seeds = range(self.cfg.seed, self.cfg.seed + self.cfg.seeds)
        cells = {row: [replace(self.cfg, **rows[row], seed=s) for s in seeds] for row in chosen}
        for column in cells.values():
            column[0].check()
        self._open()
        for wait in (False, True):  # cells that nobody has begun, then those that others had
            made = {row: [self._make(row, cfg, train, wait) for cfg in cells[row]] for row in chosen}
        table = {row: [cell["metrics"] for cell in column] for row, column in made.items()}
        speed = {row: [cell["speed"] for cell in column] for row, column in made.items()}
        self.results = {"table": table, "speed": speed, "claims": []}
        shown = []
        for row, column in table.items():
            means = {k: "{:.3f} +- {:.3f}".format(*interval([cell[k] for cell in column])) for k in column[0]}
            shown.append({"": row} | means)
        self.print(f"\nmean +- half of the 95 % t-interval over {len(seeds)} seeds")
        self.print(tabulate(shown, "keys"))
        return table

    def _open(self):
        """Make the run folder, or go on in it; UserError where that would mix or overwrite runs."""
        own = {k: v for k, v in asdict(self.cfg).items() if k == "save_every" or k not in vars(Config)}
        file, now = self.root / "config.json", json.loads(to_json(own))
        if {"result.json", ".metadata"} & {path.name for path in self.root.rglob("*")}:  # cells, checkpoints
            if not self.cfg.resume:
                raise UserError(f"{self.root} exists: --resume goes on with it, or move it away")
            before = json.loads(file.read_text())
            if changed := [k for k in now if before.get(k) != now[k]]:
                raise UserError(f"--resume: {file} has other values of {', '.join(changed)}")
        self.gather("looked")
        if self.rank == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            write_atomic(file, to_json(now))

    def _make(self, name: str, cfg: Config, work: Callable, wait=True):
        """Let work(cfg, run) make a cell once, one rank under its lock or all ranks together; its result."""
        child = copy.copy(self)
        child.cfg, child.speed = cfg, {}
        child.folder = self.root / slug(f"{name}-s{cfg.seed}")
        if cfg.share == "grid":
            child.rank, child.world_size = 0, 1
        result, begin = child.folder / "result.json", time.time()
        lock = FileLock(child.folder / f"lock{child.rank}", timeout=-1 if wait else 0)  # flock: dies with us
        with contextlib.suppress(Timeout), lock:
            if not child.gather(result.exists())[0]:
                child._seed("start")
                made = {"metrics": work(cfg, child), "speed": child.speed}
                if child.rank == 0:
                    write_atomic(result, to_json(made))
                child.print(f"{child.folder.name}: {time.time() - begin:.0f} s")
        return json.loads(result.read_text()) if child.gather(result.exists())[0] else None

    def once(self, name: str, make: Callable) -> Path:
        """The folder that make(child) fills, once a seed: who comes first makes it, others wait.

        `name` tells apart what depends on a row's settings: a row must not get another row's.
        """
        self._make(name, self.cfg, lambda cfg, child: bool(make(child)))
        self._seed("after", name)  # whether it was made just now or long ago
        return self.root / slug(f"{name}-s{self.cfg.seed}")

    def check(self, claims: Sequence[Claim], table: dict):
        """Judge the claims whose rows and metric are there, print them and keep them for results.json."""
        pairs = [c for c in claims if c.ours in table and c.theirs in table and c.metric in table[c.ours][0]]
        judged = self.results["claims"] = [judge(claim, table) for claim in pairs]
        keys = ("text", "mean_ours", "mean_theirs", "diff", "ci95", "holds")
        self.print("\n" + tabulate([[row[k] for k in keys] for row in judged], keys, floatfmt=".3g"))

    def figure(self, draw: Callable, *args, size=(9, 4)):
        """Save `draw(figure, *args)` as <script>.png in the run folder."""
        if self.rank == 0:
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, *args)
            figure.savefig(self.root / f"{self.script}.png", dpi=110)

    # one cell: steps, checkpoints, numbers

    def steps(self, total: int, stage: str = "", /, **state) -> Iterator[int]:
        """Yield the steps still to do; a cell with several loops names them by `stage`.

        Restores `state` (modules, optimizers, whatever has a state_dict, dicts of plain data) from the newest
        whole checkpoint, seeds each step anew, and saves every cfg.save_every steps and at the end.
        """
        self._stage, self._last = self.folder / stage, total - 1
        self._stage.mkdir(parents=True, exist_ok=True)
        self._metrics = self._stage / "metrics.jsonl"
        self._metrics.touch()
        first, begin = self._restore(state), time.time()
        bar = dict(desc=f"{self.folder.name} {stage}", leave=False, disable=self.rank > 0)
        self._bar = tqdm(range(first, total), **bar)
        try:
            for step in self._bar:
                self._seed(stage, step)
                yield step
                if (step + 1) % self.cfg.save_every == 0 or step == self._last:
                    self._save(step + 1, state)
            self.speed[f"{stage} steps_per_s".strip()] = (total - first) / (time.time() - begin)
        finally:
            self._seed(stage, "end")  # what follows does not depend on where the loop began

    def _save(self, step, state):
        """A folder step<N> by torch.distributed.checkpoint, whole once its .metadata stands; two are kept."""
        logged = {"bytes": self.gather(self._metrics.stat().st_size)[0]}  # rank 0 has written its line
        place = self._stage / f"step{step:08d}"
        dcp.save(state | {"logged": logged}, checkpoint_id=place, no_dist=self.world_size == 1)
        if self.rank == 0:
            for old in sorted(self._stage.glob("step*"))[:-2]:
                shutil.rmtree(old)

    def _restore(self, state):
        """Load the newest whole checkpoint into `state`, drop the lines logged after it, return its step."""
        step, logged, found = 0, {"bytes": 0}, sorted(self._stage.glob("step*/.metadata"))
        for optimizer in state.values():
            if found and isinstance(optimizer, torch.optim.Optimizer):
                _init_optim_state(optimizer)  # moments to load into; some may never have been saved
                for moments in optimizer.state.values():
                    moments.get("step", torch.zeros(())).zero_()
        while found and not step:
            place = found.pop().parent
            try:
                planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
                more = dict(planner=planner, no_dist=self.world_size == 1)
                dcp.load(state | {"logged": logged}, checkpoint_id=place, **more)
                step = int(place.name[4:])
            except (Exception, dcp.CheckpointException) as e:  # a torn file raises what its reader likes
                self.print(f"{place} is torn ({str(e)[:80]!r}); trying the one before")
                if not found:
                    raise UserError(f"no checkpoint in {self._stage} is whole; move it away") from None
        if self.rank == 0:
            os.truncate(self._metrics, logged["bytes"])
        return step

    def log(self, step: int, **numbers: Tensor | float):
        """Every cfg.log_every steps a line of metrics.jsonl, the means over the ranks, with one GPU sync.

        A loss or reward (by its name) that is not finite stops all ranks.
        """
        if step % self.cfg.log_every and step != self._last:
            return
        values = [torch.as_tensor(x, dtype=torch.float32, device=self.device) for x in numbers.values()]
        line = dict(zip(numbers, self.mean(torch.stack(values)).tolist(), strict=True))
        for name, value in line.items():
            if not math.isfinite(value) and ("loss" in name or "reward" in name):
                raise UserError(f"{self.folder.name}, step {step}: {name} is {value}; see {self._stage}")
        if self.rank == 0:
            with open(self._metrics, "a") as file:
                file.write(to_json({"step": step} | line) + "\n")
        self._bar.set_postfix(line)

    def print(self, text: str):
        """Print on rank 0, above the progress bar."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()


def launch(ranks: int):
    """Run this very command in `ranks` processes under torchrun's agent, and end as they end."""
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the ranks speak themselves
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default
    try:
        torchrun.run(torchrun.parse_args(["--standalone", f"--nproc_per_node={ranks}", *sys.argv]))
    except ChildFailedError as e:
        sys.exit(e.get_first_failure()[1].exitcode)
    sys.exit()


def use_onednn():
    """oneDNN's float32 matrix products where they are as exact as MKL's: up to twice as fast on AMD CPUs.

    The setting is called bf16: on CPUs with such units it would round, so one product is compared.
    """
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "bf16"
    a = torch.arange(65536.0).sin().view(256, 256)
    if (a @ a - a.double() @ a.double()).abs().max() > 1e-4:  # of products around 8
        matmul.fp32_precision = "none"


def slug(name: str) -> str:
    """A folder's name for a row of the table."""
    return re.sub(r"[^\w.+=-]+", "_", name)


# --- language models ---


def tiny_lm(vocab: int, width: int, layers: int, heads: int = 4, context: int = 512, **more):
    """A transformers LlamaForCausalLM from scratch: what hooks into it hooks into the real ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = dict(vocab_size=vocab, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers)
    size |= dict(num_attention_heads=heads, max_position_embeddings=context)
    size |= dict(bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(**size | more))


def CharTokenizer(alphabet: str, eos: str):
    """One character, one token, as a fast Hugging Face tokenizer; `eos` is the character that ends a turn.

    Encoding a character outside `alphabet` raises.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def load_lm(name: str, dtype: torch.dtype = torch.float32):
    """Load (model, tokenizer) from a folder, a .gguf file or a hub id; UserError says what is missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, utils

    utils.logging.disable_progress_bar()
    path, source, where = Path(name), name, {}
    if path.suffix == ".gguf":
        source, where = path.parent, {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **where)
    except (ImportError, OSError, ValueError) as e:
        why = str(e).strip().splitlines()[0]
        raise UserError(f"{name} is no local model, not on the hub, or needs .[lm] ({why})") from None
    if where:  # its weights are whole numbers now, and it may be saved as any other model
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    return model.eval(), tokenizer


def end_ids(model, tokenizer) -> list[int]:
    """All ids that end an answer: the tokenizer's, generation_config's, the chat template's end of turn."""
    ends = {tokenizer.eos_token_id, *np.ravel(model.generation_config.eos_token_id)} - {None}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("A")[2]
        ends |= {*tokenizer.encode(rest, add_special_tokens=False)[:1]} & {*tokenizer.all_special_ids}
    return sorted(map(int, ends))


def collate(sequences: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask (B, T); masks come from lengths, since a pad id may be real."""
    rows = [torch.tensor(x, dtype=torch.long) for x in sequences]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(device)
    return ids.clamp(min=0), ids >= 0


@torch.no_grad()
def generate(model, prompts: list[list[int]], uniforms: Tensor, ends: list[int], temperature=1.0):
    """Sample completions with transformers' own loop; the model's generation_config is not read.

    prompts: B lists of ids. uniforms: (B, T) numbers in [0, 1): each picks a token from the CDF of
    softmax(z / temperature), T tokens at most; temperature 0 is greedy. Returns B lists of ids, up to and
    including the first of `ends`.
    """
    from transformers import GenerationConfig

    ids, mask = (x.flip(1) for x in collate([p[::-1] for p in prompts], model.device))  # left-padded
    length, uniforms = ids.shape[1], uniforms.to(model.device).double()

    def draw(ids, logits):  # leaves one token to choose from
        cdf = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
        picked = uniforms[:, ids.shape[1] - length, None] * cdf[:, -1:]
        token = torch.searchsorted(cdf, picked, right=True)
        return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)

    def cut(row):
        return row[: min((row.index(end) for end in ends if end in row), default=len(row)) + 1]

    config = GenerationConfig(max_new_tokens=uniforms.shape[1], eos_token_id=ends, pad_token_id=0)
    kept, model.generation_config = model.generation_config, config
    processors = [draw] if temperature else []
    tokens = model.generate(ids, attention_mask=mask.long(), logits_processor=processors)[:, length:]
    model.generation_config = kept
    return [cut(row) for row in tokens.tolist()]


def token_logprobs(
    model, ids: Tensor, mask: Tensor | None = None, temperature=1.0, chunk: int = 1024
) -> Tensor:
    """fp32 log softmax(z / temperature) of the next tokens: padded ids (B, T) -> (B, T - 1).

    The head runs in float32 (bfloat16 logits are off by 0.06 at magnitude 16) over `chunk` positions at a
    time, again in the backward pass: (B, T, V) is never held. UserError for a model that rescales its logits
    after the head (Gemma-2, Granite, Cohere).
    """
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(model.config.get_text_config(), name, None) not in (None, 1):
            raise UserError(f"{type(model).__name__} rescales its logits ({name})")
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()

    def logprobs(hidden, targets):
        weights = {name: p.float() for name, p in head.named_parameters()}
        with torch.autocast(hidden.device.type, enabled=False):
            logits = torch.func.functional_call(head, weights, hidden.float()) / temperature
        return logits.log_softmax(-1).gather(1, targets[:, None])

    pieces = zip(hidden[:, :-1].flatten(0, 1).split(chunk), ids[:, 1:].flatten().split(chunk), strict=True)
    parts = [checkpoint(logprobs, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat(parts).view(len(ids), -1).clone()  # FSDP warns of outputs that are views


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...} or \\fbox{...}, braces matched; None if missing or not closed."""
    last = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    found = regex.match(r"\\(?:boxed|fbox)\s*(\{((?:\\.|[^{}\\]|(?1))*)\})", text[max(last, 0) :], regex.S)
    return found[2] if found else None


def answers_agree(target: str, answer: str) -> bool:
    """Whether two answers agree by math-verify: the last box of each text, or all of a text without one."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    target, answer = (last_box(x) if "box" in x else x.strip().rstrip(".") for x in (target, answer))
    if target is None or answer is None:
        return False
    letter = re.match(r"\(?([A-Z])(?:\)|[.:])(?:\s|$)", answer)
    if letter and re.fullmatch(r"[A-Z]", target):
        answer = letter[1]  # "C: text"
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return verify(*(parse(rf"\boxed{{{x}}}", configs) for x in (target, answer)))


def benchmark(model, tokenizer, tasks: Sequence[str], run: Run, folder: str | None = None, **more) -> dict:
    """lm-eval's {task: {metric: value}} for a model in memory or an lm-eval model; {} beyond rank 0.

    Documents are dealt to the ranks. `folder` has local YAML tasks, `more` goes to simple_evaluate (limit,
    gen_kwargs, system_instruction, ...). The tokenizer's chat template is used where there is one.
    """
    lm_eval = need("lm_eval", "lm")
    from accelerate import Accelerator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8) if isinstance(model, nn.Module) else model
    if run.world_size > 1:
        lm._rank, lm._world_size, lm.accelerator = run.rank, run.world_size, Accelerator()
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    more |= dict(apply_chat_template=bool(tokenizer.chat_template), bootstrap_iters=0, log_samples=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=list(tasks), task_manager=manager, **more)
    return found["results"] if found else {}


def need(package: str, extra: str):
    """Import a package of an extra; UserError has the pip command if it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f'{package} is needed: pip install -e ".[{extra}]"') from None


def load_rows(
    source: str, needed: Sequence[str] = (), split="train", subset: str | None = None, **gym
) -> list:
    """Rows (dicts) of a .jsonl, .csv or .parquet, a folder or hub id (datasets), or gym:NAME (reasoning-gym).

    UserError names file, row and field where a `needed` field is missing, empty or no text. A gym task takes
    size=, seed= and its own settings; its rows have question, answer and score(answer) in [0, 1].
    """
    kind = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(source).suffix)
    try:
        if source.startswith("gym:"):
            data = need("reasoning_gym", "lm").create_dataset(source[4:], **gym)
            rows = [row | {"score": functools.partial(data.score_answer, entry=row)} for row in data]
        else:
            place = (kind, None, None, source) if kind else (source, subset)
            rows = need("datasets", "lm").load_dataset(*place, split=split).to_list()
    except Exception as e:  # the libraries raise a dozen kinds
        why = str(e.__cause__ or e).split("\n")[0]
        raise UserError(f"{source}: no file, folder, hub id or gym task that can be read ({why})") from None
    if not rows:
        raise UserError(f"{source}: no rows")
    need_text(source, rows, needed)
    return rows


def need_text(source: str, rows: list[dict], needed: Sequence[str]):
    """UserError names file, row and field where a `needed` field is missing, empty or no text."""
    for number, row in enumerate(rows, 1):
        for field in needed:
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise UserError(f"{source}, row {number}: field {field!r} is missing, empty or no text")


# --- reinforcement learning ---


class DmControl(gymnasium.Env):
    """dm_control's task as a gymnasium environment: flat float32 observations, actions scaled to [-1, 1].

    Observations keep the suite's order. A time limit truncates, a discount of 0 terminates. info["physics"]
    is the physics state (float64). Pictures need OpenGL: EGL where there is one, else MUJOCO_GL is yours to
    set. UserError for a task that the suite does not have.
    """

    def __init__(self, domain: str, task: str):
        os.environ.setdefault("MUJOCO_GL", "egl" if find_library("EGL") else "disable")
        logging.getLogger("absl").setLevel(logging.ERROR)  # MuJoCo's deprecations in the suite's own files
        from dm_control import suite

        if (domain, task) not in suite.ALL_TASKS:
            raise UserError(f"{domain}_{task}: dm_control's suite has no such task")
        self.env = suite.load(domain, task)
        spec, (obs, _) = self.env.action_spec(), self.reset()
        self.low, self.span = spec.minimum, spec.maximum - spec.minimum
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, obs.shape, np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, spec.shape, np.float32)

    def _read(self, step):
        obs = np.concatenate([np.ravel(x) for x in step.observation.values()]).astype(np.float32)
        return obs, {"physics": self.env.physics.get_state()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:  # dm_control's tasks draw their starts from a generator of their own
            self.env.task._random = np.random.RandomState(seed)
        return self._read(self.env.reset())

    def step(self, action):
        step = self.env.step(self.low + (np.clip(action, -1, 1) + 1) / 2 * self.span)
        terminated = step.last() and step.discount == 0
        obs, info = self._read(step)
        return obs, float(step.reward), terminated, step.last() and not terminated, info


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


class Replay(nn.Module):
    """The last `capacity` transitions, a buffer (capacity, ...) per field; made from an example of one row.

    A module, so that `.to(device)` and checkpoints need nothing more.
    """

    def __init__(self, capacity: int, **row: Tensor):
        super().__init__()
        self.capacity = capacity
        self.register_buffer("added", torch.zeros((), dtype=torch.long))
        for name, value in row.items():
            self.register_buffer(name, value.new_zeros(capacity, *value.shape))

    def add(self, **rows: Tensor | np.ndarray):
        """Append n <= capacity rows, (n, ...) each; the oldest go."""
        for name, values in rows.items():
            place = self.added + torch.arange(len(values), device=self.added.device)
            self.get_buffer(name)[place % self.capacity] = torch.as_tensor(values, device=place.device)
        self.added += len(values)

    def sample(self, count: int) -> dict[str, Tensor]:
        """`count` rows drawn with replacement, without a sync: {field: (count, ...)}."""
        share = torch.rand(count, dtype=torch.float64, device=self.added.device)
        rows = (share * self.added.clamp(max=self.capacity)).long()
        return {name: b[rows] for name, b in self.named_buffers() if name != "added"}


def read_exorl(file: Path) -> Iterator[tuple]:
    """The episode of an ExORL .npz, in which row t of action, reward and discount belongs to t - 1 -> t."""
    with np.load(file) as f:
        yield f["observation"], f["action"][1:], f["reward"][1:], f["discount"][1:] == 0, f.get("physics")


def read_d4rl(file: str) -> Iterator[tuple]:
    """Episodes of a D4RL .hdf5; a step before a timeout goes if the file does not say what follows."""
    with need("h5py", "data").File(file) as f:
        keys = ("observations", "actions", "rewards", "terminals", "timeouts")
        obs, action, reward, terminal, timeout = (f[k][()] for k in keys)
        following = f["next_observations"][()] if "next_observations" in f else None
    for part in np.split(np.arange(len(obs)), np.flatnonzero((terminal != 0) | (timeout != 0)) + 1):
        rows, last = part, part[-1:]
        if following is None and not terminal[last].any():
            rows = part[:-1]
        if len(rows):
            end = (obs if following is None else following)[last]  # nobody looks beyond a terminal
            yield np.concatenate([obs[rows], end]), action[rows], reward[rows], terminal[rows], None


def read_minari(name: str) -> Iterator[tuple]:
    """Episodes of a Minari data set, actions scaled from their range to [-1, 1]."""
    data = need("minari", "data").load_dataset(name.removeprefix("minari:"), download=True)
    low, high = data.action_space.low, data.action_space.high
    for e in data.iterate_episodes():
        action = 2 * (e.actions - low) / (high - low) - 1
        yield flatten(e.observations), action, e.rewards, e.terminations, None


def flatten(x: dict | np.ndarray) -> np.ndarray:
    """Nested dictionaries of (T, ...) side by side, (T, d), sorted as gymnasium's FlattenObservation does."""
    parts = [flatten(x[k]) for k in sorted(x)] if isinstance(x, dict) else [x.reshape(len(x), -1)]
    return np.concatenate(parts, 1)


def load_episodes(source: str) -> dict[str, Tensor]:
    """Offline RL data as flat tensors: a folder of ExORL's .npz files, a D4RL .hdf5, or minari:ID.

    The n steps of all episodes in order, float32: observation (n, d), action (n, m), reward (n, 1),
    next_observation (n, d), terminated (n, 1); episode (n,), from 0; physics after the step (n, p), float64,
    where files have it. UserError names file and episode.
    """
    path, tables, physics = Path(source).expanduser(), [], []
    files, read = [str(path)], read_minari if source.startswith("minari:") else read_d4rl
    if path.is_dir():
        files, read = sorted(path.rglob("*.npz")), read_exorl
    for file in files:
        begin = len(tables)
        try:
            for obs, action, reward, terminated, states in read(file):
                columns = (
                    obs[:-1],
                    action,
                    np.reshape(reward, (-1, 1)),
                    obs[1:],
                    np.reshape(terminated, (-1, 1)),
                )
                table = np.concatenate(columns, 1).astype(np.float32)  # ValueError where lengths differ
                if not len(table) or not np.isfinite(table).all():
                    raise ValueError("no step, or a number that is not finite")
                if table.shape[1] != (tables or [table])[0].shape[1]:
                    raise ValueError(
                        f"widths {[x.shape[1] for x in columns]} are not those of the first episode"
                    )
                tables.append(table)
                physics += [] if states is None else [states[1:]]
        except Exception as e:  # files from outside raise a dozen kinds
            raise UserError(f"{file}, episode {len(tables) - begin}: {e}") from None
    if not tables:
        raise UserError(f"{source}: no episodes")
    names = ("observation", "action", "reward", "next_observation", "terminated")
    widths = [x.shape[1] for x in columns]
    data = dict(zip(names, torch.from_numpy(np.concatenate(tables)).split(widths, 1), strict=True))
    data["episode"] = torch.arange(len(tables)).repeat_interleave(torch.tensor([*map(len, tables)]))
    if sum(map(len, physics)) not in (0, len(data["episode"])):
        raise UserError(f"{source}: some episodes have no physics, or not a state for each step")
    if physics:
        data["physics"] = torch.from_numpy(np.concatenate(physics))
    steps = (data["next_observation"] - data["observation"]).norm(dim=1)
    if read is read_d4rl and steps.max() > 25 * steps.median():
        sys.stderr.write(f"{source}: one step is 25 times the median step: are timeouts late?\n")
    return data


class EnsembleLinear(nn.Module):
    """`members` linear layers as one batched product: (members, B, inputs) -> (members, B, outputs).

    Weights (members, inputs, outputs) are orthogonal with `gain`, biases zero.
    """

    def __init__(self, members: int, inputs: int, outputs: int, gain: float = 1.0):
        super().__init__()
        weight = torch.empty(members, outputs, inputs)
        for member in weight:
            nn.init.orthogonal_(member, gain)
        self.weight = nn.Parameter(weight.mT.contiguous())
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


def soft_update(target: nn.Module, source: nn.Module, tau: float):
    """target <- (1 - tau) target + tau source for all parameters, sharded or not; buffers stay."""
    get_ema_multi_avg_fn(1 - tau)(list(target.parameters()), list(source.parameters()), None)


def graphed(update: Callable, warmup: int = 3) -> Callable:
    """`update(*tensors)`, replayed as one CUDA graph after `warmup` calls; on a CPU the function itself.

    Shapes must stay, optimizers be capturable, nothing inside may sync; what it returns is overwritten by the
    next call.
    """
    calls, graph, fixed, result = 0, None, [], None

    def call(*tensors: Tensor):
        nonlocal calls, graph, fixed, result
        calls += 1
        if calls <= warmup or not tensors[0].is_cuda:
            return update(*tensors)
        if graph is None:
            fixed, graph = [t.clone() for t in tensors], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = update(*fixed)
        torch._foreach_copy_(fixed, tensors)
        graph.replay()
        return result

    return call
