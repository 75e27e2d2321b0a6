"""What runs as root and owns every resource: disks, keys, links, sealed memory, the VMM, the audit log.

Runs as: root. Talks to: the kernel, and the programs started through `mvm.linux.process`. May never: speak
to a coordinator, decide what should run, or trust a path, length or name it did not check itself.
"""
