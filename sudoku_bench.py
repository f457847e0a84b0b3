"""Sudoku-Bench: sudoku variants whose rules must be read, played through the benchmark's protocols.

Seely, Imajuku, Zhao, Cetin, Jones, "Sudoku-Bench: Evaluating creative reasoning with Sudoku variants",
arXiv 2505.16135.

The claim. Variants whose rules are new, or combine known ones in a new way, need a break-in: a deduction that
comes before the first digit and that templates and guesses do not give. The best language model of May 2025
solved fewer than 15 % of 100 such puzzles, hardly any 9x9, and feedback after each placement helped little.

Part A plays puzzles. single_shot: one reply with the grid. multi_step: the board is shown, a reply places one
digit or more, and so on until a wrong one. single_step: one placement a reply. ASR is the share of puzzles
solved, ACP the mean number of right placements of the stepwise modes, E the empty cells of a puzzle.
  eq. (1)  random play on D digits: E[ACP] = sum_{t=1..E} |D|^-t = (1 - |D|^-E) / (|D| - 1)
Part B trains a small network on generated 4x4 variants and tests it on rules it has never seen.
  eq. (2)  a_ij = softmax_j(q_i k_j / sqrt(d_h) + b(e_ij)),  o_i = sum_j a_ij (v_j * g(e_ij)); e_ij is the
           table of digit pairs that all rules between cells i and j allow: rules enter by their meaning

How to run
  python sudoku_bench.py                                 both parts, on two CPU cores
  python sudoku_bench.py --no_study --backend hf:FOLDER --trials 1
                                                         a language model plays (hub id, folder, .gguf)
  python sudoku_bench.py --no_study --backend http:URL#MODEL --trials 1
                                                         an OpenAI-compatible endpoint; key in OPENAI_API_KEY;
                                                         two of them, with a comma between, are compared
  torchrun --nproc_per_node=8 sudoku_bench.py --config full --data challenge_100.jsonl
                                                         the paper's puzzles; a model's copy on each rank
  --generate 4x4:100, --show ID, --solve ID|LINK, --link LINK, --selftest
Ranks share puzzles (i % world), the shards of generated data, and the batches of one net (--seeds 1) or the
seeds. Every episode is a line of episodes.jsonl; --resume plays what is missing. report.html shows them.

Where this file departs from the paper and its code
- The official sets were withdrawn. mini_48 is ours: generated, proved unique, every family load-bearing; it
  measures rule reading and deduction, not break-ins. --data plays the official files where you have them.
- Prompts are in our words (--prompts FILE: the originals). --history 0 sends nothing of the past; the code's
  slice sends all. Descriptions of drawings lack the code's lone dash and "None", and keep unstyled cages.
- --extract robust, the default, cuts thoughts, reads the last answer block in every mode, accepts r1c1 = 5
  and grids in lines, ignores repeated right digits, and refuses two digits for a cell; ref reads as the code
  does, bit for bit. solved_ref is the code's verdict on the same replies while the boards are the same.
- Where the parsed constraints prove one solution, they decide what solves a puzzle, not the stored string.
- Wilson intervals, the random and the rule-ignoring player, McNemar's test and the neural solver are ours.
  Failures are sorted into the paper's classes by keywords; --judge URL#MODEL asks an endpoint.
- Grids up to 9x9 with digits 0 to 9. A negative rule (neg) spares an edge with any of the marks it names.
- The net sees pairwise rules, killer cages and little killers; other n-ary clues are invisible to it.
- Not here: the human traces, pictures of boards for vision models, an environment with pencil marks.

Reading order: Puzzle, Rule and RULES, Solver, generate, the protocols (Episode), run_eval, EdgeNet, study.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import html
import http.client
import itertools
import json
import math
import operator
import os
import random
import re
import string
import sys
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import before as common
from before import Run, UserError

MODES = ("multi_step", "single_step", "single_shot")
BACKENDS = ("solver", "random", "vanilla", "neural", "scripted", "hf", "http")


@dataclass
class Config(common.Config):
    # what is played
    data: str = ""  # .jsonl, folder of .json, .parquet or hub id[:config]; empty: the built-in mini_48
    sizes: tuple[int, ...] = ()  # only grids of these sizes; empty: all
    limit: int = 0  # puzzles, at most; 0: all
    backend: tuple[str, ...] = ()  # solver, random, vanilla, neural, scripted:FILE, hf:NAME, http:URL#MODEL
    model: str = ""  # of http endpoints without #MODEL
    mode: tuple[str, ...] = ("multi_step", "single_shot")  # protocols; single_step, too
    history: int = 5  # turns of the past that a model sees (N); -1: all
    empty: int = 0  # cells left empty (k), the rest are hints; 0: the puzzle as it is
    trials: int = 1  # episodes of each puzzle; the solver plays one
    extract: Literal["robust", "ref"] = "robust"  # how replies are read; ref: as the paper's code does
    prompts: str = ""  # JSON file of templates to use instead of ours
    # language models
    temperature: float = -1.0  # below 0: the endpoint's own, greedy for hf
    top_p: float = -1.0  # below 0: the endpoint's own
    max_tokens: int = 2048  # of a reply
    token_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # name of that limit for http
    concurrency: int = 8  # requests in flight
    timeout: float = 600.0  # seconds for one request
    retries: int = 5  # of a request that failed for a passing reason
    batch: int = 16  # episodes that an hf model answers together, halved when memory runs out
    judge: str = ""  # URL#MODEL that sorts models' failures into the paper's classes; empty: by keywords
    # one thing at a time
    link: str = ""  # import a SudokuPad or f-puzzles link, or a file of them, and show it
    fetch: bool = False  # resolve short ids of links over the network
    infer: bool = False  # read dots, X and V, anti-knight and anti-king from drawings and rules of a link
    generate: str = ""  # SIZE:COUNT, e.g. 4x4:100, written as JSON lines
    families: tuple[str, ...] = ()  # families to generate with; empty: drawn anew for each puzzle
    solve: str = ""  # solve an id, link or file, with proof
    show: str = ""  # draw an id, link or file
    svg: str = ""  # file that --show draws into
    selftest: bool = False  # prove mini_48 again and time solver and generator
    # part B, the neural solver
    study: bool = True  # train it and test on seen, recombined and novel rules
    train_puzzles: int = 12000  # generated; 4 : 2 : 1 of 4x4, 6x6, 9x9
    train_sizes: tuple[int, ...] = (4,)  # their grid sizes
    test_puzzles: int = 200  # of each split
    hidden: int = 64  # width (d)
    heads: int = 4  # attention heads
    iterations: int = 6  # of the shared block in training (T); validation picks T, 2 T or 3 T for the tests
    gate_rank: int = 0  # basis gates (K); 0: a gate for each pair of cells
    steps: int = 700  # updates, at most
    seconds: float = 0.0  # of training, at most, by the clock, so that no two runs are alike; 0: no limit
    batch_size: int = 64  # puzzles an update, over all ranks
    lr: float = 2e-3  # of AdamW, warm-up and cosine to 5 %
    weight_decay: float = 0.05  # of AdamW
    seeds: int = 2  # training seeds
    gate: bool = True  # value gates; off: an ablation
    relabel: bool = False  # permute digits of each training puzzle without sums, drawn once a puzzle

    may_change: ClassVar[set[str]] = {"batch", "concurrency", "timeout", "retries", "limit"}

    def __post_init__(self):
        super().__post_init__()
        if bad := set(self.mode) - set(MODES):
            raise ValueError(f"--mode: {', '.join(sorted(bad))} is none of {', '.join(MODES)}")
        if bad := [b for b in self.backend if b.split(":")[0] not in BACKENDS]:
            raise ValueError(f"--backend: {bad[0]} is none of {', '.join(BACKENDS)}")
        if any(re.search(r"//[^/#]*@", x) for x in (*self.backend, self.judge)):
            raise ValueError("--backend and --judge take no user or password; a key is in OPENAI_API_KEY")
        if bad := next(filter(None, map(bad_family, self.families)), ""):
            raise ValueError(f"--families: {bad}")
        if self.generate and not re.fullmatch(r"([469])x\1:[1-9]\d{0,6}", self.generate):
            raise ValueError("--generate takes 4x4:COUNT, 6x6:COUNT or 9x9:COUNT")
        if self.history < -1 or min(self.empty, self.limit) < 0 or min(self.trials, self.batch) < 1:
            raise ValueError(
                "--history is -1 or more, --empty and --limit 0 or more, --trials, --batch 1 or more"
            )
        least = {
            "test_puzzles": 4,
            "iterations": 1,
            "steps": 1,
            "batch_size": 1,
            "max_tokens": 1,
            "gate_rank": 0,
        }
        if bad := [name for name, low in least.items() if getattr(self, name) < low]:
            raise ValueError(f"--{bad[0]} must be {least[bad[0]]} or more")
        if not self.train_sizes or not set(self.train_sizes) <= {4, 6, 9}:
            raise ValueError("--train_sizes are some of 4, 6, 9")
        if len(set(self.train_sizes)) < len(self.train_sizes):
            raise ValueError("--train_sizes has a size twice")
        if min(shard_size(self, n) for n in self.train_sizes) < 4:
            raise ValueError(
                f"--train_puzzles {self.train_puzzles}: too few for four in each shard of a size"
            )
        if self.heads < 1 or self.hidden % self.heads or min(self.concurrency, self.retries, self.seeds) < 1:
            raise ValueError("--heads divides --hidden, and --concurrency, --retries, --seeds are 1 or more")


# --- puzzles ---

CANARY = "sudoku-bench mini_48 canary 8c1f6d1e-2f0a-4a51-9d4e-7b6f3c9a5e10"
Cell = tuple[int, int]  # row and column from 1; 0 and n + 1 are outside the grid
BITS = [tuple(d for d in range(10) if m >> d & 1) for m in range(1024)]  # digits of a set of them


class Clue(NamedTuple):
    """One constraint: a family of RULES, its cells in the order that matters for it, and its parameter."""

    type: str
    cells: tuple[Cell, ...] = ()
    value: str = ""

    def number(self, default: int) -> int:
        return int(self.value) if self.value else default


def name_of(cell: Cell) -> str:
    return f"r{cell[0]}c{cell[1]}"


def cell_of(name: str) -> Cell:
    """`r3c4` -> (3, 4); ValueError for anything else."""
    if not (m := re.fullmatch(r"[rR](-?[0-9]{1,2})[cC](-?[0-9]{1,2})", name)):
        raise ValueError(f"{name!r} is no cell")
    return int(m[1]), int(m[2])


@functools.cache
def boxes(n: int) -> tuple[tuple[int, ...], ...]:
    """Indices of the standard boxes; their height is the largest divisor of n up to its root (6: 2 x 3)."""
    h = max(d for d in range(1, int(n**0.5) + 1) if n % d == 0)
    w = n // h
    grid = [[(r // h) * h + c // w for c in range(n)] for r in range(n)]
    return tuple(tuple(r * n + c for r in range(n) for c in range(n) if grid[r][c] == b) for b in range(n))


def divide(n: int, i: int) -> Cell:
    return i // n + 1, i % n + 1


def boxes_drawn(n: int, regions: Iterable[Iterable[int]]) -> list[dict]:
    """Regions as visual elements."""
    cells = ([name_of(divide(n, i)) for i in g] for g in regions)
    return [{"type": "cage", "style": "box", "value": "", "cells": x} for x in cells]


@dataclass
class Puzzle:
    """A puzzle; `regions` are index tuples, None for standard boxes, () for none. See `to_json`."""

    id: str
    n: int
    givens: str
    clues: tuple[Clue, ...] = ()
    solution: str | None = None
    regions: tuple[tuple[int, ...], ...] | None = None
    title: str = ""
    author: str = ""
    source: str = "generated"
    rules: str = ""  # of an official puzzle; derived from the clues where empty
    elements: list[dict] | None = None  # the same for visual elements
    encoded: str | None = None
    proof: dict = field(default_factory=lambda: {"status": "not_run"})
    tags: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)  # unknown keys of its JSON

    def __post_init__(self):
        n = self.n
        if not 1 <= n <= 9:
            raise ValueError(f"{self.id}: {n}x{n}; a board is a string of digits, so grids go up to 9x9")
        if n not in (4, 6, 9) and self.regions is None:
            raise ValueError(f"{self.id}: a grid of {n}x{n} needs explicit regions")
        if not re.fullmatch(rf"[0-9.]{{{n * n}}}", self.givens, re.A):
            raise ValueError(f"{self.id}: the board is not {n * n} digits and dots")
        if self.solution and not re.fullmatch(rf"[0-9]{{{n * n}}}", self.solution, re.A):
            raise ValueError(f"{self.id}: the solution is not {n * n} digits")
        inside, border = range(1, n + 1), (0, n + 1)
        for clue in self.clues:
            if clue.type not in RULES:
                raise ValueError(f"{self.id}: no family {clue.type!r}")
            outer = RULES[clue.type].outside
            for k, (r, c) in enumerate(clue.cells):
                fits = r in inside and c in inside
                if outer and k == 0:
                    fits = (r in border or c in border) and all(0 <= x <= n + 1 for x in (r, c))
                if not fits:
                    raise ValueError(f"{self.id}: {clue.type} at {name_of((r, c))}, which it cannot be at")
            RULES[clue.type].validate(self, clue)

    @property
    def digits(self) -> int:
        """The digits as a set of bits: 1 .. n and whatever else givens and solution hold."""
        found = {int(c) for c in self.givens + (self.solution or "") if c != "."}
        return sum(1 << d for d in found | set(range(1, self.n + 1)))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Boxes or regions."""
        return boxes(self.n) if self.regions is None else self.regions

    @property
    def latin(self) -> bool:
        return not any(c.type == "norowcol" for c in self.clues)

    @property
    def plain(self) -> bool:
        """Whether it gets the plain-sudoku prompt, which is decided by the author, as in the paper's code."""
        return self.author.lower() == "nikoli"

    def index(self, cell: Cell) -> int:
        return (cell[0] - 1) * self.n + cell[1] - 1

    def cells(self, clue: Clue) -> list[int]:
        """Indices of a clue's cells, without the outside one."""
        return [self.index(c) for c in clue.cells[RULES[clue.type].outside :]]

    def rules_text(self) -> str:
        """The rules: those that came with it, or one sentence a family."""
        if self.rules:
            return self.rules
        n, d = self.n, " ".join(map(str, BITS[self.digits]))
        where = {None: "outlined box", (): ""}.get(self.regions, "region")
        base = f"Place one of the digits {d} in every cell." + (
            " No digit repeats in an outlined box." if where == "outlined box"
                else f" No digit repeats in a {where}." if where else ""
        ) if not self.latin else (
            f"Place the digits {d} so that no digit repeats in a row" + (
                f", a column or an {where}." if where == "outlined box" else
                f", a column or a {where}." if where else " or a column."))  # fmt: skip
        kinds = {}
        for clue in self.clues:
            kinds.setdefault((clue.type, RULES[clue.type].key(clue)), clue)
        return " ".join([base, *(RULES[c.type].text(n, c) for c in kinds.values())]).strip()

    def visual(self) -> list[dict]:
        """Visual elements in the official puzzles' vocabulary: its own, or those of regions and clues."""
        if self.elements is not None:
            return self.elements
        found = [] if self.regions is None else boxes_drawn(self.n, self.regions)
        return found + [e for c in self.clues for e in RULES[c.type].elements(self.n, c)]

    def name(self, i: int) -> str:
        return name_of(divide(self.n, i))

    def to_json(self) -> dict:
        """The schema of our JSON lines: cells as rXcY, regions "std", [] or lists of cells."""
        regions = "std" if self.regions is None else [[self.name(i) for i in g] for g in self.regions]
        clues = [{"type": c.type, "cells": [name_of(x) for x in c.cells]}
            | ({"value": c.value} if c.value else {})
            for c in self.clues]  # fmt: skip
        return self.more | {
            "id": self.id, "title": self.title, "author": self.author, "source": self.source, "rows": self.n,
            "cols": self.n, "digits": list(BITS[self.digits]), "regions": regions, "givens": self.givens,
            "solution": self.solution, "rules": self.rules_text(), "constraints": clues,
            "visual_elements": self.visual(), "encoded": self.encoded, "proof": self.proof, "tags": self.tags,
        }  # fmt: skip

    @classmethod
    def from_json(cls, row: dict) -> Puzzle:
        """Read `to_json`; ValueError, KeyError or TypeError where the row is something else."""
        n = int(row["rows"])
        if n != int(row["cols"]):
            raise ValueError(
                f"{row.get('id')}: {n} rows and {row['cols']} columns; only squares are supported"
            )
        regions = row.get("regions", "std")
        if regions != "std":
            cells = [[cell_of(x) for x in g] for g in regions]
            if not all(1 <= x <= n for g in cells for cell in g for x in cell):
                raise ValueError(f"{row.get('id')}: a region leaves the grid")
            regions = tuple(tuple((r - 1) * n + c - 1 for r, c in g) for g in cells)
        clues = tuple(
            Clue(c["type"], tuple(map(cell_of, c.get("cells", ()))), str(c.get("value", "")))
            for c in row.get("constraints", ())
        )
        known = set(cls(id="", n=1, givens=".", regions=()).to_json())
        more = {k: v for k, v in row.items() if k not in known}
        tags = {k: v for k, v in (row.get("tags") or {}).items() if k != "sufficient"}  # to be proved here
        return cls(str(row["id"]), n, row["givens"], clues, row.get("solution"),
            None if regions == "std" else regions, row.get("title") or "", row.get("author") or "",
            row.get("source") or "import", defused(row.get("rules") or ""),
            read_elements(row.get("visual_elements")), row.get("encoded"),
            row.get("proof") or {"status": "not_run"}, tags, more)  # fmt: skip

    def to_line(self) -> str:
        """id|n|givens|clues|solution; a cell is two hexadecimal digits, a jigsaw `region` and letters."""
        parts = []
        if self.regions is not None:
            letters = ["."] * self.n**2
            for k, group in enumerate(self.regions):
                for i in group:
                    letters[i] = string.ascii_lowercase[k]
            parts.append("region " + "".join(letters))
        for c in self.clues:
            parts.append(
                " ".join([c.type + (f":{c.value}" if c.value else ""), *(f"{r:x}{k:x}" for r, k in c.cells)])
            )
        name = re.sub(r"[|\r\n]", "_", self.id)
        return f"{name}|{self.n}|{self.givens}|{';'.join(parts)}|{self.solution or ''}"

    @classmethod
    def from_line(cls, line: str) -> Puzzle:
        """Read `to_line`; ValueError says what is wrong."""
        try:
            name, n, givens, parts, solution = line.strip().split("|")
        except ValueError:
            raise ValueError(f"not id|n|givens|clues|solution: {line[:60]!r}") from None
        clues, regions = [], None
        for part in filter(None, parts.split(";")):
            kind, *cells = part.split()
            kind, _, value = kind.partition(":")
            if kind == "region":
                if len(cells) != 1 or len(cells[0]) != len(givens):
                    raise ValueError(f"{name[:20]}: region takes a letter for each cell")
                letters = sorted(set(cells[0]) - {"."})
                regions = tuple(tuple(i for i, c in enumerate(cells[0]) if c == x) for x in letters)
            else:
                clues.append(Clue(kind, tuple((int(x[0], 16), int(x[1:], 16)) for x in cells), value))
        return cls(name, int(n), givens, tuple(clues), solution or None, regions)


# --- rules: each family's exact check, its propagation, its sentence and its drawing ---


@dataclass(frozen=True)
class Rule:
    """A family. check(p, clue, grid) is exact on a full grid and knows nothing of tables and propagators.

    compile(solver, clue) adds tables, groups or propagators; text(n, clue) is its sentence, one for each
    `key`; elements(n, clue) are dicts in SudokuPad's habits. `outside`: 1 if the first cell is outside.
    """

    check: Callable[[Puzzle, Clue, Sequence[int]], bool]
    compile: Callable[[Solver, Clue], None]
    text: Callable[[int, Clue], str]
    elements: Callable[[int, Clue], list[dict]]
    count: tuple[int, int] = (0, 0)  # fewest and most cells of a clue
    outside: int = 0
    numeric: bool = False  # the parameter is a whole number
    key: Callable[[Clue], str] = lambda clue: ""
    more: Callable[[Puzzle, Clue], str | None] = lambda p, clue: None  # what else is wrong with a clue

    def validate(self, p: Puzzle, clue: Clue) -> None:
        low, high = self.count
        if not low <= len(clue.cells) <= (high or (81 if low else 0)):
            raise ValueError(f"{p.id}: {clue.type} has {len(clue.cells)} cells")
        if len(set(clue.cells)) < len(clue.cells):
            raise ValueError(f"{p.id}: {clue.type} has a cell twice")
        if self.numeric and not re.fullmatch(r"-?[0-9]{1,4}", clue.value):
            raise ValueError(f"{p.id}: {clue.type} has the value {clue.value[:20]!r}, which is no number")
        if wrong := self.more(p, clue):
            raise ValueError(f"{p.id}: {clue.type} {wrong}")


def optional_number(p: Puzzle, clue: Clue) -> str | None:
    return None if re.fullmatch(r"([0-9]{1,3})?", clue.value, re.A) else f"has the value {clue.value[:20]!r}"


def one_of(names: Iterable[str], several: bool = False) -> Callable:
    def wrong(p: Puzzle, clue: Clue) -> str | None:
        found = clue.value.split("+") if several else [clue.value]
        return (
            None
            if set(found) <= set(names)
            else f"has the value {clue.value[:20]!r}, not of {', '.join(names)}"
        )

    return wrong


def orthogonal(n: int) -> list[tuple[int, int]]:
    """Index pairs of cells that share an edge."""
    right = [(i, i + 1) for i in range(n * n) if (i + 1) % n]
    return right + [(i, i + n) for i in range(n * n - n)]


def leaps(n: int, moves: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Index pairs that lie (dr, dc) apart, for each of the moves."""
    found = []
    for dr, dc in moves:
        for r in range(n - dr):
            found += [(r * n + c, (r + dr) * n + c + dc) for c in range(n) if 0 <= c + dc < n]
    return found


KNIGHT, KING = ((1, 2), (1, -2), (2, 1), (2, -1)), ((1, 1), (1, -1))


def binary(pairs: Callable, text: Callable, elements: Callable, **more) -> Rule:
    """A family that is a relation ok(a, b) on pairs of cells: pairs(p, clue) yields (i, j, ok)."""

    def compile(solver: Solver, clue: Clue) -> None:
        for i, j, ok in pairs(solver.p, clue):
            solver.relate(i, j, ok)

    def check(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
        return all(ok(g[i], g[j]) for i, j, ok in pairs(p, clue))

    return Rule(check, compile, text, elements, **more)


def distinct(groups: Callable, text: Callable, elements: Callable, **more) -> Rule:
    """A family of groups of cells without a repeated digit: groups(p, clue) yields lists of indices."""

    def compile(solver: Solver, clue: Clue) -> None:
        for group in groups(solver.p, clue):
            solver.differ(group)

    def check(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
        return all(len({g[i] for i in group}) == len(group) for group in groups(p, clue))

    return Rule(check, compile, text, elements, **more)


# relations of two cells; what a `pair` clue may say
RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "equal": lambda a, b: a == b, "parity": lambda a, b: (a - b) % 2 == 0,
    "oddsum": lambda a, b: (a + b) % 2 == 1, "sum<5": lambda a, b: a + b < 5, "sum>5": lambda a, b: a + b > 5,
    "product>5": lambda a, b: a * b > 5,
}  # fmt: skip
SAYINGS = {
    "equal": "the same digit", "parity": "both odd or both even", "oddsum": "one odd and one even digit",
    "sum<5": "digits that sum to less than 5", "sum>5": "digits that sum to more than 5",
    "product>5": "digits whose product is more than 5",
}  # fmt: skip


def dot(kind: str, value: int) -> Callable[[int, int], bool]:
    """The relation of a dot: white has the difference, black the ratio, xv the sum `value`."""
    if kind == "white":
        return lambda a, b: abs(a - b) == value
    if kind == "black":
        return lambda a, b: a == value * b or b == value * a
    return lambda a, b: a + b == value


DOTS = {"white": 1, "black": 2, "xv": 5}


def dots(kind: str) -> Callable:
    return lambda p, clue: [(*p.cells(clue), dot(kind, clue.number(DOTS[kind])))]


def negative(p: Puzzle, clue: Clue):
    """Edges without any of the named dots: none of their relations holds there; xv forbids 5 and 10."""
    kinds = clue.value.split("+")
    marked = {frozenset(p.cells(c)) for c in p.clues if c.type in kinds}
    found = [dot(k, v) for k in kinds for v in ((5, 10) if k == "xv" else (DOTS[k],))]
    ok = lambda a, b: not any(f(a, b) for f in found)  # noqa: E731
    return [(i, j, ok) for i, j in orthogonal(p.n) if frozenset((i, j)) not in marked]


def along(ok: Callable, distance: Callable | None = None) -> Callable:
    """Pairs of a line: neighbours, or all pairs i < j with ok(a, b, j - i) where `distance` is given."""

    def pairs(p: Puzzle, clue: Clue):
        line = p.cells(clue)
        if distance is None:
            return [(i, j, functools.partial(ok, p.n, clue)) for i, j in itertools.pairwise(line)]
        both = itertools.combinations(range(len(line)), 2)
        return [(line[a], line[b], functools.partial(distance, b - a)) for a, b in both]

    return pairs


def neighbours(p: Puzzle, clue: Clue) -> list[int]:
    (r, c), n = clue.cells[0], p.n
    near = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
    return [p.index(x) for x in near if 1 <= x[0] <= n and 1 <= x[1] <= n]


def extreme(less: bool) -> Callable:
    ok = (lambda a, b: a < b) if less else (lambda a, b: a > b)
    return lambda p, clue: [(p.index(clue.cells[0]), j, ok) for j in neighbours(p, clue)]


def halves(p: Puzzle, clue: Clue):
    cells, k = p.cells(clue), len(clue.cells) // 2
    return [(a, b, RELATIONS["equal"]) for a, b in zip(cells[:k], cells[k:], strict=True)]


def mirrored(p: Puzzle, clue: Clue):
    cells = p.cells(clue)
    return [(a, b, RELATIONS["equal"]) for a, b in zip(cells, cells[::-1], strict=True) if a < b]


def unary(mask: int, text: str, shape: str) -> Rule:
    def compile(solver: Solver, clue: Clue) -> None:
        solver.start[solver.p.cells(clue)[0]] &= mask

    def check(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
        return mask >> g[p.cells(clue)[0]] & 1 == 1

    def elements(n: int, clue: Clue) -> list[dict]:
        return [mark(clue.cells, shape, "gray")]

    return Rule(check, compile, lambda n, c: text, elements, (1, 1))


# sums


def reach(cand: Sequence[int], cells: Sequence[int]) -> list[int]:
    """Big-int reachability: bit s of entry k says whether the first k cells can sum to s."""
    found = [1]
    for i in cells:
        f, total = found[-1], 0
        for d in BITS[cand[i]]:
            total |= f << d
        found.append(total)
    return found


def prune_sum(cand: list[int], cells: Sequence[int], totals: int, changed: list[int]) -> bool:
    """Keep what can be part of a sum in the set `totals`: exact arc consistency if digits may repeat."""
    found = reach(cand, cells)
    need = totals & found[-1]
    if not need:
        return False
    for k in range(len(cells) - 1, -1, -1):
        i, before, keep, back = cells[k], found[k], 0, 0
        for d in BITS[cand[i]]:
            if s := (need >> d) & before:
                keep |= 1 << d
                back |= s
        if keep != cand[i]:
            cand[i] = keep
            changed.append(i)
        need = back
    return True


@functools.cache
def combinations(digits: int, size: int, total: int | None) -> tuple[int, ...]:
    """Sets of `size` different digits with a sum, as bits."""
    picks = itertools.combinations(BITS[digits], size)
    return tuple(sum(1 << d for d in pick) for pick in picks if total is None or sum(pick) == total)


def fitting(cand: Sequence[int], cells: Sequence[int], sets: Iterable[int]) -> list[int]:
    """Those sets that hold all fixed digits, lie in the union, and meet every cell."""
    union = fixed = 0
    for i in cells:
        union |= cand[i]
        if not cand[i] & (cand[i] - 1):
            fixed |= cand[i]
    return [s for s in sets if not fixed & ~s and not s & ~union and all(cand[i] & s for i in cells)]


def restrict(cand: list[int], keep: Iterable[tuple[int, int]], changed: list[int]) -> bool:
    """cand[i] &= mask for each (i, mask); False when nothing is left."""
    for i, mask in keep:
        x = cand[i] & mask
        if x != cand[i]:
            if not x:
                return False
            cand[i] = x
            changed.append(i)
    return True


def sum_and_repeats(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
    values = [g[i] for i in p.cells(clue)]
    return len(set(values)) == len(values) and (not clue.value or sum(values) == int(clue.value))


def compile_killer(solver: Solver, clue: Clue) -> None:
    cells = solver.p.cells(clue)
    solver.differ(cells)
    if not clue.value:
        return
    sets = combinations(solver.digits, len(cells), int(clue.value))

    def prune(cand: list[int]) -> list[int] | None:
        fits, changed, union, common_ = fitting(cand, cells, sets), [], 0, -1
        if not fits:
            return None
        for s in fits:
            union |= s
            common_ &= s
        if not restrict(cand, ((i, union) for i in cells), changed):
            return None
        for d in BITS[common_]:  # in every set: a digit with one home is there
            homes = [i for i in cells if cand[i] >> d & 1]
            if len(homes) < 2 and (not homes or not restrict(cand, [(homes[0], 1 << d)], changed)):
                return None
        return changed

    solver.watch(cells, prune)


def arrow_parts(p: Puzzle, clue: Clue) -> tuple[list[int], list[int]]:
    cells, k = p.cells(clue), clue.number(1)
    return cells[:k], cells[k:]


def check_arrow(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
    pill, shaft = arrow_parts(p, clue)
    return int("".join(str(g[i]) for i in pill)) == sum(g[i] for i in shaft)


def compile_arrow(solver: Solver, clue: Clue) -> None:
    pill, shaft = arrow_parts(solver.p, clue)
    weights = [10 ** (len(pill) - 1 - k) for k in range(len(pill))]

    def numbers(cand: Sequence[int], skip: int = -1) -> int:
        found = 1
        for k, i in enumerate(pill):
            if k != skip:
                found = functools.reduce(operator.or_, (found << d * weights[k] for d in BITS[cand[i]]), 0)
        return found

    def prune(cand: list[int]) -> list[int] | None:
        changed: list[int] = []
        if not prune_sum(cand, shaft, numbers(cand), changed):
            return None
        sums, keep = reach(cand, shaft)[-1], []
        for k, i in enumerate(pill):
            rest = numbers(cand, k)
            keep.append((i, sum(1 << d for d in BITS[cand[i]] if sums & rest << d * weights[k])))
        return changed if restrict(cand, keep, changed) else None

    solver.watch([*pill, *shaft], prune)


def ray(p: Puzzle, clue: Clue) -> list[int]:
    """Cells seen from outside: the clue's two cells give start and direction."""
    (r0, c0), (r, c) = clue.cells
    dr, dc, found = r - r0, c - c0, []
    while 1 <= r <= p.n and 1 <= c <= p.n:
        found.append(p.index((r, c)))
        r, c = r + dr, c + dc
    return found


def bad_ray(p: Puzzle, clue: Clue) -> str | None:
    (r0, c0), (r, c) = clue.cells
    ok = abs(r - r0) == abs(c - c0) == 1
    return None if ok else f"from {name_of((r0, c0))} to {name_of((r, c))} is no diagonal"


def check_littlekiller(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
    return sum(g[i] for i in ray(p, clue)) == int(clue.value)


def compile_littlekiller(solver: Solver, clue: Clue) -> None:
    cells, total = ray(solver.p, clue), 1 << max(0, int(clue.value))

    def prune(cand: list[int]) -> list[int] | None:
        changed: list[int] = []
        return changed if prune_sum(cand, cells, total, changed) else None

    solver.watch(cells, prune)


def segments(p: Puzzle, clue: Clue) -> list[list[int]]:
    """A region-sum line, cut where it enters another region."""
    home = {i: k for k, group in enumerate(p.groups) for i in group}
    runs = itertools.groupby(p.cells(clue), key=lambda i: home.get(i, -1))
    return [list(run) for _, run in runs]


def check_regionsum(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
    return len({sum(g[i] for i in part) for part in segments(p, clue)}) == 1


def compile_regionsum(solver: Solver, clue: Clue) -> None:
    parts = segments(solver.p, clue)

    def prune(cand: list[int]) -> list[int] | None:
        totals = functools.reduce(operator.and_, (reach(cand, part)[-1] for part in parts))
        changed: list[int] = []
        ok = all(prune_sum(cand, part, totals, changed) for part in parts)
        return changed if ok else None

    solver.watch(solver.p.cells(clue), prune)


# lines and marks with more than two cells


def check_renban(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
    values = sorted(g[i] for i in p.cells(clue))
    return values == list(range(values[0], values[0] + len(values)))


def compile_renban(solver: Solver, clue: Clue) -> None:
    cells = solver.p.cells(clue)
    size = len(cells)
    solver.differ(cells)
    for i, j in itertools.combinations(cells, 2):
        solver.relate(i, j, lambda a, b: 1 <= abs(a - b) < size)
    runs = [((1 << size) - 1) << d for d in range(11 - size)]

    def prune(cand: list[int]) -> list[int] | None:
        changed: list[int] = []
        union = functools.reduce(operator.or_, fitting(cand, cells, runs), 0)
        return changed if union and restrict(cand, ((i, union) for i in cells), changed) else None

    solver.watch(cells, prune)


def check_between(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
    a, *inner, b = (g[i] for i in p.cells(clue))
    return all(min(a, b) < x < max(a, b) for x in inner)


def compile_between(solver: Solver, clue: Clue) -> None:
    a, *inner, b = solver.p.cells(clue)

    def prune(cand: list[int]) -> list[int] | None:
        keep_a = keep_b = keep = 0
        for x in BITS[cand[a]]:
            for y in BITS[cand[b]]:
                mask = ((1 << max(x, y)) - 1) & ~((2 << min(x, y)) - 1)
                if all(cand[i] & mask for i in inner):
                    keep_a, keep_b, keep = keep_a | 1 << x, keep_b | 1 << y, keep | mask
        changed: list[int] = []
        masks = [(a, keep_a), (b, keep_b), *((i, keep) for i in inner)]
        return changed if restrict(cand, masks, changed) else None

    solver.watch([a, *inner, b], prune)


def check_quad(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
    return not collections.Counter(clue.value) - collections.Counter(str(g[i]) for i in p.cells(clue))


def compile_quad(solver: Solver, clue: Clue) -> None:
    cells = solver.p.cells(clue)
    wanted = collections.Counter(map(int, clue.value))

    def prune(cand: list[int]) -> list[int] | None:
        changed: list[int] = []
        for d, k in wanted.items():
            homes = [i for i in cells if cand[i] >> d & 1]
            if len(homes) < k or (
                len(homes) == k and not restrict(cand, ((i, 1 << d) for i in homes), changed)
            ):
                return None
        if sum(wanted.values()) == len(cells):
            union = sum(1 << d for d in wanted)
            return changed if restrict(cand, ((i, union) for i in cells), changed) else None
        return changed

    solver.watch(cells, prune)


def bad_quad(p: Puzzle, clue: Clue) -> str | None:
    ok = re.fullmatch(r"[0-9]{1,4}", clue.value, re.A)
    return None if ok else f"has the value {clue.value[:20]!r}, which is not one to four digits"


# clues outside: a row or column seen from there


def sight(p: Puzzle, clue: Clue) -> list[int]:
    (r, c), n = clue.cells[0], p.n
    if r in (0, n + 1):
        line = [p.index((k, c)) for k in range(1, n + 1)]
        return line if r == 0 else line[::-1]
    line = [p.index((r, k)) for k in range(1, n + 1)]
    return line if c == 0 else line[::-1]


def bad_sight(p: Puzzle, clue: Clue) -> str | None:
    (r, c), border = clue.cells[0], (0, p.n + 1)
    return f"at the corner {name_of((r, c))}" if r in border and c in border else None


def check_sandwich(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
    row, ends = [g[i] for i in sight(p, clue)], (BITS[p.digits][0], BITS[p.digits][-1])
    if any(row.count(e) != 1 for e in ends):
        return False
    a, b = sorted(row.index(e) for e in ends)
    return sum(row[a + 1 : b]) == int(clue.value)


def compile_sandwich(solver: Solver, clue: Clue) -> None:
    line, total, digits = sight(solver.p, clue), int(clue.value), solver.digits
    low, high = 1 << BITS[digits][0], 1 << BITS[digits][-1]
    inner = digits & ~low & ~high
    n = len(line)

    def prune(cand: list[int]) -> list[int] | None:
        keep = [0] * n
        for a, b in itertools.combinations(range(n), 2):
            ends = [(x, y) for x, y in ((low, high), (high, low)) if cand[line[a]] & x and cand[line[b]] & y]
            fill = line[a + 1 : b]
            sets = ends and fitting(cand, fill, combinations(inner, len(fill), total))
            if not sets or not all(cand[i] & inner for i in line[:a] + line[b + 1 :]):
                continue
            union = functools.reduce(operator.or_, sets)
            for k in range(n):
                keep[k] |= union if a < k < b else inner
            for x, y in ends:
                keep[a], keep[b] = keep[a] | x, keep[b] | y
        changed: list[int] = []
        return changed if restrict(cand, zip(line, keep, strict=True), changed) else None

    if solver.p.latin:
        solver.watch(line, prune)


def check_skyscraper(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
    row = [g[i] for i in sight(p, clue)]
    return sum(x > max(row[:k], default=-1) for k, x in enumerate(row)) == int(clue.value)


def compile_skyscraper(solver: Solver, clue: Clue) -> None:
    """Forward and backward over (highest so far, how many seen), the latter as bits of a number."""
    line, seen = sight(solver.p, clue), int(clue.value)

    def prune(cand: list[int]) -> list[int] | None:
        ahead = [[0] * 10 for _ in range(len(line) + 1)]  # entry h: counts possible with h the highest
        first = cand[line[0]]
        for d in BITS[first]:
            ahead[1][d] = 2
        for k in range(1, len(line)):
            below, now, after = 0, ahead[k], ahead[k + 1]
            options = cand[line[k]]
            for h in range(10):
                if now[h] and options & ((1 << h) - 1):
                    after[h] |= now[h]
                if options >> h & 1:
                    after[h] |= below << 1
                below |= now[h]
        back, keep = [1 << seen if seen >= 0 else 0] * 10, []
        for k in range(len(line) - 1, 0, -1):
            now, options, mask, before = ahead[k], cand[line[k]], 0, [0] * 10
            for h in range(10):
                for d in BITS[options]:
                    if d < h:
                        count = back[h]
                    elif d > h:
                        count = back[d] >> 1
                    else:
                        continue
                    before[h] |= count
                    if now[h] & count:
                        mask |= 1 << d
            keep.append((line[k], mask))
            back = before
        keep.append((line[0], sum(1 << d for d in BITS[first] if back[d] & 2)))
        changed: list[int] = []
        return changed if restrict(cand, keep, changed) else None

    if solver.p.latin:
        solver.watch(line, prune)


def bad_arrow(p: Puzzle, clue: Clue) -> str | None:
    ok = re.fullmatch(r"[1-4]?", clue.value, re.A) and clue.number(1) < len(clue.cells)
    return None if ok else f"of {len(clue.cells)} cells has a pill of {clue.value[:20]!r}"


def check_xsum(p: Puzzle, clue: Clue, g: Sequence[int]) -> bool:
    row = [g[i] for i in sight(p, clue)]
    return 0 < row[0] <= len(row) and sum(row[: row[0]]) == int(clue.value)


def compile_xsum(solver: Solver, clue: Clue) -> None:
    line, total = sight(solver.p, clue), int(clue.value)

    def prune(cand: list[int]) -> list[int] | None:
        keep = [0] * len(line)
        for x in BITS[cand[line[0]]]:
            if not 0 < x <= len(line) or total < x:
                continue
            trial, part = list(cand), line[1:x]
            if not prune_sum(trial, part, 1 << total - x, []):
                continue
            keep[0] |= 1 << x
            for k in range(1, len(line)):
                keep[k] |= trial[line[k]] if k < x else 1023
        changed: list[int] = []
        return changed if restrict(cand, zip(line, keep, strict=True), changed) else None

    solver.watch(line, prune)


# drawings


def mark(cells: Sequence[Cell], shape: str = "", fill: str = "", stroke: str = "", text="", kind="underlays"):
    """A shape or text in a cell, between two or at the corner of four, as a visual element."""
    places = {
        1: "cell",
        4: "corner",
        2: "vertical edge" if cells[0][0] == cells[-1][0] else "horizontal edge",
    }
    cells = sorted(cells)
    return {"type": kind, "coords": [name_of(c) for c in cells], "loc": places[len(cells)], "shape": shape,
        "color_name": fill, "border_color_name": stroke, "text": text}  # fmt: skip


def stroke(cells: Sequence[Cell], color: str, kind: str = "lines") -> dict:
    return {"type": kind, "color_name": color, "coords": [name_of(c) for c in cells]}


def line_in(color: str) -> Callable:
    return lambda n, c: [stroke(c.cells, color)]


def dot_in(fill: str, default: int) -> Callable:
    def elements(n: int, c: Clue) -> list[dict]:
        text = c.value if c.value and int(c.value) != default else ""
        return [mark(c.cells, "circle", fill, "black", text, "overlays")]

    return elements


def text_of_sum(n: int, c: Clue) -> list[dict]:
    letter = {5: "V", 10: "X"}.get(c.number(5), str(c.number(5)))
    return [mark(c.cells, "", "", "", letter, "overlays")]


def number_outside(n: int, c: Clue) -> list[dict]:
    found = [mark(c.cells[:1], "", "", "", c.value, "overlays")]
    if c.type == "littlekiller":
        (r0, c0), (r, k) = c.cells
        direction = f"{'lower' if r > r0 else 'upper'} {'right' if k > c0 else 'left'}"
        arrow = {"type": "diagonal arrow", "coords": [name_of(c.cells[0])], "direction": direction}
        found.append(arrow | {"color_name": "black"})
    return found


def draw_thermo(n: int, c: Clue) -> list[dict]:
    return [mark(c.cells[:1], "circle", "lightgray"), stroke(c.cells, "lightgray")]


def draw_arrow(n: int, c: Clue) -> list[dict]:
    k = c.number(1)
    circle = [mark([x], "circle", "white", "gray") for x in c.cells[:k]]
    pill = [stroke(c.cells[:k], "gray")] if k > 1 else []
    return [*circle, *pill, stroke(c.cells[k - 1 :], "gray", "arrows")]


def draw_between(n: int, c: Clue) -> list[dict]:
    ends = [mark([x], "circle", "white", "gray") for x in (c.cells[0], c.cells[-1])]
    return [stroke(c.cells, "gray"), *ends]


def draw_less(n: int, c: Clue) -> list[dict]:
    (a, b), (r, k) = c.cells
    sign = {(0, 1): "<", (0, -1): ">", (1, 0): "^", (-1, 0): "v"}.get((r - a, k - b))
    if not sign:  # they do not touch
        return [{"type": "manual", "text": f"{name_of(c.cells[0])} < {name_of(c.cells[1])}"}]
    return [{"type": "inequality", "direction": sign, "cells": [name_of(x) for x in sorted(c.cells)]}]


def shade(color: str) -> Callable:
    return lambda n, c: [mark([x], "square", color) for x in c.cells]


def everywhere(text: str) -> Callable:
    return lambda n, c: [{"type": "global", "text": text}]


def cage(n: int, c: Clue) -> list[dict]:
    return [{"type": "cage", "style": "killer", "value": c.value, "cells": [name_of(x) for x in c.cells]}]


def diagonal(down: bool) -> Callable:
    def cells(n: int) -> list[Cell]:
        return [(k, k if down else n + 1 - k) for k in range(1, n + 1)]

    return distinct(lambda p, c: [[p.index(x) for x in cells(p.n)]],
        lambda n,
            c: f"No digit repeats on the diagonal from r1c{1 if down else n} to r{n}c{n if down else 1}.",
        lambda n, c: [stroke(cells(n), "lightblue")])  # fmt: skip


def windows(n: int) -> list[list[Cell]]:
    return (
        [[(r + a, c + b) for a in range(3) for b in range(3)] for r in (2, 6) for c in (2, 6)]
        if n == 9
        else []
    )


def same_place(p: Puzzle, c: Clue) -> list[list[int]]:
    return [list(cells) for cells in zip(*boxes(p.n), strict=True)]


def modular(p: Puzzle, clue: Clue):
    line, ok = p.cells(clue), lambda a, b: (a - b) % 3 != 0
    return [(line[i], line[j], ok) for i in range(len(line)) for j in (i + 1, i + 2) if j < len(line)]


def whisper(n: int, clue: Clue, a: int, b: int) -> bool:
    return abs(a - b) >= clue.number((n + 1) // 2)


def say(sentence: str) -> Callable:
    """A sentence that is the same for every size and clue."""
    return lambda n, c: sentence


def with_number(sentence: str, default: Callable[[int], int]) -> Callable:
    """A sentence with the clue's number, or its default for grids of size n, in place of {}."""
    return lambda n, c: sentence.format(c.number(default(n)))


def sentence_xv(n: int, c: Clue) -> str:
    total = c.number(5)
    return f"Cells joined by {({5: 'V', 10: 'X'}).get(total, f'a {total}')} sum to {total}."


def sentence_negative(n: int, c: Clue) -> str:
    kinds = c.value.split("+")
    marks = " and ".join("X and V" if k == "xv" else f"{k} dot" for k in kinds)
    words = {"white": "a difference of 1", "black": "a ratio of 2", "xv": "a sum of 5 or 10"}
    none = " or ".join(words[k] for k in kinds)
    return f"Every possible {marks} is drawn: neighbouring cells without a mark do not have {none}."


def sentence_arrow(n: int, c: Clue) -> str:
    if c.number(1) == 1:
        return "Digits along an arrow sum to the digit in its circle."
    return "Digits along an arrow sum to the number in its pill, read from the first circle to the arrow's."


def sentence_pair(n: int, c: Clue) -> str:
    return f'Cells joined by "{c.value}" hold {SAYINGS[c.value]}.'


def word_in(word: str = "") -> Callable:
    """A word, or the clue's value, in its cell or on its edge."""
    return lambda n, c: [mark(c.cells, "", "", "", word or c.value, "overlays")]


def draw_slow(n: int, c: Clue) -> list[dict]:
    return [mark(c.cells[:1], "circle", "lightblue"), stroke(c.cells, "lightblue")]


def draw_quad(n: int, c: Clue) -> list[dict]:
    return [mark(c.cells, "circle", "white", "black", " ".join(c.value), "overlays")]


def draw_windows(n: int, c: Clue) -> list[dict]:
    return [mark([x], "square", "lightsteelblue") for w in windows(n) for x in w]


def draw_negative(n: int, c: Clue) -> list[dict]:
    return everywhere(f"all possible {c.value.replace('+', ' and ')} marks are given")(n, c)


def odd_clone(p: Puzzle, c: Clue) -> str | None:
    return f"has {len(c.cells)} cells, an odd number" if len(c.cells) % 2 else None


def touching(ok: Callable[[int, int], bool]) -> Callable:
    """A relation of all cells that share an edge."""
    return lambda p, c: [(i, j, ok) for i, j in orthogonal(p.n)]


def ascending(k: int, a: int, b: int) -> bool:
    return b - a >= k


EDGE, LINE = {"count": (2, 2)}, {"count": (2, 0)}
OUTSIDE = {"outside": 1, "numeric": True, "count": (1, 1), "more": bad_sight}
VALUED = {"key": lambda c: c.value, "more": optional_number}
NO_REPEATS = "Digits may repeat in rows and columns."
# fmt: off
RULES: dict[str, Rule] = {
    # relations of two cells
    "white": binary(dots("white"), with_number("Cells joined by a white dot differ by {}.", lambda n: 1),
        dot_in("white", 1), **EDGE, **VALUED),
    "black": binary(dots("black"),
        with_number("Of cells joined by a black dot one is {} times the other.", lambda n: 2),
        dot_in("black", 2), **EDGE, **VALUED),
    "xv": binary(dots("xv"), sentence_xv, text_of_sum, **EDGE, **VALUED),
    "less": binary(lambda p, c: [(*p.cells(c), operator.lt)],
        say("An inequality sign between two cells points at the smaller digit."), draw_less, **EDGE),
    "pair": binary(lambda p, c: [(*p.cells(c), RELATIONS[c.value])], sentence_pair, word_in(),
        key=lambda c: c.value, more=one_of(RELATIONS), **EDGE),
    "neg": binary(negative, sentence_negative, draw_negative, key=lambda c: c.value, more=one_of(DOTS, True)),
    "minimum": binary(extreme(True), say("A cell marked min is smaller than all that share an edge with it."),
        word_in("min"), count=(1, 1)),
    "maximum": binary(extreme(False), say("A cell marked max is larger than all that share an edge with it."),
        word_in("max"), count=(1, 1)),
    "clone": binary(halves, say("Shaded shapes of a clone pair hold the same digits in the same places."),
        shade("lightgreen"), more=odd_clone, **LINE),
    "nonconsecutive": binary(touching(lambda a, b: abs(a - b) != 1),
        say("Cells that share an edge never hold consecutive digits."), everywhere("non-consecutive")),
    "even": unary(0b0101010101, "Grey squares hold even digits.", "square"),
    "odd": unary(0b1010101010, "Grey circles hold odd digits.", "circle"),
    # lines
    "thermo": binary(along(None, ascending), say("Digits increase along a thermometer from its bulb."),
        draw_thermo, **LINE),
    "slow": binary(along(None, lambda k, a, b: b >= a),
        say("Digits never decrease along a slow thermometer from its bulb."), draw_slow, **LINE),
    "palindrome": binary(mirrored, say("Grey lines read the same from both ends."), line_in("gray"), **LINE),
    "whispers": binary(along(whisper),
        with_number("Neighbouring digits on a green line differ by at least {}.", lambda n: (n + 1) // 2),
        line_in("green"), **LINE, **VALUED),
    "modular": binary(modular,
        say("Any three neighbours on a turquoise line leave three different remainders when divided by 3."),
        line_in("turquoise"), **LINE),
    "renban": Rule(check_renban, compile_renban,
        say("A purple line holds consecutive digits without repeats, in any order."),
        line_in("purple"), (2, 9)),
    "regionsum": Rule(check_regionsum, compile_regionsum,
        say("Box borders cut a blue line into parts of equal sums."), line_in("blue"), (2, 0)),
    "between": Rule(check_between, compile_between,
        say("Digits on a line between two circles lie strictly between the digits in them."),
        draw_between, (3, 0)),
    "arrow": Rule(check_arrow, compile_arrow, sentence_arrow, draw_arrow, (2, 0),
        key=lambda c: str(c.number(1) > 1), more=bad_arrow),
    # groups
    "diag+": diagonal(False),
    "diag-": diagonal(True),
    "windoku": distinct(lambda p, c: [[p.index(x) for x in w] for w in windows(p.n)],
        say("No digit repeats in a shaded window."), draw_windows),
    "extra": distinct(lambda p, c: [p.cells(c)], say("No digit repeats in the shaded extra region."),
        shade("thistle"), **LINE),
    "disjoint": distinct(same_place, say("Cells at the same place of different boxes hold different digits."),
        everywhere("disjoint groups")),
    "antiknight": distinct(lambda p, c: leaps(p.n, KNIGHT),
        say("Cells a knight's move apart hold different digits."),
        everywhere("anti-knight")),
    "antiking": distinct(lambda p, c: leaps(p.n, KING),
        say("Cells that touch at a corner hold different digits."),
        everywhere("anti-king")),
    "killer": Rule(sum_and_repeats, compile_killer,
        lambda n, c: "Digits in a cage do not repeat" + (" and sum to its number." if c.value else "."),
        cage, (1, 9), key=lambda c: str(bool(c.value)), more=optional_number),
    "quad": Rule(check_quad, compile_quad,
        say("Digits in a circle at a corner are in the four cells around it, as often as they are written."),
        draw_quad, (4, 4), more=bad_quad),
    # clues outside
    "littlekiller": Rule(check_littlekiller, compile_littlekiller,
        say("A number with an arrow is the sum of the diagonal it points along; digits may repeat there."),
        number_outside, (2, 2), 1, True, more=bad_ray),
    "sandwich": Rule(check_sandwich, compile_sandwich,
        say("A sandwich clue is the sum of the digits between the smallest and the largest of its line."),
        number_outside, **OUTSIDE),
    "skyscraper": Rule(check_skyscraper, compile_skyscraper,
        say("A skyscraper clue counts the digits seen from there; larger ones hide smaller ones behind."),
        number_outside, **OUTSIDE),
    "xsum": Rule(check_xsum, compile_xsum,
        say("An X-sum clue is the sum of the first X digits seen from there, X being the first of them."),
        number_outside, **OUTSIDE),
    "norowcol": Rule(lambda p, c, g: True, lambda s, c: None, say(NO_REPEATS), everywhere(NO_REPEATS)),
}
# fmt: on


# --- solver ---


@dataclass
class Result:
    """What a search found; `status` is unique only if the whole tree was searched."""

    status: Literal["none", "unique", "multiple", "undecided"]
    solutions: list[str]
    nodes: int
    ms: float
    root: int  # cells that propagation alone fixes at the root, givens not counted (l0)


@functools.cache
def lookup(ones: tuple[int, ...]) -> tuple[int, ...]:
    """Partners allowed by any digit of a set: one index is full arc consistency of a binary relation."""
    table = [0] * 1024
    for m in range(1, 1024):
        low = m & -m
        table[m] = table[m ^ low] | ones[low.bit_length() - 1]
    return tuple(table)


UNEQUAL = tuple(1023 & ~(1 << d) for d in range(10))


@functools.lru_cache(maxsize=512)
def plain_tables(n: int, groups: tuple[tuple[int, ...], ...], latin: bool):
    """Tables and groups of the plain rules: {(i, j): digits of j for each digit of i}, [cells]."""
    found = list(groups)
    if latin:
        found = [tuple(range(r * n, r * n + n)) for r in range(n)] + found
        found += [tuple(range(c, n * n, n)) for c in range(n)]
    pairs = {pair: UNEQUAL for group in found for pair in itertools.permutations(group, 2)}
    return pairs, found


class Solver:
    """Propagation and search for one set of constraints; `solve` takes any givens. Spec of the parts:

    start: candidates of each cell, a bit for each digit. tables: relations of two cells, merged, split into
    peers (unequal) and arcs (the rest). full: groups as large as the digit set, for hidden singles. props:
    n-ary propagators f(candidates) -> cells that changed, or None where nothing is left.
    """

    def __init__(self, p: Puzzle, clues: Iterable[Clue] | None = None):
        self.p, self.digits, self.clues = p, p.digits, tuple(p.clues if clues is None else clues)
        n, cells = p.n, p.n**2
        base, groups = plain_tables(n, p.groups, p.latin)
        self.tables, self.groups = dict(base), list(groups)
        self.start, self.props = [self.digits] * cells, []
        self.prop_mask = [0] * cells
        for clue in self.clues:
            RULES[clue.type].compile(self, clue)
        self.peers: list[list[int]] = [[] for _ in range(cells)]
        self.arcs: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in range(cells)]
        for (i, j), ones in self.tables.items():
            if ones is UNEQUAL:
                self.peers[i].append(j)
            else:
                self.arcs[i].append((j, lookup(ones)))
        size = self.digits.bit_count()
        self.full = [g for g in self.groups if len(g) == size]
        self.group_mask = [0] * cells
        for k, group in enumerate(self.full):
            for i in group:
                self.group_mask[i] |= 1 << k

    # what rules compile to

    def relate(self, i: int, j: int, ok: Callable[[int, int], bool]) -> None:
        """Digits a of cell i and b of cell j have ok(a, b)."""
        there = [0] * 10
        back = [0] * 10
        for a in BITS[self.digits]:
            for b in BITS[self.digits]:
                if ok(a, b):
                    there[a] |= 1 << b
                    back[b] |= 1 << a
        for key, ones in (((i, j), there), ((j, i), back)):
            if key in self.tables:
                ones = [x & y for x, y in zip(ones, self.tables[key], strict=True)]
            self.tables[key] = tuple(ones)

    def differ(self, cells: Sequence[int]) -> None:
        """Cells without a repeated digit."""
        if len(cells) > 2:
            self.groups.append(tuple(cells))
        for i, j in itertools.permutations(cells, 2):
            before = self.tables.get((i, j), UNEQUAL)
            if before is not UNEQUAL:
                before = tuple(x & y for x, y in zip(before, UNEQUAL, strict=True))
            self.tables[i, j] = before

    def watch(self, cells: Sequence[int], prune: Callable[[list[int]], list[int] | None]) -> None:
        """Run `prune` whenever one of the cells has changed."""
        for i in cells:
            self.prop_mask[i] |= 1 << len(self.props)
        self.props.append(prune)

    # search

    def propagate(self, cand: list[int], queue: list[int]) -> bool:
        """To the fixed point, in place: singles and arcs first, then one full group, then one propagator."""
        peers, arcs, group_mask, prop_mask = self.peers, self.arcs, self.group_mask, self.prop_mask
        groups = props = 0
        while True:
            while queue:
                i = queue.pop()
                m = cand[i]
                groups |= group_mask[i]
                props |= prop_mask[i]
                if not m & (m - 1):
                    for j in peers[i]:
                        x = cand[j]
                        if x & m:
                            if x == m:
                                return False
                            cand[j] = x ^ m
                            queue.append(j)
                for j, table in arcs[i]:
                    x = cand[j]
                    y = x & table[m]
                    if y != x:
                        if not y:
                            return False
                        cand[j] = y
                        queue.append(j)
            if groups:
                low = groups & -groups
                groups ^= low
                group = self.full[low.bit_length() - 1]
                once = twice = 0
                for i in group:
                    twice |= once & cand[i]
                    once |= cand[i]
                if once != self.digits:
                    return False
                if hidden := once & ~twice:
                    for i in group:
                        x = cand[i] & hidden
                        if x and x != cand[i]:
                            if x & (x - 1):
                                return False
                            cand[i] = x
                            queue.append(i)
            elif props:
                low = props & -props
                props ^= low
                changed = self.props[low.bit_length() - 1](cand)
                if changed is None:
                    return False
                queue += changed
            else:
                return True

    def root(self, givens: str) -> list[int] | None:
        """Candidates after propagation from the givens; None if that fails."""
        cand = list(self.start)
        for i, c in enumerate(givens):
            if c != ".":
                cand[i] &= 1 << int(c)
        return cand if all(cand) and self.propagate(cand, list(range(len(cand)))) else None

    def search(self, cand: list[int] | None, rng: random.Random | None = None) -> Iterator[list[int] | None]:
        """Yield a full grid for each solution, None for each other node: depth first, smallest cell first.

        It begins at what `root` returns, which it leaves as it is.
        """
        stack = [] if cand is None else [(cand, -1, 0)]
        if cand is None:
            yield None
        while stack:
            cand, i, digit = stack.pop()
            if i >= 0:
                cand = list(cand)
                cand[i] = digit
                if not self.propagate(cand, [i]):
                    yield None
                    continue
            best, least = -1, 11
            for j, m in enumerate(cand):
                if m & (m - 1):
                    size = m.bit_count()
                    if size < least:
                        best, least = j, size
                        if size == 2:
                            break
            if best < 0:
                grid = [m.bit_length() - 1 for m in cand]
                yield grid if all(RULES[c.type].check(self.p, c, grid) for c in self.clues) else None
                continue
            digits = list(BITS[cand[best]])
            if rng:
                rng.shuffle(digits)
            stack += [(cand, best, 1 << d) for d in reversed(digits)]
            yield None

    def solve(self, givens: str | None = None, limit: int = 2, nodes: int = 10**9, seconds: float = math.inf,
        rng: random.Random | None = None) -> Result:  # fmt: skip
        """Up to `limit` solutions. Out of nodes or time, or stopped by a limit of 1: undecided."""
        begin, givens = time.perf_counter(), self.p.givens if givens is None else givens
        found, count, complete = [], 0, True
        root = self.root(givens)
        for grid in self.search(root, rng):
            count += 1
            if grid is not None:
                found.append("".join(map(str, grid)))
            if (
                len(found) >= limit
                or count >= nodes
                or (not count % 64 and time.perf_counter() - begin > seconds)
            ):
                complete = False
                break
        status = (
            "multiple" if len(found) > 1 else "undecided" if not complete else "unique" if found else "none"
        )
        fixed = sum(not m & (m - 1) for m in root or ()) - sum(c != "." for c in givens)
        return Result(status, found, count, 1000 * (time.perf_counter() - begin), max(0, fixed))


def prove(p: Puzzle, nodes: int = 200_000, seconds: float = 60.0) -> Result:
    """Solve with proof; more than one solution, or none, or out of limits, is what `status` says."""
    return Solver(p).solve(nodes=nodes, seconds=seconds)


@dataclass
class Verdict:
    """A full or partial grid against a puzzle, section 4.4 of the protocol: see `verify`."""

    complete: bool
    givens_kept: bool
    violations: list[tuple[str, tuple[str, ...]]]
    matches_solution: bool
    sufficient: bool
    solved: bool
    warning: str = ""


def violations(p: Puzzle, grid: str) -> list[tuple[str, tuple[str, ...]]]:
    """What a full grid breaks: (row, column, box, region or family, cells)."""
    g = [int(c) for c in grid]
    _, groups = plain_tables(p.n, p.groups, p.latin)
    found = [
        ("repeat", tuple(p.name(i) for i in group))
        for group in groups
        if len({g[i] for i in group}) < len(group)
    ]
    return found + [
        (c.type, tuple(map(name_of, c.cells))) for c in p.clues if not RULES[c.type].check(p, c, g)
    ]


def sufficient(p: Puzzle) -> bool:
    """Whether the parsed constraints prove exactly one solution, which is the stored one if there is one."""
    if "sufficient" not in p.tags:
        found = prove(p)
        p.proof = {"status": found.status, "nodes": found.nodes, "ms": round(found.ms, 1)}
        stored = p.solution or "".join(found.solutions)
        p.tags["sufficient"] = found.status == "unique" and found.solutions[0] == stored
    return p.tags["sufficient"]


def verify(p: Puzzle, grid: str) -> Verdict:
    """Judge a grid of digits and dots, any text: usable as a reward. Nothing in it is executed or trusted.

    Where the constraints are sufficient, solved means complete, givens kept and no violation; else it means
    equal to the stored solution, and violations are evidence only.
    """
    size = p.n**2
    shaped = isinstance(grid, str) and re.fullmatch(rf"[0-9.]{{{size}}}", grid, re.A) is not None
    complete = shaped and "." not in grid and all(p.digits >> int(c) & 1 for c in grid)
    kept = shaped and all(a in (".", b) for a, b in zip(p.givens, grid, strict=True))
    broken = violations(p, grid) if complete else []
    same, enough, warning = shaped and grid == p.solution, sufficient(p), ""
    if p.solution and not enough and violations(p, p.solution):
        broken, warning = [], f"{p.id}: inconsistent parse, its stored solution breaks a parsed constraint"
    solved = bool(complete and kept and not broken) if enough else bool(same)
    if enough and p.solution and solved != same:
        warning = f"{p.id}: constraints and the stored solution disagree about this grid"
    return Verdict(bool(complete), bool(kept), broken, bool(same), enough, solved, warning)


# --- generator ---

GLOBAL = ("nonconsecutive", "diag+", "diag-", "windoku", "disjoint", "antiknight", "antiking")
AMOUNT = {4: 5, 6: 11, 9: 22}  # pairwise clues of a puzzle; other families get a share
PROOF_NODES = {4: 4000, 6: 1000, 9: 200}  # of one test while givens and clues are stripped
SHARE = {
    "killer": 0.6,
    "even": 0.4,
    "odd": 0.4,
    "quad": 0.35,
    "skyscraper": 0.5,
    "sandwich": 0.4,
    "xsum": 0.4,
}
SHARE |= {"littlekiller": 0.4, "clone": 0.15, "extra": 0.1, "minimum": 0.3, "maximum": 0.3}
LENGTHS = {  # fewest and most cells of a line, for each size
    "thermo": (3, 5), "slow": (3, 5), "whispers": (3, 5), "palindrome": (3, 5), "renban": (3, 5),
    "between": (3, 5), "regionsum": (3, 6), "modular": (3, 5), "arrow": (3, 4),
}  # fmt: skip
SAMPLERS: dict[str, Callable] = {}


def samples(*kinds: str) -> Callable:
    """Register a sampler(p, g, rng, kind, value) that yields clues of a family that hold in the grid g."""

    def register(f: Callable) -> Callable:
        SAMPLERS.update(dict.fromkeys(kinds, f))
        return f

    return register


def walk(n: int, rng: random.Random, length: int, straight: bool = False) -> list[Cell]:
    """A self-avoiding walk of king's (or rook's) moves, of `length` cells or as far as it got."""
    path = [(rng.randint(1, n), rng.randint(1, n))]
    while len(path) < length:
        r, c = path[-1]
        near = [(r + a, c + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if not (straight and a and b)]
        near = [x for x in near if 1 <= x[0] <= n and 1 <= x[1] <= n and x not in path]
        if not near:
            break
        path.append(rng.choice(near))
    return path


@samples("white", "black", "xv", "less", "pair", "whispers:2")
def sample_edges(p: Puzzle, g, rng, kind: str, value: str):
    edges = orthogonal(p.n)
    if value == "equal":  # cells that share an edge differ
        edges = leaps(p.n, KING + KNIGHT)
    rng.shuffle(edges)
    for i, j in edges:
        if kind == "less" and g[i] > g[j]:
            i, j = j, i
        clue = Clue(kind, (divide(p.n, i), divide(p.n, j)), value)
        if RULES[kind].check(p, clue, g):
            yield clue


@samples(*LENGTHS)
def sample_lines(p: Puzzle, g, rng, kind: str, value: str):
    low, high = LENGTHS[kind]
    for _ in range(500):
        cells = walk(p.n, rng, rng.randint(low, min(high, p.n - (p.n == 4))))
        clue = Clue(kind, tuple(cells), value)
        if (
            len(cells) >= low
            and RULES[kind].check(p, clue, g)
            and (kind != "regionsum" or len(segments(p, clue)) > 1)
        ):
            yield clue


@samples("killer", "extra")
def sample_cages(p: Puzzle, g, rng, kind: str, value: str):
    for _ in range(200):
        size = rng.randint(2, 3 if p.n == 4 else 4) if kind == "killer" else p.n
        cage, digits = [(rng.randint(1, p.n), rng.randint(1, p.n))], set()
        while len(cage) < size:
            digits = {g[p.index(x)] for x in cage}
            near = {(r + a, c + b) for r, c in cage for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))}
            near = [
                x
                for x in sorted(near)
                if 1 <= x[0] <= p.n and 1 <= x[1] <= p.n and g[p.index(x)] not in digits
            ]
            if not near:
                break
            cage.append(rng.choice(near))
        inside = {p.index(x) for x in cage}
        _, groups = plain_tables(p.n, p.groups, True)
        if len(cage) == size and not (kind == "extra" and any(inside <= set(group) for group in groups)):
            yield Clue(kind, tuple(sorted(cage)), str(sum(g[i] for i in inside)) if kind == "killer" else "")


@samples("even", "odd", "minimum", "maximum")
def sample_cells(p: Puzzle, g, rng, kind: str, value: str):
    for i in rng.sample(range(p.n**2), p.n**2):
        clue = Clue(kind, (divide(p.n, i),))
        if RULES[kind].check(p, clue, g):
            yield clue


@samples("clone")
def sample_clones(p: Puzzle, g, rng, kind: str, value: str):
    for _ in range(500):
        cells, dr, dc = walk(p.n, rng, 3, True), rng.randint(-p.n, p.n), rng.randint(-p.n, p.n)
        there = [(r + dr, c + dc) for r, c in cells]
        if all(1 <= r <= p.n and 1 <= c <= p.n for r, c in there) and not set(there) & set(cells):
            clue = Clue(kind, (*cells, *there))
            if RULES[kind].check(p, clue, g):
                yield clue


@samples("quad")
def sample_quads(p: Puzzle, g, rng, kind: str, value: str):
    for i in rng.sample(range((p.n - 1) ** 2), (p.n - 1) ** 2):
        r, c = i // (p.n - 1) + 1, i % (p.n - 1) + 1
        cells = ((r, c), (r, c + 1), (r + 1, c), (r + 1, c + 1))
        digits = rng.sample([g[p.index(x)] for x in cells], 2 if p.n == 4 else 3)
        yield Clue(kind, cells, "".join(map(str, sorted(digits))))


@samples("sandwich", "skyscraper", "xsum", "littlekiller")
def sample_outside(p: Puzzle, g, rng, kind: str, value: str):
    n, k = p.n, range(1, p.n + 1)
    places = [(0, c) for c in k] + [(r, 0) for r in k]
    if kind != "sandwich":
        places += [(n + 1, c) for c in k] + [(r, n + 1) for r in k]
    rng.shuffle(places)
    for r, c in places:
        if kind == "littlekiller":
            into = 1 if 0 in (r, c) else -1
            step = [(r + into, c + s) if r in (0, n + 1) else (r + s, c + into) for s in (-1, 1)]
            cells = ((r, c), rng.choice(step))
            if not all(1 <= x <= n for x in cells[1]) or len(ray(p, Clue(kind, cells, "0"))) < 2:
                continue
            yield Clue(kind, cells, str(sum(g[i] for i in ray(p, Clue(kind, cells, "0")))))
            continue
        row = [g[i] for i in sight(p, Clue(kind, ((r, c),), "0"))]
        a, b = sorted((row.index(min(row)), row.index(max(row))))
        seen = sum(x > max(row[:j], default=-1) for j, x in enumerate(row))
        total = {"sandwich": sum(row[a + 1 : b]), "skyscraper": seen, "xsum": sum(row[: row[0]])}[kind]
        yield Clue(kind, ((r, c),), str(total))


def sample_negative(p: Puzzle, g, rng, value: str) -> list[Clue]:
    """All dots of the named kinds, one an edge, and the rule that all are drawn."""
    found = []
    for i, j in orthogonal(p.n):
        fits = [
            (k, v)
            for k in value.split("+")
            for v in ((5, 10) if k == "xv" else (DOTS[k],))
            if dot(k, v)(g[i], g[j])
        ]
        if fits:
            kind, v = rng.choice(fits)
            found.append(Clue(kind, (divide(p.n, i), divide(p.n, j)), "" if v == DOTS[kind] else str(v)))
    return [*found, Clue("neg", (), value)]


def bad_family(family: str) -> str:
    """What is wrong with a family to generate with, as KIND or KIND:VALUE; "" if nothing is."""
    kind, colon, value = family.partition(":")
    known = (*GLOBAL, *SAMPLERS, "neg")
    if kind not in known:
        return f"{kind} is none of {', '.join(k for k in RULES if k in known)}"
    if kind in ("neg", "pair"):
        of = DOTS if kind == "neg" else RELATIONS
        ok = set(value.split("+") if kind == "neg" else [value]) <= set(of)
        return "" if ok else f"{kind} takes {' or '.join(of)}, as in {kind}:{next(iter(of))}"
    if kind in ("white", "black", "xv", "whispers"):
        return (
            "" if re.fullmatch(r"[1-9][0-9]?", value if colon else "1", re.A) else f"{family} has no number"
        )
    return f"{kind} takes no value" if colon else ""


def sample(p: Puzzle, g, rng, family: str, parts: int) -> list[Clue]:
    """Clues of one of `parts` families that hold in g; lines and shapes of a family do not overlap."""
    kind, _, value = family.partition(":")
    if kind in GLOBAL:
        return [Clue(kind)]
    if kind == "neg":
        return sample_negative(p, g, rng, value)
    share = SHARE.get(kind, 0.3 if kind in LENGTHS and family != "whispers:2" else 1.0)
    want = max(1, round(AMOUNT[p.n] * share * rng.uniform(0.7, 1.3) / (1 + (parts - 1) / 2)))
    found, used = [], set()
    for clue in SAMPLERS.get(family, SAMPLERS[kind])(p, g, rng, kind, value):
        cells = set(clue.cells)
        if kind in (*LENGTHS, "killer", "extra", "clone") and cells & used:
            continue
        found.append(clue)
        used |= cells
        if len(found) == want:
            break
    return found


def jigsaw(n: int, rng: random.Random) -> tuple[tuple[int, ...], ...]:
    """Irregular regions: cells of the boxes swapped across borders while every region stays connected."""
    home = [0] * n**2
    for k, box in enumerate(boxes(n)):
        for i in box:
            home[i] = k
    near = [[] for _ in home]
    for i, j in orthogonal(n):
        near[i].append(j)
        near[j].append(i)

    def connected(k: int) -> bool:
        cells = [i for i in range(n * n) if home[i] == k]
        seen, todo = {cells[0]}, [cells[0]]
        while todo:
            for j in near[todo.pop()]:
                if home[j] == k and j not in seen:
                    seen.add(j)
                    todo.append(j)
        return len(seen) == n

    swaps = 0
    for _ in range(100 * n):
        i = rng.randrange(n * n)
        a = home[i]
        b = home[rng.choice(near[i])]
        border = [j for j in range(n * n) if home[j] == b and any(home[k] == a for k in near[j])]
        if a == b or not border:
            continue
        j = rng.choice(border)
        home[i], home[j] = b, a
        if connected(a) and connected(b):
            swaps += 1
        else:
            home[i], home[j] = a, b
        if swaps == 3 * n:
            break
    return tuple(tuple(i for i in range(n * n) if home[i] == k) for k in range(n))


def strip(solver: Solver, solution: str, rng: random.Random, nodes: int) -> str | None:
    """Remove givens while the solution is provably the only one: minimal, but for the limit of nodes."""
    unique = lambda givens: solver.solve(givens, nodes=nodes).status == "unique"  # noqa: E731
    size = len(solution)
    givens, order, block = list(solution), rng.sample(range(size), size), size
    single = set()  # cells that must stay, each tested alone
    while block:
        left = [i for i in order if givens[i] != "." and i not in single]
        for k in range(0, len(left), block):
            part = left[k : k + block]
            trial = ["." if i in part else c for i, c in enumerate(givens)]
            if unique("".join(trial)):
                givens = trial
            elif block == 1:
                single.add(part[0])
        block = block // 3 if block > 3 else int(block > 1)
    return "".join(givens)


def tag(p: Puzzle, solver: Solver, found: Result) -> None:
    """Proof and difficulty: l0, search nodes, completions under plain rules (capped), and `interact`."""
    kinds = sorted({c.type + (f":{c.value}" if c.type in ("neg", "pair") else "") for c in p.clues})
    p.proof = {"status": found.status, "nodes": found.nodes, "ms": round(found.ms, 2)}
    alone = [Solver(p, [c for c in p.clues if c.type == k]) for k in {c.type for c in p.clues}]
    given = sum(c != "." for c in p.givens)
    fixed = [sum(not m & (m - 1) for m in s.root(p.givens) or []) - given for s in alone]
    plain = Solver(p, ()).solve(limit=300, nodes=3000)
    p.tags |= {"families": kinds, "l0": found.root, "nodes": found.nodes, "vanilla": len(plain.solutions)}
    p.tags["interact"] = int(bool(alone) and found.root > 0 and max(fixed) <= 0)


def generate(n: int, families: Sequence[str], rng: random.Random, name: str = "g", irregular: bool = False,
    strict: bool = True, lean: bool = True, accept: Callable[[str], bool] | None = None,
        tagged: bool = True) -> Puzzle | None:  # fmt: skip
    """One puzzle with a proved unique solution, or None where this draw of grid and clues has failed.

    strict: dropping any one family breaks uniqueness; plain rules alone never suffice.
    lean: drop clues that are not needed. accept: a test of the solution. The rng decides everything.
    """
    nodes = PROOF_NODES[n]
    p = Puzzle(
        name,
        n,
        "." * n**2,
        tuple(Clue(f) for f in families if f in GLOBAL),
        None,
        jigsaw(n, rng) if irregular else None,
    )
    solver = Solver(p)
    grid = next((g for g in itertools.islice(solver.search(solver.root(p.givens), rng), 3000) if g), None)
    if grid is None:
        return None
    p.solution = "".join(map(str, grid))
    if accept and not accept(p.solution):
        return None
    for family in families:
        clues = [] if family in GLOBAL else sample(p, grid, rng, family, len(families))
        if not clues and family not in GLOBAL:
            return None
        p.clues += tuple(clues)
    solver = Solver(p)
    p.givens = strip(solver, p.solution, rng, nodes)
    if families and not irregular and Solver(p, ()).solve(nodes=nodes).status == "unique":
        return None
    if lean:
        for clue in rng.sample(p.clues, len(p.clues)):
            rest = tuple(c for c in p.clues if c != clue)
            fixed = clue.type in GLOBAL or any(
                c.type == "neg" and clue.type in (*c.value.split("+"), "neg") for c in p.clues
            )
            needed = fixed or all(c.type != clue.type for c in rest)
            if not needed and Solver(p, rest).solve(nodes=nodes).status == "unique":
                p.clues = rest
        solver = Solver(p)
    if strict:
        for clues in without_a_family(p):
            if Solver(p, clues).solve(nodes=100 * nodes).status != "multiple":
                return None
    found = solver.solve(nodes=200_000)
    if found.status != "unique" or found.solutions[0] != p.solution:
        return None
    if tagged:
        tag(p, solver, found)
    return p


def without_a_family(p: Puzzle) -> Iterator[list[Clue]]:
    """The clues without each family in turn; a negative rule and its dots are one."""
    dotted = {k for c in p.clues if c.type == "neg" for k in ("neg", *c.value.split("+"))}
    for kind in sorted({c.type for c in p.clues} - dotted | ({"neg"} if dotted else set())):
        yield [c for c in p.clues if c.type != kind and not (kind == "neg" and c.type in dotted)]


SUITE_FAMILIES = {  # family: sizes it is used at in mini_48
    **dict.fromkeys(
        ("killer", "thermo", "arrow", "white", "black", "neg:white+black", "xv", "renban", "whispers",
         "palindrome", "antiknight", "between", "quad", "sandwich", "littlekiller", "skyscraper", "regionsum",
         "even", "odd", "less", "extra"), (4, 6, 9)),
    **dict.fromkeys(("clone", "nonconsecutive", "antiking", "xsum", "modular", "minimum"), (6, 9)),
    "neg:xv": (6, 9), "diag+": (4, 9), "diag-": (6, 9), "windoku": (9,), "disjoint": (6, 9), "slow": (6, 9),
}  # fmt: skip


def clash(families: Sequence[str]) -> bool:
    """Families that leave few or no grids, or say the same thing twice."""
    kinds = [f.split(":")[0] for f in families]
    both = set(families)
    strong = both & {"antiknight", "antiking", "nonconsecutive", "neg:white+black", "neg:xv", "disjoint"}
    dotted = "neg" in kinds and both & {"white", "black", "xv"}
    return len(strong) > 1 or bool(dotted) or len(set(kinds)) < len(kinds)


def gen_suite(seed: int = 0) -> Iterator[Puzzle]:
    """The 48 puzzles of mini_48: per size 2 plain, 2 jigsaws, 12 of one to three families."""
    used = collections.Counter()
    for n in (4, 6, 9):
        sizes = [0, 0, -1, -2, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
        for k, size in enumerate(sizes):
            rng, p, count = random.Random(f"{seed} {n} {k}"), None, abs(size) if size > 0 else int(size == -2)
            tries, at_once = 0, size > 0 and k % 2 == 0  # half of the variants aim at l0 = 0
            while p is None or (at_once and p.tags["l0"] and tries < 150):
                tries += 1
                deck = [f for f, where in SUITE_FAMILIES.items() if n in where]
                rng.shuffle(deck)
                deck.sort(key=lambda f: used[f])
                if size == -2:
                    deck = [
                        f
                        for f in deck
                        if f in ("killer", "thermo", "white", "less", "even", "odd", "palindrome")
                    ]
                families = [deck[0]] if count else []
                for f in deck[1:]:
                    if len(families) < count and not clash([*families, f]):
                        families.append(f)
                if tries > 25:  # this combination has no puzzle, or none without an easy start
                    families = rng.sample(deck, count)
                    if clash(families):
                        continue
                p = generate(n, families, rng, f"m{n}-{k + 1:02d}", size < 0) or p
            used.update(p.tags["families"])
            yield p


# one puzzle a line; do not train on these
MINI_48 = """
m4-01|4|4....2.....1.3..||4123321424311342
m4-02|4|....3....1.4..2.||1243341221344321
m4-03|4|..2.1..........3|region accdacddacbdabbb|3124143223414213
m4-04|4|3..........4..1.|region cadbcadbcadbcadb;white 13 23;white 11 12|3241413213242413
m4-05|4|.....1...4.2....|diag+|2341412314323214
m4-06|4|..2..........3.4|between 31 41 42|4123324114322314
m4-07|4|................|killer:6 21 31 32;killer:7 23 24 34;killer:6 11 12|2413132432414132
m4-08|4|................|black 12 13;black 13 14;black 21 22;black 22 23;white 31 32;white 32 33;white 42 43;white 43 44;white 11 21;black 12 22;white 13 23;white 14 24;black 21 31;white 22 32;white 31 41;white 32 42;white 33 43;white 34 44;neg:white+black|3124421323411432
m4-09|4|.......24.......|whispers 21 22 11;littlekiller:5 25 34|2341143242133124
m4-10|4|1.............3.|antiknight;arrow 41 42 33|1243342143122134
m4-11|4|...2......2.....|less 34 44;less 41 42;regionsum 23 22 11|3412214343211234
m4-12|4|......3..4......|renban 32 22 31;quad:13 12 13 22 23|4312123434212143
m4-13|4|..............2.|quad:13 12 13 22 23;less 14 13;less 31 41;less 33 34;even 32|2143431212343421
m4-14|4|2...............|xv 22 32;xv 42 43;thermo 44 34 33;palindrome 34 24 23|2314142331424231
m4-15|4|...2..4.........|skyscraper:3 04;sandwich:0 30;extra 22 32 41 42|4132324124131324
m4-16|4|.1..............|antiknight;odd 44;skyscraper:2 04|4132231432411423
m6-01|6|5....124...5..3...6..2...1..6.......||536421241635123546654213415362362154
m6-02|6|.....2..5.6.3........63.25.....4.1..||436512125463364251512634251346643125
m6-03|6|.....32......3..261......4........1.|region caabbbcaabbbccadddccafddeeefdfeeefff|416253253461534126162345641532325614
m6-04|6|....4...............5...............|region aaaabbcabbbbcaddddceeeddceeeffccffff;killer:10 12 21 22 23;killer:5 34 35;killer:9 31 32 42;killer:7 55 56|536241142563614325325416463152251634
m6-05|6|.....6...1........5...........3.4..5|modular 55 46 35 44 45;modular 65 54 53 42;modular 22 12 21 31|132456456132263541541263615324324615
m6-06|6|......4....1.1.5..2.4...3...4.....3.|disjoint|136452425361613524254613361245542136
m6-07|6|...5..........6...5.....2.1.3..4.1..|diag-|462513315642126354534261251436643125
m6-08|6|....3...............................|xv:10 12 13;xv 23 24;xv 33 34;xv 13 23;xv 15 25;xv:10 26 36;xv:10 31 41;xv 33 43;xv 41 51;xv:10 45 55;xv 55 65;neg:xv|264531531426613254452163126345345612
m6-09|6|.....................1.........5....|antiking;xsum:10 40;xsum:13 17;xsum:18 06|536214241356165423423165614532352641
m6-10|6|....3......6.3...55....2...6.......1|slow 24 13 22;minimum 52;minimum 46|162534354216236145541362415623623451
m6-11|6|............6....................1..|nonconsecutive;clone 16 15 25 33 32 42|153642426315642531315264531426264153
m6-12|6|.............3..........3.........6.|littlekiller:18 71 62;littlekiller:12 60 51;littlekiller:14 47 36;sandwich:9 10|513426426153132645645231364512251364
m6-13|6|.3..............2.......15..........|disjoint;xsum:19 10;xsum:7 06;between 66 56 55;between 13 14 23 12 21|536412214635645321321546153264462153
m6-14|6|..2.................3......4........|modular 21 11 22 23 24;regionsum 51 41 42;black 52 62;black 43 44;black 34 35;black 62 63|562314431526156243243651615432324165
m6-15|6|..2.4.4...1.........3........6......|thermo 64 55 65;minimum 51;palindrome 46 55 64;palindrome 51 41 32|512643436215125364643521251436364152
m6-16|6|5........3........3......3.4.5......|slow 65 66 56;slow 42 53 63;renban 11 22 12 23 13;renban 43 32 33;extra 24 33 34 44 54 64|523641641352256134314526132465465213
m9-01|9|....7......1..3.4..732..9......48..6.6..32.....97...8..14....53.864.......7.....1||492571638651893247873264915235948176768132594149756382914627853386415729527389461
m9-02|9|...2.....27...491.....9...8.61...5..8.27........13.....5796.......3..1...8...7.6.||918273456276584913543691728461829537832745691795136842157962384624358179389417265
m9-03|9|.......9...........6..1.....1...9........5..17.....3..1..6........9..2.4.....3.75|region aaabcccccaaabbbbccdaabbbbccddaeeefffddddeffffddeeeeeffgggghiiiigghhhiiiiggghhhhhi|587231496231794658469318527614579832923845761756182349145627983378956214892463175
m9-04|9|..........53.9....6.1.....3........6.....3.8.1.......2.........5...6....8....4..1|region abbbbbbbcaaadbbcccaaddccccfadddceeffadeeeeiffadgeeeiffgdghhhiffggghiiiiiggghhhhhi;even 66;even 47;even 65|947321658253498167681745923798532416465173289134986572329617845512869734876254391
m9-05|9|......6......5............5.....................1..8.........3.........1.4..1.2..|sandwich:30 20;sandwich:4 60;sandwich:13 04;sandwich:11 50;sandwich:29 40;sandwich:11 06;sandwich:15 03;sandwich:0 08;sandwich:15 30|574392618316458792892671345963785124481236957257149863128567439639824571745913286
m9-06|9|...........9...........6.1..5...3..9...1.........2..8.......678.6.8.2.....4.....2|windoku|127594863639718254548236917251683749896147325473925186312459678965872431784361592
m9-07|9|.................................................................................|black 12 13;white 14 15;black 22 23;white 25 26;white 32 33;black 33 34;white 34 35;white 41 42;white 43 44;white 46 47;black 51 52;black 55 56;white 58 59;white 62 63;white 68 69;black 71 72;black 74 75;white 78 79;black 82 83;white 13 23;white 14 24;white 28 38;white 32 42;white 35 45;white 38 48;white 43 53;white 46 56;white 51 61;white 58 68;black 61 71;white 63 73;white 64 74;white 67 77;white 68 78;white 69 79;white 72 82;black 78 88;black 81 91;white 84 94;white 88 98;neg:white+black|163872594742956831598431627986725413217384965354169278635247189821593746479618352
m9-08|9|........................................................71.......................|xv:10 22 23;xv:10 28 29;xv 33 34;xv:10 34 35;xv 42 43;xv:10 52 53;xv:10 54 55;xv:10 58 59;xv:10 64 65;xv:10 83 84;xv:10 92 93;xv:10 97 98;xv 17 27;xv:10 27 37;xv 33 43;xv:10 41 51;xv 64 74;xv:10 74 84;xv:10 89 99;neg:xv|459317268728654391613289745132598476964731582875462139397126854581943627246875913
m9-09|9|5......1..7.........3..................34....4...............5....2..97.6..8....4|antiking;arrow 73 72 63;arrow 38 28 39;arrow 33 32 43;arrow 96 85 86|564783219879125436213496785952678143187349562436512897728934651345261978691857324
m9-10|9|3.1....5.........8.........6......4....597...58............8......9.4....17.....5|diag+;odd 37;odd 65;odd 53|361849257754321968928675134679182543143597682582436719495718326236954871817263495
m9-11|9|...6..9........3..7..2.........9.6..........9..4........3....9...........8.54...1|diag-;windoku|842635917591784326736219584358491672617352849924867153463178295175926438289543761
m9-12|9|6..............2.1.....4.......39................2...4.67.9...2.........3.....7.8|whispers 63 64 65;whispers 47 48 59 58;whispers 24 15 16;whispers 21 22 12 23;clone 32 42 43 54 64 65|625981473498375261713264859872439615946158327531726984167893542289547136354612798
m9-13|9|....................5..................135.......2....2.4....9.............4.....|xsum:40 a5;xsum:45 02;xsum:23 5a;xsum:39 a7;less 27 26;less 95 85;less 33 43;less 82 72;sandwich:6 08;sandwich:5 40;sandwich:0 03;sandwich:19 60;sandwich:18 30|798654123132978546645213879586749231927135684413826957274561398851397462369482715
m9-14|9|...............................8.............1..3.................2..............|nonconsecutive;thermo 46 56 65;thermo 26 27 17;thermo 61 52 63;thermo 58 59 48 57;slow 89 99 88;slow 91 92 81 82 71|684135792351792468927468135492681573735924816168357249813579624579246381246813957
m9-15|9|.....76.........2..........8......5.........4............4........2...........8..|antiknight;whispers 99 89 88;whispers 38 28 39;whispers 43 54 53 63;whispers 97 87 96;modular 68 67 66;modular 74 75 85;modular 19 18 27|948327615175694328326518497834172956751936284269845731693481572587263149412759863
m9-16|9|.........8.........9.............59...........1...........3......46.............7|windoku;disjoint;palindrome 62 63 54;palindrome 37 27 16;palindrome 33 44 55|245387169871496325396521784623874591587169243419253678958732416734618952162945837
"""  # noqa: E501


# --- links: SudokuPad (scl, ctc, fpuz) and f-puzzles, in and out ---


class LinkError(UserError):
    """A link that cannot be read: its head, the stage (url, lz, unzip, json, schema), and what to do."""

    def __init__(self, link: str, stage: str, hint: str):
        super().__init__(f"link {printable(link)[:40]!r}: {stage}: {hint}")
        self.stage = stage


LZ_ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
MOST_DECODED = 1_000_000  # characters; a longer puzzle is none


def lz_compress(text: str) -> str:
    """lz-string's base64 of UTF-16 code units, also those of 256 and more, which the paper's code loses."""
    raw = text.encode("utf-16-le", "surrogatepass")
    units = [chr(raw[k] | raw[k + 1] << 8) for k in range(0, len(raw), 2)]
    codes: dict[str, int] = {}
    fresh: set[str] = set()
    bits: list[int] = []
    width, room, size, w = 2, 2, 3, ""

    def emit(value: int, count: int) -> None:
        bits.extend(value >> k & 1 for k in range(count))

    def grow() -> None:
        nonlocal room, width
        room -= 1
        if not room:
            room, width = 2**width, width + 1

    def write(w: str, last: bool = False) -> None:
        if w in fresh:
            wide = ord(w[0]) > 255
            emit(int(wide), width)
            emit(ord(w[0]), 16 if wide else 8)
            fresh.remove(w)
            grow()
            if last:  # one step fewer, as SudokuPad's own links; padding stands in for the bit that may miss
                return
        else:
            emit(codes[w], width)
        grow()

    for unit in units:
        if unit not in codes:
            codes[unit] = size
            size += 1
            fresh.add(unit)
        if w + unit in codes:
            w += unit
            continue
        write(w)
        codes[w + unit] = size
        size += 1
        w = unit
    if w:
        write(w, last=True)
    emit(2, width)
    bits += [0] * (6 - len(bits) % 6)
    values = [int("".join(map(str, bits[k : k + 6])), 2) for k in range(0, len(bits), 6)]
    code = "".join(LZ_ALPHABET[v] for v in values)
    return code + "=" * (-len(code) % 4)


def lz_decompress(code: str) -> str:
    """The text of `lz_compress`; ValueError where it is truncated, no such code, or over a megabyte."""
    values = [LZ_ALPHABET.find(c) for c in code.rstrip("=\\")]
    if -1 in values:
        raise ValueError(f"{code[values.index(-1)]!r} is not in the alphabet")
    stream = (v >> k & 1 for v in values for k in range(5, -1, -1))

    def read(count: int) -> int:
        try:
            return sum(next(stream) << k for k in range(count))
        except (StopIteration, RuntimeError):
            raise ValueError("truncated") from None

    table: dict[int, str] = {}
    width, room, size, total, w, out = 3, 4, 4, 0, "", []
    code_ = read(2)
    while True:
        if code_ == 2:
            break
        if code_ < 2:
            table[3 if not out else size] = chr(read(16 if code_ else 8))
            if out:
                code_, size, room = size, size + 1, room - 1
                if not room:
                    room, width = 2**width, width + 1
            else:
                code_ = 3
        elif code_ not in table and code_ != size:
            raise ValueError("not a code of lz-string")
        entry = table[code_] if code_ in table else w + w[0]
        out.append(entry)
        total += len(entry)
        if total > MOST_DECODED:
            raise ValueError("more than a megabyte")
        if w:
            table[size] = w + entry[0]
            size, room = size + 1, room - 1
            if not room:
                room, width = 2**width, width + 1
        w = entry
        code_ = read(width)
    raw = "".join(out).encode("utf-16-le", "surrogatepass")
    return raw.decode("utf-16-le", "replace")


SHORT = {
    "c": "color", "ca": "cages", "ct": "center", "c1": "borderColor", "c2": "backgroundColor", "ce": "cells",
    "cs": "cellSize", "a": "arrows", "o": "overlays", "u": "underlays", "w": "width", "h": "height",
    "v": "value", "vd": "videos", "l": "lines", "r": "rounded", "re": "regions", "fs": "fontSize",
    "th": "thickness", "hl": "headLength", "wp": "wayPoints", "t": "title", "te": "text", "d": "duration",
    "d2": "d",
}  # fmt: skip


class Unzip:
    """SudokuPad's shortened JSON: ' for ", bare and short keys, {} left out of arrays, t, f, #0, hex."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0
        self.quote = '"' if '"' in text else "'"

    def read(self):
        value = self.value()
        if self.text[self.at :].strip():
            raise ValueError(f"more text at {self.at}")
        return value

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
            self.at += 1
        return self.text[self.at : self.at + 1]

    def value(self):
        c = self.peek()
        if c == "[":
            return self.items("]", self.item)
        if c == "{":
            return dict(self.items("}", self.pair))
        return self.quoted() if c and c in "\"'" else self.word()

    def items(self, end: str, read: Callable) -> list:
        self.at, self.depth, found = self.at + 1, self.depth + 1, []
        if self.depth > 40:
            raise ValueError("nested too deeply")
        if self.peek() == end and end == "}":
            self.at += 1
        else:
            while True:
                found.append(read())
                c = self.peek()
                self.at += 1
                if c == end:
                    break
                if c != ",":
                    raise ValueError(f"expected , or {end} at {self.at - 1}")
        self.depth -= 1
        return found

    def item(self):
        return {} if self.peek() in (",", "]") else self.value()

    def pair(self) -> tuple[str, object]:
        key = self.quoted() if self.peek() in ('"', "'") else self.bare(":")
        if self.peek() != ":":
            raise ValueError(f"expected : at {self.at}")
        self.at += 1
        return SHORT.get(key, key), self.value()

    def quoted(self) -> str:
        quote, out = self.text[self.at], []
        self.at += 1
        while (c := self.text[self.at : self.at + 1]) != quote:
            if c == "\\":
                self.at += 1
                c = self.text[self.at : self.at + 1]
                if c == "u":
                    c = chr(int(self.text[self.at + 1 : self.at + 5], 16))
                    self.at += 4
                else:
                    c = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}.get(c, c)
            if not c:
                raise ValueError("a string does not end")
            out.append(c)
            self.at += 1
        self.at += 1
        return "".join(out).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def bare(self, ends: str) -> str:
        begin = self.at
        while self.at < len(self.text) and self.text[self.at] not in ends:
            self.at += 1
        return self.text[begin : self.at].strip()

    def word(self):
        word = self.bare(",]}")
        known = {
            "t": True,
            "true": True,
            "f": False,
            "false": False,
            "null": None,
            "#0": "#000000",
            "#F": "#FFFFFF",
        }
        if word in known:
            return known[word]
        if re.fullmatch(r"[0-9a-fA-F]{6}", word):
            return f"#{word}"
        if re.fullmatch(r"-?[0-9]{1,15}", word):
            return int(word)
        if re.fullmatch(r"-?[0-9]{0,15}\.?[0-9]{1,20}([eE][-+]?[0-9]{1,3})?", word):
            return float(word)
        raise ValueError(f"{word[:20]!r} is no value")


def payload_of(link: str) -> tuple[str, str]:
    """(kind, data) of a link: kind is scl, fpuz, or "" where it has no prefix."""
    text = link.strip()
    if "://" in text:
        try:
            parts = urllib.parse.urlsplit(text)
            host = parts.hostname or ""
        except ValueError:
            raise LinkError(link, "url", "no address") from None
        if not re.search(
            r"(^|\.)(sudokupad\.app|crackingthecryptic\.com|f-puzzles\.com|svencodes\.com)$", host
        ):
            raise LinkError(link, "url", "neither sudokupad.app nor f-puzzles.com")
        query = dict(x.split("=", 1) for x in parts.query.split("&") if "=" in x)
        text = query.get("load") or query.get("puzzleid") or parts.path.removeprefix("/sudoku").lstrip("/")
        if "load" in query:
            text = "fpuzzles" + text
    plain = urllib.parse.unquote(text)
    text = (plain if len(plain) < len(text) else text).replace(" ", "+")
    for prefix, kind in (("scl", "scl"), ("ctc", "scl"), ("fpuzzles", "fpuz"), ("fpuz", "fpuz")):
        if text.startswith(prefix):
            return kind, text[len(prefix) :].rstrip("=\\")
    return "", text.rstrip("=\\")


def decode_payload(link: str, data: str) -> dict:
    """The JSON of a payload; a slash lost from a double one is put back where that helps."""
    tries = [data, *[data[: m.start()] + "/" + data[m.start() :] for m in re.finditer("/", data)][:50]]
    error = None
    for attempt in tries:
        try:
            text = lz_decompress(attempt)
        except ValueError as e:
            error = error or LinkError(link, "lz", f"{e}; was the link cut off?")
            continue
        stage = "json"
        try:
            try:
                found = json.loads(text)
            except ValueError:
                stage = "unzip"
                found = Unzip(text).read()
            if isinstance(found, dict):
                return found
            error = error or LinkError(link, stage, "not an object")
        except (ValueError, RecursionError, OverflowError) as e:
            error = error or LinkError(link, stage, f"{printable(str(e))[:80]}")
    raise error


def import_link(link: str, fetch: bool = False, infer: bool = False) -> Puzzle:
    """A Puzzle from a SudokuPad or f-puzzles link or bare data; LinkError names the stage that failed."""
    kind, data = payload_of(link)
    if not kind and len(data) < 40 and re.fullmatch(r"[\w/-]+", data):
        if not fetch:
            raise LinkError(link, "url", "a short id; --fetch asks the network for it")
        kind, data = payload_of(fetch_short(link, data))
    found = decode_payload(link, data)
    try:
        p = from_fpuzzles(found) if kind == "fpuz" or (not kind and "grid" in found) else from_scl(found)
        p.encoded, p.elements = link.strip(), read_elements(p.elements)
        return guess(p) if infer else p
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as e:
        raise LinkError(link, "schema", printable(f"{type(e).__name__} {e}")[:120]) from None


def fetch_short(link: str, name: str) -> str:
    """Ask SudokuPad, its mirror and its old store for a short id, ten seconds each."""
    quoted = urllib.parse.quote(name, safe="")
    places = (f"https://sudokupad.app/api/puzzle/{quoted}",
        f"https://sudokupad.svencodes.com/ctclegacy/{quoted}",
        f"https://firebasestorage.googleapis.com/v0/b/sudoku-sandbox.appspot.com/o/{quoted}?alt=media",
        )  # fmt: skip
    why = ""
    for place in places:
        try:
            with urllib.request.urlopen(place, timeout=10) as answer:
                text = answer.read(MOST_DECODED).decode("utf-8", "replace")
            return "scl" + lz_compress(text) if text.lstrip().startswith("{") else text
        except (OSError, ValueError) as e:
            why = str(e)
    raise LinkError(link, "url", f"no answer for the short id ({printable(why)[:60]})")


FPUZZLES = {"thermometer": "thermo", "palindrome": "palindrome", "renban": "renban", "whispers": "whispers",
    "regionsumline": "regionsum", "modularline": "modular", "betweenline": "between", "arrow": "arrow",
    "killercage": "killer", "extraregion": "extra", "difference": "white", "ratio": "black", "xv": "xv",
    "quadruple": "quad", "clone": "clone", "odd": "odd", "even": "even", "minimum": "minimum",
    "maximum": "maximum", "littlekillersum": "littlekiller", "sandwichsum": "sandwich", "xsum": "xsum",
    "skyscraper": "skyscraper"}  # its keys and our families  # fmt: skip
FLAGS_IN = {"diagonal+": "diag+", "diagonal-": "diag-", "antiknight": "antiknight", "antiking": "antiking",
    "nonconsecutive": "nonconsecutive", "disjointgroups": "disjoint"}  # fmt: skip
NEGATIVE_IN = {"difference": "white", "ratio": "black", "xv": "xv"}
DIRECTIONS = {"UL": (-1, -1), "UR": (-1, 1), "DL": (1, -1), "DR": (1, 1)}
COSMETIC = ("line", "circle", "rectangle", "text", "cage")
ABOUT = (
    "size",
    "grid",
    "title",
    "author",
    "ruleset",
    "solution",
    "negative",
    "sudoku_bench",
    "metadata",
    "id",
    "highlightConflicts",
)


def solution_text(value, n: int) -> str | None:
    """A stored solution as n^2 digits; None where it is absent or has unknown cells."""
    text = (
        "".join("." if x is None else str(x) for x in value) if isinstance(value, list) else str(value or "")
    )
    return text if re.fullmatch(rf"[0-9]{{{n * n}}}", text, re.A) else None


def from_fpuzzles(data: dict) -> Puzzle:
    """A Puzzle from f-puzzles JSON. Keys that say nothing about a rule leave the constraints insufficient."""
    n, grid = int(data["size"]), data["grid"]
    if len(grid) != n or any(len(row) != n for row in grid):
        raise ValueError("grid and size disagree")
    shown = [cell.get("value") if cell.get("given") else None for row in grid for cell in row]
    givens = "".join("." if v in (None, "") else str(v) for v in shown)
    regions = None
    if any("region" in cell for row in grid for cell in row) or n not in (4, 6, 9):
        home = [cell.get("region", -1) for row in grid for cell in row]
        standard = {i: k for k, box in enumerate(boxes(n)) for i in box}
        home = [standard[i] if h == -1 else h for i, h in enumerate(home)]
        regions = tuple(
            tuple(i for i, h in enumerate(home) if h == k) for k in sorted({h for h in home if h is not None})
        )
        regions = None if set(regions) == set(boxes(n)) and n in (4, 6, 9) else regions
    clues: list[Clue] = []
    failed: set[str] = set()

    def keep(key: str, read: Callable[[], list[Clue]]) -> None:
        try:  # one odd clue does not make the others unreadable
            for clue in (found := read()):
                Puzzle("", n, "." * n * n, (clue,), None, regions)
            clues.extend(found)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            failed.add(key)

    def items(key: str) -> Iterable:
        return found if isinstance(found := data.get(key), list) else [None] if found else ()

    for key, kind in FPUZZLES.items():
        for item in items(key):
            keep(key, functools.partial(clues_of_item, kind, item))
    for key, kind in FLAGS_IN.items():
        if data.get(key):
            keep(key, lambda kind=kind: [Clue(kind)])
    if data.get("negative"):
        keep("negative", lambda: [Clue("neg", (), "+".join(NEGATIVE_IN[k] for k in data["negative"]))])
    for row in items("sudoku_bench"):  # families that f-puzzles has no key for, from our own export
        keep("sudoku_bench", functools.partial(clue_of_ours, row))
    drawn = []
    for key in COSMETIC:
        for item in items(key):
            try:
                drawn += drawing_of_item(key, item)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                failed.add(key)
    used = [k for k, v in data.items() if v and (k not in ABOUT or k in failed)]
    known = {*FPUZZLES, *FLAGS_IN, *COSMETIC} - failed
    features = {
        "features_known": [k for k in used if k in known and k not in COSMETIC],
        "features_cosmetic": [k for k in used if k in known and k in COSMETIC],
        "features_unknown": [printable(k)[:40] for k in used if k not in known],
    }
    p = Puzzle(str(data.get("id") or "fpuzzles"), n, givens, tuple(dict.fromkeys(clues)),
        solution_text(data.get("solution"), n), regions, str(data.get("title") or ""),
        str(data.get("author") or ""), "import", defused(str(data.get("ruleset") or "")),
        tags=features)  # fmt: skip
    return replace(p, elements=p.visual() + drawn) if drawn else p


def clue_of_ours(row: dict) -> list[Clue]:
    return [Clue(row["type"], tuple(map(cell_of, row.get("cells", ()))), str(row.get("value", "")))]


def clues_of_item(kind: str, item: dict) -> list[Clue]:
    """Clues of one item of f-puzzles. A total of 0 or nothing is none, but for a sandwich's 0."""
    value = "" if item.get("value") is None else str(item["value"]).strip()
    read = lambda names: tuple(map(cell_of, names))  # noqa: E731
    if kind in LENGTHS and kind != "arrow":
        return [Clue(kind, read(line)) for line in item.get("lines") or ()]
    if kind == "arrow":
        pill = item["cells"]
        lines = [[*pill, *(x for x in line[1:] if x not in pill)] for line in item.get("lines") or ()]
        return [Clue(kind, read(line), str(len(pill)) if len(pill) > 1 else "") for line in lines]
    if kind == "quad":
        values = "".join(map(str, item.get("values") or ()))
        return [Clue(kind, read(item["cells"]), values)] if values else []
    if kind == "clone":
        return [Clue(kind, read([*item["cells"], *item["cloneCells"]]))]
    if kind in DOTS:
        value = {"V": "5", "X": "10"}.get(value.upper(), value)
        return [Clue(kind, read(item["cells"]), "" if value == str(DOTS[kind]) else value)]
    if value == "0" and kind != "sandwich":
        value = ""
    if kind in ("killer", "extra"):
        return [Clue(kind, read(item["cells"]), value if kind == "killer" else "")]
    if kind in ("odd", "even", "minimum", "maximum"):
        return [Clue(kind, read([item["cell"]]))]
    if not value:
        return []
    r, c = cell_of(item["cell"])
    if kind == "littlekiller":
        dr, dc = DIRECTIONS[item["direction"]]
        return [Clue(kind, ((r, c), (r + dr, c + dc)), value)]
    return [Clue(kind, ((r, c),), value)]


def drawing_of_item(key: str, item: dict) -> list[dict]:
    """Visual elements of a line, circle, rectangle, text or cage of f-puzzles, which are no rules there."""
    if key == "line":
        lines = [tuple(map(cell_of, line)) for line in item.get("lines") or ()]
        return [stroke(line, color_name(item.get("outlineC"))) for line in lines]
    cells, text = tuple(map(cell_of, item["cells"])), printable(str(item.get("value") or ""))[:40]
    if key == "cage":
        return [{"type": "cage", "style": "cosmetic", "value": text, "cells": [name_of(x) for x in cells]}]
    shape = {"circle": "circle", "rectangle": "square"}.get(key, "")
    colors = [color_name(item.get(k)) if shape else "" for k in ("baseC", "outlineC")]
    places = [cells] if len(cells) in (1, 2, 4) else [(x,) for x in cells]
    return [mark(place, shape, *colors, text, "overlays") for place in places]


def to_fpuzzles(p: Puzzle) -> dict:
    """f-puzzles JSON of a puzzle; families without a key there go under sudoku_bench, which others ignore."""
    standard = {i: k for k, box in enumerate(p.groups) for i in box}
    grid = [[{} for _ in range(p.n)] for _ in range(p.n)]
    for i, c in enumerate(p.givens):
        cell = grid[i // p.n][i % p.n]
        if c != ".":
            cell |= {"value": int(c), "given": True}
        if p.regions is not None:
            cell["region"] = standard.get(i)
    out = {"size": p.n, "title": p.title or p.id, "author": p.author, "ruleset": p.rules_text(), "grid": grid}
    if p.solution:
        out["solution"] = [int(c) for c in p.solution]
    flags, negative = {v: k for k, v in FLAGS_IN.items()}, {v: k for k, v in NEGATIVE_IN.items()}
    keys = {kind: key for key, kind in FPUZZLES.items()}
    for c in p.clues:
        if c.type in flags:
            out[flags[c.type]] = True
        elif c.type == "neg":
            out["negative"] = [negative[k] for k in c.value.split("+")]
        elif c.type not in keys or (c.value and c.value not in VALUES_OUT.get(c.type, (c.value,))):
            row = {"type": c.type, "cells": [name_of(x) for x in c.cells], "value": c.value}
            out.setdefault("sudoku_bench", []).append(row)
        else:
            out.setdefault(keys[c.type], []).append(item_of_clue(c))
    return out


VALUES_OUT = {"whispers": (), "xv": ("5", "10")}  # others are not f-puzzles' own


def item_of_clue(c: Clue) -> dict:
    """A clue as f-puzzles writes it; the inverse of `clues_of_item`."""
    names, half = [f"R{r}C{k}" for r, k in c.cells], len(c.cells) // 2
    value = {"value": c.value} if c.value else {}
    if c.type in LENGTHS and c.type != "arrow":
        return {"lines": [names]}
    if c.type == "arrow":
        return {"cells": names[: c.number(1)], "lines": [names[c.number(1) - 1 :]]}
    if c.type == "quad":
        return {"cells": names, "values": [int(d) for d in c.value]}
    if c.type == "clone":
        return {"cells": names[:half], "cloneCells": names[half:]}
    if c.type == "xv":
        return {"cells": names, "value": "VX"[c.number(5) == 10]}
    if c.type == "littlekiller":
        (r0, c0), (r, k) = c.cells
        way = {v: d for d, v in DIRECTIONS.items()}[r - r0, k - c0]
        return {"cell": names[0], "direction": way} | value
    one = RULES[c.type].count == (1, 1)  # in a cell, or outside
    return ({"cell": names[0]} if one else {"cells": names}) | value


def links(p: Puzzle) -> dict[str, str]:
    """The puzzle's links: f-puzzles, SudokuPad by f-puzzles data, and SudokuPad's own scl."""
    code = lz_compress(json.dumps(to_fpuzzles(p), separators=(",", ":")))
    scl = lz_compress(json.dumps(to_scl(p), separators=(",", ":")))
    quote = functools.partial(urllib.parse.quote, safe="")
    return {"f-puzzles": f"https://f-puzzles.com/?load={quote(code)}",
        "sudokupad": f"https://sudokupad.app/fpuz{quote(code)}",
        "scl": f"https://sudokupad.app/scl{quote(scl)}"}  # fmt: skip


COLORS = {  # CSS4 names that puzzles use
    "black": 0x000000, "white": 0xFFFFFF, "gray": 0x808080, "lightgray": 0xD3D3D3, "darkgray": 0xA9A9A9,
    "silver": 0xC0C0C0, "red": 0xFF0000, "green": 0x008000, "lime": 0x00FF00, "limegreen": 0x32CD32,
    "blue": 0x0000FF, "lightblue": 0xADD8E6, "lightskyblue": 0x87CEFA, "steelblue": 0x4682B4,
    "lightsteelblue": 0xB0C4DE, "purple": 0x800080, "violet": 0xEE82EE, "plum": 0xDDA0DD, "thistle": 0xD8BFD8,
    "orange": 0xFFA500, "yellow": 0xFFFF00, "khaki": 0xF0E68C, "pink": 0xFFC0CB, "lightgreen": 0x90EE90,
    "turquoise": 0x40E0D0, "brown": 0xA52A2A, "gold": 0xFFD700, "salmon": 0xFA8072, "gainsboro": 0xDCDCDC,
    "whitesmoke": 0xF5F5F5,
}  # fmt: skip


def color_name(code) -> str:
    """The nearest of COLORS to #rgb, #rgba, #rrggbb or #rrggbbaa; other text stays as it is."""
    h = str(code or "").strip().lstrip("#")
    if len(h) in (3, 4):
        h = "".join(2 * c for c in h)
    if not re.fullmatch(r"[0-9a-fA-F]{6}([0-9a-fA-F]{2})?", h):
        return printable(str(code or ""))[:30]
    rgb = [int(h[k : k + 2], 16) for k in (0, 2, 4)]
    far = lambda v: sum((x - (v >> s & 255)) ** 2 for x, s in zip(rgb, (16, 8, 0), strict=True))  # noqa: E731
    return min(COLORS, key=lambda name: far(COLORS[name]))


def read_cages(cages: Iterable[dict], n: int) -> tuple[list[Clue], list[dict]]:
    """Killer clues and drawings of cages; hidden ones and one around the whole grid say nothing."""
    clues, elements = [], []
    for item in cages:
        where = tuple((int(r) + 1, int(c) + 1) for r, c in item["cells"])
        total, style = str(item.get("value") or item.get("sum") or ""), str(item.get("style") or "killer")
        if item.get("hidden") or len(where) == n * n:
            continue
        names = [name_of(x) for x in where]
        elements.append({"type": "cage", "style": style, "value": printable(total), "cells": names})
        summed = re.fullmatch(r"[0-9]{0,3}", total, re.A) and len(where) < 10
        if style == "killer" and item.get("unique", True) and summed:
            clues.append(Clue("killer", where, total))
    return clues, elements


def from_scl(data: dict) -> Puzzle:
    """A Puzzle from SudokuPad JSON: givens, regions, cages and flags are constraints, all else drawing."""
    cells = data["cells"]
    n, meta = len(cells), dict(data.get("metadata") or {})
    if any(len(row) != n for row in cells):
        raise ValueError(f"{n} rows, but not as many columns; only squares are supported")
    value = lambda c: c.get("value") if isinstance(c, dict) else None  # noqa: E731
    givens = "".join("." if value(c) in (None, "") else str(value(c)) for row in cells for c in row)
    cages = []
    for cage_ in data.get("cages") or ():
        told = re.match(r"(title|author|rules|solution)\s*:\s*(.*)", str(cage_.get("value") or ""), re.S)
        if not cage_.get("cells") and told:  # as older puzzles do
            meta.setdefault(told[1], told[2])
        elif cage_.get("cells"):
            cages.append(cage_)
    inside = lambda x: len(x) == 2 and 0 <= x[0] < n and 0 <= x[1] < n  # noqa: E731
    regions = [g for g in data.get("regions") or () if g and all(map(inside, g))]
    regions = tuple(tuple(int(r) * n + int(c) for r, c in g) for g in regions)
    if n in (4, 6, 9) and {frozenset(g) for g in regions} == {frozenset(b) for b in boxes(n)}:
        regions = None
    clues, elements = read_cages(cages, n)
    for kind in ("antiknight", "antiking", "norowcol"):
        if meta.get(kind):
            clues.append(Clue(kind))
            elements += RULES[kind].elements(n, clues[-1])
    for key in ("lines", "arrows"):
        elements += [e for item in data.get(key) or () if (e := read_stroke(item, key))]
    for key in ("underlays", "overlays"):
        elements += [e for item in data.get(key) or () if (e := read_shape(item, key))]
    if regions and not any(e.get("style") == "box" for e in elements):  # else nothing tells of a jigsaw
        elements = boxes_drawn(n, regions) + elements
    rules = meta.get("rules") or ""
    rules = "\n".join(map(str, rules)) if isinstance(rules, list) else str(rules)
    known = {"cells", "regions", "cages", "metadata", "id", "cellSize"}
    drawn = {"lines", "arrows", "underlays", "overlays"}
    features = {"features_known": [k for k in data if k in known],
        "features_cosmetic": [k for k in data if k in drawn],
        "features_unknown": [printable(k)[:40] for k in data if k not in known | drawn]}  # fmt: skip
    return Puzzle(str(data.get("id") or "scl"), n, givens, tuple(dict.fromkeys(clues)),
        solution_text(meta.get("solution"), n), regions, str(meta.get("title") or ""),
        str(meta.get("author") or ""), "import", defused(rules), elements, tags=features)  # fmt: skip


def read_stroke(item: dict, kind: str) -> dict | None:
    """A line or arrow as cells; None where it runs along grid lines or in no king's direction."""
    points = [(float(r), float(c)) for r, c in item.get("wayPoints") or ()]
    if len(points) < 2 or any(not -99 < x < 99 for pt in points for x in pt):
        return None
    color = color_name(item.get("color"))
    (r1, c1), (r2, c2) = points[0], points[-1]
    box = [[f(pt[k] for pt in points) for f in (min, max)] for k in (0, 1)]
    (top, low), (left, right) = box
    if len(points) == 3 and max(low - top, right - left) < 0.4:  # a small < on an edge
        tip, ends = points[1], (points[0][0] + points[2][0], points[0][1] + points[2][1])
        dr, dc = tip[0] - ends[0] / 2, tip[1] - ends[1] / 2
        r, c = (top + low) / 2, (left + right) / 2
        if abs(dc) > abs(dr):
            x, pair = round(c), ((math.floor(r) + 1, round(c)), (math.floor(r) + 1, round(c) + 1))
            sign = "<" if dc < 0 else ">"
        else:
            x, pair = round(r), ((round(r), math.floor(c) + 1), (round(r) + 1, math.floor(c) + 1))
            sign = "^" if dr < 0 else "v"
        if abs((c if sign in "<>" else r) - x) < 0.3:
            return {
                "type": "inequality",
                "direction": sign,
                "cells": [name_of(p) for p in pair],
                "color_name": color,
            }
    cell = lambda pt: (math.floor(pt[0]) + 1, math.floor(pt[1]) + 1)  # noqa: E731
    if kind == "arrows" and len(points) == 2 and cell(points[0]) == cell(points[1]):
        dr, dc = r2 - r1, c2 - c1
        up, side = "upper" if dr < 0 else "lower", "left" if dc < 0 else "right"
        name, way = ("diagonal arrow", f"{up} {side}")
        if abs(dr) < 1e-4:
            name, way = "horizontal arrow", side
        elif abs(dc) < 1e-4:
            name, way = "vertical arrow", "up" if dr < 0 else "down"
        return {"type": name, "coords": [name_of(cell(points[0]))], "direction": way, "color_name": color}
    if any(abs(x - round(x)) < 0.05 for pt in points for x in pt):
        return None
    path = [cell(points[0])]
    for a, b in itertools.pairwise(map(cell, points)):
        dr, dc = b[0] - a[0], b[1] - a[1]
        if dr and dc and abs(dr) != abs(dc):
            return None
        size = max(abs(dr), abs(dc))
        path += [(a[0] + dr * k // size, a[1] + dc * k // size) for k in range(1, size + 1)]
    return {"type": kind, "color_name": color, "coords": [name_of(x) for x in path]}


def read_shape(item: dict, kind: str) -> dict | None:
    """A shape or text by its centre: in a cell, on an edge, at a corner; None where it is neither."""
    if not item.get("center"):
        return None
    r, c = map(float, item["center"])
    if not (-9 < r < 99 and -9 < c < 99):
        return None
    edge_r, edge_c, r0, c0 = r == round(r), c == round(c), math.floor(r), math.floor(c)
    if not all(e or 0.1 <= x % 1 <= 0.9 for e, x in ((edge_r, r), (edge_c, c))):
        return None
    rows, cols = ([r0, r0 + 1] if edge_r else [r0 + 1]), ([c0, c0 + 1] if edge_c else [c0 + 1])
    place = {(True, True): "corner", (True, False): "horizontal edge", (False, True): "vertical edge"}
    shape = "circle" if item.get("rounded") else "diamond" if item.get("angle") == 45 else "square"
    fill, border = item.get("backgroundColor"), item.get("borderColor")
    return {"type": kind, "coords": [name_of((a, b)) for a in rows for b in cols],
        "loc": place.get((edge_r, edge_c), "cell"), "shape": shape if fill or border else "",
        "color_name": color_name(fill) if fill else "",
        "border_color_name": color_name(border) if border else "",
        "text": printable(str(item.get("text") or ""))[:40], "width": item.get("width", 0)}  # fmt: skip


SIGNS = {"<": (0, -1), ">": (0, 1), "^": (-1, 0), "v": (1, 0)}


def scl_element(e: dict) -> tuple[str, dict] | None:
    """(list it belongs to, item) of a visual element in SudokuPad's JSON; None for what it cannot draw."""
    cells, get = coords(e), lambda k: str(e.get(k) or "")
    kind = get("type") if cells else ""
    shade_ = lambda name: f"#{COLORS[name]:06X}" if name in COLORS else name  # noqa: E731
    r, c = (sum(x[k] - 0.5 for x in cells) / max(1, len(cells)) for k in (0, 1))  # the centre
    if kind == "cage" and get("style") != "box":
        where, style = [[i - 1, j - 1] for i, j in cells], get("style") or "cosmetic"
        return "cages", {"cells": where, "value": get("value"), "unique": True, "style": style}
    if kind in ("lines", "arrows"):
        points = [[i - 0.5, j - 0.5] for i, j in cells]
        return kind, {"wayPoints": points, "color": shade_(get("color_name")), "thickness": 8}
    if kind in ("underlays", "overlays"):
        size = 0.75 if len(cells) == 1 else 0.3
        item = {"center": [r, c], "width": size, "height": size, "rounded": get("shape") == "circle"}
        named = {"text": get("text"), "backgroundColor": shade_(get("color_name"))}
        named["borderColor"] = shade_(get("border_color_name"))
        return kind, item | {k: v for k, v in named.items() if v}
    thin = {"color": "#000000", "thickness": 3}
    if kind == "inequality" and get("direction") in SIGNS:
        d, (up, side) = 0.12, SIGNS[get("direction")]
        ends = [[r - d * up + s * d * side, c - d * side + s * d * up] for s in (-1, 1)]
        return "lines", {"wayPoints": [ends[0], [r + 0.4 * d * up, c + 0.4 * d * side], ends[1]]} | thin
    if kind.endswith(" arrow"):
        words = get("direction")
        dr = 0.3 * (("lower" in words or "down" in words) - ("upper" in words or words == "up"))
        dc = 0.3 * (("right" in words) - ("left" in words))
        return "arrows", {"wayPoints": [[r, c], [r + dr, c + dc]], "headLength": 0.2} | thin
    return None


def to_scl(p: Puzzle) -> dict:
    """SudokuPad JSON: givens, regions and drawings; cages and flags are its only rules, the rest is prose."""
    rows = [p.givens[k : k + p.n] for k in range(0, p.n**2, p.n)]
    meta: dict = {"title": p.title or p.id, "author": p.author, "rules": p.rules_text()}
    meta |= {"solution": p.solution or ""}
    meta |= {c.type: True for c in p.clues if c.type in ("antiknight", "antiking", "norowcol")}
    out: dict = {"id": p.id, "cellSize": 64, "metadata": meta}
    out["cells"] = [[{} if c == "." else {"value": int(c)} for c in row] for row in rows]
    out["regions"] = [[[i // p.n, i % p.n] for i in g] for g in p.groups]
    out |= {k: [] for k in ("cages", "lines", "arrows", "underlays", "overlays")}
    for key, item in filter(None, map(scl_element, p.visual())):
        out[key].append(item)
    return out


def guess(p: Puzzle) -> Puzzle:
    """--infer: dots, X, V on edges and anti-chess words in the rules become constraints, to be proved."""
    found = []
    for e in p.elements or ():
        cells, text = tuple(coords(e)), e.get("text")
        if len(cells) != 2:
            continue
        if e.get("loc") in ("vertical edge", "horizontal edge"):
            small = e.get("shape") == "circle" and float(e.get("width") or 0.3) <= 0.45
            if text in ("X", "V"):
                found.append(Clue("xv", cells, "10" if text == "X" else ""))
            elif small and not text and e.get("color_name") in ("white", "black"):
                found.append(Clue(e["color_name"], cells))
        elif e.get("type") == "inequality":
            found.append(Clue("less", cells if str(e.get("direction")) in "<^" else cells[::-1]))
    words = p.rules.lower()
    found += [Clue(f"anti{k}") for k in ("knight", "king") if re.search(rf"\banti-?\s?{k}('s)?\b", words)]
    clues = tuple(dict.fromkeys((*p.clues, *found)))
    more = {"inferred": len(clues) - len(p.clues)}
    return replace(p, clues=clues, tags=p.tags | more)


# --- puzzles from files ---


def names_in(e: dict) -> list[str]:
    """The cells that a visual element names, as it names them."""
    found = e.get("cells") or e.get("coords") or ()
    return [str(x) for x in found] if isinstance(found, (list, tuple)) else str(found).split()


def coords(e: dict) -> list[Cell]:
    """Cells of a visual element; r1c1-r2c4 is a rectangle. Empty where a name is no cell."""
    found = []
    try:
        for name in names_in(e):
            first, *last = map(cell_of, re.split(r"-(?=[rR])", name))
            (r, c), (r1, c1) = first, (last or [first])[-1]
            found += itertools.product(range(min(r, r1), max(r, r1) + 1), range(min(c, c1), max(c, c1) + 1))
    except ValueError:
        return []
    return found


def read_elements(seen: object) -> list[dict] | None:
    """Visual elements of a row, a list or a string of JSON; their texts open no turn of a chat."""
    if isinstance(seen, str):
        seen = json.loads(seen) if seen.strip() else []
    if not isinstance(seen, list):
        return None
    return json.loads(defused(json.dumps([e for e in seen if isinstance(e, dict)], ensure_ascii=False)))


def printable(text: str) -> str:
    """Without control characters, escapes and lone surrogates: safe for a terminal."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(
        c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def defused(text: str) -> str:
    """Imported text with the markers of chat templates broken up, so that a puzzle cannot open a turn."""
    return re.sub(
        r"<\|(?=[\w/])|\[(?=/?INST\])|<(?=/?(?:s|start_of_turn|end_of_turn|think)>)",
        lambda m: m[0] + "\u200b",
        text,
    )


def mini_48() -> list[Puzzle]:
    """The built-in suite, frozen: generated by `gen_suite(0)`, proved unique; --selftest proves it again."""
    return [Puzzle.from_line(x) for x in MINI_48.strip().split("\n")]


def from_official(row: dict, where: str) -> Puzzle:
    """A row of the official sets; UserError names file, row and field. Rules are JSON inside the string."""
    try:
        n, columns = int(row["rows"]), int(row["cols"])
        if n != columns:
            raise ValueError("rows and cols differ")
        rules = str(row.get("rules") or "")
        try:
            parsed = json.loads(rules)
            rules = "\n".join(map(str, parsed)) if isinstance(parsed, list) else str(parsed)
        except ValueError:
            pass
        elements = read_elements(row.get("visual_elements")) or []
        solution = solution_text(row.get("solution"), n)
        regions = None if n in (4, 6, 9) else ()
        p = Puzzle(str(row["puzzle_id"]), n, str(row["initial_board"]).replace("?", "."), (), solution,
            regions, str(row.get("title") or ""), str(row.get("author") or ""), "official",
            defused(rules) or " ", elements, str(row.get("sudokupad_url") or "") or None)  # fmt: skip
    except (KeyError, ValueError, TypeError) as e:
        raise UserError(f"{where}: {type(e).__name__} {printable(str(e))[:100]}") from None
    p.tags["sufficient"] = p.plain and prove(replace(p, tags={})).solutions == [p.solution]
    return p


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """(where, row) of a .jsonl, .json, .parquet or a folder of these."""
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (".json", ".jsonl", ".parquet"))
        if not files:
            raise UserError(f"{path}: no .jsonl, .json or .parquet in this folder")
        return [row for f in files for row in read_rows(f)]
    if path.suffix == ".parquet":
        try:
            import datasets
        except ImportError:
            raise UserError(f'{path}: .parquet needs pip install -e ".[lm]"; a .jsonl will do') from None
        table = datasets.load_dataset("parquet", data_files=str(path), split="train")
        return [(f"{path}, row {k}", dict(row)) for k, row in enumerate(table, 1)]
    if path.suffix == ".json":
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as e:
            raise UserError(f"{path}: not JSON ({e})") from None
        rows = data if isinstance(data, list) else [data]
        return [(f"{path}, entry {k}", row) for k, row in enumerate(rows, 1)]
    return [(f"{path}, row {k}", row) for k, row in enumerate(common.read_jsonl(path, ()), 1)]


def load_puzzles(cfg: Config, run: Run | None = None) -> list[Puzzle]:
    """The puzzles that are played, in order: mini_48, ours or official files, or a hub's set.

    A puzzle without stored solution and sufficient constraints cannot be scored: skipped, with a count.
    """
    if not cfg.data:
        found = mini_48()
    elif os.path.exists(cfg.data):
        found = readable(read_rows(Path(cfg.data)), run)
    elif len(cfg.data) > 255:
        raise UserError(f"{printable(cfg.data)[:60]!r}: neither a file nor a hub's id")
    else:
        rows = [(f"{cfg.data}, row {k}", dict(r)) for k, r in enumerate(from_hub(cfg.data), 1)]
        found = readable(rows, run)
    found = [p for p in found if not cfg.sizes or p.n in cfg.sizes]
    scored = []
    for p in found:
        if not p.solution and sufficient(p):
            p.solution = prove(p).solutions[0]
        if p.solution:
            scored.append(p)
    if len(scored) < len(found) and run:
        run.print(f"{len(found) - len(scored)} of {len(found)} puzzles have no solution to score by: skipped")
    if not scored:
        raise UserError(f"{cfg.data or 'mini_48'}: no puzzle left to play")
    return scored[: cfg.limit or None]


def readable(rows: Iterable[tuple[str, dict]], run: Run | None) -> list[Puzzle]:
    """The rows that are puzzles we can play; the others are counted, and fail the run if they are all."""
    found, errors = [], []
    for where, row in rows:
        try:
            found.append(read_row(row, where))
        except UserError as e:
            errors.append(e)
    if errors and not found:
        raise errors[0]
    if errors and run:
        run.print(f"{len(errors)} of {len(errors) + len(found)} rows skipped, the first: {errors[0]}")
    return found


def read_row(row: dict, where: str) -> Puzzle:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object")
    if "initial_board" in row:
        return from_official(row, where)
    try:
        return Puzzle.from_json(row)
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{where}: {type(e).__name__} {printable(str(e))[:100]}") from None


def from_hub(name: str):
    hub, _, subset = name.partition(":")
    try:
        return common.load_hub(hub, "test", subset or None)
    except UserError as e:
        hint = "withdrawn in 2026, but for SakanaAI/sudoku-bench-nikoli; --data takes a local copy"
        raise UserError(f"{e}; {hint}" if "sudoku-bench" in hub.lower() else str(e)) from None


def element_text(e: dict) -> str | None:
    """One visual element as a line of the prompt; None for what has no description."""
    get = lambda k: "" if e.get(k) is None else str(e[k]).strip()  # noqa: E731
    kind, names = get("type"), names_in(e)
    if kind == "lines":
        return f"line, color: {get('color_name')}, coords: {' '.join(names)}"
    if kind == "arrows":
        return f"arrow, color: {get('color_name')}, coords (base to tip): {' '.join(names)}"
    if kind.endswith(" arrow") and names:
        return f"{kind}, color: {get('color_name')}, in location: {names[0]}, pointing {get('direction')}"
    if kind in ("underlays", "overlays") and names:
        fill, border = get("color_name"), get("border_color_name")
        color = f"color: {fill}" if fill else f"stroke color: {border}" if border else ""
        if fill and border and fill != border:
            color += f" (stroke color: {border})"
        loc = get("loc")
        where = {
            "cell": f"location: {names[0]}",
            "corner": f"location: at the corner of {' '.join(names)}",
        }.get(loc, "")
        if loc.endswith("edge") and len(names) > 1:
            where = f"location: between {names[0]} and {names[1]}"
        shape, text = get("shape"), get("text")
        parts = (f"text: {text}" if text else "", f"shape: {shape}" if shape else "", color, where)
        return ", ".join(filter(None, parts))
    if kind == "inequality" and len(names) == 2:
        return f"inequality arrow: {get('direction')} between {names[0]} and {names[1]}"
    if kind == "cage":
        name = {"killer": "killer cage", "box": "region"}.get(get("style"), "cage")
        value = f" (value {get('value')})" if get("value") else ""
        return f"{name}{value}: {' '.join(names)}"
    if kind == "global":
        return f"global: {get('text')}"
    return get("text") or None if kind == "manual" else None


# --- protocols: prompts, how replies are read, and the state of an episode ---

VARIANT_HEAD = """You are an expert solver of sudoku variants.

## Coordinates and drawings ##
- rXcY is the cell in row X and column Y, counted from 1 at the top left.
- Row or column 0, or one more than the size, is outside the grid.
- Everything drawn is listed as it is. The circle or bulb of an arrow or thermometer and its line are separate
  items; their cells show that they belong together.
- "Between" two cells is the edge that they share.

## Advice ##
- The puzzle has exactly one solution, and all that is needed to find it is given here.
- Read the rules with care: they are not those of plain sudoku.

## Size ##
{{rows}} x {{cols}}

## Rules ##
{{rules}}

## Drawings ##
{{pretty_visual_elements}}
"""
PLAIN_HEAD = """You are an expert solver of sudoku.

## Rules ##
- Every row holds each of the digits 1 to {{rows}} once.
- Every column holds each of the digits 1 to {{rows}} once.
- Every outlined box holds each of the digits 1 to {{rows}} once.
"""
STEP_FORMAT = """
## Answer ##
I show you the board, you fill {{count}} of its empty cells, and so on; a wrong digit ends the game.
End every reply with your placement{{s}} between tags, like
<ANSWER>
r1c1: 5{{more}}
</ANSWER>"""
PROMPTS = {
    "single_shot_variant": VARIANT_HEAD + "\n## Board ##\n{{current_board}}\n{{whole}}",
    "single_shot_standard": PLAIN_HEAD + "\n## Board ##\n{{current_board}}\n{{whole}}",
    "multi_step_variant": VARIANT_HEAD + STEP_FORMAT, "multi_step_standard": PLAIN_HEAD + STEP_FORMAT,
    "single_step_variant": VARIANT_HEAD + STEP_FORMAT, "single_step_standard": PLAIN_HEAD + STEP_FORMAT,
    "acknowledgement": """Understood. I will reason from the rules and place only what they force. I end with
<ANSWER>
rXcY: Z
</ANSWER>
Please show me the board.""",
    "board": "## Board ##\n{{current_board}}",
}  # fmt: skip
WHOLE = """
## Answer ##
End your reply with the solved grid between tags: {{ rows * cols }} digits, row by row, like
<ANSWER>
1234...
</ANSWER>"""


@functools.lru_cache(maxsize=4)
def load_prompts(path: str) -> tuple[dict[str, str], str]:
    """The templates, ours or a JSON file's, and a hash of them that goes into every result."""
    templates = dict(PROMPTS)
    if path:
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(f"--prompts {path}: {e}") from None
        if (
            not isinstance(given, dict)
            or not all(isinstance(v, str) for v in given.values())
            or set(given) - set(PROMPTS)
        ):
            raise UserError(f"--prompts {path}: not an object of texts named {', '.join(PROMPTS)}")
        templates |= given
    digest = hashlib.sha256(json.dumps(templates, sort_keys=True).encode()).hexdigest()[:12]
    return templates, digest


def fill(template: str, values: dict[str, object]) -> str:
    """Put values into {{name}} and {{ rows * cols }}, once: what is put in is not looked at again."""
    return re.sub(r"\{\{\s*([\w *]+?)\s*\}\}", lambda m: str(values.get(m[1], m[0])), template)


def spaced(board: str, n: int) -> str:
    return "\n".join(" ".join(board[k : k + n]) for k in range(0, n * n, n))


def prompt(p: Puzzle, mode: str, board: str, templates: dict[str, str]) -> str:
    """The first user turn of an episode."""
    several = mode == "multi_step"
    drawn = [text for e in p.visual() if (text := element_text(e))]
    values = {"rows": p.n, "cols": p.n, "rows * cols": p.n**2, "rules": p.rules_text().strip(),
        "current_board": spaced(board, p.n),
        "pretty_visual_elements": "\n".join(f"- {x}" for x in drawn) or "none",
        "count": "one or more" if several else "exactly one", "s": "s" if several else "",
        "more": "\nr1c2: 6" if several else "", "whole": fill(WHOLE, {"rows * cols": p.n**2})}  # fmt: skip
    return fill(templates[f"{mode}_{'standard' if p.plain else 'variant'}"], values).strip()


def hints(p: Puzzle, k: int, seed: int) -> str | None:
    """The board with all but k of its empty cells filled; None if it has k or fewer. k = 0: as it is."""
    blanks = [i for i, c in enumerate(p.givens) if c == "."]
    if not k:
        return p.givens
    if k >= len(blanks):
        return None
    random.Random(seed).shuffle(blanks)
    board = list(p.givens)
    for i in blanks[: len(blanks) - k]:
        board[i] = p.solution[i]
    return "".join(board)


def window(messages: list[dict], turns: int) -> list[dict]:
    """What of a conversation is sent: its first two messages, the last 2N of those between, and the board.

    N = 0 sends none of the past (a slice [-0:] would send all of it, as the paper's code does).
    """
    if turns < 0:
        return messages
    middle = messages[2:-1]
    return messages[:2] + middle[len(middle) - min(len(middle), 2 * turns) :] + messages[-1:]


MOST_READ = 1_000_000  # characters of a reply that are read
PLACEMENT = re.compile(
    r"(?<![0-9A-Za-z])[rR] ?([0-9]{1,4}),?\s{0,8}[cC] ?([0-9]{1,4})"
    r"[\s*`]{0,8}[:=][\s*`]{0,8}([0-9]{1,4})(?![0-9])"
)
FULL_WIDTH = {c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)} | {0x3000: " "}


class Stop(Exception):
    """An episode's end, with its reason."""


def answer_block(reply: str, last: bool = True) -> str:
    """Robust reading: thoughts cut, full-width forms folded, the last block found without backtracking.

    Raises Stop("truncated") where a thought does not end, Stop("no_answer_tag") without a block.
    """
    text = reply[-MOST_READ:].translate(FULL_WIDTH)
    low = text.lower()
    if len(low) != len(text):  # lower() may lengthen a few letters
        low = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    end_thought = low.rfind("</think>")
    if low.rfind("<think>") > end_thought:
        raise Stop("truncated")
    if end_thought >= 0:
        text, low = text[end_thought + 8 :], low[end_thought + 8 :]
    end = low.rfind("</answer>")
    begin = low.rfind("<answer>", 0, end) if end >= 0 else -1
    if begin < 0:
        raise Stop("no_answer_tag")
    return text[begin + 8 : end]


def read_grid(reply: str, p: Puzzle, board: str, mode: str) -> tuple[str, str]:
    """The grid that a single-shot reply states, as (text, ""), or ("", stop reason). Never raises.

    ref: last block, whatever str.isdigit accepts, the last n^2 of it. robust: n^2 digits, n lines of n digits
    (grid art removed), or placements that cover every empty cell.
    """
    size = p.n**2
    if mode == "ref":
        blocks = list(answer_blocks(reply))
        return ("".join(filter(str.isdigit, blocks[-1]))[-size:], "") if blocks else ("", "no_answer_tag")
    try:
        block = answer_block(reply)
    except Stop as e:
        return "", str(e)
    found = PLACEMENT.findall(block)
    if found:
        placed = {}
        for r, c, d in found:
            if not (1 <= int(r) <= p.n and 1 <= int(c) <= p.n and len(d) == 1):
                return "", "invalid_action_parsing"
            i = (int(r) - 1) * p.n + int(c) - 1
            if placed.setdefault(i, d) != d:
                return "", "contradictory_placement"
        grid = "".join(placed.get(i, c) for i, c in enumerate(board))
        return (grid, "") if "." not in grid else ("", "bad_length")
    digits = "".join(c for c in block if "0" <= c <= "9")
    return (digits, "") if len(digits) == size else ("", "bad_length")


def read_placements(reply: str, mode: str, single: bool) -> list[tuple[str, str, str]]:
    """(row, column, digit) texts of a stepwise reply; Stop("invalid_action") where there is none.

    ref, multi-step: the first block; ref, single-step: the last block that is nothing but one placement.
    """
    if mode == "ref" and single:
        found = re.findall(r"<ANSWER>\s*r(\d+)c(\d+):\s*(\d+)\s*</ANSWER>", reply)[-1:]
    elif mode == "ref":
        found = re.findall(r"r(\d+)c(\d+):\s*(\d+)", next(answer_blocks(reply), ""))
    else:
        try:
            found = PLACEMENT.findall(answer_block(reply))
        except Stop as e:
            raise Stop("invalid_action" if str(e) == "no_answer_tag" else str(e)) from None
        if single and len(set(found)) > 1:
            raise Stop("invalid_action")
    if not found:
        raise Stop("invalid_action")
    return found


def answer_blocks(reply: str) -> Iterator[str]:
    """What re.findall(r"<ANSWER>(.*?)</ANSWER>", S | I) finds, in linear time also without a closing tag."""
    opening, closing, at = re.compile("<ANSWER>", re.I), re.compile("</ANSWER>", re.I), 0
    while (begin := opening.search(reply, at)) and (end := closing.search(reply, begin.end())):
        yield reply[begin.end() : end.start()]
        at = end.end()


@dataclass
class Reply:
    """A backend's answer; text None or empty means that it did not answer."""

    text: str | None
    tokens: int = 0
    reasoning: str = ""


class Episode:
    """One puzzle, one mode, one conversation: `turn` gives what to send, `take` judges the reply.

    The board changes only by placements that were read from an answer block and are right.
    """

    def __init__(
        self, p: Puzzle, mode: str, board: str, history: int, extract: str, templates: dict[str, str], trial=0
    ):
        self.p, self.mode, self.board, self.start, self.trial = p, mode, board, board, trial
        self.history, self.extract, self.templates = history, extract, templates
        self.messages = [{"role": "user", "content": prompt(p, mode, board, templates)}]
        if mode != "single_shot":
            self.messages.append({"role": "assistant", "content": templates["acknowledgement"]})
        self.correct = self.calls = self.tokens = 0
        self.reasoning = ""  # of the last reply, where the backend keeps it apart
        self.stop = "solved" if mode != "single_shot" and "." not in board else ""
        self.solved, self.verdict, self.final = bool(self.stop), None, board
        self.shadow: Episode | None = None  # the same replies under the paper's reading
        self.shadow_known = True
        if extract == "robust":
            self.shadow = Episode(p, mode, board, history, "ref", templates, trial)

    def turn(self) -> list[dict]:
        """Messages to send now."""
        if self.mode == "single_shot":
            return self.messages
        now = {
            "role": "user",
            "content": fill(self.templates["board"], {"current_board": spaced(self.board, self.p.n)}),
        }
        return window([*self.messages, now], self.history)

    def take(self, reply: Reply) -> None:
        """Judge a reply; sets `stop` when the episode has ended."""
        if self.shadow and not self.shadow.stop and self.shadow_known:
            self.shadow_known = self.shadow.board == self.board  # else it would have been sent another board
            if self.shadow_known:
                self.shadow.take(reply)
        if not reply.text:
            self.stop = "api_error"
            return
        self.calls, self.tokens = self.calls + 1, self.tokens + reply.tokens
        self.reasoning = reply.reasoning[-20_000:]
        if self.mode != "single_shot":
            self.messages.append(self.turn()[-1])
        self.messages.append({"role": "assistant", "content": reply.text})
        try:
            self.whole(reply.text) if self.mode == "single_shot" else self.place(reply.text)
        except Stop as e:
            self.stop = str(e)

    def whole(self, text: str) -> None:
        self.final, reason = read_grid(text, self.p, self.start, self.extract)
        if reason:
            raise Stop(reason)
        if self.extract == "ref":
            self.solved = self.final == self.p.solution
        else:
            self.verdict = verify(self.p, self.final)
            self.solved = self.verdict.solved
        self.correct = int(self.solved)
        raise Stop("solved" if self.solved else "incorrect_solution")

    def place(self, text: str) -> None:
        n, robust, seen, before = self.p.n, self.extract == "robust", {}, self.board
        for r, c, digit in read_placements(text, self.extract, self.mode == "single_step"):
            if len(digit) != 1 or digit not in "0123456789":
                raise Stop("invalid_action_parsing")
            if max(len(r), len(c)) > 4300:  # more digits than int() reads
                raise Stop("invalid_action_parsing")
            r, c = int(r), int(c)
            if not (1 <= r <= n and 1 <= c <= n):
                raise Stop("action_execution_error")
            i = (r - 1) * n + c - 1
            if robust and i in seen:
                if seen[i] != digit:
                    raise Stop("contradictory_placement")
                continue
            seen[i] = digit
            if robust and self.board[i] == digit:  # repeated correctly
                continue
            if self.board[i] != ".":
                raise Stop("action_execution_error")
            self.board = self.final = self.board[:i] + digit + self.board[i + 1 :]
            if digit != self.p.solution[i]:
                raise Stop("incorrect_placement")
            self.correct += 1
            if "." not in self.board:
                self.solved = True
                raise Stop("solved")
        if self.board == before:
            raise Stop("invalid_action")  # nothing was placed: the same question would come again

    def row(self) -> dict:
        """The episode as one line of results, without its key."""
        shadow = self.shadow
        ref = self.solved if not shadow else shadow.solved if shadow.stop and self.shadow_known else None
        broken = [
            f"{kind} {' '.join(cells)}" for kind, cells in (self.verdict.violations if self.verdict else [])
        ]
        return {"n": self.p.n, "E": self.start.count("."), "families": self.p.tags.get("families", []),
            "l0": self.p.tags.get("l0"), "solved": int(self.solved),
            "solved_ref": None if ref is None else int(ref), "correct": self.correct, "stop": self.stop,
            "calls": self.calls, "tokens": self.tokens, "initial_board": self.start,
            "final_board": self.final[-MOST_READ:], "violations": broken, "reasoning": self.reasoning,
            "messages": self.messages}  # fmt: skip


# --- the neural solver: an edge-conditioned recurrent transformer ---

FLAGS = ("self", "row", "column", "region", "cell to factor", "factor to cell")
ALL_DIGITS = (1023,) * 10
FACTOR = 11  # input symbol of a factor token; 0 is an empty cell, d + 1 the digit d
MOST_SUM = 63


class Edges:
    """Edge types (what a pair of tokens may hold, flags) and their numbers; 0 is no edge.

    A rule enters by its meaning, the digit pairs that all pairwise rules between two cells allow together,
    so that an unseen rule can be expressed. `features`: (types, 100 + 6).
    """

    def __init__(self):
        self.index: dict[tuple, int] = {(ALL_DIGITS, 0): 0}
        self.number((ALL_DIGITS, 1))  # of padding: only itself

    def number(self, key: tuple[tuple[int, ...], int]) -> int:
        return self.index.setdefault(key, len(self.index))

    def features(self) -> Tensor:
        rows = [
            [ones >> d & 1 for ones in table for d in range(10)] + [flags >> k & 1 for k in range(6)]
            for table, flags in self.index
        ]
        return torch.tensor(rows, dtype=torch.float32)


def factors(p: Puzzle) -> list[tuple[list[int], int]]:
    """Cells and target of each sum clue that no table can express: killer cages and little killers."""
    found = [
        (p.cells(c), int(c.value)) for c in p.clues if c.type == "killer" and c.value and len(c.cells) > 1
    ]
    return found + [(ray(p, c), int(c.value)) for c in p.clues if c.type == "littlekiller"]


def encode(p: Puzzle, edges: Edges, permute: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """Tokens of a puzzle: its n^2 cells, then a factor token for each sum clue.

    given (L,), sums (L,), edge (L, L) types of row i seen by column j, solution (n^2,), allowed (10,).
    `permute` renames the digits d -> permute[d]; only for puzzles without sums.
    """
    n, size, solver = p.n, p.n**2, Solver(p)
    name = (lambda d: d) if permute is None else (lambda d: permute[d])
    sums = factors(p)
    length = size + len(sums)
    tables, start = solver.tables, solver.start
    edge, given, target = (
        np.zeros((length, length), np.int32),
        np.zeros(length, np.int64),
        np.zeros(length, np.int64),
    )
    home = {i: k for k, group in enumerate(p.groups) for i in group}
    for i in range(size):
        given[i] = 0 if p.givens[i] == "." else name(int(p.givens[i])) + 1
        for j in range(size):
            ones = tables.get((i, j), ALL_DIGITS)
            if i == j:  # unary rules, too, are a relation: of a cell with itself
                ones = tuple(1 << d if start[i] >> d & 1 else 0 for d in range(10))
                ones = ALL_DIGITS if start[i] == p.digits else ones
            if permute is not None and ones is not UNEQUAL and ones is not ALL_DIGITS:
                renamed = [0] * 10
                for a in range(10):
                    renamed[permute[a]] = sum(1 << permute[b] for b in BITS[ones[a]])
                ones = tuple(renamed)
            flags = (
                (i == j)
                | (i // n == j // n) << 1
                | (i % n == j % n) << 2
                | (home.get(i, -1) == home.get(j, -2)) << 3
            )
            edge[i, j] = edges.number((ones, int(flags)))
    for k, (cells, total) in enumerate(sums, size):
        given[k], target[k], edge[k, k] = FACTOR, min(total, MOST_SUM), edges.number((ALL_DIGITS, 1))
        for i in cells:
            edge[i, k], edge[k, i] = edges.number((ALL_DIGITS, 1 << 5)), edges.number((ALL_DIGITS, 1 << 4))
    solution = np.array([name(int(c)) for c in p.solution or "0" * size])
    allowed = np.array([p.digits >> d & 1 for d in range(10)], bool)
    if permute is not None:
        allowed[[permute[d] for d in range(10)]] = allowed.copy()
    return {"given": given, "sums": target, "edge": edge, "solution": solution, "allowed": allowed}


def stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Puzzles of one grid size as tensors; absent factors are padding, which only sees itself."""
    length = max(len(r["given"]) for r in rows)

    def pad(x: np.ndarray) -> np.ndarray:
        more = [(0, length - s) for s in x.shape]
        return np.pad(x, more)

    out = {k: torch.from_numpy(np.stack([pad(r[k]) for r in rows])) for k in ("given", "sums", "edge")}
    for k, row in enumerate(rows):
        for i in range(len(row["given"]), length):
            out["edge"][k, i, i] = 1
    return out | {k: torch.from_numpy(np.stack([r[k] for r in rows])) for k in ("solution", "allowed")}


class EdgeNet(nn.Module):
    """One shared block, iterated: attention with a bias and a value gate for each edge, then an MLP.

    h0 = inp; each time h += gamma inp; a_ij = softmax_j(q_i k_j / sqrt(d_h) + b(e_ij));
    o_i = sum_j a_ij (v_j * g(e_ij)); h += W_o o; h += MLP(LN h). b and g depend on the type of the edge
    only, so they are computed once a type. gate_rank K replaces g by sum_k w_k u_k(e_ij), which stores
    nothing of size L^2 d. Logits (B, n^2, 10) after every iteration.
    """

    def __init__(self, hidden: int, heads: int, gate: bool = True, gate_rank: int = 0):
        super().__init__()
        self.heads, self.gate, self.rank, features = heads, gate, gate_rank, 100 + len(FLAGS)
        self.digit = nn.Embedding(FACTOR + 1, hidden // 2)
        self.sum = nn.Embedding(MOST_SUM + 1, hidden - hidden // 2)
        self.gamma = nn.Parameter(torch.tensor(0.5))
        self.bias = nn.Linear(features, heads)
        if gate and not gate_rank:
            self.gates = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        elif gate:
            self.basis = nn.Linear(features, gate_rank)
            self.weights = nn.Parameter(1 + 0.1 * torch.randn(gate_rank, hidden))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(hidden) for _ in range(3))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 3 * hidden), nn.GELU(), nn.Linear(3 * hidden, hidden))
        self.head = nn.Linear(hidden, 10)

    def forward(
        self,
        given: Tensor,
        sums: Tensor,
        edge: Tensor,
        allowed: Tensor,
        features: Tensor,
        iterations: int,
        cells: int,
    ):
        """given, sums (B, L), edge (B, L, L), allowed (B, 10), features (types, F) -> a list of logits."""
        B, L = given.shape
        inp = torch.cat([self.digit(given), self.sum(sums)], -1)  # (B, L, d)
        d, split = inp.shape[-1], lambda x: x.view(B, L, self.heads, -1).transpose(1, 2)  # (B, H, L, d / H)
        bias = (
            self.bias(features)[edge].permute(0, 3, 1, 2).masked_fill((edge == 0)[:, None], -torch.inf)
        )  # (B, H, L, L)
        if self.gate and not self.rank:
            gates = (
                self.gates(features)[edge].view(B, L, L, self.heads, -1).permute(0, 3, 1, 2, 4)
            )  # (B, H, L, L, d / H)
        elif self.gate:
            basis = self.basis(features)[edge]  # (B, L, L, K)
        h, out = inp, []
        for _ in range(iterations):
            h = h + self.gamma * inp
            q, k, v = (split(x) for x in self.qkv(self.norm1(h)).chunk(3, -1))
            a = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads) + bias).softmax(-1)  # (B, H, L, L)
            if not self.gate:
                o = a @ v
            elif not self.rank:
                o = torch.einsum("bhij,bhijc->bhic", a, gates * v[:, :, None])
            else:
                w = self.weights.view(self.rank, self.heads, 1, -1)
                o = sum((a * basis[..., k][:, None] @ v) * w[k] for k in range(self.rank))
            h = h + self.out(o.transpose(1, 2).reshape(B, L, d))
            h = h + self.mlp(self.norm2(h))
            out.append(self.head(self.norm3(h[:, :cells])).masked_fill(~allowed[:, None], -1e4))
        return out


def solver_loss(logits: list[Tensor], given: Tensor, solution: Tensor) -> Tensor:
    """Cross-entropy of the cells that are not given, mean over them and over all iterations."""
    target = solution.masked_fill(given[:, : solution.shape[1]] > 0, -100).flatten()  # no sync for a mask
    losses = [nn.functional.cross_entropy(x.flatten(0, 1).float(), target) for x in logits]
    return torch.stack(losses).mean()


def reveal(given: Tensor, solution: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the rows get U(0, 0.5) of their blanks filled in."""
    B, cells = solution.shape
    share = torch.rand(B, 1, generator=generator) * 0.5 * (torch.rand(B, 1, generator=generator) < 0.5)
    shown = (torch.rand(B, cells, generator=generator) < share).to(given.device) & (given[:, :cells] == 0)
    filled = torch.where(shown, solution + 1, given[:, :cells])
    return torch.cat([filled, given[:, cells:]], 1)


# data of part B

SEEN = ("white", "black", "xv:5", "less", "pair:equal", "pair:parity", "killer")
NOVEL = ("whispers:2", "pair:sum>5", "xv:7", "pair:sum<5", "pair:oddsum", "pair:product>5")
APART = (("white", "black"), ("xv:5", "less"), ("pair:equal", "killer"), ("pair:parity", "white"),
    ("black", "less"),
    ("xv:5", "killer"))  # pairs of seen families that are never together in training  # fmt: skip
SPLITS = ("seen", "recombined", "novel", "plain")


def canonical(solution: str) -> str:
    """A solution up to the names of its digits."""
    names: dict[str, str] = {}
    return "".join(names.setdefault(c, chr(97 + len(names))) for c in solution)


def held_out(solution: str) -> bool:
    """Whether solutions like this one, up to digits' names, belong to the tests: a quarter of them do."""
    return common.stable_hash("solution " + canonical(solution)) % 4 == 0


def draw_families(split: str, rng: random.Random) -> list[str]:
    """Families of one puzzle of a split; training is `train`."""
    if split == "plain":
        return []
    if split == "recombined":
        return list(rng.choice(APART))
    pool = NOVEL if split == "novel" else SEEN
    while True:
        found = rng.sample(pool, rng.randint(1, 3))
        if clash(found) or any(set(pair) <= set(found) for pair in APART):
            continue
        return found


def draw_puzzle(split: str, n: int, rng: random.Random, name: str) -> Puzzle:
    """A puzzle of a split with a proved unique solution, of a solution class that the split may use."""
    while True:
        keep = lambda s: held_out(s) == (split != "train")  # noqa: E731
        p = generate(
            n, draw_families(split, rng), rng, name, strict=False, lean=False, accept=keep, tagged=False
        )
        if p is not None:
            return p


def with_hints(p: Puzzle, rng: random.Random, more: int = 2) -> Puzzle:
    """The puzzle with more givens, still ambiguous under plain rules if it was and can be."""
    blanks = [i for i, c in enumerate(p.givens) if c == "."]
    for _ in range(20):
        chosen = set(rng.sample(blanks, min(more, len(blanks))))
        q = replace(
            p,
            id=p.id + "+",
            givens="".join(p.solution[i] if i in chosen else c for i, c in enumerate(p.givens)),
            tags={},
        )
        if not p.clues or Solver(q, ()).solve().status == "multiple":
            break
    return q


def completions(p: Puzzle, limit: int = 300) -> int:
    """Grids that keep the givens and the plain rules, counted up to a limit: 1 / it is the chance level."""
    return len(Solver(p, ()).solve(limit=limit, nodes=20 * limit).solutions)


PARTS = {4: 4, 6: 2, 9: 1}  # of the training puzzles; a 9x9 takes forty times as long to generate as a 4x4


def shards(cfg: Config) -> int:
    """Shards of each size: four, more where there is much to generate, so that many workers share it."""
    return max(4, cfg.train_puzzles // 3000)


def shard_size(cfg: Config, n: int) -> int:
    return cfg.train_puzzles * PARTS[n] // sum(PARTS[k] for k in cfg.train_sizes) // shards(cfg)


def data_job(name: str, run: Run) -> dict:
    """Generate one shard of training puzzles, data-SIZE-SHARD, as lines and encoded."""
    _, n, shard = name.split("-")
    cfg, n, count = run.cfg, int(n), shard_size(run.cfg, int(n))
    rng, begin = random.Random(run.stream("puzzles")), time.perf_counter()
    puzzles = [draw_puzzle("train", n, rng, f"t{n}-{shard}-{k}") for k in range(count)]
    seconds = time.perf_counter() - begin
    text = "\n".join(p.to_line() for p in puzzles)
    common.write_atomic(run.folder / "puzzles.txt", text.encode())
    write_shard(
        run.folder / "puzzles.npz", puzzles, random.Random(run.stream("relabel")) if cfg.relabel else None
    )
    return {"count": count, "seconds": seconds}


def write_shard(file: Path, puzzles: Iterable[Puzzle], relabel: random.Random | None = None) -> None:
    """Encoded puzzles of one size, with the edge types that this file's numbers mean: (types, 10 + 1)."""
    edges, coded = Edges(), []
    for p in puzzles:
        perm = None
        if relabel and not factors(p):
            names = BITS[p.digits]
            new = relabel.sample(names, len(names))
            perm = [dict(zip(names, new, strict=True)).get(d, d) for d in range(10)]
        coded.append(encode(p, edges, perm))
    arrays = {k: v.numpy() for k, v in stack(coded).items()}
    types = np.array([[*table, flags] for table, flags in edges.index], np.int16)
    common.write_atomic(file, lambda f: np.savez_compressed(f, types=types, **arrays))


def read_shards(files: Iterable[Path], edges: Edges) -> dict[str, Tensor]:
    """Shards of one size as tensors; their edge types get numbers in `edges`."""
    rows = []
    for file in files:
        with np.load(file) as arrays:
            part = dict(arrays)
        types = part.pop("types").tolist()
        number = np.array([edges.number((tuple(key[:10]), key[10])) for key in types], np.int32)
        part["edge"] = number[part["edge"]]
        rows += [{k: v[i] for k, v in part.items()} for i in range(len(part["given"]))]
    return stack(rows)


def tests_job(name: str, run: Run) -> dict:
    """The test splits of one grid size, seen and novel ones matched on their number of plain completions."""
    n, cfg = int(name.split("-")[1]), run.cfg
    rng, want, pools = random.Random(run.stream("puzzles")), cfg.test_puzzles, {}
    for split in (*SPLITS, "valid"):
        count = 2 * want if split in ("seen", "novel") else max(4, want // 2) if split == "valid" else want
        kind = "seen" if split == "valid" else split
        pools[split] = [draw_puzzle(kind, n, rng, f"{split}-{n}-{k}") for k in range(count)]
        for p in pools[split]:
            p.tags["vanilla"] = completions(p)
    pools["seen"], pools["novel"] = matched(pools["seen"], pools["novel"], want)
    for split in SPLITS:
        pools[split + " +2"] = [with_hints(p, rng) for p in pools[split]]
        for p in pools[split + " +2"]:
            p.tags["vanilla"] = completions(p)
    rows = {split: [[p.to_line(), p.tags["vanilla"]] for p in ps] for split, ps in pools.items()}
    return {"puzzles": rows}


def matched(a: list[Puzzle], b: list[Puzzle], want: int) -> tuple[list[Puzzle], list[Puzzle]]:
    """Equally many of both in each octave of the number of plain completions, pair by pair."""
    octave = lambda p: p.tags["vanilla"].bit_length()  # noqa: E731
    pairs = []
    for k in range(12):
        pairs += zip([p for p in a if octave(p) == k], [p for p in b if octave(p) == k], strict=False)
    random.Random(0).shuffle(pairs)
    found = pairs[:want]
    return [x for x, _ in found], [y for _, y in found]


def read_puzzles(rows: Iterable[Sequence]) -> list[Puzzle]:
    found = []
    for line, vanilla in rows:
        found.append(Puzzle.from_line(line))
        found[-1].tags["vanilla"] = vanilla
    return found


def net_of(cfg: Config) -> EdgeNet:
    return EdgeNet(cfg.hidden, cfg.heads, cfg.gate, cfg.gate_rank)


def train_net(run: Run, files: dict[int, list[Path]]) -> tuple[EdgeNet, dict[str, float]]:
    """Train one net on shards of each size; the same batches on any number of ranks, each takes its part."""
    cfg, edges = run.cfg, Edges()
    data = {n: {k: v.to(run.device) for k, v in read_shards(x, edges).items()} for n, x in files.items()}
    features = edges.features().to(run.device)
    torch.manual_seed(run.stream("weights"))
    net = net_of(cfg).to(run.device).train()
    wrapped = run.wrap(torch.compile(net) if cfg.compile else net)
    opt = torch.optim.AdamW(
        net.parameters(), cfg.lr, (0.9, 0.98), weight_decay=cfg.weight_decay, fused=run.device.type == "cuda"
    )
    generator, clock = run.generator("batches"), {"seconds": 0.0, "steps": 0, "total": cfg.steps, "warm": 0.0}
    drain = torch.cuda.synchronize if run.device.type == "cuda" else lambda: None
    for step in run.steps(cfg.steps, model=net, opt=opt, clock=clock):
        begin = time.perf_counter()
        n = list(data)[step % len(data)]
        every, part = data[n], slice(run.rank, None, run.world_size)
        rows = torch.randint(len(every["given"]), (cfg.batch_size,), generator=generator)
        x = {k: v[rows.to(run.device)] for k, v in every.items()}
        given = reveal(x["given"], x["solution"], generator)[part]
        x = {k: v[part] for k, v in x.items()}
        for group in opt.param_groups:
            group["lr"] = common.learning_rate(
                step, clock["total"], cfg.lr, min(0.5, 100 / clock["total"]), 0.05
            )
        with run.autocast():
            logits = wrapped(given, x["sums"], x["edge"], x["allowed"], features, cfg.iterations, n * n)
        blanks = (given[:, : n * n] == 0).sum()
        scale = blanks / run.mean(blanks.float())  # ranks have unequal numbers of blanks
        loss = solver_loss(logits, given, x["solution"])
        opt.zero_grad(set_to_none=True)
        (loss * scale).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        run.log(step, loss=run.mean(loss.detach() * scale) if run.world_size > 1 else loss)
        if step in (9, 29):  # the first ten are slower: kernels, compilation
            drain()
        clock["seconds"] += time.perf_counter() - begin
        clock["steps"] = step + 1
        if step == 9:
            clock["warm"] = clock["seconds"]
        if cfg.seconds and step == 29:  # the schedule ends when the time does; ranks must stop together
            fits = int(run.mean(20 * (cfg.seconds - clock["warm"]) / (clock["seconds"] - clock["warm"])))
            clock["total"] = min(cfg.steps, max(60, fits))
        if step + 1 >= clock["total"] and step + 1 < cfg.steps:
            run.last = step
    drain()
    speed = {"net_steps_per_s": clock["steps"] / max(clock["seconds"], 1e-9)}
    return net.eval(), speed | {
        "steps": clock["steps"],
        "net_puzzles_per_s": speed["net_steps_per_s"] * cfg.batch_size,
    }


@torch.no_grad()
def predict(
    net: EdgeNet,
    puzzles: Sequence[Puzzle],
    iterations: int,
    device: torch.device,
    boards: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """Probabilities (n^2, 10) of every puzzle, from its givens or from `boards`."""
    found: dict[int, np.ndarray] = {}
    order = sorted(range(len(puzzles)), key=lambda k: puzzles[k].n)
    for n, group in itertools.groupby(order, key=lambda k: puzzles[k].n):
        chosen = list(group)
        for part in (chosen[k : k + 64] for k in range(0, len(chosen), 64)):
            edges = Edges()
            rows = [
                encode(puzzles[k] if boards is None else replace(puzzles[k], givens=boards[k]), edges)
                for k in part
            ]
            x = {k: v.to(device) for k, v in stack(rows).items()}
            logits = net(
                x["given"], x["sums"], x["edge"], x["allowed"], edges.features().to(device), iterations, n * n
            )[-1]
            found |= dict(zip(part, logits.float().softmax(-1).cpu().numpy(), strict=True))
    return [found[k] for k in range(len(puzzles))]


def solve_rate(net: EdgeNet, puzzles: Sequence[Puzzle], iterations: int, device) -> list[int]:
    """Whether each puzzle comes out right in one forward pass, givens kept."""
    out = []
    for p, probs in zip(puzzles, predict(net, puzzles, iterations, device), strict=True):
        best = probs.argmax(-1)
        out.append(
            int(
                all(
                    c in (".", s) and (c != "." or int(s) == b)
                    for c, s, b in zip(p.givens, p.solution, best, strict=True)
                )
            )
        )
    return out


def net_job(name: str, run: Run) -> dict:
    """Train and test one seed: net-SEED. It leaves model.pt, and right or wrong for every test puzzle."""
    cfg, root = run.cfg, run.folder.parent
    files = {n: [root / f"data-{n}-{k}" / "puzzles.npz" for k in range(shards(cfg))] for n in cfg.train_sizes}
    net, speed = train_net(run, files)
    if run.is_main:
        common.write_atomic(run.folder / "model.pt", lambda f: torch.save(net.state_dict(), f))
    result = {"speed": speed, "sizes": {}}
    for n in cfg.train_sizes:
        tests = {
            k: read_puzzles(v)
            for k, v in json.loads((root / f"tests-{n}" / "result.json").read_text())["puzzles"].items()
        }
        rates = {
            t: np.mean(solve_rate(net, tests["valid"], t, run.device))
            for t in (cfg.iterations, 2 * cfg.iterations, 3 * cfg.iterations)
        }
        chosen = max(rates, key=rates.get)
        solved = {split: solve_rate(net, ps, chosen, run.device) for split, ps in tests.items()}
        result["sizes"][str(n)] = {"iterations": chosen, "solved": solved, "rates": rates}
    return result


# --- backends: all answer as text, so that parser and referee are always exercised ---


@dataclass
class Turn:
    """What a backend is asked: the messages, and for those that are no language model the puzzle itself."""

    messages: list[dict]
    p: Puzzle
    board: str
    mode: str
    start: str
    key: str  # names the episode
    call: int  # calls before this one


def turn_of(e: Episode, key: str) -> Turn:
    return Turn(e.turn(), e.p, e.board, e.mode, e.start, key, e.calls)


def answer(text: str, tokens: int = 0) -> Reply:
    return Reply(f"<ANSWER>\n{text}\n</ANSWER>", tokens)


def placements(board: str, grid: str, n: int, most: int) -> Reply:
    """A reply that places the first `most` empty cells as in `grid`."""
    blank = [i for i, c in enumerate(board) if c == "."][:most]
    return answer("\n".join(f"r{i // n + 1}c{i % n + 1}: {grid[i]}" for i in blank))


class SolverBackend:
    """The upper bound: the whole solution, or the next cell that propagation fixes."""

    name = "solver"

    def respond(self, turns: list[Turn]) -> list[Reply]:
        return [self.one(t) for t in turns]

    @functools.lru_cache(maxsize=2000)  # noqa: B019
    def solution(self, line: str) -> tuple[Solver, str]:
        p = Puzzle.from_line(line)
        found = prove(p).solutions
        return Solver(p), found[0] if found else "1" * p.n**2

    def one(self, t: Turn) -> Reply:
        prose = t.p.tags.get("sufficient") is False  # rules in words: only the stored solution is left
        solver, grid = (None, t.p.solution) if prose else self.solution(t.p.to_line())
        if t.mode == "single_shot":
            return answer(grid)
        if prose:
            return placements(t.board, grid, t.p.n, 1 if t.mode == "single_step" else 81)
        root = solver.root(t.board) or []
        fixed = [i for i, m in enumerate(root) if t.board[i] == "." and not m & (m - 1)]
        i = fixed[0] if fixed else t.board.index(".")
        return answer(f"{t.p.name(i)}: {grid[i]}")


class RandomBackend:
    """The lower bound: a uniform digit in a uniform empty cell, or in every empty cell."""

    name = "random"

    def respond(self, turns: list[Turn]) -> list[Reply]:
        return [self.one(t) for t in turns]

    def one(self, t: Turn) -> Reply:
        rng, digits = random.Random(f"{t.key} {t.call}"), BITS[t.p.digits]
        if t.mode == "single_shot":
            return answer("".join(str(rng.choice(digits)) if c == "." else c for c in t.board))
        i = rng.choice([i for i, c in enumerate(t.board) if c == "."])
        return answer(f"{t.p.name(i)}: {rng.choice(digits)}")


@functools.lru_cache(maxsize=4096)
def plain_completions(line: str, board: str, limit: int = 300) -> tuple[str, ...]:
    """All grids that keep the board and the plain rules, or `limit` draws where there are as many or more.

    A draw is the first grid of a search in fresh random order, so that not all come from one branch; it can
    come twice. Expectations over this list are exact for a player that picks from it.
    """
    solver, rng = Solver(Puzzle.from_line(line), ()), random.Random(line + board)
    found = solver.solve(board, limit, 50 * limit)
    if len(found.solutions) < limit:
        return tuple(found.solutions)
    draws = [solver.solve(board, 1, 5000, rng=rng).solutions for _ in range(limit)]
    return tuple(x[0] for x in draws if x)


class VanillaBackend:
    """What a model does that cannot read the rules: a uniform pick of plain completions."""

    name = "vanilla"

    def respond(self, turns: list[Turn]) -> list[Reply]:
        return [self.one(t) for t in turns]

    def one(self, t: Turn) -> Reply:
        grids = plain_completions(t.p.to_line(), t.start) or ("1" * t.p.n**2,)
        grid = random.Random(t.key).choice(grids)
        if t.mode == "single_shot":
            return answer(grid)
        return placements(t.board, grid, t.p.n, 1 if t.mode == "single_step" else 81)


class NeuralBackend:
    """The trained net: its best grid at once, or its most confident empty cell, again and again."""

    name = "neural"

    def __init__(self, net: EdgeNet, iterations: int, device: torch.device):
        self.net, self.iterations, self.device = net, iterations, device

    def respond(self, turns: list[Turn]) -> list[Reply]:
        probs = predict(
            self.net, [t.p for t in turns], self.iterations, self.device, [t.board for t in turns]
        )
        return [self.one(t, x) for t, x in zip(turns, probs, strict=True)]

    def one(self, t: Turn, probs: np.ndarray) -> Reply:
        best = "".join(c if c != "." else str(d) for c, d in zip(t.board, probs.argmax(-1), strict=True))
        if t.mode == "single_shot":
            return answer(best)
        i = max((i for i, c in enumerate(t.board) if c == "."), key=lambda i: probs[i].max())
        return answer(f"{t.p.name(i)}: {best[i]}")


class ScriptedBackend:
    """Replies from a JSONL file of puzzle, mode and replies: for tests, and transcripts from elsewhere."""

    def __init__(self, path: str):
        rows = common.read_jsonl(path, ("puzzle", "mode"))
        if bad := [k for k, r in enumerate(rows, 1) if not isinstance(r.get("replies"), list)]:
            raise UserError(f"{path}, row {bad[0]}: field 'replies' is no list")
        self.name = f"scripted:{path}"
        self.replies = {(r["puzzle"], r["mode"]): r["replies"] for r in rows}

    def respond(self, turns: list[Turn]) -> list[Reply]:
        lists = [self.replies.get((t.p.id, t.mode), []) for t in turns]
        return [
            Reply(str(x[t.call])) if t.call < len(x) else Reply(None)
            for x, t in zip(lists, turns, strict=True)
        ]


class BytesTokenizer:
    """One byte, one token: the tokenizer of the random model that `hf:tiny` is."""

    chat_template, eos_token_id, bos_token_id = None, 256, None

    def __len__(self) -> int:
        return 257

    def encode(self, text: str, add_special_tokens=False) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Iterable[int], skip_special_tokens=True) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class HFBackend:
    """Any causal language model; episodes in batches, shortest first, halved when memory runs out."""

    def __init__(self, name: str, cfg: Config, device: torch.device):
        self.name, self.cfg, self.device, self.opened = f"hf:{name}", cfg, device, ""
        self.tokens = self.seconds = 0
        if name == "tiny":
            torch.manual_seed(0)
            self.model, self.tok = common.tiny_lm(257, 32, 2, context=8192).eval(), BytesTokenizer()
        else:
            self.model, self.tok = common.load_lm(
                name, torch.bfloat16 if device.type == "cuda" else torch.float32
            )
        self.model.to(device).requires_grad_(False)
        self.batch = cfg.batch
        self.room = getattr(self.model.config, "max_position_embeddings", 1 << 20)

    def encode(self, messages: list[dict]) -> list[int]:
        if self.tok.chat_template:
            text = self.tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            self.opened = "<think>" if text.rstrip().endswith("<think>") else ""  # by the template
            return self.tok.encode(text, add_special_tokens=False)
        text = "".join(f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages) + "Assistant:"
        bos = [self.tok.bos_token_id] if self.tok.bos_token_id is not None else []
        return bos + self.tok.encode(text, add_special_tokens=False)

    def said_enough(self, rows: list[list[int]]) -> list[bool]:
        texts = [self.opened + self.tok.decode(ids, skip_special_tokens=True).lower() for ids in rows]
        return [x.rfind("</answer>") > x.rfind("</think>") >= x.rfind("<think>") for x in texts]

    def respond(self, turns: list[Turn]) -> list[Reply]:
        coded = [self.encode(t.messages) for t in turns]
        order, replies = sorted(range(len(turns)), key=lambda k: len(coded[k])), [Reply(None)] * len(turns)
        todo = [k for k in order if len(coded[k]) + 8 < self.room]
        for k in set(order) - set(todo):  # no room for the prompt: an empty answer, as from an endpoint
            replies[k] = Reply("")
        while todo:
            part, halve = todo[: self.batch], False
            try:
                for k, reply in zip(
                    part, self.generate([coded[k] for k in part], [turns[k] for k in part]), strict=True
                ):
                    replies[k] = reply
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise UserError(
                        f"{self.name}: out of memory with one episode; a smaller model, or an endpoint"
                    ) from None
                halve = True
            if halve:
                self.batch = max(1, len(part) // 2)
                torch.cuda.empty_cache()
            else:
                todo = todo[len(part) :]
        return replies

    def generate(self, prompts: list[list[int]], turns: list[Turn]) -> list[Reply]:
        steps = min(self.cfg.max_tokens, self.room - max(map(len, prompts)))
        draws = [
            torch.rand(
                steps, generator=torch.Generator().manual_seed(common.stable_hash(f"{t.key} {t.call}"))
            )
            for t in turns
        ]
        greedy, top_p = max(0.0, self.cfg.temperature), self.cfg.top_p if self.cfg.top_p > 0 else 1.0
        eos, begin = self.tok.eos_token_id, time.perf_counter()
        out = common.generate(
            self.model,
            prompts,
            torch.stack(draws),
            greedy,
            top_p,
            -1 if eos is None else eos,
            stop=self.said_enough,
        )
        tokens, mask = out[0].cpu(), out[1].cpu()
        rows = [ids[m].tolist() for ids, m in zip(tokens, mask, strict=True)]
        self.seconds += time.perf_counter() - begin
        self.tokens += sum(map(len, rows))
        texts = [self.opened + self.tok.decode(row, skip_special_tokens=True) for row in rows]
        return [Reply(text or " ", len(row)) for text, row in zip(texts, rows, strict=True)]


FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)


class HTTPBackend:
    """An OpenAI-compatible endpoint, URL or URL#MODEL. Its key is in OPENAI_API_KEY, and never logged."""

    def __init__(self, url: str, cfg: Config):
        url, _, model = url.partition("#")
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            self.url = (
                "http://" if re.match(r"(localhost|127\.|\[::1\])", self.url) else "https://"
            ) + self.url
        if "/chat/completions" not in self.url:
            self.url += "/chat/completions"
        self.cfg, self.model = cfg, model or cfg.model
        shown = self.url.partition("://")[2].partition("?")[0].removesuffix("/chat/completions")
        self.name = f"http:{self.model or 'default'}@{shown}"
        self.pool = ThreadPoolExecutor(cfg.concurrency)
        self.tokens = self.seconds = 0

    def respond(self, turns: list[Turn]) -> list[Reply]:
        begin = time.perf_counter()
        replies = list(self.pool.map(lambda t: self.ask(t.messages), turns))
        self.seconds += time.perf_counter() - begin
        self.tokens += sum(r.tokens for r in replies)
        return replies

    def ask(self, messages: list[dict]) -> Reply:
        """One request. 408, 429, 5xx, time-outs and malformed answers are tried again; 401, 403, 404 and a
        refused connection end the run in one line; any other 4xx is no answer.
        """
        body = {"model": self.model, "messages": messages, self.cfg.token_field: self.cfg.max_tokens}
        body |= {"temperature": self.cfg.temperature} if self.cfg.temperature >= 0 else {}
        body |= {"top_p": self.cfg.top_p} if self.cfg.top_p > 0 else {}
        head = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            head["Authorization"] = f"Bearer {key}"
        for attempt in range(self.cfg.retries):
            wait = min(60.0, 2.0**attempt) * (0.5 + random.random())
            try:
                request = urllib.request.Request(self.url, json.dumps(body).encode(), head)
                with urllib.request.urlopen(request, timeout=self.cfg.timeout) as response:
                    return self.read(json.loads(response.read(50 * MOST_READ)))
            except urllib.error.HTTPError as e:
                if e.code in (401, 403, 404):
                    raise UserError(f"{self.name}: HTTP {e.code} {printable(str(e.reason))[:80]}") from None
                if e.code not in (408, 429) and e.code < 500:
                    break
                after = e.headers.get("Retry-After", "")
                wait = min(300.0, float(after)) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", after) else wait
            except FAILURES as e:
                if isinstance(getattr(e, "reason", None), ConnectionRefusedError):
                    raise UserError(f"{self.name}: connection refused; is the endpoint running?") from None
            if attempt + 1 < self.cfg.retries:
                time.sleep(wait)
        return Reply(None)

    def read(self, data: dict) -> Reply:
        message = data["choices"][0]["message"]
        used = (data.get("usage") or {}).get("completion_tokens")
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        return Reply(str(message.get("content") or ""), used if isinstance(used, int) else 0, str(thought))


def make_backend(spec: str, cfg: Config, run: Run) -> object:
    """A backend from its flag; UserError where something that it needs is missing."""
    kind, _, rest = spec.partition(":")
    if kind == "neural":
        folder = run.folder / "study" / "net-0"
        if not (folder / "model.pt").exists():
            raise UserError("--backend neural needs the net that --study trains, in the same run folder")
        net = net_of(cfg).to(run.device).eval()
        net.load_state_dict(torch.load(folder / "model.pt", map_location=run.device, weights_only=True))
        sizes = json.loads((folder / "result.json").read_text())["sizes"]
        return NeuralBackend(net, next(iter(sizes.values()))["iterations"], run.device)
    if kind in ("scripted", "hf", "http") and not rest:
        raise UserError(f"--backend {kind} needs a value: {kind}:{'URL' if kind == 'http' else 'NAME'}")
    simple = {"solver": SolverBackend, "random": RandomBackend, "vanilla": VanillaBackend}
    if kind in simple:
        return simple[kind]()
    return (
        ScriptedBackend(rest)
        if kind == "scripted"
        else HFBackend(rest, cfg, run.device)
        if kind == "hf"
        else HTTPBackend(rest, cfg)
    )


# --- evaluation ---

KEY = ("sha", "puzzle", "backend", "mode", "N", "k", "seed", "trial", "prompts", "extract")


def puzzle_hash(p: Puzzle) -> str:
    return hashlib.sha256((p.to_line() + p.rules).encode("utf-8", "replace")).hexdigest()[:12]


def finished(folder: Path) -> dict[tuple, dict]:
    """Episodes of earlier runs by key; failed requests and a torn last line are left out."""
    found = {}
    for file in sorted(folder.glob("episodes*.jsonl")):
        for line in file.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
                key = tuple(row[k] for k in KEY)
            except (ValueError, KeyError, TypeError):
                continue
            if row["stop"] != "api_error" or key not in found:
                found[key] = row
    return {k: r for k, r in found.items() if r["stop"] != "api_error"}


def episode_key(cfg: Config, p: Puzzle, backend: str, mode: str, trial: int, prompts: str) -> dict:
    """What an episode is of, in the order of KEY."""
    return dict(sha=puzzle_hash(p), puzzle=p.id, backend=backend, mode=mode, N=cfg.history, k=cfg.empty,
        seed=cfg.seed, trial=trial, prompts=prompts, extract=cfg.extract)  # fmt: skip


def run_eval(cfg: Config, run: Run, puzzles: Sequence[Puzzle], backend, trials: int) -> list[dict]:
    """Play every puzzle in every mode; a rank takes puzzles i % world == rank; its episodes tick together.

    Finished episodes are one JSON line each, flushed; --resume skips them. Returns all ranks' rows.
    """
    templates, digest = load_prompts(cfg.prompts)
    done, live, rows = finished(run.folder) if cfg.resume else {}, [], []
    for k, p in enumerate(puzzles):
        if k % run.world_size != run.rank:
            continue
        for mode in cfg.mode:
            for trial in range(trials):
                key = episode_key(cfg, p, backend.name, mode, trial, digest)
                board = hints(p, cfg.empty, cfg.seed)
                if tuple(key.values()) in done:
                    rows.append(done[tuple(key.values())])
                elif board is not None:
                    live.append((key, Episode(p, mode, board, cfg.history, cfg.extract, templates, trial)))
    file = run.folder / f"episodes.{run.rank}.jsonl"
    error = None
    try:
        with open(file, "a", encoding="ascii") as out:
            while live:
                if run.signals:
                    break
                playing = [pair for pair in live if not pair[1].stop]
                turns = [turn_of(e, f"{key['seed']} {e.p.id} {e.mode} {e.trial}") for key, e in playing]
                for (_, e), reply in zip(playing, backend.respond(turns) if turns else [], strict=True):
                    e.take(reply)
                for key, e in live:
                    if e.stop:
                        rows.append(key | e.row())
                        if e.trial and backend.name in ("random", "vanilla"):
                            rows[-1]["messages"] = []  # their first trial is enough to read
                        out.write(json.dumps(rows[-1], ensure_ascii=True) + "\n")
                out.flush()
                live = [pair for pair in live if not pair[1].stop]
    except UserError as e:
        error = str(e)
    run.agree(error)
    run.leave_if_stopped()
    order = {p.id: k for k, p in enumerate(puzzles)}
    found = [r for part in run.gather(rows) for r in part]
    return sorted(found, key=lambda r: (cfg.mode.index(r["mode"]), order[r["puzzle"]], r["trial"]))


def wilson(k: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson 95 % interval of a share k / n."""
    if not n:
        return 0.0, 1.0
    p, d = k / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(a: Sequence[int], b: Sequence[int]) -> float:
    """Exact two-sided McNemar test of two players on the same puzzles."""
    wins = sum(x > y for x, y in zip(a, b, strict=True))
    losses = sum(x < y for x, y in zip(a, b, strict=True))
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0


def per_puzzle(rows: Iterable[dict], value: str) -> dict[str, float]:
    """Mean of a value over the trials of each puzzle."""
    found: dict[str, list[float]] = {}
    for r in rows:
        found.setdefault(r["puzzle"], []).append(r[value])
    return {k: float(np.mean(v)) for k, v in found.items()}


def score_rows(rows: list[dict], puzzles: Sequence[Puzzle]) -> list[dict]:
    """ASR and ACP by size and over all, with Wilson intervals over puzzles; a dash where some are missing.

    The last columns are over all sizes; s.e. is that of the ASR over trials, of players with more than one.
    """
    out = []
    wanted = collections.Counter(p.n for p in puzzles)
    for (backend, mode), group in group_by(rows, ("backend", "mode")).items():
        row: dict[str, object] = {"backend": backend, "mode": mode}
        sizes = sorted(wanted)
        solved, correct = per_puzzle(group, "solved"), per_puzzle(group, "correct")
        of = {p.id: p.n for p in puzzles}
        for name, ids in [
            *((str(n), [k for k in solved if of.get(k) == n]) for n in sizes),
            ("all", list(solved)),
        ]:
            short = len(ids) < (wanted[int(name)] if name != "all" else len(puzzles))
            share = sum(solved[k] for k in ids) / max(1, len(ids))
            low, high = wilson(share * len(ids), len(ids))
            row[f"ASR {name}"] = "-" if short else f"{100 * share:.1f} [{100 * low:.0f}, {100 * high:.0f}]"
            if mode != "single_shot":
                row[f"ACP {name}"] = "-" if short else f"{np.mean([correct[k] for k in ids]):.2f}"
            else:
                row[f"ACP {name}"] = ""
        empty = sum(r["E"] for r in group)
        row["ACP/E"] = (
            f"{sum(r['correct'] for r in group) / empty:.3f}" if mode != "single_shot" and empty else ""
        )
        if any(r["trial"] for r in rows):
            runs = [100 * np.mean([r["solved"] for r in g]) for g in group_by(group, ("trial",)).values()]
            spread = np.std(runs, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else None
            row["s.e. of trials"] = "" if spread is None else f"{spread:.2f}"
        row["calls"] = float(np.mean([r["calls"] for r in group]))
        row["tokens"] = float(np.mean([r["tokens"] for r in group]))
        out.append(row)
    return out


def group_by(rows: Iterable[dict], keys: Sequence[str]) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for r in rows:
        found.setdefault(tuple(r[k] for k in keys), []).append(r)
    return found


CLASSES = {  # failures of the paper's figure 4, by words; the paper asked a language model
    "surrender": r"\b(give up|(unable to|cannot|can't) (solve|find|determine)|too (complex|difficult))\b",
    "missing information": r"\b(missing|not (given|provided)|insufficient|need more) (information|clue|rule)",
    "claimed contradiction": r"\b(contradict\w*|inconsisten\w*|no (valid )?solution|impossible)\b",
}


def last_words(row: dict) -> str:
    """What a player thought and said last."""
    said = next((m["content"] for m in reversed(row["messages"]) if m["role"] == "assistant"), "")
    return f"{row.get('reasoning', '')}\n{said}".strip()


def failure_class(row: dict) -> str:
    """How an episode failed: what the judge said, else by keywords in the last reply and its reasoning."""
    if row.get("failure"):
        return row["failure"]
    bare = re.sub(r"<answer>.*?</answer>", "", last_words(row)[-20000:], flags=re.I | re.S).strip()
    if len(bare) < 20:
        return "no reasoning"
    return next((n for n, words in CLASSES.items() if re.search(words, bare, re.I)), "incorrect solution")


def judge_failures(cfg: Config, run: Run, rows: list[dict]) -> None:
    """--judge: an endpoint sorts language models' failures; where it fails the rest is left to keywords.

    The answer goes into row["failure"]. A request is tried once, for a minute at most: other ranks wait.
    """
    names = ("incorrect solution", *CLASSES, "no reasoning")
    ask = f"A solver failed at a puzzle. Answer with one of: {', '.join(names)}.\n\nIts reply, quoted:\n"
    judge = HTTPBackend(cfg.judge, replace(cfg, retries=1, timeout=min(60.0, cfg.timeout)))
    models = [r for r in rows if r["backend"].startswith(("hf:", "http:", "scripted:"))]
    failed = [r for r in models if not r["solved"] and "failure" not in r]
    texts = [ask + defused(last_words(r)[-4000:]) for r in failed]
    step = cfg.concurrency
    try:
        for k in range(0, len(failed), step):
            replies = judge.pool.map(
                lambda x: judge.ask([{"role": "user", "content": x}]), texts[k : k + step]
            )
            for row, reply in zip(failed[k : k + step], replies, strict=True):
                if reply.text is None:
                    raise UserError(f"{judge.name}: no answer")
                said = reply.text.lower()
                row["failure"] = next((n for n in names if n in said), "") or failure_class(row)
    except UserError as e:
        run.print(f"--judge: {e}; the failures left are sorted by keywords")


PUBLISHED = {  # arXiv 2505.16135, table 1: ACP 4, 6, 9, all; multi-step % solved; single-shot % solved
    "o3-mini (high)": ("9.7 0.7 - -", "60.0 0.0 - -", "73.3 6.7 2.9 14.0"),
    "Gemini 2.5 Pro (preview-03-25)": ("11.6 0.6 1.8 3.1", "73.3 0.0 0.0 11.0", "60.0 13.3 0.0 11.0"),
    "Qwen3-235B-A22B": ("6.5 1.1 0.7 1.7", "40.0 0 0 6.0", "53.3 0 0 8.0"),
    "Qwen3-30B-A3B": ("1.3 0.0 0.3 0.4", "6.7 0 0 1.0", "46.7 0 0 7.0"),
    "DeepSeek-R1": ("9.5 0.8 1.1 2.3", "60.0 0 0 9.0", "40.0 0 0 6.0"),
    "Grok 3 Mini": ("8.5 0.7 0.9 2.0", "53.3 0 0 8.0", "40.0 0 0 6.0"),
    "QwQ-32B": ("5.0 0.7 0.6 1.3", "26.7 0 0 4.0", "40.0 0 0 6.0"),
    "Qwen3-32B": ("4.3 0.5 0.5 1.0", "26.7 0 0 4.0", "40.0 0 0 6.0"),
    "Claude 3.7 Sonnet (thinking)": ("8.1 1.1 - -", "40.0 0 - -", "33.3 0 0 5.0"),
    "GPT-4.1": ("2.3 0.2 0.3 0.6", "13.3 0 0 2.0", "13.3 0 0 2.0"),
    "Gemini 2.0 Flash": ("0.5 0.1 0.2 0.2", "0", "0"),
    "Gemma 3 27B IT": ("0.1 0.1 0.5 0.3", "0", "0"),
    "Llama 4 Maverick": ("0.2 0.5 0.4 0.4", "0", "0"),
}


def expected_random(p: Puzzle, board: str) -> float:
    """E[ACP] of the random player: sum over t = 1 .. E of |D|^-t."""
    d, e = p.digits.bit_count(), board.count(".")
    return (1 - d**-e) / (d - 1)


def expected_vanilla(p: Puzzle, board: str) -> tuple[float, float]:
    """Exact chance to solve, and E[ACP] in multi-step, of the player that ignores the rules."""
    grids = plain_completions(p.to_line(), board)
    blanks = [i for i, c in enumerate(board) if c == "."]
    wrong = [[k for k, i in enumerate(blanks) if g[i] != p.solution[i]] for g in grids]
    runs = [w[0] if w else len(blanks) for w in wrong]
    return (sum(g == p.solution for g in grids) / len(grids), float(np.mean(runs))) if grids else (0.0, 0.0)


# --- drawing and the report ---


MARKS = {"white": "○", "black": "●"}


def same_region(p: Puzzle, a: Cell, b: Cell) -> bool:
    """Whether two cells are inside the grid and of one region."""
    if not all(1 <= x <= p.n for x in (*a, *b)):
        return False
    return any(p.index(a) in group and p.index(b) in group for group in p.groups)


def short_mark(e: dict) -> str:
    """The one character that stands for an element on an edge, "" where there is none."""
    if e.get("shape") == "circle" and not e.get("text"):
        return MARKS.get(e.get("color_name"), "")
    text = str(e.get("text") or e.get("direction") or "")
    return text if len(text) == 1 else ""


def ascii_grid(p: Puzzle, board: str | None = None, plain: bool = False) -> str:
    """The grid with region walls and marks on edges, then the rest of the drawings as a list; 80 columns."""
    n, board, signs, rest = p.n, p.givens if board is None else board, {}, []
    for e in p.visual():
        where = tuple(sorted(coords(e)))
        on_edge = len(where) == 2 and e.get("type") in ("overlays", "underlays", "inequality")
        if on_edge and short_mark(e):
            signs[where] = short_mark(e)
        else:
            rest.append(element_text(e))
    lines = []
    for r in range(1, n + 2):
        edge = ""
        for c in range(1, n + 1):
            bar = " · " if same_region(p, (r - 1, c), (r, c)) else "━━━"
            sign = signs.get(((r - 1, c), (r, c)))
            edge += "╋" + (bar[0] + sign + bar[2] if sign else bar)
        lines.append(edge + "╋")
        if r > n:
            break
        row = ""
        for c in range(1, n + 2):
            wall = " " if same_region(p, (r, c - 1), (r, c)) else "┃"
            row += signs.get(((r, c - 1), (r, c)), wall)
            row += f" {board[(r - 1) * n + c - 1]} " if c <= n else ""
        lines.append(row)
    text = "\n".join(lines + [f"- {x}" for x in rest if x])
    return text.translate(str.maketrans("━╋┃○●·", "-+|oX.")) if plain else text


ARROWS = {
    "lower right": "↘", "lower left": "↙", "upper right": "↗", "upper left": "↖", "left": "←", "right": "→",
    "up": "↑", "down": "↓",
}  # fmt: skip
SIDES = ((0, 1), (1, 0), (0, -1), (-1, 0))


def tag_of(name: str, text: str | None = None, **attributes) -> str:
    """One SVG element; values and text are escaped, _ in names becomes -."""
    pairs = (
        (k.replace("_", "-"), f"{v:.1f}" if isinstance(v, float) else str(v)) for k, v in attributes.items()
    )
    inside = " ".join(f'{k}="{html.escape(v, quote=True)}"' for k, v in pairs)
    return (
        f"<{name} {inside}/>" if text is None else f"<{name} {inside}>{html.escape(printable(text))}</{name}>"
    )


def svg_text(x: float, y: float, text: str, size: float, color: str = "black") -> str:
    where = dict(x=x, y=y, font_size=size, fill=color, text_anchor="middle", dominant_baseline="central")
    return tag_of("text", text, **where, font_family="sans-serif")


def svg_line(a: tuple[float, float], b: tuple[float, float], **style) -> str:
    return tag_of("line", x1=a[0], y1=a[1], x2=b[0], y2=b[1], **style)


def paint(name: str | None, other: str) -> str:
    """A colour's name or code, or another where it is neither."""
    return name if re.fullmatch(r"[a-z]+|#[0-9a-fA-F]{3,8}", name or "") else other


def svg_cage(cells: Sequence[Cell], size: int) -> str:
    """A dashed line just inside the border of a cage."""
    out, d = "", size / 2 - 5
    for r, c in cells:
        x, y = (c + 0.5) * size, (r + 0.5) * size
        for dr, dc in SIDES:
            if (r + dr, c + dc) not in cells:
                a, b = (x + dc * d - dr * d, y + dr * d - dc * d), (x + dc * d + dr * d, y + dr * d + dc * d)
                out += svg_line(a, b, stroke="black", stroke_dasharray="4 3")
    return out


def svg_element(e: dict, n: int, size: int) -> tuple[int, str]:
    """(layer, drawing) of a visual element: 0 shapes, 1 lines, 2 cages, 3 marks above the grid."""
    cells = coords(e)
    if not cells:
        return 0, ""
    centers = [((c + 0.5) * size, (r + 0.5) * size) for r, c in cells]
    x, y = (sum(xy[k] for xy in centers) / len(cells) for k in (0, 1))
    kind = str(e.get("type"))
    if kind in ("lines", "arrows"):
        points, head = " ".join(f"{a:.0f},{b:.0f}" for a, b in centers), kind == "arrows"
        style = dict(fill="none", stroke=paint(e.get("color_name"), "gray"), stroke_width=4 if head else 10)
        end = {"marker_end": "url(#head)"} if head else {}
        return 1, tag_of(
            "polyline", points=points, stroke_opacity=0.55, stroke_linecap="round", **style, **end
        )
    if kind == "cage" and e.get("style") != "box":
        corner = min(cells)
        text = svg_text(
            (corner[1] + 0.17) * size, (corner[0] + 0.17) * size, str(e.get("value")), size * 0.22
        )
        return 2, svg_cage(cells, size) + (text if e.get("value") else "")
    if kind == "inequality":
        return 3, svg_text(x, y, str(e.get("direction")), size * 0.32)
    if kind.endswith(" arrow"):
        return 3, svg_text(x + size * 0.28, y + size * 0.28, ARROWS.get(e.get("direction"), "?"), size * 0.3)
    if kind not in ("underlays", "overlays"):
        return 0, ""
    big = size * (
        {1: 0.96, 4: 0.4}.get(len(cells), 0.26) if e.get("shape") != "circle" or len(cells) > 1 else 0.75
    )
    style = dict(fill=paint(e.get("color_name"), "none"), stroke=paint(e.get("border_color_name"), "none"))
    drawn = ""
    if e.get("shape") == "circle":
        drawn = tag_of("circle", cx=x, cy=y, r=big / 2, **style)
    elif e.get("shape"):
        drawn = tag_of("rect", x=x - big / 2, y=y - big / 2, width=big, height=big, **style)
    if e.get("text"):
        outside = not all(1 <= v <= n for v in cells[0])
        inside = len(cells) == 1 and not outside
        place = (x + size * 0.3, y + size * 0.34) if inside else (x, y)
        drawn += svg_text(*place, str(e["text"]), size * (0.36 if outside else 0.16 if inside else 0.2))
    return (0 if len(cells) == 1 and e.get("shape") else 3), drawn


def svg_grid(p: Puzzle, board: str, size: int) -> Iterator[tuple[int, str]]:
    """The cells, the walls of regions, and the digits."""
    for r, c in itertools.product(range(1, p.n + 1), repeat=2):
        x, y, i = c * size, r * size, p.index((r, c))
        yield 2, tag_of("rect", x=x, y=y, width=size, height=size, fill="none", stroke="#999")
        for dr, dc in SIDES:
            if not same_region(p, (r, c), (r + dr, c + dc)):
                a = (x + size * (dc > 0), y + size * (dr > 0))
                b = (a[0] + size * (dc == 0), a[1] + size * (dr == 0))
                yield 3, svg_line(a, b, stroke="black", stroke_width=3)
        if board[i] != ".":
            wrong = p.solution and board[i] != p.solution[i]
            color = "black" if p.givens[i] != "." else "#c00" if wrong else "#1a56c4"
            yield 4, svg_text(x + size / 2, y + size / 2, board[i], size * 0.55, color)


def svg(p: Puzzle, board: str | None = None, size: int = 64) -> str:
    """The puzzle as an SVG; digits are black where given, blue where placed, red where wrong."""
    board, side, layers = p.givens if board is None else board, (p.n + 2) * size, ["", "", "", "", ""]
    for layer, drawn in (*(svg_element(e, p.n, size) for e in p.visual()), *svg_grid(p, board, size)):
        layers[layer] += drawn
    tip = '<path d="M0 0 L10 5 L0 10 z" fill="gray"/>'
    box = 'viewBox="0 0 10 10" refX="7" refY="5" markerWidth="5" markerHeight="5" orient="auto"'
    paper = f'<defs><marker id="head" {box}>{tip}</marker></defs>' + tag_of(
        "rect", width=side, height=side, fill="white"
    )
    size_ = f'viewBox="0 0 {side} {side}" width="{side // 2}" height="{side // 2}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size_}>{paper}{"".join(layers)}</svg>'


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Sudoku-Bench report</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>
body{font:15px/1.45 sans-serif;margin:2em auto;max-width:70em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}.tiles{display:flex;flex-wrap:wrap;gap:4px}
.tile{width:6em;padding:.2em;font-size:.75em;text-align:center;border-radius:4px}
.yes{background:#bfe6c3}.no{background:#f3c4c0}figure{margin:.5em 1em .5em 0;float:left}
pre{white-space:pre-wrap;background:#f6f6f6;padding:.6em;max-height:26em;overflow:auto}
details{clear:both;border-top:1px solid #ddd;padding:.4em 0}summary{cursor:pointer}
a{color:inherit;text-decoration:none}
</style></head><body>"""


def report(puzzles: Sequence[Puzzle], rows: list[dict], scores: list[dict], most: int = 100) -> str:
    """One static page: the table, a tile a puzzle, and for every episode its grid and escaped transcript."""
    by_id, parts = {p.id: p for p in puzzles}, [PAGE, "<h1>Sudoku-Bench report</h1>"]
    if scores:
        cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()] for r in scores]
        table = [f"<tr>{''.join(f'<td>{escaped(v)}</td>' for v in row)}</tr>" for row in cells]
        heads = "".join(f"<th>{escaped(k)}</th>" for k in scores[0])
        parts.append(f"<table><tr>{heads}</tr>{''.join(table)}</table>")
    for (backend, mode), group in group_by(rows, ("backend", "mode")).items():
        group = sorted(group, key=lambda r: (r["n"], r["puzzle"], r["trial"]))
        stops = collections.Counter(r["stop"] for r in group).most_common()
        parts.append(f"<h2>{escaped(backend)}, {escaped(mode)}</h2>")
        parts.append(f"<p>{', '.join(f'{escaped(k)}: {v}' for k, v in stops)}</p><div class=tiles>")
        parts += [tile(r, f"{backend}-{mode}-{k}") for k, r in enumerate(group) if not r["trial"]]
        parts.append("</div>")
        known = [(k, r) for k, r in enumerate(group) if r["puzzle"] in by_id and r["messages"]][:most]
        parts += [transcript(by_id[r["puzzle"]], r, f"{backend}-{mode}-{k}") for k, r in known]
    return "".join(parts) + "</body></html>"


def escaped(text: object) -> str:
    return html.escape(printable(str(text)), quote=True)


def tile(row: dict, anchor: str) -> str:
    score = row["stop"] if row["mode"] == "single_shot" else f"{row['correct']} of {row['E']}"
    colour = "yes" if row["solved"] else "no"
    inside = f"{escaped(row['puzzle'])}<br>{escaped(score)}"
    return f'<a class="tile {colour}" href="#{escaped(anchor)}">{inside}</a>'


def transcript(p: Puzzle, row: dict, anchor: str) -> str:
    """An episode: final grid, rules, what is broken, and the first and the last dozen of its messages."""
    size = p.n**2
    board = (
        row["final_board"]
        if re.fullmatch(rf"[0-9.]{{{size}}}", row["final_board"], re.A)
        else row["initial_board"]
    )
    why = "" if row["solved"] else f", {failure_class(row)}"
    name = " ".join(filter(None, (p.id, p.title)))
    head = f"{name}: {row['stop']}{why}, {row['correct']} correct, {row['calls']} calls"
    parts = [f'<details id="{escaped(anchor)}"{" open" if anchor.endswith("-0") else ""}>']
    parts += (
        f"<summary>{escaped(head)}</summary><figure>{svg(p, board, 48)}</figure>",
        f"<p>{escaped(p.rules_text())}</p>",
    )
    if row.get("violations"):
        parts.append(f"<p>Broken: {'; '.join(map(escaped, row['violations'][:20]))}</p>")
    messages = row["messages"][:1] + row["messages"][1:][-12:]
    if row.get("reasoning"):
        messages.insert(-1, {"role": "reasoning of the last reply", "content": row["reasoning"]})
    parts += [f"<b>{escaped(m['role'])}</b><pre>{escaped(m['content'][:20000])}</pre>" for m in messages]
    return "".join(parts) + "</details>"


# --- one thing at a time ---


def find_puzzle(text: str, cfg: Config) -> Puzzle:
    """A puzzle from an id of the data, a link, a file or a line of the suite's format."""
    bare = re.match(r"scl|ctc|fpuz", text) or re.fullmatch(r"[A-Za-z0-9+/=%\\]{40,}", text)
    if "://" in text or (bare and not os.path.exists(text)):
        return import_link(text, cfg.fetch, cfg.infer)
    if text.count("|") == 4:
        try:
            return Puzzle.from_line(text)
        except ValueError as e:
            raise UserError(str(e)) from None
    if os.path.isfile(text):
        where, row = read_rows(Path(text))[0]
        return read_row(row, where)
    known = load_puzzles(cfg)
    if found := [p for p in known if p.id == text]:
        return found[0]
    raise UserError(
        f"{text[:60]!r}: neither a link, a file, nor one of {', '.join(p.id for p in known[:4])} ..."
    )


def show(cfg: Config, run: Run) -> None:
    """--show, --solve and --link: draw a puzzle, solve it with proof, or import it and say what it holds."""
    if cfg.link:
        path, failed, found, error = Path(cfg.link), 0, [], None
        texts = (
            [x for x in path.read_text().split("\n") if x.strip()] if os.path.isfile(cfg.link) else [cfg.link]
        )
        for text in texts:
            try:
                found.append(import_link(text, cfg.fetch, cfg.infer))
            except LinkError as e:  # the others go on
                failed, error = failed + 1, e
                run.print(e)
        if not found:
            raise UserError(f"none of {len(texts)} links could be read; the last: {error}")
        common.write_atomic(
            run.folder / "imported.jsonl", "".join(json.dumps(p.to_json()) + "\n" for p in found).encode()
        )
        run.print(f"{len(found)} imported, {failed} failed: {run.folder / 'imported.jsonl'}")
    else:
        found = [find_puzzle(cfg.show or cfg.solve, cfg)]
    for p in found[:10]:
        board = p.givens
        run.print(f"\n{printable(p.id)} {printable(p.title)}\n{printable(p.rules_text())}")
        if cfg.solve or cfg.link:
            r = prove(p)
            run.print(f"{r.status}; {r.nodes} nodes, {r.ms:.1f} ms, {r.root} cells without search")
            board = r.solutions[0] if r.solutions else board
            features = {k: v for k, v in p.tags.items() if k.startswith("features") or k == "inferred"}
            run.print(f"constraints are {'' if sufficient(p) else 'not '}sufficient {features or ''}")
        run.print(printable(ascii_grid(p, board, not (sys.stdout.encoding or "").lower().startswith("utf"))))
        for name, url in (links(p) if not cfg.link else {}).items():
            run.print(f"{name}: {url}")
        if cfg.svg:
            common.write_atomic(Path(cfg.svg), svg(p, board).encode())
            run.print(f"drawn: {cfg.svg}")


def make_puzzles(cfg: Config, run: Run) -> None:
    """--generate: new puzzles with proofs, one JSON line each."""
    size, count = cfg.generate.split(":")
    n, count = int(size[0]), int(count)
    rng, made, tries, times = random.Random(f"generate {cfg.seed}"), [], 0, []
    while len(made) < count:
        tries += 1
        if tries > 200 and tries > 100 * (len(made) + 1):
            raise UserError(f"--families {','.join(cfg.families)}: no {size} puzzle in {tries} tries")
        deck = [f for f, where in SUITE_FAMILIES.items() if n in where]
        families = list(cfg.families) or rng.sample(deck, rng.randint(1, 3))
        if not cfg.families and clash(families):
            continue
        begin = time.perf_counter()
        p = generate(n, families, rng, f"g{n}-{cfg.seed}-{len(made) + 1}")
        times.append(time.perf_counter() - begin)
        if p:
            made.append(p)
    text = "".join(json.dumps(p.to_json()) + "\n" for p in made)
    common.write_atomic(run.folder / "puzzles.jsonl", text.encode())
    run.print(f"{count} puzzles in {tries} tries, {1000 * sum(times) / count:.1f} ms each: {run.folder}")


HARD = (  # known 9x9, with the first twelve digits of their solutions
    ("003020600900305001001806400008102900700000008006708200002609500800203009005010300", "483921657967"),
    ("4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......", "417369825632"),
    ("8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4..", "812753649943"),
    ("000000010400000000020000000000050407008000300001090000300400200050100000000806000", "693784512487"),
    (".......39.....1..5..3.5.8....8.9...6.7...2...1..4.......9.8..5..2....6..4..7.....", "751846239892"),
)
MIRACLE = "." * 38 + "1" + "." * 12 + "2" + "." * 29


def selftest(cfg: Config, run: Run) -> None:
    """Prove mini_48 again, check its texts, and time solver and generator on this machine."""
    suite, rows = mini_48(), []
    run.print(f"mini_48 {hashlib.sha256(MINI_48.strip().encode()).hexdigest()}, {CANARY}")
    bad, times = [], []
    for p in suite:
        r = prove(p)
        times.append(r.ms)
        if r.status != "unique" or r.solutions[0] != p.solution:
            bad.append(f"{p.id}: {r.status}")
        for clues in without_a_family(p):
            if Solver(p, clues).solve(nodes=100_000).status != "multiple":
                bad.append(f"{p.id}: a family is not needed")
        if missing := [c.type for c in p.clues if RULES[c.type].text(p.n, c) not in p.rules_text()]:
            bad.append(f"{p.id}: rules do not mention {missing[0]}")
    rows.append({"what": "mini_48, proof", "median ms": float(np.median(times)), "worst ms": max(times)})
    for k, (text, start) in enumerate(HARD, 1):
        solver = Solver(Puzzle(f"hard-{k}", 9, text.replace("0", ".")))
        r = min((solver.solve() for _ in range(3)), key=lambda r: r.ms)
        rows.append({"what": f"known hard 9x9 no. {k}, {r.nodes} nodes", "median ms": r.ms, "worst ms": r.ms})
        bad += [] if r.status == "unique" and r.solutions[0].startswith(start) else [f"hard {k}"]
    miracle = Puzzle("miracle", 9, MIRACLE, (Clue("antiknight"), Clue("antiking"), Clue("nonconsecutive")))
    r = prove(miracle)
    rows.append({"what": f"Miracle sudoku, {r.nodes} nodes", "median ms": r.ms, "worst ms": r.ms})
    bad += [] if r.status == "unique" and r.solutions[0].startswith("483726159726159483") else ["Miracle"]
    for n, count in ((4, 100), (6, 40), (9, 12)):
        rng, times = random.Random(n), []
        for _ in range(count):
            begin = time.perf_counter()
            generate(n, ["killer", "white", "black"][: 2 + (n == 9)], rng, lean=False, tagged=False)
            times.append(1000 * (time.perf_counter() - begin))
        rows.append(
            {
                "what": f"generate {n}x{n}, killer and dots",
                "median ms": float(np.median(times)),
                "worst ms": max(times),
            }
        )
    run.table(rows, "solver and generator, one core")
    run.print(f"{len(suite)} puzzles proved again; {'all is well' if not bad else '; '.join(bad)}")
    if bad:
        raise UserError(f"selftest: {bad[0]}")


# --- the study ---


def study(cfg: Config, run: Run) -> dict[str, float]:
    """Part B: train the neural solver; test it on rules seen, in new pairs, never seen. Returns speeds."""
    part = run.stage("study")
    sizes = sorted(cfg.train_sizes, reverse=True)  # what takes longest comes first
    data = [f"data-{n}-{k}" for n in sizes for k in range(shards(cfg))]
    made = part.jobs([*(f"tests-{n}" for n in sizes), *data], generate_job)
    if cfg.config == "full" or (run.world_size > 1 and cfg.seeds == 1):  # one net, data parallel
        nets = {"net-0": shared_net(part)}
    else:
        nets = part.jobs([f"net-{k}" for k in range(cfg.seeds)], net_job)
    speed = {
        k: float(np.mean([r["speed"][k] for r in nets.values()]))
        for k in ("net_steps_per_s", "net_puzzles_per_s", "steps")
    }
    made_seconds = sum(made[s]["seconds"] for s in data)
    speed["puzzles_generated_per_s"] = sum(made[s]["count"] for s in data) / max(made_seconds, 1e-9)
    for n in cfg.train_sizes:
        study_report(
            run,
            n,
            {k: read_puzzles(v) for k, v in made[f"tests-{n}"]["puzzles"].items()},
            [r["sizes"][str(n)] for r in nets.values()],
        )
    return speed


def generate_job(name: str, run: Run) -> dict:
    return tests_job(name, run) if name.startswith("tests") else data_job(name, run)


def shared_net(part: Run) -> dict:
    """One net trained by all ranks together."""
    child = part.stage("net-0")
    file = child.folder / "result.json"
    if not part.cfg.resume or not file.exists():
        result = net_job("net-0", child)
        if part.is_main:
            common.write_json(file, result)
    part.barrier()
    return json.loads(file.read_text())


def study_report(run: Run, n: int, tests: dict[str, list[Puzzle]], nets: list[dict]) -> None:
    rows, solved = [], {}
    for split, puzzles in tests.items():
        if split == "valid":
            continue
        per = np.array([x["solved"][split] for x in nets], float)  # (seeds, puzzles)
        solved[split] = per.mean(0)
        chance = np.array([1 / max(1, p.tags["vanilla"]) for p in puzzles])
        low, high = wilson(per.mean() * per.shape[1], per.shape[1])
        rows.append({"split": split, "puzzles": per.shape[1],
            "solved": f"{per.mean():.3f} [{low:.3f}, {high:.3f}]",
            "each seed": " ".join(f"{x:.3f}" for x in per.mean(1)),
            "chance": f"{chance.mean():.3f}"})  # fmt: skip
        solved[split + " chance"] = chance
    chosen = ", ".join(f"{x['iterations']}" for x in nets)
    run.table(
        rows,
        f"neural solver on {n}x{n}; iterations picked on validation: {chosen}; 95 % intervals over puzzles",
    )
    add = f" ({n}x{n})"
    sayings = (
        ("seen rules: the net beats ignoring them", "seen", "seen", " chance"),
        ("rules never seen (theirs) are harder than seen ones", "seen", "novel", ""),
        ("... but the net still beats ignoring them", "novel", "novel", " chance"),
    )
    for more in ("", " +2"):
        tag_ = (" with 2 more givens" if more else "") + add
        for text, ours, theirs, chance in sayings:
            run.claim(text + tag_, solved[ours + more], solved[theirs + more + chance])
    run.results.setdefault("splits", {})[str(n)] = [r | {"more": "+2" in r["split"]} for r in rows]


def benchmark(cfg: Config, run: Run) -> tuple[dict[str, float], list[dict]]:
    """Part A: the backends through the protocols. Returns speeds and rows."""
    puzzles, rows, speed = load_puzzles(cfg, run), [], {}
    begin = time.perf_counter()
    proofs = [prove(p, 20_000, 5.0) for p in puzzles if p.source != "official"]
    speed["puzzles_solved_per_s"] = len(proofs) / (time.perf_counter() - begin) if proofs else 0.0
    for p, r in zip([p for p in puzzles if p.source != "official"], proofs, strict=True):
        p.tags.setdefault("families", sorted({c.type for c in p.clues}))
        p.tags.setdefault("l0", r.root)
        p.tags.setdefault("sufficient", r.status == "unique" and r.solutions[0] == p.solution)
    for spec in cfg.backend:
        backend = make_backend(spec, cfg, run)
        trials = 1 if spec in ("solver", "neural") or spec.startswith("scripted") else cfg.trials
        begin = time.perf_counter()
        rows += run_eval(cfg, run, puzzles, backend, trials)
        run.print(f"  {backend.name}: {time.perf_counter() - begin:.0f} s")
        if getattr(backend, "seconds", 0):
            speed[f"{spec.split(':')[0]}_tokens_per_s"] = backend.tokens / backend.seconds
    if not rows:
        raise UserError(f"no puzzle has more than --empty {cfg.empty} empty cells")
    playable = [p for p in puzzles if hints(p, cfg.empty, cfg.seed) is not None]
    scores = score_rows(rows, playable)
    run.table(
        scores, f"{cfg.data or 'mini_48'}: % solved (ASR, Wilson 95 %) and correct placements (ACP) by size"
    )
    if "neural" in cfg.backend and not cfg.data:
        run.print("neural: mini_48 is not held out from the solutions of its training puzzles, part B is")
    if not cfg.data:
        bounds(cfg, run, playable, rows)
    breakdown(run, rows)
    if run.is_main:
        if cfg.judge:
            judge_failures(cfg, run, rows)
        common.write_atomic(
            run.folder / "report.html", report(puzzles, rows, scores).encode("utf-8", "replace")
        )
        keys = {tuple(r[k] for k in KEY) for r in rows}
        earlier = [r for k, r in finished(run.folder).items() if k not in keys]
        text = "".join(json.dumps(r, ensure_ascii=True) + "\n" for r in (*rows, *earlier))
        common.write_atomic(run.folder / "episodes.jsonl", text.encode())
        for file in run.folder.glob("episodes.*.jsonl"):
            file.unlink()
    run.barrier()
    run.print(f"report: {run.folder / 'report.html'}")
    return speed, rows


def bounds(cfg: Config, run: Run, puzzles: list[Puzzle], rows: list[dict]) -> None:
    """The solver's, the random and the rule-ignoring player's exact expectations, as claims."""
    boards, of = {p.id: hints(p, cfg.empty, cfg.seed) for p in puzzles}, {p.id: p for p in puzzles}
    stepwise = [m for m in cfg.mode if m != "single_shot"]
    vanilla = functools.cache(lambda k: expected_vanilla(of[k], boards[k]))
    kinds = (  # player, modes, sentence, what is measured, what is expected of a puzzle, margin
        ("solver", cfg.mode, "the solver solves all", "solved", lambda k: 1.0, 1e-9),
        ("solver", stepwise, "... and its ACP is the number of empty cells", "correct",
            lambda k: boards[k].count("."), 1e-9),
        ("random", stepwise, "random play has its expected ACP", "correct",
            lambda k: expected_random(of[k], boards[k]), 0.05),
        ("vanilla", cfg.mode, "ignoring the rules solves as often as expected", "solved",
            lambda k: vanilla(k)[0], 0.05),
        ("vanilla", stepwise, "... and has its expected ACP", "correct", lambda k: vanilla(k)[1], 1.0),
    )  # fmt: skip
    groups = group_by(rows, ("backend", "mode"))
    for player, modes, text, value, expected, margin in kinds:
        for mode in modes:
            if found := per_puzzle(groups.get((player, mode), ()), value):
                want = [expected(k) for k in found]
                run.claim(f"{text}, {mode}", list(found.values()), want, "same", margin)


def breakdown(run: Run, rows: list[dict]) -> None:
    """How episodes ended, by backend; what language models solve by family and l0; McNemar between them."""
    stops = [
        {"backend": b, "mode": m, "stop": s, "episodes": len(g)}
        for (b, m, s), g in sorted(group_by(rows, ("backend", "mode", "stop")).items())
    ]
    run.table(stops, "how episodes ended")
    models = [r for r in rows if r["backend"] not in ("solver", "random", "vanilla")]
    for (backend, mode), group in group_by(models, ("backend", "mode")).items():
        by = collections.defaultdict(list)
        for r in group:
            for f in [
                *r["families"],
                "l0 unknown" if r["l0"] is None else "l0 = 0" if r["l0"] == 0 else "l0 > 0",
            ]:
                by[f].append(r["solved"])
        run.table(
            [{"family": f, "episodes": len(x), "solved": float(np.mean(x))} for f, x in sorted(by.items())],
            f"{backend}, {mode}: by family",
        )
    for a, b in itertools.combinations(sorted({r["backend"] for r in models}), 2):
        for mode in sorted({r["mode"] for r in models}):
            one, two = (
                per_puzzle([r for r in models if r["backend"] == x and r["mode"] == mode], "solved")
                for x in (a, b)
            )
            both = sorted(set(one) & set(two))
            if both:
                p = mcnemar([round(one[k]) for k in both], [round(two[k]) for k in both])
                run.print(f"McNemar, {a} against {b}, {mode}: p = {p:.3g} on {len(both)} puzzles")


def published(run: Run) -> None:
    rows = [
        {"model": m, "ACP 4 / 6 / 9 / all": a, "multi-step %": b, "single-shot %": c}
        for m, (a, b, c) in PUBLISHED.items()
    ]
    run.table(
        rows,
        "challenge_100 as published (arXiv 2505.16135, table 1): not comparable with the rows above",
        keep=False,
    )


def draw_study(figure, run: Run, rows: list[dict]) -> None:
    """Two panels: backends by size, and the net on seen, recombined, novel and plain rules."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    for (backend, mode), group in group_by(
        [r for r in rows if r["mode"] != "single_step"], ("backend", "mode")
    ).items():
        sizes = sorted({r["n"] for r in group})
        share = [
            np.mean(
                [
                    r["correct"] / max(1, r["E"]) if mode == "multi_step" else r["solved"]
                    for r in group
                    if r["n"] == n
                ]
            )
            for n in sizes
        ]
        left.plot(
            [f"{n}x{n}" for n in sizes],
            share,
            "o-" if mode == "multi_step" else "s--",
            label=f"{backend}, {mode.replace('_', '-')}",
        )
    left.set(title="ACP / E (multi-step), solved (single-shot)", ylim=(-0.03, 1.03))
    left.legend(fontsize=7)
    splits = run.results.get("splits", {})
    for k, (n, table) in enumerate(splits.items()):
        x = np.arange(len(table)) + k * 0.4
        solved = [float(r["solved"].split()[0]) for r in table]
        ends = [tuple(map(float, re.findall(r"[\d.]+", r["solved"])[1:])) for r in table]
        error = np.abs(np.array(ends).T - np.array(solved))
        right.bar(x, solved, 0.35, yerr=error, label=f"net, {n}x{n}", capsize=2)
        right.plot(
            x, [float(r["chance"]) for r in table], "k_", ms=14, label="ignoring the rules" if not k else None
        )
        right.set_xticks(x, [r["split"] for r in table], rotation=30, ha="right")
    right.set(title="Neural solver, solved in one pass", ylim=(0, 1.03))
    if splits:
        right.legend(fontsize=7)


def dry_run(cfg: Config, run: Run) -> None:
    """Sizes, calls and steps of this config; loads nothing but a local file of puzzles."""
    net = sum(p.numel() for p in net_of(cfg).parameters())
    if not cfg.data or os.path.exists(cfg.data):
        puzzles = load_puzzles(cfg)
        empty = sum(p.givens.count(".") for p in puzzles)
        run.print(
            f"{len(puzzles)} puzzles; at most {empty} calls a trial stepwise, {len(puzzles)} in single-shot"
        )
    else:
        run.print(f"{cfg.data}: from the hub, challenge_100 has 100 puzzles with 6,000 empty cells or less")
    for spec in cfg.backend:
        run.print(f"backend {spec}, modes {', '.join(cfg.mode)}, {cfg.trials} trials")
    if cfg.study:
        cells = max(cfg.train_sizes) ** 2
        flops = 6 * net * (cells + 8) * cfg.batch_size * cfg.iterations
        rest = f"about {flops / 1e9:.1f} GFLOP an update, {16 * net / 2**20:.1f} MiB of state on each rank"
        run.print(
            f"net: {net:,} parameters, {cfg.seeds} x {cfg.steps} updates of {cfg.batch_size} puzzles, {rest}"
        )
        run.print(
            f"{cfg.train_puzzles:,} puzzles of sizes {cfg.train_sizes} to train, {cfg.test_puzzles} a split"
        )


# fmt: off
DEMO = Config(
    backend=("solver", "random", "vanilla", "neural"), workers=2, trials=60, log_every=50, save_every=200)
CONFIGS = {
    "smoke": replace(DEMO, workers=1, backend=(*DEMO.backend, "hf:tiny"), sizes=(4,), limit=6, trials=2,
        train_puzzles=64, test_puzzles=8, steps=15, seeds=1, hidden=16, heads=2, iterations=2,
        batch_size=8, max_tokens=8, log_every=5),
    "demo": DEMO,
    "gpu": replace(DEMO, workers=8, train_puzzles=84_000, train_sizes=(4, 6, 9), hidden=256, heads=8,
        iterations=16, gate_rank=8, batch_size=512, steps=20_000, seconds=360.0, seeds=1, lr=1e-3),
    "full": replace(DEMO, data="SakanaAI/Sudoku-Bench:challenge_100", backend=("hf:Qwen/QwQ-32B",), trials=1,
        temperature=0.6, max_tokens=20_000, workers=8, study=False,  # --study trains this net, too:
        train_puzzles=2_000_000, train_sizes=(4, 6, 9), hidden=384, heads=8, iterations=24, gate_rank=8,
        batch_size=512, steps=100_000, seeds=1, lr=5e-4),
}
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    cfg = common.parse_config(CONFIGS, argv)
    with Run(cfg) as run:
        if cfg.dry_run:
            return dry_run(cfg, run)
        if cfg.link or cfg.show or cfg.solve:
            return show(cfg, run)
        if cfg.generate:
            return make_puzzles(cfg, run)
        if cfg.selftest:
            return selftest(cfg, run)
        speed, rows = {}, []
        if cfg.study:
            speed |= study(cfg, run)
        if cfg.backend:
            more, rows = benchmark(cfg, run)
            speed |= more
            published(run)
        if rows or cfg.study:
            run.figure("sudoku_bench", functools.partial(draw_study, run=run, rows=rows), (12, 4.6))
        run.finish(**speed)
        run.print("Generated puzzles measure rule reading and deduction, not the break-ins of challenge_100.")


if __name__ == "__main__":
    main()
