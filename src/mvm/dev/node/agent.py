"""The node's agent: the guest agent on this node's virtio-serial ports, and nowhere else.

Run in the node as `python3 -I -S /run/mvm-node/agent.py`. It does not listen on vsock: in a node AF_VSOCK reaches the
tenants' guests, and one of them could connect to the agent and be root here.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from mvm.guest import transports
from mvm.guest.__main__ import main


def arguments(ports: list[tuple[str, str]]) -> list[str]:
    """The guest agent's command line for these (name, device) pairs; opens the devices."""
    words = ["--no-devices", "--no-disks"]
    for _name, path in ports:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        words += ["--port-fd", str(fd)]
    return words


if __name__ == "__main__":
    sys.exit(main(arguments(transports.find_ports())))
