package dev.virtfleet.client.informer;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.util.Timestamps;
import dev.virtfleet.compute.v1.Disk;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.DomainSpec;
import dev.virtfleet.compute.v1.DomainState;
import dev.virtfleet.compute.v1.DomainStatus;
import dev.virtfleet.compute.v1.Interface;
import dev.virtfleet.compute.v1.Memory;
import java.util.List;
import java.util.UUID;
import org.junit.jupiter.api.Test;

class MemoryTest {

    private static final int COUNT = 2000;
    private static final List<Index<? super Domain>> INDEXES =
            List.of(Indexes.NODE, Indexes.LABEL, Indexes.DOMAIN_VOLUME, Indexes.DOMAIN_MAC, Indexes.DOMAIN_ADDRESS);

    /** A running domain as a watch sends one. */
    private static Domain domain(int number) {
        String node = "nodes/n" + number % 50;
        DomainSpec spec = DomainSpec.newBuilder()
                .setDriver("qemu")
                .setMemory(Memory.newBuilder().setMaximumBytes(1L << 30))
                .putDisks("root", Disk.newBuilder().setVolume(node + "/pools/default/volumes/root-" + number).build())
                .putInterfaces("lan", Interface.newBuilder()
                        .setNetwork(node + "/networks/default")
                        .setMacAddress(String.format("06:00:00:00:%02x:%02x", number >> 8, number & 255))
                        .build())
                .build();
        return Domain.newBuilder()
                .setName(node + "/domains/web-" + number)
                .setUid(UUID.randomUUID().toString())
                .setEtag(Integer.toHexString(number))
                .putLabels("app", "web")
                .setCreateTime(Timestamps.fromMillis(number))
                .setSpec(spec)
                .setStatus(DomainStatus.newBuilder()
                        .setState(DomainState.DOMAIN_STATE_RUNNING)
                        .setActive(true)
                        .setRuntimeId(UUID.randomUUID().toString())
                        .setActiveSpec(spec)
                        .setResolvedSpec(spec))
                .build();
    }

    private static long bytesOfEach(boolean packs) throws InterruptedException, InvalidProtocolBufferException {
        Store<Domain> store = new Store<>(Domain.parser(), packs, INDEXES);
        long before = used();
        for (int number = 0; number < COUNT; number++) {
            store.put(Domain.parseFrom(domain(number).toByteArray()));
        }
        long after = used();
        assertEquals(COUNT, store.size());
        return (after - before) / COUNT;
    }

    private static long used() throws InterruptedException {
        for (int round = 0; round < 2; round++) {
            System.gc();
            Thread.sleep(20);
        }
        return Runtime.getRuntime().totalMemory() - Runtime.getRuntime().freeMemory();
    }

    @Test
    void packedResourcesTakeLessThanHalfOfTheMemory() throws Exception {
        bytesOfEach(true); // what is loaded once
        long packed = bytesOfEach(true);
        long decoded = bytesOfEach(false);
        assertTrue(packed * 2 < decoded, packed + " bytes packed, " + decoded + " decoded");
    }
}
