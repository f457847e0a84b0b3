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
Part B trains a small network on 4x4 variants and tests it on rules it has never seen. e_ij(a, b) says whether
the rules of cells i and j allow digits a and b there, p_j is what cell j believes: rules enter by meaning.
  eq. (2)  s_ij(a) = sum_b e_ij(a, b) p_j(b)                           the support that j gives to a at i
  eq. (3)  h_i <- GRU(sum_j relu(W [s_ij, same cell, row, column, box]), given digit; h_i)
           p_i = softmax(V h_i), or the given digit; T iterations
  eq. (4)  loss = - mean over iterations and cells of log p_i(solution), 0 for given cells

How to run
  python sudoku_bench.py                                        both parts, on two CPU cores
  python sudoku_bench.py --backend hf:FOLDER --max_tokens 2000  a language model plays (hub id, folder, .gguf)
  python sudoku_bench.py --backend http:http://HOST/v1#MODEL    an endpoint plays; key in OPENAI_API_KEY
  python sudoku_bench.py --backend solver --data LINK           prove an f-puzzles or SudokuPad (fpuz) link
  torchrun --nproc_per_node=8 sudoku_bench.py --config full --data challenge_100.jsonl   the paper's puzzles

Departures from the paper and its code
- The official sets were withdrawn. mini_48 is ours: generated, proved unique, every family needed; it tests
  rule reading and deduction, not break-ins. --data plays the official files where you have them.
- Prompts are in our words (--prompts FILE: the originals). --history 0 sends nothing of the past; the code's
  slice sends all. Descriptions of drawings lack the code's lone dash and "None", and keep unstyled cages.
- Both readings are in the table: `ref` reads as the code does, `robust` cuts thoughts, reads the last answer
  block, accepts r1c1 = 5 and grids in lines, and refuses two digits for a cell. The game goes by --extract;
  the other reading judges the same replies, as long as it would have been shown the same boards.
- Intervals, the random and the rule-ignoring player, proofs and the network are ours. Grids go up to 9x9.
- Not here: hints (the code's num_empty_cells), scl links, human traces, pictures of boards.

Reading order: Puzzle, Rule and RULES, solve, the protocols (Game, play), players, RuleNet, train.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import html
import itertools
import json
import math
import os
import random
import re
import sys
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import stats
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import common
from common import Claim, Run, UserError

MINI_48 = Path(__file__).parent / "assets" / "mini_48.jsonl"
READINGS = ("robust", "ref")
Mode = Literal["multi_step", "single_step", "single_shot"]


@dataclass
class Config(common.Config):
    # what is played
    data: str = str(MINI_48)  # .jsonl, .parquet, folder, hub id[:subset]; an f-puzzles or fpuz link
    limit: int = 0  # puzzles, at most; 0: all
    backend: str = ""  # solver, random, vanilla, neural, hf:NAME, http:URL#MODEL; empty: the table's rows
    modes: tuple[Mode, ...] = ("multi_step", "single_shot")  # protocols; single_step, too
    trials: int = 1  # episodes of each puzzle and mode
    history: int = field(default_factory=lambda: 5)  # turns of the past that a model sees (N); -1: all
    extract: Literal["robust", "ref"] = "robust"  # reading that the game goes by; ref: the paper's code
    prompts: str = ""  # JSON file of templates to use instead of ours
    # language models
    temperature: float | None = None  # None: the endpoint's own; greedy for hf
    max_tokens: int = 0  # of a reply; 0: no limit but the context
    concurrency: int = 16  # episodes in flight; the batch of an hf model
    # the network
    puzzles: int = 12_000  # generated for training
    tests: int = 200  # puzzles of each split
    width: int = 32  # of the state h of a cell
    iterations: int = 6  # T, of the shared block; tests run 2 T
    steps: int = 600  # updates of a seed
    batch: int = 64  # puzzles an update, over all ranks
    lr: float = 3e-3  # AdamW, warm-up of 100 steps, then down to 0

    def check(self):
        super().check()
        if not re.fullmatch("(solver|random|expected|vanilla|neural|hf:.+|http:https?://.+|)", self.backend):
            raise UserError(f"--backend {self.backend}: is none of those that --help names")
        load_prompts(self.prompts)


# a row of the table is the settings that it changes
ROWS = {
    "solver": dict(backend="solver"),
    "random": dict(backend="random", trials=10),
    "random, eq. (1)": dict(backend="expected"),
    "ignores the rules": dict(backend="vanilla", trials=10),
    "network": dict(backend="neural"),
}
DEMO = Config(seeds=3, ranks=2)
CONFIGS = {
    "smoke": replace(DEMO, ranks=1, seeds=1, limit=3, puzzles=64, tests=8, steps=4, width=16),
    "demo": DEMO,
    "gpu": replace(DEMO, ranks=1, puzzles=60_000, width=256, batch=512, steps=8000, lr=1e-3),
    "full": replace(
        DEMO,
        ranks=1,
        share="run",
        data="SakanaAI/Sudoku-Bench:challenge_100",
        backend="hf:Qwen/QwQ-32B",
        temperature=0.6,
        max_tokens=20_000,
    ),
}
NET, BLIND = "network", "ignores the rules"
CLAIMS = [
    Claim("reading the rules solves more than ignoring them, single-shot", "single_shot", "solver", BLIND),
    Claim(
        "random play: its ACP exceeds eq. (1), less 0.05", "ACP", "random", "random, eq. (1)", margin=-0.05
    ),
    Claim("seen rules: the network beats ignoring them", "seen", NET, BLIND),
    Claim("... in pairs that it has not seen together", "recombined", NET, BLIND),
    Claim("... and rules that it has never seen", "novel", NET, BLIND),
]


# --- puzzles ---

Cell = tuple[int, int]  # row and column from 1; 0 and n + 1 are outside the grid


class Clue(NamedTuple):
    """A constraint: a family of RULES, cells in the order that matters for it, and its numbers."""

    kind: str
    cells: tuple[Cell, ...] = ()
    numbers: tuple[int, ...] = ()


@dataclass(eq=False)
class Puzzle:
    """A puzzle of the official format, with `clues` where its rules are known to a program.

    givens and solution are n^2 characters, '.' for empty; clues None: the rules are prose; regions are
    groups of cells; elements are drawings in the official vocabulary.
    """

    id: str
    n: int
    givens: str
    solution: str | None = None
    clues: tuple[Clue, ...] | None = None
    regions: tuple[tuple[Cell, ...], ...] = ()
    rules: str = ""
    elements: list = field(default_factory=list)
    plain: bool = False  # gets the plain-sudoku prompt, as in the paper's code
    url: str = ""

    def __post_init__(self):
        size = self.n**2
        if not 1 <= self.n <= 9 or not re.fullmatch(rf"[0-9.]{{{size}}}", self.givens):
            raise ValueError("a board is as many digits and dots as cells, of grids up to 9 x 9")
        if not re.fullmatch(rf"[0-9]{{{size}}}", self.solution or ""):
            self.solution = None  # unknown, or in part
        known = f"{self.givens}{self.solution or ''}".replace(".", "")
        self.digits = tuple(sorted({*range(1, self.n + 1), *map(int, known)}))


@functools.cache
def square(n: int) -> list[Cell]:
    """All cells, row by row."""
    return list(itertools.product(range(1, n + 1), repeat=2))


def boxes(n: int) -> tuple[tuple[Cell, ...], ...]:
    """The standard boxes; their height is the largest divisor of n up to its root (6: 2 x 3)."""
    h = {4: 2, 6: 2, 8: 2, 9: 3}.get(n, 1)
    cells = sorted(square(n), key=lambda cell: ((cell[0] - 1) // h, (cell[1] - 1) * h // n))
    return tuple(tuple(cells[k : k + n]) for k in range(0, n * n, n))


def names(cells: Sequence[Cell]) -> list[str]:
    return [f"r{r}c{c}" for r, c in cells]


def cells_of(names: Sequence[str]) -> tuple[Cell, ...]:
    """`r3c4` -> (3, 4) for each; an exception for anything else."""
    found = [re.fullmatch("[rR]([0-9]{1,2})[cC]([0-9]{1,2})", name).groups() for name in names]
    return tuple((int(r), int(c)) for r, c in found)


# --- rules: a family is a sentence, groups(puzzle, clue) of cells, and what digits there are allowed ---


def leaps(n: int, *moves: Cell) -> list[tuple[Cell, Cell]]:
    """Pairs of cells that lie one of the moves apart."""
    pairs = [((r, c), (r + a, c + b)) for r, c in square(n) for a, b in moves]
    return [pair for pair in pairs if pair[1] in square(n)]


def apart(*moves):
    return lambda p, clue: leaps(p.n, *moves)


def whole(p, clue):
    return [clue.cells]


def along(length):
    """All pieces of a line that are so long."""
    return lambda p, clue: [clue.cells[k : k + length] for k in range(len(clue.cells) - length + 1)]


def mirrored(p, clue):
    return [*zip(clue.cells, clue.cells[::-1], strict=True)]


def within(p, clue):
    """Each cell of a line with the line's ends around it."""
    first, *inner, last = clue.cells
    return [(first, cell, last) for cell in inner]


def neighbours(p, clue):
    """The cell with each of its neighbours that is not marked in the same way."""
    marked = [c.cells[0] for c in p.clues if c.kind == clue.kind]
    near = leaps(p.n, (0, 1), (1, 0), (0, -1), (-1, 0))
    return [(a, b) for a, b in near if a == clue.cells[0] and b not in marked]


def unmarked(*kinds):
    """Edges without a mark of these kinds."""

    def groups(p, clue):
        marked = [{*c.cells} for c in p.clues if c.kind in kinds]
        return [pair for pair in leaps(p.n, (0, 1), (1, 0)) if {*pair} not in marked]

    return groups


def ray(p, clue):
    """What a clue outside looks along: the line from there through the second cell."""
    (r, c), (r1, c1) = clue.cells
    line = [(r + k * (r1 - r), c + k * (c1 - c)) for k in range(1, p.n + 1)]
    return [[cell for cell in line if cell in square(p.n)]]


# small families: whether digits are allowed, v the clue's numbers; `allow` posts the table of those that are


def equal(v, a, b):
    return a == b


def less(v, a, b):
    return a < b


def difference(v, a, b):
    return abs(a - b) in v


def ratio(v, a, b):
    return any(a == k * b or b == k * a for k in v)


def total(v, a, b):
    return a + b in v


@functools.cache
def allowed(check, size, v):
    """All tuples of digits that such a rule lets pass."""
    return [x for x in itertools.product(range(10), repeat=size) if check(v, *x)]


def allow(check):
    return lambda m, x, v: m.add_allowed_assignments(x, allowed(check, len(x), v))


def forbid(check):
    return allow(lambda v, *x: not check(v, *x))


# all others: what they post to a CP-SAT model m, x its variables in the clue's order


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


def post_equal_parts(m, x, v):
    sums = [sum(x[end - k : end]) for end, k in zip(itertools.accumulate(v), v, strict=True)]
    for part in sums[1:]:
        m.add(part == sums[0])


def post_consecutive(m, x, v):
    low = m.new_int_var(0, 9, "")
    m.add_all_different(x)
    for cell in x:
        m.add_linear_constraint(cell - low, 0, len(x) - 1)


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
    """A family; {} in its sentence stands for the clue's numbers.

    post(model, digits, numbers) says what holds for each of groups(puzzle, clue).
    """

    text: str
    post: Callable
    groups: Callable = whole


RULES = {
    # marks on an edge, in a cell, at a corner
    "white dot": Rule("Cells joined by a white dot differ by {}.", allow(difference)),
    "black dot": Rule("Of cells joined by a black dot one is {} times the other.", allow(ratio)),
    "V or X": Rule("Cells joined by V sum to 5, cells joined by X to 10.", allow(total)),
    "smaller, larger": Rule("An inequality sign points at the smaller digit.", allow(less)),
    "gray square": Rule("Grey squares hold even digits.", allow(lambda v, a: a % 2 == 0)),
    "gray circle": Rule("Grey circles hold odd digits.", allow(lambda v, a: a % 2 == 1)),
    "min": Rule(
        "A cell marked min is smaller than its neighbours without that mark.", allow(less), neighbours
    ),
    "max": Rule("A cell marked max is larger than those.", allow(lambda v, a, b: a > b), neighbours),
    "pencil marks": Rule("A cell with pencil marks holds one of them.", allow(lambda v, a: a in v)),
    "quadruple": Rule(
        "Digits in a circle are in the four cells around it, as often.",
        allow(lambda v, *x: all(x.count(d) >= v.count(d) for d in v)),
    ),
    "clones": Rule("Lists of clones read the same from both ends.", allow(equal), mirrored),
    # lines
    "thermometer": Rule("Digits increase along a thermometer from its bulb.", allow(less), along(2)),
    "slow thermometer": Rule(
        "Digits never decrease along a slow thermometer.", allow(lambda v, a, b: a <= b), along(2)
    ),
    "green line": Rule(
        "Neighbouring digits on a green line differ by at least {}.",
        allow(lambda v, a, b: abs(a - b) >= v[0]),
        along(2),
    ),
    "gray line": Rule("Grey lines read the same from both ends.", allow(equal), mirrored),
    "turquoise line": Rule(
        "Three neighbours on a turquoise line leave three remainders when divided by 3.",
        allow(lambda v, *x: len({d % 3 for d in x}) == 3),
        along(3),
    ),
    "purple line": Rule("A purple line holds consecutive digits without repeats.", post_consecutive),
    "blue line": Rule("Box borders cut a blue line into parts of equal sums.", post_equal_parts),
    "line between circles": Rule(
        "Digits on a line between circles lie between those in them.",
        allow(lambda v, a, b, c: a < b < c or a > b > c),
        within,
    ),
    "arrow": Rule("Digits along an arrow sum to the number in its circle or pill.", post_arrow),
    # groups
    "killer cage": Rule("Digits in a cage do not repeat, and sum to its number, if any.", post_cage),
    "extra region": Rule("No digit repeats in an extra region.", post_distinct),
    "rising diagonal": Rule(
        "No digit repeats on a marked diagonal.",
        post_distinct,
        lambda p, c: [[(p.n + 1 - k, k) for k in range(1, p.n + 1)]],
    ),
    "falling diagonal": Rule(
        "No digit repeats on a marked diagonal.",
        post_distinct,
        lambda p, c: [[(k, k) for k in range(1, p.n + 1)]],
    ),
    "windows": Rule(
        "No digit repeats in a window: r2c2 to r4c4, and r2c6, r6c2, r6c6 likewise.",
        post_distinct,
        lambda p, c: [[(r + a, k + b) for a, b in square(3)] for r in (1, 5) for k in (1, 5)],
    ),
    "disjoint groups": Rule(
        "Cells at the same place of boxes differ.", post_distinct, lambda p, c: zip(*boxes(p.n), strict=True)
    ),
    "anti-knight": Rule(
        "Cells a knight's move apart differ.", post_distinct, apart((1, 2), (1, -2), (2, 1), (2, -1))
    ),
    "anti-king": Rule("Cells that touch at a corner differ.", post_distinct, apart((1, 1), (1, -1))),
    "non-consecutive": Rule(
        "Neighbours without a white dot are never consecutive.",
        allow(lambda v, a, b: abs(a - b) != 1),
        unmarked("white dot"),
    ),
    "no other white dot": Rule(
        "Neighbours without a dot do not differ by {}.",
        forbid(difference),
        unmarked("white dot", "black dot"),
    ),
    "no other black dot": Rule(
        "Neighbours without a dot have no ratio of {}.",
        forbid(ratio),
        unmarked("white dot", "black dot"),
    ),
    "no other V or X": Rule(
        "Neighbours without V or X do not sum to {}.", forbid(total), unmarked("V or X")
    ),
    # numbers outside the grid
    "little killer": Rule("A number with an arrow is the sum of its diagonal.", post_total, ray),
    "sandwich": Rule(
        "A sandwich clue sums the digits between the smallest and the largest of its line.",
        post_sandwich,
        ray,
    ),
    "skyscraper": Rule(
        "A skyscraper clue counts the digits seen from there; larger ones hide smaller ones.",
        post_skyscraper,
        ray,
    ),
    "X-sum": Rule("An X-sum clue sums the first X digits from there, X being the first.", post_xsum, ray),
}


def described(p: Puzzle) -> Puzzle:
    """The puzzle with rules and drawings in words, those of its clues before its own."""
    rules = [f"Place the digits {p.digits}; none repeats in a row, a column or a region."]
    drawn = [f"region: {' '.join(names(cells))}" for cells in p.regions if p.regions != boxes(p.n)]
    for kind, cells, numbers in p.clues:
        numbers = [*map(str, numbers)]
        rules.append(RULES[kind].text.format(" or ".join(numbers)))
        drawn.append(" ".join([kind, *numbers, *names(cells)]))
    elements = [{"type": "manual", "text": text} for text in drawn]
    return replace(p, rules=p.rules or " ".join(dict.fromkeys(rules)), elements=elements + p.elements)


def element_text(e: dict) -> str:
    """A visual element of the official sets as a line of the prompt; empty for what has no description."""
    cells = e.get("cells") or e.get("coords") or []
    cells = cells.split() if isinstance(cells, str) else [*map(str, cells)]
    e = defaultdict(str, {key: value for key, value in e.items() if value is not None})
    kind, color, border, loc = e["type"], e["color_name"], e["border_color_name"], e["loc"]
    every, edge = " ".join(cells), f"between {' and '.join(cells[:2])}"
    cage = {"killer": "killer cage", "box": "region"}.get(e["style"], "cage")
    lines = {
        "lines": f"line, color: {color}, coords: {every}",
        "arrows": f"arrow, color: {color}, coords (base to tip): {every}",
        "inequality": f"inequality arrow: {e['direction']} {edge}",
        "cage": f"{cage} (value {e['value']}): {every}" if e["value"] else f"{cage}: {every}",
        "global": f"global: {e['text']}",
        "manual": e["text"],
    }
    if str(kind).endswith(" arrow"):
        return f"{kind}, color: {color}, in location: {every}, pointing {e['direction']}"
    if kind not in ("underlays", "overlays"):
        return lines.get(kind, "")
    paint = f"color: {color}" if color else border and f"stroke color: {border}"
    if color and border not in ("", color):
        paint = f"{paint} (stroke color: {border})"
    place = {"cell": every, "corner": f"at the corner of {every}"}.get(loc, loc and edge)
    pieces = {"text: ": e["text"], "shape: ": e["shape"], "": paint, "location: ": place}
    return ", ".join(f"{key}{value}" for key, value in pieces.items() if value)


# --- solver ---


def groups_of(p: Puzzle) -> Iterator[tuple[Rule, Sequence[Cell], tuple]]:
    """(rule, cells, numbers) of all that must hold: rows, columns, regions, then clues."""
    cells, k = square(p.n), range(p.n)
    for group in [*(cells[i :: p.n] for i in k), *(cells[i * p.n :][: p.n] for i in k), *p.regions]:
        yield RULES["extra region"], group, ()
    for clue in p.clues or ():
        for group in RULES[clue.kind].groups(p, clue):
            yield RULES[clue.kind], group, clue.numbers


def solve(p: Puzzle, limit: int = 2, seed: int = 0) -> tuple[str, list[str]]:
    """(none | unique | multiple | undecided, up to `limit` solutions) by CP-SAT, in 30 CPU seconds each.

    unique only where it was proved that there is no other. A seed other than 0 randomises the search.
    """
    cp_model = common.need("ortools.sat.python.cp_model", "sudoku")
    m, solver, cells, found = cp_model.CpModel(), cp_model.CpSolver(), square(p.n), []
    domains = [p.digits if c == "." else [int(c)] for c in p.givens]
    x = [m.new_int_var_from_domain(cp_model.Domain.from_values(domain), "") for domain in domains]
    for rule, group, numbers in groups_of(p):
        rule.post(m, [x[cells.index(c)] for c in group], numbers)
    settings = solver.parameters
    settings.num_workers, settings.max_deterministic_time = 1, 30
    settings.random_seed, settings.randomize_search = seed, seed > 0
    while len(found) < limit and (status := solver.solve(m)) in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        grid = [solver.value(cell) for cell in x]
        m.add_forbidden_assignments(x, [grid])
        found.append("".join(map(str, grid)))
    if len(found) > 1:
        return "multiple", found
    return ("none", "unique")[len(found)] if status == cp_model.INFEASIBLE else "undecided", found


@functools.cache
def proof(p: Puzzle) -> str | None:
    """The only solution, if the clues prove one and it is the published one where there is one."""
    status, found = solve(p) if p.clues is not None else ("", [])
    return found[0] if status == "unique" and p.solution in (None, found[0]) else None


# --- links of f-puzzles and SudokuPad (fpuz) ---

FPUZZLES = """\
thermometer: thermometer
slowthermometer: slow thermometer
palindrome: gray line
renban: purple line
whispers: green line
regionsumline: blue line
modularline: turquoise line
betweenline: line between circles
arrow: arrow
killercage: killer cage
extraregion: extra region
difference: white dot
ratio: black dot
xv: V or X
less: smaller, larger
quadruple: quadruple
clone: clones
odd: gray circle
even: gray square
minimum: min
maximum: max
littlekillersum: little killer
sandwichsum: sandwich
xsum: X-sum
skyscraper: skyscraper
diagonal+: rising diagonal
diagonal-: falling diagonal
windoku: windows
antiknight: anti-knight
antiking: anti-king
nonconsecutive: non-consecutive
disjointgroups: disjoint groups"""
FPUZZLES = dict(line.split(": ") for line in FPUZZLES.splitlines())  # its keys and our families
COSMETIC = ("line", "circle", "rectangle", "text", "cage")
KNOWN = re.findall(
    r"\S+",
    """size grid title author ruleset solution negative id value metadata highlightConflicts given region
    givenPencilMarks centerPencilMarks cornerPencilMarks cells cell lines direction values cloneCells fontC
    angle baseC outlineC width height highlight c isNewConstraint
    fromConstraint disabledlogic truecandidatesoptions fromRangskSolver""",
)
USUAL = {"white dot": [1], "black dot": [2], "V or X": [5, 10], "green line": [5]}


def decode_link(link: str) -> dict:
    """The JSON in a link or in bare data; an exception for what is no link."""
    data = urllib.parse.unquote(link.strip()).replace(" ", "+")
    body = re.search(r"(?:load=|fpuzzles|fpuz|^)([A-Za-z0-9+/]{9,40000})[=\\]*$", data)[1]
    text = common.need("lzstring", "sudoku").LZString().decompressFromBase64(body)
    return json.loads(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))


def link_of(data: dict) -> str:
    """SudokuPad's link of f-puzzles JSON."""
    code = common.need("lzstring", "sudoku").LZString().compressToBase64(json.dumps(data))
    return "https://sudokupad.app/fpuz" + urllib.parse.quote(code, safe="")


def import_link(link: str) -> Puzzle:
    """A puzzle from a link; UserError for what is none."""
    try:
        return replace(from_fpuzzles(decode_link(link)), url=link.strip())
    except Exception as e:  # data from outside raise a dozen kinds
        raise UserError(printable(f"{link[:60]}: no f-puzzles or fpuz link ({e!r:.80})")) from None


def clues_of(kind: str, item: dict, home: dict[Cell, int], n: int) -> list[Clue]:
    """Clues of one item of f-puzzles; a total of nothing or 0 is none, but for a sandwich's 0."""
    number = item.get("value") or USUAL.get(kind, [0])[0]
    number = int({"V": 5, "X": 10}.get(number, number))
    numbers = (number,) if number or (kind == "sandwich" and "value" in item) else ()
    cells, found = [item["cell"]] if "cell" in item else item.get("cells", []), []
    for line in item.get("lines") or [cells]:
        where = cells_of(line)
        if kind == "arrow":
            numbers, where = (len(cells),), tuple(dict.fromkeys(cells_of(cells + line)))
        elif kind == "quadruple":
            numbers = tuple(item["values"])
        elif kind == "blue line":
            numbers = tuple(len([*part]) for _, part in itertools.groupby(where, home.get))
        elif kind == "clones":
            where += cells_of(item["cloneCells"])[::-1]
        elif RULES[kind].groups is ray:
            (r, c), way = where[0], item.get("direction", "")
            down = ("D" in way) - ("U" in way) if way else (r == 0) - (r > n)
            right = ("R" in way) - ("L" in way) if way else (c == 0) - (c > n)
            where += ((r + down, c + right),)
        if numbers or RULES[kind].groups is not ray:
            found.append(Clue(kind, where, numbers))
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
        own = {c.numbers[0] for c in clues if c.kind == kind}  # what marks say, other edges must not be
        clues.append(Clue(f"no other {kind}", (), tuple(own or USUAL[kind])))
    clues += [Clue("pencil marks", (c,), tuple(x)) for c in cells if (x := cells[c].get("givenPencilMarks"))]
    drawn = [{"type": "manual", "text": f"{key} {item}"} for key in COSMETIC for item in data.get(key) or []]
    board = "".join(str(cell["value"]) if cell.get("given") else "." for cell in cells.values())
    regions = tuple(tuple(c for c in cells if home[c] == k) for k in sorted({*home.values()} - {None}))
    solution = "".join(map(str, data.get("solution") or ""))
    keys, rules = set(), str(data.get("ruleset") or "")
    json.loads(json.dumps(data), object_hook=keys.update)  # the keys at any depth
    unknown = keys - {*KNOWN, *COSMETIC, *FPUZZLES}
    p = Puzzle(f"{data.get('title')}", n, board, solution, tuple(clues), regions, rules, drawn)
    p = described(p)
    return replace(p, id=f"unknown keys: {', '.join(sorted(unknown))}", clues=None) if unknown else p


# --- puzzles from files ---


def printable(text: str) -> str:
    """Without control characters, escapes and lone surrogates: safe for a terminal and a page."""
    return re.sub(r"[^\n\t -~\u00a0-\ud7ff\ue000-\uffff]", "\ufffd", text)


KEYS = ("puzzle_id", "initial_board", "solution", "rules", "visual_elements", "author", "sudokupad_url")


def read_puzzle(row: dict) -> Puzzle:
    """A row of the official sets, whose rules may be JSON in the string; an f-puzzles link says it all."""
    name, board, solution, rules, elements, author, url = (str(row.get(key) or "") for key in KEYS)
    if "/fpuz" in url:
        return replace(import_link(url), id=name, solution=solution)
    if rules[:1] in ('"', "["):
        rules = "\n".join([json.loads(rules)] if rules[0] == '"' else json.loads(rules))
    elements = json.loads(elements) if elements[:1] == "[" else []
    plain, n = author.lower() == "nikoli", int(row["rows"])
    return Puzzle(
        name,
        n,
        board.replace("?", "."),
        solution,
        () if plain else None,
        boxes(n),
        rules,
        elements,
        plain,
        url,
    )


@functools.cache
def load_puzzles(data: str, limit: int) -> list[Puzzle]:
    """The puzzles to play; UserError where there are none. One without a stored solution needs a proof."""
    name, *subset = [data] if Path(data).exists() else data.split(":")
    place = (name, KEYS[:2], "test" if subset else "train", *subset)
    try:
        found = [import_link(data)] if "://" in data else [*map(read_puzzle, common.load_rows(*place))]
        for p in found:
            p.solution = proof(p) or p.solution
    except (UserError, ValueError, LookupError, TypeError) as e:
        hint = "the official sets were withdrawn in 2026, --data takes a local copy"
        raise UserError(printable(f"{data[:60]}: {str(e)[:200]} ({hint})")) from None
    playable = [p for p in found if p.solution]
    if not playable:
        raise UserError(printable(f"{data[:60]}: puzzle has no proof ({found[0].id})"))
    return playable[: limit or None]


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
STANDARD = """You are an expert solver of sudoku.

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
    "single_shot_standard": STANDARD + WHOLE,
    "multi_step_variant": VARIANT + SEVERAL,
    "multi_step_standard": STANDARD + SEVERAL,
    "single_step_variant": VARIANT + ONE_EACH,
    "single_step_standard": STANDARD + ONE_EACH,
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
        "".join(given.values())  # TypeError for what is no text
        assert {*given} <= {*PROMPTS}
    except (OSError, ValueError, TypeError, AttributeError, AssertionError) as e:
        raise UserError(f"--prompts {path}: not texts named {', '.join(PROMPTS)} ({e})") from None
    return PROMPTS | given


def fill(template: str, p: Puzzle, board: str) -> str:
    """Put a puzzle into {{name}} and {{ rows * cols }}, once: what is put in is not looked at again."""
    drawn = "\n".join(f"- {text}" for text in map(element_text, p.elements) if text)
    rows = [" ".join(board[k : k + p.n]) for k in range(0, p.n**2, p.n)]
    values = {"rows": p.n, "cols": p.n, "rows * cols": p.n**2, "current_board": "\n".join(rows)}
    values |= {"rules": p.rules.strip(), "pretty_visual_elements": drawn or "none"}

    def value(m: re.Match) -> str:  # a puzzle from outside must not open a turn of the chat
        return re.sub(r"(<(?=[|/a-z])|\[(?=/?INST))", "\\1\u200b", str(values.get(m[1], m[0])))

    return re.sub(r"\{\{ ?([\w *]+?) ?\}\}", value, template).strip()


def window(messages: list[dict], turns: int) -> list[dict]:
    """What of a conversation is sent: its first two messages, the last 2N of those between, and the board.

    N = 0 sends none of the past (a slice [-0:] would send all of it, as the paper's code does).
    """
    first = max(2, len(messages) - 1 - 2 * turns) if turns >= 0 else 2
    return messages[:2] + messages[first:]


class Stop(Exception):
    """An episode's end: its reason, and for api_error the endpoint's words."""


PLACEMENT = re.compile(
    r"(?<![0-9A-Za-z])[rR] ?([0-9]{1,4}),?\s{0,8}[cC] ?([0-9]{1,4})"
    r"[\s*`]{0,8}[:=][\s*`]{0,8}([0-9]{1,4})(?![0-9])"
)
FULL_WIDTH = {c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}


def answer_blocks(reply: str, extract: str) -> list[str]:
    """ref: what re.findall("(?is)<answer>(.*?)</answer>") finds, in linear time.

    robust: thoughts are cut (Stop for one that does not end), full-width forms are folded, and a block begins
    at the last opening before its end.
    """
    if extract == "robust":
        reply = re.split("(?i)</think>", reply[-1_000_000:].translate(FULL_WIDTH))[-1]
        if re.search("(?i)<think>", reply):
            raise Stop("truncated")
    pieces, most = re.split("(?i)</answer>", reply)[:-1], int(extract == "ref")
    blocks = [re.split("(?i)<answer>", piece, maxsplit=most) for piece in pieces]
    return [block[-1] for block in blocks if len(block) > 1]


def read_grid(reply: str, p: Puzzle, board: str, extract: str) -> str:
    """The grid that a single-shot reply states; Stop where it states none.

    ref: last block, whatever str.isdigit accepts, the last n^2 of it. robust: n^2 digits in any layout, or
    placements that cover every empty cell.
    """
    blocks, placed = answer_blocks(reply, extract), {}
    if not blocks:
        raise Stop("no_answer_tag")
    if extract == "ref":
        return "".join(filter(str.isdigit, blocks[-1]))[-(p.n**2) :]
    for r, c, digit in PLACEMENT.findall(blocks[-1]):
        cell = int(r), int(c)
        if cell not in square(p.n) or len(digit) > 1:
            raise Stop("invalid_action_parsing")
        if placed.setdefault(cell, digit) != digit:
            raise Stop("contradictory_placement")
    grid = [placed.get(cell, c) for cell, c in zip(square(p.n), board, strict=True)]
    grid = grid if placed else re.findall("[0-9]", blocks[-1])
    if len(grid) != p.n**2 or "." in grid:
        raise Stop("bad_length")
    return "".join(grid)


def read_placements(reply: str, mode: str, extract: str) -> list[tuple[str, str, str]]:
    """(row, column, digit) texts of a stepwise reply; Stop where there is none.

    ref, multi-step: the first block; ref, single-step: the last block that is nothing but one placement.
    """
    blocks = answer_blocks(reply, extract)
    if extract == "robust":
        found = PLACEMENT.findall("".join(blocks[-1:]))
    elif mode == "single_step":
        found = re.findall(r"<ANSWER>\s*r(\d+)c(\d+):\s*(\d+)\s*</ANSWER>", reply)[-1:]
    else:
        found = re.findall(r"r(\d+)c(\d+):\s*(\d+)", "".join(blocks[:1]))
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
            if not reply:
                raise Stop("truncated")
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


# --- players: ask(messages, game, key) -> (text, tokens), or Stop; all answer in text, as models do ---


def say(game: Game, grid: str) -> tuple[str, int]:
    """The grid, or its digit in the first cell that is empty."""
    if game.mode != "single_shot":
        i, n = game.board.index("."), game.p.n
        grid = f"r{i // n + 1}c{i % n + 1}: {grid[i]}"
    return f"<ANSWER>\n{grid}\n</ANSWER>", 0


@functools.cache
def completions(p: Puzzle, seed: int) -> list[str]:
    """Grids that keep givens and plain rules: all of them, or the first twenty of a random search."""
    return solve(replace(p, clues=()), 20, seed + 1)[1]


def simple_player(kind: str, cfg: Config, run: Run) -> Callable:
    """solver: the proved solution. random: any digits. vanilla: ignores the rules, a pick of completions."""

    async def ask(messages, game, key):
        p, chance = game.p, random.Random(key)
        if kind == "solver":
            return say(game, proof(p))
        if kind == "vanilla":
            return say(game, chance.choice(completions(p, cfg.seed)))
        chance.seed(key + game.board)
        return say(game, "".join(str(chance.choice(p.digits)) if c == "." else c for c in game.board))

    return ask


ROLES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}assistant:"  # for base models


def hf_player(name: str, cfg: Config, run: Run) -> Callable:
    """A causal language model; what all episodes in flight ask is answered as one batch."""
    model, tokenizer = common.load_lm(name, torch.bfloat16 if run.amp else torch.float32)
    model.to(run.device)
    tokenizer.chat_template, waiting = tokenizer.chat_template or ROLES, []

    def answer():
        prompts, replies = zip(*waiting, strict=True)
        waiting.clear()
        room = model.config.max_position_embeddings - max(map(len, prompts))
        draws = torch.rand(len(prompts), max(1, min(cfg.max_tokens or room, room)))
        ends = common.end_ids(model, tokenizer)
        found = common.generate(model, prompts, draws, ends, cfg.temperature or 0.0)
        for tokens, reply in zip(found, replies, strict=True):
            reply.set_result((tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)))

    async def ask(messages, game, key):
        loop = asyncio.get_running_loop()
        if not waiting:
            loop.call_soon(answer)  # after all others that are ready to ask
        reply = loop.create_future()
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        waiting.append((ids, reply))
        return await reply

    return ask


def http_player(spec: str, cfg: Config, run: Run) -> Callable:
    """An OpenAI-compatible endpoint, URL#MODEL; its client retries 408, 409, 429, 5xx, lost connections."""
    openai, (url, _, model) = common.need("openai", "sudoku"), spec.partition("#")
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=5)
    asked = {"temperature": cfg.temperature, "max_completion_tokens": cfg.max_tokens or None}
    asked = {name: value for name, value in asked.items() if value is not None}

    async def ask(messages, game, key):
        try:
            found = await client.chat.completions.create(model=model, messages=messages, **asked)
            [choice] = found.choices
            text, why = choice.message.content or "", choice.finish_reason
            if not text and why != "length":
                raise ValueError(f"empty reply ({why})")
            return text, (found.usage and found.usage.completion_tokens) or 0
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as e:
            raise Stop("api_error", str(e)) from None

    return ask


# --- episodes and scores ---


async def play(p: Puzzle, mode: str, key: str, ask: Callable, cfg: Config) -> dict:
    """One episode as a line of episodes.jsonl; robust, ref: [solved, right placements], None where unknown.

    The other reading judges the same replies as long as it would have been shown the same boards.
    """
    prompts, kind = load_prompts(cfg.prompts), "standard" if p.plain else "variant"
    tokens, error = 0, []
    messages = [{"role": "user", "content": fill(prompts[f"{mode}_{kind}"], p, p.givens)}]
    if mode != "single_shot":
        messages.append({"role": "assistant", "content": prompts["acknowledgement"]})
    games = {extract: Game(p, mode, extract, p.givens) for extract in READINGS}
    game = games[cfg.extract]
    while not game.stop:
        board = game.board
        if mode != "single_shot":
            messages.append({"role": "user", "content": fill(prompts["board"], p, board)})
        try:
            text, used = await ask(window(messages, cfg.history), game, key)
        except Stop as e:
            games, (game.stop, *error) = {}, e.args
            break
        messages.append({"role": "assistant", "content": text})
        tokens += used
        for reading in games.values():
            if not reading.stop and reading.board == board:
                reading.take(text)
    row = dict(
        player=cfg.backend, puzzle=p.id, mode=mode, key=key, tokens=tokens, error=error, messages=messages
    )
    row |= {extract: [g.stop == "solved", g.correct] for extract, g in games.items() if g.stop}
    return row | {"stop": game.stop, "board": game.board}


def read_episodes(folder: Path) -> list[dict]:
    """All episodes below a folder; a torn line is left out, and of two of one episode the last holds."""
    found = {}
    for file in sorted(folder.rglob("episodes*.jsonl")):
        for line in file.read_text().split("\n"):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                found[row["player"], row["key"]] = row
    return [*found.values()]


def evaluate(cfg: Config, run: Run, ask: Callable, puzzles: list[Puzzle]) -> list[dict]:
    """Play every puzzle in every mode; an episode's line is on disk when it ends, and is not played again."""
    done = {row["key"] for row in read_episodes(run.folder) if row["stop"] != "api_error"}
    jobs = []
    for p, mode, trial in itertools.product(puzzles, cfg.modes, range(cfg.trials)):
        what = common.stable_seed(vars(p), cfg.history, cfg.extract, load_prompts(cfg.prompts))
        key = f"{p.id} {mode} {cfg.seed} {trial} {what}"
        if key not in done:
            jobs.append((p, mode, key))

    async def play_all(out):
        async def one(job):
            async with free:
                row = await play(*job, ask, cfg)
            print(json.dumps(row), file=out, flush=True)

        free = asyncio.Semaphore(cfg.concurrency)
        await asyncio.gather(*map(one, jobs[run.rank :: run.world_size]))

    with open(run.folder / f"episodes{run.rank}.jsonl", "a") as out:
        print(file=out)  # ends a torn line
        asyncio.run(play_all(out))
    run.gather("played")
    rows = read_episodes(run.folder)
    if failed := [row["error"] for row in rows if row["error"]]:
        run.print(tabulate(score_table(rows, puzzles, cfg), "keys"))
        sys.exit(f"{len(failed)} of {len(rows)} episodes failed: {failed[0]}; --resume plays them again")
    return rows


def score(rows: list[dict], puzzles: list[Puzzle], mode: str, reading: str) -> np.ndarray:
    """ASR and ACP, means over the puzzles of means over trials; NaN where a result is missing."""
    found, missing = defaultdict(list), [math.nan] * 2
    for row in rows:
        found[row["puzzle"], row["mode"]].append(row.get(reading, missing))
    return np.mean([np.mean(found[p.id, mode] or [missing], 0) for p in puzzles], 0)


def score_table(rows: list[dict], puzzles: list[Puzzle], cfg: Config) -> list[dict]:
    """A line a player, mode and reading: by size ASR in % with its Wilson interval over puzzles, and ACP."""
    sizes = {n: [p for p in puzzles if p.n == n] for n in sorted({p.n for p in puzzles})} | {"all": puzzles}
    table, players = [], dict.fromkeys(row["player"] for row in rows)
    for player, mode, reading in itertools.product(players, cfg.modes, READINGS):
        line = {"player": player, "mode": mode, "reading": reading}
        for size, some in sizes.items():
            asr, acp = score([row for row in rows if row["player"] == player], some, mode, reading)
            shown = "-"
            if math.isfinite(asr):
                ends = stats.binomtest(round(asr * len(some)), len(some)).proportion_ci(method="wilson")
                shown = f"{100 * asr:.1f} [{100 * ends.low:.0f}, {100 * ends.high:.0f}]"
            line |= {f"ASR {size}": shown, f"ACP {size}": f"{acp:.2f}" if mode != "single_shot" else ""}
        table.append(line)
    return table


PUBLISHED = """
by size 4 / 6 / 9 / all          ACP                    multi-step %                   single-shot %
o3-mini (high)                   9.7 / 0.7 / - / -      60.0 / 0.0 / - / -             73.3 / 6.7 / 2.9 / 14.0
Gemini 2.5 Pro (preview-03-25)   11.6 / 0.6 / 1.8 / 3.1 73.3 / 0.0 / 0.0 / 11.0        60.0 / 13.3 / 0 / 11.0
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


def report(table: list[dict], rows: list[dict], puzzles: list[Puzzle]) -> str:
    """One static page: the table, and episodes with what was said, escaped, and a link to the puzzle."""
    urls, parts = {p.id: p.url for p in puzzles}, [PAGE, tabulate(table, "keys", tablefmt="html")]
    for row in rows[:400]:
        said = ["{player} {mode} {puzzle} {stop} {error} {board}".format_map(row), urls[row["puzzle"]]]
        said += [m["content"][:20_000] for m in row["messages"][:1] + row["messages"][1:][-12:]]
        head, url, *said = (html.escape(printable(text)) for text in said)
        body = f'<a href="{url}">the puzzle</a><pre>{"</pre><pre>".join(said)}</pre>'
        parts.append(f"<details><summary>{head}</summary>{body}</details>")
    return "".join(parts)


# --- part B: 4x4 variants from the table of all grids, and a network that reads their rules ---

FOUR = range(1, 5)
A, B = np.meshgrid(FOUR, FOUR, indexing="ij")
# families of rules for two cells, as tables of the digit pairs that they allow (4, 4):
# difference 1, ratio 2, sum 5, less, equal, parity; difference > 1, sum > 5, 7, < 5, odd, product > 5
SEEN = [abs(A - B) == 1, (A == 2 * B) | (B == 2 * A), A + B == 5, A < B, A == B, (A - B) % 2 == 0]
NOVEL = [abs(A - B) > 1, A + B > 5, A + B == 7, A + B < 5, (A + B) % 2 == 1, A * B > 5]
PAIRS = [*itertools.combinations(SEEN, 2)]  # a puzzle has two families; a third of these not in training
SPLITS = {
    "seen": PAIRS[::3] + PAIRS[1::3],
    "recombined": PAIRS[2::3],
    "novel": [*itertools.combinations(NOVEL, 2)],
    "plain": [()],
}

PLACES = np.array([(4 * r + c, r, -c, (r + 1) // 2 * 4 + (c + 1) // 2) for r, c in square(4)])
SAME = PLACES[:, None] == PLACES  # (16, 16, 4): same cell, row, column, box
PLAIN = np.where(SAME.any(-1)[..., None, None], A != B, True)  # (16, 16, 4, 4): digit pairs of plain sudoku
PLAIN[SAME[..., 0]] = A == B


class Small(NamedTuple):
    """4x4 puzzles: given (N, 16), 0 for empty, table (N, 16, 16, 4, 4), solution (N, 16), and the number of
    solutions under plain rules (N,).
    """

    given: Tensor
    table: Tensor
    solution: Tensor
    plain: Tensor


@functools.cache
def grids() -> np.ndarray:
    """The 288 grids of 4x4, (288, 16)."""
    found = np.array([*itertools.product(itertools.permutations(FOUR), repeat=4)]).reshape(-1, 16)
    for _, group, _ in groups_of(Puzzle("", 4, "." * 16, regions=boxes(4))):
        line = [square(4).index(cell) for cell in group]
        found = found[(np.sort(found[:, line]) == FOUR).all(1)]
    return found


def draw_puzzles(mixes: list, count: int, chance: random.Random, rows: list[int]) -> Small:
    """`count` puzzles with one solution each, one of these rows of the table of grids."""
    made, g = [], grids()
    while len(made) < count:
        kinds, s, table = chance.choice(mixes), chance.choice(rows), PLAIN.copy()
        alive, agree, kept = np.ones(288, bool), g == g[s], np.ones(16, bool)
        for pairs in kinds:
            fits = pairs[np.ix_(g[s] - 1, g[s] - 1)] & ~SAME[..., 0]
            for i, j in chance.sample(np.argwhere(fits).tolist(), chance.randint(2, 5)):
                table[i, j] &= pairs
                table[j, i] &= pairs.T
                alive &= pairs[g[:, i] - 1, g[:, j] - 1]
        for i in chance.sample(range(16), 16):  # strip givens while one grid is left
            kept[i] = False
            kept[i] = (alive & agree[:, kept].all(1)).sum() > 1
        plain = agree[:, kept].all(1).sum()
        if plain > 1 or not kinds:
            made.append((g[s] * kept, table, g[s], plain))
    return Small(*(torch.from_numpy(np.stack(column)) for column in zip(*made, strict=True)))


def draw_splits(cfg: Config) -> tuple[Small, dict[str, Small]]:
    """Puzzles to train on and test splits; no test has a training puzzle's grid, up to names of digits."""
    chance = random.Random(cfg.seed)
    forms = [tuple([*dict.fromkeys(grid)].index(d) for d in grid) for grid in grids().tolist()]
    held = chance.sample(sorted({*forms}), 3)  # of 12
    test, train = ([k for k in range(288) if (forms[k] in held) == which] for which in (True, False))
    tests = {split: draw_puzzles(mixes, cfg.tests, chance, test) for split, mixes in SPLITS.items()}
    return draw_puzzles(SPLITS["seen"], cfg.puzzles, chance, train), tests


class RuleNet(nn.Module):
    """Eqs. (2), (3): cells exchange what their rules make of what each of them believes."""

    def __init__(self, width: int):
        super().__init__()
        self.support, self.place = nn.Linear(4, width, bias=False), nn.Linear(4, width)  # W of eq. (3)
        self.update, self.head = nn.GRUCell(width + 4, width), nn.Linear(width, 4)
        self.register_buffer("same", torch.tensor(SAME, dtype=torch.float32))

    def forward(self, given: Tensor, table: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """given (B, 16), table (B, 16, 16, 4, 4) -> logits of iterations (T, B, 16, 4), last p (B, 16, 4)."""
        known, fixed, logits = F.one_hot(given, 5)[..., 1:].float(), given[..., None] > 0, []
        p, h = known.where(fixed, 0.25), known.new_zeros(given.numel(), self.head.in_features)
        table, place = table.float(), self.place(self.same)  # the latter (16, 16, width)
        for _ in range(iterations):
            support = torch.einsum("nijab,njb->nija", table, p)  # eq. (2)
            message = (self.support(support) + place).relu().sum(2)
            h = self.update(torch.cat([message, known], -1).flatten(0, 1), h)  # eq. (3)
            logits.append(self.head(h).view_as(p))
            p = known.where(fixed, logits[-1].softmax(-1))
        return torch.stack(logits), p


def network_loss(logits: Tensor, given: Tensor, solution: Tensor) -> Tensor:
    """Eq. (4): logits (T, B, 16, 4); a mean over all cells, so that ranks with unequal givens agree."""
    target = (solution - 1).masked_fill(given > 0, -100).expand(len(logits), -1, -1)
    return F.cross_entropy(logits.flatten(0, 2).float(), target.flatten(), reduction="none").mean()


def train_network(cfg: Config, run: Run, data: Small) -> RuleNet:
    """One net; the same batches on any number of ranks, each takes its part."""
    net = RuleNet(cfg.width).to(run.device)
    wrapped = run.wrap(torch.compile(net) if cfg.compile else net)
    optimizer = torch.optim.AdamW(net.parameters(), cfg.lr)
    data = Small(*(x.to(run.device) for x in data))
    for step in run.steps(cfg.steps, net=net, optimizer=optimizer):
        rows = torch.randint(len(data.given), (cfg.batch,))[run.rank :: run.world_size].to(run.device)
        given, table, solution, _ = (x[rows] for x in data)
        with run.autocast():
            loss = network_loss(wrapped(given, table, cfg.iterations)[0], given, solution)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = cfg.lr * min((step + 1) / 100, 1.02 - step / cfg.steps)
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, loss=loss)
    return net.eval()


# --- the table, main ---


def expected_acp(digits: int, empty: int) -> float:
    """Eq. (1)."""
    return (1 - digits**-empty) / (digits - 1)


def train(cfg: Config, run: Run) -> dict[str, float]:
    """One cell of the table: what a player reaches in the protocols, and network and chance on the splits."""
    puzzles, (kind, _, name) = load_puzzles(cfg.data, cfg.limit), cfg.backend.partition(":")
    found = {}
    if kind == "expected":
        return {"ACP": np.mean([expected_acp(len(p.digits), p.givens.count(".")) for p in puzzles])}
    if kind == "neural":
        data, tests = draw_splits(cfg)
        net = train_network(cfg, run, data).cpu()
        for split, small in tests.items():
            digits = net(small.given, small.table, 2 * cfg.iterations)[1].argmax(-1) + 1
            found[split] = (digits == small.solution).all(-1).double().mean().item()
        return found
    if kind == "vanilla":
        tests = draw_splits(replace(cfg, puzzles=1))[1]
        found = {split: (1 / small.plain.double()).mean().item() for split, small in tests.items()}
    if kind == "solver" and not all(map(proof, puzzles)):
        run.print(printable(f"puzzle has no proof: {', '.join(p.id for p in puzzles if not proof(p))}"))
    ask = {"hf": hf_player, "http": http_player}.get(kind, simple_player)(name or kind, cfg, run)
    rows = evaluate(cfg, run, ask, [p for p in puzzles if kind != "solver" or proof(p)])
    for mode in cfg.modes:
        found[mode], acp = score(rows, puzzles, mode, cfg.extract)
        if mode != "single_shot":
            found["ACP"] = acp
    return found


def draw(figure, table: dict):
    """The splits of part B, a dot a seed."""
    axis = figure.subplots()
    axis.set_title(f"4x4 puzzles solved: {NET} (o), {BLIND} (x)")
    for row, dot in ((NET, "o"), (BLIND, "x")):
        for cell in table.get(row, []):
            axis.plot([*SPLITS], [cell[split] for split in SPLITS], dot)


def dry_run(cfg: Config, run: Run):
    """Print what this config plays and trains."""
    puzzles = load_puzzles(cfg.data, cfg.limit)
    calls, net = sum(p.givens.count(".") for p in puzzles), RuleNet(cfg.width)
    size = f"a network of {sum(x.numel() for x in net.parameters()):,} parameters, {cfg.steps} updates a seed"
    run.print(f"{len(puzzles)} puzzles, {len(puzzles)} to {calls} calls a trial and mode; {size}")


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
        run.print(f"\n{cfg.data}, {cfg.prompts or 'our prompts'}: ASR in % with Wilson's 95 % interval, ACP")
        run.print(tabulate(scores, "keys"))
        run.print(f"\nchallenge_100 with the official prompts, reading ref, as published{PUBLISHED}")
        run.check(CLAIMS, table)
        run.figure(draw, table)
        if run.rank == 0:
            common.write_atomic(run.root / "report.html", report(scores, episodes, puzzles))


if __name__ == "__main__":
    main()
