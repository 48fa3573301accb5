from __future__ import annotations

import pytest
from google.protobuf import field_mask_pb2
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.service.rig import domain
from virtfleet.compute.v1 import device_pb2, domain_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_service import errors
from virtfleet_service.masks import apply_update, diff, split_path


def two_disks() -> domain_pb2.Domain:
    made = domain("a", env="prod")
    made.spec.disks["root"].read_only = True
    made.spec.disks["root"].boot_order = 1
    made.spec.disks["data1"].volume = "pools/p/volumes/data1"
    made.spec.disks["data1"].throttle.iops_max = 100
    return made


def copy(message: domain_pb2.Domain) -> domain_pb2.Domain:
    made = domain_pb2.Domain()
    made.CopyFrom(message)
    return made


def apply(update: domain_pb2.Domain, *paths: str) -> tuple[domain_pb2.Domain, list[str]]:
    current = two_disks()
    update.name = current.name
    return current, apply_update(current, update, paths)


def test_one_field_of_one_device() -> None:
    update = domain_pb2.Domain()
    update.spec.disks["data1"].throttle.iops_max = 500
    update.spec.disks["other"].read_only = True
    current, changed = apply(update, "spec.disks.data1.throttle.iops_max")
    assert changed == ["spec.disks.data1.throttle.iops_max"]
    assert current.spec.disks["data1"].throttle.iops_max == 500
    assert current.spec.disks["data1"].volume == "pools/p/volumes/data1"
    assert set(current.spec.disks) == {"root", "data1"}


def test_zero_and_unset_are_different() -> None:
    update = domain_pb2.Domain()
    update.spec.disks["data1"].throttle.iops_max = 0
    current, changed = apply(update, "spec.disks.data1.throttle.iops_max")
    assert current.spec.disks["data1"].throttle.HasField("iops_max")
    assert changed == ["spec.disks.data1.throttle.iops_max"]
    current, changed = apply(domain_pb2.Domain(), "spec.disks.data1.throttle.iops_max")
    assert not current.spec.disks["data1"].throttle.HasField("iops_max")


def test_a_device_comes_goes_and_is_replaced_by_its_key() -> None:
    update = domain_pb2.Domain()
    update.spec.disks["new"].volume = "pools/p/volumes/new"
    update.spec.disks["data1"].volume = "pools/p/volumes/other"
    current, changed = apply(update, "spec.disks.new", "spec.disks.root", "spec.disks.data1")
    assert changed == ["spec.disks.data1.throttle", "spec.disks.data1.volume", "spec.disks.new", "spec.disks.root"]
    assert set(current.spec.disks) == {"data1", "new"}
    assert not current.spec.disks["data1"].HasField("throttle")


def test_a_wildcard_stands_for_all_keys() -> None:
    update = domain_pb2.Domain()
    update.spec.disks["root"].read_only = False
    update.spec.disks["data1"].read_only = True
    current, changed = apply(update, "spec.disks.*.read_only")
    assert changed == ["spec.disks.data1.read_only", "spec.disks.root.read_only"]
    assert current.spec.disks["root"].boot_order == 1


def test_a_whole_map_is_replaced_by_its_own_path() -> None:
    update = domain_pb2.Domain()
    update.spec.disks["only"].volume = "v"
    current, _ = apply(update, "spec.disks")
    assert set(current.spec.disks) == {"only"}


@pytest.mark.parametrize("path", ["labels.example.com/team", "labels.`example.com/team`"])
def test_keys_of_labels_may_have_dots(path: str) -> None:
    update = domain_pb2.Domain()
    update.labels["example.com/team"] = "red"
    current, changed = apply(update, path)
    assert dict(current.labels) == {"env": "prod", "example.com/team": "red"}
    assert changed == ["labels.`example.com/team`"]
    assert apply_update(current, domain_pb2.Domain(), [path]) == changed
    assert dict(current.labels) == {"env": "prod"}


def test_without_a_mask_what_is_filled_is_merged() -> None:
    update = domain_pb2.Domain(display_name="Web")
    update.labels["team"] = "red"
    update.spec.disks["data1"].throttle.iops_max = 5
    update.spec.disks["new"].volume = "v"
    current, changed = apply(update)
    assert changed == [
        "display_name",
        "labels.team",
        "spec.disks.data1.throttle.iops_max",
        "spec.disks.new",
    ]
    assert current.spec.disks["data1"].volume == "pools/p/volumes/data1"
    assert dict(current.labels) == {"env": "prod", "team": "red"}


def test_the_mask_star_replaces_and_clears() -> None:
    update = domain_pb2.Domain(display_name="Web", uid="other", etag="x", generation=9)
    update.spec.memory.maximum_bytes = 1
    update.status.active = True
    before = two_disks()
    current, _ = apply(update, "*")
    assert not current.labels
    assert not current.spec.disks
    assert current.spec.memory.maximum_bytes == 1
    assert not current.status.active
    assert current.generation == before.generation
    assert current.uid
    assert current.uid != "other"


@pytest.mark.parametrize("path", ["name", "uid", "etag", "generation", "status", "status.state", "create_time"])
def test_what_the_server_sets_is_passed_over(path: str) -> None:
    update = domain_pb2.Domain(uid="x", etag="y", generation=7)
    update.status.state = domain_pb2.DOMAIN_STATE_RUNNING
    _, changed = apply(update, path)
    assert changed == []


@pytest.mark.parametrize(
    "path",
    [
        "",
        "nothing",
        "spec.nothing",
        "spec..disks",
        "spec.",
        ".spec",
        "spec.disks.root.nothing",
        "spec.disks.absent.nothing",
        "spec.disks.*.nothing",
        "spec.memory.maximum_bytes.more",
        "display_name.more",
        "status.nothing",
        "spec.disks.`root",
        "spec.disks.`root`x",
        "update_time.seconds.x",
        "spec.cpu.features.0",
        "a" * 100,
        ".".join("a" * 40),
    ],
)
def test_unknown_paths_are_refused(path: str) -> None:
    update = domain_pb2.Domain(display_name="x")
    with pytest.raises(errors.MaskPathUnknown) as caught:
        apply(update, path)
    assert caught.value.field == "update_mask"
    assert caught.value.metadata["path"] == path


def test_what_is_fixed_at_creation_must_stay() -> None:
    current = volume_pb2.Volume(name="n")
    current.spec.format = volume_pb2.VOLUME_FORMAT_QCOW2
    fixed = ["spec.format"]
    update = volume_pb2.Volume()
    update.spec.format = volume_pb2.VOLUME_FORMAT_QCOW2
    assert apply_update(current, update, ["spec.format"], immutable=fixed) == []
    assert apply_update(current, update, [], immutable=fixed) == []
    update.spec.format = volume_pb2.VOLUME_FORMAT_RAW
    for paths in (["spec.format"], [], ["spec"], ["*"]):
        fresh = volume_pb2.Volume()
        fresh.CopyFrom(current)
        with pytest.raises(errors.FieldConflict) as caught:
            apply_update(fresh, update, paths, immutable=fixed)
        assert caught.value.field == "volume.spec.format"


def test_a_field_mask_message_is_taken_and_bounded() -> None:
    current = two_disks()
    update = domain_pb2.Domain(display_name="x")
    assert apply_update(current, update, field_mask_pb2.FieldMask(paths=["display_name"])) == ["display_name"]
    assert apply_update(current, update, field_mask_pb2.FieldMask()) == []
    assert apply_update(current, update, None) == []
    with pytest.raises(errors.MaskPathUnknown):
        apply_update(current, update, ["display_name"] * 1000)
    with pytest.raises(errors.FieldConflict):
        apply_update(current, update, ["*", "display_name"])


def test_annotations_are_bounded_as_a_whole() -> None:
    update = domain_pb2.Domain()
    for index in range(20):
        update.annotations[str(index)] = "x" * 4000
    with pytest.raises(errors.FieldOutOfRange) as caught:
        apply(update, "annotations")
    assert caught.value.field == "domain.annotations"


def test_members_of_a_oneof_displace_each_other() -> None:
    update = domain_pb2.Domain()
    update.spec.disks["root"].empty.SetInParent()
    for paths in ((), ("spec.disks.root.empty",)):
        current, changed = apply(update, *paths)
        assert current.spec.disks["root"].WhichOneof("source") == "empty"
        assert changed == ["spec.disks.root.empty", "spec.disks.root.volume"]


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
ids = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
disks = st.builds(
    device_pb2.Disk,
    volume=st.one_of(st.none(), ids),
    read_only=st.one_of(st.none(), st.booleans()),
    boot_order=st.one_of(st.none(), st.integers(1, 9)),
)


@st.composite
def domains(draw: st.DrawFn) -> domain_pb2.Domain:
    made = domain_pb2.Domain(name="n", display_name=draw(texts))
    for key, value in draw(st.dictionaries(texts, texts, max_size=3)).items():
        made.labels[key] = value
    for key, disk in draw(st.dictionaries(ids, disks, max_size=3)).items():
        made.spec.disks[key].CopyFrom(disk)
    if draw(st.booleans()):
        made.spec.memory.maximum_bytes = draw(st.integers(0, 100))
    return made


@given(domains(), domains())
def test_star_makes_equal_and_a_second_time_changes_nothing(
    current: domain_pb2.Domain, update: domain_pb2.Domain
) -> None:
    apply_update(current, update, ["*"])
    assert diff(current, update) == []
    assert apply_update(current, update, ["*"]) == []


@given(domains(), domains())
def test_the_diff_as_mask_makes_equal(current: domain_pb2.Domain, update: domain_pb2.Domain) -> None:
    paths = diff(current, update)
    changed = apply_update(current, update, paths or ["display_name"])
    assert changed == paths
    assert diff(current, update) == []


@given(domains(), domains())
def test_merging_never_clears(current: domain_pb2.Domain, update: domain_pb2.Domain) -> None:
    before = copy(current)
    apply_update(current, update, [])
    merged = copy(before)
    merged.MergeFrom(update)
    assert set(current.labels) == set(merged.labels)
    assert set(current.spec.disks) == set(merged.spec.disks)
    for key, value in update.labels.items():
        assert current.labels[key] == value


@given(domains(), domains(), st.lists(st.text(alphabet="abdeiklnst.*`_specdisklabel", max_size=24), max_size=4))
def test_any_path_is_applied_or_refused(
    current: domain_pb2.Domain, update: domain_pb2.Domain, paths: list[str]
) -> None:
    try:
        apply_update(current, update, paths)
    except (errors.MaskPathUnknown, errors.FieldConflict):
        return


@given(st.text(max_size=40))
def test_splitting_is_the_inverse_of_joining(path: str) -> None:
    try:
        segments = split_path(path)
    except errors.MaskPathUnknown:
        return
    assert ".".join(segments) == path
