"""The game of examples/crafter: worlds, the text that the agent reads, the script that plays, traces, players."""

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import mean

import crafter
import numpy as np
import opensimplex
import pytest

from examples.crafter import aimless, expert, play, traces
from examples.crafter.game import ACTIONS, LENGTH, Game
from examples.crafter.noise import noise3
from examples.crafter.view import View, look
from megasft.data.conversations import Conversation, check_record

ROOT = Path(__file__).parents[2]


def cells(picture):
    """Cells around the player `@` of a picture; a letter is a kind."""
    kinds = {
        ".": "grass",
        "T": "tree",
        "W": "water",
        "C": "cow",
        "S": "stone",
        "B": "table",
        "L": "lava",
        "@": "player",
    }
    rows = [line.split() for line in picture.strip().splitlines()]
    x0, y0 = next((x, y) for y, row in enumerate(rows) for x, kind in enumerate(row) if kind == "@")
    return {(x - x0, y - y0): kinds[kind] for y, row in enumerate(rows) for x, kind in enumerate(row)}


def seen(picture, facing="down", done=(), asleep=False, **inventory):
    vitals = {"health": 9, "food": 9, "drink": 9, "energy": 9}
    return look(cells(picture), vitals | inventory, list(done), facing, asleep)


def test_noise_is_that_of_opensimplex():
    points = np.random.default_rng(0).uniform(-40, 40, (3, 600))
    points[:, 300:] = np.round(points[:, 300:] * 5) / 5  # points of equal distance to several lattice points
    package = opensimplex.OpenSimplex(7)
    assert np.abs(noise3(points, 7) - [package.noise3(*point) for point in points.T]).max() < 1e-12


def test_worlds_are_those_of_the_package():
    game, package = Game(), crafter.Env(seed=11)
    game.start(11)
    package.reset()
    assert (game._world._mat_map == package._world._mat_map).all()
    assert (game._world._obj_map == package._world._obj_map).all()


def test_a_game_is_the_same_in_every_process_whatever_the_hashes():
    code = "from examples.crafter.traces import record; import json; print(json.dumps([record(5, p) for p in ('expert', 'random')]))"
    played = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONMALLOC": allocator, "PATH": ""},
            capture_output=True,
            check=True,
        ).stdout
        for seed, allocator in (("1", "malloc"), ("2", "pymalloc"))
    }
    assert len(played) == 1
    assert json.loads(played.pop())[0] == json.loads(json.dumps(traces.record(5, "expert")))


def test_the_text_names_the_nearest_of_each_kind_and_the_way_to_it():
    view = seen(
        """
        T . . . .
        . . W @ .
        . C W . T
        """,
        "left",
        ["collect_wood", "make_wood_pickaxe"],
        wood=2,
        wood_pickaxe=1,
    )
    assert view.text().splitlines() == [
        "health-9 food-9 drink-9 energy-9",
        "have wood-2 wood_pickaxe",
        "new cow water",
        "facing-water",
        "open-up-1 cow-up-1+ water-here tree-right-1+",
    ]


def test_a_way_avoids_what_cannot_be_walked_on():
    assert "cow" not in seen("@ L C").ways, "there is no way"
    around = seen(
        """
        @ L C
        . L .
        . . .
        """
    )
    assert around.ways["cow"].text() == "down-2+"


def test_open_is_ahead_or_the_roomier_side():
    picture = """
        . . .
        . @ T
        . . T
        . . .
        """
    assert seen(picture, "up").open.text() == "up-1"
    assert seen(picture, "right").open.text() == "down-2"
    assert seen("T T T\nT @ .\nT T T", "left").open.text() == "right-1"
    assert seen("@ T").open.text() == "here"


def test_what_is_not_there_or_behind_the_edge_is_not_named():
    view = seen("@ .", "left")
    assert view.text().splitlines()[1:] == ["facing-edge", "open-right-1"]


@pytest.mark.parametrize(
    ("picture", "inventory", "new"),
    [
        ("@ .", {"sapling": 1}, ["place_plant", "collect_sapling"]),
        ("@ .", {"wood": 1}, ["collect_sapling"]),
        ("@ .", {"wood": 2}, ["place_table", "collect_sapling"]),
        ("@ W", {"stone": 4}, ["place_stone", "water"]),
        ("@ .", {"stone": 4}, ["place_stone", "place_furnace", "collect_sapling"]),
        ("@ S", {"energy": 8}, ["sleep"]),
        ("@ S", {"wood_pickaxe": 1}, ["stone"]),
        ("@ S", {}, []),
        ("@ T C", {}, ["tree"]),
        ("@ B", {"wood": 1}, ["make_wood_pickaxe", "make_wood_sword"]),
        (". @ . . B", {}, ["collect_sapling"]),
        (". @ . . B", {"wood": 1}, ["collect_sapling", "table"]),
        (". @ . . B", {"stone": 1, "iron": 1, "coal": 1}, ["place_stone", "collect_sapling"]),
        ("@ B", {"wood": 1, "coal": 1, "iron": 1}, ["make_wood_pickaxe", "make_wood_sword"]),
    ],
)
def test_what_unlocks_an_achievement_is_new(picture, inventory, new):
    achievement = {"water": "collect_drink", "sleep": "wake_up", "stone": "collect_stone", "tree": "collect_wood"}
    view = seen(picture, "right", **inventory)
    assert view.new == new
    done = [achievement.get(name, name) for name in new] + ["make_wood_pickaxe", "make_wood_sword"]
    assert seen(picture, "right", done, **inventory).new == []
    assert seen(picture, "right", asleep=True, **inventory).new == []


def test_new_deeds_are_those_that_the_game_allows():
    """Whether placing or making something counts in the game is what the view said."""
    game, drawn, worked = Game(), random.Random(1), Counter()
    deeds = [name for name in ACTIONS if name.startswith(("place_", "make_"))]
    for seed in range(10):
        game.start(seed)
        for _ in range(30):
            game.endow(drawn)
            game._unlocked = set()
            view, name = game.view(), drawn.choice(deeds)
            count = game._player.achievements.get(name, 0)
            if not view.asleep:
                game.interact([name])
                counted = game._player.achievements.get(name, 0) > count
                assert counted == (name in view.new), (name, view)
                worked[name, counted] += 1
            game.interact(expert.decide(game.view().text()).actions)
    assert sum(counted for _, counted in worked) >= 7, "of 10 deeds"
    assert sum(not counted for _, counted in worked) == len(deeds)


DONE = ["collect_sapling", "make_wood_pickaxe", "make_wood_sword", "place_table", "collect_stone", "place_stone"]


def test_text_reads_back():
    game = Game()
    drawn = random.Random(0)
    text = game.start(3)
    for _ in range(40):
        assert View.read(text).text() == text
        text = game.interact([drawn.choice(ACTIONS), *expert.decide(text).actions])
    asleep = seen("@ T", asleep=True, sapling=1)
    assert View.read(asleep.text()).text() == asleep.text()


@pytest.mark.parametrize(
    ("picture", "facing", "done", "inventory", "actions"),
    [
        ("@ . T", "right", ["collect_sapling"], {}, ["move_right", "move_right", "do"]),
        ("@ T", "right", [], {}, ["do"]),
        ("@ T", "right", ["collect_wood"], {}, ["do"]),
        (". . W @ .", "right", ["collect_drink"], {"drink": 4}, ["move_left", *["do"] * 4]),
        (". . W @ .", "right", ["collect_drink", "collect_sapling"], {"drink": 5}, ["move_right"]),
        (". . W @ .", "left", ["collect_sapling"], {}, ["do"] * 5),
        ("@ C", "right", ["eat_cow"], {"food": 5}, ["do", "do", "do"]),
        ("@ C", "right", ["eat_cow"], {"food": 4, "wood_sword": 1}, ["do", "do"]),
        ("@ C", "right", [], {}, ["do", "do", "do"]),
        ("@ .", "right", [], {}, ["do", "do", "do"]),
        ("@ .", "right", ["collect_sapling"], {"sapling": 1}, ["place_plant"]),
        ("@ .", "right", ["collect_sapling"], {"energy": 8}, ["sleep"] * 5),
        ("@ .", "right", ["collect_sapling", "wake_up"], {"energy": 8}, ["move_right"]),
        ("@ .", "right", ["collect_sapling", "wake_up"], {"energy": 3}, ["sleep"] * 5),
        ("@ .", "right", ["collect_sapling"], {"wood": 2}, ["place_table"]),
        ("@ B", "right", [], {"wood": 2}, ["make_wood_pickaxe"]),
        ("@ B", "right", ["make_wood_pickaxe"], {"wood": 1, "wood_pickaxe": 1}, ["make_wood_sword"]),
        ("@ . B", "right", DONE, {"wood": 1, "stone": 1}, ["move_right", "move_right"]),
        ("@ . S", "right", DONE, {"wood": 4, "wood_pickaxe": 1}, ["move_right", "move_right", "do"]),
        ("@ .", "right", DONE, {"wood": 4, "stone": 2, "wood_pickaxe": 1}, ["place_table"]),
        ("@ .", "right", DONE, {"wood": 3, "stone": 2, "wood_pickaxe": 1}, ["move_right"]),
        ("@ .", "right", DONE, {"stone": 4, "wood_pickaxe": 1}, ["place_furnace"]),
        ("@ S", "right", DONE, {"wood": 4, "wood_pickaxe": 1, "stone_pickaxe": 1}, ["do"]),
    ],
)
def test_the_script_decides(picture, facing, done, inventory, actions):
    assert expert.decide(seen(picture, facing, done, **inventory).text()).actions == actions


def test_the_script_plays_far_better_than_random_actions():
    found = {policy: [traces.record(seed, policy) for seed in range(4)] for policy in ("expert", "random")}
    script, chance = (mean(total for _, total, _ in games) for games in found.values())
    assert script > 10
    assert script > 3 * chance
    for records, _, _ in found["expert"]:
        steps = sum(len(actions(m)) for one in records for m in one["messages"] if m["role"] == "assistant")
        assert steps >= min(LENGTH, 20)


def actions(message):
    (call,) = message["tool_calls"]
    return call["function"]["arguments"]["actions"]


def test_traces_are_conversations_that_megasft_reads(tmp_path):
    out = tmp_path / "traces.jsonl"
    written = traces.write(out, "expert", [1, 2], processes=1)
    lines = out.read_text().splitlines()
    assert len(lines) == written.conversations
    calls = 0
    for number, line in enumerate(lines, 1):
        record = json.loads(line)
        found = check_record(record, str(out), number)
        assert isinstance(found, Conversation)
        assert found.tools == traces.TOOLS
        roles = [message["role"] for message in record["messages"]]
        assert roles[:2] == ["system", "user"]
        assert roles[2:] == (["assistant", "tool"] * traces.CALLS)[: len(roles) - 2]
        assert roles[-1] == "assistant"
        for message in record["messages"]:
            if message["role"] == "assistant":
                assert 1 <= len(actions(message)) <= expert.MOST
                calls += 1
    assert calls == written.calls
    assert {json.loads(line)["metadata"]["seed"] for line in lines} == {1, 2}


def test_aimless_players_differ_follow_their_rules_and_play_badly():
    game = Game()
    game.start(8)
    views = [game.endow(random.Random(seed)) for seed in range(60)]
    players = [aimless.make(number) for number in range(aimless.PLAYERS)]
    answers = [[player(view) for view in views] for player in players]
    for k, own in enumerate(answers):
        assert all(own != other for other in answers[:k])
        assert own == [aimless.make(k)(view) for view in views], "a player is a function of its number"
        assert len({decision.words for decision in own}) >= 3
        assert all(1 <= len(decision.actions) <= expert.MOST for decision in own)
        assert all(action in ACTIONS for decision in own for action in decision.actions)
    seats = play.play(
        lambda seats: [("", aimless.make(s.seed % aimless.PLAYERS)(s.messages[-1]["content"])) for s in seats],
        [*range(8)],
    )
    assert mean(seat.result().total for seat in seats) < 2


def test_answers_of_aimless_players_are_rarely_the_ones_before():
    """A model that learned from answers that are mostly repeated would learn to repeat them, not to read."""
    repeated, pairs = 0, 0
    for seed in range(2):
        records, _, _ = traces.record(seed, "aimless")
        for record in records:
            answers = [message for message in record["messages"] if message["role"] == "assistant"]
            repeated += sum(one == before for before, one in pairwise(answers))
            pairs += len(answers) - 1
            assert all(message["content"] in aimless_answers(record) for message in answers)
    assert pairs > 100
    assert repeated < 0.4 * pairs  # 0.2; 0.85 where the player keeps what it has


def aimless_answers(record):
    """What the player of a conversation says to what it sees."""
    decide = aimless.make(int(record["messages"][0]["content"].rstrip(".").split()[-1]))
    return [decide(message["content"]).words for message in record["messages"] if message["role"] in ("user", "tool")]


def test_an_aimless_player_follows_the_first_of_its_rules_that_applies(monkeypatch):
    thirsty, rich = (lambda view: view.vitals["drink"] <= 4), (lambda view: view.have.get("stone", 0) >= 3)
    own = [aimless.Rule([thirsty, rich], "water", ["do"]), aimless.Rule([rich], "sleep", ["noop"] * 2)]
    monkeypatch.setattr(aimless, "rules", lambda player: own)
    decide = aimless.make(0)
    lake = ". . . @ . W"
    assert decide(seen(lake, drink=4, stone=3).text()) == ("water", ["move_right", "move_right", "do"])
    assert decide(seen("@ . .", drink=4, stone=3).text()) == ("sleep", ["noop", "noop"]), "there is no water"
    assert decide(seen(lake, drink=5, stone=3).text()) == ("sleep", ["noop", "noop"])
    assert decide(seen(lake, "left", drink=4, stone=2).text()) == ("open", ["move_left"] * 3)
    bent = seen("@ T W\n. . .", drink=1, stone=9)
    assert decide(bent.text()) == ("water", ["move_down"]), "of a way that bends, the first leg alone"


def test_games_of_aimless_players_begin_anew_with_other_belongings_and_name_the_player():
    records, _, _ = traces.record(6, "aimless")
    first = {one["messages"][1]["content"].splitlines()[1] for one in records}
    assert len(first) > len(records) / 2
    assert {one["messages"][0]["content"] for one in records} == {aimless.name(6 % aimless.PLAYERS)}
    assert all(one["tools"] == traces.TOOLS for one in records)


def test_an_aimless_player_says_nothing_too_often():
    for seed in (6, 7):
        records, _, _ = traces.record(seed, "aimless")
        said = Counter(m["content"] for one in records for m in one["messages"] if m["role"] == "assistant")
        assert sum(said.values()) > 200
        assert len(said) >= 10
        assert max(said.values()) < 0.15 * sum(said.values())  # 0.12; 0.26 where it has the first that is drawn


def test_a_careless_player_slips_unseen_and_answers_as_the_script():
    records, _, _ = traces.record(9, "careless")
    game = Game()
    for record in records:
        for view, answer in pairwise(record["messages"][1:]):
            if answer["role"] == "assistant":
                assert (answer["content"], actions(answer)) == expert.decide(view["content"])
    seen = game.start(9)
    for answer in records[0]["messages"][2::2]:
        seen = game.interact(actions(answer))
    assert records[1]["messages"][1]["content"] != seen, "the game went on in between"
    script, _, _ = traces.record(9, "expert")
    assert script[0]["messages"] == records[0]["messages"]
    assert script[1]["messages"][1]["content"] == seen


def test_interact_stops_where_the_player_is_hurt():
    game = Game()
    game.start(0)
    player = game._player
    game.interact(["noop"])
    player._hunger, player.inventory["food"], player._recover = 0, 0, -15
    before = game.steps
    game.interact(["noop"] * 5)
    assert game.steps == before + 1


def test_only_a_wellformed_call_is_one():
    def answer(arguments, name="interact"):
        return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'

    assert play.read_decision(answer({"actions": ["do", "move_up"]})) == ("", ["do", "move_up"])
    assert play.read_decision("tree\n" + answer({"actions": ["do"]})) == ("tree", ["do"])
    for wrong in (
        answer({"actions": []}),
        answer({"actions": ["fly"]}),
        answer({"actions": ["do"] * 6}),
        answer({"actions": "do"}),
        answer({"actions": ["do"], "more": 1}),
        answer({"actions": ["do"]}, "act"),
        answer({"actions": ["do"]}) * 2,
        answer({"actions": ["do"]}).replace("]", ""),
        "do",
        "",
    ):
        assert play.read_decision(wrong) is None


def test_players_meet_the_same_worlds_and_a_call_that_is_none_is_a_noop():
    seats = play.play(lambda playing: [("hm", None) for _ in playing], [400_000, 400_001])
    for seat in seats:
        result = seat.result()
        assert (result.wellformed, result.achievements) == (0, [])
        assert result.calls == result.steps == LENGTH
    script = play.play(play.scripted("expert", [400_000]), [400_000])[0].result()
    assert script.total == traces.record(400_000, "expert")[1]
    assert script.wellformed == script.calls
