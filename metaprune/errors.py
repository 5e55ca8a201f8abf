"""Every error that metaprune raises on purpose.

::

    MetapruneError                 exit code 1 (never raised itself)
    ├── ConfigError                3  an option, a config key or a name that does not fit
    │   ├── BudgetError            3  a budget that is no budget, or that no allocation can reach
    │   └── RuleError              3  a rule of the user's that fails on the op that it is for
    ├── InputError                 3  data, weights or files that cannot be used
    ├── GateError                  4  the work ran, but a check of the result failed
    ├── UnsupportedModelError      5  a network that cannot be traced, cut or exported
    │   └── VerificationError      5  a cut network that is not the masked one: nothing is handed out
    ├── MissingExtraError          6  an optional library that is not installed
    └── ResourceError              7  out of memory or disk, or a machine too noisy for a verdict

A message gives the rule, the value seen and the way out.
"""

import difflib
from collections.abc import Iterable


class MetapruneError(Exception):
    """Root of every error raised on purpose."""

    exit_code = 1


class ConfigError(MetapruneError):
    """An option, a config key or a name does not fit."""

    exit_code = 3


class BudgetError(ConfigError):
    """A budget is no budget, or no allocation reaches it."""


class RuleError(ConfigError):
    """A rule of the user's fails on the op that it is for, or gives what does not fit its results."""


class InputError(MetapruneError):
    """Data, weights or files cannot be used."""

    exit_code = 3


class GateError(MetapruneError):
    """The work ran, but a check of its result failed."""

    exit_code = 4


class UnsupportedModelError(MetapruneError):
    """A network cannot be traced, cut or exported."""

    exit_code = 5


class VerificationError(UnsupportedModelError):
    """The cut network differs from the masked one; it is not handed out."""


class MissingExtraError(MetapruneError):
    """An optional library is not installed."""

    exit_code = 6


class ResourceError(MetapruneError):
    """Memory, disk or a quiet machine is missing."""

    exit_code = 7


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt or shortened name: the nearest known one, or nothing.

    >>> did_you_mean("tailor", ["l2", "taylor"])
    " Did you mean 'taylor'?"
    >>> did_you_mean("vit", ["l2", "vit_tiny"])
    " Did you mean 'vit_tiny'?"
    >>> did_you_mean("zzz", ["l2", "taylor"])
    ''
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1) or [one for one in known if len(name) > 2 and name in one]
    return f" Did you mean {near[0]!r}?" if near else ""
