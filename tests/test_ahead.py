"""Programs compiled for devices that are not there: reading them, lowering, and what they hold.

Those marked `ahead` take minutes each, and the plug-ins of benchmarks/ahead.txt; `nox -s ahead`.
"""

import dataclasses
import functools
import importlib.util

import ahead
import hlo
import jax
import jax.numpy as jnp
import pytest
import scaling_tables
from ahead import Case
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_network import tiny_config

from solov2_jax import distributed
from solov2_jax.models.group_norm import group_norm_levels
from solov2_jax.ops import group_norm

# --- Reading a program ---------------------------------------------------------------


@pytest.fixture(scope="module")
def looping():
    """Returns the text of a loop around a convolution and a sum, a branch and a search."""
    mesh = distributed.make_mesh(2)

    def of_device(kernel, images):
        def add(total, image):
            y = jax.lax.conv_general_dilated(
                image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return total + jax.lax.psum(jnp.sum(y, (0, 1, 2)), "data"), None

        total, _ = jax.lax.scan(add, jnp.zeros(8), images)
        total = jax.lax.cond(total[0] > 0, lambda: jnp.sin(total), lambda: total)
        total = jax.lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: x + jnp.cos(x), total)
        return jax.lax.pmax(jnp.max(total), "data")

    rows = P(None, "data")
    run = jax.shard_map(of_device, mesh=mesh, in_specs=(P(), rows), out_specs=P(), check_vma=False)
    images = jnp.ones((5, 2, 8, 8, 3))
    return jax.jit(run).lower(jnp.ones((3, 3, 3, 8)), images).compile().as_text()


def test_branches_loops_and_what_is_in_them(looping):
    found = hlo.read_program(looping)
    assert found["conditionals"] == 1
    assert found["loops"] == [None, 5], "the search ends when the data say so"
    assert found["convolutions"] == {
        "number": 1,
        "types": {"f32->f32": 1},
        "layouts": {"b01f_01io->b01f": 1},
        "unaligned": {"3": 2},
    }
    (sums,) = found["collectives"]
    assert (sums["operations"], sums["in_loops"]) == (2, 1)
    assert sums["types"] == {"f32": 8 * 4 + 4} and found["host"] == {}
    # Five times: an image of one device, the filter, the result.
    assert found["moved"]["convolutions"] == 5 * 4 * (8 * 8 * 3 + 3 * 3 * 3 * 8 + 8 * 8 * 8)


def test_the_bytes_of_a_compiled_program_are_those_counted_by_hand():
    """A gradient of two parameters over four devices, and nothing else, is summed."""
    mesh = distributed.make_mesh(4)
    copied, by_batch = distributed.replicated(mesh), distributed.split_by_batch(mesh)

    def loss(params, x):
        return jnp.mean(jnp.square(x @ params["kernel"] + params["bias"][None]))

    params = {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)}
    step = jax.jit(jax.grad(loss), in_shardings=(copied, by_batch))
    text = step.lower(params, jnp.ones((8, 6))).compile().as_text()
    (found,) = hlo.read_collectives(text)
    assert found["kind"] == "all-reduce" and found["types"] == {"f32": 140}
    assert (found["arrays"], found["bytes"]) == (2, 4 * (6 * 5 + 5))


def test_what_is_gathered_is_counted_whole():
    mesh = distributed.make_mesh(2)
    copied, by_batch = distributed.replicated(mesh), NamedSharding(mesh, P("data"))
    gather = jax.jit(lambda x: x, in_shardings=by_batch, out_shardings=copied)
    text = gather.lower(jnp.ones((4, 3), jnp.int32)).compile().as_text()
    (found,) = hlo.read_collectives(text)
    assert (found["kind"], found["bytes"]) == ("all-gather", 4 * 3 * 4)


def test_combined_and_asynchronous_operations_are_read_once():
    text = """
  %x = (bf16[3,4]{1,0:T(8,128)(2,1)}, /*index=1*/f32[]{:T(128)}) all-reduce-start(%a)
  %y = (bf16[3,4]{1,0}, f32[]) all-reduce-done(%x), metadata={op_name="b"}
  ROOT %z = pred[7]{0} collective-permute(%c), metadata={op_name="jit(f)/roll"}
  %all-reduce.3 = f32[2] add(%d, %e)
"""
    first, second = hlo.read_collectives(text)
    assert first == {
        "kind": "all-reduce", "types": {"bf16": 24, "f32": 4}, "operations": 1, "in_loops": 0,
        "arrays": 2, "bytes": 28,
    }  # fmt: skip
    assert (second["kind"], second["bytes"]) == ("collective-permute", 7)
    (total,) = hlo.read_collectives(text.replace("collective-permute", "all-reduce"))
    assert (total["operations"], total["arrays"], total["bytes"]) == (2, 3, 35)


# Of a GPU: cuDNN's gradient of a filter, a callback, and a loop with a known number of trips.
ON_GPU = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %r = f32[4]{0} all-reduce-start(%x), to_apply=%add
  %d = f32[4]{0} all-reduce-done(%r)
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %d)
}

ENTRY %main (a: bf16[2,8,8,258], b: bf16[2,8,8,16]) -> f32[4] {
  %a = bf16[2,8,8,258]{3,2,1,0} parameter(0)
  %b = bf16[2,8,8,16]{2,3,1,0} parameter(1)
  %c = (bf16[16,3,3,258]{3,2,1,0}, u8[0]{0}) custom-call(%a, %b), window={size=3x3}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %w = (s32[], f32[4]{0}) while(%t0), condition=%less, body=%body, \
backend_config={"known_trip_count":{"n":"20"}}
  %h = f32[4]{0} custom-call(%x0), custom_call_target="xla_ffi_python_gpu_callback"
  ROOT %o = f32[4]{0} get-tuple-element(%w), index=1
}
"""


def test_calls_of_a_gpus_libraries_are_read_by_their_parts():
    found = hlo.read_program(ON_GPU)
    assert found["loops"] == [20] and found["host"] == {"xla_ffi_python_gpu_callback": 1}
    convolutions = found["convolutions"]
    assert convolutions["types"] == {"bf16->bf16": 1}
    # The second operand is the output's gradient, here with its columns innermost.
    assert convolutions["layouts"] == {"b01f_o01i->b0f1": 1}
    assert convolutions["unaligned"] == {"258": 2}
    assert found["collectives"][0]["in_loops"] == 1
    sides = 2 * 8 * 8 * 258 + 2 * 8 * 8 * 16 + 16 * 3 * 3 * 258
    assert found["moved"] == {
        "convolutions": 2 * sides,
        "other": 16,
        "in_loops": 20 * 2 * 16,
    }


def test_of_what_is_sliced_the_slice_is_moved():
    text = """
%cut (x: f32[8,16], i: s32[]) -> f32[1,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %c = f32[8,16]{1,0} bitcast(%x)
  ROOT %s = f32[1,16]{1,0} dynamic-slice(%c, %i, %i), dynamic_slice_sizes={1,16}
}

%put (y: f32[8,16], u: f32[1,16], j: s32[]) -> f32[8,16] {
  %y = f32[8,16]{1,0} parameter(0)
  %u = f32[1,16]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %d = f32[8,16]{1,0} dynamic-update-slice(%y, %u, %j, %j)
}

ENTRY %main (a: f32[8,16], k: s32[]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %row = f32[1,16]{1,0} fusion(%a, %k), kind=kLoop, calls=%cut
  ROOT %new = f32[8,16]{1,0} fusion(%a, %row, %k), kind=kLoop, calls=%put
}
"""
    row, number = 4 * 16, 4
    # Read and written; read, and written in place.
    assert hlo.read_program(text)["moved"]["other"] == (2 * row + number) + (2 * row + number)
    whole = text.replace("dynamic-slice(%c", "custom(%c").replace(" dynamic-update-slice", " pad")
    moved = hlo.read_program(whole)["moved"]["other"]
    assert moved == (8 * row + row + number) + (8 * row + row + number + 8 * row)


def test_what_a_tpu_keeps_on_the_chip_is_not_moved():
    text = """
%twice (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %t = f32[8,16]{1,0:T(8,128)} add(%x, %x)
}

ENTRY %main (a: f32[8,16], b: f32[32,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %b = f32[32,16]{1,0:T(8,128)} parameter(1)
  %there = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %here = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%there)
  %part = ((f32[32,16]{1,0:T(8,128)}), f32[8,16]{1,0:T(8,128)}, s32[]{:S(2)}) slice-start(%b), \
slice={[0:8], [0:16]}
  ROOT %new = f32[8,16]{1,0:T(8,128)} fusion(%here), kind=kLoop, calls=%twice
}
"""
    one = 4 * 8 * 16
    # Read onto the chip; read and written elsewhere; the result.
    assert hlo.read_program(text)["moved"]["other"] == one + 2 * one + one


def test_a_loop_without_a_note_ends_as_its_condition_says():
    text = """
%below (p: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(7), metadata={}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="while/cond/lt"}
}

%search (p.2: (s32[], s32[])) -> pred[] {
  %end = s32[]{:T(128)} get-tuple-element(%p.2), index=1
  %j = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (a: (s32[])) -> (s32[]) {
  %w = (s32[]{:T(128)}) while(%a), condition=%below, body=%add
  ROOT %w.2 = (s32[]{:T(128)}, s32[]{:T(128)}) while(%b), condition=%search, body=%add
}
"""
    assert hlo.read_program(text)["loops"] == [None, 7]


# --- What programs should hold -------------------------------------------------------

SOUND = dataclasses.asdict(Case(devices=8, accumulate=2)) | {
    "kind": "H100",
    "compile_s": 1.0,
    "state_bytes": 400,
    "gradient_bytes": 100,
    "temp_bytes": 1e9,
    "argument_bytes": 1e9,
    "aliased_bytes": 400,
    "bytes": 2e9,
    "conditionals": 0,
    "loops": [2, 2, 2],
    "convolutions": {"layouts": {"b01f_o01i->b01f": 3}},
    "collectives": [
        {
            "kind": "all-reduce",
            "types": {"f32": 120},
            "operations": 1,
            "arrays": 3,
            "in_loops": 0,
            "bytes": 120,
        }
    ],
    "host": {},
    "moved": {"convolutions": 1e9, "other": 1e9, "in_loops": 1e9},
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"conditionals": 3}, "3 conditionals"),
        ({"loops": [2, 20, 100]}, "loops of"),
        ({"loops": [None]}, "loops of"),
        ({"aliased_bytes": 399}, "donated"),
        ({"host": {"outfeed": 1}}, "outfeed"),
        ({"convolutions": {"layouts": {"bf01_oi01->bf01": 1}}}, "bf01"),
        ({"collectives": []}, "bytes summed"),
        ({"collectives": [SOUND["collectives"][0] | {"in_loops": 1}]}, "1 in loops"),
        ({"collectives": [SOUND["collectives"][0] | {"types": {"bf16": 120}}]}, "bf16"),
        ({"collectives": [SOUND["collectives"][0] | {"bytes": 340}]}, "340 bytes summed"),
        ({"collectives": [*SOUND["collectives"], {"kind": "all-gather"}]}, "all-gather"),
    ],
)
def test_what_a_program_should_not_hold_is_named(change, named):
    assert ahead.defects(SOUND) == []
    (found,) = ahead.defects(SOUND | change)
    assert named in found


def test_a_detection_may_have_one_branch_and_one_search():
    found = SOUND | {"what": "detection", "conditionals": 1, "loops": [None], "collectives": []}
    assert ahead.defects(found) == []
    (named,) = ahead.defects(found | {"loops": [None, 20]})
    assert "loops of [None, 20] trips" in named


def test_the_table_of_programs():
    table = scaling_tables.ahead_table({"x": SOUND})
    cells = [cell.strip() for cell in table.splitlines()[-1].split("|")]
    assert cells[1:7] == [
        "8 x H100",
        "step, r50_3x, bfloat16, 800 x 1344",
        "16, in 2 parts",
        "0",
        "2, 2, 2",
        "1 of 3 arrays: f32 0.00012 MB",
    ]
    assert cells[9] == "100.0%"


# --- Compiled for absent devices -----------------------------------------------------


def test_the_step_lowers_for_chips_that_hold_no_array(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an array is put on a chip that is not there")

    monkeypatch.setattr(jax, "make_array_from_callback", refuse)
    lowered, state = ahead.lower_step(jax.devices()[:2], tiny_config(), (64, 64), 3)
    text = lowered.as_text()
    assert state > 4 * 11e6, "R18's parameters, in float32, twice with the momentum"
    assert "tensor<6x64x64x3xui8>" in text, "three images for each of two chips"


LIGHT = "configs/light_448_r18.py"


def need_compiler(target):
    plugin = {"h100": "jax_plugins.xla_cuda12", "v5e": "libtpu"}[target]
    if not importlib.util.find_spec(plugin):
        pytest.skip(f"no {plugin}: pip install --no-deps -r benchmarks/ahead.txt")


def one_map(xs, scale, bias, groups):
    return [group_norm(x, scale, bias, groups) for x in xs]


@pytest.mark.ahead
@pytest.mark.parametrize("target", ["h100", "v5e"])
@pytest.mark.parametrize(
    ("norm", "channels", "sizes", "images"),
    [
        (group_norm_levels, 512, [(g, g) for g in (40, 36, 24, 16, 12)], 16),
        (one_map, 256, [(200, 336)], 8),
    ],
    ids=["levels", "mask features"],
)
def test_group_norm_moves_little_more_than_it_must(target, norm, channels, sizes, images):
    """Values twice and the result, then values and gradient twice and the gradient: 8 maps."""
    need_compiler(target)
    copied = distributed.replicated(distributed.mesh_of(ahead.describe_devices(target, 1)))
    describe = functools.partial(jax.ShapeDtypeStruct, sharding=copied)

    def both_ways(xs, scale, bias, grads):
        def normed(xs, scale, bias):
            return [jax.nn.relu(y) for y in norm(xs, scale, bias, groups=32)]

        ys, back = jax.vjp(normed, xs, scale, bias)
        return ys, back(grads)

    maps = [describe((images, *size, channels), jnp.bfloat16) for size in sizes]
    vector = describe((channels,), jnp.float32)
    lowered = jax.jit(both_ways).lower(maps, vector, vector, maps)
    options = ahead.GPU_OPTIONS if target == "h100" else {}
    moved = hlo.read_program(lowered.compile(compiler_options=options).as_text())["moved"]
    least = 8 * sum(x.size * x.dtype.itemsize for x in maps)
    assert sum(moved.values()) <= 1.5 * least


@pytest.mark.ahead
@pytest.mark.parametrize(
    ("case", "temporaries"),
    [
        (Case(), 14.5e9),
        (Case(dtype="float32", accumulate=2), 20e9),
        (Case(what="detection", images=1), 0.5e9),
        (Case(config=LIGHT, size=(448, 768), images=2, devices=8, accumulate=2), 2e9),
        (Case(config=LIGHT, size=(448, 768), images=2, devices=8, dtype="float32"), 4e9),
        (Case(target="v5e", config=LIGHT, size=(256, 384), images=2, devices=8), 2e9),
    ],
    ids=lambda x: " ".join(map(str, dataclasses.astuple(x))) if isinstance(x, Case) else None,
)
def test_a_compiled_program_holds_what_it_should(case, temporaries):
    need_compiler(case.target)
    row = ahead.compile_case(case)
    assert not ahead.defects(row)
    assert row["temp_bytes"] <= temporaries
    if case == Case():
        assert row["moved"]["other"] + row["moved"]["in_loops"] <= 73e9
    assert not row["convolutions"]["unaligned"].keys() & {"258", "130", "66"}
