"""What files of fusions take from here: groups, their scope, and the calls of nodes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tensorgraph.backends.cpu.fusion import Scope
from tensorgraph.backends.cpu.group import CpuGroup as Group
from tensorgraph.backends.cpu.group import make_group
from tensorgraph.backends.cpu.grouping import single
from tensorgraph.backends.cpu.kernel import Call, Context
from tensorgraph.backends.cpu.state_calls import read_call
from tensorgraph.dims import Guard
from tensorgraph.graph import Node

__all__ = ["Group", "Scope", "make_group", "read_call", "single_calls", "with_guard"]


def single_calls(node: Node, context: Context) -> Sequence[Call]:
    """The calls of a node by itself."""
    return tuple(getattr(single(node, context), "calls", ()))


def with_guard(calls: Sequence[Call], guard: Guard | bool) -> list[Call]:
    """Calls, made only for the steps of a guard; without those that no step makes."""
    if isinstance(guard, bool):
        return list(calls) if guard else []
    both = [replace(call, guard=Guard(call.guard.bounds + guard.bounds)) for call in calls]
    return [call for call in both if _may_hold(call.guard)]


def _may_hold(guard: Guard) -> bool:
    """Whether bounds of one extent leave anything."""
    least: dict[object, int] = {}
    most: dict[object, int] = {}
    for extent, low, high in guard.bounds:
        least[extent] = max(least.get(extent, 0), low or 0)
        most[extent] = min(most.get(extent, 1 << 62), 1 << 62 if high is None else high)
    return all(least[extent] <= most[extent] for extent in least)
