# SPDX-License-Identifier: GPL-3.0-or-later
"""AES-GCM for asyncssh with the key prepared once per connection: its own prepares it anew for every packet.

That costs more than opening the packet, and a fleet's lines are short and many.
"""

from __future__ import annotations

from asyncssh.encryption import Encryption, register_encryption_alg
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_TAG_BYTES = 16
_FIXED_BYTES, _COUNTER_BYTES = 4, 8


class PreparedGcm(Encryption):
    """One direction of a connection (RFC 5647): a fixed part and a counter make the nonce of each packet."""

    def __init__(self, key: bytes, iv: bytes) -> None:
        self._aead = AESGCM(key)
        self._fixed = iv[:_FIXED_BYTES]
        self._counter = int.from_bytes(iv[_FIXED_BYTES:], "big")

    @classmethod
    def new(
        cls,
        cipher_name: str,  # noqa: ARG003
        key: bytes,
        iv: bytes,
        mac_alg: bytes = b"",  # noqa: ARG003
        mac_key: bytes = b"",  # noqa: ARG003
        etm: bool = False,  # noqa: ARG003
    ) -> PreparedGcm:
        """Prepare the key that was agreed on."""
        return cls(key, iv)

    @classmethod
    def needs_mac(cls) -> bool:
        """Tell that the tag is its own."""
        return False

    @classmethod
    def get_mac_params(cls, mac_alg: bytes) -> tuple[int, int, bool]:  # noqa: ARG003
        """Give the sizes of the key and of the tag, and that the length stays readable."""
        return 0, _TAG_BYTES, True

    def encrypt_packet(self, seq: int, header: bytes, packet: bytes) -> tuple[bytes, bytes]:  # noqa: ARG002
        """Seal a packet; its length goes along readable."""
        sealed = self._aead.encrypt(self._nonce(), packet, header)
        return header + sealed[:-_TAG_BYTES], sealed[-_TAG_BYTES:]

    def decrypt_header(self, seq: int, first_block: bytes, header_len: int) -> tuple[bytes, bytes]:  # noqa: ARG002
        """Give the length, which is readable."""
        return first_block, first_block[:header_len]

    def decrypt_packet(self, seq: int, first: bytes, rest: bytes, header_len: int, mac: bytes) -> bytes | None:  # noqa: ARG002
        """Open a packet; None if somebody changed it."""
        try:
            return self._aead.decrypt(self._nonce(), b"".join((first[header_len:], rest, mac)), first[:header_len])
        except InvalidTag:
            return None

    def _nonce(self) -> bytes:
        counter = self._counter
        self._counter = (counter + 1) & (1 << 8 * _COUNTER_BYTES) - 1
        return self._fixed + counter.to_bytes(_COUNTER_BYTES, "big")


# In the place of its own; among the default ones the names are already.
for _bits in (128, 256):
    register_encryption_alg(f"aes{_bits}-gcm@openssh.com".encode(), PreparedGcm, f"aes{_bits}-gcm", default=False)
