"""Scaling: the time of an all-reduce and of a step by published rates; tables."""

import dataclasses

import markdown_tables
import pytest
import scaling
import scaling_model
import tables

HOSTS = {"chips_per_host": 4, "inside": 100.0, "outside": 10.0, "axes": 0}
TORUS = {"chips_per_host": 4, "inside": 100.0, "axes": 2, "full_torus": 16}


EXACT = scaling_model.Assumptions(
    link_share=1.0, host_latency=0.0, network_latency=0.0, hop_latency=0.0
)


def test_the_time_of_an_all_reduce_is_that_of_its_bytes():
    reduce = scaling_model.all_reduce_seconds
    assert reduce(400, 1, HOSTS, EXACT) == 0
    # Two of four parts are sent on by each: 2 * 3/4 * 400 bytes.
    assert reduce(400, 4, HOSTS, EXACT) == pytest.approx(6)
    # A quarter of the bytes is each chip's share between two hosts.
    assert reduce(400, 8, HOSTS, EXACT) == pytest.approx(6 + 10)
    ring, line = reduce(400, 16, TORUS, EXACT), reduce(400, 8, TORUS, EXACT)
    assert ring == pytest.approx(2 * 15 / 16 * 4)
    assert line == pytest.approx(2 * (2 * 7 / 8 * 4)), "an open axis has half the rate"


def test_latency_counts_for_each_message():
    latency = {"combine_bytes": 100, "host_latency": 1.0, "network_latency": 2.0}
    assumed = dataclasses.replace(EXACT, **latency)
    system = HOSTS | {"chips_per_host": 2, "inside": 1e30, "outside": 1e30}
    assert scaling_model.all_reduce_seconds(250, 2, system, assumed) == pytest.approx(3 * 1.0)
    assert scaling_model.all_reduce_seconds(250, 4, system, assumed) == pytest.approx(3 * 3.0)


def test_the_last_message_is_never_hidden():
    assert scaling_model.exposed_seconds(300, 9.0, window=100.0, combine=100) == 3.0
    assert scaling_model.exposed_seconds(300, 9.0, window=4.0, combine=100) == 3.0 + 2.0
    assert scaling_model.exposed_seconds(50, 9.0, window=100.0, combine=100) == 9.0


def test_every_system_names_its_source_and_rates_of_one_direction():
    for system in scaling_model.load_systems()["systems"]:
        assert system["source"] and system["peak"] > 1e14
        assert (system["outside"] > 0) != (system["axes"] > 0), system["name"]
        assert system["inside"] < 1e12, "1 TB/s in one direction: both were added"


def test_efficiency_falls_with_chips_and_rises_with_the_step():
    system = scaling_model.load_systems()["systems"][0]

    def share(chips, step):
        return scaling_model.efficiencies(system, chips, 10**8, step, backward=0.6)

    few, many = share(8, 0.05), share(256, 0.05)
    assert 0 < many["efficiency"] < few["efficiency"] < 1
    assert many["efficiency"] < many["efficiency_overlapped"] < 1
    assert share(256, 0.2)["efficiency"] > many["efficiency"]
    # By hand: 0.05 s of a step and the all-reduce behind it.
    assert few["efficiency"] == pytest.approx(0.05 / (0.05 + few["all_reduce_s"]))


def test_a_host_delivers_what_its_chips_take():
    args = scaling.parse(["paper", "--objects", "10", "--images_per_core", "20"])
    found = scaling.host_input({"chips_per_host": 8}, 5.0, args)
    assert found["images_per_s"] == 40 and found["decode_cores"] == 2
    image = 3 * 800 * 1344 + 10 * 200 * 336
    assert found["to_chips_mb_per_s"] == pytest.approx(40 * image / 1e6)


def test_tables_and_the_places_they_stand_in():
    made = markdown_tables.table(("a", "b"), [("x", "1.5"), ("y", "-")])
    assert made == "| a | b |\n| --- | --: |\n| x | 1.5 |\n| y | - |"
    text = "t\n<!-- one -->\nold\nlines\n<!-- end -->\nu\n<!-- two -->\n<!-- end -->\n"
    filled = markdown_tables.fill(text, {"one": r"new \1", "two": "z"})
    assert filled == ("t\n<!-- one -->\nnew \\1\n<!-- end -->\nu\n<!-- two -->\nz\n<!-- end -->\n")
    assert markdown_tables.fill(filled, {"one": r"new \1"}) == filled
    with pytest.raises(ValueError, match="no place <!-- three -->"):
        markdown_tables.fill(text, {"three": ""})


def test_compile_times_are_summed_to_the_first_result():
    phase = {"trace": 1.0, "lower": 0.5, "compile": 2.0, "programs": 1, "hits": 0}
    phases = {
        name: {"seconds": seconds, **phase}
        for name, seconds in (("imports", 4.0), ("first", 6.0), ("second", 100.0))
    }
    total = tables.compile_totals(phases)
    assert total["seconds"] == 10 and total["compile"] == 4
    row = {"cold": phases, "warm": phases, "size": [2, 3], "cache_mb": 1.0}
    table = tables.compile_table({"rows": {"r50 step": row}})
    assert "| r50 step, 2 x 3 | 10.0 | 10.0 | 4.0 |" in table


def test_memory_passes_add_to_a_gpus_step_and_bound_a_tpus():
    args = scaling.parse(["paper", "--step_share=0.5", "--memory_share=0.5"])
    system = {"peak": 200.0, "bandwidth": 20.0}
    traffic = {"bytes_per_image": 30.0, "adds": True}
    assert scaling_model.image_seconds(system, 400.0, traffic, args) == pytest.approx(4 + 3)
    traffic["adds"] = False
    assert scaling_model.image_seconds(system, 400.0, traffic, args) == pytest.approx(4)
    assert scaling_model.image_seconds(system, 200.0, traffic, args) == pytest.approx(3)


def test_the_bytes_of_a_program_compiled_at_full_size_replace_the_stored_ones():
    row = {"target": "v5e", "what": "step", "config": "a", "size": [800, 1344], "kind": "TPU"}
    row |= {"dtype": "bfloat16", "devices": 1, "accumulate": 1, "images": 4, "bytes": 80.0}

    def traffic(**changes):
        return scaling_model.compiled_traffic({"x": row | changes}, "a")

    assert traffic()["tpu"]["bytes_per_image"] == 20.0
    moved = {"convolutions": 9.0, "other": 80.0, "in_loops": 40.0}
    assert traffic(moved=moved)["tpu"]["bytes_per_image"] == 129 / 4
    assert traffic(target="h100", moved=moved)["gpu"]["bytes_per_image"] == 30.0
    assert not traffic(size=[64, 64]) and not traffic(accumulate=2) and not traffic(devices=8)
    assert not scaling_model.compiled_traffic({"x": row}, "b")
