"""A fleet in one process, for tests of controllers.

The gateway and the compute service are the real code with the `test` driver; what is left out is the network between
them (`transport`) and, with it, the certificates of nodes. Clients come in over TCP with mutual TLS as they do at a
real gateway. Faults are injected where the network would have them: between gateway and nodes, and at the door.
"""
