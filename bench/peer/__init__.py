"""libvirt beside us: a daemon of its own with TLS on loopback, and the same work as in our own legs."""
