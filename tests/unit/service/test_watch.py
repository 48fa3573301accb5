from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.service.rig import TEST_CAUSE, Watcher, call, domain, open_store, put, watching
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_service import errors, requests, resources
from virtfleet_service.store import Limits, Store, Transaction
from virtfleet_service.tokens import ANY_WATCH, ResumeToken
from virtfleet_service.watch import WatchHub

BASIC = resource_pb2.RESOURCE_VIEW_BASIC


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "c.db", Limits(log_entries=5000)) as opened:
        yield opened


def ask(**fields: object) -> watch_pb2.WatchResourcesRequest:
    return watch_pb2.WatchResourcesRequest(parent="nodes/n1", **fields)  # type: ignore[arg-type]  # keywords of any field


def names(changes: list[watch_pb2.Change]) -> list[str]:
    """Say in short what changes tell: `+a` a put, `-a` a delete, `!a` an event."""
    found = []
    for change in changes:
        kind = change.WhichOneof("kind")
        if kind == "put":
            found.append("+" + change.put.domain.name.rpartition("/")[2])
        elif kind == "delete":
            found.append("-" + change.delete.name.rpartition("/")[2])
        elif kind == "event":
            found.append("!" + change.event.resource.rpartition("/")[2])
        else:
            found.append(str(kind))
    return found


async def update(store: Store, one: domain_pb2.Domain, **labels: str) -> None:
    one.labels.update(labels)
    resources.touch(one)
    await put(store, one)


def event(name: str, kind: int = watch_pb2.EVENT_TYPE_DOMAIN_REBOOTED) -> watch_pb2.Event:
    return watch_pb2.Event(resource=name, type=kind, reason="X")  # type: ignore[arg-type]  # keywords of any field


async def tell(store: Store, *events: watch_pb2.Event) -> None:
    def work(tx: Transaction) -> None:
        for one in events:
            tx.event(one)

    await store.write(work)


async def test_a_snapshot_then_changes_in_order(store: Store) -> None:
    hub = WatchHub(store)
    one, two = domain("a"), domain("b")
    await put(store, one, two)
    async with watching(hub) as watcher:
        snapshot = await watcher.snapshot()
        assert names(snapshot) == ["+a", "+b"]
        assert [change.put.cause for change in snapshot] == ["snapshot", "snapshot"]
        assert snapshot[0].put.domain == one
        await update(store, one, x="1")
        await store.write(lambda tx: tx.event(event(one.name)))
        await store.write(lambda tx: tx.delete(two.name, cause="gone"))
        changes = await watcher.until(3)
        assert names(changes) == ["+a", "!a", "-b"]
        assert changes[0].put.old_generation == 1
        assert changes[0].put.domain == one
        assert changes[0].put.cause == TEST_CAUSE
        assert changes[1].event.HasField("time")
        assert changes[2].delete.uid == two.uid
        assert changes[2].delete.resource_type == "domain"
        assert changes[2].delete.cause == "gone"


async def test_a_resume_continues_without_gap_or_double(store: Store) -> None:
    hub = WatchHub(store)
    one = domain("a")
    await put(store, one)
    async with watching(hub) as watcher:
        await watcher.snapshot()
        await update(store, one, x="1")
        await watcher.until(1)
    for value in ("2", "3", "4"):
        await update(store, one, x=value)
    async with watching(hub, ask(resume_token=watcher.token)) as again:
        changes = await again.until(3)
        assert [change.put.domain.labels["x"] for change in changes] == ["2", "3", "4"]


async def test_resume_works_from_the_store_after_a_restart(tmp_path: Path) -> None:
    async with open_store(tmp_path / "d.db") as store:
        one = domain("a")
        await put(store, one)
        async with watching(WatchHub(store)) as watcher:
            await watcher.snapshot()
        await update(store, one, x="1")
    async with (
        open_store(tmp_path / "d.db") as store,
        watching(WatchHub(store), ask(resume_token=watcher.token)) as again,
    ):
        assert names(await again.until(1)) == ["+a"]


async def test_a_snapshot_token_continues_the_snapshot(store: Store) -> None:
    hub = WatchHub(store)
    made = [domain(f"d{index:04}") for index in range(1200)]
    await put(store, *made)
    async with watching(hub) as watcher:
        first = (await watcher.read()).changes
        assert 0 < len(first) < 1200
        await update(store, made[0], x="seen")
        await update(store, made[1100], x="unseen")
        await store.write(lambda tx: tx.delete(made[1101].name, cause=TEST_CAUSE))
    async with watching(hub, ask(resume_token=watcher.token)) as again:
        rest = await again.snapshot()
    told = [*first, *rest]
    assert len(told) == 1200 + 1 + 1 - 1
    final = {change.put.domain.name: change.put.domain for change in told if change.HasField("put")}
    assert final[made[0].name].labels["x"] == "seen"
    assert final[made[1100].name].labels["x"] == "unseen"
    assert names(told)[-1] == "-d1101"


async def test_changes_during_a_snapshot_come_once_and_in_order_before_its_end(store: Store) -> None:
    hub = WatchHub(store)
    made = [domain(f"d{index:04}") for index in range(1500)]
    await put(store, *made)
    async with watching(hub) as watcher:
        changes = list((await watcher.read()).changes)
        await update(store, made[3], x="1")
        await update(store, made[1400], x="1")
        await update(store, made[1400], x="2")
        await put(store, domain("new"))
        changes += await watcher.snapshot()
    values: dict[str, list[str]] = {}
    for change in changes:
        values.setdefault(change.put.domain.name, []).append(change.put.domain.labels.get("x", ""))
    assert len(values) == 1501
    assert values[made[3].name] == ["", "1"]
    assert values[made[1400].name] == ["1", "2"]
    assert values["nodes/n1/domains/new"] == [""]


async def test_a_token_within_a_snapshot_names_nothing_that_its_holder_may_not_see(store: Store) -> None:
    hub = WatchHub(store)
    await put(store, *(domain(f"b-{index}") for index in range(3)), *(domain(f"c-{index:04}") for index in range(1200)))
    await put(store, domain("d-1"))
    limited = call("virtfleet.compute.v1.WatchService.WatchResources", roles=("viewer@nodes/n1/domains/b",))
    limited._authorizer.register(limited.method)
    stream = hub.stream(ask(), limited)
    first = watch_pb2.WatchResourcesResponse.FromString(await anext(stream))
    await stream.aclose()  # type: ignore[attr-defined]  # it is a generator
    assert names(list(first.changes)) == ["+b-0", "+b-1", "+b-2"]
    assert ResumeToken.decode(first.resume_token).name == "nodes/n1/domains/b-2"
    resumed = hub.stream(ask(resume_token=first.resume_token), limited)
    rest = watch_pb2.WatchResourcesResponse.FromString(await anext(resumed))
    assert (len(rest.changes), rest.HasField("snapshot_end")) == (0, True)
    await resumed.aclose()  # type: ignore[attr-defined]  # as above


async def test_kinds_events_and_views_are_chosen(store: Store) -> None:
    hub = WatchHub(store)
    one = domain("a", state="RUNNING")
    await put(store, one)
    only_hosts = ask(resource_types=[watch_pb2.RESOURCE_TYPE_HOST])
    one_event = ask(event_types=[watch_pb2.EVENT_TYPE_DOMAIN_PANICKED], view=BASIC)
    async with watching(hub, only_hosts) as hosts, watching(hub, one_event) as basic:
        assert await hosts.snapshot() == []
        (shown,) = await basic.snapshot()
        assert not shown.put.domain.HasField("spec")
        assert not shown.put.domain.status.HasField("active_spec")
        assert not shown.put.domain.status.HasField("resolved_spec")
        assert shown.put.domain.status.state == domain_pb2.DOMAIN_STATE_RUNNING

        def work(tx: Transaction) -> None:
            tx.event(event(one.name))
            tx.event(event(one.name, watch_pb2.EVENT_TYPE_DOMAIN_PANICKED))
            tx.event(event("nodes/n1/host", watch_pb2.EVENT_TYPE_DOMAIN_PANICKED))

        await store.write(work)
        await update(store, one, x="1")
        changes = await basic.until(3)
        assert names(changes) == ["!a", "!host", "+a"]
        assert not changes[2].put.domain.HasField("spec")
        assert (changes[2].put.cause, changes[2].put.old_generation) == (TEST_CAUSE, 1)
        assert names(await hosts.until(1)) == ["!host"]


async def test_a_filter_tells_what_ceases_to_match_as_deleted(store: Store) -> None:
    hub = WatchHub(store)
    one, two = domain("a", env="prod"), domain("b", env="test")
    await put(store, one, two)
    async with watching(hub, ask(filter="labels.env = prod")) as watcher:
        assert names(await watcher.snapshot()) == ["+a"]
        await update(store, two, y="1")
        await update(store, one, env="test")
        await update(store, one, y="1")
        await update(store, two, env="prod")
        await tell(store, event(one.name), event(two.name))
        await store.write(lambda tx: [tx.delete(one.name, cause="x"), tx.delete(two.name, cause="x")])
        changes = await watcher.until(4)
        assert names(changes) == ["-a", "+b", "!b", "-b"]
        assert [changes[0].delete.cause, changes[3].delete.cause] == ["filter", "x"]


async def test_a_resumed_filter_tells_what_may_have_been_seen(store: Store) -> None:
    hub = WatchHub(store)
    one = domain("a", env="prod")
    await put(store, one)
    request = ask(filter="labels.env = prod")
    async with watching(hub, request) as watcher:
        await watcher.snapshot()
    await update(store, one, env="test")
    await update(store, one, y="1")
    await update(store, one, env="prod")
    async with watching(hub, ask(filter="labels.env = prod", resume_token=watcher.token)) as again:
        assert names(await again.until(2)) == ["-a", "+a"]


async def test_callers_see_their_own_names_only(store: Store) -> None:
    hub = WatchHub(store)
    await put(store, domain("a"), domain("b"))
    limited = call("virtfleet.compute.v1.WatchService.WatchResources", roles=("viewer@nodes/n1/domains/b",))
    limited._authorizer.register(limited.method)
    stream = hub.stream(ask(), limited)
    watcher = Watcher(stream)
    assert names(await watcher.snapshot()) == ["+b"]
    await put(store, domain("c"), domain("b2"))
    assert names(await watcher.until(1)) == ["+b2"]
    await stream.aclose()  # type: ignore[attr-defined]  # an async generator


async def test_moves_are_told_as_moves(store: Store) -> None:
    hub = WatchHub(store)
    one, two = domain("a"), domain("b")
    await put(store, one)
    async with watching(hub) as watcher:
        await watcher.snapshot()
        await store.write(lambda tx: tx.move_out(one.name, "nodes/n2/domains/a"))
        await store.write(lambda tx: tx.move_in("domain", two, "nodes/n3/domains/b", cause="m"))
        changes = await watcher.until(3)
        assert names(changes) == ["moved_out", "moved_in", "+b"]
        assert changes[0].moved_out.new_name == "nodes/n2/domains/a"
        assert changes[1].moved_in.old_name == "nodes/n3/domains/b"


async def test_many_changes_come_in_few_messages(store: Store) -> None:
    hub = WatchHub(store)
    async with watching(hub) as watcher:
        await watcher.snapshot()
        writing = asyncio.gather(*(put(store, domain(f"d{index}")) for index in range(1000)))
        changes = await watcher.until(1000)
        await writing
        assert len(changes) == 1000
        assert len(watcher.messages) < 80


async def test_watchers_with_equal_parameters_share_the_bytes(store: Store) -> None:
    hub = WatchHub(store)
    streams = [hub.stream(ask()) for _ in range(3)]
    for stream in streams:
        await anext(stream)
    waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await asyncio.sleep(0)
    await put(store, domain("a"))
    first, *others = await asyncio.gather(*waiting)
    assert all(other is first for other in others)
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]  # an async generator


async def test_bookmarks_in_quiet_times(store: Store) -> None:
    hub = WatchHub(store)
    request = ask()
    request.bookmark_interval.FromSeconds(1)
    async with watching(hub, request) as watcher:
        await watcher.snapshot()
        message = await watcher.read()
        assert message.WhichOneof("marker") == "bookmark"
        assert not message.bookmark.HasField("closing")
        assert abs(message.bookmark.time.ToNanoseconds() - time.time_ns()) < 5e9
        await put(store, domain("a"))
        await watcher.until(1)


async def test_the_end_brings_what_is_left_a_reason_and_a_token(store: Store) -> None:
    hub = WatchHub(store)
    async with watching(hub) as watcher:
        await watcher.snapshot()
        await put(store, domain("a"))
        hub.close()
        assert names(await watcher.until(1)) == ["+a"]
        last = await watcher.read()
        assert requests.error_of(last.bookmark.closing).reason == "SERVICE_DRAINING"
        with pytest.raises(StopAsyncIteration):
            await watcher.read()
    token = ResumeToken.decode(last.resume_token)
    assert token.seq == store.last_seq


async def test_a_slow_reader_gets_each_resource_as_it_was_last(store: Store) -> None:
    hub = WatchHub(store, ring_entries=50)
    one, two = domain("a"), domain("b")
    await put(store, one, two)
    async with watching(hub) as watcher:
        await watcher.snapshot()
        for index in range(300):
            await update(store, one, x=str(index))
        await store.write(lambda tx: tx.event(event(one.name)))
        await store.write(lambda tx: tx.delete(two.name, cause="x"))
        await put(store, domain("z"))
        for index in range(60):
            await update(store, one, y=str(index))
        changes: list[watch_pb2.Change] = []
        while not changes or changes[-1].put.domain.labels.get("y") != "59":
            changes += (await watcher.read()).changes
        told = names(changes)
        assert len(told) < 70
        assert told[-1] == "+a"
        assert {"!a", "-b", "+z"} <= set(told)


async def test_a_reader_behind_the_log_is_ended_with_a_reason(store: Store) -> None:
    hub = WatchHub(store, ring_entries=50)
    one = domain("a")
    await put(store, one)
    async with watching(hub) as watcher:
        await watcher.snapshot()
        await update(store, one, x="1")
        await watcher.until(1)
        for _ in range(6000 // 200):
            await tell(store, *([event(one.name)] * 200))
        await store.compact()
        message = await watcher.read()
        assert requests.error_of(message.bookmark.closing).reason == "SLOW_READER"
        with pytest.raises(errors.SlowReader):
            await watcher.read()
    with pytest.raises(errors.ResumeTokenCompacted):
        async with watching(hub, ask(resume_token=watcher.token)) as again:
            await again.read()


async def refused(hub: WatchHub, token: str, **rest: object) -> errors.VirtfleetError:
    with pytest.raises(errors.VirtfleetError) as caught:
        async with watching(hub, ask(resume_token=token, **rest)) as watcher:
            await watcher.read()
    return caught.value


async def test_tokens_of_elsewhere_are_refused(store: Store, tmp_path: Path) -> None:
    hub = WatchHub(store)
    await put(store, domain("a"))
    async with watching(hub) as watcher:
        await watcher.snapshot()
    token = watcher.token
    for garbage in ("x", "ä", token[:-2], token + "AA", token[:10] + "A" + token[11:] + "=", "A" * 5000):
        assert (await refused(hub, garbage)).reason == "PAGE_TOKEN_INVALID", garbage
    assert (await refused(hub, token, filter="labels.a = b")).reason == "PAGE_TOKEN_INVALID"
    async with open_store(tmp_path / "other.db") as other:
        assert (await refused(WatchHub(other), token)).reason == "RESUME_TOKEN_COMPACTED"
    future = ResumeToken(store.store_id, store.last_seq + 5, 1).encode()
    assert (await refused(hub, future)).reason == "RESUME_TOKEN_COMPACTED"


async def test_a_store_put_back_from_a_copy_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "d.db"
    async with open_store(path) as store:
        await put(store, domain("a"))
    shutil.copy(path, tmp_path / "copy.db")
    async with open_store(path) as store:
        await put(store, domain("b"))
        async with watching(WatchHub(store)) as watcher:
            await watcher.snapshot()
    path.unlink()
    shutil.copy(tmp_path / "copy.db", path)
    async with open_store(path) as store:
        hub = WatchHub(store)
        assert (await refused(hub, watcher.token)).reason == "RESUME_TOKEN_COMPACTED"
        await put(store, domain("c"))
        assert (await refused(hub, watcher.token)).reason == "RESUME_TOKEN_COMPACTED"


async def test_tokens_of_lists_fit_every_watch(store: Store) -> None:
    hub = WatchHub(store)
    await put(store, domain("a"))
    token = ResumeToken(store.store_id, store.last_seq, store.last_ns, ANY_WATCH).encode()
    empty = ResumeToken(store.store_id, 0, 0).encode()
    await put(store, domain("b"))
    async with watching(hub, ask(resume_token=token, view=BASIC)) as watcher:
        assert names(await watcher.until(1)) == ["+b"]
    async with watching(hub, ask(resume_token=empty)) as watcher:
        assert names(await watcher.until(2)) == ["+a", "+b"]


async def test_past_events_in_pages(store: Store) -> None:
    hub = WatchHub(store)
    for index in range(25):
        await put(store, domain(f"d{index}"))
        await store.write(lambda tx, index=index: tx.event(event(f"nodes/n1/domains/d{index % 2}")))  # type: ignore[misc]  # keywords of any field

    def listed(**fields: object) -> watch_pb2.ListEventsResponse:
        request = watch_pb2.ListEventsRequest(parent="nodes/n1", **fields)  # type: ignore[arg-type]  # keywords of any field
        return watch_pb2.ListEventsResponse.FromString(hub.list_events(request))

    first = listed(page_size=10)
    second = listed(page_size=10, page_token=first.next_page_token)
    await store.write(lambda tx: tx.event(event("nodes/n1/domains/late")))
    third = listed(page_size=10, page_token=second.next_page_token)
    assert [len(page.events) for page in (first, second, third)] == [10, 10, 5]
    assert not third.next_page_token
    times = [one.time.ToNanoseconds() for page in (first, second, third) for one in page.events]
    assert times == sorted(times)
    async with watching(hub, ask(resume_token=third.resume_token)) as watcher:
        assert names(await watcher.until(1)) == ["!late"]
    found = listed(filter='resource = "nodes/n1/domains/d1" AND type = DOMAIN_REBOOTED')
    assert len(found.events) == 12
    with pytest.raises(errors.PageTokenInvalid):
        listed(page_size=10, page_token=first.next_page_token, filter="type = DOMAIN_REBOOTED")


class Mirror:
    """Keeps what a watch tells, over many short streams; holds it against the order of generations."""

    def __init__(self, hub: WatchHub, filter_: str, chance: random.Random) -> None:
        self._hub = hub
        self._filter = filter_
        self._chance = chance
        self._newest: dict[str, int] = {}
        self.seen: dict[str, domain_pb2.Domain] = {}
        self.token = ""

    def take(self, change: watch_pb2.Change) -> None:
        if not change.HasField("put"):
            self.seen.pop(change.delete.uid, None)
            return
        one = change.put.domain
        assert one.generation >= self._newest.get(one.uid, 0)
        self._newest[one.uid] = one.generation
        self.seen[one.uid] = one

    async def until(self, uid: str, pause: float) -> dict[str, domain_pb2.Domain]:
        while uid not in self.seen:
            start = {"resume_token": self.token} if self.token else {}
            async with watching(self._hub, ask(filter=self._filter, **start)) as watcher:
                for _ in range(self._chance.randrange(1, 12)):
                    message = await watcher.read()
                    for change in message.changes:
                        self.take(change)
                    self.token = message.resume_token
                    if uid in self.seen:
                        break
                    await asyncio.sleep(pause)
        return self.seen


async def churn(store: Store, chance: random.Random) -> dict[str, domain_pb2.Domain]:
    """Make, change and delete domains; return what there is in the end."""
    held: dict[str, domain_pb2.Domain] = {}
    for _ in range(300):
        id_, env = f"d{chance.randrange(30)}", chance.choice(["prod", "test"])
        if id_ not in held:
            held[id_] = domain(id_, env=env)
            await put(store, held[id_])
        elif chance.random() < 0.2:
            name = held.pop(id_).name
            await store.write(lambda tx, name=name: tx.delete(name, cause="x"))  # type: ignore[misc]  # bound now
        else:
            await update(store, held[id_], env=env)
    return held


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("filter_", ["", "labels.env = prod"])
async def test_watchers_of_any_speed_end_with_what_the_store_has(store: Store, seed: int, filter_: str) -> None:
    chance = random.Random(seed)
    hub = WatchHub(store, ring_entries=20)
    last = domain("last", env="prod")
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        watchers = [
            group.create_task(Mirror(hub, filter_, chance).until(last.uid, pause)) for pause in (0, 0, 0.003, 0.03)
        ]
        held = await churn(store, chance)
        await put(store, last)
    expected = {one.uid: one for one in (*held.values(), last) if not filter_ or one.labels["env"] == "prod"}
    for watcher in watchers:
        assert watcher.result() == expected


async def test_the_old_name_of_a_moved_resource_tells_the_new_one(store: Store) -> None:
    one = domain("a")
    await put(store, one)
    await store.write(lambda tx: tx.move_out(one.name, "nodes/n2/domains/a"))
    with pytest.raises(errors.ResourceMoved) as told:
        store.need(one.name)
    assert told.value.metadata["new_name"] == "nodes/n2/domains/a"
    with pytest.raises(errors.ResourceMoved):
        await store.write(lambda tx: tx.need(one.name))
    other = domain("a")
    await put(store, other)
    await store.write(lambda tx: tx.delete(other.name, cause="d"))
    with pytest.raises(errors.ResourceNotFound):
        store.need(one.name)


async def test_a_resumed_watch_says_at_once_that_it_stands(store: Store) -> None:
    hub = WatchHub(store)
    async with watching(hub) as watcher:
        await watcher.snapshot()
        token = watcher.token
    again = hub.stream(ask(resume_token=token))
    first = watch_pb2.WatchResourcesResponse.FromString(await asyncio.wait_for(anext(again), 5))
    assert first.WhichOneof("marker") == "bookmark"
    assert not first.bookmark.HasField("closing")
    assert first.resume_token == token
    await again.aclose()  # type: ignore[attr-defined]  # an async generator


async def test_watchers_who_ask_for_ever_other_things_cost_no_memory(tmp_path: Path) -> None:
    """In a quiet time, in which nothing makes room: each asks for other events, from the same old place."""
    ring_bytes = 256 * 1024
    async with open_store(tmp_path / "c.db") as store:
        hub = WatchHub(store, ring_bytes=ring_bytes)
        token = ResumeToken(store.store_id, 0, 0).encode()
        for index in range(40):
            one = domain(f"d{index}")
            one.annotations["fill"] = "x" * 4000
            await put(store, one)
        for number in range(200):
            request = watch_pb2.WatchResourcesRequest(parent="nodes/n1", resume_token=token)
            request.event_types.extend([number % 40 + 1, 100 + number])  # type: ignore[list-item]  # as a newer client
            watcher = Watcher(hub.stream(request))
            await watcher.until(40)
            await watcher.stream.aclose()  # type: ignore[attr-defined]  # of a generator
        kept = sum(len(message or b"") for message, _ in hub._shared.values())
        assert kept <= ring_bytes
        assert len(hub._shared) * 512 <= ring_bytes
