# SPDX-License-Identifier: GPL-3.0-or-later
"""The prepared cipher does what asyncssh's own does, and is the one that connections get."""

from __future__ import annotations

import pytest
from asyncssh.encryption import GCMEncryption, get_encryption
from node_manager.ssh_cipher import PreparedGcm

HEADER = (32).to_bytes(4, "big")
PACKETS = [bytes([number]) * 32 for number in range(4)]


@pytest.mark.parametrize("bits", [128, 256])
@pytest.mark.parametrize("iv", [bytes(range(12)), b"abcd" + b"\xff" * 8], ids=["plain", "counter-wraps"])
def test_prepared_cipher_and_asyncssh_understand_each_other(bits: int, iv: bytes) -> None:
    name, key = f"aes{bits}-gcm", bytes(range(bits // 8))
    ours, theirs = PreparedGcm.new(name, key, iv), GCMEncryption.new(name, key, iv)
    reader = PreparedGcm.new(name, key, iv)

    for number, packet in enumerate(PACKETS):
        sealed, tag = theirs.encrypt_packet(number, HEADER, packet)
        assert ours.encrypt_packet(number, HEADER, packet) == (sealed, tag)
        first, length = reader.decrypt_header(number, sealed[:16], 4)
        assert length == HEADER
        assert reader.decrypt_packet(number, first, sealed[16:], 4, tag) == packet


def test_changed_packet_is_refused() -> None:
    key, iv = bytes(16), bytes(12)
    sealed, tag = PreparedGcm(key, iv).encrypt_packet(0, HEADER, PACKETS[1])

    assert PreparedGcm(key, iv).decrypt_packet(0, sealed[:16], b"\0" + sealed[17:], 4, tag) is None


def test_connections_get_the_prepared_cipher() -> None:
    for bits in (128, 256):
        found = get_encryption(f"aes{bits}-gcm@openssh.com".encode(), bytes(bits // 8), bytes(12))
        assert type(found) is PreparedGcm
