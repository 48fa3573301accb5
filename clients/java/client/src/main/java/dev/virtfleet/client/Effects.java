package dev.virtfleet.client;

import com.google.protobuf.Descriptors.FieldDescriptor;
import com.google.protobuf.Message;
import dev.virtfleet.type.v1.Effect;
import dev.virtfleet.type.v1.MethodProto;
import io.grpc.MethodDescriptor;
import io.grpc.protobuf.ProtoMethodDescriptorSupplier;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.ConcurrentHashMap;
import java.util.stream.Stream;

/** What a method changes, as its annotation says, and the request_id that makes its repetition harmless. */
final class Effects {

    private static final Map<String, Effect> KNOWN = new ConcurrentHashMap<>();

    private Effects() {}

    /** Returns what a method changes; EFFECT_UNSPECIFIED where nothing says so. */
    static Effect of(MethodDescriptor<?, ?> method) {
        return KNOWN.computeIfAbsent(method.getFullMethodName(), name -> declared(method));
    }

    private static Effect declared(MethodDescriptor<?, ?> method) {
        if (method.getSchemaDescriptor() instanceof ProtoMethodDescriptorSupplier schema) {
            var options = schema.getMethodDescriptor().getOptions();
            if (options.hasExtension(MethodProto.method)) {
                return options.getExtension(MethodProto.method).getEffect();
            }
        }
        // The standard services have no rule of ours: their reads are named as such, everything else is never repeated.
        String name = String.valueOf(method.getBareMethodName());
        boolean reads = Stream.of("Get", "List", "Wait", "Check").anyMatch(name::startsWith);
        return reads ? Effect.EFFECT_NONE : Effect.EFFECT_UNSPECIFIED;
    }

    /**
     * What is sent for a request.
     *
     * @param message the request, with a request_id where it is a mutation
     * @param repeatable whether sending it once more has no second effect
     */
    record Prepared<Q>(Q message, boolean repeatable) {}

    /**
     * Gives a mutation its request_id if the caller has not. The caller's message stays as it is: sent a second time it is a second
     * call, not a repetition of the first.
     */
    static <Q> Prepared<Q> prepare(MethodDescriptor<Q, ?> method, Q request) {
        if (of(method) == Effect.EFFECT_NONE) {
            return new Prepared<>(request, true);
        }
        if (!(request instanceof Message message)) {
            return new Prepared<>(request, false);
        }
        FieldDescriptor field = message.getDescriptorForType().findFieldByName("request_id");
        if (field == null) {
            return new Prepared<>(request, false);
        }
        if (!message.getField(field).equals("")) {
            return new Prepared<>(request, true);
        }
        Message identified = message.toBuilder().setField(field, UUID.randomUUID().toString()).build();
        @SuppressWarnings("unchecked") // built from a request of that very class
        Q prepared = (Q) identified;
        return new Prepared<>(prepared, true);
    }
}
