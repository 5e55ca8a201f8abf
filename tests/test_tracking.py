"""A run is remembered whole; a store that dies never stops the work."""

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from metaprune.errors import ConfigError
from metaprune.tracking import (
    MlflowTracker,
    Tracker,
    absolute_uri,
    tracker,
    ui_command,
    ui_environment,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for the module: the first opening of a database takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def scale_file(tmp_path: Path) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "scale",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.array([2.0, 3.0, 4.0], np.float32), "factor")],
    )
    path = tmp_path / "scale.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def client(uri: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow

        return mlflow.MlflowClient(tracking_uri=uri)


def artifact(run: MlflowTracker, name: str) -> Path:
    root = client(str(run.uri)).get_run(run.run_id).info.artifact_uri
    return Path(root.removeprefix("file://")) / name


def test_a_run_is_read_back(store: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    params = {"budget": {"macs": 0.5}, "long": "x" * 9000, **{f"p{index}": index for index in range(250)}}
    with MlflowTracker(store) as run:
        assert run.start("prune", params, tags={"metaprune.device": "host"}) is run
        run.metrics({"val/top1": 91.5, "odd[name]": math.nan}, step=1)
        run.metrics({f"m{index}": index for index in range(1500)} | {"val/top1": 92.0}, step=2)
        run.json("report/report.json", {"ä": 1})
        run.text("report/notes.txt", "kept")
        run.file(tmp_path / "plan.json", "plan")
    assert run.problem is None
    kept = client(store).get_run(run.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params["budget.macs"] == "0.5"
    assert len(kept.data.params["long"]) == 6000
    assert len(kept.data.params) == 252
    assert kept.data.metrics["val/top1"] == 92.0
    assert kept.data.metrics["m1499"] == 1499
    assert math.isnan(kept.data.metrics["odd_name_"])
    assert [entry.value for entry in client(store).get_metric_history(run.run_id, "val/top1")] == [91.5, 92.0]
    assert kept.data.tags["mlflow.runName"] == "prune"
    assert kept.data.tags["metaprune.device"] == "host"
    assert artifact(run, "report/report.json").read_text() == '{\n  "ä": 1\n}\n'
    assert artifact(run, "report/notes.txt").read_text() == "kept"
    assert artifact(run, "plan/plan.json").is_file()
    assert artifact(run, "").is_relative_to(Path(store.removeprefix("sqlite:///")).parent / "mlruns")


def test_the_experiment_shows_runs_and_models(store: str) -> None:
    with MlflowTracker(store, "kinds") as run:
        run.start("demo")
    experiment = client(store).get_experiment_by_name("kinds")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_model_can_be_loaded_and_served(store: str, scale_file: Path) -> None:
    sample = {"x": np.ones((1, 3), np.float32)}
    with MlflowTracker(store) as run:
        run.start("export", experiment="models")
        uri = run.onnx_model(scale_file, "pruned", input_example=sample, metadata={"plan": "abc"})
        assert run.problem is None
        assert client(store).get_run(run.run_id).info.status == "RUNNING"
    assert uri is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow

        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(store)
        try:
            model = mlflow.pyfunc.load_model(uri)
            answer = model.predict({"x": np.full((4, 3), 2, np.float32)})
        finally:
            mlflow.set_tracking_uri(before)
    np.testing.assert_array_equal(answer["y"], np.tile(np.float32([4, 6, 8]), (4, 1)))
    meta = model.metadata
    assert meta.metadata == {"metaprune": {"plan": "abc"}}
    assert meta.signature.inputs.input_names() == ["x"]
    assert meta.signature.inputs.inputs[0].shape == (-1, 3)
    assert "CPUExecutionProvider" in str(meta.flavors["onnx"]["providers"])
    kept = client(store).get_run(run.run_id)
    assert [f"models:/{output.model_id}" for output in kept.outputs.model_outputs] == [uri]
    logged = client(store).get_logged_model(kept.outputs.model_outputs[0].model_id)
    assert logged.experiment_id == kept.info.experiment_id
    assert logged.name == "pruned"


@pytest.mark.long
def test_a_server_answers_with_the_model(store: str, scale_file: Path) -> None:
    with MlflowTracker(store) as run:
        run.start("export", experiment="served")
        uri = run.onnx_model(scale_file, input_example={"x": np.ones((1, 3), np.float32)})
    assert uri is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local"]
    server = subprocess.Popen(
        [*serve, "-h", "127.0.0.1", "-p", str(port)],
        env={**ui_environment(), "MLFLOW_TRACKING_URI": store},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(240):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
                if answer.status == 200:
                    break
            assert server.poll() is None
            time.sleep(0.25)
        for body in ({"inputs": {"x": [[1.0, 2.0, 3.0]]}}, {"inputs": [[1.0, 2.0, 3.0]]}):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert json.load(answer)["predictions"] == {"y": [[2.0, 6.0, 12.0]]}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("broken"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(4), "FAILED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_what_ends_a_run_is_its_status(store: str, error: BaseException, status: str) -> None:
    run = MlflowTracker(store).start("prune")

    def work() -> None:
        with run:
            raise error

    with pytest.raises(type(error)):
        work()
    assert client(store).get_run(run.run_id).info.status == status


def test_a_store_that_dies_does_not_stop_the_work(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def dead(*_: Any, **__: Any) -> None:
        nonlocal calls
        calls += 1
        raise ConnectionError("server gone")

    with MlflowTracker(store) as run, caplog.at_level(logging.WARNING, "metaprune.tracking"):
        run.start("prune")
        for name in ("log_batch", "log_text", "set_terminated"):
            monkeypatch.setattr(run._client, name, dead)
        for step in range(50):
            run.metrics({"loss": 1.0}, step)
        run.text("notes.txt", "lost")
    assert run.problem == "not everything was tracked: ConnectionError: server gone"
    assert calls == 3
    assert "server gone" in caplog.text


def test_one_failure_is_noted_and_the_rest_is_kept(store: str, tmp_path: Path) -> None:
    with MlflowTracker(store) as run:
        run.start("prune")
        run.file(tmp_path / "missing.txt")
        run.metrics({"loss": 1.0})
    assert run.problem is not None
    assert "missing.txt" in run.problem
    kept = client(store).get_run(run.run_id)
    assert kept.data.metrics == {"loss": 1.0}
    assert kept.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("mlflow.db", "must start with one of"),
        ("file:///somewhere", "must start with one of"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
    ],
)
def test_an_address_that_cannot_be_is_refused_at_once(uri: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        tracker(uri)


@pytest.mark.timeout(60)  # MLflow itself tries a database that does not answer for 100 s
def test_a_store_that_cannot_be_opened_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "no.db").write_text("This is no database. " * 100)
    for uri in (f"sqlite:///{tmp_path / 'no.db'}", "http://127.0.0.1:9", "postgresql://me:secret@127.0.0.1:9/db"):
        with pytest.raises(ConfigError, match=r"must be usable") as caught, tracker(uri) as run:
            run.start("prune")
        assert "secret" not in str(caught.value)
        assert run.run_id is None


def test_a_deleted_experiment_is_not_written_to(store: str) -> None:
    with MlflowTracker(store, "gone") as run:
        run.start("demo")
    client(store).delete_experiment(client(store).get_experiment_by_name("gone").experiment_id)
    with pytest.raises(ConfigError, match="'gone' was deleted"):
        MlflowTracker(store, "gone").start("demo")


def test_one_tracker_holds_one_run(store: str) -> None:
    with MlflowTracker(store) as run:
        run.start("demo")
        with pytest.raises(ConfigError, match="one run"):
            run.start("demo")


def test_without_tracking_every_call_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run: Tracker = tracker(enabled=False)
    assert type(run) is Tracker
    with run:
        run.start("prune", {"seed": 0})
        run.metrics({"loss": 1.0}, 1)
        run.text("a.txt", "")
        run.json("a.json", {})
        run.file(tmp_path / "none")
        run.figure("a.png", None)
        assert run.onnx_model(tmp_path / "none.onnx") is None
    assert list(tmp_path.iterdir()) == []
    assert (run.problem, run.run_id, run.uri) == (None, None, None)


def test_the_default_store_is_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracker().uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert absolute_uri("sqlite:////var/x.db") == "sqlite:////var/x.db"
    assert list(tmp_path.iterdir()) == []


def test_the_command_of_the_web_page(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.touch()
    store = f"sqlite:///{file}"
    command = ui_command(store, port=5055)
    assert command[:4] == [sys.executable, "-m", "mlflow", "ui"]
    assert command[command.index("--backend-store-uri") + 1] == store
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5055"
    assert ui_environment()["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert ui_environment()["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert ui_environment()["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"  # processes of its own, for agents
    with pytest.raises(ConfigError, match="there is no"):
        ui_command(f"sqlite:///{tmp_path / 'none.db'}")
    with pytest.raises(ConfigError, match="page of its own"):
        ui_command("http://127.0.0.1:5000")


def test_processes_may_open_a_new_store_together(tmp_path: Path) -> None:
    code = "import sys; from metaprune.tracking import tracker\nwith tracker(sys.argv[1]) as run: run.start('prune')"
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path / 'a folder' / 'new.db'}"]
    together = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(child.communicate()[1], child.returncode) for child in together] == [("", 0), ("", 0)]


def test_a_fresh_process_prints_nothing_and_reports_nothing(tmp_path: Path) -> None:
    code = """
import os, socket, sys
def closed(self, address, *rest):
    raise AssertionError(f"network: {address}")
socket.socket.connect = closed
from metaprune.tracking import tracker
assert "mlflow" not in sys.modules
with tracker(sys.argv[1]) as run:
    run.start("prune", {"seed": 0})
    run.metrics({"loss": 1.0})
assert run.problem is None, run.problem
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_CURRENT_TEST")}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, f"sqlite:///{tmp_path / 'new.db'}"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
