"""The development node: a Linux machine in which everything mvm needs is real, on any developer's computer.

Runs as: the developer's command, root on Linux (the image is made of files that root owns). Talks to: the node, over
its control channel on Linux (`mvm.hostd.guest_channel`, the agent of `mvm.guest` inside), through Lima on macOS.
May never: give the node a way into the host (no shared directory, no network, no key), take a package from anywhere
but the machine's own apt and pip settings, leave a process behind after `stop`.

What is where: `recipe` says what an image is made of, and its digest names the image; `image` builds it;
`wheel` and `seed` carry this very mvm into the node at each start; `machine` is QEMU's command line; `qemu` and `lima`
are the two drivers behind `model.NodeDriver`; `sync` makes the archive that `mvm sync` sends.
"""
