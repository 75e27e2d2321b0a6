"""Firecracker as a VMM: one process under its own jailer, driven over its API socket.

Runs as: hostd's code in hostd; jailer and VMM in a jail of their own (`jail`). Talks to: the API socket in the jail's
`/run`. May never: follow a name that the VMM's uid could have made, keep guest memory in a file, or start a VMM of a
version it does not know the rules of (`version`).
"""
