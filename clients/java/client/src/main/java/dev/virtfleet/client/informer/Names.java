package dev.virtfleet.client.informer;

/** Parts of names of resources. */
final class Names {

    private Names() {}

    /** Returns the node of a name: nodes/n1 of nodes/n1/domains/web. */
    static String nodeOf(String name) {
        int second = name.indexOf('/', name.indexOf('/') + 1);
        return second > 0 ? name.substring(0, second) : name;
    }

    /** Returns the name without its last two segments. */
    static String parentOf(String name) {
        int last = name.lastIndexOf('/');
        return last < 0 ? "" : name.substring(0, Math.max(name.lastIndexOf('/', last - 1), 0));
    }
}
