"""Which tokens of the vision tower the features of the zoo's models are made of, written by hand.

For the inputs `family(name).inputs(images=(1, 2))`: three pictures, the third of another size where sizes
differ. A list for every feature, of tokens counted over all that the tower is given; separators are made of
none.
"""

from __future__ import annotations

from collections.abc import Callable

Made = list[list[int]]


def llava() -> Made:
    """Every patch is a feature; a class token stands before the 36 of each picture."""
    return [[37 * picture + 1 + patch] for picture in range(3) for patch in range(36)]


def llava_next() -> Made:
    """A base view and tiles of 4 x 4 patches behind a class token each. Two pictures are 60 x 40: 2 x 2
    tiles, of whose 8 rows the first and the last are padding. The third is 30 x 64: two tiles, one above
    the other."""
    made: Made = []
    first = 0  # tile of the picture
    for rows, columns, wide, tiles in ((range(1, 7), 8, 2, 5), (range(1, 7), 8, 2, 5), (range(8), 4, 1, 3)):
        made += [[17 * first + 1 + patch] for patch in range(16)]
        for row in rows:
            for column in range(columns):
                tile = first + 1 + (row // 4) * wide + column // 4
                made.append([17 * tile + 1 + (row % 4) * 4 + column % 4])
            made.append([])  # the newline
        first += tiles
    return made


def qwen2_5_vl() -> Made:
    """Four patches, neighbours in the input, are a feature. The tower has windows of 2 x 2 features, and its
    tokens stand window by window; two pictures are 4 x 4 features, the third 2 x 4."""
    made: Made = []
    for rows, columns in ((4, 4), (4, 4), (2, 4)):
        places = [(row, column) for row in range(rows) for column in range(columns)]
        by_window = sorted(places, key=lambda at: (at[0] // 2, at[1] // 2, at))
        start = 0 if not made else max(max(tokens) for tokens in made) + 1
        made += [[start + 4 * by_window.index(at) + part for part in range(4)] for at in places]
    return made


def squares(tiles: int, side: int, block: int, before: int) -> Made:
    """Features that are block x block patches of a square tile, behind `before` other tokens."""
    return [
        [
            tile * (side * side + before) + before + (row + r) * side + column + c
            for r in range(block)
            for c in range(block)
        ]
        for tile in range(tiles)
        for row in range(0, side, block)
        for column in range(0, side, block)
    ]


def internvl() -> Made:
    """Tiles of 8 x 8 patches behind a class token, four patches shuffled into one: 3, 3 and 1 tiles."""
    return squares(tiles=7, side=8, block=2, before=1)


def gemma3() -> Made:
    """8 x 8 patches, means of four."""
    return squares(tiles=3, side=8, block=2, before=0)


BY_HAND: dict[str, Callable[[], Made]] = {
    f.__name__: f for f in (llava, llava_next, qwen2_5_vl, internvl, gemma3)
}
