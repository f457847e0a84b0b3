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
Part B trains a small network on 4x4 variants and tests it on rules it has never seen.
  eq. (2)  a_ij = softmax_j(q_i k_j / sqrt(d_h) + b(e_ij)),  o_i = sum_j a_ij (v_j * g(e_ij)); e_ij is the
           table of digit pairs that all rules between cells i and j allow: rules enter by their meaning
  eq. (3)  loss = mean over iterations t and empty cells of -log p_t(digit);  h_t = block(h_{t-1} + gamma h_0)

How to run
  python sudoku_bench.py                                        both parts, on two CPU cores
  python sudoku_bench.py --backend hf:FOLDER --max_tokens 2000  a language model plays (hub id, folder, .gguf)
  python sudoku_bench.py --backend http:URL#MODEL               an endpoint plays; key in OPENAI_API_KEY
  python sudoku_bench.py --backend solver --data LINK           prove a SudokuPad or f-puzzles link
  torchrun --nproc_per_node=8 sudoku_bench.py --config full --data challenge_100.jsonl      the paper's puzzles

Departures from the paper and its code
- The official sets were withdrawn. mini_48 is ours: generated, proved unique, every family needed; it measures
  rule reading and deduction, not break-ins. --data plays the official files where you have them.
- Prompts are in our words (--prompts FILE: the originals). --history 0 sends nothing of the past; the code's
  slice sends all. Descriptions of drawings lack the code's lone dash and "None", and keep unstyled cages.
- Both readings are in the table: `ref` reads as the code does, `robust` cuts thoughts, reads the last answer
  block, accepts r1c1 = 5 and grids in lines, and refuses two digits for a cell. The game goes by --extract;
  the other reading judges the same replies, as long as it would have been shown the same boards.
- Intervals, the random and the rule-ignoring player, proofs and the network are ours. Grids go up to 9x9.
- The network plays 4x4 and sees pairwise rules only. Human traces and pictures of boards are not here.

Reading order: Puzzle, Rule and RULES, solve, the protocols (judge, play), players, EdgeNet, train.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import html
import itertools
import json
import math
import os
import random
import re
import sys
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib.colors import CSS4_COLORS, to_rgb
from scipy import stats
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import common
from common import Claim, Run, UserError

MINI_48 = Path(__file__).parent / "assets" / "mini_48.jsonl"
PLAYERS = ("solver", "random", "expected", "vanilla", "neural", "scripted", "hf", "http")
SPLITS = ("seen", "recombined", "novel", "plain")


@dataclass
class Config(common.Config):
    # what is played
    data: str = str(MINI_48)  # .jsonl, .parquet, folder or hub id; a link; make:COUNT generates puzzles
    subset: str = ""  # of a hub id
    limit: int = 0  # puzzles, at most; 0: all
    backend: str = (
        ""  # solver, random, vanilla, scripted:FILE, hf:NAME, http:URL#MODEL; empty: the table's rows
    )
    modes: tuple[Literal["multi_step", "single_step", "single_shot"], ...] = ("multi_step", "single_shot")
    trials: int = 10  # episodes of each puzzle and mode; 1 with --backend
    history: int = field(default_factory=lambda: 5)  # turns of the past that a model sees (N); -1: all
    empty: int = 0  # cells left empty (k), the rest are hints; 0: the puzzle as it is
    extract: Literal["robust", "ref"] = "robust"  # reading that the game goes by; ref: the paper's code
    prompts: str = ""  # JSON file of templates to use instead of ours
    # language models
    temperature: float | None = None  # None: the endpoint's own; greedy for hf
    top_p: float | None = None  # of endpoints; None: their own
    max_tokens: int = 0  # of a reply; 0: no limit but the context
    concurrency: int = 8  # episodes in flight; the batch of an hf model
    timeout: float = 600.0  # seconds for one request
    retries: int = 5  # of a request that failed for a passing reason
    # the network
    puzzles: int = 12_000  # generated for training
    tests: int = 200  # puzzles of each split
    width: int = 64  # d
    heads: int = 4  # of attention
    gates: int = 8  # rank of the value gates g
    iterations: int = 6  # T, of the shared block; tests run 2 T
    steps: int = 700  # updates
    batch: int = 64  # puzzles an update, over all ranks
    lr: float = 2e-3  # AdamW, warm-up and cosine to 5 %

    def check(self):
        super().check()
        kind, _, rest = self.backend.partition(":")
        if self.backend and (kind not in PLAYERS or (kind in PLAYERS[-3:]) != bool(rest)):
            raise UserError(f"--backend {self.backend}: is none of {', '.join(PLAYERS[:-3])}, KIND:NAME")
        if re.search(r"//[^/#]*@", self.backend):
            raise UserError("--backend takes no user or password; a key is in OPENAI_API_KEY")
        if self.history < -1 or self.width % self.heads:
            raise UserError("--history is -1 or more, and --heads divides --width")
        load_prompts(self.prompts)


# a row of the table is the settings that it changes
ROWS = {
    "solver": dict(backend="solver", trials=1),
    "random": dict(backend="random"),
    "random, eq. (1)": dict(backend="expected"),
    "ignores the rules": dict(backend="vanilla"),
    "network": dict(backend="neural", trials=1),
}
DEMO = Config(seeds=3, ranks=2, log_every=50, save_every=200)
CONFIGS = {
    "smoke": replace(
        DEMO, ranks=1, seeds=1, limit=3, trials=2, puzzles=64, tests=8, steps=4, width=16, iterations=2
    ),
    "demo": DEMO,
    "gpu": replace(
        DEMO,
        ranks=4,
        seeds=4,
        puzzles=200_000,
        width=256,
        heads=8,
        iterations=16,
        batch=512,
        steps=8000,
        lr=1e-3,
    ),
    "full": replace(
        DEMO,
        ranks=1,
        seeds=1,
        share="run",
        data="SakanaAI/Sudoku-Bench",
        subset="challenge_100",
        backend="hf:Qwen/QwQ-32B",
        temperature=0.6,
        max_tokens=20_000,
        concurrency=32,
    ),
}
CLAIMS = [
    Claim(
        "what reads the rules solves more than what ignores them, single-shot",
        "single_shot",
        "solver",
        "ignores the rules",
    ),
    Claim("... and places more digits before its first mistake", "ACP", "solver", "ignores the rules"),
    Claim(
        "random play has the ACP of eq. (1): no less, margin 0.05",
        "ACP",
        "random",
        "random, eq. (1)",
        margin=-0.05,
    ),
    Claim("... and no more", "ACP", "random", "random, eq. (1)", "lower", -0.05),
    Claim("seen rules: the network beats ignoring them", "seen", "network", "ignores the rules"),
    Claim("... in pairs that it has not seen together", "recombined", "network", "ignores the rules"),
    Claim("... and rules that it has never seen", "novel", "network", "ignores the rules"),
    Claim(
        "but those are harder than seen ones, at equal odds for ignoring the rules",
        "seen - novel",
        "network",
        "ignores the rules",
    ),
]


# --- puzzles ---

Cell = tuple[int, int]  # row and column from 1; 0 and n + 1 are outside the grid


class Clue(NamedTuple):
    """A constraint: a family of RULES, cells in the order that matters for it, and its numbers."""

    kind: str
    cells: tuple[Cell, ...] = ()
    value: tuple[int, ...] = ()


@dataclass(eq=False)
class Puzzle:
    """A puzzle of the official format, with `clues` where its rules are known to a program.

    givens and solution are n^2 characters, '.' for empty; clues None: the rules are prose; regions are
    groups of cells.
    """

    id: str
    n: int
    givens: str
    solution: str | None = None
    clues: tuple[Clue, ...] | None = None
    regions: tuple[tuple[Cell, ...], ...] = ()
    rules: str = ""
    elements: list = field(default_factory=list)
    author: str = ""
    url: str = ""

    def __post_init__(self):
        size = self.n**2
        if not 1 <= self.n <= 9 or not re.fullmatch(rf"[0-9.]{{{size}}}", self.givens):
            raise ValueError("a board is as many digits and dots as cells, of grids up to 9 x 9")
        if not re.fullmatch(rf"[0-9]{{{size}}}", self.solution or ""):
            self.solution = None  # unknown, or in part
        known = {int(c) for c in self.givens + (self.solution or "") if c != "."}
        self.digits = tuple(sorted(known.union(range(1, self.n + 1))))


@functools.cache
def square(n: int) -> list[Cell]:
    """All cells, row by row."""
    return list(itertools.product(range(1, n + 1), repeat=2))


def boxes(n: int) -> tuple[tuple[Cell, ...], ...]:
    """The standard boxes; their height is the largest divisor of n up to its root (6: 2 x 3)."""
    h = max(d for d in (1, 2, 3) if n % d == 0 and d * d <= n)
    found = defaultdict(list)
    for r, c in square(n):
        found[(r - 1) // h, (c - 1) * h // n].append((r, c))
    return tuple(map(tuple, found.values()))


def names(cells: Sequence[Cell]) -> list[str]:
    return [f"r{r}c{c}" for r, c in cells]


def cells_of(names: Sequence[str]) -> tuple[Cell, ...]:
    """`r3c4` -> (3, 4) for each; an exception for anything else."""
    found = [re.fullmatch("[rR]([0-9]{1,2})[cC]([0-9]{1,2})", name).groups() for name in names]
    return tuple((int(r), int(c)) for r, c in found)


# --- rules: a family is a sentence, a drawing in a word, an exact check, and a posting to the solver ---
# groups of cells that a clue's check holds for


def leaps(n: int, *moves: Cell) -> list[tuple[Cell, Cell]]:
    """Pairs of cells that lie one of the moves apart."""
    pairs = [((r, c), (r + a, c + b)) for r, c in square(n) for a, b in moves]
    return [pair for pair in pairs if pair[1] in square(n)]


def apart(*moves: Cell) -> Callable:
    return lambda p, clue: leaps(p.n, *moves)


def lines(p: Puzzle, clue: Clue) -> list:
    k = range(1, p.n + 1)
    return [[(r, c) for c in k] for r in k] + [[(r, c) for r in k] for c in k]


def whole(p: Puzzle, clue: Clue) -> list:
    return [clue.cells]


def along(length: int) -> Callable:
    """All pieces of a line that are so long."""
    return lambda p, clue: [clue.cells[k : k + length] for k in range(len(clue.cells) - length + 1)]


def mirrored(p: Puzzle, clue: Clue) -> list:
    return list(zip(clue.cells, clue.cells[::-1], strict=True))


def neighbours(p: Puzzle, clue: Clue) -> list:
    """The cell with each of its neighbours that is not marked in the same way."""
    marked = [c.cells for c in p.clues if c.kind == clue.kind]
    near = leaps(p.n, (0, 1), (1, 0), (0, -1), (-1, 0))
    return [(a, b) for a, b in near if clue.cells == (a,) and (b,) not in marked]


def unmarked(*kinds: str) -> Callable:
    """Edges without a mark of these kinds."""

    def groups(p: Puzzle, clue: Clue) -> list:
        marked = [{*c.cells} for c in p.clues if c.kind in kinds]
        return [pair for pair in leaps(p.n, (0, 1), (1, 0)) if {*pair} not in marked]

    return groups


def ray(p: Puzzle, clue: Clue) -> list:
    """What a clue outside looks along: the line from there through the second cell."""
    (r, c), (r1, c1) = clue.cells
    line = [(r + k * (r1 - r), c + k * (c1 - c)) for k in range(1, p.n + 1)]
    return [[cell for cell in line if cell in square(p.n)]]


# exact checks: digits x in a clue's order, its numbers v


def distinct(x, v):
    return len(set(x)) == len(x)


def equal(x, v):
    return x[0] == x[1]


def less(x, v):
    return x[0] < x[1]


def difference(x, v):
    return abs(x[0] - x[1]) in v


def ratio(x, v):
    return any(x[0] == k * x[1] or x[1] == k * x[0] for k in v)


def total(x, v):
    return not v or sum(x) in v


def cage(x, v):
    return distinct(x, v) and total(x, v)


def arrow(x, v):
    return int("".join(map(str, x[: v[0]]))) == sum(x[v[0] :])


def parts(x: Sequence, lengths: Sequence[int]) -> list:
    """Sums of the parts of x of these lengths."""
    ends = itertools.accumulate(lengths)
    return [sum(x[end - k : end]) for end, k in zip(ends, lengths, strict=True)]


def consecutive(x, v):
    return distinct(x, v) and max(x) - min(x) < len(x)


def between(x, v):
    low, *_, high = sorted((x[0], x[-1]))
    return all(low < d < high for d in x[1:-1])


def sandwich(x, v):
    if not {1, len(x)} <= {*x}:
        return False
    a, b = sorted((x.index(1), x.index(len(x))))
    return sum(x[a + 1 : b]) == v[0]


def skyscraper(x, v):
    return sum(d == max(x[: k + 1]) for k, d in enumerate(x)) == v[0]


# postings to a model m: variables x in a clue's order, its numbers v; by default the table of allowed tuples


@functools.cache
def allowed(check: Callable, size: int, v: tuple, digits: tuple) -> list:
    return [x for x in itertools.product(digits, repeat=size) if check(x, v)]


def post_distinct(m, x, v):
    m.add_all_different(x)


def post_total(m, x, v):
    m.add(sum(x) == v[0])


def post_cage(m, x, v):
    m.add_all_different(x)
    if v:
        m.add(sum(x) == v[0])


def post_arrow(m, x, v):
    pill = sum(10**k * cell for k, cell in enumerate(x[: v[0]][::-1]))
    m.add(pill == sum(x[v[0] :]))


def post_parts(m, x, v):
    for a, b in itertools.pairwise(parts(x, v)):
        m.add(a == b)


def post_consecutive(m, x, v):
    low = m.new_int_var(0, 9, "")
    m.add_all_different(x)
    for cell in x:
        m.add_linear_constraint(cell - low, 0, len(x) - 1)


def post_between(m, x, v):
    low, high = m.new_int_var(0, 9, ""), m.new_int_var(0, 9, "")
    m.add_min_equality(low, [x[0], x[-1]])
    m.add_max_equality(high, [x[0], x[-1]])
    for cell in x[1:-1]:
        m.add(low < cell)
        m.add(cell < high)


def post_sandwich(m, x, v):
    places = []
    for a, b in itertools.permutations(range(len(x)), 2):  # of 1 and of n
        places.append(here := m.new_bool_var(""))
        inside = sum(x[min(a, b) + 1 : max(a, b)])
        for found, wanted in ((x[a], 1), (x[b], len(x)), (inside, v[0])):
            m.add(found == wanted).only_enforce_if(here)
    m.add_exactly_one(places)


def post_skyscraper(m, x, v):
    top, seen = x[0], 1
    for cell in x[1:]:
        higher, visible = m.new_int_var(0, 9, ""), m.new_bool_var("")
        m.add_max_equality(higher, [top, cell])
        m.add(cell > top).only_enforce_if(visible)
        m.add(cell < top).only_enforce_if(~visible)
        top, seen = higher, seen + visible
    m.add(seen == v[0])


def post_xsum(m, x, v):
    for k in range(1, 10):
        first = m.new_bool_var("")
        m.add(x[0] != k).only_enforce_if(~first)
        m.add(x[0] == k).only_enforce_if(first)
        m.add(sum(x[:k]) == v[0]).only_enforce_if(first)


class Rule(NamedTuple):
    """A family: check(digits, numbers) holds for each of groups(puzzle, clue); {} in `text`: the numbers.

    post: None for the table of allowed tuples.
    """

    text: str
    drawing: str
    check: Callable
    groups: Callable = whole
    post: Callable | None = None


RULES = {
    # marks on an edge, in a cell, at a corner
    "white": Rule("Cells joined by a white dot differ by {}.", "white dot", difference),
    "black": Rule("Of cells joined by a black dot one is {} times the other.", "black dot", ratio),
    "xv": Rule("Cells joined by V sum to 5, cells joined by X to 10.", "sum", total),
    "less": Rule(
        "An inequality sign between two cells points at the smaller digit.",
        "inequality, smaller digit first",
        less,
    ),
    "even": Rule("Grey squares hold even digits.", "gray square", lambda x, v: x[0] % 2 == 0),
    "odd": Rule("Grey circles hold odd digits.", "gray circle", lambda x, v: x[0] % 2 == 1),
    "minimum": Rule(
        "A cell marked min is smaller than its neighbours without that mark.", "min", less, neighbours
    ),
    "maximum": Rule(
        "A cell marked max is larger than its neighbours without that mark.",
        "max",
        lambda x, v: x[0] > x[1],
        neighbours,
    ),
    "marks": Rule("A cell with pencil marks holds one of them.", "pencil marks", lambda x, v: x[0] in v),
    "quad": Rule(
        "Digits in a circle at a corner are in the four cells around it, as often as they are written.",
        "circle at the corner",
        lambda x, v: not Counter(v) - Counter(x),
    ),
    "clone": Rule("Clones hold the same digit.", "clones", equal),
    # lines
    "thermo": Rule(
        "Digits increase along a thermometer from its bulb.", "thermometer from its bulb", less, along(2)
    ),
    "slow": Rule(
        "Digits never decrease along a slow thermometer from its bulb.",
        "slow thermometer from its bulb",
        lambda x, v: x[0] <= x[1],
        along(2),
    ),
    "whispers": Rule(
        "Neighbouring digits on a green line differ by at least {}.",
        "green line",
        lambda x, v: abs(x[0] - x[1]) >= v[0],
        along(2),
    ),
    "palindrome": Rule("Grey lines read the same from both ends.", "gray line", equal, mirrored),
    "modular": Rule(
        "Any three neighbours on a turquoise line leave three different remainders when divided by 3.",
        "turquoise line",
        lambda x, v: len({d % 3 for d in x}) == 3,
        along(3),
    ),
    "renban": Rule(
        "A purple line holds consecutive digits without repeats, in any order.",
        "purple line",
        consecutive,
        post=post_consecutive,
    ),
    "regionsum": Rule(
        "Box borders cut a blue line into parts of equal sums.",
        "blue line",
        lambda x, v: len({*parts(x, v)}) == 1,
        post=post_parts,
    ),
    "between": Rule(
        "Digits on a line between two circles lie strictly between the digits in them.",
        "line from circle to circle",
        between,
        post=post_between,
    ),
    "arrow": Rule(
        "Digits along an arrow sum to the number in its circle or pill.",
        "arrow from its circle, whose number of cells is",
        arrow,
        post=post_arrow,
    ),
    # groups
    "killer": Rule(
        "Digits in a cage do not repeat, and sum to its number if it has one.",
        "killer cage",
        cage,
        post=post_cage,
    ),
    "extra": Rule(
        "No digit repeats in the shaded extra region.", "extra region", distinct, post=post_distinct
    ),
    "diag+": Rule(
        "No digit repeats on the diagonal from the lower left.",
        "diagonal from the lower left",
        distinct,
        lambda p, clue: [[(k, p.n + 1 - k) for k in range(1, p.n + 1)]],
        post_distinct,
    ),
    "diag-": Rule(
        "No digit repeats on the diagonal from the upper left.",
        "diagonal from the upper left",
        distinct,
        lambda p, clue: [[(k, k) for k in range(1, p.n + 1)]],
        post_distinct,
    ),
    "windoku": Rule(
        "No digit repeats in a shaded window, r2c2 to r4c4 and so on.",
        "four windows",
        distinct,
        lambda p, clue: [[(r + a, c + b) for a, b in square(3)] for r in (1, 5) for c in (1, 5)],
        post_distinct,
    ),
    "disjoint": Rule(
        "Cells at the same place of different boxes hold different digits.",
        "disjoint groups",
        distinct,
        lambda p, clue: zip(*boxes(p.n), strict=True),
        post_distinct,
    ),
    "antiknight": Rule(
        "Cells a knight's move apart hold different digits.",
        "anti-knight",
        distinct,
        apart((1, 2), (1, -2), (2, 1), (2, -1)),
        post_distinct,
    ),
    "antiking": Rule(
        "Cells that touch at a corner hold different digits.",
        "anti-king",
        distinct,
        apart((1, 1), (1, -1)),
        post_distinct,
    ),
    "nonconsecutive": Rule(
        "Cells that share an edge without a white dot never hold consecutive digits.",
        "non-consecutive",
        lambda x, v: not difference(x, (1,)),
        unmarked("white"),
    ),
    "no white": Rule(
        "All white dots are given: other edges have no difference of {}.",
        "all white dots given",
        lambda x, v: not difference(x, v),
        unmarked("white", "black"),
    ),
    "no black": Rule(
        "All black dots are given: other edges have no ratio of {}.",
        "all black dots given",
        lambda x, v: not ratio(x, v),
        unmarked("white", "black"),
    ),
    "no xv": Rule(
        "All X and V are given: other edges have no sum of {}.",
        "all X and V given",
        lambda x, v: not total(x, v),
        unmarked("xv"),
    ),
    # numbers outside the grid
    "littlekiller": Rule(
        "A number with an arrow is the sum of the diagonal it points along; digits may repeat there.",
        "little killer, outside cell and first cell",
        total,
        ray,
        post_total,
    ),
    "sandwich": Rule(
        "A sandwich clue is the sum of the digits between the smallest and the largest of its line.",
        "sandwich",
        sandwich,
        ray,
        post_sandwich,
    ),
    "skyscraper": Rule(
        "A skyscraper clue counts the digits seen from there; larger ones hide smaller ones behind.",
        "skyscraper",
        skyscraper,
        ray,
        post_skyscraper,
    ),
    "xsum": Rule(
        "An X-sum clue is the sum of the first X digits seen from there, X being the first of them.",
        "X-sum",
        lambda x, v: sum(x[: x[0]]) == v[0],
        ray,
        post_xsum,
    ),
}


def groups_of(p: Puzzle) -> Iterator[tuple[str, Rule, Sequence[Cell], tuple]]:
    """(family, rule, cells, numbers) of all that must hold: plain rules, then clues."""
    plain = Rule("", "", distinct, post=post_distinct)
    for group in [*lines(p, None), *p.regions]:
        yield "plain", plain, group, ()
    for clue in p.clues or ():
        rule = RULES[clue.kind]
        for group in rule.groups(p, clue):
            yield clue.kind, rule, group, clue.value


def violations(p: Puzzle, grid: str) -> list[tuple[str, Sequence[Cell]]]:
    """What a full grid of n^2 digits breaks: (family, cells), by the exact checks alone."""
    digit = dict(zip(square(p.n), map(int, grid), strict=True))
    return [
        (kind, group) for kind, rule, group, v in groups_of(p) if not rule.check([digit[c] for c in group], v)
    ]


def described(p: Puzzle) -> Puzzle:
    """The puzzle with rules and drawings in words, those of its clues before its own."""
    rules = [f"Place the digits {p.digits}; none repeats in a row, a column or a region."]
    drawn = [f"region {' '.join(names(cells))}" for cells in p.regions if p.regions != boxes(p.n)]
    for kind, cells, value in p.clues:
        rules.append(RULES[kind].text.format(" or ".join(map(str, value))))
        drawn.append(" ".join([RULES[kind].drawing, *map(str, value), *names(cells)]))
    elements = [{"type": "manual", "text": text} for text in drawn]
    return replace(p, rules=p.rules or " ".join(dict.fromkeys(rules)), elements=elements + p.elements)


def element_text(e: dict) -> str:
    """A visual element of the official sets as a line of the prompt; empty for what has no description."""
    cells, e = (
        e.get("cells") or e.get("coords") or [],
        defaultdict(str, {k: str(v).strip() for k, v in e.items() if v is not None}),
    )
    cells = cells.split() if isinstance(cells, str) else [*map(str, cells)]
    kind, color, border, loc = e["type"], e["color_name"], e["border_color_name"], e["loc"]
    every, edge = " ".join(cells), "between " + " and ".join(cells[:2])
    named = "killer cage" if e["style"] == "killer" else "region" if e["style"] == "box" else "cage"
    simple = {
        "lines": f"line, color: {color}, coords: {every}",
        "arrows": f"arrow, color: {color}, coords (base to tip): {every}",
        "inequality": f"inequality arrow: {e['direction']} {edge}",
        "cage": f"{named} (value {e['value']}): {every}" if e["value"] else f"{named}: {every}",
        "global": f"global: {e['text']}",
        "manual": e["text"],
    }
    if kind.endswith(" arrow"):
        return f"{kind}, color: {color}, in location: {every}, pointing {e['direction']}"
    if kind not in ("underlays", "overlays"):
        return simple.get(kind, "")
    paint = f"color: {color}" if color else border and f"stroke color: {border}"
    if color and border and color != border:
        paint += f" (stroke color: {border})"
    place = {"cell": every, "corner": f"at the corner of {every}"}.get(loc, loc and edge)
    pieces = [f"{key}: {e[key]}" for key in ("text", "shape") if e[key]]
    return ", ".join(filter(None, [*pieces, paint, place and f"location: {place}"]))


# --- solver ---


def solve(p: Puzzle, limit: int = 2, seed: int = 0) -> tuple[str, list[str]]:
    """(none | unique | multiple | undecided, up to `limit` solutions) by CP-SAT, in 30 of its CPU seconds.

    unique only where all of the space was searched. A seed other than 0 randomises the search.
    """
    cp_model = common.need("ortools.sat.python.cp_model", "sudoku")
    m, found = cp_model.CpModel(), []
    domains = [p.digits if c == "." else [int(c)] for c in p.givens]
    x = [m.new_int_var_from_domain(cp_model.Domain.from_values(domain), "") for domain in domains]
    for _, rule, group, v in groups_of(p):
        line = [x[square(p.n).index(c)] for c in group]
        if rule.post:
            rule.post(m, line, v)
        else:
            m.add_allowed_assignments(line, allowed(rule.check, len(line), v, p.digits))

    class Collect(cp_model.CpSolverSolutionCallback):
        def on_solution_callback(self):
            grid = "".join(str(self.value(cell)) for cell in x)
            if grid not in found:  # variables of a rule may take several values
                found.append(grid)
            if len(found) >= limit:
                self.stop_search()

    solver = cp_model.CpSolver()
    settings = solver.parameters
    settings.num_workers, settings.max_deterministic_time, settings.enumerate_all_solutions = 1, 30, limit > 1
    settings.random_seed, settings.randomize_search = seed, seed > 0
    done = solver.solve(m, Collect()) in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
    whole = ("none", "unique")[len(found)] if done and len(found) < 2 and limit > 1 else "undecided"
    return "multiple" if len(found) > 1 else whole, found


@functools.cache
def proof(p: Puzzle) -> str | None:
    """The only solution, if the clues prove one and it is the published one where there is one."""
    status, found = solve(p) if p.clues is not None else ("", [])
    return found[0] if status == "unique" and p.solution in (None, found[0]) else None


# --- links: SudokuPad (scl, fpuz) and f-puzzles ---


def table(text: str) -> dict[str, str]:
    return dict(word.split("=") for word in text.split())


SHORT = table("""c=color ca=cages ct=center c1=borderColor c2=backgroundColor ce=cells cs=cellSize a=arrows
    o=overlays u=underlays w=width h=height v=value l=lines r=rounded re=regions fs=fontSize th=thickness
    hl=headLength wp=wayPoints t=title te=text d=duration d2=d vd=videos""")
SHORTENED = re.compile(
    r"""(?P<text>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")(?P<colon>:?)|(?P<key>[A-Za-z]\w*):"""
    r"""|(?P<hole>(?<=[\[,])(?=[,\]]))|(?<=[:,\[])(?P<word>#0|#F|[tf](?=[,}\]])|[0-9a-fA-F]{6}(?=[,}\]]))"""
)
FPUZZLES = table("""thermometer=thermo slowthermometer=slow palindrome=palindrome renban=renban
    whispers=whispers regionsumline=regionsum modularline=modular betweenline=between arrow=arrow
    killercage=killer extraregion=extra difference=white ratio=black xv=xv less=less quadruple=quad clone=clone
    odd=odd even=even minimum=minimum maximum=maximum littlekillersum=littlekiller sandwichsum=sandwich
    xsum=xsum skyscraper=skyscraper diagonal+=diag+ diagonal-=diag- windoku=windoku antiknight=antiknight
    antiking=antiking nonconsecutive=nonconsecutive disjointgroups=disjoint""")
COSMETIC = ("line", "circle", "rectangle", "text", "cage")
KNOWN = """size grid title author ruleset solution negative id value metadata highlightConflicts given region
    givenPencilMarks centerPencilMarks cornerPencilMarks cells cell lines direction values cloneCells fontC
    angle baseC outlineC width height highlight c isNewConstraint""".split()
WAYS = {"UL": (-1, -1), "UR": (-1, 1), "DL": (1, -1), "DR": (1, 1)}


def lengthen(m: re.Match) -> str:
    """A piece of SudokuPad's shortened JSON: ' for ", bare short keys, no {}, t, f, #0, #F, bare colours."""
    words = {None: "{}", "t": "true", "f": "false", "#0": '"#000000"', "#F": '"#FFFFFF"'}
    text, word = m["text"] or "", m["word"]
    key = m["key"] or (m["colon"] and text[1:-1])
    if key:
        return f'"{SHORT.get(key, key)}":'
    if text[:1] == "'":
        return json.dumps(text[1:-1].replace("\\'", "'")).replace("\\\\", "\\")
    return text or words.get(word, f'"#{word}"')


def decode_link(link: str) -> dict:
    """The JSON in a link or in bare data; an exception for what is no link."""
    parts = urllib.parse.urlsplit(link.strip())
    query = dict(urllib.parse.parse_qsl(parts.query.replace("+", "%2B")))
    data = query.get("load") or query.get("puzzleid") or parts.path.removeprefix("/sudoku").lstrip("/")
    data = urllib.parse.unquote(data).replace(" ", "+").rstrip("=\\")
    body = re.fullmatch("(?:fpuzzles|fpuz|scl|ctc|)([A-Za-z0-9+/]{1,40000})", data)[1]
    text = common.need("lzstring", "sudoku").LZString().decompressFromBase64(body)
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(SHORTENED.sub(lengthen, text))


def link_of(data: dict) -> str:
    """SudokuPad's link of f-puzzles JSON."""
    code = common.need("lzstring", "sudoku").LZString().compressToBase64(json.dumps(data))
    return "https://sudokupad.app/fpuz" + urllib.parse.quote(code, safe="")


def import_link(link: str) -> Puzzle:
    """A puzzle from a link; UserError for what is none. f-puzzles has clues, scl drawings and prose."""
    try:
        data = decode_link(link)
        return replace(from_fpuzzles(data) if "grid" in data else from_scl(data), url=link.strip())
    except UserError:
        raise
    except Exception as e:  # data from outside raise a dozen kinds
        raise UserError(printable(f"{link[:60]}: no puzzle link ({e!r:.80})")) from None


def unknown_keys(data) -> set[str]:
    """Keys at any depth of JSON that from_fpuzzles does not know."""
    if isinstance(data, list):
        return set().union(*map(unknown_keys, data))
    if not isinstance(data, dict):
        return set()
    return ({*data} - {*KNOWN, *COSMETIC, *FPUZZLES}).union(*map(unknown_keys, data.values()))


def clues_of(kind: str, item: dict, home: dict[Cell, int], n: int) -> list[Clue]:
    """Clues of one item of f-puzzles; a total of nothing or 0 is none, but for a sandwich's 0."""
    number = item.get("value") or {"white": 1, "black": 2, "whispers": 5}.get(kind, 0)
    number = int({"V": 5, "X": 10}.get(number, number))
    value = (number,) if number or (kind == "sandwich" and "value" in item) else ()
    cells, found = item.get("cells") or [item[key] for key in ("cell",) if key in item], []
    for where in map(cells_of, item.get("lines") or [cells]):
        if kind == "arrow":
            value, where = (len(cells),), tuple(dict.fromkeys(cells_of(cells) + where))
        elif kind == "quad":
            value = tuple(item["values"])
        elif kind == "regionsum":
            value = tuple(len([*part]) for _, part in itertools.groupby(where, home.get))
        elif RULES[kind].groups is ray:
            (r, c), side = where[0], {0: 1, n + 1: -1}
            down, right = WAYS.get(item.get("direction"), (side.get(r, 0), side.get(c, 0)))
            where += ((r + down, c + right),)
        if kind == "clone":
            found += [Clue(kind, pair) for pair in zip(where, cells_of(item["cloneCells"]), strict=True)]
        elif value or RULES[kind].groups is not ray:
            found.append(Clue(kind, where, value))
    return found


def from_fpuzzles(data: dict) -> Puzzle:
    """A puzzle from f-puzzles JSON. With unknown keys, named in its id, it has no clues to prove it by."""
    n, clues = int(data["size"]), []
    cells = dict(zip(square(n), itertools.chain(*data["grid"]), strict=True))
    home = {c: k for k, box in enumerate(boxes(n)) for c in box}
    home |= {c: cell["region"] for c, cell in cells.items() if "region" in cell}
    for key, kind in FPUZZLES.items():
        items = data.get(key) or []
        for item in items if isinstance(items, list) else [{}]:
            clues += clues_of(kind, item, home, n)
    for kind in map(FPUZZLES.get, data.get("negative") or []):
        own = {c.value[0] for c in clues if c.kind == kind}  # what marks say is what other edges must not be
        clues.append(Clue(f"no {kind}", (), tuple(own or {"white": [1], "black": [2], "xv": [5, 10]}[kind])))
    clues += [Clue("marks", (c,), tuple(x)) for c in cells if (x := cells[c].get("givenPencilMarks"))]
    drawn = [{"type": "manual", "text": f"{key} {item}"} for key in COSMETIC for item in data.get(key) or []]
    givens = "".join(str(cell["value"]) if cell.get("given") else "." for cell in cells.values())
    regions = tuple(tuple(c for c in cells if home[c] == k) for k in sorted({*home.values()} - {None}))
    name, author, rules = (str(data.get(key) or "") for key in ("title", "author", "ruleset"))
    solution, unknown = "".join(map(str, data.get("solution") or "")), ", ".join(sorted(unknown_keys(data)))
    p = described(
        Puzzle(name, n, givens, solution, tuple(dict.fromkeys(clues)), regions, rules, drawn, author)
    )
    return replace(p, id=f"unknown keys: {unknown}", clues=None) if unknown else p


@functools.cache
def color_name(code: str) -> str:
    """The CSS4 name nearest to #rgb or #rrggbb(aa); empty for anything else."""
    if not re.fullmatch("#([0-9a-fA-F]{3,4}){1,2}", code):
        return ""
    return min(CSS4_COLORS, key=lambda name: math.dist(to_rgb(code), to_rgb(CSS4_COLORS[name])))


def passed(points: list) -> list[Cell]:
    """The cells around one place of scl (a cell, two at an edge, four at a corner), or along way points."""
    points = np.array(points, float)
    if len(points) == 1:
        return list(itertools.product(*({math.floor(x) + 1, math.ceil(x)} for x in points[0])))
    steps = [np.linspace(a, b, 1 + round(abs(b - a).max())) for a, b in itertools.pairwise(points)]
    return list(dict.fromkeys((math.floor(r) + 1, math.floor(c) + 1) for r, c in np.concatenate(steps)))


def from_scl(data: dict) -> Puzzle:
    """A puzzle from SudokuPad JSON: givens, solution, prose, and drawings as visual elements."""
    meta, n, drawn = dict(data.get("metadata") or {}), len(data["cells"]), []
    for cage in data.get("cages") or []:
        told = re.match(r"(title|author|rules|solution)\s*:\s*(.*)", str(cage.get("value")), re.S)
        if told:  # as older puzzles do
            meta.setdefault(told[1], told[2])
        elif cage.get("cells"):
            drawn.append(
                {"style": "killer"}
                | cage
                | {"type": "cage", "cells": names((r + 1, c + 1) for r, c in cage["cells"])}
            )
    regions = data.get("regions") or []
    drawn += [
        {"type": "cage", "style": "box", "cells": names((r + 1, c + 1) for r, c in group)}
        for group in regions
    ]
    for kind in ("lines", "arrows", "underlays", "overlays"):
        for item in filter(None, data.get(kind) or []):
            cells = passed(item.get("wayPoints") or [item["center"]])
            loc, shape = (
                {1: "cell", 4: "corner"}.get(len(cells), "edge"),
                "circle" if item.get("rounded") else "square",
            )
            fill, border = (color_name(str(item.get(k))) for k in ("backgroundColor", "borderColor"))
            color = color_name(str(item.get("color"))) or fill
            drawn.append(
                {
                    "type": kind,
                    "cells": names(cells),
                    "loc": loc,
                    "shape": shape,
                    "color_name": color,
                    "border_color_name": border,
                    "text": item.get("text"),
                }
            )
    givens = "".join(str(cell.get("value") or ".") for row in data["cells"] for cell in row)
    name, author, solution, rules = (
        str(meta.get(key) or "") for key in ("title", "author", "solution", "rules")
    )
    return Puzzle(name, n, givens, solution, None, (), rules, drawn, author)


# --- puzzles from files ---


def printable(text: str) -> str:
    """Without control characters, escapes and lone surrogates: safe for a terminal and a page."""
    return re.sub(r"[^\n\t -~\u00a0-\ud7ff\ue000-\uffff]", "\ufffd", text)


def read_puzzle(row: dict) -> Puzzle:
    """A row of the official sets, whose rules may be JSON inside the string; an f-puzzles link has clues."""
    given = {
        key: str(row.get(key) or "")
        for key in ("sudokupad_url", "rules", "visual_elements", "author", "solution")
    }
    url, rules, elements, author, solution = given.values()
    if rules[:1] in ('"', "["):
        rules = json.loads(rules)
        rules = rules if isinstance(rules, str) else "\n".join(rules)
    n, board = int(row["rows"]), row["initial_board"].replace("?", ".")
    p = import_link(url) if "/fpuz" in url else Puzzle("", n, board, regions=boxes(n))
    clues = () if author.lower() == "nikoli" else p.clues
    elements = json.loads(elements) if elements[:1] == "[" else []
    return Puzzle(row["puzzle_id"], n, board, solution, clues, p.regions, rules, elements, author, url)


@functools.cache
def load_puzzles(data: str, limit: int) -> list[Puzzle]:
    """The puzzles to play; UserError where there are none. One without a stored solution needs a proof."""
    if "://" in data:
        found = [import_link(data)]
    else:
        name, _, subset = (data, "", "") if Path(data).exists() else data.partition(":")
        split = "test" if subset else "train"
        rows = common.load_rows(name, ("puzzle_id", "initial_board"), split, subset or None)
        try:
            found = [read_puzzle(row) for row in rows]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(printable(f"{data}: {e!r:.100}")) from None
    playable = {p.id: replace(p, solution=p.solution or proof(p)) for p in found if p.solution or proof(p)}
    if not playable or len({p.id for p in found}) < len(found):
        raise UserError(
            printable(f"{data[:60]}: puzzle has no proof ({found[0].id}), or an id is there twice")
        )
    return [*playable.values()][: limit or None]


# --- protocols: prompts, how replies are read, what a reply does to the board ---

VARIANT = """You are an expert solver of sudoku variants.

## Coordinates and drawings ##
- rXcY is the cell in row X and column Y, counted from 1 at the top left.
- Row or column 0, or one more than the size, is outside the grid.
- Everything drawn is listed as it is. The circle or bulb of an arrow or thermometer and its line are separate
  items where they are listed so; their cells show that they belong together.
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
PLAIN = """You are an expert solver of sudoku.

## Rules ##
- Every row holds each of the digits 1 to {{rows}} once.
- Every column holds each of the digits 1 to {{rows}} once.
- Every outlined box holds each of the digits 1 to {{rows}} once.
"""
WHOLE = """
## Board ##
{{current_board}}

## Answer ##
End your reply with the solved grid between tags: {{ rows * cols }} digits, row by row, like
<ANSWER>
1234...
</ANSWER>"""
SEVERAL = """
## Answer ##
I show you the board, you fill one or more of its empty cells, and so on; a wrong digit ends the game.
End every reply with your placements between tags, like
<ANSWER>
r1c1: 5
r1c2: 6
</ANSWER>"""
ONE_EACH = """
## Answer ##
I show you the board, you fill exactly one of its empty cells, and so on; a wrong digit ends the game.
End every reply with your placement between tags, like
<ANSWER>
r1c1: 5
</ANSWER>"""
PROMPTS = {
    "single_shot_variant": VARIANT + WHOLE,
    "single_shot_standard": PLAIN + WHOLE,
    "multi_step_variant": VARIANT + SEVERAL,
    "multi_step_standard": PLAIN + SEVERAL,
    "single_step_variant": VARIANT + ONE_EACH,
    "single_step_standard": PLAIN + ONE_EACH,
    "acknowledgement": """Understood. I will reason from the rules and place only what they force. I end with
<ANSWER>
rXcY: Z
</ANSWER>
Please show me the board.""",
    "board": "## Board ##\n{{current_board}}",
}


@functools.cache
def load_prompts(path: str) -> dict[str, str]:
    """The templates: ours, with those of a JSON file in their place."""
    try:
        given = json.loads(Path(path).read_text()) if path else {}
        if {*given} - {*PROMPTS} or {*map(type, given.values())} - {str}:
            raise ValueError(f"not texts named {', '.join(PROMPTS)}")
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"--prompts {path}: {e}") from None
    return PROMPTS | given


def fill(template: str, p: Puzzle, board: str) -> str:
    """Put a puzzle into {{name}} and {{ rows * cols }}, once: what is put in is not looked at again."""
    drawn = [f"- {text}" for text in map(element_text, p.elements) if text]
    rows = [" ".join(board[k : k + p.n]) for k in range(0, p.n**2, p.n)]
    values = {"rows": p.n, "cols": p.n, "rows * cols": p.n**2, "current_board": "\n".join(rows)}
    values |= {"rules": p.rules.strip(), "pretty_visual_elements": "\n".join(drawn) or "none"}

    def value(m: re.Match) -> str:  # a puzzle from outside must not open a turn of the chat
        return re.sub(r"<(?=[|/a-z])|\[(?=/?INST)", "\\\\g<0>\u200b", str(values.get(m[1], m[0])))

    return re.sub(r"\{\{ ?([\w *]+?) ?\}\}", value, template).strip()


def hints(p: Puzzle, k: int, seed: int) -> str:
    """The board with all but k of its empty cells filled, empty if it has k or fewer. k = 0: as it is."""
    blanks = [i for i, c in enumerate(p.givens) if c == "."]
    random.Random(seed).shuffle(blanks)
    shown = blanks[: len(blanks) - k] if k else []
    board = [p.solution[i] if i in shown else c for i, c in enumerate(p.givens)]
    return "".join(board) if k < len(blanks) else ""


def window(messages: list[dict], turns: int) -> list[dict]:
    """What of a conversation is sent: its first two messages, the last 2N of those between, and the board.

    N = 0 sends none of the past (a slice [-0:] would send all of it, as the paper's code does).
    """
    first = max(2, len(messages) - 1 - 2 * turns) if turns >= 0 else 2
    return messages[:2] + messages[first:]


class Stop(Exception):
    """An episode's end, with its reason."""


PLACEMENT = re.compile(
    r"(?<![0-9A-Za-z])[rR] ?([0-9]{1,4}),?\s{0,8}[cC] ?([0-9]{1,4})"
    r"[\s*`]{0,8}[:=][\s*`]{0,8}([0-9]{1,4})(?![0-9])"
)
FULL_WIDTH = {c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def answer_blocks(reply: str) -> list[str]:
    """What re.findall(r"<ANSWER>(.*?)</ANSWER>", S | I) finds, in linear time."""
    pieces = [re.split("(?i)<answer>", piece, maxsplit=1) for piece in re.split("(?i)</answer>", reply)[:-1]]
    return [piece[1] for piece in pieces if len(piece) > 1]


def last_block(reply: str) -> str:
    """The last answer block after any thoughts, its full-width forms folded; Stop where there is none."""
    text = re.split("(?i)</think>", reply[-1_000_000:].translate(FULL_WIDTH))[-1]
    if re.search("(?i)<think>", text):
        raise Stop("truncated")
    blocks = answer_blocks(text)
    if not blocks:
        raise Stop("no_answer_tag")
    return re.split("(?i)<answer>", blocks[-1])[-1]


def read_grid(reply: str, p: Puzzle, board: str, extract: str) -> str:
    """The grid that a single-shot reply states; Stop where it states none.

    ref: last block, whatever str.isdigit accepts, the last n^2 of it. robust: n^2 digits in any layout, or
    placements that cover every empty cell.
    """
    if extract == "ref":
        blocks = answer_blocks(reply)
        if not blocks:
            raise Stop("no_answer_tag")
        return "".join(filter(str.isdigit, blocks[-1]))[-(p.n**2) :]
    block, placed = last_block(reply), {}
    for r, c, digit in PLACEMENT.findall(block):
        cell = int(r), int(c)
        if cell not in square(p.n) or len(digit) > 1:
            raise Stop("invalid_action_parsing")
        if placed.setdefault(cell, digit) != digit:
            raise Stop("contradictory_placement")
    grid = [placed.get(cell, c) for cell, c in zip(square(p.n), board, strict=True)]
    grid = grid if placed else re.findall("[0-9]", block)
    if len(grid) != p.n**2 or "." in grid:
        raise Stop("bad_length")
    return "".join(grid)


def read_placements(reply: str, mode: str, extract: str) -> list[tuple[str, str, str]]:
    """(row, column, digit) texts of a stepwise reply; Stop where there is none.

    ref, multi-step: the first block; ref, single-step: the last block that is nothing but one placement.
    """
    if extract == "robust":
        try:
            found = PLACEMENT.findall(last_block(reply))
        except Stop as e:
            raise Stop("truncated" if "truncated" in e.args else "invalid_action") from None
    elif mode == "single_step":
        found = re.findall(r"<ANSWER>\s*r(\d+)c(\d+):\s*(\d+)\s*</ANSWER>", reply)[-1:]
    else:
        found = re.findall(r"r(\d+)c(\d+):\s*(\d+)", "".join(answer_blocks(reply)[:1]))
    if not found or (mode == "single_step" and len({*found}) > 1):
        raise Stop("invalid_action")
    return found


@dataclass
class Game:
    """An episode under one reading: the board, how many digits were placed right, and why it ended."""

    p: Puzzle
    mode: str
    extract: str
    board: str
    correct: int = 0
    stop: str = ""

    def take(self, reply: str):
        """Judge a reply. The board changes only by placements that were read from an answer block."""
        try:
            if self.mode == "single_shot":
                self.board = read_grid(reply, self.p, self.board, self.extract)
                self.correct = int(self.board == self.p.solution)
                raise Stop("solved" if self.correct else "incorrect_solution")
            self.place(read_placements(reply, self.mode, self.extract))
        except Stop as e:
            self.stop = str(e)

    def place(self, placements: list[tuple[str, str, str]]):
        robust, seen, before, cells = self.extract == "robust", {}, self.board, square(self.p.n)
        for row, column, digit in placements:
            if not re.fullmatch("[0-9]", digit):
                raise Stop("invalid_action_parsing")
            cell = int(row[-99:]), int(column[-99:])
            if cell not in cells:
                raise Stop("action_execution_error")
            i = cells.index(cell)
            if robust and seen.setdefault(i, digit) != digit:
                raise Stop("contradictory_placement")
            if robust and self.board[i] == digit:  # repeated correctly
                continue
            if self.board[i] != ".":
                raise Stop("action_execution_error")
            self.board = self.board[:i] + digit + self.board[i + 1 :]
            if digit != self.p.solution[i]:
                raise Stop("incorrect_placement")
            self.correct += 1
        if "." not in self.board:
            raise Stop("solved")
        if self.board == before:
            raise Stop("invalid_action")  # nothing was placed: the same question would come again


# --- players: all answer in text, so that parser and referee are always exercised ---


class Turn(NamedTuple):
    """What a player is asked: messages, and for those that are no language model the puzzle itself."""

    messages: list[dict]
    p: Puzzle
    board: str
    mode: str
    key: str  # of the episode


class Reply(NamedTuple):
    """text, its tokens, why it ended (stop, length), and the words of an error."""

    text: str
    tokens: int = 0
    finish: str = "stop"
    error: str = ""


def say(turn: Turn, grid: str, i: int | None = None) -> Reply:
    """The grid, or its digit in cell i, by default the first that is empty on the board."""
    if turn.mode != "single_shot":
        i = turn.board.index(".") if i is None else i
        grid = f"{names(square(turn.p.n))[i]}: {grid[i]}"
    return Reply(f"<ANSWER>\n{grid}\n</ANSWER>")


@functools.cache
def completions(p: Puzzle, seed: int) -> list[str]:
    """Grids that keep givens and plain rules: all of them, or the first hundred of a random search."""
    return solve(replace(p, clues=()), 100, seed + 1)[1]


def simple_player(kind: str, cfg: Config, run: Run) -> Callable:
    """solver: the proved solution. random: any digits. vanilla: ignores the rules, a pick of completions."""

    async def ask(turn: Turn) -> Reply:
        p, chance = turn.p, random.Random(turn.key)
        if kind == "solver":
            return say(turn, proof(p))
        if kind == "vanilla":
            return say(turn, chance.choice(completions(p, cfg.seed)))
        chance.seed(turn.key + turn.board)
        return say(turn, "".join(str(chance.choice(p.digits)) if c == "." else c for c in turn.board))

    return ask


def scripted_player(path: str, cfg: Config, run: Run) -> Callable:
    """Replies of a file with rows of puzzle, mode, replies: transcripts from elsewhere."""
    replies = {
        (row["puzzle"], row["mode"]): iter(row["replies"]) for row in common.load_rows(path, ("puzzle",))
    }

    async def ask(turn: Turn) -> Reply:
        return Reply(next(replies.get((turn.p.id, turn.mode), iter(())), ""), error="no more replies")

    return ask


def hf_player(name: str, cfg: Config, run: Run) -> Callable:
    """A causal language model; what all episodes in flight ask is answered as one batch."""
    model, tokenizer = common.load_lm(name, torch.bfloat16 if run.amp else torch.float32)
    model.to(run.device)
    ends, waiting = common.end_ids(model, tokenizer), []

    def encode(messages: list[dict]) -> list[int]:
        text = "".join(f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages) + "Assistant:"
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)

    def answer():
        turns, replies = zip(*waiting, strict=True)
        waiting.clear()
        prompts = [encode(turn.messages) for turn in turns]
        room = model.config.max_position_embeddings - max(map(len, prompts))
        seeds = [torch.Generator().manual_seed(common.stable_seed(turn.key, turn.board)) for turn in turns]
        draws = torch.stack([torch.rand(min(cfg.max_tokens or room, room), generator=seed) for seed in seeds])
        found = common.generate(model, prompts, draws, ends, cfg.temperature or 0.0)
        for tokens, reply in zip(found, replies, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            reply.set_result(Reply(text, len(tokens), "stop" if tokens[-1] in ends else "length"))

    async def ask(turn: Turn) -> Reply:
        loop = asyncio.get_running_loop()
        if not waiting:
            loop.call_soon(answer)  # after all others that are ready to ask
        waiting.append((turn, loop.create_future()))
        return await waiting[-1][1]

    return ask


def http_player(spec: str, cfg: Config, run: Run) -> Callable:
    """An OpenAI-compatible endpoint, URL#MODEL; the client retries 408, 409, 429, 5xx and lost connections."""
    openai, (url, _, model) = common.need("openai", "sudoku"), spec.partition("#")
    key, url = os.environ.get("OPENAI_API_KEY", "none"), url if "://" in url else f"http://{url}"
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=cfg.retries, timeout=cfg.timeout)
    more = dict(temperature=cfg.temperature, max_completion_tokens=cfg.max_tokens or None)
    more = {name: value for name, value in more.items() if value is not None}

    async def ask(turn: Turn) -> Reply:
        try:
            found = await client.chat.completions.create(model=model, messages=turn.messages, **more)
            choice, used = found.choices[0], found.usage
            tokens = used.completion_tokens if used else 0
            return Reply(choice.message.content or "", tokens, choice.finish_reason)
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as e:
            return Reply("", error=str(e))

    return ask


# --- episodes and scores ---


async def play(p: Puzzle, mode: str, key: str, ask: Callable, cfg: Config) -> dict:
    """One episode as a line of episodes.jsonl; robust, ref: [solved, right placements], None where unknown.

    The other reading judges the same replies as long as it would have been shown the same boards.
    """
    prompts, kind = load_prompts(cfg.prompts), "standard" if p.author.lower() == "nikoli" else "variant"
    start, tokens, error = hints(p, cfg.empty, cfg.seed), 0, ""
    messages = [{"role": "user", "content": fill(prompts[f"{mode}_{kind}"], p, start)}]
    if mode != "single_shot":
        messages.append({"role": "assistant", "content": prompts["acknowledgement"]})
    games = {extract: Game(p, mode, extract, start) for extract in ("robust", "ref")}
    game = games[cfg.extract]
    while not game.stop:
        board = game.board
        if mode != "single_shot":
            messages.append({"role": "user", "content": fill(prompts["board"], p, board)})
        reply = await ask(Turn(window(messages, cfg.history), p, board, mode, key))
        messages.append({"role": "assistant", "content": reply.text})
        tokens += reply.tokens
        if not reply.text:
            game.stop = "truncated" if reply.finish == "length" else "api_error"
            error = reply.error or "empty reply"
        for reading in games.values():
            if not reading.stop and reading.board == board:
                reading.take(reply.text)
    row = dict(puzzle=p.id, mode=mode, key=key, stop=game.stop, error=error, tokens=tokens, board=game.board)
    for extract, reading in games.items():
        known = reading.stop and game.stop != "api_error"
        row[extract] = [reading.stop == "solved", reading.correct] if known else None
    return row | {"messages": messages}


def read_episodes(folder: Path) -> list[dict]:
    """All episodes below a folder; a torn line is left out, and of two of one episode the last holds."""
    found = {}
    for file in sorted(folder.rglob("episodes*.jsonl")):
        for line in file.read_text().split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found[row["player"], row["key"]] = row
    return [*found.values()]


def evaluate(cfg: Config, run: Run, ask: Callable, puzzles: list[Puzzle]) -> list[dict]:
    """Play every puzzle in every mode; an episode's line is on disk when it ends, and is not played again."""
    run.folder.mkdir(parents=True, exist_ok=True)
    done = {row["key"] for row in read_episodes(run.folder) if row["stop"] != "api_error"}
    settings = cfg.history, cfg.empty, cfg.extract, cfg.temperature, cfg.max_tokens, load_prompts(cfg.prompts)
    jobs = []
    for p, mode, trial in itertools.product(puzzles, cfg.modes, range(cfg.trials)):
        what = common.stable_seed(p.givens, p.solution, p.rules, p.elements, settings)
        key = f"{p.id} {mode} {cfg.seed} {trial} {what}"
        if key not in done and hints(p, cfg.empty, cfg.seed):
            jobs.append((p, mode, key))

    async def play_all(out):
        free = asyncio.Semaphore(cfg.concurrency)

        async def one(job):
            async with free:
                row = await play(*job, ask, cfg)
            out.write(json.dumps({"player": cfg.backend} | row) + "\n")
            out.flush()

        await asyncio.gather(*map(one, jobs[run.rank :: run.world_size]))

    with open(run.folder / f"episodes{run.rank}.jsonl", "a") as out:
        out.write("\n")  # ends a torn line
        asyncio.run(play_all(out))
    run.gather("played")
    return read_episodes(run.folder)


def score(rows: list[dict], puzzles: list[Puzzle], mode: str, reading: str) -> tuple[float, float]:
    """ASR and ACP, means over the puzzles of means over trials; NaN where a result is missing."""
    found, missing = defaultdict(list), [math.nan, math.nan]
    for row in rows:
        if row["mode"] == mode:
            found[row["puzzle"]].append(row[reading] or missing)
    return tuple(np.mean([np.mean(found[p.id] or [missing], 0) for p in puzzles], 0))


def score_table(rows: list[dict], puzzles: list[Puzzle], cfg: Config) -> list[dict]:
    """A line for each player, mode and reading: by size ASR in % with its Wilson interval over puzzles, ACP."""
    sizes = {str(n): [p for p in puzzles if p.n == n] for n in sorted({p.n for p in puzzles})} | {
        "all": puzzles
    }
    table, players = [], dict.fromkeys(row["player"] for row in rows)
    for player, mode, reading in itertools.product(players, cfg.modes, ("robust", "ref")):
        line = {"player": player, "mode": mode, "reading": reading}
        for size, some in sizes.items():
            asr, acp = score([row for row in rows if row["player"] == player], some, mode, reading)
            line |= {f"ASR {size}": "-", f"ACP {size}": "-"}
            if math.isfinite(asr):
                ends = stats.binomtest(round(asr * len(some)), len(some)).proportion_ci(method="wilson")
                line[f"ASR {size}"] = f"{100 * asr:.1f} [{100 * ends.low:.0f}, {100 * ends.high:.0f}]"
                line[f"ACP {size}"] = f"{acp:.2f}" if mode != "single_shot" else ""
        table.append(line)
    return table


PUBLISHED = """
model                            ACP 4 / 6 / 9 / all    multi-step % 4 / 6 / 9 / all   single-shot % 4 / 6 / 9 / all
o3-mini (high)                   9.7 / 0.7 / - / -      60.0 / 0.0 / - / -             73.3 / 6.7 / 2.9 / 14.0
Gemini 2.5 Pro (preview-03-25)   11.6 / 0.6 / 1.8 / 3.1 73.3 / 0.0 / 0.0 / 11.0        60.0 / 13.3 / 0.0 / 11.0
Qwen3-235B-A22B                  6.5 / 1.1 / 0.7 / 1.7  40.0 / 0 / 0 / 6.0             53.3 / 0 / 0 / 8.0
Qwen3-30B-A3B                    1.3 / 0.0 / 0.3 / 0.4  6.7 / 0 / 0 / 1.0              46.7 / 0 / 0 / 7.0
DeepSeek-R1                      9.5 / 0.8 / 1.1 / 2.3  60.0 / 0 / 0 / 9.0             40.0 / 0 / 0 / 6.0
Grok 3 Mini                      8.5 / 0.7 / 0.9 / 2.0  53.3 / 0 / 0 / 8.0             40.0 / 0 / 0 / 6.0
QwQ-32B                          5.0 / 0.7 / 0.6 / 1.3  26.7 / 0 / 0 / 4.0             40.0 / 0 / 0 / 6.0
Qwen3-32B                        4.3 / 0.5 / 0.5 / 1.0  26.7 / 0 / 0 / 4.0             40.0 / 0 / 0 / 6.0
Claude 3.7 Sonnet (thinking)     8.1 / 1.1 / - / -      40.0 / 0 / - / -               33.3 / 0 / 0 / 5.0
GPT-4.1                          2.3 / 0.2 / 0.3 / 0.6  13.3 / 0 / 0 / 2.0             13.3 / 0 / 0 / 2.0
Gemini 2.0 Flash                 0.5 / 0.1 / 0.2 / 0.2  0                              0
Gemma 3 27B IT                   0.1 / 0.1 / 0.5 / 0.3  0                              0
Llama 4 Maverick                 0.2 / 0.5 / 0.4 / 0.4  0                              0
"""  # arXiv 2505.16135, table 1


PAGE = """<!doctype html><meta charset="utf-8"><title>Sudoku-Bench</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>body{font:15px sans-serif;max-width:70em;margin:2em auto}td,th{border:1px solid #ccc;padding:.2em .6em}
table{border-collapse:collapse}pre{white-space:pre-wrap;background:#f6f6f6;max-height:24em;overflow:auto}</style>"""


def report(table: list[dict], rows: list[dict], puzzles: list[Puzzle], most: int = 400) -> str:
    """One static page: the table, and episodes with what was said, escaped, and a link to the puzzle."""
    urls, parts = {p.id: p.url for p in puzzles}, [PAGE, tabulate(table, "keys", tablefmt="html")]
    for row in rows[:most]:
        head = " ".join(row[key] for key in ("player", "mode", "puzzle", "stop", "error", "board"))
        said = [
            head,
            urls[row["puzzle"]],
            *(m["content"] for m in row["messages"][:1] + row["messages"][1:][-12:]),
        ]
        head, url, *said = [html.escape(printable(text[:20_000])) for text in said]
        pieces = "".join(f"<pre>{text}</pre>" for text in said)
        parts.append(f'<details><summary>{head}</summary><a href="{url}">{url[:30]}</a>{pieces}</details>')
    return "".join(parts)


# --- part B: 4x4 variants from the table of all grids, and a network that reads their rules ---

A, B = np.meshgrid(np.arange(1, 5), np.arange(1, 5), indexing="ij")
SEEN = {  # relations of two cells as tables of digit pairs (4, 4)
    "white": abs(A - B) == 1,
    "black": (A == 2 * B) | (B == 2 * A),
    "sum 5": A + B == 5,
    "less": A < B,
    "equal": A == B,
    "parity": (A - B) % 2 == 0,
}
NOVEL = {
    "whispers 2": abs(A - B) >= 2,
    "sum > 5": A + B > 5,
    "sum 7": A + B == 7,
    "sum < 5": A + B < 5,
    "odd sum": (A + B) % 2 == 1,
    "product > 5": A * B > 5,
}
# pairs of seen families that are never together in training
APART = [("white", "black"), ("sum 5", "less"), ("equal", "parity"), ("white", "parity"), ("black", "less")]


class Small(NamedTuple):
    """4x4 puzzles: given (N, 16) with 0 for empty, edge (N, 16, 16), solution (N, 16), plain completions (N,)."""

    given: Tensor
    edge: Tensor
    solution: Tensor
    plain: Tensor


@functools.cache
def grids() -> np.ndarray:
    """The 288 grids of 4x4, (288, 16)."""
    found = solve(Puzzle("", 4, "." * 16, regions=boxes(4)), 999)[1]
    return np.array([[*map(int, grid)] for grid in sorted(found)])


def edges(relations: list[tuple[int, int, np.ndarray]]) -> np.ndarray:
    """e_ij as bits of a number, (16, 16): the digit pairs that are allowed, then same cell, row, column, box."""
    i = np.arange(16)
    places = np.stack([i, i // 4, i % 4, i // 8 * 2 + i % 4 // 2])
    same = places[:, :, None] == places[:, None]
    table = np.where(same.any(0)[..., None, None], A != B, True)
    table[i, i] = A == B
    for a, b, pairs in relations:
        table[a, b] &= pairs
        table[b, a] &= pairs.T
    return np.concatenate([table.reshape(16, 16, 16), same.transpose(1, 2, 0)], -1) @ (1 << np.arange(20))


@functools.cache
def mixes(split: str) -> list[Sequence[str]]:
    """The families that puzzles of a split have, one to three at a time."""
    if split in ("plain", "recombined"):
        return [()] if split == "plain" else APART
    found = [x for k in (1, 2, 3) for x in itertools.combinations(NOVEL if split == "novel" else SEEN, k)]
    return [x for x in found if not any({*pair} <= {*x} for pair in APART)]


def draw_puzzles(split: str, count: int, chance: random.Random, rows: list[int]) -> Small:
    """`count` puzzles of a split with one solution, each one of these rows of the table of grids."""
    near = leaps(4, (0, 1), (1, 0), (1, 1), (1, -1), (1, 2), (1, -2), (2, 1), (2, -1))
    near = [(square(4).index(a), square(4).index(b)) for a, b in near]
    made, g = [], grids()
    while len(made) < count:
        kinds, s = chance.choice(mixes(split)), chance.choice(rows)
        relations, alive = [], np.ones(288, bool)
        for kind in kinds:
            pairs = (SEEN | NOVEL)[kind]
            fits = [(a, b) for a, b in near if pairs[g[s, a] - 1, g[s, b] - 1]]
            for a, b in chance.sample(fits, min(len(fits), round(chance.uniform(7, 13) / (1 + len(kinds))))):
                relations.append((a, b, pairs))
                alive &= pairs[g[:, a] - 1, g[:, b] - 1]
        kept, agree = np.ones(16, bool), g == g[s]
        for i in chance.sample(range(16), 16):  # strip givens while one grid is left
            kept[i] = False
            kept[i] = (alive & agree[:, kept].all(1)).sum() > 1
        plain = agree[:, kept].all(1).sum()
        if plain > 1 or not kinds:
            made.append((g[s] * kept, edges(relations), g[s], plain))
    return Small(*(torch.from_numpy(np.stack(column)) for column in zip(*made, strict=True)))


def draw_splits(cfg: Config) -> dict[str, Small]:
    """Puzzles of each split and for training; no test has a training puzzle's grid, up to names of digits."""
    chance = random.Random(cfg.seed)
    forms = [tuple([*dict.fromkeys(grid)].index(d) for d in grid) for grid in grids().tolist()]
    held = chance.sample(sorted({*forms}), 3)  # of 12
    tests, train = ([k for k in range(288) if (forms[k] in held) == which] for which in (True, False))
    found = {split: draw_puzzles(split, cfg.tests, chance, tests) for split in SPLITS}
    return found | {"train": draw_puzzles("train", cfg.puzzles, chance, train)}


class EdgeNet(nn.Module):
    """Eqs. (2), (3): one shared block, iterated: attention with a bias and a value gate for each edge, an MLP.

    g(e) = W gelu(V e) has rank K = cfg.gates, so that gating takes K products of (16, 16) with the values.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        d, self.heads = cfg.width, cfg.heads
        self.digit, self.gamma = nn.Embedding(5, d), nn.Parameter(torch.tensor(0.5))
        self.bias, self.basis = nn.Linear(20, cfg.heads), nn.Linear(20, cfg.gates)
        self.gate = nn.Parameter(torch.randn(cfg.gates, cfg.heads, d // cfg.heads) / cfg.gates**0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.qkv, self.out, self.head = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Linear(d, 4)
        self.mlp = nn.Sequential(nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))

    def forward(self, given: Tensor, edge: Tensor, iterations: int) -> Tensor:
        """given (B, 16), edge (B, 16, 16) -> logits of the digits after each iteration, (T, B, 16, 4)."""
        e = (edge[..., None] >> torch.arange(20, device=edge.device) & 1).float()
        bias = self.bias(e).masked_fill((edge == 0xFFFF)[..., None], -torch.inf).permute(0, 3, 1, 2)
        basis = F.gelu(self.basis(e))  # (B, 16, 16, K)
        first = h = self.digit(given)
        logits = []
        for _ in range(iterations):
            h = h + self.gamma * first
            q, k, v = self.qkv(self.norms[0](h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            a = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)  # (B, H, 16, 16)
            gated = torch.einsum("bhij,bijk,bhjc->bhikc", a, basis, v)
            h = h + self.out(torch.einsum("bhikc,khc->bihc", gated, self.gate).flatten(2))
            h = h + self.mlp(self.norms[1](h))
            logits.append(self.head(self.norms[2](h)))
        return torch.stack(logits)


def network_loss(logits: Tensor, given: Tensor, solution: Tensor) -> Tensor:
    """Eq. (3): logits (T, B, 16, 4); the mean over empty cells and iterations."""
    target = (solution - 1).masked_fill(given > 0, -100).expand(len(logits), -1, -1)
    return F.cross_entropy(logits.flatten(0, 2).float(), target.flatten())


def train_network(cfg: Config, run: Run, data: Small) -> EdgeNet:
    """One net; the same batches on any number of ranks, each takes its part."""
    net = EdgeNet(cfg).to(run.device)
    wrapped = run.wrap(torch.compile(net) if cfg.compile else net)
    optimizer = torch.optim.AdamW(net.parameters(), cfg.lr, (0.9, 0.98), weight_decay=0.05)
    data, mine = Small(*(x.to(run.device) for x in data)), slice(run.rank, None, run.world_size)
    for step in run.steps(cfg.steps, net=net, optimizer=optimizer):
        rows = torch.randint(len(data.given), (cfg.batch,))[mine].to(run.device)
        share = torch.rand(cfg.batch, 1) * (torch.rand(cfg.batch, 1) < 0.5) / 2  # of blanks that are shown
        shown = (torch.rand(cfg.batch, 16) < share)[mine].to(run.device)
        given, solution = torch.where(shown, data.solution[rows], data.given[rows]), data.solution[rows]
        with run.autocast():
            loss = network_loss(wrapped(given, data.edge[rows], cfg.iterations), given, solution)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        decay = 0.525 + 0.475 * math.cos(math.pi * step / cfg.steps)
        optimizer.param_groups[0]["lr"] = cfg.lr * decay * min(1, (step + 1) / 100)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(step, loss=loss)
    run.speed["puzzles_per_s"] = run.speed["steps_per_s"] * cfg.batch
    return net.eval()


@torch.no_grad()
def predict(net: EdgeNet, given: Tensor, edge: Tensor, cfg: Config) -> Tensor:
    """Digit probabilities (B, 16, 4) after twice the iterations of training, with the givens certain."""
    device = net.gate.device
    found = net(given.to(device), edge.to(device), 2 * cfg.iterations)[-1].softmax(-1).cpu()
    return torch.where(given[..., None] > 0, F.one_hot(given, 5)[..., 1:], found)


def network_player(net: EdgeNet, cfg: Config) -> Callable:
    """The network's grid of a 4x4 puzzle, or its surest empty cell; of its clues it sees relations of two cells."""

    async def ask(turn: Turn) -> Reply:
        relations = []
        for _, rule, group, v in groups_of(turn.p):
            if len(group) == 2:
                pairs = [
                    [rule.check(x, v) for x in itertools.product((a,), range(1, 5))] for a in range(1, 5)
                ]
                relations.append((*map(square(4).index, group), np.array(pairs)))
        given = torch.tensor([[int(c.replace(".", "0")) for c in turn.board]])
        sure, digit = predict(net, given, torch.from_numpy(edges(relations))[None], cfg)[0].max(-1)
        i = sure.masked_fill(given[0] > 0, -1).argmax()
        return say(turn, "".join(str(d + 1) for d in digit.tolist()), i)

    return ask


# --- the table, main ---


def expected_acp(digits: int, empty: int) -> float:
    """Eq. (1)."""
    return (1 - digits**-empty) / (digits - 1)


def train(cfg: Config, run: Run) -> dict[str, float]:
    """One cell of the table: what a player reaches in the protocols, and on the splits of part B."""
    every = puzzles = load_puzzles(cfg.data, cfg.limit)
    kind, _, name = cfg.backend.partition(":")
    if kind == "expected":
        return {"ACP": np.mean([expected_acp(len(p.digits), p.givens.count(".")) for p in puzzles])}
    found = {}
    if kind in ("vanilla", "neural"):
        data = draw_splits(cfg)
        found = {split: (1 / data[split].plain.double()).mean().item() for split in SPLITS}
    if kind == "solver":
        puzzles = [p for p in puzzles if proof(p)]
    if kind == "neural":
        puzzles = [p for p in puzzles if p.n == 4 and p.regions == boxes(4)]
        net = train_network(cfg, run, data["train"])
        for split in SPLITS:
            best = predict(net, data[split].given, data[split].edge, cfg).argmax(-1) + 1
            found[split] = (best == data[split].solution).all(-1).double().mean().item()
        ask = network_player(net, cfg)
    else:
        makers = {"hf": hf_player, "http": http_player, "scripted": scripted_player}
        ask = makers.get(kind, simple_player)(name or kind, cfg, run)
    if found:
        found["seen - novel"] = found["seen"] - found["novel"]
    rows = evaluate(cfg, run, ask, puzzles)
    for mode in cfg.modes:
        found[mode], acp = score(rows, every, mode, cfg.extract)
        found |= {"ACP": acp} if mode != "single_shot" else {}
    return found


def draw(figure, scores: list[dict], table: dict):
    """ASR of all players by size in single-shot, and the splits of part B."""
    left, right = figure.subplots(1, 2)
    for axis, keys, rows in ((right, SPLITS, table),):
        for row, cells in rows.items():
            if keys[0] in cells[0]:
                axis.errorbar(
                    keys,
                    *zip(*(common.interval([c[k] for c in cells]) for k in keys), strict=True),
                    fmt="o",
                    label=row,
                )
        axis.legend()


def dry_run(cfg: Config, run: Run):
    """Print what this config plays and trains."""
    puzzles = load_puzzles(cfg.data, cfg.limit)
    empty = sum(p.givens.count(".") for p in puzzles)
    net = sum(x.numel() for x in EdgeNet(cfg).parameters())
    flops = 96 * net * cfg.batch * cfg.iterations * cfg.steps
    run.print(
        f"{len(puzzles)} puzzles, at most {empty} calls a trial in multi_step, {len(puzzles)} in single_shot"
    )
    run.print(f"network: {net:,} parameters, {cfg.steps} updates, {flops / 1e12:.1f} TFLOP a seed")


def main():
    cfg, rows = common.parse_config(CONFIGS), ROWS
    if cfg.backend:
        rows, cfg = {cfg.backend: {}}, replace(cfg, rows=(), seeds=1)
    with Run(cfg, cfg.backend) as run:
        puzzles = load_puzzles(cfg.data, cfg.limit)
        if cfg.dry_run:
            return dry_run(cfg, run)
        table, episodes = run.grid(rows, train), read_episodes(run.root)
        scores = score_table(episodes, puzzles, cfg)
        official = cfg.prompts or "our prompts"
        run.print(f"\n{cfg.data}, {official}; ASR in % with Wilson's 95 % interval over puzzles")
        run.print(tabulate(scores, "keys"))
        run.print(f"\nchallenge_100 with the official prompts, reading ref, as published{PUBLISHED}")
        run.check(CLAIMS, table)
        run.figure(draw, scores, table)
        failed = [row for row in episodes if row["stop"] == "api_error"]
        if run.rank == 0:
            common.write_atomic(run.root / "report.html", report(scores, failed + episodes, puzzles))
        if failed:
            for file in run.root.glob("*/result.json"):
                file.unlink(missing_ok=True)
            run.print(
                f"{len(failed)} episodes failed, the first: {failed[0]['error']}; --resume plays them again"
            )
            sys.exit(1)


if __name__ == "__main__":
    main()
