package dev.virtfleet.client.informer;

import com.google.protobuf.Message;
import dev.virtfleet.compute.v1.Disk;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.GuestAddress;
import dev.virtfleet.compute.v1.Interface;
import dev.virtfleet.compute.v1.InterfaceStatus;
import dev.virtfleet.network.v1.Port;
import dev.virtfleet.storage.v1.VolumeAttachment;
import dev.virtfleet.storage.v1.Volume;
import java.util.List;
import java.util.stream.Stream;

/** The indexes that informers of each kind have. */
public final class Indexes {

    /** Finds resources by their node: {@code nodes/n1}. Every kind has it but nodes. */
    public static final Index<Message> NODE = Index.of(resource -> List.of(Names.nodeOf(Resource.of(resource).name(resource))));

    /** Finds resources by a label and its value: {@code app=web}. Every kind has it. */
    public static final Index<Message> LABEL = Index.of(resource -> Resource.of(resource).labels(resource));

    /** Finds domains by a volume of their spec: {@code nodes/n1/pools/p/volumes/v}. */
    public static final Index<Domain> DOMAIN_VOLUME = Index.of(Indexes::volumesOf);

    /** Finds domains by a MAC address, asked for or given. */
    public static final Index<Domain> DOMAIN_MAC = Index.of(Indexes::macsOf);

    /** Finds domains by an address of the guest. */
    public static final Index<Domain> DOMAIN_ADDRESS = Index.of(domain ->
            present(domain.getStatus().getAddressesList().stream().map(GuestAddress::getAddress)));

    /** Finds volumes by their pool: {@code nodes/n1/pools/p}. */
    public static final Index<Volume> VOLUME_POOL = Index.of(volume -> List.of(Names.parentOf(volume.getName())));

    /** Finds volumes by a domain that holds them: {@code nodes/n1/domains/web}. */
    public static final Index<Volume> VOLUME_DOMAIN = Index.of(volume ->
            present(volume.getStatus().getAttachmentsList().stream().map(VolumeAttachment::getDomain)));

    /** Finds ports by their network: {@code nodes/n1/networks/x}. */
    public static final Index<Port> PORT_NETWORK = Index.of(port -> List.of(Names.parentOf(port.getName())));

    /** Finds ports by a MAC address, asked for or given. */
    public static final Index<Port> PORT_MAC = Index.of(port ->
            present(Stream.of(port.getSpec().getMacAddress(), port.getStatus().getMacAddress())));

    /** Finds ports by an address, asked for or given. */
    public static final Index<Port> PORT_ADDRESS = Index.of(port -> present(Stream.concat(
            port.getStatus().getAddressesList().stream(), port.getSpec().getAddressesList().stream())));

    private Indexes() {}

    private static List<String> volumesOf(Domain domain) {
        String node = Names.nodeOf(domain.getName());
        return present(domain.getSpec().getDisksMap().values().stream().map(Disk::getVolume))
                .stream()
                .map(volume -> volume.startsWith("nodes/") ? volume : node + "/" + volume)
                .toList();
    }

    private static List<String> macsOf(Domain domain) {
        Stream<String> wanted = domain.getSpec().getInterfacesMap().values().stream().map(Interface::getMacAddress);
        Stream<String> resolved =
                domain.getStatus().getResolvedSpec().getInterfacesMap().values().stream().map(Interface::getMacAddress);
        Stream<String> given = domain.getStatus().getInterfacesList().stream().map(InterfaceStatus::getMacAddress);
        return present(Stream.of(wanted, resolved, given).flatMap(addresses -> addresses));
    }

    private static List<String> present(Stream<String> values) {
        return values.filter(value -> !value.isEmpty()).distinct().toList();
    }
}
