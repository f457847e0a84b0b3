"""Makes assets/mini_48.jsonl: python tests/mini_48.py

A puzzle is a list of parts, each of which adds to a key of f-puzzles' JSON or to a cell. Parts are drawn from
a seed, clues first, then a digit for every cell, and one is kept where a solution is left. Then they are
taken away while it is the only one, so that each that stays is needed. CP-SAT only says whether there is no
solution, one, or more, so that the file is the same on every machine.
"""

import itertools
import json
import random
from concurrent.futures import ProcessPoolExecutor
from urllib.parse import quote

import lzstring

import sudoku_bench as sb

MIXES = {  # the families of each puzzle, by their keys in f-puzzles; region: a jigsaw
    4: """//region/region difference/diagonal+/betweenline/killercage/difference ratio negative
    /thermometer littlekillersum/arrow antiknight/regionsumline less/renban quadruple/less quadruple even
    /thermometer palindrome xv/extraregion sandwichsum skyscraper/odd skyscraper givenPencilMarks""",
    6: """//region/region killercage/modularline/disjointgroups/diagonal-/xv negative
    /xsum antiking/slowthermometer minimum maximum/clone nonconsecutive/littlekillersum sandwichsum
    /betweenline xsum disjointgroups/regionsumline modularline ratio/thermometer palindrome minimum
    /slowthermometer renban extraregion""",
    9: """//region/region even/sandwichsum/windoku/difference ratio negative/xv negative
    /arrow antiking/odd diagonal+/diagonal- windoku/whispers clone/less sandwichsum xsum
    /thermometer slowthermometer diagonal+/whispers modularline antiknight
    /palindrome windoku disjointgroups""",
}
REGIONS = {
    4: "0223023302130111",
    6: "200111200111220333220533444535444555",
    9: "000122222000111122300111122330444555333345555334444455666678888667778888666777778",
}
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


def to_fpuzzles(n, parts, **more):
    """A part is a name and what is added there: to a cell, the regions of the cells, a clue, a rule."""
    cells = {cell: {} for cell in upper(sb.square(n))}
    data = {"size": n, **more}
    for name, item in parts:
        if name in cells:
            cells[name] |= item
        elif name == "region":
            for cell, region in zip(cells.values(), item, strict=True):
                cell["region"] = int(region)
        elif isinstance(item, dict):
            data[name] = [*data.get(name, []), item]
        else:
            data[name] = item
    grid = [*cells.values()]
    return data | {"grid": [grid[k : k + n] for k in range(0, n * n, n)]}


def solve(n, parts):
    """(none | unique | multiple, up to two solutions)."""
    status, found = sb.solve(sb.from_fpuzzles(to_fpuzzles(n, parts)))
    assert status != "undecided"  # else the file would depend on the solver
    return status, found


def grow(n, parts, candidates):
    """The parts with the first of each of these lists of options that leaves a solution."""
    for options in candidates:
        fits = (part for part in options if solve(n, [*parts, part])[0] != "none")
        parts = [*parts, *itertools.islice(fits, 1)]
    return parts


def options_on(walk, family, n, chance):
    """A clue on these cells, with each number that it may have."""
    (r, c), names, [_, *keys] = walk[0], upper(walk), SHAPES[family]
    around = [(r, c), (r, c + 1), (r + 1, c), (r + 1, c + 1)]
    pair = sorted(chance.sample(range(1, n + 1), 2))
    every = {
        "cell": names[0],
        "cells": upper(around) if family == "quadruple" else names,
        "cloneCells": upper((r + n // 2, c + n // 2) for r, c in walk),
        "lines": [names],
        "direction": "UD"[r <= n // 2] + "LR"[c <= n // 2],  # towards the middle
        "values": pair,
        "givenPencilMarks": pair,
    }
    if family == "arrow":  # its circle
        every["cells"] = names[:1]
    numbers = chance.sample(range(1, 46), 45) if "value" in keys else [0]
    if family == "xv":
        numbers = "VX"
    name = names[0] if family == "givenPencilMarks" else family
    return [(name, {key: (every | {"value": number})[key] for key in keys}) for number in numbers]


def draw_clues(family, n, count, chance):
    """Up to `count` lists of options, each on a walk of its own."""
    sizes, *keys = SHAPES[family]
    free, found = [*sb.square({"clone": n // 2, "quadruple": n - 1}.get(family, n))], []
    if keys[:2] == ["cell", "value"]:  # around the grid
        free = [(r, c) for k in range(1, n + 1) for r, c in ((0, k), (n + 1, k), (k, 0), (k, n + 1))]
    for _ in range(count):
        walk, near, size = [], free, min(n, int(chance.choice(sizes)))
        while near and len(walk) < size:
            walk.append(chance.choice(near))
            free.remove(walk[-1])
            near = [cell for cell in free if sb.distance(cell, walk[-1]) <= 1 + ("lines" in keys)]
        if len(walk) == size:
            found.append(options_on(walk, family, n, chance))
    return found


def draw(n, families, chance):
    """A puzzle's parts and solution; a family whose clues are not needed is not in it."""
    drawn = [family for family in families if family in SHAPES]
    special = {"region": REGIONS[n], "negative": drawn}
    rules = [(family, special.get(family, True)) for family in families if family not in SHAPES]
    digits = [
        [(cell, {"value": digit, "given": True}) for digit in chance.sample(range(1, n + 1), n)]
        for cell in upper(chance.sample(sb.square(n), n * n))
    ]
    if "negative" in families:  # all edges of the solution that can have a mark have it
        marks = [options_on(pair, family, n, chance) for family in drawn for pair in sb.pairs_of(n, 1)]
        parts = grow(n, [], digits + marks) + rules
    else:
        clues = [clue for family in drawn for clue in draw_clues(family, n, n, chance)]
        parts = grow(n, rules, clues + digits)[::-1]
    solved = solve(n, parts)
    for part in parts:  # digits first, rules last
        rest = [other for other in parts if other is not part]
        if solve(n, rest) == solved:
            parts = rest
    return parts, solved[1][0]


def make(n, k):
    """A line of the file: puzzle k of size n, drawn anew until each of its families is needed."""
    name, families = f"m{n}-{k + 1:02d}", MIXES[n].split("/")[k].split()
    for attempt in itertools.count():
        parts, solution = draw(n, families, random.Random(f"{name} {attempt}"))
        data = to_fpuzzles(n, parts, title=name, author="", solution=[*map(int, solution)])
        text = json.dumps(data)
        if all(f'"{family}"' in text for family in families):
            break
    p = sb.from_fpuzzles(data)
    row = {"puzzle_id": name, "title": name, "author": "", "rules": p.rules, "rows": n, "cols": n}
    row |= {"initial_board": p.givens, "solution": solution, "visual_elements": json.dumps(p.elements)}
    return json.dumps(row | {"encoded_puzzle": "", "sudokupad_url": link_of(text)})


if __name__ == "__main__":
    with ProcessPoolExecutor() as pool:
        lines = pool.map(make, *zip(*itertools.product(MIXES, range(16)), strict=True))
        sb.MINI_48.write_text("".join(f"{line}\n" for line in lines))
