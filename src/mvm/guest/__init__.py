"""The agent that runs inside every guest and answers the host on the control channel.

Runs as: root in the guest, one process, one thread, started at boot by the guest's init
(`python3 -I -S .../mvm/guest/__main__.py`) and restarted by it. Talks to: the host, over virtio-serial ports
`mvm.0` to `mvm.7` or AF_VSOCK; never over the network. May never: import anything but
`mvm.guest` and the modules of Debian's `libpython3.11-minimal` (no json, tarfile, shutil, pty, termios; ctypes
only if it is there), nor trust that a connection begins or ends where a client did
(docs/formats/guest-protocol.md).

Between requests it sits in one epoll_wait without a timer, so an idle guest is idle and the first request
after a wake costs one wake-up, one read, one write.
"""
