"""Every command is a run in MLflow, behind one small interface; nothing else in this package knows MLflow.

A tracker is there to remember, never to decide: once a run has started, a store that dies (server gone, disk full) is
noted in `problem` and the work goes on. A store that cannot be used at the start is an error,
because then nothing is lost yet. MLflow is imported when the first run starts (it takes a second or two), with its
telemetry off.
"""

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import unquote, urlsplit

from metaprune.errors import ConfigError

Status = Literal["FINISHED", "FAILED", "KILLED"]

DEFAULT_URI = "sqlite:///mlflow.db"
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
_BATCH = 100  # parameters and tags per call
_METRICS = 1000  # metrics per call
_KEY, _PARAM, _TAG = 250, 6000, 8000  # characters
_PATIENCE = 3  # failures in a row: a dead server may cost its timeout this often, and no more

# Without these MLflow reports usage to its makers, and a dead server is retried for minutes before anybody hears of it.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "GIT_PYTHON_REFRESH": "quiet",
}

_log = logging.getLogger("metaprune.tracking")
T = TypeVar("T")


class Tracker:
    """Where a command writes what it does; as a context manager it marks the run FAILED or KILLED when that happens.

    This one tracks nothing, for ``--no-track``; :class:`MlflowTracker` does.

    Attributes:
        problem: The first thing that could not be tracked and why, or None.
        run_id: The run, or None before `start` and where nothing is tracked.
        uri: The store, with an absolute path, or None where nothing is tracked.
    """

    problem: str | None = None
    run_id: str | None = None
    uri: str | None = None

    def start(
        self,
        command: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        experiment: str | None = None,
    ) -> Self:
        """Begin the run of one command.

        Args:
            command: The verb, e.g. ``"prune"``.
            params: What it was asked to do; nested mappings become dotted names.
            tags: Names to find the run by.
            experiment: The experiment it belongs to; None for the tracker's own.

        Raises:
            ConfigError: The store cannot be used.
        """
        return self

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Numbers by name, at one step."""

    def text(self, name: str, content: str) -> None:
        """A text file; `name` may hold folders."""

    def json(self, name: str, content: Any) -> None:
        """Plain data as a JSON file; `name` may hold folders."""

    def file(self, path: str | Path, folder: str | None = None) -> None:
        """A copy of a file, in a folder of the run."""

    def figure(self, name: str, figure: Any) -> None:
        """A Matplotlib or Plotly figure; `name` ends in the format, e.g. ``figures/pareto.png``."""

    def onnx_model(
        self,
        path: str | Path,
        name: str = "model",
        *,
        input_example: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Log an ONNX file as a model that MLflow can load and serve.

        Args:
            path: The file; its signature is read from it.
            name: What the model is called in the run.
            input_example: One small sample by input name, as arrays.
            metadata: Plain data kept with the model.

        Returns:
            The address of the model (``models:/m-…``), or None where nothing is tracked.
        """
        return None

    def take_up(self, tag: str, value: str) -> bool:
        """Go on with the latest run of the experiment that has this tag, in place of a new one; False without one.

        Raises:
            ConfigError: The store cannot be used.
        """
        return False

    def history(self, points: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Numbers of the past: step, time in ms since 1970, and values; what is there already changes nothing."""

    def child(
        self, key: str, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], tags: Mapping[str, str],
        at_ms: int,
    ) -> str | None:  # fmt: skip
        """A run below this one, made once for each key.

        Returns:
            Its id, or None where it could not be tracked.
        """
        return None

    def register(self, run_id: str, path: str | Path, model: str, aliases: Sequence[str]) -> str | None:
        """Log an ONNX file to a child and file it in the registry, both once, and give it aliases.

        Args:
            run_id: The child.
            path: The file.
            model: Name in the registry.
            aliases: That belong to this version alone, e.g. ``champion``.

        Returns:
            The version, or None where nothing is tracked.
        """
        return None

    def close(self, status: Status = "FINISHED") -> None:
        """End the run. Further calls do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(_status(error))


def tracker(uri: str | None = None, enabled: bool = True, experiment: str = "metaprune") -> Tracker:
    """The tracker for a command; nothing is opened before `start`.

    Args:
        uri: A tracking store of MLflow; None for ``sqlite:///mlflow.db`` in the current folder.
        enabled: False for one that does nothing.
        experiment: The experiment that runs belong to.

    Raises:
        ConfigError: `uri` names no kind of store that can be used.

    >>> tracker(enabled=False).start("prune").run_id is None
    True
    """
    return MlflowTracker(uri or DEFAULT_URI, experiment) if enabled else Tracker()


class MlflowTracker(Tracker):
    """One run in an MLflow store.

    Args:
        uri: The store, e.g. ``sqlite:///mlflow.db`` or ``http://127.0.0.1:5000``.
        experiment: The experiment that the run belongs to.

    Raises:
        ConfigError: `uri` names no kind of store that can be used.
    """

    def __init__(self, uri: str = DEFAULT_URI, experiment: str = "metaprune") -> None:
        self.uri = absolute_uri(uri)
        self.experiment = experiment
        self._client: Any = None
        self._open = False
        self._failures = 0

    def start(
        self,
        command: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        experiment: str | None = None,
    ) -> Self:
        """Open the store and begin the run of one command; see `Tracker.start`."""
        if self.run_id is not None:
            raise ConfigError(f"a tracker holds one run, but it was started for a second command, {command!r}.")
        labels = {"mlflow.runName": command, "metaprune.command": command, **(tags or {})}
        with self._opening(experiment) as experiment_id:
            self.run_id = self._client.create_run(experiment_id, tags=_cut(labels, _TAG)).info.run_id
        self._open = True
        flat = _cut(flatten(params or {}), _PARAM)
        entries = list(flat.items())
        for begin in range(0, len(entries), _BATCH):
            self._send(_log_params, entries[begin : begin + _BATCH])
        return self

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Numbers by name, at one step, in as few calls as MLflow allows."""
        entries = [(_key(name), float(value)) for name, value in values.items()]
        for begin in range(0, len(entries), _METRICS):
            self._send(_log_metrics, entries[begin : begin + _METRICS], step)

    def text(self, name: str, content: str) -> None:
        """A text file; `name` may hold folders."""
        self._send(lambda client, run_id: client.log_text(run_id, content, name))

    def json(self, name: str, content: Any) -> None:
        """Plain data as a JSON file; `name` may hold folders."""
        self.text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def file(self, path: str | Path, folder: str | None = None) -> None:
        """A copy of a file, in a folder of the run."""
        self._send(lambda client, run_id: client.log_artifact(run_id, str(path), folder))

    def figure(self, name: str, figure: Any) -> None:
        """A Matplotlib or Plotly figure; `name` ends in the format."""
        self._send(lambda client, run_id: client.log_figure(run_id, figure, name))

    def onnx_model(
        self,
        path: str | Path,
        name: str = "model",
        *,
        input_example: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Log an ONNX file as a model that MLflow can load and serve; see `Tracker.onnx_model`."""
        return self._send(_log_onnx, self.uri, Path(path), name, input_example, metadata)

    def close(self, status: Status = "FINISHED") -> None:
        """End the run. Further calls do nothing."""
        self._send(lambda client, run_id: client.set_terminated(run_id, status))
        self._open = False

    def take_up(self, tag: str, value: str) -> bool:
        """Go on with the latest run that has this tag; see `Tracker.take_up`."""
        with self._opening(None) as experiment_id:
            runs = self._client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", max_results=1)
        if not runs:
            return False
        self.run_id, self._open = runs[0].info.run_id, True
        self._send(lambda client, run_id: client.update_run(run_id, status="RUNNING"))
        return True

    def history(self, points: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Numbers of the past; see `Tracker.history`."""
        entries = [
            (_key(name), float(value), at, step) for step, at, values in points for name, value in values.items()
        ]
        for begin in range(0, len(entries), _METRICS):
            self._send(_log_history, entries[begin : begin + _METRICS])

    def child(
        self, key: str, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], tags: Mapping[str, str],
        at_ms: int,
    ) -> str | None:  # fmt: skip
        """A run below this one, made once for each key; see `Tracker.child`."""
        return self._send(
            _child, key, name, _cut(flatten(params), _PARAM), dict(metrics), _cut(dict(tags), _TAG), at_ms
        )

    def register(self, run_id: str, path: str | Path, model: str, aliases: Sequence[str]) -> str | None:
        """Log an ONNX file to a child and file it in the registry, both once; see `Tracker.register`."""
        return self._send(lambda client, parent: _register(client, run_id, self.uri, Path(path), model, aliases))

    @contextmanager
    def _opening(self, experiment: str | None) -> Iterator[str]:
        """A client, and the id of an experiment."""
        try:
            with _quietly(), _alone(sqlite_file(self.uri or "")):
                _check_answers(self.uri or "")
                self._client = _mlflow().MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
                yield self._experiment_id(experiment or self.experiment)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the tracking store must be usable, but {without_password(self.uri)!r} is not: {_reason(error)}. "
                "Give another `--tracking-uri`, or `--no-track`."
            ) from error

    def _experiment_id(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage != "active":
            raise ConfigError(f"experiment {name!r} was deleted in this store. Restore it there, or name another one.")
        if found is not None:
            return str(found.experiment_id)
        # The first tag makes the web page show runs and models; without it MLflow 3 shows the page of a chat app.
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.experiment.primaryMetric.name": "accuracy",
            "mlflow.experiment.primaryMetric.greaterIsBetter": "true",
        }
        return str(self._client.create_experiment(name, artifact_location=artifact_folder(self.uri), tags=tags))

    def _send(self, call: Callable[..., T], *arguments: Any) -> T | None:
        """Make one call to the store; what fails is noted, and three failures in a row end the tracking alone."""
        if not self._open:
            return None
        try:
            with _quietly():
                answer = call(self._client, self.run_id, *arguments)
        except Exception as error:
            self._failures += 1
            self._open = self._failures < _PATIENCE
            self.problem = self.problem or f"not everything was tracked: {_reason(error)}"
            _log.warning("not tracked: %s", _reason(error))
            return None
        self._failures = 0
        return answer


def absolute_uri(uri: str) -> str:
    """The store's address with the path of an SQLite file made absolute.

    Raises:
        ConfigError: It names no kind of store that can be used.

    >>> absolute_uri("http://127.0.0.1:5000")
    'http://127.0.0.1:5000'
    >>> absolute_uri("mlflow.db")
    Traceback (most recent call last):
    metaprune.errors.ConfigError: a tracking URI must start with one of sqlite, http, https, postgresql, mysql, mssql \
and '://', but it is 'mlflow.db'. For a file give sqlite:///mlflow.db.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in _SCHEMES or "://" not in uri:
        raise ConfigError(
            f"a tracking URI must start with one of {', '.join(_SCHEMES)} and '://', but it is {uri!r}. "
            f"For a file give sqlite:///{Path(uri).name or 'mlflow.db'}."
        )
    file = sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file}"


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store, absolute, or None for another kind of store.

    Raises:
        ConfigError: It names no file.
    """
    if not uri.startswith("sqlite://"):
        return None
    name = uri.removeprefix("sqlite://").removeprefix("/")
    if not name or name == ":memory:":
        raise ConfigError(f"an SQLite store needs a file, but the tracking URI is {uri!r}. Give sqlite:///mlflow.db.")
    return Path(name).absolute()


def artifact_folder(uri: str | None) -> str | None:
    """Where the files of an SQLite store's runs go: ``mlruns`` beside the database; None where the server decides."""
    file = sqlite_file(uri) if uri else None
    return None if file is None else (file.parent / "mlruns").as_uri()


def without_password(uri: str | None) -> str:
    """The address as it may be printed.

    >>> without_password("postgresql://me:secret@host/db")
    'postgresql://me@host/db'
    """
    return re.sub(r"(://[^:/@]+):[^@/]*@", r"\1@", unquote(uri or ""))


def ui_command(uri: str | None = None, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that shows a store in the browser; run it with `ui_environment`.

    Args:
        uri: The store; None for the default one. A server (``http://…``) has its own page and needs no command.
        host: Address to listen on; the default is reachable from this machine alone.
        port: Port to listen on.

    Raises:
        ConfigError: The store is a server, or its file does not exist.
    """
    store = absolute_uri(uri or DEFAULT_URI)
    if store.startswith("http"):
        raise ConfigError(f"{store!r} is a server with a page of its own. Open it in a browser.")
    file = sqlite_file(store)
    if file is not None and not file.is_file():
        raise ConfigError(f"a store must exist to be shown, but there is no {str(file)!r}. Run a command first.")
    options = ["--backend-store-uri", store, "--host", host, "--port", str(port), "--workers", "1"]
    folder = artifact_folder(store)
    return [sys.executable, "-m", "mlflow", "ui", *options, *(["--default-artifact-root", folder] if folder else [])]


def ui_environment() -> dict[str, str]:
    """The environment for `ui_command`: MLflow looks for its server in PATH, which may lack the virtual environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**_ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ, "PATH": path}


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters under dotted names, as text.

    >>> flatten({"budget": {"macs": 0.5}, "rungs": [1, 2], "seed": 0})
    {'budget.macs': '0.5', 'rungs': '[1, 2]', 'seed': '0'}
    """
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _cut(entries: Mapping[str, str], longest: int) -> dict[str, str]:
    """Names and values within MLflow's limits; what was cut ends in an ellipsis."""
    return {_key(name): text if len(text) <= longest else text[: longest - 1] + "…" for name, text in entries.items()}


def _key(name: str) -> str:
    return re.sub(r"[^\w.\-/ :]", "_", name, flags=re.ASCII)[:_KEY]


def _status(error: BaseException | None) -> Status:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def _reason(error: Exception) -> str:
    said = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    said = re.split(r" with exception | \(Caused by ", said)[0]  # what libraries below say of connections helps nobody
    return f"{type(error).__name__}: {said[:300].rstrip('.')}"


def _mlflow() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    return mlflow


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep MLflow's warnings and progress messages from the user's terminal; errors come as exceptions anyway."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _mlflow()  # sets its own levels when it is imported: they must be overruled afterwards
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def _check_answers(uri: str) -> None:
    """Connect to a database once: MLflow tries one that does not answer for minutes."""
    if uri.partition("://")[0].partition("+")[0] not in ("postgresql", "mysql", "mssql"):
        return
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


@contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """Let one process at a time open a database: MLflow builds a new one in many steps, and two at once break it."""
    if file is None or sys.platform == "win32":
        yield
        return
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)  # the folder itself is locked, so that no lock file is left behind
    try:
        with suppress(OSError):  # some network file systems know no locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _log_params(client: Any, run_id: str, entries: list[tuple[str, str]]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(name, value) for name, value in entries])


def _log_metrics(client: Any, run_id: str, entries: list[tuple[str, float]], step: int) -> None:
    import time

    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in entries])


def _log_history(client: Any, run_id: str, entries: list[tuple[str, float, int, int]]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(name, value, at, step) for name, value, at, step in entries])


_CHILD = "metaprune.key"
_MODEL = "metaprune.model"  # of a child: the address of its network
_VERSION = "metaprune.version"


def _child(
    client: Any, parent: str, key: str, name: str, params: dict[str, str], metrics: dict[str, float],
    tags: dict[str, str], at_ms: int,
) -> str:  # fmt: skip
    from mlflow.entities import Metric, Param, RunTag

    experiment_id = client.get_run(parent).info.experiment_id
    same = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`{_CHILD}` = '{key}'"
    found = client.search_runs([experiment_id], same, max_results=1)
    if found:
        run_id = str(found[0].info.run_id)
    else:
        labels = {"mlflow.parentRunId": parent, "mlflow.runName": name, _CHILD: key}
        run_id = str(client.create_run(experiment_id, start_time=at_ms, tags=labels).info.run_id)
    client.log_batch(
        run_id,
        metrics=[Metric(_key(name), float(value), at_ms, 0) for name, value in metrics.items()],
        params=[Param(name, value) for name, value in params.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )
    client.set_terminated(run_id, "FINISHED", at_ms)
    return run_id


def _register(client: Any, run_id: str, uri: str | None, path: Path, model: str, aliases: Sequence[str]) -> str:
    from mlflow.exceptions import MlflowException

    tags = client.get_run(run_id).data.tags
    address = tags.get(_MODEL)
    if address is None:
        address = _log_onnx(client, run_id, uri, path, "model", None, None)
        client.set_tag(run_id, _MODEL, address)
    with suppress(MlflowException):  # it is there already
        client.create_registered_model(model)
    version = tags.get(_VERSION)
    if version is None:
        with _everywhere(uri):
            version = str(client.create_model_version(model, address, run_id).version)
        client.set_tag(run_id, _VERSION, version)
    for alias in aliases:
        client.set_registered_model_alias(model, alias, version)
    return str(version)


def _log_onnx(
    client: Any,
    run_id: str,
    uri: str | None,
    path: Path,
    name: str,
    input_example: Mapping[str, Any] | None,
    metadata: Mapping[str, Any] | None,
) -> str:
    import mlflow
    import mlflow.onnx
    import numpy as np
    import onnx
    import onnxruntime
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    def spec(port: Any) -> Any:
        kind = port.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
        return TensorSpec(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), tuple(shape), port.name)

    outline = onnx.load(path, load_external_data=False)
    external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in outline.graph.initializer)
    signature = ModelSignature(
        inputs=Schema([spec(port) for port in outline.graph.input]),
        outputs=Schema([spec(port) for port in outline.graph.output]),
    )
    # Made by hand and passed on by its id: left to itself MLflow files it under the process's current experiment.
    experiment_id = client.get_run(run_id).info.experiment_id
    model = client.create_logged_model(experiment_id, name=name, source_run_id=run_id, model_type="onnx")
    with _everywhere(uri):
        info = mlflow.onnx.log_model(
            onnx.load(path) if external else outline,
            name=name,
            model_id=model.model_id,
            run_id=run_id,
            signature=signature,
            input_example=None if input_example is None else dict(input_example),
            # Explicit, or MLflow starts a process with the model to find out what it imports.
            pip_requirements=[f"{package.__name__}=={package.__version__}" for package in (onnx, onnxruntime, np)],
            onnx_execution_providers=["CPUExecutionProvider"],
            onnx_session_options={"intra_op_num_threads": 1, "graph_optimization_level": 99},
            save_as_external_data=external,
            metadata=None if metadata is None else {"metaprune": dict(metadata)},
        )
    return str(info.model_uri)


@contextmanager
def _everywhere(uri: str | None) -> Iterator[None]:
    """Let the parts of MLflow that no client is handed to find the store."""
    import mlflow

    previous = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(previous)
