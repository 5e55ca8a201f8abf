"""The criterion, the allocator and the recoveries that a command was asked for, with their options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metaprune.allocate import ALLOCATORS, Allocator
from metaprune.config import PruneOptions
from metaprune.criteria import CRITERIA, Criterion
from metaprune.errors import ConfigError
from metaprune.methods import by_kind, deal
from metaprune.pipeline import default_criterion
from metaprune.recovery import RECOVERIES, Recovery, names_in
from metaprune.registry import Registry

REGISTRIES: dict[str, Registry[Any]] = {"criterion": CRITERIA, "allocator": ALLOCATORS, "recovery": RECOVERIES}


@dataclass(frozen=True, kw_only=True)
class Methods:
    """What was chosen.

    Args:
        criterion: The one that was asked for, or that is taken where none was.
        allocator: The one that was asked for.
        recoveries: In the order in which they run.
        options: The options that were given by ``--set``, as they were read.
    """

    criterion: Criterion
    allocator: Allocator
    recoveries: list[Recovery]
    options: Mapping[str, Any]

    def sets(self, kind: str) -> bool:
        """Whether an option of that kind was given by ``--set``."""
        return any(key.startswith(f"{kind}.") for key in self.options)


def read_methods(options: PruneOptions, where: Callable[[str], str]) -> Methods:
    """The methods with all their options.

    Args:
        options: What was asked for.
        where: The place of a key of the options, or of ``set.KIND.option``, for messages.

    Raises:
        ConfigError: An option goes to nothing that was chosen, was given twice, or does not fit.
    """
    criterion = options.criterion or default_criterion(
        options.metanet is not None, options.data is not None, options.allocator
    )
    recoveries = names_in(options.recovery or ("recalibrate_norm" if options.data is not None else None))
    names: dict[str, Sequence[str]] = {
        "criterion": [criterion], "allocator": [options.allocator], "recovery": recoveries
    }  # fmt: skip
    given = by_kind(options.set, lambda key: where(f"set.{key}"))
    for option in options.training:
        if option in given["recovery"]:
            raise ConfigError(
                f"an option may be given once, but {where(option)} and {where(f'set.recovery.{option}')} say the same. "
                "Leave out one of them."
            )

    def chosen(kind: str, more: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        def place(option: str) -> str:
            return where(option if option in more else f"set.{kind}.{option}")

        made, read = deal(REGISTRIES[kind], names[kind], {**given[kind], **more}, place)
        return list(made.values()), {f"{kind}.{option}": read[option] for option in given[kind]}

    (judge,), of_judge = chosen("criterion", {})
    (divide,), of_divide = chosen("allocator", {})
    ways, of_ways = chosen("recovery", options.training)
    return Methods(
        criterion=judge, allocator=divide, recoveries=ways, options={**of_judge, **of_divide, **of_ways}
    )  # fmt: skip
