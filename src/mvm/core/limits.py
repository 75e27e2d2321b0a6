"""Every bound on a length or a count, in one place.

A value that comes from outside (a file, a socket, a guest, a command line) is checked against a bound from
here before it is stored, allocated for, or handed on. Units are in the names: `_MIB` mebibytes, `_BYTES`
bytes, `_S` seconds; a bare name is a count or a number of characters. Bounds are inclusive."""

from __future__ import annotations

from typing import Final

# Identifiers.
TENANT_ID_MAX: Final = 32
POOL_ID_MAX: Final = 16
NODE_ID_HEX: Final = 32
SNAPSHOT_ID_HEX: Final = 32
SHA256_HEX: Final = 64

# The /12 holds 4096 subnets of 256 addresses; index 0 is kept for the host. In a subnet .0 is the network,
# .1 the gateway and .255 the broadcast address, which leaves .2 to .254.
SUBNETS: Final = 4096
SLOTS_PER_TENANT: Final = 253

# Machines.
VCPUS_MIN: Final = 1
VCPUS_MAX: Final = 32
MEM_MIB_MIN: Final = 64  # what a plan may ask for
SPEC_MEM_MIB_MIN: Final = 128  # what a guest of ours boots in
MEM_MIB_MAX: Final = 262_144
DATA_DISK_MIB_MIN: Final = 16
DATA_DISK_MIB_MAX: Final = 4 * 1024 * 1024
DATA_DISK_MIB_DEFAULT: Final = 2048
BOOT_ARGS_MAX: Final = 2048  # the x86 kernel's COMMAND_LINE_SIZE

# Fleet.
TENANTS: Final = SUBNETS - 1
POOLS_PER_TENANT: Final = 16
INSTANCES_PER_POOL: Final = SLOTS_PER_TENANT
INSTANCES_PER_TENANT: Final = SLOTS_PER_TENANT
EGRESS_RULES: Final = 256
REVISIONS_LISTED: Final = 10  # the history a tenant keeps, newest last

# Quotas: sums over a tenant's instances.
QUOTA_VCPUS_MAX: Final = VCPUS_MAX * SLOTS_PER_TENANT
QUOTA_MEM_MIB_MAX: Final = MEM_MIB_MAX * SLOTS_PER_TENANT
QUOTA_DISK_MIB_MAX: Final = DATA_DISK_MIB_MAX * SLOTS_PER_TENANT

# Sleep policy.
IDLE_S_MIN: Final = 5
IDLE_S_MAX: Final = 30 * 24 * 3600
MIN_RUNNING_S_MAX: Final = 24 * 3600

# Secrets: what fits the RAM-backed disk that a guest is shown.
SECRET_FILES: Final = 64
SECRET_NAME_MAX: Final = 64
SECRET_FILE_BYTES: Final = 64 * 1024
SECRETS_TOTAL_BYTES: Final = 512 * 1024

# Text.
FLAKE_REF_MAX: Final = 1024
PATH_MAX: Final = 4096
NAME_MAX: Final = 255
MESSAGE_MAX: Final = 4096
HOST_IDENTITY_MAX: Final = 256
STORE_PATHS: Final = 64
ARTIFACTS: Final = 16
AUDIT_ARGUMENTS: Final = 64

# Documents, in bytes.
SPEC_JSON_BYTES: Final = 256 * 1024
RECORD_JSON_BYTES: Final = 64 * 1024
REVISIONS_JSON_BYTES: Final = 256 * 1024
ALLOCATIONS_JSON_BYTES: Final = 1024 * 1024
FC_CONFIG_BYTES: Final = 64 * 1024
AUDIT_LINE_BYTES: Final = 64 * 1024

# Sleep and wake.
SNAPSHOT_CHAIN_MAX: Final = 64  # incremental snapshots on top of a full one before it must be folded
PHASES: Final = 64

# Numbers that are stored as signed 64-bit elsewhere (nanoseconds since 1970, bytes, counters).
INT63_MAX: Final = 2**63 - 1
