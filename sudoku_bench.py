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
  python sudoku_bench.py --backend scripted:FOLDER              the episodes of a run once more, judged anew
  python sudoku_bench.py --backend solver --data LINK           prove an f-puzzles or SudokuPad (fpuz) link
  torchrun --nproc_per_node=8 sudoku_bench.py --config full --data challenge_100.jsonl   the paper's puzzles

Departures from the paper and its code
- The official sets were withdrawn. mini_48 is ours: generated (tests/mini_48.py), proved unique, every family
  needed; it tests rule reading and deduction, not break-ins. --data plays official files where you have them.
- Prompts are in our words (--prompts FILE: the originals). --history 0 sends nothing of the past; the code's
  slice sends all. Descriptions of drawings lack the code's lone dash and "None", and keep unstyled cages.
- Both readings are in the table: `ref` reads as the code does, `robust` cuts thoughts, reads the last answer
  block, accepts r1c1 = 5 and grids in lines, and refuses two digits for a cell. The game goes by --extract;
  the other reading judges the same replies, as long as it would have been shown the same boards.
- Intervals, the random and the rule-ignoring player, proofs and the network are ours. Grids go up to 9x9.
- Eq. (2) hands the network what a rule's table means, so that new rules are no harder. An attention with a
  bias and a value gate from the table, which must learn to read it, solved .82 of seen, .77 of recombined and
  .11 of novel puzzles after as many updates, each twice as long (seed 100).
- Of SudokuPad's own links (scl) come the drawings, in the words of the official sets; an inequality sign or a
  small arrow that is drawn as lines is told as such. Not here: hints (the code's num_empty_cells), human
  traces, pictures of boards.

Reading order: Puzzle, Rule and RULES, solve, the protocols (Game, play), players, RuleNet, train.
"""

from __future__ import annotations

import asyncio
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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jinja2.sandbox import SandboxedEnvironment
from matplotlib import colors
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
    data: str = str(MINI_48)  # .jsonl, .parquet, folder, hub id[:subset]; a link of f-puzzles or SudokuPad
    limit: int = 0  # puzzles, at most; 0: all
    backend: str = ""  # solver, random, vanilla, neural, hf:NAME, http:URL#MODEL, scripted:FOLDER; empty: all
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
    lr: float = 3e-3  # AdamW, warm-up of 100 steps, then down to 2 %

    def check(self):
        super().check()
        if not re.fullmatch(
            "(solver|random|expected|vanilla|neural|hf:.+|http:https?://.+|scripted:.+|)", self.backend
        ):
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
DEMO = Config(seed=10, seeds=5, ranks=2)
CONFIGS = {
    "smoke": replace(DEMO, seed=0, ranks=1, seeds=1, limit=3, puzzles=64, tests=8, steps=4, width=16),
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


class Clue(NamedTuple):
    """A constraint: a family of RULES, cells in the order that matters for it, and its numbers.

    A cell is (row, column) from 1; 0 and n + 1 are outside the grid.
    """

    kind: str
    cells: tuple = ()
    numbers: tuple = ()


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
    clues: tuple | None = None
    regions: tuple = ()
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
def square(n):
    """All cells, row by row."""
    return list(itertools.product(range(1, n + 1), repeat=2))


def boxes(n):
    """The standard boxes; their height is the largest divisor of n up to its root (6: 2 x 3)."""
    h = {4: 2, 6: 2, 8: 2, 9: 3}.get(n, 1)
    cells = sorted(square(n), key=lambda cell: ((cell[0] - 1) // h, (cell[1] - 1) * h // n))
    return tuple(tuple(cells[k : k + n]) for k in range(0, n * n, n))


def with_blanks(d):
    """What is missing or null reads as ""."""
    return defaultdict(str, {key: value for key, value in d.items() if value is not None})


def names(cells):
    return [f"r{r}c{c}" for r, c in cells]


def cells_of(names):
    """`r3c4` -> (3, 4) for each; an exception for anything else."""
    found = [re.fullmatch("[rR]([0-9]{1,2})[cC]([0-9]{1,2})", name).groups() for name in names]
    return tuple((int(r), int(c)) for r, c in found)


# --- rules: a family is a sentence, groups(puzzle, clue) of cells, and what digits there are allowed ---


def distance(a, b):
    """Squared: 1 for neighbours, 2 for cells that touch at a corner, 5 for a knight's move."""
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


def pairs_of(n, apart):
    """All pairs of cells at this squared distance."""
    return [pair for pair in itertools.combinations(square(n), 2) if distance(*pair) == apart]


def at_distance(apart):
    return lambda p, clue: pairs_of(p.n, apart)


def whole(p, clue):
    return [clue.cells]


def along(length):
    """All pieces of a line that are so long."""
    return lambda p, clue: [clue.cells[k : k + length] for k in range(len(clue.cells) - length + 1)]


def mirrored(p, clue):
    return zip(clue.cells, clue.cells[::-1], strict=True)


def within(p, clue):
    """Each cell of a line with the line's ends around it."""
    first, *inner, last = clue.cells
    return [(first, cell, last) for cell in inner]


def neighbours(p, clue):
    """The cell with each of its neighbours that is not marked in the same way."""
    marked, [cell] = [c.cells[0] for c in p.clues if c.kind == clue.kind], clue.cells
    return [(cell, near) for near in square(p.n) if distance(cell, near) == 1 and near not in marked]


def unmarked(*kinds):
    """Edges without a mark of these kinds."""

    def groups(p, clue):
        marked = [{*c.cells} for c in p.clues if c.kind in kinds]
        return [pair for pair in pairs_of(p.n, 1) if {*pair} not in marked]

    return groups


def ray(p, clue):
    """What a clue outside looks along: the line from there through the second cell."""
    (r, c), (r1, c1) = clue.cells
    line = [(r + k * (r1 - r), c + k * (c1 - c)) for k in range(1, p.n + 1)]
    return [[cell for cell in line if cell in square(p.n)]]


# small families: whether digits are allowed, v the clue's numbers; `allow` posts the table of those that are


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


def post_equal(m, x, v):  # as a table it ends some runs of OR-Tools 9.15
    m.add(x[0] == x[1])


def post_cage(m, x, v):
    post_distinct(m, x, v)
    if v:
        post_total(m, x, v)


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
    seen = []
    for k, cell in enumerate(x):
        top, visible = m.new_int_var(0, 9, ""), m.new_bool_var("")
        m.add_max_equality(top, x[: k + 1])
        m.add(cell == top).only_enforce_if(visible)
        m.add(cell < top).only_enforce_if(~visible)
        seen.append(visible)
    m.add(sum(seen) == v[0])


def post_xsum(m, x, v):
    sums = [m.new_constant(0)]
    for cell in x:
        sums.append(m.new_int_var(0, 99, ""))
        m.add(sums[-1] == sums[-2] + cell)
    m.add_element(x[0], sums, v[0])


class Rule(NamedTuple):
    """A family; {} in its sentence stands for the clue's numbers.

    post(model, digits, numbers) says what holds for each of groups(puzzle, clue).
    """

    text: str
    post: Callable
    groups: Callable = whole


RULES = {
    # marks on an edge, in a cell, at a corner
    "white dot": ("Cells joined by a white dot differ by {}.", allow(difference)),
    "black dot": ("Of cells joined by a black dot one is {} times the other.", allow(ratio)),
    "V or X": ("Cells joined by V sum to 5, cells joined by X to 10.", allow(total)),
    "smaller, larger": ("An inequality sign points at the smaller digit.", allow(less)),
    "gray square": ("Grey squares hold even digits.", allow(lambda v, a: a % 2 == 0)),
    "gray circle": ("Grey circles hold odd digits.", allow(lambda v, a: a % 2 == 1)),
    "min": ("A cell marked min is smaller than its neighbours without that mark.", allow(less), neighbours),
    "max": ("A cell marked max is larger than those.", allow(lambda v, a, b: a > b), neighbours),
    "pencil marks": ("A cell with pencil marks holds one of them.", allow(lambda v, a: a in v)),
    "quadruple": (
        "Digits in a circle are in the four cells around it, as often.",
        allow(lambda v, *x: all(x.count(d) >= v.count(d) for d in v)),
    ),
    "clones": ("Lists of clones read the same from both ends.", post_equal, mirrored),
    # lines
    "thermometer": ("Digits increase along a thermometer from its bulb.", allow(less), along(2)),
    "slow thermometer": (
        "Digits never decrease along a slow thermometer.",
        allow(lambda v, a, b: a <= b),
        along(2),
    ),
    "green line": (
        "Neighbouring digits on a green line differ by at least {}.",
        allow(lambda v, a, b: abs(a - b) >= v[0]),
        along(2),
    ),
    "gray line": ("Grey lines read the same from both ends.", post_equal, mirrored),
    "turquoise line": (
        "Three neighbours on a turquoise line leave three remainders when divided by 3.",
        allow(lambda v, *x: len({d % 3 for d in x}) == 3),
        along(3),
    ),
    "purple line": ("A purple line holds consecutive digits without repeats.", post_consecutive),
    "blue line": ("Box borders cut a blue line into parts of equal sums.", post_equal_parts),
    "line between circles": (
        "Digits on a line between circles lie between those in them.",
        allow(lambda v, a, b, c: a < b < c or a > b > c),
        within,
    ),
    "arrow": ("Digits along an arrow sum to the number in its circle or pill.", post_arrow),
    # groups
    "killer cage": ("Digits in a cage do not repeat, and sum to its number, if any.", post_cage),
    "extra region": ("No digit repeats in an extra region.", post_distinct),
    "rising diagonal": (
        "No digit repeats on a marked diagonal.",
        post_distinct,
        lambda p, clue: [[cell for cell in square(p.n) if sum(cell) == p.n + 1]],
    ),
    "falling diagonal": (
        "No digit repeats on a marked diagonal.",
        post_distinct,
        lambda p, clue: [[(r, c) for r, c in square(p.n) if r == c]],
    ),
    "windows": (
        "No digit repeats in a window: r2c2 to r4c4, and r2c6, r6c2, r6c6 likewise.",
        post_distinct,
        lambda p, c: [[(r + a, k + b) for a, b in square(3)] for r in (1, 5) for k in (1, 5)],
    ),
    "disjoint groups": (
        "Cells at the same place of boxes differ.",
        post_distinct,
        lambda p, c: zip(*boxes(p.n), strict=True),
    ),
    "anti-knight": ("Cells a knight's move apart differ.", post_distinct, at_distance(5)),
    "anti-king": ("Cells that touch at a corner differ.", post_distinct, at_distance(2)),
    "non-consecutive": (
        "Neighbours without a white dot are never consecutive.",
        allow(lambda v, a, b: abs(a - b) != 1),
        unmarked("white dot"),
    ),
    "no other white dot": (
        "Neighbours without a dot do not differ by {}.",
        forbid(difference),
        unmarked("white dot", "black dot"),
    ),
    "no other black dot": (
        "Neighbours without a dot have no ratio of {}.",
        forbid(ratio),
        unmarked("white dot", "black dot"),
    ),
    "no other V or X": ("Neighbours without V or X do not sum to {}.", forbid(total), unmarked("V or X")),
    # numbers outside the grid
    "little killer": ("A number with an arrow is the sum of its diagonal.", post_total, ray),
    "sandwich": (
        "A sandwich clue sums the digits between the smallest and the largest of its line.",
        post_sandwich,
        ray,
    ),
    "skyscraper": (
        "A skyscraper clue counts the digits seen from there; larger ones hide smaller ones.",
        post_skyscraper,
        ray,
    ),
    "X-sum": ("An X-sum clue sums the first X digits from there, X being the first.", post_xsum, ray),
}
RULES = {kind: Rule(*rule) for kind, rule in RULES.items()}


def described(p):
    """The puzzle with rules and drawings in words, those of its clues before its own."""
    rules = [f"Place the digits {p.digits}; none repeats in a row, a column or a region."]
    drawn = [f"region: {' '.join(names(cells))}" for cells in p.regions if p.regions != boxes(p.n)]
    for kind, cells, numbers in p.clues:
        numbers = [*map(str, numbers)]
        rules.append(RULES[kind].text.format(" or ".join(numbers)))
        drawn.append(" ".join([kind, *numbers, *names(cells)]))
    elements = [{"type": "manual", "text": text} for text in drawn]
    return replace(p, rules=p.rules or " ".join(dict.fromkeys(rules)), elements=elements + p.elements)


CAGES = {"killer": "killer cage", "box": "region"}


def element_text(e: dict) -> str:
    """A visual element of the official sets as a line of the prompt; empty for what has no description."""
    e = with_blanks(e)
    cells = [*map(str, e["cells"] or e["coords"])]
    kind, color, border, every = str(e["type"]), e["color_name"], e["border_color_name"], " ".join(cells)
    edge, value = f"between {' and '.join(cells[:2])}", f" (value {e['value']})"
    lines = {
        "lines": f"line, color: {color}, coords: {every}",
        "arrows": f"arrow, color: {color}, coords (base to tip): {every}",
        "inequality": f"inequality arrow: {e['direction']} {edge}",
        "cage": f"{CAGES.get(e['style'], 'cage')}{value if e['value'] != '' else ''}: {every}",
        "global": f"global: {e['text']}",
        "manual": e["text"],
    }
    if kind.endswith(" arrow"):
        return f"{kind}, color: {color}, in location: {every}, pointing {e['direction']}"
    if kind not in ("underlays", "overlays"):
        return lines.get(kind, "")
    place = {"cell": every, "corner": f"at the corner of {every}", "": ""}.get(e["loc"], edge)
    paint = f"{color} (stroke color: {border})" if border not in ("", color) else color
    words = {"text": e["text"], "shape": e["shape"], "color": color and paint}
    words |= {"stroke color": "" if color else border, "location": place}
    return ", ".join(f"{key}: {value}" for key, value in words.items() if value != "")


# --- solver ---


def groups_of(p):
    """(rule, cells, numbers) of all that must hold: rows, columns, regions, then clues."""
    columns = [square(p.n)[k :: p.n] for k in range(p.n)]
    for group in (*columns, *zip(*columns, strict=True), *p.regions):
        yield RULES["extra region"], group, ()
    for clue in p.clues or ():
        for group in RULES[clue.kind].groups(p, clue):
            yield RULES[clue.kind], group, clue.numbers


def solve(p: Puzzle, limit: int = 2, seed: int = 0) -> tuple:
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
    while len(found) < limit and (status := solver.solve(m)) == cp_model.OPTIMAL:
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


# --- links: f-puzzles and SudokuPad (fpuz), whose keys are clues ---

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
KNOWN = """size grid title author ruleset solution negative id value metadata highlightConflicts given region
givenPencilMarks centerPencilMarks cornerPencilMarks cells cell lines direction values cloneCells fontC
angle baseC outlineC width height highlight c isNewConstraint
fromConstraint disabledlogic truecandidatesoptions fromRangskSolver"""
USUAL = {"white dot": [1], "black dot": [2], "V or X": [5, 10], "green line": [5]}


def decode_link(link):
    """The JSON in a link or in bare data; an exception for what is no link."""
    data = urllib.parse.unquote(link.strip()).replace(" ", "+")
    body = re.search(r"(?:load=|fpuzzles|fpuz|scl|ctc|^)([A-Za-z0-9+/]{9,99999})[=\\]*(?:[?&#]|$)", data)[1]
    text = common.need("lzstring", "sudoku").LZString().decompressFromBase64(body)
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return json.loads(text) if '"' in text else unzip(text)


def import_link(link: str) -> Puzzle:
    """A puzzle from a link; UserError for what is none."""
    try:
        data = decode_link(link)
        return replace((from_scl if "cells" in data else from_fpuzzles)(data), url=link.strip())
    except Exception as e:  # data from outside raise a dozen kinds
        raise UserError(printable(f"{link[:60]}: no f-puzzles or SudokuPad link ({e!r:.80})")) from None


def clues_of(kind, item, home, n):
    """Clues of one item of f-puzzles; a total of nothing or 0 is none, but for a sandwich's 0."""
    item, found = with_blanks(item), []
    number = item["value"] or USUAL.get(kind, [0])[0]
    number = int({"V": 5, "X": 10}.get(number, number))
    numbers = (number,) if number or (kind == "sandwich" and item["value"] != "") else ()
    cells = [item["cell"]] if item["cell"] else item["cells"]
    for line in item["lines"] or [cells]:
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
            [(r, c)] = where
            way = item["direction"] or "D" * (r == 0) + "U" * (r > n) + "R" * (c == 0) + "L" * (c > n)
            where += ((r + ("D" in way) - ("U" in way), c + ("R" in way) - ("L" in way)),)
            if not numbers:
                continue
        found.append(Clue(kind, where, numbers))
    return found


def from_fpuzzles(data):
    """A puzzle from f-puzzles JSON. With unknown keys, named in its id, it has no clues to prove it by."""
    keys = set()
    json.loads(json.dumps(data), object_hook=keys.update)  # the keys at any depth
    unknown = ", ".join(sorted(keys - {*KNOWN.split(), *COSMETIC, *FPUZZLES}))
    data, n, clues = with_blanks(data), int(data["size"]), []
    cells = dict(zip(square(n), itertools.chain(*data["grid"]), strict=True))
    home = {c: cells[c].get("region", k) for k, box in enumerate(boxes(n)) for c in box}
    for key, kind in FPUZZLES.items():
        for item in [{}] if data[key] is True else data[key] or []:
            clues += clues_of(kind, item, home, n)
    for kind in map(FPUZZLES.get, data["negative"]):
        own = {c.numbers[0] for c in clues if c.kind == kind}  # what marks say, other edges must not be
        clues.append(Clue(f"no other {kind}", (), tuple(own or USUAL[kind])))
    clues += [Clue("pencil marks", (c,), tuple(x)) for c in cells if (x := cells[c].get("givenPencilMarks"))]
    drawn = [{"type": "manual", "text": f"{key} {item}"} for key in COSMETIC for item in data[key]]
    board = "".join(str(cell["value"]) if cell.get("given") else "." for cell in cells.values())
    regions = tuple(tuple(c for c in cells if home[c] == k) for k in sorted({*home.values()} - {None}))
    solution, rules = "".join(map(str, data["solution"])), str(data["ruleset"])
    p = described(Puzzle(str(data["title"]), n, board, solution, tuple(clues), regions, rules, drawn))
    return replace(p, id=f"unknown keys: {unknown}", clues=None) if unknown else p


# --- SudokuPad's own links (scl): drawings without a meaning, in the words of the official sets ---

SHORT = """c color, ca cages, ct center, c1 borderColor, c2 backgroundColor, ce cells, cs cellSize, a arrows,
o overlays, u underlays, w width, h height, v value, l lines, r rounded, re regions, fs fontSize,
th thickness, hl headLength, wp wayPoints, t title, te text, d duration, d2 d, vd videos"""
SHORT = dict(pair.split() for pair in SHORT.split(","))
SHORTENED = re.compile(  # strings in ', keys without quotes, {} left out of lists, words after a colon
    r"'(?P<text>(?:\\.|[^'\\])*)'|(?<=[{,])(?P<key>\w+)(?=:)|(?P<hole>(?<=[\[,])(?=[],]))"
    r"|(?<=:)(?:(?P<true>t)|(?P<false>f)|#(?P<short>[0F])|(?P<color>[0-9a-fA-F]{6}))(?=[,}])"
)
FULL = dict(true="true", false="false", short='"#{0}{0}{0}"', color='"#{}"', hole="{{}}")


def unzip(text):
    """SudokuPad's shortened JSON."""

    def full(m):
        return FULL.get(m.lastgroup, '"{}"').format(m[m.lastgroup].replace("\\'", "'"))

    return json.loads(SHORTENED.sub(full, text), object_hook=lambda d: {SHORT.get(k, k): d[k] for k in d})


@functools.cache
def color_name(code):
    """The nearest of CSS's names; what is no colour stays as it is."""
    if not colors.is_color_like(code):
        return code
    return min(colors.CSS4_COLORS, key=lambda name: math.dist(colors.to_rgb(code), colors.to_rgb(name)))


def drawing(kind, e):
    """A drawing in the official vocabulary; {} for one that follows the grid's lines."""
    points = np.array(e["wayPoints"] or [], float)
    path = [x for a, b in itertools.pairwise(points) for x in np.linspace(a, b, 100)]  # misses the corners
    coords = [name for name, _ in itertools.groupby(names(np.floor(path).astype(int) + 1))]
    if e["center"]:  # in a cell, on an edge, at a corner, which are where its numbers are whole
        coords = names(itertools.product(*(range(math.ceil(x), math.floor(x) + 2) for x in e["center"])))
    if not coords or (abs(points - points.round()) < 0.05).any():
        return {}
    shape = "circle" if e["rounded"] else "diamond" if e["angle"] == 45 else "square"
    loc = {1: "cell", 4: "corner"}.get(len(coords), "edge")
    color, border = map(color_name, (e["color"] or e["backgroundColor"], e["borderColor"]))
    e |= {"type": kind, "shape": shape, "loc": loc, "coords": coords, "color_name": color}
    return e | {"border_color_name": border}


def from_scl(data):
    """A puzzle from SudokuPad's own JSON. Its rules are prose, so that nothing proves it."""
    data = with_blanks(data)
    told, n = with_blanks(data["metadata"] or {}), len(data["cells"])
    groups = tuple(tuple((r + 1, c + 1) for r, c in group) for group in data["regions"])
    drawn = [{"type": "cage", "style": "box", "cells": names(x)} for x in groups if x not in boxes(n)]
    for cage in map(with_blanks, data["cages"]):
        name, _, text = str(cage["value"]).partition(": ")
        if cells := names((r + 1, c + 1) for r, c in cage["cells"]):
            drawn.append({"type": "cage", "style": "killer"} | cage | {"cells": cells})
        else:  # older puzzles tell title, rules and solution so
            told[name] = text
    for kind in ("lines", "arrows", "underlays", "overlays"):
        drawn += [drawing(kind, e) for e in map(with_blanks, data[kind])]
    drawn += [{"type": "global", "text": f"anti-{x}"} for x in ("king", "knight") if told[f"anti{x}"]]
    board = "".join(str(cell.get("value") or ".") for row in data["cells"] for cell in row)
    rules, solution = "\n".join(np.ravel(told["rules"])), "".join(map(str, told["solution"]))
    return Puzzle(str(told["title"]), n, board, solution, None, groups, rules, drawn)


# --- puzzles from files ---


def printable(text):
    """Without control characters, escapes and lone surrogates: safe for a terminal and a page."""
    return re.sub(r"[^\n\t -~\u00a0-\ud7ff\ue000-\uffff]", "\ufffd", text)


KEYS = ("puzzle_id", "initial_board", "solution", "rules", "visual_elements", "author", "sudokupad_url")


def read_puzzle(row: dict) -> Puzzle:
    """A row of the official sets, whose rules may be JSON in the string; an f-puzzles link says it all."""
    name, board, solution, rules, elements, author, url = (str(row.get(key) or "") for key in KEYS)
    if "/fpuz" in url:
        return replace(import_link(url), id=name, solution=solution)
    if rules[:1] in ('"', "["):
        rules = "\n".join(np.ravel(json.loads(rules)))
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
def load_puzzles(data: str, limit: int) -> list:
    """The puzzles to play; UserError where there are none. One without a stored solution needs a proof."""
    name, *subset = [data] if Path(data).exists() else data.split(":")
    place = (name, KEYS[:2], "test" if subset else "train", *subset)
    try:
        found = [import_link(data)] if "://" in data else [*map(read_puzzle, common.load_rows(*place))]
        assert len({p.id for p in found}) == len(found), "puzzles share an id"
        for p in found:
            p.solution = proof(p) or p.solution
        playable = [p for p in found if p.solution]
        assert playable, f"puzzle has no proof ({found[0].id})"
    except Exception as e:  # so may a set of puzzles
        raise UserError(
            printable(f"{data[:60]}: {e!s:.200} (--data takes files, folders, links; ")
            + "the official sets were withdrawn in 2026)"
        ) from None
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


compiled = functools.cache(SandboxedEnvironment().from_string)


@functools.cache
def load_prompts(path):
    """The templates: ours, with those of a JSON file in their place."""
    try:
        given = json.loads(Path(path).read_text()) if path else {}
        assert {*given} <= {*PROMPTS}
        for text in given.values():
            compiled(text)
    except Exception as e:  # a file may hold anything
        raise UserError(f"--prompts {path}: not texts named {', '.join(PROMPTS)} ({e})") from None
    return PROMPTS | given


def fill(template: str, p: Puzzle, board: str) -> str:
    """Put a puzzle into a jinja template, as the paper's code does; what is put in is not looked at again."""
    drawn = "\n".join(f"- {text}" for text in map(element_text, p.elements) if text)
    rows = [" ".join(board[k : k + p.n]) for k in range(0, p.n**2, p.n)]

    def defused(text):  # a puzzle from outside must not open a turn of the chat
        return re.sub(r"(<(?=[|/a-z])|\[(?=/?INST))", "\\1\u200b", text)

    values = dict(rows=p.n, cols=p.n, current_board="\n".join(rows), rules=defused(p.rules.strip()))
    return compiled(template).render(values, pretty_visual_elements=defused(drawn or "none")).strip()


def window(messages, turns):
    """What of a conversation is sent: its first two messages, the last 2N of those between, and the board.

    N = 0 sends none of the past (a slice [-0:] would send all of it, as the paper's code does).
    """
    if turns < 0:
        return messages
    return messages[:2] + messages[max(2, len(messages) - 1 - 2 * turns) :]


class Stop(Exception):
    """An episode's end: its reason, and for api_error the endpoint's words."""


PLACEMENT = re.compile(
    r"(?<![0-9A-Za-z])[rR] ?([0-9]{1,4}),?\s{0,8}[cC] ?([0-9]{1,4})"
    r"[\s*`]{0,8}[:=][\s*`]{0,8}([0-9]{1,4})(?![0-9])"
)
FULL_WIDTH = {c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}


def answer_blocks(reply, extract):
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
        """Judge a reply. The board changes only by what was read from an answer block."""
        try:
            if not reply:
                raise Stop("truncated")
            if self.mode == "single_shot":
                self.board = self.read_grid(answer_blocks(reply, self.extract))
                self.correct = int(self.board == self.p.solution)
                raise Stop("solved" if self.correct else "incorrect_solution")
            self.place(self.read_placements(reply, answer_blocks(reply, self.extract)))
        except Stop as e:
            self.stop = str(e)

    def read_grid(self, blocks):
        """The grid that a single-shot reply states; Stop where it states none.

        ref: last block, whatever str.isdigit accepts, the last n^2 of it. robust: n^2 digits in any layout,
        or placements that cover every empty cell.
        """
        size, text = self.p.n**2, "".join(blocks[-1:])
        if not blocks:
            raise Stop("no_answer_tag")
        if self.extract == "ref":
            return "".join(filter(str.isdigit, text))[-size:]
        found, grid = PLACEMENT.findall(text), re.findall("[0-9]", text)
        placed = {(int(r), int(c)): digit for r, c, digit in found}
        if len({*found}) > len(placed):
            raise Stop("contradictory_placement")
        if found:
            grid = [placed.get(cell, c) for cell, c in zip(square(self.p.n), self.board, strict=True)]
        if len("".join(grid)) != size or "." in grid:
            raise Stop("bad_length")
        return "".join(grid)

    def read_placements(self, reply, blocks):
        """(row, column, digit) texts of a stepwise reply; Stop where there is none.

        ref, multi-step: the first block; ref, single-step: the last block that is nothing but one placement.
        """
        if self.extract == "robust":
            found = PLACEMENT.findall("".join(blocks[-1:]))
        elif self.mode == "single_step":
            found = re.findall(r"<ANSWER>\s*r(\d+)c(\d+):\s*(\d+)\s*</ANSWER>", reply)[-1:]
        else:
            found = re.findall(r"r(\d+)c(\d+):\s*(\d+)", "".join(blocks[:1]))
        if not found or (self.mode == "single_step" and len({*found}) > 1):
            raise Stop("invalid_action")
        return found

    def place(self, placements):
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


# --- players: make(name, cfg, run) -> ask(messages, game, key) -> text, or Stop; all talk as models do ---


def say(game, grid):
    """The grid, or its digit in the first cell that is empty."""
    if game.mode != "single_shot":
        i, n = game.board.index("."), game.p.n
        grid = f"r{i // n + 1}c{i % n + 1}: {grid[i]}"
    return f"<ANSWER>\n{grid}\n</ANSWER>"


@functools.cache
def completions(p, seed):
    """Grids that keep givens and plain rules: all or twenty of a random search; if none, the givens alone."""
    return solve(replace(p, clues=()), 20, seed + 1)[1] or [p.givens]


def simple_player(kind, cfg, run):
    """solver: the proved solution. random: any digits. vanilla: ignores the rules, a pick of completions."""

    async def ask(messages, game, key):
        p, chance = game.p, random.Random(key)
        if kind == "solver":
            return say(game, proof(p))
        if kind == "vanilla":
            return say(game, chance.choice(completions(p, cfg.seed)))
        return say(game, "".join(str(chance.choice(p.digits)) if c == "." else c for c in p.givens))

    return ask


ROLES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}assistant:"  # for base models


def hf_player(name, cfg, run):
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
            reply.set_result(tokenizer.decode(tokens, skip_special_tokens=True))

    async def ask(messages, game, key):
        reply, sent = asyncio.get_running_loop().create_future(), window(messages, cfg.history)
        ids = tokenizer.apply_chat_template(sent, add_generation_prompt=True, return_dict=False)
        waiting.append((ids, reply))
        await asyncio.sleep(0)  # all others that are ready ask, too
        if waiting:
            answer()
        return await reply

    return ask


def http_player(spec, cfg, run):
    """An OpenAI-compatible endpoint, URL#MODEL; its client retries 408, 409, 429, 5xx, lost connections."""
    openai, (url, _, model) = common.need("openai", "sudoku"), spec.partition("#")
    os.environ.setdefault("OPENAI_API_KEY", "none")  # the client insists, local endpoints do not
    client = openai.AsyncOpenAI(base_url=url, max_retries=5)
    asked = {} if cfg.temperature is None else {"temperature": cfg.temperature}
    if cfg.max_tokens:
        asked["max_completion_tokens"] = cfg.max_tokens

    async def ask(messages, game, key):
        try:
            found = await client.chat.completions.create(
                model=model, messages=window(messages, cfg.history), **asked
            )
            [choice] = found.choices
            text, why = choice.message.content or "", choice.finish_reason
            if not text and why != "length":
                raise ValueError(f"empty reply ({why})")
            return text
        except Exception as e:  # an endpoint may answer with anything
            raise Stop("api_error", str(e)) from None

    return ask


def scripted_player(place, cfg, run):
    """Repeats one player's episodes in a folder: what was said in the same one after as many messages."""
    rows = read_episodes(Path(place))
    if len({row["player"] for row in rows}) != 1:
        raise UserError(f"{place}: not the episodes of one player")
    script = {row["key"]: row["messages"] for row in rows}

    async def ask(messages, game, key):
        try:
            return script[key][len(messages)]["content"]
        except LookupError:
            raise Stop("api_error", f"no reply to {key} in {place}") from None

    return ask


# --- episodes and scores ---


async def play(p, mode, key, ask, cfg) -> dict:
    """One episode as a line of episodes.jsonl; robust, ref: [solved, right placements], None where unknown.

    The other reading judges the same replies as long as it would have been shown the same boards.
    """
    prompts, kind = load_prompts(cfg.prompts), "standard" if p.plain else "variant"
    error, stepwise = "", mode != "single_shot"
    messages = [{"role": "user", "content": fill(prompts[f"{mode}_{kind}"], p, p.givens)}]
    if stepwise:
        messages.append({"role": "assistant", "content": prompts["acknowledgement"]})
    games = {extract: Game(p, mode, extract, p.givens) for extract in READINGS}
    game = games[cfg.extract]
    while not game.stop:
        board = game.board
        if stepwise:
            messages.append({"role": "user", "content": fill(prompts["board"], p, board)})
        try:
            text = await ask(messages, game, key)
        except Stop as e:
            games, (game.stop, error) = {}, e.args
            break
        messages.append({"role": "assistant", "content": text})
        for reading in games.values():
            if not reading.stop and reading.board == board:
                reading.take(text)
    row = {extract: [g.stop == "solved", g.correct] for extract, g in games.items() if g.stop}
    row |= dict(player=cfg.backend, puzzle=p.id, mode=mode, key=key, messages=messages)
    return row | dict(stop=game.stop, error=error, board=game.board)


def read_episodes(place):
    """All episodes below a folder, without torn lines.

    Of two of one episode the last holds, but a failed one never holds against one that ended.
    """
    found = {}
    for file in sorted(place.rglob("episodes*.jsonl")):
        for line in file.read_text().split("\n"):
            try:
                row = json.loads(line)
                episode = row["player"], row["key"]
                if row["stop"] != "api_error" or episode not in found:
                    found[episode] = row
            except Exception:  # a line that is torn or somebody else's
                continue
    return [*found.values()]


def evaluate(cfg: Config, run: Run, ask: Callable, puzzles: list) -> list:
    """Play every puzzle in every mode; an episode's line is on disk when it ends, and is not played again."""
    done = {(row["key"], row["settings"]) for row in read_episodes(run.folder) if row["stop"] != "api_error"}
    jobs = [*itertools.product(puzzles, cfg.modes, range(cfg.trials))][run.rank :: run.world_size]
    free = asyncio.Semaphore(cfg.concurrency)

    async def one(p, mode, trial):
        settings = common.stable_seed(vars(p), cfg.history, cfg.extract, load_prompts(cfg.prompts))
        key = f"{p.id} {mode} {cfg.seed} {trial}"
        if (key, settings) not in done:
            async with free:
                row = await play(p, mode, key, ask, cfg)
            print(json.dumps(row | {"settings": settings}), file=out, flush=True)

    async def play_all():
        await asyncio.gather(*itertools.starmap(one, jobs))

    with open(run.folder / f"episodes{run.rank}.jsonl", "a") as out:
        print(file=out)  # ends a torn line
        asyncio.run(play_all())
    run.gather("played")
    rows = read_episodes(run.folder)
    if failed := [row["error"] for row in rows if row["stop"] == "api_error"]:
        run.print(tabulate(score_table(rows, puzzles, cfg), "keys"))
        sys.exit(f"{len(failed)} of {len(rows)} episodes failed: {failed[0]}; --resume plays them again")
    return rows


def score(rows, puzzles, mode, reading):
    """ASR and ACP, means over the puzzles of means over trials; NaN where a result is missing."""
    found, missing = defaultdict(list), [math.nan] * 2
    for row in rows:
        found[row["puzzle"], row["mode"]].append(row.get(reading, missing))
    return np.mean([np.mean(found[p.id, mode] or [missing], 0) for p in puzzles], 0)


def score_table(rows, puzzles, cfg) -> list:
    """A line a player, mode and reading: by size ASR in % with its Wilson interval over puzzles, and ACP."""
    table, players = [], dict.fromkeys(row["player"] for row in rows)
    for player, mode, reading in itertools.product(players, cfg.modes, READINGS):
        line = {"player": Path(player).name, "mode": mode, "reading": reading}
        for size in [*sorted({p.n for p in puzzles}), "all"]:
            some = [p for p in puzzles if size in (p.n, "all")]
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
<style>body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin-bottom:1.5em}td{white-space:nowrap}
td,th{border:1px solid #ccc;padding:.2em .6em}summary{cursor:pointer;padding:.2em 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.5em;max-height:24em;overflow:auto}
pre::before{content:"user";display:block;font:bold 12px sans-serif;color:#777}
pre.assistant{background:#eaf2fc}pre.assistant::before{content:"model"}</style>
<h1>Sudoku-Bench</h1><p>ASR in % with Wilson's 95 % interval over the puzzles; ACP: right placements before
the first mistake; by robust reading, and by that of the paper's code (ref).</p>"""


def report(table, rows, puzzles) -> str:
    """One static page: the table, and episodes with what was said, escaped, and a link to the puzzle."""

    def clean(text):
        return html.escape(printable(text))

    urls, parts = {p.id: p.url for p in puzzles}, [PAGE, tabulate(table, "keys", tablefmt="html")]
    head = "{mode} {puzzle}: {stop} {error} {board} ({player})"
    for row in rows[:400]:
        said = [
            f'<pre class="{m["role"]}">{clean(m["content"][:20_000])}</pre>'
            for m in window(row["messages"], 6)
        ]
        link = f'<a href="{clean(urls.get(row["puzzle"], ""))}">the puzzle</a>'
        parts.append(
            f"<details><summary>{clean(head.format_map(row))}</summary>{link}{''.join(said)}</details>"
        )
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
def grids():
    """The 288 grids of 4x4, (288, 16): 12 forms, each with its 24 names of the digits."""
    rows, (i, j) = [*itertools.permutations(FOUR)], np.indices((16, 16))
    found = np.array([*itertools.product(rows[:1], rows, rows, rows)]).reshape(-1, 16)
    found = found[PLAIN[i, j, found[:, i] - 1, found[:, j] - 1].all((1, 2))]
    return np.concatenate([np.array(rows)[:, grid - 1] for grid in found])


def draw_puzzles(mixes, count, chance, rows) -> Small:
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


def draw_splits(cfg):
    """Puzzles to train on and test splits; no test has a training puzzle's grid, up to names of digits."""
    chance = random.Random(cfg.seed)
    held = chance.sample(range(12), 3)  # forms of grids
    test, train = ([k for k in range(288) if (k // 24 in held) == which] for which in (True, False))
    tests = {split: draw_puzzles(mixes, cfg.tests, chance, test) for split, mixes in SPLITS.items()}
    return draw_puzzles(SPLITS["seen"], cfg.puzzles, chance, train), tests


class RuleNet(nn.Module):
    """Eqs. (2), (3): cells exchange what their rules make of what each of them believes."""

    def __init__(self, width: int):
        super().__init__()
        self.support, self.place = nn.Linear(4, width, bias=False), nn.Linear(4, width)  # W of eq. (3)
        self.update, self.head = nn.GRUCell(width + 4, width), nn.Linear(width, 4)
        self.register_buffer("same", torch.tensor(SAME, dtype=torch.float32))

    def forward(self, given: Tensor, table: Tensor, iterations: int) -> tuple:
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
    if cfg.compile:
        net.compile()
    wrapped = run.wrap(net)
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


def expected_acp(digits, empty):
    """Eq. (1)."""
    return (1 - digits**-empty) / (digits - 1)


def train(cfg: Config, run: Run) -> dict:
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
            found[split] = (digits == small.solution).all(-1).double().mean()
        return found
    if kind == "vanilla":
        tests = draw_splits(replace(cfg, puzzles=1))[1]
        found = {split: (1 / small.plain.double()).mean() for split, small in tests.items()}
    if kind == "solver":
        run.print(printable(f"puzzle has no proof: {[p.id for p in puzzles if not proof(p)] or 'none'}"))
    players = {"hf": hf_player, "http": http_player, "scripted": scripted_player}
    ask = players.get(kind, simple_player)(name or kind, cfg, run)
    rows = evaluate(cfg, run, ask, [p for p in puzzles if kind != "solver" or proof(p)])
    for mode in cfg.modes:
        found[mode], acp = score(rows, puzzles, mode, cfg.extract)
        if mode != "single_shot":
            found["ACP"] = acp
    return found


def draw(figure, table):
    """The splits of part B, a dot a seed."""
    axis = figure.subplots()
    axis.set_title(f"4x4 puzzles solved: {NET} (o), {BLIND} (x)")
    for row, dot in ((NET, "o"), (BLIND, "x")):
        for cell in table.get(row, []):
            axis.plot([*SPLITS], [cell[split] for split in SPLITS], dot)


def main():
    cfg, rows = common.parse_config(CONFIGS), ROWS
    if cfg.backend:
        rows, cfg = {cfg.backend: {}}, replace(cfg, rows=(), seeds=1)
    with Run(cfg, cfg.backend) as run:
        puzzles = load_puzzles(cfg.data, cfg.limit)
        if cfg.dry_run:
            size = sum(x.numel() for x in RuleNet(cfg.width).parameters())
            run.print(f"{len(puzzles)} puzzles; a network of {size:,} parameters, {cfg.steps} updates a seed")
            return
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
