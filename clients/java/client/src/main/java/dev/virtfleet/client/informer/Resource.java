package dev.virtfleet.client.informer;

import com.google.protobuf.Descriptors.Descriptor;
import com.google.protobuf.Descriptors.FieldDescriptor;
import com.google.protobuf.Message;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;

/** What the resources of all kinds have in common: name, uid and labels, whatever their class. */
record Resource(FieldDescriptor nameField, FieldDescriptor uidField, FieldDescriptor labelsField) {

    private static final Map<Descriptor, Resource> KNOWN = new ConcurrentHashMap<>();

    static Resource of(Message message) {
        return KNOWN.computeIfAbsent(message.getDescriptorForType(), described -> new Resource(
                described.findFieldByName("name"), described.findFieldByName("uid"), described.findFieldByName("labels")));
    }

    String name(Message message) {
        return (String) message.getField(nameField);
    }

    String uid(Message message) {
        return (String) message.getField(uidField);
    }

    List<String> labels(Message message) {
        FieldDescriptor key = labelsField.getMessageType().findFieldByName("key");
        FieldDescriptor value = labelsField.getMessageType().findFieldByName("value");
        List<?> entries = (List<?>) message.getField(labelsField);
        return entries.stream()
                .map(Message.class::cast)
                .map(entry -> entry.getField(key) + "=" + entry.getField(value))
                .toList();
    }

    @SuppressWarnings("unchecked") // a copy of a message of that very class
    <T extends Message> T renamed(T message, String name) {
        return (T) message.toBuilder().setField(nameField, name).build();
    }
}
