"""Greedy tokens in fp32 equal those of transformers + peft, under any topology, with and without a cache."""

from pathlib import Path

import pytest
import torch

from megasft.adapters.adapter_file import AdapterFile
from megasft.adapters.export import export_adapter
from megasft.config.values import LINEAR_LAYERS
from tests.parity.peft_adapters import base_model, loaded_by_peft
from tests.parity.reference import Reference, random_adapter, random_model, tiny_config, write_adapter
from tests.support import on_ranks

R, ALPHA, NEW = 4, 12.0, 12
# tensor, expert, expert-tensor, pipeline, replicas
TOPOLOGIES = [
    (1, 1, 1, 1, 1),
    (2, 1, 2, 1, 1),
    (1, 2, 1, 1, 1),
    (2, 2, 1, 1, 1),
    (2, 1, 1, 1, 1),
    (2, 2, 2, 1, 1),
    (1, 1, 1, 3, 1),
    (2, 1, 2, 1, 2),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder with base/ and adapter/, run settings): every linear layer adapted, A and B random."""
    folder: Path = tmp_path_factory.mktemp("generate")
    config = tiny_config(mlp_only_layers=[], max_position_embeddings=256)
    random_model(config).save_pretrained(folder / "base")
    adapter = random_adapter(config, R, frozenset(LINEAR_LAYERS))
    write_adapter(adapter, folder / "plain", R, ALPHA)
    export_adapter(folder / "plain", folder / "adapter", "per-expert", str(folder / "base"))
    settings = {
        "job": {"model": str(folder / "base"), "init_adapter": str(folder / "adapter")},
        "lora": {
            "r": R,
            "alpha": ALPHA,
            "target_modules": LINEAR_LAYERS,
            "dropout": 0.5,
        },  # which generating must leave out
        "hyperparameters": {"parallelism": {"bf16": False}},
    }
    return folder, settings


def over(settings: dict, tensor=1, expert=1, expert_tensor=1, pipeline=1, replicas=1) -> tuple[int, dict]:
    """(ranks, settings) for a topology, with the experts distributed over its ranks."""
    ranks = max(tensor, expert * expert_tensor) * pipeline * replicas
    sizes = {
        "tensor_parallel": tensor,
        "expert_parallel": expert,
        "expert_tensor_parallel": expert_tensor,
        "pipeline_parallel": pipeline,
    }
    return ranks, settings | {"data": {"topology": sizes}}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Prompts of one token, of odd and even lengths, and with a common prefix."""
    ids = [ids.tolist() for ids, _ in on_ranks.random_samples(203, [1, 6, 31])]
    return [*ids, ids[2][:12] + ids[1]]


@pytest.fixture(scope="module")
def want(world, prompts) -> list[list[int]]:
    """The tokens that transformers + peft generate."""
    folder, _ = world
    model, base = loaded_by_peft(folder / "base", folder / "adapter"), base_model(folder / "base")

    def answer(model: torch.nn.Module, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        return out[0, len(prompt) :].tolist()

    answers = [answer(model, prompt) for prompt in prompts]
    assert all(len(tokens) == NEW for tokens in answers)
    assert answers != [answer(base, prompt) for prompt in prompts], "the adapter changes nothing"
    return answers


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_greedy_tokens_equal_those_of_transformers_and_peft_on_every_rank(ranks, world, prompts, want, topology):
    count, settings = over(world[1], *topology)
    for got in ranks(count, on_ranks.answers, settings, prompts, NEW, {}):
        assert got == want


# the same, where two and four replicas share the prompts, and where experts lie on ranks of both
SHARED_OUT = [*TOPOLOGIES[:1], *TOPOLOGIES[3:5], *TOPOLOGIES[6:], (1, 2, 1, 1, 2), (1, 4, 1, 1, 4)]


@pytest.mark.parametrize("topology", SHARED_OUT)
def test_many_prompts_at_once_give_the_tokens_of_each_alone(ranks, world, prompts, want, topology):
    _, settings = over(world[1], *topology)
    tensor, _, _, pipeline, replicas = topology
    for got in ranks(tensor * pipeline * replicas, on_ranks.answers_together, settings, prompts, NEW):
        assert got == want


def test_the_tokens_do_not_depend_on_how_prompts_are_batched(ranks, world, prompts, want):
    # rows, positions and tokens of a forward pass that cut prompts and batches elsewhere; beginnings that are shared
    sizes = [{"ROWS": 2}, {"POSITIONS": 70}, {"PREFILL": 5}, {"PREFILL": 1}, {"SHARED": 3, "ROOM": 1}]
    again = [2, 3, 2, 0, 1, 2]  # the whole of a prompt once more, and parts of it
    many = [prompts[i] for i in again]
    [got] = ranks(1, on_ranks.answers_in_batches, over(world[1])[1], many, NEW, sizes)
    assert got == [[want[i] for i in again]] * len(sizes)


def test_a_row_ends_with_its_stop_token_or_the_context_while_others_continue(ranks, world, prompts, want):
    stop = want[2][7]
    long = [list(range(200)) + list(range(50))]
    expected = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in want]
    assert len({len(answer) for answer in expected}) > 1
    [got] = ranks(1, on_ranks.answers_together, over(world[1])[1], prompts + long, NEW, (stop,))
    assert got[:-1] == expected
    assert len(got[-1]) == 256 - 250
    with pytest.raises(AssertionError, match="the prompt is empty"):
        ranks(1, on_ranks.answers_together, over(world[1])[1], [[1], []], 1)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 1), (1, 3)])
def test_logits_with_a_kv_cache_equal_those_without(ranks, world, tensor, pipeline):
    folder, settings = world
    count, settings = over(settings, tensor, 1, tensor, pipeline)
    (ids, _), lengths = on_ranks.random_samples(203, [41])[0], [1, 1, 9, 1, 5, 13, 1, 7, 3]
    reference = Reference(
        base_model(folder / "base"),
        random_adapter(tiny_config(mlp_only_layers=[]), R, frozenset(LINEAR_LAYERS)),
        ALPHA / R,
    )
    ends = torch.tensor(lengths).cumsum(0) - 1
    with torch.no_grad():
        want = reference.logits(ids)[ends]
    for rank, got in enumerate(ranks(count, on_ranks.cached_logits, settings, ids.tolist(), lengths, 4)):
        if rank < count - tensor:
            assert got == [None] * len(lengths), "of the last stage only"
        else:
            # fp32 rounding over three layers, as in test_against_transformers; logits are of the order of 1 to 5.
            torch.testing.assert_close(torch.stack(got), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", [1, 5])
def test_a_prompt_in_parts_gives_the_same_tokens(ranks, world, prompts, want, part):
    count, settings = over(world[1], 2, 1, 2)
    for got in ranks(count, on_ranks.answers_to_prompts_in_parts, settings, prompts, NEW, part):
        assert got == want


def test_sampled_tokens_depend_on_the_seed_and_not_on_the_topology(ranks, world, prompts):
    sampling = {"temperature": 1.0, "top_p": 0.95, "top_k": 50}
    found = {}
    for seed, tensor in ((1, 1), (1, 2), (2, 1)):
        count, settings = over(world[1], tensor, 1, tensor)
        answers = ranks(count, on_ranks.answers, settings, prompts, NEW, sampling | {"seed": seed})
        assert all(answer == answers[0] for answer in answers)
        found[seed, tensor] = answers[0]
    assert found[1, 1] == found[1, 2] != found[2, 1]


@pytest.mark.parametrize(("topology", "chooser"), [((2, 1, 2, 1, 2), 0), ((1, 1, 1, 3, 1), 2)])
def test_all_ranks_use_the_token_sampled_by_one(ranks, world, topology, chooser):
    count, settings = over(world[1], *topology)
    for got in ranks(count, on_ranks.answers_of_ranks_that_disagree, settings):
        assert got == [chooser + 1] * 4


def test_an_answer_ends_with_a_stop_token_and_reports_why(ranks, world, prompts, want):
    stop = want[2][7]
    expected = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in want]
    assert [len(answer) for answer in expected] != [NEW] * len(want)
    count, settings = over(world[1], 2)
    for got in ranks(count, on_ranks.answers, settings, prompts, NEW, {}, (stop,)):
        assert got == expected


def test_an_answer_ends_where_the_context_does(ranks, world):
    _, settings = over(world[1])
    [[answer]] = ranks(1, on_ranks.answers, settings, [list(range(200)) + list(range(50))], 100, {})
    assert len(answer) == 256 - 250
    with pytest.raises(AssertionError, match="prompt has 256 tokens and leaves no room in the model's context of 256"):
        ranks(1, on_ranks.answers, settings, [[1] * 256], 1, {})


def test_an_interruption_of_one_rank_ends_the_answer_on_all(ranks, world):
    count, settings = over(world[1], 2, 1, 2)
    for got in ranks(count, on_ranks.answer_until_rank_0_is_interrupted, settings, 5):
        assert len(got) == 5


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_lora_settings_are_read_from_the_adapter(world, tmp_path, layout):
    export_adapter(world[0] / "plain", tmp_path / "adapter", layout)
    settings = AdapterFile(tmp_path / "adapter").settings()
    assert (settings.r, settings.alpha, settings.targets) == (R, ALPHA, frozenset(LINEAR_LAYERS))
