from __future__ import annotations

from collections.abc import AsyncIterator

from virtfleet.common.v1 import operations_pb2
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_client import calls
from virtfleet_client.watch import Resumption, watch_path


def test_the_path_follows_from_the_request() -> None:
    assert watch_path(watch_pb2.WatchResourcesRequest()) == "/virtfleet.compute.v1.WatchService/WatchResources"
    assert (
        watch_path(operations_pb2.WatchOperationsRequest()) == "/virtfleet.common.v1.OperationService/WatchOperations"
    )


def test_a_broken_snapshot_begins_again_and_changes_resume() -> None:
    first = watch_pb2.WatchResourcesRequest(parent="nodes/-")
    resumption = Resumption(first)
    answer = watch_pb2.WatchResourcesResponse(resume_token="t1")
    resumption.note(answer)
    assert resumption.request.WhichOneof("start") != "resume_token"
    answer = watch_pb2.WatchResourcesResponse(resume_token="t2")
    answer.snapshot_end.SetInParent()
    resumption.note(answer)
    assert resumption.request.resume_token == "t2"
    assert resumption.request.parent == "nodes/-"
    resumption.note(watch_pb2.WatchResourcesResponse(resume_token="t3"))
    assert resumption.request.resume_token == "t3"
    resumption.forget()
    assert resumption.request.WhichOneof("start") == "snapshot"
    assert first.WhichOneof("start") is None


def test_the_delay_rises_only_while_nothing_comes() -> None:
    resumption = Resumption(watch_pb2.WatchResourcesRequest(parent="nodes/n1"))
    assert resumption.delay_seconds() == 0.0
    assert 0 < resumption.delay_seconds() <= 0.1
    assert resumption.delay_seconds() >= 0.1
    resumption.note(watch_pb2.WatchResourcesResponse(resume_token="t"))
    assert resumption.delay_seconds() == 0.0


def test_a_mutation_gets_a_request_id_and_keeps_its_own() -> None:
    path = "/virtfleet.compute.v1.DomainService/StartDomain"
    request = domain_pb2.StartDomainRequest(name="nodes/n1/domains/web")
    sent, repeatable = calls.prepare(path, request)
    assert repeatable
    assert sent.request_id
    assert not request.request_id, "the caller's own message, sent again, is another call"
    again, _ = calls.prepare(path, request)
    assert again.request_id != sent.request_id
    kept, repeatable = calls.prepare(path, sent)
    assert repeatable
    assert kept.request_id == sent.request_id


def test_what_is_repeated() -> None:
    read = domain_pb2.GetDomainRequest(name="nodes/n1/domains/web")
    assert calls.prepare("/virtfleet.compute.v1.DomainService/GetDomain", read) == (read, True)
    assert calls.prepare("/somebody.Else/Method", read) == (read, False)


def uploads() -> list[volume_pb2.UploadVolumeRequest]:
    chunk = volume_pb2.UploadVolumeRequest()
    chunk.chunk.data = b"data"
    return [volume_pb2.UploadVolumeRequest(name="nodes/n1/pools/p/volumes/v"), chunk]


async def test_the_first_message_of_a_stream_gets_a_request_id() -> None:
    path = "/virtfleet.storage.v1.VolumeService/UploadVolume"

    async def later() -> AsyncIterator[volume_pb2.UploadVolumeRequest]:
        for message in uploads():
            yield message

    for sent in (
        list(calls.prepare_first(path, uploads())),
        [one async for one in calls.prepare_first_async(path, uploads())],
        [one async for one in calls.prepare_first_async(path, later())],
    ):
        assert [bool(message.request_id) for message in sent] == [True, False]
        assert sent[1] == uploads()[1]
