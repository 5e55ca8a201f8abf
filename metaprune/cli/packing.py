"""From a saved result to a bundle: files in smaller numbers, the card, and everything else in one folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaprune.cli.saved import Saved, open_saved
from metaprune.cli.screen import Watch
from metaprune.cli.summary import REPORT
from metaprune.data import Dataset
from metaprune.errors import ConfigError, InputError, MetapruneError
from metaprune.export import Exported, open_session
from metaprune.export.bundle import SUMS, write_bundle
from metaprune.export.devices import load_device
from metaprune.export.example import as_example
from metaprune.export.quantise import METHODS, Calibration, Offer, calibration_of, offers
from metaprune.report import card, numbers

BESIDE = ("model.safetensors", "plan.json", REPORT)
MAX_DROP = 0.5


@dataclass(frozen=True)
class Packed:
    """What was put into a bundle.

    Args:
        files: Where each file is, by name.
        offers: What was found about files in smaller numbers.
        notes: What a user should know.
    """

    files: dict[str, str]
    offers: tuple[Offer, ...]
    notes: tuple[str, ...]


class Packing:
    """A bundle to be made; everything that can be wrong is looked at when this is.

    Args:
        run: A result folder.
        folder: The bundle.
        device: What it is for; None for what the run was for, else this machine.
        precision: Files in smaller numbers to try, separated by commas.
        max_drop: Points of accuracy that these may lose.
        force: A folder that is there may be replaced.

    Raises:
        MetapruneError: Something does not fit. Nothing was written.
    """

    def __init__(
        self, run: str, folder: str, *, device: str | None, precision: str | None, max_drop: float | None, force: bool
    ) -> None:
        self.folder, self.force = Path(folder), force
        self.methods: list[Any] = [name.strip() for name in precision.split(",")] if precision else []
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ConfigError(f"`--precision` must be among {', '.join(METHODS)}, but {unknown[0]!r} is not.")
        if max_drop is not None and max_drop < 0:
            raise ConfigError(f"`--max-drop` must be at least 0, but it is {max_drop:g}.")
        self.max_drop = MAX_DROP if max_drop is None else max_drop
        if self.folder.exists() and not force:
            raise ConfigError(f"{folder} is there already. Give --bundle another name, or --force to replace it.")
        self.notes: list[str] = []
        self.saved = self._open(run)
        self.device = load_device(device or self.saved.options.device or "host")
        missing = [name for name in BESIDE if not (self.saved.folder / name).is_file()]
        if missing:
            raise InputError(f"a bundle needs {missing[0]}, but {run} has none. Run `metaprune prune` again.")

    def _open(self, run: str) -> Saved:
        """With its data where they are still here; without them nothing is quantised, and the rest is packed."""
        try:
            return open_saved(run)
        except MetapruneError:
            if self.methods:
                raise
            self.notes.append("The data of the run are not here, so that the card does not say how inputs are scaled.")
            return open_saved(run, with_data=False)

    def pack(self, made: Exported, watch: Watch) -> Packed:
        """Make the bundle from the exported file."""
        data = self.saved.subject.dataset
        found: tuple[Offer, ...] = ()
        if self.methods:
            watch.step("Smaller numbers")
            found = self._offers(made, data, watch)
        sentences = [f"{offer.method} is {'in' if offer.offered else 'left out'}: {offer.reason}." for offer in found]
        slower = self._slower()
        self.notes += [*slower, *sentences]
        watch.step("Packing")
        session = open_session(made.path, threads=1)
        beside = {name: self.saved.folder / name for name in BESIDE}
        beside |= {Path(offer.path).name: Path(offer.path) for offer in found if offer.offered}
        bundle = write_bundle(
            self.folder,
            made.path,
            example=session.feeds(as_example(self.saved.example).cpu()),
            card=card(self.saved.outcome, data, [*slower, *sentences]),
            beside=beside,
            device=self.device,
            overwrite=self.force,
        )
        files = {name: str(self.folder / name) for name in (*bundle.files, SUMS)}
        return Packed(files, found, (*self.notes, *bundle.notes))

    def _offers(self, made: Exported, data: Dataset | None, watch: Watch) -> tuple[Offer, ...]:
        calibration: Calibration | None = None
        if data is not None and "int8" in self.methods:
            calibration = calibration_of(made.path, data.train, seed=self.saved.options.seed)
        return offers(
            made.path,
            Path(made.path).parent,
            device=self.device,
            methods=self.methods,
            calibration=calibration,
            judge=None if data is None else data.validation,
            max_drop=self.max_drop,
            seed=self.saved.options.seed,
            progress=watch.share("calls in random order"),
        )

    def _slower(self) -> list[str]:
        """A network that is slower than the dense one is not shipped without saying so."""
        latency = self.saved.outcome["latency"]
        if latency is None or latency["comparisons"][0]["verdict"] != "slower":
            return []
        ratio = latency["comparisons"][0]["ratio"]["value"]
        return [f"This network is slower than the dense one where it was measured: {numbers.ratio(ratio)} the time."]
