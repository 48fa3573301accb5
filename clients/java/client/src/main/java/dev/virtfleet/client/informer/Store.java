package dev.virtfleet.client.informer;

import com.google.protobuf.ByteString;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.protobuf.Parser;
import java.util.ArrayList;
import java.util.Collection;
import java.util.HashMap;
import java.util.IdentityHashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;
import java.util.TreeMap;

/** The resources of an informer, by uid, by name and by their indexes. Its informer guards it. */
final class Store<T extends Message> {

    private final Parser<T> parser;
    private final boolean packs;
    private final Map<String, Entry<T>> byUid = new LinkedHashMap<>();
    private final Map<String, Entry<T>> byName = new HashMap<>();
    private final Map<Index<? super T>, Map<String, Map<String, Entry<T>>>> indexes = new IdentityHashMap<>();

    /** One resource: ready to use, or packed as it was sent. */
    private static final class Entry<T> {
        private final String uid;
        private String name;
        private T resource;
        private ByteString packed;
        private List<Place> places = List.of();

        Entry(String uid) {
            this.uid = uid;
        }
    }

    /** Where an entry is found. */
    private record Place(Index<?> index, String value) {}

    /** What a put has done: what was there before, if anything was, and whether it is the same still. */
    record Outcome<T>(Optional<T> before, boolean same, boolean renamed) {}

    Store(Parser<T> parser, boolean packs, Collection<Index<? super T>> indexes) {
        this.parser = parser;
        this.packs = packs;
        indexes.forEach(index -> this.indexes.put(index, new HashMap<>()));
    }

    int size() {
        return byUid.size();
    }

    List<String> uids() {
        return List.copyOf(byUid.keySet());
    }

    Optional<T> get(String uid) {
        return Optional.ofNullable(byUid.get(uid)).map(this::read);
    }

    Optional<T> named(String name) {
        return Optional.ofNullable(byName.get(name)).map(this::read);
    }

    /** Returns the uid of what has a name. */
    Optional<String> holder(String name) {
        return Optional.ofNullable(byName.get(name)).map(entry -> entry.uid);
    }

    Optional<String> nameOf(String uid) {
        return Optional.ofNullable(byUid.get(uid)).map(entry -> entry.name);
    }

    /** Returns what has a value in an index, by name. */
    List<T> find(Index<? super T> index, String value) {
        return bucket(index, value).values().stream().map(this::read).toList();
    }

    List<String> uidsOf(Index<? super T> index, String value) {
        return bucket(index, value).values().stream().map(entry -> entry.uid).toList();
    }

    int count(Index<? super T> index, String value) {
        return bucket(index, value).size();
    }

    boolean has(Index<? super T> index) {
        return indexes.containsKey(index);
    }

    /** Returns how many values an index has something for. */
    int values(Index<? super T> index) {
        return indexes.get(index).size();
    }

    private Map<String, Entry<T>> bucket(Index<? super T> index, String value) {
        Objects.requireNonNull(value, "value");
        Map<String, Map<String, Entry<T>>> found = indexes.get(Objects.requireNonNull(index, "index"));
        if (found == null) {
            throw new IllegalArgumentException("the informer has no such index; add it before the start");
        }
        return found.getOrDefault(value, Map.of());
    }

    Outcome<T> put(T resource) {
        Resource kind = Resource.of(resource);
        String uid = kind.uid(resource);
        String name = kind.name(resource);
        Entry<T> entry = byUid.get(uid);
        Optional<T> before = Optional.ofNullable(entry).map(this::read);
        if (before.isPresent() && before.get().equals(resource)) {
            return new Outcome<>(before, true, false);
        }
        boolean renamed = entry != null && !entry.name.equals(name);
        if (entry == null) {
            entry = new Entry<>(uid);
            byUid.put(uid, entry);
        } else {
            leave(entry);
        }
        entry.name = name;
        entry.resource = packs ? null : resource;
        entry.packed = packs ? resource.toByteString() : null;
        byName.put(name, entry);
        enter(entry, resource);
        return new Outcome<>(before, false, renamed);
    }

    Optional<T> remove(String uid) {
        Entry<T> entry = byUid.remove(uid);
        if (entry == null) {
            return Optional.empty();
        }
        leave(entry);
        return Optional.of(read(entry));
    }

    private void enter(Entry<T> entry, T resource) {
        List<Place> places = new ArrayList<>();
        indexes.forEach((index, buckets) -> {
            for (String value : index.valuesOf(resource)) {
                // By name, so that what is found comes in an order that does not change.
                if (buckets.computeIfAbsent(value, first -> new TreeMap<>()).put(entry.name, entry) == null) {
                    places.add(new Place(index, value));
                }
            }
        });
        entry.places = List.copyOf(places);
    }

    private void leave(Entry<T> entry) {
        byName.remove(entry.name, entry);
        for (Place place : entry.places) {
            Map<String, Map<String, Entry<T>>> buckets = indexes.get(place.index());
            Map<String, Entry<T>> bucket = buckets.get(place.value());
            bucket.remove(entry.name);
            if (bucket.isEmpty()) {
                buckets.remove(place.value());
            }
        }
        entry.places = List.of();
    }

    private T read(Entry<T> entry) {
        if (!packs) {
            return entry.resource;
        }
        try {
            return parser.parseFrom(entry.packed);
        } catch (InvalidProtocolBufferException impossible) {
            throw new IllegalStateException(impossible); // this process has written it
        }
    }
}
