"""A tree as nested areas that stay fat, however different they are.

Areas of layers differ by factors of a million, where rectangles degenerate into lines. Convex polygons need not: a set
of children is cut in two by one straight line at the exact share of the area, in the direction that leaves the worse of
both pieces the fattest, and so on.

Source: de Berg, Onak and Sidiropoulos, Fat Polygonal Partitions with Applications to Visualization and Embeddings,
arXiv:1009.1866.
Differs from it: the direction is the best of a fixed set; aspect ratios below 8 were measured, not proved.

Legend: P corners of a polygon.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Polygon = NDArray[np.float64]  # (P, 2), convex, corners in order
_DIRECTIONS = 12
_HEAVY = 1 / 3  # share from which a child stands alone

SQUARE: Polygon = np.array([[0.0, 0.0], [100.0, 0.0], [100.0, 100.0], [0.0, 100.0]])


def treemap(weights: Mapping[str, float], outline: Polygon = SQUARE) -> dict[str, Polygon]:
    """An area for every leaf of a tree, proportional to its weight.

    Args:
        weights: Weight of each leaf by its path, parts separated by dots; those of 0 get no area.
        outline: The area of all together.

    >>> areas = treemap({"a.b": 3, "a.c": 1, "d": 4})
    >>> {path: round(area(polygon)) for path, polygon in areas.items()}
    {'a.b': 3750, 'a.c': 1250, 'd': 5000}
    """
    found: dict[str, Polygon] = {}
    if not any(weight > 0 for weight in weights.values()):
        return found
    _lay_out(
        [(tuple(path.split(".")), path, float(weight)) for path, weight in weights.items() if weight > 0],
        0,
        outline,
        found,
    )
    return {path: found[path] for path in weights if path in found}


def area(polygon: Polygon) -> float:
    """Area of a convex polygon."""
    x, y = (polygon - polygon[0]).T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def aspect(polygon: Polygon) -> float:
    """Square of the diameter over the area: 2 for a square, more the thinner it is."""
    span = polygon[:, None] - polygon[None]
    return float((span**2).sum(-1).max()) / max(area(polygon), 1e-300)


def centre(polygon: Polygon) -> tuple[float, float]:
    """Centre of gravity."""
    origin = polygon[0]
    x, y = (polygon - origin).T
    cross = x * np.roll(y, -1) - y * np.roll(x, -1)
    total = float(cross.sum()) or 1.0
    moved = [float(((v + np.roll(v, -1)) * cross).sum()) / (3 * total) for v in (x, y)]
    return float(origin[0]) + moved[0], float(origin[1]) + moved[1]


def breadth(polygon: Polygon) -> float:
    """Length of the horizontal line through the centre.

    >>> breadth(SQUARE)
    100.0
    """
    y = centre(polygon)[1]
    ends = []
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0)):
        if (y1 <= y) != (y2 <= y):
            ends.append(x1 + (x2 - x1) * (y - y1) / (y2 - y1))
    return float(np.ptp(ends)) if ends else 0.0


Leaf = tuple[tuple[str, ...], str, float]


def _lay_out(leaves: Sequence[Leaf], depth: int, polygon: Polygon, found: dict[str, Polygon]) -> None:
    """Give the leaves of one node their areas: its children, in groups of nearly equal weight, again and again."""
    if len(leaves) == 1:
        found[leaves[0][1]] = polygon
        return
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf[0][depth] if len(leaf[0]) > depth else "", []).append(leaf)
    children = sorted(groups.values(), key=_weight, reverse=True)
    if len(children) == 1:
        _lay_out(leaves, depth + 1, polygon, found)
        return
    parts = [(children, polygon)]
    while parts:
        several, outline = parts.pop()
        if len(several) == 1:
            _lay_out(several[0], depth + 1, outline, found)
            continue
        first, total = 1, sum(map(_weight, several))
        while first < len(several) - 1 and sum(map(_weight, several[:first])) < _HEAVY * total:
            first += 1
        share = sum(map(_weight, several[:first])) / total
        one, two = _cut(outline, share)
        parts += [(several[:first], one), (several[first:], two)]


def _weight(leaves: Sequence[Leaf]) -> float:
    return sum(weight for _, _, weight in leaves)


def _cut(polygon: Polygon, share: float) -> tuple[Polygon, Polygon]:
    """Two pieces, the first with a share of the area, so that the thinner one is as fat as can be."""
    best, least = None, math.inf
    for k in range(_DIRECTIONS):
        angle = math.pi * k / _DIRECTIONS
        normal = np.array([math.cos(angle), math.sin(angle)])
        for side in (normal, -normal):
            offset = _offset(polygon, side, share)
            pieces = _clip(polygon, side, offset), _clip(polygon, -side, -offset)
            if min(map(len, pieces)) < 3:
                continue
            worst = max(map(aspect, pieces))
            if worst < least:
                best, least = pieces, worst
    return best if best is not None else (polygon, polygon)


def _offset(polygon: Polygon, normal: NDArray[np.float64], share: float) -> float:
    """Where a line with this normal cuts off a share of the area: the width is linear between corners."""
    along, across = polygon @ normal, polygon @ np.array([-normal[1], normal[0]])
    stops = np.unique(along)
    widths = _widths(along, across, stops)
    steps = np.diff(stops)
    areas = steps * (widths[:-1] + widths[1:]) / 2
    wanted = share * float(areas.sum())
    before = np.concatenate([[0.0], np.cumsum(areas)])
    k = int(np.clip(np.searchsorted(before, wanted, side="right") - 1, 0, len(areas) - 1))
    rest, width, slope = wanted - before[k], widths[k], (widths[k + 1] - widths[k]) / steps[k]
    root = math.sqrt(max(width * width + 2 * slope * rest, 0.0))
    # The root of width * t + slope * t^2 / 2 = rest, in the form that does not cancel.
    return float(stops[k] + (2 * rest / (width + root) if width + root > 0 else 0.0))


def _widths(along: NDArray[np.float64], across: NDArray[np.float64], stops: NDArray[np.float64]) -> NDArray[np.float64]:
    """Length of the chord at each stop."""
    first, last = int(np.argmin(along)), int(np.argmax(along))
    order = np.arange(len(along))
    chains = []
    for step in (1, -1):
        count = (last - first) * step % len(order)
        chain = (first + step * np.arange(count + 1)) % len(order)
        chains.append(np.interp(stops, along[chain], across[chain]))
    flat = np.abs(chains[0] - chains[1])
    for end in (0, -1):  # an edge may lie across the end
        there = across[np.isclose(along, stops[end], rtol=0, atol=1e-12 * max(1.0, abs(stops[end])))]
        flat[end] = float(np.ptp(there))
    return flat


def _clip(polygon: Polygon, normal: NDArray[np.float64], offset: float) -> Polygon:
    """The part where the projection on `normal` is at most `offset`."""
    beyond = polygon @ normal - offset
    corners = []
    for k in range(len(polygon)):
        here, there = beyond[k], beyond[(k + 1) % len(polygon)]
        if here <= 0:
            corners.append(polygon[k])
        if here * there < 0:
            corners.append(polygon[k] + (polygon[(k + 1) % len(polygon)] - polygon[k]) * (here / (here - there)))
    return np.array(corners).reshape(-1, 2)
