"""Names for the methods of a room: one registry per family, filled where each method is written.

Third parties register through the entry-point group ``metaprune.<family>``; a plug-in that fails to load is kept in
:attr:`Registry.broken` (shown by ``metaprune doctor``) and never stops a command.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from metaprune.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A family of methods by name, e.g. ``CRITERIA["taylor"]``.

    Args:
        kind: What one member is called in messages, e.g. ``"criterion"``.
        group: Entry-point group that third parties use, e.g. ``"metaprune.criteria"``.
        home: Packages whose import registers the built-in members, loaded at the first look-up; one name, several, or
            None where the registry lives in that package itself.
    """

    def __init__(self, kind: str, group: str, home: str | Sequence[str] | None = None) -> None:
        self.kind = kind
        self.group = group
        self.homes = (home,) if isinstance(home, str) else tuple(home or ())
        self.broken: dict[str, str] = {}
        self._items: dict[str, T] = {}
        self._plugins_loaded = False

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator that files a class or function under `name`.

        Raises:
            ConfigError: `name` is taken.
        """

        def add(item: Any) -> Any:
            if name in self._items:
                raise ConfigError(f"{self.kind} {name!r} is registered already, by {self._items[name]!r}.")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        self._load_plugins()
        if name not in self._items:
            known = ", ".join(sorted(self._items))
            raise ConfigError(f"no {self.kind} is named {name!r}.{did_you_mean(name, self._items)} Known: {known}.")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        self._load_plugins()
        return name in self._items

    def name_of(self, item: Any) -> str | None:
        """The name under which a member is registered; None for what is no member."""
        return next((name for name in self if self[name] is item), None)

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(sorted(self._items))

    def __len__(self) -> int:
        self._load_plugins()
        return len(self._items)

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for home in self.homes:
            import_module(home)
        for point in entry_points(group=self.group):
            try:
                point.load()  # importing the module registers what it defines
            except Exception as error:
                self.broken[point.name] = f"{type(error).__name__}: {error}"
