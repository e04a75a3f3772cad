"""The same answers through both verifiers: in order, with the sandbox's verdicts."""

import os
from collections.abc import Iterator

import pytest
from tests.actors.own_process import told

from fewstep.actors.verifier import LocalVerifier, Verifier, VerifierPool
from fewstep.cluster.session import ray_session
from fewstep.platform.records import Check, Task

PLACED = """
import json, os, signal
import ray
from ray.cluster_utils import Cluster
from fewstep.actors.placement import free_nodes
from fewstep.actors.verifier import VerifierPool
from fewstep.platform.records import Check, Task

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
here, there = (node.node_id for node in free_nodes())

def nodes(pids):
    found = {actor["Pid"]: actor["Address"]["NodeID"] for actor in ray._private.state.actors().values()}
    return [found[pid] for pid in pids]

asked = [there, here, there]
task = Task("t", "def f(x):\\n", Check("call", "f", inputs=((1,),), expected=(1,)))
with VerifierPool(3, num_cpus=0.1, node_ids=asked) as pool:
    placed = nodes(pool.pids())
    os.kill(pool.pids()[0], signal.SIGKILL)
    passed = [verdict.passed for verdict in pool.verify([(task, "    return x\\n")] * 64)]
    print(json.dumps({
        "asked": asked, "placed": placed, "again": nodes(pool.pids()), "replaced": pool.replaced, "passed": all(passed),
    }), flush=True)
ray.shutdown()
cluster.shutdown()
"""


def doubling(index: int) -> tuple[Task, str]:
    """Right for even indices, wrong for odd ones."""
    check = Check("call", "double", inputs=((index,), (3,)), expected=(2 * index, 6))
    task = Task(f"double/{index}", "def double(x):\n", check)
    return task, "    return 2 * x\n" if index % 2 == 0 else "    return x\n"


@pytest.mark.parametrize("num_sandboxes", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 10])
def test_local_verdicts_come_in_order(num_sandboxes: int, count: int) -> None:
    with LocalVerifier(num_sandboxes) as verifier:
        verdicts = verifier.verify([doubling(index) for index in range(count)])
        assert [verdict.passed for verdict in verdicts] == [index % 2 == 0 for index in range(count)]
        assert all(verdict.isolation == verifier.isolation for verdict in verdicts)


def test_the_program_is_prompt_plus_completion() -> None:
    task, _ = doubling(2)
    with LocalVerifier() as verifier:
        outcomes = [
            verdict.outcome for verdict in verifier.verify([(task, "    return x + x\n"), (task, "return x")])
        ]
    assert outcomes == ["passed", "syntax_error"]


def test_header_and_suffix_stand_around_the_answer() -> None:
    check = Check("call", "f", inputs=((1,),), expected=(4,))
    task = Task("t", "Say what y is.", check, header="def f(x):\n", suffix="    return y\n")
    with LocalVerifier() as verifier:
        (verdict,) = verifier.verify([(task, "    y = x + 3\n")])
    assert verdict.passed, verdict


@pytest.mark.ray
class TestPool:
    @pytest.fixture(scope="class")
    def pool(self) -> Iterator[VerifierPool]:
        with ray_session(2), VerifierPool(2, num_cpus=0.1) as pool:
            yield pool

    def test_verdicts_equal_the_local_ones(self, pool: VerifierPool) -> None:
        answers = [doubling(index) for index in range(50)]
        with LocalVerifier() as local:
            expected = [(verdict.outcome, verdict.tests) for verdict in local.verify(answers)]
        both: list[Verifier] = [pool]
        for verifier in both:
            assert [(verdict.outcome, verdict.tests) for verdict in verifier.verify(answers)] == expected
        assert pool.verify([]) == []
        assert pool.isolation

    def test_a_broken_check_is_the_callers_error(self, pool: VerifierPool) -> None:
        with pytest.raises(ValueError, match="call check"):
            pool.verify([(Task("empty", "def f():\n", Check("call", "f")), "    pass\n")])
        assert pool.verify([doubling(0)])[0].passed

    def test_every_worker_says_which_languages_it_lacks(self, pool: VerifierPool) -> None:
        missing = pool.missing(["python", "cobol"])
        assert missing == {"cobol": "cobol: this sandbox has no way to run it"}

    def test_workers_are_processes_of_their_own(self, pool: VerifierPool) -> None:
        assert len({*pool.pids(), os.getpid()}) == 3

    def test_a_node_for_each_or_none(self, pool: VerifierPool) -> None:
        with pytest.raises(ValueError, match="1 nodes for 2 verifiers"):
            VerifierPool(2, node_ids=["a"])


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_workers_and_their_replacements_are_where_they_were_placed() -> None:
    found, _ = told(PLACED)
    assert found["placed"] == found["again"] == found["asked"]
    assert found["passed"]
    assert found["replaced"] == 1
