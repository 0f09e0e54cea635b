# SPDX-License-Identifier: GPL-3.0-or-later
"""Whom to ask about a silent node, and what the answers mean together with how its site and the fleet are heard.

Pure: reads what the watches know of their nodes and the clock that it is given; asks nobody itself. Imports the vocabulary only.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from node_manager.domain import Liveness

# Looking on costs time that other silent nodes wait for; where so many in a row are silent, those left hardly matter.
_LOOKED_AT = 500
# A dark fleet is judged node by node: who lives is counted once for all that are judged within this time.
_COUNTED_FOR_SECONDS = 1.0


class Answer(Enum):
    """What a peer found when it tried TCP to the silent node."""

    # Accepted or refused: the node's kernel lives.
    SEEN = "seen"
    BLIND = "blind"
    # Could not look, or didn't answer.
    CANNOT_TELL = "cannot_tell"


class Finding(Enum):
    """What the answers amount to."""

    SEEN = "seen"
    BLIND = "blind"
    DARK = "dark"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Findings:
    """What is known from others; not *settled* while a little waiting, or asking again, may tell more."""

    finding: Finding
    message: str
    settled: bool = True


class Watched(Protocol):
    """What is known of a node that is watched."""

    @property
    def liveness(self) -> Liveness | None:
        """What is concluded from its silence; None while it isn't silent."""

    @property
    def streaming(self) -> bool:
        """Whether its stream is open."""

    @property
    def last_sign_at(self) -> float:
        """When it last gave a sign of life."""


class _Pulse(Enum):
    """How a node is heard; who sleeps, or has no stream to be heard on, counts neither way."""

    ALIVE = "alive"
    DOUBTFUL = "doubtful"
    SILENT = "silent"
    UNKNOWN = "unknown"


class _Counts(NamedTuple):
    alive: int = 0
    doubtful: int = 0
    silent: int = 0


@dataclass(slots=True)
class _Group:
    """The nodes of a site, or of the fleet, in an order that removing one doesn't cost."""

    names: list[str] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    counts: _Counts = field(default_factory=_Counts)
    counted_at: float = float("-inf")

    def add(self, name: str) -> None:
        """Take a node in."""
        self.places[name] = len(self.names)
        self.names.append(name)
        self.counted_at = float("-inf")

    def remove(self, name: str) -> None:
        """Let a node go: the last one takes its place."""
        place = self.places.pop(name)
        last = self.names.pop()
        if last != name:
            self.names[place] = last
            self.places[last] = place
        self.counted_at = float("-inf")


class Fleet:
    """All watched nodes by site.

    *fresh_seconds* is how long after its last sign a node counts as alive: a beat's interval and some slack. Nodes that
    name no site share the empty one.
    """

    def __init__(self, fresh_seconds: float, peers_of_site: int, peers_elsewhere: int) -> None:
        self._fresh_seconds = fresh_seconds
        self._peers_of_site = peers_of_site
        self._peers_elsewhere = peers_elsewhere
        self._watches: dict[str, tuple[str, Watched]] = {}
        self._sites: dict[str, _Group] = {}
        self._all = _Group()
        self._witness = ""

    def __len__(self) -> int:
        return len(self._watches)

    def add(self, node_id: str, site: str | None, watch: Watched) -> None:
        """Take a node in, or put a new watch or site in place of its old one."""
        self.remove(node_id)
        site = site or ""
        self._watches[node_id] = (site, watch)
        self._sites.setdefault(site, _Group()).add(node_id)
        self._all.add(node_id)

    def remove(self, node_id: str) -> None:
        """Forget a node; one that isn't known is none."""
        known = self._watches.pop(node_id, None)
        if known is None:
            return
        group = self._sites[known[0]]
        group.remove(node_id)
        if not group.names:
            del self._sites[known[0]]
        self._all.remove(node_id)

    def choose(self, node_id: str, now: float, attempt: int = 0) -> list[str]:
        """Name the living nodes to ask about a silent one, those of its site first; each *attempt* begins elsewhere."""
        site = self._watches[node_id][0]
        start = zlib.crc32(f"{node_id}/{attempt}".encode())
        near = self._pick(self._sites[site].names, start, now, self._peers_of_site, not_node=node_id)
        far = self._pick(self._all.names, start, now, self._peers_elsewhere, not_site=site)
        return near + far

    def weigh(self, node_id: str, answers: Mapping[str, Answer], now: float) -> Findings:
        """Tell what the answers mean now.

        A peer's *seen* holds whatever became of the peer. Its *blind* counts only while the peer itself is heard: when
        a site dies bit by bit, the first to go must not be taken for a single loss on the word of the next.
        """
        site = self._watches[node_id][0]
        seen = sorted(name for name, answer in answers.items() if answer is Answer.SEEN)
        if seen:
            return Findings(Finding.SEEN, f"seen by {', '.join(seen)}")
        blind = sorted(name for name, answer in answers.items() if self._counts_as_blind(name, answer, site, now))
        alive, doubtful, silent = self._others(node_id, site, now)
        if blind:
            # Of a large site some are always late; where half are, it may be dying.
            return Findings(Finding.BLIND, f"not seen by {', '.join(blind)} of its site", settled=doubtful < alive)
        if alive > 0:
            return Findings(Finding.NOBODY, "no living node of its site could tell", settled=False)
        return self._without_witness(now, doubtful, silent)

    def _without_witness(self, now: float, doubtful: int, silent: int) -> Findings:
        """Judge a node of whose site nobody is heard."""
        if not self._anybody_lives(now):
            # The node itself is one of the silent.
            fleet = self._counts(self._all, now)
            if fleet.doubtful + fleet.silent > 1:
                message = "no node of the fleet is heard; the manager may be cut off itself"
                return Findings(Finding.DARK, message, settled=not fleet.doubtful)
        if doubtful > 0 or silent > 0:
            return Findings(Finding.DARK, f"all of its site is silent ({doubtful + silent} others)", doubtful <= 0)
        return Findings(Finding.NOBODY, "no other node of its site is heard of")

    def _counts_as_blind(self, peer: str, answer: Answer, site: str, now: float) -> bool:
        known = self._watches.get(peer)
        return (
            answer is Answer.BLIND
            and known is not None
            and known[0] == site
            and self._pulse(known[1], now) is _Pulse.ALIVE
        )

    def _pick(
        self,
        names: Sequence[str],
        start: int,
        now: float,
        wanted: int,
        *,
        not_node: str = "",
        not_site: str | None = None,
    ) -> list[str]:
        picked: list[str] = []
        for step in range(min(len(names), _LOOKED_AT)):
            if len(picked) >= wanted:
                break
            name = names[(start + step) % len(names)]
            site, watch = self._watches[name]
            if name != not_node and site != not_site and self._pulse(watch, now) is _Pulse.ALIVE:
                picked.append(name)
        return picked

    def _anybody_lives(self, now: float) -> bool:
        """Tell whether any node is heard; whoever was the last to prove it is asked first."""
        known = self._watches.get(self._witness)
        if known is not None and self._pulse(known[1], now) is _Pulse.ALIVE:
            return True
        if 0 <= now - self._all.counted_at < _COUNTED_FOR_SECONDS:
            return self._all.counts.alive > 0
        witness = next(
            (name for name, known in self._watches.items() if self._pulse(known[1], now) is _Pulse.ALIVE), None
        )
        self._witness = witness or ""
        return witness is not None

    def _others(self, node_id: str, site: str, now: float) -> _Counts:
        counts = self._counts(self._sites[site], now)
        own = self._pulse(self._watches[node_id][1], now)
        return _Counts(
            counts.alive - (own is _Pulse.ALIVE),
            counts.doubtful - (own is _Pulse.DOUBTFUL),
            counts.silent - (own is _Pulse.SILENT),
        )

    def _counts(self, group: _Group, now: float) -> _Counts:
        if not 0 <= now - group.counted_at < _COUNTED_FOR_SECONDS:
            pulses = [self._pulse(self._watches[name][1], now) for name in group.names]
            group.counts = _Counts(*(pulses.count(pulse) for pulse in (_Pulse.ALIVE, _Pulse.DOUBTFUL, _Pulse.SILENT)))
            group.counted_at = now
        return group.counts

    def _pulse(self, watch: Watched, now: float) -> _Pulse:
        liveness = watch.liveness
        if liveness is None:
            if not watch.streaming:
                return _Pulse.UNKNOWN
            return _Pulse.ALIVE if now - watch.last_sign_at <= self._fresh_seconds else _Pulse.DOUBTFUL
        if liveness is Liveness.SUSPECT or liveness is Liveness.UNREACHABLE:
            return _Pulse.DOUBTFUL if now - watch.last_sign_at <= self._fresh_seconds else _Pulse.SILENT
        return _Pulse.UNKNOWN
