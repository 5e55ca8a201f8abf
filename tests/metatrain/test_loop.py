"""Meta-training: objectives have the right gradients, and a run goes on where it stood."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from metaprune import data, zoo
from metaprune.criteria import L2, Calibration, metanet_edit, metanet_scores, unit_scores
from metaprune.errors import ConfigError, InputError
from metaprune.graph import trace
from metaprune.measure import distortion
from metaprune.metanet import Metanet, PaperShape, Shape, new_metanet, read_blocks
from metaprune.metatrain import (
    OBJECTIVES,
    Distortions,
    MetaTraining,
    Pass,
    Subject,
    Survey,
    measure_distortions,
    meta_train,
)
from metaprune.metatrain.distortion import Cut, _by_axis, _search, batch_statistics, plan_of
from metaprune.metatrain.evaluate import plan_at
from metaprune.metatrain.objectives import _comparisons, masked, soft_mask
from metaprune.metatrain.survey import calibration_images
from metaprune.task import Classification

DIGITS = data.load("digits")
SHAPE = Shape(hidden=16, layers=2, heads=4, rank=4, pairs=4)
SURVEY = Survey(images=64, alone=12, pairs=6, together=20, searches=2, moves=6)
NAMES = ("taylor", "l2")


def subject(name: str = "digits_cnn", seed: int = 0) -> Subject:
    torch.manual_seed(seed)
    network = trace(zoo.build(name).eval(), next(DIGITS.train.batches(2))[0])
    reads = unit_scores(network, Calibration(calibration_images(DIGITS.train, 128), Classification()), NAMES)
    images = DIGITS.train.subset(64, 1).images()
    measured = measure_distortions(network, images, reads, SURVEY)
    return Subject(name, network, read_blocks(network.to_graph()), measured)


@pytest.fixture(scope="module")
def one() -> Subject:
    return subject()


@pytest.fixture(scope="module")
def other() -> Subject:
    return subject(seed=1)


def test_measured_distortions_are_those_of_the_cut_networks(one: Subject) -> None:
    measured, network = one.distortions, one.network
    assert len(measured.distortion_C) == len(measured.removed_CU) >= 25
    assert bool((measured.distortion_C >= 0).all())
    assert int(measured.few_C.sum()) == 12 + 6
    images = DIGITS.train.subset(64, 1).images()
    starts = np.cumsum([0, *(axis.size for axis in network.axes)])
    for row in (0, len(measured.removed_CU) - 1):
        removed = measured.removed_CU[row]
        cut = {
            axis.name: tuple(torch.nonzero(removed[start : start + axis.size]).squeeze(1).tolist())
            for axis, start in zip(network.axes, starts, strict=False)
        }
        slim = network.apply(plan_of(network, {name: ranks for name, ranks in cut.items() if ranks}))
        seen = []
        for model in (network.model, slim):
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.train()
            with torch.no_grad():
                state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                seen.append(model(images).log_softmax(1))
                model.load_state_dict(state)
            model.eval()
        wanted = (seen[0].exp() * (seen[0] - seen[1])).sum(1).mean()
        assert float(measured.distortion_C[row]) == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)
        macs = network.cost(network.sizes(plan_of(network, {n: r for n, r in cut.items() if r}))).macs
        assert float(measured.share_C[row]) == pytest.approx(macs / network.cost().macs, rel=1e-5)


def test_configurations_are_of_the_kinds_that_were_asked_for(one: Subject) -> None:
    measured, starts = one.distortions, np.cumsum([0, *(axis.size for axis in one.network.axes)])
    axes_C = sum(measured.removed_CU[:, start:end].any(1).int() for start, end in pairwise(starts))
    assert axes_C[measured.few_C].tolist() == [1] * 12 + [2] * 6
    for number in range(2):
        tried = torch.nonzero(measured.search_C == number).squeeze(1)
        assert 2 <= len(tried) <= 7
        share = 0.2 * 4 ** ((number + 0.5) / 2)
        assert bool((measured.share_C[tried] <= share + 1e-6).all())
        assert bool((measured.share_C[tried] > 0.7 * share).all())
    assert int((~measured.few_C & (measured.search_C < 0)).sum()) == 20


def test_a_search_starts_from_the_scores_and_climbs(one: Subject) -> None:
    """Scores that weigh one axis wrongly are soon left behind."""
    factor_U = torch.ones(len(one.blocks.axis_U)).masked_fill(one.blocks.axis_U == 1, 100.0)
    reads = {"l2": one.distortions.reads["l2"] * factor_U}
    asked = Survey(images=64, alone=0, together=0, searches=1, moves=40, least=0.4, most=0.6)
    found_C = measure_distortions(one.network, DIGITS.train.subset(64, 1).images(), reads, asked).distortion_C
    start = ranked(one, reads["l2"], asked.least**0.5 * asked.most**0.5)
    assert float(found_C[0]) == pytest.approx(start, rel=1e-4)
    assert float(found_C.min()) < 0.8 * start


@pytest.mark.parametrize("helps", [False, True])
def test_moves_of_a_search_start_from_the_best(one: Subject, monkeypatch: pytest.MonkeyPatch, helps: bool) -> None:
    """From the scores as they are where nothing helps, from the last move where everything does."""
    tried: list[dict[str, float]] = []

    def allocated(network: object, base: object, logs: dict[str, float], *rest: object) -> Iterator[Cut]:
        tried.append(dict(logs))
        yield {"an axis": (len(tried),)}

    class Told:
        def add(self, cut: Cut, *, search: int) -> float:
            return float(-len(tried) if helps else len(tried))

    monkeypatch.setattr("metaprune.metatrain.distortion._allocated", allocated)
    base = _by_axis(one.network, one.distortions.reads["l2"])
    _search(one.network, base, Survey(searches=1, moves=20), np.random.default_rng(0), 0, Told())
    assert len(tried) == 21
    assert set(tried[0].values()) == {0.0}
    for last, now in pairwise(tried):
        since = last if helps else tried[0]
        assert sum(now[name] != since[name] for name in now) == 3


def test_what_a_search_tried_is_compared_with_the_best_that_it_found() -> None:
    wanted = torch.tensor([5.0, 4, 3, 2, 1, 0, 9, 8])
    search = torch.tensor([-1, 0, 0, 0, -1, -1, 1, -1])
    near = torch.tensor([True, True, True, True, True, False, True, True])
    first, second = _comparisons(wanted, near, search, np.random.default_rng(0))
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    assert [pair for pair in pairs if pair[0] in (1, 2, 3)] == [(3, 1), (3, 2)]
    drawn = [pair for pair in pairs if pair[0] not in (1, 2, 3)]
    assert len(drawn) == 1
    assert set(drawn[0]) < {0, 4, 7}


def ranked(one: Subject, score_U: torch.Tensor, share: float) -> float:
    """The distortion of what global ranking by these scores leaves."""
    parts = score_U.split([axis.size for axis in one.network.axes])
    scores = {axis.name: part for axis, part in zip(one.network.axes, parts, strict=True) if axis.prunable}
    slim, images = one.network.apply(plan_at(one.network, scores, share)), DIGITS.train.subset(64, 1).images()
    with torch.no_grad(), batch_statistics(one.network.model), batch_statistics(slim):
        return distortion(one.network.model(images), slim(images))


def test_distortion_is_a_divergence_or_a_relative_square() -> None:
    scores = torch.randn(5, 3)
    assert distortion(scores, scores + 7) == pytest.approx(0, abs=1e-6)  # the same probabilities
    assert distortion(scores, -scores) > 0.01
    image = torch.randn(2, 3, 4, 4)
    assert distortion(image, 0 * image) == pytest.approx(1)


def test_measured_distortions_come_back_from_a_file(one: Subject, tmp_path: Path) -> None:
    found = Distortions.load(one.distortions.save(tmp_path / "d.safetensors"))
    assert torch.equal(found.removed_CU, one.distortions.removed_CU)
    assert torch.equal(found.distortion_C, one.distortions.distortion_C)
    assert set(found.reads) == set(NAMES)
    (tmp_path / "d.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        Distortions.load(tmp_path / "d.safetensors")


def a_pass(metanet: Metanet, one: Subject) -> Pass:
    batch = next(DIGITS.train.batches(32))
    return Pass(metanet, one, one.distortions.reads, 0.5, iter([batch] * 9), Classification(), np.random.default_rng(0))


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_gradient_of_an_objective_is_that_of_its_loss(name: str, one: Subject) -> None:
    """Along itself, against finite differences of what the objective reports."""
    torch.manual_seed(0)
    metanet = Metanet(SHAPE)
    with torch.no_grad():
        for parameter in metanet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    # Where something is held fixed in the gradient (gamma, a threshold), only the rest can be compared.
    options = {"amortised": {"ranking": 0.0}, "direct": {"temperature": 4.0}, "paper": {"sparsity": 0.0}}
    objective = OBJECTIVES[name](**options[name])
    surrogate, numbers = objective(a_pass(metanet, one))
    surrogate.backward()
    assert all(np.isfinite(list(numbers.values())))
    parameters = [parameter for parameter in metanet.parameters() if parameter.grad is not None]
    slope = float(torch.stack([parameter.grad.square().sum() for parameter in parameters]).sum().sqrt())
    directions = [parameter.grad / slope for parameter in parameters]

    def loss(step: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(step * direction)
        numbers = objective(a_pass(metanet, one))[1]
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(step * direction)
        return numbers["fit"] if name == "amortised" else numbers["task"]

    step = 1e-3
    difference = (loss(step) - loss(-step)) / (2 * step)
    assert slope == pytest.approx(difference, rel=0.05)


def test_a_hard_mask_of_the_scores_meets_the_budget(one: Subject) -> None:
    torch.manual_seed(0)
    blocks, network = one.blocks, one.network
    score_U = torch.randn(len(blocks.axis_U))
    mask_U = soft_mask(network, blocks, score_U, 0.5, 1e-6)
    free = torch.tensor([axis.prunable for axis in network.axes])[blocks.axis_U]
    assert bool((mask_U[~free] == 1).all())
    left = [int((mask_U[blocks.axis_U == k] >= 0.5).sum()) for k in range(len(network.axes))]
    assert network.cost(np.maximum(left, 1)).macs <= 0.5 * network.cost().macs
    assert network.cost(np.maximum(left, 1)).macs > 0.3 * network.cost().macs


def test_a_masked_network_is_the_cut_one(one: Subject) -> None:
    """Columns that read a removed unit are zero, so the network answers as the cut one does."""
    network, blocks = one.network, one.blocks
    removed = one.distortions.removed_CU[-1]
    places = network.places.places
    tensors = masked(blocks, dict(blocks.tensors.items()), (~removed).float())
    state = dict(network.model.state_dict()) | {name: places[name].write(value) for name, value in tensors.items()}
    starts = np.cumsum([0, *(axis.size for axis in network.axes)])
    cut = {
        axis.name: tuple(torch.nonzero(removed[start : start + axis.size]).squeeze(1).tolist())
        for axis, start in zip(network.axes, starts, strict=False)
    }
    slim = network.apply(plan_of(network, {name: ranks for name, ranks in cut.items() if ranks}))
    images = DIGITS.train.subset(16, 2).images()
    with torch.no_grad():
        seen = torch.func.functional_call(network.model, state, (images,))
        torch.testing.assert_close(seen, slim(images), atol=1e-4, rtol=1e-4)


def run(one: Subject, other: Subject, folder: Path | None = None, steps: int = 12, shape=SHAPE, **options):
    torch.manual_seed(0)
    seen: list[tuple[int, dict]] = []
    trained = meta_train(
        new_metanet(shape),
        [one],
        [other],
        MetaTraining(steps=steps, validate_every=5, images=60, lr=3e-3, **options),
        images=DIGITS.validation,
        calibration=calibration_images(DIGITS.train, 128),
        batches=DIGITS.train,
        folder=folder,
        resume=folder is not None,
        metrics=lambda values, step: seen.append((step, dict(values))),
    )
    return trained, seen


def test_training_lowers_what_it_is_to_lower_and_keeps_the_best(one: Subject, other: Subject) -> None:
    trained, seen = run(one, other, steps=40)
    fits = [values["amortised/fit"] for _, values in seen if "amortised/fit" in values]
    assert np.mean(fits[-5:]) < np.mean(fits[:5])
    assert trained.area == max(area for _, area in trained.history)
    assert dict(trained.history)[trained.step] == trained.area
    assert set(trained.curves) == {other.name}


def test_an_interrupt_that_code_below_swallows_still_ends_training(
    one: Subject, other: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: object) -> float:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return 0.0

    monkeypatch.setattr("metaprune.metatrain.loop._Run._one_step", step)
    with pytest.raises(KeyboardInterrupt):
        run(one, other)


class Killed(Exception):
    pass


@pytest.mark.parametrize("objectives", [{"amortised": 1.0}, {"direct": 1.0, "paper": 0.5, "amortised": 1.0}])
def test_a_run_that_was_killed_goes_on_to_the_same_end(
    one: Subject, other: Subject, tmp_path: Path, objectives: dict[str, float]
) -> None:
    whole, _ = run(one, other, objectives=objectives)

    def kill(values, step):
        if step == 7 and "loss" in values:
            raise Killed

    torch.manual_seed(0)
    training = MetaTraining(steps=12, validate_every=5, images=60, lr=3e-3, objectives=objectives)
    common = {
        "images": DIGITS.validation,
        "calibration": calibration_images(DIGITS.train, 128),
        "batches": DIGITS.train,
        "folder": tmp_path,
    }
    with pytest.raises(Killed):
        meta_train(Metanet(SHAPE), [one], [other], training, metrics=kill, **common)
    torch.manual_seed(99)  # a new process
    again = meta_train(Metanet(SHAPE), [one], [other], training, resume=True, **common)
    assert again.history == whole.history
    assert again.area == whole.area
    for name, tensor in whole.metanet.state_dict().items():
        assert torch.equal(tensor, again.metanet.state_dict()[name]), name


def test_other_work_is_not_gone_on_with(one: Subject, other: Subject, tmp_path: Path) -> None:
    run(one, other, tmp_path, steps=5)
    with pytest.raises(ConfigError, match=r"lr was 0\.003 and is now 0\.001"):
        meta_train(
            Metanet(SHAPE),
            [one],
            [other],
            MetaTraining(steps=5, validate_every=5, images=60, lr=1e-3),
            images=DIGITS.validation,
            calibration=calibration_images(DIGITS.train, 128),
            folder=tmp_path,
            resume=True,
        )


def test_a_collapse_is_found_and_rolled_back(one: Subject, other: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from metaprune.metatrain import loop

    areas = iter([80.0, 82.0, 10.0, 81.0, 79.0, 80.0])
    monkeypatch.setattr(loop, "curve_of", lambda *args, **options: loop.Curve((1.5, 4.0), (area := next(areas), area)))
    trained, seen = run(one, other, steps=20)
    assert trained.rollbacks == (10,)
    assert trained.area == 82.0
    assert trained.step == 5
    rates = {step: values["lr"] for step, values in seen if "lr" in values}
    training = MetaTraining(steps=20, lr=3e-3)
    assert rates[9] == pytest.approx(training.learning_rate(9))
    assert rates[10] == pytest.approx(training.learning_rate(10) / 2)


def test_the_published_metanetwork_is_trained_as_it_was_published(one: Subject, other: Subject) -> None:
    """Its edit keeps what the network does, and takes its groups of weights apart."""
    trained, seen = run(one, other, shape=PaperShape(hidden=8, layers=1), objectives={"paper": 1.0})
    norms = [values["paper/sparsity"] for _, values in seen if "paper/sparsity" in values]
    assert norms[-1] < norms[0]
    edited = metanet_edit(trained.metanet, other.network, other.blocks, {}, 0.5)
    scores = metanet_scores(trained.metanet, other.network, other.blocks, {}, 0.5)
    wanted = L2().score(other.network.with_tensors(edited), Calibration())
    assert edited
    assert all(torch.equal(score_U, wanted[axis]) for axis, score_U in scores.items())


def test_a_metanetwork_without_scores_is_not_asked_for_them(one: Subject, other: Subject) -> None:
    with pytest.raises(ConfigError, match="'amortised' asks what units are worth"):
        run(one, other, shape=PaperShape(hidden=8, layers=1))


def test_no_network_to_choose_on_is_refused(one: Subject) -> None:
    with pytest.raises(ConfigError, match=r"there are 1 and 0\. Give some members"):
        meta_train(
            Metanet(SHAPE),
            [one],
            [],
            MetaTraining(steps=1),
            images=DIGITS.validation,
            calibration=calibration_images(DIGITS.train, 64),
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "`steps >= 1` must hold"),
        ({"objectives": {"amortized": 1.0}}, "Did you mean 'amortised'"),
        ({"objectives": {}}, "at least one objective"),
        ({"least": 0.8, "most": 0.5}, "least <= most"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MetaTraining(**wrong)
