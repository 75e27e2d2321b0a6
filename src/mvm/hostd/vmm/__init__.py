"""Virtual machine monitors behind one protocol.

Runs as: hostd (root); the VMMs themselves run as the instance's own uid. Talks to: VMM processes over sockets made
before they start. May never: decide what should run, or write guest memory anywhere but into a sealer.
"""
