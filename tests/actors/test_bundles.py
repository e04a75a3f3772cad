"""Placement: what any answer must hold, and that a refusal is right."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.actors.bundles import Need, Node, Placement, place
from fewstep.platform.errors import ResourceError

nodes_of = st.lists(st.integers(0, 12), min_size=1, max_size=5).map(
    lambda sizes: [Node(f"n{i}", f"10.0.0.{i}", cpus) for i, cpus in enumerate(sizes)]
)
trainer = st.builds(
    Need, st.just("trainer ranks"), st.integers(1, 4), st.sampled_from([0.4, 1.0]), packed=st.just(True)
)
replicas = st.builds(Need, st.just("replicas"), st.integers(1, 6), st.sampled_from([0.5, 1.0, 3.0]))


def holds(placement: Placement, nodes: list[Node], needs: list[Need]) -> None:
    for node in nodes:
        here = [bundle for bundle in placement.bundles if bundle.node == node]
        assert sum(bundle.cpus for bundle in here) <= node.cpus + 1e-6
    for need in needs:
        own = [bundle for bundle in placement.bundles if bundle.role == need.role]
        assert [bundle.index for bundle in own] == list(range(need.count))
        if need.packed:
            assert len({bundle.node for bundle in own}) == 1


@settings(max_examples=300, deadline=None)
@given(
    nodes=nodes_of, ranks=trainer, engines=replicas, layout=st.sampled_from(["auto", "colocated", "split"])
)
def test_every_placement_fits_and_keeps_together_what_belongs_together(
    nodes: list[Node], ranks: Need, engines: Need, layout: str
) -> None:
    if not feasible(nodes, ranks, engines, layout):
        with pytest.raises(ResourceError, match=r"10\.0\.0\.0"):
            place(nodes, [ranks, engines], layout)  # type: ignore[arg-type]
        return
    placement = place(nodes, [ranks, engines], layout)  # type: ignore[arg-type]
    holds(placement, nodes, [ranks, engines])
    used = {
        role: {b.node for b in placement.bundles if b.role == role} for role in ("trainer ranks", "replicas")
    }
    if layout == "split":
        assert not used["trainer ranks"] & used["replicas"]
    if layout == "colocated":
        assert used["trainer ranks"] == used["replicas"]


def feasible(nodes: list[Node], ranks: Need, engines: Need, layout: str) -> bool:
    """Whether any placement exists: every node for the trainer, then as many replicas as each node holds."""
    for host in nodes:
        cpus = ranks.count * ranks.cpus
        if cpus > host.cpus + 1e-9:
            continue
        room = 0
        for node in nodes:
            if (layout == "split" and node == host) or (layout == "colocated" and node != host):
                continue
            free = node.cpus - cpus if node == host else node.cpus
            room += max(0, int((free + 1e-9) // engines.cpus))
        if room >= engines.count:
            return True
    return False


@given(count=st.integers(1, 12), num_nodes=st.integers(1, 4))
def test_a_lost_node_costs_as_few_replicas_as_can_be(count: int, num_nodes: int) -> None:
    nodes = [Node(f"n{i}", f"10.0.0.{i}", 12.0) for i in range(num_nodes)]
    placement = place(nodes, [Need("replicas", count, 1.0)])
    sizes = [placement.node_ids("replicas").count(node.node_id) for node in nodes]
    assert max(sizes) - min(sizes) <= 1


def test_auto_leaves_the_trainers_node_alone_while_there_is_room_elsewhere() -> None:
    nodes = [Node("a", "10.0.0.1", 2.0), Node("b", "10.0.0.2", 4.0)]
    needs = [Need("trainer ranks", 2, 1.0, packed=True), Need("replicas", 4, 1.0)]
    placement = place(nodes, needs)
    assert placement.node_ids("trainer ranks") == ["a", "a"]
    assert placement.node_ids("replicas") == ["b"] * 4
    crowded = place([nodes[0], Node("b", "10.0.0.2", 1.0)], [needs[0], Need("replicas", 1, 1.0)])
    assert crowded.node_ids("replicas") == ["b"]
    one = place([Node("a", "10.0.0.1", 6.0)], needs)
    assert set(itertools.chain(one.node_ids("trainer ranks"), one.node_ids("replicas"))) == {"a"}


def test_the_text_says_what_each_node_gets() -> None:
    needs = [Need("trainer ranks", 2, 0.5, packed=True), Need("replicas", 1, 2.0)]
    text = place([Node("a", "10.0.0.1", 8.0), Node("b", "10.0.0.2", 8.0)], needs).text()
    assert "10.0.0.1: 2 trainer ranks (1 of 8 free CPUs)" in text
    assert "10.0.0.2: 1 replicas (2 of 8 free CPUs)" in text


def test_a_refusal_is_one_line_with_what_is_asked_and_what_is_free() -> None:
    with pytest.raises(ResourceError, match=r"3 replicas of 4 CPU.*10\.0\.0\.1 8 CPU") as caught:
        place([Node("a", "10.0.0.1", 8.0)], [Need("replicas", 3, 4.0)])
    assert "\n" not in str(caught.value)
