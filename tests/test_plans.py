"""A plan is data: what is saved is what is loaded, and damage is told."""

import contextlib
import json
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from metaprune.edits import Keep, SetWeight
from metaprune.errors import InputError, MetapruneError
from metaprune.plans import Plan

PLAN = Plan((Keep("a", 8, (0, 2, 5)), Keep("b:head", 3, (1,))), "0123456789abcdef", {"budget": "macs=0.5", "seed": 0})


def with_tensors():
    torch.manual_seed(0)
    edits = (
        SetWeight("a.weight", torch.randn(3, 4)),
        Keep("a", 8, (1, 2)),
        SetWeight("a.bias", torch.randn(3).to(torch.bfloat16)),
        SetWeight("steps", torch.tensor(3)),
    )
    return Plan(edits, "abc", {})


@pytest.mark.parametrize("plan", [PLAN, with_tensors(), Plan(())], ids=["keep", "tensors", "empty"])
def test_what_is_saved_is_what_is_loaded(plan, tmp_path):
    path = plan.save(tmp_path / "deep" / "plan.json")
    assert path == tmp_path / "deep" / "plan.json"
    again = Plan.load(path)
    assert again == plan
    assert again.save(tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert again.draft().keep == plan.draft().keep


def test_types_survive(tmp_path):
    loaded = Plan.load(with_tensors().save(tmp_path / "plan.json"))
    assert loaded.edits[2].value.dtype == torch.bfloat16
    assert loaded.edits[3].value.shape == ()
    assert type(Plan.load(PLAN.save(tmp_path / "keep.json")).edits[0].kept) is tuple


def test_tensors_that_are_no_plain_memory(tmp_path):
    base = torch.randn(4, 6)
    plan = Plan((SetWeight("a", base.t()), SetWeight("b", base[1:]), SetWeight("c", base), SetWeight("d", base)))
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    grown = Plan((SetWeight("a", torch.nn.Parameter(base)),))
    assert Plan.load(grown.save(tmp_path / "plan.json")) == grown


def test_plans_are_compared_by_what_they_hold():
    assert Plan((Keep("a", 8, (0,)),)) != Plan((Keep("a", 8, (1,)),))
    assert with_tensors() == with_tensors()
    assert SetWeight("a", torch.zeros(2)) != SetWeight("a", torch.ones(2))
    assert SetWeight("a", torch.zeros(2)) != SetWeight("b", torch.zeros(2))


def test_a_plan_can_be_printed():
    assert "Keep(axis='a', size=8, kept=(0, 2, 5))" in repr(PLAN)


def test_how_it_was_made_survives_as_json_values(tmp_path):
    plan = Plan((), made_by={"budgets": ("macs=0.5", "params=0.3"), "versions": {"torch": "2"}})
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


def test_something_unsaveable_leaves_nothing_behind(tmp_path):
    with pytest.raises(MetapruneError, match="JSON"):
        Plan(with_tensors().edits, made_by={"when": object()}).save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


# ---- files beside ---------------------------------------------------------------------------------------------------


def test_weights_that_lie_beside_are_not_touched(tmp_path):
    """`resnet.json` beside the `resnet.safetensors` that somebody trained."""
    save_file({"w": torch.ones(3)}, tmp_path / "resnet.safetensors")
    before = (tmp_path / "resnet.safetensors").read_bytes()
    PLAN.save(tmp_path / "resnet.json")
    assert (tmp_path / "resnet.safetensors").exists()
    assert (tmp_path / "resnet.safetensors").read_bytes() == before


def test_weights_that_lie_beside_are_not_overwritten(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "resnet.safetensors")
    before = (tmp_path / "resnet.safetensors").read_bytes()
    with contextlib.suppress(MetapruneError):  # refusing is fine too
        with_tensors().save(tmp_path / "resnet.json")
    assert (tmp_path / "resnet.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["plan", "plan.v2", "plan.safetensors", "a.b.json"])
def test_any_name_works_or_is_refused(name, tmp_path):
    plan = with_tensors()
    try:
        path = plan.save(tmp_path / name)
    except MetapruneError:
        return
    assert Plan.load(path) == plan


def test_two_versions_of_one_name_do_not_share_tensors(tmp_path):
    first, second = with_tensors(), Plan((SetWeight("a.weight", torch.zeros(3, 4)),))
    one, two = first.save(tmp_path / "plan.v1"), second.save(tmp_path / "plan.v2")
    assert (Plan.load(one), Plan.load(two)) == (first, second)


def test_saving_again_replaces_tensors_and_all(tmp_path):
    path = with_tensors().save(tmp_path / "plan.json")
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert sorted(item.name for item in tmp_path.iterdir()) == ["plan.json"]


# ---- damage ---------------------------------------------------------------------------------------------------------


def damaged(tmp_path, change):
    path = with_tensors().save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.json"):
        Plan.load(tmp_path / "nowhere.json")
    with pytest.raises(InputError):
        Plan.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe\x00", b'{"schema": 1}'])
def test_what_is_no_plan(content, tmp_path):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(InputError, match=r"plan.json"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("schema", [0, 2, "1", None, 1.5])
def test_another_schema(schema, tmp_path):
    path = damaged(tmp_path, lambda content: content.update(schema=schema))
    with pytest.raises(InputError, match="schema"):
        Plan.load(path)


CHANGES = {
    "no_kind": lambda content: content["edits"][1].pop("edit"),
    "unknown_kind": lambda content: content["edits"][1].update(edit="keeep"),
    "no_axis": lambda content: content["edits"][1].pop("axis"),
    "no_ranks": lambda content: content["edits"][1].pop("kept"),
    "ranks_are_text": lambda content: content["edits"][1].update(kept="12"),
    "ranks_are_fractions": lambda content: content["edits"][1].update(kept=[0.5, 1.7]),
    "rank_is_none": lambda content: content["edits"][1].update(kept=None),
    "size_is_text": lambda content: content["edits"][1].update(size="many"),
    "size_is_a_fraction": lambda content: content["edits"][1].update(size=8.6),
    "axis_is_a_number": lambda content: content["edits"][1].update(axis=3),
    "edit_is_text": lambda content: content["edits"].__setitem__(1, "keep"),
    "edits_is_a_number": lambda content: content.update(edits=3),
    "edits_is_an_object": lambda content: content.update(edits={"a": 1}),
    "made_by_is_a_list": lambda content: content.update(made_by=[1]),
    "network_is_a_number": lambda content: content.update(network=3),
    "tensor_is_missing": lambda content: content["edits"][0].update(name="other"),
    "unknown_key": lambda content: content["edits"][1].update(keptt=[1]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_damage_in_an_edit_is_told(change, tmp_path):
    path = damaged(tmp_path, change)
    with pytest.raises(MetapruneError):
        Plan.load(path)


def test_an_edit_that_is_damaged_is_named(tmp_path):
    path = damaged(tmp_path, CHANGES["no_axis"])
    with pytest.raises(InputError, match=r"edit 1 of .*plan.json"):
        Plan.load(path)


@pytest.mark.parametrize("how", ["missing", "truncated", "garbage", "of_another_plan"])
def test_tensors_that_do_not_belong_are_told(how, tmp_path):
    path = with_tensors().save(tmp_path / "plan.json")
    (beside,) = tmp_path.glob("*.safetensors")
    content = beside.read_bytes()
    if how == "missing":
        beside.unlink()
    elif how == "truncated":
        beside.write_bytes(content[: len(content) // 2])
    elif how == "garbage":
        beside.write_bytes(b"x" * 100)
    else:  # as a kill between two renames leaves it
        save_file({name: tensor + 1 for name, tensor in load_file(beside).items()}, beside)
    with pytest.raises(InputError):
        Plan.load(path)


def test_a_kill_at_any_moment_leaves_the_old_plan_or_the_new(tmp_path):
    script = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from metaprune.edits import SetWeight
        from metaprune.plans import Plan
        print("ready", flush=True)
        for k in range(10**6):
            Plan((SetWeight("w", torch.full((64, 64), float(k))), SetWeight("v", torch.full((9,), float(k)))),
                 made_by={"k": k}).save(Path(sys.argv[1]))
    """)
    path = tmp_path / "plan.json"
    for delay in (0.02, 0.05, 0.11, 0.17):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.1 + delay)
        process.kill()
        process.wait()
        process.stdout.close()
        if path.exists():
            plan = Plan.load(path)
            values = {float(edit.value.flatten()[0]) for edit in plan.edits}
            assert values == {float(plan.made_by["k"])}
