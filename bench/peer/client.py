"""The same work as in our own legs, done with libvirt's Python bindings: `client.py FOLDER MIB QUICK`; prints JSON.

Run by whichever Python has the bindings (Debian's python3-libvirt); needs nothing of this project.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import libvirt  # type: ignore[import-not-found]  # of the distribution, where it is installed

COUNT, CONNECTIONS, DOMAINS = 1000, 50, 100
STREAM_BYTES = 262_120
"""The largest packet of libvirt's streams."""

Figures = dict[str, tuple[float, str, int]]


def took(work: Callable[[], object]) -> float:
    """Return the seconds of a piece of work."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def test_domain(name: str) -> str:
    """Return a domain of libvirt's driver `test`."""
    return (
        f"<domain type='test'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>2</vcpu>"
        "<os><type>hvm</type></os></domain>"
    )


def guest(name: str) -> str:
    """Return a guest of QEMU without disk and network: less than ours has."""
    return (
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>160</memory><vcpu>1</vcpu>"
        "<os><type arch='x86_64' machine='pc'>hvm</type></os><devices><controller type='usb' model='none'/>"
        "<memballoon model='none'/></devices></domain>"
    )


def calls(test: Any, quick: bool) -> Figures:  # noqa: ANN401, FBT001
    """Measure the smallest call."""
    domain = test.lookupByName("test")
    times = [took(domain.info) for _ in range(300 if quick else 3000)]
    return {"peer_call_p50_us": (statistics.median(times) * 1e6, "µs", len(times))}


def bulk(test: Any, quick: bool) -> Figures:  # noqa: ANN401, FBT001
    """Measure a thousand domains: one by one, for there is no other way; lists in both ways."""
    define, start, usual, stats = [], [], [], []
    made: list[Any] = []
    for _ in range(1 if quick else 3):
        made.clear()
        define.append(took(lambda: made.extend([test.defineXML(test_domain(f"bench{n}")) for n in range(COUNT)])))
        start.append(took(lambda: [one.create() for one in made]))
        usual += [took(lambda: [(one.name(), one.info()) for one in test.listAllDomains()]) for _ in range(3)]
        stats += [took(test.getAllDomainStats) for _ in range(3)]
        for one in made:
            one.destroy()
            one.undefine()
    return {
        "peer_define_1000_ms": (statistics.median(define) * 1e3, "ms", len(define)),
        "peer_start_1000_ms": (statistics.median(start) * 1e3, "ms", len(start)),
        "peer_list_1000_ms": (statistics.median(usual) * 1e3, "ms", len(usual)),
        "peer_stats_1000_ms": (statistics.median(stats) * 1e3, "ms", len(stats)),
    }


def events(test: Any, uri: str, quick: bool) -> Figures:  # noqa: ANN401, FBT001
    """Measure from the destroy call to the callback of one listener."""
    listener = libvirt.open(uri)
    arrived: list[float] = []
    seen = threading.Event()

    def stopped(_connection: object, _domain: object, event: int, _detail: int, _given: object) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            arrived.append(time.perf_counter())
            seen.set()

    listener.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, stopped, None)
    domain = test.defineXML(test_domain("benchevent"))
    times = []
    for _ in range(10 if quick else 100):
        domain.create()
        time.sleep(0.005)
        seen.clear()
        began = time.perf_counter()
        domain.destroy()
        if not seen.wait(5):
            raise RuntimeError("no event came")
        times.append(arrived[-1] - began)
    domain.undefine()
    listener.close()
    return {"peer_event_p50_ms": (statistics.median(times) * 1e3, "ms", len(times))}


def fleet(test: Any, uri: str, quick: bool) -> Figures:  # noqa: ANN401, FBT001
    """Measure the state of 50 hosts of 100 domains: 50 connections to the one daemon stand for them."""
    count = 5 if quick else CONNECTIONS
    hosts = [libvirt.open(uri) for _ in range(count)]
    made = [test.defineXML(test_domain(f"benchfleet{n}")) for n in range(DOMAINS)]
    for one in made:
        one.create()

    def usual(host: Any) -> list[Any]:  # noqa: ANN401
        return [(one.name(), one.info()) for one in host.listAllDomains()]

    one_by_one = [took(lambda: [usual(host) for host in hosts]) for _ in range(2)]
    with ThreadPoolExecutor(16) as pool:
        best = [took(lambda: list(pool.map(lambda host: host.getAllDomainStats(), hosts))) for _ in range(5)]
    for one in made:
        one.destroy()
        one.undefine()
    for host in hosts:
        host.close()
    return {
        "peer_fleet_50x100_ms": (statistics.median(best) * 1e3, "ms", len(best)),
        "peer_fleet_50x100_usual_ms": (statistics.median(one_by_one) * 1e3, "ms", len(one_by_one)),
    }


def guests(hypervisor: Any, quick: bool) -> Figures:  # noqa: ANN401, FBT001
    """Measure starts and ends of guests."""
    starts, ends = [], []
    for number in range(3 if quick else 11):
        domain = hypervisor.defineXML(guest(f"bench{number}"))
        began = took(partial(domain.createWithFlags, libvirt.VIR_DOMAIN_START_PAUSED))
        ended = took(domain.destroy)
        domain.undefine()
        if number:
            starts.append(began)
            ends.append(ended)
    return {
        "peer_start_ms": (statistics.median(starts) * 1e3, "ms", len(starts)),
        "peer_destroy_ms": (statistics.median(ends) * 1e3, "ms", len(ends)),
    }


def transfers(hypervisor: Any, folder: Path, mib: int) -> Figures:  # noqa: ANN401
    """Measure a volume each way, with fsync at the end as ours has."""
    size = mib << 20
    source, target, place = folder / "source", folder / "target", folder / "pool"
    place.mkdir()
    with source.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
    pool = hypervisor.storagePoolCreateXML(
        f"<pool type='dir'><name>bench</name><target><path>{place}</path></target></pool>"
    )
    volume = pool.createXML(f"<volume><name>big</name><capacity>{size}</capacity><allocation>0</allocation></volume>")

    def up() -> None:
        stream = hypervisor.newStream()
        volume.upload(stream, 0, size)
        with source.open("rb", buffering=0) as file:
            stream.sendAll(lambda _stream, count, given: given.read(min(count, STREAM_BYTES)), file)
        stream.finish()
        _sync(place / "big")

    def down() -> None:
        stream = hypervisor.newStream()
        volume.download(stream, 0, size)
        with target.open("wb") as file:
            stream.recvAll(lambda _stream, data, given: given.write(data), file)
        stream.finish()
        _sync(target)

    found = {
        "peer_upload_mb_per_second": (size / took(up) / 1e6, "MB/s", 1),
        "peer_download_mb_per_second": (size / took(down) / 1e6, "MB/s", 1),
    }
    volume.delete()
    pool.destroy()
    source.unlink()
    target.unlink()
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def idle(pid: int) -> Figures:
    """Weigh the daemon."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) / 1024
    return {"peer_private_mib": (private, "MiB", 1)}


def main() -> None:
    """Measure all and print it."""
    folder, mib, quick = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "quick"
    libvirt.registerErrorHandler(lambda *_: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def turn() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=turn, daemon=True).start()
    at = f"localhost/{{}}?pkipath={folder / 'pki'}"
    uri = "test+tls://" + at.format("default")
    test, hypervisor = libvirt.open(uri), libvirt.open("qemu+tls://" + at.format("system"))
    found = idle(int((folder / "libvirtd.pid").read_text()))
    found |= calls(test, quick)
    found |= bulk(test, quick)
    found |= events(test, uri, quick)
    found |= fleet(test, uri, quick)
    found |= guests(hypervisor, quick)
    found |= transfers(hypervisor, folder, mib)
    found["version"] = (float(hypervisor.getLibVersion()), "", 1)
    print(json.dumps(found), flush=True)
    # The thread of events does not end.
    os._exit(0)


if __name__ == "__main__":
    main()
