"""The lives that the writer leads resources through, and which of them a round needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf import empty_pb2

from tests.chaos.caller import Batch, Caller, Gone, Told, told
from virtfleet.compute.v1 import domain_pb2
from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet.network.v1 import network_pb2, port_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2

NODE: Final = "nodes/n1"
PLACE: Final = "chaos"
"""The pool and the network that the rounds have made."""
_MIB: Final = 1 << 20
_SUBNETS: Final = 70
"""How many networks one round may make; their subnets must not meet."""
_BATCH: Final = 2


def _labelled(name: str, step: int) -> domain_pb2.UpdateDomainRequest:
    update = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name=name, labels={"n": str(step)}))
    update.update_mask.paths.append("labels")
    return update


def _creation(domain_id: str, driver: str) -> domain_pb2.CreateDomainRequest:
    create = domain_pb2.CreateDomainRequest(parent=NODE, domain_id=domain_id)
    spec = create.domain.spec
    spec.driver, spec.memory.maximum_bytes, spec.cpu.vcpu_count = driver, 64 * _MIB, 1
    return create


class Guests(Caller):
    """Makes real QEMU guests with a disk and a port on a NAT network."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        del number
        name, domains = f"{NODE}/domains/{resource_id}", self._fleet.domains
        self._change("create", name, domains.CreateDomain, self._creation(resource_id), domain_pb2.Domain)
        start = domain_pb2.StartDomainRequest(name=name, paused=True)
        self._change("start", name, domains.StartDomain, start, domain_pb2.Domain)
        for step in range(self._chance.randint(1, 3)):
            self._change("update", name, domains.UpdateDomain, self._update(name, step), domain_pb2.Domain)
        if keep:
            return
        delete = domain_pb2.DeleteDomainRequest(name=name, delete_volumes=True)
        if self._chance.random() < 0.5:
            stop = domain_pb2.StopDomainRequest(name=name, mode=domain_pb2.STOP_MODE_FORCE)
            self._change("stop", name, domains.StopDomain, stop, domain_pb2.Domain)
        else:
            delete.stop = True
        self._change("delete", name, domains.DeleteDomain, delete, empty_pb2.Empty)

    def _creation(self, domain_id: str) -> domain_pb2.CreateDomainRequest:
        create = _creation(domain_id, "qemu")
        disk = create.new_volumes.add(pool=f"pools/{PLACE}", volume_id=domain_id)
        disk.spec.format, disk.spec.capacity_bytes = volume_pb2.VOLUME_FORMAT_QCOW2, 8 * _MIB
        create.domain.spec.disks["root"].volume = f"pools/{PLACE}/volumes/{domain_id}"
        create.domain.spec.interfaces["lan"].network = f"networks/{PLACE}"
        return create

    def _update(self, name: str, step: int) -> domain_pb2.UpdateDomainRequest:
        """Change labels, or what the running guest is given."""
        update = _labelled(name, step)
        if self._chance.random() < 0.5:
            update.domain.spec.disks["root"].throttle.iops_max = 1000 + step
            update.update_mask.paths.append("spec.disks.root.throttle.iops_max")
        return update


class Bulk(Caller):
    """Makes domains of the driver without processes: many changes, quickly. Its runs would end with the service."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        del number
        name, domains = f"{NODE}/domains/{resource_id}", self._fleet.domains
        self._change("create", name, domains.CreateDomain, _creation(resource_id, "test"), domain_pb2.Domain)
        for step in range(self._chance.randint(1, 3)):
            self._change("update", name, domains.UpdateDomain, _labelled(name, step), domain_pb2.Domain)
        if not keep:
            delete = domain_pb2.DeleteDomainRequest(name=name)
            self._change("delete", name, domains.DeleteDomain, delete, empty_pb2.Empty)


class Batches(Caller):
    """Makes, starts, stops and deletes real guests without devices, two in a batch."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        del number
        domains = self._fleet.domains
        ids = {f"{NODE}/domains/{resource_id}-{index}": f"{resource_id}-{index}" for index in range(_BATCH)}

        def create(names: Sequence[str]) -> Any:
            requests = [_creation(ids[name], "qemu") for name in names]
            return domain_pb2.BatchCreateDomainsRequest(parent=NODE, requests=requests)

        def start(names: Sequence[str]) -> Any:
            requests = [domain_pb2.StartDomainRequest(name=name, paused=True) for name in names]
            return domain_pb2.BatchStartDomainsRequest(parent=NODE, requests=requests)

        def stop(names: Sequence[str]) -> Any:
            requests = [domain_pb2.StopDomainRequest(name=name, mode=domain_pb2.STOP_MODE_FORCE) for name in names]
            return domain_pb2.BatchStopDomainsRequest(parent=NODE, requests=requests)

        def delete(names: Sequence[str]) -> Any:
            requests = [domain_pb2.DeleteDomainRequest(name=name) for name in names]
            return domain_pb2.BatchDeleteDomainsRequest(parent=NODE, requests=requests)

        creations = Batch(domains.BatchCreateDomains, domain_pb2.BatchCreateDomainsResponse, create)
        starts = Batch(domains.BatchStartDomains, domain_pb2.BatchStartDomainsResponse, start)
        stops = Batch(domains.BatchStopDomains, domain_pb2.BatchStopDomainsResponse, stop)
        deletions = Batch(domains.BatchDeleteDomains, domain_pb2.BatchDeleteDomainsResponse, delete)
        left = list(ids)
        for what, batch in (("create", creations), ("start", starts), ("stop", stops), ("delete", deletions)):
            if not left or (keep and what == "stop"):
                return
            left = self._change_all(what, left, batch)


class Volumes(Caller):
    """Makes volumes that no domain uses, and lets them grow."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        del number
        parent, volumes = f"{NODE}/pools/{PLACE}", self._fleet.volumes
        name, capacity = f"{parent}/volumes/{resource_id}", 4 * _MIB
        create = volume_pb2.CreateVolumeRequest(parent=parent, volume_id=resource_id)
        create.volume.spec.format = volume_pb2.VOLUME_FORMAT_QCOW2
        create.volume.spec.capacity_bytes = capacity
        self._change("create", name, volumes.CreateVolume, create, volume_pb2.Volume)
        for _ in range(self._chance.randint(1, 3)):
            capacity += _MIB
            resize = volume_pb2.ResizeVolumeRequest(name=name, capacity_bytes=capacity)
            self._change("update", name, volumes.ResizeVolume, resize, volume_pb2.Volume)
        if not keep:
            delete = volume_pb2.DeleteVolumeRequest(name=name)
            self._change("delete", name, volumes.DeleteVolume, delete, empty_pb2.Empty)


class Uploads(Caller):
    """Makes raw volumes and replaces what is in them."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        del number
        parent, volumes = f"{NODE}/pools/{PLACE}", self._fleet.volumes
        name = f"{parent}/volumes/{resource_id}"
        create = volume_pb2.CreateVolumeRequest(parent=parent, volume_id=resource_id)
        create.volume.spec.format = volume_pb2.VOLUME_FORMAT_RAW
        create.volume.spec.capacity_bytes = _MIB
        self._change("create", name, volumes.CreateVolume, create, volume_pb2.Volume)
        for _ in range(self._chance.randint(1, 3)):
            data = self._chance.randbytes(self._chance.randint(1, 8) * (_MIB // 8))
            self._insist("update", name, lambda request_id, data=data: self._upload(name, data, request_id))  # type: ignore[misc]  # bound here
        if not keep:
            delete = volume_pb2.DeleteVolumeRequest(name=name)
            self._change("delete", name, volumes.DeleteVolume, delete, empty_pb2.Empty)

    def _upload(self, name: str, data: bytes, request_id: str) -> Told:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"

        def pieces() -> Iterator[volume_pb2.UploadVolumeRequest]:
            start = volume_pb2.UploadStart(length_bytes=len(data), digest=digest)
            yield volume_pb2.UploadVolumeRequest(name=name, request_id=request_id, start=start)
            for offset in range(0, len(data), _MIB // 8):
                piece = volume_pb2.UploadVolumeRequest()
                piece.chunk.offset, piece.chunk.data = offset, data[offset : offset + _MIB // 8]
                yield piece

        answer = self._answered(lambda: self._fleet.volumes.UploadVolume(pieces(), timeout=30), request_id)
        return {**told(answer.volume), "content": digest}


class Pools(Caller):
    """Makes pools, stops them, starts them, and takes them away."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        del number
        name, pools = f"{NODE}/pools/{resource_id}", self._fleet.pools
        create = pool_pb2.CreatePoolRequest(parent=NODE, pool_id=resource_id)
        create.pool.spec.dir.SetInParent()
        self._change("create", name, pools.CreatePool, create, pool_pb2.Pool)
        start = pool_pb2.StartPoolRequest(name=name)
        self._change("start", name, pools.StartPool, start, pool_pb2.Pool)
        update = pool_pb2.UpdatePoolRequest(pool=pool_pb2.Pool(name=name, labels={"n": "1"}))
        update.update_mask.paths.append("labels")
        self._change("update", name, pools.UpdatePool, update, pool_pb2.Pool)
        if keep:
            return
        self._change("stop", name, pools.StopPool, pool_pb2.StopPoolRequest(name=name), pool_pb2.Pool)
        self._change("delete", name, pools.DeletePool, pool_pb2.DeletePoolRequest(name=name), empty_pb2.Empty)


class Networks(Caller):
    """Makes isolated networks with a bridge, rules and a dnsmasq each, changes what DHCP serves, and has ports on them."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        name, networks = f"{NODE}/networks/{resource_id}", self._fleet.networks
        create = network_pb2.CreateNetworkRequest(parent=NODE, network_id=resource_id)
        create.network.spec.isolated.SetInParent()
        prefix = f"192.168.{180 + number % _SUBNETS}"
        lan = create.network.spec.subnets["lan"]
        lan.prefix = f"{prefix}.0/24"
        lan.dhcp.ranges.add(first=f"{prefix}.10", last=f"{prefix}.250")
        self._change("create", name, networks.CreateNetwork, create, network_pb2.Network)
        start = network_pb2.StartNetworkRequest(name=name)
        self._change("start", name, networks.StartNetwork, start, network_pb2.Network)
        update = network_pb2.UpdateNetworkRequest(network=network_pb2.Network(name=name, labels={"n": "1"}))
        host = update.network.spec.subnets["lan"].dhcp.hosts["web"]
        host.mac_address, host.address = "52:54:00:00:00:01", f"{prefix}.5"
        update.update_mask.paths.extend(["labels", "spec.subnets.lan.dhcp.hosts.web"])
        self._change("update", name, networks.UpdateNetwork, update, network_pb2.Network)
        port, ports = f"{name}/ports/p1", self._fleet.ports
        reserve = port_pb2.CreatePortRequest(parent=name, port_id="p1", port=port_pb2.Port())
        self._change("create", port, ports.CreatePort, reserve, port_pb2.Port)
        if keep:
            return
        self._change("delete", port, ports.DeletePort, port_pb2.DeletePortRequest(name=port), empty_pb2.Empty)
        stop = network_pb2.StopNetworkRequest(name=name)
        self._change("stop", name, networks.StopNetwork, stop, network_pb2.Network)
        delete = network_pb2.DeleteNetworkRequest(name=name)
        self._change("delete", name, networks.DeleteNetwork, delete, empty_pb2.Empty)


class Members(Caller):
    """Has the gateway give join tokens and certificates, and take them back."""

    def _life(self, number: int, resource_id: str, *, keep: bool) -> None:
        del number
        token = f"joinTokens/{resource_id}"
        try:
            self._insist("create", token, lambda request_id: self._give_token(resource_id, request_id))
            if not keep:
                self._insist("delete", token, lambda request_id: self._take_token(token, request_id))
        except Gone:
            # Its secret was in an answer that was lost.
            pass
        holder = f"users/{resource_id}"
        certificate = ""

        def issue(request_id: str) -> Told:
            nonlocal certificate
            certificate, said = self._issue(resource_id, request_id)
            return said

        self._insist("create", holder, issue)
        if not keep:
            self._insist("delete", holder, lambda request_id: self._revoke(certificate, request_id))

    def _give_token(self, token_id: str, request_id: str) -> Told:
        request = enrollment_pb2.CreateJoinTokenRequest(join_token_id=token_id, request_id=request_id)
        request.join_token.spec.node = "nodes/nobody"
        enrollment = self._fleet.enrollment
        return told(self._answered(lambda: enrollment.CreateJoinToken(request, timeout=10), request_id))

    def _take_token(self, name: str, request_id: str) -> Told:
        request = enrollment_pb2.DeleteJoinTokenRequest(name=name, request_id=request_id)
        enrollment = self._fleet.enrollment
        return told(self._answered(lambda: enrollment.DeleteJoinToken(request, timeout=10), request_id))

    def _issue(self, user: str, request_id: str) -> tuple[str, Told]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, user)])
        signed = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        request = enrollment_pb2.IssueUserCertificateRequest(
            user=user,
            roles=["viewer"],
            certificate_request=signed.public_bytes(serialization.Encoding.PEM).decode(),
            request_id=request_id,
        )
        enrollment = self._fleet.enrollment
        answer = self._answered(lambda: enrollment.IssueUserCertificate(request, timeout=10), request_id)
        return answer.certificate.certificate, {"uid": answer.certificate.certificate, "generation": 1}

    def _revoke(self, certificate: str, request_id: str) -> Told:
        request = enrollment_pb2.RevokeCertificateRequest(name=certificate, request_id=request_id)
        enrollment = self._fleet.enrollment
        self._answered(lambda: enrollment.RevokeCertificate(request, timeout=10), request_id)
        return {"uid": certificate, "generation": 0}


ALL: Final = (Guests, Guests, Bulk, Volumes, Networks)
LIVES: Final[dict[str, tuple[type[Caller], ...]]] = {
    "gateway": (*ALL, Members, Members, Uploads),
    "compute": (*ALL, Guests, Batches),
    "storage": (*ALL, Uploads, Pools),
    "network": (*ALL, Networks),
    "node": (*ALL, Batches, Uploads),
    "restart": (*ALL, Batches, Uploads, Members),
}
"""What is done while processes of a kind die, if it is more than `ALL` and one guest more."""


def lives_of(kind: str) -> tuple[type[Caller], ...]:
    """Return what is done while processes of a kind die."""
    return LIVES.get(kind.partition(" ")[0], (*ALL, Guests))
