"""Ethernet frames as a guest would send them, true or forged, and the few words needed to read answers."""

from __future__ import annotations

import struct

ARP, IPV4, IPV6, VLAN = 0x0806, 0x0800, 0x86DD, 0x8100
ICMP, TCP, UDP = 1, 6, 17
BROADCAST = "ff:ff:ff:ff:ff:ff"


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ip(text: str) -> bytes:
    return bytes(int(part) for part in text.split("."))


def checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ethernet(source: str, target: str, kind: int, payload: bytes, *, vlan: int | None = None) -> bytes:
    tag = b"" if vlan is None else struct.pack("!HH", VLAN, vlan)
    return (mac(target) + mac(source) + tag + struct.pack("!H", kind) + payload).ljust(60, b"\0")


def arp(operation: int, sender_mac: str, sender_ip: str, target_ip: str) -> bytes:
    head = struct.pack("!HHBBH", 1, IPV4, 6, 4, operation)
    return head + mac(sender_mac) + ip(sender_ip) + bytes(6) + ip(target_ip)


def ipv4(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    head = (
        struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0) + ip(source) + ip(target)
    )
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def echo(identifier: int, *, reply: bool = False) -> bytes:
    body = struct.pack("!BBHHH", 0 if reply else 8, 0, 0, identifier, 1) + b"mvm"
    return body[:2] + struct.pack("!H", checksum(body)) + body[4:]


def udp(source_port: int, target_port: int, data: bytes = b"mvm") -> bytes:
    # Checksum 0 is "none" for UDP over IPv4.
    return struct.pack("!HHHH", source_port, target_port, 8 + len(data), 0) + data


def tcp(
    source: str, target: str, source_port: int, target_port: int, *, flags: int = 0x02, seq: int = 1
) -> bytes:
    """A segment without data; SYN unless `flags` say otherwise."""
    body = struct.pack("!HHIIBBHHH", source_port, target_port, seq, 0, 0x50, flags, 1024, 0, 0)
    pseudo = ip(source) + ip(target) + struct.pack("!BBH", 0, TCP, len(body))
    return body[:16] + struct.pack("!H", checksum(pseudo + body)) + body[18:]


def kind(frame: bytes) -> int:
    return int.from_bytes(frame[12:14], "big")


def addresses(frame: bytes) -> tuple[str, str]:
    """(source, target) of an IPv4 frame."""
    return ".".join(map(str, frame[26:30])), ".".join(map(str, frame[30:34]))


def protocol(frame: bytes) -> int:
    return frame[23]
