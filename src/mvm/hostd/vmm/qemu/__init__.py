"""QEMU as a VMM: the `microvm` machine, driven over QMP."""
