"""Drives and network interfaces: what is opened for them, when, and what is kept open. ApiError where it cannot be."""

from __future__ import annotations

import fcntl
import os
import struct

from .requests import ApiError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


class Drive:
    """Opened at once, read-write unless it is read-only, and kept open."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.id: str = config["drive_id"]
        self.config = config
        kind = "Drive config error: Unable to create the virtio block device:"
        if config.get("path_on_host") is None or config.get("is_read_only") is None or config.get("socket"):
            raise ApiError(f"{kind} Invalid block config.")
        self._fd = self._open(config["path_on_host"], f"{kind} Virtio backend error:")

    def _open(self, path: str, kind: str) -> int:
        flags = os.O_RDONLY if self.config["is_read_only"] else os.O_RDWR
        try:
            return os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise ApiError(
                f"{kind} Error manipulating the backing file: {os.strerror(error.errno or 0)} (os error {error.errno}) "
                f"{path}"
            ) from None

    def update(self, value: dict[str, Any]) -> None:
        if value.get("path_on_host") is not None:
            kind = "Drive config error: Unable to patch the block device: Virtio backend error:"
            new = self._open(value["path_on_host"], kind)
            os.close(self._fd)
            self._fd = new
            self.config["path_on_host"] = value["path_on_host"]
        if value.get("rate_limiter") is not None:
            self.config["rate_limiter"] = value["rate_limiter"]

    def close(self) -> None:
        os.close(self._fd)

    def shown(self) -> dict[str, Any]:
        return {
            "drive_id": self.id,
            "partuuid": self.config.get("partuuid"),
            "is_root_device": self.config["is_root_device"],
            "cache_type": self.config.get("cache_type", "Unsafe"),
            "is_read_only": self.config["is_read_only"],
            "path_on_host": self.config["path_on_host"],
            "rate_limiter": self.config.get("rate_limiter"),
            "io_engine": self.config.get("io_engine") or "Sync",
            "socket": None,
        }


class Tap:
    """The tap of that name, held by its one queue; made if it is not there and the caller may."""

    def __init__(self, config: dict[str, Any], kind: str) -> None:
        self.id: str = config["iface_id"]
        self.config = config
        name: str = config["host_dev_name"]
        mtu = config.get("mtu")
        try:
            self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ApiError(
                f"{kind} Open tap device failed: Couldn't open /dev/net/tun: {os.strerror(error.errno or 0)} "
                f"(os error {error.errno})"
            ) from None
        try:
            if len(name.encode()) > 15:
                raise ApiError(f"{kind} Open tap device failed: Invalid interface name")
            request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
            fcntl.ioctl(self._fd, _TUNSETIFF, request)
            if mtu is not None and not 68 <= mtu <= 65535:
                raise ApiError(f"{kind} MTU {mtu} is out of range [68, 65535]")
        except OSError as error:
            os.close(self._fd)
            raise ApiError(
                f"{kind} Open tap device failed: Error while creating ifreq structure: "
                f"{os.strerror(error.errno or 0)} (os error {error.errno}). Invalid TUN/TAP Backend provided by "
                f"{name}. Check our documentation on setting up the network devices."
            ) from None
        except ApiError:
            os.close(self._fd)
            raise

    def close(self) -> None:
        os.close(self._fd)

    def shown(self) -> dict[str, Any]:
        names = ("iface_id", "host_dev_name", "guest_mac", "mtu", "rx_rate_limiter", "tx_rate_limiter")
        return {name: self.config.get(name) for name in names}
