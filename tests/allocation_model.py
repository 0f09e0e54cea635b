# SPDX-License-Identifier: GPL-3.0-or-later
"""A second, simple opinion of what may be allocated: plain sums over plain lists, for tests to hold the real books against."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from node_manager.ledger import Allocation
from node_manager.problems import (
    AllocationMismatchError,
    InsufficientResourcesError,
    NodeNotFoundError,
    NodeNotSchedulableError,
    ProblemError,
    QuotaExceededError,
)
from node_manager.resource_allocator import AllocationRequest
from node_manager.resources import Ask

HOLD = timedelta(seconds=600)


@dataclass
class ModelNode:
    """What is true of one node."""

    cpu_millicores: int
    memory_mib: int
    gpu: int
    reserved_cpu: int = 0
    # As a whole number, so that nothing has to be rounded.
    cpu_factor: int = 1
    active: bool = True
    pressed_at: datetime | None = None

    @property
    def capacity(self) -> dict[str, int]:
        """Give what is declared."""
        return {"cpu_millicores": self.cpu_millicores, "memory_mib": self.memory_mib, "gpu": self.gpu}

    def effective(self, now: datetime) -> dict[str, int]:
        """Give what may be allocated of the common classes."""
        pressed = self.pressed_at is not None and now - self.pressed_at < HOLD
        cpu = max(0, self.cpu_millicores - self.reserved_cpu) * (1 if pressed else self.cpu_factor)
        return {"cpu_millicores": cpu, "memory_mib": self.memory_mib}


@dataclass
class Model:
    """All nodes, quotas and allocations; and how many events there must be."""

    nodes: dict[str, ModelNode] = field(default_factory=dict)
    hard: dict[str, dict[str, int]] = field(default_factory=dict)
    held: dict[str, tuple[AllocationRequest, Allocation]] = field(default_factory=dict)
    reserved: int = 0
    confirmed: int = 0
    released: Counter[str] = field(default_factory=Counter)

    # what may be

    def refusal(self, node_id: str, wanted: AllocationRequest, now: datetime) -> type[ProblemError] | None:
        """Tell how an allocation must be refused; None: it must be made, or be there already."""
        if wanted.allocation_id in self.held:
            there, allocation = self.held[wanted.allocation_id]
            return None if there == wanted and allocation.node_id == node_id else AllocationMismatchError
        node = self.nodes.get(node_id)
        if node is None:
            return NodeNotFoundError
        if not node.active:
            return NodeNotSchedulableError
        if not self._fits(node_id, node, wanted.ask, now):
            return InsufficientResourcesError
        hard, used = self.hard.get(wanted.owner, {}), self.used(wanted.owner)
        return QuotaExceededError if any(used[k] + v > hard.get(k, v + used[k]) for k, v in _sums(wanted.ask)) else None

    def allocated(self, node_id: str) -> Counter[str]:
        """Sum up the common classes of a node."""
        return Counter[str]() + sum(
            (Counter(dict(held.ask.amounts)) for _, held in self.held.values() if held.node_id == node_id), Counter()
        )

    def used_units(self, node_id: str) -> Counter[str]:
        """Sum up the thousandths of a node's GPUs, by unit."""
        return Counter[str]() + sum(
            (Counter(dict(held.units.get("gpu", {}))) for _, held in self.held.values() if held.node_id == node_id),
            Counter(),
        )

    def used(self, owner: str) -> Counter[str]:
        """Sum up what an owner holds; GPUs in thousandths."""
        return sum((Counter(dict(_sums(held.ask))) for _, held in self.held.values() if held.owner == owner), Counter())

    def over(self, node_id: str, now: datetime) -> bool:
        """Tell whether more is taken on a node than there is."""
        node = self.nodes[node_id]
        effective, there = node.effective(now), {str(number) for number in range(node.gpu)}
        return any(taken > effective[name] for name, taken in self.allocated(node_id).items()) or bool(
            self.used_units(node_id).keys() - there
        )

    # what was done

    def took(self, wanted: AllocationRequest, made: Allocation) -> None:
        """Remember what was reserved."""
        self.held[made.allocation_id] = (wanted, made)
        self.reserved += 1

    def release(self, allocation_id: str, reason: str) -> None:
        """Remember what was released."""
        del self.held[allocation_id]
        self.released[reason] += 1

    def expire(self, now: datetime) -> int:
        """Release what is due; give how many."""
        due = [key for key, (_, held) in self.held.items() if held.expires_at is not None and held.expires_at <= now]
        for allocation_id in due:
            self.release(allocation_id, "expired")
        return len(due)

    def _fits(self, node_id: str, node: ModelNode, ask: Ask, now: datetime) -> bool:
        effective, allocated, used = node.effective(now), self.allocated(node_id), self.used_units(node_id)
        return all(allocated[name] + amount <= effective[name] for name, amount in ask.amounts) and all(
            sum(used[str(unit)] + share <= 1000 for unit in range(node.gpu)) >= count for _, count, share in ask.devices
        )


def _sums(ask: Ask) -> list[tuple[str, int]]:
    return [*ask.amounts, *((name, count * share) for name, count, share in ask.devices)]
