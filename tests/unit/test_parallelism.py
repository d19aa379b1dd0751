"""The topology that a run file leaves out, and those that are refused."""

import tomllib

import pytest

from megasft.config.parallelism import TopologySettings, TopologySizes, resolve_topology
from megasft.config.schema import RunConfig, load_config
from tests.unit.run_files import load_refusal, refusal

# Topology


@pytest.mark.parametrize(
    ("asked", "world", "sizes"),
    [
        ({}, 1, TopologySizes(tensor=1, pipeline=1, data=1, expert=1, expert_tensor=1)),
        ({}, 6, TopologySizes(tensor=1, pipeline=1, data=6, expert=1, expert_tensor=1)),
        ({"tensor_parallel": 2}, 4, TopologySizes(2, 1, 2, 1, 1)),
        ({"tensor_parallel": 4}, 4, TopologySizes(4, 1, 1, 1, 1)),
        ({"tensor_parallel": 2, "data_parallel": 2}, 4, TopologySizes(2, 1, 2, 1, 1)),
        ({"tensor_parallel": 2, "expert_parallel": 2}, 4, TopologySizes(2, 1, 2, 2, 1)),
        ({"tensor_parallel": 2, "expert_parallel": 4}, 4, TopologySizes(2, 1, 2, 4, 1)),
        ({"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 2}, 4, TopologySizes(2, 1, 2, 2, 2)),
        ({"tensor_parallel": 4, "expert_tensor_parallel": 2}, 4, TopologySizes(4, 1, 1, 1, 2)),
        ({"tensor_parallel": 1, "expert_tensor_parallel": 4}, 4, TopologySizes(1, 1, 4, 1, 4)),
        ({"expert_parallel": 4}, 4, TopologySizes(1, 1, 4, 4, 1)),
        ({"pipeline_parallel": 2}, 4, TopologySizes(1, 2, 2, 1, 1)),
        ({"pipeline_parallel": 2, "tensor_parallel": 2, "expert_parallel": 2}, 8, TopologySizes(2, 2, 2, 2, 1)),
        ({"pipeline_parallel": 3, "tensor_parallel": 2}, 6, TopologySizes(2, 3, 1, 1, 1)),
        ({"data_parallel": 3}, 3, TopologySizes(1, 1, 3, 1, 1)),
    ],
)
def test_what_a_topology_leaves_out_is_derived(asked, world, sizes):
    assert resolve_topology(TopologySettings(**asked), world) == sizes


@pytest.mark.parametrize(
    ("asked", "world", "asks_for"),
    [
        ({"tensor_parallel": 2}, 3, "a multiple of 2 (tensor_parallel 2 x pipeline_parallel 1)"),
        ({"tensor_parallel": 8}, 4, "a multiple of 8 (tensor_parallel 8 x pipeline_parallel 1)"),
        ({"tensor_parallel": 2, "pipeline_parallel": 4}, 4, "a multiple of 8 ("),
        (
            {"tensor_parallel": 2, "data_parallel": 2},
            2,
            "4 (tensor_parallel 2 x pipeline_parallel 1 x data_parallel 2)",
        ),
        ({"tensor_parallel": 2, "data_parallel": 2}, 8, "4 ("),
        ({"data_parallel": 2}, 4, "2 ("),
        ({"expert_parallel": 3}, 4, "a multiple of 3 (expert_tensor_parallel 1 x expert_parallel 3 x pipeline_"),
        ({"expert_parallel": 4, "expert_tensor_parallel": 2}, 4, "a multiple of 8 (expert_tensor_parallel 2 x expert_"),
        ({"expert_parallel": 2, "pipeline_parallel": 4}, 4, "a multiple of 8 (expert_tensor_parallel 1 x expert_"),
        ({"tensor_parallel": 4, "pipeline_parallel": 4, "expert_parallel": 64, "expert_tensor_parallel": 8}, 360, "a"),
    ],
)
def test_a_topology_that_does_not_fit_is_refused_with_topologies_that_do(asked, world, asks_for):
    message = refusal(resolve_topology, TopologySettings(**asked), world)
    assert message.startswith(f"launched {world} ranks, but [data.topology] asks for {asks_for}")
    offered = message.partition("; set [data] ")[2].partition(", or run")[0].split(" or ")
    assert 1 <= len(offered) <= 3
    assert len(set(offered)) == len(offered)
    for fragment in offered:
        topology = RunConfig.from_dict({"data": tomllib.loads(fragment)}).data.topology
        resolve_topology(topology, world)
        assert set(asked) <= topology.model_fields_set


@pytest.mark.parametrize(
    ("topology", "reason"),
    [
        ({"expert_parallel": 2}, "expert_parallel 2 x expert_tensor_parallel 1 does not divide tensor_parallel 1"),
        (
            {"expert_tensor_parallel": 2},
            "expert_parallel 1 x expert_tensor_parallel 2 does not divide tensor_parallel 1",
        ),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, "needs pipeline_parallel = 1, not 2"),
    ],
)
def test_a_dispatcher_that_the_topology_does_not_support_is_refused(topology, reason):
    def settings(dispatcher):
        return {
            "data": {"topology": topology},
            "hyperparameters": {"parallelism": {"token_dispatcher": dispatcher}},
        }

    message = refusal(RunConfig.from_dict, settings("allgather"))
    assert message.startswith('[hyperparameters.parallelism] token_dispatcher = "allgather": needs')
    assert reason in message
    assert '"alltoall" works with any topology' in message
    for dispatcher in ("auto", "alltoall"):
        RunConfig.from_dict(settings(dispatcher))


def test_of_the_topologies_that_fit_the_nearest_come_first():
    asked = TopologySettings(tensor_parallel=4, data_parallel=4)
    message = refusal(resolve_topology, asked, 8)
    assert (
        "set [data] topology = {tensor_parallel = 2, data_parallel = 4}"
        " or topology = {tensor_parallel = 4, data_parallel = 2}" in message
    )


def test_an_error_for_too_few_ranks_names_the_number_to_launch():
    message = refusal(resolve_topology, TopologySettings(tensor_parallel=2, data_parallel=2), 1)
    assert message.startswith("launched 1 rank, but")
    assert message.endswith(", or run `torchrun --nproc-per-node 4`")


@pytest.mark.parametrize(
    ("settings_", "world"),
    [
        ({"compute": {"gpu_count": 4}}, 4),
        ({"compute": {"gpu_count": 8, "nodes": 2}}, 16),
        ({"compute": {"nodes": 2}}, None),
        ({"data": {"topology": {"tensor_parallel": 2}}}, None),
        ({"data": {"topology": {"data_parallel": 2}}}, 2),
        ({"data": {"topology": {"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 2}}}, 8),
        ({"compute": {"gpu_count": 4}, "data": {"topology": {"tensor_parallel": 2}}}, 4),
    ],
)
def test_the_world_that_a_file_asks_for_is_its_topology_or_else_its_gpus(settings_, world):
    assert RunConfig.from_dict(settings_).world_size() == world


def test_gpus_that_contradict_the_topology_are_refused_on_loading(write):
    topology = "[data.topology]\ntensor_parallel = 2\ndata_parallel = 2\n"
    message = load_refusal(write, "[compute]\ngpu_count = 2\n" + topology)
    assert message.startswith("job.toml:2: [compute] gpu_count = 2: makes 2 ranks, but [data.topology] asks for 4 (")
    assert "topology = {tensor_parallel = 1, data_parallel = 2}" in message
    message = load_refusal(write, "[compute]\ngpu_count = 2\nnodes = 4\n" + topology)
    assert "makes 8 ranks on 4 nodes, but [data.topology] asks for 4 (" in message
    load_config(write("[compute]\ngpu_count = 2\nnodes = 2\n" + topology))


def test_a_full_topology_whose_experts_do_not_fit_is_refused_on_loading(write):
    message = load_refusal(write, "[data.topology]\ndata_parallel = 4\nexpert_parallel = 3\n")
    assert message.startswith(
        "job.toml:1: [data.topology]: makes 4 ranks, but [data.topology] asks for a multiple of 3"
    )


def test_gpus_too_many_to_exist_are_refused_at_once():
    settings_ = {"compute": {"gpu_count": 32749, "nodes": 32749}, "data": {"topology": {"tensor_parallel": 2}}}
    assert "asks for a multiple of 2" in refusal(RunConfig.from_dict, settings_)
    assert "must be less than 32768" in refusal(RunConfig.from_dict, {"compute": {"gpu_count": 10**18}})
