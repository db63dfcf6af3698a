"""What programs send, links, tables of documents: parts of two benchmarks."""

import json
import sys
import time
from pathlib import Path

import collectives
import compile_tables
import gpu
import gpu_tables
import jax
import jax.numpy as jnp
import links
import markdown
import pytest
import scaling
import scaling_tables
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from solov2_jax.training import sharding

ROOT = Path(__file__).resolve().parent.parent


def test_the_bytes_of_a_compiled_program_are_those_counted_by_hand():
    """A gradient of two parameters over four devices, and nothing else, is summed."""
    mesh = sharding.make_mesh(4)
    copied, by_batch = sharding.replicated(mesh), sharding.split_by_batch(mesh)

    def loss(params, x):
        return jnp.mean(jnp.square(x @ params["kernel"] + params["bias"][None]))

    params = {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)}
    step = jax.jit(jax.grad(loss), in_shardings=(copied, by_batch))
    text = step.lower(params, jnp.ones((8, 6))).compile().as_text()
    (found,) = collectives.summed(collectives.read_collectives(text))
    assert found["kind"] == "all-reduce" and found["types"] == ["f32"]
    assert (found["arrays"], found["bytes"]) == (2, 4 * (6 * 5 + 5))


def test_what_is_gathered_is_counted_whole():
    mesh = sharding.make_mesh(2)
    copied, by_batch = sharding.replicated(mesh), NamedSharding(mesh, P("data"))
    gather = jax.jit(lambda x: x, in_shardings=by_batch, out_shardings=copied)
    text = gather.lower(jnp.ones((4, 3), jnp.int32)).compile().as_text()
    (found,) = collectives.read_collectives(text)
    assert (found.kind, found.bytes) == ("all-gather", 4 * 3 * 4)


def test_combined_and_asynchronous_operations_are_read_once():
    text = """
  %x = (bf16[3,4]{1,0:T(8,128)(2,1)}, /*index=1*/f32[]{:T(128)}) all-reduce-start(%a)
  %y = (bf16[3,4]{1,0}, f32[]) all-reduce-done(%x), metadata={op_name="b"}
  ROOT %z = pred[7]{0} collective-permute(%c), metadata={op_name="jit(f)/roll"}
  %all-reduce.3 = f32[2] add(%d, %e)
"""
    first, second = collectives.read_collectives(text)
    assert (first.kind, first.arrays, first.bytes) == ("all-reduce", 2, 24 + 4)
    assert first.types == ("bf16", "f32") and first.source == ""
    assert (second.kind, second.bytes) == ("collective-permute", 7)
    assert second.source == "jit(f)/roll"


GIVEN = links.Assumptions(link_share=1.0, host_latency=0.0, network_latency=0.0, hop_latency=0.0)


def test_the_time_of_an_all_reduce_is_that_of_its_bytes():
    hosts = links.System("", 1.0, chips_per_host=4, inside=100.0, outside=10.0)
    reduce = links.all_reduce_seconds
    assert reduce(400, 1, hosts, GIVEN) == 0
    # Two of four parts are sent on by each: 2 * 3/4 * 400 bytes.
    assert reduce(400, 4, hosts, GIVEN) == pytest.approx(6)
    # A quarter of the bytes is each chip's share between two hosts.
    assert reduce(400, 8, hosts, GIVEN) == pytest.approx(6 + 10)
    torus = links.System("", 1.0, 4, inside=100.0, axes=2, full_torus=16)
    ring, line = reduce(400, 16, torus, GIVEN), reduce(400, 8, torus, GIVEN)
    assert ring == pytest.approx(2 * 15 / 16 * 4)
    assert line == pytest.approx(2 * (2 * 7 / 8 * 4)), "an open axis has half the rate"


def test_latency_counts_for_each_message():
    given = links.Assumptions(combine_bytes=100, host_latency=1.0, network_latency=2.0)
    system = links.System("", 1.0, 2, inside=1e30, outside=1e30)
    assert links.all_reduce_seconds(250, 2, system, given) == pytest.approx(3 * 1.0)
    assert links.all_reduce_seconds(250, 4, system, given) == pytest.approx(3 * 3.0)


def test_the_last_message_is_never_hidden():
    assert links.exposed_seconds(300, 9.0, window=100.0, combine=100) == 3.0
    assert links.exposed_seconds(300, 9.0, window=4.0, combine=100) == 3.0 + 2.0
    assert links.exposed_seconds(50, 9.0, window=100.0, combine=100) == 9.0


def test_every_system_names_its_source_and_rates_of_one_direction():
    for system in links.SYSTEMS:
        assert system.source and system.peak > 1e14
        assert (system.outside > 0) != (system.axes > 0), system.name
        assert system.inside < 1e12, "1 TB/s in one direction: both were added"


def test_efficiency_falls_with_chips_and_rises_with_the_step():
    system = links.SYSTEMS[0]

    def share(chips, step):
        return scaling.efficiencies(system, chips, 10**8, step, backward=0.6)

    few, many = share(8, 0.05), share(256, 0.05)
    assert 0 < many["efficiency"] < few["efficiency"] < 1
    assert many["efficiency"] < many["efficiency_overlapped"] < 1
    assert share(256, 0.2)["efficiency"] > many["efficiency"]
    # By hand: 0.05 s of a step and the all-reduce behind it.
    assert few["efficiency"] == pytest.approx(0.05 / (0.05 + few["all_reduce_s"]))


def test_a_host_delivers_what_its_chips_take():
    args = scaling.parse(["paper", "--objects", "10", "--images_per_core", "20"])
    found = scaling.host_input(links.SYSTEMS[0], 5.0, args)
    assert found["images_per_s"] == 40 and found["decode_cores"] == 2
    image = 3 * 800 * 1344 + 10 * 200 * 336
    assert found["to_chips_mb_per_s"] == pytest.approx(40 * image / 1e6)


def test_tables_and_the_places_they_stand_in():
    made = markdown.table(("a", "b"), [("x", "1.5"), ("y", "-")])
    assert made == "| a | b |\n| --- | --: |\n| x | 1.5 |\n| y | - |"
    text = "t\n<!-- one -->\nold\nlines\n<!-- end -->\nu\n<!-- two -->\n<!-- end -->\n"
    filled = markdown.fill(text, {"one": r"new \1", "two": "z"})
    assert filled == ("t\n<!-- one -->\nnew \\1\n<!-- end -->\nu\n<!-- two -->\nz\n<!-- end -->\n")
    assert markdown.fill(filled, {"one": r"new \1"}) == filled
    with pytest.raises(ValueError, match="no place <!-- three -->"):
        markdown.fill(text, {"three": ""})


def test_the_scaling_document_is_what_the_results_say():
    text = (ROOT / "docs" / "scaling.md").read_text()
    path = ROOT / "benchmarks" / "results" / "scaling.json"
    blocks = scaling_tables.blocks(json.loads(path.read_text()))
    assert markdown.fill(text, blocks) == text, "run `python benchmarks/scaling.py`"


def test_compile_times_are_summed_to_the_first_result():
    phase = {"trace": 1.0, "lower": 0.5, "compile": 2.0, "programs": 1, "hits": 0}
    phases = {
        name: {"seconds": seconds, **phase}
        for name, seconds in (("imports", 4.0), ("first", 6.0), ("second", 100.0))
    }
    found = compile_tables.totals(phases)
    assert found["seconds"] == 10 and found["compile"] == 4
    assert found["rest"] == 10 - 4 - 2 * 3.5
    row = {"cold": phases, "warm": phases, "size": [2, 3], "cache_mb": 1.0}
    table = compile_tables.render({"rows": {"r50 step": row}})
    assert "| r50 step, 2 x 3 | 10.0 | 10.0 | 4.0 |" in table


def test_gpu_tables_show_ratios_differences_and_what_is_missing():
    ours = {
        "matmul:bfloat16": {"flops_per_s": 5e14},
        "train:bfloat16:2": {
            "images_per_s": 30.0,
            "share_of_matmul": 0.41,
            "first_loss": 3.0,
        },
        "infer:tf32:1": {"skipped": "3 s were left"},
    }
    torch = {"train:bfloat16:2:eager": {"images_per_s": 20.0, "first_loss": 3.5}}
    content = {
        "config": "c",
        "size": [64, 64],
        "total_s": 1.0,
        "ours": {"about": {}, "jobs": ours},
        "torch": {"about": {}, "jobs": torch},
    }
    text = gpu_tables.render(content)
    row = "| train bfloat16 2 | 30.0 | 41% | - | - | 20.0 | 1.50 | - | - | - | - |"
    assert row in text
    assert "ours infer:tf32:1: skipped, 3 s were left" in text
    assert "the first loss is 3.0000, torch's 3.5000" in text
    content["torch"] = {"missing": "no --torch_python was given"}
    assert "torch: not measured, no --torch_python was given" in gpu_tables.render(content)


def test_a_gpu_side_that_fails_or_is_late_leaves_what_it_had(tmp_path):
    script = tmp_path / "side.py"
    script.write_text(
        "import json, sys, time\n"
        "print(json.dumps({'about': {'jax': '1'}}), flush=True)\n"
        "print(json.dumps({'job': 'a', 'x': 1}), flush=True)\n"
        "if '--fail' in sys.argv: sys.exit('no memory')\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, str(script)]
    found = gpu.side([*command, "--fail"], deadline=time.time() + 60)
    assert found["jobs"] == {"a": {"x": 1}} and found["about"] == {"jax": "1"}
    assert "exit code 1: no memory" in found["missing"]
    late = gpu.side(command, deadline=time.time() - 1)
    assert late["jobs"] == {"a": {"x": 1}} and "exit code -9" in late["missing"]
