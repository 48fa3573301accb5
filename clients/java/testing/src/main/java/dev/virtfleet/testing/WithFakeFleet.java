package dev.virtfleet.testing;

import java.lang.annotation.Documented;
import java.lang.annotation.ElementType;
import java.lang.annotation.Inherited;
import java.lang.annotation.Retention;
import java.lang.annotation.RetentionPolicy;
import java.lang.annotation.Target;
import org.junit.jupiter.api.extension.ExtendWith;

/**
 * Gives each test that asks for one a fake fleet of its own, which ends with the test: by a parameter {@link FakeFleet}, or
 * {@link dev.virtfleet.client.VirtfleetClient} for a client of it. Of a class it holds for all of its tests; of a method it goes before
 * that of the class.
 */
@Documented
@Inherited
@Target({ElementType.TYPE, ElementType.METHOD})
@Retention(RetentionPolicy.RUNTIME)
@ExtendWith(FakeFleetExtension.class)
public @interface WithFakeFleet {

    /** {@return how many nodes there are: n1, n2 and so on} */
    int nodes() default 1;

    /** {@return how many running domains each node has from the start} */
    int domains() default 0;

    /** {@return faults in force from the start: {@code n7=freeze}, {@code n9=latency:300ms}} */
    String[] faults() default {};
}
