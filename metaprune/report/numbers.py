"""Numbers as people read them, the same in the terminal and in the report."""

_COUNTS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def count(value: float) -> str:
    """A count with three or four digits.

    >>> count(673088), count(41_000_000), count(12)
    ('673.1 k', '41.0 M', '12')
    """
    for factor, unit in _COUNTS:
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:g}"


def size(value: float) -> str:
    """Bytes.

    >>> size(114840), size(90)
    ('114.8 kB', '90 B')
    """
    text = count(value)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def milliseconds(value: float) -> str:
    """A latency.

    >>> milliseconds(0.0471), milliseconds(12.3456)
    ('0.0471 ms', '12.35 ms')
    """
    return f"{value:.3g} ms" if value < 10 else f"{value:.2f} ms"


def percent(value: float) -> str:
    """An accuracy that is in percent already.

    >>> percent(93.4)
    '93.40 %'
    """
    return f"{value:.2f} %"


def points(value: float, low: float, high: float) -> str:
    """A difference of accuracies with its interval.

    >>> points(-0.56, -2.01, 0.86)
    '-0.56 points [-2.01, +0.86]'
    """
    return f"{value:+.2f} points [{low:+.2f}, {high:+.2f}]"


def gain(value: float, low: float, high: float) -> str:
    """A difference of accuracies in points with its interval, for a column.

    >>> gain(-0.56, -2.01, 0.86)
    '-0.6 [-2.0, +0.9]'
    """
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def ratio(value: float, low: float | None = None, high: float | None = None) -> str:
    """A share of the dense network, with its interval where there is one.

    >>> ratio(0.4984), ratio(0.79, 0.771, 0.812)
    ('x0.498', 'x0.790 [0.771, 0.812]')
    """
    return f"x{value:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def quantity(name: str, value: float | None) -> str:
    """A metric by its name.

    >>> quantity("accuracy", 96.5), quantity("macs", 40_000_000), quantity("loss", 0.12345), quantity("loss", None)
    ('96.50 %', '40.0 M', '0.1235', '-')
    """
    if value is None:
        return "-"
    words = {"accuracy": percent, "latency_ms": milliseconds, "bytes": size, "activations": size}
    return words[name](value) if name in words else count(value) if value > 99 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Time of work.

    >>> duration(4.25), duration(75), duration(7300)
    ('4.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def in_return(macs: float, latency: float, verdict: str) -> str:
    """What fewer MACs were worth in time, said plainly also where it is nothing.

    Args:
        macs: MACs of the smaller network as a share of the dense one.
        latency: Its latency as a share of the dense one's.
        verdict: What the measurement may claim.

    >>> in_return(0.5, 0.8, "faster")
    '2.00 times fewer MACs made it 1.25 times as fast here.'
    >>> in_return(0.5, 1.1, "slower")
    '2.00 times fewer MACs made it slower here: x1.100 the time of the dense network. Do not ship it for speed.'
    """
    fewer = f"{1 / macs:.2f} times fewer MACs"
    if verdict == "faster":
        return f"{fewer} made it {1 / latency:.2f} times as fast here."
    if verdict == "slower":
        return f"{fewer} made it slower here: {ratio(latency)} the time of the dense network. Do not ship it for speed."
    if verdict == "no difference":
        return f"{fewer} made no difference to its speed here."
    return f"{fewer}, but the machine is too noisy to say what that is worth in time; quieten it and measure again."
