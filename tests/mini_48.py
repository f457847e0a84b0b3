"""Makes assets/mini_48.jsonl: python tests/mini_48.py

A puzzle is a list of parts, each a name and what it adds there to f-puzzles' JSON: to a cell, a clue, a rule
of the whole grid. Drawn parts are added where a solution is left, clues first, then a digit in every cell.
Then they are taken away, digits first, while it is the only one, so that each that stays is needed. CP-SAT
only says whether there is a solution, or another, so that the file is the same on every machine.
"""

import itertools
import json
import random
from urllib.parse import quote

import lzstring
import numpy as np

import sudoku_bench as sb

MIXES = """//region/region difference/diagonal+/betweenline/killercage/difference ratio negative
/thermometer littlekillersum/antiknight arrow/regionsumline less/renban quadruple/less quadruple even
/thermometer palindrome xv/extraregion sandwichsum skyscraper/odd skyscraper givenPencilMarks

///region/region killercage/modularline/disjointgroups/diagonal-/xv negative
/antiking xsum/slowthermometer minimum maximum/nonconsecutive clone/littlekillersum sandwichsum
/disjointgroups betweenline xsum/regionsumline modularline ratio/thermometer palindrome minimum
/slowthermometer renban extraregion

///region/region even/sandwichsum/windoku/difference ratio negative/xv negative
/antiking arrow/diagonal+ odd/diagonal- windoku/whispers clone/less sandwichsum xsum
/diagonal+ thermometer slowthermometer/antiknight whispers modularline/windoku disjointgroups palindrome"""
MIXES = [mix.split() for mix in MIXES.split("/")]  # 16 each of 4x4, 6x6, 9x9, by f-puzzles' names
REGIONS = """\
0223023302130111
200111200111220333220533444535444555
000122222000111122300111122330444555333345555334444455666678888667778888666777778"""
REGIONS = dict(zip((4, 6, 9), REGIONS.split(), strict=True))  # of a jigsaw
SHAPES = """\
1 cell: even odd minimum maximum
1 cell value: sandwichsum xsum skyscraper
1 cell value direction: littlekillersum
1 givenPencilMarks: givenPencilMarks
1 cells values: quadruple
2 cells: difference ratio less
2 cells value: xv
23 cells cloneCells: clone
234 cells value: killercage
9 cells: extraregion
345 lines: thermometer slowthermometer palindrome renban whispers regionsumline modularline betweenline
345 cells lines: arrow"""
SHAPES = dict(line.split(": ") for line in SHAPES.splitlines())
SHAPES = {family: shape.split() for shape in SHAPES for family in SHAPES[shape].split()}  # sizes, keys


def link_of(text, place="https://sudokupad.app/fpuz"):
    return place + quote(lzstring.LZString().compressToBase64(text), safe="")


def upper(cells):
    return [f"R{r}C{c}" for r, c in cells]


def to_fpuzzles(n, parts):
    """The puzzle as f-puzzles has it."""
    cells, data = {cell: {} for cell in upper(sb.square(n))}, {"size": n}
    for name, item in parts:
        if name in cells:
            cells[name] |= item
        else:
            data[name] = [*data.get(name, []), item] if name in SHAPES else item
    for cell, region in zip(cells.values(), data.pop("region", ""), strict=False):
        cell["region"] = int(region)
    return data | {"grid": np.reshape([*cells.values()], (n, n)).tolist()}


def solve(n, parts):
    """Up to two solutions."""
    status, found = sb.solve(sb.from_fpuzzles(to_fpuzzles(n, parts)))
    assert status != "undecided"  # else the file would depend on the solver
    return found


def grow(n, candidates):
    """Parts: of each list of options the first that leaves a solution."""
    parts = []
    for options in candidates:
        for part in options:
            if solve(n, [*parts, part]):
                parts.append(part)
                break
    return parts


def draw_walks(family, n):
    """Cells for up to n clues of a family, none twice."""
    sizes, *keys = SHAPES[family]
    free = [*sb.square({"clone": n // 2, "quadruple": n - 1}.get(family, n))]
    for _ in range(n):
        walk, near, size = [], free, min(n, int(random.choice(sizes)))
        while near and len(walk) < size:
            walk.append(random.choice(near))
            free.remove(walk[-1])
            near = [cell for cell in free if sb.distance(cell, walk[-1]) <= 1 + ("lines" in keys)]
        if len(walk) == size:
            yield walk


def options_on(walk, family, n):
    """A clue on these cells, the first alone, or a clue beside it; of V and X there is a choice."""
    (r, c), keys = walk[0], SHAPES[family][1:]
    if "cell" in keys and "value" in keys:  # outside the grid
        r, c = random.choice([(0, c), (n + 1, c), (r, 0), (r, n + 1)])
    around = itertools.product((r, r + 1), (c, c + 1))
    pair = random.sample(range(1, n + 1), 2)
    item = {
        "cell": f"R{r}C{c}",
        "cells": upper({"arrow": walk[:1], "quadruple": around}.get(family, walk)),
        "cloneCells": upper((r + n // 2, c + n // 2) for r, c in walk),
        "lines": [upper(walk)],
        "direction": "UD"[r <= n // 2] + "LR"[c <= n // 2],  # towards the middle
        "values": pair,
        "givenPencilMarks": pair,
    }
    name = item["cell"] if family == "givenPencilMarks" else family
    numbers = "VX" if family == "xv" else [random.randint(1, n * n // 2)]
    return [(name, {key: item.get(key, number) for key in keys}) for number in numbers]


def draw(n, families):
    """The parts of a puzzle that needs each of these families."""
    rules, clues = {"region": REGIONS[n], "negative": families[:-1]}, []
    for family in families:
        rule = [(family, rules.get(family, True))]
        walks = sb.pairs_of(n, 1) if "negative" in families else draw_walks(family, n)
        clues += [options_on(walk, family, n) for walk in walks] if family in SHAPES else [rule]
    values = [{"value": digit, "given": True} for digit in range(1, n + 1)]
    cells = upper(random.sample(sb.square(n), n * n))
    digits = [[(cell, value) for value in random.sample(values, n)] for cell in cells]
    # the digits come first where they must say which edges have a mark
    parts = grow(n, digits + clues) if "negative" in families else grow(n, clues + digits)[::-1]
    solution = solve(n, parts)
    for part in parts:
        rest = [other for other in parts if other is not part]
        if solve(n, rest) == solution:
            parts = rest
    needed = all(repr(family) in repr(parts) for family in families)
    return parts if needed else draw(n, families)


def make(k):
    """Line k of the file."""
    n = [*REGIONS][k // 16]
    name = f"m{n}-{k % 16 + 1:02d}"
    random.seed(name)
    parts = draw(n, MIXES[k])
    [solution] = solve(n, parts)
    data = to_fpuzzles(n, parts) | {"title": name, "solution": [*map(int, solution)]}
    p = sb.from_fpuzzles(data)
    row = {"puzzle_id": name, "rows": n, "initial_board": p.givens, "solution": solution, "rules": p.rules}
    row |= {"visual_elements": json.dumps(p.elements), "sudokupad_url": link_of(json.dumps(data))}
    return json.dumps(row)


if __name__ == "__main__":
    sb.MINI_48.write_text("\n".join(map(make, range(48))) + "\n")
