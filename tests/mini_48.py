"""Makes assets/mini_48.jsonl: python tests/mini_48.py

A puzzle is a list of parts: givens, clues, rules of the whole grid. A seeded generator draws more than are
needed, then parts are taken away while one solution is left, so that each that stays is needed. CP-SAT only
says whether there is no solution, one, or more, so that the file is the same on every machine.
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
SHAPES = {  # fewest and most cells, and the longest step between them, squared
    "even odd minimum maximum givenPencilMarks": (1, 1, 0),
    "sandwichsum xsum skyscraper littlekillersum": (1, 1, 0),
    "difference ratio xv less": (2, 2, 1),
    "clone": (2, 3, 1),
    "quadruple": (1, 1, 0),
    "killercage": (2, 4, 1),
    "extraregion": (9, 9, 1),
    "thermometer slowthermometer palindrome renban whispers": (3, 5, 2),
    "regionsumline modularline betweenline arrow": (3, 5, 2),
}
SHAPES = {family: shape for families, shape in SHAPES.items() for family in families.split()}
OUTSIDE = ("sandwichsum", "xsum", "skyscraper", "littlekillersum")


def link_of(text, place="https://sudokupad.app/fpuz"):
    return place + quote(lzstring.LZString().compressToBase64(text), safe="")


def upper(cells):
    return [f"R{r}C{c}" for r, c in cells]


def given(cell, digit):
    return {cell: {"value": int(digit), "given": True}}


def to_fpuzzles(n, parts, **more):
    """The puzzle as f-puzzles has it; a part is what it adds to a key of the puzzle, or to a cell."""
    cells = {cell: {} for cell in upper(sb.square(n))}
    grid = [*cells.values()]
    data = {"size": n, "grid": [grid[k : k + n] for k in range(0, n * n, n)], **more}
    for key, value in itertools.chain.from_iterable(map(dict.items, parts)):
        if key in cells:
            cells[key] |= value
        else:
            data[key] = value if value is True else data.get(key, []) + value
    return data


def solve(n, parts):
    """(none | unique | multiple, up to two solutions)."""
    status, found = sb.solve(sb.from_fpuzzles(to_fpuzzles(n, parts)))
    assert status != "undecided"  # else the file would depend on the solver
    return status, found


def draw_grid(n, rules, chance):
    """Random digits go to random cells where they leave a solution, until it is the only one."""
    kept = list(rules)
    for cell in upper(chance.sample(sb.square(n), n * n)):
        for digit in chance.sample(range(1, n + 1), n):
            status, found = solve(n, [*kept, given(cell, digit)])
            if status == "unique":
                return found[0]
            if status == "multiple":
                kept.append(given(cell, digit))
                break


def draw_cells(family, n, free, chance):
    """Free cells of a clue: a line goes on from its end, other shapes grow anywhere. None: no room here."""
    fewest, most, step = SHAPES[family]
    cells, size = [chance.choice(sorted(free))], min(n, chance.randint(fewest, most))
    while len(cells) < size:
        ends = cells[-1:] if step == 2 else cells
        near = {x for x in free for end in ends if sb.distance(x, end) <= step} - {*cells}
        if not near:
            return None
        cells.append(chance.choice(sorted(near)))
    moves = {"quadruple": [(0, 1), (1, 0), (1, 1)], "clone": [(chance.randint(-n, n), chance.randint(-n, n))]}
    for down, right in moves.get(family, []):  # to the other cells around a corner, to the clone
        cells += [(r + down, c + right) for r, c in cells[:size]]
    return cells if {*cells} <= free and len({*cells}) == len(cells) else None


def clues_on(cells, family, n, chance):
    """What a clue of this family on these cells can be: one part for each number that it may have."""
    [(r, c), *_], names = cells, upper(cells)
    pair = sorted(chance.sample(range(1, n + 1), 2))
    if family == "givenPencilMarks":
        return [{names[0]: {family: pair}}]
    item = {"cells": names} if len(names) > 1 else {"cell": names[0]}
    if SHAPES[family][2] == 2:
        item = {"lines": [names]}
    if family == "arrow":
        item["cells"] = names[:1]
    if family == "clone":
        half = len(names) // 2
        item = {"cells": names[:half], "cloneCells": names[half:]}
    if family == "quadruple":
        item["values"] = pair
    if family == "littlekillersum":  # towards the middle
        item["direction"] = "UD"[2 * r <= n] + "LR"[2 * c <= n]
    numbers = "VX" if family == "xv" else [""]
    if family in (*OUTSIDE, "killercage"):
        numbers = range(1, n * (n + 1) // 2 + 1)
    return [{family: [item | {"value": number}]} for number in numbers]


def draw_clues(family, n, count, holds, chance):
    """Up to `count` clues that hold, each on cells of its own."""
    found, free = [], {*sb.square(n)}
    if family in OUTSIDE:
        free = {(r, c) for k in range(1, n + 1) for r, c in ((0, k), (n + 1, k), (k, 0), (k, n + 1))}
    for _ in range(200):
        if not free or len(found) == count:
            break
        if cells := draw_cells(family, n, free, chance):
            fits = [*itertools.islice(filter(holds, clues_on(cells, family, n, chance)), 1)]
            found += fits
            free -= {*cells} if fits else set()
    return found


def draw(n, families, chance):
    """A puzzle's parts and solution; a family whose clues are not needed is not in it."""
    cells, layout = upper(sb.square(n)), []
    if "region" in families:
        layout = [{cell: {"region": int(k)} for cell, k in zip(cells, REGIONS[n], strict=True)}]
    drawn = [family for family in families if family in SHAPES]
    rules = [{family: True} for family in families if family not in (*SHAPES, "region", "negative")]
    solution = draw_grid(n, layout + rules, chance)
    full = [given(*pair) for pair in zip(cells, solution, strict=True)]

    def holds(clue):
        return solve(n, [*layout, *full, clue])[0] == "unique"

    if "negative" in families:  # its marks are all there are
        rules = [{"negative": drawn}]
        marks = [clues_on(pair, family, n, chance) for family in drawn for pair in sb.pairs_of(n, 1)]
        clues = [*filter(holds, itertools.chain(*marks))]
    else:
        count = 1 + n // max(1, len(families))
        clues = [clue for family in drawn for clue in draw_clues(family, n, count, holds, chance)]
    parts = layout + rules + full + clues
    for part in chance.sample(full, n * n) + chance.sample(clues + rules, len(clues + rules)):
        rest = [other for other in parts if other is not part]
        if solve(n, rest) == ("unique", [solution]):
            parts = rest
    return parts, solution


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
